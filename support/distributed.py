"""distributed.py: the few collectives of data-parallel training (`torchrun --nproc-per-node N train.py ...`).

in : tensors of one process       out: the same over all processes
Every function is the identity in a single process, so that router.py and contrastive.py read the same.

The losses of Eq. 3 and Eq. 7 are not means over rows: importance, load and keys are over the *whole* batch.
They are gathered with gradients, so N processes give the losses of one process with an N-fold batch.
The collectives' backward sums over processes and DDP averages: together each gradient counts once.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def resolve_device(name: str) -> torch.device:
    """cpu, cuda, cuda:1, ...; `auto` is cuda if there is one. Raises ValueError for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]})"
        ) from None
    return device


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def world() -> int:
    return dist.get_world_size() if active() else 1


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun started (nothing otherwise); the device of this process."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def stop() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def total(x: Tensor) -> Tensor:
    """Sum over processes, with gradient."""
    if not active():
        return x
    import torch.distributed.nn.functional as collective  # only where a process group exists

    return collective.all_reduce(x)


def gather(x: Tensor) -> Tensor:
    """All processes' rows behind one another, with gradient: (b, ...) -> (b * world, ...)."""
    if not active():
        return x
    import torch.distributed.nn.functional as collective

    return torch.cat(collective.all_gather(x.contiguous()))


def mean(x: Tensor) -> Tensor:
    """Mean over processes, without gradient: for logging."""
    return total(x.detach().clone()) / world()


def normal_like(x: Tensor) -> Tensor:
    """Standard normal noise for the rows of this process: its share of the noise of the whole batch, so
    that processes, whose generators share a seed, stay in step with one process that has all rows.
    """
    if not active():
        return torch.randn_like(x)
    noise = torch.randn(world() * x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)
    return noise.chunk(world())[rank()]


def barrier() -> None:
    if active():
        dist.barrier()
