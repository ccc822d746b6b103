"""Put the repository root on the path, and hold what several test files need.

The files under test are flat modules, not a package.  The functions start ranks and read a run.
All of it, and every process that a test starts, computes with one thread: two would wait for each
other, and sums in another order have other last digits.
"""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported


def launch(ranks, *command, cwd=ROOT, **options):
    """Start `command` on so many ranks, by torchrun.  One process is started with python alone."""
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [str(word) for word in command]
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        words,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def finish(process, code=0):
    """Wait for a process, assert its exit status and return its output."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def rows(path):
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(folder):
    """metrics.jsonl of a run without wall seconds, which are all that may differ."""
    found = rows(folder / "metrics.jsonl")
    for row in found:
        row.pop("seconds", None)
    return found


def tensors(checkpoint):
    """Every weight and moment of a checkpoint by name."""
    from safetensors.torch import load_file

    found = {}
    for file in ("model", "value", "optimizer"):
        for name, tensor in load_file(checkpoint / f"{file}.safetensors").items():
            found[f"{file}/{name}"] = tensor
    return found
