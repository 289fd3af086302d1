"""assignments.py: the picture of Fig. 1 and 12, one run's: who goes to which expert.

in : a finished run          out: stem.png, .pdf, .csv (the points), stem-numbers.csv
Read beside figures.py; what is embedded says routers.py, what is counted numbers.py.

Shapes: M trajectories, S tokens each, N tasks, K experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pictures.colours import colour_of_tasks, draw_key, points
from pictures.curves import pyplot, save, write_table
from pictures.numbers import compared, entropy, in_words, information, rank_correlation, silhouette
from pictures.routers import Seen
from pictures.runs import Drawn, Run

MODALITIES = ("state", "action", "reward")


def draw_assignments(run: Run, stem: Path) -> Drawn:
    """One run's picture. Tokens are a sample, as many of each modality: thousands would be a blot;
    the numbers are of all of them. Beside stem.csv (the points), stem-numbers.csv.
    """
    seen, task = run.seen
    tasks = np.asarray(run.tasks, float)
    panels = (2 if seen.token_logits is not None else 0) + (seen.z is not None)
    plt = pyplot()
    size = (4.6 * panels, 5.4)
    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    axes, table, rows = list(axes[0]), [], []
    if seen.token_logits is not None:
        which = sample_of_tokens(seen)
        logits = seen.token_logits.reshape(-1, seen.token_logits.shape[-1])[which]
        at, expert = points(logits), seen.token_expert.ravel()[which]
        modality = np.tile(seen.modality, len(task))[which]
        scatter(axes.pop(0), at, modality, MODALITIES, "tokens by modality")
        experts = [f"expert {i + 1}" for i in range(logits.shape[1])]
        scatter(axes.pop(0), at, expert, experts, "tokens by expert")
        for (x, y), m, e in zip(at.tolist(), modality, expert.tolist(), strict=True):
            table.append({"of": "token", "x": x, "y": y, "modality": MODALITIES[m]})
            table[-1] |= {"expert": e + 1, "task": "", "split": ""}
    if seen.z is not None:
        axis, at, held_out = axes.pop(0), points(seen.z), task < len(run.split.test)
        colour = colour_of_tasks(tasks)[task]
        for is_test, marker in ((True, "o"), (False, "x")):
            rest = {"marker": marker, "s": 16, "label": "held-out" if is_test else "trained on"}
            if (held_out == is_test).any():
                axis.scatter(*at[held_out == is_test].T, c=colour[held_out == is_test], **rest)
        axis.set(title="trajectories by task", xticks=[], yticks=[])
        axis.legend(fontsize=7)
        draw_key(figure, axis, tasks)
        for (x, y), t, e in zip(at.tolist(), task, seen.task_expert.tolist(), strict=True):
            said = " ".join(f"{v:g}" for v in run.tasks[t][:3])  # of 65 numbers the first ones
            table.append({"of": "trajectory", "x": x, "y": y, "modality": "", "expert": e + 1})
            table[-1] |= {"task": said, "split": "test" if t < len(run.split.test) else "train"}
    rows = routing_numbers(seen, task, tasks)
    caption = in_words(rows)
    figure.suptitle(f"{run.method.family.name}, {run.method.label} ({run.name})", fontsize=11)
    figure.supxlabel(caption, fontsize=8)
    save(figure, stem, table)
    write_table(stem.with_name(f"{stem.name}-numbers.csv"), rows)
    return Drawn(stem, caption)


def sample_of_tokens(seen: Seen, each: int = 150) -> np.ndarray:
    """Places in the M*S tokens: up to `each` of every modality, always the same ones."""
    rng, rows = np.random.default_rng(0), len(seen.token_expert)
    modality = np.tile(seen.modality, rows)
    found = [np.flatnonzero(modality == m) for m in range(3)]
    return np.concatenate([rng.permutation(places)[:each] for places in found])


def scatter(axis, at: np.ndarray, kind: np.ndarray, names, title: str) -> None:
    colours = pyplot().get_cmap("tab10" if len(names) <= 10 else "tab20")
    for i, name in enumerate(names):
        if (kind == i).any():
            axis.scatter(*at[kind == i].T, s=9, color=colours(i % colours.N), label=name)
    axis.set(title=title, xticks=[], yticks=[])
    axis.legend(fontsize=7, markerscale=2)


def routing_numbers(seen: Seen, task: np.ndarray, tasks: np.ndarray) -> list[dict]:
    """The rows of pictures/numbers.py for what was seen of M trajectories of tasks (N, numbers)."""
    rows = []
    if seen.token_expert is not None:
        modality = np.tile(seen.modality, len(task))
        rows.append(
            compared(
                "I(token expert; modality), bits",
                lambda experts: information(experts, modality),
                seen.token_expert.ravel(),
                [experts.ravel() for experts in seen.untrained_token],
                entropy(modality),
            )
        )
    if seen.z is not None:
        span = np.ptp(tasks, axis=0)
        places = tasks / np.where(span, span, 1)  # every number of a task counts alike
        rows.append(
            compared(
                "I(task expert; task), bits",
                lambda experts: information(experts, task),
                seen.task_expert,
                [z.argmax(-1) for z in seen.untrained_z],
                min(entropy(task), np.log2(seen.z.shape[1])),
            )
        )
        for name, number in (
            ("silhouette of router logits by task", lambda z: silhouette(z, task)),
            ("rank correlation of distances", lambda z: rank_correlation(z, task, places)),
        ):
            rows.append(compared(name, number, seen.z, seen.untrained_z, 1.0))
    return rows
