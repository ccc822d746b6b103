"""What does the stop by covered mass do to estimates of E_pi[r]?  Random tables, the truth known.

    python experiments/cover_bias.py       # 30 seconds; rows into results/cover_bias.jsonl

Tables of 4 tokens and depth 6, from flat to peaked.  A completion is right with chance .5, drawn
once, and the truth is an enumeration.  For every share of pi that ends a search (K = 8 leaves at
most): the bias and the root mean square error of three estimates, in units of reward (a right
completion is worth 1), and what the search cost.

    unnormalised    sum of (pi/q) r
    normalised      the same divided by the sum of pi/q
    plain pi        pi in the place of pi/q, divided by its sum
"""

import argparse
import math
import pathlib
import sys

import compare
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import astar_search

V = 4
DEPTH = 6
EOS = 0


class Table:
    """log pi(.|s) of every prefix, and the reward of every completion, as functions of the path."""

    def __init__(self, seed, sharpness):
        self.seed = seed
        self.sharpness = sharpness
        self.rows = {}  # path -> log pi (V,)

    def number(self, path):
        """A hash of integers: the same on every machine."""
        return hash((self.seed, 7, *path)) & (2**62 - 1)

    def log_probs(self, path):
        """log pi(.|path) (V,)."""
        if path not in self.rows:
            key = astar_search.mix64(torch.tensor(self.number(path)), torch.arange(V))
            self.rows[path] = torch.log_softmax(self.sharpness * astar_search.gumbel(key), 0)
        return self.rows[path]

    def reward(self, path):
        """0 or 1."""
        return float(self.number(path) % 1000 < 500)

    def mean_reward(self):
        """E_pi[r] by enumeration."""
        total = 0.0
        stack = [((), 0.0)]
        while stack:
            path, g = stack.pop()
            if path and (path[-1] == EOS or len(path) == DEPTH):
                total += math.exp(g) * self.reward(path)
                continue
            for token, log_prob in enumerate(self.log_probs(path).tolist()):
                stack.append(((*path, token), g + log_prob))
        return total


def weighted_sum(weights, rewards):
    """sum_i w_i r_i."""
    return sum(weight * reward for weight, reward in zip(weights, rewards))


def estimates_of(tree, table):
    """{estimate: number} from the leaves of one search."""
    rewards = [table.reward(tuple(leaf.tokens())) for leaf in tree.leaves]
    weights = [leaf.weight for leaf in tree.leaves]
    pi = [math.exp(leaf.g) for leaf in tree.leaves]
    return {
        "unnormalised": weighted_sum(weights, rewards),
        "normalised": weighted_sum(weights, rewards) / sum(weights),
        "plain pi": weighted_sum(pi, rewards) / sum(pi),
    }


def bias(errors, searches):
    """The root mean square, over tables, of the bias of an estimate.  errors (tables, searches).

    The bias of a table may have either sign, so its size is averaged.  What chance alone would
    give, the variance of the mean, is taken off.
    """
    square = errors.mean(1) ** 2 - errors.var(1) / searches
    return square.mean().clamp(min=0).sqrt().item()


def measure(tables, exact, cover, searches):
    """A row: the figures of `searches` searches of each table.  exact (tables * searches)."""

    def expand(nodes):
        rows = []
        for node in nodes:
            table = tables[node.problem // searches]
            rows.append(table.log_probs(tuple(node.tokens())))
        return torch.stack(rows), torch.zeros(len(nodes), 1)

    options = astar_search.Options((EOS,), K=8, max_new_tokens=DEPTH, cover=cover)
    trees = astar_search.search(astar_search.root_keys(0, 0, range(len(exact))), expand, options)
    found = [estimates_of(tree, tables[i // searches]) for i, tree in enumerate(trees)]
    errors = {}
    for name in found[0]:
        errors[name] = torch.tensor([estimates[name] for estimates in found]) - exact
    by_table = {name: error.view(len(tables), -1) for name, error in errors.items()}
    return {
        "sharpness": tables[0].sharpness,
        "cover": min(cover, 1.0),
        "nodes": sum(tree.pops for tree in trees) / len(trees),
        "leaves": sum(len(tree.leaves) for tree in trees) / len(trees),
        "mean_error": {name: error.mean().item() for name, error in errors.items()},
        "bias": {name: bias(error, searches) for name, error in by_table.items()},
        "rmse": {name: error.square().mean().sqrt().item() for name, error in errors.items()},
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", type=int, default=40, help="of each sharpness")
    parser.add_argument("--searches", type=int, default=100, help="of each table")
    args = parser.parse_args()
    estimates = "unnormalised  normalised  plain pi"
    print(f"sharpness  cover   nodes  leaves |  bias of: {estimates} |  RMSE: {estimates}")
    for sharpness in (0.5, 1.5, 3.0):
        tables = [Table(seed, sharpness) for seed in range(args.tables)]
        exact = torch.tensor([table.mean_reward() for table in tables])
        exact = exact.repeat_interleave(args.searches)
        for cover in (0.5, 0.8, 0.9, 0.95, math.inf):
            row = measure(tables, exact, cover, args.searches)
            compare.write("cover_bias", row)
            figures = [*row["bias"].values(), *row["rmse"].values()]
            print(
                f"{sharpness:9.1f} {row['cover']:6.2f} {row['nodes']:7.1f} {row['leaves']:7.1f} | "
                + "  ".join(f"{figure:.3f}" for figure in figures),
                flush=True,
            )


if __name__ == "__main__":
    main()
