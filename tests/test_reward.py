"""reward.py: only a whole number in the last answer block outside of thought counts, and no small term can reorder."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reward import Reward, parse_answer, parse_number, well_formed

ROOT = Path(__file__).resolve().parent.parent
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BROKEN = ("<answer", "answer>", "< answer>", "<ANSWER>", "</ answer>", "<<answer>>", "<", ">", "</", "<think/>")
TEXT = (
    "408",
    " 408 ",
    "-7",
    "+12",
    "1,204",
    "4 08",
    "12,34",
    "007",
    "0",
    "3.5",
    "",
    " ",
    "\n",
    "x",
    "４０８",
    "34*12=",
)


def tag_soup(rng):
    """Random completions, mostly tags; half of them begin as the prefill does."""
    pieces = rng.choices(TAGS * 6 + BROKEN + TEXT * 3, k=rng.randrange(12))
    return rng.choice(("", "<think>")) + "".join(pieces)


def likely(rng):
    """Random completions that are close to the format asked for."""
    thought = rng.choice(("", "<think>a<b\nc</think>", "<think><answer>5</answer></think>", "<think>", "</think>", " "))
    forms = ("<answer>%s</answer>", "<answer>%s</answer>\n", "<answer>%s", "%s", "<answer>%s</answer>.")
    answers = "".join(rng.choice(forms) % rng.choice(TEXT) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    return rng.choice(("", " ", "so ")) + thought + rng.choice(("", "\n", "!")) + answers


# ---------------------------------------------------- the parser once more, slowly and by other means: no regex


def slow_number(text):
    while text and text[0] in " \t\r\n":
        text = text[1:]
    while text and text[-1] in " \t\r\n":
        text = text[:-1]
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not digits or any(character not in "0123456789," for character in digits):
        return None
    groups = digits.split(",")
    if len(groups) > 1 and not (1 <= len(groups[0]) <= 3 and all(len(group) == 3 for group in groups[1:])):
        return None
    joined = "".join(groups)
    if joined[0] == "0" and joined != "0":
        return None
    value = 0
    for digit in joined:
        value = 10 * value + "0123456789".index(digit)
    return -value if text[0] == "-" else value


def slow_answer(completion):
    """One walk from left to right.  </think> makes thought of all that came before, <think> of all that follows."""
    found, opened, thinking, at = [], None, False, 0
    while at < len(completion):
        tag = next((tag for tag in TAGS if completion.startswith(tag, at)), None)
        if tag == "<think>":
            thinking, opened = True, None
        elif tag == "</think>":
            found, thinking, opened = [], False, None
        elif tag == "<answer>":
            opened = at + len(tag)
        elif tag == "</answer>":
            if opened is not None and not thinking:
                found.append(completion[opened:at])
            opened = None
        elif completion[at] in "<>":
            opened = None
        at += len(tag) if tag else 1
    numbers = [slow_number(text) for text in found if slow_number(text) is not None]
    return numbers[-1] if numbers else None


def slow_well_formed(completion):
    rest = completion.strip()
    if rest.startswith("<think>"):
        thought, closed, rest = rest[len("<think>") :].partition("</think>")
        if not closed or any(tag in thought for tag in TAGS):
            return False
        rest = rest.lstrip()
    if not (rest.startswith("<answer>") and rest.endswith("</answer>")):
        return False
    inside = rest[len("<answer>") : -len("</answer>")]
    return "<" not in inside and ">" not in inside and slow_number(inside) is not None


# ------------------------------------------------------------------------------------------------------ numbers


def test_numbers_in_every_accepted_form():
    """Plain, signed, padded with white space and with thousands separators, all of one number."""
    rng = random.Random(0)
    for _ in range(2_000):
        number = rng.randint(-1, 1) * rng.randrange(10 ** rng.randint(1, 13))
        sign = "+" if number > 0 and rng.random() < 0.5 else ""
        for text in (f"{number}", f"{number:,}"):
            padded = rng.choice(("", " ", "\n", "\t ")) + sign + text + rng.choice(("", " ", "\r\n"))
            assert parse_number(padded) == number


@pytest.mark.parametrize(
    "text",
    ["", " ", "+", "-", "--4", "+-4", "- 4", "4 08", "4\n08", "4\u00a008", "12,34", "1,2345", "1234,567", ",408"]
    + ["408,", "1,,204", "1,204,5", "0,123", "007", "00", "-08", "3.5", "408.", "408.0", "4e2", "1_000", "0x198"]
    + ["34*12", "４０８", "٤٠٨", "4²", "−4", "408x", "=408", "(408)", "$408", "four", "nan", "inf", "4\x00"]
    + ["__import__('os')"],
)
def test_everything_else_is_refused(text):
    """Guards against int(), float() and eval(), which take '1_000', '４０８', ' 4e2' and '34*12'; and against
    dropping what does not fit, by which '4 08', '12,34' and '408.0' would be right."""
    assert parse_number(text) is None
    assert parse_answer(f"<answer>{text}</answer>") is None


def test_leading_zeros_are_refused_whatever_the_number():
    """Guards against endlessly many spellings of one right answer, which a search for distinct ones would collect."""
    rng = random.Random(1)
    for _ in range(300):
        number, zeros = rng.randrange(10**6), "0" * rng.randint(1, 5)
        assert parse_number(zeros + str(number)) is None and parse_number("-" + zeros + str(number)) is None
    assert parse_number("0") == 0


def test_random_digit_strings_agree_with_the_slow_parser():
    """Guards against separators in the wrong places, which a list of examples may miss."""
    rng = random.Random(2)
    accepted = 0
    for _ in range(20_000):
        text = "".join(rng.choices("0123,,+- ", weights=(3, 5, 5, 5, 3, 3, 1, 1, 1), k=rng.randrange(9)))
        assert parse_number(text) == slow_number(text), repr(text)
        accepted += slow_number(text) is not None
    assert accepted > 2_000


def test_a_very_long_number_is_no_crash():
    """Guards against int(): Python refuses more than 4,300 digits with a ValueError, and a run would end by it."""
    completion = f"<answer>{'9' * 5_000}</answer>"
    assert not Reward()(completion, 408)["correct"]
    well_formed(completion)


# ------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("<answer>408</answer>", 408),
        ("<answer>1</answer> no, <answer>408</answer>", 408),  # the last one
        ("<answer>408</answer><answer>four</answer>", 408),  # the last that holds a number
        ("<answer>408</answer><answer>9", 408),
        ("<think>34</think><answer>408</answer>", 408),
        ("<think><answer>408</answer></think>", None),
        ("<think><answer>408</answer></think><answer>1</answer>", 1),
        ("<think><answer>408</answer>", None),
        ("<answer>408</answer><think><answer>1</answer>", 408),
        ("<answer>408</answer></think>", None),  # the prompt opened <think>: still thought
        ("<think>a<think>b</think><answer>408</answer>", 408),
        ("<think>a</think><think><answer>1</answer>", None),
        ("<answer>1<answer>408</answer>", 408),  # nested
        ("<answer>408</answer>1</answer>", 408),
        ("<answer><b>408</b></answer>", None),
        ("<answer>40<think></think>8</answer>", None),
        ("<answer>408<think></answer>", None),
        ("<ANSWER>408</ANSWER>", None),
        ("< answer>408</answer>", None),
        ("<answer>408", None),
        ("408", None),
        ("", None),
    ],
)
def test_answers_by_hand(completion, answer):
    """Guards against the first block, a block in a thought, a greedy match over two blocks, and bare numbers."""
    assert parse_answer(completion) == slow_answer(completion) == answer


def test_an_answer_in_a_thought_never_counts():
    """However the thought goes on, closed or not; guards against `search` over the whole completion."""
    rng = random.Random(3)
    for _ in range(3_000):
        inside = tag_soup(rng).replace("</think>", "")
        assert parse_answer(f"<think>{inside}<answer>408</answer>") is None
        assert parse_answer(f"<think>{inside}<answer>408</answer>{inside}</think>tail") is None
        assert parse_answer(f"<think>{inside}</think><answer>408</answer>") == 408


def test_tag_soup_agrees_with_the_slow_parser_and_never_raises():
    """Guards against whatever the hand-made cases above did not think of."""
    rng = random.Random(4)
    numbers = formed = 0
    for _ in range(20_000):
        completion = rng.choice((tag_soup, likely))(rng)
        assert parse_answer(completion) == slow_answer(completion), repr(completion)
        assert well_formed(completion) == slow_well_formed(completion), repr(completion)
        numbers += slow_answer(completion) is not None
        formed += slow_well_formed(completion)
    assert numbers > 1_000 and formed > 200  # the generator reaches what it is for


@pytest.mark.parametrize(
    "completion, formed",
    [
        ("<think>34*10=340</think><answer>408</answer>", True),
        ("\n<think>a < b\n</think>\n\n<answer> 1,204 </answer>\n", True),
        ("<answer>-3</answer>", True),
        ("<think></think><answer>408</answer>", True),
        ("<think>a</think><answer>408</answer> so there", False),
        ("so <think>a</think><answer>408</answer>", False),
        ("<think>a</think>so<answer>408</answer>", False),
        ("<think>a</think><think>b</think><answer>408</answer>", False),
        ("<think>a<think>b</think><answer>408</answer>", False),
        ("<think><answer>1</answer></think><answer>408</answer>", False),
        ("<answer>1</answer><answer>408</answer>", False),
        ("<think>a</think><answer>four</answer>", False),
        ("<think>a</think><answer></answer>", False),
        ("<think>a</think>", False),
        ("a</think><answer>408</answer>", False),  # what a reward that does not see the prefill would have to accept
    ],
)
def test_well_formed_by_hand(completion, formed):
    """Guards against a bonus for two answers, for text around the answer, and for a format without a number."""
    assert well_formed(completion) == formed


ADVERSARIAL = """
from reward import Reward
n = 20_000
for piece in ("<think>", "</think>", "<answer>", "</answer>", "<answer>1", "<think>a", "<", "1", "1,", "1,000",
              "<think></think>", "<answer>1</answer>", "<answer></answer>", "<think> </think> ", " ", "\\n"):
    text = piece * (n if piece.strip() else 10 * n)
    for completion in (text, "<think>" + text, text + "</answer>", "<answer>" + text,
                       "<answer>" + text + "</answer>", "<think>" + text + "</think>",
                       "<think></think>" + text, "<answer>1</answer>" + text):
        Reward()(completion, 408)
print("done")
"""


def test_long_adversarial_completions_finish():
    """Guards against a regular expression that backtracks: quadratic ones need minutes here, linear ones a second.
    In a process of its own, so that a hang ends as a failure."""
    result = subprocess.run([sys.executable, "-c", ADVERSARIAL], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert result.stdout == "done\n", result.stderr


# ------------------------------------------------------------------------------------------------------- reward


def random_settings(rng):
    """Sizes of the two terms: often zero, often close to the limit."""
    bonus = rng.choice((0.0, rng.random(), 2 * rng.random(), 1.999999))
    penalty = rng.choice((0.0, rng.random() * (2 - bonus), (2 - bonus) * 0.999999))
    return Reward(bonus, penalty)


def test_rewards_by_hand():
    """Guards against a dropped term, a wrong sign, and a bonus for format that overrules the truth."""
    reward = Reward(format_bonus=0.25, length_penalty=0.5)
    right = "<think>a</think><answer>408</answer>"
    assert reward(right, 408) == {"reward": 1.25, "correct": True, "formatted": True, "answer": 408}
    assert reward(right, 408, length_fraction=0.5)["reward"] == 1.0
    assert reward(right, 407) == {"reward": -0.75, "correct": False, "formatted": True, "answer": 408}
    assert reward(right + "!", 408)["reward"] == 1.0
    assert reward("408", 408, 1.0) == {"reward": -1.5, "correct": False, "formatted": False, "answer": None}
    assert Reward()(right, 408, length_fraction=1.0)["reward"] == 1.1  # no penalty unless asked for
    assert reward("<answer>0</answer>", 0)["correct"]  # 0 is an answer, not the absence of one


def test_no_setting_lets_a_wrong_completion_beat_a_right_one():
    """Guards against a length penalty that swamps the reward."""
    rng = random.Random(5)
    for _ in range(300):
        reward, right, wrong = random_settings(rng), [], []
        for _ in range(40):
            completion, fraction = rng.choice((tag_soup, likely))(rng), rng.choice((0.0, 1.0, rng.random()))
            result = reward(completion, rng.choice((408, -7, 0)), fraction)
            (right if result["correct"] else wrong).append(result["reward"])
        right.append(reward("408 <answer>408</answer>", 408, 1.0)["reward"])  # the worst there is
        wrong.append(reward("<answer>409</answer>", 408, 0.0)["reward"])  # the best there is
        assert min(right) > max(wrong)


def test_bounds_are_attained_and_never_exceeded():
    """Guards against an r_hi typed as 1: the soft value would be asked for the logarithm of a negative number."""
    rng = random.Random(6)
    for _ in range(300):
        reward = random_settings(rng)
        r_lo, r_hi = reward.bounds
        assert reward("<answer>408</answer>", 408, 0.0)["reward"] == r_hi
        assert reward("408", 408, 1.0)["reward"] == r_lo
        for _ in range(20):
            completion = rng.choice((tag_soup, likely))(rng)
            assert r_lo <= reward(completion, 408, rng.random(), rng.random() < 0.2)["reward"] <= r_hi


@pytest.mark.parametrize("bonus, penalty", [(2.0, 0.0), (0.0, 2.0), (1.0, 1.0), (0.5, 1.6), (-0.1, 0.0), (0.0, -0.1)])
def test_settings_that_could_reorder_are_refused(bonus, penalty):
    with pytest.raises(ValueError) as error:
        Reward(bonus, penalty)
    assert "--format-bonus" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_settings_that_are_no_numbers_are_refused():
    """Guards against comparisons written so that nan passes them."""
    for bad in (float("nan"), float("inf")):
        for settings in ((bad, 0.0), (0.0, bad)):
            with pytest.raises(ValueError):
                Reward(*settings)


def test_a_truncated_completion_is_never_right_nor_formatted():
    """Guards against a completion cut behind a lucky </answer>: it never chose to end there."""
    rng = random.Random(7)
    reward = Reward(0.3, 0.2)
    for _ in range(500):
        result = reward(likely(rng), 408, 1.0, truncated=True)
        assert result == {"reward": -1.2, "correct": False, "formatted": False, "answer": None}


def test_script_runs_and_the_file_can_be_copied_alone(tmp_path):
    """Guards against an import of a sibling, and against a demo whose assertions no longer hold."""
    shutil.copy(ROOT / "reward.py", tmp_path)
    result = subprocess.run([sys.executable, "reward.py"], cwd=tmp_path, capture_output=True, text=True, env={})
    assert result.returncode == 0 and "ok" in result.stdout, result.stderr
    code = "import reward; print(reward.Reward().bounds)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={})
    assert result.stdout == "(-1.0, 1.1)\n", result.stderr
