"""Cheetah-Vel and Walker-Param (paper App. D.1): MuJoCo's own numbers, rewards by hand, batches
equal to single tasks.

Run: pytest tests/test_locomotion.py
"""

import copy
import pickle
import warnings

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy.stats import kstest

from envs import make_batch, make_env, sample_tasks
from families.locomotion import (
    SCALED,
    BatchedCheetahVel,
    BatchedWalkerParam,
    CheetahVel,
    WalkerParam,
    cheetah_observation,
    walker_observation,
    walker_reward,
)

WALKERS = sample_tasks("walker-param", 3, np.random.default_rng(0))
PLAIN = [0.0] * 65
FAMILIES = [
    (CheetahVel, BatchedCheetahVel, [[0.5], [1.5], [2.5]]),
    (WalkerParam, BatchedWalkerParam, WALKERS),
]
SIZES = {"body_mass": 8, "body_inertia": 24, "dof_damping": 9, "geom_friction": 24}


def actions_of(rng, steps, rows=None, scale=1.0):
    return rng.uniform(-scale, scale, (steps, 6) if rows is None else (steps, rows, 6)).astype(
        np.float32
    )


# ------------------------------------------------------------------------------------------ cheetah
def test_cheetah_observation_is_mujocos_state():
    env, rng = CheetahVel([1.0]), np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    for action in [None, *actions_of(rng, 60)]:
        if action is not None:
            observation = env.step(action)[0]
        data = copy.copy(env.data)
        mujoco.mj_forward(env.model, data)  # places of the bodies of this state
        torso = data.body("torso").xpos
        assert observation.shape == (20,)
        np.testing.assert_array_equal(observation[:8], env.data.qpos[1:])
        np.testing.assert_array_equal(observation[8:17], env.data.qvel)
        np.testing.assert_allclose(observation[17:], torso, rtol=0, atol=1e-12)
    assert abs(torso[0]) > 0.05 and abs(torso[2] - 0.7) > 0.01


def test_cheetah_reward_by_hand():
    env, rng = CheetahVel([0.8]), np.random.default_rng(0)
    env.reset(seed=0)
    faster = 0
    for action in actions_of(rng, 100):
        before = env.data.qpos[0]
        _, reward, terminated, truncated, _ = env.step(action)
        velocity = (env.data.qpos[0] - before) / 0.05  # 5 substeps of 0.01 s
        cost = sum(float(a) ** 2 for a in action)
        assert reward == pytest.approx(-abs(velocity - 0.8) - 0.05 * cost, abs=1e-6)
        assert type(reward) is float and (terminated, truncated) == (False, False)
        faster += velocity > 0.8
    assert 0 < faster < 100  # from both sides


def test_cheetah_velocity_of_no_force_and_one():
    """What standing still is paid, and what a full action costs."""
    env = CheetahVel([2.0])
    env.reset(seed=0)
    env.set_state(env.init_qpos, np.zeros(9))
    for _ in range(40):  # it comes to rest on the ground
        _, reward, *_ = env.step(np.zeros(6))
    assert reward == pytest.approx(-2.0, abs=0.05)
    rest = env.data.qpos.copy(), env.data.qvel.copy()
    env.step(np.ones(6))
    moved = (env.data.qpos[0] - rest[0][0]) / 0.05
    env.set_state(*rest)
    assert env.step(np.ones(6))[1] == pytest.approx(-abs(moved - 2) - 0.3, abs=1e-6)


# ------------------------------------------------------------------------------------------- walker
def test_walker_observation_is_mujocos_state():
    env, rng = WalkerParam(WALKERS[0]), np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    fast = False
    for action in [None, *actions_of(rng, 100)]:
        if action is not None:
            observation = env.step(action)[0]
        assert observation.shape == (17,)
        np.testing.assert_array_equal(observation[:8], env.data.qpos[1:])
        np.testing.assert_array_equal(observation[8:], np.clip(env.data.qvel, -10, 10))
        fast |= abs(env.data.qvel).max() > 10
    assert fast  # the clip was seen


def test_walker_reward_by_hand():
    env, rng = WalkerParam(PLAIN), np.random.default_rng(0)
    env.reset(seed=0)
    bonuses = []
    for action in abs(actions_of(rng, 300)):
        before = env.data.qpos[0]
        _, reward, terminated, truncated, _ = env.step(action)
        velocity = (env.data.qpos[0] - before) / 0.008  # 4 substeps of 0.002 s
        bonuses.append(reward - velocity + 1e-3 * sum(float(a) ** 2 for a in action))
        _, height, angle = env.data.qpos[:3]
        assert bonuses[-1] == pytest.approx(float(0.8 < height < 2 and -1 < angle < 1), abs=1e-6)
        assert isinstance(reward, float) and (terminated, truncated) == (False, False)
    assert round(bonuses[0]) == 1 and round(bonuses[-1]) == 0  # it fell and went on


@pytest.mark.parametrize(
    ("height", "angle", "bonus"),
    [
        (1.2, 0, 1),
        (0.79, 0, 0),
        (0.81, 0, 1),
        (1.99, 0, 1),
        (2.01, 0, 0),
        (1.2, 0.99, 1),
        (1.2, 1.01, 0),
        (1.2, -1.01, 0),
    ],
)
def test_walker_is_healthy_between_the_limits(height, angle, bonus):
    qpos = np.array([7.0, height, angle] + [0.0] * 6)
    assert walker_reward(3.0, qpos, np.full(6, 0.5)) == pytest.approx(3 + bonus - 1.5e-3)
    env = WalkerParam(PLAIN)
    env.set_state(qpos, np.zeros(9))
    assert env.is_healthy == bool(bonus)  # the library's rule


@pytest.mark.parametrize("batched", [False, True])
def test_fallen_walker_goes_on_to_the_end(batched):
    """200 steps whatever happens; lying on the ground it earns no bonus."""
    places, rewards, ends = [], [], []
    if batched:
        batch = BatchedWalkerParam([PLAIN])
        batch.reset()
        for _ in range(200):
            rewards.append(batch.step(np.ones((1, 6)))[1][0])
            places.append(batch.qpos[0].copy())
    else:
        env = make_env("walker-param", PLAIN)
        env.reset(seed=0)
        for _ in range(200):
            _, reward, *end, _ = env.step(np.ones(6, np.float32))
            rewards.append(reward)
            ends.append(end)
            places.append(env.unwrapped.data.qpos.copy())
        assert ends == [[False, False]] * 199 + [[False, True]]
    places = np.array(places)
    bonus = rewards[1:] - np.diff(places[:, 0]) / 0.008 + 6e-3
    np.testing.assert_allclose(bonus, (places[1:, 1] > 0.8) & (abs(places[1:, 2]) < 1), atol=1e-4)
    assert bonus[0] > 0.5 and (bonus[-10:] < 0.5).all()


# --------------------------------------------------------------------------- a task's own simulator
def test_walker_task_scales_the_simulators_own_parameters():
    library = gym.make("Walker2d-v5").unwrapped.model
    envs = [WalkerParam(task) for task in (*WALKERS, PLAIN)]
    batch = BatchedWalkerParam([*WALKERS, PLAIN])
    for i, task in enumerate((*WALKERS, PLAIN)):
        first = 0
        for name, size in SIZES.items():
            original, exponents = getattr(library, name), np.array(task[first : first + size])
            expected = original * (1.3 if name == "dof_damping" else 1.5) ** exponents.reshape(
                original.shape
            )
            for model in (envs[i].model, batch.models[i]):
                np.testing.assert_allclose(getattr(model, name), expected, rtol=1e-14, atol=0)
            if task is not PLAIN:
                assert (getattr(envs[i].model, name) != original)[original != 0].all()
            first += size
        assert first == len(task) == 65
    assert (library.body_mass[1:] > 0).all() and (library.dof_damping[3:] > 0).all()
    assert [name for name, _ in SCALED] == list(SIZES)


def test_nothing_else_of_the_simulator_is_changed():
    library, ours = gym.make("Walker2d-v5").unwrapped.model, WalkerParam(WALKERS[0]).model
    for name in dir(library):
        value = getattr(library, name)
        if isinstance(value, np.ndarray) and name not in SIZES:
            np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)
    assert ours.opt.timestep == library.opt.timestep == 0.002
    np.testing.assert_array_equal(ours.opt.gravity, library.opt.gravity)


@pytest.mark.parametrize(("single", "batched", "tasks"), FAMILIES)
def test_tasks_do_not_touch_each_other(single, batched, tasks):
    """What one environment does is the same whether or not others live beside it."""
    actions = actions_of(np.random.default_rng(0), 30)

    def play(env, between=lambda: None):
        observations = [env.reset(seed=1)[0]]
        for action in actions:
            between()
            observations.append(env.step(action)[0])
        return np.array(observations)

    alone = play(single(tasks[0]))
    env, other, batch = single(tasks[0]), single(tasks[1]), batched(tasks)
    other.reset(seed=2)

    def between():
        other.step(-actions[0])
        batch.step(np.ones((3, 6)))
        other.reset(seed=3)
        batch.reset()

    np.testing.assert_array_equal(play(env, between), alone)
    if single is WalkerParam:
        assert not np.allclose(
            play(single(tasks[1])), alone, atol=1e-3
        )  # another body moves differently


# ---------------------------------------------------------------------------------------- gymnasium
@pytest.mark.parametrize(("single", "batched", "tasks"), FAMILIES)
def test_gymnasium_accepts_the_environment(single, batched, tasks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(single(tasks[0]), skip_render_check=True)


@pytest.mark.parametrize(("single", "batched", "tasks"), FAMILIES)
def test_copies_keep_the_task(single, batched, tasks):
    for duplicate in (copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))):
        env, other = single(tasks[1]), duplicate(single(tasks[1]))
        env.reset(seed=0), other.reset(seed=0)
        for action in actions_of(np.random.default_rng(0), 10):
            ours, theirs = env.step(action), other.step(action)
            np.testing.assert_array_equal(ours[0], theirs[0])
            assert ours[1] == theirs[1]


@pytest.mark.parametrize(("single", "batched", "tasks"), FAMILIES)
def test_actions_out_of_range_are_clipped(single, batched, tasks):
    envs, batches = [single(tasks[0]) for _ in range(2)], [batched(tasks) for _ in range(2)]
    for env in envs:
        env.reset(seed=0)
    for batch in batches:
        batch.reset()
    for action in actions_of(np.random.default_rng(0), 20, scale=3.0):
        clipped = np.clip(action, -1, 1)
        assert (action != clipped).any()
        one, other = envs[0].step(action), envs[1].step(clipped)
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1] == other[1]
        one, other = (
            batch.step(np.tile(a, (3, 1)))
            for batch, a in zip(batches, (action, clipped), strict=True)
        )
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_wrong_task_is_one_line():
    for single, bad in (
        (CheetahVel, [[], [1.0, 2.0], [np.nan], ["1"], [11]]),
        (WalkerParam, [[0.0] * 64, [3.1] * 65]),
    ):
        for task in bad:
            with pytest.raises(ValueError, match=r"a task of .* is .* number") as error:
                single(task)
            assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------- goals
def test_goal_velocity_is_not_in_the_observation():
    envs = [CheetahVel([v]) for v in (0.1, 3.0)]
    batch = BatchedCheetahVel([[0.1], [3.0]])
    start = [env.reset(seed=0)[0] for env in envs]
    np.testing.assert_array_equal(*start)
    batch.reset()
    batch.state[1] = batch.state[0]
    for action in actions_of(np.random.default_rng(0), 50):
        one, other = (env.step(action) for env in envs)
        np.testing.assert_array_equal(one[0], other[0])
        assert abs(one[1] - other[1]) > 0.01  # but it is in the reward
        states, rewards = batch.step(np.tile(action, (2, 1)))
        np.testing.assert_array_equal(*states)
        assert abs(rewards[0] - rewards[1]) > 0.01


def test_walkers_task_is_not_in_the_observation():
    starts = [WalkerParam(task).reset(seed=0)[0] for task in WALKERS]
    np.testing.assert_array_equal(starts, starts[:1] * 3)


# ------------------------------------------------------------------------------------------ batches
@pytest.mark.parametrize(("single", "batched", "tasks"), FAMILIES)
def test_batch_equals_single_tasks(single, batched, tasks):
    """From the same state. The solvers start differently, so that states part slowly within its
    tolerance.
    """
    batch, envs = batched(tasks, seed=5), [single(task) for task in tasks]
    states = batch.reset()
    assert states.dtype == np.float32
    for env, qpos, qvel in zip(envs, batch.qpos, batch.qvel, strict=True):
        env.reset()
        env.set_state(qpos, qvel)
    np.testing.assert_array_equal(states, np.array([env._get_obs() for env in envs], np.float32))
    for step, actions in enumerate(actions_of(np.random.default_rng(0), 20, 3, scale=1.5)):
        before = states.copy()
        after, rewards = batch.step(actions)
        np.testing.assert_array_equal(states, before)  # what was handed out does not change
        steps = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        exact = np.array([[*env.data.qpos, *env.data.qvel] for env in envs])
        ours = np.concatenate([batch.qpos, batch.qvel], 1)
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-9, err_msg=f"step {step}")
        np.testing.assert_allclose(after, [s[0] for s in steps], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rewards, [s[1] for s in steps], rtol=1e-5, atol=1e-4)
        states = after
    assert rewards.dtype == np.float32 and rewards.shape == (3,) and len(set(rewards)) == 3
    assert not np.allclose(states[0], states[1], atol=0.1)


@pytest.mark.parametrize(("single", "batched", "tasks"), FAMILIES)
def test_rows_do_not_depend_on_others_nor_on_threads(single, batched, tasks):
    actions = actions_of(np.random.default_rng(0), 40, 3)
    batch = batched(tasks, seed=5)
    starts = batch.reset()
    played = [batch.step(a) for a in actions]
    start = np.array(batch.state)

    for threads in (1, 3):
        same = batched(tasks, seed=5, threads=threads)
        np.testing.assert_array_equal(same.reset(), starts)
        for a, (states, rewards) in zip(actions, played, strict=True):
            found = same.step(a)
            np.testing.assert_array_equal(found[0], states)
            np.testing.assert_array_equal(found[1], rewards)
        np.testing.assert_array_equal(same.state, start)
    for row in range(3):  # alone, and beside rows that do something else, in another place
        alone, other = batched([tasks[row]]), batched([tasks[1], tasks[row], tasks[2]], seed=8)
        full = batched(tasks, seed=5)
        full.reset(), alone.reset(), other.reset()
        alone.state[:], other.state[1] = full.state[row], full.state[row]
        for a, (states, rewards) in zip(actions, played, strict=True):
            one, two = alone.step(a[[row]]), other.step(np.stack([-a[0], a[row], np.ones(6)]))
            np.testing.assert_array_equal(one[0][0], states[row])
            np.testing.assert_array_equal(two[0][1], states[row])
            assert one[1][0] == two[1][1] == rewards[row]


@pytest.mark.parametrize(("single", "batched", "tasks"), FAMILIES)
def test_seeds(single, batched, tasks):
    """The same starts again; other ones in the next episode, in another row and of another seed."""
    one, same, other = batched(tasks, seed=1), batched(tasks, seed=1), batched(tasks, seed=2)
    first, second = one.reset(), one.reset()
    np.testing.assert_array_equal(first, same.reset())
    same.step(np.ones((3, 6)))
    np.testing.assert_array_equal(
        second, same.reset()
    )  # steps draw nothing and leave nothing behind
    seen = np.concatenate([first, second, other.reset()])
    assert len(np.unique(seen[:, 0])) == 9
    env = single(tasks[0])
    starts = [env.reset(seed=seed)[0] for seed in (1, 2, 1)]
    np.testing.assert_array_equal(starts[0], starts[2])
    assert (starts[0] != starts[1]).any()


@pytest.mark.parametrize("what", ["single", "batched"])
def test_cheetahs_starts(what):
    """Uniform in +-0.1 around the model's own place; velocities are normal with deviation 0.1."""
    if what == "batched":
        batch = BatchedCheetahVel([[1.0]] * 3000)
        batch.reset()
        qpos, qvel = batch.qpos, batch.qvel
    else:
        env = CheetahVel([1.0])
        rows = [
            (env.reset(seed=seed), env.data.qpos.copy(), env.data.qvel.copy())
            for seed in range(300)
        ]
        qpos, qvel = (np.array([row[i] for row in rows]) for i in (1, 2))
    assert abs(qpos).max() <= 0.1 and abs(qpos).max() > 0.0995
    for column in qpos.T:
        assert kstest(column, "uniform", (-0.1, 0.2)).pvalue > 1e-4
    for column in qvel.T:
        assert kstest(column, "norm", (0, 0.1)).pvalue > 1e-4
    assert abs(np.corrcoef(np.hstack([qpos, qvel]).T) - np.eye(18)).max() < 0.3


@pytest.mark.parametrize("what", ["single", "batched"])
def test_walkers_starts(what):
    """Uniform in +-0.005 around the model's own place, standing 1.25 high, and at rest."""
    if what == "batched":
        batch = BatchedWalkerParam([PLAIN] * 3000)
        assert len(set(map(id, batch.models))) == 1  # equal tasks share a model
        batch.reset()
        qpos, qvel = batch.qpos, batch.qvel
    else:
        env = WalkerParam(PLAIN)
        rows = [
            (env.reset(seed=seed), env.data.qpos.copy(), env.data.qvel.copy())
            for seed in range(300)
        ]
        qpos, qvel = (np.array([row[i] for row in rows]) for i in (1, 2))
    around = np.array([0, 1.25] + [0] * 7)
    noise = np.hstack([qpos - around, qvel])
    assert 0.00495 < abs(noise).max() <= 0.005
    for column in noise.T:
        assert kstest(column, "uniform", (-0.005, 0.01)).pvalue > 1e-4
    assert abs(np.corrcoef(noise.T) - np.eye(18)).max() < 0.3


def test_rules_take_any_number_of_rows():
    rng = np.random.default_rng(0)
    qpos, qvel = rng.normal(0, 5, (2, 4, 3, 9))
    for observe, size in ((cheetah_observation, 20), (walker_observation, 17)):
        found = observe(qpos, qvel)
        assert found.shape == (4, 3, size)
        np.testing.assert_array_equal(found[2, 1], observe(qpos[2, 1], qvel[2, 1]))


def test_make_batch_knows_the_families():
    for env, kind, task in (
        ("cheetah-vel", BatchedCheetahVel, [1.0]),
        ("cheetah-vel-3cluster", BatchedCheetahVel, [1.0]),
        ("walker-param", BatchedWalkerParam, PLAIN),
    ):
        batch = make_batch(env, [task], seed=3)
        assert type(batch) is kind and batch.success is None and batch.family.name == env
        np.testing.assert_array_equal(batch.reset(), kind([task], seed=3).reset())
