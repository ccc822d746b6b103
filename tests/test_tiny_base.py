"""The two tiny bases: weak as promised, never shown an evaluation problem.

Their tokenizer loads as it was saved.
"""

import json
import pathlib
import random
import sys

import pytest
import transformers

import data
import eval as evaluation
import fsdp
import policy
import reward

BASE = pathlib.Path(policy.__file__).parent / "tiny_base"
sys.path.insert(0, str(BASE))
import make_base


@pytest.mark.parametrize("folder", (BASE, BASE / "weak"))
def test_the_tokenizer_survives_the_folder(folder):
    """Guards against AutoTokenizer putting another class in its place: it once dropped the tags."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "34*12=<think>34*10=340 34*2=68 340+68=408</think><answer>408</answer>\n-1,2"
    ids = tokenizer(text)["input_ids"]
    first = [make_base.VOCABULARY[i] for i in ids[:8]]
    assert first == ["3", "4", "*", "1", "2", "=", "<think>", "3"]
    assert make_base.VOCABULARY.index("<unk>") not in ids and len(ids) == 46
    assert tokenizer.decode([*ids, make_base.EOS], skip_special_tokens=True) == text
    model, _ = policy.load_policy(str(folder))
    assert len(tokenizer) == model.config.vocab_size == 24


def test_the_corpus_holds_no_evaluation_problem():
    """In either order, in either way of writing; and the step-by-step way is always right."""
    rng = random.Random(1)
    held_out = {frozenset(problem.operands) for problem in data.eval_problems(578)}
    ways = set()
    for _ in range(20_000):
        text = make_base.document(rng, 0.5, 0.5)
        a, b = (int(operand) for operand in text.split("=")[0].split("*"))
        assert frozenset((a, b)) not in held_out
        ways.add("<think>" in text)
        if "<think>" in text:
            assert reward.parse_answer(text.partition("=")[2]) == a * b
    assert ways == {True, False}


@pytest.mark.parametrize("folder", (BASE, BASE / "weak"))
def test_the_base_is_as_weak_as_its_folder_says(folder):
    """At most 12 % greedy, forced into <think> at most 75 % greedy and 55 % sampled.

    eval.py finds the same figures as the script that made the base, so a prefill reaches the model.
    """
    measured = json.loads((folder / "measured.json").read_text())["measured"]
    assert measured["free_greedy"] <= 0.12
    assert measured["forced_greedy"] <= 0.75 and measured["forced_sampled"] <= 0.55
    model, tokenizer = policy.load_policy(str(folder))
    ranks = fsdp.init_ranks(device="cpu")
    for prefill, name in (("", "free_greedy"), ("<think>", "forced_greedy")):
        problems = data.eval_problems(500, prefill=prefill)
        result, _ = evaluation.evaluate(model, tokenizer, problems, reward.Reward(), ranks)
        # Two problems of 500 may lie within rounding.
        assert result["accuracy"] == pytest.approx(measured[name], abs=0.004)
