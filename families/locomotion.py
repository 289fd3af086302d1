"""locomotion.py: Cheetah-Vel and Walker-Param (paper App. D.1), on MuJoCo as Gymnasium ships it.

in : tasks, actions (N, 6)     out: states (N, 20) or (N, 17), rewards (N,)
Read after point_robot.py.

Cheetah-Vel     HalfCheetah; a task is the target velocity [v], drawn uniformly or, in the family
                of App. I, around three means. Observation: qpos without x (8), qvel (9), the
                torso's place (3). Reward: -|v_x - v| - 0.05 |a|^2, v_x the mean velocity over
                the step.
Walker-Param    Walker2d that runs on after a fall; a task is 65 exponents u in [-3, 3]: every entry
                of the model's body_mass, body_inertia and geom_friction is multiplied by its own
                1.5^u, every one of dof_damping by 1.3^u. Observation: qpos without x (8), clipped
                qvel (9). Reward: v_x + 1 while healthy - 0.001 |a|^2.

The batched environments step N tasks with one call of `mujoco.rollout`, MuJoCo's own batch stepper:
states are rows of one array, so that a thousand copies cost no more than their numbers.
tools/bench.py compares it with a plain loop and with threads.

Symbols: qpos, qvel = MuJoCo's generalised positions and velocities (nq = nv = 9 numbers of both
robots), v_x velocity along x, a action. Shapes: N rows (tasks), ds numbers of a state.
What the paper leaves open and is chosen here: the weights of the control cost, the bonus for
standing, and how the 65 parameters vary; a test plays the batch beside Gymnasium's own robots.

Differs from Gymnasium's step: torso's place belongs to the new state (Gymnasium's `xpos` lags a
substep behind), and the batched step starts MuJoCo's solver cold instead of from the last solution
(same within its tolerance).
"""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.mujoco_env import expand_model_path
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv
from mujoco.rollout import Rollout

from envs import Family, check_task

FULL = mujoco.mjtState.mjSTATE_FULLPHYSICS
CLUSTERS = (0.5, 1.5, 2.5)  # mean velocities of cheetah-vel-3cluster, deviation 0.15 each
# which arrays of the model a Walker task scales, in the order of its numbers, and the base of each
SCALED = (("body_mass", 1.5), ("body_inertia", 1.5), ("dof_damping", 1.3), ("geom_friction", 1.5))
EXPONENTS = 65  # all entries of these arrays


# ---------------------------------------------------------------------------------------- the rules
def cheetah_observation(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """(..., 9), (..., 9) -> (..., 20). The torso hangs on two slides, x and z, from (0, 0, 0.7)."""
    x, z = qpos[..., :1], qpos[..., 1:2]
    # The torso's place at the end makes 20 numbers, as App. D.1 says; Gymnasium's has 17.
    return np.concatenate([qpos[..., 1:], qvel, x, np.zeros_like(x), z + 0.7], -1)


def cheetah_outcome(velocity, actions) -> np.ndarray:
    """Velocities (...) in m/s, actions (..., 6) -> velocity and control cost, (..., 2)."""
    return np.stack([velocity, 0.05 * np.square(actions).sum(-1)], -1)


def cheetah_reward(outcome, tasks):
    """Outcomes (..., 2), tasks (..., 1) in m/s -> (...)."""
    return -abs(outcome[..., 0] - tasks[..., 0]) - outcome[..., 1]


def walker_observation(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """(..., 9), (..., 9) -> (..., 17)."""
    # without x: how far it has come has no influence on what is to be done
    return np.concatenate([qpos[..., 1:], np.clip(qvel, -10, 10)], -1)


def walker_reward(velocity, qpos, actions) -> np.ndarray:
    """Velocities (...), places (..., 9), actions (..., 6) -> (...).

    The bonus of 1 is taken back where the torso's height leaves (0.8, 2.0) or its angle (-1, 1).
    """
    height, angle = qpos[..., 1], qpos[..., 2]
    healthy = (height > 0.8) & (height < 2.0) & (angle > -1) & (angle < 1)
    return velocity + healthy - 1e-3 * np.square(actions).sum(-1)


def scale_model(model: mujoco.MjModel, task) -> None:
    """Multiply the model's own parameters by those of a Walker task (65 numbers)."""
    used = 0
    for name, base in SCALED:
        array = getattr(model, name)  # a view of the model's own memory: changed in place
        array *= base ** np.reshape(task[used : used + array.size], array.shape)
        used += array.size


def sample_velocities(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.075, 3.0, (count, 1))


def sample_clusters(count: int, rng: np.random.Generator) -> np.ndarray:
    """Task i is of cluster i modulo 3: as many of each."""
    return rng.normal(np.resize(CLUSTERS, count), 0.15)


def sample_exponents(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-3, 3, (count, EXPONENTS))


# --------------------------------------------------------------------------------------- many tasks
class BatchedMuJoCo:
    """N rows, with one model each or one for all. Subclasses say what is seen and what is paid."""

    frame_skip: int  # simulator's steps in one of ours

    def __init__(self, models: list[mujoco.MjModel], rows: int, seed: int, threads: int = 0):
        """`threads` 0: on the calling thread (collection runs one process a core); else as many."""
        self.models, self.rng = models, np.random.default_rng(seed)
        model = models[0]  # of all the same but for masses and the like
        self.nq, self.nv, self.dt = model.nq, model.nv, model.opt.timestep * self.frame_skip
        self.qpos0 = model.qpos0.copy()
        self.datas = [mujoco.MjData(model) for _ in range(max(1, threads))]  # scratch of a thread
        self.rollout = Rollout(nthread=threads)
        size = mujoco.mj_stateSize(model, FULL)
        self.state = np.zeros((rows, size))  # time, qpos, qvel
        self.out = np.zeros((rows, self.frame_skip, size))
        self.sensors = np.zeros((rows, self.frame_skip, model.nsensordata))
        self.warm = np.zeros((rows, model.nv))  # the solver's first guess: none (see the head)

    @property
    def qpos(self) -> np.ndarray:
        return self.state[:, 1 : 1 + self.nq]

    @property
    def qvel(self) -> np.ndarray:
        return self.state[:, 1 + self.nq : 1 + self.nq + self.nv]

    def start(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Random first places (N, nq) and velocities (N, nv)."""
        raise NotImplementedError

    def observe(self) -> np.ndarray:
        """What is seen of the present state: (N, ds)."""
        raise NotImplementedError

    def pay(self, velocity: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Rewards (N,) of a step: mean velocities (N,) along x, clipped actions (N, 6)."""
        raise NotImplementedError

    def reset(self) -> np.ndarray:
        self.state[:] = 0
        self.qpos[:], self.qvel[:] = self.start(len(self.state))
        return self.observe().astype(np.float32)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        actions = np.clip(np.asarray(actions, float), -1, 1)  # the cost is of what the joints get
        before = self.qpos[:, 0].copy()  # a copy: `qpos` is a view of what changes below
        control = np.repeat(actions[:, None], self.frame_skip, 1)  # (N, frame_skip, 6)
        self.rollout.rollout(
            self.models, self.datas, self.state, control, skip_checks=True, nstep=self.frame_skip,
            initial_warmstart=self.warm, state=self.out, sensordata=self.sensors,
        )  # fmt: skip
        self.state[:] = self.out[:, -1]  # after the last of the simulator's steps
        rewards = self.pay((self.qpos[:, 0] - before) / self.dt, actions)
        return self.observe().astype(np.float32), rewards.astype(np.float32)


class BatchedCheetahVel(BatchedMuJoCo):
    """N Cheetahs: states (N, 20) float32, actions (N, 6) -> rewards (N,) float32."""

    frame_skip = 5

    def __init__(self, tasks, seed: int = 0, threads: int = 0):
        self.goals = np.asarray(tasks, float)  # (N, 1)
        # one model for all: tasks differ in the reward alone
        model = mujoco.MjModel.from_xml_path(expand_model_path("half_cheetah.xml"))
        super().__init__([model] * len(tasks), len(tasks), seed, threads)

    def start(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        noise = self.rng.uniform(-0.1, 0.1, (rows, self.nq))
        return self.qpos0 + noise, 0.1 * self.rng.standard_normal((rows, self.nv))

    def observe(self) -> np.ndarray:
        return cheetah_observation(self.qpos, self.qvel)

    def pay(self, velocity: np.ndarray, actions: np.ndarray) -> np.ndarray:
        outcome = cheetah_outcome(velocity, actions)
        self.outcome = outcome.astype(np.float32)
        return cheetah_reward(outcome, self.goals)


class BatchedWalkerParam(BatchedMuJoCo):
    """N Walkers: states (N, 17) float32, actions (N, 6) -> rewards (N,) float32."""

    frame_skip = 4

    def __init__(self, tasks, seed: int = 0, threads: int = 0):
        path, models = expand_model_path("walker2d_v5.xml"), {}
        for task in map(tuple, tasks):
            if task not in models:  # equal tasks share a model
                models[task] = mujoco.MjModel.from_xml_path(path)
                scale_model(models[task], task)
        super().__init__([models[tuple(task)] for task in tasks], len(tasks), seed, threads)

    def start(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        noise = self.rng.uniform(-5e-3, 5e-3, (rows, self.nq + self.nv))
        return self.qpos0 + noise[:, : self.nq], noise[:, self.nq :]

    def observe(self) -> np.ndarray:
        return walker_observation(self.qpos, self.qvel)

    def pay(self, velocity: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return walker_reward(velocity, self.qpos, actions)


# ------------------------------------------------------------------------------------- the families
CHEETAH_VEL = Family(
    name="cheetah-vel",
    horizon=200,
    state_dim=20,
    action_dim=6,
    train_tasks=45,
    test_tasks=5,
    task_low=(-10.0,),  # wider than the distribution: a test may ask for other velocities
    task_high=(10.0,),
    batch=BatchedCheetahVel,
    sample_tasks=sample_velocities,
    reward=cheetah_reward,
    teacher="sac",
    gym_id="t2mir/CheetahVel-v0",
    paper_return={"T2MIR-AD": -68.9, "T2MIR-DPT": -43.2, "AD": -119.2, "DPT": -56.1},
)

CHEETAH_VEL_3CLUSTER = replace(
    CHEETAH_VEL,
    name="cheetah-vel-3cluster",
    train_tasks=42,
    test_tasks=6,
    sample_tasks=sample_clusters,
    paper_return={},
)

WALKER_PARAM = Family(
    name="walker-param",
    horizon=200,
    state_dim=17,
    action_dim=6,
    train_tasks=45,
    test_tasks=5,
    task_low=(-3.0,) * EXPONENTS,
    task_high=(3.0,) * EXPONENTS,
    batch=BatchedWalkerParam,
    sample_tasks=sample_exponents,
    teacher="sac",
    # Height, angles; then velocities, forward, upward and angular: ten times the angles.
    state_units=((1.2, *[0.0] * 16), (0.2, *[0.4] * 7, 1.5, 1.5, *[4.0] * 7)),
    gym_id="t2mir/WalkerParam-v0",
    paper_return={"T2MIR-AD": 435.7, "T2MIR-DPT": 492.8, "AD": 395.2, "DPT": 425.9},
)


# ----------------------------------------------------------------------------------------- one task
class CheetahVel(HalfCheetahEnv):
    """Gymnasium's own Cheetah, `t2mir/CheetahVel-v0` (200 steps): what the batch is tested against.

    Raises ValueError for a task that is not one velocity.
    """

    def __init__(self, task=(1.0,), **options):
        self.velocity = np.array(check_task(CHEETAH_VEL, task))
        super().__init__(**options)
        gym.utils.EzPickle.__init__(self, task, **options)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (20,), np.float64)

    def _get_obs(self):
        return cheetah_observation(self.data.qpos, self.data.qvel)

    def step(self, action):
        return super().step(np.clip(action, -1, 1))

    def _get_rew(self, x_velocity, action):
        return float(cheetah_reward(cheetah_outcome(x_velocity, action), self.velocity)), {}


class WalkerParam(Walker2dEnv):
    """Gymnasium's own Walker, `t2mir/WalkerParam-v0` (200 steps), with the task's parameters.

    Raises ValueError for a task that is not 65 exponents.
    """

    def __init__(self, task=(0.0,) * EXPONENTS, **options):
        task = check_task(WALKER_PARAM, task)
        # runs on after a fall: an episode is 200 steps, whoever plays
        super().__init__(terminate_when_unhealthy=False, **options)
        gym.utils.EzPickle.__init__(self, task, **options)
        scale_model(self.model, task)

    def step(self, action):
        return super().step(np.clip(action, -1, 1))
