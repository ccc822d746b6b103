"""The picture of a search is the search: in every round, with any token, in both formats.

The searches are on a random table of 7 tokens whose names are as nasty as a tokenizer's can be."""

import html.parser
import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

import astar_search
import value
from experiments import tree as picture

NASTY = ("<eos>", "</script><b>", '"', "\n", "]", "|`#;", "\u2028\\u{}\x00<!--")
PROMPT = 'a"]\n```</script>='
DEPTH = 6


def expand(nodes):
    """log pi(.|s) of a random language, a function of the path; h another one."""
    keys = torch.tensor([hash(tuple(node.path())) for node in nodes])[:, None]
    logits = astar_search.gumbel(astar_search.mix64(keys, torch.arange(2 * len(NASTY))))
    return logits[:, : len(NASTY)].log_softmax(-1), 0.3 * logits[:, len(NASTY) :]


def find(kind, **options):
    options = astar_search.Options(eos=(0,), max_new_tokens=DEPTH, **options)
    return astar_search.search(astar_search.root_keys(3, 0, [0]), expand, options, kind)[0]


class Snapshots(astar_search.Tree):
    """An independent witness: the state of the search after each round, as sets of paths."""

    def advance(self):
        super().advance()
        now = (frozenset(tuple(node.path()) for _, node in self.queue), [tuple(leaf.path()) for leaf in self.leaves], self.pops)
        self.rounds = [*getattr(self, "rounds", ()), now]


class Page(html.parser.HTMLParser):
    """The elements of a page, and the text of its script elements."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += text


def blob(text):
    return json.loads(Page(text).scripts[0].strip())


def record(kind=picture.WatchedTree, **options):
    return picture.record(find(kind, **options), PROMPT, NASTY.__getitem__)


def paths_of(nodes):
    paths = [()]
    for node in nodes[1:]:
        paths.append((*paths[node["parent"]], node["id"]))
    return paths


@pytest.mark.parametrize("tau", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("bounds", ({"width": 1}, {"width": 5}, {"width": 3, "max_open": 9}, {"max_nodes": 40}, {"cover": 0.25}))
def test_the_page_is_the_search_in_every_round(tau, bounds):
    """Queue, leaves in order, pops and weights after each round equal those of a search that nobody watches.  Guards
    against a picture that shows a node a round early, or an entry that a pruned queue has lost."""
    options = {"K": 12, "tau": tau} | bounds
    facts = blob(picture.page(record(**options)))
    witness, nodes = find(Snapshots, **options), facts["nodes"]
    paths = paths_of(nodes)
    assert witness.leaves and len(set(paths)) == len(paths) and facts["rounds"] == len(witness.rounds)
    for r, (queue, leaves, pops) in enumerate(witness.rounds, start=1):
        gone = lambda node: min(node.get("popped", math.inf), node.get("dropped", math.inf)) <= r
        assert {path for path, node in zip(paths, nodes) if node["queued"] <= r and not gone(node)} == queue
        popped = [i for i in facts["popped"] if nodes[i]["popped"] <= r]
        assert [paths[i] for i in popped if "accepted" in nodes[i]] == leaves
        assert [nodes[i]["order"] for i in popped if "accepted" not in nodes[i]] == list(range(1, pops + 1))
    assert any("dropped" in node for node in nodes) == witness.pruned == ("max_open" in bounds)
    accepted = sorted((node for node in nodes if "accepted" in node), key=lambda node: node["accepted"])
    for node, leaf in zip(accepted, witness.leaves, strict=True):
        assert [node[name] for name in ("g", "G", "h", "f", "weight")] == [getattr(leaf, n) for n in ("g", "G", "h", "f", "weight")]


@pytest.mark.parametrize("width", (1, 4))
def test_nodes_are_numbered_as_a_search_of_width_1_expands_them(width):
    """At width 1 the model runs exactly the nodes that are expanded, in that order; other widths expand the same.
    Guards against the order of evaluation, speculation included, being shown as the order of expansion."""
    opened = []

    def watched(nodes):
        opened.extend(tuple(node.path()) for node in nodes)
        return expand(nodes)

    options = {"K": 8, "tau": 1.0}
    astar_search.search(astar_search.root_keys(3, 0, [0]), watched, astar_search.Options((0,), max_new_tokens=DEPTH, **options))
    facts = record(width=width, **options)
    paths, nodes = paths_of(facts["nodes"]), facts["nodes"]
    numbers = {node["order"]: path for path, node in zip(paths, nodes) if "order" in node}
    assert [numbers[n] for n in sorted(numbers)] == opened
    assert (sum("run" in node for node in nodes) > len(opened)) == (width > 1)  # speculation is told apart


def test_no_token_leaves_its_place_in_the_page():
    """Guards against a token that ends the script element, or a line of it."""
    facts = record(K=30, tau=1.0)
    text, template = picture.page(facts), picture.page({})
    assert {node["token"] for node in facts["nodes"][1:]} == {picture.visible(token) for token in NASTY}
    assert Page(text).tags == Page(template).tags and blob(text) == json.loads(json.dumps(facts))
    assert all(c.isprintable() or c == "\n" for c in text) and "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert picture.visible("a b\n\u2028\u202e") == "a\u2423b\\n\\u2028\\u202e"


def check_mermaid(text):
    """One fence; every line a node of a known kind, its parent defined before; a label of harmless characters only."""
    head, chart, tail = text.split("```")
    assert chart.startswith("mermaid\nflowchart LR\n") and tail == "\n" and len(text) < 50_000
    lines, seen, labels = chart.splitlines()[2:], [], []
    for line in lines:
        if style := re.fullmatch(r"  classDef (\w+) [\w:#, -]+", line):
            assert style[1] in picture.CLASSES
            continue
        parts = re.fullmatch(r'  (?:n(\d+) --> )?n(\d+)(?:\["|\("|\(\[")(.*?)(?:"\]|"\)|"\]\)):::(\w+)', line)
        assert parts and (parts[1] in seen if seen else parts[1] is None) and parts[4] in picture.CLASSES, line
        assert re.fullmatch(r"(?:[\w\u2713\u2717().\- ]|#\d+;|<br/>)+", parts[3]), line
        seen.append(parts[2])
        labels.append(parts[3])
    assert len(seen) == len(set(seen)) <= 500
    return head, labels


def test_mermaid_holds_any_token():
    """Guards against quotes, brackets, pipes, #, backticks and newlines of tokens in Mermaid's own syntax."""
    head, labels = check_mermaid(picture.mermaid(record(K=5, tau=1.0)))
    facts = record(K=5, tau=1.0)
    assert len(labels) == len(facts["nodes"]) and f"all {len(labels)}" in head
    decoded = [re.sub(r"#(\d+);", lambda code: chr(int(code[1])), line.split("<br/>")[0]) for line in labels]
    assert decoded[0] == "(1) " + picture.visible(PROMPT) and any(line.endswith(" </script><b>") for line in decoded)


def test_mermaid_is_cut_and_says_so(monkeypatch):
    """Guards against a chart that Mermaid refuses, and against leaves that a cut would lose first."""
    facts = record(K=120, tau=1.0)
    head, labels = check_mermaid(picture.mermaid(facts))
    assert len(labels) == picture.MERMAID_NODES < len(facts["nodes"]) and f"{len(labels)} of the {len(facts['nodes'])}" in head
    assert sum("leaf" in line for line in labels) == 120
    monkeypatch.setattr(picture, "MERMAID_TEXT", 5000)  # the other limit
    text = picture.mermaid(facts)
    assert 5000 < len(text) < 6500 and f"{len(check_mermaid(text)[1])} of the" in text


def test_two_thousand_nodes_by_a_model(tmp_path, capsys):
    """Guards against a search that is too large for the page, and against a reward read from another leaf's text."""
    out = tmp_path / "out.html"
    astar_search.main(["--tree", str(out), "--K", "9999", "--max-nodes", "2000", "--width", "32", "--tau", "0"])
    facts = blob(out.read_text())
    nodes = facts["nodes"]
    assert sum("order" in node for node in nodes) == 2000 and "max-nodes" in facts["why"]
    texts = [""]
    for node in nodes[1:]:
        texts.append(texts[node["parent"]] + node["token"])
    leaves = [(text, node) for text, node in zip(texts, nodes) if "accepted" in node]
    assert any(node["correct"] for _, node in leaves) and len(leaves) > 50
    for text, node in leaves:
        assert node["correct"] == text.endswith("<answer>408</answer><eos>") and node["weight"] == math.exp(node["g"])
    assert list(tmp_path.iterdir()) == [out]
    assert capsys.readouterr().err.count("no value head") == 1


def test_the_head_beside_the_model_guides_it(tmp_path):
    """A new head has u = 1/2, so h = log((e^(1.1/beta) + e^(-1/beta))/2).  Guards against --beta or the head unused."""
    for path in (picture.ROOT / "tiny_base").glob("*.*"):
        (tmp_path / path.name).symlink_to(path)
    save_file(value.ValueHead(128).state_dict(), tmp_path / "value.safetensors")
    (tmp_path / "trainer_state.json").write_text('{"config": {"beta": 0.2}, "reward_bounds": [-1.0, 1.1]}')
    for flags, beta in (([], 0.2), (["--beta", "2"], 2.0), (["--guide", "none"], None)):
        args = picture.flags().parse_args(["--tree", "x.html", "--model", str(tmp_path), "--K", "1", *flags])
        h = math.log((math.exp(1.1 / beta) + math.exp(-1 / beta)) / 2) if beta else 0.0
        assert picture.draw(args)["nodes"][1]["h"] == pytest.approx(h, abs=1e-5)


def test_the_right_answer_is_read_from_the_prompt():
    assert picture.truth("34*12=", None) == (408, "") and picture.truth(" 34 * 12 = <think>", None) == (408, "<think>")
    assert picture.truth("34*12=", 7) == (7, "") and picture.truth("What is 34*12=", None) == (None, "")


@pytest.mark.parametrize(
    ("flags", "says"),
    (
        (["--tree", "{}/out.txt"], "must end in .html or .md"),
        (["--tree", "{}/missing/out.html"], "cannot be written"),
        (["--tree", "{}/folder.html"], "cannot be written"),
        (["--tree", "{}/out.html", "--tau", "1.5"], "--tau must lie in [0, 1], not 1.5"),
        (["--tree", "{}/out.html", "--tau", "nan"], "--tau must lie in [0, 1], not nan"),
        (["--tree", "{}/out.html", "--prompt", ""], "--prompt must be"),
        (["--tree", "{}/out.html", "--K", "0"], "--K must be 1 or more"),
        (["--tree", "{}/out.html", "--max-new-tokens", "100000"], "does not fit"),
        (["--tree", "{}/out.html", "--beta", "0"], "--beta must be above 0"),
        (["--tree", "{}/out.html", "--cover", "0"], "--cover must lie in (0, 1]"),
        (["--tree", "{}/out.html", "--model", "{}/nothing"], "no such folder"),
        (["--prompt", "1*1="], "--tree"),
    ),
)
def test_a_mistake_is_one_sentence(flags, says, tmp_path, capsys):
    """Exit 2, one line on stderr, nothing written."""
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(SystemExit) as stop:
        astar_search.main([flag.format(tmp_path) for flag in flags])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and says in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Guards against a page that is half written when the disk is full."""
    (tmp_path / "out.md").write_text("old")

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture.os, "replace", full)
    with pytest.raises(ValueError, match="No space left"):
        picture.write(tmp_path / "out.md", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_unknown_token_in_the_prompt_is_fine(tmp_path):
    astar_search.main(["--tree", str(tmp_path / "out.md"), "--prompt", "what is 34*12=", "--K", "1", "--max-nodes", "3"])
    assert "max-nodes" in check_mermaid((tmp_path / "out.md").read_text())[0]
