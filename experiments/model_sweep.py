"""Which causal language models of transformers can the search serve, and is it exact on them?

    python experiments/model_sweep.py                       # every architecture, some minutes
    python experiments/model_sweep.py --only mistral gemma2 # some of them

Every config class of AutoModelForCausalLM is built with random weights, tiny: two layers, 60 tokens
of vocabulary.  Attention windows, chunks and rescaled positions are switched on at 16 tokens where
the config has such fields.  Then astar_search.check_model is asked about contexts on both sides of
every switch.  In every context that it accepts, log pi of the search and of policy.score must be
that of model(full sequence), to 1e-4.  This comparison shares nothing with the probes of
check_model, and it is made with other weights, under which attention has more effect.

It prints a line a model and the counts.  The exit status is 1 if a model was accepted and wrong.
"""

import argparse
import pathlib
import sys
import warnings

import torch
import transformers
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import astar_search
import policy

CONTEXTS = (12, 16, 18, 24, 33, 48, 62)  # tokens of prompt and completion; switches are at 16
TOLERANCE = 1e-4  # nats
MOST_PARAMETERS = 20_000_000

# ----------------------------------------------------------------------------------- Small models

# The sizes of a tiny model, by the names that configs have for them.
SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "emb_dim": 64,
    "dim_model": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "input_embedding_size": 64,
    "output_embedding_size": 64,
    "attention_hidden_size": 64,
    "mamba_d_ssm": 64,
    "lru_width": 64,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "dim_ff": 64,
    "dff": 64,
    "n_inner": 64,
    "d_ff": 64,
    "ffn_hidden_size": 64,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "dim_head": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "zero_expert_num": 2,
    "num_expert_groups": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 60,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "is_decoder": True,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# What begins at a length, switched on at 16 tokens.
SWITCHES = {
    "sliding_window": 16,
    "window_size": 16,
    "attention_chunk_size": 16,
    "attention_window_size": 16,
    "local_attention": 16,
    "keep_window_size": 16,
    "index_topk": 16,
    "floor_scale": 16,
    "use_sliding_window": True,
    "max_window_layers": 0,
}
# What an architecture needs besides.
OTHERS = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16},
    "gemma3n": {"num_kv_shared_layers": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "expand": 2},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "index_block_size": 4,
        "index_topk_blocks": 4,
        "dense_intermediate_size": 64,
        "shared_intermediate_size": 64,
    },
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False},
}
MODEL_CONFIGS = {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}
ROTARY = ("yarn", "dynamic", "longrope")  # ways to rescale positions


def config_fields(model_type, default):
    """The fields of a small config, as far as the config class has them; default: its default."""
    fields = {}
    for name, size in {**SIZES, **SWITCHES}.items():
        if (
            name in default.to_dict()
            or name in default.attribute_map
            or hasattr(type(default), name)
        ):
            fields[name] = size
    layer_types = getattr(default, "layer_types", None) or []
    windowed = [kind for kind in layer_types if kind in ("sliding_attention", "chunked_attention")]
    if windowed or (layer_types and "sliding_window" in fields):
        kind = windowed[0] if windowed else "sliding_attention"
        fields["layer_types"] = [kind, "full_attention"]
    fields.update(OTHERS.get(model_type, {}))
    return fields


def rescaled(parameters, rotary):
    """The rope_parameters of a config, or of one kind of its layers, rescaled from 16 tokens on."""
    scaling = {**parameters, "rope_type": rotary, "rope_theta": 10000.0, "factor": 4.0}
    if rotary != "dynamic":
        scaling["original_max_position_embeddings"] = 16
    if rotary == "longrope":
        numbers = int(SIZES["head_dim"] * parameters.get("partial_rotary_factor", 1.0)) // 2
        scaling["short_factor"] = [1.0] * numbers
        scaling["long_factor"] = [2.0] * numbers
    return scaling


def small_config(model_type, rotary=None):
    """A small config of a model type, with its switches on.

    rotary: a name in ROTARY, for rescaled positions.  Raises whatever the config class raises.
    """
    default = MODEL_CONFIGS[model_type]().get_text_config()
    fields = config_fields(model_type, default)
    if rotary:
        parameters = default.rope_parameters
        kinds = {kind: part for kind, part in parameters.items() if isinstance(part, dict)}
        if kinds:  # parameters for each kind of layer
            fields["rope_parameters"] = {
                kind: rescaled(part, rotary) for kind, part in kinds.items()
            }
        else:
            fields["rope_parameters"] = rescaled(parameters, rotary)
        if rotary == "dynamic":
            fields["max_position_embeddings"] = 16  # there its switch is
        if "original_max_position_embeddings" in default.to_dict():
            fields["original_max_position_embeddings"] = 16
    # Some classes do not let these be set; then they follow from others.
    for left_out in ("", "layer_types", "head_dim", "v_head_dim", "head_dim layer_types"):
        kept = {name: fields[name] for name in fields if name not in left_out.split()}
        try:
            return type(default)(**kept)
        except Exception as error:
            failure = error
    raise failure


def small_model(config):
    """A model with fresh random weights, in eval mode.  Raises ValueError if it is not small."""
    with torch.device("meta"):
        outline = transformers.AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters:,} parameters are not small")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def strengthen(model):
    """Draw every matrix anew with a spectral norm of about 2, so that attention has an effect.

    In float64, because rounding would sometimes swap two experts that are almost equally good.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            deviation = parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, deviation, generator=generator)
    model.set_experts_implementation("eager")  # the faster ones know no float64
    model.double()
    try:
        model(torch.arange(4)[None])
    except RuntimeError:  # an architecture that knows no float64
        model.float()


# ----------------------------------------------------------------------------------- The comparison


def refusal(model, context):
    """The sentence with which a context is refused; None if it is accepted."""
    try:
        policy.check_context(model, context - 6, 6)
        astar_search.check_model(model, longest=context)
    except ValueError as error:
        return str(error)
    return None


@torch.no_grad()
def largest_error(model, context):
    """Largest difference of log pi from model(full sequence), in nats, in one context.

    Prompts of three lengths in one batch; greedy and random completions of six tokens; log pi of
    the search and of policy.score.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(context)
    prompts = []
    for length in (2, context // 2, context - 6):
        prompts.append(torch.randint(vocabulary, (length,), generator=generator).tolist())
    keys = astar_search.root_keys(0, context, range(3))
    options = astar_search.Options(eos=(), K=2, max_new_tokens=6)
    error = 0.0
    for greedy in (True, False):
        expander = astar_search.Expander(model, prompts, 6)
        trees = astar_search.sample(keys, expander, options, greedy=greedy)
        rollouts = astar_search.collect(trees, expander)
        scored, _ = policy.score(model, rollouts.tokens, rollouts.mask)
        for row in range(len(rollouts)):
            tokens = rollouts.tokens[row, : rollouts.length[row]]
            logits = model(tokens[None]).logits[0, :-1].float()
            plain = F.log_softmax(logits, dim=-1).gather(1, tokens[1:, None])[:, 0]
            own = rollouts.mask[row, : len(plain)]
            for log_prob in (rollouts.log_probs, scored):
                difference = (log_prob[row, : len(plain)] - plain)[own].abs().max().item()
                error = max(error, difference if difference == difference else float("inf"))
    return error


def examine(model_type, rotary=None, contexts=CONTEXTS):
    """What check_model says about a small model, and whether it is so, as a dict.

    outcome: "not built", "refused", "accepted", or "wrong" if it was accepted and is not exact.
    context: the longest that was accepted.  error: the largest in all accepted ones.  beyond: the
    error in the shortest one that was refused.  sentence: of the first refusal, or why the model
    could not be built.
    """
    name = model_type if rotary is None else f"{model_type} {rotary}"
    result = {"name": name, "context": 0, "error": 0.0, "beyond": None, "sentence": ""}
    try:
        model = small_model(small_config(model_type, rotary))
    except Exception as error:
        lines = str(error).splitlines() or ["no message"]
        return result | {"outcome": "not built", "sentence": f"{type(error).__name__}: {lines[0]}"}
    accepted = []
    refused = []
    for context in contexts:
        sentence = refusal(model, context)
        if sentence is None:
            accepted.append(context)
        else:
            refused.append(context)
            result["sentence"] = result["sentence"] or sentence
            if not accepted:
                break  # it will not do better in longer ones
    one_sentence = "\n" not in result["sentence"]
    if not accepted:
        return result | {"outcome": "refused" if one_sentence else "wrong"}
    strengthen(model)
    result["context"] = max(accepted)
    result["error"] = max(largest_error(model, context) for context in accepted)
    if refused and "does not fit" not in result["sentence"]:
        result["beyond"] = largest_error(model, min(refused))
    in_order = not refused or max(accepted) < min(refused)
    exact = result["error"] < TOLERANCE
    return result | {"outcome": "accepted" if exact and in_order and one_sentence else "wrong"}


# --------------------------------------------------------------------------------------- The report


def format_result(result):
    """A line of the table."""
    outcome = result["outcome"]
    if outcome in ("accepted", "wrong"):
        text = f"{outcome} up to {result['context']:2d} tokens, off by {result['error']:.0e}"
        if result["beyond"] is not None:
            text += f", beyond by {result['beyond']:.0e}"
        if result["sentence"]:
            text += f"; {result['sentence']}"
    else:
        text = f"{outcome}: {result['sentence']}"
    return f"{result['name']:32s} {text}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these model types alone")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    results = []
    for model_type in arguments.only or MODEL_CONFIGS:
        results.append(examine(model_type))
        print(format_result(results[-1]), flush=True)
        if results[-1]["outcome"] not in ("accepted", "wrong"):
            continue
        for rotary in ROTARY:
            if hasattr(MODEL_CONFIGS[model_type]().get_text_config(), "rope_parameters"):
                results.append(examine(model_type, rotary))
                print(format_result(results[-1]), flush=True)
    counts = {}
    for result in results:
        outcome = result["outcome"]
        if outcome == "accepted" and result["context"] < max(CONTEXTS):
            outcome = "accepted up to a bound"
        counts[outcome] = counts.get(outcome, 0) + 1
    built = {r["name"].split()[0] for r in results if r["outcome"] != "not built"}
    print(f"{len(built)} architectures built; models: {counts}")
    sys.exit(1 if counts.get("wrong") else 0)


if __name__ == "__main__":
    main()
