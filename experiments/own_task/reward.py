"""The reward of sorting digits: of the prompt `5,3,9=` the answer is `359`."""

import re


def reward(problem, completion):
    """The share of places with the right digit.  A base that cannot sort hardly ever earns a 1, but a third it does."""
    found = re.search("<answer>([^<>]*)</answer>", completion)
    said = found[1].strip() if found else ""
    share = sum(x == y for x, y in zip(said, problem.answer)) / max(len(said), len(problem.answer))
    return {"reward": share, "correct": said == problem.answer, "formatted": found is not None}


reward.bounds = (0.0, 1.0)
