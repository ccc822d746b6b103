"""Rules of the house, read off the source: what a reader of the eight files may rely on.  Each is simple (names in the
syntax tree, no types), so that it says yes or no and never needs a judgement."""

import ast
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEAVES = ("data", "reward", "value", "astar_search", "policy", "fsdp")
EIGHT = (*LEAVES, "eval", "train")
SOURCE = {name: (ROOT / f"{name}.py").read_text() for name in EIGHT}
TREES = {name: ast.parse(source) for name, source in SOURCE.items()}
OTHERS = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for folder in ("experiments", "tests", "tiny_base")
    for path in sorted((ROOT / folder).glob("*.py"))
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
every_file = pytest.mark.parametrize("name", [*EIGHT, *(name for name in OTHERS if name.startswith("experiments"))])


def tree_of(name):
    return TREES.get(name) or OTHERS[name]


def names_read(tree):
    """Every name and attribute that is read anywhere below a node."""
    read = (node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Load))
    return {getattr(node, "id", None) or getattr(node, "attr", None) for node in read}


def imported(nodes):
    """(module, name it is bound to) of the import statements among these nodes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.asname or alias.name) for alias in node.names)


@every_file
def test_no_import_is_unused(name):
    tree = tree_of(name)
    unused = {bound for _, bound in imported(ast.walk(tree))} - names_read(tree)
    assert not unused, f"{name} imports {sorted(unused)} and never reads it"


@every_file
def test_nothing_at_the_top_level_is_unused(name):
    """A function, class or variable of a file is read somewhere: in it, in another, or in a test."""
    everywhere = set().union(*map(names_read, (*TREES.values(), *OTHERS.values())))
    everywhere |= {bound for tree in (*TREES.values(), *OTHERS.values()) for _, bound in imported(ast.walk(tree))}
    for node in tree_of(name).body:
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            made = {node.name}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            made = {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        else:
            continue
        assert made <= everywhere, f"{name}, line {node.lineno}: nothing reads {sorted(made - everywhere)}"


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_imports_no_sibling(name):
    """At module level; a demo's main() may.  Guards against a file that cannot be copied alone."""
    assert not {module.split(".")[0] for module, _ in imported(TREES[name].body)} & set(EIGHT)
    for node in TREES[name].body:
        if not (isinstance(node, FUNCTIONS) and node.name == "main"):
            assert not {module.split(".")[0] for module, _ in imported(ast.walk(node))} & set(EIGHT), node.lineno


def test_none_of_the_files_imports_the_loop():
    for name, tree in TREES.items():
        assert "train" not in {module for module, _ in imported(ast.walk(tree))}, name


def test_every_flag_is_read():
    """Every field of Config, outside of its definition and of the tables that list flags; `run_folder` has the flags of
    where and how often files are written.  Guards against a flag that does nothing."""
    config = next(node for node in TREES["train"].body if isinstance(node, ast.ClassDef) and node.name == "Config")
    trees = TREES["train"], OTHERS["experiments/run_folder.py"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    rest = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)]
    read = {node.attr for node in rest if getattr(node.value, "id", "") == "config"}
    for field in config.body:
        if isinstance(field, ast.AnnAssign):
            assert field.target.id in read, f"nothing reads config.{field.target.id}"


def test_the_eight_files_are_short_and_a_quarter_of_them_is_words():
    """At most 2,600 lines; a quarter to a third of them comments and docstrings."""
    lines, words = 0, 0
    for name, source in SOURCE.items():
        told = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
        for node in ast.walk(TREES[name]):
            if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
                told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        lines, words = lines + len(source.splitlines()), words + len(told)
    assert lines <= 2600 and 1 / 4 <= words / lines <= 1 / 3, (lines, words)


@pytest.mark.parametrize("name", EIGHT)
def test_functions_are_short(name):
    """At most 120 lines; only the loop, train.main, is longer: it is meant to be read from top to bottom."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, FUNCTIONS) and (name, node.name) != ("train", "main"):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 120, f"{name}.{node.name} has {lines} lines"


@pytest.mark.parametrize("name", EIGHT)
def test_everything_public_has_a_docstring(name):
    """Files, classes, functions and methods; not main(), whose file says what it does."""
    assert ast.get_docstring(TREES[name])
    for node in TREES[name].body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), f"{name}.{node.name}"
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, FUNCTIONS) and not method.name.startswith("_"):
                    assert ast.get_docstring(method), f"{name}.{node.name}.{method.name}"


def test_the_newcomers_check_runs_every_file_without_warnings():
    """.ci/run turns every warning of a file's demonstration into an error.  (Not run here: they take a minute.)"""
    script = (ROOT / ".ci" / "run").read_text()
    files = re.search(r"for file in (.+); do\n.*\n    python -W error \"\$file\.py\"", script)
    assert files and files[1].split() == [name for name in EIGHT if name != "train"]
