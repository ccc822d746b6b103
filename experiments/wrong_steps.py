"""Which step is wrong in the wrong answers of a trained model?

    python eval.py --model runs/local --json runs/local/eval.json
    python experiments/wrong_steps.py runs/local/eval.jsonl

Reads the completions that eval.py --json wrote, those of the terse prompts.  A completion is
`<think>12*30=360 12*8=96 360+96=456</think>...`: products, their sum, the answer.  Printed are the
wrong completions by their first wrong step, and how often sums with and without a carry are right.
"""

import argparse
import collections
import json
import re

STEP = re.compile(r"(\d+)([*+])(\d+)=(\d+)")


def carries(x, y):
    """True if the written addition of x and y has a carry."""
    while x and y:
        if x % 10 + y % 10 >= 10:
            return True
        x, y = x // 10, y // 10
    return False


def steps_of(text):
    """[(x, sign, y, z), ...]: the steps x*y=z and x+y=z of a completion, in order."""
    return [(int(x), sign, int(y), int(z)) for x, sign, y, z in STEP.findall(text)]


def is_right(step):
    """Does the step compute what it says?"""
    x, sign, y, z = step
    return z == (x * y if sign == "*" else x + y)


def first_wrong(text):
    """What is wrong first in a wrong completion, as a text."""
    steps = steps_of(text)
    for step in steps:
        if not is_right(step):
            x, sign, y, _ = step
            if sign == "*":
                return "a product"
            return "a sum with a carry" if carries(x, y) else "a sum without a carry"
    return "no step: the plan, or a number that was copied" if steps else "no steps were written"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="the .jsonl file of eval.py --json")
    args = parser.parse_args()
    wrong = collections.Counter()
    sums = collections.Counter()  # (has a carry, is right): steps of all completions
    with open(args.file) as file:
        for row in map(json.loads, file):
            for completion in row["completions"]:
                text = completion["text"]
                if not completion["correct"]:
                    wrong[first_wrong(text)] += completion["count"]
                for step in steps_of(text):
                    if step[1] == "+":
                        sums[carries(step[0], step[2]), is_right(step)] += completion["count"]
    for kind, n in wrong.most_common():
        print(f"{n:5d} wrong completions: {kind}")
    for carry in (True, False):
        right, all_sums = sums[carry, True], sums[carry, True] + sums[carry, False]
        print(f"sums {'with' if carry else 'without'} a carry: {right} of {all_sums} right")


if __name__ == "__main__":
    main()
