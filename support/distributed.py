"""distributed.py: the collectives of data-parallel training (`torchrun ... train.py`).

in : tensors of one process       out: the same over all processes
Service code, used by router.py and contrastive.py, where it stands beside the equations.

Each process has some rows of the batch. The losses of Eq. 3 and Eq. 7 are not means over rows: an
expert's importance and load, and the keys of a query, are of the *whole* batch. So they are
gathered, with gradients, and N processes give the losses of one process with an N-fold batch (but
for dropout, whose masks are the same in all of them).
The collectives' backward sums over processes and DDP averages: together each gradient counts once.

In a single process every function returns what it was given, so that the equations read the same.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


# ------------------------------------------------------------------------------------------ device
def resolve_device(name: str, flag: str = "--device") -> torch.device:
    """cpu, cuda, cuda:1, ...; `auto` is cuda if there is one.

    Raises ValueError with one line, which names the flag, for a device that cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        # A well-formed name may still name nothing that is here, or (meta) hold no numbers.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"{flag} {name} cannot be used here ({reason})") from None
    return device


# --------------------------------------------------------------------------------------- processes
def active() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if active() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if active() else 1


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun started, if it did; returns the device of this process."""
    # torchrun tells each process who it is by environment variables.
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    # The others wait while the first collects, for hours where teachers are trained: torch's own
    # limit is half an hour.
    limit = timedelta(days=7)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def stop() -> None:
    """Leave the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until all processes are here."""
    if active():
        dist.barrier()


# ------------------------------------------------------------------------------------- collectives
def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over processes, with gradient; the shape stays."""
    if not active():
        return x
    import torch.distributed.nn.functional as collective  # only where a process group exists

    return collective.all_reduce(x)


def all_gather_rows(x: Tensor) -> Tensor:
    """All processes' rows behind one another, with gradient: (b, ...) -> (b * world, ...)."""
    if not active():
        return x
    import torch.distributed.nn.functional as collective

    return torch.cat(collective.all_gather(x.contiguous()))


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean over processes, without gradient: for logging."""
    # A copy, since the collective may work in place.
    return all_reduce_sum(x.detach().clone()) / world()


def normal_like(x: Tensor) -> Tensor:
    """Standard normal noise for the rows of this process, shaped like x.

    All processes' generators share a seed. Each draws the noise of the whole batch and keeps its
    own share, so that N processes stay in step with one process that has all the rows.
    """
    if not active():
        return torch.randn_like(x)
    noise = torch.randn(world() * x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)
    return noise.chunk(world())[rank()]
