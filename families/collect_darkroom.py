"""collect_darkroom.py: the behaviours that make DarkRoom's datasets (paper App. D.2).

in : a goal, a `CollectConfig`          out: the arrays of one training task
Read beside collect.py.

The expert walks along x, then y, then stays. In episode i of a task it acts at random with probability eps_i,
which falls from 1 to 0 ("progressively reducing the noise"). Qualities:

    mixed          every eps from 1 to 0                              queries labelled by eps = 0
    medium-expert  those eps whose exact expected return is < 80 %    ... by the 80 % expert
    medium         those < 50 % of the expert's                       ... by the 50 % expert

Differs from the paper (a switch): `--recipe paper` is the paper's data. A prompt rolled out by a task's
own noisy expert gives the goal away through its *actions*, which a policy's own rollouts never do; a
DPT that reads them learns nothing of rewards. `--recipe explore` adds what Sec. 3.1 allows, "arbitrary
behaviour policies": 45 % walks towards a fresh random goal at every step, 45 % noisy experts of other
goals, 10 % this task's nearly noiseless expert; rewards are always this task's. Rewarded prompts that
merely pass the goal decide at test time and are rare, so a quarter of the first two kinds is chosen to
cross it. That choice does not bias a prompt without rewards: there the goal stays uniform over all cells
that were not visited. `--recipe wander` is the same with 5 % experts and no chosen crossings: prompts of many
episodes without a reward, in which only the corners are left, are then not rare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs import get_family
from families.rooms import SIDE, darkroom_expert, darkroom_move, darkroom_noisy_return

# share of the task's own expert; share of the other walks that is chosen to cross the goal
SHARES = {"explore": (0.1, 0.25), "wander": (0.05, 0.0)}
LEVEL = {"mixed": 1.0, "medium-expert": 0.8, "medium": 0.5}  # share of the expert's return


def noise_levels(goal, quality: str, episodes: int) -> np.ndarray:
    """eps of each episode (E,): 1 falling linearly to that of the quality's level over the first 90 %."""
    lowest = 0.0
    if quality != "mixed":
        grid = np.linspace(0, 1, 101)
        curve = darkroom_noisy_return([goal], grid)[0]
        lowest = grid[
            curve < LEVEL[quality] * curve[0]
        ].min()  # the first level below the threshold
    return np.linspace(1, lowest, max(1, round(0.9 * episodes))).take(
        np.arange(episodes), mode="clip"
    )


def label_noise(goal, quality: str) -> float:
    """eps of the expert that labels queries: the one at 100, 80 or 50 % performance (App. D.2)."""
    return float(noise_levels(goal, quality, 2)[-1])


def walk(
    first_goals: np.ndarray,
    eps: np.ndarray,
    horizon: int,
    rng: np.random.Generator,
    redraw: bool = False,
):
    """Roll out M noisy experts at once: states (M, T, 2), actions (M, T), cells after each move (M, T, 2).

    `first_goals` (M, 2) and `eps` (M,); `redraw` gives every walker a fresh random goal at every step.
    """
    many = len(eps)
    cells, goals = np.zeros((many, 2), np.int64), first_goals
    states, actions = np.empty((many, horizon, 2), np.uint8), np.empty((many, horizon), np.uint8)
    after = np.empty_like(states)
    for t in range(horizon):
        if redraw:
            goals = rng.integers(SIDE, size=(many, 2))
        act = np.where(
            rng.random(many) < eps, rng.integers(5, size=many), darkroom_expert(cells, goals)
        )
        states[:, t], actions[:, t] = cells, act
        cells = darkroom_move(cells, act)
        after[:, t] = cells
    return states, actions, after


@dataclass
class Walks:
    """M rollouts that know no task, and which cells each of them entered."""

    states: np.ndarray  # (M, T, 2) uint8
    actions: np.ndarray  # (M, T) uint8
    after: np.ndarray  # (M, T, 2) uint8, the cell that each step led to
    entered: np.ndarray  # (M, 100) bool

    @classmethod
    def of(cls, states, actions, after) -> Walks:
        entered = np.zeros((len(states), SIDE**2), bool)
        entered[np.arange(len(states))[:, None], after.astype(np.int64) @ [SIDE, 1]] = True
        return cls(states, actions, after, entered)


def explore_pool(train_tasks, horizon: int, rng: np.random.Generator, size: int = 20000) -> Walks:
    """Two kinds of them, M = `size` each: towards a fresh random goal at every step; then noisy experts of
    random training goals.
    """
    goals = np.asarray(train_tasks)[rng.integers(len(train_tasks), size=size)]
    redrawn = walk(goals, np.zeros(size), horizon, rng, redraw=True)
    noisy = walk(goals, rng.random(size), horizon, rng)
    return Walks.of(*(np.concatenate(pair) for pair in zip(redrawn, noisy, strict=True)))


def choose_walks(
    pool: Walks, goal, count: int, rng: np.random.Generator, crossing: float
) -> np.ndarray:
    """Indices (2 * count,) of `count` walks of each kind; a share `crossing` is drawn from those that enter the goal.

    A kind that never entered it (the first one, for far corners) borrows from the other.
    """
    size = len(pool.states) // 2
    hits = np.flatnonzero(pool.entered[:, int(np.asarray(goal) @ [SIDE, 1])])
    chosen = []
    for kind in range(2):
        own = hits[hits // size == kind]
        own = own if len(own) else hits
        pick = kind * size + rng.integers(size, size=count)
        if len(own):
            pick = np.where(
                rng.random(count) < crossing, own[rng.integers(len(own), size=count)], pick
            )
        chosen.append(pick)
    return np.concatenate(chosen)


def collect_darkroom_task(cfg, index: int, goal, pool: Walks | None) -> dict[str, np.ndarray]:
    """The arrays of one training task; its random stream depends on the seed and the task alone."""
    spec = get_family(cfg.env)
    rng = np.random.default_rng([cfg.seed, 1, index])
    goal = np.asarray(goal)
    own = noise_levels(goal, cfg.quality, cfg.episodes)
    if cfg.recipe in SHARES:
        own_share, crossing = SHARES[cfg.recipe]
        free = int((1 - own_share) / 2 * cfg.episodes)
        best = own.min() + 0.1 * rng.random(
            cfg.episodes - 2 * free
        )  # nearly noiseless for the quality
        expert = walk(np.broadcast_to(goal, (len(best), 2)), best, spec.horizon, rng)
        pick = choose_walks(pool, goal, free, rng, crossing)
        walks = (pool.states[pick], pool.actions[pick], pool.after[pick])
        states, actions, after = (np.concatenate(pair) for pair in zip(walks, expert, strict=True))
        mixed = rng.permutation(cfg.episodes)
        states, actions, after = states[mixed], actions[mixed], after[mixed]
        queries = rng.integers(SIDE, size=(cfg.queries, 2))  # anywhere in the room
    else:
        states, actions, after = walk(
            np.broadcast_to(goal, (cfg.episodes, 2)), own, spec.horizon, rng
        )
        visited = states.reshape(-1, 2)
        queries = visited[rng.integers(len(visited), size=cfg.queries)].astype(np.int64)
    noisy = rng.random(cfg.queries) < label_noise(goal, cfg.quality)
    labels = np.where(noisy, rng.integers(5, size=cfg.queries), darkroom_expert(queries, goal))
    return {
        "states": states,
        "actions": actions,
        "rewards": (after == goal).all(-1).astype(np.float32),
        "query_states": queries.astype(np.uint8),
        "query_actions": labels.astype(np.uint8),
    }
