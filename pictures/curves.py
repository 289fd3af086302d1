"""curves.py: return curves and their intervals; how a picture and its numbers are kept.

in : returns of seeds, tasks and episodes          out: PNG, PDF and CSV files
Read beside evaluate.py, which draws one run with `draw_curve`; figures.py draws many runs.

Shapes: S seeds, N tasks, E episodes.
Differs from the paper: its interval is over five seeds of training. One run has no seeds to differ,
so `interval` is over its tasks; `interval_over_seeds` is over both.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

from support.files import write_atomically


# ---------------------------------------------------------------------------------------- intervals
def interval(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean over tasks (axis 0), per episode (Sec. 5)."""
    if len(returns) < 2:  # one task has no spread, and scipy refuses it
        return returns[0], returns[0]
    # tasks drawn with replacement, 2000 times; rng=0, so that a picture drawn again is the same
    resampled = bootstrap((returns,), np.mean, axis=0, n_resamples=2000, method="percentile", rng=0)
    return resampled.confidence_interval.low, resampled.confidence_interval.high


def interval_over_seeds(
    returns: np.ndarray, resamples: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean of returns (S, N, E), over seeds and tasks: (E,) each.

    Seeds and tasks are drawn with replacement, each by themselves (a crossed, or "pigeonhole",
    bootstrap: Owen 2007): every seed was played on the same tasks, so the S*N returns are no
    independent draws, and an interval that took them for such would be too narrow. With one seed it
    is over tasks alone. Of S seeds a bootstrap sees (S - 1) / S of the variance: of few too little.
    """
    seeds, tasks, _ = returns.shape
    rng = np.random.default_rng(0)
    # how often each was drawn, as weights: no copy of the returns for each resample
    of_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    of_task = rng.multinomial(tasks, np.full(tasks, 1 / tasks), resamples) / tasks
    means = np.einsum("rs,rn,sne->re", of_seed, of_task, returns, optimize=True)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


# ------------------------------------------------------------------------------------------ reading
def read_returns(path: Path) -> tuple[list[str], np.ndarray]:
    """The CSV of an evaluation: names of N tasks, returns (N, E); repeats of a task are averaged.

    Raises ValueError with one line for a file that evaluate.py did not write.
    """
    wrong = ValueError(
        f"{path} is not an evaluation: it holds no returns of evaluate.py; evaluate its run again"
    )
    plays: list[tuple[str, list[float]]] = []  # a task, and the returns of one play of it
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row["episode"] == "1":
                    plays.append((row["task"], []))
                plays[-1][1].append(float(row["return"]))
    except (KeyError, IndexError, TypeError, ValueError, csv.Error):
        raise wrong from None
    names = list(dict.fromkeys(name for name, _ in plays))  # in their order, each once
    if len({len(returns) for _, returns in plays}) != 1:  # none, or one is cut short
        raise wrong
    # Repeats are not further tasks: the interval over tasks would come out too narrow.
    of = {name: [returns for task, returns in plays if task == name] for name in names}
    if not np.isfinite([returns for _, returns in plays]).all():
        raise wrong
    return names, np.stack([np.mean(of[name], 0) for name in names])


# ------------------------------------------------------------------------------------------ drawing
def pyplot():
    """matplotlib, imported only where something is drawn, without a window."""
    import matplotlib

    matplotlib.use("Agg")  # runs on machines without a screen
    import matplotlib.pyplot as plt

    return plt


def as_csv(rows: list[dict]) -> str:
    """Rows of equal columns as CSV; numbers with six digits."""
    text = io.StringIO()
    out = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    out.writeheader()
    for row in rows:
        out.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def write_table(path: Path, rows: list[dict]) -> None:
    """`as_csv` into a file."""
    write_atomically(path, lambda temporary: temporary.write_text(as_csv(rows)))


def save(figure, stem: Path, rows: list[dict]) -> None:
    """stem.png, stem.pdf and, of the numbers that were plotted, stem.csv. Closes the figure."""
    for kind in ("png", "pdf"):
        # no date inside: the same numbers give the same bytes
        about = {"CreationDate": None} if kind == "pdf" else None
        write_atomically(
            stem.with_name(f"{stem.name}.{kind}"),
            lambda path, kind=kind, about=about: figure.savefig(
                path, format=kind, dpi=130, metadata=about
            ),
        )
    pyplot().close(figure)
    write_table(stem.with_name(f"{stem.name}.csv"), rows)


def draw_curve(path: Path, *shown) -> None:
    """`curve_figure` as a PNG."""
    figure = curve_figure(*shown)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    pyplot().close(figure)


def curve_figure(
    title: str,
    returns: np.ndarray,
    lines: dict[str, float | None],
    ceiling: np.ndarray | None,
    ceiling_name: str,
):
    """The return of each episode, (N, E), its interval, reference lines, the ceiling."""
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    episode = np.arange(1, returns.shape[1] + 1)
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    low, high = interval(returns)
    axis.fill_between(episode, low, high, alpha=0.25, linewidth=0)
    axis.plot(episode, returns.mean(0), label="this run, 95 % over tasks")
    if ceiling is not None:
        axis.plot(episode, ceiling, color="black", linestyle=":", label=ceiling_name)
    # of optimum, teacher, paper and random (evaluate.reference_lines); those not known are left out
    styles = ("--", (0, (5, 1)), "-.", (0, (1, 3)))
    for (name, value), style in zip(lines.items(), styles, strict=True):
        if value is not None:
            label = f"{name} {value:.1f}"
            axis.axhline(value, color="gray", linestyle=style, linewidth=1, label=label)
    axis.set(xlabel="episode", ylabel="return", title=title)
    axis.set_xlim(1, max(2, len(episode)))  # also of one episode: an axis needs a length
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8, loc="best")
    return figure
