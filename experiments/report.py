"""Tables and curves from what compare.py wrote.

    python experiments/report.py base                      # the tables, standard library and numpy alone
    pip install -r experiments/requirements.txt
    python experiments/report.py base --png base.png       # and the curves

A seed's tokens to a target are those of the first evaluation at or above it, of whichever of its runs (budgets) gets there with
fewest.  Intervals: 95 % bootstrap over seeds and over evaluation problems, the latter by redrawing every evaluation's number
of right answers.
"""

import argparse
import fnmatch

import compare
import numpy

PROBLEMS = 500  # of an evaluation


def first(curves, accuracies, target, key):
    """`key` at the first evaluation of any of a seed's runs whose accuracy reaches the target; None if none does."""
    found = [row[key] for curve, measured in zip(curves, accuracies) for row, x in zip(curve, measured) if x >= target]
    return min(found, default=None)


def to_target(seeds, target, key, draws=2000):
    """seeds: of each seed, the curves of its runs, one a budget.  Returns (mean over the seeds that reach the target, low, high,
    how many do); the bootstrap draws seeds, and for every evaluation its number of right answers; a draw that no seed reaches in is left out."""
    chance, means = numpy.random.default_rng(0), []
    measured = [[[point["eval_accuracy"] for point in curve] for curve in curves] for curves in seeds]
    found = [x for x in (first(c, m, target, key) for c, m in zip(seeds, measured)) if x is not None]
    for _ in range(draws if found else 0):
        drawn = []
        for i in chance.integers(len(seeds), size=len(seeds)):
            again = [chance.binomial(PROBLEMS, accuracies) / PROBLEMS for accuracies in measured[i]]
            drawn += [x for x in [first(seeds[i], again, target, key)] if x is not None]
        if drawn:
            means.append(numpy.mean(drawn))
    low, high = numpy.percentile(means, [2.5, 97.5]) if means else (None, None)
    return (numpy.mean(found) if found else None), low, high, len(found)


def method(row):
    return row["setting"].split("; ")[0]


def table(rows, targets):
    """A line a method: at each target the model tokens, and at the end of each budget accuracy, tokens and CPU seconds."""
    heads = [f"tokens to {target:.0%}" for target in targets]
    print("| method | " + " | ".join(heads) + " | accuracy at the end of a run: seeds (mean tokens, CPU seconds) | distinct correct per 1k tokens |")
    print("|---" * (len(heads) + 3) + "|")
    for name in dict.fromkeys(map(method, rows)):
        mine = [row for row in rows if method(row) == name]
        seeds = [[row["curve"] for row in mine if row["seed"] == seed] for seed in sorted({row["seed"] for row in mine})]
        cells = []
        for target in targets:
            mean, low, high, reached = to_target(seeds, target, "model_tokens")
            share = "" if reached == len(seeds) else f"; {reached} of {len(seeds)} seeds"
            cells.append(f"{mean / 1e3:.0f} k ({low / 1e3:.0f}-{high / 1e3:.0f}{share})" if mean is not None else "not reached")
        ends = []
        for setting in dict.fromkeys(row["setting"] for row in mine):
            own = [row for row in mine if row["setting"] == setting]
            accuracy = " ".join(f"{row['curve'][-1]['eval_accuracy']:.3f}".lstrip("0") for row in own)
            tokens = numpy.mean([row["curve"][-1]["model_tokens"] for row in own]) / 1e3
            ends.append(f"{setting.split('; ', 1)[1]}: {accuracy} ({tokens:.0f} k, {numpy.mean([row['cpu_seconds'] for row in own]):.0f} s)")
        print(f"| {name} | " + " | ".join(cells) + f" | {'; '.join(ends)} | {diversity(mine):.2f} |")


def diversity(rows, iterations=30):
    """Distinct correct completions per 1,000 model tokens over the first 30 iterations."""
    figures = []
    for row in rows:
        size = int(row["flags"].split("--problems-per-iteration ")[1].split()[0])
        point = [p for p in row["curve"] if p["iteration"] <= iterations][-1]
        figures.append(1000 * point["unique_correct"] * size / max(1, point["model_tokens"]))
    return float(numpy.mean(figures))


def draw(rows, target, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    names = list(dict.fromkeys(map(method, rows)))
    for row in rows:
        color = f"C{names.index(method(row))}"
        # Runs shared the machine with others: CPU seconds, spread over a run as its wall seconds were.
        share = row["cpu_seconds"] / row["curve"][-1]["seconds"]
        for axis, key, scale in zip(axes, ("model_tokens", "seconds"), (1e3, 1 / share)):
            axis.plot([p[key] / scale for p in row["curve"]], [p["eval_accuracy"] for p in row["curve"]], color=color, alpha=0.8,
                      label=method(row) if row is next(r for r in rows if method(r) == method(row)) else None)  # fmt: skip
    for axis, label in zip(axes, ("model tokens of rollouts (thousands)", "CPU seconds (one thread)")):
        axis.axhline(target, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0.5, 0.86)
    axes[0].set_ylabel("greedy accuracy, 500 held-out problems")
    axes[1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", choices=compare.SUITES)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.8])
    parser.add_argument("--only", nargs="+", default=["*"], help="settings whose name matches one of these, as a shell would")
    parser.add_argument("--png")
    args = parser.parse_args()
    rows = []
    for suite in args.suites:
        for row in compare.rows(compare.RESULTS / f"{suite}.jsonl"):
            name, budget = row["setting"].split("; ", 1)
            name += f" (suite {suite})" if suite != args.suites[0] else ""
            rows.append(row | {"setting": f"{name}; {budget}"})
    rows = [row for row in rows if any(fnmatch.fnmatch(row["setting"], pattern) for pattern in args.only)]
    rows.sort(key=lambda row: (row["setting"], row["seed"]))
    table(rows, args.targets)
    if args.png:
        draw(rows, args.targets[-1], args.png)


if __name__ == "__main__":
    main()
