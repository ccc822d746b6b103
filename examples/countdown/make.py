"""Writes problems of countdown, the other task of TinyZero: train.jsonl and eval.jsonl.

Three numbers and a target: write a calculation that uses each number once and reaches the target.
A line is {"prompt": "2,3,5 17=", "answer": {"numbers": [2, 3, 5], "target": 17}}.  `2+3*5` solves
it.  Numbers are 1 to 9, operators are + - *, without brackets; every target from 1 to 99 that can
be reached is a problem.

    python examples/countdown/make.py --words [FOLDER]  # TinyZero's words, for a real model
    python examples/countdown/make.py [FOLDER]          # as above, for a model of few tokens

FOLDER is that of this file, unless another is named.  The prompts in words end like TinyZero's,
with an opened <think> (a prefill).  The tiny base does not learn this task: it never writes an
operator in an answer, so no right one is ever found (60 iterations of --config ppo, seed 0).
"""

import itertools
import json
import pathlib
import random
import sys

# Pan et al. 2025, github.com/Jiayi-Pan/TinyZero, examples/data_preprocess/countdown.py
WORDS = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer.\n"
    "User: Using the numbers {numbers}, create an equation that equals {target}. You can use basic "
    "arithmetic operations (+, -, *) and each number can only be used once. Show your work in "
    "<think> </think> tags. And return the final answer in <answer> </answer> tags, for example "
    "<answer> 1+2*3 </answer>.\n"
    "Assistant: Let me solve this step by step.\n"
)


def reachable(numbers):
    """The targets from 1 to 99 that the numbers reach, each used once, in any order, as a list."""
    targets = set()
    for order in itertools.permutations(numbers):
        for first, second in itertools.product("+-*", repeat=2):
            a, b, c = order
            targets.add(eval(f"{a}{first}{b}{second}{c}"))
    return sorted(target for target in targets if 1 <= target <= 99)


def is_held_out(numbers):
    """True if the problems of these three numbers belong to evaluation: about one in ten."""
    return random.Random(f"countdown {numbers}").random() < 0.1


def main():
    """Write both files."""
    arguments = sys.argv[1:]
    in_words = "--words" in arguments
    folders = [argument for argument in arguments if argument != "--words"]
    folder = pathlib.Path(folders[0]) if folders else pathlib.Path(__file__).parent

    if not folder.is_dir():
        sys.exit(f"make.py: there is no folder {folder}")

    rows = {"train": [], "eval": []}
    for numbers in itertools.combinations_with_replacement(range(1, 10), 3):
        part = "eval" if is_held_out(numbers) else "train"
        for target in reachable(numbers):
            if in_words:
                prompt = WORDS.format(numbers=list(numbers), target=target)
                row = {"prompt": prompt, "prefill": "<think>"}
            else:
                row = {"prompt": f"{','.join(map(str, numbers))} {target}="}
            row["answer"] = {"numbers": numbers, "target": target}
            rows[part].append(row)

    for part, problems in rows.items():
        path = folder / f"{part}.jsonl"
        path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
        print(f"{len(problems)} problems in {path}")


if __name__ == "__main__":
    main()
