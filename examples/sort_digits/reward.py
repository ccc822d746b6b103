"""The reward of sorting digits: of the prompt `5,3,9=` the answer is `359`.

python train.py ... --reward examples/sort_digits/reward.py:reward
"""

import re


def reward(problem, completion):
    """The share of places that hold the right digit, in [0, 1].

    A model that cannot sort yet earns a 1 hardly ever, but about a third quite often. So a share
    gives it something to learn from, where a reward of all or nothing would not.
    """
    found = re.search("<answer>([^<>]*)</answer>", completion)
    said = found[1].strip() if found else ""
    right_places = sum(x == y for x, y in zip(said, problem.answer))
    # Divided by the longer of the two, so that extra digits lower the share as missing ones do.
    share = right_places / max(len(said), len(problem.answer))
    return {"reward": share, "correct": said == problem.answer, "formatted": found is not None}


reward.bounds = (0.0, 1.0)
