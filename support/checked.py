"""checked.py: what is read from a file is what was declared, or there is one line (pydantic).

in : a JSON file, or plain values, and a declared type          out: an object of that type

Flags, JSON files and the headers of tensor files are checked by the same declarations: types with
their bounds, such as `config.Count`. Nothing of the paper is here.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

LARGEST_JSON = 10**8  # bytes; read whole, and by far more than any that is written here


@cache  # made once for each type, not at every check
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def validated(kind: Any, values: Any, where: str, flags: bool = False) -> Any:
    """An object of the type `kind` from plain values.

    Raises ValueError that says where, and names the first value that cannot be; of settings
    (`flags`) in the spelling of the command line.
    """
    # As JSON and strictly: what would not survive a file is refused on the command line too,
    # and "5" or 5.0 is no whole number.
    try:
        return _adapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise _one_line(error, where, flags) from None


def validated_strings(kind: Any, values: dict[str, str], where: str) -> Any:
    """The same from strings, which is all that the header of a tensor file can hold."""
    try:
        return _adapter(kind).validate_strings(values)
    except ValidationError as error:
        raise _one_line(error, where, flags=False) from None


def _one_line(error: ValidationError, where: str, flags: bool) -> ValueError:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]] or ["settings" if flags else "its content"]
    name = "--" + place[0].replace("_", "-") if flags else ".".join(place)
    if first["type"] == "missing":
        return ValueError(f"{where}{name} is missing")
    # "Input should be ...", "String should have ...", "Value error, must be ..."
    message = re.sub("^(Input |String |List |Value error, )", "", first["msg"])
    return ValueError(f"{where}{name} {first['input']!r:.60}: it {message[0].lower()}{message[1:]}")


# ------------------------------------------------------------------------------------------- files
class Damaged(ValueError):
    """A file is not what was written: one line that names it and says what is wrong with it."""


def check_file(path: Path) -> None:
    """Raises Damaged for what is no file: a folder, or a pipe that would wait."""
    if not path.is_file():
        raise Damaged(f"{path} is {'no file' if path.exists() else 'missing'}")


def read_bytes(path: Path) -> bytes:
    """All bytes of a file. Raises Damaged where it cannot be read."""
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})") from None


def read_json(path: Path) -> Any:
    """Plain values of any JSON file. Raises Damaged with one line for what is none."""
    if path.is_file() and path.stat().st_size > LARGEST_JSON:
        raise Damaged(f"{path} is too large for a JSON file of this project")
    try:
        return json.loads(read_bytes(path))
    except RecursionError:  # brackets a hundred thousand deep
        raise Damaged(f"{path} is damaged (it is nested too deeply)") from None
    except (ValueError, UnicodeDecodeError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{path} is damaged ({error})") from None
