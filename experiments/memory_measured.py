"""Is the estimate of examples/memory.py true?  It is compared with the memory of a real process.

    python experiments/memory_measured.py             # ten minutes on 2 cores, 6 GiB of memory
    python experiments/memory_measured.py --quick     # a small model: does the script work?

A random model of 135M parameters.  Each setting is two iterations of train.py in a process of its
own.  Measured is the peak of resident memory within each phase of the second iteration, less what
the process held before the model was loaded.  (Adam's moments begin with the first update.)  The
completions of a random model are noise of full length, and the search uses all of its nodes: that
is what the estimate assumes.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import memory

import policy
import train

# SmolLM2's.  speed.py uses it too.
SIZES = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
SMALL = SIZES | {"num_hidden_layers": 2, "vocab_size": 512}
FLAGS = (
    "--config ppo --device cpu --problems-per-iteration 4 --max-new-tokens 100 --max-nodes 250 "
    "--minibatches 1 --eval-problems 1 --iterations 2 --overwrite"
)
SETTINGS = {
    "float32": "--micro-batch 8",
    "float32, checkpointed": "--micro-batch 16 --gradient-checkpointing on",
    "bf16 by FSDP, checkpointed": (
        "--micro-batch 16 --gradient-checkpointing on --mixed-precision bf16"
    ),
}
PROMPT = 6  # tokens of the longest prompt, such as 34*12=


# ---------------------------------------------------------------------------------------- Measuring
def resident(name):
    """VmRSS (now) or VmHWM (the peak since reset_peak) of this process, in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


def reset_peak():
    """Set VmHWM to VmRSS."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def run_watched(argv):
    """train.main(argv) with a watch on two phases.  Prints their peaks, in bytes, as JSON.

    The rollouts are one function.  The update lasts from the call that deals the minibatches to
    the end of the optimiser's step.
    """
    before = {}
    peaks = {}
    load_policy = policy.load_policy
    generate_rollouts = train.generate_rollouts
    deal_minibatches = train.deal_minibatches
    step = torch.optim.AdamW.step

    def watched_load_policy(*args, **kwargs):
        if not before:
            before["the model"] = resident("VmRSS")
        return load_policy(*args, **kwargs)

    def watched_rollouts(*args, **kwargs):
        reset_peak()
        result = generate_rollouts(*args, **kwargs)
        peaks["rollouts"] = resident("VmHWM") - before["the model"]
        return result

    def watched_deal_minibatches(*args, **kwargs):
        reset_peak()
        return deal_minibatches(*args, **kwargs)

    def watched_step(*args, **kwargs):
        result = step(*args, **kwargs)
        peaks["update"] = resident("VmHWM") - before["the model"]
        return result

    policy.load_policy = watched_load_policy
    train.generate_rollouts = watched_rollouts
    train.deal_minibatches = watched_deal_minibatches
    torch.optim.AdamW.step = watched_step
    train.main(argv)
    print("\n" + json.dumps(peaks))


# ---------------------------------------------------------------------------------------- Comparing
def make_model(folder, sizes):
    """Write a random model of these sizes, with the tokenizer of the tiny base."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**sizes, tie_word_embeddings=True, eos_token_id=2)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for path in (ROOT / "tiny_base").glob("token*"):
        shutil.copy(path, folder)


def compare_with_estimate(name, folder, output, flags):
    """Print a line for each of the two phases of one setting."""
    argv = f"--model {folder} --output-dir {output} {FLAGS} {flags}".split()
    # Memory that is freed goes back to the system at once, else the peak would depend on what
    # came before.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, __file__, "--watch", *argv]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        sys.exit(process.stderr)
    measured = json.loads(process.stdout.splitlines()[-1])

    config, _, _ = train.parse_arguments(argv)
    model = memory.outline(folder)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    activations = memory.activation_bytes(model, dtype)
    estimate = memory.memory(config, model, PROMPT, activations, world_size=1, offload=False)
    for phase, peak in measured.items():
        sizes = f"{peak / 2**30:10.2f}{estimate[phase] / 2**30:10.2f}"
        print(f"{name:32s}{phase:>12s}{sizes}   {estimate[phase] / peak - 1:+.0%}", flush=True)


def main():
    if sys.argv[1:2] == ["--watch"]:  # one setting, in a process of its own
        run_watched(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small model instead of 135M")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = os.path.join(work, "random")
        make_model(folder, SMALL if args.quick else SIZES)
        print(f"{'':32s}{'':>12s}{'measured':>10s}{'estimate':>10s}   GiB")
        for name, flags in SETTINGS.items():
            compare_with_estimate(name, folder, os.path.join(work, "run"), flags)


if __name__ == "__main__":
    main()
