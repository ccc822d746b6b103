"""What `train.py --dry-run` prints: the memory of a rank, on paper.  And is it true?

    python experiments/memory.py                          # the estimate beside a measurement; ten minutes on 2 cores, 6 GiB

The measurement: a random model of 135M parameters, each setting two iterations of train.py in a process of its own,
here with a watch on its two phases.  Measured is the peak of resident memory within the phase of the second iteration
(Adam's moments begin with the first update), less what the process held before the model was loaded.  A random model's
completions are noise of full length, and the search uses all of its nodes: what the estimate assumes.
"""

import copy
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import policy  # noqa: E402
import value as value_module  # noqa: E402

# ==================================================================================================== on paper


def outline(name, freeze_blocks=0):
    """The model of a folder or a hub id on the meta device: every shape, no memory.  Raises ValueError."""
    from transformers import AutoModelForCausalLM

    config = policy.read_config(name)
    with policy.one_sentence(f"--model {name}: not a causal language model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return policy.freeze(model, freeze_blocks)


def activation_bytes(model, dtype, tokens=64):
    """What autograd keeps of one block for the backward pass, in bytes a token.  Counted, not derived: an outlined
    model runs on the CPU with one block and with two, and a hook sees every tensor that is kept."""
    kept = []
    for blocks in (1, 2):
        small = copy.deepcopy(model)
        del policy.blocks_of(small)[blocks:]
        small.config.get_text_config().num_hidden_layers = blocks
        small = small.to(dtype).to_empty(device="cpu")  # of undefined content: only shapes matter
        weights = {parameter.untyped_storage()._cdata for parameter in small.parameters()}
        storages = {}  # a tensor may be kept several times, or in several views: its storage counts once

        def keep(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            alive = small.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
        kept.append(sum(storages[key] for key in storages.keys() - weights) / tokens)
        del alive  # until here, so that no storage was used twice
    return kept[1] - kept[0]


def memory(config, model, prompt, activations, world_size, offload):
    """What a rank needs, in bytes by name, and the peaks on the GPU: "rollouts" and "update"; "host" for the offload.

    model: its outline; prompt: tokens of a prompt; activations: activation_bytes.  An upper bound where the run
    decides: every search uses all of --max-nodes, and every completion is of full length.
    """
    text = model.config.get_text_config()
    D, V, L, heads = text.hidden_size, text.vocab_size, text.num_hidden_layers, text.num_attention_heads
    blocks = policy.blocks_of(model)
    parameters = [*model.parameters(), *value_module.ValueHead(D).parameters()]
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    block = sum(p.numel() for p in blocks[0].parameters())
    root = total - block * len(blocks)
    reference = total if config.loss == "apo" else 0  # the base as it was: no gradients, no moments
    c = 2 if config.mixed_precision == "bf16" else 4  # bytes of a number in a forward pass
    sharded = world_size > 1 or offload or c == 2

    # What a rank keeps: 1/W of the float32 weights, of their gradients, and of AdamW's two moments.
    need = {"weights": 4 * (total + reference) / world_size, "gradients": 4 * trained / world_size}
    need["moments"] = 2 * need["gradients"]
    kept = 0 if offload else need["weights"] + need["moments"]

    # Rollouts: whole weights; a row of K/V a prompt token and a node, and with it its ancestors and its hidden state.
    whole = c * (total + reference) * sharded
    problems = min(config.rollout_batch, math.ceil(config.problems_per_iteration / world_size))
    span = prompt + config.max_new_tokens
    rows, capacity = problems * (prompt + config.max_nodes), max(1024, 2 * problems * prompt)
    while capacity < rows:  # tables grow by doubling
        capacity *= 2
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    kv = 2 * kv_heads * (getattr(text, "head_dim", None) or D // heads) * c  # of a row in one layer
    need["K/V"] = capacity * kv * L
    nodes = problems * config.width  # of a round: scores of all their children; ancestors' K/V of a layer, and copies
    need["search"] = capacity * (1.5 * 8 * span + c * D) + nodes * (20 * V + 3 * kv * span)

    # Update: the root stays whole, two blocks come and go, gradients are whole until they are split.
    tokens = config.micro_batch * span
    at_once = 2 + L * c * D / activations if config.gradient_checkpointing == "on" else L + 1  # blocks' worth
    need["activations"] = tokens * activations * at_once + 20 * min(1 << 24, tokens * V)  # and a chunk of logits
    gathered = (c * (root + 2 * block) + (c + 4) * root) * sharded
    need["gathered"] = max(whole, gathered)

    backward = gathered + need["activations"] + (0 if offload else need["gradients"])
    need["rollouts"] = kept + whole + need["K/V"] + need["search"]
    need["update"] = kept + backward
    need["host"] = offload * (need["weights"] + need["gradients"] + need["moments"])
    return need


def dry_run(config, gpu_memory=None):
    """Print the memory of a rank, of 1, 2, 4 and 8, with and without offload, without loading any weights.  Raises
    ValueError if the run, as its flags and torchrun have it, needs more than gpu_memory GiB."""
    model = outline(config.model, config.freeze_blocks)
    problems = data.eval_problems(64, config.digits, config.prompt)
    try:
        prompt = max(map(len, evaluation.encode(policy.load_tokenizer(config.model), problems)))
        known = "the longest of 64 problems"
    except ValueError:
        prompt = max(len(problem.prompt) for problem in problems) // 3
        known = "no tokenizer: taken as 3 characters a token"
    policy.check_context(model, prompt, config.max_new_tokens)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    activations = activation_bytes(model, dtype)
    print(f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(policy.blocks_of(model))} blocks")
    print(f"prompts of {prompt} tokens ({known}); a block keeps {activations:,.0f} bytes a token for the backward pass")
    print("GiB of a rank, at most; rollouts and update are the peaks on the GPU\n")
    this = (int(os.environ.get("WORLD_SIZE", 1)), config.cpu_offload)
    peaks = {}
    for setting in ((ranks, offload) for offload in (False, True) for ranks in sorted({1, 2, 4, 8, this[0]})):
        need = memory(config, model, prompt, activations, *setting)
        if not peaks:
            print("ranks  offload" + "".join(f"{name:>12s}" for name in need))
        numbers = "".join(f"{x / 2**30:12.2f}" for x in need.values())
        print(f"{setting[0]:5d}  {'on' if setting[1] else 'off':>7s}{numbers}")
        peaks[setting] = max(need["rollouts"], need["update"]) / 2**30
    if gpu_memory and peaks[this] > gpu_memory:
        fits = [f"{n} ranks{' with --cpu-offload' * offload}" for (n, offload), peak in peaks.items() if peak <= gpu_memory]
        instead = f"it fits on {fits[0]}" if fits else "lower --rollout-batch, --max-nodes or --micro-batch"
        raise ValueError(f"--gpu-memory {gpu_memory:g}: a rank needs {peaks[this]:.1f} GiB; {instead}")


# ==================================================================================================== measured

SIZES = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
             vocab_size=49152)  # SmolLM2's  # fmt: skip
FLAGS = "--config ppo --device cpu --problems-per-iteration 4 --max-new-tokens 100 --max-nodes 250 --minibatches 1 --eval-problems 1"
SETTINGS = {
    "float32": "--micro-batch 8",
    "float32, checkpointed": "--micro-batch 16 --gradient-checkpointing on",
    "bf16 by FSDP, checkpointed": "--micro-batch 16 --gradient-checkpointing on --mixed-precision bf16",
}


def resident(name):
    """VmRSS (now) or VmHWM (the peak since it was reset) of this process, in bytes."""
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024


def watched(argv):
    """train.py's main() with a watch on two phases; prints their peaks as JSON."""
    import train

    torch.manual_seed(0)
    peaks, before = {}, {}

    def watch(module, name, phase):
        function = getattr(module, name)

        def wrapped(*args, **kwargs):
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
            result = function(*args, **kwargs)
            peaks[phase] = resident("VmHWM") - before["the model"]
            return result

        setattr(module, name, wrapped)

    watch(train, "make_rollouts", "rollouts")
    watch(train, "update", "update")
    load = policy.load_policy

    def loaded(*args, **kwargs):
        before.setdefault("the model", resident("VmRSS"))
        return load(*args, **kwargs)

    policy.load_policy = loaded
    train.main(argv)
    print("\n" + json.dumps(peaks))


def main():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import train

    with tempfile.TemporaryDirectory() as work:
        folder = os.path.join(work, "random")
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True, eos_token_id=2)).save_pretrained(folder)
        for path in (ROOT / "tiny_base").glob("token*"):
            shutil.copy(path, folder)
        # Memory that is freed goes back to the system at once, else the peak would depend on what came before.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        print(f"{'':32s}{'':>12s}{'measured':>10s}{'estimate':>10s}   GiB")
        for name, flags in SETTINGS.items():
            argv = f"--model {folder} --output-dir {work}/run --overwrite --iterations 2 {FLAGS} {flags}".split()
            run = subprocess.run([sys.executable, __file__, *argv], capture_output=True, text=True, env=environment)
            if run.returncode:
                sys.exit(run.stderr)
            measured = json.loads(run.stdout.splitlines()[-1])
            config, _, _ = train.parse(argv)
            model = outline(folder)
            dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
            estimate = memory(config, model, 6, activation_bytes(model, dtype), 1, False)
            for phase, peak in measured.items():
                ratio = estimate[phase] / peak
                print(
                    f"{name:32s}{phase:>12s}{peak / 2**30:10.2f}{estimate[phase] / 2**30:10.2f}   {ratio - 1:+.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    watched(sys.argv[1:]) if len(sys.argv) > 1 else main()
