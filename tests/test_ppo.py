"""PPO (App. D.2, Table 3): training, its policies on disk, and that a run continues bit for bit.

The environment is a point in the plane that is paid for being near a corner, ten steps an episode.
Run: pytest tests/test_ppo.py
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from support import files
from teachers.ppo import PPOConfig, build, restore, segment_seed, state_tensors, train_ppo
from teachers.sac import STATE, read_state, save_state

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("one_thread")]

SMALL = PPOConfig(steps=256, n_steps=64, batch=32, epochs=2, lr=1e-3, gamma=0.9, save_every=64)
SEED = (3, 1)
HORIZON = 10


class Point(gym.Env):
    """Starts in a square around 0, moves by half the action, is paid minus its way to (1, 1)."""

    def __init__(self, extra=0):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2 + extra,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.extra, self.closed = extra, False

    def observe(self):
        return np.concatenate([self.place, np.zeros(self.extra)])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = self.np_random.uniform(-1, 1, 2), 0
        return self.observe(), {}

    def step(self, action):
        assert (abs(action) <= 1).all()
        self.place, self.time = self.place + action / 2, self.time + 1
        return (
            self.observe(),
            -float(np.linalg.norm(self.place - 1)),
            False,
            self.time == HORIZON,
            {},
        )

    def close(self):
        self.closed = True


class Stop(Exception):
    pass


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*")}


def settings(cfg):
    return {**vars(cfg), "seed": list(SEED)}


def loaded(folder, cfg):
    """The model of a folder's state."""
    model = build(Point(), cfg, SEED)
    restore(model, read_state(folder, "ppo-state", settings(cfg))[0], folder)
    return model


def forward(tensors, x):
    for i in range(3):
        x = x @ tensors[f"w{i}"] + tensors[f"b{i}"]
        x = x.tanh() if i < 2 else x
    return x


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of four segments, its reports; tests that change it copy it."""
    folder, reports = tmp_path_factory.mktemp("ppo") / "whole", []
    torch.set_num_threads(1)
    train_ppo(Point, SMALL, SEED, folder, lambda *report: reports.append(report))
    return folder, reports


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "copy")


# ------------------------------------------------------------------------------------ the algorithm
def play(tensors, episodes=200):
    """Mean return of the clipped mean action of a stored policy; of uniform actions without one."""
    rng, env, total = np.random.default_rng(0), Point(), 0.0
    for episode in range(episodes):
        place, _ = env.reset(seed=episode)
        for _ in range(HORIZON):
            if tensors is None:
                action = rng.uniform(-1, 1, 2)
            else:
                action = (
                    forward(tensors, torch.tensor(place, dtype=torch.float32)[None, None])[0, 0]
                    .numpy()
                    .clip(-1, 1)
                )
            place, reward, *_ = env.step(action)
            total += reward
    return total / episodes


def test_training_learns(tmp_path):
    cfg = PPOConfig(steps=6144, n_steps=256, lr=2e-3, gamma=0.9, save_every=3072)
    reports = []
    train_ppo(Point, cfg, (0,), tmp_path, lambda *report: reports.append(report))
    random, first, last = play(None), reports[0][1], np.mean([value for _, value in reports[-3:]])
    policy = play(load_file(tmp_path / "step-0000006144.safetensors"))
    # walking straight to the corner costs about 1.4, acting at random 17
    assert random < -12 and first < -12
    assert last > -5 and policy > -2.5


def test_settings_reach_stable_baselines3():
    reach = PPOConfig(steps=400_000)
    assert list(vars(reach).values()) == [400_000, 2048, 64, 10, 3e-4, 0.99, 2048]
    for cfg in (reach, SMALL):
        model = build(Point(), cfg, SEED)
        assert (model.n_steps, model.batch_size, model.n_epochs) == (
            cfg.n_steps,
            cfg.batch,
            cfg.epochs,
        )
        assert (
            model.gamma == model.rollout_buffer.gamma == cfg.gamma
            and model.rollout_buffer.buffer_size == cfg.n_steps
        )
        assert model.lr_schedule(1.0) == model.lr_schedule(0.0) == cfg.lr
        assert (
            model.clip_range(1.0) == model.clip_range(0.0) == 0.2
        )  # segments restart the schedules
        assert (model.gae_lambda, model.ent_coef, model.vf_coef, model.max_grad_norm) == (
            0.95,
            0.0,
            0.5,
            0.5,
        )
        assert model.device.type == "cpu" and model.verbose == 0
        layers = list(model.policy.mlp_extractor.policy_net)
        assert [type(m).__name__ for m in layers] == ["Linear", "Tanh", "Linear", "Tanh"]
        assert model.policy.action_net.weight.shape == (2, 64)


def test_first_segment_is_plain_stable_baselines3(tmp_path):
    """Weights after one segment are those of `PPO(...).learn(64)` from the same seeds."""
    train_ppo(Point, replace(SMALL, steps=64), SEED, tmp_path)
    plain = PPO(
        "MlpPolicy",
        Point(),
        1e-3,
        n_steps=64,
        batch_size=32,
        n_epochs=2,
        gamma=0.9,
        seed=segment_seed(SEED, 0),
        device="cpu",
    )
    plain.set_logger(Logger(None, []))
    plain.set_random_seed(segment_seed(SEED, 1))
    plain.learn(64)
    for name, value in plain.policy.state_dict().items():
        assert torch.equal(value, load_file(tmp_path / STATE)[f"policy.{name}"]), name


def test_every_segment_starts_from_its_own_seed(tmp_path):
    seeds, starts, model_seeds = [], [], [segment_seed(SEED, segment) for segment in range(5)]

    class Watched(Point):
        def reset(self, *, seed=None, options=None):
            place, about = super().reset(seed=seed)
            if seed is not None:
                seeds.append(seed)
                starts.append(
                    (*place, *torch.get_rng_state().tolist()[:40], *np.random.get_state()[1][:5])
                )
            return place, about

    train_ppo(Watched, SMALL, SEED, tmp_path)
    assert seeds == model_seeds[1:] and len({*model_seeds}) == 5
    assert len({*starts}) == 4


def test_every_segment_trains_on(whole):
    steps = [load_file(path) for path in sorted(whole[0].glob("step-*"))]
    moves = [after["w0"] - before["w0"] for before, after in pairwise(steps)]
    assert all(move.abs().max() > 1e-4 for move in moves)
    state = load_file(whole[0] / STATE)
    assert (
        state["adam.0.step"] == 4 * 2 * 2
    )  # segments x epochs x minibatches: Adam is never restarted


# ------------------------------------------------------------------------------------------ on disk
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
        weights = {"w0": (1, 2, 64), "w1": (1, 64, 64), "w2": (1, 64, 2)}
        assert shapes == {
            **weights,
            "b0": (1, 1, 64),
            "b1": (1, 1, 64),
            "b2": (1, 1, 2),
            "log_std": (1, 1, 2),
        }
    with safe_open(folder / STATE, framework="pt") as file:
        about = file.metadata()
    assert (about["t2mir"], about["step"], json.loads(about["settings"])) == (
        "2",
        "256",
        settings(SMALL),
    )


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
    train_ppo(Point, replace(SMALL, steps=steps, save_every=save_every, epochs=1), SEED, tmp_path)
    assert [int(path.name[5:15]) for path in sorted(tmp_path.glob("step-*"))] == saved


def test_how_often_is_saved_does_not_change_the_policies(whole, tmp_path):
    train_ppo(Point, replace(SMALL, save_every=128), SEED, tmp_path)
    for path in tmp_path.glob("step-*"):
        assert path.read_bytes() == (whole[0] / path.name).read_bytes()


def test_stored_policy_acts_like_the_trained_one(whole):
    folder, _ = whole
    model, tensors = loaded(folder, SMALL), load_file(folder / "step-0000000256.safetensors")
    states = np.random.default_rng(0).normal(0, 3, (50, 2))
    ours = forward(tensors, torch.tensor(states, dtype=torch.float32)[None])[0]
    distribution = model.policy.get_distribution(torch.tensor(states))
    theirs = distribution.mode().detach()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        ours.clip(-1, 1), model.predict(states, deterministic=True)[0], rtol=0, atol=1e-6
    )
    assert ours.std() > 1e-3  # not the same action everywhere
    std = distribution.distribution.stddev.detach()
    np.testing.assert_allclose(tensors["log_std"].exp().expand(1, 50, 2)[0], std, rtol=1e-6)


def test_same_seed_same_bytes_other_seed_other(whole, tmp_path):
    code = "import sys, torch; from pathlib import Path; from test_ppo import *; "
    code += "torch.set_num_threads(1); "
    code += (
        "train_ppo(Point, SMALL, SEED, Path(sys.argv[1]))"  # another process hashes and orders anew
    )
    tests = Path(__file__).parent
    path = {"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1", "PATH": ""}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "same")], check=True, env=path, timeout=100
    )
    assert contents(tmp_path / "same") == contents(whole[0])
    train_ppo(Point, SMALL, (3, 2), tmp_path / "other")
    other = contents(tmp_path / "other")
    assert other.keys() == contents(whole[0]).keys()
    assert all(blob != other[name] for name, blob in contents(whole[0]).items())
    assert not torch.equal(
        build(Point(), SMALL, (3, 1)).policy.action_net.weight,
        build(Point(), SMALL, (3, 2)).policy.action_net.weight,
    )


def test_policies_of_a_deleted_state_are_not_mixed_with_new_ones(whole, copy):
    (copy / STATE).unlink()
    train_ppo(Point, replace(SMALL, save_every=128), SEED, copy)
    assert sorted(contents(copy)) == [
        STATE,
        "step-0000000128.safetensors",
        "step-0000000256.safetensors",
    ]


# -------------------------------------------------------------------------------- stop and continue
def stopping(at, reports):
    def report(step, value):
        reports.append((step, value))
        if step == at:
            raise Stop

    return report


def scramble():
    """A process that continues knows nothing of the random streams of the one that was stopped."""
    np.random.seed(12345)
    torch.manual_seed(12345)


@pytest.mark.parametrize(("save_every", "at"), [(64, 64), (64, 128), (64, 256), (128, 192)])
def test_continued_run_is_the_uninterrupted_one(tmp_path, save_every, at):
    cfg, reports, first, second = replace(SMALL, save_every=save_every), [], [], []
    train_ppo(Point, cfg, SEED, tmp_path / "whole", lambda *report: reports.append(report))
    envs = []
    with pytest.raises(Stop):
        train_ppo(
            lambda: envs.append(Point()) or envs[0],
            cfg,
            SEED,
            tmp_path / "stopped",
            stopping(at, first),
        )
    assert envs[0].closed
    kept = contents(tmp_path / "stopped")
    done = (at - 1) // save_every * save_every  # the rollout whose report fails is not saved
    assert len(kept) == (done // save_every + 1 if done else 0)
    scramble()
    train_ppo(Point, cfg, SEED, tmp_path / "stopped", lambda *report: second.append(report))
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert first == reports[: at // 64] and second == reports[done // 64 :]
    assert all(
        contents(tmp_path / "whole")[name] == blob for name, blob in kept.items() if name != STATE
    )


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
            train_ppo(Point, SMALL, SEED, tmp_path)
    assert written == ["step-0000000064.safetensors", STATE, "step-0000000128.safetensors", STATE]
    assert read_state(tmp_path, "ppo-state", settings(SMALL))[1] == 64
    scramble()
    train_ppo(Point, SMALL, SEED, tmp_path)
    assert contents(tmp_path) == contents(whole[0])


def test_finished_run_returns_at_once(copy):
    def never():
        raise AssertionError("an environment was made")

    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    train_ppo(never, SMALL, SEED, copy)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_state_holds_everything(whole):
    """Loading and saving again gives the same bytes; the value network is in it."""
    folder, _ = whole
    model, again = loaded(folder, SMALL), folder.parent / "again"
    save_state(again, "ppo-state", state_tensors(model), 256, settings(SMALL))
    assert (again / STATE).read_bytes() == (folder / STATE).read_bytes()
    names = load_file(folder / STATE)
    assert "policy.value_net.weight" in names
    moments = [name for name in names if name.endswith((".exp_avg", ".exp_avg_sq"))]
    assert len(moments) == 2 * len(list(model.policy.parameters()))


def test_reports(whole, tmp_path):
    reports = whole[1]
    assert [step for step, _ in reports] == [64, 128, 192, 256]
    assert (
        all(-40 < value < -2 for _, value in reports) and len({value for _, value in reports}) == 4
    )
    none = []  # rollouts shorter than an episode
    cfg = replace(SMALL, steps=16, n_steps=8, batch=8)
    train_ppo(Point, cfg, SEED, tmp_path, lambda *report: none.append(report))
    assert [step for step, _ in none] == [8, 16] and np.isnan([value for _, value in none]).all()


def test_report_is_of_its_own_rollout(tmp_path):
    """Six episodes end in 64 steps; their returns are averaged, not those of earlier rollouts."""
    played, reports = [], []

    class Watched(Point):
        def step(self, action):
            place, reward, *rest = super().step(action)
            played.append(reward)
            return place, reward, *rest

    train_ppo(
        Watched, replace(SMALL, steps=128), SEED, tmp_path, lambda *report: reports.append(report)
    )
    for index, (_, value) in enumerate(reports):
        episodes = np.reshape(played[64 * index : 64 * index + 60], (6, HORIZON)).sum(1)
        assert value == pytest.approx(episodes.mean(), abs=1e-5)


def test_nothing_else_is_written(tmp_path, monkeypatch):
    """stable-baselines3's own logger makes a folder in the temporary one for every segment."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    train_ppo(Point, replace(SMALL, steps=128), SEED, tmp_path / "run")
    assert not list((tmp_path / "tmp").iterdir())


# ----------------------------------------------------------------------------------------- refusals
def refused(folder, message, cfg=SMALL, seed=SEED, env=Point):
    """One line that names the file and what to do; nothing is changed."""
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as error:
        train_ppo(env, cfg, seed, folder)
    text = str(error.value)
    assert (
        "\n" not in text
        and str(folder / STATE) in text
        and f"delete {folder} to train its tasks anew" in text
    )
    assert contents(folder) == before


@pytest.mark.parametrize("damage", ["shorter", "empty", "text", "header", "weights", "last"])
def test_damaged_state_is_named(copy, damage):
    path = copy / STATE
    data = bytearray(path.read_bytes())
    place = {"header": 10, "weights": len(data) // 2, "last": len(data) - 1}.get(damage, 0)
    data[place] ^= 0xFF
    path.write_bytes(
        {"shorter": path.read_bytes()[:-100], "empty": b"", "text": b"no tensors at all"}.get(
            damage, data
        )
    )
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
    about = {
        "t2mir": "1",
        "kind": "ppo-state",
        "step": "64",
        "settings": json.dumps(settings(SMALL)),
    }
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
    with pytest.raises(Stop):
        train_ppo(Point, SMALL, SEED, tmp_path, stopping(128, []))
    refused(tmp_path, "another environment", env=lambda: Point(extra=1))
