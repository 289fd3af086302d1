"""bench.py: how fast is it here? Speeds at the paper's sizes, beside what the machine can do.

    python tools/bench.py                                  a table
    python tools/bench.py --json results/bench.json        and a file
    python tools/bench.py --only ad-darkroom-train --threads 1
    python tools/bench.py --only learn-darkroom-dpt        training time to a return
    python tools/bench.py --only growth                    how cost grows (growth.py)

in : nothing        out: an object a measurement: name, tokens_per_s | seconds | env_steps_per_s |
                         updates_per_s; ceiling_share, peak_gb, threads, torch
Read when you want to make something faster, measuring.py beside it. What is measured is the data
under "what is measured"; which methods and families there are, the functions do not know.

`ceiling_share`: the floating-point operations of the matrix products, attention's included, over
what the machine itself does in the same time when it multiplies two large float32 matrices. Each
measurement has a process of its own, so that `peak_gb`, which holds interpreter and libraries too,
is its own.
"""

from __future__ import annotations

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C should not be a traceback
    from support.stop import at_once

    at_once()

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from config import Run
from envs import get_family, make_batch, make_env, sample_tasks
from evaluate import play
from support.command_line import one_line, preset_config
from support.files import write_atomically
from support.settings import check_types, with_values
from teachers.ppo import PPOConfig, StackedPPO
from teachers.ppo import play as play_ppo
from teachers.sac import Replay, SACConfig, StackedSAC
from tools import growth
from tools.measuring import (
    ceiling,
    episode_behind,
    in_own_process,
    make_method,
    operations_of,
    peak_gb,
    random_actions,
    random_dataset,
    seconds_of,
)
from train import draw, get_data, set_learning_rate, training_step
from train import make_method as make_trained


# -------------------------------------------------------------------------------- training, playing
def training(env: str, backbone: str, rows: int, **changes) -> dict[str, float]:
    """One training step, a batch drawn beforehand."""
    method = make_method(env, backbone, batch=rows, **changes)
    family, settings = method.family, method.cfg.training
    dataset = random_dataset(family, settings.prompt_length // family.horizon)
    batch = method.sample(dataset, rows, settings.draws, torch.Generator().manual_seed(0))
    method.model.train()
    step = partial(training_step, method, batch)
    seconds = seconds_of(step)
    peak = peak_gb()  # before the ceiling's matrices
    share = operations_of(step) / seconds / ceiling()
    tokens = rows * method.tokens()
    return {"tokens_per_s": tokens / seconds, "ceiling_share": share, "peak_gb": peak}


def playing(env: str, backbone: str, tasks: int, history: int, **changes) -> dict[str, float]:
    """An episode of all tasks behind `history` others, the environment left out."""
    method = make_method(env, backbone, **changes)
    fill, play_one = episode_behind(method, tasks, history)
    fill()
    return {"seconds": seconds_of(play_one), "peak_gb": peak_gb()}


# ----------------------------------------------------------------------------------------- learning
def learning(
    env: str, backbone: str, passes: float, seeds: int = 3, every: int = 100, **changes
) -> dict[str, float]:
    """How long the preset `cpu` trains until held-out tasks return more than `passes`.

    Means over the seeds that get there, `passed` of them; what evaluations take is left out. A
    return is that of the last five episodes of an evaluation, looked at after `every` steps.
    """
    found = []
    for seed in range(seeds):
        cfg = replace(preset_config("cpu", env, backbone), seed=seed)
        cfg = with_values(cfg, changes)
        dataset = get_data(cfg)  # collected where it is not there yet
        method = make_trained(cfg, torch.device("cpu"))
        method.state_mean, method.state_std = dataset.state_mean, dataset.state_std
        rng, seconds = torch.Generator().manual_seed(seed + 1), 0.0  # as train.py draws
        for step in range(cfg.training.steps):
            if step and step % every == 0:
                policy, tasks = method.policy(cfg.play), dataset.meta["test_tasks"]
                if play(env, tasks, policy, cfg.play.episodes)[:, -5:].mean() > passes:
                    tokens = step * cfg.training.batch * method.tokens()
                    found.append((seconds, step, tokens))
                    break
            before = time.perf_counter()
            method.model.train()
            set_learning_rate(method, step)
            training_step(method, draw(method, dataset, rng))
            seconds += time.perf_counter() - before
    seconds, steps, tokens = np.mean(found, 0) if found else (np.inf,) * 3
    return {"seconds": seconds, "steps": steps, "tokens": tokens, "passed": len(found)}


# ------------------------------------------------------------------------------------- environments
def stepping(env: str, way: str, rows: int = 20, steps: int = 60) -> dict[str, float]:
    """Steps a second of `rows` tasks with random actions; `threads` alone uses more than a core."""
    tasks = sample_tasks(env, rows, np.random.default_rng(0))
    actions = random_actions(get_family(env), rows).numpy()
    if way == "plain":  # one Gymnasium environment after the other
        envs = [make_env(env, task) for task in tasks]
        for each in envs:
            each.reset(seed=0)

        def step() -> None:
            for each, action in zip(envs, actions, strict=True):
                _, _, _, truncated, _ = each.step(action)
                if truncated:
                    each.reset()
    else:
        options = {"threads": os.cpu_count()} if way == "threads" else {}
        make: Any = get_family(env).batch  # MuJoCo's also take a number of threads
        batch = make(tasks, 0, **options)
        batch.reset()
        step = partial(batch.step, actions)

    seconds = seconds_of(lambda: [step() for _ in range(steps)])
    return {"env_steps_per_s": rows * steps / seconds}


# ---------------------------------------------------------------------------------------------- SAC
# As collection runs it: a process a core, each on one thread.
TASKS, STATE_DIM, ACTION_DIM = 10, 20, 6  # of a stack; Cheetah-Vel's numbers


def sac_stacked(hidden: int) -> tuple[float, float]:
    """(updates, operations) a second of one process with all tasks in one stack."""
    torch.set_num_threads(1)
    cfg = SACConfig(steps=1000, warmup=0, save_every=1000, hidden=hidden)
    agents = StackedSAC(TASKS, STATE_DIM, ACTION_DIM, cfg, seed=0)
    replay, rng = Replay(TASKS, 1000, STATE_DIM, ACTION_DIM), torch.Generator().manual_seed(0)
    for _ in range(1000):
        states, following = torch.randn(2, TASKS, STATE_DIM)
        replay.add(states, torch.rand(TASKS, ACTION_DIM), torch.randn(TASKS), following)

    def update() -> None:
        s, a, r, s2 = replay.sample(cfg.batch, rng)
        agents.update(s, a, r, s2, torch.randn(2, TASKS, cfg.batch, ACTION_DIM, generator=rng))

    seconds = seconds_of(update, at_least=10.0)
    return TASKS / seconds, operations_of(update) / seconds


def sac_sb3(hidden: int) -> tuple[float, float]:
    """The same of stable-baselines3, which trains one task."""
    from stable_baselines3 import SAC

    torch.set_num_threads(1)
    model = SAC(
        "MlpPolicy",
        make_env("cheetah-vel", [1.0]),
        learning_starts=900,
        buffer_size=1000,
        ent_coef=0.2,
        policy_kwargs={"net_arch": [hidden, hidden]},
        device="cpu",
    )
    model.learn(1000)  # fills the buffer
    update = partial(model.train, gradient_steps=1, batch_size=SACConfig.batch)
    seconds = seconds_of(update, at_least=10.0)
    return 1 / seconds, operations_of(update) / seconds


def on_all_cores(way: Callable[[Any], Any], what: Any) -> np.ndarray:
    """The sum of what a process a core measures."""
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        return np.sum(list(pool.map(way, [what] * cores)), axis=0)


def updating(way: Callable[[int], tuple[float, float]], hidden: int) -> dict[str, float]:
    """Updates of SAC a second, summed over processes and tasks."""
    updates, operations = on_all_cores(way, hidden)
    return {"updates_per_s": updates, "ceiling_share": operations / ceiling()}


def ppo_stacked(env: str) -> float:
    """Environment steps a second of one process, played and learnt from; Table 3's settings."""
    torch.set_num_threads(1)
    batch = make_batch(env, sample_tasks(env, TASKS, np.random.default_rng(0)))
    agents, rng = StackedPPO(TASKS, batch.family, PPOConfig(1), 0), torch.Generator().manual_seed(0)

    def segment() -> None:
        agents.learn(play_ppo(batch, agents, rng)[0], rng)

    return TASKS * agents.cfg.n_steps / seconds_of(segment, at_least=10.0)


def ppo_sb3(env: str) -> float:
    """The same of stable-baselines3, which trains one task."""
    from stable_baselines3 import PPO

    torch.set_num_threads(1)
    (task,) = sample_tasks(env, 1, np.random.default_rng(0))
    model = PPO("MlpPolicy", make_env(env, task), device="cpu")
    return model.n_steps / seconds_of(lambda: model.learn(model.n_steps), at_least=10.0)


def teaching(way: Callable[[str], float], env: str) -> dict[str, float]:
    """Steps of PPO a second, summed over processes and tasks."""
    return {"env_steps_per_s": float(on_all_cores(way, env))}


# --------------------------------------------------------------------------------- what is measured
# Batches: those with which published timings of the official code were made, on two cores.
TRAINED = [  # method, family, rows of a batch, what differs from the paper
    ("ad", "darkroom", 8, {}),
    ("ad", "darkroom", 8, {"routing": "prefix"}),
    ("ad", "darkroom", 8, {"moe": "none"}),
    ("dpt", "darkroom", 32, {}),
    ("dpt", "darkroom", 32, {"moe": "none"}),
    ("ad", "point-robot", 32, {}),
    ("dpt", "point-robot", 32, {}),
    ("ad", "cheetah-vel", 4, {}),
    ("dpt", "cheetah-vel", 32, {}),
    ("dpt", "reach", 8, {"preset": "cpu"}),  # prompts of three --independent episodes
    ("dpt", "reach", 8, {"preset": "cpu", "independent": False}),
]
PLAYED = [  # method, family, tasks, episodes of history, what differs from the paper
    ("ad", "darkroom", 20, 4, {"routing": "prefix"}),
]
STEPPED = [  # family, ways to step many tasks
    ("point-robot", ("plain", "batched")),
    ("cheetah-vel", ("plain", "batched", "threads")),
    ("walker-param", ("plain", "batched", "threads")),
    ("reach", ("plain", "batched")),
    ("push", ("plain", "batched")),
]
LEARNED = [("dpt", "darkroom", 70.0), ("ad", "darkroom", 70.0)]  # only when named: many minutes
UPDATED = [("stacked", sac_stacked), ("sb3", sac_sb3)]
TAUGHT = [("stacked", ppo_stacked), ("sb3", ppo_sb3)]


def measurements() -> dict[str, Callable[[], dict[str, float]]]:
    """All there are, by name."""
    named: dict[str, Callable[[], dict[str, float]]] = {}
    for backbone, env, rows, changes in TRAINED:
        name = "-".join([backbone, env, "train", *map(str, changes.values())])
        named[name] = partial(training, env, backbone, rows, **changes)
    for backbone, env, tasks, history, changes in PLAYED:
        name = f"{backbone}-{env}-eval-episode"
        named[name] = partial(playing, env, backbone, tasks, history, **changes)
    for env, ways in STEPPED:
        named |= {f"env-{env}-{way}": partial(stepping, env, way) for way in ways}
    for hidden in (128, 256):
        named |= {f"sac-{hidden}-{name}": partial(updating, way, hidden) for name, way in UPDATED}
    for env in ("reach", "push"):
        named |= {f"ppo-{env}-{name}": partial(teaching, way, env) for name, way in TAUGHT}
    for backbone, env, passes in LEARNED:
        named[f"learn-{env}-{backbone}"] = partial(learning, env, backbone, passes)
    return named


def measure(name: str, threads: int) -> dict:
    """One measurement, in the process that was made for it."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    numbers = {key: float(f"{value:.4g}") for key, value in measurements()[name]().items()}
    return {"name": name, **numbers, "threads": threads, "torch": torch.__version__}


def chosen(only: str | None) -> list[str]:
    """Names of what --only asks for. Raises ValueError for what is no name and begins none."""
    names = [*measurements(), *growth.NAMES]
    if only is None:
        return [name for name in names if not name.startswith(("learn-", "growth-"))]
    if only in names:  # also where it begins others: ad-darkroom-train
        return [only]
    found = [name for name in names if name.startswith(f"{only}-")]
    if not found:
        raise ValueError(f"unknown measurement '{only}': choose one of {', '.join(names)}")
    return found


def bench(
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None,
    only: str | None = None,
    threads: int = 0,
) -> None:
    """Measure and print.

    Args:
        json_file: also write the measurements to this file.
        only: the name of one measurement, or what several names begin with, up to a hyphen;
            learn-darkroom-dpt and -ad and those of growth are made only so.
        threads: CPU threads; 0: all cores.
    """
    names = chosen(only)
    check_types(Run(threads=threads))
    if json_file:  # before the measurements, which take minutes
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        if Path(json_file).is_dir():
            raise ValueError(f"--json {json_file} is a folder")
    rows, known, threads = [], {}, threads or os.cpu_count() or 1
    for name in names:
        if name in growth.NAMES:
            row = growth.grow(name, threads, known)
            text = growth.line(row)
        else:
            row = in_own_process(measure, name, threads)
            values = [f"{key} {value:g}" for key, value in row.items() if isinstance(value, float)]
            text = f"{name:<32}" + "   ".join(values)
        rows.append(row)
        print(text, flush=True)
    if json_file:
        text = json.dumps(rows, indent=1) + "\n"
        write_atomically(Path(json_file), lambda path: path.write_text(text))


if __name__ == "__main__":
    one_line(lambda: tyro.cli(bench), "what is printed stands")
