"""The training loop as a user meets it: runs, resumes, files, one clear sentence for a mistake."""

import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
import transformers
from conftest import rows, tensors, timeless
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import fsdp
import policy
import reward
import train
import value

ROOT = pathlib.Path(train.__file__).parent
ONE = fsdp.Ranks(rank=0, world_size=1, device=torch.device("cpu"))
SMALL = """
    --config ppo --problems-per-iteration 4 --rollouts-per-problem 3 --eval-problems 6
    --max-new-tokens 14 --max-nodes 128 --device cpu --checkpoint-every 1 --samples 2
    --average 0.9
""".split()


def run(folder, *flags, iterations=2):
    """A small run in this process; returns the rows of its metrics.jsonl."""
    words = [*SMALL, "--iterations", iterations, "--output-dir", folder, *flags]
    train.main([str(word) for word in words])
    return rows(folder / "metrics.jsonl")


def checkpoint_names(folder):
    return [os.path.basename(path) for path in fsdp.list_checkpoints(str(folder))]


def equal(one, other):
    """Are these dicts of tensors the same, bit for bit?"""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def all_finite(metrics):
    return all(math.isfinite(x) for row in metrics for x in row.values() if isinstance(x, float))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four iterations that keeps three checkpoints.  Tests only read it, or copy it."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, "--keep-checkpoints", "3", iterations=4)
    return folder


class Killed(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The same run, killed when the metrics of its third iteration were written."""
    folder = tmp_path_factory.mktemp("killed")
    append_rows = fsdp.append_rows

    def stop_in_the_third(path, lines):
        append_rows(path, lines)
        if lines[0]["iteration"] == 3 and path.endswith("metrics.jsonl"):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "append_rows", stop_in_the_third)
        with pytest.raises(Killed):
            run(folder, "--keep-checkpoints", "3", iterations=4)
    return folder


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory):
    """One iteration with another seed."""
    folder = tmp_path_factory.mktemp("other_seed")
    run(folder, "--seed", "5", iterations=1)
    return folder


# ------------------------------------------------------------------------------------ What a run is

METRICS = """
    seconds model_tokens reward_mean rollout_accuracy solved unique_correct leaves truncated
    completion_length policy_loss value_loss approx_kl clip_fraction entropy explained_variance
    grad_norm learning_rate
""".split()


def test_a_run_writes_what_it_promises(finished):
    metrics = rows(finished / "metrics.jsonl")
    assert [row["iteration"] for row in metrics] == [0, 1, 2, 3, 4]
    evaluated = {"eval_accuracy", "eval_format", "eval_accuracy_by_difficulty"}
    assert evaluated <= set(metrics[0])
    assert evaluated <= set(metrics[-1])
    for row in metrics[1:]:
        assert set(METRICS) <= set(row)
    assert all_finite(metrics)
    tokens = [row["model_tokens"] for row in metrics]
    assert tokens == sorted(tokens)
    assert tokens[0] == 0 < tokens[1]
    samples = rows(finished / "samples.jsonl")
    assert len(samples) == 8
    assert {"prompt", "completion", "reward", "correct", "weight", "f"} <= set(samples[0])
    assert json.loads((finished / "config.json").read_text())["rollouts_per_problem"] == 3
    kept = [path.name for path in sorted(finished.glob("checkpoint*"))]
    assert kept == ["checkpoint_iter_2", "checkpoint_iter_3", "checkpoint_iter_4"]
    assert not list(finished.glob(".checkpoint*"))


def test_before_the_first_update_the_ratio_is_one(finished):
    """Theorem 9 in the loop itself: the KL of the first minibatch, before any step is made."""
    for row in rows(finished / "metrics.jsonl")[1:]:
        assert abs(row["first_kl"]) < 1e-5


def test_the_same_seed_gives_the_same_run(finished, killed, other_seed):
    assert timeless(killed) == timeless(finished)[:4]
    # Another seed draws other problems.  (Its mean reward may be the same: few rollouts are right.)
    other = rows(other_seed / "metrics.jsonl")[1]
    assert other["entropy"] != rows(finished / "metrics.jsonl")[1]["entropy"]


def test_resume_is_exact(finished, killed, tmp_path, capsys):
    """Theorem 12: 4 iterations are 2, a kill in the third, and 2 more, all bit for bit."""
    folder = shutil.copytree(killed, tmp_path / "run")
    run(folder, "--resume", "auto", "--keep-checkpoints", "3", iterations=4)
    assert "after iteration 2" in capsys.readouterr().out
    assert timeless(folder) == timeless(finished)
    assert (folder / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()
    # The weights of the policy and of the head, and Adam's moments.
    last = "checkpoint_iter_4"
    assert equal(tensors(folder / last), tensors(finished / last))


def test_a_run_goes_on_without_its_flags_typed_again(finished, killed, tmp_path, capsys):
    """--resume FOLDER: the run's own flags, those given beside it, and what may not change."""
    folder = shutil.copytree(killed, tmp_path / "run")
    train.main(["--resume", str(folder)])
    assert timeless(folder) == timeless(finished)
    # A longer run: what it does to the learning rate is said.
    capsys.readouterr()
    train.main(["--resume", str(folder), "--iterations", "5"])
    said = capsys.readouterr().out
    assert "--iterations 5, before 4: from here on the learning rate follows the cosine" in said
    assert [row["iteration"] for row in rows(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    # A checkpoint, and another folder to go on in.
    source = finished / "checkpoint_iter_3"
    other = tmp_path / "other"
    train.main(["--resume", str(source), "--output-dir", str(other)])
    assert timeless(other) == timeless(finished)[4:]
    capsys.readouterr()
    error = refused(capsys, other, "--resume", other, "--beta", "0.3")
    assert (
        f"--beta 0.3 differs from the 0.2 that {other}/checkpoint_iter_4 was trained with" in error
    )
    error = refused(capsys, other, "--config", "quick", "--resume", "auto")
    assert f"--resume {other} takes that run's own flags" in error
    assert "trainer_state.json" in refused(capsys, tmp_path / "new", "--resume", tmp_path)


def test_a_runs_folder_stands_for_its_newest_checkpoint(finished, tmp_path, capsys, monkeypatch):
    """For the model of another run, for an evaluation, and for --eval-only."""
    newest = f"{finished}/checkpoint_iter_4"
    assert train.Config(model=str(finished)).model == newest
    evaluation.main(["--model", str(finished), "--n", "3", "--device", "cpu"])
    assert newest in capsys.readouterr().out
    train.main(["--eval-only", "--checkpoint", str(finished), "--eval-problems", "3"])
    assert "accuracy" in capsys.readouterr().out
    # A folder of none, a file of another library.
    (tmp_path / "model.pt").write_bytes(b"")
    error = refused(capsys, tmp_path / "run", "--model", tmp_path / "model.pt")
    assert "this is a file; expected is a model's folder" in error
    # The hub is not asked: offline, the library tries for 20 seconds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused(capsys, tmp_path / "run", "--model", "runs/nothing-here")
    assert "there is no such folder, and its config cannot be had" in error


def test_the_average_of_the_weights_by_hand(tmp_path):
    """Steps 1, 2, 3 have d = 1/10, 2/11, 3/12: a = w1; then 2/11 w1 + 9/11 w2; then with w3.

    Guards against an average that begins at the base or at zero, and a wrong place of d.
    """
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.0)
    for step, number in enumerate((11.0, 22.0, 4.0), start=1):
        optimizer.state[weight]["step"] = step
        with torch.no_grad():
            weight.fill_(number)
        train.move_average(optimizer, 0.99, step)
    # 2/11 of 11 + 9/11 of 22 = 20, then 1/4 of 20 + 3/4 of 4 = 8
    assert optimizer.state[weight]["average"].item() == pytest.approx(8.0)
    train.move_average(optimizer, 0.5, 1000)
    assert optimizer.state[weight]["average"].item() == pytest.approx(6.0)


def test_evaluations_and_checkpoints_have_the_average(tmp_path, monkeypatch):
    """The weights themselves are with the moments, and the run goes on from them.

    Guards against a run that evaluates or saves the weights of its last step, and one that goes on
    from the average.
    """
    weights = {}  # of the first layer, as a phase of the run saw them
    evaluate, save = evaluation.evaluate, train.save

    def copy(model):
        return next(model.parameters()).detach().clone()

    def evaluate_and_copy(model, *arguments, **more):
        weights["evaluation"] = copy(model)
        return evaluate(model, *arguments, **more)

    def save_and_copy(run):
        save(run)
        weights["after the save"] = copy(run.model)

    monkeypatch.setattr(evaluation, "evaluate", evaluate_and_copy)
    monkeypatch.setattr(train, "save", save_and_copy)
    run(tmp_path, "--eval-every", 1, iterations=2)
    checkpoint = tensors(tmp_path / "checkpoint_iter_2")
    saved = checkpoint["model/model.embed_tokens.weight"]
    kept = checkpoint["optimizer/policy.model.embed_tokens.weight.average"]
    assert torch.equal(saved, weights["evaluation"])
    assert torch.equal(kept, weights["after the save"])
    assert not torch.equal(saved, kept)


def test_more_passes_of_the_head_leave_the_policy_alone(tmp_path):
    """The policy is the same bit for bit, with Adam's moments; the head is another.

    Guards against passes that move the policy by what is left of its momentum.
    """
    for passes in (0, 3):
        words = f"--loss grpo --guide none --value-epochs {passes}".split()
        run(tmp_path / f"{passes}", *words, iterations=2)
    none = tensors(tmp_path / "0" / "checkpoint_iter_2")
    three = tensors(tmp_path / "3" / "checkpoint_iter_2")
    for name in none:
        of_the_head = name.startswith(("value/", "optimizer/value."))
        assert torch.equal(none[name], three[name]) != of_the_head, name
    assert three["optimizer/value.inner.weight.step"] == 2 * 4 * (1 + 3)


def test_micro_batches_do_not_change_the_run(finished, tmp_path):
    """Theorem 11 in the loop: the metrics agree to rounding, whatever fits into memory."""
    small = run(tmp_path, "--micro-batch", "2", iterations=1)[1]
    whole = rows(finished / "metrics.jsonl")[1]
    for name in ("policy_loss", "value_loss", "grad_norm", "approx_kl", "entropy"):
        assert small[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        "--rollout sample",
        "--loss grpo",
        "--loss apo",
        "--tau 0",
        "--width 1",
        "--width 8",
        "--leaf-weights off",
        "--guide head",
        "--cover 1",
        "--gradient-checkpointing on",
        "--freeze-blocks 2",
        "--eval-decode astar",
        "--digits 1-2x2",
    ],
)
@pytest.mark.filterwarnings("error")
def test_variants_train(flags, tmp_path):
    """No variant warns or makes a NaN; the weights move, and frozen ones stay."""
    words = "--checkpoint-every 2 --eval-problems 2".split()
    assert all_finite(run(tmp_path, *words, *flags.split()))
    base = load_file(ROOT / "tiny_base" / "model.safetensors")
    trained = load_file(tmp_path / "checkpoint_iter_2" / "model.safetensors")
    for name in base:
        stays = "freeze" in flags and re.search(r"embed|layers\.[01]\.", name) is not None
        assert torch.equal(base[name], trained[name]) == stays, name


OWN_REWARD = """
def even(problem, completion):
    return len(completion) % 2 == 0

even.bounds = (0, 1)
"""


@pytest.mark.parametrize("until_right", ["on", "off"])
@pytest.mark.filterwarnings("error")
def test_em_trains_on_right_leaves(until_right, tmp_path):
    """With a reward that the base earns at times.  The policy moves."""
    (tmp_path / "own.py").write_text(OWN_REWARD)
    words = "--checkpoint-every 2 --eval-problems 2 --loss em --until-right".split()
    folder = tmp_path / "run"
    metrics = run(folder, *words, until_right, "--reward", f"{tmp_path}/own.py:even")
    assert all_finite(metrics)
    assert metrics[1]["unique_correct"] > 0
    base = load_file(ROOT / "tiny_base" / "model.safetensors")
    trained = load_file(folder / "checkpoint_iter_2" / "model.safetensors")
    assert not any(torch.equal(base[name], trained[name]) for name in base)


def test_problems_from_files(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps({"prompt": f"{a}*11=", "answer": 11 * a}) for a in range(10, 16)]
    path.write_text("\n".join(lines))
    folder = tmp_path / "run"
    metrics = run(folder, "--train-file", path, "--eval-file", path, iterations=1)
    assert metrics[0]["eval_accuracy_by_difficulty"].keys() == {"all"}
    samples = rows(folder / "samples.jsonl")
    assert samples
    assert all(row["prompt"].endswith("*11=") for row in samples)


# -------------------------------------------------------------------------------------- Checkpoints

WITH_TRANSFORMERS_ALONE = """
import json, sys, transformers
folder, *prompts = json.loads(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
texts = []
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=14, do_sample=False)
    texts.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
print(json.dumps(texts))
"""


def test_a_checkpoint_is_a_hugging_face_folder(finished):
    """Another process with transformers alone gives the greedy answers that eval.py counts."""
    folder = str(finished / "checkpoint_iter_4")
    model, tokenizer = policy.load_policy(folder)
    problems = data.eval_problems(8)
    _, found = evaluation.evaluate(
        model, tokenizer, problems, reward.Reward(), ONE, max_new_tokens=14
    )
    ours = [row["completions"][0]["text"] for row in found]
    argument = json.dumps([folder, *(problem.text for problem in problems)])
    command = [sys.executable, "-c", WITH_TRANSFORMERS_ALONE, argument]
    out = subprocess.run(command, capture_output=True, text=True, cwd=finished)
    assert json.loads(out.stdout.splitlines()[-1]) == ours, out.stderr


def eval_only(folder, *flags):
    words = ["--eval-only", "--checkpoint", folder, "--eval-problems", 6, "--max-new-tokens", 14]
    train.main([str(word) for word in [*words, *flags]])


def test_eval_only(finished, capsys, tmp_path):
    """Also of a run of several ranks, by one.  Guards against a --distributed nobody can undo."""
    folder = shutil.copytree(finished / "checkpoint_iter_4", tmp_path / "checkpoint_iter_4")
    path = folder / "trainer_state.json"
    text = path.read_text()
    path.write_text(text.replace('"distributed": false', '"distributed": true'))
    assert path.read_text() != text
    eval_only(folder)
    figure = float(capsys.readouterr().out.split("accuracy")[1].split()[0])
    last = rows(finished / "metrics.jsonl")[-1]
    assert figure == pytest.approx(last["eval_accuracy"], abs=1e-3)


@pytest.mark.parametrize("flags, draws", [((), 8), (("--eval-completions", 3), 3)])
def test_eval_completions(flags, draws, finished, capsys):
    """So many completions are drawn for each problem: pass@k goes up to the last power of two."""
    eval_only(finished / "checkpoint_iter_4", "--eval-decode", "sample", *flags)
    reported = re.findall(r"^pass@(\d+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert [int(k) for k in reported] == [k for k in (1, 2, 4, 8) if k <= draws]


TINY_MODEL = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
TINY_GPT2 = {
    "vocab_size": 24,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "eos_token_id": 1,
    "bos_token_id": 1,
}


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**TINY_MODEL),
        transformers.Qwen3Config(**TINY_MODEL),
        transformers.GPT2Config(**TINY_GPT2),
    ],
    ids=["llama", "qwen3", "gpt2"],
)
def test_every_architecture_trains_and_checkpoints(config, tmp_path):
    """Search, loss and checkpoint; GPT-2 has learned absolute positions."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny_base")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "run"
    metrics = run(folder, "--model", tmp_path / "model", "--checkpoint-every", "2")
    assert abs(metrics[1]["first_kl"]) < 1e-5
    checkpoint = folder / "checkpoint_iter_2"
    saved = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert saved.config.model_type == config.model_type


# -------------------------------------------------------------------------------------------- Flags


def parse(flags):
    """(Config, flags brought along) of a command line."""
    config, arguments, _ = train.parse_arguments(flags.split())
    return config, arguments.companions


@pytest.mark.parametrize("loss", ["ppo", "grpo", "apo"])
def test_these_losses_bring_gumbel_leaves(loss):
    """The defaults, 64 leaves of plain A* until one is right, suit em alone."""
    config, companions = parse(f"--loss {loss}")
    assert companions == {
        "tau": 1.0,
        "until_right": "off",
        "cover": 0.8,
        "rollouts_per_problem": 8,
        "max_nodes": 1024,
    }
    for name, expected in companions.items():
        assert getattr(config, name) == expected


def test_sampling_brings_four_completions():
    config, companions = parse("--rollout sample")
    assert companions == {"rollouts_per_problem": 4}
    assert config.rollouts_per_problem == 4
    # The draws of these losses are eight, of a search or not.
    config, companions = parse("--rollout sample --loss grpo")
    assert config.rollouts_per_problem == companions["rollouts_per_problem"] == 8


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--loss em",
        "--rollout astar",
        "--config ppo",
        "--config ppo --rollout sample",
        "--config ppo --loss grpo",
        "--rollout sample --rollouts-per-problem 64",
    ],
)
def test_nothing_is_brought_along(flags):
    """What the user or the preset sets is not changed."""
    config, companions = parse(flags)
    assert companions == {}
    expected = 8 if "--config ppo" in flags else 64
    assert config.rollouts_per_problem == expected


def test_a_flag_beside_it_wins():
    """A flag given to the loss replaces that companion and no other, also if it is the default."""
    config, companions = parse("--loss ppo --tau 0 --max-nodes 128")
    assert (config.tau, config.max_nodes) == (0.0, 128)
    assert companions == {"until_right": "off", "cover": 0.8, "rollouts_per_problem": 8}
    # A preset that is silent about them does not hinder them.
    assert parse("--config quick --loss ppo")[0].tau == 1.0


def test_the_start_says_what_was_brought_along(tmp_path, capsys):
    flags = """
        --rollout sample --iterations 1 --problems-per-iteration 2 --eval-problems 2
        --max-new-tokens 8 --device cpu
    """.split()
    train.main([*flags, "--output-dir", str(tmp_path)])
    line = "your flags bring along --rollouts-per-problem 4\n"
    assert line in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["rollouts_per_problem"] == 4
    train.main(
        [*flags, "--output-dir", str(tmp_path), "--overwrite", "--rollouts-per-problem", "2"]
    )
    assert "bring along" not in capsys.readouterr().out


def test_help(capsys, monkeypatch):
    """Flags in groups, each with its default and with what presets make of it."""
    monkeypatch.setenv("COLUMNS", "400")  # one line a flag
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: python train.py [--config NAME] [--FLAG VALUE ...]"
    assert lines[1] == ""
    titles = [line for line in lines if re.fullmatch(r"[a-z]+( [a-z]+)?:", line)]
    assert titles[-5:] == ["the task:", "rollouts:", "losses:", "optimisation:", "the run:"]

    help_of = {}
    for paragraph in "\n".join(lines).split("\n  --")[1:]:
        words = paragraph.split("\n\n")[0].split()
        help_of["--" + words[0]] = " ".join(words)
    for name, default in vars(train.Config()).items():
        assert train.flag_name(name) in help_of, name
        if default not in ("", False, []) and name != "model":
            assert f"default {default}" in help_of[train.flag_name(name)]
    assert "default tiny_base" in help_of["--model"]
    for preset, fields in train.PRESETS.items():
        for name, setting in fields.items():
            assert f"{preset}: {train.shown(setting)}" in help_of[train.flag_name(name)]
    # No path of this computer.
    assert not re.search(r"(^|[\s('\"])/\w", "\n".join(lines))


# ------------------------------------------------------------------------------------ The terminal


def test_what_the_terminal_shows(tmp_path, capsys):
    """Columns that line up within 100 characters, one problem at each evaluation, and a summary
    that holds the evaluations before a resume too, which it once forgot.
    """
    run(tmp_path / "run", "--eval-every", "1", iterations=2)
    run(tmp_path / "run", "--eval-every", "1", "--resume", "auto", iterations=3)
    lines = capsys.readouterr().out.splitlines()
    headings = [line for line in lines if line.startswith("iteration  found")]
    assert len(headings) == 2
    # But for the names of flags that others brought along, which are as many as they are.
    wide = [line.replace(str(tmp_path), "runs") for line in lines if "bring along" not in line]
    assert max(len(line) for line in wide) <= 100
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    columns = headings[0].split()
    shown = [line for line in lines if re.match(r" +[123]/[23] ", line)]
    assert [line.split()[0] for line in shown] == ["1/2", "2/2", "3/3"]
    for line, row in zip(shown, metrics[1:]):
        assert len(line) == len(headings[0])
        # "5 k" and "3 s" are one cell each
        cells = dict(zip(columns, re.sub(r"(?<=\d) (?=k|s|min|h)", "", line).split(), strict=True))
        assert cells["found"] == f"{row['solved']:.3f}"
        assert cells["greedy"] == f"{row['eval_accuracy']:.3f}"
        assert cells["reward"] == f"{row['reward_mean']:+.2f}"
        # A right end of each column under that of its heading.
        assert line.index(cells["found"]) + 5 == headings[0].index("found") + 5
    prompt = data.eval_problems(1)[0].prompt
    examples = [line for line in lines if re.match(rf" +(right|wrong)  {re.escape(prompt)}", line)]
    assert len(examples) == 4  # before training, and after each iteration
    table = lines[lines.index("iteration  accuracy  well-formed  length  model tokens  seconds") :]
    assert [int(line.split()[0]) for line in table[1:4]] == [0, 1, 2]
    last = [line for line in lines if line.startswith("iteration  accuracy")]
    assert len(last) == 2
    table = lines[len(lines) - 1 - lines[::-1].index(last[1]) :]
    assert [int(line.split()[0]) for line in table[1:5]] == [0, 1, 2, 3]
    assert [float(line.split()[1]) for line in table[1:5]] == [
        pytest.approx(row["eval_accuracy"], abs=5e-4) for row in metrics
    ]


def test_warnings_where_the_numbers_say_so(capsys):
    """After five iterations without a right rollout, and again after ten; and on cut-off ones."""
    state = types.SimpleNamespace(unsolved=0, first_iteration=0, say=print)
    state.config = train.Config(max_new_tokens=7)
    for iteration in range(1, 12):
        train.print_warnings(state, {"iteration": iteration, "solved": 0.0, "truncated": 0.1})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "no rollout was right in the last 5 iterations" in said[0]
    assert "in the last 10 iterations" in said[1]
    train.print_warnings(state, {"iteration": 12, "solved": 0.1, "truncated": 0.6})
    assert state.unsolved == 0 and capsys.readouterr().out == ""
    train.print_warnings(state, {"iteration": 21, "solved": 0.1, "truncated": 0.6})
    assert "most completions are cut off at --max-new-tokens 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_seconds_as_a_person_says_them(seconds, text):
    """Guards against a wrong unit."""
    assert train.shown_seconds(seconds) == text


# -------------------------------------------------------------------------------- What can go wrong


def refused(capsys, folder, *flags):
    """The one sentence on stderr; exit status 2, nothing else said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(["--output-dir", str(folder), *(str(word) for word in flags)])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.startswith("train.py: "), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--config nonsense", "nonsense"),
        ("--nonsense 3", "--nonsense"),
        ("--rollout beam", "beam"),
        ("--loss dpo", "dpo"),
        ("--iterations 0", "--iterations must be at least 1, not 0"),
        ("--problems-per-iteration -1", "--problems-per-iteration"),
        ("--iterations two", "two"),
        ("--learning-rate nan", "--learning-rate"),
        ("--learning-rate 0", "--learning-rate must be above 0, not 0"),
        ("--learning-rate inf", "--learning-rate"),
        ("--beta 0", "--beta"),
        ("--tau 1.5", "--tau must be at least 0 and at most 1, not 1.5"),
        ("--cover 0", "--cover"),
        ("--width 0", "--width"),
        ("--clip -0.1", "--clip"),
        ("--format-bonus 2", "--format-bonus"),
        ("--length-penalty nan", "--length-penalty"),
        ("--digits 7", "--digits"),
        ("--rollouts-per-problem 30 --max-nodes 1", "--max-nodes"),
        ("--rollouts-per-problem 25 --max-new-tokens 1", "--max-new-tokens"),
        ("--minibatches 9 --problems-per-iteration 4", "--minibatches"),
        ("--max-new-tokens 300", "context"),
        ("--device cuda:99", "cuda:99"),
        ("--device toaster", "toaster"),
        ("--freeze-blocks 9", "--freeze-blocks"),
        ("--model /nowhere/at/all", "/nowhere/at/all"),
        ("--model nothing", "nothing"),
        ("--eval-problems 1000", "578"),
        ("--eval-completions 0", "--eval-completions"),
        ("--eval-only", "--checkpoint"),
        ("--checkpoint runs", "--eval-only"),
        ("--eval-only --checkpoint /nowhere", "/nowhere: there is no such folder"),
        ("--eval-only --checkpoint runs --config quick", "leave --config out"),
        ("--eval-only --checkpoint runs --model tiny_base", "leave --model out"),
        ("--resume auto --overwrite", "--overwrite"),
        ("--resume /nowhere", "/nowhere: there is no such folder"),
        ("--train-file /nowhere.jsonl --eval-file /nowhere.jsonl", "/nowhere.jsonl"),
        ("--train-file /nowhere.jsonl", "needs --eval-file"),
        ("--prompt tinyzero", "what the model's tokenizer does not know"),
        ("--lr 1e-4", "there is no flag --lr; did you mean --learning-rate?"),
        ("--lerning-rate=1e-4", "there is no flag --lerning-rate; did you mean --learning-rate?"),
        ("--batch 8", "there is no flag --batch; did you mean --micro-batch?"),
        ("--xyzzy", "there is no flag --xyzzy; --help lists all flags"),
        ("--distributed", "--distributed"),
        ("--cpu-offload --device cpu", "--cpu-offload"),
        ("--seed -1", "--seed"),
    ],
)
def test_bad_flags_are_refused(flags, word, capsys, tmp_path):
    """One sentence that names what is wrong, and no file written."""
    assert word in refused(capsys, tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()


def test_a_choice_is_checked_wherever_it_comes_from():
    """--eval-only takes its flags from a file, and argparse does not see them."""
    with pytest.raises(ValueError, match="--loss must be one of ppo, grpo, em, apo"):
        train.Config(loss="dpo")


def test_bad_models_are_refused(capsys, tmp_path):
    output = tmp_path / "run"

    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, output, "--model", tmp_path / "empty")
    assert "file" in refused(capsys, output, "--model", __file__)

    t5 = transformers.T5Config(
        vocab_size=31, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    assert "causal" in refused(capsys, output, "--model", tmp_path / "t5")

    bert = transformers.BertConfig(
        vocab_size=31,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny_base")
    tokenizer.save_pretrained(tmp_path / "bert")
    assert "bert" in refused(capsys, output, "--model", tmp_path / "bert")

    model, _ = policy.load_policy(str(ROOT / "tiny_base"))
    model.save_pretrained(tmp_path / "bare")
    assert "tokenizer" in refused(capsys, output, "--model", tmp_path / "bare")

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    refused(capsys, output, "--model", tmp_path / "broken")
    assert not output.exists()


def test_a_hub_id_without_network_is_refused(capsys, tmp_path, monkeypatch):
    # At once, instead of after its retries.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "Qwen/Qwen2.5-3B" in refused(capsys, tmp_path / "run", "--config", "training")


def test_output_folders_in_use_are_refused(finished, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "this is a file" in refused(capsys, tmp_path / "file")
    folder = shutil.copytree(finished, tmp_path / "run")
    before = (folder / "metrics.jsonl").read_bytes()
    assert "--overwrite" in refused(capsys, folder)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert len(run(folder, "--overwrite", iterations=1)) == 2
    assert checkpoint_names(folder) == ["checkpoint_iter_1"]


def test_a_run_that_came_in_between_is_refused(finished, tmp_path):
    """Loading a model takes time.  Guards against a checkpoint that nobody has seen, removed."""
    folder = shutil.copytree(finished, tmp_path / "run")
    config = train.Config(output_dir=str(folder))
    with pytest.raises(ValueError, match="another run has just written there: start again"):
        train.open_output(config, source="", iteration=0, found=[])
    assert len(checkpoint_names(folder)) == 3


def test_bad_checkpoints_are_refused(finished, capsys, tmp_path):
    """Incomplete, damaged, of another size, of another run; the sentence names file or flag."""
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoint_iter_4"
    shutil.copytree(finished / "checkpoint_iter_4", checkpoint)
    shutil.copy(finished / "config.json", folder)
    flags = [*SMALL, "--iterations", "5", "--resume", "auto"]
    assert "--beta 0.3 differs from the 0.2" in refused(capsys, folder, *flags, "--beta", "0.3")

    whole = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    weights = bytearray(whole["model.safetensors"])
    weights[-5] ^= 1
    damages = [
        ("value.safetensors", None),
        ("model.safetensors", bytes(weights)),
        ("trainer_state.json", None),
        ("trainer_state.json", b"{"),
    ]
    for name, damage in damages:
        if damage is None:
            (checkpoint / name).unlink()
        else:
            (checkpoint / name).write_bytes(damage)
        assert name in refused(capsys, folder, *flags)
        (checkpoint / name).write_bytes(whole[name])

    # A value head of another size, with its checksum set right.
    path = checkpoint / "value.safetensors"
    save_file(value.ValueHead(64).state_dict(), path)
    state = json.loads(whole["trainer_state.json"])
    state["files"]["value.safetensors"] = fsdp.fingerprint(path)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert "another model size" in refused(capsys, folder, *flags)


@pytest.mark.parametrize(
    "bad, word",
    [
        ("{", "line 2"),
        ('{"prompt": "1*1="}', "answer"),
        (json.dumps({"prompt": "1" * 300, "answer": 1}), "context"),
        (json.dumps({"prompt": "hello", "answer": 4}), "no tokens"),
    ],
    ids=["no json", "no answer", "too long", "no tokens"],
)
def test_bad_lines_are_named(bad, word, capsys, tmp_path):
    good = json.dumps({"prompt": "12*11=", "answer": 132})
    path = tmp_path / "bad.jsonl"
    path.write_text(good + "\n" + bad + "\n")
    assert word in refused(capsys, tmp_path / "run", "--train-file", path, "--eval-file", path)
    assert not (tmp_path / "run").exists()


def test_a_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    """One sentence with the iteration and what was NaN; exit 1."""
    ppo_loss = policy.ppo_loss
    calls = []

    def poisoned(**arguments):
        calls.append(1)
        loss, metrics = ppo_loss(**arguments)
        if len(calls) > 4:  # four minibatches: from the second iteration on
            loss = loss * math.nan
            metrics["policy_loss"] = metrics["policy_loss"] * math.nan
        return loss, metrics

    monkeypatch.setattr(policy, "ppo_loss", poisoned)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, iterations=3)
    err = capsys.readouterr().err
    assert stop.value.code == 1
    assert "iteration 2: policy_loss is nan" in err
    assert "checkpoint_iter_1" in err
    assert err.count("\n") == 1
    assert [row["iteration"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1]
    kept = tensors(tmp_path / "checkpoint_iter_1")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_a_search_without_a_leaf_stops_the_run(tmp_path, capsys):
    """Two nodes of a beam of one finish no completion.  One sentence, exit 1, no checkpoint."""
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--max-nodes", "2", "--max-open", "1", "--width", "1")
    err = capsys.readouterr().err
    assert stop.value.code == 1
    assert "iteration 1: no search found a completion within --max-nodes 2" in err
    assert "the last good checkpoint is none" in err
    assert err.count("\n") == 1
    assert checkpoint_names(tmp_path) == []


def test_expected_failures_are_sentences_and_bugs_are_not():
    """Of several ranks each names itself; of one there is nothing to name."""
    two = fsdp.Ranks(rank=1, world_size=2, device=torch.device("cpu"))
    memory = torch.OutOfMemoryError("CUDA out of memory")
    assert "cpu is out of memory: lower --micro-batch" in train.failure_sentence(memory, ONE)
    lost = RuntimeError("Connection closed by peer")
    assert train.failure_sentence(lost, two).startswith("rank 1: another rank has ended")
    assert train.failure_sentence(lost, ONE) is None
    full = OSError("the disk is full")
    assert train.failure_sentence(full, ONE) == "the disk is full"
    assert train.failure_sentence(full, two) == "rank 1: the disk is full"
    own = reward.RewardError("--reward raised")
    assert train.failure_sentence(own, ONE) == "--reward raised"
    for bug in (KeyError("x"), RuntimeError("shapes differ"), ValueError("x")):
        assert train.failure_sentence(bug, two) is None


def interrupt_at(calls_of_interest, monkeypatch):
    """Send this process a Ctrl-C in the n-th loss, for every n of these; losses count from 1."""
    ppo_loss = policy.ppo_loss
    calls = []

    def interrupted(**arguments):
        calls.append(1)
        if len(calls) in calls_of_interest:
            os.kill(os.getpid(), signal.SIGINT)
        return ppo_loss(**arguments)

    monkeypatch.setattr(policy, "ppo_loss", interrupted)


def test_ctrl_c_keeps_the_last_finished_iteration(finished, tmp_path, capsys, monkeypatch):
    """In the second update: it is finished, its checkpoint is written, exit 130."""
    with monkeypatch.context() as patch:
        interrupt_at({5}, patch)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, "--checkpoint-every", "50", iterations=4)
    err = capsys.readouterr().err
    assert stop.value.code == 130
    assert "stopped by Ctrl-C after iteration 2" in err
    assert err.count("\n") == 1
    assert checkpoint_names(tmp_path) == ["checkpoint_iter_2"]
    assert f"checkpoint_iter_2 is kept; go on with --resume {tmp_path}\n" in err
    run(tmp_path, "--checkpoint-every", "50", "--resume", "auto", iterations=4)
    assert timeless(tmp_path) == timeless(finished)


def test_a_second_ctrl_c_does_not_tear_the_update(finished, tmp_path, monkeypatch):
    """Two signals within one update: the checkpoint is that of the whole update."""
    monkeypatch.setattr(train.StopSignals, "PATIENCE", 1e9)
    interrupt_at({5, 6}, monkeypatch)
    with pytest.raises(SystemExit):
        run(tmp_path, iterations=4)
    name = "checkpoint_iter_2"
    assert checkpoint_names(tmp_path)[-1] == name
    assert equal(tensors(tmp_path / name), tensors(finished / name))


def test_a_late_second_ctrl_c_ends_the_run_at_once(tmp_path, capsys, monkeypatch):
    """Whoever waits and presses it again is not kept waiting.  One sentence, exit 130."""
    monkeypatch.setattr(train.StopSignals, "PATIENCE", -1.0)
    interrupt_at({5, 6}, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, iterations=4)
    err = capsys.readouterr().err
    assert stop.value.code == 130
    assert "stopped by a second Ctrl-C" in err
    assert "checkpoint_iter_1" in err
    assert err.count("\n") == 1
    assert checkpoint_names(tmp_path) == ["checkpoint_iter_1"]
    os.close(fsdp.lock_folder(str(tmp_path)))  # the folder is free again


def test_no_run_is_mixed_with_another(finished, other_seed, capsys, tmp_path):
    """What is another run's, a model's, or needed by this run is left alone."""
    folder = shutil.copytree(finished, tmp_path / "run")
    other = shutil.copytree(other_seed, tmp_path / "other")
    older = str(folder / "checkpoint_iter_2")

    # A checkpoint of one run is not continued in the folder of another.
    before = (other / "metrics.jsonl").read_bytes()
    assert "another run" in refused(capsys, other, *SMALL, "--resume", older)
    assert (other / "metrics.jsonl").read_bytes() == before
    # A model's folder is not taken for a run's.
    for flags in (["--overwrite"], ["--resume", "auto"], []):
        assert "not a run's" in refused(capsys, older, *SMALL, *flags)
    # What a run starts from is not overwritten.
    assert "needs" in refused(capsys, folder, *SMALL, "--model", older, "--overwrite")
    # Nor if its path leads there by a link: the model was removed.
    (tmp_path / "link").symlink_to(folder)
    linked = str(tmp_path / "link" / "checkpoint_iter_2")
    assert "needs" in refused(capsys, folder, *SMALL, "--model", linked, "--overwrite")
    # Going on from an older checkpoint drops the newer ones.
    assert len(run(folder, "--resume", older, "--keep-checkpoints", "9", iterations=3)) == 4
    assert checkpoint_names(folder) == ["checkpoint_iter_2", "checkpoint_iter_3"]


# --------------------------------------------------------------------------------------- The pieces


def test_a_file_is_walked_through_epoch_by_epoch():
    """Guards against an epoch that begins in its middle: iterations count from 1."""
    problems = [data.Problem(f"{i}*1=", i) for i in range(8)]
    config = train.Config(problems_per_iteration=4)
    seen = []
    for iteration in (1, 2):
        drawn, _ = train.draw_problems(config, iteration, ONE, problems)
        seen += [problem.answer for problem in drawn]
    assert sorted(seen) == list(range(8))


def test_learning_rate_by_hand():
    config = train.Config(iterations=12, warmup=2, final_rate=0.1)
    scale = [train.learning_rate_scale(config, i) for i in range(1, 13)]
    assert scale[:2] == [0.5, 1.0]
    assert scale[-1] == pytest.approx(0.1)
    assert scale[6] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
    assert scale[2:] == sorted(scale[2:], reverse=True)


class FiveProblems:
    """What deal_minibatches reads of the Rollouts of five problems."""

    problem = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])
    length = torch.tensor([5, 3, 4, 9, 2, 7, 6, 1])


def test_minibatches_deal_every_rollout_once():
    """Guards against rollouts lost or trained twice, and an order that each epoch repeats."""
    config = train.Config(minibatches=2, problems_per_iteration=5, micro_batch=2)
    orders = set()
    for epoch in range(6):
        dealt = train.deal_minibatches(FiveProblems, range(5), config, 1, epoch)
        first, second = [rows.tolist() for rows in dealt]
        assert sorted(first + second) == list(range(8))
        problem = FiveProblems.problem.tolist()
        assert not {problem[row] for row in first} & {problem[row] for row in second}
        orders.add(tuple(first))
    assert len(orders) > 1


def test_micro_batches_by_hand():
    """At most so many rows, and the longest at most a quarter longer than the shortest."""
    rows = torch.arange(8)
    parts = train.split_by_length(rows, FiveProblems.length, most=2)
    lengths = [FiveProblems.length[part].tolist() for part in parts]
    assert lengths == [[1], [2], [3], [4, 5], [6, 7], [9]]
    assert train.split_by_length(rows[:0], FiveProblems.length, most=2) == []
