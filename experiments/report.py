"""Tables and curves from what compare.py wrote.

    python experiments/report.py race                      # the tables, standard library and numpy alone
    pip install -r experiments/requirements.txt
    python experiments/report.py race --png race.png       # and the curves

A run's tokens and seconds to the target are those of its first evaluation at or above it.  Intervals: 95 % bootstrap
over runs and over evaluation problems, the latter by redrawing every evaluation's number of right answers.
"""

import argparse
import json
import pathlib

import numpy

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
PROBLEMS = 500  # of an evaluation


def first(curve, accuracy, target, key):
    """`key` at the first evaluation whose accuracy reaches the target; None if none does."""
    return next((row[key] for row, x in zip(curve, accuracy) if x >= target), None)


def to_target(rows, target, key, draws=2000, seed=0):
    """(mean over runs, low, high, runs that reached it): the bootstrap leaves out draws in which no run does."""
    chance, means = numpy.random.default_rng(seed), []
    curves = [row["curve"] for row in rows]
    measured = [[point["eval_accuracy"] for point in curve] for curve in curves]
    found = [x for x in (first(c, m, target, key) for c, m in zip(curves, measured)) if x is not None]
    for _ in range(draws):
        drawn = []
        for i in chance.integers(len(rows), size=len(rows)):
            again = chance.binomial(PROBLEMS, measured[i]) / PROBLEMS
            x = first(curves[i], again, target, key)
            if x is None and measured[i][-1] >= target:
                x = curves[i][-1][key]  # the run was ended there: it had reached the target as measured
            if x is not None:
                drawn.append(x)
        if drawn:
            means.append(numpy.mean(drawn))
    low, high = numpy.percentile(means, [2.5, 97.5]) if means else (None, None)
    return (numpy.mean(found) if found else None), low, high, len(found)


def table(rows, target):
    print(
        f"| setting | runs at {target:.0%} | model tokens to it (95 %) | seconds | best seen | distinct correct per 1k tokens |"
    )
    print("|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == name]
        mean, low, high, reached = to_target(mine, target, "model_tokens")
        seconds = to_target(mine, target, "seconds")[0]
        best = ", ".join(f"{max(point['eval_accuracy'] for point in row['curve']):.3f}" for row in mine)
        tokens = f"{mean / 1e3:.0f} k ({low / 1e3:.0f}-{high / 1e3:.0f})" if mean else "not reached"
        print(
            f"| {name} | {reached} of {len(mine)} | {tokens} | {f'{seconds:.0f}' if seconds else ''} | {best} | {diversity(mine):.2f} |"
        )


def diversity(rows, problems=7680):
    """Distinct correct completions per 1,000 model tokens over the first 7,680 problems (30 iterations of 256)."""
    figures = []
    for row in rows:
        size = int(row["flags"].split("--problems-per-iteration ")[1].split()[0])
        point = [p for p in row["curve"] if p["iteration"] * size <= problems][-1]
        figures.append(1000 * point["unique_correct"] * size / max(1, point["model_tokens"]))
    return float(numpy.mean(figures))


def draw(rows, target, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    names = list(dict.fromkeys(row["setting"] for row in rows))
    for row in rows:
        color = f"C{names.index(row['setting'])}"
        for axis, key, scale in zip(axes, ("model_tokens", "seconds"), (1e3, 1)):
            axis.plot([p[key] / scale for p in row["curve"]], [p["eval_accuracy"] for p in row["curve"]], color=color, alpha=0.8,
                      label=row["setting"] if row["seed"] == min(r["seed"] for r in rows if r["setting"] == row["setting"]) else None)  # fmt: skip
    for axis, label in zip(axes, ("model tokens of rollouts (thousands)", "seconds (one thread)")):
        axis.axhline(target, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("greedy accuracy, 500 held-out problems")
    axes[1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--png")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (RESULTS / f"{args.suite}.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["setting"], row["seed"]))
    table(rows, args.target)
    if args.png:
        draw(rows, args.target, args.png)


if __name__ == "__main__":
    main()
