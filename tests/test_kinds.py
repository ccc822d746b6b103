"""Bugs of a tired engineer that once survived the tests, each by the numbers that show it.

One section a file of the eight.  The numbers are worked by hand.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import types

import pytest
import torch
import transformers
from conftest import rows, tensors

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
# The credit and the update as functions; test_steps_of_the_copy asserts that they are train.main's.
spec = importlib.util.spec_from_file_location("step", ROOT / "experiments" / "step.py")
step = importlib.util.module_from_spec(spec)
spec.loader.exec_module(step)

ONE = fsdp.Ranks(rank=0, world_size=1, device=torch.device("cpu"))
SMALL = """
    --config ppo --problems-per-iteration 4 --rollouts-per-problem 3 --eval-problems 1
    --eval-every 50 --max-new-tokens 8 --device cpu --checkpoint-every 1 --samples 3
""".split()


def run(folder, *flags, iterations=1):
    """A small run in this process."""
    given = [*SMALL, "--iterations", iterations, "--output-dir", folder, *flags]
    train.main([str(word) for word in given])


def same_row(probabilities):
    """expand(nodes) of a policy that is the same everywhere, and h = 0; it counts in `asked`."""
    row = torch.tensor(probabilities, dtype=torch.float64).log()
    asked = []

    def expand(nodes):
        asked.extend(tuple(node.tokens()) for node in nodes)
        return row.expand(len(nodes), -1), torch.zeros(len(nodes), 1)

    expand.asked = asked
    return expand


@pytest.fixture(scope="module")
def base():
    """(model, tokenizer) of the tiny base."""
    return policy.load_policy(BASE)


# --------------------------------------------------------------------- train.py: rollouts in chunks


class RightFor:
    """A reward that calls every completion of some prompts right, and no other."""

    def __init__(self, *prompts):
        self.prompts = prompts

    def judge(self, problem, completion, length_fraction=0.0, truncated=False):
        return {"correct": problem.prompt in self.prompts}


def searches_done(base, problems, reward, rollout_batch):
    """How many of these searches stop with a right leaf."""
    settings = "--until-right on --tau 0 --rollouts-per-problem 2 --max-new-tokens 3".split()
    config = train.parse_arguments([*settings, "--rollout-batch", str(rollout_batch)])[0]
    rollouts = train.generate_rollouts(
        *base,
        problems,
        range(4),
        config,
        reward,
        iteration=1,
        value_function=None,
        kind="astar",
        K=2,
    )
    assert rollouts.problem.unique().tolist() == [0, 1, 2, 3]
    return rollouts.stats["stopped"]["done"]


@pytest.mark.parametrize("rollout_batch", [1, 3, 4])
def test_the_stop_rule_of_a_chunk_knows_the_problems_of_the_chunk(base, rollout_batch):
    """Four problems, a reward that is right for one alone: one search stops as 'done'.

    With the rule given all problems, row 0 of every chunk would be judged as problem 0: four.
    """
    problems = [data.make_problem(a, 11) for a in (12, 34, 56, 78)]
    for problem in problems:
        assert searches_done(base, problems, RightFor(problem.prompt), rollout_batch) == 1
    half = RightFor(problems[0].prompt, problems[3].prompt)
    assert searches_done(base, problems, half, rollout_batch) == 2
    assert searches_done(base, problems, RightFor(), rollout_batch) == 0


# ------------------------------------------------------------------- fsdp.py: checkpoints by number


def test_the_tenth_checkpoint_is_newer_than_the_ninth(tmp_path):
    """_9 and _10, keep 1: 10 is left.  Sorted as text it would be 9."""
    for i in (9, 10):
        (tmp_path / f"checkpoint_iter_{i}").mkdir()
    fsdp.prune_checkpoints(str(tmp_path), iteration=10, keep=1)
    assert os.listdir(tmp_path) == ["checkpoint_iter_10"]


def test_a_run_of_more_than_ten_iterations_keeps_and_resumes_the_newest(tmp_path, capsys):
    """Guards against an order of names: 9 would be kept, found, and gone on from."""
    flags = "--problems-per-iteration 1 --minibatches 1 --max-new-tokens 3 --tau 0".split()
    run(tmp_path, *flags, "--keep-checkpoints", "1", iterations=10)
    assert [path.name for path in tmp_path.glob("check*")] == ["checkpoint_iter_10"]
    run(tmp_path, *flags, "--keep-checkpoints", "2", "--resume", "auto", iterations=11)
    assert "after iteration 10" in capsys.readouterr().out
    found = [os.path.basename(path) for path in fsdp.list_checkpoints(str(tmp_path))]
    assert found == ["checkpoint_iter_10", "checkpoint_iter_11"]


# -------------------------------------------------------------------- astar_search.py: leaf weights


def test_weights_of_plain_leaves_that_underflow():
    """log p = [0, -460] and K = 3: leaves of log pi 0, -460 and -920 weigh 1, 1.7e-200 and 0.

    No overflow, and no 0/0.
    """

    def expand(nodes):
        row = torch.tensor([0.0, -460.0], dtype=torch.float64)
        return row.expand(len(nodes), -1), torch.zeros(len(nodes), 1)

    options = Options(eos=(0,), K=3, tau=0.0, max_new_tokens=3)
    (tree,) = search(root_keys(0, 0, [0]), expand, options)
    assert [leaf.g for leaf in tree.leaves] == [0.0, -460.0, -920.0]
    assert [leaf.weight for leaf in tree.leaves] == pytest.approx(
        [1.0, math.exp(-460), 0.0], rel=1e-9
    )
    assert tree.leaves[1].weight == pytest.approx(1.7e-200, rel=0.05)


def test_log_inclusion_by_hand():
    """log(1 - exp(-e^-5)) = -5.003367; to take e^-5 for it would be off by .003."""
    assert log_inclusion(-5.0, 0.0, 1.0) == pytest.approx(-5.003367, abs=1e-6)
    assert log_inclusion(-2.5, 0.0, 0.5) == pytest.approx(-5.003367, abs=1e-6)


@pytest.mark.parametrize("width", [1, 2, 8])
def test_a_search_for_one_leaf_asks_for_its_path_alone(width):
    """pi = (.9, .1), four tokens, one leaf wanted: the prefixes of length 0 to 3, four calls.

    At any width: nodes beyond what may still be accepted are not asked for.
    """
    expand = same_row((0.9, 0.1))
    options = Options(eos=(), K=1, tau=0.0, max_new_tokens=4, width=width)
    (tree,) = search(root_keys(0, 0, [0]), expand, options)
    assert expand.asked == [(), (0,), (0, 0), (0, 0, 0)]
    assert tree.pops == 4


def test_a_search_asks_for_no_node_twice():
    """pi = (.7, .3), three tokens, two leaves: .343 and .147.  Six prefixes are above .147.

    They are 1, .7, .49, .3, .21 and .21: six calls.
    """
    expand = same_row((0.7, 0.3))
    options = Options(eos=(), K=2, tau=0.0, max_new_tokens=3)
    (tree,) = search(root_keys(0, 0, [0]), expand, options)
    assert expand.asked == [(), (0,), (0, 0), (1,), (0, 1), (1, 0)]
    assert [round(math.exp(leaf.g), 3) for leaf in tree.leaves] == [0.343, 0.147]
    # Two at once: the same six, each once, and no more than the two that may still be accepted.
    wide = same_row((0.7, 0.3))
    search(root_keys(0, 0, [0]), wide, dataclasses.replace(options, width=8))
    assert len(wide.asked) == len(set(wide.asked))
    assert set(expand.asked) <= set(wide.asked)
    assert len(wide.asked) <= 7


def test_each_of_several_end_tokens_ends_a_completion():
    """pi = (.5, .2, .3), ends 0 and 2, at most two tokens: 0, 2, 10, 11 and 12, of pi .5 to .04."""
    options = Options(eos=(0, 2), K=9, tau=0.0, max_new_tokens=2)
    (tree,) = search(root_keys(0, 0, [0]), same_row((0.5, 0.2, 0.3)), options)
    assert [leaf.tokens() for leaf in tree.leaves] == [[0], [2], [1, 0], [1, 2], [1, 1]]
    assert [leaf.truncated for leaf in tree.leaves] == [False, False, False, False, True]
    assert tree.stopped == "exhausted"


def test_the_mass_of_samples_that_end_alike_is_counted_once():
    """pi = (.6, .3, .1) and 64 samples of one token: three leaves that hold 1, and not 64 terms."""
    options = Options(eos=(), K=64, max_new_tokens=1)
    (tree,) = sample(root_keys(0, 0, [0]), same_row((0.6, 0.3, 0.1)), options)
    assert len(tree.leaves) == 3
    assert tree.mass == pytest.approx(1.0)
    assert sum(leaf.count for leaf in tree.leaves) == 64
    assert sum(leaf.weight for leaf in tree.leaves) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------- policy.py


def test_the_deviation_of_grpo_is_weighted():
    """r = (1, -1), w = (.75, .25): mean .5, variance .75 * .25 + .25 * 2.25 = .75.

    A = (.5, -1.5)/.866 = (.577, -1.732).  Unweighted, the deviation would be 1.
    """
    advantages = policy.grpo_advantages(
        torch.tensor([1.0, -1.0]), torch.tensor([0.75, 0.25]), torch.tensor([0, 0])
    )
    assert advantages.tolist() == pytest.approx([0.577, -1.732], abs=1e-3)


def test_stop_tokens_of_the_model_and_of_the_tokenizer():
    """Generation config [5, 7] and tokenizer 2: (2, 5, 7).  One id, several, or none of either."""
    for from_config, from_tokenizer, expected in (
        ([5, 7], 2, (2, 5, 7)),
        (5, 2, (2, 5)),
        ([7, 5], None, (5, 7)),
        (None, 2, (2,)),
        (0, 0, (0,)),
        (None, None, ()),
    ):
        model = types.SimpleNamespace(
            generation_config=types.SimpleNamespace(eos_token_id=from_config)
        )
        tokenizer = types.SimpleNamespace(eos_token_id=from_tokenizer)
        assert policy.stop_tokens(model, tokenizer) == expected


def test_explained_variance_does_not_ask_for_the_level():
    """V = r + .5 explains every return: the residual is centred.  V = 0 explains none."""
    r = torch.tensor([1.0, -1.0, 1.0, 0.2])
    weight = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert policy.explained_variance(policy.variance_sums(r + 0.5, r, weight)) == pytest.approx(1)
    assert policy.explained_variance(policy.variance_sums(0 * r, r, weight)) == pytest.approx(0)


def test_the_context_holds_prompt_and_completion():
    """Context 64, prompt 50: 14 new tokens fit, 15 do not."""
    config = transformers.LlamaConfig(max_position_embeddings=64)
    model = types.SimpleNamespace(config=config)
    policy.check_context(model, 50, 14)
    with pytest.raises(ValueError, match="context of 64 tokens"):
        policy.check_context(model, 50, 15)


# ------------------------------------------------------------------------------------------ eval.py


def test_the_interval_of_two_problems_in_four():
    """Shares 1, .5, .5, 0 of four draws: n_eff = 4 * min(4, .25/.125) = 8.

    Wilson at p = .5 and n = 8: (.2152, .7848).  With the draws it would be n = 16, without n = 4.
    """
    assert evaluation.interval([1, 0.5, 0.5, 0], draws=4) == pytest.approx(
        [0.2152, 0.7848], abs=1e-4
    )


def test_samples_of_an_evaluation_do_not_depend_on_the_batch(base):
    """Noise is keyed by the number of the problem; by its place in the batch, two would be alike.

    The two problems are the same, so that with the same noise their completions would be the same.
    """
    problems = [data.make_problem(12, 34)] * 2
    found = []
    for batch in (1, 2):
        _, kept = evaluation.evaluate(
            *base,
            problems,
            reward_module.Reward(),
            ONE,
            decode="sample",
            n=4,
            max_new_tokens=14,
            batch=batch,
        )
        found.append([[c["text"] for c in row["completions"]] for row in kept])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


# ---------------------------------------------------------------------------------------- reward.py


@pytest.mark.parametrize("space", ["\u00a0", "\f", "\v", "\u2003", "\x1c", "\u2028"])
def test_only_plain_white_space_stands_around_a_number(space):
    """str.strip() alone would drop no-break spaces and form feeds too."""
    assert reward_module.parse_number(" \t\r\n408\n") == 408
    for text in (f"{space}408", f"408{space}", f"4{space}08", space):
        assert reward_module.parse_number(text) is None


# -------------------------------------------------------------------------- train.py: the optimiser


def test_both_groups_of_the_optimiser_have_the_decay_of_the_flag(base):
    """The policy and the head, their matrices; norms and biases have none.

    Every weight that is trained is in one group, with the peak rate of its module.
    """
    model, _ = base
    head = value_module.ValueHead(128)
    settings = train.Config(weight_decay=0.25, learning_rate=0.01, value_learning_rate=0.02)
    optimizer = train.make_optimizer(model, head, settings)
    group_of = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in group_of
            group_of[id(parameter)] = group
    for name, parameter in fsdp.named_parameters(model, head).items():
        group = group_of.pop(id(parameter))
        assert group["weight_decay"] == (0.25 if parameter.ndim == 2 else 0.0), name
        of_policy = name.startswith("policy.")
        assert group["peak"] == (0.01 if of_policy else 0.02), name
        assert group["betas"] == ((0.9, 0.95) if of_policy else (0.9, 0.999)), name
    assert group_of == {}


# ------------------------------------------------------------------- train.py: weights, and the log


def leaves_of(problem, **columns):
    """What leaf_weights and sample_rows read of Rollouts; columns (B,) as lists."""
    made = {name: torch.tensor(column) for name, column in columns.items()}
    return types.SimpleNamespace(problem=torch.tensor(problem), **made)


def test_without_leaf_weights_the_counts_remain():
    """Samples that ended alike 3 times and once: (.75, .25), whatever pi/q says."""
    leaves = leaves_of([0, 0, 1], weight=[0.1, 0.3, 5.0], count=[3, 1, 2])
    off = train.parse_arguments(["--leaf-weights", "off"])[0]
    assert train.leaf_weights(leaves, off).tolist() == pytest.approx([0.75, 0.25, 1.0])
    on = train.parse_arguments([])[0]
    assert train.leaf_weights(leaves, on).tolist() == pytest.approx([0.25, 0.75, 1.0])


def rank_rows(rank, world_size, gather, monkeypatch, iteration=2):
    """sample_rows of one rank for 7 problems of 1 to 3 leaves each, all their fields distinct.

    gather(rows of this rank) -> rows by rank stands for the exchange.
    """
    ranks = fsdp.Ranks(rank, world_size, torch.device("cpu"))
    indices = list(fsdp.rank_slice(7, ranks))
    problems = []
    columns = {"problem": [], "log_pi": [], "f": [], "leaf_weight": []}
    texts = []
    verdicts = []
    for p, index in enumerate(indices):
        problems.append(data.Problem(f"prompt {index}", answer=index))
        for leaf in range(1 + index % 3):
            number = 10.0 * index + leaf
            columns["problem"].append(p)
            columns["log_pi"].append(-number)
            columns["f"].append(number / 2)
            columns["leaf_weight"].append(number / 100)
            texts.append(f"completion {index}.{leaf}")
            verdicts.append({"reward": number, "correct": False})
    rollouts = leaves_of(columns["problem"], log_pi=columns["log_pi"], f=columns["f"])
    rollouts.extra = {"leaf_weight": torch.tensor(columns["leaf_weight"])}
    config = train.Config(problems_per_iteration=7, samples=4, minibatches=1, seed=3)
    monkeypatch.setattr(fsdp, "all_gather", lambda found, ranks: gather(found))
    return train.sample_rows(config, iteration, indices, rollouts, texts, verdicts, problems, ranks)


def test_a_sample_holds_its_own_prompt_truth_and_completion(monkeypatch):
    """Whole rows, on 1, 2 and 3 ranks: the same four, and what belongs together stands together."""
    whole = rank_rows(0, 1, lambda found: [found], monkeypatch)
    assert len(whole) == 4
    for row in whole:
        index, leaf = re.fullmatch(r"completion (\d)\.(\d)", row["completion"]).groups()
        number = 10.0 * int(index) + int(leaf)
        assert row == {
            "iteration": 2,
            "prompt": f"prompt {index}",
            "completion": f"completion {index}.{leaf}",
            "truth": int(index),
            "reward": number,
            "correct": False,
            "weight": pytest.approx(number / 100),
            "log_pi": -number,
            "f": number / 2,
        }
    for world_size in (2, 3):
        parts = []

        def keep(found, parts=parts):
            parts.append(found)
            return [found]

        for rank in range(world_size):
            rank_rows(rank, world_size, keep, monkeypatch)
        for rank in range(world_size):
            gathered = rank_rows(rank, world_size, lambda found, parts=parts: parts, monkeypatch)
            assert gathered == whole


def test_every_iteration_shows_other_problems_and_leaves(monkeypatch):
    """Four of seven problems and one leaf of each, drawn anew by (seed, iteration)."""
    shown = []
    for iteration in range(1, 31):
        found = rank_rows(0, 1, lambda found: [found], monkeypatch, iteration)
        shown.append([row["completion"] for row in found])
    assert len({tuple(completions) for completions in shown}) > 20
    leaves = {completion for completions in shown for completion in completions}
    assert {"completion 2.0", "completion 2.1", "completion 2.2"} <= leaves


def test_samples_of_a_run_are_what_the_model_wrote(tmp_path, base):
    """Each row through the loop: its truth is that of its prompt, its reward that of its
    completion, and its log pi that of prompt and completion together under the base.
    """
    run(tmp_path, "--max-new-tokens", "14")
    model, tokenizer = base
    found = rows(tmp_path / "samples.jsonl")
    assert len(found) == 3
    reward = reward_module.Reward()
    for row in found:
        a, b = row["prompt"].rstrip("=").split("*")
        assert row["truth"] == int(a) * int(b)
        verdict = reward(row["completion"], row["truth"])
        if verdict["answer"] is not None:  # it was not cut off
            assert {name: row[name] for name in verdict} == verdict
        (prompt,) = evaluation.encode_prompts(tokenizer, [data.Problem(row["prompt"], 0)])
        ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids = prompt + ids + ([] if len(ids) == 14 else [tokenizer.eos_token_id])
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits.log_softmax(dim=-1)
        places = range(len(prompt) - 1, len(ids) - 1)
        log_pi = sum(log_probs[0, t, ids[t + 1]].item() for t in places)
        assert row["log_pi"] == pytest.approx(log_pi, abs=1e-3)


# ---------------------------------------------------------------- data.py, reward.py: what is given


def test_an_empty_prefill_replaces_that_of_a_line(tmp_path):
    """ "" means no prefill, and None that of the line."""
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "1*1=", "answer": 1, "prefill": "<think>"}\n')
    found = [data.read_problems(path, prefill)[0].prefill for prefill in (None, "", "x")]
    assert found == ["<think>", "", "x"]


@pytest.mark.parametrize(
    "returned, allowed", [(-0.5, True), (-0.6, False), (2.0, True), (2.1, False)]
)
def test_a_reward_of_ones_own_lies_within_both_bounds(returned, allowed):
    """Below r_lo the soft value would be wrong as above r_hi."""

    def function(problem, completion):
        return returned

    own = reward_module.OwnReward("own", function, (-0.5, 2.0))
    if allowed:
        assert own.judge(data.Problem("1=", 1), "x")["reward"] == returned
    else:
        with pytest.raises(reward_module.RewardError, match="not a number from -0.5 to 2"):
            own.judge(data.Problem("1=", 1), "x")


# ------------------------------------------------------------------- flags that must not be ignored


def watch(monkeypatch, module, name):
    """Record the arguments of every call of a function: [(positional, keywords), ...]."""
    function = getattr(module, name)
    calls = []

    def watched(*arguments, **keywords):
        calls.append((arguments, keywords))
        return function(*arguments, **keywords)

    monkeypatch.setattr(module, name, watched)
    return calls


def test_every_number_of_the_update_and_the_search_arrives(tmp_path, monkeypatch):
    """One run with other values than the defaults; each is looked for where it is used.

    Guards against an argument that is left out of a call: the default would be used silently.
    """
    ppo_loss = watch(monkeypatch, policy, "ppo_loss")
    ratio_metrics = watch(monkeypatch, policy, "ratio_metrics")
    gae = watch(monkeypatch, value_module, "gae")
    soft_target = watch(monkeypatch, value_module, "soft_target")
    clip_grad_norm = watch(monkeypatch, train, "clip_grad_norm_")
    split_by_length = watch(monkeypatch, train, "split_by_length")
    searches = watch(monkeypatch, astar_search, "search")
    prune = watch(monkeypatch, fsdp, "prune_checkpoints")
    guide = watch(monkeypatch, evaluation, "value_function")
    evaluate = watch(monkeypatch, evaluation, "evaluate")
    flags = """
        --clip .31 --entropy-coef .02 --gae-lambda .7 --grad-clip .4 --width 3 --max-nodes 77
        --max-open 99 --cover .6 --beta .3 --rollout-batch 3 --micro-batch 5 --keep-checkpoints 4
        --eval-decode astar --eval-completions 2 --guide none --seed 9 --epochs 3 --minibatches 2
    """.split()
    run(tmp_path, *flags)
    for _, keywords in ppo_loss:
        assert (keywords["clip"], keywords["entropy_coef"]) == (0.31, 0.02)
    for _, keywords in ratio_metrics:
        assert keywords["clip"] == 0.31
    for arguments, _ in gae:
        assert arguments[3] == 0.7
    for arguments, _ in soft_target:
        assert arguments[3] == 0.3
    # The policy and the head in each of 3 * 2 steps.
    assert [arguments[1] for arguments, _ in clip_grad_norm] == [0.4] * 12
    assert {arguments[2] for arguments, _ in split_by_length} == {5}
    of_training = searches[1:-1]  # the first and the last are of the evaluations
    assert [len(arguments[0]) for arguments, _ in of_training] == [3, 1]
    for arguments, _ in of_training:
        options = arguments[2]
        assert (options.K, options.tau, options.width) == (3, 1.0, 3)
        assert (options.max_nodes, options.max_open, options.cover) == (77, 99, 0.6)
        assert (options.max_new_tokens, options.until) == (8, None)
    keys = [key for arguments, _ in of_training for key in arguments[0]]
    assert keys == root_keys(9, 1, range(4))
    assert prune[-1][0][2] == 4
    assert guide[0][0][2] == 0.3
    assert guide[0][1]["use_head"] is False
    for _, keywords in evaluate:
        assert (keywords["decode"], keywords["n"], keywords["max_new_tokens"]) == ("astar", 2, 8)
        assert (keywords["width"], keywords["max_nodes"], keywords["batch"]) == (3, 77, 3)


def test_every_number_of_apo_arrives(tmp_path, monkeypatch):
    """V* by beta1 on so many samples, the loss by beta2; leaves are divided by leaves.

    Four problems in two minibatches: weights that sum to one in each problem, and divided by the
    number of problems sum to one in a minibatch.
    """
    optimal_value = watch(monkeypatch, policy, "optimal_value")
    apo_loss = watch(monkeypatch, policy, "apo_loss")
    flags = "--loss apo --beta1 .7 --beta2 .02 --apo-samples 3 --epochs 1 --minibatches 2".split()
    run(tmp_path, *flags)
    ((rewards, beta1), _) = optimal_value[0]
    assert rewards.shape == (4, 3)
    assert beta1 == 0.7
    for _, keywords in apo_loss:
        assert keywords["beta2"] == 0.02
    total = sum(keywords["leaf_weights"].sum().item() for _, keywords in apo_loss)
    assert total == pytest.approx(2.0)


class Stop(Exception):
    """Ends an evaluation as soon as its arguments are known."""


def test_every_number_of_an_evaluation_arrives(monkeypatch):
    def stop(*arguments, **keywords):
        raise Stop(arguments, keywords)

    monkeypatch.setattr(evaluation, "evaluate", stop)
    flags = """
        --decode astar --n 3 --completions 5 --max-new-tokens 9 --tau .4 --width 6 --max-nodes 70
        --seed 8 --device cpu --digits 1 --prompt terse --prefill x --stop 7 --stop 8
        --batch 33
    """.split()
    with pytest.raises(Stop) as stopped:
        evaluation.main(flags)
    arguments, keywords = stopped.value.args
    assert [problem.prefill for problem in arguments[2]] == ["x"] * 3
    assert keywords == {
        "decode": "astar",
        "n": 5,
        "max_new_tokens": 9,
        "stop": ["7", "8"],
        "value_function": None,
        "tau": 0.4,
        "width": 6,
        "max_nodes": 70,
        "batch": 33,
        "seed": 8,
    }


# ------------------------------------------------------------------ Numbers that only look harmless


def test_em_counts_a_problem_by_its_best_target():
    """One right leaf of target .6, alone in its problem: A = .6 * .6/.6 = .6, and not 1.

    Without the best target a right but ill-formed answer would count like a well-formed one.
    """
    advantages = policy.em_advantages(
        targets=torch.tensor([0.6, 1.0]),
        weight=torch.ones(2),
        problem=torch.tensor([0, 1]),
        correct=torch.tensor([True, True]),
    )
    assert torch.allclose(advantages, torch.tensor([0.6, 1.0]))


def test_apo_reads_no_log_ratio_off_the_mask():
    """Log ratios (1, 2, 4), the last off the mask, beta2 = .1, V* = r: loss (.1 * 3)^2 = .09."""
    loss, _ = policy.apo_loss(
        log_prob=torch.tensor([[1.0, 2.0, 4.0]]),
        ref_log_prob=torch.zeros(1, 3),
        mask=torch.tensor([[True, True, False]]),
        rewards=torch.ones(1),
        optimal_values=torch.ones(1),
        beta2=0.1,
        leaf_weights=torch.ones(1),
    )
    assert abs(loss.item() - 0.09) < 1e-6


def test_the_seconds_of_a_run_go_on_after_a_resume():
    """A clock that starts with 100 seconds says at least 100, and those of its own beside them."""
    clock = train.Clock(100.0)
    assert 100.0 <= clock.seconds() < 110.0
    assert train.Clock().seconds() < 10.0


def test_a_resumed_run_has_the_seconds_of_its_checkpoint(tmp_path):
    """The trainer state says 1,000 seconds: every row after the resume has more."""
    run(tmp_path / "run")
    state_file = tmp_path / "run" / "checkpoint_iter_1" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    state_file.write_text(json.dumps({**state, "seconds": 1000.0}))
    run(tmp_path / "run", "--resume", "auto", iterations=2)
    assert rows(tmp_path / "run" / "metrics.jsonl")[-1]["seconds"] > 1000.0


def test_totals_of_a_minibatch_are_weighted():
    """Leaves of weight .25 and .75 with 1 and 3 tokens, of which the second teaches.

    tokens: .25 + 3 * .75 = 2.5;  leaves: 1;  teaching_tokens: 3 * .75 = 2.25.
    """
    mask = torch.tensor([[True, False, False], [True, True, True]])
    extra = {"leaf_weight": torch.tensor([0.25, 0.75]), "teaches": torch.tensor([False, True])}
    rollouts = types.SimpleNamespace(extra=extra, mask=mask)
    totals = train.minibatch_totals(rollouts, torch.tensor([1, 0]), ONE)
    assert totals == {"tokens": 2.5, "leaves": 1.0, "teaching_tokens": 2.25}


def test_the_rate_of_every_group_follows_the_schedule(tmp_path, monkeypatch):
    """Iteration 1 of a warm-up of 10: a tenth of the peak, for the policy and for the head."""
    made = []
    make_optimizer = train.make_optimizer

    def watched(*arguments):
        made.append(make_optimizer(*arguments))
        return made[0]

    monkeypatch.setattr(train, "make_optimizer", watched)
    run(tmp_path / "run", "--warmup", 10)
    peaks = {group["peak"] for group in made[0].param_groups}
    assert peaks == {3e-4, 1e-3}
    for group in made[0].param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["peak"])


def test_the_last_iteration_is_kept_whatever_the_interval(tmp_path):
    """One iteration, a checkpoint every 50: there is one at the end."""
    run(tmp_path / "run", "--checkpoint-every", 50)
    assert (tmp_path / "run" / "checkpoint_iter_1").is_dir()


FREE = """
    iterations device threads distributed replicas cpu_offload output_dir eval_every
    eval_completions checkpoint_every keep_checkpoints samples resume overwrite micro_batch model
    rollout_batch wandb tensorboard train_file eval_file reward
""".split()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(train.Config)])
def test_which_flags_may_differ_on_resume(name):
    """Any other flag would make the run a mixture of two: of another seed, for example.

    (The user's files are free here because they are compared by content.)
    """
    config = train.Config()
    before = dataclasses.asdict(config)
    before[name] = "another"
    if name in FREE:
        train.check_same_run(config, {"config": before, "inputs": {}}, "runs/x")
        return
    with pytest.raises(ValueError, match="differs from the another"):
        train.check_same_run(config, {"config": before, "inputs": {}}, "runs/x")


def test_the_first_step_is_as_long_as_the_rates(tmp_path):
    """Adam's first step moves every weight by the rate, whatever the gradient.

    A warm-up of four iterations: .25 of each peak, 1e-3 of the policy and 4e-3 of the head, whose
    last bias starts at 0.  The checkpoint of the end is there, though none is due before.
    """
    flags = """
        --warmup 4 --epochs 1 --minibatches 1 --learning-rate 1e-3 --value-learning-rate 4e-3
        --checkpoint-every 50
    """.split()
    run(tmp_path, *flags)
    moved = tensors(tmp_path / "checkpoint_iter_1")
    assert moved["value/outer.bias"].abs().tolist() == pytest.approx([1e-3, 1e-3], rel=1e-3)
    before = policy.load_policy(BASE)[0].state_dict()["model.norm.weight"]
    step = (moved["model/model.norm.weight"] - before).abs()
    assert step.median().item() == pytest.approx(2.5e-4, rel=1e-2)
    assert rows(tmp_path / "metrics.jsonl")[1]["learning_rate"] == pytest.approx(2.5e-4)


def test_a_cover_of_one_never_stops_a_search(tmp_path, monkeypatch):
    """pi of the leaves may add up to 1.0 by rounding, long before K leaves are found."""
    searches = watch(monkeypatch, astar_search, "search")
    run(tmp_path, "--cover", "1")
    assert searches
    assert all(arguments[2].cover == math.inf for arguments, _ in searches)


def test_the_critic_is_fitted_to_rewards_and_u_to_soft_targets(tmp_path, monkeypatch):
    """Nearly every answer within 8 tokens is wrong: V's returns are about -1, u's targets 0."""
    seen = []
    value_loss = value_module.value_loss

    def watched(**arguments):
        seen.append((arguments["returns"], arguments["targets"]))
        return value_loss(**arguments)

    monkeypatch.setattr(value_module, "value_loss", watched)
    run(tmp_path / "run")
    assert min(returns.min().item() for returns, _ in seen) < -0.8
    assert all(targets.min() >= 0.0 and targets.max() <= 1.0 for _, targets in seen)


# ----------------------------------------------------------- The update runs only what has a weight


@pytest.mark.parametrize("loss", ["em", "grpo", "ppo"])
def test_the_completions_left_out_have_no_gradient(loss):
    """The policy's gradient of those that teach is that of all; the head's is that of a forward.

    Guards a completion with a gradient that is left out, totals of fewer completions, and hidden
    states that belong to another prefix, also after selecting, concatenating and padding.
    """
    config = train.parse_arguments(["--loss", loss, "--rollout-batch", "5"])[0]
    model, tokenizer = policy.load_policy(BASE)
    reward = reward_module.Reward()
    problems = data.eval_problems(12, prefill="<think>")
    arguments = (model, tokenizer, problems, range(12), config, reward)
    # Chunks of 5, 5 and 2 problems are concatenated.
    rollouts = train.generate_rollouts(
        *arguments, iteration=1, value_function=None, kind="astar", K=6
    )
    texts, verdicts = evaluation.judge_rollouts(rollouts, tokenizer, problems, reward, 48)
    rollouts.extra = step.columns_of(rollouts, verdicts, reward, config)
    teaches = rollouts.extra["teaches"]
    if loss != "ppo":
        assert 0 < teaches.sum() < len(rollouts)
    rows = torch.arange(len(rollouts))
    totals = train.minibatch_totals(rollouts, rows, ONE)

    def gradient(chosen):
        model.zero_grad()
        for part in train.parts_of(rollouts, chosen, config, ONE):
            policy_loss, _ = step.policy_loss_of(model, part, config, totals)
            policy_loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradient(rows)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient(rows[teaches]), expected, rtol=1e-4, atol=1e-7)

    torch.manual_seed(1)
    head = value_module.ValueHead(model.config.hidden_size)
    torch.nn.init.normal_(head.outer.weight)
    for part in train.parts_of(rollouts, rows, config, ONE):
        distinct, prefix = part.distinct_prefixes()
        V, u_logit = head(distinct)
        hidden = model.base_model(part.tokens[:, :-1], use_cache=False).last_hidden_state
        V_expected, u_expected = head(hidden)
        for kept, forward in ((V, V_expected), (u_logit, u_expected)):
            kept = kept[prefix] * part.mask
            torch.testing.assert_close(kept, forward * part.mask, rtol=1e-4, atol=1e-5)


def test_steps_of_the_copy(capsys):
    """experiments/step.py has the numbers of train.main, bit for bit."""
    step.check("--loss ppo")


def test_an_iteration_that_teaches_nothing_has_no_metrics_of_the_policy(tmp_path, capsys):
    """Guards a KL or an entropy of 0 that was never computed, and a line that cannot be printed."""
    (tmp_path / "never.py").write_text(
        "def never(problem, completion):\n    return -1.0\n\n\nnever.bounds = (-1.0, 1.0)\n"
    )
    run(tmp_path / "run", "--loss", "em", "--reward", tmp_path / "never.py:never")
    row = rows(tmp_path / "run" / "metrics.jsonl")[-1]
    for name in ("policy_loss", "approx_kl", "clip_fraction", "entropy", "first_kl"):
        assert row[name] is None, name
    assert row["grad_norm"] == 0.0 and row["value_loss"] > 0
    line = re.search(r"^ +1/1 .*$", capsys.readouterr().out, flags=re.MULTILINE).group()
    assert line.split()[5:8] == ["-", "-", "-"]  # kl, clip, entropy


def test_what_to_say_after_a_stop():
    """The flags that go on: the folder, and how the process was run, which no checkpoint keeps.

    "The same flags and --resume auto" made another run of one that --resume FOLDER had continued,
    and contradicted --overwrite.
    """
    said = train.flags_to_go_on(train.Config(output_dir="runs/a b", distributed=True, replicas=2))
    assert said == "--resume 'runs/a b' --distributed --replicas 2"
    assert train.flags_to_go_on(train.Config(overwrite=True)) == "--resume runs/local"


def test_an_evaluation_without_a_completion_is_said():
    """A* decoding may finish none of the first problem within its bounds: it was an IndexError."""
    said = []
    example = {"completions": [], "prompt": "12*34="}
    train.print_example(types.SimpleNamespace(example=example, say=said.append))
    assert said == ["           none  '12*34=': no completion within the bounds"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"iterations": "60"}, "iterations must be a whole number, not '60'"),
        ({"stop": "ab"}, "stop must be a list of texts, not 'ab'"),
    ],
)
def test_a_checkpoint_whose_flags_were_edited_is_damaged(flags, sentence, monkeypatch):
    """It was a traceback in the first comparison of the flag."""
    monkeypatch.setattr(fsdp, "read_trainer_state", lambda *_: {"config": flags})
    with pytest.raises(ValueError, match=f"trainer_state.json is damaged: {sentence}"):
        train.flags_of_checkpoint("runs/x")
