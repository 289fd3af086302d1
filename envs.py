"""envs.py: the task families (paper Sec. 5 "Environments", App. D.1).

A *task* is plain JSON numbers (DarkRoom: the goal cell `[x, y]`); an *environment* is the family.
Three things live here for every family: facts (`EnvSpec`), a registered Gymnasium environment that
plays one task, and a batched one that steps many tasks at once, which is what collection and
evaluation use. DarkRoom and Point-Robot are written out here; the MuJoCo families are in locomotion.py,
Meta-World's in manipulation.py, both imported when they are asked for.

in : environment name, list of tasks            out: states, rewards, reference returns
Read after README.md, before collect.py.        Try: python envs.py   (every family's tasks and references)
Differs from the paper: Point-Robot's goals lie in [-1, 1]^2 as published (the paper says unit square).
Differs from the official code: its DarkRoom-DPT configuration is a 9x9 room with 20 steps; the paper's
room (10x10, 100 steps) is used for both backbones.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

import gymnasium as gym
import numpy as np


@dataclass(frozen=True)
class EnvSpec:
    """What a model and a sampler need to know of a task family. No array in it depends on a task."""

    name: str
    horizon: int  # T, steps an episode; no family ends one early
    state_dim: int  # numbers in one observation
    state_values: tuple[int, ...] | None  # how many values each coordinate takes; None: continuous
    action_dim: int  # number of discrete actions, or numbers in a continuous one, each in [-1, 1]
    discrete_actions: bool
    train_tasks: int
    test_tasks: int
    task_numbers: int  # numbers that make a task
    gym_id: str  # of the registered environment
    expert: Literal["rule", "sac", "ppo"]  # who makes the data (App. D.2)
    reward_scale: float = 1.0  # of a good step; what a model reads is divided by it
    success: bool = False  # whether an episode can also succeed (Meta-World)
    paper_return: dict = field(default_factory=dict)  # Table 1 (Mixed), by (backbone, moe)


def _paper(t2mir_ad: float, t2mir_dpt: float, ad: float, dpt: float) -> dict:
    return {("ad", "both"): t2mir_ad, ("dpt", "both"): t2mir_dpt, ("ad", "none"): ad, ("dpt", "none"): dpt}


# fmt: off
SPECS = {spec.name: spec for spec in (
    EnvSpec("darkroom", 100, 2, (10, 10), 5, True, 80, 20, 2, "t2mir/DarkRoom-v0", "rule",
            paper_return=_paper(90.9, 78.3, 57.5, 72.5)),
    EnvSpec("point-robot", 20, 2, None, 2, False, 45, 5, 2, "t2mir/PointRobot-v0", "sac",
            paper_return=_paper(-5.2, -5.0, -5.6, -5.8)),
    EnvSpec("cheetah-vel", 200, 20, None, 6, False, 45, 5, 1, "t2mir/CheetahVel-v0", "sac",
            paper_return=_paper(-68.9, -43.2, -119.2, -56.1)),
    EnvSpec("cheetah-vel-3cluster", 200, 20, None, 6, False, 42, 6, 1, "t2mir/CheetahVel-v0", "sac"),
    EnvSpec("walker-param", 200, 17, None, 6, False, 45, 5, 65, "t2mir/WalkerParam-v0", "sac",
            paper_return=_paper(435.7, 492.8, 395.2, 425.9)),
    EnvSpec("reach", 100, 18, None, 4, False, 45, 5, 3, "t2mir/Reach-v0", "ppo", 10.0, True,
            paper_return=_paper(823.9, 764.6, 790.4, 754.9)),
    EnvSpec("push", 100, 18, None, 4, False, 45, 5, 2, "t2mir/Push-v0", "ppo", 10.0, True,
            paper_return=_paper(665.8, 633.2, 604.7, 615.4)),
)}
# fmt: on


def get_spec(env: str) -> EnvSpec:
    """The facts of a family. Raises ValueError that lists the known ones."""
    if env.endswith(".py"):
        return own_family(env).SPEC
    if env not in SPECS:
        raise ValueError(f"unknown environment '{env}': choose one of {', '.join(sorted(SPECS))}, or a .py file")
    return SPECS[env]


@cache
def own_family(file: str) -> ModuleType:
    """A family of the user's: a Python file with `SPEC` (EnvSpec), `Batch(tasks, seed)` (as `make_batch` says),
    `sample_tasks(count, rng)` and, if it is known, `optimal_returns(tasks)`.

    Raises ValueError with one line when the file cannot be read or lacks one of them.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--env {file}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("SPEC", "Batch", "sample_tasks"):
        if not hasattr(module, name):
            raise ValueError(f"--env {file}: it must define {name}, see own_family in envs.py")
    return module


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


class BatchedDarkRoom:
    """N tasks stepped at once: states (N, 2) int64, actions (N,) -> rewards (N,) float32.

    All tasks share the horizon, so there is no `done`: the caller counts to `spec.horizon`.
    """

    spec = SPECS["darkroom"]
    success = None

    def __init__(self, tasks, seed: int = 0):
        self.goals = np.asarray(tasks, np.int64)
        self.cells = np.zeros_like(self.goals)

    def reset(self) -> np.ndarray:
        self.cells = np.zeros_like(self.goals)
        return self.cells

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.cells = darkroom_move(self.cells, actions)
        return self.cells, (self.cells == self.goals).all(-1).astype(np.float32)


# -------------------------------------------------------------------------------------- Point-Robot
REACH = 0.1  # the largest move along an axis in a step, and the half side of the starting square


def point_robot_move(places: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Places (..., 2) after actions (..., 2) in [-1, 1] (clipped): a full action moves by 0.1."""
    return places + REACH * np.clip(actions, -1, 1)


def point_robot_expert(places: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """The optimal action (..., 2): straight to the goal, each axis by itself at most 0.1, then stay."""
    return np.clip((goals - places) / REACH, -1, 1)


def point_robot_optimum(tasks) -> np.ndarray:
    """Best expected return of each goal (N,): the expert's, averaged over a fine grid of starts.

    Both axes shrink as fast as they can, so the distance is the least possible at every step at once.
    """
    side = REACH * ((np.arange(20) + 0.5) / 10 - 1)  # midpoints of 20 equal parts
    starts = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    goals = np.asarray(tasks, float)[:, None]
    places, total = np.broadcast_to(starts, (len(goals), *starts.shape)), 0.0
    for _ in range(SPECS["point-robot"].horizon):
        places = point_robot_move(places, point_robot_expert(places, goals))
        total = total - np.linalg.norm(places - goals, axis=-1)
    return total.mean(1)


class PointRobot(gym.Env):
    """A point that walks to a goal it is not told (App. D.1). Observation: its place. Reward: minus the distance
    to the goal after the move. Starts anywhere in [-0.1, 0.1]^2. Raises ValueError for a goal that is none.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (gymnasium's own interface)

    def __init__(self, task=(0.5, 0.5)):
        self.goal = np.array(check_tasks("point-robot", [task])[0])
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.place = np.zeros(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-REACH, REACH, 2)
        return self.place.copy(), {}

    def step(self, action):
        self.place = point_robot_move(self.place, np.asarray(action, float))
        return self.place.copy(), -float(np.hypot(*(self.place - self.goal))), False, False, {}


class BatchedPointRobot:
    """N tasks stepped at once: states (N, 2) float32, actions (N, 2) -> rewards (N,) float32."""

    spec = SPECS["point-robot"]
    success = None

    def __init__(self, tasks, seed: int = 0):
        self.goals, self.rng = np.asarray(tasks, float), np.random.default_rng(seed)

    def reset(self) -> np.ndarray:
        self.places = self.rng.uniform(-REACH, REACH, self.goals.shape)
        return self.places.astype(np.float32)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.places = point_robot_move(self.places, np.asarray(actions, float))
        distance = np.linalg.norm(self.places - self.goals, axis=-1)
        return self.places.astype(np.float32), -distance.astype(np.float32)


# ------------------------------------------------------------------------------------- every family
# fmt: off
for _id, _entry, _horizon in (
    ("t2mir/DarkRoom-v0", "envs:DarkRoom", 100), ("t2mir/PointRobot-v0", "envs:PointRobot", 20),
    ("t2mir/CheetahVel-v0", "locomotion:CheetahVel", 200), ("t2mir/WalkerParam-v0", "locomotion:WalkerParam", 200),
    ("t2mir/Reach-v0", "manipulation:Reach", 100), ("t2mir/Push-v0", "manipulation:Push", 100),
):
    gym.register(_id, entry_point=_entry, max_episode_steps=_horizon)
# fmt: on


def make_env(env: str, task) -> gym.Env:
    """The Gymnasium environment of one task, truncated at the horizon."""
    return gym.make(get_spec(env).gym_id, task=task)


def make_batch(env: str, tasks, seed: int = 0):
    """The batched environment of a family over N tasks.

    `reset() -> states (N, ds)`, `step(actions) -> (states, rewards (N,))`; all rows share the horizon, so there is
    no `done`: the caller counts to `spec.horizon`. `success`: (N,) bool, whether the running episode has succeeded,
    or None. `seed` is that of the starts.
    """
    if env.endswith(".py"):
        return own_family(env).Batch(tasks, seed)
    if get_spec(env).name == "darkroom":
        return BatchedDarkRoom(tasks, seed)
    if env == "point-robot":
        return BatchedPointRobot(tasks, seed)
    if env.startswith("cheetah-vel"):
        from locomotion import BatchedCheetahVel

        return BatchedCheetahVel(tasks, seed)
    if env == "walker-param":
        from locomotion import BatchedWalkerParam

        return BatchedWalkerParam(tasks, seed)
    import manipulation

    return (manipulation.BatchedReach if env == "reach" else manipulation.BatchedPush)(tasks, seed)


def task_limits(env: str) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value of each number of a task. Point-Robot's goals and Cheetah's velocities are
    not bounded by their distribution: a test may ask for others.
    """
    if env in ("reach", "push"):
        import manipulation

        low, high = manipulation.REACH_GOALS if env == "reach" else manipulation.PUSH_GOALS
        return np.array(low), np.array(high)
    limit = {"point-robot": 2.0, "walker-param": 3.0}.get(env, 10.0 if env in SPECS else np.inf)
    return np.full(get_spec(env).task_numbers, -limit), np.full(get_spec(env).task_numbers, limit)


CLUSTERS = (0.5, 1.5, 2.5)  # mean velocities of cheetah-vel-3cluster, deviation 0.15 each


def sample_tasks(env: str, count: int, rng: np.random.Generator) -> list:
    """`count` tasks of a continuous family's distribution (App. D.1), rounded to 4 decimals."""
    if env.endswith(".py"):
        tasks = np.reshape(own_family(env).sample_tasks(count, rng), (count, -1))
    elif env == "point-robot":
        tasks = rng.uniform(-1, 1, (count, 2))
    elif env == "cheetah-vel":
        tasks = rng.uniform(0.075, 3.0, (count, 1))
    elif env == "cheetah-vel-3cluster":  # task i is of cluster i modulo 3: as many of each
        tasks = rng.normal(np.resize(CLUSTERS, count), 0.15)[:, None]
    elif env == "walker-param":  # exponents of the multipliers, see locomotion.py
        tasks = rng.uniform(-3, 3, (count, SPECS[env].task_numbers))
    else:
        tasks = rng.uniform(*task_limits(env), (count, SPECS[env].task_numbers))
    return np.round(tasks, 4).tolist()


def _sample_split(env: str, seed: int, train: int, test: int) -> tuple[list, list]:
    """Training and held-out tasks, each of a stream of its own; what is trained on is not held out."""
    trained, rng = sample_tasks(env, train, np.random.default_rng([seed, 0])), np.random.default_rng([seed, 1])
    taken, held_out = set(map(tuple, trained)), sample_tasks(env, test, rng)
    while both := [i for i, task in enumerate(held_out) if tuple(task) in taken]:  # rounded numbers can meet
        again = sample_tasks(env, test, rng)
        for i in both:
            held_out[i] = again[i]
    return trained, held_out


def check_tasks(env: str, tasks) -> list:
    """Tasks as lists of plain numbers; raises ValueError, naming the first that does not fit."""
    spec = get_spec(env)
    if env == "darkroom":
        for task in tasks:
            DarkRoom(task)
        return [[int(v) for v in task] for task in tasks]
    low, high = task_limits(env)
    checked = []
    for task in tasks:
        numbers = task if isinstance(task, (list, tuple, np.ndarray)) else [task]
        whole = len(numbers) == spec.task_numbers and all(
            isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in numbers
        )
        if not whole or not (np.isfinite(numbers).all() and (low <= numbers).all() and (numbers <= high).all()):
            raise ValueError(
                f"a task of {env} is {spec.task_numbers} number{'s' * (spec.task_numbers > 1)} from "
                f"{np.round(low[:3], 3).tolist()} to {np.round(high[:3], 3).tolist()}, not {str(task)[:60]}"
            )
        checked.append([float(v) for v in numbers])
    return checked


def split_tasks(
    env: str, seed: int = 0, file: str | Path | None = None, train: int = 0, test: int = 0
) -> tuple[list, list]:
    """(train, test) tasks: the seeded split of App. D.1, or those of a JSON file
    `{"train": [task, ...], "test": [task, ...]}`. `train` and `test` are how many, 0 the paper's number.

    The training tasks of a seed do not depend on how many are held out. Raises ValueError with one line when there
    are not that many, or the file cannot be read, lacks a list, holds a task that does not fit the family, or holds
    out a task that is also trained on.
    """
    spec = get_spec(env)
    if min(train, test) < 0:
        raise ValueError("--train-tasks and --test-tasks must not be negative (0: the paper's number)")
    if file is None:
        train, test = train or spec.train_tasks, test or spec.test_tasks
        if env != "darkroom":
            return _sample_split(env, seed, train, test)
        if train + test > SIDE**2:
            raise ValueError(f"a room has {SIDE**2} cells: {train} training and {test} held-out goals are too many")
        order = np.random.default_rng(seed).permutation(SIDE**2)
        cells = [[int(i // SIDE), int(i % SIDE)] for i in order]
        return cells[:train], cells[train : train + test]
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


# ------------------------------------------------------------------------------- reference returns
def optimal_returns(env: str, tasks) -> np.ndarray | None:
    """Best attainable return of each task (N,) where it is known in closed form, else None."""
    if env.endswith(".py"):
        found = getattr(own_family(env), "optimal_returns", None)
        return None if found is None else np.asarray(found(tasks))
    if get_spec(env).name == "darkroom":
        return darkroom_optimum(tasks)
    return point_robot_optimum(tasks) if env == "point-robot" else None


def random_returns(env: str, tasks, episodes: int = 20) -> np.ndarray:
    """Expected return (N,) of the policy that draws every action uniformly: exact in DarkRoom, elsewhere the mean
    of so many episodes a task (the same ones every time).
    """
    if get_spec(env).name == "darkroom":
        return darkroom_noisy_return(tasks, [1.0])[:, 0]
    return _random_returns(env, tuple(map(tuple, tasks)), episodes).copy()


@cache
def _random_returns(env: str, tasks: tuple, episodes: int) -> np.ndarray:
    spec, batch = get_spec(env), make_batch(env, [task for task in tasks for _ in range(episodes)], seed=0)
    rng = np.random.default_rng(1)  # not the starts' own: an action would go on where its start points to
    batch.reset()
    total = 0.0
    for _ in range(spec.horizon):
        _, rewards = batch.step(rng.uniform(-1, 1, (len(tasks) * episodes, spec.action_dim)).astype(np.float32))
        total = total + rewards.astype(float)
    return total.reshape(len(tasks), episodes).mean(1)


if __name__ == "__main__":
    for name in SPECS:
        _, test = split_tasks(name)
        best, floor = optimal_returns(name, test), random_returns(name, test, 2).mean()
        known = "optimum unknown" if best is None else f"optimum {best.mean():.2f}"
        print(f"{name:<22}{len(test):>3} held-out tasks, first {test[0][:3]!s:<26}{known}, random {floor:.2f}")
    print(DarkRoom(split_tasks("darkroom")[1][0]).render())
