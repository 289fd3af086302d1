"""sac.py: soft actor-critic for many tasks at once (App. D.2, Table 2), one policy for each.

in : a batched environment of n tasks          out: the n policies, every `save_every` steps
Read after collect.py, which asks for it, and before rollouts.py. This is not the paper's method: it
makes its data.

Follows Haarnoja et al. 2018 with a fixed entropy weight (Table 2: "Entropy ratio"), as
stable-baselines3 does it. An actor plays; two critics judge its actions; slow copies of the
critics judge what comes next. One update a step after the warm-up. Episodes end by the clock
alone, so no state is terminal for the critics. A test compares updates with
stable-baselines3's, number by number.

The paper trains one policy a task: 50 tasks of up to a million steps. Such small networks
spend their time in overheads. Here the networks of n tasks are stacked, (n, in, out) a layer,
and one batched matrix product serves all of them; so do one replay and one optimiser. Nothing
is shared between tasks: in a sum of losses over tasks, the weights of a task have the gradient
of its own loss. (conditioned.py has the opposite, one policy for all tasks, out of the same parts.)

`siblings`, not the paper's: all tasks start from the same weights and see the same random numbers,
as where a script seeds once and then trains task after task. Only starts of episodes differ.

Symbols: s, a, r, s2 = state, action, reward, next state; alpha = entropy ratio, gamma =
discount factor, tau = soft update (all Table 2).
Shapes: n tasks, B rows of a replay sample, ds/da numbers of a state/an action.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support.files import load_optimizer, optimizer_tensors
from teachers.stored import WEIGHTS, resume, save_policies, save_state


@dataclass(frozen=True)
class SACConfig:
    """A row of Table 2; `hidden`, `batch` and `replay` are the official configuration's."""

    steps: int  # of the environment
    warmup: int  # the first of them: random or demonstrated actions, no updates
    save_every: int  # steps between checkpoints, whole episodes
    lr: float = 3e-4
    tau: float = 0.005
    gamma: float = 0.99
    alpha: float = 0.2
    hidden: int = 128
    batch: int = 256
    replay: int = 100_000
    # critics that normalise their hidden layers judge actions they have not seen less wildly
    layer_norm: bool = field(default=False, metadata={"before": False})


def two_seeds(*numbers: int) -> tuple[int, int]:
    """Seeds of two independent random streams (NumPy's and torch's) that `numbers` name."""
    # SeedSequence mixes: neighbouring numbers (task 3, task 4) give streams that share nothing
    first, second = np.random.SeedSequence(numbers).generate_state(2)
    return int(first), int(second)


# ------------------------------------------------------------------------------------ networks
def init_mlp(n: int, sizes: Sequence[int], rng: torch.Generator) -> list[Tensor]:
    """Weights (n, in, out) and biases (n, 1, out) in turn, drawn as torch.nn.Linear does."""
    weights = []
    for fan_in, fan_out in pairwise(sizes):
        for shape in ((n, fan_in, fan_out), (n, 1, fan_out)):
            draw = torch.rand(shape, generator=rng, device=rng.device)
            weights.append((2 * draw - 1) * fan_in**-0.5)  # uniform within 1 / sqrt(inputs)
    return weights


def mlp(
    weights: Sequence[Tensor], x: Tensor, activation: Callable[[Tensor], Tensor] = torch.relu
) -> Tensor:
    """n networks on n inputs: (n, B, in) -> (n, B, out). The last layer is linear."""
    last = len(weights) // 2 - 1
    for i in range(last + 1):
        x = torch.baddbmm(weights[2 * i + 1], x, weights[2 * i])  # b + x W, one for each of the n
        if i < last:
            x = activation(x)
    return x


def normed_relu(x: Tensor) -> Tensor:
    """relu of hidden layers (..., hidden), each of mean 0 and variance 1; it has no weights."""
    return F.layer_norm(x, x.shape[-1:]).relu()


def squashed(out: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions (..., da) in (-1, 1) and their log density (...).

    `out` (..., 2 da) is the actor's output, `noise` (..., da) is standard normal: given it, the
    action is a function of the weights, and gradients flow through it ("reparametrisation").
    """
    mean, log_std = out.chunk(2, -1)
    log_std = log_std.clamp(-20, 2)  # the usual limits: neither no noise nor nothing else
    # u ~ Normal(mean, std), then a = tanh(u): bounded, as the environment wants it
    action = torch.tanh(mean + log_std.exp() * noise)
    # log density of u: the normal distribution's, written with noise = (u - mean) / std
    gauss = (-0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
    # change of variables: tanh has slope 1 - a^2, and density is divided by it; 1e-6 keeps the
    # logarithm finite where the action touches its bound
    return action, gauss - torch.log1p(1e-6 - action**2).sum(-1)


class StackedSAC:
    """n agents. `act` plays, `update` learns from a replay sample."""

    def __init__(
        self, n: int, ds: int, da: int, cfg: SACConfig, seed: int, device="cpu", siblings=False
    ):
        self.n, self.da, self.cfg = n, da, cfg
        self.drawn = 1 if siblings else n  # so many random numbers of a kind serve the n tasks
        rng = torch.Generator(device).manual_seed(seed)
        self.actor = init_mlp(self.drawn, (ds, cfg.hidden, cfg.hidden, 2 * da), rng)
        # both critics in one stack: the first of every task, then the second of every task
        self.critic = init_mlp(2 * self.drawn, (ds + da, cfg.hidden, cfg.hidden, 1), rng)
        if siblings:
            self.actor = [weight.repeat(n, 1, 1) for weight in self.actor]
            self.critic = [weight.repeat_interleave(n, 0) for weight in self.critic]
        self.target = [weight.clone() for weight in self.critic]  # their slow copies
        for weight in (*self.actor, *self.critic):
            weight.requires_grad_()
        self.actor_optimizer = torch.optim.Adam(self.actor, cfg.lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic, cfg.lr, fused=True)

    @torch.no_grad()
    def act(self, states: Tensor, rng: torch.Generator) -> Tensor:
        """Sampled actions (n, da) for states (n, ds)."""
        noise = torch.randn(self.drawn, 1, self.da, generator=rng, device=states.device)
        # the middle axis is the batch of the stacked networks: one state each
        return squashed(mlp(self.actor, states[:, None]), noise)[0][:, 0]

    def look_around(self, states: Tensor, rng: torch.Generator) -> Tensor:
        """Actions of the warm-up (n, da): uniform in [-1, 1]."""
        actions = 2 * torch.rand(self.drawn, self.da, generator=rng, device=states.device) - 1
        return actions.expand(len(states), -1)

    def learn(self, replay: Replay, rng: torch.Generator) -> None:
        """An update from a sample of the replay."""
        size = (2, self.drawn, self.cfg.batch, self.da)
        noise = torch.randn(size, generator=rng, device=replay.task.device)
        noise = noise.expand(2, self.n, -1, -1)
        self.update(*replay.sample(self.cfg.batch, rng, self.drawn), noise)

    def policies(self) -> dict[str, Tensor]:
        """The weights of every task's policy, stacked (no copies)."""
        return dict(zip(WEIGHTS, self.actor, strict=True))

    def q(self, weights: Sequence[Tensor], states: Tensor, actions: Tensor) -> Tensor:
        """What two critics expect of actions (n, B, da) in states (n, B, ds): (2, n, B)."""
        x = torch.cat([states, actions], -1)
        # (2n, B, ds + da): the first critics of all tasks, then the second ones, read the same
        activation = normed_relu if self.cfg.layer_norm else torch.relu
        return mlp(weights, torch.cat([x, x]), activation).view(2, self.n, -1)

    def update(
        self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step of the critics, the actor and the slow copies on samples (n, B, ...).

        `noise` (2, n, B, da) is standard normal: for actions in the next states, then in these.
        Returns the critics' and the actor's loss, (n,) each.
        """
        cfg = self.cfg
        with torch.no_grad():
            # the next action is drawn anew: what today's policy would do, not what was done
            next_action, next_log_density = squashed(mlp(self.actor, s2), noise[0])
            # soft value of the next state = the slow critics' judgement plus the entropy's
            # reward, -alpha log pi; of two critics the lower one, because errors upwards spread
            next_value = self.q(self.target, s2, next_action).amin(0)
            next_value = next_value - cfg.alpha * next_log_density
            # Bellman: what an action is worth is its reward and, discounted, what follows.
            # There is no "1 - done": the clock that ends an episode is not part of the task
            goal = r + cfg.gamma * next_value

        # the critics' loss: half the mean squared distance to that goal
        error = F.mse_loss(self.q(self.critic, s, a), goal.expand(2, -1, -1), reduction="none")
        critic_loss = 0.5 * error.mean(2)  # (2, n)
        self._step(self.critic_optimizer, self.critic, critic_loss.sum())

        # the actor's loss: alpha log pi(a|s) - Q(s, a) of an action of its own. Its gradient
        # flows through the critics into the action, and leaves the critics as they are
        action, log_density = squashed(mlp(self.actor, s), noise[1])
        frozen = [weight.detach() for weight in self.critic]
        value = self.q(frozen, s, action).amin(0)
        actor_loss = (cfg.alpha * log_density - value).mean(1)  # (n,)
        self._step(self.actor_optimizer, self.actor, actor_loss.sum())

        # soft update: target <- (1 - tau) target + tau critic
        torch._foreach_lerp_(self.target, frozen, cfg.tau)
        return critic_loss.detach().sum(0), actor_loss.detach()

    @staticmethod
    def _step(optimizer: torch.optim.Adam, weights: list[Tensor], loss: Tensor) -> None:
        """One step down the gradient of these weights alone."""
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that learning changes, by name (no copies)."""
        tensors = {}
        for name in ("actor", "critic", "target"):
            tensors |= {f"{name}.{i}": weight for i, weight in enumerate(getattr(self, name))}
        tensors |= optimizer_tensors(self.actor_optimizer, "adam.actor")
        return tensors | optimizer_tensors(self.critic_optimizer, "adam.critic")

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`. KeyError, RuntimeError, ValueError: they do not fit."""
        with torch.no_grad():
            for name in ("actor", "critic", "target"):
                for i, weight in enumerate(getattr(self, name)):
                    weight.copy_(tensors[f"{name}.{i}"])
        load_optimizer(self.actor_optimizer, "adam.actor", tensors)
        load_optimizer(self.critic_optimizer, "adam.critic", tensors)


class Replay:
    """The last `capacity` transitions of n tasks that step together."""

    def __init__(self, n: int, capacity: int, ds: int, da: int, device="cpu", **more: tuple):
        """`more`: shapes of what else is kept of a step, by name."""
        shapes = {"states": (ds,), "actions": (da,), "rewards": (), "following": (ds,), **more}
        self.arrays = {
            name: torch.zeros(n, capacity, *shape, device=device) for name, shape in shapes.items()
        }
        self.capacity, self.more = capacity, tuple(more)
        self.seen = 0  # transitions of each task so far, those that were overwritten too
        self.task = torch.arange(n, device=device)[:, None]  # (n, 1): picks rows beside an index

    @property
    def filled(self) -> int:
        """How many of its places hold a transition."""
        return min(self.seen, self.capacity)

    def add(self, *step: Tensor) -> None:
        """states (n, ds), actions (n, da), rewards (n,), next states (n, ds), and what is more"""
        for array, values in zip(self.arrays.values(), step, strict=True):
            array[:, self.seen % self.capacity] = values  # the oldest gives way
        self.seen += 1

    def sample(
        self, batch: int, rng: torch.Generator, drawn: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`batch` transitions of each task, with replacement: s, a, r, s2, (n, batch, ...) each.

        `drawn` 1: the same places for all tasks, instead of places of its own for each.
        """
        size = (drawn or len(self.task), batch)
        index = torch.randint(self.filled, size, generator=rng, device=self.task.device)
        s, a, r, s2 = (array[self.task, index] for array in self.arrays.values())
        return s, a, r, s2

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by name (no copies)."""
        return {f"replay.{name}": array[:, : self.filled] for name, array in self.arrays.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`, but for `seen`. KeyError, RuntimeError: they do not fit."""
        for name, array in self.arrays.items():
            saved = tensors[f"replay.{name}"]
            array[:, : saved.shape[1]] = saved


# ------------------------------------------------------------------------------------ training
def play_and_learn(batch, agents: StackedSAC, replay: Replay, rng: torch.Generator) -> float:
    """One episode of all n tasks, an update after each step; the mean return of the n."""
    cfg, device = agents.cfg, replay.task.device
    states = torch.from_numpy(batch.reset()).to(device)
    total = torch.zeros(len(states), device=device)
    for _ in range(batch.family.horizon):
        act = agents.look_around if replay.seen < cfg.warmup else agents.act
        actions = act(states, rng)
        step = batch.step(actions.cpu().numpy())
        following, rewards = (torch.from_numpy(array).to(device) for array in step)
        more = [torch.from_numpy(getattr(batch, name)).to(device) for name in replay.more]
        replay.add(states, actions, rewards, following, *more)
        states = following
        total += rewards
        if replay.seen > cfg.warmup:
            agents.learn(replay, rng)
    return float(total.mean())


def separate(
    batch, cfg: SACConfig, seed: int, device: str, siblings: bool = False
) -> tuple[StackedSAC, Replay]:
    """One untrained agent for each row of a batched environment, and their empty replay."""
    family, n = batch.family, len(batch.reset())
    sizes = family.state_dim, family.action_dim
    agents = StackedSAC(n, *sizes, cfg, seed, device, siblings)
    # no more places than steps: they would only take memory
    return agents, Replay(n, min(cfg.replay, cfg.steps), *sizes, device)


def train_sac(
    batch,
    cfg: SACConfig,
    seed: Sequence[int],
    folder: Path,
    report: Callable[[int, float], None] = lambda step, mean_return: None,
    device="cpu",
    keep_seconds: float = 120.0,
    build: Callable[..., tuple[StackedSAC, Replay]] = separate,
) -> None:
    """Train on a batched environment whoever `build` makes; their policies go to `folder`.

    Training is a row of segments of `save_every` steps. Each has random streams of its own,
    which depend on `seed` and on its number alone. state.safetensors is written between
    segments, at least `keep_seconds` apart, so that a run that continues from it is the
    uninterrupted one bit for bit. `report(step, mean return of the n)` is called after each
    episode. Raises ValueError for settings that cannot be and for a damaged state.
    """
    spec = batch.family
    # a checkpoint must fall between two episodes, where nothing of an environment has to be kept
    if cfg.save_every % spec.horizon or cfg.steps % cfg.save_every:
        raise ValueError(
            f"{cfg.steps} steps of SAC, a checkpoint every {cfg.save_every}: the latter must be "
            f"whole episodes of {spec.horizon} steps and divide the former"
        )
    first_weights, _ = two_seeds(*seed, 0)
    agents, replay = build(batch, cfg, first_weights, device)
    settings = {**asdict(cfg), "seed": list(seed), "n": len(replay.task)}
    replay.seen = resume(folder, "sac-state", settings, agents, replay)
    rng, written = torch.Generator(device), time.monotonic()
    while replay.seen < cfg.steps:
        # one segment. Its streams are named by its number (1, 2, ...; 0 drew the weights), so that
        # no stream's state has to be saved
        starts, actions_and_samples = two_seeds(*seed, 1 + replay.seen // cfg.save_every)
        batch.rng = np.random.default_rng(starts)
        rng.manual_seed(actions_and_samples)
        for _ in range(cfg.save_every // spec.horizon):
            mean_return = play_and_learn(batch, agents, replay, rng)
            report(replay.seen, mean_return)
        save_policies(folder, replay.seen, "sac", agents.policies())
        # the policies are small, the state is not: of a replay of 100,000 steps it is megabytes
        if time.monotonic() - written > keep_seconds or replay.seen == cfg.steps:
            tensors = agents.tensors() | replay.tensors()
            save_state(folder, "sac-state", tensors, replay.seen, settings)
            written = time.monotonic()
