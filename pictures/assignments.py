"""assignments.py: the picture of Fig. 1 and 12, one run's: who goes to which expert.

in : a finished run          out: stem.png, .pdf, .csv (the points), stem-numbers.csv
Read beside figures.py; what is embedded says routers.py, what is counted numbers.py.

Shapes: M trajectories, S tokens each, N tasks, K experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pictures.colours import colour_of_tasks, draw_key, points
from pictures.curves import pyplot, save, write_table
from pictures.numbers import compared, entropy, in_words, information, rank_correlation, silhouette
from pictures.routers import TasksSeen, TokensSeen
from pictures.runs import Drawn, Run

MODALITIES = ("state", "action", "reward")


def draw_assignments(run: Run, stem: Path) -> Drawn:
    """Tokens by modality and by expert, trajectories by task: those of them that the run has.

    Beside stem.csv, whose points are drawn, stem-numbers.csv has the numbers of the caption.
    """
    seen, task = run.seen
    panels = 2 * (seen.tokens is not None) + (seen.tasks is not None)
    form = {"figsize": (4.6 * panels, 5.4), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot().subplots(1, panels, **form)
    axes, table, rows = list(axes[0]), [], []
    if seen.tokens is not None:
        table += draw_tokens(axes[:2], seen.tokens)
        rows += token_numbers(seen.tokens)
    if seen.tasks is not None:
        table += draw_trajectories(figure, axes[-1], seen.tasks, task, run)
        rows += task_numbers(seen.tasks, task, np.asarray(run.tasks, float))
    caption = in_words(rows)
    figure.suptitle(f"{run.method.family.name}, {run.method.label} ({run.name})", fontsize=11)
    figure.supxlabel(caption, fontsize=8)
    save(figure, stem, table)
    write_table(stem.with_name(f"{stem.name}-numbers.csv"), rows)
    return Drawn(stem, caption)


def draw_tokens(axes: list, seen: TokensSeen, each: int = 150) -> list[dict]:
    """The same points twice; the rows of the CSV. A sample, `each` of every modality, always the
    same ones: all of them would be a blot, and take hours. The numbers are of all.
    """
    rng = np.random.default_rng(0)
    modality = np.tile(seen.modality, len(seen.expert))  # (M*S,)
    found = [np.flatnonzero(modality == m) for m in range(len(MODALITIES))]
    which = np.concatenate([rng.permutation(places)[:each] for places in found])
    modality, expert = modality[which], seen.expert.ravel()[which]
    at = points(seen.logits.reshape(-1, seen.logits.shape[-1])[which])
    experts = tuple(f"expert {i + 1}" for i in range(seen.logits.shape[-1]))
    scatter(axes[0], at, modality, MODALITIES, "tokens by modality")
    scatter(axes[1], at, expert, experts, "tokens by expert")
    empty = {"task": "", "split": ""}
    return [
        {"of": "token", "x": x, "y": y, "modality": MODALITIES[m], "expert": e + 1} | empty
        for (x, y), m, e in zip(at.tolist(), modality, expert.tolist(), strict=True)
    ]


def scatter(axis: Any, at: np.ndarray, kind: np.ndarray, names: tuple, title: str) -> None:
    colours = pyplot().get_cmap("tab10" if len(names) <= 10 else "tab20")
    for i, name in enumerate(names):
        if (kind == i).any():
            axis.scatter(*at[kind == i].T, s=9, color=colours(i % colours.N), label=name)
    axis.set(title=title, xticks=[], yticks=[])
    axis.legend(fontsize=7, markerscale=2)


def draw_trajectories(
    figure: Any, axis: Any, seen: TasksSeen, task: np.ndarray, run: Run
) -> list[dict]:
    """z of M trajectories, in the colours of their tasks; the rows of the CSV."""
    tasks, at = np.asarray(run.tasks, float), points(seen.z)
    split = np.where(task < len(run.split.test), "test", "train")
    for kind, marker, name in (("test", "o", "held-out"), ("train", "x", "trained on")):
        if (split == kind).any():
            colour = colour_of_tasks(tasks)[task[split == kind]]
            axis.scatter(*at[split == kind].T, c=colour, marker=marker, s=16, label=name)
    axis.set(title="trajectories by task", xticks=[], yticks=[])
    axis.legend(fontsize=7)
    draw_key(figure, axis, tasks)
    empty = {"of": "trajectory", "modality": ""}
    return [
        empty
        | {"x": x, "y": y, "expert": e + 1, "split": str(s)}
        | {"task": " ".join(f"{v:g}" for v in run.tasks[t][:3])}  # of 65 numbers the first ones
        for (x, y), t, e, s in zip(at.tolist(), task, seen.expert.tolist(), split, strict=True)
    ]


# -------------------------------------------------------------------------------------- the numbers
def token_numbers(seen: TokensSeen) -> list[dict]:
    """The row of all M*S tokens."""
    modality = np.tile(seen.modality, len(seen.expert))
    name = "I(token expert; modality), bits"
    untrained = [experts.ravel() for experts in seen.untrained]
    most = entropy(modality)
    return [
        compared(name, lambda e: information(e, modality), seen.expert.ravel(), untrained, most)
    ]


def task_numbers(seen: TasksSeen, task: np.ndarray, tasks: np.ndarray) -> list[dict]:
    """The rows of M trajectories, of tasks (N, numbers)."""
    span = np.ptp(tasks, axis=0)
    places = tasks / np.where(span, span, 1)  # every number of a task counts alike
    most = min(entropy(task), float(np.log2(seen.z.shape[1])))
    name, experts = "I(task expert; task), bits", [z.argmax(-1) for z in seen.untrained]
    rows = [compared(name, lambda e: information(e, task), seen.expert, experts, most)]
    for name, number in (
        ("silhouette of router logits by task", lambda z: silhouette(z, task)),
        ("rank correlation of distances", lambda z: rank_correlation(z, task, places)),
    ):
        rows.append(compared(name, number, seen.z, seen.untrained, 1.0))
    return rows
