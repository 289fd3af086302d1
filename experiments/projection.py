"""projection.py: how long runs will take, by a short trial of each kind (reproduce.py).

in : runs, as their settings and the steps that they have behind them          out: printed
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
from experiments.runs import in_a_line
from support.distributed import resolve_device
from support.settings import flat
from tools.measuring import random_dataset
from train import draw, make_method, training_step

LONGEST = 20.0  # seconds of steps that a trial measures at most
# whole numbers that change the cost of neither a step nor an episode
NO_SIZE = ("steps", "warmup", "episodes", "play_seed")


@dataclass(frozen=True)
class Trial:
    """Seconds of a training step, and of an episode of all held-out tasks and repeats."""

    step: float
    episode: float

    def __str__(self) -> str:
        return f"{self.step:.3f} s a step, {self.episode:.2f} s an episode"


def project(
    runs: list[tuple[str, Config, int]], steps: int, repeats: int, slots: int | None
) -> None:
    """Print how long runs (title, settings, steps done) will take, by a trial of each size.

    `steps` are the trial's; `slots` runs are done at a time, None: nobody knows.
    """
    alike: dict[tuple, list[tuple[str, Config, int]]] = {}
    for run in runs:
        cfg = run[1]
        alike.setdefault((cfg.data.env, cfg.backbone, sizes(cfg)), []).append(run)
    every = []
    for group in alike.values():
        first, *others = dict.fromkeys(title for title, _, _ in group)
        like_it = f" and {len(others)} like it" if others else ""
        try:
            trial = measure(group[0][1], steps, repeats)
        except Exception as error:  # its run will fail, and be named; the others go on
            print(f"  {first}{like_it}: no trial ({in_a_line(error)})")
            continue
        own = [seconds_of(cfg, done, trial) for _, cfg, done in group]
        each = " to ".join(dict.fromkeys(map(in_words, (min(own), max(own)))))
        print(f"  {first}{like_it}: {trial}; {len(own)} runs of {each}")
        every += own
    if not every:
        return
    total = f"{in_words(sum(every))} of core time"
    if slots:
        # a run uses one core: all of them take at least as long as the longest
        total = f"{in_words(max(max(every), sum(every) / slots))} with {slots} at a time"
    print(f"projected: {total}, at least; collecting data that are missing is not counted")


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


def sizes(cfg: Config) -> tuple[int, ...]:
    """What a trial depends on: runs with equal sizes share one.

    Sizes are the whole numbers among the settings of network, batch and memory, and how many tasks
    are played. Fractions cost nothing, and words and switches (which layers have experts, say) far
    less than a number that is twice as large.
    """
    groups = cfg.method, cfg.model, cfg.training, cfg.play
    values = {name: value for group in groups for name, value in flat(group).items()}
    found = [v for k, v in values.items() if type(v) is int and k not in NO_SIZE]
    return (*found, cfg.data.test_tasks)


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
