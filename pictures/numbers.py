"""numbers.py: what a picture of routers can hide, as numbers (paper Sec. 5.4, Fig. 1 and 12).

in : labels, representations of M trajectories          out: plain numbers
Read beside figures.py. A t-SNE draws clusters also where there are none, and hides how often a
point of one colour lies elsewhere. Four numbers cannot:

    I(token expert; modality)       bits; log2 3 = 1.58 if a token's expert names its modality
    I(task expert; task)            bits; at most the entropy of either
    silhouette of z by task         1 tight clusters, 0 none, < 0 nearer to another task's
    rank correlation                of distances between the tasks' mean z and between the tasks:
                                    1 if "the difference between expert assignments is positively
                                    related to the difference between tasks" (Fig. 1) without
                                    exception, 0 if they are not related

Each stands beside the same number for routers with new random weights (`untrained`: what the hidden
states alone give away) and for assignments dealt out anew (`shuffled`: what is left by chance, with
so few trajectories more than nothing).

Symbols (paper -> here): z of Eq. 7, the logits of G_task -> z. Shapes: M trajectories, N tasks, K
experts. The paper gives pictures alone; all numbers here are this project's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

from diagnostics import mutual_information

SHUFFLES = 20


def information(a: np.ndarray, b: np.ndarray) -> float:
    """I(a; b) in bits of two labels (M,) each, from the table of how often each pair comes."""
    (_, a), (_, b) = (np.unique(labels, return_inverse=True) for labels in (a, b))
    counts = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(counts, (a, b), 1)
    return mutual_information(torch.from_numpy(counts))


def entropy(a: np.ndarray) -> float:
    """H(a) in bits: the most that anything can tell of it."""
    return information(a, a)


def silhouette(z: np.ndarray, task: np.ndarray) -> float:
    """Mean silhouette of z (M, K) by task (M,). NaN where no task has two trajectories, or one task
    has them all: there is nothing to be nearer to.
    """
    from sklearn.metrics import silhouette_score  # seconds to import

    if not 2 <= len(np.unique(task)) < len(task):
        return float("nan")
    return float(silhouette_score(z, task))


def rank_correlation(z: np.ndarray, task: np.ndarray, tasks: np.ndarray) -> float:
    """Spearman's correlation, over all pairs of tasks, of the distance between their mean z and the
    distance between the tasks themselves.

    z (M, K), task (M,) rows of tasks (N, numbers). NaN for fewer than three tasks, or equal ones.
    """
    which = np.unique(task)
    if len(which) < 3:
        return float("nan")
    mean = np.stack([z[task == i].mean(0) for i in which])  # (N, K)
    apart, want = pdist(mean), pdist(tasks[which])
    if np.ptp(apart) == 0 or np.ptp(want) == 0:  # all are equally far: there are no ranks
        return float("nan")
    return float(spearmanr(apart, want).statistic)


def compared(
    name: str,
    number: Callable[[np.ndarray], float],
    trained: np.ndarray,
    untrained: list[np.ndarray],
    most: float,
) -> dict[str, float | str]:
    """One row: the number of what the trained routers say of M things, (M, ...); of what untrained
    ones say (mean and deviation over them); and of the trained ones' answers dealt out anew.
    """
    rng = np.random.default_rng(0)
    without = [number(answers) for answers in untrained]
    dealt = [number(rng.permutation(trained)) for _ in range(SHUFFLES)]
    return {
        "number": name,
        "trained": number(trained),
        "untrained": float(np.mean(without)),
        "untrained_deviation": float(np.std(without)),
        "shuffled": float(np.mean(dealt)),
        "shuffled_deviation": float(np.std(dealt)),
        "most": most,
    }


def in_words(rows: list[dict]) -> str:
    """The caption of a picture: every row of `compared`, a line each."""
    return "\n".join(
        f"{row['number']}: {row['trained']:.2f}   (untrained router {row['untrained']:.2f}, "
        f"shuffled {row['shuffled']:.2f}, at most {row['most']:.2f})"
        for row in rows
    )
