"""collect.py: offline datasets (App. D.2; Algorithm 3, lines 1-6).

in : a task family, quality, recipe (config.Collection)      out: a folder that data.py reads
Read after envs.py, before data.py.   Try: python collect.py --env point-robot --quality medium

    datasets/<name>/task-000.npz   D_i and D_i^q of a training task: states, actions, rewards;
                                   query_states, query_actions
                    meta.json      settings, tasks, checksums, reference returns; written last
    datasets/teachers/             the trained policies, which serve all qualities and recipes

Who acts is said elsewhere. DarkRoom's data are made by a rule, a noisy teacher that the family
itself plays (`Family.collect_task`). In all other families one policy a task (or one for all,
--teacher one), trained by SAC or PPO, is rolled out at all stages of its training (teachers/).
Here: what is kept, in which order it is made, and how a stopped run goes on. Training the teachers
is most of the work.

Tasks are independent: they run in `--workers` processes or, with `--cluster`, on Ray.
"""

from __future__ import annotations

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C should not be a traceback
    from support.stop import at_once

    at_once()

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from config import Collection, Teachers
from data import FORMAT, file_hash, load_part, part_name, read_meta, wrong_with
from envs import get_family, split_tasks, try_family
from support.distributed import resolve_device
from support.files import (
    Damaged,
    check_folder,
    need_space,
    only_writer,
    progress,
    save_arrays,
    save_json,
    set_aside,
)
from support.jobs import bar_of, check_cluster, run_jobs
from support.settings import check_types, said, short_hash
from support.user_file import code_of, users_code
from teachers.ppo import PPOConfig
from teachers.rollouts import make_part, parts_of
from teachers.sac import SACConfig
from teachers.teachers import TrainedTeachers, algorithm, describe, processes, train_teachers


# ---------------------------------------------------------------------- Algorithm 3, lines 1-6
def collect(cfg: Collection, quiet: bool = False) -> Path:
    """D_train and D_train^q: write the dataset folder of `cfg`, or finish a stopped one.

    Parts that are whole are kept as they are; one that is missing or damaged is made anew, alone.
    meta.json is written last, so that a folder that has one is complete. Returns the folder. Raises
    ValueError with one line for bad settings, a full disk, or a folder that another process is
    writing or that holds something else.
    """
    check(cfg)
    folder, meta = dataset_folder(cfg), describe_dataset(cfg)
    if is_whole(folder, meta):
        if not quiet:
            print(f"{folder} is complete")
        return folder
    check_folder("--datasets", cfg.data.datasets)
    need_space(folder, disk_space(cfg, meta))  # now rather than after hours of training teachers
    with only_writer(folder):  # two commands at once would mix their parts
        tasks = range(len(meta["train_tasks"]))
        paths = [folder / part_name(i) for i in tasks]
        make_room(folder, meta)

        # lines 1-5: for each task M_i its dataset D_i, and the labelled queries D_i^q
        trained_by = teacher_algorithm(cfg)
        if trained_by is None:
            follow_rule(cfg, meta, paths, quiet)
        else:
            meta |= follow_teachers(cfg, meta, paths, quiet)

        # line 6: all of them together, with the checksums of the parts
        meta["sha256"] = [file_hash(path) for path in paths]
        family = get_family(cfg.data.env)
        returns = np.stack([load_part(folder, i, meta, family)["rewards"].sum(-1) for i in tasks])
        if trained_by is not None:
            meta["maximum"] = maximum(meta["reference"]["train"], returns)  # returns: (N, E)
        save_json(folder / "meta.json", meta)
    if not quiet:
        print(summary(folder, meta, returns))
    return folder


def follow_rule(cfg: Collection, meta: dict, paths: Sequence[Path], quiet: bool) -> None:
    """The parts that are missing, played by the family's own rule."""
    title = f"collecting {paths[0].parent.name}"
    for i in progress(range(len(paths)), desc=title, unit="task", disable=quiet):
        if not paths[i].exists():
            save_arrays(paths[i], part_by_rule(cfg, meta, i))


def part_by_rule(cfg: Collection, meta: dict, index: int) -> dict[str, np.ndarray]:
    """The arrays of training task `index`. ValueError with one line: a user's rule gives others."""
    env = cfg.data.env
    family = get_family(env)
    with users_code(env):
        given = family.collect_task(cfg.data, meta["train_tasks"], index) or {}
        part = {name: np.asarray(array) for name, array in given.items()}
    if wrong := wrong_with(part, meta, family):
        raise ValueError(f"--env {env}: of what collect_task gives, {wrong}")
    return part


def follow_teachers(cfg: Collection, meta: dict, paths: Sequence[Path], quiet: bool) -> dict:
    """Train the teachers (or find them), then let them play the parts that are missing.

    Returns what meta.json keeps of them.
    """
    data, train, test = cfg.data, meta["train_tasks"], meta["test_tasks"]
    # held-out tasks have teachers too: evaluations compare with their returns
    teachers = train_teachers(cfg, train, test, quiet)
    if not quiet:
        print(describe(teachers, train + test))

    behaviours = [teachers.behaviour(data.quality, i) for i in range(len(train))]
    # each part has random streams of its own, so those that a stopped run has left fit the others
    missing = [
        part for part in parts_of(data, train, behaviours, paths) if not Path(part.path).exists()
    ]
    title = f"collecting {paths[0].parent.name}"
    with bar_of(lambda: sum(p.exists() for p in paths), len(paths), title, "task", quiet) as watch:
        run_jobs(make_part, missing, processes(cfg.work), cfg.work.cluster, watch)
    level = teachers.level(teachers.sampled)  # (C, N)
    # of each training task, the level of the best checkpoint that plays
    best = [level[teachers.chosen(data.quality, i)[0], i].max() for i in range(len(train))]
    # D.2: medium's best level is "about 50 %" of mixed's; that it is can be read off these
    return {
        "reference": reference(teachers, len(train)),
        "behaviour": [behaviour.steps for behaviour in behaviours],
        "best_level": [round(float(value), 4) for value in best],
    }


# --------------------------------------------------------------- what is there, and how it is named
def is_whole(folder: Path, meta: dict) -> bool:
    """Whether the dataset is finished, and every part of it as it was written.

    Raises ValueError when the folder holds other settings or tasks.
    """
    try:
        hashes = known_hashes(folder, meta)
    except Damaged:
        return False
    paths = [folder / part_name(i) for i in range(len(hashes))]
    return all(
        sha256 and path.is_file() and file_hash(path) == sha256
        for sha256, path in zip(hashes, paths, strict=True)
    )


def known_hashes(folder: Path, meta: dict) -> list[str | None]:
    """Checksums of a dataset that was complete once; None for each part of another.

    Raises ValueError when the folder holds other settings or tasks, Damaged for a damaged file.
    """
    if not (folder / "meta.json").exists():
        return [None] * len(meta["train_tasks"])
    kept = read_meta(folder, meta["env"])
    # only what is known before collecting: reference returns and checksums come later
    if any(kept.get(name) != value for name, value in meta.items()):
        raise ValueError(
            f"{folder} holds a dataset of other settings or tasks; "
            "use another --datasets or remove it"
        )
    return kept["sha256"]


def make_room(folder: Path, meta: dict) -> None:
    """Name what is damaged in the folder and set it aside, so that it is made anew."""
    try:
        hashes = known_hashes(folder, meta)
    except Damaged as error:  # the parts have checksums of their own: they may well be whole
        set_aside(folder / "meta.json", str(error).split("; ")[0])
        hashes = known_hashes(folder, meta)
    for i, sha256 in enumerate(hashes):
        path = folder / part_name(i)
        if not path.exists():
            continue
        # Of a stopped collection no checksum is known yet but the archive's own.
        known = sha256 or (file_hash(path) if path.is_file() else "")
        try:
            load_part(folder, i, {**meta, "sha256": {i: known}}, get_family(meta["env"]))
        except Damaged as error:
            set_aside(path, str(error).split("; ")[0])


def split_of(cfg: Collection) -> tuple[list, list]:
    """Training and held-out tasks. Raises ValueError for a bad task file."""
    data = cfg.data
    return split_tasks(data.env, data.task_seed, data.tasks, data.train_tasks, data.test_tasks)


def settings_of(cfg: Collection) -> dict:
    """What fixes the bytes, tasks aside."""
    where = ("tasks", "datasets")  # where things are does not matter
    # whatever settings Data has: one that is added counts without a line here
    settings = {name: value for name, value in said(cfg.data).items() if name not in where}
    trained_by = teacher_algorithm(cfg)
    if trained_by is None:
        return settings
    return settings | said(cfg.teachers) | {"algorithm": said(trained_by)}


def describe_dataset(cfg: Collection) -> dict:
    """What meta.json says before anything is collected."""
    train, test = split_of(cfg)
    facts = {"format": FORMAT, **settings_of(cfg), "horizon": get_family(cfg.data.env).horizon}
    return facts | {"train_tasks": train, "test_tasks": test}


def dataset_folder(cfg: Collection) -> Path:
    """One folder for each setting that changes the bytes; what its name does not say is hashed.

    Raises ValueError for a bad task file and for impossible settings.
    """
    data = cfg.data
    name = f"{get_family(data.env).name}-{data.quality}-{data.recipe}"
    name += f"-e{data.data_episodes}-q{data.data_queries}-t{data.task_seed}-s{data.data_seed}"
    own = code_of(data.env)  # whoever changes the reward in a file of theirs wants other data
    if data.tasks or data.train_tasks or data.test_tasks or teacher_algorithm(cfg) or own:
        # the algorithm too: where Table 2's defaults change in the code, so does the name
        everything = json.dumps([settings_of(cfg), split_of(cfg)]) + own
        name += f"-{short_hash(everything)}"
    return Path(data.datasets) / name


def disk_space(cfg: Collection, meta: dict) -> int:
    """Bytes of the parts, roughly: float32, or a byte for each coordinate of a grid."""
    family = get_family(cfg.data.env)
    numbers = family.state_dim + (1 if family.discrete_actions else family.action_dim) + 1
    steps = len(meta["train_tasks"]) * cfg.data.data_episodes * family.horizon
    return steps * numbers * (4 if family.state_values is None else 1)


# ------------------------------------------------------------------------------------- settings
def teacher_algorithm(cfg: Collection) -> SACConfig | PPOConfig | None:
    """How the teachers are trained; None where the teacher is a rule.

    Raises ValueError for settings that cannot be, and for settings of a rule.
    """
    env = cfg.data.env
    if get_family(env).teacher != "rule":
        return algorithm(env, cfg.teachers)
    # ignored in silence, they would seem to have had an effect
    if cfg.teachers != Teachers():
        raise ValueError(f"{env}'s teacher is a rule: it has no --teacher-... settings")
    if cfg.work.cluster:
        raise ValueError(f"{env}'s teacher is a rule, which needs no --cluster")
    return None


def check(cfg: Collection) -> None:
    """Raises ValueError with one line for settings that cannot be, before any work."""
    check_types(cfg)  # the bounds in config.py
    check_cluster(cfg.work.cluster)
    try_family(cfg.data.env)
    teacher_algorithm(cfg)
    resolve_device(cfg.work.teacher_device, "--teacher-device")


# ------------------------------------------------------------------------------ reference returns
def reference(teachers: TrainedTeachers, train: int) -> dict:
    """For each of the `train` first tasks, and for each held-out one behind them, three returns.

    The random policy's mean, the best checkpoint's mean, and the highest of any episode.
    """
    columns = {"random": teachers.random, "teacher": teachers.best, "highest": teachers.highest}
    return {
        split: {
            name: values[rows].astype(float).round(3).tolist() for name, values in columns.items()
        }
        for split, rows in (("train", slice(0, train)), ("test", slice(train, None)))
    }


def maximum(known: dict, returns: np.ndarray) -> list[float]:
    """For each task, the highest of its returns (N, E) in this dataset.

    0 is the random policy's mean, 1 the highest that any checkpoint had when it was measured.
    """
    random, highest = np.array(known["random"]), np.array(known["highest"])
    span = np.maximum(highest - random, 1e-9)  # teachers that learned nothing: do not divide by 0
    return ((returns.max(1) - random) / span).round(4).tolist()


def summary(folder: Path, meta: dict, returns: np.ndarray) -> str:
    """What was collected, for the reader of the terminal."""
    tasks, episodes = returns.shape
    line = f"{folder}: {tasks} tasks x {episodes} episodes, return {returns.mean():.1f} on average"
    if "maximum" not in meta:
        return line
    best, highest = (100 * np.mean(meta[name]) for name in ("best_level", "maximum"))
    line += f"\nrandom 0, Mixed's best 100 %: best checkpoint {best:.0f} %, "
    return line + f"highest return {highest:.0f} %"


# ----------------------------------------------------------------------------------- the command
def main() -> None:
    """`python collect.py --env ...`; `--help` lists the settings. Raises ValueError."""
    # here, because worker processes import this file too and read no command line
    from support.command_line import parse_collection
    from tools.minari_io import check_export, export_minari

    torch.set_num_threads(1)  # more change the rounding, and tasks run side by side anyway
    cfg, export = parse_collection()
    if export:  # refused now rather than after hours
        check_export(describe_dataset(cfg), Path(export))
    folder = collect(cfg)
    if export:
        ids = export_minari(folder, Path(export), cfg.data.env)
        print(f"{export}: {len(ids)} Minari datasets, {ids[0]} first")


if __name__ == "__main__":
    from support.command_line import one_line

    one_line(main, "the same command continues with the parts that are missing")
