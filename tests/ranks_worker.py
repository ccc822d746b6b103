"""One batch of rollouts and one optimiser step in float64, then a run; started by test_fsdp.py.

    torchrun --standalone --nproc_per_node=2 tests/ranks_worker.py OUT FLAGS OF TRAIN.PY

Works on any number of ranks.  Writes OUT/WORLD_SIZE.json (token ids of every leaf by problem) and
OUT/WORLD_SIZE.safetensors (by how much a step of plain gradient descent with rate 1 moved each
weight: the gradient).  Then it runs train.py with the flags: both share the seconds of the start.
"""

import json
import os
import sys

import torch
from safetensors.torch import save_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import eval as evaluation
import fsdp
import policy
import train
import value as value_module

BOUNDS = (-1.0, 1.1)  # of the reward


def small_config():
    """PPO on 7 problems, one optimiser step with learning rate 1."""
    options = dict(train.PPO)
    options.update(
        problems_per_iteration=7,
        rollouts_per_problem=3,
        max_new_tokens=12,
        micro_batch=4,
        minibatches=1,
        learning_rate=1.0,
        value_learning_rate=1.0,
        warmup=0,
        grad_clip=1e9,
        iterations=10**9,
    )
    return train.Config(**options)


def add_credit(rollouts, config):
    """What the losses need, from a reward that needs no right answers: the sum of the token ids."""
    rewards = []
    for ids in rollouts.completions():
        rewards.append(1.0 if sum(ids) % 3 == 0 else -1.0)
    rewards = torch.tensor(rewards)
    rollouts.extra = {
        "rewards": rewards,
        "leaf_weight": policy.normalise_weights(rollouts.weight, rollouts.problem),
        "advantages": value_module.gae(rewards, rollouts.values, rollouts.mask, 0.95),
        "soft_targets": value_module.soft_target(rewards, *BOUNDS, config.beta),
    }


def leaves_of_all(rollouts, indices, ranks):
    """Token ids of every leaf of every rank, a list by global problem number."""
    leaves = {}
    for p, ids in zip(rollouts.problem.tolist(), rollouts.completions()):
        leaves.setdefault(indices[p], []).append(ids)
    found = {}
    for rank_leaves in fsdp.all_gather(list(leaves.items()), ranks):
        found.update(rank_leaves)
    return [found[p] for p in sorted(found)]


def one_batch(out, ranks):
    """Rollouts and one step in float64; write the leaves and the gradient."""
    config = small_config()
    model, tokenizer = policy.load_policy(config.model, torch.float64)
    torch.manual_seed(0)
    head = value_module.ValueHead(model.config.hidden_size).double()
    # A noisy h: the search must not be steered by rank or batch.
    torch.nn.init.normal_(head.outer.weight)
    before = {}
    for module in (model, head):
        for name, tensor in fsdp.named_tensors(module).items():
            before[name] = tensor.clone()
    model = fsdp.shard(model, ranks, policy.transformer_blocks(model))
    head = fsdp.shard(head, ranks)

    problems, indices = train.draw_problems(config, 1, ranks, None)
    with fsdp.full_weights(model, head):
        rollouts = train.generate_rollouts(
            model,
            tokenizer,
            problems,
            indices,
            config,
            None,
            value_function=evaluation.value_function(head, BOUNDS, config.beta),
            kind="astar",
            K=3,
            iteration=1,
        )
    add_credit(rollouts, config)

    # The step: to be written anew when the loop of train.py is there (train.update goes).
    groups = [{"params": list(module.parameters())} for module in (model, head)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    score = fsdp.with_fsdp_hooks(model, policy.score)
    learned = train.update(model, score, head, optimizer, rollouts, indices, config, 1, ranks)

    leaves = leaves_of_all(rollouts, indices, ranks)
    after = fsdp.full_state(fsdp.named_tensors(model), ranks)
    after.update(fsdp.full_state(fsdp.named_tensors(head), ranks))
    if ranks.is_main:
        with open(f"{out}/{ranks.world_size}.json", "w") as file:
            json.dump({"leaves": leaves, "learned": learned}, file)
        moved = {name: before[name] - tensor for name, tensor in after.items()}
        save_file(moved, f"{out}/{ranks.world_size}.safetensors")


def failure_of(where, function, ranks):
    """The sentence of the ValueError that where(function, ranks) raises."""
    try:
        where(function, ranks)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def check_collectives(ranks):
    """Every rank hears of all values and of every failure, whoever has it."""
    W = ranks.world_size
    last = W - 1

    def fail():
        raise ValueError("no")

    def fail_on_last():
        if ranks.rank == last:
            fail()

    def own_rank():
        return ranks.rank

    longer = "x" * 100 * ranks.rank  # texts of unequal length
    assert fsdp.all_gather(longer, ranks) == ["x" * 100 * rank for rank in range(W)]
    # 1 + 2 + ... + W, and a key that the last rank alone has
    sums = {"n": ranks.rank + 1}
    if ranks.rank == last:
        sums["last"] = 2.5
    assert fsdp.all_reduce_sum(sums, ranks) == {"n": W * (W + 1) // 2, "last": 2.5}

    assert fsdp.raise_everywhere(own_rank, ranks) == ranks.rank
    assert fsdp.on_main(own_rank, ranks) == (0 if ranks.is_main else None)
    assert failure_of(fsdp.raise_everywhere, fail, ranks) == "no"
    expected = "no" if W == 1 else f"rank {last}: no"
    assert failure_of(fsdp.raise_everywhere, fail_on_last, ranks) == expected
    expected = "no" if W == 1 else "rank 0: no"
    assert failure_of(fsdp.on_main, fail, ranks) == expected


def main():
    ranks = fsdp.init_ranks("WORLD_SIZE" in os.environ, "cpu")
    check_collectives(ranks)
    one_batch(sys.argv[1], ranks)
    train.main(sys.argv[2:])  # leaves the ranks at its end


if __name__ == "__main__":
    main()
