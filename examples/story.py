"""story.py -- accuracy of a run over time, and what the model writes at a few moments.

    pip install -r examples/requirements.txt
    python train.py --config task --seed 22 --keep-checkpoints 100 --checkpoint-every 10
    python examples/story.py runs/task --problem "427*386=" --moments 0 10 60 350

The problem is decoded greedily by the base (moment 0) and by the run's checkpoints at the other
moments, so these must have been kept.  More runs may be named after the first: thin lines.
"""

import argparse
import os
import sys
import textwrap

import plot  # read(): the rows of a run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import data
import eval as evaluation
import fsdp
import policy
import reward as reward_module

COLOURS = {"easy": "C2", "medium": "C1", "hard": "C3"}


def written(folder, problem, max_new_tokens):
    """(text, is it right?) of the greedy completion of a problem by the model in a folder."""
    model, tokenizer = policy.load_policy(folder)
    _, rows = evaluation.evaluate(
        model.eval(),
        tokenizer,
        [problem],
        reward_module.Reward(),
        fsdp.init_ranks(device="cpu"),
        max_new_tokens=max_new_tokens,
    )
    completion = rows[0]["completions"][0]
    return completion["text"], completion["correct"]


def draw(pyplot, runs, prompt, moments, texts, path):
    """Write the picture.  runs: (name, rows) of each, the first one bold and by difficulty.

    texts: (what was written after the prompt, is it right?) at each moment.
    """
    figure, (axis, page) = pyplot.subplots(
        2, 1, figsize=(9, 7.5), height_ratios=[3, 2], layout="constrained"
    )
    for i, (_, rows) in enumerate(runs):
        measured = [row for row in rows if "eval_accuracy" in row]
        x = [row["iteration"] for row in measured]
        if i > 0:
            y = [row["eval_accuracy"] for row in measured]
            axis.plot(x, y, color="black", linewidth=0.7, alpha=0.6)
            continue
        for difficulty, colour in COLOURS.items():
            have = [row for row in measured if difficulty in row["eval_accuracy_by_difficulty"]]
            axis.plot(
                [row["iteration"] for row in have],
                [row["eval_accuracy_by_difficulty"][difficulty] for row in have],
                color=colour,
                linewidth=1,
                label=difficulty if have else None,
            )
        y = [row["eval_accuracy"] for row in measured]
        axis.plot(x, y, color="black", linewidth=2, label="all")
        at = dict(zip(x, y))
    for letter, moment in zip("ABCDEFGH", moments):
        if moment in at:
            axis.plot([moment], [at[moment]], "o", color="black")
            axis.annotate(letter, (moment, at[moment]), xytext=(6, -14), textcoords="offset points")
    axis.set_ylim(0, 1)
    axis.set_xlim(left=0)
    axis.set_xlabel("iteration")
    axis.set_ylabel("greedy accuracy, held-out problems")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", frameon=False)

    page.axis("off")
    top = 1.0
    for letter, moment, (text, right) in zip("ABCDEFGH", moments, texts):
        lines = textwrap.fill(text, width=96, break_on_hyphens=False)
        verdict = "right" if right else "wrong"
        title = f"{letter}   {prompt}   after {moment} iterations: {verdict}"
        page.text(0, top, title, va="top", weight="bold", fontsize=9)
        colour = "darkgreen" if right else "darkred"
        page.text(0, top - 0.07, lines, va="top", family="monospace", fontsize=8, color=colour)
        top -= 0.13 + 0.065 * (lines.count("\n") + 1)
    figure.savefig(path, dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder; then others")
    parser.add_argument("--problem", default="427*386=", help="a product, as a*b=")
    parser.add_argument("--moments", type=int, nargs="+", default=[0, 10, 60, 350])
    parser.add_argument("--base", default=os.path.join(ROOT, "tiny_base", "task"))
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--png", default="story.png", help="where the picture goes")
    args = parser.parse_args(argv)
    try:
        a, b = (int(number) for number in args.problem.rstrip("=").split("*"))
    except ValueError:
        parser.error(f"--problem {args.problem}: not a product such as 427*386=")
    problem = data.make_problem(a, b)
    try:
        pyplot = plot.load_pyplot()
        runs = [plot.read(run) for run in args.runs]
        texts = []
        for moment in args.moments:
            folder = args.base
            if moment > 0:
                folder = os.path.join(args.runs[0], f"checkpoint_iter_{moment}")
            texts.append(written(folder, problem, args.max_new_tokens))
        draw(pyplot, runs, problem.text, args.moments, texts, args.png)
    except (ValueError, OSError) as error:
        print(f"story.py: {error}", file=sys.stderr)
        sys.exit(2)
    for moment, (text, right) in zip(args.moments, texts):
        print(f"{moment:5d}  {'right' if right else 'wrong'}  {args.problem}{text}")
    print(args.png)


if __name__ == "__main__":
    main()
