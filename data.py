"""data.py: offline datasets, and what prompts are cut from (Sec. 3.1, 4.1, App. D.2).

in : a folder written by collect.py             out: a `Dataset` in memory, `Prompt`s of it
Read after collect.py; `Prompt` and `Dataset` are enough for models.py. ad.py and dpt.py draw their
batches with what stands at the end.

A dataset folder holds `meta.json` (format version, environment, settings, tasks, sha256 of every
part) and one `task-000.npz` for each training task: plain arrays, no pickles. meta.json is written
last, so that a folder that has one is complete; loading checks all of it.

Symbols (paper -> here): D_i -> one task of `Dataset`; D_i^q -> its query_states and query_actions;
tau -> `Prompt`. Differs from the paper: nothing; it is silent on how states are scaled (below: to
zero mean and unit deviation) and on how tasks are drawn (below: without repeats).
Shapes: N tasks, E episodes a task, T steps an episode, M queries a task; L episodes a prompt,
n = L*T its steps, B rows of a batch; ds, da numbers of a state and of an action. Discrete actions
are int64 ids without a trailing axis, continuous ones float32 with a trailing da.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from envs import Family, get_family

FORMAT = 2  # of the dataset folder; raised when its meaning changes
ARRAYS = ("states", "actions", "rewards", "query_states", "query_actions")


# ---------------------------------------------------------------------- what the other files share
@dataclass
class Prompt:
    """tau of Sec. 4.1: n = L*T transitions a row, episodes one behind the other."""

    # cells stay whole numbers: they are looked up in a table, not multiplied
    states: Tensor  # (B, n, ds) int64 (grid) or float32, normalised
    actions: Tensor  # (B, n) int64 or (B, n, da) float32
    rewards: Tensor  # (B, n) float32

    @property
    def steps(self) -> int:
        return self.rewards.shape[1]

    def to(self, device) -> Prompt:
        return Prompt(self.states.to(device), self.actions.to(device), self.rewards.to(device))


@dataclass
class Dataset:
    """All of D_train, in memory; one fancy index makes a batch."""

    family: Family
    meta: dict  # meta.json
    # as stored, a byte for each coordinate of a grid: `model_dtype` makes of them what is read
    states: Tensor  # (N, E, T, ds)
    actions: Tensor  # (N, E, T[, da])
    rewards: Tensor  # (N, E, T) float32
    query_states: Tensor  # (N, M, ds)      D^q: states, and
    query_actions: Tensor  # (N, M[, da])    the actions that a teacher takes there
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
    """Continuous states to zero mean and unit deviation over the training tasks; cells stay.

    A held-out task is normalised with the same numbers: its own would need its data beforehand, and
    would hide from the network where it differs.
    """
    return (states - mean) / std if states.is_floating_point() else states


# ----------------------------------------------------------------------------------------- loading
def part_name(task: int) -> str:
    return f"task-{task:03d}.npz"


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_meta(folder: str | Path) -> dict:
    """meta.json of a dataset folder. Raises ValueError for a missing or foreign one."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text())  # RecursionError: brackets a hundred thousand deep
    except OSError as error:
        raise ValueError(f"no dataset in {folder}: {path.name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete that folder to collect it anew"
        ) from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        other = f" but {meta['format']}" if isinstance(meta, dict) and "format" in meta else ""
        raise ValueError(
            f"{path} is not a t2mir dataset of format {FORMAT}{other}; "
            "delete that folder to collect it anew"
        )
    return meta


def part_shapes(meta: dict, family: Family) -> dict[str, tuple[int, ...]]:
    """The shape of each array of one task."""
    episodes, queries, steps = meta["data_episodes"], meta["data_queries"], family.horizon
    action = () if family.discrete_actions else (family.action_dim,)
    return {
        "states": (episodes, steps, family.state_dim),
        "actions": (episodes, steps, *action),
        "rewards": (episodes, steps),
        "query_states": (queries, family.state_dim),
        "query_actions": (queries, *action),
    }


def stored_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array of an npz file, from the headers: nothing is unpacked, so that a
    small file that would fill the memory is refused before it does.
    """
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0
                if version != (1, 0):  # longer headers, which other programs may write
                    read = np.lib.format.read_array_header_2_0
                shape, _, kind = read(file)
                shapes[name.removesuffix(".npy")] = (shape, kind)
    return shapes


def load_part(folder: Path, task: int, meta: dict, family: Family) -> dict[str, np.ndarray]:
    """The arrays of one task, checked: bytes, names, shapes, types, finite values, ids in range.

    Raises ValueError with one line that names the file and says how to redo it.
    """
    path = folder / part_name(task)
    again = "delete that file and run collect.py with the same settings to redo it alone"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; run collect.py with the same settings to redo it alone"
        )
    if file_hash(path) != meta["sha256"][task]:  # a bit that has flipped would train silently
        raise ValueError(f"{path} is damaged (its checksum differs from meta.json); {again}")
    wanted = part_shapes(meta, family)
    try:
        stored = {name: stored_shapes(path)[name] for name in ARRAYS}
    except Exception as error:  # whatever numpy and zipfile make of damage
        raise ValueError(f"{path} is not a whole part ({error!r}); {again}") from None
    for name, (shape, kind) in stored.items():  # all that headers tell, before memory is taken
        ids = id_limits(name, family) is not None
        if shape != wanted[name]:
            raise ValueError(f"{path}: {name} has shape {shape}, not {wanted[name]}; {again}")
        if kind.kind not in ("ui" if ids else "uif"):  # unsigned, integer, float
            numbers = "whole numbers" if ids else "numbers"
            raise ValueError(f"{path}: {name} has type {kind}, not {numbers}; {again}")
    try:
        with np.load(path, allow_pickle=False) as file:  # a pickle could run code
            part = {name: file[name] for name in ARRAYS}
    except Exception as error:
        raise ValueError(f"{path} is not a whole part ({error!r}); {again}") from None
    for name, array in part.items():
        if not np.isfinite(array).all():  # one NaN in a batch ends a training
            raise ValueError(f"{path}: {name} holds values that are not finite; {again}")
        limits = id_limits(name, family)
        # an id beyond a table would crash far from here; a negative one would be read from its end
        if limits is not None and ((array < 0) | (array >= limits)).any():
            raise ValueError(f"{path}: {name} holds ids outside the environment's range; {again}")
    return part


def id_limits(name: str, family: Family) -> np.ndarray | int | None:
    """What the ids in an array stay below: cells of a grid, discrete actions. None: no ids."""
    if name.endswith("states") and family.state_values:
        return np.array(family.state_values)
    if name.endswith("actions") and family.discrete_actions:
        return family.action_dim
    return None


def load_dataset(folder: str | Path, env: str | None = None) -> Dataset:
    """Read and check a dataset folder. Raises ValueError with one line that says what to do."""
    folder = Path(folder)
    meta = read_meta(folder)
    # --data may name any folder: of another family it could have the same shapes
    if env is not None and meta.get("env") != env:
        raise ValueError(f"{folder} holds data of '{meta.get('env')}', not of '{env}'")
    if env is None and str(meta.get("env")).endswith(".py"):
        # what is read from disk must not choose which file is run
        raise ValueError(f"{folder} holds data of {meta['env']}: name that file yourself (--env)")
    try:
        family = get_family(meta["env"])
        parts = [load_part(folder, i, meta, family) for i in range(len(meta["train_tasks"]))]
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{folder}/meta.json lacks {error}; delete that folder to collect it anew"
        ) from None
    # one array over all tasks: a batch is then one fancy index, without a loop
    stacked = {name: np.stack([part[name] for part in parts]) for name in ARRAYS}
    rewards = torch.from_numpy(stacked["rewards"]).float()  # (N, E, T)
    returns = rewards.sum(-1)  # (N, E), undiscounted, as App. E ranks them and Sec. 3.1 counts
    states, queries = (torch.from_numpy(stacked[n]) for n in ("states", "query_states"))
    mean, std = torch.zeros(family.state_dim), torch.ones(family.state_dim)  # change nothing
    if family.state_values is None:
        # over tasks, episodes and steps; 1e-6: a coordinate that never moves must not divide by 0
        mean, std = states.float().mean((0, 1, 2)), states.float().std((0, 1, 2)) + 1e-6
    return Dataset(
        family=family,
        meta=meta,
        states=states,
        actions=torch.from_numpy(stacked["actions"]),
        rewards=rewards,
        query_states=queries,
        query_actions=torch.from_numpy(stacked["query_actions"]),
        returns=returns,
        order=returns.argsort(dim=1, stable=True),  # once here, not in every batch (Alg. 1, line 6)
        state_mean=mean,
        state_std=std,
    )


# ---------------------------------------------------------------------------------------- sampling
def model_dtype(dataset: Dataset, states: Tensor) -> Tensor:
    """Stored bytes to what the model reads: int64 cells, or normalised float32."""
    if dataset.family.state_values:
        return states.long()
    return normalise(states.float(), dataset.state_mean, dataset.state_std)


def gather_prompt(dataset: Dataset, task: Tensor, episode: Tensor) -> Prompt:
    """Prompts of tasks (B,) from episodes (B, L), in the order given."""
    rows = task[:, None]  # (B, 1): with episode (B, L) it picks (B, L, T, ...)
    actions = dataset.actions[rows, episode].flatten(1, 2)  # (B, L*T[, da])
    return Prompt(
        states=model_dtype(dataset, dataset.states[rows, episode].flatten(1, 2)),
        actions=actions.long() if dataset.family.discrete_actions else actions.float(),
        rewards=dataset.rewards[rows, episode].flatten(1, 2),
    )


def draw_tasks(dataset: Dataset, batch: int, draws: int, rng: torch.Generator) -> Tensor:
    """(B,) task numbers: batch / draws tasks, each `draws` times in a row.

    Two draws of a task are tau_i and tau'_i of Algorithms 1 and 3: each other's positive in Eq. 7.
    All tasks are different; a batch with more than there are begins a new round of them.
    """
    # Different tasks, so that every other pair is a negative; drawn one by one, as line 4 of
    # Algorithm 1 may be read, some tasks would come twice and fewer be told apart.
    rounds = -(-batch // (draws * dataset.tasks))  # rounded up
    task = torch.cat([torch.randperm(dataset.tasks, generator=rng) for _ in range(rounds)])
    # side by side, not in two halves: a process's share of the rows then holds both draws, and with
    # --keys other they fall on even and odd places (contrastive.py: `eq7_pairs`)
    return task[: batch // draws].repeat_interleave(draws)


def draw_episodes(dataset: Dataset, rows: int, count: int, rng: torch.Generator) -> Tensor:
    """`count` different episode ids for each row (rows, count), every subset equally likely."""
    # the places of the `count` largest of E random numbers: a draw without replacement, row by row
    return torch.rand(rows, dataset.episodes, generator=rng).topk(count, dim=1).indices


def rows(batch, keep: slice):
    """Some rows of a batch or prompt: the share of one process."""
    # whatever its fields are: a method's batch is a dataclass of tensors and prompts
    parts = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return type(batch)(
        **{k: rows(v, keep) if isinstance(v, Prompt) else v[keep] for k, v in parts.items()}
    )
