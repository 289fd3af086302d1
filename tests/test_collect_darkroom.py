"""What DarkRoom's datasets are made of (paper App. D.2): the qualities and the three recipes.

Run: pytest tests/test_collect_darkroom.py
"""

from dataclasses import replace

import numpy as np
import pytest

from families.collect_darkroom import (
    SHARES,
    choose_walks,
    collect_darkroom_task,
    explore_pool,
    noise_levels,
    walk,
)
from families.rooms import BatchedDarkRoom, darkroom_expert, darkroom_noisy_return, darkroom_optimum

CELLS = np.array([[x, y] for x in range(10) for y in range(10)])


# ------------------------------------------------------------------------------- qualities (App. D.2)
def shares(levels, goal):
    """Exact expected returns of noise levels, as shares of the expert's."""
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
    """App. D.2: "policy checkpoints whose performance is below 80 % (50 %) of the final achieved level"."""
    for goal in CELLS[::7]:
        assert shares(noise_levels(goal, quality, 20), goal).max() < level


def test_returns_of_mixed_rise_from_random_to_the_optimum(tiny_config):
    cfg = replace(tiny_config, episodes=200, queries=1)
    for index, goal in enumerate([[0, 0], [2, 3], [9, 9]]):
        returns = collect_darkroom_task(cfg, index, goal, None)["rewards"].sum(-1)
        exact = darkroom_noisy_return([goal], noise_levels(goal, "mixed", 200))[0]
        np.testing.assert_array_equal(returns[-20:], darkroom_optimum([goal])[0])
        early, middle = returns[:20].mean(), returns[90:110].mean()
        assert early < middle < returns[-20:].mean()
        error = (returns - exact).std() / np.sqrt(len(returns))
        assert abs((returns - exact).mean()) < 4 * error


@pytest.mark.parametrize("recipe", ["paper", "explore"])
def test_query_labels_are_those_of_the_quality(tiny_config, recipe):
    goal, queries = np.array([6, 7]), 5000
    pool = explore_pool([[1, 1], [6, 7]], 100, np.random.default_rng(0), size=50)
    agree = {}
    for quality in ("mixed", "medium-expert", "medium"):
        cfg = replace(tiny_config, quality=quality, recipe=recipe, queries=queries)
        part = collect_darkroom_task(cfg, 0, goal, pool)
        labels = darkroom_expert(part["query_states"].astype(int), goal)
        agree[quality] = (part["query_actions"] == labels).mean()
        eps = noise_levels(goal, quality, 10).min()  # a random action is the expert's once in five
        assert agree[quality] == pytest.approx(1 - 0.8 * eps, abs=4 * 0.5 / np.sqrt(queries))
    assert agree["mixed"] == 1 and agree["mixed"] > agree["medium-expert"] > agree["medium"]


# -------------------------------------------------------------------------------------------- recipes
@pytest.fixture(scope="module")
def pool():
    return explore_pool(CELLS, 100, np.random.default_rng(0), size=2000)


def test_explore_pool_is_of_walks_that_obey_the_room(pool):
    """Every walk starts in the corner and steps as the room does; `entered` lists the cells of its steps."""
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
    np.testing.assert_array_equal(pool.entered, entered.reshape(4000, 100))


def test_explore_pool_has_two_kinds(pool):
    """First: the expert's action for a fresh uniform goal at every step. Second: some settle at a goal."""
    cells, actions = pool.states[:2000].reshape(-1, 2), pool.actions[:2000].ravel()
    for cell in ([0, 0], [4, 5], [6, 3]):
        chosen = actions[(cells == cell).all(-1)]
        want = np.bincount(darkroom_expert(np.array(cell), CELLS), minlength=5) / 100
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


def test_explore_dataset_has_all_three_kinds(tiny_config):
    cfg = replace(tiny_config, recipe="explore", episodes=500, queries=1000)
    goal = [8, 3]
    pool = explore_pool(CELLS, 100, np.random.default_rng(0), size=1000)
    part = collect_darkroom_task(cfg, 0, goal, pool)
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
    """How far the goals of reward-less walks are from uniform over the cells that a walk has not entered.

    `walks_of(goal) -> cells (M, T, 2)` after each move. Returns chi-square over the 100 cells, and z of
    "the goal is nearer to the walk's last cell than an unentered cell is on average".
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
    """The goal stays uniform over the cells that were not entered, although crossings are favoured."""
    rng = np.random.default_rng(2)
    chi, z = goal_given_away(lambda goal: pool.after[choose_walks(pool, goal, 400, rng, 0.6)])
    assert chi < 99 + 5 * np.sqrt(2 * 99)
    assert abs(z) < 4


def test_paper_recipe_gives_the_goal_away():
    """The same measure on the paper's data: a walk that drifts to its goal betrays it without a reward."""
    rng = np.random.default_rng(3)
    eps = np.linspace(1, 0.5, 400)
    chi, z = goal_given_away(lambda goal: walk(np.broadcast_to(goal, (400, 2)), eps, 100, rng)[2])
    assert chi > 300 and z > 15
