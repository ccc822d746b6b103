"""What does a correct chain of k unreliable steps cost, by sampling and by search?

    python experiments/chains.py             # the hard base, 3 digits by 1, 2 and 3: 1, 3, 5 steps
    python experiments/chains.py --digits 3x1 --problems 8 --samples 8 --max-nodes 64     # a trial

A step is right with probability p if all before it were.  Sampling starts over after a slip: about
1/p^k completions.  A search that notices a slip repeats the step alone: about k/p steps.  Here it
notices by an oracle: the exact 'no mistake yet' as h.

Measured: model tokens to the first correct completion, mean over problems.  A problem where none
was found within the bounds counts with all the tokens spent on it, so those means are lower bounds.
A row a size of problem goes into results/chains.jsonl.
"""

import argparse
import pathlib
import sys

import compare
import diagnose
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import astar_search
import data
import eval as evaluation
import policy
import reward as reward_module

MAX_NEW_TOKENS = 128
# name -> (tau, h): h is None for h = 0, else whether the oracle gives each child its own h
SEARCHES = {
    "h = 0, tau 1": (1.0, None),
    "h = 0, tau 0": (0.0, None),
    "oracle, inherited, tau 1": (1.0, False),
    "oracle, inherited, tau 0": (0.0, False),
    "oracle, own, tau 1": (1.0, True),
}


class WatchedTree(astar_search.Tree):
    """A search that stops at its first right leaf and knows how many nodes it had opened then."""

    is_right = None  # leaf -> bool

    def __init__(self, problem, key, options):
        super().__init__(problem, key, options)
        self.cost = None

    def pop_evaluated_nodes(self):
        """As in Tree; then look at the leaves that are new."""
        seen = len(self.leaves)
        super().pop_evaluated_nodes()
        for leaf in self.leaves[seen:]:
            if self.cost is None and WatchedTree.is_right(leaf):
                self.cost = self.pops
                self.stopped = "right"


def steps_right(text, way):
    """(how many steps of the right way of thinking a completion begins with, of how many).

    way: "<think>345*20=6900 ...</think>...".
    """
    wanted = way.removeprefix("<think>").split("</think>")[0].split(" ")
    written = text.removeprefix("<think>").split("</think>")[0].split(" ")
    right = 0
    while right < min(len(wanted), len(written)) and wanted[right] == written[right]:
        right += 1
    return right, len(wanted)


def tokens_to_first_right(draws, generator):
    """(tokens, found) of samples drawn one after the other, in an order of their own.

    Prefixes are shared, and each is run once.  A completion costs the proper prefixes of it that
    are new, the prompt among them.
    """
    seen = set()
    for i in torch.randperm(len(draws), generator=generator).tolist():
        seen.update(node.parent for node in draws[i].path_nodes())
        if WatchedTree.is_right(draws[i]):
            return len(seen), True
    return len(seen), False


def measure_sampling(model, tokenizer, problems, keys, samples):
    """i.i.d. samples: {"cost", "found", "p", "accuracy", "steps"}."""
    prompts = evaluation.encode_prompts(tokenizer, problems)
    expander = astar_search.Expander(model, prompts, MAX_NEW_TOKENS)
    options = astar_search.Options(
        policy.stop_tokens(model, tokenizer), K=samples, max_new_tokens=MAX_NEW_TOKENS
    )
    trees = astar_search.sample(keys, expander, options)
    generator = torch.Generator().manual_seed(0)
    cost = 0
    found = 0
    right_completions = 0
    right_steps = 0
    tried_steps = 0
    for tree, problem in zip(trees, problems):
        draws = []
        for leaf in tree.leaves:
            draws += [leaf] * leaf.count
        way = diagnose.answer_of(problem)
        for leaf in draws:
            right, steps = steps_right(tokenizer.decode(leaf.tokens()[:-1]), way)
            right_steps += right
            tried_steps += min(right + 1, steps)
            right_completions += WatchedTree.is_right(leaf)
        tokens, is_found = tokens_to_first_right(draws, generator)
        cost += tokens
        found += is_found
    N = len(problems)
    return {
        "cost": cost / N,
        "found": found / N,
        "p": right_steps / tried_steps,
        "accuracy": right_completions / (samples * N),
        "steps": steps,
    }


def measure_search(model, tokenizer, problems, keys, tau, oracle_own, max_nodes):
    """(mean model tokens to the first right leaf, share of the problems with one)."""
    prompts = evaluation.encode_prompts(tokenizer, problems)
    expand = astar_search.Expander(model, prompts, MAX_NEW_TOKENS)
    if oracle_own is not None:
        expand = diagnose.oracle(expand, tokenizer, problems, oracle_own)
    options = astar_search.Options(
        policy.stop_tokens(model, tokenizer),
        K=10**6,
        tau=tau,
        max_new_tokens=MAX_NEW_TOKENS,
        max_nodes=max_nodes,
    )
    trees = astar_search.search(keys, expand, options, tree_class=WatchedTree)
    costs = [tree.pops if tree.cost is None else tree.cost for tree in trees]
    found = sum(tree.cost is not None for tree in trees)
    return sum(costs) / len(costs), found / len(trees)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny_base/hard")
    parser.add_argument("--digits", nargs="+", default=["3x1", "3x2", "3x3"])
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--max-nodes", type=int, default=4096)
    args = parser.parse_args()
    model, tokenizer = policy.load_policy(str(ROOT / args.model))
    reward = reward_module.Reward()
    print(
        "digits  steps      p  accuracy | "
        "tokens to the first correct one (problems in which it was found)"
    )
    for digits in args.digits:
        problems = []
        for i in range(args.problems):
            problems.append(data.train_problem(0, 10**6, i, digits, "terse"))
        keys = astar_search.root_keys(0, -2, range(args.problems))
        prompts = evaluation.encode_prompts(tokenizer, problems)
        WatchedTree.is_right = evaluation.right_leaf_test(
            tokenizer, problems, prompts, reward, MAX_NEW_TOKENS
        )

        sampling = measure_sampling(model, tokenizer, problems, keys, args.samples)
        figures = {"sampling": (sampling["cost"], sampling["found"])}
        for name, (tau, oracle_own) in SEARCHES.items():
            figures[name] = measure_search(
                model, tokenizer, problems, keys, tau, oracle_own, args.max_nodes
            )
        words = [f"{name} {cost:.0f} ({found:.2f})" for name, (cost, found) in figures.items()]
        print(
            f"{digits:6s}  {sampling['steps']:5d}  {sampling['p']:.3f}  "
            f"{sampling['accuracy']:8.3f} | {', '.join(words)}",
            flush=True,
        )
        row = {
            "model": args.model,
            "digits": digits,
            "steps": sampling["steps"],
            "p": sampling["p"],
            "accuracy": sampling["accuracy"],
            "tokens": figures,
        }
        compare.write("chains", row)


if __name__ == "__main__":
    main()
