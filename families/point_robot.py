"""point_robot.py: Point-Robot (paper App. D.1), the shortest family: read it before you write one.

A point walks on a plane towards a goal that it is not told; only rewards tell it.

in : tasks (N goals of two numbers), actions (N, 2)      out: states (N, 2), rewards (N,)
Read after envs.py, which says what a `Family` and its batch must be.

    start       anywhere in [-0.1, 0.1]^2
    step        p' = p + 0.1 clip(a, -1, 1)         20 of them, no walls
    reward      -|p' - g|                           p place, a action, g goal

Differs from the paper: goals lie in [-1, 1]^2, as in the official code (the paper: "unit square").
"""

from __future__ import annotations

import numpy as np

from envs import Family, SingleTask

HORIZON = 20
REACH = 0.1  # the largest move along an axis in a step, and half a side of the starting square


# -------------------------------------------------------------------------------------------- rules
def point_robot_move(places: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Places (..., 2) after actions (..., 2) in [-1, 1] (clipped): a full action moves by 0.1."""
    return places + REACH * np.clip(actions, -1, 1)


def point_robot_reward(places, goals):
    """-|p' - g| for places (..., 2) after a step and goals (..., 2): (...)."""
    return -(((places - goals) ** 2).sum(-1) ** 0.5)


class BatchedPointRobot:
    """N tasks stepped at once: states (N, 2) float32, actions (N, 2) -> rewards (N,) float32."""

    def __init__(self, tasks, seed: int = 0):
        self.goals, self.rng = np.asarray(tasks, float), np.random.default_rng(seed)

    def reset(self) -> np.ndarray:
        # in float64, as it walks on: only what is seen is float32, what a network reads
        self.places = self.rng.uniform(-REACH, REACH, self.goals.shape)
        return self.places.astype(np.float32)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.places = point_robot_move(self.places, np.asarray(actions, float))
        # The goal is in the reward alone: a state says nothing of the task.
        rewards = point_robot_reward(self.places, self.goals)
        self.outcome = self.places.astype(np.float32)  # all that a reward needs beside the goal
        return self.outcome, rewards.astype(np.float32)


def sample_goals(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 2), uniform."""
    return rng.uniform(-1, 1, (count, 2))


# ------------------------------------------------------------------------------------- closed forms
def point_robot_teacher(places: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """The optimal action (..., 2): straight to the goal, at most 0.1 along each axis, then stay."""
    return np.clip((goals - places) / REACH, -1, 1)


def point_robot_optimum(tasks) -> np.ndarray:
    """Best expected return of each goal (N,): the teacher's, averaged over a fine grid of starts.

    Both axes shrink as fast as they can, so the distance is the least possible at every step.
    """
    side = REACH * ((np.arange(20) + 0.5) / 10 - 1)  # midpoints of 20 equal parts
    starts = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    goals = np.asarray(tasks, float)[:, None]
    places = np.broadcast_to(starts, (len(goals), *starts.shape))
    total = np.zeros(places.shape[:2])  # (N, 400): a return for each goal and start
    for _ in range(HORIZON):
        places = point_robot_move(places, point_robot_teacher(places, goals))
        total -= np.linalg.norm(places - goals, axis=-1)
    return total.mean(1)


# --------------------------------------------------------------------------------------- the family
POINT_ROBOT = Family(
    name="point-robot",
    horizon=HORIZON,
    state_dim=2,
    action_dim=2,
    train_tasks=45,
    test_tasks=5,
    task_low=(-2.0, -2.0),  # wider than the distribution: a test may ask for farther goals
    task_high=(2.0, 2.0),
    batch=BatchedPointRobot,
    sample_tasks=sample_goals,
    optimal_returns=point_robot_optimum,
    reward=point_robot_reward,
    # The rule above is optimal, but the paper's data are made by a policy that learns (App. D.2).
    teacher="sac",
    gym_id="t2mir/PointRobot-v0",
    paper_return={"T2MIR-AD": -5.2, "T2MIR-DPT": -5.0, "AD": -5.6, "DPT": -5.8},
)


class PointRobot(SingleTask):
    """One task, registered as `t2mir/PointRobot-v0`. Raises ValueError for a goal that is none."""

    def __init__(self, task=(0.5, 0.5)):
        super().__init__(POINT_ROBOT, task)
