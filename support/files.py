"""files.py: how anything is written to disk, and how long work shows itself.

in : text, arrays, tensors         out: whole files
     a path                        out: what is there, or ValueError with one line
Service code: nothing of the paper is here. Read it when a file surprises you.

Four promises, each kept in one place:
    a file is the old one or the whole new one, never a part           `write_atomically`
    the same content gives the same bytes, so files can be compared    `save_arrays`, `save_tensors`
    nothing that is read can run code: npz without pickles, JSON, safetensors
    one process writes a folder, and a full disk is noticed early      `only_writer`, `need_space`
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors.torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm


def progress(*args, **options) -> tqdm:
    """A progress bar; a line every 30 s where nobody watches (a log file)."""
    return tqdm(*args, mininterval=0.1 if sys.stderr.isatty() else 30, **options)


# -------------------------------------------------------------------------------------- whole files
def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary path)`, then rename: a reader sees the old file or the new, never a part.

    Whatever ends `write` early, the temporary file goes. The file has the mode that the umask says,
    as long as `write` opens it in the usual way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file: renaming is only atomic within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A compressed npz without pickles, whole or not at all."""

    def write(temporary: Path) -> None:
        # An open file, not a path: numpy would add ".npz" to the temporary name.
        with open(temporary, "wb") as file:
            # To numpy's types, a name among `arrays` could be its option `allow_pickle`.
            np.savez_compressed(file, **arrays)  # pyrefly: ignore[bad-argument-type]

    write_atomically(path, write)


# ------------------------------------------------------------------------------------------ tensors
# A safetensors file is  8 bytes: length of the header | the header, JSON | the tensors' bytes.
def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Tensors from any device and a few strings `about` them, as safetensors, whole or not at all.

    Three things that safetensors.torch.save_file does not do: the same content gives the same bytes
    (its header is in random order), the header holds a checksum of the tensors, and the file's mode
    is the umask's (its files are for their owner alone).
    """
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # A view, so that the parts below are not copies: a checkpoint has some 50 MB.
    blob = memoryview(safetensors.torch.save(cpu))
    data = 8 + int.from_bytes(blob[:8], "little")  # where the tensors' bytes begin
    about = {**about, "crc": str(zlib.crc32(blob[data:]))}
    entries = {"__metadata__": about, **json.loads(bytes(blob[8:data]))}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format wants the tensors aligned

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            file.write(blob[data:])

    write_atomically(path, write)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_tensors` wrote: tensors on the CPU, which may be written to, and the strings.

    Raises ValueError with one line that says why for a missing, damaged or foreign file.
    """
    try:
        blob = path.read_bytes()
        tensors = safetensors.torch.load(blob)  # checks the header
        data = 8 + int.from_bytes(blob[:8], "little")
        about = json.loads(blob[8:data]).get("__metadata__", {})
        if "crc" not in about:
            raise ValueError("it has no checksum")
        if about["crc"] != str(zlib.crc32(memoryview(blob)[data:])):
            raise ValueError("its checksum differs")
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]})") from None
    return tensors, about


def optimizer_tensors(optimizer: Optimizer, prefix: str) -> dict[str, Tensor]:
    """What an optimizer has learned (Adam: step and both moments of each parameter), no copies.

    The names are `prefix.number of the parameter.moment`, such as adam.0.exp_avg. A parameter that
    has had no gradient yet has no moments, and none here.
    """
    moments_of = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{number}.{name}": value
        for number, moments in moments_of.items()
        for name, value in moments.items()
    }


def load_optimizer(optimizer: Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    """The reverse of `optimizer_tensors`, from all tensors of a file: those of `prefix` are used.

    Raises ValueError with one line when a parameter's moments are not complete, or when they are
    not of the optimizer's parameters; the optimizer is as it was then.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments_of: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            number, _, name = key.removeprefix(f"{prefix}.").partition(".")
            if not number.isdecimal() or int(number) >= len(parameters):
                raise ValueError(f"{key} is of none of the {len(parameters)} parameters")
            # Steps are one number, moments are shaped like their parameter.
            shape = () if name == "step" else parameters[int(number)].shape
            if value.shape != shape:
                raise ValueError(f"{key} has shape {tuple(value.shape)}, not {tuple(shape)}")
            # A copy: the optimizer changes its moments in place.
            moments_of.setdefault(int(number), {})[name] = value.clone()
    names = {name for moments in moments_of.values() for name in moments}
    for number, moments in moments_of.items():
        if missing := names - moments.keys():
            raise ValueError(f"{prefix}.{number}.{min(missing)} is missing")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments_of})


# ------------------------------------------------------------------------------------------ folders
@contextmanager
def only_writer(folder: Path, seconds: float = 0) -> Iterator[None]:
    """Hold `folder` for this process; the lock goes with the process, however it ends.

    Raises ValueError with one line when another process still holds it after so many seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=seconds)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another process is writing {folder}: wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def need_space(folder: Path, size: float) -> None:
    """Raises ValueError with one line when fewer than `size` bytes are free for `folder`."""
    place = Path(folder).absolute()
    while not place.exists():  # the folder itself may not be there yet
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise ValueError(
            f"{folder} will take about {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: "
            "make room"
        )
