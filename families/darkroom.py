"""darkroom.py: DarkRoom (paper App. D.1) and the behaviours that make its datasets (App. D.2).

A room of 10 x 10 cells, an agent that starts in the corner and sees its own cell, a goal that it
does not see: 100 steps, reward 1 for every step that ends at the goal. A task is the goal's cell.

in : goals (N, 2), actions (N,)          out: states (N, 2), rewards (N,); arrays of a dataset
Read after point_robot.py (a family without extras) and beside collect.py (the lower half).
posterior.py goes on from here: what a perfect DPT would do in this room.

The teacher walks along x, then y, then stays. In episode i of a task it acts at random with
probability eps_i, which falls from 1 to 0 ("progressively reducing the noise"). Qualities:

    mixed          every eps from 1 to 0                           queries labelled by eps = 0
    medium-expert  eps whose exact expected return is < 80 %       ... by the 80 % teacher
    medium         eps ... < 50 % of the noiseless teacher's       ... by the 50 % teacher

Differs from the official code: its DarkRoom for DPT is a 9 x 9 room with 20 steps; here both
backbones play in the paper's room.
Differs from the paper (a switch): `--recipe paper` is the paper's data. A prompt rolled out by a
task's own noisy teacher gives the goal away through its *actions*, which a policy's own rollouts
never do; a DPT that reads them learns nothing of rewards. `--recipe explore` adds what Sec. 3.1
allows, "arbitrary behaviour policies": 45 % walks towards a fresh random goal at every step, 45 %
noisy teachers of other goals, 10 % this task's nearly noiseless teacher; rewards are always this
task's. Rewarded prompts that merely pass the goal decide at test time and are rare, so a quarter of
the first two kinds is chosen to cross it. That choice does not bias a prompt without rewards: there
the goal stays uniform over all cells that were not visited. `--recipe wander` is the same with 5 %
teachers and no chosen crossings: prompts of many episodes without a reward, in which only the
corners are left, are then not rare.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from envs import Family, SingleTask, later

HORIZON = 100
SIDE = 10  # cells along one wall; a cell's id is 10 x + y
MOVES = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]])  # right, left, up, down, stay
RIGHT, LEFT, UP, DOWN, STAY = range(len(MOVES))
CELLS = np.stack(np.divmod(np.arange(SIDE**2), SIDE), -1)  # (100, 2), by id


# -------------------------------------------------------------------------------------- rules (D.1)
def cell_id(cells):
    """Ids (...) of cells (..., 2), arrays or tensors."""
    return cells[..., 0] * SIDE + cells[..., 1]


def darkroom_move(cells: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Cells (..., 2) after `actions` (...): a move against a wall stays where it is."""
    return np.clip(cells + MOVES[actions], 0, SIDE - 1)


class BatchedDarkRoom:
    """N tasks stepped at once: states (N, 2) int64, actions (N,) -> rewards (N,) float32.

    Nothing is random here; `seed` is there for the interface.
    """

    def __init__(self, tasks, seed: int = 0):
        self.goals = np.asarray(tasks, np.int64)
        self.cells = np.zeros_like(self.goals)

    def reset(self) -> np.ndarray:
        self.cells = np.zeros_like(self.goals)  # "started from [0, 0]"
        return self.cells

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.cells = darkroom_move(self.cells, actions)  # a new array: what was returned stays
        # "r = 1 when the agent is at the goal": after the move, so also when it stays there
        return self.cells, (self.cells == self.goals).all(-1).astype(np.float32)


def sample_goals(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 2), any cell as likely; the split below is what the paper uses."""
    return rng.integers(SIDE, size=(count, 2))


def split_goals(seed: int, train: int, test: int) -> tuple[list, list]:
    """All cells in a random order: the first ones to train on, the next ones to hold out."""
    # not drawn one by one: a goal that is trained on must not be held out
    if train + test > SIDE**2:
        raise ValueError(
            f"a room has {SIDE**2} cells: {train} training and {test} held-out goals are too many"
        )
    cells = CELLS[np.random.default_rng(seed).permutation(SIDE**2)].tolist()
    return cells[:train], cells[train : train + test]


def check_goal(task) -> list[int]:
    """A goal as two plain numbers; raises ValueError for one that is not a cell."""
    pair = isinstance(task, (list, tuple, np.ndarray)) and len(task) == 2
    if not pair or not all(
        isinstance(v, (int, np.integer)) and not isinstance(v, bool) and 0 <= v < SIDE for v in task
    ):
        one_line = " ".join(str(task).split())[:60]
        raise ValueError(
            f"a DarkRoom goal is two whole numbers from 0 to {SIDE - 1}, not {one_line}"
        )
    return [int(v) for v in task]


# ------------------------------------------------------------------------------------- closed forms
def darkroom_teacher(cells: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """The optimal action (...) for `cells` (..., 2) and `goals` (..., 2): x first, y, then stay."""
    dx, dy = np.moveaxis(goals - cells, -1, 0)
    along_y = np.where(dy > 0, UP, np.where(dy < 0, DOWN, STAY))
    return np.where(dx > 0, RIGHT, np.where(dx < 0, LEFT, along_y))


def darkroom_optimum(tasks) -> np.ndarray:
    """Best return of each goal (N,), exactly: 101 - d at Manhattan distance d > 0, 100 at d = 0.

    The reward of a step is that of the cell *after* the move, so the d-th step is the first to pay.
    """
    distance = np.asarray(tasks).sum(-1)
    return np.where(distance == 0, 100.0, 101.0 - distance)


def darkroom_noisy_return(tasks, eps) -> np.ndarray:
    """Expected return (N, M) of the teacher of each goal (N, 2) that acts at random with eps (M,).

    Exact: the distribution over the 100 cells is carried through the 100 steps. eps = 1 is the
    random policy, eps = 0 the optimum; App. D.2's levels (80 %, 50 %) are read off this curve.
    """
    goals, eps = np.asarray(tasks), np.asarray(eps, dtype=float)
    # (100, 5): the id that each action leads to
    to = cell_id(darkroom_move(CELLS[:, None], np.arange(len(MOVES))[None]))
    # Two ways of walking as matrices of probabilities; row: from, column: to.
    random_walk = np.zeros((SIDE**2, SIDE**2))
    np.add.at(random_walk, (np.arange(SIDE**2)[:, None], to), 1 / len(MOVES))
    best = darkroom_teacher(CELLS[None], goals[:, None])  # (N, 100)
    best_to = np.take_along_axis(np.broadcast_to(to, (len(goals), *to.shape)), best[..., None], 2)
    teacher_walk = np.zeros((len(goals), SIDE**2, SIDE**2))
    np.put_along_axis(teacher_walk, best_to, 1.0, 2)
    here = np.zeros((len(goals), len(eps), SIDE**2))
    here[..., 0] = 1.0  # every episode starts in the corner
    total = np.zeros((len(goals), len(eps)))
    for _ in range(HORIZON):
        # (N, M, 100): with probability eps a random move, else the teacher's
        here = eps[:, None] * (here @ random_walk) + (1 - eps)[:, None] * (here @ teacher_walk)
        # the expected reward of a step is the probability to stand at the goal after it
        total += np.take_along_axis(here, cell_id(goals)[:, None, None], 2)[..., 0]
    return total


def random_returns(tasks) -> np.ndarray:
    """Expected return (N,) of random actions, exactly."""
    return darkroom_noisy_return(tasks, [1.0])[:, 0]


# --------------------------------------------------------------------------------------- data (D.2)
# share of the task's own teacher; share of the other walks that is chosen to cross the goal
SHARES = {"explore": (0.1, 0.25), "wander": (0.05, 0.0)}
LEVEL = {"medium-expert": 0.8, "medium": 0.5}  # share of the teacher's return


def noise_levels(goal, quality: str, episodes: int) -> np.ndarray:
    """eps of each episode (E,): from 1 to that of the quality's level over the first 90 %, then it
    stays there.
    """
    lowest = 0.0
    if quality in LEVEL:
        grid = np.linspace(0, 1, 101)
        curve = darkroom_noisy_return([goal], grid)[0]  # falls as eps grows
        below = curve < LEVEL[quality] * curve[0]  # curve[0]: without noise
        lowest = grid[below].min()
    # a straight fall over nine tenths of the episodes; the last tenth stays at the lowest
    falling = np.linspace(1, lowest, max(1, round(0.9 * episodes)))
    return falling.take(np.arange(episodes), mode="clip")


@dataclass
class Walks:
    """M episodes of behaviour. Rewards are not among them: the task that reads them pays."""

    states: np.ndarray  # (M, T, 2) uint8
    actions: np.ndarray  # (M, T) uint8
    after: np.ndarray  # (M, T, 2) uint8, the cell that each step led to

    def __getitem__(self, rows) -> Walks:
        return Walks(self.states[rows], self.actions[rows], self.after[rows])

    def __add__(self, other: Walks) -> Walks:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Walks(*(np.concatenate(pair) for pair in pairs))

    def enter(self, goal) -> np.ndarray:
        """Which walks step into the goal: (M,) bool."""
        x, y = goal
        return ((self.after[..., 0] == x) & (self.after[..., 1] == y)).any(-1)


def walk(
    goals: np.ndarray, eps: np.ndarray, rng: np.random.Generator, redraw: bool = False
) -> Walks:
    """Roll out M noisy teachers at once: `goals` (M, 2), `eps` (M,).

    `redraw` gives every walker a fresh random goal at every step instead.
    """
    count = len(eps)
    cells = np.zeros((count, 2), np.int64)
    states = np.empty((count, HORIZON, 2), np.uint8)
    actions = np.empty((count, HORIZON), np.uint8)
    after = np.empty_like(states)
    for t in range(HORIZON):
        if redraw:
            goals = rng.integers(SIDE, size=(count, 2))
        noisy = rng.random(count) < eps
        random = rng.integers(len(MOVES), size=count)  # drawn for all, used where `noisy`
        states[:, t] = cells
        actions[:, t] = np.where(noisy, random, darkroom_teacher(cells, goals))
        cells = darkroom_move(cells, actions[:, t])
        after[:, t] = cells
    return Walks(states, actions, after)


def explore_pool(train_tasks, rng: np.random.Generator, size: int = 20000) -> Walks:
    """Walks that know no task, two kinds of them, M = `size` each: towards a fresh random goal at
    every step; then noisy teachers of random training goals.
    """
    # of training goals: a teacher of a held-out one would be data of a held-out task
    goals = np.asarray(train_tasks)[rng.integers(len(train_tasks), size=size)]
    redrawn = walk(goals, np.zeros(size), rng, redraw=True)
    return redrawn + walk(goals, rng.random(size), rng)


def choose_walks(
    pool: Walks, goal, count: int, rng: np.random.Generator, crossing: float
) -> np.ndarray:
    """Indices (2 * count,): `count` walks of each kind, a share `crossing` of them drawn from those
    that enter the goal.

    A kind that never entered it (the first one, for far corners) borrows from the other.
    """
    size = len(pool.states) // 2
    hits = np.flatnonzero(pool.enter(goal))
    chosen = []
    for kind in range(2):
        of_kind = hits[hits // size == kind]  # the first `size` walks of the pool are kind 0
        of_kind = of_kind if len(of_kind) else hits
        pick = kind * size + rng.integers(size, size=count)
        if len(of_kind):
            crosses = rng.random(count) < crossing
            pick = np.where(crosses, of_kind[rng.integers(len(of_kind), size=count)], pick)
        chosen.append(pick)
    return np.concatenate(chosen)


def collect_task(data, index: int, goal, pool: Walks | None) -> dict[str, np.ndarray]:
    """The arrays of one training task (data.py says which) by the settings `data` (config.Data).

    `pool`: the walks that know no task, of a recipe that has some (`SHARES`); else None.
    Its random stream depends on the seed and the task's number alone.
    """
    rng = np.random.default_rng([data.data_seed, 1, index])
    goal, episodes, queries = np.asarray(goal), data.data_episodes, data.data_queries
    eps = noise_levels(goal, data.quality, episodes)
    if pool is not None:
        share, crossing = SHARES[data.recipe]
        each = int((1 - share) / 2 * episodes)  # walks of each kind that do not know the goal
        count = episodes - 2 * each
        low = eps.min() + 0.1 * rng.random(count)  # nearly noiseless for the quality
        by_teacher = walk(np.broadcast_to(goal, (count, 2)), low, rng)
        walks = pool[choose_walks(pool, goal, each, rng, crossing)] + by_teacher
        walks = walks[rng.permutation(episodes)]  # a prompt of several episodes mixes the kinds
        # Queries anywhere in the room: drawn where the teacher has been, they too would point to
        # the goal.
        cells = rng.integers(SIDE, size=(queries, 2))
    else:
        # the paper's: states of D_i (Algorithm 3, line 3)
        walks = walk(np.broadcast_to(goal, (episodes, 2)), eps, rng)
        visited = walks.states.reshape(-1, 2)
        cells = visited[rng.integers(len(visited), size=queries)].astype(np.int64)
    # labelled by the teacher at 100, 80 or 50 % performance (App. D.2), the least noisy one
    noisy = rng.random(queries) < eps.min()
    random = rng.integers(len(MOVES), size=queries)
    labels = np.where(noisy, random, darkroom_teacher(cells, goal))
    return {
        "states": walks.states,
        "actions": walks.actions,
        "rewards": (walks.after == goal).all(-1).astype(np.float32),  # whoever walked: this task's
        "query_states": cells.astype(np.uint8),
        "query_actions": labels.astype(np.uint8),
    }


@lru_cache(maxsize=1)  # 20 MB, the same for all tasks of a dataset
def make_pool(train_tasks: tuple, seed: int) -> Walks:
    return explore_pool(train_tasks, np.random.default_rng([seed, 0]))


def collect(data, train_tasks: list, index: int) -> dict[str, np.ndarray]:
    """The arrays of training task `index`, which collect.py writes."""
    known = tuple(map(tuple, train_tasks))
    pool = make_pool(known, data.data_seed) if data.recipe in SHARES else None
    return collect_task(data, index, train_tasks[index], pool)


# --------------------------------------------------------------------------------------- the family
DARKROOM = Family(
    name="darkroom",
    horizon=HORIZON,
    state_dim=2,
    state_values=(SIDE, SIDE),
    action_dim=len(MOVES),
    discrete_actions=True,
    train_tasks=80,
    test_tasks=20,
    task_low=(0, 0),
    task_high=(SIDE - 1, SIDE - 1),
    batch=BatchedDarkRoom,
    sample_tasks=sample_goals,
    split_tasks=split_goals,
    check_task=check_goal,
    optimal_returns=darkroom_optimum,
    random_returns=random_returns,
    teacher="rule",
    collect_task=collect,
    ceiling=later("families.posterior:ExactPosterior"),
    divergence=later("families.posterior:divergence"),
    gym_id="t2mir/DarkRoom-v0",
    paper_return={"T2MIR-AD": 90.9, "T2MIR-DPT": 78.3, "AD": 57.5, "DPT": 72.5},
)


class DarkRoom(SingleTask):
    """One room, registered as `t2mir/DarkRoom-v0`. Raises ValueError for a goal that is no cell."""

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012 (gymnasium's own interface)

    def __init__(self, task=(9, 9), render_mode: str | None = None):
        super().__init__(DARKROOM, task)
        self.render_mode = render_mode

    def render(self) -> str:
        """The room as text, its corner at the lower left: A the agent, G the goal."""
        rows = [["." for _ in range(SIDE)] for _ in range(SIDE)]
        for (x, y), letter in ((self.task, "G"), (self.batch.cells[0], "A")):
            rows[y][x] = letter
        return "\n".join("".join(row) for row in reversed(rows))
