"""speed.py -- what the search costs beside what the model costs.  Every figure is a ratio of two.

    python experiments/speed.py                     # all items: rows in results/speed.jsonl
    python experiments/speed.py host children       # some of them: their rows are replaced
    python experiments/speed.py gpu --repeats 1     # the shortest

The two are measured in turn, A B A B ..., five times, one thread, CPU seconds of this process.  A
figure is the ratio of the minima, and in brackets of the medians.  Models: the tiny base, and
random weights in the shape of SmolLM2 (135M) and of Qwen2.5 (0.5B).  With random weights no
completion is likely, so samples of a prompt share the prompt and nothing else.

The rows of the item "job" in results/speed.jsonl compared `python train.py` with an early commit;
its code is gone.
"""

import argparse
import collections
import contextlib
import functools
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments"), str(ROOT / "examples")]

import compare
import memory
import memory_measured
import step

import astar_search
import data
import eval as evaluation
import fsdp
import policy
import reward as reward_module
import train
import value as value_module

RESULTS = compare.RESULTS / "speed.jsonl"
WORK = tempfile.TemporaryDirectory()
SHAPES = {
    "135M": memory_measured.SIZES,
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "large vocabulary": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}


# ---------------------------------------------------------------------------------------- Measuring


@functools.cache
def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("items", nargs="*", help="names of items; none: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of-nodes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of-update", help=argparse.SUPPRESS)
    return parser.parse_args()


def summary(numbers):
    """{min, median}."""
    return {"min": min(numbers), "median": statistics.median(numbers)}


def race(**sides):
    """CPU seconds {min, median} of each function: each once unmeasured, then all in turn."""
    times = {name: [] for name in sides}
    for _ in range(arguments().repeats + 1):
        for name, function in sides.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: summary(seconds[1:]) for name, seconds in times.items()}


def ratio(a, b, scale=1.0):
    """{min, median} of scale * a/b."""
    return {key: scale * a[key] / b[key] for key in ("min", "median")}


def figure(what, ratio, target="", **facts):
    """A row of the results.

    ratio: {min, median}; target: ">= 1.3" or "<= 0.1", or "" for a number without one.
    """
    row = {"what": what, **ratio}
    if target:
        sign, limit = target.split()
        row["target"] = target
        if sign == ">=":
            row["met"] = ratio["min"] >= float(limit)
        else:
            row["met"] = ratio["min"] <= float(limit)
    return {**row, **facts}


@contextlib.contextmanager
def profiled(phases):
    """CPU seconds by phase, each without the phases inside it.

    phases: {phase: list of functions, as (owner, name)}.
    """
    seconds = collections.Counter()
    inside = []  # of each phase that is running, the seconds of the phases inside it
    originals = []

    def timed(function, phase):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            start = time.process_time()
            inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - start
                seconds[phase] += whole - inside.pop()
                if inside:
                    inside[-1] += whole

        return wrapped

    for phase, places in phases.items():
        for owner, name in places:
            originals.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, timed(getattr(owner, name), phase))
    try:
        yield seconds
    finally:
        for owner, name, function in originals:
            if function is None:  # it was the class's
                delattr(owner, name)
            else:
                setattr(owner, name, function)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation inside made, in elements."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def elsewhere(*argv):
    """What this script prints last in a fresh process, as JSON.

    Memory that it frees goes back to the system at once.
    """
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, *argv]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------ Models and rollouts


@functools.cache
def learned():
    """A checkpoint of the quick run after ten iterations; completions hardly grow longer later."""
    folder = f"{WORK.name}/run"
    flags = f"--config quick --iterations 10 --eval-problems 10 --output-dir {folder}"
    command = [sys.executable, "train.py", *flags.split()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return f"{folder}/checkpoint_iter_10"


@functools.cache
def model_of(name):
    """The tiny base, as it is or after ten iterations, or random weights in a shape."""
    if name in ("tiny", "tiny, learned"):
        folder = str(ROOT / "tiny_base") if name == "tiny" else learned()
        model, _ = policy.load_policy(folder)
    else:
        torch.manual_seed(0)
        config = Qwen2Config(**SHAPES[name], tie_word_embeddings=True, max_position_embeddings=4096)
        model = Qwen2ForCausalLM(config).eval()
    return model.requires_grad_(False)


def prompts_of(name, n, length=None):
    """n prompts: the main job's for the tiny base, else random ones of a length."""
    if name.startswith("tiny"):
        tokenizer = policy.load_tokenizer(str(ROOT / "tiny_base"))
        problems = [data.train_problem(0, 1, i, "2", "terse") for i in range(n)]
        return evaluation.encode_prompts(tokenizer, problems)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(SHAPES[name]["vocab_size"], (n, length), generator=generator).tolist()


def rollouts_of(method, name, prompts, batch=None, **options):
    """Rollouts by search or sample, `batch` problems in lock-step.

    options: of astar_search.Options; eos is the model's own if it is left out.  Returns (Rollouts,
    the last Expander).
    """
    if "eos" not in options:
        options["eos"] = (1,) if name.startswith("tiny") else ()
    options = astar_search.Options(**options)
    batch = batch or len(prompts)
    parts = []
    for start in range(0, len(prompts), batch):
        own = prompts[start : start + batch]
        expander = astar_search.Expander(model_of(name), own, options.max_new_tokens)
        keys = astar_search.root_keys(0, 1, range(start, start + len(own)))
        parts.append(astar_search.collect(method(keys, expander, options), expander))
    return astar_search.concatenate(parts), expander


# ------------------------------------------------------------------------ Sampling against generate


def sampling():
    """i.i.d. sampling through the expander against generate: tokens of completions a second.

    "to EOS": a completion ends where it says so, as in the main job, and generate runs on until the
    last of a batch has ended.  Else all have T tokens.
    """
    for name, N, K, T, length, eos, target in (
        ("tiny", 64, 8, 48, None, (), ">= 1.3"),
        ("tiny", 256, 1, 48, None, (), ""),
        ("tiny", 64, 8, 48, None, (1,), ">= 1.3"),
        ("tiny, learned", 64, 8, 48, None, (1,), ">= 1.3"),
        ("135M", 4, 8, 24, 140, (), ">= 1.3"),
        ("135M", 8, 1, 24, 140, (), ""),
    ):
        yield from sampling_figures(name, N, K, T, length, eos, target)


def sampling_figures(name, N, K, T, length, eos, target):
    """The figures of one setting: against generate, and against it on a cache of the prompts."""
    model = model_of(name)
    prompts = prompts_of(name, N, length)
    ids = torch.tensor(prompts)
    tokens = {}
    how = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": T,
        "pad_token_id": 0,
        "eos_token_id": eos or None,
    }

    def generate():
        config = GenerationConfig(**how, num_return_sequences=K)
        out = model.generate(ids, config)[:, ids.shape[1] :]
        ends = (out == (eos or (-1,))[0]).long()
        tokens["generate"] = (ends.cumsum(1) - ends == 0).sum().item()  # up to the first EOS

    @torch.no_grad()
    def prompt_once():
        # What a user can do by hand: run the prompts once and copy their K/V.
        cache = DynamicCache(config=model.config)
        model.base_model(ids[:, :-1], past_key_values=cache)
        cache.batch_repeat_interleave(K)
        repeated = ids.repeat_interleave(K, 0)
        model.generate(repeated, GenerationConfig(**how), past_key_values=cache)

    def ours():
        drawn, _ = rollouts_of(astar_search.sample, name, prompts, K=K, max_new_tokens=T, eos=eos)
        tokens["ours"] = (drawn.count * (drawn.length - drawn.prompt_length)).sum().item()

    times = race(ours=ours, generate=generate, prompt_once=prompt_once)
    sizes = {
        "prompts": N,
        "prompt_tokens": ids.shape[1],
        "samples": K,
        "new_tokens": T,
        "tokens": tokens,
        "seconds": times,
    }
    what = f"{name}, {K} samples a prompt{', to EOS' if eos else ''}"
    what += ": tokens a second, ours / generate"
    scale = tokens["ours"] / tokens["generate"]
    yield figure(what, ratio(times["generate"], times["ours"], scale), target, **sizes)
    what += " on a cache of prompts run once"
    yield figure(what, ratio(times["prompt_once"], times["ours"], scale), **sizes)


# ---------------------------------------------------------------------- The search beside the model


def search_sides(name):
    """A* and sampling with about as many model tokens a forward.

    Returns two functions, and a dict of the stats that they found last.
    """
    found = {}
    if name == "tiny":
        prompts = prompts_of(name, 256)
        options = {"K": 8, "max_new_tokens": 48}
        width, batch = 2, 120
    else:
        prompts = prompts_of(name, 32, 16)
        options = {"K": 4, "max_new_tokens": 8}
        width, batch = 1, 8

    def astar():
        rollouts, _ = rollouts_of(astar_search.search, name, prompts, width=width, **options)
        found["astar"] = rollouts.stats

    def sample():
        rollouts, _ = rollouts_of(astar_search.sample, name, prompts, batch=batch, **options)
        found["sample"] = rollouts.stats

    return astar, sample, found


def search():
    """A* against our own sampling: model tokens a second."""
    for name, target in (("tiny", ">= 0.6"), ("135M", ">= 0.9")):
        astar, sample, found = search_sides(name)
        times = race(astar=astar, sample=sample)
        work = {side: stats["model_tokens"] for side, stats in found.items()}
        a_forward = {side: work[side] / found[side]["forwards"] for side in work}
        rate = ratio(times["sample"], times["astar"], work["astar"] / work["sample"])
        what = f"{name}: model tokens a second, A* / sampling"
        yield figure(what, rate, target, a_forward=a_forward, seconds=times)


def host():
    """Where the time of A* goes: the share outside of the model's forward.

    Inside the forward the cache copies K/V.
    """
    for name, target in (("tiny", "<= 0.35"), ("135M", "<= 0.10")):
        model = model_of(name)
        astar, _, _ = search_sides(name)
        phases = {
            "model": [
                (model.base_model, "forward"),
                (model.lm_head, "forward"),
                (astar_search.F, "log_softmax"),
            ],
            "K/V": [(astar_search.NodeCache, "update")],
            "noise and top-k": [(astar_search, "top_children_fast")],
            "copies to the host": [
                (torch.Tensor, "numpy"),
                (astar_search, "collect"),
                (astar_search, "concatenate"),
            ],
            "heaps": [
                (astar_search.Tree, "next_to_evaluate"),
                (astar_search.Tree, "pop_evaluated_nodes"),
                (astar_search, "search"),
            ],
            "masks and rows": [(astar_search.Expander, "__call__")],
        }
        shares = []
        for _ in range(arguments().repeats + 1):
            with profiled(phases) as seconds:
                astar()
            whole = sum(seconds.values())
            shares.append({phase: seconds[phase] / whole for phase in phases})
        shares = shares[1:]
        outside = summary([1 - share["model"] - share["K/V"] for share in shares])
        medians = {}
        for phase in phases:
            medians[phase] = statistics.median([share[phase] for share in shares])
        what = f"{name}: share of A*'s seconds outside of the model's forward"
        yield figure(what, outside, target, medians=medians)


# ------------------------------------------------------------------------------- Growth of the tree


def growth():
    """Cost and memory of a node as the tree grows: with the tiny base, and with a table."""
    prompts = prompts_of("tiny", 8)
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(997, 24, generator=generator).log_softmax(-1)

    def table(nodes):
        return log_probs[[node.key % 997 for node in nodes]], torch.zeros(len(nodes), 1)

    def new_table():
        return table

    def new_expander():
        return astar_search.Expander(model_of("tiny"), prompts, 48)

    # So many small searches take some time.
    for name, new_expand, again in (("a table", new_table, 16), ("tiny", new_expander, 4)):
        yield cost_of_a_node(name, new_expand, again)

    few, some, many = (elsewhere("--memory-of-nodes", str(n)) for n in (1024, 2048, 4096))
    slopes = []
    for a, b in ((few, some), (some, many)):
        slopes.append((b["bytes"] - a["bytes"]) / (b["nodes"] - a["nodes"]))
    what = "tiny: bytes a node, 2,048 to 4,096 nodes a problem / 1,024 to 2,048"
    slope = {"min": slopes[1] / slopes[0]}
    yield figure(what, slope, "<= 1.2", bytes_a_node=slopes, of_which_kv=few["kv"])


def cost_of_a_node(name, new_expand, again):
    """The figure of one expand: a search of 4,096 nodes a problem against `again` of 256."""
    pops = {}

    def go(nodes):
        options = astar_search.Options(
            (1,), K=10**6, tau=0.0, width=8, max_nodes=nodes, max_new_tokens=48
        )
        trees = astar_search.search(astar_search.root_keys(0, 1, range(8)), new_expand(), options)
        pops[nodes] = sum(tree.pops for tree in trees)

    def large():
        go(4096)

    def small():
        for _ in range(again):
            go(256)

    times = race(large=large, small=small)
    cost = ratio(times["large"], times["small"], again * pops[256] / pops[4096])
    what = f"{name}: cost of a node, 4,096 nodes a problem / 256"
    return figure(what, cost, "<= 1.5", seconds=times, nodes=pops)


def memory_of_nodes(nodes):
    """Resident memory that searches of so many nodes a problem take, in a fresh process."""
    prompts = prompts_of("tiny", 8)
    # What is allocated once.
    rollouts_of(astar_search.search, "tiny", prompts, K=8, max_new_tokens=48)
    before = memory_measured.resident("VmRSS")
    expander = astar_search.Expander(model_of("tiny"), prompts, 48)
    options = astar_search.Options((1,), K=10**6, width=8, max_nodes=nodes, max_new_tokens=48)
    trees = astar_search.search(astar_search.root_keys(0, 1, range(8)), expander, options)
    tables = expander.cache.tables.values()
    return {
        "nodes": sum(tree.pops for tree in trees),
        "bytes": memory_measured.resident("VmRSS") - before,
        "kv": sum(table.shape[1] * table.element_size() for table in tables),
    }


def naive():
    """The search that keeps no K/V, 64 tokens deep.

    It runs the whole prefix of every node that it opens.  Or, as naive searches do, of every child
    that it queues: a pop queues two, the best child and the next sibling.
    """
    N = 32
    model = model_of("tiny")
    prompts = prompts_of("tiny", N)
    options = astar_search.Options((), K=2, width=1, max_new_tokens=64)
    leaves = {}

    @torch.no_grad()
    def expand_opened(nodes):
        prefixes = [prompts[node.problem] + node.tokens() for node in nodes]
        longest = max(len(prefix) for prefix in prefixes)
        batch = torch.tensor([prefix + [0] * (longest - len(prefix)) for prefix in prefixes])
        last = torch.tensor([len(prefix) - 1 for prefix in prefixes])
        hidden = model.base_model(batch, use_cache=False).last_hidden_state
        hidden = hidden[torch.arange(len(nodes)), last]
        return model.lm_head(hidden).log_softmax(-1), torch.zeros(len(nodes), 1)

    def expand_queued(nodes):
        log_probs, h = expand_opened(nodes + nodes)
        return log_probs[: len(nodes)], h[: len(nodes)]

    def go(side, expand):
        trees = astar_search.search(astar_search.root_keys(0, 1, range(N)), expand, options)
        leaves[side] = [[leaf.tokens() for leaf in tree.leaves] for tree in trees]

    def ours():
        go("ours", astar_search.Expander(model, prompts, 64))

    def opened():
        go("opened", expand_opened)

    def queued():
        go("queued", expand_queued)

    times = race(ours=ours, opened=opened, queued=queued)
    same = sum(a == b for a, b in zip(leaves["ours"], leaves["opened"]))
    facts = {"problems": N, "with_the_same_leaves": same, "seconds": times}
    for side, words, target in (("opened", "opened node", ""), ("queued", "queued child", ">= 10")):
        what = f"tiny: seconds, the whole prefix of every {words} / ours"
        yield figure(what, ratio(times[side], times["ours"]), target, **facts)


# ------------------------------------------------------------------------------- A large vocabulary


def children():
    """A vocabulary of 151,936: children against the forward; peak memory of the update."""
    for n in (1, 16):
        yield from children_figures(n)
    ours = elsewhere("--memory-of-update", "score")
    theirs = elsewhere("--memory-of-update", "naive")
    what = "update of 4 x 256 tokens of 151,936: "
    largest = {"min": ours["largest"] / (1 << 24)}
    yield figure(what + "largest tensor / a chunk", largest, "<= 1", ours=ours, naive=theirs)
    peak = {"min": ours["bytes"] / theirs["bytes"]}
    yield figure(what + "peak bytes, ours / with (B, T, V) logits", peak, "<= 0.5")


def children_figures(n):
    """The figures for n nodes: the search's share of their children, against a forward."""
    model = model_of("0.5B")
    V = SHAPES["0.5B"]["vocab_size"]
    prompts = torch.tensor(prompts_of("0.5B", n, 4))
    parents = [(0.0, 0.0, key) for key in astar_search.root_keys(0, 0, range(n))]
    h = torch.zeros(n, 1)
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(n, V, generator=generator).log_softmax(-1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.base_model(prompts, past_key_values=cache)

    @torch.no_grad()
    def forward():
        model(prompts[:, :1], past_key_values=cache).logits.log_softmax(-1)
        cache.crop(-1)

    for tau in (1.0, 0.0):

        def children_of_tau(tau=tau):
            astar_search.top_children_fast(log_probs, h, parents, tau, 9)

        times = race(children=children_of_tau, forward=forward)
        share = ratio(times["children"], times["forward"])
        what = f"0.5B, {n} nodes, tau {tau:g}: children / forward"
        yield figure(what, share, "<= 0.10", seconds=times)


def memory_of_update(side):
    """Peak memory of a backward pass through log pi and entropy, and the largest tensor made.

    side: "score" for policy.score, "naive" for (B, T, V) logits.  The model's body is small.
    """
    model = model_of("large vocabulary").requires_grad_(True)
    tokens = torch.randint(model.config.vocab_size, (4, 257))
    mask = torch.ones(4, 256, dtype=torch.bool)

    def backward():
        if side == "score":
            log_prob, entropy = policy.score(model, tokens, mask)
        else:
            full = model(tokens[:, :-1]).logits.float().log_softmax(-1)
            log_prob = full.gather(2, tokens[:, 1:, None])[..., 0]
            entropy = -(full.exp() * full).sum(-1)
        (log_prob + 0.01 * entropy).sum().backward()

    backward()
    before = memory_measured.resident("VmRSS")
    memory_measured.reset_peak()
    backward()
    peak = memory_measured.resident("VmHWM") - before
    with Largest() as largest:
        backward()
    return {"bytes": peak, "largest": largest.numbers}


# --------------------------------------------------------------------------------------- The update


def batch_of(flags):
    """One iteration's rollouts, as train.py makes them: (model, rollouts, indices, config)."""
    config, _, _ = train.parse_arguments(flags.split())
    model, tokenizer = policy.load_policy(config.model)
    reward = reward_module.load_reward("", config.format_bonus, config.length_penalty)
    rollouts, verdicts, indices = step.first_rollouts(model, tokenizer, config, reward)
    rollouts.extra = step.columns_of(rollouts, verdicts, reward, config)
    return model, rollouts, indices, config


def random_batch(B, low, high):
    """The same of random tokens for the 135M shape.

    B rollouts of `low` to `high` tokens, a third of each a prompt.
    """
    flags = f"--problems-per-iteration {B} --minibatches 1 --micro-batch 4"
    config, _, _ = train.parse_arguments(flags.split())
    model = model_of("135M").requires_grad_(True)
    length = torch.linspace(low, high, B).long()
    zero = torch.zeros(B)
    grid = torch.zeros(B, high - 1)
    rollouts = astar_search.Rollouts(
        tokens=torch.randint(model.config.vocab_size, (B, high)),
        prompt_length=length // 3,
        length=length,
        problem=torch.arange(B),
        log_probs=grid,
        values=grid,
        log_pi=zero,
        weight=zero,
        count=zero,
        f=zero,
        truncated=zero > 0,
        prefix=grid.long(),
        hidden=torch.zeros(1, model.config.hidden_size),
        extra={
            "rewards": zero,
            "soft_targets": zero,
            "leaf_weight": zero + 1,
            "advantages": grid + 1,
            "teaches": zero == 0,
        },
    )
    return model, rollouts, range(B), config


def update():
    """What of a batch is padding; the step against transformers' own loss on a full rectangle."""
    runs = {
        "ppo, first iteration": "--config ppo",
        "quick, first iteration": "--config quick",
        "135M": None,
        "ppo, later": f"--config ppo --model {learned()}",
        "quick, later": f"--config quick --model {learned()}",
    }
    for name, flags in runs.items():
        if flags is None:
            model, rollouts, indices, config = random_batch(8, 90, 150)
        else:
            model, rollouts, indices, config = batch_of(flags)
        config.epochs = 1
        real = (rollouts.length - 1).sum().item()
        padded = 0
        for minibatch in train.deal_minibatches(rollouts, indices, config, 1, 0):
            for rows in train.split_by_length(minibatch, rollouts.length, config.micro_batch):
                padded += len(rows) * (rollouts.length[rows].max().item() - 1)
        what = f"{name}: share of a batch that is padding"
        yield figure(what, {"min": 1 - real / padded}, "<= 0.15", tokens=real)
        if "first" not in name:
            yield update_figure(name, model, rollouts, indices, config)


def update_figure(name, model, rollouts, indices, config):
    """Tokens a second of a training step, ours / transformers' own loss on as many tokens."""
    ranks = fsdp.init_ranks(device="cpu")
    head = value_module.ValueHead(model.config.hidden_size)
    real = (rollouts.length - 1).sum().item()
    B = len(rollouts)
    T = real // B
    dense = torch.randint(model.config.vocab_size, (B, T))
    both = train.make_optimizer(model, head, config)
    alone = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def ours():
        step.update(model, head, both, rollouts, indices, config, 1, ranks)

    def plain():
        for minibatch in dense.chunk(config.minibatches):
            for part in minibatch.split(config.micro_batch):
                model(part, labels=part, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            alone.step()
            alone.zero_grad()

    times = race(ours=ours, plain=plain)
    rate = ratio(times["plain"], times["ours"], real / (B * T))
    what = f"{name}: tokens a second of a step, ours / plain"
    return figure(what, rate, ">= 0.85", rollouts=B, T=T, seconds=times)


# -------------------------------------------------------------------------------- Memory, and a GPU


def prefixes():
    """K/V of a prompt: once a problem, not once a rollout."""
    N, K, T, length = 2, 8, 8, 140
    model = model_of("135M")
    prompts = prompts_of("135M", N, length)
    config = GenerationConfig(
        max_new_tokens=T,
        num_return_sequences=K,
        do_sample=True,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    cache = model.generate(torch.tensor(prompts), config).past_key_values
    theirs = 0
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            theirs += x.numel() * x.element_size()
    for method in (astar_search.sample, astar_search.search):
        _, expander = rollouts_of(method, "135M", prompts, K=K, max_new_tokens=T)
        tables = expander.cache.tables.values()
        row = sum(table.shape[1] * table.element_size() for table in tables)
        ours = expander.cache.rows * row
        what = (
            f"135M, {N} x {K} completions, {T} tokens after {length}: "
            f"bytes of K/V, {method.__name__} / generate"
        )
        limit = f"<= {1.02 * (length + K * T) / (K * (length + T)):.3f}"
        yield figure(what, {"min": ours / theirs}, limit, ours=ours, generate=theirs)


def gpu():
    """Counted: copies to the host.  Estimated: decoding at the 3B shape in bfloat16, by traffic.

    There is no GPU here.
    """
    copies = 0
    cpu = torch.Tensor.cpu

    def counted(tensor):
        nonlocal copies
        copies += 1
        return cpu(tensor)

    torch.Tensor.cpu = counted
    try:
        expander = astar_search.Expander(model_of("tiny"), prompts_of("tiny", 64), 48)
        options = astar_search.Options((1,), K=8, width=2, max_new_tokens=48)
        astar_search.search(astar_search.root_keys(0, 1, range(64)), expander, options)
    finally:
        torch.Tensor.cpu = cpu
    what = "copies to the host / forwards of a search"
    yield figure(what, {"min": copies / expander.forwards}, "<= 1.05")

    model = memory.outline(str(ROOT / "examples" / "qwen2.5-3b"))
    nodes, context = 256, 512
    text = model.config
    weights = 2 * sum(parameter.numel() for parameter in model.parameters())
    head_size = text.hidden_size // text.num_attention_heads
    row = 2 * 2 * text.num_key_value_heads * head_size * text.num_hidden_layers
    kv = row * nodes * context
    # A gather reads K/V, writes it, and attention reads it again.
    needed = {"min": (weights + kv) / (weights + 3 * kv)}
    what = (
        f"ESTIMATE, 3B in bfloat16, {nodes} nodes a round of {context} tokens: "
        "bytes to be read / bytes moved"
    )
    yield figure(what, needed, weights=weights, kv=kv)


# ------------------------------------------------------------------------------------- Command line

ORDER = (sampling, search, host, growth, naive, children, update, prefixes, gpu)
ITEMS = {function.__name__: function for function in ORDER}


def print_row(item, row):
    """A line of the table."""
    median = f" ({row['median']:.3f})" if "median" in row else ""
    verdict = ""
    if "met" in row:
        verdict = "met" if row["met"] else "MISSED"
    print(
        f"{item:9s} {row['min']:8.3f}{median:10s} {row.get('target', ''):8s} {verdict:7s} "
        f"{row['what']}",
        flush=True,
    )


def main():
    args = arguments()
    torch.set_num_threads(1)
    if args.memory_of_nodes:
        print(json.dumps(memory_of_nodes(args.memory_of_nodes)))
        return
    if args.memory_of_update:
        print(json.dumps(memory_of_update(args.memory_of_update)))
        return
    if set(args.items) - set(ITEMS):
        sys.exit(f"speed.py: the items are {', '.join(ITEMS)}")
    where = {
        "cpu": compare.cpu(),
        "threads": 1,
        "repeats": args.repeats,
        "torch": torch.__version__,
    }
    rows = compare.rows(RESULTS)
    for item in args.items or ITEMS:
        # Collections do not look at what the imports have made; so for both sides of every race.
        gc.collect()
        gc.freeze()
        rows = [row for row in rows if row["item"] != item]
        for row in ITEMS[item]():
            print_row(item, row)
            rows.append({"item": item, **row, **where})
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
