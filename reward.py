"""reward.py -- a verifiable reward: read the answer out of a completion and compare it with the truth.

    r(y) = accuracy (+1 right, -1 wrong) + format_bonus * [well-formed] - length_penalty * (length / longest length)

so r lies in [r_lo, r_hi] = [-1 - length_penalty, 1 + format_bonus].  As long as format_bonus + length_penalty < 2,
every right completion is worth more than every wrong one, however long or ill-formed: the two small terms only break
ties.  Thinking itself is never paid for.  A completion is the *prefill* (a <think> that the prompt may open) plus what
the model wrote; the prompt is never read, so that an answer given in it cannot count.

    python reward.py        # a table of completions and what they earn

Another task brings a function of its own, --reward FILE.py:FUNCTION (experiments/own_task/load.py).
"""

import re
from dataclasses import dataclass

ANSWER = re.compile(r"<answer>([^<>]*)</answer>")
# A number: optional sign, then plain digits or groups of three between commas.  Leading zeros are refused: with them
# each problem would have endlessly many correct completions, and "distinct correct" would count paddings of zeros.
NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*)")
# Well-formed: at most one thought, then one answer, then nothing but white space.
WELL_FORMED = re.compile(r"\s*(?:<think>(?:(?!</?think>|</?answer>).)*</think>\s*)?<answer>[^<>]*</answer>\s*", re.S)


def parse_number(text):
    """The whole number that `text` is ('408', ' -1,204 ', '+7'), or None ('', '4 08', '007', '12,34', '3.5', '4e2')."""
    text = text.strip(" \t\r\n")
    if len(text) < 100 and text.isascii() and NUMBER.fullmatch(text):  # int() refuses endless digits
        return int(text.replace(",", ""))
    return None


def parse_answer(completion):
    """The answer of a completion: the last <answer>number</answer> outside of <think>...</think>, or None.

    What stands before the last </think> is thought, and so is what follows a <think> that is never closed.
    """
    said = completion.rpartition("</think>")[2].partition("<think>")[0]
    found = [parse_number(block) for block in ANSWER.findall(said)]
    return next((number for number in reversed(found) if number is not None), None)


def well_formed(completion):
    """True for `<think>...</think> <answer>number</answer>`, the thought optional, and nothing else around it."""
    return WELL_FORMED.fullmatch(completion) is not None and parse_answer(completion) is not None


@dataclass(frozen=True)
class Reward:
    """Sizes of the two small terms.  Raises ValueError if they could put a wrong answer above a right one."""

    format_bonus: float = 0.1
    length_penalty: float = 0.0

    def __post_init__(self):
        bonus, penalty = self.format_bonus, self.length_penalty
        if not (bonus >= 0 and penalty >= 0 and bonus + penalty < 2):  # written so that nan is refused too
            below = "--format-bonus and --length-penalty must be zero or more, and together below 2"
            raise ValueError(f"{below}, or a wrong answer could beat a right one")

    @property
    def bounds(self):
        """(r_lo, r_hi): the soft value of value.py needs them."""
        return -1 - self.length_penalty, 1 + self.format_bonus

    def __call__(self, completion, answer, length_fraction=0.0, truncated=False):
        """Reward of one completion.

        completion: text, prefill included; answer: the right number; length_fraction: tokens written / most tokens
        allowed, in [0, 1]; truncated: cut off at the bound, hence neither right nor well-formed whatever it says.
        Returns a dict of the parts, JSON-ready: {reward, correct, formatted, answer}.
        """
        said = None if truncated else parse_answer(completion)
        correct = said is not None and said == answer
        formatted = not truncated and well_formed(completion)
        # r(y) = +-1 + format_bonus [well-formed] - length_penalty (length / longest length)
        reward = (1.0 if correct else -1.0) + self.format_bonus * formatted - self.length_penalty * length_fraction
        return {"reward": reward, "correct": correct, "formatted": formatted, "answer": said}

    def judge(self, problem, completion, length_fraction=0.0, truncated=False):
        """The same for a problem that holds its answer."""
        return self(completion, problem.answer, length_fraction, truncated)


class RewardError(ValueError):
    """A function of the user's own failed on a completion; the message is one sentence that shows it."""


def load(name="", format_bonus=0.1, length_penalty=0.0):
    """The reward of a run: the built-in one, or the one that --reward FILE.py:FUNCTION names, an object with the same
    `bounds` and `judge`.  Raises ValueError."""
    if not name:
        return Reward(format_bonus, length_penalty)
    from experiments.own_task import load

    return load.load_reward(name)


def main():
    reward = Reward(format_bonus=0.1, length_penalty=0.05)
    print(f"34*12 = 408; rewards lie in {reward.bounds}\n\n{'reward':>7}  {'answer':>6}  completion")
    for completion, expected in (
        ("<think>34*10=340 34*2=68 340+68=408</think><answer>408</answer>", 1.1),
        ("<answer>408</answer>", 1.1),
        ("<answer> 408 </answer> so there", 1.0),  # right, but not well-formed
        ("<answer>409</answer>", -0.9),
        ("<answer>1</answer><answer>408</answer>", 1.0),  # the last one counts
        ("<think>it is <answer>408</answer>", -1.0),  # a thought is not an answer
    ):
        result = reward(completion, answer=408)
        print(f"{result['reward']:7.2f}  {result['answer']!s:>6}  {completion}")
        assert abs(result["reward"] - expected) < 1e-12

    # What the file is for, asserted: the worst right completion still beats the best wrong one.
    worst_right = reward("408: <answer>408</answer>", 408, length_fraction=1.0)["reward"]
    best_wrong = reward("<answer>409</answer>", 408, length_fraction=0.0)["reward"]
    assert worst_right > best_wrong
    print(f"\nthe worst right completion ({worst_right}) beats the best wrong one ({best_wrong}): ok")


if __name__ == "__main__":
    main()
