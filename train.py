"""train.py -- A*PO, top to bottom: reinforcement learning of a base language model with A* search rollouts.

    problems -> A* search over KV-cached prefixes -> Rollouts -> reward -> advantages -> PPO-clip and value loss

    python train.py                                   # the tiny base on a CPU (or GPU), no download
    python train.py --config quick                    # the same base to 80 % in a minute
    python train.py --config ppo                      # Gumbel A* and PPO-clip with GAE
    python train.py --rollout sample --rollouts-per-problem 4      # i.i.d. sampling: the baseline
    torchrun --standalone --nproc_per_node=4 train.py --config training --distributed      # Qwen2.5-3B on four GPUs
    python train.py --resume auto                     # go on after a stop
    python train.py --eval-only --checkpoint runs/local/checkpoint_iter_360

The loop is `main()`, one phase after the other.  Above it are the flags, checkpoints, and what the phases consist of; the
folder of a run, with its lock and what is left of a stopped run, is in experiments/run_folder.py.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import math
import os
import random
import resource
import shutil
import signal
import sys
import time

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import astar_search
import data
import eval as evaluation
import fsdp
import policy
import reward as reward_module
import value as value_module
from experiments import logs, memory, run_folder

# ======================================================================================================== flags
def flag(default, help, choices=None, low=-math.inf, high=math.inf, above=-math.inf):
    """A Config field: its default, what it means, and what is allowed."""
    metadata = {"help": help, "choices": choices, "low": low, "above": above, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """Every field is a flag: --rollouts-per-problem 8.  `low`, `high` are allowed, `above` is not.  Raises ValueError
    for a number out of bounds, and for flags that contradict each other."""

    # the task
    model: str = flag(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tiny_base"), "folder or hub id of the base model")
    prompt: str = flag("terse", "prompt style", choices=tuple(data.PROMPTS))
    digits: str = flag("2", "digits per operand: 2, 3, 2x3, 2-3, ... up to 6")
    train_file: str = flag("", "jsonl file of training problems with prompt and answer, instead of made ones")
    eval_file: str = flag("", "jsonl file of evaluation problems")
    reward: str = flag("", "FILE.py:FUNCTION, a reward of your own; then the two sizes below mean nothing")
    format_bonus: float = flag(0.1, "added to the reward of a well-formed completion", low=0)
    length_penalty: float = flag(0.0, "taken off the reward of a completion of full length, in proportion", low=0)
    # rollouts
    rollout: str = flag("astar", "A* search, or i.i.d. sampling", choices=("astar", "sample"))
    problems_per_iteration: int = flag(64, "problems an iteration", low=1)
    rollouts_per_problem: int = flag(64, "K: leaves a search may accept, or completions sampled", low=1)
    tau: float = flag(0.0, "0: plain A*;  1: Gumbel search, draws without replacement", low=0, high=1)
    beta: float = flag(0.2, "temperature of the soft value h", above=0)
    guide: str = flag("head", "h of the search: the value head's, or 0", choices=("head", "none"))
    until_right: str = flag("on", "a search is done with its first right leaf (for --loss em)", choices=("on", "off"))
    cover: float = flag(1.0, "a problem is done when its leaves hold this much of pi; 1 for never", above=0, high=1)
    leaf_weights: str = flag("on", "weigh leaves by pi/q in all losses", choices=("on", "off"))
    max_new_tokens: int = flag(48, "longest completion in tokens", low=1)
    max_nodes: int = flag(128, "most nodes a search may expand for one problem", low=1)
    max_open: int = flag(65536, "longest queue of a search; beyond it the worst entries are dropped (a beam)", low=1)
    width: int = flag(2, "nodes of one problem that a round may run at once", low=1)
    rollout_batch: int = flag(256, "problems searched in lock-step", low=1)
    # losses
    loss: str = flag("em", "policy loss", choices=("ppo", "grpo", "em", "apo"))
    gae_lambda: float = flag(0.95, "lambda of GAE", low=0, high=1)
    clip: float = flag(0.2, "epsilon of PPO's clip (ppo, grpo, em)", above=0)
    entropy_coef: float = flag(0.0, "weight of the entropy bonus (ppo, grpo, em)", low=0)
    beta1: float = flag(0.5, "apo: temperature of V*, estimated on samples of the base", above=0)
    beta2: float = flag(0.001, "apo: temperature of the regression", above=0)
    apo_samples: int = flag(8, "apo: samples of the base a problem for V*", low=1)
    # optimisation
    iterations: int = flag(360, "iterations in all", low=1)
    epochs: int = flag(2, "passes over the rollouts an iteration", low=1)
    minibatches: int = flag(2, "optimiser steps a pass", low=1)
    micro_batch: int = flag(64, "rollouts a forward in training; changes memory, not the result", low=1)
    learning_rate: float = flag(2e-4, "peak learning rate of the policy", above=0)
    value_learning_rate: float = flag(1e-3, "peak learning rate of the value head", above=0)
    warmup: int = flag(1, "iterations of linear warm-up, before the cosine", low=0)
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
    eval_every: int = flag(20, "iterations between evaluations; there is one before the first and at the end", low=1)
    eval_problems: int = flag(500, "held-out problems of an evaluation; of a file the first", low=1)
    eval_decode: str = flag("greedy", "how; sample, astar: K completions", choices=("greedy", "sample", "astar"))
    checkpoint_every: int = flag(20, "iterations between checkpoints (there is one at the end)", low=1)
    keep_checkpoints: int = flag(2, "older checkpoints than the newest n are removed", low=1)
    samples: int = flag(4, "rollouts an iteration written to samples.jsonl", low=0)
    wandb: bool = flag(False, "log to Weights & Biases too")
    tensorboard: bool = flag(False, "log to TensorBoard too, in the output folder")
    resume: str = flag("", "auto: from the newest checkpoint of the output folder; or a checkpoint folder")
    overwrite: bool = flag(False, "remove the run that the output folder holds")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            x, (low, above, high) = getattr(self, f.name), (f.metadata[bound] for bound in ("low", "above", "high"))
            if not isinstance(x, str) and not (low <= x <= high and above < x < math.inf):  # a NaN fails each of these
                bounds = {"at least": low, "above": above, "at most": high}
                words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))
                raise ValueError(f"--{f.name.replace('_', '-')} must be {words}, not {x}")
        data.parse_digits(self.digits)
        if self.minibatches > (N := self.problems_per_iteration):
            raise ValueError(f"--minibatches {self.minibatches} is more than --problems-per-iteration {N}")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other")
        for package in ("wandb", "tensorboard"):
            if getattr(self, package) and not importlib.util.find_spec(package):
                raise ValueError(f"--{package}: the package is not installed: pip install {package}")


# Draws without replacement, weighted pi/q, under PPO-clip with GAE: unbiased but for the head's h and the stop by mass,
# and for answers so long that plain A* might not finish one; the tiny base needs more tokens (README, "Measured").
PPO = dict(
    loss="ppo", tau=1.0, until_right="off", cover=0.8, rollouts_per_problem=8, max_nodes=1024, problems_per_iteration=256,
    minibatches=4, epochs=1, learning_rate=3e-4, warmup=8, iterations=90, eval_every=10, checkpoint_every=10,
)  # fmt: skip
PRESETS = {
    "local": {},  # plain A*, guided by the head, until a leaf is right; leaves weighted towards pi*
    "quick": dict(output_dir="runs/quick", iterations=24, eval_every=6),  # 80 % in a minute
    "ppo": PPO | dict(output_dir="runs/ppo"),
    "training": PPO | dict(
        model="Qwen/Qwen2.5-3B", prompt="tinyzero", digits="2-3", output_dir="runs/training", max_new_tokens=1024,
        max_nodes=16384, iterations=200, learning_rate=1e-6, value_learning_rate=1e-4, warmup=10, micro_batch=4,
        gradient_checkpointing="on", mixed_precision="bf16", problems_per_iteration=128, rollout_batch=32, cover=0.9,
    ),
}  # fmt: skip


def parse(argv):
    """argv -> (Config, args, refuse).  Anything wrong is one sentence on stderr and exit status 2."""
    how = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = evaluation.OneSentence("train.py", description=__doc__, **how)
    parser.add_argument("--config", choices=tuple(PRESETS), default="local", help="preset; flags change it")
    parser.add_argument("--eval-only", action="store_true", help="evaluate --checkpoint and exit")
    parser.add_argument("--checkpoint", help="checkpoint folder for --eval-only")
    parser.add_argument("--dry-run", action="store_true", help="print the memory that a rank needs, and exit")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="--dry-run: refuse what does not fit a GPU")
    fields = dataclasses.fields(Config)
    for f in fields:
        default = f" (default {f.default})" if f.default not in ("", False) else ""
        how = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": f.metadata["choices"]}
        how |= {"help": f.metadata["help"] + default, "default": argparse.SUPPRESS}
        parser.add_argument("--" + f.name.replace("_", "-"), **how)
    args = parser.parse_args(argv)
    try:
        if args.eval_only != bool(args.checkpoint):
            raise ValueError("--eval-only and --checkpoint FOLDER go together")
        if args.gpu_memory is not None and not (args.dry_run and 0 < args.gpu_memory < math.inf):
            raise ValueError("--gpu-memory GIB is for --dry-run, and above 0")
        # A checkpoint is evaluated as its run was configured, but for what is on or off, such as --distributed.
        preset = run_folder.read_state(args.checkpoint)["config"] if args.eval_only else PRESETS[args.config]
        preset = {name: x for name, x in preset.items() if x is not True}
        config = Config(**(preset | {f.name: getattr(args, f.name) for f in fields if hasattr(args, f.name)}))
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    return config, args, parser.error


# ================================================================================================== checkpoints
def named_parameters(model, head):
    """Every weight by name.  Adam's moments are saved under it, not by number or rank: so they outlive a change in the
    number of ranks."""
    both = (("policy", model), ("value", head))
    return {f"{kind}.{name}": parameter for kind, module in both for name, parameter in module.named_parameters()}


def save_checkpoint(config, iteration, model, tokenizer, head, optimizer, progress, ranks):
    """OUTPUT/checkpoint_iter_N: a Hugging Face folder plus value.safetensors, optimizer.safetensors, trainer_state.json.
    Written aside, synced, renamed: whoever sees the name sees a whole checkpoint.  All ranks help to put the tensors
    together; the main one writes.  Raises OSError, and leaves nothing behind, if it cannot be written."""
    final, aside = (os.path.join(config.output_dir, f"{dot}checkpoint_iter_{iteration}") for dot in ("", "."))
    weights, head_weights = (fsdp.full_state(fsdp.state_of(module), ranks) for module in (model, head))
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in named_parameters(model, head).items()}
    moments = fsdp.full_state({f"{name}.{key}": x for name, own in states.items() for key, x in own.items()}, ranks)
    if not ranks.is_main:
        return final
    try:
        os.makedirs(aside)
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        save_file(head_weights, os.path.join(aside, "value.safetensors"))
        save_file(moments, os.path.join(aside, "optimizer.safetensors"))
        run_folder.seal(aside, final, {"iteration": iteration, **progress, "config": dataclasses.asdict(config)})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{final} cannot be written ({error})") from None
    run_folder.prune(config, iteration)  # only now may an older one go
    return final


def restore(folder, model, head, optimizer):
    """The optimiser's state; the model and the head were loaded from the folder before.  Raises ValueError."""
    parameters = named_parameters(model, head)
    with safe_open(os.path.join(folder, "optimizer.safetensors"), "pt") as moments:  # one tensor at a time
        for full_name in moments.keys():
            name, _, key = full_name.rpartition(".")
            tensor, parameter = moments.get_tensor(full_name), parameters.get(name)
            if parameter is None or (key != "step" and tensor.shape != parameter.shape):
                raise ValueError(f"{folder}: the optimiser state of {name} is of another model size")
            optimizer.state[parameter][key] = tensor if key == "step" else fsdp.placed(tensor, parameter)


@contextlib.contextmanager
def hold(numbers, received):
    """Inside, these signals wait in `received` until the loop asks: an iteration happens whole or not at all."""
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ================================================================================================ the phases
def load_everything(config, source, reward, ranks):
    """What a run needs besides the optimiser: (model, tokenizer, value head, base model for apo or None, problems of
    --train-file or None, evaluation problems).  Raises ValueError with the first thing that is wrong."""
    read = functools.partial(data.read_problems, any_answer=bool(config.reward))
    train_file = read(config.train_file) if config.train_file else None
    if config.eval_file:
        eval_set = read(config.eval_file)[: config.eval_problems]
    else:
        eval_set = data.eval_problems(config.eval_problems, config.digits, config.prompt)
    # A model to be sharded is loaded on the CPU; each block moves to the device when it is split.
    device = ranks.device if ranks.mesh is None else "cpu"
    how = (torch.float32, device, config.gradient_checkpointing == "on", config.freeze_blocks)
    model, tokenizer = policy.load_policy(source or config.model, *how)
    astar_search.check_model(model)
    examples = train_file or [data.train_problem(config.seed, 0, i, config.digits, config.prompt) for i in range(64)]
    for problem in (examples[0], eval_set[0]):  # a reward of one's own may fail: now, and not after hours
        for text in ("", f"<answer>{problem.answer}</answer>"):
            reward.judge(problem, problem.prefill + text)
    longest = max(map(len, evaluation.encode(tokenizer, examples + eval_set)))
    policy.check_context(model, longest, config.max_new_tokens)
    # Each node that a search expands adds at most V - 1 leaves to a tree of one; at depth T there are at most V^T.
    V, T = model.get_output_embeddings().weight.shape[0], config.max_new_tokens
    most = min(config.max_nodes * (V - 1) + 1, V ** min(T, 64))
    if config.rollout == "astar" and config.rollouts_per_problem > most:
        bounds = f"--max-nodes {config.max_nodes} and --max-new-tokens {T}"
        raise ValueError(f"--rollouts-per-problem: within {bounds} only {most} different completions can exist")
    torch.manual_seed(config.seed)  # the first layer of the value head; nothing else is drawn from torch
    head = value_module.ValueHead(model.config.get_text_config().hidden_size)
    if source:
        try:
            head.load_state_dict(load_file(os.path.join(source, "value.safetensors")))
        except RuntimeError:
            raise ValueError(f"{source}: its value head is of another model size") from None
    apo = config.loss == "apo"  # pi_ref: the base as it was before any training
    base = policy.load_policy(config.model, torch.float32, device)[0].requires_grad_(False) if apo else None
    return model, tokenizer, head, base, train_file, eval_set


def draw_problems(config, iteration, ranks, from_file):
    """This rank's share of the iteration's problems, and their global numbers."""
    N = config.problems_per_iteration
    made = lambda i: data.train_problem(config.seed, iteration, i, config.digits, config.prompt)
    read = lambda i: data.pick_problem(from_file, config.seed, iteration - 1, i, N)  # the epochs of a file count from 0
    return [(read if from_file else made)(i) for i in fsdp.share(N, ranks)], list(fsdp.share(N, ranks))


def make_rollouts(model, tokenizer, problems, keys, config, reward, value, kind, K):
    """Search or sample completions for problems, `rollout_batch` of them in lock-step: a round of all their searches is
    one forward.  kind: "astar" or "sample"; value: guide of the search, or None for h = 0.  Returns one Rollouts."""
    parts = []
    for start in range(0, max(1, len(problems)), config.rollout_batch):  # a rank may have no problems: no rollouts then
        chunk = slice(start, start + config.rollout_batch)
        done = evaluation.is_right(tokenizer, problems[chunk], reward, config.max_new_tokens)
        options = astar_search.Options(
            policy.stop_tokens(model, tokenizer), K=K, tau=config.tau, width=config.width, max_nodes=config.max_nodes,
            max_new_tokens=config.max_new_tokens, max_open=config.max_open, done=done if config.until_right == "on" else None,
            cover=config.cover if config.cover < 1 else math.inf,
        )  # fmt: skip
        prompts = evaluation.encode(tokenizer, problems[chunk])
        expander = astar_search.Expander(model, prompts, config.max_new_tokens, value)
        trees = (astar_search.search if kind == "astar" else astar_search.sample)(keys[chunk], expander, options)
        parts.append(astar_search.collect(trees, expander))
        parts[-1].problem += start
    return astar_search.join(parts)


def learning_rate_scale(config, iteration):
    """Linear warm-up, while the head's first advantages are noise, then a cosine down to final_rate; iteration counts
    from 1."""
    if iteration <= config.warmup:
        return iteration / config.warmup
    progress = (iteration - config.warmup) / max(1, config.iterations - config.warmup)
    # eta(i)/eta = f + (1 - f) (1 + cos(pi p))/2
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
    # By problem, not by leaf: the leaves of a problem are weighted against each other, and stay together.
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
def score_all(model, rollouts, indices, config, iteration, device):
    """log pi (B, T-1) of rollouts under a model by the forward that training uses, in the micro-batches of the first
    epoch: then it is exactly what the first update computes again."""
    logprobs = torch.zeros_like(rollouts.logprobs)
    for rows in sum(minibatches_of(rollouts, indices, config, iteration, epoch=0), []):
        part = rollouts.select(rows, device)
        logp, _, _ = policy.score(model, part.tokens, part.mask)
        logprobs[rows, : logp.shape[1]] = logp.cpu()
    return logprobs


def credit(rollouts, verdicts, reward, config):
    """What the losses need of each leaf: {rewards, soft_targets, leaf_weight (B,), advantages (B, T-1)}."""
    rewards, mask = torch.tensor([verdict["reward"] for verdict in verdicts]), rollouts.mask
    soft_targets = value_module.soft_target(rewards, *reward.bounds, config.beta)
    # Leaves of a search are no samples of pi.  pi/q (at tau = 0: pi) makes them stand for all; without it each counts alike.
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
    mask, old, extra, rewards = part.mask, part.logprobs, part.extra, part.extra["rewards"]
    weights = extra["leaf_weight"][:, None] * mask / token_total  # (B, T-1): a leaf counts by its weight and its tokens
    logp, entropy, hidden = score(part.tokens, mask)
    if config.loss == "apo":
        known = extra["ref_logprobs"], mask, rewards, extra["optimal_value"]
        policy_loss, metrics = policy.apo_loss(logp, *known, config.beta2, extra["leaf_weight"] / leaf_total)
    else:  # grpo and em differ from ppo in their advantages alone
        known = old, extra["advantages"], entropy, weights
        policy_loss, metrics = policy.ppo_loss(logp, *known, config.clip, config.entropy_coef)
    metrics |= policy.ratio_metrics(logp, old, entropy, weights, config.clip)
    V, u_logit = head(hidden)
    returns, targets = (value_module.monte_carlo_returns(x, mask) for x in (rewards, extra["soft_targets"]))
    value_loss, value_metrics = value_module.value_loss(V, u_logit, returns, targets, weights)
    return policy_loss + value_loss, metrics | value_metrics


def idle_loss(score, head, device):
    """Zero, by way of every weight: a rank with fewer micro-batches than another still joins the gathering of weights
    and the adding up of gradients, which wait for all ranks."""
    tokens, mask = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    logp, _, hidden = score(tokens.to(device), mask.to(device))
    return 0.0 * (logp.sum() + sum(out.sum() for out in head(hidden)))


def update(model, score, head, optimizer, rollouts, indices, config, iteration, ranks):
    """Passes of the loss over one batch of rollouts, an optimiser step a minibatch.

    score(tokens, mask): policy.score of the model, through FSDP's hooks.  indices: global numbers of this rank's
    problems.  rollouts.extra holds `rewards`, `soft_targets`, `leaf_weight` (B,), `advantages` (B, T-1), and for apo
    `optimal_value` (B,), `ref_logprobs` (B, T-1).  optimizer: two groups of parameters, the model's and the head's.
    Returns metrics, averaged over the steps, the same on all ranks.  Raises FloatingPointError at a NaN, before the
    step that would spread it.
    """
    for group, peak in zip(optimizer.param_groups, (config.learning_rate, config.value_learning_rate)):
        group["lr"] = peak * learning_rate_scale(config, iteration)
    steps, weight = [], rollouts.extra["leaf_weight"]  # metrics of each optimiser step
    model.train()
    for epoch in range(config.epochs):
        for micro_batches in minibatches_of(rollouts, indices, config, iteration, epoch):
            # What the weights are divided by, counted once, over all ranks, before the first backward.
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
            # Each group is clipped by its own norm: neither shrinks the step of the other.
            clip = lambda group: torch.nn.utils.clip_grad_norm_(group["params"], config.grad_clip)
            norm_of_policy, _ = map(clip, optimizer.param_groups)
            measured["grad_norm"] = fsdp.whole(norm_of_policy).item()
            for name, x in measured.items():
                if not math.isfinite(x):
                    raise FloatingPointError(f"iteration {iteration}: {name} is {x}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps.append(measured)
    model.eval()
    means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    return means | {"first_kl": steps[0]["approx_kl"]}  # before any step: pi_theta is still pi_old


def summarise(rollouts, texts, verdicts, problems, ranks):
    """What a batch says, over all ranks.  Means weighted by leaf: at tau = 1 estimates under pi, at tau = 0 of what is found."""
    weight, mask, stats = rollouts.extra["leaf_weight"], rollouts.mask, rollouts.stats
    add = lambda x: (weight * torch.as_tensor(x, dtype=torch.float32)).sum().item()
    correct = [verdict["correct"] for verdict in verdicts]
    different = {(p, text) for p, text, right in zip(rollouts.problem.tolist(), texts, correct) if right}
    means = {"reward_mean": add(rollouts.extra["rewards"]), "rollout_accuracy": add(correct), "unique_correct": len(different)}
    means |= {"leaves": len(rollouts), "mass": stats["mass"], "truncated": add(rollouts.truncated)}
    means |= {"completion_length": add(rollouts.length - rollouts.prompt_length)}
    returns = value_module.monte_carlo_returns(rollouts.extra["rewards"], mask)
    moments = policy.variance_sums(rollouts.values, returns, weight[:, None] * mask)
    counts = {name: stats[name] for name in ("model_tokens", "forwards", "pruned")}
    # Sums are told to the other ranks, never means: a rank with two problems would weigh like one with a hundred.
    told = fsdp.total(means | moments | counts | {"problems": len(problems)}, ranks)
    row = {name: told[name] / told["problems"] for name in means}
    row["explained_variance"] = policy.explained_variance(told)
    return row | {name: told[name] for name in counts} | {"stopped": fsdp.total(stats["stopped"], ranks)}


def some_samples(config, iteration, indices, rollouts, texts, verdicts, problems, ranks):
    """Rows for samples.jsonl: one leaf of each of a few problems, chosen by (seed, iteration), wherever they are."""
    N, rows = config.problems_per_iteration, []
    chosen = random.Random(f"samples {config.seed} {iteration}").sample(range(N), min(config.samples, N))
    for p, index in enumerate(indices):
        own = torch.nonzero(rollouts.problem == p).squeeze(1).tolist()
        if index in chosen and own:
            i = random.Random(f"leaf {config.seed} {iteration} {index}").choice(own)
            row = {"iteration": iteration, "prompt": problems[p].prompt, "completion": texts[i], "truth": problems[p].answer}
            numbers = {"weight": rollouts.extra["leaf_weight"][i], "log_pi": rollouts.log_pi[i], "f": rollouts.f[i]}
            rows.append((index, row | verdicts[i] | {name: x.item() for name, x in numbers.items()}))
    return [row for _, row in sorted(sum(fsdp.everyone(rows, ranks), []))]


def what_failed(error, ranks):
    """One sentence for an exception that is not a mistake in the code; one that is goes on: its traceback is wanted."""
    rank = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
    if isinstance(error, torch.OutOfMemoryError):
        return f"{rank}{ranks.device} is out of memory: lower --micro-batch, --rollout-batch or --max-nodes (see --dry-run)"
    if isinstance(error, (FloatingPointError, OSError, reward_module.RewardError)) or type(error) is LookupError:
        return f"{rank}{error}"
    if ranks.world_size > 1 and isinstance(error, RuntimeError) and fsdp.lost_peer(error):
        return f"{rank}another rank has ended, and its own message says why"
    raise error


@contextlib.contextmanager
def timed(phases, name):
    """Add the wall seconds spent inside to phases[name]."""
    start = time.perf_counter()
    yield
    phases[name] = phases.get(name, 0.0) + time.perf_counter() - start


# ===================================================================================================== the loop
def main(argv=None):
    config, args, refuse = parse(argv)

    # ------------------------------------------------------------------ set-up: all that can be wrong is said here
    try:
        if args.dry_run:
            return memory.dry_run(config, args.gpu_memory)
        reward = reward_module.load(config.reward, config.format_bonus, config.length_penalty)
        bf16 = config.mixed_precision == "bf16"
        ranks = fsdp.start(config.distributed, config.device, sharded=bf16 or config.cpu_offload)
        if config.cpu_offload and ranks.device.type == "cpu":
            raise ValueError("--cpu-offload: the weights are on the CPU already, this flag is for GPUs")
        # Run by the main rank alone; what it raises there, all ranks raise.
        on_main = lambda function: fsdp.agree(lambda: function() if ranks.is_main else None, ranks)
        begin = lambda: (args.checkpoint, {}) if args.eval_only else run_folder.find_start(config)
        source, state = fsdp.everyone(on_main(begin), ranks)[0]
        if state.get("reward_bounds", [*reward.bounds]) != [*reward.bounds]:
            raise ValueError(f"--reward: its bounds are not the {state['reward_bounds']} that {source} was trained with")
        loaded = fsdp.agree(lambda: load_everything(config, source, reward, ranks), ranks)
        model, tokenizer, head, base, train_file, eval_set = loaded
        shard = functools.partial(fsdp.shard, ranks=ranks, offload=config.cpu_offload)
        model, head = shard(model, blocks=policy.blocks_of(model), mixed_precision=bf16), shard(head)
        base = base and shard(base, blocks=policy.blocks_of(base), mixed_precision=bf16)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Two groups, each with a learning rate of its own, which `update` sets.  Adam's usual 0.999, which the head keeps,
        # remembers a thousand steps, as many as a whole run may have: too long for a policy that moves.
        groups = [{"params": trained, "betas": (0.9, 0.95)}, {"params": list(head.parameters())}]
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        if not args.eval_only:
            iteration, model_tokens, earlier = (state[name] for name in ("iteration", "model_tokens", "seconds"))
            if source:
                fsdp.agree(lambda: restore(source, model, head, optimizer), ranks)
            log_too = None
            if config.wandb or config.tensorboard:
                log_too = on_main(lambda: logs.start(config, iteration + bool(source)))
            # The last thing to go wrong: until here nothing was written, from here on the folder is ours.
            lock = on_main(lambda: run_folder.open_output(config, source, iteration, state["found"]))
    except (ValueError, OSError) as error:
        refuse(str(error))
    score = fsdp.through(model, policy.score)
    value = evaluation.guide(head, reward.bounds, config.beta, config.guide == "head")
    say = functools.partial(print, flush=True) if ranks.is_main else lambda line, file=None: None

    def evaluate():
        how = {name: getattr(config, name) for name in ("max_new_tokens", "width", "max_nodes")}
        how |= dict(decode=config.eval_decode, value=value, n=config.rollouts_per_problem, batch=config.rollout_batch)
        with fsdp.gathered(model, head):
            return evaluation.evaluate(model, tokenizer, eval_set, reward, ranks, **how)[0]

    if args.eval_only:
        say(evaluation.report(evaluate()))
        return fsdp.stop(ranks)

    # ------------------------------------------------------------------------------------------------ first words
    metrics_path, samples_path = (os.path.join(config.output_dir, name) for name in run_folder.RUN_FILES[1:])
    log = run_folder.append if ranks.is_main else lambda path, rows: None
    size = lambda parameters: f"{sum(parameter.numel() for parameter in parameters):,}"
    say(f"{config.model}: {size(model.parameters())} parameters, {size(trained)} trained; value head {size(head.parameters())}")
    say(f"{config.rollout}, {config.loss}, on {ranks.device}, ranks: {ranks.world_size}, of {torch.get_num_threads()} threads")
    if config.resume:
        say(f"resumed from {source or 'the beginning: there is no checkpoint yet'}, after iteration {iteration}")

    start, phases, evaluated = time.perf_counter(), {}, {}
    seconds = lambda: earlier + time.perf_counter() - start  # of the run, over all its resumes

    def record(row):
        """Complete the row of an iteration, in place (an evaluation where it is time, the seconds), and write it."""
        n = row["iteration"]
        if n % config.eval_every == 0 or n == config.iterations:
            with timed(phases, "evaluation"):
                result = evaluate()
            row |= {f"eval_{name}": result[name] for name in ("accuracy", "format", "accuracy_by_difficulty")}
            row["eval_length"], evaluated[n] = result["completion_length"], result["accuracy"]
        row["seconds"] = seconds()
        log(metrics_path, [row])
        if log_too:
            log_too(row)

    def keep():
        with timed(phases, "checkpoint"):
            progress = {"model_tokens": model_tokens, "seconds": seconds(), "reward_bounds": reward.bounds}
            return save_checkpoint(config, iteration, model, tokenizer, head, optimizer, progress, ranks)

    received, stopped, failure, saved = [], None, "", source
    # The first signal that any rank has received, agreed by all; None if none has.
    heard = lambda: next((number for told in fsdp.everyone(received, ranks) for number in told), None)
    gc.freeze()  # what is here stays: Python's collector, which the nodes of a search wake often, need not look at it
    try:
        with hold((signal.SIGTERM, signal.SIGINT), received):  # a preempting scheduler's, and Ctrl-C
            if not source:
                row = {"iteration": 0, "seconds": 0.0, "model_tokens": 0}
                record(row)
                say(f"before: {config.eval_decode} accuracy {row['eval_accuracy']:.3f}, format {row['eval_format']:.3f}")

            while iteration < config.iterations and not (stopped := heard()):
                n = iteration + 1

                # -------------------------------------------------------------- 1. rollouts: A* search, or sampling
                problems, indices = draw_problems(config, n, ranks, train_file)
                given = dict(tokenizer=tokenizer, problems=problems, config=config, reward=reward)
                given["keys"] = astar_search.root_keys(config.seed, n, indices)  # of the noise: by problem, not by rank
                # Whole weights on every rank: each search runs as many forwards as it needs, and waits for nobody.
                with timed(phases, "rollouts"), fsdp.gathered(model, head):
                    rollouts = make_rollouts(model, value=value, kind=config.rollout, K=config.rollouts_per_problem, **given)

                # ---------------------------------------------------------------------------------------- 2. rewards
                texts, verdicts = evaluation.judge(rollouts, tokenizer, problems, reward, config.max_new_tokens)

                # ----------------------------------------------------------------- 3. leaf weights and advantages
                # Whatever needs pi_old is computed here, once, before the first step moves the policy.
                rollouts.extra = credit(rollouts, verdicts, reward, config)
                learned = summarise(rollouts, texts, verdicts, problems, ranks)
                if learned["leaves"] == 0:
                    raise LookupError(f"iteration {n}: no search found a completion within --max-nodes {config.max_nodes}")
                spent = learned.pop("model_tokens")
                if base is not None:  # apo: V*(x) from samples of the base; their tokens count
                    with timed(phases, "rollouts"), fsdp.gathered(base):
                        reference = make_rollouts(base, value=None, kind="sample", K=config.apo_samples, **given)
                        rollouts.extra["ref_logprobs"] = score_all(base, rollouts, indices, config, n, ranks.device)
                    spent += fsdp.total({"tokens": reference.stats["model_tokens"]}, ranks)["tokens"]
                    _, judged = evaluation.judge(reference, tokenizer, problems, reward, config.max_new_tokens)
                    drawn = torch.tensor([verdict["reward"] for verdict in judged]).repeat_interleave(reference.count)
                    # V*(x) = beta1 log mean exp(r/beta1)
                    optimal = policy.optimal_value(drawn.view(len(problems), config.apo_samples), config.beta1)
                    rollouts.extra["optimal_value"] = optimal[rollouts.problem]
                if bf16:  # pi_old by the forward of training: bfloat16 rounds the search's otherwise, and ratio must be 1
                    with timed(phases, "update"), fsdp.gathered(model):
                        rollouts.logprobs = score_all(model, rollouts, indices, config, n, ranks.device)

                # ----------------------------------------------------------------------------------- 4. the update
                with timed(phases, "update"):
                    learned |= update(model, score, head, optimizer, rollouts, indices, config, n, ranks)
                iteration, model_tokens = n, model_tokens + spent

                # -------------------------------------------------------------------------------------- 5. the log
                row = {"iteration": n, "seconds": 0.0, "model_tokens": model_tokens} | learned
                row["learning_rate"] = config.learning_rate * learning_rate_scale(config, n)
                record(row)
                log(samples_path, some_samples(config, n, indices, rollouts, texts, verdicts, problems, ranks))
                say(f"{n:4d}/{config.iterations}  accuracy {row['rollout_accuracy']:.3f}  reward {row['reward_mean']:+.2f}  "
                    f"length {row['completion_length']:5.1f}  leaves {row['leaves']:.1f}  kl {row['approx_kl']:.4f}  "
                    f"clip {row['clip_fraction']:.2f}  entropy {row['entropy']:.2f}  tokens {model_tokens:,d}  "
                    f"seconds {row['seconds']:.0f}" + (f"  | eval {evaluated[n]:.3f}" if n in evaluated else ""))  # fmt: skip

                # -------------------------------------------------------------------------------- 6. the checkpoint
                # No random state is in it: problems, noise and order are functions of (seed, iteration, index).
                if n % config.checkpoint_every == 0 or n == config.iterations:
                    saved = keep()
            if stopped and iteration > 0 and not saved.endswith(f"checkpoint_iter_{iteration}"):
                saved = keep()
    except Exception as error:
        failure = what_failed(error, ranks)
    finally:
        if ranks.is_main:
            os.close(lock)

    # ------------------------------------------------------------------------------------------------- last words
    if failure:
        print(f"train.py: stopped: {failure}; the last good checkpoint is {saved or 'none'}", file=sys.stderr)
        sys.exit(1)
    if stopped:
        go_on = f"go on from {saved} with the same flags and --resume auto" if saved else "there is nothing to keep yet"
        name, status = ("SIGTERM", 0) if stopped == signal.SIGTERM else ("Ctrl-C", 130)
        say(f"train.py: stopped by {name} after iteration {iteration}; {go_on}", file=sys.stderr)
        return fsdp.stop(ranks, status)
    on_gpu, on_host = ranks.device.type == "cuda", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else on_host
    say(f"\n{config.eval_decode} accuracy on {len(eval_set)} held-out problems: "
        + (", ".join(f"{accuracy:.3f} after {i}" for i, accuracy in evaluated.items()) or "none since the resume"))  # fmt: skip
    where_time_went = ", ".join(f"{name} {t:.0f} s" for name, t in phases.items())
    say(f"{model_tokens:,} model tokens in {seconds():.0f} s ({where_time_went}); peak memory of a rank {peak:.2f} GiB")
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
