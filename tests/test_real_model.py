"""experiments/real_model.py: its task, its reward, and the prices that it compares methods by.

The real model is not here.  A random Llama stands for it, with a byte-level tokenizer.
"""

import importlib.util
import json

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file
from test_text import build
from test_train import all_finite
from test_train import run as train_small

import data
import reward as reward_module

spec = importlib.util.spec_from_file_location("real", ROOT / "experiments" / "real_model.py")
real = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as `make` writes it, of a random model."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = build("byte-level", tags="ordinary")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    real.write_task(folder)
    return folder


@pytest.fixture(scope="module")
def setting(folder):
    model, tokenizer = real.policy.load_policy(str(folder))
    return real.Setting(model, tokenizer, reward_module.load_reward(real.REWARD))


@pytest.mark.filterwarnings("error")
def test_tinyzeros_prompt_trains(folder, tmp_path):
    """As test_variants_train of the tiny base, whose tokenizer lacks the letters of this prompt."""
    flags = ["--model", folder, "--prompt", "tinyzero", "--checkpoint-every", 2]
    assert all_finite(train_small(tmp_path, *flags, "--eval-problems", 2))
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "checkpoint_iter_2" / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before)


def questions(folder, name):
    """(examples, question) of every line of a task file, as texts such as '34 * 6 = '."""
    problems = data.read_problems(folder / f"{name}.jsonl")
    for problem in problems:
        *examples, question = problem.prompt.split("\n")
        a, b = question.removesuffix(" = ").split(" * ")
        assert problem.answer == int(a) * int(b)
        yield examples, question


def test_the_task_does_not_leak(folder):
    """No held-out pair is trained on or shown as an example, and no prompt holds its answer.

    Guards against a split by line instead of by pair.
    """
    held_out = {question for _, question in questions(folder, "eval")}
    assert len(held_out) == real.HELD_OUT
    trained = set()
    for name in ("train", "eval"):
        for examples, question in questions(folder, name):
            shown = {example.split("=")[0] + "= " for example in examples}
            assert len(shown) == real.EXAMPLES
            assert question not in shown
            assert held_out.isdisjoint(shown)
            if name == "train":
                trained.add(question)
    assert held_out.isdisjoint(trained)
    assert len(trained) + len(held_out) == 90 * 8


def test_the_reward_reads_the_number():
    """Right only as the whole line: not as a part of it, and not with a zero in front."""
    reward = reward_module.load_reward(real.REWARD)
    problem = data.Problem("34 * 6 = ", 204)
    for text, expected in (
        ("204\n", 1.0),
        ("204", 1.0),
        ("20\n", -1.0),
        ("2040\n", -1.0),
        ("0204\n", -1.0),
        ("204 or 205\n", -1.0),
        ("", -1.0),
    ):
        verdict = reward.judge(problem, text)
        assert verdict["reward"] == expected
        assert verdict["correct"] == (expected == 1.0)


def test_one_search_serves_all_budgets(folder, setting):
    """The leaves within M tokens are those of a search that stops at M tokens, at the same price.

    Guards the tokens at which methods are compared: a price that is off by the root, or a search
    that runs nodes it does not pop.
    """
    problems = data.read_problems(folder / "eval.jsonl")[:2]
    rows = real.search_rows(setting, problems, None, 1.0, 0)
    for budget in range(6, 20):
        prompts = real.evaluation.encode_prompts(setting.tokenizer, problems)
        expander = real.astar_search.Expander(setting.model, prompts, setting.max_new_tokens)
        options = setting.options(prompts, K=128, max_nodes=budget + 1, width=1)
        trees = real.astar_search.search(
            real.astar_search.root_keys(0, 0, range(2)), expander, options
        )
        for row, tree, prompt, tokens in zip(rows, trees, prompts, expander.spent):
            assert row["prompt"] == len(prompt)
            assert real.spent(row, budget) == tokens - len(prompt) == budget
            within = sum(before < budget for before, _ in row["completions"])
            assert within == len(tree.leaves)


def test_samples_pay_for_what_they_run(folder, setting):
    """All draws together cost what the expander ran, and a sample that was begun is finished."""
    problems = data.read_problems(folder / "eval.jsonl")[:2]
    drawn = real.sample_rows(setting, problems, 0)
    rows = real.priced(drawn, shared=True)
    _, expander = setting.draw(problems, setting.draws, 0)
    for row, tokens in zip(rows, expander.spent):
        assert row["prompt"] + row["ends"][-1] == tokens
        assert len(row["completions"]) == setting.draws
        before = [0, *row["ends"][:-1]]
        assert [start for start, _ in row["completions"]] == before
        assert real.spent(row, 1) == row["ends"][0]


def test_prices_of_samples_by_hand():
    """A shared node is paid for once, or once a sample that goes through it.

    Three samples: nodes 1 and 2, node 1 again, nodes 1 and 5.
    """
    row = {"prompt": 4, "samples": [([1, 2], False), ([1], True), ([1, 5], False)]}
    (shared,) = real.priced([row], shared=True)
    (apart,) = real.priced([row], shared=False)
    assert (shared["ends"], apart["ends"]) == ([2, 2, 3], [2, 3, 5])
    assert shared["completions"] == [(0, False), (2, True), (2, False)]
    assert apart["completions"] == [(0, False), (2, True), (3, False)]


def test_right_within_by_hand():
    """A right completion counts from the budget on that pays for its last token.

    A search that accepts a leaf after 5 tokens has it at budget 5, and not at 4.
    """
    row = {"total": 9, "completions": [(1, False), (4, True), (6, True)]}
    assert [real.right_within(row, budget) for budget in (4, 5, 8)] == [0, 1, 1]
    assert [real.spent(row, budget) for budget in (4, 5, 64)] == [4, 5, 9]
    row = {"ends": [3, 3, 7], "completions": [(0, False), (3, False), (3, True)]}
    assert [real.right_within(row, budget) for budget in (3, 4)] == [0, 1]
    assert [real.spent(row, budget) for budget in (1, 3, 4)] == [3, 3, 7]


def test_fixed_runs(folder, monkeypatch, tmp_path, capsys):
    """The command writes a line for each method and budget."""
    monkeypatch.setattr(real.compare, "RESULTS", tmp_path)
    real.main(f"fixed --model {folder} --problems 3 --fit-problems 2 --results rows".split())
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    searches = {"A*, h = 0", "A*, fitted head", "Gumbel A*, h = 0"}
    methods = {"greedy", "samples", "samples, each by itself"} | searches
    assert {row["method"] for row in rows} == methods
    assert len(rows) == 1 + 5 * len(real.Setting.budgets)
    for row in rows:
        low, high = row["interval"]
        assert low <= row["found"] <= high
