"""minari_io.py: datasets to Minari's format and back (https://minari.farama.org, Farama's for offline RL).

in : a dataset folder, or Minari datasets       out: Minari datasets, one a training task, or a dataset folder
Read after collect.py. An optional extra:       pip install 't2mir[minari]'

    TARGET/t2mir/darkroom-mixed/task-000-v0/data/    metadata.json    Minari's, with an entry `t2mir`
                                                     main_data.hdf5   Minari's: the episodes
                                                     queries.npz      query_states, query_actions (DPT)

The entry `t2mir` is what makes the way back exact: this task's number, the whole meta.json (environment, quality,
seeds, training and held-out tasks), the arrays' types (here they have those of the environment's spaces) and a
checksum of it all. Minari has T + 1 observations in an episode of T steps, a dataset folder has T: the last one is
*repeated*, not observed. Episodes are truncated at the horizon, never terminated. Neither Minari nor this file reads
or writes a pickle; Minari would make an environment that a file names to learn its spaces, so such files are refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from tyro.conf import Positional

from data import ARRAYS, FORMAT, file_hash, load_dataset, load_part, part_name
from envs import Family, check_tasks, get_family, split_tasks
from support.files import need_space, progress, save_arrays, write_atomically


def _minari(who: str):
    try:
        import h5py  # noqa: F401 (Minari's storage)
        import minari
    except ImportError:
        raise ValueError(f"{who} needs Minari: pip install 't2mir[minari]'") from None
    return minari


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end, if all went well."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise ValueError(
            f"{folder} exists and is never overwritten: name another folder, or remove it"
        )


def _digest(part: dict[str, np.ndarray], task: int, meta: dict) -> str:
    about = json.dumps(
        [task, meta, [(name, part[name].dtype.str, part[name].shape) for name in ARRAYS]]
    )
    return hashlib.sha256(
        b"".join([about.encode(), *(part[name].tobytes() for name in ARRAYS)])
    ).hexdigest()


# ------------------------------------------------------------------------------------------- export
def export_minari(
    folder: Positional[Path], target: Positional[Path], env: str | None = None
) -> list[str]:
    """Write the dataset in FOLDER as Minari datasets under TARGET, Minari's root (MINARI_DATASETS_PATH). Returns ids.

    Raises ValueError with one line for a dataset that is not whole and for one that is there already.

    Args:
        folder: a finished dataset folder.
        target: where to write.
        env: for data of a family of your own, the file that defines it.
    """
    minari, folder = _minari("--export-minari"), Path(folder)
    meta = load_dataset(folder, env).meta  # checks all of it
    spec, tasks = get_family(meta["env"]), meta["train_tasks"]
    kind = [meta[key] for key in ("quality", "recipe") if meta.get(key) not in (None, "paper")]
    name = re.sub(r"[^-\w]+", "-", "-".join([spec.name, *kind]))
    # absolute: Minari joins a relative path to itself
    final, ids = (
        Path(target).absolute() / "t2mir" / name,
        [f"t2mir/{name}/task-{i:03d}-v0" for i in range(len(tasks))],
    )
    _refuse_existing(final)
    need_space(
        final,
        len(tasks)
        * meta["episodes"]
        * (spec.horizon + 1)
        * 8
        * (spec.state_dim + spec.action_dim + 1),
    )
    with _whole(final) as root:
        for i, task in enumerate(progress(tasks, desc=f"exporting {name}", unit="task")):
            part = load_part(folder, i, meta, spec)
            about = {
                "task": i,
                "meta": meta,
                "last_observation": "repeated",
                "digest": _digest(part, i, meta),
            }
            about["types"] = {key: array.dtype.str for key, array in part.items()}
            _export_task(minari, root / Path(ids[i]).name / "data", ids[i], spec, task, part, about)
    return ids


def _described(spec: Family, task) -> tuple:
    """Observation space, action space and Gymnasium's spec of one task's environment; None: it has none there."""
    if spec.gym_id not in gym.registry:
        box = gym.spaces.Box(-np.inf, np.inf, (spec.state_dim,))
        box = gym.spaces.MultiDiscrete(spec.state_values) if spec.state_values else box
        moves = (
            gym.spaces.Discrete(spec.action_dim)
            if spec.discrete_actions
            else gym.spaces.Box(-1, 1, (spec.action_dim,))
        )
        return box, moves, None
    made_by = copy.deepcopy(gym.spec(spec.gym_id))
    made_by.kwargs |= {"task": task}
    if callable(made_by.entry_point):  # a file can hold its name alone
        made_by.entry_point = f"{made_by.entry_point.__module__}:{made_by.entry_point.__qualname__}"
    env = gym.make(made_by)
    env.close()
    return env.observation_space, env.action_space, made_by


def _export_task(
    minari, path: Path, name: str, spec: Family, task, part: dict, about: dict
) -> None:
    observation_space, action_space, made_by = _described(spec, task)

    def cast(array: np.ndarray, space: gym.Space) -> np.ndarray:
        return array.astype(space.dtype) if np.can_cast(array.dtype, space.dtype) else array

    states = cast(
        np.concatenate([part["states"], part["states"][:, -1:]], axis=1), observation_space
    )
    actions, last = cast(part["actions"], action_space), np.arange(spec.horizon) == spec.horizon - 1
    episodes = [
        minari.data_collector.EpisodeBuffer(
            observations=s,
            actions=a,
            rewards=r,
            terminations=np.zeros_like(last),
            truncations=last,
            infos={},
        )
        for s, a, r in zip(states, actions, part["rewards"], strict=True)
    ]
    path.mkdir(parents=True)
    new = minari.dataset.minari_storage.MinariStorage.new
    storage = new(path, observation_space, action_space, env_spec=made_by)
    text = f"In-context reinforcement learning: {spec.name}, training task {about['task']} ({task})"
    own = {
        "dataset_id": name,
        "minari_version": minari.__version__,
        "description": text,
        "t2mir": about,
    }
    storage.update_metadata(own)
    storage.update_episodes(episodes)
    save_arrays(path / "queries.npz", {k: part[k] for k in ("query_states", "query_actions")})


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
    """Make the dataset folder TARGET of the Minari datasets in SOURCE, one a training task. Returns it.

    Those that were exported from here come back as they were, bit for bit. Others need --env and --tasks; their
    queries are steps of the data itself with the actions taken, as App. D.2 has it for Reach and Push. Raises
    ValueError with one line for whatever does not fit; there is no TARGET then.

    Args:
        source: a folder of Minari datasets, such as Minari's root or a namespace in it.
        target: the dataset folder to make.
        env: task family; for one of your own the file that defines it.
        tasks: JSON file {"train": [...], "test": [...]}; training tasks in the order of the datasets.
        ids: datasets, as paths from SOURCE; if not given, all there are, by name.
        queries: labelled states of each task; exported datasets bring theirs.
        seed: seed of their choice.
    """
    minari, source, target = _minari("minari_io.py import"), Path(source).absolute(), Path(target)
    _refuse_existing(target)
    paths = [path.parent.parent.relative_to(source) for path in source.rglob("data/metadata.json")]
    names = ids or sorted(
        path.as_posix() for path in paths if not any(part[0] == "." for part in path.parts)
    )
    if not names:
        raise ValueError(f"{source} holds no Minari datasets")
    read = {
        name: _read(minari, source / name)
        for name in progress(names, desc=f"reading {source}", unit="task")
    }
    if tasks is None and all("t2mir" in about for about, _, _ in read.values()):
        meta, parts = _exported(source, read, env)
    elif env is None or tasks is None:
        raise ValueError(
            f"not all datasets in {source} were exported from here: say --env and --tasks"
        )
    else:
        meta, parts = _foreign(read, env, tasks, queries, seed)
    need_space(target, sum(array.nbytes for part in parts for array in part.values()))
    with _whole(target) as folder:
        for i, part in enumerate(parts):
            save_arrays(folder / part_name(i), part)
        meta |= {"sha256": [file_hash(folder / part_name(i)) for i in range(len(parts))]}
        write_atomically(folder / "meta.json", lambda path: path.write_text(json.dumps(meta)))
        try:
            load_dataset(folder, meta["env"])  # what it refuses does not come to be
        except ValueError as error:
            raise ValueError(
                f"{source}: {str(error).replace(f'{folder}/', '').split(';')[0]}"
            ) from None
    return target


def _read(minari, path: Path) -> tuple:
    """metadata.json, Gymnasium's spec of what made the data (or None), and the episodes."""
    try:
        about = json.loads((path / "data" / "metadata.json").read_text())
        if (
            not {"observation_space", "action_space"} <= about.keys()
        ):  # Minari would make the environment
            raise ValueError("its metadata.json names no spaces")
        dataset = minari.MinariDataset(path / "data")
        return about, dataset.env_spec, list(dataset)
    except Exception as error:  # whatever its storages raise
        raise ValueError(f"{path} is no whole Minari dataset ({error!r})") from None


def _exported(source: Path, read: dict, env: str | None) -> tuple[dict, list]:
    """Meta and parts as they were exported."""
    parts, metas = {}, []
    for name, (about, _, episodes) in read.items():
        try:
            own, part = about["t2mir"], {"states": [e.observations[:-1] for e in episodes]}
            part |= {key: [getattr(e, key) for e in episodes] for key in ("actions", "rewards")}
            with np.load(source / name / "data" / "queries.npz", allow_pickle=False) as file:
                part |= dict(file)
            part = {key: np.asarray(part[key]).astype(own["types"][key]) for key in ARRAYS}
            if _digest(part, own["task"], own["meta"]) != own["digest"]:
                raise ValueError("its checksum differs")
            parts[own["task"]] = part
            metas.append(own["meta"])
            tasks, known = len(own["meta"]["train_tasks"]), str(own["meta"]["env"])
        except (
            Exception
        ) as error:  # a missing entry or file, arrays of other shapes, an archive that is none
            raise ValueError(f"{source / name} is not as it was exported ({error!r})") from None
    if any(meta != metas[0] for meta in metas):
        raise ValueError(
            f"{source} holds tasks of more than one dataset: name a folder below it, or --ids"
        )
    if known.endswith(".py") and env is None:  # reading it runs it
        raise ValueError(
            f"{source} holds data of a family of its own, '{known}': name that file, --env FILE"
        )
    if env not in (None, known) and not (known.endswith(".py") and env.endswith(".py")):
        raise ValueError(f"{source} holds data of '{known}', not of '{env}'")
    if sorted(parts) != list(range(tasks)) or len(read) != tasks:
        raise ValueError(
            f"{source} holds {len(read)} of the dataset's {tasks} tasks: all are needed, each once"
        )
    return metas[0] | {"env": env or known}, [parts[i] for i in range(tasks)]


def _foreign(read: dict, env: str, tasks: Path, queries: int, seed: int) -> tuple[dict, list]:
    """Meta and parts of datasets that were made elsewhere."""
    spec, (train, test), parts = get_family(env), split_tasks(env, file=tasks), []
    if len(train) != len(read):
        raise ValueError(
            f"{tasks} names {len(train)} training tasks, and there are {len(read)} datasets"
        )
    if queries < 1:
        raise ValueError("--queries must be at least 1")
    for task, (name, (_, made_by, episodes)) in zip(train, read.items(), strict=True):
        if made_by is not None and spec.gym_id not in ("", made_by.id):
            raise ValueError(f"{name} holds data of '{made_by.id}', not of {env} ('{spec.gym_id}')")
        if made_by is not None and check_tasks(env, [made_by.kwargs.get("task", task)]) != [task]:
            raise ValueError(
                f"{name} was made in task {made_by.kwargs['task']}, and {tasks} says {task}"
            )
        parts.append(_foreign_part(name, episodes, spec))
    least = min(len(part["rewards"]) for part in parts)
    left = sum(len(part["rewards"]) - least for part in parts)
    print(
        f"{len(parts)} tasks x {least} episodes"
        + f"; {left} left out, so that every task has as many" * (left > 0)
    )
    steps = least * spec.horizon
    for i, part in enumerate(parts):
        part |= {key: array[:least] for key, array in part.items()}
        pick = np.random.default_rng([seed, 2, i]).choice(steps, queries, replace=queries > steps)
        part |= {f"query_{key}": np.concatenate(part[key])[pick] for key in ("states", "actions")}
    meta = {
        "format": FORMAT,
        "env": env,
        "recipe": "imported",
        "episodes": least,
        "queries": queries,
        "seed": seed,
    }
    return meta | {
        "horizon": spec.horizon,
        "train_tasks": train,
        "test_tasks": test,
        "minari": list(read),
    }, parts


def _foreign_part(name: str, episodes: list, spec: Family) -> dict[str, np.ndarray]:
    """The episodes of one dataset; continuous numbers as float32."""
    horizon, tail = spec.horizon, () if spec.discrete_actions else (spec.action_dim,)
    want = {
        "observations": (horizon + 1, spec.state_dim),
        "actions": (horizon, *tail),
        "rewards": (horizon,),
    }
    if not episodes:
        raise ValueError(f"{name} holds no episodes")
    for e in episodes:
        if len(e) != horizon:
            raise ValueError(
                f"{name}: episode {e.id} has {len(e)} steps, those of {spec.name} have {horizon}"
            )
        for key, shape in want.items():
            found = getattr(getattr(e, key), "shape", None)
            if found != shape:
                raise ValueError(f"{name}: {key} of episode {e.id} have shape {found}, not {shape}")
    part = {"states": np.stack([e.observations[:-1] for e in episodes])}
    part |= {key: np.stack([getattr(e, key) for e in episodes]) for key in ("actions", "rewards")}
    whole = {
        "states": spec.state_values is not None,
        "actions": spec.discrete_actions,
        "rewards": False,
    }
    return {key: array if whole[key] else array.astype(np.float32) for key, array in part.items()}


if __name__ == "__main__":
    try:
        done = tyro.extras.subcommand_cli_from_dict(
            {"export": export_minari, "import": import_minari}
        )
        print(
            done if isinstance(done, Path) else f"{len(done)} Minari datasets, the first {done[0]}"
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; nothing was written") from None
