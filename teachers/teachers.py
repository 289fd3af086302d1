"""teachers.py: a policy for each task, trained and measured (App. D.2, Tables 2 and 3).

in : tasks, settings (config.Teachers)          out: checkpoints, and which of them make what
Read after sac.py, conditioned.py, ppo.py and rollouts.py, which come after collect.py.

    teachers/<name>/group-000/step-0000000020.safetensors   policies of a group of tasks, stacked
                              levels.npz                    the measured return of each checkpoint
                              state.safetensors             training continues from it; then it goes

The *level* of a checkpoint is its share of the way from the random policy's mean return (0) to the
return of the task's best checkpoint (1). With negative returns, a plain percentage of the final
return would mean nothing. App. D.2's qualities are made by these checkpoints:

    mixed           all                 Each plays the same number of episodes of its task (but for
    medium-expert   those below 0.8     one, where the numbers do not divide). The best of them
    medium          those below 0.5     labels the queries ("100%, 80% and 50% performance").

Behaviour samples its actions, so its levels are those of sampled actions; labels are the best
actions, so theirs are those of mean ones.
--teacher says whose policies these are: `each` task's own, as in the paper, `siblings` (sac.py), or
those of `one` for all tasks (conditioned.py). On disk they look alike.
Differs from the paper: "final achieved level" is that of the best checkpoint, not of the last,
because SAC's last is often not its best.

Shapes: N tasks, C checkpoints, n tasks of a group, k episodes that measure a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from config import Collection, Teachers, Whose, Work
from envs import get_family, make_batch, optimal_returns, random_returns
from support.distributed import resolve_device
from support.files import (
    Damaged,
    Wanted,
    load_arrays,
    load_tensors,
    need_space,
    only_writer,
    save_arrays,
    set_aside,
)
from support.jobs import bar_of, run_jobs
from support.settings import said, short_hash
from support.user_file import code_of
from teachers.conditioned import together
from teachers.ppo import PPOConfig, train_ppo
from teachers.rollouts import Behaviour, load_policies, rollout
from teachers.sac import SACConfig, separate, train_sac
from teachers.stored import STATE, policy_file, read_policies

# fmt: off
PAPER = {
    # Table 2. The same in all: learning rate 3e-4, soft update 0.005, discount factor 0.99,
    # entropy ratio 0.2. `hidden` and `replay` are the official configuration's.
    #                                 Training steps    Warmup steps   Save frequency
    "point-robot":          SACConfig(steps=2_000,      warmup=100,    save_every=20,
                                      hidden=256, replay=2_000),
    "cheetah-vel":          SACConfig(steps=250_000,    warmup=2_000,  save_every=10_000,
                                      replay=10_000),
    "cheetah-vel-3cluster": SACConfig(steps=400_000,    warmup=2_000,  save_every=10_000),
    "walker-param":         SACConfig(steps=1_000_000,  warmup=2_000,  save_every=10_000),
    # Table 3. The same in both: learning rate 3e-4, gamma 0.99. Saved after every rollout.
    #                                 total_timesteps   n_steps        batch_size  n_epochs
    "reach":                PPOConfig(steps=400_000,    n_steps=2048,  batch=64,   epochs=10),
    "push":                 PPOConfig(steps=1_000_000,  n_steps=2048,  batch=64,   epochs=10),
}
# fmt: on
LEVEL = {"mixed": np.inf, "medium-expert": 0.8, "medium": 0.5}  # behaviour stays below it
LEVEL_EPISODES = 5  # k, of each task, to measure a checkpoint


# ------------------------------------------------------------------------------------ settings
def default_algorithm(env: str, teacher: Whose = "each") -> SACConfig | PPOConfig:
    """A family's row of Table 2 or 3; where they have none, a small one of 40 checkpoints.

    One teacher is always SAC. Raises ValueError for a grid that SAC should learn, or for discrete
    actions: its networks read and write numbers.
    """
    family = get_family(env)
    horizon = family.horizon
    kind = PPOConfig if family.teacher == "ppo" and teacher != "one" else SACConfig
    if isinstance(PAPER.get(env), kind):
        return PAPER[env]
    if kind is PPOConfig:  # 400 episodes, 10 a rollout, 5 minibatches
        n_steps = 10 * horizon
        return PPOConfig(40 * n_steps, n_steps, batch=2 * horizon, save_every=n_steps)
    if family.state_values or family.discrete_actions:
        raise ValueError(f"{env}: SAC needs continuous states and actions, as does --teacher one")
    steps = 200 * horizon  # 200 episodes, a checkpoint after every 5
    return SACConfig(steps, 5 * horizon, 5 * horizon, hidden=64, replay=steps)


def algorithm(env: str, settings: Teachers) -> SACConfig | PPOConfig:
    """How a family's teachers are trained: Tables 2 and 3, but for what the settings say.

    Raises ValueError with one line for a setting that the family's algorithm does not have, or
    that cannot be.
    """
    base, horizon = default_algorithm(env, settings.teacher), get_family(env).horizon
    known = {f.name for config in (SACConfig, PPOConfig) for f in fields(config)}
    named = {name.removeprefix("teacher_"): value for name, value in asdict(settings).items()}
    # 0: the table's
    given: dict[str, Any] = {k: v for k, v in named.items() if k in known and v}
    if not all(value > 0 for value in (settings.teacher_group, *given.values())):
        raise ValueError("settings of teachers must be positive (0: the paper's)")
    foreign = [name for name in given if not hasattr(base, name)]
    if foreign:
        flag = f"--teacher-{foreign[0]}".replace("_", "-")
        raise ValueError(f"{env}'s teachers are trained by PPO, which has no {flag}")
    if isinstance(base, PPOConfig):
        return replace(base, **given)
    if base.replay == base.steps:  # a replay that holds all of the training still does
        given["replay"] = given.get("steps", base.steps)
    changed = replace(base, **given)
    if changed.save_every % horizon or changed.steps % changed.save_every:
        raise ValueError(
            f"--teacher-save-every {changed.save_every} must be whole episodes of {horizon} steps "
            f"and divide --teacher-steps {changed.steps}"
        )
    if changed.warmup >= changed.steps:  # all actions random, and nothing ever learnt
        raise ValueError(
            f"--teacher-warmup {changed.warmup} must be less than --teacher-steps {changed.steps}"
        )
    return changed


def checkpoints(trained_by: SACConfig | PPOConfig) -> list[int]:
    """The steps of all checkpoints."""
    unit = 1 if isinstance(trained_by, SACConfig) else trained_by.n_steps  # PPO: whole rollouts
    every = math.ceil(trained_by.save_every / unit) * unit
    total = math.ceil(trained_by.steps / unit) * unit
    return sorted({*range(every, total + 1, every), total})


# ---------------------------------------------------------------------------- training a group
@dataclass(frozen=True)
class Group:
    """A job: train the tasks of one group and measure their checkpoints."""

    env: str
    trained_by: SACConfig | PPOConfig
    seed: tuple[int, int]  # the teachers', and the number of the group
    tasks: list
    folder: str
    device: str = "cpu"
    teacher: Whose = "each"
    played: int | None = None  # of one: the first so many train it, all get a policy; None: all


def groups_of(
    env: str, settings: Teachers, tasks: list, folder: Path, device: str = "cpu", train: int = 0
) -> list[Group]:
    """`teacher_group` tasks are trained in one stack; --teacher one, all together.

    `train`: the first so many of `tasks` are no held-out ones (0: all). One teacher never plays
    those that are.
    """
    trained_by, teacher = algorithm(env, settings), settings.teacher
    size = len(tasks) if teacher == "one" else settings.teacher_group
    return [
        Group(
            env=env,
            trained_by=trained_by,
            # siblings have the same random numbers, in whichever group they are
            seed=(settings.teacher_seed, 0 if teacher == "siblings" else number),
            tasks=tasks[first : first + size],
            folder=str(folder / f"group-{number:03d}"),
            device=device,
            teacher=teacher,
            played=train if train and teacher == "one" else None,
        )
        for number, first in enumerate(range(0, len(tasks), size))
    ]


def train_group(group: Group, alive) -> None:
    """Train what is missing of a group, then measure it. Continues where it was stopped.

    `alive()` raises when the command that asked for it is gone.
    """
    folder = Path(group.folder)
    paths = [policy_file(folder, step) for step in checkpoints(group.trained_by)]
    with only_writer(folder, seconds=60):  # a killed command's worker may end its last episode
        if not all(path.exists() for path in paths):
            train_policies(group, alive)
        if not all(path.exists() for path in paths):
            # One was removed that the state had left behind: only training anew makes it again.
            (folder / STATE).unlink(missing_ok=True)
            train_policies(group, alive)
        if not (folder / "levels.npz").exists():
            save_arrays(folder / "levels.npz", measure(group, alive))
        (folder / STATE).unlink(missing_ok=True)  # the replay is large, and of no more use


def train_policies(group: Group, alive) -> None:
    """From the group's state, or from the beginning, to the last checkpoint."""
    trained_by, siblings = group.trained_by, group.teacher == "siblings"
    batch = make_batch(group.env, group.tasks[: group.played])
    rest = group.seed, Path(group.folder), lambda *_: alive(), group.device
    if isinstance(trained_by, SACConfig):
        build = partial(separate, siblings=siblings)
        if group.teacher == "one":
            build = partial(together, tasks=group.tasks)
        train_sac(batch, trained_by, *rest, build=build)
    else:
        train_ppo(batch, trained_by, *rest, siblings=siblings)


def measure(group: Group, alive) -> dict[str, np.ndarray]:
    """Returns of every checkpoint with `sampled` and with `mean` actions, (C, n, k) each.

    And the latter's `success` (C, n), and the random policy's mean return, `random` (n,).
    """
    returns, success = {"sampled": [], "mean": []}, []
    for step in checkpoints(group.trained_by):
        alive()
        policies = load_policies(Path(group.folder), [step])
        for name in returns:
            sampled = name == "sampled"
            seed = (*group.seed, step, sampled)
            played = rollout(policies, group.env, group.tasks, LEVEL_EPISODES, seed, sampled)
            returns[name].append(played["rewards"].sum(-1))
        success.append(played["success"].mean(1))  # of the mean actions, which come last
    arrays = {name: np.stack(values) for name, values in (returns | {"success": success}).items()}
    return arrays | {"random": random_returns(group.env, group.tasks)}


# ------------------------------------------------------------------------ levels and qualities
@dataclass
class TrainedTeachers:
    """What is known of the teachers of N tasks after training; C checkpoints each."""

    env: str
    groups: list[Group]
    steps: list[int]  # (C,)
    sampled: np.ndarray  # (C, N) mean return of sampled actions
    highest: np.ndarray  # (N,) their highest return in any episode
    mean: np.ndarray  # (C, N) mean return of mean actions
    success: np.ndarray  # (C, N) of the latter
    random: np.ndarray  # (N,) mean return of random actions

    def level(self, returns: np.ndarray) -> np.ndarray:
        """(C, N) returns to levels: 0 random, 1 the task's best.

        A task none of whose checkpoints beats random is at 0 throughout.
        """
        span = returns.max(0) - self.random
        return np.where(span > 0, (returns - self.random) / np.where(span > 0, span, 1.0), 0.0)

    def chosen(self, quality: str, task: int) -> tuple[np.ndarray, int]:
        """Indices of the checkpoints that make a task's data, and of the one that labels.

        A task none of whose checkpoints is below the quality's level gets its lowest.
        """
        allowed = []
        for returns in (self.sampled, self.mean):
            level = self.level(returns)[:, task]
            below = np.flatnonzero(level < LEVEL[quality])
            allowed.append(below if len(below) else np.array([level.argmin()]))
        behaviour, labels = allowed
        return behaviour, int(labels[self.mean[labels, task].argmax()])

    def behaviour(self, quality: str, task: int) -> Behaviour:
        """The files of the checkpoints that `chosen` names."""
        indices, label = self.chosen(quality, task)
        group, row = self.place(task)
        return Behaviour(group.folder, row, [self.steps[i] for i in indices], self.steps[label])

    @property
    def best(self) -> np.ndarray:
        """(N,) the best checkpoint's return with mean actions: the reference `teacher`."""
        return self.mean.max(0)

    def place(self, task: int) -> tuple[Group, int]:
        """The group of a task and its row there."""
        for group in self.groups:
            if task < len(group.tasks):
                return group, task
            task -= len(group.tasks)
        raise IndexError(task)


# --------------------------------------------------------------------------------- all of them
def teachers_folder(root: Path, env: str, settings: Teachers, tasks: list, train: int = 0) -> Path:
    """One folder for everything that changes the bytes; what its name does not say is hashed."""
    trained_by = algorithm(env, settings)
    everything = json.dumps([env, said(settings), said(trained_by), tasks, train])
    everything += code_of(env)
    name = f"{get_family(env).name}-{settings.teacher}-{trained_by.steps}-s{settings.teacher_seed}"
    return root / "teachers" / f"{name}-{short_hash(everything)}"


def processes(work: Work) -> int:
    """What --workers says; 0 is one a core."""
    return work.workers or os.cpu_count() or 1


def train_teachers(cfg: Collection, train: list, test: list, quiet=False) -> TrainedTeachers:
    """Train and measure the teachers of all tasks, or read them if they are there.

    Those of the held-out tasks `test` come last. Raises ValueError with one line for impossible
    settings, a full disk or a second process. A damaged file is set aside, and made anew: levels
    are measured once more, policies trained, which gives the same bytes.
    """
    env, settings, work, tasks = cfg.data.env, cfg.teachers, cfg.work, train + test
    folder = teachers_folder(Path(cfg.data.datasets), env, settings, tasks, len(train))
    device = str(resolve_device(work.teacher_device, "--teacher-device"))  # of auto
    groups = groups_of(env, settings, tasks, folder, device, len(train))
    steps = checkpoints(groups[0].trained_by)
    if missing := [group for group in groups if damage_of(group) or not finished(group)]:
        need_space(folder, 1.1 * sum(disk_space(group) for group in missing))

        def written() -> int:
            return len(list(folder.glob("group-*/step-*.safetensors")))

        total, title = len(groups) * len(steps), f"teachers of {env}"
        with only_writer(folder):
            for group in missing:
                for path, reason in damage_of(group).items():
                    set_aside(path, reason)
            with bar_of(written, total, title, "checkpoint", quiet) as watch:
                run_jobs(train_group, missing, processes(work), work.cluster, watch)
    return read_levels(env, groups, steps)


def finished(group: Group) -> bool:
    """Whether everything is there that a dataset needs of a group."""
    paths = [policy_file(Path(group.folder), step) for step in checkpoints(group.trained_by)]
    return all(path.exists() for path in (*paths, Path(group.folder) / "levels.npz"))


def damage_of(group: Group) -> dict[Path, str]:
    """{file: what is wrong} of a group's files that are there and not as they were written."""
    wrong, folder = {}, Path(group.folder)
    checks = {folder / "levels.npz": lambda path: load_levels(group), folder / STATE: load_tensors}
    checks |= {path: read_policies for path in sorted(folder.glob("step-*.safetensors"))}
    for path, check in checks.items():
        try:
            if path.exists():
                check(path)
        except Damaged as error:
            wrong[path] = str(error)
    return wrong


def disk_space(group: Group) -> int:
    """Bytes of a group's files, roughly: all checkpoints and the last state, float32."""
    family, trained_by = get_family(group.env), group.trained_by
    hidden = getattr(trained_by, "hidden", 64)
    policy = (family.state_dim + 2 * family.action_dim) * hidden + hidden**2
    transition = 2 * family.state_dim + family.action_dim + 1
    # weights, copies and moments of actor and critics, and SAC's replay
    state = 40 * hidden**2 + getattr(trained_by, "replay", 0) * transition
    return 4 * len(group.tasks) * (policy * len(checkpoints(trained_by)) + state)


def load_levels(group: Group) -> dict[str, np.ndarray]:
    """What `measure` has found of a group. Raises Damaged with one line for a damaged file."""
    count, tasks = len(checkpoints(group.trained_by)), len(group.tasks)
    wanted: Wanted = {
        "sampled": ((count, tasks, LEVEL_EPISODES), "f"),
        "mean": ((count, tasks, LEVEL_EPISODES), "f"),
        "success": ((count, tasks), "f"),
        "random": ((tasks,), "f"),
    }
    return load_arrays(Path(group.folder) / "levels.npz", wanted)


def read_levels(env: str, groups: list[Group], steps: list[int]) -> TrainedTeachers:
    """What all groups' levels.npz say."""
    found = [load_levels(group) for group in groups]
    highest = np.concatenate([levels["sampled"].max((0, 2)) for levels in found])
    means = [{k: v.mean(2) if v.ndim == 3 else v for k, v in levels.items()} for levels in found]
    joined = {name: np.concatenate([levels[name] for levels in means], -1) for name in means[0]}
    return TrainedTeachers(env, groups, steps, highest=highest, **joined)


def describe(teachers: TrainedTeachers, tasks: list) -> str:
    """One line: the teachers' mean return between the random policy's and the optimum."""
    env, best, random = teachers.env, teachers.best, teachers.random
    line = f"teachers of {env}: return {best.mean():.1f} on average, random {random.mean():.1f}"
    optimum = optimal_returns(env, tasks)
    if optimum is not None:
        share = ((best - random) / (optimum - random)).mean()
        line += f", optimum {optimum.mean():.1f} ({100 * share:.0f} % of the way)"
    if get_family(env).can_succeed:
        success = teachers.success[teachers.mean.argmax(0), np.arange(len(tasks))]
        line += f", success {100 * success.mean():.0f} %"
    return line
