"""minari_io.py: datasets to Minari's format and back (https://minari.farama.org).

in : a dataset folder, or Minari datasets       out: Minari datasets, or a dataset folder
Read after data.py. Minari is an optional extra: pip install 't2mir[minari]'

    python tools/minari_io.py export datasets/NAME TARGET
    python tools/minari_io.py import SOURCE datasets/NAME --env point-robot --tasks tasks.json

Each training task is a Minari dataset of its own, since it is an environment of its own:

    TARGET/t2mir/darkroom-mixed/task-000-v0/data/    metadata.json    Minari's, and our `t2mir`
                                                     main_data.hdf5   Minari's: the episodes
                                                     queries.npz      D^q of the task (DPT)

The entry `t2mir` makes the way back exact: this task's number, the whole meta.json, the arrays'
types (in Minari they have those of the environment's spaces) and a checksum of it all.

Where the formats differ: Minari has T + 1 observations in an episode of T steps, a dataset folder
has T, so the last one is *repeated*, not observed. Episodes are truncated at the horizon, and
never terminated. Files of others are data alone here: no pickle is read, and no environment is
made because a file names it (Minari would, to learn its spaces; such files are refused).
"""

from __future__ import annotations

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C should not be a traceback
    from support.stop import at_once

    at_once()

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tyro
from tyro.conf import Positional

from data import ARRAYS, FORMAT, file_hash, load_dataset, load_part, part_name
from envs import Family, check_tasks, get_family, make_env, split_tasks
from support.command_line import one_line
from support.files import (
    check_folder,
    need_space,
    progress,
    remove_left_behind,
    save_arrays,
    save_json,
)

EPISODE = ("states", "actions", "rewards")  # the arrays that Minari holds


def _import_minari(who: str):
    try:
        import h5py  # noqa: F401 (Minari's storage)
        import minari
    except ImportError:
        raise ValueError(f"{who} needs Minari: pip install 't2mir[minari]'") from None
    return minari


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder} exists and is never overwritten: name another, or remove it")


@contextmanager
def _all_or_nothing(folder: Path, inside: str = "") -> Iterator[Path]:
    """A temporary folder; at the end, if all went well, `inside` of it becomes `folder`."""
    remove_left_behind(folder.parent, folder.name)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        (temporary / inside).rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checksum(part: dict[str, np.ndarray], task: int, meta: dict) -> str:
    """Of a task's arrays, and of all that meta.json says."""
    types = [(name, part[name].dtype.str, part[name].shape) for name in ARRAYS]
    checksum = hashlib.sha256(json.dumps([task, meta, types]).encode())
    for name in ARRAYS:
        checksum.update(part[name].tobytes())
    return checksum.hexdigest()


# ------------------------------------------------------------------------------------------- export
def _place(meta: dict, target: Path) -> tuple[str, Path]:
    """The name of a dataset's export, and its folder. Raises ValueError if that is there."""
    kind = [meta[key] for key in ("quality", "recipe") if meta.get(key) not in (None, "paper")]
    name = "t2mir/" + re.sub(r"[^-\w]+", "-", "-".join([get_family(meta["env"]).name, *kind]))
    final = Path(target).absolute() / name
    _refuse_existing(final)
    return name, final


def check_export(meta: dict, target: Path) -> None:
    """Raises ValueError with one line where `export_minari` of such a dataset would."""
    _import_minari("--export-minari")
    check_folder("--export-minari", str(target))
    _place(meta, target)


def export_minari(
    folder: Positional[Path], target: Positional[Path], env: str | None = None
) -> list[str]:
    """Write the dataset in FOLDER as Minari datasets under TARGET, which is then Minari's root
    (MINARI_DATASETS_PATH). Returns their ids.

    Raises ValueError with one line for a dataset that is not whole, and for an export that is
    there already.

    Args:
        folder: a finished dataset folder.
        target: where to write.
        env: for data of a family of your own, the file that defines it.
    """
    minari, folder = _import_minari("--export-minari"), Path(folder)
    meta = load_dataset(folder, env).meta  # checks all of it
    family, tasks = get_family(meta["env"]), meta["train_tasks"]
    name, final = _place(meta, target)
    ids = [f"{name}/task-{i:03d}-v0" for i in range(len(tasks))]
    # Minari's numbers have eight bytes, and episodes a state more.
    numbers = (family.horizon + 1) * (family.state_dim + family.action_dim + 1)
    need_space(final, len(tasks) * meta["data_episodes"] * numbers * 8)
    # Minari writes in place, under its root: that is the temporary folder meanwhile.
    with (
        _all_or_nothing(final, inside=name) as root,
        patch.dict(os.environ, MINARI_DATASETS_PATH=str(root)),
    ):
        for i, dataset_id in enumerate(progress(ids, desc=f"exporting {name}", unit="task")):
            _export_task(minari, dataset_id, i, load_part(folder, i, meta, family), meta)
    return ids


def _export_task(minari, dataset_id: str, i: int, part: dict[str, np.ndarray], meta: dict) -> None:
    """Training task number i as one Minari dataset, with our entry and the queries beside it."""
    task = meta["train_tasks"][i]
    env = make_env(meta["env"], task)  # Minari keeps its spaces, and its name if it has one
    states = np.concatenate([part["states"], part["states"][:, -1:]], axis=1)  # T -> T + 1
    # The spaces' types, as long as they hold the data's numbers exactly.
    states = states.astype(np.result_type(states, env.observation_space.dtype))
    actions = part["actions"].astype(np.result_type(part["actions"], env.action_space.dtype))
    last_step = np.arange(actions.shape[1]) == actions.shape[1] - 1
    episodes = [
        minari.data_collector.EpisodeBuffer(
            observations=states[e],
            actions=actions[e],
            rewards=part["rewards"][e],
            terminations=np.zeros_like(last_step),
            truncations=last_step,
            infos={},
        )
        for e in range(len(states))
    ]
    description = f"In-context reinforcement learning: {meta['env']}, training task {i} ({task})"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it has no author, e-mail address, ...
        dataset = minari.create_dataset_from_buffers(
            dataset_id, episodes, env=env, description=description
        )
    env.close()
    origin = {
        "task": i,
        "meta": meta,
        "last_observation": "repeated",
        "types": {name: part[name].dtype.str for name in ARRAYS},
        "checksum": _checksum(part, i, meta),
    }
    dataset.storage.update_metadata({"t2mir": origin})
    queries = {name: part[name] for name in ARRAYS if name not in EPISODE}
    save_arrays(dataset.storage.data_path / "queries.npz", queries)


# ------------------------------------------------------------------------------------------- import
def import_minari(
    source: Positional[Path],
    target: Positional[Path],
    env: str | None = None,
    tasks: Path | None = None,
    ids: list[str] | None = None,
    queries: int = 1000,
    seed: int = 0,
) -> Path:
    """Make the dataset folder TARGET of the Minari datasets in SOURCE, one a training task.

    Those that were exported from here come back as they were, bit for bit. Others need --env and
    --tasks; their queries are steps of the data itself with the actions taken, as App. D.2 has it
    for Reach and Push. Returns TARGET. Raises ValueError with one line for whatever does not fit;
    there is no TARGET then.

    Args:
        source: a folder of Minari datasets, such as Minari's root or a namespace in it.
        target: the dataset folder to make.
        env: task family; for one of your own the file that defines it.
        tasks: JSON file {"train": [...], "test": [...]}; training tasks in the datasets' order.
        ids: datasets, as paths from SOURCE; if not given, all there are, by name.
        queries: labelled states of each task; exported datasets bring theirs.
        seed: seed of their choice.
    """
    minari, source, target = _import_minari("import"), Path(source).absolute(), Path(target)
    _refuse_existing(target)
    if queries < 1:
        raise ValueError("--queries must be at least 1")
    split = None
    if env is not None:
        get_family(env)  # refuses an unknown one
        split = None if tasks is None else split_tasks(env, file=tasks)
    elif tasks is not None:
        raise ValueError("--tasks needs --env: which family's tasks are they?")
    names = ids or _names(source)
    if not names:
        raise ValueError(f"{source} holds no Minari datasets")
    if split and len(split[0]) != len(names):
        said = f"{tasks} names {len(split[0])} training tasks"
        raise ValueError(f"{said}, and there are {len(names)} datasets")
    bar = progress(names, desc=f"reading {source}", unit="task")
    datasets = {name: _read(minari, source / name) for name in bar}
    if env is not None and split is not None:
        meta, parts = _foreign(datasets, env, split, queries, seed)
    elif all("t2mir" in metadata for metadata, _ in datasets.values()):
        meta, parts = _exported(source, datasets, env)
    else:
        raise ValueError(f"not all of {source} was exported from here: say --env and --tasks")
    need_space(target, sum(array.nbytes for part in parts for array in part.values()))
    with _all_or_nothing(target) as folder:
        for i, part in enumerate(parts):
            save_arrays(folder / part_name(i), part)
        meta["sha256"] = [file_hash(folder / part_name(i)) for i in range(len(parts))]
        save_json(folder / "meta.json", meta)
        try:
            load_dataset(folder, meta["env"])  # what it refuses does not come to be
        except ValueError as error:
            # The temporary folder and what to do in it say nothing to the user.
            reason = str(error).replace(f"{folder}/", "").split(";")[0]
            raise ValueError(f"{source}: {reason}") from None
    return target


def _names(source: Path) -> list[str]:
    """All Minari datasets below a folder, as paths from it; hidden ones are half-written."""
    paths = [path.relative_to(source).parent.parent for path in source.rglob("data/metadata.json")]
    return sorted(p.as_posix() for p in paths if not any(part[0] == "." for part in p.parts))


def _read(minari, path: Path) -> tuple[dict, list]:
    """metadata.json and the episodes of one Minari dataset."""
    try:
        metadata = json.loads((path / "data" / "metadata.json").read_text())
        if not {"observation_space", "action_space"} <= metadata.keys():
            # Minari would make the environment that the file names.
            raise ValueError("its metadata.json names no spaces")
        dataset = minari.MinariDataset(path / "data")
        return metadata | {"env_spec": dataset.env_spec}, list(dataset)
    except Exception as error:  # whatever its storages raise
        raise ValueError(f"{path} is no whole Minari dataset ({error!r})") from None


def _arrays(episodes: list) -> dict[str, np.ndarray]:
    """Minari's episodes as a dataset folder has them: (E, T, ...), without the last observation."""
    return {
        "states": np.stack([episode.observations[:-1] for episode in episodes]),
        "actions": np.stack([episode.actions for episode in episodes]),
        "rewards": np.stack([episode.rewards for episode in episodes]),
    }


def _exported(source: Path, datasets: dict, env: str | None) -> tuple[dict, list]:
    """meta.json and the parts of datasets that were exported from here, as they were."""
    parts, metas = {}, []
    for name, (metadata, episodes) in datasets.items():
        try:
            origin, part = metadata["t2mir"], _arrays(episodes)
            with np.load(source / name / "data" / "queries.npz", allow_pickle=False) as file:
                part |= dict(file)
            part = {key: part[key].astype(origin["types"][key]) for key in ARRAYS}
            if _checksum(part, origin["task"], origin["meta"]) != origin["checksum"]:
                raise ValueError("its checksum differs")
            named, number = origin["meta"]["env"], origin["task"]
            if not isinstance(named, str) or not isinstance(number, int):
                raise ValueError("it names no environment or no task")
            list(origin["meta"]["train_tasks"])
        except Exception as error:  # a missing entry or file, other shapes, no archive
            raise ValueError(f"{source / name} is not as it was exported ({error!r})") from None
        parts[origin["task"]] = part
        metas.append(origin["meta"])
    meta = metas[0]
    if any(other != meta for other in metas):
        raise ValueError(
            f"{source} holds tasks of more than one dataset: name a folder below it, or --ids"
        )
    _check_env(source, meta["env"], env)
    tasks = len(meta["train_tasks"])
    if sorted(parts) != list(range(tasks)) or len(datasets) != tasks:
        raise ValueError(
            f"{source} holds {len(datasets)} of the dataset's {tasks} tasks: "
            "all are needed, each once"
        )
    return meta | {"env": env or meta["env"]}, [parts[i] for i in range(tasks)]


def _check_env(source: Path, exported: str, env: str | None) -> None:
    """Whether --env (None: not given) may stand for the family that was exported."""
    in_file = exported.endswith(".py")
    if in_file and env is None:  # reading it runs it: not because a dataset says so
        raise ValueError(
            f"{source} holds data of a family of its own, '{exported}': name that file, --env FILE"
        )
    moved = in_file and str(env).endswith(".py")  # a file may have another name by now
    if env not in (None, exported) and not moved:
        raise ValueError(f"{source} holds data of '{exported}', not of '{env}'")


def _foreign(
    datasets: dict, env: str, split: tuple[list, list], queries: int, seed: int
) -> tuple[dict, list]:
    """meta.json and the parts of datasets that were made elsewhere."""
    family, (train, test), parts = get_family(env), split, []
    for task, (name, (metadata, episodes)) in zip(train, datasets.items(), strict=True):
        made_by = metadata["env_spec"]  # Gymnasium's, if the file names an environment
        if made_by is not None and family.gym_id not in ("", made_by.id):
            raise ValueError(
                f"{name} holds data of '{made_by.id}', not of {env} ('{family.gym_id}')"
            )
        if made_by is not None and check_tasks(env, [made_by.kwargs.get("task", task)]) != [task]:
            raise ValueError(
                f"{name} was made in task {made_by.kwargs['task']}, and --tasks says {task}"
            )
        parts.append(_foreign_part(name, episodes, family))
    counts = [len(part["rewards"]) for part in parts]
    least = min(counts)  # every task has as many episodes in a dataset folder
    left_out = sum(counts) - least * len(parts)
    print(f"{len(parts)} tasks x {least} episodes", end="")
    print(f"; {left_out} left out, so that every task has as many" if left_out else "")
    steps = least * family.horizon
    for i, part in enumerate(parts):
        part |= {key: part[key][:least] for key in EPISODE}
        # Different steps of the data, as long as there are enough.
        rng = np.random.default_rng([seed, 2, i])
        pick = rng.choice(steps, queries, replace=queries > steps)
        part |= {f"query_{key}": np.concatenate(part[key])[pick] for key in ("states", "actions")}
    meta = {
        "format": FORMAT,
        "env": env,
        "data_episodes": least,
        "data_queries": queries,
        "data_seed": seed,
        "horizon": family.horizon,
        "train_tasks": train,
        "test_tasks": test,
        "minari": list(datasets),
    }
    return meta, parts


def _foreign_part(name: str, episodes: list, family: Family) -> dict[str, np.ndarray]:
    """The episodes of one dataset: ids as they are, all other numbers as float32."""
    steps = family.horizon
    shapes = {
        "observations": (steps + 1, family.state_dim),
        "actions": (steps,) if family.discrete_actions else (steps, family.action_dim),
        "rewards": (steps,),
    }
    if not episodes:
        raise ValueError(f"{name} holds no episodes")
    for episode in episodes:
        if len(episode) != steps:
            raise ValueError(
                f"{name}: episode {episode.id} has {len(episode)} steps, those of {family.name} "
                f"have {steps}"
            )
        for key, shape in shapes.items():
            # Minari also has observations that are no arrays (Dict and Tuple spaces).
            is_shape = getattr(getattr(episode, key), "shape", None)
            if is_shape != shape:
                raise ValueError(
                    f"{name}: {key} of episode {episode.id} have shape {is_shape}, not {shape}"
                )
    ids = {"states": family.state_values is not None, "actions": family.discrete_actions}
    arrays = _arrays(episodes)
    return {
        key: array if ids.get(key) else array.astype(np.float32) for key, array in arrays.items()
    }


def main() -> None:
    commands = {"export": export_minari, "import": import_minari}
    result = tyro.extras.subcommand_cli_from_dict(commands)
    if isinstance(result, list):
        print(f"{len(result)} Minari datasets, the first {result[0]}")
    else:
        print(result)


if __name__ == "__main__":
    one_line(main, "nothing was written")
