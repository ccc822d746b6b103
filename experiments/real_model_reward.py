"""The reward of products written after worked examples: of the prompt `...34*6=` it is `204`.

python train.py ... --reward experiments/real_model_reward.py:reward --stop '\\n'
"""


def reward(problem, completion):
    """1 if the line that the model wrote is the answer and nothing else, else -1.

    As a text and not as a number: `0204` is refused, or each problem would have endlessly many
    right completions.
    """
    said = completion.strip()
    return {
        "reward": 1.0 if said == str(problem.answer) else -1.0,
        "formatted": said.isascii() and said.isdigit(),
        "answer": said,
    }


reward.bounds = (-1.0, 1.0)
