"""Ctrl-C and SIGTERM end a script with one line, from its imports on; errors are one line too.

While it trains: test_checkpoint.py. While teachers train: test_teachers_on_disk.py.
Run: pytest tests/test_stop.py
"""

import errno
import os
import signal
import time
from pathlib import Path

import pytest
from commands import start

from support.command_line import in_one_line, one_line
from support.files import progress
from support.stop import ASKED, Signals, handled


@pytest.mark.parametrize("script", ["train.py", "collect.py", "evaluate.py", "tools/bench.py"])
@pytest.mark.parametrize("number", ASKED)
def test_while_a_script_imports(script, number, tmp_path):
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = start(["--help"], script=script, cwd=tmp_path, **heard)
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        process.kill()
        pytest.skip("needs /proc, to see how far the imports are")
    while "libtorch" not in maps.read_text() and process.poll() is None:
        time.sleep(0.001)  # torch is loading: a second and more of imports are left
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 128 + number, err
    assert (out, err) == ("", "stopped before it began: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ASKED)
def test_while_a_script_works(number, capsys):
    before, closed = [signal.getsignal(n) for n in ASKED], []

    def work():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:  # what is open is closed
            closed.append(True)

    with pytest.raises(SystemExit) as end:
        one_line(work, "the same command continues")
    assert end.value.code == 128 + number and closed
    assert capsys.readouterr().err == "stopped; the same command continues\n"
    assert [signal.getsignal(n) for n in ASKED] == before


def test_what_a_library_makes_of_ctrl_c_is_the_same_line(capsys):
    """Ray raises an interrupt of its own in place of ours."""

    def work():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        one_line(work, "the same command continues")
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command continues\n"


@pytest.mark.parametrize("number", ASKED)
def test_while_it_trains_it_is_noted_and_the_step_goes_on(number):
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell has sent pytest to the back
    with handled(signal.SIG_IGN), Signals() as signals:
        assert signals.number == 0
        os.kill(os.getpid(), number)
        assert signals.number == number
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a line\nand another"), "a line and another"),
        (
            OSError(errno.ENOSPC, "No space", "x/y"),
            "no room on the disk for x/y: make room; then go",
        ),
        (OSError(errno.EDQUOT, "Quota", "x/y"), "no room on the disk for x/y: make room; then go"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied"),
        (MemoryError(), "out of memory: take a smaller batch, prompt or network"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "out of memory: take a"),
        (RuntimeError("CUDA out of memory. Tried to"), "out of memory: take a smaller batch"),
        (KeyError("a bug"), None),
        (RuntimeError("Connection closed by peer"), None),  # of no other process of ours
    ],
)
def test_what_a_user_can_mend_is_one_line(error, said):
    found = in_one_line(error, "go on")
    assert found is None if said is None else found.startswith(said) and "\n" not in found


def test_an_error_begins_on_a_line_of_its_own(capsys):
    def work():
        for i in progress(range(9), desc="collecting"):
            if i == 3:
                raise ValueError("the disk is gone")

    with pytest.raises(SystemExit, match="error: the disk is gone"):
        one_line(work, "")
    said = capsys.readouterr().err
    assert "collecting" in said and said.endswith("\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        one_line(lambda: {}["nothing"], "")
