"""eval.py -- how good is a policy, on problems it was never trained on?

Three ways to decode, all on the expander of astar_search.py:

    greedy    the most probable token, step by step
    sample    n i.i.d. completions a problem: mean accuracy, and pass@k
    astar     best-first search guided by the value head; the answer is the first leaf found.  It never sees the reward.

    python eval.py                                                        # the tiny base, greedy
    python eval.py --model runs/local/checkpoint_iter_90 --decode astar
    torchrun --standalone --nproc_per_node=2 eval.py                      # the same figures from two processes
    python eval.py --model Qwen/Qwen2.5-3B --prompt tinyzero --decode sample --n 8 --max-new-tokens 512
"""

import argparse
import json
import os
import sys
import time

import torch
from safetensors.torch import load_file

import astar_search
import data
import fsdp
import policy
import reward as reward_module
import value as value_module


def pass_at_k(n, correct, k):
    """Chance that k of n drawn completions, `correct` of them right, hold a right one: 1 - C(n-c, k)/C(n, k).
    Unbiased (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    miss = 1.0
    for i in range(k):
        miss *= max(n - correct - i, 0) / (n - i)
    return 1.0 - miss


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
    return texts, [reward(text, problems[p].answer, length / max_new_tokens, cut) for text, p, length, cut in facts]


@torch.no_grad()
def evaluate(model, tokenizer, problems, reward, ranks, *, decode="greedy", n=8, max_new_tokens=48, value=None, tau=0.0,
             width=2, max_nodes=1024, batch=512, seed=0):  # fmt: skip
    """Returns (result, rows): figures for JSON, and one row a problem with its completions and verdicts.

    result: accuracy, format, accuracy_by_difficulty, format_by_difficulty, completion_length, truncated, model_tokens,
    tokens_per_second; with decode="sample" also pass@1, 2, 4, ... up to n; with "astar" also found (any leaf right).
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
    rows, model_tokens = [], 0
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
        model_tokens += expander.model_tokens
        texts, verdicts = judge(rollouts, tokenizer, chosen, reward, max_new_tokens)
        batch_rows = [
            {"index": i, "prompt": p.prompt, "truth": p.answer, "difficulty": p.difficulty, "completions": []}
            for i, p in zip(indices, chosen)
        ]
        lengths = (rollouts.length - rollouts.prompt_length).tolist()
        for i, p in enumerate(rollouts.problem.tolist()):
            completion = {
                "text": texts[i],
                "count": int(rollouts.count[i]),
                "f": float(rollouts.f[i]),
                "tokens": lengths[i],
                "truncated": bool(rollouts.truncated[i]),
            }
            batch_rows[p]["completions"].append(completion | verdicts[i])
        rows += batch_rows
    model.train(was_training)
    rows = sorted((row for part in fsdp.everyone(rows, ranks) for row in part), key=lambda row: row["index"])
    model_tokens = fsdp.total({"model_tokens": model_tokens}, ranks)["model_tokens"]

    # A mean over problems, each by the mean of its completions.  An A* search that found no leaf counts as wrong.
    columns = {}  # name -> a number for each problem that has one

    def add(name, number):
        columns.setdefault(name, []).append(number)

    for row in rows:
        found = row["completions"]
        judged = found[:1] if decode == "astar" else found  # the first leaf is the answer
        draws = max(1, sum(c["count"] for c in judged))
        share = lambda key: sum(c["count"] * c[key] for c in judged) / draws
        row["correct"] = share("correct")
        for group in ("", f" {row['difficulty']}"):
            add("accuracy" + group, row["correct"])
            add("format" + group, share("formatted"))
        add("completion_length", share("tokens"))
        add("truncated", share("truncated"))
        add("found", any(c["correct"] for c in found))
        if decode == "sample":
            right = sum(c["count"] for c in judged if c["correct"])
            for k in (2**i for i in range(n.bit_length())):
                add(f"pass@{k}", pass_at_k(n, right, k))
    means = {name: sum(column) / len(column) for name, column in sorted(columns.items())}
    levels = lambda name: {key.removeprefix(name + " "): x for key, x in means.items() if key.startswith(name + " ")}
    result = {
        "accuracy": means["accuracy"],
        "format": means["format"],
        "accuracy_by_difficulty": levels("accuracy"),
        "format_by_difficulty": levels("format"),
        "completion_length": means["completion_length"],
        "truncated": means["truncated"],
        "model_tokens": model_tokens,
        "tokens_per_second": model_tokens / (time.perf_counter() - start),
    }
    result |= {name: x for name, x in means.items() if name.startswith("pass@")}
    if decode == "astar":
        result["found"] = means["found"]
    return result, rows


def load_head(folder, model, beta=None):
    """The guide of a checkpoint folder: its value head with the (r_lo, r_hi, beta) it was trained for, or another beta;
    None if it has none."""
    path, state = os.path.join(folder, "value.safetensors"), os.path.join(folder, "trainer_state.json")
    if not os.path.isfile(path) or not os.path.isfile(state):
        return None
    try:
        with open(state) as file:
            config = json.load(file)["config"]
        weights = load_file(path)
        head = value_module.ValueHead(model.config.get_text_config().hidden_size, weights["inner.weight"].shape[0])
        head.load_state_dict(weights)
        bounds = reward_module.Reward(config["format_bonus"], config["length_penalty"]).bounds
        return guide(head.to(model.device), bounds, beta or config["beta"])
    except Exception as error:  # truncated, of another model, edited by hand: whatever it is, there is no head to use
        raise ValueError(f"{folder}: its value head cannot be read ({type(error).__name__})") from None


def report(result):
    """A readable block of the figures."""
    lines = []
    for key, figure in result.items():
        if isinstance(figure, dict):
            figure = "   ".join(f"{level} {share:.3f}" for level, share in figure.items())
        elif isinstance(figure, float):
            figure = f"{figure:.0f}" if key == "tokens_per_second" else f"{figure:.3f}"
        lines.append(f"{key:24s}{figure}")
    return "\n".join(lines)


def show(title, result, rows, examples):
    """Print the figures and a few completions."""
    print(f"{title}\n{report(result)}")
    for row in rows[:examples]:
        found = row["completions"] or [{"text": "(no leaf within the bounds)", "correct": False}]
        print(f"\n{row['prompt']}{found[0]['text']}\n  {'right' if found[0]['correct'] else 'wrong'}: {row['truth']}")
    # What the file is for, asserted: the figure is a count over the rows.
    assert abs(result["accuracy"] - sum(row["correct"] for row in rows) / len(rows)) < 1e-9


class OneSentence(argparse.ArgumentParser):
    """A parser whose error is one sentence on stderr and exit status 2."""

    def error(self, message):
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
    parser.add_argument("--problems", type=int, default=500, help="number of held-out problems")
    parser.add_argument("--n", type=int, default=8, help="completions a problem (sample), leaves a problem (astar)")
    parser.add_argument("--digits", default="2", help="digits per operand: 2, 3, 2x3, 2-3, ...")
    parser.add_argument("--prompt", choices=tuple(data.PROMPTS), default="terse", help="prompt style")
    parser.add_argument("--prefill", help="text the completion is made to begin with, such as '<think>'")
    parser.add_argument("--eval-file", help="a jsonl file of problems with prompt and answer instead of made ones")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--tau", type=float, default=0.0, help="temperature of the search's noise (astar)")
    parser.add_argument("--width", type=int, default=2, help="nodes of a problem run at once (astar)")
    parser.add_argument("--max-nodes", type=int, default=1024, help="most nodes a problem (astar)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--show", type=int, default=3, help="completions to print")
    args = parser.parse_args(argv)
    try:
        for name in ("problems", "n", "max_new_tokens", "width", "max_nodes"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
        if not (0 <= args.seed <= 2**31 and args.show >= 0):
            raise ValueError("--seed must lie in [0, 2^31], and --show must be 0 or more")
        if not 0 <= args.tau <= 1:
            raise ValueError(f"--tau must lie in [0, 1], not {args.tau}")
        if args.eval_file:
            problems = data.read_problems(args.eval_file, args.prefill)[: args.problems]
        else:
            problems = data.eval_problems(args.problems, args.digits, args.prompt, args.prefill)
        ranks = fsdp.start("WORLD_SIZE" in os.environ, args.device)
        model, tokenizer = policy.load_policy(args.model, device=ranks.device)
        astar_search.check_model(model)
        policy.check_context(model, max(map(len, encode(tokenizer, problems))), args.max_new_tokens)
        value = load_head(args.model, model)
        if args.decode == "astar" and value is None:
            print("eval.py: no value head beside this model, so the search is guided by log pi alone", file=sys.stderr)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    result, rows = evaluate(
        model, tokenizer, problems, reward_module.Reward(), ranks, decode=args.decode, n=args.n, tau=args.tau, width=args.width,
        max_new_tokens=args.max_new_tokens, max_nodes=args.max_nodes, value=value, seed=args.seed,
    )  # fmt: skip
    if ranks.is_main:
        show(f"{args.model}, {len(problems)} problems, {args.decode}", result, rows, args.show)
    fsdp.stop(ranks)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("eval.py: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
