"""runs.py: finished runs as figures.py reads them.

in : folders          out: `Run`s of one family, and lines of runs that differ in the seed alone
Read beside figures.py. Nothing of the paper is here.

Shapes: S seeds, N tasks, E episodes, M trajectories.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
import torch
import tyro

from collect import dataset_folder
from config import Count, Text
from data import Dataset, load_dataset
from evaluate import Evaluation, variant
from methods import Method
from pictures.curves import read_returns
from pictures.routers import Seen, fresh, look
from support import checkpoint
from support.settings import counting

# in which runs of one line may differ: seeds, and for how long each was played
OF_ONE_LINE = ("seed", "play_seed", "episodes")
HALVES = ("token", "task")  # the two MoEs


class LeftOut(ValueError):
    """These runs do not make this figure; the message says why."""


@dataclass(frozen=True)
class Figures:
    """Draw the paper's figures from finished runs of one family."""

    runs: tyro.conf.Positional[tuple[Text, ...]] = ()
    """Folders of runs, runs/..."""
    only: Text | None = None
    """One of them: figure1, figure3, ..., router_health, page."""
    out: Text | None = None
    """Folder of the pictures (default: figures/ beside the first run)."""
    data: Text | None = None
    """figure7: the dataset of all runs (default: each run's own)."""
    tasks: Count = 24
    """figure1, 12, 13: how many tasks are played, held-out ones first."""
    plays: Count = 5
    """figure1, 12, 13: how often each is played; a trajectory a play."""
    prompts: Count = 128
    """figure7: prompts of each half of a group."""
    env: Text | None = None
    """The runs' family where it is a file of your own."""
    backbone: Text | None = None
    """The method's file, of those runs whose method is one of your own."""


@dataclass
class Run:
    """A finished run, and what figures ask of it."""

    folder: Path
    method: Method
    split: checkpoint.TaskSplit
    settings: Figures

    @property
    def name(self) -> str:
        """Its folder's; with as many folders above it as tell it from the other runs' names."""
        place = self.folder.resolve()
        others = {Path(run).resolve() for run in self.settings.runs} - {place}
        n = next(n for n in count(1) if all(p.parts[-n:] != place.parts[-n:] for p in others))
        return "-".join(place.parts[-n:])

    @cached_property
    def tasks(self) -> list:
        """Those that are played: held-out ones, then trained ones."""
        return [*self.split.test, *self.split.train][: self.settings.tasks]

    @cached_property
    def seen(self) -> tuple[Seen, np.ndarray]:
        """What its routers make of fresh trajectories, and the task of each, (M,): played once."""
        tau, task = fresh(self.method, self.tasks, self.settings.plays)
        return look(self.method, tau), task

    def returns(self) -> tuple[list[str], np.ndarray]:
        """Held-out tasks and returns (N, E) of the evaluation as training ended with it."""
        own = f"test-{variant(self.method, Evaluation('', play=self.method.cfg.play))}.csv"
        if not (self.folder / own).exists():
            raise LeftOut(f"{self.folder} has no {own}: python evaluate.py {self.folder}")
        return read_returns(self.folder / own)

    def log(self) -> list[dict[str, float]]:
        """The rows of train.csv without empty cells; none where it is gone. Raises LeftOut for a
        damaged one.
        """
        path = self.folder / "train.csv"
        if not path.exists():
            return []
        damaged = LeftOut(f"{path} is damaged: its rows are not those of a training")
        try:
            with open(path, newline="") as file:
                rows = [
                    {name: float(cell) for name, cell in row.items() if cell != ""}
                    for row in csv.DictReader(file)
                ]
        except (TypeError, ValueError, csv.Error):  # a TypeError: too few cells, or too many
            raise damaged from None
        if not all(row.get("step", math.nan).is_integer() for row in rows):
            raise damaged
        return rows

    def dataset(self) -> Dataset:
        """What it was trained on. Raises LeftOut where that is not there."""
        cfg = self.method.cfg
        folder = self.settings.data or cfg.training.data or dataset_folder(cfg.collection)
        if not (Path(folder) / "meta.json").exists():
            if self.settings.data:
                raise LeftOut(f"there is no dataset in {folder}")
            raise LeftOut(f"{self.folder} was trained on {folder}: not here; name it with --data")
        return load_dataset(folder, cfg.data.env)

    def line(self) -> dict[str, object]:
        """All settings that make it another line in a figure, also those of how it plays."""
        settings = dict(counting(self.method.cfg, "work", "run"))
        return {name: value for name, value in settings.items() if name not in OF_ONE_LINE}


def open_runs(settings: Figures) -> list[Run]:
    """The runs, read. Raises ValueError with one line for a folder that is no run, a run that is
    not finished, for runs of different families, and for one that is there twice.
    """
    if not settings.runs:
        raise ValueError("name the runs first: python figures.py runs/... runs/...")
    runs: list[Run] = []
    for place in settings.runs:
        files = {"env": settings.env, "backbone": method_of(place, settings.backbone)}
        method, header = checkpoint.load_method(place, torch.device("cpu"), **files)
        steps = method.cfg.training.steps
        if header.step < steps:
            done = f"{header.step} of {steps} steps"
            raise ValueError(f"{place} is not finished ({done}): train.py --resume goes on")
        split = checkpoint.read_tasks(place, method.cfg.data.env)
        run = Run(Path(place), method, split, settings)
        for other in runs:
            env, known = method.cfg.data.env, other.method.cfg.data.env
            if env != known:
                raise ValueError(
                    f"{other.folder} is of {known}, {place} of {env}: draw one family at a time"
                )
            if run.line() == other.line() and method.cfg.seed == other.method.cfg.seed:
                raise ValueError(  # it would count as another seed
                    f"{other.folder} and {place} have equal settings and the same seed: name one"
                )
        runs.append(run)
    if settings.backbone not in (None, *(run.method.cfg.backbone for run in runs)):
        raise ValueError(f"--backbone {settings.backbone}: none of these runs is of it")
    return runs


def method_of(place: str, given: str | None) -> str | None:
    """What of --backbone a run is told: a method's file is not for runs of T2MIR beside it."""
    own = checkpoint.read_run(place)["settings"].get("backbone")
    built_in = isinstance(own, str) and not own.endswith(".py")
    return None if given and given.endswith(".py") and built_in else given


@dataclass
class Drawn:
    """A figure that was made: stem.png, stem.pdf, stem.csv, and what stands below it."""

    stem: Path
    caption: str


def lines_of(runs: list[Run]) -> list[tuple[str, list[Run]]]:
    """Runs of equal settings but for the seed together, and a name for each such line.

    Its name is the method's, and the settings in which it differs from other lines of its backbone.
    """
    groups: list[list[Run]] = []
    for run in runs:
        known = [group for group in groups if group[0].line() == run.line()]
        known[0].append(run) if known else groups.append([run])
    named = []
    for group in groups:
        name, own = group[0].method.label, group[0].line()
        halves = [half for half in HALVES if own.get("moe", "both") not in (half, "both")]
        absent = {f"{half}_{size}" for half in halves for size in ("experts", "hidden", "top_k")}
        differ = set()
        for other in (g[0] for g in groups if g[0].line()["backbone"] == own["backbone"]):
            line = other.line()
            unlike = {k for k in own if own[k] != line.get(k)}
            if other.method.label != name:
                # methods of different names are those that `moe` chooses: said already, and the
                # size of a half that this one does not have says nothing of it
                unlike -= {"moe", *absent}
            differ |= unlike
        said = ", ".join(f"{k} {own[k]}" for k in own if k in differ)
        named.append((f"{name} ({said})" if said else name, group))
    return named


def stacked(group: list[Run]) -> np.ndarray:
    """(S, N, E) of the runs of a line: the same tasks, as many episodes as all have."""
    found = [run.returns() for run in group]
    for run, (names, _) in zip(group, found, strict=True):
        if names != found[0][0]:
            raise ValueError(f"{run.folder} was evaluated on other tasks than {group[0].folder}")
    episodes = min(returns.shape[1] for _, returns in found)
    return np.stack([returns[:, :episodes] for _, returns in found])
