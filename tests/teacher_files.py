"""teacher_files.py: what the tests of SAC's and PPO's files on disk share.

`train` is train(folder), with settings, seed and tasks of the test's own.
"""

from pathlib import Path

import pytest

from teachers.stored import STATE

DAMAGE = ("shorter", "empty", "text", "header", "weights", "last")


class Stop(Exception):
    """What ends a run of training between two reports."""


def stopping(at, reports):
    """A report that is kept, and that ends training at step `at`."""

    def report(step, value):
        reports.append((step, value))
        if step == at:
            raise Stop

    return report


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*")}


def damage_state(folder, how: str) -> None:
    """One of DAMAGE: the file of another length or content, or a byte of it turned round."""
    path = folder / STATE
    whole = path.read_bytes()
    data = bytearray(whole)
    place = {"header": 10, "weights": len(data) // 2, "last": len(data) - 1}.get(how, 0)
    data[place] ^= 0xFF
    others = {"shorter": whole[:-100], "empty": b"", "text": b"no tensors at all"}
    path.write_bytes(others.get(how, data))


def check_refused(train, folder, message: str) -> None:
    """One line that names the file and what to do; nothing is changed."""
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as error:
        train(folder)
    text = str(error.value)
    assert "\n" not in text and str(folder / STATE) in text
    assert f"delete {folder} to train its tasks anew" in text
    assert contents(folder) == before
