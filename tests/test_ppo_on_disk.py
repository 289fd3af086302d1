"""PPO on disk (App. D.2): what training writes, and that it continues bit for bit.

Tasks are those of test_ppo.py.
Run: pytest tests/test_ppo_on_disk.py
"""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from teacher_files import DAMAGE, Stop, check_refused, contents, damage_state, stopping
from test_ppo import GOALS, POINTS, ROOM, SEED, SMALL, TASKS, agents, make

from support import files
from teachers.ppo import network_input, train_ppo
from teachers.rollouts import load_policies
from teachers.stored import STATE, read_state, save_state

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("one_thread")]


def settings(cfg):
    return {**vars(cfg), "seed": list(SEED), "n": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of four segments, its reports; tests that change it copy it."""
    folder, reports = tmp_path_factory.mktemp("ppo") / "whole", []
    torch.set_num_threads(1)
    train_ppo(make(), SMALL, SEED, folder, lambda *report: reports.append(report))
    return folder, reports


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "copy")


# ------------------------------------------------------------------------------------------ on disk
def test_every_segment_trains_on(whole):
    steps = [load_file(path) for path in sorted(whole[0].glob("step-*"))]
    moves = [after["w0"] - before["w0"] for before, after in pairwise(steps)]
    assert all(move.abs().max() > 1e-4 for move in moves)
    state = load_file(whole[0] / STATE)
    # segments x epochs x minibatches: Adam is never restarted
    assert state["adam.0.step"] == 4 * 2 * 2


def test_names_headers_and_shapes(whole):
    folder, _ = whole
    names = [f"step-{step:010d}.safetensors" for step in (64, 128, 192, 256)]
    assert sorted(contents(folder)) == sorted([*names, STATE])
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            about = file.metadata()
        assert about.pop("crc").isdigit()
        assert about == {"t2mir": "2", "kind": "ppo", "step": str(int(name[5:15]))}
        shapes = {key: tuple(value.shape) for key, value in load_file(folder / name).items()}
        assert shapes == {
            "w0": (3, 2, 64), "w1": (3, 64, 64), "w2": (3, 64, 2),
            "b0": (3, 1, 64), "b1": (3, 1, 64), "b2": (3, 1, 2), "log_std": (3, 1, 2),
        }  # fmt: skip
    with safe_open(folder / STATE, framework="pt") as file:
        about = file.metadata()
    assert (about["t2mir"], about["step"]) == ("2", "256")
    assert json.loads(about["settings"]) == settings(SMALL)


@pytest.mark.parametrize(
    ("steps", "save_every", "saved"),
    [
        (256, 100, [128, 256]),
        (200, 64, [64, 128, 192, 256]),
        (320, 128, [128, 256, 320]),
        (1, 1, [64]),
    ],
)
def test_saves_are_at_whole_rollouts_and_at_the_end(tmp_path, steps, save_every, saved):
    cfg = replace(SMALL, steps=steps, save_every=save_every, epochs=1)
    train_ppo(make(), cfg, SEED, tmp_path)
    assert [int(path.name[5:15]) for path in sorted(tmp_path.glob("step-*"))] == saved


def test_how_often_is_saved_does_not_change_the_policies(whole, tmp_path):
    train_ppo(make(), replace(SMALL, save_every=128), SEED, tmp_path)
    for path in tmp_path.glob("step-*"):
        assert path.read_bytes() == (whole[0] / path.name).read_bytes()


@pytest.mark.parametrize("family", [POINTS, ROOM], ids=["points", "room"])
def test_stored_policies_act_like_the_trained_ones(family, tmp_path):
    """The likeliest action of the density that was learnt."""
    train_ppo(make(family, GOALS["room"]), replace(SMALL, lr=1e-2), SEED, tmp_path)
    stack = agents(family)
    stack.load(read_state(tmp_path, "ppo-state", settings(replace(SMALL, lr=1e-2)))[0])
    states = np.random.default_rng(0).normal(0, 3, (3, 50, 2)).astype(np.float32)
    if family is ROOM:
        states = np.stack(np.divmod(np.arange(12), 4), 1)[None].repeat(3, 0)
    inputs = network_input(family, states)
    found = load_policies(tmp_path, [256]).act(inputs)
    assert len(found.unique()) > 1  # not the same action everywhere
    if family is ROOM:
        every = [torch.full((3, 12), action) for action in range(4)]
        assert torch.equal(
            found, torch.stack([stack.log_density(inputs, a) for a in every]).argmax(0)
        )
    else:
        inside, density = found.abs() < 1, stack.log_density(inputs, found)
        best = -(stack.log_std + 0.5 * math.log(2 * math.pi)).sum(-1).expand(3, 50)
        rows = inside.all(-1)
        assert rows.float().mean() > 0.1
        torch.testing.assert_close(density[rows], best[rows])


def test_same_seed_same_bytes_other_seed_other(whole, tmp_path):
    scramble()
    train_ppo(make(), SMALL, SEED, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(whole[0])
    train_ppo(make(), SMALL, (3, 2), tmp_path / "other")
    other = contents(tmp_path / "other")
    assert other.keys() == contents(whole[0]).keys()
    assert all(blob != other[name] for name, blob in contents(whole[0]).items())


# -------------------------------------------------------------------------------- stop and continue
def scramble():
    """A process that continues knows nothing of the random streams of the one that was stopped."""
    np.random.seed(12345)
    torch.manual_seed(12345)


@pytest.mark.parametrize(("save_every", "at"), [(64, 64), (64, 128), (64, 256), (128, 192)])
def test_continued_run_is_the_uninterrupted_one(tmp_path, save_every, at):
    cfg, reports, first, second = replace(SMALL, save_every=save_every), [], [], []
    train_ppo(make(), cfg, SEED, tmp_path / "whole", lambda *report: reports.append(report))
    with pytest.raises(Stop):
        train_ppo(make(), cfg, SEED, tmp_path / "stopped", stopping(at, first))
    kept = contents(tmp_path / "stopped")
    done = (at - 1) // save_every * save_every  # the rollout whose report fails is not saved
    assert len(kept) == (done // save_every + 1 if done else 0)
    scramble()
    train_ppo(make(), cfg, SEED, tmp_path / "stopped", lambda *report: second.append(report))
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert first == reports[: at // 64] and second == reports[done // 64 :]
    for name, blob in kept.items():
        assert name == STATE or contents(tmp_path / "whole")[name] == blob


def test_stopped_between_policy_and_state(whole, tmp_path, monkeypatch):
    """The state comes last: one that is ahead of the policies would leave a hole."""
    write, written = files.write_atomically, []

    def fail(path, call):
        written.append(path.name)
        if written.count(STATE) == 2:
            raise Stop
        write(path, call)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", fail)
        with pytest.raises(Stop):
            train_ppo(make(), SMALL, SEED, tmp_path)
    assert written == ["step-0000000064.safetensors", STATE, "step-0000000128.safetensors", STATE]
    assert read_state(tmp_path, "ppo-state", settings(SMALL))[1] == 64
    scramble()
    train_ppo(make(), SMALL, SEED, tmp_path)
    assert contents(tmp_path) == contents(whole[0])


def test_finished_run_returns_at_once(copy):
    def never(*_):
        raise AssertionError("something was played")

    batch = make()
    batch.step = never
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    train_ppo(batch, SMALL, SEED, copy)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_state_holds_everything(whole):
    """Loading and saving again gives the same bytes; the value network is in it."""
    folder, _ = whole
    stack, again = agents(seed=9), folder.parent / "again"
    stack.load(read_state(folder, "ppo-state", settings(SMALL))[0])
    save_state(again, "ppo-state", stack.tensors(), 256, settings(SMALL))
    assert (again / STATE).read_bytes() == (folder / STATE).read_bytes()
    names = load_file(folder / STATE)
    assert len([name for name in names if name.startswith("weights.")]) == 6 + 6 + 1
    moments = [name for name in names if name.endswith((".exp_avg", ".exp_avg_sq"))]
    assert len(moments) == 2 * 13


def test_reports(whole, tmp_path):
    reports = whole[1]
    assert [step for step, _ in reports] == [64, 128, 192, 256]
    values = [value for _, value in reports]
    assert all(-40 < value < -2 for value in values) and len({*values}) == 4
    none = []  # rollouts shorter than an episode
    cfg = replace(SMALL, steps=16, n_steps=8, batch=8)
    train_ppo(make(), cfg, SEED, tmp_path, lambda *report: none.append(report))
    assert [step for step, _ in none] == [8, 16] and np.isnan([value for _, value in none]).all()


# ----------------------------------------------------------------------------------------- refusals
def refused(folder, message, cfg=SMALL, seed=SEED, batch=None):
    check_refused(lambda place: train_ppo(batch or make(), cfg, seed, place), folder, message)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_state_is_named(copy, how):
    damage_state(copy, how)
    refused(copy, "damaged")


@pytest.mark.parametrize(
    "about", [None, {"t2mir": "1"}, {"t2mir": "1", "kind": "ppo-state", "step": "64"}]
)
def test_foreign_state_is_named(copy, about):
    """Files that were not written by `save_tensors`."""
    save_file({"a": torch.zeros(3)}, copy / STATE, metadata=about)
    refused(copy, "damaged")


def test_state_of_another_kind_or_format_is_named(copy):
    shutil.copy(copy / "step-0000000064.safetensors", copy / STATE)
    refused(copy, "no ppo-state of format 2")
    text = json.dumps(settings(SMALL))
    about = {"t2mir": "1", "kind": "ppo-state", "step": "64", "settings": text}
    files.save_tensors(copy / STATE, {"a": torch.zeros(3)}, about)
    refused(copy, "no ppo-state of format 2")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"steps": 512}, "steps"),
        ({"lr": 3e-4}, "lr"),
        ({"n_steps": 32}, "n_steps"),
        ({"gamma": 0.99}, "gamma"),
    ],
)
def test_state_of_other_settings_is_named(copy, change, name):
    refused(copy, rf"other settings \({name}\)", cfg=replace(SMALL, **change))


def test_state_of_another_seed_or_environment_is_named(whole, tmp_path):
    refused(whole[0], r"other settings \(seed\)", seed=(3, 2))
    refused(whole[0], r"other settings \(n\)", batch=make(tasks=TASKS[:2]))
    with pytest.raises(Stop):
        train_ppo(make(), SMALL, SEED, tmp_path, stopping(128, []))
    refused(tmp_path, "another environment", batch=make(ROOM, GOALS["room"]))
