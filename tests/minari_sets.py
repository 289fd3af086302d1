"""minari_sets.py: datasets that the tests of Minari's format read.

Skips a file of tests that imports it where Minari is not installed. Its fixtures are taken over by
name: `root = minari_sets.root`.
"""

import copy
import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
from commands import contents

from collect import settings_of
from config import Collection, Data
from data import FORMAT, file_hash, part_name
from support.files import save_arrays, save_json

minari = pytest.importorskip(
    "minari", reason="Minari is an optional extra: pip install 't2mir[minari]'"
)
pytest.importorskip(
    "h5py", reason="Minari's storage is an optional extra: pip install 't2mir[minari]'"
)
from tools.minari_io import export_minari  # noqa: E402

GOALS = {"train": [[0.5, -0.25], [0.1, 0.9], [-1.0, 0.3333]], "test": [[0.0, 0.0], [0.7, 0.7]]}
E, Q, T = 4, 6, 20


@pytest.fixture(scope="module")
def point_folder(tmp_path_factory):
    """A point-robot dataset as collect.py writes one, without teachers: any float32 at all."""
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


def make_elsewhere(make, tmp_path, monkeypatch):
    """Two tasks of 3 and 5 episodes, by with_collector or with_buffers."""
    for i, count in enumerate((3, 5)):
        make(
            tmp_path / "minari",
            monkeypatch,
            f"made/elsewhere-{i}-v0",
            point(GOALS["train"][i]),
            count,
        )
    tasks_file(tmp_path)
    return tmp_path / "minari"


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    return make_elsewhere(with_buffers, tmp_path, monkeypatch)


def refused(tmp_path, message, function, *args, **options):
    """One line, and nothing is written, not even a folder."""
    before = (contents(tmp_path), sorted(tmp_path.rglob("*")))
    with pytest.raises(ValueError, match=message) as error:
        function(*args, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) > 20
    assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before
