"""What one H100 should do with --config training, worked out on paper.

    python experiments/expected_speed.py

This is arithmetic, not a measurement: no GPU has run it.  Each time is bytes over bandwidth,
operations over their rate, or a number of kernels times the cost of a launch.  The shapes are those
of examples/qwen2.5-3b/config.json.  What is assumed stands at the top, to be changed.

A model token is a node of a search: one token, run once.  A round runs the model on new nodes of
all problems in lock-step.  The columns of the table, each with the changes of those before it:

    before          K/V are gathered, and then copied once a query head; --width 2, whose search
                    looked one node ahead
    now             query heads share the gathered K/V; --width 8, whose search runs ahead
    CUDA graphs     a round is launched as a whole: this is not in the code
"""

import json
import pathlib
import sys
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train

# ------------------------------------------------------------------------------------ An H100 (SXM)

BANDWIDTH = 3.35e12  # bytes a second, of its memory
FLOPS = 0.4 * 990e12  # bf16 operations a second: 40 % of the peak, which is usual in training
LAUNCH = 5e-6  # seconds of the host for each kernel that it launches

# -------------------------------------------------------------------------------------- Assumptions

PROMPT = 143  # tokens, as examples/memory.py has it
COMPLETION = 400  # tokens of a mean completion: a guess
# Nodes of a round for each problem of the batch: some searches end before the last one does.
# Measured by experiments/rounds.py on a trained tiny base, 64 problems at tau = 1 and h = 0.
BUSY_BEFORE = 0.55
BUSY_NOW = 0.9

# Seconds of Python and small tensors for each node, outside of the model.  Measured on the tiny
# base at 32 nodes a round: 50 to 56 microseconds.
HOST = 50e-6

# Kernels of a round: counted for a node's forward, 44 a layer; with 150 for all that is outside.
KERNELS_OF_A_LAYER = 44
KERNELS_OUTSIDE = 150

# Bytes read and written for each child's log pi, noise and key, counted operation by operation:
# most of them are the int64 steps of mix64.
CHILD = 350


# ----------------------------------------------------------------------------------- The arithmetic


@dataclass
class Case:
    """A column of the table."""

    name: str
    busy: float  # nodes of a round for each problem of the batch
    kv_bytes: float  # moved for each token that a node attends to, in one layer
    graphs: bool  # is a round launched as a whole?


def make_cases(config):
    """The columns.  config: of the model."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config["hidden_size"] // heads
    kv = 2 * kv_heads * head_size * 2  # bytes of K and V in bf16: 1 kB
    copied = kv * heads // kv_heads  # the same once a query head
    # Gathering reads and writes K/V.  Repeating reads them and writes the copies.  Attention reads
    # what it is given, and half a kB of mask and padding.
    repeated = 2 * kv + kv + copied + copied + kv / 2
    shared = 2 * kv + kv + kv / 2
    return [
        Case("before", busy=BUSY_BEFORE, kv_bytes=repeated, graphs=False),
        Case("now", busy=BUSY_NOW, kv_bytes=shared, graphs=False),
        Case("CUDA graphs", busy=BUSY_NOW, kv_bytes=shared, graphs=True),
    ]


def count_parameters(config):
    """Of a Qwen2 model with tied embeddings."""
    D, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * D // config["num_attention_heads"]
    attention = 2 * D * D + 2 * D * kv + D + 2 * kv  # q and o, k and v, their biases
    block = attention + 3 * D * inner + 2 * D  # the MLP's three matrices, two norms
    return config["vocab_size"] * D + config["num_hidden_layers"] * block + D


def expected(case, config, preset):
    """{name: number} of one column; times in milliseconds a round and in seconds an iteration."""
    parameters = count_parameters(config)
    layers = config["num_hidden_layers"]
    problems = preset["problems_per_iteration"]
    leaves = preset["rollouts_per_problem"] * problems

    # ------------------------------------------------------------------------------------- A round
    nodes = case.busy * preset["rollout_batch"]
    depth = PROMPT + COMPLETION / 2  # tokens that a node attends to, on average
    # The output layer is the embeddings, so one reading of the weights is all of it.  The matrices
    # are read while they are multiplied: the longer of the two counts.
    weights = 2 * parameters / BANDWIDTH
    matrices = 2 * parameters * nodes / FLOPS
    kv = nodes * depth * layers * case.kv_bytes / BANDWIDTH
    children = nodes * config["vocab_size"] * CHILD / BANDWIDTH
    gpu = max(weights, matrices) + kv + children
    launches = LAUNCH * (layers * KERNELS_OF_A_LAYER + KERNELS_OUTSIDE)
    if case.graphs:
        launches = LAUNCH * KERNELS_OUTSIDE
    host = nodes * HOST
    # The GPU works while the host launches.  The search itself waits for the GPU.
    seconds = max(gpu, launches) + host

    # -------------------------------------------------------------------------------- An iteration
    rollouts = leaves * COMPLETION / (nodes / seconds)
    # Under ppo nearly every leaf teaches the policy, so all are trained.
    tokens = leaves * (PROMPT + COMPLETION)
    # bf16: pi_old is computed again by a forward.  The update is forward and backward, 6 operations
    # for each parameter and token, and 2 to recompute the activations.
    rescoring = 2 * parameters * tokens / FLOPS
    update = (6 + 2) * parameters * tokens / FLOPS
    iteration = rollouts + rescoring + update
    return {
        "nodes a round": f"{nodes:.0f}",
        "weights, ms": f"{1e3 * weights:.1f}",
        "matrices, ms": f"{1e3 * matrices:.1f}",
        "K/V, ms": f"{1e3 * kv:.1f}",
        "children, ms": f"{1e3 * children:.1f}",
        "GPU in all, ms": f"{1e3 * gpu:.1f}",
        "launches, ms": f"{1e3 * launches:.1f}",
        "search on the host, ms": f"{1e3 * host:.1f}",
        "a round, ms": f"{1e3 * seconds:.1f}",
        "model tokens a second": f"{nodes / seconds:,.0f}",
        "rollouts, s": f"{rollouts:.0f}",
        "pi_old again, s": f"{rescoring:.0f}",
        "update, s": f"{update:.0f}",
        "an iteration, s": f"{iteration:.0f}",
        "200 iterations, hours": f"{200 * iteration / 3600:.1f}",
    }


def main():
    config = json.loads((ROOT / "examples" / "qwen2.5-3b" / "config.json").read_text())
    preset = train.PRESETS["training"]
    cases = make_cases(config)
    columns = [expected(case, config, preset) for case in cases]
    print("| | " + " | ".join(case.name for case in cases) + " |")
    print("|---" * (1 + len(cases)) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


if __name__ == "__main__":
    main()
