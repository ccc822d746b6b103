"""reward.py -- a verifiable reward: read the answer out of a completion, compare it with the truth.

    r(y) = accuracy (+1 right, -1 wrong)
         + format_bonus * [well-formed] - length_penalty * (length / longest length)

So r lies in [r_lo, r_hi] = [-1 - length_penalty, 1 + format_bonus].  The two small terms only break
ties: as long as format_bonus + length_penalty < 2, every right completion earns more than every
wrong one.  Thinking itself earns nothing.

A completion is the prefill (a <think> that the prompt may end with) plus what the model wrote.  The
rest of the prompt is never read, so an answer that is quoted there cannot count.

Another task brings a reward function of its own: --reward FILE.py:FUNCTION, see OwnReward.

    python reward.py        # completions and what they earn, then a reward of one's own
"""

import ast
import importlib.util
import math
import numbers
import os
import pathlib
import re
import sys
import tempfile
import types
from dataclasses import dataclass

ANSWER = re.compile(r"<answer>([^<>]*)</answer>")

# A number: an optional sign, then plain digits, or groups of three digits between commas.  Leading
# zeros are refused.  With them each problem would have endlessly many correct completions, and the
# count of distinct correct completions would count paddings of zeros.
NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*)")

# Well-formed: at most one thought, then one answer, then nothing but white space.
WELL_FORMED = re.compile(
    r"\s*(?:<think>(?:(?!</?think>|</?answer>).)*</think>\s*)?<answer>[^<>]*</answer>\s*", re.DOTALL
)


# ----------------------------------------------------------------------------- Reading a completion


def parse_number(text):
    """The whole number that `text` is, or None.

    Numbers are '408', ' -1,204 ', '+7'; none are '', '4 08', '007', '12,34', '3.5', '4e2'.
    """
    text = text.strip(" \t\r\n")
    # The length is bounded, because int() raises an error for thousands of digits. \d also matches
    # digits of other scripts, hence isascii.
    if len(text) < 130 and text.isascii() and NUMBER.fullmatch(text):
        return int(text.replace(",", ""))
    return None


def parse_answer(completion):
    """The last <answer>number</answer> outside of <think>...</think> as a number, or None.

    All text before the last </think> is thought, whether or not a <think> opened it.  All text
    after a <think> that is never closed is thought too.
    """
    after_thought = completion.rpartition("</think>")[2]
    said = after_thought.partition("<think>")[0]
    for block in reversed(ANSWER.findall(said)):
        number = parse_number(block)
        if number is not None:
            return number
    return None


def well_formed(completion):
    """True for `<think>...</think> <answer>number</answer>` and nothing else around it.

    The thought is optional.
    """
    return WELL_FORMED.fullmatch(completion) is not None and parse_answer(completion) is not None


# ------------------------------------------------------------------------------ The built-in reward


@dataclass(frozen=True)
class Reward:
    """The reward of the head of this file; its fields are the sizes of the two small terms.

    Raises ValueError if they are so large that a wrong answer could earn more than a right one.
    """

    format_bonus: float = 0.1
    length_penalty: float = 0.0

    def __post_init__(self):
        bonus = self.format_bonus
        penalty = self.length_penalty
        # Written as `not (...)`, so that nan is refused too: each comparison with nan is False.
        if not (bonus >= 0 and penalty >= 0 and bonus + penalty < 2):
            raise ValueError(
                "--format-bonus and --length-penalty must be zero or more, and together below 2, "
                "or a wrong answer could beat a right one"
            )

    @property
    def bounds(self):
        """(r_lo, r_hi), the lowest and highest reward; the soft value of value.py needs them."""
        return -1 - self.length_penalty, 1 + self.format_bonus

    def __call__(self, completion, answer, length_fraction=0.0, truncated=False):
        """The reward of one completion.

        completion: text, prefill included; answer: the right number.
        length_fraction: tokens written / most tokens allowed, in [0, 1].
        truncated: the completion was cut off at the limit.  Whatever it says, it is then neither
        right nor well-formed.
        Returns a dict that JSON can hold: {reward, correct, formatted, answer}.
        """
        said = None if truncated else parse_answer(completion)
        correct = said is not None and said == answer
        formatted = not truncated and well_formed(completion)
        accuracy = 1.0 if correct else -1.0
        # r(y) = accuracy + format_bonus [well-formed] - length_penalty (length / longest length)
        reward = accuracy + self.format_bonus * formatted - self.length_penalty * length_fraction
        return {"reward": reward, "correct": correct, "formatted": formatted, "answer": said}

    def judge(self, problem, completion, length_fraction=0.0, truncated=False):
        """The same for a problem that holds its answer."""
        return self(completion, problem.answer, length_fraction, truncated)


# ---------------------------------------------------------------------------- A reward of one's own


class RewardInterrupted(KeyboardInterrupt):
    """Ctrl-C while a function of the user's own was running; the message is one sentence."""


class RewardError(ValueError):
    """A user's reward function failed on a completion; the message is one sentence."""


@dataclass(frozen=True)
class OwnReward:
    """A user's function(problem, completion), called for one completion at a time.

    problem: a data.Problem; its `answer` is whatever JSON value the line of the file holds.
    completion: text, prefill included.

    The function has an attribute `bounds` = (r_lo, r_hi).  It returns a number within them, or a
    dict with that number as `reward` and any of these keys:
        correct     default: is the reward r_hi?
        formatted   default: True
        answer      what majority votes count; default: the completion
    It is not called for a truncated completion: that earns r_lo.
    """

    name: str
    function: object
    bounds: tuple

    def judge(self, problem, completion, length_fraction=0.0, truncated=False):
        """The verdict {reward, correct, formatted, answer} on one completion, as Reward has it.

        Raises RewardError if the function raises, or returns what it must not.
        """
        r_lo, r_hi = self.bounds
        if truncated:
            return {"reward": r_lo, "correct": False, "formatted": False, "answer": None}
        try:
            returned = self.function(problem, completion)
            verdict = self.read_returned(returned, completion)
            if verdict is not None:
                return verdict
            failure = f"returned {shorten(returned)}, not a number from {r_lo:g} to {r_hi:g}"
        except KeyboardInterrupt:
            # The user stops a function that takes too long; this says on what.
            raise RewardInterrupted(self.complaint("was running", problem, completion)) from None
        except BaseException as error:  # a user's function may raise anything, SystemExit too
            failure = f"raised {type(error).__name__} ({error})"
        raise RewardError(self.complaint(failure, problem, completion))

    def complaint(self, failure, problem, completion):
        """One line that says what went wrong on which completion."""
        return (
            f"--reward {self.name} {' '.join(failure.split())} for the prompt "
            f"{shorten(problem.prompt)} and the completion {shorten(completion)}"
        )

    def read_returned(self, returned, completion):
        """The verdict that a returned number or dict stands for.

        None if its reward is not a number within the bounds.
        """
        r_lo, r_hi = self.bounds
        parts = returned if isinstance(returned, dict) else {"reward": returned}
        reward = parts.get("reward")
        if not isinstance(reward, numbers.Real):
            return None
        # The tolerance of 1e-6 is for rounding: a sum of shares may be 1.0000000002.
        if not r_lo - 1e-6 <= reward <= r_hi + 1e-6:
            return None
        return {
            "reward": float(reward),
            "correct": bool(parts.get("correct", reward >= r_hi - 1e-6)),
            "formatted": bool(parts.get("formatted", True)),
            "answer": str(parts.get("answer", completion)),
        }


def shorten(thing):
    """The repr of a thing; of one with more than 400 characters only the beginning and the end."""
    text = repr(thing)
    if len(text) <= 400:
        return text
    return f"{text[:200]} ... {text[-200:]}"


def import_file(path):
    """Run a Python file as a module of its own.  Returns the module.

    The files beside it can be imported, while it runs and also later by its functions.  The module
    stays registered, because a process pool finds a function by the name of its module.
    """
    folder, file = os.path.split(os.path.abspath(path))
    module_name = os.path.splitext(file)[0]
    taken = not module_name.isidentifier() or module_name in sys.modules
    if taken or importlib.util.find_spec(module_name) is not None:
        module_name = "own_reward_" + module_name  # a file called reward.py, for example
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        # From here on the folder comes last, so that its files replace no other module.
        sys.path.remove(folder)
        sys.path.append(folder)
    return module


def source_files(path):
    """Paths of a Python file and of the files beside it that it imports, directly or not.

    The file itself comes first.  A package beside it counts with all of its files.
    """
    path = pathlib.Path(path).absolute()
    files = [path]
    for file in files:  # the list grows in the loop
        for name in imported_names(file):
            found = [*path.parent.glob(f"{name}.py"), *path.parent.glob(f"{name}/**/*.py")]
            files += [each for each in sorted(found) if each not in files]
    return files


def imported_names(path):
    """The modules that a Python file imports, without what comes after a dot; sorted."""
    names = set()
    with open(path, "rb") as file:
        try:
            tree = ast.parse(file.read())
        except SyntaxError:  # it cannot have been imported either
            return []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return sorted(names)


def load_own_reward(name):
    """The OwnReward that `name` = FILE.py:FUNCTION stands for.

    Raises ValueError with one sentence if there is no such file or function, if the file raises, or
    if the function has no proper bounds.
    """
    file, _, function_name = name.rpartition(":")
    if not os.path.isfile(file):
        raise ValueError(
            f"--reward {name}: expected FILE.py:FUNCTION, and there is no file {file!r}"
        )
    try:
        function = getattr(import_file(file), function_name)
        r_lo, r_hi = [float(bound) for bound in function.bounds]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's file may raise anything, SystemExit too
        failure = " ".join(f"{type(error).__name__} ({error})".split())  # on one line
        raise ValueError(
            f"--reward {name}: {failure}; it takes a function with .bounds = (lowest, highest)"
        ) from None
    if not -math.inf < r_lo < r_hi < math.inf:
        raise ValueError(
            f"--reward {name}: bounds must be two finite numbers, lowest first, "
            f"not {function.bounds}"
        )
    return OwnReward(name, function, (r_lo, r_hi))


def load_reward(name="", format_bonus=0.1, length_penalty=0.0):
    """The reward of a run: an object with `bounds` and `judge`.

    name: FILE.py:FUNCTION for a reward of one's own, or "" for the built-in one.  format_bonus and
    length_penalty are those of the built-in one.
    Raises ValueError if no reward can be made of them.
    """
    if name:
        return load_own_reward(name)
    return Reward(format_bonus, length_penalty)


# ------------------------------------------------------------------------------------ Demonstration

OWN_EXAMPLE = """
def share_of_letters(problem, completion):
    same = [x == y for x, y in zip(completion, problem.answer)]
    return sum(same) / max(len(completion), len(problem.answer))

share_of_letters.bounds = (0, 1)
"""


def main():
    """Print what some completions earn, by the built-in reward and by one of one's own."""
    reward = Reward(format_bonus=0.1, length_penalty=0.05)
    print(f"34*12 = 408; rewards lie in {reward.bounds}\n")
    print(f"{'reward':>7}  {'answer':>6}  completion")
    examples = (
        ("<think>34*10=340 34*2=68 340+68=408</think><answer>408</answer>", 1.1),
        ("<answer>408</answer>", 1.1),
        ("<answer> 408 </answer> so there", 1.0),  # right, but not well-formed
        ("<answer>409</answer>", -0.9),
        ("<answer>1</answer><answer>408</answer>", 1.0),  # the last one counts
        ("<think>it is <answer>408</answer>", -1.0),  # a thought is not an answer
    )
    for completion, expected in examples:
        result = reward(completion, answer=408)
        print(f"{result['reward']:7.2f}  {result['answer']!s:>6}  {completion}")
        assert abs(result["reward"] - expected) < 1e-12

    # The worst right completion still earns more than the best wrong one.
    worst_right = reward("408: <answer>408</answer>", 408, length_fraction=1.0)["reward"]
    best_wrong = reward("<answer>409</answer>", 408, length_fraction=0.0)["reward"]
    assert worst_right > best_wrong
    print(f"\nworst right completion {worst_right} > best wrong one {best_wrong}: ok")

    # A reward of one's own is a function in a file; its bounds are an attribute of the function.
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "own.py")
        with open(path, "w") as file:
            file.write(OWN_EXAMPLE)
        own_reward = load_reward(f"{path}:share_of_letters")
    problem = types.SimpleNamespace(prompt="cba, sorted: ", answer="abc")
    print(f"\na reward of one's own, with bounds {own_reward.bounds}:")
    for completion, expected in (("abc", 1.0), ("acb", 1 / 3), ("", 0.0)):
        result = own_reward.judge(problem, completion)
        print(f"{result['reward']:7.2f}  {problem.prompt}{completion}")
        assert result["reward"] == expected
        assert result["correct"] == (completion == "abc")


if __name__ == "__main__":
    main()
