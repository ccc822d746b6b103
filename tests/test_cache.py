"""The KV-cached expander against plain forwards, on several architectures (theorem 7)."""

import pytest
import torch
import transformers
from torch.nn import functional as F

import astar_search
import policy
from astar_search import Expander, Options, check_model, collect, root_keys, sample, search

SMALL = dict(vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, head_dim=8, eos_token_id=1, bos_token_id=None)  # fmt: skip


def tiny(kind):
    """A randomly initialised model of an architecture, with weights large enough to make its choices peaked."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=31, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1
        )
    else:
        config = {
            "qwen2": transformers.Qwen2Config,
            "llama": transformers.LlamaConfig,
            "qwen3": transformers.Qwen3Config,
        }[kind](**SMALL)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4 if kind == "gpt2" else 20)
    return model


ARCHITECTURES = ("qwen2", "llama", "qwen3", "gpt2")
PROMPTS = [[5, 6, 7, 8, 9], [4], [3, 2, 10]]  # ragged
OPTIONS = Options(eos=(1,), K=4, tau=1.0, width=2, max_new_tokens=7)


def run(model, method=search, prompts=PROMPTS, rows=(0, 1, 2), value=None, options=OPTIONS):
    expander = Expander(model, prompts, options.max_new_tokens, value)
    trees = method(root_keys(3, 0, rows), expander, options)
    return trees, expander


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("method", (search, sample))
def test_cached_logits_equal_a_full_forward(kind, method):
    """Theorem 7.  Guards against wrong positions, masks that let padding or cousins in, and stale cache rows."""
    model = tiny(kind)
    trees, expander = run(model, method)
    rollouts = collect(trees, expander)
    assert len(rollouts) >= 6 and len(set(rollouts.length.tolist())) > 1
    for i in range(len(rollouts)):
        row = rollouts.tokens[i, : rollouts.length[i]]
        with torch.no_grad():
            logp = F.log_softmax(model(row[None]).logits[0, :-1], dim=-1).gather(1, row[1:, None])[:, 0]
        own = rollouts.mask[i, : len(row) - 1]
        assert torch.allclose(rollouts.logprobs[i, : len(row) - 1][own], logp[own], atol=2e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_prefix_is_run_twice(kind):
    """Guards against running the whole prefix again for every child: tokens run = prompt tokens + distinct prefixes."""
    seen = []
    model = tiny(kind)
    hook = model.base_model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["input_ids"].shape), with_kwargs=True
    )
    trees, expander = run(model)
    hook.remove()
    decoded = sum(n for n, T in seen if T == 1)
    prompts = sum(map(len, PROMPTS))
    assert sum(expander.spent) == prompts + decoded and expander.forwards == len(seen)
    assert all(T == 1 for _, T in seen[1:])  # after the prompts, one token a node


def test_rollouts_do_not_depend_on_batch_composition_or_width():
    """Theorem 8 on a model, in float64: alone or together, width 1 or 7, the same leaves with the same numbers."""
    model = tiny("qwen2").double()
    together = {row: [(leaf.path(), leaf.weight) for leaf in tree.leaves] for row, tree in enumerate(run(model)[0])}
    for row, prompt in enumerate(PROMPTS):
        for width in (1, 7):
            options = Options(eos=(1,), K=4, tau=1.0, width=width, max_new_tokens=7)
            alone = run(model, prompts=[prompt], rows=[row], options=options)[0][0]
            assert [leaf.path() for leaf in alone.leaves] == [path for path, _ in together[row]]
            assert torch.allclose(
                torch.tensor([leaf.weight for leaf in alone.leaves]), torch.tensor([w for _, w in together[row]])
            )


def test_values_of_a_rollout_belong_to_its_prefixes():
    """Guards against values shifted by one: values[t] is V of the prefix before token t+1."""
    model = tiny("qwen2")
    value = lambda hidden: (hidden.sum(-1), torch.zeros(len(hidden)))
    rollouts = collect(*run(model, value=value))
    with torch.no_grad():
        hidden = model.base_model(rollouts.tokens).last_hidden_state.sum(-1)[:, :-1]
    assert torch.allclose(rollouts.values[rollouts.mask], hidden[rollouts.mask], atol=1e-4)
    assert (rollouts.values[~rollouts.mask] == 0).all()


def test_rollouts_mask_comes_from_lengths():
    """Guards against EOS (here also the padding id) being masked out of the loss."""
    rollouts = collect(*run(tiny("qwen2")), pad=1)
    ended = ~rollouts.truncated
    assert ended.any()
    last = rollouts.length - 2  # grid index of the last token
    rows = torch.arange(len(rollouts))
    assert rollouts.mask[rows, last].all()
    assert (rollouts.tokens[rows, last + 1][ended] == 1).all()
    assert torch.equal(rollouts.mask.sum(1), rollouts.length - rollouts.prompt_length)


def test_children_that_were_not_listed_at_first_need_no_new_forward():
    """A node asked for more children answers from its stored hidden state."""
    model = tiny("qwen2")
    expander = Expander(model, [[5, 6]], 4)
    tree = astar_search.Tree(0, 1, OPTIONS)
    first, _ = expander([tree.root])
    tokens = sum(expander.spent)
    again, _ = expander([tree.root])
    assert torch.equal(first, again) and sum(expander.spent) == tokens


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_supported_architectures_pass_the_check(kind):
    check_model(tiny(kind))


def refused(model):
    with pytest.raises(ValueError) as error:
        check_model(model)
    assert model.config.model_type in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_models_that_cannot_serve_are_refused_by_name():
    """Guards against silent nonsense: windows, recurrence, another mask, an encoder."""
    common = dict(vocab_size=31, hidden_size=32, num_hidden_layers=2)
    window = transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert "sliding" in refused(transformers.AutoModelForCausalLM.from_config(window))
    refused(transformers.MambaForCausalLM(transformers.MambaConfig(**common)))
    refused(transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=31, hidden_size=32, n_layer=2, n_head=4)))
    t5 = transformers.T5Config(vocab_size=31, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    assert "encoder-decoder" in refused(transformers.T5ForConditionalGeneration(t5))


def test_a_scaled_output_layer_is_noticed():
    """Guards against models whose logits are not lm_head(hidden): Cohere multiplies them."""
    small = {**SMALL, "logit_scale": 0.5}
    del small["head_dim"]
    refused(transformers.CohereForCausalLM(transformers.CohereConfig(**small)))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_score_equals_the_rollouts_own_logprobs(kind):
    """Theorem 9 on every architecture: before the first update the ratio is 1."""
    model = tiny(kind)
    rollouts = collect(*run(model))
    logp, _, _ = policy.score(model, rollouts.tokens, rollouts.mask)
    assert torch.allclose(logp, rollouts.logprobs, atol=2e-5)
