"""What the stop by covered mass does to estimates of E_pi[r]: random tables, where the truth is an enumeration.

    python experiments/cover_bias.py            # 30 seconds; appends a row to experiments/results/cover_bias.jsonl

Tables of 4 tokens and depth 6, from flat to peaked; a completion is right with chance .5, drawn once.  For every share of pi that
ends a search (K = 8 leaves at most): the bias and the root mean square error of three estimates, in units of reward (a right completion
is worth 1), and what the search cost.  unnormalised: sum of (pi/q) r.  normalised: the same divided by the sum of pi/q.  plain pi: pi in
the place of pi/q, divided by its sum.
"""

import argparse
import math
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import astar_search  # noqa: E402
import compare  # noqa: E402

V, DEPTH, EOS = 4, 6, 0


def table(seed, sharpness):
    """log pi(.|s) of every prefix as a function of its path, and the reward of every completion."""
    rows, rewards = {}, {}
    number = lambda path: hash((seed, 7, *path)) & (2**62 - 1)  # of integers: the same on every machine

    def logp(path):
        if path not in rows:
            key = astar_search.mix64(torch.tensor(number(path)), torch.arange(V))
            rows[path] = torch.log_softmax(sharpness * astar_search.gumbel(key), 0)
        return rows[path]

    def reward(path):
        if path not in rewards:
            rewards[path] = float(number(path) % 1000 < 500)
        return rewards[path]

    return logp, reward


def truth(logp, reward):
    """E_pi[r] by enumeration."""
    total, stack = 0.0, [((), 0.0)]
    while stack:
        path, g = stack.pop()
        if path and (path[-1] == EOS or len(path) == DEPTH):
            total += math.exp(g) * reward(path)
        else:
            stack += [(path + (a,), g + step) for a, step in enumerate(logp(path).tolist())]
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=40, help="of each sharpness")
    parser.add_argument("--searches", type=int, default=100, help="of each table")
    args = parser.parse_args()
    print("sharpness  cover   nodes  leaves |  bias of: unnormalised  normalised  plain pi |  RMSE: unnormalised  normalised  plain pi")
    for sharpness in (0.5, 1.5, 3.0):
        problems = [table(seed, sharpness) for seed in range(args.tables)]
        exact = torch.tensor([truth(*problem) for problem in problems]).repeat_interleave(args.searches)

        def expand(nodes):
            logp = torch.stack([problems[node.problem // args.searches][0](tuple(node.path())) for node in nodes])
            return logp, torch.zeros(len(nodes), 1)

        for cover in (0.5, 0.8, 0.9, 0.95, math.inf):
            options = astar_search.Options((EOS,), K=8, max_new_tokens=DEPTH, cover=cover)
            trees = astar_search.search(astar_search.root_keys(0, 0, range(len(exact))), expand, options)
            estimates = {"unnormalised": [], "normalised": [], "plain pi": []}
            for i, tree in enumerate(trees):
                r = [problems[i // args.searches][1](tuple(leaf.path())) for leaf in tree.leaves]
                w, pi = [leaf.weight for leaf in tree.leaves], [math.exp(leaf.g) for leaf in tree.leaves]
                dot = lambda x: sum(a * b for a, b in zip(x, r))
                for name, x in (("unnormalised", dot(w)), ("normalised", dot(w) / sum(w)), ("plain pi", dot(pi) / sum(pi))):
                    estimates[name].append(x)
            errors = {name: torch.tensor(x) - exact for name, x in estimates.items()}
            # The bias of a table may have either sign: the mean over tables of its size, less what chance alone would give.
            by_table = {name: e.view(args.tables, -1) for name, e in errors.items()}
            size = lambda e: (e.mean(1) ** 2 - e.var(1) / args.searches).mean().clamp(min=0).sqrt().item()
            row = {
                "sharpness": sharpness, "cover": min(cover, 1.0), "nodes": sum(t.pops for t in trees) / len(trees),
                "leaves": sum(len(t.leaves) for t in trees) / len(trees), "mean_error": {name: e.mean().item() for name, e in errors.items()},
                "bias": {name: size(e) for name, e in by_table.items()}, "rmse": {name: e.square().mean().sqrt().item() for name, e in errors.items()},
            }  # fmt: skip
            compare.write("cover_bias", row)
            figures = "  ".join(f"{row[kind][name]:.3f}" for kind in ("bias", "rmse") for name in estimates)
            print(f"{sharpness:9.1f} {row['cover']:6.2f} {row['nodes']:7.1f} {row['leaves']:7.1f} | {figures}", flush=True)


if __name__ == "__main__":
    main()
