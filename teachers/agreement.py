"""agreement.py: how alike neighbouring tasks' teachers act (FINDINGS.md, "Teachers that agree").

in : the settings of a dataset (config.Collection), trained or found      out: one line of numbers
Read after teachers.py. Not the paper's: it says whether there is anything to imitate in a task that
was never trained on.

    python -m teachers.agreement --env point-robot --teacher each

For every training task, with each task's best checkpoint and its mean actions:

    near     how far the nearest other task's actions are from its own, on states of both
    far      the same for any other task: what a difference can be at all
    between  the return when it is played with the mean action of the two nearest other tasks: what
             somebody gets who has learnt from neighbours and knows which task it is

Differences are roots of mean squares over states and numbers of an action (each in [-1, 1]).
Shapes: N tasks, T steps, ds/da numbers of a state/an action.
"""

from __future__ import annotations

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C should not be a traceback
    import sys

    if sys.path[0].endswith("teachers"):  # by its path: `teachers` would be teachers.py beside it
        raise SystemExit("error: python -m teachers.agreement")
    from support.stop import at_once

    at_once()

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from collect import check, split_of, teacher_algorithm
from config import Collection
from envs import get_family
from teachers.ppo import network_input
from teachers.rollouts import Policies, join, load_policies, rollout
from teachers.teachers import TrainedTeachers, train_teachers


@dataclass
class Agreement:
    """What `agreement` finds, in the means of N tasks."""

    near: float
    far: float
    own: float  # return of each task's own policy
    between: float  # return of the mean action of the two nearest others
    random: float


@dataclass
class MeanOf:
    """Acts with the mean of what several stacks of policies would do."""

    stacks: list[Policies]

    def act(self, inputs: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return torch.stack([policies.act(inputs, rng) for policies in self.stacks]).mean(0)


def neighbours(tasks: np.ndarray) -> np.ndarray:
    """(N, n) -> (N, N - 1): the other tasks, nearest first; each number counts in its spread."""
    spread = tasks.std(0)
    coded = tasks / np.where(spread > 0, spread, 1.0)
    gaps = np.linalg.norm(coded[:, None] - coded[None], axis=-1)
    np.fill_diagonal(gaps, -1.0)  # a task is first in its own row, then left out
    return gaps.argsort(1, kind="stable")[:, 1:]


def best_policies(teachers: TrainedTeachers, count: int) -> Policies:
    """The checkpoint of the best mean return of each of the first `count` tasks."""
    behaviours = [teachers.behaviour("mixed", task) for task in range(count)]
    return join([load_policies(Path(b.folder), [b.label], b.row) for b in behaviours])


@torch.inference_mode()
def differences(policies: Policies, inputs: Tensor) -> np.ndarray:
    """(N, N): how far the actions of i and j are on the states that both have seen.

    `inputs` (N, T, in) is what the networks read in each task's own episode.
    """
    n = len(inputs)
    # (N policies, N * T states): every policy's action in every state
    actions = policies.act(inputs.flatten(0, 1).expand(n, -1, -1)).view(n, n, inputs.shape[1], -1)
    gap = np.empty((n, n))
    for i in range(n):
        squares = ((actions - actions[i]) ** 2).mean((2, 3))  # (N policies, N whose states)
        gap[i] = 0.5 * (squares[:, i] + squares.diagonal())  # states of i, states of the other
    return gap**0.5


def agreement(env: str, tasks: list, policies: Policies, random: float, seed: int) -> Agreement:
    """Of N >= 3 tasks and their N policies; `random` is passed on."""
    others = neighbours(np.array(tasks, float))
    own = rollout(policies, env, tasks, 1, (seed, 0), sampled=False)
    inputs = network_input(get_family(env), own["states"][:, 0])
    gap = differences(policies, inputs)
    rows = np.arange(len(tasks))
    two = MeanOf([policies.of(torch.from_numpy(others[:, k])) for k in (0, 1)])
    between = rollout(two, env, tasks, 1, (seed, 0), sampled=False)
    return Agreement(
        near=float(gap[rows, others[:, 0]].mean()),
        far=float(gap[~np.eye(len(tasks), dtype=bool)].mean()),
        own=float(own["rewards"].sum(-1).mean()),
        between=float(between["rewards"].sum(-1).mean()),
        random=random,
    )


def measure(cfg: Collection) -> Agreement:
    """Of the training tasks of `cfg`; its teachers are trained if they are not there.

    Raises ValueError with one line where there is nothing to compare, before any training.
    """
    check(cfg)
    env, (train, test) = cfg.data.env, split_of(cfg)
    if teacher_algorithm(cfg) is None:
        raise ValueError(f"{env}'s teacher is a rule: there are no policies to compare")
    if get_family(env).discrete_actions:
        raise ValueError(f"{env}'s actions are discrete: two of them have no mean")
    if len(train) < 3:
        raise ValueError(f"{len(train)} tasks: neighbours need three or more (--train-tasks)")
    teachers = train_teachers(cfg, train, test)
    random = float(teachers.random[: len(train)].mean())
    return agreement(env, train, best_policies(teachers, len(train)), random, cfg.data.data_seed)


def main() -> None:
    """`python -m teachers.agreement --env ...`, with the settings of collect.py."""
    from support.command_line import parse_collection

    torch.set_num_threads(1)
    cfg, export = parse_collection()
    if export:
        raise ValueError("--export-minari is for collect.py: nothing is collected here")
    found = measure(cfg)
    print(
        f"{cfg.data.env}, --teacher {cfg.teachers.teacher}: actions differ by {found.near:.3f} "
        f"(nearest task), {found.far:.3f} (any); return {found.own:.1f} by its own policy, "
        f"{found.between:.1f} by its two neighbours' mean action, {found.random:.1f} at random"
    )


if __name__ == "__main__":
    from support.command_line import one_line

    one_line(main, "the same command continues")
