"""kill -9 at random instants, each followed by --resume auto: are the files at the end those of an undisturbed run?

    python experiments/kills.py                        # 20 kills, about six minutes on 2 cores
    python experiments/kills.py --kills 3              # the short form
    python experiments/kills.py --ranks 2              # under torchrun: all its processes are killed

Every iteration writes a checkpoint, so that many kills fall into the writing of one.  Compared: metrics.jsonl (seconds
aside), samples.jsonl, and every tensor of the last checkpoints, bit for bit; and that nothing else is left behind.
"""

import argparse
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
ITERATIONS = 12


def start(folder, ranks, *more):
    """train.py in the background, on so many ranks, with its output in FOLDER.log."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *several, "train.py", "--output-dir", folder, "--iterations", ITERATIONS, "--checkpoint-every", 1,
               "--problems-per-iteration", 32, "--eval-problems", 50, "--device", "cpu", *(["--distributed"] if ranks > 1 else []), *more]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log)


def kill(process):
    """SIGKILL to the process and all that it has started, wherever they are by now."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    parents = dict(zip(map(int, listing[::2]), map(int, listing[1::2])))
    family = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def contents(folder):
    """All that must be equal, by name."""
    found = {"names": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: x for key, x in row.items() if key != "seconds"} for row in rows]
    found["samples"] = (folder / "samples.jsonl").read_text()
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        found[path.relative_to(folder).as_posix()] = {name: x.numpy().tobytes() for name, x in tensors.items()}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as work:
        undisturbed, killed = pathlib.Path(work) / "undisturbed", pathlib.Path(work) / "killed"
        began = time.perf_counter()
        assert start(undisturbed, args.ranks).wait() == 0, (undisturbed.with_suffix(".log")).read_text()
        whole = time.perf_counter() - began
        done = 0
        while done < args.kills:
            process = start(killed, args.ranks, "--resume", "auto")
            delay = chance.uniform(0.2, 1.0) * whole
            try:
                process.wait(timeout=delay)
            except subprocess.TimeoutExpired:
                kill(process)
            else:  # it came to its end before the kill: begin again in the same folder, so that kills go on
                assert process.returncode == 0, (killed.with_suffix(".log")).read_text()[-2000:]
                assert contents(killed) == contents(undisturbed)
                shutil.rmtree(killed)
                continue
            done += 1
            left = sorted(path.name for path in killed.glob("*checkpoint*")) if killed.exists() else []
            print(f"kill {done} after {delay:.1f} s: {', '.join(left) or 'no checkpoint yet'}", flush=True)
        assert start(killed, args.ranks, "--resume", "auto").wait() == 0, (killed.with_suffix(".log")).read_text()[-2000:]
        mine, theirs = contents(killed), contents(undisturbed)
        different = [name for name in theirs if mine.get(name) != theirs[name]] + sorted(set(mine) - set(theirs))
        print(f"{done} kills on {args.ranks} rank(s); {len(theirs)} things compared, different: {different or 'none'}")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
