"""colours.py: how tasks, modalities and experts are coloured and placed (Fig. 1, 12).

in : tasks, representations          out: colours, points in the plane
Read beside figures.py. "Points of similar color come from similar tasks" (Sec. 5.4): a task of one
number has its place on a scale, one of two numbers its place in a square of colours, and one of
more its place along the direction in which the tasks differ most.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pictures.curves import pyplot
from pictures.gradients import principal
from pictures.runs import LeftOut

# of the corners of a square of tasks: green, orange, blue, magenta
CORNERS = np.array([[0.0, 0.5, 0.1], [1.0, 0.65, 0.0], [0.0, 0.3, 1.0], [0.9, 0.0, 0.7]])


def colour_of_tasks(tasks: np.ndarray) -> np.ndarray:
    """Colours (N, 3) of tasks (N, numbers)."""
    if tasks.shape[1] == 2:
        span = np.ptp(tasks, axis=0)
        x, y = ((tasks - tasks.min(0)) / np.where(span, span, 1)).T[..., None]  # in [0, 1]
        left = CORNERS[0] + y * (CORNERS[2] - CORNERS[0])
        right = CORNERS[1] + y * (CORNERS[3] - CORNERS[1])
        return left + x * (right - left)
    along = principal(tasks)
    span = np.ptp(along) or 1.0
    return pyplot().get_cmap("viridis")((along - along.min()) / span)[:, :3]


def draw_key(figure: Any, axis: Any, tasks: np.ndarray) -> None:
    """Which colour is which task: a scale, or the tasks in their own plane."""
    plt = pyplot()
    if tasks.shape[1] == 2:
        key = axis.inset_axes((1.03, 0.62, 0.36, 0.36))
        key.scatter(*tasks.T, c=colour_of_tasks(tasks), s=9)
        key.set_title("tasks", fontsize=7)
        key.tick_params(labelsize=6, left=False, labelleft=False, right=True, labelright=True)
        return
    along = principal(tasks)
    scale = plt.cm.ScalarMappable(plt.Normalize(along.min(), along.max()), "viridis")
    name = "task" if tasks.shape[1] == 1 else "first principal component of the tasks"
    figure.colorbar(scale, ax=axis, label=name)


def points(x: np.ndarray) -> np.ndarray:
    """t-SNE of M representations (M, K): (M, 2). The same numbers give the same picture.

    Raises LeftOut for fewer than four of them.
    """
    from sklearn.manifold import TSNE  # seconds to import

    if len(x) < 4:
        raise LeftOut(f"t-SNE needs at least 4 points, not {len(x)}: more --tasks or --plays")
    # From the two directions of largest spread, where there are two: a random start would throw
    # away which clusters are near one another.
    spread = np.linalg.matrix_rank(x - x.mean(0)) > 1
    start = "pca" if spread else "random"
    # 30 neighbours are the usual number; of few points, a third of them
    near = min(30.0, (len(x) - 1) / 3)
    settings = {"perplexity": near, "init": start, "max_iter": 500, "random_state": 0}
    return TSNE(**settings).fit_transform(x.astype(np.float32))
