"""What would guidance be worth in training if it saw every slip?  The hard regime with the exact 'no mistake yet' as h.

    python experiments/oracle_training.py --learning-rate 1e-4 --iterations 60 --seed 0

train.py on the base of the hard regime (3 x 3 digits, chains of five unreliable steps), plain A* until right under em, but
for the h of the search, which knows the right work: a ceiling and no method.  Other flags are those of train.py.  The
same with h = 0 or the head: `python experiments/compare.py hard`.  A row into experiments/results/oracle_training.jsonl.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import astar_search  # noqa: E402
import compare  # noqa: E402
import diagnose  # noqa: E402
import train  # noqa: E402


def main():
    search, make_rollouts = astar_search.search, train.make_rollouts

    def with_oracle(model, *, tokenizer, problems, **given):
        """train.make_rollouts, the searches guided by the oracle."""
        guide = lambda expander: diagnose.oracle(expander, tokenizer, problems, own=False)
        astar_search.search = lambda keys, expander, options: search(keys, guide(expander), options)
        try:
            return make_rollouts(model, tokenizer=tokenizer, problems=problems, **given)
        finally:
            astar_search.search = search

    train.make_rollouts = with_oracle
    flags = f"{compare.HARD} {compare.METHODS['A* tau 0, h=0, 512 nodes, em']} --device cpu --output-dir runs/oracle --overwrite"
    argv = [*flags.split(), *sys.argv[1:]]
    config, _, _ = train.parse(argv)
    train.main(argv)
    metrics = compare.rows(pathlib.Path(config.output_dir) / "metrics.jsonl")
    row = {"setting": f"oracle; lr {config.learning_rate:g}; {config.iterations} iterations", "seed": config.seed}
    compare.write("oracle_training", row | {"flags": " ".join(argv), "cpu": compare.cpu(), "curve": compare.curve(metrics)})


if __name__ == "__main__":
    main()
