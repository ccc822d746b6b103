"""The command line of eval.py, and what it does with completions besides counting them: it writes them to a file
(--json), compares two such files (--compare) and prints the worst (--show).

    python eval.py --decode sample --json sample.json         # sample.json: the figures; sample.jsonl: a row a problem
    python eval.py --decode astar --json astar.json
    python eval.py --compare sample.jsonl astar.jsonl         # a paired test on the same problems
"""

import json
import math
import os
import pathlib
import sys
import tempfile

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import astar_search  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import fsdp  # noqa: E402
import policy  # noqa: E402
import reward as reward_module  # noqa: E402
from experiments import run_folder  # noqa: E402

# ========================================================================================================= flags


def flags():
    """The parser of eval.py."""
    about = "Accuracy of a model on held-out multiplication problems."
    parser = evaluation.OneSentence("eval.py", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default=str(ROOT / "tiny_base"), help="folder or hub id of a causal language model")
    add("--decode", choices=("greedy", "sample", "astar"), default="greedy")
    # Under torchrun --problems: it takes an --n for its own --nnodes or --nproc-per-node and gives up.
    add("--n", "--problems", type=int, metavar="N", help="held-out problems (500; with --eval-file all of it)")
    add("--completions", type=int, default=8, help="completions a problem (sample), leaves a problem (astar)")
    add("--digits", default="2", help="digits per operand: 2, 3, 2x3, 2-3, ...")
    add("--prompt", choices=tuple(data.PROMPTS), default="terse", help="prompt style")
    add("--prefill", help="text the completion is made to begin with, such as '<think>'")
    add("--eval-file", help="a jsonl file of problems with prompt and answer instead of made ones")
    add("--reward", default="", metavar="FILE.py:FUNCTION", help="a reward of your own")
    add("--max-new-tokens", type=int, default=48)
    add("--tau", type=float, default=0.0, help="temperature of the search's noise (astar)")
    add("--width", type=int, default=2, help="nodes of a problem run at once (astar)")
    add("--max-nodes", type=int, default=1024, help="most nodes a problem (astar)")
    add("--seed", type=int, default=0, help="seed of the draws")
    add("--device", default="auto")
    add("--show", type=int, default=2, help="worst completions to print, of each kind")
    add("--json", metavar="OUT.json", help="write the figures there, and every completion to OUT.jsonl")
    add("--overwrite", action="store_true", help="replace these two files if they exist")
    add("--compare", nargs=2, metavar=("A.jsonl", "B.jsonl"), help="paired test of B against A; no model")
    return parser


def check(args):
    """Raise ValueError, one sentence, for a flag that cannot be meant."""
    if args.compare and args.json:
        raise ValueError("--compare only prints: leave --json out")
    for name in ("n", "completions", "max_new_tokens", "width", "max_nodes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    if not (0 <= args.seed <= 2**31 and args.show >= 0):
        raise ValueError("--seed must lie in [0, 2^31], and --show must be 0 or more")
    if not 0 <= args.tau <= 1:
        raise ValueError(f"--tau must lie in [0, 1], not {args.tau}")


# ======================================================================================================== --json


def check_output(path, overwrite):
    """Raise ValueError unless PATH.json and PATH.jsonl can be written, if there is to be any."""
    if path is None:
        return
    if not path.endswith(".json"):
        raise ValueError(f"--json {path}: the name must end in .json; the completions go into the .jsonl beside it")
    for name in (path, path + "l"):
        if os.path.isdir(name) or os.path.exists(name) and not overwrite:
            raise ValueError(f"--json {path}: {name} exists; choose another name or add --overwrite")
    try:
        tempfile.TemporaryFile(dir=os.path.dirname(path) or ".").close()
    except OSError as error:
        raise ValueError(f"--json {path}: its folder cannot be written to ({error.strerror})") from None


def save(path, result, rows):
    """The figures into PATH.json, the rows into PATH.jsonl, unless PATH is None.  Returns the exit status."""
    if path is None:
        return 0
    try:
        run_folder.write(path + "l", "".join(json.dumps(row) + "\n" for row in rows))
        run_folder.write(path, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        print(f"eval.py: --json {path} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


def read_rows(path):
    """The rows of a jsonl file that --json wrote.  Raises ValueError that names the line, OSError if it cannot be read."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                row["prompt"], row["truth"]  # KeyError where one is missing
                if not 0 <= row["scores"]["accuracy"] <= 1:
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number}: not a problem as eval.py --json writes it to .jsonl") from None
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no problems in it")
    return rows


# ===================================================================================================== --compare


def sign_test(better, worse):
    """Two-sided p of `better` against `worse` among the problems that differ: under equality each is a fair coin.
    For 0/1 outcomes this is McNemar's exact test; for shares of several draws it asks for direction, not size."""
    n = better + worse
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2**n)


def paired(A, B, repeats=10_000):
    """Paired test of two lists of rows about the same problems: the mean difference in accuracy, its 95 % interval by a
    bootstrap over problems, and the sign test.  Raises ValueError if the problems differ."""
    if len(A) != len(B):
        raise ValueError(f"A has {len(A)} problems and B {len(B)}: evaluate both with the same --n")
    for number, (one, other) in enumerate(zip(A, B), start=1):
        if (one["prompt"], one["truth"]) != (other["prompt"], other["truth"]):
            raise ValueError(f"line {number} is about {one['prompt']!r} in A and {other['prompt']!r} in B: the problems differ")
    a, b = (torch.tensor([row["scores"]["accuracy"] for row in rows], dtype=torch.float64) for rows in (A, B))
    gain, rng = b - a, torch.Generator().manual_seed(0)
    means = [gain[torch.randint(len(gain), gain.shape, generator=rng)].mean() for _ in range(repeats)]
    ends = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    B_better, A_better = int((gain > 0).sum()), int((gain < 0).sum())
    return {
        "problems": len(gain),
        "accuracy_A": a.mean().item(),
        "accuracy_B": b.mean().item(),
        "difference": gain.mean().item(),
        "difference_interval": ends.tolist(),
        "B_better": B_better,
        "A_better": A_better,
        "p_value": sign_test(B_better, A_better),
    }


def compare(A, B):
    """The paired test of two jsonl files, as text."""
    result = paired(read_rows(A), read_rows(B))
    return evaluation.report(result | {"p_value": f"{result['p_value']:.2g}"})


# ======================================================================================================== --show


def worst(rows, decode, each):
    """Kind of fault -> up to `each` (row, completion), and how many there are: {kind: (count, examples)}.  Truncated and
    malformed ones in the order of the problems, well-formed wrong ones by their distance from the truth."""
    faults = {"no leaf within the bounds": [], "truncated": [], "malformed": [], "wrong, nearest first": []}
    none, cut, malformed, wrong = faults.values()
    for row in rows:
        judged = evaluation.answers(row, decode)
        if not judged:
            none.append((row, {"text": "", "answer": None}))
        for c in judged:
            if c["truncated"] or not c["formatted"] or not c["correct"]:
                (cut if c["truncated"] else wrong if c["formatted"] else malformed).append((row, c))
    numbers = [pair for pair in wrong if isinstance(pair[1]["answer"], int) and isinstance(pair[0]["truth"], int)]
    if numbers == wrong:
        wrong.sort(key=lambda pair: abs(pair[1]["answer"] - pair[0]["truth"]))
    return {kind: (len(pairs), pairs[:each]) for kind, pairs in faults.items() if pairs}


def show_worst(rows, decode, each):
    """Print up to `each` completions of every kind of fault."""
    for kind, (count, pairs) in worst(rows, decode, each).items() if each else ():
        print(f"\n{kind} ({count})")
        for row, c in pairs:
            print(f"  {row['prompt']}{c['text']}   read {c['answer']}, right is {row['truth']}")


# ===================================================================================================== the command


def main(argv=None):
    """python eval.py."""
    parser = flags()
    args = parser.parse_args(argv)
    try:
        check(args)
        if args.compare:
            return print(compare(*args.compare))
        reward = reward_module.load(args.reward)
        if args.eval_file:
            problems = data.read_problems(args.eval_file, args.prefill, bool(args.reward))[: args.n]
            if args.n and len(problems) < args.n:
                raise ValueError(f"{args.eval_file} holds only {len(problems)} problems, fewer than --n {args.n}")
        else:
            problems = data.eval_problems(args.n or 500, args.digits, args.prompt, args.prefill)
        ranks = fsdp.start("WORLD_SIZE" in os.environ, args.device)
        # Before the work, not after it: an hour of decoding must not end at a file that cannot be written.
        fsdp.agree(lambda: check_output(args.json, args.overwrite) if ranks.is_main else None, ranks)
        model, tokenizer = policy.load_policy(args.model, device=ranks.device)
        astar_search.check_model(model)
        policy.check_context(model, max(map(len, evaluation.encode(tokenizer, problems))), args.max_new_tokens)
        value = evaluation.load_guide(args.model, model)
        if args.decode == "astar" and value is None:
            print("eval.py: no value head beside this model, so the search is guided by log pi alone", file=sys.stderr)
    except (ValueError, OSError) as error:
        unread = isinstance(error, OSError) and error.filename
        parser.error(f"{error.filename} cannot be read ({error.strerror})" if unread else str(error))
    same = {name: getattr(args, name) for name in ("decode", "tau", "width", "max_new_tokens", "max_nodes", "seed")}
    result, rows = evaluation.evaluate(model, tokenizer, problems, reward, ranks, n=args.completions, value=value, **same)
    status = 0
    if ranks.is_main:
        print(f"{args.model}, {args.decode}\n{evaluation.report(result)}")
        show_worst(rows, args.decode, args.show)
        # What the file is for, asserted: the figure is a count over the rows.
        right = sum(c["count"] * c["correct"] for row in rows for c in evaluation.answers(row, args.decode))
        drawn = sum(max(1, sum(c["count"] for c in evaluation.answers(row, args.decode))) for row in rows)
        assert abs(result["accuracy"] - right / drawn) < 1e-9
        status = save(args.json, result | {"flags": vars(args)}, rows)
    fsdp.stop(ranks, status)
