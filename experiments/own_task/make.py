"""Writes the problems of sorting three digits, train.jsonl and eval.jsonl.

    python experiments/own_task/make.py [FOLDER]        # this one, if none is given
"""

import itertools
import json
import pathlib
import random
import sys

folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
rows = {"train": [], "eval": []}
for digits in itertools.product("0123456789", repeat=3):
    answer = "".join(sorted(digits))
    # The answer decides, so that no order of an evaluation problem's digits is trained on.
    part = "eval" if random.Random(f"0 {answer}").random() < 0.1 else "train"
    rows[part].append({"prompt": ",".join(digits) + "=", "answer": answer})
for part, lines in rows.items():
    (folder / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines)} problems in {folder / part}.jsonl")
