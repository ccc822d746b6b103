"""The law of guided search: what a correct chain of k unreliable steps costs.

    python experiments/chains.py                     # the hard base, 3 digits by 1, 2 and 3: chains of 1, 3 and 5 steps

A step is right with probability p if all before it were.  Sampling starts over after a slip: about 1/p^k completions.
A search that notices a slip (here by the exact oracle 'no mistake yet' as h) repeats the step alone: about k/p steps.
Measured: model tokens to the first correct completion, mean over problems; a problem where it was not found within the
bounds counts with all the tokens spent on it, so those means are lower bounds.  One row into results/chains.jsonl.
"""

import argparse
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import astar_search  # noqa: E402
import compare  # noqa: E402
import data  # noqa: E402
import diagnose  # noqa: E402
import eval as evaluation  # noqa: E402
import policy  # noqa: E402
import reward as reward_module  # noqa: E402


class WatchedTree(astar_search.Tree):
    """A search that knows how many nodes it had opened when it accepted each leaf, and stops at the first right one."""

    right = None  # leaf -> bool

    def __init__(self, *args):
        super().__init__(*args)
        self.cost = None

    def advance(self):
        seen = len(self.leaves)
        super().advance()
        for leaf in self.leaves[seen:]:
            if self.cost is None and WatchedTree.right(leaf):
                self.cost, self.stopped = self.pops, "right"


def steps_right(text, way):
    """How many steps of the right way of thinking ("345*20=6900 ...") a completion begins with, and of how many."""
    wanted = way.removeprefix("<think>").split("</think>")[0].split(" ")
    written = text.removeprefix("<think>").split("</think>")[0].split(" ")
    right = 0
    while right < min(len(wanted), len(written)) and wanted[right] == written[right]:
        right += 1
    return right, len(wanted)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_base/hard")
    parser.add_argument("--digits", nargs="+", default=["3x1", "3x2", "3x3"])
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--max-nodes", type=int, default=4096)
    args = parser.parse_args()
    model, tokenizer = policy.load_policy(str(ROOT / args.model))
    reward, eos = reward_module.Reward(), policy.stop_tokens(model, tokenizer)
    print("digits  steps      p  accuracy | tokens to the first correct one (problems in which it was found)")
    for digits in args.digits:
        problems = [data.train_problem(0, 10**6, i, digits, "terse") for i in range(args.problems)]
        prompts, keys = evaluation.encode(tokenizer, problems), astar_search.root_keys(0, -2, range(len(problems)))
        WatchedTree.right = lambda leaf: reward(
            tokenizer.decode(leaf.path()[:-1]), problems[leaf.problem].answer, 0.0, leaf.truncated
        )["correct"]

        # i.i.d. samples, one after the other in an order of their own; prefixes are shared, and run once
        expander = astar_search.Expander(model, prompts, 128)
        trees = astar_search.sample(keys, expander, astar_search.Options(eos, K=args.samples, max_new_tokens=128))
        generator, costs, found, right, taken = torch.Generator().manual_seed(0), [], 0, 0, [0, 0]
        for tree, problem in zip(trees, problems):
            draws = [leaf for leaf in tree.leaves for _ in range(leaf.count)]
            for leaf in draws:
                done, k = steps_right(tokenizer.decode(leaf.path()[:-1]), diagnose.answer_of(problem))
                taken[0], taken[1] = taken[0] + done, taken[1] + min(done + 1, k)
                right += WatchedTree.right(leaf)
            seen, first = set(), False
            for i in torch.randperm(len(draws), generator=generator).tolist():
                node = draws[i]
                while node.parent is not None:
                    node = node.parent
                    seen.add(id(node))
                if WatchedTree.right(draws[i]):
                    first = True
                    break
            costs.append(len(seen))
            found += first
        p, accuracy = taken[0] / taken[1], right / (args.samples * len(problems))
        figures = {"sampling": (sum(costs) / len(costs), found / len(problems))}

        searches = {"h = 0, tau 1": (1.0, None), "h = 0, tau 0": (0.0, None), "oracle, inherited, tau 1": (1.0, False),
                    "oracle, inherited, tau 0": (0.0, False), "oracle, own, tau 1": (1.0, True)}  # fmt: skip
        for name, (tau, own) in searches.items():
            expander = astar_search.Expander(model, prompts, 128)
            expand = expander if own is None else diagnose.oracle(expander, tokenizer, problems, own)
            options = astar_search.Options(eos, K=10**6, tau=tau, max_new_tokens=128, max_nodes=args.max_nodes)
            trees = astar_search.search(keys, expand, options, WatchedTree)
            costs = [tree.pops if tree.cost is None else tree.cost for tree in trees]
            figures[name] = (sum(costs) / len(costs), sum(tree.cost is not None for tree in trees) / len(trees))
        words = ", ".join(f"{name} {cost:.0f} ({share:.2f})" for name, (cost, share) in figures.items())
        print(f"{digits:6s}  {k:5d}  {p:.3f}  {accuracy:8.3f} | {words}", flush=True)
        row = {"model": args.model, "digits": digits, "steps": k, "p": p, "accuracy": accuracy, "tokens": figures}
        compare.write("chains", row)


if __name__ == "__main__":
    main()
