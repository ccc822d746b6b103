"""The README says what the code does: flags, defaults, metrics, names, lines.

    python tests/test_readme.py     # after an edit of the eight files: writes the line numbers of its links anew
"""

import ast
import dataclasses
import functools
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

# Where the README's equations and its answers to "Where is ..." live, and a piece of the line that computes each.
LINES = {
    "astar_search": "optimum pi*(y|x) ~ pi(y|x) exp(r(y)/beta)",
    "value.soft_value": "return torch.logaddexp(F.logsigmoid(u_logit) + r_hi / beta",
    "astar_search.best_children": "(1 - tau) * g + tau * G + h",
    "astar_search.perturb": "return G_parent - v.clamp(min=0)",
    "astar_search.Tree.advance": "node = heapq.heappop(self.queue)[1]",
    "astar_search.log_inclusion": "math.log(-math.expm1(-math.exp(",
    "value.gae": "running = (delta[:, t] + lam * running",
    "policy.ppo_loss": "surrogate = torch.minimum(ratio * advantages, ratio.clamp(",
    "policy.em_advantages": "return best[problem] * targets / Z[problem]",
    "value.value_loss": "v_loss = ((values - returns) ** 2",
    "policy.apo_loss": "residual = beta2 * log_ratio + optimal_values - rewards",
    "astar_search.NodeCache.update": "table.index_copy_(0, self.write",
    "fsdp.everyone": "dist.all_gather(texts, padded)",
    "train.main": "while iteration < config.iterations",
}
# `file.py` `function` [L5](file.py#L5) in the table of equations, `file.function` [L5](file.py#L5) in the map
LINK = re.compile(r"`(\w+)(?:\.py`(?: `([\w.]+)`)?|\.([\w.]+)`) \[L(\d+)\]\((\w+)\.py#L(\d+)\)")


@functools.cache
def find(place):
    """(the one line number of a place in LINES, first line, last line of its function or file)."""
    file, _, function = place.partition(".")
    lines = (ROOT / f"{file}.py").read_text().splitlines()
    first, last, inside = 1, len(lines), ast.parse("\n".join(lines))
    for name in function.split(".") if function else ():
        inside = next(node for node in inside.body if getattr(node, "name", None) == name)
        first, last = inside.lineno, inside.end_lineno
    found = [i for i in range(first, last + 1) if LINES[place] in lines[i - 1]]
    assert len(found) == 1, f"{place}: {LINES[place]!r} is on {len(found)} lines of it"
    return found[0], first, last


def places(text):
    """[(place, line shown, file linked to, line linked to)] of the README's links."""
    links = [match.groups() for match in LINK.finditer(text)]
    return [(".".join(filter(None, (file, one or other))), *rest) for file, one, other, *rest in links]


def refreshed(text):
    """The README with the line numbers of today."""

    def write(match):
        file, one, other = match.groups()[:3]
        line = find(".".join(filter(None, (file, one or other))))[0]
        return f"{match[0].partition(' [L')[0]} [L{line}]({file}.py#L{line})"

    return LINK.sub(write, text)


def test_every_link_leads_to_the_line_that_computes_it():
    """Guards against links that rot when lines move, and equations that move to another function."""
    found = places(README)
    assert {place for place, *_ in found} == set(LINES) and len(found) == README.count(".py#L")
    for place, shown, file, line in found:
        assert (file, shown) == (place.split(".")[0], line), place
        assert int(line) == find(place)[0], f"{place} is on another line now: python tests/test_readme.py"
    equations = README.split("| | equation | where |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(equations) == 11 and all(LINK.search(row) for row in equations)


@pytest.mark.parametrize("question", ["f computed", "the queue popped", "the KV cache", "the clip", "the ranks talk"])
def test_where_is_leads_to_one_short_place(question):
    """At most 40 lines: guards against a map that leads to a haystack."""
    (row,) = re.findall(rf"^\| {question}\? \| (.+) \|$", README, re.MULTILINE)
    ((place, *_),) = places(row)
    _, first, last = find(place)
    assert row.count("`") == 2 and last - first + 1 <= 40, f"{place} has {last - first + 1} lines"


def snippets():
    section = README.split("\n## In your own code\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.mark.parametrize("number", (0, 1))
def test_the_snippets_run_as_they_stand(number, tmp_path):
    """In a folder that holds astar_search.py and the model, nothing else, offline.  Guards against a snippet that rots,
    and an import of a sibling."""
    code = snippets()[number]
    assert len(snippets()) == 2 and len([line for line in code.splitlines() if line.strip()]) <= 10
    shutil.copy(ROOT / "astar_search.py", tmp_path)
    (tmp_path / "tiny_base").symlink_to(ROOT / "tiny_base")
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", code]
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    if number == 0:  # pi of the three best of four: .5 * .7, .3 * .7, .2; a, b, end are 0, 1, 2
        assert out.stdout == "[0, 2] -1.05\n[1, 2] -1.56\n[2] -1.61\n"
    else:  # two different leaves a prompt, the first two answering at once, all of them finished
        texts = [line.split("  ") for line in out.stdout.splitlines()]
        assert len({text for _, text in texts}) == 4 and all(0 < float(weight) <= 1 for weight, _ in texts)
        assert all(re.fullmatch(r"34\*12=(<think>.*</think>)?<answer>\d+</answer>", text) for _, text in texts)
        assert [text.startswith("34*12=<think>") for _, text in texts] == [False, False, True, True]


def test_the_short_presets_are_spelled_out():
    """Guards against a preset that says one thing and does another."""
    import train

    for preset in ("quick", "ppo"):
        (text,) = re.findall(rf"^- `{preset}`: (.*?)\.$", README, re.MULTILINE | re.DOTALL)
        told = dict(re.findall(r"`--([\w-]+) ([^`]+)`", text))
        assert told == {name.replace("_", "-"): str(x) for name, x in train.PRESETS[preset].items()}


def test_every_flag_is_listed_with_its_defaults():
    """Guards against a table that rots when a default changes."""
    import train

    for f in dataclasses.fields(train.Config):
        row = re.search(rf"^\| `--{f.name.replace('_', '-')}` \| (.*?) \| (.*?) \| .+ \|$", README, re.MULTILINE)
        assert row, f.name
        default = "tiny_base" if f.name == "model" else "off" if f.default is False else f.default
        assert row[1] == (f"`{default}`" if default != "" else ""), f.name
        preset = train.PRESETS["training"].get(f.name, "")
        assert row[2] == (f"`{preset}`" if preset != "" else ""), f.name


def test_every_place_it_names_exists():
    """`file.name` and `file.Class.name` in the tables lead somewhere."""
    places = re.findall(r"`(astar_search|policy|value|reward|data|fsdp|train)\.((?!py|safetensors)\w+(?:\.\w+)?)`", README)
    assert len(places) >= 5
    for module, path in places:
        thing = importlib.import_module(module)
        for part in path.split("."):
            thing = getattr(thing, part)
    for module, name in re.findall(r"`(\w+)\.py` `(\w+(?:\.\w+)?)`", README):
        thing = importlib.import_module(module)
        for part in name.split("."):
            thing = getattr(thing, part)


def test_every_link_within_it_leads_to_a_heading():
    """By the rule of GitHub: lower case, no punctuation, blanks as hyphens.  Guards against a section that is renamed."""
    headings = re.findall(r"^##+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = set(re.findall(r"\]\(#([^)]*)\)", README))
    assert linked and linked <= anchors, linked - anchors


def test_every_file_it_names_exists():
    for name in set(re.findall(r"`((?:experiments|tests|tiny_base)/[\w./-]*)`", README)):
        assert (ROOT / name).exists(), name
    top = {path.name for path in ROOT.glob("*.py")}
    assert top == {f"{name}.py" for name in "astar_search value policy fsdp reward data train eval".split()}


def test_policy_and_fsdp_can_be_copied_alone(tmp_path):
    """Guards against an import of a sibling; the other leaves have this test beside their own."""
    for name in ("policy", "fsdp"):
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
    code = "import sys; sys.path[:0] = ['policy', 'fsdp']; import policy, fsdp; print(fsdp.start(device='cpu').is_main)"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout == "True\n", out.stderr


if __name__ == "__main__":
    (ROOT / "README.md").write_text(refreshed(README))
