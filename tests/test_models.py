"""Which models are let in: windows, rescaled positions, capped logits, noise, missing weights.

The sweep over all architectures is experiments/model_sweep.py; here it runs on some of them.
"""

import importlib.util
import pathlib
import shutil

import pytest
import torch
import transformers
from conftest import rows
from safetensors.torch import load_file, save_file

import astar_search
import policy
import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("sweep", ROOT / "experiments" / "model_sweep.py")
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)

SMALL = {
    "vocab_size": 24,  # of the tiny base's tokenizer
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.5] * 8,
    "original_max_position_embeddings": 16,
}


def fresh(config_class, **fields):
    """A small model with fresh weights: its logits are near 0."""
    torch.manual_seed(0)
    config = config_class(**{**SMALL, **fields})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def saved(folder, model):
    """A model folder with the tiny base's tokenizer; returns its name."""
    model.save_pretrained(folder)
    for path in (ROOT / "tiny_base").glob("*token*"):
        shutil.copy(path, folder)
    return str(folder)


def refusal(model, **options):
    """The sentence with which check_model refuses a model."""
    with pytest.raises(ValueError) as error:
        astar_search.check_model(model, **options)
    sentence = str(error.value)
    assert model.config.model_type in sentence and "\n" not in sentence
    return sentence


# ---------------------------------------------------------------------------------- Architectures

ACCEPTED = [
    # model type, rescaled positions, longest context that is exact
    ("llama", "yarn", 48),
    ("llama", "longrope", 16),
    ("llama", "dynamic", 16),
    ("mistral", None, 16),
    ("gpt2", None, 48),
    ("gpt_neo", None, 16),
    ("gemma3_text", None, 16),
    ("granite_swa", None, 16),
    ("qwen3_moe", None, 16),
    ("gpt_oss", None, 16),
    ("doge", None, 16),
    ("opt", None, 48),
]
REFUSED = ("mamba", "jamba", "bloom", "bart", "bert", "gemma2", "cohere", "llama4_text", "nanochat")


@pytest.mark.parametrize(("model_type", "rotary", "longest"), ACCEPTED)
def test_a_model_is_exact_in_every_context_that_is_accepted(model_type, rotary, longest):
    """Guards against windows, chunks and rescaled positions that only longer sequences meet.

    gpt_neo also guards against a window that is placed by the end of the padding: it is exact for
    one problem, and wrong for a short one that is batched with a longer one.
    """
    result = sweep.examine(model_type, rotary, contexts=(12, 16, 18, 48))
    assert result["outcome"] == "accepted", result
    assert result["context"] == longest
    if result["beyond"] is not None:
        assert result["beyond"] > 1e-3  # it was refused with reason


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_cannot_serve_is_refused_with_one_sentence(model_type):
    """Guards against recurrence, ALiBi, positions of its own, capped logits: silent nonsense."""
    result = sweep.examine(model_type, contexts=(12,))
    assert result["outcome"] == "refused", result
    assert "\n" not in result["sentence"] and model_type in result["sentence"]


# -------------------------------------------------------------------------- Attention and length


def test_a_window_bounds_the_context():
    """Guards against a window that nothing shorter meets: log pi was off by up to 4 nats."""
    model = fresh(transformers.MistralConfig, sliding_window=16)
    astar_search.check_model(model, longest=16)
    sentence = refusal(model, longest=30 + 48)
    assert "beyond 16 tokens" in sentence and "sliding_window" in sentence and "78" in sentence


def test_a_user_meets_the_window_before_anything_is_written(tmp_path, capsys):
    """Guards against a check that train.py does not ask for the lengths of its run."""
    model = fresh(transformers.MistralConfig, sliding_window=16)
    folder = saved(tmp_path / "mistral", model)
    flags = ["--model", folder, "--output-dir", str(tmp_path / "run"), "--device", "cpu"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train.main(flags)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1
    assert "sliding_window" in message and "must stay within 16" in message
    assert not (tmp_path / "run").exists()


def test_a_window_of_which_the_config_says_nothing_is_found(monkeypatch):
    """Guards against trust in the config's numbers: the last probe is as long as the run."""
    model = fresh(transformers.MistralConfig, sliding_window=16)
    monkeypatch.setattr(astar_search, "config_numbers", lambda config: {64: ["hidden_size"]})
    astar_search.check_model(model, longest=16)
    sentence = refusal(model, longest=60)
    assert "beyond 16 tokens, where" in sentence


def test_positions_that_are_rescaled_bound_the_context():
    """Guards against dynamic NTK and longrope, which move all positions at a length."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = fresh(transformers.LlamaConfig, max_position_embeddings=16, rope_parameters=dynamic)
    astar_search.check_model(model, longest=16)
    assert "max_position_embeddings" in refusal(model, longest=40)
    model = fresh(transformers.LlamaConfig, rope_parameters=LONGROPE)
    astar_search.check_model(model, longest=16)
    assert "original_max_position_embeddings" in refusal(model, longest=40)


def test_numbers_are_found_wherever_a_config_holds_them():
    """Guards against bounds in parts, in lists, or written as floats."""
    config = transformers.LlamaConfig(
        **SMALL, rope_parameters=LONGROPE | {"original_max_position_embeddings": 19.0}
    )
    config.windows = [None, 21]
    keys = astar_search.config_numbers(config)
    assert keys[19] == ["original_max_position_embeddings"] and keys[21] == ["windows"]
    assert "use_cache" not in keys.get(1, [])


def test_the_check_leaves_a_model_as_it_was():
    """Guards against a hook, a mode or rescaled positions that stay behind."""
    model = fresh(transformers.LlamaConfig, rope_parameters=LONGROPE)
    tokens = torch.arange(12)[None]
    before = model(tokens).logits
    refusal(model, longest=60)
    astar_search.check_model(model, longest=16, training=True)
    assert torch.equal(model(tokens).logits, before) and not model.training


# ---------------------------------------------------------------------------------- Output layers


def test_a_cap_on_the_logits_is_seen_in_fresh_weights():
    """Guards against final_logit_softcapping, which changes nothing near 0."""
    fields = {"head_dim": 16, "sliding_window": 64}
    refusal(fresh(transformers.Gemma2Config, final_logit_softcapping=30.0, **fields), longest=40)
    uncapped = fresh(transformers.Gemma2Config, final_logit_softcapping=None, **fields)
    astar_search.check_model(uncapped, longest=40)


def test_a_scale_on_the_logits_is_seen_in_fresh_weights():
    """Guards against logit_scale, which changes almost nothing near 0."""
    refusal(fresh(transformers.CohereConfig, logit_scale=1.002), longest=40)
    astar_search.check_model(fresh(transformers.CohereConfig, logit_scale=1.0), longest=40)


# ------------------------------------------------------------------------------------ Randomness


def phimoe():
    """A mixture of experts whose router is random in training mode."""
    return fresh(transformers.PhimoeConfig, num_local_experts=4, router_jitter_noise=0.3)


def test_the_update_is_as_deterministic_as_the_rollouts(tmp_path):
    """Guards against a router's noise in the update: log pi was .12 nats off before any step."""
    folder = saved(tmp_path / "phimoe", phimoe())
    output = tmp_path / "run"
    flags = f"""
        --model {folder} --output-dir {output} --device cpu --config ppo --iterations 1
        --problems-per-iteration 4 --rollouts-per-problem 2 --eval-problems 2 --max-new-tokens 8
        --max-nodes 64
    """
    train.main(flags.split())
    assert abs(rows(output / "metrics.jsonl")[1]["first_kl"]) < 1e-6


def test_noise_that_gradient_checkpointing_would_bring_is_refused(tmp_path, capsys):
    """Guards against training mode, which transformers' checkpointing needs, on such a model."""
    model = phimoe()
    astar_search.check_model(model, longest=14)
    assert "--gradient-checkpointing" in refusal(model, longest=14, training=True)
    astar_search.check_model(fresh(transformers.LlamaConfig), longest=14, training=True)
    folder = saved(tmp_path / "phimoe", model)
    flags = f"--model {folder} --max-new-tokens 8 --gradient-checkpointing on --device cpu"
    with pytest.raises(SystemExit):
        train.main([*flags.split(), "--output-dir", str(tmp_path / "run")])
    assert "in training mode" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- Weights


def load_with(folder, change):
    """policy.load_policy of the tiny base with its weights {name: tensor} changed."""
    shutil.copytree(ROOT / "tiny_base", folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return policy.load_policy(str(folder))


def without_a_layer(weights):
    return {name: tensor for name, tensor in weights.items() if ".layers.1.mlp" not in name}


def with_prefix(prefix):
    def change(weights):
        return {prefix + name: tensor for name, tensor in weights.items()}

    return change


def with_another(weights):
    return {**weights, "model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}


def with_a_wrong_shape(weights):
    return {**weights, "model.norm.weight": torch.ones(3)}


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (without_a_layer, "lack model.layers.1.mlp.down_proj.weight (and 2 more)"),
        (with_prefix("_orig_mod."), "hold _orig_mod.model.embed_tokens.weight (and 49 more)"),
        (with_prefix("module."), "lack model.embed_tokens.weight (and 49 more)"),
        (with_another, "hold model.layers.9.mlp.up_proj.weight, for which the model has no place"),
        (with_a_wrong_shape, "hold model.norm.weight, of another shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, capfd, change, clause):
    """Guards against training random weights: the run ended well, another one each time."""
    with pytest.raises(ValueError) as error:
        load_with(tmp_path, change)
    sentence = str(error.value)
    assert clause in sentence and "--model" in sentence and "\n" not in sentence
    assert capfd.readouterr().err == ""  # no table of transformers beside the sentence


def test_tied_weights_may_be_missing_or_there(tmp_path):
    """Guards against a check that takes a tied output layer for a missing one."""
    one, _ = load_with(tmp_path / "one", lambda weights: weights)
    assert "lm_head.weight" not in load_file(tmp_path / "one" / "model.safetensors")

    def with_output_layer(weights):
        return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}

    other, _ = load_with(tmp_path / "other", with_output_layer)
    tokens = torch.arange(9)[None]
    assert torch.equal(one(tokens).logits, other(tokens).logits)
