"""The picture of a search is the search: in every round, with any token, in both formats.

The searches are on a random table of 7 tokens whose texts are as hard to print as a tokenizer's can
be.
"""

import html.parser
import importlib.util
import json
import math
import pathlib
import re

import pytest
import torch
from safetensors.torch import save_file

import astar_search
import fsdp
import value

ROOT = pathlib.Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("draw_tree", ROOT / "examples" / "draw_tree.py")
draw_tree = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw_tree)

TEXTS = ("<eos>", "</script><b>", '"', "\n", "]", "|`#;", "\u2028\\u{}\x00<!--")  # of the tokens
PROMPT = 'a"]\n```</script>='
DEPTH = 6

# ----------------------------------------------------------------------- Searches of a random table


def expand(nodes):
    """log pi(.|s) of a random language, a function of the path, and another such function as h."""
    V = len(TEXTS)
    keys = torch.tensor([hash(tuple(node.tokens())) for node in nodes])[:, None]
    logits = astar_search.gumbel(astar_search.mix64(keys, torch.arange(2 * V)))
    return logits[:, :V].log_softmax(dim=-1), 0.3 * logits[:, V:]


def search_table(tree_class, expand=expand, **settings):
    """One search of the table; settings: Options other than eos and max_new_tokens."""
    options = astar_search.Options(eos=(0,), max_new_tokens=DEPTH, **settings)
    keys = astar_search.root_keys(3, 0, [0])
    (tree,) = astar_search.search(keys, expand, options, tree_class=tree_class)
    return tree


def record(**settings):
    """The record of a search of the table."""
    tree = search_table(draw_tree.WatchedTree, **settings)
    return draw_tree.record_search(tree, PROMPT, TEXTS.__getitem__)


def paths_of(nodes):
    """The path of each recorded node, as a tuple of tokens."""
    paths = [()]
    for node in nodes[1:]:
        paths.append((*paths[node["parent"]], node["id"]))
    return paths


class Snapshots(astar_search.Tree):
    """A second witness: the queue, the leaves and the pops after each round, as paths."""

    def __init__(self, problem, key, options):
        super().__init__(problem, key, options)
        self.rounds = []

    def pop_evaluated_nodes(self):
        super().pop_evaluated_nodes()
        queue = {tuple(node.tokens()) for _, node in self.queue}
        leaves = [tuple(leaf.tokens()) for leaf in self.leaves]
        self.rounds.append((queue, leaves, self.pops))


# --------------------------------------------------------------------------------------------- HTML


class Page(html.parser.HTMLParser):
    """The elements of a page, and the text of its script elements."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.scripts = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += text


def record_in(page):
    """The record that a page holds."""
    return json.loads(Page(page).scripts[0].strip())


def is_in_queue(node, round_number):
    """Was a recorded node in the queue at the end of this round?"""
    left = min(node.get("popped", math.inf), node.get("pruned", math.inf))
    return node["queued"] <= round_number < left


@pytest.mark.parametrize("tau", (0.0, 0.5, 1.0))
@pytest.mark.parametrize(
    "bounds",
    ({"width": 1}, {"width": 5}, {"width": 3, "max_open": 9}, {"max_nodes": 40}, {"cover": 0.25}),
)
def test_the_page_is_the_search_in_every_round(tau, bounds):
    """Queue, leaves, pops and weights after each round equal those of a search without a watcher.

    Guards against a picture that shows a node a round early, and against an entry that a pruned
    queue has lost.
    """
    facts = record_in(draw_tree.html_page(record(K=12, tau=tau, **bounds)))
    witness = search_table(Snapshots, K=12, tau=tau, **bounds)
    nodes = facts["nodes"]
    paths = paths_of(nodes)
    assert witness.leaves
    assert len(set(paths)) == len(paths)
    assert facts["rounds"] == len(witness.rounds)
    for round_number, (queue, leaves, pops) in enumerate(witness.rounds, start=1):
        shown = {path for path, node in zip(paths, nodes) if is_in_queue(node, round_number)}
        assert shown == queue
        popped = [i for i in facts["popped"] if nodes[i]["popped"] <= round_number]
        assert [paths[i] for i in popped if "accepted" in nodes[i]] == leaves
        numbers = [nodes[i]["order"] for i in popped if "accepted" not in nodes[i]]
        assert numbers == list(range(1, pops + 1))
    assert any("pruned" in node for node in nodes) == witness.pruned == ("max_open" in bounds)

    accepted = [node for node in nodes if "accepted" in node]
    accepted.sort(key=lambda node: node["accepted"])
    for node, leaf in zip(accepted, witness.leaves, strict=True):
        for name in ("log_prob", "g", "G", "h", "f", "weight"):
            assert node[name] == getattr(leaf, name)


@pytest.mark.parametrize("width", (1, 4))
def test_nodes_are_numbered_as_a_search_of_width_1_expands_them(width):
    """At width 1 the model runs exactly the nodes that are expanded, in that order.

    Other widths expand the same nodes.  Guards against the order of evaluation, which includes
    speculation, being shown as the order of expansion.
    """
    opened = []

    def expand_and_note(nodes):
        opened.extend(tuple(node.tokens()) for node in nodes)
        return expand(nodes)

    search_table(astar_search.Tree, expand_and_note, K=8, tau=1.0)
    nodes = record(width=width, K=8, tau=1.0)["nodes"]
    numbers = {}
    for path, node in zip(paths_of(nodes), nodes):
        if "order" in node:
            numbers[node["order"]] = path
    assert [numbers[n] for n in sorted(numbers)] == opened
    # Nodes that were evaluated before their turn are told apart.
    evaluated = [node for node in nodes if "evaluated" in node]
    early = [node for node in evaluated if node["evaluated"] < node.get("popped", math.inf)]
    assert (len(early) > 0) == (width > 1)


def test_no_token_leaves_its_place_in_the_page():
    """Guards against a token that ends the script element, or a line of it."""
    facts = record(K=30, tau=1.0)
    page = draw_tree.html_page(facts)
    empty_page = draw_tree.html_page({})
    tokens = {node["token"] for node in facts["nodes"][1:]}
    assert tokens == {draw_tree.visible(text) for text in TEXTS}
    assert Page(page).tags == Page(empty_page).tags
    assert record_in(page) == json.loads(json.dumps(facts))
    assert all(c.isprintable() or c == "\n" for c in page)
    assert draw_tree.visible("a b\n\u2028\u202e") == "a\u2423b\\n\\u2028\\u202e"


def test_the_page_needs_no_network():
    page = draw_tree.html_page({})
    page = page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert "http" not in page


# ------------------------------------------------------------------------------------------ Mermaid


def read_mermaid(text):
    """(the text above the chart, the labels of its nodes), after a check of the syntax.

    There is one fence.  Every line is a node of a known kind, its parent comes before it, and its
    label holds harmless characters only.
    """
    assert len(text) < 50_000
    head, chart, tail = text.split("```")
    assert chart.startswith("mermaid\nflowchart LR\n")
    assert tail == "\n"
    seen = []
    labels = []
    for line in chart.splitlines()[2:]:
        style = re.fullmatch(r"  classDef (\w+) [\w:#, -]+", line)
        if style is not None:
            assert style[1] in draw_tree.STYLES
            continue
        node = re.fullmatch(
            r'  (?:n(\d+) --> )?n(\d+)(?:\["|\("|\(\[")(.*?)(?:"\]|"\)|"\]\)):::(\w+)', line
        )
        assert node is not None, line
        parent, number, label, kind = node.groups()
        if seen:
            assert parent in seen, line
        else:
            assert parent is None, line
        assert kind in draw_tree.STYLES, line
        assert re.fullmatch(r"(?:[\w\u2713\u2717().\- ]|#\d+;|<br/>)+", label), line
        seen.append(number)
        labels.append(label)
    assert len(seen) == len(set(seen)) <= 500
    return head, labels


def decode(label):
    """The first line of a label with its character codes decoded."""
    return re.sub(r"#(\d+);", lambda code: chr(int(code[1])), label.split("<br/>")[0])


def test_mermaid_holds_any_token():
    """Guards against quotes, brackets, pipes, #, backticks and newlines in Mermaid's syntax."""
    facts = record(K=5, tau=1.0)
    head, labels = read_mermaid(draw_tree.mermaid(facts))
    assert len(labels) == len(facts["nodes"])
    assert f"all {len(labels)}" in head
    titles = [decode(label) for label in labels]
    assert titles[0] == "(1) " + draw_tree.visible(PROMPT)
    assert any(title.endswith(" </script><b>") for title in titles)


def test_mermaid_is_cut_and_says_so(monkeypatch):
    """Guards against a chart that Mermaid refuses, and against leaves that a cut loses first."""
    facts = record(K=120, tau=1.0)
    prefixes = len(facts["nodes"])
    head, labels = read_mermaid(draw_tree.mermaid(facts))
    assert len(labels) == draw_tree.MERMAID_NODES < prefixes
    assert f"{len(labels)} of the {prefixes}" in head
    assert sum("leaf" in label for label in labels) == 120

    monkeypatch.setattr(draw_tree, "MERMAID_TEXT", 5000)  # the other limit
    text = draw_tree.mermaid(facts)
    assert 5000 < len(text) < 6500
    head, labels = read_mermaid(text)
    assert f"{len(labels)} of the {prefixes}" in head


# ------------------------------------------------------------------------------------- With a model


def test_two_thousand_nodes_by_a_model(tmp_path, capsys):
    """Guards against a search that is too large for the page, and a reward of another leaf."""
    out = tmp_path / "out.html"
    flags = ["--K", "9999", "--max-nodes", "2000", "--width", "32", "--tau", "0"]
    draw_tree.main(["--out", str(out), *flags])
    assert list(tmp_path.iterdir()) == [out]
    assert capsys.readouterr().err.count("no value head") == 1

    facts = record_in(out.read_text())
    nodes = facts["nodes"]
    assert sum("order" in node for node in nodes) == 2000
    assert "max-nodes" in facts["why"]
    texts = [""]
    for node in nodes[1:]:
        texts.append(texts[node["parent"]] + node["token"])
    leaves = [(text, node) for text, node in zip(texts, nodes) if "accepted" in node]
    assert len(leaves) > 50
    assert any(node["correct"] for _, node in leaves)
    for text, node in leaves:
        assert node["correct"] == text.endswith("<answer>408</answer><eos>")
    # At tau = 0 a leaf is weighted by its share of the leaves' pi.
    mass = sum(math.exp(node["g"]) for _, node in leaves)
    for _, node in leaves:
        assert node["weight"] == pytest.approx(math.exp(node["g"]) / mass)


@pytest.fixture
def model_with_head(tmp_path):
    """The folder of the tiny base with a new value head beside it, trained at beta = 0.2."""
    for path in (ROOT / "tiny_base").glob("*.*"):
        (tmp_path / path.name).symlink_to(path)
    save_file(value.ValueHead(128).state_dict(), tmp_path / "value.safetensors")
    state = {"config": {"beta": 0.2}, "reward_bounds": [-1.0, 1.1]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    return str(tmp_path)


def test_the_head_beside_the_model_guides_it(model_with_head):
    """A new head has u = 1/2, so h = log((e^(1.1/beta) + e^(-1/beta))/2).

    Guards against --beta or the head being ignored.
    """
    cases = (([], 0.2), (["--beta", "2"], 2.0), (["--guide", "none"], None))
    for flags, beta in cases:
        h = 0.0
        if beta is not None:
            h = math.log((math.exp(1.1 / beta) + math.exp(-1 / beta)) / 2)
        arguments = draw_tree.make_parser().parse_args(
            ["--out", "x.html", "--model", model_with_head, "--K", "1", *flags]
        )
        facts = draw_tree.draw(arguments)
        assert facts["nodes"][1]["h"] == pytest.approx(h, abs=1e-5)


# ------------------------------------------------------------------------------------- Command line


@pytest.mark.parametrize(
    ("prompt", "given", "answer", "prefill"),
    (
        ("34*12=", None, 408, ""),
        (" 34 * 12 = <think>", None, 408, "<think>"),
        ("34*12=", 7, 7, ""),
        ("What is 34*12=", None, None, ""),
    ),
)
def test_the_right_answer_is_read_from_the_prompt(prompt, given, answer, prefill):
    problem = draw_tree.problem_of_prompt(prompt, given)
    assert problem.answer == answer
    assert problem.prefill == prefill
    assert problem.text == prompt


@pytest.mark.parametrize(
    ("flags", "says"),
    (
        (["--out", "{}/out.txt"], "must end in .html or .md"),
        (["--out", "{}/missing/out.html"], "cannot be written"),
        (["--out", "{}/folder.html"], "cannot be written"),
        (["--out", "{}/out.html", "--tau", "1.5"], "--tau must lie in [0, 1], not 1.5"),
        (["--out", "{}/out.html", "--tau", "nan"], "--tau must lie in [0, 1], not nan"),
        (["--out", "{}/out.html", "--prompt", ""], "--prompt must be"),
        (["--out", "{}/out.html", "--K", "0"], "--K must be 1 or more"),
        (["--out", "{}/out.html", "--max-new-tokens", "100000"], "does not fit"),
        (["--out", "{}/out.html", "--beta", "0"], "--beta must be above 0"),
        (["--out", "{}/out.html", "--cover", "0"], "--cover must lie in (0, 1]"),
        (["--out", "{}/out.html", "--model", "{}/nothing"], "no such folder"),
        (["--prompt", "1*1="], "--out"),
    ),
)
def test_a_mistake_is_one_sentence(flags, says, tmp_path, capsys):
    """Exit status 2, one line on stderr, nothing written."""
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(SystemExit) as stop:
        draw_tree.main([flag.format(tmp_path) for flag in flags])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Guards against a page that is half written when the disk is full."""
    path = tmp_path / "out.md"
    path.write_text("old")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fsdp.os, "replace", fail)
    with pytest.raises(ValueError, match="No space left"):
        draw_tree.write_picture(path, record(K=2, tau=1.0))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_an_unknown_token_in_the_prompt_is_fine(tmp_path):
    """Without an answer there is no verdict: leaves are neither right nor wrong."""
    path = tmp_path / "out.md"
    flags = ["--prompt", "what is 34*12=", "--K", "1", "--max-nodes", "3"]
    draw_tree.main(["--out", str(path), *flags])
    head, _ = read_mermaid(path.read_text())
    assert "max-nodes" in head
