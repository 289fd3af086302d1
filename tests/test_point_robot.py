"""Point-Robot (paper App. D.1): rules, starts, and the optimum.

Run: pytest tests/test_point_robot.py
"""

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy.stats import kstest

from envs import make_batch, optimal_returns, random_returns
from families.point_robot import (
    BatchedPointRobot,
    PointRobot,
    point_robot_optimum,
    point_robot_teacher,
)

GOALS = [[0.8, -0.3], [-0.5, 0.95], [0.05, 0.02], [-1.0, -1.0], [0.0, 0.6]]


def walk(goals, policy, repeats=1, seed=0):
    """Returns (N, repeats) of `policy(places, goals) -> actions`."""
    many = np.repeat(goals, repeats, axis=0)
    batch = BatchedPointRobot(many, seed)
    batch.reset()
    total = 0.0
    for _ in range(20):
        total = total + batch.step(policy(batch.places, many))[1].astype(float)
    return total.reshape(len(goals), repeats)


def test_gymnasium_accepts_the_point_robot():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(PointRobot([0.3, 0.4]), skip_render_check=True)


def test_point_robot_by_hand():
    env = PointRobot([0.3, 0.4])
    env.reset(seed=0)
    env.batch.places = np.zeros((1, 2))
    script = [
        (
            [1, 0],
            [0.1, 0],
            0.2**2 + 0.4**2,
        ),  # a full action moves by 0.1; the reward is that of the place after it
        ([0.5, -0.25], [0.15, -0.025], 0.15**2 + 0.425**2),
        ([7, 3], [0.25, 0.075], 0.05**2 + 0.325**2),  # clipped, each axis by itself
        ([-np.inf, 1], [0.15, 0.175], 0.15**2 + 0.225**2),
        ([0, 0], [0.15, 0.175], 0.15**2 + 0.225**2),
    ]
    for action, place, squared in script:
        observation, reward, terminated, truncated, _ = env.step(np.array(action))
        np.testing.assert_allclose(env.batch.places[0], place, atol=1e-12)
        np.testing.assert_array_equal(observation, env.batch.places[0].astype(np.float32))
        assert reward == np.float32(-np.sqrt(squared))
        assert type(reward) is float and (terminated, truncated) == (False, False)
    env.batch.places = np.array([[5.0, 5.0]])  # there are no walls
    env.step(np.ones(2))
    assert env.batch.places.tolist() == [[5.1, 5.1]]


def test_batched_points_equal_single_ones():
    rng, batch, envs = (
        np.random.default_rng(0),
        make_batch("point-robot", GOALS, 4),
        [PointRobot(g) for g in GOALS],
    )
    for _ in range(2):
        states = batch.reset()
        for env, place in zip(envs, batch.places, strict=True):
            env.reset()
            env.batch.places = place[None].copy()
        for _ in range(20):
            actions, before = rng.uniform(-1.5, 1.5, (5, 2)).astype(np.float32), states.copy()
            after, rewards = batch.step(actions)
            np.testing.assert_array_equal(states, before)  # what was handed out does not change
            steps = [env.step(action) for env, action in zip(envs, actions, strict=True)]
            np.testing.assert_allclose(after, [s[0] for s in steps], rtol=0, atol=1e-6)
            np.testing.assert_allclose(rewards, [s[1] for s in steps], rtol=0, atol=1e-6)
            states = after
        assert (
            states.dtype == rewards.dtype == np.float32
            and rewards.shape == (5,)
            and batch.success is None
        )


def test_points_start_anywhere_in_the_square():
    batch, env = BatchedPointRobot([[0.5, 0.5]] * 5000, seed=1), PointRobot()
    singles = np.array([env.reset(seed=seed)[0] for seed in range(1000)])
    for places in (batch.reset(), singles, batch.reset()):
        assert 0.099 < abs(places).max() <= 0.1 + 1e-8
        assert all(kstest(column, "uniform", (-0.1, 0.2)).pvalue > 1e-4 for column in places.T)
        assert abs(np.corrcoef(places.T)[0, 1]) < 0.1
    np.testing.assert_array_equal(env.reset(seed=3)[0], singles[3])
    again, other = (BatchedPointRobot([[0.5, 0.5]] * 3, seed).reset() for seed in (1, 2))
    np.testing.assert_array_equal(
        again, BatchedPointRobot([[0.1, 0.2]] * 3, 1).reset()
    )  # whatever the goal
    assert (again != other).all()


def test_goal_of_the_point_is_not_in_the_observation():
    batch = BatchedPointRobot(GOALS)
    batch.reset()
    batch.places[:] = 0.03
    for action in np.random.default_rng(0).uniform(-1, 1, (20, 2)):
        states, rewards = batch.step(np.tile(action, (5, 1)))
        np.testing.assert_array_equal(states, states[:1].repeat(5, 0))
        assert len(set(rewards.tolist())) == 5  # but it is in the reward


def test_points_optimum_is_what_the_teacher_collects():
    returns = walk(GOALS, point_robot_teacher, 20_000)
    error = returns.std(1) / np.sqrt(20_000)
    found = point_robot_optimum(GOALS)
    assert (abs(returns.mean(1) - found) < 4 * error + 1e-4).all() and (error < 0.01).all()
    np.testing.assert_array_equal(optimal_returns("point-robot", GOALS), found)
    assert (
        found.shape == (5,) and (np.diff(found[[2, 4, 0, 1, 3]]) < 0).all()
    )  # nearer goals are worth more
    # from the middle: 0.9, 0.8, ... 0.1, 0 and then there; starts to the left cost what those to
    # the right save
    assert point_robot_optimum([[1.0, 0.0]]) == pytest.approx(-4.5, abs=0.05)


@pytest.mark.parametrize(
    ("worse", "share"),
    [
        (lambda best, rng: 0.95 * best, 0.98),
        (lambda best, rng: best + rng.normal(0, 0.1, best.shape), 0.98),
        (
            lambda best, rng: best / np.maximum(np.linalg.norm(best, axis=1, keepdims=True), 1),
            0.8,
        ),  # no axis faster
        (
            lambda best, rng: np.where(
                rng.random(best.shape) < 0.1, rng.uniform(-1, 1, best.shape), best
            ),
            0.9,
        ),
        (lambda best, rng: 2 * best, 0.98),  # overshoots
    ],
)
def test_nothing_near_the_teacher_is_better(worse, share):
    """On the same starts, episode by episode; worse in at least such a share of them."""
    rng = np.random.default_rng(0)
    best = walk(GOALS, point_robot_teacher, 300)
    other = walk(GOALS, lambda places, goals: worse(point_robot_teacher(places, goals), rng), 300)
    assert (other <= best + 1e-5).all()
    assert (other < best - 1e-3).mean() >= share


def test_random_returns_are_those_of_uniform_actions():
    rng = np.random.default_rng(5)
    returns = walk(GOALS, lambda places, goals: rng.uniform(-1, 1, places.shape), 2000)
    error = returns.std(1) * np.sqrt(1 / 2000 + 1 / 500)
    assert (abs(random_returns("point-robot", GOALS, 500) - returns.mean(1)) < 4.5 * error).all()
    assert (random_returns("point-robot", GOALS) < point_robot_optimum(GOALS) - 3).all()
