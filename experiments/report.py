"""Tables and curves from what compare.py wrote.

    python experiments/report.py base                      # the tables: numpy alone
    pip install -r experiments/requirements.txt
    python experiments/report.py base --png base.png       # and the curves

A seed's tokens to a target are those of its first evaluation at or above it, in whichever of its
runs (one a budget) gets there with the fewest.  Intervals: 95 % bootstrap over seeds and over
evaluation problems.  The latter redraws the number of right answers of every evaluation.
"""

import argparse
import fnmatch
import sys

import compare
import numpy

sys.path.insert(0, str(compare.ROOT / "examples"))

import plot

PROBLEMS = 500  # of an evaluation


def first(curves, accuracies, target, key):
    """`key` where a seed's runs first reach the target, the least of its runs, or None.

    accuracies: those of each point of the curves, as measured or drawn again.
    """
    found = []
    for curve, own_accuracies in zip(curves, accuracies):
        for point, accuracy in zip(curve, own_accuracies):
            if accuracy >= target:
                found.append(point[key])
    return min(found, default=None)


def to_target(seeds, target, key, draws=2000):
    """(mean over the seeds that reach the target, low, high, how many do); None where none does.

    seeds: of each seed, the curves of its runs, one a budget.  The bootstrap draws seeds, and for
    every evaluation its number of right answers.  A draw in which no seed reaches the target is
    left out.
    """
    measured = []
    found = []
    for curves in seeds:
        accuracies = [[point["eval_accuracy"] for point in curve] for curve in curves]
        measured.append(accuracies)
        reached = first(curves, accuracies, target, key)
        if reached is not None:
            found.append(reached)
    if not found:
        return None, None, None, 0

    generator = numpy.random.default_rng(0)
    means = []
    for _ in range(draws):
        drawn = []
        for i in generator.integers(len(seeds), size=len(seeds)):
            again = []
            for accuracies in measured[i]:
                again.append(generator.binomial(PROBLEMS, accuracies) / PROBLEMS)
            reached = first(seeds[i], again, target, key)
            if reached is not None:
                drawn.append(reached)
        if drawn:
            means.append(numpy.mean(drawn))
    low, high = numpy.percentile(means, [2.5, 97.5]) if means else (None, None)
    return numpy.mean(found), low, high, len(found)


def method(row):
    """The method of a row: its setting without learning rate and budget."""
    return row["setting"].split("; ")[0]


def in_order(names):
    """Distinct names in the order of their first appearance."""
    return list(dict.fromkeys(names))


def table(rows, targets):
    """Print a line a method.

    At each target the model tokens; at the end of each budget accuracy, tokens and CPU seconds.
    """
    heads = ["method"]
    heads += [f"tokens to {target:.0%}" for target in targets]
    heads.append("accuracy at the end of a run: seeds (mean tokens, CPU seconds)")
    heads.append("distinct correct per 1k tokens")
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for name in in_order(method(row) for row in rows):
        own = [row for row in rows if method(row) == name]
        cells = [name]
        cells += [target_cell(own, target) for target in targets]
        cells.append(end_cell(own))
        cells.append(f"{diversity(own):.2f}")
        print("| " + " | ".join(cells) + " |")


def target_cell(rows, target):
    """Model tokens to a target, as a text: mean (interval; how many seeds reach it)."""
    seeds = []
    for seed in sorted({row["seed"] for row in rows}):
        seeds.append([row["curve"] for row in rows if row["seed"] == seed])
    mean, low, high, reached = to_target(seeds, target, "model_tokens")
    if mean is None:
        return "not reached"
    share = "" if reached == len(seeds) else f"; {reached} of {len(seeds)} seeds"
    return f"{mean / 1e3:.0f} k ({low / 1e3:.0f}-{high / 1e3:.0f}{share})"


def end_cell(rows):
    """The end of each budget, as a text: accuracies of the seeds (mean tokens, CPU seconds)."""
    ends = []
    for setting in in_order(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        accuracies = []
        for row in own:
            accuracies.append(f"{row['curve'][-1]['eval_accuracy']:.3f}".lstrip("0"))
        tokens = numpy.mean([row["curve"][-1]["model_tokens"] for row in own])
        seconds = numpy.mean([row["cpu_seconds"] for row in own])
        budget = setting.split("; ", 1)[1]
        ends.append(f"{budget}: {' '.join(accuracies)} ({tokens / 1e3:.0f} k, {seconds:.0f} s)")
    return "; ".join(ends)


def diversity(rows, iterations=30):
    """Distinct right completions per 1,000 model tokens over the first 30 iterations."""
    figures = []
    for row in rows:
        problems = int(row["flags"].split("--problems-per-iteration ")[1].split()[0])
        point = [point for point in row["curve"] if point["iteration"] <= iterations][-1]
        distinct = point["unique_correct"] * problems
        figures.append(1000 * distinct / max(1, point["model_tokens"]))
    return float(numpy.mean(figures))


def draw(rows, target, path):
    """Write the curves of accuracy by tokens and by CPU seconds to a picture."""
    pyplot = plot.load_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    names = in_order(method(row) for row in rows)
    labelled = set()
    for row in rows:
        name = method(row)
        accuracies = [point["eval_accuracy"] for point in row["curve"]]
        tokens = [point["model_tokens"] / 1e3 for point in row["curve"]]
        # Runs shared the machine with others.  So CPU seconds are drawn, spread over a run as its
        # wall seconds were.
        share = row["cpu_seconds"] / row["curve"][-1]["seconds"]
        seconds = [point["seconds"] * share for point in row["curve"]]
        for axis, x in zip(axes, (tokens, seconds)):
            axis.plot(
                x,
                accuracies,
                color=f"C{names.index(name)}",
                alpha=0.8,
                label=None if name in labelled else name,
            )
        labelled.add(name)
    labels = ("model tokens of rollouts (thousands)", "CPU seconds (one thread)")
    for axis, label in zip(axes, labels):
        axis.axhline(target, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0.5, 0.86)
    axes[0].set_ylabel("greedy accuracy, 500 held-out problems")
    axes[1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def read(suites, patterns):
    """The rows of suites whose setting matches one of the patterns, by setting and seed."""
    rows = []
    for suite in suites:
        for row in compare.rows(compare.RESULTS / f"{suite}.jsonl"):
            name, budget = row["setting"].split("; ", 1)
            if suite != suites[0]:
                name += f" (suite {suite})"
            setting = f"{name}; {budget}"
            if any(fnmatch.fnmatch(setting, pattern) for pattern in patterns):
                rows.append(row | {"setting": setting})
    rows.sort(key=lambda row: (row["setting"], row["seed"]))
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="+", choices=compare.SUITES)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.8])
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        help="settings whose name matches one of these, as a shell would",
    )
    parser.add_argument("--png")
    args = parser.parse_args()
    rows = read(args.suites, args.only)
    table(rows, args.targets)
    if args.png:
        draw(rows, args.targets[-1], args.png)


if __name__ == "__main__":
    main()
