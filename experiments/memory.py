"""Does `train.py --dry-run` tell the truth?  Its estimate beside the measured peak, for a random model of 135M parameters.

    python experiments/memory.py                          # ten minutes on 2 cores, 6 GiB

Each setting is two iterations of train.py in a process of its own, here with a watch on its two phases.  Measured: the
peak of resident memory within the phase of the second iteration (Adam's moments begin with the first update), less what
the process held before the model was loaded.  A random model's completions are noise of full length, and the search
uses all of its nodes: what the estimate assumes.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
             vocab_size=49152, tie_word_embeddings=True, eos_token_id=2)  # fmt: skip
FLAGS = "--device cpu --problems-per-iteration 4 --max-new-tokens 100 --max-nodes 250 --minibatches 1 --eval-problems 1"
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
    sys.path.insert(0, str(ROOT))
    import torch

    import policy
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
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sys.path.insert(0, str(ROOT))
    import policy
    import train

    with tempfile.TemporaryDirectory() as work:
        folder = os.path.join(work, "random")
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(folder)
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
            model = policy.outline(folder)
            dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
            estimate = train.memory(config, model, 6, policy.activation_bytes(model, dtype), 1, False)
            for phase, peak in measured.items():
                ratio = estimate[phase] / peak
                print(
                    f"{name:32s}{phase:>12s}{peak / 2**30:10.2f}{estimate[phase] / 2**30:10.2f}   {ratio - 1:+.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    watched(sys.argv[1:]) if len(sys.argv) > 1 else main()
