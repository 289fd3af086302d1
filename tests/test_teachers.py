"""Teachers (App. D.2, Tables 2 and 3): their settings, levels and qualities; MuJoCo and Meta-World.

Policies and what they play: test_rollouts.py; whole datasets, interrupted and damaged:
test_teachers_on_disk.py; a discrete family, taught by PPO: test_discrete_teachers.py.
Run: pytest tests/test_teachers.py
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from teaching import alive, made, one_line, rows_of, teachers, unchanged, written

from collect import dataset_folder, maximum
from config import Collection, Data, Teachers, Work
from envs import get_family, random_returns
from support.user_file import code_of
from teachers import teachers as module
from teachers.ppo import PPOConfig
from teachers.rollouts import parts_of
from teachers.sac import SACConfig
from teachers.stored import STATE
from teachers.teachers import (
    PAPER,
    Group,
    TrainedTeachers,
    algorithm,
    checkpoints,
    groups_of,
    processes,
    teachers_folder,
    train_group,
)


def trained_by(env, **given):
    return algorithm(env, teachers(**given))


# ---------------------------------------------------------------------- settings (Tables 2 and 3)
TABLE_2 = {  # steps, warm-up, steps between checkpoints
    "point-robot": (2000, 100, 20),
    "cheetah-vel": (250_000, 2000, 10_000),
    "cheetah-vel-3cluster": (400_000, 2000, 10_000),
    "walker-param": (1_000_000, 2000, 10_000),
}


@pytest.mark.parametrize("env", TABLE_2)
def test_table_2_is_the_default_of_sac(env):
    found = trained_by(env)
    assert (
        type(found) is SACConfig and (found.steps, found.warmup, found.save_every) == TABLE_2[env]
    )
    assert (found.lr, found.tau, found.gamma, found.alpha) == (3e-4, 0.005, 0.99, 0.2)
    assert len(checkpoints(found)) == {"point-robot": 100, "cheetah-vel": 25}.get(
        env, found.steps // 10_000
    )


@pytest.mark.parametrize(("env", "steps"), [("reach", 400_000), ("push", 1_000_000)])
def test_table_3_is_the_default_of_ppo(env, steps):
    found = trained_by(env)
    assert type(found) is PPOConfig and found.steps == steps
    assert (found.n_steps, found.batch, found.epochs, found.lr, found.gamma) == (
        2048,
        64,
        10,
        3e-4,
        0.99,
    )


def test_settings_override_the_tables():
    given = {
        "steps": 400,
        "save_every": 200,
        "warmup": 7,
        "hidden": 16,
        "batch": 9,
        "lr": 0.01,
        "alpha": 0.3,
        "gamma": 0.9,
    }
    assert trained_by("cheetah-vel", **given) == replace(PAPER["cheetah-vel"], **given)
    assert trained_by("point-robot", steps=400).replay == 400  # it holds all of the training
    assert trained_by("cheetah-vel", steps=400, save_every=200, warmup=9).replay == 10_000
    given = {"steps": 5000, "save_every": 3000, "batch": 32, "lr": 0.01, "gamma": 0.9}
    assert trained_by("reach", **given) == replace(PAPER["reach"], **given)


def test_checkpoints_are_those_that_training_writes():
    assert checkpoints(trained_by("point-robot", steps=120, save_every=40)) == [40, 80, 120]
    assert checkpoints(trained_by("reach", steps=5000)) == [2048, 4096, 6144]  # whole rollouts
    assert checkpoints(trained_by("reach", steps=5000, save_every=3000)) == [4096, 6144]


@pytest.mark.parametrize(
    ("env", "given", "named"),
    [
        ("reach", {"hidden": 64}, "--teacher-hidden"),
        ("reach", {"warmup": 5}, "--teacher-warmup"),
        ("push", {"alpha": 0.1}, "--teacher-alpha"),
        ("point-robot", {"save_every": 30}, "--teacher-save-every 30"),
        ("point-robot", {"steps": 50}, "--teacher-steps 50"),
        ("cheetah-vel", {"save_every": 20}, "200 steps"),
        ("point-robot", {"steps": -20}, "positive"),
        ("point-robot", {"lr": -1e-3}, "positive"),
        ("point-robot", {"lr": float("nan")}, "positive"),
        ("reach", {"steps": -1}, "positive"),
        ("point-robot", {"group": 0}, "positive"),
        ("nope", {}, "nope"),
    ],
)
def test_settings_that_cannot_be_are_refused(env, given, named):
    with pytest.raises(ValueError) as error:
        trained_by(env, **given)
    one_line(error, named)


def test_a_family_of_the_users_has_settings_too(tmp_path):
    file = tmp_path / "cart.py"
    file.write_text(
        "from envs import Family\n"
        "CART = Family('cart', 30, 2, 1, 20, 5, (0, 0), (1, 1), batch=min, sample_tasks=min)\n"
    )
    found = trained_by(str(file), steps=600, lr=0.01)
    assert found == SACConfig(600, 150, 150, lr=0.01, hidden=64, replay=600)
    assert checkpoints(found) == [150, 300, 450, 600]
    assert len(checkpoints(trained_by(str(file)))) == 40
    folder = teachers_folder(Path("data"), str(file), teachers(steps=600), [[0.0, 0.1]])
    assert folder.parent == Path("data/teachers")  # not beside the file


@pytest.mark.parametrize("rule", [False, True])
def test_code_of_the_users_family_names_its_data(tmp_path, rule):
    """Another reward, another folder; a comment changes nothing."""
    file = tmp_path / "cart.py"
    kind = ", teacher='rule', collect_task=min" if rule else ""
    code = (
        "from envs import Family\n"
        "import numpy as np\n"
        "def tasks(n, rng):\n    return rng.uniform(0, 1, (n, 2))\n"
        "CART = Family('cart', 30, 2, 1, 20, 5, (0, 0), (1, 1), batch=min, sample_tasks=tasks"
        f"{kind})\n"
    )

    def names(text):
        file.write_text(text)
        get_family.cache_clear()
        code_of.cache_clear()
        cfg = Collection(data=Data(env=str(file)))
        named = [dataset_folder(cfg).name]
        if not rule:
            named.append(teachers_folder(Path("data"), str(file), teachers(), [[0, 0]]).name)
        return named

    before = names(code)
    assert names("# what it is\n\n" + code.replace("(1, 1), ", "(1, 1),  # one\n    ")) == before
    for one, other in zip(names(code.replace("30, 2, 1", "40, 2, 1")), before, strict=True):
        assert one != other


# ------------------------------------------------------------------------------------------ levels
@pytest.fixture
def known():
    """Four checkpoints of three tasks in groups of two and one, by hand."""
    sac = PAPER["point-robot"]
    groups = [
        Group("point-robot", sac, (0, 0), ["a", "b"], "first"),
        Group("point-robot", sac, (0, 1), ["c"], "second"),
    ]
    sampled = np.array([[-40, -11, -5.5], [-20, -10.5, -6], [-12, -12, -5], [-14, -13, -5.8]])
    mean = np.array([[-35, -12, -6], [-22, -11, -5.5], [-10, -10.2, -5], [-20, -13, -6.5]])
    random = np.array([-30.0, -10.0, -15.0])
    return TrainedTeachers(
        "point-robot",
        groups,
        [20, 40, 60, 80],
        sampled,
        sampled.max(0) + 1,
        mean,
        np.zeros((4, 3)),
        random,
    )


def test_levels_by_hand(known):
    want = [[-10 / 18, 0, 0.95], [10 / 18, 0, 0.9], [1, 0, 1], [16 / 18, 0, 0.92]]
    np.testing.assert_allclose(known.level(known.sampled), want)
    np.testing.assert_allclose(known.level(known.mean)[:, 0], [-0.25, 0.4, 1, 0.5])
    assert (known.level(known.mean)[:, 1] == 0).all()  # never better than random
    assert known.best.tolist() == [-10, -10.2, -5]


@pytest.mark.parametrize(
    ("quality", "task", "behaviour", "label"),
    [
        ("mixed", 0, [0, 1, 2, 3], 2),
        ("medium-expert", 0, [0, 1], 3),  # the labels' levels are those of mean actions
        ("medium", 0, [0], 1),  # 0.5 is not below 0.5
        ("mixed", 1, [0, 1, 2, 3], 2),
        ("medium", 1, [0, 1, 2, 3], 2),  # all are as good as random
        ("mixed", 2, [0, 1, 2, 3], 2),
        ("medium-expert", 2, [1], 3),  # none is below: the lowest
        ("medium", 2, [1], 3),
    ],
)
def test_checkpoints_of_a_quality(known, quality, task, behaviour, label):
    found, labels = known.chosen(quality, task)
    assert (found.tolist(), labels) == (behaviour, label)


def test_place_of_a_task(known):
    assert [(group.folder, row) for group, row in map(known.place, range(3))] == [
        ("first", 0), ("first", 1), ("second", 0),
    ]  # fmt: skip
    with pytest.raises(IndexError):
        known.place(3)


def test_no_number_of_workers_is_one_a_core(monkeypatch):
    monkeypatch.setattr(module.os, "cpu_count", lambda: 7)
    assert [processes(Work(workers=workers)) for workers in (0, 1, 9)] == [7, 1, 9]


def test_groups_and_their_folders(tmp_path):
    tasks = [[0.1 * i, 0.0] for i in range(7)]
    found = groups_of("point-robot", teachers(group=3), tasks, tmp_path)
    assert [group.tasks for group in found] == [tasks[:3], tasks[3:6], tasks[6:]]
    assert [Path(group.folder).name for group in found] == ["group-000", "group-001", "group-002"]
    likewise = groups_of("reach", teachers(group=3), tasks, tmp_path)  # PPO's are stacked too
    assert [group.tasks for group in likewise] == [group.tasks for group in found]


def test_highest_return_of_a_dataset():
    found = {"random": [-20.0, 0.0], "highest": [-10.0, 50.0]}
    assert maximum(found, np.array([[-15.0, -19.0], [10.0, 60.0]])) == [0.5, 1.2]


# ----------------------------------------------------------------------------------- other families
def test_cheetah_from_nothing_to_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEVEL_EPISODES", 1)
    given = teachers(steps=400, save_every=200, warmup=390, hidden=8, batch=8, group=2)
    (group,) = groups_of("cheetah-vel", given, [[0.5], [2.0]], tmp_path)
    train_group(group, alive)
    with np.load(tmp_path / "group-000" / "levels.npz") as file:
        levels = dict(file)
    assert {k: v.shape for k, v in levels.items()} == {
        "sampled": (2, 2, 1), "mean": (2, 2, 1), "success": (2, 2), "random": (2,),
    }  # fmt: skip
    np.testing.assert_array_equal(levels["random"], random_returns("cheetah-vel", group.tasks))
    assert (levels["sampled"] != levels["mean"]).all()
    before = written(tmp_path)
    train_group(group, alive)  # another worker was faster
    unchanged(tmp_path, before)
    folder = teachers_folder(tmp_path, "cheetah-vel", given, group.tasks)
    assert folder.parent == tmp_path / "teachers" and "cheetah-vel" in folder.name
    assert not (tmp_path / "group-000" / STATE).exists()  # the replay is of no use any more
    monkeypatch.setattr(module, "train_sac", None)
    (tmp_path / "group-000" / "levels.npz").unlink()
    train_group(group, alive)  # measured anew, not trained
    with np.load(tmp_path / "group-000" / "levels.npz") as file:
        assert all((file[name] == levels[name]).all() for name in levels)


def test_reach_labels_are_the_behaviours_own_actions(tmp_path, monkeypatch):
    """PPO from nothing to a part; two checkpoints."""
    monkeypatch.setitem(
        PAPER, "reach", PPOConfig(128, n_steps=64, batch=32, epochs=1, save_every=64)
    )
    monkeypatch.setattr(
        module, "random_returns", lambda env, tasks: np.zeros(len(tasks))
    )  # 2000 steps of physics
    monkeypatch.setattr(module, "LEVEL_EPISODES", 1)
    tasks = [[0.0, 0.85, 0.175]]
    groups = groups_of("reach", Teachers(), tasks, tmp_path)
    train_group(groups[0], alive)
    with np.load(tmp_path / "group-000" / "levels.npz") as file:
        levels = {name: file[name] for name in file.files}
    assert levels["sampled"].shape == (2, 1, 1) and levels["success"].shape == (2, 1)
    returns = levels["sampled"][:, :, 0]
    known = TrainedTeachers(
        "reach",
        groups,
        checkpoints(groups[0].trained_by),
        returns,
        returns[0],
        returns,
        levels["success"],
        levels["random"],
    )
    data = Data(env="reach", data_episodes=5, data_queries=40)
    (job,) = parts_of(data, tasks, [known.behaviour("mixed", 0)], [tmp_path / "task-000.npz"])
    assert job.behaviour.steps == [64, 128] and not job.others and not job.random
    for part, own in ((job, 5), (replace(job, own=3, random=2), 3)):
        arrays = made(part)
        assert arrays["states"].shape == (5, 100, 18) and arrays["query_actions"].shape == (40, 4)
        pairs = rows_of(np.concatenate([arrays["query_states"], arrays["query_actions"]], -1))
        assert (
            pairs <= rows_of(np.concatenate([arrays["states"], arrays["actions"]], -1)[:own])
            and len(pairs) == 40
        )
