"""projection.py: how long runs will take, by a short trial of each kind (reproduce.py).

in : the settings of a run          out: seconds
Nothing of the paper is here. The trial trains an untrained network on data without a meaning, so
that nothing has to be collected first, and plays held-out tasks with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

import collect
from config import Config
from data import read_meta
from evaluate import play
from support.distributed import resolve_device
from tools.measuring import random_dataset
from train import draw, make_method, training_step

LONGEST = 20.0  # seconds of steps that a trial measures at most


@dataclass(frozen=True)
class Trial:
    """Seconds of a training step, and of an episode of all held-out tasks and repeats."""

    step: float
    episode: float

    def __str__(self) -> str:
        return f"{self.step:.3f} s a step, {self.episode:.2f} s an episode"


def measure(cfg: Config, steps: int, repeats: int) -> Trial:
    """So many training steps behind a first one, and two episodes.

    Alone: runs side by side share the memory's speed, and are slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(cfg.run.threads or threads)
    method = make_method(cfg, resolve_device(cfg.run.device))
    data = random_dataset(method.family, cfg.training.prompt_length // method.family.horizon)
    rng = torch.Generator().manual_seed(0)
    method.model.train()
    training_step(method, draw(method, data, rng))  # the first one is slower
    begun, done = time.perf_counter(), 0
    while done < steps and time.perf_counter() - begun < LONGEST:
        training_step(method, draw(method, data, rng))
        done += 1
    a_step = (time.perf_counter() - begun) / done
    policy, tasks = method.policy(cfg.play), held_out(cfg) * repeats
    begun = time.perf_counter()
    play(cfg.data.env, tasks, policy, 2)  # the second one has something to read
    an_episode = (time.perf_counter() - begun) / 2
    torch.set_num_threads(threads)
    return Trial(a_step, an_episode)


def held_out(cfg: Config) -> list:
    """The tasks that a run will be played on. Raises ValueError for data that cannot be."""
    if cfg.training.data:
        return read_meta(cfg.training.data, cfg.data.env)["test_tasks"]
    return collect.split_of(cfg.collection)[1]


def seconds_of(cfg: Config, done: int, trial: Trial) -> float:
    """What is left of a run behind `done` steps: its others, the short evaluations between them,
    and two whole ones, train.py's own at its end and the one with repeats.
    """
    steps, every = cfg.training.steps - done, cfg.run.eval_every
    short = 2 * cfg.run.eval_episodes * (steps // every) if every else 0
    return steps * trial.step + (short + 2 * cfg.play.episodes) * trial.episode


def in_words(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
