"""README.md and docs/ say what the code does: functions, flags, metrics, commands, links, snippets.

The commands are checked and run by main(), in a process and a folder of their own (`checked`).
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
EIGHT = ("data", "reward", "value", "astar_search", "policy", "fsdp", "eval", "train")
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
REFERENCE = DOCS["reference.md"]
WALKTHROUGH = DOCS["walkthrough.md"]
# Every page by its path from the root. The commands of the changelog are those of the past.
PAGES = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}
PAGES |= {f"docs/{name}": text for name, text in DOCS.items()}
LINKED_PAGES = PAGES | {"CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text()}

NAMED = re.compile(r"`(" + "|".join(EIGHT) + r")\.((?!py\b|jsonl?\b|safetensors\b)\w+(?:\.\w+)?)`")
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------------------------------- Functions
def definition(place):
    """The syntax tree of `file.function` or `file.Class.method`; None if there is none."""
    file, *names = place.split(".")
    node = ast.parse((ROOT / f"{file}.py").read_text())
    for name in names:
        found = [child for child in node.body if getattr(child, "name", None) == name]
        if not found:
            return None
        node = found[0]
    return node


def table_after(text, head):
    """The rows of the table that begins with the line `head`, as lists of cells."""
    lines = text.split(f"\n{head}\n", 1)[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[1:]]


def test_each_equation_names_the_function_that_computes_it():
    """Guards against an equation whose function was renamed."""
    rows = table_after(README, "| what | equation | in plain words | function |")
    assert len(rows) == 11
    for what, equation, words, function in rows:
        assert equation and words, what
        if what != "optimum":  # the definition, in the head of the file
            (place,) = NAMED.findall(function)
            assert definition(".".join(place)) is not None, function


WHERE = ("f computed", "the queue popped", "the KV cache", "the clip", "the ranks talk")


@pytest.mark.parametrize("question", WHERE)
def test_where_is_leads_to_one_short_place(question):
    """At most 40 lines: guards against a map that leads to a haystack."""
    (row,) = re.findall(rf"^\| {question}\? \| (.+) \|$", README, re.MULTILINE)
    (place,) = NAMED.findall(row)
    node = definition(".".join(place))
    lines = node.end_lineno - node.lineno + 1
    assert row.count("`") == 2 and lines <= 40, f"{place} has {lines} lines"


@pytest.mark.parametrize("page", LINKED_PAGES)
def test_every_function_a_page_names_exists(page):
    """`file.name` and `file.Class.name` lead somewhere; also names that are made at run time."""
    for file, name in NAMED.findall(PAGES.get(page, "")):
        thing = importlib.import_module(file)
        for part in name.split("."):
            assert hasattr(thing, part), f"{page}: {file}.{name}"
            thing = getattr(thing, part)


def test_the_loop_in_pseudo_code_calls_functions_that_exist():
    """Guards against pseudo-code that drifts away from the code."""
    section = README.split("\n## The loop\n")[1].split("\n## ")[0]
    ((_, code),) = BLOCK.findall(section)
    assert 12 <= len(code.splitlines()) <= 25
    ast.parse(code)
    defined = set()
    for file in EIGHT:
        tree = ast.parse((ROOT / f"{file}.py").read_text())
        defined |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    called = set(re.findall(r"(?<![.\w])(\w+)\(", code)) - {"range", "head", "clip_grad_norm_"}
    assert len(called) >= 12 and called <= defined, called - defined


def test_the_files_are_listed_in_reading_order():
    rows = table_after(README, "| file | holds | questions to answer after reading it |")
    assert [row[0] for row in rows] == [f"`{file}.py`" for file in EIGHT]
    assert all(row[2].endswith("?") for row in rows)
    assert {path.stem for path in ROOT.glob("*.py")} == set(EIGHT)


def test_the_lines_of_the_eight_files_are_counted_honestly():
    """The comparison with other codebases gives the number, to five in a hundred."""
    (told,) = re.findall(r"8 files, about ([\d,]+) lines", DOCS["comparison.md"])
    lines = sum(len((ROOT / f"{file}.py").read_text().splitlines()) for file in EIGHT)
    assert abs(int(told.replace(",", "")) / lines - 1) < 0.05, lines


# ------------------------------------------------------------------------------- Size, links, files
def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 250


def anchors(text):
    """The anchors of a page by the rule of GitHub: lower case, no punctuation, hyphens."""
    outside_of_code = BLOCK.sub("", text)
    headings = re.findall(r"^##+ (.+)$", outside_of_code, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED_PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    """Guards against a page, a picture or a section that is moved."""
    text = BLOCK.sub("", LINKED_PAGES[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.is_file(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{page}: {target}"


def test_the_front_page_links_every_page_and_every_page_is_linked():
    linked = set(re.findall(r"\]\((docs/[\w.]+\.md)(?:#[\w-]*)?\)", README))
    assert linked == {f"docs/{name}" for name in DOCS} and len(linked) == 6


@pytest.mark.parametrize("page", PAGES)
def test_every_file_a_page_names_exists(page):
    """`experiments/results/main_job/seed*.jsonl` too. The last two are written by make.py."""
    made = {"examples/sort_digits/train.jsonl", "examples/sort_digits/eval.jsonl"}
    named = re.findall(r"`((?:experiments|examples|tests|tiny_base|docs)/[\w./*-]*)`", PAGES[page])
    for name in set(named) - made:
        assert list(ROOT.glob(name)), f"{page}: {name}"
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / name).is_file(), name


# -------------------------------------------------------------------------------- Flags and metrics
def flag_name(field_name):
    return "--" + field_name.replace("_", "-")


def shown(x):
    """A default as the tables show it."""
    if x in ("", ()):
        return ""
    return "`off`" if x is False else f"`{x}`"


def test_every_flag_is_listed_with_its_defaults_and_presets():
    """Guards against a table that rots when a default or a preset changes."""
    import train

    presets = ("quick", "task", "ppo", "training")
    assert set(train.PRESETS) == {"local", *presets} and not train.PRESETS["local"]
    rows = re.findall(r"^\| `(--[\w-]+)` \|(.*)\|$", REFERENCE.split("\n## The files")[0], re.M)
    listed = {flag: [cell.strip() for cell in cells.split("|")] for flag, cells in rows}
    fields = dataclasses.fields(train.Config)
    assert len(rows) == len(listed) and set(listed) == {flag_name(field.name) for field in fields}
    for field in fields:
        default, *told, meaning = listed[flag_name(field.name)]
        assert default == shown(train.shown(field.default)), field.name
        for preset, cell in zip(presets, told, strict=True):
            expected = shown(train.shown(train.PRESETS[preset].get(field.name, "")))
            assert cell == expected, (preset, field.name)
        for choice in field.metadata.get("choices") or ():
            assert f"`{choice}`" in meaning, (field.name, choice)


def test_flags_that_a_choice_brings_along_are_those_of_the_code(capsys):
    """And each is printed at the start, and one that is given wins."""
    import train

    rows = table_after(REFERENCE, "| choice, without a preset that sets it | brings along | why |")
    choices = {}
    for cell, brought, _ in rows:
        for choice in re.findall(r"`(--[\w-]+ \w+)`", cell):
            choices[choice] = dict(re.findall(r"`(--[\w-]+) ([^`]+)`", brought))
    assert set(choices) == {
        "--rollout sample",
        "--loss ppo",
        "--loss grpo",
        "--loss apo",
        "--prompt tinyzero",
    }
    defaults = dataclasses.asdict(train.Config())
    for choice, brought in choices.items():
        name, value = choice.removeprefix("--").split()
        config, _, _ = train.parse_arguments(choice.split())
        changed = {
            flag_name(key): x
            for key, x in dataclasses.asdict(config).items()
            if x != defaults[key] and key != name
        }
        assert getattr(config, name) == value and set(changed) == set(brought), choice
        for flag, told in brought.items():
            expected = changed[flag]
            if isinstance(expected, list):
                (expected,) = expected
            assert type(expected)(told) == expected, (choice, flag)
            given = "off" if told == "on" else "on" if told == "off" else "1"
            config, _, _ = train.parse_arguments([*choice.split(), flag, given])
            assert str(getattr(config, flag[2:].replace("-", "_"))) in (given, "1.0", "['1']")


def test_the_flags_of_evaluation_are_listed():
    import eval as evaluation

    section = REFERENCE.split("\n## Evaluation: eval.py\n")[1].split("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("| `--"))
    listed = set(re.findall(r"`(--[\w-]+)`", "\n".join(r.split("|")[1] for r in table.split("\n"))))
    parser = evaluation.make_parser()
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert listed == flags - {"-h", "--help"}
    for row in table.splitlines():
        cells = row.split("|")
        names, told = re.findall(r"`--([\w-]+)`", cells[1]), re.findall("`([^`]*)`", cells[2])
        for name, default in zip(names, told if len(told) == len(names) else told * len(names)):
            actual = parser.get_default(name.replace("-", "_"))
            if name == "model":
                actual = pathlib.Path(actual).name
            if name not in ("n", "problems"):  # 500, or all of a file
                assert str(actual) == default, name


def test_metrics_are_those_that_a_run_writes(tmp_path, capsys):
    """Every key of metrics.jsonl has a row, and every row a key."""
    import train

    flags = (
        "--iterations 1 --problems-per-iteration 4 --minibatches 1 --epochs 1 --eval-problems 4"
        " --samples 1 --device cpu --max-nodes 60 --rollouts-per-problem 2"
    )
    train.main([*flags.split(), "--output-dir", str(tmp_path / "run")])
    written = set()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        written |= set(json.loads(line))
    rows = table_after(REFERENCE, "| metric | meaning | healthy | what a bad value means |")
    assert {row[0].strip("`") for row in rows} == written
    assert len(rows) == len(written)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    in_checkpoint = {path.name for path in (tmp_path / "run" / "checkpoint_iter_1").iterdir()}
    rows = table_after(REFERENCE, "| file in the output folder | holds |")
    told = {row[0].strip("`").replace("_N", "_1") for row in rows}
    assert files == {name.strip("/") for name in told if name.count("/") == name.endswith("/")}
    nested = {name.split("/")[1] for name in told if name.startswith("checkpoint")} - {""}
    assert nested < in_checkpoint


def test_the_figures_of_evaluation_are_those_it_prints():
    """Names and order of the quoted table. Guards against a figure that is renamed."""
    import data
    import eval as evaluation
    import fsdp
    import policy
    import reward

    model, tokenizer = policy.load_policy(str(ROOT / "tiny_base"))
    result, _ = evaluation.evaluate(
        model,
        tokenizer,
        data.eval_problems(4),
        reward.load_reward(),
        fsdp.init_ranks(device="cpu"),
        decode="astar",
        n=2,
        max_nodes=60,
    )
    printed = evaluation.format_report(result).splitlines()
    (quoted,) = [
        code for _, code in BLOCK.findall(REFERENCE) if code.startswith("tiny_base, astar")
    ]
    names = [line.split()[0] for line in quoted.splitlines()[2:]]
    assert names == [line.split()[0] for line in printed if line.split()[0] != "all"]


# ----------------------------------------------------------------------------------------- Commands
def shell_lines(block):
    """The commands of a code block: continued lines joined, comments dropped."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def documented_commands():
    """[(page, words, quick)] of every code block, and of commands within a sentence."""
    found = []
    for page, text in PAGES.items():
        for kind, block in BLOCK.findall(text):
            if kind in ("sh", "sh quick"):
                found += [(page, words, kind == "sh quick") for words in shell_lines(block)]
        for command in re.findall(r"`((?:python|torchrun) [^`]*\.py[^`]*)`", BLOCK.sub("", text)):
            found.append((page, shlex.split(command.replace("\n", " ")), False))
    return found


class Parsed(Exception):
    """Raised in the place of what a script would do with its flags."""


def check_command(words):
    """Raise AssertionError or SystemExit unless the command can be meant: its script exists and
    its flags are known to that script's own parser."""
    while "=" in words[0]:  # OMP_NUM_THREADS=1
        words = words[1:]
    if words[0] == "pip":
        for name in re.findall(r"-r (\S+)", " ".join(words)):
            assert (ROOT / name).is_file(), name
    elif words[0] in ("python", "torchrun") and "-m" not in words:
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        check_script(words[place], words[place + 1 :])
    elif words[0] == ".ci/run":
        assert (ROOT / ".ci" / "run").is_file()
    else:
        assert words[0] in ("python", "ruff", "git"), words


def check_script(name, argv):
    """The script's parser accepts argv; train.py also checks that the flags go together."""
    path = ROOT / name
    assert path.is_file(), f"there is no {name}"
    if "parse" not in path.read_text():
        assert not any(word.startswith("-") for word in argv), f"{name} takes no flags"
        return
    # A run that is evaluated or resumed is one of the user's: here is none to take flags from.
    of_a_run = "--checkpoint" in argv or ("--resume" in argv and "auto" not in argv)
    if name == "train.py" and not of_a_run:
        import train

        train.parse_arguments(argv)
        return
    original = argparse.ArgumentParser.parse_known_args  # every parse_args calls it

    def parse_and_stop(parser, args=None, namespace=None):
        known, unknown = original(parser, args, namespace)
        if not unknown:
            raise Parsed
        return known, unknown  # parse_args refuses them, or the script has another parser for them

    argparse.ArgumentParser.parse_known_args = parse_and_stop
    try:
        run_script(path, argv)
    except Parsed:
        return
    finally:
        argparse.ArgumentParser.parse_known_args = original
    raise AssertionError(f"{name} never reads its flags")


def run_script(path, argv):
    """Run a script in this process as python would."""
    before = sys.argv, sys.path
    sys.argv = [str(path), *argv]
    sys.path = [str(path.parent), *sys.path]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path = before


def in_newcomers_check(words):
    """Is there a line in .ci/run with this script and all of these flags, perhaps with more?"""
    for line in (ROOT / ".ci" / "run").read_text().splitlines():
        if set(words) <= set(shlex.split(line, comments=True) if line.count('"') % 2 == 0 else ()):
            return True
    return False


def main():
    """Check every command, run the quick ones that .ci/run does not; print JSON."""
    failures, outputs = [], {}
    for page, words, quick in documented_commands():
        said = io.StringIO()
        command = shlex.join(words)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                check_command(words)
                if quick and not in_newcomers_check(words):
                    start = said.tell()
                    assert words[0] == "python"
                    run_script(ROOT / words[1], words[2:])
                    outputs[command] = said.getvalue()[start:]
        except (Exception, SystemExit) as error:
            failures.append(f"{page}: {command}: {type(error).__name__} {error} {said.getvalue()}")
    print("\n" + json.dumps({"failures": failures, "outputs": outputs}))


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What main() found, in a process and a folder of its own: scripts change modules."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("WORLD_SIZE", None)
    command = [sys.executable, __file__]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": folder}


def test_every_command_can_be_given(checked):
    """Script and flags exist. Guards against a command that rots when a flag or a file moves."""
    assert len(documented_commands()) > 40
    assert not checked["failures"], "\n".join(checked["failures"])


def test_quick_commands_run_and_print_what_is_quoted(checked):
    """The walk and the pictures. Guards against quotations that rot."""
    outputs = checked["outputs"]
    quick = [words for _, words, quick in documented_commands() if quick]
    assert len(quick) >= 4 and all(
        shlex.join(words) in outputs or in_newcomers_check(words) for words in quick
    )
    quoted = [code for kind, code in BLOCK.findall(WALKTHROUGH) if kind == "text"]
    assert len(quoted) == 7 and all(code in outputs["python examples/walk.py"] for code in quoted)
    (mermaid,) = [code for kind, code in BLOCK.findall(WALKTHROUGH) if kind == "mermaid"]
    assert mermaid in (checked["folder"] / "out.md").read_text()
    assert "<html" in (checked["folder"] / "out.html").read_text()


# ----------------------------------------------------------------------------------------- Snippets
def python_blocks(text):
    return [code for kind, code in BLOCK.findall(text) if kind == "python"]


ALONE = """
import importlib, sys
for name in ("policy", "fsdp"):
    sys.path.insert(0, name)  # a folder that holds this one file
    importlib.import_module(name)
    sys.path.pop(0)
print(sorted(set({eight}) & set(sys.modules)), sys.modules["fsdp"].init_ranks(device="cpu").is_main)
for page in {pages}:
    names = {{}}  # of a page: a snippet may go on from the one above it
    for snippet in page:
        print("----")
        exec(snippet, names)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What policy.py and fsdp.py say, each copied alone; then what the snippets print, in a folder
    that holds astar_search.py and the model, nothing else, offline."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("policy", "fsdp"):
        (folder / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", folder / name)
    shutil.copy(ROOT / "astar_search.py", folder)
    (folder / "tiny_base").symlink_to(ROOT / "tiny_base")
    pages = [python_blocks(README), python_blocks(WALKTHROUGH)]
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HUB_OFFLINE"] = "1"
    code = ALONE.format(eight=EIGHT, pages=pages)
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("----\n")


def test_policy_and_fsdp_can_be_copied_alone(alone):
    """Guards against an import of a sibling; the other leaves have this test beside their own."""
    assert alone[0] == "['fsdp', 'policy'] True\n"


def test_the_snippets_run_as_they_stand(alone):
    """Guards against a snippet that rots, and an import of a sibling in astar_search.py."""
    for code in python_blocks(README) + python_blocks(WALKTHROUGH):
        assert len([line for line in code.splitlines() if line.strip()]) <= 10
    _, one_prompt, with_model, with_table = alone
    # Plain A*: the most probable completion first, which is thought through.
    *_, best = one_prompt.splitlines()
    assert best.startswith(
        "<think>34*10=340 34*2=68 340+68=408</think><answer>408</answer><eos> -3.4"
    )
    assert "4 leaves" in one_prompt
    # pi of the three best of four: .5 * .7, .3 * .7, .2; a, b, end are 0, 1, 2
    assert with_table == "[0, 2] -1.05\n[1, 2] -1.56\n[2] -1.61\n"
    assert f"```\n{with_table}```" in WALKTHROUGH
    # two different leaves a prompt, the first two answering at once, all of them finished
    texts = [line.split("  ") for line in with_model.splitlines()]
    assert len({text for _, text in texts}) == 4
    assert all(0 < float(weight) <= 1 for weight, _ in texts)
    finished = r"34\*12=(<think>.*</think>)?<answer>\d+</answer>"
    assert all(re.fullmatch(finished, text) for _, text in texts)
    thinks = [text.startswith("34*12=<think>") for _, text in texts]
    assert thinks == [False, False, True, True]


def test_the_reward_of_the_reference_is_one(tmp_path):
    import data
    import reward

    (code,) = python_blocks(REFERENCE)
    (tmp_path / "mine.py").write_text(code)
    own = reward.load_own_reward(f"{tmp_path / 'mine.py'}:reward")
    problem = data.Problem("5,3,9=", "359")
    assert own.judge(problem, " 359\n")["correct"] and not own.judge(problem, "395")["correct"]
    assert own.bounds == (0.0, 1.0)


if __name__ == "__main__":
    main()
