"""README's table of results and its picture, from the committed metrics alone.

    python experiments/front_page.py                                   # the table: numpy alone
    python experiments/front_page.py --png docs/pictures/front.png     # and the picture: matplotlib

Tokens to 80 % come from runs of several budgets, five seeds each (suite `budgets` of compare.py).
A run is annealed to its end and evaluated there.  So a method has one accuracy a budget, the mean
over its seeds.  These are made to rise (isotonic regression: neighbours that fall are averaged) and
read off between two budgets by a line.  The interval is a 95 % bootstrap over seeds and over the
problems of every evaluation.  It is rather wide: the seeds already differ by their problems' noise.
"""

import argparse
import math
import statistics
import sys

import compare
import numpy
import task_report

sys.path.insert(0, str(compare.ROOT / "examples"))

import plot

MAIN_JOB = compare.RESULTS / "main_job"
PROBLEMS = 500  # of an evaluation
TARGET = 0.8
SEARCH = "A* tau 0, h=0, em"
SAMPLING = "sampling 4, em"


def runs_of(suite, method, only=""):
    """The rows of a method in results/SUITE.jsonl, by setting and seed.

    only: what the setting must hold besides.  Raises ValueError if there is no such run.
    """
    rows = compare.rows(compare.RESULTS / f"{suite}.jsonl")
    rows = [row for row in rows if row["setting"].startswith(f"{method}; ")]
    rows = [row for row in rows if only in row["setting"]]
    if not rows:
        raise ValueError(f"results/{suite}.jsonl has no run of {method}: python compare.py {suite}")
    return sorted(rows, key=lambda row: (row["setting"], row["seed"]))


def budget_ends(suite, method, only=""):
    """[(tokens, accuracies, CPU seconds of all seeds), ...] at the ends of a method's budgets.

    The smallest budget comes first.  Arguments and errors as runs_of.
    """
    ends = {}
    for row in runs_of(suite, method, only):
        last = row["curve"][-1]
        tokens, accuracies, seconds = ends.setdefault(row["setting"], ([], [], []))
        tokens.append(last["model_tokens"])
        accuracies.append(last["eval_accuracy"])
        seconds.append(row["cpu_seconds"])
    return sorted(ends.values(), key=lambda end: statistics.mean(end[0]))


def rising(values):
    """The closest sequence that does not fall, in squares: neighbours that fall are averaged."""
    blocks = []  # [sum, count]
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    return [total / count for total, count in blocks for _ in range(count)]


def tokens_to(tokens, accuracies, target):
    """Model tokens at which the budgets, made to rise, have the target; None if never.

    At or above the target from the first budget on, it is that one's tokens: an upper bound.
    """
    return task_report.tokens_to(list(zip(tokens, rising(accuracies))), target)


def drawn_again(ends, generator):
    """A bootstrap draw of budget_ends: (mean tokens, mean accuracies) of the budgets."""
    tokens, accuracies = [], []
    for own_tokens, own_accuracies, _ in ends:
        seeds = generator.integers(len(own_tokens), size=len(own_tokens))
        rates = numpy.array(own_accuracies)[seeds]
        accuracies.append((generator.binomial(PROBLEMS, rates) / PROBLEMS).mean())
        tokens.append(numpy.array(own_tokens)[seeds].mean())
    return tokens, accuracies


def means(ends):
    """(mean tokens, mean accuracies) of the budgets."""
    return [statistics.mean(end[0]) for end in ends], [statistics.mean(end[1]) for end in ends]


def to_target(draws=2000):
    """{method: (tokens to 80 %, low, high)}, and under "factor" sampling's over the search's."""
    generator = numpy.random.default_rng(0)
    ends = {method: budget_ends("budgets", method) for method in (SEARCH, SAMPLING)}
    found = {method: tokens_to(*means(end), TARGET) for method, end in ends.items()}
    for method, tokens in found.items():
        if tokens is None:
            raise ValueError(f"{method} has {TARGET:.0%} at no budget")
    sets = {method: [] for method in ends}
    for _ in range(draws):
        for method, end in ends.items():
            reached = tokens_to(*drawn_again(end, generator), TARGET)
            # A draw that never has 80 % needs more than the largest budget.
            sets[method].append(numpy.inf if reached is None else reached)
    found["factor"] = found[SAMPLING] / found[SEARCH]
    sets["factor"] = numpy.array(sets[SAMPLING]) / numpy.array(sets[SEARCH])
    # "nearest": between a number and infinity there is no middle.
    return {
        name: (found[name], *numpy.percentile(sets[name], [2.5, 97.5], method="nearest"))
        for name in found
    }


def thousands(tokens):
    """1,167 k for 1167000."""
    return f"{tokens / 1000:,.0f} k"


def interval(low, high, decimals, unit=""):
    """86-127 k; 209 k or more, if more than a fortieth of the draws never has 80 %."""
    if math.isinf(high):
        return f"{low:.{decimals}f}{unit} or more"
    return f"{low:.{decimals}f}-{high:.{decimals}f}{unit}"


def budget_row(name, method, reached):
    """A line of the table for a method of the suite `budgets`."""
    ends = budget_ends("budgets", method)
    tokens, low, high = reached
    cells = []
    for own_tokens, own_accuracies, own_seconds in ends:
        price = f"{thousands(statistics.mean(own_tokens))}, {statistics.mean(own_seconds):.0f} s"
        cells.append(f"{task_report.short(statistics.mean(own_accuracies))} ({price})")
    to_80 = f"{thousands(tokens)} ({interval(low / 1000, high / 1000, 0, ' k')})"
    return f"| {name} | {len(ends[0][0])} | {to_80} | {', '.join(cells)} |"


def base_row(name, method):
    """A line for a method of the older suite `base`: the ends of its largest budget.

    Without seconds: the machine was slower when these runs were made.
    """
    tokens, accuracies, _ = budget_ends("base", method, only="lr 2e-4")[-1]
    ends = " ".join(task_report.short(x) for x in accuracies)
    return f"| {name} | {len(tokens)} | - | {ends} ({thousands(statistics.mean(tokens))}) |"


def run_row(name, files):
    """A line for the runs of a preset, by their metrics in results/main_job/.

    Without seconds: what else the machine did then was not alike.
    """
    last = []
    for file in files:
        rows = compare.rows(MAIN_JOB / file)
        last.append([row for row in rows if "eval_accuracy" in row][-1])
    ends = " ".join(task_report.short(row["eval_accuracy"]) for row in last)
    tokens = thousands(statistics.mean(row["model_tokens"] for row in last))
    return f"| {name} | {len(files)} | - | {ends} ({tokens}) |"


def trl_row():
    """A line for TRL's GRPOTrainer: seed 0, the best of its learning rates.

    Beside it the seconds of plain A* for as much, measured in the same days (suite `quick`).
    """
    rows = compare.rows(compare.RESULTS / "trl.jsonl")
    rows = [row for row in rows if row["seed"] == 0 and row.get("digits", "2") == "2"]
    best = max(rows, key=lambda row: row["curve"][-1]["eval_accuracy"])
    last = best["curve"][-1]
    ours = budget_ends("quick", SEARCH, only="lr 2e-4")
    enough = next(end for end in ours if max(end[1]) >= last["eval_accuracy"])
    seconds = (
        f"{best['cpu_seconds']:.0f} s; plain A\\* {statistics.mean(enough[2]):.0f} s for as much"
    )
    price = f"{thousands(last['model_tokens'])}, {seconds}"
    name = f"TRL's GRPOTrainer, the best of {len(rows)} learning rates"
    return f"| {name} | 1 | - | {task_report.short(last['eval_accuracy'])} ({price}) |"


def table():
    """The lines of README's table below its head."""
    reached = to_target()
    return [
        budget_row("**plain A\\*, h = 0, until right, em**", SEARCH, reached[SEARCH]),
        budget_row("sampling, 4 a problem, em", SAMPLING, reached[SAMPLING]),
        base_row("sampling, 4 a problem, PPO", "sampling 4, ppo"),
        base_row("Gumbel A\\*, h = 0, PPO", "A* h=0, ppo"),
        trl_row(),
        run_row("`python train.py`", [f"local_seed{seed}.jsonl" for seed in (20, 21, 22)]),
        run_row(
            "`python train.py --config task`: 2-3 digits, base .022",
            [f"task_seed{seed}.jsonl" for seed in (20, 21, 22)],
        ),
        run_row("`python train.py --config ppo`", [f"ppo_seed{seed}.jsonl" for seed in (0, 1, 2)]),
    ]


def draw(path):
    """Write the picture: a line a method through the ends of its budgets, named beside it."""
    pyplot = plot.load_pyplot()
    lines = [
        ("A* search until right,\ntrain on what it found (em)", "budgets", SEARCH, "", "C1"),
        ("sampling, the same loss (em)", "budgets", SAMPLING, "", "C2"),
        ("sampling, PPO", "base", "sampling 4, ppo", "lr 2e-4", "C3"),
        ("Gumbel A* search, PPO", "base", "A* h=0, ppo", "lr 2e-4", "C0"),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.2), sharey=True, layout="constrained")
    for name, suite, method, only, colour in lines:
        ends = budget_ends(suite, method, only)
        for axis, column, scale in ((axes[0], 0, 1000), (axes[1], 2, 1)):
            x = [statistics.mean(end[column]) / scale for end in ends]
            y = [statistics.mean(end[1]) for end in ends]
            if axis is axes[1] and suite == "base":  # made when the machine was slower
                continue
            axis.plot(x, y, "o-", color=colour, label=name, markersize=5)
            for end, at in zip(ends, x):  # each seed, as a thin mark
                axis.plot([at] * len(end[1]), end[1], "_", color=colour, alpha=0.6, markersize=7)
    for axis, label in zip(axes, ("model tokens of rollouts (thousands)", "CPU seconds")):
        axis.axhline(TARGET, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("greedy accuracy at the end of a run")
    axes[0].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--png", help="where the picture goes")
    args = parser.parse_args()
    print("\n".join(table()))
    factor, low, high = to_target()["factor"]
    print(f"\nsampling needs {factor:.1f} times the tokens ({interval(low, high, 1)})")
    if args.png:
        draw(args.png)


if __name__ == "__main__":
    main()
