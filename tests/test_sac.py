"""SAC of many tasks at once: stable-baselines3's numbers, and tasks that do not touch.

Runs that are stopped continue bit for bit.

Run: pytest tests/test_sac.py
"""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.stats import norm
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from torch.nn.functional import linear

from envs import make_batch, random_returns
from families.point_robot import POINT_ROBOT, BatchedPointRobot, point_robot_optimum
from support.files import save_tensors
from teachers import sac as module
from teachers.sac import Replay, SACConfig, StackedSAC, init_mlp, mlp, squashed, train_sac
from teachers.stored import STATE, policy_file

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("one_thread")]

DS, DA, ROWS = 3, 2, 32
UPDATES = SACConfig(steps=100, warmup=10, save_every=20, hidden=16, batch=ROWS)
GOALS = [[0.8, -0.3], [-0.5, 0.9]]
SMALL = SACConfig(steps=160, warmup=30, save_every=40, lr=1e-3, hidden=8, batch=16, replay=1000)
SEED = (3, 1)


class Stop(Exception):
    pass


def draws(seed, n, count=1):
    """`count` replay samples and their noise, for n tasks."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(count):
        s, s2 = 2 * torch.randn(2, n, ROWS, DS, generator=rng)
        a = 2 * torch.rand(n, ROWS, DA, generator=rng) - 1
        yield (
            s,
            a,
            3 * torch.randn(n, ROWS, generator=rng),
            s2,
            torch.randn(2, n, ROWS, DA, generator=rng),
        )


def everything(agents):
    """Copies of all that learning changes."""
    return {name: value.detach().clone() for name, value in agents.tensors().items()}


def rows_of(agents, task):
    """What `everything` of an agent of one task would hold; all critics are in one stack."""
    found = {}
    for name, value in everything(agents).items():
        if value.ndim == 3:
            value = value[[task, agents.n + task] if len(value) == 2 * agents.n else [task]]
        found[name] = value
    return found


# ------------------------------------------------------------------------------ stable-baselines3's
class Toy(gym.Env):
    def __init__(self):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (DS,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (DA,), np.float32)


def stacked(model, read=lambda network, weight: weight):
    """stable-baselines3's weights, or what `read` makes of each, by our names and in our shapes."""
    critics = {"critic": model.critic, "target": model.critic_target}
    stacks = {
        name: [[[q[0]], [q[2]], [q[4]]] for q in critic.q_networks]
        for name, critic in critics.items()
    }
    actor = model.actor  # its last layer is in two parts
    stacks["actor"] = [[[actor.latent_pi[0]], [actor.latent_pi[2]], [actor.mu, actor.log_std]]]
    found = {}
    for name, networks in stacks.items():
        for i in range(6):
            rows = [
                [read(name, (part.weight, part.bias)[i % 2]) for part in net[i // 2]]
                for net in networks
            ]
            rows = [
                torch.cat([value.detach().view(len(value), -1).T for value in row], 1)
                for row in rows
            ]
            found[f"{name}.{i}"] = torch.stack(rows)
    return found


@pytest.mark.parametrize("updates", [1, 8])
def test_updates_are_stable_baselines3s(monkeypatch, updates):
    """Weights, moments and losses, in double precision: only the order of sums can differ."""
    model = SAC(
        "MlpPolicy", Toy(), UPDATES.lr, buffer_size=200, batch_size=ROWS, tau=0.005, gamma=0.99,
        ent_coef=0.2, policy_kwargs={"net_arch": [16, 16]}, seed=0, device="cpu",
    )  # fmt: skip
    logged = {}
    model.set_logger(Logger(None, []))
    monkeypatch.setattr(model.logger, "record", lambda key, value, **_: logged.update({key: value}))
    model.policy.double()
    model.ent_coef_tensor = torch.tensor(0.2, dtype=torch.float64)
    rng = np.random.default_rng(0)
    for step in range(200):  # all episodes end by the clock, which is not the end for the critics
        over = np.array([step % 10 == 9])
        states, actions = rng.normal(0, 2, (2, 1, DS)), rng.uniform(-1, 1, (1, DA))
        info = {"TimeLimit.truncated": bool(over[0])}
        model.replay_buffer.add(states[0], states[1], actions, rng.normal(0, 3, 1), over, [info])
    agents = StackedSAC(1, DS, DA, UPDATES, 0)
    for name in ("actor", "critic", "target"):
        setattr(agents, name, [stacked(model)[f"{name}.{i}"].clone() for i in range(6)])
    for weight in (*agents.actor, *agents.critic):
        weight.requires_grad_()
    agents.actor_optimizer = torch.optim.Adam(agents.actor, UPDATES.lr)
    agents.critic_optimizer = torch.optim.Adam(agents.critic, UPDATES.lr)

    sampled, noises, sample = [], [], model.replay_buffer.sample

    def record(*args, **options):
        found = sample(*args, **options)
        sampled.append(type(found)(*(None if value is None else value.double() for value in found)))
        return sampled[-1]

    def noise(shape, dtype, device):
        noises.append(torch.randn(shape, dtype=dtype))
        return noises[-1]

    monkeypatch.setattr(model.replay_buffer, "sample", record)
    monkeypatch.setattr("torch.distributions.normal._standard_normal", noise)
    monkeypatch.setattr(
        "stable_baselines3.common.policies.preprocess_obs", lambda states, *_, **__: states
    )
    for _ in range(updates):
        model.train(1, ROWS)
        (data,), (here, following) = sampled, noises  # it draws for the present states first
        s, a, r, s2 = data.observations, data.actions, data.rewards[:, 0], data.next_observations
        losses = agents.update(
            s[None], a[None], r[None], s2[None], torch.stack([following, here])[:, None]
        )
        assert losses[0].item() == pytest.approx(logged["train/critic_loss"], rel=1e-10)
        assert losses[1].item() == pytest.approx(logged["train/actor_loss"], rel=1e-10)
        sampled.clear()
        noises.clear()
    ours, close = agents.tensors(), {"rtol": 1e-8, "atol": 1e-12}
    for name, value in stacked(model).items():
        torch.testing.assert_close(ours[name], value, **close)
    for moment in (
        "exp_avg",
        "exp_avg_sq",
    ):  # a step of Adam does not depend on the size of gradients; these do
        optimizers = {"actor": model.actor.optimizer, "critic": model.critic.optimizer}

        def read(network, weight, moment=moment, optimizers=optimizers):
            return optimizers[network].state[weight][moment] if network in optimizers else weight

        for name, value in stacked(model, read).items():
            if not name.startswith("target"):
                torch.testing.assert_close(ours[f"adam.{name}.{moment}"], value, **close)
    assert ours["adam.actor.0.step"] == updates
    for name, value in ours.items():
        if name.startswith("critic"):
            assert not torch.equal(value, ours[name.replace("critic", "target")])


def test_table_2_and_official_sizes():
    cfg = SACConfig(steps=1, warmup=0, save_every=1)
    assert (cfg.lr, cfg.tau, cfg.gamma, cfg.alpha, cfg.hidden, cfg.batch) == (
        3e-4,
        0.005,
        0.99,
        0.2,
        128,
        256,
    )
    agents = StackedSAC(2, DS, DA, cfg, 0)
    for optimizer in (agents.actor_optimizer, agents.critic_optimizer):
        assert optimizer.defaults["lr"] == 3e-4 and optimizer.defaults["eps"] == 1e-8
        assert (
            optimizer.defaults["betas"] == (0.9, 0.999) and not optimizer.defaults["weight_decay"]
        )


# ----------------------------------------------------------------------------------------- stacking
def test_stacked_networks_are_those_of_each_task():
    rng = torch.Generator().manual_seed(0)
    weights, x = init_mlp(3, (4, 16, 16, 2), rng), torch.randn(3, 10, 4, generator=rng)
    for activation in (torch.relu, torch.tanh):
        for task in range(3):
            y = x[task]
            for i in range(3):
                y = linear(y, weights[2 * i][task].T, weights[2 * i + 1][task, 0])
                y = activation(y) if i < 2 else y
            torch.testing.assert_close(mlp(weights, x, activation)[task], y)
            assert (y[0] - y[1]).abs().max() > 1e-3


def test_first_weights_are_drawn_as_linear_layers_are():
    weights = init_mlp(50, (9, 36, 4), torch.Generator().manual_seed(0))
    for weight, fan_in in zip(weights, (9, 9, 36, 36), strict=True):
        limit, scaled = fan_in**-0.5, weight / fan_in**-0.5
        assert 0.95 * limit < weight.max() < limit and -limit < weight.min() < -0.95 * limit
        assert abs(scaled.mean()) < 0.15 and abs(scaled.std() - 3**-0.5) < 0.05
        assert len(weight.unique()) > 0.99 * weight.numel()  # no two tasks alike


def test_three_tasks_together_are_three_alone():
    together = StackedSAC(3, DS, DA, UPDATES, 1)
    alone = [StackedSAC(1, DS, DA, UPDATES, 9) for _ in range(3)]
    for task, agent in enumerate(alone):
        agent.load(rows_of(together, task))
    for sample in draws(0, 3, count=5):
        losses = torch.stack(together.update(*sample))
        for task, agent in enumerate(alone):
            row = [value[:, [task]] if i == 4 else value[[task]] for i, value in enumerate(sample)]
            torch.testing.assert_close(torch.stack(agent.update(*row))[:, 0], losses[:, task])
    for task, agent in enumerate(alone):
        before = StackedSAC(3, DS, DA, UPDATES, 1)
        for name, value in everything(agent).items():
            torch.testing.assert_close(rows_of(together, task)[name], value, rtol=1e-4, atol=1e-6)
        assert not torch.equal(rows_of(before, task)["actor.0"], rows_of(together, task)["actor.0"])


@pytest.mark.parametrize("changed", range(5))
def test_nothing_of_a_task_reaches_another(changed):
    """Another sample for task 1 (states, actions, ..., noise) leaves 0 and 2 bit for bit."""
    one, other = (StackedSAC(3, DS, DA, UPDATES, 1) for _ in range(2))
    for sample in draws(0, 3, count=3):
        one.update(*sample)
        sample = [value.clone() for value in sample]
        mine = sample[changed][:, 1] if changed == 4 else sample[changed][1]
        mine += 100
        other.update(*sample)
    assert not torch.equal(rows_of(one, 1)["critic.0"], rows_of(other, 1)["critic.0"])
    for task in (0, 2):
        for name, value in rows_of(one, task).items():
            assert torch.equal(value, rows_of(other, task)[name]), (task, name)


def test_the_actors_step_leaves_the_critics():
    """The actor's gradients flow through the critics; theirs are of their own loss alone."""
    agents = StackedSAC(2, DS, DA, UPDATES, 1)
    (sample,) = draws(0, 2)
    s, a, r, s2, noise = sample
    with torch.no_grad():
        action, log_density = squashed(mlp(agents.actor, s2), noise[0])
        goal = r + 0.99 * (agents.q(agents.target, s2, action).amin(0) - 0.2 * log_density)
    loss = 0.5 * (agents.q(agents.critic, s, a) - goal).square().mean(2)
    expected = torch.autograd.grad(loss.sum(), agents.critic)
    found, _ = agents.update(*sample)
    torch.testing.assert_close(found, loss.sum(0).detach())
    for weight, gradient in zip(agents.critic, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


def test_layer_norm_is_of_the_critics_hidden_layers_alone():
    """Layer by layer in NumPy; the actor and its updates' shapes are as without it."""
    agents = StackedSAC(2, DS, DA, replace(UPDATES, layer_norm=True), 1)
    rng = torch.Generator().manual_seed(0)
    s, a = torch.randn(2, 5, DS, generator=rng), torch.rand(2, 5, DA, generator=rng)
    found = agents.q(agents.critic, s, a).detach().numpy()
    weights = [weight.detach().double().numpy() for weight in agents.critic]
    for which, n, b in np.ndindex(2, 2, 5):
        x, row = torch.cat([s, a], -1)[n, b].double().numpy(), 2 * which + n
        for i in range(3):
            x = x @ weights[2 * i][row] + weights[2 * i + 1][row, 0]
            if i < 2:
                x = ((x - x.mean()) / np.sqrt(x.var() + 1e-5)).clip(0)
        np.testing.assert_allclose(found[which, n, b], x[0], atol=1e-5)
    plain = StackedSAC(2, DS, DA, UPDATES, 1)
    for mine, other in zip(agents.actor, plain.actor, strict=True):
        assert torch.equal(mine, other)
    assert (agents.q(agents.critic, s, a) - plain.q(plain.critic, s, a)).abs().max() > 0.01


def test_played_actions_are_the_policys():
    agents, rng = StackedSAC(3, DS, DA, UPDATES, 0), torch.Generator().manual_seed(0)
    states = torch.randn(3, DS, generator=rng)
    actions = torch.stack([agents.act(states, rng) for _ in range(4000)])
    assert actions.shape == (4000, 3, DA) and not actions.requires_grad and actions.abs().max() < 1
    mean, log_std = mlp(agents.actor, states[:, None])[:, 0].detach().chunk(2, -1)
    gauss = torch.atanh(actions.double())
    np.testing.assert_allclose(gauss.mean(0), mean, atol=5 * 1.4 / 4000**0.5)
    np.testing.assert_allclose(gauss.std(0), log_std.exp(), rtol=0.06)
    flat = gauss.view(4000, -1).T
    assert (torch.corrcoef(flat) - torch.eye(3 * DA)).abs().max() < 0.08  # noise of their own


# -------------------------------------------------------------------------------------- log density
def test_log_density_by_a_change_of_variables():
    """The Gaussian's density over the slope of tanh, the slope taken numerically."""
    rng = torch.Generator().manual_seed(0)
    out = torch.randn(200, 2 * DA, generator=rng, dtype=torch.float64).clamp(max=1.5)
    noise = torch.randn(200, DA, generator=rng, dtype=torch.float64)
    action, log_density = squashed(out, noise)
    mean, log_std = out.numpy()[:, :DA], out.numpy()[:, DA:]
    before, h = mean + np.exp(log_std) * noise.numpy(), 1e-6
    np.testing.assert_allclose(action, np.tanh(before), atol=1e-12)
    slope = (np.tanh(before + h) - np.tanh(before - h)) / (2 * h)
    expected = norm.logpdf(before, mean, np.exp(log_std)) - np.log(slope)
    inside = (abs(before) < 3).all(1)  # beyond, the 1e-6 that keeps the logarithm finite shows
    assert inside.sum() > 100
    np.testing.assert_allclose(log_density[inside], expected.sum(1)[inside], atol=5e-4)
    near = (abs(before) < 1).all(1)
    np.testing.assert_allclose(log_density[near], expected.sum(1)[near], atol=1e-5)


def test_density_of_actions_adds_up_to_one():
    fine = torch.linspace(-12, 12, 200_001, dtype=torch.float64)[:, None]  # noise
    action, log_density = squashed(
        torch.tensor([[0.3, -0.2]], dtype=torch.float64).expand(len(fine), 2), fine
    )
    assert torch.trapezoid(log_density.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-4)


def test_deviations_are_limited_and_everything_stays_finite():
    noise = torch.tensor([[1.5]])
    for given, kept in ((50.0, 2.0), (-50.0, -20.0)):
        limited, expected = (squashed(torch.tensor([[0.1, x]]), noise) for x in (given, kept))
        assert torch.equal(limited[0], expected[0]) and torch.equal(limited[1], expected[1])
    out = torch.tensor([[1e4, 0.0], [-1e4, 2.0]], requires_grad=True)
    action, log_density = squashed(out, torch.ones(2, 1))
    log_density.sum().backward()
    assert action.detach().abs().tolist() == [[1.0], [1.0]]
    assert log_density.isfinite().all() and out.grad.isfinite().all()


# ------------------------------------------------------------------------------------------- replay
def step_of(number, n=2):
    """A step whose every number says which it is: 100 * task + number."""
    value = 100 * torch.arange(n) + number
    return (
        value[:, None] + torch.zeros(n, DS),
        -value[:, None].expand(n, DA).float(),
        value / 2,
        value[:, None] + 0.5,
    )


def test_replay_gives_what_is_there_and_no_more():
    replay, rng = Replay(2, 8, DS, DA), torch.Generator().manual_seed(0)
    for number in range(21):
        replay.add(*step_of(number))
        s, a, r, s2 = replay.sample(400, rng)
        assert [x.shape for x in (s, a, r, s2)] == [
            (2, 400, DS),
            (2, 400, DA),
            (2, 400),
            (2, 400, DS),
        ]
        present = set(range(max(0, number - 7), number + 1))
        for task in range(2):  # never another task's; all of the last 8, of each task by itself
            assert set((s[task, :, 0] - 100 * task).int().tolist()) == present
        for other in (
            -a[..., 0],
            2 * r,
            s2[..., 0] - 0.5,
            s[..., 1],
        ):  # one step's numbers stay together
            assert torch.equal(other, s[..., 0])
    assert replay.seen == 21 and number > 2 * 8
    assert not torch.equal(s[0, :, 0], s[1, :, 0] - 100)  # tasks draw steps of their own
    counts = torch.bincount((s[0, :, 0] - 13).int(), minlength=8)
    assert (counts - 50).abs().max() < 30  # all as often


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


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


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
def stopping(at, reports):
    def report(step, value):
        reports.append((step, value))
        if step == at:
            raise Stop

    return report


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
    """One line that names the file and what to do; nothing is changed."""
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as error:
        train_sac(batch or Watched(), cfg, seed, folder)
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
    short = {"shorter": path.read_bytes()[:-100], "empty": b"", "text": b"no tensors at all"}
    path.write_bytes(short.get(damage, data))
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


# ----------------------------------------------------------------------------------------- learning
def test_learns_on_point_robot(tmp_path):
    goals = [[0.8, -0.3], [-0.5, 0.9], [0.2, 0.2], [-0.9, -0.7]]
    cfg = SACConfig(
        steps=700, warmup=100, save_every=700, lr=1e-3, alpha=0.05, hidden=32, batch=64, replay=700
    )
    train_sac(make_batch("point-robot", goals), cfg, SEED, tmp_path)
    found = load_file(policy_file(tmp_path, 700))
    batch = BatchedPointRobot(np.repeat(goals, 50, axis=0), seed=1)
    states, total = batch.reset(), 0.0
    for _ in range(20):  # mean actions
        out = mlp(
            [found[f"{kind}{i}"] for i in range(3) for kind in "wb"],
            torch.from_numpy(states).view(4, 50, 2),
        )
        states, rewards = batch.step(squashed(out, torch.zeros(4, 50, 2))[0].view(200, 2).numpy())
        total = total + rewards.reshape(4, 50).mean(1)
    random, best = random_returns("point-robot", goals), point_robot_optimum(goals)
    share = (total - random) / (best - random)
    assert (
        share > 0.55
    ).all() and share.mean() > 0.7  # 0 random, 1 the best there is; standing still is no better
    assert abs((-20 * np.linalg.norm(goals, axis=1) - random) / (best - random)).max() < 0.3
