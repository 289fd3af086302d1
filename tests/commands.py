"""commands.py: how tests run jobs and scripts, and look at the files that these leave."""

import csv
import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import pytest

import collect
from support import jobs
from support.files import save_json
from support.stop import ASKED
from teachers import teachers

ROOT = Path(collect.__file__).resolve().parent


def flags(settings) -> list[str]:
    """Settings, a dict or nested dataclasses, as a command line; None leaves a flag out."""
    if is_dataclass(settings):
        settings = {field.name: getattr(settings, field.name) for field in fields(settings)}
    line = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if is_dataclass(value):
            line += flags(value)
        elif isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            line += [f"--{flag}", str(value)]
    return line


def changed(settings, **changes):
    """Nested settings with some of their fields changed, each in the group that has it."""
    groups = {}
    for field in fields(settings):
        group = getattr(settings, field.name)
        own = [name for name in changes if name in {f.name for f in fields(group)}]
        groups[field.name] = replace(group, **{name: changes.pop(name) for name in own})
    assert not changes, changes
    return replace(settings, **groups)


def start(argv: list[str], *launcher: str, script: str = "train.py", **options) -> subprocess.Popen:
    """A script as a process of its own."""
    line = [sys.executable, *launcher, str(ROOT / script), *argv]
    one = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=os.environ | one, **pipes, **options)


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a wrong command prints; beside it only progress, no traceback."""
        assert self.code not in (0, None), self.out
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0]


def run(script: str, argv: list[str], monkeypatch, capsys) -> Ended:
    """`python SCRIPT ARGV...` as the interpreter runs it, in this process."""
    capsys.readouterr()
    code, why = as_script(str(ROOT / script), argv)
    out, err = capsys.readouterr()
    return Ended(code, out, err + why)


def as_script(path: str, argv: list[str]) -> tuple[int, str]:
    """Runs a script as if it were a process; its exit code and what that would print at its end."""
    before = {number: signal.getsignal(number) for number in ASKED}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *argv])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            return (1, f"{end.code}\n") if isinstance(end.code, str) else (end.code or 0, "")
        finally:
            for number, handler in before.items():  # a script ends with its process, this goes on
                signal.signal(number, handler)
    return 0, ""


class Trap:
    """Unpickling one would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@contextmanager
def at_home():
    """Jobs run in this process, one behind the other: no worker has to import everything first."""

    def run_jobs(work, jobs, workers, cluster=None, watch=lambda: None, lost=None):
        return [work(job, lambda: None) for job in jobs]

    def run_command(line, log, alive, folder, environment):
        with open(log, "a") as out, redirect_stdout(out), redirect_stderr(out), chdir(folder):
            code, why = as_script(line[1], line[2:])
            out.write(why)
        return code

    with pytest.MonkeyPatch.context() as patch:
        for module in (collect, teachers, jobs):  # jobs: for scripts that `run` begins anew
            patch.setattr(module, "run_jobs", run_jobs)
        patch.setattr(jobs, "run_command", run_command)
        yield


def readme_files() -> dict[str, str]:
    """The python blocks of README.md that begin with a file's name, by that name."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    named = {re.match(r'"""(\w+\.py):', block): block for block in blocks}
    return {name[1]: block for name, block in named.items() if name}


def rewrite(path: Path, edited) -> None:
    """A JSON file after `edited(its content)`, with a checksum that fits: no accident, a wish."""
    content = json.loads(path.read_text())
    content.pop("checksum", None)
    edited(content)
    save_json(path, content)


def contents(folder) -> dict:
    """Every file's bytes and time of change."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of the table that reproduce.py made."""
    with open(folder / "table.csv", newline="") as file:
        return list(csv.DictReader(file))
