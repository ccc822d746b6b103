"""PPO with baselines from the tree instead of the critic's V.

    python experiments/tree_baseline.py --seed 0

`train.py --config ppo`, but V(s) in GAE is the mean reward of the leaves below s, weighted pi/q.
So no head has to know which step is wrong: a token where leaves part is credited with the
difference that its branch makes, and one behind which there is a single leaf with nothing.  Other
flags are those of train.py.  A row goes into experiments/results/tree_baseline.jsonl.
"""

import contextlib
import pathlib
import sys

import compare

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch

import train
import value as value_module


def tree_values(rewards, leaf_weight, rollouts):
    """(B, T-1): before each token of a completion, the mean reward of the leaves that go on there.

    rewards (B,), leaf_weight (B,).  V(s) = sum_i w_i r_i / sum_i w_i over the leaves i below s.
    """
    rows = []  # of each leaf: (t, prefix up to token t) for the prefixes before its tokens
    weighted, weight = {}, {}  # of each prefix: sum_i w_i r_i and sum_i w_i
    for i in range(len(rewards)):
        tokens = rollouts.tokens[i].tolist()
        first, last = int(rollouts.prompt_length[i]) - 1, int(rollouts.length[i]) - 1
        prefixes = [(t, (int(rollouts.problem[i]), *tokens[: t + 1])) for t in range(first, last)]
        for _, prefix in prefixes:
            w, r = float(leaf_weight[i]), float(rewards[i])
            weighted[prefix] = weighted.get(prefix, 0.0) + w * r
            weight[prefix] = weight.get(prefix, 0.0) + w
        rows.append(prefixes)
    values = torch.zeros_like(rollouts.values)
    for i, prefixes in enumerate(rows):
        for t, prefix in prefixes:
            values[i, t] = weighted[prefix] / weight[prefix]
    return values


@contextlib.contextmanager
def critic_replaced():
    """Inside, the loop of train.py gives tree_values to gae."""
    leaf_weights = train.leaf_weights
    gae = value_module.gae
    seen = {}  # the rollouts of this iteration and their weights: gae is not told them

    def leaf_weights_seen(rollouts, config):
        seen["rollouts"] = rollouts
        seen["weight"] = leaf_weights(rollouts, config)
        return seen["weight"]

    def gae_of_the_tree(rewards, values, mask, lam):
        values = tree_values(rewards, seen["weight"], seen["rollouts"])
        return gae(rewards, values, mask, lam)

    train.leaf_weights = leaf_weights_seen
    value_module.gae = gae_of_the_tree
    try:
        yield
    finally:
        train.leaf_weights = leaf_weights
        value_module.gae = gae


def main():
    argv = "--config ppo --device cpu --output-dir runs/tree_baseline --overwrite".split()
    argv += sys.argv[1:]
    config, _, _ = train.parse_arguments(argv)
    with critic_replaced():
        train.main(argv)
    flags = " ".join(argv)
    row = compare.run_row("PPO, tree baselines", config.seed, flags, config.output_dir)
    compare.write("tree_baseline", row)


if __name__ == "__main__":
    main()
