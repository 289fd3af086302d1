"""data.py: offline datasets, and what prompts are cut from (Sec. 3.1, 4.1, App. D.2).

in : a folder written by collect.py             out: a `Dataset` in memory, `Prompt`s of it
Read after collect.py; `Prompt` and `Dataset` are enough for models.py. ad.py and dpt.py draw their
batches with what stands at the end.

A dataset folder holds `meta.json` (format version, environment, settings, tasks, sha256 of every
part, and a checksum of itself) and one `task-000.npz` for each training task: plain arrays, no
pickles. meta.json is written last, so that a folder that has one is complete; loading checks all.

Symbols (paper -> here): D_i -> one task of `Dataset`; D_i^q -> its query_states and query_actions;
tau -> `Prompt`. Differs from the paper: the tasks of a batch are drawn without repeats. It is
silent on how states are scaled (below: to zero mean and unit deviation, cut at 10).
Shapes: N tasks, E episodes a task, T steps an episode, M queries a task; L episodes a prompt,
n = L*T its steps, B rows of a batch; ds, da numbers of a state and of an action. Discrete actions
are int64 ids without a trailing axis, continuous ones float32 with a trailing da.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import MinLen
from torch import Tensor

from config import Count, Data, Finite, Teachers, Text
from envs import Family, check_split, get_family
from support.checked import validated
from support.files import Damaged, Wanted, load_arrays, load_json

FORMAT = 3  # of the dataset folder; raised when its meaning changes
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
    """Continuous states to zero mean and unit deviation over the training tasks.

    Within +-10: a number that hardly ever moves (Reach's puck, when the hand meets it) would
    otherwise be a hundred deviations, and drown all others of its token.
    A held-out task is normalised with the same numbers: its own would need its data beforehand, and
    would hide from the network where it differs.
    """
    return ((states - mean) / std).clamp(-10, 10)


# ----------------------------------------------------------------------------------------- loading
Returns = list[Annotated[float, Finite]]  # of each task
# What random actions and the teachers return, by split: what an evaluation is compared with.
Reference = dict[Literal["train", "test"], dict[Literal["random", "teacher", "highest"], Returns]]


@dataclass(frozen=True)
class Facts:
    """What meta.json must say, and may, beside the settings of config.Data and config.Teachers."""

    env: Text
    data_episodes: Count  # E
    data_queries: Count  # M
    train_tasks: Annotated[list[Any], MinLen(1)]
    test_tasks: list[Any]
    sha256: Annotated[list[Annotated[str, MinLen(64)]], MinLen(1)]  # of each part
    horizon: Count | None = None  # T
    reference: Reference | None = None
    behaviour: list[list[Count]] | None = None  # of each task: the checkpoints that played it
    best_level: Returns | None = None  # of each task (teachers/teachers.py)
    maximum: Returns | None = None


def part_name(task: int) -> str:
    return f"task-{task:03d}.npz"


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_meta(folder: str | Path, env: str | None = None) -> dict:
    """meta.json of a dataset folder, every entry checked. `env`: the family that it must be of,
    needed where that is a Python file: what is read from disk never chooses code to run.

    Raises ValueError with one line for a missing or foreign one, Damaged for a damaged one.
    """
    path = Path(folder) / "meta.json"
    if not path.exists():
        raise ValueError(f"no dataset in {folder}: it has no {path.name}")
    try:
        meta = load_json(path, "t2mir dataset", FORMAT)
    except Damaged as error:
        raise Damaged(f"{error}; collect.py with the same settings redoes it") from None
    except ValueError as error:  # of another version
        raise ValueError(f"{error}; remove that folder to collect it anew") from None
    where, named = f"{path}: ", meta.get("env")
    # --data may name any folder: of another family it could have the same shapes
    if env is not None and named != env:
        raise ValueError(f"{folder} holds data of '{named}', not of '{env}'")
    if env is None and str(named).endswith(".py"):
        raise ValueError(f"{folder} holds data of {named}: name that file yourself (--env)")
    facts = validated(Facts, {k: v for k, v in meta.items() if k in Facts.__annotations__}, where)
    for group in (Data, Teachers):  # by the declarations of the command line
        names = group.__annotations__.keys() - Facts.__annotations__.keys()
        settings = asdict(group()) | {k: v for k, v in meta.items() if k in names}
        validated(group, settings, where, flags=True)
    family = get_family(facts.env)
    check_split(facts.env, facts.train_tasks, facts.test_tasks, str(path))
    if facts.horizon not in (None, family.horizon):
        raise ValueError(f"{where}horizon {facts.horizon} is not {family.name}'s {family.horizon}")
    tasks = {"train": len(facts.train_tasks), "test": len(facts.test_tasks)}
    if len(facts.sha256) != tasks["train"]:
        raise ValueError(f"{where}{len(facts.sha256)} checksums for {tasks['train']} tasks")
    check_reference(facts.reference, tasks, where)
    return meta


def check_reference(reference: Reference | None, tasks: dict, where: str) -> None:
    """Raises ValueError with one line unless there is one return a task, of no task or of all."""
    for split, columns in (reference or {}).items():
        for name, returns in columns.items():
            if len(returns) != tasks[split]:
                place = f"reference.{split}.{name}"
                raise ValueError(f"{where}{place} has {len(returns)} of {tasks[split]} returns")


def arrays_of(meta: dict, family: Family) -> Wanted:
    """The shape of each array of one task, and the kinds of numbers that it may hold."""
    episodes, queries, steps = meta["data_episodes"], meta["data_queries"], family.horizon
    action = () if family.discrete_actions else (family.action_dim,)
    shapes = {
        "states": (episodes, steps, family.state_dim),
        "actions": (episodes, steps, *action),
        "rewards": (episodes, steps),
        "query_states": (queries, family.state_dim),
        "query_actions": (queries, *action),
    }
    # ids are whole numbers: unsigned, integer; all others may also be floating
    return {
        name: (shape, "uif" if id_limits(name, family) is None else "ui")
        for name, shape in shapes.items()
    }


def load_part(folder: Path, task: int, meta: dict, family: Family) -> dict[str, np.ndarray]:
    """The arrays of one task, checked: bytes, names, shapes, types, finite values, ids in range.

    Raises Damaged with one line that names the file and says how to redo it.
    """
    path = folder / part_name(task)
    try:
        # a bit that has flipped would train silently
        if path.is_file() and file_hash(path) != meta["sha256"][task]:
            raise Damaged(f"{path} is damaged (its checksum differs from meta.json)")
        part = load_arrays(path, arrays_of(meta, family))
        if wrong := ids_outside(part, family):  # all else `load_arrays` has seen to
            raise Damaged(f"{path}: {wrong}")
    except Damaged as error:
        raise Damaged(f"{error}; collect.py with the same settings redoes it alone") from None
    return part


def wrong_with(part: dict[str, np.ndarray], meta: dict, family: Family) -> str | None:
    """The first thing wrong with new arrays of one task: names, shapes, types, values. None: all
    of it is as `load_part` will want it.
    """
    wanted = arrays_of(meta, family)
    for name, (shape, kinds) in wanted.items():
        if name not in part:
            return f"{name} is missing"
        array = part[name]
        if array.shape != shape or array.dtype.kind not in kinds:
            what = "numbers" if "f" in kinds else "whole numbers"
            return f"{name} must be {what} of shape {shape}, not {array.dtype} {array.shape}"
        if not np.isfinite(array).all():
            return f"{name} holds values that are not finite"
    return ids_outside({name: part[name] for name in wanted}, family)


def ids_outside(part: dict[str, np.ndarray], family: Family) -> str | None:
    """Which array holds ids that no table of the family has; None: none does."""
    for name, array in part.items():
        limits = id_limits(name, family)
        # an id beyond a table would crash far from here; a negative one would be read from its end
        if limits is not None and ((array < 0) | (array >= limits)).any():
            return f"{name} holds ids outside the environment's range"
    return None


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
    meta = read_meta(folder, env)
    family = get_family(meta["env"])
    parts = [load_part(folder, i, meta, family) for i in range(len(meta["train_tasks"]))]
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


def draw_episodes(
    dataset: Dataset, rows: int, count: int, rng: torch.Generator, must: Tensor | None = None
) -> Tensor:
    """`count` different episode ids for each row (rows, count), every subset equally likely;
    `must` (rows,): of those that hold this one."""
    # the places of the `count` largest of E random numbers: a draw without replacement, row by row
    key = torch.rand(rows, dataset.episodes, generator=rng)
    if must is not None:
        key.scatter_(1, must[:, None], 2.0)  # above all numbers that are drawn
    return key.topk(count, dim=1).indices


def rows(batch, keep: slice):
    """Some rows of a batch or prompt: the share of one process."""
    # whatever its fields are: a method's batch is a dataclass of tensors and prompts
    parts = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return type(batch)(
        **{k: rows(v, keep) if isinstance(v, Prompt) else v[keep] for k, v in parts.items()}
    )


def cell_ids(states: Tensor, sides: tuple[int, ...]) -> Tensor:
    """A grid's states (..., ds) as one number each (...); 10 x + y in DarkRoom."""
    cell = torch.zeros_like(states[..., 0], dtype=torch.int64)
    for axis, size in enumerate(sides):
        cell = cell * size + states[..., axis]
    return cell


def steps_at(prompt: Prompt, place: Tensor) -> Prompt:
    """Some steps of each row, by their places (B, k)."""
    row = torch.arange(len(place))[:, None]
    return Prompt(prompt.states[row, place], prompt.actions[row, place], prompt.rewards[row, place])


def one_step_a_state(prompt: Prompt, sides: tuple[int, ...], length: int) -> Prompt:
    """`length` of a grid's steps (B, n >= length): the newest of each state, in the order of play.

    What is left over is filled with the newest of the other steps. `sides`: the values of each
    coordinate; a row with more states than `length` keeps those seen last.
    """
    cell = cell_ids(prompt.states, sides)  # (B, n)
    b, n = cell.shape
    time = torch.arange(n).expand(b, n)
    newest = torch.full((b, math.prod(sides)), -1).scatter_reduce(1, cell, time, "amax")
    is_newest = newest.gather(1, cell) == time
    keep = (time + n * is_newest).topk(length, dim=1).indices.sort(dim=1).values  # (B, length)
    return steps_at(prompt, keep)
