"""compare.py: from evaluations to a table: means, intervals, paired differences (Tables 1, 6-11).

in : the CSVs that evaluate.py wrote, and their records (experiments/runs.py)
out: rows, as table.csv and table.md
Read beside reproduce.py.

A task's score is the mean return of the last five episodes, over its repeats: what was learnt in
context, and no maximum. `best`, the highest point of the mean curve, is what the paper's tables
have; it is a little too high, the more so the fewer tasks there are.

All seeds play the same held-out tasks, so scores are a matrix, seeds x tasks, and both are samples:
of trainings and of tasks, and `interval` is over both (pictures/curves.py). Seeds alone, as in the
paper, would say nothing of other tasks; all scores in one heap would take a task that is hard for
every seed for so many independent draws.

Shapes: S seeds, N tasks, E episodes, R repeats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluate import LAST, normalised
from experiments.runs import read_record
from pictures import curves
from pictures.curves import as_csv, read_returns
from support.files import write_atomically

# fmt: off
COLUMNS = (
    "env", "backbone", "group", "variant", "paper", "paper_pm", "mean", "low", "high", "best",
    "random", "optimum", "teacher", "share", "difference", "difference_low", "difference_high",
    "difference_seeds", "seeds", "tasks", "repeats", "steps", "train_seconds",
)
# fmt: on


# --------------------------------------------------------------------------------------- statistics
def interval(scores: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of (S, N) scores; NaN where there is one score."""
    if scores.size < 2:
        return math.nan, math.nan
    low, high = curves.interval(scores[..., None])
    return low.item(), high.item()


def paired(ours: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """Mean of `ours` - `others`, both (S, N) of the same seeds and tasks, and its 95 % interval.

    What a seed or a task adds to both cancels: far narrower than the two intervals beside it.
    """
    difference = ours - others
    return float(difference.mean()), *interval(difference)


# ------------------------------------------------------------------------------------- what was run
@dataclass
class Cell:
    """A row to be: which runs, and the paper's number."""

    env: str
    backbone: str
    group: str
    variant: str
    paper: tuple[float, float] | None
    records: dict[int, Path] = field(default_factory=dict)  # of each seed that is finished


@dataclass
class Runs:
    """What the runs of a cell have returned."""

    seeds: list[int]
    tasks: list[str]
    returns: np.ndarray  # (S, N, E), means over repeats
    records: list[dict[str, Any]]

    @property
    def scores(self) -> np.ndarray:
        """(S, N)"""
        return self.returns[..., -LAST:].mean(-1)


def read_runs(records: dict[int, Path]) -> Runs:
    """The evaluations that the records of some seeds name. Raises ValueError with one line."""
    known = {seed: read_record(path) for seed, path in sorted(records.items())}
    read = [read_returns(records[seed].parent / known[seed]["csv"]) for seed in known]
    tasks, returns = read[0]
    for seed, (names, curve) in zip(known, read, strict=True):
        if names != tasks or curve.shape != returns.shape:
            raise ValueError(f"{records[seed]}: another seed has played other tasks or episodes")
    return Runs(list(known), tasks, np.stack([curve for _, curve in read]), list(known.values()))


# -------------------------------------------------------------------------------------------- rows
def make_rows(cells: list[Cell]) -> list[dict[str, Any]]:
    """A row of COLUMNS for each cell that has a finished run; None where nothing is known.

    Each is compared with the first row of its family, backbone and group. Raises ValueError.
    """
    rows, first = [], {}
    for cell in cells:
        if cell.records:
            runs = read_runs(cell.records)
            first_runs = first.setdefault((cell.env, cell.backbone, cell.group), runs)
            rows.append(_row(cell, runs, first_runs))
    return rows


def _row(cell: Cell, runs: Runs, first: Runs) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [record[name] for record in runs.records]
        return None if None in values else float(np.mean(values))

    paper, pm = cell.paper or (None, None)
    random, optimum, teacher = map(mean, ("random_return", "optimum", "teacher_return"))
    score, best = float(runs.scores.mean()), optimum if optimum is not None else teacher
    share = None
    if random is not None and best is not None and random != best:
        share = normalised(score, random, best)
    values: list[Any] = [
        cell.env, Path(cell.backbone).stem, cell.group, cell.variant, paper, pm,
        score, *interval(runs.scores), float(runs.returns.mean((0, 1)).max()),
        random, optimum, teacher, share,
        *_difference(runs, first),
        " ".join(map(str, runs.seeds)), len(runs.tasks), runs.records[0]["repeats"],
        runs.records[0]["steps"], mean("train_seconds"),
    ]  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _difference(runs: Runs, first: Runs) -> tuple[float | None, float | None, float | None, str]:
    """To the first row, its interval and the seeds that both have; None where there are none."""
    both = [seed for seed in runs.seeds if seed in first.seeds]
    if runs is first or runs.tasks != first.tasks or not both:
        return None, None, None, ""
    ours, others = (r.scores[[r.seeds.index(seed) for seed in both]] for r in (runs, first))
    return *paired(ours, others), " ".join(map(str, both))


# ------------------------------------------------------------------------------------------- files
def as_markdown(rows: list[dict[str, Any]], title: str) -> str:
    """table.md: what a reader compares."""
    head = ["family", "backbone", "variant", "paper", f"ours, last {LAST} [95 %]", "best", "share"]
    head += ["difference [95 %]", "seeds", "steps", "training"]
    lines = [
        f"# {title}",
        "",
        f"Mean return of the last {LAST} episodes on held-out tasks; *best* is the highest mean of "
        "any one episode, as in the paper. *Share*: of the way from the random policy to the "
        "optimum or, where none is known, to the tasks' own teachers (t). *Difference*: to the "
        "first row of the family, backbone and group, paired over tasks and the seeds that both "
        "have, named where they are not the row's. Intervals: 95 %, over seeds and tasks; of one "
        "seed, over tasks alone.",
        "",
        f"| {' | '.join(head)} |",
        "|" + " --- |" * len(head),
    ]
    for row in rows:
        pm = "" if row["paper_pm"] is None else f" ± {row['paper_pm']:.1f}"
        of = "" if row["optimum"] is not None else " (t)"
        variant = ", ".join(filter(None, (row["group"], row["variant"])))
        value, low, high = (row[f"difference{end}"] for end in ("", "_low", "_high"))
        difference = _with_interval(value, low, high, "+")
        if row["difference_seeds"] not in ("", row["seeds"]):
            difference += f", of {row['difference_seeds']}"
        cells = [
            row["env"],
            row["backbone"],
            variant,
            "" if row["paper"] is None else f"{row['paper']:.1f}{pm}",
            _with_interval(row["mean"], row["low"], row["high"]),
            f"{row['best']:.2f}",
            "" if row["share"] is None else f"{round(100 * row['share'])} %{of}",
            difference,
            row["seeds"],
            str(row["steps"]),
            f"{row['train_seconds'] / 60:.1f} min",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_interval(value: float | None, low: float, high: float, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def check_table(folder: Path, title: str) -> None:
    """A folder holds one table: of one experiment, preset and --set.

    Raises ValueError with one line where this one would take another's place.
    """
    try:
        found = (folder / "table.md").read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return
    if sorted(found.split()) != sorted(f"# {title}".split()):  # the order of --set says nothing
        raise ValueError(f"{folder} has a table already ({found[2:]}): name another --results")


def write_table(folder: Path, rows: list[dict[str, Any]], title: str) -> None:
    """table.csv and table.md, each the old one or the whole new one."""
    for name, text in (("table.csv", as_csv(rows)), ("table.md", as_markdown(rows, title))):
        write_atomically(folder / name, lambda path, text=text: path.write_text(text))
