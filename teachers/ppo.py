"""ppo.py: the teacher of one Reach or Push task by PPO (paper App. D.2, Table 3).

in : an environment of one task, settings, seed        out: policies, one per 2048 steps, and a state
Read after envs.py; stable-baselines3 has the algorithm (MlpPolicy: two tanh layers of 64 each for policy and value).

    step-0000002048.safetensors   the policy alone, a stack of one: x @ w0 + b0, tanh, ... -> mean; log_std
    state.safetensors             policy and value network, Adam's moments, step: what training continues from

Training is a sequence of segments: one rollout of `n_steps` and its epochs. Each begins with weights and moments
alone: the environment is reset and every random stream (torch, numpy, Python, environment, action space) is seeded
by (seed, number of the segment). A run that continues from its latest state is therefore the uninterrupted one, bit
for bit, without a pickled environment or generator. The environment must forget everything in `reset(seed=...)`.

Differs from stable-baselines3 (and so, presumably, from the paper): an episode is cut at the end of a rollout,
bootstrapped by the value of its last state, and not played on in the next one; that is what the segments cost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from torch import Tensor

from support.files import load_tensors, save_tensors

STATE = "state.safetensors"
FORMAT = "1"


@dataclass(frozen=True)
class PPOConfig:
    """Table 3; everything else is stable-baselines3's default."""

    steps: int  # of the environment: Reach 400k, Push 1M; rounded up to whole rollouts, as stable-baselines3 does
    n_steps: int = 2048
    batch: int = 64
    epochs: int = 10
    lr: float = 3e-4
    gamma: float = 0.99
    save_every: int = 2048  # rounded up to whole rollouts


def stream(seed: Sequence[int], segment: int) -> int:
    """The seed of one segment; segment 0 draws the first weights."""
    return int(np.random.SeedSequence([*seed, segment]).generate_state(1)[0])


def build(env: gym.Env, cfg: PPOConfig, seed: Sequence[int]) -> PPO:
    """The untrained model."""
    rest = {
        "n_steps": cfg.n_steps,
        "batch_size": cfg.batch,
        "n_epochs": cfg.epochs,
        "gamma": cfg.gamma,
    }
    model = PPO("MlpPolicy", env, cfg.lr, **rest, seed=stream(seed, 0), device="cpu", verbose=0)
    model.set_logger(Logger(None, []))  # the default one makes a temporary folder in every learn()
    return model


def save_policy(folder: Path, model: PPO, step: int) -> None:
    """The policy network as a stack of one; weights (1, in, out), biases and log_std (1, 1, out)."""
    net = model.policy
    tensors = {"log_std": net.log_std[None, None]}
    for i, layer in enumerate(
        (net.mlp_extractor.policy_net[0], net.mlp_extractor.policy_net[2], net.action_net)
    ):
        tensors |= {f"w{i}": layer.weight.T[None], f"b{i}": layer.bias[None, None]}
    path, about = (
        folder / f"step-{step:010d}.safetensors",
        {"t2mir": FORMAT, "kind": "ppo", "step": str(step)},
    )
    save_tensors(path, tensors, about)


def save_state(folder: Path, model: PPO, step: int, settings: dict) -> None:
    tensors = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
    for index, moments in model.policy.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in moments.items()}
    about = {
        "t2mir": FORMAT,
        "kind": "ppo-state",
        "step": str(step),
        "settings": json.dumps(settings),
    }
    save_tensors(folder / STATE, tensors, about)


def read_state(path: Path, settings: dict) -> tuple[dict[str, Tensor], int]:
    """Tensors and step. Raises ValueError with one line for a damaged file and for one of other settings."""
    again = "delete it to train this task anew"
    try:
        tensors, about = load_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}: {again}") from None
    if (about.get("t2mir"), about.get("kind")) != (FORMAT, "ppo-state"):
        raise ValueError(f"{path} is no PPO state of format {FORMAT}: {again}")
    saved = json.loads(about["settings"])
    other = ", ".join(name for name in settings if saved.get(name) != settings[name])
    if other:
        raise ValueError(f"{path} is of other settings ({other}): {again}")
    return tensors, int(about["step"])


def restore(model: PPO, tensors: dict[str, Tensor], path: Path) -> None:
    """Weights and moments of `read_state` into the model. Raises ValueError with one line if they do not fit."""
    weights = {
        name.removeprefix("policy."): v for name, v in tensors.items() if name.startswith("policy.")
    }
    try:
        model.policy.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(
            f"{path} is of another environment: delete it to train this task anew"
        ) from None
    adam, keys = model.policy.optimizer, ("step", "exp_avg", "exp_avg_sq")
    count = len(list(model.policy.parameters()))
    moments = {i: {key: tensors[f"adam.{i}.{key}"].clone() for key in keys} for i in range(count)}
    adam.load_state_dict({**adam.state_dict(), "state": moments})


def train_ppo(
    make_env: Callable[[], gym.Env],
    cfg: PPOConfig,
    seed: Sequence[int],
    folder: Path,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Train one task, or continue from `folder/state.safetensors`; returns at once when all steps are done.

    `report(step, mean return of the episodes that ended in the rollout, nan if none)` is called after every
    rollout; a run that continues repeats the reports since its last state. The caller sets `torch.set_num_threads(1)`:
    networks this small gain nothing from more, and their number changes the rounding. The global random streams are
    reseeded. Raises ValueError with one line for a state that is damaged or of other settings.
    """
    folder, tensors, step = Path(folder), None, 0
    settings = {**asdict(cfg), "seed": [int(number) for number in seed]}
    total, save_every = (
        math.ceil(n / cfg.n_steps) * cfg.n_steps for n in (cfg.steps, cfg.save_every)
    )
    if (folder / STATE).exists():
        tensors, step = read_state(folder / STATE, settings)
    else:  # policies whose state was deleted would mix two runs
        for path in folder.glob("step-*.safetensors"):
            path.unlink()
    if step >= total:
        return
    env = make_env()
    try:
        model = build(env, cfg, seed)
        if tensors:
            restore(model, tensors, folder / STATE)
        while step < total:
            model.set_random_seed(stream(seed, step // cfg.n_steps + 1))
            # learn() starts anew: environment, episodes, schedules (all constant). Weights and moments stay
            model.learn(cfg.n_steps, log_interval=None)
            step += cfg.n_steps
            if report:
                returns = [episode["r"] for episode in model.ep_info_buffer]
                report(step, float(np.mean(returns)) if returns else math.nan)
            if step % save_every == 0 or step == total:
                save_policy(folder, model, step)
                save_state(folder, model, step, settings)
    finally:
        env.close()
