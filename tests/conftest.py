"""Puts the repository root on the path: the files under test are flat modules, not a package.  And what several test
files need to start ranks and to read a run."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def launch(ranks, *command, **options):
    """`command` on so many ranks, by torchrun; one process is started with python alone."""
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command]
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def finish(process, code=0):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def rows(path):
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(folder):
    """metrics.jsonl of a run without wall seconds, which are all that may differ."""
    return [{key: x for key, x in row.items() if key != "seconds"} for row in rows(folder / "metrics.jsonl")]


def tensors(checkpoint):
    """Every weight and moment of a checkpoint by name."""
    from safetensors.torch import load_file

    names = ("model", "value", "optimizer")
    return {f"{name}/{key}": x for name in names for key, x in load_file(checkpoint / f"{name}.safetensors").items()}
