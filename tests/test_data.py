"""data.py: the split does not leak, a problem is a pure function of its numbers, and bad input is named in one line."""

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data

ROOT = Path(data.__file__).resolve().parent
RANGES = ("1", "2", "3", "2x3", "3x2", "2-3", "1-2x4", "6")


def run(*arguments):
    """`python data.py ...` -> its completed process."""
    command = [sys.executable, str(ROOT / "data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def pairs(problems):
    return {frozenset(problem.operands) for problem in problems}


# ---------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("digits", RANGES)
def test_no_training_draw_is_held_out_in_either_order(digits):
    """Guards against a split by ordered pair: 34*12 in evaluation and 12*34 in training."""
    n = 8 if digits == "1" else 100
    held_out = data.eval_problems(n, digits)
    assert all(data.is_held_out(*p.operands) and data.is_held_out(*p.operands[::-1]) for p in held_out)
    draws = [data.train_problem(seed, seed % 3, i, digits) for seed in range(8) for i in range(150)]
    assert not any(data.is_held_out(*p.operands) or data.is_held_out(*p.operands[::-1]) for p in draws)
    assert pairs(draws).isdisjoint(pairs(held_out))


@pytest.mark.parametrize(
    "evaluated, trained", [("2", "2"), ("1x2", "2x1"), ("1x2", "1-2"), ("1-2", "1x2"), ("1", "1-2")]
)
def test_evaluation_set_and_training_are_disjoint_across_ranges(evaluated, trained):
    """The same without trusting is_held_out, on ranges so small that a leak would be drawn many times over.  Guards
    against a split that depends on the range: one may train on another range than one evaluates on."""
    held_out = data.eval_problems(8 if evaluated == "1" else 110, evaluated)
    draws = [data.train_problem(seed, 0, i, trained) for seed in range(4) for i in range(1_000)]
    assert pairs(draws).isdisjoint(pairs(held_out))


def test_training_covers_all_that_is_not_held_out():
    """Guards against a split that throws away more than it evaluates on."""
    drawn = {data.train_problem(0, 0, i, "1").operands for i in range(3_000)}
    assert drawn == {(a, b) for a in range(1, 10) for b in range(1, 10) if not data.is_held_out(a, b)}


@pytest.mark.parametrize("digits", RANGES)
def test_evaluation_pairs_are_distinct_and_a_prefix_of_more(digits):
    """Guards against an evaluation set whose members change with its size, or that counts a*b and b*a as two."""
    many, few = (8, 3) if digits == "1" else (110, 40) if digits == "2" else (500, 100)
    problems = data.eval_problems(many, digits)
    assert len(pairs(problems)) == len(problems) == many
    assert data.eval_problems(few, digits) == problems[:few]


def test_evaluation_set_is_fixed_for_good():
    """Guards against any change of hash or generator: numbers of two versions would no longer be comparable."""
    assert [p.operands for p in data.eval_problems(4, "2")] == [(12, 38), (76, 46), (92, 27), (87, 46)]
    assert [p.operands for p in data.eval_problems(3, "3")] == [(400, 782), (515, 454), (480, 826)]
    assert [p.operands for p in data.eval_problems(4, "2", seed=1)] != [p.operands for p in data.eval_problems(4, "2")]
    random.seed(5)  # and against a draw from the global generator
    assert data.eval_problems(1, "2")[0].operands == (12, 38)


@pytest.mark.parametrize("digits", ["1", "2", "1x2", "1-2"])
def test_asking_for_too_many_evaluation_problems_says_how_many_there_are(digits):
    """Guards against an endless loop, a short list, and a search that gives up before it has seen them all."""
    (a_lo, a_hi), (b_lo, b_hi) = data.parse_digits(digits)
    every = [(a, b) for a in range(10 ** (a_lo - 1), 10**a_hi) for b in range(10 ** (b_lo - 1), 10**b_hi)]
    exist = len({(min(pair), max(pair)) for pair in every if data.is_held_out(*pair)})
    with pytest.raises(ValueError, match=rf"holds only {exist} evaluation problems, fewer than the {exist + 1} asked"):
        data.eval_problems(exist + 1, digits)
    assert len(data.eval_problems(exist, digits)) == exist


def test_a_negative_number_of_evaluation_problems_is_refused():
    """Guards against `found == n` as the only stop: -1 returned all that the loop happened to find."""
    for n in (0, -1):
        with pytest.raises(ValueError, match="must lie in"):
            data.eval_problems(n, "2")


# ------------------------------------------------------------------------------------------------- the problems


def test_a_training_problem_is_a_pure_function_of_seed_iteration_and_index():
    """Guards against random state: a resumed or distributed run would see other problems."""
    rng = random.Random(1)
    cases = [(rng.randrange(99), rng.randrange(99), rng.randrange(999)) for _ in range(200)]
    forward = [data.train_problem(*case) for case in cases]
    random.seed(0)
    assert [data.train_problem(*case) for case in reversed(cases)] == forward[::-1]


def test_seed_iteration_and_index_each_matter_and_do_not_run_together():
    """Guards against a seed of f"{seed}{iteration}{index}", where (1, 23, 4) is (12, 3, 4), and against seed + index.
    With 6 digits a pair has 1 chance in 8e11, so two equal ones mean two equal generators."""
    cases = [(s, i, j) for s in range(13) for i in (0, 1, 2, 3, 12, 23) for j in (0, 1, 2, 3, 4, 34, 234)]
    assert len({data.train_problem(*case, digits="6").operands for case in cases}) == len(cases)


def test_the_problems_of_one_iteration_differ():
    """Guards against an index that is not read.  300 draws of 6,900 pairs repeat 6 or 7 times."""
    assert len({data.train_problem(0, 0, i, "2").operands for i in range(300)}) > 280


@pytest.mark.parametrize(
    "digits, lengths_a, lengths_b",
    [("2", {2}, {2}), ("3", {3}, {3}), ("2x3", {2}, {3}), ("6", {6}, {6})]
    + [("2-3", {2, 3}, {2, 3}), ("1-2x4", {1, 2}, {4})],
)
def test_operands_have_the_digits_asked_for(digits, lengths_a, lengths_b):
    """Guards against 10**n as an operand of n digits, a and b exchanged, and a range whose end is never drawn."""
    problems = [data.train_problem(3, 0, i, digits) for i in range(400)] + data.eval_problems(100, digits)
    assert {len(str(p.operands[0])) for p in problems} == lengths_a
    assert {len(str(p.operands[1])) for p in problems} == lengths_b
    assert all(p.answer == p.operands[0] * p.operands[1] for p in problems)
    shares = [sum(len(str(p.operands[0])) == n for p in problems) / len(problems) for n in lengths_a]
    assert all(abs(share - 1 / len(lengths_a)) < 0.1 for share in shares)  # digits first, or 2-3 would be all 3


def test_parse_digits():
    assert data.parse_digits("2") == ((2, 2), (2, 2)) == data.parse_digits(2)
    assert data.parse_digits("2x3") == ((2, 2), (3, 3))
    assert data.parse_digits("2-3") == ((2, 3), (2, 3))
    assert data.parse_digits("1-2x4") == ((1, 2), (4, 4))
    assert data.parse_digits("1-2x4-6") == ((1, 2), (4, 6))


GARBAGE = ["0", "7", "x", "2x", "x2", "3-2", "", "2x3x4", "2x0", "2x3-2", "1-7", "22", "-1", "2.0", " 2", "2-"]
GARBAGE += ["2-0", "2x3-0", "٢"]


@pytest.mark.parametrize("digits", GARBAGE)
def test_parse_digits_refuses_garbage_in_one_line(digits):
    """Guards against ranges that hold nothing, against `hi or lo`, which reads '2-0' as '2', and other digits than
    0-9."""
    with pytest.raises(ValueError) as error:
        data.parse_digits(digits)
    assert len(str(error.value).splitlines()) == 1 and f"--digits {digits}:" in str(error.value)


def test_difficulty_at_its_boundaries():
    """Guards against <= for < at a power of ten."""
    assert data.difficulty(27, 37) == "easy"  # 999
    assert data.difficulty(10, 100) == "medium"  # 1,000
    assert data.difficulty(99, 101) == "medium"  # 9,999
    assert data.difficulty(100, 100) == "hard"  # 10,000
    assert data.difficulty(1, 1) == "easy" and data.difficulty(999_999, 999_999) == "hard"
    assert data.make_problem(25, 40).difficulty == "medium"


@pytest.mark.parametrize("style", ["tinyzero", "terse"])
def test_prompts_name_the_operands_and_never_the_answer(style):
    """Guards against a template that drops or exchanges operands, or gives the answer away."""
    rng = random.Random(2)
    for _ in range(200):
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        problem = data.make_problem(a, b, style)
        assert re.findall(r"\d{3,}", problem.text) == [str(a), str(b)]
        assert problem.answer == a * b and problem.text == problem.prompt + problem.prefill


def test_prefills():
    """Guards against a prompt that opens <think> out of the reward's sight: nothing would ever be well-formed."""
    problem = data.make_problem(34, 12, "tinyzero")
    assert problem.prefill == "<think>" and problem.text.endswith("step by step.\n<think>")
    assert "<answer> 12 </answer>" in problem.prompt and "{" not in problem.text
    assert data.make_problem(34, 12).text == "34*12="
    assert data.make_problem(34, 12, prefill="<think>").text == "34*12=<think>"
    assert data.make_problem(34, 12, "tinyzero", prefill="").prefill == ""  # '' is a wish, not an absence
    assert all(p.prefill == "<think>" for p in data.eval_problems(5, prefill="<think>"))


# ------------------------------------------------------------------------------------------- problems from a file


def write(folder, *lines):
    path = folder / "task.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_good_file(tmp_path):
    """Blank lines are skipped, answers may be text, and what is not given has a default."""
    path = write(
        tmp_path,
        '{"prompt": "2+2=", "answer": 4}',
        "",
        '{"prompt": "é=", "answer": "-17", "difficulty": "odd", "prefill": "<think>"}',
        "   ",
    )
    first, second = data.read_problems(path)
    assert first == data.Problem("2+2=", 4, "all", "", ())
    assert second == data.Problem("é=", -17, "odd", "<think>", ())
    assert [p.prefill for p in data.read_problems(path, prefill="<x>")] == ["<x>", "<x>"]


GOOD = '{"prompt": "2+2=", "answer": 4}'
BAD_ANSWERS = ["true", "false", "3.5", "4.0", "null", '"four"', '""', '"1,204"', '"1_000"', "[4]", "NaN", "1e3"]


@pytest.mark.parametrize(
    "bad, says",
    [
        ('{"prompt": "x", "answer": 4', "not JSON"),
        ("prompt, answer", "not JSON"),
        ('{"prompt": "x"}', "answer is missing"),
        ('{"answer": 4}', "prompt is missing"),
        ('["x", 4]', "object"),
        ('{"prompt": "", "answer": 4}', "prompt"),
        ('{"prompt": 5, "answer": 4}', "prompt"),
        ('{"prompt": "x", "answer": 4, "prefill": null}', "prefill"),
        pytest.param('{"prompt": "x", "answer": %s}' % ("9" * 5_000), "", id="5000 digits"),
        pytest.param('{"prompt": "x", "answer": "%s"}' % ("9" * 5_000), "", id="5000 digits as text"),
        *[('{"prompt": "x", "answer": %s}' % answer, "whole number") for answer in BAD_ANSWERS],
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, says):
    """Guards against a traceback, a wrong line number after a blank line, and true read as 1."""
    path = write(tmp_path, GOOD, "", bad, GOOD)
    with pytest.raises(ValueError) as error:
        data.read_problems(path)
    assert f"{path}, line 3:" in str(error.value) and says in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_without_problems(tmp_path):
    """Guards against a run that divides by zero problems; a file that is not there is an OSError."""
    for lines in ((), ("", "  ")):
        with pytest.raises(ValueError, match="no problems"):
            data.read_problems(write(tmp_path, *lines))
    with pytest.raises(OSError):
        data.read_problems(tmp_path / "none.jsonl")


@pytest.mark.parametrize("size, per_iteration", [(12, 5), (12, 12), (7, 20), (1, 3)])
def test_pick_problem_covers_every_problem_once_an_epoch(size, per_iteration):
    """Guards against drawing with replacement, and against an order that restarts with each iteration."""
    problems = [data.Problem(f"{i}=", i) for i in range(size)]
    places = [divmod(step, per_iteration) for step in range(6 * size)]
    picked = [data.pick_problem(problems, 0, iteration, index, per_iteration) for iteration, index in places]
    epochs = [tuple(p.answer for p in picked[e * size : (e + 1) * size]) for e in range(6)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 1:
        assert len(set(epochs)) == 6
        assert epochs[0] != tuple(data.pick_problem(problems, 1, 0, i, size).answer for i in range(size))


def test_statistics_by_hand():
    problems = [data.make_problem(10, 20), data.make_problem(50, 60), data.make_problem(99, 11)]
    stats = data.statistics(problems)
    assert stats["problems"] == 3 and stats["difficulty"] == {"easy": 1, "medium": 2}
    assert stats["operands"] == (10, 99) and stats["answers"] == (200, 3000)
    assert stats["prompt"] == (6, 6)


# --------------------------------------------------------------------------------------------------- the script


def test_script_succeeds(tmp_path):
    """`python data.py` and `--file` print and exit 0."""
    made, read = run(), run("--file", str(write(tmp_path, GOOD)))
    assert (made.returncode, read.returncode) == (0, 0) and made.stderr == read.stderr == ""
    assert "easy" in made.stdout and "'problems': 1" in read.stdout


@pytest.mark.parametrize(
    "arguments", [("--digits", "7"), ("--n", "600"), ("--n", "0"), ("--file", "none.jsonl")], ids=" ".join
)
def test_script_refuses_in_one_line(arguments):
    """Guards against a traceback for a mistyped flag."""
    result = run(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr


def test_the_file_can_be_copied_alone(tmp_path):
    """Guards against an import of a sibling."""
    shutil.copy(ROOT / "data.py", tmp_path)
    code = "import data; print(data.train_problem(0, 0, 0).answer)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={})
    assert result.returncode == 0 and int(result.stdout) > 0, result.stderr
