"""plot.py -- curves of runs on one page: accuracy, reward, length, entropy, KL, and the critic.

    pip install -r examples/requirements.txt
    python examples/plot.py runs/local runs/sample --x seconds      # writes runs/local/curves.png
    python examples/plot.py experiments/results/main_job/ppo_seed?.jsonl

A run is named by its folder or by its metrics.jsonl.  The picture goes into the folder of the first
run.  If that is named by its file, it is ./curves.png.
"""

import argparse
import json
import os
import sys

# name of --x -> (metric, its unit in the metric's own units, label of the axis)
X = {
    "tokens": ("model_tokens", 1e3, "model tokens of rollouts (thousands)"),
    "seconds": ("seconds", 60, "wall time (minutes)"),
    "iteration": ("iteration", 1, "iteration"),
}
# (title, metric) in reading order, three a row
PANELS = (
    ("accuracy on held-out problems", "eval_accuracy"),
    ("reward of the rollouts (mean)", "reward_mean"),
    ("completion length (tokens)", "completion_length"),
    ("entropy (nats a token)", "entropy"),
    ("KL to the rollouts' policy (nats a token)", "approx_kl"),
    ("value head: explained variance", "explained_variance"),
)


def read(path):
    """(name, rows) of a run, by its folder or its metrics.jsonl.  Raises ValueError."""
    path = path.rstrip(os.sep)
    file = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
    try:
        with open(file) as lines:
            # A line without its end is the last one of a run that is writing it just now.
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
        trained = any("reward_mean" in row for row in rows)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise ValueError(f"{file}: not a metrics.jsonl, a line of it is no JSON object") from None
    if not trained:
        raise ValueError(f"{file}: no iteration in it yet")
    name = os.path.basename(path).removesuffix(".jsonl")
    if name == "metrics":  # every run has a file of this name: take the folder's
        name = os.path.basename(os.path.dirname(os.path.abspath(path)))
    return name, rows


def load_pyplot():
    """matplotlib.pyplot for pictures in files.  Raises ValueError if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError(
            "matplotlib is missing: pip install -r examples/requirements.txt"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(runs, x, path):
    """Write the page of curves to `path`.  runs: (name, rows) of each; x: a key of X.

    Raises ValueError if matplotlib is missing, OSError if the file cannot be written.
    """
    pyplot = load_pyplot()
    key, scale, label = X[x]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), sharex=True, layout="constrained")
    for axis, (title, metric) in zip(axes.flat, PANELS):
        # The evaluation runs now and then only: mark where.
        marker = "o" if metric == "eval_accuracy" else None
        for i, (name, rows) in enumerate(runs):
            measured = [row for row in rows if row.get(metric) is not None]
            axis.plot(
                [row[key] / scale for row in measured],
                [row[metric] for row in measured],
                color=f"C{i}",
                linewidth=1.1,
                marker=marker,
                markersize=3,
                label=name,
            )
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.margins(x=0.01)
    axes[0, 0].set_ylim(0, 1)
    # KL has spikes and quiet stretches, and its estimate may be below zero.
    axes[1, 1].set_yscale("symlog", linthresh=1e-4)
    # Below this line the value head is no better than a constant.
    axes[1, 2].axhline(0, color="grey", linewidth=0.8)
    for axis in axes[1]:
        axis.set_xlabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    # As many names in a line as fit into its 150 characters, with a piece of line before each.
    longest = max(len(name) for name, _ in runs)
    columns = max(1, min(len(runs), 150 // (longest + 8)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder or metrics.jsonl")
    parser.add_argument("--x", choices=X, default="tokens")
    parser.add_argument("--png", help="where the picture goes (default: the first run's folder)")
    args = parser.parse_args(argv)
    if args.png is None:
        folder = args.runs[0] if os.path.isdir(args.runs[0]) else ""
        args.png = os.path.join(folder, "curves.png")
    try:
        draw([read(path) for path in args.runs], args.x, args.png)
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(args.runs)} runs, by {args.x}: {args.png}")


if __name__ == "__main__":
    main()
