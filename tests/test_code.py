"""Rules of the house, read off the source: what a reader of the files may rely on.

Each rule is simple: names in the syntax tree, no types.  So it says yes or no and needs no
judgement.
"""

import ast
import io
import pathlib
import re
import sys
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LEAVES = ("data", "reward", "value", "astar_search", "policy", "fsdp")
EIGHT = (*LEAVES, "eval", "train")
FOLDERS = ("docs", "examples", "experiments", "tests", "tiny_base")
PACKAGES = {"torch", "transformers", "safetensors", "numpy"}
LOGGERS = {"wandb", "tensorboard"}  # a user may have them or not
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)


def python_files():
    """Every Python file of the repository, as a path relative to its root."""
    paths = sorted(ROOT.glob("*.py"))
    for folder in FOLDERS:
        paths += sorted((ROOT / folder).rglob("*.py"))
    return [str(path.relative_to(ROOT)) for path in paths]


SOURCE = {path: (ROOT / path).read_text() for path in python_files()}
TREES = {path: ast.parse(source, path) for path, source in SOURCE.items()}
TOP = [path for path in TREES if "/" not in path]
NO_TESTS = [path for path in TREES if not path.startswith("tests/")]

every_file = pytest.mark.parametrize("path", TREES)
every_file_but_tests = pytest.mark.parametrize("path", NO_TESTS)
every_top_file = pytest.mark.parametrize("path", TOP)


# -------------------------------------------------------------------------- What a syntax tree says


def names_read(tree):
    """Every name and attribute that is read anywhere below a node."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(getattr(node, "ctx", None), ast.Load):
            names.add(getattr(node, "id", None) or getattr(node, "attr", None))
    return names


def imports(tree):
    """(module, imported name or None, name that it is bound to), anywhere below a node."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.split(".")[0]
                found.append((alias.name, None, bound))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found.append((node.module or "", alias.name, alias.asname or alias.name))
    return found


def packages(tree):
    """First part of every imported module, anywhere below a node."""
    return {module.split(".")[0] for module, _, _ in imports(tree)}


def outside_of_functions(tree):
    """The statements of a file that run when it is imported, as a tree."""
    body = [node for node in tree.body if not isinstance(node, DEFINITIONS)]
    return ast.Module(body=body, type_ignores=[])


def functions(tree):
    """Every function and method below a node."""
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]


def function_named(tree, name):
    """The function of a file that has this name, or None."""
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and node.name == name:
            return node
    return None


def word_lines(path):
    """Number of lines of a file that are comments or docstrings, whole or in part."""
    words = set()
    for token in tokenize.generate_tokens(io.StringIO(SOURCE[path]).readline):
        if token.type == tokenize.COMMENT:
            words.add(token.start[0])
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.Module, *DEFINITIONS)) and ast.get_docstring(node):
            words.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(words)


# ------------------------------------------------------------------------- The eight, their imports


def test_the_eight_files_are_the_only_ones_at_the_top():
    assert sorted(TOP) == sorted(f"{name}.py" for name in EIGHT)


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_imports_no_sibling(name):
    """Not in a function either.  Guards against a file that cannot be copied alone."""
    assert not packages(TREES[f"{name}.py"]) & set(EIGHT)


@every_top_file
def test_the_eight_import_packages_and_each_other_only(path):
    """No folder of the repository, and no package but those of requirements.txt."""
    allowed = sys.stdlib_module_names | PACKAGES | LOGGERS | set(EIGHT)
    assert packages(TREES[path]) <= allowed
    for module, _, _ in imports(outside_of_functions(TREES[path])):
        assert not set(module.split(".")) & LOGGERS, f"{module} is imported by everybody's run"


def test_nothing_imports_the_loop():
    """Of the eight.  An experiment may use its parts."""
    for path in TOP:
        assert "train" not in packages(TREES[path]), path


def imported_files(path):
    """The files of the repository that a file imports, in functions too.

    Scripts put folders on Python's path.  So a name stands for every file of that name.
    """
    names = set()
    for module, imported, _ in imports(TREES[path]):
        parts = module.split(".")
        if parts[0] not in FOLDERS:
            names.add(parts[0])
        elif imported is None:
            names.add(parts[-1])
        else:  # from examples import memory, from examples.memory import outline
            names.update({parts[-1], imported})
    return {other for other in TREES if pathlib.PurePath(other).stem in names}


def test_no_circle_of_imports():
    """No file imports itself by way of others.  Guards against two files that are one."""
    graph = {path: imported_files(path) for path in TREES}
    assert {"eval.py", "fsdp.py"} <= graph["train.py"]
    for path in graph:
        reached = set()
        to_visit = list(graph[path])
        while to_visit:
            other = to_visit.pop()
            if other not in reached:
                reached.add(other)
                to_visit.extend(graph[other])
        assert path not in reached, f"{path} is in a circle within {sorted(reached)}"


# ------------------------------------------------------------------------------------- Nothing idle


@every_file
def test_no_import_is_unused(path):
    bound = {name for _, _, name in imports(TREES[path])}
    unused = bound - names_read(TREES[path])
    assert not unused, f"{path} imports {sorted(unused)} and never reads it"


def names_made(node):
    """The names that a statement at the top level of a file defines."""
    if isinstance(node, DEFINITIONS):
        return {node.name}
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    else:
        targets = []
    parts = [part for target in targets for part in ast.walk(target)]
    return {part.id for part in parts if isinstance(part, ast.Name)}


@pytest.fixture(scope="module")
def names_read_anywhere():
    """Every name that any file of the repository reads or imports from another."""
    names = set()
    for tree in TREES.values():
        names |= names_read(tree)
        names |= {imported for _, imported, _ in imports(tree)}
    return names


@every_file_but_tests
def test_nothing_at_the_top_level_is_unused(path, names_read_anywhere):
    """A function, class or variable is read somewhere: in its file, in another, or in a test."""
    for node in TREES[path].body:
        unused = names_made(node) - names_read_anywhere
        assert not unused, f"{path}, line {node.lineno}: nothing reads {sorted(unused)}"


def test_every_flag_is_read():
    """As config.NAME, outside of Config itself.  Guards against a flag that does nothing."""
    tree = TREES["train.py"]
    config_class = next(node for node in tree.body if getattr(node, "name", "") == "Config")
    fields = [node.target.id for node in config_class.body if isinstance(node, ast.AnnAssign)]
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = getattr(node.value, "id", None) or getattr(node.value, "attr", None)
            if owner == "config":  # config.NAME or run.config.NAME
                read.add(node.attr)
    assert len(fields) > 40
    for field in fields:
        assert field in read, f"nothing reads config.{field}"


# -------------------------------------------------------------------------------- How it is written


@every_file
def test_lines_are_at_most_100_columns(path):
    for number, line in enumerate(SOURCE[path].splitlines(), start=1):
        assert len(line) <= 100, f"{path}, line {number} has {len(line)} columns"


@every_file
def test_no_lambda_has_a_name(path):
    """A function with a name is a def."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            assert not isinstance(node.value, ast.Lambda), f"{path}, line {node.lineno}"


@every_top_file
def test_everything_public_has_a_docstring(path):
    """Files, classes, functions and methods; not main(), whose file says what it does."""
    tree = TREES[path]
    assert ast.get_docstring(tree)
    public = [node for node in tree.body if isinstance(node, DEFINITIONS)]
    for node in list(public):
        if isinstance(node, ast.ClassDef):
            public += [part for part in node.body if isinstance(part, FUNCTIONS)]
    for node in public:
        if not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), f"{path}, line {node.lineno}: {node.name}"


def test_a_quarter_to_two_fifths_of_the_eight_is_words():
    """Comments and docstrings; of each file a fifth to a half."""
    all_words = 0
    all_lines = 0
    for path in TOP:
        words = word_lines(path)
        lines = len(SOURCE[path].splitlines())
        assert 1 / 5 <= words / lines <= 1 / 2, f"{path}: {words} of {lines} lines"
        all_words += words
        all_lines += lines
    assert 1 / 4 <= all_words / all_lines <= 2 / 5, f"{all_words} of {all_lines} lines"


@every_file_but_tests
def test_functions_are_short(path):
    """At most 80 lines.  Only the loop, train.main, is longer: it is read from top to bottom."""
    for node in functions(TREES[path]):
        lines = node.end_lineno - node.lineno + 1
        if (path, node.name) != ("train.py", "main"):
            assert lines <= 80, f"{path}, line {node.lineno}: {node.name} has {lines} lines"


def test_the_loop_of_training_is_near_the_margin():
    """`for iteration in ...` of train.main stands in no more than one other block of main."""
    loops = []
    for node in ast.walk(function_named(TREES["train.py"], "main")):
        if isinstance(node, ast.For) and getattr(node.target, "id", "") == "iteration":
            loops.append(node)
    (loop,) = loops
    assert loop.col_offset <= 2 * 4


# ----------------------------------------------------------------------------- The newcomer's check


@every_top_file
def test_every_one_of_the_eight_is_a_command(path):
    """It has a main(), which it calls if it is run and not imported."""
    tree = TREES[path]
    assert function_named(tree, "main")
    last = tree.body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    assert "main" in names_read(ast.Module(body=last.body, type_ignores=[]))


def test_the_newcomers_check_runs_every_file_without_warnings():
    """.ci/run turns every warning into an error.  Not run here: it takes minutes."""
    script = (ROOT / ".ci" / "run").read_text()
    files = re.search(r'for file in (.+); do\n.*\n    python -W error "\$file\.py"', script)
    assert files
    assert files[1].split() == [name for name in EIGHT if name != "train"]
    assert re.search(r"^python -W error train\.py ", script, flags=re.MULTILINE)
