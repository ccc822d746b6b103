"""eval.py -- how good is a policy, on problems it was never trained on, and is it better than another?

Three ways to decode, all on the expander of astar_search.py:

    greedy    the most probable token, step by step
    sample    i.i.d. completions: mean accuracy, pass@k, and the vote of the majority
    astar     best-first search guided by the value head; the answer is the first leaf found.  It never sees the reward.

    python eval.py                                                        # the tiny base, greedy
    python eval.py --model runs/local/checkpoint_iter_90 --decode astar --n 500 --json out.json    # and out.jsonl
    python eval.py --compare base.jsonl out.jsonl                         # a paired test on the same problems
    torchrun --standalone --nproc_per_node=2 eval.py --problems 500       # the same figures from two processes
    python eval.py --model Qwen/Qwen2.5-3B --prompt tinyzero --decode sample --completions 8 --max-new-tokens 512

--problems is --n by another name: torchrun takes an --n for its own --nnodes or --nproc-per-node and gives up, unless
a `--` stands before the script's name.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file

import astar_search
import data
import fsdp
import policy
import reward as reward_module
import value as value_module


# ====================================================================================================== figures


def pass_at_k(n, correct, k):
    """Chance that k of n drawn completions, `correct` of them right, hold a right one: 1 - C(n-c, k)/C(n, k).
    Unbiased (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    miss = 1.0
    for i in range(k):
        miss *= max(n - correct - i, 0) / (n - i)
    return 1.0 - miss


def interval(shares, draws=1, z=1.959964):
    """95 % interval for the mean of `shares`, the share of right completions among the `draws` of each problem.

    Problems are drawn, and completions of one problem are alike: counting each completion would make the interval too
    narrow, counting each problem as one 0/1 outcome too wide.  So it is Wilson's interval (1927) for as many outcomes as
    would be as noisy: p(1-p)/Var(mean), the effective sample size (Kish 1965), between problems and problems * draws.
    With one draw that is the number of problems.  Unlike a bootstrap's, the interval is not [0, 0] when none is right.
    """
    n = len(shares)
    p = sum(shares) / n
    spread = sum((x - p) ** 2 for x in shares) / n
    n *= max(1.0, min(draws, p * (1 - p) / max(spread, 1e-12)))
    # |p - P| = z sqrt(P(1-P)/n), solved for P
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def majority(votes):
    """1 if the answer with most votes is right, else 0; if answers lead together, the chance that a coin picks a right one.
    votes: (answer, weight, is it right?) of each completion; one without an answer, None, does not vote."""
    weights, right = {}, {}
    for answer, weight, correct in votes:
        if answer is not None:
            weights[answer] = weights.get(answer, 0.0) + weight
            right[answer] = correct
    most = max(weights.values(), default=0.0)
    leaders = [answer for answer, weight in weights.items() if weight >= most * (1 - 1e-9)]  # equal but for rounding
    return sum(right[answer] for answer in leaders) / max(1, len(leaders))


def answers(row, decode):
    """The completions of a problem that count: every draw, but of an A* search its first leaf."""
    return row["completions"][:1] if decode == "astar" else row["completions"]


def scores(row, decode):
    """The figures of one problem, each a mean over its draws.  A search that found no leaf counts as wrong."""
    judged = answers(row, decode)
    draws = max(1, sum(c["count"] for c in judged))
    share = lambda key: sum(c["count"] * c[key] for c in judged) / draws
    names = {"accuracy": "correct", "format": "formatted", "completion_length": "tokens", "truncated": "truncated"}
    figures = {name: share(key) for name, key in names.items()}
    if decode != "greedy":
        figures["majority"] = majority((c["answer"], c["weight"], c["correct"]) for c in row["completions"])
    if decode == "astar":
        figures["found"] = float(any(c["correct"] for c in row["completions"]))
    if decode == "sample":
        right = sum(c["count"] for c in judged if c["correct"])
        figures |= {f"pass@{k}": pass_at_k(draws, right, k) for k in (2**i for i in range(draws.bit_length()))}
    return figures


def summary(rows, draws):
    """Every figure as the mean over problems, and the interval of the accuracy."""
    means = {name: sum(row["scores"][name] for row in rows) / len(rows) for name in rows[0]["scores"]}
    within = interval([row["scores"]["accuracy"] for row in rows], draws)
    tokens = sum(row["model_tokens"] for row in rows) / len(rows)
    first = {"problems": len(rows), "accuracy": means["accuracy"], "accuracy_interval": within}
    return first | means | {"tokens_per_problem": tokens}


def sign_test(better, worse):
    """Two-sided p of `better` against `worse` among the problems that differ: under equality each is a fair coin.
    For 0/1 outcomes this is McNemar's exact test; for shares of several draws it asks for direction, not size."""
    n = better + worse
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2**n)


def compare(A, B, repeats=10_000):
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


# ===================================================================================================== decoding


def guide(head, bounds, beta, use_head=True):
    """value(hidden) -> (V, h) for the expander; h = 0 unless use_head."""
    if head is None:
        return None

    def value(hidden):
        V, u_logit = head(hidden)
        return V, value_module.soft_value(u_logit, *bounds, beta) if use_head else torch.zeros_like(V)

    return value


def encode(tokenizer, problems):
    """Prompt and prefill of each problem as token ids."""
    ids = [tokenizer(problem.text)["input_ids"] for problem in problems]
    if [] in ids:
        raise ValueError(f"the tokenizer gives no tokens for the prompt {problems[ids.index([])].text!r}")
    return ids


def texts_of(rollouts, tokenizer, problems):
    """What the reward reads: prefill plus completion, without the end-of-sequence token."""
    ended = (~rollouts.truncated).tolist()
    ids = [ids[:-1] if end else ids for ids, end in zip(rollouts.completions(), ended)]
    prefills = [problems[p].prefill for p in rollouts.problem.tolist()]
    return [prefill + text for prefill, text in zip(prefills, tokenizer.batch_decode(ids, skip_special_tokens=True))]


def judge(rollouts, tokenizer, problems, reward, max_new_tokens):
    """Texts of the rollouts, and what the reward says of each: dicts of its parts."""
    texts = texts_of(rollouts, tokenizer, problems)
    lengths = (rollouts.length - rollouts.prompt_length).tolist()
    facts = zip(texts, rollouts.problem.tolist(), lengths, rollouts.truncated.tolist())
    return texts, [reward.judge(problems[p], text, length / max_new_tokens, cut) for text, p, length, cut in facts]


def is_right(tokenizer, problems, reward, max_new_tokens):
    """leaf -> is its completion right?  For a search in training that may stop there; it knows the answer."""

    def done(leaf):
        problem, path = problems[leaf.problem], leaf.path()
        text = tokenizer.decode(path if leaf.truncated else path[:-1], skip_special_tokens=True)
        return reward.judge(problem, problem.prefill + text, leaf.depth / max_new_tokens, leaf.truncated)["correct"]

    return done


@torch.no_grad()
def evaluate(model, tokenizer, problems, reward, ranks, *, decode="greedy", n=8, max_new_tokens=48, value=None, tau=0.0,
             width=2, max_nodes=1024, batch=512, seed=0):  # fmt: skip
    """Returns (result, rows): figures for JSON, and one row a problem with its completions, verdicts and scores.

    n: completions a problem (sample) or leaves (astar).
    result: problems, accuracy, accuracy_interval, format, completion_length, truncated, tokens_per_problem (model tokens);
    with decode="sample" also majority and pass@1, 2, 4, ... up to n; with "astar" majority, by leaf weight, and found (any
    leaf right); each also as NAME_by_difficulty; and seconds_per_problem.  All but the last can be recounted from the rows.
    Each rank decodes its share of the problems with whole weights (fsdp.gathered); then every rank has every row, so
    the figures are the same for any number of them.
    """
    eos = policy.stop_tokens(model, tokenizer)
    greedy = decode == "greedy"
    options = astar_search.Options(
        eos, K=1 if greedy else n, tau=tau, width=width, max_new_tokens=max_new_tokens, max_nodes=max_nodes
    )
    was_training, start = model.training, time.perf_counter()
    model.eval()
    rows = []
    mine = list(fsdp.share(len(problems), ranks))
    for indices in (mine[i : i + batch] for i in range(0, len(mine), batch)):
        chosen = [problems[i] for i in indices]
        expander = astar_search.Expander(model, encode(tokenizer, chosen), max_new_tokens, value)
        keys = astar_search.root_keys(seed, -1, indices)  # iteration -1: evaluation's own noise
        if decode == "astar":
            trees = astar_search.search(keys, expander, options)
        else:
            trees = astar_search.sample(keys, expander, options, greedy)
        rollouts = astar_search.collect(trees, expander)
        texts, verdicts = judge(rollouts, tokenizer, chosen, reward, max_new_tokens)
        batch_rows = [
            {"index": i, "prompt": p.prompt, "prefill": p.prefill, "truth": p.answer, "difficulty": p.difficulty,
             "model_tokens": spent, "completions": []}
            for i, p, spent in zip(indices, chosen, expander.spent)
        ]  # fmt: skip
        leaves = (leaf for tree in trees for leaf in tree.leaves)
        for leaf, text, verdict in zip(leaves, texts, verdicts):
            facts = {"text": text, "count": leaf.count, "weight": leaf.weight, "f": leaf.f, "tokens": leaf.depth,
                     "truncated": leaf.truncated}  # fmt: skip
            batch_rows[leaf.problem]["completions"].append(facts | verdict)
        rows += batch_rows
    model.train(was_training)
    rows = sorted((row for part in fsdp.everyone(rows, ranks) for row in part), key=lambda row: row["index"])
    for row in rows:
        row["scores"] = scores(row, decode)

    draws = n if decode == "sample" else 1
    order = {level: place for place, level in enumerate(("easy", "medium", "hard"))}
    levels = sorted({row["difficulty"] for row in rows}, key=lambda level: (order.get(level, 3), level))
    parts = {level: summary([row for row in rows if row["difficulty"] == level], draws) for level in levels}
    result = summary(rows, draws)
    result |= {f"{name}_by_difficulty": {level: part[name] for level, part in parts.items()} for name in result}
    return result | {"seconds_per_problem": (time.perf_counter() - start) / len(rows)}, rows


def load_head(folder, model, beta=None):
    """The guide of a checkpoint folder: its value head with the (r_lo, r_hi, beta) it was trained for, or another beta;
    None if it has none."""
    path, state = os.path.join(folder, "value.safetensors"), os.path.join(folder, "trainer_state.json")
    if not os.path.isfile(path) or not os.path.isfile(state):
        return None
    try:
        with open(state) as file:
            state = json.load(file)
        weights = load_file(path)
        head = value_module.ValueHead(model.config.get_text_config().hidden_size, weights["inner.weight"].shape[0])
        head.load_state_dict(weights)
        config = state["config"]  # a run without bounds is older than rewards of one's own
        bounds = state.get("reward_bounds") or reward_module.Reward(config["format_bonus"], config["length_penalty"]).bounds
        return guide(head.to(model.device), bounds, beta or config["beta"])
    except Exception as error:  # truncated, of another model, edited by hand: whatever it is, there is no head to use
        raise ValueError(f"{folder}: its value head cannot be read ({type(error).__name__})") from None


# ================================================================================================ what is printed


def report(result):
    """The figures as a table: of all problems, then by difficulty."""
    several = len(result["accuracy_by_difficulty"]) > 1
    lines = [("", "all", *result["accuracy_by_difficulty"])] if several else []
    for name, figure in result.items():
        if not name.endswith("_by_difficulty"):
            by_level = result.get(f"{name}_by_difficulty", {}) if several else {}
            lines.append((name, *map(readable, (figure, *by_level.values()))))
    return "\n".join(f"{name:20s}" + "".join(f"{cell:>17s}" for cell in cells) for name, *cells in lines)


def readable(x):
    """A figure or an interval as text."""
    return " to ".join(map(readable, x)) if isinstance(x, list) else f"{x:.3f}" if isinstance(x, float) else str(x)


def worst(rows, decode, each):
    """Kind of fault -> up to `each` (row, completion), and how many there are: {kind: (count, examples)}.  Truncated and
    malformed ones in the order of the problems, well-formed wrong ones by their distance from the truth."""
    faults = {"no leaf within the bounds": [], "truncated": [], "malformed": [], "wrong, nearest first": []}
    none, cut, malformed, wrong = faults.values()
    for row in rows:
        judged = answers(row, decode)
        if not judged:
            none.append((row, {"text": "", "answer": None}))
        for c in judged:
            if c["truncated"] or not c["formatted"] or not c["correct"]:
                (cut if c["truncated"] else wrong if c["formatted"] else malformed).append((row, c))
    numbers = [pair for pair in wrong if isinstance(pair[1]["answer"], int) and isinstance(pair[0]["truth"], int)]
    if numbers == wrong:
        wrong.sort(key=lambda pair: abs(pair[1]["answer"] - pair[0]["truth"]))
    return {kind: (len(pairs), pairs[:each]) for kind, pairs in faults.items() if pairs}


def show(title, result, rows, decode, examples):
    """Print the figures and the worst completions."""
    print(f"{title}\n{report(result)}")
    for kind, (count, pairs) in worst(rows, decode, examples).items() if examples else ():
        print(f"\n{kind} ({count})")
        for row, c in pairs:
            print(f"  {row['prompt']}{c['text']}   read {c['answer']}, right is {row['truth']}")
    # What the file is for, asserted: the figure is a count over the rows.
    right = sum(c["count"] * c["correct"] for row in rows for c in answers(row, decode))
    drawn = sum(max(1, sum(c["count"] for c in answers(row, decode))) for row in rows)
    assert abs(result["accuracy"] - right / drawn) < 1e-9


# ======================================================================================================== files


def write(path, text):
    """A whole file or none: written aside, synced, renamed."""
    aside = path + ".tmp"
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):  # a full disk, or Ctrl-C
            os.remove(aside)


def check_output(path, overwrite):
    """Raise ValueError unless PATH.json and PATH.jsonl can be written: before the work, not after it."""
    if not path.endswith(".json"):
        raise ValueError(f"--json {path}: the name must end in .json; the completions go into the .jsonl beside it")
    for name in (path, path + "l"):
        if os.path.isdir(name) or os.path.exists(name) and not overwrite:
            raise ValueError(f"--json {path}: {name} exists; choose another name or add --overwrite")
    try:
        tempfile.TemporaryFile(dir=os.path.dirname(path) or ".").close()
    except OSError as error:
        raise ValueError(f"--json {path}: its folder cannot be written to ({error.strerror})") from None


def read_rows(path):
    """The rows of a jsonl file that --json wrote.  Raises ValueError that names the line, OSError if it cannot be read."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                row["prompt"], row["truth"]
                if not 0 <= row["scores"]["accuracy"] <= 1:
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number}: not a problem as eval.py --json writes it to .jsonl") from None
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no problems in it")
    return rows


# ================================================================================================= command line


class OneSentence(argparse.ArgumentParser):
    """A parser whose error is one sentence on stderr and exit status 2."""

    def error(self, message):
        """Print the sentence, on one rank, and exit."""
        if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun starts several of us with the same flags
            print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def main(argv=None):
    here = os.path.dirname(os.path.abspath(__file__))
    parser = OneSentence(
        "eval.py", description="Accuracy of a model on held-out multiplication problems.", allow_abbrev=False
    )
    parser.add_argument(
        "--model", default=os.path.join(here, "tiny_base"), help="folder or hub id of a causal language model"
    )
    parser.add_argument("--decode", choices=("greedy", "sample", "astar"), default="greedy")
    parser.add_argument(
        "--n", "--problems", type=int, metavar="N", help="held-out problems (500; with --eval-file all of it)"
    )
    parser.add_argument(
        "--completions", type=int, default=8, help="completions a problem (sample), leaves a problem (astar)"
    )
    parser.add_argument("--digits", default="2", help="digits per operand: 2, 3, 2x3, 2-3, ...")
    parser.add_argument("--prompt", choices=tuple(data.PROMPTS), default="terse", help="prompt style")
    parser.add_argument("--prefill", help="text the completion is made to begin with, such as '<think>'")
    parser.add_argument("--eval-file", help="a jsonl file of problems with prompt and answer instead of made ones")
    parser.add_argument("--reward", default="", metavar="FILE.py:FUNCTION", help="a reward of your own")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--tau", type=float, default=0.0, help="temperature of the search's noise (astar)")
    parser.add_argument("--width", type=int, default=2, help="nodes of a problem run at once (astar)")
    parser.add_argument("--max-nodes", type=int, default=1024, help="most nodes a problem (astar)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--show", type=int, default=2, help="worst completions to print, of each kind")
    parser.add_argument("--json", metavar="OUT.json", help="write the figures there, and every completion to OUT.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace these two files if they exist")
    parser.add_argument("--compare", nargs=2, metavar=("A.jsonl", "B.jsonl"), help="paired test of B against A; no model")
    args = parser.parse_args(argv)
    try:
        if args.compare:
            if args.json:
                raise ValueError("--compare only prints: leave --json out")
            result = compare(*map(read_rows, args.compare))
            result["p_value"] = f"{result['p_value']:.2g}"
            print("\n".join(f"{name:20s}{readable(x):>17s}" for name, x in result.items()))
            return
        for name in ("n", "completions", "max_new_tokens", "width", "max_nodes"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
        if not (0 <= args.seed <= 2**31 and args.show >= 0):
            raise ValueError("--seed must lie in [0, 2^31], and --show must be 0 or more")
        if not 0 <= args.tau <= 1:
            raise ValueError(f"--tau must lie in [0, 1], not {args.tau}")
        reward = reward_module.load(args.reward)
        if args.eval_file:
            problems = data.read_problems(args.eval_file, args.prefill, bool(args.reward))
            if args.n and args.n > len(problems):
                raise ValueError(f"{args.eval_file} holds only {len(problems)} problems, fewer than the {args.n} asked for")
            problems = problems[: args.n]
        else:
            problems = data.eval_problems(args.n or 500, args.digits, args.prompt, args.prefill)
        ranks = fsdp.start("WORLD_SIZE" in os.environ, args.device)
        fsdp.agree(lambda: check_output(args.json, args.overwrite) if args.json and ranks.is_main else None, ranks)
        model, tokenizer = policy.load_policy(args.model, device=ranks.device)
        astar_search.check_model(model)
        policy.check_context(model, max(map(len, encode(tokenizer, problems))), args.max_new_tokens)
        value = load_head(args.model, model)
        if args.decode == "astar" and value is None:
            print("eval.py: no value head beside this model, so the search is guided by log pi alone", file=sys.stderr)
    except (ValueError, OSError) as error:
        unread = isinstance(error, OSError) and error.filename
        parser.error(f"{error.filename} cannot be read ({error.strerror})" if unread else str(error))
    result, rows = evaluate(
        model, tokenizer, problems, reward, ranks, decode=args.decode, n=args.completions, tau=args.tau,
        width=args.width, max_new_tokens=args.max_new_tokens, max_nodes=args.max_nodes, value=value, seed=args.seed,
    )  # fmt: skip
    status = 0
    if ranks.is_main:
        show(f"{args.model}, {args.decode}", result, rows, args.decode, args.show)
        try:
            if args.json:
                write(args.json + "l", "".join(json.dumps(row) + "\n" for row in rows))
                write(args.json, json.dumps(result | {"flags": vars(args)}, indent=1) + "\n")
        except OSError as error:
            print(f"eval.py: --json {args.json} cannot be written ({error.strerror})", file=sys.stderr)
            status = 2
    fsdp.stop(ranks, status)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("eval.py: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except reward_module.RewardError as error:
        sys.exit(f"eval.py: {error}")
