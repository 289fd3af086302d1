"""minari_io.py: datasets to Minari's format and back (https://minari.farama.org, Farama's for offline RL).

in : a dataset folder, or Minari datasets       out: Minari datasets, one a training task, or a dataset folder
Read after collect.py. An optional extra:       pip install 't2mir[minari]'

    TARGET/t2mir/darkroom-mixed/task-000-v0/data/    metadata.json    Minari's, with an entry `t2mir`
                                                     main_data.hdf5   Minari's: the episodes
                                                     queries.npz      query_states, query_actions (DPT)

The entry `t2mir` is what makes the way back exact: this task's number, the whole meta.json (environment, quality,
seeds, training and held-out tasks), the arrays' types (here they have those of the environment's spaces) and a
checksum of them. Minari has T + 1 observations in an episode of T steps, a dataset folder has T: the last one is
*repeated*, not observed. Episodes are truncated at the horizon, never terminated. Neither Minari nor this file reads
or writes a pickle; Minari can make the environment that a file names, so none is read that asks for it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from tyro.conf import Positional

from data import ARRAYS, FORMAT, file_hash, load_dataset, load_part, part_name
from envs import EnvSpec, check_tasks, get_spec, split_tasks
from files import need_space, progress, save_arrays, write_atomically

QUERIES = "queries.npz"


def _minari(who: str):
    try:
        import h5py  # noqa: F401 (the storage of Minari's default format)
        import minari
    except ImportError:
        raise ValueError(f"{who} needs Minari: pip install 't2mir[minari]'") from None
    return minari


@contextmanager
def _whole(folder: Path, inside: str = "") -> Iterator[Path]:
    """A temporary folder; `inside` it is what becomes `folder` at the end, or nothing does."""
    if folder.exists():
        raise ValueError(f"{folder} exists and is never overwritten: name another folder, or remove it")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        (temporary / inside).rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(part: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name in ARRAYS:
        sha.update(f"{name} {part[name].dtype.str} {part[name].shape}".encode() + part[name].tobytes())
    return sha.hexdigest()


# ------------------------------------------------------------------------------------------- export
def export_minari(folder: Positional[Path], target: Positional[Path]) -> list[str]:
    """Write the dataset in FOLDER as Minari datasets under TARGET: set MINARI_DATASETS_PATH to it to use them.

    Returns their ids. Raises ValueError with one line for a dataset that is not whole and one that is there already.

    Args:
        folder: a dataset's folder, datasets/...
        target: a folder for Minari datasets; may hold others.
    """
    minari, folder = _minari("--export-minari"), Path(folder)
    meta = load_dataset(folder).meta  # checks all of it
    spec, tasks = get_spec(meta["env"]), meta["train_tasks"]
    name = "-".join(meta[k] for k in ("env", "quality", "recipe") if meta.get(k) not in (None, "paper"))
    final, ids = Path(target) / "t2mir" / name, [f"t2mir/{name}/task-{i:03d}-v0" for i in range(len(tasks))]
    need_space(final, len(tasks) * meta["episodes"] * (spec.horizon + 1) * 8 * (spec.state_dim + spec.action_dim + 1))
    with _whole(final, inside=f"t2mir/{name}") as root:
        for i, task in enumerate(progress(tasks, desc=f"exporting {name}", unit="task")):
            part = load_part(folder, i, meta, spec)
            about = {"task": i, "meta": meta, "last_observation": "repeated", "digest": _digest(part)}
            about["types"] = {key: array.dtype.str for key, array in part.items()}
            _export_task(minari, root, ids[i], spec, task, part, about)
    if not (final.parent / "namespace_metadata.json").exists():  # makes that folder one of Minari's namespaces
        write_atomically(final.parent / "namespace_metadata.json", lambda path: path.write_text("{}"))
    return ids


def _export_task(minari, root: Path, name: str, spec: EnvSpec, task, part: dict, about: dict) -> None:
    how = copy.deepcopy(gym.spec(spec.gym_id))
    how.kwargs = {"task": task}
    if callable(how.entry_point):  # a file can hold its name alone
        how.entry_point = f"{how.entry_point.__module__}:{how.entry_point.__qualname__}"
    env = gym.make(how)

    def cast(array: np.ndarray, space: gym.Space) -> np.ndarray:
        return array.astype(space.dtype) if np.can_cast(array.dtype, space.dtype) else array

    states = cast(np.concatenate([part["states"], part["states"][:, -1:]], axis=1), env.observation_space)
    actions, last = cast(part["actions"], env.action_space), np.arange(spec.horizon) == spec.horizon - 1
    buffer = [
        minari.data_collector.EpisodeBuffer(
            id=i, observations=states[i], actions=actions[i], rewards=rewards, terminations=~last & last,
            truncations=last, infos={},
        )
        for i, rewards in enumerate(part["rewards"])
    ]  # fmt: skip
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    try:
        with warnings.catch_warnings(action="ignore"):  # that nobody is named as its author
            text = (
                f"In-context RL: {spec.name}, task {task}. The last observation of an episode repeats the one before."
            )
            made = minari.create_dataset_from_buffers(name, buffer, env=env, description=text)
    finally:
        os.environ.pop("MINARI_DATASETS_PATH")
        os.environ |= {} if before is None else {"MINARI_DATASETS_PATH": before}
        env.close()
    made.storage.update_metadata({"t2mir": about})
    save_arrays(Path(made.storage.data_path) / QUERIES, {k: v for k, v in part.items() if k.startswith("query")})


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
    """Make the Minari datasets in SOURCE, one a training task, the dataset folder TARGET. Returns it.

    Those that were exported from here come back as they were, bit for bit. Others need --env and --tasks; their
    queries are steps of the data itself with the actions taken (as App. D.2 has it for Reach and Push). Raises
    ValueError with one line for whatever does not fit, before anything is written.

    Args:
        source: a folder of Minari datasets, such as Minari's root or a namespace in it.
        target: the dataset folder to make.
        env: task family.
        tasks: JSON file {"train": [...], "test": [...]}; training tasks in the order of the datasets.
        ids: datasets, as paths from SOURCE; all there are, sorted by name, if not given.
        queries: labelled states of each task; exported datasets bring theirs.
        seed: seed of their choice.
    """
    minari, source, target = _minari("minari_io.py import"), Path(source), Path(target)
    if target.exists():
        raise ValueError(f"{target} exists and is never overwritten: name another folder, or remove it")
    paths = (path.parent.parent.relative_to(source) for path in source.rglob("data/metadata.json"))
    names = ids or sorted(path.as_posix() for path in paths if not str(path).startswith(".") and "/." not in str(path))
    if not names:
        raise ValueError(f"{source} holds no Minari datasets")
    read = {name: _read(minari, source / name) for name in progress(names, desc=f"reading {source}", unit="task")}
    own = ["t2mir" in about for about, _, _ in read.values()]
    if any(own) != all(own):
        raise ValueError(f"{names[own.index(True)]} was exported from here and {names[own.index(False)]} was not")
    if own[0]:
        if tasks is not None:
            raise ValueError("--tasks is for datasets made elsewhere; these know theirs")
        meta, parts = _exported(source, read, env)
    else:
        meta, parts = _foreign(read, env, tasks, queries, seed)
    need_space(target, sum(array.nbytes for part in parts for array in part.values()))
    with _whole(target) as folder:
        for i, part in enumerate(parts):
            save_arrays(folder / part_name(i), part)
        meta |= {"sha256": [file_hash(folder / part_name(i)) for i in range(len(parts))]}
        write_atomically(folder / "meta.json", lambda path: path.write_text(json.dumps(meta)))
    return target


def _read(minari, path: Path) -> tuple[dict, gym.envs.registration.EnvSpec | None, list]:
    """metadata.json, what made the data, and the episodes."""
    try:
        about = json.loads((path / "data" / "metadata.json").read_text())
        if not {"observation_space", "action_space"} <= about.keys():  # or Minari would make the environment
            raise ValueError("its metadata.json names no spaces")
        dataset = minari.MinariDataset(path / "data")
        return about, dataset.env_spec, list(dataset)
    except Exception as error:  # whatever its storages raise
        raise ValueError(f"{path} is no whole Minari dataset ({(str(error) or repr(error)).splitlines()[0]})") from None


def _exported(source: Path, read: dict, env: str | None) -> tuple[dict, list]:
    """Meta and parts as they were exported."""
    parts, metas = {}, []
    for name, (about, _, episodes) in read.items():
        try:
            own = about["t2mir"]
            fields = {"actions": [e.actions for e in episodes], "rewards": [e.rewards for e in episodes]}
            fields["states"] = [e.observations[:-1] for e in episodes]
            with np.load(source / name / "data" / QUERIES, allow_pickle=False) as file:
                fields |= dict(file)
            part = {key: np.asarray(fields[key]).astype(own["types"][key]) for key in ARRAYS}
            if _digest(part) != own["digest"]:
                raise ValueError("another checksum")
            parts[own["task"]], _ = part, metas.append(own["meta"])
        except Exception as error:  # a missing entry or file, arrays of other shapes, an archive that is none
            why = (str(error) or repr(error)).splitlines()[0]
            raise ValueError(f"{source / name} is not as it was exported ({why})") from None
    meta = metas[0]
    if any(other != meta for other in metas):
        raise ValueError(f"{source} holds tasks of more than one dataset: name a folder below it, or --ids")
    if meta.get("format") != FORMAT or env not in (None, meta.get("env")):
        raise ValueError(f"{source} holds data of '{meta.get('env')}' in format {meta.get('format')}, not of '{env}'")
    if sorted(parts) != list(range(len(meta["train_tasks"]))) or len(parts) != len(read):
        raise ValueError(f"{source}: {len(read)} datasets of {len(meta['train_tasks'])}: every task is needed, once")
    return meta, [parts[i] for i in sorted(parts)]


def _foreign(read: dict, env: str | None, tasks: Path | None, queries: int, seed: int) -> tuple[dict, list]:
    """Meta and parts of datasets that were made elsewhere."""
    if env is None or tasks is None:
        raise ValueError("these datasets were not exported from here: say --env and --tasks")
    spec, (train, test) = get_spec(env), split_tasks(env, file=tasks)
    if len(train) != len(read):
        raise ValueError(f"{tasks} names {len(train)} training tasks, and there are {len(read)} datasets")
    if queries < 1:
        raise ValueError("--queries must be at least 1")
    parts = []
    for i, (name, (_, made_by, episodes)) in enumerate(read.items()):
        if made_by is not None and made_by.id != spec.gym_id:
            raise ValueError(f"{name} holds data of '{made_by.id}', not of {env} ('{spec.gym_id}')")
        known = check_tasks(env, [made_by.kwargs["task"]])[0] if made_by and "task" in made_by.kwargs else train[i]
        if known != train[i]:
            raise ValueError(f"{name} was made in task {known}, and {tasks} says {train[i]}")
        parts.append(_foreign_part(name, episodes, spec))
    least = min(len(part["rewards"]) for part in parts)
    left = sum(len(part["rewards"]) - least for part in parts)
    print(f"{len(parts)} tasks x {least} episodes" + f"; {left} left out, so that every task has as many" * (left > 0))
    for i, part in enumerate(parts):
        parts[i] = part = {key: array[:least] for key, array in part.items()}
        pick = np.random.default_rng([seed, 2, i]).choice(steps := least * spec.horizon, queries, queries > steps)
        for key in ("states", "actions"):
            part[f"query_{key}"] = part[key].reshape(steps, *part[key].shape[2:])[pick]
    meta = {"format": FORMAT, "env": env, "recipe": "imported", "episodes": least, "queries": queries, "seed": seed}
    return meta | {"horizon": spec.horizon, "train_tasks": train, "test_tasks": test, "minari": list(read)}, parts


def _foreign_part(name: str, episodes: list, spec: EnvSpec) -> dict[str, np.ndarray]:
    """Checked states, actions and rewards of one dataset: small ids or float32."""
    steps, tail = spec.horizon, () if spec.discrete_actions else (spec.action_dim,)
    if not episodes:
        raise ValueError(f"{name} holds no episodes")
    for episode in episodes:
        if len(episode) != steps:
            raise ValueError(f"{name}: episode {episode.id} has {len(episode)} steps, one of {spec.name} has {steps}")
        for key, want in ("observations", (steps + 1, spec.state_dim)), ("actions", (steps, *tail)):
            shape = getattr(getattr(episode, key), "shape", None)
            if shape != want:
                raise ValueError(f"{name}: {key} of episode {episode.id} have shape {shape}, not {want}")
    limits = {"states": spec.state_values, "actions": spec.action_dim if spec.discrete_actions else None}
    part = {"states": np.stack([e.observations[:-1] for e in episodes])}
    part |= {key: np.stack([getattr(e, key) for e in episodes]) for key in ("actions", "rewards")}
    for key, array in part.items():
        limit = limits.get(key)
        if array.dtype.kind not in ("uif" if limit is None else "ui"):
            raise ValueError(f"{name}: {key} have type {array.dtype}, not {'whole ' * (limit is not None)}numbers")
        if limit is not None and ((array < 0) | (array >= np.array(limit))).any():
            raise ValueError(f"{name}: {key} hold ids outside the range of {spec.name}")
        part[key] = array.astype(np.float32 if limit is None else np.min_scalar_type(np.max(limit)))
        if not np.isfinite(part[key]).all():
            raise ValueError(f"{name}: {key} hold values that are not finite")
    return part


if __name__ == "__main__":
    try:
        done = tyro.extras.subcommand_cli_from_dict({"export": export_minari, "import": import_minari})
        print(done if isinstance(done, Path) else f"{len(done)} Minari datasets: {done[0]} and so on")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; nothing was written") from None
