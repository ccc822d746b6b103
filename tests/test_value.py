"""value.py: the soft value is exact, GAE is what its equation says, weighted leaves teach E_pi."""

import itertools
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import value
from astar_search import Options, root_keys, search
from value import ValueHead, gae, monte_carlo_returns, soft_target, soft_value, value_loss

DOUBLE = torch.float64


def tensor(numbers):
    """A float64 tensor."""
    return torch.tensor(numbers, dtype=DOUBLE)


# ----------------------------------------------------------------------- The soft value (theorem 6)


def random_outcomes(rng, n, r_lo, r_hi):
    """n rewards in [r_lo, r_hi], sometimes an end itself, and a random distribution over them.

    Returns rewards (n,), probabilities (n,).
    """
    rewards = []
    for _ in range(n):
        choices = (r_lo, r_hi, rng.uniform(r_lo, r_hi), rng.uniform(r_lo, r_hi))
        rewards.append(rng.choice(choices))
    chances = [rng.random() ** rng.choice((1, 5)) + 1e-9 for _ in range(n)]
    return tensor(rewards), tensor(chances) / sum(chances)


def random_bounds_and_beta(rng):
    """r_lo <= -1, r_hi >= 1, and beta."""
    r_lo = -1 - rng.choice((0.0, 0.05, rng.random()))
    r_hi = 1 + rng.choice((0.0, 0.1, rng.random()))
    beta = rng.choice((0.01, 0.05, 0.2, 1.0, 10.0))
    return r_lo, r_hi, beta


def assert_close(h, exact):
    """Equal up to the rounding of float64."""
    assert abs(h - exact) < 1e-8 * max(1.0, abs(exact))


def test_h_from_u_is_the_soft_value_for_any_reward():
    """h = log E_pi exp(r/beta) on exact u.

    Guards against a u target without its r_lo term, against 1 typed for r_hi or -1 for r_lo, and
    against u fitted to (r - r_lo)/(r_hi - r_lo), which is an affine function of V.
    """
    rng = random.Random(0)
    for _ in range(500):
        r_lo, r_hi, beta = random_bounds_and_beta(rng)
        rewards, probabilities = random_outcomes(rng, rng.randint(1, 6), r_lo, r_hi)
        u = (probabilities * soft_target(rewards, r_lo, r_hi, beta)).sum()
        h = soft_value(torch.logit(u), r_lo, r_hi, beta)
        exact = torch.logsumexp(probabilities.log() + rewards / beta, dim=0)
        assert_close(h, exact)


def test_h_from_V_bounds_it_and_is_equal_for_two_rewards():
    """Guards against h from V: for rewards between the ends it is off by nats, not by rounding."""
    rng = random.Random(1)
    largest_gap = 0.0
    for _ in range(500):
        # Any rewards: an upper bound.
        r_lo, r_hi, beta = random_bounds_and_beta(rng)
        rewards, probabilities = random_outcomes(rng, rng.randint(2, 6), r_lo, r_hi)
        V = (probabilities * rewards).sum()
        u = ((V - r_lo) / (r_hi - r_lo)).clamp(0, 1)  # rounding may put it just outside
        h_from_V = soft_value(torch.logit(u), r_lo, r_hi, beta)
        exact = torch.logsumexp(probabilities.log() + rewards / beta, dim=0)
        assert h_from_V > exact - 1e-8 * max(1.0, abs(exact))
        largest_gap = max(largest_gap, (h_from_V - exact).item())

        # Two rewards, r_lo with probability p and r_hi with 1 - p: equal.
        p = rng.random()
        V = p * r_lo + (1 - p) * r_hi
        u = tensor((V - r_lo) / (r_hi - r_lo))
        log_low = tensor(math.log(p) + r_lo / beta)
        log_high = tensor(math.log(1 - p) + r_hi / beta)
        assert_close(
            soft_value(torch.logit(u), r_lo, r_hi, beta), torch.logaddexp(log_low, log_high)
        )
    assert largest_gap > 3.0


def test_soft_value_by_hand():
    """u = 1/2, r = -1 or 1, beta = 1: h = log cosh 1.

    At the ends of u, h is r_lo/beta or r_hi/beta, even for beta = .01.
    """
    assert abs(soft_value(tensor(0.0), -1.0, 1.0, 1.0) - math.log(math.cosh(1.0))) < 1e-12
    for beta in (0.01, 0.2):
        for dtype in (torch.float32, DOUBLE):
            logits = torch.tensor([-math.inf, -1e4, 0.0, 1e4, math.inf], dtype=dtype)
            h = soft_value(logits, -1.0, 1.25, beta)
            assert h.dtype == dtype
            assert h.isfinite().all()
            assert (h.diff() >= 0).all()
            assert h[0] == h[1] == torch.tensor(-1.0 / beta, dtype=dtype)
            assert h[3] == h[4] == 1.25 / beta


def test_soft_target_at_the_ends_and_in_between():
    """0 at r_lo, 1 at r_hi, increasing, and finite at beta = .01 (exp(110) overflows in float32).

    By hand for beta = 1.
    """
    for beta, dtype in itertools.product((0.01, 0.2, 1.0), (torch.float32, DOUBLE)):
        rewards = torch.linspace(-1.05, 1.1, 9, dtype=dtype)
        target = soft_target(rewards, -1.05, 1.1, beta)
        assert target.dtype == dtype
        assert target.isfinite().all()
        assert (target.diff() >= 0).all()
        assert abs(target[0]) < 1e-6
        assert abs(target[-1] - 1) < 1e-6
    by_hand = (1 - math.exp(-1)) / (math.e - math.exp(-1))
    assert abs(soft_target(tensor([0.0]), -1.0, 1.0, 1.0).item() - by_hand) < 1e-12
    assert soft_target(torch.zeros(2, 3), -1.0, 1.0, 1.0).shape == (2, 3)


# --------------------------------------------------------------------- Returns and GAE (theorem 10)


def slow_gae(reward, values, lam):
    """GAE of one completion by its definition: A_t = sum over l >= 0 of lambda^l delta_{t+l}.

    values: V at the tokens of the completion alone.  Returns a list of the same length.
    """
    n = len(values)
    next_values = values[1:] + [reward]  # at the last token delta = r - V
    delta = [next_values[t] - values[t] for t in range(n)]
    advantages = []
    for t in range(n):
        advantages.append(sum(lam**step * delta[t + step] for step in range(n - t)))
    return advantages


def ragged(rng, B, L):
    """Random rewards (B,), values (B, L) with junk off the mask, mask (B, L), and runs, as lists.

    runs: (start, end) of the one run of ones in each row of the mask.
    """
    runs = []
    for _ in range(B):
        start, end = sorted(rng.sample(range(L + 1), 2))
        runs.append((start, end))
    mask = [[float(start <= t < end) for t in range(L)] for start, end in runs]
    values = []
    for row in mask:
        values.append([rng.uniform(-1, 1) * (1 if on else 1_000) for on in row])
    rewards = [rng.uniform(-1, 1) for _ in range(B)]
    return rewards, values, mask, runs


def test_gae_by_hand():
    """Two rows, prompts of 3 and 1 tokens, padding behind the second; 9 is a V that is never read.

    row 1, V = (.5, .25), r = 1:      delta = (.25 - .5, 1 - .25) = (-.25, .75)
                                      A = (-.25 + .5 * .75, .75)
    row 2, V = (.2, .5, .1), r = -1:  delta = (.3, -.4, -1.1)
                                      A_3 = -1.1, A_2 = -.4 - .55 = -.95, A_1 = .3 - .475

    Guards against V of the padding as next value, a reward at the end of the grid, and a sum that
    runs over rows.
    """
    values = tensor([[9, 9, 0.5, 0.25, 9], [0.2, 0.5, 0.1, 9, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    advantages = gae(tensor([1.0, -1.0]), values, mask, lam=0.5)
    expected = tensor([[0, 0, 0.125, 0.75, 0], [-0.175, -0.95, -1.1, 0, 0]])
    assert torch.allclose(advantages[mask], expected[mask], rtol=0, atol=1e-12)


def test_gae_agrees_with_the_slow_double_loop():
    """Guards against an index off by one, for any place and any shape; bool and float masks."""
    rng = random.Random(2)
    for case in range(300):
        lam = rng.choice((0.0, 0.5, 0.95, 1.0, rng.random()))
        rewards, values, mask, runs = ragged(rng, rng.randint(1, 5), rng.randint(1, 9))
        mask_dtype = torch.bool if case % 2 else DOUBLE
        mask = torch.tensor(mask, dtype=mask_dtype)
        advantages = gae(tensor(rewards), tensor(values), mask, lam).tolist()
        for row, (start, end) in enumerate(runs):
            expected = slow_gae(rewards[row], values[row][start:end], lam)
            assert advantages[row][start:end] == pytest.approx(expected, abs=1e-12)


def test_gae_is_zero_outside_of_the_mask():
    """As its docstring says.

    Guards against lambda * A of the first token leaking onto the last token of the prompt, where a
    mean or a sum over the grid would count it.
    """
    rng = random.Random(3)
    for _ in range(100):
        rewards, values, mask, _ = ragged(rng, 4, 7)
        advantages = gae(tensor(rewards), tensor(values), tensor(mask), 0.9)
        assert (advantages[tensor(mask) == 0] == 0).all()


def test_gae_at_both_ends_of_lambda():
    """lambda = 1: return - V.  lambda = 0: V of the next token (the reward at the last) - V.

    Guards against lambda not read, and against 1 - lambda.
    """
    rng = random.Random(4)
    for _ in range(100):
        rewards, values, mask, runs = ragged(rng, 4, 8)
        on = tensor(mask) == 1
        returns = monte_carlo_returns(tensor(rewards), tensor(mask))
        at_one = gae(tensor(rewards), tensor(values), tensor(mask), 1.0)
        expected = returns - tensor(values)
        assert torch.allclose(at_one[on], expected[on], rtol=0, atol=1e-12)

        at_zero = gae(tensor(rewards), tensor(values), tensor(mask), 0.0)
        for row, (start, end) in enumerate(runs):
            here = values[row][start:end]
            following = values[row][start + 1 : end] + [rewards[row]]
            expected = [after - before for before, after in zip(here, following)]
            assert at_zero[row, start:end].tolist() == expected


def test_monte_carlo_returns_by_hand():
    """gamma = 1: the reward at each token of the completion, 0 elsewhere; any type of mask."""
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    expected = torch.tensor([[0.0, 0.5, 0.5, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    for typed_mask in (mask, mask.bool(), mask.float()):
        assert torch.equal(monte_carlo_returns(torch.tensor([0.5, -1.0]), typed_mask), expected)


# ------------------------------------------------------------------------------------ Head and loss


def test_the_head_starts_without_an_opinion():
    """V = 0 and u = 1/2 at every prefix, for any width.

    Guards against a random guide before the first update.
    """
    torch.manual_seed(0)
    for width in (None, 5):
        V, u_logit = ValueHead(12, width)(torch.randn(3, 4, 12) * 10)
        assert V.shape == u_logit.shape == (3, 4)
        assert (V == 0).all()
        assert (torch.sigmoid(u_logit) == 0.5).all()


def test_the_head_learns_and_leaves_the_hidden_states_alone():
    """Guards against the head's loss changing the policy.

    The last layer is filled first.  While it is zero, no gradient reaches the hidden states in any
    case, and the test would show nothing.
    """
    torch.manual_seed(0)
    head = ValueHead(8)
    torch.nn.init.normal_(head.outer.weight)
    # a policy in bfloat16, its head in float32
    hidden = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    V, u_logit = head(hidden)
    assert V.dtype == u_logit.dtype == torch.float32

    ones = torch.ones(2, 3)
    loss, _ = value_loss(V, u_logit, returns=ones, targets=ones, token_weights=ones / 6)
    loss.backward()
    assert hidden.grad is None
    for parameter in head.parameters():
        assert parameter.grad.abs().sum() > 0
    # two outputs that read the prefix: all six differ
    assert len(set(V.flatten().tolist())) == 6
    assert not torch.equal(V, u_logit)


def test_value_loss_by_hand():
    """V = (.5, 0), returns (1, -1), u = 1/2, targets (1, 0), weights (2, .25).

    2 * .25 + .25 * 1 for V, 2 * .25 + .25 * .25 for u.  Guards against a mean inside (micro-batches
    would weigh unequally) and against a loss on the logit of u.
    """
    V = tensor([[0.5, 0.0]]).requires_grad_()
    u_logit = tensor([[0.0, 0.0]]).requires_grad_()
    loss, metrics = value_loss(
        values=V,
        u_logit=u_logit,
        returns=tensor([[1.0, -1.0]]),
        targets=tensor([[1.0, 0.0]]),
        token_weights=tensor([[2.0, 0.25]]),
    )
    assert loss.item() == 0.75 + 0.5625
    assert metrics["value_loss"] == 0.75
    assert metrics["soft_value_loss"] == 0.5625
    assert not any(metric.requires_grad for metric in metrics.values())
    loss.backward()
    assert V.grad.tolist() == [[-2.0, 0.5]]  # 2 w (V - r)
    assert u_logit.grad.tolist() == [[-0.5, 0.0625]]  # 2 w (u - target) u (1 - u)


def test_value_loss_adds_up_over_micro_batches():
    """Loss, metrics and gradients.  Guards against a normaliser counted within the micro-batch."""
    torch.manual_seed(0)
    V, u_logit, returns = torch.randn(3, 7, 5, dtype=DOUBLE).unbind(0)
    targets, weights = torch.rand(2, 7, 5, dtype=DOUBLE).unbind(0)
    V.requires_grad_()
    u_logit.requires_grad_()
    full_loss, full_metrics = value_loss(V, u_logit, returns, targets, weights)
    full_gradients = torch.autograd.grad(full_loss, (V, u_logit))

    loss = 0.0
    metrics = {"value_loss": 0.0, "soft_value_loss": 0.0}
    for rows in (slice(0, 1), slice(1, 5), slice(5, 7)):
        part_loss, part_metrics = value_loss(
            V[rows], u_logit[rows], returns[rows], targets[rows], weights[rows]
        )
        loss = loss + part_loss
        for name, metric in part_metrics.items():
            metrics[name] += metric
    gradients = torch.autograd.grad(loss, (V, u_logit))

    assert abs(loss - full_loss) < 1e-12
    assert metrics.keys() == full_metrics.keys()
    for name, metric in full_metrics.items():
        assert abs(metrics[name] - metric) < 1e-12
    for gradient, full_gradient in zip(gradients, full_gradients):
        assert torch.allclose(gradient, full_gradient, rtol=0, atol=1e-12)


# -------------------------------------------------- What the head learns from a search (theorem 14)

EOS = 2
DEPTH = 4
BETA = 1.0
R_LO = -1.0
R_HI = 1.0


def random_policy(seed):
    """A policy over strings of the tokens 0, 1 and EOS, at most DEPTH long, and a reward of each.

    Returns
        log_probs: inner prefix -> log pi(a|s) (3,).
        log_pi: any prefix, leaves included -> log pi(s).
        reward: leaf -> reward, high for the two likeliest leaves and low for the others.  So K
            different leaves are mostly wrong ones.
    """
    rng = random.Random(seed)
    inner = []
    for depth in range(DEPTH):
        inner += itertools.product((0, 1), repeat=depth)
    log_probs = {}
    for path in inner:
        logits = tensor([2 * rng.gauss(0, 1) for _ in range(3)])
        log_probs[path] = torch.log_softmax(logits, 0)
    log_pi = {(): 0.0}
    for path in inner:
        for token in range(3):
            log_pi[path + (token,)] = log_pi[path] + log_probs[path][token].item()
    leaves = [path for path in log_pi if path not in log_probs]
    leaves.sort(key=log_pi.get, reverse=True)
    reward = {}
    for place, leaf in enumerate(leaves):
        reward[leaf] = R_HI if place < 2 else rng.choice((-0.6, 0.0))
    return log_probs, log_pi, reward


def expectation(prefix, log_pi, reward, function):
    """E_pi[function(r) | prefix] by enumeration."""
    total = 0.0
    for leaf in reward:
        if leaf[: len(prefix)] == prefix:
            total += math.exp(log_pi[leaf] - log_pi[prefix]) * function(reward[leaf])
    return total


def fit_head(leaves, prefixes, reward, weights):
    """Fit a tabular head, one V and one u a prefix, by value_loss on weighted leaves.

    leaves: paths.  Equal leaves share a row, because the loss is linear in the weights.
    Returns V, u as dicts: prefix -> number.
    """
    total_weight = Counter()
    for leaf, weight in zip(leaves, weights):
        total_weight[leaf] += weight
    column = {prefix: i for i, prefix in enumerate(prefixes)}
    index = []
    mask = []
    for leaf in total_weight:
        index.append([column[leaf[:t]] if t < len(leaf) else 0 for t in range(DEPTH)])
        mask.append([float(t < len(leaf)) for t in range(DEPTH)])
    index = torch.tensor(index)  # (leaves, DEPTH)
    mask = tensor(mask)  # (leaves, DEPTH)
    rewards = tensor([reward[leaf] for leaf in total_weight])
    returns = monte_carlo_returns(rewards, mask)
    targets = monte_carlo_returns(soft_target(rewards, R_LO, R_HI, BETA), mask)
    token_weights = tensor(list(total_weight.values()))[:, None] / sum(weights) * mask

    table = torch.zeros(2, len(prefixes), dtype=DOUBLE, requires_grad=True)  # V and u_logit
    optimizer = torch.optim.Adam([table], lr=0.05, eps=1e-15)
    for step in range(1_000):
        optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, (1_000 - step) / 500)
        loss, _ = value_loss(table[0][index], table[1][index], returns, targets, token_weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    V = table.detach()[0].tolist()
    u = torch.sigmoid(table.detach()[1]).tolist()
    return dict(zip(prefixes, V)), dict(zip(prefixes, u))


def standard_error(prefix, trees, reward, function, mean):
    """Standard error of a ratio of sums over the searches: sum w (f(r) - mean) / sum w.

    The sums run over the leaves below the prefix.
    """
    n = len(trees)
    numerators = [0.0] * n
    mean_weight = 0.0
    for i, tree in enumerate(trees):
        for leaf in tree.leaves:
            path = tuple(leaf.tokens())
            if path[: len(prefix)] == prefix:
                numerators[i] += leaf.weight * (function(reward[path]) - mean)
                mean_weight += leaf.weight / n
    return tensor(numerators).std().item() / n**0.5 / mean_weight


@pytest.mark.parametrize("seed", [0, 1])
def test_a_head_fitted_on_weighted_leaves_converges_to_V_and_unweighted_does_not(seed):
    """The leaves of a search without replacement contain more rare completions than samples do.

    At each prefix that pi visits at least 5 % of the time: V within 4 standard errors of
    E_pi[r | s], u likewise.  Guards against leaf weights that are ignored, squared or built from
    the perturbed key.
    """
    log_probs, log_pi, reward = random_policy(seed)
    rows = torch.stack(list(log_probs.values()))
    row_of = {prefix: i for i, prefix in enumerate(log_probs)}

    def expand(nodes):
        indices = [row_of[tuple(node.tokens())] for node in nodes]
        return rows[indices], torch.zeros(len(nodes), 1)

    options = Options(eos=(EOS,), K=4, max_new_tokens=DEPTH)
    trees = search(root_keys(seed, 0, range(1_200)), expand, options)
    paths = []
    weights = []
    for tree in trees:
        for leaf in tree.leaves:
            paths.append(tuple(leaf.tokens()))
            weights.append(leaf.weight)
    V, u = fit_head(paths, list(log_probs), reward, weights)
    plain_V, plain_u = fit_head(paths, list(log_probs), reward, [1.0] * len(paths))

    target_of = {r: soft_target(tensor(r), R_LO, R_HI, BETA).item() for r in reward.values()}
    visited = [prefix for prefix in log_probs if math.exp(log_pi[prefix]) >= 0.05]
    assert () in visited
    assert len(visited) >= 4
    for prefix in visited:
        for fitted, function in ((V, float), (u, target_of.get)):
            exact = expectation(prefix, log_pi, reward, function)
            error = standard_error(prefix, trees, reward, function, exact)
            assert abs(fitted[prefix] - exact) < 4 * error + 1e-6

    # The root: h follows from u, and both means of the unweighted leaves are far off.  Measured:
    #             V      exact   unweighted      h      exact   unweighted
    #   seed 0   .439    .446    .169           .663    .668    .445
    #   seed 1   .774    .771    .388           .861    .859    .566
    root = ()
    exact_V = expectation(root, log_pi, reward, float)
    exact_h = math.log(expectation(root, log_pi, reward, lambda r: math.exp(r / BETA)))
    h = soft_value(torch.logit(tensor(u[root])), R_LO, R_HI, BETA)
    plain_h = soft_value(torch.logit(tensor(plain_u[root])), R_LO, R_HI, BETA)
    assert abs(V[root] - exact_V) < 0.05
    assert exact_V - plain_V[root] > 0.2
    assert abs(h - exact_h) < 0.05
    assert exact_h - plain_h > 0.2


# ----------------------------------------------------------------------------------- The file alone


def test_the_file_can_be_copied_alone(tmp_path):
    """value.py alone in a folder runs its demo there.  Guards against an import of a sibling."""
    shutil.copy(Path(value.__file__).resolve(), tmp_path)
    result = subprocess.run(
        [sys.executable, "value.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "GAE(lambda = .5)" in result.stdout
