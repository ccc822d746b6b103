"""eval.py -- how good is a policy on problems it was never trained on, and is it better than another?

Three ways to decode, all on the expander of astar_search.py:

    greedy    the most probable token, step by step
    sample    i.i.d. completions: mean accuracy, pass@k, and the vote of the majority
    astar     best-first search guided by the value head; the answer is the first leaf found.  It never sees the reward.

    python eval.py --json base.json                                       # the tiny base, greedy; and base.jsonl
    python eval.py --model runs/local/checkpoint_iter_360 --decode astar --json out.json
    python eval.py --compare base.jsonl out.jsonl                         # a paired test on the same problems
    torchrun --standalone --nproc_per_node=2 eval.py --problems 500       # the same figures from two processes
    python eval.py --model Qwen/Qwen2.5-3B --prompt tinyzero --decode sample --completions 8 --max-new-tokens 512
"""

import argparse
import json
import math
import os
import sys
import time

import torch
from safetensors.torch import load_file

import astar_search
import fsdp
import policy
import reward as reward_module
import value as value_module


# ====================================================================================================== figures
def pass_at_k(n, correct, k):
    """Chance that k of n drawn completions, `correct` of them right, hold a right one.  Unbiased for k new draws (Chen
    et al. 2021, arXiv 2107.03374, eq. 1), and less noisy than to look at the first k alone."""
    # pass@k = 1 - C(n-c, k)/C(n, k): all k are drawn from the n - c wrong ones
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def interval(shares, draws=1, z=1.959964):
    """95 % interval for the mean of `shares`, the share of right completions among the `draws` of each problem.

    Problems are drawn, and completions of one problem are alike: counting each completion would make the interval too
    narrow, counting each problem as one 0/1 outcome too wide.  So it is Wilson's interval (1927) for as many outcomes
    as would be as noisy: the effective sample size (Kish 1965), between problems and problems * draws.  With one draw
    that is the number of problems.  Unlike a bootstrap's, the interval is not [0, 0] when none is right.
    """
    n = len(shares)
    p = sum(shares) / n
    # n_eff = p(1-p)/Var(mean), Var(mean) = spread/n
    spread = sum((x - p) ** 2 for x in shares) / n
    n *= max(1.0, min(draws, p * (1 - p) / max(spread, 1e-12)))
    # |p - P| = z sqrt(P(1-P)/n), solved for P
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def majority(votes):
    """1 if the answer with most votes is right, else 0; if answers lead together, the chance that a coin picks a right
    one.  votes: (answer, weight, is it right?) of each completion; one without an answer, None, does not vote."""
    weights, right = {}, {}
    for answer, weight, correct in votes:
        if answer is not None:
            weights[answer] = weights.get(answer, 0.0) + weight
            right[answer] = correct
    most = max(weights.values(), default=0.0)
    leaders = [answer for answer, weight in weights.items() if weight >= most * (1 - 1e-9)]  # equal but for rounding
    return sum(right[answer] for answer in leaders) / max(1, len(leaders))


def answers(row, decode):
    """The completions of a problem that count: every draw, but of an A* search its first leaf.  (Which leaf is the best
    one only the reward knows, and a decoder has no access to it.)"""
    return row["completions"][:1] if decode == "astar" else row["completions"]


def scores(row, decode):
    """The figures of one problem, each a mean over its draws.  A search that found no leaf counts as wrong."""
    judged = answers(row, decode)
    draws = max(1, sum(c["count"] for c in judged))  # a completion that was drawn twice is there once, and counts twice
    names = {"accuracy": "correct", "format": "formatted", "completion_length": "tokens", "truncated": "truncated"}
    figures = {name: sum(c["count"] * c[key] for c in judged) / draws for name, key in names.items()}
    if decode != "greedy":
        figures["majority"] = majority((c["answer"], c["weight"], c["correct"]) for c in row["completions"])
    if decode == "astar":
        figures["found"] = float(any(c["correct"] for c in row["completions"]))
    if decode == "sample":
        right = sum(c["count"] for c in judged if c["correct"])
        figures |= {f"pass@{k}": pass_at_k(draws, right, k) for k in (2**i for i in range(draws.bit_length()))}
    return figures


def summary(rows, draws):
    """Every figure as the mean over problems, each of equal weight, and the interval of the accuracy."""
    means = {name: sum(row["scores"][name] for row in rows) / len(rows) for name in rows[0]["scores"]}
    within = interval([row["scores"]["accuracy"] for row in rows], draws)
    first = {"problems": len(rows), "accuracy": means["accuracy"], "accuracy_interval": within}
    return first | means | {"tokens_per_problem": sum(row["model_tokens"] for row in rows) / len(rows)}


def report(result):
    """The figures as a table: of all problems, then by difficulty if there are several."""
    number = lambda x: f"{x:.3f}" if isinstance(x, float) else str(x)
    text = lambda x: " to ".join(map(number, x)) if isinstance(x, list) else number(x)
    several = len(result.get("accuracy_by_difficulty", ())) > 1
    lines = [("", "all", *result["accuracy_by_difficulty"])] if several else []
    for name, figure in result.items():
        if not name.endswith("_by_difficulty"):
            by_level = result.get(f"{name}_by_difficulty", {}) if several else {}
            lines.append((name, *map(text, (figure, *by_level.values()))))
    return "\n".join(f"{name:20s}" + "".join(f"{cell:>17s}" for cell in cells) for name, *cells in lines)


# ===================================================================================================== decoding
def guide(head, bounds, beta, use_head=True):
    """value(hidden (n, D)) -> V (n,), h (n,) in nats, for the expander; h = 0 unless use_head; None without a head."""

    def value(hidden):
        V, u_logit = head(hidden)
        return V, value_module.soft_value(u_logit, *bounds, beta) if use_head else torch.zeros_like(V)

    return None if head is None else value


def load_guide(folder, model, beta=None):
    """The guide of a checkpoint folder: its value head with the (r_lo, r_hi, beta) it was trained for, or another beta;
    None if it has none.  The bounds belong to the head: u is measured from exp(r_lo/beta) = 0 to exp(r_hi/beta) = 1."""
    path, state = os.path.join(folder, "value.safetensors"), os.path.join(folder, "trainer_state.json")
    if not os.path.isfile(path) or not os.path.isfile(state):
        return None
    try:
        with open(state) as file:
            state = json.load(file)
        weights = load_file(path)
        head = value_module.ValueHead(model.config.get_text_config().hidden_size, weights["inner.weight"].shape[0])
        head.load_state_dict(weights)
        return guide(head.to(model.device), state["reward_bounds"], beta or state["config"]["beta"])
    except Exception as error:  # truncated, of another model, edited by hand: whatever it is, there is no head to use
        raise ValueError(f"{folder}: its value head cannot be read ({type(error).__name__})") from None


def encode(tokenizer, problems):
    """Prompt and prefill of each problem as token ids."""
    ids = [tokenizer(problem.text)["input_ids"] for problem in problems]
    if [] in ids:
        raise ValueError(f"the tokenizer gives no tokens for the prompt {problems[ids.index([])].text!r}")
    return ids


def judge_one(problem, ids, truncated, tokenizer, reward, max_new_tokens):
    """(text, verdict) of one completion.

    ids: its tokens, the last one the end of sequence unless it was truncated.  text: what the reward reads, prefill
    included, for the prompt may have opened the <think> that the completion closes.  verdict: Reward's dict of parts.
    """
    text = problem.prefill + tokenizer.decode(ids if truncated else ids[:-1], skip_special_tokens=True)
    return text, reward.judge(problem, text, len(ids) / max_new_tokens, truncated)


def judge(rollouts, tokenizer, problems, reward, max_new_tokens):
    """([text], [verdict]) of all rollouts."""
    facts = zip(rollouts.problem.tolist(), rollouts.completions(), rollouts.truncated.tolist())
    pairs = [judge_one(problems[p], ids, cut, tokenizer, reward, max_new_tokens) for p, ids, cut in facts]
    return [text for text, _ in pairs], [verdict for _, verdict in pairs]


def is_right(tokenizer, problems, reward, max_new_tokens):
    """leaf -> is its completion right?  For a search in training that may stop there; it knows the answer."""
    facts = tokenizer, reward, max_new_tokens
    return lambda leaf: judge_one(problems[leaf.problem], leaf.path(), leaf.truncated, *facts)[1]["correct"]


@torch.no_grad()
def evaluate(model, tokenizer, problems, reward, ranks, *, decode="greedy", n=8, max_new_tokens=48, value=None, tau=0.0,
             width=2, max_nodes=1024, batch=512, seed=0):  # fmt: skip
    """Returns (result, rows): figures for JSON, and one row a problem with its completions, verdicts and scores.

    model: in eval mode; n: completions a problem (sample) or leaves (astar).
    result: problems, accuracy, accuracy_interval, format, completion_length, truncated, tokens_per_problem (model
    tokens); with decode="sample" also majority and pass@1, 2, 4, ... up to n; with "astar" majority, by leaf weight,
    and found (any leaf right); each also as NAME_by_difficulty; and seconds_per_problem.  All but the last can be
    recounted from the rows.
    Each rank decodes its share of the problems on whole weights, which the caller gathers (fsdp.gathered); then every
    rank has every row, so the figures are the same for any number of them.
    """
    options = astar_search.Options(policy.stop_tokens(model, tokenizer), n, tau, width, max_new_tokens, max_nodes)
    start, rows, mine = time.perf_counter(), [], list(fsdp.share(len(problems), ranks))
    for indices in (mine[i : i + batch] for i in range(0, len(mine), batch)):
        chosen = [problems[i] for i in indices]
        expander = astar_search.Expander(model, encode(tokenizer, chosen), max_new_tokens, value)
        # Iteration -1: evaluation's own noise, by the problem's global index: it depends on neither batch nor rank.
        keys = astar_search.root_keys(seed, -1, indices)
        if decode == "astar":  # nothing here knows the answer: h is the head's alone, and no leaf is tested on the way
            trees = astar_search.search(keys, expander, options)
        else:
            trees = astar_search.sample(keys, expander, options, decode == "greedy")
        for i, p, tree, spent in zip(indices, chosen, trees, expander.spent):
            completions = []
            for leaf in tree.leaves:
                text, verdict = judge_one(p, leaf.path(), leaf.truncated, tokenizer, reward, max_new_tokens)
                facts = {"text": text, "count": leaf.count, "weight": leaf.weight, "f": leaf.f, "tokens": leaf.depth}
                completions.append(facts | {"truncated": leaf.truncated} | verdict)
            row = {"index": i, "prompt": p.prompt, "prefill": p.prefill, "truth": p.answer, "difficulty": p.difficulty}
            rows.append(row | {"model_tokens": spent, "completions": completions})
    rows = sorted((row for part in fsdp.everyone(rows, ranks) for row in part), key=lambda row: row["index"])
    for row in rows:
        row["scores"] = scores(row, decode)

    draws = n if decode == "sample" else 1
    order = {"easy": 0, "medium": 1, "hard": 2}  # then those of a file, by name
    levels = sorted({row["difficulty"] for row in rows}, key=lambda level: (order.get(level, 3), level))
    parts = {level: summary([row for row in rows if row["difficulty"] == level], draws) for level in levels}
    result = summary(rows, draws)
    result |= {f"{name}_by_difficulty": {level: part[name] for level, part in parts.items()} for name in result}
    return result | {"seconds_per_problem": (time.perf_counter() - start) / len(rows)}, rows


# ================================================================================================ command line
class OneSentence(argparse.ArgumentParser):
    """A parser whose error is one sentence on stderr and exit status 2."""

    def error(self, message):
        """Print the sentence, on one rank, and exit."""
        if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun starts several of us with the same flags
            print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    from experiments import eval_files  # the flags, and what is done with completions besides counting them

    try:
        eval_files.main()
    except KeyboardInterrupt:
        print("eval.py: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except reward_module.RewardError as error:
        sys.exit(f"eval.py: {error}")
