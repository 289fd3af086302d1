"""bench.py: how fast is it here? Speeds at the paper's sizes, beside what the machine can do.

    python bench.py                          a table
    python bench.py --json results/bench.json
    python bench.py --only ad-darkroom-train --threads 1

in : nothing        out: one object a measurement: name, tokens_per_s | seconds | env_steps_per_s | updates_per_s,
                         ceiling_share, peak_gb, threads, torch
`ceiling_share` is the share of the machine's own float32 matrix-product rate, measured in the same process,
that the products of the step (attention's causal half included, nothing else counted) amount to. Every
measurement runs in a process of its own, so `peak_gb` is its peak, interpreter and libraries included.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro

from config import Config, preset_values
from data import ADBatch, DPTBatch, Prompt
from envs import FAMILIES, get_family, make_batch, make_env, sample_tasks
from evaluate import play
from models import T2MIR, ModelConfig
from moe import Experts
from policies import ADPolicy
from router import Routing, eq1_top_k_gate
from support.files import write_atomically
from teachers.sac import Replay, SACConfig, StackedSAC, train_sac
from train import imitation_loss, make_optimizer

# the batches that published timings of the official code used on a machine of two cores
BATCH = {
    ("darkroom", "ad"): 8, ("darkroom", "dpt"): 32, ("point-robot", "ad"): 32, ("point-robot", "dpt"): 32,
    ("cheetah-vel", "ad"): 4, ("cheetah-vel", "dpt"): 32,
}  # fmt: skip


def timed(work, repeats: int = 5, warm: int = 2) -> float:
    """Median seconds of a call."""
    for _ in range(warm):
        work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def ceiling() -> float:
    """The machine's float32 matrix-product rate in FLOP/s."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / timed(lambda: a @ b, 7)


def step_flops(cfg: ModelConfig, batch: int, tokens: int, read: int) -> float:
    """Products of one training step (forward, and twice that backward); `read` tokens pass the top block's end."""
    d, attention = (
        cfg.width,
        4 * cfg.width**2 + tokens * cfg.width,
    )  # projections; q k^T and p v, causal half
    plain = 2 * d * cfg.ff
    out = d // 2 if cfg.moe == "both" else d
    experts = 0
    if cfg.moe in ("both", "token"):
        experts += cfg.top_k * cfg.token_hidden // cfg.token_experts * (d + out)
    if cfg.moe in ("both", "task"):
        experts += cfg.top_k * cfg.task_hidden // cfg.task_experts * (d + out)
    if cfg.moe == "none":
        experts = 3 * d * cfg.ff
    products = tokens * (cfg.layers * attention + (cfg.layers - 1) * plain) + read * experts
    return 2.0 * 3 * batch * products


def paper(env: str, backbone: str, **changes) -> Config:
    return Config(
        env=env,
        backbone=backbone,
        preset="paper",
        **{**preset_values("paper", env, backbone), **changes},
    )


def random_batch(cfg: Config, batch: int) -> ADBatch | DPTBatch:
    n, model = cfg.prompt_length, cfg.model()

    def states(*shape: int) -> torch.Tensor:
        return (
            torch.randint(10, (*shape, 2))
            if model.state_values
            else torch.randn(*shape, model.state_dim)
        )

    def actions(*shape: int) -> torch.Tensor:
        return (
            torch.randint(5, shape)
            if model.discrete_actions
            else 2 * torch.rand(*shape, model.action_dim) - 1
        )

    prompt = Prompt(states(batch, n), actions(batch, n), (torch.rand(batch, n) < 0.3).float())
    task = torch.arange(batch // 2).repeat_interleave(2)
    if cfg.backbone == "ad":
        return ADBatch(prompt, task)
    return DPTBatch(prompt, task, states(batch, 1), actions(batch, 1), torch.full((batch, 1), n))


def train_step(env: str, backbone: str, **changes) -> dict:
    """One optimiser step as train.py does it."""
    cfg, rows = paper(env, backbone, **changes), BATCH[env, backbone]
    model = T2MIR(cfg.model())
    optimizer, batch = make_optimizer(model, cfg), random_batch(cfg, rows)

    def step() -> None:
        output = model(batch)
        imitation = imitation_loss(output, batch, model.cfg.discrete_actions)
        loss = imitation + output.balance + cfg.w_contrastive * output.contrastive
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        model.update_key_router(cfg.momentum)

    seconds = timed(step)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # before the ceiling's matrices
    tokens = 3 * cfg.prompt_length + (backbone == "dpt")
    read = cfg.prompt_length + (backbone == "dpt")
    share = step_flops(cfg.model(), rows, tokens, read) / seconds / ceiling()
    return {"tokens_per_s": rows * tokens / seconds, "ceiling_share": share, "peak_gb": peak}


def evaluation_episode() -> dict:
    """Algorithm 2 at paper size: 20 tasks, an episode of 100 steps behind a history of 4."""
    cfg = paper("darkroom", "ad", routing="prefix")
    policy = ADPolicy(T2MIR(cfg.model()), keep=4)
    tasks = [[i % 10, i // 2] for i in range(20)]
    play(
        "darkroom", tasks, policy, 5
    )  # fills the history; the fifth episode already has four behind it
    history = [
        Prompt(torch.randint(10, (20, 100, 2)), torch.randint(5, (20, 100)), torch.zeros(20, 100))
    ]

    def episode() -> None:
        with torch.inference_mode():
            policy.begin(history, 20)
            states = torch.zeros(20, 2, dtype=torch.int64)
            for _ in range(100):
                policy.observe(states, policy.act(states), torch.zeros(20))

    return {
        "seconds": timed(episode, 3, 1),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


# -------------------------------------------------------- how tokens reach experts: the candidates for moe.py
def by_dense(experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Every expert on every token, weighted by the gates."""
    hidden = F.gelu(torch.einsum("nd,kdf->knf", x, experts.w1) + experts.b1[:, None])
    y = torch.einsum("knf,kfo->nko", hidden, experts.w2) + experts.b2
    gates = x.new_zeros(len(x), len(experts.w1)).scatter(1, routing.index, routing.weight)
    return (gates[..., None] * y).sum(1)


def by_mask(experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """A loop over experts, each looking for its own tokens: the obvious way."""
    y = x.new_zeros(len(x), experts.w2.shape[-1])
    for i in range(len(experts.w1)):
        token, slot = torch.where(routing.index == i)
        y = y.index_add(0, token, experts.one(i, x[token]) * routing.weight[token, slot, None])
    return y


def by_grouped(experts: Experts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """torch's grouped matrix product over tokens sorted by expert."""
    k, chosen = routing.index.shape[1], routing.index.flatten()
    order = chosen.argsort(stable=True)
    ends = torch.bincount(chosen, minlength=len(experts.w1)).cumsum(0).int()
    expert, token = chosen[order], order // k
    hidden = F.gelu(F.grouped_mm(x[token], experts.w1, offs=ends) + experts.b1[expert])
    y = (
        F.grouped_mm(hidden, experts.w2, offs=ends) + experts.b2[expert]
    ) * routing.weight.flatten()[order, None]
    return y.new_zeros(len(x), y.shape[-1]).index_add(0, token, y)


def dispatch(way: str) -> dict:
    """Forward and backward of the token-wise MoE of DarkRoom-AD at its 3200 state tokens."""
    torch.manual_seed(0)
    experts, x = Experts(6, 64, 128, 32), torch.randn(3200, 64, requires_grad=True)
    routing = eq1_top_k_gate(torch.randn(3200, 6), 2)
    call = {"sorted": Experts.tokens, "dense": by_dense, "mask": by_mask, "grouped": by_grouped}[
        way
    ]
    torch.testing.assert_close(call(experts, x, routing), Experts.tokens(experts, x, routing))
    return {"seconds": timed(lambda: call(experts, x, routing).sum().backward(), 20, 5)}


# ------------------------------------------------------------------------------ environments and experts
def env_steps(env: str, way: str, rows: int = 20, steps: int = 60) -> dict:
    """Steps a second of `rows` tasks with random actions, on one core (but for `threads` and `processes`)."""
    tasks = sample_tasks(env, rows, np.random.default_rng(0))
    actions = (
        np.random.default_rng(0)
        .uniform(-1, 1, (rows, get_family(env).action_dim))
        .astype(np.float32)
    )
    if way == "plain":
        envs = [make_env(env, task) for task in tasks]
        for each in envs:
            each.reset(seed=0)

        def step() -> None:
            for each, action in zip(envs, actions, strict=True):
                _, _, _, ended, _ = each.step(action)
                if ended:
                    each.reset()
    elif way in ("sync", "async"):
        kind = gym.vector.SyncVectorEnv if way == "sync" else gym.vector.AsyncVectorEnv
        envs = kind([partial(make_env, env, task) for task in tasks])
        envs.reset(seed=0)

        def step() -> None:
            envs.step(actions)
    else:
        options = {"threads": os.cpu_count()} if way == "threads" else {}
        envs = type(make_batch(env, tasks[:1]))(tasks, 0, **options)
        envs.reset()

        def step() -> None:
            envs.step(actions)

    seconds = timed(lambda: [step() for _ in range(steps)], 5, 1)
    if way in ("sync", "async"):
        envs.close()
    return {"env_steps_per_s": rows * steps / seconds}


def sac_flops(hidden: int, batch: int) -> float:
    """Products of the middle layers in one update of one task: a forward pass counts one, a whole backward pass two,
    one that goes through to the input alone one: 1 + 2 for the goal, 2 * 3 for the critics, 3 + 2 * 2 for the actor.
    """
    return 16 * 2.0 * batch * hidden**2


def sac_stacked(job: tuple[int, int]) -> float:
    """Updates a second, summed over ten tasks, of one process."""
    hidden, seconds = job
    torch.set_num_threads(1)
    cfg = SACConfig(1000, 0, 1000, hidden=hidden)
    agents, rng = StackedSAC(10, 20, 6, cfg, 0), torch.Generator().manual_seed(0)
    replay = Replay(10, 1000, 20, 6)
    for _ in range(1000):
        replay.add(torch.randn(10, 20), torch.rand(10, 6), torch.randn(10), torch.randn(10, 20))

    def update() -> None:
        noise = torch.randn(2, 10, cfg.batch, 6, generator=rng)
        agents.update(*replay.sample(cfg.batch, rng), noise)

    return 10 * rate(update, seconds)


def sac_sb3(job: tuple[int, int]) -> float:
    """Updates a second of one process of stable-baselines3 with the same sizes."""
    from stable_baselines3 import SAC

    hidden, seconds = job
    torch.set_num_threads(1)
    options = {
        "learning_starts": 900,
        "buffer_size": 1000,
        "ent_coef": 0.2,
        "policy_kwargs": {"net_arch": [hidden] * 2},
    }
    model = SAC("MlpPolicy", make_env("cheetah-vel", [1.0]), device="cpu", **options)
    model.learn(1000)
    return 10 * rate(lambda: model.train(10, 256), seconds)


def rate(work, seconds: float) -> float:
    """Calls a second."""
    work()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        calls += 1
    return calls / (time.perf_counter() - start)


def sac_updates(way, hidden: int) -> dict:
    """A process on every core, as collection runs them."""
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        updates = sum(pool.map(way, [(hidden, 10)] * cores))
    return {"updates_per_s": updates, "ceiling_share": updates * sac_flops(hidden, 256) / ceiling()}


CURVE = SACConfig(
    2000, 100, 20, hidden=64, replay=2000
)  # Table 2's Point-Robot, with narrower networks
GOALS = [[0.8, 0.6], [-0.5, 0.9], [0.3, -0.7], [-0.9, -0.4], [0.0, 1.0]]


def curve(returns: np.ndarray) -> dict:
    """(runs, episodes) to the mean return of the ten episodes before steps 500, 1000 and 2000."""
    return {
        f"return_{step}": float(returns[:, step // 20 - 10 : step // 20].mean())
        for step in (500, 1000, 2000)
    }


def sac_curve_stacked() -> dict:
    """Training returns of stacked SAC on five goals, three seeds each, all in one stack."""
    batch, rewards = make_batch("point-robot", GOALS * 3), []
    step = batch.step

    def watched(actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        states, reward = step(actions)
        rewards.append(reward)
        return states, reward

    batch.step = watched
    with tempfile.TemporaryDirectory() as folder:
        train_sac(batch, CURVE, (0, 0), Path(folder))
    returns = np.stack(rewards, 1).reshape(len(GOALS) * 3, -1, batch.spec.horizon).sum(-1)
    return curve(returns) | spread(returns)


def sac_curve_sb3() -> dict:
    """The same by stable-baselines3, one run after the other."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.monitor import Monitor

    returns = []
    for seed in range(3):
        for goal in GOALS:
            env = Monitor(make_env("point-robot", goal))
            options = {
                "learning_starts": CURVE.warmup,
                "buffer_size": CURVE.replay,
                "ent_coef": CURVE.alpha,
            }
            net = {"net_arch": [CURVE.hidden] * 2}
            SAC("MlpPolicy", env, policy_kwargs=net, seed=seed, device="cpu", **options).learn(
                CURVE.steps
            )
            returns.append(env.get_episode_rewards())
    return curve(np.array(returns)) | spread(np.array(returns))


def spread(returns: np.ndarray) -> dict:
    """The deviation over three seeds of the mean over goals, at the end: (3 * goals, episodes)."""
    last = returns[:, -10:].mean(1).reshape(3, -1).mean(1)
    return {"seed_deviation": float(last.std(ddof=1))}


CONTINUOUS = [
    name
    for name, spec in FAMILIES.items()
    if spec.state_values is None and name != "cheetah-vel-3cluster"
]
MEASUREMENTS = {
    **{f"{b}-{env}-train": partial(train_step, env, b) for env, b in BATCH},
    "ad-darkroom-train-prefix": partial(train_step, "darkroom", "ad", routing="prefix"),
    **{
        f"{b}-darkroom-train-none": partial(train_step, "darkroom", b, moe="none")
        for b in ("ad", "dpt")
    },
    "ad-darkroom-eval-episode": evaluation_episode,
    **{f"dispatch-{way}": partial(dispatch, way) for way in ("sorted", "dense", "mask", "grouped")},
    **{
        f"env-{env}-{way}": partial(env_steps, env, way)
        for env in CONTINUOUS
        for way in ("plain", "batched")
    },
    **{
        f"env-{env}-{way}": partial(env_steps, env, way)
        for env in ("cheetah-vel", "walker-param")
        for way in ("sync", "async", "threads")
    },
    **{f"sac-{hidden}-stacked": partial(sac_updates, sac_stacked, hidden) for hidden in (128, 256)},
    "sac-curve-stacked": sac_curve_stacked,
    "sac-curve-sb3": sac_curve_sb3,
    **{f"sac-{hidden}-sb3": partial(sac_updates, sac_sb3, hidden) for hidden in (128, 256)},
}


def measure(job: tuple[str, int]) -> dict:
    name, threads = job
    torch.set_num_threads(threads)
    found = MEASUREMENTS[name]()
    return {"name": name, **found, "threads": threads, "torch": torch.__version__}


def main(
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None,
    only: str | None = None,
    threads: int = 0,
) -> None:
    """Measure and print.

    Args:
        json_file: also write the measurements to this file.
        only: the name of one measurement.
        threads: CPU threads; 0: all cores.
    """
    if only is not None and only not in MEASUREMENTS:
        raise ValueError(f"unknown measurement '{only}': choose one of {', '.join(MEASUREMENTS)}")
    found = []
    for name in [only] if only else MEASUREMENTS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(measure, (name, threads or os.cpu_count() or 1)).result())
        values = [f"{k} {v:.4g}" for k, v in found[-1].items() if isinstance(v, float)]
        print(f"{name:<28}" + "   ".join(values), flush=True)
    if json_file:
        rounded = [
            {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
            for row in found
        ]
        write_atomically(
            Path(json_file), lambda path: path.write_text(json.dumps(rounded, indent=1) + "\n")
        )


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
