"""reward.py: the parser, the built-in reward, and reward.py copied alone.

Only a whole number in the last answer block outside of thought counts. No small term can put a
wrong completion above a right one. (Rewards of one's own: test_own_task.py.)
"""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reward import Reward, parse_answer, parse_number, well_formed

ROOT = Path(__file__).resolve().parent.parent
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BROKEN_TAGS = ("<answer", "answer>", "< answer>", "<ANSWER>", "</ answer>", "<<answer>>")
BROKEN_TAGS += ("<", ">", "</", "<think/>")
TEXT = ("408", " 408 ", "-7", "+12", "1,204", "4 08", "12,34", "007", "0", "3.5")
TEXT += ("", " ", "\n", "x", "４０８", "34*12=")


def tag_soup(rng):
    """Random completions, mostly tags; half of them begin as the prefill does."""
    pieces = rng.choices(TAGS * 6 + BROKEN_TAGS + TEXT * 3, k=rng.randrange(12))
    return rng.choice(("", "<think>")) + "".join(pieces)


def nearly_formatted(rng):
    """Random completions that are close to the format asked for."""
    thoughts = ("", "<think>a<b\nc</think>", "<think><answer>5</answer></think>")
    thoughts += ("<think>", "</think>", " ")
    forms = ("<answer>%s</answer>", "<answer>%s</answer>\n", "<answer>%s", "%s")
    forms += ("<answer>%s</answer>.",)
    thought = rng.choice(thoughts)
    answers = ""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        answers += rng.choice(forms) % rng.choice(TEXT)
    return rng.choice(("", " ", "so ")) + thought + rng.choice(("", "\n", "!")) + answers


def random_completion(rng):
    """One of the two kinds, each as often."""
    kind = rng.choice((tag_soup, nearly_formatted))
    return kind(rng)


# -------------------------------------------- A second parser, slow and without regular expressions


def slow_number(text):
    """parse_number, one character at a time."""
    while text and text[0] in " \t\r\n":
        text = text[1:]
    while text and text[-1] in " \t\r\n":
        text = text[:-1]
    digits = text[1:] if text[:1] in ("+", "-") else text
    if not digits or any(character not in "0123456789," for character in digits):
        return None
    groups = digits.split(",")
    if len(groups) > 1:
        if not 1 <= len(groups[0]) <= 3:
            return None
        if any(len(group) != 3 for group in groups[1:]):
            return None
    joined = "".join(groups)
    if joined[0] == "0" and joined != "0":
        return None
    value = 0
    for digit in joined:
        value = 10 * value + "0123456789".index(digit)
    return -value if text[0] == "-" else value


def slow_answer(completion):
    """One walk from left to right.

    </think> makes thought of all text before it, <think> of all text after it.
    """
    found = []  # texts of the blocks so far
    opened = None  # where the text of an open <answer> begins
    thinking = False
    place = 0
    while place < len(completion):
        tag = ""
        for candidate in TAGS:
            if completion.startswith(candidate, place):
                tag = candidate
        if tag == "<think>":
            thinking = True
            opened = None
        elif tag == "</think>":
            found = []
            thinking = False
            opened = None
        elif tag == "<answer>":
            opened = place + len(tag)
        elif tag == "</answer>":
            if opened is not None and not thinking:
                found.append(completion[opened:place])
            opened = None
        elif completion[place] in "<>":
            opened = None
        place += len(tag) if tag else 1
    answer = None
    for text in found:
        if slow_number(text) is not None:
            answer = slow_number(text)
    return answer


def slow_well_formed(completion):
    """well_formed by str methods."""
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


# ------------------------------------------------------------------------------------------ Numbers


def test_numbers_in_every_accepted_form():
    """Plain, signed, padded with white space and with thousands separators, all of one number."""
    rng = random.Random(0)
    for _ in range(2_000):
        number = rng.randint(-1, 1) * rng.randrange(10 ** rng.choice((3, 8, 13, 90)))
        sign = "+" if number > 0 and rng.random() < 0.5 else ""
        for text in (f"{number}", f"{number:,}"):
            before = rng.choice(("", " ", "\n", "\t "))
            after = rng.choice(("", " ", "\r\n"))
            assert parse_number(before + sign + text + after) == number


BARE = ["", " ", "+", "-", "--4", "+-4", "- 4"]
SPACED = ["4 08", "4\n08", "4\u00a008"]
COMMAS = ["12,34", "1,2345", "1234,567", ",408", "408,", "1,,204", "1,204,5", "0,123"]
ZEROS = ["007", "00", "-08"]
NOTATIONS = ["3.5", "408.", "408.0", "4e2", "1_000", "0x198", "34*12"]
SCRIPTS = ["４０８", "٤٠٨", "4²", "−4"]
WORDS = ["408x", "=408", "(408)", "$408", "four", "nan", "inf", "4\x00", "__import__('os')"]


@pytest.mark.parametrize("text", BARE + SPACED + COMMAS + ZEROS + NOTATIONS + SCRIPTS + WORDS)
def test_everything_else_is_refused(text):
    """Guards against int(), float() and eval(): they take '1_000', '４０８', ' 4e2' and '34*12'.

    And against dropping what does not fit, by which '4 08', '12,34' and '408.0' would be right.
    """
    assert parse_number(text) is None
    assert parse_answer(f"<answer>{text}</answer>") is None


def test_leading_zeros_are_refused_whatever_the_number():
    """Guards against endlessly many spellings of one right answer.

    A search for distinct completions would collect them.
    """
    rng = random.Random(1)
    for _ in range(300):
        number = rng.randrange(10**6)
        zeros = "0" * rng.randint(1, 5)
        assert parse_number(f"{zeros}{number}") is None
        assert parse_number(f"-{zeros}{number}") is None
    assert parse_number("0") == 0


def test_random_digit_strings_agree_with_the_slow_parser():
    """Guards against separators in the wrong places, which a list of examples may miss."""
    rng = random.Random(2)
    accepted = 0
    for _ in range(20_000):
        length = rng.randrange(9)
        characters = rng.choices("0123,,+- ", weights=(3, 5, 5, 5, 3, 3, 1, 1, 1), k=length)
        text = "".join(characters)
        assert parse_number(text) == slow_number(text), repr(text)
        accepted += slow_number(text) is not None
    assert accepted > 2_000


def test_a_very_long_number_is_no_crash():
    """Guards against int(): Python refuses more than 4,300 digits with a ValueError."""
    completion = f"<answer>{'9' * 5_000}</answer>"
    assert not Reward()(completion, 408)["correct"]
    well_formed(completion)


# ------------------------------------------------------------------------------------------ Answers


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
    """Guards against the first block, a block in a thought, and a number without a block.

    And against a greedy match over two blocks.
    """
    assert parse_answer(completion) == slow_answer(completion) == answer


def test_an_answer_in_a_thought_never_counts():
    """However the thought goes on, closed or not.

    Guards against `search` over the whole completion.
    """
    rng = random.Random(3)
    for _ in range(3_000):
        inside = tag_soup(rng).replace("</think>", "")
        assert parse_answer(f"<think>{inside}<answer>408</answer>") is None
        assert parse_answer(f"<think>{inside}<answer>408</answer>{inside}</think>tail") is None
        assert parse_answer(f"<think>{inside}</think><answer>408</answer>") == 408


def test_tag_soup_agrees_with_the_slow_parser_and_never_raises():
    """Guards against whatever the cases made by hand above left out."""
    rng = random.Random(4)
    numbers = 0
    formed = 0
    for _ in range(20_000):
        completion = random_completion(rng)
        assert parse_answer(completion) == slow_answer(completion), repr(completion)
        assert well_formed(completion) == slow_well_formed(completion), repr(completion)
        numbers += slow_answer(completion) is not None
        formed += slow_well_formed(completion)
    # The generator reaches both: completions with an answer, and well-formed ones.
    assert numbers > 1_000
    assert formed > 200


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
        # A reward that does not see the prefill would have to accept this one.
        ("a</think><answer>408</answer>", False),
    ],
)
def test_well_formed_by_hand(completion, formed):
    """Guards against a bonus for two answers, for text around the answer, and without a number."""
    assert well_formed(completion) == formed


ADVERSARIAL = """
from reward import Reward

pieces = ["<think>", "</think>", "<answer>", "</answer>", "<answer>1", "<think>a", "<"]
pieces += ["1", "1,", "1,000", " ", "\\n"]
pieces += ["<think></think>", "<answer>1</answer>", "<answer></answer>", "<think> </think> "]
for piece in pieces:
    text = piece * (20_000 if piece.strip() else 200_000)
    completions = [text, "<think>" + text, text + "</answer>", "<answer>" + text]
    completions += ["<answer>" + text + "</answer>", "<think>" + text + "</think>"]
    completions += ["<think></think>" + text, "<answer>1</answer>" + text]
    for completion in completions:
        Reward()(completion, 408)
print("done")
"""


def test_long_adversarial_completions_finish():
    """Guards against a regular expression that backtracks.

    Quadratic ones need minutes here, linear ones a second. In a process of its own, so that a hang
    ends as a failure.
    """
    command = [sys.executable, "-c", ADVERSARIAL]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert result.stdout == "done\n", result.stderr


# ------------------------------------------------------------------------------------------- Reward


def random_settings(rng):
    """Sizes of the two terms: often zero, often close to the limit."""
    bonus = rng.choice((0.0, rng.random(), 2 * rng.random(), 1.999999))
    penalty = rng.choice((0.0, rng.random() * (2 - bonus), (2 - bonus) * 0.999999))
    return Reward(bonus, penalty)


def test_rewards_by_hand():
    """Guards against a dropped term, a wrong sign, and a format bonus that overrules the truth."""
    reward = Reward(format_bonus=0.25, length_penalty=0.5)
    right = "<think>a</think><answer>408</answer>"
    verdict = {"reward": 1.25, "correct": True, "formatted": True, "answer": 408}
    assert reward(right, 408) == verdict
    assert reward(right, 408, length_fraction=0.5)["reward"] == 1.0
    verdict = {"reward": -0.75, "correct": False, "formatted": True, "answer": 408}
    assert reward(right, 407) == verdict
    assert reward(right + "!", 408)["reward"] == 1.0
    verdict = {"reward": -1.5, "correct": False, "formatted": False, "answer": None}
    assert reward("408", 408, 1.0) == verdict
    assert Reward()(right, 408, length_fraction=1.0)["reward"] == 1.1  # no penalty unless asked for
    assert reward("<answer>0</answer>", 0)["correct"]  # 0 is an answer, unlike None


def test_no_setting_lets_a_wrong_completion_beat_a_right_one():
    """Guards against a length penalty that swamps the reward."""
    rng = random.Random(5)
    for _ in range(300):
        reward = random_settings(rng)
        # The worst right completion that there is, and the best wrong one.
        right = [reward("408 <answer>408</answer>", 408, 1.0)["reward"]]
        wrong = [reward("<answer>409</answer>", 408, 0.0)["reward"]]
        for _ in range(40):
            completion = random_completion(rng)
            length_fraction = rng.choice((0.0, 1.0, rng.random()))
            result = reward(completion, rng.choice((408, -7, 0)), length_fraction)
            if result["correct"]:
                right.append(result["reward"])
            else:
                wrong.append(result["reward"])
        assert min(right) > max(wrong)


def test_bounds_are_attained_and_never_exceeded():
    """Guards against an r_hi typed as 1: the soft value would take the logarithm of a negative."""
    rng = random.Random(6)
    for _ in range(300):
        reward = random_settings(rng)
        r_lo, r_hi = reward.bounds
        assert reward("<answer>408</answer>", 408, 0.0)["reward"] == r_hi
        assert reward("408", 408, 1.0)["reward"] == r_lo
        for _ in range(20):
            completion = random_completion(rng)
            length_fraction = rng.random()
            truncated = rng.random() < 0.2
            result = reward(completion, 408, length_fraction, truncated)
            assert r_lo <= result["reward"] <= r_hi


@pytest.mark.parametrize(
    "bonus, penalty", [(2.0, 0.0), (0.0, 2.0), (1.0, 1.0), (0.5, 1.6), (-0.1, 0.0), (0.0, -0.1)]
)
def test_settings_that_could_reorder_are_refused(bonus, penalty):
    with pytest.raises(ValueError) as error:
        Reward(bonus, penalty)
    message = str(error.value)
    assert "--format-bonus" in message
    assert len(message.splitlines()) == 1


def test_settings_that_are_no_numbers_are_refused():
    """Guards against comparisons written so that nan passes them."""
    for bad in (float("nan"), float("inf")):
        for settings in ((bad, 0.0), (0.0, bad)):
            with pytest.raises(ValueError):
                Reward(*settings)


def test_a_truncated_completion_is_never_right_nor_formatted():
    """Guards against a completion cut off behind a right </answer>: the model did not end there."""
    rng = random.Random(7)
    reward = Reward(0.3, 0.2)
    for _ in range(500):
        result = reward(nearly_formatted(rng), 408, 1.0, truncated=True)
        assert result == {"reward": -1.2, "correct": False, "formatted": False, "answer": None}


OWN_REWARD = """
def starts_right(problem, completion):
    return float(completion.startswith(problem.answer))

starts_right.bounds = (0.0, 2.0)
"""

LOAD_OWN_REWARD = """
import types

import reward

print(reward.Reward().bounds)
loaded = reward.load_reward("x.py:starts_right")
problem = types.SimpleNamespace(prompt="?", answer="yes")
print(loaded.bounds, loaded.judge(problem, "yes!")["reward"])
"""


def test_script_runs_and_the_file_can_be_copied_alone(tmp_path):
    """Its demo and a reward of one's own, in a folder without a sibling.

    Guards against an import of a sibling, and against a demo whose assertions no longer hold.
    """
    shutil.copy(ROOT / "reward.py", tmp_path)
    (tmp_path / "x.py").write_text(OWN_REWARD)

    def run_alone(*arguments):
        command = [sys.executable, *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={})
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    assert "ok" in run_alone("reward.py")
    assert run_alone("-c", LOAD_OWN_REWARD) == "(-1.0, 1.1)\n(0.0, 2.0) 1.0\n"
