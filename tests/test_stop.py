"""Stop texts: a completion ends with the token that completes one of them.

The reference is always a search or a scan by hand that decodes the whole completion at each token.
"""

import functools
import heapq
import json
import math
import random

import pytest
import torch
from conftest import ROOT
from test_text import build, ids_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import astar_search
import data
import eval as evaluation
import fsdp
import policy
import reward
import train

# ------------------------------------------------------------------------------------- Tokenizers

STOPS = ("</answer>", "\n\n", "。", "ok", " no")
# Pieces that hold the stop texts whole, in parts, and with more behind them.
PIECES = ("</answer>", "</", "</ans", "answer", "wer", ">", ">x", "o", "k", "ok", "okay", "x", "12")


def unigram(pieces):
    """T5: a piece has a score instead of merges."""
    vocabulary = [("<unk>", 0.0), ("▁", -2.0), *((piece, -3.0) for piece in dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@functools.cache
def with_pieces(kind):
    """A tokenizer, and the ids from which completions are drawn."""
    spaced = [*PIECES, "▁", "▁n", "▁no", "n", "nothing", "\n", "\n\n"]
    in_bytes = [*PIECES, "Ġ", "Ġn", "Ġno", "n", "nothing", "Ċ", "ĊĊ", "xĊ", "ã", "Ģ", "Ĥ", "ãĢ"]
    if kind == "unigram":
        tokenizer = unigram([*spaced, *"0123456789*=", "。"])
        spaced.append("。")
    else:
        tokenizer = build(kind, tags="ordinary")
        # Ordinary pieces, as if the vocabulary had been learnt with them.
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = description["model"]["vocab"]
        description["added_tokens"] = []
        for piece in in_bytes if kind == "byte-level" else spaced:
            vocabulary.setdefault(piece, max(vocabulary.values()) + 1)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token="</s>"
        )
    names = in_bytes if kind == "byte-level" else spaced
    if kind == "Llama":
        names = [*names, "<0xE3>", "<0x80>", "<0x82>", "<0xFF>"]
    return tokenizer, ids_of(tokenizer, names)


KINDS = ("byte-level", "Llama", "Metaspace always", "Metaspace never", "unigram")


def text_stops(tokenizer, prompt, ids, stops):
    """Does the text of a completion, decoded as a whole, hold a stop text?"""
    text = evaluation.completion_text(tokenizer, prompt, ids)
    return any(stop in text for stop in stops)


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_is_found_token_by_token(kind):
    """Guards the end of the text that a node keeps: too short, or of the wrong tokens."""
    tokenizer, pieces = with_pieces(kind)
    rng = random.Random(kind)
    unknown = len(tokenizer) + 7
    ends = 0
    straddled = 0
    for trial in range(300):
        prompt = tokenizer("3*4= n")["input_ids"] if trial % 2 else rng.choices(pieces, k=3)
        stops = rng.sample(STOPS, 2)
        ids = rng.choices([*pieces, unknown], k=25)
        stop = astar_search.StopTexts(tokenizer, stops, [prompt])
        node = astar_search.Node(0, None, -1, 0, 0.0)
        for n, token in enumerate(ids, start=1):
            node = astar_search.Node(0, node, token, n, 0.0)
            expected = text_stops(tokenizer, prompt, ids[:n], stops)
            assert stop(node) == expected, (stops, prompt, ids[:n])
            if expected:
                ends += 1
                text = evaluation.completion_text(tokenizer, prompt, ids[:n])
                straddled += not text.endswith(tuple(stops))
                break
    assert ends > 100 and straddled > 5


def test_what_the_prompt_ends_with_does_not_count():
    """Guards a completion that would end at once because its prompt ends like a stop text."""
    tokenizer, _ = with_pieces("byte-level")
    prompt = ids_of(tokenizer, ["x", "Ċ"])
    stop = astar_search.StopTexts(tokenizer, ["\n\n"], [prompt])
    root = astar_search.Node(0, None, -1, 0, 0.0)
    (line,) = ids_of(tokenizer, ["Ċ"])
    first = astar_search.Node(0, root, line, 1, 0.0)
    assert not stop(first)
    assert stop(astar_search.Node(0, first, line, 2, 0.0))


# --------------------------------------------------------------------------------------- The search


def next_log_probs(pieces, V, last):
    """log pi of the next token (V,), a function of the last token alone; only `pieces` occur."""
    generator = torch.Generator().manual_seed(last)
    logits = torch.full((V,), -math.inf, dtype=torch.float64)
    logits[torch.tensor(pieces)] = 1.5 * torch.randn(
        len(pieces), generator=generator, dtype=torch.float64
    )
    return logits.log_softmax(0)


def search_over_texts(tokenizer, pieces, prompt, stops, key, tau, K, depth):
    """Best-first search over whole texts, h = 0: [(ids, g, weight, truncated)] of its K leaves."""
    V = len(tokenizer)
    eos = tokenizer.eos_token_id
    queue = [(-math.inf, (), 0.0, astar_search.gumbel(torch.tensor(key)).item(), key)]
    leaves = []
    while queue and len(leaves) < K:
        _, ids, g, G, key = heapq.heappop(queue)
        ended = bool(ids) and (ids[-1] == eos or text_stops(tokenizer, prompt, list(ids), stops))
        if ended or len(ids) == depth:
            leaves.append((list(ids), g, not ended))
            continue
        child_g = g + next_log_probs(pieces, V, ids[-1] if ids else 0)
        keys = astar_search.mix64(torch.tensor(key), torch.arange(V))
        child_G = astar_search.perturb(child_g[None], keys[None], torch.tensor([[G]]))[0]
        f = child_G if tau else child_g
        for token in pieces:
            child = ((*ids, token), child_g[token].item(), child_G[token].item())
            heapq.heappush(queue, (-f[token].item(), *child, keys[token].item()))
    kappa = -queue[0][0] if queue else -math.inf
    total = sum(math.exp(g) for _, g, _ in leaves)
    rows = []
    for ids, g, truncated in leaves:
        # pi/q, q = 1 - exp(-exp(log pi - kappa)); at tau = 0 the share of the leaves' pi
        q = -math.expm1(-math.exp(g - kappa)) if tau else total
        rows.append((ids, g, math.exp(g) / q, truncated))
    return rows


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_search_is_one_over_texts(kind, tau):
    """Guards leaves that are open, that end late, or that weigh and train other than EOS leaves."""
    tokenizer, pieces = with_pieces(kind)
    pieces = [*pieces, tokenizer.eos_token_id]
    V = len(tokenizer)
    prompts = [tokenizer("3*4=")["input_ids"], tokenizer("12*3= n")["input_ids"]]
    stops = ("</answer>", "ok", " no", "。")
    options = astar_search.Options(
        eos=(tokenizer.eos_token_id,),
        stop=astar_search.StopTexts(tokenizer, stops, prompts),
        K=12,
        tau=tau,
        width=3,
        max_new_tokens=5,
    )
    keys = astar_search.root_keys(0, 0, range(2))
    opened = []

    def expand(nodes):
        opened.extend(nodes)
        rows = [next_log_probs(pieces, V, max(0, node.token)) for node in nodes]
        return torch.stack(rows), torch.zeros(len(nodes), 1, dtype=torch.float64)

    trees = astar_search.search(keys, expand, options)
    by_stop = 0
    for tree, prompt, key in zip(trees, prompts, keys):
        rows = search_over_texts(tokenizer, pieces, prompt, stops, key, tau, K=12, depth=5)
        assert [leaf.tokens() for leaf in tree.leaves] == [ids for ids, *_ in rows]
        for leaf, (ids, g, weight, truncated) in zip(tree.leaves, rows):
            assert leaf.g == pytest.approx(g) and leaf.weight == pytest.approx(weight)
            assert leaf.truncated == truncated
            by_stop += not truncated and ids[-1] != tokenizer.eos_token_id
    assert by_stop > 2
    # No prefix that holds a stop text was ever opened.
    for node in opened:
        assert not text_stops(tokenizer, prompts[node.problem], node.tokens(), stops)
    for tree in astar_search.sample(keys, expand, options):
        for leaf in tree.leaves:
            ids = leaf.tokens()
            ended = [text_stops(tokenizer, prompts[leaf.problem], ids[:n], stops) for n in (-1, 6)]
            assert not ended[0] and (ended[1] or leaf.truncated or ids[-1] in options.eos)


# ------------------------------------------------------------------- What the reward and a run read


def test_the_reward_reads_up_to_the_end_of_the_stop_text():
    """Guards a text that goes on with what the last token holds behind the stop text."""
    tokenizer, _ = with_pieces("byte-level")
    special = build("byte-level", tags="special")
    cases = (
        (tokenizer, ["o", "k", "</", "answer", ">x"], ("</answer>",), "ok</answer>"),
        (tokenizer, ["x", "okay"], ("ok", "okay"), "xok"),  # the one that is complete first
        (tokenizer, ["x", "</s>"], ("ok",), "x"),  # an end token is not read
        # Nor if it is a stop text too: every well-formed answer was malformed with --stop '<eos>'.
        (tokenizer, ["x", "</s>"], ("</s>",), "x"),
        (special, ["4", "</answer>"], ("</answer>",), "4</answer>"),
    )
    for tokenizer, pieces, stop, expected in cases:
        text, _ = evaluation.judge_completion(
            problem=data.Problem("3*4=", 12),
            prompt_ids=tokenizer("3*4=")["input_ids"],
            ids=ids_of(tokenizer, pieces),
            truncated=False,
            tokenizer=tokenizer,
            reward=reward.Reward(),
            max_new_tokens=8,
            stop=stop,
        )
        assert text == expected


@pytest.mark.parametrize("kind", ["byte-level", "Llama"])
def test_tinyzero_ends_at_its_answer(kind):
    """Qwen-like and Llama-like: nothing behind </answer> is generated or trained."""
    tokenizer = build(kind, tags="ordinary", roles=("eos",))
    problem = data.make_problem(12, 34, style="tinyzero")
    prompts = evaluation.encode_prompts(tokenizer, [problem])
    written = "1*2=2</think>\n<answer> 408 </answer>\nUser: What is 3"
    script = astar_search.tokens_of(tokenizer, written)
    ended = len(astar_search.tokens_of(tokenizer, written[: written.index("\nUser")]))

    def expand(nodes):
        log_probs = torch.full((len(nodes), len(tokenizer)), -20.0)
        for row, node in zip(log_probs, nodes):
            row[script[node.depth]] = 0.0
        return log_probs.log_softmax(-1), torch.zeros(len(nodes), 1)

    stop = data.STOP_TEXTS["tinyzero"]
    options = astar_search.Options(
        eos=(tokenizer.eos_token_id,),
        stop=astar_search.StopTexts(tokenizer, stop, prompts),
        K=1,
        tau=0.0,
        max_new_tokens=len(script),
    )
    for kind_of_rollout in (astar_search.search, astar_search.sample):
        (tree,) = kind_of_rollout(astar_search.root_keys(0, 0, [0]), expand, options)
        (leaf,) = tree.leaves
        assert leaf.depth <= ended + 1 and not leaf.truncated
        text, verdict = evaluation.judge_completion(
            problem, prompts[0], leaf.tokens(), False, tokenizer, reward.Reward(), 64, stop
        )
        # A Llama tokenizer writes a space before a text that stands alone.
        assert text.replace("<think> ", "<think>") == "<think>1*2=2</think>\n<answer> 408 </answer>"
        assert verdict["correct"] and verdict["formatted"]


def test_a_run_with_a_stop_text(tmp_path, capsys):
    """Guards the ways of --stop through training, resume and evaluation: each must be told."""
    flags = """
        --problems-per-iteration 4 --minibatches 2 --eval-problems 4 --rollouts-per-problem 4
        --max-new-tokens 40 --samples 4 --device cpu --stop = --stop </answer>
    """.split()
    folder = str(tmp_path / "run")
    train.main([*flags, "--iterations", "1", "--output-dir", folder])
    train.main([*flags, "--iterations", "2", "--output-dir", folder, "--resume", "auto"])
    lines = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 8
    for row in rows:
        assert row["completion"].endswith(("=", "</answer>")) or row["reward"] == -1.0
        assert "=" not in row["completion"][:-1]
    assert json.loads((tmp_path / "run/config.json").read_text())["stop"] == ["=", "</answer>"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main([*flags[:-2], "--iterations", "3", "--output-dir", folder, "--resume", "auto"])
    assert "--stop ['='] differs from the ['=', '</answer>']" in capsys.readouterr().err
    out = str(tmp_path / "out.json")
    for decode in ("greedy", "astar"):
        evaluation.main(
            f"--n 6 --completions 2 --decode {decode} --stop = --json {out} --overwrite".split()
        )
        for line in (tmp_path / "out.jsonl").read_text().splitlines():
            for completion in json.loads(line)["completions"]:
                assert "=" not in completion["text"][:-1]


def test_stop_texts_that_are_given(capsys):
    """Guards the default of a prompt style, its removal, and texts that cannot be meant."""
    assert train.Config().stop == []
    assert train.parse_arguments(["--prompt", "tinyzero"])[0].stop == ["</answer>"]
    assert train.parse_arguments(["--config", "training"])[0].stop == ["</answer>"]
    assert train.parse_arguments(["--config", "training", "--stop", ""])[0].stop == []
    assert train.parse_arguments(["--stop", "\\n", "--stop", "\\n"])[0].stop == ["\n"]
    with pytest.raises(SystemExit) as stopped:
        train.parse_arguments(["--stop", "", "--stop", "a"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error == (
        "train.py: --stop: an empty text would end every completion at its first token\n"
    )
    for flags, expected in (
        ([], []),
        (["--prompt", "tinyzero"], ["</answer>"]),
        (["--prompt", "tinyzero", "--stop", ""], []),
        (["--eval-file", "x.jsonl"], []),
        (["--eval-file", "x.jsonl", "--stop", "a"], ["a"]),
    ):
        arguments = evaluation.make_parser().parse_args(flags)
        evaluation.check_arguments(arguments)
        assert arguments.stop == expected


def test_without_stop_texts_nothing_changes():
    """Guards the tiny base: its completions end by EOS alone, and cost no decoding."""
    model, tokenizer = policy.load_policy(str(ROOT / "tiny_base"))
    problems = data.eval_problems(6)
    ranks = fsdp.init_ranks(device="cpu")
    results = []
    for stop in ((), ("never written",)):
        _, rows = evaluation.evaluate(
            model, tokenizer, problems, reward.Reward(), ranks, decode="astar", n=2, stop=stop
        )
        results.append([row["completions"] for row in rows])
    assert results[0] == results[1]
