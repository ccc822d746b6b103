"""docs/tour.ipynb: its cells run in order, from the folder docs, and do what its text says."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, rows

NOTEBOOK = json.loads((ROOT / "docs" / "tour.ipynb").read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
# Runs the cells on stdin in one namespace, then says what a reader would see of some names.
RUNNER = """
import json, sys
names = {}
for source in json.load(sys.stdin):
    exec(compile(source, "a cell of tour.ipynb", "exec"), names)
figures = {name: names[name] for name in ("before", "after", "ROOT")}
figures["leaves"] = [names["tree"].text(leaf) for leaf in names["tree"].leaves]
figures["shown"] = repr(names["tree"])
print("FIGURES " + json.dumps(figures))
"""


def outputs():
    """Everything that the committed notebook shows below its cells, as one text."""
    return json.dumps([cell["outputs"] for cell in CELLS])


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """(what the cells print, the figures of RUNNER, the folder of the run)."""
    folder = tmp_path_factory.mktemp("tour")
    cells = ["".join(cell["source"]).replace("runs/tour", str(folder)) for cell in CELLS]
    assert sum(str(folder) in cell for cell in cells) == 2  # a reader's own runs/tour is left alone
    result = subprocess.run(
        [sys.executable, "-c", RUNNER],
        cwd=ROOT / "docs",
        input=json.dumps(cells),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    printed, figures = result.stdout.split("FIGURES ")
    return printed, json.loads(figures), folder


def test_the_notebook_trains_a_policy_that_thinks(seen):
    printed, figures, folder = seen
    assert figures["ROOT"] == str(ROOT)
    assert figures["after"] > figures["before"] + 0.5, "the update does not raise right completions"
    right = "<think>34*10=340 34*2=68 340+68=408</think><answer>408</answer><eos>"
    assert figures["leaves"][0] == right, "plain A* does not find the careful completion first"
    metrics = rows(folder / "metrics.jsonl")
    assert metrics[0]["eval_accuracy"] < 0.1 and metrics[-1]["iteration"] == 40
    assert metrics[-1]["eval_accuracy"] > 0.75
    assert right in printed.splitlines()[-1], "the trained policy does not think by itself"


def test_the_notebook_shows_what_it_printed(seen):
    """Committed with its outputs, a tree among them, and without a path of the machine."""
    for line in seen[1]["shown"].splitlines():
        assert json.dumps(line)[1:-1] in outputs(), "the notebook shows another tree"
    assert "text/html" in outputs() and "<ul>" in outputs()
    assert "tiny_base, greedy, 11 model tokens" in outputs()
    for cell in CELLS[1:]:
        assert cell["outputs"]
    assert str(ROOT) not in outputs() and "/tmp" not in outputs()
    assert "stderr" not in outputs()
