"""test_minari.py: datasets as Minari's and back, and Minari datasets that were made elsewhere.

Run: pytest tests/test_minari.py    DataCollector's test also wants jax: pip install minari[create]
"""

import json
import warnings

import minari_sets
import numpy as np
import pytest
import torch
from commands import contents, run
from minari_sets import (
    GOALS,
    E,
    T,
    make_elsewhere,
    minari,
    named,
    refused,
    tasks_file,
    with_buffers,
    with_collector,
)

from ad import sample_ad
from data import ARRAYS, FORMAT, file_hash, load_dataset, part_name, read_meta
from dpt import DPTSettings, sample_dpt
from envs import make_env
from support.files import save_arrays, save_json
from tools.minari_io import export_minari, import_minari

point_folder, root = minari_sets.point_folder, minari_sets.root


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
@pytest.mark.parametrize("make", [with_collector, with_buffers])
def test_foreign_datasets(make, tmp_path, monkeypatch, capsys):
    if make is with_collector:
        pytest.importorskip(
            "jax", reason="Minari's DataCollector wants jax: pip install 'minari[create]'"
        )
    make_elsewhere(make, tmp_path, monkeypatch)
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
