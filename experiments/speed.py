"""speed.py -- what the search costs beside what the model costs.  Every figure is a ratio of two things measured in turn.

    python experiments/speed.py                     # all ten items, a row a figure in experiments/results/speed.jsonl
    python experiments/speed.py host children       # some of them: their rows are replaced

A B A B ..., five times or more, one thread; the ratio is that of the smallest and of the median CPU seconds of this
process (wall seconds are in the rows).  Models: the tiny base, and random weights in the shape of SmolLM2 (135M) and of
Qwen2.5 (0.5B), where no completion is likely, so that samples of a prompt share the prompt and nothing else.
"""

import argparse
import collections
import contextlib
import functools
import gc
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import astar_search  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import fsdp  # noqa: E402
import policy  # noqa: E402
import train  # noqa: E402
import value as value_module  # noqa: E402

RESULTS = ROOT / "experiments" / "results" / "speed.jsonl"
BEFORE = "e4e8cee"  # the commit that the main job is compared with
SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary
    "135M": (576, 1536, 30, 9, 3, 49152),
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "large vocabulary": (64, 128, 2, 2, 2, 151936),
}

# ==================================================================================================== measuring


def race(sides):
    """{name: function} -> {name: [(CPU, wall seconds), ...]}: each once unmeasured, then --repeats times in turn."""
    times = {name: [] for name in sides}
    for repeat in range(arguments().repeats + 1):
        for name, function in sides.items():
            start = time.process_time(), time.perf_counter()
            function()
            if repeat:
                times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return times


@functools.cache
def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", nargs="*", help="names of items; none: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of-nodes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of-update", help=argparse.SUPPRESS)
    return parser.parse_args()


def summary(xs):
    return {"min": min(xs), "median": statistics.median(xs)}


def figure(item, what, ratio, target, **facts):
    """Print and return a row.  ratio: {min, median}; target: (">=" or "<=", number), or None for a number without one."""
    row = {"item": item, "what": what, "ratio": ratio, **facts}
    words = "".join(f"  {name} {x:.3f}" for name, x in ratio.items())
    if target:
        met = ratio["min"] >= target[1] if target[0] == ">=" else ratio["min"] <= target[1]
        row |= {"target": " ".join(map(str, target)), "met": met}
        words += f"  target {row['target']}: {'met' if met else 'MISSED'}"
    print(f"{item:10s} {what}\n          {words}\n           {facts}", flush=True)
    return row


def versus(item, what, times, work, target, **facts):
    """The row of a race between two: how many times the second's units of work a second the first does."""
    (ours, a), (theirs, b) = ((name, [cpu for cpu, _ in runs]) for name, runs in times.items())
    rate = lambda name, xs: {key: work[name] / x for key, x in summary(xs).items()}
    ratio = {key: rate(ours, a)[key] / rate(theirs, b)[key] for key in ("min", "median")}
    return figure(item, what, ratio, target, cpu_seconds={ours: summary(a), theirs: summary(b)},
                  wall_seconds={name: summary([wall for _, wall in runs]) for name, runs in times.items()},
                  a_second={ours: rate(ours, a)["min"], theirs: rate(theirs, b)["min"]}, **facts)  # fmt: skip


@functools.cache
def model_of(name):
    """The tiny base, or random weights in a shape."""
    if name == "tiny":
        return policy.load_policy(str(ROOT / "tiny_base"))[0].requires_grad_(False)
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                                        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
                                        tie_word_embeddings=True, max_position_embeddings=4096)).eval().requires_grad_(False)  # fmt: skip


def prompts_of(name, n, length=None):
    """n prompts: the main job's for the tiny base, else random ones of a length."""
    if name == "tiny":
        tokenizer = policy.load_tokenizer(str(ROOT / "tiny_base"))
        return evaluation.encode(tokenizer, [data.train_problem(0, 1, i, "2", "terse") for i in range(n)])
    return torch.randint(SHAPES[name][5], (n, length), generator=torch.Generator().manual_seed(0)).tolist()


def rollouts_of(method, name, prompts, batch=None, value=None, **options):
    """Rollouts by search or sample, `batch` problems in lock-step.  Returns (Rollouts, the last Expander)."""
    options = astar_search.Options(**{"eos": (1,) if name == "tiny" else ()} | options)
    parts, batch = [], batch or len(prompts)
    for i in range(0, len(prompts), batch):
        expander = astar_search.Expander(model_of(name), prompts[i : i + batch], options.max_new_tokens, value)
        trees = method(astar_search.root_keys(0, 1, range(i, i + len(expander.prompts))), expander, options)
        parts.append(astar_search.collect(trees, expander))
    return astar_search.join(parts), expander


class Profile:
    """CPU seconds by phase, each without the phases inside it.  A phase is a list of functions, (owner, name)."""

    def __init__(self, phases):
        self.phases, self.seconds, self.stack = phases, collections.Counter(), []

    def _switch(self, to_stack):
        now = time.process_time()
        if self.stack:
            self.seconds[self.stack[-1]] += now - self.since
        to_stack()
        self.since = time.process_time()

    @contextlib.contextmanager
    def watching(self):
        kept = []
        for phase, places in self.phases.items():
            for owner, name in places:
                function = getattr(owner, name)

                @functools.wraps(function)
                def timed(*args, _function=function, _phase=phase, **kwargs):
                    self._switch(lambda: self.stack.append(_phase))
                    try:
                        return _function(*args, **kwargs)
                    finally:
                        self._switch(self.stack.pop)

                kept.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, timed)
        try:
            yield self
        finally:
            for owner, name, function in kept:
                delattr(owner, name) if function is None else setattr(owner, name, function)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation inside made, in elements."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def resident(name="VmRSS"):
    """Bytes of this process: VmRSS now, VmHWM the peak since it was reset."""
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])


def elsewhere(*argv, root=ROOT):
    """What a fresh python prints last, as JSON.  Memory that it frees goes back to the system at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, env=environment, cwd=root)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


# ==================================================================================================== the items


def sampling():
    """1. i.i.d. sampling through the expander against generate, completions of one length, no EOS."""

    def race_generate(name, N, K, T, length, target):
        model, prompts = model_of(name), prompts_of(name, N, length)
        ids = torch.tensor(prompts)
        how = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=T, num_return_sequences=K, pad_token_id=0)

        def shared_prompt():  # what a user can do by hand: the prompts' K/V once, then copied K times
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model.base_model(ids[:, :-1], past_key_values=cache)
            cache.batch_repeat_interleave(K)
            model.generate(ids.repeat_interleave(K, 0), GenerationConfig(**how.to_diff_dict() | {"num_return_sequences": 1}),
                           past_key_values=cache)  # fmt: skip

        sides = {
            "ours": lambda: rollouts_of(astar_search.sample, name, prompts, K=K, max_new_tokens=T, eos=()),
            "generate": lambda: model.generate(ids, how),
        }
        if K > 1:
            sides["generate, prompt once"] = shared_prompt
        times, work = race(sides), dict.fromkeys(sides, N * K * T)
        sizes = dict(prompts=N, prompt_tokens=ids.shape[1], samples=K, new_tokens=T)
        for other in list(sides)[1:]:
            yield versus("sampling", f"{name}: {K} samples a prompt, ours / {other}", {n: times[n] for n in ("ours", other)},
                         work, target if other == "generate" else None, **sizes)  # fmt: skip

    yield from race_generate("tiny", 64, 8, 48, None, (">=", 1.3))
    yield from race_generate("tiny", 256, 1, 48, None, None)
    yield from race_generate("135M", 4, 8, 24, 140, (">=", 1.3))
    yield from race_generate("135M", 8, 1, 24, 140, None)


def search_sides(name):
    """A* and sampling with about as many model tokens a forward: {name: function}, and what they return last."""
    found = {}
    if name == "tiny":
        prompts, options, batch = prompts_of(name, 256), dict(K=8, max_new_tokens=48), 120
    else:
        prompts, options, batch = prompts_of(name, 32, 16), dict(K=4, max_new_tokens=8), 8

    def go(side, method, **more):
        found[side], _ = rollouts_of(method, name, prompts, **options, **more)

    return {"A*": lambda: go("A*", astar_search.search, width=1 + (name == "tiny")),
            "sampling": lambda: go("sampling", astar_search.sample, batch=batch)}, found  # fmt: skip


def search():
    """2. A* against our own sampling, model tokens a second."""
    for name, target in (("tiny", 0.6), ("135M", 0.9)):
        sides, found = search_sides(name)
        times = race(sides)
        work = {side: found[side].stats["model_tokens"] for side in sides}
        a_forward = {side: work[side] / found[side].stats["forwards"] for side in sides}
        yield versus("search", f"{name}: A* / sampling", times, work, (">=", target), tokens_a_forward=a_forward, model_tokens=work)


def host():
    """3. Where the time of A* goes: the share outside of the model's forward, in which the cache's copies are counted too."""
    for name, target in (("tiny", 0.35), ("135M", 0.10)):
        model, (sides, _) = model_of(name), search_sides(name)
        profile = Profile({
            "model": [(model.base_model, "forward"), (model.lm_head, "forward"), (astar_search.F, "log_softmax")],
            "K/V": [(astar_search.NodeCache, "update")],
            "noise and top-k": [(astar_search, "best_children")],
            "copies to the host": [(torch.Tensor, "numpy"), (astar_search, "collect"), (astar_search, "join")],
            "heaps": [(astar_search.Tree, "wanted"), (astar_search.Tree, "advance"), (astar_search, "search")],
            "masks and rows": [(astar_search.Expander, "__call__")],
        })  # fmt: skip
        shares = collections.defaultdict(list)
        for repeat in range(arguments().repeats + 1):
            profile.seconds.clear()
            with profile.watching():
                sides["A*"]()
            total = sum(profile.seconds.values())
            if repeat:
                for phase, t in profile.seconds.items():
                    shares[phase].append(t / total)
        shares["host"] = [1 - m - k for m, k in zip(shares["model"], shares["K/V"])]
        yield figure("host", f"{name}: share of A*'s seconds outside of the model's forward", summary(shares["host"]), ("<=", target),
                     median_shares={phase: statistics.median(xs) for phase, xs in shares.items()})  # fmt: skip


def growth():
    """4. Cost and memory of a node as the tree grows."""
    prompts = prompts_of("tiny", 8)

    def go(nodes, tau):
        rollouts, _ = rollouts_of(astar_search.search, "tiny", prompts, K=10**6, tau=tau, width=8, max_nodes=nodes, max_new_tokens=48)
        pops[nodes] = rollouts.stats["pops"]

    for tau in (0.0, 1.0):
        pops = {}
        times = race({4096: lambda: go(4096, tau), 256: lambda: [go(256, tau) for _ in range(8)]})
        cost = {n: [cpu / pops[n] / (8 if n == 256 else 1) for cpu, _ in runs] for n, runs in times.items()}
        ratio = {key: summary(cost[4096])[key] / summary(cost[256])[key] for key in ("min", "median")}
        yield figure("growth", f"tau {tau:g}: cost of a node at 4,096 nodes a problem / at 256", ratio, ("<=", 1.5),
                     microseconds={n: 1e6 * min(xs) for n, xs in cost.items()})  # fmt: skip
    sizes = (1024, 2048, 4096)
    memory = [elsewhere(__file__, "--memory-of-nodes", n) for n in sizes]
    slopes = [(b["bytes"] - a["bytes"]) / (b["nodes"] - a["nodes"]) for a, b in zip(memory, memory[1:])]
    yield figure("growth", "bytes a node, 2,048 to 4,096 nodes a problem / 1,024 to 2,048", {"min": slopes[1] / slopes[0]}, ("<=", 1.2),
                 bytes_a_node=slopes, of_which_KV=memory[0]["kv"], memory=memory)  # fmt: skip


def memory_of_nodes(nodes):
    """Resident memory that searches of so many nodes a problem take, in a fresh process."""
    rollouts_of(astar_search.search, "tiny", prompts_of("tiny", 8), K=8, max_new_tokens=48)  # what is allocated once
    before, kept = resident(), []
    expander = astar_search.Expander(model_of("tiny"), prompts_of("tiny", 8), 48)
    options = astar_search.Options((1,), K=10**6, width=8, max_nodes=nodes, max_new_tokens=48)
    kept = astar_search.search(astar_search.root_keys(0, 1, range(8)), expander, options)
    gc.collect()
    kv = sum(table.shape[1] * table.element_size() for table in expander.cache.tables.values())
    return {"nodes": sum(tree.pops for tree in kept), "bytes": resident() - before, "kv": kv}


def naive():
    """5. The search that keeps no K/V, 64 tokens deep: it runs the whole prefix of every node that it opens, or, as naive
    searches do, of every child that it queues (a pop queues two: the best child and the next sibling)."""
    N, model, prompts = 32, model_of("tiny"), prompts_of("tiny", 32)
    options, leaves = astar_search.Options((), K=2, width=1, max_new_tokens=64), {}

    @torch.no_grad()
    def whole_prefixes(nodes):
        prefixes = [prompts[node.problem] + node.path() for node in nodes]
        last = torch.tensor([len(prefix) - 1 for prefix in prefixes])
        batch = torch.tensor([prefix + [0] * (max(last) + 1 - len(prefix)) for prefix in prefixes])
        hidden = model.base_model(batch, use_cache=False).last_hidden_state[torch.arange(len(nodes)), last]
        return model.lm_head(hidden).log_softmax(-1), torch.zeros(len(nodes), 1)

    def every_child(nodes):
        return [x[: len(nodes)] for x in whole_prefixes(nodes + nodes)]

    def go(side, expand):
        trees = astar_search.search(astar_search.root_keys(0, 1, range(N)), expand, options)
        leaves[side] = [[leaf.path() for leaf in tree.leaves] for tree in trees]

    times = race({
        "ours": lambda: go("ours", astar_search.Expander(model, prompts, 64)),
        "every opened node": lambda: go("naive", whole_prefixes), "every queued child": lambda: go("children", every_child),
    })  # fmt: skip
    same = sum(a == b for a, b in zip(leaves["ours"], leaves["naive"]))
    for other, target in (("every opened node", None), ("every queued child", (">=", 10))):
        yield versus("naive", f"tiny, 64 tokens deep: ours / {other}'s whole prefix", {"ours": times["ours"], other: times[other]},
                     {"ours": 1, other: 1}, target, problems=N, problems_with_the_same_leaves=same)  # fmt: skip


def children():
    """6. A vocabulary of 151,936: children against the forward; what the update makes, and its peak memory."""
    name = "0.5B"
    model, V = model_of(name), SHAPES[name][5]
    for n in (1, 16):
        prompts = prompts_of(name, n, 4)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model.base_model(torch.tensor(prompts), past_key_values=cache)
        parents, h = [(0.0, 0.0, key) for key in astar_search.root_keys(0, 0, range(n))], torch.zeros(n, 1)
        logp = torch.randn(n, V, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

        def forward():
            with torch.no_grad():
                model(torch.tensor(prompts)[:, :1], past_key_values=cache).logits.log_softmax(-1)
            cache.crop(4)

        for tau in (1.0, 0.0):
            times = race({"children": lambda: astar_search.best_children(logp, h, parents, tau, 9), "forward": forward})
            ratio = {key: summary([c for c, _ in times["children"]])[key] / summary([c for c, _ in times["forward"]])[key]
                     for key in ("min", "median")}  # fmt: skip
            yield figure("children", f"0.5B, {n} node{'s' * (n > 1)}, tau {tau:g}: children / forward", ratio, ("<=", 0.10),
                         cpu_seconds={side: summary([cpu for cpu, _ in runs]) for side, runs in times.items()})  # fmt: skip
    ours, theirs = (elsewhere(__file__, "--memory-of-update", side) for side in ("score", "naive"))
    yield figure("children", "update of 4 x 256 tokens: peak memory, in chunks / with (B, T, V) logits",
                 {"min": ours["bytes"] / theirs["bytes"]}, ("<=", 0.5), ours=ours, naive=theirs, chunk=1 << 24)  # fmt: skip


def memory_of_update(side):
    """Peak memory of a backward pass through log pi and entropy, and the largest tensor made, with a small body."""
    model, V = model_of("large vocabulary").requires_grad_(True), SHAPES["large vocabulary"][5]
    tokens, mask = torch.randint(V, (4, 257)), torch.ones(4, 256, dtype=torch.bool)

    def step():
        if side == "score":
            logp, entropy, _ = policy.score(model, tokens, mask)
        else:
            full = model(tokens[:, :-1]).logits.float().log_softmax(-1)
            logp, entropy = full.gather(2, tokens[:, 1:, None])[..., 0], -(full.exp() * full).sum(-1)
        (logp + 0.01 * entropy).sum().backward()

    step()
    before = resident()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    step()
    peak = resident("VmHWM") - before
    with Largest() as largest:
        step()
    return {"bytes": peak, "largest_tensor": largest.numbers}


@functools.cache
def learned():
    """A checkpoint of the quick run after ten iterations, whose completions are as long as they stay."""
    folder = tempfile.mkdtemp()
    flags = f"--config quick --iterations 10 --eval-problems 10 --output-dir {folder}/run".split()
    run = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    return f"{folder}/run/checkpoint_iter_10" if run.returncode == 0 else sys.exit(run.stderr)


def batch_of(argv):
    """One iteration's rollouts, as train.py makes them: (model, rollouts, indices, config)."""
    config, _, _ = train.parse(argv.split())
    model, tokenizer = policy.load_policy(config.model)
    reward, ranks = train.reward_module.load(config.reward, config.format_bonus, config.length_penalty), fsdp.start(device="cpu")
    problems, indices = train.draw_problems(config, 1, ranks, None)
    rollouts = train.make_rollouts(model, tokenizer, problems, astar_search.root_keys(0, 1, indices), config, reward, None,
                                   config.rollout, config.rollouts_per_problem)  # fmt: skip
    _, verdicts = evaluation.judge(rollouts, tokenizer, problems, reward, config.max_new_tokens)
    rollouts.extra = train.credit(rollouts, verdicts, reward, config)
    return model, rollouts, indices, config


def rectangles(B, low, high):
    """The same of random tokens for the 135M shape: B rollouts of `low` to `high` tokens, a third of each a prompt."""
    config, _, _ = train.parse(f"--problems-per-iteration {B} --minibatches 1 --micro-batch 4".split())
    length = torch.linspace(low, high, B).long()
    zero, grid = torch.zeros(B), torch.zeros(B, high - 1)
    rollouts = astar_search.Rollouts(torch.randint(SHAPES["135M"][5], (B, high)), length // 3, length, torch.arange(B), grid, grid,
                                     zero, zero, zero, zero, zero > 0)  # fmt: skip
    rollouts.extra = {"rewards": zero, "soft_targets": zero, "leaf_weight": zero + 1, "advantages": grid + 1}
    return model_of("135M").requires_grad_(True), rollouts, range(B), config


def update():
    """7. The training step against transformers' own loss on as many tokens without padding; what of a batch is padding."""
    ranks, late = fsdp.start(device="cpu"), f"--model {learned()}"
    batches = {
        "tiny, first iteration": lambda: batch_of(""), "tiny, quick, first iteration": lambda: batch_of("--config quick"),
        "tiny, 10 iterations later": lambda: batch_of(late), "tiny, quick, 10 later": lambda: batch_of(f"--config quick {late}"),
        "135M": lambda: rectangles(8, 90, 150),
    }  # fmt: skip
    for name, make in batches.items():
        model, rollouts, indices, config = make()
        config.epochs = 1
        dealt = train.minibatches_of(rollouts, indices, config, 1, 0)
        real = (rollouts.length - 1).sum().item()
        padded = sum(len(rows) * (rollouts.length[rows].max().item() - 1) for minibatch in dealt for rows in minibatch)
        yield figure("update", f"{name}: share of a batch that is padding", {"min": 1 - real / padded}, ("<=", 0.15), tokens=real)
        if "first" in name:
            continue
        head = value_module.ValueHead(model.config.hidden_size)
        optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-6) for module in (model, head)]
        T = real // len(rollouts)
        dense = torch.randint(model.config.vocab_size, (len(rollouts), T + 1))[:, : T + 1]

        def plain():
            for rows in dense.chunk(config.minibatches):
                for part in rows.split(config.micro_batch):
                    model(part[:, :-1], labels=part[:, 1:], use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizers[0].step()
                optimizers[0].zero_grad()

        score = functools.partial(policy.score, model)
        times = race({"ours": lambda: train.update(model, score, head, optimizers, rollouts, indices, config, 1, ranks), "plain": plain})
        yield versus("update", f"{name}: tokens a second, ours / a plain dense batch", times, {"ours": real, "plain": len(dense) * T},
                     (">=", 0.85), rollouts=len(rollouts), mean_length=T)  # fmt: skip


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
        spent.setdefault(name, []).append(time.process_time() - start)
        return result
    setattr(module, name, timed)
watch(train, "make_rollouts"), watch(train, "update"), watch(train.evaluation, "evaluate")
train.main(sys.argv[1:])
print("\\n" + json.dumps(spent))
"""


def job():
    """8. An iteration of the main job, and of --config quick, against the commit at which this began; both from a model
    that has learned.  As both need the same iterations to 80 %, this is the ratio of the seconds to 80 % too."""
    with tempfile.TemporaryDirectory() as before:
        subprocess.run(["git", "worktree", "add", "--detach", before, BEFORE], cwd=ROOT, check=True, capture_output=True)
        try:
            for config in ("local", "quick"):
                flags = f"--config {config} --model {learned()} --iterations 2 --eval-problems 100 --overwrite --output-dir".split()
                runs = {"now": [], "before": []}
                for _ in range(arguments().repeats):
                    for side, root in (("now", ROOT), ("before", before)):
                        runs[side].append(elsewhere("-c", DRIVER, *flags, f"{learned()}_{side}", root=root))
                cost = {side: {phase: summary([sum(run[phase]) for run in each]) for phase in each[0]} for side, each in runs.items()}
                total = {side: {key: sum(cost[side][phase][key] for phase in ("make_rollouts", "update")) for key in ("min", "median")}
                         for side in cost}  # fmt: skip
                ratio = {key: total["before"][key] / total["now"][key] for key in ("min", "median")}
                yield figure("job", f"--config {config}: CPU seconds of two iterations, before / now", ratio, (">=", 1.5), cpu_seconds=cost)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)


def prefixes():
    """9. K/V of a prompt: once a problem, not once a rollout."""
    N, K, T, length = 2, 8, 8, 140
    prompts, model = prompts_of("135M", N, length), model_of("135M")
    for method in (astar_search.sample, astar_search.search):
        _, expander = rollouts_of(method, "135M", prompts, K=K, max_new_tokens=T)
        used = expander.cache.rows * sum(table.shape[1] * table.element_size() for table in expander.cache.tables.values())
        how = GenerationConfig(max_new_tokens=T, num_return_sequences=K, do_sample=True, return_dict_in_generate=True, pad_token_id=0)
        cache = model.generate(torch.tensor(prompts), how).past_key_values
        theirs = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        yield figure("prefixes", f"bytes of K/V of {N} x {K} completions, {method.__name__} / generate", {"min": used / theirs},
                     ("<=", (length + K * T) / (K * (length + T)) * 1.05), ours=used, generate=theirs, prompt_tokens=length, new_tokens=T)  # fmt: skip


def gpu():
    """10. An estimate, no measurement: decoding at the 3B shape in bfloat16 on an H100 from what is counted here."""
    copies, cpu = [0], torch.Tensor.cpu

    def counted(tensor):
        copies[0] += 1
        return cpu(tensor)

    torch.Tensor.cpu = counted
    try:
        expander = astar_search.Expander(model_of("tiny"), prompts_of("tiny", 64), 48)
        options = astar_search.Options((1,), K=8, width=2, max_new_tokens=48)
        astar_search.search(astar_search.root_keys(0, 1, range(64)), expander, options)
    finally:
        torch.Tensor.cpu = cpu
    yield figure("gpu", "copies to the host a round (forwards and rounds for further siblings)", {"min": copies[0] / expander.forwards}, None)
    shape = policy.outline(str(ROOT / "experiments" / "qwen2.5-3b"))
    text, bandwidth, nodes, context = shape.config, 3.35e12, 256, 512
    weights = 2 * sum(parameter.numel() for parameter in shape.parameters())
    kv = 2 * 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * text.num_hidden_layers * nodes * context
    floor, ours = (weights + kv) / bandwidth, (weights + 3 * kv) / bandwidth  # ours gathers: read, write, read
    yield figure("gpu", "ESTIMATE: bandwidth floor / our traffic, 256 nodes, 512 tokens each", {"min": floor / ours}, None,
                 floor_ms=1e3 * floor, ours_ms=1e3 * ours)  # fmt: skip


ITEMS = {function.__name__: function for function in (sampling, search, host, growth, naive, children, update, job, prefixes, gpu)}


def main():
    args = arguments()
    torch.set_num_threads(1)
    if args.memory_of_nodes or args.memory_of_update:
        print(json.dumps(memory_of_nodes(args.memory_of_nodes) if args.memory_of_nodes else memory_of_update(args.memory_of_update)))
        return
    if set(args.items) - set(ITEMS):
        sys.exit(f"speed.py: the items are {', '.join(ITEMS)}")
    name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    where = {"cpu": name, "cores": os.cpu_count(), "threads": 1, "repeats": arguments().repeats, "torch": torch.__version__}
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for item in args.items or ITEMS:
        start = time.process_time()
        gc.collect()
        gc.freeze()  # for both sides of every race: collections do not look at what the imports have made
        found = [row | where for row in ITEMS[item]()]
        rows = [row for row in rows if row["item"] != item] + found
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{item:10s} took {time.process_time() - start:.0f} CPU seconds here\n", flush=True)


if __name__ == "__main__":
    main()
