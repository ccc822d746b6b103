"""train.py -- A*PO, top to bottom: reinforcement learning of a base language model with A* search rollouts.

    problems -> A* search over KV-cached prefixes -> Rollouts -> reward -> advantages -> PPO-clip and value loss

    python train.py                                   # the tiny base on a CPU (or GPU), no download
    python train.py --rollout sample                  # the same with i.i.d. sampling: the baseline
    python train.py --config training                 # Qwen2.5-3B
    python train.py --resume auto                     # go on after a stop
    python train.py --eval-only --checkpoint runs/local/checkpoint_iter_90

The loop is `main()`, one phase after the other.  Above it are the flags and the files a run writes.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field

import torch
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
    format_bonus: float = flag(0.1, "added to the reward of a well-formed completion", low=0)
    length_penalty: float = flag(0.0, "taken off the reward of a completion of full length, in proportion", low=0)
    # rollouts
    rollout: str = flag("astar", "A* search, or i.i.d. sampling", choices=("astar", "sample"))
    problems_per_iteration: int = flag(256, "problems an iteration", low=1)
    rollouts_per_problem: int = flag(8, "K: leaves a search may accept, or completions sampled", low=1)
    tau: float = flag(1.0, "0: plain A*;  1: Gumbel search, draws without replacement", low=0, high=1)
    beta: float = flag(0.2, "temperature of the soft value h", above=0)
    guide: str = flag("head", "h of the search: the value head's, or 0", choices=("head", "none"))
    cover: float = flag(0.8, "a problem is done when its leaves hold this much of pi; 1 for never", above=0, high=1)
    leaf_weights: str = flag("on", "weigh leaves by pi/q in all losses", choices=("on", "off"))
    max_new_tokens: int = flag(48, "longest completion in tokens", low=1)
    max_nodes: int = flag(1024, "most nodes a search may expand for one problem", low=1)
    max_open: int = flag(65536, "longest queue of a search; beyond it the worst entries are dropped (a beam)", low=1)
    width: int = flag(2, "nodes of one problem that a round may run at once", low=1)
    rollout_batch: int = flag(256, "problems searched in lock-step", low=1)
    # losses
    loss: str = flag("ppo", "policy loss", choices=("ppo", "grpo", "apo"))
    gae_lambda: float = flag(0.95, "lambda of GAE", low=0, high=1)
    clip: float = flag(0.2, "epsilon of PPO's clip (ppo, grpo)", above=0)
    entropy_coef: float = flag(0.0, "weight of the entropy bonus (ppo, grpo)", low=0)
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
    # the run
    seed: int = flag(0, "of problems, noise and order; the same seed gives the same run", low=0, high=2**31)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    distributed: bool = flag(False, "shard over the ranks that torchrun started")
    output_dir: str = flag("runs/local", "where everything is written")
    eval_every: int = flag(10, "iterations between evaluations; there is one before the first and at the end", low=1)
    eval_problems: int = flag(500, "held-out problems of an evaluation", low=1)
    eval_decode: str = flag("greedy", "how they are decoded", choices=("greedy", "sample", "astar"))
    checkpoint_every: int = flag(10, "iterations between checkpoints (there is one at the end)", low=1)
    keep_checkpoints: int = flag(2, "older checkpoints than the newest n are removed", low=1)
    samples: int = flag(4, "rollouts an iteration written to samples.jsonl", low=0)
    resume: str = flag("", "auto: from the newest checkpoint of the output folder; or a checkpoint folder")
    overwrite: bool = flag(False, "remove the run that the output folder holds")


PRESETS = {
    "local": {},
    "training": dict(
        model="Qwen/Qwen2.5-3B", prompt="tinyzero", digits="2-3", output_dir="runs/training", max_new_tokens=1024,
        max_nodes=16384, iterations=200, learning_rate=1e-6, value_learning_rate=1e-4, warmup=10, micro_batch=4,
        gradient_checkpointing="on", problems_per_iteration=128, rollout_batch=32, cover=0.9,
    ),
}  # fmt: skip
# May differ between a run and its continuation.  More iterations stretch the cosine of the learning rate.
FREE_ON_RESUME = set(
    "iterations device distributed output_dir eval_every checkpoint_every keep_checkpoints samples resume overwrite "
    "micro_batch model rollout_batch".split()
)


def parse(argv):
    """argv -> (Config, args, refuse).  Anything wrong is one sentence on stderr and exit status 2."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = evaluation.OneSentence("train.py", description=__doc__, allow_abbrev=False, formatter_class=raw)
    parser.add_argument("--config", choices=tuple(PRESETS), default="local", help="preset; flags change it")
    parser.add_argument("--eval-only", action="store_true", help="evaluate --checkpoint and exit")
    parser.add_argument("--checkpoint", help="checkpoint folder for --eval-only")
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
        for bound, fails, words in (
            ("low", lambda b: x < b, "at least"),
            ("high", lambda b: x > b, "at most"),
            ("above", lambda b: x <= b, "above"),
        ):
            b = f.metadata[bound]
            if b is not None and fails(b):
                raise ValueError(f"{name} must be {words} {b}, not {x}")
    data.parse_digits(config.digits)
    reward_module.Reward(config.format_bonus, config.length_penalty)
    if config.minibatches > config.problems_per_iteration:
        raise ValueError(
            f"--minibatches {config.minibatches} is more than --problems-per-iteration {config.problems_per_iteration}"
        )
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
    """Complete checkpoint folders, oldest first: a folder gets its name only when everything is in it."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [name for name in names if name.startswith("checkpoint_iter_") and name.rpartition("_")[2].isdigit()]
    return [os.path.join(folder, name) for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]


def inspect_output(config):
    """The checkpoint to resume from, or None; raises ValueError if the output folder cannot be used.  Changes nothing."""
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
        return config.resume
    if config.resume == "auto" and found:
        return found[-1]
    if (held or found) and not (config.overwrite or config.resume):
        raise ValueError(
            f"--output-dir {folder} holds another run: add --resume auto, --overwrite or another --output-dir"
        )
    return None


def open_output(config, iteration):
    """Make the output folder ready to go on after `iteration`: a new run starts empty, a resumed one is cut back."""
    folder = config.output_dir
    os.makedirs(folder, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = os.path.join(folder, name)
        if iteration > 0:
            cut_back(path, iteration)
        elif os.path.exists(path):
            os.remove(path)
    for path in checkpoints(folder):  # of a run that went further: they would be taken for this one's
        if int(path.rpartition("_")[2]) > iteration:
            shutil.rmtree(path)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(dataclasses.asdict(config), file, indent=1)


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path):
    """Make a file or folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save_checkpoint(config, iteration, model, tokenizer, head, optimizers, progress):
    """OUTPUT/checkpoint_iter_N: a Hugging Face folder plus value.safetensors, optimizer.safetensors, trainer_state.json.
    Written under another name, synced, then renamed: whoever sees the name sees a whole checkpoint."""
    final = os.path.join(config.output_dir, f"checkpoint_iter_{iteration}")
    aside = os.path.join(config.output_dir, f".checkpoint_iter_{iteration}")
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    save_file(
        {name: value.contiguous() for name, value in head.state_dict().items()},
        os.path.join(aside, "value.safetensors"),
    )
    # By parameter name, not by number: the states outlive a change in the order of parameters.
    moments = {}
    for optimizer, module in zip(optimizers, (model, head)):
        names = {parameter: name for name, parameter in module.named_parameters()}
        kind = "policy" if module is model else "value"
        for parameter, state in optimizer.state.items():
            for key, tensor in state.items():
                moments[f"{kind}.{names[parameter]}.{key}"] = tensor.contiguous()
    save_file(moments, os.path.join(aside, "optimizer.safetensors"))
    files = {name: digest(os.path.join(aside, name)) for name in sorted(os.listdir(aside))}
    state = {"iteration": iteration, **progress, "files": files, "config": dataclasses.asdict(config)}
    with open(os.path.join(aside, "trainer_state.json"), "w") as file:
        json.dump(state, file, indent=1)
    for name in os.listdir(aside):
        sync(os.path.join(aside, name))
    sync(aside)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(aside, final)
    sync(config.output_dir)
    for old in checkpoints(config.output_dir)[: -config.keep_checkpoints]:
        shutil.rmtree(old)
    return final


def read_state(folder):
    """trainer_state.json of a checkpoint after checking that every file it names is there and whole."""
    path = os.path.join(folder, "trainer_state.json")
    if not os.path.isfile(path):
        raise ValueError(f"{folder} is not a complete checkpoint: trainer_state.json is missing")
    try:
        with open(path) as file:
            state = json.load(file)
        files = dict(state["files"])
        dict(state["config"]), state["iteration"] + state["model_tokens"] + state["seconds"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from None
    for name, expected in files.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise ValueError(f"{folder} is not a complete checkpoint: {name} is missing")
        if digest(path) != expected:
            raise ValueError(f"{folder}: {name} is damaged (its checksum is not the one written)")
    return state


def restore(folder, model, head, optimizers):
    """Weights of the value head and both optimisers' states; the model itself was loaded from the folder."""
    try:
        head.load_state_dict(load_file(os.path.join(folder, "value.safetensors")))
    except RuntimeError:
        raise ValueError(f"{folder}: its value head is of another model size") from None
    moments = load_file(os.path.join(folder, "optimizer.safetensors"))
    for optimizer, module, kind in zip(optimizers, (model, head), ("policy", "value")):
        for name, parameter in module.named_parameters():
            prefix = f"{kind}.{name}."
            state = {key[len(prefix) :]: tensor for key, tensor in moments.items() if key.startswith(prefix)}
            if "exp_avg" in state and state["exp_avg"].shape != parameter.shape:
                raise ValueError(f"{folder}: the optimiser state of {name} is of another model size")
            if state:
                optimizer.state[parameter] = {
                    key: t if key == "step" else t.to(parameter.device) for key, t in state.items()
                }


def check_same_run(config, saved, folder):
    """Raise ValueError if a flag that shapes the run is not the one the checkpoint was made with."""
    for name, x in saved.items():
        free = name in FREE_ON_RESUME and not (name == "model" and config.loss == "apo")  # apo's pi_ref is the base
        if not free and getattr(config, name, x) != x:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(config, name)} differs from the {x} that {folder} was trained with"
            )


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
    with open(path + ".tmp", "w") as file:
        file.writelines(kept)
    os.replace(path + ".tmp", path)


def append(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C waits until the block is through: an update happens whole or not at all."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


# ================================================================================================ the phases


def draw_problems(config, iteration, ranks, from_file):
    """This rank's share of the iteration's problems, and their global numbers."""
    indices = list(fsdp.share(config.problems_per_iteration, ranks))
    if from_file:
        n = config.problems_per_iteration  # iterations count from 1, the epochs of a file from 0
        chosen = [data.pick_problem(from_file, config.seed, iteration - 1, i, n) for i in indices]
    else:
        chosen = [data.train_problem(config.seed, iteration, i, config.digits, config.prompt) for i in indices]
    return chosen, indices


def make_rollouts(model, tokenizer, problems, keys, config, value, kind, K):
    """Search or sample completions for problems, `rollout_batch` of them in lock-step.  Returns one Rollouts."""
    cover = config.cover if config.cover < 1 else math.inf
    options = astar_search.Options(
        policy.stop_tokens(model, tokenizer), K=K, tau=config.tau, width=config.width, max_new_tokens=config.max_new_tokens,
        max_nodes=config.max_nodes, max_open=config.max_open, cover=cover,
    )  # fmt: skip
    parts = []
    for start in range(0, len(problems), config.rollout_batch):
        chunk = slice(start, start + config.rollout_batch)
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


def minibatches_of(rollouts, config, iteration, epoch):
    """Rows of each minibatch: the problems in an order fixed by (seed, iteration, epoch), dealt into equal parts."""
    order = sorted(set(rollouts.problem.tolist()))
    random.Random(f"order {config.seed} {iteration} {epoch}").shuffle(order)
    part_of = {p: i * config.minibatches // len(order) for i, p in enumerate(order)}
    parts = torch.tensor([part_of[p] for p in rollouts.problem.tolist()])
    return [torch.nonzero(parts == part).squeeze(1) for part in parts.unique()]


def losses(model, head, part, config, token_total, leaf_total):
    """Policy and value loss of one micro-batch of rollouts, on its device: (loss, metrics), both sums over the
    micro-batch divided by totals of the whole minibatch, so that micro-batches (and ranks) add up."""
    mask, extra = part.mask, part.extra
    token_weights = extra["leaf_weight"][:, None] * mask / token_total
    logp, entropy, hidden = policy.score(model, part.tokens, mask)
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
    bounds = reward_module.Reward(config.format_bonus, config.length_penalty).bounds
    targets = value_module.soft_target(returns, *bounds, config.beta)
    value_loss, value_metrics = value_module.value_loss(V, u_logit, returns, targets, token_weights)
    return policy_loss + value_loss, metrics | value_metrics


def update(model, head, optimizers, rollouts, config, iteration, ranks):
    """Passes of the loss over one batch of rollouts, an optimiser step a minibatch.

    rollouts.extra holds `rewards`, `leaf_weight` (B,), `advantages` (B, T-1), and for apo `optimal_value` (B,),
    `ref_logprobs` (B, T-1).  Returns metrics, averaged over the steps.  Raises FloatingPointError at a NaN, before
    the step that would spread it.
    """
    for optimizer, rate in zip(optimizers, (config.learning_rate, config.value_learning_rate)):
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_scale(config, iteration)
    steps = []  # metrics of each optimiser step
    model.train()
    for epoch in range(config.epochs):
        for rows in minibatches_of(rollouts, config, iteration, epoch):
            # What the weights are divided by, counted once, over all ranks, before the first backward.
            weight = rollouts.extra["leaf_weight"][rows]
            counts = torch.stack([(weight[:, None] * rollouts.mask[rows]).sum(), weight.sum()])
            token_total, leaf_total = fsdp.all_sum(counts, ranks).tolist()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            # Micro-batches by length, so that little is padding; their order changes nothing.
            rows = rows[rollouts.length[rows].argsort(stable=True)]
            sums = {}
            for micro in rows.split(config.micro_batch):
                part = rollouts.select(micro, ranks.device)
                loss, metrics = losses(model, head, part, config, token_total, leaf_total)
                loss.backward()
                for name, x in metrics.items():
                    sums[name] = sums.get(name, 0.0) + x
            totals = fsdp.all_sum(torch.stack(list(sums.values())), ranks).tolist()
            measured = dict(zip(sums, totals))
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            measured["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip).item()
            torch.nn.utils.clip_grad_norm_(head.parameters(), config.grad_clip)
            for name, x in measured.items():
                if not math.isfinite(x):
                    raise FloatingPointError(f"iteration {iteration}: {name} is {x}")
            for optimizer in optimizers:
                optimizer.step()
            steps.append(measured)
    model.eval()
    means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    return means | {"first_kl": steps[0]["approx_kl"]}  # before any step: pi_theta is still pi_old


def summarise(rollouts, texts, verdicts, problems):
    """What one batch of rollouts says about the policy: means weighted by leaf, hence estimates under pi."""
    weight, mask, n = rollouts.extra["leaf_weight"], rollouts.mask, len(problems)
    mean = lambda x: (weight * torch.as_tensor(x, dtype=torch.float32)).sum().item() / n
    correct = [verdict["correct"] for verdict in verdicts]
    distinct = {(p, text) for p, text, right in zip(rollouts.problem.tolist(), texts, correct) if right}
    returns = value_module.monte_carlo_returns(rollouts.extra["rewards"], mask)
    return {
        "reward_mean": mean(rollouts.extra["rewards"]),
        "rollout_accuracy": mean(correct),
        "unique_correct": len(distinct) / n,
        "leaves": len(rollouts) / n,
        "mass": rollouts.stats["mass"],
        "truncated": mean(rollouts.truncated),
        "completion_length": mean(rollouts.length - rollouts.prompt_length),
        "explained_variance": policy.explained_variance(rollouts.values, returns, weight[:, None] * mask),
        "forwards": rollouts.stats["forwards"],
        "stopped": rollouts.stats["stopped"],
        "pruned": rollouts.stats["pruned"],
    }


class Clock:
    """Wall seconds of the run, over all its resumes, and of each phase of this process."""

    def __init__(self, before):
        self.start, self.phases = time.perf_counter() - before, {}

    def seconds(self):
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def phase(self, name):
        start = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start


# ===================================================================================================== the loop


def main(argv=None):
    config, args, refuse = parse(argv)

    # ------------------------------------------------------------------ set-up: all that can be wrong is said here
    try:
        ranks = fsdp.start(config.distributed, config.device)
        reward = reward_module.Reward(config.format_bonus, config.length_penalty)
        train_file = data.read_problems(config.train_file) if config.train_file else None
        if config.eval_file:
            eval_set = data.read_problems(config.eval_file)[: config.eval_problems]
        else:
            eval_set = data.eval_problems(config.eval_problems, config.digits, config.prompt)
        source = args.checkpoint if args.eval_only else inspect_output(config)
        state = read_state(source) if source else {"iteration": 0, "model_tokens": 0, "seconds": 0.0, "config": {}}
        if source and not args.eval_only:
            check_same_run(config, state["config"], source)
        model, tokenizer = policy.load_policy(
            source or config.model,
            torch.float32,
            ranks.device,
            config.gradient_checkpointing == "on",
            config.freeze_blocks,
        )
        astar_search.check_model(model)
        examples = train_file or [
            data.train_problem(config.seed, 0, i, config.digits, config.prompt) for i in range(64)
        ]
        longest = max(map(len, evaluation.encode(tokenizer, examples + eval_set)))
        policy.check_context(model, longest, config.max_new_tokens)
        check_possible(config, model.get_output_embeddings().weight.shape[0])
        torch.manual_seed(config.seed)  # the first layer of the value head; nothing else is drawn from torch
        head = value_module.ValueHead(model.config.get_text_config().hidden_size).to(ranks.device)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizers = [
            torch.optim.AdamW(trainable, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay),
            torch.optim.AdamW(head.parameters(), lr=config.value_learning_rate, weight_decay=config.weight_decay),
        ]
        if source:
            restore(source, model, head, optimizers)
        base = None
        if config.loss == "apo" and not args.eval_only:  # pi_ref: the base as it was before any training
            base = policy.load_policy(config.model, torch.float32, ranks.device)[0].requires_grad_(False)
    except (ValueError, OSError) as error:
        refuse(str(error))
    model, head = fsdp.shard(model, ranks), fsdp.shard(head, ranks)
    value = evaluation.guide(head, reward.bounds, config.beta, config.guide == "head")

    evaluate = functools.partial(
        evaluation.evaluate, model, tokenizer, eval_set, reward, ranks, decode=config.eval_decode, value=value,
        n=config.rollouts_per_problem, max_new_tokens=config.max_new_tokens, width=config.width, max_nodes=config.max_nodes,
    )  # fmt: skip
    if args.eval_only:
        print(evaluation.report(evaluate()[0]))
        return

    # ------------------------------------------------------------------------------------------------ first words
    try:
        open_output(config, state["iteration"])
    except (ValueError, OSError) as error:
        refuse(f"--output-dir {config.output_dir}: {error}")
    metrics_path, samples_path = (os.path.join(config.output_dir, name) for name in ("metrics.jsonl", "samples.jsonl"))
    clock, iteration, model_tokens, evaluated = Clock(state["seconds"]), state["iteration"], state["model_tokens"], {}
    size = lambda parameters: f"{sum(parameter.numel() for parameter in parameters):,}"
    print(f"{config.model}: {size(model.parameters())} parameters, {size(trainable)} trained; value head {size(head.parameters())}")
    print(f"{config.rollout}, {config.problems_per_iteration} problems x at most {config.rollouts_per_problem}; loss {config.loss}")
    print(f"on {ranks.device}, {torch.get_num_threads()} threads; {len(eval_set)} held-out problems; writing to {config.output_dir}")

    def evaluate_into(row):
        with clock.phase("evaluation"):
            result, _ = evaluate()
        evaluated[row["iteration"]] = result["accuracy"]
        row |= {f"eval_{name}": result[name] for name in ("accuracy", "format", "accuracy_by_difficulty")}
        row |= {"eval_length": result["completion_length"], "seconds": clock.seconds()}

    keep = lambda: save_checkpoint(
        config, iteration, model, tokenizer, head, optimizers, {"model_tokens": model_tokens, "seconds": clock.seconds()}
    )
    bar = tqdm(total=config.iterations, initial=iteration, unit="iteration", disable=None)  # quiet without a terminal
    saved = source
    try:
        if source:
            print(f"resumed from {source}, after iteration {iteration}")
        else:
            if config.resume:
                print(f"--resume auto: no checkpoint in {config.output_dir} yet, so this is the beginning")
            row = {"iteration": 0, "seconds": 0.0, "model_tokens": 0}
            evaluate_into(row)
            append(metrics_path, row)
            print(f"before training: {config.eval_decode} accuracy {row['eval_accuracy']:.3f}, format {row['eval_format']:.3f}")

        while iteration < config.iterations:
            n = iteration + 1

            # ------------------------------------------------------------------ 1. rollouts: A* search, or sampling
            problems, indices = draw_problems(config, n, ranks, train_file)
            keys = astar_search.root_keys(config.seed, n, indices)
            with clock.phase("rollouts"), fsdp.gathered(model, ranks):
                search_for = functools.partial(make_rollouts, tokenizer=tokenizer, problems=problems, keys=keys, config=config)
                rollouts = search_for(model, value=value, kind=config.rollout, K=config.rollouts_per_problem)
                spent = rollouts.stats["model_tokens"]
                if base is not None:  # apo: V*(x) from samples of the base; their tokens count
                    reference = search_for(base, value=None, kind="sample", K=config.apo_samples)
                    spent += reference.stats["model_tokens"]
            if len(rollouts) == 0:
                raise LookupError(f"iteration {n}: no search found a completion within --max-nodes {config.max_nodes}")

            # ------------------------------------------------------------------------------------------ 2. rewards
            texts, verdicts = evaluation.judge(rollouts, tokenizer, problems, reward, config.max_new_tokens)
            rewards = torch.tensor([verdict["reward"] for verdict in verdicts])

            # ------------------------------------------------------------------- 3. leaf weights and advantages
            mask = rollouts.mask
            counted = rollouts.weight if config.leaf_weights == "on" else rollouts.count.float()
            leaf_weight = policy.normalise_weights(counted, rollouts.problem)
            if config.loss == "grpo":
                advantages = policy.grpo_advantages(rewards, leaf_weight, rollouts.problem)[:, None] * mask
            else:
                advantages = value_module.gae(rewards, rollouts.values, mask, config.gae_lambda)
            rollouts.extra = {"rewards": rewards, "leaf_weight": leaf_weight, "advantages": advantages}
            if base is not None:
                optimal = reference_values(reference, tokenizer, problems, reward, config)
                with torch.no_grad():
                    ref_logprobs = policy.score(base, rollouts.tokens.to(ranks.device), mask.to(ranks.device))[0].cpu()
                rollouts.extra |= {"optimal_value": optimal[rollouts.problem], "ref_logprobs": ref_logprobs}

            with uninterrupted():
                # ----------------------------------------------------------------------------------- 4. the update
                with clock.phase("update"):
                    learned = update(model, head, optimizers, rollouts, config, n, ranks)
                iteration, model_tokens = n, model_tokens + spent

                # -------------------------------------------------------------------------------------- 5. the log
                row = {"iteration": n, "seconds": clock.seconds(), "model_tokens": model_tokens}
                row |= summarise(rollouts, texts, verdicts, problems) | learned
                row["learning_rate"] = config.learning_rate * learning_rate_scale(config, n)
                if n % config.eval_every == 0 or n == config.iterations:
                    evaluate_into(row)
                append(metrics_path, row)
                some = random.Random(f"samples {config.seed} {n}").sample(range(len(rollouts)), len(rollouts))
                for i in some[: config.samples]:
                    problem = problems[rollouts.problem[i]]
                    sample = {"iteration": n, "prompt": problem.prompt, "completion": texts[i], "truth": problem.answer}
                    numbers = {"weight": leaf_weight[i], "log_pi": rollouts.log_pi[i], "f": rollouts.f[i]}
                    append(samples_path, sample | verdicts[i] | {name: x.item() for name, x in numbers.items()})
                line = f"{n:4d}/{config.iterations}" + "".join(
                    f"  {word} {row[name]:{form}}"
                    for word, name, form in (
                        ("accuracy", "rollout_accuracy", ".3f"), ("reward", "reward_mean", "+.2f"), ("length", "completion_length", "5.1f"),
                        ("leaves", "leaves", ".1f"), ("kl", "approx_kl", ".4f"), ("clip", "clip_fraction", ".2f"),
                        ("entropy", "entropy", ".2f"), ("tokens", "model_tokens", ",d"), ("seconds", "seconds", ".0f"),
                    )
                )  # fmt: skip
                tqdm.write(line + (f"  | eval {row['eval_accuracy']:.3f}" if "eval_accuracy" in row else ""))
                sys.stdout.flush()
                bar.update()

                # --------------------------------------------------------------------------------- 6. the checkpoint
                if n % config.checkpoint_every == 0 or n == config.iterations:
                    with clock.phase("checkpoint"):
                        saved = keep()
    except KeyboardInterrupt:
        bar.close()
        if iteration > 0 and saved != os.path.join(config.output_dir, f"checkpoint_iter_{iteration}"):
            saved = keep()
        go_on = f"go on from {saved} with the same flags and --resume auto" if saved else "there is nothing to keep yet"
        print(f"train.py: stopped by Ctrl-C after iteration {iteration}; {go_on}", file=sys.stderr)
        sys.exit(130)
    except (FloatingPointError, LookupError, OSError) as error:
        bar.close()
        print(f"train.py: stopped: {error}; the last good checkpoint is {saved or 'none'}", file=sys.stderr)
        sys.exit(1)
    bar.close()

    # ------------------------------------------------------------------------------------------------- last words
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    phases = ", ".join(f"{name} {t:.0f} s" for name, t in clock.phases.items())
    curve = ", ".join(f"{accuracy:.3f} after {i}" for i, accuracy in evaluated.items())
    print(f"\n{config.eval_decode} accuracy on {len(eval_set)} held-out problems: {curve}")
    print(f"{model_tokens:,} model tokens in {clock.seconds():.0f} s ({phases}); peak memory {memory:.2f} GiB")
    print(f"metrics: {metrics_path}   rollouts: {samples_path}   model: {saved}")
    fsdp.stop(ranks)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("train.py: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
