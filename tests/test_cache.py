"""The KV-cached expander against plain forwards, on several architectures (theorem 7)."""

import pytest
import torch
import transformers
from torch.nn import functional as F

import astar_search
import policy
from astar_search import Expander, Options, check_model, collect, root_keys, sample, search

SMALL = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "eos_token_id": 1,
    "bos_token_id": None,
}
ARCHITECTURES = ("qwen2", "llama", "qwen3", "gpt2")
EOS = 1
PROMPTS = [[5, 6, 7, 8, 9], [4], [3, 2, 10]]  # of unequal length
OPTIONS = Options(eos=(EOS,), K=4, tau=1.0, width=2, max_new_tokens=7)

# ------------------------------------------------------------------------------ Models and searches


def small_config(kind):
    """The config of a small model of an architecture."""
    if kind == "qwen2":
        return transformers.Qwen2Config(**SMALL)
    if kind == "llama":
        return transformers.LlamaConfig(**SMALL)
    if kind == "qwen3":
        return transformers.Qwen3Config(**SMALL)
    return transformers.GPT2Config(
        vocab_size=31,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        eos_token_id=1,
        bos_token_id=1,
    )


def small_model(kind):
    """A randomly initialised model, whose output weights are enlarged to make pi peaked."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(small_config(kind)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4 if kind == "gpt2" else 20)
    return model


def run(
    model, method=search, prompts=PROMPTS, rows=(0, 1, 2), value_function=None, options=OPTIONS
):
    """(trees, expander) of a search or of sampling; rows: global numbers of the problems."""
    expander = Expander(model, prompts, options.max_new_tokens, value_function)
    trees = method(root_keys(3, 0, rows), expander, options)
    return trees, expander


# ------------------------------------------------------------------------------ Cache and positions


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("method", (search, sample))
def test_cached_logits_equal_a_full_forward(kind, method):
    """Theorem 7.

    Guards against wrong positions, masks that let padding or other branches in, and stale rows.
    """
    model = small_model(kind)
    trees, expander = run(model, method)
    rollouts = collect(trees, expander)
    assert len(rollouts) >= 6
    assert len(set(rollouts.length.tolist())) > 1
    for i in range(len(rollouts)):
        tokens = rollouts.tokens[i, : rollouts.length[i]]
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1]
        plain = F.log_softmax(logits, dim=-1).gather(1, tokens[1:, None])[:, 0]
        cached = rollouts.log_probs[i, : len(tokens) - 1]
        mask = rollouts.mask[i, : len(tokens) - 1]
        assert torch.allclose(cached[mask], plain[mask], atol=2e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_prefix_is_run_twice(kind):
    """Model tokens = prompt tokens + distinct prefixes.

    Guards against running the whole prefix again for every child.
    """
    shapes = []

    def record_shape(module, args, kwargs):
        shapes.append(kwargs["input_ids"].shape)

    model = small_model(kind)
    hook = model.base_model.register_forward_pre_hook(record_shape, with_kwargs=True)
    _, expander = run(model)
    hook.remove()
    prompt_tokens = sum(len(prompt) for prompt in PROMPTS)
    prefixes = sum(n for n, T in shapes if T == 1)
    assert sum(expander.spent) == prompt_tokens + prefixes
    assert expander.forwards == len(shapes)
    assert all(T == 1 for _, T in shapes[1:])  # after the prompts, one token a node


TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])


@pytest.mark.skipif(TRANSFORMERS < (5, 23), reason="an older transformers repeats K and V: slower")
@pytest.mark.parametrize("kind", ("qwen2", "llama", "qwen3"))
def test_query_heads_that_share_keys_attend_to_one_copy_of_them(kind, monkeypatch):
    """Four query heads on two of K and V: as two queries each of the two, for single tokens.

    Guards against a transformers that repeats K and V for every query head: a GPU would move
    them several times each round.
    """
    shapes = []
    attention = F.scaled_dot_product_attention

    def record_shapes(query, key, value, **options):
        shapes.append((query.shape[1:3], key.shape[1]))
        return attention(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record_shapes)
    run(small_model(kind))
    assert set(shapes[2:]) == {((2, 2), 2)}  # after the prompts' two layers


def test_rollouts_do_not_depend_on_batch_composition_or_width():
    """Theorem 8 on a model, in float64.

    Alone or together, at width 1 or 7: the same leaves with the same numbers.
    """
    model = small_model("qwen2").double()
    together, _ = run(model)
    for row, prompt in enumerate(PROMPTS):
        expected = together[row].leaves
        for width in (1, 7):
            options = Options(eos=(EOS,), K=4, tau=1.0, width=width, max_new_tokens=7)
            (tree,), _ = run(model, prompts=[prompt], rows=[row], options=options)
            assert [leaf.tokens() for leaf in tree.leaves] == [leaf.tokens() for leaf in expected]
            weights = torch.tensor([leaf.weight for leaf in tree.leaves])
            assert torch.allclose(weights, torch.tensor([leaf.weight for leaf in expected]))


def test_children_that_were_not_listed_at_first_need_no_new_forward():
    """A node that is asked for more children answers from its stored hidden state."""
    model = small_model("qwen2")
    expander = Expander(model, [[5, 6]], 4)
    tree = astar_search.Tree(0, 1, OPTIONS)
    first, _ = expander([tree.root])
    tokens = sum(expander.spent)
    again, _ = expander([tree.root])
    assert torch.equal(first, again)
    assert sum(expander.spent) == tokens


# ----------------------------------------------------------------------------------------- Rollouts


def sum_as_value(hidden):
    """A value function: V is the sum of the hidden state, h is 0."""
    return hidden.sum(dim=-1), torch.zeros(len(hidden))


def test_values_of_a_rollout_belong_to_its_prefixes():
    """Guards against values shifted by one: values[t] is V of the prefix before token t+1."""
    model = small_model("qwen2")
    trees, expander = run(model, value_function=sum_as_value)
    rollouts = collect(trees, expander)
    with torch.no_grad():
        hidden = model.base_model(rollouts.tokens).last_hidden_state
    values = hidden[:, :-1].sum(dim=-1)
    assert torch.allclose(rollouts.values[rollouts.mask], values[rollouts.mask], atol=1e-4)
    assert (rollouts.values[~rollouts.mask] == 0).all()


def test_rollouts_mask_comes_from_lengths():
    """Guards against EOS, which is the padding id here too, being masked out of the loss."""
    trees, expander = run(small_model("qwen2"))
    rollouts = collect(trees, expander, pad=EOS)
    ended = ~rollouts.truncated
    assert ended.any()
    rows = torch.arange(len(rollouts))
    last = rollouts.length - 2  # index in the grid (B, T-1) of the last token
    assert rollouts.mask[rows, last].all()
    assert (rollouts.tokens[rows, last + 1][ended] == EOS).all()
    assert torch.equal(rollouts.mask.sum(dim=1), rollouts.length - rollouts.prompt_length)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_score_equals_the_rollouts_own_log_probs(kind):
    """Theorem 9 on every architecture: before the first update the ratio is 1."""
    model = small_model(kind)
    trees, expander = run(model)
    rollouts = collect(trees, expander)
    log_prob, _ = policy.score(model, rollouts.tokens, rollouts.mask)
    assert torch.allclose(log_prob, rollouts.log_probs, atol=2e-5)


# ------------------------------------------------------------------------- Models that cannot serve


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_supported_architectures_pass_the_check(kind):
    check_model(small_model(kind))


def refusal(model):
    """The sentence with which check_model refuses a model; it is one line and names the type."""
    with pytest.raises(ValueError) as error:
        check_model(model.eval())
    sentence = str(error.value)
    assert model.config.model_type in sentence
    assert "\n" not in sentence
    return sentence


def test_models_that_cannot_serve_are_refused_by_name():
    """Guards against results that look right: windows, recurrence, another mask, an encoder."""
    window = transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=0
    )
    assert "sliding" in refusal(transformers.AutoModelForCausalLM.from_config(window))

    mamba = transformers.MambaConfig(vocab_size=31, hidden_size=32, num_hidden_layers=2)
    refusal(transformers.MambaForCausalLM(mamba))

    bloom = transformers.BloomConfig(vocab_size=31, hidden_size=32, n_layer=2, n_head=4)
    refusal(transformers.BloomForCausalLM(bloom))

    t5 = transformers.T5Config(
        vocab_size=31, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    assert "encoder-decoder" in refusal(transformers.T5ForConditionalGeneration(t5))


def test_a_scaled_output_layer_is_noticed():
    """Guards against models whose logits are not lm_head(hidden): Cohere multiplies them."""
    settings = SMALL | {"logit_scale": 0.5}
    del settings["head_dim"]
    refusal(transformers.CohereForCausalLM(transformers.CohereConfig(**settings)))
