"""Scoring, leaf weights and the three losses."""

import math
import pathlib

import pytest
import torch
import transformers
from torch.nn import functional as F

import policy
from astar_search import Options, root_keys, search
from value import soft_target

W = torch.ones(1, 1)


def tiny(vocabulary=37):
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).eval()


def ragged(B=7, T=12, vocabulary=37):
    """tokens (B, T) and a mask with prompts and completions of unequal lengths."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(vocabulary, (B, T), generator=generator)
    t = torch.arange(1, T)
    start = torch.randint(1, 4, (B, 1), generator=generator)
    end = torch.randint(5, T + 1, (B, 1), generator=generator)
    return tokens, (t >= start) & (t < end)


# ------------------------------------------------------------------------------------------------------ scoring


@pytest.mark.parametrize("max_logits", (1, 37, 200, 1 << 24))
def test_score_in_chunks_equals_the_full_computation(max_logits):
    """Values and gradients; guards against chunks that are dropped, shifted or detached."""
    model, (tokens, mask) = tiny(), ragged()
    logp, entropy, hidden = policy.score(model, tokens, mask, max_logits)
    full = F.log_softmax(model(tokens).logits[:, :-1], dim=-1)
    exact = full.gather(2, tokens[:, 1:, None]).squeeze(2)
    assert torch.allclose(logp, exact * mask, atol=1e-5)
    assert torch.allclose(entropy, -(full.exp() * full).sum(-1) * mask, atol=1e-5)
    (logp.sum() + 0.3 * entropy.sum()).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ((exact * mask).sum() - 0.3 * ((full.exp() * full).sum(-1) * mask).sum()).backward()
    for mine, p in zip(ours, model.parameters()):
        assert torch.allclose(mine, p.grad, atol=1e-5)


def test_padding_changes_no_score():
    """Guards against attention to padding, or scores of padding."""
    model, (tokens, mask) = tiny(), ragged()
    longer = torch.cat([tokens, torch.full((len(tokens), 5), 3)], dim=1)
    wide = torch.cat([mask, torch.zeros(len(tokens), 5, dtype=torch.bool)], dim=1)
    logp, _, _ = policy.score(model, tokens, mask)
    again, _, _ = policy.score(model, longer, wide)
    assert torch.allclose(again[:, :11], logp, atol=1e-6) and (again[:, 11:] == 0).all()


def test_micro_batched_gradients_equal_the_full_batch():
    """Theorem 11, one rank: unequal token counts, weights divided by a total counted beforehand.  Guards against a
    mean per micro-batch, which weighs short rollouts too much."""
    model, (tokens, mask) = tiny(), ragged()
    advantages, leaf = torch.randn(7, 11, generator=torch.Generator().manual_seed(3)), torch.rand(7)
    weights = leaf[:, None] * mask / (leaf[:, None] * mask).sum()
    old, _, _ = policy.score(model, tokens, mask)
    old = old.detach() + 0.1

    def gradient(parts):
        model.zero_grad()
        for rows in parts:
            logp, entropy, _ = policy.score(model, tokens[rows], mask[rows])
            policy.ppo_loss(logp, old[rows], advantages[rows], entropy, weights[rows], entropy_coef=0.01)[0].backward()
        return torch.cat([p.grad.view(-1) for p in model.parameters()])

    full = gradient([range(7)])
    for parts in ([[0], [1, 2, 3], [4, 5, 6]], [[i] for i in range(7)]):
        assert torch.allclose(gradient(parts), full, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- ppo


def test_before_the_first_update_nothing_is_clipped():
    """Theorem 9: ratio 1, approx_kl 0, clip fraction 0, loss = -mean advantage."""
    logp = -torch.rand(3, 5)
    advantages, weights = torch.randn(3, 5), torch.full((3, 5), 1 / 15)
    loss, metrics = policy.ppo_loss(logp, logp, advantages, 0 * logp, weights)
    measured = policy.ratio_metrics(logp, logp, 0 * logp, weights)
    assert abs(loss + advantages.mean()) < 1e-6 and metrics["policy_loss"] == loss
    assert measured["approx_kl"] == 0 and measured["clip_fraction"] == 0


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (1.5, 1.0, -1.2, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_the_clipped_side_has_no_gradient(ratio, advantage, loss, gradient):
    """Theorem 10, worked by hand; d loss / d log pi = -ratio A where unclipped.  Guards against max instead of min."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    found, _ = policy.ppo_loss(logp, 0 * W, advantage * W, 0 * W, W, clip=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss) and logp.grad.item() == pytest.approx(gradient)


def test_ratio_metrics_by_hand():
    """Two tokens, ratios 1 and 1.5, weights 1/4 and 3/4."""
    new, weights = torch.tensor([[0.0, math.log(1.5)]]), torch.tensor([[0.25, 0.75]])
    metrics = policy.ratio_metrics(new, torch.zeros(1, 2), torch.tensor([[2.0, 4.0]]), weights)
    assert metrics["approx_kl"].item() == pytest.approx(0.75 * (0.5 - math.log(1.5)))
    assert metrics["clip_fraction"].item() == pytest.approx(0.75)
    assert metrics["entropy"].item() == pytest.approx(3.5)


def test_the_entropy_bonus_is_subtracted_from_the_loss():
    """Guards against a bonus with the wrong sign, which would make the policy sure of itself."""
    entropy = torch.tensor([[2.0]], requires_grad=True)
    policy.ppo_loss(0 * W, 0 * W, 0 * W, entropy, W, entropy_coef=0.1)[0].backward()
    assert entropy.grad.item() == pytest.approx(-0.1)


# --------------------------------------------------------------------------------------------------------- grpo


def test_grpo_advantages_by_hand():
    """Problem 0: r = 1, -1, -1 with weights 1/2, 1/4, 1/4: mean 0, deviation 1.  Problem 1: all alike, hence 0."""
    rewards = torch.tensor([1.0, -1.0, -1.0, 0.5, 0.5])
    weights = torch.tensor([0.5, 0.25, 0.25, 0.5, 0.5])
    found = policy.grpo_advantages(rewards, weights, torch.tensor([0, 0, 0, 1, 1]))
    assert torch.allclose(found, torch.tensor([1.0, -1.0, -1.0, 0.0, 0.0]), atol=1e-5)


def test_em_advantages_ascend_the_soft_value():
    """With every completion as a leaf, weight pi: sum of w A grad log pi is the gradient of log E_pi[exp(r/beta)], scaled by the
    best target; over some of the leaves w A is pi* among them; with none but wrong leaves it is next to nothing.
    Guards against r in the place of exp(r/beta), a Z of another problem, and imitation of wrong leaves where none is right."""
    beta, bounds = 0.5, (-1.0, 1.0)
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([-1.0, 1.0, -0.5, 0.4], dtype=torch.float64)
    logp = torch.log_softmax(logits, 0)
    soft = torch.logsumexp(logp + r / beta, 0)
    (exact,) = torch.autograd.grad(soft, logits, retain_graph=True)
    # exp(r/beta) is its target up to an affine map, whose constant part has no gradient: use a floor far below all rewards
    targets = soft_target(r, -40.0, 1.0, beta)
    w, problem = logp.exp().detach(), torch.zeros(4, dtype=torch.int64)
    A = policy.em_advantages(targets, w, problem)
    (ours,) = torch.autograd.grad((w * A * logp).sum(), logits)
    assert torch.allclose(ours, exact, atol=1e-9)

    # Two problems: of the first, leaves 0 and 1 and 3 were found; of the second, wrong ones alone.
    rows, two = torch.tensor([0, 1, 3, 0, 2]), torch.tensor([0, 0, 0, 1, 1])
    w = policy.normalise_weights(logp.detach().exp()[rows], two)
    weighted = w * policy.em_advantages(soft_target(r[rows], *bounds, beta), w, two)
    posterior = logp.detach().exp()[rows[:3]] * soft_target(r[rows[:3]], *bounds, beta)
    assert torch.allclose(weighted[:3], posterior / posterior.sum())
    assert weighted[3] == 0 and weighted[4] == pytest.approx(soft_target(r[2], *bounds, beta).item())
    assert policy.em_advantages(torch.zeros(2), torch.ones(2) / 2, torch.zeros(2, dtype=torch.int64)).eq(0).all()
    assert len(policy.em_advantages(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64))) == 0


def test_normalised_weights_sum_to_one_in_each_problem():
    found = policy.normalise_weights(torch.tensor([0.2, 0.6, 0.1]), torch.tensor([0, 0, 2]))
    assert torch.allclose(found, torch.tensor([0.25, 0.75, 1.0]))


def test_explained_variance_by_hand():
    returns, weights = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.full((4,), 0.25)
    explained = lambda values, r=returns: policy.explained_variance(policy.variance_sums(values, r, weights))
    assert explained(returns) == pytest.approx(1.0)
    assert explained(torch.zeros(4)) == pytest.approx(0.0)
    assert explained(returns / 2) == pytest.approx(0.75)
    assert explained(returns, torch.ones(4)) is None
    # sums of two halves make the whole: ranks add them up
    halves = [policy.variance_sums(returns[i : i + 2] / 2, returns[i : i + 2], weights[i : i + 2]) for i in (0, 2)]
    assert policy.explained_variance({key: halves[0][key] + halves[1][key] for key in halves[0]}) == pytest.approx(0.75)


# ---------------------------------------------------------------------------------------------------------- apo

PI = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)  # a policy over four completions of one token
R = torch.tensor([-1.0, 1.1, -0.9, 1.0], dtype=torch.float64)


def fit_apo(weights, leaves, beta1, beta2, steps=4000):
    """Minimise the apo loss over a table of logits, on the completions `leaves`."""
    logits = PI.log().clone().requires_grad_()
    best = beta1 * torch.logsumexp(PI.log() + R / beta1, dim=0)  # the exact V*
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(steps):
        logp = torch.log_softmax(logits, dim=0)[leaves]
        one = torch.ones(len(leaves), 1, dtype=torch.float64)
        loss, _ = policy.apo_loss(
            logp[:, None], PI.log()[leaves][:, None], one, R[leaves], best.expand(len(leaves)), beta2, weights
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.softmax(logits.detach(), dim=0), loss.item()


def test_apo_is_minimised_by_the_optimal_policy():
    """Theorem 13: with beta1 = beta2 and the exact V*, from samples of pi (weights pi) as from the leaves of a search
    (each completion once, weights anything): guards against a sign or a beta in the wrong place."""
    beta = 0.7
    optimal = torch.softmax(PI.log() + R / beta, dim=0)
    every = torch.arange(4)
    table = lambda nodes: (PI.log().expand(len(nodes), 4), torch.zeros(len(nodes), 1))
    tree = search(root_keys(0, 0, [0]), table, Options(eos=(0, 1, 2, 3), K=4, max_new_tokens=1))[0]
    leaves = torch.tensor([leaf.token for leaf in tree.leaves])
    for weights, rows in ((PI, every), (torch.full((4,), 0.25, dtype=torch.float64), leaves)):
        found, loss = fit_apo(weights, rows, beta, beta)
        assert torch.allclose(found, optimal, atol=2e-3) and loss < 1e-6


def test_apo_with_two_betas_depends_on_the_sampler():
    """The other half of theorem 13: with beta1 != beta2 the residual cannot vanish, and the sampler matters."""
    every = torch.arange(4)
    from_samples, loss = fit_apo(PI, every, 0.7, 0.3)
    from_leaves, _ = fit_apo(torch.full((4,), 0.25, dtype=torch.float64), every, 0.7, 0.3)
    assert loss > 1e-3 and (from_samples - from_leaves).abs().max() > 0.01


def test_optimal_value_by_hand():
    """V* = beta log mean exp(r/beta): between the mean and the best, and the mean of equal rewards is itself."""
    rewards = torch.tensor([1.0, -1.0])
    assert policy.optimal_value(rewards, 1.0).item() == pytest.approx(math.log((math.e + 1 / math.e) / 2))
    assert policy.optimal_value(torch.tensor([0.3, 0.3]), 0.1).item() == pytest.approx(0.3)
    assert policy.optimal_value(rewards, 100.0).item() == pytest.approx(0.0, abs=1e-2)


# ------------------------------------------------------------------------------------------------------ loading


def test_dropout_is_off(tmp_path):
    """Guards against a ratio that is noise before the first update: GPT-2 has dropout in its config."""
    config = transformers.GPT2Config(
        vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    source = pathlib.Path(policy.__file__).parent / "tiny_base"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    model, _ = policy.load_policy(str(tmp_path))
    model.train()
    tokens = torch.randint(24, (2, 8))
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_freezing_and_checkpointing(tmp_path):
    """--freeze-blocks 2 leaves embeddings and two blocks without gradient; checkpointing changes no gradient."""
    folder = str(pathlib.Path(policy.__file__).parent / "tiny_base")
    model, _ = policy.load_policy(folder, freeze_blocks=2)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert any(name.startswith("model.layers.1.") for name in frozen) and not any(
        "layers.2." in name for name in frozen
    )
    tokens, mask = ragged(vocabulary=24)
    gradients = []
    for checkpointing in (False, True):
        model, _ = policy.load_policy(folder, gradient_checkpointing=checkpointing)
        model.train()
        policy.score(model, tokens, mask)[0].sum().backward()
        gradients.append(torch.cat([p.grad.view(-1) for p in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="has only 4 blocks"):
        policy.load_policy(folder, freeze_blocks=5)
