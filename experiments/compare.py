"""What accuracy does a method reach for so many tokens?  Settings x seeds x budgets, by train.py.

    python experiments/compare.py base --only '*em; *; 40*' --seeds 0     # each learning rate
    python experiments/compare.py base --only '*; lr 2e-4; *'             # every method at one
    python experiments/report.py base                                     # the tables

A budget is a number of iterations, and the learning rate is annealed to the end of each.  Read
along a single long run, a method would be judged by the noise of a learning rate that fits another
length.  Each run has one thread, and its CPU seconds are counted: they do not depend on what else
the machine does.  Two runs go at a time.  A run whose row exists is not run again, and one that was
stopped goes on: start the same line again.  Results: a row a run in
experiments/results/SUITE.jsonl, with the curve at every evaluation.
"""

import argparse
import concurrent.futures
import fnmatch
import json
import os
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"

# 64 problems an iteration and 4 optimiser steps for every method.
COMMON = (
    "--config ppo --problems-per-iteration 64 --minibatches 2 --epochs 2 --warmup 4 "
    "--eval-every 10 --eval-problems 500 --checkpoint-every 1000 --keep-checkpoints 1 --samples 0 "
    "--width 2"
)
QUICK = COMMON.replace("--warmup 4 --eval-every 10", "--warmup 1 --eval-every 6")
FIND = "--until-right on --cover 0.95 --rollouts-per-problem 16"  # draws, until one is right
# Plain A*, until a leaf is right.
BEST_FIRST = "--tau 0 --until-right on --cover 1 --rollouts-per-problem 64"
SAMPLE = "--rollout sample --rollouts-per-problem"
DEEP = f"--loss em {BEST_FIRST} --max-nodes 512"
METHODS = {
    "sampling 4, ppo": f"{SAMPLE} 4 --loss ppo",
    "sampling 8, ppo": f"{SAMPLE} 8 --loss ppo",
    "sampling 8, grpo": f"{SAMPLE} 8 --loss grpo",
    "sampling 4, em": f"{SAMPLE} 4 --loss em",
    "sampling 8, em": f"{SAMPLE} 8 --loss em",
    "sampling 4, apo": f"{SAMPLE} 4 --loss apo",
    "A* h=0, ppo": "--guide none --loss ppo",
    "A* head, ppo": "--guide head --loss ppo",
    "A* h=0, grpo": "--guide none --loss grpo",
    "A* h=0, em": f"--guide none --loss em {FIND}",
    "A* head, em": f"--guide head --loss em {FIND}",
    "A* tau 0, h=0, em": f"--guide none --loss em {BEST_FIRST} --max-nodes 128",
    "A* tau 0, head, em": f"--guide head --loss em {BEST_FIRST} --max-nodes 128",
    "A* tau 0, h=0, ppo": f"--guide none --loss ppo {BEST_FIRST} --max-nodes 128",
    "A* h=0, apo": "--guide none --loss apo",
    "Gumbel without stop by mass, ppo": "--guide none --loss ppo --cover 1",
    "best-first (tau 0, h=0), ppo": "--guide none --loss ppo --tau 0",
    "beam of 8 (tau 0, h=0), ppo": "--guide none --loss ppo --tau 0 --max-open 8",
    "A* h=0 without stop at the right leaf, em": (
        "--guide none --loss em --cover 0.95 --rollouts-per-problem 16"
    ),
    # For the hard regime.
    "A* tau 0, h=0, 512 nodes, em": f"--guide none {DEEP}",
    "A* tau 0, head, 512 nodes, em": f"--guide head {DEEP}",
    "A* h=0, 512 nodes, grpo": "--guide none --loss grpo --max-nodes 512",
}
# The hard regime: 3 x 3 digits, a chain of five unreliable steps.  3 % of the base's samples are
# right.
HARD = QUICK.replace("--eval-every 6", "--eval-every 4")
HARD += " --model tiny_base/hard --digits 3x3 --max-new-tokens 128"

# Products of 2 and 3 digits, `python train.py --config task`, by the same policy steps for all.
TASK = (
    "--config task --problems-per-iteration 128 --eval-problems 500 --checkpoint-every 1000 "
    "--keep-checkpoints 1 --samples 0"
)
RACE = f"{TASK} --iterations 10 --eval-every 2 --final-rate 1"
TASK_METHODS = {
    "A* h=0": "--guide none",
    "A* head": "--guide head",
    "A* fitted head": "--guide head --value-epochs 25",
    "sampling 4": f"{SAMPLE} 4",
    "sampling 8": f"{SAMPLE} 8",
}

# Sampling by each loss: the same samples an iteration, three learning rates each.
TASK_LOSSES = {
    "sampling 4, em": f"{SAMPLE} 4",
    "sampling 8, grpo": f"{SAMPLE} 8 --loss grpo --problems-per-iteration 64",
    "sampling 8, ppo": f"{SAMPLE} 8 --loss ppo --problems-per-iteration 64",
}

# Plain A* and sampling on one grid of budgets (thousand model tokens): the iterations that cost
# about as much.  Each run is annealed to its end and evaluated there.  Sampling goes on until it
# has 80 % as well.
BUDGETS = {
    "A* tau 0, h=0, em": ("--guide none", {65: 18, 85: 24, 112: 32, 160: 47}),
    "sampling 4, em": ("--rollout sample", {65: 16, 85: 21, 112: 28, 160: 41, 230: 60, 340: 90}),
}

RATES = ("2e-4", "4e-4", "1e-4")  # the same three for every method
HARD_METHODS = [name for name in METHODS if "512" in name] + ["sampling 8, em", "sampling 8, grpo"]
EM_METHODS = [name for name in METHODS if name.endswith("em") and "512" not in name]
# What is kept of metrics.jsonl.
KEPT = (
    "iteration",
    "seconds",
    "model_tokens",
    "eval_accuracy",
    "eval_length",
    "rollout_accuracy",
    "leaves",
    "mass",
    "entropy",
    "explained_variance",
    "eval_explained_variance",
)


def runs(methods, rates, iterations, common=COMMON):
    """name -> flags: every method at every peak learning rate and number of iterations."""
    suite = {}
    for n in iterations:
        for name in methods:
            for rate in rates:
                flags = f"{common} {METHODS[name]} --learning-rate {rate} --iterations {n}"
                suite[f"{name}; lr {rate}; {n} iterations"] = flags
    return suite


def task_rate_runs():
    """name -> flags: sampling by each loss at each learning rate, 60 iterations of the task."""
    suite = {}
    for name, flags in TASK_LOSSES.items():
        for rate in RATES:
            suite[f"{name}; lr {rate}; 60"] = (
                f"{TASK} --iterations 60 --learning-rate {rate} {flags}"
            )
    return suite


def budget_runs():
    """name -> flags: `--config quick` by both methods, for each budget."""
    suite = {}
    for name, (flags, iterations_of) in BUDGETS.items():
        for budget, n in iterations_of.items():
            suite[f"{name}; {budget} k"] = (
                f"--config quick {flags} --iterations {n} --eval-every {n} --samples 0"
            )
    return suite


SUITES = {
    "budgets": budget_runs(),
    "task_rates": task_rate_runs(),
    # all methods, 4 iterations of warm-up
    "base": runs(METHODS, RATES, [40, 80]),
    # the em loss, 1 iteration of warm-up
    "quick": runs(EM_METHODS, RATES, [18, 24, 40, 80], QUICK),
    "weak": runs(EM_METHODS, RATES, [24, 60], f"{QUICK} --model tiny_base/weak"),
    "hard": runs(HARD_METHODS, ["5e-5", "2e-4"], [12], HARD),
    # 2-3 digits: a race over the first 10 iterations, and sampling for as long as pays
    "task": {f"{name}; first 10": f"{RACE} {flags}" for name, flags in TASK_METHODS.items()}
    | {f"{name}; 60": f"{TASK} --iterations 60 {flags}" for name, flags in TASK_METHODS.items()}
    # as many model tokens as 350 iterations of plain A*
    | {f"{name}; 300": f"{TASK} --iterations 300 {flags}" for name, flags in TASK_METHODS.items()},
}


def rows(path):
    """The rows of a jsonl file; [] if there is none.  A line that is being written is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def write(name, row):
    """A row more in results/NAME.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def curve(metrics):
    """A row for each evaluation in metrics.jsonl, with the distinct right completions so far."""
    kept = []
    distinct = 0.0
    for row in metrics:
        distinct += row.get("unique_correct", 0.0)
        if "eval_accuracy" in row:
            point = {name: row[name] for name in KEPT if row.get(name) is not None}
            point["unique_correct"] = distinct
            kept.append(point)
    return kept


def run(suite, name, flags, seed):
    """One run of train.py in a process of its own; returns its row.  Raises RuntimeError."""
    folder = ROOT / "runs" / suite / f"{name} seed {seed}".replace(" ", "_")
    command = [sys.executable, "train.py", *flags.split(), "--seed", str(seed), "--device", "cpu"]
    command += ["--output-dir", str(folder.relative_to(ROOT)), "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{name}, seed {seed}: train.py failed, see {folder}.log")
    seconds = used.ru_utime + used.ru_stime
    return run_row(name, seed, flags, folder) | {"cpu_seconds": seconds}


def run_row(setting, seed, flags, folder):
    """The row of a run that has ended, by the metrics in its folder."""
    return {
        "setting": setting,
        "seed": seed,
        "flags": flags,
        "cpu": cpu(),
        "curve": curve(rows(pathlib.Path(folder) / "metrics.jsonl")),
    }


def cpu():
    """The cores of this process, such as '2 cores of AMD EPYC'."""
    model = platform.machine()
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.split(":")[1].strip()
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        help="settings whose name matches, as a shell would; in this order",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    suite = SUITES[args.suite]
    done = {(row["setting"], row["seed"]) for row in rows(RESULTS / f"{args.suite}.jsonl")}
    chosen = []
    for pattern in args.only:
        for name in fnmatch.filter(suite, pattern):
            if name not in chosen:
                chosen.append(name)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = []
        for seed in args.seeds:
            for name in chosen:
                if (name, seed) not in done:
                    futures.append(pool.submit(run, args.suite, name, suite[name], seed))
        for future in concurrent.futures.as_completed(futures):
            row = future.result()
            write(args.suite, row)
            last = row["curve"][-1]
            print(
                f"{row['setting']:60s} seed {row['seed']}  {last['eval_accuracy']:.3f} after "
                f"{last['model_tokens']:10,d} tokens, {row['cpu_seconds']:5.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
