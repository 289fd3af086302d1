"""figures.py: the pictures (paper Fig. 3: test return curves).

in : returns of tasks and episodes          out: a PNG file
Read beside evaluate.py. Differs from the paper: its interval is over five seeds of training, this
one over the tasks of one run, which is what one run can tell.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

from support.files import write_atomically


def interval(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean over tasks (axis 0), per episode (Sec. 5)."""
    if len(returns) < 2:  # one task has no spread, and scipy refuses it
        return returns[0], returns[0]
    # tasks drawn with replacement, 2000 times; rng=0, so that a picture drawn again is the same
    resampled = bootstrap((returns,), np.mean, axis=0, n_resamples=2000, method="percentile", rng=0)
    return resampled.confidence_interval.low, resampled.confidence_interval.high


def draw_curve(
    path: Path,
    title: str,
    returns: np.ndarray,
    lines: dict[str, float | None],
    ceiling: np.ndarray | None,
    ceiling_name: str,
) -> None:
    """The return of each episode, (tasks, episodes), its interval, reference lines, the ceiling."""
    import matplotlib  # only where something is drawn

    matplotlib.use("Agg")  # no window: runs on machines without a screen
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    episode = np.arange(1, returns.shape[1] + 1)
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    low, high = interval(returns)
    axis.fill_between(episode, low, high, alpha=0.25, linewidth=0)
    axis.plot(episode, returns.mean(0), label="this run, 95 % over tasks")
    if ceiling is not None:
        axis.plot(episode, ceiling, color="black", linestyle=":", label=ceiling_name)
    # of optimum, teacher, paper and random (evaluate.play_all); those not known are left out
    styles = ("--", (0, (5, 1)), "-.", (0, (1, 3)))
    for (name, value), style in zip(lines.items(), styles, strict=True):
        if value is not None:
            label = f"{name} {value:.1f}"
            axis.axhline(value, color="gray", linestyle=style, linewidth=1, label=label)
    axis.set(xlabel="episode", ylabel="return", title=title)
    axis.set_xlim(1, max(2, len(episode)))  # also of one episode: an axis needs a length
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8, loc="best")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    plt.close(figure)
