"""Whole datasets by trained teachers (App. D.2): interrupted, killed, damaged, on a full disk.

The tiny Point-Robot dataset of conftest.py, whose teachers learn in seconds.
Run: pytest tests/test_teachers_on_disk.py
"""

import json
import shutil
import signal
import time
from collections import Counter, namedtuple
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import at_home, changed, flags, start
from teaching import DAMAGE, LONG, check_point_robot, flip, one_line, unchanged, written

from collect import collect, dataset_folder, split_of
from config import Teachers
from data import load_dataset
from envs import random_returns, split_tasks
from support import files
from support.files import Damaged
from teachers import teachers as module
from teachers.rollouts import load_policies
from teachers.stored import policy_file
from teachers.teachers import groups_of, load_levels, teachers_folder


# ----------------------------------------------------------------------------------- whole datasets
def everything(folder):
    return {name: digest for name, (digest, _) in written(folder).items()}


@pytest.fixture
def cfg(point_config, point_folder, tmp_path):
    """The settings of the tiny dataset for a copy of its folder, teachers included."""
    shutil.copytree(point_config.data.datasets, tmp_path / "data")
    return changed(point_config, datasets=str(tmp_path / "data"))


def teachers_of(cfg):
    (folder,) = (Path(cfg.data.datasets) / "teachers").iterdir()
    return folder


def levels_of(cfg):
    """The arrays of all groups' levels, tasks joined."""
    found = {}
    for group in sorted(teachers_of(cfg).glob("group-*")):
        with np.load(group / "levels.npz") as file:
            for name in file.files:
                found.setdefault(name, []).append(file[name])
    axis = {"sampled": 1, "mean": 1, "success": 1, "random": 0}
    return {name: np.concatenate(values, axis[name]) for name, values in found.items()}


def test_dataset_of_point_robot(point_config, point_folder):
    data = load_dataset(point_folder, "point-robot")
    train, test = split_tasks("point-robot", 56, train=5, test=2)
    assert (data.meta["train_tasks"], data.meta["test_tasks"]) == (train, test)
    assert data.states.shape == (5, 23, 20, 2) and data.query_states.shape == (5, 40, 2)
    for i, goal in enumerate(train):
        check_point_robot(
            goal, *(getattr(data, name)[i].numpy() for name in ("states", "actions", "rewards"))
        )
    torch.testing.assert_close(data.state_mean, data.states.mean((0, 1, 2)))
    levels = levels_of(point_config)
    assert (
        levels["sampled"].shape == (10, 7, 5)
        and data.meta["behaviour"] == [[40 * (c + 1) for c in range(10)]] * 5
    )
    best = levels["mean"].mean(2).argmax(0)
    for i in range(5):  # labels: the mean action of the best checkpoint
        folder = teachers_of(point_config) / f"group-{i // 3:03d}"
        label = load_policies(folder, [40 * (best[i] + 1)], i % 3).act(data.query_states[i][None])[
            0
        ]
        torch.testing.assert_close(data.query_actions[i], label, atol=1e-6, rtol=0)


def test_reference_returns(point_config, point_folder):
    meta, levels = json.loads((point_folder / "meta.json").read_text()), levels_of(point_config)
    first = 0
    for name in ("train", "test"):
        tasks, known = meta[f"{name}_tasks"], meta["reference"][name]
        rows = slice(first, first + len(tasks))
        first += len(tasks)
        np.testing.assert_allclose(known["random"], levels["random"][rows], atol=6e-4)
        np.testing.assert_allclose(known["teacher"], levels["mean"].mean(2).max(0)[rows], atol=6e-4)
        np.testing.assert_allclose(known["highest"], levels["sampled"].max((0, 2))[rows], atol=6e-4)
        assert all(
            len(str(value)) < 9 for values in known.values() for value in values
        )  # three decimals
    train, test = split_of(point_config)
    for group in (slice(0, 3), slice(3, 6), slice(6, 7)):
        np.testing.assert_array_equal(
            levels["random"][group], random_returns("point-robot", (train + test)[group])
        )
    assert (
        first == 7
        and (
            np.array(meta["reference"]["train"]["teacher"])
            > np.array(meta["reference"]["train"]["random"])
        ).all()
    )
    assert meta["best_level"] == [1.0] * 5
    returns, known = load_dataset(point_folder).returns.numpy().max(1), meta["reference"]["train"]
    random, highest = (np.array(known[name]) for name in ("random", "highest"))
    np.testing.assert_allclose(meta["maximum"], (returns - random) / (highest - random), atol=1e-3)
    assert meta["algorithm"]["hidden"] == 16 and meta["algorithm"]["replay"] == 400


def test_qualities_share_one_training(cfg):
    before = written(teachers_of(cfg))
    sampled = levels_of(cfg)["sampled"].mean(2)[:, :5]
    random = levels_of(cfg)["random"][:5]
    level = (sampled - random) / (sampled.max(0) - random)
    seen = {}
    for quality, limit in (("medium", 0.5), ("medium-expert", 0.8)):
        with at_home():
            data = load_dataset(collect(changed(cfg, quality=quality), quiet=True))
        want = [[40 * (c + 1) for c in np.flatnonzero(level[:, i] < limit)] for i in range(5)]
        assert data.meta["behaviour"] == want and all(want)
        assert all(value < limit for value in data.meta["best_level"])
        np.testing.assert_allclose(
            data.meta["best_level"], np.where(level < limit, level, -9).max(0), atol=1e-4
        )
        seen[quality] = data.returns.mean()
    assert seen["medium"] < seen["medium-expert"]
    assert len(list((Path(cfg.data.datasets) / "teachers").iterdir())) == 1
    unchanged(teachers_of(cfg), before)


@pytest.mark.parametrize("recipe", ["explore", "wander"])
def test_other_recipes_share_it_too(cfg, recipe):
    before = written(teachers_of(cfg))
    with at_home():
        data = load_dataset(collect(changed(cfg, recipe=recipe), quiet=True))
    for i, goal in enumerate(data.meta["train_tasks"]):
        check_point_robot(
            goal, *(getattr(data, name)[i].numpy() for name in ("states", "actions", "rewards"))
        )
    assert (
        data.returns.mean() < load_dataset(dataset_folder(cfg)).returns.mean() - 1
    )  # others go elsewhere
    unchanged(teachers_of(cfg), before)


def test_teachers_of_other_settings_are_others(point_config):
    train, test = split_of(point_config)
    tasks = train + test

    def folder(tasks=tasks, **changes):
        cfg = changed(point_config, **changes)
        return teachers_folder(Path("data"), cfg.data.env, cfg.teachers, tasks)

    first = folder()
    for change in (
        {"teacher_seed": 1},
        {"teacher_group": 2},
        {"teacher_lr": 1e-4},
        {"teacher_steps": 800},
        {"teacher_layer_norm": True},
    ):
        assert folder(**change) != first
        assert dataset_folder(changed(point_config, **change)) != dataset_folder(point_config)
    assert folder(tasks[:-1]) != first
    for change in ({"quality": "medium"}, {"data_seed": 5}, {"data_episodes": 99}, {"workers": 3}):
        assert folder(**change) == first


def test_a_setting_that_is_added_leaves_names_as_they_were(point_config, monkeypatch):
    """What says `before` is in no name: folders of older versions are found again."""

    def names():
        tasks = [[0.0, 0.1]]
        folder = teachers_folder(Path("data"), "point-robot", point_config.teachers, tasks)
        return folder.name, dataset_folder(point_config).name

    now, entry = names(), Teachers.__dataclass_fields__["teacher_layer_norm"]
    older = {k: v for k, v in Teachers.__dataclass_fields__.items() if v is not entry}
    monkeypatch.setattr(Teachers, "__dataclass_fields__", older)  # a version without the setting
    assert names() == now


# ----------------------------------------------------------------------- elsewhere, and interrupted
def test_two_processes_give_the_same_bytes(point_config, point_folder, tmp_path):
    collect(changed(point_config, workers=2, datasets=str(tmp_path)), quiet=True)
    assert (
        everything(tmp_path) == everything(point_config.data.datasets)
        and len(everything(tmp_path)) == 3 * 11 + 6
    )


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray_gives_the_same_bytes(point_config, point_folder, tmp_path, monkeypatch):
    """One start of Ray serves training and rolling out: it takes most of the time."""
    import ray

    start, end = ray.init, ray.shutdown
    monkeypatch.setattr(
        ray, "init", lambda *args, **options: ray.is_initialized() or start(*args, **options)
    )
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    try:
        collect(changed(point_config, cluster="local", datasets=str(tmp_path)), quiet=True)
        assert ray.is_initialized() and everything(tmp_path) == everything(
            point_config.data.datasets
        )
    finally:
        end()


def until(condition, process=None):
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_command_continues_to_the_same_bytes(
    point_config, point_folder, tmp_path, number
):
    """Stopped as the second group trains; the first is not touched again.

    Meanwhile nobody else may write.
    """
    cfg = changed(point_config, datasets=str(tmp_path / "data"))
    argv = ["--preset", "paper", *flags(cfg)]
    heard = {
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    }  # tests in the background ignore it
    process = start(argv, script="collect.py", cwd=tmp_path, **heard)
    until(lambda: list(tmp_path.glob("data/teachers/*/group-001/step-*")), process)
    with pytest.raises(ValueError) as error, at_home():
        collect(cfg, quiet=True)
    one_line(error, "another process is writing", dataset_folder(cfg))
    process.send_signal(number)
    out, err = process.communicate(timeout=LONG)
    if number == signal.SIGINT:
        assert (
            process.returncode == 128 + signal.SIGINT
            and "stopped; the same command continues" in err
            and "Traceback" not in err
        )
    else:
        assert process.returncode == -signal.SIGKILL
    group = teachers_of(cfg) / "group-001"
    assert not (group / "levels.npz").exists() and not list(dataset_folder(cfg).glob("task-*")), (
        "it was not caught"
    )
    done = written(teachers_of(cfg) / "group-000")
    assert "levels.npz" in done
    process = start(argv, script="collect.py", cwd=tmp_path)
    out, err = process.communicate(timeout=LONG)
    assert process.returncode == 0, err
    assert (
        "teachers of point-robot: return" in out
        and "optimum -" in out
        and "best checkpoint 100 %" in out
    )
    assert everything(cfg.data.datasets) == everything(point_config.data.datasets)
    unchanged(teachers_of(cfg) / "group-000", done)


# -------------------------------------------------------------------------------- damaged, and full
def fails(cfg, *parts):
    with pytest.raises(ValueError) as error, at_home():
        collect(cfg, quiet=True)
    one_line(error, *parts)


def redone(cfg, point_config, path, kept):
    """The damaged file is named and set aside, everything is as it was; files `kept` stand."""
    when = {path: path.stat().st_mtime_ns for path in kept}
    with at_home():
        collect(cfg, quiet=True)
    aside = path.with_name(f"{path.name}.damaged")
    assert aside.exists()
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    assert everything(cfg.data.datasets) == everything(point_config.data.datasets)
    assert {path: path.stat().st_mtime_ns for path in kept} == when


@pytest.mark.parametrize("complete", [True, False])
def test_damaged_part_is_named_and_redone_alone(cfg, point_config, complete, capsys):
    folder = dataset_folder(cfg)
    path = folder / "task-002.npz"
    flip(path, 0.3)
    if complete:
        with pytest.raises(ValueError) as error:
            load_dataset(folder)
        one_line(error, "task-002.npz is damaged", "redoes it alone")
    else:
        (folder / "meta.json").unlink()
    others = [p for p in folder.glob("*.npz") if p != path]
    redone(cfg, point_config, path, [*others, *teachers_of(cfg).glob("*/step-*")])
    assert str(path) in capsys.readouterr().err


def test_any_flipped_byte_of_levels_is_noticed_or_harmless(cfg):
    """The checksums of the archive's members find it; a time stamp says nothing."""
    path, outcomes = teachers_of(cfg) / "group-001" / "levels.npz", Counter()
    train, test = split_of(cfg)
    group = groups_of("point-robot", cfg.teachers, train + test, teachers_of(cfg))[1]
    whole, want = path.read_bytes(), load_levels(group)
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found = load_levels(group)
            assert all((found[name] == want[name]).all() for name in want)
            outcomes["harmless"] += 1
        except Damaged as error:
            assert "\n" not in str(error) and str(path) in str(error)
            outcomes["named"] += 1
    assert outcomes["named"] > outcomes["harmless"]


@pytest.mark.parametrize("how", ["empty", "shorter", "garbage", "not finite", "other shape"])
def test_damaged_levels_are_named_and_measured_alone(cfg, point_config, how, capsys):
    path = teachers_of(cfg) / "group-002" / "levels.npz"
    shutil.rmtree(dataset_folder(cfg))
    with np.load(path) as file:
        levels = dict(file)
    if how == "not finite":
        levels["sampled"][0, 0, 0] = np.nan
        files.save_arrays(path, levels)
    elif how == "other shape":
        files.save_arrays(path, levels | {"mean": levels["mean"][1:]})
    else:
        DAMAGE[how](path)
    redone(cfg, point_config, path, [*teachers_of(cfg).glob("*/step-*")])
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flipped number", "empty", "no policies"])
def test_damaged_checkpoint_is_named_and_its_group_redone_alone(cfg, point_config, how, capsys):
    path = policy_file(teachers_of(cfg) / "group-001", 160)
    shutil.rmtree(dataset_folder(cfg))
    DAMAGE[how](path)
    others = [p for p in teachers_of(cfg).glob("*/*") if p.is_file() and "group-001" not in str(p)]
    others = [p for p in others if p.name != ".lock"]
    redone(cfg, point_config, path, [*others, path.parent / "levels.npz"])
    assert str(path) in capsys.readouterr().err


def test_a_removed_checkpoint_is_trained_again(cfg, point_config):
    """Also where the state has gone past it."""
    path = policy_file(teachers_of(cfg) / "group-001", 160)
    shutil.rmtree(dataset_folder(cfg))
    path.unlink()
    with at_home():
        collect(cfg, quiet=True)
    assert everything(cfg.data.datasets) == everything(point_config.data.datasets)


def test_full_disk_is_refused_before_any_work(point_config, tmp_path, monkeypatch):
    """Of 5 x 23 x 20 steps of 20 bytes; then of the teachers, which need more."""
    usage, cfg = namedtuple("usage", "free"), changed(point_config, datasets=str(tmp_path / "data"))
    for free, named in ((40_000, dataset_folder(cfg).name), (60_000, "teachers")):
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path, free=free: usage(free))
        fails(cfg, named, "make room")
        assert not everything(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10**9))
    monkeypatch.setattr(module, "run_jobs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(cfg, quiet=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"env": "darkroom"}, "darkroom's teacher is a rule"),
        ({"env": "reach"}, "--teacher-warmup"),
        ({"teacher_save_every": 30}, "--teacher-save-every 30"),
        ({"teacher_seed": -1}, "--teacher-seed"),
        ({"data_seed": -1}, "--data-seed"),
        ({"workers": -1}, "--workers"),
        ({"train_tasks": -1}, "--train-tasks"),
        ({"teacher_device": "toaster"}, "--teacher-device toaster"),
        ({"tasks": "missing.json"}, "missing.json"),
        ({"env": "nope"}, "nope"),
        ({"data_episodes": 4}, "--data-episodes"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(point_config, tmp_path, change, named):
    fails(changed(point_config, datasets=str(tmp_path / "data"), **change), named)
    assert not list(tmp_path.iterdir())


def test_ray_that_is_missing_is_refused_before_any_work(point_config, tmp_path, monkeypatch):
    monkeypatch.setattr("support.jobs.find_spec", lambda name: None)
    fails(
        changed(point_config, datasets=str(tmp_path / "data"), cluster="local"),
        "--cluster needs Ray",
    )
    assert not list(tmp_path.iterdir())
