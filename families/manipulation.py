"""manipulation.py: Reach and Push of Meta-World (paper App. D.1), one task or many at once.

A task is a goal: Reach `[x, y, z]`, where the hand must go; Push `[x, y]`, where on the table the
puck must go. In all tasks the puck and the hand start at the same place.

in : tasks; actions (4,) or (N, 4), clipped to [-1, 1]: the hand's move along x, y, z and the
     gripper's effort
out: states (18,) float64 or (N, 18) float32: hand (3), gripper opening, puck's position (3) and
     quaternion (4), zeros (7); rewards up to 10 a step; `success`: the hand (Reach) or the puck
     (Push) within 5 cm of the goal
Read after point_robot.py.      Try: python -m families.manipulation   (speeds)

Physics, starting state and constants are the library's. What its step does around the physics is
rewritten, since that took most of the time: MuJoCo's arrays are looked up once, rewards are plain
floats, and a reset restores the simulator's state instead of moving the hand there again.
tests/test_manipulation.py steps both side by side.

Differs from the library's ML1 benchmark: the puck's start does not vary (as in the paper); the
observation is the first 18 of 39 numbers (the others are the last observation and zeros for the
goal); no limit of 500 steps.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import replace
from functools import partial

import gymnasium as gym
import mujoco
import numpy as np
from metaworld.envs.sawyer_push_v3 import SawyerPushEnvV3
from metaworld.envs.sawyer_reach_v3 import SawyerReachEnvV3
from metaworld.policies import SawyerPushV3Policy
from metaworld.sawyer_xyz_env import SawyerXYZEnv
from metaworld.utils.reward_utils import hamacher_product

from envs import Family, check_task

# Lowest and highest corner of the goals: the library's `goal_space`.
REACH_GOALS = ((-0.1, 0.8, 0.05), (0.1, 0.9, 0.3))
PUSH_GOALS = ((-0.1, 0.8), (0.1, 0.9))  # without z, which is that of the puck at the start
FULL = 10.0  # reward of a step that ends in success, and of no other
# All that the future depends on, the solver's warm start included.
STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)


# --------------------------------------------------------- the library's arithmetic in plain floats
def distance(a, b) -> float:
    """Between two points. Not math.dist, whose last bit differs from numpy's norm."""
    return math.sqrt(sum([(p - q) * (p - q) for p, q in zip(a, b, strict=True)]))


def long_tail(x: float, low: float, high: float, margin: float) -> float:
    """`reward_utils.tolerance`: 1 for low <= x <= high, 0.1 at a distance `margin` from there."""
    if low <= x <= high:
        return 1.0
    return 1 / (((low - x if x < low else x - high) / margin * 3.0) ** 2 + 1) if margin else 0.0


def quaternion(matrix) -> tuple[float, float, float, float]:
    """(x, y, z, w) of a rotation matrix, nine numbers by row; scipy's `as_quat`, signs included."""
    a, b, c, d, e, f, g, h, i = matrix
    trace = a + e + i
    largest = max(a, e, i, trace)
    if largest == a:
        x, y, z, w = 1 - trace + 2 * a, d + b, g + c, h - f
    elif largest == e:
        x, y, z, w = d + b, 1 - trace + 2 * e, h + f, c - g
    elif largest == i:
        x, y, z, w = g + c, h + f, 1 - trace + 2 * i, d - b
    else:
        x, y, z, w = h - f, c - g, d - b, 1 + trace
    norm = math.sqrt(x * x + y * y + z * z + w * w)
    return x / norm, y / norm, z / norm, w / norm


# ------------------------------------------------------ what a step earns, in whichever task it was
def near(gap, margin):
    """`long_tail` of distances to a goal, arrays: 1 up to 5 cm, 0.1 at `margin` from there."""
    return 1 / (((gap - 0.05).clip(0) / margin * 3.0) ** 2 + 1)


def reach_reward(outcome, tasks):
    """Where the fingers are (..., 3), goals (..., 3) -> (...)."""
    gap = ((outcome - tasks) ** 2).sum(-1) ** 0.5
    x, y, z = tasks[..., 0], tasks[..., 1] - 0.6, tasks[..., 2] - 0.2  # from the hand's start
    return FULL * near(gap, (x**2 + y**2 + z**2) ** 0.5)


def reach_lesson(outcome, tasks):
    """What one teacher is paid: as `reach_reward`, but best in the goal, not up to 5 cm from it.

    Where it is paid alike within 5 cm it stops at their edge, and who imitates it just outside.
    """
    gap = ((outcome - tasks) ** 2).sum(-1) ** 0.5
    return FULL / ((gap / 0.1) ** 2 + 1)


def push_reward(outcome, tasks):
    """Outcomes (..., 5), goals (..., 2) -> (...).

    An outcome is how far the puck is from its start (3), what the fingers' grasp earns, and whether
    (1 or 0) the puck is held: only then its way to the goal counts.
    """
    held, grasp = outcome[..., 4], outcome[..., 3]
    x, y = tasks[..., 0], tasks[..., 1] - 0.6  # of the goal, from the puck's start
    off = (outcome[..., 0] - x) ** 2 + (outcome[..., 1] - y) ** 2 + outcome[..., 2] ** 2
    gap, margin = off**0.5, (x**2 + y**2) ** 0.5
    there = gap < 0.05
    return FULL * there + ~there * (grasp + held * (1.0 + grasp + 5.0 * near(gap, margin)))


# ----------------------------------------------------------------------------------------- one task
class Manipulation(SawyerXYZEnv):
    """What Reach and Push share; comes before the library's class in their bases."""

    def __init__(self, family: Family, task, render_mode: str | None = None):
        self.family, self.task = family, check_task(family, task)
        super().__init__(render_mode=render_mode)
        model, data = self.model, self.data
        whole = self.observation_space
        self.observation_space = gym.spaces.Box(whole.low[:18], whole.high[:18], dtype=np.float64)
        self._hand_bounds = list(
            zip(self._HAND_SPACE.low.tolist(), self._HAND_SPACE.high.tolist(), strict=True)
        )
        # The library's way to say which task it is: this vector in place of a random draw.
        self._set_task_called, self._freeze_rand_vec = True, True
        self._last_rand_vec = np.array([*self.init_config["obj_init_pos"], *self.task, 0.0][:6])
        mujoco.mj_resetData(model, data)
        self.reset_model()
        # MuJoCo never moves these arrays, so views of them stay valid.
        self._hand, self._puck = data.body("hand").xpos, data.body("obj").xpos
        self._right_claw, self._left_claw = data.body("rightclaw").xpos, data.body("leftclaw").xpos
        self._right_pad, self._left_pad = data.body("rightpad").xpos, data.body("leftpad").xpos
        self._right_finger = data.site("rightEndEffector").xpos
        self._left_finger = data.site("leftEndEffector").xpos
        self._puck_matrix = data.geom("objGeom").xmat
        self._mocap, self._ctrl = data.mocap_pos[0], data.ctrl
        self._puck_start, self._tcp_start = self.obj_init_pos.tolist(), self.init_tcp.tolist()
        self._start = self._save(np.empty(mujoco.mj_stateSize(model, STATE)))

    def _save(self, state: np.ndarray) -> np.ndarray:
        mujoco.mj_getState(self.model, self.data, state, STATE)
        return state

    def _load(self, state: np.ndarray):
        mujoco.mj_setState(self.model, self.data, state, STATE)

    def __reduce__(self):
        # The library's own pickling makes new MuJoCo arrays; the views would stay with the old.
        return type(self), (self.task, self.render_mode), self._save(np.empty_like(self._start))

    def __setstate__(self, state: np.ndarray):
        self._load(state)
        mujoco.mj_forward(self.model, self.data)  # places the bodies, and changes the warm start
        self._load(state)

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.__setstate__(self._start)
        return np.array(self._observe()), {}

    def step(self, action):
        command = self._commands(action)
        self._advance(*command)
        observation = self._observe()
        outcome = np.array(self._outcome(observation, command[3]))
        reward = float(self.family.reward(outcome, np.array(self.task)))
        return np.array(observation), reward, False, False, {"success": float(reward == FULL)}

    def _commands(self, actions) -> list:
        """Clipped actions (..., 4), the first three in metres; float32 as in the library."""
        commands = np.clip(np.asarray(actions, np.float32), -1, 1)
        commands[..., :3] *= self.action_scale
        return commands.tolist()

    def _advance(self, dx: float, dy: float, dz: float, grip: float):
        moved = np.maximum(np.add(self._mocap, (dx, dy, dz)), self.mocap_low)
        self._mocap[:] = np.minimum(moved, self.mocap_high)
        self._ctrl[:] = grip, -grip
        mujoco.mj_step(self.model, self.data, self.frame_skip)
        # mj_kinematics would be enough to place the bodies, but mj_forward also sets the solver's
        # warm start, and the library's next step begins from that.
        mujoco.mj_forward(self.model, self.data)

    def _observe(self) -> list[float]:
        hand = [
            min(max(p, low), high)
            for p, (low, high) in zip(self._hand.tolist(), self._hand_bounds, strict=True)
        ]
        opening = min(distance(self._right_claw.tolist(), self._left_claw.tolist()) / 0.1, 1.0)
        return [
            *hand,
            opening,
            *self._puck.tolist(),
            *quaternion(self._puck_matrix.tolist()),
            *[0.0] * 7,
        ]

    def _outcome(self, observation: list[float], grip: float) -> list[float]:
        """All that the reward needs of a step beside the goal."""
        raise NotImplementedError

    def _tcp(self) -> list[float]:
        """The point between the fingers."""
        fingers = zip(self._right_finger.tolist(), self._left_finger.tolist(), strict=True)
        return [(right + left) / 2 for right, left in fingers]


class Reach(Manipulation, SawyerReachEnvV3):
    """Bring the hand to `task` [x, y, z]. `t2mir/Reach-v0` truncates after 100 steps, this never.

    Raises ValueError for a goal outside `REACH_GOALS`.
    """

    def __init__(self, task=(0.0, 0.85, 0.175), render_mode: str | None = None):
        super().__init__(REACH, task, render_mode)

    def _outcome(self, observation: list[float], grip: float) -> list[float]:
        return self._tcp()


class Push(Manipulation, SawyerPushEnvV3):
    """Push the puck to `task` [x, y] on the table. `t2mir/Push-v0` truncates after 100 steps, this
    never. Raises ValueError for a goal outside `PUSH_GOALS`.
    """

    def __init__(self, task=(0.0, 0.85), render_mode: str | None = None):
        super().__init__(PUSH, task, render_mode)

    def _outcome(self, observation: list[float], grip: float) -> list[float]:
        tcp, puck, start = self._tcp(), observation[4:7], self._puck_start
        # Caging: both pads beside the puck along y, the fingers above it in the x-z plane; and then
        # closing.
        beside = [
            long_tail(abs(pad - puck[1]), 0.015, 0.05, abs(abs(pad - start[1]) - 0.05))
            for pad in (float(self._left_pad[1]), float(self._right_pad[1]))
        ]
        above_margin = distance(start[::2], self._tcp_start[::2]) - 0.005
        above = long_tail(distance(tcp[::2], puck[::2]), 0, 0.005, above_margin)
        caging = hamacher_product(hamacher_product(*beside), above)
        closing = max(0.0, grip) if caging > 0.97 else 0.0
        grasp = hamacher_product(caging, closing) + caging
        held = distance(puck, tcp) < 0.02 and observation[3] > 0
        return [*(p - q for p, q in zip(puck, start, strict=True)), grasp, float(held)]


# --------------------------------------------------------------------------------------- many tasks
class BatchedManipulation:
    """N tasks stepped at once: states (N, 18) float32, actions (N, 4) -> rewards (N,) float32.

    `success` (N,) tells which tasks succeeded at any step of the running episode. Nothing is
    random; `seed` is there for the interface.

    One simulator serves all rows in turn; a row is the 276 numbers of its state. To load and save
    them takes a fiftieth of a step, while a simulator for every row would reserve 15 MB. Physics is
    nine tenths of a step, so observations stay those of the single task, row by row.
    """

    single: type[Reach | Push]

    def __init__(self, tasks, seed: int = 0):
        self.simulator = self.single(tasks[0])
        self.goals = np.array(tasks, float)
        self.rows = np.empty((len(tasks), self.simulator._start.size))
        self.reset()

    def reset(self) -> np.ndarray:
        self.rows[:] = self.simulator._start
        self.success = np.zeros(len(self.rows), bool)
        return np.tile(self.simulator.reset()[0].astype(np.float32), (len(self.rows), 1))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        env, states, outcomes = self.simulator, [], []
        for row, command in zip(self.rows, env._commands(actions), strict=True):
            env._load(row)
            env._advance(*command)
            env._save(row)
            states.append(env._observe())
            outcomes.append(env._outcome(states[-1], command[3]))
        outcome = np.array(outcomes)
        rewards = env.family.reward(outcome, self.goals)
        self.success |= rewards == FULL
        self.outcome = outcome.astype(np.float32)
        return np.array(states, np.float32), rewards.astype(np.float32)


class BatchedReach(BatchedManipulation):
    single = Reach


class BatchedPush(BatchedManipulation):
    single = Push


# ------------------------------------------------------------------------------------- the families
def sample_reach_goals(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3), uniform."""
    return rng.uniform(*REACH_GOALS, (count, 3))


def sample_push_goals(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 2), uniform."""
    return rng.uniform(*PUSH_GOALS, (count, 2))


def demonstrate_push(states: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """(N, 18), (N, 2) -> (N, 4): the library's own policy for Push. It returns 703 on average."""
    observations = np.zeros((len(states), 39))  # the library's, of which the policy reads
    observations[:, :18], observations[:, 36:38] = states, goals
    observations[:, 38] = 0.02  # on the table, as the puck lies
    with warnings.catch_warnings(action="ignore"):  # it asks for more than the bounds below allow
        actions = [SawyerPushV3Policy().get_action(observation) for observation in observations]
    return np.clip(actions, -1, 1).astype(np.float32)


REACH = Family(
    name="reach",
    horizon=100,
    state_dim=18,
    action_dim=4,
    train_tasks=45,
    test_tasks=5,
    task_low=REACH_GOALS[0],
    task_high=REACH_GOALS[1],
    batch=BatchedReach,
    sample_tasks=sample_reach_goals,
    reward=reach_reward,
    lesson=reach_lesson,
    # Hand and puck are at most decimetres from where they start, and centimetres decide.
    state_units=(
        (0.0, 0.6, 0.2, 0.5, 0.0, 0.6, 0.02, *[0.0] * 11),
        (0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1, *[1.0] * 11),
    ),
    reward_scale=10.0,
    can_succeed=True,
    teacher="ppo",
    gym_id="t2mir/Reach-v0",
    paper_return={"T2MIR-AD": 823.9, "T2MIR-DPT": 764.6, "AD": 790.4, "DPT": 754.9},
)

PUSH = replace(
    REACH,
    name="push",
    task_low=PUSH_GOALS[0],
    task_high=PUSH_GOALS[1],
    batch=BatchedPush,
    sample_tasks=sample_push_goals,
    reward=push_reward,
    lesson=None,
    demonstrate=demonstrate_push,
    gym_id="t2mir/Push-v0",
    paper_return={"T2MIR-AD": 665.8, "T2MIR-DPT": 633.2, "AD": 604.7, "DPT": 615.4},
)


def _speed(step, actions) -> str:
    start = time.perf_counter()
    for action in actions:
        step(action)
    return f"{actions.size / 4 / (time.perf_counter() - start):.0f}"


if __name__ == "__main__":
    noise = np.random.default_rng(0).uniform(-1, 1, (100, 20, 4)).astype(np.float32)
    for name, single, batched in ("reach", Reach, BatchedReach), ("push", Push, BatchedPush):
        plain = _speed(partial(SawyerXYZEnv.step, single()), noise[:, 0])
        fast = _speed(single().step, noise[:, 0])
        many = _speed(batched([single().task] * 20).step, noise)
        print(f"{name}: {plain} steps/s as the library steps, {fast} here, {many} in a batch of 20")
