"""kill -9 at random instants, each followed by --resume auto: do the files end as undisturbed ones?

    python experiments/kills.py                        # 20 kills, about six minutes on 2 cores
    python experiments/kills.py --kills 3              # the short form
    python experiments/kills.py --ranks 2              # under torchrun: all its ranks are killed

Every iteration writes a checkpoint, so many kills fall into the writing of one.  Compared are
metrics.jsonl (seconds aside), samples.jsonl, every tensor of the last checkpoints, bit for bit, and
the names of all files: nothing else may be left behind.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = """
    --iterations 12 --checkpoint-every 1 --problems-per-iteration 32 --eval-problems 50 --device cpu
""".split()


def log_path(folder):
    """Where the output of a run in this folder goes: FOLDER.log, beside it."""
    return folder.with_suffix(".log")


def start(folder, ranks, *more):
    """Start train.py in the background, on so many ranks."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["train.py", "--output-dir", str(folder), *FLAGS, *more]
    if ranks > 1:
        command.append("--distributed")
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = "1"
    with open(log_path(folder), "a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def run_to_the_end(folder, ranks, *more):
    """Run train.py and assert that it succeeds."""
    status = start(folder, ranks, *more).wait()
    assert status == 0, log_path(folder).read_text()[-2000:]


def family(pid):
    """A process and all its descendants, by id."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    children = {}
    for line in listing.splitlines():
        child, parent = line.split()
        children.setdefault(int(parent), []).append(int(child))
    found = []
    waiting = [pid]
    while waiting:
        member = waiting.pop()
        found.append(member)
        waiting += children.get(member, [])
    return found


def kill(process):
    """Send SIGKILL to a process and to all that it has started."""
    for pid in family(process.pid):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
    process.wait()


def contents(folder):
    """All that must be equal, by name."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    found = {"names": paths, "samples": (folder / "samples.jsonl").read_text(), "metrics": []}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        row.pop("seconds", None)
        found["metrics"].append(row)
    for path in paths:
        if path.endswith(".safetensors"):
            tensors = load_file(folder / path)
            found[path] = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return found


def kill_and_resume(folder, undisturbed, kills, ranks, duration, chance):
    """Start or resume the run in `folder` and kill it after a random time, so many times.

    duration: seconds of an undisturbed run.  A run that ends before its kill is compared with
    `undisturbed`, the folder of that run, and then begun again, so that the kills go on.
    """
    done = 0
    while done < kills:
        process = start(folder, ranks, "--resume", "auto")
        delay = chance.uniform(0.2, 1.0) * duration
        try:
            status = process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            kill(process)
            done += 1
            left = sorted(path.name for path in folder.glob("*checkpoint*"))
            left = ", ".join(left) or "no checkpoint yet"
            print(f"kill {done} after {delay:.1f} s: {left}", flush=True)
        else:
            assert status == 0, log_path(folder).read_text()[-2000:]
            assert contents(folder) == contents(undisturbed)
            shutil.rmtree(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as work:
        undisturbed = pathlib.Path(work) / "undisturbed"
        killed = pathlib.Path(work) / "killed"
        began = time.perf_counter()
        run_to_the_end(undisturbed, args.ranks)
        duration = time.perf_counter() - began
        kill_and_resume(killed, undisturbed, args.kills, args.ranks, duration, chance)
        run_to_the_end(killed, args.ranks, "--resume", "auto")

        expected = contents(undisturbed)
        found = contents(killed)
        names = sorted(expected.keys() | found.keys())
        different = [name for name in names if found.get(name) != expected.get(name)]
        print(
            f"{args.kills} kills on {args.ranks} rank(s); {len(expected)} things compared, "
            f"different: {different or 'none'}"
        )
    if different:
        sys.exit(1)


if __name__ == "__main__":
    main()
