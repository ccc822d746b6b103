"""speed.py -- what the search costs beside what the model costs.  Every figure is a ratio of two, measured in turn.

    python experiments/speed.py                     # all ten items, a row a figure in experiments/results/speed.jsonl
    python experiments/speed.py host children       # some of them: their rows are replaced

A B A B ..., five times, one thread, CPU seconds of this process; a figure is the ratio of the minima, and in brackets
of the medians.  Models: the tiny base, and random weights in the shape of SmolLM2 (135M) and of Qwen2.5 (0.5B), with
which no completion is likely, so that samples of a prompt share the prompt and nothing else.
"""

import argparse
import collections
import contextlib
import functools
import gc
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import compare  # noqa: E402
import memory  # noqa: E402

import astar_search  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import fsdp  # noqa: E402
import policy  # noqa: E402
import train  # noqa: E402
import value as value_module  # noqa: E402

RESULTS = compare.RESULTS / "speed.jsonl"
BEFORE = "e4e8cee"  # the commit that the main job is compared with
WORK = tempfile.TemporaryDirectory()


def shape(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size):
    return locals()


SHAPES = {
    "135M": memory.SIZES,
    "0.5B": shape(896, 4864, 24, 14, 2, 151936),
    "large vocabulary": shape(64, 128, 2, 2, 2, 151936),
}

# ==================================================================================================== measuring


@functools.cache
def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", help="names of items; none: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of-nodes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of-update", help=argparse.SUPPRESS)
    return parser.parse_args()


def summary(xs):
    return {"min": min(xs), "median": statistics.median(xs)}


def race(**sides):
    """CPU seconds {min, median} of each function: each once unmeasured, then all in turn."""
    times = {name: [] for name in sides}
    for _ in range(arguments().repeats + 1):
        for name, function in sides.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: summary(xs[1:]) for name, xs in times.items()}


def ratio(a, b, scale=1.0):
    return {key: scale * a[key] / b[key] for key in ("min", "median")}


def figure(what, ratio, target="", **facts):
    """A row of the results.  ratio: {min, median}; target: ">= 1.3" or "<= 0.1", or "" for a number without one."""
    limit = float(target.split()[1]) if target else None
    met = {"met": ratio["min"] >= limit if target.startswith(">") else ratio["min"] <= limit} if target else {}
    return {"what": what, **ratio, **({"target": target} if target else {}), **met, **facts}


@functools.cache
def model_of(name):
    """The tiny base, as it is or after ten iterations, or random weights in a shape."""
    if name in ("tiny", "tiny, learned"):
        return policy.load_policy(str(ROOT / "tiny_base") if name == "tiny" else learned())[0].requires_grad_(False)
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[name], tie_word_embeddings=True, max_position_embeddings=4096)
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


def prompts_of(name, n, length=None):
    """n prompts: the main job's for the tiny base, else random ones of a length."""
    if name.startswith("tiny"):
        tokenizer = policy.load_tokenizer(str(ROOT / "tiny_base"))
        return evaluation.encode(tokenizer, [data.train_problem(0, 1, i, "2", "terse") for i in range(n)])
    return torch.randint(SHAPES[name]["vocab_size"], (n, length), generator=torch.Generator().manual_seed(0)).tolist()


def rollouts_of(method, name, prompts, batch=None, **options):
    """Rollouts by search or sample, `batch` problems in lock-step.  Returns (Rollouts, the last Expander)."""
    options = astar_search.Options(**{"eos": (1,) if name.startswith("tiny") else ()} | options)
    parts, batch = [], batch or len(prompts)
    for i in range(0, len(prompts), batch):
        expander = astar_search.Expander(model_of(name), prompts[i : i + batch], options.max_new_tokens)
        trees = method(astar_search.root_keys(0, 1, range(i, i + len(expander.prompts))), expander, options)
        parts.append(astar_search.collect(trees, expander))
    return astar_search.join(parts), expander


@contextlib.contextmanager
def profiled(phases):
    """CPU seconds by phase, each without the phases inside it; a phase is a list of functions, (owner, name)."""
    seconds, stack, kept = collections.Counter(), [], []

    def timed(function, phase):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            start = time.process_time()
            stack.append(0.0)  # seconds of the phases inside
            try:
                return function(*args, **kwargs)
            finally:
                whole, inside = time.process_time() - start, stack.pop()
                seconds[phase] += whole - inside
                if stack:
                    stack[-1] += whole

        return wrapped

    for phase, places in phases.items():
        for owner, name in places:
            kept.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, timed(getattr(owner, name), phase))
    try:
        yield seconds
    finally:
        for owner, name, function in kept:
            delattr(owner, name) if function is None else setattr(owner, name, function)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation inside made, in elements."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.numbers = max(self.numbers, x.numel()) if isinstance(x, torch.Tensor) else self.numbers
        return out


def elsewhere(*argv, root=ROOT):
    """What a fresh python prints last, as JSON.  Memory that it frees goes back to the system at once."""
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, argv)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | limits, cwd=root)
    return json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else sys.exit(run.stderr)


@functools.cache
def learned():
    """A checkpoint of the quick run after ten iterations, whose completions are as long as they stay."""
    flags = f"--config quick --iterations 10 --eval-problems 10 --output-dir {WORK.name}/run".split()
    run = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    return f"{flags[-1]}/checkpoint_iter_10" if run.returncode == 0 else sys.exit(run.stderr)


# ==================================================================================================== the items


def sampling():
    """1. i.i.d. sampling through the expander against generate: tokens of completions a second.  "to EOS": a completion ends
    where it says so, as in the main job, and generate runs on until the last of a batch has ended; else all have T tokens."""
    for name, N, K, T, length, eos, target in (
        ("tiny", 64, 8, 48, None, (), ">= 1.3"), ("tiny", 256, 1, 48, None, (), ""),
        ("tiny", 64, 8, 48, None, (1,), ">= 1.3"), ("tiny, learned", 64, 8, 48, None, (1,), ">= 1.3"),
        ("135M", 4, 8, 24, 140, (), ">= 1.3"), ("135M", 8, 1, 24, 140, (), ""),
    ):  # fmt: skip
        model, prompts, tokens = model_of(name), prompts_of(name, N, length), {}
        ids, how = torch.tensor(prompts), dict(do_sample=True, top_k=0, max_new_tokens=T, pad_token_id=0, eos_token_id=eos or None)

        def generate():
            out = model.generate(ids, GenerationConfig(**how, num_return_sequences=K))[:, ids.shape[1] :]
            ends = (out == (eos or (-1,))[0]).long()
            tokens["generate"] = (ends.cumsum(1) - ends == 0).sum().item()  # up to the first EOS

        @torch.no_grad()
        def prompt_once():  # what a user can do by hand: run the prompts once and copy their K/V
            cache = DynamicCache(config=model.config)
            model.base_model(ids[:, :-1], past_key_values=cache)
            cache.batch_repeat_interleave(K)
            model.generate(ids.repeat_interleave(K, 0), GenerationConfig(**how), past_key_values=cache)

        def ours():
            drawn = rollouts_of(astar_search.sample, name, prompts, K=K, max_new_tokens=T, eos=eos)[0]
            tokens["ours"] = (drawn.count * (drawn.length - drawn.prompt_length)).sum().item()

        times = race(ours=ours, generate=generate, prompt_once=prompt_once)
        sizes = dict(prompts=N, prompt_tokens=ids.shape[1], samples=K, new_tokens=T, tokens=tokens, seconds=times)
        for other, words, limit in (("generate", "", target), ("prompt_once", " on a cache of prompts run once", "")):
            what = f"{name}, {K} samples a prompt{', to EOS' if eos else ''}: tokens a second, ours / generate{words}"
            yield figure(what, ratio(times[other], times["ours"], tokens["ours"] / tokens["generate"]), limit, **sizes)


def search_sides(name):
    """A* and sampling with about as many model tokens a forward: two functions, and what they return last."""
    found = {}
    if name == "tiny":
        prompts, options, width, batch = prompts_of(name, 256), dict(K=8, max_new_tokens=48), 2, 120
    else:
        prompts, options, width, batch = prompts_of(name, 32, 16), dict(K=4, max_new_tokens=8), 1, 8

    def astar():
        found["astar"] = rollouts_of(astar_search.search, name, prompts, width=width, **options)[0].stats

    def sample():
        found["sample"] = rollouts_of(astar_search.sample, name, prompts, batch=batch, **options)[0].stats

    return astar, sample, found


def search():
    """2. A* against our own sampling: model tokens a second."""
    for name, target in (("tiny", ">= 0.6"), ("135M", ">= 0.9")):
        astar, sample, found = search_sides(name)
        times = race(astar=astar, sample=sample)
        work = {side: stats["model_tokens"] for side, stats in found.items()}
        a_forward = {side: work[side] / found[side]["forwards"] for side in work}
        rate = ratio(times["sample"], times["astar"], work["astar"] / work["sample"])
        yield figure(f"{name}: model tokens a second, A* / sampling", rate, target, a_forward=a_forward, seconds=times)


def host():
    """3. Where the time of A* goes: the share outside of the model's forward, inside which the cache copies K/V."""
    for name, target in (("tiny", "<= 0.35"), ("135M", "<= 0.10")):
        model, (astar, _, _), shares = model_of(name), search_sides(name), []
        phases = {
            "model": [(model.base_model, "forward"), (model.lm_head, "forward"), (astar_search.F, "log_softmax")],
            "K/V": [(astar_search.NodeCache, "update")],
            "noise and top-k": [(astar_search, "best_children")],
            "copies to the host": [(torch.Tensor, "numpy"), (astar_search, "collect"), (astar_search, "join")],
            "heaps": [(astar_search.Tree, "wanted"), (astar_search.Tree, "advance"), (astar_search, "search")],
            "masks and rows": [(astar_search.Expander, "__call__")],
        }
        for _ in range(arguments().repeats + 1):
            with profiled(phases) as seconds:
                astar()
            shares.append({phase: seconds[phase] / sum(seconds.values()) for phase in phases})
        outside = summary([1 - share["model"] - share["K/V"] for share in shares[1:]])
        medians = {phase: statistics.median([share[phase] for share in shares[1:]]) for phase in phases}
        yield figure(f"{name}: share of A*'s seconds outside of the model's forward", outside, target, medians=medians)


def growth():
    """4. Cost and memory of a node as the tree grows: with the tiny base, and the search alone, with a table."""
    prompts = prompts_of("tiny", 8)
    logp = torch.randn(997, 24, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    table = lambda nodes: (logp[[node.key % 997 for node in nodes]], torch.zeros(len(nodes), 1))
    for name, again in (("a table", 16), ("tiny", 4)):  # so many small searches, to take some time
        pops = {}

        def go(nodes):
            options = astar_search.Options((1,), K=10**6, tau=0.0, width=8, max_nodes=nodes, max_new_tokens=48)
            expand = table if name == "a table" else astar_search.Expander(model_of(name), prompts, 48)
            trees = astar_search.search(astar_search.root_keys(0, 1, range(8)), expand, options)
            pops[nodes] = sum(tree.pops for tree in trees)

        times = race(large=lambda: go(4096), small=lambda: [go(256) for _ in range(again)])
        cost = ratio(times["large"], times["small"], again * pops[256] / pops[4096])
        yield figure(f"{name}: cost of a node, 4,096 nodes a problem / 256", cost, "<= 1.5", seconds=times, nodes=pops)
    few, some, many = (elsewhere(__file__, "--memory-of-nodes", n) for n in (1024, 2048, 4096))
    slopes = [(b["bytes"] - a["bytes"]) / (b["nodes"] - a["nodes"]) for a, b in ((few, some), (some, many))]
    what = "tiny: bytes a node, 2,048 to 4,096 nodes a problem / 1,024 to 2,048"
    yield figure(what, {"min": slopes[1] / slopes[0]}, "<= 1.2", bytes_a_node=slopes, of_which_kv=few["kv"])


def memory_of_nodes(nodes):
    """Resident memory that searches of so many nodes a problem take, in a fresh process."""
    rollouts_of(astar_search.search, "tiny", prompts_of("tiny", 8), K=8, max_new_tokens=48)  # what is allocated once
    before = memory.resident("VmRSS")
    expander = astar_search.Expander(model_of("tiny"), prompts_of("tiny", 8), 48)
    options = astar_search.Options((1,), K=10**6, width=8, max_nodes=nodes, max_new_tokens=48)
    trees = astar_search.search(astar_search.root_keys(0, 1, range(8)), expander, options)
    kv = sum(table.shape[1] * table.element_size() for table in expander.cache.tables.values())
    return {"nodes": sum(tree.pops for tree in trees), "bytes": memory.resident("VmRSS") - before, "kv": kv}


def naive():
    """5. The search that keeps no K/V, 64 tokens deep: it runs the whole prefix of every node that it opens, or, as
    naive searches do, of every child that it queues (a pop queues two: the best child and the next sibling)."""
    N, model, prompts = 32, model_of("tiny"), prompts_of("tiny", 32)
    options, leaves = astar_search.Options((), K=2, width=1, max_new_tokens=64), {}

    @torch.no_grad()
    def opened(nodes):
        prefixes = [prompts[node.problem] + node.path() for node in nodes]
        last = torch.tensor([len(prefix) - 1 for prefix in prefixes])
        batch = torch.tensor([prefix + [0] * (max(last) + 1 - len(prefix)) for prefix in prefixes])
        hidden = model.base_model(batch, use_cache=False).last_hidden_state[torch.arange(len(nodes)), last]
        return model.lm_head(hidden).log_softmax(-1), torch.zeros(len(nodes), 1)

    def go(side, expand):
        trees = astar_search.search(astar_search.root_keys(0, 1, range(N)), expand, options)
        leaves[side] = [[leaf.path() for leaf in tree.leaves] for tree in trees]

    queued = lambda nodes: [x[: len(nodes)] for x in opened(nodes + nodes)]
    expander = lambda: astar_search.Expander(model, prompts, 64)
    times = race(ours=lambda: go("ours", expander()), opened=lambda: go("opened", opened),
                 queued=lambda: go("queued", queued))  # fmt: skip
    same = sum(a == b for a, b in zip(leaves["ours"], leaves["opened"]))
    for other, words, limit in (("opened", "opened node", ""), ("queued", "queued child", ">= 10")):
        yield figure(f"tiny: seconds, the whole prefix of every {words} / ours", ratio(times[other], times["ours"]),
                     limit, problems=N, with_the_same_leaves=same, seconds=times)  # fmt: skip


def children():
    """6. A vocabulary of 151,936: children against the forward; what the update makes, and its peak memory."""
    model, V = model_of("0.5B"), SHAPES["0.5B"]["vocab_size"]
    for n in (1, 16):
        prompts, cache = torch.tensor(prompts_of("0.5B", n, 4)), DynamicCache(config=model.config)
        parents, h = [(0.0, 0.0, key) for key in astar_search.root_keys(0, 0, range(n))], torch.zeros(n, 1)
        logp = torch.randn(n, V, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

        @torch.no_grad()
        def forward():
            model(prompts[:, :1], past_key_values=cache).logits.log_softmax(-1)
            cache.crop(-1)

        with torch.no_grad():
            model.base_model(prompts, past_key_values=cache)
        for tau in (1.0, 0.0):
            times = race(children=lambda: astar_search.best_children(logp, h, parents, tau, 9), forward=forward)
            share = ratio(times["children"], times["forward"])
            yield figure(f"0.5B, {n} nodes, tau {tau:g}: children / forward", share, "<= 0.10", seconds=times)
    ours, theirs = (elsewhere(__file__, "--memory-of-update", side) for side in ("score", "naive"))
    what, largest = "update of 4 x 256 tokens of 151,936: ", {"min": ours["largest"] / (1 << 24)}
    yield figure(what + "largest tensor / a chunk", largest, "<= 1", ours=ours, naive=theirs)
    yield figure(what + "peak bytes, ours / with (B, T, V) logits", {"min": ours["bytes"] / theirs["bytes"]}, "<= 0.5")


def memory_of_update(side):
    """Peak memory of a backward pass through log pi and entropy, and the largest tensor made, with a small body."""
    model = model_of("large vocabulary").requires_grad_(True)
    tokens, mask = torch.randint(model.config.vocab_size, (4, 257)), torch.ones(4, 256, dtype=torch.bool)

    def step():
        if side == "score":
            logp, entropy, _ = policy.score(model, tokens, mask)
        else:
            full = model(tokens[:, :-1]).logits.float().log_softmax(-1)
            logp, entropy = full.gather(2, tokens[:, 1:, None])[..., 0], -(full.exp() * full).sum(-1)
        (logp + 0.01 * entropy).sum().backward()

    step()
    before = memory.resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    step()
    peak = memory.resident("VmHWM") - before
    with Largest() as largest:
        step()
    return {"bytes": peak, "largest": largest.numbers}


def batch_of(argv):
    """One iteration's rollouts, as train.py makes them: (model, rollouts, indices, config)."""
    config, _, _ = train.parse(argv.split())
    model, tokenizer = policy.load_policy(config.model)
    reward, ranks = train.reward_module.load("", config.format_bonus, config.length_penalty), fsdp.start(device="cpu")
    problems, indices = train.draw_problems(config, 1, ranks, None)
    keys, K = astar_search.root_keys(0, 1, indices), config.rollouts_per_problem
    rollouts = train.make_rollouts(model, tokenizer, problems, keys, config, reward, None, config.rollout, K)
    _, verdicts = evaluation.judge(rollouts, tokenizer, problems, reward, config.max_new_tokens)
    rollouts.extra = train.credit(rollouts, verdicts, reward, config)
    return model, rollouts, indices, config


def random_batch(B, low, high):
    """The same of random tokens for the 135M shape: B rollouts of `low` to `high` tokens, a third of each a prompt."""
    config, _, _ = train.parse(f"--problems-per-iteration {B} --minibatches 1 --micro-batch 4".split())
    model, length = model_of("135M").requires_grad_(True), torch.linspace(low, high, B).long()
    zero, grid, tokens = torch.zeros(B), torch.zeros(B, high - 1), torch.randint(model.config.vocab_size, (B, high))
    extra = {"rewards": zero, "soft_targets": zero, "leaf_weight": zero + 1, "advantages": grid + 1}
    columns = (tokens, length // 3, length, torch.arange(B), grid, grid, zero, zero, zero, zero, zero > 0, extra)
    return model, astar_search.Rollouts(*columns), range(B), config


def update():
    """7. What of a batch is padding; the training step against transformers' own loss on as many in a rectangle."""
    runs = {
        "ppo, first iteration": "--config ppo", "quick, first iteration": "--config quick", "135M": None,
        "ppo, later": f"--config ppo --model {learned()}", "quick, later": f"--config quick --model {learned()}",
    }  # fmt: skip
    for name, argv in runs.items():
        model, rollouts, indices, config = random_batch(8, 90, 150) if argv is None else batch_of(argv)
        config.epochs, ranks = 1, fsdp.start(device="cpu")
        dealt = train.minibatches_of(rollouts, indices, config, 1, 0)
        real = (rollouts.length - 1).sum().item()
        padded = sum(len(rows) * (rollouts.length[rows].max().item() - 1) for minibatch in dealt for rows in minibatch)
        yield figure(f"{name}: share of a batch that is padding", {"min": 1 - real / padded}, "<= 0.15", tokens=real)
        if "first" in name:
            continue
        head, B, T = value_module.ValueHead(model.config.hidden_size), len(rollouts), real // len(rollouts)
        both = torch.optim.AdamW([{"params": list(module.parameters())} for module in (model, head)])
        alone = torch.optim.AdamW(model.parameters(), lr=1e-6)
        score, dense = functools.partial(policy.score, model), torch.randint(model.config.vocab_size, (B, T))

        def plain():
            for minibatch in dense.chunk(config.minibatches):
                for part in minibatch.split(config.micro_batch):
                    model(part, labels=part, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                alone.step()
                alone.zero_grad()

        ours = lambda: train.update(model, score, head, both, rollouts, indices, config, 1, ranks)
        times = race(ours=ours, plain=plain)
        rate = ratio(times["plain"], times["ours"], real / (B * T))
        yield figure(f"{name}: tokens a second of a step, ours / plain", rate, ">= 0.85", rollouts=B, T=T, seconds=times)


DRIVER = """
import json, sys, time
sys.path.insert(0, ".")
import train
spent = {}
def watch(module, name):
    function = getattr(module, name)
    def timed(*args, **kwargs):
        start = time.process_time()
        result = function(*args, **kwargs)
        spent[name] = spent.get(name, 0.0) + time.process_time() - start
        return result
    setattr(module, name, timed)
watch(train, "make_rollouts"), watch(train, "update"), watch(train.evaluation, "evaluate")
train.main(sys.argv[1:])
print("\\n" + json.dumps(spent))
"""


def to_80(root, seed):
    """CPU seconds of `python train.py`, one thread, until its first evaluation at 80 %, start-up included."""
    folder = pathlib.Path(WORK.name) / f"to_80 {seed}"
    flags = f"--eval-every 5 --overwrite --device cpu --seed {seed} --output-dir".split()
    shutil.rmtree(folder, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, "train.py", *flags, folder], cwd=root, env=environment, stdout=subprocess.DEVNULL)
    while not any(row.get("eval_accuracy", 0) >= 0.8 for row in compare.rows(folder / "metrics.jsonl")):
        time.sleep(0.5)
        if run.poll() is not None:
            sys.exit(f"train.py of {root} ended without 80 %")
    run.kill()
    used = os.wait4(run.pid, 0)[2]
    return used.ru_utime + used.ru_stime


def job():
    """8. The main job against the commit at which this began: `python train.py` to 80 %, and single iterations of what was
    the default then (ppo) and of --config quick, from a model that has learned."""
    with tempfile.TemporaryDirectory() as before:
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", before, BEFORE], cwd=ROOT, check=True)
        try:
            seconds = {"before": [], "now": []}
            for seed in range(3):
                for side, root in (("before", before), ("now", ROOT)):
                    seconds[side].append(to_80(root, seed))
            reached = {side: summary(each) for side, each in seconds.items()}
            yield figure("python train.py to 80 %, seeds 0, 1, 2: before / now", ratio(reached["before"], reached["now"]), ">= 1.5", seconds=seconds)
            for config in ("ppo", "quick"):  # what is ppo now was the default then
                names = {"now": config, "before": {"ppo": "local"}.get(config, config)}
                flags = f"--model {learned()} --iterations 2 --eval-problems 100 --overwrite --output-dir {before}/run"
                runs = {"now": [], "before": []}
                for _ in range(arguments().repeats):
                    for side, root in (("now", ROOT), ("before", before)):
                        runs[side].append(elsewhere("-c", DRIVER, "--config", names[side], *flags.split(), root=root))
                cost = {side: {phase: summary([run[phase] for run in each]) for phase in each[0]}
                        for side, each in runs.items()}  # fmt: skip
                both = lambda run: run["make_rollouts"] + run["update"]
                whole = {side: summary(list(map(both, each))) for side, each in runs.items()}
                speedup = ratio(whole["before"], whole["now"])
                yield figure(f"--config {config}: seconds of two iterations, before / now", speedup, seconds=cost)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)


def prefixes():
    """9. K/V of a prompt: once a problem, not once a rollout."""
    N, K, T, length, model = 2, 8, 8, 140, model_of("135M")
    prompts = prompts_of("135M", N, length)
    how = dict(max_new_tokens=T, num_return_sequences=K, do_sample=True, pad_token_id=0, return_dict_in_generate=True)
    cache = model.generate(torch.tensor(prompts), GenerationConfig(**how)).past_key_values
    theirs = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    for method in (astar_search.sample, astar_search.search):
        _, expander = rollouts_of(method, "135M", prompts, K=K, max_new_tokens=T)
        ours = expander.cache.rows * sum(x.shape[1] * x.element_size() for x in expander.cache.tables.values())
        what = f"135M, {N} x {K} completions, {T} tokens after {length}: bytes of K/V, {method.__name__} / generate"
        limit = f"<= {1.02 * (length + K * T) / (K * (length + T)):.3f}"
        yield figure(what, {"min": ours / theirs}, limit, ours=ours, generate=theirs)


def gpu():
    """10. No GPU here.  Counted: copies to the host.  Estimated: decoding at the 3B shape in bfloat16, by traffic."""
    copies, cpu = [], torch.Tensor.cpu
    torch.Tensor.cpu = lambda tensor: copies.append(1) or cpu(tensor)
    try:
        expander = astar_search.Expander(model_of("tiny"), prompts_of("tiny", 64), 48)
        options = astar_search.Options((1,), K=8, width=2, max_new_tokens=48)
        astar_search.search(astar_search.root_keys(0, 1, range(64)), expander, options)
    finally:
        torch.Tensor.cpu = cpu
    yield figure("copies to the host / forwards of a search", {"min": len(copies) / expander.forwards}, "<= 1.05")
    model, nodes, context = memory.outline(str(ROOT / "experiments" / "qwen2.5-3b")), 256, 512
    text, weights = model.config, 2 * sum(parameter.numel() for parameter in model.parameters())
    row = 2 * 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * text.num_hidden_layers
    kv = row * nodes * context  # a gather reads it, writes it, and attention reads it again
    what = f"ESTIMATE, 3B in bfloat16, {nodes} nodes a round of {context} tokens: bytes to be read / bytes moved"
    yield figure(what, {"min": (weights + kv) / (weights + 3 * kv)}, weights=weights, kv=kv)


ORDER = (sampling, search, host, growth, naive, children, update, job, prefixes, gpu)
ITEMS = {function.__name__: function for function in ORDER}


def main():
    args = arguments()
    torch.set_num_threads(1)
    if args.memory_of_nodes:
        return print(json.dumps(memory_of_nodes(args.memory_of_nodes)))
    if args.memory_of_update:
        return print(json.dumps(memory_of_update(args.memory_of_update)))
    if set(args.items) - set(ITEMS):
        sys.exit(f"speed.py: the items are {', '.join(ITEMS)}")
    where = {"cpu": compare.cpu(), "threads": 1, "repeats": args.repeats, "torch": torch.__version__}
    rows = compare.rows(RESULTS)
    for item in args.items or ITEMS:
        gc.collect()
        gc.freeze()  # for both sides of every race: collections do not look at what the imports have made
        rows = [row for row in rows if row["item"] != item]
        for row in ITEMS[item]():
            verdict = {True: "met", False: "MISSED"}.get(row.get("met"), "")
            median = f" ({row['median']:.3f})" if "median" in row else ""
            target = row.get("target", "")
            print(f"{item:9s} {row['min']:8.3f}{median:10s} {target:8s} {verdict:7s} {row['what']}", flush=True)
            rows.append({"item": item} | row | where)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
