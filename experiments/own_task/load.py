"""Reads a task of one's own: problems from a jsonl file, a reward from FILE.py:FUNCTION.

make.py beside this file writes such problems and reward.py is such a reward; README, "Your own task", says what they may
be.  data.read_problems and reward.load come here; to the loop there is no difference.
"""

import json
import math
import numbers
import os
import re
import runpy
from dataclasses import dataclass

from data import Problem
from reward import RewardError

# ==================================================================================================== problems


def read_problems(path, prefill, any_answer):
    """See data.read_problems."""
    problems = []
    with open(path, "rb") as file:  # bytes: json decodes each line, so that one that is not UTF-8 can be named too
        for number, line in enumerate(file, start=1):
            try:
                problems += [read_problem(line, prefill, any_answer)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not problems:
        raise ValueError(f"{path}: no problems in it")
    return problems


def read_problem(line, prefill, any_answer):
    """The Problem of one line.  Raises ValueError that says what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(row, dict):
        raise ValueError("expected an object with the keys prompt and answer")
    for key in ("prompt",) if any_answer else ("prompt", "answer"):
        if key not in row:
            raise ValueError(f"the key {key} is missing")
    prompt, answer = row["prompt"], row.get("answer")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError("prompt must be a text that is not empty")
    if not any_answer:  # true is an int to Python, and int() takes "1_000"
        if isinstance(answer, bool) or not re.fullmatch("[+-]?[0-9]{1,90}", str(answer)):
            raise ValueError(f"answer must be a whole number, not {answer!r}")
        answer = int(answer)
    prefill = row.get("prefill", "") if prefill is None else prefill
    if not isinstance(prefill, str):
        raise ValueError("prefill must be a text")
    return Problem(prompt, answer, str(row.get("difficulty", "all")), prefill)


# ====================================================================================================== reward


@dataclass(frozen=True)
class OwnReward:
    """function(problem, completion), asked for one completion at a time.

    problem: a data.Problem, its `answer` whatever JSON the line of the file holds; completion: text, prefill included.
    It returns a number within `bounds` (r_lo, r_hi), or a dict with `reward` and, if it likes, `correct` (else: is the
    reward r_hi?), `formatted` (else True) and `answer`, what majority votes count (else the completion).
    It is not asked about a truncated completion: that earns r_lo.
    """

    name: str
    function: object
    bounds: tuple

    def judge(self, problem, completion, length_fraction=0.0, truncated=False):
        """{reward, correct, formatted, answer} of one completion, as Reward has it.  Raises RewardError."""
        lo, hi = self.bounds
        if truncated:
            return {"reward": lo, "correct": False, "formatted": False, "answer": None}
        try:
            said = self.function(problem, completion)
            parts = said if isinstance(said, dict) else {"reward": said}
            reward = parts.get("reward")
            if isinstance(reward, numbers.Real) and lo - 1e-6 <= reward <= hi + 1e-6:  # a sum of shares may be rounded
                correct, formatted = parts.get("correct", reward >= hi - 1e-6), parts.get("formatted", True)
                verdict = {"reward": float(reward), "correct": bool(correct), "formatted": bool(formatted)}
                return verdict | {"answer": str(parts.get("answer", completion))}
            what = f"returned {short(said)}, not a number from {lo:g} to {hi:g}"
        except Exception as error:  # whatever a user's function may raise
            what = f"raised {type(error).__name__} ({error})"
        place = f"for the prompt {short(problem.prompt)} and the completion {short(completion)}"
        raise RewardError(f"--reward {self.name} {' '.join(what.split())} {place}")


def short(thing):
    """Its repr, the middle left out of a long one."""
    text = repr(thing)
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def load_reward(name):
    """The OwnReward that FILE.py:FUNCTION names.  Raises ValueError with one sentence."""
    file, _, function = name.rpartition(":")
    if not os.path.isfile(file):
        raise ValueError(f"--reward {name}: expected FILE.py:FUNCTION, and there is no file {file!r}")
    try:
        function = runpy.run_path(file)[function]
        lo, hi = map(float, function.bounds)
    except Exception as error:  # whatever a user's file may raise
        what = " ".join(f"{type(error).__name__} ({error})".split())
        raise ValueError(f"--reward {name}: {what}; it takes a function with .bounds = (lowest, highest)") from None
    if not -math.inf < lo < hi < math.inf:
        raise ValueError(f"--reward {name}: bounds must be two finite numbers, lowest first, not {function.bounds}")
    return OwnReward(name, function, (lo, hi))
