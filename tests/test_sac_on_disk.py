"""SAC on disk (App. D.2): what a run of training writes, and that it continues bit for bit.

Run: pytest tests/test_sac_on_disk.py
"""

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from teacher_files import DAMAGE, Stop, check_refused, contents, damage_state, stopping

from families.point_robot import POINT_ROBOT, BatchedPointRobot
from support.files import save_tensors
from teachers import sac as module
from teachers.sac import SACConfig, StackedSAC, train_sac
from teachers.stored import STATE, policy_file

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("one_thread")]

GOALS = [[0.8, -0.3], [-0.5, 0.9]]
SMALL = SACConfig(steps=160, warmup=30, save_every=40, lr=1e-3, hidden=8, batch=16, replay=1000)
SEED = (3, 1)


# ---------------------------------------------------------------------------------------- train_sac
class Watched(BatchedPointRobot):
    """Remembers the steps it was asked for: states, actions, rewards, next states of each."""

    family = POINT_ROBOT

    def __init__(self, tasks=GOALS):
        super().__init__(tasks)
        self.steps, self.starts = [], 0

    def reset(self):
        self.states, self.starts = super().reset(), self.starts + 1
        return self.states

    def step(self, actions):
        before = self.states
        self.states, rewards = super().step(actions)
        self.steps.append((before, actions.copy(), rewards, self.states))
        return self.states, rewards


def train(folder, cfg=SMALL, seed=SEED, **options):
    batch = Watched()
    train_sac(batch, cfg, seed, folder, **options)
    return batch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of four segments, its reports; tests that change it copy it."""
    folder, reports = tmp_path_factory.mktemp("sac") / "whole", []
    torch.set_num_threads(1)
    train(folder, report=lambda *report: reports.append(report))
    return folder, reports


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "copy")


def test_names_headers_and_contents(whole):
    folder, reports = whole
    steps = [40, 80, 120, 160]
    assert sorted(contents(folder)) == sorted(
        [STATE, *(f"step-{step:010d}.safetensors" for step in steps)]
    )
    for step in steps:
        with safe_open(policy_file(folder, step), framework="pt") as file:
            about = file.metadata()
        assert about.pop("crc").isdigit() and about == {
            "t2mir": "2",
            "kind": "sac",
            "step": str(step),
        }
        shapes = {
            name: tuple(value.shape) for name, value in load_file(policy_file(folder, step)).items()
        }
        weights = {
            "w0": (2, 2, 8),
            "w1": (2, 8, 8),
            "w2": (2, 8, 4),
            "b0": (2, 1, 8),
            "b1": (2, 1, 8),
            "b2": (2, 1, 4),
        }
        assert shapes == weights
    state, last = load_file(folder / STATE), load_file(policy_file(folder, 160))
    for i, name in enumerate(("w0", "b0", "w1", "b1", "w2", "b2")):
        assert torch.equal(last[name], state[f"actor.{i}"])
    for one, other in pairwise(steps):
        moved = (
            load_file(policy_file(folder, one))["w0"] - load_file(policy_file(folder, other))["w0"]
        )
        assert (moved.abs().amax((1, 2)) > 1e-3).all()  # both tasks learn in every segment
    assert [step for step, _ in reports] == list(range(20, 161, 20))


def test_warm_up_is_random_and_without_updates(tmp_path):
    batch = train(tmp_path, replace(SMALL, steps=800, warmup=800, save_every=800))
    first, after = (
        StackedSAC(2, 2, 2, SMALL, module.two_seeds(*SEED, 0)[0]),
        load_file(tmp_path / STATE),
    )
    for name, value in first.tensors().items():
        assert torch.equal(value, after[name]), name
    assert not [name for name in after if name.startswith("adam")]
    actions = np.stack([actions for _, actions, *_ in batch.steps])  # (800, tasks, da)
    assert actions.shape == (800, 2, 2) and abs(actions).max() <= 1
    assert (
        abs(actions.mean(0)).max() < 0.1 and abs(actions.std(0) - 3**-0.5).max() < 0.04
    )  # uniform
    assert abs(np.corrcoef(actions.reshape(800, 4).T) - np.eye(4)).max() < 0.15
    assert batch.starts == 40 + 1  # one to count the tasks


def test_then_the_policy_plays_and_learns_once_a_step(tmp_path, monkeypatch):
    asked, learned = [], []
    act, update = StackedSAC.act, StackedSAC.update

    def played(self, states, rng):
        asked.append((states.numpy().copy(), act(self, states, rng).numpy()))
        return torch.from_numpy(asked[-1][1])

    def learning(self, s, a, r, s2, noise):
        assert [tuple(x.shape) for x in (s, a, r, s2, noise)] == [
            (2, 16, 2), (2, 16, 2), (2, 16), (2, 16, 2), (2, 2, 16, 2)
        ]  # fmt: skip
        learned.append((len(batch.steps), noise))
        return update(self, s, a, r, s2, noise)

    monkeypatch.setattr(StackedSAC, "act", played)
    monkeypatch.setattr(StackedSAC, "update", learning)
    batch = Watched()
    train_sac(batch, SMALL, SEED, tmp_path)
    assert len(batch.steps) == 160 and len(asked) == 130
    for (states, actions), (before, made, *_) in zip(asked, batch.steps[30:], strict=True):
        np.testing.assert_array_equal(states, before)
        np.testing.assert_array_equal(actions, made)
    assert [step for step, _ in learned] == list(
        range(31, 161)
    )  # after each step but those of the warm-up
    noise = torch.stack([noise for _, noise in learned])
    assert (
        abs(noise.mean()) < 0.02
        and abs(noise.std() - 1) < 0.02
        and len(noise.unique()) > 0.99 * noise.numel()
    )
    state = load_file(tmp_path / STATE)
    assert state["adam.actor.0.step"] == state["adam.critic.5.step"] == 130


def test_replay_is_what_was_played(tmp_path):
    """Steps of all segments in order; an episode's last leads to no new start."""
    batch, state = train(tmp_path), load_file(tmp_path / STATE)
    for i, name in enumerate(("states", "actions", "rewards", "following")):
        played = np.stack([step[i] for step in batch.steps], 1)
        np.testing.assert_array_equal(state[f"replay.{name}"], played, err_msg=name)
    move = state["replay.states"] + 0.1 * state["replay.actions"]
    torch.testing.assert_close(state["replay.following"], move, rtol=0, atol=1e-6)
    starts = state["replay.states"][:, ::20]
    assert (
        starts.abs().max() <= 0.1 and len(starts.unique()) == 2 * 8 * 2
    )  # of all episodes of all segments


def test_small_replay_keeps_the_last_steps(tmp_path):
    batch, state = train(tmp_path, replace(SMALL, replay=50)), load_file(tmp_path / STATE)
    played = np.stack([rewards for *_, rewards, _ in batch.steps], 1)
    assert state["replay.rewards"].shape == (2, 50)
    np.testing.assert_array_equal(np.roll(state["replay.rewards"], -160 % 50, 1), played[:, -50:])


def test_reports_are_mean_returns_of_episodes(tmp_path):
    reports = []
    batch = train(tmp_path, report=lambda *report: reports.append(report))
    rewards = np.stack([rewards for _, _, rewards, _ in batch.steps]).reshape(8, 20, 2)
    np.testing.assert_allclose([value for _, value in reports], rewards.sum(1).mean(1), rtol=1e-5)


def test_same_seed_same_bytes_other_seed_other(whole, tmp_path):
    torch.manual_seed(123)  # nothing global matters
    np.random.seed(123)
    train(tmp_path / "same")
    assert contents(tmp_path / "same") == contents(whole[0])
    for seed in ((3, 2), (4, 1)):  # the teachers' and the group's number
        train(tmp_path / str(seed), seed=seed)
        other = contents(tmp_path / str(seed))
        assert other.keys() == contents(whole[0]).keys()
        assert all(blob != other[name] for name, blob in contents(whole[0]).items())


def test_segments_do_not_depend_on_how_many_follow(whole, tmp_path):
    train(tmp_path, replace(SMALL, steps=80))
    for step in (40, 80):
        assert policy_file(tmp_path, step).read_bytes() == policy_file(whole[0], step).read_bytes()


# -------------------------------------------------------------------------------- stop and continue
@pytest.mark.parametrize(("at", "keep"), [(20, 0), (60, 0), (100, 1e9), (120, 0), (160, 0)])
def test_continued_run_is_the_uninterrupted_one(whole, tmp_path, at, keep):
    """Also from no state, though there are checkpoints."""
    reports, first, second = whole[1], [], []
    with pytest.raises(Stop):
        train(tmp_path / "run", report=stopping(at, first), keep_seconds=keep)
    done = (at - 1) // 40 * 40  # the segment in which the report fails is lost
    kept = contents(tmp_path / "run") if done else {}
    assert len(kept) == done // 40 + (1 if done and not keep else 0)
    torch.manual_seed(5)
    train(tmp_path / "run", report=lambda *report: second.append(report), keep_seconds=keep)
    assert contents(tmp_path / "run") == contents(whole[0])
    since = 0 if keep else done
    assert first == reports[: at // 20] and second == reports[since // 20 :]
    assert all(contents(whole[0])[name] == blob for name, blob in kept.items() if name != STATE)


@pytest.mark.parametrize("at", [60, 100])
def test_full_replay_continues_too(tmp_path, at):
    """One that has wrapped: at step 80, 50 rows were written 80 times."""
    cfg = replace(SMALL, steps=120, replay=50)
    train(tmp_path / "whole", cfg)
    with pytest.raises(Stop):
        train(tmp_path / "run", cfg, report=stopping(at, []), keep_seconds=0)
    train(tmp_path / "run", cfg)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_older_state_continues_too(whole, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Stop):
        train(run, report=stopping(60, []), keep_seconds=0)
    older = (run / STATE).read_bytes()
    with pytest.raises(Stop):
        train(run, report=stopping(140, []), keep_seconds=0)
    assert (run / STATE).read_bytes() != older and policy_file(run, 120).exists()
    (run / STATE).write_bytes(older)
    train(run)
    assert contents(run) == contents(whole[0])


def test_states_are_seldom_but_for_the_last(tmp_path, monkeypatch):
    clock, saved = [0.0], []

    def report(step, value):
        clock[0] += 30  # half a segment

    save = module.save_state
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module, "save_state", lambda *args: saved.append(args[3]) or save(*args))
    train(tmp_path, replace(SMALL, steps=400, warmup=400), report=report, keep_seconds=120)
    assert saved == [120, 240, 360, 400]


def test_finished_run_returns_at_once(copy):
    before, batch = {path: path.stat().st_mtime_ns for path in copy.iterdir()}, train(copy)
    assert not batch.steps
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


# ----------------------------------------------------------------------------------------- refusals
def refused(folder, message, cfg=SMALL, seed=SEED, batch=None):
    check_refused(lambda place: train_sac(batch or Watched(), cfg, seed, place), folder, message)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_state_is_named(copy, how):
    damage_state(copy, how)
    refused(copy, "damaged")


def test_state_of_another_kind_is_named(copy):
    shutil.copy(policy_file(copy, 40), copy / STATE)
    refused(copy, "no sac-state of format 2")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 320},
        {"lr": 3e-4},
        {"alpha": 0.1},
        {"batch": 17},
        {"warmup": 31},
        {"gamma": 0.9},
        {"replay": 999},
    ],
)
def test_state_of_other_settings_is_named(copy, change):
    refused(copy, "other settings", cfg=replace(SMALL, **change))


def test_state_of_other_seeds_or_tasks_is_named(copy):
    refused(copy, "other settings", seed=(3, 2))
    refused(copy, "other settings", batch=Watched([*GOALS, [0, 0]]))


class Wide(Watched):
    """Three numbers a state."""

    family = replace(POINT_ROBOT, name="wide", state_dim=3)

    def reset(self):
        return np.pad(super().reset(), ((0, 0), (0, 1)))


def test_state_of_another_environment_is_named(copy):
    refused(copy, "another environment", batch=Wide())


def test_state_that_lacks_something_is_named(copy):
    tensors = load_file(copy / STATE)
    with safe_open(copy / STATE, framework="pt") as file:
        about = file.metadata()
    assert json.loads(about["settings"])["seed"] == list(SEED)
    for name in ("actor.0", "target.5", "replay.rewards"):
        save_tensors(copy / STATE, {k: v for k, v in tensors.items() if k != name}, about)
        refused(copy, "another environment")


@pytest.mark.parametrize(
    "change", [{"save_every": 30}, {"save_every": 10}, {"steps": 180}, {"steps": 170}]
)
def test_impossible_settings_are_one_line(tmp_path, change):
    with pytest.raises(ValueError, match="whole episodes of 20 steps") as error:
        train(tmp_path / "run", replace(SMALL, **change))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
