"""train.py -- A*PO, top to bottom: reinforcement learning of a base language model with A* search rollouts.

    problems -> A* search over KV-cached prefixes -> Rollouts -> reward -> advantages -> PPO-clip and value loss

    python train.py                                   # the tiny base on a CPU (or GPU), no download
    python train.py --config quick                    # the same base to 80 % in a minute: plain A* and --loss em
    python train.py --rollout sample                  # i.i.d. sampling: the baseline
    torchrun --standalone --nproc_per_node=4 train.py --config training --distributed      # Qwen2.5-3B on four GPUs
    python train.py --resume auto                     # go on after a stop
    python train.py --eval-only --checkpoint runs/local/checkpoint_iter_90

The loop is `main()`, one phase after the other.  Above it are the flags and the files a run writes.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import gc
import hashlib
import importlib.util
import json
import math
import operator
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import astar_search
import data
import eval as evaluation
import fsdp
import policy
import reward as reward_module
import value as value_module

HERE = os.path.dirname(os.path.abspath(__file__))

# ======================================================================================================== flags


def flag(default, help, choices=None, low=None, high=None, above=None):
    """A Config field: its default, what it means, and what is allowed."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high, "above": above})


@dataclass
class Config:
    """Every field is a flag: --rollouts-per-problem 8.  `low`, `high` are allowed, `above` is not."""

    # the task
    model: str = flag(os.path.join(HERE, "tiny_base"), "folder or hub id of the base model")
    prompt: str = flag("terse", "prompt style", choices=tuple(data.PROMPTS))
    digits: str = flag("2", "digits per operand: 2, 3, 2x3, 2-3, ... up to 6")
    train_file: str = flag("", "jsonl file of training problems with prompt and answer, instead of made ones")
    eval_file: str = flag("", "jsonl file of evaluation problems")
    reward: str = flag("", "FILE.py:FUNCTION, a reward of your own; then the two sizes below mean nothing")
    format_bonus: float = flag(0.1, "added to the reward of a well-formed completion", low=0)
    length_penalty: float = flag(0.0, "taken off the reward of a completion of full length, in proportion", low=0)
    # rollouts
    rollout: str = flag("astar", "A* search, or i.i.d. sampling", choices=("astar", "sample"))
    problems_per_iteration: int = flag(256, "problems an iteration", low=1)
    rollouts_per_problem: int = flag(8, "K: leaves a search may accept, or completions sampled", low=1)
    tau: float = flag(1.0, "0: plain A*;  1: Gumbel search, draws without replacement", low=0, high=1)
    beta: float = flag(0.2, "temperature of the soft value h", above=0)
    guide: str = flag("head", "h of the search: the value head's, or 0", choices=("head", "none"))
    until_right: str = flag("off", "a search is done with its first right leaf (for --loss em)", choices=("on", "off"))
    cover: float = flag(0.8, "a problem is done when its leaves hold this much of pi; 1 for never", above=0, high=1)
    leaf_weights: str = flag("on", "weigh leaves by pi/q in all losses", choices=("on", "off"))
    max_new_tokens: int = flag(48, "longest completion in tokens", low=1)
    max_nodes: int = flag(1024, "most nodes a search may expand for one problem", low=1)
    max_open: int = flag(65536, "longest queue of a search; beyond it the worst entries are dropped (a beam)", low=1)
    width: int = flag(2, "nodes of one problem that a round may run at once", low=1)
    rollout_batch: int = flag(256, "problems searched in lock-step", low=1)
    # losses
    loss: str = flag("ppo", "policy loss", choices=("ppo", "grpo", "em", "apo"))
    gae_lambda: float = flag(0.95, "lambda of GAE", low=0, high=1)
    clip: float = flag(0.2, "epsilon of PPO's clip (ppo, grpo, em)", above=0)
    entropy_coef: float = flag(0.0, "weight of the entropy bonus (ppo, grpo, em)", low=0)
    beta1: float = flag(0.5, "apo: temperature of V*, estimated on samples of the base", above=0)
    beta2: float = flag(0.001, "apo: temperature of the regression", above=0)
    apo_samples: int = flag(8, "apo: samples of the base a problem for V*", low=1)
    # optimisation
    iterations: int = flag(90, "iterations in all", low=1)
    epochs: int = flag(1, "passes over the rollouts an iteration", low=1)
    minibatches: int = flag(4, "optimiser steps a pass", low=1)
    micro_batch: int = flag(64, "rollouts a forward in training; changes memory, not the result", low=1)
    learning_rate: float = flag(3e-4, "peak learning rate of the policy", above=0)
    value_learning_rate: float = flag(1e-3, "peak learning rate of the value head", above=0)
    warmup: int = flag(8, "iterations of linear warm-up, before the cosine", low=0)
    final_rate: float = flag(0.02, "learning rate at the end, as a share of the peak", low=0, high=1)
    weight_decay: float = flag(0.0, "AdamW's", low=0)
    grad_clip: float = flag(1.0, "largest norm of the gradient", above=0)
    freeze_blocks: int = flag(0, "keep the embeddings and the first n blocks as they are", low=0)
    gradient_checkpointing: str = flag("off", "recompute activations in the backward pass", choices=("on", "off"))
    mixed_precision: str = flag("off", "bf16: compute in it, keep weights and moments in float32", choices=("off", "bf16"))
    # the run
    seed: int = flag(0, "of problems, noise and order; the same seed gives the same run", low=0, high=2**31)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    distributed: bool = flag(False, "shard over the ranks that torchrun started")
    cpu_offload: bool = flag(False, "keep weights, gradients and moments in the host's memory")
    output_dir: str = flag("runs/local", "where everything is written")
    eval_every: int = flag(10, "iterations between evaluations; there is one before the first and at the end", low=1)
    eval_problems: int = flag(500, "held-out problems of an evaluation", low=1)
    eval_decode: str = flag("greedy", "how they are decoded", choices=("greedy", "sample", "astar"))
    checkpoint_every: int = flag(10, "iterations between checkpoints (there is one at the end)", low=1)
    keep_checkpoints: int = flag(2, "older checkpoints than the newest n are removed", low=1)
    samples: int = flag(4, "rollouts an iteration written to samples.jsonl", low=0)
    wandb: bool = flag(False, "log to Weights & Biases too")
    tensorboard: bool = flag(False, "log to TensorBoard too, in the output folder")
    resume: str = flag("", "auto: from the newest checkpoint of the output folder; or a checkpoint folder")
    overwrite: bool = flag(False, "remove the run that the output folder holds")


PRESETS = {
    "local": {},
    # 80 % in a minute: plain A* until a leaf is right, and the loss that makes the most of it (README, "Measured").
    "quick": dict(
        output_dir="runs/quick", loss="em", tau=0.0, until_right="on", cover=1.0, rollouts_per_problem=64, max_nodes=128,
        problems_per_iteration=64, minibatches=2, epochs=2, learning_rate=2e-4, warmup=1, iterations=24, eval_every=6,
    ),
    "training": dict(
        model="Qwen/Qwen2.5-3B", prompt="tinyzero", digits="2-3", output_dir="runs/training", max_new_tokens=1024,
        max_nodes=16384, iterations=200, learning_rate=1e-6, value_learning_rate=1e-4, warmup=10, micro_batch=4,
        gradient_checkpointing="on", mixed_precision="bf16", problems_per_iteration=128, rollout_batch=32, cover=0.9,
    ),
}  # fmt: skip
# May differ between a run and its continuation.  More iterations stretch the cosine of the learning rate.
FREE_ON_RESUME = set(
    "iterations device distributed cpu_offload output_dir eval_every checkpoint_every keep_checkpoints samples resume overwrite "
    "micro_batch model rollout_batch wandb tensorboard".split()
)


def parse(argv):
    """argv -> (Config, args, refuse).  Anything wrong is one sentence on stderr and exit status 2."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = evaluation.OneSentence("train.py", description=__doc__, allow_abbrev=False, formatter_class=raw)
    parser.add_argument("--config", choices=tuple(PRESETS), default="local", help="preset; flags change it")
    parser.add_argument("--eval-only", action="store_true", help="evaluate --checkpoint and exit")
    parser.add_argument("--checkpoint", help="checkpoint folder for --eval-only")
    parser.add_argument("--dry-run", action="store_true", help="print the memory that a rank needs, and exit")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="--dry-run: refuse what does not fit a GPU")
    for f in dataclasses.fields(Config):
        name, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            parser.add_argument(name, action="store_true", default=None, help=text)
        else:
            text += f" (default {f.default})" if f.default != "" else ""
            parser.add_argument(name, type=f.type, choices=f.metadata["choices"], help=text)
    args = parser.parse_args(argv)
    try:
        if args.eval_only != bool(args.checkpoint):
            raise ValueError("--eval-only and --checkpoint FOLDER go together")
        if args.gpu_memory is not None and not (args.dry_run and 0 < args.gpu_memory < math.inf):
            raise ValueError("--gpu-memory GIB is for --dry-run, and above 0")
        # A checkpoint is evaluated as its run was configured; flags change it.
        config = Config(**(read_state(args.checkpoint)["config"] if args.eval_only else PRESETS[args.config]))
        for f in dataclasses.fields(Config):
            given = getattr(args, f.name)
            if given is not None:
                setattr(config, f.name, given)
        check(config)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    return config, args, parser.error


def check(config):
    """Raise ValueError for a number out of bounds or flags that contradict each other."""
    for f in dataclasses.fields(config):
        x, name = getattr(config, f.name), "--" + f.name.replace("_", "-")
        if isinstance(x, float) and not math.isfinite(x):
            raise ValueError(f"{name} must be a finite number, not {x}")
        for bound, fails, words in (("low", operator.lt, "at least"), ("high", operator.gt, "at most"), ("above", operator.le, "above")):
            b = f.metadata[bound]
            if b is not None and fails(x, b):
                raise ValueError(f"{name} must be {words} {b}, not {x}")
    data.parse_digits(config.digits)
    parts, N = config.minibatches, config.problems_per_iteration
    if parts > N:
        raise ValueError(f"--minibatches {parts} is more than --problems-per-iteration {N}")
    for package in ("wandb", "tensorboard"):
        if getattr(config, package) and not importlib.util.find_spec(package):
            raise ValueError(f"--{package}: the package is not installed: pip install {package}")
    if config.resume and config.overwrite:
        raise ValueError("--resume and --overwrite contradict each other")


def check_possible(config, vocabulary):
    """Raise ValueError if a search could not find K different leaves within its bounds."""
    # Each expanded node adds at most V - 1 leaves to a tree of one; at depth T there are at most V^T.
    most = min(config.max_nodes * (vocabulary - 1) + 1, vocabulary ** min(config.max_new_tokens, 64))
    if config.rollout == "astar" and config.rollouts_per_problem > most:
        raise ValueError(
            f"--rollouts-per-problem {config.rollouts_per_problem}: within --max-nodes {config.max_nodes} and "
            f"--max-new-tokens {config.max_new_tokens} only {most} different completions can exist"
        )


# ============================================================================================= files of a run

RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl")


def checkpoints(folder):
    """Checkpoint folders, oldest first.  A folder has this name only from when everything is in it until it goes."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [name for name in names if name.startswith("checkpoint_iter_") and name.rpartition("_")[2].isdigit()]
    return [os.path.join(folder, name) for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]


def inspect_output(config):
    """The checkpoints that the run may go on from, newest first; [] for a new run.  Raises ValueError if the output
    folder cannot be used.  Changes nothing."""
    folder = config.output_dir
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--output-dir {folder}: this is a file, give a folder")
    found = checkpoints(folder)
    held = any(os.path.exists(os.path.join(folder, name)) for name in RUN_FILES)
    if os.path.exists(os.path.join(folder, "config.json")):
        with open(os.path.join(folder, "config.json")) as file:
            if '"output_dir"' not in file.read():
                raise ValueError(f"--output-dir {folder}: its config.json is not a run's, so the folder is left alone")
    for path in (config.model, config.train_file, config.eval_file):
        if config.overwrite and path and os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep):
            raise ValueError(f"--overwrite would remove {path}, which this run needs: give another --output-dir")
    if config.resume and config.resume != "auto":
        own = os.path.dirname(os.path.abspath(config.resume)) == os.path.abspath(folder)
        if (held or found) and not own:
            raise ValueError(f"--output-dir {folder} holds another run: give --resume DIR another --output-dir")
        return [config.resume]
    if config.resume == "auto":
        return found[::-1]
    if (held or found) and not config.overwrite:
        raise ValueError(f"--output-dir {folder} holds another run: add --resume auto, --overwrite or another --output-dir")
    return []


def find_start(config, args):
    """Where the run begins: (checkpoint folder or "", its trainer state).  A damaged checkpoint is passed over for the
    one before it, and that is said.  Changes nothing."""
    if args.eval_only:
        return args.checkpoint, {}  # parse has checked it
    candidates = inspect_output(config)
    for folder, older in zip(candidates, candidates[1:] + [None]):
        try:
            state = read_state(folder)
        except ValueError as error:
            if older is None:
                raise
            print(f"train.py: {error}; going back to {older}", file=sys.stderr)
            continue
        check_same_run(config, state["config"], folder)
        return folder, state
    return "", {"iteration": 0, "model_tokens": 0, "seconds": 0.0}


def open_output(config, source, iteration):
    """Make the output folder ready to go on from `source`, after `iteration`: a new run starts empty, a resumed one is
    cut back.  Returns the lock that keeps other runs out, a file handle; the system drops it however this process ends."""
    folder = config.output_dir
    os.makedirs(folder, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError("another run is writing there: wait for it or give another folder") from None
    if source not in (inspect_output(config) or [""]):
        raise ValueError("another run has just written there: start again")
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = os.path.join(folder, name)
        if iteration > 0:
            cut_back(path, iteration)
        elif os.path.exists(path):
            os.remove(path)
    for path in checkpoints(folder):  # of a run that went further: they would be taken for this one's
        if int(path.rpartition("_")[2]) > iteration:
            discard(path)
    for name in os.listdir(folder):  # what a killed run was just writing or removing
        if name.startswith(".checkpoint_iter_"):
            shutil.rmtree(os.path.join(folder, name))
    for old in checkpoints(folder)[: -config.keep_checkpoints]:
        discard(old)
    evaluation.write(os.path.join(folder, "config.json"), json.dumps(dataclasses.asdict(config), indent=1))
    return lock


def append(path, rows):
    """Lines of JSON at the end of a file, on the disk when this returns."""
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    sync(path)


def cut_back(path, iteration):
    """Drop the lines after `iteration` from a jsonl file: they will be written again."""
    if not os.path.exists(path):
        return
    with open(path) as file:
        lines = [line for line in file if line.endswith("\n")]  # a line cut short by a kill is dropped
    try:
        kept = [line for line in lines if json.loads(line)["iteration"] <= iteration]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: a line of it is not a JSON object with an iteration") from None
    evaluation.write(path, "".join(kept))


def discard(folder):
    """Remove a checkpoint.  It loses its name first, so that a kill on the way leaves no half of one."""
    aside = os.path.join(os.path.dirname(folder), "." + os.path.basename(folder))
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def sync(path):
    """Make a file or folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def fingerprint(path):
    """Size and checksum of a file, for the manifest."""
    with open(path, "rb") as file:
        return {"bytes": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def save_checkpoint(config, iteration, model, tokenizer, head, optimizers, progress, ranks):
    """OUTPUT/checkpoint_iter_N: a Hugging Face folder plus value.safetensors, optimizer.safetensors, trainer_state.json.
    Written aside, synced, renamed: whoever sees the name sees a whole checkpoint.  All ranks help to put the tensors
    together; the main one writes.  Raises OSError, and leaves nothing behind, if it cannot be written."""
    final = os.path.join(config.output_dir, f"checkpoint_iter_{iteration}")
    aside = os.path.join(config.output_dir, f".checkpoint_iter_{iteration}")
    weights, head_weights = (fsdp.full_state(fsdp.state_of(module), ranks) for module in (model, head))
    # By parameter name, not by number or rank: the moments outlive a change in the number of ranks.
    moments = {}
    for optimizer, module, kind in zip(optimizers, (model, head), ("policy", "value")):
        for name, parameter in module.named_parameters():
            for key, tensor in optimizer.state.get(parameter, {}).items():
                moments[f"{kind}.{name}.{key}"] = tensor
    moments = fsdp.full_state(moments, ranks)
    if not ranks.is_main:
        return final
    try:
        os.makedirs(aside)
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        save_file(head_weights, os.path.join(aside, "value.safetensors"))
        save_file(moments, os.path.join(aside, "optimizer.safetensors"))
        names = sorted(os.listdir(aside))
        manifest = {name: fingerprint(os.path.join(aside, name)) for name in names}
        state = {"iteration": iteration, **progress, "files": manifest, "config": dataclasses.asdict(config)}
        evaluation.write(os.path.join(aside, "trainer_state.json"), json.dumps(state, indent=1))
        for path in (*(os.path.join(aside, name) for name in names), aside):
            sync(path)
        os.rename(aside, final)
        sync(config.output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{final} cannot be written ({error})") from None
    for old in checkpoints(config.output_dir)[: -config.keep_checkpoints]:
        discard(old)
    return final


def read_state(folder):
    """trainer_state.json of a checkpoint after checking that every file it names is there and whole."""
    path = os.path.join(folder, "trainer_state.json")
    if not os.path.isfile(path):
        raise ValueError(f"{folder} is not a complete checkpoint: trainer_state.json is missing")
    try:
        with open(path) as file:
            state = json.load(file)
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in state["files"].items()}
        dict(state["config"]), state["iteration"] + state["model_tokens"] + state["seconds"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from None
    for name, (size, checksum) in files.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise ValueError(f"{folder} is not a complete checkpoint: {name} is missing")
        if os.path.getsize(path) != size:
            raise ValueError(f"{folder}: {name} is damaged ({os.path.getsize(path)} bytes, not {size})")
        if fingerprint(path)["sha256"] != checksum:
            raise ValueError(f"{folder}: {name} is damaged (its checksum is not the one written)")
    return state


def restore(folder, model, head, optimizers):
    """Both optimisers' states by parameter name; the model and the head were loaded from the folder before."""
    with safe_open(os.path.join(folder, "optimizer.safetensors"), "pt") as moments:  # one tensor at a time
        for optimizer, module, kind in zip(optimizers, (model, head), ("policy", "value")):
            parameters = dict(module.named_parameters())
            for full_name in (name for name in moments.keys() if name.startswith(kind + ".")):
                name, _, key = full_name.removeprefix(kind + ".").rpartition(".")
                tensor, parameter = moments.get_tensor(full_name), parameters.get(name)
                if parameter is None or (key != "step" and tensor.shape != parameter.shape):
                    raise ValueError(f"{folder}: the optimiser state of {name} is of another model size")
                optimizer.state[parameter][key] = tensor if key == "step" else fsdp.placed(tensor, parameter)


def check_same_run(config, saved, folder):
    """Raise ValueError if a flag that shapes the run is not the one the checkpoint was made with."""
    for name, x in (dataclasses.asdict(Config()) | saved).items():  # a flag younger than the checkpoint was at its default
        free = name in FREE_ON_RESUME and not (name == "model" and config.loss == "apo")  # apo's pi_ref is the base
        given, flag_name = getattr(config, name, x), name.replace("_", "-")
        if not free and given != x:
            raise ValueError(f"--{flag_name} {given} differs from the {x} that {folder} was trained with")


class Signals:
    """Signals that end the run, held until the loop asks: an iteration happens whole or not at all.

    SIGTERM, a preempting scheduler's, waits for the end of the iteration.  Ctrl-C waits only within `update`, unless
    other ranks would be left waiting: then to the end of the iteration too.
    """

    def __init__(self, ranks):
        self.received, self.ranks = [], ranks
        held = (signal.SIGTERM,) if ranks.world_size == 1 else (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self._hold) for number in held}

    def _hold(self, number, frame):
        self.received.append(number)

    @contextlib.contextmanager
    def update(self):
        """Around what must happen whole: Ctrl-C waits until its end.  Raises KeyboardInterrupt then (one process)."""
        before = signal.signal(signal.SIGINT, self._hold)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self.ranks.world_size == 1 and signal.SIGINT in self.received:
            raise KeyboardInterrupt

    def any_rank(self):
        """The first signal that any rank has received, or None.  A collective."""
        told = fsdp.everyone([int(number) for number in self.received], self.ranks)
        return next((number for numbers in told for number in numbers), None)

    def restore(self):
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ================================================================================================ the phases


def load_everything(config, source, reward, ranks):
    """What a run needs besides the optimisers: (model, tokenizer, value head, base model for apo or None, problems of
    --train-file or None, evaluation problems).  Raises ValueError with the first thing that is wrong."""
    read = functools.partial(data.read_problems, any_answer=bool(config.reward))
    train_file = read(config.train_file) if config.train_file else None
    if config.eval_file:
        eval_set = read(config.eval_file)[: config.eval_problems]
    else:
        eval_set = data.eval_problems(config.eval_problems, config.digits, config.prompt)
    # A model to be sharded is loaded on the CPU; each block moves to the device when it is split.
    device = ranks.device if ranks.mesh is None else "cpu"
    model, tokenizer = policy.load_policy(
        source or config.model, torch.float32, device, config.gradient_checkpointing == "on", config.freeze_blocks
    )
    astar_search.check_model(model)
    examples = train_file or [data.train_problem(config.seed, 0, i, config.digits, config.prompt) for i in range(64)]
    for problem in (examples[0], eval_set[0]):  # a reward of one's own may fail: now, and not after hours
        for text in ("", f"<answer>{problem.answer}</answer>"):
            reward.judge(problem, problem.prefill + text)
    longest = max(map(len, evaluation.encode(tokenizer, examples + eval_set)))
    policy.check_context(model, longest, config.max_new_tokens)
    check_possible(config, model.get_output_embeddings().weight.shape[0])
    torch.manual_seed(config.seed)  # the first layer of the value head; nothing else is drawn from torch
    head = value_module.ValueHead(model.config.get_text_config().hidden_size)
    if source:
        try:
            head.load_state_dict(load_file(os.path.join(source, "value.safetensors")))
        except RuntimeError:
            raise ValueError(f"{source}: its value head is of another model size") from None
    base = None
    if config.loss == "apo":  # pi_ref: the base as it was before any training
        base = policy.load_policy(config.model, torch.float32, device)[0].requires_grad_(False)
    return model, tokenizer, head, base, train_file, eval_set


def draw_problems(config, iteration, ranks, from_file):
    """This rank's share of the iteration's problems, and their global numbers."""
    indices = list(fsdp.share(config.problems_per_iteration, ranks))
    if from_file:
        n = config.problems_per_iteration  # iterations count from 1, the epochs of a file from 0
        chosen = [data.pick_problem(from_file, config.seed, iteration - 1, i, n) for i in indices]
    else:
        chosen = [data.train_problem(config.seed, iteration, i, config.digits, config.prompt) for i in indices]
    return chosen, indices


def make_rollouts(model, tokenizer, problems, keys, config, reward, value, kind, K):
    """Search or sample completions for problems, `rollout_batch` of them in lock-step.  Returns one Rollouts."""
    cover = config.cover if config.cover < 1 else math.inf
    parts = []
    for start in range(0, max(1, len(problems)), config.rollout_batch):  # a rank may have no problems: no rollouts then
        chunk = slice(start, start + config.rollout_batch)
        done = evaluation.is_right(tokenizer, problems[chunk], reward, config.max_new_tokens)
        options = astar_search.Options(
            policy.stop_tokens(model, tokenizer), K=K, tau=config.tau, width=config.width, max_new_tokens=config.max_new_tokens,
            max_nodes=config.max_nodes, max_open=config.max_open, cover=cover, done=done if config.until_right == "on" else None,
        )  # fmt: skip
        expander = astar_search.Expander(
            model, evaluation.encode(tokenizer, problems[chunk]), config.max_new_tokens, value
        )
        trees = (astar_search.search if kind == "astar" else astar_search.sample)(keys[chunk], expander, options)
        part = astar_search.collect(trees, expander)
        part.problem += start
        parts.append(part)
    return astar_search.join(parts)


def reference_values(reference, tokenizer, problems, reward, config):
    """apo: V*(x) of each problem (N,) from samples of the base."""
    _, verdicts = evaluation.judge(reference, tokenizer, problems, reward, config.max_new_tokens)
    rewards = torch.tensor([verdict["reward"] for verdict in verdicts])
    drawn = rewards.repeat_interleave(reference.count).view(len(problems), config.apo_samples)  # problem by problem
    return policy.optimal_value(drawn, config.beta1)


def learning_rate_scale(config, iteration):
    """Linear warm-up, then a cosine down to final_rate; iteration counts from 1."""
    if iteration <= config.warmup:
        return iteration / config.warmup
    progress = (iteration - config.warmup) / max(1, config.iterations - config.warmup)
    return config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def minibatches_of(rollouts, indices, config, iteration, epoch):
    """This rank's micro-batches of each minibatch: [[rows, ...], ...].

    Problems are dealt by their global number, `indices`, in an order fixed by (seed, iteration, epoch): a minibatch is
    the same on any number of ranks, and a rank's part of it may be empty.  Micro-batches go by length, the longest at
    most a quarter longer than the shortest, so that little is padding; their number and order change nothing.
    """
    N = config.problems_per_iteration
    order = list(range(N))
    random.Random(f"order {config.seed} {iteration} {epoch}").shuffle(order)
    part_of = {p: i * config.minibatches // N for i, p in enumerate(order)}
    parts = torch.tensor([part_of[indices[row]] for row in rollouts.problem.tolist()], dtype=torch.int64)
    dealt, length = [], rollouts.length.tolist()
    for minibatch in range(config.minibatches):
        rows = torch.nonzero(parts == minibatch).squeeze(1)
        micro_batches = []
        for row in rows[rollouts.length[rows].argsort(stable=True)].tolist():
            last = micro_batches[-1] if micro_batches else []
            if not last or len(last) == config.micro_batch or length[row] > 1.25 * length[last[0]]:
                micro_batches.append(last := [])
            last.append(row)
        dealt.append(list(map(torch.tensor, micro_batches)))
    return dealt


@torch.no_grad()
def score_all(model, rollouts, micro_batches, device):
    """log pi (B, T-1) of rollouts under a model by the forward that training uses, in these micro-batches."""
    logprobs = torch.zeros_like(rollouts.logprobs)
    for rows in micro_batches:
        part = rollouts.select(rows, device)
        logp, _, _ = policy.score(model, part.tokens, part.mask)
        logprobs[rows, : logp.shape[1]] = logp.cpu()
    return logprobs


def credit(rollouts, verdicts, reward, config):
    """What the losses need of each leaf: {rewards, soft_targets, leaf_weight (B,), advantages (B, T-1)}."""
    rewards, mask = torch.tensor([verdict["reward"] for verdict in verdicts]), rollouts.mask
    soft_targets = value_module.soft_target(rewards, *reward.bounds, config.beta)
    counted = rollouts.weight if config.leaf_weights == "on" else rollouts.count.float()
    leaf_weight = policy.normalise_weights(counted, rollouts.problem)
    if config.loss == "grpo":
        advantages = policy.grpo_advantages(rewards, leaf_weight, rollouts.problem)[:, None] * mask
    elif config.loss == "em":
        advantages = policy.em_advantages(soft_targets, leaf_weight, rollouts.problem)[:, None] * mask
    else:
        advantages = value_module.gae(rewards, rollouts.values, mask, config.gae_lambda)
    return {"rewards": rewards, "soft_targets": soft_targets, "leaf_weight": leaf_weight, "advantages": advantages}


def losses(score, head, part, config, token_total, leaf_total):
    """Policy and value loss of one micro-batch of rollouts, on its device: (loss, metrics), both sums over the
    micro-batch divided by totals of the whole minibatch, so that micro-batches and ranks add up."""
    mask, extra = part.mask, part.extra
    token_weights = extra["leaf_weight"][:, None] * mask / token_total
    logp, entropy, hidden = score(part.tokens, mask)
    if config.loss == "apo":
        leaf_weights = extra["leaf_weight"] / leaf_total
        policy_loss, metrics = policy.apo_loss(
            logp, extra["ref_logprobs"], mask, extra["rewards"], extra["optimal_value"], config.beta2, leaf_weights
        )
    else:
        policy_loss, metrics = policy.ppo_loss(
            logp, part.logprobs, extra["advantages"], entropy, token_weights, config.clip, config.entropy_coef
        )
    metrics |= policy.ratio_metrics(logp, part.logprobs, entropy, token_weights, config.clip)
    V, u_logit = head(hidden)
    returns = value_module.monte_carlo_returns(extra["rewards"], mask)
    targets = value_module.monte_carlo_returns(extra["soft_targets"], mask)
    value_loss, value_metrics = value_module.value_loss(V, u_logit, returns, targets, token_weights)
    return policy_loss + value_loss, metrics | value_metrics


def idle_loss(score, head, device):
    """Zero, by way of every weight: a rank with fewer micro-batches than another still joins the gathering of weights
    and the adding up of gradients, which wait for all ranks."""
    tokens, mask = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    logp, _, hidden = score(tokens.to(device), mask.to(device))
    return 0.0 * (logp.sum() + sum(out.sum() for out in head(hidden)))


def update(model, score, head, optimizers, rollouts, indices, config, iteration, ranks):
    """Passes of the loss over one batch of rollouts, an optimiser step a minibatch.

    score(tokens, mask): policy.score of the model, through FSDP's hooks.  indices: global numbers of this rank's
    problems.  rollouts.extra holds `rewards`, `soft_targets`, `leaf_weight` (B,), `advantages` (B, T-1), and for apo
    `optimal_value` (B,), `ref_logprobs` (B, T-1).  Returns metrics, averaged over the steps, the same on all ranks.  Raises
    FloatingPointError at a NaN, before the step that would spread it.
    """
    for optimizer, rate in zip(optimizers, (config.learning_rate, config.value_learning_rate)):
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_scale(config, iteration)
    steps = []  # metrics of each optimiser step
    model.train()
    for epoch in range(config.epochs):
        for micro_batches in minibatches_of(rollouts, indices, config, iteration, epoch):
            # What the weights are divided by, counted once, over all ranks, before the first backward.
            weight = rollouts.extra["leaf_weight"]
            rows = torch.cat([torch.zeros(0, dtype=torch.int64), *micro_batches])
            tokens = weight[rows, None] * rollouts.mask[rows]
            counts = fsdp.total({"tokens": tokens.sum().item(), "leaves": weight[rows].sum().item()}, ranks)
            if counts["tokens"] == 0:
                continue  # no search of this minibatch found a leaf, on any rank
            sums = {}
            for i in range(max(fsdp.everyone(len(micro_batches), ranks))):
                if i < len(micro_batches):
                    part = rollouts.select(micro_batches[i], ranks.device)
                    loss, metrics = losses(score, head, part, config, counts["tokens"], counts["leaves"])
                else:
                    loss, metrics = idle_loss(score, head, ranks.device), {}
                # FSDP averages gradients over ranks; these losses are parts of a sum.
                (loss * ranks.world_size).backward()
                for name, x in metrics.items():
                    sums[name] = sums.get(name, 0.0) + x
            values = torch.stack(list(sums.values())).tolist() if sums else []  # one copy from the device
            measured = fsdp.total(dict(zip(sums, values)), ranks)
            clip = lambda optimizer: torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.grad_clip)
            measured["grad_norm"], _ = (fsdp.whole(clip(optimizer)).item() for optimizer in optimizers)
            for name, x in measured.items():
                if not math.isfinite(x):
                    raise FloatingPointError(f"iteration {iteration}: {name} is {x}")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            steps.append(measured)
    model.eval()
    means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    return means | {"first_kl": steps[0]["approx_kl"]}  # before any step: pi_theta is still pi_old


def summarise(rollouts, texts, verdicts, problems, ranks):
    """What one batch of rollouts says about the policy, over all ranks: means weighted by leaf, hence estimates under pi."""
    weight, mask, stats = rollouts.extra["leaf_weight"], rollouts.mask, rollouts.stats
    add = lambda x: (weight * torch.as_tensor(x, dtype=torch.float32)).sum().item()
    correct = [verdict["correct"] for verdict in verdicts]
    distinct = {(p, text) for p, text, right in zip(rollouts.problem.tolist(), texts, correct) if right}
    means = {
        "reward_mean": add(rollouts.extra["rewards"]),
        "rollout_accuracy": add(correct),
        "unique_correct": len(distinct),
        "leaves": len(rollouts),
        "mass": stats["mass"],
        "truncated": add(rollouts.truncated),
        "completion_length": add(rollouts.length - rollouts.prompt_length),
    }
    returns = value_module.monte_carlo_returns(rollouts.extra["rewards"], mask)
    moments = policy.moments(rollouts.values, returns, weight[:, None] * mask)
    counts = {name: stats[name] for name in ("model_tokens", "forwards", "pruned")}
    n = fsdp.total({"problems": len(problems)}, ranks)["problems"]
    means = {name: x / n for name, x in fsdp.total(means, ranks).items()}
    means["explained_variance"] = policy.explained_variance(fsdp.total(moments, ranks))
    return means | fsdp.total(counts, ranks) | {"stopped": fsdp.total(stats["stopped"], ranks)}


def some_samples(config, iteration, indices, rollouts, texts, verdicts, problems, ranks):
    """Rows for samples.jsonl: one leaf of each of a few problems, chosen by (seed, iteration), wherever they are."""
    N = config.problems_per_iteration
    chosen = random.Random(f"samples {config.seed} {iteration}").sample(range(N), min(config.samples, N))
    rows = {}
    for p, index in enumerate(indices):
        own = torch.nonzero(rollouts.problem == p).squeeze(1).tolist()
        if index in chosen and own:
            i = random.Random(f"leaf {config.seed} {iteration} {index}").choice(own)
            row = {"iteration": iteration, "prompt": problems[p].prompt, "completion": texts[i], "truth": problems[p].answer}
            numbers = {"weight": rollouts.extra["leaf_weight"][i], "log_pi": rollouts.log_pi[i], "f": rollouts.f[i]}
            rows[index] = row | verdicts[i] | {name: x.item() for name, x in numbers.items()}
    told = {int(index): row for part in fsdp.everyone(rows, ranks) for index, row in part.items()}
    return [told[index] for index in chosen if index in told]


def what_failed(error, ranks):
    """One sentence for an exception that is not a mistake in the code; "" for one that is."""
    rank = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
    if isinstance(error, torch.OutOfMemoryError):
        return f"{rank}{ranks.device} is out of memory: lower --micro-batch, --rollout-batch or --max-nodes (--dry-run says what needs what)"
    outside = (FloatingPointError, LookupError, OSError, reward_module.RewardError)
    if isinstance(error, outside) and not isinstance(error, (KeyError, IndexError)):
        return f"{rank}{error}"
    if ranks.world_size > 1 and isinstance(error, RuntimeError) and fsdp.lost_peer(error):
        return f"{rank}another rank has ended, and its own message says why"
    return ""


def other_logs(config, first):
    """Where the rows of metrics.jsonl go too, from iteration `first`: a list of functions of (numbers by name, iteration)."""
    logs = []
    if config.wandb:
        import wandb

        try:
            logs.append(wandb.init(project="apo", name=config.output_dir, config=dataclasses.asdict(config)).log)
        except Exception as error:  # nobody is logged in, no network
            raise ValueError(f"--wandb: {' '.join(str(error).split())}") from None
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        # Opened by the first row, when the folder is ours.  A resumed run takes back what lies after its checkpoint.
        writer = functools.cache(lambda: SummaryWriter(config.output_dir, purge_step=first))
        logs.append(lambda row, n: [*(writer().add_scalar(name, x, n) for name, x in row.items()), writer().flush()])
    return logs


SHOWN = (  # of a row of metrics.jsonl on the terminal: word, name, format
    ("accuracy", "rollout_accuracy", ".3f"), ("reward", "reward_mean", "+.2f"), ("length", "completion_length", "5.1f"),
    ("leaves", "leaves", ".1f"), ("kl", "approx_kl", ".4f"), ("clip", "clip_fraction", ".2f"),
    ("entropy", "entropy", ".2f"), ("tokens", "model_tokens", ",d"), ("seconds", "seconds", ".0f"),
)  # fmt: skip


class Clock:
    """Wall seconds of the run, over all its resumes, and of each phase of this process."""

    def __init__(self, before):
        self.start, self.phases = time.perf_counter() - before, {}

    def seconds(self):
        """Wall seconds of the run so far."""
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def phase(self, name):
        """Add the seconds spent inside to those of the phase `name`."""
        start = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start


# ============================================================================================== memory, on paper


def memory(config, model, prompt, activations, world_size, offload):
    """What a rank needs, in bytes by name, and the peaks on the GPU: "rollouts" and "update"; "host" for the offload.

    model: its outline (policy.outline); prompt: tokens of a prompt; activations: policy.activation_bytes.  An upper
    bound where the run decides: every search uses all of --max-nodes, and every completion is of full length.
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
    need["search"] = capacity * (1.5 * 8 * span + c * D) + nodes * (80 * V + 3 * kv * span)

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
    model = policy.outline(config.model, config.freeze_blocks)
    problems = data.eval_problems(64, config.digits, config.prompt)
    try:
        prompt = max(map(len, evaluation.encode(policy.load_tokenizer(config.model), problems)))
        known = "the longest of 64 problems"
    except ValueError:
        prompt = max(len(problem.prompt) for problem in problems) // 3
        known = "no tokenizer: taken as 3 characters a token"
    policy.check_context(model, prompt, config.max_new_tokens)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    activations = policy.activation_bytes(model, dtype)
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


# ===================================================================================================== the loop


def main(argv=None):
    config, args, refuse = parse(argv)
    if args.dry_run:
        try:
            return dry_run(config, args.gpu_memory)
        except (ValueError, OSError) as error:
            refuse(str(error))

    # ------------------------------------------------------------------ set-up: all that can be wrong is said here
    ranks = None
    try:
        reward = reward_module.load(config.reward, config.format_bonus, config.length_penalty)
        bf16 = config.mixed_precision == "bf16"
        ranks = fsdp.start(config.distributed, config.device, sharded=bf16 or config.cpu_offload)
        if config.cpu_offload and ranks.device.type == "cpu":
            raise ValueError("--cpu-offload: the weights are on the CPU already, this flag is for GPUs")
        on_main = lambda function: fsdp.agree(lambda: function() if ranks.is_main else None, ranks)
        source, state = fsdp.everyone(on_main(lambda: find_start(config, args)), ranks)[0]
        loaded = fsdp.agree(lambda: load_everything(config, source, reward, ranks), ranks)
        model, tokenizer, head, base, train_file, eval_set = loaded
        if state.get("reward_bounds", [*reward.bounds]) != [*reward.bounds]:
            raise ValueError(f"--reward: its bounds are not the {state['reward_bounds']} that {source} was trained with")
        shard = functools.partial(fsdp.shard, ranks=ranks, offload=config.cpu_offload)
        model, head = shard(model, blocks=policy.blocks_of(model), mixed_precision=bf16), shard(head)
        base = base and shard(base, blocks=policy.blocks_of(base), mixed_precision=bf16)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers = [
            torch.optim.AdamW(trainable, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay),
            torch.optim.AdamW(head.parameters(), lr=config.value_learning_rate, weight_decay=config.weight_decay),
        ]
        if source:
            fsdp.agree(lambda: restore(source, model, head, optimizers), ranks)
        others = on_main(lambda: [] if args.eval_only else other_logs(config, state["iteration"] + bool(source))) or []
    except (ValueError, OSError) as error:
        refuse(str(error)) if ranks is None or ranks.is_main else sys.exit(2)
    score = fsdp.through(model, policy.score)
    value = evaluation.guide(head, reward.bounds, config.beta, config.guide == "head")

    def evaluate():
        with fsdp.gathered(model, head):
            return evaluation.evaluate(
                model, tokenizer, eval_set, reward, ranks, decode=config.eval_decode, value=value, n=config.rollouts_per_problem,
                max_new_tokens=config.max_new_tokens, width=config.width, max_nodes=config.max_nodes, batch=config.rollout_batch,
            )[0]  # fmt: skip

    say = print if ranks.is_main else lambda *words, **where: None
    if args.eval_only:
        say(evaluation.report(evaluate()))
        return fsdp.stop(ranks)

    # ------------------------------------------------------------------------------------------------ first words
    try:
        lock = on_main(lambda: open_output(config, source, state["iteration"]))
    except (ValueError, OSError) as error:
        refuse(f"--output-dir {config.output_dir}: {error}") if ranks.is_main else sys.exit(2)
    metrics_path, samples_path = (os.path.join(config.output_dir, name) for name in ("metrics.jsonl", "samples.jsonl"))
    log = append if ranks.is_main else lambda path, rows: None
    clock, iteration, model_tokens, evaluated = Clock(state["seconds"]), state["iteration"], state["model_tokens"], {}
    size = lambda parameters: f"{sum(parameter.numel() for parameter in parameters):,}"
    say(f"{config.model}: {size(model.parameters())} parameters, {size(trainable)} trained; value head {size(head.parameters())}")
    say(f"{config.rollout}, {config.problems_per_iteration} problems x at most {config.rollouts_per_problem}; loss {config.loss}")
    say(f"on {ranks.device}, {ranks.world_size} rank{'s' * (ranks.world_size > 1)} of {torch.get_num_threads()} threads; "
        f"{len(eval_set)} held-out problems; writing to {config.output_dir}")  # fmt: skip

    def evaluate_into(row):
        with clock.phase("evaluation"):
            result = evaluate()
        evaluated[row["iteration"]] = result["accuracy"]
        bar.set_description(f"eval {result['accuracy']:.3f}")
        row |= {f"eval_{name}": result[name] for name in ("accuracy", "format", "accuracy_by_difficulty")}
        row |= {"eval_length": result["completion_length"], "seconds": clock.seconds()}

    def record(row):
        log(metrics_path, [row])
        nested = {f"{name}/{key}": x for name, part in row.items() if isinstance(part, dict) for key, x in part.items()}
        for other in others:
            other({name: x for name, x in (row | nested).items() if isinstance(x, (int, float))}, row["iteration"])

    def keep():
        with clock.phase("checkpoint"):
            progress = {"model_tokens": model_tokens, "seconds": clock.seconds(), "reward_bounds": reward.bounds}
            return save_checkpoint(config, iteration, model, tokenizer, head, optimizers, progress, ranks)

    gc.freeze()  # what is here stays: Python's collector, which the nodes of a search wake often, need not look at it
    bar = tqdm(total=config.iterations, initial=iteration, unit="iteration", disable=None if ranks.is_main else True)
    saved, stopped, failure, signals = source, None, "", Signals(ranks)
    try:
        if source:
            say(f"resumed from {source}, after iteration {iteration}")
        else:
            if config.resume:
                say(f"--resume auto: no checkpoint in {config.output_dir} yet, so this is the beginning")
            row = {"iteration": 0, "seconds": 0.0, "model_tokens": 0}
            evaluate_into(row)
            record(row)
            say(f"before training: {config.eval_decode} accuracy {row['eval_accuracy']:.3f}, format {row['eval_format']:.3f}")

        stopped = signals.any_rank()
        while iteration < config.iterations and not stopped:
            n = iteration + 1

            # ------------------------------------------------------------------ 1. rollouts: A* search, or sampling
            problems, indices = draw_problems(config, n, ranks, train_file)
            keys = astar_search.root_keys(config.seed, n, indices)
            search_for = functools.partial(
                make_rollouts, tokenizer=tokenizer, problems=problems, keys=keys, config=config, reward=reward
            )
            with clock.phase("rollouts"), fsdp.gathered(model, head):
                rollouts = search_for(model, value=value, kind=config.rollout, K=config.rollouts_per_problem)

            # ------------------------------------------------------------------------------------------ 2. rewards
            texts, verdicts = evaluation.judge(rollouts, tokenizer, problems, reward, config.max_new_tokens)

            # ------------------------------------------------------------------- 3. leaf weights and advantages
            rollouts.extra = credit(rollouts, verdicts, reward, config)
            learned = summarise(rollouts, texts, verdicts, problems, ranks)
            if learned["leaves"] == 0:
                raise LookupError(f"iteration {n}: no search found a completion within --max-nodes {config.max_nodes}")
            spent = learned.pop("model_tokens")
            if base is not None or bf16:  # the micro-batches of the first epoch, to score as training will
                batches = [rows for minibatch in minibatches_of(rollouts, indices, config, n, 0) for rows in minibatch]
            if base is not None:  # apo: V*(x) from samples of the base; their tokens count
                with clock.phase("rollouts"), fsdp.gathered(base):
                    reference = search_for(base, value=None, kind="sample", K=config.apo_samples)
                    ref_logprobs = score_all(base, rollouts, batches, ranks.device)
                spent += fsdp.total({"tokens": reference.stats["model_tokens"]}, ranks)["tokens"]
                optimal = reference_values(reference, tokenizer, problems, reward, config)
                rollouts.extra |= {"optimal_value": optimal[rollouts.problem], "ref_logprobs": ref_logprobs}
            if bf16:  # pi_old by the forward of training: bfloat16 rounds the search's otherwise, and the ratio must be 1
                with clock.phase("update"), fsdp.gathered(model):
                    rollouts.logprobs = score_all(model, rollouts, batches, ranks.device)

            with signals.update():
                # ----------------------------------------------------------------------------------- 4. the update
                with clock.phase("update"):
                    learned |= update(model, score, head, optimizers, rollouts, indices, config, n, ranks)
                iteration, model_tokens = n, model_tokens + spent

                # -------------------------------------------------------------------------------------- 5. the log
                row = {"iteration": n, "seconds": clock.seconds(), "model_tokens": model_tokens} | learned
                row["learning_rate"] = config.learning_rate * learning_rate_scale(config, n)
                if n % config.eval_every == 0 or n == config.iterations:
                    evaluate_into(row)
                record(row)
                log(samples_path, some_samples(config, n, indices, rollouts, texts, verdicts, problems, ranks))
                line = f"{n:4d}/{config.iterations}" + "".join(f"  {word} {row[name]:{form}}" for word, name, form in SHOWN)
                if ranks.is_main:
                    tqdm.write(line + (f"  | eval {row['eval_accuracy']:.3f}" if "eval_accuracy" in row else ""))
                    sys.stdout.flush()
                bar.set_postfix_str(f"accuracy {row['rollout_accuracy']:.3f}")
                bar.update()

                # --------------------------------------------------------------------------------- 6. the checkpoint
                stopped = signals.any_rank()
                if n % config.checkpoint_every == 0 or n == config.iterations or stopped:
                    saved = keep()
    except KeyboardInterrupt:  # one process: the iteration that it broke into is dropped
        stopped = signal.SIGINT
    except Exception as error:
        failure = what_failed(error, ranks)
        if not failure:
            raise  # a mistake of ours: its traceback is wanted
    finally:
        bar.close()
        signals.restore()
        if stopped and not failure and iteration > 0 and not saved.endswith(f"checkpoint_iter_{iteration}"):
            try:
                saved = keep()
            except OSError as error:
                failure = what_failed(error, ranks)
        if ranks.is_main:
            os.close(lock)

    # ------------------------------------------------------------------------------------------------- last words
    if failure:
        print(f"train.py: stopped: {failure}; the last good checkpoint is {saved or 'none'}", file=sys.stderr)
        sys.exit(1)
    if stopped and iteration < config.iterations:
        go_on = f"go on from {saved} with the same flags and --resume auto" if saved else "there is nothing to keep yet"
        name = "Ctrl-C" if stopped == signal.SIGINT else "SIGTERM"
        say(f"train.py: stopped by {name} after iteration {iteration}; {go_on}", file=sys.stderr)
        status = 0 if stopped == signal.SIGTERM else 130
        fsdp.stop(ranks, status)
        sys.exit(status)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    if ranks.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    phases = ", ".join(f"{name} {t:.0f} s" for name, t in clock.phases.items())
    curve = ", ".join(f"{accuracy:.3f} after {i}" for i, accuracy in evaluated.items())
    say(f"\n{config.eval_decode} accuracy on {len(eval_set)} held-out problems: {curve}")
    say(f"{model_tokens:,} model tokens in {clock.seconds():.0f} s ({phases}); peak memory of a rank {memory:.2f} GiB")
    say(f"metrics: {metrics_path}   rollouts: {samples_path}   model: {saved}")
    fsdp.stop(ranks)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("train.py: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except reward_module.RewardError as error:  # of --eval-only
        sys.exit(f"train.py: {error}")
