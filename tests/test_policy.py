"""policy.py: loading, scoring, leaf weights, advantages and the losses."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

import policy
from astar_search import Options, root_keys, search
from value import soft_target

ROOT = Path(policy.__file__).resolve().parent
ONE = torch.ones(1, 1)
ZERO = torch.zeros(1, 1)


def tiny_model(vocabulary=37):
    """A random Qwen2 of two blocks, in evaluation mode."""
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.Qwen2ForCausalLM(config).eval()


def ragged_batch(B=7, T=12, vocabulary=37):
    """tokens (B, T) and a mask (B, T-1) with prompts and completions of unequal lengths."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(vocabulary, (B, T), generator=generator)
    t = torch.arange(1, T)
    start = torch.randint(1, 4, (B, 1), generator=generator)
    end = torch.randint(5, T + 1, (B, 1), generator=generator)
    return tokens, (t >= start) & (t < end)


def copied_gradients(model):
    """A copy of the gradient of each parameter."""
    return [parameter.grad.clone() for parameter in model.parameters()]


def flat_gradient(model):
    """The gradients of all parameters as one vector."""
    return torch.cat([parameter.grad.view(-1) for parameter in model.parameters()])


# ------------------------------------------------------------------------------------------ Scoring


@pytest.mark.parametrize("max_logits", (1, 37, 200, 1 << 24))
def test_score_in_chunks_equals_the_full_computation(max_logits):
    """Values and gradients; guards against chunks that are dropped, shifted or detached."""
    model = tiny_model()
    tokens, mask = ragged_batch()
    log_prob, entropy = policy.score(model, tokens, mask, max_logits)
    full = F.log_softmax(model(tokens).logits[:, :-1], dim=-1)  # (B, T-1, V)
    full_log_prob = full.gather(2, tokens[:, 1:, None]).squeeze(2) * mask
    full_entropy = -(full.exp() * full).sum(-1) * mask
    assert torch.allclose(log_prob, full_log_prob, atol=1e-5)
    assert torch.allclose(entropy, full_entropy, atol=1e-5)

    (log_prob.sum() + 0.3 * entropy.sum()).backward()
    gradients = copied_gradients(model)
    model.zero_grad()
    (full_log_prob.sum() + 0.3 * full_entropy.sum()).backward()
    full_gradients = copied_gradients(model)
    for gradient, full_gradient in zip(gradients, full_gradients):
        assert torch.allclose(gradient, full_gradient, atol=1e-5)


def output_layers(dtype, bias=False):
    """(policy.OutputLayer, torch.nn.Linear of the same weight, hidden states): logits up to 100."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 4096, bias, dtype=dtype)
    layer = policy.OutputLayer(64, 4096, bias, dtype=dtype)
    layer.load_state_dict(plain.state_dict())
    hidden = 40 * torch.randn(2, 3, 64).to(dtype)
    return layer, plain, hidden


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_the_output_layer_of_full_precision_is_torchs_own(dtype):
    """Bit for bit."""
    layer, plain, hidden = output_layers(dtype, bias=True)
    assert torch.equal(layer(hidden), plain(hidden))
    assert layer(hidden).dtype == dtype


@pytest.mark.parametrize("bias", (False, True))
def test_bfloat16_logits_are_not_rounded(bias):
    """Guards against ties of likely tokens: between 16 and 32 bfloat16 has 128 numbers in all."""
    layer, plain, hidden = output_layers(torch.bfloat16, bias)
    with torch.no_grad():
        exact = F.linear(hidden.double(), plain.weight.double())
        if bias:
            exact += plain.bias.double()
        logits = layer(hidden)
        rounded = plain(hidden).float()
    assert logits.dtype == torch.float32 and logits.shape == (2, 3, 4096)
    assert (logits - exact).abs().max() < 1e-4
    assert (rounded - exact).abs().max() > 0.05
    for row, rounded_row in zip(logits.view(6, -1), rounded.view(6, -1)):
        best = row.topk(100).values
        assert len(best.unique()) == 100
        assert len(rounded_row.topk(100).values.unique()) < 80


@pytest.mark.parametrize("frozen", (False, True))
def test_gradients_of_bfloat16_logits(frozen):
    """Those of torch's own layer, up to the rounding of its logits; none for a frozen weight."""
    layer, plain, hidden = output_layers(torch.bfloat16)
    gradients = []
    for module in (layer, plain):
        module.weight.requires_grad_(not frozen)
        x = hidden.clone().requires_grad_()
        module(x / 10).float().logsumexp(dim=-1).sum().backward()
        gradients.append((x.grad, module.weight.grad))
    (x_grad, weight_grad), (expected_x_grad, expected_weight_grad) = gradients
    assert x_grad.dtype == torch.bfloat16
    assert (x_grad - expected_x_grad).norm() < 0.02 * expected_x_grad.norm()
    if frozen:
        assert weight_grad is None
    else:
        assert (weight_grad - expected_weight_grad).norm() < 0.02 * expected_weight_grad.norm()


def test_children_of_a_loaded_bfloat16_model_do_not_tie():
    """The layer is there, its weight is the embeddings' own, and the search's log pi is update's.

    Guards against log pi in steps of 1/16 and 1/8.
    """
    model, _ = policy.load_policy(str(ROOT / "tiny_base"), dtype=torch.bfloat16)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():  # as peaked as pi of a large model: logits up to 100
        model.model.norm.weight.mul_(8)
    tokens, mask = ragged_batch(vocabulary=24)
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    assert len(logits[0, -1].unique()) == 24
    log_prob, _ = policy.score(model, tokens, mask)
    expected = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    assert torch.allclose(log_prob[mask], expected[mask], atol=1e-5)


def test_padding_changes_no_score():
    """Guards against attention to padding, or scores of padding."""
    model = tiny_model()
    tokens, mask = ragged_batch()
    padding = torch.full((len(tokens), 5), 3)
    off = torch.zeros(len(tokens), 5, dtype=torch.bool)
    log_prob, _ = policy.score(model, tokens, mask)
    padded, _ = policy.score(
        model, torch.cat([tokens, padding], dim=1), torch.cat([mask, off], dim=1)
    )
    assert torch.allclose(padded[:, :11], log_prob, atol=1e-6)
    assert (padded[:, 11:] == 0).all()


def test_micro_batched_gradients_equal_the_full_batch():
    """Theorem 11, one rank: unequal token counts, weights divided by a total counted beforehand.

    Guards against a mean per micro-batch, which weighs short rollouts too much.
    """
    model = tiny_model()
    tokens, mask = ragged_batch()
    advantages = torch.randn(7, 11, generator=torch.Generator().manual_seed(3))
    leaf_weights = torch.rand(7)
    token_weights = leaf_weights[:, None] * mask
    token_weights = token_weights / token_weights.sum()
    old_log_prob, _ = policy.score(model, tokens, mask)
    old_log_prob = old_log_prob.detach() + 0.1

    def gradient(micro_batches):
        model.zero_grad()
        for rows in micro_batches:
            log_prob, entropy = policy.score(model, tokens[rows], mask[rows])
            loss, _ = policy.ppo_loss(
                log_prob=log_prob,
                old_log_prob=old_log_prob[rows],
                advantages=advantages[rows],
                entropy=entropy,
                token_weights=token_weights[rows],
                entropy_coef=0.01,
            )
            loss.backward()
        return flat_gradient(model)

    full = gradient([range(7)])
    for micro_batches in ([[0], [1, 2, 3], [4, 5, 6]], [[i] for i in range(7)]):
        assert torch.allclose(gradient(micro_batches), full, atol=1e-6)


# ---------------------------------------------------------------------------------------------- PPO


def test_before_the_first_update_nothing_is_clipped():
    """Theorem 9: ratio 1, approx_kl 0, clip fraction 0, loss = -mean advantage."""
    log_prob = -torch.rand(3, 5)
    entropy = torch.zeros(3, 5)
    advantages = torch.randn(3, 5)
    token_weights = torch.full((3, 5), 1 / 15)
    loss, metrics = policy.ppo_loss(log_prob, log_prob, advantages, entropy, token_weights)
    moved = policy.ratio_metrics(log_prob, log_prob, entropy, token_weights)
    assert abs(loss + advantages.mean()) < 1e-6
    assert metrics["policy_loss"] == loss
    assert moved["approx_kl"] == 0
    assert moved["clip_fraction"] == 0


@pytest.mark.parametrize(
    "ratio, advantage, expected_loss, expected_gradient",
    [
        (1.5, 1.0, -1.2, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_the_clipped_side_has_no_gradient(ratio, advantage, expected_loss, expected_gradient):
    """Theorem 10, worked by hand; d loss / d log pi = -ratio A where unclipped.

    Guards against max instead of min.
    """
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, _ = policy.ppo_loss(
        log_prob=log_prob,
        old_log_prob=ZERO,
        advantages=advantage * ONE,
        entropy=ZERO,
        token_weights=ONE,
        clip=0.2,
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss)
    assert log_prob.grad.item() == pytest.approx(expected_gradient)


def test_ratio_metrics_by_hand():
    """Two tokens, ratios 1 and 1.5, weights 1/4 and 3/4."""
    metrics = policy.ratio_metrics(
        log_prob=torch.tensor([[0.0, math.log(1.5)]]),
        old_log_prob=torch.zeros(1, 2),
        entropy=torch.tensor([[2.0, 4.0]]),
        token_weights=torch.tensor([[0.25, 0.75]]),
    )
    assert metrics["approx_kl"].item() == pytest.approx(0.75 * (0.5 - math.log(1.5)))
    assert metrics["clip_fraction"].item() == pytest.approx(0.75)
    assert metrics["entropy"].item() == pytest.approx(3.5)


def test_the_entropy_bonus_is_subtracted_from_the_loss():
    """Guards against a bonus with the wrong sign, which would make the policy sure of itself."""
    entropy = torch.tensor([[2.0]], requires_grad=True)
    loss, _ = policy.ppo_loss(
        log_prob=ZERO,
        old_log_prob=ZERO,
        advantages=ZERO,
        entropy=entropy,
        token_weights=ONE,
        entropy_coef=0.1,
    )
    loss.backward()
    assert entropy.grad.item() == pytest.approx(-0.1)


# --------------------------------------------------------------------------------------- Advantages


def test_grpo_advantages_by_hand():
    """Problem 0: r = 1, -1, -1 with weights 1/2, 1/4, 1/4: mean 0, deviation 1.

    Problem 1: all alike, hence 0.
    """
    rewards = torch.tensor([1.0, -1.0, -1.0, 0.5, 0.5])
    weights = torch.tensor([0.5, 0.25, 0.25, 0.5, 0.5])
    problem = torch.tensor([0, 0, 0, 1, 1])
    advantages = policy.grpo_advantages(rewards, weights, problem)
    assert torch.allclose(advantages, torch.tensor([1.0, -1.0, -1.0, 0.0, 0.0]), atol=1e-5)


# A policy over four completions of one token, and their rewards, for em_advantages.
EM_LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
EM_REWARDS = torch.tensor([-1.0, 1.0, -0.5, 0.4], dtype=torch.float64)
EM_BETA = 0.5


def test_em_advantages_ascend_the_soft_value():
    """With every completion as a right leaf of weight pi, sum w A grad log pi is a known gradient.

    It is that of log E_pi[exp(r/beta)], scaled by the best target.  Guards against r in the place
    of exp(r/beta).
    """
    logits = EM_LOGITS.clone().requires_grad_()
    log_pi = torch.log_softmax(logits, 0)
    soft = torch.logsumexp(log_pi + EM_REWARDS / EM_BETA, 0)
    (exact,) = torch.autograd.grad(soft, logits, retain_graph=True)

    # exp(r/beta) is the target up to an affine map, whose constant part has no gradient.
    # A floor far below all rewards makes that part negligible.
    targets = soft_target(EM_REWARDS, -40.0, 1.0, EM_BETA)
    weight = log_pi.exp().detach()
    problem = torch.zeros(4, dtype=torch.int64)
    all_right = torch.ones(4, dtype=torch.bool)
    advantages = policy.em_advantages(targets, weight, problem, correct=all_right)
    (gradient,) = torch.autograd.grad((weight * advantages * log_pi).sum(), logits)
    assert torch.allclose(gradient, exact, atol=1e-9)


@pytest.mark.parametrize("beta", [EM_BETA, 100.0])
def test_em_advantages_of_some_leaves(beta):
    """Over the right leaves w A is pi* among them, times the best target; a wrong leaf has nothing.

    Guards against a Z of another problem, and against imitation of wrong leaves for what their form
    has earned: 37 of 102 leaves of an iteration taught so.  Also at a beta at which wrong leaves
    have targets like right ones.
    """
    pi = torch.log_softmax(EM_LOGITS, 0).exp()
    # Two problems: of the first, leaves 0 and 1 and 3 were found; of the second, only wrong ones.
    rows = torch.tensor([0, 1, 3, 0, 2])
    problem = torch.tensor([0, 0, 0, 1, 1])
    targets = soft_target(EM_REWARDS, -1.0, 1.0, beta)
    assert (targets[2] > 0.2) == (beta == 100.0)
    weight = policy.normalise_weights(pi[rows], problem)
    correct = torch.tensor([False, True, True, False, False])  # of rewards 1 and .4
    weighted = weight * policy.em_advantages(targets[rows], weight, problem, correct)
    posterior = pi[rows[1:3]] * targets[rows[1:3]]
    assert torch.allclose(weighted[1:3], targets[1] * posterior / posterior.sum())
    assert weighted[[0, 3, 4]].eq(0).all()


def test_em_advantages_without_a_target_or_without_leaves():
    """Guards against 0/0 where every target is 0, and against an error on an empty batch."""
    one_problem = torch.zeros(2, dtype=torch.int64)
    right = torch.ones(2, dtype=torch.bool)
    advantages = policy.em_advantages(torch.zeros(2), torch.ones(2) / 2, one_problem, right)
    assert advantages.eq(0).all()
    no_problem = torch.zeros(0, dtype=torch.int64)
    nothing = policy.em_advantages(torch.zeros(0), torch.zeros(0), no_problem, right[:0])
    assert len(nothing) == 0


def test_optimal_value_by_hand():
    """V* = beta log mean exp(r/beta) lies between mean and best; equal rewards give themselves."""
    rewards = torch.tensor([1.0, -1.0])
    by_hand = math.log((math.e + 1 / math.e) / 2)
    assert policy.optimal_value(rewards, 1.0).item() == pytest.approx(by_hand)
    assert policy.optimal_value(torch.tensor([0.3, 0.3]), 0.1).item() == pytest.approx(0.3)
    assert policy.optimal_value(rewards, 100.0).item() == pytest.approx(0.0, abs=1e-2)


# ---------------------------------------------------------------- Leaf weights and the critic's fit


def test_normalised_weights_sum_to_one_in_each_problem():
    """Guards against a sum over the whole batch; problem 1 has no leaf."""
    weights = policy.normalise_weights(torch.tensor([0.2, 0.6, 0.1]), torch.tensor([0, 0, 2]))
    assert torch.allclose(weights, torch.tensor([0.25, 0.75, 1.0]))


def test_explained_variance_by_hand():
    """1 for a perfect critic, 0 for the mean, 3/4 for half of the return, None without variance."""
    returns = torch.tensor([1.0, -1.0, 1.0, -1.0])
    weights = torch.full((4,), 0.25)
    for values, expected in ((returns, 1.0), (torch.zeros(4), 0.0), (returns / 2, 0.75)):
        sums = policy.variance_sums(values, returns, weights)
        assert policy.explained_variance(sums) == pytest.approx(expected)
    same_returns = torch.ones(4)
    sums = policy.variance_sums(returns, same_returns, weights)
    assert policy.explained_variance(sums) is None


def test_the_sums_of_explained_variance_add_up_over_ranks():
    """The sums of two halves, added, are those of the whole."""
    returns = torch.tensor([1.0, -1.0, 1.0, -1.0])
    weights = torch.full((4,), 0.25)
    first = policy.variance_sums(returns[:2] / 2, returns[:2], weights[:2])
    second = policy.variance_sums(returns[2:] / 2, returns[2:], weights[2:])
    total = {name: first[name] + second[name] for name in first}
    assert policy.explained_variance(total) == pytest.approx(0.75)


# ---------------------------------------------------------------------------------------------- apo

# a policy over four completions of one token, and their rewards
PI = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
R = torch.tensor([-1.0, 1.1, -0.9, 1.0], dtype=torch.float64)


def fit_apo(leaf_weights, leaves, beta1, beta2, steps=4000):
    """Minimise the apo loss over a table of logits, on the completions `leaves`.

    Returns the fitted policy (4,) and the last loss.
    """
    logits = PI.log().clone().requires_grad_()
    V = beta1 * torch.logsumexp(PI.log() + R / beta1, dim=0)  # the exact V*
    ref_log_prob = PI.log()[leaves][:, None]
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(steps):
        log_prob = torch.log_softmax(logits, dim=0)[leaves][:, None]
        loss, _ = policy.apo_loss(
            log_prob=log_prob,
            ref_log_prob=ref_log_prob,
            mask=torch.ones(len(leaves), 1, dtype=torch.float64),
            rewards=R[leaves],
            optimal_values=V.expand(len(leaves)),
            beta2=beta2,
            leaf_weights=leaf_weights,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.softmax(logits.detach(), dim=0), loss.item()


def test_apo_is_minimised_by_the_optimal_policy():
    """Theorem 13, with beta1 = beta2 and the exact V*: the optimum is pi* for either sampler.

    The samplers are pi (weights pi) and a search (each completion once, weights equal).  Guards
    against a sign or a beta in the wrong place.
    """
    beta = 0.7
    optimal = torch.softmax(PI.log() + R / beta, dim=0)
    from_samples, loss = fit_apo(PI, torch.arange(4), beta, beta)
    assert torch.allclose(from_samples, optimal, atol=2e-3)
    assert loss < 1e-6

    def expand(nodes):
        return PI.log().expand(len(nodes), 4), torch.zeros(len(nodes), 1)

    options = Options(eos=(0, 1, 2, 3), K=4, max_new_tokens=1)
    (tree,) = search(root_keys(0, 0, [0]), expand, options)
    leaves = torch.tensor([leaf.token for leaf in tree.leaves])
    from_leaves, loss = fit_apo(torch.full((4,), 0.25, dtype=torch.float64), leaves, beta, beta)
    assert torch.allclose(from_leaves, optimal, atol=2e-3)
    assert loss < 1e-6


def test_apo_with_two_betas_depends_on_the_sampler():
    """The other half of theorem 13.

    With beta1 != beta2 the residual cannot vanish, and the sampler matters.
    """
    every = torch.arange(4)
    from_samples, loss = fit_apo(PI, every, 0.7, 0.3)
    from_leaves, _ = fit_apo(torch.full((4,), 0.25, dtype=torch.float64), every, 0.7, 0.3)
    assert loss > 1e-3
    assert (from_samples - from_leaves).abs().max() > 0.01


# ------------------------------------------------------------------------------------------ Loading


def test_dropout_is_off(tmp_path):
    """Guards against a ratio that is noise before the first update: GPT-2 has dropout."""
    config = transformers.GPT2Config(
        vocab_size=24,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        eos_token_id=1,
        bos_token_id=1,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny_base" / name, tmp_path)
    model, _ = policy.load_policy(str(tmp_path))
    model.train()
    tokens = torch.randint(24, (2, 8))
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_freezing():
    """--freeze-blocks 2 leaves embeddings and two blocks without gradient; 5 of 4 is refused."""
    folder = str(ROOT / "tiny_base")
    model, _ = policy.load_policy(folder, freeze_blocks=2)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert any(name.startswith("model.embed_tokens.") for name in frozen)
    assert any(name.startswith("model.layers.1.") for name in frozen)
    assert not any("layers.2." in name for name in frozen)
    with pytest.raises(ValueError, match="has only 4 blocks"):
        policy.load_policy(folder, freeze_blocks=5)


def test_checkpointing_changes_no_gradient():
    """Gradients of tiny_base with and without gradient checkpointing."""
    tokens, mask = ragged_batch(vocabulary=24)
    gradients = []
    for checkpointing in (False, True):
        model, _ = policy.load_policy(str(ROOT / "tiny_base"), gradient_checkpointing=checkpointing)
        model.train()
        log_prob, _ = policy.score(model, tokens, mask)
        log_prob.sum().backward()
        gradients.append(flat_gradient(model))
    without, with_checkpointing = gradients
    assert torch.allclose(without, with_checkpointing, atol=1e-4, rtol=1e-4)


def test_a_tokenizer_that_gives_no_tokens_is_refused(tmp_path):
    """What transformers makes of a folder without tokenizer.json: a tokenizer of nothing."""
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny_base" / name, tmp_path)
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded .*gives no tokens"):
        policy.load_tokenizer(str(tmp_path))


# ----------------------------------------------------------------------------------- The file alone


def test_the_file_can_be_copied_alone(tmp_path):
    """policy.py alone in a folder runs its demo there.  Guards against an import of a sibling."""
    shutil.copy(ROOT / "policy.py", tmp_path)
    result = subprocess.run(
        [sys.executable, "policy.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "apo at the optimal policy" in result.stdout
