"""Puts the repository root on the path: the files under test are flat modules, not a package.  And what several test
files need to read a run."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


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
