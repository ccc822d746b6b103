"""memory.py -- the memory that training needs, worked out on paper: no weights are loaded.

    python examples/memory.py                                                   # the default run
    python examples/memory.py --config training --model examples/qwen2.5-3b --gpu-memory 80

Prints what a rank needs with 1, 2, 4 and 8 ranks, with and without --cpu-offload.  Every flag of
train.py is accepted and means the same.  With --gpu-memory GIB the exit status is 2 if the run,
as its flags and torchrun have it, does not fit into a GPU of that size.

The model's config.json is enough: a folder with that file alone, such as examples/qwen2.5-3b,
serves as --model.  The estimate assumes the worst where the run decides: every search uses all of
--max-nodes, and every completion has its full length.  experiments/memory_measured.py compares the
estimate with a real process.
"""

import argparse
import copy
import math
import os
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import eval as evaluation
import policy
import train
import value as value_module

GIB = 2**30


# ------------------------------------------------------------------- The model, without its weights
def outline(name, freeze_blocks=0):
    """The model of a folder or a hub id on the meta device: it has every shape and takes no memory.

    Raises ValueError.
    """
    from transformers import AutoModelForCausalLM

    config = policy.read_config(name)
    with policy.one_sentence(f"--model {name}: not a causal language model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return policy.freeze(model, freeze_blocks)


def activation_bytes(model, dtype, tokens=64):
    """Bytes a token that autograd keeps of one block for the backward pass.

    This is counted, not derived: the outlined model runs on the CPU with one block and with two,
    and the difference is what a block keeps.
    """
    return kept_bytes(model, 2, dtype, tokens) - kept_bytes(model, 1, dtype, tokens)


def kept_bytes(model, blocks, dtype, tokens):
    """Bytes a token that autograd keeps of a model cut to its first `blocks` blocks."""
    small = copy.deepcopy(model)
    del policy.transformer_blocks(small)[blocks:]
    small.config.get_text_config().num_hidden_layers = blocks
    small = small.to(dtype).to_empty(device="cpu")  # undefined content: only shapes matter
    small.requires_grad_(True)  # a frozen block keeps nothing, and a trained one is asked for
    weights = {parameter.untyped_storage()._cdata for parameter in small.parameters()}
    # A tensor may be kept several times, or in several views: its storage counts once.
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        output = small.base_model(input_ids=ids, use_cache=False)
    kept = sum(size for storage, size in storages.items() if storage not in weights) / tokens
    del output  # kept until here, so that no storage was freed and used a second time
    return kept


# ------------------------------------------------------------------------------------- The estimate
def memory(config, model, prompt, activations, world_size, offload):
    """What a rank needs, in bytes by name.

    config: train.Config; model: its outline; prompt: tokens of the longest prompt; activations:
    activation_bytes(model).  "rollouts" and "update" are the peaks on the GPU in the two phases;
    "host" is the peak of the host's memory, of the rank that writes checkpoints.  The other names
    are parts of these.
    """
    text = model.config.get_text_config()
    blocks = policy.transformer_blocks(model)
    head = value_module.ValueHead(text.hidden_size)
    parameters = [*model.parameters(), *head.parameters()]
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    block = sum(parameter.numel() for parameter in blocks[0].parameters())
    root = total - block * len(blocks)
    # apo keeps the base as it was, without gradients and moments.
    reference = total if config.loss == "apo" else 0
    bytes_of_number = 2 if config.mixed_precision == "bf16" else 4  # in a forward pass
    sharded = world_size > 1 or offload or config.mixed_precision == "bf16"
    shards = max(1, world_size // config.replicas)

    # A rank keeps one share of the float32 weights, of their gradients, and of AdamW's two moments.
    # AdamW's step is fused on a GPU: it makes no copies of them.
    need = {}
    need["weights"] = 4 * (total + reference) / shards
    need["gradients"] = 4 * trained / shards
    need["moments"] = 2 * need["gradients"]
    need["average"] = need["gradients"] if config.average > 0 else 0
    need.update(search_bytes(config, text, prompt, world_size, bytes_of_number, activations))

    # Rollouts run on whole weights.  In the update the root stays whole and two blocks come and go.
    # Their gradients are whole until they are split, with a float32 copy that is added up.
    whole, gathered = 0, 0
    if sharded:
        whole = bytes_of_number * (total + reference)
        gathered = (2 * bytes_of_number + 4) * (root + 2 * block)
    need["activations"] = update_bytes(config, text, prompt, activations, bytes_of_number)
    need["gathered"] = max(whole, gathered)
    # A checkpoint is put together on one rank's host.  Loading takes less: the weights alone.
    need["checkpoint"] = 4 * total + 8 * trained + need["average"] * shards

    kept = need["weights"] + need["moments"] + need["average"]
    need["rollouts"] = whole + need["K/V"] + need["search"]
    need["update"] = gathered + need["activations"]
    need["host"] = need["trees"] + need["checkpoint"]
    if offload:
        need["host"] += kept + need["gradients"]
    else:
        need["rollouts"] += kept
        need["update"] += kept + need["gradients"]
    return need


def search_bytes(config, text, prompt, world_size, bytes_of_number, activations):
    """What rollouts take, in bytes: {"K/V", "search"} on the GPU, {"trees"} on the host.

    K/V: the cache of the search's nodes.  search: what is kept beside it, and one forward.
    trees: the nodes as Python has them, and the hidden states on which the value head is trained.
    """
    D = text.hidden_size
    V = text.vocab_size
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or D // heads
    kv = 2 * kv_heads * head_size * bytes_of_number  # one row of K and V in one layer

    # The cache has one row a prompt token and one row a node.  Its tables grow by doubling.
    share = math.ceil(config.problems_per_iteration / world_size)
    problems = min(config.rollout_batch, share)
    rows = problems * (prompt + config.max_nodes)
    capacity = max(1024, 2 * problems * prompt)
    while capacity < rows:
        capacity *= 2

    # With each row come its ancestors' numbers, 4 bytes each, and its last hidden state.
    span = prompt + config.max_new_tokens
    tables = capacity * (1.5 * 4 * span + bytes_of_number * D)
    # In a round each node has the scores of all its children, and its ancestors' K/V of a layer,
    # gathered, and at most copied twice.  (Query heads that share K/V do not copy it.)  The first
    # round runs the prompts; it takes less than what autograd would keep of a block.
    nodes = problems * config.width
    copies = 3 * kv * span
    forward = max(nodes * copies, problems * prompt * activations)

    # The trees are those of one batch; a node takes 1,050 to 1,100 bytes (measured).  The hidden
    # states are those of all prefixes of an iteration, in the model's type.
    hidden = share * (prompt + config.max_nodes) * D * bytes_of_number
    return {
        "K/V": capacity * kv * text.num_hidden_layers,
        "search": tables + nodes * 20 * V + forward,
        "trees": rows * 1100 + hidden,
    }


def update_bytes(config, text, prompt, activations, bytes_of_number):
    """Bytes of the activations of one micro-batch, and of one chunk of logits."""
    tokens = config.micro_batch * (prompt + config.max_new_tokens)
    if config.gradient_checkpointing == "on":
        # Two blocks' activations at a time, and of every block its input.
        inputs = text.num_hidden_layers * bytes_of_number * text.hidden_size
        blocks_at_once = 2 + inputs / activations
    else:
        blocks_at_once = text.num_hidden_layers + 1
    # The last norm and the value head are computed in float32: ten numbers for each hidden one.
    last = 10 * 4 * text.hidden_size
    logits = min(1 << 24, tokens * text.vocab_size)
    return tokens * (activations * blocks_at_once + last) + 20 * logits


# ---------------------------------------------------------------------------------------- The table
def longest_prompt(config):
    """(tokens of the longest of 64 evaluation prompts, how that is known).

    Without a tokenizer a token is taken as three characters.
    """
    problems = data.eval_problems(64, config.digits, config.prompt)
    try:
        prompts = evaluation.encode_prompts(policy.load_tokenizer(config.model), problems)
    except ValueError:
        characters = max(len(problem.prompt) for problem in problems)
        return characters // 3, "no tokenizer: taken as 3 characters a token"
    return max(len(prompt) for prompt in prompts), "the longest of 64 problems"


def print_estimate(config, gpu_memory=None):
    """Print the memory of a rank, of 1, 2, 4 and 8 ranks, with and without offload.

    Raises ValueError if the run, as its flags and torchrun have it, needs more than gpu_memory GiB.
    """
    model = outline(config.model, config.freeze_blocks)
    prompt, how_known = longest_prompt(config)
    policy.check_context(model, prompt, config.max_new_tokens)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    activations = activation_bytes(model, dtype)

    size = sum(parameter.numel() for parameter in model.parameters())
    blocks = len(policy.transformer_blocks(model))
    print(f"{config.model}: {size:,} parameters, {blocks} blocks")
    print(
        f"prompts of {prompt} tokens ({how_known}); "
        f"a block keeps {activations:,.0f} bytes a token for the backward pass"
    )
    print("GiB of a rank, at most; rollouts and update are the peaks on the GPU\n")

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    peaks = {}  # (ranks, offload) -> GiB
    for offload in (False, True):
        for ranks in sorted({1, 2, 4, 8, world_size}):
            need = memory(config, model, prompt, activations, ranks, offload)
            if not peaks:
                print("ranks  offload" + "".join(f"{name:>12s}" for name in need))
            numbers = "".join(f"{size / GIB:12.2f}" for size in need.values())
            print(f"{ranks:5d}  {'on' if offload else 'off':>7s}{numbers}")
            peaks[ranks, offload] = max(need["rollouts"], need["update"]) / GIB

    if gpu_memory is not None:
        refuse_too_large(peaks, world_size, config.cpu_offload, gpu_memory)


def refuse_too_large(peaks, world_size, offload, gpu_memory):
    """Raise ValueError if the run's peak is above gpu_memory; the sentence says what would fit.

    peaks: (ranks, offload) -> GiB.
    """
    peak = peaks[world_size, offload]
    if peak <= gpu_memory:
        return
    instead = "lower --rollout-batch, --max-nodes or --micro-batch"
    for (ranks, with_offload), other in peaks.items():
        if other <= gpu_memory:
            instead = f"it fits on {ranks} ranks"
            if with_offload:
                instead += " with --cpu-offload"
            break
    raise ValueError(f"--gpu-memory {gpu_memory:g}: a rank needs {peak:.1f} GiB; {instead}")


# ------------------------------------------------------------------------------------- Command line
def main(argv=None):
    parser = data.OneLineParser(
        "memory.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="memory of a GPU: exit with status 2 if the run does not fit",
    )
    arguments, rest = parser.parse_known_args(argv)
    gpu_memory = arguments.gpu_memory
    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        parser.error(f"--gpu-memory must be above 0, not {gpu_memory}")
    config, train_arguments, _ = train.parse_arguments(rest)
    if train_arguments.eval_only:
        parser.error("--eval-only: the estimate is of training, leave it out")
    try:
        print_estimate(config, gpu_memory)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
