"""data.py: offline datasets and the samplers of Algorithms 1 and 3 (paper Sec. 3.1, 4.3, App. A, D.2).

in : a folder written by collect.py             out: `ADBatch` / `DPTBatch` for models.py
Read after collect.py, before models.py.

A dataset folder holds `meta.json` (format version, environment, tasks, array shapes, sha256 of every
part) and one `task-000.npz` for each training task: plain arrays, no pickles. meta.json is written
last, so a folder that has one is complete; loading checks all of it.

Shape legend: N tasks, E episodes a task, T steps an episode, L episodes a prompt, n = L*T steps,
B rows of a batch, Q queries of a row, ds/da state and action numbers. Discrete actions are int64 ids
(no trailing axis), continuous ones float32 with a trailing da.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from envs import Family, get_family

FORMAT = 1  # of the dataset folder; raised when its meaning changes
ARRAYS = ("states", "actions", "rewards", "query_states", "query_actions")


# ------------------------------------------------------------------------ what the other files share
@dataclass
class Prompt:
    """tau of Sec. 4.1: n = L*T transitions a row, episodes one behind the other."""

    states: Tensor  # (B, n, ds) int64 (grid) or float32, normalised
    actions: Tensor  # (B, n) int64 or (B, n, da) float32
    rewards: Tensor  # (B, n) float32

    @property
    def steps(self) -> int:
        return self.rewards.shape[1]

    def to(self, device) -> Prompt:
        return Prompt(self.states.to(device), self.actions.to(device), self.rewards.to(device))


@dataclass
class ADBatch:
    """Algorithm 1, lines 3-9: every prompt is its own target (Eq. 10)."""

    prompt: Prompt  # n = L*T
    task: Tensor  # (B,) int64: rows with equal numbers are each other's positives in Eq. 7

    def to(self, device) -> ADBatch:
        return ADBatch(self.prompt.to(device), self.task.to(device))


@dataclass
class DPTBatch:
    """Algorithm 3, lines 8-16: query-label pairs drawn independently of the prompt (Eq. 11)."""

    prompt: Prompt
    task: Tensor  # (B,)
    query_states: Tensor  # (B, Q, ds)
    query_actions: Tensor  # (B, Q[, da]): the labels a*
    visible: Tensor  # (B, Q) int64: each query sees this many steps of the prompt (n: all of it)

    def to(self, device) -> DPTBatch:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return DPTBatch(**moved)


@dataclass
class Dataset:
    """All of D_train, in memory; one fancy index makes a batch."""

    spec: Family
    meta: dict
    states: Tensor  # (N, E, T, ds)
    actions: Tensor  # (N, E, T[, da])
    rewards: Tensor  # (N, E, T) float32
    query_states: Tensor  # (N, M, ds)      D^q: states with the expert's action
    query_actions: Tensor  # (N, M[, da])
    returns: Tensor  # (N, E) float32
    order: Tensor  # (N, E) episode ids by ascending return; ties keep the order of collection
    state_mean: Tensor  # (ds,) of the training tasks; zeros for grids
    state_std: Tensor  # (ds,) ones for grids

    @property
    def tasks(self) -> int:
        return self.states.shape[0]

    @property
    def episodes(self) -> int:
        return self.states.shape[1]


def normalise(states: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Continuous states to zero mean and unit deviation of the training tasks; grid cells as they are."""
    return (states - mean) / std if states.is_floating_point() else states


# ------------------------------------------------------------------------------------------- loading
def part_name(task: int) -> str:
    return f"task-{task:03d}.npz"


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_meta(folder: str | Path) -> dict:
    """meta.json of a dataset folder. Raises ValueError with one line for a missing or foreign one."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"no dataset in {folder}: {path.name}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete that folder to collect it anew"
        ) from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a t2mir dataset of format {FORMAT}; delete that folder to collect it anew"
        )
    return meta


def load_part(folder: Path, task: int, meta: dict, spec: Family) -> dict[str, np.ndarray]:
    """The arrays of one task, checked: bytes, names, shapes, finite values, ids in range."""
    path = folder / part_name(task)
    again = "delete that file and run collect.py with the same settings to redo it alone"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; run collect.py with the same settings to redo it alone"
        )
    if file_hash(path) != meta["sha256"][task]:
        raise ValueError(f"{path} is damaged (its checksum differs from meta.json); {again}")
    try:
        with np.load(path, allow_pickle=False) as file:
            part = {name: file[name] for name in ARRAYS}
    except Exception as error:  # whatever numpy, zipfile and zlib make of damage
        raise ValueError(f"{path} is not a whole part ({error!r}); {again}") from None
    episodes, steps, queries = meta["episodes"], spec.horizon, meta["queries"]
    tail = () if spec.discrete_actions else (spec.action_dim,)
    want = {
        "states": (episodes, steps, spec.state_dim),
        "actions": (episodes, steps, *tail),
        "rewards": (episodes, steps),
        "query_states": (queries, spec.state_dim),
        "query_actions": (queries, *tail),
    }
    for name, array in part.items():
        if array.shape != want[name]:
            raise ValueError(f"{path}: {name} has shape {array.shape}, not {want[name]}; {again}")
        limits = None  # of ids; None: any finite number
        if name.endswith("states") and spec.state_values:
            limits = np.array(spec.state_values)
        if name.endswith("actions") and spec.discrete_actions:
            limits = spec.action_dim
        ids = limits is not None
        if array.dtype.kind not in ("ui" if ids else "uif"):
            raise ValueError(
                f"{path}: {name} has type {array.dtype}, not {'whole ' if ids else ''}numbers; {again}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} holds values that are not finite; {again}")
        if ids and ((array < 0) | (array >= limits)).any():
            raise ValueError(f"{path}: {name} holds ids outside the environment's range; {again}")
    return part


def load_dataset(folder: str | Path, env: str | None = None) -> Dataset:
    """Read and check a dataset folder. Raises ValueError with one line that says what to do."""
    folder = Path(folder)
    meta = read_meta(folder)
    if env is not None and meta.get("env") != env:
        raise ValueError(f"{folder} holds data of '{meta.get('env')}', not of '{env}'")
    if env is None and str(meta.get("env")).endswith(
        ".py"
    ):  # data must not choose which file is run
        raise ValueError(f"{folder} holds data of {meta['env']}: name that file yourself (--env)")
    try:
        spec = get_family(meta["env"])
        parts = [load_part(folder, i, meta, spec) for i in range(len(meta["train_tasks"]))]
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{folder}/meta.json lacks {error}; delete that folder to collect it anew"
        ) from None
    stacked = {name: np.stack([part[name] for part in parts]) for name in ARRAYS}
    rewards = torch.from_numpy(stacked["rewards"]).float()
    returns = rewards.sum(-1)
    states, queries = (torch.from_numpy(stacked[n]) for n in ("states", "query_states"))
    mean, std = torch.zeros(spec.state_dim), torch.ones(spec.state_dim)
    if spec.state_values is None:
        mean, std = states.float().mean((0, 1, 2)), states.float().std((0, 1, 2)) + 1e-6
    return Dataset(
        spec=spec,
        meta=meta,
        states=states,
        actions=torch.from_numpy(stacked["actions"]),
        rewards=rewards,
        query_states=queries,
        query_actions=torch.from_numpy(stacked["query_actions"]),
        returns=returns,
        order=returns.argsort(dim=1, stable=True),
        state_mean=mean,
        state_std=std,
    )


# ------------------------------------------------------------------------------------------ sampling
def model_dtype(dataset: Dataset, states: Tensor) -> Tensor:
    """Stored bytes to what the model reads: int64 cells, or normalised float32."""
    if dataset.spec.state_values:
        return states.long()
    return normalise(states.float(), dataset.state_mean, dataset.state_std)


def gather_prompt(dataset: Dataset, task: Tensor, episode: Tensor) -> Prompt:
    """Prompts of tasks (B,) from episodes (B, L), in the order given."""
    rows = task[:, None]
    actions = dataset.actions[rows, episode].flatten(1, 2)  # (B, L*T[, da])
    return Prompt(
        states=model_dtype(dataset, dataset.states[rows, episode].flatten(1, 2)),
        actions=actions.long() if dataset.spec.discrete_actions else actions.float(),
        rewards=dataset.rewards[rows, episode].flatten(1, 2),
    )


def draw_tasks(dataset: Dataset, batch: int, draws: int, rng: torch.Generator) -> Tensor:
    """batch / draws tasks, each `draws` times in a row (tau_i and tau'_i of Algorithms 1 and 3): (B,).

    All tasks are different; a batch with more than there are begins a new round of them.
    """
    rounds = -(-batch // (draws * dataset.tasks))
    task = torch.cat([torch.randperm(dataset.tasks, generator=rng) for _ in range(rounds)])
    return task[: batch // draws].repeat_interleave(draws)


def draw_episodes(dataset: Dataset, rows: int, count: int, rng: torch.Generator) -> Tensor:
    """`count` different episode ids for each row (rows, count), every subset equally likely."""
    return torch.rand(rows, dataset.episodes, generator=rng).topk(count, dim=1).indices


def sample_ad(
    dataset: Dataset, batch: int, episodes: int, draws: int, rng: torch.Generator
) -> ADBatch:
    """Algorithm 1, lines 3-9: L episodes of a task, ascending by return, concatenated.

    `episodes` is L. Sorting ranks instead of returns does it without a look-up: `dataset.order` lists
    episodes by return, so ascending ranks are ascending returns.
    """
    task = draw_tasks(dataset, batch, draws, rng)
    rank = draw_episodes(dataset, len(task), episodes, rng).sort(dim=1).values
    return ADBatch(gather_prompt(dataset, task, dataset.order[task[:, None], rank]), task)


def sample_dpt(
    dataset: Dataset,
    batch: int,
    episodes: int,
    draws: int,
    rng: torch.Generator,
    queries: int = 1,
    short: float = 0.0,
    empty: float = 0.0,
) -> DPTBatch:
    """Algorithm 3, lines 8-16: a prompt of `episodes` trajectories, and `queries` labelled states that
    are drawn independently of it.

    Queries that stand behind the prompt (`--query-position last`) need not see all of it: a share `empty`
    sees nothing (the first episode at test time), a share `short` a random number of steps, and the others
    1, 2, ... or all of its episodes, equally often.
    """
    task = draw_tasks(dataset, batch, draws, rng)
    prompt = gather_prompt(dataset, task, draw_episodes(dataset, len(task), episodes, rng))
    size, steps = (len(task), queries), prompt.steps
    pick = torch.randint(dataset.query_states.shape[1], size, generator=rng)
    actions = dataset.query_actions[task[:, None], pick]
    cut = torch.randint(steps + 1, size, generator=rng)
    whole = dataset.spec.horizon * torch.randint(1, episodes + 1, size, generator=rng)
    kind = torch.rand(size, generator=rng)
    visible = torch.where(kind < empty + short, cut, whole)
    visible = torch.where(kind < empty, torch.zeros_like(cut), visible)
    return DPTBatch(
        prompt=prompt,
        task=task,
        query_states=model_dtype(dataset, dataset.query_states[task[:, None], pick]),
        query_actions=actions.long() if dataset.spec.discrete_actions else actions.float(),
        visible=visible,
    )


def rows(batch, keep: slice):
    """Some rows of a batch or prompt: the share of one process."""
    parts = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return type(batch)(
        **{k: rows(v, keep) if isinstance(v, Prompt) else v[keep] for k, v in parts.items()}
    )


def subset(dataset: Dataset, tasks: slice) -> Dataset:
    """The same dataset with fewer training tasks (for tests and quick looks)."""
    per_task = {
        f.name: getattr(dataset, f.name)[tasks]
        for f in fields(dataset)
        if f.name in (*ARRAYS, "returns", "order")
    }
    return replace(dataset, **per_task)
