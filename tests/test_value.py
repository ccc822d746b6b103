"""value.py: the soft value is exact, GAE is what its equation says, and weighted leaves teach the head E_pi."""

import itertools
import math
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

ROOT = Path(value.__file__).resolve().parent
DOUBLE = torch.float64


def tensor(numbers):
    return torch.tensor(numbers, dtype=DOUBLE)


# ------------------------------------------------------------------------------------- the soft value (theorem 6)


def random_outcomes(rng, n, r_lo, r_hi):
    """n rewards in [r_lo, r_hi], the ends among them now and then, and a random distribution over them."""
    rewards = [rng.choice((r_lo, r_hi, rng.uniform(r_lo, r_hi), rng.uniform(r_lo, r_hi))) for _ in range(n)]
    chances = [rng.random() ** rng.choice((1, 5)) + 1e-9 for _ in range(n)]
    return tensor(rewards), tensor(chances) / sum(chances)


def bounds_and_beta(rng):
    r_lo, r_hi = -1 - rng.choice((0.0, 0.05, rng.random())), 1 + rng.choice((0.0, 0.1, rng.random()))
    return r_lo, r_hi, rng.choice((0.01, 0.05, 0.2, 1.0, 10.0))


def test_h_from_u_is_the_soft_value_for_any_reward():
    """h = log E_pi exp(r/beta) on exact u.  Guards against a u target without its r_lo term, against 1 typed for r_hi
    or -1 for r_lo, and against u fitted to (r - r_lo)/(r_hi - r_lo), which is V in disguise."""
    rng = random.Random(0)
    for _ in range(500):
        r_lo, r_hi, beta = bounds_and_beta(rng)
        rewards, chances = random_outcomes(rng, rng.randint(1, 6), r_lo, r_hi)
        u = (chances * soft_target(rewards, r_lo, r_hi, beta)).sum()
        h = soft_value(torch.logit(u), r_lo, r_hi, beta)
        exact = torch.logsumexp(chances.log() + rewards / beta, dim=0)
        assert abs(h - exact) < 1e-8 * max(1.0, abs(exact))


def test_h_from_V_bounds_it_and_is_equal_for_two_rewards():
    """Guards against the claim that V will do: for rewards between the ends it is off by nats, not by rounding."""
    rng = random.Random(1)
    largest = 0.0
    for _ in range(500):
        r_lo, r_hi, beta = bounds_and_beta(rng)
        rewards, chances = random_outcomes(rng, rng.randint(2, 6), r_lo, r_hi)
        u = (((chances * rewards).sum() - r_lo) / (r_hi - r_lo)).clamp(0, 1)  # (V rounds to a bit outside)
        from_V = soft_value(torch.logit(u), r_lo, r_hi, beta)
        exact = torch.logsumexp(chances.log() + rewards / beta, dim=0)
        assert from_V > exact - 1e-8 * max(1.0, abs(exact))
        largest = max(largest, (from_V - exact).item())
        p = rng.random()
        u = tensor((p * r_lo + (1 - p) * r_hi - r_lo) / (r_hi - r_lo))  # from V of two rewards
        exact = torch.logaddexp(tensor(math.log(p) + r_lo / beta), tensor(math.log(1 - p) + r_hi / beta))
        assert abs(soft_value(torch.logit(u), r_lo, r_hi, beta) - exact) < 1e-8 * max(1.0, abs(exact))
    assert largest > 3.0


def test_soft_value_by_hand():
    """u = 1/2, r = -1 or 1, beta = 1: h = log cosh 1.  At the ends of u it is the bound itself, even for beta = .01."""
    assert abs(soft_value(tensor(0.0), -1.0, 1.0, 1.0) - math.log(math.cosh(1.0))) < 1e-12
    for beta in (0.01, 0.2):
        for dtype in (torch.float32, DOUBLE):
            logits = torch.tensor([-math.inf, -1e4, 0.0, 1e4, math.inf], dtype=dtype)
            h = soft_value(logits, -1.0, 1.25, beta)
            assert h.dtype == dtype and h.isfinite().all() and (h.diff() >= 0).all()
            assert h[0] == h[1] == torch.tensor(-1.0 / beta, dtype=dtype) and h[3] == h[4] == 1.25 / beta


def test_soft_target_at_the_ends_and_in_between():
    """0 at r_lo, 1 at r_hi, increasing, finite at beta = .01 (exp(110) overflows in float32); by hand for beta = 1."""
    for beta, dtype in itertools.product((0.01, 0.2, 1.0), (torch.float32, DOUBLE)):
        target = soft_target(torch.linspace(-1.05, 1.1, 9, dtype=dtype), -1.05, 1.1, beta)
        assert target.dtype == dtype and target.isfinite().all() and (target.diff() >= 0).all()
        assert abs(target[0]) < 1e-6 and abs(target[-1] - 1) < 1e-6
    by_hand = (1 - math.exp(-1)) / (math.e - math.exp(-1))
    assert abs(soft_target(tensor([0.0]), -1.0, 1.0, 1.0).item() - by_hand) < 1e-12
    assert soft_target(torch.zeros(2, 3), -1.0, 1.0, 1.0).shape == (2, 3)


# ----------------------------------------------------------------------------------- returns and GAE (theorem 10)


def slow_gae(reward, values, lam):
    """One completion, its own V only: A_t = sum over l >= 0 of lambda^l delta_{t+l}, term by term."""
    n = len(values)
    delta = [(values[t + 1] if t + 1 < n else reward) - values[t] for t in range(n)]
    return [sum(lam**l * delta[t + l] for l in range(n - t)) for t in range(n)]


def ragged(rng, B, L):
    """Lists: rewards, values with junk outside of the mask, and one run of ones a row as (start, end)."""
    runs = [tuple(sorted(rng.sample(range(L + 1), 2))) for _ in range(B)]
    mask = [[float(start <= t < end) for t in range(L)] for start, end in runs]
    values = [[rng.uniform(-1, 1) * (1 if on else 1_000) for on in row] for row in mask]
    return [rng.uniform(-1, 1) for _ in range(B)], values, mask, runs


def test_gae_by_hand():
    """Two rows, prompts of 3 and 1 tokens, padding behind the second; 9 marks a V that nobody may read.

    row 1, V = (.5, .25), r = 1:        delta = (.25 - .5, 1 - .25) = (-.25, .75);       A = (-.25 + .5 * .75, .75)
    row 2, V = (.2, .5, .1), r = -1:    delta = (.3, -.4, -1.1);   A_3 = -1.1, A_2 = -.4 - .55 = -.95, A_1 = .3 - .475
    Guards against V of the padding as next value, a reward at the end of the grid, and a sum that runs over rows."""
    values = tensor([[9, 9, 0.5, 0.25, 9], [0.2, 0.5, 0.1, 9, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    advantages = gae(tensor([1.0, -1.0]), values, mask, lam=0.5)
    expected = tensor([[0, 0, 0.125, 0.75, 0], [-0.175, -0.95, -1.1, 0, 0]])
    assert torch.allclose(advantages[mask], expected[mask], rtol=0, atol=1e-12)


def test_gae_agrees_with_the_slow_double_loop():
    """Guards against an index off by one, in whatever place and for whatever shape; bool and float masks alike."""
    rng = random.Random(2)
    for case in range(300):
        lam = rng.choice((0.0, 0.5, 0.95, 1.0, rng.random()))
        rewards, values, mask, runs = ragged(rng, rng.randint(1, 5), rng.randint(1, 9))
        given = torch.tensor(mask, dtype=torch.bool) if case % 2 else tensor(mask)
        advantages = gae(tensor(rewards), tensor(values), given, lam).tolist()
        for row, (start, end) in enumerate(runs):
            expected = slow_gae(rewards[row], values[row][start:end], lam)
            assert advantages[row][start:end] == pytest.approx(expected, abs=1e-12)


def test_gae_is_zero_outside_of_the_mask():
    """As its docstring says.  Guards against lambda * A of the first token leaking onto the last token of the prompt,
    where a mean or a sum over the grid would count it."""
    rng = random.Random(3)
    for _ in range(100):
        rewards, values, mask, _ = ragged(rng, 4, 7)
        advantages = gae(tensor(rewards), tensor(values), tensor(mask), 0.9)
        assert (advantages[tensor(mask) == 0] == 0).all()


def test_gae_at_both_ends_of_lambda():
    """lambda = 1: return - V.  lambda = 0: V of the next token (the reward at the last) - V.  Guards against lambda
    not read, and against 1 - lambda."""
    rng = random.Random(4)
    for _ in range(100):
        rewards, values, mask, runs = ragged(rng, 4, 8)
        on = tensor(mask) == 1
        returns = monte_carlo_returns(tensor(rewards), tensor(mask))
        full = gae(tensor(rewards), tensor(values), tensor(mask), 1.0)
        assert torch.allclose(full[on], (returns - tensor(values))[on], rtol=0, atol=1e-12)
        step = gae(tensor(rewards), tensor(values), tensor(mask), 0.0)
        for row, (start, end) in enumerate(runs):
            following = values[row][start + 1 : end] + [rewards[row]]
            assert step[row, start:end].tolist() == [b - a for a, b in zip(values[row][start:end], following)]


def test_monte_carlo_returns_by_hand():
    """gamma = 1: the reward at each token of the completion, nothing in prompt and padding; bool masks too."""
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    expected = torch.tensor([[0.0, 0.5, 0.5, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    for given in (mask, mask.bool(), mask.float()):
        assert torch.equal(monte_carlo_returns(torch.tensor([0.5, -1.0]), given), expected)


# ------------------------------------------------------------------------------------------------ head and loss


def test_the_head_starts_without_an_opinion():
    """V = 0 and u = 1/2 at every prefix, for any width.  Guards against a random guide before the first update."""
    torch.manual_seed(0)
    for width in (None, 5):
        V, u_logit = ValueHead(12, width)(torch.randn(3, 4, 12) * 10)
        assert V.shape == u_logit.shape == (3, 4)
        assert (V == 0).all() and (torch.sigmoid(u_logit) == 0.5).all()


def test_the_head_learns_and_leaves_the_hidden_states_alone():
    """Guards against the head's loss changing the policy.  The last layer is filled first: while it is zero, no
    gradient reaches the hidden states in any case, and the test would show nothing."""
    torch.manual_seed(0)
    head = ValueHead(8)
    torch.nn.init.normal_(head.outer.weight)
    hidden = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)  # a bf16 policy, float32 head
    V, u_logit = head(hidden)
    assert V.dtype == u_logit.dtype == torch.float32
    on = torch.full((2, 3), 1 / 6)
    value_loss(V, u_logit, torch.ones(2, 3), torch.ones(2, 3), on)[0].backward()
    assert hidden.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
    assert len(set(V.flatten().tolist())) == 6 and not torch.equal(V, u_logit)  # two outputs that read the prefix


def test_value_loss_by_hand():
    """V = (.5, 0), returns (1, -1), u = 1/2, targets (1, 0), weights (2, .25): 2 * .25 + .25 * 1 for V,
    2 * .25 + .25 * .25 for u.  Guards against a mean inside (micro-batches would weigh unequally) and against a loss
    on the logit of u."""
    V, u_logit = tensor([[0.5, 0.0]]).requires_grad_(), tensor([[0.0, 0.0]]).requires_grad_()
    loss, metrics = value_loss(V, u_logit, tensor([[1.0, -1.0]]), tensor([[1.0, 0.0]]), tensor([[2.0, 0.25]]))
    assert loss.item() == 0.75 + 0.5625
    assert metrics["value_loss"] == 0.75 and metrics["soft_value_loss"] == 0.5625
    assert not any(metric.requires_grad for metric in metrics.values())
    loss.backward()
    assert V.grad.tolist() == [[-2.0, 0.5]]  # 2 w (V - r)
    assert u_logit.grad.tolist() == [[-0.5, 0.0625]]  # 2 w (u - target) u (1 - u)


def test_value_loss_adds_up_over_micro_batches():
    """Loss, metrics and gradients.  Guards against a normaliser counted within the micro-batch."""
    torch.manual_seed(0)
    V, u_logit, returns = torch.randn(3, 7, 5, dtype=DOUBLE).unbind(0)
    targets, weights = torch.rand(2, 7, 5, dtype=DOUBLE).unbind(0)
    columns = [V.requires_grad_(), u_logit.requires_grad_(), returns, targets, weights]
    loss, metrics = value_loss(*columns)
    whole = torch.autograd.grad(loss, columns[:2])
    parts = [value_loss(*(column[rows] for column in columns)) for rows in (slice(0, 1), slice(1, 5), slice(5, 7))]
    summed = torch.autograd.grad(sum(part[0] for part in parts), columns[:2])
    assert abs(sum(part[0] for part in parts) - loss) < 1e-12
    for name, metric in metrics.items():
        assert abs(sum(part[1][name] for part in parts) - metric) < 1e-12
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(whole, summed))


# ----------------------------------------------------------- what the head learns from a search (theorem 14)

EOS, DEPTH, BETA, R_LO, R_HI = 2, 4, 1.0, -1.0, 1.0


def table(seed):
    """A policy over strings of tokens 0, 1, EOS, at most DEPTH long: log pi(a|s) of each inner prefix, and a reward of
    each leaf that is high where the policy is sure and low elsewhere: K different leaves are mostly the wrong ones."""
    rng = random.Random(seed)
    inner = [path for depth in range(DEPTH) for path in itertools.product((0, 1), repeat=depth)]
    logp = {path: torch.log_softmax(tensor([2 * rng.gauss(0, 1) for _ in range(3)]), 0) for path in inner}
    log_pi = {(): 0.0}
    for path in inner:
        log_pi.update({path + (token,): log_pi[path] + logp[path][token].item() for token in range(3)})
    leaves = [path for path in log_pi if path not in logp]
    leaves.sort(key=log_pi.get, reverse=True)
    reward = {leaf: R_HI if place < 2 else rng.choice((-0.6, 0.0)) for place, leaf in enumerate(leaves)}
    return logp, log_pi, reward


def expectation(prefix, log_pi, reward, function):
    """E_pi[function(r) | prefix] by enumeration."""
    below = [leaf for leaf in reward if leaf[: len(prefix)] == prefix]
    return sum(math.exp(log_pi[leaf] - log_pi[prefix]) * function(reward[leaf]) for leaf in below)


def fit(leaves, prefixes, reward, weights):
    """A tabular head, one V and one u a prefix, fitted by the product's loss on leaves (paths) of these weights.
    The loss is linear in the weights, so equal leaves share a row.  Returns V, u as dicts."""
    total = Counter()
    for leaf, weight in zip(leaves, weights):
        total[leaf] += weight
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    index = torch.tensor([[number[leaf[:t]] if t < len(leaf) else 0 for t in range(DEPTH)] for leaf in total])
    mask = tensor([[float(t < len(leaf)) for t in range(DEPTH)] for leaf in total])
    rewards = tensor([reward[leaf] for leaf in total])
    returns = monte_carlo_returns(rewards, mask)
    targets = monte_carlo_returns(soft_target(rewards, R_LO, R_HI, BETA), mask)
    token_weights = tensor(list(total.values()))[:, None] / sum(weights) * mask
    head = torch.zeros(2, len(prefixes), dtype=DOUBLE, requires_grad=True)
    optimizer = torch.optim.Adam([head], lr=0.05, eps=1e-15)
    for step in range(1_000):
        optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, (1_000 - step) / 500)
        loss, _ = value_loss(head[0][index], head[1][index], returns, targets, token_weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    V, u = head.detach()[0].tolist(), torch.sigmoid(head.detach()[1]).tolist()
    return dict(zip(prefixes, V)), dict(zip(prefixes, u))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_head_fitted_on_weighted_leaves_converges_to_V_and_unweighted_does_not(seed):
    """Leaves of a Gumbel search, drawn without replacement, over-represent what is rare under pi.  Guards against leaf
    weights that are ignored, squared or built from the perturbed key.

    At each prefix that pi visits at least 5 % of the time: V within 4 standard errors of E_pi[r | s], u likewise.
    """
    logp, log_pi, reward = table(seed)
    rows, number = torch.stack(list(logp.values())), {prefix: i for i, prefix in enumerate(logp)}

    def expand(nodes):
        return rows[[number[tuple(node.path())] for node in nodes]], torch.zeros(len(nodes), 1)

    n = 1_200
    trees = search(root_keys(seed, 0, range(n)), expand, Options(eos=(EOS,), K=4, max_new_tokens=DEPTH))
    leaves = [(tuple(leaf.path()), leaf.weight, tree) for tree, found in enumerate(trees) for leaf in found.leaves]
    paths, weights, _ = zip(*leaves)
    V, u = fit(paths, list(logp), reward, weights)
    plain_V, plain_u = fit(paths, list(logp), reward, [1.0] * len(paths))

    def error(prefix, function, mean):
        """Standard error of a ratio of sums over searches: sum w (f(r) - mean) / sum w, below the prefix."""
        above, below = [0.0] * n, 0.0
        for path, weight, tree in leaves:
            if path[: len(prefix)] == prefix:
                above[tree] += weight * (function(reward[path]) - mean)
                below += weight / n
        return tensor(above).std().item() / n**0.5 / below

    targets = {r: soft_target(tensor(r), R_LO, R_HI, BETA).item() for r in reward.values()}
    visited = [prefix for prefix in logp if math.exp(log_pi[prefix]) >= 0.05]
    assert () in visited and len(visited) >= 4
    for prefix in visited:
        for fitted, function in ((V, float), (u, targets.get)):
            exact = expectation(prefix, log_pi, reward, function)
            assert abs(fitted[prefix] - exact) < 4 * error(prefix, function, exact) + 1e-6

    # The root: h follows from u, and both means of the leaves are far from the truth.  Measured for seed 0 (1):
    # V .439 (.774), exact .446 (.771), unweighted .169 (.388);  h .663 (.861), exact .668 (.859), plain .445 (.566)
    exact = expectation((), log_pi, reward, float)
    soft = math.log(expectation((), log_pi, reward, lambda r: math.exp(r / BETA)))
    h, plain_h = (soft_value(torch.logit(tensor(found[()])), R_LO, R_HI, BETA) for found in (u, plain_u))
    assert abs(V[()] - exact) < 0.05 and exact - plain_V[()] > 0.2
    assert abs(h - soft) < 0.05 and soft - plain_h > 0.2


@pytest.mark.parametrize("name", ["value", "astar_search"])
def test_the_file_can_be_copied_alone(tmp_path, name):
    """Guards against an import of a sibling."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, "-c", f"import {name}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
