"""gpu.py -- one command on one GPU: is everything right there, and how fast is it?

    python experiments/gpu.py                              # at most eight minutes
    python experiments/gpu.py --only rounds search         # some of the checks
    python experiments/gpu.py --real FOLDER                # and a model with real weights
    python experiments/gpu.py --device cpu --small         # a minute: does this script work?

Every check is a function below, in the order in which they run.  Its docstring says what it tells
and which answer is expected.  What it finds is printed, and written to OUT/gpu.jsonl, as a line of
JSON a figure.  The keys of a line:

check, at         which check; seconds since the start
ok                whether a result is right.  false is a failure.
error             the check ended with an exception.  That is a failure too; the rest goes on.
predicted, seen   a speed or a size, and what was expected of it before any GPU had run this
held              whether it was so.  false is no failure.
skipped           what was left out, and why

The exit status is 1 if there was a failure.  A check that would not fit into --budget is skipped.
The 3B shape is examples/qwen2.5-3b with random weights; with --small it is that of the tiny base.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings

import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments"), str(ROOT / "examples")]

import memory
import step

import astar_search
import data
import eval as evaluation
import fsdp
import policy
import reward as reward_module
import train
import value as value_module

GIB = 2**30
TINY_BASE = ROOT / "tiny_base"
BIG_SHAPE = ROOT / "examples" / "qwen2.5-3b"

# ---------------------------------------------------------------------------------------- Reporting


class Report:
    """The command line, the device, and what has been said and has failed so far."""

    def __init__(self, args):
        self.started = time.perf_counter()
        self.budget = args.budget
        self.device = torch.device("cuda:0" if args.device == "cuda" else "cpu")
        self.small = args.small
        self.real = args.real
        self.folder = pathlib.Path(args.out).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = str(self.folder / "gpu.jsonl")
        fsdp.write_file(self.path, "")
        self.check = ""  # the one that runs now
        self.failed = []  # names of checks, one for each failure

    @property
    def on_gpu(self):
        """False where the script itself is tried on a CPU."""
        return self.device.type == "cuda"

    @property
    def shape(self):
        """The folder whose config gives the large model's shape."""
        return TINY_BASE if self.small else BIG_SHAPE

    def seconds(self):
        """Since the start."""
        return time.perf_counter() - self.started

    def seconds_left(self):
        """Of the budget."""
        return self.budget - self.seconds()

    def say(self, **facts):
        """Print and write one line.  Floats are cut to five digits."""
        line = {"check": self.check, "at": round(self.seconds(), 1)}
        for name, fact in facts.items():
            line[name] = float(f"{fact:.5g}") if isinstance(fact, float) else fact
        if facts.get("ok") is False or "error" in facts:
            self.failed.append(self.check)
        print(json.dumps(line), flush=True)
        fsdp.append_rows(self.path, [line])

    def prediction(self, name, seen, sign, bound):
        """A number by its name, and what was predicted of it; sign: ">=" or "<=".

        Of a CPU nothing was predicted.
        """
        if not self.on_gpu:
            return {name: seen}
        held = seen >= bound if sign == ">=" else seen <= bound
        return {"predicted": f"{name} {sign} {bound:.4g}", "seen": seen, "held": held}

    def run(self, name, function):
        """Run one check.  Whatever it raises becomes a line with "error"."""
        self.check = name
        began = time.perf_counter()
        try:
            self.clear_memory()
            function(self)
        except Exception as error:
            where = traceback.format_exc().splitlines()[-6:]
            self.say(error=f"{type(error).__name__}: {str(error)[:300]}", where=where)
        self.say(seconds=time.perf_counter() - began, peak_gib=self.peak_gib())

    def clear_memory(self):
        """Free what the check before has left, and begin a new peak."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self):
        """The most memory of the GPU since clear_memory, in GiB; None on a CPU."""
        return torch.cuda.max_memory_allocated() / GIB if self.on_gpu else None


def now(device):
    """Seconds of a clock, when the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(function, device, repeats=5):
    """Median wall time of a call, after one call that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = now(device)
        function()
        times.append(1e3 * (now(device) - start))
    return statistics.median(times[1:])


# -------------------------------------------------------------------------------------- The machine


def env(report):
    """Which machine this is, and what it copies and multiplies: the measure of all that follows.

    Predicted of an H100: 2.4 TB/s copied, read and written bytes together; 500 TFLOP/s in bfloat16.
    """
    facts = {"card": "cpu", "driver": None}
    if report.on_gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        properties = torch.cuda.get_device_properties(report.device)
        facts["card"] = properties.name
        facts["gib"] = properties.total_memory / GIB
        with contextlib.suppress(OSError):  # a container may lack the program
            facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    report.say(
        **facts,
        torch=torch.__version__,
        transformers=transformers.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        python=sys.version.split()[0],
        cores=os.cpu_count(),
    )
    copied = copy_bandwidth(report.device) / 1e12
    report.say(**report.prediction("copied_tb_s", copied, ">=", 2.4))
    multiplied = matrix_speed(report.device) / 1e12
    report.say(**report.prediction("bf16_tflop_s", multiplied, ">=", 500))


@functools.cache
def copy_bandwidth(device):
    """Bytes a second that a copy within the device reads and writes, together."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy_all():
        target.copy_(source)

    return 2 * size / milliseconds(copy_all, device) * 1e3


@functools.cache
def matrix_speed(device):
    """Operations a second of the product of two square matrices in bfloat16."""
    size = 8192 if device.type == "cuda" else 128
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)

    def multiply():
        matrix @ matrix

    return 2 * size**3 / milliseconds(multiply, device) * 1e3


# -------------------------------------------------------------------------- Is it right? The search


def noise(report):
    """Is the noise of the device that of the CPU?  If not, a seed's run depends on the device.

    Expected: equal hashes, bit for bit.  The Gumbels come from two logarithms, which may differ in
    their last digit.
    """
    x = torch.randint(-(2**62), 2**62, (2**16,), generator=torch.Generator().manual_seed(0))
    on_device = x.to(report.device)
    hashes = astar_search.mix64(on_device, on_device).cpu()
    same = torch.equal(hashes, astar_search.mix64(x, x))
    difference = (astar_search.gumbel(on_device).cpu() - astar_search.gumbel(x)).abs().max().item()
    report.say(hash_same=same, gumbel_difference=difference, ok=same and difference < 1e-12)


def children(report):
    """The best children out of a large vocabulary: those of the CPU, and what they cost.

    Expected: the tokens and keys that the CPU finds, and those that are found without screening.
    bfloat16 logits have ties, which screening must leave to the exact way.
    Predicted: 1 ms for 64 nodes where no row has a tie.
    """
    V = 1009 if report.small else 151936
    n = 8 if report.small else 64
    logits = 3 * torch.randn(n, V, generator=torch.Generator().manual_seed(0))
    for tau in (0.0, 1.0):
        for dtype in (torch.float32, torch.bfloat16):
            log_probs = logits.to(dtype).float().log_softmax(dim=-1)
            report.say(
                n=n, V=V, tau=tau, logits=str(dtype), **compare_children(log_probs, tau, report)
            )


def compare_children(log_probs, tau, report):
    """The best nine children of each row, found in three ways: a dict of facts for a line."""
    count = 9
    parents = [(-1.0, 0.5, key) for key in astar_search.root_keys(0, 0, range(len(log_probs)))]
    keys = torch.tensor([key for _, _, key in parents], device=report.device)
    h = torch.zeros(len(log_probs), 1)
    on_device = log_probs.to(report.device)
    h_on_device = h.to(report.device)

    def screened():
        return astar_search.top_children_fast(on_device, h_on_device, parents, tau, count)

    def unscreened():
        return astar_search.top_children(on_device, h_on_device, parents, tau, count)

    found = screened()
    exact = unscreened()
    by_cpu = astar_search.top_children_fast(log_probs, h, parents, tau, count)
    as_unscreened = bool((found[["token", "key"]] == exact[["token", "key"]]).all())
    as_on_cpu = bool((found[["token", "key"]] == by_cpu[["token", "key"]]).all())
    f_difference = float(abs(found["f"] - by_cpu["f"]).max())
    # One row that is not certain sends the whole round the slow way.
    _, certain = astar_search.screen_tokens(on_device, keys, tau, count)
    return {
        "as_unscreened": as_unscreened,
        "as_on_cpu": as_on_cpu,
        "f_difference": f_difference,
        "ok": as_unscreened and as_on_cpu and f_difference < 1e-9,
        "certain_rows": certain.float().mean().item(),
        "ms_unscreened": milliseconds(unscreened, report.device, repeats=2),
        **report.prediction("ms", milliseconds(screened, report.device), "<=", 1.0),
    }


# --------------------------------------------------------------------------- Is it right? The model

TINY_SHAPE = {
    "vocab_size": 31,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.1,  # at the usual .02 attention would hardly matter
}


def attentions(report):
    """The attention functions to compare: transformers' own, and "packed" if the code offers it."""
    names = ["sdpa", "packed"]
    if "packed" not in ALL_ATTENTION_FUNCTIONS:
        names.remove("packed")
        report.say(skipped="packed", why="no attention function of this name is registered")
    return names


def cache(report):
    """log pi of the search beside policy.score, on three architectures; check_model accepts them.

    Expected: equal up to the rounding of the dtype, by every attention function; accepted in
    float32, in which train.py and eval.py check.  Predicted: accepted in bfloat16 too, whose
    rounding is near check_model's tolerance.
    """
    for attention in attentions(report):
        for kind in ("Qwen2", "Qwen3", "Llama"):
            for dtype, largest in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
                torch.manual_seed(0)
                config = getattr(transformers, f"{kind}Config")(**TINY_SHAPE)
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
                model.eval().to(report.device)
                model.set_attn_implementation(attention)
                refused = refusal(model)
                difference = search_against_score(model)
                accepted = refused is None or dtype == torch.bfloat16
                report.say(
                    kind=kind,
                    dtype=str(dtype),
                    attention=attention,
                    difference=difference,
                    refused=refused,
                    ok=accepted and difference < largest,
                )


def refusal(model, **context):
    """The sentence with which check_model refuses a model; None if it accepts it."""
    try:
        astar_search.check_model(model, **context)
    except ValueError as error:
        return str(error)
    return None


def search_against_score(model):
    """Largest difference of log pi, in nats, over the tokens of a search's leaves."""
    prompts = [[5, 6, 7, 8, 9], [4], [3, 2, 10]]
    expander = astar_search.Expander(model, prompts, max_new_tokens=7)
    options = astar_search.Options(eos=(1,), K=4, width=2, max_new_tokens=7)
    trees = astar_search.search(astar_search.root_keys(3, 0, range(3)), expander, options)
    rollouts = astar_search.collect(trees, expander)
    with torch.no_grad():
        log_prob, _ = policy.score(
            model, rollouts.tokens.to(model.device), rollouts.mask.to(model.device)
        )
    return (log_prob.cpu() - rollouts.log_probs)[rollouts.mask].abs().max().item()


def leaves(report):
    """Does the tiny base in float64 find the leaves on the device that it finds on the CPU?

    Expected: all of them, in the same order.  The search rounds log pi to float32, so in one of
    many problems two keys may lie too close.  More than one of twenty is a failure.
    """
    N = 4 if report.small else 64
    found = {}
    for device in (torch.device("cpu"), report.device):
        model, tokenizer = policy.load_policy(str(TINY_BASE), torch.float64, device)
        problems = [data.train_problem(0, 1, i, "2", "terse") for i in range(N)]
        prompts = evaluation.encode_prompts(tokenizer, problems)
        for name, method, tau, width in (
            ("search, tau 0", astar_search.search, 0.0, 2),
            ("search, tau 1", astar_search.search, 1.0, 8),
            ("sample", astar_search.sample, 1.0, 1),
        ):
            expander = astar_search.Expander(model, prompts, max_new_tokens=48)
            options = astar_search.Options(
                eos=policy.stop_tokens(model, tokenizer),
                K=8,
                tau=tau,
                width=width,
                max_new_tokens=48,
                max_nodes=100 if report.small else 500,
            )
            start = now(device)
            trees = method(astar_search.root_keys(0, 1, range(N)), expander, options)
            ms_a_round = 1e3 * (now(device) - start) / expander.forwards
            tokens = [[leaf.tokens() for leaf in tree.leaves] for tree in trees]
            if name not in found:
                found[name] = tokens
                continue
            same = sum(one == other for one, other in zip(found[name], tokens))
            report.say(
                what=name,
                problems=N,
                same=same,
                ok=same >= 0.95 * N,
                rounds=expander.forwards,
                ms_a_round=ms_a_round,
            )


def gradients(report):
    """The gradient of one micro-batch on the device and on the CPU, in float32, of every loss.

    Expected: a largest difference of 1e-4 of the largest gradient, which is rounding.
    """
    cpu = torch.device("cpu")
    sizes = {"problems_per_iteration": 8, "max_new_tokens": 14, "rollouts_per_problem": 6}
    config = train.Config(**train.PPO | sizes)
    model, tokenizer = policy.load_policy(str(TINY_BASE))
    torch.manual_seed(0)
    head = value_module.ValueHead(model.config.hidden_size)
    torch.nn.init.normal_(head.outer.weight, std=0.1)  # at 0, as it starts, much would be 0
    reward = reward_module.load_reward()
    guide = evaluation.value_function(head, reward.bounds, config.beta)
    rollouts, verdicts, _ = step.first_rollouts(model, tokenizer, config, reward, guide)
    # As if steps had been made since the rollouts, so that the clip matters.
    torch.manual_seed(1)
    rollouts.log_probs = rollouts.log_probs + 0.2 * torch.randn_like(rollouts.log_probs)
    for loss in ("ppo", "grpo", "em", "apo"):
        config.loss = loss
        rollouts.extra = step.columns_of(rollouts, verdicts, reward, config)
        expected = gradient(model, head, rollouts, config, cpu)
        found = gradient(model, head, rollouts, config, report.device)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        report.say(loss=loss, rollouts=len(rollouts), difference=difference, ok=difference < 1e-4)


def gradient(model, head, rollouts, config, device):
    """The gradient of all parameters of copies of the model and the head, as one vector."""
    model = copy.deepcopy(model).to(device)
    head = copy.deepcopy(head).to(device)
    rows = torch.arange(len(rollouts))
    totals = train.minibatch_totals(rollouts, rows, fsdp.Ranks(0, 1, device))
    part = rollouts.select(rows, device)
    if config.loss == "apo":
        log_prob, _ = policy.score(model, part.tokens, part.mask)
        loss, _ = policy.apo_loss(
            log_prob=log_prob,
            ref_log_prob=part.log_probs,
            mask=part.mask,
            rewards=part.extra["rewards"],
            optimal_values=part.extra["soft_targets"],  # any number a rollout will do
            beta2=config.beta2,
            leaf_weights=part.extra["leaf_weight"] / totals["leaves"],
        )
    else:
        policy_loss, _ = step.policy_loss_of(model, part, config, totals)
        head_loss, _ = train.head_loss(head, part, totals)
        loss = policy_loss + head_loss
    loss.backward()
    parts = []
    for parameter in [*model.parameters(), *head.parameters()]:
        if parameter.grad is not None:  # apo does not reach the head
            parts.append(parameter.grad.flatten().cpu())
    return torch.cat(parts)


# --------------------------------------------------------------------------- How fast? The rollouts


def random_model(report, dtype):
    """A model of the large shape with random weights, made on the device; in eval mode."""
    config = policy.read_config(str(report.shape))
    torch.manual_seed(0)
    with report.device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def random_prompts(model, count, length):
    """`count` lists of `length` random tokens, always the same."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


@contextlib.contextmanager
def cudnn_attention(enabled):
    """Inside, attention may or may not choose the kernels of cuDNN, which are built for a shape."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Chains:
    """Rounds at a known depth: n chains, each of which grows by one random token a round.

    A prompt of `depth` tokens stands for the path of a node.  So the K/V tables are full without as
    many rounds.  `chains` of the n nodes share each prompt.  At most `rounds` rounds can be run.
    """

    def __init__(self, model, problems, chains, depth, rounds=100):
        prompts = random_prompts(model, problems, depth)
        self.expander = astar_search.Expander(model, prompts, max_new_tokens=rounds)
        options = astar_search.Options(eos=())
        roots = []
        for i, key in enumerate(astar_search.root_keys(0, 0, range(len(prompts)))):
            roots.append(astar_search.Tree(i, key, options).root)
        for first in range(0, len(roots), 32):  # all at once would need much memory
            self.expander(roots[first : first + 32])
        self.nodes = [root for root in roots for _ in range(chains)]
        self.keys = astar_search.root_keys(0, 1, range(len(self)))
        self.tokens = [chain % model.config.vocab_size for chain in range(len(self))]

    def __len__(self):
        return len(self.nodes)

    def round(self):
        """What a round of a search does: one forward, the best children, one copy to the host."""
        children = []
        for parent, token, key in zip(self.nodes, self.tokens, self.keys):
            child = astar_search.Node(
                parent.problem, parent, token, parent.depth + 1, f=0.0, key=key
            )
            children.append(child)
        self.nodes = children
        log_probs, h = self.expander(children)
        parents = [(0.0, 0.0, key) for key in self.keys]
        table = astar_search.top_children_fast(log_probs, h, parents, tau=1.0, count=9)
        self.tokens = table["token"][:, 0].tolist()


def bytes_of_round(model, nodes, depth):
    """Bytes that a round must read: all weights once, and the K/V of each node's path."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    row = 2 * config.num_key_value_heads * head_size * config.num_hidden_layers
    return weights + nodes * depth * row * next(model.parameters()).element_size()


def rounds(report):
    """A round of the large model in bfloat16, by nodes and depth, beside the floor of its bytes.

    The floor is the time to read all weights once and each node's K/V once, at the bandwidth that
    `env` has measured.  Each size is run with the defaults, without cuDNN, and with every attention
    function.  Predicted: 40 % of the floor's speed.
    """
    model = random_model(report, torch.bfloat16)
    names = attentions(report)
    # problems, chains of each, depth
    sizes = [(32, 1, 200), (32, 1, 1000), (256, 1, 200), (256, 1, 1000), (32, 8, 1000)]
    if report.small:
        sizes = [(4, 1, 20), (2, 2, 20)]
    for problems, chains, depth in sizes:
        if report.seconds_left() < 20:
            report.say(skipped=f"{problems} * {chains} nodes at {depth}", why="no time left")
            continue
        report.clear_memory()
        time_rounds(report, model, names, problems, chains, depth)


def time_rounds(report, model, names, problems, chains, depth):
    """Say the prompts' tokens a second, and a line for each way to compute attention."""
    size = {"nodes": problems * chains, "problems": problems, "depth": depth}
    start = now(report.device)
    nodes = Chains(model, problems, chains, depth)
    tokens_s = problems * depth / (now(report.device) - start)
    report.say(**size, prompt_tokens_s=tokens_s)
    floor_ms = 1e3 * bytes_of_round(model, len(nodes), depth) / copy_bandwidth(report.device)
    for how, times in times_of_ways(report, model, nodes, names):
        ms = statistics.median(times)
        report.say(
            **size,
            how=how,
            ms=ms,
            worst_ms=max(times),
            tokens_s=1e3 * len(nodes) / ms,
            floor_ms=floor_ms,
            peak_gib=report.peak_gib(),
            **report.prediction("share_of_floor", floor_ms / ms, ">=", 0.4),
        )


def times_of_ways(report, model, nodes, names):
    """Yield (way to compute attention, milliseconds of rounds); leaves the defaults behind."""
    default = model.config._attn_implementation
    ways = [("as it is", default, True), ("without cuDNN", default, False)]
    ways += [(name, name, True) for name in names if name != default]
    for how, attention, cudnn in ways:
        model.set_attn_implementation(attention)
        with cudnn_attention(cudnn):
            yield how, round_times(report, nodes, count=3 if report.small else 10)
    model.set_attn_implementation(default)


def round_times(report, nodes, count):
    """Milliseconds of each of `count` rounds, after two that are not counted."""
    times = []
    for _ in range(count + 2):
        start = now(report.device)
        nodes.round()
        times.append(1e3 * (now(report.device) - start))
    return times[2:]


def profile(report):
    """Where the time of a round goes: on the GPU, or before it.

    kernels, device_ms, top    what the GPU does in a round, and for how long
    busy                       share of the time in which it works
    copy_ms                    how long the host waits for the copy of the children
    upload_ms                  how long its own tensors take to get to the GPU, waits included
    sync_points                the lines of the code that wait for the GPU

    If `rounds` is far below the floor and busy is near 1, the kernels move too many bytes.  If busy
    is far from 1, the host is too slow to launch them.  Predicted: busy for 80 % of the time.
    """
    model = random_model(report, torch.bfloat16)
    for problems, depth in [(4, 20)] if report.small else [(32, 200), (256, 1000)]:
        report.clear_memory()
        report.say(nodes=problems, depth=depth, **profile_rounds(report, model, problems, depth))


def profile_rounds(report, model, problems, depth):
    """The facts of one line of `profile`."""
    nodes = Chains(model, problems, 1, depth)
    round_times(report, nodes, count=1)
    with seconds_in(torch.Tensor, "cpu") as copies, seconds_in(torch, "tensor") as uploads:
        nodes.round()
    kernels, device_ms, wall_ms, top = kernels_of_round(report, nodes)
    return {
        "kernels": kernels,
        "device_ms": device_ms,
        "wall_ms": wall_ms,  # under the profiler, which slows the host
        "copy_ms": 1e3 * sum(copies),
        "upload_ms": 1e3 * sum(uploads),
        "sync_points": sync_points(nodes) if report.on_gpu else None,
        "top": top,
        **report.prediction("busy", device_ms / wall_ms, ">=", 0.8),
    }


def kernels_of_round(report, nodes, count=3):
    """(kernels, their milliseconds, wall milliseconds, the longest kernels) of a round."""
    if report.on_gpu:
        activity = torch.profiler.ProfilerActivity.CUDA
    else:
        activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        start = now(report.device)
        for _ in range(count):
            nodes.round()
        wall_ms = 1e3 * (now(report.device) - start) / count
    kernels = 0
    ms_of_kernel = collections.Counter()
    for event in profiler.key_averages():
        us = event.self_device_time_total if report.on_gpu else event.self_cpu_time_total
        if us > 0:
            kernels += event.count / count
            ms_of_kernel[event.key[:60]] += us / count / 1e3
    top = [[name, round(ms, 3)] for name, ms in ms_of_kernel.most_common(12)]
    return kernels, sum(ms_of_kernel.values()), wall_ms, top


@contextlib.contextmanager
def seconds_in(owner, name):
    """Inside, the seconds of every call of owner.name are added to the list that this gives."""
    function = getattr(owner, name)
    seconds = []

    def timed(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, function)


def sync_points(nodes):
    """Where the host waits for the GPU in a round: {"file:line": times}."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            nodes.round()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter()
    for warning in caught:
        if "synchroniz" in str(warning.message):
            places[f"{pathlib.Path(warning.filename).name}:{warning.lineno}"] += 1
    return places


def search(report):
    """The search itself on the large model: nodes and milliseconds a round.

    With random weights no completion is likely, so all of --max-nodes is used, and a wider search
    would find nothing to do.  Expected: rounds that take as long as those of `rounds` with as many
    nodes.  What is more is the host's heaps.
    """
    model = random_model(report, torch.bfloat16)
    N, K, T = (4, 2, 6) if report.small else (32, 4, 48)
    prompts = random_prompts(model, N, length=143)  # as long as TinyZero's
    expander = astar_search.Expander(model, prompts, max_new_tokens=T)
    options = astar_search.Options(eos=(), K=K, width=2, max_new_tokens=T, max_nodes=K * T)
    start = now(report.device)
    astar_search.search(astar_search.root_keys(0, 0, range(N)), expander, options)
    ms = 1e3 * (now(report.device) - start)
    nodes = sum(expander.spent) - sum(len(prompt) for prompt in prompts)
    report.say(
        problems=N,
        rounds=expander.forwards,
        nodes_a_round=nodes / expander.forwards,
        ms_a_round=ms / expander.forwards,
        tokens_s=1e3 * nodes / ms,
    )


# ----------------------------------------------------------------------------- How fast? The update


def update(report):
    """One micro-batch of --config training and a step of Adam: speed, and memory by memory.py.

    All completions have their full length, as the estimate assumes.  Expected: check_model accepts
    the model in float32, as at the start of a run.  Predicted: at most the estimated peak, and 35 %
    of the speed of `env`'s matrices, where a token costs 8 operations a parameter: gradient
    checkpointing runs the forward twice.
    """
    flags = ["--config", "training", "--model", str(report.shape)]
    prompt = 143  # tokens of TinyZero's prompt
    if report.small:
        prompt = 10
        flags += ["--max-new-tokens", "20"]
    config, _, _ = train.parse_arguments(flags)
    outline = memory.outline(config.model)
    activations = memory.activation_bytes(outline, torch.bfloat16)
    estimate = memory.memory(config, outline, prompt, activations, world_size=1, offload=False)
    report.say(estimated_peak_gib=estimate["update"] / GIB)

    # As train.set_up and policy.load_policy do it.
    ranks = fsdp.init_ranks(device=str(report.device), sharded=True)
    model = random_model(report, torch.float32)
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.23
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    B = config.micro_batch
    T = prompt + config.max_new_tokens
    start = now(report.device)
    refused = refusal(model, longest=T, training=True)
    seconds = now(report.device) - start
    report.say(what="check_model", refused=refused, seconds=seconds, ok=refused is None)

    operations = 8 * B * T * sum(parameter.numel() for parameter in model.parameters())
    blocks = policy.transformer_blocks(model)
    model = fsdp.shard(model, ranks, blocks=blocks, mixed_precision=True)
    head = fsdp.shard(value_module.ValueHead(model.config.hidden_size), ranks)
    optimizer = train.make_optimizer(model, head, config)
    score = fsdp.with_fsdp_hooks(model, policy.score)
    model.train()
    tokens = torch.tensor(random_prompts(model, B, T), device=report.device)
    mask = (torch.arange(1, T, device=report.device) >= prompt).expand(B, T - 1)
    for turn in range(3):  # Adam's moments are there from the second on
        report.clear_memory()
        start = now(report.device)
        loss = loss_of_micro_batch(score, tokens, mask)
        loss.backward()
        seconds = now(report.device) - start
        peak_gib = report.peak_gib()
        start = now(report.device)
        optimizer.step()
        step_seconds = now(report.device) - start
        optimizer.zero_grad(set_to_none=True)
        report.say(
            turn=turn,
            tokens_s=B * T / seconds,
            seconds=seconds,
            step_seconds=step_seconds,
            peak_gib=peak_gib,
            peak_gib_with_step=report.peak_gib(),
            ok=bool(loss.isfinite()),
        )
    share = operations / seconds / matrix_speed(report.device)
    report.say(**report.prediction("share_of_bf16_tflop_s", share, ">=", 0.35))
    if report.on_gpu:
        bound = estimate["update"] / GIB
        report.say(**report.prediction("peak_gib", report.peak_gib(), "<=", bound))


def loss_of_micro_batch(score, tokens, mask):
    """The loss of ppo with advantages of 1."""
    log_prob, entropy = score(tokens, mask)
    ones = mask.float()
    token_weights = ones / ones.sum()
    policy_loss, _ = policy.ppo_loss(
        log_prob=log_prob,
        old_log_prob=log_prob.detach(),
        advantages=ones,
        entropy=entropy,
        token_weights=token_weights,
    )
    return policy_loss


# ------------------------------------------------------------------------------------- A real model


def real(report):
    """A model with real weights, if --real names its folder: greedy and A* on a few problems.

    Tells whether a tokenizer, a checkpoint and a whole evaluation work on the device, and how long
    they take in bfloat16.  Expected: check_model accepts the model in float32, as eval.py loads it.
    Nothing is expected of the accuracy.
    """
    if not report.real:
        report.say(skipped="a real model", why="no --real FOLDER")
        return
    model, tokenizer = policy.load_policy(report.real, torch.float32, report.device)
    N, T = (4, 24) if report.small else (16, 256)
    problems = data.eval_problems(N, "2", "tinyzero")
    if evaluation.unknown_prompts(tokenizer, problems):  # a tokenizer of digits alone
        problems = data.eval_problems(N, "2", "terse")
    longest = max(len(prompt) for prompt in evaluation.encode_prompts(tokenizer, problems))
    refused = refusal(model, longest=longest + T)
    report.say(refused=refused, ok=refused is None)
    if report.on_gpu:
        model, _ = policy.load_policy(report.real, torch.bfloat16, report.device)
    for decode in ("greedy", "astar"):
        result, rows = evaluation.evaluate(
            model,
            tokenizer,
            problems,
            reward_module.load_reward(),
            fsdp.Ranks(0, 1, report.device),
            decode=decode,
            n=4,
            max_new_tokens=T,
            tau=1.0,
            width=4,
        )
        completions = rows[0]["completions"]
        report.say(
            decode=decode,
            problems=N,
            accuracy=result["accuracy"],
            format=result["format"],
            tokens_a_problem=result["tokens_per_problem"],
            seconds=result["seconds_per_problem"] * N,
            first=completions[0]["text"][:200] if completions else None,
        )


# ------------------------------------------------------------------------------- The whole programs


@dataclasses.dataclass
class Program:
    """A command of train.py while it runs as a process of its own."""

    name: str
    folder: pathlib.Path  # its --output-dir
    iterations: int
    process: subprocess.Popen
    output: pathlib.Path  # what it prints


def programs(report):
    """The commands of train.py as a user gives them: they end, and a resume goes on.

    quick      the main job, 40 iterations.  Predicted: 80 % of the held-out problems.
    bf16       FSDP in one process, with mixed precision and gradient checkpointing
    offload    the same with --cpu-offload, which a CPU refuses
    ranks      torchrun and --distributed, with NCCL; on a CPU with gloo

    They run at the same time, so their seconds are upper bounds.  Then some of them are resumed for
    one more iteration.  Expected: exit status 0 within the budget, and a row for each iteration.
    The KL before the first step is 0 up to rounding.
    """
    few = "--config ppo --iterations 2 --checkpoint-every 1 --eval-problems 20".split()
    few += ["--problems-per-iteration", "8" if report.small else "32"]
    bf16 = ["--mixed-precision", "bf16", "--gradient-checkpointing", "on"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    quick = ["train.py", "--config", "quick"]
    iterations = train.PRESETS["quick"]["iterations"]
    if report.small:
        iterations = 2
        quick += "--iterations 2 --problems-per-iteration 8 --eval-problems 20".split()

    # name: (iterations, words behind python)
    commands = {
        "quick": (iterations, quick),
        "bf16": (2, ["train.py", *few, *bf16]),
        "ranks": (2, [*torchrun, "train.py", *few, "--distributed"]),
    }
    if report.on_gpu:
        commands["offload"] = (2, ["train.py", *few, *bf16, "--cpu-offload"])
    started = []
    for name, (iterations, words) in commands.items():
        started.append((name, name, iterations, [*words, "--overwrite"]))
    run_programs(report, started, limit=report.seconds_left() - 40)
    if report.seconds_left() < 20:
        report.say(skipped="the resumes", why="no time left")
        return

    resumed = []
    for name in ("bf16", "offload", "quick") if report.on_gpu else ("bf16",):
        iterations, words = commands[name]
        # Where a flag is given twice, the second counts.
        words = [*words, "--iterations", str(iterations + 1), "--resume", "auto"]
        resumed.append((f"{name} resumed", name, iterations + 1, words))
    run_programs(report, resumed, limit=report.seconds_left())


def run_programs(report, commands, limit):
    """Run commands at the same time and say a line for each.

    commands: tuples (name, folder below the report's, iterations, words behind python).
    limit: seconds after which they are killed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if report.small else "2"}
    deadline = report.seconds() + limit
    running = []
    try:
        for name, folder, iterations, words in commands:
            folder = report.folder / folder
            output = report.folder / f"{name.replace(' ', '_')}.txt"
            words = [*words, "--device", report.device.type, "--output-dir", str(folder)]
            with open(output, "w") as file:
                process = subprocess.Popen(
                    [sys.executable, *words],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,  # so that torchrun's ranks can be killed with it
                )
            running.append(Program(name, folder, iterations, process, output))
        for program in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.process.wait(timeout=max(0.0, deadline - report.seconds()))
            say_program(report, program)
    finally:
        for program in running:
            if program.process.poll() is None:
                os.killpg(program.process.pid, signal.SIGKILL)
                program.process.wait()


def say_program(report, program):
    """The line of a program that has ended, or that has run out of time."""
    status = program.process.poll()
    metrics = program.folder / "metrics.jsonl"
    rows = []
    if metrics.exists():
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluated = {}  # iteration -> accuracy, seconds since the start
    for row in rows:
        if "eval_accuracy" in row:
            evaluated[row["iteration"]] = [row["eval_accuracy"], round(row["seconds"])]
    complete = [row["iteration"] for row in rows] == list(range(program.iterations + 1))
    facts = {
        "program": program.name,
        "status": "ran out of time" if status is None else status,
        "iterations": len(rows) - 1,
        "evaluated": evaluated,
        "first_kl": rows[1].get("first_kl") if len(rows) > 1 else None,
        "ok": status == 0 and complete,
    }
    if program.name == "quick" and evaluated:
        best = max(accuracy for accuracy, _ in evaluated.values())
        facts.update(report.prediction("accuracy", best, ">=", 0.8))
        # A policy that has hardly learned is wrong, whatever was predicted.
        facts["ok"] = facts["ok"] and (report.small or best > 0.5)
    if not facts["ok"]:
        facts["printed"] = program.output.read_text()[-600:]
    report.say(**facts)


# ------------------------------------------------------------------------------------- Command line

# The checks after env, and the seconds that each may need on a GPU: one that needs more than is
# left is skipped.
CHECKS = {
    "noise": (noise, 5),
    "children": (children, 30),
    "cache": (cache, 30),
    "leaves": (leaves, 40),
    "gradients": (gradients, 20),
    "rounds": (rounds, 60),
    "profile": (profile, 30),
    "search": (search, 30),
    "update": (update, 60),
    "real": (real, 60),
    "programs": (programs, 120),  # they take what is left
}


def main(argv=None):
    parser = data.OneLineParser(
        "gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes: to try the script")
    parser.add_argument("--only", nargs="+", choices=tuple(CHECKS) + ("env",), metavar="CHECK")
    parser.add_argument("--budget", type=float, default=450, help="seconds (default 450)")
    parser.add_argument("--out", default=str(ROOT / "runs" / "gpu"), metavar="FOLDER")
    parser.add_argument("--real", metavar="FOLDER", help="a Hugging Face model")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.small:
        parser.error("--device cpu needs --small: the large shapes would take hours")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --small tries the script")

    report = Report(args)
    report.run("env", env)
    for name, (function, seconds) in CHECKS.items():
        if args.only and name not in args.only:
            continue
        if seconds > report.seconds_left():
            report.check = name
            report.say(skipped=name, why=f"it may need {seconds} s of the budget")
            continue
        report.run(name, function)
    report.check = "end"
    failed = sorted(set(report.failed))
    report.say(failed=failed, seconds=report.seconds())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
