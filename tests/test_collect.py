"""Collection of a dataset (App. D.2) from DarkRoom's rule: same bytes however it was stopped.

Families with trained teachers: test_teachers_on_disk.py.
Run: pytest tests/test_collect.py
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import Trap, changed, rewrite
from teaching import flip

import collect as module
from collect import collect, dataset_folder
from config import Collection, Data
from data import file_hash, load_dataset
from envs import split_tasks
from families.darkroom import BatchedDarkRoom
from support.files import Damaged, only_writer

SAVE = module.save_arrays


def contents(folder):
    """Every file but the lock."""
    return {path.name: file_hash(path) for path in folder.iterdir() if path.name != ".lock"}


def stop_after(monkeypatch, parts):
    """Collection is interrupted when it is about to write one part more."""
    written = []

    def save(path, arrays):
        if len(written) == parts:
            raise KeyboardInterrupt
        written.append(path)
        SAVE(path, arrays)

    monkeypatch.setattr(module, "save_arrays", save)


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
    cfg = changed(tiny_config, datasets=str(tmp_path))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            collect(cfg, quiet=True)
    folder = dataset_folder(cfg)
    assert sorted(contents(folder)) == ["task-000.npz", "task-001.npz", "task-002.npz"]
    return cfg, folder


# ------------------------------------------------------------------------------ bytes and resuming
@pytest.mark.parametrize("recipe", ["paper", "explore"])
def test_same_settings_give_the_same_bytes(recipe, request, tmp_path):
    cfg = request.getfixturevalue("tiny_config" if recipe == "paper" else "explore_config")
    first = contents(request.getfixturevalue(f"{recipe}_folder"))
    again = contents(collect(changed(cfg, datasets=str(tmp_path)), quiet=True))
    assert len(first) == 9  # 8 tasks and meta.json
    assert again == first


def test_another_seed_gives_other_bytes(tiny_config, paper_folder, tmp_path):
    first = contents(paper_folder)
    other = contents(collect(changed(tiny_config, data_seed=1, datasets=str(tmp_path)), quiet=True))
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)
    assert len(set(first.values())) == 9  # nor do two tasks share their data


def test_stopped_collection_continues_to_the_same_bytes(stopped, paper_folder):
    cfg, folder = stopped
    with pytest.raises(ValueError, match="no dataset in"):
        load_dataset(folder)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    collect(cfg, quiet=True)
    assert contents(folder) == contents(paper_folder)
    assert all(
        path.stat().st_mtime_ns == when for path, when in written.items()
    )  # not written anew


def test_explore_continues_to_the_same_bytes(explore_config, explore_folder, tmp_path):
    cfg = changed(explore_config, datasets=str(tmp_path))
    folder = shutil.copytree(explore_folder, dataset_folder(cfg))
    for name in ("meta.json", "task-000.npz", "task-006.npz"):
        (folder / name).unlink()
    assert contents(collect(cfg, quiet=True)) == contents(explore_folder)


def test_deleted_part_of_a_complete_dataset_is_redone_alone(tiny_config, paper_folder, tmp_path):
    cfg = changed(tiny_config, datasets=str(tmp_path))
    folder = shutil.copytree(paper_folder, dataset_folder(cfg))
    (folder / "task-004.npz").unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    assert contents(collect(cfg, quiet=True)) == contents(paper_folder)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_interrupted_write_leaves_no_part(tiny_config, tmp_path, monkeypatch):
    def half(file, **arrays):
        file.write(b"PK half of a part")
        raise KeyboardInterrupt

    cfg = changed(tiny_config, datasets=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", half)
        with pytest.raises(KeyboardInterrupt):
            collect(cfg, quiet=True)
    assert (
        not list(dataset_folder(cfg).glob("task-*"))
        and not (dataset_folder(cfg) / "meta.json").exists()
    )
    assert load_dataset(collect(cfg, quiet=True)).tasks == 8


def trap(path):
    """A pickle that would leave a file behind it when it is opened."""
    path.write_bytes(pickle.dumps(Trap(path.with_name("sprung"))))


def zeros(path):
    """A whole archive of the right arrays, in which nothing stands."""
    with np.load(path) as part:
        arrays = {name: np.zeros_like(part[name]) for name in part.files}
    np.savez_compressed(path, **arrays)


DAMAGE = {
    "shorter": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "zero bytes": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a pickle": trap,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def redone_alone(cfg, folder, whole, names, capsys):
    """collect() names them, makes them anew as they were, keeps the old ones, touches no other."""
    kept = {p: p.stat().st_mtime_ns for p in folder.iterdir() if p.name not in (*names, ".lock")}
    capsys.readouterr()
    assert collect(cfg, quiet=True) == folder
    said = capsys.readouterr().err
    aside = {path.name for path in folder.glob("*.damaged")}
    assert aside == {f"{name}.damaged" for name in names}
    assert all(name in said for name in names) and said.count("\n") == len(names)
    for path in folder.glob("*.damaged"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert contents(folder) == contents(whole) and not (folder / "sprung").exists()
    assert all(
        path.stat().st_mtime_ns == when for path, when in kept.items() if path.suffix == ".npz"
    )
    collect(cfg, quiet=True)
    assert capsys.readouterr().err == ""  # and that is that


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_part_of_a_stopped_run_is_redone_alone(stopped, paper_folder, damage, capsys):
    cfg, folder = stopped
    DAMAGE[damage](folder / "task-001.npz")
    redone_alone(cfg, folder, paper_folder, ["task-001.npz"], capsys)


@pytest.fixture
def finished(tiny_config, paper_folder, tmp_path):
    cfg = changed(tiny_config, datasets=str(tmp_path))
    return cfg, shutil.copytree(paper_folder, dataset_folder(cfg))


@pytest.mark.parametrize("damage", [*DAMAGE, "zeros"])
def test_damaged_part_of_a_finished_dataset_is_redone_alone(finished, paper_folder, damage, capsys):
    cfg, folder = finished
    for name in ("task-002.npz", "task-005.npz"):
        (DAMAGE | {"zeros": zeros})[damage](folder / name)
    with pytest.raises(Damaged, match=r"task-002.npz .*collect.py .*redoes it alone"):
        load_dataset(folder)
    redone_alone(cfg, folder, paper_folder, ["task-002.npz", "task-005.npz"], capsys)


@pytest.mark.parametrize("damage", ["shorter", "flipped", "empty", "a pickle", "a folder"])
def test_a_damaged_meta_json_is_written_anew(finished, paper_folder, damage, capsys):
    cfg, folder = finished
    DAMAGE[damage](folder / "meta.json")
    redone_alone(cfg, folder, paper_folder, ["meta.json"], capsys)


def test_a_wrong_checksum_in_meta_json_sends_nobody_in_circles(finished, paper_folder, capsys):
    """The part is whole, what meta.json says of it is not: both are made anew, once."""
    cfg, folder = finished
    rewrite(folder / "meta.json", lambda meta: meta["sha256"].__setitem__(3, "0" * 64))
    with pytest.raises(Damaged, match=r"task-003.npz is damaged"):
        load_dataset(folder)
    redone_alone(cfg, folder, paper_folder, ["task-003.npz"], capsys)


def test_part_of_other_settings_is_redone(stopped, tiny_config, paper_folder, tmp_path, capsys):
    cfg, folder = stopped
    other = changed(tiny_config, data_episodes=11, datasets=str(tmp_path / "other"))
    shutil.copy(collect(other, quiet=True) / "task-002.npz", folder)
    redone_alone(cfg, folder, paper_folder, ["task-002.npz"], capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_tasks": [[2, 2], [0, 0]]}, r"holds out \[0, 0\], which is also a training task"),
        ({"test_tasks": [[2, 12]]}, r"not \[2, 12\]"),
        ({"train_tasks": [[True, 0]]}, r"not \[True, 0\]"),
        ({"train_tasks": "goals"}, "train_tasks 'goals': it should be a valid"),
        ({"data_episodes": "10"}, "data_episodes '10': it should be a valid integer"),
        ({"data_episodes": 10.5}, "data_episodes"),
        ({"quality": "best"}, "--quality 'best'"),
        ({"data_seed": -1}, "--data-seed -1"),
        ({"horizon": 50}, "horizon 50 is not darkroom's 100"),
        ({"sha256": ["0" * 64]}, "1 checksums for 8 tasks"),
        ({"sha256": [3] * 8}, "sha256.0 3: it should be a valid string"),
        ({"best_level": [float("nan")]}, "best_level"),
        ({"reference": {"test": {"random": [1.0]}}}, "reference.test.random has 1 of 4 returns"),
        ({"env": "/tmp/evil.py"}, "holds data of /tmp/evil.py: name that file yourself"),
        ({"env": 7}, "env 7: it should be a valid string"),
    ],
)
def test_meta_json_is_checked_by_the_declarations(finished, changes, message):
    """Somebody has meant it: the checksum fits. It is refused, and nothing is touched."""
    _, folder = finished
    rewrite(folder / "meta.json", lambda meta: meta.update(changes))
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(folder)
    assert "\n" not in str(error.value) and contents(folder) == before


def test_temporary_files_of_a_killed_collection_go(finished, paper_folder):
    cfg, folder = finished
    (folder / "task-004.npz").unlink()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in ("task-004.npz", "meta.json"):
        (folder / f".{name}.{gone.pid}.tmp").write_bytes(b"half of it")
    alive = folder / f".task-001.npz.{os.getppid()}.tmp"
    alive.write_bytes(b"of a worker that is still at it")
    collect(cfg, quiet=True)
    assert [path.name for path in folder.glob(".*.tmp")] == [alive.name]
    alive.unlink()
    assert contents(folder) == contents(paper_folder)


def other_goals(cfg, tmp_path) -> Collection:
    """The same settings with a task file of the same name and other goals."""
    file = tmp_path / "elsewhere" / Path(cfg.data.tasks).name
    file.parent.mkdir()
    goals = json.loads(Path(cfg.data.tasks).read_text())
    file.write_text(json.dumps({**goals, "train": goals["train"][::-1]}))
    return changed(cfg, tasks=str(file))


def test_folder_of_other_settings_is_refused(tiny_config, paper_folder, tmp_path):
    cfg = changed(tiny_config, datasets=str(tmp_path))
    medium = changed(cfg, quality="medium")
    assert dataset_folder(medium) != dataset_folder(cfg)
    shutil.copytree(paper_folder, dataset_folder(cfg))
    shutil.copytree(paper_folder, dataset_folder(medium))  # renamed by hand
    refused(medium, "other settings")
    assert dataset_folder(other_goals(cfg, tmp_path)) != dataset_folder(cfg)


def test_dataset_of_an_older_format_is_named(tiny_config, paper_folder, tmp_path):
    cfg = changed(tiny_config, datasets=str(tmp_path))
    folder = shutil.copytree(paper_folder, dataset_folder(cfg))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format": 1}))
    refused(cfg, "format 3 but 1; remove that folder to collect it anew")


def test_meta_says_what_was_collected(paper_data, point_folder):
    for meta in (paper_data.meta, json.loads((point_folder / "meta.json").read_text())):
        darkroom = meta["env"] == "darkroom"
        assert [meta[f"data_{name}"] for name in ("episodes", "queries", "seed")] == (
            [10, 50, 0] if darkroom else [23, 40, 0]
        )
        assert (meta["quality"], meta["recipe"], meta["task_seed"]) == ("mixed", "paper", 56)
        assert not {"tasks", "datasets", "workers", "cluster"} & meta.keys()
        assert ("teacher_steps" in meta) is ("reference" in meta) is not darkroom
        assert len(meta["sha256"]) == len(meta["train_tasks"])


def test_stopped_run_of_other_goals_is_not_continued(stopped, tmp_path):
    """Its parts hold rewards of other goals; they must not end up in this dataset."""
    cfg, _folder = stopped
    try:
        done = collect(other_goals(cfg, tmp_path), quiet=True)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        check_replay(load_dataset(done))


def test_folder_that_another_process_is_writing_is_refused(stopped):
    cfg, folder = stopped
    with only_writer(folder):
        refused(cfg, "another process is writing")
    collect(cfg, quiet=True)


@pytest.mark.parametrize("change", [{"data_episodes": 4}, {"data_queries": 0}, {"env": "dark"}])
def test_bad_settings_are_refused_before_anything_is_written(tiny_config, tmp_path, change):
    with pytest.raises(ValueError) as error:
        collect(changed(tiny_config, datasets=str(tmp_path / "new"), **change), quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_complete_dataset_is_said_to_be_complete(finished, capsys):
    cfg, folder = finished
    assert collect(cfg) == folder and capsys.readouterr().out == f"{folder} is complete\n"
    assert collect(cfg, quiet=True) == folder and capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------ a user's rule
RULE = """
import numpy as np
from envs import Family

class Still:
    def __init__(self, tasks, seed=0):
        self.count = len(tasks)

    def reset(self):
        return np.zeros((self.count, 2), np.float32)

    def step(self, actions):
        return self.reset(), np.zeros(self.count, np.float32)

def collect(data, train_tasks, index):
    e, q = data.data_episodes, data.data_queries
    arrays = {"states": np.zeros((e, 4, 2)), "actions": np.zeros((e, 4, 1)),
              "rewards": np.zeros((e, 4)), "query_states": np.zeros((q, 2)),
              "query_actions": np.zeros((q, 1))}
    return arrays

OWN = Family("still", horizon=4, state_dim=2, action_dim=1, train_tasks=3, test_tasks=1,
             task_low=(0.0,), task_high=(1.0,), batch=Still, teacher="rule", collect_task=collect,
             sample_tasks=lambda count, rng: rng.random((count, 1)))
"""


def by_rule(tmp_path, old="", new="") -> Collection:
    assert old in RULE
    (tmp_path / "rule.py").write_text(RULE.replace(old, new))
    data = {"data_episodes": 5, "data_queries": 6, "datasets": str(tmp_path / "data")}
    return Collection(Data(str(tmp_path / "rule.py"), **data))


def test_a_rule_of_the_users_makes_a_dataset(tmp_path):
    cfg = by_rule(tmp_path)
    assert load_dataset(collect(cfg, quiet=True), cfg.data.env).states.shape == (3, 5, 4, 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return arrays", "return arrays[3]", r"line 20: KeyError: 3"),
        ("return arrays", "return None", "of what collect_task gives, states is missing"),
        ("return arrays", "return 5", "AttributeError: 'int' object"),
        ('"rewards"', '"reward"', "of what collect_task gives, rewards is missing"),
        ("(q, 2)", "(q, 3)", r"query_states must be numbers of shape \(6, 2\), not .* \(6, 3\)"),
        ("np.zeros((e, 4))", "np.zeros((e, 4), str)", "rewards must be numbers of .*, not <U1"),
        ("np.zeros((e, 4))", "np.full((e, 4), np.nan)", "rewards holds values that are not finite"),
    ],
)
def test_a_wrong_rule_is_one_line_before_anything_is_saved(tmp_path, old, new, message):
    cfg = by_rule(tmp_path, old, new)
    with pytest.raises(ValueError, match=message) as error:
        collect(cfg, quiet=True)
    assert str(error.value).startswith(f"--env {cfg.data.env}") and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.npz"))


# ---------------------------------------------------------------------------------- what is stored
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


@pytest.mark.parametrize("recipe", ["paper", "explore"])
def test_stored_steps_are_those_of_the_room(recipe, request):
    check_replay(request.getfixturevalue(f"{recipe}_data"))


def test_only_training_goals_are_collected(paper_data, tiny_config):
    train, test = split_tasks("darkroom", file=tiny_config.data.tasks)
    assert paper_data.meta["train_tasks"] == train and paper_data.meta["test_tasks"] == test
    assert paper_data.tasks == len(train)
