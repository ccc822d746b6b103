"""The figures of eval.py against an independent count, its statistics against enumeration and simulation."""

import itertools
import json
import math
import re

import numpy
import pytest
from torch.distributed.run import get_args_parser

import data
import eval as evaluation
import fsdp
import policy
import reward
import train
from conftest import ROOT, finish, launch, rows
from experiments import eval_files

K = 4  # completions a problem
MODES = {
    "greedy": ["--max-new-tokens", "48"],
    "sample": ["--max-new-tokens", "38", "--prefill", "<think>"],  # some right, some equal, some cut
    "astar": ["--max-new-tokens", "38", "--prefill", "<think>", "--tau", "0.5", "--max-nodes", "60"],  # some without a leaf
}


def evaluate(folder, decode, *more):
    """Figures and rows that `python eval.py --json` writes."""
    path = folder / f"{decode}.json"
    flags = ["--decode", decode, "--completions", K, "--device", "cpu", "--json", path, *MODES[decode], *more]
    eval_files.main(list(map(str, flags)))
    return json.loads(path.read_text()), rows(folder / f"{decode}.jsonl")


def row_of(accuracy, prompt="1*1=", truth=1):
    return {"prompt": prompt, "truth": truth, "scores": {"accuracy": accuracy}}


# --------------------------------------------------------------------------------------------- figures are counts


@pytest.mark.parametrize("decode", MODES)
def test_figures_equal_an_independent_count(decode, tmp_path):
    """Everything from the texts and counts in the jsonl, by other formulas.  Guards against means over completions that
    forget how often one was drawn, a vote of truncated answers or by number instead of weight, a level's mean divided by
    all problems, and an A* search scored by its best leaf."""
    result, found = evaluate(tmp_path, decode, "--n", 40)
    assert [row["prompt"] for row in found] == [problem.prompt for problem in data.eval_problems(40)]
    tokenizer = policy.load_tokenizer(str(ROOT / "tiny_base"))
    figures = []  # of each problem
    for row in found:
        a, b = map(int, re.fullmatch(r"(\d+)\*(\d+)=", row["prompt"]).groups())
        votes, prefixes, draws = {}, set(), []  # draws: (right, well-formed, tokens, truncated), once for each
        for c in row["completions"]:
            said = None if c["truncated"] else reward.parse_answer(c["text"])
            formatted = not c["truncated"] and reward.well_formed(c["text"])
            ids = tokenizer(c["text"].removeprefix(row["prefill"]))["input_ids"] + [tokenizer.eos_token_id] * (not c["truncated"])
            assert len(ids) == c["tokens"] and (c["correct"], c["formatted"]) == (said == a * b, formatted)
            prefixes |= {tuple(ids[:i]) for i in range(1, len(ids))}  # what the model was run on, for samples
            draws += [(said == a * b, formatted, len(ids), c["truncated"])] * c["count"]
            if said is not None:
                votes[said] = votes.get(said, 0) + (c["count"] if decode == "sample" else c["weight"])
        answers = draws[:1] if decode == "astar" else draws
        assert len(answers) == {"greedy": 1, "sample": K, "astar": len(draws) > 0}[decode]
        mean = lambda column: sum(draw[column] for draw in answers) / len(answers) if answers else 0.0
        figure = dict(zip(("accuracy", "format", "completion_length", "truncated"), map(mean, range(4))))
        leaders = [said for said in votes if votes[said] == max(votes.values())]
        if decode != "greedy":
            figure["majority"] = leaders.count(a * b) / len(leaders) if leaders else 0.0
        if decode == "astar":
            figure["found"] = float(any(draw[0] for draw in draws))
        for k in (1, 2, 4) if decode == "sample" else ():
            chosen = list(itertools.combinations(draws, k))
            figure[f"pass@{k}"] = sum(any(draw[0] for draw in draws) for draws in chosen) / len(chosen)
        run = len(tokenizer(row["prompt"] + row["prefill"])["input_ids"]) + len(prefixes)
        assert row["model_tokens"] == run if decode != "astar" else row["model_tokens"] >= run
        figure["tokens_per_problem"] = row["model_tokens"]
        figures.append((row["difficulty"], figure))

    assert {name for name in result if "_by_" not in name and name in figures[0][1]} == set(figures[0][1])
    for name in figures[0][1]:
        column = [figure[name] for _, figure in figures]
        assert result[name] == pytest.approx(sum(column) / 40), name
        for level, x in result[f"{name}_by_difficulty"].items():
            part = [x for own, x in zip((own for own, _ in figures), column) if own == level]
            assert len(part) == result["problems_by_difficulty"][level] and x == pytest.approx(sum(part) / len(part)), name
    shares = [figure["accuracy"] for _, figure in figures]
    assert result["accuracy_interval"] == evaluation.interval(shares, K if decode == "sample" else 1)
    assert list(result["problems_by_difficulty"]) == ["easy", "medium"] and result["problems"] == 40
    # What the cases are for: some right, some not; draws that are equal; truncated ones; votes that change the answer.
    if decode == "sample":
        assert 0 < result["truncated"] < 1 and 0 < result["accuracy"] < result["pass@4"] < 1
        assert any(c["count"] > 1 for row in found for c in row["completions"])
    if decode == "astar":
        assert result["found"] > result["accuracy"] > 0 and any(not row["completions"] for row in found)
        assert any(row["scores"]["majority"] != row["scores"]["accuracy"] for row in found)


def test_two_ranks_report_what_one_does(tmp_path):
    """Uneven shares of 7 problems.  Guards against noise keyed by a rank's own numbers, lost rows and means of means; and
    for the README: after `--` torchrun lets --n pass."""
    one, alone = evaluate(tmp_path, "sample", "--n", 7)
    flags = ["--decode", "sample", "--completions", K, "--device", "cpu", *MODES["sample"]]
    finish(launch(2, "--", "eval.py", "--n", 7, *flags, "--json", tmp_path / "two.json"))
    two = json.loads((tmp_path / "two.json").read_text())
    for name in set(one) - {"seconds_per_problem", "flags"}:
        assert two[name] == one[name], name
    for mine, other in zip(rows(tmp_path / "two.jsonl"), alone, strict=True):
        for c, d in zip(mine["completions"], other["completions"], strict=True):
            assert c.pop("f") == pytest.approx(d.pop("f"), abs=1e-3)  # log pi of a batch of another size: rounding
        assert mine == other


def test_batches_do_not_change_the_figures():
    model, tokenizer = policy.load_policy(str(ROOT / "tiny_base"))
    problems, ranks = data.eval_problems(12), fsdp.start(device="cpu")
    results = [
        evaluation.evaluate(model, tokenizer, problems, reward.Reward(), ranks, decode="sample", n=2, batch=b)[0]
        for b in (5, 12)
    ]
    for result in results:
        result.pop("seconds_per_problem")
    assert results[0] == results[1]


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
    assert evaluation.majority(told) == evaluation.majority(told[::-1]) == expected


def test_the_worst_completions():
    """Each kind once, and of the wrong ones the nearest first; right answers are not shown."""
    kinds = {"right": (7, True, False), "near": (8, True, False), "far": (70, True, False), "bad": (7, False, False),
             "cut": (None, False, True)}  # fmt: skip
    make = lambda name, said, formatted, cut: {"text": name, "answer": said, "formatted": formatted, "truncated": cut,
                                               "correct": said == 7}  # fmt: skip
    table = [{"truth": 7, "completions": [make(name, *facts)]} for name, facts in reversed(kinds.items())]
    faults = eval_files.worst([*table, {"truth": 7, "completions": []}], "sample", 9)
    texts = {kind: (count, [c["text"] for _, c in pairs]) for kind, (count, pairs) in faults.items()}
    assert texts == {
        "no leaf within the bounds": (1, [""]), "truncated": (1, ["cut"]), "malformed": (1, ["bad"]),
        "wrong, nearest first": (2, ["near", "far"]),
    }  # fmt: skip
    assert len(eval_files.worst(table, "sample", 1)["wrong, nearest first"][1]) == 1


# ------------------------------------------------------------------------------------------------------ statistics


def test_pass_at_k_equals_enumeration():
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
                assert evaluation.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    "right, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_equals_a_published_one(right, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3 (Wilson).  Guards against Wald's, [0, 0] for 0 of 20."""
    shares = [1.0] * right + [0.0] * (n - right)
    assert evaluation.interval(shares) == pytest.approx([low, high], abs=6e-5)
    assert evaluation.interval(shares, draws=8) == pytest.approx([low, high], abs=6e-5)  # draws that are all alike


def test_the_interval_of_independent_draws_is_that_of_as_many_problems():
    """Half of the draws of each of 50 problems right: no spread at all, so 400 outcomes and not more."""
    assert evaluation.interval([0.5] * 50, draws=8) == pytest.approx(evaluation.interval([1.0, 0.0] * 200))


@pytest.mark.parametrize("draws, alike", [(1, 1.0), (8, 0.0), (8, 0.3), (8, 1.0)])
def test_the_interval_covers_at_its_rate(draws, alike):
    """Simulated 3000 times (so the rate is known to .4 points): 100 problems whose chances are Beta with a mean that is
    itself drawn, for at one mean the rate depends on how 100 P falls between whole numbers.  alike: correlation of two draws.
    Guards against counting each draw (too narrow when they are alike) or each problem as one outcome (too wide when not)."""
    rng, covered = numpy.random.default_rng(0), 0
    for mean in rng.uniform(0.1, 0.9, 3000):
        chances = numpy.full(100, mean)
        if alike == 1:
            chances = (rng.random(100) < mean).astype(float)
        elif alike > 0:
            concentration = (1 - alike) / alike
            chances = rng.beta(mean * concentration, (1 - mean) * concentration, 100)
        low, high = evaluation.interval((rng.binomial(draws, chances) / draws).tolist(), draws)
        covered += low <= mean <= high
    assert 0.935 < covered / 3000 < 0.965


def test_the_sign_test_equals_enumeration():
    """McNemar's exact test: all 2^n ways in which n fair coins can fall, those at least as uneven.  Guards against a
    one-sided p and against leaving out the observed outcome itself."""
    for n in range(11):
        falls = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
        for better in range(n + 1):
            p = sum(abs(2 * fall - n) >= abs(2 * better - n) for fall in falls) / len(falls)
            assert eval_files.sign_test(better, n - better) == pytest.approx(p)
    assert 0 <= eval_files.sign_test(4000, 0) < 1e-300


def test_comparison_is_paired():
    """B right where A is, and on 20 of the other 200 problems: difference .05 with standard error sqrt(.05 .95/400).
    Guards against resampling the two apart, for which it would be three times that."""
    A = [row_of(float(i < 200), f"{i}*1=", i) for i in range(400)]
    B = [row_of(float(i < 220), f"{i}*1=", i) for i in range(400)]
    result = eval_files.paired(A, B)
    assert (result["difference"], result["B_better"], result["A_better"]) == (pytest.approx(0.05), 20, 0)
    assert result["p_value"] == 2 / 2**20
    error = math.sqrt(0.05 * 0.95 / 400)
    assert result["difference_interval"] == pytest.approx([0.05 - 1.96 * error, 0.05 + 1.96 * error], abs=0.15 * error)
    back = eval_files.paired(B, A)
    assert back["difference"] == -result["difference"] and back["A_better"] == 20
    assert eval_files.paired(A, A)["p_value"] == 1.0


# ------------------------------------------------------------------------------------------ command line and files


def refused(capsys, *flags):
    """The one sentence on stderr, with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        eval_files.main(["--device", "cpu", *map(str, flags)])
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.err.count("\n") == 1 and output.err.startswith("eval.py: "), output.err
    return output.err


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--model /nowhere/at/all --json OUT/a.json", "/nowhere/at/all"), ("--n 579", "only 578"), ("--n 0", "--n"),
        ("--completions 0", "--completions"), ("--eval-file OUT/two.jsonl --n 3", "only 2 problems"),
        ("--eval-file OUT/none.jsonl", "none.jsonl cannot be read"), ("--json OUT/a.txt", ".json"),
        ("--json OUT/nothing/a.json", "cannot be written"), ("--json /proc/a.json", "cannot be written"),
        ("--json OUT/folder.json --overwrite", "folder.json exists"),
        ("--compare OUT/none.jsonl OUT/A.jsonl", "none.jsonl cannot be read"), ("--compare OUT/A.jsonl", "--compare"),
        ("--compare OUT/A.jsonl OUT/two.jsonl", "two.jsonl, line 1"), ("--compare OUT/bad.jsonl OUT/A.jsonl", "bad.jsonl, line 2"),
        ("--compare OUT/A.jsonl OUT/empty.jsonl", "no problems"), ("--compare OUT/A.jsonl OUT/nan.jsonl", "nan.jsonl, line 1"),
        ("--compare OUT/A.jsonl OUT/short.jsonl", "same --n"), ("--compare OUT/A.jsonl OUT/other.jsonl", "problems differ"),
        ("--compare OUT/A.jsonl OUT/A.jsonl --json OUT/a.json", "--json"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(flags, said, tmp_path, capsys):
    line = lambda *facts: json.dumps(row_of(*facts)) + "\n"
    files = {
        "A": line(1.0) + line(0.0, "2*2=", 4), "other": line(1.0) + line(0.0, "2*3=", 6), "short": line(1.0), "empty": "",
        "bad": line(1.0) + '{"prompt": "2*2="', "nan": line(math.nan), "two": '{"prompt": "1*1=", "answer": 1}\n' * 2,
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "folder.json").mkdir()
    before = sorted(tmp_path.iterdir())
    assert said in refused(capsys, *flags.replace("OUT", str(tmp_path)).split())
    assert sorted(tmp_path.iterdir()) == before


def test_results_are_not_overwritten_unless_asked(tmp_path, capsys):
    """The whole file or none: refused before the work; --overwrite replaces both; a full disk leaves no trace."""
    small = ("--n", 2, "--json", tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text("precious\n")
    assert "a.jsonl exists" in refused(capsys, *small)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"] and (tmp_path / "a.jsonl").read_text() == "precious\n"
    eval_files.main(list(map(str, (*small, "--overwrite"))))
    assert len(rows(tmp_path / "a.jsonl")) == 2 and json.loads((tmp_path / "a.json").read_text())["flags"]["n"] == 2


def test_a_full_disk_leaves_no_half_file(tmp_path, capsys, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation.os, "fsync", full)
    assert "No space left" in refused(capsys, "--n", 2, "--json", tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_comparison_needs_no_model(tmp_path, capsys, monkeypatch):
    """And its table is that of two files which --json wrote."""
    A, B = evaluate(tmp_path, "greedy", "--n", 20)[0], evaluate(tmp_path, "sample", "--n", 20)[0]
    monkeypatch.setattr(policy, "load_policy", None)
    capsys.readouterr()
    eval_files.main(["--compare", str(tmp_path / "greedy.jsonl"), str(tmp_path / "sample.jsonl")])
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table["problems"] == "20" and table["difference"] == f"{B['accuracy'] - A['accuracy']:.3f}"


@pytest.mark.parametrize("main", [eval_files.main, train.main])
def test_torchrun_leaves_the_flags_alone(main, capsys):
    """torchrun takes a flag of the script that begins like one of its own for its own; --n is why there is --problems."""
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
    assert len(flags) > 15
    for flag in flags - {"--n", "--standalone", "--nproc", "--nproc_per_node"}:
        assert get_args_parser().parse_args(["script.py", flag, "1"]).training_script_args == [flag, "1"]
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["script.py", "--n", "1"])
