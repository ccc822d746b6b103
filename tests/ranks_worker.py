"""One batch of rollouts and one optimiser step in float64, on however many ranks start this; run by test_fsdp.py.

Writes OUT/WORLD_SIZE.json (token ids of every leaf by problem) and .safetensors (by how much a step of plain
gradient descent with rate 1 moved each weight: the gradient).
"""

import json
import os
import sys

import torch
from safetensors.torch import save_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import astar_search
import eval as evaluation
import fsdp
import policy
import train
import value as value_module

out = sys.argv[1]
config = train.Config(**train.PPO | dict(
    problems_per_iteration=7, rollouts_per_problem=3, max_new_tokens=12, micro_batch=4, minibatches=1,
    learning_rate=1.0, value_learning_rate=1.0, warmup=0, grad_clip=1e9, iterations=10**9,
))  # fmt: skip
ranks = fsdp.start("WORLD_SIZE" in os.environ, "cpu")
model, tokenizer = policy.load_policy(config.model, torch.float64)
torch.manual_seed(0)
head = value_module.ValueHead(model.config.hidden_size).double()
torch.nn.init.normal_(head.outer.weight)  # a noisy h: the search must not be steered by rank or batch
before = {name: x.clone() for module in (model, head) for name, x in fsdp.state_of(module).items()}
model, head = fsdp.shard(model, ranks, policy.blocks_of(model)), fsdp.shard(head, ranks)
problems, indices = train.draw_problems(config, 1, ranks, None)
keys = astar_search.root_keys(0, 1, indices)
with fsdp.gathered(model, head):
    value = evaluation.guide(head, (-1.0, 1.1), config.beta)
    rollouts = train.make_rollouts(model, tokenizer, problems, keys, config, None, value, "astar", 3)
leaf_weight = policy.normalise_weights(rollouts.weight, rollouts.problem)
rewards = torch.tensor([1.0 if sum(ids) % 3 == 0 else -1.0 for ids in rollouts.completions()])
advantages = value_module.gae(rewards, rollouts.values, rollouts.mask, 0.95)
rollouts.extra = {"rewards": rewards, "leaf_weight": leaf_weight, "advantages": advantages}
rollouts.extra["soft_targets"] = value_module.soft_target(rewards, -1.0, 1.1, config.beta)
optimizer = torch.optim.SGD([{"params": list(module.parameters())} for module in (model, head)], lr=1.0)
score = fsdp.through(model, policy.score)
learned = train.update(model, score, head, optimizer, rollouts, indices, config, 1, ranks)
leaves = {}
for p, ids in zip(rollouts.problem.tolist(), rollouts.completions()):
    leaves.setdefault(indices[p], []).append(ids)
told = {int(p): ids for part in fsdp.everyone(leaves, ranks) for p, ids in part.items()}
weights = fsdp.full_state(fsdp.state_of(model), ranks) | fsdp.full_state(fsdp.state_of(head), ranks)
if ranks.is_main:
    with open(f"{out}/{ranks.world_size}.json", "w") as file:
        json.dump({"leaves": [told[p] for p in sorted(told)], "learned": learned}, file)
    save_file({name: before[name] - x for name, x in weights.items()}, f"{out}/{ranks.world_size}.safetensors")
fsdp.stop(ranks)
