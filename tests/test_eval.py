"""The figures of eval.py against an independent count, its statistics against enumeration and
simulation."""

import itertools
import json
import math
import re
import threading

import numpy
import pytest
import torch
from conftest import ROOT, rows
from torch.distributed import run as torchrun

import data
import eval as evaluation
import fsdp
import policy
import reward
import train

K = 4  # completions a problem
MODES = {
    "greedy": ["--max-new-tokens", "48"],
    # some right, some equal, some cut
    "sample": ["--max-new-tokens", "38", "--prefill", "<think>"],
    # some without a leaf
    "astar": [
        "--max-new-tokens",
        "38",
        "--prefill",
        "<think>",
        "--tau",
        "0.5",
        "--max-nodes",
        "60",
    ],
}


def evaluate(folder, decode, *more):
    """Figures and rows that `python eval.py --json` writes."""
    path = folder / f"{decode}.json"
    flags = ["--decode", decode, "--completions", K, "--device", "cpu", "--json", path]
    flags += [*MODES[decode], *more]
    evaluation.main([str(flag) for flag in flags])
    return json.loads(path.read_text()), rows(folder / f"{decode}.jsonl")


def row_of(accuracy, prompt="1*1=", truth=1):
    """A row of a jsonl file, as far as a comparison reads it."""
    return {"prompt": prompt, "truth": truth, "scores": {"accuracy": accuracy}}


# ------------------------------------------------------------------------------ Figures are counts
def mean(column):
    """The mean of a list; 0 of an empty one."""
    return sum(column) / len(column) if column else 0.0


def recount(row, decode, tokenizer):
    """The figures of one problem, from the texts and counts of its row alone."""
    a, b = (int(number) for number in re.fullmatch(r"(\d+)\*(\d+)=", row["prompt"]).groups())
    votes = {}
    prefixes = set()  # what the model was run on, for samples
    draws = []  # (right, well-formed, tokens, truncated), as often as it was drawn
    for c in row["completions"]:
        said = None if c["truncated"] else reward.parse_answer(c["text"])
        formatted = not c["truncated"] and reward.well_formed(c["text"])
        ids = tokenizer(c["text"].removeprefix(row["prefill"]))["input_ids"]
        if not c["truncated"]:
            ids = [*ids, tokenizer.eos_token_id]
        assert len(ids) == c["tokens"]
        assert (c["correct"], c["formatted"]) == (said == a * b, formatted)
        prefixes |= {tuple(ids[:i]) for i in range(1, len(ids))}
        draws += [(said == a * b, formatted, len(ids), c["truncated"])] * c["count"]
        if said is not None:
            weight = c["count"] if decode == "sample" else c["weight"]
            votes[said] = votes.get(said, 0) + weight

    judged = draws[:1] if decode == "astar" else draws
    assert len(judged) == {"greedy": 1, "sample": K, "astar": len(draws) > 0}[decode]
    names = ("accuracy", "format", "completion_length", "truncated")
    figure = {name: mean([draw[i] for draw in judged]) for i, name in enumerate(names)}
    if decode != "greedy":
        leaders = [said for said in votes if votes[said] == max(votes.values())]
        figure["majority"] = mean([said == a * b for said in leaders])
    if decode == "astar":
        figure["found"] = float(any(draw[0] for draw in draws))
    if decode == "sample":
        for k in (1, 2, 4):
            chosen = list(itertools.combinations(draws, k))
            figure[f"pass@{k}"] = mean([any(draw[0] for draw in some) for some in chosen])

    run = len(tokenizer(row["prompt"] + row["prefill"])["input_ids"]) + len(prefixes)
    if decode == "astar":
        assert row["model_tokens"] >= run
    else:
        assert row["model_tokens"] == run
    figure["tokens_per_problem"] = row["model_tokens"]
    return figure


@pytest.mark.parametrize("decode", MODES)
def test_figures_equal_an_independent_count(decode, tmp_path):
    """Everything from the texts and counts in the jsonl, by other formulas.

    Guards against means over completions that forget how often one was drawn, a vote of truncated
    answers or by number instead of weight, a level's mean divided by all problems, and an A* search
    scored by its best leaf.
    """
    result, found = evaluate(tmp_path, decode, "--n", 40)
    assert [row["prompt"] for row in found] == [p.prompt for p in data.eval_problems(40)]
    tokenizer = policy.load_tokenizer(str(ROOT / "tiny_base"))
    figures = [recount(row, decode, tokenizer) for row in found]
    levels = [row["difficulty"] for row in found]

    names = set(figures[0])
    assert {name for name in result if "_by_" not in name and name in names} == names
    for name in names:
        column = [figure[name] for figure in figures]
        assert result[name] == pytest.approx(sum(column) / 40), name
        for level, x in result[f"{name}_by_difficulty"].items():
            part = [x for own, x in zip(levels, column) if own == level]
            assert len(part) == result["problems_by_difficulty"][level], name
            assert x == pytest.approx(sum(part) / len(part)), name
    shares = [figure["accuracy"] for figure in figures]
    draws = K if decode == "sample" else 1
    assert result["accuracy_interval"] == evaluation.interval(shares, draws)
    assert list(result["problems_by_difficulty"]) == ["easy", "medium"]
    assert result["problems"] == 40

    # What the cases are for: some right, some not; draws that are equal; truncated ones; votes that
    # change the answer.
    if decode == "sample":
        assert 0 < result["truncated"] < 1
        assert 0 < result["accuracy"] < result["pass@4"] < 1
        assert any(c["count"] > 1 for row in found for c in row["completions"])
    if decode == "astar":
        assert result["found"] > result["accuracy"] > 0
        assert any(not row["completions"] for row in found)
        assert any(row["scores"]["majority"] != row["scores"]["accuracy"] for row in found)


def test_two_ranks_report_what_one_does(tmp_path, monkeypatch):
    """Uneven shares of 7 problems.

    Guards against noise keyed by a rank's own numbers, lost rows and means of means; and for the
    README: after `--` torchrun lets --n pass. torchrun runs in a thread of this process, which has
    imported torch already: that saves two of seven seconds.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["--standalone", "--nproc_per_node=2", "--", ROOT / "eval.py", "--n", 7]
    command += ["--decode", "sample", "--completions", K, "--device", "cpu", *MODES["sample"]]
    command += ["--json", tmp_path / "two.json"]
    arguments = [[str(word) for word in command]]
    ranks = threading.Thread(target=torchrun.main, args=arguments, daemon=True)
    ranks.start()
    one, alone = evaluate(tmp_path, "sample", "--n", 7)
    ranks.join(timeout=240)
    assert not ranks.is_alive()
    two = json.loads((tmp_path / "two.json").read_text())
    for name in set(one) - {"seconds_per_problem", "flags"}:
        assert two[name] == one[name], name
    for mine, other in zip(rows(tmp_path / "two.jsonl"), alone, strict=True):
        for c, d in zip(mine["completions"], other["completions"], strict=True):
            # log pi of a batch of another size: rounding
            assert c.pop("f") == pytest.approx(d.pop("f"), abs=1e-3)
        assert mine == other


def test_batches_do_not_change_the_figures():
    model, tokenizer = policy.load_policy(str(ROOT / "tiny_base"))
    problems = data.eval_problems(12)
    ranks = fsdp.init_ranks(device="cpu")
    results = []
    for batch in (5, 12):
        result, _ = evaluation.evaluate(
            model, tokenizer, problems, reward.Reward(), ranks, decode="sample", n=2, batch=batch
        )
        result.pop("seconds_per_problem")
        results.append(result)
    assert results[0] == results[1]


def test_the_flags_batch_and_dtype(monkeypatch):
    """5 problems in batches of 2; in bfloat16 only where it is asked for on a CPU.

    Guards against a model that is checked after its weights were rounded, where the check is
    blunt, and against rotary frequencies that are rounded too.
    """
    made = []
    dtypes_checked = []
    expander = evaluation.astar_search.Expander

    def record_expander(model, prompts, *arguments):
        made.append((model, len(prompts)))
        return expander(model, prompts, *arguments)

    def record_check(model, longest):
        dtypes_checked.append(model.dtype)

    monkeypatch.setattr(evaluation.astar_search, "Expander", record_expander)
    monkeypatch.setattr(evaluation.astar_search, "check_model", record_check)
    flags = "--n 5 --batch 2 --max-new-tokens 3 --device cpu --dtype"
    for dtype, weights in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        made.clear()
        evaluation.main([*flags.split(), dtype])
        assert [count for _, count in made] == [2, 2, 1]
        model = made[0][0]
        assert {parameter.dtype for parameter in model.parameters()} == {weights}
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert dtypes_checked == [torch.float32, torch.float32]


@pytest.mark.parametrize(
    "votes, expected",
    [
        ([(7, 1), (8, 1), (7, 1)], 1.0),
        ([(8, 3), (7, 1), (7, 1)], 0.0),  # by weight, not by number
        ([(7, 0.1), (7, 0.2), (8, 0.3)], 0.5),  # equal but for rounding: a coin decides
        ([(None, 9), (7, 1)], 1.0),  # no answer is no vote
        ([(None, 1)], 0.0),
        ([], 0.0),
    ],
)
def test_majority(votes, expected):
    """Guards against a tie that goes to the answer seen first, which is the shortest."""
    told = [(answer, weight, answer == 7) for answer, weight in votes]
    assert evaluation.majority_vote(told) == expected
    assert evaluation.majority_vote(told[::-1]) == expected


def completion_of(text, answer, formatted, truncated):
    """A completion of a row; 7 is right."""
    return {
        "text": text,
        "answer": answer,
        "formatted": formatted,
        "truncated": truncated,
        "correct": answer == 7,
    }


def test_the_worst_completions():
    """Each kind once, and of the wrong ones the nearest first; right answers are not shown."""
    completions = [
        completion_of("cut", None, formatted=False, truncated=True),
        completion_of("bad", 7, formatted=False, truncated=False),
        completion_of("far", 70, formatted=True, truncated=False),
        completion_of("near", 8, formatted=True, truncated=False),
        completion_of("right", 7, formatted=True, truncated=False),
    ]
    table = [{"truth": 7, "completions": [completion]} for completion in completions]
    no_leaf = {"truth": 7, "completions": []}
    faults = evaluation.worst_completions([*table, no_leaf], "sample", 9)
    texts = {}
    for kind, (count, pairs) in faults.items():
        texts[kind] = (count, [completion["text"] for _, completion in pairs])
    assert texts == {
        "no leaf within the bounds": (1, [""]),
        "truncated": (1, ["cut"]),
        "malformed": (1, ["bad"]),
        "wrong, nearest first": (2, ["near", "far"]),
    }
    faults = evaluation.worst_completions(table, "sample", 1)
    assert len(faults["wrong, nearest first"][1]) == 1


# -------------------------------------------------------------------------------------- Statistics
def test_pass_at_k_equals_enumeration():
    for n in range(1, 7):
        for correct in range(n + 1):
            drawn = [True] * correct + [False] * (n - correct)
            for k in range(1, n + 1):
                expected = mean([any(some) for some in itertools.combinations(drawn, k)])
                assert evaluation.pass_at_k(n, correct, k) == pytest.approx(expected)


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_equals_a_published_one(right, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3 (Wilson).

    Guards against Wald's, [0, 0] for 0 of 20.
    """
    shares = [1.0] * right + [0.0] * (n - right)
    assert evaluation.interval(shares) == pytest.approx([low, high], abs=6e-5)
    # 8 draws that are all alike
    assert evaluation.interval(shares, draws=8) == pytest.approx([low, high], abs=6e-5)


def test_the_interval_of_independent_draws_is_that_of_as_many_problems():
    """Half of the draws of each of 50 problems right: no spread, so 400 outcomes and not more."""
    expected = evaluation.interval([1.0, 0.0] * 200)
    assert evaluation.interval([0.5] * 50, draws=8) == pytest.approx(expected)


@pytest.mark.parametrize("draws, alike", [(1, 1.0), (8, 0.0), (8, 0.3), (8, 1.0)])
def test_the_interval_covers_at_its_rate(draws, alike):
    """Simulated 3000 times, so that the rate is known to .4 points.

    100 problems whose chances are Beta. Their mean P is itself drawn, for at one mean the rate
    depends on how 100 P falls between whole numbers. alike: correlation of two draws. Guards
    against counting each draw (too narrow when they are alike) or each problem as one outcome (too
    wide when they are not).
    """
    rng = numpy.random.default_rng(0)
    covered = 0
    for mean_chance in rng.uniform(0.1, 0.9, 3000):
        chances = numpy.full(100, mean_chance)
        if alike == 1:
            chances = (rng.random(100) < mean_chance).astype(float)
        elif alike > 0:
            concentration = (1 - alike) / alike
            a, b = mean_chance * concentration, (1 - mean_chance) * concentration
            chances = rng.beta(a, b, 100)
        shares = rng.binomial(draws, chances) / draws
        low, high = evaluation.interval(shares.tolist(), draws)
        covered += low <= mean_chance <= high
    assert 0.935 < covered / 3000 < 0.965


def test_the_sign_test_equals_enumeration():
    """McNemar's exact test: all 2^n ways in which n fair coins can fall, those at least as uneven.

    Guards against a one-sided p and against leaving out the observed outcome itself.
    """
    for n in range(11):
        falls = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
        for better in range(n + 1):
            p = mean([abs(2 * fall - n) >= abs(2 * better - n) for fall in falls])
            assert evaluation.sign_test(better, n - better) == pytest.approx(p)
    assert 0 <= evaluation.sign_test(4000, 0) < 1e-300


def test_comparison_is_paired():
    """B is right where A is, and on 20 of the other 200 problems.

    So the difference is .05 with standard error sqrt(.05 .95/400). Guards against resampling the
    two apart, for which it would be three times that.
    """
    A = [row_of(float(i < 200), f"{i}*1=", i) for i in range(400)]
    B = [row_of(float(i < 220), f"{i}*1=", i) for i in range(400)]
    result = evaluation.paired_test(A, B)
    assert result["difference"] == pytest.approx(0.05)
    assert (result["B_better"], result["A_better"]) == (20, 0)
    assert result["p_value"] == 2 / 2**20
    error = math.sqrt(0.05 * 0.95 / 400)
    expected = [0.05 - 1.96 * error, 0.05 + 1.96 * error]
    assert result["difference_interval"] == pytest.approx(expected, abs=0.15 * error)
    back = evaluation.paired_test(B, A)
    assert back["difference"] == -result["difference"]
    assert back["A_better"] == 20
    assert evaluation.paired_test(A, A)["p_value"] == 1.0


# -------------------------------------------------------------------------- Command line and files
def test_a_truth_that_is_nan_is_the_same_problem():
    """NaN is not equal to itself, so a file's problems differed from its own."""
    rows = [row_of(1.0, truth=math.nan)]
    assert evaluation.paired_test(rows, rows, repeats=10)["difference"] == 0


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FloatingPointError("the value head says NaN"), "eval.py: the value head says NaN"),
        (torch.OutOfMemoryError(), "lower --batch or --max-nodes"),
    ],
)
def test_a_failure_while_decoding_is_a_sentence(error, sentence, monkeypatch):
    """It was a traceback, where train.py has a sentence for each."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(evaluation, "evaluate", fail)
    with pytest.raises(SystemExit, match=sentence):
        evaluation.main(["--n", "1", "--device", "cpu"])


def refused(capsys, *flags):
    """The one sentence on stderr, with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main(["--device", "cpu", *(str(flag) for flag in flags)])
    output = capsys.readouterr()
    assert stop.value.code == 2, output.err
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("eval.py: "), output.err
    return output.err


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--model /nowhere/at/all --json OUT/a.json", "/nowhere/at/all"),
        ("--n 579", "only 578"),
        ("--n 0", "--n"),
        ("--completions 0", "--completions"),
        ("--batch 0", "--batch"),
        ("--dtype float16", "--dtype"),
        ("--eval-file OUT/two.jsonl --n 3", "only 2 problems"),
        ("--eval-file OUT/none.jsonl", "none.jsonl cannot be read"),
        ("--json OUT/a.txt", ".json"),
        ("--json OUT/nothing/a.json", "cannot be written"),
        ("--json /proc/a.json", "cannot be written"),
        ("--json OUT/folder.json --overwrite", "folder.json exists"),
        ("--compare OUT/none.jsonl OUT/A.jsonl", "none.jsonl cannot be read"),
        ("--compare OUT/A.jsonl", "--compare"),
        ("--compare OUT/A.jsonl OUT/two.jsonl", "two.jsonl, line 1"),
        ("--compare OUT/bad.jsonl OUT/A.jsonl", "bad.jsonl, line 2"),
        ("--compare OUT/A.jsonl OUT/empty.jsonl", "no problems"),
        ("--compare OUT/A.jsonl OUT/nan.jsonl", "nan.jsonl, line 1"),
        ("--compare OUT/A.jsonl OUT/short.jsonl", "same --n"),
        ("--compare OUT/A.jsonl OUT/other.jsonl", "problems differ"),
        ("--compare OUT/A.jsonl OUT/A.jsonl --json OUT/a.json", "--json"),
        ("--compare OUT/A.jsonl OUT/A.jsonl --n 1", "leave --n and --overwrite out"),
        ("--compare OUT/A.jsonl OUT/truth.jsonl", '["1*1=", 1] in A and ["1*1=", 2] in B'),
        ("--compare OUT/A.jsonl OUT/deep.jsonl", "deep.jsonl, line 1"),
        ("--threads -1", "--threads"),
    ],
)
def test_bad_input_is_one_sentence(flags, said, tmp_path, capsys):
    first = json.dumps(row_of(1.0)) + "\n"
    files = {
        "A": first + json.dumps(row_of(0.0, "2*2=", 4)) + "\n",
        "other": first + json.dumps(row_of(0.0, "2*3=", 6)) + "\n",
        "short": first,
        "empty": "",
        "bad": first + '{"prompt": "2*2="',
        "nan": json.dumps(row_of(math.nan)) + "\n",
        "truth": json.dumps(row_of(1.0, truth=2)) + "\n" + json.dumps(row_of(1.0)) + "\n",
        "deep": "[" * 100_000,
        "two": '{"prompt": "1*1=", "answer": 1}\n' * 2,
    }
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "folder.json").mkdir()
    before = sorted(tmp_path.iterdir())
    assert said in refused(capsys, *flags.replace("OUT", str(tmp_path)).split())
    assert sorted(tmp_path.iterdir()) == before


def test_results_are_not_overwritten_unless_asked(tmp_path, capsys):
    """Refused before the work; --overwrite replaces both files."""
    flags = ["--n", "2", "--json", str(tmp_path / "a.json")]
    (tmp_path / "a.jsonl").write_text("precious\n")
    assert "a.jsonl exists" in refused(capsys, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert (tmp_path / "a.jsonl").read_text() == "precious\n"
    evaluation.main([*flags, "--overwrite"])
    assert len(rows(tmp_path / "a.jsonl")) == 2
    assert json.loads((tmp_path / "a.json").read_text())["flags"]["n"] == 2


def test_a_full_disk_leaves_no_half_file(tmp_path, capsys, monkeypatch):
    """The whole file or none."""

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fsdp.os, "fsync", full)
    assert "No space left" in refused(capsys, "--n", 2, "--json", tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_comparison_needs_no_model(tmp_path, capsys, monkeypatch):
    """And its table is that of two files which --json wrote."""
    A, _ = evaluate(tmp_path, "greedy", "--n", 20)
    B, _ = evaluate(tmp_path, "sample", "--n", 20)
    monkeypatch.setattr(policy, "load_policy", None)
    capsys.readouterr()
    evaluation.main(["--compare", str(tmp_path / "greedy.jsonl"), str(tmp_path / "sample.jsonl")])
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table["problems"] == "20"
    assert table["difference"] == f"{B['accuracy'] - A['accuracy']:.3f}"


def test_help_shows_no_path_of_this_machine_and_every_default(capsys):
    """Guards against a help text that differs between machines, or leaves a default out."""
    with pytest.raises(SystemExit):
        evaluation.main(["--help"])
    text = capsys.readouterr().out
    assert str(ROOT) not in text
    flags = evaluation.make_parser()._actions
    assert len(flags) > 15
    for flag in flags:
        assert "default" in flag.help or flag.dest == "help", flag.dest


@pytest.mark.parametrize("main", [evaluation.main, train.main])
def test_torchrun_leaves_the_flags_alone(main, capsys):
    """torchrun takes a flag of the script that begins like one of its own for its own.

    --n is why there is --problems.
    """
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
    assert len(flags) > 15
    for flag in flags - {"--n", "--standalone", "--nproc", "--nproc_per_node"}:
        left = torchrun.get_args_parser().parse_args(["script.py", flag, "1"]).training_script_args
        assert left == [flag, "1"]
    with pytest.raises(SystemExit):
        torchrun.get_args_parser().parse_args(["script.py", "--n", "1"])
