r"""What would guidance be worth in training if it saw every slip?  The exact 'no mistake yet' as h.

    python experiments/oracle_training.py --learning-rate 1e-4 --iterations 60 --seed 0
    python experiments/oracle_training.py --model tiny_base --digits 2 --max-new-tokens 48 \
        --max-nodes 128 --iterations 180 --learning-rate 2e-4 --average 0.99 --final-rate 0.1 \
        --eval-every 20

train.py in the hard regime (3 x 3 digits, chains of five unreliable steps), plain A* until right
under em; the second line is about 2 digits.  The h of the search knows the right work: this is a
ceiling and no method.  Other flags are those of train.py.  The same with h = 0 or the head:
`python experiments/compare.py hard`.  A row goes into experiments/results/oracle_training.jsonl.
"""

import pathlib
import sys

import compare
import diagnose

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import astar_search
import train

METHOD = "A* tau 0, h=0, 512 nodes, em"


def guide_by_oracle():
    """Make train.generate_rollouts search with the oracle's h."""
    search = astar_search.search
    generate_rollouts = train.generate_rollouts

    def generate_with_oracle(model, tokenizer, problems, *args, **kwargs):
        first = 0  # problem of the chunk that is searched next

        def search_with_oracle(keys, expander, options):
            nonlocal first
            chunk = problems[first : first + len(keys)]
            first += len(keys)
            expand = diagnose.oracle(expander, tokenizer, chunk, own=False)
            return search(keys, expand, options)

        astar_search.search = search_with_oracle
        try:
            return generate_rollouts(model, tokenizer, problems, *args, **kwargs)
        finally:
            astar_search.search = search

    train.generate_rollouts = generate_with_oracle


def main():
    guide_by_oracle()
    flags = f"{compare.HARD} {compare.METHODS[METHOD]}"
    argv = f"{flags} --device cpu --output-dir runs/oracle --overwrite".split() + sys.argv[1:]
    config, _, _ = train.parse_arguments(argv)
    train.main(argv)
    name = "oracle" if config.digits == "3x3" else f"oracle, {config.digits} digits"
    setting = f"{name}; lr {config.learning_rate:g}; {config.iterations} iterations"
    row = compare.run_row(setting, config.seed, " ".join(argv), config.output_dir)
    compare.write("oracle_training", row)


if __name__ == "__main__":
    main()
