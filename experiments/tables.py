"""Make the tables of docs/results.md and README.md anew from the committed metrics.

    python experiments/tables.py             # rewrite both pages in place
    python experiments/tables.py --check     # change nothing; name what differs, exit status 1

In docs/results.md a comment stands above each table that is made here, with a blank line between:

    <!-- made by experiments/tables.py: NAME -->

TABLES gives NAME its function.  README's rows are those of front_page.table(); its head stays as it
is.  Written here are the names of rows, the choice of seeds and iterations, and what is bold.
Every figure is read from experiments/results/, and rounded once.
"""

import argparse
import functools
import os
import re
import statistics
import sys

import compare
import front_page
import report
import task_report
from front_page import runs_of, thousands
from task_report import short

ROOT = compare.ROOT
MARKER = re.compile(r"<!-- made by experiments/tables\.py: (.+) -->")

# ---------------------------------------------------------------------------- Cells, rows, metrics


def line(*cells):
    """A line of a table.  A cell may be a text or a number, and "" is an empty one."""
    return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)


def head(*cells):
    """The two lines above the rows."""
    return [line(*cells), "|---" * len(cells) + "|"]


def listed(text):
    """[[part, ...], ...] of a text that has a row a line, its parts apart by a bar."""
    return [[part.strip() for part in row.split(" | ")] for row in text.strip().splitlines()]


def bold(text, yes=True):
    """The text in bold letters, or as it is."""
    return f"**{text}**" if yes else text


def figure(x, decimals=2, sign=""):
    """A number without the 0 before its point: .69, -.06, 1.00.  sign: "+" for +.010."""
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{x:{sign}.{decimals}f}")


def span(numbers, decimals=2, join="-"):
    """The smallest and the largest of some numbers: .16-.21; one alone: .23; none: nothing."""
    ends = [min(numbers), max(numbers)] if numbers else []
    return join.join(dict.fromkeys(figure(x, decimals) for x in ends))


def mean(rows, key):
    """The mean of a figure over rows."""
    return statistics.mean(row[key] for row in rows)


def ends_of(rows):
    """The last evaluation of each run."""
    return [row["curve"][-1] for row in rows]


def reached(points, more="", yes=False):
    """.800 .778 (65 k): accuracies of some evaluations, bold or not, and their mean tokens."""
    accuracies = " ".join(short(point["eval_accuracy"]) for point in points)
    return f"{bold(accuracies, yes)} ({thousands(mean(points, 'model_tokens'))}{more})"


def suite(name, **wanted):
    """The rows of results/NAME.jsonl that hold what is wanted."""
    rows = compare.rows(compare.RESULTS / f"{name}.jsonl")
    rows = [row for row in rows if row.items() >= wanted.items()]
    if not rows:
        raise ValueError(f"experiments/results/{name}.jsonl has no row of {wanted or 'a run'}.")
    return rows


def main_job(name):
    """{iteration: row} of results/main_job/NAME.jsonl."""
    return {row["iteration"]: row for row in suite(f"main_job/{name}")}


# ------------------------------------------------------------------------------ Runs of a preset


def course(pattern, seeds, moments, clock="", difficulties=()):
    """Greedy accuracy at some iterations, a line a seed; below it the mean tokens and time.

    pattern: the runs' name in results/main_job/; clock: "seconds", "minutes" or none.
    """
    more = [" / ".join(difficulties)] if difficulties else []
    table = head("iterations", *moments, *more)
    by_seed = {seed: main_job(pattern.format(seed)) for seed in seeds}
    for seed, rows in by_seed.items():
        cells = [short(rows[i]["eval_accuracy"]) for i in moments]
        if difficulties:
            parts = rows[moments[-1]]["eval_accuracy_by_difficulty"]
            cells.append(" / ".join(short(parts[name]) for name in difficulties))
        table.append(line(f"seed {seed}", *cells))
    at = [[rows[i] for rows in by_seed.values()] for i in moments]
    tokens = [thousands(mean(rows, "model_tokens")) for rows in at]
    table.append(line("model tokens (mean)", *tokens, *["" for _ in more]))
    if clock:
        unit = {"seconds": 1, "minutes": 60}[clock]
        times = [f"{mean(rows, 'seconds') / unit:.0f}" for rows in at]
        table.append(line(f"{clock} (mean)", *times, *["" for _ in more]))
    return table


def half_the_tokens():
    """What was tried to have .95 within 600 k tokens.  The best accuracy is bold."""
    tried = """
        seed0                   | --iterations 180
        4_minibatches_seed0     | --iterations 180 --minibatches 4
        8_minibatches_seed0     | --iterations 180 --minibatches 8
        32_problems_seed0       | --iterations 360 --problems-per-iteration 32
        rate_3e-4_seed0         | --iterations 180 --minibatches 4 --learning-rate 3e-4
        3_epochs_seed0          | --iterations 180 --minibatches 4 --epochs 3
        1_epoch_rate_4e-4_seed0 | --iterations 180 --epochs 1 --learning-rate 4e-4
    """
    ends = {flags: suite(f"main_job/tried_600k_{name}")[-1] for name, flags in listed(tried)}
    best = max(row["eval_accuracy"] for row in ends.values())
    table = head("besides", "optimiser steps", "accuracy at the end (model tokens)")
    for flags, row in ends.items():
        given = dict(zip(flags.split()[::2], flags.split()[1::2]))
        steps = int(given.get("--minibatches", 2)) * int(given.get("--epochs", 2))
        cell = reached([row], yes=row["eval_accuracy"] == best)
        table.append(line(f"`{flags}`", f"{row['iteration'] * steps:,}", cell))
    return table


def perfect_search():
    """h that knows the right work, beside h = 0: accuracy of three seeds by iterations."""
    moments = (20, 60, 100, 140, 180)
    table = head("h", *[f"{i} iterations" if i == moments[0] else i for i in moments])
    exact = [
        {p["iteration"]: p for p in row["curve"]}
        for row in runs_of("oracle_training", "oracle, 2 digits")
    ]
    zero = [main_job(f"tried_600k_seed{seed}") for seed in (0, 1, 2)]
    for name, rows in (("exact", exact), ("0", zero)):
        table.append(line(name, *[reached([row[i] for row in rows]) for i in moments]))
    return table


# --------------------------------------------------------------------------------- 2-3 digits


def tokens_ratio(ours, theirs):
    """(tokens of ours, factor of theirs) to the last accuracy that both runs reach."""
    curves = task_report.curve_of(ours), task_report.curve_of(theirs)
    _, own, other = task_report.tokens_ratio(*curves)
    return own, other / own


def task_sampling():
    """Plain A* against sampling on the task."""
    price = "sampling at its end (tokens, CPU seconds)"
    table = head("seed", price, r"plain A\* needs for the same", "factor")
    for row in runs_of("task", "sampling 4", "; 300"):
        ours = main_job(f"task_seed{row['seed']}").values()
        own, factor = tokens_ratio(ours, row["curve"])
        cell = reached(ends_of([row]), f", {row['cpu_seconds']:,.0f} s")
        table.append(line(row["seed"], cell, thousands(own), f"{factor:.2f}"))
    return table


def task_losses():
    """Sampling by each loss at each learning rate, 60 iterations; a loss's best is bold."""
    table = head("sampling, 60 iterations", "1e-4", "2e-4", "4e-4")
    names = {"sampling 4, em": "4 a problem of 128, em"}
    names["sampling 8, grpo"] = "8 a problem of 64, GRPO"
    names["sampling 8, ppo"] = "8 a problem of 64, PPO"
    for method, name in names.items():
        rows = [
            runs_of("task_rates", method, f"; lr {rate}; ")[0] for rate in ("1e-4", "2e-4", "4e-4")
        ]
        best = max(end["eval_accuracy"] for end in ends_of(rows))
        cells = []
        for row, end in zip(rows, ends_of(rows)):
            seconds = f", {row['cpu_seconds']:.0f} s"
            cells.append(reached([end], seconds, yes=end["eval_accuracy"] == best))
        table.append(line(name, *cells))
    return table


def task_guidance():
    """The first ten iterations of the task by three kinds of h."""
    explained = "explained variance on fresh samples, iterations 2-10"
    table = head("h", "after 10 iterations", "tokens saved, seed by seed", "mean", explained)
    methods = {"0": "A* h=0", "the head": "A* head", "the head, fitted": "A* fitted head"}
    without = runs_of("task", "A* h=0", "first 10")
    for name, method in methods.items():
        rows = runs_of("task", method, "first 10")
        ratios = [tokens_ratio(a["curve"], b["curve"])[1] for a, b in zip(rows, without)]
        saved = " ".join(f"{ratio:.2f}" for ratio in ratios)
        middle, low, high = task_report.mean_ratio(ratios)
        cells = [reached(ends_of(rows)).split(" (")[0]]
        cells += [f"{saved} times", f"{middle:.2f} ({low:.2f}-{high:.2f})"]
        if rows == without:
            cells = [reached(ends_of(rows)), "", ""]
        points = [own for row in rows for own in row["curve"][1:]]
        variances = [own["eval_explained_variance"] for own in points]
        table.append(line(name, *cells, span(variances, join=" to ")))
    return table


def critic_of_steps():
    """A critic that reads the steps: AUC within a problem, so many tokens after the parting."""
    (row,) = suite("slips")
    after = row["tables"]["2"]["after"]
    table = head("data, iterations' worth (leaves)", "1 token", *list(after)[1:])
    table.append(line("log pi of the prefix", *[short(own["log pi"]) for own in after.values()]))
    for n, own in row["tables"].items():
        points = own["after"].values()
        cells = [f"{short(point['critic'])} ({short(point['best sum'])})" for point in points]
        table.append(line(f"critic, {n} ({own['leaves']:,})", *cells))
    return table


# ---------------------------------------------------------------------------- A* against sampling


def new_seeds():
    """Accuracy by budget on five seeds that nothing was tuned on: mean (smallest-largest)."""
    table = head("budget, about", "65 k", "85 k", "112 k", "160 k", "230 k", "330 k")
    names = {front_page.SEARCH: r"plain A\* (h = 0) until right, em"}
    names[front_page.SAMPLING] = "sampling, 4 a problem, em"
    for method, name in names.items():
        cells = []
        for _, own, _ in front_page.budget_ends("budgets", method):
            cells.append(f"{short(statistics.mean(own))} ({span(own, 3)})")
        table.append(line(name, *cells, *[""] * (6 - len(cells))))
    return table


FIRST_SEEDS = r"""
**plain A\* (h = 0) until right, em** | quick | A* tau 0, h=0, em
the same, with the head's h | quick | A* tau 0, head, em
sampling, 4 a problem, em | quick | sampling 4, em
sampling, 8 a problem, em | quick | sampling 8, em
sampling, 4 a problem, em, longer warm-up | base | sampling 4, em
sampling, 4 a problem, PPO, longer warm-up | base | sampling 4, ppo
Gumbel A\* (h = 0) until right, em, longer warm-up | base | A* h=0, em
Gumbel A\* with the head, em, longer warm-up | base | A* head, em
Gumbel A\* (h = 0, cover .8), PPO, longer warm-up | base | A* h=0, ppo
Gumbel A\* with the head, PPO, longer warm-up | base | A* head, ppo
the same with h = 0, without a stop by mass | base | Gumbel without stop by mass, ppo
plain A\* (h = 0), always 8 leaves, PPO, longer warm-up | base | best-first (tau 0, h=0), ppo
beam search of 8 (tau 0, h = 0), PPO, longer warm-up | base | beam of 8 (tau 0, h=0), ppo
Gumbel A\* (h = 0, cover .8), GRPO, longer warm-up | base | A* h=0, grpo
sampling, 8 a problem, GRPO, longer warm-up | base | sampling 8, grpo
sampling, 4 a problem, apo, longer warm-up (with a fault, see below) | base | sampling 4, apo
"""


def first_seeds():
    """Every method on the seeds that settings were chosen with, learning rate 2e-4."""
    price = "accuracy at the end of a run (tokens, CPU seconds)"
    table = head("rollouts, loss", "seeds", "tokens to 80 % (95 % interval)", price)
    for name, suite_name, method in listed(FIRST_SEEDS):
        rows = runs_of(suite_name, method, "; lr 2e-4; ")
        seeds = len({row["seed"] for row in rows})
        tokens = report.target_cell(rows, front_page.TARGET)
        if tokens.endswith(" seeds)"):  # without the interval, if not all have 80 %
            words = {2: "one of two", 3: "one of three"}
            tokens = f"{tokens.split(' (')[0]}, {words[seeds]}"
        ends = []
        for setting in report.in_order(row["setting"] for row in rows):
            own = [row for row in rows if row["setting"] == setting]
            ends.append(reached(ends_of(own), f", {mean(own, 'cpu_seconds'):.0f} s"))
        if method.startswith("beam"):  # the second seed did not come to its end
            seeds += 1
            last = max(main_job("tried_beam8_ppo_seed1"))
            why = "where no search found a completion any more"
            ends.append(f"seed 1 ended in iteration {last + 1}, {why}")
        table.append(line(name, seeds, bold(tokens, name.startswith("**")), "; ".join(ends)))
    return table


def apo():
    """The published regression."""
    names = {"sample": "sampling, 4 a problem", "astar": r"Gumbel A\*, K 8"}
    table = head("rollouts", "learning rate", "beta2", "sampled", "greedy", "model tokens")
    for row in suite("apo"):
        rate = f"{row['learning_rate']:.0e}".replace("e-0", "e-")
        sampled = f"{short(row['sampled_accuracy'])} ({span(row['sampled_interval'], 3)})"
        cells = [names[row["rollout"]], rate, figure(row["beta2"], 1), sampled]
        table.append(line(*cells, short(row["greedy_accuracy"]), thousands(row["model_tokens"])))
    return table


MODELS = {"base": "tiny_base"}
MODELS |= {f"iteration {i}": f"runs/diagnosis/checkpoint_iter_{i}" for i in (13, 26)}


def gradient_noise():
    """Thousands of model tokens for which a batch's gradient has a signal-to-noise ratio of 1."""
    table = head("loss", "rollouts", "base", "iteration 13", "iteration 26")
    names = r"""
        em  | plain A\* (h = 0) until right  | A* tau 0 until right, em
        em  | Gumbel A\* (h = 0) until right | A* until right, em
        em  | sampling, 4 a problem          | sampling 4, em
        PPO | Gumbel A\* (h = 0), cover .8   | A* cover .8, ppo
        PPO | sampling, 8 a problem          | sampling 8, ppo
    """
    for loss, name, setting in listed(names):
        cells = []
        for model in MODELS.values():
            (row,) = suite("gradient_noise", model=model, setting=setting)
            tokens, low, high = (row[key] / 1000 for key in ("tokens_at_snr_1", "low", "high"))
            decimals = 1 if tokens < 10 else 0
            text = bold(figure(tokens, decimals), "tau 0" in setting)
            cells.append(f"{text} ({span([low, high], decimals)})")
        table.append(line(loss, name, *cells))
    return table


# ------------------------------------------------------------------------ The diagnosis, the chains


def diagnosis(model, critic=False):
    """The row of results/diagnose.jsonl for a model; critic: the one with a critic of its own."""
    rows = suite("diagnose", model=model)
    return next(row for row in rows if bool(row.get("critic")) == critic)


def point(row, search, budget):
    """What one search of the diagnosis gave at one budget."""
    return next(own for own in row["searches"][search] if own["budget"] == budget)


def guidance():
    """Share of problems with a right leaf, by h and by nodes a problem."""
    heads = ["h = 0, tau 1", "head, tau 1", "h = 0, tau 0", "head, tau 0", "exact h, tau 0"]
    table = head("policy", "nodes", "i.i.d. sampling, about as many tokens", *heads)
    base, hard = diagnosis("tiny_base"), diagnosis("tiny_base/hard")
    name = f"hard regime (3x3 digits, {100 * hard['sampled_accuracy']:.0f} % sampled)"
    # name, row, nodes, numbers of samples that cost about as many tokens
    lines = [("base", base, 50, [8]), ("base", base, 100, [16]), ("base", base, 200, [])]
    lines += [(name, hard, 150, [2])]
    lines += [("hard regime", hard, 300, [4]), ("hard regime", hard, 600, [8, 16])]
    for name, row, nodes, samples in lines:
        cells = [span([point(row, "i.i.d. sampling", n)["found"] for n in samples])]
        for title in heads:
            search = title.replace("exact h", "oracle, inherited")
            search = search.replace("head", "h of a fitted head")
            text = figure(point(row, search, nodes)["found"])
            cells.append(bold(text, (name, nodes, title) == ("base", 50, "head, tau 0")))
        table.append(line(name, nodes, *cells))
    return table


def auc_within():
    """The head's AUC and that of log pi within a problem, by position in the completion."""
    positions = [1, 2, *range(4, 37, 4)]
    table = head("position in the completion", *positions)
    for name, model in (("base", "tiny_base"), ("hard regime", "tiny_base/hard")):
        at = {own["position"]: own["within"] for own in diagnosis(model)["head"]}
        for title, key in (("head", "h"), ("log pi", "log pi")):
            table.append(line(f"{title}, {name}", *[figure(at[i][key]) for i in positions]))
    return table


OTHER_CRITICS = """
0 | h = 0
the head's, inherited by all children | h of a fitted head
a head that reads the prefix and the child's token | h of a per-token head
a child's own: the model runs every child of pi >= .02 first | a child's own h
a critic of its own: a copy of the policy, all of it fitted, which runs every node as well \
| h of a critic of its own
exact "no mistake yet", inherited | oracle, inherited
"""


def other_critics():
    """Share of problems with a right leaf with 50 nodes, by what h reads."""
    row = diagnosis("tiny_base", critic=True)
    table = head("h", "model tokens a problem (tau 1, tau 0)", "tau 1", "tau 0")
    for name, search in listed(OTHER_CRITICS):
        one, zero = (point(row, f"{search}, tau {tau}", 50) for tau in (1, 0))
        found = bold(figure(one["found"]), "per-token" in search)
        tokens = f"{one['tokens']:.0f}, {zero['tokens']:.0f}"
        table.append(line(name, tokens, found, figure(zero["found"])))
    return table


def chains():
    """Model tokens to the first right completion (share of problems in which it was found)."""
    searches = {"i.i.d. sampling": "sampling"}
    searches |= {name: name for name in ("h = 0, tau 1", "h = 0, tau 0")}
    searches["exact h, inherited, tau 0"] = "oracle, inherited, tau 0"
    searches["exact h, a child's own, tau 1"] = "oracle, own, tau 1"
    table = head("digits", "steps", "sampled accuracy", *searches)
    for row in suite("chains"):
        cells = []
        for tokens, share in (row["tokens"][search] for search in searches.values()):
            cells.append(f"{tokens:,.0f} ({'1.0' if share == 1 else figure(share)})")
        table.append(line(row["digits"], row["steps"], figure(row["accuracy"]), *cells))
    return table


HARD_REGIME = r"""
plain A\* (h = 0, 512 nodes) until right, em | A* tau 0, h=0, 512 nodes, em | 5e-5
- | A* tau 0, h=0, 512 nodes, em | 2e-4
the same with the head's h, em | A* tau 0, head, 512 nodes, em | 5e-5
Gumbel A\* (h = 0, 512 nodes), GRPO | A* h=0, 512 nodes, grpo | 5e-5
sampling, 8 a problem, em | sampling 8, em | 5e-5
sampling, 8 a problem, GRPO | sampling 8, grpo | 5e-5
"""


def hard_regime():
    """Training where answers are chains of five steps; the last two lines have the exact h."""
    seeds = "greedy at the end, seed by seed (model tokens)"
    table = head("rollouts, loss", "learning rate", seeds)
    for name, method, rate in listed(HARD_REGIME):
        ends = ends_of(runs_of("hard", method, f"; lr {rate}; "))
        table.append(line(name.strip("-"), rate, reached(ends)))
    ends = ends_of(runs_of("oracle_training", "oracle", "; lr 0.0002; "))
    accuracies = bold(" ".join(short(end["eval_accuracy"]) for end in ends))
    tokens = ", ".join(thousands(end["model_tokens"]) for end in ends)
    name = bold(r"plain A\* with the exact h until right, em")
    table.append(line(name, "2e-4", f"{accuracies} ({tokens})"))
    (row,) = runs_of("oracle_training", "oracle", "; lr 0.0001; ")
    cells = []
    for own in row["curve"]:
        if own["iteration"] in (20, 40, 100):
            text = bold(short(own["eval_accuracy"]), own["iteration"] == 100)
            cells.append(f"{text} after {thousands(own['model_tokens'])}")
    table.append(line("", "1e-4", ", ".join(cells)))
    return table


DECODING = r"""
greedy | greedy | found | 1
vote of 16 samples | i.i.d. sampling | vote | 16
best of 8 by the head | i.i.d. sampling | head | 8
A\*, h = 0, tau 0, first leaf | h = 0, tau 0 | first | 50 100
A\*, head, tau 0, first leaf | h of a fitted head, tau 0 | first | 50 100
A\*, head, tau 1, vote of the leaves by weight | h of a fitted head, tau 1 | vote | 50 100
"""


def decoding():
    """A* and other searches as decoders, which never see the reward: share right (tokens)."""
    table = head("policy", *[way[0] for way in listed(DECODING)])
    for name, model in MODELS.items():
        cells = []
        for _, search, answer, budgets in listed(DECODING):
            points = [point(diagnosis(model), search, int(n)) for n in budgets.split()]
            texts = [f"{short(own[answer])} ({own['tokens']:.0f})" for own in points]
            cells.append(", ".join(texts))
        table.append(line(name, *cells))
    return table


# ------------------------------------------------------------------------------------ A real model

ARMS = {"astar_em": r"plain A\*, em", "sample_em": "sampling, em", "sample_grpo": "sampling, GRPO"}
FIXED = ("samples", "A*, h = 0", "A*, fitted head", "Gumbel A*, h = 0")


def real_fixed(task, budgets, methods, marked):
    """Search against samples, the model as it is.  marked: the budgets where plain A* is bold."""
    table = head("tokens behind the prompt", *budgets)
    for method in methods:
        cells = []
        for n in budgets:
            wanted = {"command": "fixed", "task": task, "method": method, "budget": n, "seed": 0}
            (row,) = suite("real_model", **wanted)
            text = f"{short(row['found'])} ({span(row['interval'])})"
            cells.append(bold(text, method == "A*, h = 0" and n in marked))
        name = method.replace("A*", r"A\*" if "Gumbel" in method else r"plain A\*")
        table.append(line(bold(name, method == "A*, h = 0" and len(marked) > 1), *cells))
    return table


def real_fixed_products():
    """The same on products; below it the problems where only one finds a right completion."""
    methods = (*FIXED, "samples, each by itself")
    table = real_fixed("examples", (8, 16, 32, 64), methods, (16, 32, 64))
    rows = suite("real_model", command="fixed", task="examples", method="A*, h = 0", seed=0)
    pairs = [f"{row['more_than_sampling']} / {row['less_than_sampling']}" for row in rows]
    name = r"plain A\*, h = 0, against samples: only it / only they find one"
    return [*table, line(name, *pairs)]


def real_run(arm, rate, seed, iterations):
    """The row of one training run of the real model."""
    wanted = {"arm": arm, "learning_rate": rate, "seed": seed, "iterations": iterations}
    (row,) = suite("real_model", **wanted)
    return row


def real_rates():
    """The runs by which the learning rates were chosen; the best of each method is bold."""
    table = head("rate", *ARMS.values())
    rates = ("2e-5", "5e-5")
    ends = {}
    for arm in ARMS:
        ends[arm] = [real_run(arm, rate, 0, 4)["curve"][-1]["eval_accuracy"] for rate in rates]
    for i, rate in enumerate(rates):
        cells = [bold(short(own[i]), own[i] == max(own)) for own in ends.values()]
        table.append(line(rate, *cells))
    return table


def real_training():
    """20 iterations at the better learning rate."""
    found = "right completions a problem found in training"
    table = head("", "5 iterations", "10", "15", "20", found, "CPU seconds")
    for arm, rate in (("astar_em", "5e-5"), ("sample_em", "2e-5"), ("sample_grpo", "5e-5")):
        for seed in (20,) if arm == "sample_grpo" else (20, 21):
            row = real_run(arm, rate, seed, 20)
            cells = [reached([own]) for own in row["curve"][1:]]
            cells.append(figure(row["curve"][-1]["unique_correct"] / 20))
            table.append(line(f"{ARMS[arm]}, seed {seed}", *cells, f"{row['cpu_seconds']:.0f}"))
    return table


def real_sampling():
    """Sampling under em for 50 iterations, at three learning rates."""
    table = head("rate, seed", "10 iterations", "20", "30", "40", "50")
    for rate, seed in (("2e-5", 20), ("2e-5", 21), ("5e-5", 20), ("1e-4", 20)):
        first, *others, last = real_run("sample_em", rate, seed, 50)["curve"][1:]
        cells = [short(own["eval_accuracy"]) for own in others]
        table.append(line(f"{rate}, seed {seed}", reached([first]), *cells, reached([last])))
    return table


def real_seconds():
    """Processor seconds of one iteration of the real model, by phase."""
    (row,) = suite("real_model", command="cost")
    search, tokens = row["search"], row["tokens"]
    name = f"the search, {tokens} model tokens in {row['forwards']} forwards"
    lines = [(name, search, f"{1000 * search / tokens:.1f} ms a token")]
    phases = {"the blocks": "model"}
    phases["the output layer and its softmax over 49,152 tokens"] = "output layer"
    phases |= {"children": "children", "the rest on the host": "host"}
    for name, phase in phases.items():
        share = 100 * row[f"search: {phase}"] / search
        share = figure(share, 1 if share < 10 else 0)
        lines.append((f"- {name}", row[f"search: {phase}"], f"{share} %"))
    name = f"`model.generate`, {row['generate_tokens']} tokens of the same prompts"
    times = f"the search takes {search / row['generate']:.2f} times as long"
    lines.append((name, row["generate"], times))
    what = f"the {row['right_leaves']} right leaves, {row['update: tokens']} tokens"
    name = f"update: forward and backward of {what}"
    lines.append((name, row["update: forward, backward"], "an epoch"))
    lines.append(("update: AdamW and clipping, 135 M parameters", row["update: step"], "a step"))
    table = [line(name, figure(seconds), note) for name, seconds, note in lines]
    name = f"TRL 1.16's GRPOTrainer: 4 samples of each of {row['problems']} problems, one step"
    table.append(line(name, f"{row['TRL, a step']:.1f}", "mean of two steps"))
    return head("", "CPU seconds", "") + table


# ------------------------------------------------------------------------ The stop by mass, rounds


def stop_by_mass():
    """What the rollouts report, less the truth, by the way in which a search stops."""
    table = head("iteration", "truth", "no stop", "**stop by mass**", "the old stop")
    for row in suite("rollout_accuracy"):
        cells = []
        for stop in ("no stop", "by mass", "by mass, old"):
            error = figure(row[stop]["unnormalised"] - row["truth"], 3, sign="+")
            tokens = f"{row[stop]['tokens_a_problem']:.0f}"
            cells.append(f"{bold(error, stop == 'by mass')} ({tokens})")
        table.append(line(row["model"].split("_")[-1], short(row["truth"]), *cells))
    return table


def fastest(**wanted):
    """Of the rows of results/rounds.jsonl that hold what is wanted the one of least seconds."""
    return min(suite("rounds", **wanted), key=lambda row: row["seconds"])


def rounds():
    """Rounds, model tokens and the least seconds of 64 searches, by width."""
    trained = "quick, 24 iterations"
    policies = {"`quick`, the base": ("quick", "tiny_base")}
    policies["`quick`, after 24 iterations"] = ("quick", trained)
    policies["`ppo`, the base"] = ("ppo", "tiny_base")
    policies["`ppo`, the policy of the second row"] = ("ppo", trained)
    table = head("", "width", "1", "2, before", "2", "4", "8")
    for name, (preset, model) in policies.items():
        least = []
        for width, label in ((1, "after"), (2, "before"), (2, "after"), (4, "after"), (8, "after")):
            least.append(fastest(preset=preset, model=model, width=width, label=label))
        table.append(line(name, "rounds", *[row["rounds"] for row in least]))
        table.append(line("", "model tokens", *[f"{row['model_tokens']:,}" for row in least]))
        table.append(line("", "seconds", *[figure(row["seconds"]) for row in least]))
    return table


def real_rounds():
    """The same for the real model, before and after, with nodes a round."""
    table = head("", "width", "1", "2", "4", "8")
    for preset in ("quick", "ppo"):
        for label, when in (("before", "before"), ("after", "now")):
            least = []
            for width in (1, 2, 4, 8):
                wanted = {"preset": preset, "width": width, "label": label}
                least.append(fastest(model="SmolLM2-135M", **wanted))
            name = f"`{preset}`, {when}"
            cells = [f"{row['rounds']} ({row['nodes_a_round']:.1f})" for row in least]
            table.append(line(name, "rounds (nodes a round)", *cells))
            table.append(line("", "model tokens", *[f"{row['model_tokens']:,}" for row in least]))
            table.append(line("", "seconds", *[f"{row['seconds']:.1f}" for row in least]))
    return table


# --------------------------------------------------------------------------------------- The pages

LONG = [0, 20, *range(40, 361, 40)]
TASK = [0, 10, 20, *range(50, 351, 50)]
HARDNESS = ("easy", "medium", "hard")
make = functools.partial
TABLES = {
    "default run": make(course, "seed{}", (0, 1, 2), LONG, "seconds"),
    "default run, today's code": make(course, "local_seed{}", (20, 21, 22), LONG),
    "half the tokens": half_the_tokens,
    "perfect search": perfect_search,
    "task run": make(course, "task_seed{}", (20, 21, 22), TASK, "minutes", HARDNESS),
    "task, against sampling": task_sampling,
    "task, losses of sampling": task_losses,
    "task, guidance": task_guidance,
    "critic of steps": critic_of_steps,
    "ppo run": make(course, "ppo_seed{}", (0, 1, 2), range(0, 91, 10), "seconds"),
    "new seeds": new_seeds,
    "first seeds": first_seeds,
    "apo": apo,
    "gradient noise": gradient_noise,
    "guidance": guidance,
    "auc within a problem": auc_within,
    "other critics": other_critics,
    "chains": chains,
    "hard regime": hard_regime,
    "decoding": decoding,
    "real model, fixed": real_fixed_products,
    "real model, tinyzero": make(real_fixed, "tinyzero", (32, 64, 128), FIXED, (128,)),
    "real model, rates": real_rates,
    "real model, training": real_training,
    "real model, sampling": real_sampling,
    "real model, seconds": real_seconds,
    "stop by mass": stop_by_mass,
    "rounds": rounds,
    "real model, rounds": real_rounds,
}


def end_of_table(lines, first):
    """The index behind the table that begins at lines[first]; first itself if none does."""
    end = first
    while end < len(lines) and lines[end].lstrip().startswith("|"):
        end += 1
    return end


def remade(text, tables=TABLES):
    """(the text with every marked table made anew, names of the tables that differ).

    Raises ValueError for a NAME that is not among the tables, and for a marker without a table.
    """
    lines = text.split("\n")
    made, changed = [], []
    done = 0  # lines that are in `made` already, as they were or anew
    for i, marker in enumerate(lines):
        match = MARKER.fullmatch(marker.strip())
        if not match:
            continue
        name = match[1]
        if name not in tables:
            raise ValueError(f"line {i + 1} marks a table that is unknown: {name}")
        first = i + 2
        end = end_of_table(lines, first)
        if lines[i + 1 : first] != [""] or end == first:
            raise ValueError(f"line {i + 1} marks {name}, but no table follows after a blank line")
        indent = lines[first][: lines[first].index("|")]
        new = [indent + row for row in tables[name]()]
        if new != lines[first:end]:
            changed.append(name)
        made += lines[done:first] + new
        done = end
    return "\n".join(made + lines[done:]), changed


def remade_readme(text):
    """The same for README: its table is the one with front_page's first method."""
    lines = text.split("\n")
    rows = front_page.table()
    start = rows[0].split(" | ")[0] + " | "
    found = [i for i, row in enumerate(lines) if row.startswith(start)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows instead of one begin with {start.strip()}")
    end = end_of_table(lines, found[0])
    changed = ["the results"] if lines[found[0] : end] != rows else []
    return "\n".join(lines[: found[0]] + rows + lines[end:]), changed


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; name what differs")
    args = parser.parse_args(argv)
    new, names = {}, []
    for page, remake in (("docs/results.md", remade), ("README.md", remade_readme)):
        try:
            text, changed = remake((ROOT / page).read_text())
        except ValueError as error:
            sys.exit(f"{page}: {error}; nothing was written")
        names += [f"{page}: {name}" for name in changed]
        if changed:
            new[ROOT / page] = text
    print("\n".join(names) or "every table is what the metrics say")
    if args.check:
        sys.exit(1 if names else 0)
    for path, text in new.items():  # whole or not at all: a file beside it takes its place
        beside = path.with_name(f"{path.name}.new")
        beside.write_text(text)
        os.replace(beside, path)


if __name__ == "__main__":
    main()
