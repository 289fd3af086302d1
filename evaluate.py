"""evaluate.py: in-context learning on held-out tasks, no weight updates (Algorithms 2 and 4).

in : a run's folder       out: returns of every task and episode (CSV), the curve (PNG), a table
Read after train.py, before envs.py.

    python evaluate.py runs/darkroom-dpt-both-mixed-cpu-s0
    python evaluate.py runs/... --prompt all --actions greedy --results results/darkroom

`play` is the loop of both algorithms; what differs, a policy says (ad.py, dpt.py). Settings that
are not given are those of the run.

Symbols (paper -> here): T_test -> tasks; N of the algorithms -> episodes; R, tau -> what the policy
makes of `history`. Shapes: N tasks (here), E episodes, T steps an episode, ds, da numbers of a
state and of an action.
Differs from the paper: all tasks are played at once, a row each, in place of the loop in line 1;
rows know nothing of one another.
"""

from __future__ import annotations

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C should not be a traceback
    from support.stop import at_once

    at_once()

import csv
import io
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from config import Config, Play, Rows, Text
from data import Prompt
from envs import get_family, make_batch, optimal_returns, random_returns
from methods import Method
from mixture import components_of, play_name
from pictures.curves import draw_curve
from policies import Policy
from support import checkpoint
from support.command_line import one_line, parse_evaluation
from support.distributed import resolve_device
from support.files import (
    check_folder,
    need_memory,
    only_writer,
    progress,
    remove_left_behind,
    write_atomically,
)
from support.settings import flat


# ------------------------------------------------------------------------------ Algorithms 2 and 4
@torch.inference_mode()
def play(
    env: str,
    tasks: list,
    policy: Policy,
    episodes: int,
    seed: int = 0,
    title: str | None = None,
    success: list | None = None,
    history: list[Prompt] | None = None,
) -> np.ndarray:
    """Algorithms 2 and 4 on N tasks at once: the return of each task and episode, (N, episodes).

    `seed` is that of the starts; with a title there is a progress bar. A list given as `success`
    gains, for a family that can succeed, (N,) bool an episode: whether each task did; an empty one
    given as `history` gains the episodes, (N, T) each.
    """
    horizon, batch = get_family(env).horizon, make_batch(env, tasks, seed)
    history = [] if history is None else history  # line 2: nothing is known yet
    returns = []
    bar = progress(range(episodes), desc=title, unit="episode", disable=title is None)
    for _ in bar:  # line 3
        states = torch.from_numpy(batch.reset())  # (N, ds); Alg. 2 l. 4, Alg. 4 l. 5
        # What is kept of the past changes between episodes alone: Alg. 2 l. 10-13, Alg. 4 l. 11.
        policy.begin(history, len(tasks))
        steps = []
        for _ in range(horizon):  # no family ends an episode early, so all rows stay in step
            actions = policy.act(states)  # (N,) or (N, da); Alg. 2 l. 6, Alg. 4 l. 7
            following, rewards = batch.step(actions.numpy())  # l. 7, l. 8
            rewards = torch.from_numpy(rewards)
            policy.observe(states, actions, rewards)  # l. 8, l. 9
            steps.append((states, actions, rewards))
            states = torch.from_numpy(following)
        # T steps of (N, ...) each to three arrays (N, T, ...)
        history.append(Prompt(*(torch.stack(column, 1) for column in zip(*steps, strict=True))))
        returns.append(history[-1].rewards.sum(1).numpy())
        if success is not None and batch.success is not None:
            success.append(batch.success.copy())
        bar.set_postfix_str(f"return {returns[-1].mean():.1f}", refresh=False)
    return np.stack(returns, 1)


# --------------------------------------------------------------------------------- a run evaluated
@dataclass(frozen=True)
class Evaluation:
    """Evaluate the run in FOLDER on its held-out tasks; what is not given is as in its training."""

    folder: tyro.conf.Positional[Text]
    """A run's folder, runs/..."""
    repeats: Rows = 1
    """Play every task this often, independently."""
    split: Literal["test", "train"] = "test"
    """Held-out tasks, or those trained on."""
    results: Text | None = None
    """Folder for the CSV, the picture and summary.csv (default: the run's own). Runs are told apart
    there by the names of their folders."""
    device: Text = "cpu"
    """cpu or cuda."""
    env: Text | None = None
    """The run's family where it is a file of your own."""
    backbone: Text | None = None
    """The run's method where it is a file of your own."""
    play: Any = field(default_factory=lambda: None)  # the method's `Play`


@dataclass
class Returns:
    """What an evaluation has found; N tasks, E episodes."""

    played: np.ndarray  # (repeats * N, E)
    success: np.ndarray | None  # (repeats * N, E) bool
    ceiling: np.ndarray | None  # (E,) of the exact in-context policy, where it is known
    lines: dict[str, float | None]  # reference returns: optimum, teacher, paper, random


def evaluate_run(cfg: Evaluation) -> dict:
    """Play a run's tasks; write returns, curve and a row of summary.csv; print the table.

    Returns the row. Raises ValueError with one line for a folder that is not a run.
    """
    folder = Path(cfg.folder)
    files = {"env": cfg.env, "backbone": cfg.backbone}
    # weights, normalisation and settings, as training left them
    method, header = checkpoint.load_method(folder, resolve_device(cfg.device), **files)
    policy = method.policy(cfg.play)  # refuses settings that cannot be
    split = checkpoint.read_tasks(folder, method.cfg.data.env)
    tasks = split.tasks(cfg.split)
    name = f"{cfg.split}-{variant(method, cfg)}"
    if cfg.results is None:
        target, summary = folder, folder.parent / "summary.csv"
    else:
        check_folder("--results", cfg.results)
        target, summary = Path(cfg.results), Path(cfg.results) / "summary.csv"
        name = f"{folder.resolve().name}-{name}"  # many runs share such a folder
    check_summary(summary)  # before the work: minutes would be lost
    family, plays = method.family, len(tasks) * cfg.repeats
    step = family.state_dim + family.action_dim + 1  # s, a, r
    numbers = plays * cfg.play.episodes * family.horizon * step
    need_memory(f"{cfg.play.episodes} episodes of {plays} tasks", 4 * numbers)
    returns = play_all(method, policy, split, cfg)
    row = summary_row(method.cfg, header, cfg, returns)
    # Evaluations share summary.csv, and the run's folder with its training: they wait for one
    # another, not for that.
    with only_writer(summary.parent, seconds=60, lock=".summary.lock"):
        for kind in ("csv", "png"):
            remove_left_behind(target, f"{name}.{kind}")
        write_csv(target / f"{name}.csv", tasks * cfg.repeats, returns)
        draw(target / f"{name}.png", method, policy, cfg, returns)
        append_summary(summary, row)  # last: a row promises that its curve is there
    print_table(row, returns)
    print(in_words(method, policy, cfg, row, returns))
    print(f"curve: {target / name}.png   returns: {target / name}.csv   summary: {summary}")
    return row


def variant(method: Method, cfg: Evaluation) -> str:
    """How it was played, for file names: made of checked values alone."""
    settings, own = cfg.play, method.cfg.play
    mixed = bool(components_of(method.cfg.model))
    if method.family.discrete_actions or mixed:  # drawn, or the likeliest
        parts = [settings.actions]
        if settings.actions != "greedy":
            parts += [f"t{settings.temperature:g}"] * (settings.temperature != 1)
            parts += play_name(settings) * mixed
        parts += [f"noise{settings.noise:g}"] * bool(settings.noise)
    else:  # continuous ones are the mean, or noise is added to it
        parts = [f"noise{settings.noise:g}" if settings.noise else "mean"]
    parts += method.play_name(settings)
    parts += ["random-first"] * (settings.first == "random")
    # not named where they are the run's own
    parts += [f"play-seed{settings.play_seed}"] * (settings.play_seed != own.play_seed)
    parts += [f"episodes{settings.episodes}"] * (settings.episodes != own.episodes)
    return "-".join(parts)


def reference_lines(
    method: Method, split: checkpoint.TaskSplit, which: Literal["test", "train"]
) -> dict[str, float | None]:
    """Mean returns that a run's are compared with: optimum, teacher, paper, random; None where it
    is not known. `which`: test or train, the tasks of the split.
    """
    env, family = method.cfg.data.env, method.family
    tasks = split.tasks(which)
    reference = (split.reference or {}).get(which, {})
    # A return means something between two others: that of random actions and the best there is.
    # Where the data were made by trained teachers, both were measured when they were collected.
    floor = reference.get("random") or random_returns(env, tasks)
    optimum = optimal_returns(env, tasks)  # in closed form; None where nobody knows it
    return {
        "optimum": None if optimum is None else float(np.mean(optimum)),
        "teacher": float(np.mean(reference["teacher"])) if "teacher" in reference else None,
        # Table 1 is of Mixed data; it knows no ablations and no families of the user's
        "paper": family.paper_return.get(method.label)
        if method.cfg.data.quality == "mixed"
        else None,
        "random": float(np.mean(floor)),
    }


def play_all(
    method: Method, policy: Policy, split: checkpoint.TaskSplit, cfg: Evaluation
) -> Returns:
    """The run's policy, and what its returns are to be compared with."""
    tasks = split.tasks(cfg.split)
    env, settings = method.cfg.data.env, cfg.play
    episodes, seed = settings.episodes, settings.play_seed
    # repeats are further rows: the same tasks, other starts and other draws
    succeeded: list = []
    title = f"evaluating on {len(tasks)} {cfg.split} tasks"
    played = play(env, tasks * cfg.repeats, policy, episodes, seed, title, succeeded)
    success = np.stack(succeeded, 1) if succeeded else None

    lines = reference_lines(method, split, cfg.split)
    return Returns(played, success, ceiling(method, policy, tasks, settings), lines)


def ceiling(method: Method, policy: Policy, tasks: list, settings: Play) -> np.ndarray | None:
    """Returns (E,) of the exact policy with the memory of `policy`, played alike; None where nobody
    knows it.
    """
    if method.family.ceiling is None:
        return None
    # What a policy does not remember it cannot use. Where it samples its returns vary: 20 plays of
    # each task.
    greedy = settings.actions == "greedy"
    exact = method.family.ceiling(policy.memory, settings.play_seed, settings.temperature, greedy)
    return play(method.cfg.data.env, tasks * 20, exact, settings.episodes, seed=0).mean(0)


# ---------------------------------------------------------------------------------------- reporting
# fmt: off
SUMMARY = (
    "env", "backbone", "moe", "routing", "quality", "preset", "seed", "steps", "train_seconds",
    "episodes", "first_return", "last_return", "best_return", "random_return", "optimum",
    "teacher_return", "success", "paper_return", "command",
)
# fmt: on
LAST = 5  # episodes whose mean is "last": of one episode alone, a few goals decide
READS = {"last": "the last episode", "all": "every episode"}  # the ceiling, by the policy's memory


def summary_row(run: Config, header: checkpoint.Header, cfg: Evaluation, returns: Returns) -> dict:
    """A row of summary.csv; results/README.md explains the columns."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    curve, settings, lines = returns.played.mean(0), flat(run), returns.lines
    if settings.get("moe") not in ("both", "task"):
        settings["routing"] = ""  # a rule for h_bar, which nobody reads there
    names = ("env", "backbone", "moe", "routing", "quality", "preset", "seed")
    success = None if returns.success is None else returns.success[:, -LAST:].mean()
    return (
        {name: settings.get(name, "") for name in names}
        | {
            "steps": str(header.step),
            "train_seconds": f"{header.seconds:.0f}",
            "episodes": cfg.play.episodes,
            "first_return": number(curve[0]),
            "last_return": number(curve[-LAST:].mean()),
            "best_return": number(curve.max()),  # Table 1: "the best performance"
            "random_return": number(lines["random"]),
            "optimum": number(lines["optimum"]),
            "teacher_return": number(lines["teacher"]),
            "success": number(success),
            "paper_return": "" if lines["paper"] is None else lines["paper"],
            "command": f"python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        }
    )


def draw(path: Path, method: Method, policy: Policy, cfg: Evaluation, returns: Returns) -> None:
    # (N, E). Repeats are not further tasks: the interval over tasks would come out too narrow.
    episodes = returns.played.shape[1]
    per_task = returns.played.reshape(cfg.repeats, -1, episodes).mean(0)
    tasks = "held-out tasks" if cfg.split == "test" else "training tasks"
    title = f"{method.cfg.data.env}, {method.label}, {tasks} ({variant(method, cfg)})"
    ceiling_name = f"exact posterior of {READS[policy.memory]}"
    draw_curve(path, title, per_task, returns.lines, returns.ceiling, ceiling_name)


def write_csv(path: Path, tasks: list, returns: Returns) -> None:
    """A row for each task and episode. A task is its numbers, or its place where they are many."""
    # with --repeats a task comes again, and is the same task
    places = {task: i for i, task in enumerate(dict.fromkeys(map(tuple, tasks)))}
    columns = ["task", "episode", "return"] + ["success"] * (returns.success is not None)

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(columns)
            for i, task in enumerate(tasks):
                name = " ".join(map(str, task)) if len(task) <= 3 else places[tuple(task)]
                for episode, value in enumerate(returns.played[i]):
                    row = [name, episode + 1, f"{value:g}"]
                    if returns.success is not None:
                        row.append(int(returns.success[i, episode]))
                    out.writerow(row)

    write_atomically(path, write)  # the old file or the new one, never half of it


def check_summary(path: Path) -> bool:
    """Whether there is one already. Raises ValueError if that file has other columns."""
    head = ",".join(SUMMARY).encode() + b"\n"
    if path.exists() and not path.read_bytes().startswith(head):
        raise ValueError(f"{path} has other columns than a summary; move it away")
    return path.exists()


def append_summary(path: Path, row: dict) -> None:
    """One row an evaluation, the oldest first. Raises ValueError if the file has other columns."""
    new = io.StringIO()
    out = csv.DictWriter(new, SUMMARY, lineterminator="\n")
    old = path.read_bytes() if check_summary(path) else b""
    if not old:
        out.writeheader()
    out.writerow(row)
    # all of it anew, so that a kill leaves no half row
    rows = old + new.getvalue().encode()
    write_atomically(path, lambda temporary: temporary.write_bytes(rows))


def normalised(value: float, floor: float, best: float) -> float:
    """0 the random policy's return, 1 the optimum's (or the teacher's where none is known)."""
    return (value - floor) / (best - floor)


def print_table(row: dict, returns: Returns) -> None:
    curve = returns.played.mean(0)  # (E,), over tasks and repeats
    last = min(LAST, len(curve))
    lines = [
        ("first episode", row["first_return"]),
        (f"last {last} episodes", row["last_return"]),
        (f"best episode ({int(curve.argmax()) + 1})", row["best_return"]),
    ]
    if returns.ceiling is not None:
        lines.append((f"exact posterior, last {last}", f"{returns.ceiling[-last:].mean():.2f}"))
    for name in ("optimum", "teacher_return", "random_return", "paper_return"):
        lines.append((name.removesuffix("_return"), row[name] or "-"))
    # one number that can be compared between families, whose returns have scales of their own
    best = "optimum" if row["optimum"] else "teacher_return"
    if row[best] and row[best] != row["random_return"]:  # else the share would divide by 0
        share = normalised(*(float(row[k]) for k in ("last_return", "random_return", best)))
        name = f"random 0, {best.removesuffix('_return')} 1: last {last}"
        lines.append((name, f"{share:.3f}"))
    if row["success"]:
        lines.append((f"success, last {last}", f"{100 * float(row['success']):.0f} %"))
    print("\n".join(f"  {name:<32}{value:>8}" for name, value in lines))


def in_words(method: Method, policy: Policy, cfg: Evaluation, row: dict, returns: Returns) -> str:
    """What the table says: what was learnt, how far it could go, what to try next."""
    firsts = {"policy": "its first episode", "random": "a first episode of random actions"}
    learnt = (
        f"With no weight update {method.label} went from a return of {row['first_return']} in "
        f"{firsts[cfg.play.first]} to {row['last_return']} in its last ones, from what it saw in "
        "between."
    )
    if returns.ceiling is not None:
        ceiling, reads = returns.ceiling[-LAST:].mean(), READS[policy.memory]
        best = f"The ceiling here is {ceiling:.2f}, of a perfect policy that reads {reads}"
        if cfg.play.actions == "greedy":
            best += " and takes the likeliest action"
        elif cfg.play.temperature != 1:
            best += " and draws at the same temperature"
    elif row["optimum"]:
        best = f"The ceiling here is {row['optimum']}, the optimum"
    elif row["teacher_return"]:  # no ceiling: they may be surpassed
        best = f"The teachers reach {row['teacher_return']}"
    else:
        best = "The ceiling here is not known"
    return f"{learnt}\n{best}. To try next: {method.try_next}."


if __name__ == "__main__":
    one_line(lambda: evaluate_run(parse_evaluation(Evaluation)), "nothing was written")
