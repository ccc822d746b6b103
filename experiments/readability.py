"""How readable is a checkout?  The same counts for old and new, as a markdown table.

    python experiments/readability.py                                  # this checkout
    python experiments/readability.py OLD_CHECKOUT . --trace            # two beside each other

Standard library only; --trace runs the checkout's train.py and needs torch.  How each is counted:

The eight files, together and one by one
    lines               all lines, blank ones included
    longest line        in columns
    over 100 columns    share of the lines
    lambdas             all of them; "assigned": the value of an assignment is a lambda
    nested defs         functions defined inside a function
    comments            share of the lines that hold a comment or belong to a docstring
    functions           functions and methods, nested ones included
    longest function    in lines, from its `def` to its last line

The loop of train.py: the first `for` or `while` in main() that holds, at any depth, a call of
    make_rollouts, generate_rollouts or backward
    line                of the `for` or `while`
    indentation         of its body, in columns
    nesting             blocks (for, while, if, with, try, match) inside each other in its body

The product: the eight files, and the files of folders that they import, directly or through others;
    an import inside a function counts like one at the top
    lines               of all these files
    import circles      pairs: two files that import each other; groups: strongly connected
                        components of more than one file

README.md: words are separated by white space.

--trace: functions of the checkout that one iteration with its evaluation enters.  train.main runs
    in a process of its own: one iteration of 4 problems, 4 evaluation problems.  Counted from the
    first call of draw_problems to the call of save_checkpoint are distinct functions by file and
    qualified name; no lambdas, comprehensions or class bodies.
"""

import argparse
import ast
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import tokenize

EIGHT = ("data", "reward", "value", "astar_search", "policy", "fsdp", "eval", "train")
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCK = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)
LOOP_CALLS = {"make_rollouts", "generate_rollouts", "backward"}


# ----------------------------------------------------------------------------------------- One file
def count_file(path):
    """{measure: number} of a file.  Shares are kept as numbers of lines, so that files add up."""
    source = path.read_text()
    tree = ast.parse(source)
    lines = source.splitlines()
    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, FUNCTION)]
    longest = max(functions, key=function_lines, default=None)
    return {
        "lines": len(lines),
        "longest line": max((len(line) for line in lines), default=0),
        "over 100 columns": sum(len(line) > 100 for line in lines),
        "lambdas": sum(isinstance(node, ast.Lambda) for node in nodes),
        "assigned lambdas": sum(assigns_lambda(node) for node in nodes),
        "nested defs": len(nested_functions(functions)),
        "comments": len(comment_lines(source, nodes)),
        "functions": len(functions),
        "longest function": function_lines(longest) if longest else 0,
        "its name": longest.name if longest else "",
    }


def function_lines(function):
    """Lines of a function, from its `def` to its last."""
    return function.end_lineno - function.lineno + 1


def assigns_lambda(node):
    """True for `name = lambda ...`."""
    return isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Lambda)


def nested_functions(functions):
    """Those of the functions that are defined inside another."""
    nested = set()
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, FUNCTION) and node is not function:
                nested.add(node)
    return nested


def comment_lines(source, nodes):
    """Numbers of the lines that hold a comment or belong to a docstring."""
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            numbers.add(token.start[0])
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTION)) and ast.get_docstring(node):
            docstring = node.body[0]
            numbers.update(range(docstring.lineno, docstring.end_lineno + 1))
    return numbers


def add_up(files):
    """The measures of several files as those of one."""
    total = {}
    for name in files[0]:
        numbers = [file[name] for file in files]
        if name in ("longest line", "longest function"):
            total[name] = max(numbers)
        elif name != "its name":
            total[name] = sum(numbers)
    longest = max(files, key=lambda file: file["longest function"])
    total["its name"] = longest["its name"]
    return total


def as_text(measures):
    """[(measure, cell)] of the table."""
    lines = measures["lines"]
    return [
        ("lines", f"{lines:,}"),
        ("longest line", str(measures["longest line"])),
        ("lines over 100 columns", f"{measures['over 100 columns'] / lines:.0%}"),
        ("assigned lambdas", str(measures["assigned lambdas"])),
        ("lambdas", str(measures["lambdas"])),
        ("nested defs", str(measures["nested defs"])),
        ("comments", f"{measures['comments'] / lines:.0%}"),
        ("functions", str(measures["functions"])),
        ("longest function", f"{measures['longest function']} ({measures['its name']})"),
    ]


# ----------------------------------------------------------------------------------------- The loop
def the_loop(path):
    """[(measure, cell)] of the training loop."""
    tree = ast.parse(path.read_text())
    loops = []
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name == "main":
            for node in ast.walk(function):
                if isinstance(node, (ast.For, ast.While)) and calls(node) & LOOP_CALLS:
                    loops.append(node)
    if not loops:
        sys.exit(f"readability.py: the training loop is not in main() of {path}")
    loop = min(loops, key=lambda node: node.lineno)
    return [
        ("loop of train.py: line", str(loop.lineno)),
        ("loop: indentation of its body", str(loop.body[0].col_offset)),
        ("loop: deepest nesting in its body", str(nesting(loop.body))),
    ]


def calls(node):
    """Names of the functions and methods that are called below a node."""
    names = set()
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            names.add(getattr(call.func, "attr", getattr(call.func, "id", "")))
    return names


def nesting(statements):
    """How many blocks are inside each other, at most.  `elif` is no deeper than its `if`."""
    deepest = 0
    for statement in statements:
        if not isinstance(statement, BLOCK):
            continue
        parts = [getattr(statement, "body", [])]
        parts += [handler.body for handler in getattr(statement, "handlers", [])]
        parts += [case.body for case in getattr(statement, "cases", [])]
        parts.append(getattr(statement, "finalbody", []))
        depth = 1 + max(nesting(part) for part in parts)
        otherwise = getattr(statement, "orelse", [])
        if isinstance(statement, ast.If) and len(otherwise) == 1:
            is_elif = isinstance(otherwise[0], ast.If)
        else:
            is_elif = False
        depth = max(depth, nesting(otherwise) + (0 if is_elif else 1) if otherwise else 0)
        deepest = max(deepest, depth)
    return deepest


# ------------------------------------------------------------------------------------------ Imports
def imports_of(path, root):
    """The files of the checkout that a file imports, at any level."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from experiments import logs` and `from experiments.logs import start`
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        for name in names:
            # The root is first on the path of whoever runs one of the eight; a file of a folder
            # may have put its own folder on the path behind it.
            for folder in (root, path.parent):
                file = folder / (name.replace(".", "/") + ".py")
                if file.is_file():
                    found.add(file)
                    break
    return found - {path}


def product_imports(root):
    """{file: the files it imports} of the eight files and of all that they import."""
    graph = {}
    to_read = [root / f"{name}.py" for name in EIGHT]
    while to_read:
        path = to_read.pop()
        if path not in graph:
            graph[path] = imports_of(path, root)
            to_read += graph[path]
    return graph


def reachable(graph, start):
    """The files that can be reached from one by at least one import."""
    found = set()
    to_visit = list(graph[start])
    while to_visit:
        path = to_visit.pop()
        if path not in found:
            found.add(path)
            to_visit += graph[path]
    return found


def circles(graph, root):
    """(pairs of files that import each other, strongly connected groups), as texts."""
    names = {path: str(path.relative_to(root)).removesuffix(".py") for path in graph}
    pairs = set()
    groups = set()
    for path in graph:
        reached = reachable(graph, path)
        group = [other for other in reached if path in reachable(graph, other)]
        if group:
            groups.add(", ".join(sorted(names[member] for member in group)))
        for other in graph[path]:
            if path in graph[other]:
                pairs.add(" - ".join(sorted((names[path], names[other]))))
    return sorted(pairs), sorted(groups)


def the_product(root):
    """[(measure, cell)] of the eight files and what they import."""
    graph = product_imports(root)
    pairs, groups = circles(graph, root)
    lines = sum(len(path.read_text().splitlines()) for path in graph)
    return [
        ("product code: files", str(len(graph))),
        ("product code: lines", f"{lines:,}"),
        ("import circles: pairs", "; ".join([str(len(pairs)), *pairs])),
        ("import circles: groups", "; ".join([str(len(groups)), *groups])),
    ]


# ------------------------------------------------------------------------------------ One iteration
# Run in the checkout; its last line of output is JSON.
TRACER = """
import inspect, json, os, sys
sys.path.insert(0, os.getcwd())
import train
root = os.getcwd() + os.sep
entered = []
inside = False
def profile(frame, event, argument):
    global inside
    code = frame.f_code
    is_function = code.co_flags & inspect.CO_NEWLOCALS and not code.co_name.startswith("<")
    if event != "call" or not is_function or not code.co_filename.startswith(root):
        return
    if code.co_name == "draw_problems":
        inside = True
    if code.co_name == "save_checkpoint":
        inside = False
    if inside:
        entered.append((code.co_filename[len(root):], code.co_qualname))
sys.setprofile(profile)
train.main(sys.argv[1:])
sys.setprofile(None)
print()
print(json.dumps(sorted(set(entered))))
"""
FLAGS = "--iterations 1 --problems-per-iteration 4 --eval-problems 4 --device cpu --output-dir"


def trace(root):
    """[(measure, cell)] of the functions that one iteration enters."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", TRACER, *FLAGS.split(), folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"readability.py: train.py of {root} failed:\n{process.stderr}")
    entered = json.loads(process.stdout.splitlines()[-1])
    if not entered:
        sys.exit(f"readability.py: train.py of {root} never called draw_problems")
    files = {file for file, _ in entered}
    return [("functions that one iteration enters", f"{len(entered)} in {len(files)} files")]


# ---------------------------------------------------------------------------------------- The table
def measure(root, with_trace):
    """[(measure, cell)]: all rows of the table for one checkout."""
    files = [count_file(root / f"{name}.py") for name in EIGHT]
    rows = [(f"the eight: {name}", cell) for name, cell in as_text(add_up(files))]
    rows += the_loop(root / "train.py")
    rows += the_product(root)
    readme = (root / "README.md").read_text()
    rows.append(("README: lines", f"{len(readme.splitlines()):,}"))
    rows.append(("README: words", f"{len(readme.split()):,}"))
    if with_trace:
        rows += trace(root)
    for name, file in zip(EIGHT, files):
        rows += [(f"{name}.py: {measure_name}", cell) for measure_name, cell in as_text(file)]
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = pathlib.Path(__file__).resolve().parent.parent
    parser.add_argument("checkouts", nargs="*", type=pathlib.Path, default=[here])
    parser.add_argument("--trace", action="store_true", help="run one iteration of each")
    args = parser.parse_args()
    for checkout in args.checkouts:
        missing = [name for name in EIGHT if not (checkout / f"{name}.py").is_file()]
        if missing:
            parser.error(f"{checkout} has no {missing[0]}.py")
    columns = [measure(checkout.resolve(), args.trace) for checkout in args.checkouts]
    print("| | " + " | ".join(str(checkout) for checkout in args.checkouts) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for rows in zip(*columns):
        cells = [cell for _, cell in rows]
        print(f"| {rows[0][0]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
