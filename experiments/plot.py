"""Curves of runs on one page: accuracy, reward, completion length, entropy, KL and how good the critic is.

    pip install -r experiments/requirements.txt
    python experiments/plot.py runs/local runs/sample --x seconds --png curves.png
    python experiments/plot.py experiments/main_job/ppo_seed?.jsonl    # a run's folder, or its metrics.jsonl
"""

import argparse
import json
import os
import sys

X = {"tokens": ("model_tokens", 1e3, "model tokens of rollouts (thousands)"), "seconds": ("seconds", 60, "wall time (minutes)"),
     "iteration": ("iteration", 1, "iteration")}  # fmt: skip
PANELS = (
    ("accuracy on held-out problems", "eval_accuracy"),
    ("reward of the rollouts (mean)", "reward_mean"),
    ("completion length (tokens)", "completion_length"),
    ("entropy (nats a token)", "entropy"),
    ("KL to the rollouts' policy (nats a token)", "approx_kl"),
    ("value head: explained variance", "explained_variance"),
)


def read(path):
    """(name, rows) of a run: its folder, or a metrics.jsonl.  Raises ValueError with one sentence."""
    path = path.rstrip(os.sep)
    file = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
    try:
        with open(file) as lines:
            rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a run may be writing the last one
        trained = any("reward_mean" in row for row in rows)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise ValueError(f"{file}: not a metrics.jsonl, a line of it is no JSON object") from None
    if not trained:
        raise ValueError(f"{file}: no iteration in it yet")
    name = os.path.basename(path).removesuffix(".jsonl")
    return name if name != "metrics" else os.path.basename(os.path.dirname(os.path.abspath(path))), rows


def draw(runs, x, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    key, scale, label = X[x]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), sharex=True, layout="constrained")
    for axis, (title, metric) in zip(axes.flat, PANELS):
        for i, (name, rows) in enumerate(runs):
            points = [(row[key] / scale, row[metric]) for row in rows if row.get(metric) is not None] or [(0, None)]
            marker = "o" if metric == "eval_accuracy" else None  # measured now and then
            axis.plot(*zip(*points), color=f"C{i}", linewidth=1.1, marker=marker, markersize=3, label=name)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.margins(x=0.01)
    axes[0, 0].set_ylim(0, 1)
    axes[1, 1].set_yscale("symlog", linthresh=1e-4)  # spikes and quiet stretches; an estimate of KL may be below zero
    axes[1, 2].axhline(0, color="grey", linewidth=0.8)  # below it the head is no better than a constant
    for axis in axes[1]:
        axis.set_xlabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(runs), 5), frameon=False)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder or its metrics.jsonl")
    parser.add_argument("--x", choices=X, default="tokens")
    parser.add_argument("--png", default="curves.png", help="where the picture goes")
    args = parser.parse_args(argv)
    try:
        draw([read(path) for path in args.runs], args.x, args.png)
    except (ValueError, OSError, ImportError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(args.runs)} runs, by {args.x}: {args.png}")


if __name__ == "__main__":
    main()
