"""cache_layout.py -- which layout of the search's KV cache? The measurement behind astar_search.NodeCache.

Two ways to run one round of a tree search, `width` new nodes in each of N problems that hold M nodes already:

    index   the time axis of the cache is the node index; N rows of `width` queries under a 4D mask that shows each
            node its prompt and ancestors. No copies; attention pays for all M nodes.
    gather  one row a node; its ancestors' K/V are copied together by index. Pays for the depth only.

    python experiments/cache_layout.py            # the tiny base's shape, one thread
    python experiments/cache_layout.py --hidden 576 --layers 30 --problems 8
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import Cache

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from astar_search import NodeCache  # noqa: E402


class IndexCache(Cache):
    """K and V by node index, preallocated: (N, H, M + width, D) a layer, the new nodes last."""

    def __init__(self, layers, N, H, M, width, D):
        super().__init__(layers=[])
        self.tables = [torch.randn(2, N, H, M + width, D) for _ in range(layers)]
        self.M = M

    def update(self, key, value, layer, *args, **kwargs):
        self.tables[layer][0, :, :, self.M :], self.tables[layer][1, :, :, self.M :] = key, value
        return self.tables[layer][0], self.tables[layer][1]

    def get_seq_length(self, layer_idx=0):
        return 0


def seconds(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Seconds of one search round under the two cache layouts.")
    for name, default in (
        ("hidden", 128),
        ("layers", 4),
        ("heads", 4),
        ("kv-heads", 2),
        ("problems", 64),
        ("width", 2),
        ("depth", 48),
        ("repeats", 15),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=64, hidden_size=args.hidden, intermediate_size=2 * args.hidden, num_hidden_layers=args.layers,
                         num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, max_position_embeddings=8192)  # fmt: skip
    model = Qwen2ForCausalLM(config).eval().base_model
    N, w, H, D = args.problems, args.width, args.kv_heads, args.hidden // args.heads
    print(
        f"{N} problems x {w} new nodes at depth {args.depth}, hidden {args.hidden}, {args.layers} layers; median of {args.repeats}"
    )
    print("nodes a problem   index ms   gather ms   ratio")
    for M in (64, 128, 256, 512, 1024, 2048, 4096):
        cache = IndexCache(args.layers, N, H, M, w, D)
        mask = torch.full((N, 1, w, M + w), torch.finfo(torch.float32).min)
        for i in range(w):
            mask[:, :, i, torch.randperm(M)[: args.depth]] = 0
            mask[:, :, i, M + i] = 0
        tokens, positions = torch.zeros(N, w, dtype=torch.int64), torch.full((N, w), args.depth)
        run = lambda: model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        index = seconds(run, args.repeats)

        nodes = NodeCache()
        nodes.rows += N * M + N * w
        nodes.read = torch.randint(1, N * M, (N * w, args.depth + 1))
        nodes.write = torch.arange(N * M, N * M + N * w)[:, None]
        row_tokens, row_positions = tokens.view(-1, 1), positions.view(-1, 1)
        row_mask = torch.zeros(N * w, 1, 1, args.depth + 1)
        run = lambda: model(
            input_ids=row_tokens,
            position_ids=row_positions,
            attention_mask=row_mask,
            past_key_values=nodes,
            use_cache=True,
        )
        run()
        for table in nodes.tables.values():
            table.normal_()  # as if all M nodes had been run
        gather = seconds(run, args.repeats)
        print(f"{M:15d} {index * 1e3:10.1f} {gather * 1e3:11.1f} {index / gather:7.2f}")


if __name__ == "__main__":
    main()
