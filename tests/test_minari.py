"""test_minari.py: datasets as Minari's and back, and Minari datasets that were made elsewhere.

Run: pytest tests/test_minari.py    DataCollector's test also wants jax: pip install minari[create]
"""

import copy
import json
import os
import shutil
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from commands import contents, run

import envs
from ad import sample_ad
from collect import settings_of
from config import Collection, Data
from data import (
    ARRAYS,
    FORMAT,
    file_hash,
    load_dataset,
    part_name,
    read_meta,
)
from dpt import DPTSettings, sample_dpt
from envs import make_env
from support.files import save_arrays, save_json

minari = pytest.importorskip(
    "minari", reason="Minari is an optional extra: pip install 't2mir[minari]'"
)
pytest.importorskip(
    "h5py", reason="Minari's storage is an optional extra: pip install 't2mir[minari]'"
)
from tools.minari_io import export_minari, import_minari  # noqa: E402

GOALS = {"train": [[0.5, -0.25], [0.1, 0.9], [-1.0, 0.3333]], "test": [[0.0, 0.0], [0.7, 0.7]]}
E, Q, T = 4, 6, 20


@pytest.fixture(scope="module")
def point_folder(tmp_path_factory):
    """A point-robot dataset as collect.py writes one, without experts: any float32 at all."""
    base = tmp_path_factory.mktemp("point")
    (base / "tasks.json").write_text(json.dumps(GOALS))
    chosen = Data(env="point-robot", quality="medium", data_episodes=E, data_queries=Q)
    folder, hashes = base / "data", []
    for i in range(3):
        rng = np.random.default_rng(i)
        part = {
            "states": rng.normal(size=(E, T, 2)),
            "actions": rng.uniform(-1, 1, (E, T, 2)),
            "rewards": -rng.random((E, T)),
            "query_states": rng.normal(size=(Q, 2)) * 1e-40,  # subnormal
            "query_actions": rng.uniform(-1, 1, (Q, 2)),
        }
        part["states"][0, 0] = [-0.0, np.finfo(np.float32).max]
        save_arrays(
            folder / part_name(i), {name: array.astype(np.float32) for name, array in part.items()}
        )
        hashes.append(file_hash(folder / part_name(i)))
    meta = {
        "format": FORMAT,
        **settings_of(Collection(chosen)),
        "horizon": T,
        "train_tasks": GOALS["train"],
    }
    meta |= {"test_tasks": GOALS["test"], "best_level": [0.1, 1 / 3, 0.7], "sha256": hashes}
    save_json(folder / "meta.json", meta)
    return folder


@pytest.fixture(scope="module")
def root(point_folder, paper_folder, tmp_path_factory):
    """Minari's root with both datasets; tests only read it."""
    root = tmp_path_factory.mktemp("minari")
    assert export_minari(paper_folder, root) == [
        f"t2mir/darkroom-mixed/task-{i:03d}-v0" for i in range(8)
    ]
    assert export_minari(point_folder, root)[2] == "t2mir/point-robot-medium/task-002-v0"
    return root


# ----------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize(
    ("name", "source"), [("point", "point-robot-medium"), ("paper", "darkroom-mixed")]
)
def test_round_trip_is_exact(name, source, root, request, tmp_path):
    before, after = request.getfixturevalue(f"{name}_folder"), tmp_path / "again"
    assert import_minari(root / "t2mir" / source, after) == after
    assert read_meta(after) == read_meta(before)  # and with it the checksum of every part
    assert sorted(path.name for path in after.iterdir()) == sorted(
        contents(before).keys() - {".lock"}
    )
    old, new = load_dataset(before), load_dataset(after)
    for key in ARRAYS:
        a, b = getattr(old, key), getattr(new, key)
        assert a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def test_some_of_a_root_by_their_ids_in_any_order(root, point_folder, tmp_path):
    ids = [f"t2mir/point-robot-medium/task-{i:03d}-v0" for i in (2, 0, 1)]
    import_minari(root, tmp_path / "again", env="point-robot", ids=ids)
    assert read_meta(tmp_path / "again") == read_meta(point_folder)


def test_minari_reads_what_was_exported(root, paper_folder, paper_data, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    with warnings.catch_warnings(action="error"):
        assert len(minari.list_local_datasets()) == 11
    for i in (0, 7):
        dataset = minari.load_dataset(f"t2mir/darkroom-mixed/task-{i:03d}-v0")
        assert (dataset.total_episodes, dataset.total_steps) == (10, 1000)
        env = dataset.recover_environment()
        assert dataset.observation_space == env.observation_space
        assert dataset.action_space == env.action_space
        assert env.spec.id == "t2mir/DarkRoom-v0"
        assert list(env.unwrapped.task) == paper_data.meta["train_tasks"][i]
        for j, episode in enumerate(dataset):
            np.testing.assert_array_equal(episode.observations[:-1], paper_data.states[i, j])
            # repeated, as its metadata says
            assert (episode.observations[-1] == episode.observations[-2]).all()
            assert env.observation_space.contains(episode.observations[0])
            assert episode.actions.dtype == np.int64
            assert not episode.terminations.any()
            assert episode.truncations.tolist() == [False] * 99 + [True]
            state, _ = env.reset()
            for t, action in enumerate(episode.actions):  # the environment plays what was recorded
                assert (state == episode.observations[t]).all()
                state, reward, _, truncated, _ = env.step(action)
                assert (reward, truncated) == (episode.rewards[t], episode.truncations[t])
        origin = dataset.storage.metadata["t2mir"]
        assert origin["meta"] == read_meta(paper_folder)
        assert (origin["task"], origin["last_observation"]) == (i, "repeated")


def test_minari_reads_a_continuous_family(root, point_folder, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    dataset = minari.load_dataset("t2mir/point-robot-medium/task-001-v0")
    data, env = load_dataset(point_folder), dataset.recover_environment()
    assert list(env.unwrapped.task) == GOALS["train"][1]
    assert (len(dataset), dataset.total_steps) == (E, E * T)
    played = make_env("point-robot", [0, 0])
    assert dataset.observation_space == env.observation_space == played.observation_space
    assert dataset.action_space == env.action_space
    for j, episode in enumerate(dataset):
        assert env.observation_space.contains(episode.observations[0])
        assert env.action_space.contains(episode.actions[0])
        np.testing.assert_array_equal(episode.observations, data.states[1, j][[*range(T), T - 1]])
        np.testing.assert_array_equal(episode.actions, data.actions[1, j])
        np.testing.assert_array_equal(episode.rewards, data.rewards[1, j])


CART = """
from types import SimpleNamespace

from envs import Family

CART = Family(
    "my cart", horizon=5, state_dim=2, action_dim=1, train_tasks=2, test_tasks=1,
    task_low=(0.0, 0.0), task_high=(1.0, 1.0), batch=lambda tasks, seed: SimpleNamespace(),
    sample_tasks=lambda count, rng: rng.random((count, 2)),
)
"""


def test_a_family_of_the_user_s(tmp_path, monkeypatch):
    """It has no Gymnasium environment, and its file is never run because a dataset names it."""
    (tmp_path / "cart.py").write_text(CART)
    env, rng, hashes = str(tmp_path / "cart.py"), np.random.default_rng(0), []
    shapes = {"states": (3, 5, 2), "actions": (3, 5, 1), "rewards": (3, 5)}
    shapes |= {"query_states": (4, 2), "query_actions": (4, 1)}
    for i in range(2):
        part = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
        save_arrays(tmp_path / "data" / part_name(i), part)
        hashes.append(file_hash(tmp_path / "data" / part_name(i)))
    meta = {
        "format": FORMAT,
        "env": env,
        "quality": "mixed",
        "recipe": "explore",
        "data_episodes": 3,
        "data_queries": 4,
    }
    meta |= {"train_tasks": [[0.1, 0.2], [0.3, 0.4]], "test_tasks": [[0.5, 0.6]], "sha256": hashes}
    save_json(tmp_path / "data" / "meta.json", meta)
    refused(
        tmp_path, "name that file yourself", export_minari, tmp_path / "data", tmp_path / "minari"
    )
    ids = export_minari(tmp_path / "data", tmp_path / "minari", env)
    assert ids == [f"t2mir/my-cart-mixed-explore/task-00{i}-v0" for i in range(2)]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    dataset = minari.load_dataset(ids[1])
    assert (
        dataset.env_spec is None
        and dataset.total_steps == 15
        and dataset[0].observations.dtype == np.float32
    )
    (tmp_path / "cart.py").rename(tmp_path / "moved.py")
    refused(tmp_path, "a family of its own", import_minari, tmp_path / "minari", tmp_path / "again")
    refused(
        tmp_path, "not of 'reach'", import_minari, tmp_path / "minari", tmp_path / "again", "reach"
    )
    import_minari(tmp_path / "minari", tmp_path / "again", str(tmp_path / "moved.py"))
    moved = str(tmp_path / "moved.py")
    assert read_meta(tmp_path / "again", moved) == meta | {"env": moved}
    (tmp_path / "tasks.json").write_text(
        json.dumps({"train": meta["train_tasks"], "test": meta["test_tasks"]})
    )
    import_minari(
        tmp_path / "minari",
        tmp_path / "foreign",
        str(tmp_path / "moved.py"),
        tmp_path / "tasks.json",
    )
    moved = str(tmp_path / "moved.py")
    assert (
        load_dataset(tmp_path / "foreign", moved).states
        == load_dataset(tmp_path / "again", moved).states
    ).all()


def test_command_line(point_folder, tmp_path, monkeypatch, capsys):
    out, again = str(tmp_path / "minari"), str(tmp_path / "again")
    ended = run("tools/minari_io.py", ["export", str(point_folder), out], monkeypatch, capsys)
    assert ended.code == 0 and ended.out.startswith("3 Minari datasets")
    ended = run(
        "tools/minari_io.py", ["import", out, again, "--env", "point-robot"], monkeypatch, capsys
    )
    assert (
        ended.code == 0
        and ended.out.strip() == again
        and read_meta(again) == read_meta(point_folder)
    )
    assert (
        "never overwritten"
        in run("tools/minari_io.py", ["import", out, again], monkeypatch, capsys).error
    )
    assert (
        "never overwritten"
        in run("tools/minari_io.py", ["export", str(point_folder), out], monkeypatch, capsys).error
    )


# ----------------------------------------------------------------------------------- made elsewhere
def with_collector(root, monkeypatch, name, env, episodes):
    """A random policy's episodes, recorded by Minari."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    env = minari.DataCollector(env)
    for i in range(episodes):
        env.reset(seed=i)
        while not env.step(env.action_space.sample())[3]:
            pass
    with warnings.catch_warnings(action="ignore"):
        env.create_dataset(name)
    env.close()


def with_buffers(root, monkeypatch, name, env, episodes, steps=T, **spaces):
    """The same without DataCollector, which wants jax; `spaces`: without the environment's name."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    buffer = []
    for i in range(episodes):
        observations, (actions, rewards) = [env.reset(seed=i)[0]], ([], [])
        for _ in range(steps):
            actions.append(env.action_space.sample())
            state, reward, *_ = env.step(actions[-1])
            observations.append(state)
            rewards.append(reward)
        ends = np.arange(steps) == steps - 1
        episode = {"observations": observations, "actions": actions, "rewards": rewards}
        episode |= {"terminations": ends & False, "truncations": ends, "infos": {}}
        buffer.append(minari.data_collector.EpisodeBuffer(**episode))
    with warnings.catch_warnings(action="ignore"):
        minari.create_dataset_from_buffers(name, buffer, **(spaces or {"env": env}))


def named(gym_id, entry_point, task):
    """A registered environment whose class is named by text: Minari cannot keep the class."""
    spec = copy.deepcopy(gym.spec(gym_id))
    spec.entry_point, spec.kwargs = entry_point, {"task": task}
    env = gym.make(spec)
    env.action_space.seed(round(1000 * sum(map(abs, task))))
    return env


def point(task):
    return named("t2mir/PointRobot-v0", "families.point_robot:PointRobot", task)


def tasks_file(folder, **changes):
    (folder / "tasks.json").write_text(
        json.dumps({"train": GOALS["train"][:2], "test": GOALS["test"]} | changes)
    )
    return folder / "tasks.json"


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Two tasks of 3 and 5 episodes."""
    for i, count in enumerate((3, 5)):
        with_buffers(
            tmp_path / "minari",
            monkeypatch,
            f"made/elsewhere-{i}-v0",
            point(GOALS["train"][i]),
            count,
        )
    tasks_file(tmp_path)
    return tmp_path / "minari"


@pytest.mark.parametrize("make", [with_collector, with_buffers])
def test_foreign_datasets(make, tmp_path, monkeypatch, capsys):
    if make is with_collector:
        pytest.importorskip(
            "jax", reason="Minari's DataCollector wants jax: pip install 'minari[create]'"
        )
    for i, count in enumerate((3, 5)):
        make(
            tmp_path / "minari",
            monkeypatch,
            f"made/elsewhere-{i}-v0",
            point(GOALS["train"][i]),
            count,
        )
    folders = [tmp_path / name for name in ("data", "same", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        import_minari(
            tmp_path / "minari", folder, "point-robot", tasks_file(tmp_path), queries=30, seed=seed
        )
    assert "2 tasks x 3 episodes; 2 left out" in capsys.readouterr().out
    hashes = [read_meta(folder)["sha256"] for folder in folders]
    assert hashes[0] == hashes[1] and not set(hashes[0]) & set(hashes[2])
    data = load_dataset(folders[0], "point-robot")
    assert (data.meta["train_tasks"], data.meta["test_tasks"]) == (
        GOALS["train"][:2],
        GOALS["test"],
    )
    assert data.states.shape == data.actions.shape == (2, 3, T, 2) and data.query_states.shape == (
        2,
        30,
        2,
    )
    assert {getattr(data, key).dtype for key in ARRAYS} == {torch.float32}
    for i in range(2):
        for j, episode in zip(
            range(3), minari.load_dataset(f"made/elsewhere-{i}-v0"), strict=False
        ):
            np.testing.assert_array_equal(
                data.states[i, j], episode.observations[:-1].astype(np.float32)
            )
            np.testing.assert_array_equal(data.actions[i, j], episode.actions)
            np.testing.assert_array_equal(data.rewards[i, j], episode.rewards.astype(np.float32))
        steps = {
            tuple(row)
            for row in torch.cat([data.states[i], data.actions[i]], -1).flatten(0, 1).tolist()
        }
        queries = [
            tuple(row)
            for row in torch.cat([data.query_states[i], data.query_actions[i]], -1).tolist()
        ]
        assert (
            set(queries) <= steps and len(set(queries)) == 30
        )  # different steps of the data, with what was done
    rng = torch.Generator().manual_seed(0)
    assert (
        sample_dpt(data, 4, 2, 1, rng, DPTSettings()).prompt.steps
        == sample_ad(data, 4, 2, 1, rng).prompt.steps
        == 2 * T
    )


def test_foreign_ids_stay_whole_numbers(tmp_path, monkeypatch):
    room = named("t2mir/DarkRoom-v0", "families.darkroom:DarkRoom", [1, 1])
    spaces = {"observation_space": room.observation_space, "action_space": room.action_space}
    with_buffers(tmp_path / "minari", monkeypatch, "room-v0", room, 2, 100, **spaces)
    tasks = tasks_file(tmp_path, train=[[1, 1]], test=[[2, 2]])
    data = load_dataset(
        import_minari(tmp_path / "minari", tmp_path / "data", "darkroom", tasks), "darkroom"
    )
    assert not data.states.is_floating_point() and not data.actions.is_floating_point()
    assert ((data.states[0, :, 1:] == 1).all(-1).float() == data.rewards[0, :, :-1]).all()
    tasks.write_text(json.dumps(GOALS))
    refused(
        tmp_path,
        "a DarkRoom goal is",
        import_minari,
        tmp_path / "minari",
        tmp_path / "new",
        "darkroom",
        tasks,
    )


# -------------------------------------------------------------------------------------- wrong input
def refused(tmp_path, message, function, *args, **options):
    """One line, and nothing is written, not even a folder."""
    before = (contents(tmp_path), sorted(tmp_path.rglob("*")))
    with pytest.raises(ValueError, match=message) as error:
        function(*args, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) > 20
    assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("missing", ["minari", "h5py"])
def test_missing_minari(missing, point_folder, root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    line = r"--export-minari needs Minari: pip install 't2mir\[minari\]'"
    refused(tmp_path, line, export_minari, point_folder, tmp_path / "out")
    refused(
        tmp_path,
        "import needs Minari",
        import_minari,
        root / "t2mir/point-robot-medium",
        tmp_path / "out",
    )


def test_export_refuses(point_folder, tmp_path):
    refused(tmp_path, "no dataset in", export_minari, tmp_path / "nothing", tmp_path / "out")
    damaged = shutil.copytree(point_folder, tmp_path / "damaged")
    (damaged / part_name(1)).write_bytes(b"")
    refused(tmp_path, "damaged", export_minari, damaged, tmp_path / "out")
    export_minari(point_folder, tmp_path / "out")
    refused(tmp_path, "never overwritten", export_minari, point_folder, tmp_path / "out")


def test_an_export_that_fails_leaves_nothing(point_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setenv("MINARI_DATASETS_PATH", "the user's")
    monkeypatch.setattr("tools.minari_io.save_arrays", full)
    with pytest.raises(OSError, match="no space left"):
        export_minari(point_folder, tmp_path)
    assert not contents(tmp_path) and os.environ["MINARI_DATASETS_PATH"] == "the user's"


def test_minari_s_root_is_left_as_it_was(point_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    monkeypatch.chdir(tmp_path)
    export_minari(point_folder, "out")  # Minari would join a relative path to itself
    assert "MINARI_DATASETS_PATH" not in os.environ
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in tmp_path.glob("out/t2mir/*")) == ["point-robot-medium"]


def test_import_refuses_sources_and_targets(root, foreign, tmp_path):
    exported, new, tasks = (
        root / "t2mir/point-robot-medium",
        tmp_path / "new",
        tmp_path / "tasks.json",
    )
    ids = ["task-000-v0", "task-001-v0"]
    refused(tmp_path, "holds no Minari datasets", import_minari, tmp_path / "nothing", new)
    refused(tmp_path, "never overwritten", import_minari, exported, tmp_path / "minari")
    refused(
        tmp_path,
        "holds data of 'point-robot', not of 'reach'",
        import_minari,
        exported,
        new,
        "reach",
    )
    refused(tmp_path, "no whole Minari dataset", import_minari, exported, new, ids=["task-009-v0"])
    refused(tmp_path, "2 of the dataset's 3 tasks", import_minari, exported, new, ids=ids)
    shutil.copytree(root / "t2mir/point-robot-medium", tmp_path / "twice")
    shutil.copytree(tmp_path / "twice/task-000-v0", tmp_path / "twice/task-003-v0")
    refused(
        tmp_path,
        "4 of the dataset's 3 tasks: all are needed, each once",
        import_minari,
        tmp_path / "twice",
        new,
    )
    refused(tmp_path, "more than one dataset", import_minari, root, new)
    refused(tmp_path, "say --env and --tasks", import_minari, foreign, new)
    refused(tmp_path, "say --env and --tasks", import_minari, foreign, new, "point-robot")
    refused(
        tmp_path, "unknown environment 'atlantis'", import_minari, foreign, new, "atlantis", tasks
    )
    line = r"elsewhere-0-v0 holds data of 't2mir/PointRobot-v0', not of cheetah-vel \('t2mir/Cheet"
    velocities = tmp_path / "velocities.json"
    velocities.write_text('{"train": [1.0, 2.0], "test": [3.0]}')
    refused(tmp_path, line, import_minari, foreign, new, "cheetah-vel", velocities)


def test_what_the_command_line_says_is_checked_before_anything_is_read(
    foreign, tmp_path, monkeypatch
):
    monkeypatch.setattr("tools.minari_io._read", lambda *_: pytest.fail("read a dataset"))
    start = (tmp_path, "unknown environment 'atlantis'", import_minari, foreign, tmp_path / "new")
    tasks = tasks_file(tmp_path, train=GOALS["train"])
    refused(*start, "atlantis")
    refused(*start, "atlantis", tasks)
    for message, *options in (
        ("--tasks needs --env", None, tasks),
        ("names 3 training tasks, and there are 2 datasets", "point-robot", tasks),
        ("nowhere.json is missing", "point-robot", tmp_path / "nowhere.json"),
        ("--queries must be at least 1", "point-robot", tasks, None, 0),
    ):
        refused(tmp_path, message, import_minari, foreign, tmp_path / "new", *options)


def test_a_taken_target_is_refused_before_anything_is_collected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minari/t2mir/darkroom-medium-explore").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    line = "--quality medium --recipe explore --data-episodes 5 --export-minari minari"
    assert "never overwritten" in run("collect.py", line.split(), monkeypatch, capsys).error
    monkeypatch.setitem(sys.modules, "h5py", None)
    line = line.replace("medium", "mixed")
    assert "needs Minari" in run("collect.py", line.split(), monkeypatch, capsys).error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": GOALS["train"]}, "names 3 training tasks, and there are 2 datasets"),
        ({"train": GOALS["train"][:1]}, "names 1 training tasks, and there are 2 datasets"),
        (
            {"train": GOALS["train"][1::-1]},
            r"elsewhere-0-v0 was made in task \[0.5, -0.25\], and .* says \[0.1, 0.9\]",
        ),
        ({"train": [[0.5], [0.1]]}, "a task of point-robot is 2 numbers"),
        ({"test": []}, "at least 1 item"),
        ({"test": GOALS["train"][:1]}, "holds out"),
    ],
)
def test_import_refuses_tasks(changes, message, foreign, tmp_path):
    tasks = tasks_file(tmp_path, **changes)
    refused(tmp_path, message, import_minari, foreign, tmp_path / "new", "point-robot", tasks)


def test_import_refuses_episodes(foreign, tmp_path, monkeypatch):
    import_it = (import_minari, foreign, tmp_path / "new", "point-robot", tmp_path / "tasks.json")
    shutil.rmtree(foreign / "made/elsewhere-1-v0")
    for steps in (T - 1, T + 1):
        with_buffers(
            foreign, monkeypatch, "made/elsewhere-1-v0", point(GOALS["train"][1]), 2, steps
        )
        line = f"elsewhere-1-v0: episode 0 has {steps} steps, those of point-robot have {T}"
        refused(tmp_path, line, *import_it)
        shutil.rmtree(foreign / "made/elsewhere-1-v0")
    wide = gym.wrappers.TransformObservation(
        point(GOALS["train"][1]), lambda x: np.append(x, 0), None
    )
    box = {"observation_space": gym.spaces.Box(-9, 9, (3,)), "action_space": wide.action_space}
    with_buffers(foreign, monkeypatch, "made/elsewhere-1-v0", wide, 2, **box)
    refused(tmp_path, r"observations of episode 0 have shape \(21, 3\), not \(21, 2\)", *import_it)
    shutil.rmtree(foreign / "made/elsewhere-1-v0")
    bad = gym.wrappers.TransformReward(point(GOALS["train"][1]), lambda r: np.nan)
    spaces = {"observation_space": bad.observation_space, "action_space": bad.action_space}
    with_buffers(foreign, monkeypatch, "made/elsewhere-1-v0", bad, 2, **spaces)
    refused(tmp_path, "task-001.npz: rewards holds values that are not finite", *import_it)


@pytest.fixture
def copied(root, tmp_path):
    """Exported datasets that a test may damage."""
    return shutil.copytree(root / "t2mir/point-robot-medium", tmp_path / "copied")


def test_import_refuses_what_was_changed_after_its_export(copied, tmp_path):
    import_it, data = (import_minari, copied, tmp_path / "new"), copied / "task-001-v0" / "data"
    about = (data / "metadata.json").read_text()
    (data / "metadata.json").write_text(about.replace('"task": 1', '"task": 2'))
    refused(tmp_path, "task-001-v0 is not as it was exported .*checksum", *import_it)
    (data / "metadata.json").write_text(about.replace('"data_seed": 0', '"data_seed": 1'))
    refused(tmp_path, "task-001-v0 is not as it was exported .*checksum", *import_it)
    (data / "metadata.json").write_text(about.replace('"checksum": "', '"checksum": "0'))
    refused(tmp_path, "task-001-v0 is not as it was exported .*checksum", *import_it)
    (data / "metadata.json").write_text(about)
    with np.load(data / "queries.npz") as file:
        queries = dict(file)
    save_arrays(data / "queries.npz", {**queries, "query_actions": -queries["query_actions"]})
    refused(tmp_path, "task-001-v0 is not as it was exported .*checksum", *import_it)
    np.savez(
        data / "queries.npz", **{**queries, "query_actions": np.array([envs], dtype=object)[:0]}
    )
    refused(tmp_path, "task-001-v0 is not as it was exported .*pickle", *import_it)
    (data / "queries.npz").unlink()
    refused(tmp_path, "task-001-v0 is not as it was exported", *import_it)
    (data / "main_data.hdf5").write_bytes(b"no HDF5")
    refused(tmp_path, "task-001-v0 is no whole Minari dataset", *import_it)


def test_no_environment_is_made_that_a_file_names(copied, tmp_path, monkeypatch):
    path = copied / "task-000-v0" / "data" / "metadata.json"
    about = json.loads(path.read_text())
    del about["observation_space"]
    path.write_text(json.dumps(about))
    monkeypatch.setattr(gym, "make", lambda *_, **__: pytest.fail("made an environment"))
    refused(tmp_path, "names no spaces", import_minari, copied, tmp_path / "new")
