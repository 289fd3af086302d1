"""ppo.py: PPO, the teacher of one task (App. D.2, Table 3: Reach and Push).

in : a Gymnasium environment of one task, settings      out: its policy, every `save_every` steps
Read after sac.py, before rollouts.py. This is not the paper's method: it makes its data.

The algorithm is stable-baselines3's `PPO("MlpPolicy")`: two tanh layers of 64 units for the
policy and two for the value. This file says how it is trained piece by piece, and kept:

    step-0000002048.safetensors   the policy alone, a stack of one: x @ w0 + b0, tanh, ...
                                  -> mean action and log_std, or logits of discrete actions
    state.safetensors             what training continues from: both networks, Adam's moments

Training is a row of segments: one rollout of `n_steps` and its epochs. Each begins with weights
and moments alone: the environment is reset, and every random stream (torch, NumPy, Python,
environment, action space) is seeded by (seed, number of the segment). A run that continues from
its state is therefore the uninterrupted one, bit for bit, without a pickled environment or
generator. The environment must forget everything in `reset(seed=...)`.

Differs from stable-baselines3 (and so, presumably, from the paper): an episode is cut at the end
of a rollout, bootstrapped by the value of its last state, and not played on in the next one;
that is what the segments cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium as gym
import numpy as np
from torch import Tensor

from support.files import load_optimizer, optimizer_tensors
from teachers.sac import other_environment, read_state, save_policies, save_state

if TYPE_CHECKING:  # it takes seconds to import, and only training needs it
    from stable_baselines3 import PPO


@dataclass(frozen=True)
class PPOConfig:
    """A row of Table 3; everything else is stable-baselines3's default."""

    steps: int  # total_timesteps; rounded up to whole rollouts, as stable-baselines3 does
    n_steps: int = 2048  # of a rollout
    batch: int = 64
    epochs: int = 10
    lr: float = 3e-4
    gamma: float = 0.99
    save_every: int = 2048  # steps between checkpoints; rounded up to whole rollouts


def segment_seed(seed: Sequence[int], segment: int) -> int:
    """The seed of one segment; segment 0 draws the first weights."""
    return int(np.random.SeedSequence([*seed, segment]).generate_state(1)[0])


def build(env: gym.Env, cfg: PPOConfig, seed: Sequence[int]) -> PPO:
    """The untrained model."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import Logger

    model = PPO(
        "MlpPolicy",
        env,
        cfg.lr,
        n_steps=cfg.n_steps,
        batch_size=cfg.batch,
        n_epochs=cfg.epochs,
        gamma=cfg.gamma,
        seed=segment_seed(seed, 0),
        device="cpu",
        verbose=0,
    )
    model.set_logger(Logger(None, []))  # the default one makes a temporary folder in every learn()
    return model


# -------------------------------------------------------------------------------------- on disk
def save_policy(folder: Path, model: PPO, step: int) -> None:
    """The policy network as a stack of one: weights (1, in, out), biases and log_std (1, 1, out).

    Its kind is `ppo`; of discrete actions, whose last layer gives their logits, `ppo-discrete`.
    """
    saved, tensors = model.policy.state_dict(), {}
    hidden = "mlp_extractor.policy_net"  # Linear, Tanh, Linear, Tanh
    for i, layer in enumerate((f"{hidden}.0", f"{hidden}.2", "action_net")):
        weight, bias = saved[f"{layer}.weight"], saved[f"{layer}.bias"]
        tensors |= {f"w{i}": weight.T[None], f"b{i}": bias[None, None]}
    if isinstance(model.action_space, gym.spaces.Discrete):
        save_policies(folder, step, "ppo-discrete", tensors)
    else:
        log_std = {"log_std": saved["log_std"][None, None]}
        save_policies(folder, step, "ppo", log_std | tensors)


def state_tensors(model: PPO) -> dict[str, Tensor]:
    """Everything that learning changes, by name."""
    tensors = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
    return tensors | optimizer_tensors(model.policy.optimizer, "adam")


def restore(model: PPO, tensors: dict[str, Tensor], folder: Path) -> None:
    """The reverse of `state_tensors`. Raises ValueError with one line if they do not fit."""
    weights = {
        name.removeprefix("policy."): value
        for name, value in tensors.items()
        if name.startswith("policy.")
    }
    try:
        model.policy.load_state_dict(weights)
        load_optimizer(model.policy.optimizer, "adam", tensors)
    except (RuntimeError, ValueError):  # names, shapes, moments that do not fit
        raise other_environment(folder) from None


# ------------------------------------------------------------------------------------- training
def train_ppo(
    make_env: Callable[[], gym.Env],
    cfg: PPOConfig,
    seed: Sequence[int],
    folder: Path,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Train one task, or continue from `folder/state.safetensors`; at once if all is done.

    `report(step, mean return of the episodes that ended in the rollout, nan if none)` is called
    after every rollout; a run that continues repeats the reports since its last state. The caller
    sets `torch.set_num_threads(1)`: networks this small gain nothing from more, and their number
    changes the rounding. The global random streams are reseeded. Raises ValueError with one line
    for a state that is damaged or of other settings.
    """
    folder = Path(folder)
    settings = {**asdict(cfg), "seed": [int(number) for number in seed]}
    total = math.ceil(cfg.steps / cfg.n_steps) * cfg.n_steps
    save_every = math.ceil(cfg.save_every / cfg.n_steps) * cfg.n_steps
    tensors, step = read_state(folder, "ppo-state", settings)
    if not tensors:  # policies whose state was deleted would mix two runs
        for path in folder.glob("step-*.safetensors"):
            path.unlink()
    if step >= total:
        return
    env = make_env()
    try:
        model = build(env, cfg, seed)
        if tensors:
            restore(model, tensors, folder)
        while step < total:
            model.set_random_seed(segment_seed(seed, step // cfg.n_steps + 1))
            # learn() starts anew: environment, episodes, schedules (all constant).
            # Weights and moments stay
            model.learn(cfg.n_steps)
            step += cfg.n_steps
            if report:
                returns = [episode["r"] for episode in model.ep_info_buffer or ()]
                report(step, float(np.mean(returns)) if returns else math.nan)
            if step % save_every == 0 or step == total:
                save_policy(folder, model, step)
                save_state(folder, "ppo-state", state_tensors(model), step, settings)
    finally:
        env.close()
