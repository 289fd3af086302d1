"""sac.py: soft actor-critic for many tasks at once (paper App. D.2, Table 2), one independent policy for each.

in : a batched environment of n tasks          out: checkpoints of n policies, every `save_every` steps
Read after envs.py, before teachers.py.

The paper trains one policy a task, 50 tasks of up to a million steps: small networks, so a task by itself spends
its time in overheads. Here the networks of n tasks are stacked, (n, in, out) a layer, and one batched matrix
product serves all; so do one replay array (n, capacity, ...) and one optimiser. Nothing is shared between tasks:
a sum of losses over tasks has, for each task's weights, the gradient of its own loss.

Follows Haarnoja et al. 2018 with a fixed entropy weight (Table 2 "entropy ratio") as stable-baselines3 does it:
two critics and their slow copies, one update a step after the warm-up, episodes that end by the clock alone and
so are never terminal for the critics. A test compares an update with stable-baselines3's, number by number.

Shape legend: n tasks, B rows of a replay sample, ds/da state and action numbers, H hidden units.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support.files import load_tensors, save_tensors

STATE = "state.safetensors"
FORMAT = "1"


@dataclass(frozen=True)
class SACConfig:
    """Table 2; `hidden`, `batch` and `replay` are the official configuration's."""

    steps: int  # of the environment, and updates but for the warm-up
    warmup: int  # first steps: random actions, no updates
    save_every: int  # steps between checkpoints, whole episodes
    lr: float = 3e-4
    tau: float = 0.005  # soft update
    gamma: float = 0.99
    alpha: float = 0.2  # entropy ratio
    hidden: int = 128
    batch: int = 256
    replay: int = 100_000


# ------------------------------------------------------------------------------------------ networks
def init_mlp(n: int, sizes: Sequence[int], rng: torch.Generator) -> list[Tensor]:
    """Weights (n, in, out) and biases (n, 1, out) in turn, drawn as torch.nn.Linear draws them."""
    weights = []
    for fan_in, fan_out in pairwise(sizes):
        for shape in ((n, fan_in, fan_out), (n, 1, fan_out)):
            draw = torch.rand(shape, generator=rng, device=rng.device)
            weights.append((2 * draw - 1) * fan_in**-0.5)
    return weights


def mlp(
    weights: Sequence[Tensor], x: Tensor, activation: Callable[[Tensor], Tensor] = torch.relu
) -> Tensor:
    """n networks on n inputs: (n, B, in) -> (n, B, out)."""
    last = len(weights) // 2 - 1
    for i in range(last + 1):
        x = torch.baddbmm(weights[2 * i + 1], x, weights[2 * i])
        if i < last:
            x = activation(x)
    return x


def squashed(out: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Action tanh(mean + std * noise) and its log density, from the actor's output (..., 2 da)."""
    mean, log_std = out.chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    action = torch.tanh(mean + log_std.exp() * noise)
    gauss = (-0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)
    return action, gauss - torch.log1p(1e-6 - action**2).sum(-1)


class StackedSAC:
    """n agents. `act` plays, `update` learns from a replay sample."""

    def __init__(self, n: int, ds: int, da: int, cfg: SACConfig, seed: int, device="cpu"):
        self.n, self.da, self.cfg = n, da, cfg
        rng = torch.Generator(device).manual_seed(seed)
        self.actor = [
            w.requires_grad_() for w in init_mlp(n, (ds, cfg.hidden, cfg.hidden, 2 * da), rng)
        ]
        # both critics in one stack: the first of every task, then the second
        self.critic = [
            w.requires_grad_() for w in init_mlp(2 * n, (ds + da, cfg.hidden, cfg.hidden, 1), rng)
        ]
        self.target = [w.detach().clone() for w in self.critic]
        self.actor_optimizer = torch.optim.Adam(self.actor, cfg.lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic, cfg.lr, fused=True)

    @torch.no_grad()
    def act(self, states: Tensor, rng: torch.Generator) -> Tensor:
        """Sampled actions (n, da) for states (n, ds)."""
        noise = torch.randn(self.n, 1, self.da, generator=rng, device=states.device)
        return squashed(mlp(self.actor, states[:, None]), noise)[0][:, 0]

    def q(self, weights: Sequence[Tensor], states: Tensor, actions: Tensor) -> Tensor:
        """Both critics: (2, n, B)."""
        x = torch.cat([states, actions], -1)
        return mlp(weights, torch.cat([x, x])).view(2, self.n, -1)

    def update(
        self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step of both critics, the actor and the slow copies on samples (n, B, ...); `noise` (2, n, B, da) is
        standard normal, for the next states and for these. Returns the critics' and the actor's loss (n,).
        """
        cfg = self.cfg
        with torch.no_grad():
            next_action, log_density = squashed(mlp(self.actor, s2), noise[0])
            value = self.q(self.target, s2, next_action).amin(0) - cfg.alpha * log_density
            goal = r + cfg.gamma * value
        critic_loss = 0.5 * F.mse_loss(
            self.q(self.critic, s, a), goal.expand(2, -1, -1), reduction="none"
        ).mean(2)
        self._step(self.critic_optimizer, self.critic, critic_loss.sum())
        action, log_density = squashed(mlp(self.actor, s), noise[1])
        frozen = [
            w.detach() for w in self.critic
        ]  # gradients flow through the critics to the action alone
        actor_loss = (cfg.alpha * log_density - self.q(frozen, s, action).amin(0)).mean(1)
        self._step(self.actor_optimizer, self.actor, actor_loss.sum())
        torch._foreach_lerp_(self.target, frozen, cfg.tau)
        return critic_loss.detach().sum(0), actor_loss.detach()

    @staticmethod
    def _step(optimizer: torch.optim.Adam, weights: list[Tensor], loss: Tensor) -> None:
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that learning changes, by name (no copies)."""
        found = {}
        for name in ("actor", "critic", "target"):
            found |= {f"{name}.{i}": w for i, w in enumerate(getattr(self, name))}
        for name, optimizer in (("actor", self.actor_optimizer), ("critic", self.critic_optimizer)):
            for i, moments in optimizer.state_dict()["state"].items():
                found |= {f"adam.{name}.{i}.{key}": value for key, value in moments.items()}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`."""
        with torch.no_grad():
            for name in ("actor", "critic", "target"):
                for i, weight in enumerate(getattr(self, name)):
                    weight.copy_(tensors[f"{name}.{i}"])
        for name, optimizer in (("actor", self.actor_optimizer), ("critic", self.critic_optimizer)):
            keys = [key for key in tensors if key.startswith(f"adam.{name}.")]
            state: dict[int, dict[str, Tensor]] = {}
            for key in keys:
                _, _, index, moment = key.split(".")
                state.setdefault(int(index), {})[moment] = tensors[key].clone()
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class Replay:
    """The last `capacity` transitions of n tasks that step together."""

    def __init__(self, n: int, capacity: int, ds: int, da: int, device="cpu"):
        shapes = {"states": (ds,), "actions": (da,), "rewards": (), "following": (ds,)}
        self.arrays = {
            k: torch.zeros(n, capacity, *shape, device=device) for k, shape in shapes.items()
        }
        self.capacity, self.seen = capacity, 0
        self.row = torch.arange(n, device=device)[:, None]

    def add(self, *step: Tensor) -> None:
        """states (n, ds), actions (n, da), rewards (n,), next states (n, ds)"""
        for array, values in zip(self.arrays.values(), step, strict=True):
            array[:, self.seen % self.capacity] = values
        self.seen += 1

    def sample(self, batch: int, rng: torch.Generator) -> list[Tensor]:
        """`batch` transitions of each task, with replacement: (n, batch, ...) each."""
        size = (len(self.row), batch)
        index = torch.randint(
            min(self.seen, self.capacity), size, generator=rng, device=self.row.device
        )
        return [array[self.row, index] for array in self.arrays.values()]


# ------------------------------------------------------------------------------------------ training
def policy_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:010d}.safetensors"


def save_policies(folder: Path, step: int, kind: str, weights: dict[str, Tensor]) -> None:
    """The policies alone, stacked over tasks (teachers.py: `Policies`)."""
    save_tensors(
        policy_file(folder, step), weights, {"t2mir": FORMAT, "kind": kind, "step": str(step)}
    )


def save_state(folder: Path, agents: StackedSAC, replay: Replay, settings: str) -> None:
    filled = min(replay.seen, replay.capacity)
    tensors = agents.tensors() | {f"replay.{k}": v[:, :filled] for k, v in replay.arrays.items()}
    about = {"t2mir": FORMAT, "kind": "sac-state", "step": str(replay.seen), "settings": settings}
    save_tensors(folder / STATE, tensors, about)


def load_state(folder: Path, agents: StackedSAC, replay: Replay, settings: str) -> int:
    """Continue from state.safetensors: the step it was written at, 0 without one. Raises ValueError with one line
    for a damaged file or one of other settings or of another environment.
    """
    path, again = folder / STATE, f"delete {folder} to train its tasks anew"
    if not path.exists():
        return 0
    try:
        tensors, about = load_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}: {again}") from None
    if about.get("kind") != "sac-state" or about.get("settings") != settings:
        raise ValueError(f"{path} is of other settings: {again}")
    try:
        agents.load(tensors)
        for name, array in replay.arrays.items():
            saved = tensors[f"replay.{name}"]
            array[:, : saved.shape[1]] = saved
    except (KeyError, RuntimeError):
        raise ValueError(f"{path} is of another environment: {again}") from None
    replay.seen = int(about["step"])
    return replay.seen


def train_sac(
    batch,
    cfg: SACConfig,
    seed: Sequence[int],
    folder: Path,
    report: Callable[[int, float], None] = lambda step, mean_return: None,
    device="cpu",
    keep_seconds: float = 120.0,
) -> None:
    """Train one policy for each row of a batched environment; checkpoints go to `folder`.

    Training is a row of segments of `save_every` steps, each with random streams of its own that depend on `seed`
    and its number alone. state.safetensors is written between segments, at least `keep_seconds` apart, so that a
    run that continues from it is the uninterrupted one bit for bit. `report` is called after each episode with the
    mean return of the n. Raises ValueError for settings that cannot be and for a damaged state.
    """
    spec, n = batch.spec, len(batch.reset())
    if cfg.save_every % spec.horizon or cfg.steps % cfg.save_every:
        raise ValueError(
            f"{cfg.steps} steps of SAC, a checkpoint every {cfg.save_every}: the latter must be whole episodes of "
            f"{spec.horizon} steps and divide the former"
        )
    settings = json.dumps({**asdict(cfg), "seed": list(seed), "n": n})
    agents = StackedSAC(n, spec.state_dim, spec.action_dim, cfg, _seed(*seed, 0)[0], device)
    replay = Replay(n, min(cfg.replay, cfg.steps), spec.state_dim, spec.action_dim, device)
    step, written = load_state(folder, agents, replay, settings), time.monotonic()
    rng = torch.Generator(device)
    while step < cfg.steps:
        environment, everything = _seed(*seed, 1 + step // cfg.save_every)
        batch.rng = np.random.default_rng(environment)
        rng.manual_seed(everything)
        for _ in range(cfg.save_every // spec.horizon):
            states, total = torch.from_numpy(batch.reset()).to(device), 0.0
            for _ in range(spec.horizon):
                if step < cfg.warmup:
                    actions = 2 * torch.rand(n, spec.action_dim, generator=rng, device=device) - 1
                else:
                    actions = agents.act(states, rng)
                following, rewards = (
                    torch.from_numpy(x).to(device) for x in batch.step(actions.cpu().numpy())
                )
                replay.add(states, actions, rewards, following)
                states, total, step = following, total + rewards, step + 1
                if step > cfg.warmup:
                    noise = torch.randn(
                        2, n, cfg.batch, spec.action_dim, generator=rng, device=device
                    )
                    s, a, r, s2 = replay.sample(cfg.batch, rng)
                    agents.update(s, a, r, s2, noise)
            report(step, float(total.mean()))
        weights = {
            f"{kind}{i // 2}": w
            for i, (kind, w) in enumerate(zip("wb" * 3, agents.actor, strict=True))
        }
        save_policies(folder, step, "sac", weights)
        if time.monotonic() - written > keep_seconds or step == cfg.steps:
            save_state(folder, agents, replay, settings)
            written = time.monotonic()


def _seed(*numbers: int) -> tuple[int, int]:
    """Two seeds of independent streams."""
    first, second = np.random.SeedSequence(numbers).generate_state(2)
    return int(first), int(second)
