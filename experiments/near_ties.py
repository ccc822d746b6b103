"""How often does the float32 search depend on the batch?

    python experiments/near_ties.py                               # the tiny base, half a minute
    python experiments/near_ties.py --model runs/local/checkpoint_iter_360

Leaves of 1,024 problems searched together, and dealt to 2 and 3 ranks.  In float64 they are equal
token for token.  In float32 two keys may lie within rounding and change places.
"""

import argparse
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import astar_search
import data
import eval as evaluation
import fsdp
import policy
import train

BATCH = 256  # problems searched in lock-step
MAX_NEW_TOKENS = 48


def leaves_of(model, tokenizer, prompts, world_size):
    """Of each problem the leaves, as lists of tokens, when so many ranks share the problems."""
    options = astar_search.Options(
        policy.stop_tokens(model, tokenizer),
        K=8,
        width=2,
        max_new_tokens=MAX_NEW_TOKENS,
        max_nodes=1024,
        cover=0.8,
    )
    leaves = [None] * len(prompts)
    for rank in range(world_size):
        ranks = fsdp.Ranks(rank, world_size, torch.device("cpu"))
        own = list(fsdp.rank_slice(len(prompts), ranks))
        for start in range(0, len(own), BATCH):
            indices = own[start : start + BATCH]
            own_prompts = [prompts[i] for i in indices]
            expander = astar_search.Expander(model, own_prompts, MAX_NEW_TOKENS)
            keys = astar_search.root_keys(0, 1, indices)
            trees = astar_search.search(keys, expander, options)
            for i, tree in zip(indices, trees):
                leaves[i] = [leaf.tokens() for leaf in tree.leaves]
    return leaves


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "tiny_base"))
    parser.add_argument("--problems", type=int, default=1024)
    args = parser.parse_args()
    config = train.Config(**train.PPO)
    problems = []
    for i in range(args.problems):
        problems.append(data.train_problem(0, 1, i, config.digits, config.prompt))
    for dtype in (torch.float64, torch.float32):
        model, tokenizer = policy.load_policy(args.model, dtype)
        prompts = evaluation.encode_prompts(tokenizer, problems)
        alone = leaves_of(model, tokenizer, prompts, world_size=1)
        count = sum(len(leaves) for leaves in alone)
        for world_size in (2, 3):
            shared = leaves_of(model, tokenizer, prompts, world_size)
            different = sum(one != other for one, other in zip(alone, shared))
            print(
                f"{dtype}: {different} of {len(problems)} searches ({count} leaves) differ "
                f"between 1 and {world_size} ranks",
                flush=True,
            )


if __name__ == "__main__":
    main()
