"""evaluate.py: in-context learning on held-out tasks, without weight updates (App. A: Algorithms 2 and 4).

in : a run's folder       out: returns of every task and episode (CSV), the curve (PNG), a table
Read after train.py.

    python evaluate.py runs/darkroom-dpt-both-mixed-cpu-s0
    python evaluate.py runs/... --prompt all --actions greedy --results results/darkroom

All tasks are played at once, by a policy of policies.py.
"""

from __future__ import annotations

import csv
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from scipy.stats import bootstrap

from data import Prompt
from envs import get_family, make_batch, optimal_returns, random_returns
from policies import Actions, ExactPosterior, First, Memory, check_noise, make_policy
from support import checkpoint
from support.distributed import resolve_device
from support.files import progress, write_atomically


# ------------------------------------------------------------------------------- Algorithms 2 and 4
@torch.inference_mode()
def play(
    env: str,
    tasks: list,
    policy,
    episodes: int,
    quiet: bool = True,
    title: str = "",
    seed: int = 0,
    success: list | None = None,
) -> np.ndarray:
    """Algorithms 2 and 4 on N tasks at once: the return of each task and episode, (N, episodes).

    `seed` is that of the starts. A list given as `success` gains, for a family that can succeed, whether each task
    did in each episode: (N,) bool an episode.
    """
    batch, history, returns = make_batch(env, tasks, seed), [], []
    bar = progress(range(episodes), desc=title, unit="episode", disable=quiet)
    for _ in bar:
        states = torch.from_numpy(batch.reset())
        policy.begin(history, len(tasks))
        steps = []
        for _ in range(get_family(env).horizon):
            actions = policy.act(states)
            following, rewards = batch.step(actions.numpy())
            rewards = torch.from_numpy(rewards)
            policy.observe(states, actions, rewards)
            steps.append((states, actions, rewards))
            states = torch.from_numpy(following)
        history.append(Prompt(*(torch.stack(column, 1) for column in zip(*steps, strict=True))))
        returns.append(history[-1].rewards.sum(1).numpy())
        if success is not None and batch.success is not None:
            success.append(batch.success.copy())
        bar.set_postfix_str(f"return {returns[-1].mean():.1f}", refresh=False)
    return np.stack(returns, 1)


# ----------------------------------------------------------------------------------------- reporting
# fmt: off
SUMMARY = (
    "env", "backbone", "moe", "routing", "quality", "preset", "seed", "steps", "train_seconds", "episodes",
    "first_return", "last_return", "best_return", "random_return", "optimum", "teacher_return", "success",
    "paper_return", "command",
)
# fmt: on


def interval(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean over tasks (axis 0), per episode."""
    if len(returns) < 2:
        return returns[0], returns[0]
    found = bootstrap((returns,), np.mean, axis=0, n_resamples=2000, method="percentile", rng=0)
    return found.confidence_interval.low, found.confidence_interval.high


def draw_curve(
    path: Path,
    title: str,
    returns: np.ndarray,
    lines: dict,
    ceiling: np.ndarray | None,
    memory: str,
) -> None:
    """The return of each episode over held-out tasks, its interval, reference lines and the exact ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    episode = np.arange(1, returns.shape[1] + 1)
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    low, high = interval(returns)
    axis.fill_between(episode, low, high, alpha=0.25, linewidth=0)
    axis.plot(episode, returns.mean(0), label="this run, 95 % over tasks")
    if ceiling is not None:
        axis.plot(
            episode,
            ceiling,
            color="black",
            linestyle=":",
            label=f"exact posterior, prompt {memory}",
        )
    for (name, value), style in zip(
        lines.items(), ("--", (0, (5, 1)), "-.", (0, (1, 3))), strict=True
    ):
        if value is not None:
            axis.axhline(
                value, color="gray", linestyle=style, linewidth=1, label=f"{name} {value:.1f}"
            )
    axis.set(
        xlabel="episode",
        ylabel="return on held-out tasks",
        title=title,
        xlim=(1, max(2, len(episode))),
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8, loc="best")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    plt.close(figure)


def write_csv(
    path: Path, tasks: list, returns: np.ndarray, success: np.ndarray | None = None
) -> None:
    """A row for each task and episode. A task is its numbers, or its place in the list where they are many."""
    kinds = [list(task) for i, task in enumerate(tasks) if task not in tasks[:i]]

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["task", "episode", "return"] + ["success"] * (success is not None))
            for i, (task, row) in enumerate(zip(tasks, returns, strict=True)):
                name = " ".join(map(str, task)) if len(task) <= 3 else kinds.index(list(task))
                for e, value in enumerate(row):
                    out.writerow(
                        [name, e + 1, f"{value:g}"]
                        + ([] if success is None else [int(success[i, e])])
                    )

    write_atomically(path, write)


def check_summary(path: Path) -> bool:
    """Whether there is one already. Raises ValueError if that file has other columns."""
    if path.exists() and path.read_text().splitlines()[:1] != [",".join(SUMMARY)]:
        raise ValueError(f"{path} has other columns than a summary; move it away")
    return path.exists()


def append_summary(path: Path, row: dict) -> None:
    """One row a run. Raises ValueError if the file has other columns."""
    exists = check_summary(path)
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
    first: First = "policy",
    noise: float = 0.0,
    repeats: int = 1,
    seed: int = 0,
    split: Literal["test", "train"] = "test",
    results: str | None = None,
    device: str = "cpu",
) -> dict:
    """Play a run's held-out tasks, write returns (CSV), curve (PNG) and a row of `summary.csv`, print the table.

    `results` is the folder for these (default: the run's own, its summary beside the run). Returns the row.
    Raises ValueError with one line for a folder that is not a run.
    """
    folder = Path(folder)
    if min(episodes, history, repeats) < 1:
        raise ValueError("--episodes, --history and --repeats must be at least 1")
    model, cfg, about, (mean, std) = checkpoint.load_model(folder, resolve_device(device))
    check_noise(noise, cfg.env)
    spec = get_family(cfg.env)
    tasks = checkpoint.read_tasks(folder)[split]
    played = tasks * repeats
    continuous = f"noise{noise:g}" if noise else "mean"
    how = [
        actions if spec.discrete_actions else continuous,
        prompt if cfg.backbone == "dpt" else f"history{history}",
    ]
    variant = "-".join(how + ["random-first"] * (first == "random"))
    if results is None:
        target, summary, name = folder, folder.parent / "summary.csv", f"{split}-{variant}"
    else:
        target, name = Path(results), f"{folder.resolve().name}-{split}-{variant}"
        summary = target / "summary.csv"
    check_summary(summary)  # before the work
    settings = Settings(actions, prompt, history, first, noise)
    policy = make_policy(model, settings, seed, mean, std)
    title, succeeded = f"evaluating on {len(tasks)} {split} tasks", []
    returns = play(
        cfg.env, played, policy, episodes, quiet=False, title=title, seed=seed, success=succeeded
    )
    success = np.stack(succeeded, 1) if succeeded else None

    known = checkpoint.read_reference(folder, split)  # measured when the data were collected
    floor = np.mean(known["random"] if known else random_returns(cfg.env, tasks))
    optimum, expert = optimal_returns(cfg.env, tasks), np.mean(known["teacher"]) if known else None
    optimum = None if optimum is None else optimum.mean()
    paper = spec.paper_return.get((cfg.backbone, cfg.moe)) if cfg.quality == "mixed" else None
    ceiling, memory = None, prompt if cfg.backbone == "dpt" else "all"
    if cfg.env == "darkroom":
        ceiling = play(cfg.env, tasks * 20, ExactPosterior(memory, seed=seed), episodes).mean(0)
    curve = returns.mean(0)
    last = min(5, episodes)
    write_csv(target / f"{name}.csv", played, returns, success)
    title = f"{cfg.env}, {'T2MIR-' if cfg.moe != 'none' else ''}{cfg.backbone.upper()}, {split} tasks ({variant})"
    lines = {"optimum": optimum, "teacher": expert, "paper": paper, "random": floor}
    per_task = returns.reshape(repeats, len(tasks), -1).mean(
        0
    )  # repeats of a task are not further tasks
    draw_curve(target / f"{name}.png", title, per_task, lines, ceiling, memory)

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

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
        "first_return": number(curve[0]),
        "last_return": number(curve[-last:].mean()),
        "best_return": number(curve.max()),
        "random_return": number(floor),
        "optimum": number(optimum),
        "teacher_return": number(expert),
        "success": number(None if success is None else success[:, -last:].mean()),
        "paper_return": "" if paper is None else paper,
        "command": f"python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
    }
    append_summary(summary, row)
    print_table(row, curve, ceiling, last)
    print(f"curve: {target / name}.png   returns: {target / name}.csv   summary: {summary}")
    return row


def normalised(value: float, floor: float, best: float) -> float:
    """0 the random policy's return, 1 the optimum's (or the expert's, where no optimum is known)."""
    return (value - floor) / (best - floor)


def print_table(row: dict, curve: np.ndarray, ceiling: np.ndarray | None, last: int) -> None:
    low = [("first episode", row["first_return"]), (f"last {last} episodes", row["last_return"])]
    low += [(f"best episode ({int(curve.argmax()) + 1})", row["best_return"])]
    if ceiling is not None:
        low += [(f"exact posterior, last {last}", f"{ceiling[-last:].mean():.2f}")]
    for name in ("optimum", "teacher_return", "random_return", "paper_return"):
        low += [(name.removesuffix("_return"), row[name] or "-")]
    best = "optimum" if row["optimum"] else "teacher_return"
    if row[best] and row[best] != row["random_return"]:
        share = normalised(*(float(row[k]) for k in ("last_return", "random_return", best)))
        low += [(f"random 0, {best.removesuffix('_return')} 1: last {last}", f"{share:.3f}")]
    if row["success"]:
        low += [(f"success, last {last}", f"{100 * float(row['success']):.0f} %")]
    print("\n".join(f"  {name:<32}{value:>8}" for name, value in low))


@dataclass(frozen=True)
class Settings:
    """How a policy plays; the fields of `config.Config` of the same names."""

    actions: Actions
    prompt: Memory
    history: int
    first: First
    noise: float = 0.0


def main(
    folder: tyro.conf.Positional[str],
    episodes: int | None = None,
    actions: Actions | None = None,
    prompt: Memory | None = None,
    history: int | None = None,
    first: First | None = None,
    noise: float | None = None,
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
        first: who plays the first episode: the policy or random actions.
        noise: deviation of the noise on continuous actions.
        repeats: play every task this often, independently.
        seed: seed of the sampled actions.
        split: held-out tasks, or those trained on.
        results: folder for the CSV, the picture and summary.csv.
        device: cpu or cuda.
    """
    cfg = checkpoint.load_config(folder)
    given = {"episodes": episodes, "actions": actions, "prompt": prompt, "history": history, "first": first,
             "noise": noise}  # fmt: skip
    filled = {k: getattr(cfg, k) if v is None else v for k, v in given.items()}
    evaluate_run(
        folder, **filled, repeats=repeats, seed=seed, split=split, results=results, device=device
    )


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; nothing was written") from None
