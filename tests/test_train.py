"""The training loop as a user meets it: runs, resumes, files, and one clear sentence for every mistake."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
import transformers

import astar_search
import data
import eval as evaluation
import fsdp
import policy
import reward
import train
from conftest import rows, tensors, timeless
from experiments import memory, run_folder

ROOT = pathlib.Path(train.__file__).parent
SMALL = ["--config", "ppo", "--problems-per-iteration", "4", "--rollouts-per-problem", "3", "--eval-problems", "6",
         "--max-new-tokens", "14", "--device", "cpu", "--checkpoint-every", "1", "--samples", "2"]  # fmt: skip


def run(folder, *flags, iterations=2):
    train.main([*SMALL, "--iterations", str(iterations), "--output-dir", str(folder), *flags])
    return rows(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four iterations that tests only read."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, iterations=4)
    return folder


# --------------------------------------------------------------------------------------------------- what a run is


def test_a_run_writes_what_it_promises(finished):
    metrics = rows(finished / "metrics.jsonl")
    assert [row["iteration"] for row in metrics] == [0, 1, 2, 3, 4]
    assert {"eval_accuracy", "eval_format", "eval_accuracy_by_difficulty"} <= set(metrics[0]) & set(metrics[-1])
    promised = (
        "seconds model_tokens reward_mean rollout_accuracy unique_correct leaves truncated completion_length policy_loss \
        value_loss approx_kl clip_fraction entropy explained_variance grad_norm learning_rate"
    )
    for row in metrics[1:]:
        assert set(promised.split()) <= set(row)
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float))
    tokens = [row["model_tokens"] for row in metrics]
    assert tokens == sorted(tokens) and tokens[0] == 0 < tokens[1]
    samples = rows(finished / "samples.jsonl")
    assert len(samples) == 8 and {"prompt", "completion", "reward", "correct", "weight", "f"} <= set(samples[0])
    assert json.loads((finished / "config.json").read_text())["rollouts_per_problem"] == 3
    assert [path.name for path in sorted(finished.glob("checkpoint*"))] == ["checkpoint_iter_3", "checkpoint_iter_4"]
    assert not list(finished.glob(".checkpoint*"))


def test_before_the_first_update_the_ratio_is_one(finished):
    """Theorem 9 in the loop itself: KL of the first minibatch, before any step of that iteration."""
    for row in rows(finished / "metrics.jsonl")[1:]:
        assert abs(row["first_kl"]) < 1e-5


def test_the_same_seed_gives_the_same_run(finished, tmp_path):
    again = run(tmp_path, iterations=4)
    assert timeless(tmp_path) == timeless(finished)
    other = run(tmp_path / "other", "--seed", "1", iterations=1)
    assert other[1]["reward_mean"] != again[1]["reward_mean"]


def test_resume_is_exact(finished, tmp_path, capsys):
    """Theorem 12: 4 iterations == 2, a stop, and 2 more; weights, optimiser, metrics and samples bit for bit."""

    class Stop(Exception):
        pass

    appended = run_folder.append

    def stop_in_the_third(path, lines):
        appended(path, lines)
        if lines[0]["iteration"] == 3 and path.endswith("metrics.jsonl"):
            raise Stop  # as a kill would: the third iteration's metrics are written, its checkpoint is not

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "append", stop_in_the_third)
        with pytest.raises(Stop):
            run(tmp_path, iterations=4)
    run(tmp_path, "--resume", "auto", iterations=4)
    assert "after iteration 2" in capsys.readouterr().out
    assert timeless(tmp_path) == timeless(finished)
    assert (tmp_path / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()
    mine, theirs = tensors(tmp_path / "checkpoint_iter_4"), tensors(finished / "checkpoint_iter_4")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_micro_batches_do_not_change_the_run(finished, tmp_path):
    """Theorem 11 in the loop: the metrics agree to rounding whatever fits into memory."""
    mine = run(tmp_path, "--micro-batch", "2", iterations=2)[1]
    theirs = rows(finished / "metrics.jsonl")[1]
    for key in ("policy_loss", "value_loss", "grad_norm", "approx_kl", "entropy"):
        assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "flags",
    ["--rollout sample", "--loss grpo", "--loss apo", "--loss em", "--loss em --until-right on", "--tau 0", "--width 1", "--width 8", "--leaf-weights off", "--guide head",
     "--cover 1", "--gradient-checkpointing on", "--freeze-blocks 2", "--eval-decode astar", "--prompt tinyzero", "--digits 1-2x2"],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_variants_train(flags, tmp_path):
    """No variant warns or makes a NaN; the weights move."""
    metrics = run(tmp_path, *flags.split())
    assert all(math.isfinite(x) for row in metrics for x in row.values() if isinstance(x, float))
    base, trained = (tensors_of(folder) for folder in (ROOT / "tiny_base", tmp_path / "checkpoint_iter_2"))
    assert any(not torch.equal(base[key], trained[key]) for key in base)


def tensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_frozen_blocks_stay(tmp_path):
    run(tmp_path, "--freeze-blocks", "2")
    base, trained = tensors_of(ROOT / "tiny_base"), tensors_of(tmp_path / "checkpoint_iter_2")
    for key in base:
        frozen = "embed" in key or "layers.0." in key or "layers.1." in key
        assert torch.equal(base[key], trained[key]) == frozen, key


def test_problems_from_files(tmp_path):
    lines = [json.dumps({"prompt": f"{a}*11=", "answer": 11 * a}) for a in range(10, 16)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    metrics = run(
        tmp_path / "run", "--train-file", str(tmp_path / "mine.jsonl"), "--eval-file", str(tmp_path / "mine.jsonl")
    )
    assert metrics[0]["eval_accuracy_by_difficulty"].keys() == {"all"}
    assert all(row["prompt"].endswith("*11=") for row in rows(tmp_path / "run" / "samples.jsonl"))


# --------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_a_hugging_face_folder(finished):
    """Opened in another process with transformers alone, it gives the greedy answers that eval.py counts."""
    folder = finished / "checkpoint_iter_4"
    model, tokenizer = policy.load_policy(str(folder))
    problems = data.eval_problems(8)
    _, found = evaluation.evaluate(
        model, tokenizer, problems, reward.Reward(), fsdp.start(device="cpu"), max_new_tokens=14
    )
    ours = [row["completions"][0]["text"] for row in found]
    code = f"""
import json, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})
tokenizer = transformers.AutoTokenizer.from_pretrained({str(folder)!r})
texts = []
for prompt in {[problem.text for problem in problems]!r}:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=14, do_sample=False)
    texts.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
print(json.dumps(texts))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=finished)
    assert json.loads(out.stdout.splitlines()[-1]) == ours


def test_eval_only(finished, capsys):
    """Also of a run of several ranks, by one.  Guards against a --distributed that nobody can take back."""
    folder = finished / "checkpoint_iter_4"
    path = folder / "trainer_state.json"
    text = path.read_text()
    try:
        path.write_text(text.replace('"distributed": false', '"distributed": true'))
        assert path.read_text() != text
        train.main(f"--eval-only --checkpoint {folder} --eval-problems 6 --max-new-tokens 14".split())
    finally:
        path.write_text(text)
    figure = float(capsys.readouterr().out.split("accuracy")[1].split()[0])
    assert figure == pytest.approx(rows(finished / "metrics.jsonl")[-1]["eval_accuracy"], abs=1e-3)


def test_every_architecture_trains_and_checkpoints(tmp_path):
    """Search, loss and checkpoint on Llama, Qwen3 and GPT-2 (learned absolute positions)."""
    small = dict(vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, max_position_embeddings=64, eos_token_id=1, bos_token_id=None, pad_token_id=0)  # fmt: skip
    configs = {
        "llama": transformers.LlamaConfig(**small),
        "qwen3": transformers.Qwen3Config(**small),
        "gpt2": transformers.GPT2Config(
            vocab_size=24, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1
        ),
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "tiny_base")
    for kind, config in configs.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        metrics = run(tmp_path / f"run_{kind}", "--model", str(tmp_path / kind))
        assert abs(metrics[1]["first_kl"]) < 1e-5
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"run_{kind}" / "checkpoint_iter_2")
        assert saved.config.model_type == kind


# ------------------------------------------------------------------------------------------------ memory, on paper

SHAPES = ROOT / "experiments" / "qwen2.5-3b"


def memory_of(model, *flags, prompt=100, world_size=1, offload=False):
    config, _, _ = train.parse(["--model", str(model), *flags])
    outline = memory.outline(str(model), config.freeze_blocks)
    return memory.memory(config, outline, prompt, 1000.0, world_size, offload)


def test_memory_of_the_3b_model_by_hand():
    """Qwen2.5-3B on four ranks in bf16, worked out with pencil and paper.  Guards against a factor lost: of two, of the
    ranks, of the layers, of keys and values."""
    flags = "--mixed-precision bf16 --rollout-batch 2 --max-new-tokens 50 --max-nodes 700 --micro-batch 3".split()
    need = memory_of(SHAPES, *flags, world_size=4)
    head = 2048 * 2048 + 2048 + 2 * 2048 + 2
    parameters = 3_085_938_688 + head
    assert need["weights"] == 4 * parameters / 4 and need["gradients"] == 4 * parameters / 4
    assert need["moments"] == 8 * parameters / 4
    rows = 1600  # two problems of 100 + 700 tokens; the tables begin with 2 * 200 -> 1024 and double
    assert need["K/V"] == 2048 * 36 * (2 * 2 * 128) * 2 and rows <= 2048
    assert need["host"] == 0
    alone = memory_of(SHAPES, *flags, world_size=4, offload=True)
    assert alone["host"] == 16 * parameters / 4 and need["rollouts"] - alone["rollouts"] == 12 * parameters / 4
    frozen = memory_of(SHAPES, *flags, "--freeze-blocks", "36")
    assert frozen["gradients"] == 4 * (2048 + head)  # the last norm and the value head
    with_base = memory_of(SHAPES, *flags, "--loss", "apo", world_size=4)
    assert with_base["weights"] == 2 * need["weights"] and with_base["gradients"] == need["gradients"]


def test_memory_of_the_cache_is_what_the_search_takes():
    """The tables that a search really makes, with every bound reached."""
    flags = "--rollouts-per-problem 30 --max-nodes 60 --max-new-tokens 20 --cover 1 --width 1 --problems-per-iteration 9".split()
    config, _, _ = train.parse(flags)
    model, tokenizer = policy.load_policy(config.model)
    problems = data.eval_problems(9, "2", "terse")
    prompts = evaluation.encode(tokenizer, problems)
    expander = astar_search.Expander(model, prompts, 20)
    options = astar_search.Options(policy.stop_tokens(model, tokenizer), K=200, max_new_tokens=20, max_nodes=60)
    astar_search.search(astar_search.root_keys(0, 1, range(9)), expander, options)
    tables = sum(table.numel() * table.element_size() for table in expander.cache.tables.values())
    need = memory.memory(config, memory.outline(config.model), len(prompts[0]), 1000.0, 1, False)
    assert tables == need["K/V"]


def test_activations_are_counted_and_not_guessed():
    """A block of one linear map and a GELU keeps its input and the GELU's: 2 * 4 bytes * D a token, and in bf16 half."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(16, 16)

        def forward(self, hidden_states, **kwargs):
            return torch.nn.functional.gelu(self.linear(hidden_states))

    model = memory.outline(str(ROOT / "tiny_base"))
    model.base_model.layers = torch.nn.ModuleList(Block() for _ in range(4)).to("meta")
    model.base_model.embed_tokens = torch.nn.Embedding(24, 16, device="meta")
    model.base_model.norm = torch.nn.Identity()
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert memory.activation_bytes(model, dtype) == 2 * width * 16


def test_the_dry_run_prints_and_refuses(capsys, tmp_path):
    """Of a config alone, without weights or network; every setting that it prints as fitting is let through."""
    flags = ["--config", "training", "--model", str(SHAPES), "--dry-run", "--output-dir", str(tmp_path / "run")]
    train.main(flags)
    out = capsys.readouterr().out
    assert "3,085,938,688 parameters, 36 blocks" in out
    table = [line.split() for line in out.splitlines() if line.split()[1:2] in (["on"], ["off"])]
    assert [(row[0], row[1]) for row in table] == [(n, offload) for offload in ("off", "on") for n in "1248"]
    column = out.splitlines()[-9].split().index("rollouts")
    peak = max(map(float, table[0][column : column + 2]))
    train.main([*flags, "--gpu-memory", str(peak + 0.1)])
    err = refused(capsys, *flags, "--gpu-memory", str(peak - 0.1))
    assert "it fits on 2 ranks" in err and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- what can go wrong


def refused(capsys, *flags):
    """The one sentence on stderr; exit status 2, nothing else said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(list(flags))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("train.py: ") and err.count("\n") == 1 and "Traceback" not in err, (
        err
    )
    return err


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--config nonsense", "nonsense"), ("--nonsense 3", "--nonsense"), ("--rollout beam", "beam"), ("--loss dpo", "dpo"),
        ("--iterations 0", "--iterations"), ("--problems-per-iteration -1", "--problems-per-iteration"), ("--iterations two", "two"),
        ("--learning-rate nan", "--learning-rate"), ("--learning-rate 0", "--learning-rate"), ("--learning-rate inf", "--learning-rate"),
        ("--beta 0", "--beta"), ("--tau 1.5", "--tau"), ("--cover 0", "--cover"), ("--width 0", "--width"), ("--clip -0.1", "--clip"),
        ("--format-bonus 2", "--format-bonus"), ("--length-penalty nan", "--length-penalty"), ("--digits 7", "--digits"),
        ("--rollouts-per-problem 30 --max-nodes 1", "--max-nodes"), ("--rollouts-per-problem 25 --max-new-tokens 1", "--max-new-tokens"),
        ("--minibatches 9 --problems-per-iteration 4", "--minibatches"), ("--max-new-tokens 300", "context"),
        ("--device cuda:99", "cuda:99"), ("--device toaster", "toaster"), ("--freeze-blocks 9", "--freeze-blocks"),
        ("--model /nowhere/at/all", "/nowhere/at/all"), ("--model nothing", "nothing"), ("--eval-problems 1000", "578"),
        ("--eval-only", "--checkpoint"), ("--gpu-memory 80", "--dry-run"), ("--dry-run --gpu-memory 0.01", "--micro-batch"), ("--dry-run --gpu-memory nan", "above 0"),
        ("--dry-run --gpu-memory -1", "above 0"), ("--dry-run --model nothing", "nothing"), ("--dry-run --freeze-blocks 9", "--freeze-blocks"), ("--resume auto --overwrite", "--overwrite"), ("--resume /nowhere", "/nowhere"),
        ("--train-file /nowhere.jsonl", "/nowhere.jsonl"), ("--distributed", "--distributed"), ("--seed -1", "--seed"),
    ],
)  # fmt: skip
def test_bad_flags_are_refused(flags, word, capsys, tmp_path):
    """One sentence that names what is wrong, and no file written."""
    assert word in refused(capsys, "--output-dir", str(tmp_path / "run"), *flags.split())
    assert not (tmp_path / "run").exists()


def test_bad_models_are_refused(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, "--output-dir", str(tmp_path / "run"), "--model", str(tmp_path / "empty"))
    assert "file" in refused(capsys, "--output-dir", str(tmp_path / "run"), "--model", __file__)

    t5 = transformers.T5Config(vocab_size=31, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    assert "causal" in refused(capsys, "--output-dir", str(tmp_path / "run"), "--model", str(tmp_path / "t5"))

    bert = transformers.BertConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    transformers.AutoTokenizer.from_pretrained(ROOT / "tiny_base").save_pretrained(tmp_path / "bert")
    assert "bert" in refused(capsys, "--output-dir", str(tmp_path / "run"), "--model", str(tmp_path / "bert"))

    policy.load_policy(str(ROOT / "tiny_base"))[0].save_pretrained(tmp_path / "bare")
    assert "tokenizer" in refused(capsys, "--output-dir", str(tmp_path / "run"), "--model", str(tmp_path / "bare"))

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    refused(capsys, "--output-dir", str(tmp_path / "run"), "--model", str(tmp_path / "broken"))
    assert not (tmp_path / "run").exists()


def test_a_hub_id_without_network_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # at once, instead of after its retries
    assert "Qwen/Qwen2.5-3B" in refused(capsys, "--output-dir", str(tmp_path / "run"), "--config", "training")


def test_output_folders_in_use_are_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "--output-dir", str(tmp_path / "file"))
    run(tmp_path / "run", iterations=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "--overwrite" in refused(capsys, "--output-dir", str(tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert len(run(tmp_path / "run", "--overwrite", iterations=1)) == 2


def test_bad_checkpoints_are_refused(capsys, tmp_path):
    """Incomplete, damaged, of another size, of another run; the sentence names the file or the flag."""
    folder = tmp_path / "run"
    run(folder, iterations=1)
    checkpoint = folder / "checkpoint_iter_1"
    flags = [*SMALL, "--iterations", "2", "--output-dir", str(folder), "--resume", "auto"]
    assert "--beta" in refused(capsys, *flags, "--beta", "0.3")
    whole = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    weights = bytearray(whole["model.safetensors"])
    weights[-5] ^= 1
    for name, damage in (
        ("value.safetensors", None),
        ("model.safetensors", bytes(weights)),
        ("trainer_state.json", None),
        ("trainer_state.json", b"{"),
    ):
        (checkpoint / name).unlink() if damage is None else (checkpoint / name).write_bytes(damage)
        assert name in refused(capsys, *flags)
        (checkpoint / name).write_bytes(whole[name])
    # a value head of another size, with its checksum set right
    from safetensors.torch import save_file

    import value

    save_file(value.ValueHead(64).state_dict(), checkpoint / "value.safetensors")
    state = json.loads(whole["trainer_state.json"])
    state["files"]["value.safetensors"] = run_folder.fingerprint(checkpoint / "value.safetensors")
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert "another model size" in refused(capsys, *flags)


def test_bad_lines_are_named(capsys, tmp_path):
    good = json.dumps({"prompt": "12*11=", "answer": 132})
    for bad, word in (
        ("{", "line 2"),
        ('{"prompt": "1*1="}', "answer"),
        (json.dumps({"prompt": "1" * 300, "answer": 1}), "context"),
    ):
        (tmp_path / "bad.jsonl").write_text(good + "\n" + bad + "\n")
        assert word in refused(
            capsys, "--train-file", str(tmp_path / "bad.jsonl"), "--output-dir", str(tmp_path / "run")
        )


def test_a_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    """One sentence with the iteration and what was NaN; exit 1."""
    original, calls = policy.ppo_loss, []

    def poisoned(*args, **kwargs):
        calls.append(1)
        loss, metrics = original(*args, **kwargs)
        return (
            (loss * math.nan, {"policy_loss": metrics["policy_loss"] * math.nan}) if len(calls) > 4 else (loss, metrics)
        )

    monkeypatch.setattr(policy, "ppo_loss", poisoned)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, iterations=3)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "iteration 2" in err and "policy_loss is nan" in err and "checkpoint_iter_1" in err
    assert [row["iteration"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1]
    assert all(x.isfinite().all() for x in tensors(tmp_path / "checkpoint_iter_1").values())


def test_ctrl_c_keeps_the_last_finished_iteration(tmp_path, capsys, monkeypatch):
    """In the middle of the second update: the update is finished, its checkpoint written, exit 130."""
    original, calls = policy.ppo_loss, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(policy, "ppo_loss", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--checkpoint-every", "50", iterations=9)
    err = capsys.readouterr().err
    assert stop.value.code == 130 and "after iteration 2" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint_iter_2"]
    assert len(run(tmp_path, "--resume", "auto", iterations=9)) == 10


def test_a_second_ctrl_c_does_not_tear_the_update(tmp_path, monkeypatch):
    """Two signals within one update: the checkpoint is that of the whole update, equal to an undisturbed run's."""
    original, calls = policy.ppo_loss, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) in (5, 6):
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(policy, "ppo_loss", interrupted)
    with pytest.raises(SystemExit):
        run(tmp_path / "torn", iterations=3)
    monkeypatch.undo()
    run(tmp_path / "whole", iterations=3)
    mine, theirs = (tensors(tmp_path / name / "checkpoint_iter_2") for name in ("torn", "whole"))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_no_run_is_mixed_with_another(capsys, tmp_path):
    """A checkpoint of one run is not continued in the folder of another; a model's folder is not taken for a run; what a
    run starts from is not overwritten; going on from an older checkpoint drops the newer ones."""
    run(tmp_path / "a", "--keep-checkpoints", "9", iterations=3)
    run(tmp_path / "b", "--seed", "5", iterations=1)
    older = str(tmp_path / "a" / "checkpoint_iter_1")
    before = (tmp_path / "b" / "metrics.jsonl").read_bytes()
    assert "another run" in refused(capsys, *SMALL, "--output-dir", str(tmp_path / "b"), "--resume", older)
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == before
    for flags in (["--overwrite"], ["--resume", "auto"], []):
        assert "not a run's" in refused(capsys, *SMALL, "--output-dir", older, *flags)
    assert "needs" in refused(capsys, *SMALL, "--output-dir", str(tmp_path / "a"), "--model", older, "--overwrite")
    assert len(run(tmp_path / "a", "--resume", older, "--keep-checkpoints", "9", iterations=2)) == 3
    assert [path.name for path in train_checkpoints(tmp_path / "a")] == ["checkpoint_iter_1", "checkpoint_iter_2"]


def train_checkpoints(folder):
    return [pathlib.Path(path) for path in run_folder.checkpoints(str(folder))]


def test_a_file_is_walked_through_epoch_by_epoch():
    """Guards against an epoch that begins in its middle: iterations count from 1."""
    problems = [data.Problem(f"{i}*1=", i) for i in range(8)]
    config, ranks = train.Config(problems_per_iteration=4), fsdp.start(device="cpu")
    seen = [p.answer for i in (1, 2) for p in train.draw_problems(config, i, ranks, problems)[0]]
    assert sorted(seen) == list(range(8))


def test_a_prompt_without_tokens_is_refused(capsys, tmp_path):
    (tmp_path / "odd.jsonl").write_text(json.dumps({"prompt": "hello", "answer": 4}))
    assert "no tokens" in refused(
        capsys, "--train-file", str(tmp_path / "odd.jsonl"), "--output-dir", str(tmp_path / "run")
    )


# ----------------------------------------------------------------------------------------------------- the pieces


def test_learning_rate_by_hand():
    config = train.Config(iterations=12, warmup=2, final_rate=0.1)
    scale = [train.learning_rate_scale(config, i) for i in range(1, 13)]
    assert scale[:2] == [0.5, 1.0] and scale[-1] == pytest.approx(0.1)
    assert scale[6] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
    assert scale[2:] == sorted(scale[2:], reverse=True)


def test_minibatches_deal_every_rollout_once():
    """Guards against rollouts lost or trained twice in an epoch, and an order that is the same every epoch."""

    class Stub:
        problem = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])
        length = torch.tensor([5, 3, 4, 9, 2, 7, 6, 1])

    config = train.Config(minibatches=2, problems_per_iteration=5, micro_batch=2)
    orders = []
    for epoch in range(6):
        parts = [torch.cat(part) for part in train.minibatches_of(Stub, range(5), config, 1, epoch)]
        assert sorted(torch.cat(parts).tolist()) == list(range(8))
        assert not set(Stub.problem[parts[0]].tolist()) & set(Stub.problem[parts[1]].tolist())
        orders.append(tuple(parts[0].tolist()))
    assert len(set(orders)) > 1


def test_the_product_neither_unpickles_nor_evaluates_text():
    import re

    for path in ROOT.glob("*.py"):
        assert not re.search(r"torch\.load|pickle|(?<![\w.])eval\(|trust_remote_code=True", path.read_text()), path
