"""DarkRoom (paper App. D.1): rules, closed-form returns, the split of the tasks, task files.

Run: pytest tests/test_envs.py
"""

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from collect import CollectConfig
from config import Config
from envs import (
    BatchedDarkRoom,
    darkroom_expert,
    darkroom_noisy_return,
    darkroom_optimum,
    get_spec,
    make_batch,
    optimal_returns,
    random_returns,
    split_tasks,
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
    assert get_spec("darkroom").horizon == 100


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
    assert play([[1, 0]], lambda cells, goals: np.array([RIGHT if cells[0, 0] == 0 else STAY])) == [100]


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
    assert curve[:, 4].sum() == pytest.approx(100)  # a random walk is in exactly one cell at each step


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


@pytest.mark.parametrize("call", [get_spec, split_tasks, lambda env: make_batch(env, [[1, 1]])])
def test_unknown_environment_lists_the_known_ones(call):
    with pytest.raises(ValueError, match=r"unknown environment .dark..*darkroom"):
        call("dark")


def test_default_split_is_the_first_with_the_papers_optimum():
    """Table 1's 90.9 is the optimum of its held-out goals, which the paper does not list."""
    optima = [darkroom_optimum(split_tasks("darkroom", seed)[1]).mean() for seed in range(Config.task_seed + 1)]
    assert optima[-1] == pytest.approx(90.9)
    assert min(abs(np.array(optima[:-1]) - 90.9)) > 1e-6
    assert Config.task_seed == CollectConfig.task_seed
