"""rollouts.py: policies that are loaded and played, and one task's part of a dataset (App. D.2).

in : checkpoints of the teachers, tasks          out: episodes; the arrays of one training task
Read after sac.py and ppo.py, before teachers.py, which says which checkpoints make what.

A part of a dataset (Algorithm 3, lines 2-4) is E episodes, D_i, and labelled states, D_i^q.
In the recipe `paper` the task's own checkpoints play all of D_i. Two departures (Sec. 3.1
allows "arbitrary behaviour policies"), because a prompt by the task's own policies gives the
task away through its actions, which a policy's own first episode never does; only rewards tell
when behaviour does not know the task:

    recipe     own checkpoints     the other episodes of a task are played by
    paper      all episodes        nobody else
    explore    a quarter           other tasks' checkpoints, which helps DPT
    wander     half                random actions, which helps AD: it imitates all it reads,
                                   and nothing can be imitated there

Queries are states of the task's own episodes: where its own training has been, the teacher
knows what to do. The label of a query is

    of SAC             the mean action of the best checkpoint that the quality has
    of PPO             the behaviour's own action (App. D.2: the means leave the action space)
    of PPO, discrete   the likeliest action of that best checkpoint, as for SAC: it cannot
                       leave the action space (the paper has no such family)

Shapes: M policies or tasks, B states each, E episodes, T steps, ds/da numbers of a state/an
action. Discrete actions are int64 ids without a last axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from config import Data
from envs import get_family, make_batch
from support.files import Damaged, save_arrays
from teachers.ppo import network_input
from teachers.sac import mlp, squashed, two_seeds
from teachers.stored import WEIGHTS, policy_file, read_policies


# ------------------------------------------------------------------------------------ policies
@dataclass
class Policies:
    """M stacked policies, networks of two hidden layers. How they act is their kind's."""

    kind: str
    tensors: dict[str, Tensor]  # w0, b0, ... (M, in, out), (M, 1, out); of `ppo` log_std (M, 1, da)

    def of(self, row: int | slice | Tensor) -> Policies:
        """Some of them, by their places; one is a stack of one."""
        rows = slice(row, row + 1) if isinstance(row, int) else row
        return Policies(self.kind, {name: tensor[rows] for name, tensor in self.tensors.items()})

    def act(self, inputs: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Actions for what the networks read, (M, B, in): sampled with `rng`, else the best.

        Continuous ones are (M, B, da) in [-1, 1], discrete ones ids (M, B).
        """
        weights = [self.tensors[name] for name in WEIGHTS]
        if self.kind == "sac":  # relu; a Gaussian, squashed by tanh
            out = mlp(weights, inputs)
            noise = torch.zeros_like(out.chunk(2, -1)[0])  # none: the mean, the best it knows
            return squashed(out, noise if rng is None else noise.normal_(generator=rng))[0]
        out = mlp(weights, inputs, torch.tanh)
        if self.kind == "ppo-discrete":  # logits
            if rng is None:
                return out.argmax(-1)
            chances = out.softmax(-1).flatten(0, 1)
            return torch.multinomial(chances, 1, generator=rng).view(out.shape[:2])
        if rng is not None:  # a Gaussian, clipped
            std = self.tensors["log_std"].exp()  # learned, the same in all states
            out = out + std * torch.randn(out.shape, generator=rng)
        return out.clamp(-1, 1)


def load_policies(folder: Path, steps: Sequence[int], row: int | slice = slice(None)) -> Policies:
    """Policies of a group's checkpoints, one step behind the other: M = len(steps) x rows.

    `row` is a task's place in the group; all of them without it. Raises Damaged with one line that
    names a missing or damaged file.
    """
    stacks = []
    for step in steps:
        try:
            stack = Policies(*read_policies(policy_file(folder, step)))
        except Damaged as error:
            raise Damaged(f"{error}: collect.py with the same settings trains it anew") from None
        stacks.append(stack.of(row))
    return join(stacks)


def join(stacks: Sequence[Policies]) -> Policies:
    """Stacks of one kind behind one another."""
    first = stacks[0]
    joined = {name: torch.cat([p.tensors[name] for p in stacks]) for name in first.tensors}
    return Policies(first.kind, joined)


# ------------------------------------------------------------------------------------ episodes
class Acts(Protocol):
    """Whoever has an action for each of M x B inputs, as `Policies` has."""

    def act(self, inputs: Tensor, rng: torch.Generator | None = None) -> Tensor: ...


@torch.inference_mode()
def rollout(
    policies: Acts | None,
    env: str,
    tasks: list,
    episodes: int,
    seed: Sequence[int],
    sampled: bool,
) -> dict[str, np.ndarray]:
    """`episodes` episodes of each of M policies on its own task, all stepped at once.

    `policies` None: uniformly random actions. `sampled`: whether actions are drawn, or each
    policy's best. Returns states (M, E, T, ds), actions (M, E, T[, da]), rewards (M, E, T) and
    success (M, E) bool.
    """
    family, count = get_family(env), len(tasks)
    starts, draws = two_seeds(*seed)
    # M * E rows, the episodes of a task side by side
    batch = make_batch(env, [task for task in tasks for _ in range(episodes)], starts)
    rng = torch.Generator().manual_seed(draws) if sampled else None

    def choose(states: np.ndarray) -> np.ndarray:
        """Actions (M * E[, da]) for states (M * E, ds)."""
        rows = len(states)
        if policies is not None:
            inputs = network_input(family, states).view(count, episodes, -1)
            return policies.act(inputs, rng).flatten(0, 1).numpy()
        if family.discrete_actions:
            return torch.randint(family.action_dim, (rows,), generator=rng).numpy()
        return 2 * torch.rand(rows, family.action_dim, generator=rng).numpy() - 1

    steps, states = [], batch.reset()
    for _ in range(family.horizon):
        actions = choose(states)
        following, rewards = batch.step(actions)
        steps.append((states, actions, rewards))
        states = following
    columns = (np.stack(column, 1) for column in zip(*steps, strict=True))  # (M * E, T, ...)
    success = np.zeros(count * episodes, bool) if batch.success is None else batch.success.copy()
    named = zip(("states", "actions", "rewards", "success"), (*columns, success), strict=True)
    return {name: array.reshape(count, episodes, *array.shape[1:]) for name, array in named}


# ------------------------------------------------------------------------ a part of a dataset
OWN_SHARE = {"paper": 1.0, "explore": 0.25, "wander": 0.5}  # of a task's episodes, by recipe


@dataclass(frozen=True)
class Behaviour:
    """The policies of one task that a quality allows (teachers.TrainedTeachers.behaviour)."""

    folder: str  # of the task's group
    row: int  # its place in the group's stacks
    steps: list[int]  # of the checkpoints that play
    label: int  # of the checkpoint that labels


@dataclass(frozen=True)
class Part:
    """A job: the arrays of one training task of a dataset."""

    env: str
    task: list
    number: int  # of the task
    behaviour: Behaviour
    own: int  # episodes that it plays
    others: list[tuple[str, int, int]]  # folder, step, row: another task's policy, an episode each
    random: int  # episodes of random actions
    queries: int
    seed: int
    path: str  # of the file to be written


def parts_of(
    data: Data, tasks: list, behaviours: list[Behaviour], paths: Sequence[Path]
) -> list[Part]:
    """The jobs of a dataset of N tasks: who plays how many episodes of each.

    With `explore`, other tasks' checkpoints are of the same quality, all equally likely; a single
    task, which has no others, plays all of its data itself.
    """
    alone = data.recipe == "explore" and len(tasks) == 1
    own = max(1, round((1.0 if alone else OWN_SHARE[data.recipe]) * data.data_episodes))
    parts = []
    for i, task in enumerate(tasks):
        # streams are named (seed, purpose, task): 1 own episodes, 2 queries, 3 who else, 4 theirs
        rng, others = np.random.default_rng([data.data_seed, 3, i]), []
        for _ in range(data.data_episodes - own if data.recipe == "explore" else 0):
            # 1 to N - 1 places on, round the circle: any task but this one
            other = behaviours[int((i + 1 + rng.integers(len(tasks) - 1)) % len(tasks))]
            others.append((other.folder, int(rng.choice(other.steps)), other.row))
        parts.append(
            Part(
                env=data.env,
                task=task,
                number=i,
                behaviour=behaviours[i],
                own=own,
                others=others,
                random=data.data_episodes - own - len(others),
                queries=data.data_queries,
                seed=data.data_seed,
                path=str(paths[i]),
            )
        )
    return parts


def make_part(part: Part, alive) -> None:
    """Algorithm 3, lines 2-4: play the episodes of one task, label its queries, write `path`.

    `alive()` raises when the command that asked for the part is gone.
    """
    alive()
    arrays = own_episodes(part)
    played = arrays["states"], arrays["actions"]  # by the task's own policies
    if part.others or part.random:
        alive()
        foreign = foreign_episodes(part)
        arrays = {name: np.concatenate([arrays[name], foreign[name]]) for name in arrays}
    query_states, query_actions = label_queries(part, *played)
    queries = {"query_states": query_states, "query_actions": query_actions}
    save_arrays(Path(part.path), arrays | queries)


def own_episodes(part: Part) -> dict[str, np.ndarray]:
    """`own` episodes of the task's checkpoints, in the order of training, as many of each."""
    by, count = part.behaviour, len(part.behaviour.steps)
    policies = load_policies(Path(by.folder), by.steps, by.row)
    each = -(-part.own // count)  # rounded up; what is too much is left out
    seed = (part.seed, 1, part.number)
    played = rollout(policies, part.env, [part.task] * count, each, seed, sampled=True)
    # episode j is of checkpoint j * count / own: shares differ by one where it does not divide
    checkpoint = np.arange(part.own) * count // part.own
    # its how-manieth episode: 0, 1, ... since the first place of that checkpoint
    turn = np.arange(part.own) - np.searchsorted(checkpoint, checkpoint)
    return {name: played[name][checkpoint, turn] for name in ("states", "actions", "rewards")}


def foreign_episodes(part: Part) -> dict[str, np.ndarray]:
    """Episodes of this task by policies that do not know it: other tasks', or none."""
    policies = None
    if part.others:
        # a file that holds several of them is read once
        files = {(folder, step) for folder, step, _ in part.others}
        read = {(folder, step): load_policies(Path(folder), [step]) for folder, step in files}
        policies = join([read[folder, step].of(row) for folder, step, row in part.others])
    tasks = [part.task] * (len(part.others) or part.random)
    played = rollout(policies, part.env, tasks, 1, (part.seed, 4, part.number), sampled=True)
    return {name: played[name][:, 0] for name in ("states", "actions", "rewards")}


def label_queries(
    part: Part, states: np.ndarray, actions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """D_i^q: query states (Q, ds) out of `states` (own, T, ds), and their actions (Q[, da])."""
    family = get_family(part.env)
    rng = np.random.default_rng([part.seed, 2, part.number])
    steps = states.shape[0] * states.shape[1]
    # no step twice while there are enough of them
    pick = rng.choice(steps, part.queries, replace=part.queries > steps)
    queries = states.reshape(steps, -1)[pick]
    best = load_policies(Path(part.behaviour.folder), [part.behaviour.label], part.behaviour.row)
    if best.kind == "ppo":  # App. D.2, Reach and Push
        return queries, actions.reshape(steps, -1)[pick]
    # Algorithm 3, line 3: a* of the teacher at the quality's level, without noise
    with torch.inference_mode():
        return queries, best.act(network_input(family, queries)[None])[0].numpy()
