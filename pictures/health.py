"""health.py: the routers of runs over training: do all experts have work, are tasks told apart?

in : finished runs with experts          out: stem.png, .pdf, .csv
Read beside diagnostics.py, which says what the columns of train.csv are, and figures.py. The paper
has no such figure.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

from diagnostics import chance
from pictures.curves import pyplot, save
from pictures.runs import Drawn, LeftOut, Run

HEALTH = {  # a panel: its title, the columns of train.csv that it shows
    "load of each token expert": ("token_load",),  # token_load_1, token_load_2, ...
    "load of each task expert": ("task_load",),
    "least used expert's share": ("token_least", "task_least"),
    "entropy of the loads, bits": ("token_entropy", "task_entropy"),
    "I(token expert; modality), bits": ("token_mi",),
    "accuracy of Eq. 7": ("accuracy", "accuracy_fresh"),
    "loss of Eq. 7, nats": ("info_nce", "contrastive_fresh"),
}
STYLES = (("-", ":"), ("--", "-."))  # of a panel's columns, and of the level of each


def series(rows: list[dict[str, float]], name: str) -> dict[str, list[tuple[int, float]]]:
    """{column: its (step, value)s} of a name in HEALTH; none where the file does not have it."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for column in row:
            if re.fullmatch(rf"{name}(_\d+)?", column):
                found.setdefault(column, []).append((int(row["step"]), row[column]))
    return found


def levels(run: Run, rows: list[dict[str, float]]) -> dict[str, tuple[str, float]]:
    """{name in HEALTH: its value where all experts are used alike, or Eq. 7 knows nothing, in words
    and as a number}.
    """
    found = {}
    for which in ("token", "task"):
        k = getattr(run.method.cfg.model, f"{which}_experts")
        found[f"{which}_load"] = ("1/K", 1 / k)
        found[f"{which}_least"] = (f"1/K of {which} experts", 1 / k)
        found[f"{which}_entropy"] = (f"log2 K of {which} experts", math.log2(k))
    # a batch and fresh draws are of different sizes: another chance, another loss at it
    fresh = next((row["chance"] for row in rows if "chance" in row), 0.0)
    for ending, loss, of, share in (
        ("", "info_nce", "in a batch", chance_in_a_batch(run)),
        ("_fresh", "contrastive_fresh", "on fresh draws", fresh),
    ):
        if share > 0:  # 0: no task is drawn twice
            found[f"accuracy{ending}"] = (f"chance {of}", share)
            found[loss] = (f"chance {of}", -math.log(share))
    return found


def chance_in_a_batch(run: Run) -> float:
    """Of a query of Eq. 7 in training, in one process."""
    training = run.method.cfg.training
    # rows of a task: a batch with more tasks than there are begins a new round of them
    alike = max(training.draws, training.batch / len(run.split.train))
    return chance(run.method.cfg.model.keys, training.batch, alike)


def draw_health(runs: list[Run], stem: Path) -> Drawn:
    """A panel for each entry of HEALTH that one of the runs has numbers of: what older files lack
    is left out.
    """
    table, plt = [], pyplot()
    logs = [run.log() for run in runs]
    known = [levels(run, rows) for run, rows in zip(runs, logs, strict=True)]
    panels = {
        title: [[series(rows, name) for name in names] for rows in logs]
        for title, names in HEALTH.items()
    }
    panels = {title: of for title, of in panels.items() if any(map(any, of))}
    if not panels:
        raise LeftOut("train.csv of these runs knows nothing of routers")
    key: Any = partial(plt.Line2D, [], [])  # an entry of a legend
    wide = max(2, math.ceil(len(panels) / 2))
    figure, axes = plt.subplots(2, wide, figsize=(4.2 * wide, 7), layout="constrained")
    for axis, (title, of) in zip(axes.flat, panels.items(), strict=False):
        keys = {}  # of the legend: a column is a style, a run is a colour
        for number, (run, level_of, here) in enumerate(zip(runs, known, of, strict=True)):
            for name, columns, (style, level) in zip(HEALTH[title], here, STYLES, strict=False):
                for column, points in columns.items():
                    axis.plot(*zip(*points, strict=True), linestyle=style, color=f"C{number}")
                    keys[name] = key(linestyle=style, color="black", label=name)
                    about = {"run": run.name, "column": column}
                    table += [about | {"step": step, "value": value} for step, value in points]
                if columns and name in level_of:
                    said, value = level_of[name]
                    about = {"run": run.name, "column": f"{name} at {said}"}
                    table.append(about | {"step": "", "value": value})
                    axis.axhline(value, linestyle=level, color="gray", linewidth=1)
                    keys[said] = key(linestyle=level, color="gray", linewidth=1, label=said)
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=0)
        axis.legend(handles=list(keys.values()), fontsize=6)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    colours = [key(color=f"C{n}", label=run.name) for n, run in enumerate(runs)]
    figure.legend(handles=colours, loc="outside lower center", fontsize=7, ncols=2)
    save(figure, stem, table)
    return Drawn(
        stem, "Columns of train.csv; those that end in _fresh: on new draws of the training data."
    )
