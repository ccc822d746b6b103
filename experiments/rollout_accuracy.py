"""Is the accuracy that ppo's rollouts report the policy's?  Estimates by search against samples.

    python train.py --config ppo --checkpoint-every 15 --keep-checkpoints 10 --output-dir runs/ppo
    python experiments/rollout_accuracy.py tiny_base runs/ppo/checkpoint_iter_15 ...

For each model: the share of right completions among 64 i.i.d. samples of each problem (the truth,
with its standard error), and what Gumbel searches (tau = 1, 8 leaves) say of the same problems:

    weights     as they are, or normalised within each problem
    stop        none; by mass (one more leaf stands for the rest); by mass as it was until 2f94aad
                (pi/q of the leaves found, nothing for the rest)

h is the checkpoint's value head, or 0 without one.  Figures are means over problems and searches.
One JSON line a model goes to --out.
"""

import argparse
import json
import math
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import astar_search  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import policy  # noqa: E402
import reward as reward_module  # noqa: E402

COVER = 0.8
TOKENS = 48


class OldTree(astar_search.Tree):
    """The stop by mass as it was: at once, and pi/q for the leaves found."""

    def stop_reason(self):
        if self.covering:
            return "covered at once"
        return super().stop_reason()


def right_leaves(trees, tokenizer, problems, prompts, reward):
    """For each tree its leaves as (leaf, is it right?)."""
    is_right = evaluation.right_leaf_test(tokenizer, problems, prompts, reward, TOKENS)
    return [[(leaf, is_right(leaf)) for leaf in tree.leaves] for tree in trees]


def searched(model, tokenizer, problems, prompts, value_function, reward, seed, cover, tree_class):
    """(unnormalised, normalised) accuracy of each problem, and model tokens of all."""
    options = astar_search.Options(
        eos=policy.stop_tokens(model, tokenizer),
        K=8,
        tau=1.0,
        width=2,
        max_new_tokens=TOKENS,
        max_nodes=1024,
        cover=cover,
    )
    expander = astar_search.Expander(model, prompts, TOKENS, value_function)
    keys = astar_search.root_keys(seed, 1, range(len(problems)))
    trees = astar_search.search(keys, expander, options, tree_class)
    plain, normalised = [], []
    for leaves in right_leaves(trees, tokenizer, problems, prompts, reward):
        total = sum(leaf.weight for leaf, _ in leaves)
        right = sum(leaf.weight for leaf, correct in leaves if correct)
        plain.append(right)
        normalised.append(right / total if total else 0.0)
    return plain, normalised, sum(expander.spent)


def measure(folder, n, draws, seeds):
    """The row of one model."""
    model, tokenizer = policy.load_policy(folder)
    value_function = evaluation.load_value_function(folder, model)
    reward = reward_module.Reward()
    problems = [data.train_problem(99, 1, i) for i in range(n)]
    prompts = evaluation.encode_prompts(tokenizer, problems)
    expander = astar_search.Expander(model, prompts, TOKENS)
    options = astar_search.Options(
        eos=policy.stop_tokens(model, tokenizer), K=draws, max_new_tokens=TOKENS
    )
    keys = astar_search.root_keys(0, 2, range(n))
    trees = astar_search.sample(keys, expander, options)
    shares = []
    for leaves in right_leaves(trees, tokenizer, problems, prompts, reward):
        shares.append(sum(leaf.count for leaf, correct in leaves if correct) / draws)
    shares = torch.tensor(shares, dtype=torch.float64)
    # The problems are the same for all, so only the draws within a problem make noise.
    error = (shares * (1 - shares) / draws).sum().sqrt().item() / n
    row = {"model": folder, "truth": shares.mean().item(), "truth_error": error, "problems": n}
    settings = {
        "no stop": (math.inf, astar_search.Tree),
        "by mass": (COVER, astar_search.Tree),
        "by mass, old": (COVER, OldTree),
    }
    for name, (cover, tree_class) in settings.items():
        plain, normalised, tokens = [], [], 0
        for seed in range(seeds):
            one, other, spent = searched(
                model, tokenizer, problems, prompts, value_function, reward, seed, cover, tree_class
            )
            plain.append(sum(one) / n)
            normalised.append(sum(other) / n)
            tokens += spent
        row[name] = {
            "unnormalised": sum(plain) / seeds,
            "normalised": sum(normalised) / seeds,
            "error": (torch.tensor(plain).std() / seeds**0.5).item(),
            "tokens_a_problem": tokens / seeds / n,
        }
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", default=str(ROOT / "experiments/results/rollout_accuracy.jsonl"))
    args = parser.parse_args()
    for folder in args.models:
        row = measure(folder, args.problems, args.draws, args.seeds)
        print(f"{folder}: truth {row['truth']:.3f} +- {row['truth_error']:.3f}")
        for name, figures in row.items():
            if isinstance(figures, dict):
                numbers = "  ".join(f"{key} {x:.3f}" for key, x in figures.items())
                print(f"    {name:14s} {numbers}", flush=True)
        with open(args.out, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
