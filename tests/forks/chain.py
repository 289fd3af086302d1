"""chain.py: a task family of your own with discrete actions, in one file: a corridor and a spade.

    python collect.py --env tests/forks/chain.py
    python train.py --env tests/forks/chain.py --backbone dpt
    python evaluate.py runs/chain-dpt-both-mixed-cpu-s0 --env tests/forks/chain.py

A corridor has nine cells, and something is buried under one of them. The agent starts in the
middle. It can step left, step right, or dig; digging pays 1, but only where the treasure is. Where
that is, is the *task*: the agent never observes it, and has to find it out by digging.

A family is one `envs.Family`, below. Nothing else needs to be said anywhere: PPO trains a teacher
for each task, collect.py lets them play, train.py trains on what they did, and evaluate.py plays
the corridors whose treasure nobody was trained on. Nine cells show the form, in a minute or two; to
learn what generalises takes many more tasks (DarkRoom has 80, and learns from them).
"""

import numpy as np

from envs import Family

CELLS, START, STEPS = 9, 4, 15
LEFT, RIGHT, DIG = range(3)
MOVE = np.array([-1, 1, 0])  # what an action adds to the cell


class Corridors:
    """N tasks at once: arrays with a row for each task, no loop over tasks."""

    def __init__(self, tasks, seed=0):
        # A task is a list of plain numbers. Here it is one: the cell of the treasure.
        self.treasure = np.asarray(tasks, dtype=int)[:, 0]
        # All that is random belongs to `rng`, so that a seed repeats an episode. Here nothing is.
        self.rng = np.random.default_rng(seed)

    def reset(self):
        """Starts an episode: the states (N, 1). The numbers of a grid are int64."""
        self.cell = np.full(len(self.treasure), START)
        return self.cell[:, None].copy()

    def step(self, actions):
        """Actions (N,) of 0, 1, 2; gives the next states (N, 1) and rewards (N,) in float32."""
        found = (actions == DIG) & (self.cell == self.treasure)
        self.cell = np.clip(self.cell + MOVE[actions], 0, CELLS - 1)  # walls at both ends
        return self.cell[:, None].copy(), found.astype(np.float32)


def split_tasks(seed, train, test):
    """(training, held-out) tasks. With so few of them, drawing each anew would find doubles."""
    if train + test > CELLS:
        raise ValueError(f"there are {CELLS} corridors, not {train} + {test}")
    cells = np.random.default_rng(seed).permutation(CELLS)[: train + test, None].tolist()
    return cells[:train], cells[train:]


def optimal_returns(tasks):
    """(N,): walk there, then dig until the end. Optional: a line in the curve and the tables."""
    return STEPS - np.abs(np.asarray(tasks)[:, 0] - START)


CHAIN = Family(
    name="chain",
    horizon=STEPS,  # every episode has so many steps
    state_dim=1,  # one number is observed: the cell
    state_values=(CELLS,),  # it is one of nine; a family of continuous states leaves this out
    action_dim=3,
    discrete_actions=True,
    train_tasks=6,  # `--train-tasks` and `--test-tasks` change them
    test_tasks=3,
    task_low=(0,),  # limits of each number of a task: tasks of a file are checked by them
    task_high=(CELLS - 1,),
    batch=Corridors,
    sample_tasks=lambda count, rng: rng.integers(CELLS, size=(count, 1)),
    split_tasks=split_tasks,
    optimal_returns=optimal_returns,
    teacher="ppo",  # SAC is for continuous actions
)
