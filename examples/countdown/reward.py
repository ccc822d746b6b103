"""The reward of countdown: `2+3*5` for the prompt `2,3,5 17=`.

python train.py ... --reward examples/countdown/reward.py:reward
"""

import collections
import re


def reward(problem, completion):
    """1 if the calculation in <answer> tags is right; else up to 0.5 for the numbers in it.

    A model that cannot do it yet would hardly ever earn the 1.  So each number that is used as it
    should be earns a part of the 0.5.
    """
    found = re.search("<answer>([^<>]*)</answer>", completion)
    said = found[1].replace(" ", "") if found else ""
    # Numbers of one or two digits with operators between them, so that eval below is safe.
    if not re.fullmatch(r"[1-9][0-9]?([-+*][1-9][0-9]?)*", said):
        return {"reward": 0.0, "correct": False, "formatted": found is not None}
    used = collections.Counter(int(number) for number in re.findall("[0-9]+", said))
    given = collections.Counter(problem.answer["numbers"])
    if used == given and eval(said) == problem.answer["target"]:
        return {"reward": 1.0, "correct": True, "formatted": True}
    # Divided by the longer of the two, so that extra numbers lower the share as missing ones do.
    share = (used & given).total() / max(used.total(), given.total())
    return {"reward": 0.5 * share, "correct": False, "formatted": True}


reward.bounds = (0.0, 1.0)
