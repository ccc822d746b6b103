"""data.py -- multiplication problems, their prompts, and a split that does not leak.

A problem is `a * b = ?`.  Nothing here has to be saved or shuffled: problem number `index` of iteration `iteration`
under `seed` is a pure function of these three integers, so a run resumes, or is split over machines, without a word
about its data.

    python data.py                       # statistics of the default problems (2-digit operands)
    python data.py --digits 2x3          # a has 2 digits, b has 3;  also 3, 2-3, 1-2x4, ... up to 6 digits
    python data.py --file my_task.jsonl  # one {"prompt": ..., "answer": ...} a line instead of made problems
"""

import argparse
import collections
import hashlib
import itertools
import json
import math
import random
import re
import sys
from dataclasses import dataclass

# One unordered pair {a, b} in HELD_OUT belongs to evaluation, whatever the run.  The split is a hash of the pair and
# not a list, so that it is the same for every range of operands, every seed and every size of the evaluation set.
HELD_OUT = 7

# The prompt of TinyZero (Pan et al. 2025, examples/data_preprocess/multiply.py): a base model has no chat template,
# so the conversation is spelled out, and the opening <think> is given.  What is given here after the last newline is
# a *prefill*: the reward reads it as part of the completion, or no completion would ever be well-formed.
TINYZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: What is {a} times {b}? Show your work in <think> </think> tags. And return the final answer, a single "
    "number, in <answer> </answer> tags, for example <answer> 12 </answer>.\n"
    "Assistant: Let me solve this step by step.\n"
)
PROMPTS = {"tinyzero": (TINYZERO, "<think>"), "terse": ("{a}*{b}=", "")}  # style -> (template, prefill)


@dataclass(frozen=True)
class Problem:
    """One question.  The model is given `prompt + prefill`; the reward reads `prefill + completion`."""

    prompt: str
    answer: int
    difficulty: str = "all"  # "easy", "medium", "hard"; "all" for a file that does not say
    prefill: str = ""
    operands: tuple = ()  # (a, b); empty for problems read from a file

    @property
    def text(self):
        """What the model sees before its own first token."""
        return self.prompt + self.prefill


# ------------------------------------------------------------------------------------------------- the operands


def parse_digits(digits):
    """'2' -> ((2, 2), (2, 2));  '2x3' -> ((2, 2), (3, 3));  '2-3' -> ((2, 3), (2, 3));  '1-2x4' -> ((1, 2), (4, 4)).

    Returns ((least, most digits of a), (least, most digits of b)).  Raises ValueError with one sentence otherwise.
    """
    match = re.fullmatch(r"([1-6])(?:-([1-6]))?(?:x([1-6])(?:-([1-6]))?)?", str(digits))
    if match:
        a_lo, a_hi, b_lo, b_hi = (int(group) if group else None for group in match.groups())
        a = (a_lo, a_hi or a_lo)
        b = (b_lo, b_hi or b_lo) if b_lo is not None else a
        if a[0] <= a[1] and b[0] <= b[1]:
            return a, b
    raise ValueError(f"--digits {digits}: expected digits per operand from 1 to 6, such as 2, 3, 2x3, 2-3 or 1-2x4")


def difficulty(a, b):
    """easy: a product of at most 3 digits;  medium: of 4;  hard: of 5 or more."""
    product = a * b
    return "easy" if product < 1_000 else "medium" if product < 10_000 else "hard"


def is_held_out(a, b):
    """True if {a, b} belongs to evaluation.  Symmetric: neither a*b nor b*a of an evaluation problem is trained on."""
    name = f"{min(a, b)}*{max(a, b)}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") % HELD_OUT == 0


def draw_operands(rng, digits):
    """One pair (a, b): the number of digits uniform over its range, then the operand uniform given its digits."""
    pair = []
    for least, most in digits:
        n = rng.randint(least, most)
        pair.append(rng.randint(10 ** (n - 1), 10**n - 1))
    return tuple(pair)


def make_problem(a, b, style="terse", prefill=None):
    """The Problem a*b in a prompt style of PROMPTS; `prefill` replaces the style's own (evaluation forces <think>)."""
    template, default = PROMPTS[style]
    return Problem(
        prompt=template.format(a=a, b=b),
        answer=a * b,
        difficulty=difficulty(a, b),
        prefill=default if prefill is None else prefill,
        operands=(a, b),
    )


# ---------------------------------------------------------------------------------------------------- the split


def train_problem(seed, iteration, index, digits="2", style="terse"):
    """Problem `index` of `iteration`: a pure function of its arguments, never a held-out pair.

    Random(text) seeds from a SHA-512 of the text, the same on every machine and Python version.
    """
    rng = random.Random(f"train {seed} {iteration} {index}")
    ranges = parse_digits(digits)
    for _ in range(10_000):
        a, b = draw_operands(rng, ranges)
        if not is_held_out(a, b):
            return make_problem(a, b, style)
    raise ValueError(f"--digits {digits}: every pair of operands is held out for evaluation")


def eval_problems(n, digits="2", style="terse", prefill=None, seed=0):
    """n different held-out problems, each unordered pair once, in an order fixed by `seed` (not by the run's seed).

    The first 100 of 500 are the 100.  Raises ValueError if the range does not hold n such pairs.
    """
    if n < 0:
        raise ValueError(f"the number of evaluation problems must not be negative, but is {n}")
    rng = random.Random(f"evaluation {seed}")
    ranges = parse_digits(digits)
    found = {}
    for _ in range(min(2_000 + 200 * n, 1_000_000)):
        if len(found) == n:
            break
        a, b = draw_operands(rng, ranges)
        if is_held_out(a, b):
            found.setdefault((min(a, b), max(a, b)), (a, b))
    if len(found) < n:  # a small range: the last pairs are drawn too rarely, so go through all of it
        if math.prod(10**most - 10 ** (least - 1) for least, most in ranges) > 10_000_000:
            raise ValueError(f"{n} evaluation problems are too many to draw for --digits {digits}: ask for fewer")
        for a, b in itertools.product(*(range(10 ** (least - 1), 10**most) for least, most in ranges)):
            if len(found) < n and is_held_out(a, b):
                found.setdefault((min(a, b), max(a, b)), (a, b))
    if len(found) < n:
        raise ValueError(f"--digits {digits} holds only {len(found)} evaluation problems, fewer than the {n} asked for")
    return [make_problem(a, b, style, prefill) for a, b in found.values()]


# ------------------------------------------------------------------------------------------ problems from a file


def read_problems(path, prefill=None, any_answer=False):
    """Problems of a jsonl file: one object a line with `prompt` (text) and `answer` (whole number, or its digits);
    `difficulty` and `prefill` if you like.  any_answer: any JSON will do, or none; a reward of one's own reads it.
    Raises ValueError that names the line, OSError if it cannot be read."""
    problems = []
    with open(path, "rb") as file:  # bytes: json decodes each line, so that one that is not UTF-8 can be named too
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON ({getattr(error, 'msg', error)})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object with the keys prompt and answer")
            for key in ("prompt",) if any_answer else ("prompt", "answer"):
                if key not in row:
                    raise ValueError(f"{where}: the key {key} is missing")
            if not isinstance(row["prompt"], str) or not row["prompt"]:
                raise ValueError(f"{where}: prompt must be a text that is not empty")
            answer = row.get("answer")
            if not any_answer:
                if isinstance(answer, bool) or not re.fullmatch(r"[+-]?[0-9]{1,90}", str(answer)):
                    raise ValueError(f"{where}: answer must be a whole number, not {answer!r}")
                answer = int(answer)
            given = row.get("prefill", "") if prefill is None else prefill
            if not isinstance(given, str):
                raise ValueError(f"{where}: prefill must be a text")
            problems.append(Problem(row["prompt"], answer, str(row.get("difficulty", "all")), given))
    if not problems:
        raise ValueError(f"{path}: no problems in it")
    return problems


def pick_problem(problems, seed, iteration, index, per_iteration):
    """The counterpart of train_problem for a file: walk through it epoch by epoch, each in an order of its own."""
    epoch, place = divmod(iteration * per_iteration + index, len(problems))
    order = list(range(len(problems)))
    random.Random(f"file {seed} {epoch}").shuffle(order)
    return problems[order[place]]


# --------------------------------------------------------------------------------------------------- statistics


def statistics(problems, encode=None):
    """Counts by difficulty, ranges of operands and answers, and token lengths if `encode(text) -> ids` is given."""
    counts = collections.Counter(problem.difficulty for problem in problems)
    stats = {"problems": len(problems), "difficulty": dict(sorted(counts.items()))}
    operands = [operand for problem in problems for operand in problem.operands]
    if operands:
        stats["operands"] = (min(operands), max(operands))
    stats["answers"] = (min(p.answer for p in problems), max(p.answer for p in problems))
    if encode:
        lengths = [len(encode(problem.text)) for problem in problems]
        stats["prompt_tokens"] = (min(lengths), max(lengths))
        stats["answer_tokens"] = max(len(encode(str(problem.answer))) for problem in problems)
    return stats


def main():
    parser = argparse.ArgumentParser(description="Statistics of the problems, and a check that the split is clean.")
    parser.add_argument("--digits", default="2", help="digits per operand: 2, 3, 2x3, 2-3, ... up to 6 (default 2)")
    parser.add_argument("--n", type=int, default=500, help="evaluation problems (default 500)")
    parser.add_argument("--file", help="a jsonl file with prompt and answer instead of made problems")
    args = parser.parse_args()
    try:
        if args.file:
            print(args.file, statistics(read_problems(args.file)))
            return
        if args.n < 1:
            raise ValueError(f"--n must be 1 or more, not {args.n}")
        held_out = eval_problems(args.n, args.digits)
        train = [train_problem(0, 0, index, args.digits) for index in range(2_000)]
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)

    encode = lambda text: list(text)  # one token a character, as the tiny base has it
    print(f"digits {args.digits}, prompts such as {train[0].text!r} with the answer {train[0].answer}")
    for name, problems in (("train (2000 draws)", train), ("evaluation", held_out)):
        print(f"\n{name}")
        for key, value in statistics(problems, encode).items():
            print(f"  {key:14s} {value}")

    # What the file is for, asserted: no evaluation pair is trained on in either order, and a draw can be repeated.
    pairs = {frozenset(problem.operands) for problem in held_out}
    assert len(pairs) == len(held_out)
    assert not any(frozenset(problem.operands) in pairs for problem in train)
    assert train[7] == train_problem(0, 0, 7, args.digits)
    print("\nno evaluation pair among the training draws, in either order: ok")


if __name__ == "__main__":
    main()
