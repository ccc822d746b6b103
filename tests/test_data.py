"""data.py: the split, the problems, reading of files, and the script.

The split does not leak. A problem is a pure function of its numbers. Bad input is named in one
line.
"""

import itertools
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


def run_script(*arguments):
    """`python data.py ...` -> its completed process."""
    command = [sys.executable, str(ROOT / "data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def unordered_pairs(problems):
    return {frozenset(problem.operands) for problem in problems}


def held_out_in_both_orders(problem):
    a, b = problem.operands
    return data.is_held_out(a, b) and data.is_held_out(b, a)


def held_out_in_any_order(problem):
    a, b = problem.operands
    return data.is_held_out(a, b) or data.is_held_out(b, a)


# ---------------------------------------------------------------------------------------- The split


@pytest.mark.parametrize("digits", RANGES)
def test_no_training_draw_is_held_out_in_either_order(digits):
    """Guards against a split by ordered pair: 34*12 in evaluation and 12*34 in training."""
    n = 8 if digits == "1" else 100
    held_out = data.eval_problems(n, digits)
    assert all(held_out_in_both_orders(problem) for problem in held_out)
    draws = [data.train_problem(seed, seed % 3, i, digits) for seed in range(8) for i in range(150)]
    assert not any(held_out_in_any_order(problem) for problem in draws)
    assert unordered_pairs(draws).isdisjoint(unordered_pairs(held_out))


@pytest.mark.parametrize(
    "evaluated, trained", [("2", "2"), ("1x2", "2x1"), ("1x2", "1-2"), ("1-2", "1x2"), ("1", "1-2")]
)
def test_evaluation_set_and_training_are_disjoint_across_ranges(evaluated, trained):
    """The same without trusting is_held_out, on ranges so small that a leak would be drawn often.

    Guards against a split that depends on the range: one may train on another range than one
    evaluates on.
    """
    held_out = data.eval_problems(8 if evaluated == "1" else 110, evaluated)
    draws = [data.train_problem(seed, 0, i, trained) for seed in range(4) for i in range(1_000)]
    assert unordered_pairs(draws).isdisjoint(unordered_pairs(held_out))


def test_training_covers_all_that_is_not_held_out():
    """Guards against a split that throws away more than it evaluates on."""
    drawn = {data.train_problem(0, 0, i, "1").operands for i in range(3_000)}
    every_pair = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    assert drawn == {pair for pair in every_pair if not data.is_held_out(*pair)}


@pytest.mark.parametrize("digits", RANGES)
def test_evaluation_pairs_are_distinct_and_a_prefix_of_more(digits):
    """Guards against a set whose members change with its size, and a*b and b*a in one set."""
    sizes = {"1": (8, 3), "2": (110, 40)}
    many, few = sizes.get(digits, (500, 100))
    problems = data.eval_problems(many, digits)
    assert len(unordered_pairs(problems)) == len(problems) == many
    assert data.eval_problems(few, digits) == problems[:few]


def test_evaluation_set_is_fixed_for_good():
    """Guards against any change of hash or generator.

    The numbers of two versions would no longer be comparable.
    """
    two_digits = [problem.operands for problem in data.eval_problems(4, "2")]
    assert two_digits == [(12, 38), (76, 46), (92, 27), (87, 46)]
    three_digits = [problem.operands for problem in data.eval_problems(3, "3")]
    assert three_digits == [(400, 782), (515, 454), (480, 826)]
    assert [problem.operands for problem in data.eval_problems(4, "2", seed=1)] != two_digits
    random.seed(5)  # and against a draw from the global generator
    assert data.eval_problems(1, "2")[0].operands == (12, 38)


@pytest.mark.parametrize("digits", ["1", "2", "1x2", "1-2"])
def test_asking_for_too_many_evaluation_problems_says_how_many_there_are(digits):
    """Guards against an endless loop, a short list, and giving up before all pairs were seen."""
    (a_least, a_most), (b_least, b_most) = data.parse_digits(digits)
    all_a = range(10 ** (a_least - 1), 10**a_most)
    all_b = range(10 ** (b_least - 1), 10**b_most)
    held_out = {frozenset((a, b)) for a in all_a for b in all_b if data.is_held_out(a, b)}
    exist = len(held_out)
    says = f"holds only {exist} evaluation problems, fewer than the {exist + 1} asked"
    with pytest.raises(ValueError, match=says):
        data.eval_problems(exist + 1, digits)
    assert len(data.eval_problems(exist, digits)) == exist


def test_a_negative_number_of_evaluation_problems_is_refused():
    """Guards against `found == n` as the only stop: -1 returned whatever the loop had found."""
    for n in (0, -1):
        with pytest.raises(ValueError, match="must lie in"):
            data.eval_problems(n, "2")


# ------------------------------------------------------------------------------------- The problems


def test_a_training_problem_is_a_pure_function_of_seed_iteration_and_index():
    """Guards against random state: a resumed or distributed run would see other problems."""
    rng = random.Random(1)
    cases = [(rng.randrange(99), rng.randrange(99), rng.randrange(999)) for _ in range(200)]
    forward = [data.train_problem(*case) for case in cases]
    random.seed(0)
    assert [data.train_problem(*case) for case in reversed(cases)] == forward[::-1]


def test_seed_iteration_and_index_each_matter_and_do_not_run_together():
    """Guards against a seed of f"{seed}{iteration}{index}", where (1, 23, 4) is (12, 3, 4).

    And against seed + index. With 6 digits a pair has 1 chance in 8e11, so two equal pairs mean two
    equal generators.
    """
    iterations = (0, 1, 2, 3, 12, 23)
    indices = (0, 1, 2, 3, 4, 34, 234)
    cases = list(itertools.product(range(13), iterations, indices))
    drawn = {data.train_problem(*case, digits="6").operands for case in cases}
    assert len(drawn) == len(cases)


def test_the_problems_of_one_iteration_differ():
    """Guards against an index that is not read. 300 draws of 6,900 pairs repeat 6 or 7 times."""
    drawn = {data.train_problem(0, 0, i, "2").operands for i in range(300)}
    assert len(drawn) > 280


@pytest.mark.parametrize(
    "digits, lengths_a, lengths_b",
    [
        ("2", {2}, {2}),
        ("3", {3}, {3}),
        ("2x3", {2}, {3}),
        ("6", {6}, {6}),
        ("2-3", {2, 3}, {2, 3}),
        ("1-2x4", {1, 2}, {4}),
    ],
)
def test_operands_have_the_digits_asked_for(digits, lengths_a, lengths_b):
    """Guards against 10**n as an operand of n digits, and against a and b exchanged.

    And against a range whose end is never drawn.
    """
    problems = [data.train_problem(3, 0, i, digits) for i in range(400)]
    problems += data.eval_problems(100, digits)
    digits_of_a = [len(str(problem.operands[0])) for problem in problems]
    digits_of_b = [len(str(problem.operands[1])) for problem in problems]
    assert set(digits_of_a) == lengths_a
    assert set(digits_of_b) == lengths_b
    for problem in problems:
        assert problem.answer == problem.operands[0] * problem.operands[1]
    # The number of digits is drawn first. Otherwise nine in ten operands of 2-3 would have 3.
    for n in lengths_a:
        share = digits_of_a.count(n) / len(problems)
        assert abs(share - 1 / len(lengths_a)) < 0.1


def test_parse_digits():
    assert data.parse_digits("2") == ((2, 2), (2, 2)) == data.parse_digits(2)
    assert data.parse_digits("2x3") == ((2, 2), (3, 3))
    assert data.parse_digits("2-3") == ((2, 3), (2, 3))
    assert data.parse_digits("1-2x4") == ((1, 2), (4, 4))
    assert data.parse_digits("1-2x4-6") == ((1, 2), (4, 6))


NO_RANGE = ["0", "7", "3-2", "1-7", "2x0", "2x3-2", "2-0", "2x3-0"]
NO_SYNTAX = ["", "x", "2x", "x2", "2-", "2x3x4", "22", "-1", "2.0", " 2", "٢"]


@pytest.mark.parametrize("digits", NO_RANGE + NO_SYNTAX)
def test_parse_digits_refuses_garbage_in_one_line(digits):
    """Guards against ranges that hold nothing, and against other digits than 0-9.

    And against `most or least`, which reads '2-0' as '2'.
    """
    with pytest.raises(ValueError) as error:
        data.parse_digits(digits)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert f"--digits {digits}:" in message


def test_difficulty_at_its_boundaries():
    """Guards against <= for < at a power of ten."""
    assert data.difficulty(27, 37) == "easy"  # 999
    assert data.difficulty(10, 100) == "medium"  # 1,000
    assert data.difficulty(99, 101) == "medium"  # 9,999
    assert data.difficulty(100, 100) == "hard"  # 10,000
    assert data.difficulty(1, 1) == "easy"
    assert data.difficulty(999_999, 999_999) == "hard"
    assert data.make_problem(25, 40).difficulty == "medium"


@pytest.mark.parametrize("style", ["tinyzero", "terse"])
def test_prompts_name_the_operands_and_never_the_answer(style):
    """Guards against a template that drops or exchanges operands, or gives the answer away."""
    rng = random.Random(2)
    for _ in range(200):
        a = rng.randint(100, 999)
        b = rng.randint(100, 999)
        problem = data.make_problem(a, b, style)
        assert re.findall(r"\d{3,}", problem.text) == [str(a), str(b)]
        assert problem.answer == a * b
        assert problem.text == problem.prompt + problem.prefill


def test_prefills():
    """Guards against a <think> that the prompt opens and the reward does not see.

    Then no completion would ever be well-formed.
    """
    problem = data.make_problem(34, 12, "tinyzero")
    assert problem.prefill == "<think>"
    assert problem.text.endswith("step by step.\n<think>")
    assert "<answer> 12 </answer>" in problem.prompt
    assert "{" not in problem.text
    assert data.make_problem(34, 12).text == "34*12="
    assert data.make_problem(34, 12, prefill="<think>").text == "34*12=<think>"
    # The empty text asks for no prefill; only None asks for the style's own.
    assert data.make_problem(34, 12, "tinyzero", prefill="").prefill == ""
    for problem in data.eval_problems(5, prefill="<think>"):
        assert problem.prefill == "<think>"


# ----------------------------------------------------------------------------- Problems from a file


def write_file(folder, *lines):
    """A file of these lines, task.jsonl; returns its path."""
    path = folder / "task.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_good_file(tmp_path):
    """Blank lines are skipped, answers may be text, and what is not given has a default."""
    path = write_file(
        tmp_path,
        '{"prompt": "2+2=", "answer": 4}',
        "",
        '{"prompt": "é=", "answer": "-17", "difficulty": "odd", "prefill": "<think>"}',
        "   ",
    )
    first, second = data.read_problems(path)
    assert first == data.Problem("2+2=", 4, "all", "", ())
    assert second == data.Problem("é=", -17, "odd", "<think>", ())
    forced = data.read_problems(path, prefill="<x>")
    assert [problem.prefill for problem in forced] == ["<x>", "<x>"]


GOOD = '{"prompt": "2+2=", "answer": 4}'
BAD_ANSWERS = ["true", "false", "3.5", "4.0", "null", "[4]", "NaN", "1e3"]
BAD_ANSWERS += ['"four"', '""', '"1,204"', '"1_000"']
MANY_DIGITS = "9" * 5_000


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
        pytest.param(f'{{"prompt": "x", "answer": {MANY_DIGITS}}}', "", id="5000 digits"),
        pytest.param(f'{{"prompt": "x", "answer": "{MANY_DIGITS}"}}', "", id="5000 as text"),
        *[(f'{{"prompt": "x", "answer": {answer}}}', "whole number") for answer in BAD_ANSWERS],
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, says):
    """Guards against a traceback, a wrong line number after a blank line, and true read as 1."""
    path = write_file(tmp_path, GOOD, "", bad, GOOD)
    with pytest.raises(ValueError) as error:
        data.read_problems(path)
    message = str(error.value)
    assert f"{path}, line 3:" in message
    assert says in message
    assert len(message.splitlines()) == 1


def test_a_file_without_problems(tmp_path):
    """Guards against a run that divides by zero problems. A file that is missing is an OSError."""
    for lines in ((), ("", "  ")):
        with pytest.raises(ValueError, match="no problems"):
            data.read_problems(write_file(tmp_path, *lines))
    with pytest.raises(OSError):
        data.read_problems(tmp_path / "none.jsonl")


@pytest.mark.parametrize("size, per_iteration", [(12, 5), (12, 12), (7, 20), (1, 3)])
def test_pick_problem_covers_every_problem_once_an_epoch(size, per_iteration):
    """Guards against drawing with replacement, and against a new order with each iteration."""
    problems = [data.Problem(f"{i}=", i) for i in range(size)]
    picked = []
    for step in range(6 * size):
        iteration, index = divmod(step, per_iteration)
        picked.append(data.pick_problem(problems, 0, iteration, index, per_iteration).answer)
    epochs = [tuple(picked[e * size : (e + 1) * size]) for e in range(6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    if size > 1:
        assert len(set(epochs)) == 6
        other_seed = [data.pick_problem(problems, 1, 0, i, size).answer for i in range(size)]
        assert epochs[0] != tuple(other_seed)


def test_statistics_by_hand():
    problems = [data.make_problem(10, 20), data.make_problem(50, 60), data.make_problem(99, 11)]
    stats = data.statistics(problems)
    assert stats["problems"] == 3
    assert stats["difficulty"] == {"easy": 1, "medium": 2}
    assert stats["operands"] == (10, 99)
    assert stats["answers"] == (200, 3000)
    assert stats["prompt"] == (6, 6)


# --------------------------------------------------------------------------------------- The script


def test_script_succeeds(tmp_path):
    """`python data.py` and `--file` print and exit 0."""
    made = run_script()
    assert (made.returncode, made.stderr) == (0, "")
    assert "easy" in made.stdout
    read = run_script("--file", str(write_file(tmp_path, GOOD)))
    assert (read.returncode, read.stderr) == (0, "")
    assert "'problems': 1" in read.stdout


@pytest.mark.parametrize(
    "arguments",
    [("--digits", "7"), ("--n", "600"), ("--n", "0"), ("--file", "none.jsonl")],
    ids=" ".join,
)
def test_script_refuses_in_one_line(arguments):
    """Guards against a traceback for a mistyped flag."""
    result = run_script(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_the_file_can_be_copied_alone(tmp_path):
    """Its demo, --file and its import, in a folder without any other Python file.

    Guards against an import of a sibling.
    """
    shutil.copy(ROOT / "data.py", tmp_path)
    write_file(tmp_path, GOOD)

    def run_alone(*arguments):
        command = [sys.executable, *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={})
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    assert run_alone("data.py").endswith(": ok\n")
    assert "'problems': 1" in run_alone("data.py", "--file", "task.jsonl")
    code = "import data; print(data.train_problem(0, 0, 0).answer)"
    assert int(run_alone("-c", code)) > 0
