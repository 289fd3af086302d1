"""rooms.py: a run at play, drawn: the first, a middle and the last episode on held-out tasks.

in : a finished run          out: a figure, or None where nothing can be drawn
Read beside page.py. Only families whose state is a place in the plane are drawn here: DarkRoom,
with the exact posterior's belief beside (families/posterior.py), and Point-Robot.

Shapes: N tasks, E episodes, T steps an episode.
"""

from __future__ import annotations

import numpy as np

from data import Prompt
from pictures.curves import pyplot
from pictures.routers import play_episodes
from pictures.runs import Run
from policies import concatenate

PLANES = ("darkroom", "point-robot")


def draw_rooms(run: Run, episodes: int, tasks: int = 2):
    """The figure of up to so many held-out tasks; None for a family that is not of the plane."""
    if run.method.cfg.data.env not in PLANES:
        return None
    held_out = run.split.test[:tasks]
    history = play_episodes(run.method, held_out, episodes)
    shown = sorted({0, episodes // 2, episodes - 1})
    if run.method.cfg.data.env == "darkroom":
        return darkroom(run, held_out, history, shown)
    return point_robot(held_out, history, shown)


def darkroom(run: Run, tasks: list, history: list[Prompt], shown: list[int]):
    """A row for each goal; for each episode the belief that it began with, and what was done."""
    from matplotlib.colors import PowerNorm

    from families.posterior import goal_posterior

    # the same in all panels: a hundredth, a cell's share when nothing is known, can still be seen
    shades = PowerNorm(0.35, 0, 1)
    memory = run.method.policy(run.method.cfg.play).memory
    columns = 2 * len(shown)
    form = {"figsize": (2.5 * columns, 2.7 * len(tasks)), "layout": "constrained"}
    figure, axes = pyplot().subplots(len(tasks), columns, squeeze=False, **form)
    for place, episode in enumerate(shown):
        past = history[:episode]
        known = None
        if past:  # the last episode, or all of them, also where AD has kept the best K alone
            known = past[-1] if memory == "last" else concatenate(past)
        belief = goal_posterior(known, len(tasks)).reshape(-1, 10, 10).numpy()
        for row, goal in enumerate(tasks):
            left, right = axes[row, 2 * place : 2 * place + 2]
            # x to the right and y upwards; imshow's first axis is the rows
            left.imshow(belief[row].T, origin="lower", cmap="Blues", norm=shades)
            left.set_title(f"belief before episode {episode + 1}", fontsize=8)
            steps, earned = cells(history[episode], row)
            right.plot(*steps.T, color="C0", alpha=0.6, linewidth=1.5)
            right.plot(*steps[0], "ko", markersize=4)
            right.set_title(f"episode {episode + 1}: return {earned:.0f}", fontsize=8)
            right.set(xlim=(-0.5, 9.5), ylim=(-0.5, 9.5), aspect="equal")
            for axis in (left, right):
                axis.plot(*goal, marker="*", color="C3", markersize=10)
                axis.set(xticks=[], yticks=[])
    return figure


def cells(episode: Prompt, row: int, jitter: float = 0.12) -> tuple[np.ndarray, float]:
    """The path (T, 2) of one task, slightly shaken: a cell comes more than once; and its return."""
    rng = np.random.default_rng(0)
    steps = episode.states[row].numpy() + rng.uniform(-jitter, jitter, episode.states[row].shape)
    return steps, episode.rewards[row].sum().item()


def point_robot(tasks: list, history: list[Prompt], shown: list[int]):
    """A panel for each episode; every goal and the path to it in a colour of its own."""
    form = {"figsize": (4 * len(shown), 4.2), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot().subplots(1, len(shown), sharex=True, sharey=True, **form)
    for axis, episode in zip(axes[0], shown, strict=True):
        returns = history[episode].rewards.sum(1)
        for row, goal in enumerate(tasks):
            steps = history[episode].states[row]
            axis.plot(*steps.T, marker=".", color=f"C{row}", label=f"return {returns[row]:.1f}")
            axis.plot(*goal, marker="*", color=f"C{row}", markersize=14, markeredgecolor="black")
        axis.set(title=f"episode {episode + 1}", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
        axis.set_aspect("equal")
        axis.legend(fontsize=8, loc="upper left")
    return figure
