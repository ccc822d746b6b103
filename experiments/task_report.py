"""The figures of the section on 2-3 digits in docs/results.md, from the committed metrics alone.

    python experiments/task_report.py

Plain A* (results/main_job/task_seed*.jsonl) against sampling, and with three kinds of guidance
(results/task.jsonl): the tokens that each needs to the last accuracy that both reach, seed by seed,
on smoothed curves.  Each evaluation is averaged with its two neighbours.  The interval is that of
Student's t over the logarithms of the seeds' ratios (95 %).  The tables are made by tables.py.
"""

import math
import statistics

import compare

MAIN_JOB = compare.RESULTS / "main_job"
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


def curve_of(rows):
    """[(model tokens, smoothed accuracy), ...] of the evaluations in rows."""
    points = [row for row in rows if "eval_accuracy" in row]
    curve = []
    for i, point in enumerate(points):
        around = [other["eval_accuracy"] for other in points[max(0, i - 1) : i + 2]]
        curve.append((point["model_tokens"], statistics.mean(around)))
    return curve


def tokens_to(curve, accuracy):
    """Model tokens at which a curve first has an accuracy, between evaluations by a line, or None.

    curve: [(model tokens, accuracy), ...].
    """
    before_tokens, before = curve[0]
    if before >= accuracy:
        return before_tokens
    for tokens, reached in curve[1:]:
        if reached >= accuracy:
            share = (accuracy - before) / (reached - before)
            return before_tokens + share * (tokens - before_tokens)
        before_tokens, before = tokens, reached
    return None


def tokens_ratio(ours, theirs):
    """(accuracy, tokens of ours, tokens of theirs) at the last accuracy that both curves reach."""
    accuracy = min(max(y for _, y in ours), max(y for _, y in theirs))
    return accuracy, tokens_to(ours, accuracy), tokens_to(theirs, accuracy)


def mean_ratio(ratios):
    """(geometric mean, low, high) of some ratios, one a seed."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    if len(logs) == 1:
        return math.exp(mean), math.nan, math.nan
    half = T_QUANTILE[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def short(share):
    """.954 for 0.954."""
    return f"{share:.3f}".removeprefix("0")


def print_against(title, ours, theirs):
    """Tokens of two methods to the last accuracy that both reach.  ours, theirs: seed -> curve."""
    ratios = []
    print(f"\n{title}")
    for seed in sorted(ours.keys() & theirs.keys()):
        accuracy, own, other = tokens_ratio(ours[seed], theirs[seed])
        ratios.append(other / own)
        print(
            f"  seed {seed}: {short(accuracy)} after {own / 1e3:,.0f} k and {other / 1e3:,.0f} k "
            f"tokens: {other / own:.2f} times"
        )
    if ratios:
        mean, low, high = mean_ratio(ratios)
        print(f"  mean {mean:.2f} times, 95 % interval {low:.2f} to {high:.2f}")


def main():
    rows_of = {path.stem: compare.rows(path) for path in sorted(MAIN_JOB.glob("task_seed*.jsonl"))}
    runs = {}
    for name, rows in rows_of.items():
        runs[int(name.removeprefix("task_seed"))] = curve_of(rows)
    settings = {}
    for row in compare.rows(compare.RESULTS / "task.jsonl"):
        own = settings.setdefault(row["setting"], {})
        own[row["seed"]] = curve_of(row["curve"])
        ends = row["curve"][-1]
        explained = [point["eval_explained_variance"] for point in row["curve"][1:]]
        print(
            f"\n{row['setting']}, seed {row['seed']}: {short(ends['eval_accuracy'])}, "
            f"{ends['model_tokens'] / 1e3:,.0f} k tokens, {row['cpu_seconds']:.0f} CPU s; "
            f"explained variance on fresh samples {' '.join(f'{x:.2f}' for x in explained)}",
            end="",
        )
    print()
    for name in settings:
        if name.startswith("sampling"):
            print_against(f"plain A* (main runs) against {name}", runs, settings[name])
        elif name.startswith("A*") and name != "A* h=0; first 10":
            race = settings.get("A* h=0; first 10", {})
            print_against(f"{name} against h = 0", settings[name], race)


if __name__ == "__main__":
    main()
