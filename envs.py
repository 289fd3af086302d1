"""envs.py: the task families (paper Sec. 5 "Environments", App. D.1).

A *task* is plain JSON numbers (DarkRoom: the goal cell `[x, y]`); an *environment* is the family.
Three things live here for every family: facts (`Family`), a registered Gymnasium environment that
plays one task, and a batched one that steps many tasks at once, which is what collection and
evaluation use. The families' own rules are in rooms.py (DarkRoom, Point-Robot), locomotion.py (MuJoCo) and
manipulation.py (Meta-World), imported when they are asked for.

in : environment name, list of tasks            out: states, rewards, reference returns
Read after README.md, before collect.py.        Try: python envs.py   (every family's tasks and references)
"""

from __future__ import annotations

import importlib
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
class Family:
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
    teacher: Literal["rule", "sac", "ppo"]  # who makes the data (App. D.2)
    reward_scale: float = 1.0  # of a good step; what a model reads is divided by it
    success: bool = False  # whether an episode can also succeed (Meta-World)
    paper_return: dict = field(default_factory=dict)  # Table 1 (Mixed), by (backbone, moe)


def _paper(t2mir_ad: float, t2mir_dpt: float, ad: float, dpt: float) -> dict:
    return {
        ("ad", "both"): t2mir_ad,
        ("dpt", "both"): t2mir_dpt,
        ("ad", "none"): ad,
        ("dpt", "none"): dpt,
    }


# fmt: off
FAMILIES = {spec.name: spec for spec in (
    Family("darkroom", 100, 2, (10, 10), 5, True, 80, 20, 2, "t2mir/DarkRoom-v0", "rule",
            paper_return=_paper(90.9, 78.3, 57.5, 72.5)),
    Family("point-robot", 20, 2, None, 2, False, 45, 5, 2, "t2mir/PointRobot-v0", "sac",
            paper_return=_paper(-5.2, -5.0, -5.6, -5.8)),
    Family("cheetah-vel", 200, 20, None, 6, False, 45, 5, 1, "t2mir/CheetahVel-v0", "sac",
            paper_return=_paper(-68.9, -43.2, -119.2, -56.1)),
    Family("cheetah-vel-3cluster", 200, 20, None, 6, False, 42, 6, 1, "t2mir/CheetahVel-v0", "sac"),
    Family("walker-param", 200, 17, None, 6, False, 45, 5, 65, "t2mir/WalkerParam-v0", "sac",
            paper_return=_paper(435.7, 492.8, 395.2, 425.9)),
    Family("reach", 100, 18, None, 4, False, 45, 5, 3, "t2mir/Reach-v0", "ppo", 10.0, True,
            paper_return=_paper(823.9, 764.6, 790.4, 754.9)),
    Family("push", 100, 18, None, 4, False, 45, 5, 2, "t2mir/Push-v0", "ppo", 10.0, True,
            paper_return=_paper(665.8, 633.2, 604.7, 615.4)),
)}
# fmt: on


def get_family(env: str) -> Family:
    """The facts of a family. Raises ValueError that lists the known ones."""
    if env.endswith(".py"):
        return own_family(env).SPEC
    if env not in FAMILIES:
        raise ValueError(
            f"unknown environment '{env}': choose one of {', '.join(sorted(FAMILIES))}, or a .py file"
        )
    return FAMILIES[env]


@cache
def own_family(file: str) -> ModuleType:
    """A family of the user's: a Python file with `SPEC` (Family), `Batch(tasks, seed)` (as `make_batch` says),
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


# ------------------------------------------------------------------------------------- every family
# fmt: off
for _id, _entry, _horizon in (
    ("t2mir/DarkRoom-v0", "families.rooms:DarkRoom", 100), ("t2mir/PointRobot-v0", "families.rooms:PointRobot", 20),
    ("t2mir/CheetahVel-v0", "families.locomotion:CheetahVel", 200), ("t2mir/WalkerParam-v0", "families.locomotion:WalkerParam", 200),
    ("t2mir/Reach-v0", "families.manipulation:Reach", 100), ("t2mir/Push-v0", "families.manipulation:Push", 100),
):
    if _id not in gym.registry:  # `python envs.py` is read twice: as itself, and by the families' files
        gym.register(_id, entry_point=_entry, max_episode_steps=_horizon)
# fmt: on


def make_env(env: str, task) -> gym.Env:
    """The Gymnasium environment of one task, truncated at the horizon."""
    return gym.make(get_family(env).gym_id, task=task)


def make_batch(env: str, tasks, seed: int = 0):
    """The batched environment of a family over N tasks.

    `reset() -> states (N, ds)`, `step(actions) -> (states, rewards (N,))`; all rows share the horizon, so there is
    no `done`: the caller counts to `spec.horizon`. `success`: (N,) bool, whether the running episode has succeeded,
    or None. `seed` is that of the starts.
    """
    if env.endswith(".py"):
        return own_family(env).Batch(tasks, seed)
    file, name = gym.spec(get_family(env).gym_id).entry_point.split(":")
    return getattr(importlib.import_module(file), f"Batched{name}")(tasks, seed)


def task_limits(env: str) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value of each number of a task. Point-Robot's goals and Cheetah's velocities are
    not bounded by their distribution: a test may ask for others.
    """
    if env in ("reach", "push"):
        from families import manipulation

        low, high = manipulation.REACH_GOALS if env == "reach" else manipulation.PUSH_GOALS
        return np.array(low), np.array(high)
    limit = {"point-robot": 2.0, "walker-param": 3.0}.get(env, 10.0 if env in FAMILIES else np.inf)
    return np.full(get_family(env).task_numbers, -limit), np.full(
        get_family(env).task_numbers, limit
    )


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
        tasks = rng.uniform(-3, 3, (count, get_family(env).task_numbers))
    else:
        tasks = rng.uniform(*task_limits(env), (count, get_family(env).task_numbers))
    return np.round(tasks, 4).tolist()


def _sample_split(env: str, seed: int, train: int, test: int) -> tuple[list, list]:
    """Training and held-out tasks, each of a stream of its own; what is trained on is not held out."""
    trained, rng = (
        sample_tasks(env, train, np.random.default_rng([seed, 0])),
        np.random.default_rng([seed, 1]),
    )
    taken, held_out = set(map(tuple, trained)), sample_tasks(env, test, rng)
    while both := [
        i for i, task in enumerate(held_out) if tuple(task) in taken
    ]:  # rounded numbers can meet
        again = sample_tasks(env, test, rng)
        for i in both:
            held_out[i] = again[i]
    return trained, held_out


def check_tasks(env: str, tasks) -> list:
    """Tasks as lists of plain numbers; raises ValueError, naming the first that does not fit."""
    spec = get_family(env)
    if env == "darkroom":
        from families import rooms

        for task in tasks:
            rooms.DarkRoom(task)
        return [[int(v) for v in task] for task in tasks]
    low, high = task_limits(env)
    checked = []
    for task in tasks:
        numbers = task if isinstance(task, (list, tuple, np.ndarray)) else [task]
        whole = len(numbers) == spec.task_numbers and all(
            isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in numbers
        )
        if not whole or not (
            np.isfinite(numbers).all() and (low <= numbers).all() and (numbers <= high).all()
        ):
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
    spec = get_family(env)
    if min(train, test) < 0:
        raise ValueError(
            "--train-tasks and --test-tasks must not be negative (0: the paper's number)"
        )
    if file is None:
        train, test = train or spec.train_tasks, test or spec.test_tasks
        if env != "darkroom":
            return _sample_split(env, seed, train, test)
        width, height = spec.state_values
        if train + test > width * height:
            raise ValueError(
                f"a room has {width * height} cells: {train} training and {test} held-out goals are too many"
            )
        order = np.random.default_rng(seed).permutation(width * height)
        cells = [[int(i // height), int(i % height)] for i in order]
        return cells[:train], cells[train : train + test]
    try:
        lists = json.loads(Path(file).read_text())
        train, test = check_tasks(env, lists["train"]), check_tasks(env, lists["test"])
    except OSError as error:
        raise ValueError(f"cannot read the task file {file}: {error.strerror}") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f'{file} must hold {{"train": [...], "test": [...]}} ({error!r})'
        ) from None
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
    from families import rooms

    if get_family(env).name == "darkroom":
        return rooms.darkroom_optimum(tasks)
    return rooms.point_robot_optimum(tasks) if env == "point-robot" else None


def random_returns(env: str, tasks, episodes: int = 20) -> np.ndarray:
    """Expected return (N,) of the policy that draws every action uniformly: exact in DarkRoom, elsewhere the mean
    of so many episodes a task (the same ones every time).
    """
    if get_family(env).name == "darkroom":
        from families import rooms

        return rooms.darkroom_noisy_return(tasks, [1.0])[:, 0]
    return _random_returns(env, tuple(map(tuple, tasks)), episodes).copy()


@cache
def _random_returns(env: str, tasks: tuple, episodes: int) -> np.ndarray:
    spec, batch = (
        get_family(env),
        make_batch(env, [task for task in tasks for _ in range(episodes)], seed=0),
    )
    rng = np.random.default_rng(
        1
    )  # not the starts' own: an action would go on where its start points to
    batch.reset()
    total = 0.0
    for _ in range(spec.horizon):
        _, rewards = batch.step(
            rng.uniform(-1, 1, (len(tasks) * episodes, spec.action_dim)).astype(np.float32)
        )
        total = total + rewards.astype(float)
    return total.reshape(len(tasks), episodes).mean(1)


if __name__ == "__main__":
    for name in FAMILIES:
        _, test = split_tasks(name)
        best, floor = optimal_returns(name, test), random_returns(name, test, 2).mean()
        known = "optimum unknown" if best is None else f"optimum {best.mean():.2f}"
        print(
            f"{name:<22}{len(test):>3} held-out tasks, first {test[0][:3]!s:<26}{known}, random {floor:.2f}"
        )
    print(make_env("darkroom", split_tasks("darkroom")[1][0]).unwrapped.render())
