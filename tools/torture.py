"""torture.py: does anything get lost, does anything damaged get in? A campaign against this copy.

    python tools/torture.py --minutes 10 --seed 0

in : nothing        out: a table; exit code 1 if anything was not as it should be
Nothing here is of the paper, and `make test` does not run it. In a temporary folder it

    kills     commands with `kill -9` at random moments, starts them again until they end by
              themselves, and compares every file with that of a run that nothing disturbed
    damages   single bits of every kind of file, and their lengths, and reads them again
    pairs     starts two commands on one run or dataset at the same moment
    processes kills one process of data-parallel training (torchrun), and continues it

--minutes ends pairs and kills where their counts have not; a command in hand ends first. All else
is always done: every command once undisturbed, damages, processes. What is compared: bytes of
datasets, teachers, config.json and returns; all tensors of a checkpoint; train.csv but for its two
columns of time.
"""

from __future__ import annotations

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C should not be a traceback
    from support.stop import at_once

    at_once()

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from config import Config
from data import load_dataset
from support import checkpoint
from support.checked import read_json
from support.command_line import one_line, parse_collection
from support.files import progress
from support.journal import Log
from teachers.sac import SACConfig, StackedSAC
from teachers.stored import STATE, read_policies, read_state, save_state
from teachers.teachers import groups_of, load_levels

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"train": [[0, 0], [9, 9], [0, 5], [3, 4], [7, 2], [5, 5]], "test": [[2, 2], [8, 6]]}
GOAL_DATA = "--data-episodes 40 --data-queries 60 --tasks ../goals.json --datasets"
ROBOTS = (
    "--env point-robot --preset paper --data-episodes 23 --data-queries 40 --train-tasks 5 "
    "--test-tasks 2 --teacher-steps 800 --teacher-save-every 40 --teacher-warmup 40 "
    "--teacher-hidden 16 --teacher-batch 32 --teacher-group 3 --datasets data"
)
CHAINS = (
    f"--env {next(ROOT.glob('tests/*/chain.py'))} --train-tasks 3 --test-tasks 1 "
    "--data-episodes 20 --data-queries 40 --teacher-steps 2000 --teacher-save-every 200 "
    "--teacher-group 2 --datasets data"
)
RUN = (
    f"--preset cpu --layers 2 --heads 2 --width 16 --ff 32 --token-hidden 24 --task-hidden 16 "
    f"--token-experts 4 --task-experts 4 --dropout 0.1 --steps 300 --batch 4 --checkpoint-every 10 "
    f"--log-every 3 --eval-every 60 --eval-episodes 1 --episodes 2 --threads 1 --run run --resume "
    f"{GOAL_DATA} ../data"
)
SCRIPTS = {
    "collect, a rule": f"collect.py {GOAL_DATA} data --data-episodes 2000 --recipe explore",
    "collect, SAC, 1 worker": f"collect.py {ROBOTS} --workers 1",
    "collect, SAC, 2 workers": f"collect.py {ROBOTS} --workers 2",
    "collect, PPO, 2 workers": f"collect.py {CHAINS} --workers 2",
    "train, AD": f"train.py --backbone ad {RUN} --prompt-length 200 --history 2",
    "train, DPT": f"train.py --backbone dpt {RUN} --prompt-length 100 --queries 4",
}
MARK = "T2MIR_TORTURE"  # in the environment of all that is started here: orphans are found by it
STATE_SETTINGS = {"steps": 800, "seed": [0, 1]}
PATIENCE = 300.0  # seconds until a command counts as hanging


@dataclass
class Table:
    """How often what was tried, and what was not as it should be."""

    tried: Counter = field(default_factory=Counter)
    wrong: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, problem: str | None = None) -> None:
        self.tried[what] += 1
        if problem:
            self.wrong[what] += 1
            self.examples.setdefault(what, problem)

    def text(self) -> str:
        rows = ["| what | tried | not as it should be |", "| --- | --- | --- |"]
        rows += [f"| {what} | {n} | {self.wrong[what]} |" for what, n in self.tried.items()]
        return "\n".join([*rows, *(f"{what}: {why}" for what, why in self.examples.items())])


# ------------------------------------------------------------------------------------- commands
def start(line: str, place: Path, *launcher: str) -> subprocess.Popen:
    """`python SCRIPT ...` in a folder of its own."""
    place.mkdir(parents=True, exist_ok=True)
    script, *rest = line.split()
    env = os.environ | {MARK: str(place), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(place / "err.log", "w") as err:
        return subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / script), *rest],
            cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=err,
        )  # fmt: skip


def ended(process: subprocess.Popen, seconds: float = PATIENCE) -> int | None:
    """Its exit code; None if it had to be killed after so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def orphans(place: Path, seconds: float = 20) -> list[str]:
    """Processes that were started for a folder and are still there when they have had time."""
    marked, deadline = f"{MARK}={place}".encode(), time.monotonic() + seconds
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if marked in path.read_bytes().split(b"\0"):
                    found.append(path.parent.name)
            except OSError:  # it has just ended, or is not ours
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def complaint(place: Path) -> str | None:
    """What is wrong with what a command has said: a traceback, or more than one error."""
    said = (place / "err.log").read_text(errors="replace")
    errors = [text for text in said.splitlines() if text.startswith("error: ")]
    if "Traceback" in said:
        return "a traceback: " + said.splitlines()[-1]
    return None if len(errors) <= 1 else f"{len(errors)} errors: {errors[0]}"


# ------------------------------------------------------------------------------- files compared
def content(path: Path) -> Any:
    """What must be the same in a run that was killed."""
    if path.name == "train.csv":
        with open(path, newline="") as file:
            timed = ("seconds", "tokens_per_s")
            return [
                {k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)
            ]
    if path.name == checkpoint.FILE:
        tensors, header = checkpoint.read(path.parent)
        numbers = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        return numbers, replace(header, seconds=0.0, rows="")
    return path.read_bytes()


def files_of(place: Path) -> dict[str, Path]:
    """All that counts: no locks, no logs, no pictures (their bytes hold the time)."""
    left_out = ("err.log", "summary.csv")
    return {
        str(path.relative_to(place)): path
        for path in sorted(place.rglob("*"))
        if path.is_file()
        and not path.name.endswith((".lock", ".png"))
        and path.name not in left_out
    }


def difference(place: Path, want: Path) -> str | None:
    """The first file that is not as in the folder of the undisturbed run."""
    here, there = files_of(place), files_of(want)
    if other := here.keys() ^ there.keys():
        return f"{place}: {sorted(other)[0]} is in one of two"
    for name in here:
        if content(here[name]) != content(there[name]):
            return f"{place / name} differs"
    return None


# --------------------------------------------------------------------------------- the campaigns
@dataclass
class Campaign:
    """What all parts share."""

    home: Path
    seed: int
    end: float  # time.monotonic() when it is over
    table: Table = field(default_factory=Table)
    seconds: dict[str, float] = field(default_factory=dict)  # of each undisturbed command

    def over(self) -> bool:
        return time.monotonic() > self.end

    def undisturbed(self, name: str) -> None:
        place, before = self.home / f"whole {name}".replace(" ", "-"), time.monotonic()
        code = ended(start(SCRIPTS[name], place))
        self.seconds[name] = time.monotonic() - before
        if code != 0:
            raise ValueError(f"{name} ends with {code} undisturbed: {place / 'err.log'}")

    def whole(self, name: str) -> Path:
        return self.home / f"whole {name}".replace(" ", "-")

    def kill(self, name: str, number: int) -> int:
        """One command, killed again and again until it ends by itself; how many kills it took."""
        place, kills = self.home / f"kills-{number}", 0
        rng = np.random.default_rng([self.seed, 0, number])  # two run at a time
        while True:
            process = start(SCRIPTS[name], place)
            # From the middle of the imports to a little before its end; later ever more seldom.
            share = rng.uniform(0.3, 1.0 + 0.1 * kills)
            try:
                code = process.wait(share * self.seconds[name])
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                self.table.note(f"kills: {name}", complaint(place))
        problem = f"exit {code}: {(place / 'err.log').read_text()[-200:]}" if code else None
        if left := orphans(place):
            problem = problem or f"{len(left)} processes left"
        problem = problem or difference(place, self.whole(name))
        self.table.note(f"ends: {name}", problem)
        if not problem:
            shutil.rmtree(place)
        return kills

    def pair(self, name: str, number: int) -> None:
        """Two commands at once: one works, the other says one line, and nothing is mixed."""
        place = self.home / f"pair-{number}"
        place.mkdir()
        first = start(SCRIPTS[name], place)
        (place / "err.log").rename(place / "first.log")
        time.sleep(np.random.default_rng([self.seed, 1, number]).uniform(0, 0.3))
        second = start(SCRIPTS[name], place)
        codes = [ended(first), ended(second)]
        said = [(place / log).read_text() for log in ("first.log", "err.log")]
        (place / "first.log").unlink()
        problem = difference(place, self.whole(name))
        if sorted(map(str, codes)) != ["0", "1"]:
            problem = f"they end with {codes}"
        elif said[codes.index(1)].count("error: ") != 1 or "Traceback" in "".join(said):
            problem = f"they say {said}"
        self.table.note(f"pairs: {name}", problem)


def torchrun(campaign: Campaign) -> None:
    """One of two processes is killed: all end soon; --resume gives the undisturbed run."""
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29713",
        "--",
    )
    line = SCRIPTS["train, DPT"].replace("--steps 300", "--steps 120")
    want = campaign.home / "whole-torchrun"
    if ended(start(line, want, *launcher)) != 0:
        campaign.table.note("processes", (want / "err.log").read_text()[-300:])
        return
    for victim in (0, 1):
        place = campaign.home / f"torchrun-{victim}"
        process, path = start(line, place, *launcher), place / "run" / checkpoint.FILE
        while not path.exists() and process.poll() is None:
            time.sleep(0.05)
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                said = environ.read_bytes().split(b"\0")
            except OSError:
                continue
            if f"{MARK}={place}".encode() in said and f"LOCAL_RANK={victim}".encode() in said:
                os.kill(int(environ.parent.name), signal.SIGKILL)
        before, code = time.monotonic(), ended(process, 60)
        seconds, problem = time.monotonic() - before, None
        errors = (place / "err.log").read_text().count("error: another process of this run")
        if code in (0, None) or seconds > 30 or orphans(place, 5):
            problem = f"it ended with {code} after {seconds:.0f} s"
        elif errors > 1:
            problem = f"{errors} lines of error"
        elif ended(start(line, place, *launcher)) != 0:
            problem = (place / "err.log").read_text()[-300:]
        campaign.table.note("processes: one of two killed", problem or difference(place, want))


# ------------------------------------------------------------------------------------- damage
Reader = Callable[[], Any]  # reads a file as the project does; what it gives must not change


def readers(campaign: Campaign) -> dict[Path, tuple[str, Reader]]:
    """Every kind of file that is read again, copied to where it may be damaged."""
    place = campaign.home / "damaged"
    shutil.copytree(campaign.whole("train, DPT") / "run", place / "run")
    shutil.copytree(campaign.home / "data", place / "rule")
    shutil.copytree(campaign.whole("collect, SAC, 1 worker") / "data", place / "robots")
    run, rule = place / "run", next((place / "rule").glob("darkroom*"))
    seen = checkpoint.read(run)[1]
    found: dict[Path, tuple[str, Reader]] = {
        run / "config.json": ("config.json", lambda: played(run)),
        run / checkpoint.FILE: (checkpoint.FILE, lambda: played(run)),
        run / "train.csv": ("train.csv", lambda: Log(run, seen.step, seen.rows).rows),
        rule / "meta.json": ("meta.json", lambda: data_of(rule)),
        rule / "task-002.npz": ("task-002.npz", lambda: data_of(rule)),
    }
    cfg, _ = parse_collection([*ROBOTS.split()])
    cfg = replace(cfg, data=replace(cfg.data, datasets=str(place / "robots")))
    meta = read_json(next((place / "robots").glob("point*")) / "meta.json")
    folder = next((place / "robots" / "teachers").glob("*"))
    tasks = meta["train_tasks"] + meta["test_tasks"]
    group = groups_of("point-robot", cfg.teachers, tasks, folder)[1]
    step = Path(group.folder) / "step-0000000400.safetensors"
    found[step] = ("step file of teachers", lambda: plain(read_policies(step)[1]))
    found[Path(group.folder) / "levels.npz"] = ("levels.npz", lambda: plain(load_levels(group)))
    # a small state.safetensors, as training leaves it when it is stopped
    agents = StackedSAC(2, 2, 2, SACConfig(800, 40, 40, hidden=16), seed=0)
    save_state(place, "sac-state", agents.tensors(), 40, STATE_SETTINGS)
    found[place / STATE] = ("state of teachers", lambda: state_of(place))
    return found


def state_of(place: Path) -> Any:
    tensors, step = read_state(place, "sac-state", STATE_SETTINGS)
    return plain(tensors), step


def plain(arrays: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Numbers of any kind, to be compared."""
    numbers = {k: v.detach() if torch.is_tensor(v) else v for k, v in arrays.items()}
    return [(name, np.asarray(numbers[name]).tobytes()) for name in sorted(numbers)]


def played(run: Path) -> Any:
    """All that evaluate.py and --resume take from a run."""
    cfg: Config = checkpoint.load_config(run)
    cfg = replace(cfg, run=replace(cfg.run, run=None))  # the checkpoint's copy does not say where
    split = checkpoint.read_tasks(run, cfg.data.env)
    method, header = checkpoint.load_method(run, torch.device("cpu"))
    return cfg, split, header, plain(method.model.state_dict()), plain(checkpoint.read(run)[0])


def data_of(folder: Path) -> Any:
    data = load_dataset(folder)
    arrays = {
        name: getattr(data, name) for name in ("states", "actions", "rewards", "query_states")
    }
    return data.meta, plain(arrays | {"query_actions": data.query_actions})


def damage(campaign: Campaign, flips: int, cuts: int) -> None:
    """Single bits, then lengths: refused in one line, or the same content in spite of it."""
    kinds = readers(campaign)
    whole = {path: (path.read_bytes(), read()) for path, (_, read) in kinds.items()}
    paths, rng = list(kinds), np.random.default_rng([campaign.seed, 2])
    for i in progress(range(flips + cuts), desc="damage", unit="file"):
        path = paths[i % len(paths)]
        (name, read), (blob, want) = kinds[path], whole[path]
        if i < flips:
            place = int(rng.integers(len(blob)))
            if i % 3 == 0:  # headers are short, and say most
                place = int(rng.integers(min(len(blob), 400)))
            flipped = bytes([blob[place] ^ (1 << int(rng.integers(8)))])
            path.write_bytes(blob[:place] + flipped + blob[place + 1 :])
            what = f"flips: {name}"
        else:
            path.write_bytes(blob[: int(rng.integers(len(blob)))])
            what = f"cuts: {name}"
        problem = None
        try:
            if repr(read()) != repr(want):
                problem = f"accepted with other content ({path}, {what} {i})"
        except (ValueError, OSError) as error:
            problem = f"two lines: {error}" if "\n" in str(error) else None
        except Exception as error:  # what a user would see as a traceback
            problem = f"{error!r:.200}"
        campaign.table.note(what, problem)
        path.write_bytes(blob)


# ------------------------------------------------------------------------------------ the command
def main(
    minutes: float = 10, seed: int = 0, kills: int = 200, flips: int = 500, cuts: int = 200,
    pairs: int = 30, keep: bool = False,
) -> None:  # fmt: skip
    """Torture this copy of the project; needs Linux and the test extras.

    Args:
        minutes: pairs and kills that have not begun by then are left out.
        seed: of the moments, bits and lengths.
        kills: kill -9 of commands, in all.
        flips: single bits, spread over every kind of file.
        cuts: truncations.
        pairs: of commands that begin at the same moment.
        keep: leave the temporary folder, whose name is printed.
    """
    if not minutes > 0 or min(kills, flips, cuts, pairs) < 0:
        raise ValueError("--minutes must be positive, and counts not negative")
    home = Path(tempfile.mkdtemp(prefix="t2mir-torture-"))
    try:
        campaign = Campaign(home, seed, time.monotonic() + 60 * minutes)
        (home / "goals.json").write_text(json.dumps(GOALS))
        print(f"in {home}")
        for name in SCRIPTS:  # quick ones first: training reads what was collected
            campaign.undisturbed(name)
            if name == "collect, a rule":  # the data of all runs
                line = f"collect.py {GOAL_DATA} data".replace("../goals", "goals")
                if ended(start(line, home)) != 0:
                    raise ValueError((home / "err.log").read_text())
        damage(campaign, flips, cuts)
        torchrun(campaign)
        both = ["train, AD", "collect, SAC, 2 workers", "train, DPT", "collect, a rule"]
        for i in progress(range(pairs), desc="pairs", unit="pair"):
            if not campaign.over():
                campaign.pair(both[i % len(both)], i)
        names, number, done = list(SCRIPTS), 0, 0
        with (
            ThreadPoolExecutor(2) as pool,  # two commands at a time, as the machine has two cores
            progress(total=kills, desc="kills", unit="kill") as bar,
        ):
            while done < kills and not campaign.over():
                jobs = [(names[(number + i) % len(names)], number + i) for i in range(2)]
                number += 2
                done += sum(pool.map(lambda job: campaign.kill(*job), jobs))
                bar.update(done - bar.n)
        print(campaign.table.text())
    finally:
        if not keep:
            shutil.rmtree(home, ignore_errors=True)
    if campaign.table.wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    one_line(lambda: tyro.cli(main), "nothing is left of it")
