"""growth.py: how does cost grow? One size is doubled alone, again and again.

    python -m tools.bench --only growth                    all of it, minutes
    python -m tools.bench --only growth-ad                 of one method
    python -m tools.bench --only growth-ad-experts         of one size

in : nothing        out: an object a size: its values; seconds, gb: what each took; the exponents
Read after bench.py, whose command runs it.

A cost that grows as size^p is a line of slope p where both axes are logarithms: the exponent here
is the slope of the least-squares line through the points. Beside it stands the largest that the
method needs; one that is clearly larger is work done in vain. A smaller one is fine: where sizes
are small, what does not grow (Python, the smaller products' overhead) takes its share.

    seconds   the fastest of a few repetitions: whatever else runs can only add to them. Threads
              wait for one another on a busy machine: there, --threads 1
    gb        the most that the process had, above what it had before: every point has a process of
              its own, which first does the same work at the smallest sizes, so that libraries are
              loaded and threads are there. Weights, gradients and moments count, as in use.

Base: DarkRoom's preset `cpu`, smaller where a step would take seconds. The environment is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch

from methods import Method
from support.files import progress
from tools.measuring import (
    episode_behind,
    in_own_process,
    make_method,
    peak_gb,
    random_dataset,
)
from train import training_step


# --------------------------------------------------------------------------------- what is measured
@dataclass(frozen=True)
class Point:
    """The sizes of one measurement; all but NO_SETTINGS are settings, by their names."""

    backbone: str
    prompt_length: int  # steps of a training prompt, three tokens each
    batch: int  # prompts of a training step
    width: int = 64
    token_experts: int = 6
    token_hidden: int = 768  # of all token experts together
    task_experts: int = 8
    task_hidden: int = 1024
    tasks: int = 16  # held-out tasks played at once
    memory: int = 2  # finished episodes in the context: AD's `history`, all of DPT's `prompt=all`


@dataclass(frozen=True)
class Factor:
    """What is doubled together, what is timed, and the exponents that the method needs at most."""

    work: Literal["train", "play"]
    names: tuple[str, ...]  # of Point's fields
    seconds: float
    gb: float


NO_SETTINGS = ("backbone", "tasks", "memory")  # of Point
TIMES = (1, 2, 4)  # the base, doubled, doubled again
BASES = {
    "ad": Point("ad", prompt_length=200, batch=6),  # 3600 tokens
    "dpt": Point("dpt", prompt_length=100, batch=12),  # 3792 tokens, 16 queries a prompt included
}
# As many hidden units an expert, so that the k which a token keeps are as much work as before.
EXPERTS = ("token_experts", "token_hidden", "task_experts", "task_hidden")
FACTORS = {
    # Attention compares every token with all before it (its memory does not grow so: the kernel
    # never holds all scores); everything else looks at a token once.
    "prompt": Factor("train", ("prompt_length",), seconds=2, gb=1),
    "batch": Factor("train", ("batch",), seconds=1, gb=1),  # rows know nothing of one another
    # A matrix D x D, of attention; experts and feed-forward layers, D x hidden, grow linearly.
    "width": Factor("train", ("width",), seconds=2, gb=1),
    # The point of sparse experts. What does grow with all weights, the optimiser's step and the
    # memory for them, is small beside a batch; in play there is not even that.
    "experts": Factor("train", EXPERTS, seconds=0, gb=0),
    "tasks": Factor("play", ("tasks",), seconds=1, gb=1),
    # Attention again: AD reads its sorted history anew at the start of each episode.
    "memory": Factor("play", ("memory",), seconds=2, gb=1),
    "play-width": Factor("play", ("width",), seconds=2, gb=1),
    "play-experts": Factor("play", EXPERTS, seconds=0, gb=0),
}
NAMES = {f"growth-{b}-{f}": (b, f) for b in BASES for f in FACTORS}  # what --only takes


def points(backbone: str, factor: str) -> list[Point]:
    """The base, then one size of it doubled again and again."""
    base, what = BASES[backbone], FACTORS[factor]
    return [
        replace(base, **{name: times * getattr(base, name) for name in what.names})
        for times in TIMES
    ]


# ------------------------------------------------------------------------------- how it is measured
def method_of(point: Point) -> Method:
    """DarkRoom's preset `cpu` at these sizes, untrained."""
    sizes = {name: size for name, size in asdict(point).items() if name not in NO_SETTINGS}
    # Episodes in memory: a setting of AD; DPT remembers all that it is shown, where it may.
    memory = {"history": point.memory, "prompt": "all"}
    return make_method("darkroom", point.backbone, "cpu", **sizes, **memory)


def training(point: Point) -> Callable[[], float]:
    """A call makes a training step, on a batch drawn beforehand, and returns its seconds."""
    method = method_of(point)
    dataset = random_dataset(method.family, point.prompt_length // method.family.horizon)
    draws = method.cfg.training.draws
    batch = method.sample(dataset, point.batch, draws, torch.Generator().manual_seed(0))
    method.model.train()

    def step() -> float:
        before = time.perf_counter()
        training_step(method, batch)
        return time.perf_counter() - before

    return step


def playing(point: Point) -> Callable[[], float]:
    """A call plays an episode of all tasks with a full memory and returns its seconds."""
    method = method_of(point)
    fill, play = episode_behind(method, point.tasks, point.memory)

    def episode() -> float:
        fill()
        before = time.perf_counter()
        play()
        return time.perf_counter() - before

    return episode


WORK = {"train": training, "play": playing}


def fastest(work: Callable[[], float], at_least: float = 2.0) -> float:
    """The least that a call says it took, of three or of as many as fill `at_least` seconds."""
    work()  # the first fills caches and makes the optimiser's moments
    until, found = time.perf_counter() + at_least, []
    while len(found) < 3 or time.perf_counter() < until:
        found.append(work())
    return min(found)


def cost(point: Point, kind: Literal["train", "play"], threads: int) -> tuple[float, float]:
    """(seconds, gb) of one point, in the process that was made for it."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    WORK[kind](replace(point, prompt_length=100, batch=2, width=16, tasks=2, memory=1))()
    before = peak_gb()
    seconds = fastest(WORK[kind](point))
    return seconds, max(peak_gb() - before, 4e-6)  # a page at least: 0 has no logarithm


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """p of costs = c * sizes^p: the slope of the least-squares line through their logarithms.

    Raises ValueError for anything that has no such line: a single size, a cost of 0.
    """
    if len(set(sizes)) < 2 or min(*sizes, *costs) <= 0:
        raise ValueError(f"no exponent fits sizes {list(sizes)} and costs {list(costs)}")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def grow(name: str, threads: int, known: dict) -> dict:
    """The row of one of NAMES, on so many threads.

    `known`: what other rows have measured, which this one adds to: all of a method share its base.
    """
    backbone, factor = NAMES[name]
    what = FACTORS[factor]
    asked = [(point, what.work, threads) for point in points(backbone, factor)]
    for each in progress(asked, desc=name, unit="point", leave=False):
        if each not in known:
            known[each] = in_own_process(cost, *each)
    seconds, gb = ([float(f"{known[each][i]:.4g}") for each in asked] for i in (0, 1))
    return {
        "name": name,
        "of": "training step" if what.work == "train" else "evaluation episode",
        "doubled": list(what.names),
        "values": [getattr(point, what.names[0]) for point, *_ in asked],
        "seconds": seconds,
        "seconds_exponent": round(exponent(TIMES, seconds), 2),
        "seconds_needed": what.seconds,
        "gb": gb,
        "gb_exponent": round(exponent(TIMES, gb), 2),
        "gb_needed": what.gb,
        "threads": threads,
        "torch": torch.__version__,
    }


def line(row: dict) -> str:
    """A row of `grow` for people: what was doubled, then (exponent, the most that is needed)."""
    parts = [f"{row['name']:<24}" + f"{' '.join(map(str, row['values'])):<12}"]
    for unit, name in (("s", "seconds"), ("GB", "gb")):
        costs = " ".join(f"{cost:.3g}" for cost in row[name])
        parts.append(f"{costs + ' ' + unit:<22}")
        parts.append(f"^{row[name + '_exponent']:<5.2f} (needs {row[name + '_needed']})")
    return "  ".join(parts)
