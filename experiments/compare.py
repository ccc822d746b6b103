"""Races: named settings x seeds, each a run of train.py until its greedy accuracy reaches a target.

    python experiments/compare.py race                     # every setting of the suite, seeds 0 1 2, two runs at a time
    python experiments/compare.py race --only 'astar*' --seeds 0
    python experiments/report.py                           # the tables

Each run has one thread, so that runs side by side do not disturb each other's seconds more than any others'.  A run
that is there is not run again, one that was stopped goes on: start the same line again.  Results: a row a run in
experiments/results/SUITE.jsonl, with the curve at every evaluation.
"""

import argparse
import concurrent.futures
import fnmatch
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"

# A race has a constant learning rate after the warm-up: no method gains by a schedule that happens to end in time.
RACE = "--final-rate 1 --iterations 2000 --eval-problems 500 --checkpoint-every 20 --keep-checkpoints 1 --samples 0"
SAMPLE = "--rollout sample"


def batches(problems, step, epochs=1):
    """So many problems an iteration and an optimiser step; warm-up and evaluations after the same number of problems."""
    return (f"--problems-per-iteration {problems} --minibatches {problems // step} --epochs {epochs} "
            f"--eval-every {max(1, 512 // problems)} --warmup {max(1, 512 // problems)}")  # fmt: skip


def tuning(name, flags, sizes=((64, 64, 1), (128, 64, 2)), rates=("2e-4", "1e-4", "4e-4")):
    """A method at several batch sizes, (problems, problems a step, epochs), and learning rates."""
    return {f"{name}, {problems} by {step}, {epochs} epochs, lr {rate}": f"{flags} {batches(problems, step, epochs)} --learning-rate {rate}"
            for rate in rates for problems, step, epochs in sizes}  # fmt: skip


SUITES = {
    # Seed 0 only, to choose what each method races with.
    "tune": tuning("A* h=0, 8 leaves", "--guide none")
    | tuning("A* h=0, tau 0, 8 leaves", "--guide none --tau 0")
    | tuning("A* head, 8 leaves", "--guide head")
    | tuning("A* head, tau 0, 8 leaves", "--guide head --tau 0")
    | tuning("sampling, 4", f"{SAMPLE} --rollouts-per-problem 4")
    | tuning("sampling, 8", f"{SAMPLE} --rollouts-per-problem 8"),
}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def curve(metrics):
    """What is kept of metrics.jsonl: a row an evaluation, with the distinct correct completions found until then."""
    kept, distinct = [], 0.0
    for row in metrics:
        distinct += row.get("unique_correct", 0.0)
        if "eval_accuracy" in row:
            names = ("iteration", "seconds", "model_tokens", "eval_accuracy", "eval_length", "rollout_accuracy", "leaves", "mass", "entropy", "explained_variance")  # fmt: skip
            kept.append({name: row[name] for name in names if row.get(name) is not None} | {"unique_correct": distinct})
    return kept


def race(suite, name, flags, seed, args):
    """One run, until the target is reached or a bound; returns its row."""
    folder = ROOT / "runs" / suite / f"{name} seed {seed}".replace(" ", "_").replace("/", "_")
    command = [sys.executable, "train.py", *RACE.split(), *flags.split(), "--seed", str(seed), "--device", "cpu",
               "--output-dir", str(folder.relative_to(ROOT)), "--resume", "auto"]  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    stopped = False
    try:
        while process.poll() is None:
            time.sleep(1)
            kept = curve(rows(folder / "metrics.jsonl"))
            if kept and not stopped:
                reached = kept[-1]["eval_accuracy"] >= args.target
                if reached or kept[-1]["model_tokens"] >= args.tokens or kept[-1]["seconds"] >= args.seconds:
                    stopped = True
                    process.send_signal(signal.SIGTERM)  # train.py finishes its iteration, and exits with 0
    except BaseException:
        process.terminate()
        raise
    if process.returncode != 0:
        raise RuntimeError(f"{name}, seed {seed}: train.py failed, see {folder}.log")
    return {
        "setting": name,
        "seed": seed,
        "flags": f"{RACE} {flags}",
        "cpu": cpu(),
        "curve": curve(rows(folder / "metrics.jsonl")),
    }


def cpu():
    model = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {model[0] if model else platform.machine()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", default="*", help="settings whose name matches, as a shell would")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--target", type=float, default=0.8, help="a run ends at this greedy accuracy")
    parser.add_argument("--tokens", type=float, default=1.5e6, help="or after so many model tokens")
    parser.add_argument("--seconds", type=float, default=600, help="or after so many seconds")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{args.suite}.jsonl"
    done = {(row["setting"], row["seed"]) for row in rows(path)}
    chosen = fnmatch.filter(SUITES[args.suite], args.only)
    todo = [(name, seed) for seed in args.seeds for name in chosen if (name, seed) not in done]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(race, args.suite, name, SUITES[args.suite][name], seed, args) for name, seed in todo]
        for future in concurrent.futures.as_completed(futures):
            row = future.result()
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            last = row["curve"][-1]
            print(
                f"{row['setting']:40s} seed {row['seed']}  {last['eval_accuracy']:.3f} after {last['model_tokens']:10,d} tokens, {last['seconds']:5.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
