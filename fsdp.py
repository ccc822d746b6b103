"""fsdp.py -- one process or many: the same names for both.

FSDP ("ZeRO-3", Rajbhandari et al. 2020, arXiv 1910.02054; PyTorch FSDP, Zhao et al. 2023, arXiv 2304.11277): each of W
ranks keeps 1/W of every weight, gradient and Adam moment.  A block's whole weights are gathered just before it runs and
dropped after; its gradients are averaged over the ranks and split again.  This file is what the training loop needs of
it, on PyTorch's `fully_shard` (FSDP2).  With one process they have nothing to do (`everyone(x)` is `[x]`, `share`
is all of it), so that the loop reads the same for both: it asks for its share and adds up what must be added up.

Two rules keep ranks from waiting for each other for ever:
  1. Every rank calls every collective equally often.  A rank with nothing left to do still joins (`idle_loss` in train).
  2. What ranks must agree on (totals, whether to stop, which checkpoint) is told to all by `everyone`, never guessed.

    python fsdp.py                                       # one process: nothing to share
    torchrun --standalone --nproc_per_node=3 fsdp.py     # three: a sharded model trains like a whole one
"""

import contextlib
import copy
import functools
import json
import os
import sys
import types
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import fsdp as fsdp2  # FSDP1 is deprecated
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

# ============================================================================================== who and how many
@dataclass(frozen=True)
class Ranks:
    """Who we are: `rank` of `world_size`, on `device`.  mesh: the ranks a model is split over; None: not at all."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def is_main(self):
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def start(distributed=False, device="auto", sharded=False):
    """Join the ranks that torchrun started, if it did.

    device: 'auto' (a GPU if there is one), 'cpu', 'cuda', ...  sharded: FSDP also in a single process, for its mixed
    precision and its offload.  Raises ValueError with one sentence for a launch or a device that cannot be.
    """
    launched = "WORLD_SIZE" in os.environ  # torchrun's word to the processes that it starts
    rank, local_rank, world_size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if distributed and not launched:
        raise ValueError("--distributed: start with torchrun --standalone --nproc_per_node=RANKS, not with python")
    if world_size > 1 and not distributed:
        raise ValueError(f"torchrun started {world_size} ranks: add --distributed")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cuda" and launched:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not usable here ({(str(error).splitlines() or ['no message'])[0]})") from None
    if not (launched or sharded):
        return Ranks(0, 1, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # Weights and gradients travel by NCCL between GPUs; the few numbers of `everyone` by gloo between CPUs.
        alone = {} if launched else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **alone)
    world_size = dist.get_world_size()
    return Ranks(rank, world_size, device, init_device_mesh(device.type, (world_size,)))


def stop(ranks, status=0):
    """Leave the other ranks, when all have come to this point.  A process that torchrun started ends here, with this
    exit status: gloo's threads may abort an interpreter that is torn down in the usual way ("terminate called").  Any
    other ends here only if the status is not 0."""
    if ranks.mesh is not None:
        everyone("done", ranks)
        dist.destroy_process_group()
        if "WORLD_SIZE" in os.environ:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    if status:
        sys.exit(status)


def share(n, ranks):
    """Which of n things, by global index, are this rank's: every W-th.  Shares differ by one at most; some may be empty."""
    return range(ranks.rank, n, ranks.world_size)


# ========================================================================================== what the ranks tell
def everyone(said, ranks):
    """What each rank said, as a list by rank, on every rank.  `said` is anything that JSON can hold."""
    if ranks.world_size == 1:
        return [said]
    own = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks.world_size)]
    dist.all_gather(lengths, torch.tensor([len(own)]))
    padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8)
    padded[: len(own)] = own
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [json.loads(text[: int(length)].numpy().tobytes()) for text, length in zip(texts, lengths)]


def total(sums, ranks):
    """Dicts of numbers added up over the ranks, key by key; a rank may lack a key.  Sums are told, means never: a mean
    of means would weigh a rank with two problems like a rank with one."""
    told = everyone(sums, ranks)
    return {name: sum(one.get(name, 0) for one in told) for name in dict.fromkeys(name for one in told for name in one)}


def agree(function, ranks):
    """function() on every rank, and if it raised ValueError or OSError on any, ValueError with that rank's sentence on
    all of them: so nobody waits for a rank that gave up.  The function must not call a collective."""
    result, failure = None, ""
    try:
        result = function()
    except (ValueError, OSError) as error:
        failure = str(error) or type(error).__name__
    failures = everyone(failure, ranks)
    for rank, sentence in enumerate(failures):
        if sentence:
            raise ValueError(sentence if all(failures) else f"rank {rank}: {sentence}")
    return result


def lost_peer(error):
    """True if a RuntimeError is what a collective raises when another rank has gone."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("by peer", "gloo", "NCCL"))


# ===================================================================================== sharding a finished model
def shard(module, ranks, blocks=(), mixed_precision=False, offload=False):
    """Split a finished module's parameters over the ranks, in place, and move it to the device.

    blocks: parts gathered and dropped one at a time.  What is left is one more group, the root: in a language model the
    embeddings, the last norm and the output layer, which may share a weight and therefore must not be parted.
    mixed_precision: computed in bfloat16; the weights kept, the gradients added up and Adam's moments are float32.
    offload: what a rank keeps lies in the host's memory, and Adam runs there.
    """
    if ranks.mesh is None:
        return module.to(ranks.device)
    bf16 = fsdp2.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    host = fsdp2.CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    options = dict(mesh=ranks.mesh, mp_policy=bf16 if mixed_precision else fsdp2.MixedPrecisionPolicy())
    options["offload_policy"] = host if offload else fsdp2.OffloadPolicy()
    for block in blocks:
        fsdp2.fully_shard(block, **options)
    fsdp2.fully_shard(module, **options)
    # In the backward pass each group gathers the one before it ahead of time.  Said here, because by default each rank
    # goes by the order of its own last forwards: ranks with other rollouts would gather other blocks, and wait for ever.
    chain = [*blocks, module]
    for part, before in zip(chain, chain[:1] + chain):
        part.set_modules_to_backward_prefetch([before])
    return module


def through(module, function):
    """function(module, ...) as a callable of the rest, with FSDP's hooks around it as around module.forward: they gather
    the root's weights before and send its gradients after.  Without FSDP it is just the function."""
    if isinstance(module, fsdp2.FSDPModule):
        module.through = types.MethodType(function, module)
        fsdp2.register_fsdp_forward_method(module, "through")
        return module.through
    return functools.partial(function, module)


@contextlib.contextmanager
def gathered(*modules):
    """Whole weights on every rank, for the rollouts: inside, ranks may run different numbers of forwards, and none too."""
    groups = [part for module in modules for part in module.modules() if isinstance(part, fsdp2.FSDPModule)]
    for part in groups:
        # The first forward decides which module is the root, and inside here a block may be the first to run.
        part._get_fsdp_state()._lazy_init()
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in groups:
            part.reshard()
            part.set_reshard_after_forward(part not in modules, recurse=False)  # a root stays whole until its backward


# =============================================================================================== whole tensors
def whole(tensor):
    """A tensor put together from all ranks' parts.  A collective: every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor, like):
    """A whole tensor, split and placed as `like` is.  Each rank cuts its own part: nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


def full_state(tensors, ranks):
    """Named tensors -> the same names with whole tensors on the CPU, on the main rank; {} on the others, which help to
    put them together one by one, so that no rank ever holds more than the main one must."""
    state = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        if ranks.is_main:
            state[name] = tensor.cpu().contiguous()
    return state


def state_of(module):
    """A module's parameters and buffers by name, as a checkpoint holds them: a shared one once."""
    kept = module.state_dict().keys()
    return dict(module.named_parameters()) | {name: x for name, x in module.named_buffers() if name in kept}


# ========================================================================================================== demo
def main():
    """Five problems of unequal length, a sharded model and a whole one: the same loss, the same gradients."""
    ranks = start(distributed="WORLD_SIZE" in os.environ, device="cpu")
    say = print if ranks.is_main else lambda *words: None
    torch.manual_seed(0)
    block = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
    reference, inputs = torch.nn.Sequential(block(), block()), [torch.randn(length, 8) for length in (1, 7, 2, 5, 3)]
    model = copy.deepcopy(reference)
    model = shard(model, ranks, blocks=list(model))
    mean = sum(reference(x).pow(2).sum() for x in inputs) / sum(map(len, inputs))  # the loss: a mean over all tokens
    mean.backward()

    mine = list(share(len(inputs), ranks))
    tokens = total({"tokens": sum(len(inputs[i]) for i in mine)}, ranks)["tokens"]
    for turn in range(max(everyone(len(mine), ranks))):  # as many backward passes on each rank, or they would wait
        x = inputs[mine[turn]] if turn < len(mine) else torch.zeros(1, 8)
        loss = model(x).pow(2).sum() / tokens * (turn < len(mine))
        (loss * ranks.world_size).backward()  # FSDP averages, we add
    worst = max((whole(p.grad) - q.grad).abs().max().item() for p, q in zip(model.parameters(), reference.parameters()))
    shares = everyone(mine, ranks)
    say(f"{ranks.world_size} rank(s); problems of each: {shares}; {tokens} tokens in all")
    say(f"largest difference of a gradient from the whole model's: {worst:.1e}")
    with gathered(model):
        for i in mine:  # some ranks run one forward, some two
            assert torch.allclose(model[0](inputs[i]), reference[0](inputs[i]), atol=1e-6)
    state = full_state(state_of(model), ranks)
    assert worst < 1e-6 and sorted(i for part in shares for i in part) == list(range(5))
    assert not ranks.is_main or all(torch.equal(state[name], x) for name, x in reference.state_dict().items())
    say("shares cover all, gradients add up, the state is whole: ok")
    stop(ranks)


if __name__ == "__main__":
    main()
