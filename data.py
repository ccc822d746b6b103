"""data.py -- multiplication problems, their prompts, and an evaluation split that does not leak.

A problem is `a * b = ?`.  The problem number `index` of iteration `iteration` under `seed` is a
pure function of these three integers.  So a run can be resumed, or split over machines, without
saving anything about its data: each process computes the problems that it needs.

The problems may also come from a jsonl file: one {"prompt": ..., "answer": ...} a line.

    python data.py                       # statistics of the default problems (2-digit operands)
    python data.py --digits 2x3          # a has 2 digits, b has 3; also 3, 2-3, 1-2x4, ... up to 6
    python data.py --file my_task.jsonl  # statistics of the problems in a file
"""

import argparse
import codecs
import collections
import difflib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import reprlib
import sys
from dataclasses import dataclass

# One unordered pair {a, b} in HELD_OUT belongs to evaluation, in every run.  The split is a hash of
# the pair and not a list.  So it is the same for every range of operands, every seed and every
# number of evaluation problems.
HELD_OUT = 7

# The prompt of TinyZero (Pan et al. 2025, examples/data_preprocess/multiply.py).  A base model has
# no chat template, so the prompt spells the conversation out.
TINYZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer.\n"
    "User: What is {a} times {b}? Show your work in <think> </think> tags. And return the final "
    "answer, a single number, in <answer> </answer> tags, for example <answer> 12 </answer>.\n"
    "Assistant: Let me solve this step by step.\n"
)

# style -> (template, prefill).  TinyZero's prompt ends with an opened <think>.  Here that is not
# part of the template but a prefill, which the reward reads as part of the completion.  Otherwise
# the reward would see a </think> that was never opened, and no completion would be well-formed.
PROMPTS = {"tinyzero": (TINYZERO, "<think>"), "terse": ("{a}*{b}=", "")}
# style -> texts that end a completion, besides the model's end tokens.  A base model goes on after
# its answer, with the next question for example.
STOP_TEXTS = {"tinyzero": ("</answer>",), "terse": ()}


@dataclass(frozen=True)
class Problem:
    """One question.  The model is given prompt + prefill; the reward reads prefill + completion."""

    prompt: str
    answer: int  # with a reward of your own: any JSON value
    difficulty: str = "all"  # "easy", "medium" or "hard"; "all" for a file that does not say
    prefill: str = ""
    operands: tuple = ()  # (a, b); empty for problems read from a file

    @property
    def text(self):
        """What the model reads before it writes its first token."""
        return self.prompt + self.prefill


# ----------------------------------------------------------------------------------------- Operands


def parse_digits(digits):
    """The ranges of digits that a value of --digits stands for.

    '2' -> ((2, 2), (2, 2));  '2x3' -> ((2, 2), (3, 3));  '2-3' -> ((2, 3), (2, 3));
    '1-2x4' -> ((1, 2), (4, 4)).
    Returns ((least, most digits of a), (least, most digits of b)).
    Raises ValueError with one sentence for anything else.
    """
    if re.fullmatch("[1-6](-[1-6])?(x[1-6](-[1-6])?)?", str(digits)):
        # One part stands for both operands, two parts for one operand each.
        ranges = [(int(part[0]), int(part[-1])) for part in str(digits).split("x")]
        if all(least <= most for least, most in ranges):
            return ranges[0], ranges[-1]
    raise ValueError(
        f"--digits {digits}: expected digits per operand from 1 to 6, "
        "such as 2, 3, 2x3, 2-3 or 1-2x4"
    )


def difficulty(a, b):
    """'easy': a product of at most 3 digits; 'medium': of 4; 'hard': of 5 or more."""
    product = a * b
    if product < 1_000:
        return "easy"
    if product < 10_000:
        return "medium"
    return "hard"


def is_held_out(a, b):
    """True if the pair {a, b} belongs to evaluation.

    Symmetric: if a*b is an evaluation problem, neither a*b nor b*a is ever trained on.  They have
    the same product, so a model that memorised one would know the other.
    """
    name = f"{min(a, b)}*{max(a, b)}"
    # A checksum, because Python's own hash() of a text differs from process to process.
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT == 0


def draw_operands(rng, digits):
    """One random pair (a, b).

    digits: two ranges as parse_digits returns them.  The number of digits is uniform over its
    range, then the operand is uniform among those with that many digits.
    """
    pair = []
    for least, most in digits:
        n = rng.randint(least, most)
        pair.append(rng.randint(10 ** (n - 1), 10**n - 1))
    return tuple(pair)


def make_problem(a, b, style="terse", prefill=None):
    """The Problem a*b in a prompt style of PROMPTS.

    prefill: a text that replaces the style's own (evaluation can force a <think> this way).  The
    empty text "" means no prefill; None means the style's own.
    """
    template, style_prefill = PROMPTS[style]
    return Problem(
        prompt=template.format(a=a, b=b),
        answer=a * b,
        difficulty=difficulty(a, b),
        prefill=style_prefill if prefill is None else prefill,
        operands=(a, b),
    )


# -------------------------------------------------------------------------- Training and evaluation


def train_problem(seed, iteration, index, digits="2", style="terse"):
    """Problem `index` of an iteration: a pure function of its arguments, never a held-out pair."""
    # Random(text) is seeded by a SHA-512 of the text, which is the same in every process.
    rng = random.Random(f"train {seed} {iteration} {index}")
    ranges = parse_digits(digits)
    a, b = draw_operands(rng, ranges)
    # One draw in seven is rejected.  The loop ends, because no range is held out as a whole.
    while is_held_out(a, b):
        a, b = draw_operands(rng, ranges)
    return make_problem(a, b, style)


def eval_problems(n, digits="2", style="terse", prefill=None, seed=0):
    """n different held-out problems, each unordered pair once.

    Their order is fixed by `seed`, which is not the seed of the run.  The first 100 of 500 problems
    are the same as the 100 problems of n = 100.
    Raises ValueError if n is not in [1, 100000], or if the range does not hold n such pairs.
    """
    if not 1 <= n <= 100_000:
        raise ValueError(f"the number of evaluation problems must lie in [1, 100000], but is {n}")
    rng = random.Random(f"evaluation {seed}")
    ranges = parse_digits(digits)
    draws = min(2_000 + 200 * n, 1_000_000)
    random_pairs = (draw_operands(rng, ranges) for _ in range(draws))
    # In a small range the last few pairs are hardly ever drawn.  So the draws are followed by a
    # walk through all pairs.  It is short in a large range too: one pair in seven is held out, and
    # a walk meets each at most twice.  So n of them are found after some 14 n steps.
    (a_least, a_most), (b_least, b_most) = ranges
    all_a = range(10 ** (a_least - 1), 10**a_most)
    all_b = range(10 ** (b_least - 1), 10**b_most)
    all_pairs = ((a, b) for a in all_a for b in all_b)
    found = {}  # unordered pair -> the pair as it was drawn
    for a, b in itertools.chain(random_pairs, all_pairs):
        if len(found) == n:
            break
        if is_held_out(a, b):
            found.setdefault((min(a, b), max(a, b)), (a, b))
    if len(found) < n:
        raise ValueError(
            f"--digits {digits} holds only {len(found)} evaluation problems, "
            f"fewer than the {n} asked for"
        )
    return [make_problem(a, b, style, prefill) for a, b in found.values()]


# ----------------------------------------------------------------------------- Problems from a file


def read_problems(path, prefill=None, any_answer=False):
    """The problems of a jsonl file, one object a line; blank lines are skipped.

    Keys of an object: `prompt` (text) and `answer` (a whole number, or a text of its digits);
    optional are `difficulty` and `prefill` (texts).
    prefill: a text that replaces the prefill of every line; None keeps them.
    any_answer: `answer` may be any JSON value, or missing (for a reward of your own).
    Raises ValueError that names the line, and OSError if the file cannot be read.
    """
    problems = []
    # Read as bytes, because json decodes each line itself.  A line that is not UTF-8 is then an
    # error of that line, which can be named.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            # Some editors begin a file with a byte order mark; in joined files it may come later.
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                problem = read_problem(line, prefill, any_answer)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            problems.append(problem)
    if not problems:
        raise ValueError(f"{path}: no problems in it")
    return problems


def read_problem(line, prefill, any_answer):
    """The Problem of one line (bytes or text) of a file; the arguments are those of read_problems.

    Raises ValueError that says what is wrong with the line.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        # JSONDecodeError.msg is the reason without the place; other ValueErrors have no msg.
        raise ValueError(f"not JSON ({getattr(error, 'msg', error)})") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("expected an object with the keys prompt and answer")
    if "prompt" not in row:
        raise ValueError("the key prompt is missing")
    if "answer" not in row and not any_answer:
        raise ValueError("the key answer is missing")

    prompt = row["prompt"]
    if not isinstance(prompt, str) or not prompt:
        raise ValueError("prompt must be a text that is not empty")
    check_text("prompt", prompt)

    answer = row.get("answer")
    if not any_answer:
        # In Python True is an int, and int() accepts "1_000", so the text is checked first.  More
        # than 90 digits are refused, since int() raises an error for thousands of them.
        if isinstance(answer, bool) or not re.fullmatch("[+-]?[0-9]{1,90}", str(answer)):
            shown = reprlib.repr(answer)
            raise ValueError(f"answer must be a whole number of at most 90 digits, not {shown}")
        answer = int(answer)

    if prefill is None:
        prefill = row.get("prefill", "")
    if not isinstance(prefill, str):
        raise ValueError("prefill must be a text")
    check_text("prefill", prefill)
    level = str(row.get("difficulty", "all"))
    check_text("difficulty", level)
    return Problem(prompt=prompt, answer=answer, difficulty=level, prefill=prefill)


def check_text(key, text):
    """Raise ValueError if a text cannot be written as UTF-8, as tokenizers and files need it.

    JSON allows one half of a surrogate pair without the other, such as "\\ud83d".
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"{key} holds {half!r}, which is half of a character") from None


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The numbers 0 to n - 1 in the random order of one epoch.

    Cached, because every problem of the epoch asks for the same list.
    """
    order = list(range(n))
    random.Random(f"file {seed} {epoch}").shuffle(order)
    return order


def pick_problem(problems, seed, iteration, index, per_iteration):
    """Problem `index` of an iteration, from a file: the counterpart of train_problem.

    problems: all problems of the file; per_iteration: how many of them an iteration uses; the first
    iteration is 0.  Each epoch visits every problem once, in a new order.
    """
    epoch, place = divmod(iteration * per_iteration + index, len(problems))
    return problems[epoch_order(len(problems), seed, epoch)[place]]


# --------------------------------------------------------------------------------------- Statistics


def statistics(problems):
    """Counts by difficulty, and the (smallest, largest) operand, answer and prompt length.

    The length of a prompt is in characters, with its prefill.  A range over nothing is None.
    """
    counts = collections.Counter(problem.difficulty for problem in problems)
    stats = {"problems": len(problems), "difficulty": dict(sorted(counts.items()))}
    measured = {
        "operands": [operand for problem in problems for operand in problem.operands],
        "answers": [problem.answer for problem in problems],
        "prompt": [len(problem.text) for problem in problems],
    }
    for name, numbers in measured.items():
        stats[name] = (min(numbers), max(numbers)) if numbers else None
    return stats


# ------------------------------------------------------------------------------------- Command line
#
# Here, because this file needs no package: train.py and eval.py read their flags before they import
# PyTorch.


def nearest_flag(flag, names):
    """Of some flags the one of which this is the initials (--lr), or which is spelled most like it.

    None if none is like it.
    """
    given = flag.strip("-")
    words = [name.strip("-") for name in names if name.startswith("--")]
    for word in words:
        if given == "".join(part[0] for part in word.split("-")):
            return f"--{word}"
    # Those with the given word in them come first, however long they are.
    with_word = [word for word in words if given in word.split("-")]
    close = difflib.get_close_matches(given, with_word, n=1, cutoff=0.0)
    close += difflib.get_close_matches(given, words, n=1)
    return f"--{close[0]}" if close else None


class OneLineParser(argparse.ArgumentParser):
    """A parser whose error is one sentence on stderr and exit status 2."""

    def parse_args(self, args=None, namespace=None):
        """As argparse's, but a flag that there is not brings up the nearest one that there is."""
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            nearest = nearest_flag(flag, self._option_string_actions)
            hint = f"did you mean {nearest}?" if nearest else "--help lists all flags"
            self.error(f"there is no flag {flag}; {hint}")
        return arguments

    def error(self, message):
        """Print the sentence and exit.  Of the ranks of a node only the first one prints it.

        Each node has a terminal of its own, so each prints.
        """
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def main():
    """Print the statistics of a file, or those of made problems with a check of their split."""
    about = "Statistics of the problems, and a check that the split is clean."
    parser = OneLineParser(prog="data.py", description=about)
    parser.add_argument(
        "--digits", default="2", help="digits per operand: 2, 3, 2x3, 2-3, ... up to 6 (default 2)"
    )
    parser.add_argument("--n", type=int, default=500, help="evaluation problems (default 500)")
    parser.add_argument(
        "--file", help="a jsonl file with prompt and answer instead of made problems"
    )
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
    try:
        if args.file:
            print(args.file, statistics(read_problems(args.file)))
            return
        held_out = eval_problems(args.n, args.digits)
        train = [train_problem(0, 0, index, args.digits) for index in range(2_000)]
    except (ValueError, OSError) as error:
        parser.error(str(error))

    first = train[0]
    print(f"digits {args.digits}, prompts such as {first.text!r} with the answer {first.answer}")
    for title, problems in (("train (2000 draws)", train), ("evaluation", held_out)):
        print(f"\n{title}")
        for key, value in statistics(problems).items():
            print(f"  {key:14s} {value}")

    # No evaluation pair is trained on, in either order.
    held_out_pairs = {frozenset(problem.operands) for problem in held_out}
    train_pairs = {frozenset(problem.operands) for problem in train}
    assert len(held_out_pairs) == len(held_out)
    assert held_out_pairs.isdisjoint(train_pairs)
    # The same arguments give the same problem again.
    assert train[7] == train_problem(0, 0, 7, args.digits)
    print("\nno evaluation pair among the training draws, in either order: ok")


if __name__ == "__main__":
    main()
