"""files.py: how anything is written, and how long work shows itself.

A file is either the old one or the whole new one, never a part; a folder is written by one process at a time;
a disk that cannot hold the result is noticed before the work.
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
from tqdm import tqdm


def progress(*args, **options) -> tqdm:
    """A progress bar; a line every 30 s where nobody watches (a log file)."""
    return tqdm(*args, mininterval=0.1 if sys.stderr.isatty() else 30, **options)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary path)`, then rename: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A compressed npz without pickles, whole or not at all."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """A safetensors file, whole or not at all: same content, same bytes (the library's own writer puts the header
    in random order), with a checksum, which the format lacks.
    """
    blob = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    start = 8 + int.from_bytes(blob[:8], "little")
    about = {**about, "crc": str(zlib.crc32(blob[start:]))}
    header = json.dumps({"__metadata__": about, **json.loads(blob[8:start])}, separators=(",", ":"))
    header += " " * (-len(header) % 8)
    blob = len(header).to_bytes(8, "little") + header.encode() + blob[start:]
    write_atomically(path, lambda temporary: temporary.write_bytes(blob))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header of `save_tensors`. Raises ValueError that says why for anything else."""
    try:
        blob = path.read_bytes()
        tensors, start = safetensors.torch.load(blob), 8 + int.from_bytes(blob[:8], "little")
        about = json.loads(blob[8:start]).get("__metadata__", {})
        if about.get("crc") != str(zlib.crc32(blob[start:])):
            raise ValueError("its checksum differs" if "crc" in about else "it has no checksum")
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]})") from None
    return tensors, about


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
    """Raises ValueError with one line when fewer than `size` bytes are free where `folder` will be."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise ValueError(
            f"{folder} will take about {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: make room"
        )
