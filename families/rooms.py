"""rooms.py: DarkRoom and Point-Robot, rules and closed forms (paper App. D.1).

in : tasks, goals (N, 2)                out: states (N, 2), rewards (N,)
Read after envs.py.

DarkRoom           10 x 10 cells, 100 steps from the corner; reward 1 in every step that ends at the goal.
Point-Robot        a plane, 20 steps of at most 0.1 along each axis; reward minus the distance to the goal.

Differs from the paper: Point-Robot's goals lie in [-1, 1]^2 as published (the paper says unit square).
Differs from the official code: its DarkRoom-DPT configuration is a 9x9 room with 20 steps; the paper's
room (10x10, 100 steps) is used for both backbones.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from envs import check_tasks, get_family

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
    expert_to = np.take_along_axis(
        np.broadcast_to(after @ [SIDE, 1], (len(goals), SIDE**2, 5)), best[..., None], 2
    )
    expert_walk = np.zeros((len(goals), SIDE**2, SIDE**2))
    np.put_along_axis(expert_walk, expert_to, 1.0, 2)
    goal_id = goals @ [SIDE, 1]
    here = np.zeros((len(goals), len(eps), SIDE**2))
    here[..., 0] = 1.0  # every episode starts in the corner
    total = np.zeros((len(goals), len(eps)))
    for _ in range(get_family("darkroom").horizon):
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
            raise ValueError(
                f"a DarkRoom goal is two whole numbers from 0 to {SIDE - 1}, not {task}"
            )
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

    spec = get_family("darkroom")
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
    for _ in range(get_family("point-robot").horizon):
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

    spec = get_family("point-robot")
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
