"""DarkRoom: rules and closed forms (paper App. D.1), what its datasets are made of (App. D.2).

Run: pytest tests/test_darkroom.py
"""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from config import Data
from envs import get_family, make_batch, optimal_returns, random_returns
from families.darkroom import (
    SHARES,
    BatchedDarkRoom,
    choose_walks,
    collect_task,
    darkroom_noisy_return,
    darkroom_optimum,
    darkroom_teacher,
    explore_pool,
    noise_levels,
    walk,
)

CELLS = np.array([[x, y] for x in range(10) for y in range(10)])
RIGHT, LEFT, UP, DOWN, STAY = range(5)


def play(goals, policy):
    """Returns (N,) of `policy(cells, goals) -> actions` in the batched room."""
    env, goals = BatchedDarkRoom(goals), np.asarray(goals)
    cells, total = env.reset(), 0
    for _ in range(100):
        cells, rewards = env.step(policy(cells, goals))
        total = total + rewards
    return total


# -------------------------------------------------------------------------------------------- rules
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


# ------------------------------------------------------------------------------------- closed forms
def test_teacher_walks_along_x_then_y_then_stays():
    goal = np.array([4, 4])
    cells = np.array([[1, 9], [7, 0], [4, 1], [4, 6], [4, 4]])
    assert darkroom_teacher(cells, goal).tolist() == [RIGHT, LEFT, UP, DOWN, STAY]


def test_optimum_is_what_the_teacher_collects():
    np.testing.assert_array_equal(darkroom_optimum(CELLS), play(CELLS, darkroom_teacher))
    np.testing.assert_array_equal(optimal_returns("darkroom", CELLS), darkroom_optimum(CELLS))
    assert darkroom_optimum([[0, 0], [0, 1], [9, 9]]).tolist() == [100, 100, 83]
    assert darkroom_optimum(CELLS).mean() == pytest.approx(91.99)


@pytest.mark.parametrize("eps", [1.0, 0.5])
def test_noisy_return_is_that_of_simulated_teachers(eps):
    rng, repeats = np.random.default_rng(0), 400
    goals = np.repeat(CELLS, repeats, axis=0)

    def policy(cells, goals):
        noisy = rng.random(len(cells)) < eps
        return np.where(noisy, rng.integers(5, size=len(cells)), darkroom_teacher(cells, goals))

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


# ----------------------------------------------------------------------------- qualities (App. D.2)
def shares(levels, goal):
    """Exact expected returns of noise levels, as shares of the teacher's."""
    return darkroom_noisy_return([goal], levels)[0] / darkroom_optimum([goal])[0]


@pytest.mark.parametrize(
    ("quality", "level"), [("mixed", 1.0), ("medium-expert", 0.8), ("medium", 0.5)]
)
def test_noise_falls_to_the_level_of_the_quality(quality, level):
    for goal in CELLS[::7]:
        eps = noise_levels(goal, quality, 20)
        assert len(eps) == 20 and eps[0] == 1 and (np.diff(eps[:18]) < 0).all()
        assert eps[17] == eps[18] == eps[19]  # the last tenth stays at the lowest noise
        assert shares(eps, goal).max() == pytest.approx(level, abs=0.02)
    if quality == "mixed":
        assert eps[-1] == 0


@pytest.mark.parametrize(("quality", "level"), [("medium-expert", 0.8), ("medium", 0.5)])
def test_no_stage_of_a_lower_quality_reaches_its_level(quality, level):
    """App. D.2: "policy checkpoints whose performance is below 80 % (50 %) of the final achieved
    level".
    """
    for goal in CELLS[::7]:
        assert shares(noise_levels(goal, quality, 20), goal).max() < level


def test_returns_of_mixed_rise_from_random_to_the_optimum():
    data = Data(data_episodes=200, data_queries=1)
    for index, goal in enumerate([[0, 0], [2, 3], [9, 9]]):
        returns = collect_task(data, index, goal, None)["rewards"].sum(-1)
        exact = darkroom_noisy_return([goal], noise_levels(goal, "mixed", 200))[0]
        np.testing.assert_array_equal(returns[-20:], darkroom_optimum([goal])[0])
        early, middle = returns[:20].mean(), returns[90:110].mean()
        assert early < middle < returns[-20:].mean()
        error = (returns - exact).std() / np.sqrt(len(returns))
        assert abs((returns - exact).mean()) < 4 * error


@pytest.mark.parametrize("recipe", ["paper", "explore"])
def test_query_labels_are_those_of_the_quality(recipe):
    goal, queries = np.array([6, 7]), 5000
    pool = explore_pool([[1, 1], [6, 7]], np.random.default_rng(0), size=50)
    agree = {}
    for quality in ("mixed", "medium-expert", "medium"):
        data = Data(quality=quality, recipe=recipe, data_episodes=10, data_queries=queries)
        part = collect_task(data, 0, goal, pool if recipe in SHARES else None)
        labels = darkroom_teacher(part["query_states"].astype(int), goal)
        agree[quality] = (part["query_actions"] == labels).mean()
        eps = noise_levels(goal, quality, 10).min()  # a random action is the teacher's once in five
        assert agree[quality] == pytest.approx(1 - 0.8 * eps, abs=4 * 0.5 / np.sqrt(queries))
    assert agree["mixed"] == 1 and agree["mixed"] > agree["medium-expert"] > agree["medium"]


# ------------------------------------------------------------------------------------------ recipes
@pytest.fixture(scope="module")
def pool():
    return explore_pool(CELLS, np.random.default_rng(0), size=2000)


def test_explore_pool_is_of_walks_that_obey_the_room(pool):
    """Every walk starts in the corner and steps as the room does; `enter` knows the cells of its
    steps.
    """
    assert pool.states.shape == pool.after.shape == (4000, 100, 2) and pool.actions.shape == (
        4000,
        100,
    )
    env = BatchedDarkRoom(np.zeros((4000, 2)))
    cells, entered = env.reset(), np.zeros((4000, 10, 10), bool)
    for t in range(100):
        np.testing.assert_array_equal(pool.states[:, t], cells)
        cells, _ = env.step(pool.actions[:, t])
        np.testing.assert_array_equal(pool.after[:, t], cells)
        entered[np.arange(4000), cells[:, 0], cells[:, 1]] = True
    found = np.stack([pool.enter(cell) for cell in CELLS], 1)
    np.testing.assert_array_equal(found, entered.reshape(4000, 100))


def test_explore_pool_has_two_kinds(pool):
    """First: the teacher's action for a fresh uniform goal at every step. Second: some settle at a
    goal.
    """
    cells, actions = pool.states[:2000].reshape(-1, 2), pool.actions[:2000].ravel()
    for cell in ([0, 0], [4, 5], [6, 3]):
        chosen = actions[(cells == cell).all(-1)]
        want = np.bincount(darkroom_teacher(np.array(cell), CELLS), minlength=5) / 100
        error = np.sqrt(want * (1 - want) / len(chosen))
        assert len(chosen) > 500
        assert (abs(np.bincount(chosen, minlength=5) / len(chosen) - want) <= 5 * error).all()
    settled = (pool.actions[:, -50:] == 4).mean(1) > 0.8
    assert not settled[:2000].any() and 0.1 < settled[2000:].mean() < 0.4


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_explore_walks_cross_the_goal_as_often_as_asked_and_by_chance(pool, share):
    rng = np.random.default_rng(1)
    for goal in ([0, 9], [5, 5], [9, 9]):
        crosses = (pool.after == goal).all(-1).any(-1)  # two kinds, 2000 each
        pick = choose_walks(pool, goal, 2000, rng, share).reshape(2, 2000)
        for kind in (0, 1):
            chance = crosses[2000 * kind : 2000 * (kind + 1)].mean()
            error = 0.5 / np.sqrt(2000)
            assert crosses[pick[kind]].mean() == pytest.approx(
                share + (1 - share) * chance, abs=4 * error
            )
            if chance or not share:  # a kind that never crosses this goal borrows from the other
                assert (pick[kind] // 2000 == kind).all()


def test_explore_dataset_has_all_three_kinds():
    data = Data(recipe="explore", data_episodes=500, data_queries=1000)
    goal = [8, 3]
    pool = explore_pool(CELLS, np.random.default_rng(0), size=1000)
    part = collect_task(data, 0, goal, pool)
    returns = part["rewards"].sum(-1)
    own, crossing = SHARES["explore"]
    assert (
        own + (1 - own) * crossing - 0.08 < (returns > 0).mean() < 0.95
    )  # some more cross it by chance
    assert own <= (returns > 0.8 * darkroom_optimum([goal])[0]).mean() < own + 0.1
    half = (returns[:250] > 0).mean() - (returns[250:] > 0).mean()
    assert abs(half) < 0.2  # the kinds are shuffled
    assert len(np.unique(part["query_states"], axis=0)) == 100  # queries are anywhere in the room


def goal_given_away(walks_of):
    """How far the goals of reward-less walks are from uniform over the cells that a walk has not
    entered.

    `walks_of(goal) -> cells (M, T, 2)` after each move. Returns chi-square over the 100 cells, and
    z of "the goal is nearer to the walk's last cell than an unentered cell is on average".
    """
    counts, expected, nearer = np.zeros(100), np.zeros(100), []
    for index, goal in enumerate(CELLS):
        after = walks_of(goal).astype(int)
        after = after[~(after == goal).all(-1).any(-1)]
        free = np.ones((len(after), 100), bool)
        np.put_along_axis(free, after @ [10, 1], False, 1)
        assert free[:, index].all()
        uniform = free / free.sum(1, keepdims=True)
        counts[index] = len(after)
        expected += uniform.sum(0)
        distance = abs(after[:, -1:] - CELLS).sum(-1)  # (M, 100)
        nearer.append((uniform * distance).sum(1) - distance[:, index])
    nearer = np.concatenate(nearer)
    return ((counts - expected) ** 2 / expected).sum(), nearer.mean() / nearer.std() * np.sqrt(
        len(nearer)
    )


def test_explore_walks_without_reward_say_nothing_else_of_the_goal(pool):
    """The goal stays uniform over the cells that were not entered, although crossings are
    favoured.
    """
    rng = np.random.default_rng(2)
    chi, z = goal_given_away(lambda goal: pool.after[choose_walks(pool, goal, 400, rng, 0.6)])
    assert chi < 99 + 5 * np.sqrt(2 * 99)
    assert abs(z) < 4


def test_paper_recipe_gives_the_goal_away():
    """The same measure on the paper's data: a walk that drifts to its goal betrays it without a
    reward.
    """
    rng = np.random.default_rng(3)
    eps = np.linspace(1, 0.5, 400)
    chi, z = goal_given_away(lambda goal: walk(np.broadcast_to(goal, (400, 2)), eps, rng).after)
    assert chi > 300 and z > 15
