"""One question to a model, how its tree is shown, and mistakes told before PyTorch is loaded."""

import html.parser
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, timeless

import astar_search
import eval as evaluation
import policy
import train

PROMPT = "34*12="


@pytest.fixture(scope="module")
def base():
    """(model, tokenizer) of the tiny base."""
    return policy.load_policy(str(ROOT / "tiny_base"))


def own_log_pi(model, prompt, completion):
    """log pi of a completion by one plain forward, no cache: the sum over its tokens."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(dim=-1)[0]
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return sum(log_probs[t, token].item() for t, token in zip(places, completion))


# ------------------------------------------------------------------------------ One text, completed


def test_the_completions_are_the_most_probable_ones(base):
    """log pi is that of a plain forward; what a longer search finds later is less probable.

    Guards against a prompt that is encoded otherwise than the model's own, and a wrong end token.
    """
    model, tokenizer = base
    tree = astar_search.complete(model, tokenizer, PROMPT, K=4)
    assert len(tree.leaves) == 4
    prompt = tokenizer(PROMPT)["input_ids"]
    for leaf in tree.leaves:
        assert leaf.g == pytest.approx(own_log_pi(model, prompt, leaf.tokens()), abs=1e-4)
        assert leaf.token == tokenizer.eos_token_id
    more = astar_search.complete(model, tokenizer, PROMPT, K=8).leaves
    assert [leaf.tokens() for leaf in more[:4]] == [leaf.tokens() for leaf in tree.leaves]
    assert max(leaf.g for leaf in more[4:]) <= min(leaf.g for leaf in tree.leaves)
    share = torch.tensor([leaf.g for leaf in tree.leaves]).softmax(dim=0).tolist()
    assert [leaf.weight for leaf in tree.leaves] == pytest.approx(share)


def test_a_completion_ends_with_a_stop_text(base):
    """And with each end token that the generation config names, though the tokenizer has one."""
    model, tokenizer = base
    tree = astar_search.complete(model, tokenizer, PROMPT, stop=("</answer>",))
    assert all(tree.text(leaf).endswith("</answer>") for leaf in tree.leaves)
    one = tokenizer("1")["input_ids"][0]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, one]
    try:
        tree = astar_search.complete(model, tokenizer, PROMPT, K=30)
    finally:
        model.generation_config.eos_token_id = before
    assert {leaf.token for leaf in tree.leaves} == {tokenizer.eos_token_id, one}
    assert not any(one in leaf.tokens()[:-1] for leaf in tree.leaves)


# ------------------------------------------------------------------------------ How a tree is shown


class Outline(html.parser.HTMLParser):
    """Reads an outline back: the text of each path from the top to a bold item."""

    def __init__(self):
        super().__init__()
        self.path = []
        self.reading = False
        self.bold = []

    def handle_starttag(self, tag, attrs):
        if tag == "li":
            self.path.append("")
        if tag == "code":
            self.reading = True
        if tag == "b":
            self.bold.append(None)

    def handle_endtag(self, tag):
        if tag == "li":
            self.path.pop()
        if tag == "code":
            self.reading = False

    def handle_data(self, text):
        if self.reading:
            self.path[-1] = text.replace("\u2219", "")
            if self.bold and self.bold[-1] is None:
                self.bold[-1] = "".join(self.path)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_an_outline_holds_every_leaf(base, tau):
    """The texts along the branches are those of the leaves.  Guards against a lost piece."""
    model, tokenizer = base
    tree = astar_search.complete(model, tokenizer, PROMPT, K=5, tau=tau, seed=3)
    outline = Outline()
    outline.feed(tree._repr_html_())
    assert sorted(outline.bold) == sorted(tree.text(leaf) for leaf in tree.leaves)
    assert not outline.path, "a tag is not closed"


def test_a_tree_prints_its_leaves(base):
    model, tokenizer = base
    tree = astar_search.complete(model, tokenizer, PROMPT, K=2)
    head, columns, *lines = repr(tree).splitlines()
    assert head == f"2 leaves, {tree.pops} nodes opened; stopped: leaves"
    assert columns.split() == ["weight", "log", "pi", "h", "f", "text"]
    for line, leaf in zip(lines, tree.leaves, strict=True):
        *numbers, text = line.split(maxsplit=4)
        shown = [float(number) for number in numbers]
        assert shown == pytest.approx([leaf.weight, leaf.g, leaf.h, leaf.f], abs=0.0051)
        assert text == tree.text(leaf)


class Syllables:
    """A tokenizer: 0 and 1, or 0 and 2, are halves of a letter, 3 is a new line, 4 a full stop."""

    def decode(self, ids, **_):
        letters = {(0, 1): "\xe9", (0, 2): "\xe8"}
        text = ""
        i = 0
        while i < len(ids):
            pair = tuple(ids[i : i + 2])
            text += letters.get(pair) or {0: HALF, 3: "\n"}.get(ids[i], ".")
            i += 2 if pair in letters else 1
        return text


HALF = "\N{REPLACEMENT CHARACTER}"  # what decoders make of half a letter


def test_characters_of_two_tokens_and_new_lines_are_shown():
    """Paths part within a letter, and one holds a new line: a line a leaf, no letter lost."""

    def expand(nodes):
        pi = torch.full((len(nodes), 5), 1e-9)
        for row, node in enumerate(nodes):
            likely = {(): (0, 3), (0,): (1, 2)}.get(tuple(node.tokens()), (4,))
            pi[row, list(likely)] = 1 / len(likely)
        return pi.log(), torch.zeros(len(nodes), 1)

    options = astar_search.Options(eos=(4,), K=3, tau=0.0, max_new_tokens=5)
    (tree,) = astar_search.search(astar_search.root_keys(0, 0, [0]), expand, options)
    tree.tokenizer = Syllables()
    lines = repr(tree).splitlines()[2:]
    assert sorted(line.split()[-1] for line in lines) == sorted(["\\n.", "\xe9.", "\xe8."])
    outline = Outline()
    outline.feed(tree._repr_html_())
    assert sorted(outline.bold) == sorted(["\\n.", f"{HALF}\xe9.", f"{HALF}\xe8."])


def test_many_leaves_and_long_ones_are_drawn():
    """A leaf may end at every depth.  It was a RecursionError."""

    def expand(nodes):
        pi = torch.tensor([[0.95, 0.05]] * len(nodes))
        return pi.log(), torch.zeros(len(nodes), 1)

    options = astar_search.Options(eos=(1,), K=1200, tau=0.0, max_new_tokens=1300)
    (tree,) = astar_search.search(astar_search.root_keys(0, 0, [0]), expand, options)
    assert len(tree.leaves) == 1200 and len(repr(tree).splitlines()) == 1202
    outline = Outline()
    outline.feed(tree._repr_html_())
    assert outline.bold


def test_a_tree_of_a_table_prints_tokens():
    """A search that knows no tokenizer shows token ids, and marks what the limit has cut."""

    def expand(nodes):
        pi = torch.tensor([[0.5, 0.3, 0.2]] * len(nodes))
        return pi.log(), torch.zeros(len(nodes), 1)

    options = astar_search.Options(eos=(2,), K=2, tau=0.0, max_new_tokens=2)
    (tree,) = astar_search.search(astar_search.root_keys(0, 0, [0]), expand, options)
    first, second = repr(tree).splitlines()[2:]
    assert first.endswith("  0 0  (cut off)") and second.endswith("  2")
    outline = Outline()
    outline.feed(tree._repr_html_())
    assert outline.bold == ["0 0", "2"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"stop": "</answer>"}, "stop is a list of texts"),
        ({"stop": [""]}, "stop is a list of texts that are not empty"),
        ({"stop": [5]}, "stop is a list of texts"),
        ({"stop": None}, "stop is a list of texts"),
        ({"prompt": [PROMPT]}, "the prompt is one text"),
        ({"K": 0}, "are 1 or more"),
        ({"max_nodes": 0}, "are 1 or more"),
        ({"tau": 2.0}, "tau lies in"),
        ({"prompt": PROMPT * 60}, r"\(360 tokens\) plus max_new_tokens 64 does not fit"),
        ({"prompt": ""}, "no tokens"),
    ],
)
def test_questions_that_make_no_sense_are_refused(base, arguments, sentence):
    """They were answered: each character of a stop text stopped, say."""
    with pytest.raises(ValueError, match=sentence):
        astar_search.complete(*base, **{"prompt": PROMPT, **arguments})


def test_a_window_that_the_prompt_goes_past_is_refused():
    """Guards against a check of the first 256 positions only: log pi was wrong beyond."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=300,
        max_position_embeddings=1024,
    )
    model = transformers.MistralForCausalLM(config).eval()
    tokenizer = policy.load_tokenizer(str(ROOT / "tiny_base"))
    astar_search.complete(model, tokenizer, PROMPT * 40, K=1, max_new_tokens=4)
    with pytest.raises(ValueError, match="beyond 300 tokens"):
        astar_search.complete(model, tokenizer, PROMPT * 80, K=1, max_new_tokens=8)


# ------------------------------------------------------------------------------- eval.py --complete


def completed(capsys, *flags):
    """The lines that `eval.py --complete` prints."""
    evaluation.main(["--complete", PROMPT, "--device", "cpu", *flags])
    return capsys.readouterr().out.splitlines()


def test_one_question_is_answered_greedily(base, capsys):
    model, tokenizer = base
    head, columns, line = completed(capsys)
    drawn, log_pi, text = line.split(maxsplit=2)
    completion = tokenizer(text)["input_ids"]
    prompt = tokenizer(PROMPT)["input_ids"]
    assert float(log_pi) == pytest.approx(own_log_pi(model, prompt, completion), abs=0.0051)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0]
    best = logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
    assert best == completion
    assert drawn == "1" and columns.split() == ["drawn", "log", "pi", "text"]
    # What a model is run on: the prompt, and each token but the last.
    assert head.endswith(f"greedy, {len(prompt) + len(completion) - 1} model tokens")


def test_samples_are_counted(capsys):
    lines = completed(capsys, "--decode", "sample", "--completions", "40", "--seed", "1")
    counts = [int(line.split()[0]) for line in lines[2:]]
    texts = [line.split(maxsplit=2)[2] for line in lines[2:]]
    assert sum(counts) == 40 and counts == sorted(counts, reverse=True)
    assert len(set(texts)) == len(texts)


def test_a_search_prints_its_leaves(base, capsys):
    """The same leaves as complete() finds, in the same order."""
    lines = completed(capsys, "--decode", "astar", "--completions", "3")
    tree = astar_search.complete(*base, PROMPT, K=3, max_new_tokens=48)
    assert lines[2:] == repr(tree).splitlines()[1:]


def test_the_prefill_is_completed(capsys):
    (line,) = completed(capsys, "--prefill", "<think>")[2:]
    assert line.split(maxsplit=2)[2].startswith("34*10=340")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--json", "x.json"], "--complete only prints: leave --json out"),
        (["--n", "3"], "--complete asks one thing: leave --eval-file, --n, --compare and --reward"),
        (["--eval-file", "x"], "--complete asks one thing: leave --eval-file"),
        (["--compare", "x", "y"], "--complete asks one thing: leave --eval-file"),
        (["--reward", "x.py:f"], "--complete asks one thing: leave --eval-file"),
        (["--decode", "astar", "--max-nodes", "2"], "finished no completion: raise --max-nodes"),
    ],
)
def test_mistakes_of_a_question_are_told(flags, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluation.main(["--complete", PROMPT, "--device", "cpu", *flags])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("text", "names"), [("hello", "'e', 'h', 'l', 'o'"), ("", "no tokens")])
def test_a_question_that_the_tokenizer_cannot_read_is_refused(text, names, capsys):
    with pytest.raises(SystemExit):
        evaluation.main(["--complete", text, "--device", "cpu"])
    assert names in capsys.readouterr().err


# ---------------------------------------------------------------- Checks that blame the right thing


def test_a_model_in_training_mode_is_told_to_leave_it(base):
    """Guards against dropout in log pi, and against a check that blames the architecture."""
    model, _ = base
    model.train()
    try:
        for ask in (
            lambda: astar_search.check_model(model),
            lambda: astar_search.Expander(model, [[1]], max_new_tokens=1),
        ):
            with pytest.raises(ValueError, match=r"training mode: call model.eval\(\) first"):
                ask()
    finally:
        model.eval()


TWO = [[0.0, 0.0, 0.0]]  # log pi of three children of one node


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((TWO, [[0.0]]), "not a list: torch.tensor"),
        ((torch.tensor(TWO), [[0.0]]), "not a list: torch.tensor"),
        (torch.tensor(TWO), "not one Tensor"),
        (None, "not one NoneType"),
        ((torch.tensor(TWO), torch.zeros(1)), r"not \(1, 3\) and \(1,\)"),
        ((torch.tensor(TWO), torch.zeros(1, 2)), r"not \(1, 3\) and \(1, 2\)"),
        ((torch.tensor(TWO[0]), torch.zeros(1, 1)), r"not \(3,\) and \(1, 1\)"),
        ((torch.tensor(TWO * 2), torch.zeros(2, 1)), r"n = 1 nodes, not \(2, 3\) and \(2, 1\)"),
    ],
)
@pytest.mark.parametrize("method", [astar_search.search, astar_search.sample])
def test_what_expand_must_return_is_said(method, answer, sentence):
    """It was an AttributeError of a list, or an assertion about a shape."""
    options = astar_search.Options(eos=(0,), K=1)
    with pytest.raises(ValueError, match=sentence):
        method(astar_search.root_keys(0, 0, [0]), lambda nodes: answer, options)


# ------------------------------------------------------------------------- Before PyTorch is loaded


@pytest.mark.parametrize(
    ("command", "status", "sentence"),
    [
        ("train.py --lr 1e-4", 2, "no flag --lr; did you mean --learning-rate?"),
        ("train.py --iterations many", 2, "argument --iterations: invalid int value: 'many'"),
        (
            "train.py --config quik",
            2,
            "quik is neither a preset (local, quick, task, ppo, training)",
        ),
        ("eval.py --modle x", 2, "no flag --modle; did you mean --model?"),
        ("eval.py --decode best", 2, "argument --decode: invalid choice: 'best'"),
        ("train.py --help", 0, "--learning-rate"),
        ("eval.py --help", 0, "--complete"),
    ],
)
def test_flags_are_read_before_pytorch(command, status, sentence, tmp_path):
    """PyTorch takes seconds to load.  Here it cannot be loaded at all."""
    for package in ("torch", "transformers", "safetensors"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('a package was imported')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == status
    assert sentence in result.stdout + result.stderr


# ------------------------------------------------------------------------------- --config FILE.json


def write(path, flags):
    path.write_text(flags if isinstance(flags, str) else json.dumps(flags))
    return str(path)


def test_a_runs_own_config_starts_the_same_run(tmp_path):
    """Flags beside it win.  Its --overwrite is not taken, which would remove the first run."""
    flags = "--problems-per-iteration 4 --eval-problems 6 --device cpu --max-nodes 90 --overwrite"
    first = tmp_path / "first"
    more = ["--iterations", "1", "--output-dir", str(first)]
    train.main([*flags.split(), *more])
    written = first / "config.json"
    config, *_ = train.parse_arguments(["--config", str(written)])
    assert config.overwrite is False and config.max_nodes == 90
    second = tmp_path / "second"
    train.main(["--config", str(written), "--output-dir", str(second)])
    assert timeless(first) == timeless(second)


def test_a_loss_in_a_file_brings_its_leaves_along(tmp_path):
    """As on the command line, but not where the file says otherwise."""
    path = write(tmp_path / "my.json", {"loss": "ppo", "tau": 0.5})
    config, arguments, _ = train.parse_arguments(["--config", path])
    assert (config.loss, config.tau, config.until_right) == ("ppo", 0.5, "off")
    assert "tau" not in arguments.companions and "until_right" in arguments.companions


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"learning_rat": 1}, "there is no flag learning_rat; did you mean learning_rate?"),
        ({"iterations": "3"}, "iterations must be a whole number, not '3'"),
        ({"iterations": 3.5}, "iterations must be a whole number, not 3.5"),
        ({"iterations": True}, "iterations must be a whole number, not True"),
        ({"tau": "1"}, "tau must be a number, not '1'"),
        ({"stop": "x"}, "stop must be a list of texts, not 'x'"),
        ({"stop": [1]}, "stop must be a list of texts, not [1]"),
        ({"model": 1}, "model must be a text, not 1"),
        ({"distributed": 1}, "distributed must be true or false, not 1"),
        ({"tau": 7}, "--tau must be"),
        ({"learning_rate": 10**400}, "--learning-rate must be above 0 and at most 1e+30"),
        ({"iterations": 10**400}, "--iterations must be at least 1 and at most 1e+30"),
        ({"clip": 1e308}, "--clip must be above 0 and at most 1e+30"),
        ([1], "must hold one JSON object of flags"),
        ("{", "this is no JSON"),
        ("[" * 100_000, "this is no JSON"),
    ],
)
def test_a_file_that_is_no_config_is_refused(flags, sentence, tmp_path, capsys):
    path = write(tmp_path / "my.json", flags)
    with pytest.raises(SystemExit) as ended:
        train.parse_arguments(["--config", path])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_missing_config_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--config", str(tmp_path / "none.json")])
    assert "none.json cannot be read: No such file or directory" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ A closed pipe


def shell(command, folder):
    """A command of bash; the exit status is that of the first part of its pipe."""
    script = f"{command}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("both", [False, True])
def test_a_run_whose_reader_has_gone_stops_and_is_kept(tmp_path, both):
    """python train.py | head: no traceback, status 0, and a checkpoint.  It was a failure."""
    python = f"{sys.executable} train.py"
    flags = "--problems-per-iteration 4 --eval-problems 6 --device cpu --iterations 400"
    # The ninth line is that of an iteration, so there is something to keep.
    pipe = f"{'2>&1' if both else ''} | head -n 9"
    result = shell(f"{python} {flags} --output-dir {tmp_path} {pipe}", tmp_path)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr and "failure" not in result.stderr
    assert "greedy accuracy before training" in result.stdout
    (kept,) = tmp_path.glob("checkpoint_iter_*")
    if not both:
        told = "stopped because nothing reads its output any more after iteration"
        assert told in result.stderr and str(kept) in result.stderr
    assert int(re.search(r"\d+$", kept.name)[0]) < 400


@pytest.mark.parametrize("flags", ["--n 4 --device cpu", f"--complete '{PROMPT}' --device cpu"])
def test_an_evaluation_whose_reader_has_gone_is_no_failure(flags):
    result = shell(f"{sys.executable} eval.py {flags} | true", None)
    assert (result.returncode, result.stderr) == (0, "")


def test_files_that_cannot_be_written_are_told_though_the_reader_has_gone(tmp_path):
    """The exit status is still 2.  It was 0."""
    code = (
        "import fsdp, sys, eval\n"
        "def fails(path, text):\n    raise OSError(28, 'No space left on device')\n"
        "fsdp.write_file = fails\n"
        f"eval.main(['--n', '4', '--device', 'cpu', '--json', '{tmp_path}/x.json'])\n"
    )
    (tmp_path / "full_disk.py").write_text(code)
    result = shell(f"PYTHONPATH={ROOT} {sys.executable} {tmp_path}/full_disk.py | true", None)
    assert result.returncode == 2 and "No space left on device" in result.stderr


TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"


def test_two_ranks_whose_reader_has_gone_end_together():
    """It was a traceback of the second rank, which waited for the first."""
    result = shell(f"{TORCHRUN} eval.py --problems 4 --device cpu | true", None)
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_a_question_that_fails_ends_every_rank():
    flags = f"--complete '{PROMPT}' --decode astar --max-nodes 2 --device cpu"
    result = shell(f"{TORCHRUN} eval.py {flags}", None)
    assert result.returncode != 0
    assert result.stderr.count("the search finished no completion") == 1
