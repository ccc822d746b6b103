"""experiments/gpu.py, as far as a CPU can tell: what it reports, when it fails, what it skips.

That every check runs is what .ci/run tries: `python experiments/gpu.py --device cpu --small`.
"""

import os

import pytest
import torch
from conftest import rows

from examples import memory
from experiments import gpu

SMALL = ["--device", "cpu", "--small"]


def run(folder, *flags):
    """(lines, exit status) of the script in this process."""
    status = 0
    try:
        gpu.main([*SMALL, "--out", str(folder), *flags])
    except SystemExit as end:
        status = end.code
    return rows(folder / "gpu.jsonl"), status


def good(report):
    """A check that finds what it expects; a prediction that was wrong is no failure."""
    report.say(ok=True, predicted="share >= 0.4", seen=0.1, held=False)


def raising(report):
    """A check that ends with an exception."""
    report.say(ok=True)
    raise RuntimeError("out of luck")


def wrong(report):
    """A check that finds a wrong result."""
    report.say(ok=False)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ((), "there is no GPU here"),
        (("--device", "cpu"), "--device cpu needs --small"),
        ((*SMALL, "--only", "everything"), "--only"),
    ],
)
def test_a_mistake_is_one_sentence(flags, sentence, capsys, monkeypatch):
    """Guards against a 3B model on a CPU, and against a check whose name is mistyped."""
    monkeypatch.setattr(torch.cuda, "is_available", bool)
    with pytest.raises(SystemExit) as end:
        gpu.main(list(flags))
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert sentence in said and said.count("\n") == 1


def test_the_first_line_names_the_machine(tmp_path):
    """Guards against figures of which nobody knows the card."""
    lines, status = run(tmp_path, "--only", "env")
    assert status == 0
    assert lines[0]["check"] == "env"
    assert {"card", "driver", "torch", "transformers"} <= lines[0].keys()
    assert lines[0]["torch"] == torch.__version__
    assert lines[-1]["failed"] == []


def test_every_check_says_what_to_expect():
    """Guards against a figure that nobody can judge."""
    for name, (function, seconds) in gpu.CHECKS.items():
        assert function.__name__ == name and seconds < 200
        assert "xpected" in function.__doc__ or "redicted" in function.__doc__, name


def test_a_failure_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    """Guards against one fault that hides all that comes after it, and against a silent one."""
    checks = {"raising": (raising, 1), "good": (good, 1)}
    monkeypatch.setattr(gpu, "CHECKS", checks)
    lines, status = run(tmp_path)
    assert status == 1
    (error,) = [line for line in lines if "error" in line]
    assert error["check"] == "raising" and error["error"] == "RuntimeError: out of luck"
    assert any(line["check"] == "good" and line.get("ok") for line in lines)
    assert lines[-1]["failed"] == ["raising"]


def test_a_wrong_result_fails_and_a_wrong_prediction_does_not(tmp_path, monkeypatch):
    """Guards against a check that says ok: false while the script ends well."""
    monkeypatch.setattr(gpu, "CHECKS", {"good": (good, 1), "wrong": (wrong, 1)})
    lines, status = run(tmp_path / "both")
    assert (status, lines[-1]["failed"]) == (1, ["wrong"])
    lines, status = run(tmp_path / "good", "--only", "good")
    assert (status, lines[-1]["failed"]) == (0, [])


def test_what_does_not_fit_into_the_budget_is_skipped(tmp_path, monkeypatch):
    """Guards against a lease that ends within a check: the one that is long is left out."""
    monkeypatch.setattr(gpu, "CHECKS", {"raising": (raising, 1000), "good": (good, 1)})
    lines, status = run(tmp_path, "--budget", "500")
    assert status == 0
    assert [line["check"] for line in lines if "skipped" in line] == ["raising"]
    assert any(line["check"] == "good" and line.get("ok") for line in lines)


def test_a_program_that_hangs_is_killed(tmp_path, monkeypatch):
    """Guards against a process that goes on after the script; its failure is told."""

    def hanging(report):
        words = ["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
        gpu.run_programs(report, [("hanging", "folder", 1, words)], limit=1.0)

    monkeypatch.setattr(gpu, "CHECKS", {"hanging": (hanging, 1)})
    lines, status = run(tmp_path)
    (line,) = [line for line in lines if "program" in line]
    assert (status, line["ok"], line["status"]) == (1, False, "ran out of time")
    with pytest.raises(ProcessLookupError):
        os.kill(int(line["printed"]), 0)


def test_a_child_that_is_not_the_cpus_is_noticed(tmp_path, monkeypatch):
    """Guards against a comparison that compares nothing."""
    top_children = gpu.astar_search.top_children

    def shifted(*arguments):
        table = top_children(*arguments)
        table["token"][0, 0] += 1
        return table

    monkeypatch.setattr(gpu.astar_search, "top_children", shifted)
    lines, status = run(tmp_path, "--only", "children")
    assert status == 1
    assert not any(line["as_unscreened"] for line in lines if "as_unscreened" in line)


def test_a_gradient_that_is_not_the_cpus_is_noticed(tmp_path, monkeypatch):
    """Guards against a comparison of a gradient with itself, and against gradients of zero."""
    gradient = gpu.gradient
    calls = []

    def disturbed(*arguments):
        calls.append(gradient(*arguments))
        assert calls[-1].abs().max() > 0
        if len(calls) % 2 == 0:  # the second of each loss is the device's
            return 1.01 * calls[-1]
        return calls[-1]

    monkeypatch.setattr(gpu, "gradient", disturbed)
    lines, status = run(tmp_path, "--only", "gradients")
    differences = [line["difference"] for line in lines if "difference" in line]
    assert status == 1
    assert differences == pytest.approx([0.01] * 4, rel=1e-3)


def test_the_bytes_of_a_round_by_hand():
    """Qwen2.5-3B in float32.  Guards against a floor without all layers, K or V, or the weights."""
    model = memory.outline(str(gpu.BIG_SHAPE))
    weights = 4 * 3_085_938_688
    # 36 layers, K and V, 2 heads of 128 numbers, 4 bytes each; 256 nodes, 1000 tokens deep
    kv = 256 * 1000 * 36 * 2 * 2 * 128 * 4
    assert gpu.bytes_of_round(model, nodes=256, depth=1000) == weights + kv


def test_a_round_of_chains_is_one_forward_of_one_token_a_chain():
    """Guards against chains that share a node, and against a prompt that is run again."""
    config = gpu.policy.read_config(str(gpu.TINY_BASE))
    model = gpu.transformers.AutoModelForCausalLM.from_config(config).eval()
    nodes = gpu.Chains(model, problems=3, chains=2, depth=5)
    assert nodes.expander.spent == [5, 5, 5]
    forwards = nodes.expander.forwards
    for round_number in (1, 2):
        nodes.round()
        assert nodes.expander.forwards == forwards + round_number
        assert nodes.expander.spent == [5 + 2 * round_number] * 3
    assert {node.depth for node in nodes.nodes} == {2}
