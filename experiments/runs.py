"""runs.py: one run of an experiment as a job: train.py and evaluate.py, as processes of their own.

in : a `Job`, all plain values          out: a record beside the evaluation's CSV, or one line
Before it, the datasets of all runs (`collect_all`).
Nothing of the paper is here. Used by reproduce.py; jobs.py runs many at once.

Processes, not function calls: a run that takes all memory, or is killed, ends alone, and what it
prints goes into its own log. Everything that was done is on disk, so that a job may be ended at any
moment and begun again:

    no checkpoint, or an early one      train.py --resume
    the last checkpoint, no record      evaluate.py
    a record of the same settings       nothing: the run is finished, also without its folder
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import collect
from config import Collection
from support import checkpoint, jobs
from support.files import load_json, only_writer, save_json

FORMAT = 1  # of a record; raised when its meaning changes
PROJECT = Path(__file__).resolve().parents[1]
NOT_STARTED = "not started"
PATIENCE = 120  # seconds: the training of a command that was killed has yet to finish its step


@dataclass(frozen=True)
class Job:
    """A run: trained, then played on its held-out tasks. Plain values, which any process can read.

    Paths are as seen from `here`.
    """

    name: str
    runs: str  # folder of the runs: weights and logs
    results: str  # folder of the evaluations and records
    here: str
    settings: dict[str, Any]  # all that changes what is measured
    train: tuple[str, ...]  # the command line of train.py, but for its folder
    evaluate: tuple[str, ...]  # that of evaluate.py, likewise
    steps: int
    repeats: int
    gpus: int = 0  # 0: on the CPU
    slots: int = 1  # jobs at a time
    older: dict[str, Any] = field(default_factory=dict)  # settings that old records do not have
    free: tuple[str, ...] = ()  # settings in which a trained run may differ: how it is played
    deadline: float = 0.0  # time.time() after which it is not begun; 0: none

    @property
    def folder(self) -> Path:
        return Path(self.here, self.runs, self.name)

    @property
    def record(self) -> Path:
        return Path(self.here, self.results, f"{self.name}.json")

    @property
    def log(self) -> Path:
        # beside the folder: train.py takes no folder that holds something else
        return Path(self.here, self.runs, f"{self.name}.log")


# ------------------------------------------------------------------------------------ what is there
def read_record(path: Path) -> dict[str, Any]:
    """What `_keep` wrote. Raises ValueError with one line."""
    return load_json(path, "record of a run", FORMAT)


def finished(job: Job) -> bool:
    """Whether there is a record of these settings, and the CSV that it promises, as it was."""
    try:
        record = read_record(job.record)
        if _unlike(job, record):
            return False
        # another evaluation of the same run writes to the same name
        return record.get("csv_sum") in (None, _sum_of(job.record.parent / record["csv"]))
    except (OSError, ValueError):
        return False


def _sum_of(path: Path) -> str:
    return f"{zlib.crc32(path.read_bytes()):08x}"


def other_settings(job: Job, found: dict[str, Any]) -> list[str]:
    """'name found -> wanted' for what is not as this job has it."""
    known = job.older | found  # a setting that came later says what was done before
    wanted = _plain(job.settings)

    def same(name: str) -> bool:
        one, other = known.get(name), wanted.get(name)
        if one == other or not (str(one).endswith(".py") and str(other).endswith(".py")):
            return one == other
        here = Path(job.here)  # two paths may be of one file
        return (here / str(one)).resolve() == (here / str(other)).resolve()

    return [
        f"{name} {known.get(name)} -> {wanted.get(name)}"
        for name in sorted(known.keys() | wanted.keys())
        if not same(name)
    ]


def _unlike(job: Job, record: dict[str, Any]) -> list[str]:
    """The same of a record, and of how often it was played."""
    changed = other_settings(job, record["settings"])
    if record["repeats"] != job.repeats:
        changed.append(f"repeats {record['repeats']} -> {job.repeats}")
    return changed


def check_record(job: Job) -> None:
    """Raises ValueError with one line for a finished run of the same name, but other settings."""
    try:
        record = read_record(job.record)
    except ValueError:
        return
    if changed := _unlike(job, record):  # its CSV would be written over
        raise ValueError(
            f"{job.record} is of other settings ({', '.join(changed)}), perhaps of an older "
            "preset: name another --results, or move it away"
        )


def recorded(results: Path) -> dict[tuple[str, str], set[int]]:
    """{(family, method): seeds} of all records in a folder."""
    found: dict[tuple[str, str], set[int]] = {}
    for path in results.glob("*.json"):
        try:
            settings = read_record(path)["settings"]
        except ValueError:  # another file, or a damaged one
            continue
        found.setdefault((settings["env"], settings["backbone"]), set()).add(settings["seed"])
    return found


def steps_done(job: Job) -> int:
    """Training steps that train.csv knows of: cheap, for a progress bar."""
    try:
        with open(job.folder / "train.csv", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 10_000))
            lines = file.read().split(b"\n")[:-1]  # what is behind the last newline is half a row
    except OSError:
        return 0
    step = lines[-1].partition(b",")[0] if lines else b""  # the first column
    return min(int(step), job.steps) if step.isdigit() else 0


def in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings))


# --------------------------------------------------------------------------------------- their data
def collect_all(
    wanted: dict[str, Collection], workers: int, cluster: str | None, deadline: float
) -> dict[str, str]:
    """Make every dataset once. Returns {run: why not} of the runs whose dataset cannot be made."""
    torch.set_num_threads(1)  # more change the rounding (collect.py)
    known: dict[Path, str] = {}
    for cfg in wanted.values():
        folder = collect.dataset_folder(cfg)
        if folder not in known:
            known[folder] = _collect_one(cfg, workers, cluster, deadline)
    failed = {name: known[collect.dataset_folder(cfg)] for name, cfg in wanted.items()}
    return {name: why for name, why in failed.items() if why}


def _collect_one(cfg: Collection, workers: int, cluster: str | None, deadline: float) -> str:
    """ "" or one line: why a dataset is not there."""
    if deadline and time.time() > deadline:
        return NOT_STARTED
    cluster = cluster if collect.teacher_algorithm(cfg) else None
    work = replace(cfg.work, workers=cfg.work.workers or workers, cluster=cluster)
    try:
        collect.collect(replace(cfg, work=work))
    except Exception as error:  # also a user's family that breaks: the others go on
        if not isinstance(error, (ValueError, OSError)):
            traceback.print_exc()
        return in_a_line(error)
    return ""


# ---------------------------------------------------------------------------------------- one run
def work(job: Job, alive: Callable[[], None]) -> str:
    """Train and evaluate what is missing. Returns "" or one line: why it failed, or NOT_STARTED.

    Raises nothing but `jobs.Stopped`: other jobs go on.
    """
    if job.deadline and time.time() > job.deadline:
        return NOT_STARTED
    try:
        with _one_gpu(job, alive) as environment:
            with only_writer(job.folder, seconds=PATIENCE):
                pass
            if not _is_trained(job):
                line = ["train.py", *job.train, "--run", f"{job.runs}/{job.name}", "--resume"]
                _call(job, line, alive, environment)
            line = ["evaluate.py", f"{job.runs}/{job.name}", *job.evaluate]
            _call(job, line, alive, environment)
            _keep(job)
    except jobs.Stopped:
        raise
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)):  # a bug: its place is wanted
            with open(job.log, "a") as log:
                traceback.print_exc(file=log)
        return in_a_line(error)
    return ""


def _is_trained(job: Job) -> bool:
    """Raises ValueError for a run of other settings: train.py, which says so too, is not asked."""
    try:
        done = checkpoint.read(job.folder)[1].step >= job.steps
    except ValueError:
        return False  # none yet; of a damaged one train.py says what is wrong with it
    if not done:
        return False
    found: dict[str, Any] = {}  # as they are on disk: no file of the user's is needed for this
    for name, value in checkpoint.read_run(job.folder)["settings"].items():
        found |= value if isinstance(value, dict) else {name: value}
    found = {name: value for name, value in found.items() if name in job.settings}
    if changed := other_settings(job, found | {k: job.settings[k] for k in job.free}):
        raise ValueError(
            f"{job.folder} was trained with other settings ({', '.join(changed)}), perhaps of an "
            "older preset: name another --runs, or move it away"
        )
    return True


@contextmanager
def _one_gpu(job: Job, alive: Callable[[], None]) -> Iterator[dict[str, str]]:
    """The environment of a job's processes: one core, or a GPU that the job holds a place of.

    Places are locks, which go with their process however it ends.
    """
    if not job.gpus:
        yield {"OMP_NUM_THREADS": "1"}
        return
    job.record.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + PATIENCE
    while True:
        for slot in range(job.slots):
            lock = FileLock(job.record.parent / f".place{slot}.lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                continue
            try:
                yield {"CUDA_VISIBLE_DEVICES": _device(slot % job.gpus)}
                return
            finally:
                lock.release()
        alive()
        if time.monotonic() > until:
            raise OSError("all places on the GPUs are taken by other jobs")
        time.sleep(0.5)


def _device(number: int) -> str:
    """The name of a GPU: of those that this command may use, if it may not use all."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return allowed.split(",")[number] if allowed else str(number)


def _call(
    job: Job, line: list[str], alive: Callable[[], None], environment: dict[str, str]
) -> None:
    """A script of this project on a job's folders. Raises ValueError with its one-line error."""
    before = job.log.stat().st_size if job.log.exists() else 0
    command = [sys.executable, str(PROJECT / line[0]), *line[1:]]
    code = jobs.run_command(command, job.log, alive, job.here, environment)
    if code == 0:
        return
    alive()  # Ctrl-C reaches all processes of a terminal: it is no failure of this one
    with open(job.log, errors="replace") as log:
        log.seek(before)
        lines = [text.strip() for text in log.read().splitlines() if text.strip()]
    errors = [text.removeprefix("error: ") for text in lines if text.startswith("error: ")]
    if code < 0:
        raise ValueError(f"{line[0]} was killed by signal {-code} (9: out of memory?)")
    raise ValueError((errors or lines or [f"{line[0]} ended with {code}"])[-1])


def _keep(job: Job) -> None:
    """The record: written last, so that it promises an evaluation."""
    results = job.record.parent
    row = next(r for r in reversed(_summary(results)) if _folder_of(r) == job.name)
    # the newest: an evaluation of older settings may lie there under another name
    files = sorted(results.glob(f"{job.name}-test-*.csv"), key=lambda path: path.stat().st_mtime)
    content: dict[str, Any] = {
        "format": FORMAT,
        "settings": job.settings,
        "repeats": job.repeats,
        "csv": files[-1].name,
        "csv_sum": _sum_of(files[-1]),
        "steps": int(row["steps"]),
        "train_seconds": float(row["train_seconds"]),
    }
    for name in ("random_return", "optimum", "teacher_return"):
        content[name] = float(row[name]) if row[name] else None
    save_json(job.record, content)


def _summary(results: Path) -> list[dict[str, str]]:
    with open(results / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def _folder_of(row: dict[str, str]) -> str:
    """The run that a row of summary.csv is of: `python evaluate.py FOLDER ...`"""
    return Path(shlex.split(row["command"])[2]).name
