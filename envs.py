"""envs.py: the task families (paper Sec. 5 "Environments", App. D.1).

A *task* is plain JSON numbers (DarkRoom: the goal cell `[x, y]`); an *environment* is the family.
Three things live here for every family: facts (`EnvSpec`), a registered Gymnasium environment that
plays one task, and a batched one that steps many tasks at once, which is what collection and
evaluation use.

in : environment name, list of tasks            out: states, rewards, closed-form reference returns
Read after README.md, before collect.py.        Try: python envs.py   (prints a room and its optimum)
Differs from the paper: nothing.  Differs from the official code: its DarkRoom-DPT configuration is a
9x9 room with 20 steps; the paper's room (10x10, 100 steps) is used for both backbones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np


@dataclass(frozen=True)
class EnvSpec:
    """What a model and a sampler need to know of a task family. No array in it depends on a task."""

    name: str
    horizon: int  # T, steps an episode; no family ends one early
    state_dim: int  # numbers in one observation
    state_values: tuple[int, ...] | None  # how many values each coordinate takes; None: continuous
    action_dim: int  # number of discrete actions, or numbers in a continuous one
    discrete_actions: bool
    train_tasks: int
    test_tasks: int
    paper_return: dict = field(default_factory=dict)  # Table 1 (Mixed), by (backbone, moe)


SPECS = {
    "darkroom": EnvSpec(
        name="darkroom",
        horizon=100,
        state_dim=2,
        state_values=(10, 10),
        action_dim=5,
        discrete_actions=True,
        train_tasks=80,
        test_tasks=20,
        paper_return={
            ("ad", "both"): 90.9,
            ("dpt", "both"): 78.3,
            ("ad", "none"): 57.5,
            ("dpt", "none"): 72.5,
        },
    ),
}


def get_spec(env: str) -> EnvSpec:
    """The facts of a family. Raises ValueError that lists the known ones."""
    if env not in SPECS:
        raise ValueError(f"unknown environment '{env}': choose one of {', '.join(sorted(SPECS))}")
    return SPECS[env]


# ------------------------------------------------------------------ DarkRoom: rules and closed forms
SIDE = 10  # cells along one wall
MOVES = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]])  # right, left, up, down, stay
STAY = 4


def darkroom_move(cells: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Cells (..., 2) after `actions` (...): a move against a wall stays where it is."""
    return np.clip(cells + MOVES[actions], 0, SIDE - 1)


def darkroom_expert(cells: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """The optimal action (...) for `cells` (..., 2) and `goals` (..., 2): along x, then y, then stay."""
    dx, dy = np.moveaxis(goals - cells, -1, 0)
    along_y = np.where(dy > 0, 2, np.where(dy < 0, 3, STAY))
    return np.where(dx > 0, 0, np.where(dx < 0, 1, along_y))


def darkroom_optimum(tasks) -> np.ndarray:
    """Best return of each goal (N, 2), exactly: 101 - d at Manhattan distance d > 0, 100 at d = 0.

    The reward of a step is that of the cell *after* the move, so the d-th step is the first to pay.
    """
    distance = np.asarray(tasks).sum(-1)
    return np.where(distance == 0, 100.0, 101.0 - distance)


def darkroom_noisy_return(tasks, eps) -> np.ndarray:
    """Expected return (N, M) of the expert of each goal (N, 2) that acts at random with each eps (M,).

    Exact: the distribution over the 100 cells is carried through the 100 steps. eps = 1 is the random
    policy, eps = 0 the optimum; App. D.2's performance levels (80 %, 50 %) are read off this curve.
    """
    goals, eps = np.asarray(tasks), np.asarray(eps, dtype=float)
    cells = np.stack(np.divmod(np.arange(SIDE**2), SIDE), -1)  # (100, 2), cell id = x * 10 + y
    after = darkroom_move(cells[:, None], np.arange(5)[None])  # (100, 5, 2)
    random_walk = np.zeros((SIDE**2, SIDE**2))  # row: from, column: to
    np.add.at(random_walk, (np.arange(SIDE**2)[:, None], after @ [SIDE, 1]), 1 / 5)
    best = darkroom_expert(cells[None], goals[:, None])  # (N, 100)
    expert_to = np.take_along_axis(np.broadcast_to(after @ [SIDE, 1], (len(goals), SIDE**2, 5)), best[..., None], 2)
    expert_walk = np.zeros((len(goals), SIDE**2, SIDE**2))
    np.put_along_axis(expert_walk, expert_to, 1.0, 2)
    goal_id = goals @ [SIDE, 1]
    here = np.zeros((len(goals), len(eps), SIDE**2))
    here[..., 0] = 1.0  # every episode starts in the corner
    total = np.zeros((len(goals), len(eps)))
    for _ in range(SPECS["darkroom"].horizon):
        here = eps[:, None] * (here @ random_walk) + (1 - eps)[:, None] * (here @ expert_walk)
        total += np.take_along_axis(here, goal_id[:, None, None], 2)[..., 0]
    return total


class DarkRoom(gym.Env):
    """One room of 10 x 10 cells, one goal (App. D.1). Observation: the agent's cell. Reward: 1 at the goal.

    The registered id `t2mir/DarkRoom-v0` truncates an episode after 100 steps. Raises ValueError for a
    goal that is not a cell.
    """

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012 (gymnasium's own interface)

    def __init__(self, task=(9, 9), render_mode: str | None = None):
        goal = np.asarray(task)
        if goal.shape != (2,) or not np.isin(goal, np.arange(SIDE)).all():
            raise ValueError(f"a DarkRoom goal is two whole numbers from 0 to {SIDE - 1}, not {task}")
        self.goal, self.render_mode = goal.astype(np.int64), render_mode
        self.observation_space = gym.spaces.MultiDiscrete([SIDE, SIDE])
        self.action_space = gym.spaces.Discrete(len(MOVES))
        self.cell = np.zeros(2, np.int64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = np.zeros(2, np.int64)
        return self.cell.copy(), {}

    def step(self, action):
        x, y = self.cell
        if action == 0:
            x = min(x + 1, SIDE - 1)
        elif action == 1:
            x = max(x - 1, 0)
        elif action == 2:
            y = min(y + 1, SIDE - 1)
        elif action == 3:
            y = max(y - 1, 0)
        self.cell = np.array([x, y], np.int64)
        return self.cell.copy(), float((self.cell == self.goal).all()), False, False, {}

    def render(self):
        rows = [["." for _ in range(SIDE)] for _ in range(SIDE)]
        rows[self.goal[1]][self.goal[0]] = "G"
        rows[self.cell[1]][self.cell[0]] = "A"
        return "\n".join("".join(row) for row in reversed(rows))


gym.register("t2mir/DarkRoom-v0", entry_point=DarkRoom, max_episode_steps=SPECS["darkroom"].horizon)


class BatchedDarkRoom:
    """N tasks stepped at once: states (N, 2) int64, actions (N,) -> rewards (N,) float32.

    All tasks share the horizon, so there is no `done`: the caller counts to `spec.horizon`.
    """

    spec = SPECS["darkroom"]

    def __init__(self, tasks):
        self.goals = np.asarray(tasks, np.int64)
        self.cells = np.zeros_like(self.goals)

    def reset(self) -> np.ndarray:
        self.cells = np.zeros_like(self.goals)
        return self.cells

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.cells = darkroom_move(self.cells, actions)
        return self.cells, (self.cells == self.goals).all(-1).astype(np.float32)


# ------------------------------------------------------------------------------------- every family
BATCHED = {"darkroom": BatchedDarkRoom}


def make_batch(env: str, tasks):
    """The batched environment of a family over a list of N tasks."""
    return BATCHED[get_spec(env).name](tasks)


def optimal_returns(env: str, tasks) -> np.ndarray:
    """Best attainable return of each task (N,)."""
    get_spec(env)
    return darkroom_optimum(tasks)


def random_returns(env: str, tasks) -> np.ndarray:
    """Expected return (N,) of the policy that draws every action uniformly."""
    get_spec(env)
    return darkroom_noisy_return(tasks, [1.0])[:, 0]


def check_tasks(env: str, tasks) -> list:
    """Tasks as lists of plain numbers; raises ValueError, naming the first that does not fit."""
    get_spec(env)
    for task in tasks:
        DarkRoom(task)
    return [[int(v) for v in task] for task in tasks]


def split_tasks(env: str, seed: int = 0, file: str | Path | None = None) -> tuple[list, list]:
    """(train, test) tasks: the seeded split of App. D.1 (DarkRoom: 80 / 20 of the 100 cells), or those
    of a JSON file `{"train": [task, ...], "test": [task, ...]}`.

    Raises ValueError with one line when the file cannot be read, lacks a list, holds a task that does
    not fit the family, or holds out a task that is also trained on.
    """
    spec = get_spec(env)
    if file is None:
        order = np.random.default_rng(seed).permutation(SIDE**2)
        cells = [[int(i // SIDE), int(i % SIDE)] for i in order]
        return cells[: spec.train_tasks], cells[spec.train_tasks : spec.train_tasks + spec.test_tasks]
    try:
        lists = json.loads(Path(file).read_text())
        train, test = check_tasks(env, lists["train"]), check_tasks(env, lists["test"])
    except OSError as error:
        raise ValueError(f"cannot read the task file {file}: {error.strerror}") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f'{file} must hold {{"train": [...], "test": [...]}} ({error!r})') from None
    if not train or not test:
        raise ValueError(f"{file} names no {'train' if not train else 'test'} tasks")
    twice = [task for tasks in (train, test) for i, task in enumerate(tasks) if task in tasks[:i]]
    if twice:
        raise ValueError(f"{file} names {twice[0]} twice")
    both = [task for task in test if task in train]
    if both:
        raise ValueError(f"{file} holds out {both[0]}, which is also a training task")
    return train, test


if __name__ == "__main__":
    _, test = split_tasks("darkroom")
    print(DarkRoom(test[0]).render())
    for name, tasks in (f"goal {test[0]}", test[:1]), ("all 20 held-out goals", test):
        best, floor = optimal_returns("darkroom", tasks).mean(), random_returns("darkroom", tasks).mean()
        print(f"{name}: optimum {best:.2f}, random {floor:.2f}")
