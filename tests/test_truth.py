"""What the model saw, what the search estimates and what a run keeps are what they are said to be.

Each test names the bug that it guards against, and fails on the code that had it.  Reference values
are worked by hand or come from brute force over all completions.
"""

import io
import json
import math
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import rows, tensors
from safetensors.torch import load_file

import astar_search
import data
import eval as evaluation
import fsdp
import policy
import reward as reward_module
import train
import value as value_module
from astar_search import Options, log_inclusion, root_keys, sample, search

ROOT = pathlib.Path(train.__file__).parent
BASE = str(ROOT / "tiny_base")
ONE = fsdp.Ranks(rank=0, world_size=1, device=torch.device("cpu"))
SMALL = """
    --config ppo --problems-per-iteration 4 --rollouts-per-problem 3 --eval-problems 2
    --max-new-tokens 8 --minibatches 2 --device cpu --checkpoint-every 1 --samples 2
""".split()


def words(folder, *flags, iterations=1):
    """The command line of a small run; a later flag overrides an earlier one."""
    given = [*SMALL, "--iterations", iterations, "--output-dir", folder, *flags]
    return [str(word) for word in given]


def run(folder, *flags, iterations=1):
    """A small run in this process; returns the rows of its metrics.jsonl."""
    train.main(words(folder, *flags, iterations=iterations))
    return rows(folder / "metrics.jsonl")


def ends(capsys, code, function, *arguments):
    """Assert that a call ends with an exit status and one line on stderr; return the line."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == code, error
    assert error.count("\n") == 1, error
    return error


def refused(capsys, folder, *flags, iterations=1):
    """Assert that train.py refuses to run with one sentence and exit status 2; return it."""
    return ends(capsys, 2, train.main, words(folder, *flags, iterations=iterations))


def weights(checkpoint, prefix="model/"):
    """The tensors of a checkpoint whose names begin so."""
    found = tensors(checkpoint)
    return {name: tensor for name, tensor in found.items() if name.startswith(prefix)}


def same(one, other):
    """Are these dicts of tensors equal, bit for bit?"""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def base_weights():
    """The policy before any training."""
    found = load_file(ROOT / "tiny_base" / "model.safetensors")
    return {f"model/{name}": tensor for name, tensor in found.items()}


def make_rollouts(problem, weight, log_probs=None, values=0.0, **columns):
    """Rollouts of completions of one token after a prompt of one; columns (B,) as lists."""
    B = len(problem)
    grid = torch.zeros(B, 1)
    made = {
        "tokens": torch.ones(B, 2, dtype=torch.int64),
        "prompt_length": torch.ones(B, dtype=torch.int64),
        "length": torch.full((B,), 2),
        "problem": torch.tensor(problem),
        "log_probs": grid,
        "values": grid + values,
        "log_pi": torch.zeros(B),
        "weight": torch.tensor(weight),
        "count": torch.ones(B, dtype=torch.int64),
        "f": torch.zeros(B),
        "truncated": torch.zeros(B, dtype=torch.bool),
        "prefix": torch.zeros(B, 1, dtype=torch.int64),
        "hidden": torch.zeros(1, 4),
    }
    for name, column in columns.items():
        made[name] = torch.tensor(column)
    stats = {"model_tokens": 0, "forwards": 0, "pops": 0, "mass": 0.0, "pruned": 0, "stopped": {}}
    return astar_search.Rollouts(**made, stats=stats)


# -------------------------------------------------------------------------- Tables to be enumerated

EOS = 0
DEPTH = 4


class Table:
    """A random language of three tokens with all of its completions.

    log_probs[s]: log pi(.|s) (3,).  pi[y], rewards[y]: of each completion, of 1 to 4 tokens.
    """

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.log_probs = {}
        self.pi = {}
        self.rewards = {}
        self.grow((), 1.0)
        self.value = sum(self.pi[y] * r for y, r in self.rewards.items())  # E_pi[r]

    def grow(self, s, probability):
        if s[-1:] == (EOS,) or len(s) == DEPTH:
            self.pi[s] = probability
            self.rewards[s] = float(self.rng.choice((-1.0, 0.2, 1.0)))
            return
        logits = self.rng.normal(size=3) * self.rng.choice([0.5, 2.5])  # flat or peaked
        self.log_probs[s] = logits - np.log(np.exp(logits).sum())
        for token in range(3):
            self.grow((*s, token), probability * math.exp(self.log_probs[s][token]))

    def soft_value(self, s, beta):
        """log E_pi[exp(r/beta) | s], in nats."""
        below = [y for y in self.pi if y[: len(s)] == s]
        total = sum(self.pi[y] for y in below)
        return math.log(sum(self.pi[y] * math.exp(self.rewards[y] / beta) for y in below) / total)

    def searches(self, n, h=None, **options):
        """n independent searches; h: {prefix: nats} of all children of a prefix, or None for 0."""

        def expand(nodes):
            prefixes = [tuple(node.tokens()) for node in nodes]
            log_probs = np.array([self.log_probs[s] for s in prefixes])
            nats = [[h[s] if h else 0.0] for s in prefixes]
            return torch.from_numpy(log_probs), torch.tensor(nats)

        options = Options(eos=(EOS,), max_new_tokens=DEPTH, width=4, **options)
        return search(root_keys(7, 0, range(n)), expand, options)

    def estimates(self, trees):
        """The sum of weight * r over the leaves of each search."""
        return np.array([sum(self.weighted_rewards(tree)) for tree in trees])

    def weighted_rewards(self, tree):
        return [leaf.weight * self.rewards[tuple(leaf.tokens())] for leaf in tree.leaves]


def standard_errors_off(estimates, exact):
    """Distance of the mean of the estimates from `exact`, in standard errors of the mean."""
    error = np.std(estimates) / len(estimates) ** 0.5
    return abs(np.mean(estimates) - exact) / error


def same_row(probabilities):
    """expand(nodes) of a policy that is the same everywhere, and h = 0."""
    row = torch.tensor(probabilities, dtype=torch.float64).log()

    def expand(nodes):
        return row.expand(len(nodes), -1), torch.zeros(len(nodes), 1)

    return expand


# -------------------------------------------------------------- A5: samples of the reference policy


def test_streams_have_keys_of_their_own():
    """Guards against V* estimated from the very draws that it is regressed on."""
    found = []
    for stream in (0, train.REFERENCE_STREAM, train.FRESH_STREAM):
        for iteration in (-1, 0, 1, 2):
            found += root_keys(0, iteration, range(200), stream)
    assert len(set(found)) == len(found)
    assert root_keys(3, 2, [5], stream=0) == root_keys(3, 2, [5])


def test_draws_of_two_streams_are_independent():
    """Chi-square of 3,000 pairs (rollout, reference sample) of the same problem, three tokens.

    E of each cell is 3,000 pi(a) pi(b); the statistic has 8 degrees of freedom, and is below 26 at
    a p-value of 1e-3.  Of one stream alone every pair would be on the diagonal.
    """
    pi = [0.5, 0.3, 0.2]
    drawn = []
    for stream in (0, train.REFERENCE_STREAM):
        keys = root_keys(0, 1, range(3000), stream)
        trees = sample(keys, same_row(pi), Options(eos=(), K=1, max_new_tokens=1))
        drawn.append([tree.leaves[0].token for tree in trees])
    statistic = 0.0
    for a in range(3):
        for b in range(3):
            expected = 3000 * pi[a] * pi[b]
            observed = sum(pair == (a, b) for pair in zip(*drawn))
            statistic += (observed - expected) ** 2 / expected
    assert statistic < 26


def test_apo_draws_its_reference_samples_apart_from_its_rollouts(tmp_path, monkeypatch):
    """In the loop itself: at the first iteration base and policy are the same model.

    With the same keys all of their samples were the same, so that V* contained the reward that it
    was taken from: r - V* of a right completion was +.89 instead of +1.66.
    """
    generate_rollouts = train.generate_rollouts
    drawn = []

    def watched(*arguments, **options):
        rollouts = generate_rollouts(*arguments, **options)
        if options["iteration"] == 1 and options["K"] == 8:
            drawn.append(rollouts)
        return rollouts

    monkeypatch.setattr(train, "generate_rollouts", watched)
    flags = "--loss apo --rollout sample --rollouts-per-problem 8 --apo-samples 8".split()
    run(tmp_path, *flags)
    rollouts, reference = drawn
    for p in range(4):
        texts = []
        for part in (rollouts, reference):
            own = [ids for ids, q in zip(part.completions(), part.problem.tolist()) if q == p]
            texts.append(sorted(own))
        assert texts[0] != texts[1]


# ---------------------------------------------------------------- A6: nothing right, nothing learnt


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_em_gives_nothing_to_a_problem_without_a_right_leaf(scale):
    """Problem 0 has a right leaf, problem 1 has only wrong ones, one of which is less bad.

    Its advantage was 1.8e-5, which Adam divides away.  It is 0 at any reward scale.  By hand, of
    problem 0: Z = .25 * 1 + .75 * 0 = .25, so A = 1 * 1/.25 = 4 and 0.
    """
    rewards = scale * torch.tensor([1.0, -1.0, -0.9, -1.0])
    targets = value_module.soft_target(rewards, -scale, scale, 0.2 * scale)
    advantages = policy.em_advantages(
        targets,
        torch.tensor([0.25, 0.75, 0.5, 0.5]),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([True, False, False, False]),
    )
    assert advantages.tolist() == pytest.approx([4.0, 0.0, 0.0, 0.0])
    assert advantages[2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e6])
def test_equal_rewards_are_centred_to_exactly_zero(unit):
    """Under any weights and at any scale.

    In double the weighted mean is off by 1e-16, and 1e-16/1e-6 would be a signal to Adam.
    """
    generator = torch.Generator().manual_seed(0)
    for n in range(2, 9):
        for r in (-1.0, -0.9, 1.1, 1 / 3):
            weight = torch.rand(n, generator=generator)
            weight /= weight.sum()
            rewards = torch.full((n,), r * unit)
            problem = torch.zeros(n, dtype=torch.int64)
            assert policy.grpo_advantages(rewards, weight, problem).tolist() == [0.0] * n


def test_the_optimal_value_of_equal_rewards_is_that_reward():
    """V* = beta1 log mean exp(r/beta1) = r, to the last bit.

    Otherwise apo's residual at pi = pi_ref is 1e-7 and not 0, and Adam makes a full step of it.
    """
    for n in range(1, 33):
        for r in (-1.0, -0.9, 1.1, 1.0):
            rewards = torch.full((3, n), r)
            assert torch.equal(policy.optimal_value(rewards, 0.5), rewards[:, 0])
    # By hand: 1 log( (e^1 + e^-1)/2 ) = log cosh 1 = .433781
    assert policy.optimal_value(torch.tensor([[1.0, -1.0]]), 1.0).item() == pytest.approx(0.433781)


WITHOUT_A_RIGHT_LEAF = [
    # 14 tokens are enough for an answer: some are well-formed and earn -.9, others -1
    "--loss em --tau 0 --max-new-tokens 14",
    # three tokens are no answer: every completion is cut off and earns -1
    "--loss em --tau 0 --max-new-tokens 3 --weight-decay .1",
    "--loss grpo --max-new-tokens 3",
    "--loss apo --max-new-tokens 3",
]


@pytest.mark.parametrize("flags", WITHOUT_A_RIGHT_LEAF)
def test_an_iteration_without_a_right_leaf_leaves_the_policy_alone(flags, tmp_path):
    """Bit for bit, in two iterations; the head learns.

    Guards against Adam, which made a full step of any gradient, so that the policy moved as far as
    in normal iterations (forced accuracy .472 -> .415 after eight).
    """
    metrics = run(tmp_path, *flags.split(), iterations=2)
    assert [row["unique_correct"] for row in metrics[1:]] == [0, 0]
    assert same(weights(tmp_path / "checkpoint_iter_2"), base_weights())
    heads = [weights(tmp_path / f"checkpoint_iter_{i}", "value/") for i in (1, 2)]
    assert not same(*heads)


SOME_RIGHT = """
def some(problem, completion):
    return {"reward": float(len(completion) & 1), "correct": problem.prompt in RIGHT}

some.bounds = (0, 1)
RIGHT = %r
"""


def test_only_minibatches_with_a_signal_count_as_steps(tmp_path):
    """Of two minibatches one has the only problem that can be solved: Adam makes one step of two.

    The head makes both.  Guards against a rule for the whole iteration.
    """
    config = train.parse_arguments(words(tmp_path))[0]
    problems, _ = train.draw_problems(config, 1, ONE, None)
    (tmp_path / "some.py").write_text(SOME_RIGHT % [problems[0].prompt])
    flags = ["--loss", "em", "--reward", tmp_path / "some.py:some"]
    run(tmp_path / "run", *flags)
    moments = load_file(tmp_path / "run" / "checkpoint_iter_1" / "optimizer.safetensors")
    steps = {}
    for name, tensor in moments.items():
        if name.endswith(".step"):
            steps.setdefault(name.split(".")[0], set()).add(tensor.item())
    assert steps == {"policy": {1.0}, "value": {2.0}}


def test_moments_of_earlier_steps_do_not_move_the_policy_either(tmp_path, monkeypatch):
    """The second iteration has no signal; Adam still has the moments of the first.

    Guards against a step with a zero gradient, which would go on in the old direction.
    """
    em_advantages = policy.em_advantages
    problems_seen = []

    def right_in_the_first(targets, weight, problem, correct):
        problems_seen.append(1)
        return em_advantages(targets, weight, problem, correct | (len(problems_seen) == 1))

    monkeypatch.setattr(policy, "em_advantages", right_in_the_first)
    run(tmp_path, "--loss", "em", "--tau", "0", iterations=2)
    first, second = tmp_path / "checkpoint_iter_1", tmp_path / "checkpoint_iter_2"
    assert not same(weights(first), base_weights())
    assert same(weights(second), weights(first))
    moments = [weights(folder, "optimizer/policy.") for folder in (first, second)]
    assert moments[0]
    assert same(*moments)
    assert not same(weights(second, "value/"), weights(first, "value/"))


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--loss em", [False, True, True, False]),
        ("--loss grpo", [False, True, True, False]),
        ("--loss ppo", [False, True, True, False]),
        ("--loss apo", [True, True, True, True]),
        ("--loss em --entropy-coef .01", [True, True, True, True]),
    ],
)
def test_which_completions_teach(flags, expected):
    """No advantage, one at one token, a tiny negative one, no weight.

    The loss of apo and an entropy bonus do not depend on the advantages.
    """
    config = train.parse_arguments(flags.split())[0]
    weight = torch.tensor([0.5, 0.5, 1.0, 0.0])
    advantages = torch.tensor([[0.0, 0.0], [0.0, 1.0], [-1e-30, -1e-30], [1.0, 1.0]])
    assert train.which_teach(weight, advantages, config).tolist() == expected


# ----------------------------------------------------------------------------- A7: the stop by mass


@pytest.mark.parametrize("cover", [0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_stop_by_mass_is_unbiased(cover, seed):
    """K is larger than the number of completions, so that every search stops by mass.

    The sum of weight * r has the mean E_pi[r] within 4 standard errors of 1,500 searches, and the
    weights sum to 1.
    """
    table = Table(seed)
    trees = table.searches(1500, K=1000, cover=cover)
    assert {tree.stopped for tree in trees} == {"covered"}
    assert standard_errors_off(table.estimates(trees), table.value) < 4
    for tree in trees[:50]:
        assert sum(leaf.weight for leaf in tree.leaves) == pytest.approx(1.0)
        assert tree.mass >= cover
        assert tree.mass - math.exp(tree.leaves[-1].g) >= cover  # one leaf more than it takes


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_old_weights_at_a_stop_by_mass_were_biased(seed):
    """pi/q of the leaves that cover, self-normalised: what the search did before.

    The test above must be able to see it.  The kappa of that stop is the key of the leaf after.
    """
    table = Table(seed)
    estimates = []
    for tree in table.searches(1500, K=1000, cover=0.5):
        *covering, following = tree.leaves
        old = [math.exp(leaf.g - log_inclusion(leaf.g, following.f, 1.0)) for leaf in covering]
        values = [table.rewards[tuple(leaf.tokens())] for leaf in covering]
        estimates.append(sum(w * r for w, r in zip(old, values)) / sum(old))
    assert standard_errors_off(np.array(estimates), table.value) > 6


@pytest.mark.parametrize("cover", [0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_stop_by_mass_or_by_leaves_is_nearly_unbiased(cover, seed):
    """K = 8: some searches of a problem stop by mass and others at K leaves."""
    table = Table(seed)
    trees = table.searches(1500, K=8, cover=cover)
    assert abs(np.mean(table.estimates(trees)) - table.value) < 0.04


def test_weights_at_a_stop_by_mass_by_hand():
    """pi = (.6, .3, .1), completions of one token.

    cover .5: if .6 comes first, it weighs .6, and the leaf after it .4.  If .3 comes first, .3 and
    .6 cover, and the last weighs .1.  If .1 comes first, .1 is not enough: after .6 the .3 stands
    for .3, after .3 again .6 for .6, as 1 - .4.
    cover .05: any leaf covers, and the second weighs 1 - pi of the first.
    """
    pi = (0.6, 0.3, 0.1)
    seen = set()
    for cover in (0.5, 0.05):
        options = Options(eos=(), K=3, cover=cover, max_new_tokens=1)
        for tree in search(root_keys(0, 0, range(60)), same_row(pi), options):
            order = tuple(pi[leaf.token] for leaf in tree.leaves)
            covering = next(n for n in range(1, 4) if sum(order[:n]) >= cover)
            expected = [*order[:covering], 1 - sum(order[:covering])][: len(order)]
            assert len(order) == min(covering + 1, 3)
            assert [leaf.weight for leaf in tree.leaves] == pytest.approx(expected)
            seen.add((cover, order))
    assert {(0.5, (0.6, 0.3)), (0.5, (0.6, 0.1)), (0.5, (0.3, 0.6, 0.1))} <= seen


def test_an_exhausted_search_has_exact_weights():
    """Two completions, .9 and .1: after the one that covers the other is the rest, .1."""
    options = Options(eos=(), K=9, cover=0.95, max_new_tokens=1)
    (tree,) = search(root_keys(0, 0, [0]), same_row((0.9, 0.1)), options)
    assert sorted(leaf.weight for leaf in tree.leaves) == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_without_random_leaves_the_stop_by_mass_is_at_once(tau):
    """Only at tau = 1 does one more leaf stand for the rest.  Weights at tau = 0 sum to one."""
    options = Options(eos=(), K=9, tau=tau, cover=0.05, max_new_tokens=1)
    (tree,) = search(root_keys(0, 0, [0]), same_row((0.6, 0.3, 0.1)), options)
    assert tree.stopped == "covered"
    assert len(tree.leaves) == 1
    if tau == 0:
        assert tree.leaves[0].weight == 1.0


# -------------------------------------------------------------------- A8: what the estimates are of


def summary(rollouts, correct, *flags):
    """The row of metrics.jsonl that summarise makes of these rollouts of one problem."""
    config = train.parse_arguments(["--config", "ppo", *flags])[0]
    rewards = torch.tensor([1.0 if right else -1.0 for right in correct])
    rollouts.extra = {"rewards": rewards, "leaf_weight": train.leaf_weights(rollouts, config)}
    verdicts = [{"correct": right} for right in correct]
    texts = [str(i) for i in range(len(correct))]
    problem = data.make_problem(12, 34)
    return train.summarise(rollouts, texts, verdicts, [problem], config, ONE)


def test_rollout_accuracy_takes_the_weights_as_they_are():
    """Weights .3 (right), .2 (wrong): the estimate of E_pi[right] is .3, self-normalised it is .6.

    The other means stay self-normalised: r = .6 - .4 = .2.  With --leaf-weights off a leaf counts
    as one, .5.
    """
    row = summary(make_rollouts([0, 0], [0.3, 0.2]), [True, False])
    assert row["rollout_accuracy"] == pytest.approx(0.3)
    assert row["reward_mean"] == pytest.approx(0.2)
    row = summary(make_rollouts([0, 0], [0.3, 0.2]), [True, False], "--leaf-weights", "off")
    assert row["rollout_accuracy"] == pytest.approx(0.5)


def test_self_normalised_weights_are_too_high_under_a_guide():
    """A guide that prefers right leaves, tau = 1 and eight leaves: E_pi[right] by brute force.

    Self-normalised weights told up to 16 % more; here the plain sum of pi/q is far closer.
    """
    table = Table(0)
    h = {s: table.soft_value(s, beta=0.2) for s in table.log_probs}
    right = {y: float(r == 1.0) for y, r in table.rewards.items()}
    exact = sum(table.pi[y] * right[y] for y in right)
    plain = []
    normalised = []
    for tree in table.searches(1000, h=h, K=8):
        values = [right[tuple(leaf.tokens())] for leaf in tree.leaves]
        estimate = sum(leaf.weight * x for leaf, x in zip(tree.leaves, values))
        plain.append(estimate)
        normalised.append(estimate / sum(leaf.weight for leaf in tree.leaves))
    assert abs(np.mean(plain) - exact) < 0.02
    assert np.mean(normalised) > exact + 0.04


def test_explained_variance_is_told_on_fresh_samples(tmp_path, monkeypatch):
    """One sample of pi a held-out problem, with keys of its own, in each evaluation and in no other
    row.  V = r + .5 explains all, V = -r of r = +-1 explains 1 - 4 = -3.
    """
    generate_rollouts = train.generate_rollouts
    calls = []

    def watched(model, tokenizer, problems, *arguments, **options):
        calls.append((len(problems), options["kind"], options["K"], options.get("stream", 0)))
        return generate_rollouts(model, tokenizer, problems, *arguments, **options)

    monkeypatch.setattr(train, "generate_rollouts", watched)
    metrics = run(tmp_path, "--eval-every", "2", "--eval-problems", "3", iterations=2)
    fresh = (3, "sample", 1, train.FRESH_STREAM)
    search_of_four = (4, "astar", 3, 0)
    assert calls == [fresh, search_of_four, search_of_four, fresh]
    assert ["eval_explained_variance" in row for row in metrics] == [True, False, True]

    right = [True, False, True]
    returns = torch.tensor([[1.0], [-1.0], [1.0]])
    verdicts = [{"reward": r.item()} for r in returns]
    monkeypatch.setattr(evaluation, "judge_rollouts", lambda *arguments: (right, verdicts))
    for values, expected in ((returns + 0.5, 1.0), (-returns, -3.0)):
        samples = make_rollouts([0, 1, 2], [1.0] * 3, values=values)
        monkeypatch.setattr(train, "generate_rollouts", lambda *a, s=samples, **o: s)
        fake = types.SimpleNamespace(
            config=train.Config(),
            eval_problems=data.eval_problems(3),
            ranks=ONE,
            model=torch.nn.Linear(1, 1),
            head=torch.nn.Linear(1, 1),
            optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]),
            tokenizer=None,
            reward=None,
            value_function=None,
        )
        assert train.fresh_explained_variance(fake, 1) == pytest.approx(expected)


# ----------------------------------------------------------------------------- A10: asked once more


class WatchedTree(astar_search.Tree):
    """A search that remembers which children of the root it queued."""

    def __init__(self, problem, key, options):
        super().__init__(problem, key, options)
        self.queued = []

    def push_child(self, parent, rank):
        child = super().push_child(parent, rank)
        if child is not None and parent is self.root:
            self.queued.append(child.token)
        return child


@pytest.mark.parametrize("V", [8, 64])
def test_near_ties_are_neither_queued_twice_nor_lost(V):
    """200 searches with log pi that ties to 1e-6 and jitters by 1e-7 at each call.

    So does a GPU whose batch is another.  h falls so fast that every child of the root is popped
    before a leaf, and the root is asked for more of them again and again.  Children near a tie
    swapped places between two answers; then one was queued twice and another lost (18 of 600).
    """
    n = 200
    rng = np.random.default_rng(0)
    log_pi = -math.log(V) + 1e-6 * rng.integers(0, 3, size=(n, V))

    def expand(nodes):
        rows = log_pi[[node.problem for node in nodes]]
        h = torch.tensor([[-10.0 * node.depth] for node in nodes])
        return torch.from_numpy(rows + 1e-7 * rng.uniform(-1, 1, rows.shape)), h

    options = Options(eos=(), K=1, tau=0.0, max_new_tokens=2)
    for tree in search(root_keys(0, 0, range(n)), expand, options, WatchedTree):
        assert sorted(tree.queued) == list(range(V))


def test_what_is_known_of_a_node_keeps_its_place():
    """By hand: the second answer swaps the known children; the new ones come after them."""
    node = astar_search.Node(0, None, token=-1, depth=0, f=0.0)
    answers = [[0.5, 0.3, 0.15, 0.05], [0.3, 0.5, 0.05, 0.15]]

    def expand(nodes):
        return torch.tensor([answers.pop(0)]).log(), torch.zeros(1, 1)

    options = Options(eos=(), K=1, tau=0.0)
    for expected in ([0, 1], [0, 1, 3, 2]):
        astar_search.evaluate_nodes([node], expand, options)
        assert [child["token"].item() for child in node.children] == expected
    assert node.has_all_children


# --------------------------------------------------------------------------------- B11: checkpoints


def model_folder(folder, **tokenizer_fields):
    """The tiny base in a folder, its tokenizer with other fields."""
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("weak", "*.py", "*.md"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    for name, field in tokenizer_fields.items():
        setattr(tokenizer, name, field)
    tokenizer.save_pretrained(folder)
    return folder


def test_files_in_subfolders_belong_to_a_checkpoint(tmp_path, capsys):
    """Two chat templates beside a tokenizer are written to a folder of their own.

    The first checkpoint died on it, after all the work before it.  The manifest lists such files,
    and damage to one is noticed.
    """
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    model = model_folder(tmp_path / "model", chat_template=templates)
    folder = tmp_path / "run"
    run(folder, "--model", model)
    checkpoint = folder / "checkpoint_iter_1"
    listed = fsdp.read_trainer_state(str(checkpoint))["files"]
    on_disk = [path for path in checkpoint.rglob("*") if path.is_file()]
    names = {str(path.relative_to(checkpoint)) for path in on_disk} - {"trainer_state.json"}
    assert set(listed) == names
    (nested,) = [name for name in names if "/" in name]
    assert nested.endswith("tool_use.jinja")
    run(folder, "--model", model, "--resume", "auto", iterations=2)
    (folder / "checkpoint_iter_2" / nested).write_text("{{ tool }}")
    with pytest.raises(ValueError, match="tool_use.jinja is damaged"):
        fsdp.read_trainer_state(str(folder / "checkpoint_iter_2"))


class CannotBeSaved(Exception):
    """What a tokenizer of one's own may raise."""


def test_a_checkpoint_is_tried_before_the_first_iteration(tmp_path, capsys, monkeypatch):
    """A tokenizer that cannot be saved: one sentence, exit 2, and the folder is as it was.

    Guards against an hour of training before it is found.  Also with --overwrite: the old run is
    still there, and without it the next start is not refused.
    """
    folder = tmp_path / "run"
    run(tmp_path / "old", iterations=2)
    before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}

    def fails(self, folder, **options):
        raise CannotBeSaved("no\nway")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fails)
        error = refused(capsys, folder)
        assert "a checkpoint cannot be written there (CannotBeSaved: no)" in error
        assert list(folder.iterdir()) == []
        refused(capsys, tmp_path / "old", "--overwrite")
    after = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}
    assert after == before
    # What a trial that was killed has left does not disturb the next one.
    for name in ("checkpoint_trial", ".checkpoint_trial"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text("")
    run(folder)
    found = sorted(path.name for path in folder.iterdir())
    assert found == ["checkpoint_iter_1", "config.json", "metrics.jsonl", "samples.jsonl"]


def test_a_checkpoint_that_cannot_be_read_back_is_found_by_the_trial(tmp_path, monkeypatch, capsys):
    """A disk that keeps other bytes than were written."""
    finish_checkpoint = fsdp.finish_checkpoint

    def damaged(aside, final, state):
        finish_checkpoint(aside, final, state)
        with open(os.path.join(final, "value.safetensors"), "ab") as file:
            file.write(b"x")

    monkeypatch.setattr(fsdp, "finish_checkpoint", damaged)
    assert "value.safetensors is damaged" in refused(capsys, tmp_path / "run")


def test_a_run_that_goes_on_elsewhere_tries_a_checkpoint_there(tmp_path, capsys, monkeypatch):
    """In its own folder it has written some; on another disk it has not."""
    run(tmp_path / "one")
    tried = []
    try_checkpoint = fsdp.try_checkpoint

    def watched(folder, *arguments, **options):
        tried.append(folder)
        try_checkpoint(folder, *arguments, **options)

    monkeypatch.setattr(fsdp, "try_checkpoint", watched)
    source = tmp_path / "one" / "checkpoint_iter_1"
    run(tmp_path / "two", "--resume", source, iterations=2)
    assert tried == [str(tmp_path / "two")]
    run(tmp_path / "two", "--resume", "auto", iterations=3)
    assert tried == [str(tmp_path / "two")]


# --------------------------------------------------------------------------- B12: inputs by content

OWN_REWARD = """
import rules

def own(problem, completion):
    return rules.share(completion)

def other(problem, completion):
    return 0.5

own.bounds = other.bounds = (0, 1)
"""
RULES = """
import more_rules.deep

def share(completion):
    return more_rules.deep.HALF
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a run of one iteration in run/ and its inputs beside it."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = [json.dumps({"prompt": f"{a}*11=", "answer": 11 * a}) + "\n" for a in range(10, 16)]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "eval.jsonl").write_text(lines[0])
    (folder / "own.py").write_text(OWN_REWARD)
    (folder / "rules.py").write_text(RULES)
    (folder / "more_rules").mkdir()
    (folder / "more_rules" / "__init__.py").write_text("")
    (folder / "more_rules" / "deep.py").write_text("HALF = 0.5\n")
    (folder / "unused.py").write_text("x = 1\n")
    run(folder / "run", *input_flags(folder))
    return folder


def input_flags(folder, function="own"):
    flags = ["--train-file", folder / "train.jsonl", "--eval-file", folder / "eval.jsonl"]
    return [*flags, "--reward", f"{folder / 'own.py'}:{function}"]


def start(folder, *flags):
    """find_start of a resumed run: what set-up does before anything is loaded."""
    arguments = words(folder / "run", "--resume", "auto", *flags, iterations=2)
    return train.find_start(train.parse_arguments(arguments)[0])


@pytest.mark.parametrize(
    "name, flag",
    [
        ("train.jsonl", "--train-file"),
        ("eval.jsonl", "--eval-file"),
        ("own.py", "--reward"),
        ("rules.py", "--reward"),
        ("more_rules/deep.py", "--reward"),
        ("more_rules/__init__.py", "--reward"),
    ],
)
def test_a_file_that_has_changed_is_refused(name, flag, inputs, tmp_path):
    """Guards against a run that goes on with other problems or another reward, silently.

    The rollout accuracy fell from .69 to 0.  What the reward imports belongs to it.
    """
    folder = shutil.copytree(inputs, tmp_path / "copy")
    assert start(folder, *input_flags(folder))[1]["iteration"] == 1
    path = folder / name
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=f"^{flag}: the file or function is not the one"):
        start(folder, *input_flags(folder))


def test_the_same_content_elsewhere_is_accepted(inputs, tmp_path, monkeypatch):
    """Another spelling of a path was refused.  A file that the reward does not import is free."""
    folder = shutil.copytree(inputs, tmp_path / "copy")
    (folder / "unused.py").write_text("x = 2\n")
    monkeypatch.chdir(folder)
    flags = "--train-file train.jsonl --eval-file ./eval.jsonl --reward own.py:own".split()
    assert start(folder, *flags)[1]["iteration"] == 1
    (folder / "own.py").rename("mine.py")
    assert start(folder, *flags[:-1], "../copy/mine.py:own")[1]["iteration"] == 1


def test_another_function_or_a_file_left_out_is_refused(inputs, capsys):
    with pytest.raises(ValueError, match="--reward: the file or function"):
        start(inputs, *input_flags(inputs, "other"))
    with pytest.raises(SystemExit):
        start(inputs, *input_flags(inputs)[:2], *input_flags(inputs)[4:])
    assert "--train-file needs --eval-file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--eval-file: the file or function"):
        start(inputs)


def test_a_changed_file_is_one_sentence(inputs, tmp_path, capsys):
    """Through train.main: exit 2, and the run is as it was."""
    folder = shutil.copytree(inputs, tmp_path / "copy")
    (folder / "train.jsonl").write_text('{"prompt": "11*11=", "answer": 121}\n')
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    flags = [*input_flags(folder), "--resume", "auto"]
    assert "--train-file: the file" in refused(capsys, folder / "run", *flags, iterations=2)
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before


def test_checkpoints_without_checksums_are_compared_by_path(inputs, tmp_path):
    """They are of an earlier version, which refused another path."""
    folder = shutil.copytree(inputs, tmp_path / "copy")
    path = folder / "run" / "checkpoint_iter_1" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["inputs"]
    path.write_text(json.dumps(state))
    assert start(folder, *input_flags(inputs))[1]["iteration"] == 1
    with pytest.raises(ValueError, match="--train-file .* differs from"):
        start(folder, *input_flags(folder))


def test_the_base_of_apo_is_an_input(tmp_path, capsys):
    """It is the reference policy: changed weights are refused, another spelling is not."""
    base = model_folder(tmp_path / "base")
    flags = "--loss apo --apo-samples 2".split()
    run(tmp_path / "run", *flags, "--model", base)
    os.rename(base, tmp_path / "moved")
    flags += ["--model", tmp_path / "moved"]
    assert start(tmp_path, *flags)[1]["iteration"] == 1
    path = tmp_path / "moved" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="--model: the file or function"):
        start(tmp_path, *flags)


def test_a_pipe_is_read_once(tmp_path):
    """--train-file <(zcat ...): a checksum would leave nothing to be read."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    config = train.Config(train_file=str(pipe), eval_file=str(pipe))
    assert train.input_files(config) == {"--train-file": str(pipe), "--eval-file": str(pipe)}


# ----------------------------------------------------------------------- B13: a reward of one's own


def write_reward(folder, body, before=""):
    """FILE:FUNCTION of a reward with this body, whose bounds are (0, 1)."""
    text = f"{before}\ndef f(problem, completion):\n    {body}\n\nf.bounds = (0, 1)\n"
    (folder / "mine.py").write_text(text)
    return f"{folder}/mine.py:f"


def judged(reward, completion="3"):
    return reward_module.load_reward(reward).judge(data.Problem("1+2=", 3), completion)


@pytest.mark.parametrize(
    "body, said",
    [
        ("import sys; sys.exit()", "raised SystemExit ()"),
        ("exit(0)", "raised SystemExit (0)"),
        ("raise SystemExit(3)", "raised SystemExit (3)"),
        ("import asyncio; raise asyncio.CancelledError", "raised CancelledError ()"),
        ("raise BaseException('x')", "raised BaseException (x)"),
        ("return {'reward': 1, 'answer': type('T', (), {'__str__': lambda s: exit(0)})()}", "Exit"),
    ],
)
def test_an_exit_is_an_error_of_the_reward(body, said, tmp_path):
    """sys.exit() in a reward ended the whole run, with status 0."""
    with pytest.raises(reward_module.RewardError, match="for the prompt '1.2=' and the") as error:
        judged(write_reward(tmp_path, body))
    assert said in str(error.value)


def test_an_exit_while_the_file_is_loaded_is_an_error_of_the_file(tmp_path, capsys):
    reward = write_reward(tmp_path, "return 1", before="import sys\nsys.exit(0)")
    error = refused(capsys, tmp_path / "run", "--reward", reward)
    assert "SystemExit (0)" in error
    assert error.startswith("train.py: --reward")


FROM_CALL_24_ON = """with open({path!r}, "a") as file:
        file.write("x")
        calls = file.tell()
    if calls >= 24:
        {action}
    return 0.5"""


def test_an_exit_in_training_keeps_the_last_checkpoint(tmp_path, capsys):
    """Status 1, the completion and the checkpoint.  It was status 0 and no word."""
    body = FROM_CALL_24_ON.format(path=str(tmp_path / "calls"), action="raise SystemExit")
    flags = ["--reward", write_reward(tmp_path, body)]
    error = ends(capsys, 1, train.main, words(tmp_path / "run", *flags, iterations=9))
    assert "raised SystemExit" in error
    assert "and the completion '" in error
    assert "the last good checkpoint is " + str(tmp_path) in error


def test_a_reward_may_import_files_beside_it(tmp_path):
    """While it is loaded, and later in its functions; also a package.  It could not."""
    (tmp_path / "beside_now.py").write_text("X = .25")
    (tmp_path / "beside_later.py").write_text("Y = .25")
    (tmp_path / "package_beside").mkdir()
    (tmp_path / "package_beside" / "part.py").write_text("Z = .5")
    before = "import dataclasses\nimport beside_now\nfrom package_beside.part import Z"
    body = "import beside_later; return beside_now.X + beside_later.Y + Z"
    assert judged(write_reward(tmp_path, body, before))["reward"] == 1.0


def test_a_reward_cannot_replace_a_module_of_others(tmp_path):
    """Its folder comes first while it is loaded, and last afterwards.

    Guards against a json.py beside it that a later import would find.
    """
    (tmp_path / "colorsys.py").write_text("BESIDE = True")
    judged(write_reward(tmp_path, "return 1"))
    assert sys.path[-1] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1
    sys.modules.pop("colorsys", None)
    assert not hasattr(__import__("colorsys"), "BESIDE")


POOL_REWARD = """
import concurrent.futures
import multiprocessing

def count(text):
    return len(text) / 10

def pooled(problem, completion):
    context = multiprocessing.get_context(problem.prompt)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return list(pool.map(count, [completion]))[0]

pooled.bounds = (0, 1)
"""
POOL_SCRIPT = """
import sys, types
sys.path.insert(0, sys.argv[1])
import reward
loaded = reward.load_reward("own_pool.py:pooled")
if __name__ == "__main__":
    for method in ("fork", "spawn"):
        problem = types.SimpleNamespace(prompt=method)
        print(method, loaded.judge(problem, "12345")["reward"])
"""


def test_a_reward_may_use_a_process_pool(tmp_path):
    """The function of a file that was run and not imported cannot be found by another process."""
    (tmp_path / "own_pool.py").write_text(POOL_REWARD)
    (tmp_path / "script.py").write_text(POOL_SCRIPT)
    command = [sys.executable, "script.py", str(ROOT)]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert out.stdout == "fork 0.5\nspawn 0.5\n", out.stderr


CTRL_C = """import os, signal, time
        for i in range({times}):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(.06)"""


def test_a_reward_that_hangs_is_stopped_by_a_second_ctrl_c(tmp_path, capsys, monkeypatch):
    """Some seconds after the first: exit 130, the completion, the checkpoint.

    It could only be stopped by kill -9.
    """
    before = signal.getsignal(signal.SIGINT)  # a job in the background ignores it
    monkeypatch.setattr(train.StopSignals, "PATIENCE", 0.05)
    action = CTRL_C.format(times=2) + "\n        time.sleep(1000)"
    body = FROM_CALL_24_ON.format(path=str(tmp_path / "calls"), action=action)
    flags = ["--reward", write_reward(tmp_path, body)]
    error = ends(capsys, 130, train.main, words(tmp_path / "run", *flags, iterations=9))
    assert "stopped by a second Ctrl-C: --reward" in error
    assert "was running for the prompt '" in error
    saved = fsdp.list_checkpoints(str(tmp_path / "run"))[-1]
    assert error.endswith(f"the last good checkpoint is {saved}\n")
    # The folder is free again, and the handlers are those from before.
    os.close(fsdp.lock_folder(str(tmp_path / "run")))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_first_ctrl_c_in_a_reward_is_kept(tmp_path, capsys, monkeypatch):
    """Two at once are one: the iteration is finished."""
    action = CTRL_C.format(times=2).replace(".06", "0")
    body = FROM_CALL_24_ON.format(path=str(tmp_path / "calls"), action=action)
    flags = ["--reward", write_reward(tmp_path, body), "--checkpoint-every", "50"]
    error = ends(capsys, 130, train.main, words(tmp_path / "run", *flags, iterations=9))
    assert "stopped by Ctrl-C after iteration" in error
    assert len(fsdp.list_checkpoints(str(tmp_path / "run"))) == 1


class Ended(BaseException):
    """Stands for the end of the process."""


def test_a_reward_that_catches_ctrl_c_is_stopped_by_a_third(monkeypatch, capsys):
    """`while True: try: ... except: continue` catches the second.

    Guards against a process that only kill -9 ends.  A third at once is no third.
    """

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(train.StopSignals, "PATIENCE", 0.05)
    monkeypatch.setattr(os, "_exit", end)
    signals = train.StopSignals(ONE, received=[])
    signals.keep(signal.SIGINT, None)
    time.sleep(0.06)
    with pytest.raises(KeyboardInterrupt):
        signals.keep(signal.SIGINT, None)
    signals.keep(signal.SIGINT, None)
    time.sleep(0.06)
    with pytest.raises(Ended):
        signals.keep(signal.SIGINT, None)
    assert capsys.readouterr().err == "train.py: stopped by a third Ctrl-C\n"


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_ctrl_c_during_set_up_says_what_was_running(script, tmp_path, capsys, monkeypatch):
    """A reward that hangs may hang on its first completion, which set-up makes."""
    reward = write_reward(tmp_path, "raise KeyboardInterrupt")
    flags = ["--reward", reward, "--device", "cpu"]
    flags += ["--output-dir", str(tmp_path / "run")] if script == "train.py" else ["--n", "1"]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    error = ends(capsys, 130, runpy.run_path, str(ROOT / script), None, "__main__")
    assert error.startswith(f"{script}: stopped by Ctrl-C: --reward {reward} was running for the")


# --------------------------------------------------------------------------- B14: files of problems

BOM = b"\xef\xbb\xbf"
GOOD = b'{"prompt": "1*1=", "answer": 1}\n'


@pytest.mark.parametrize(
    "line, said",
    [
        (
            b'{"prompt": "1\\ud83d=", "answer": 1}',
            "line 2: prompt holds '\\\\ud83d', which is half",
        ),
        (b'{"prompt": "1", "prefill": "\\udc00", "answer": 1}', "prefill holds"),
        (b'{"prompt": "1", "difficulty": "\\ud800x", "answer": 1}', "difficulty holds"),
        (b"[" * 100_000 + b"]" * 100_000, "line 2: its brackets are nested too deeply"),
        (b'{"prompt": ' + b"[" * 100_000, "line 2: its brackets are nested too deeply"),
        (b'{"prompt": "1", "answer": ' + b'{"a":' * 100_000, "nested too deeply"),
        (b'\xff\xfe{"prompt"', "line 2: not JSON"),
        (b'{"prompt": "1", "answer": ' + b"9" * 5000 + b"}", "line 2: "),
    ],
)
@pytest.mark.parametrize("any_answer", [False, True])
def test_a_line_that_the_next_step_cannot_take_is_named(line, said, any_answer, tmp_path):
    """These were tracebacks, of the tokenizer or of the JSON reader."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + line + b"\n")
    with pytest.raises(ValueError, match=said) as error:
        data.read_problems(path, any_answer=any_answer)
    assert "\n" not in str(error.value)
    str(error.value).encode()  # the sentence itself can be written


def test_whole_characters_and_marks_at_the_beginning_are_fine(tmp_path):
    """A pair of halves is a character.  A byte order mark before a blank line was 'not JSON'."""
    path = tmp_path / "good.jsonl"
    joined = BOM + b"\n" + GOOD + BOM + b"\r\n" + BOM + b'{"prompt": "\\ud83d\\ude00", "answer": 2}'
    path.write_bytes(joined)
    problems = data.read_problems(path)
    assert [problem.prompt for problem in problems] == ["1*1=", "\U0001f600"]


# ---------------------------------------------------------------- B15: terminals of other encodings


def terminal(encoding):
    """A stream that writes bytes of this encoding, as a terminal does."""
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def printed(stream):
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_evaluation_in_any_terminal(encoding, tmp_path, monkeypatch):
    """A prompt with an arrow: it is printed as an escape, and the results are written.

    It was a traceback, and the results were lost.
    """
    path = tmp_path / "arrow.jsonl"
    path.write_text('{"prompt": "\\u2192 12*11=", "answer": 1}\n')
    monkeypatch.setattr(sys, "stdout", terminal(encoding))
    monkeypatch.setattr(sys, "stderr", terminal(encoding))
    flags = ["--eval-file", path, "--json", tmp_path / "out.json", "--device", "cpu"]
    evaluation.main([str(flag) for flag in flags])
    assert "\\u2192 12*11=" in printed(sys.stdout)
    assert rows(tmp_path / "out.jsonl")[0]["prompt"] == "\u2192 12*11="


def test_results_are_saved_before_they_are_printed(tmp_path, monkeypatch):
    """Whatever goes wrong with the printing."""

    def fails(*arguments):
        raise RuntimeError

    monkeypatch.setattr(evaluation, "print_results", fails)
    flags = ["--n", "1", "--json", str(tmp_path / "out.json"), "--device", "cpu"]
    with pytest.raises(RuntimeError):
        evaluation.run(flags)
    assert (tmp_path / "out.json").exists()
    assert len(rows(tmp_path / "out.jsonl")) == 1


def test_training_in_any_terminal(tmp_path, monkeypatch):
    """The path of the output folder is printed, and holds what the terminal lacks."""
    monkeypatch.setattr(sys, "stdout", terminal("ascii"))
    monkeypatch.setattr(sys, "stderr", terminal("ascii"))
    folder = tmp_path / "l\u00e4ufe \u2192"
    run(folder)
    assert "\\u2192/metrics.jsonl" in printed(sys.stdout)
    assert fsdp.list_checkpoints(str(folder))


def test_statistics_in_any_terminal(tmp_path, monkeypatch):
    path = tmp_path / "levels.jsonl"
    path.write_text('{"prompt": "1*1=", "answer": 1, "difficulty": "\\u2192"}\n')
    monkeypatch.setattr(sys, "stdout", terminal("latin-1"))
    monkeypatch.setattr(sys, "argv", ["data.py", "--file", str(path)])
    data.main()
    assert "\\u2192" in printed(sys.stdout)


# ---------------------------------------------------------------------- B16: two runs in one folder


def test_the_lock_comes_before_the_checkpoints(tmp_path, capsys):
    """A live run removes old checkpoints.  --resume auto beside it read one that was going.

    It said 'not a causal language model'.  Nothing in the folder is looked at before the lock.
    """
    folder = tmp_path / "run"
    (folder / "checkpoint_iter_3").mkdir(parents=True)
    lock = fsdp.lock_folder(str(folder))
    for flags in (["--resume", "auto"], ["--overwrite"], []):
        assert "another run is writing there" in refused(capsys, folder, *flags)
    os.close(lock)
    assert "not a complete checkpoint" in refused(capsys, folder, "--resume", "auto")


@pytest.mark.parametrize("flags", ["--resume", "--eval-only --checkpoint"])
def test_a_checkpoint_that_goes_while_it_is_read_is_said(
    flags, inputs, tmp_path, capsys, monkeypatch
):
    """A run that is alive in another folder may remove it."""
    folder = shutil.copytree(inputs, tmp_path / "copy")
    load_everything = train.load_everything

    def pruned(config, source, reward, ranks):
        shutil.rmtree(source)
        return load_everything(config, source, reward, ranks)

    monkeypatch.setattr(train, "load_everything", pruned)
    given = [*flags.split(), folder / "run" / "checkpoint_iter_1", *input_flags(folder)]
    given = words(tmp_path / "other", *given)
    if "--eval-only" in given:  # which takes no --config
        preset = given.index("--config")
        del given[preset : preset + 2]
    error = ends(capsys, 2, train.main, given)
    assert "checkpoint_iter_1 was removed while it was read" in error


# ------------------------------------------------------------------------------------- B17: threads


def test_another_number_of_threads_is_said(inputs, tmp_path, capsys):
    """Sums round differently.  It was said nowhere, and the state did not know."""
    folder = shutil.copytree(inputs, tmp_path / "copy")
    flags = [*input_flags(folder), "--resume", "auto"]
    path = folder / "run" / "checkpoint_iter_1" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["threads"] == torch.get_num_threads()
    run(folder / "run", *flags, iterations=2)
    assert capsys.readouterr().err == ""
    path = folder / "run" / "checkpoint_iter_2" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": 99}))
    run(folder / "run", *flags, iterations=3)
    error = capsys.readouterr().err
    assert "was trained with 99 threads, this run has" in error
    assert "--threads 99" in error
    assert error.count("\n") == 1


def test_a_small_model_gets_one_thread(monkeypatch):
    """Guards against two threads that wait for each other on a busy machine: 1,030 s, not 80.

    --threads and OMP_NUM_THREADS win, in this order, and a large model keeps what PyTorch takes.
    """
    small = torch.nn.Linear(10, 10)
    large = torch.nn.Linear(policy.SMALL_MODEL, 1, device="meta")
    before = torch.get_num_threads()
    try:
        for model, threads, variable, expected in (
            (small, 0, None, 1),
            (small, 0, "3", 3),
            (small, 2, "3", 2),
            (large, 0, None, 3),
            (large, 2, None, 2),
        ):
            torch.set_num_threads(3)
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if variable:
                monkeypatch.setenv("OMP_NUM_THREADS", variable)
            policy.use_threads(model, threads)
            assert torch.get_num_threads() == expected, (threads, variable)
    finally:
        torch.set_num_threads(before)


def test_threads_are_printed_and_may_change_after_a_resume(inputs, tmp_path, capsys):
    """Guards against a flag that is read and not used."""
    before = torch.get_num_threads()
    folder = shutil.copytree(inputs, tmp_path / "copy")
    try:
        run(folder / "run", *input_flags(folder), "--resume", "auto", "--threads", 2, iterations=2)
    finally:
        torch.set_num_threads(before)
    said = capsys.readouterr()
    assert "of 2 threads" in said.out
    assert "was trained with 1 threads, this run has 2" in said.err


# ------------------------------------------------------------------------- B18: what the field does


@pytest.mark.parametrize(
    "warmup, iterations, expected",
    [
        (0, 1, [1.0]),  # it was .02
        (0, 3, [1.0, 0.51, 0.02]),
        (1, 3, [1.0, 0.51, 0.02]),
        (2, 4, [0.5, 1.0, 0.51, 0.02]),
        (5, 2, [0.2, 0.4]),
        (4, 4, [0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_the_rate_begins_at_the_peak_without_a_warm_up(warmup, iterations, expected):
    """By hand; half way down the cosine is .02 + .98/2 = .51."""
    config = train.Config(warmup=warmup, iterations=iterations)
    scale = [train.learning_rate_scale(config, i) for i in range(1, iterations + 1)]
    assert scale == pytest.approx(expected)


def test_a_run_without_a_warm_up_has_its_peak_rate(tmp_path):
    """One iteration of the loop itself, with the rates of both."""
    metrics = run(tmp_path, "--warmup", "0", "--learning-rate", "1e-4")
    assert metrics[1]["learning_rate"] == pytest.approx(1e-4)


def test_weight_decay_is_for_matrices_alone():
    """A step with zero gradients: a matrix shrinks by rate * decay = .001, a vector stays.

    Norms and biases were decayed too.  Of GPT-2, which has both kinds in every block.
    """
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=12, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    head = value_module.ValueHead(8)
    settings = train.Config(weight_decay=0.1, learning_rate=0.01, value_learning_rate=0.01)
    optimizer = train.make_optimizer(model, head, settings)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    before = {}
    for name, parameter in fsdp.named_parameters(model, head).items():
        torch.nn.init.normal_(parameter)
        before[name] = parameter.detach().clone()
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kinds = set()
    for name, parameter in fsdp.named_parameters(model, head).items():
        factor = 0.999 if parameter.ndim == 2 else 1.0
        assert torch.allclose(parameter, before[name] * factor, rtol=1e-6), name
        kinds.add((name.split(".")[0], parameter.ndim))
    assert kinds == {("policy", 1), ("policy", 2), ("value", 1), ("value", 2)}
