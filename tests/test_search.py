"""The theorems of the search, on tables small enough to enumerate every completion.

A table is a random language of 5 tokens: log pi(.|s) for every prefix s.  Some rows are peaked and
some flat, a fifth of the tokens are impossible, and completions have 1 to 4 tokens.  Those that
have no EOS after 4 tokens are cut.

The reference is always brute force over all completions, or a textbook search that queues every
child at once.  All seeds are fixed.  A chi-square test passes if its p-value is above 1e-4, and
beside each one stands a planted wrong sampler whose p-value must be below.
"""

import functools
import heapq
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import astar_search
from astar_search import Options, gumbel, log_inclusion, mix64, perturb, root_keys, sample, search

EOS = 0
DEPTH = 4
BETA = 0.5
REWARDS = (-1.0, 0.2, 1.0)  # three values: with two, h from V would look exact as well
WIDTHS = (1, 2, 7)
IMPOSSIBLE = 99.0  # h of a child that pi forbids: a search that looks at it goes astray
TABLE_OPTIONS = Options(eos=(EOS,), max_new_tokens=DEPTH)

# ------------------------------------------------------------------------------------------- Tables


def is_leaf(s):
    return s[-1:] == (EOS,) or len(s) == DEPTH


class Table:
    """A random language with all of its completions.

    log_probs[s]: log pi(.|s) (V,).  leaves[y]: log pi(y).  rewards[y]: r(y).  pi[s]: probability of
    the prefix s.  h[guide][s]: h of the children of s, in nats; V numbers, or one for all of them.
    """

    def __init__(self, seed, V=5):
        rng = np.random.default_rng(seed)
        self.V = V
        self.log_probs = {}
        self.leaves = {}
        self.rewards = {}
        self.pi = Counter()  # summed from the leaves up
        self.exp_reward = Counter()  # sum of pi(y) exp(r(y)/beta) over the leaves y below s
        self.best_reward = {}  # the largest r below s
        self.grow(rng)
        self.h = self.make_guides(rng)

    def grow(self, rng):
        """Draw log pi of every prefix and the reward of every completion."""
        todo = [((), 0.0)]
        while todo:
            s, g = todo.pop()
            if is_leaf(s):
                self.add_leaf(s, g, float(rng.choice(REWARDS)))
                continue
            logits = rng.normal(size=self.V) * rng.choice([0.3, 2.5])  # flat or peaked
            logits[rng.random(self.V) < 0.2] = -math.inf
            logits[rng.integers(1, self.V)] = 0.0  # something stays possible
            self.log_probs[s] = logits - np.log(np.exp(logits).sum())
            for token, log_prob in enumerate(self.log_probs[s].tolist()):
                if log_prob > -math.inf:
                    todo.append(((*s, token), g + log_prob))

    def add_leaf(self, y, g, r):
        self.leaves[y] = g
        self.rewards[y] = r
        for n in range(len(y) + 1):
            prefix = y[:n]
            self.pi[prefix] += math.exp(g)
            self.exp_reward[prefix] += math.exp(g + r / BETA)
            self.best_reward[prefix] = max(r, self.best_reward.get(prefix, r))

    def make_guides(self, rng):
        """{guide: {s: h of the children of s}}."""
        noise = {s: rng.normal() * 1.5 for s in self.pi}  # rises and falls along a path
        bound = {s: self.rewards.get(s, max(REWARDS)) / BETA for s in self.pi}
        h_of = {
            "zero": dict.fromkeys(self.pi, 0.0),
            "constant": dict.fromkeys(self.pi, -1.3),
            # The soft value: log E_pi[exp(r/beta) | s]
            "exact": {s: math.log(self.exp_reward[s] / self.pi[s]) for s in self.pi},
            "bound": bound,
            "reachable": {s: self.best_reward[s] / BETA for s in self.pi},
            "noisy": noise,
        }
        guides = {}
        for name, h in h_of.items():
            guides[name] = {
                s: [h.get((*s, token), IMPOSSIBLE) for token in range(self.V)]
                for s in self.log_probs
            }
        # All children take the h of their parent.
        guides["deferred"] = {s: [noise[s]] for s in self.log_probs}
        return guides

    def order(self, score):
        """The completions, the one with the largest score first."""
        return sorted(self.leaves, key=score, reverse=True)


TABLES = [Table(seed) for seed in (0, 1, 3, 4)]


def expander(tables, guide="zero", asked=None):
    """expand(nodes) for a batch whose problem i lives on tables[i].

    Appends (problem, prefix) of each node to `asked`.
    """

    def expand(nodes):
        prefixes = [(node.problem, tuple(node.tokens())) for node in nodes]
        if asked is not None:
            asked.extend(prefixes)
        log_probs = np.array([tables[i].log_probs[s] for i, s in prefixes])
        h = np.array([tables[i].h[guide][s] for i, s in prefixes])
        return torch.from_numpy(log_probs), torch.from_numpy(h)

    return expand


def run(table, guide="zero", n=1, asked=None, **settings):
    """n independent searches of one table; settings: Options other than those of TABLE_OPTIONS."""
    expand = expander([table] * n, guide, asked)
    return search(root_keys(0, 0, range(n)), expand, replace(TABLE_OPTIONS, **settings))


def paths(tree):
    """The accepted completions, in order."""
    return [tuple(leaf.tokens()) for leaf in tree.leaves]


def leaves_and_paths(tree):
    return zip(tree.leaves, paths(tree))


def proper_prefixes(completions):
    return {y[:n] for y in completions for n in range(len(y))}


def test_the_tables_have_what_the_theorems_need():
    """Guards the tests themselves.

    An easy table (one length, no forbidden token, h that only falls) would hide bugs.
    """
    for table in TABLES:
        assert {len(y) for y in table.leaves} == {1, 2, 3, 4}
        assert len(table.leaves) > 40
        assert abs(sum(math.exp(g) for g in table.leaves.values()) - 1) < 1e-12
        longest = [y for y in table.leaves if len(y) == DEPTH]
        assert {y[-1] == EOS for y in longest} == {True, False}
        assert any(np.isneginf(row).any() for row in table.log_probs.values())
        assert set(table.rewards.values()) == set(REWARDS)
        assert len(set(table.leaves.values())) == len(table.leaves)  # no ties
        assert noisy_h_rises_somewhere(table)


def noisy_h_rises_somewhere(table):
    """Is the h of some possible child above the h of its parent?"""
    h = table.h["noisy"]
    for s in h:
        if s == ():
            continue
        own_h = h[s[:-1]][s[-1]]
        for token in range(table.V):
            if table.log_probs[s][token] > -9 and h[s][token] > own_h:
                return True
    return False


# --------------------------------------------------------------------------------------- Chi-square


def p_value(observed, expected):
    """The p-value of Pearson's statistic.

    observed: counts.  expected: probabilities.  Cells whose expected count is below 5 are pooled.
    """
    assert set(observed) <= set(expected)
    assert abs(sum(expected.values()) - 1) < 1e-9
    n = sum(observed.values())
    pairs = []
    pooled_count = 0
    pooled_expected = 0.0
    for cell, probability in expected.items():
        if n * probability >= 5:
            pairs.append((observed[cell], n * probability))
        else:
            pooled_count += observed[cell]
            pooled_expected += n * probability
    pairs.append((pooled_count, pooled_expected))
    pairs = [(o, e) for o, e in pairs if e > 1]  # the pool itself may be next to empty

    # chi^2 = sum (o - e)^2 / e;   p = Q(degrees of freedom / 2, chi^2 / 2)
    statistic = sum((o - e) ** 2 / e for o, e in pairs)
    half_freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    half_statistic = torch.tensor(statistic / 2, dtype=torch.float64)
    return torch.special.gammaincc(half_freedom, half_statistic).item()


def normalised(log_weights):
    """{y: log w} -> {y: w / sum of w}."""
    total = sum(math.exp(w) for w in log_weights.values())
    return {y: math.exp(w) / total for y, w in log_weights.items()}


def first_leaves(trees):
    return Counter(paths(tree)[0] for tree in trees)


def test_p_value_of_textbook_counts():
    """(30 - 25)^2 / 25 * 2 + 0 + 0 = 2 with 3 degrees of freedom: p = 0.5724 in any table."""
    cells = dict.fromkeys("abcd", 0.25)
    assert abs(p_value(Counter(a=30, b=20, c=25, d=25), cells) - 0.5724) < 1e-4


# -------------------------------------------------------------------------------------------- Noise


def test_mix64_is_splitmix64():
    """Against the published outputs for seed 0.

    A copied sign on >> or a lost overflow changes all of them.
    """
    outputs = mix64(torch.tensor(0), torch.arange(3)).tolist()
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [x % 2**64 for x in outputs] == published


def test_root_keys_name_the_problem_and_not_the_rank():
    """Keys from a problem's place in its batch would change with the number of ranks.

    Or they would repeat on every rank.
    """
    all_keys = root_keys(7, 3, range(6))
    assert root_keys(7, 3, [5, 2]) == [all_keys[5], all_keys[2]]
    keys = set()
    for seed in range(3):
        for iteration in range(3):
            keys.update(root_keys(seed, iteration, range(100)))
    assert len(keys) == 900


def test_gumbel_has_the_moments_of_a_gumbel_and_no_infinities():
    """Mean is Euler's constant, variance pi^2/6; u = 0 or u = 1 would give infinite noise."""
    n = 200_000
    variance = math.pi**2 / 6
    noise = gumbel(mix64(torch.tensor(1), torch.arange(n)))
    assert abs(noise.mean() - 0.577216) < 4 * (variance / n) ** 0.5
    # The excess kurtosis is 12/5, so the variance of a squared deviation is 4.4 variance^2.
    assert abs(noise.var() - variance) < 4 * (4.4 * variance**2 / n) ** 0.5
    assert gumbel(torch.tensor([0, -1, 2**63 - 1, -(2**63)])).isfinite().all()


def test_perturb_agrees_with_the_formula_of_the_paper():
    """The stable form must compute the same as the paper's, and the maximum exactly."""
    g = torch.tensor([[-0.5, -1.0, -3.0, -math.inf]] * 50, dtype=torch.float64)
    keys = mix64(torch.arange(50)[:, None], torch.arange(4))
    G_parent = gumbel(mix64(torch.arange(50), torch.tensor(9)))[:, None]
    noisy = g + gumbel(keys)
    Z = noisy.amax(dim=1, keepdim=True)
    # G = -log( exp(-G_parent) - exp(-Z) + exp(-noisy) )
    naive = -torch.log(torch.exp(-G_parent) - torch.exp(-Z) + torch.exp(-noisy))
    G = perturb(g, keys, G_parent)
    torch.testing.assert_close(G, naive, rtol=0, atol=1e-10)
    assert torch.equal(G.amax(dim=1, keepdim=True), G_parent)
    assert G[:, 3].isneginf().all()


def test_perturb_survives_improbable_prefixes():
    """Deep in a long completion g is in the hundreds below zero: the naive formula overflows."""
    g = torch.tensor([[-900.0, -901.0, -1500.0]], dtype=torch.float64)
    keys = mix64(torch.tensor([[3]]), torch.arange(3))
    G = perturb(g, keys, torch.tensor([[-890.0]], dtype=torch.float64))
    assert G.isfinite().all()
    assert G.max() == -890


# ------------------------------------------------------------------------------- Large vocabularies


def large_vocabulary(scale, unit):
    """log pi (4, 3000): scale 0 is flat, 8 is peaked; unit > 0 makes many logits equal.

    In the first row only five tokens are possible.
    """
    logits = scale * torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    if unit:
        logits = (logits / unit).round() * unit
    logits[0, 5:] = -math.inf
    return logits.log_softmax(dim=-1)


def parents_and_keys():
    """Four parents (g, G, key), and their keys."""
    keys = root_keys(0, 0, range(4))
    parents = []
    for g, key in zip((0.0, -3.0, -40.0, -900.0), keys):
        parents.append((g, g + gumbel(torch.tensor(key)).item(), key))
    return parents, torch.tensor(keys)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale, unit", [(1.0, 0), (8.0, 0), (0.0, 0), (1.0, 0.25)])
def test_a_large_vocabulary_has_the_children_of_a_full_sort(tau, scale, unit):
    """top_children_fast looks closely at few of 3,000 tokens, and returns what top_children does.

    Guards against a child that float32 loses, and against ties broken by whatever topk does.
    """
    log_probs = large_vocabulary(scale, unit)
    h = torch.full((4, 1), 0.7)
    parents, _ = parents_and_keys()
    fast = astar_search.top_children_fast(log_probs, h, parents, tau, 9)
    full = astar_search.top_children(log_probs, h, parents, tau, 9)

    possible = full["f"] > -math.inf
    assert possible[0].sum() == 5
    assert possible[1:].all()
    assert np.array_equal(possible, fast["f"] > -math.inf)
    for name in ("token", "key"):
        assert np.array_equal(fast[name][possible], full[name][possible])
    for name in ("f", "h", "g", "G", "log_prob"):
        np.testing.assert_allclose(fast[name][possible], full[name][possible], rtol=1e-12)


def test_equal_children_come_in_the_order_of_their_tokens():
    """And the screening knows that it cannot tell them apart."""
    log_probs = large_vocabulary(scale=0.0, unit=0)
    parents, keys = parents_and_keys()
    full = astar_search.top_children(log_probs, torch.full((4, 1), 0.7), parents, 0.0, 9)
    assert (full["token"][1:] == np.arange(9)).all()
    _, certain = astar_search.screen_tokens(log_probs, keys, 0.0, 9)
    assert not certain[1:].any()


def test_children_that_float32_cannot_tell_apart():
    """The later a token, the likelier, by 1e-10 each: a screening in float32 cannot be certain."""
    log_probs = (torch.arange(3000, dtype=torch.float64) * 1e-10 - 8).expand(2, 3000)
    parents = [(0.0, 0.0, 1)] * 2
    found = astar_search.top_children_fast(log_probs, torch.zeros(2, 1), parents, 0.0, 9)
    assert (found["token"] == np.arange(2999, 2990, -1)).all()


# -------------------------------------------------------------------------- Theorems 1 and 2: order


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("table", TABLES)
def test_exact_h_gives_leaves_in_the_order_of_the_optimal_policy(table, width):
    """Theorem 1.

    Guards against f on a min-heap, h in the wrong unit or sign, leaves accepted out of turn.
    """
    expected = table.order(lambda y: table.leaves[y] + table.rewards[y] / BETA)
    for K, reason in ((len(expected), "leaves"), (10_000, "exhausted")):
        (tree,) = run(table, "exact", K=K, tau=0.0, width=width)
        assert paths(tree) == expected
        assert tree.stopped == reason


@pytest.mark.parametrize("guide", ["zero", "constant"])
@pytest.mark.parametrize("width", WIDTHS)
def test_constant_h_gives_leaves_in_the_order_of_pi(guide, width):
    """Theorem 2, uniform-cost search.

    An h that is added up along the path, token by token, would favour long completions.
    """
    for table in TABLES:
        (tree,) = run(table, guide, K=10_000, tau=0.0, width=width)
        assert paths(tree) == table.order(table.leaves.get)
        expected_g = [table.leaves[y] for y in paths(tree)]
        assert [leaf.g for leaf in tree.leaves] == pytest.approx(expected_g, abs=1e-12)


# -------------------------------------------------------------------------- Theorems 3 and 4: draws


@pytest.mark.parametrize("table, guide", [(TABLES[0], "zero"), (TABLES[1], "constant")])
def test_gumbel_search_draws_from_pi_without_replacement(table, guide):
    """Theorem 3: the first leaf is distributed as pi, the first two as Plackett-Luce."""
    trees = run(table, guide, n=5000, K=2, tau=1.0)
    pi = normalised(table.leaves)
    assert p_value(first_leaves(trees), pi) > 1e-4
    # p(y, z) = pi(y) pi(z) / (1 - pi(y))
    pairs = {}
    for y in pi:
        for z in pi:
            if y != z:
                pairs[y, z] = pi[y] * pi[z] / (1 - pi[y])
    assert p_value(Counter(tuple(paths(tree)) for tree in trees), pairs) > 1e-4


def unconditioned(g, keys, G_parent):
    """A wrong `perturb`: it forgets that the best child inherits the parent's G."""
    return g + gumbel(keys)


def normal_noise(key):
    """A wrong `gumbel`: noise for which the argmax is not a draw from the softmax."""
    return torch.special.ndtri(torch.exp(-torch.exp(-gumbel(key))))


@pytest.mark.parametrize("name, wrong", [("perturb", unconditioned), ("gumbel", normal_noise)])
def test_the_chi_square_sees_a_wrong_sampler(monkeypatch, name, wrong):
    """The test above would be worth little if these passed it."""
    monkeypatch.setattr(astar_search, name, wrong)
    for table in TABLES[:2]:
        draws = first_leaves(run(table, n=2000, K=1, tau=1.0))
        assert p_value(draws, normalised(table.leaves)) < 1e-4


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("guide", ["bound", "reachable"])
def test_a_bound_as_guide_draws_from_the_optimal_policy(guide, tau):
    """Theorem 4, A* sampling.

    The first leaf is a draw from exp((log pi + r/beta)/tau), which is pi* at tau = 1.
    """
    table = TABLES[1]
    log_optimal = {y: (g + table.rewards[y] / BETA) / tau for y, g in table.leaves.items()}
    draws = first_leaves(run(table, guide, n=2000, K=1, tau=tau))
    assert p_value(draws, normalised(log_optimal)) > 1e-4
    assert p_value(draws, normalised(table.leaves)) < 1e-4  # and it can tell pi* from pi


def test_tau_is_a_temperature():
    """f = (1 - tau) g + tau G + h draws from exp((log pi + h)/tau).

    Not tested at tau = 0.5: there a formula that swaps tau and 1 - tau would pass.
    """
    table = TABLES[0]
    tau = 0.3
    draws = first_leaves(run(table, "constant", n=4000, K=1, tau=tau))
    log_tempered = {y: g / tau for y, g in table.leaves.items()}
    assert p_value(draws, normalised(log_tempered)) > 1e-4
    assert p_value(draws, normalised(table.leaves)) < 1e-4


# ------------------------------------------------------------------------------- Theorem 5: weights


@functools.cache
def gumbel_searches(table, K):
    """2,500 searches under a constant h at tau = 1, made once for all tests that look at them."""
    return run(table, "constant", n=2500, K=K, tau=1.0)


def standard_errors_off(estimates, exact):
    """Distance of the mean of the estimates from `exact`, in standard errors of the mean."""
    error = np.std(estimates) / len(estimates) ** 0.5
    return abs(np.mean(estimates) - exact) / error


def weighted_leaves(trees):
    """[(completion, weight pi/q), ...] of each search."""
    return [[(y, leaf.weight) for leaf, y in leaves_and_paths(tree)] for tree in trees]


def bias(table, searches, least=0.0):
    """Bias of sum (pi/q) r and of sum pi/q over the leaves, the larger one, in standard errors.

    searches: [(completion, weight), ...] of each.  Only completions with pi > least count.
    """
    common = [y for y, g in table.leaves.items() if math.exp(g) > least]
    rewards = {y: table.rewards[y] for y in common}
    ones = dict.fromkeys(common, 1.0)
    worst = 0.0
    for values in (rewards, ones):
        exact = sum(math.exp(table.leaves[y]) * value for y, value in values.items())
        estimates = []
        for leaves in searches:
            estimates.append(sum(weight * values.get(y, 0) for y, weight in leaves))
        worst = max(worst, standard_errors_off(estimates, exact))
    return worst


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize("table", TABLES[:2])
def test_weighted_leaves_are_unbiased(table, K):
    """Theorem 5: sum of (pi/q) r over K leaves has the mean E_pi[r], and sum of pi/q the mean 1."""
    trees = gumbel_searches(table, K)
    assert bias(table, weighted_leaves(trees)) < 4


@pytest.mark.parametrize("tau", [0.5, 0.8])
def test_weighted_leaves_are_unbiased_at_other_temperatures(tau):
    """Below tau = 1 an inner key is only a bound.

    With kappa from an inner node all weights would be a fifth too large.  Only leaves with
    pi > 0.02 are counted.  The others are drawn too rarely, with too large weights, for a standard
    error to be known.
    """
    trees = run(TABLES[0], "constant", n=2500, K=3, tau=tau)
    assert bias(TABLES[0], weighted_leaves(trees), least=0.02) < 4


@pytest.mark.parametrize("table", TABLES[:2])
def test_a_perturbed_phi_is_biased(table):
    """A plausible bug, which the tests above must see.

    With its perturbed key as phi, a leaf that was lucky counts as one that was likely.
    """
    searches = []
    for tree in gumbel_searches(table, K=2):
        kappa = -tree.queue[0][0]
        wrong = []
        for leaf, y in leaves_and_paths(tree):
            log_q = log_inclusion(leaf.G + leaf.h, kappa, 1.0)
            wrong.append((y, math.exp(leaf.g - log_q)))
        searches.append(wrong)
    assert bias(table, searches) > 8


def gumbel_but_not_at_the_root(key):
    """A wrong `gumbel`: 0 for the key of a root, which comes as a scalar."""
    if key.ndim == 0:
        return torch.tensor(0.0)
    return gumbel(key)


@pytest.mark.parametrize("table", TABLES[:2])
def test_a_fixed_root_gumbel_is_biased(monkeypatch, table):
    """With G(root) = 0 the leaves are the same draws, but their threshold kappa is another.

    Only the weights show it.
    """
    monkeypatch.setattr(astar_search, "gumbel", gumbel_but_not_at_the_root)
    trees = run(table, "constant", n=2500, K=2, tau=1.0)
    assert p_value(first_leaves(trees), normalised(table.leaves)) > 1e-4
    assert bias(table, weighted_leaves(trees)) > 8


def test_inclusion_by_hand():
    """Keys are Gumbel(phi), so P(key > kappa) = 1 - exp(-exp(phi - kappa)); tau divides both."""
    assert log_inclusion(-2.0, -2.0, 1.0) == pytest.approx(math.log(1 - 1 / math.e))
    by_hand = math.log(1 - math.exp(-math.exp(-2.0)))
    assert log_inclusion(-2.0, -1.0, 0.5) == pytest.approx(by_hand)
    # Here 1 - exp(-x) would be 0 in floating point.
    assert log_inclusion(-30.0, 0.0, 1.0) == pytest.approx(-30.0, rel=1e-9)
    assert log_inclusion(-2.0, -math.inf, 1.0) == 0.0
    assert log_inclusion(-2.0, -2.0, 0.0) == 0.0
    assert log_inclusion(5000.0, 0.0, 1.0) == 0.0


def same_row(row):
    """expand(nodes) of a policy that is the same everywhere, and h = 0.  row: log pi (V,)."""

    def expand(nodes):
        return row.expand(len(nodes), -1), torch.zeros(len(nodes), 1)

    return expand


def test_weights_without_noise_are_shares_of_pi():
    """At tau = 0 each leaf is weighted by its share of the leaves' pi.

    By hand for likely leaves.  Leaves of log pi -200, -201, -201 and -202, less than float32 holds,
    have the shares of 0, -1, -1 and -2: guards against 0/0.
    """
    likely = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    unlikely = torch.tensor([-100.0, -101.0, -110.0], dtype=torch.float64)
    options = Options(eos=(9,), K=4, tau=0.0, max_new_tokens=2)
    weights = []
    for row in (likely, unlikely):
        (tree,) = search(root_keys(0, 0, [0]), same_row(row), options)
        weights.append(torch.tensor([leaf.weight for leaf in tree.leaves]))
    assert torch.allclose(weights[0], torch.tensor([0.25, 0.15, 0.15, 0.1]) / 0.65)
    assert torch.allclose(weights[1], torch.tensor([0.0, -1.0, -1.0, -2.0]).softmax(dim=0))


def test_weights_of_leaves_too_long_for_a_float():
    """pi of 800 tokens is 0 in float64, and so is q; pi/q is not.

    Guards against 0/0.  pi is uniform here, so the two leaves have equal and finite weights.
    """
    row = torch.full((3,), -math.log(3.0), dtype=torch.float64)
    (tree,) = search([1], same_row(row), Options(eos=(9,), K=2, max_new_tokens=800))
    one, other = tree.leaves
    assert math.exp(one.g) == 0.0
    assert one.weight == pytest.approx(other.weight)
    assert 0 < one.weight < math.inf
    # q ~ exp(log pi - kappa), so pi/q ~ exp(kappa)
    kappa = -tree.queue[0][0]
    assert one.weight == pytest.approx(math.exp(kappa))


# ---------------------------------------------------------------------------- Theorem 8: invariance


def facts(tree):
    """All that a search reports of one problem, floats to the last bit."""
    leaves = []
    for leaf, y in leaves_and_paths(tree):
        leaves.append((y, leaf.f, leaf.g, leaf.weight, leaf.truncated))
    return {
        "leaves": leaves,
        "pops": tree.pops,
        "stopped": tree.stopped,
        "mass": tree.mass,
        "pruned": tree.pruned,
    }


def assert_invariant(guide, **settings):
    """Search every table alone, in a batch and in the reversed batch, at every width.

    Each problem keeps its own key.  All facts must be the same.  Returns them, one dict a table.
    """
    N = len(TABLES)
    keys = root_keys(5, 1, range(N))

    def search_rows(rows, width):
        expand = expander([TABLES[i] for i in rows], guide)
        options = replace(TABLE_OPTIONS, width=width, **settings)
        return [facts(tree) for tree in search([keys[i] for i in rows], expand, options)]

    alone = [search_rows([i], width=1)[0] for i in range(N)]
    for width in (1, 2, 7, 64):
        assert search_rows(range(N), width) == alone
        assert search_rows(range(N)[::-1], width) == alone[::-1]
    return alone


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("guide", ["zero", "exact", "bound", "deferred", "noisy"])
def test_width_and_batch_change_nothing(guide, tau):
    """Theorem 8.

    Seen before: leaves accepted out of turn, so that short answers win; noise by order of arrival.
    """
    assert_invariant(guide, tau=tau, K=6)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("guide", ["deferred", "noisy"])
@pytest.mark.parametrize(
    "bound, reason",
    [
        ({"max_nodes": 7}, "max_nodes"),
        ({"cover": 0.1}, "covered"),
        ({"max_open": 3}, "leaves"),
        ({"max_open": 2, "max_nodes": 6}, "max_nodes"),
    ],
)
def test_width_and_batch_change_nothing_under_bounds(guide, tau, bound, reason):
    """Bounds count pops.  If they counted evaluated nodes, a wider search would stop earlier."""
    found = assert_invariant(guide, tau=tau, K=8, **bound)
    assert reason in [facts["stopped"] for facts in found]  # the bound was active
    assert any(facts["pruned"] for facts in found) == ("max_open" in bound)


def has_three_tokens(leaf):
    return leaf.depth == 3


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("guide", ["zero", "deferred"])
def test_until_ends_a_search_with_the_first_leaf_that_it_accepts(guide, tau):
    """The leaves are those of the undisturbed search, up to the first for which `until` is true.

    That holds at every width and in every batch.  With h = 0 and tau = 1 the best key left behind
    is that of the leaf that would have come next.  Guards against asking about leaves that were
    only evaluated and not accepted.  Guards also against a return before the last leaf's sibling is
    queued, which would lower kappa and with it every weight.
    """
    assert_invariant(guide, tau=tau, K=10, until=has_three_tokens)
    compared_keys = 0
    for table in TABLES:
        whole_trees = run(table, guide, n=8, tau=tau, K=10)
        cut_trees = run(table, guide, n=8, tau=tau, K=10, until=has_three_tokens)
        for whole, cut in zip(whole_trees, cut_trees):
            places = [i for i, y in enumerate(paths(whole)) if len(y) == 3]
            if not places:
                assert cut.stopped == "leaves"
                assert paths(cut) == paths(whole)
                continue
            n = places[0] + 1
            assert cut.stopped == "done"
            assert paths(cut) == paths(whole)[:n]
            if n < 10 and guide == "zero" and tau == 1:
                compared_keys += 1
                kappa = -cut.queue[0][0]
                assert kappa == pytest.approx(whole.leaves[n].f, abs=1e-9)
    assert compared_keys > 0 or (guide, tau) != ("zero", 1)


def is_never_right(leaf):
    return False


def random_bounds(rng):
    """Bounds of a search that may end for any reason, drawn at random."""
    return {
        "K": int(rng.choice([2, 6, 1000])),
        "max_nodes": int(rng.choice([5, 1 << 30, 1 << 30])),
        "max_open": int(rng.choice([3, 1 << 30])),
        "cover": float(rng.choice([0.2, math.inf, math.inf])),
    }


def search_and_note(n, guide, until, **settings):
    """(the tree of search n, the leaves that `until` was asked about)."""
    judged = []

    def until_and_note(leaf):
        judged.append(leaf)
        return until(leaf)

    options = replace(TABLE_OPTIONS, until=until_and_note, **settings)
    (tree,) = search([n], expander([TABLES[n % len(TABLES)]], guide), options)
    return tree, judged


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("guide", ["zero", "deferred", "noisy"])
def test_every_width_finds_what_width_1_finds(guide, tau):
    """40 searches under bounds drawn at random: all facts are those of width 1.

    And `until` is asked about the accepted leaves alone.  Guards against a run-ahead whose pops or
    leaves are counted as those of the search, or whose entries get into its queue.
    """
    rng = np.random.default_rng(0)
    reasons = Counter()
    for n in range(40):
        bounds = random_bounds(rng)
        until = has_three_tokens if n % 2 else is_never_right
        expected = None
        for width in (1, 2, 4, 8, 16):
            tree, judged = search_and_note(n, guide, until, tau=tau, width=width, **bounds)
            assert judged == tree.leaves
            if width == 1:
                expected = facts(tree)
            assert facts(tree) == expected, (width, bounds)
        reasons[tree.stopped] += 1
    assert set(reasons) == {"leaves", "covered", "max_nodes", "done", "exhausted"}


class CheckedTree(astar_search.Tree):
    """A search that checks what it asks for, and counts rounds and the work of the run-ahead."""

    def __init__(self, problem, key, options):
        super().__init__(problem, key, options)
        self.rounds = 0
        self.pops_ahead = 0

    def next_to_evaluate(self):
        nodes = super().next_to_evaluate()
        self.rounds += 1
        head = self.queue[0][1]
        needed = self.unevaluated(head)
        assert nodes[: len(needed)] == needed
        assert len(set(nodes)) == len(nodes)
        new = [node for node in nodes if node.children is None]
        assert len(new) <= self.options.width
        for node in nodes:
            if node in new:
                assert node in needed or node.f >= head.f - math.log(self.options.width)
            else:  # it is asked again for more children, because one of the searches needs them
                assert not node.has_all_children
                assert (node, len(node.children) - 1) in self.nodes
        if self.options.width == 1:
            assert nodes == needed
        return nodes

    def queue_ahead(self, successors, nodes):
        self.pops_ahead += 1
        super().queue_ahead(successors, nodes)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("K", [2, 8])
def test_no_node_is_evaluated_twice_without_need(K, tau):
    """At width 1 exactly the nodes that are popped are evaluated, in that order.

    At other widths the model runs on each node once too.  A node is asked again only if all of its
    known children are queued and it has more.  With K = 8 they are all known, so none is.  No asked
    node is more than log(width) below the head.
    """
    for table in TABLES:
        for guide in ("constant", "noisy"):
            for width in (1, 2, 8):
                asked = []
                options = replace(TABLE_OPTIONS, K=K, tau=tau, width=width)
                expand = expander([table], guide, asked)
                (tree,) = search([3], expand, options, CheckedTree)
                assert K < 8 or len(asked) == len(set(asked))
                if width == 1:
                    assert len(set(asked)) == tree.pops


def deep_language(nodes):
    """expand of a language of 4 tokens that is peaked, another one below each prefix.  h = 0."""
    keys = torch.tensor([node.key for node in nodes])
    logits = 3 * gumbel(mix64(keys[:, None], torch.arange(4)))
    return logits.log_softmax(dim=-1), torch.zeros(len(nodes), 1)


@pytest.mark.parametrize(
    "tau, bounds, rounds_share, most_evaluated",
    [
        (0.0, {}, 0.3, 1.0),
        (1.0, {}, 0.3, 1.15),
        # The wasted nodes of a small bound: without the bound they are 3.5, 4.0 and 1.27.
        (0.0, {"K": 1000, "max_open": 3}, 0.4, 1.6),
        (1.0, {"K": 1000, "max_nodes": 9}, 1.0, 2.5),
        (1.0, {"K": 1000, "cover": 0.3}, 0.3, 1.2),
    ],
)
def test_the_run_ahead_saves_rounds(tau, bounds, rounds_share, most_evaluated):
    """8 leaves of 12 tokens, 20 searches: at width 8 three tenths of the rounds of width 1.

    Speculation that stops one node below the queue has more than half of them.  The run-ahead obeys
    the bounds of the search, so few nodes are evaluated in vain.  And it pops a node once: guards
    against one that goes through all that is known ahead in every round, which is quadratic.
    """
    rounds = {}
    evaluated = {}
    for width in (1, 8):
        asked = []

        def expand(nodes, asked=asked):
            asked.extend(nodes)
            return deep_language(nodes)

        options = replace(Options(eos=(), K=8, tau=tau, max_new_tokens=12), width=width, **bounds)
        trees = search(root_keys(0, 0, range(20)), expand, options, CheckedTree)
        for tree in trees:
            assert tree.pruned or tree.pops_ahead <= tree.rounds + len(tree.nodes)
        rounds[width] = sum(tree.rounds for tree in trees)
        evaluated[width] = len(asked)
    assert rounds[8] <= rounds_share * rounds[1]
    assert evaluated[1] <= evaluated[8] <= most_evaluated * evaluated[1]


def test_speculation_only_adds():
    """A wider search evaluates what width 1 evaluates and perhaps more.

    With one leaf wanted it evaluates nothing more.
    """
    added = 0
    for table in TABLES:
        narrow = []
        wide = []
        (narrow_tree,) = run(table, "noisy", K=6, width=1, asked=narrow)
        (wide_tree,) = run(table, "noisy", K=6, width=7, asked=wide)
        assert narrow_tree.pops == wide_tree.pops == len(set(narrow))
        assert set(narrow) <= set(wide)
        added += len(set(wide) - set(narrow))
        one = []
        many = []
        run(table, "noisy", K=1, width=1, asked=one)
        run(table, "noisy", K=1, width=64, asked=many)
        assert one == many
    assert added > 0


# -------------------------------------------------------------------------------- Theorem 15: price


@pytest.mark.parametrize("K", [1, 3, 8])
def test_gumbel_search_opens_only_prefixes_of_its_leaves(K):
    """Theorem 15: the search costs as little as sampling with shared prefixes.

    To expand children at once, or to ask for more of them, would cost more.
    """
    asked = []
    trees = run(TABLES[2], "constant", n=50, K=K, tau=1.0, asked=asked)
    for row, tree in enumerate(trees):
        opened = [s for problem, s in asked if problem == row]
        assert len(opened) == len(set(opened)) == tree.pops
        assert set(opened) == proper_prefixes(paths(tree))


# ----------------------------------------------------------------------- Every child can be reached


def textbook_search(table, guide, key, options):
    """Best-first search as in a textbook: (leaves, number of expanded nodes).

    Every child is queued at once.  There are no siblings that wait, no rounds and no batch.
    """
    tau = options.tau
    root_G = gumbel(torch.tensor(key)).item()
    queue = [(-math.inf, (), 0.0, root_G, key)]
    leaves = []
    pops = 0
    mass = 0.0
    more_leaves = options.K
    while queue and more_leaves > 0:
        if not is_leaf(queue[0][1]) and pops >= options.max_nodes:
            break
        _, s, g, G, key = heapq.heappop(queue)
        if is_leaf(s):
            leaves.append(s)
            more_leaves -= 1
            covered_before = mass >= options.cover
            mass += math.exp(g)
            if mass >= options.cover and not covered_before:
                # At tau = 1 one more leaf stands for the rest of pi.
                more_leaves = min(more_leaves, 1 if tau == 1 else 0)
            continue
        pops += 1
        child_g = g + torch.from_numpy(table.log_probs[s])
        keys = mix64(torch.tensor(key), torch.arange(table.V))
        G_parent = torch.tensor([[G]], dtype=torch.float64)
        child_G = perturb(child_g[None], keys[None], G_parent)[0]
        h = torch.tensor(table.h[guide][s], dtype=torch.float64).expand(table.V)
        noise = tau * child_G if tau > 0 else 0.0
        f = (1 - tau) * child_g + noise + h
        columns = zip(f.tolist(), child_g.tolist(), child_G.tolist(), keys.tolist())
        for token, (f_child, g_child, G_child, key_child) in enumerate(columns):
            if g_child > -math.inf:
                heapq.heappush(queue, (-f_child, (*s, token), g_child, G_child, key_child))
    return leaves, pops


@pytest.mark.parametrize("bounds", [{}, {"max_nodes": 5}, {"cover": 0.05}])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_search_equals_the_textbook(tau, bounds):
    """With K + 1 < V children known, later siblings must be asked for.

    None of them may be lost, and none may come late.
    """
    asked_again = 0
    for seed in range(4):
        table = Table(seed, V=6)
        for guide in ("noisy", "deferred", "exact"):
            for K in (1, 2, 3):
                asked = []
                options = replace(TABLE_OPTIONS, tau=tau, K=K, **bounds)
                (tree,) = search([seed], expander([table], guide, asked), options)
                leaves, pops = textbook_search(table, guide, seed, options)
                assert paths(tree) == leaves
                # For 0 < tau < 1 the weights may need the key of one more leaf.
                assert tree.pops == pops or 0 < tau < 1
                asked_again += len(asked) - len(set(asked))
    assert asked_again > 0


def log_or_minus_infinity(p):
    return math.log(p) if p > 0 else -math.inf


def by_hand(rows, h):
    """expand(nodes) from {prefix: probabilities} and {prefix: h of its children}."""

    def expand(nodes):
        prefixes = [tuple(node.tokens()) for node in nodes]
        log_probs = [[log_or_minus_infinity(p) for p in rows[s]] for s in prefixes]
        return torch.tensor(log_probs).double(), torch.tensor([h[s] for s in prefixes]).double()

    return expand


@pytest.mark.parametrize("width", WIDTHS)
def test_the_last_sibling_is_reached(width):
    """K = 1, so only 2 of 6 children are known at first, and the best leaf is the last one.

    Five siblings look better (h = 5 and more), but below them h is -50.
    """
    rows = {(): [1 / 6] * 6}
    h = {(): [0.0, 6.0, 7.0, 8.0, 9.0, 10.0]}
    for token in range(1, 6):
        rows[token,] = [0.5, 0.5, 0, 0, 0, 0]
        h[token,] = [-50.0] * 6
    options = replace(TABLE_OPTIONS, K=1, tau=0.0, width=width, max_new_tokens=2)
    (tree,) = search([1], by_hand(rows, h), options)
    assert paths(tree) == [(EOS,)]
    assert tree.pops == 6


def test_ties_break_by_path():
    """16 leaves of equal f: without a rule their order would depend on the heap's history."""
    prefixes = [(), (1,), (2,), (3,), (4,)]
    rows = {s: [0, 0.25, 0.25, 0.25, 0.25] for s in prefixes}
    expand = by_hand(rows, {s: [0.0] for s in prefixes})
    every = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    for K in (2, 10, 16):
        for width in WIDTHS:
            options = replace(TABLE_OPTIONS, K=K, tau=0.0, width=width, max_new_tokens=2)
            (tree,) = search([1], expand, options)
            assert paths(tree) == every[:K]


# ------------------------------------------------------------------------------- Bounds and reasons


def test_max_new_tokens_marks_the_leaves_that_it_cuts():
    """A cut completion must never count as finished.

    One whose last allowed token is EOS is finished.
    """
    table = TABLES[0]
    for cut in (1, 3):
        (tree,) = run(table, K=10_000, max_new_tokens=cut)
        below = {y[:cut] for y in table.leaves}
        assert set(paths(tree)) == below
        assert len(tree.leaves) == len(below)
        for leaf, y in leaves_and_paths(tree):
            assert leaf.truncated == (y[-1] != EOS)
        assert (EOS,) in below or cut > 1
        assert tree.mass == pytest.approx(1.0)  # a cut leaf holds all the mass below it


def test_max_nodes_returns_what_was_found_so_far():
    """The bound ends the search and loses no leaf.

    Leaves at the head of the queue are still accepted, because they cost nothing.
    """
    for table in TABLES:
        (free,) = run(table, "noisy", K=10_000)
        for bound in (0, 1, 5, 20):
            (tree,) = run(table, "noisy", K=10_000, max_nodes=bound)
            assert tree.pops == bound
            assert tree.stopped == "max_nodes"
            assert paths(tree) == paths(free)[: len(tree.leaves)]
        assert len(tree.leaves) > 0


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_cover_stops_as_soon_as_the_mass_is_reached(tau):
    """Not a leaf earlier, not a leaf later; at tau = 1 with one more leaf, for the rest of pi."""
    for table in TABLES:
        (tree,) = run(table, K=10_000, tau=tau, cover=0.8)
        masses = [math.exp(table.leaves[y]) for y in paths(tree)]
        assert tree.stopped == "covered"
        assert tree.mass == pytest.approx(sum(masses))
        if tau == 1:
            masses.pop()
        assert sum(masses[:-1]) < 0.8 <= sum(masses)


def test_an_exhausted_search_has_found_everything():
    """Then nothing was left out, every q is 1, and the weights are pi itself."""
    table = TABLES[3]
    for tau in (0.0, 1.0):
        (tree,) = run(table, "noisy", K=10_000, tau=tau)
        assert tree.stopped == "exhausted"
        assert sorted(paths(tree)) == sorted(table.leaves)
        pi = [table.pi[y] for y in paths(tree)]
        assert [leaf.weight for leaf in tree.leaves] == pytest.approx(pi)


def test_a_beam_of_K_loses_nothing_when_h_is_constant():
    """Each entry of the queue is as good as its best leaf.

    So the K best entries lead to the K best leaves.
    """
    for table in TABLES:
        free = run(table, "constant", n=20, K=5)
        beam = run(table, "constant", n=20, K=5, max_open=5)
        assert [paths(tree) for tree in beam] == [paths(tree) for tree in free]
        pruned = [tree for tree in beam if tree.pruned]
        assert pruned
        assert all(len(tree.queue) <= 5 for tree in beam)
        for tree in pruned:  # kappa was forgotten, so each leaf has its share of the leaves' pi
            shares = torch.tensor([leaf.g for leaf in tree.leaves]).softmax(dim=0).tolist()
            assert [leaf.weight for leaf in tree.leaves] == pytest.approx(shares)


def test_a_narrow_beam_forgets():
    """max_open = 1 by hand.

    1 (0.6) is opened; of its child 11 (0.3) and its sibling 2 (0.4) only the better one stays.
    """
    rows = {(): [0, 0.6, 0.4], (1,): [0, 0.5, 0.5], (2,): [0, 0.9, 0.1]}
    expand = by_hand(rows, {s: [0.0] for s in rows})
    options = replace(TABLE_OPTIONS, K=9, tau=0.0, max_open=1, max_new_tokens=2)
    (tree,) = search([1], expand, options)
    assert paths(tree) == [(2, 1), (2, 2)]
    assert tree.stopped == "exhausted"
    assert tree.pruned


def test_no_problems_is_no_search():
    """A rank may be left without a problem."""
    assert search([], expander([]), TABLE_OPTIONS) == []


@pytest.mark.parametrize("search_or_sample", [search, sample])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_nan_stops_the_search(search_or_sample, tau):
    """NaN compares false with everything: a heap that holds one returns nonsense without a word."""
    row = torch.full((5,), math.nan)
    with pytest.raises(FloatingPointError):
        search_or_sample([1, 2], same_row(row), replace(TABLE_OPTIONS, tau=tau))


def test_nan_in_h_stops_the_search():
    """One child's NaN from the value head is enough."""
    table = Table(0)
    most_probable = int(np.argmax(table.log_probs[()]))
    table.h["noisy"][()][most_probable] = math.nan
    with pytest.raises(FloatingPointError):
        run(table, "noisy", K=10_000)


# ----------------------------------------------------------------------------------------- Sampling


def sampled_counts(table):
    """How often 8 chains in each of 800 problems end in each completion."""
    options = replace(TABLE_OPTIONS, K=8)
    trees = sample(root_keys(0, 0, range(800)), expander([table] * 800), options)
    draws = Counter()
    for tree in trees:
        for leaf, y in leaves_and_paths(tree):
            draws[y] += leaf.count
    return draws


def test_sampling_draws_from_pi():
    """All 6,400 chains are independent: chains that share noise would come in lumps."""
    for table in TABLES[:2]:
        draws = sampled_counts(table)
        assert sum(draws.values()) == 6400
        assert p_value(draws, normalised(table.leaves)) > 1e-4


def mix64_with_one_key_for_all_chains(key, a):
    """A wrong `mix64`: the numbers of chains, which are negative, all become -2."""
    if (a < 0).all():
        a = torch.full_like(a, -2)
    return mix64(key, a)


def test_the_chi_square_sees_chains_that_share_noise(monkeypatch):
    """If all chains of a problem had one key, it would return one completion 8 times."""
    monkeypatch.setattr(astar_search, "mix64", mix64_with_one_key_for_all_chains)
    draws = sampled_counts(TABLES[0])
    assert sum(draws.values()) == 6400
    assert p_value(draws, normalised(TABLES[0].leaves)) < 1e-4


def test_sampling_runs_each_prefix_once():
    """The comparison with the search is fair only if chains of the same prefix share its node."""
    asked = []
    options = replace(TABLE_OPTIONS, K=30)
    trees = sample(root_keys(0, 0, range(4)), expander(TABLES, asked=asked), options)
    assert len(asked) == len(set(asked))
    for row, tree in enumerate(trees):
        assert {s for problem, s in asked if problem == row} == proper_prefixes(paths(tree))
        assert len(set(paths(tree))) == len(tree.leaves) < 30
        assert sum(leaf.count for leaf in tree.leaves) == 30
        for leaf, y in leaves_and_paths(tree):
            assert leaf.weight == leaf.count / 30
            assert leaf.truncated == (y[-1] != EOS)
            assert abs(leaf.g - TABLES[row].leaves[y]) < 1e-12


def test_sampling_does_not_depend_on_the_batch():
    """Noise drawn in order of arrival would change a problem's samples with its neighbours."""
    N = len(TABLES)
    keys = root_keys(5, 1, range(N))

    def sample_rows(rows):
        expand = expander([TABLES[i] for i in rows])
        trees = sample([keys[i] for i in rows], expand, replace(TABLE_OPTIONS, K=8))
        return [[(y, leaf.count) for leaf, y in leaves_and_paths(tree)] for tree in trees]

    alone = [sample_rows([i])[0] for i in range(N)]
    assert sample_rows(range(N)) == alone
    assert sample_rows(range(N)[::-1]) == alone[::-1]
    assert len({tuple(counts) for counts in alone}) == N


def test_greedy_takes_the_argmax():
    """One leaf, whatever K and the key are."""
    for table in TABLES:
        s = ()
        while not is_leaf(s):
            s = (*s, int(np.argmax(table.log_probs[s])))
        options = replace(TABLE_OPTIONS, K=8)
        (tree,) = sample([123], expander([table]), options, greedy=True)
        assert paths(tree) == [s]
        assert tree.leaves[0].count == 1
        assert tree.leaves[0].weight == 1.0


# ----------------------------------------------------------------------------------- The file alone


def test_the_file_runs_alone(tmp_path):
    """astar_search.py needs no sibling: copied into an empty folder it still runs its demo."""
    shutil.copy(astar_search.__file__, tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "astar_search.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("open 1  (root)") == 3  # three searches
    assert result.stdout.count("\nleaf 4  ") == 3
