"""examples/plot.py reads what train.py writes, and says in one sentence what it cannot draw."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAIN_JOB = ROOT / "experiments" / "results" / "main_job"
spec = importlib.util.spec_from_file_location("plot", ROOT / "examples" / "plot.py")
plot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot)


def test_a_run_is_a_folder_or_a_file(tmp_path):
    """Guards against a line cut short by a run that is writing it, and runs called metrics."""
    row = {"iteration": 1, "reward_mean": 0.5}
    folder = tmp_path / "mine"
    folder.mkdir()
    file = folder / "metrics.jsonl"
    file.write_text(json.dumps(row) + "\n" + '{"iteration": 2, "rew')
    assert plot.read(str(folder) + "/") == ("mine", [row])
    assert plot.read(str(file)) == ("mine", [row])
    name, rows = plot.read(str(MAIN_JOB / "ppo_seed1.jsonl"))
    assert name == "ppo_seed1" and len(rows) == 91


def test_the_committed_runs_hold_every_curve():
    """Guards against a metric that was renamed and whose panel would be empty."""
    _, rows = plot.read(str(MAIN_JOB / "ppo_seed0.jsonl"))
    metrics = [metric for _, metric in plot.PANELS]
    metrics += [metric for metric, _, _ in plot.X.values()]
    for metric in metrics:
        assert sum(row.get(metric) is not None for row in rows) >= 10, metric


@pytest.mark.parametrize(
    "text, word",
    [
        (None, "No such file"),
        ("", "no iteration"),
        ('{"iteration": 0}\n', "no iteration"),
        ("nonsense\n", "not a metrics.jsonl"),
        ("3\n", "not a metrics.jsonl"),
    ],
)
def test_what_cannot_be_drawn_is_said(text, word, tmp_path, capsys):
    """A missing file, an empty one, a run before its first iteration, and something else."""
    if text is not None:
        (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path / "run.jsonl"), "--png", str(tmp_path / "out.png")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    assert word in error and "run.jsonl" in error
    assert not (tmp_path / "out.png").exists()


def test_a_missing_matplotlib_is_said(tmp_path):
    """One sentence with the command that helps; the import is blocked in a process of its own."""
    code = "import sys, runpy; sys.modules['matplotlib'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = [str(MAIN_JOB / "ppo_seed0.jsonl"), "--png", str(tmp_path / "out.png")]
    command = [sys.executable, "-c", code, str(ROOT / "examples" / "plot.py"), *flags]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert "pip install -r examples/requirements.txt" in process.stderr


def test_two_runs_on_one_page(tmp_path):
    """By each x.  A run whose explained variance is always None has an empty panel and no crash."""
    pytest.importorskip("matplotlib")
    lines = []
    for i in range(4):
        row = {"iteration": i, "seconds": i, "model_tokens": i, "explained_variance": None}
        row["reward_mean" if i else "eval_accuracy"] = 0.5
        lines.append(json.dumps(row) + "\n")
    flat = tmp_path / "flat.jsonl"
    flat.write_text("".join(lines))
    for x in plot.X:
        png = tmp_path / f"{x}.png"
        plot.main([str(flat), str(MAIN_JOB / "ppo_seed0.jsonl"), "--x", x, "--png", str(png)])
        assert png.read_bytes().startswith(b"\x89PNG")
