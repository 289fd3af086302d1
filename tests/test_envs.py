"""Families (paper App. D.1): facts, tasks, splits, reference returns, and those of the user's.

Run: pytest tests/test_envs.py
"""

import json
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
from scipy.stats import kstest

from config import Data
from envs import (
    FAMILIES,
    check_tasks,
    get_family,
    make_batch,
    make_env,
    optimal_returns,
    random_returns,
    sample_tasks,
    split_tasks,
)
from families.darkroom import darkroom_optimum
from families.locomotion import CLUSTERS

CELLS = [[x, y] for x in range(10) for y in range(10)]


# ------------------------------------------------------------------------------------- every family
needs_metaworld = pytest.mark.skipif(
    find_spec("metaworld") is None, reason="Meta-World is not installed"
)
EVERY = [
    pytest.param(env, marks=[needs_metaworld] * (env in ("reach", "push"))) for env in FAMILIES
]


@pytest.mark.parametrize("env", EVERY)
def test_facts_are_those_of_the_environment(env):
    """Both of them: sizes, limits, and that an episode is truncated at the horizon and never
    terminated.
    """
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
    assert (batch.success is not None) == spec.can_succeed and batch.family is spec
    assert [single.step(actions[0])[2:4] for _ in range(spec.horizon)] == [(False, False)] * (
        spec.horizon - 1
    ) + [(False, True)]
    assert len(task) == spec.task_numbers == len(spec.task_high)


def test_facts_are_the_papers():
    """App. D.1: horizon, states, actions, training and held-out tasks."""
    numbers = {
        env: (s.horizon, s.state_dim, s.action_dim, s.train_tasks, s.test_tasks, s.teacher)
        for env, s in zip(FAMILIES, map(get_family, FAMILIES), strict=True)
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
        names = ["T2MIR-AD", "T2MIR-DPT", "AD", "DPT"]
        assert get_family(env).paper_return == dict(zip(names, values, strict=True))


# -------------------------------------------------------------------------------------------- tasks
REACH = ("reach", [-0.1, 0.8, 0.05], [0.1, 0.9, 0.3])
PUSH = ("push", [-0.1, 0.8], [0.1, 0.9])


@pytest.mark.parametrize(
    ("env", "low", "high"),
    [
        ("point-robot", [-1, -1], [1, 1]),
        ("cheetah-vel", [0.075], [3]),
        ("walker-param", [-3] * 65, [3] * 65),
        pytest.param(*REACH, marks=needs_metaworld),
        pytest.param(*PUSH, marks=needs_metaworld),
    ],
)
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
    """In these draws one velocity of the three clusters falls on both sides; it alone is drawn
    anew.
    """
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


def test_a_room_has_no_more_than_its_cells():
    assert [len(part) for part in split_tasks("darkroom", train=99, test=1)] == [99, 1]
    with pytest.raises(ValueError, match="a room has 100 cells: 81 training and 20"):
        split_tasks("darkroom", train=81)


BAD_TASKS = [
    ("point-robot", [0.1]),
    ("point-robot", [0.1, 0.2, 0.3]),
    ("point-robot", 0.5),
    ("point-robot", [0.1, np.nan]),
    ("point-robot", [np.inf, 0]),
    ("point-robot", [2.1, 0]),
    ("point-robot", [0, -2.1]),
    ("point-robot", [0, -(10**400)]),
    ("point-robot", [2**64, 0]),
    ("point-robot", ["0.1", "0.2"]),
    ("point-robot", "ab"),
    ("point-robot", [0.1, None]),
    ("point-robot", [[0.1], [0.2]]),
    ("point-robot", [True, False]),
    ("point-robot", {"x": 0.1, "y": 0.2}),
    ("point-robot", None),
    ("point-robot", [0.1, 1j]),
    ("cheetah-vel", []),
    ("cheetah-vel", [-np.inf]),
    ("cheetah-vel", "1"),
    ("cheetah-vel", [11]),
    ("cheetah-vel-3cluster", [1.0, 2.0]),
    ("cheetah-vel-3cluster", [None]),
    ("walker-param", [0.0] * 64),
    ("walker-param", [0.0] * 66),
    ("walker-param", [0.0] * 64 + [3.01]),
    pytest.param("reach", [0, 0.85, 0.31], marks=needs_metaworld),
    pytest.param("push", [0], marks=needs_metaworld),
]


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
        ('{"train": "ab", "test": [[0.1, 0.3]]}', "'ab': it should be a valid array"),
        ('{"train": {"a": 1}, "test": [[0.1, 0.3]]}', "should be a valid array"),
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


# -------------------------------------------------------------------------------- reference returns
@pytest.mark.parametrize("env", EVERY)
def test_random_returns_are_the_same_every_time(env):
    tasks = split_tasks(env)[0][:2]
    found = random_returns(env, tasks, 3)
    assert found.shape == (2,) and np.isfinite(found).all() and found[0] != found[1]
    np.testing.assert_array_equal(random_returns(env, np.array(tasks), 3), found)


def test_optimum_is_unknown_where_it_is():
    unknown = [env for env in FAMILIES if optimal_returns(env, split_tasks(env)[1]) is None]
    assert unknown == ["cheetah-vel", "cheetah-vel-3cluster", "walker-param", "reach", "push"]


# ---------------------------------------------------------------------------------- split and files
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
        (None, "goals.json is missing"),
        ("{", "goals.json is damaged"),
        ("[1, 2]", "must hold"),
        ('{"train": [[1, 2]]}', "must hold.*test"),
        ('{"train": 5, "test": [[1, 2]]}', "must hold"),
        ('{"train": [], "test": [[1, 2]]}', r"train \[\]: it should have at least 1 item"),
        ('{"train": [[1, 2]], "test": []}', r"test \[\]: it should have at least 1 item"),
        ('{"train": [[1, 2]], "test": [[1, 10]]}', r"whole numbers from 0 to 9, not \[1, 10\]"),
        ('{"train": [[-1, 2]], "test": [[1, 1]]}', r"not \[-1, 2\]"),
        ('{"train": [[1.5, 2]], "test": [[1, 1]]}', r"not \[1.5, 2\]"),
        ('{"train": [[1, 2, 3]], "test": [[1, 1]]}', r"not \[1, 2, 3\]"),
        ('{"train": [["1", "2"]], "test": [[1, 1]]}', "whole numbers"),
        ('{"train": [[true, false]], "test": [[1, 1]]}', r"not \[True, False\]"),
        ('{"train": ' + "[" * 10**5, "nested too deeply"),
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
        for seed in range(Data.task_seed + 1)
    ]
    assert optima[-1] == pytest.approx(90.9)
    assert min(abs(np.array(optima[:-1]) - 90.9)) > 1e-6
