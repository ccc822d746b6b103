"""Several processes train like one; stops and faults of every kind lose nothing.

Ranks are gloo processes on the CPU.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import pickle
import resource
import shutil
import signal
import subprocess
import time
from unittest import mock

import pytest
import torch
from conftest import ForkedRanks, finish, free_port, launch, rows, tensors, timeless
from safetensors.torch import load_file, save_file

import fsdp
import train

ROOT = pathlib.Path(train.__file__).parent
SMALL = """
    --config ppo --problems-per-iteration 5 --rollouts-per-problem 3 --eval-problems 5
    --max-new-tokens 14 --device cpu --checkpoint-every 1 --keep-checkpoints 9 --samples 2
    --minibatches 2 --average 0.9 --value-epochs 1
""".split()
ONE = fsdp.Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def flags(folder, *more, ranks=1, iterations=4):
    """The flags of a small run.  A later flag overrides an earlier one."""
    words = [*SMALL, "--iterations", iterations, "--output-dir", folder]
    if ranks > 1:
        words.append("--distributed")
    return [str(word) for word in [*words, *more]]


def fork_run(folder, *more, ranks=1, iterations=4):
    """Start train.py on so many ranks."""
    words = flags(folder, *more, ranks=ranks, iterations=iterations)
    return ForkedRanks(ranks, "train.py", *words)


def run(folder, *more, iterations=4):
    """train.py in this process."""
    train.main(flags(folder, *more, iterations=iterations))


def distance(one, other):
    """Largest difference of any weight or moment of two checkpoints."""
    one = tensors(one)
    other = tensors(other)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def copy_until(iteration, folder, target):
    """The folder of a run as it was after `iteration`."""
    shutil.copytree(folder, target)
    for path in fsdp.list_checkpoints(str(target)):
        if fsdp.checkpoint_iteration(path) > iteration:
            shutil.rmtree(path)
    return target


def children(process):
    """The processes that a process has started, by id."""
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    listing = subprocess.run(command, capture_output=True, text=True).stdout
    return [int(pid) for pid in listing.split()]


def wait_for_iteration(process, folder, iteration):
    """Wait until metrics.jsonl has the row of this iteration; row 0 is before the first."""
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) <= iteration:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """ranks_worker.py on 1, 2 and 3 ranks, started together; tests only read what it writes.

    Each launch makes two single steps in float64, and then the run N/, four undisturbed
    iterations.  Starting torch costs seconds, so that they share it.
    """
    folder = tmp_path_factory.mktemp("ranks")
    started = []
    for n in (1, 2, 3):
        # Only the checkpoints of one rank are resumed from.
        more = [] if n == 1 else ["--checkpoint-every", "50"]
        words = flags(folder / str(n), *more, ranks=n)
        started.append(ForkedRanks(n, "tests/ranks_worker.py", folder, *words))
    for process in started:
        finish(process)
    return folder


@pytest.fixture(scope="module")
def runs(launches):
    """The folders of the undisturbed runs, by their number of ranks."""
    return {n: launches / str(n) for n in (1, 2, 3)}


@pytest.fixture(autouse=True)
def one_thread():
    """One thread as in the launched processes: then a run in this process has the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------- Many ranks, one result


def test_the_demo_of_the_file_alone(tmp_path):
    """fsdp.py on one rank, copied into an empty folder, and on three.

    Gradients averaged instead of added, a slice lost, or a sibling needed fail its assertions.
    """
    shutil.copy(ROOT / "fsdp.py", tmp_path)
    for process in (launch(1, "fsdp.py", cwd=tmp_path), ForkedRanks(3, "fsdp.py")):
        output = finish(process)
        assert "the state is whole: ok" in output
        assert "a flipped bit in it is noticed: ok" in output


@pytest.mark.parametrize("problems", [7, 2])
def test_rollouts_and_gradients_do_not_depend_on_the_ranks(problems, launches):
    """Theorems 8 and 11: one step of train.main on 1, 2 and 3 ranks, in float64.

    The same leaves token for token, and the same gradients.  The ranks have unequal numbers of
    tokens and of micro-batches; of two problems the third rank has none.  Guards against noise
    keyed by the rank's own numbers, means of means, and gradients divided by the ranks.
    """
    results = {}
    gradients = {}
    for n in (1, 2, 3):
        results[n] = json.loads((launches / f"{n}_{problems}.json").read_text())
        gradients[n] = load_file(launches / f"{n}_{problems}.safetensors")
    assert [len(leaves) for leaves in results[1]["leaves"]] == [3] * problems
    for n in (2, 3):
        assert results[n]["leaves"] == results[1]["leaves"]
        for name, expected in results[1]["metrics"].items():
            if not isinstance(expected, dict):
                # Weights of leaves are float32.
                expected = pytest.approx(expected, rel=1e-6, abs=1e-7)
            assert results[n]["metrics"][name] == expected, name
        for name, expected in gradients[1].items():
            largest = max(expected.abs().max().item(), 1e-3)
            assert (gradients[n][name] - expected).abs().max() < 1e-6 * largest, name


def test_runs_on_more_ranks_report_the_same(runs):
    """Metrics to 1e-4.

    Five problems on three ranks: slices and minibatches are uneven, and some are empty.
    """
    one = timeless(runs[1])
    for n in (2, 3):
        many = timeless(runs[n])
        assert len(many) == len(one) == 5
        for row, expected in zip(many, one):
            assert row.keys() == expected.keys()
            for name, x in expected.items():
                # forwards: of all ranks together; first_kl: rounding alone
                if name in ("forwards", "first_kl") or x is None:
                    continue
                if not isinstance(x, dict):
                    x = pytest.approx(x, rel=1e-4, abs=1e-6)
                assert row[name] == x, (n, name)
        samples = [row["completion"] for row in rows(runs[n] / "samples.jsonl")]
        assert samples == [row["completion"] for row in rows(runs[1] / "samples.jsonl")]


def test_three_ranks_with_two_problems(tmp_path):
    """A rank without a problem joins every collective, or this hangs.

    apo samples, and scores with a second model.
    """
    more = ["--problems-per-iteration", "2", "--loss", "apo", "--rollout", "sample"]
    finish(fork_run(tmp_path / "run", *more, ranks=3, iterations=2))
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 3


def test_two_nodes_are_two_ranks(runs, tmp_path):
    """Two launches of torchrun with a rank each, both of them number 0 of their node.

    Bit for bit the run of one launch with two ranks, and so is its resume there.  Guards against a
    rank within the node where the rank among all is meant: two that write and print, or none.
    """
    folder = tmp_path / "run"
    torchrun = "-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d".split()
    torchrun.append(f"--rdzv_endpoint=localhost:{free_port()}")
    words = [*torchrun, "train.py", *flags(folder, ranks=2)]
    nodes = [launch(1, *words), launch(1, *words)]
    outputs = sorted(finish(node) for node in nodes)
    assert outputs[0] == ""
    assert outputs[1].count("greedy accuracy before training") == 1
    assert timeless(folder) == timeless(runs[2])
    assert distance(folder / "checkpoint_iter_4", runs[2] / "checkpoint_iter_4") == 0

    resumed = copy_until(3, folder, tmp_path / "resumed")
    finish(fork_run(resumed, "--resume", "auto", ranks=2))
    assert timeless(resumed) == timeless(runs[2])
    assert distance(resumed / "checkpoint_iter_4", runs[2] / "checkpoint_iter_4") == 0


def test_two_replicas_of_two_ranks_train_like_one_rank(runs, tmp_path, capsys):
    """From a checkpoint of one rank to 2 x 2 ranks, and from theirs back to one: 1e-5.

    Guards against gradients that are averaged within a replica alone, and against a tensor of a
    checkpoint that is cut or put together by the wrong ranks.
    """
    folder = copy_until(2, runs[1], tmp_path / "run")
    finish(fork_run(folder, "--resume", "auto", "--replicas", "2", ranks=4))
    assert distance(folder / "checkpoint_iter_4", runs[1] / "checkpoint_iter_4") < 1e-5
    back = copy_until(3, folder, tmp_path / "back")
    run(back, "--resume", "auto")
    assert distance(back / "checkpoint_iter_4", runs[1] / "checkpoint_iter_4") < 1e-5
    error = refused(capsys, tmp_path / "other", "--replicas", "2")
    assert "--replicas 2 does not divide the number of ranks, 1" in error


def test_a_node_with_too_few_gpus_is_said_by_every_rank(monkeypatch):
    """The second rank of a node asks for its second GPU.  All ranks get the sentence.

    Only the first of a node prints one, so a failure of the second alone was printed by none.
    """
    asked = []

    def refuse(function, ranks):
        with pytest.raises(ValueError) as failure:
            function()
        asked.append(str(failure.value))
        raise ValueError("of all ranks")

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(fsdp, "raise_everywhere", refuse)
    with pytest.raises(ValueError, match="of all ranks"):
        fsdp.init_ranks(device="cuda", sharded=True)
    torch.distributed.destroy_process_group()
    assert asked[0].startswith("--device cuda:1: not usable here")


def test_bfloat16_starts_at_ratio_one(tmp_path):
    """pi_old is that of the training forward.

    Otherwise bfloat16 alone would look like a policy that has moved.
    """
    run(tmp_path, "--mixed-precision", "bf16", iterations=2)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    metrics = rows(tmp_path / "metrics.jsonl")
    for row in metrics[1:]:
        assert abs(row["first_kl"]) < 1e-5
        assert row["approx_kl"] > 0
    kept = tensors(tmp_path / "checkpoint_iter_2")
    # The master weights, not a rounded copy.
    assert all(x.dtype == torch.float32 for x in kept.values())
    moved = kept["model/model.norm.weight"]
    assert not torch.equal(moved, moved.bfloat16().float())


def test_the_slice_and_the_sums_of_one_process():
    slices = [list(fsdp.rank_slice(5, fsdp.Ranks(rank, 3, ONE.device))) for rank in range(3)]
    assert slices == [[0, 3], [1, 4], [2]]
    assert fsdp.all_gather({"a": (1, 2)}, ONE) == [{"a": (1, 2)}]
    assert fsdp.all_reduce_sum({"a": 1, "b": 2.5}, ONE) == {"a": 1, "b": 2.5}


@pytest.mark.parametrize("name", ("auto", "cuda"))
def test_one_process_with_fsdp_takes_the_first_gpu(name, monkeypatch):
    """torch.cuda.set_device refuses a device without a number, with ValueError.

    Guards against --mixed-precision bf16 and --cpu-offload that end at once on a single GPU.
    """
    zeros = torch.zeros
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))  # there is no GPU
    assert fsdp.usable_device(name) == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert fsdp.usable_device(name) == torch.device("cuda:3")
    assert fsdp.usable_device("cuda:1") == torch.device("cuda:1")


def test_one_process_raises_the_same_sentence():
    """ranks_worker.py has the same for several ranks, which also say whose failure it was."""

    def no_file():
        raise OSError("there is no file")

    def bug():
        raise KeyError("a bug")

    for where in (fsdp.raise_everywhere, fsdp.on_main):
        assert where(os.getpid, ONE) == os.getpid()
        with pytest.raises(ValueError, match="^there is no file$"):
            where(no_file, ONE)
        with pytest.raises(KeyError):
            where(bug, ONE)
    assert fsdp.on_main(no_file, fsdp.Ranks(1, 1, ONE.device)) is None  # not the main rank


# -------------------------------------------------------------------------------- Stops and resumes


def test_two_ranks_killed_and_resumed_are_exact(runs, tmp_path, capsys):
    """kill -9 after the second iteration, then --resume auto: bit for bit on 2 ranks, 1e-5 on 1."""
    folder = tmp_path / "run"
    alone = tmp_path / "alone"
    process = fork_run(folder, ranks=2)
    wait_for_iteration(process, folder, 2)
    for pid in process.pids():
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    shutil.copytree(folder, alone)
    together = fork_run(folder, "--resume", "auto", ranks=2)
    run(alone, "--resume", "auto")
    assert "resumed from" in capsys.readouterr().out
    assert distance(alone / "checkpoint_iter_4", runs[2] / "checkpoint_iter_4") <= 1e-5
    assert "resumed from" in finish(together)
    assert distance(folder / "checkpoint_iter_4", runs[2] / "checkpoint_iter_4") == 0
    assert timeless(folder) == timeless(runs[2])
    assert (folder / "samples.jsonl").read_text() == (runs[2] / "samples.jsonl").read_text()


def test_one_rank_resumed_on_three(runs, tmp_path):
    folder = copy_until(2, runs[1], tmp_path / "run")
    finish(fork_run(folder, "--resume", "auto", ranks=3))
    assert distance(folder / "checkpoint_iter_4", runs[1] / "checkpoint_iter_4") < 1e-5


def test_one_rank_killed_brings_all_down(tmp_path):
    """The others end, by torchrun's hand or by the closed connection."""
    words = flags(tmp_path / "run", ranks=2, iterations=500)
    process = launch(2, "train.py", *words)
    wait_for_iteration(process, tmp_path / "run", 1)
    os.kill(children(process)[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_finishes_the_iteration(runs, ranks, tmp_path):
    """What a preempting scheduler needs: checkpoint, exit 0, and an exact continuation."""
    folder = tmp_path / "run"
    process = fork_run(folder, "--checkpoint-every", "50", ranks=ranks)
    wait_for_iteration(process, folder, 1)
    for pid in process.pids():
        os.kill(pid, signal.SIGTERM)
    assert "stopped by SIGTERM after iteration" in finish(process)
    assert len(fsdp.list_checkpoints(str(folder))) == 1
    finish(fork_run(folder, "--checkpoint-every", "50", "--resume", "auto", ranks=ranks))
    assert distance(folder / "checkpoint_iter_4", runs[ranks] / "checkpoint_iter_4") == 0
    assert timeless(folder) == timeless(runs[ranks])


# ------------------------------------------------------------------------------------------- Faults


def refused(capsys, folder, *more):
    """Assert that train.py refuses to run with one sentence and exit status 2; return it."""
    with pytest.raises(SystemExit) as stop:
        run(folder, *more)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.count("\n") == 1, error
    return error


def damage_file(path, damage):
    """Remove a file, cut off its last byte, or flip the last bit of it."""
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_passed_over(runs, damage, tmp_path, capsys):
    """The newest is damaged: its file is named and the one before it is taken.

    The end is that of an undisturbed run.
    """
    folder = copy_until(3, runs[1], tmp_path / "run")
    damage_file(folder / "checkpoint_iter_3" / "optimizer.safetensors", damage)
    run(folder, "--resume", "auto")
    captured = capsys.readouterr()
    assert "optimizer.safetensors" in captured.err
    assert "going back to" in captured.err
    assert "after iteration 2" in captured.out
    assert distance(folder / "checkpoint_iter_4", runs[1] / "checkpoint_iter_4") == 0


@contextlib.contextmanager
def full_disk_after_1_mib():
    """Inside, this process can write no file beyond its first MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_last_checkpoint(runs, tmp_path, capsys):
    """A limit on the size of files, as a full disk: one sentence, exit 1, no half checkpoint."""
    folder = copy_until(2, runs[1], tmp_path / "run")
    with full_disk_after_1_mib(), pytest.raises(SystemExit) as stop:
        run(folder, "--resume", "auto")
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert "checkpoint_iter_3 cannot be written" in error
    assert "the last good checkpoint is" in error
    assert "checkpoint_iter_2" in error
    assert error.count("\n") == 1
    left = sorted(path.name for path in folder.glob("*checkpoint*"))
    assert left == ["checkpoint_iter_1", "checkpoint_iter_2"]
    run(folder, "--resume", "auto")
    assert distance(folder / "checkpoint_iter_4", runs[1] / "checkpoint_iter_4") == 0


def test_a_folder_that_cannot_be_written_is_refused(capsys):
    assert "--output-dir" in refused(capsys, "/proc/run")


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "another run is writing there" in refused(capsys, tmp_path)
    assert list(tmp_path.iterdir()) == []
    os.close(lock)


class Payload:
    """Unpickled, it runs a command that makes the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["bin", "code"])
def test_code_in_a_model_folder_is_not_run(kind, tmp_path, capsys):
    """A .bin that would run a command when unpickled, and a config that names its own code.

    Both are refused, and nothing is run.
    """
    marker = tmp_path / "ran"
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tiny_base", folder, ignore=shutil.ignore_patterns("weak", "*.py"))
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    else:
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = "mine"
        config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
    assert "--model" in refused(capsys, tmp_path / "run", "--model", folder)
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------- Files


def full_disk(handle):
    raise OSError(28, "No space left on device")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """The old file stays when the disk is full, and nothing is left beside it."""
    path = tmp_path / "config.json"
    fsdp.write_file(str(path), "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        fsdp.write_file(str(path), "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    fsdp.write_file(str(path), "new: \u03c0")
    assert path.read_text(encoding="utf-8") == "new: \u03c0"
    assert list(tmp_path.iterdir()) == [path]


def test_rows_are_appended_and_a_fingerprint_is_of_the_content(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fsdp.append_rows(str(path), [{"iteration": 1}])
    fsdp.append_rows(str(path), [{"iteration": 2}, {"iteration": 3}])
    content = b'{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n'
    assert path.read_bytes() == content
    checksum = hashlib.sha256(content).hexdigest()
    assert fsdp.fingerprint(str(path)) == {"bytes": 51, "sha256": checksum}


def test_a_folder_is_locked_once(tmp_path):
    """Two handles in one process exclude each other like two processes."""
    folder = tmp_path / "a" / "run"  # made, with its parents
    lock = fsdp.lock_folder(str(folder))
    with pytest.raises(ValueError, match="--output-dir .*run: another run is writing there"):
        fsdp.lock_folder(str(folder))
    os.close(lock)
    os.close(fsdp.lock_folder(str(folder)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="give another folder"):
        fsdp.lock_folder(str(tmp_path / "file"))


def test_rows_after_the_checkpoint_are_cut_off(tmp_path):
    """They will be written again.  A line that a kill cut short goes too, whatever it holds."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": i, "x": 0.1}) + "\n" for i in (0, 1, 2, 3)]
    path.write_text("".join(lines) + '{"iteration": 1')
    fsdp.cut_back(str(path), 2)
    assert path.read_text() == "".join(lines[:3])
    path.write_text(lines[0] + lines[1].rstrip("\n"))
    fsdp.cut_back(str(path), 2)
    assert path.read_text() == lines[0]
    fsdp.cut_back(str(path), None)
    assert path.read_text() == ""
    fsdp.cut_back(str(tmp_path / "samples.jsonl"), 2)
    assert (tmp_path / "samples.jsonl").read_text() == ""


@pytest.mark.parametrize("line", ["{", "3", "[]", "{}", '{"iteration": "1"}'])
def test_a_damaged_line_is_refused_and_left(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    content = '{"iteration": 0}\n' + line + "\n"
    path.write_text(content)
    with pytest.raises(ValueError, match="metrics.jsonl is damaged"):
        fsdp.cut_back(str(path), 2)
    assert path.read_text() == content


# -------------------------------------------------------------------------------------- Checkpoints


def names(paths):
    return [os.path.basename(path) for path in paths]


def test_checkpoints_are_listed_by_number(tmp_path):
    """10 comes after 9, and only whole names count: a dot marks what is being written."""
    for name in ("10", "9", "100", "2", "x", "3.tmp", ""):
        (tmp_path / f"checkpoint_iter_{name}").mkdir()
    (tmp_path / ".checkpoint_iter_4").mkdir()
    (tmp_path / "old_checkpoint_iter_4").mkdir()
    found = fsdp.list_checkpoints(str(tmp_path))
    assert [fsdp.checkpoint_iteration(path) for path in found] == [2, 9, 10, 100]
    assert found[0] == str(tmp_path / "checkpoint_iter_2")
    assert fsdp.list_checkpoints(str(tmp_path / "nothing")) == []


def test_pruning_keeps_the_newest_up_to_an_iteration(tmp_path):
    """Later ones are of a run that went further; a dot marks what a kill has left."""
    for i in (1, 2, 9, 10, 11):
        (tmp_path / f"checkpoint_iter_{i}").mkdir()
        (tmp_path / f"checkpoint_iter_{i}" / "model.safetensors").write_text("weights")
    (tmp_path / ".checkpoint_iter_12").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    fsdp.prune_checkpoints(str(tmp_path), iteration=10, keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint_iter_10", "checkpoint_iter_9", "metrics.jsonl"]
    fsdp.prune_checkpoints(str(tmp_path), iteration=10, keep=5)
    assert names(fsdp.list_checkpoints(str(tmp_path))) == [
        "checkpoint_iter_9",
        "checkpoint_iter_10",
    ]
    fsdp.prune_checkpoints(str(tmp_path), iteration=0, keep=5)
    assert fsdp.list_checkpoints(str(tmp_path)) == []


def test_a_kill_while_a_checkpoint_is_removed_leaves_no_half_of_it(tmp_path, monkeypatch):
    """Guards against a removal that begins before the folder has lost its name."""

    def killed(path):
        raise KeyboardInterrupt

    for i in (1, 2):
        (tmp_path / f"checkpoint_iter_{i}").mkdir()
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        fsdp.prune_checkpoints(str(tmp_path), iteration=2, keep=1)
    assert names(fsdp.list_checkpoints(str(tmp_path))) == ["checkpoint_iter_2"]
    monkeypatch.undo()
    fsdp.prune_checkpoints(str(tmp_path), iteration=2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_iter_2"]


STATE = {"iteration": 3, "model_tokens": 70, "seconds": 1.5, "config": {"beta": 0.2}}


def finished_checkpoint(parent):
    """A checkpoint of one small file, through finish_checkpoint."""
    aside = parent / ".checkpoint_iter_3"
    aside.mkdir()
    (aside / "value.safetensors").write_bytes(b"weights")
    final = parent / "checkpoint_iter_3"
    fsdp.finish_checkpoint(str(aside), str(final), dict(STATE))
    assert not aside.exists()
    return final


def test_a_finished_checkpoint_is_read_back(tmp_path):
    state = fsdp.read_trainer_state(str(finished_checkpoint(tmp_path)))
    files = state.pop("files")
    assert state == STATE
    assert files == {
        "value.safetensors": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    }


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("name", ["value.safetensors", "trainer_state.json"])
def test_a_damaged_file_of_a_checkpoint_is_named(name, damage, tmp_path):
    folder = finished_checkpoint(tmp_path)
    damage_file(folder / name, damage)
    with pytest.raises(ValueError, match=name) as error:
        fsdp.read_trainer_state(str(folder))
    expected = "is not a complete checkpoint" if damage == "missing" else "is damaged"
    assert expected in str(error.value)


@pytest.mark.parametrize("field", ["iteration", "model_tokens", "seconds", "config", "files"])
@pytest.mark.parametrize("content", ["missing", None, "3", [], 6.5])
def test_a_state_without_a_field_is_damaged(field, content, tmp_path):
    """Also one of another kind.  Guards against a run that goes on and fails later."""
    if content == 6.5 and field in ("model_tokens", "seconds"):
        return  # these may be
    folder = finished_checkpoint(tmp_path)
    path = folder / "trainer_state.json"
    state = json.loads(path.read_text())
    state[field] = content
    if content == "missing":
        del state[field]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="trainer_state.json is damaged"):
        fsdp.read_trainer_state(str(folder))


class Model(torch.nn.Linear):
    """Any module with save_pretrained will do."""

    def save_pretrained(self, folder, state_dict):
        save_file(state_dict, os.path.join(folder, "model.safetensors"))


class Tokenizer:
    def save_pretrained(self, folder):
        fsdp.write_file(os.path.join(folder, "tokenizer.json"), "{}")


class FullDiskTokenizer:
    def save_pretrained(self, folder):
        raise OSError("disk full")


def trained(size):
    """A model and a head after one step of Adam: (model, head, optimizer)."""
    torch.manual_seed(0)
    model = Model(size, size)
    head = torch.nn.Linear(size, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()])
    head(model(torch.ones(1, size))).sum().backward()
    optimizer.step()
    return model, head, optimizer


def test_any_module_is_saved_and_its_optimizer_restored(tmp_path):
    model, head, optimizer = trained(size=3)
    folder = str(tmp_path / "checkpoint_iter_3")
    fsdp.save_checkpoint(folder, model, Tokenizer(), head, optimizer, dict(STATE), ONE)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_iter_3"]
    files = fsdp.read_trainer_state(folder)["files"]
    assert sorted(files) == [
        "model.safetensors",
        "optimizer.safetensors",
        "tokenizer.json",
        "value.safetensors",
    ]
    assert torch.equal(load_file(f"{folder}/model.safetensors")["weight"], model.weight)
    assert torch.equal(load_file(f"{folder}/value.safetensors")["weight"], head.weight)

    fresh = torch.optim.AdamW([*model.parameters(), *head.parameters()])
    fsdp.load_optimizer(folder, model, head, fresh)
    for parameter, moments in optimizer.state.items():
        assert fresh.state[parameter].keys() == moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, moment in moments.items():
            assert torch.equal(fresh.state[parameter][key], moment), key

    other_model, other_head, other_optimizer = trained(size=4)
    with pytest.raises(ValueError, match="another model size"):
        fsdp.load_optimizer(folder, other_model, other_head, other_optimizer)


@pytest.mark.parametrize("fused, device", [(True, "meta"), (False, "cpu")])
def test_the_step_of_a_fused_optimizer_is_beside_its_parameter(fused, device, tmp_path):
    """As AdamW makes it.  From the CPU, a fused step on a GPU would fail after a resume.

    The parameters are on the meta device, which stands for another than the CPU.
    """
    model, head, optimizer = trained(size=3)
    folder = str(tmp_path / "checkpoint_iter_3")
    fsdp.save_checkpoint(folder, model, Tokenizer(), head, optimizer, dict(STATE), ONE)
    parameters = [*model.to("meta").parameters(), *head.to("meta").parameters()]
    fresh = torch.optim.AdamW(parameters, fused=fused)
    fsdp.load_optimizer(folder, model, head, fresh)
    for parameter in parameters:
        assert fresh.state[parameter]["step"].device.type == device
        assert fresh.state[parameter]["exp_avg"].device.type == "meta"


@pytest.mark.parametrize("offload", [True, False])
def test_the_optimizer_of_a_gpu_is_fused(offload):
    """Also under offload, where Adam runs on the host.  A CPU keeps the step of published runs."""
    model, head, _ = trained(size=3)
    optimizer = train.make_optimizer(model, head, train.Config(cpu_offload=offload))
    assert optimizer.defaults["fused"] is offload


def test_the_peak_memory_is_that_of_the_ranks_device(monkeypatch, capsys):
    """Guards against that of GPU 0 in a run on --device cuda:1, where it is nothing."""
    peaks = {torch.device("cuda:1"): 3 * 2**30}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.get)
    finished = mock.Mock(evaluated={}, model_tokens=7, eval_problems=[], say=print)
    finished.clock = train.Clock()
    finished.ranks = fsdp.Ranks(rank=0, world_size=1, device=torch.device("cuda:1"))
    train.print_end(finished)
    assert "peak memory of a rank 3.00 GiB" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path):
    model, head, optimizer = trained(size=3)
    folder = str(tmp_path / "checkpoint_iter_3")
    with pytest.raises(OSError, match=r"checkpoint_iter_3 cannot be written \(disk full\)"):
        fsdp.save_checkpoint(folder, model, FullDiskTokenizer(), head, optimizer, STATE, ONE)
    assert list(tmp_path.iterdir()) == []


def test_a_shared_parameter_and_an_unsaved_buffer():
    """As a checkpoint holds them: the shared one once, the other not."""
    module = torch.nn.Module()
    module.embedding = torch.nn.Embedding(5, 2)
    module.output = torch.nn.Linear(2, 5, bias=False)
    module.output.weight = module.embedding.weight
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("computed", torch.ones(1), persistent=False)
    assert list(fsdp.named_tensors(module)) == ["embedding.weight", "kept"]
