"""A task and a reward of one's own.

What a user's function may do, what is said when it fails, and what a run remembers of it.
"""

import itertools
import json
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import rows
from safetensors.torch import load_file

import data
import eval as evaluation
import fsdp
import policy
import reward as reward_module
import train
import value as value_module

ROOT = pathlib.Path(train.__file__).parent
EXAMPLE = ROOT / "examples" / "sort_digits"
REWARD = f"{EXAMPLE / 'reward.py'}:reward"
SMALL = ["--config", "ppo", "--problems-per-iteration", "4", "--rollouts-per-problem", "3"]
SMALL += ["--eval-problems", "6", "--max-new-tokens", "14", "--checkpoint-every", "1"]
SMALL += ["--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The example's two files: the paths of train.jsonl and eval.jsonl."""
    folder = tmp_path_factory.mktemp("problems")
    subprocess.run([sys.executable, EXAMPLE / "make.py", folder], check=True, capture_output=True)
    return folder / "train.jsonl", folder / "eval.jsonl"


@pytest.fixture(scope="module")
def file_flags(files):
    """The example's two files, as flags of train.py."""
    return ["--train-file", str(files[0]), "--eval-file", str(files[1])]


@pytest.fixture(scope="module")
def finished(file_flags, tmp_path_factory):
    """Two iterations of the example; tests only read this folder."""
    folder = tmp_path_factory.mktemp("own") / "run"
    flags = [*SMALL, *file_flags, "--reward", REWARD]
    flags += ["--problems-per-iteration", "16", "--samples", "16", "--iterations", "2"]
    train.main([*flags, "--output-dir", str(folder)])
    return folder


def write_reward(folder, body, bounds="(0.0, 1.0)", name="own.py"):
    """Write a reward function with this body; returns its FILE.py:FUNCTION."""
    source = f"def f(problem, completion):\n    {body}\n\n\nf.bounds = {bounds}\n"
    (folder / name).write_text(source)
    return f"{folder / name}:f"


def error_of_run(capsys, status, flags):
    """The one sentence on stderr of a run that ends with this status."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == status, error
    assert error.count("\n") == 1, error
    assert error.startswith("train.py: "), error
    return error


# ------------------------------------------------------------------------- The example of countdown

COUNTDOWN = ROOT / "examples" / "countdown"
COUNTDOWN_REWARD = f"{COUNTDOWN / 'reward.py'}:reward"


def make_countdown(folder, *flags):
    """Run the example's make.py, which writes train.jsonl and eval.jsonl there."""
    command = [sys.executable, COUNTDOWN / "make.py", *flags, folder]
    subprocess.run(command, check=True, capture_output=True)


def solutions(numbers, target):
    """Calculations of three numbers that reach a target, as texts, by trying all."""
    found = []
    for a, b, c in itertools.permutations(numbers):
        values = {
            f"{a}+{b}+{c}": a + b + c,
            f"{a}+{b}-{c}": a + b - c,
            f"{a}-{b}+{c}": a - b + c,
            f"{a}-{b}-{c}": a - b - c,
            f"{a}*{b}+{c}": a * b + c,
            f"{a}*{b}-{c}": a * b - c,
            f"{a}+{b}*{c}": a + b * c,
            f"{a}-{b}*{c}": a - b * c,
            f"{a}*{b}*{c}": a * b * c,
        }
        found += [text for text, value in values.items() if value == target]
    return found


@pytest.mark.parametrize("flags, prefill", [([], ""), (["--words"], "<think>")])
def test_every_countdown_can_be_solved(flags, prefill, tmp_path):
    """By brute force, and the reward agrees.  No numbers of the evaluation are trained on."""
    make_countdown(tmp_path, *flags)
    training = data.read_problems(tmp_path / "train.jsonl", any_answer=True)
    held_out = data.read_problems(tmp_path / "eval.jsonl", any_answer=True)
    reward = reward_module.load_reward(COUNTDOWN_REWARD)
    for problem in training[::7] + held_out:
        numbers, target = problem.answer["numbers"], problem.answer["target"]
        assert str(target) in problem.prompt and str(numbers[0]) in problem.prompt
        right = solutions(numbers, target)
        assert right, problem
        verdict = reward.judge(problem, f"{problem.prefill}<answer>{right[0]}</answer>")
        assert verdict["correct"] and verdict["reward"] == 1
    assert len(training) > 1000 and len(held_out) > 100

    def numbers_of(problems):
        return {tuple(problem.answer["numbers"]) for problem in problems}

    assert numbers_of(training).isdisjoint(numbers_of(held_out))
    assert all(problem.prefill == prefill for problem in training)


@pytest.mark.parametrize(
    "completion, share",
    [
        ("<answer>2+3*5</answer>", 1),
        ("<think>5*3=15</think><answer> 3 * 5 + 2 </answer>", 1),
        ("<answer>2*3+5</answer>", 0.5),  # the numbers, but 11
        ("<answer>17</answer>", 0),
        ("<answer>2+15</answer>", 0.5 / 3),
        ("<answer>2+3*5+0</answer>", 0),  # 0 is no number of the task
        ("<answer>2+3*5+1-1</answer>", 0.5 * 3 / 5),
        ("<answer>3+3+3</answer>", 0.5 / 3),
        ("<answer>2*2*3+5</answer>", 0.5 * 3 / 4),  # 17, but with 2 twice
        ("<answer>2+3*5=17</answer>", 0),
        ("<answer>__import__('os')</answer>", 0),
        ("2+3*5", 0),
    ],
)
def test_the_reward_of_countdown_by_hand(completion, share):
    """Guards against a number that is used twice, and against text that is run as Python."""
    reward = reward_module.load_reward(COUNTDOWN_REWARD)
    problem = data.Problem("2,3,5 17=", {"numbers": [2, 3, 5], "target": 17})
    verdict = reward.judge(problem, completion)
    assert verdict["reward"] == pytest.approx(share)
    assert verdict["correct"] == (share == 1)
    assert verdict["formatted"] == ("<answer>" in completion)


def test_countdown_trains(tmp_path):
    """One iteration by the tiny base: the files and the reward are accepted."""
    make_countdown(tmp_path)
    flags = ["--train-file", tmp_path / "train.jsonl", "--eval-file", tmp_path / "eval.jsonl"]
    flags += ["--reward", COUNTDOWN_REWARD, "--iterations", "1", "--output-dir", tmp_path / "run"]
    train.main([*SMALL, *[str(flag) for flag in flags]])
    first, last = rows(tmp_path / "run" / "metrics.jsonl")
    assert first["eval_accuracy"] == 0 and 0 <= last["reward_mean"] <= 1


# -------------------------------------------------------------------------- The example of sorting


def test_the_example_holds_out_whole_sets_of_digits(files):
    """Guards against 3,5,9 in training and 9,5,3 in evaluation.

    Then a model could remember the answer instead of learning to sort.
    """
    training = data.read_problems(files[0], any_answer=True)
    held_out = data.read_problems(files[1], any_answer=True)
    assert len(training) + len(held_out) == 1000
    assert len(held_out) >= 50
    training_answers = {problem.answer for problem in training}
    assert training_answers.isdisjoint(problem.answer for problem in held_out)
    for problem in training + held_out:
        digits = problem.prompt.strip("=").split(",")
        assert "".join(sorted(digits)) == problem.answer


@pytest.mark.parametrize(
    "completion, share, correct",
    [
        ("<answer>359</answer>", 1, True),
        ("35</think><answer>395</answer>", 1 / 3, False),
        ("<answer>3590</answer>", 3 / 4, False),
        ("<answer>3</answer>", 1 / 3, False),
        ("<answer></answer>", 0, False),
        ("359", 0, False),
        ("", 0, False),
    ],
)
def test_the_examples_reward_by_hand(completion, share, correct):
    """Guards against a share of what was said instead of what was asked for.

    A single right digit would earn 1.
    """
    reward = reward_module.load_reward(REWARD)
    verdict = reward.judge(data.Problem("5,3,9=", "359"), completion)
    assert verdict["reward"] == pytest.approx(share)
    assert verdict["correct"] == correct


def test_the_example_trains_and_is_remembered(finished):
    """Rewards of the user's function in the samples; its name and bounds in the checkpoint."""
    reward = reward_module.load_reward(REWARD)
    samples = rows(finished / "samples.jsonl")
    assert len(samples) >= 24
    for row in samples:
        verdict = reward.judge(data.Problem(row["prompt"], row["truth"]), row["completion"])
        answer = verdict.pop("answer")
        assert row["answer"] in (answer, None)  # None: the completion was cut off
        assert verdict.items() <= row.items()
        assert {"weight", "f"} <= set(row)
    # The built-in reward would give -1 to nearly all of these completions.
    for row in rows(finished / "metrics.jsonl")[1:]:
        assert row["reward_mean"] >= 0
    state = json.loads((finished / "checkpoint_iter_2" / "trainer_state.json").read_text())
    assert state["config"]["reward"] == REWARD
    assert state["reward_bounds"] == [0, 1]


def test_the_soft_value_has_the_bounds_of_the_runs_reward(finished):
    """Guards against h with the built-in reward's bounds, for a head trained with other bounds."""
    folder = finished / "checkpoint_iter_2"
    model = policy.load_policy(str(folder))[0]
    head = value_module.ValueHead(model.config.hidden_size)
    head.load_state_dict(load_file(folder / "value.safetensors"))
    hidden = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        h = evaluation.load_value_function(str(folder), model)(hidden)[1]
        u_logit = head(hidden)[1]
        assert torch.allclose(h, value_module.soft_value(u_logit, 0.0, 1.0, 0.2))
        assert not torch.allclose(h, value_module.soft_value(u_logit, -1.0, 1.1, 0.2))


def test_targets_of_the_soft_value_have_them_too(file_flags, tmp_path, monkeypatch):
    """Guards against targets of u outside of [0, 1], which wrong bounds make of a reward."""
    seen = set()
    value_loss = value_module.value_loss

    def recording_value_loss(values, u_logit, returns, targets, token_weights):
        seen.update(targets[token_weights > 0].tolist())
        return value_loss(values, u_logit, returns, targets, token_weights)

    monkeypatch.setattr(value_module, "value_loss", recording_value_loss)
    body = "return 7.0 if '</answer>' in completion else 3.0"
    reward = write_reward(tmp_path, body, bounds="(3.0, 7.0)")
    flags = [*SMALL, *file_flags, "--reward", reward, "--iterations", "1"]
    train.main([*flags, "--output-dir", str(tmp_path / "run")])
    assert seen == {0.0, 1.0}


def test_evaluation_by_both_scripts(finished, files, capsys):
    """The last evaluation of the run, by train.py --eval-only and by eval.py --reward."""
    last = rows(finished / "metrics.jsonl")[-1]
    folder = str(finished / "checkpoint_iter_2")
    capsys.readouterr()
    train.main(["--eval-only", "--checkpoint", folder])
    by_train = capsys.readouterr().out
    flags = ["--model", folder, "--eval-file", str(files[1]), "--reward", REWARD]
    flags += ["--problems", "6", "--max-new-tokens", "14", "--device", "cpu"]
    evaluation.main(flags)
    by_eval = capsys.readouterr().out
    for output in (by_train, by_eval):
        figures = {}
        for line in output.splitlines():
            if line.startswith(("accuracy ", "format ")):
                name, figure = line.split()[:2]
                figures[name] = float(figure)
        assert figures["accuracy"] == pytest.approx(last["eval_accuracy"], abs=1e-3)
        assert figures["format"] == pytest.approx(last["eval_format"], abs=1e-3)


# ----------------------------------------------------------------------- What a function may return


@pytest.mark.parametrize(
    "body, verdict",
    [
        ("return 1", (1.0, True, True)),
        ("return 0.25", (0.25, False, True)),
        ("return False", (0.0, False, True)),
        ("return sum([0.1] * 10) + 1e-12", (1.0, True, True)),
        ("import numpy; return numpy.float32(0.5)", (0.5, False, True)),
        ("return {'reward': 0.5, 'correct': True}", (0.5, True, True)),
        ("return {'reward': 1, 'formatted': 0}", (1.0, True, False)),
        ("return float(problem.answer['target'] in completion)", (1.0, True, True)),
    ],
)
def test_returned_values(body, verdict, tmp_path):
    """A number alone, or a dict. The verdict is plain JSON, with defaults for what is not said.

    Majority votes go by the text, unless the function says otherwise.
    """
    reward, correct, formatted = verdict
    loaded = reward_module.load_reward(write_reward(tmp_path, body))
    found = loaded.judge(data.Problem("1=", {"target": "y"}), "xyz")
    assert json.loads(json.dumps(found)) == found
    assert found["reward"] == pytest.approx(reward)
    assert (found["correct"], found["formatted"]) == (correct, formatted)
    assert found["answer"] == "xyz"


def test_a_completion_cut_off_is_not_asked_about(tmp_path):
    """Guards against a truncated leaf that counts as right.

    And against a function that has to know about truncation.
    """
    reward = write_reward(tmp_path, "raise RuntimeError", bounds="(-2, 3)")
    loaded = reward_module.load_reward(reward)
    verdict = loaded.judge(data.Problem("1=", None), "1", truncated=True)
    assert verdict == {"reward": -2, "correct": False, "formatted": False, "answer": None}


def test_any_answer_will_do(tmp_path):
    """Guards against a task that cannot be written down because its answer is no whole number."""
    answers = ["four", 2.5, None, [1, {"a": 2}], True, "12"]
    lines = [{"prompt": "1=", "answer": answer} for answer in answers]
    lines.append({"prompt": "2="})
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    problems = data.read_problems(path, any_answer=True)
    assert [problem.answer for problem in problems] == [*answers, None]
    with pytest.raises(ValueError, match="line 1: answer must be a whole number"):
        data.read_problems(path)


# ---------------------------------------------------------------------------------- What goes wrong


@pytest.mark.parametrize(
    "body, word",
    [
        ("return {}[completion]", "KeyError"),
        ("return int(completion)", "ValueError (invalid"),
        ("pass", "returned None"),
        ("return float('nan')", "returned nan"),
        ("return 1.5", "returned 1.5, not a number from 0 to 1"),
        ("return '0.5'", "'0.5'"),
        ("return {'correct': True}", "returned {'correct': True}"),
        ("raise RuntimeError('a\\nb')", "RuntimeError (a b)"),
        ("return [0.0] * 10**6", "..."),
    ],
)
def test_a_bad_reward_is_refused_before_training(body, word, file_flags, tmp_path, capsys):
    """One sentence with the prompt and the completion, here a made one; no file is written."""
    reward = write_reward(tmp_path, body)
    flags = [*SMALL, *file_flags, "--reward", reward, "--output-dir", tmp_path / "run"]
    error = error_of_run(capsys, 2, flags)
    assert word in error
    assert "for the prompt '0,0,0=' and the completion ''" in error
    assert len(error) < 2000
    assert not (tmp_path / "run").exists()


def test_a_reward_that_reads_the_answer_badly_is_found_on_a_made_answer(
    file_flags, tmp_path, capsys
):
    """Guards against a check on the empty completion alone, which many functions leave early."""
    body = "return 0.0 if '<answer>' not in completion else float(completion)"
    reward = write_reward(tmp_path, body)
    flags = [*SMALL, *file_flags, "--reward", reward, "--output-dir", tmp_path / "run"]
    error = error_of_run(capsys, 2, flags)
    assert "the completion '<answer>000</answer>'" in error


@pytest.mark.parametrize(
    "name, word",
    [
        ("nothing.py:f", "no file"),
        ("own.py", "no file"),
        ("own.py:g", "'g'"),
        ("own.py:x", "bounds"),
        ("low.py:f", "lowest first"),
        ("nan.py:f", "finite"),
        ("none.py:f", "bounds"),
        ("syntax.py:f", "SyntaxError"),
        ("raises.py:f", "ModuleNotFoundError"),
    ],
)
def test_bad_files_are_refused(name, word, tmp_path, capsys):
    """Guards against a traceback from the user's file, and against bounds that are none."""
    files = [
        ("own.py", "(0, 1)\nx = 3"),
        ("low.py", "(1, 0)"),
        ("nan.py", "(0, float('nan'))"),
        ("none.py", "None"),
    ]
    for file, bounds in files:
        write_reward(tmp_path, "return 1.0", bounds=bounds, name=file)
    (tmp_path / "syntax.py").write_text("def f(:")
    (tmp_path / "raises.py").write_text("import no_such_module")
    flags = ["--reward", tmp_path / name, "--output-dir", tmp_path / "run"]
    error = error_of_run(capsys, 2, flags)
    assert word in error
    assert "--reward" in error
    assert not (tmp_path / "run").exists()


FAILS_AT_CALL_30 = """with open({path!r}, "a") as file:
        file.write("x")
        calls = file.tell()
    return 0.5 if calls < 30 else float("nan")"""


def test_a_reward_that_fails_in_training_keeps_the_last_checkpoint(file_flags, tmp_path, capsys):
    """Exit 1 with the prompt, the completion and the checkpoint.

    Guards against a traceback, and against a run that goes on with NaN.
    """
    folder = tmp_path / "run"
    body = FAILS_AT_CALL_30.format(path=str(tmp_path / "calls"))
    reward = write_reward(tmp_path, body)
    flags = [*SMALL, *file_flags, "--reward", reward, "--iterations", "20"]
    error = error_of_run(capsys, 1, [*flags, "--output-dir", folder])
    assert "returned nan" in error
    assert "for the prompt '" in error
    assert "checkpoint_iter_" in error
    assert fsdp.list_checkpoints(str(folder))
    assert len(rows(folder / "metrics.jsonl")) < 20


def test_eval_says_it_in_one_sentence(files, tmp_path, monkeypatch, capsys):
    """Guards against a traceback of the script, where there is no loop to catch the error.

    The file runs as a script does, but in this process: to import torch once more takes seconds.
    """
    reward = write_reward(tmp_path, "return 2")
    flags = ["--eval-file", str(files[1]), "--reward", reward]
    flags += ["--problems", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    error = capsys.readouterr().err
    status = stop.value.code
    # Python prints a text that is given to sys.exit on stderr, and exits with status 1.
    if isinstance(status, str):
        error += f"{status}\n"
        status = 1
    assert status == 1, error
    assert error.count("\n") == 1, error
    assert error.startswith("eval.py: --reward"), error


# ------------------------------------------------------------------------------- What is remembered


def test_a_run_goes_on_with_its_own_reward_only(finished, file_flags, tmp_path, capsys):
    """Another reward, other bounds, or a checkpoint without the flag: refused, and by name.

    A checkpoint without the flag is from before there was one.
    """
    checkpoint = finished / "checkpoint_iter_2"
    folder = tmp_path / "run"
    resume = [*SMALL, *file_flags, "--problems-per-iteration", "16", "--iterations", "3"]
    resume += ["--resume", str(checkpoint), "--output-dir", str(folder)]
    own_reward = write_reward(tmp_path, "return 1.0")
    assert "--reward" in error_of_run(capsys, 2, [*resume, "--reward", own_reward])

    state_path = checkpoint / "trainer_state.json"
    text = state_path.read_text()
    try:
        state = json.loads(text)
        state["reward_bounds"] = [0.0, 2.0]
        state_path.write_text(json.dumps(state))
        assert "bounds" in error_of_run(capsys, 2, [*resume, "--reward", REWARD])
        state = json.loads(text)
        del state["config"]["reward"]
        del state["inputs"]  # nor were there checksums
        state_path.write_text(json.dumps(state))
        assert "--reward" in error_of_run(capsys, 2, [*resume, "--reward", REWARD])
    finally:
        state_path.write_text(text)
    assert not folder.exists()

    train.main([*resume, "--reward", REWARD])
    assert rows(folder / "metrics.jsonl")[-1]["iteration"] == 3
