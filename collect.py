"""collect.py: offline datasets (paper App. D.2, Algorithm 3 lines 1-6).

in : environment, quality, seed                 out: a dataset folder that data.py reads
Read after envs.py, before data.py.             Try: python collect.py --env point-robot --quality medium

Who makes the data is said elsewhere: DarkRoom's noisy teacher in collect_darkroom.py; one policy a task, trained by
SAC or PPO and rolled out at all stages of its training, in teachers.py. Training teachers is most of the work; it is
kept in `datasets/teachers/` and serves all three qualities. Here: what is kept, in which order, and how a stopped
run goes on. Tasks are independent: they run in `--workers` processes or, with `--cluster`, on Ray.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data import FORMAT, file_hash, load_part, part_name, read_meta
from envs import get_family, split_tasks
from families import collect_darkroom
from support.files import need_space, only_writer, progress, save_arrays, write_atomically
from support.jobs import check_cluster, run_jobs
from teachers.teachers import TeacherConfig, Teachers, describe, make_part, parts_of, train_teachers

Quality = Literal["mixed", "medium-expert", "medium"]
Recipe = Literal["paper", "explore", "wander"]


@dataclass(frozen=True)
class CollectConfig:
    """Collect one dataset; the same settings give the same bytes, and a stopped run continues."""

    env: str = "darkroom"
    """Task family."""
    quality: Quality = "mixed"
    """App. D.2: which stages of the teacher's training make the data."""
    recipe: Recipe = "paper"
    """paper: the task's own teacher. explore, wander: also behaviour that does not know the task."""
    episodes: int = 200
    """Episodes of each training task."""
    queries: int = 1000
    """Labelled query states of each task (DPT)."""
    train_tasks: int = 0
    """Training tasks; 0: the paper's number."""
    test_tasks: int = 0
    """Held-out tasks; 0: the paper's number."""
    task_seed: int = 56
    """Seed of the train/test split."""
    seed: int = 0
    """Seed of everything random in the data."""
    tasks: str | None = None
    """JSON file {"train": [...], "test": [...]} instead of the seeded split."""
    folder: str = "datasets"
    """Where dataset folders are kept."""

    # teachers (Tables 2 and 3); 0: the paper's
    teacher_steps: int = 0
    """Environment steps of each task's SAC or PPO."""
    teacher_save_every: int = 0
    """Steps between its checkpoints."""
    teacher_warmup: int = 0
    """SAC: first steps, random and without updates."""
    teacher_hidden: int = 0
    """SAC: hidden units of a layer."""
    teacher_batch: int = 0
    """Rows of an update."""
    teacher_lr: float = 0.0
    """Learning rate of the teachers."""
    teacher_alpha: float = 0.0
    """SAC: entropy ratio."""
    teacher_seed: int = 0
    """Seed of the teachers' training."""
    teacher_group: int = 10
    """SAC: tasks trained in one stack."""

    # where (nothing of this changes the bytes, but for rounding on another device)
    workers: int = 0
    """Local processes; 0: one a core."""
    cluster: str | None = None
    """Address of a Ray cluster instead (`auto`, `local`, host:port)."""
    teacher_device: str = "cpu"
    """SAC's networks on cpu or cuda."""
    export_minari: str | None = None
    """Also write the dataset under this folder in Minari's format (minari_io.py)."""

    def teachers(self) -> TeacherConfig | None:
        """Settings of the teachers, where there are any. Raises ValueError for ones that cannot be."""
        if get_family(self.env).teacher == "rule":
            if any(
                getattr(self, name)
                for name in vars(self)
                if name.startswith("teacher_") and name not in _FIXED
            ):
                raise ValueError(
                    f"{self.env}'s teacher is a rule: it has no --teacher-... settings"
                )
            return None
        names = ("steps", "save_every", "warmup", "hidden", "batch", "lr", "alpha", "seed", "group")
        found = TeacherConfig(
            self.env, **{name: getattr(self, f"teacher_{name}") for name in names}
        )
        found.algorithm()
        return found

    def split(self) -> tuple[list, list]:
        return split_tasks(self.env, self.task_seed, self.tasks, self.train_tasks, self.test_tasks)


_FIXED = ("teacher_seed", "teacher_group", "teacher_device")
_WHERE = ("folder", "tasks", "workers", "cluster", "teacher_device", "export_minari")


def settings_of(cfg: CollectConfig) -> dict:
    """What fixes the bytes, tasks aside."""
    found = {k: v for k, v in asdict(cfg).items() if k not in _WHERE}
    teachers = cfg.teachers()
    if teachers is None:
        return {k: v for k, v in found.items() if not k.startswith("teacher_")}
    return found | {"algorithm": json.loads(json.dumps(asdict(teachers.algorithm())))}


def dataset_folder(cfg: CollectConfig) -> Path:
    """One folder for each setting that changes the bytes; whatever its name does not say is in a hash.

    Raises ValueError for a bad task file and for impossible settings.
    """
    name = f"{get_family(cfg.env).name}-{cfg.quality}-{cfg.recipe}"
    name += f"-e{cfg.episodes}-q{cfg.queries}-t{cfg.task_seed}-s{cfg.seed}"
    if cfg.tasks or cfg.train_tasks or cfg.test_tasks or cfg.teachers():
        about = json.dumps([settings_of(cfg), cfg.split()])
        name += f"-{hashlib.sha256(about.encode()).hexdigest()[:8]}"
    return Path(cfg.folder) / name


def check(cfg: CollectConfig) -> None:
    """Raises ValueError with one line for settings that cannot be, before any work."""
    if cfg.episodes < 5 or cfg.queries < 1:
        raise ValueError("--episodes must be at least 5 and --queries at least 1")
    if cfg.workers < 0:
        raise ValueError("--workers must not be negative (0: one a core)")
    if min(cfg.seed, cfg.task_seed, cfg.teacher_seed) < 0:
        raise ValueError("--seed, --task-seed and --teacher-seed must not be negative")
    check_cluster(cfg.cluster)
    if cfg.export_minari and find_spec("minari") is None:
        raise ValueError("--export-minari needs Minari: pip install 't2mir[minari]'")
    cfg.teachers()
    if cfg.teacher_device != "cpu":
        from support.distributed import resolve_device

        resolve_device(cfg.teacher_device)


def collect(cfg: CollectConfig, quiet: bool = False) -> Path:
    """Write the dataset folder of `cfg`, or finish one that was stopped. Returns the folder.

    Parts that exist are kept as they are if they are whole. Raises ValueError with one line for bad settings, a
    damaged part, a full disk, or a folder that another process is writing.
    """
    check(cfg)
    spec, (train, test), folder = get_family(cfg.env), cfg.split(), dataset_folder(cfg)
    meta = {
        "format": FORMAT,
        **settings_of(cfg),
        "horizon": spec.horizon,
        "train_tasks": train,
        "test_tasks": test,
    }
    known = [None] * len(train)  # checksums of a dataset that was complete once
    if (folder / "meta.json").exists():
        old = read_meta(folder)
        if any(old.get(key) != value for key, value in meta.items()) or len(
            old.get("sha256", ())
        ) != len(train):
            raise ValueError(
                f"{folder} holds a dataset of other settings or tasks; use another --folder or remove it"
            )
        known = old["sha256"]
        if all((folder / part_name(i)).exists() for i in range(len(train))):
            return folder
    row = spec.state_dim + (1 if spec.discrete_actions else spec.action_dim) + 1
    need_space(
        folder,
        len(train) * cfg.episodes * spec.horizon * row * (4 if spec.state_values is None else 1),
    )
    teachers = cfg.teachers()

    def read(task: int) -> tuple[str, np.ndarray]:
        """Checksum and returns of a part."""
        sha256 = known[task] or file_hash(folder / part_name(task))
        part = load_part(folder, task, {**meta, "sha256": {task: sha256}}, spec)
        return sha256, part["rewards"].sum(-1)

    with only_writer(folder):
        done = {
            i: read(i) for i in range(len(train)) if (folder / part_name(i)).exists()
        }  # damage shows before work
        if teachers is None:
            found = {}
            make_darkroom(cfg, train, folder, quiet)
        else:
            found = make_from_teachers(cfg, teachers, train, test, folder, quiet)
        hashes, returns = zip(*(done.get(i) or read(i) for i in range(len(train))), strict=True)
        if teachers is not None:
            found["maximum"] = maximum(found, np.array(returns))
        meta |= found | {"sha256": list(hashes)}
        write_atomically(folder / "meta.json", lambda path: path.write_text(json.dumps(meta)))
    if not quiet:
        print(
            f"{folder}: {len(train)} tasks x {cfg.episodes} episodes, return {np.mean(returns):.1f} on average"
        )
        if teachers is not None:
            best, highest = (100 * np.mean(found[name]) for name in ("best_level", "maximum"))
            print(
                f"random 0, Mixed's best 100 %: best checkpoint {best:.0f} %, highest return {highest:.0f} %"
            )
    return folder


def make_darkroom(cfg: CollectConfig, train: list, folder: Path, quiet: bool) -> None:
    """The parts that are missing, by collect_darkroom.py."""
    pool, rng = None, np.random.default_rng([cfg.seed, 0])
    if cfg.recipe in collect_darkroom.SHARES:
        pool = collect_darkroom.explore_pool(train, get_family(cfg.env).horizon, rng)
    for index, goal in enumerate(
        progress(train, desc=f"collecting {folder.name}", unit="task", disable=quiet)
    ):
        path = folder / part_name(index)
        if not path.exists():
            save_arrays(path, collect_darkroom.collect_darkroom_task(cfg, index, goal, pool))


def make_from_teachers(
    cfg: CollectConfig, settings: TeacherConfig, train: list, test: list, folder: Path, quiet: bool
) -> dict:
    """Train teachers (or find them), then roll out the parts that are missing. Returns what meta.json keeps of them."""
    workers = cfg.workers or os.cpu_count() or 1
    place = {"workers": workers, "cluster": cfg.cluster}
    known = train_teachers(
        Path(cfg.folder), settings, train + test, device=cfg.teacher_device, quiet=quiet, **place
    )
    if not quiet:
        print(describe(known, train + test))
    names = [folder / part_name(i) for i in range(len(train))]
    parts = parts_of(
        known, len(train), cfg.quality, cfg.recipe, cfg.episodes, cfg.queries, cfg.seed, names
    )
    missing = [part for part in parts if not Path(part.path).exists()]
    bar = progress(total=len(parts), initial=len(parts) - len(missing), desc=f"collecting {folder.name}", unit="task",
                   disable=quiet)  # fmt: skip
    run_jobs(
        make_part,
        missing,
        watch=lambda: bar.update(len(list(folder.glob("task-*.npz"))) - bar.n),
        **place,
    )
    bar.close()
    level, tasks = known.level(known.sampled), range(len(train))
    best = [round(float(level[known.chosen(cfg.quality, i)[0], i].max()), 4) for i in tasks]
    return {
        "reference": reference(known, train, test),
        "behaviour": [part.behaviour for part in parts],
        "best_level": best,
    }


def reference(known: Teachers, train: list, test: list) -> dict:
    """For every task the random policy's mean return, the best checkpoint's, and the highest of any episode."""
    found, first = {}, 0
    for name, tasks in (("train", train), ("test", test)):
        rows = slice(first, first + len(tasks))
        numbers = {"random": known.random, "teacher": known.best, "highest": known.highest}
        found[name] = {
            key: values[rows].astype(float).round(3).tolist() for key, values in numbers.items()
        }
        first += len(tasks)
    return found


def maximum(found: dict, returns: np.ndarray) -> list[float]:
    """For every task, the highest return in this dataset: 0 the random policy's mean, 1 the highest that any
    checkpoint had when it was measured. `returns` (N, E).
    """
    known = found["reference"]["train"]
    floor, highest = np.array(known["random"]), np.array(known["highest"])
    return ((returns.max(1) - floor) / np.maximum(highest - floor, 1e-9)).round(4).tolist()


if __name__ == "__main__":
    from config import parse_collect  # a preset's settings (config.py imports this file)

    try:
        torch.set_num_threads(1)
        settings = parse_collect()
        made = collect(settings)
        if settings.export_minari:
            from tools.minari_io import export_minari

            ids = export_minari(made, Path(settings.export_minari), settings.env)
            print(f"{settings.export_minari}: {len(ids)} Minari datasets, {ids[0]} first")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped; the same command continues with the parts that are missing"
        ) from None
