"""Writes the problems of sorting three digits: train.jsonl and eval.jsonl.

A line is {"prompt": "5,3,9=", "answer": "359"}. All 1000 triples of digits are used.

    python examples/sort_digits/make.py [FOLDER]        # default: the folder of this file
"""

import itertools
import json
import pathlib
import random
import sys


def is_held_out(answer):
    """True if the problems with this answer belong to evaluation: about one answer in ten.

    The split goes by the answer. So if 5,3,9 is an evaluation problem, no other order of these
    three digits is trained on.
    """
    return random.Random(f"0 {answer}").random() < 0.1


def main():
    """Write both files."""
    if len(sys.argv) > 1:
        folder = pathlib.Path(sys.argv[1])
    else:
        folder = pathlib.Path(__file__).parent

    if not folder.is_dir():
        sys.exit(f"make.py: there is no folder {folder}")

    rows = {"train": [], "eval": []}
    for digits in itertools.product("0123456789", repeat=3):
        answer = "".join(sorted(digits))
        part = "eval" if is_held_out(answer) else "train"
        rows[part].append({"prompt": ",".join(digits) + "=", "answer": answer})

    for part, problems in rows.items():
        path = folder / f"{part}.jsonl"
        path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
        print(f"{len(problems)} problems in {path}")


if __name__ == "__main__":
    main()
