"""fsdp.py -- ranks, sharding, checkpoints: what differs between one process and many.

A rank is one of the W processes of a run, one a GPU.  With FSDP ("ZeRO-3", Rajbhandari et al. 2020,
arXiv 1910.02054; PyTorch FSDP, Zhao et al. 2023, arXiv 2304.11277) each rank keeps 1/W of every
weight, gradient and Adam moment.  The whole weights of a block are gathered just before it runs and
dropped after it.  Its gradients are averaged over the ranks and split again.

This file is what a training loop needs of it, on PyTorch's `fully_shard` (FSDP2).  The functions
have the same names in a single process, where they have little to do: `all_gather(x, ranks)` is
`[x]`, and `rank_slice(n, ranks)` is all n.  So the loop reads the same for one process and many.

Two rules keep ranks from waiting for each other for ever:
  1. Every rank calls every collective equally often.  A backward pass is one: it gathers weights
     and adds up gradients.  So a rank without rollouts still runs as many, with a loss of 0.
  2. What the ranks must agree on (totals, whether to stop, which checkpoint) is sent to all of them
     by `all_gather`.  No rank infers it from its own data.

FSDP averages gradients over the ranks.  A loss that is to be added up over them, because it was
divided by a total of all ranks, is therefore multiplied by their number.

Where it departs from common practice:
  1. Rollouts run on whole weights (`full_weights`), because ranks search for different lengths of
     time.  A rank must then hold the whole model while it generates.
  2. The ranks exchange small objects as JSON, and checkpoints are safetensors and JSON.  Nothing is
     pickled, because reading a pickle can run code.
  3. A checkpoint holds whole tensors by name.  It can be loaded on any number of ranks.

    python fsdp.py                                       # one process: nothing to share
    torchrun --standalone --nproc_per_node=3 fsdp.py     # three: a sharded model, same gradients
"""

import contextlib
import copy
import datetime
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import types
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed import fsdp as fsdp2  # FSDP1 is deprecated
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

# -------------------------------------------------------------------------------------------- Ranks


# How long a rank waits for another one.  Ranks search for different lengths of time, which may be
# hours, and PyTorch's own limits are 30 minutes (gloo) and 10 (NCCL).  Past the limit gloo raises
# RuntimeError.  NCCL's watchdog, a thread, counts from the call of a collective and ends the
# process.  A rank that has died is noticed sooner: gloo sees its closed connection, and torchrun
# ends the other ranks of its node.
LONGEST_WAIT = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """Which rank this process is, out of how many, and on which device it computes."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None = None  # the ranks that a model is split over; None: it is not split
    group: dist.ProcessGroup | None = None  # all ranks; None: PyTorch's default group

    @property
    def is_main(self):
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def init_ranks(distributed=False, device="auto", sharded=False, replicas=1):
    """Join the ranks that torchrun started, if it did.  Returns Ranks.

    distributed: the user's flag; it must agree with how the process was started.
    device: 'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', ...
    sharded: use FSDP in a single process too, for its mixed precision and its offload.
    replicas: groups of ranks that hold a whole model each; see make_mesh.
    Raises ValueError with one sentence if the launch or the device cannot be used.
    """
    launched = "WORLD_SIZE" in os.environ  # torchrun sets it for the processes that it starts
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if distributed and not launched:
        raise ValueError(
            "--distributed: start with torchrun --standalone --nproc_per_node=RANKS, "
            "not with python"
        )
    if world_size > 1 and not distributed:
        raise ValueError(f"torchrun started {world_size} ranks: add --distributed")
    if world_size % replicas:
        raise ValueError(f"--replicas {replicas} does not divide the number of ranks, {world_size}")
    if not (launched or sharded):
        return Ranks(rank=0, world_size=1, device=usable_device(device))

    # The ranks meet before anything can fail on one of them alone, such as a node without a GPU.
    # From then on all learn of a failure; before, the others would wait until the time limit.
    if not dist.is_initialized():
        if launched:
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device=torch.device("cpu"))
    device = raise_everywhere(functools.partial(usable_device, device), ranks)

    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Weights and gradients travel between GPUs by NCCL.  all_gather's numbers are on the CPU.
        backend = "cpu:gloo,cuda:nccl"
    group = dist.new_group(backend=backend, timeout=LONGEST_WAIT)
    mesh = make_mesh(group, device, replicas)
    return Ranks(ranks.rank, ranks.world_size, device=device, mesh=mesh, group=group)


def make_mesh(group, device, replicas):
    """Return the mesh of ranks that FSDP splits a model over: W ranks, or R replicas of W/R ranks.

    With replicas the weights are split within each, and gradients are averaged over all ranks.
    Ranks of one number are neighbours, so a replica can be a node.  Then only sums of gradients
    travel between nodes, and no weights ("hybrid sharding").
    """
    if replicas == 1:
        return DeviceMesh.from_group(group, device.type)
    grid = torch.arange(dist.get_world_size()).view(replicas, -1)  # (R, W/R)
    backend = dist.get_backend(group)
    shards, _ = dist.new_subgroups_by_enumeration(grid.tolist(), LONGEST_WAIT, backend)
    copies, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), LONGEST_WAIT, backend)
    names = ("replicas", "shards")
    return DeviceMesh.from_group([copies, shards], device.type, mesh=grid, mesh_dim_names=names)


def usable_device(name):
    """Return the torch.device of --device.  Raises ValueError if it cannot be used here.

    'auto' is a GPU if there is one.  'cuda' is the GPU of this rank's number within its node.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # set_device needs a number
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        lines = str(error).splitlines()
        reason = lines[0] if lines else "no message"
        raise ValueError(f"--device {name}: not usable here ({reason})") from None
    if device.type == "cuda":
        # cuDNN's attention plans anew for every length, and a search meets one every round.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def shutdown(ranks, status=0):
    """Leave the other ranks, when all have come to this point.  A collective.

    A process that torchrun started ends here, with this exit status.  Any other process ends here
    only if the status is not 0.
    """
    if ranks.mesh is not None:
        all_gather("done", ranks)
        dist.destroy_process_group()
        if "WORLD_SIZE" in os.environ:
            # os._exit skips the teardown of the interpreter, in which gloo's threads may abort the
            # process ("terminate called").  It also skips the flush, so that is done here.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if status:
        sys.exit(status)


def rank_slice(n, ranks):
    """Return which of n things are this rank's, by global index: every W-th, from its own rank on.

    The sizes of the slices differ by one at most.  With n < W some slices are empty.
    """
    return range(ranks.rank, n, ranks.world_size)


def all_gather(value, ranks):
    """Return every rank's value, as a list by rank, on every rank.  A collective.

    value: anything that JSON can hold.  From more than one rank, tuples come back as lists and the
    keys of dicts as strings.
    """
    if ranks.world_size == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    own_length = torch.tensor([len(own)])
    # dist.all_gather needs tensors of one shape: first the lengths, then the texts, padded.
    lengths = [torch.zeros_like(own_length) for _ in range(ranks.world_size)]
    dist.all_gather(lengths, own_length, group=ranks.group)
    lengths = [int(length) for length in lengths]
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = own
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded, group=ranks.group)
    values = []
    for text, length in zip(texts, lengths):
        values.append(json.loads(text[:length].numpy().tobytes()))
    return values


def all_reduce_sum(sums, ranks):
    """Add up dicts of numbers over the ranks, key by key.  A collective.

    A rank may lack a key.  Give it sums, never means: a mean of the ranks' means would weigh a rank
    with two problems like a rank with a hundred.
    """
    terms = {}
    for rank_sums in all_gather(sums, ranks):
        for name, number in rank_sums.items():
            terms.setdefault(name, []).append(number)
    return {name: sum(numbers) for name, numbers in terms.items()}


def raise_everywhere(function, ranks):
    """Run function() on every rank and return its result; if it failed on one, fail on all.

    Without this, the other ranks would wait for ever for a rank that gave up.  The function must
    not call a collective.  Raises ValueError with the sentence of the first rank on which the
    function raised ValueError or OSError.  Any other exception is a bug and is not caught.
    """
    result = None
    failure = ""
    try:
        result = function()
    except (ValueError, OSError) as error:
        failure = str(error) or type(error).__name__
    failures = all_gather(failure, ranks)
    for rank, sentence in enumerate(failures):
        if not sentence:
            continue
        if all(failures):  # a mistake that all ranks noticed is not of one rank
            raise ValueError(sentence)
        raise ValueError(f"rank {rank}: {sentence}")
    return result


def on_main(function, ranks):
    """Run function() on the main rank alone.  What it raises there, every rank raises.

    Returns its result on the main rank, None on the others.  Raises ValueError, as
    `raise_everywhere` does.
    """

    def run_if_main():
        if ranks.is_main:
            return function()
        return None

    return raise_everywhere(run_if_main, ranks)


def in_turn(function, ranks):
    """Run function() on every rank and return its result, on the ranks of a node one by one.

    For what takes much memory for a while, such as a whole model before it is split: N ranks at
    once would need it N times.  What it raises, every rank raises, as in `raise_everywhere`.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # the rank's number within its node
    result = None
    for turn in range(1 + max(all_gather(local_rank, ranks))):
        if turn == local_rank:
            result = raise_everywhere(function, ranks)
        else:
            raise_everywhere(wait_for_turn, ranks)
    return result


def wait_for_turn():
    """Nothing: what a rank does in another rank's turn."""


def lost_peer(error):
    """Return whether a RuntimeError is what a collective raises when another rank has ended."""
    if isinstance(error, dist.DistError):
        return True
    message = str(error)
    return "by peer" in message or "gloo" in message or "NCCL" in message


# ----------------------------------------------------------------------------------------- Sharding


def shard(module, ranks, blocks=(), mixed_precision=False, offload=False):
    """Split a finished module's parameters over the ranks, in place, and move it to the device.

    blocks: parts that are gathered and dropped one at a time.  What is left is one more group, the
        root.  In a language model that is the embeddings, the last norm and the output layer, which
        may share a weight and therefore must be in one group.
    mixed_precision: forward and backward run in bfloat16.  The weights that are kept, the sums of
        gradients and Adam's moments are float32.
    offload: what a rank keeps lies in the host's memory, and Adam runs there.
    """
    if ranks.mesh is None:
        return module.to(ranks.device)
    if mixed_precision:
        precision = fsdp2.MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    else:
        precision = fsdp2.MixedPrecisionPolicy()
    if offload:
        placement = fsdp2.CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    else:
        placement = fsdp2.OffloadPolicy()
    groups = [*blocks, module]  # the root last: it takes what no block has taken
    for group in groups:
        fsdp2.fully_shard(group, mesh=ranks.mesh, mp_policy=precision, offload_policy=placement)

    # In the backward pass each group gathers the one before it ahead of time.  FSDP's default is
    # the order of a rank's own last forwards.  Ranks with different rollouts would then gather
    # different blocks and wait for each other for ever, so the order is set here.
    previous = groups[0]
    for group in groups:
        group.set_modules_to_backward_prefetch([previous])
        previous = group
    return module


def with_fsdp_hooks(module, function):
    """Return function(module, ...) as a callable of the remaining arguments, with FSDP's hooks.

    The hooks gather the root's weights before the call and reduce its gradients after the backward.
    FSDP puts them around module.forward alone; here they are put around the function too.  Without
    FSDP there are no hooks, and the callable is a partial.
    """
    if not isinstance(module, fsdp2.FSDPModule):
        return functools.partial(function, module)
    # FSDP takes the name of a method, so the function becomes one of this module.
    module.function_with_hooks = types.MethodType(function, module)
    fsdp2.register_fsdp_forward_method(module, "function_with_hooks")
    return module.function_with_hooks


@contextlib.contextmanager
def full_weights(*modules):
    """Inside, every rank holds the whole weights of these sharded modules: for rollouts.

    Ranks may run different numbers of forwards inside, and none too.  Entering is a collective.
    """
    groups = []
    for module in modules:
        for part in module.modules():
            if isinstance(part, fsdp2.FSDPModule):
                groups.append(part)
    for part in groups:
        # FSDP takes the module that runs first for the root.  Inside, that may be a block.
        part._get_fsdp_state()._lazy_init()
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in groups:
            part.reshard()
            # As fully_shard sets it: blocks are dropped after the forward, a root is kept until its
            # backward has run.
            part.set_reshard_after_forward(part not in modules, recurse=False)


def full_tensor(tensor):
    """Return a tensor put together from all ranks' parts.  A collective if it is sharded."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def shard_like(tensor, like):
    """Return a whole tensor, split and placed as `like` is.

    Every rank has the whole tensor and cuts out its own part, so nothing is sent.
    """
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    part = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return part.to(like.device)


def full_state(tensors, ranks):
    """Return named tensors as whole tensors on the main rank's CPU; {} on the others.

    A collective.  The tensors are put together one by one, so that a rank holds one whole tensor
    at a time, and only the main rank keeps them.
    """
    state = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor.detach())
        if ranks.is_main:
            state[name] = whole.cpu().contiguous()
    return state


def named_tensors(module):
    """Return a module's parameters and buffers by name, as a checkpoint holds them.

    A parameter that is shared is in it once.  A buffer that the module does not save is left out.
    """
    saved_names = module.state_dict().keys()
    tensors = dict(module.named_parameters())
    for name, buffer in module.named_buffers():
        if name in saved_names:
            tensors[name] = buffer
    return tensors


# ---------------------------------------------------------------------------- Files and checkpoints


def write_file(path, text):
    """Write a text file so that `path` is either the old file or the whole new one.

    The text is written beside it, synced to the disk, then renamed.  Raises OSError.
    """
    aside = path + ".tmp"
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):  # the write failed: a full disk, or Ctrl-C
            os.remove(aside)


def append_rows(path, rows):
    """Append objects to a file as lines of JSON.  They are on the disk when this returns."""
    with open(path, "a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    sync_to_disk(path)


def sync_to_disk(path):
    """Make a file or folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def fingerprint(path):
    """Return the size and the checksum of a file: {bytes, sha256}."""
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": os.path.getsize(path), "sha256": checksum}


def lock_folder(folder):
    """Make a run's folder and keep other runs out of it.  Returns the lock, an open file handle.

    The operating system drops the lock when this process ends, also after a kill.  Raises
    ValueError if the folder cannot be used or another run holds it.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        reason = error.strerror
        if isinstance(error, BlockingIOError):
            reason = "another run is writing there"
        raise ValueError(f"--output-dir {folder}: {reason}; give another folder") from None
    return lock


def cut_back(path, iteration):
    """Keep the rows of a jsonl file up to an iteration, and return them.  None: empty the file.

    Rows after it will be written again by the resumed run.  A last line without its newline was cut
    short by a kill and is dropped.  A file that is not there is made, empty.  Raises ValueError if
    a whole line is not a JSON object with an iteration.
    """
    lines = []
    rows = []
    if iteration is not None and os.path.exists(path):
        try:
            with open(path) as file:
                for line in file:
                    if not line.endswith("\n"):
                        continue
                    row = json.loads(line)
                    if row["iteration"] <= iteration:
                        lines.append(line)
                        rows.append(row)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} is damaged: a line of it is not a JSON object with an iteration"
            ) from None
    write_file(path, "".join(lines))
    return rows


def checkpoint_iteration(path):
    """Return the N of a folder .../checkpoint_iter_N."""
    return int(path.rpartition("_")[2])


def list_checkpoints(folder):
    """Return the paths of a run's checkpoint folders, by iteration, oldest first.

    Every folder of that name is complete: it gets the name when everything is in it
    (`finish_checkpoint`), and loses the name before anything is removed (`prune_checkpoints`).
    """
    if not os.path.isdir(folder):
        return []
    paths = []
    for name in sorted(os.listdir(folder)):
        if re.fullmatch(r"checkpoint_iter_\d+", name):
            paths.append(os.path.join(folder, name))
    return sorted(paths, key=checkpoint_iteration)


def newest_checkpoint(folder):
    """The newest checkpoint of a run's folder.  Another folder, or a hub id, stands for itself."""
    found = list_checkpoints(folder)
    return found[-1] if found else folder


def prune_checkpoints(folder, iteration, keep):
    """Remove the checkpoints after an iteration, and all but the newest `keep` of the others.

    A checkpoint after it is of a run that went further, and would be taken for one of this run.
    """
    found = list_checkpoints(folder)
    up_to_iteration = [path for path in found if checkpoint_iteration(path) <= iteration]
    kept = up_to_iteration[-keep:]
    for path in found:
        if path not in kept:
            # First it loses its name: a kill during the removal leaves no half of a checkpoint.
            os.rename(path, os.path.join(folder, "." + os.path.basename(path)))
    # This finds those, and also what a killed run was just writing or removing.
    for name in os.listdir(folder):
        if name.startswith(".checkpoint_") or name == "checkpoint_trial":
            shutil.rmtree(os.path.join(folder, name))


def finish_checkpoint(aside, final, state):
    """Turn a folder that was written aside into the checkpoint `final`.

    trainer_state.json is written into it: `state`, with size and checksum of every other file.  All
    is synced to the disk before the folder is renamed, so whoever sees the name sees all of it.
    """
    folders = []
    names = []  # of all files, relative to the checkpoint; some tokenizers write folders of files
    for folder, _, files in os.walk(aside):
        folders.append(folder)
        names += [os.path.relpath(os.path.join(folder, file), aside) for file in files]
    fingerprints = {name: fingerprint(os.path.join(aside, name)) for name in sorted(names)}
    text = json.dumps({**state, "files": fingerprints}, indent=1)
    write_file(os.path.join(aside, "trainer_state.json"), text)
    for path in [*[os.path.join(aside, name) for name in names], *folders]:
        sync_to_disk(path)
    os.rename(aside, final)
    sync_to_disk(os.path.dirname(final) or ".")


def read_trainer_state(folder, check_files=True):
    """Read a checkpoint's trainer_state.json and check that every file it lists is whole.

    check_files: without it the files, which may be many gigabytes, are not read.
    Raises ValueError that names the first file which is missing or damaged.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: there is no such folder")
    name = "trainer_state.json"  # the file that an error is about; the loop below changes it
    try:
        with open(os.path.join(folder, name)) as file:
            state = json.load(file)
        if not isinstance(state["config"], dict):
            raise TypeError("config is not an object")
        for field in ("iteration", "model_tokens", "seconds"):
            if not isinstance(state[field], (int, float)):
                raise TypeError(f"{field} is not a number")
        if not isinstance(state["iteration"], int):
            raise TypeError("iteration is not a whole number")
        for name, written in state["files"].items():
            if check_files and fingerprint(os.path.join(folder, name)) != written:
                raise ValueError("its size or checksum is not the one written")
    except OSError as error:
        raise ValueError(
            f"{folder} is not a complete checkpoint: {name}: {error.strerror}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        raise ValueError(f"{folder}: {name} is damaged ({kind}: {error})") from None
    return state


def named_parameters(model, head):
    """Return every weight of the policy and the value head by name: policy.NAME, value.NAME.

    Adam's moments are saved under these names, not by number or by rank, so they can be loaded on
    another number of ranks.
    """
    parameters = {}
    for owner, module in (("policy", model), ("value", head)):
        for name, parameter in module.named_parameters():
            parameters[f"{owner}.{name}"] = parameter
    return parameters


def save_checkpoint(folder, model, tokenizer, head, optimizer, state, ranks):
    """Write the checkpoint `folder`, .../checkpoint_iter_N, and return its path.  A collective.

    It is a Hugging Face folder (what save_pretrained of the model and the tokenizer write) with
    value.safetensors, optimizer.safetensors and trainer_state.json (`state`).  All ranks help to
    put the tensors together; the main one writes.  Raises OSError if the checkpoint cannot be
    written; nothing of it is left then.
    """
    weights = full_state(named_tensors(model), ranks)
    head_weights = full_state(named_tensors(head), ranks)
    moments = {}
    for name, parameter in named_parameters(model, head).items():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            moments[f"{name}.{key}"] = tensor
    moments = full_state(moments, ranks)
    if not ranks.is_main:
        return folder

    parent, name = os.path.split(folder)
    aside = os.path.join(parent, "." + name)
    try:
        os.makedirs(aside)
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        save_file(head_weights, os.path.join(aside, "value.safetensors"))
        save_file(moments, os.path.join(aside, "optimizer.safetensors"))
        finish_checkpoint(aside, folder, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{folder} cannot be written ({error})") from None
    return folder


def try_checkpoint(folder, model, tokenizer, head, optimizer, state, ranks):
    """Write a checkpoint below `folder`, check it, remove it.  A collective.

    So a run learns at its start, and not after an hour, that its checkpoints cannot be written or
    read: a tokenizer that cannot be saved, a full disk.  Raises ValueError with one sentence.
    """
    trial = os.path.join(folder, "checkpoint_trial")
    aside = os.path.join(folder, ".checkpoint_trial")  # where save_checkpoint writes it first
    failure = ""
    if ranks.is_main:  # what a killed trial has left
        shutil.rmtree(trial, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        save_checkpoint(trial, model, tokenizer, head, optimizer, state, ranks)
        if ranks.is_main:
            read_trainer_state(trial)
    except Exception as error:  # save_pretrained of a model or tokenizer may raise anything
        lines = str(error).splitlines() or ["no message"]
        failure = f"{type(error).__name__}: {lines[0]}"
    if ranks.is_main:
        shutil.rmtree(trial, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
    failure = all_gather(failure, ranks)[0]
    if failure:
        raise ValueError(f"--output-dir {folder}: a checkpoint cannot be written there ({failure})")


def load_optimizer(folder, model, head, optimizer):
    """Load the optimiser's state of a checkpoint: Adam's moments and steps.

    The model and the head must hold the checkpoint's weights already; they may be sharded.  Raises
    ValueError if the moments are of a model of another size.
    """
    parameters = named_parameters(model, head)
    with safe_open(os.path.join(folder, "optimizer.safetensors"), "pt") as moments:
        for full_name in moments.keys():  # noqa: SIM118 - a file of tensors is no dict
            name, _, key = full_name.rpartition(".")
            tensor = moments.get_tensor(full_name)  # one at a time: all would fill the memory
            parameter = parameters.get(name)
            # `step` is a number, whatever the size of its parameter.
            if parameter is None or (key != "step" and tensor.shape != parameter.shape):
                raise ValueError(
                    f"{folder}: the optimiser state of {name} is of another model size"
                )
            # As AdamW makes it: `step` is on the CPU; of a fused AdamW it is beside the parameter.
            if key != "step":
                tensor = shard_like(tensor, parameter)
            elif optimizer.defaults["fused"]:
                tensor = tensor.to(parameter.device)
            optimizer.state[parameter][key] = tensor


# --------------------------------------------------------------------------------------------- Demo


def check_gradients(model, reference, inputs, ranks):
    """Assert that a sharded model gets the gradients of a whole one, on slices of unequal length.

    The loss is a mean over all tokens of all ranks:  L = sum_x |model(x)|^2 / tokens.
    """
    tokens = sum(len(x) for x in inputs)
    loss = sum(reference(x).pow(2).sum() for x in inputs) / tokens
    loss.backward()

    own = [inputs[i] for i in rank_slice(len(inputs), ranks)]
    own_tokens = sum(len(x) for x in own)
    assert all_reduce_sum({"tokens": own_tokens}, ranks) == {"tokens": tokens}
    for turn in range(max(all_gather(len(own), ranks))):
        # A rank whose inputs are used up runs a backward of loss 0, or the others would wait.
        if turn < len(own):
            loss = model(own[turn]).pow(2).sum() / tokens
        else:
            loss = 0.0 * model(torch.zeros(1, 8)).sum()
        # FSDP averages gradients over the ranks.  These losses are parts of a sum.
        (loss * ranks.world_size).backward()

    largest = 0.0
    for sharded, whole in zip(model.parameters(), reference.parameters()):
        difference = full_tensor(sharded.grad) - whole.grad
        largest = max(largest, difference.abs().max().item())
    assert largest < 1e-6, largest
    return largest


def check_checkpoint(tensors):
    """Assert that a finished checkpoint is found and read, and that one flipped bit is noticed."""
    state = {"iteration": 1, "model_tokens": 0, "seconds": 0.0, "config": {}}
    with tempfile.TemporaryDirectory() as folder:
        aside = os.path.join(folder, ".checkpoint_iter_1")
        final = os.path.join(folder, "checkpoint_iter_1")
        os.makedirs(aside)
        save_file(tensors, os.path.join(aside, "model.safetensors"))
        assert list_checkpoints(folder) == []
        finish_checkpoint(aside, final, state)
        assert list_checkpoints(folder) == [final]
        assert read_trainer_state(final)["iteration"] == 1

        with open(os.path.join(final, "model.safetensors"), "r+b") as file:
            content = bytearray(file.read())
            content[-1] ^= 1
            file.seek(0)
            file.write(content)
        try:
            read_trainer_state(final)
        except ValueError as error:
            assert "model.safetensors is damaged" in str(error)
        else:
            raise AssertionError("a damaged file was not noticed")


def main():
    """Five problems of unequal length, a sharded model and a whole one: the same gradients."""
    ranks = init_ranks(distributed="WORLD_SIZE" in os.environ, device="cpu")
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(2)]
    reference = torch.nn.Sequential(*blocks)
    inputs = [torch.randn(length, 8) for length in (1, 7, 2, 5, 3)]
    model = copy.deepcopy(reference)
    model = shard(model, ranks, blocks=list(model))

    largest = check_gradients(model, reference, inputs, ranks)
    own = list(rank_slice(len(inputs), ranks))
    slices = all_gather(own, ranks)
    assert sorted(i for rank_indices in slices for i in rank_indices) == [0, 1, 2, 3, 4]
    with full_weights(model):
        for i in own:  # with three ranks, two of them run two forwards and one runs one
            assert torch.allclose(model[0](inputs[i]), reference[0](inputs[i]), atol=1e-6)
    state = full_state(named_tensors(model), ranks)
    if ranks.is_main:
        for name, tensor in reference.state_dict().items():
            assert torch.equal(state[name], tensor), name
        check_checkpoint(state)
        print(f"{ranks.world_size} rank(s); problems of each: {slices}")
        print(f"largest difference of a gradient from the whole model's: {largest:.1e}")
        print("slices cover all, gradients add up, the state is whole: ok")
        print("a checkpoint is found when it is complete, a flipped bit in it is noticed: ok")
    shutdown(ranks)


if __name__ == "__main__":
    main()
