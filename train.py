"""train.py -- A*PO, top to bottom: reinforcement learning of a base language model by A* search.

    problems -> A* search over KV-cached prefixes -> Rollouts -> rewards -> leaf weights, advantages
             -> clipped policy loss and value loss -> the next iteration

    python train.py                                   # the tiny base on a CPU or GPU, no download
    python train.py --config quick                    # the same base to 80 % in a minute
    python train.py --config task                     # 2-3 digits, from 2 % to 88 % in 35 minutes
    python train.py --config ppo                      # Gumbel A* and PPO-clip with GAE
    python train.py --rollout sample                  # i.i.d. sampling: the baseline
    torchrun --standalone --nproc_per_node=4 train.py --config training --distributed  # Qwen2.5-3B
    python train.py --resume runs/local               # go on after a stop, with that run's flags
    python train.py --eval-only --checkpoint runs/local/checkpoint_iter_360

After the flags comes the loop, `main()`, one phase after the other.  Below it is what it calls: the
phases, the log, saving and stopping.  Then what comes before it in time: the set-up, the folder of
a run, the command line.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import math
import operator
import os
import random
import reprlib
import resource
import shlex
import signal
import sys
import textwrap
import time

import data

# -------------------------------------------------------------------------------------------- Flags

HERE = os.path.dirname(os.path.abspath(__file__))
TINY_BASE = os.path.join(HERE, "tiny_base")  # has seen products of 2 digits
TASK_BASE = os.path.join(TINY_BASE, "task")  # of 2 and 3 digits


def flag(default, help, choices=None, low=-math.inf, high=math.inf, above=-math.inf):
    """A field of Config: its default, what it means, and which values are allowed."""
    metadata = {"help": help, "choices": choices, "low": low, "above": above, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """Every field is a flag: rollouts_per_problem is --rollouts-per-problem.

    `low` and `high` are the smallest and largest value that are allowed; `above` is not allowed.
    Raises ValueError for a number out of bounds, and for flags that contradict each other.
    """

    # The task: what is asked of which model, and what an answer earns.  Problems are made
    # (`digits`), or read from files.  The reward is the built-in one, or a function of the user's.
    model: str = flag(TINY_BASE, "folder or hub id of the base model")
    prompt: str = flag("terse", "wording: 12*34=, or TinyZero's", choices=tuple(data.PROMPTS))
    digits: str = flag("2", "digits per operand: 2, 3, 2x3, 2-3, ... up to 6")
    train_file: str = flag(
        "",
        "train on the problems of this jsonl file (prompt, answer) instead of made products; the "
        "tiny base knows 0-9 * = + - , space, new line and the tags",
    )
    eval_file: str = flag("", "evaluate on the problems of this jsonl file")
    reward: str = flag(
        "",
        "FILE.py:FUNCTION, a reward of your own; --format-bonus and --length-penalty belong to the "
        "built-in one",
    )
    format_bonus: float = flag(0.1, "added to the reward of a well-formed completion", low=0)
    length_penalty: float = flag(
        0.0, "taken off the reward of a completion of --max-new-tokens", low=0
    )

    # Rollouts: how completions are found.  A search of a problem ends with its first right leaf
    # (`until_right`), at K leaves, when its leaves hold enough of pi (`cover`), or at `max_nodes`.
    # `width` and `rollout_batch` trade memory for speed; they change nothing but rounding.
    rollout: str = flag(
        "astar", "where completions come from: A* search, or sampling", choices=("astar", "sample")
    )
    problems_per_iteration: int = flag(64, "problems drawn for an iteration", low=1)
    rollouts_per_problem: int = flag(64, "most completions of a search (K), or samples", low=1)
    tau: float = flag(0.0, "noise of the search; 0: plain A*, 1: random draws", low=0, high=1)
    beta: float = flag(0.2, "temperature of rewards in h: r/beta is in nats", above=0)
    guide: str = flag(
        "head", "guide the search: by the value head, or h = 0", choices=("head", "none")
    )
    until_right: str = flag("on", "stop a search with its first right leaf", choices=("on", "off"))
    cover: float = flag(1.0, "stop when leaves hold this share of pi; 1: never", above=0, high=1)
    leaf_weights: str = flag("on", "weigh leaves by pi/q in all losses", choices=("on", "off"))
    max_new_tokens: int = flag(48, "longest completion in tokens", low=1)
    stop: list = flag(
        (), "a completion ends with this text too (\\n: new line); may be repeated; '' is none"
    )
    max_nodes: int = flag(128, "most nodes that a search may expand for one problem", low=1)
    max_open: int = flag(65536, "longest queue of a search: the beam width", low=1)
    width: int = flag(2, "nodes of one problem that a round may evaluate at once", low=1)
    rollout_batch: int = flag(256, "problems searched in lock-step", low=1)

    # Losses: what is made of the leaves.  em, ppo and grpo are one clipped loss with different
    # advantages; apo is a regression that needs samples of the base.  See policy.py.
    loss: str = flag("em", "what moves the policy", choices=("ppo", "grpo", "em", "apo"))
    gae_lambda: float = flag(0.95, "ppo: lambda of GAE", low=0, high=1)
    clip: float = flag(0.2, "epsilon of PPO's clip (ppo, grpo, em)", above=0)
    entropy_coef: float = flag(0.0, "weight of the entropy bonus (ppo, grpo, em)", low=0)
    beta1: float = flag(0.5, "apo: temperature of V*, estimated on samples of the base", above=0)
    beta2: float = flag(0.001, "apo: temperature of the regression", above=0)
    apo_samples: int = flag(8, "apo: samples of the base a problem for V*", low=1)

    # Optimisation: an iteration makes epochs * minibatches optimiser steps on its rollouts.  The
    # policy and the value head have learning rates of their own, on one schedule.
    iterations: int = flag(360, "iterations in all", low=1)
    epochs: int = flag(2, "passes over the rollouts of an iteration", low=1)
    minibatches: int = flag(2, "optimiser steps a pass", low=1)
    micro_batch: int = flag(64, "rollouts a forward of the update; changes only rounding", low=1)
    learning_rate: float = flag(2e-4, "peak learning rate of the policy", above=0)
    value_epochs: int = flag(0, "passes of the value head alone, after the others", low=0)
    value_learning_rate: float = flag(1e-3, "peak learning rate of the value head", above=0)
    warmup: int = flag(1, "iterations of linear warm-up, before the cosine", low=0)
    final_rate: float = flag(0.02, "last learning rate, as a share of the peak", low=0, high=1)
    weight_decay: float = flag(0.0, "weight decay of AdamW", low=0)
    grad_clip: float = flag(1.0, "largest norm of the gradient", above=0)
    average: float = flag(
        0.0,
        "evaluate and save a moving average of the weights: its decay a step",
        low=0,
        high=0.9999,
    )
    freeze_blocks: int = flag(0, "keep the embeddings and the first n blocks as they are", low=0)
    gradient_checkpointing: str = flag(
        "off", "recompute activations in the backward pass", choices=("on", "off")
    )
    mixed_precision: str = flag(
        "off", "bf16: compute in it, keep weights and moments in float32", choices=("off", "bf16")
    )

    # The run: where it runs, what it writes and how often.  Apart from the seed, none of these
    # changes what is learned, but for rounding.
    seed: int = flag(0, "seed of problems, noise and order of the steps", low=0, high=2**31)
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto is a GPU if there is one")
    threads: int = flag(
        0, "CPU threads; 0: one for a small model, else one a core", low=0, high=512
    )
    distributed: bool = flag(False, "shard over the ranks that torchrun started")
    replicas: int = flag(1, "groups of ranks that hold a whole model each, such as nodes", low=1)
    cpu_offload: bool = flag(False, "keep weights, gradients and moments in the host's memory")
    output_dir: str = flag("runs/local", "where everything is written")
    eval_every: int = flag(20, "iterations between evaluations; also before the first", low=1)
    eval_problems: int = flag(500, "held-out problems of an evaluation; of a file the first", low=1)
    eval_decode: str = flag(
        "greedy", "how an evaluation decodes", choices=("greedy", "sample", "astar")
    )
    eval_completions: int = flag(8, "sample, astar: completions a problem, evaluated", low=1)
    checkpoint_every: int = flag(20, "iterations between checkpoints; also at the end", low=1)
    keep_checkpoints: int = flag(2, "older checkpoints than the newest n are removed", low=1)
    samples: int = flag(4, "rollouts an iteration that are written to samples.jsonl", low=0)
    wandb: bool = flag(False, "log to Weights & Biases too")
    tensorboard: bool = flag(False, "log to TensorBoard too, in the output folder")
    resume: str = flag(
        "",
        "go on with the run in this folder (its own, or a checkpoint's), by its own flags unless "
        "--config is named; auto: with the run in the output folder, by the flags that are given",
    )
    overwrite: bool = flag(False, "remove the run that the output folder holds")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_flag(field, getattr(self, field.name))
        data.parse_digits(self.digits)
        # A run's folder stands for its newest checkpoint.
        self.model = fsdp.newest_checkpoint(self.model)
        if self.resume != "auto":
            self.resume = fsdp.newest_checkpoint(self.resume)
        self.stop = evaluation.stop_texts(self.stop)
        if self.minibatches > self.problems_per_iteration:
            raise ValueError(
                f"--minibatches {self.minibatches} is more than "
                f"--problems-per-iteration {self.problems_per_iteration}"
            )
        if self.train_file and not self.eval_file:
            raise ValueError(
                "--train-file needs --eval-file: made products say nothing about a task of your own"
            )
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other")
        for package in ("wandb", "tensorboard"):
            if getattr(self, package) and not importlib.util.find_spec(package):
                raise ValueError(
                    f"--{package}: the package is not installed: pip install {package}"
                )


def flag_name(field_name):
    """The flag of a field: rollouts_per_problem -> --rollouts-per-problem."""
    return "--" + field_name.replace("_", "-")


LARGEST = 1e30  # of any flag: it is still a number in float32


def check_flag(field, value):
    """Raise ValueError if the value of a field is not allowed."""
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{flag_name(field.name)} must be one of {', '.join(choices)}")
    if isinstance(value, (str, list, tuple)):
        return
    low, above, high = (field.metadata[name] for name in ("low", "above", "high"))
    if low <= value <= high and above < value <= LARGEST:  # a NaN fails each of these
        return
    bounds = []
    if math.isfinite(low):
        bounds.append(f"at least {low}")
    if math.isfinite(above):
        bounds.append(f"above {above}")
    if math.isfinite(high) or value > LARGEST:
        bounds.append(f"at most {min(high, LARGEST)}")
    shown = reprlib.repr(value)
    raise ValueError(f"{flag_name(field.name)} must be {' and '.join(bounds)}, not {shown}")


# Draws without replacement from pi, which can be weighted pi/q.  The search of a problem ends when
# its leaves hold 80 % of pi, or at 8 leaves.
GUMBEL_LEAVES = {
    "tau": 1.0,
    "until_right": "off",
    "cover": 0.8,
    "rollouts_per_problem": 8,
    "max_nodes": 1024,
}
# PPO-clip with GAE on such draws.  Their weights make the losses estimates of expectations under
# pi, as PPO assumes.  More problems and fewer, larger steps than em needs, because the weight of a
# right leaf is its probability: small at the start.
PPO = GUMBEL_LEAVES | {
    "loss": "ppo",
    "width": 4,
    "problems_per_iteration": 256,
    "minibatches": 4,
    "epochs": 1,
    "learning_rate": 3e-4,
    "warmup": 8,
    "iterations": 90,
    "eval_every": 10,
    "checkpoint_every": 10,
}
PRESETS = {
    # The defaults: plain A*, guided by the head, until a leaf is right, under em.
    "local": {},
    "quick": {"output_dir": "runs/quick", "iterations": 40, "eval_every": 10},
    # Products of 2 and 3 digits: completions are up to twice as long as those of 2 digits, and more
    # steps can go wrong.  So a search may expand more nodes.
    "task": {
        "model": TASK_BASE,
        "digits": "2-3",
        "output_dir": "runs/task",
        "max_new_tokens": 96,
        "max_nodes": 512,
        "guide": "none",
        "problems_per_iteration": 128,
        "iterations": 350,
        "warmup": 5,
        "average": 0.99,
        "final_rate": 0.1,
        "eval_every": 10,
    },
    "ppo": PPO | {"output_dir": "runs/ppo"},
    # Answers of hundreds of tokens: plain A* might not finish one, so Gumbel leaves under PPO.
    "training": PPO
    | {
        "model": "Qwen/Qwen2.5-3B",
        "prompt": "tinyzero",
        "stop": data.STOP_TEXTS["tinyzero"],
        "digits": "2-3",
        "output_dir": "runs/training",
        "max_new_tokens": 1024,
        "max_nodes": 16384,
        "iterations": 200,
        "learning_rate": 1e-6,
        "value_learning_rate": 1e-4,
        "warmup": 10,
        "micro_batch": 16,
        "gradient_checkpointing": "on",
        "mixed_precision": "bf16",
        "problems_per_iteration": 128,
        "rollout_batch": 32,
        "width": 8,
        "cover": 0.9,
    },
}
# Flags that bring others along, unless the preset or the user sets those.  64 leaves of plain A*
# and a stop at the first right one, the defaults, suit em alone.
COMPANIONS = {
    ("prompt", "tinyzero"): {"stop": data.STOP_TEXTS["tinyzero"]},
    ("rollout", "sample"): {"rollouts_per_problem": 4},
    ("loss", "ppo"): GUMBEL_LEAVES,
    ("loss", "grpo"): GUMBEL_LEAVES,
    ("loss", "apo"): GUMBEL_LEAVES,
}

GROUPS = {  # the first field of each group of flags -> its title in --help
    "model": "the task",
    "rollout": "rollouts",
    "loss": "losses",
    "iterations": "optimisation",
    "seed": "the run",
}

# How one process was run: not taken from a checkpoint by --eval-only or --resume FOLDER, nor from
# the file of --config.
OF_ONE_PROCESS = """
    distributed replicas cpu_offload wandb tensorboard resume overwrite
""".split()


def shown(value):
    """The value of a flag as a user would write it; of one that is given several times all."""
    if isinstance(value, (list, tuple)):
        return " ".join(value)
    if value in (TINY_BASE, TASK_BASE):
        return os.path.relpath(value, HERE)
    return value


def help_text(field):
    """The help of a flag, with its default and the presets that change it."""
    values = []
    if field.type is not bool:  # a switch is off unless it is named
        default = "none" if field.default in ("", ()) else shown(field.default)
        values.append(f"default {default}")
    for name, preset in PRESETS.items():
        if field.name in preset:
            values.append(f"{name}: {shown(preset[field.name])}")
    meaning = field.metadata["help"]
    return f"{meaning} ({'; '.join(values)})" if values else meaning


def preset_or_file(name):
    """The argument of --config -> (flags of a preset, flags of a JSON file): {field: value} each.

    One of them is empty.  A file may be a run's config.json; how that process was run
    (OF_ONE_PROCESS) is not taken from it.  argparse makes a message of the error.
    """
    if name in PRESETS:
        return PRESETS[name], {}
    if not name.endswith(".json"):
        raise argparse.ArgumentTypeError(
            f"{name} is neither a preset ({', '.join(PRESETS)}) nor a JSON file"
        )
    try:
        with open(name, encoding="utf-8-sig") as file:  # some editors write a byte order mark
            flags = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"this is no JSON ({error})"
        raise argparse.ArgumentTypeError(f"{name} cannot be read: {reason}") from None
    if not isinstance(flags, dict):
        raise argparse.ArgumentTypeError(f"{name} must hold one JSON object of flags")
    known = {field.name: field for field in dataclasses.fields(Config)}
    for key, value in flags.items():
        if key not in known:
            near = data.nearest_flag(flag_name(key), [flag_name(name) for name in known])
            hint = f"; did you mean {near.strip('-').replace('-', '_')}?" if near else ""
            raise argparse.ArgumentTypeError(f"{name}: there is no flag {key}{hint}")
        try:
            check_kind(known[key], value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    return {}, {key: value for key, value in flags.items() if key not in OF_ONE_PROCESS}


def check_kind(field, value):
    """Raise ValueError if a value that was read from a file is not of the kind of its field."""
    wanted = field.type
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if not fits or (wanted is list and not all(type(text) is str for text in value)):
        kind = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        must_be = kind.get(wanted, "a list of texts")
        raise ValueError(f"{field.name} must be {must_be}, not {reprlib.repr(value)}")


def make_parser():
    """The command line of train.py, its flags in the groups of Config."""
    parser = data.OneLineParser(
        "train.py",
        usage="python train.py [--config NAME] [--FLAG VALUE ...]",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        type=preset_or_file,
        metavar="NAME",
        help=f"preset ({', '.join(PRESETS)}), or a JSON file such as a run's config.json; flags "
        "change it (default local)",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate --checkpoint and exit")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="checkpoint for --eval-only")
    group = parser
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        name = flag_name(field.name)
        # A flag that is not given leaves no attribute, so that it can be told from its default.
        options = {"help": help_text(field), "default": argparse.SUPPRESS}
        if field.type is bool:
            group.add_argument(name, action="store_true", **options)
        elif field.type is list:
            group.add_argument(name, action="append", metavar="TEXT", **options)
        elif field.metadata["choices"]:
            group.add_argument(name, choices=field.metadata["choices"], **options)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[field.type]
            group.add_argument(name, type=field.type, metavar=metavar, **options)
    return parser


if __name__ == "__main__":
    # PyTorch takes seconds to be imported.  So --help and a mistyped flag are answered before.
    make_parser().parse_args()

import torch
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_

import astar_search
import eval as evaluation
import fsdp
import policy
import reward as reward_module
import value as value_module

# ----------------------------------------------------------------------------------------- The loop


def main(argv=None):
    """The command: set up, then one iteration after the other until the end or a signal.

    An iteration is: rollouts by search, their rewards, leaf weights and advantages, the update, the
    log.  All tensors of rollouts are on the CPU; a micro-batch of them moves to the device.
    """
    evaluation.make_output_printable()
    config, arguments, parser = parse_arguments(argv)
    try:
        run = set_up(config, arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if arguments.eval_only:
        result, _ = evaluate(run)
        run.say(evaluation.format_report(result))
        return fsdp.shutdown(run.ranks)

    print_start(run, arguments.companions)
    ranks, reward = run.ranks, run.reward
    policy_parameters = [p for p in run.model.parameters() if p.requires_grad]
    head_parameters = list(run.head.parameters())
    # A search makes many nodes, and that starts garbage collections.  What exists already is left
    # out of them.
    gc.freeze()
    stop_signal = None
    with explain_failures(run), StopSignals(ranks, run.signals) as signals:
        if not run.source:  # a new run: first the accuracy of the base
            run.say(f"the base on {len(run.eval_problems)} held-out problems ...")
            row = {"iteration": 0, "seconds": 0.0, "model_tokens": 0}
            log_row(run, row)
            run.say(f"{config.eval_decode} accuracy before training: {row['eval_accuracy']:.3f}")
            print_example(run)

        for iteration in range(run.iteration + 1, config.iterations + 1):
            stop_signal = signals.first()
            if stop_signal is not None:
                break

            # -------------------------------------------------- 1. Rollouts: A* search, or sampling
            run.clock.enter("rollouts")
            problems, indices = draw_problems(config, iteration, ranks, run.file_problems)
            # Whole weights on every rank: each search runs as many forwards as it needs.
            with fsdp.full_weights(run.model, run.head):
                rollouts = generate_rollouts(
                    run.model,
                    run.tokenizer,
                    problems,
                    indices,
                    config,
                    reward,
                    iteration=iteration,
                    value_function=run.value_function,
                    kind=config.rollout,
                    K=config.rollouts_per_problem,
                )

            # --------------------------------------------------------------------------- 2. Rewards
            # B rollouts: the leaves of all problems, one after the other.
            texts, verdicts = evaluation.judge_rollouts(
                rollouts, run.tokenizer, problems, reward, config.max_new_tokens, config.stop
            )
            rewards = torch.tensor([verdict["reward"] for verdict in verdicts])  # (B,)
            correct = torch.tensor([verdict["correct"] for verdict in verdicts], dtype=torch.bool)

            # ------------------------------------------------------- 3. Leaf weights and advantages
            # Index t of a grid (B, T-1) is about the token at t+1.  All that needs pi_old is
            # computed here, once, before the first step moves the policy.
            mask = rollouts.mask  # (B, T-1)
            leaf_weight = leaf_weights(rollouts, config)  # (B,)
            soft_targets = value_module.soft_target(rewards, *reward.bounds, config.beta)  # (B,)
            if config.loss == "em":
                # A = t(r)/sum_i w_i t(r_i), times the best t; over the right leaves of a problem
                advantage = policy.em_advantages(
                    soft_targets, leaf_weight, rollouts.problem, correct
                )
                advantages = advantage[:, None] * mask
            elif config.loss == "grpo":
                # A = (r - mean)/deviation, within the problem
                advantage = policy.grpo_advantages(rewards, leaf_weight, rollouts.problem)
                advantages = advantage[:, None] * mask
            else:
                # A_t = delta_t + lambda A_(t+1),  delta_t = r_t + V(s_(t+1)) - V(s_t)
                advantages = value_module.gae(rewards, rollouts.values, mask, config.gae_lambda)
            rollouts.extra = {
                "rewards": rewards,
                "soft_targets": soft_targets,
                "leaf_weight": leaf_weight,
                "advantages": advantages,
                "teaches": which_teach(leaf_weight, advantages, config),
            }
            summary = summarise(rollouts, texts, verdicts, problems, config, ranks)
            if summary["leaves"] == 0:
                raise NoLeafError(
                    f"iteration {iteration}: no search found a completion "
                    f"within --max-nodes {config.max_nodes}"
                )
            model_tokens = summary.pop("model_tokens")
            if config.loss == "apo":
                model_tokens += add_apo_columns(run, rollouts, problems, indices, iteration)
            run.clock.enter("update")
            if config.mixed_precision == "bf16":
                # bfloat16 rounds the search's log pi otherwise than the update's.  pi_old must be
                # the update's, or the ratio would not be 1 before the first step.
                with fsdp.full_weights(run.model):
                    rollouts.log_probs = score_rollouts(
                        run.model, rollouts, indices, config, iteration, ranks.device
                    )

            # ------------------------------------------------------------------------ 4. The update
            scale = learning_rate_scale(config, iteration)
            for group in run.optimizer.param_groups:
                group["lr"] = scale * group["peak"]
            # Eval mode, as in the rollouts: some models are random in training mode.  transformers
            # recomputes activations in training mode only; check_model has compared the two.
            run.model.train(config.gradient_checkpointing == "on")
            steps = []  # metrics of each optimiser step
            for epoch in range(config.epochs):
                for rows in deal_minibatches(rollouts, indices, config, iteration, epoch):
                    # What the losses are divided by is counted before the first backward, over
                    # all ranks.  So the parts below are terms of one sum.
                    totals = minibatch_totals(rollouts, rows, ranks)
                    if totals["tokens"] == 0:
                        continue  # no search of this minibatch found a leaf, on any rank
                    sums = {}
                    # The policy runs only the completions that have a gradient.
                    teaching = rows[rollouts.extra["teaches"][rows]]
                    for part in parts_of(rollouts, teaching, config, ranks):
                        log_prob, entropy = run.score(part.tokens, part.mask)
                        # A leaf counts by its weight and by its tokens: (B, T-1).
                        weight = part.extra["leaf_weight"][:, None] * part.mask
                        if config.loss == "apo":
                            # sum_i w_i ( beta2 log(pi_theta/pi_ref)(y_i) + V*(x) - r_i )^2
                            policy_loss, metrics = policy.apo_loss(
                                log_prob=log_prob,
                                ref_log_prob=part.extra["ref_log_probs"],
                                mask=part.mask,
                                rewards=part.extra["rewards"],
                                optimal_values=part.extra["optimal_value"],
                                beta2=config.beta2,
                                leaf_weights=part.extra["leaf_weight"] / totals["leaves"],
                            )
                        else:  # em, grpo and ppo differ in their advantages alone
                            # -sum_t w min( ratio A, clip(ratio, 1 - eps, 1 + eps) A )
                            policy_loss, metrics = policy.ppo_loss(
                                log_prob=log_prob,
                                old_log_prob=part.log_probs,
                                advantages=part.extra["advantages"],
                                entropy=entropy,
                                token_weights=weight / totals["tokens"],
                                clip=config.clip,
                                entropy_coef=config.entropy_coef,
                            )
                        # FSDP averages gradients over the ranks; these losses are to be added up.
                        (policy_loss * ranks.world_size).backward()
                        metrics |= policy.ratio_metrics(
                            log_prob=log_prob,
                            old_log_prob=part.log_probs,
                            entropy=entropy,
                            token_weights=weight / totals["teaching_tokens"],
                            clip=config.clip,
                        )
                        add_up(sums, metrics)
                    # The head learns from all of them, by the hidden states that the search kept.
                    add_up(sums, head_backward(run, rollouts, rows, totals))
                    # One optimiser step a minibatch, by the gradients of all its parts and ranks.
                    measured = reduce_metrics(sums, ranks)
                    # Each group is clipped by its own norm: neither shrinks the other's step.
                    policy_norm = clip_grad_norm_(policy_parameters, config.grad_clip)
                    clip_grad_norm_(head_parameters, config.grad_clip)
                    measured["grad_norm"] = fsdp.full_tensor(policy_norm).item()
                    check_finite(measured, iteration)
                    # Without a completion that teaches, the policy's parameters have no gradient.
                    # Then AdamW leaves them as they are, and its moments too.
                    run.optimizer.step()
                    run.optimizer.zero_grad(set_to_none=True)
                    steps.append(measured)
                    if config.average > 0:
                        done = (iteration - 1) * config.epochs * config.minibatches + len(steps)
                        move_average(run.optimizer, config.average, done)
            run.model.eval()
            # More passes of the head alone, which cost no forward of the model.
            for epoch in range(config.epochs, config.epochs + config.value_epochs):
                for rows in deal_minibatches(rollouts, indices, config, iteration, epoch):
                    totals = minibatch_totals(rollouts, rows, ranks)
                    if totals["tokens"] == 0:
                        continue
                    head_backward(run, rollouts, rows, totals)
                    clip_grad_norm_(head_parameters, config.grad_clip)
                    # The policy's parameters have no gradient, so AdamW leaves them as they are.
                    run.optimizer.step()
                    run.optimizer.zero_grad(set_to_none=True)
            run.iteration = iteration
            run.model_tokens += model_tokens
            run.clock.enter("other")

            # --------------------------------------------------------- 5. Log, evaluate, checkpoint
            row = {
                "iteration": iteration,
                "seconds": 0.0,
                "model_tokens": run.model_tokens,
                **summary,
                **mean_metrics(steps),
                "learning_rate": config.learning_rate * scale,
            }
            log_row(run, row)
            samples = sample_rows(
                config, iteration, indices, rollouts, texts, verdicts, problems, ranks
            )
            if ranks.is_main:
                fsdp.append_rows(run.path("samples.jsonl"), samples)
            print_iteration(run, row)
            if iteration % config.checkpoint_every == 0 or iteration == config.iterations:
                save(run)

        # After a stop: what the last iterations learned is kept.
        unsaved = not run.saved.endswith(f"checkpoint_iter_{run.iteration}")
        if stop_signal is not None and run.iteration > 0 and unsaved:
            save(run)

    if stop_signal is not None:
        status = print_stop(run, stop_signal)
        return fsdp.shutdown(ranks, status)
    print_end(run)
    return fsdp.shutdown(ranks)


# --------------------------------------------------------------------------------------- The phases


def draw_problems(config, iteration, ranks, file_problems):
    """This rank's share of the iteration's problems, and their global numbers."""
    N = config.problems_per_iteration
    indices = list(fsdp.rank_slice(N, ranks))
    problems = []
    for i in indices:
        if file_problems:  # the epochs of a file count from 0
            problem = data.pick_problem(file_problems, config.seed, iteration - 1, i, N)
        else:
            problem = data.train_problem(
                config.seed, iteration, i, digits=config.digits, style=config.prompt
            )
        problems.append(problem)
    return problems, indices


def generate_rollouts(
    model,
    tokenizer,
    problems,
    indices,
    config,
    reward,
    *,
    iteration,
    value_function,
    kind,
    K,
    stream=0,
):
    """Search or sample completions for problems, `rollout_batch` of them in lock-step.

    indices: the problems' global numbers, by which the noise is keyed.  kind: "astar" or "sample".
    value_function: guide of the search, or None for h = 0.  K: leaves or samples a problem.
    stream: 0 for the rollouts of training; another number for draws independent of them.
    Returns one Rollouts on the CPU.
    """
    # The noise belongs to a problem, so it does not matter which rank or chunk the problem is in.
    keys = astar_search.root_keys(config.seed, iteration, indices, stream)
    parts = []
    # A rank may have no problems.  It gets an empty Rollouts, from one empty chunk.
    for start in range(0, max(1, len(problems)), config.rollout_batch):
        chunk = slice(start, start + config.rollout_batch)
        prompts = evaluation.encode_prompts(tokenizer, problems[chunk])
        until = None
        if config.until_right == "on":
            until = evaluation.right_leaf_test(
                tokenizer, problems[chunk], prompts, reward, config.max_new_tokens, config.stop
            )
        options = astar_search.Options(
            eos=policy.stop_tokens(model, tokenizer),
            stop=astar_search.StopTexts(tokenizer, config.stop, prompts),
            K=K,
            tau=config.tau,
            width=config.width,
            max_new_tokens=config.max_new_tokens,
            max_nodes=config.max_nodes,
            max_open=config.max_open,
            cover=config.cover if config.cover < 1 else math.inf,
            until=until,
        )
        expander = astar_search.Expander(model, prompts, config.max_new_tokens, value_function)
        if kind == "astar":
            trees = astar_search.search(keys[chunk], expander, options)
        else:
            trees = astar_search.sample(keys[chunk], expander, options)
        rollouts = astar_search.collect(trees, expander)
        rollouts.problem += start
        parts.append(rollouts)
    return astar_search.concatenate(parts)


def leaf_weights(rollouts, config):
    """(B,) weights of the leaves that sum to one within each problem.

    Leaves of a search are no samples of pi.  Weighted pi/q (at tau = 0: pi) they stand for all
    completions.  With --leaf-weights off, each counts alike.
    """
    if config.leaf_weights == "on":
        weight = rollouts.weight
    else:
        weight = rollouts.count.float()
    return policy.normalise_weights(weight, rollouts.problem)


def which_teach(leaf_weight, advantages, config):
    """(B,) True for each completion that the policy loss has a gradient of.

    leaf_weight (B,), advantages (B, T-1).  Without a weight or an advantage there is none: under em
    for a wrong leaf, under grpo if the leaves of the problem have earned the same.  Under ppo the
    critic is hardly ever right to the last digit, so wrong leaves teach too: one that earned more
    than V predicted is reinforced.  apo and the entropy bonus do not depend on the advantages.
    """
    if config.loss == "apo" or config.entropy_coef > 0:
        return torch.ones(len(leaf_weight), dtype=torch.bool)
    return (leaf_weight[:, None] * advantages != 0).any(dim=1)


@torch.no_grad()
def score_rollouts(model, rollouts, indices, config, iteration, device):
    """log pi (B, T-1) of the rollouts that teach, by the forward that the update uses; 0 elsewhere.

    It runs the micro-batches of the first epoch, so that the update's first forward computes the
    same numbers again.
    """
    log_probs = torch.zeros_like(rollouts.log_probs)
    for minibatch in deal_minibatches(rollouts, indices, config, iteration, epoch=0):
        teaching = minibatch[rollouts.extra["teaches"][minibatch]]
        for rows in split_by_length(teaching, rollouts.length, config.micro_batch):
            part = rollouts.select(rows, device)
            log_prob, _ = policy.score(model, part.tokens, part.mask)
            log_probs[rows, : log_prob.shape[1]] = log_prob.cpu()
    return log_probs


# Streams of noise besides that of the rollouts, which is 0.
REFERENCE_STREAM = 1  # apo's samples of the base
FRESH_STREAM = 2  # samples on which the critic is judged


def add_apo_columns(run, rollouts, problems, indices, iteration):
    """What the apo loss needs: `ref_log_probs` (B, T-1), and `optimal_value` V*(x) (B,).

    V* is estimated on samples of the base, drawn independently of the rollouts: r - V* of a
    completion would be too small if it were one of them.  Returns the model tokens of these
    samples, over all ranks; they count as a cost of the rollouts.
    """
    config = run.config
    with fsdp.full_weights(run.reference):
        samples = generate_rollouts(
            run.reference,
            run.tokenizer,
            problems,
            indices,
            config,
            run.reward,
            iteration=iteration,
            value_function=None,
            kind="sample",
            K=config.apo_samples,
            stream=REFERENCE_STREAM,
        )
        rollouts.extra["ref_log_probs"] = score_rollouts(
            run.reference, rollouts, indices, config, iteration, run.ranks.device
        )
    _, verdicts = evaluation.judge_rollouts(
        samples, run.tokenizer, problems, run.reward, config.max_new_tokens, config.stop
    )
    rewards = torch.tensor([verdict["reward"] for verdict in verdicts])
    rewards = rewards.repeat_interleave(samples.count).view(len(problems), config.apo_samples)
    # V*(x) = beta1 log mean exp(r/beta1)
    optimal_values = policy.optimal_value(rewards, config.beta1)  # (N,)
    rollouts.extra["optimal_value"] = optimal_values[rollouts.problem]
    tokens = {"tokens": samples.stats["model_tokens"]}
    return fsdp.all_reduce_sum(tokens, run.ranks)["tokens"]


def learning_rate_scale(config, iteration):
    """Share of the peak learning rate: linear warm-up, then a cosine down to final_rate.

    iteration counts from 1.  In the warm-up the head's first advantages are noise.  Without a
    warm-up the first iteration has the peak rate, as with a warm-up of one iteration.
    """
    warmup = max(1, config.warmup)
    if iteration <= warmup:
        return iteration / warmup
    progress = (iteration - warmup) / max(1, config.iterations - warmup)
    # eta(i)/eta = f + (1 - f) (1 + cos(pi p))/2
    return config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def deal_minibatches(rollouts, indices, config, iteration, epoch):
    """This rank's part of each minibatch, as rows: [(b,), ...].

    Problems are dealt by their global number, `indices`, in an order fixed by (seed, iteration,
    epoch).  So a minibatch is the same on any number of ranks, and a rank's part may be empty.  The
    leaves of a problem are weighted against each other, so they stay together.
    """
    N = config.problems_per_iteration
    order = list(range(N))
    random.Random(f"order {config.seed} {iteration} {epoch}").shuffle(order)
    minibatch_of = {}  # global number of a problem -> number of its minibatch
    for place, index in enumerate(order):
        minibatch_of[index] = place * config.minibatches // N
    numbers = [minibatch_of[indices[p]] for p in rollouts.problem.tolist()]
    numbers = torch.tensor(numbers, dtype=torch.int64)
    return [torch.nonzero(numbers == n).squeeze(1) for n in range(config.minibatches)]


def split_by_length(rows, length, most):
    """Rows -> micro-batches of at most `most` rows, in order of length, to save padding.

    The longest of a micro-batch is at most a quarter longer than the shortest.  The number and
    order of micro-batches change nothing but rounding.
    """
    micro_batches = []
    current = []
    shortest = None
    for row in rows[length[rows].argsort(stable=True)].tolist():
        full = len(current) == most
        if not current or full or length[row] > 1.25 * shortest:
            current = []
            micro_batches.append(current)
            shortest = length[row]
        current.append(row)
    return [torch.tensor(micro_batch) for micro_batch in micro_batches]


def minibatch_totals(rollouts, rows, ranks):
    """Sums over a minibatch and all ranks, weighted by leaf.

    tokens, leaves; and teaching_tokens, those of the completions that teach the policy.
    """
    weight = rollouts.extra["leaf_weight"][rows]
    tokens = (weight[:, None] * rollouts.mask[rows]).sum(dim=1)  # (b,)
    sums = {
        "tokens": tokens.sum().item(),
        "leaves": weight.sum().item(),
        "teaching_tokens": (tokens * rollouts.extra["teaches"][rows]).sum().item(),
    }
    return fsdp.all_reduce_sum(sums, ranks)


def head_loss(head, part, totals):
    """(value loss, metrics) of one micro-batch: terms of sums over the minibatch and all ranks.

    sum_t w ( (V(s_t) - r)^2 + (u(s_t) - t(r))^2 ) / sum_t w
    The hidden states are those that the search has computed: no forward of the model is run.
    """
    hidden, prefix = part.distinct_prefixes()  # (M, D), (B, T-1)
    V, u_logit = head(hidden)  # (M,) each
    weight = part.extra["leaf_weight"][:, None] * part.mask
    return value_module.value_loss(
        values=V[prefix],  # (M,) -> (B, T-1)
        u_logit=u_logit[prefix],
        returns=value_module.monte_carlo_returns(part.extra["rewards"], part.mask),
        targets=value_module.monte_carlo_returns(part.extra["soft_targets"], part.mask),
        token_weights=weight / totals["tokens"],
    )


def head_backward(run, rollouts, rows, totals):
    """Add the gradient of the value loss on these rows to the head's.  Returns sums of metrics."""
    sums = {}
    for part in parts_of(rollouts, rows, run.config, run.ranks):
        loss, metrics = head_loss(run.head, part, totals)
        (loss * run.ranks.world_size).backward()
        add_up(sums, metrics)
    return sums


def parts_of(rollouts, rows, config, ranks):
    """Yield these rows in micro-batches, as Rollouts on the device, as many on every rank.

    Each backward pass gathers weights from all ranks and adds up their gradients.  So a rank that
    has fewer micro-batches than another goes on with idle ones: one token, whose weight is 0.
    """
    micro_batches = split_by_length(rows, rollouts.length, config.micro_batch)
    for turn in range(max(fsdp.all_gather(len(micro_batches), ranks))):
        if turn < len(micro_batches):
            yield rollouts.select(micro_batches[turn], ranks.device)
        else:
            yield idle_part(rollouts).select(torch.tensor([0]), ranks.device)


def idle_part(rollouts):
    """One completion of one token, with weight 0, and the columns of these rollouts."""
    columns = {}
    for name, column in rollouts.columns().items():
        shape = (1, 2) if name == "tokens" else (1,) * column.ndim
        columns[name] = column.new_zeros(shape)
    columns["prompt_length"] += 1
    columns["length"] += 2
    extra = {}
    for name, column in rollouts.extra.items():
        extra[name] = column.new_zeros((1,) * column.ndim)
    return astar_search.Rollouts(**columns, hidden=rollouts.hidden, extra=extra)


def add_up(sums, metrics):
    """Add metrics, by name, to sums; in place."""
    for name, number in metrics.items():
        sums[name] = sums.get(name, 0.0) + number


def reduce_metrics(sums, ranks):
    """Sums of a minibatch, tensors on the device -> numbers, over all ranks."""
    numbers = torch.stack(list(sums.values())).tolist()  # one copy from the device
    return fsdp.all_reduce_sum(dict(zip(sums, numbers)), ranks)


def check_finite(metrics, iteration):
    """Raise FloatingPointError at a NaN or an infinity, before the step that would spread it."""
    for name, number in metrics.items():
        if not math.isfinite(number):
            raise FloatingPointError(f"iteration {iteration}: {name} is {number}")


POLICY_METRICS = ("policy_loss", "approx_kl", "clip_fraction", "entropy")


def move_average(optimizer, decay, steps):
    """a <- d a + (1 - d) w: the moving average of each weight, after `steps` optimiser steps.

    The average of the last 1/(1 - decay) steps or so has less of the noise of single steps than the
    weights themselves have (Polyak & Juditsky 1992).  At first d is smaller, so that the weights
    of the start are forgotten sooner.  Rollouts and the update use the weights; evaluations and
    checkpoints the average.

    It is kept beside Adam's moments, and so it is sharded, saved and loaded like them.
    """
    d = min(decay, steps / (steps + 9))
    for parameter, state in optimizer.state.items():
        if "average" not in state:
            state["average"] = parameter.detach().clone()
        state["average"].lerp_(parameter.detach(), 1 - d)


def swap_average(optimizer):
    """Exchange each weight and its average, in place; a weight without one stays."""
    for parameter, state in optimizer.state.items():
        if "average" in state:
            weight = parameter.detach()
            kept = weight.clone()
            weight.copy_(state["average"])
            state["average"].copy_(kept)


@contextlib.contextmanager
def averaged_weights(run):
    """Within it the policy and the head have their averaged weights, if there are such."""
    swap_average(run.optimizer)
    try:
        yield
    finally:
        swap_average(run.optimizer)


def mean_metrics(steps):
    """Metrics of an iteration: means over its optimiser steps, and the KL before the first.

    Those of the policy are means over the steps that taught it, and None if none did.
    """
    means = dict.fromkeys(POLICY_METRICS)
    for name in dict.fromkeys(name for step in steps for name in step):
        numbers = [step[name] for step in steps if name in step]
        means[name] = sum(numbers) / len(numbers)
    # Before the first step that teaches, pi_theta is still pi_old.
    kl = [step["approx_kl"] for step in steps if "approx_kl" in step]
    means["first_kl"] = kl[0] if kl else None
    return means


# ------------------------------------------------------------------------------------------ The log


def summarise(rollouts, texts, verdicts, problems, config, ranks):
    """What the rollouts of an iteration say, over all ranks: a dict for metrics.jsonl.

    Means are weighted by leaf.  At tau = 1 they estimate expectations under pi; at tau = 0 they
    describe what the search found.  The accuracy takes the importance weights as they are.  The
    losses take them normalised within each problem, so that every problem counts alike; that
    estimate is biased when a learned h prefers right leaves.
    """
    weight = rollouts.extra["leaf_weight"]
    importance = rollouts.weight if config.leaf_weights == "on" else weight
    rewards = rollouts.extra["rewards"]
    correct = [verdict["correct"] for verdict in verdicts]
    distinct = set()  # right completions
    solved = set()  # problems
    for problem, text, is_correct in zip(rollouts.problem.tolist(), texts, correct):
        if is_correct:
            distinct.add((problem, text))
            solved.add(problem)
    lengths = (rollouts.length - rollouts.prompt_length).float()
    # Sums over this rank's problems.  Divided by the number of problems they are means: the weights
    # of a problem's leaves sum to 1, and a problem without a leaf counts 0.
    per_problem = {
        "reward_mean": (weight * rewards).sum().item(),
        "rollout_accuracy": (importance * torch.tensor(correct).float()).sum().item(),
        "solved": len(solved),
        "unique_correct": len(distinct),
        "leaves": len(rollouts),
        "mass": rollouts.stats["mass"],
        "truncated": (weight * rollouts.truncated.float()).sum().item(),
        "completion_length": (weight * lengths).sum().item(),
    }
    counts = {name: rollouts.stats[name] for name in ("model_tokens", "forwards", "pruned")}
    returns = value_module.monte_carlo_returns(rewards, rollouts.mask)
    moments = policy.variance_sums(rollouts.values, returns, weight[:, None] * rollouts.mask)
    # The ranks exchange sums, never means: a rank with two problems would weigh like one with many.
    sums = {**per_problem, **counts, **moments, "problems": len(problems)}
    total = fsdp.all_reduce_sum(sums, ranks)
    row = {name: total[name] / total["problems"] for name in per_problem}
    row["explained_variance"] = policy.explained_variance(total)
    for name in counts:
        row[name] = total[name]
    row["stopped"] = fsdp.all_reduce_sum(rollouts.stats["stopped"], ranks)
    return row


def sample_rows(config, iteration, indices, rollouts, texts, verdicts, problems, ranks):
    """Rows for samples.jsonl: one leaf of each of a few problems, wherever their ranks are.

    Problems and leaves are chosen by (seed, iteration).
    """
    N = config.problems_per_iteration
    rng = random.Random(f"samples {config.seed} {iteration}")
    chosen = rng.sample(range(N), min(config.samples, N))
    rows = []
    for p, index in enumerate(indices):
        leaves = torch.nonzero(rollouts.problem == p).squeeze(1).tolist()
        if index not in chosen or not leaves:
            continue
        leaf = random.Random(f"leaf {config.seed} {iteration} {index}").choice(leaves)
        row = {
            "iteration": iteration,
            "prompt": problems[p].prompt,
            "completion": texts[leaf],
            "truth": problems[p].answer,
            **verdicts[leaf],
            "weight": rollouts.extra["leaf_weight"][leaf].item(),
            "log_pi": rollouts.log_pi[leaf].item(),
            "f": rollouts.f[leaf].item(),
        }
        rows.append((index, row))
    gathered = []
    for rank_rows in fsdp.all_gather(rows, ranks):
        gathered.extend(rank_rows)
    gathered.sort(key=operator.itemgetter(0))  # by the problem's number
    return [row for _, row in gathered]


def evaluate(run):
    """Accuracy and other figures on the held-out problems: what evaluation.evaluate returns."""
    config = run.config
    with averaged_weights(run), fsdp.full_weights(run.model, run.head):
        return evaluation.evaluate(
            run.model,
            run.tokenizer,
            run.eval_problems,
            run.reward,
            run.ranks,
            decode=config.eval_decode,
            n=config.eval_completions,
            max_new_tokens=config.max_new_tokens,
            stop=config.stop,
            value_function=run.value_function,
            width=config.width,
            max_nodes=config.max_nodes,
            batch=config.rollout_batch,
        )


def fresh_explained_variance(run, iteration, most=128):
    """Explained variance of V on fresh samples of pi: one of each of the first `most` held-out
    problems.

    The critic was not fitted to them, and they are draws from pi, while the rollouts of an
    iteration are what a search found.  None where all returns are the same.
    """
    config = run.config
    problems = run.eval_problems[:most]
    indices = list(fsdp.rank_slice(len(problems), run.ranks))
    problems = [problems[i] for i in indices]
    with averaged_weights(run), fsdp.full_weights(run.model, run.head):
        samples = generate_rollouts(
            run.model,
            run.tokenizer,
            problems,
            indices,
            config,
            run.reward,
            iteration=iteration,
            value_function=run.value_function,
            kind="sample",
            K=1,
            stream=FRESH_STREAM,
        )
    _, verdicts = evaluation.judge_rollouts(
        samples, run.tokenizer, problems, run.reward, config.max_new_tokens, config.stop
    )
    rewards = torch.tensor([verdict["reward"] for verdict in verdicts])
    returns = value_module.monte_carlo_returns(rewards, samples.mask)
    sums = policy.variance_sums(samples.values, returns, samples.mask)
    return policy.explained_variance(fsdp.all_reduce_sum(sums, run.ranks))


def log_row(run, row):
    """Complete the row of an iteration, in place, and write it to metrics.jsonl and the loggers.

    What is added: an evaluation if it is time for one, and the seconds.
    """
    config = run.config
    iteration = row["iteration"]
    if iteration % config.eval_every == 0 or iteration == config.iterations:
        run.clock.enter("evaluation")
        result, evaluated_problems = evaluate(run)
        row["eval_explained_variance"] = fresh_explained_variance(run, iteration)
        run.clock.enter("other")
        run.example = evaluated_problems[0]
        row["eval_accuracy"] = result["accuracy"]
        row["eval_format"] = result["format"]
        row["eval_accuracy_by_difficulty"] = result["accuracy_by_difficulty"]
        row["eval_length"] = result["completion_length"]
    row["seconds"] = run.clock.seconds()
    if "eval_accuracy" in row:
        run.evaluated.append(row)
    if run.ranks.is_main:
        fsdp.append_rows(run.path("metrics.jsonl"), [row])
        for logger in run.loggers:
            logger.log(flat_numbers(row), iteration)


def flat_numbers(row):
    """The numbers of a row by name; those of a nested dict as group/name."""
    numbers = {}
    for name, entry in row.items():
        if isinstance(entry, (int, float)):
            numbers[name] = entry
        elif isinstance(entry, dict):
            for key, number in entry.items():
                if isinstance(number, (int, float)):
                    numbers[f"{name}/{key}"] = number
    return numbers


class WandbLogger:
    """--wandb: Weights & Biases.  Raises ValueError where it refuses.

    A resumed run is a new run there.
    """

    def __init__(self, config):
        import wandb

        try:
            self.run = wandb.init(
                project="apo", name=config.output_dir, config=dataclasses.asdict(config)
            )
        except Exception as error:  # nobody is logged in, there is no network, ...
            raise ValueError(f"--wandb: {' '.join(str(error).split())}") from None

    def log(self, numbers, iteration):
        """The numbers of an iteration, by name."""
        self.run.log(numbers, iteration)


class TensorBoardLogger:
    """--tensorboard: TensorBoard's files, in the output folder."""

    def __init__(self, config, first_iteration):
        self.folder = config.output_dir
        self.first_iteration = first_iteration  # a resumed run takes back what lies after it
        self.writer = None  # opened by the first row, when the folder is this run's

    def log(self, numbers, iteration):
        """The numbers of an iteration, by name."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.folder, purge_step=self.first_iteration)
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, iteration)
        self.writer.flush()


def open_loggers(config, first_iteration):
    """The loggers that the flags ask for.  Raises ValueError."""
    loggers = []
    if config.wandb:
        loggers.append(WandbLogger(config))
    if config.tensorboard:
        loggers.append(TensorBoardLogger(config, first_iteration))
    return loggers


def count_parameters(parameters):
    """Numbers in all of these tensors, with commas."""
    return f"{sum(parameter.numel() for parameter in parameters):,}"


def print_start(run, companions):
    """What runs where, and from where."""
    config = run.config
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    run.say(
        f"{config.model}: {count_parameters(run.model.parameters())} parameters, "
        f"{count_parameters(trained)} trained; "
        f"value head {count_parameters(run.head.parameters())}"
    )
    run.say(
        f"{config.rollout}, {config.loss}, on {run.ranks.device}, ranks: {run.ranks.world_size}, "
        f"of {torch.get_num_threads()} threads"
    )
    if companions:
        flags = " ".join(f"{flag_name(name)} {shown(value)}" for name, value in companions.items())
        run.say(f"your flags bring along {flags}")
    if config.resume:
        source = run.source or "the beginning: there is no checkpoint yet"
        run.say(f"resumed from {source}, after iteration {run.iteration}")


# A line of the terminal: heading and width.  found: the share of problems of which a rollout is
# right, which a search is told.  The last column, accuracy on held-out problems, is named by how
# they are decoded.
COLUMNS = {
    "iteration": 9,
    "found": 5,
    "reward": 6,
    "length": 6,
    "leaves": 6,
    "kl": 6,
    "clip": 4,
    "entropy": 7,
    "tokens": 9,
    "s/iter": 6,
    "left": 7,
}


def print_iteration(run, row):
    """A line for the terminal, after a heading now and then; at an evaluation, an example."""
    config, n = run.config, row["iteration"]
    if run.printed is None or n % 20 == 1:
        heading = [f"{name:>{width}}" for name, width in COLUMNS.items()]
        run.say("  ".join([*heading, f"{config.eval_decode:>6}"]))
    before = run.printed or {"seconds": run.clock.seconds_before}
    this_process = row["seconds"] - run.clock.seconds_before
    left = this_process / (n - run.first_iteration) * (config.iterations - n)
    cells = [
        f"{n}/{config.iterations}",
        f"{row['solved']:.3f}",
        f"{row['reward_mean']:+.2f}",
        f"{row['completion_length']:.1f}",
        f"{row['leaves']:.1f}",
        shown_number(row["approx_kl"], 4),
        shown_number(row["clip_fraction"], 2),
        shown_number(row["entropy"], 2),
        f"{row['model_tokens'] / 1e3:,.0f} k",
        f"{row['seconds'] - before['seconds']:.1f}",
        shown_seconds(left),
    ]
    cells = [f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values())]
    accuracy = run.evaluated[-1]["eval_accuracy"] if run.evaluated else None
    run.say("  ".join([*cells, f"{shown_number(accuracy, 3):>6}"]))
    run.printed = row
    if "eval_accuracy" in row:
        print_example(run)
    print_warnings(run, row)


def shown_number(number, digits):
    """A number of a table, or a dash for one that there is not."""
    return "-" if number is None else f"{number:.{digits}f}"


def shown_seconds(seconds):
    """40 s, 35 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def print_example(run):
    """What the model writes now for one held-out problem, always the same one."""
    if not run.example["completions"]:  # of A* decoding
        run.say(f"{'none':>15}  {run.example['prompt']!r}: no completion within the bounds")
        return
    completion = run.example["completions"][0]
    verdict = "right" if completion["correct"] else "wrong"
    text = " ".join(f"{run.example['prompt']}{completion['text']}".split())
    lines = textwrap.wrap(text, width=80, break_on_hyphens=False, max_lines=4, placeholder=" ...")
    for i, line in enumerate(lines):
        run.say(f"{verdict if i == 0 else '':>15}  {line}")


def print_warnings(run, row):
    """A sentence where the numbers of an iteration say that something is wrong."""
    run.unsolved = 0 if row["solved"] > 0 else run.unsolved + 1
    if run.unsolved > 0 and run.unsolved % 5 == 0:
        run.say(
            f"no rollout was right in the last {run.unsolved} iterations, so there is little to "
            "learn from: more --max-nodes, easier problems, or a reward for part of an answer?"
        )
    cut_off = row["truncated"] > 0.5
    if cut_off and (row["iteration"] % 20 == 1 or row["iteration"] == run.first_iteration + 1):
        run.say(
            f"most completions are cut off at --max-new-tokens {run.config.max_new_tokens}: "
            "does the model go on after its answer (--stop TEXT), or is the limit too low?"
        )


def print_end(run):
    """All evaluations, the cost, and where the files are."""
    config = run.config
    if run.ranks.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.ranks.device) / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    run.say(f"\n{config.eval_decode} decoding of {len(run.eval_problems)} held-out problems")
    run.say("iteration  accuracy  well-formed  length  model tokens  seconds")
    for row in run.evaluated:
        run.say(
            f"{row['iteration']:9d}  {row['eval_accuracy']:8.3f}  {row['eval_format']:11.3f}  "
            f"{row['eval_length']:6.1f}  {row['model_tokens']:12,d}  {row['seconds']:7.0f}"
        )
    seconds = run.clock.seconds()
    run.clock.enter("other")
    phases = [f"{name} {t:.0f} s" for name, t in run.clock.phases.items() if name != "other"]
    run.say(f"{run.model_tokens:,} model tokens in {seconds:.0f} s ({', '.join(phases)})")
    run.say(f"peak memory of a rank {peak:.2f} GiB")
    run.say(f"metrics:  {run.path('metrics.jsonl')}")
    run.say(f"rollouts: {run.path('samples.jsonl')}")
    run.say(f"model:    {run.saved}")


# --------------------------------------------------------------------------------- Saving, stopping


def trainer_state(run):
    """What trainer_state.json of a checkpoint holds, besides the list of the other files."""
    return {
        "iteration": run.iteration,
        "model_tokens": run.model_tokens,
        "seconds": run.clock.seconds(),
        "reward_bounds": run.reward.bounds,
        "inputs": run.inputs,
        "threads": torch.get_num_threads(),
        "config": dataclasses.asdict(run.config),
    }


def save(run):
    """Write OUTPUT/checkpoint_iter_N, then remove older ones.  A collective.

    With --average its model is the average; the weights lie beside Adam's moments.  No random state
    is in it: problems, noise and order are functions of (seed, iteration, index).
    """
    run.clock.enter("checkpoint")
    folder = run.path(f"checkpoint_iter_{run.iteration}")
    with averaged_weights(run):
        run.saved = fsdp.save_checkpoint(
            folder,
            run.model,
            run.tokenizer,
            run.head,
            run.optimizer,
            state=trainer_state(run),
            ranks=run.ranks,
        )
    if run.ranks.is_main:  # only now may an older one go
        fsdp.prune_checkpoints(run.config.output_dir, run.iteration, run.config.keep_checkpoints)
    run.clock.enter("other")


class StopSignals:
    """SIGTERM (a scheduler's) and Ctrl-C, kept until the loop asks for them.

    So an iteration happens whole or not at all.  A second Ctrl-C, some seconds after the first,
    ends it at once, for a reward of one's own may hang.  Should the reward catch that, a third one
    ends the process.
    """

    PATIENCE = 2.0  # seconds; two presses within them count as one

    def __init__(self, ranks, received):
        self.ranks = ranks
        self.received = received  # a list, to which other reasons to stop may be added
        self.interrupted = math.inf  # when Ctrl-C was first pressed, or broke in
        self.broke_in = False
        self.handlers = {}  # those that were there before

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.keep)
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def keep(self, number, frame):
        """The handler of both signals."""
        now = time.monotonic()
        if number == signal.SIGINT and now > self.interrupted + self.PATIENCE:
            if self.broke_in:  # and something has caught the exception
                print("train.py: stopped by a third Ctrl-C", file=sys.stderr, flush=True)
                os._exit(130)
            self.broke_in = True
            self.interrupted = now
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            self.interrupted = min(self.interrupted, now)
        self.received.append(number)

    def first(self):
        """The first signal that any rank has received, or None; all ranks agree.  A collective."""
        for received in fsdp.all_gather(self.received, self.ranks):
            if received:
                return received[0]
        return None


def failure_sentence(error, ranks):
    """One line for a failure that is expected to happen to a user; None for a bug."""
    rank = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{rank}{ranks.device} is out of memory: lower --micro-batch, --rollout-batch or "
            "--max-nodes (see examples/memory.py)"
        )
    if isinstance(error, (FloatingPointError, OSError, reward_module.RewardError, NoLeafError)):
        return f"{rank}{error}"
    if ranks.world_size > 1 and isinstance(error, RuntimeError) and fsdp.lost_peer(error):
        return f"{rank}another rank has ended, and its own message says why"
    return None


class NoLeafError(Exception):
    """No search of an iteration found a completion within its bounds."""


@contextlib.contextmanager
def explain_failures(run):
    """Inside, an expected failure ends the process with one line and status 1.

    Ctrl-C that breaks in ends it with status 130.  A bug keeps its traceback.  Whatever happens,
    the output folder is released.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:  # its text, if any: what a reward was doing
        last = run.saved or "none"
        what = f": {interrupt}" if str(interrupt) else ""
        print(
            f"train.py: stopped by a second Ctrl-C{what}; the last good checkpoint is {last}",
            file=sys.stderr,
        )
        sys.exit(130)
    except Exception as error:
        sentence = failure_sentence(error, run.ranks)
        if sentence is None:
            raise
        last = run.saved or "none"
        print(f"train.py: stopped: {sentence}; the last good checkpoint is {last}", file=sys.stderr)
        sys.exit(1)
    finally:
        if run.lock is not None:
            os.close(run.lock)


def print_stop(run, stop_signal):
    """Say what stopped the run and how to go on.  Returns the exit status."""
    by, status = "by SIGTERM", 0
    if stop_signal == signal.SIGINT:
        by, status = "by Ctrl-C", 130
    elif stop_signal == signal.SIGPIPE:
        by = "because nothing reads its output any more"
    if run.saved:
        go_on = f"{run.saved} is kept; go on with {flags_to_go_on(run.config)}"
    else:
        go_on = "there is nothing to keep yet"
    run.say(f"train.py: stopped {by} after iteration {run.iteration}; {go_on}", file=sys.stderr)
    return status


def flags_to_go_on(config):
    """The flags, as a user would write them, with which a run that was stopped goes on."""
    flags = ["--resume", shlex.quote(config.output_dir)]
    # The other flags are the run's own.  How the process was run is not among them.
    for name in OF_ONE_PROCESS:
        value = getattr(config, name)
        if name in ("resume", "overwrite") or value == getattr(Config, name):
            continue
        flags.append(flag_name(name) if value is True else f"{flag_name(name)} {value}")
    return " ".join(flags)


# ------------------------------------------------------------------------------------------- Set-up


class Clock:
    """Wall seconds by phase: time counts for the phase that was named last."""

    def __init__(self, seconds_before=0.0):
        self.seconds_before = seconds_before  # of the run, before it was resumed
        self.started = self.entered = time.perf_counter()
        self.phase = "other"
        self.phases = {}

    def enter(self, phase):
        """From here on, time counts for this phase."""
        now = time.perf_counter()
        self.phases[self.phase] = self.phases.get(self.phase, 0.0) + now - self.entered
        self.phase = phase
        self.entered = now

    def seconds(self):
        """Seconds of the run so far, over all its resumes."""
        return self.seconds_before + time.perf_counter() - self.started


@dataclasses.dataclass
class Run:
    """What set_up makes ready, and how far the run has come.

    One record instead of twenty variables of main(): every phase says run.config, run.model, ...
    """

    config: Config
    ranks: fsdp.Ranks
    reward: object  # has bounds (r_lo, r_hi) and judge(...)
    model: torch.nn.Module
    tokenizer: object
    head: torch.nn.Module  # the value head
    reference: torch.nn.Module | None  # apo: the base as it was before any training
    optimizer: torch.optim.Optimizer  # of the policy and the head
    score: object  # score(tokens, mask): policy.score of the model, with FSDP's hooks
    value_function: object  # value_function(hidden) -> V, h: what guides the search
    file_problems: list | None  # of --train-file
    eval_problems: list
    inputs: dict  # checksums of the user's files as they were read
    source: str  # the checkpoint that it goes on from, or ""
    # What follows changes while it runs.
    saved: str  # the newest checkpoint, or ""
    iteration: int = 0  # finished iterations
    model_tokens: int = 0  # tokens run through the model for rollouts so far
    clock: Clock | None = None
    lock: int | None = None  # file handle that keeps other runs out of the output folder
    loggers: list = dataclasses.field(default_factory=list)
    evaluated: list = dataclasses.field(default_factory=list)  # rows of metrics.jsonl
    example: dict | None = None  # the first held-out problem, as the last evaluation decoded it
    printed: dict | None = None  # the row that the terminal showed last
    unsolved: int = 0  # iterations since a right completion was last found
    first_iteration: int = 0  # finished when this process began
    signals: list = dataclasses.field(default_factory=list)  # that ask this rank to stop

    def path(self, name):
        """The path of a file in the output folder."""
        return os.path.join(self.config.output_dir, name)

    def say(self, text, file=None):
        """Print on the main rank.  If whoever read the output has gone, the run is to stop."""
        if not self.ranks.is_main:
            return
        try:
            print(text, file=file, flush=True)
        except BrokenPipeError:  # python train.py | head
            evaluation.drop_output()
            self.signals.append(signal.SIGPIPE)


def set_up(config, arguments):
    """Load, check, shard and open everything that a run needs.  Returns a Run.

    All that can be wrong is found here, before anything is written; the output folder comes last.
    Raises ValueError or OSError with one sentence.
    """
    # FSDP does the mixed precision and the offload, so they need it in a single process too.
    sharded = config.mixed_precision == "bf16" or config.cpu_offload
    ranks = fsdp.init_ranks(config.distributed, config.device, sharded, config.replicas)
    # On a CPU offload would mean nothing, and FSDP would fail later with a traceback.
    if config.cpu_offload and ranks.device.type == "cpu":
        raise ValueError("--cpu-offload: the weights are on the CPU already, this flag is for GPUs")
    # Everything cheap comes first: a mistake in a flag is told before a model is loaded.
    reward, inputs = fsdp.raise_everywhere(functools.partial(read_own_files, config), ranks)
    check_same_start(config, inputs, ranks)

    def find_source():
        if arguments.eval_only:
            return arguments.checkpoint, {}
        return find_start(config)

    # The main rank reads the folder and tells the others: read by each, it might differ.
    source, state = fsdp.all_gather(fsdp.on_main(find_source, ranks), ranks)[0]
    bounds = list(reward.bounds)
    if state.get("reward_bounds", bounds) != bounds:
        raise ValueError(
            f"--reward: its bounds are not the {state['reward_bounds']} "
            f"that {source} was trained with"
        )

    load = functools.partial(load_and_shard, config, source, reward, ranks)
    # One by one, because a rank has the whole model until it is split.  If it fails on one rank it
    # fails on all: no rank waits for one that has given up.
    loaded = fsdp.in_turn(load, ranks)
    model, tokenizer, head, reference, file_problems, eval_problems = loaded
    run = Run(
        config=config,
        ranks=ranks,
        reward=reward,
        model=model,
        tokenizer=tokenizer,
        head=head,
        reference=reference,
        optimizer=make_optimizer(model, head, config),
        score=fsdp.with_fsdp_hooks(model, policy.score),
        value_function=evaluation.value_function(
            head, reward.bounds, config.beta, use_head=config.guide == "head"
        ),
        file_problems=file_problems,
        eval_problems=eval_problems,
        inputs=inputs,
        source=source,
        saved=source,
    )
    if not arguments.eval_only:
        open_run(run, state)
    return run


def read_own_files(config):
    """The reward, and the checksums of the user's files.  Raises ValueError or OSError."""
    reward = reward_module.load_reward(config.reward, config.format_bonus, config.length_penalty)
    return reward, input_files(config)


def check_same_start(config, inputs, ranks):
    """Raise ValueError unless all ranks have the main rank's flags and files.

    Each node has a command line and a disk of its own.  inputs: the checksums of its files, which
    count instead of their paths.
    """
    own = {flag_name(name): value for name, value in dataclasses.asdict(config).items()} | inputs
    of_main = fsdp.all_gather(own, ranks)[0]
    differing = [name for name in own if own[name] != of_main[name]]

    def refuse():
        if differing:
            raise ValueError(f"{differing[0]} is not that of rank 0: start all nodes alike")

    fsdp.raise_everywhere(refuse, ranks)


def load_and_shard(config, source, reward, ranks):
    """What load_everything returns, with the models and the head split over the ranks.

    Parallelism is applied to finished models; from here on the code is that of one process.
    """
    try:
        loaded = load_everything(config, source, reward, ranks)
    except ValueError:
        if source and not os.path.isdir(source):  # it was whole when it was found
            raise ValueError(
                f"{source} was removed while it was read (is a run going on there?), "
                "or this node does not see it"
            ) from None
        raise
    model, tokenizer, head, reference, file_problems, eval_problems = loaded
    shard_model = functools.partial(
        fsdp.shard,
        ranks=ranks,
        mixed_precision=config.mixed_precision == "bf16",
        offload=config.cpu_offload,
    )
    model = shard_model(model, blocks=policy.transformer_blocks(model))
    head = fsdp.shard(head, ranks, offload=config.cpu_offload)  # in float32
    if reference is not None:
        reference = shard_model(reference, blocks=policy.transformer_blocks(reference))
    return model, tokenizer, head, reference, file_problems, eval_problems


def open_run(run, state):
    """Restore the optimiser and the counts of a checkpoint, then take the output folder.

    The folder is changed last.  A run that cannot write a checkpoint there leaves it as it was.
    """
    config = run.config
    run.iteration = run.first_iteration = state["iteration"]
    run.model_tokens = state["model_tokens"]
    if run.source:

        def load_moments():
            fsdp.load_optimizer(run.source, run.model, run.head, run.optimizer)
            swap_average(run.optimizer)  # the checkpoint's model is the average

        fsdp.raise_everywhere(load_moments, run.ranks)

    def open_loggers_and_lock():
        # A resumed run writes its logs from the iteration after its checkpoint on.
        first = run.iteration + 1 if run.source else 0
        loggers = open_loggers(config, first)
        return loggers, fsdp.lock_folder(config.output_dir)

    opened = fsdp.on_main(open_loggers_and_lock, run.ranks)
    if run.ranks.is_main:
        run.loggers, run.lock = opened
    run.clock = Clock(state["seconds"])
    try:
        prepare_output(run, state["found"])
    except ValueError:
        if run.lock is not None:
            os.close(run.lock)
        raise
    iterations = state.get("config", {}).get("iterations", config.iterations)
    if iterations != config.iterations:
        run.say(
            f"--iterations {config.iterations}, before {iterations}: from here on the learning "
            "rate follows the cosine of the new length"
        )
    threads = state.get("threads", torch.get_num_threads())
    if threads != torch.get_num_threads():
        run.say(
            f"train.py: {run.source} was trained with {threads} threads, this run has "
            f"{torch.get_num_threads()}: sums round differently, so it is the same run only up to "
            f"rounding (--threads {threads} makes it the same)",
            file=sys.stderr,
        )


def prepare_output(run, found):
    """Prove that a checkpoint can be written, then make the locked output folder ready.

    A run that goes on in its own folder has written checkpoints there before.
    found: the checkpoints that find_start saw.  A collective.  Raises ValueError.
    """
    config = run.config
    if run.source not in found:
        fsdp.try_checkpoint(
            config.output_dir,
            run.model,
            run.tokenizer,
            run.head,
            run.optimizer,
            state=trainer_state(run),
            ranks=run.ranks,
        )

    def make_ready():
        return open_output(config, run.source, run.iteration, found)

    rows = fsdp.on_main(make_ready, run.ranks)
    if run.ranks.is_main:  # after a resume: the evaluations before it
        run.evaluated = [row for row in rows if "eval_accuracy" in row]


def load_everything(config, source, reward, ranks):
    """Load the problems, the models and the head, and check that they fit together.

    source: the checkpoint folder to go on from, or "".  Returns (model, tokenizer, head, reference
    model or None, problems of --train-file or None, evaluation problems).  Raises ValueError with
    the first thing that is wrong.
    """
    file_problems, eval_problems = load_problem_sets(config)
    # A model to be sharded is loaded on the CPU; each block moves to the device when it is split.
    device = ranks.device if ranks.mesh is None else "cpu"
    model, tokenizer = policy.load_policy(
        source or config.model,
        dtype=torch.float32,
        device=device,
        gradient_checkpointing=config.gradient_checkpointing == "on",
        freeze_blocks=config.freeze_blocks,
    )
    policy.use_threads(model, config.threads)
    if file_problems is None:
        examples = []
        for i in range(64):
            examples.append(data.train_problem(config.seed, 0, i, config.digits, config.prompt))
    else:
        examples = file_problems
    # A reward of one's own may fail: then now, and not after hours.
    for problem in (examples[0], eval_problems[0]):
        for text in ("", f"<answer>{problem.answer}</answer>"):
            reward.judge(problem, problem.prefill + text)
    prompts = evaluation.encode_prompts(tokenizer, examples + eval_problems)
    evaluation.check_known(tokenizer, examples + eval_problems)
    longest = max(len(prompt) for prompt in prompts)
    policy.check_context(model, longest, config.max_new_tokens)
    if ranks.is_main:  # the others have the same model, and learn of a failure
        check_log_probs(model, longest + config.max_new_tokens, config, ranks)
    check_search_size(config, vocabulary=model.get_output_embeddings().weight.shape[0])
    head = load_head(config, source, model)
    reference = None
    if config.loss == "apo":
        reference, _ = policy.load_policy(config.model, dtype=torch.float32, device=device)
        reference.requires_grad_(False)
    return model, tokenizer, head, reference, file_problems, eval_problems


def load_problem_sets(config):
    """(problems of --train-file or None, evaluation problems).  Raises ValueError, OSError."""
    any_answer = bool(config.reward)
    file_problems = None
    if config.train_file:
        file_problems = data.read_problems(config.train_file, any_answer=any_answer)
    if config.eval_file:
        eval_problems = data.read_problems(config.eval_file, any_answer=any_answer)
        eval_problems = eval_problems[: config.eval_problems]
    else:
        eval_problems = data.eval_problems(config.eval_problems, config.digits, config.prompt)
    return file_problems, eval_problems


def check_log_probs(model, longest, config, ranks):
    """Raise ValueError unless the search computes the model's own log pi, up to `longest` tokens.

    The probes run on the device of the rollouts: a CPU would take minutes for a large model.  A
    model that fits there only when it is sharded is checked where it is.
    """
    home = model.device
    try:
        model.to(ranks.device)
    except torch.OutOfMemoryError:
        model.to(home)
    training = config.gradient_checkpointing == "on"
    astar_search.check_model(model, longest=longest, training=training)
    model.to(home)


def check_search_size(config, vocabulary):
    """Raise ValueError if a search is asked for more leaves than can exist within its bounds."""
    # Each node that a search expands adds at most V - 1 leaves to a tree of one.  At depth T there
    # are at most V^T.
    T = config.max_new_tokens
    most = min(config.max_nodes * (vocabulary - 1) + 1, vocabulary ** min(T, 64))
    if config.rollout == "astar" and config.rollouts_per_problem > most:
        raise ValueError(
            f"--rollouts-per-problem: within --max-nodes {config.max_nodes} and "
            f"--max-new-tokens {T} only {most} different completions can exist"
        )


def load_head(config, source, model):
    """The value head of a checkpoint, or a new one.  Raises ValueError if it does not fit."""
    torch.manual_seed(config.seed)  # for the head's first layer; nothing else is drawn from torch
    head = value_module.ValueHead(model.config.get_text_config().hidden_size)
    if source:
        try:
            head.load_state_dict(load_file(os.path.join(source, "value.safetensors")))
        except RuntimeError:
            raise ValueError(
                f"{source}: its value head is of another model size, or incomplete"
            ) from None
    return head


def make_optimizer(model, head, config):
    """AdamW for the policy and the head; the loop scales the `peak` rate of each group.

    Adam's usual beta2 of 0.999, which the head keeps, averages over a thousand steps.  A run may
    have no more than that in all: too long for a policy that changes.  Weight decay is for
    matrices alone; norms and biases are not to be drawn to zero.
    """
    groups = []
    for module, betas, peak in (
        (model, (0.9, 0.95), config.learning_rate),
        (head, (0.9, 0.999), config.value_learning_rate),
    ):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        vectors = [parameter for parameter in trained if parameter.ndim < 2]
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            groups.append(
                {"params": parameters, "betas": betas, "weight_decay": decay, "peak": peak}
            )
    # A fused step is one kernel for all parameters, and it makes no temporary copies of them.  On a
    # CPU it rounds otherwise than the plain step, by which the published runs were made.
    on_gpu = next(model.parameters()).is_cuda or config.cpu_offload
    return torch.optim.AdamW(groups, fused=on_gpu)


# ----------------------------------------------------------------------------------- A run's folder

RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl")
# May differ between a run and its continuation: where and how fast it runs, and what it writes.  A
# run with any other flag changed would be a mixture of two, and no seed could give it again.  More
# iterations stretch the cosine of the learning rate.
FREE_ON_RESUME = """
    iterations device threads distributed replicas cpu_offload output_dir eval_every
    eval_completions checkpoint_every keep_checkpoints samples resume overwrite micro_batch model
    rollout_batch wandb tensorboard
""".split()
INPUTS = ("train_file", "eval_file", "reward")  # the user's files are compared by content


def check_output_folder(config, checkpoints):
    """Raise ValueError unless this run may write into its output folder.  Changes nothing."""
    folder = os.path.realpath(config.output_dir)
    if os.path.isfile(folder):
        raise ValueError(f"--output-dir {folder}: this is a file, give a folder")
    held = list(checkpoints)
    for name in RUN_FILES:
        if os.path.exists(os.path.join(folder, name)):
            held.append(name)
    if "config.json" in held:
        with open(os.path.join(folder, "config.json")) as file:
            if '"output_dir"' not in file.read():  # it is a model's, not to be cleared for a run
                raise ValueError(
                    f"--output-dir {folder}: its config.json is not a run's, "
                    "so the folder is left alone"
                )
    for path in (config.model, config.train_file, config.eval_file):
        if config.overwrite and path and os.path.realpath(path).startswith(folder + os.sep):
            raise ValueError(
                f"--overwrite would remove {path}, which this run needs: give another --output-dir"
            )
    resumes_here = config.resume == "auto" or (
        config.resume and os.path.dirname(os.path.realpath(config.resume)) == folder
    )
    if held and not resumes_here and not config.overwrite:
        raise ValueError(
            f"--output-dir {folder} holds another run: "
            "add --resume auto, --overwrite or another --output-dir"
        )


def input_files(config):
    """Checksums of the user's files that a run depends on: {flag: text}.

    Of a reward of one's own: of its file, of the files beside it that it imports, and the name of
    the function.  Under apo of the base model too, which is the reference policy, if it is a
    folder.  Raises OSError if a file is missing.
    """
    files = {}
    function = ""
    if config.train_file:
        files["train_file"] = [config.train_file]
    if config.eval_file:
        files["eval_file"] = [config.eval_file]
    if config.reward:
        path, _, function = config.reward.rpartition(":")
        files["reward"] = reward_module.source_files(path)
    if config.loss == "apo" and os.path.isdir(config.model):
        files["model"] = []
        for name in sorted(os.listdir(config.model)):
            if name == "config.json" or name.endswith(".safetensors"):
                files["model"].append(os.path.join(config.model, name))
    checksums = {}
    for name, paths in files.items():
        marks = [checksum(path) for path in paths]
        if name == "reward":
            marks.append(function)
        checksums[flag_name(name)] = " ".join(marks)
    return checksums


def checksum(path):
    """The SHA-256 of a file.  A pipe can be read only once, so of a pipe it is the name."""
    if os.path.exists(path) and not os.path.isfile(path):
        return str(path)
    return fsdp.fingerprint(path)["sha256"]


def check_same_run(config, state, source):
    """Raise ValueError if a flag or a file differs that makes it another run."""
    inputs = input_files(config)
    # A checkpoint of an earlier version has no checksums.  Then the paths must be the same.
    by_content = "inputs" in state
    inputs_before = state.get("inputs", inputs)
    for name in sorted(inputs.keys() | inputs_before.keys()):
        if inputs.get(name) != inputs_before.get(name):
            raise ValueError(
                f"{name}: the file or function is not the one that {source} was trained with; "
                "go on with the old one, or start a new run"
            )
    defaults = dataclasses.asdict(Config())
    for name, given in dataclasses.asdict(config).items():
        free = name in FREE_ON_RESUME
        if name in INPUTS:
            free = by_content
        if name == "model" and config.loss == "apo":  # the base is the reference policy
            free = by_content and flag_name(name) in inputs
        # A flag that is younger than the checkpoint had its default.
        before = state["config"].get(name, defaults[name])
        if not free and given != before:
            raise ValueError(
                f"{flag_name(name)} {given} differs from the {before} that {source} was trained "
                f"with; --resume {os.path.dirname(source)} takes that run's own flags"
            )


def find_start(config):
    """Where the run begins: (checkpoint folder or "", its trainer state).  Changes nothing.

    The state also has `found`, the checkpoints of the output folder.  A damaged checkpoint is
    passed over for the one before it, and that is said.  Raises ValueError if the output folder
    cannot be used, if another run writes there, if no checkpoint is whole, or if its run had other
    flags.
    """
    if os.path.isdir(config.output_dir):
        # A run that is alive may remove a checkpoint while it is read here.  So the lock is tried
        # first; it is taken for good when the folder is opened.
        os.close(fsdp.lock_folder(config.output_dir))
    found = fsdp.list_checkpoints(config.output_dir)
    check_output_folder(config, found)
    # Of these checkpoints the first that is whole is taken.
    if config.resume == "auto":
        candidates = found[::-1]  # the newest first
    elif config.resume:
        candidates = [config.resume]
    else:
        candidates = []
    for i, source in enumerate(candidates):
        try:
            state = fsdp.read_trainer_state(source)
        except ValueError as error:
            if i + 1 == len(candidates):
                raise
            older = candidates[i + 1]
            print(f"train.py: {error}; going back to {older}", file=sys.stderr)
            continue
        check_same_run(config, state, source)
        return source, {**state, "found": found}
    return "", {"iteration": 0, "model_tokens": 0, "seconds": 0.0, "found": found}


def open_output(config, source, iteration, found):
    """Make the output folder, which is locked, ready to go on after `iteration`.

    A new run starts empty; a resumed one is cut back to its checkpoint.  found: the checkpoints
    that find_start saw.  Returns the rows of metrics.jsonl that are kept.  Raises ValueError if
    another run has written there since.
    """
    folder = config.output_dir
    if fsdp.list_checkpoints(folder) != found:  # asked again, because loading the model took time
        raise ValueError(f"--output-dir {folder}: another run has just written there: start again")
    last = iteration if source else None
    rows = fsdp.cut_back(os.path.join(folder, "metrics.jsonl"), last)
    fsdp.cut_back(os.path.join(folder, "samples.jsonl"), last)
    fsdp.prune_checkpoints(folder, iteration, config.keep_checkpoints)
    config_text = json.dumps(dataclasses.asdict(config), indent=1)
    fsdp.write_file(os.path.join(folder, "config.json"), config_text)
    return rows


# ------------------------------------------------------------------------------------- Command line


def companion_flags(given, preset):
    """The flags that the given ones bring along: {field: value}.

    given: {field: value} of the command line; preset: the same of --config.
    """
    companions = {}
    for (name, value), flags in COMPANIONS.items():
        if given.get(name) == value and preset.get(name) != value:
            companions |= flags
    return {
        name: value
        for name, value in companions.items()
        if name not in given and name not in preset
    }


def flags_of_checkpoint(folder, check_files=True):
    """{field: value} of the run that wrote a checkpoint, but for how that process was run.

    check_files: see fsdp.read_trainer_state, whose ValueError it passes on.
    """
    flags = fsdp.read_trainer_state(folder, check_files)["config"]
    for field in dataclasses.fields(Config):
        if field.name in flags:
            try:
                check_kind(field, flags[field.name])
            except ValueError as error:
                raise ValueError(f"{folder}: trainer_state.json is damaged: {error}") from None
    for name in OF_ONE_PROCESS:
        flags.pop(name, None)
    return flags


def flags_of_run(folder, given):
    """{field: value} with which --resume FOLDER goes on: those of the run there, in its folder.

    folder: a run's, or a checkpoint.  given: {field: value} of the command line; with another
    --output-dir the run goes on there.  find_start checks the files, so here they are read only to
    choose among checkpoints.  Raises ValueError if no checkpoint tells its flags.
    """
    checkpoints = fsdp.list_checkpoints(folder)
    if not checkpoints:
        flags = flags_of_checkpoint(folder, check_files=False)
        return flags | {"resume": folder, "output_dir": os.path.dirname(os.path.abspath(folder))}
    # In its own folder find_start looks for the newest checkpoint that is whole.
    at_home = os.path.realpath(given.get("output_dir", folder)) == os.path.realpath(folder)
    for source in reversed(checkpoints):
        try:
            flags = flags_of_checkpoint(source, check_files=not at_home)
            break
        except ValueError:
            if source == checkpoints[0]:
                raise
    return flags | {"resume": "auto" if at_home else source, "output_dir": folder}


def parse_arguments(argv=None):
    """argv -> (Config, arguments, parser).  A mistake is one sentence on stderr, exit status 2.

    arguments.companions: the flags that others brought along.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    arguments.companions = {}
    given = {}
    for field in dataclasses.fields(Config):
        if hasattr(arguments, field.name):
            given[field.name] = getattr(arguments, field.name)
    try:
        if arguments.eval_only != bool(arguments.checkpoint):
            raise ValueError("--eval-only and --checkpoint FOLDER go together")
        if arguments.eval_only and arguments.config:
            raise ValueError("--eval-only takes the flags of the checkpoint: leave --config out")
        if arguments.eval_only and "model" in given:
            raise ValueError("--eval-only evaluates the model of --checkpoint: leave --model out")
        if arguments.eval_only:
            arguments.checkpoint = fsdp.newest_checkpoint(arguments.checkpoint)
            preset = flags_of_checkpoint(arguments.checkpoint)
        elif given.get("resume", "auto") not in ("", "auto") and not arguments.config:
            preset = flags_of_run(given.pop("resume"), given)
        else:
            preset, from_file = arguments.config or (PRESETS["local"], {})
            given = from_file | given
            arguments.companions = companion_flags(given, preset)
        config = Config(**{**preset, **arguments.companions, **given})
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    return config, arguments, parser


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as interrupt:
        what = f": {interrupt}" if str(interrupt) else ""  # what a reward was doing
        print(f"train.py: stopped by Ctrl-C{what}", file=sys.stderr)
        sys.exit(130)
    except reward_module.RewardError as error:  # of --eval-only
        sys.exit(f"train.py: {error}")
    except BrokenPipeError:  # both streams were piped, as in: python train.py 2>&1 | head
        evaluation.drop_output()
