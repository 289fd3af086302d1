"""DarkRoom and Point-Robot (paper App. D.1): rules and closed-form returns; of every family: tasks, splits, horizon.

Run: pytest tests/test_envs.py
"""

import json
import warnings
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy.stats import kstest

import envs
from collect import CollectConfig
from config import Config
from envs import (
    CLUSTERS,
    FAMILIES,
    check_tasks,
    get_family,
    make_batch,
    make_env,
    optimal_returns,
    random_returns,
    sample_tasks,
    split_tasks,
    task_limits,
)
from families.rooms import (
    BatchedDarkRoom,
    BatchedPointRobot,
    PointRobot,
    darkroom_expert,
    darkroom_noisy_return,
    darkroom_optimum,
    point_robot_expert,
    point_robot_optimum,
)

CELLS = [[x, y] for x in range(10) for y in range(10)]
RIGHT, LEFT, UP, DOWN, STAY = range(5)


def play(goals, policy):
    """Returns (N,) of `policy(cells, goals) -> actions` in the batched room."""
    env, goals = BatchedDarkRoom(goals), np.asarray(goals)
    cells, total = env.reset(), 0
    for _ in range(100):
        cells, rewards = env.step(policy(cells, goals))
        total = total + rewards
    return total


# --------------------------------------------------------------------------------------------- rules
@pytest.mark.parametrize("unwrap", [False, True])
def test_gymnasium_accepts_the_environment(unwrap):
    env = gym.make("t2mir/DarkRoom-v0", task=[3, 4], render_mode="ansi")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(env.unwrapped if unwrap else env)


def test_episode_is_truncated_after_100_steps_and_never_terminated():
    env = gym.make("t2mir/DarkRoom-v0", task=[1, 0])
    env.reset(seed=0)
    ends = [env.step(RIGHT)[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]
    assert get_family("darkroom").horizon == 100


def test_batched_room_equals_single_rooms_for_every_goal():
    rng = np.random.default_rng(0)
    batch = make_batch("darkroom", CELLS)
    singles = [gym.make("t2mir/DarkRoom-v0", task=goal) for goal in CELLS]
    for _ in range(2):  # the second episode starts in the corner again
        np.testing.assert_array_equal(batch.reset(), [env.reset()[0] for env in singles])
        for _ in range(100):
            actions = rng.choice(5, size=100, p=[0.3, 0.15, 0.3, 0.15, 0.1])
            cells, rewards = batch.step(actions)
            steps = [env.step(a) for env, a in zip(singles, actions, strict=True)]
            np.testing.assert_array_equal(cells, [s[0] for s in steps])
            np.testing.assert_array_equal(rewards, [s[1] for s in steps])


def test_rules_by_hand():
    env = gym.make("t2mir/DarkRoom-v0", task=[1, 1]).unwrapped
    assert env.reset()[0].tolist() == [0, 0]
    script = [
        (LEFT, [0, 0], 0),  # walls clip
        (DOWN, [0, 0], 0),
        (UP, [0, 1], 0),
        (RIGHT, [1, 1], 1),  # the reward is that of the cell after the move
        (STAY, [1, 1], 1),
        (DOWN, [1, 0], 0),
        *[(RIGHT, [x, 0], 0) for x in (2, 3, 4, 5, 6, 7, 8, 9, 9)],
        *[(UP, [9, y], 0) for y in (1, 2, 3, 4, 5, 6, 7, 8, 9, 9)],
    ]
    for action, cell, reward in script:
        observation, paid, *_ = env.step(action)
        assert (observation.tolist(), paid) == (cell, reward)


def test_goal_in_the_corner_pays_from_the_first_step():
    assert BatchedDarkRoom([[0, 0]]).step(np.array([STAY]))[1] == [1]
    assert play([[0, 0]], lambda cells, goals: np.array([STAY])) == [100]
    assert play([[1, 0]], lambda cells, goals: np.array([RIGHT if cells[0, 0] == 0 else STAY])) == [
        100
    ]


def test_stepping_does_not_change_cells_that_were_handed_out():
    env = BatchedDarkRoom([[5, 5]])
    first = env.reset()
    second, _ = env.step(np.array([RIGHT]))
    env.step(np.array([UP]))
    assert (first.tolist(), second.tolist()) == ([[0, 0]], [[1, 0]])


# -------------------------------------------------------------------------------------- closed forms
def test_expert_walks_along_x_then_y_then_stays():
    goal = np.array([4, 4])
    cells = np.array([[1, 9], [7, 0], [4, 1], [4, 6], [4, 4]])
    assert darkroom_expert(cells, goal).tolist() == [RIGHT, LEFT, UP, DOWN, STAY]


def test_optimum_is_what_the_expert_collects():
    np.testing.assert_array_equal(darkroom_optimum(CELLS), play(CELLS, darkroom_expert))
    np.testing.assert_array_equal(optimal_returns("darkroom", CELLS), darkroom_optimum(CELLS))
    assert darkroom_optimum([[0, 0], [0, 1], [9, 9]]).tolist() == [100, 100, 83]
    assert darkroom_optimum(CELLS).mean() == pytest.approx(91.99)


@pytest.mark.parametrize("eps", [1.0, 0.5])
def test_noisy_return_is_that_of_simulated_experts(eps):
    rng, repeats = np.random.default_rng(0), 400
    goals = np.repeat(CELLS, repeats, axis=0)

    def policy(cells, goals):
        noisy = rng.random(len(cells)) < eps
        return np.where(noisy, rng.integers(5, size=len(cells)), darkroom_expert(cells, goals))

    returns = play(goals, policy).reshape(100, repeats)
    exact = darkroom_noisy_return(CELLS, [eps])[:, 0]
    error = returns.std(1) / np.sqrt(repeats)
    assert abs(returns.mean() - exact.mean()) < 4 * np.sqrt((error**2).sum()) / 100
    seen = error > 0  # the random walk hardly ever meets the far corner
    assert seen.sum() >= 95
    assert (abs(returns.mean(1) - exact)[seen] < 6 * error[seen] + 0.05).all()


def test_noisy_return_at_its_ends():
    curve = darkroom_noisy_return(CELLS, [0.0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(curve[:, 0], darkroom_optimum(CELLS))
    np.testing.assert_allclose(curve[:, 4], random_returns("darkroom", CELLS))
    assert (np.diff(curve, axis=1) < 0).all()  # more noise never pays
    assert curve[:, 4].sum() == pytest.approx(
        100
    )  # a random walk is in exactly one cell at each step


# -------------------------------------------------------------------------------------- Point-Robot
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
    env.place = np.zeros(2)
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
        np.testing.assert_allclose(observation, place, atol=1e-12)
        assert reward == pytest.approx(-np.sqrt(squared), abs=1e-12)
        assert type(reward) is float and (terminated, truncated) == (False, False)
    env.place = np.array([5.0, 5.0])  # there are no walls
    assert env.step(np.ones(2))[0].tolist() == [5.1, 5.1]


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
            env.place = place.copy()
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


def test_points_optimum_is_what_the_expert_collects():
    returns = walk(GOALS, point_robot_expert, 20_000)
    error = returns.std(1) / np.sqrt(20_000)
    found = point_robot_optimum(GOALS)
    assert (abs(returns.mean(1) - found) < 4 * error + 1e-4).all() and (error < 0.01).all()
    np.testing.assert_array_equal(optimal_returns("point-robot", GOALS), found)
    assert (
        found.shape == (5,) and (np.diff(found[[2, 4, 0, 1, 3]]) < 0).all()
    )  # nearer goals are worth more
    # from the middle: 0.9, 0.8, ... 0.1, 0 and then there; starts to the left and right cost and save the same
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
def test_nothing_near_the_expert_is_better(worse, share):
    """On the same starts, episode by episode; worse in at least such a share of them."""
    rng = np.random.default_rng(0)
    best = walk(GOALS, point_robot_expert, 300)
    other = walk(GOALS, lambda places, goals: worse(point_robot_expert(places, goals), rng), 300)
    assert (other <= best + 1e-5).all()
    assert (other < best - 1e-3).mean() >= share


# ----------------------------------------------------------------------------------------- every family
needs_metaworld = pytest.mark.skipif(
    find_spec("metaworld") is None, reason="Meta-World is not installed"
)
EVERY = [
    pytest.param(env, marks=[needs_metaworld] * (get_family(env).teacher == "ppo"))
    for env in FAMILIES
]


@pytest.mark.parametrize("env", EVERY)
def test_facts_are_those_of_the_environment(env):
    """Both of them: sizes, limits, and that an episode is truncated at the horizon and never terminated."""
    spec, task = get_family(env), split_tasks(env)[1][0]
    single, batch = make_env(env, task), make_batch(env, [task] * 3)
    if spec.discrete_actions:
        assert single.action_space.n == spec.action_dim
        actions = np.zeros(3, int)
    else:
        assert single.action_space.shape == (spec.action_dim,)
        assert (single.action_space.low == -1).all() and (single.action_space.high == 1).all()
        actions = np.zeros((3, spec.action_dim), np.float32)
    states = batch.reset()
    assert single.observation_space.shape == single.reset(seed=0)[0].shape == (spec.state_dim,)
    assert states.shape == batch.step(actions)[0].shape == (3, spec.state_dim)
    assert (batch.success is not None) == spec.success
    assert [single.step(actions[0])[2:4] for _ in range(spec.horizon)] == [(False, False)] * (
        spec.horizon - 1
    ) + [(False, True)]
    assert len(task) == spec.task_numbers == len(task_limits(env)[0])


def test_facts_are_the_papers():
    """App. D.1: horizon, states, actions, training and held-out tasks."""
    numbers = {
        env: (s.horizon, s.state_dim, s.action_dim, s.train_tasks, s.test_tasks, s.teacher)
        for env, s in FAMILIES.items()
    }
    assert numbers == {
        "darkroom": (100, 2, 5, 80, 20, "rule"),
        "point-robot": (20, 2, 2, 45, 5, "sac"),
        "cheetah-vel": (200, 20, 6, 45, 5, "sac"),
        "cheetah-vel-3cluster": (200, 20, 6, 42, 6, "sac"),
        "walker-param": (200, 17, 6, 45, 5, "sac"),
        "reach": (100, 18, 4, 45, 5, "ppo"),
        "push": (100, 18, 4, 45, 5, "ppo"),
    }
    table_1 = {
        "darkroom": (90.9, 78.3, 57.5, 72.5), "point-robot": (-5.2, -5.0, -5.6, -5.8),
        "cheetah-vel": (-68.9, -43.2, -119.2, -56.1), "walker-param": (435.7, 492.8, 395.2, 425.9),
        "reach": (823.9, 764.6, 790.4, 754.9), "push": (665.8, 633.2, 604.7, 615.4),
    }  # fmt: skip
    for env, values in table_1.items():
        names = [("ad", "both"), ("dpt", "both"), ("ad", "none"), ("dpt", "none")]
        assert get_family(env).paper_return == dict(zip(names, values, strict=True))


# ---------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize(("env", "low", "high"), [
    ("point-robot", [-1, -1], [1, 1]), ("cheetah-vel", [0.075], [3]), ("walker-param", [-3] * 65, [3] * 65),
    pytest.param("reach", [-0.1, 0.8, 0.05], [0.1, 0.9, 0.3], marks=needs_metaworld),
    pytest.param("push", [-0.1, 0.8], [0.1, 0.9], marks=needs_metaworld),
])  # fmt: skip
def test_tasks_are_uniform(env, low, high):
    tasks = sample_tasks(env, 2000, np.random.default_rng(0))
    assert all(
        type(v) is float and v == round(v, 4) for task in tasks for v in task
    )  # plain JSON numbers
    tasks, low, high = np.array(tasks), np.array(low), np.array(high)
    assert tasks.shape == (2000, len(low))
    assert (tasks >= low).all() and (tasks <= high).all()
    for column, a, b in zip(tasks.T, low, high, strict=True):
        assert kstest(column, "uniform", (a, b - a)).pvalue > 1e-4
    if len(low) > 1:
        assert abs(np.corrcoef(tasks.T) - np.eye(len(low))).max() < 0.13
    assert check_tasks(env, tasks) == tasks.tolist()


def test_three_clusters():
    """As many of each; each normal around its own mean."""
    tasks = np.array(sample_tasks("cheetah-vel-3cluster", 60_000, np.random.default_rng(0)))[:, 0]
    assert CLUSTERS == (0.5, 1.5, 2.5)
    for i, mean in enumerate(CLUSTERS):
        assert kstest(tasks[i::3], "norm", (mean, 0.15)).pvalue > 1e-4
        assert tasks[i::3].std() == pytest.approx(0.15, rel=0.02)
    for part, each in zip(split_tasks("cheetah-vel-3cluster"), (14, 2), strict=True):
        nearest = abs(np.array(part) - CLUSTERS).argmin(1)
        assert np.bincount(nearest).tolist() == [each] * 3


@pytest.mark.parametrize("env", EVERY)
def test_split_of_every_family(env):
    spec, (train, test) = get_family(env), split_tasks(env, 3)
    assert (len(train), len(test)) == (spec.train_tasks, spec.test_tasks)
    assert check_tasks(env, train + test) == train + test and json.loads(json.dumps(train)) == train
    assert not [task for task in test if task in train]
    assert (
        split_tasks(env, 3) == (train, test)
        and split_tasks(env, 4)[0] != train
        and split_tasks(env, 4)[1] != test
    )
    for few in (1, 7):  # the training tasks stay when other numbers are held out
        other = split_tasks(env, 3, test=few)
        assert other[0] == train and len(other[1]) == few
    fewer = split_tasks(env, 3, train=9)
    assert fewer[0] == train[:9] and len(fewer[1]) == spec.test_tasks


@pytest.mark.parametrize("seed", [27, 118])
def test_no_task_is_trained_on_and_held_out(seed):
    """In these draws one velocity of the three clusters falls on both sides; it alone is drawn anew."""
    env, counts = "cheetah-vel-3cluster", (42, 6)
    drawn = [sample_tasks(env, n, np.random.default_rng([seed, i])) for i, n in enumerate(counts)]
    both = [task in drawn[0] for task in drawn[1]]
    assert sum(both) == 1
    train, test = split_tasks(env, seed)
    assert train == drawn[0] and not [task for task in test if task in train]
    assert [one == other for one, other in zip(test, drawn[1], strict=True)] == [
        not b for b in both
    ]
    assert abs(test[both.index(True)][0] - CLUSTERS[both.index(True) % 3]) < 0.75
    assert split_tasks(env, seed) == (train, test)


@pytest.mark.parametrize("env", ["darkroom", "point-robot"])
@pytest.mark.parametrize("counts", [{"train": -1}, {"test": -1}])
def test_negative_numbers_of_tasks_are_refused(env, counts):
    with pytest.raises(ValueError, match="must not be negative") as error:
        split_tasks(env, **counts)
    assert "\n" not in str(error.value)


def test_a_room_has_no_more_than_its_cells():
    assert [len(part) for part in split_tasks("darkroom", train=99, test=1)] == [99, 1]
    with pytest.raises(ValueError, match="a room has 100 cells: 81 training and 20"):
        split_tasks("darkroom", train=81)


BAD_TASKS = [
    ("point-robot", [0.1]), ("point-robot", [0.1, 0.2, 0.3]), ("point-robot", 0.5), ("point-robot", [0.1, np.nan]),
    ("point-robot", [np.inf, 0]), ("point-robot", [2.1, 0]), ("point-robot", ["0.1", "0.2"]), ("point-robot", "ab"),
    ("point-robot", [0.1, None]), ("point-robot", [[0.1], [0.2]]), ("point-robot", [True, False]),
    ("point-robot", {"x": 0.1, "y": 0.2}), ("point-robot", None), ("point-robot", [0.1, 1j]),
    ("cheetah-vel", []), ("cheetah-vel", [-np.inf]), ("cheetah-vel", "1"), ("cheetah-vel", [11]),
    ("point-robot", [0, -2.1]),
    ("cheetah-vel-3cluster", [1.0, 2.0]), ("cheetah-vel-3cluster", [None]),
    ("walker-param", [0.0] * 64), ("walker-param", [0.0] * 66), ("walker-param", [0.0] * 64 + [3.01]),
    pytest.param("reach", [0, 0.85, 0.31], marks=needs_metaworld), pytest.param("push", [0], marks=needs_metaworld),
]  # fmt: skip


@pytest.mark.parametrize(("env", "bad"), BAD_TASKS)
def test_wrong_task_is_one_line(env, bad):
    good = sample_tasks(env, 2, np.random.default_rng(0))
    assert check_tasks(env, good) == good
    with pytest.raises(ValueError, match=rf"a task of {env} is \d+ numbers? from .* not ") as error:
        check_tasks(env, [*good, bad])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert str(bad)[:20] in str(error.value)


def test_tasks_in_other_clothes():
    """Numbers instead of lists of one, integers, arrays: plain lists of plain numbers come back."""
    assert check_tasks("cheetah-vel", [1, 2.5, [np.float32(0.5)]]) == [[1.0], [2.5], [0.5]]
    found = check_tasks("point-robot", np.array([[1, 0], [-2, 2]]))
    assert found == [[1.0, 0.0], [-2.0, 2.0]] and all(
        type(v) is float for task in found for v in task
    )
    found = check_tasks("darkroom", np.array([[1, 0]]))
    assert found == [[1, 0]] and all(type(v) is int for task in found for v in task)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"train": [[0.1, 0.2]], "test": [[0.1]]}',
            r"a task of point-robot is 2 numbers from .*, not \[0.1\]",
        ),
        ('{"train": [[0.1, NaN]], "test": [[0.1, 0.3]]}', r"not \[0.1, nan\]"),
        ('{"train": [[0.1, 0.2], [0.1, 0.2]], "test": [[0.1, 0.3]]}', r"names \[0.1, 0.2\] twice"),
        ('{"train": [[0.1, 0.2]], "test": [[0.1, 0.3], [0.1, 0.3]]}', r"names \[0.1, 0.3\] twice"),
        ('{"train": [[0.1, 0]], "test": [[0.3, 0.1], [0.1, 0.0]]}', r"holds out \[0.1, 0.0\]"),
        ('{"train": "ab", "test": [[0.1, 0.3]]}', "not a"),
        ('{"train": {"a": 1}, "test": [[0.1, 0.3]]}', "not a"),
    ],
)
def test_bad_task_file_of_a_continuous_family_is_one_line(tmp_path, text, message):
    file = tmp_path / "goals.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        split_tasks("point-robot", file=file)
    assert "\n" not in str(error.value)


def test_task_file_of_a_continuous_family(tmp_path):
    file = tmp_path / "goals.json"
    file.write_text('{"train": [0.5, [1]], "test": [2.25]}')
    assert split_tasks("cheetah-vel", file=file, seed=5) == ([[0.5], [1.0]], [[2.25]])


# ------------------------------------------------------------------------------------ reference returns
@pytest.mark.parametrize("env", EVERY)
def test_random_returns_are_the_same_every_time(env):
    tasks = split_tasks(env)[0][:2]
    found = random_returns(env, tasks, 3)
    assert found.shape == (2,) and np.isfinite(found).all() and found[0] != found[1]
    first = found.copy()
    found += 1  # the caller's own
    np.testing.assert_array_equal(random_returns(env, np.array(tasks).tolist(), 3), first)
    envs._random_returns.cache_clear()
    np.testing.assert_array_equal(random_returns(env, tasks, 3), first)


def test_random_returns_are_those_of_uniform_actions():
    rng = np.random.default_rng(5)
    returns = walk(GOALS, lambda places, goals: rng.uniform(-1, 1, places.shape), 2000)
    error = returns.std(1) * np.sqrt(1 / 2000 + 1 / 500)
    assert (abs(random_returns("point-robot", GOALS, 500) - returns.mean(1)) < 4.5 * error).all()
    assert (random_returns("point-robot", GOALS) < point_robot_optimum(GOALS) - 3).all()


def test_optimum_is_unknown_where_it_is():
    unknown = [
        env
        for env in FAMILIES
        if env != "reach" and optimal_returns(env, [[0] * get_family(env).task_numbers]) is None
    ]
    assert unknown == ["cheetah-vel", "cheetah-vel-3cluster", "walker-param", "push"]


# ------------------------------------------------------------------------------------ split and files
def test_split_is_80_20_and_covers_the_room():
    train, test = split_tasks("darkroom", seed=0)
    assert (len(train), len(test)) == (80, 20)
    assert sorted(train + test) == CELLS  # so the two are disjoint
    assert split_tasks("darkroom", seed=0) == (train, test)
    assert sorted(split_tasks("darkroom", seed=1)[1]) != sorted(test)
    assert all(type(v) is int for task in train + test for v in task)  # plain JSON numbers


def test_task_file_is_read(tmp_path):
    file = tmp_path / "goals.json"
    file.write_text(json.dumps({"train": [[1, 2], [3, 4]], "test": [[0, 9]]}))
    assert split_tasks("darkroom", file=file) == ([[1, 2], [3, 4]], [[0, 9]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the task file"),
        ("{", "must hold"),
        ("[1, 2]", "must hold"),
        ('{"train": [[1, 2]]}', "must hold.*test"),
        ('{"train": 5, "test": [[1, 2]]}', "must hold"),
        ('{"train": [], "test": [[1, 2]]}', "no train tasks"),
        ('{"train": [[1, 2]], "test": []}', "no test tasks"),
        ('{"train": [[1, 2]], "test": [[1, 10]]}', r"whole numbers from 0 to 9, not \[1, 10\]"),
        ('{"train": [[-1, 2]], "test": [[1, 1]]}', r"not \[-1, 2\]"),
        ('{"train": [[1.5, 2]], "test": [[1, 1]]}', r"not \[1.5, 2\]"),
        ('{"train": [[1, 2, 3]], "test": [[1, 1]]}', r"not \[1, 2, 3\]"),
        ('{"train": [["1", "2"]], "test": [[1, 1]]}', "whole numbers"),
        ('{"train": [7], "test": [[1, 1]]}', "not 7"),
        ('{"train": [[1, 2], [3, 4]], "test": [[3, 4]]}', r"holds out \[3, 4\]"),
    ],
)
def test_bad_task_file_is_one_line(tmp_path, text, message):
    file = tmp_path / "goals.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        split_tasks("darkroom", file=file)
    assert "\n" not in str(error.value)


def test_bad_goal_is_refused_by_the_environment():
    with pytest.raises(ValueError, match="whole numbers from 0 to 9"):
        gym.make("t2mir/DarkRoom-v0", task=[0, 10])


@pytest.mark.parametrize("call", [get_family, split_tasks, lambda env: make_batch(env, [[1, 1]])])
def test_unknown_environment_lists_the_known_ones(call):
    with pytest.raises(ValueError, match=r"unknown environment .dark..*darkroom"):
        call("dark")


def test_default_split_is_the_first_with_the_papers_optimum():
    """Table 1's 90.9 is the optimum of its held-out goals, which the paper does not list."""
    optima = [
        darkroom_optimum(split_tasks("darkroom", seed)[1]).mean()
        for seed in range(Config.task_seed + 1)
    ]
    assert optima[-1] == pytest.approx(90.9)
    assert min(abs(np.array(optima[:-1]) - 90.9)) > 1e-6
    assert Config.task_seed == CollectConfig.task_seed
