"""eval.py -- how good is a policy on held-out problems, and is it better than another one?

Three ways to decode, all on the expander of astar_search.py:

    greedy    the most probable token, step by step
    sample    independent completions: mean accuracy, pass@k and the majority vote
    astar     best-first search guided by the value head; the answer is the first leaf found

The search of an evaluation never sees the reward, because the reward knows the right answer.

Two departures from common practice.  The interval of the accuracy counts outcomes by an effective
sample size, because completions of one problem resemble each other.  Two evaluations are compared
problem by problem, because a paired test detects smaller differences than two separate intervals.

    python eval.py --json base.json                  # the tiny base, greedy; also writes base.jsonl
    python eval.py --model runs/local/checkpoint_iter_360 --decode astar --json out.json
    python eval.py --compare base.jsonl out.jsonl    # a paired test on the same problems
    python eval.py --complete "34*12=" --decode astar    # ask one thing; no accuracy
    python eval.py --model Qwen/Qwen2.5-3B --prompt tinyzero --decode sample --max-new-tokens 512
    torchrun --standalone --nproc_per_node=2 eval.py --problems 500    # two processes, same figures

--json OUT.json writes the figures and the flags to OUT.json, and one row a problem with all of its
completions to OUT.jsonl.  Every figure but the seconds can be counted again from the rows.

In this file, in reading order: the flags, statistics, figures of the rows, the value function,
prompts and completions, evaluate(), result files, the paired comparison, worst completions, the
command line.
"""

import contextlib
import functools
import itertools
import json
import math
import operator
import os
import sys
import tempfile
import time

import data

# The default model lies beside this file, so that the command works in any folder.
TINY_BASE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tiny_base")


# -------------------------------------------------------------------------------------------- Flags


def make_parser():
    """The parser of eval.py."""
    about = "Accuracy of a model on held-out multiplication problems."
    parser = data.OneLineParser(prog="eval.py", description=about, allow_abbrev=False)

    def add(name, help, **options):
        """Add a flag whose help ends with its default."""
        parser.add_argument(name, help=f"{help} (default %(default)s)", **options)

    parser.add_argument(
        "--model",
        default=TINY_BASE,
        help="folder or hub id of a causal language model (default tiny_base beside eval.py)",
    )
    decoders = ("greedy", "sample", "astar")
    add("--decode", "how completions are made", choices=decoders, default="greedy")
    # torchrun takes --n for one of its own flags, such as --nnodes; hence the second name.
    parser.add_argument(
        "--n",
        "--problems",
        type=int,
        metavar="N",
        help="number of held-out problems (default 500; with --eval-file all of it)",
    )
    completions = "sample: completions a problem; astar: leaves a problem"
    add("--completions", completions, type=int, default=8)
    add("--digits", "digits per operand: 2, 3, 2x3, 2-3, ...", default="2")
    add("--prompt", "prompt style", choices=tuple(data.PROMPTS), default="terse")
    complete = "only complete this text, and print it (default: evaluate problems)"
    parser.add_argument("--complete", metavar="TEXT", help=complete)
    parser.add_argument(
        "--prefill",
        help="text that completions begin with, such as '<think>' (default: the style's own)",
    )
    parser.add_argument(
        "--eval-file",
        help="a jsonl file of problems with prompt and answer (default: made problems)",
    )
    parser.add_argument(
        "--reward",
        default="",
        metavar="FILE.py:FUNCTION",
        help="a reward of your own (default: the built-in one)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="a completion ends with this text too (\\n: new line); may be repeated; '' is none "
        "(default: the prompt style's own, </answer> for tinyzero)",
    )
    add("--max-new-tokens", "most tokens of a completion", type=int, default=48)
    add("--tau", "astar: temperature of the search's noise", type=float, default=0.0)
    add("--width", "astar: nodes of a problem run at once", type=int, default=2)
    add("--max-nodes", "astar: most nodes a problem", type=int, default=1024)
    add("--seed", "seed of the draws", type=int, default=0)
    add("--batch", "problems decoded in lock-step: a GPU's memory bounds it", type=int, default=512)
    add("--device", "cpu, cuda, ...; auto is a GPU if there is one", default="auto")
    add("--threads", "CPU threads; 0: one for a small model, else one a core", type=int, default=0)
    types = ("auto", "float32", "bfloat16")
    add("--dtype", "auto: bfloat16 on a GPU, float32 on a CPU", choices=types, default="auto")
    add("--show", "worst completions to print, of each kind", type=int, default=2)
    parser.add_argument(
        "--json",
        metavar="OUT.json",
        help="write the figures there, and every completion to OUT.jsonl (default: no files)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace these two files if they exist (default: refuse to)",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A.jsonl", "B.jsonl"),
        help="only a paired test of B against A, without a model (default: none)",
    )
    return parser


if __name__ == "__main__":
    # PyTorch takes seconds to be imported.  So --help and a mistyped flag are answered before.
    make_parser().parse_args()

import torch
from safetensors.torch import load_file

import astar_search
import fsdp
import policy
import reward as reward_module
import value as value_module

# --------------------------------------------------------------------------------------- Statistics


def pass_at_k(n, correct, k):
    """Chance that k of n drawn completions, `correct` of them right, hold a right one.

    Unbiased for k new draws, and less noisy than to look at the first k alone
    (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    # pass@k = 1 - C(n - c, k) / C(n, k): the second term is the chance to draw only wrong ones
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def interval(shares, draws=1, z=1.959964):
    """95 % interval [low, high] for the mean of `shares`.

    shares: for each problem, the share of right completions among its `draws`.

    Completions of one problem resemble each other.  To count each completion would make the
    interval too narrow; to count each problem as one 0/1 outcome would make it too wide.  So this
    is Wilson's interval (1927) for an effective sample size (Kish 1965): the number of 0/1 outcomes
    that would be equally noisy, from problems to problems * draws.  Unlike a bootstrap's, it is not
    [0, 0] when no completion is right.
    """
    n = len(shares)
    p = sum(shares) / n
    # n_eff = p (1 - p) / Var(mean), where Var(mean) = spread / n
    spread = sum((share - p) ** 2 for share in shares) / n
    n_eff = n * max(1.0, min(draws, p * (1 - p) / max(spread, 1e-12)))
    # |p - P| = z sqrt(P (1 - P) / n_eff), solved for P
    centre = p + z * z / (2 * n_eff)
    half_width = z * math.sqrt(p * (1 - p) / n_eff + (z / (2 * n_eff)) ** 2)
    scale = 1 + z * z / n_eff
    return [max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)]


def majority_vote(votes):
    """1 if the answer with most votes is right, 0 if it is wrong, a share in a tie.

    votes: (answer, weight, is it right?) of each completion; answer None is no vote.
    In a tie the result is the chance that a fair draw among the leaders picks a right one.  To take
    the first of them would favour short completions, which end first and so are listed first.
    """
    weight_of = {}
    is_right = {}
    for answer, weight, correct in votes:
        if answer is not None:
            weight_of[answer] = weight_of.get(answer, 0.0) + weight
            is_right[answer] = correct
    if not weight_of:
        return 0.0
    # Weights are sums of floats, so equal ones may differ by rounding.
    most = max(weight_of.values())
    leaders = [answer for answer, weight in weight_of.items() if weight >= most * (1 - 1e-9)]
    return sum(is_right[answer] for answer in leaders) / len(leaders)


def sign_test(better, worse):
    """Two-sided p of `better` against `worse` among the problems that differ.

    If the two models are equal, each such problem is a fair coin.  For 0/1 outcomes this is
    McNemar's exact test.  For shares of several draws it tests the direction of the differences,
    not their size.
    """
    n = better + worse
    # p = 2 sum_{i <= min(better, worse)} C(n, i) / 2^n
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


# ------------------------------------------------------------------------------------------ Figures


def judged_completions(row, decode):
    """The completions of a problem that are scored: all draws, or the first leaf of a search.

    To pick the best leaf instead would take the reward, which knows the answer.
    """
    if decode == "astar":
        return row["completions"][:1]
    return row["completions"]


def problem_scores(row, decode):
    """The figures of one problem, as a dict.  A search that found no leaf counts as wrong.

    accuracy, format, completion_length (tokens), truncated: means over the judged completions.
    majority (sample, astar): is the vote right?  found (astar): is any leaf right?
    pass@k (sample): the chance that k draws hold a right one, k = 1, 2, 4, ... up to all draws.
    """
    judged = judged_completions(row, decode)
    # A completion that was drawn twice is listed once, with a count of 2.
    draws = max(1, sum(c["count"] for c in judged))
    scores = {
        "accuracy": sum(c["count"] * c["correct"] for c in judged) / draws,
        "format": sum(c["count"] * c["formatted"] for c in judged) / draws,
        "completion_length": sum(c["count"] * c["tokens"] for c in judged) / draws,
        "truncated": sum(c["count"] * c["truncated"] for c in judged) / draws,
    }
    if decode != "greedy":
        # All leaves of a search vote, each by its weight pi/q.
        votes = [(c["answer"], c["weight"], c["correct"]) for c in row["completions"]]
        scores["majority"] = majority_vote(votes)
    if decode == "astar":
        scores["found"] = float(any(c["correct"] for c in row["completions"]))
    if decode == "sample":
        correct = sum(c["count"] for c in judged if c["correct"])
        k = 1
        while k <= draws:
            scores[f"pass@{k}"] = pass_at_k(draws, correct, k)
            k *= 2
    return scores


def summarise(rows, draws):
    """Every figure as the mean over problems of equal weight, and the interval of the accuracy.

    rows: with their scores; draws: independent completions a problem, for the interval.
    """
    accuracies = [row["scores"]["accuracy"] for row in rows]
    figures = {
        "problems": len(rows),
        "accuracy": sum(accuracies) / len(rows),
        "accuracy_interval": interval(accuracies, draws),
    }
    # Every row has scores of the same names.  The accuracy, one of them, stays at the top.
    for name in rows[0]["scores"]:
        figures[name] = sum(row["scores"][name] for row in rows) / len(rows)
    figures["tokens_per_problem"] = sum(row["model_tokens"] for row in rows) / len(rows)
    return figures


def summarise_by_difficulty(rows, draws):
    """The figures of all problems, then each as NAME_by_difficulty: {level: figure}."""
    rows_of_level = {}
    for row in rows:
        rows_of_level.setdefault(row["difficulty"], []).append(row)
    # The levels of made problems from easy to hard, then those of a file by name.
    levels = [level for level in ("easy", "medium", "hard") if level in rows_of_level]
    levels += sorted(set(rows_of_level) - set(levels))
    figures_of_level = {level: summarise(rows_of_level[level], draws) for level in levels}

    figures = summarise(rows, draws)
    for name in list(figures):
        by_level = {level: figures_of_level[level][name] for level in levels}
        figures[f"{name}_by_difficulty"] = by_level
    return figures


def format_figure(figure):
    """A figure as text: a float with three decimals, a list (an interval) as 'low to high'."""
    if isinstance(figure, list):
        return " to ".join(format_figure(end) for end in figure)
    if isinstance(figure, float):
        return f"{figure:.3f}"
    return str(figure)


def format_report(result):
    """The figures as a table in text: one line a figure.

    result: of evaluate or of paired_test.  The columns are all problems, then each level of
    difficulty if there are several.
    """
    levels = list(result.get("accuracy_by_difficulty", ()))
    several = len(levels) > 1
    table = [["", "all", *levels]] if several else []
    for name, figure in result.items():
        if name.endswith("_by_difficulty"):
            continue
        table.append([name, format_figure(figure)])
        if several:
            by_level = result.get(f"{name}_by_difficulty", {})
            table[-1] += [format_figure(part) for part in by_level.values()]
    lines = []
    for name, *cells in table:
        lines.append(f"{name:20s}" + "".join(f"{cell:>17s}" for cell in cells))
    return "\n".join(lines)


# ------------------------------------------------------------------------------- The value function


def value_function(head, bounds, beta, use_head=True):
    """What astar_search.Expander asks of a value head: hidden (n, D) -> V (n,), h (n,) in nats.

    bounds: (r_lo, r_hi) of the reward that the head was trained on.  use_head=False sets h to 0, so
    that the search is not guided; V is still there.  Returns None if head is None.
    """
    if head is None:
        return None
    r_lo, r_hi = bounds

    def values_and_guide(hidden):
        V, u_logit = head(hidden)
        if use_head:
            h = value_module.soft_value(u_logit, r_lo, r_hi, beta)
        else:
            h = torch.zeros_like(V)
        return V, h

    return values_and_guide


def load_value_function(folder, model, beta=None):
    """The value function of a checkpoint folder, or None if the folder holds no value head.

    beta: a temperature to use instead of that of the training.  The reward's bounds are those of
    the training, because u was scaled by them.  Raises ValueError if the head cannot be read.
    """
    weights_path = os.path.join(folder, "value.safetensors")
    state_path = os.path.join(folder, "trainer_state.json")
    if not os.path.isfile(weights_path) or not os.path.isfile(state_path):
        return None
    try:
        with open(state_path) as file:
            state = json.load(file)
        weights = load_file(weights_path)
        hidden_size = model.config.get_text_config().hidden_size
        head = value_module.ValueHead(hidden_size, width=weights["inner.weight"].shape[0])
        head.load_state_dict(weights)
        head = head.to(model.device)
        return value_function(head, state["reward_bounds"], beta or state["config"]["beta"])
    except Exception as error:
        # The files may be truncated, of another model, or edited by hand.
        name = type(error).__name__
        raise ValueError(f"{folder}: its value head cannot be read ({name})") from None


# -------------------------------------------------------------------------- Prompts and completions


# The tags that reward.py reads.  They are text, even where a tokenizer calls them special tokens.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def encode_prompts(tokenizer, problems):
    """Prompt and prefill of each problem as token ids.  Raises ValueError if one has none."""
    return [astar_search.encode_prompt(tokenizer, problem.text) for problem in problems]


@functools.lru_cache(maxsize=1024)
def is_control_token(tokenizer, token):
    """Is a token a sign for the machine, such as <eos> or <|im_end|>, and not text for the reward?

    It is if the tokenizer calls it special or gives it a role (eos, bos, pad, ...), or if it has no
    text.  The tags that the reward reads are never control tokens.
    """
    if not astar_search.has_text(tokenizer, token):
        return True
    if astar_search.text_of(tokenizer, [token]).strip() in TAGS:
        return False
    if token in tokenizer.all_special_ids:
        return True
    return not astar_search.has_text(tokenizer, token, skip_special_tokens=True)


def completion_text(tokenizer, prompt_ids, ids):
    """The text that the tokens `ids` add to a prompt, special tokens included.

    decode(prompt_ids + ids) = decode(prompt_ids) + completion_text(prompt_ids, ids),
    but for two cases: half a character at either end is U+FFFD, and an id without text becomes a
    mark such as <token 28>.  Without the mark, 4 and 08 on both sides of it would be read as 408.
    So would a 4 in the prompt and the tokens ' 08', if `ids` were decoded alone: many tokenizers
    drop the first space of what they decode.
    """
    text = ""
    before = list(prompt_ids)
    for known, group in itertools.groupby(
        ids, key=functools.partial(astar_search.has_text, tokenizer)
    ):
        group = list(group)
        if known:
            text += astar_search.text_after(tokenizer, before, group)
            before += group
        else:
            text += "".join(astar_search.mark(token) for token in group)
    return text


def check_known(tokenizer, problems):
    """Raise ValueError if a prompt holds what the tokenizer does not know.

    Such prompts would look alike.  It does not know what becomes its token for the unknown.  If it
    has none, it leaves characters out: more than half of them is refused, because fewer may only be
    spelled otherwise, such as capitals.
    """
    # Not every tokenizer names its token for the unknown.  So it is asked for a character that it
    # hardly knows.  There is no such token if it spells the character in bytes, or leaves it out.
    hieroglyph = "\U00013000"
    ids = astar_search.tokens_of(tokenizer, hieroglyph)
    unknown = None
    if ids and hieroglyph not in astar_search.text_of(tokenizer, ids):
        unknown = ids[-1]

    texts = []
    lost = set()
    for problem in problems:
        ids = astar_search.tokens_of(tokenizer, problem.text)
        known = astar_search.text_of(tokenizer, [token for token in ids if token != unknown])
        text = "".join(problem.text.split())  # without white space, which some tokenizers drop
        known = "".join(known.split())
        if unknown in ids or 2 * len(known) < len(text):
            texts.append(problem.text)
            lost |= set(text) - set(known)
    if not texts:
        return
    # Where words are tokens no character need be lost, as each is known as part of another word.
    names = ", ".join(repr(character) for character in sorted(lost or set(texts[0]))[:8])
    raise ValueError(
        f"{len(texts)} of {len(problems)} prompts hold what the model's tokenizer does not know, "
        f"such as {reward_module.shorten(texts[0])}: {names}"
    )


def judge_completion(
    problem, prompt_ids, ids, truncated, tokenizer, reward, max_new_tokens, stop=()
):
    """(text, verdict) of one completion: what the reward reads, and the dict that it returns.

    prompt_ids: the tokens of the prompt with its prefill; ids: those of the completion.
    stop: the texts that end a completion.  What its last token holds behind one is not read.
    The text begins with the prefill, which may have opened the <think> that the completion closes.
    """
    written = ids
    # The last token of a completion that was not truncated may be the end token.  It is read only
    # if it is text, such as </answer>.
    if not truncated and is_control_token(tokenizer, ids[-1]):
        written = ids[:-1]
    text = completion_text(tokenizer, prompt_ids, written)
    ends = [text.index(one) + len(one) for one in stop if one in text]
    if ends:
        text = text[: min(ends)]  # up to the stop text that is complete first
    text = problem.prefill + text
    return text, reward.judge(problem, text, len(ids) / max_new_tokens, truncated)


def judge_rollouts(rollouts, tokenizer, problems, reward, max_new_tokens, stop=()):
    """([text], [verdict]) of all B rollouts, each as in judge_completion.

    problems: the N problems that rollouts.problem counts through.
    """
    texts = []
    verdicts = []
    columns = (rollouts.problem, rollouts.tokens, rollouts.prompt_length, rollouts.truncated)
    rows = zip(*[column.tolist() for column in columns], rollouts.completions())
    for index, tokens, prompt_length, truncated, ids in rows:
        text, verdict = judge_completion(
            problem=problems[index],
            prompt_ids=tokens[:prompt_length],
            ids=ids,
            truncated=truncated,
            tokenizer=tokenizer,
            reward=reward,
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        texts.append(text)
        verdicts.append(verdict)
    return texts, verdicts


def right_leaf_test(tokenizer, problems, prompts, reward, max_new_tokens, stop=()):
    """A function leaf -> is its completion right?  For Options.until of a search in training.

    prompts: the token ids of the problems, as the expander has them.  The function knows the
    answer, so an evaluation must not use it.
    """

    def is_right(leaf):
        _, verdict = judge_completion(
            problem=problems[leaf.problem],
            prompt_ids=prompts[leaf.problem],
            ids=leaf.tokens(),
            truncated=leaf.truncated,
            tokenizer=tokenizer,
            reward=reward,
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        return verdict["correct"]

    return is_right


# --------------------------------------------------------------------------------------- Evaluation


def problem_row(index, problem, prompt_ids, tree, model_tokens, judge):
    """What the jsonl file holds of one problem, all but its scores.

    judge: judge_completion with its last four arguments filled in.

    Its completions come in the order in which they were found.  Of each: text; count, the draws
    that gave it; weight, count/n of a sample or pi/q of a search; f, the search key, or log pi of a
    sample; tokens, with the end token; truncated; and the verdict of the reward.
    """
    completions = []
    for leaf in tree.leaves:
        text, verdict = judge(problem, prompt_ids, leaf.tokens(), leaf.truncated)
        completion = {
            "text": text,
            "count": leaf.count,
            "weight": leaf.weight,
            "f": leaf.f,
            "tokens": leaf.depth,
            "truncated": leaf.truncated,
        }
        completions.append({**completion, **verdict})
    return {
        "index": index,
        "prompt": problem.prompt,
        "prefill": problem.prefill,
        "truth": problem.answer,
        "difficulty": problem.difficulty,
        "model_tokens": model_tokens,
        "completions": completions,
    }


def decode_prompts(
    model,
    tokenizer,
    prompts,
    keys,
    *,
    decode,
    n,
    max_new_tokens,
    stop=(),
    value_function=None,
    tau=0.0,
    width=2,
    max_nodes=1024,
):
    """Completions of each prompt: (Trees of astar_search, model tokens of each prompt).

    prompts: lists of token ids; keys: astar_search.root_keys.  The rest as in evaluate.
    """
    options = astar_search.Options(
        eos=policy.stop_tokens(model, tokenizer),
        stop=astar_search.StopTexts(tokenizer, stop, prompts),
        K=n,
        tau=tau,
        width=width,
        max_new_tokens=max_new_tokens,
        max_nodes=max_nodes,
    )
    expander = astar_search.Expander(model, prompts, max_new_tokens, value_function)
    if decode == "astar":
        # h is the head's and options.until is not set, so nothing here knows the answer.
        trees = astar_search.search(keys, expander, options)
    else:
        trees = astar_search.sample(keys, expander, options, greedy=decode == "greedy")
    return trees, expander.spent


@torch.no_grad()
def evaluate(
    model,
    tokenizer,
    problems,
    reward,
    ranks,
    *,
    decode="greedy",
    n=8,
    max_new_tokens=48,
    stop=(),
    value_function=None,
    tau=0.0,
    width=2,
    max_nodes=1024,
    batch=512,
    seed=0,
):
    """Decode and score all problems.  Returns (result, rows), on every rank those of all ranks.

    model: in eval mode, its full weights gathered by the caller (fsdp.full_weights).
    n: completions a problem (sample) or leaves a problem (astar).
    stop: texts that end a completion, besides the model's end tokens.
    batch: problems decoded in lock-step.

    rows: one a problem, see problem_row and problem_scores.
    result: problems, the mean of each score, accuracy_interval, tokens_per_problem (model tokens),
    and each of these as NAME_by_difficulty.  They can be recounted from the rows.  The one more,
    seconds_per_problem, cannot.
    """
    start = time.perf_counter()
    judge = functools.partial(
        judge_completion,
        tokenizer=tokenizer,
        reward=reward,
        max_new_tokens=max_new_tokens,
        stop=stop,
    )
    rows = []
    own = list(fsdp.rank_slice(len(problems), ranks))  # this rank's share, by number
    for first in range(0, len(own), batch):
        indices = own[first : first + batch]
        prompts = encode_prompts(tokenizer, [problems[index] for index in indices])
        # The noise depends on a problem's number, not on its chunk or rank.  No iteration of
        # training is -1.
        keys = astar_search.root_keys(seed, -1, indices)
        trees, spent = decode_prompts(
            model,
            tokenizer,
            prompts,
            keys,
            decode=decode,
            n=n,
            max_new_tokens=max_new_tokens,
            stop=stop,
            value_function=value_function,
            tau=tau,
            width=width,
            max_nodes=max_nodes,
        )
        for i, index in enumerate(indices):
            row = problem_row(
                index=index,
                problem=problems[index],
                prompt_ids=prompts[i],
                tree=trees[i],
                model_tokens=spent[i],
                judge=judge,
            )
            row["scores"] = problem_scores(row, decode)
            rows.append(row)
    # All rows on every rank, in the order of the problems.
    rows = [row for rows_of_rank in fsdp.all_gather(rows, ranks) for row in rows_of_rank]
    rows.sort(key=operator.itemgetter("index"))

    # Greedy decoding and the first leaf of a search give one outcome a problem.
    result = summarise_by_difficulty(rows, draws=n if decode == "sample" else 1)
    result["seconds_per_problem"] = (time.perf_counter() - start) / len(rows)
    return result, rows


# ------------------------------------------------------------------------------------- Result files


def check_output(path, overwrite):
    """Raise ValueError unless the two files of --json can be written.

    path: of --json; None: there are to be no files.  overwrite: the two may exist already.
    """
    if path is None:
        return
    refuse = f"--json {path}:"
    if not path.endswith(".json"):
        beside = "the completions go into the .jsonl beside it"
        raise ValueError(f"{refuse} the name must end in .json; {beside}")
    for name in (path, path + "l"):
        if os.path.isdir(name) or (os.path.exists(name) and not overwrite):
            raise ValueError(f"{refuse} {name} exists; choose another name or add --overwrite")
    try:
        tempfile.TemporaryFile(dir=os.path.dirname(path) or ".").close()
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"{refuse} its folder cannot be written to ({reason})") from None


def save_results(path, result, rows):
    """Write the figures to `path`, OUT.json, and the rows to OUT.jsonl; nothing if path is None.

    Returns the exit status of the command: 0, or 2 if a file could not be written.
    """
    if path is None:
        return 0
    try:
        fsdp.write_file(path + "l", "".join(json.dumps(row) + "\n" for row in rows))
        fsdp.write_file(path, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        print(f"eval.py: --json {path} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


def read_rows(path):
    """The rows of a jsonl file that --json wrote.

    Only what a comparison reads is checked: prompt, truth, and an accuracy in [0, 1].  Raises
    ValueError that names the line, and OSError if the file cannot be read.
    """
    rows = []
    # Read as bytes: a line that is not UTF-8 then raises in json.loads, where its number is known.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                valid = "prompt" in row and "truth" in row and 0 <= row["scores"]["accuracy"] <= 1
            except (ValueError, TypeError, KeyError, RecursionError):
                valid = False
            if not valid:
                what = "not a problem as eval.py --json writes it to .jsonl"
                raise ValueError(f"{path}, line {number}: {what}")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no problems in it")
    return rows


# --------------------------------------------------------------------------------------- Comparison


def paired_test(rows_A, rows_B, repeats=10_000):
    """Paired test of two lists of rows about the same problems.

    Returns a dict: among others the mean difference B - A in accuracy, its 95 % interval by a
    bootstrap over problems (`repeats` resamples), and p by the sign test.
    Raises ValueError if the problems differ.
    """
    if len(rows_A) != len(rows_B):
        sizes = f"A has {len(rows_A)} problems and B {len(rows_B)}"
        raise ValueError(f"{sizes}: evaluate both with the same --n")
    for number, (a, b) in enumerate(zip(rows_A, rows_B), start=1):
        # As JSON: of a reward of one's own a truth may be NaN, which is not equal to itself.
        about = [json.dumps([row["prompt"], row["truth"]]) for row in (a, b)]
        if about[0] != about[1]:
            problems = f"{about[0]} in A and {about[1]} in B (prompt, truth)"
            raise ValueError(f"line {number} is about {problems}: the problems differ")
    accuracy_A = torch.tensor([row["scores"]["accuracy"] for row in rows_A], dtype=torch.float64)
    accuracy_B = torch.tensor([row["scores"]["accuracy"] for row in rows_B], dtype=torch.float64)
    gain = accuracy_B - accuracy_A  # (problems,)
    # Bootstrap: the mean gain of as many problems, drawn with replacement, `repeats` times.  A
    # drawn problem brings the accuracies of both models: that is the pairing.
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(repeats):
        drawn = torch.randint(len(gain), gain.shape, generator=generator)
        means.append(gain[drawn].mean())
    ends = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    B_better = int((gain > 0).sum())
    A_better = int((gain < 0).sum())
    return {
        "problems": len(gain),
        "accuracy_A": accuracy_A.mean().item(),
        "accuracy_B": accuracy_B.mean().item(),
        "difference": gain.mean().item(),
        "difference_interval": ends.tolist(),
        "B_better": B_better,
        "A_better": A_better,
        "p_value": sign_test(B_better, A_better),
    }


def compare_files(path_A, path_B):
    """The paired test of two jsonl files, as text.  Raises what read_rows and paired_test raise."""
    result = paired_test(read_rows(path_A), read_rows(path_B))
    # Two significant digits, because three decimals would show a small p as 0.
    result["p_value"] = f"{result['p_value']:.2g}"
    return format_report(result)


# -------------------------------------------------------------------------------- Worst completions


def worst_completions(rows, decode, each):
    """{kind of fault: (how many there are, up to `each` of them as (row, completion))}.

    A kind that does not occur is left out.  The examples are in the order of the problems;
    well-formed wrong numbers are in the order of their distance from the truth.
    """
    no_leaf = []
    truncated = []
    malformed = []
    wrong = []
    for row in rows:
        judged = judged_completions(row, decode)
        if not judged:
            no_leaf.append((row, {"text": "", "answer": None}))
        for completion in judged:
            if completion["truncated"]:
                truncated.append((row, completion))
            elif not completion["formatted"]:
                malformed.append((row, completion))
            elif not completion["correct"]:
                wrong.append((row, completion))
    # With a reward of the user's own, an answer need not be a number.  Then there is no distance.
    if all(isinstance(c["answer"], int) and isinstance(row["truth"], int) for row, c in wrong):
        wrong.sort(key=lambda pair: abs(pair[1]["answer"] - pair[0]["truth"]))
    faults = {
        "no leaf within the bounds": no_leaf,
        "truncated": truncated,
        "malformed": malformed,
        "wrong, nearest first": wrong,
    }
    return {kind: (len(pairs), pairs[:each]) for kind, pairs in faults.items() if pairs}


def print_worst(rows, decode, each):
    """Print up to `each` completions of every kind of fault; nothing if `each` is 0."""
    if each == 0:
        return
    for kind, (count, pairs) in worst_completions(rows, decode, each).items():
        print(f"\n{kind} ({count})")
        for row, c in pairs:
            print(f"  {row['prompt']}{c['text']}   read {c['answer']}, right is {row['truth']}")


# ------------------------------------------------------------------------------------- Command line


def drop_output():
    """From here on nothing is printed, because whoever read it has gone: python eval.py | head."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if os.path.sameopenfile(1, 2):  # 2>&1: the messages went the same way
        os.dup2(nowhere, 2)
    os.dup2(nowhere, 1)
    os.close(nowhere)


@contextlib.contextmanager
def reader_may_leave():
    """Inside, what is printed after its reader has gone (| head) is lost, and that is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()


def make_output_printable():
    """Print characters that the terminal's encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not every replacement of a stream has it
            stream.reconfigure(errors="backslashreplace")


def stop_texts(given):
    """The texts of all --stop as a list without doubles; a single empty one stands for none.

    A backslash and an n stand for a new line, which is hard to write in a shell.
    Raises ValueError if an empty one is among others.
    """
    texts = list(dict.fromkeys(text.replace("\\n", "\n") for text in given))
    if texts == [""]:
        return []
    if "" in texts:
        raise ValueError("--stop: an empty text would end every completion at its first token")
    return texts


def check_arguments(arguments):
    """Raise ValueError, one sentence, for a value that its flag cannot take.

    Fills in the stop texts of the prompt style, unless some were given.
    """
    for name in ("compare", "complete"):
        if getattr(arguments, name) is not None and arguments.json:
            raise ValueError(f"--{name} only prints: leave --json out")
    if arguments.complete is not None:
        others = (arguments.eval_file, arguments.n, arguments.compare, arguments.reward)
        if any(others):
            flags = "--eval-file, --n, --compare and --reward"
            raise ValueError(f"--complete asks one thing: leave {flags} out")
    for name in ("n", "completions", "max_new_tokens", "width", "max_nodes", "batch"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {number}")
    if arguments.compare and (arguments.n or arguments.overwrite):
        raise ValueError(
            "--compare takes all problems of both files: leave --n and --overwrite out"
        )
    if not (0 <= arguments.seed <= 2**31 and arguments.show >= 0 and arguments.threads >= 0):
        raise ValueError("--seed must lie in [0, 2^31], --show and --threads must be 0 or more")
    if not 0 <= arguments.tau <= 1:
        raise ValueError(f"--tau must lie in [0, 1], not {arguments.tau}")
    if arguments.stop is None:
        arguments.stop = data.STOP_TEXTS[arguments.prompt] if not arguments.eval_file else ()
    arguments.stop = stop_texts(arguments.stop)


def load_problems(arguments):
    """The problems that the flags ask for.  Raises ValueError if there are fewer than --n."""
    if arguments.complete is not None:
        return [data.Problem(arguments.complete, answer=None, prefill=arguments.prefill or "")]
    n = arguments.n
    path = arguments.eval_file
    if not path:
        return data.eval_problems(
            n or 500, digits=arguments.digits, style=arguments.prompt, prefill=arguments.prefill
        )
    # The built-in reward needs whole numbers; a reward of the user's own may read any answer.
    problems = data.read_problems(path, arguments.prefill, any_answer=bool(arguments.reward))
    if n and len(problems) < n:
        raise ValueError(f"{path} holds only {len(problems)} problems, fewer than --n {n}")
    return problems[:n]


def load_model(arguments, problems, ranks):
    """(model, tokenizer, value function or None) that the flags ask for.

    Raises ValueError if the model cannot be loaded, if it cannot serve the search, or if a prompt
    and its completion do not fit into its context.
    """
    arguments.model = fsdp.newest_checkpoint(arguments.model)
    model, tokenizer = policy.load_policy(arguments.model, device=ranks.device)
    policy.use_threads(model, arguments.threads)
    check_known(tokenizer, problems)
    prompts = encode_prompts(tokenizer, problems)
    longest_prompt = max(len(ids) for ids in prompts)
    policy.check_context(model, longest_prompt, arguments.max_new_tokens)
    astar_search.check_model(model, longest=longest_prompt + arguments.max_new_tokens)
    on_gpu = ranks.device.type == "cuda"
    if arguments.dtype == "bfloat16" or (arguments.dtype == "auto" and on_gpu):
        # After the check, which rounding would blunt.  Buffers, such as the frequencies of rotary
        # positions, stay in float32, as they do in training.
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    guide = load_value_function(arguments.model, model)
    if arguments.decode == "astar" and guide is None and ranks.is_main:
        warning = "no value head beside this model, so the search is guided by log pi alone"
        print(f"eval.py: {warning}", file=sys.stderr)
    return model, tokenizer, guide


def print_results(result, rows, arguments):
    """Print the table and the worst completions; assert that the accuracy is a plain count."""
    print(f"{arguments.model}, {arguments.decode}")
    print(format_report(result))
    print_worst(rows, arguments.decode, arguments.show)
    # accuracy = right draws / all draws, as every problem has equally many draws
    correct = 0
    drawn = 0
    for row in rows:
        judged = judged_completions(row, arguments.decode)
        correct += sum(c["count"] * c["correct"] for c in judged)
        drawn += max(1, sum(c["count"] for c in judged))
    assert abs(result["accuracy"] - correct / drawn) < 1e-9


def decoding_of(arguments, guide):
    """The keyword arguments of decode_prompts, which evaluate has too, from the flags."""
    return {
        "decode": arguments.decode,
        "n": arguments.completions,
        "max_new_tokens": arguments.max_new_tokens,
        "stop": arguments.stop,
        "value_function": guide,
        "tau": arguments.tau,
        "width": arguments.width,
        "max_nodes": arguments.max_nodes,
    }


def complete_text(model, tokenizer, problem, guide, arguments):
    """--complete: what the model writes behind a text, with log pi, as a text of several lines.

    Of a search also weight, h and f.  Raises ValueError if nothing was finished within the bounds.
    """
    (prompt,) = encode_prompts(tokenizer, [problem])
    (tree,), spent = decode_prompts(
        model,
        tokenizer,
        [prompt],
        astar_search.root_keys(arguments.seed, -1, [0]),
        **decoding_of(arguments, guide),
    )
    tree.tokenizer, tree.prompt = tokenizer, prompt
    if not tree.leaves:
        raise ValueError("the search finished no completion: raise --max-nodes")
    head = f"{arguments.model}, {arguments.decode}, {sum(spent)} model tokens"
    if arguments.decode == "astar":
        return f"{head}\n{tree}"
    lines = [head, "  drawn   log pi  text"]
    for leaf in sorted(tree.leaves, key=operator.attrgetter("count"), reverse=True):
        lines.append(f"{leaf.count:7d} {leaf.g:8.2f}  {astar_search.leaf_line(tree, leaf)}")
    return "\n".join(lines)


def run(argv):
    """Read the flags, then evaluate, complete one text or compare.

    A flag or file that cannot be used ends the process with one sentence and exit status 2.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        check_arguments(arguments)
        if arguments.compare:
            text = compare_files(*arguments.compare)
            with reader_may_leave():
                print(text)
            return
        reward = reward_module.load_reward(arguments.reward)
        problems = load_problems(arguments)
        ranks = fsdp.init_ranks(distributed="WORLD_SIZE" in os.environ, device=arguments.device)
        # Before the decoding: hours of it must not end at a file that cannot be written.
        check_files = functools.partial(check_output, arguments.json, arguments.overwrite)
        fsdp.on_main(check_files, ranks)
        model, tokenizer, guide = load_model(arguments, problems, ranks)
        if arguments.complete is not None:
            ask = functools.partial(complete_text, model, tokenizer, problems[0], guide, arguments)
            text = fsdp.on_main(ask, ranks)
            with reader_may_leave():
                if ranks.is_main:
                    print(text)
            return fsdp.shutdown(ranks)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            parser.error(f"{error.filename} cannot be read ({error.strerror})")
        parser.error(str(error))

    result, rows = evaluate(
        model,
        tokenizer,
        problems,
        reward,
        ranks,
        batch=arguments.batch,
        seed=arguments.seed,
        **decoding_of(arguments, guide),
    )
    status = 0
    if ranks.is_main:
        # Saved first: whatever goes wrong with the printing, hours of decoding are not lost.
        saved = {**result, "flags": vars(arguments)}
        status = save_results(arguments.json, saved, rows)
        with reader_may_leave():
            print_results(result, rows, arguments)
    fsdp.shutdown(ranks, status)


def main(argv=None):
    """The command.  Ctrl-C and a failing reward end it with one sentence and no traceback."""
    make_output_printable()
    try:
        run(argv)
    except KeyboardInterrupt as interrupt:
        what = f": {interrupt}" if str(interrupt) else ""  # what a reward was doing
        print(f"eval.py: stopped by Ctrl-C{what}", file=sys.stderr)
        sys.exit(130)
    except (reward_module.RewardError, FloatingPointError) as error:
        sys.exit(f"eval.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("eval.py: the device is out of memory: lower --batch or --max-nodes")
    except BrokenPipeError:  # python eval.py | head
        drop_output()


if __name__ == "__main__":
    main()
