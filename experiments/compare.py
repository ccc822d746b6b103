"""Named settings x seeds x budgets, each a run of train.py: what accuracy does a method reach for so many tokens?

    python experiments/compare.py base --only '*em; *; 40*' --seeds 0     # each learning rate, two runs at a time
    python experiments/compare.py base --only '*; lr 2e-4; *'             # every method at one, seeds 0 1 2
    python experiments/report.py base                               # the tables

A budget is a number of iterations, and the learning rate is annealed to the end of each: read along a single long run,
a method would be judged by the noise of a learning rate that fits another length.  Each run has one thread, and its
CPU seconds are counted: they do not depend on what else the machine does.  A run that is there is not run again, one
that was stopped goes on: start the same line again.  Results: a row a run in experiments/results/SUITE.jsonl, with the
curve at every evaluation.
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
COMMON = ("--config ppo --problems-per-iteration 64 --minibatches 2 --epochs 2 --warmup 4 --eval-every 10 --eval-problems 500 "
          "--checkpoint-every 1000 --keep-checkpoints 1 --samples 0")  # fmt: skip
QUICK = COMMON.replace("--warmup 4 --eval-every 10", "--warmup 1 --eval-every 6")
FIND = "--until-right on --cover 0.95 --rollouts-per-problem 16"  # draws, until one is right
BEST_FIRST = "--tau 0 --until-right on --cover 1 --rollouts-per-problem 64"  # plain A*, until a leaf is right
SAMPLE = "--rollout sample --rollouts-per-problem"
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
    "A* h=0 without stop at the right leaf, em": "--guide none --loss em --cover 0.95 --rollouts-per-problem 16",
}


def runs(methods, rates, iterations, common=COMMON):
    """name -> flags: every method at every peak learning rate and number of iterations."""
    return {f"{name}; lr {rate}; {n} iterations": f"{common} {METHODS[name]} --learning-rate {rate} --iterations {n}"
            for n in iterations for name in methods for rate in rates}  # fmt: skip


RATES = ("2e-4", "4e-4", "1e-4")  # the same three for every method
EM = [name for name in METHODS if name.endswith("em")]
# The hard regime: 3 x 3 digits, a chain of five unreliable steps, right in 3 % of the base's samples.
HARD = QUICK.replace("--eval-every 6", "--eval-every 4") + " --model tiny_base/hard --digits 3x3 --max-new-tokens 128"
DEEP = f"--loss em {BEST_FIRST} --max-nodes 512"
METHODS |= {"A* tau 0, h=0, 512 nodes, em": f"--guide none {DEEP}", "A* tau 0, head, 512 nodes, em": f"--guide head {DEEP}",
            "A* h=0, 512 nodes, grpo": "--guide none --loss grpo --max-nodes 512"}  # fmt: skip
DEEP_METHODS = [name for name in METHODS if "512" in name] + ["sampling 8, em", "sampling 8, grpo"]
SUITES = {
    "base": runs(METHODS, RATES, [40, 80]),  # all methods, 4 iterations of warm-up
    "quick": runs(EM, RATES, [18, 24, 40, 80], QUICK),  # the em loss, 1 iteration of warm-up
    "weak": runs(EM, RATES, [24, 60], f"{QUICK} --model tiny_base/weak"),
    "hard": runs(DEEP_METHODS, ["5e-5", "2e-4"], [12], HARD),
}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def write(name, row):
    """A row more in results/NAME.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def curve(metrics):
    """What is kept of metrics.jsonl: a row an evaluation, with the distinct correct completions found until then."""
    kept, distinct = [], 0.0
    for row in metrics:
        distinct += row.get("unique_correct", 0.0)
        if "eval_accuracy" in row:
            names = ("iteration", "seconds", "model_tokens", "eval_accuracy", "eval_length", "rollout_accuracy", "leaves", "mass", "entropy", "explained_variance")  # fmt: skip
            kept.append({name: row[name] for name in names if row.get(name) is not None} | {"unique_correct": distinct})
    return kept


def run(suite, name, flags, seed):
    """One run; returns its row."""
    folder = ROOT / "runs" / suite / f"{name} seed {seed}".replace(" ", "_")
    command = [sys.executable, "train.py", *flags.split(), "--seed", str(seed), "--device", "cpu",
               "--output-dir", str(folder.relative_to(ROOT)), "--resume", "auto"]  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"{name}, seed {seed}: train.py failed, see {folder}.log")
    return {"setting": name, "seed": seed, "flags": flags, "cpu": cpu(), "cpu_seconds": used.ru_utime + used.ru_stime,
            "curve": curve(rows(folder / "metrics.jsonl"))}  # fmt: skip


def cpu():
    model = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {model[0] if model else platform.machine()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", nargs="+", default=["*"], help="settings whose name matches, as a shell would; in this order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    done = {(row["setting"], row["seed"]) for row in rows(RESULTS / f"{args.suite}.jsonl")}
    chosen = dict.fromkeys(name for pattern in args.only for name in fnmatch.filter(SUITES[args.suite], pattern))
    todo = [(name, seed) for seed in args.seeds for name in chosen if (name, seed) not in done]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run, args.suite, name, SUITES[args.suite][name], seed) for name, seed in todo]
        for future in concurrent.futures.as_completed(futures):
            row = future.result()
            write(args.suite, row)
            last = row["curve"][-1]
            print(
                f"{row['setting']:60s} seed {row['seed']}  {last['eval_accuracy']:.3f} after {last['model_tokens']:10,d} tokens, {row['cpu_seconds']:5.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
