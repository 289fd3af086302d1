"""Fixtures shared by the tests: tiny datasets, and a short run on one.

Two of DarkRoom (8 training and 4 held-out goals) and one of Point-Robot (5 and 2), whose teachers
have 16 hidden units and 400 steps.
"""

import json

import pytest
import torch
from commands import at_home, changed
from tiny import SMALL, trainer

from collect import collect
from config import Collection, Data, Teachers, Work
from data import load_dataset

RUN = {"seed", "preset", "eval_every", "eval_episodes", "device", "dtype"}
TRAIN = [[0, 0], [9, 9], [0, 5], [3, 4], [7, 2], [5, 5], [1, 8], [9, 0]]
TEST = [[2, 2], [8, 6], [4, 0], [0, 9]]


@pytest.fixture
def one_thread():
    """More threads would change the rounding of teachers (collect.py)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory):
    """Settings of the tiny dataset of the recipe `paper`; tests change them with `changed`."""
    folder = tmp_path_factory.mktemp("datasets")
    goals = folder / "goals.json"
    goals.write_text(json.dumps({"train": TRAIN, "test": TEST}))
    data = Data(data_episodes=10, data_queries=50, tasks=str(goals), datasets=str(folder))
    return Collection(data)


@pytest.fixture(scope="session")
def paper_folder(tiny_config):
    """Tests only read it; those that damage a dataset copy it first."""
    return collect(tiny_config, quiet=True)


@pytest.fixture
def fit(tiny_config, paper_folder):
    """fit(folder, backbone, **settings): a run of train.py on the tiny dataset."""
    with trainer(tiny_config) as call:
        yield call


@pytest.fixture(scope="session")
def few(tiny_config, paper_folder, tmp_path_factory):
    """A finished run of three steps; tests that change it copy it first."""
    with trainer(tiny_config) as call:
        return call(tmp_path_factory.mktemp("few") / "run")


@pytest.fixture
def tiny(tiny_config, paper_folder, tmp_path, monkeypatch):
    """The start of a command line: one variant of DPT, tiny, on a dataset that is there."""
    monkeypatch.chdir(tmp_path)
    for module in ("pictures.curves", "evaluate"):  # pictures take most of a tiny evaluation
        monkeypatch.setattr(f"{module}.draw_curve", lambda *_: None)
    data = {name: getattr(tiny_config.data, name) for name in ("tasks", "datasets", "recipe")}
    data |= {"data_episodes": 10, "data_queries": 50, "eval_every": 0, "queries": 4}
    small = {name: value for name, value in SMALL.items() if name not in RUN} | data
    small |= {"steps": 3, "episodes": 2, "actions": "sample", "temperature": 1.0}
    line = ["table1", "--envs", "darkroom", "--backbones", "dpt", "--preset", "cpu"]
    line += ["--variants", "T2MIR", "--repeats", "2", "--trial", "0", "--jobs", "1", "--set"]
    return line + [f"{k}={json.dumps(v) if isinstance(v, bool) else v}" for k, v in small.items()]


@pytest.fixture(scope="session")
def explore_config(tiny_config):
    return changed(tiny_config, recipe="explore")


@pytest.fixture(scope="session")
def explore_folder(explore_config):
    return collect(explore_config, quiet=True)


@pytest.fixture(scope="session")
def point_config(tmp_path_factory):
    """Settings of the tiny dataset of Point-Robot: groups of 3, 3 and 1 tasks.

    Each task has ten checkpoints.
    """
    data = Data(
        env="point-robot",
        data_episodes=23,
        data_queries=40,
        train_tasks=5,
        test_tasks=2,
        datasets=str(tmp_path_factory.mktemp("point")),
    )
    teachers = Teachers(
        teacher_steps=400,
        teacher_save_every=40,
        teacher_warmup=40,
        teacher_hidden=16,
        teacher_batch=32,
        teacher_lr=3e-3,
        teacher_alpha=0.02,
        teacher_group=3,
    )
    return Collection(data, teachers, Work(workers=1))


@pytest.fixture(scope="session")
def point_folder(point_config):
    """Tests only read it, and the teachers beside it."""
    with at_home():
        return collect(point_config, quiet=True)


@pytest.fixture(scope="session")
def paper_data(paper_folder):
    return load_dataset(paper_folder)


@pytest.fixture(scope="session")
def explore_data(explore_folder):
    return load_dataset(explore_folder)


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved, as matplotlib holds them."""
    from pictures.curves import save

    found = []
    for place in ("figures", "pictures.assignments", "pictures.health"):
        monkeypatch.setattr(f"{place}.save", lambda *what: (found.append(what[0]), save(*what)))
    return found
