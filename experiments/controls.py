"""controls.py: Point-Robot whose controls differ too: tasks that contradict each other.

in : tasks (N goals of two numbers, N controls of 0 to 7)      out: states (N, 2), rewards (N,)
Read after families/point_robot.py.      Use: python train.py --env experiments/controls.py

The paper's reason for a task-wise MoE is that gradients of different tasks fight (Sec. 1, Fig. 7).
In its Point-Robot they agree about nearly everything: wherever the goal is, the action is the way
to it. Here they cannot agree. The two axes may be exchanged, and either turned round: eight
controls, of which the robot is told as little as of its goal. An action that is right in one task
is wrong in another, at the same place and with the same goal; what moved and what was paid say
which.

    step        p' = p + 0.1 clip(a, -1, 1) C      C one of the eight signed exchanges of the axes
    teacher     clip((g - p) / 0.1, -1, 1) C'      exact: C turns the square of actions into itself
    data        a quarter of a task's episodes by its own teacher, the others by other tasks', with
                noise that differs from episode to episode

`python -m experiments.controls 4 > four.json` writes tasks of four of the controls, for --tasks.
Not in the paper: it is here to find out where the experts pay (FINDINGS.md).
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import Literal

import numpy as np
import tyro

from envs import Family, check_task
from families.point_robot import (
    HORIZON,
    BatchedPointRobot,
    point_robot_optimum,
    point_robot_teacher,
    sample_goals,
)

# (8, 2, 2): the axes as they are or exchanged, and the sign of each
CONTROLS = np.array(
    [
        np.diag(signs) @ axes
        for axes in (np.eye(2), np.eye(2)[::-1])
        for signs in product((1, -1), (1, -1))
    ]
)
OWN_SHARE = 0.25  # of a task's episodes


def split(tasks) -> tuple[np.ndarray, np.ndarray]:
    """Tasks (N, 3) -> goals (N, 2), controls (N, 2, 2)."""
    numbers = np.asarray(tasks, float)
    return numbers[:, :2], CONTROLS[numbers[:, 2].astype(int)]


def teacher(places: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """The optimal action (M, 2) at places (M, 2) of tasks (M, 3), or of one task (1, 3) for all:
    Point-Robot's, seen through the controls.
    """
    goals, controls = split(tasks)
    return np.einsum("...i,...ji->...j", point_robot_teacher(places, goals), controls)


class Batch(BatchedPointRobot):
    """N tasks stepped at once."""

    def __init__(self, tasks, seed: int = 0):
        goals, self.controls = split(tasks)
        super().__init__(goals, seed)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # not clipped here: C turns the square into itself, so that to clip before or after is one
        return super().step(np.einsum("ni,nij->nj", actions, self.controls))


def sample(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3): goals as Point-Robot's; the controls in turn, so as many of each."""
    return np.column_stack([sample_goals(count, rng), np.arange(count) % len(CONTROLS)])


def check_numbers(task) -> list[float]:
    """A task as plain numbers; raises ValueError for one beyond the limits or between controls."""
    numbers = check_task(replace(FAMILY, check_task=None), task)
    if numbers[2] % 1:
        raise ValueError(f"the third number of a task of controls must be whole, not {numbers[2]}")
    return numbers


def collect(data, train_tasks: list, index: int) -> dict[str, np.ndarray]:
    """The arrays of training task `index` (data.py says which)."""
    if (data.quality, data.recipe) != ("mixed", "paper"):
        raise ValueError("controls has one kind of data: leave out --quality and --recipe")
    rng = np.random.default_rng([data.data_seed, index])
    episodes, tasks = data.data_episodes, np.asarray(train_tasks, float)
    own = tasks[index : index + 1]  # (1, 3)
    who = np.full(episodes, index)
    others = rng.random(episodes) >= OWN_SHARE
    who[others] = rng.integers(len(tasks), size=others.sum())
    played_for = tasks[who]  # (E, 3): what the teacher of each episode believes
    noise = rng.random(episodes)[:, None]  # the chance of a random action at each step
    room = Batch(np.repeat(own, episodes, 0), seed=int(rng.integers(2**31)))
    steps, places = [], room.reset()
    for _ in range(HORIZON):
        random = rng.uniform(-1, 1, (episodes, 2))
        actions = np.where(rng.random((episodes, 1)) < noise, random, teacher(places, played_for))
        following, rewards = room.step(actions)
        steps.append((places, actions.astype(np.float32), rewards))
        places = following
    states, actions, rewards = (np.stack(column, 1) for column in zip(*steps, strict=True))
    # labels anywhere that anybody has been: the rule knows what to do everywhere
    pick = rng.integers(episodes * HORIZON, size=data.data_queries)
    queries = states.reshape(-1, 2)[pick]
    return {
        "states": states,
        "actions": actions,
        "rewards": rewards,
        "query_states": queries,
        "query_actions": teacher(queries, own).astype(np.float32),
    }


FAMILY = Family(
    name="controls",
    horizon=HORIZON,
    state_dim=2,
    action_dim=2,
    train_tasks=400,
    test_tasks=40,
    task_low=(-2.0, -2.0, 0),
    task_high=(2.0, 2.0, len(CONTROLS) - 1),
    batch=Batch,
    sample_tasks=sample,
    check_task=check_numbers,
    optimal_returns=lambda tasks: point_robot_optimum(np.asarray(tasks)[:, :2]),
    teacher="rule",
    collect_task=collect,
)


def fewer(kinds: tyro.conf.Positional[Literal[1, 2, 4, 8]]) -> dict[str, list]:
    """A split as large as the default one, of the first so many controls alone, with other goals
    for each number, as `--tasks FILE` takes it.
    """
    tasks, sizes = {}, {"train": FAMILY.train_tasks, "test": FAMILY.test_tasks}
    for number, (name, count) in enumerate(sizes.items()):
        drawn = sample(count, np.random.default_rng([kinds, number])).round(4)
        drawn[:, 2] %= kinds
        tasks[name] = drawn.tolist()
    return tasks


if __name__ == "__main__":  # python -m experiments.controls 4 > four.json
    print(json.dumps(tyro.cli(fewer)))
