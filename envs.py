"""envs.py: task families, and what can be done with any of them (paper Sec. 5, App. D.1).

A *task* is a list of plain numbers (DarkRoom: the goal's cell `[x, y]`); a *family* is a
distribution of tasks that look alike and differ in what is rewarded or how the body moves.

in : a family's name or file (`--env`), tasks      out: states, rewards, reference returns
Read after README.md, before collect.py.           Try: python envs.py   (all tasks and references)

All that is known of a family is one object, a `Family`: facts and functions. Those of the paper are
constants in families/: start with point_robot.py, the shortest. A family of your own is a file of
the same form; `--env FILE.py` takes it. Below, no family is known by its name.

Shape legend: N tasks, ds/da = state_dim/action_dim.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import gymnasium as gym
import numpy as np
from annotated_types import MinLen

from support.checked import read_json, validated
from support.user_file import check_batch, run_file, users_code

# Families are imported when they are asked for: no simulator loads unless it is played.
FAMILIES = {
    "darkroom": "families.darkroom:DARKROOM",
    "point-robot": "families.point_robot:POINT_ROBOT",
    "cheetah-vel": "families.locomotion:CHEETAH_VEL",
    "cheetah-vel-3cluster": "families.locomotion:CHEETAH_VEL_3CLUSTER",
    "walker-param": "families.locomotion:WALKER_PARAM",
    "reach": "families.manipulation:REACH",
    "push": "families.manipulation:PUSH",
}

# The same rules one task at a time, for whoever knows Gymnasium: `gym.make(id, task=[...])`.
for _id, _entry_point, _horizon in (
    ("t2mir/DarkRoom-v0", "families.darkroom:DarkRoom", 100),
    ("t2mir/PointRobot-v0", "families.point_robot:PointRobot", 20),
    ("t2mir/CheetahVel-v0", "families.locomotion:CheetahVel", 200),
    ("t2mir/WalkerParam-v0", "families.locomotion:WalkerParam", 200),
    ("t2mir/Reach-v0", "families.manipulation:Reach", 100),
    ("t2mir/Push-v0", "families.manipulation:Push", 100),
):
    if _id not in gym.registry:  # `python envs.py` reads this file twice: as itself and as `envs`
        gym.register(_id, entry_point=_entry_point, max_episode_steps=_horizon)


# --------------------------------------------------------------------------------- what a family is
class Batch(Protocol):
    """N tasks stepped at once. They share the horizon: no `done`, the caller counts the steps."""

    rng: np.random.Generator  # all that is random; whoever replaces it seeds the batch anew
    success: np.ndarray | None  # (N,) bool: has the running episode succeeded? None: it cannot
    outcome: np.ndarray  # (N, m) float32, where the family has a `reward`: what it reads of a step
    family: Family  # set by `make_batch`

    def reset(self) -> np.ndarray:
        """Starts an episode: states (N, ds), float32 (whole numbers in a grid)."""

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Actions (N, da) float32 or (N,) ids -> the next states (N, ds), a new array each time,
        and rewards (N,) float32."""


@dataclass(frozen=True)
class Family:
    """All that is known of a task family: facts, and functions for what differs between families.

    Raises ValueError with one line for facts that contradict each other.
    """

    name: str
    horizon: int  # T, steps of an episode; no family ends one early
    state_dim: int  # numbers in one observation; the task is not among them
    action_dim: int  # numbers in an action, each in [-1, 1]; if discrete: how many actions
    train_tasks: int
    test_tasks: int
    task_low: tuple[float, ...]  # limits of each number of a task. They may be wider than
    task_high: tuple[float, ...]  # the distribution: a test may ask for tasks outside it
    batch: Callable[[list, int], Any]  # (tasks, seed of the starts) -> a `Batch`: all at once
    sample_tasks: Callable[[int, np.random.Generator], np.ndarray]  # (count, rng) -> (count, n)

    state_values: tuple[int, ...] | None = None  # values each coordinate takes; None: continuous
    discrete_actions: bool = False
    reward_scale: float = 1.0  # of a good step; what a model reads is divided by it
    can_succeed: bool = False  # whether an episode also succeeds or fails (Meta-World)
    teacher: Literal["sac", "ppo", "rule"] = "sac"  # who makes the data (App. D.2)
    gym_id: str = ""  # a registered Gymnasium environment; "": a batch of one serves
    paper_return: dict[str, float] = field(default_factory=dict)  # Table 1 (Mixed), by its columns

    # What only some families have.
    split_tasks: Callable[[int, int, int], tuple[list, list]] | None = None  # (seed, train, test)
    check_task: Callable[[object], list] | None = None  # in place of the limits above
    optimal_returns: Callable[[list], np.ndarray] | None = None  # tasks -> (N,)
    random_returns: Callable[[list], np.ndarray] | None = None  # exactly; else they are played
    collect_task: Callable[..., dict] | None = None  # a rule's data: (data, train_tasks, index)
    # (outcomes (..., m), tasks (..., n)) -> rewards (...), in operators that NumPy's arrays and
    # torch's share: what the same step would have earned in another task (--teacher one)
    reward: Callable[..., Any] | None = None
    lesson: Callable[..., Any] | None = None  # likewise: what one teacher is paid in its place
    # (centre, unit) of each number of a state: one teacher's network reads (state - centre) / unit.
    # None: the states as they are
    state_units: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    # (states (N, ds), tasks (N, n)) -> actions (N, da) that solve them: one teacher's warm-up
    demonstrate: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    # (memory, seed, temperature, greedy) -> the best in-context policy
    ceiling: Callable[..., Any] | None = None
    divergence: Callable[..., tuple] | None = None  # (prompt, states, log_policy), from that policy

    @property
    def task_numbers(self) -> int:
        return len(self.task_low)

    def __post_init__(self):
        sizes = (self.horizon, self.state_dim, self.action_dim, self.train_tasks, self.test_tasks)
        limits = zip(self.task_low, self.task_high, strict=False)
        functions = callable(self.batch) and callable(self.sample_tasks)
        values, units = self.state_values, self.state_units
        of_state = {len(each) for each in (values, *(units or ())) if each is not None}
        checks = (
            (re.fullmatch(r"\w[\w.+ -]*", str(self.name)), "its name: letters, digits, ._+-"),
            (all(isinstance(n, int) and n > 0 for n in sizes), "its sizes: positive whole numbers"),
            (len(self.task_low) == len(self.task_high) > 0, "task_low, task_high: one per number"),
            (all(-np.inf < a <= b < np.inf for a, b in limits), "its limits: finite, low <= high"),
            (functions, "batch and sample_tasks must be functions"),
            (of_state <= {self.state_dim}, "state_values, state_units: one per number of a state"),
            (units is None or (len(units) == 2 and all(units[1])), "state_units: no unit may be 0"),
            (self.reward_scale, "its reward_scale must not be 0"),
            (self.teacher in ("sac", "ppo", "rule"), "its teacher must be sac, ppo or rule"),
            (self.teacher != "rule" or self.collect_task, "a rule needs collect_task"),
            (self.teacher != "sac" or not self.discrete_actions, "SAC needs continuous actions"),
        )
        for holds, wrong in checks:
            if not holds:
                raise ValueError(f"family '{self.name}': {wrong}")


# --------------------------------------------------------------------------------- finding a family
def load(where: str):
    """The object that "module:NAME" names; its module is imported now."""
    module, name = where.split(":")
    return getattr(importlib.import_module(module), name)


def later(where: str) -> Callable:
    """The function that "module:NAME" names; its module is imported when it is called."""
    return lambda *args, **options: load(where)(*args, **options)


@cache
def get_family(env: str) -> Family:
    """A family by its name, or by the path of a Python file that holds one.

    Raises ValueError with one line for an unknown name (and lists the known ones), and for a file
    that cannot be run or does not hold exactly one `Family`.
    """
    if env in FAMILIES:
        return load(FAMILIES[env])
    if not env.endswith(".py"):
        names = ", ".join(sorted(FAMILIES))
        raise ValueError(f"unknown environment '{env}': choose one of {names}, or a .py file")
    held = vars(run_file(env, "env")).values()
    families = {id(value): value for value in held if isinstance(value, Family)}
    if len(families) != 1:
        raise ValueError(
            f"--env {env}: it must hold exactly one envs.Family, as families/point_robot.py does; "
            f"it holds {len(families) or 'none'}"
        )
    return families.popitem()[1]


# ------------------------------------------------------------------------------------------ playing
def make_batch(env: str, tasks, seed: int = 0) -> Batch:
    """N tasks as one environment; `seed`: of the starts. ValueError: the user's is no `Batch`."""
    family = get_family(env)
    try_family(env)
    batch = family.batch(tasks, seed)
    batch.family = family
    if not family.can_succeed:
        batch.success = None
    return batch


@cache
def try_family(env: str) -> None:
    """Plays some tasks of a user's family: what is wrong shows here, not hours later in a network.

    Raises ValueError with one line.
    """
    if env.endswith(".py"):
        family, rng = get_family(env), np.random.default_rng(0)
        rows = 2 + (family.state_dim == 2)  # or states (ds, N) would have the right shape
        check_batch(env, family, sample_tasks(env, rows, rng), _random_actions(family, rows, rng))


def make_env(env: str, task) -> gym.Env:
    """The Gymnasium environment of one task, truncated at the horizon. ValueError: no such task."""
    family = get_family(env)
    if family.gym_id:
        return gym.make(family.gym_id, task=task)
    return gym.wrappers.TimeLimit(SingleTask(family, task), family.horizon)


class SingleTask(gym.Env):
    """One task of any family as a Gymnasium environment: a batch of one row. It never ends."""

    def __init__(self, family: Family, task):
        self.task = check_task(family, task)
        self.batch = family.batch([self.task], 0)
        self.can_succeed = family.can_succeed
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (family.state_dim,), np.float32)
        if family.state_values:
            self.observation_space = gym.spaces.MultiDiscrete(list(family.state_values))
        self.action_space = gym.spaces.Box(-1, 1, (family.action_dim,), np.float32)
        if family.discrete_actions:
            self.action_space = gym.spaces.Discrete(family.action_dim)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.batch.rng = self.np_random  # Gymnasium's own generator: `seed` fixes the starts
        return self._observation(self.batch.reset()), {}

    def step(self, action):
        states, rewards = self.batch.step(np.asarray(action)[None])
        info = {"success": float(self.batch.success[0])} if self.can_succeed else {}
        return self._observation(states), float(rewards[0]), False, False, info

    def _observation(self, states: np.ndarray) -> np.ndarray:
        return states[0].astype(self.observation_space.dtype)  # a copy


# -------------------------------------------------------------------------------------------- tasks
def check_task(family: Family, task) -> list:
    """A task as a list of plain numbers; raises ValueError with one line if it does not fit."""
    if family.check_task:
        return family.check_task(task)
    count, limits = family.task_numbers, (family.task_low, family.task_high)
    numbers = task if isinstance(task, (list, tuple, np.ndarray)) else [task]
    # compared as Python does: of any size, and NaN fits nowhere
    if len(numbers) != count or not all(
        isinstance(v, (int, float, np.number)) and not isinstance(v, bool) and low <= v <= high
        for v, low, high in zip(numbers, *limits, strict=True)
    ):
        low, high = (np.round(limit[:3], 3).tolist() for limit in limits)
        raise ValueError(
            f"a task of {family.name} is {count} number{'s' * (count > 1)} from {low} to {high}, "
            f"not {str(task)[:60]}"
        )
    return [float(v) for v in numbers]


def check_tasks(env: str, tasks) -> list:
    """Tasks as lists of plain numbers; raises ValueError, naming the first that does not fit."""
    return [check_task(get_family(env), task) for task in tasks]


def sample_tasks(env: str, count: int, rng: np.random.Generator) -> list:
    """`count` tasks of the family's distribution (App. D.1), rounded to 4 decimals."""
    family = get_family(env)
    shape = (count, family.task_numbers)
    with users_code(env):
        tasks = np.asarray(family.sample_tasks(count, rng))
    if tasks.size != np.prod(shape) or tasks.dtype.kind not in "uif":
        raise ValueError(f"sample_tasks of {env}: {tasks.dtype} {tasks.shape}, not numbers {shape}")
    return np.round(tasks.reshape(shape), 4).tolist()


def split_tasks(
    env: str, seed: int = 0, file: str | Path | None = None, train: int = 0, test: int = 0
) -> tuple[list, list]:
    """(training, held-out) tasks: the seeded split of App. D.1, or those of a JSON file
    `{"train": [task, ...], "test": [task, ...]}`. `train`, `test`: how many; 0 the paper's number.

    The training tasks of a seed do not depend on how many are held out. Raises ValueError with one
    line when there are not that many; when the file cannot be read, lacks a list or holds a task
    that does not fit the family; and when a task is held out that is also trained on.
    """
    family = get_family(env)
    if file is not None:
        where = f'{file} must hold {{"train": [...], "test": [...]}}: '
        lists = validated(TaskFile, read_json(Path(file)), where)
        split = check_split(env, lists.train, lists.test, str(file))
        for tasks in split:
            if twice := [task for i, task in enumerate(tasks) if task in tasks[:i]]:
                raise ValueError(f"{file} names {twice[0]} twice")
        return split
    train, test = train or family.train_tasks, test or family.test_tasks
    if family.split_tasks:
        with users_code(env):
            split = family.split_tasks(seed, train, test)
        return check_split(env, *split, env)
    trained = sample_tasks(env, train, np.random.default_rng([seed, 0]))
    rng = np.random.default_rng([seed, 1])  # a random stream of their own
    held_out = sample_tasks(env, test, rng)
    # Rounded numbers can meet: what is trained on is not held out, and is drawn again.
    for _ in range(1000):
        if not any(task in trained for task in held_out):
            return check_split(env, trained, held_out, env)
        again = sample_tasks(env, test, rng)
        held_out = [b if a in trained else a for a, b in zip(held_out, again, strict=True)]
    raise ValueError(f"{env} has too few different tasks to hold out {test} of them")


@dataclass(frozen=True)
class TaskFile:
    """What a JSON file of tasks holds."""

    train: Annotated[list[Any], MinLen(1)]
    test: Annotated[list[Any], MinLen(1)]


def check_split(env: str, train: list, test: list, where: str) -> tuple[list, list]:
    """Training and held-out tasks as `check_tasks` gives them.

    Raises ValueError, with one line that begins with `where`, for a task that does not fit, and for
    one that is held out and trained on.
    """
    try:
        train, test = check_tasks(env, train), check_tasks(env, test)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if both := set(map(tuple, test)) & set(map(tuple, train)):
        raise ValueError(f"{where} holds out {list(min(both))}, which is also a training task")
    return train, test


# -------------------------------------------------------------------------------- reference returns
def optimal_returns(env: str, tasks) -> np.ndarray | None:
    """Best attainable return of each task (N,) where it is known in closed form, else None."""
    closed_form = get_family(env).optimal_returns
    return None if closed_form is None else _of_each_task(closed_form, env, tasks)


def random_returns(env: str, tasks, episodes: int = 20) -> np.ndarray:
    """Expected return (N,) of the policy that draws every action uniformly: exact where the family
    says it, else the mean of so many episodes a task (the same ones every time).
    """
    family, rows = get_family(env), [task for task in tasks for _ in range(episodes)]
    if family.random_returns is not None:
        return _of_each_task(family.random_returns, env, tasks)
    batch = make_batch(env, rows, seed=0)
    # Not the starts' stream: an action would continue in the direction in which its start lies.
    rng = np.random.default_rng(1)
    batch.reset()
    total = np.zeros(len(rows))
    for _ in range(family.horizon):
        total += batch.step(_random_actions(family, len(rows), rng))[1]
    return total.reshape(len(tasks), episodes).mean(1)


def _of_each_task(returns: Callable[[list], np.ndarray], env: str, tasks) -> np.ndarray:
    with users_code(env):
        found = np.asarray(returns(tasks))
    if found.shape != (len(tasks),):
        raise ValueError(f"{env}: returns of {len(tasks)} tasks have shape {found.shape}")
    return found


def _random_actions(family: Family, rows: int, rng: np.random.Generator) -> np.ndarray:
    if family.discrete_actions:
        return rng.integers(family.action_dim, size=rows)
    return rng.uniform(-1, 1, (rows, family.action_dim)).astype(np.float32)


def demo() -> None:
    """Prints a line for every family, and a room."""
    for name in FAMILIES:
        held_out = split_tasks(name)[1]
        best, floor = optimal_returns(name, held_out), random_returns(name, held_out, 2).mean()
        best = "unknown" if best is None else f"{best.mean():.2f}"
        tasks = f"{len(held_out):>3} held-out tasks, first {held_out[0][:3]!s:<26}"
        print(f"{name:<22}{tasks}optimum {best}, random {floor:.2f}")
    print(make_env("darkroom", split_tasks("darkroom")[1][0]).unwrapped.render())


if __name__ == "__main__":
    # The families import this file as `envs`, and their Family is that copy's, not __main__'s.
    importlib.import_module("envs").demo()
