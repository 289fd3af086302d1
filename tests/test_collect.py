"""Offline datasets (paper App. D.2): the qualities, the two recipes, and that collection is repeatable.

Run: pytest tests/test_collect.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import collect as module
from collect import (
    SHARES,
    CollectConfig,
    choose_walks,
    collect,
    collect_darkroom_task,
    dataset_folder,
    explore_pool,
    noise_levels,
    walk,
)
from data import file_hash, load_dataset
from envs import BatchedDarkRoom, darkroom_expert, darkroom_noisy_return, darkroom_optimum, split_tasks

CELLS = np.array([[x, y] for x in range(10) for y in range(10)])
SAVE = module.save_part


def contents(folder):
    return {path.name: file_hash(path) for path in folder.iterdir()}


def stop_after(monkeypatch, parts):
    """Collection is interrupted when it is about to write one part more."""
    written = []

    def save(path, arrays):
        if len(written) == parts:
            raise KeyboardInterrupt
        written.append(path)
        SAVE(path, arrays)

    monkeypatch.setattr(module, "save_part", save)


def refused(cfg, message):
    """`collect` names the problem in one line and leaves the folder as it was."""
    before = contents(dataset_folder(cfg))
    with pytest.raises(ValueError, match=message) as error:
        collect(cfg, quiet=True)
    assert "\n" not in str(error.value)
    assert contents(dataset_folder(cfg)) == before


@pytest.fixture
def stopped(tiny_config, tmp_path, monkeypatch):
    """(settings, folder) of a collection that was interrupted after three parts."""
    cfg = replace(tiny_config, folder=str(tmp_path))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            collect(cfg, quiet=True)
    folder = dataset_folder(cfg)
    assert sorted(contents(folder)) == ["task-000.npz", "task-001.npz", "task-002.npz"]
    return cfg, folder


# --------------------------------------------------------------------------------- bytes and resuming
@pytest.mark.parametrize("recipe", ["noise", "explore"])
def test_same_settings_give_the_same_bytes(recipe, request, tmp_path):
    cfg = request.getfixturevalue("tiny_config" if recipe == "noise" else "explore_config")
    first = contents(request.getfixturevalue(f"{recipe}_folder"))
    again = contents(collect(replace(cfg, folder=str(tmp_path)), quiet=True))
    assert len(first) == 9  # 8 tasks and meta.json
    assert again == first


def test_another_seed_gives_other_bytes(tiny_config, noise_folder, tmp_path):
    first = contents(noise_folder)
    other = contents(collect(replace(tiny_config, seed=1, folder=str(tmp_path)), quiet=True))
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)
    assert len(set(first.values())) == 9  # nor do two tasks share their data


def test_stopped_collection_continues_to_the_same_bytes(stopped, noise_folder):
    cfg, folder = stopped
    with pytest.raises(ValueError, match="no dataset in"):
        load_dataset(folder)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    collect(cfg, quiet=True)
    assert contents(folder) == contents(noise_folder)
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())  # not written anew


def test_explore_continues_to_the_same_bytes(explore_config, explore_folder, tmp_path):
    cfg = replace(explore_config, folder=str(tmp_path))
    folder = shutil.copytree(explore_folder, dataset_folder(cfg))
    for name in ("meta.json", "task-000.npz", "task-006.npz"):
        (folder / name).unlink()
    assert contents(collect(cfg, quiet=True)) == contents(explore_folder)


def test_deleted_part_of_a_complete_dataset_is_redone_alone(tiny_config, noise_folder, tmp_path):
    cfg = replace(tiny_config, folder=str(tmp_path))
    folder = shutil.copytree(noise_folder, dataset_folder(cfg))
    (folder / "task-004.npz").unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    assert contents(collect(cfg, quiet=True)) == contents(noise_folder)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_interrupted_write_leaves_no_part(tiny_config, tmp_path, monkeypatch):
    def half(file, **arrays):
        file.write(b"PK half of a part")
        raise KeyboardInterrupt

    cfg = replace(tiny_config, folder=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", half)
        with pytest.raises(KeyboardInterrupt):
            collect(cfg, quiet=True)
    assert not list(dataset_folder(cfg).glob("task-*")) and not (dataset_folder(cfg) / "meta.json").exists()
    assert load_dataset(collect(cfg, quiet=True)).tasks == 8


@pytest.mark.parametrize("damage", ["shorter", "flipped", "empty"])
def test_damaged_part_of_a_stopped_run_is_named(stopped, damage):
    cfg, folder = stopped
    part = folder / "task-001.npz"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 0xFF
    part.write_bytes({"shorter": data[:100], "flipped": data, "empty": b""}[damage])
    refused(cfg, "task-001.npz is not a whole part")


def test_part_of_other_settings_is_named(stopped, tiny_config, tmp_path):
    cfg, folder = stopped
    other = replace(tiny_config, episodes=11, folder=str(tmp_path / "other"))
    shutil.copy(collect(other, quiet=True) / "task-002.npz", folder)
    refused(cfg, "task-002.npz.*shape")


def other_goals(cfg, tmp_path) -> CollectConfig:
    """The same settings with a task file of the same name and other goals."""
    file = tmp_path / "elsewhere" / Path(cfg.tasks).name
    file.parent.mkdir()
    goals = json.loads(Path(cfg.tasks).read_text())
    file.write_text(json.dumps({**goals, "train": goals["train"][::-1]}))
    return replace(cfg, tasks=str(file))


def test_folder_of_other_settings_is_refused(tiny_config, noise_folder, tmp_path):
    cfg = replace(tiny_config, folder=str(tmp_path))
    medium = replace(cfg, quality="medium")
    assert dataset_folder(medium) != dataset_folder(cfg)
    shutil.copytree(noise_folder, dataset_folder(cfg))
    shutil.copytree(noise_folder, dataset_folder(medium))  # renamed by hand
    refused(medium, "other settings")
    assert dataset_folder(other_goals(cfg, tmp_path)) != dataset_folder(cfg)


def test_stopped_run_of_other_goals_is_not_continued(stopped, tmp_path):
    """Its parts hold rewards of other goals; they must not end up in this dataset."""
    cfg, _folder = stopped
    try:
        done = collect(other_goals(cfg, tmp_path), quiet=True)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        check_replay(load_dataset(done))


@pytest.mark.parametrize("change", [{"episodes": 4}, {"queries": 0}, {"env": "dark"}])
def test_bad_settings_are_refused_before_anything_is_written(tiny_config, tmp_path, change):
    with pytest.raises(ValueError) as error:
        collect(replace(tiny_config, folder=str(tmp_path / "new"), **change), quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------- what is stored
def check_replay(data):
    """Stored states and rewards are those of the stored actions in each task's room."""
    for goal, states, actions, rewards in zip(
        data.meta["train_tasks"], data.states, data.actions, data.rewards, strict=True
    ):
        env = BatchedDarkRoom([goal] * len(states))
        cells = env.reset()
        for t in range(100):
            np.testing.assert_array_equal(states[:, t], cells)
            cells, paid = env.step(actions[:, t].numpy())
            np.testing.assert_array_equal(rewards[:, t], paid)


@pytest.mark.parametrize("recipe", ["noise", "explore"])
def test_stored_steps_are_those_of_the_room(recipe, request):
    check_replay(request.getfixturevalue(f"{recipe}_data"))


def test_only_training_goals_are_collected(noise_data, tiny_config):
    train, test = split_tasks("darkroom", file=tiny_config.tasks)
    assert noise_data.meta["train_tasks"] == train and noise_data.meta["test_tasks"] == test
    assert noise_data.tasks == len(train)


# ------------------------------------------------------------------------------- qualities (App. D.2)
def shares(levels, goal):
    """Exact expected returns of noise levels, as shares of the expert's."""
    return darkroom_noisy_return([goal], levels)[0] / darkroom_optimum([goal])[0]


@pytest.mark.parametrize(("quality", "level"), [("mixed", 1.0), ("medium-expert", 0.8), ("medium", 0.5)])
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


@pytest.mark.parametrize("recipe", ["noise", "explore"])
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
    assert pool.states.shape == pool.after.shape == (4000, 100, 2) and pool.actions.shape == (4000, 100)
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
            assert crosses[pick[kind]].mean() == pytest.approx(share + (1 - share) * chance, abs=4 * error)
            if chance or not share:  # a kind that never crosses this goal borrows from the other
                assert (pick[kind] // 2000 == kind).all()


def test_explore_dataset_has_all_three_kinds(tiny_config):
    cfg = replace(tiny_config, recipe="explore", episodes=500, queries=1000)
    goal = [8, 3]
    pool = explore_pool(CELLS, 100, np.random.default_rng(0), size=1000)
    part = collect_darkroom_task(cfg, 0, goal, pool)
    returns = part["rewards"].sum(-1)
    own, crossing = SHARES["explore"]
    assert own + (1 - own) * crossing - 0.08 < (returns > 0).mean() < 0.95  # some more cross it by chance
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
    return ((counts - expected) ** 2 / expected).sum(), nearer.mean() / nearer.std() * np.sqrt(len(nearer))


def test_explore_walks_without_reward_say_nothing_else_of_the_goal(pool):
    """The goal stays uniform over the cells that were not entered, although crossings are favoured."""
    rng = np.random.default_rng(2)
    chi, z = goal_given_away(lambda goal: pool.after[choose_walks(pool, goal, 400, rng, 0.6)])
    assert chi < 99 + 5 * np.sqrt(2 * 99)
    assert abs(z) < 4


def test_noise_recipe_gives_the_goal_away():
    """The same measure on the paper's data: a walk that drifts to its goal betrays it without a reward."""
    rng = np.random.default_rng(3)
    eps = np.linspace(1, 0.5, 400)
    chi, z = goal_given_away(lambda goal: walk(np.broadcast_to(goal, (400, 2)), eps, 100, rng)[2])
    assert chi > 300 and z > 15
