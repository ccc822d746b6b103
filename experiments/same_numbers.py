"""Do two checkouts train alike?  Compares metrics.jsonl of the first iterations of every setting.

    python experiments/same_numbers.py OLD [NEW] [--iterations 5] [--only NAME ...]

OLD and NEW are checkouts; NEW is this one if it is left out.  Every metric but seconds must be
equal, bit for bit.  A setting is stopped by SIGTERM after so many iterations, so that its
learning-rate schedule is the real one.  One thread a process.  The old checkout's numbers are kept
in OUT and reused.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

# Every flag that the settings depend on is spelled out, so that defaults that a newer checkout
# chooses do not matter.
GRPO = "--loss grpo --rollouts-per-problem 64 --tau 0 --until-right on --max-nodes 128"
APO = "--loss apo --rollouts-per-problem 64 --tau 0 --until-right on --max-nodes 128"
SAMPLE = "--rollout sample --rollouts-per-problem 4"
SETTINGS = {
    "local": "",
    "quick": "--config quick --iterations 24 --eval-every 6",
    "ppo": "--config ppo",
    "sample": SAMPLE,
    "grpo": GRPO,
    "apo": APO,
    "two ranks": "--distributed",
}


def first_rows(checkout, flags, iterations, folder):
    """The rows of iterations 0 to `iterations` of a run in a checkout, without wall seconds."""
    command = [sys.executable]
    if "--distributed" in flags:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["train.py", *flags.split(), "--device", "cpu", "--eval-problems", "100"]
    command += ["--output-dir", str(folder), "--overwrite"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(str(folder) + ".log", "w") as log:
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=log)
        metrics = folder / "metrics.jsonl"
        # The file of an earlier run is emptied before the first row of this one is written.
        started = time.time()
        while process.poll() is None:
            time.sleep(0.5)
            fresh = metrics.exists() and metrics.stat().st_mtime > started
            if fresh and len(metrics.read_text().splitlines()) > iterations:
                process.send_signal(signal.SIGTERM)
                process.wait()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()][: iterations + 1]
    if len(rows) <= iterations:
        sys.exit(f"{checkout}: train.py {flags} ended early, see {folder}.log")
    for row in rows:
        del row["seconds"]
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument(
        "new", nargs="?", default=str(pathlib.Path(__file__).resolve().parent.parent)
    )
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", default="runs/same_numbers")
    args = parser.parse_args()
    out = pathlib.Path(args.out).resolve()
    different = 0
    for name, flags in SETTINGS.items():
        if args.only and name not in args.only:
            continue
        kept = out / f"old {name} {args.iterations}.json"
        if not kept.exists():
            out.mkdir(parents=True, exist_ok=True)
            kept.write_text(
                json.dumps(first_rows(args.old, flags, args.iterations, out / f"old {name}"))
            )
        old = json.loads(kept.read_text())
        new = first_rows(args.new, flags, args.iterations, out / f"new {name}")
        wrong = []
        for before, after in zip(old, new, strict=True):
            wrong += [
                f"iteration {before['iteration']}: {key} {before[key]} -> {after.get(key)}"
                for key in before
                if before[key] != after.get(key)
            ]
        print(
            f"{name}: {'the same' if not wrong else 'DIFFERENT'}",
            *wrong[:5],
            sep="\n    ",
            flush=True,
        )
        different += bool(wrong)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
