"""Where metrics go besides metrics.jsonl: --wandb and --tensorboard, with stand-ins for both packages."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

import train
from conftest import rows

ROOT = pathlib.Path(train.__file__).parent
SMALL = ["--config", "ppo", "--problems-per-iteration", "4", "--rollouts-per-problem", "3", "--eval-problems", "6",
         "--max-new-tokens", "14", "--device", "cpu", "--checkpoint-every", "1"]  # fmt: skip
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
    """A folder on the path with a wandb that writes its calls to FAKE_LOG, and a tensorboard that is only there."""
    for name, text in (("wandb", WANDB), ("tensorboard", "")):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    yield tmp_path / "log"
    sys.modules.pop("wandb", None)


def flat(row):
    """The numbers of a row of metrics.jsonl by name, those of a group as group/name."""
    numbers = {name: x for name, x in row.items() if isinstance(x, (int, float))}
    return numbers | {f"{name}/{key}": x for name, group in row.items() if isinstance(group, dict) for key, x in group.items()}


def run(folder, *flags, iterations=2):
    train.main([*SMALL, "--output-dir", str(folder), "--iterations", str(iterations), *flags])
    return rows(folder / "metrics.jsonl")


def test_both_get_every_number_of_every_row(packages, tmp_path, monkeypatch):
    """Guards against other names, nested objects that a logger drops, a forgotten row 0, and None for a number.  A resumed
    run may log or not, and takes back what TensorBoard has from after its checkpoint."""
    board = types.ModuleType("torch.utils.tensorboard")
    opened, written = [], {}

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, x, step):
            written.setdefault(step, {})[name] = x

        def flush(self):
            pass

    board.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    metrics = run(tmp_path / "run", "--wandb", "--tensorboard")
    assert opened == [(str(tmp_path / "run"), 0)]
    assert written == {row["iteration"]: flat(row) for row in metrics} and set(written) == {0, 1, 2}
    first, *logged = rows(packages)
    assert first["init"]["name"] == str(tmp_path / "run") and first["init"]["config"]["beta"] == 0.2
    assert {row["step"]: row["numbers"] for row in logged} == written
    assert "eval_accuracy_by_difficulty/medium" in written[2] and "stopped/leaves" in written[2]

    metrics = run(tmp_path / "run", "--tensorboard", "--resume", "auto", iterations=3)
    assert opened[1:] == [(str(tmp_path / "run"), 3)] and written[3] == flat(metrics[3]) and len(rows(packages)) == 4


def refused(capsys, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*SMALL, *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("train.py: "), err
    return err


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_an_absent_package_is_refused(name, capsys, tmp_path, monkeypatch):
    """One sentence that says what to install, and no file."""
    monkeypatch.setitem(sys.modules, name, None)  # what Python takes for "not installed", whatever is
    assert f"pip install {name}" in refused(capsys, f"--{name}", "--output-dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_wandbs_own_refusal_is_one_sentence(packages, capsys, tmp_path):
    """Guards against a traceback, and a run's folder left behind, when nobody is logged in."""
    (tmp_path / "log.refuse").write_text("")
    err = refused(capsys, "--wandb", "--output-dir", str(tmp_path / "run"))
    assert "--wandb: api_key not configured call wandb.login" in err and not (tmp_path / "run").exists()


def test_one_rank_logs(packages, tmp_path):
    """Guards against a run of wandb for each rank."""
    command = ["torchrun", "--standalone", "--nproc_per_node=2", "train.py", *SMALL, "--distributed", "--wandb",
               "--iterations", "1", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    path = {"PYTHONPATH": str(tmp_path / "packages"), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", *command[1:]], cwd=ROOT, env=os.environ | path,
                         capture_output=True, text=True)  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert [next(iter(row)) for row in rows(packages)] == ["init", "step", "step"]


def test_nothing_is_imported_unless_asked_for(packages, tmp_path):
    """Guards against a package that starts its own threads in everybody's run."""
    run(tmp_path / "run", iterations=1)
    assert "wandb" not in sys.modules and not packages.exists()
