"""experiments/plot.py reads what train.py writes, and says in one sentence what it cannot draw."""

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("plot", ROOT / "experiments" / "plot.py")
plot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot)


def test_a_run_is_a_folder_or_a_file(tmp_path):
    """Guards against a line cut short by a run that is writing it, and runs that are all called metrics."""
    row = {"iteration": 1, "reward_mean": 0.5}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text(json.dumps(row) + "\n" + '{"iteration": 2, "rew')
    assert plot.read(str(tmp_path / "mine") + "/") == plot.read(str(tmp_path / "mine" / "metrics.jsonl")) == ("mine", [row])
    name, rows = plot.read(str(ROOT / "experiments" / "main_job" / "ppo_seed1.jsonl"))
    assert name == "ppo_seed1" and len(rows) == 91


def test_the_committed_runs_hold_every_curve():
    """Guards against a metric that was renamed and whose panel would be empty."""
    _, rows = plot.read(str(ROOT / "experiments" / "main_job" / "ppo_seed0.jsonl"))
    for key in [metric for _, metric in plot.PANELS] + [key for key, _, _ in plot.X.values()]:
        assert sum(row.get(key) is not None for row in rows) >= 10, key


@pytest.mark.parametrize(
    "text, word", [(None, "No such file"), ("", "no iteration"), ('{"iteration": 0}\n', "no iteration"), ("nonsense\n", "not a metrics.jsonl"),
                   ("3\n", "not a metrics.jsonl")],
)  # fmt: skip
def test_what_cannot_be_drawn_is_said(text, word, tmp_path, capsys):
    """A missing file, an empty one, a run before its first iteration, and something else altogether."""
    if text is not None:
        (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path / "run.jsonl"), "--png", str(tmp_path / "out.png")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and word in err and "run.jsonl" in err, err
    assert not (tmp_path / "out.png").exists()


def test_two_runs_on_one_page(tmp_path, capsys):
    """By each x; a run whose explained variance is always None (one reward for all) has a panel less and no crash."""
    pytest.importorskip("matplotlib")
    lines = [{"iteration": i, "seconds": i, "model_tokens": i, "explained_variance": None} | ({"reward_mean": 1.0} if i else {"eval_accuracy": 0.5})
             for i in range(4)]  # fmt: skip
    (tmp_path / "flat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for x in plot.X:
        plot.main([str(tmp_path / "flat.jsonl"), str(ROOT / "experiments/main_job/ppo_seed0.jsonl"), "--x", x, "--png", str(tmp_path / f"{x}.png")])
        assert (tmp_path / f"{x}.png").read_bytes().startswith(b"\x89PNG")
