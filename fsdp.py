"""fsdp.py -- one process or many: the same names for both.

The training loop never asks how many ranks there are.  It takes its share of the problems, adds up what must be added
up, and gathers the weights for the rollouts; with one process each of these is the identity.

This version holds the single-process path.  Sharding over ranks (FSDP2) is refused with a clear sentence until it is
here for real.

    python fsdp.py          # shows that the single-process path is the identity
"""

import contextlib
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ranks:
    """Who we are: `rank` of `world_size`, on `device`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def start(distributed=False, device="auto"):
    """Join the other ranks, if there are any.  device: 'auto' (a GPU if there is one), 'cpu', 'cuda', ..."""
    if distributed or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--distributed: this version trains in one process; start it with python, not torchrun")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: not usable here ({str(error).splitlines()[0]})") from None
    return Ranks(0, 1, device)


def stop(ranks):
    """Leave the other ranks."""


def share(n, ranks):
    """Which of n things, by global index, are this rank's."""
    return range(ranks.rank, n, ranks.world_size)


def shard(model, ranks):
    """Split a finished model's parameters over the ranks, block by block."""
    return model


@contextlib.contextmanager
def gathered(model, ranks):
    """Whole parameters on every rank for the rollouts, so that ranks may run different numbers of forwards."""
    yield


def all_sum(tensor, ranks):
    """The sum of a tensor over the ranks."""
    return tensor


def full_state(module, ranks):
    """The whole state dict on the CPU, whatever it is sharded over."""
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def main():
    ranks = start()
    model = shard(torch.nn.Linear(3, 3), ranks)
    print(f"rank {ranks.rank} of {ranks.world_size} on {ranks.device}")
    print("its share of 5 problems:", list(share(5, ranks)))
    with gathered(model, ranks):
        model(torch.zeros(1, 3, device="cpu"))
    assert list(share(5, ranks)) == [0, 1, 2, 3, 4]
    assert all_sum(torch.tensor(3.0), ranks) == 3
    assert all(torch.equal(full_state(model, ranks)[name], value) for name, value in model.state_dict().items())
    print("one process: the share is everything, the sum is the summand, the state is whole: ok")
    stop(ranks)


if __name__ == "__main__":
    main()
