"""Where metrics go besides metrics.jsonl: --wandb and --tensorboard, with stand-ins for both."""

import pathlib
import sys
import types

import pytest
from conftest import ForkedRanks, finish, rows

import train

ROOT = pathlib.Path(train.__file__).parent
SMALL = """
    --config ppo --problems-per-iteration 4 --rollouts-per-problem 3 --eval-problems 6
    --max-new-tokens 14 --device cpu --checkpoint-every 1
""".split()
WANDB = """
import json, os

def init(**settings):
    if os.path.exists(os.environ["FAKE_LOG"] + ".refuse"):
        raise RuntimeError("api_key not configured\\ncall wandb.login")
    write(dict(init=settings))
    return __import__("wandb")

def log(numbers, step):
    write(dict(step=step, numbers=numbers))

def write(row):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps(row) + chr(10))
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A wandb that writes its calls to FAKE_LOG, and a tensorboard that is only there.

    Returns the path of that file.  Both packages are in tmp_path/packages.
    """
    folder = tmp_path / "packages"
    for name, text in (("wandb", WANDB), ("tensorboard", "")):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    yield tmp_path / "log"
    sys.modules.pop("wandb", None)


def flat(row):
    """The numbers of a row of metrics.jsonl by name; those of a group as group/name."""
    numbers = {}
    for name, entry in row.items():
        group = entry if isinstance(entry, dict) else {}
        if isinstance(entry, (int, float)):
            numbers[name] = entry
        for key, number in group.items():
            numbers[f"{name}/{key}"] = number
    return numbers


def flags(folder, *more, iterations=2):
    return [*SMALL, "--iterations", str(iterations), "--output-dir", str(folder), *more]


def run(folder, *more, iterations=2):
    """A small run in this process; returns the rows of its metrics.jsonl."""
    train.main(flags(folder, *more, iterations=iterations))
    return rows(folder / "metrics.jsonl")


class Board:
    """Stands for torch.utils.tensorboard."""

    def __init__(self):
        self.opened = []  # (folder, purge_step) of every writer
        self.written = {}  # step -> {name: number}
        board = self

        class SummaryWriter:
            def __init__(self, folder, purge_step):
                board.opened.append((folder, purge_step))

            def add_scalar(self, name, number, step):
                board.written.setdefault(step, {})[name] = number

            def flush(self):
                pass

        self.module = types.ModuleType("torch.utils.tensorboard")
        self.module.SummaryWriter = SummaryWriter


def test_both_get_every_number_of_every_row(packages, tmp_path, monkeypatch):
    """Guards against other names, nested objects that a logger drops, a forgotten row 0, and None.

    A resumed run may log or not, and takes back what TensorBoard has from after its checkpoint.
    """
    board = Board()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board.module)
    folder = tmp_path / "run"
    metrics = run(folder, "--wandb", "--tensorboard")
    assert board.opened == [(str(folder), 0)]
    assert set(board.written) == {0, 1, 2}
    assert board.written == {row["iteration"]: flat(row) for row in metrics}
    first, *logged = rows(packages)
    assert first["init"]["name"] == str(folder)
    assert first["init"]["config"]["beta"] == 0.2
    assert {row["step"]: row["numbers"] for row in logged} == board.written
    assert "eval_accuracy_by_difficulty/medium" in board.written[2]
    assert "stopped/leaves" in board.written[2]

    metrics = run(folder, "--tensorboard", "--resume", "auto", iterations=3)
    assert board.opened[1:] == [(str(folder), 3)]
    assert board.written[3] == flat(metrics[3])
    assert len(rows(packages)) == 4


def refused(capsys, folder, *more):
    """The one sentence of a run that does not start; no file is written."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(folder, *more)
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.count("\n") == 1, err
    assert err.startswith("train.py: "), err
    assert not folder.exists()
    return err


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_an_absent_package_is_refused(name, capsys, tmp_path, monkeypatch):
    """One sentence that says what to install."""
    # None is what Python takes for "not installed", whether it is or not.
    monkeypatch.setitem(sys.modules, name, None)
    assert f"pip install {name}" in refused(capsys, tmp_path / "run", f"--{name}")


def test_wandbs_own_refusal_is_one_sentence(packages, capsys, tmp_path):
    """Guards against a traceback, and a folder left behind, when nobody is logged in."""
    (tmp_path / "log.refuse").write_text("")
    err = refused(capsys, tmp_path / "run", "--wandb")
    assert "--wandb: api_key not configured call wandb.login" in err


def test_one_rank_logs(packages, tmp_path):
    """Guards against a run of wandb for each rank."""
    words = flags(tmp_path / "run", "--distributed", "--wandb", iterations=1)
    finish(ForkedRanks(2, "train.py", *words))
    assert [next(iter(row)) for row in rows(packages)] == ["init", "step", "step"]


def test_nothing_is_imported_unless_asked_for(packages, tmp_path):
    """Guards against a package that starts its own threads in everybody's run."""
    run(tmp_path / "run", iterations=1)
    assert "wandb" not in sys.modules
    assert not packages.exists()
