"""How often does the float32 search depend on the batch?  Leaves of 1,024 problems searched together, and dealt to 2 and
3 ranks: in float64 they are equal token for token; in float32 two keys may lie within rounding and change places.

    python experiments/near_ties.py                               # the tiny base, half a minute
    python experiments/near_ties.py --model runs/local/checkpoint_iter_360
"""

import argparse
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import astar_search  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import fsdp  # noqa: E402
import policy  # noqa: E402
import train  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "tiny_base"))
    parser.add_argument("--problems", type=int, default=1024)
    args = parser.parse_args()
    config = train.Config(**train.PPO)
    problems = [data.train_problem(0, 1, i, config.digits, config.prompt) for i in range(args.problems)]
    for dtype in (torch.float64, torch.float32):
        model, tokenizer = policy.load_policy(args.model, dtype)
        prompts = evaluation.encode(tokenizer, problems)
        options = astar_search.Options(
            policy.stop_tokens(model, tokenizer), K=8, width=2, max_new_tokens=48, max_nodes=1024, cover=0.8
        )
        found = {}
        for world_size in (1, 2, 3):
            paths = [None] * len(problems)
            for rank in range(world_size):
                mine = list(fsdp.share(len(problems), fsdp.Ranks(rank, world_size, torch.device("cpu"))))
                for some in (mine[i : i + 256] for i in range(0, len(mine), 256)):
                    expander = astar_search.Expander(model, [prompts[i] for i in some], 48)
                    trees = astar_search.search(astar_search.root_keys(0, 1, some), expander, options)
                    for i, tree in zip(some, trees):
                        paths[i] = [leaf.path() for leaf in tree.leaves]
            found[world_size] = paths
        leaves = sum(map(len, found[1]))
        for world_size in (2, 3):
            other = sum(one != two for one, two in zip(found[1], found[world_size]))
            print(
                f"{dtype}: {other} of {len(problems)} searches ({leaves} leaves) differ between 1 and {world_size} ranks",
                flush=True,
            )


if __name__ == "__main__":
    main()
