"""teachers.py: one policy a task, trained, measured and rolled out (paper App. D.2, Tables 2 and 3).

in : tasks, an `TeacherConfig`           out: checkpoints, their levels, and the arrays of one task of a dataset
Read after sac.py and ppo.py, before collect.py.

    teachers/<name>/group-000/step-0000000020.safetensors   the policies of a group of tasks, stacked
                             levels.npz                     the return of every checkpoint, measured
                             state.safetensors              what training continues from, until it is done

The *level* of a checkpoint is its share of the way from the random policy's mean return (0) to the best
checkpoint's of that task (1); with negative returns a plain percentage would mean nothing. App. D.2's qualities:

    mixed           all checkpoints
    medium-expert   those below 0.8        every dataset holds the same number of episodes of each of its
    medium          those below 0.5        checkpoints (but for one, where the numbers do not divide)

Two departures (Sec. 3.1 allows "arbitrary behaviour policies"): a prompt by the task's own policies gives the task
away through its actions, which a policy's own first episode never does; only rewards tell when behaviour does not
know the task. With `--recipe explore` other tasks' checkpoints play three quarters of a task's episodes, which helps
DPT; with `--recipe wander` half of them are random actions, which helps AD: it imitates all it reads, and nothing can
be imitated there. Queries are states of the task's own episodes.
Behaviour is sampled from the policies; the labels of DPT's queries are the *mean* actions of the best checkpoint
that the quality has (100, 80, 50 %). Reach and Push label with the behaviour's own actions (App. D.2).
Differs from the paper: "final achieved level" is that of the best checkpoint, because SAC's last is often not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from envs import get_family, make_batch, make_env, optimal_returns, random_returns
from support.files import load_tensors, need_space, only_writer, progress, save_arrays
from support.jobs import run_jobs
from teachers.ppo import PPOConfig, train_ppo
from teachers.sac import STATE, SACConfig, mlp, policy_file, squashed, train_sac

# Tables 2 and 3; hidden units and replay of the official configuration
PAPER = {
    "point-robot": SACConfig(2000, 100, 20, hidden=256, replay=2000),
    "cheetah-vel": SACConfig(250_000, 2000, 10_000, replay=10_000),
    "cheetah-vel-3cluster": SACConfig(400_000, 2000, 10_000),
    "walker-param": SACConfig(1_000_000, 2000, 10_000),
    "reach": PPOConfig(400_000),
    "push": PPOConfig(1_000_000),
}
LEVEL = {"mixed": np.inf, "medium-expert": 0.8, "medium": 0.5}


@dataclass(frozen=True)
class TeacherConfig:
    """What fixes the teachers of a family; 0: the paper's (Tables 2, 3)."""

    env: str
    steps: int = 0
    save_every: int = 0
    warmup: int = 0
    hidden: int = 0
    batch: int = 0
    lr: float = 0.0
    alpha: float = 0.0
    seed: int = 0
    group: int = 10  # tasks trained in one stack (SAC); part of what fixes the bytes
    level_episodes: int = 5  # to measure a checkpoint

    def algorithm(self) -> SACConfig | PPOConfig:
        """Raises ValueError for a setting that the family's algorithm does not have or that cannot be."""
        given = {
            k: getattr(self, k)
            for k in ("steps", "save_every", "warmup", "hidden", "batch", "lr", "alpha")
        }
        given = {k: v for k, v in given.items() if v}
        if not all(v > 0 for v in (self.group, self.level_episodes, *given.values())):
            raise ValueError("settings of teachers must be positive (0: the paper's)")
        base, horizon = PAPER.get(self.env), get_family(self.env).horizon
        if base is None:  # a family of the user's
            base = SACConfig(
                200 * horizon, 5 * horizon, 5 * horizon, hidden=64, replay=200 * horizon
            )
        foreign = [k for k in given if not hasattr(base, k)]
        if foreign:
            raise ValueError(
                f"{self.env}'s teachers are trained by PPO, which has no --teacher-{foreign[0]}"
            )
        if isinstance(base, SACConfig) and base.replay == base.steps:
            given["replay"] = given.get("steps", base.steps)  # Point-Robot's replay holds all
        found = replace(base, **given)
        if isinstance(found, SACConfig) and (
            found.save_every % horizon or found.steps % found.save_every
        ):
            raise ValueError(
                f"--teacher-save-every {found.save_every} must be whole episodes of {horizon} steps and divide "
                f"--teacher-steps {found.steps}"
            )
        return found


# ------------------------------------------------------------------------------------------ policies
@dataclass
class Policies:
    """M stacked policies: tanh-squashed Gaussians of relu networks (SAC) or clipped ones of tanh networks (PPO)."""

    kind: str
    weights: list[Tensor]  # w0, b0, w1, b1, w2, b2: (M, in, out), (M, 1, out)
    log_std: Tensor | None = None  # (M, 1, da), PPO

    def act(self, states: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Actions (M, B, da) in [-1, 1] for states (M, B, ds): the mean ones, or sampled with `rng`."""
        if self.kind == "sac":
            out = mlp(self.weights, states)
            noise = torch.zeros_like(out.chunk(2, -1)[0])
            return squashed(out, noise if rng is None else noise.normal_(generator=rng))[0]
        mean = mlp(self.weights, states, torch.tanh)
        if rng is not None:
            mean = mean + self.log_std.exp() * torch.randn(mean.shape, generator=rng)
        return mean.clamp(-1, 1)


def load_policies(folder: Path, steps: Sequence[int], row: int | slice = slice(None)) -> Policies:
    """The policies of some checkpoints of a group, one behind the other: M = len(steps) x rows.

    Raises ValueError with one line that names a missing or damaged file.
    """
    parts, kind = [], ""
    rows = slice(row, row + 1) if isinstance(row, int) else row
    for step in steps:
        path = policy_file(folder, step)
        try:
            tensors, about = load_tensors(path)
            kind = about.get("kind")
            if kind not in ("sac", "ppo"):
                raise ValueError(f"{path} holds no policies")
        except ValueError as error:
            raise ValueError(f"{error}: delete {folder} to train its tasks anew") from None
        parts.append({name: tensor[rows] for name, tensor in tensors.items()})
    stacked = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Policies(
        kind, [stacked[f"{k}{i}"] for i in range(3) for k in "wb"], stacked.get("log_std")
    )


def join(several: Sequence[Policies]) -> Policies:
    """Stacks behind one another."""
    weights = [torch.cat(layer) for layer in zip(*(p.weights for p in several), strict=True)]
    log_std = None if several[0].log_std is None else torch.cat([p.log_std for p in several])
    return Policies(several[0].kind, weights, log_std)


@torch.inference_mode()
def rollout(
    policies: Policies | None,
    env: str,
    tasks: list,
    episodes: int,
    seed: Sequence[int],
    sampled: bool,
) -> dict:
    """`episodes` episodes of each of M policies on its own task, all at once; None: uniformly random actions.

    states (M, episodes, T, ds), actions (M, episodes, T, da), rewards (M, episodes, T), success (M, episodes) bool.
    """
    spec, many = get_family(env), len(tasks)
    streams = [int(x) for x in np.random.SeedSequence(seed).generate_state(2)]
    batch = make_batch(env, [task for task in tasks for _ in range(episodes)], streams[0])
    rng = torch.Generator().manual_seed(streams[1]) if sampled else None
    states, rows = batch.reset(), []
    for _ in range(spec.horizon):
        if policies is None:
            actions = 2 * torch.rand(many * episodes, spec.action_dim, generator=rng).numpy() - 1
        else:
            actions = (
                policies.act(torch.from_numpy(states).view(many, episodes, -1), rng)
                .flatten(0, 1)
                .numpy()
            )
        following, rewards = batch.step(actions)
        rows.append((states, actions, rewards))
        states = following
    arrays = (np.stack(column, 1) for column in zip(*rows, strict=True))
    found = {
        name: array.reshape(many, episodes, *array.shape[1:])
        for name, array in zip(("states", "actions", "rewards"), arrays, strict=True)
    }
    success = np.zeros(many * episodes, bool) if batch.success is None else batch.success
    return found | {"success": success.reshape(many, episodes).copy()}


# ------------------------------------------------------------------------------- training and levels
@dataclass(frozen=True)
class Group:
    """A job: train the tasks of one group and measure their checkpoints."""

    cfg: TeacherConfig
    number: int
    tasks: list
    folder: str
    device: str = "cpu"


def groups_of(cfg: TeacherConfig, tasks: list, folder: Path, device: str = "cpu") -> list[Group]:
    """SAC stacks `cfg.group` tasks; PPO trains one by one."""
    size = cfg.group if isinstance(cfg.algorithm(), SACConfig) else 1
    starts = range(0, len(tasks), size)
    return [
        Group(cfg, i, tasks[first : first + size], str(folder / f"group-{i:03d}"), device)
        for i, first in enumerate(starts)
    ]


def checkpoints(cfg: TeacherConfig) -> list[int]:
    """The steps of all checkpoints."""
    found = cfg.algorithm()
    unit = (
        found.save_every if isinstance(found, SACConfig) else found.n_steps
    )  # PPO trains in whole rollouts
    every, total = (math.ceil(n / unit) * unit for n in (found.save_every, found.steps))
    return sorted({*range(every, total + 1, every), total})


def train_group(group: Group, alive) -> None:
    """Train what is missing of a group, then measure it. Continues where it was stopped; the replay goes at the end."""
    folder, cfg = Path(group.folder), group.cfg
    with only_writer(
        folder, seconds=60
    ):  # a worker of a killed command may still be in its last episode
        if (folder / "levels.npz").exists():
            return
        algorithm, seed = cfg.algorithm(), (cfg.seed, group.number)
        if all(policy_file(folder, step).exists() for step in checkpoints(cfg)):
            pass  # trained, but not measured
        elif isinstance(algorithm, SACConfig):
            batch = make_batch(cfg.env, group.tasks)
            train_sac(batch, algorithm, seed, folder, lambda *_: alive(), group.device)
        else:
            train_ppo(
                partial(make_env, cfg.env, group.tasks[0]),
                algorithm,
                seed,
                folder,
                lambda *_: alive(),
            )
        save_arrays(folder / "levels.npz", measure(group, alive))
        (folder / STATE).unlink(missing_ok=True)


def measure(group: Group, alive) -> dict[str, np.ndarray]:
    """Returns of every checkpoint: `sampled` and `mean` actions (C, n, k), success of the latter (C, n), and the
    random policy's mean (n,).
    """
    cfg, found = group.cfg, {"sampled": [], "mean": [], "success": []}
    for step in checkpoints(cfg):
        alive()
        policies = load_policies(Path(group.folder), [step])
        for name, sampled in (("sampled", True), ("mean", False)):
            played = rollout(
                policies,
                cfg.env,
                group.tasks,
                cfg.level_episodes,
                (cfg.seed, group.number, step, sampled),
                sampled,
            )
            found[name].append(played["rewards"].sum(-1))
        found["success"].append(played["success"].mean(1))
    arrays = {name: np.stack(values) for name, values in found.items()}
    return arrays | {"random": random_returns(cfg.env, group.tasks)}


@dataclass
class Teachers:
    """What is known of the teachers of N tasks after training; C checkpoints."""

    cfg: TeacherConfig
    groups: list[Group]
    steps: list[int]  # (C,)
    sampled: np.ndarray  # (C, N) mean return of sampled actions
    highest: np.ndarray  # (N,) their highest return in any episode
    mean: np.ndarray  # (C, N) of mean actions
    success: np.ndarray  # (C, N)
    random: np.ndarray  # (N,)

    def level(self, returns: np.ndarray) -> np.ndarray:
        """(C, N) returns to levels: 0 random, 1 the task's best. A task that never beat random is at 0 throughout."""
        span = returns.max(0) - self.random
        return np.where(span > 0, (returns - self.random) / np.where(span > 0, span, 1.0), 0.0)

    def chosen(self, quality: str, task: int) -> tuple[np.ndarray, int]:
        """Indices of the checkpoints that make a task's data, and of the one that labels its queries. A task none of
        whose checkpoints is below the quality's level gets its lowest.
        """
        picked = []
        for returns in (self.sampled, self.mean):
            level = self.level(returns)[:, task]
            below = np.flatnonzero(level < LEVEL[quality])
            picked.append(below if len(below) else np.array([level.argmin()]))
        behaviour, labels = picked
        return behaviour, int(labels[self.mean[labels, task].argmax()])

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


def teachers_folder(root: Path, cfg: TeacherConfig, tasks: list) -> Path:
    """One folder for everything that changes the bytes."""
    about = json.dumps([asdict(cfg), asdict(cfg.algorithm()), tasks])
    name = f"{get_family(cfg.env).name}-{cfg.algorithm().steps}-s{cfg.seed}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"
    return root / "teachers" / name


def train_teachers(
    root: Path,
    cfg: TeacherConfig,
    tasks: list,
    workers: int,
    cluster: str | None,
    device: str = "cpu",
    quiet=False,
) -> Teachers:
    """Train and measure the teachers of `tasks`, or read them if they are there.

    Raises ValueError with one line for impossible settings, a full disk, a damaged file or a second process.
    """
    folder, steps = teachers_folder(root, cfg, tasks), checkpoints(cfg)
    groups = groups_of(cfg, tasks, folder, device)
    missing = [group for group in groups if not (Path(group.folder) / "levels.npz").exists()]
    if missing:
        algorithm, spec = cfg.algorithm(), get_family(cfg.env)
        hidden = getattr(algorithm, "hidden", 64)
        policy = 4 * ((spec.state_dim + 2 * spec.action_dim) * hidden + hidden**2)
        state = 40 * hidden**2 * 4 + getattr(algorithm, "replay", 0) * 4 * (
            2 * spec.state_dim + spec.action_dim + 1
        )
        need_space(
            folder, 1.1 * sum(len(group.tasks) for group in missing) * (policy * len(steps) + state)
        )
        with only_writer(folder):

            def written() -> int:
                return len(list(folder.glob("group-*/step-*.safetensors")))

            total, title = len(groups) * len(steps), f"teachers of {cfg.env}"
            bar = progress(
                total=total, initial=written(), desc=title, unit="checkpoint", disable=quiet
            )
            run_jobs(train_group, missing, workers, cluster, lambda: bar.update(written() - bar.n))
            bar.close()
    found: dict[str, list] = {"sampled": [], "mean": [], "success": [], "random": []}
    highest = []
    for group in groups:
        path = Path(group.folder) / "levels.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in found}
        except Exception as error:  # whatever numpy, zipfile and zlib make of damage
            raise ValueError(
                f"{path} is damaged ({error!r}): delete it to measure those tasks anew"
            ) from None
        highest.append(arrays["sampled"].max((0, 2)))
        for name, values in arrays.items():
            found[name].append(values.mean(2) if values.ndim == 3 else values)
    joined = {name: np.concatenate(parts, -1) for name, parts in found.items()}
    return Teachers(cfg, groups, steps, highest=np.concatenate(highest), **joined)


def describe(teachers: Teachers, tasks: list) -> str:
    """One line: the teachers' mean return between the random policy's and the optimum."""
    cfg, best, floor = teachers.cfg, teachers.best, teachers.random
    line = f"teachers of {cfg.env}: return {best.mean():.1f} on average, random policy {floor.mean():.1f}"
    optimum = optimal_returns(cfg.env, tasks)
    if optimum is not None:
        share = ((best - floor) / (optimum - floor)).mean()
        line += f", optimum {optimum.mean():.1f} ({100 * share:.0f} % of the way)"
    if get_family(cfg.env).success:
        line += f", success {100 * teachers.success[teachers.mean.argmax(0), np.arange(len(tasks))].mean():.0f} %"
    return line


# -------------------------------------------------------------------------------- a task of a dataset
OWN_SHARE = {"paper": 1.0, "explore": 0.25, "wander": 0.5}  # of the episodes, by recipe


@dataclass(frozen=True)
class Part:
    """A job: the arrays of one training task of a dataset."""

    group: Group
    row: int
    task: int  # its number among all
    behaviour: list[int]  # steps of the checkpoints that make the task's own episodes
    label: int  # step of the checkpoint that labels
    own: int  # episodes
    others: list[
        tuple[str, int, int]
    ]  # folder, step, row of a policy of another task: an episode each
    random: int  # episodes of random actions
    queries: int
    seed: int
    path: str


def parts_of(
    teachers: Teachers,
    tasks: int,
    quality: str,
    recipe: str,
    episodes: int,
    queries: int,
    seed: int,
    names: list[Path],
) -> list[Part]:
    """The jobs of a dataset of the first `tasks` tasks, to be written to `names`. Other tasks' checkpoints are of the
    same quality, all equally likely.
    """
    chosen = [teachers.chosen(quality, i) for i in range(tasks)]
    own = max(1, round(OWN_SHARE[recipe] * episodes)) if tasks > 1 else episodes
    parts = []
    for i, (behaviour, label) in enumerate(chosen):
        group, row = teachers.place(i)
        rng, others = np.random.default_rng([seed, 3, i]), []
        for _ in range(episodes - own if recipe == "explore" else 0):
            other = int((i + 1 + rng.integers(tasks - 1)) % tasks)
            where, line = teachers.place(other)
            others.append((where.folder, teachers.steps[rng.choice(chosen[other][0])], line))
        steps, rest = [teachers.steps[c] for c in behaviour], episodes - own - len(others)
        parts.append(
            Part(
                group,
                row,
                i,
                steps,
                teachers.steps[label],
                own,
                others,
                rest,
                queries,
                seed,
                str(names[i]),
            )
        )
    return parts


def make_part(part: Part, alive) -> None:
    """Roll out the chosen checkpoints and label queries; write `path`."""
    env, folder, many = part.group.cfg.env, Path(part.group.folder), len(part.behaviour)
    alive()
    goal, each = part.group.tasks[part.row], -(-part.own // many)
    policies = load_policies(folder, part.behaviour, part.row)
    played = rollout(policies, env, [goal] * many, each, (part.seed, 1, part.task), sampled=True)
    # episode j of the own ones is of checkpoint j * C / own: as many of each as divides
    checkpoint = np.arange(part.own) * many // part.own
    turn = np.arange(part.own) - np.searchsorted(checkpoint, checkpoint)
    arrays = {name: played[name][checkpoint, turn] for name in ("states", "actions", "rewards")}
    if part.others or part.random:
        alive()
        policies, rest = None, part.random
        if part.others:
            policies = join(
                [load_policies(Path(where), [step], row) for where, step, row in part.others]
            )
            rest = len(part.others)
        played = rollout(policies, env, [goal] * rest, 1, (part.seed, 4, part.task), sampled=True)
        arrays = {
            name: np.concatenate([array, played[name][:, 0]]) for name, array in arrays.items()
        }
    rng = np.random.default_rng([part.seed, 2, part.task])
    steps = (
        part.own * arrays["rewards"].shape[1]
    )  # the teacher knows what to do where its own training has been
    pick = rng.choice(steps, part.queries, replace=part.queries > steps)
    states = arrays["states"][: part.own].reshape(steps, -1)[pick]
    if get_family(env).teacher == "ppo":
        labels = arrays["actions"][: part.own].reshape(steps, -1)[pick]
    else:
        with torch.inference_mode():
            labels = (
                load_policies(folder, [part.label], part.row)
                .act(torch.from_numpy(states)[None])[0]
                .numpy()
            )
    save_arrays(Path(part.path), arrays | {"query_states": states, "query_actions": labels})
