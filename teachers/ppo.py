"""ppo.py: PPO for many tasks at once (App. D.2, Table 3: Reach and Push), one policy for each.

in : a batched environment of n tasks          out: the n policies, every `save_every` steps
Read after sac.py, before rollouts.py. This is not the paper's method: it makes its data.

Follows Schulman et al. 2017 as stable-baselines3 does it: two tanh layers of 64 units for the
policy and two for the value. A test compares updates with stable-baselines3's, number by number.

    rollout     n_steps of every task by the policy as it is
    advantage   how much better an action went than the value had expected: eq. 11 there, `gae`
    epochs      so often all steps in minibatches: the clipped objective, `losses`

As in sac.py the networks of n tasks are stacked, (n, in, out) a layer, so that one batched product
serves all of them, and nothing is shared between tasks: minibatches, the normalisation of
advantages and the limit of a gradient's norm are each task's own. `siblings` is sac.py's.

Training is a row of segments, a rollout and its epochs each, which begin with weights and moments
alone: the environment is reset, and the random streams are named by (seed, number of the segment).

Differs from stable-baselines3 (and so, presumably, from the paper): an episode is cut at the end
of a rollout, bootstrapped by the value of its last state, and not played on in the next one;
that is what the segments cost.

Shapes: n tasks, T = n_steps, B rows of a minibatch, di what a network reads (a state; of a grid
its coordinates one-hot), da numbers in an action (or how many actions there are).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs import Family
from support.files import load_optimizer, optimizer_tensors
from teachers.sac import mlp, two_seeds
from teachers.stored import WEIGHTS, resume, save_policies, save_state

HIDDEN = 64  # units of both layers of both networks


@dataclass(frozen=True)
class PPOConfig:
    """A row of Table 3; below `save_every` what it leaves out: stable-baselines3's defaults."""

    steps: int  # total_timesteps; rounded up to whole rollouts, as stable-baselines3 does
    n_steps: int = 2048  # of a rollout
    batch: int = 64
    epochs: int = 10
    lr: float = 3e-4
    gamma: float = 0.99
    save_every: int = 2048  # steps between checkpoints; rounded up to whole rollouts
    trace: float = 0.95  # lambda of `gae`
    clip: float = 0.2  # how far a ratio of densities counts
    value_weight: float = 0.5
    max_norm: float = 0.5  # of a task's gradient


class Rollout(NamedTuple):
    """T steps of n tasks."""

    inputs: Tensor  # (n, T, di)
    actions: Tensor  # (n, T, da) as they were drawn, or ids (n, T)
    rewards: Tensor  # (n, T)
    following: Tensor  # (n, T, di) what the networks read after the step
    cut: Tensor  # (T,) bool: after which steps an episode ends, or the rollout


def network_input(family: Family, states: np.ndarray) -> Tensor:
    """What a teacher's network reads of states (..., ds): (..., di) float32.

    Numbers as they are; of a grid each coordinate one-hot, one behind the other, which is how
    stable-baselines3 reads `MultiDiscrete` observations.
    """
    numbers = torch.from_numpy(states)
    if family.state_values is None:
        return numbers.float()
    coordinates = zip(numbers.long().unbind(-1), family.state_values, strict=True)
    one_hot = [torch.nn.functional.one_hot(ids, values) for ids, values in coordinates]
    return torch.cat(one_hot, -1).float()


def gae(rewards: Tensor, values: Tensor, following: Tensor, cut: Tensor, cfg: PPOConfig) -> Tensor:
    """Generalised advantages of T steps of n tasks, (n, T) (Schulman et al. 2016, eq. 16).

    `values`, `following` (n, T): what is expected from a step's state, and from the one behind it.
    `cut` (T,) bool: what comes after such a step is expected, not seen.
    """
    surprise = rewards + cfg.gamma * following - values
    advantage, after = torch.empty_like(surprise), torch.zeros_like(surprise[:, 0])
    for t in reversed(range(len(cut))):
        carried = 0.0 if cut[t] else cfg.gamma * cfg.trace
        advantage[:, t] = after = surprise[:, t] + carried * after
    return advantage


class StackedPPO:
    """n agents. `act` plays, `learn` makes the epochs of a rollout."""

    def __init__(
        self, n: int, family: Family, cfg: PPOConfig, seed: int, device="cpu", siblings=False
    ):
        self.n, self.cfg, self.discrete = n, cfg, family.discrete_actions
        self.drawn = 1 if siblings else n  # so many random numbers of a kind serve the n tasks
        reads = sum(family.state_values) if family.state_values else family.state_dim
        rng = torch.Generator(device).manual_seed(seed)
        # The last layer of a policy is nearly 0: at first it acts alike in all states.
        self.actor = self._network((reads, HIDDEN, HIDDEN, family.action_dim), 0.01, rng)
        self.critic = self._network((reads, HIDDEN, HIDDEN, 1), 1.0, rng)
        self.log_std = torch.zeros(n, 1, family.action_dim, device=device, requires_grad=True)
        self.weights = [*self.actor, *self.critic, *([] if self.discrete else [self.log_std])]
        self.optimizer = torch.optim.Adam(self.weights, cfg.lr, eps=1e-5, fused=True)

    def _network(self, sizes: Sequence[int], last: float, rng: torch.Generator) -> list[Tensor]:
        """Weights (n, in, out), orthogonal and as large as tanh wants them, and biases of 0."""
        weights = []
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            gain = last if i == len(sizes) - 2 else 2**0.5
            matrices = torch.empty(self.drawn, fan_out, fan_in, device=rng.device)
            for matrix in matrices:
                torch.nn.init.orthogonal_(matrix, gain, rng)
            bias = torch.zeros(self.n, 1, fan_out, device=rng.device)
            weights += [matrices.mT.expand(self.n, -1, -1).contiguous(), bias]
        return [weight.requires_grad_() for weight in weights]

    @torch.no_grad()
    def act(self, inputs: Tensor, rng: torch.Generator) -> Tensor:
        """Sampled actions for inputs (n, di): (n, da), which may leave [-1, 1], or ids (n,)."""
        out = mlp(self.actor, inputs[:, None], torch.tanh)[:, 0]
        if self.discrete:  # the largest of logits and Gumbel noise is a draw of their softmax
            draw = torch.rand(self.drawn, out.shape[-1], generator=rng, device=out.device)
            return (out - (-draw.log()).log()).argmax(-1)
        noise = torch.randn(self.drawn, out.shape[-1], generator=rng, device=out.device)
        return out + self.log_std[:, 0].exp() * noise

    def log_density(self, inputs: Tensor, actions: Tensor) -> Tensor:
        """Of actions (n, B[, da]) at inputs (n, B, di): (n, B)."""
        out = mlp(self.actor, inputs, torch.tanh)
        if self.discrete:
            return out.log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        away = (actions - out) / self.log_std.exp()
        return (-0.5 * away**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def value(self, inputs: Tensor) -> Tensor:
        """The return that is expected from inputs (n, B, di): (n, B)."""
        return mlp(self.critic, inputs, torch.tanh)[..., 0]

    def losses(self, s: Tensor, a: Tensor, before: Tensor, advantage: Tensor, goal: Tensor):
        """Of a minibatch, (n, B, ...): each task's loss (n,).

        `before` (n, B): log density of the actions when they were played; `goal` (n, B): returns.
        """
        if advantage.shape[1] > 1:  # within a minibatch: as many praised as blamed
            spread = advantage.std(1, keepdim=True) + 1e-8
            advantage = (advantage - advantage.mean(1, keepdim=True)) / spread
        # How much likelier the action is now. Beyond 1 +- clip there is no more to be gained.
        ratio = (self.log_density(s, a) - before).exp()
        clipped = ratio.clamp(1 - self.cfg.clip, 1 + self.cfg.clip)
        policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean(1)
        value_loss = (goal - self.value(s)).square().mean(1)
        return policy_loss + self.cfg.value_weight * value_loss

    def update(self, *minibatch: Tensor) -> Tensor:
        """One step down the gradient of `losses`; those (n,)."""
        losses = self.losses(*minibatch)
        # in a sum over tasks, the weights of a task have the gradient of its own loss
        gradients = torch.autograd.grad(losses.sum(), self.weights)
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        scale = (self.cfg.max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None, None]
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient * scale
        self.optimizer.step()
        return losses.detach()

    def learn(self, rollout: Rollout, rng: torch.Generator) -> None:
        """The epochs of a rollout."""
        s, a, rewards, following, cut = rollout
        with torch.no_grad():
            values, before = self.value(s), self.log_density(s, a)
            advantage = gae(rewards, values, self.value(following), cut, self.cfg)
        whole, steps = (s, a, before, advantage, advantage + values), len(cut)
        task = torch.arange(self.n, device=s.device)[:, None]
        for _ in range(self.cfg.epochs):
            order = torch.rand(self.drawn, steps, generator=rng, device=s.device).argsort(1)
            shuffled = [array[task, order] for array in whole]
            for first in range(0, steps, self.cfg.batch):
                self.update(*(array[:, first : first + self.cfg.batch] for array in shuffled))

    def policies(self) -> dict[str, Tensor]:
        """The weights of every task's policy, stacked (no copies)."""
        weights = dict(zip(WEIGHTS, self.actor, strict=True))
        return weights if self.discrete else weights | {"log_std": self.log_std}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that learning changes, by name (no copies)."""
        tensors = {f"weights.{i}": weight for i, weight in enumerate(self.weights)}
        return tensors | optimizer_tensors(self.optimizer, "adam")

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`. KeyError, RuntimeError, ValueError: they do not fit."""
        with torch.no_grad():
            for i, weight in enumerate(self.weights):
                weight.copy_(tensors[f"weights.{i}"])
        load_optimizer(self.optimizer, "adam", tensors)


def play(batch, agents: StackedPPO, rng: torch.Generator) -> tuple[Rollout, float]:
    """A rollout, and the mean return of the episodes that ended in it; nan if none did."""
    family, device, count = batch.family, agents.actor[0].device, agents.cfg.n_steps
    steps, inputs = [], network_input(family, batch.reset()).to(device)
    for t in range(count):
        actions = agents.act(inputs, rng)
        # The environment gets what its actions can be, the density is that of what was drawn.
        played = actions if agents.discrete else actions.clamp(-1, 1)
        states, rewards = batch.step(played.cpu().numpy())
        following = network_input(family, states).to(device)
        steps.append((inputs, actions, torch.from_numpy(rewards).to(device), following))
        inputs = following
        if (t + 1) % family.horizon == 0:
            inputs = network_input(family, batch.reset()).to(device)
    columns = [torch.stack(column, 1) for column in zip(*steps, strict=True)]
    cut = (torch.arange(count) + 1) % family.horizon == 0
    cut[-1] = True
    whole = count // family.horizon  # episodes
    rollout = Rollout._make([*columns, cut])
    total = rollout.rewards[:, : whole * family.horizon].sum(1).mean()
    return rollout, float(total) / whole if whole else math.nan


def train_ppo(
    batch,
    cfg: PPOConfig,
    seed: Sequence[int],
    folder: Path,
    report: Callable[[int, float], None] = lambda step, mean_return: None,
    device="cpu",
    siblings: bool = False,
) -> None:
    """Train on a batched environment, or continue from `folder`; at once if all is done.

    `report(step, mean return of the n)` is called after every rollout (`play`); a run that
    continues repeats the reports since its last state, and is the uninterrupted one bit for bit.
    Raises ValueError with one line for a state that is damaged or of other settings.
    """
    folder, n = Path(folder), len(batch.reset())
    total = math.ceil(cfg.steps / cfg.n_steps) * cfg.n_steps
    save_every = math.ceil(cfg.save_every / cfg.n_steps) * cfg.n_steps
    first_weights, _ = two_seeds(*seed, 0)
    agents = StackedPPO(n, batch.family, cfg, first_weights, device, siblings)
    settings = {**asdict(cfg), "seed": [int(number) for number in seed], "n": n}
    step = resume(folder, "ppo-state", settings, agents)
    kind, rng = "ppo-discrete" if agents.discrete else "ppo", torch.Generator(device)
    while step < total:
        # one segment; 0 drew the weights
        starts, draws = two_seeds(*seed, 1 + step // cfg.n_steps)
        batch.rng = np.random.default_rng(starts)
        rng.manual_seed(draws)
        rollout, mean_return = play(batch, agents, rng)
        agents.learn(rollout, rng)
        step += cfg.n_steps
        report(step, mean_return)
        if step % save_every == 0 or step == total:
            save_policies(folder, step, kind, agents.policies())
            save_state(folder, "ppo-state", agents.tensors(), step, settings)
