"""The theorems of the search, on tables small enough to enumerate every completion.

A table is a random language of 5 tokens: log pi(.|s) for every prefix s, some rows peaked, some flat, a fifth of the
tokens impossible, completions of 1 to 4 tokens, of which those without EOS are cut.  The reference is always brute
force over all completions, or a textbook search that queues every child at once.  All seeds are fixed: a chi-square
test passes if its p-value is above 1e-4, and beside each stands a planted wrong sampler that must fall below.
"""

import heapq
import math
from collections import Counter

import numpy as np
import pytest
import torch

import astar_search
from astar_search import Options, gumbel, log_inclusion, mix64, perturb, root_keys, sample, search

EOS, DEPTH, BETA = 0, 4, 0.5
REWARDS = (-1.0, 0.2, 1.0)  # three values: with two, h from V would look exact as well
WIDTHS = (1, 2, 7)
IMPOSSIBLE = 99.0  # h of a child that pi forbids: a search that looks at it goes astray

# ====================================================================================================== tables


def is_leaf(s):
    return s[-1:] == (EOS,) or len(s) == DEPTH


class Table:
    """logp[s]: log pi(.|s) (V,);  leaves[y]: log pi(y);  r[y]: reward;  h[guide][s]: h of the children of s."""

    def __init__(self, seed, V=5):
        rng = np.random.default_rng(seed)
        self.logp, self.leaves, self.r = {}, {}, {}
        total, best = Counter(), {}  # of the leaves below s: sum of pi exp(r/beta), largest r
        self.pi = Counter()  # pi(s), summed from the leaves up
        todo = [((), 0.0)]
        while todo:
            s, g = todo.pop()
            if is_leaf(s):
                self.leaves[s], self.r[s] = g, r = g, float(rng.choice(REWARDS))
                for prefix in (s[:n] for n in range(len(s) + 1)):
                    self.pi[prefix] += math.exp(g)
                    total[prefix] += math.exp(g + r / BETA)
                    best[prefix] = max(r, best.get(prefix, r))
                continue
            logits = rng.normal(size=V) * rng.choice([0.3, 2.5])  # flat or peaked
            logits[rng.random(V) < 0.2] = -math.inf
            logits[rng.integers(1, V)] = 0.0  # something stays possible
            self.logp[s] = logits - np.log(np.exp(logits).sum())
            todo += [((*s, a), g + step) for a, step in enumerate(self.logp[s].tolist()) if step > -math.inf]

        noise = {s: rng.normal() * 1.5 for s in self.pi}  # rises and falls along a path
        guides = {
            "zero": lambda s: 0.0,
            "constant": lambda s: -1.3,
            "exact": lambda s: math.log(total[s] / self.pi[s]),  # soft value: log E_pi[exp(r/beta) | s]
            "bound": lambda s: (self.r[s] if is_leaf(s) else max(REWARDS)) / BETA,
            "reachable": lambda s: best[s] / BETA,
            "noisy": noise.get,
        }
        known = lambda h, s: h(s) if s in self.pi else IMPOSSIBLE
        self.h = {name: {s: [known(h, (*s, a)) for a in range(V)] for s in self.logp} for name, h in guides.items()}
        self.h["deferred"] = {s: [noise[s]] for s in self.logp}  # (n, 1): all children take their parent's h

    def order(self, score):
        return sorted(self.leaves, key=score, reverse=True)


TABLES = [Table(seed) for seed in (0, 1, 3, 4)]


def expander(tables, guide="zero", asked=None):
    """expand(nodes) for a batch whose problem i lives on tables[i].  Appends (problem, prefix) to `asked`."""

    def expand(nodes):
        where = [(node.problem, tuple(node.path())) for node in nodes]
        if asked is not None:
            asked.extend(where)
        logp = np.array([tables[i].logp[s] for i, s in where])
        h = np.array([tables[i].h[guide][s] for i, s in where])
        return torch.from_numpy(logp), torch.from_numpy(h)

    return expand


def options(**settings):
    return Options(**{"eos": (EOS,), "max_new_tokens": DEPTH, **settings})


def run(table, guide="zero", n=1, asked=None, **settings):
    """n independent searches of one table."""
    return search(root_keys(0, 0, range(n)), expander([table] * n, guide, asked), options(**settings))


def paths(tree):
    return [tuple(leaf.path()) for leaf in tree.leaves]


def proper_prefixes(completions):
    return {y[:n] for y in completions for n in range(len(y))}


def test_the_tables_have_what_the_theorems_need():
    """Guards the tests themselves: an easy table (one length, no forbidden token, monotone h) hides bugs."""
    for table in TABLES:
        assert {len(y) for y in table.leaves} == {1, 2, 3, 4} and len(table.leaves) > 40
        assert abs(sum(map(math.exp, table.leaves.values())) - 1) < 1e-12
        assert {y[-1] == EOS for y in table.leaves if len(y) == DEPTH} == {True, False}
        assert any(np.isneginf(row).any() for row in table.logp.values()) and set(table.r.values()) == set(REWARDS)
        noisy = table.h["noisy"]
        assert any(noisy[s][a] > noisy[s[:-1]][s[-1]] for s in noisy if s for a in range(5) if table.logp[s][a] > -9)
        assert len(set(table.leaves.values())) == len(table.leaves)  # no ties


# ================================================================================================== chi-square


def p_value(observed, expected):
    """Of Pearson's statistic.  observed: counts; expected: probabilities.  Cells expecting < 5 are pooled."""
    n = sum(observed.values())
    assert set(observed) <= set(expected) and abs(sum(expected.values()) - 1) < 1e-9
    small = [cell for cell, p in expected.items() if n * p < 5]
    cells = [(observed[cell], n * p) for cell, p in expected.items() if n * p >= 5]
    cells.append((sum(observed[cell] for cell in small), n * sum(expected[cell] for cell in small)))
    cells = [(o, e) for o, e in cells if e > 1]  # the pool itself may be next to empty
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(*half).item()


def normalised(log_weights):
    """{y: log w} -> {y: w / sum of w}."""
    total = sum(map(math.exp, log_weights.values()))
    return {y: math.exp(w) / total for y, w in log_weights.items()}


def first_leaves(trees):
    return Counter(paths(tree)[0] for tree in trees)


def test_p_value_of_textbook_counts():
    """(30 - 25)^2 / 25 * 2 + 0 + 0 = 2 with 3 degrees of freedom: p = 0.5724 in any table."""
    cells = dict.fromkeys("abcd", 0.25)
    assert abs(p_value(Counter(a=30, b=20, c=25, d=25), cells) - 0.5724) < 1e-4


# ======================================================================================================= noise


def test_mix64_is_splitmix64():
    """Against the published outputs for seed 0: a copied sign on >> or a lost overflow changes all of them."""
    outputs = mix64(torch.tensor(0), torch.arange(3)).tolist()
    assert [x % 2**64 for x in outputs] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_root_keys_name_the_problem_and_not_the_rank():
    """Keys from a problem's place in its batch would change with the world size, or repeat on every rank."""
    assert root_keys(7, 3, [5, 2]) == [root_keys(7, 3, range(6))[i] for i in (5, 2)]
    keys = [key for seed in range(3) for iteration in range(3) for key in root_keys(seed, iteration, range(100))]
    assert len(set(keys)) == 900


def test_gumbel_has_the_moments_of_a_gumbel_and_no_infinities():
    """Mean is Euler's constant, variance pi^2/6; u = 0 or u = 1 would give infinite noise."""
    n = 200_000
    noise = gumbel(mix64(torch.tensor(1), torch.arange(n)))
    assert abs(noise.mean() - 0.577216) < 4 * (math.pi**2 / 6 / n) ** 0.5
    assert abs(noise.var() - math.pi**2 / 6) < 4 * (4.4 * (math.pi**2 / 6) ** 2 / n) ** 0.5  # excess kurtosis 12/5
    assert gumbel(torch.tensor([0, -1, 2**63 - 1, -(2**63)])).isfinite().all()


def test_perturb_agrees_with_the_formula_of_the_paper():
    """G = -log(exp(-G_parent) - exp(-Z) + exp(-noisy)): the stable form must compute the same, the maximum exactly."""
    g = torch.tensor([[-0.5, -1.0, -3.0, -math.inf]] * 50, dtype=torch.float64)
    keys = mix64(torch.arange(50)[:, None], torch.arange(4))
    G_parent = gumbel(mix64(torch.arange(50), torch.tensor(9)))[:, None]
    noisy = g + gumbel(keys)
    naive = -torch.log(torch.exp(-G_parent) - torch.exp(-noisy.amax(1, keepdim=True)) + torch.exp(-noisy))
    G = perturb(g, keys, G_parent)
    torch.testing.assert_close(G, naive, rtol=0, atol=1e-10)
    assert torch.equal(G.amax(1, keepdim=True), G_parent)
    assert G[:, 3].isneginf().all()


def test_perturb_survives_improbable_prefixes():
    """Deep in a long completion g is in the hundreds below zero, where the naive formula overflows."""
    g = torch.tensor([[-900.0, -901.0, -1500.0]], dtype=torch.float64)
    G = perturb(g, mix64(torch.tensor([[3]]), torch.arange(3)), torch.tensor([[-890.0]], dtype=torch.float64))
    assert G.isfinite().all() and G.max() == -890


# ============================================================================================ large vocabularies


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale, unit", [(1.0, 0), (8.0, 0), (0.0, 0), (1.0, 0.25)])
def test_a_large_vocabulary_has_the_children_of_a_full_sort(tau, scale, unit):
    """Of 3,000 tokens few are looked at closely.  Flat, peaked, all equal, many equal; one row with few possible tokens.
    Guards against a child that float32 loses, and against ties broken by whatever topk does."""
    logits = scale * torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    logits = (logits / unit).round() * unit if unit else logits
    logits[0, 5:] = -math.inf
    logp, h = logits.log_softmax(-1), torch.full((4, 1), 0.7)
    keys = root_keys(0, 0, range(4))
    parents = [(g, g + gumbel(torch.tensor(key)).item(), key) for g, key in zip((0.0, -3.0, -40.0, -900.0), keys)]
    found, full = (astar_search.best_children(logp, h, parents, tau, 9, screen) for screen in (True, False))
    possible = full["f"] > -math.inf
    assert possible[0].sum() == 5 and possible[1:].all() and np.array_equal(possible, found["f"] > -math.inf)
    for name in ("token", "key"):
        assert np.array_equal(found[name][possible], full[name][possible])
    for name in ("f", "h", "g", "G", "logp"):
        np.testing.assert_allclose(found[name][possible], full[name][possible], rtol=1e-12)
    if tau < 1 and scale == 0:  # equal children: the smaller token first, and the short cut knows that it cannot tell
        assert not astar_search.contenders(logp, torch.tensor(keys), 0.0, 9)[1][1:].any()
        assert tau > 0 or (full["token"][1:] == np.arange(9)).all()


def test_children_that_float32_cannot_tell_apart():
    """The later a token, the likelier, by 1e-10 each.  Guards against a short cut that is believed where it cannot know."""
    logp = (torch.arange(3000, dtype=torch.float64) * 1e-10 - 8).expand(2, 3000)
    found = astar_search.best_children(logp, torch.zeros(2, 1), [(0.0, 0.0, 1)] * 2, 0.0, 9)
    assert (found["token"] == np.arange(2999, 2990, -1)).all()


# ======================================================================================= theorems 1 and 2: order


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("table", TABLES)
def test_exact_h_gives_leaves_in_the_order_of_the_optimal_policy(table, width):
    """Theorem 1.  Guards against f on a min-heap, h in the wrong unit or sign, leaves accepted out of turn."""
    expected = table.order(lambda y: table.leaves[y] + table.r[y] / BETA)
    for K in (len(expected), 10_000):
        tree = run(table, "exact", K=K, tau=0.0, width=width)[0]
        assert paths(tree) == expected
        assert tree.stopped == ("leaves" if K == len(expected) else "exhausted")


@pytest.mark.parametrize("guide", ["zero", "constant"])
@pytest.mark.parametrize("width", WIDTHS)
def test_constant_h_gives_leaves_in_the_order_of_pi(guide, width):
    """Theorem 2, uniform-cost search.  A per-token h (added up along the path) would favour long completions."""
    for table in TABLES:
        tree = run(table, guide, K=10_000, tau=0.0, width=width)[0]
        assert paths(tree) == table.order(table.leaves.get)
        assert [leaf.g for leaf in tree.leaves] == pytest.approx([table.leaves[y] for y in paths(tree)], abs=1e-12)


# ==================================================================================== theorems 3 and 4: draws


@pytest.mark.parametrize("table, guide", [(TABLES[0], "zero"), (TABLES[1], "constant")])
def test_gumbel_search_draws_from_pi_without_replacement(table, guide):
    """Theorem 3: first leaf ~ pi, first two ~ Plackett-Luce: p(y, z) = pi(y) pi(z) / (1 - pi(y))."""
    trees = run(table, guide, n=5000, K=2, tau=1.0)
    pi = normalised(table.leaves)
    assert p_value(first_leaves(trees), pi) > 1e-4
    pairs = {(y, z): pi[y] * pi[z] / (1 - pi[y]) for y in pi for z in pi if y != z}
    assert p_value(Counter(tuple(paths(tree)) for tree in trees), pairs) > 1e-4


def unconditioned(g, keys, G_parent):
    return g + gumbel(keys)  # forgets that the best child inherits the parent's key


def normal_noise(key):
    return torch.special.ndtri(torch.exp(-torch.exp(-gumbel(key))))  # noise, but not the one whose argmax is softmax


@pytest.mark.parametrize("name, wrong", [("perturb", unconditioned), ("gumbel", normal_noise)])
def test_the_chi_square_sees_a_wrong_sampler(monkeypatch, name, wrong):
    """The test above would be worth little if these passed it."""
    monkeypatch.setattr(astar_search, name, wrong)
    for table in TABLES[:2]:
        assert p_value(first_leaves(run(table, n=2000, K=1, tau=1.0)), normalised(table.leaves)) < 1e-4


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("guide", ["bound", "reachable"])
def test_a_bound_as_guide_draws_from_the_optimal_policy(guide, tau):
    """Theorem 4, A* sampling: pi* ~ pi exp(r/beta) at tau = 1, in general exp((log pi + r/beta)/tau)."""
    table = TABLES[1]
    optimal = normalised({y: (g + table.r[y] / BETA) / tau for y, g in table.leaves.items()})
    draws = first_leaves(run(table, guide, n=2000, K=1, tau=tau))
    assert p_value(draws, optimal) > 1e-4
    assert p_value(draws, normalised(table.leaves)) < 1e-4  # and it can tell pi* from pi


def test_tau_is_a_temperature():
    """key = (1 - tau) g + tau G + h draws from exp((log pi + h)/tau).  Not tau = .5: there 1 - tau and tau may swap."""
    table, tau = TABLES[0], 0.3
    draws = first_leaves(run(table, "constant", n=4000, K=1, tau=tau))
    assert p_value(draws, normalised({y: g / tau for y, g in table.leaves.items()})) > 1e-4
    assert p_value(draws, normalised(table.leaves)) < 1e-4


# ========================================================================================== theorem 5: weights


def bias(table, trees, least=0.0):
    """In standard errors, of two estimates over the leaves with pi > least: sum of (pi/q) r, and sum of pi/q."""
    worst = 0.0
    for value in (table.r.get, lambda y: 1.0):
        common = {y: value(y) for y, g in table.leaves.items() if math.exp(g) > least}
        exact = sum(math.exp(table.leaves[y]) * v for y, v in common.items())
        estimates = [sum(leaf.weight * common.get(y, 0) for leaf, y in zip(t.leaves, paths(t))) for t in trees]
        error = np.std(estimates) / len(trees) ** 0.5
        worst = max(worst, abs(np.mean(estimates) - exact) / error)
    return worst


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.parametrize("table", TABLES[:2])
def test_weighted_leaves_are_unbiased(table, K):
    """Theorem 5: sum of (pi/q) r over the K leaves has the mean E_pi[r], and sum of pi/q the mean 1."""
    assert bias(table, run(table, "constant", n=2500, K=K, tau=1.0)) < 4


@pytest.mark.parametrize("tau", [0.5, 0.8])
def test_weighted_leaves_are_unbiased_at_other_temperatures(tau):
    """Below tau = 1 an inner key is only a bound: with kappa from an inner node all weights are a fifth too large.
    Over leaves with pi > .02: the rest are drawn too rarely, with weights too large, for a standard error to count."""
    assert bias(TABLES[0], run(TABLES[0], "constant", n=2500, K=3, tau=tau), least=0.02) < 4


@pytest.mark.parametrize("table", TABLES[:2])
def test_a_perturbed_phi_is_biased(table):
    """The plausible bug: with the leaf's own key in phi a lucky leaf looks likely.  The test above must see it."""
    trees = run(table, "constant", n=2500, K=2, tau=1.0)
    for tree in trees:
        for leaf in tree.leaves:
            leaf.weight = math.exp(leaf.g - log_inclusion(leaf.G + leaf.h, -tree.queue[0][0], 1.0))
    assert bias(table, trees) > 8


@pytest.mark.parametrize("table", TABLES[:2])
def test_a_fixed_root_gumbel_is_biased(monkeypatch, table):
    """With G(root) = 0 the leaves are the same draws, but their threshold kappa is not: only the weights show it."""
    monkeypatch.setattr(astar_search, "gumbel", lambda key: gumbel(key) if key.ndim else torch.tensor(0.0))
    trees = run(table, "constant", n=2500, K=2, tau=1.0)
    assert p_value(first_leaves(trees), normalised(table.leaves)) > 1e-4
    assert bias(table, trees) > 8


def test_inclusion_by_hand():
    """Keys are Gumbel(phi): P(key > kappa) = 1 - exp(-exp(phi - kappa)), at phi = kappa 1 - 1/e; tau scales both."""
    assert log_inclusion(-2.0, -2.0, 1.0) == pytest.approx(math.log(1 - 1 / math.e))
    assert log_inclusion(-2.0, -1.0, 0.5) == pytest.approx(math.log(1 - math.exp(-math.exp(-2.0))))
    assert log_inclusion(-30.0, 0.0, 1.0) == pytest.approx(-30.0, rel=1e-9)  # 1 - exp(-x) in floats gives 0
    assert log_inclusion(-2.0, -math.inf, 1.0) == log_inclusion(-2.0, -2.0, 0.0) == log_inclusion(5000.0, 0.0, 1.0) == 0.0


def test_plain_weights_of_unlikely_leaves():
    """tau = 0, leaves of log pi -200, -201, -210, less than float32 holds: only their ratios count, and these are kept.
    Guards against 0/0 in the normalised weights.  Likely leaves weigh pi itself."""
    unlikely = lambda nodes: (torch.tensor([[-100.0, -101.0, -110.0]] * len(nodes)).double(), torch.zeros(len(nodes), 1))
    likely = lambda nodes: (torch.tensor([[0.5, 0.3, 0.2]] * len(nodes)).double().log(), torch.zeros(len(nodes), 1))
    weights = []
    for expand in (unlikely, likely):
        (tree,) = search(root_keys(0, 0, [0]), expand, Options(eos=(9,), K=4, tau=0.0, max_new_tokens=2))
        weights.append(torch.tensor([leaf.weight for leaf in tree.leaves]))
    first, *others = weights[0]
    assert first > 0 and torch.allclose(first / torch.stack(others), torch.tensor([1.0, 1.0, 2.0]).exp())
    assert torch.allclose(weights[1], torch.tensor([0.25, 0.15, 0.15, 0.1]))


def test_weights_of_leaves_too_long_for_a_float():
    """pi of 2,000 tokens is 0 in float64, and so is q; pi/q is not.  Guards against 0/0: here pi is uniform, so with
    K = 2 leaves of equal pi the weights are equal too, and finite."""
    options = Options(eos=(9,), K=2, max_new_tokens=2000)
    logp = torch.full((1, 3), -math.log(3.0), dtype=torch.float64)
    tree = search([1], lambda nodes: (logp.expand(len(nodes), 3), torch.zeros(len(nodes), 1)), options)[0]
    one, other = (leaf.weight for leaf in tree.leaves)
    assert math.exp(tree.leaves[0].g) == 0.0 and one == pytest.approx(other) and 0 < one < math.inf
    assert one == pytest.approx(math.exp(-tree.queue[0][0]))  # q ~ exp(log pi - kappa), so pi/q ~ exp(kappa)


# ======================================================================================= theorem 8: invariance


def facts(tree):
    """All that a search reports of one problem, floats to the last bit."""
    leaves = [(y, leaf.f, leaf.g, leaf.weight, leaf.truncated) for leaf, y in zip(tree.leaves, paths(tree))]
    return leaves, tree.pops, tree.stopped, tree.mass, tree.pruned


def assert_invariant(guide, **settings):
    """The same facts at every width, for a problem alone, in a batch, and in the reversed batch with its own key."""
    keys, N = root_keys(5, 1, range(len(TABLES))), len(TABLES)
    go = lambda rows, width: search(
        [keys[i] for i in rows], expander([TABLES[i] for i in rows], guide), options(width=width, **settings)
    )
    alone = [facts(go([i], 1)[0]) for i in range(N)]
    for width in (1, 2, 7, 64):
        assert [facts(tree) for tree in go(range(N), width)] == alone
        assert [facts(tree) for tree in go(range(N)[::-1], width)] == alone[::-1]
    return alone


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("guide", ["zero", "exact", "bound", "deferred", "noisy"])
def test_width_and_batch_change_nothing(guide, tau):
    """Theorem 8.  Seen before: leaves accepted out of turn (short answers win), noise by order of arrival."""
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
    """Bounds count committed pops: if they counted speculated nodes, a wider search would stop earlier."""
    found = assert_invariant(guide, tau=tau, K=8, **bound)
    assert reason in [stopped for _, _, stopped, _, _ in found]  # the bound was active
    assert any(pruned for *_, pruned in found) == ("max_open" in bound)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("guide", ["zero", "deferred"])
def test_done_ends_a_search_with_the_leaf_that_it_takes(guide, tau):
    """The leaves of the undisturbed search up to the first that `done` takes, at every width and in every batch; and with h = 0, tau = 1
    the best key left behind is that of the leaf that would have come next.  Guards against asking about speculated leaves,
    and against a return before the last leaf's sibling is queued, which would lower kappa and with it every weight."""
    done, stopped = lambda leaf: leaf.depth == 3, 0
    assert_invariant(guide, tau=tau, K=10, done=done)
    for table in TABLES:
        for whole, cut in zip(*(run(table, guide, n=8, tau=tau, K=10, done=how) for how in (None, done))):
            places = [i for i, y in enumerate(paths(whole)) if len(y) == 3]
            n = places[0] + 1 if places else 10
            assert paths(cut) == paths(whole)[:n] and cut.stopped == ("done" if places else "leaves")
            if n < 10 and guide == "zero" and tau == 1:
                stopped += 1
                assert -cut.queue[0][0] == pytest.approx(whole.leaves[n].f, abs=1e-9)
    assert stopped or (guide, tau) != ("zero", 1)


def test_speculation_only_adds():
    """A wider search runs what width 1 runs and perhaps more, never again; with one leaf wanted nothing more."""
    for table in TABLES:
        narrow, wide = [], []
        pops = run(table, "noisy", K=6, width=1, asked=narrow)[0].pops
        assert pops == len(set(narrow)) == run(table, "noisy", K=6, width=7, asked=wide)[0].pops
        assert set(narrow) < set(wide)
        one, many = [], []
        run(table, "noisy", K=1, width=1, asked=one)
        run(table, "noisy", K=1, width=64, asked=many)
        assert one == many


# ============================================================================================ theorem 15: price


@pytest.mark.parametrize("K", [1, 3, 8])
def test_gumbel_search_opens_only_prefixes_of_its_leaves(K):
    """Theorem 15: as cheap as sampling with shared prefixes.  Expanding children at once, or refilling, costs more."""
    asked = []
    trees = run(TABLES[2], "constant", n=50, K=K, tau=1.0, asked=asked)
    for row, tree in enumerate(trees):
        opened = [s for problem, s in asked if problem == row]
        assert len(opened) == len(set(opened)) == tree.pops
        assert set(opened) == proper_prefixes(paths(tree))


# =========================================================================================== nothing is truncated


def textbook_search(table, guide, key, options):
    """Best-first search as in a textbook: every child queued at once; no blocks, no siblings, no rounds, no batch."""
    V = len(table.logp[()])
    queue = [(-math.inf, (), 0.0, gumbel(torch.tensor(key)).item(), key)]
    leaves, pops, mass = [], 0, 0.0
    while queue and len(leaves) < options.K and mass < options.cover:
        if not is_leaf(queue[0][1]) and pops >= options.max_nodes:
            break
        _, s, g, G, key = heapq.heappop(queue)
        if is_leaf(s):
            leaves.append(s)
            mass += math.exp(g)
            continue
        pops += 1
        child_g = g + torch.from_numpy(table.logp[s])
        keys = mix64(torch.tensor(key), torch.arange(V))
        child_G = perturb(child_g[None], keys[None], torch.tensor([[G]], dtype=torch.float64))[0]
        h = torch.tensor(table.h[guide][s], dtype=torch.float64).expand(V)
        f = (1 - options.tau) * child_g + (options.tau * child_G if options.tau else 0.0) + h
        for a in range(V):
            if child_g[a] > -math.inf:
                heapq.heappush(queue, (-f[a].item(), (*s, a), child_g[a].item(), child_G[a].item(), keys[a].item()))
    return leaves, pops


@pytest.mark.parametrize("bounds", [{}, {"max_nodes": 5}, {"cover": 0.05}])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_search_equals_the_textbook(tau, bounds):
    """With K + 1 < V children in a block, later siblings come by refill: none may be lost, none come late."""
    refills = 0
    for seed in range(4):
        table = Table(seed, V=6)
        for guide in ("noisy", "deferred", "exact"):
            for K in (1, 2, 3):
                chosen, asked = options(tau=tau, K=K, **bounds), []
                tree = search([seed], expander([table], guide, asked), chosen)[0]
                leaves, pops = textbook_search(table, guide, seed, chosen)
                assert paths(tree) == leaves
                assert tree.pops == pops or 0 < tau < 1  # there the weights may need the key of one more leaf
                refills += len(asked) - len(set(asked))
    assert refills > 0  # prefixes were asked again


def by_hand(rows, h):
    """expand from {prefix: probabilities} and {prefix: h of its children}."""
    log = lambda row: [math.log(p) if p else -math.inf for p in row]

    def expand(nodes):
        s = [tuple(node.path()) for node in nodes]
        return torch.tensor([log(rows[x]) for x in s]).double(), torch.tensor([h[x] for x in s]).double()

    return expand


@pytest.mark.parametrize("width", WIDTHS)
def test_the_last_sibling_is_reached(width):
    """K = 1, so blocks of 2 of 6 children; five lures (h = 5, then -50 below) hide the best leaf, which is last."""
    rows = {(): [1 / 6] * 6, **{(a,): [0.5, 0.5, 0, 0, 0, 0] for a in range(1, 6)}}
    h = {(): [0.0] + [5.0 + a for a in range(1, 6)], **{(a,): [-50.0] * 6 for a in range(1, 6)}}
    tree = search([1], by_hand(rows, h), options(K=1, tau=0.0, width=width, max_new_tokens=2))[0]
    assert paths(tree) == [(EOS,)] and tree.pops == 6


def test_ties_break_by_path():
    """Nine leaves of equal f, two wanted, blocks of 3: without a rule the order would hang on the heap's history."""
    rows = {s: [0, 0.25, 0.25, 0.25, 0.25] for s in [(), (1,), (2,), (3,), (4,)]}
    expand = by_hand(rows, {s: [0.0] for s in rows})
    every = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    for K in (2, 10, 16):
        for width in WIDTHS:
            tree = search([1], expand, options(K=K, tau=0.0, width=width, max_new_tokens=2))[0]
            assert paths(tree) == every[:K]


# ============================================================================================== bounds and reasons


def test_max_new_tokens_marks_the_leaves_that_it_cuts():
    """A cut completion must never count as finished; one that writes EOS as its last allowed token is finished."""
    for cut in (1, 3):
        tree = run(TABLES[0], K=10_000, max_new_tokens=cut)[0]
        below = {y[:cut] for y in TABLES[0].leaves}
        assert set(paths(tree)) == below and len(tree.leaves) == len(below)
        assert all(leaf.truncated == (y[-1] != EOS) for leaf, y in zip(tree.leaves, paths(tree)))
        assert (EOS,) in below or cut > 1
        assert tree.mass == pytest.approx(1.0)  # a cut leaf holds all the mass below it


def test_max_nodes_returns_what_was_found_so_far():
    """The bound ends the search, it does not lose it; leaves already at the head still come, they cost nothing."""
    for table in TABLES:
        free = run(table, "noisy", K=10_000)[0]
        for bound in (0, 1, 5, 20):
            tree = run(table, "noisy", K=10_000, max_nodes=bound)[0]
            assert tree.pops == bound and tree.stopped == "max_nodes"
            assert paths(tree) == paths(free)[: len(tree.leaves)]
        assert len(tree.leaves) > 0


def test_cover_stops_as_soon_as_the_mass_is_reached():
    """Not a leaf earlier, not a leaf later."""
    for table in TABLES:
        tree = run(table, K=10_000, cover=0.8)[0]
        masses = [math.exp(table.leaves[y]) for y in paths(tree)]
        assert tree.stopped == "covered" and tree.mass == pytest.approx(sum(masses))
        assert sum(masses[:-1]) < 0.8 <= sum(masses)


def test_an_exhausted_search_has_found_everything():
    """Then nothing was left out, every q is 1, and the weights are pi itself."""
    for tau in (0.0, 1.0):
        tree = run(TABLES[3], "noisy", K=10_000, tau=tau)[0]
        assert tree.stopped == "exhausted" and sorted(paths(tree)) == sorted(TABLES[3].leaves)
        assert [leaf.weight for leaf in tree.leaves] == pytest.approx([TABLES[3].pi[y] for y in paths(tree)])


def test_a_beam_of_K_loses_nothing_when_h_is_constant():
    """Each entry of the queue is as good as its best leaf, so the K best entries lead to the K best leaves."""
    for table in TABLES:
        free = run(table, "constant", n=20, K=5)
        beam = run(table, "constant", n=20, K=5, max_open=5)
        assert [paths(tree) for tree in beam] == [paths(tree) for tree in free]
        assert any(tree.pruned for tree in beam) and all(len(tree.queue) <= 5 for tree in beam)
        assert all(leaf.weight == math.exp(leaf.g) for tree in beam if tree.pruned for leaf in tree.leaves)


def test_a_narrow_beam_forgets():
    """max_open = 1 by hand: 1 (.6) is opened, then of its child 11 (.3) and its sibling 2 (.4) the better stays."""
    rows = {(): [0, 0.6, 0.4], (1,): [0, 0.5, 0.5], (2,): [0, 0.9, 0.1]}
    expand = by_hand(rows, {s: [0.0] for s in rows})
    tree = search([1], expand, options(K=9, tau=0.0, max_open=1, max_new_tokens=2))[0]
    assert paths(tree) == [(2, 1), (2, 2)] and tree.stopped == "exhausted" and tree.pruned


def test_no_problems_is_no_search():
    """A rank may be left without a problem."""
    assert search([], expander([]), options()) == []


@pytest.mark.parametrize("run_it", [search, sample])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_nan_stops_the_search(run_it, tau):
    """NaN compares false with everything: a heap that holds one silently returns nonsense."""
    expand = lambda nodes: (torch.full((len(nodes), 5), math.nan), torch.zeros(len(nodes), 1))
    with pytest.raises(FloatingPointError):
        run_it([1, 2], expand, options(tau=tau))


def test_nan_in_h_stops_the_search():
    """One child's NaN from the value head is enough."""
    table = Table(0)
    table.h["noisy"][()][int(np.argmax(table.logp[()]))] = math.nan
    with pytest.raises(FloatingPointError):
        run(table, "noisy", K=10_000)


# ==================================================================================================== sampling


def test_sampling_draws_from_pi():
    """8 chains in each of 800 problems, all independent: chains that share noise would come in lumps."""
    for table in TABLES[:2]:
        trees = sample(root_keys(0, 0, range(800)), expander([table] * 800), options(K=8))
        draws = Counter()
        for tree in trees:
            draws.update({y: leaf.count for leaf, y in zip(tree.leaves, paths(tree))})
        assert sum(draws.values()) == 6400
        assert p_value(draws, normalised(table.leaves)) > 1e-4


def test_the_chi_square_sees_chains_that_share_noise(monkeypatch):
    """If all chains of a problem had one key, each problem would return one completion 8 times."""
    real = mix64
    lumped = lambda key, a: real(key, torch.full_like(a, -2) if (a < 0).all() else a)
    monkeypatch.setattr(astar_search, "mix64", lumped)
    trees = sample(root_keys(0, 0, range(800)), expander([TABLES[0]] * 800), options(K=8))
    draws = Counter({y: 0 for y in TABLES[0].leaves})
    for tree in trees:
        draws.update({y: leaf.count for leaf, y in zip(tree.leaves, paths(tree))})
    assert p_value(draws, normalised(TABLES[0].leaves)) < 1e-4


def test_sampling_runs_each_prefix_once():
    """The comparison with the search is fair only if chains that wrote the same prefix share its node."""
    asked = []
    trees = sample(root_keys(0, 0, range(4)), expander(TABLES, asked=asked), options(K=30))
    assert len(asked) == len(set(asked))
    for row, tree in enumerate(trees):
        assert {s for problem, s in asked if problem == row} == proper_prefixes(paths(tree))
        assert len(set(paths(tree))) == len(tree.leaves) < 30
        assert sum(leaf.count for leaf in tree.leaves) == 30
        assert [leaf.weight for leaf in tree.leaves] == [leaf.count / 30 for leaf in tree.leaves]
        assert all(leaf.truncated == (y[-1] != EOS) for leaf, y in zip(tree.leaves, paths(tree)))
        assert all(abs(leaf.g - TABLES[row].leaves[y]) < 1e-12 for leaf, y in zip(tree.leaves, paths(tree)))


def test_sampling_does_not_depend_on_the_batch():
    """Noise drawn in order of arrival would change a problem's samples with its neighbours."""
    keys, N = root_keys(5, 1, range(len(TABLES))), len(TABLES)
    go = lambda rows: [
        [(y, leaf.count) for leaf, y in zip(tree.leaves, paths(tree))]
        for tree in sample([keys[i] for i in rows], expander([TABLES[i] for i in rows]), options(K=8))
    ]
    alone = [go([i])[0] for i in range(N)]
    assert go(range(N)) == alone and go(range(N)[::-1]) == alone[::-1]
    assert len({tuple(x) for x in alone}) == N


def test_greedy_takes_the_argmax():
    """One leaf, whatever K and the key are."""
    for table in TABLES:
        s = ()
        while not is_leaf(s):
            s = (*s, int(np.argmax(table.logp[s])))
        tree = sample([123], expander([table]), options(K=8), greedy=True)[0]
        assert paths(tree) == [s] and tree.leaves[0].count == 1 and tree.leaves[0].weight == 1.0
