"""Several processes train like one; stops and faults of every kind lose nothing.  Ranks are gloo processes on the CPU."""

import fcntl
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

import fsdp
import train
from conftest import finish, launch, rows, tensors, timeless
from experiments import run_folder

ROOT = pathlib.Path(train.__file__).parent
SMALL = ["--config", "ppo", "--problems-per-iteration", "5", "--rollouts-per-problem", "3", "--eval-problems", "5",
         "--max-new-tokens", "14", "--device", "cpu", "--checkpoint-every", "1", "--keep-checkpoints", "9",
         "--samples", "2", "--minibatches", "2"]  # fmt: skip


def flags(folder, *more, ranks=1, iterations=4):
    together = ["--distributed"] if ranks > 1 else []
    return ["train.py", *SMALL, "--iterations", iterations, "--output-dir", folder, *together, *more]


def distance(one, other):
    """Largest difference of any weight or moment of two checkpoints."""
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


def copy_until(iteration, folder, target):
    """The folder of a run as it was after `iteration`."""
    shutil.copytree(folder, target)
    for path in run_folder.checkpoints(str(target)):
        if int(path.rpartition("_")[2]) > iteration:
            shutil.rmtree(path)
    return target


def children(process):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def wait_for_iteration(process, folder, iteration):
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) <= iteration:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Undisturbed runs of four iterations on 1, 2 and 3 ranks, started together; tests only read them."""
    folder = tmp_path_factory.mktemp("ranks")
    started = [launch(n, *flags(folder / str(n), ranks=n)) for n in (1, 2, 3)]
    for process in started:
        finish(process)
    return {n: folder / str(n) for n in (1, 2, 3)}


# ------------------------------------------------------------------------------------------- many ranks, one result


def test_the_demo_on_three_ranks():
    """Gradients averaged instead of added, or a share lost, fail its assertions."""
    assert "the state is whole: ok" in finish(launch(3, "fsdp.py"))


def test_rollouts_and_gradients_do_not_depend_on_the_ranks(tmp_path):
    """Theorems 8 and 11: 7 problems on 1, 2 and 3 ranks, float64: the same leaves token for token, the same gradients.
    Guards against noise keyed by the rank's own numbers, means of means, and gradients divided by the ranks."""
    started = [launch(n, ROOT / "tests" / "ranks_worker.py", tmp_path) for n in (1, 2, 3)]
    for process in started:
        finish(process)
    results = {n: json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2, 3)}
    gradients = {n: load_file(tmp_path / f"{n}.safetensors") for n in (1, 2, 3)}
    assert len(results[1]["leaves"]) == 7
    for n in (2, 3):
        assert results[n]["leaves"] == results[1]["leaves"]
        for name, x in results[1]["learned"].items():
            assert results[n]["learned"][name] == pytest.approx(x, rel=1e-6, abs=1e-9), name
        for name, x in gradients[1].items():
            assert (gradients[n][name] - x).abs().max() < 1e-6 * max(x.abs().max().item(), 1e-3), name


def test_runs_on_more_ranks_report_the_same(runs):
    """Metrics to 1e-4; five problems on three ranks, so shares and minibatches are uneven and some are empty."""
    one = timeless(runs[1])
    for n in (2, 3):
        assert len(timeless(runs[n])) == len(one) == 5
        for mine, theirs in zip(timeless(runs[n]), one):
            assert mine.keys() == theirs.keys()
            for key, x in theirs.items():
                if key in ("forwards", "first_kl") or x is None:  # of all ranks together; rounding alone
                    continue
                assert mine[key] == (x if isinstance(x, dict) else pytest.approx(x, rel=1e-4, abs=1e-6)), (n, key)
        assert [row["completion"] for row in rows(runs[n] / "samples.jsonl")] == [
            row["completion"] for row in rows(runs[1] / "samples.jsonl")
        ]


def test_three_ranks_with_two_problems(tmp_path):
    """A rank without a problem joins every collective: else this hangs.  apo samples and scores with a second model."""
    more = ["--problems-per-iteration", "2", "--loss", "apo", "--rollout", "sample"]
    finish(launch(3, *flags(tmp_path / "run", *more, ranks=3, iterations=2)))
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 3


def test_bfloat16_starts_at_ratio_one(tmp_path):
    """pi_old is that of the training forward: otherwise bfloat16 alone would look like a policy that has moved."""
    train.main(list(map(str, flags(tmp_path, "--mixed-precision", "bf16", iterations=2)[1:])))
    torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None
    metrics = rows(tmp_path / "metrics.jsonl")
    assert all(abs(row["first_kl"]) < 1e-5 and row["approx_kl"] > 0 for row in metrics[1:])
    kept = tensors(tmp_path / "checkpoint_iter_2")
    assert all(x.dtype == torch.float32 for x in kept.values())  # the master weights, not a rounded copy
    moved = kept["model/model.norm.weight"]
    assert not torch.equal(moved, moved.bfloat16().float())


# ------------------------------------------------------------------------------------------------ stops and resumes


def test_two_ranks_killed_and_resumed_are_exact(runs, tmp_path):
    """kill -9 after the second iteration, then --resume auto: bit for bit on 2 ranks, to 1e-5 on 1."""
    folder = tmp_path / "run"
    process = launch(2, *flags(folder, ranks=2))
    wait_for_iteration(process, folder, 2)
    for pid in [*children(process), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    shutil.copytree(folder, tmp_path / "alone")
    for n, target in ((2, folder), (1, tmp_path / "alone")):
        assert "resumed from" in finish(launch(n, *flags(target, "--resume", "auto", ranks=n)))
        assert distance(target / "checkpoint_iter_4", runs[2] / "checkpoint_iter_4") <= (0 if n == 2 else 1e-5)
    assert timeless(folder) == timeless(runs[2])
    assert (folder / "samples.jsonl").read_text() == (runs[2] / "samples.jsonl").read_text()


def test_one_rank_resumed_on_three(runs, tmp_path):
    folder = copy_until(2, runs[1], tmp_path / "run")
    finish(launch(3, *flags(folder, "--resume", "auto", ranks=3)))
    assert distance(folder / "checkpoint_iter_4", runs[1] / "checkpoint_iter_4") < 1e-5


def test_one_rank_killed_brings_all_down(tmp_path):
    """The others end, by torchrun's hand or by the closed connection, and say that the fault was not theirs."""
    process = launch(2, *flags(tmp_path / "run", ranks=2, iterations=500))
    wait_for_iteration(process, tmp_path / "run", 1)
    os.kill(children(process)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_finishes_the_iteration(runs, ranks, tmp_path):
    """What a preempting scheduler needs: checkpoint, exit 0, and the continuation equals an undisturbed run."""
    folder = tmp_path / "run"
    process = launch(ranks, *flags(folder, "--checkpoint-every", "50", ranks=ranks))
    wait_for_iteration(process, folder, 1)
    for pid in children(process) if ranks > 1 else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert "stopped by SIGTERM after iteration" in finish(process)
    assert len(run_folder.checkpoints(str(folder))) == 1
    finish(launch(ranks, *flags(folder, "--checkpoint-every", "50", "--resume", "auto", ranks=ranks)))
    assert distance(folder / "checkpoint_iter_4", runs[ranks] / "checkpoint_iter_4") == 0
    assert timeless(folder) == timeless(runs[ranks])


# ----------------------------------------------------------------------------------------------------------- faults


def run(folder, *more, iterations=4):
    train.main(list(map(str, flags(folder, *more, iterations=iterations)[1:])))


def refused(capsys, folder, *more):
    with pytest.raises(SystemExit) as stop:
        run(folder, *more)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_passed_over(runs, damage, tmp_path, capsys):
    """The newest is damaged: its file is named, the one before it taken, and the end is that of an undisturbed run."""
    folder = copy_until(3, runs[1], tmp_path / "run")
    path = folder / "checkpoint_iter_3" / "optimizer.safetensors"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
    finish_output = finish(launch(1, *flags(folder, "--resume", "auto")))
    assert "optimizer.safetensors" in finish_output and "going back to" in finish_output
    assert "after iteration 2" in finish_output
    assert distance(folder / "checkpoint_iter_4", runs[1] / "checkpoint_iter_4") == 0


def test_a_full_disk_keeps_the_last_checkpoint(runs, tmp_path):
    """A limit on the size of files, as a full disk: one sentence, exit 1, no half-written checkpoint."""
    folder = copy_until(2, runs[1], tmp_path / "run")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    output = finish(launch(1, *flags(folder, "--resume", "auto"), preexec_fn=limit), code=1)
    assert "checkpoint_iter_3 cannot be written" in output and "Traceback" not in output
    assert "the last good checkpoint is" in output and "checkpoint_iter_2" in output
    assert sorted(path.name for path in folder.glob("*checkpoint*")) == ["checkpoint_iter_1", "checkpoint_iter_2"]
    finish(launch(1, *flags(folder, "--resume", "auto")))
    assert distance(folder / "checkpoint_iter_4", runs[1] / "checkpoint_iter_4") == 0


def test_a_folder_that_cannot_be_written_is_refused(capsys):
    assert "--output-dir" in refused(capsys, "/proc/run")


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "another run is writing there" in refused(capsys, tmp_path)
    assert list(tmp_path.iterdir()) == []
    os.close(lock)


def test_code_in_a_model_folder_is_not_run(tmp_path, capsys):
    """A .bin that would run a command when unpickled, and a config that names its own code: refused, and not run."""
    import pickle

    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    base = ROOT / "tiny_base"
    for kind in ("bin", "code"):
        folder = tmp_path / kind
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns("weak", "*.py"))
        if kind == "bin":
            (folder / "model.safetensors").unlink()
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
        else:
            config = json.loads((folder / "config.json").read_text())
            config |= {
                "model_type": "mine",
                "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
            }
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
        assert "--model" in refused(capsys, tmp_path / "run", "--model", folder)
    assert not marker.exists() and not (tmp_path / "run").exists()


def test_the_share_and_the_totals_of_one_process():
    ranks = fsdp.Ranks(1, 3, torch.device("cpu"))
    assert [list(fsdp.share(5, fsdp.Ranks(r, 3, ranks.device))) for r in range(3)] == [[0, 3], [1, 4], [2]]
    assert fsdp.total({"a": 1, "b": 2.5}, fsdp.Ranks(0, 1, ranks.device)) == {"a": 1, "b": 2.5}
