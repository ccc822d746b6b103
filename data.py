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
import functools
import hashlib
import itertools
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
    if re.fullmatch("[1-6](-[1-6])?(x[1-6](-[1-6])?)?", str(digits)):
        ranges = [(int(part[0]), int(part[-1])) for part in str(digits).split("x")]  # one for both, or one for each
        if all(least <= most for least, most in ranges):
            return ranges[0], ranges[-1]
    raise ValueError(f"--digits {digits}: expected digits per operand from 1 to 6, such as 2, 3, 2x3, 2-3 or 1-2x4")


def difficulty(a, b):
    """easy: a product of at most 3 digits;  medium: of 4;  hard: of 5 or more."""
    product = a * b
    return "easy" if product < 1_000 else "medium" if product < 10_000 else "hard"


def is_held_out(a, b):
    """True if {a, b} belongs to evaluation.  Symmetric: neither a*b nor b*a of an evaluation problem is trained on."""
    name = f"{min(a, b)}*{max(a, b)}".encode()
    # a checksum, for Python's own hash() of a text is another one in every process
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
    prefill = default if prefill is None else prefill  # "" is a wish, not an absence
    return Problem(template.format(a=a, b=b), a * b, difficulty(a, b), prefill, (a, b))


# ---------------------------------------------------------------------------------------------------- the split
def train_problem(seed, iteration, index, digits="2", style="terse"):
    """Problem `index` of `iteration`: a pure function of its arguments, never a held-out pair.

    Random(text) seeds from a SHA-512 of the text, the same on every machine and Python version.
    """
    rng, ranges = random.Random(f"train {seed} {iteration} {index}"), parse_digits(digits)
    a, b = draw_operands(rng, ranges)
    while is_held_out(a, b):  # one draw in seven; no range is held out as a whole
        a, b = draw_operands(rng, ranges)
    return make_problem(a, b, style)


def eval_problems(n, digits="2", style="terse", prefill=None, seed=0):
    """n different held-out problems, each unordered pair once, in an order fixed by `seed` (not by the run's seed).

    The first 100 of 500 are the 100.  Raises ValueError if the range does not hold n such pairs.
    """
    if not 1 <= n <= 100_000:
        raise ValueError(f"the number of evaluation problems must lie in [1, 100000], but is {n}")
    rng, ranges = random.Random(f"evaluation {seed}"), parse_digits(digits)
    drawn = (draw_operands(rng, ranges) for _ in range(min(2_000 + 200 * n, 1_000_000)))
    # In a small range the last pairs are drawn too rarely: then go through all of it.  (A range of more than 10 million
    # pairs never comes to that: a seventh of a million draws is more than the largest n.)
    all_a, all_b = (range(10 ** (least - 1), 10**most) for least, most in ranges)
    every = ((a, b) for a in all_a for b in all_b)
    found = {}  # unordered pair -> as it was drawn
    for a, b in itertools.chain(drawn, every):
        if len(found) == n:
            break
        if is_held_out(a, b):
            found.setdefault((min(a, b), max(a, b)), (a, b))
    if len(found) < n:
        raise ValueError(f"--digits {digits} holds only {len(found)} evaluation problems, fewer than the {n} asked for")
    return [make_problem(a, b, style, prefill) for a, b in found.values()]


# ------------------------------------------------------------------------------------------ problems from a file
def read_problems(path, prefill=None, any_answer=False):
    """Problems of a jsonl file: one object a line with `prompt` (text) and `answer` (whole number, or its digits);
    `difficulty` and `prefill` if you like.  any_answer: any JSON will do, or none; a reward of one's own reads it.
    Raises ValueError that names the line, OSError if it cannot be read.  (The one function that needs another file.)"""
    from experiments.own_task import load

    return load.read_problems(path, prefill, any_answer)


@functools.lru_cache(maxsize=2)
def order_of(n, seed, epoch):
    """0 to n - 1 in the order of an epoch; kept, since each problem of the epoch asks for it."""
    order = list(range(n))
    random.Random(f"file {seed} {epoch}").shuffle(order)
    return order


def pick_problem(problems, seed, iteration, index, per_iteration):
    """The counterpart of train_problem for a file: walk through it epoch by epoch, each in an order of its own."""
    epoch, place = divmod(iteration * per_iteration + index, len(problems))
    return problems[order_of(len(problems), seed, epoch)[place]]


# --------------------------------------------------------------------------------------------------- statistics
def statistics(problems):
    """Counts by difficulty; smallest and largest operand, answer, and length of a prompt in characters."""
    span = lambda numbers: (min(numbers), max(numbers)) if numbers else None
    counts = collections.Counter(problem.difficulty for problem in problems)
    stats = {"problems": len(problems), "difficulty": dict(sorted(counts.items()))}
    stats["operands"] = span([operand for problem in problems for operand in problem.operands])
    return stats | {"answers": span([p.answer for p in problems]), "prompt": span([len(p.text) for p in problems])}


def main():
    parser = argparse.ArgumentParser(description="Statistics of the problems, and a check that the split is clean.")
    parser.add_argument("--digits", default="2", help="digits per operand: 2, 3, 2x3, 2-3, ... up to 6 (default 2)")
    parser.add_argument("--n", type=int, default=500, help="evaluation problems (default 500)")
    parser.add_argument("--file", help="a jsonl file with prompt and answer instead of made problems")
    args = parser.parse_args()
    try:
        if args.file:
            return print(args.file, statistics(read_problems(args.file)))
        held_out = eval_problems(args.n, args.digits)
        train = [train_problem(0, 0, index, args.digits) for index in range(2_000)]
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"digits {args.digits}, prompts such as {train[0].text!r} with the answer {train[0].answer}")
    for name, problems in (("train (2000 draws)", train), ("evaluation", held_out)):
        print(f"\n{name}", *(f"  {key:14s} {value}" for key, value in statistics(problems).items()), sep="\n")

    # What the file is for, asserted: no evaluation pair is trained on in either order, and a draw can be repeated.
    pairs = {frozenset(problem.operands) for problem in held_out}
    assert len(pairs) == len(held_out) and pairs.isdisjoint(frozenset(problem.operands) for problem in train)
    assert train[7] == train_problem(0, 0, 7, args.digits)
    print("\nno evaluation pair among the training draws, in either order: ok")


if __name__ == "__main__":
    main()
