"""SAC of many tasks at once: stable-baselines3's numbers, and tasks that do not touch.

What it writes, and that it continues: test_sac_on_disk.py. Run: pytest tests/test_sac.py
"""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from torch.nn.functional import linear

from envs import make_batch, random_returns
from families.point_robot import BatchedPointRobot, point_robot_optimum
from teachers.sac import Replay, SACConfig, StackedSAC, init_mlp, mlp, squashed, train_sac
from teachers.stored import policy_file

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("one_thread")]

DS, DA, ROWS = 3, 2, 32
UPDATES = SACConfig(steps=100, warmup=10, save_every=20, hidden=16, batch=ROWS)
SEED = (3, 1)


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
