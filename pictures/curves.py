"""curves.py: return curves and their intervals; how a picture and its numbers are kept.

in : returns of seeds, tasks and episodes          out: PNG, PDF and CSV files
Read beside evaluate.py, which draws one run with `draw_curve`; figures.py draws many runs.

Shapes: S seeds, N tasks, E episodes.
Differs from the paper: its interval is over five seeds of training; `interval` is over seeds and
tasks together, and of one run over its tasks.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from scipy.stats import t as students_t

from support.files import write_atomically


# ---------------------------------------------------------------------------------------- intervals
def interval(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of the mean of returns (S, N, E), over seeds and tasks: (E,) each.

    Every seed was played on the same tasks, so the S N returns are no independent draws: a return
    is the mean, plus what its seed adds, what its task adds, and what is left. The variance of the
    mean is then (A + B - C) / (S N), of three mean squares: A of the seeds, B of the tasks, C of
    what is left. Each is known from few draws, so Student's t takes the place of 1.96, with the
    degrees of freedom of their sum (Satterthwaite 1946). With one seed it is over tasks alone, and
    says nothing of other seeds; with one task, over seeds; of one return it has no width.
    """
    seeds, tasks, _ = returns.shape
    mean, of_seed, of_task = returns.mean((0, 1)), returns.mean(1), returns.mean(0)
    if seeds == 1 or tasks == 1:
        one = of_task if seeds == 1 else of_seed  # (N or S, E)
        freedom = np.array(max(1, len(one) - 1))
        variance = ((one - mean) ** 2).sum(0) / freedom / len(one)
    else:
        a = tasks * of_seed.var(0, ddof=1)
        b = seeds * of_task.var(0, ddof=1)
        left = returns - of_seed[:, None] - of_task + mean
        c = (left**2).sum((0, 1)) / ((seeds - 1) * (tasks - 1))
        # where chance makes C too large, the sum of variances may not be smaller than one of them
        total = np.maximum(a + b - c, np.maximum(a, b))
        spread = a**2 / (seeds - 1) + b**2 / (tasks - 1) + c**2 / ((seeds - 1) * (tasks - 1))
        freedom = np.maximum(1, total**2 / np.where(spread > 0, spread, 1))
        variance = total / (seeds * tasks)
    half = students_t.ppf(0.975, freedom) * np.sqrt(variance)
    return mean - half, mean + half


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
    low, high = interval(returns[None])
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
    axis.set(xlabel="episode", ylabel="return")
    axis.set_title(title, fontsize=10, wrap=True)
    axis.set_xlim(1, max(2, len(episode)))  # also of one episode: an axis needs a length
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8, loc="best")
    return figure
