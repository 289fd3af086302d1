"""evaluate.py: in-context learning on held-out tasks, without weight updates (App. A: Algorithms 2 and 4).

in : a run's folder       out: returns of every task and episode (CSV), the curve (PNG), a table
Read after train.py.

    python evaluate.py runs/darkroom-dpt-both-mixed-cpu-s0
    python evaluate.py runs/... --prompt all --actions greedy --results results/darkroom

All tasks are played at once. A policy has three methods: `begin(history, rows)` before an episode, with
all finished episodes; `act(states)`; `observe(...)` after each step. The two backbones, the exact
posterior of DarkRoom and a random policy play through the same loop.

Differs from the paper (switches): `--prompt all` grows DPT's prompt over the episodes; actions of a
discrete policy are sampled by default: on DarkRoom the arg max of even the exact posterior walks to the
middle of the room and stays there.
"""

from __future__ import annotations

import csv
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from scipy.stats import bootstrap
from torch import Tensor
from tqdm import tqdm

import checkpoint
from collect import write_atomically
from data import DPTBatch, Prompt, normalise
from envs import get_spec, make_batch, optimal_returns, random_returns
from models import T2MIR
from posterior import action_posterior, goal_posterior

Actions = Literal["sample", "greedy"]
Memory = Literal["last", "all"]


# ------------------------------------------------------------------------------------------ policies
def concatenate(history: list[Prompt]) -> Prompt:
    """Episodes behind one another."""
    return Prompt(*(torch.cat([getattr(p, name) for p in history], 1) for name in ("states", "actions", "rewards")))


def choose(logits: Tensor, greedy: bool, rng: torch.Generator) -> Tensor:
    """Discrete actions (N,) from logits (N, A)."""
    if greedy:
        return logits.argmax(-1).cpu()
    return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=rng)[:, 0]


class RandomPolicy:
    """Uniform actions: the floor."""

    def __init__(self, action_dim: int, seed: int = 0):
        self.action_dim, self.rng = action_dim, torch.Generator().manual_seed(seed)

    def begin(self, history: list[Prompt], rows: int) -> None: ...

    def act(self, states: Tensor) -> Tensor:
        return torch.randint(self.action_dim, (len(states),), generator=self.rng)

    def observe(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None: ...


class ExactPosterior:
    """DarkRoom's exact in-context policy (posterior.py): the ceiling of any DPT with the same memory."""

    def __init__(self, memory: Memory = "last", greedy: bool = False, seed: int = 0):
        self.memory, self.greedy = memory, greedy
        self.rng = torch.Generator().manual_seed(seed)

    def begin(self, history: list[Prompt], rows: int) -> None:
        prompt = None
        if history:
            prompt = history[-1] if self.memory == "last" else concatenate(history)
        self.belief = goal_posterior(prompt, rows)

    def act(self, states: Tensor) -> Tensor:
        return choose(action_posterior(self.belief, states[:, None])[:, 0].log(), self.greedy, self.rng)

    def observe(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None: ...


class ModelPolicy:
    """What both backbones share: device, normalisation, the choice of an action."""

    def __init__(
        self, model: T2MIR, greedy: bool = False, seed: int = 0, mean: Tensor | None = None, std: Tensor | None = None
    ):
        self.model, self.cfg, self.greedy = model.eval(), model.cfg, greedy
        self.rng = torch.Generator().manual_seed(seed)
        self.device = next(model.parameters()).device
        self.mean, self.std = (0.0, 1.0) if mean is None else (mean.to(self.device), std.to(self.device))

    def read(self, states: Tensor) -> Tensor:
        states = states.to(self.device)
        return states if self.cfg.state_values else normalise(states.float(), self.mean, self.std)

    def prompt(self, states: Tensor, actions: Tensor, rewards: Tensor) -> Prompt:
        return Prompt(self.read(states), actions.to(self.device), rewards.to(self.device))

    def action(self, prediction: Tensor) -> Tensor:
        if self.cfg.discrete_actions:
            return choose(prediction, self.greedy, self.rng)
        return prediction.cpu()  # continuous: the mean


class ADPolicy(ModelPolicy):
    """Algorithm 2: K episodes sorted by return, then the running one; the prefix is computed once an episode.

    With a model that cannot be cached (models.py: `cacheable`) every step runs the whole context.
    """

    def __init__(self, model: T2MIR, keep: int = 4, **options):
        super().__init__(model, **options)
        self.keep = keep

    def begin(self, history: list[Prompt], rows: int) -> None:
        if not history:
            self.kept = []
        else:
            self.kept = sort_and_drop([*self.kept, history[-1]], self.keep)
        self.now: list[Prompt] = []
        if self.cfg.cacheable:
            self.cache = self.model.new_cache(rows, 3 * self.cfg.horizon * (len(self.kept) + 1))
            self.unseen = None
            if self.kept:
                past = concatenate(self.kept)
                past = self.prompt(past.states, past.actions, past.rewards)
                self.model.feed(self.model.embed_prompt(past), self.cache)

    def act(self, states: Tensor) -> Tensor:
        step = self._step(states, None, None)
        if not self.cfg.cacheable:
            whole = concatenate([self.prompt(p.states, p.actions, p.rewards) for p in [*self.kept, *self.now]] + [step])
            return self.action(self.model.last_action(whole))
        token = self.model.embed_prompt(step, len(self.now))[:, :1]  # s_t; its a and r are yet to come
        if self.unseen is not None:
            token = torch.cat([self.unseen, token], 1)  # a_{t-1}, r_{t-1}, s_t
        return self.action(self.model.feed(token, self.cache))

    def observe(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None:
        if self.cfg.cacheable:
            step = self._step(states, actions, rewards)
            self.unseen = self.model.embed_prompt(step, len(self.now))[:, 1:]
        self.now.append(Prompt(states[:, None], actions[:, None], rewards[:, None]))

    def _step(self, states: Tensor, actions: Tensor | None, rewards: Tensor | None) -> Prompt:
        """One transition; before the action is known, zeros stand for it and are never read."""
        if actions is None:
            shape = (len(states),) if self.cfg.discrete_actions else (len(states), self.cfg.action_dim)
            actions = torch.zeros(shape, dtype=torch.int64 if self.cfg.discrete_actions else torch.float32)
            rewards = torch.zeros(len(states))
        return self.prompt(states[:, None], actions[:, None], rewards[:, None])


def sort_and_drop(episodes: list[Prompt], keep: int) -> list[Prompt]:
    """Algorithm 2, lines 10-13, for every task: ascending by return, the lowest beyond `keep` dropped.

    Ties keep the order of play, so of equal episodes the oldest goes first.
    """
    stacked = [torch.stack([getattr(p, name) for p in episodes], 1) for name in ("states", "actions", "rewards")]
    order = stacked[2].sum(-1).argsort(dim=1, stable=True)[:, -keep:]  # (N, keep)
    task = torch.arange(len(order))
    return [Prompt(*(array[task, order[:, i]] for array in stacked)) for i in range(order.shape[1])]


class DPTPolicy(ModelPolicy):
    """Algorithm 4: the query state beside a frozen prompt, the last episode (or all of them)."""

    def __init__(self, model: T2MIR, memory: Memory = "last", **options):
        super().__init__(model, **options)
        self.memory, self.cache = memory, None

    def begin(self, history: list[Prompt], rows: int) -> None:
        # In a grid, a frozen prompt gives the same answer in the same cell: each is computed once an episode.
        self.known = None
        if self.cfg.state_values:
            cells = math.prod(self.cfg.state_values)
            self.known = torch.full((rows, cells, self.cfg.action_dim), torch.nan)
        if self.cfg.last:
            if self.cache is None or self.memory == "last" or not history:
                self.cache = self.model.new_cache(rows, 3 * self.cfg.horizon + 1)
            if history:
                new = history[-1]
                self.model.feed(self.model.embed_prompt(self.prompt(new.states, new.actions, new.rewards)), self.cache)
            return
        if history:
            past = history[-1] if self.memory == "last" else concatenate(history)
            self.past = self.prompt(past.states, past.actions, past.rewards)
        else:
            empty = torch.zeros(rows, 0)
            actions = (
                empty.long() if self.cfg.discrete_actions else empty[..., None].expand(-1, -1, self.cfg.action_dim)
            )
            grid = torch.zeros(
                rows, 0, self.cfg.state_dim, dtype=torch.int64 if self.cfg.state_values else torch.float32
            )
            self.past = self.prompt(grid, actions, empty)

    def predict(self, states: Tensor, row: Tensor | slice) -> Tensor:
        """The policy's output (M, A) for states (M, ds) of the tasks `row`."""
        query = self.read(states)[:, None]
        if self.cfg.last:
            if not isinstance(row, slice):
                raise ValueError("the cache holds every task: predict for all of them")
            return self.model.feed(self.model.embed_query(query), self.cache, keep=False)
        past = Prompt(self.past.states[row], self.past.actions[row], self.past.rewards[row])
        none = torch.zeros(len(query), 1, dtype=torch.int64, device=self.device)
        return self.model(DPTBatch(past, None, query, none, none)).action[:, -1]

    def act(self, states: Tensor) -> Tensor:
        if self.known is None:
            return self.action(self.predict(states, slice(None)))
        cell = torch.zeros(len(states), dtype=torch.int64)
        for axis, size in enumerate(self.cfg.state_values):
            cell = cell * size + states[:, axis]
        row = torch.arange(len(states))
        new = self.known[row, cell, 0].isnan()
        if new.any():
            if self.cfg.last:  # one token a task: all rows cost what a few do
                self.known[row, cell] = self.predict(states, slice(None)).float().cpu()
            else:
                self.known[row[new], cell[new]] = self.predict(states[new], row[new]).float().cpu()
        return self.action(self.known[row, cell])

    def observe(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None: ...


def make_policy(model: T2MIR, settings, seed: int = 0, mean: Tensor | None = None, std: Tensor | None = None):
    """The policy of a model's backbone; `settings` has .actions, .history and .prompt (a Config has)."""
    options = {"greedy": settings.actions == "greedy", "seed": seed, "mean": mean, "std": std}
    if model.cfg.backbone == "ad":
        return ADPolicy(model, settings.history, **options)
    return DPTPolicy(model, settings.prompt, **options)


# ------------------------------------------------------------------------------- Algorithms 2 and 4
@torch.inference_mode()
def play(env: str, tasks: list, policy, episodes: int, quiet: bool = True, title: str = "") -> np.ndarray:
    """Algorithms 2 and 4 on N tasks at once: the return of each task and episode, (N, episodes)."""
    batch, history, returns = make_batch(env, tasks), [], []
    bar = tqdm(range(episodes), desc=title, unit="episode", disable=quiet)
    for _ in bar:
        states = torch.from_numpy(batch.reset())
        policy.begin(history, len(tasks))
        steps = []
        for _ in range(batch.spec.horizon):
            actions = policy.act(states)
            following, rewards = batch.step(actions.numpy())
            rewards = torch.from_numpy(rewards)
            policy.observe(states, actions, rewards)
            steps.append((states, actions, rewards))
            states = torch.from_numpy(following)
        history.append(Prompt(*(torch.stack(column, 1) for column in zip(*steps, strict=True))))
        returns.append(history[-1].rewards.sum(1).numpy())
        bar.set_postfix_str(f"return {returns[-1].mean():.1f}")
    return np.stack(returns, 1)


# ----------------------------------------------------------------------------------------- reporting
# fmt: off
SUMMARY = (
    "env", "backbone", "moe", "routing", "quality", "preset", "seed", "steps", "train_seconds", "episodes",
    "first_return", "last_return", "best_return", "random_return", "optimum", "paper_return", "command",
)
# fmt: on


def interval(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean over tasks (axis 0), per episode."""
    if len(returns) < 2:
        return returns[0], returns[0]
    found = bootstrap((returns,), np.mean, axis=0, n_resamples=2000, method="percentile", rng=0)
    return found.confidence_interval.low, found.confidence_interval.high


def draw_curve(
    path: Path, title: str, returns: np.ndarray, lines: dict[str, float], ceiling: np.ndarray | None
) -> None:
    """The return of each episode over held-out tasks, its interval, reference lines and the exact ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    episode = np.arange(1, returns.shape[1] + 1)
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    low, high = interval(returns)
    axis.fill_between(episode, low, high, alpha=0.25, linewidth=0)
    axis.plot(episode, returns.mean(0), label="this run, 95 % over tasks")
    if ceiling is not None:
        axis.plot(episode, ceiling, color="black", linestyle=":", label="exact posterior, same memory")
    for (name, value), style in zip(lines.items(), ("--", "-.", (0, (1, 3))), strict=False):
        if value is not None:
            axis.axhline(value, color="gray", linestyle=style, linewidth=1, label=f"{name} {value:.1f}")
    axis.set(xlabel="episode", ylabel="return on held-out tasks", title=title, xlim=(1, max(2, len(episode))))
    axis.legend(fontsize=8, loc="best")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    plt.close(figure)


def write_csv(path: Path, tasks: list, returns: np.ndarray) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["task", "episode", "return"])
            for task, row in zip(tasks, returns, strict=True):
                out.writerows([" ".join(map(str, task)), e + 1, f"{value:g}"] for e, value in enumerate(row))

    write_atomically(path, write)


def append_summary(path: Path, row: dict) -> None:
    """One row a run. Raises ValueError if the file has other columns."""
    exists = path.exists()
    if exists and path.read_text().splitlines()[:1] != [",".join(SUMMARY)]:
        raise ValueError(f"{path} has other columns than a summary; move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        out = csv.DictWriter(file, SUMMARY, lineterminator="\n")
        if not exists:
            out.writeheader()
        out.writerow(row)


def evaluate_run(
    folder: str | Path,
    episodes: int = 40,
    actions: Actions = "sample",
    prompt: Memory = "last",
    history: int = 4,
    repeats: int = 1,
    seed: int = 0,
    split: Literal["test", "train"] = "test",
    results: str | None = None,
    device: str = "cpu",
) -> dict:
    """Play a run's held-out tasks, write `returns.csv`, `curve.png` and a row of `summary.csv`, print the table.

    `results` is the folder for these (default: the run's own, its summary beside the run). Returns the row.
    Raises ValueError with one line for a folder that is not a run.
    """
    folder = Path(folder)
    if min(episodes, history, repeats) < 1:
        raise ValueError("--episodes, --history and --repeats must be at least 1")
    model, cfg, about, (mean, std) = checkpoint.load_model(folder, device)
    spec = get_spec(cfg.env)
    tasks = checkpoint.read_tasks(folder)[split]
    played = tasks * repeats
    settings = Settings(actions, prompt, history)
    policy = make_policy(model, settings, seed, mean, std)
    returns = play(cfg.env, played, policy, episodes, quiet=False, title=f"evaluating on {len(tasks)} {split} tasks")

    optimum, floor = optimal_returns(cfg.env, tasks).mean(), random_returns(cfg.env, tasks).mean()
    paper = spec.paper_return.get((cfg.backbone, cfg.moe)) if cfg.quality == "mixed" else None
    ceiling = None
    if cfg.env == "darkroom":
        memory = prompt if cfg.backbone == "dpt" else "all"
        ceiling = play(cfg.env, tasks * 20, ExactPosterior(memory, seed=seed), episodes).mean(0)
    curve = returns.mean(0)
    last = min(5, episodes)
    variant = f"{actions}" + (f"-{prompt}" if cfg.backbone == "dpt" else f"-history{history}")
    name = folder.resolve().name
    if results is None:
        target, summary, name = folder, folder.parent / "summary.csv", f"{split}-{variant}"
    else:
        target, summary, name = Path(results), Path(results) / "summary.csv", f"{name}-{split}-{variant}"
    write_csv(target / f"{name}.csv", played, returns)
    title = f"{cfg.env}, {'T2MIR-' if cfg.moe != 'none' else ''}{cfg.backbone.upper()}, {split} tasks ({variant})"
    lines = {"optimum": optimum, "paper": paper, "random": floor}
    draw_curve(target / f"{name}.png", title, returns, lines, ceiling)
    row = {
        "env": cfg.env,
        "backbone": cfg.backbone,
        "moe": cfg.moe,
        "routing": cfg.routing if cfg.moe in ("both", "task") else "",
        "quality": cfg.quality,
        "preset": cfg.preset,
        "seed": cfg.seed,
        "steps": about["step"],
        "train_seconds": f"{float(about['seconds']):.0f}",
        "episodes": episodes,
        "first_return": f"{curve[0]:.2f}",
        "last_return": f"{curve[-last:].mean():.2f}",
        "best_return": f"{curve.max():.2f}",
        "random_return": f"{floor:.2f}",
        "optimum": f"{optimum:.2f}",
        "paper_return": "" if paper is None else paper,
        "command": f"python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
    }
    append_summary(summary, row)
    print_table(row, curve, ceiling, last)
    print(f"curve: {target / name}.png   returns: {target / name}.csv   summary: {summary}")
    return row


def print_table(row: dict, curve: np.ndarray, ceiling: np.ndarray | None, last: int) -> None:
    low = [("first episode", row["first_return"]), (f"last {last} episodes", row["last_return"])]
    low += [(f"best episode ({int(curve.argmax()) + 1})", row["best_return"]), ("optimum", row["optimum"])]
    if ceiling is not None:
        low += [(f"exact posterior, last {last}", f"{ceiling[-last:].mean():.2f}")]
    low += [("random policy", row["random_return"]), ("paper", row["paper_return"] or "-")]
    print("\n".join(f"  {name:<26}{value:>8}" for name, value in low))


@dataclass(frozen=True)
class Settings:
    """How a policy plays; the fields of `config.Config` of the same names."""

    actions: Actions
    prompt: Memory
    history: int


def main(
    folder: tyro.conf.Positional[str],
    episodes: int | None = None,
    actions: Actions | None = None,
    prompt: Memory | None = None,
    history: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    split: Literal["test", "train"] = "test",
    results: str | None = None,
    device: str = "cpu",
) -> None:
    """Evaluate the run in FOLDER on its held-out tasks; what is not given is as in its training.

    Args:
        folder: a run's folder, runs/...
        episodes: episodes on each task.
        actions: sample or greedy.
        prompt: DPT: last episode or all of them.
        history: AD: finished episodes in the history.
        repeats: play every task this often, independently.
        seed: seed of the sampled actions.
        split: held-out tasks, or those trained on.
        results: folder for the CSV, the picture and summary.csv.
        device: cpu or cuda.
    """
    cfg = checkpoint.load_config(folder)
    given = {"episodes": episodes, "actions": actions, "prompt": prompt, "history": history}
    filled = {k: getattr(cfg, k) if v is None else v for k, v in given.items()}
    evaluate_run(folder, **filled, repeats=repeats, seed=seed, split=split, results=results, device=device)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; nothing was written") from None
