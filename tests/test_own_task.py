"""A task and a reward of one's own: what a user's function may do, what is said when it fails, what a run remembers."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import data
import eval as evaluation
import policy
import reward as reward_module
import train
import value as value_module
from conftest import rows
from experiments import eval_files, run_folder

ROOT = pathlib.Path(train.__file__).parent
OWN = ROOT / "experiments" / "own_task"
REWARD = ["--reward", f"{OWN / 'reward.py'}:reward"]
SMALL = ["--config", "ppo", "--problems-per-iteration", "4", "--rollouts-per-problem", "3", "--eval-problems", "6",
         "--max-new-tokens", "14", "--device", "cpu", "--checkpoint-every", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The example's two files, as flags."""
    folder = tmp_path_factory.mktemp("problems")
    subprocess.run([sys.executable, OWN / "make.py", folder], check=True, capture_output=True)
    return ["--train-file", str(folder / "train.jsonl"), "--eval-file", str(folder / "eval.jsonl")]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """Two iterations of the example that tests only read."""
    folder = tmp_path_factory.mktemp("own") / "run"
    more = ["--problems-per-iteration", "16", "--samples", "16", "--iterations", "2", "--output-dir", str(folder)]
    train.main([*SMALL, *files, *REWARD, *more])
    return folder


def own(folder, body, bounds="(0.0, 1.0)", name="own.py"):
    """Writes a reward function with this body; returns its flags."""
    (folder / name).write_text(f"def f(problem, completion):\n    {body}\n\n\nf.bounds = {bounds}\n")
    return ["--reward", f"{folder / name}:f"]


def ended(capsys, status, flags):
    """The one sentence on stderr of a run that ends with this status."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, flags)))
    err = capsys.readouterr().err
    assert stop.value.code == status and err.count("\n") == 1 and err.startswith("train.py: "), err
    return err


# ---------------------------------------------------------------------------------------------------- the example


def test_the_example_holds_out_whole_sets_of_digits(files):
    """Guards against 3,5,9 in training and 9,5,3 in evaluation: sorting would be remembered, not learned."""
    training, held_out = (data.read_problems(path, any_answer=True) for path in (files[1], files[3]))
    assert len(training) + len(held_out) == 1000 and len(held_out) >= 50
    assert not {p.answer for p in training} & {p.answer for p in held_out}
    assert all("".join(sorted(p.prompt.strip("=").split(","))) == p.answer for p in training + held_out)


@pytest.mark.parametrize(
    "completion, share, correct",
    [("<answer>359</answer>", 1, True), ("35</think><answer>395</answer>", 1 / 3, False), ("<answer>3590</answer>", 3 / 4, False),
     ("<answer>3</answer>", 1 / 3, False), ("<answer></answer>", 0, False), ("359", 0, False), ("", 0, False)],
)  # fmt: skip
def test_the_examples_reward_by_hand(completion, share, correct):
    """Guards against a share of what was said instead of what was asked for: a single right digit would earn 1."""
    verdict = reward_module.load(REWARD[1]).judge(data.Problem("5,3,9=", "359"), completion)
    assert verdict["reward"] == pytest.approx(share) and verdict["correct"] == correct


def test_the_example_trains_and_is_remembered(finished):
    """Rewards of the user's function in the samples; its name and bounds in the checkpoint."""
    samples, judge = rows(finished / "samples.jsonl"), reward_module.load(REWARD[1]).judge
    assert len(samples) >= 24
    for row in samples:
        verdict = judge(data.Problem(row["prompt"], row["truth"]), row["completion"])
        assert row["answer"] in (verdict.pop("answer"), None)  # None: it was cut off, and says nothing
        assert verdict.items() <= row.items() and {"weight", "f"} <= set(row)
    assert all(row["reward_mean"] >= 0 for row in rows(finished / "metrics.jsonl")[1:])  # the built-in one says -1 of nearly all
    state = json.loads((finished / "checkpoint_iter_2" / "trainer_state.json").read_text())
    assert state["config"]["reward"] == REWARD[1] and state["reward_bounds"] == [0, 1]


def test_the_soft_value_has_the_bounds_of_the_runs_reward(finished):
    """Guards against h of the built-in reward's bounds for a head that was trained on other ones."""
    folder = finished / "checkpoint_iter_2"
    model = policy.load_policy(str(folder))[0]
    head = value_module.ValueHead(model.config.hidden_size)
    head.load_state_dict(load_file(folder / "value.safetensors"))
    hidden = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h = evaluation.load_guide(str(folder), model)(hidden)[1]
        assert torch.allclose(h, value_module.soft_value(head(hidden)[1], 0.0, 1.0, 0.2))
        assert not torch.allclose(h, value_module.soft_value(head(hidden)[1], -1.0, 1.1, 0.2))


def test_targets_of_the_soft_value_have_them_too(files, tmp_path, monkeypatch):
    """Guards against targets of u outside of [0, 1], which wrong bounds make of a reward."""
    seen, original = [], train.losses
    monkeypatch.setattr(train, "losses", lambda *a: seen.append(a[2].extra["soft_targets"]) or original(*a))
    body, bounds = "return 7.0 if '</answer>' in completion else 3.0", "(3.0, 7.0)"
    train.main([*SMALL, *files, *own(tmp_path, body, bounds), "--iterations", "1", "--output-dir", str(tmp_path / "run")])
    assert set(torch.cat(seen).tolist()) == {0.0, 1.0}


def test_evaluation_by_both_scripts(finished, files, capsys):
    """The figures of the last evaluation of the run come out of train.py --eval-only and of eval.py --reward."""
    last, folder = rows(finished / "metrics.jsonl")[-1], str(finished / "checkpoint_iter_2")
    capsys.readouterr()
    train.main(["--eval-only", "--checkpoint", folder])
    first = capsys.readouterr().out
    eval_files.main(["--model", folder, *files[2:], *REWARD, "--problems", "6", "--max-new-tokens", "14", "--device", "cpu"])
    for out in (first, capsys.readouterr().out):
        figures = dict(line.split()[:2] for line in out.splitlines() if line.startswith(("accuracy ", "format ")))
        assert float(figures["accuracy"]) == pytest.approx(last["eval_accuracy"], abs=1e-3)
        assert float(figures["format"]) == pytest.approx(last["eval_format"], abs=1e-3)


# ------------------------------------------------------------------------------------- what a function may return


@pytest.mark.parametrize(
    "body, verdict",
    [
        ("return 1", (1.0, True, True)), ("return 0.25", (0.25, False, True)), ("return False", (0.0, False, True)),
        ("return sum([0.1] * 10) + 1e-12", (1.0, True, True)), ("import numpy; return numpy.float32(0.5)", (0.5, False, True)),
        ("return {'reward': 0.5, 'correct': True}", (0.5, True, True)), ("return {'reward': 1, 'formatted': 0}", (1.0, True, False)),
        ("return float(problem.answer['target'] in completion)", (1.0, True, True)),
    ],
)  # fmt: skip
def test_returned_values(body, verdict, tmp_path):
    """A number alone, or a dict; the verdict is plain JSON and says what is not said; a vote goes by the text."""
    loaded = reward_module.load(own(tmp_path, body)[1])
    found = loaded.judge(data.Problem("1=", {"target": "y"}), "xyz")
    assert json.loads(json.dumps(found)) == found
    assert (found["reward"], found["correct"], found["formatted"]) == (pytest.approx(verdict[0]), *verdict[1:])
    assert found["answer"] == "xyz"


def test_a_completion_cut_off_is_not_asked_about(tmp_path):
    """Guards against a truncated leaf that counts as right, or a function that has to know about truncation."""
    loaded = reward_module.load(own(tmp_path, "raise RuntimeError", bounds="(-2, 3)")[1])
    cut = loaded.judge(data.Problem("1=", None), "1", truncated=True)
    assert cut == {"reward": -2, "correct": False, "formatted": False, "answer": None}


def test_any_answer_will_do(tmp_path):
    """Guards against a task that cannot be written down because its answer is no whole number."""
    lines = [{"prompt": "1=", "answer": answer} for answer in ("four", 2.5, None, [1, {"a": 2}], True, "12")] + [{"prompt": "2="}]
    (tmp_path / "any.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = data.read_problems(tmp_path / "any.jsonl", any_answer=True)
    assert [p.answer for p in read] == ["four", 2.5, None, [1, {"a": 2}], True, "12", None]
    with pytest.raises(ValueError, match="line 1: answer must be a whole number"):
        data.read_problems(tmp_path / "any.jsonl")


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    "body, word",
    [
        ("return {}[completion]", "KeyError"), ("return int(completion)", "ValueError (invalid"), ("pass", "returned None"),
        ("return float('nan')", "returned nan"), ("return 1.5", "returned 1.5, not a number from 0 to 1"), ("return '0.5'", "'0.5'"),
        ("return {'correct': True}", "returned {'correct': True}"), ("raise RuntimeError('a\\nb')", "RuntimeError (a b)"),
        ("return [0.0] * 10**6", "..."),
    ],
)  # fmt: skip
def test_a_bad_reward_is_refused_before_training(body, word, files, tmp_path, capsys):
    """One sentence with the prompt and the completion, on a completion made up for it; no file written."""
    err = ended(capsys, 2, [*SMALL, *files, *own(tmp_path, body), "--output-dir", tmp_path / "run"])
    assert word in err and "for the prompt '0,0,0=' and the completion ''" in err and len(err) < 2000
    assert not (tmp_path / "run").exists()


def test_a_reward_that_reads_the_answer_badly_is_found_on_a_made_answer(files, tmp_path, capsys):
    """Guards against a check on the empty completion alone, which many functions leave early."""
    body = "return 0.0 if '<answer>' not in completion else float(completion)"
    err = ended(capsys, 2, [*SMALL, *files, *own(tmp_path, body), "--output-dir", tmp_path / "run"])
    assert "the completion '<answer>000</answer>'" in err


@pytest.mark.parametrize(
    "name, word",
    [
        ("nothing.py:f", "no file"), ("own.py", "no file"), ("own.py:g", "'g'"), ("own.py:x", "bounds"), ("low.py:f", "lowest first"),
        ("nan.py:f", "finite"), ("none.py:f", "bounds"), ("syntax.py:f", "SyntaxError"), ("raises.py:f", "ModuleNotFoundError"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(name, word, tmp_path, capsys):
    for file, bounds in (("own.py", "(0, 1)\nx = 3"), ("low.py", "(1, 0)"), ("nan.py", "(0, float('nan'))"), ("none.py", "None")):
        own(tmp_path, "return 1.0", bounds, file)
    (tmp_path / "syntax.py").write_text("def f(:")
    (tmp_path / "raises.py").write_text("import no_such_module")
    err = ended(capsys, 2, ["--reward", tmp_path / name, "--output-dir", tmp_path / "run"])
    assert word in err and "--reward" in err and not (tmp_path / "run").exists()


def test_a_reward_that_fails_in_training_keeps_the_last_checkpoint(files, tmp_path, capsys):
    """Exit 1 with the prompt, the completion and the checkpoint; guards against a traceback, and a run that goes on with NaN."""
    counter = f"open({str(tmp_path / 'calls')!r}, 'a').write('x')\n    n = len(open({str(tmp_path / 'calls')!r}).read())"
    flags = own(tmp_path, f"{counter}\n    return 0.5 if n < 30 else float('nan')")
    err = ended(capsys, 1, [*SMALL, *files, *flags, "--iterations", "20", "--output-dir", tmp_path / "run"])
    assert "returned nan" in err and "for the prompt '" in err and "checkpoint_iter_" in err
    assert run_folder.checkpoints(str(tmp_path / "run")) and len(rows(tmp_path / "run" / "metrics.jsonl")) < 20


def test_eval_says_it_in_one_sentence(files, tmp_path):
    """Guards against a traceback where there is no loop to catch it."""
    command = [sys.executable, "eval.py", *files[2:], *own(tmp_path, "return 2"), "--problems", "3", "--device", "cpu"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 1 and out.stderr.count("\n") == 1 and out.stderr.startswith("eval.py: --reward"), out.stderr


# ------------------------------------------------------------------------------------------------- what is remembered


def test_a_run_goes_on_with_its_own_reward_only(finished, files, tmp_path, capsys):
    """Another reward, none, other bounds, or a checkpoint from before there was the flag: refused, and by name."""
    resume = [*SMALL, *files, "--problems-per-iteration", "16", "--iterations", "3",
              "--resume", finished / "checkpoint_iter_2", "--output-dir", tmp_path / "run"]  # fmt: skip
    assert "--reward" in ended(capsys, 2, resume)
    assert "--reward" in ended(capsys, 2, [*resume, *own(tmp_path, "return 1.0")])
    state_path = finished / "checkpoint_iter_2" / "trainer_state.json"
    text = state_path.read_text()
    try:
        state = json.loads(text)
        state_path.write_text(json.dumps(state | {"reward_bounds": [0.0, 2.0]}))
        assert "bounds" in ended(capsys, 2, [*resume, *REWARD])
        del state["config"]["reward"]
        state_path.write_text(json.dumps(state))
        assert "--reward" in ended(capsys, 2, [*resume, *REWARD])
    finally:
        state_path.write_text(text)
    assert not (tmp_path / "run").exists()
    train.main([*map(str, resume), *REWARD])
    assert rows(tmp_path / "run" / "metrics.jsonl")[-1]["iteration"] == 3
