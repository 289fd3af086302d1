"""files.py: how anything is written to disk and read again, and how long work shows itself.

in : plain values, arrays, tensors         out: whole files
     a path                                out: what was written there, or ValueError with one line
Service code: nothing of the paper is here. Read it when a file surprises you.

Five promises, each kept in one place:
    a file is the old one or the whole new one, never a part           `write_atomically`
    the same content gives the same bytes, so files can be compared    `save_arrays`, `save_tensors`
    what is read is what was written, to the bit, or is `Damaged`      `load_json`, `load_arrays`,
    nothing that is read can run code: npz without pickles, JSON,      `load_tensors`
    safetensors
    one process writes a folder, and a full disk is noticed early      `only_writer`, `need_space`

What is damaged gives way to a new file under another name (`set_aside`): nothing is ever deleted
but the temporary files of processes that are gone.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import safetensors.torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from support.checked import Damaged, check_file, read_bytes, read_json

_bars: WeakSet[tqdm] = WeakSet()  # those that are shown


def progress(*args, **options) -> tqdm:
    """A progress bar; a line every 30 s where nobody watches (a log file)."""
    bar = tqdm(*args, mininterval=0.1 if sys.stderr.isatty() else 30, **options)
    _bars.add(bar)
    return bar


def end_bars() -> None:
    """What is printed next begins on a line of its own."""
    for bar in list(_bars):
        bar.close()


# -------------------------------------------------------------------------------------- whole files
def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary path)`, then rename: a reader sees the old file or the new, never a part.

    Whatever ends `write` early, the temporary file goes; a kill's is removed by the next writer of
    the folder. The file has the mode that the umask says, as long as `write` opens it in the usual
    way. Raises OSError that names `path`, also where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file: renaming is only atomic within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:  # of a write it names no file, or the temporary one
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_left_behind(folder: Path, name: str = "*") -> None:
    """The temporary files of killed processes: of all files in a folder, or of one `name` alone."""
    for path in folder.glob(f".{name if name == '*' else glob.escape(name)}.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Another process with that number is there. One's own cannot be: it has yet to write."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is there, and somebody else's
        return True
    return process != os.getpid()


def set_aside(path: Path, reason: str) -> None:
    """Make room for a new file or folder: the old one is renamed, and the user told so, and why."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged{number}")
    path.rename(aside)
    print(f"{reason}: it is made anew; the old one is {aside.name}", file=sys.stderr)


# --------------------------------------------------------------------------------------------- JSON
def _checksum(content: dict[str, Any]) -> str:
    """Of what a JSON file says, however it is laid out."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def save_json(path: Path, content: dict[str, Any]) -> None:
    """`content` and its checksum, whole or not at all. What it is goes under "format"."""
    # as it will be read: tuples are lists there, and the checksum is of that
    plain = json.loads(json.dumps(content))
    text = json.dumps({**plain, "checksum": _checksum(plain)}, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def load_json(path: Path, kind: str, version: Any) -> dict[str, Any]:
    """What `save_json` wrote: a file of that kind whose "format" is `version`.

    Raises Damaged with one line when it is not to the bit what was written, ValueError when it is
    of another kind or version.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != version:
        other = content.get("format") if isinstance(content, dict) else None
        raise ValueError(
            f"{path} is not a {kind} of format {version}" + (f" but {other!r:.20}" if other else "")
        )
    if content.pop("checksum", None) != _checksum(content):
        raise Damaged(f"{path} is damaged (its checksum differs)")
    return content


# ------------------------------------------------------------------------------------------- arrays
Wanted = dict[str, tuple[tuple[int, ...], str]]  # name -> shape, kinds of numbers ("uif": any)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A compressed npz without pickles, whole or not at all."""

    def write(temporary: Path) -> None:
        # An open file, not a path: numpy would add ".npz" to the temporary name.
        with open(temporary, "wb") as file:
            # To numpy's types, a name among `arrays` could be its option `allow_pickle`.
            np.savez_compressed(file, **arrays)  # pyrefly: ignore[bad-argument-type]

    write_atomically(path, write)


def load_arrays(path: Path, wanted: Wanted) -> dict[str, np.ndarray]:
    """The wanted arrays of an npz: shapes, types, finite values. The archive has checksums.

    Raises Damaged with one line for anything else.
    """
    check_file(path)
    try:
        headers = _headers(path)
        stored = {name: headers[name] for name in wanted}
    except Exception as error:  # whatever numpy, zipfile and zlib make of damage
        raise Damaged(f"{path} is not a whole file of arrays ({error!r:.100})") from None
    for name, (shape, numbers) in stored.items():  # all that headers tell, before memory is taken
        size, kinds = wanted[name]
        if shape != size:
            raise Damaged(f"{path}: {name} has shape {shape}, not {size}")
        if numbers.kind not in kinds:
            what = "numbers" if "f" in kinds else "whole numbers"
            raise Damaged(f"{path}: {name} has type {numbers}, not {what}")
    try:
        with np.load(path, allow_pickle=False) as file:  # a pickle could run code
            arrays = {name: file[name] for name in wanted}
    except Exception as error:
        raise Damaged(f"{path} is not a whole file of arrays ({error!r:.100})") from None
    for name, array in arrays.items():
        if not np.isfinite(array).all():  # one NaN in a batch ends a training
            raise Damaged(f"{path}: {name} holds values that are not finite")
    return arrays


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array of an npz, from the headers: nothing is unpacked, so that a
    small file that would fill the memory is refused before it does.
    """
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0
                if version != (1, 0):  # longer headers, which other programs may write
                    read = np.lib.format.read_array_header_2_0
                shape, _, kind = read(file)
                shapes[name.removesuffix(".npy")] = (shape, kind)
    return shapes


# ------------------------------------------------------------------------------------------ tensors
# A safetensors file is  8 bytes: length of the header | the header, JSON | the tensors' bytes.
def _seal(header: dict[str, Any], data: memoryview) -> str:
    """Checksum of all that such a file says: names, places and `about`, then the numbers."""
    return str(zlib.crc32(data, zlib.crc32(json.dumps(header, sort_keys=True).encode())))


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Tensors from any device and a few strings `about` them, as safetensors, whole or not at all.

    Three things that safetensors.torch.save_file does not do: the same content gives the same bytes
    (its header is in random order), the header holds a checksum of everything, and the file's mode
    is the umask's (its files are for their owner alone).
    """
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # A view, so that the parts below are not copies: a checkpoint has some 50 MB.
    blob = memoryview(safetensors.torch.save(cpu))
    data = 8 + int.from_bytes(blob[:8], "little")  # where the tensors' bytes begin
    about = {name: value for name, value in about.items() if name != "crc"}
    entries = {"__metadata__": about, **json.loads(bytes(blob[8:data]))}
    about["crc"] = _seal(entries, blob[data:])
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

    Raises Damaged with one line that says why for a missing, damaged or foreign file.
    """
    blob = read_bytes(path)
    try:
        tensors = safetensors.torch.load(blob)  # checks the header
        data = 8 + int.from_bytes(blob[:8], "little")
        entries = json.loads(blob[8:data])
        about = entries.get("__metadata__", {})
        seal = about.pop("crc", None)
        if seal is None:
            raise ValueError("it has no checksum")
        if seal != _seal(entries, memoryview(blob)[data:]):
            raise ValueError("its checksum differs")
    except (SafetensorError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({str(error).splitlines()[0]})") from None
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


def load_optimizer(optimizer: Optimizer, prefix: str, tensors: dict[str, Tensor]) -> int:
    """The reverse of `optimizer_tensors`, from all tensors of a file: those of `prefix` are used.

    Returns of how many parameters there were moments. Raises ValueError with one line when a
    parameter's moments are not complete, or when they are not of the optimizer's parameters; the
    optimizer is as it was then.
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
    return len(moments_of)


# ------------------------------------------------------------------------------------------ folders
@contextmanager
def only_writer(folder: Path, seconds: float = 0, lock: str = ".lock") -> Iterator[None]:
    """Hold `folder` for this process; the lock goes with the process, however it ends.

    What writers that were killed have left behind is removed. Raises ValueError with one line when
    another process still holds it after so many seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / lock, timeout=seconds)
    try:
        held.acquire()
    except Timeout:
        raise ValueError(
            f"another process is writing {folder}: wait for it, or choose another folder"
        ) from None
    try:
        remove_left_behind(folder)
        yield
    finally:
        held.release()


def check_folder(flag: str, folder: str) -> None:
    """Raises ValueError with one line for a folder that is not there and cannot be made."""
    path = Path(folder).absolute()
    there = next(part for part in (path, *path.parents) if os.path.lexists(part))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {folder}: {there} is no folder that can be written to")


def need_space(folder: Path, size: float) -> None:
    """Raises ValueError with one line when fewer than `size` bytes are free for `folder`."""
    place = Path(folder).absolute()
    while not place.exists():  # the folder itself may not be there yet
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        needed, there = (tqdm.format_sizeof(number, "B") for number in (size, free))
        raise ValueError(f"{folder} will take about {needed}, and {there} are free: make room")


def need_memory(what: str, size: float) -> None:
    """Raises ValueError with one line when `what` takes more bytes than this machine has at all:
    it would end in a crash, or in the system's killing whatever it likes best.
    """
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > there:
        needed, has = (tqdm.format_sizeof(number, "B") for number in (size, there))
        raise ValueError(f"{what} would take at least {needed}; this machine has {has} of memory")
