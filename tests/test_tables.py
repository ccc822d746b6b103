"""experiments/tables.py: the tables of the pages are what the metrics say, and only they change."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

import tables

PAGE = (ROOT / "docs" / "results.md").read_text()
MADE = {"one": lambda: ["| a | b |", "|---|---|", "| 1 | 2 |"]}
SMALL = """# Title
<!-- a comment -->

<!-- made by experiments/tables.py: one -->

| old | row |
|---|---|
| 3 | 4 |
| 5 | 6 |
Right below.

- A list:

  <!-- made by experiments/tables.py: one -->

  | old |

| another table | | |
"""


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The two pages in a folder of their own, which main() takes for the repository."""
    (tmp_path / "docs").mkdir()
    for page in ("docs/results.md", "README.md"):
        (tmp_path / page).write_text((ROOT / page).read_text())
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


def change_a_figure(path, line):
    """Write 9 for the last digit of a line of a file."""
    text = path.read_text()
    assert text.count(f"\n{line}\n") == 1
    other = re.sub(r"\d(\D*)$", r"9\1", line)
    assert other != line
    path.write_text(text.replace(f"\n{line}\n", f"\n{other}\n"))


def test_the_tables_are_what_the_metrics_say():
    """Guards against a typed figure, and one that was not updated when its metrics were."""
    text, changed = tables.remade(PAGE)
    assert not changed
    assert text == PAGE
    readme = (ROOT / "README.md").read_text()
    assert tables.remade_readme(readme) == (readme, [])


def test_every_table_that_can_be_made_is_marked_once():
    """Guards against a marker that was lost or misspelt: its table would be one of hand."""
    assert sorted(tables.MARKER.findall(PAGE)) == sorted(tables.TABLES)
    assert PAGE.count("experiments/tables.py:") == len(tables.TABLES)


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_changed_figure_is_seen(name):
    """In the last row of each table.  Guards against a table that is read from the page itself."""
    marker = f"<!-- made by experiments/tables.py: {name} -->\n\n"
    text = marker + re.match(r"(?: *\|.*\n)+", PAGE.split(marker)[1])[0]
    number = re.search(r"\d(?=\D*$)", text)
    other = text[: number.start()] + str((int(number[0]) + 1) % 10) + text[number.end() :]
    assert tables.remade(other) == (text, [name])


def test_only_the_lines_of_a_marked_table_change():
    """By hand.  Guards against lines lost around a table, and a table that leaves its list."""
    expected = SMALL.replace(
        "| old | row |\n|---|---|\n| 3 | 4 |\n| 5 | 6 |\n", "| a | b |\n|---|---|\n| 1 | 2 |\n"
    ).replace("  | old |\n", "  | a | b |\n  |---|---|\n  | 1 | 2 |\n")
    assert tables.remade(SMALL, MADE) == (expected, ["one", "one"])
    assert tables.remade(expected, MADE) == (expected, [])
    assert tables.remade("no marker\n", MADE) == ("no marker\n", [])


def test_a_wrong_marker_is_refused():
    """Guards against a marker that is passed over, and one that takes a table further down."""
    with pytest.raises(ValueError, match="line 4 marks a table that is unknown: one"):
        tables.remade(SMALL, {"two": MADE["one"]})
    marker = "<!-- made by experiments/tables.py: one -->\n"
    for rest in ("", "\n", "\n\n| a |\n", "| a |\n", "\ntext\n\n| a |\n"):
        with pytest.raises(ValueError, match="line 1 marks one, but no table follows"):
            tables.remade(marker + rest, MADE)
    with pytest.raises(ValueError, match="0 rows instead of one"):
        tables.remade_readme("| no | table |\n")


def test_after_an_error_nothing_is_written(copies, monkeypatch):
    """One sentence and exit status 1.  Guards against one page written and the other not."""
    path = copies / "docs" / "results.md"
    change_a_figure(path, next(row for row in PAGE.splitlines() if row.startswith("| seed 0 |")))
    (copies / "README.md").write_text("# No table\n")
    before = path.read_text()
    with pytest.raises(SystemExit) as stop:
        tables.main([])
    assert str(stop.value).startswith("README.md: 0 rows") and "\n" not in str(stop.value)
    assert path.read_text() == before
    assert (copies / "README.md").read_text() == "# No table\n"


def test_check_names_what_differs_and_changes_nothing(copies, capsys):
    """Then the command without --check mends it.  Guards against a check that always says yes."""
    with pytest.raises(SystemExit) as stop:
        tables.main(["--check"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == "every table is what the metrics say\n"
    path = copies / "docs" / "results.md"
    change_a_figure(path, next(row for row in PAGE.splitlines() if row.startswith("| seed 21 |")))
    before = path.read_text()
    with pytest.raises(SystemExit) as stop:
        tables.main(["--check"])
    assert stop.value.code == 1 and path.read_text() == before
    assert capsys.readouterr().out == "docs/results.md: default run, today's code\n"
    tables.main([])
    assert path.read_text() == PAGE
    assert sorted(file.name for file in copies.rglob("*.md*")) == ["README.md", "results.md"]


def test_readmes_rows_are_replaced_below_its_head(copies, capsys):
    """Guards against a head that is lost, and rows of README that no check reads."""
    path = copies / "README.md"
    readme = path.read_text()
    row = next(row for row in readme.splitlines() if row.startswith("| `python train.py` | 3 |"))
    change_a_figure(path, row)
    with pytest.raises(SystemExit) as stop:
        tables.main(["--check"])
    assert stop.value.code == 1
    assert capsys.readouterr().out == "README.md: the results\n"
    tables.main([])
    assert path.read_text() == readme
