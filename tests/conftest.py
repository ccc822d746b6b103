"""Put the repository root on the path, and hold what several test files need.

The files under test are flat modules, not a package.  The functions start ranks and read a run.
All of it, and every process that a test starts, computes with one thread: two would wait for each
other, and sums in another order have other last digits.
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported
# A shell lets processes in the background ignore Ctrl-C, and some tests send one.
signal.signal(signal.SIGINT, signal.default_int_handler)

# ------------------------------------------------------------------------------- Starting processes


def launch(ranks, *command, cwd=ROOT, **options):
    """Start `command` on so many ranks, by torchrun.  One process is started with python alone."""
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [str(word) for word in command]
    return subprocess.Popen(
        words, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


class ForkedRanks:
    """The ranks of a script, in the environment that torchrun gives them.

    They are forked from a server that has imported torch already.  With `launch` each rank and
    torchrun itself spend four seconds on that.  It has what finish() needs of Popen.
    """

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "transformers.models.qwen2.modeling_qwen2"])

    def __init__(self, ranks, script, *words):
        self.folder = tempfile.TemporaryDirectory()
        self.output = pathlib.Path(self.folder.name) / "output"
        self.processes = []
        self.returncode = None
        words = [str(word) for word in [ROOT / script, *words]]
        port = free_port()
        for rank in range(ranks):
            environment = dict(os.environ)
            if ranks > 1:
                environment["MASTER_ADDR"] = "127.0.0.1"
                environment["MASTER_PORT"] = str(port)
                environment["WORLD_SIZE"] = str(ranks)
                environment["RANK"] = environment["LOCAL_RANK"] = str(rank)
            process = self.server.Process(
                target=run_script, args=(words, environment, self.output), daemon=True
            )
            with contextlib.chdir(ROOT):  # if the server is started here, it imports train.py
                process.start()
            self.processes.append(process)

    def pids(self):
        """The ranks' process ids."""
        return [process.pid for process in self.processes]

    def poll(self):
        """The first exit status that is not 0, or None while all ranks run."""
        codes = [process.exitcode for process in self.processes]
        if all(code is None for code in codes):
            return None
        return next((code for code in codes if code), 0)

    def communicate(self, timeout=240):
        """Wait for all ranks, kill those that hang; returns (what they have printed, None)."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()
            process.join()
        self.returncode = self.poll()
        return self.output.read_text(), None


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_script(words, environment, output):
    """Run a script in this process as python would; what it prints goes to the file `output`."""
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def finish(process, code=0):
    """Wait for a process, assert its exit status and return its output."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


# ------------------------------------------------------------------------------------ Reading a run


def rows(path):
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(folder):
    """metrics.jsonl of a run without wall seconds, which are all that may differ."""
    found = rows(folder / "metrics.jsonl")
    for row in found:
        row.pop("seconds", None)
    return found


def tensors(checkpoint):
    """Every weight and moment of a checkpoint by name."""
    from safetensors.torch import load_file

    found = {}
    for file in ("model", "value", "optimizer"):
        for name, tensor in load_file(checkpoint / f"{file}.safetensors").items():
            found[f"{file}/{name}"] = tensor
    return found
