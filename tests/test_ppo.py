"""PPO of many tasks at once (App. D.2, Table 3): stable-baselines3's numbers, and tasks that do not
touch. What is written, and that a run continues bit for bit: test_ppo_on_disk.py.

Tasks are points in the plane that are paid for being near a corner, ten steps an episode; and a
room of 3 x 4 cells with a goal. Run: pytest tests/test_ppo.py
"""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from envs import Family, SingleTask
from teachers.ppo import PPOConfig, StackedPPO, gae, network_input, play, train_ppo
from teachers.rollouts import load_policies

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("one_thread")]

SMALL = PPOConfig(steps=256, n_steps=64, batch=32, epochs=2, lr=1e-3, gamma=0.9, save_every=64)
SEED, HORIZON = (3, 1), 10
TASKS = [[1.0, 1.0], [-1.0, 0.5], [0.0, -1.0]]


class Points:
    """Start in a square around 0, move by half the action, are paid minus their way to the goal."""

    spread = 1.0

    def __init__(self, tasks, seed=0):
        self.goals, self.rng = np.asarray(tasks, np.float32), np.random.default_rng(seed)

    def reset(self):
        size = self.goals.shape
        self.place = self.spread * self.rng.uniform(-1, 1, size).astype(np.float32)
        return self.place

    def step(self, actions):
        assert actions.dtype == np.float32 and (abs(actions) <= 1).all()
        self.place = self.place + actions / 2
        return self.place, -np.linalg.norm(self.place - self.goals, axis=1)


class Still(Points):
    """They start at 0."""

    spread = 0.0


class Room:
    """3 x 4 cells, from the first one; moves down, up, right, left."""

    moves = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])

    def __init__(self, tasks, seed=0):
        self.goals, self.rng = np.asarray(tasks), np.random.default_rng(seed)

    def reset(self):
        self.cell = np.zeros((len(self.goals), 2), np.int64)
        return self.cell

    def step(self, actions):
        self.cell = (self.cell + self.moves[actions]).clip(0, [2, 3])
        return self.cell, (self.cell == self.goals).all(1).astype(np.float32)


POINTS = Family(
    "points", HORIZON, 2, 2, train_tasks=3, test_tasks=1, task_low=(-1, -1), task_high=(1, 1),
    batch=Points, sample_tasks=lambda n, rng: rng.uniform(-1, 1, (n, 2)), teacher="ppo",
)  # fmt: skip
STILL = replace(POINTS, batch=Still)
ROOM = replace(
    POINTS, action_dim=4, task_low=(0, 0), task_high=(2, 3), batch=Room, state_values=(3, 4),
    discrete_actions=True,
)  # fmt: skip
GOALS = {"points": TASKS, "room": [[2, 2], [0, 3], [1, 0]]}


def make(family=POINTS, tasks=TASKS):
    batch = family.batch(tasks, 0)
    batch.family = family
    return batch


def agents(family=POINTS, n=3, cfg=SMALL, seed=0, **more):
    return StackedPPO(n, family, cfg, seed, **more)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------ stable-baselines3's
def theirs(family, task, cfg):
    """stable-baselines3's untrained model of a task."""
    env = gym.wrappers.TimeLimit(SingleTask(family, task), HORIZON)
    model = PPO(
        "MlpPolicy", env, cfg.lr, n_steps=cfg.n_steps, batch_size=cfg.batch, n_epochs=cfg.epochs,
        gamma=cfg.gamma, device="cpu",
    )  # fmt: skip
    model.set_logger(Logger(None, []))
    return model


def pairs(model, stack, m):
    """(their tensor, ours) of everything that learns."""
    policy, extractor = model.policy, model.policy.mlp_extractor
    actor = [extractor.policy_net[0], extractor.policy_net[2], policy.action_net]
    critic = [extractor.value_net[0], extractor.value_net[2], policy.value_net]
    for layers, weights in ((actor, stack.actor), (critic, stack.critic)):
        for i, layer in enumerate(layers):
            yield layer.weight, weights[2 * i][m].T
            yield layer.bias, weights[2 * i + 1][m, 0]
    if not stack.discrete:
        yield policy.log_std, stack.log_std[m, 0]


@pytest.mark.parametrize("family", [STILL, ROOM], ids=["points", "room"])
def test_a_segment_is_stable_baselines3s(monkeypatch, family):
    """Same first weights, actions and minibatches: same weights after a rollout and its epochs.

    25 steps: two whole episodes and half of a third; minibatches of 10, 10 and 5.
    """
    cfg = replace(SMALL, n_steps=25, batch=10, epochs=6, lr=3e-3)
    tasks = GOALS["room" if family is ROOM else "points"]
    stack, before = agents(family, cfg=cfg), agents(family, cfg=cfg)
    rollout, _ = play(make(family, tasks), stack, generator())
    stack.learn(rollout, generator(1))
    rng = generator(1)
    orders = [torch.rand(3, 25, generator=rng).argsort(1).numpy() for _ in range(cfg.epochs)]
    for m, task in enumerate(tasks):
        with pytest.warns(UserWarning, match="there will be a truncated mini-batch of size 5"):
            model = theirs(family, task, cfg)
        with torch.no_grad():
            for weight, ours in pairs(model, before, m):
                weight.copy_(ours)
        script, turn = iter(rollout.actions[m]), iter(orders)

        def scripted(obs, deterministic=False, model=model, script=script):
            action = next(script)[None]
            value, log_density, _ = model.policy.evaluate_actions(obs, action)
            return action, value, log_density

        monkeypatch.setattr(model.policy, "forward", scripted)
        monkeypatch.setattr("numpy.random.permutation", lambda n, t=turn, m=m: next(t)[m])
        model.learn(25)
        for number, (weight, ours) in enumerate(pairs(model, stack, m)):
            torch.testing.assert_close(ours, weight, atol=3e-6, rtol=1e-5, msg=str(number))
            start = list(pairs(model, before, m))[number][1]
            assert (ours - start).abs().max() > 1e-4  # many times what they may differ by


def test_first_weights_are_stable_baselines3s_kind():
    """Orthogonal with its gains, biases and log deviations of 0."""
    model, stack = theirs(POINTS, TASKS[0], SMALL), agents()
    for weight, ours in pairs(model, stack, 1):
        assert weight.shape == ours.shape
        if weight.ndim == 2:
            for matrix in (weight, ours):  # its singular values are all alike
                values = torch.linalg.svdvals(matrix)
                torch.testing.assert_close(values, torch.linalg.svdvals(weight))
        else:
            assert not ours.any() and not weight.any()
    assert not torch.equal(stack.actor[0][0], stack.actor[0][1])


def test_settings_are_table_3_and_stable_baselines3s():
    reach = PPOConfig(steps=400_000)
    assert list(vars(reach).values())[:7] == [400_000, 2048, 64, 10, 3e-4, 0.99, 2048]
    model = PPO("MlpPolicy", theirs(POINTS, TASKS[0], SMALL).env, device="cpu")
    assert (reach.trace, reach.clip) == (model.gae_lambda, model.clip_range(1.0))
    assert (reach.value_weight, reach.max_norm) == (model.vf_coef, model.max_grad_norm)
    assert model.ent_coef == 0 and model.normalize_advantage
    options = model.policy.optimizer.param_groups[0]
    assert options["eps"] == agents().optimizer.param_groups[0]["eps"]


# ------------------------------------------------------------------------------------ the algorithm
def test_gae_is_the_sum_of_what_surprises():
    """Schulman et al. 2016, eq. 16, term by term; rows of steps that are cut do not see further."""
    rng, cfg, t = generator(), PPOConfig(1, gamma=0.9, trace=0.8), 7
    rewards, values, following = torch.randn(3, 2, t, generator=rng)
    cut = torch.tensor([False, False, True, False, False, False, True])
    found = gae(rewards, values, following, cut, cfg)
    for m in range(2):
        for first in range(t):
            last = 2 if first <= 2 else 6
            want = sum(
                (0.9 * 0.8) ** (i - first) * (rewards[m, i] + 0.9 * following[m, i] - values[m, i])
                for i in range(first, last + 1)
            )
            assert found[m, first].item() == pytest.approx(want.item(), abs=1e-6)


def mean_return(folder, step, episodes=40):
    """Of the stored policies' mean actions, each on its own task (3,); None: uniform actions."""
    rng, total = np.random.default_rng(0), np.zeros(3)
    policies = load_policies(folder, [step]) if folder else None
    batch = make()
    for _ in range(episodes):
        states = batch.reset()
        for _ in range(HORIZON):
            actions = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
            if policies:
                actions = policies.act(torch.from_numpy(states)[:, None])[:, 0].numpy()
            states, rewards = batch.step(actions)
            total += rewards
    return total / episodes


def test_training_learns(tmp_path):
    cfg = PPOConfig(steps=6144, n_steps=256, lr=2e-3, gamma=0.9, save_every=3072)
    reports = []
    train_ppo(make(), cfg, (0,), tmp_path, lambda *report: reports.append(report))
    random, policy = mean_return(None, 0), mean_return(tmp_path, 6144)
    # walking straight to the corner costs about 1.4, acting at random 12 or more
    assert random.max() < -10 and reports[0][1] < -10
    assert np.mean([value for _, value in reports[-3:]]) > -5 and policy.min() > -2.5


def test_training_learns_in_a_room(tmp_path):
    """Discrete actions, states one-hot: the goal three moves away is reached in four."""
    cfg = PPOConfig(steps=6000, n_steps=200, lr=3e-3, gamma=0.9, save_every=6000)
    reports = []
    batch = make(ROOM, GOALS["room"][:2])
    train_ppo(batch, cfg, (0,), tmp_path, lambda *report: reports.append(report))
    assert reports[0][1] < 3 and reports[-1][1] > 6


def test_tasks_do_not_touch():
    """Other rewards in one task leave the weights of the others as they are."""
    first, second = agents(), agents()
    rollout, _ = play(make(), first, generator())
    first.learn(rollout, generator(1))
    rewards = rollout.rewards.clone()
    rewards[1] *= torch.linspace(-1, 1, SMALL.n_steps)
    second.learn(rollout._replace(rewards=rewards), generator(1))
    for a, b in zip(first.weights, second.weights, strict=True):
        torch.testing.assert_close(a[[0, 2]], b[[0, 2]], atol=1e-7, rtol=1e-6)
        assert (a[1] - b[1]).abs().max() > 1e-4


def test_siblings_have_everything_in_common_but_the_task():
    stack = agents(siblings=True)
    assert all(torch.equal(weight, weight[:1].expand_as(weight)) for weight in stack.weights)
    still = make(STILL, [TASKS[0]] * 3)  # the same task thrice: then nothing tells them apart
    rollout, _ = play(still, stack, generator())
    stack.learn(rollout, generator(1))
    for weight in stack.weights:
        torch.testing.assert_close(weight, weight[:1].expand_as(weight), atol=1e-6, rtol=1e-5)
    other, _ = play(make(STILL), agents(siblings=True), generator())
    # the first action, from the same state
    assert torch.equal(other.actions[0, 0], other.actions[2, 0])
    apart, _ = play(make(STILL), agents(), generator())
    assert not torch.equal(apart.actions[0, 0], apart.actions[2, 0])


def test_draws_are_of_the_density_that_is_learnt():
    """Discrete: shares are the softmax; continuous: mean and deviation of the Gaussian."""
    rng, room = generator(3), agents(ROOM, n=1)
    room.actor[-1].data = torch.tensor([[[0.0, 1.0, -1.0, 0.5]]])
    inputs = network_input(ROOM, np.array([[1, 2]]))
    drawn = torch.stack([room.act(inputs, rng)[0] for _ in range(4000)])
    chances = room.log_density(inputs[None].expand(1, 4, -1), torch.arange(4)[None]).exp()[0]
    share = torch.nn.functional.one_hot(drawn, 4).float().mean(0)
    assert chances.sum().item() == pytest.approx(1, abs=1e-5)
    assert (share - chances).abs().max() < 5 * 0.5 / 4000**0.5
    points = agents(n=1)
    points.log_std.data[:] = -1
    drawn = torch.stack([points.act(torch.zeros(1, 2), rng)[0] for _ in range(4000)])
    assert (drawn.std(0) - math.exp(-1)).abs().max() < 5 * math.exp(-1) / 8000**0.5


def test_play_remembers_what_was_drawn_and_plays_what_can_be():
    """Actions beyond 1 are clipped for the environment (Points asserts it), not for learning."""
    stack = agents()
    (s, a, r, s2, cut), mean = play(make(), stack, generator())
    assert s.shape == s2.shape == a.shape == (3, 64, 2) and r.shape == (3, 64)
    assert (a.abs() > 1).any()
    torch.testing.assert_close(s2, s + a.clamp(-1, 1) / 2)
    ends = [*range(9, 64, 10), 63]
    assert cut.nonzero()[:, 0].tolist() == ends
    inner = [t for t in range(63) if t not in ends]
    assert torch.equal(s2[:, inner], s[:, [t + 1 for t in inner]])
    assert (s[:, range(0, 64, 10)].abs() <= 1).all()
    assert mean == pytest.approx(r[:, :60].sum().item() / 18, rel=1e-5)
