"""test_minari_refuses.py: what the way to Minari's format and back refuses, in one line each.

Run: pytest tests/test_minari_refuses.py
"""

import json
import os
import shutil
import sys

import gymnasium as gym
import minari_sets
import numpy as np
import pytest
from commands import contents, run
from minari_sets import (
    GOALS,
    T,
    point,
    refused,
    tasks_file,
    with_buffers,
)

import envs
from data import part_name
from support.files import save_arrays
from tools.minari_io import export_minari, import_minari

point_folder, root, foreign = minari_sets.point_folder, minari_sets.root, minari_sets.foreign


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
