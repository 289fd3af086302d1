"""posterior.py: the exact in-context policy of DarkRoom (what Eq. 11 converges to).

in : a prompt (B, n steps)     out: p(goal | prompt) (B, 100), p(a* | s, prompt) (B, Q, 5)
Read after darkroom.py.        Try: python -m families.posterior   (plays it: no DPT can do better)

DPT learns p(a* | s, prompt). In DarkRoom this is known without learning: a reward in the prompt
reveals the goal, the cell it was received in; without one the goal is uniform over the cells that
the prompt did not enter. Averaging the teacher's action over that posterior gives
p(a* | s, prompt). It is the ceiling in every return curve, and its divergence from a network tells
what the network has learned long before the return does. `DARKROOM.ceiling` and `.divergence` lead
here.

Uniform over which cells? Over all 100, since a held-out goal is one of them: that is the ceiling. A
DPT has only ever seen the goals that it was trained on, and what it converges to is the posterior
over those (`goals` of ExactPosterior). It looks for nothing in a held-out corner, however often it
has been everywhere else: how far the ceiling can be reached at all.

Shape legend: B prompts, n steps of a prompt, Q query states of each, 100 cells (id 10 x + y).
"""

from __future__ import annotations

from itertools import product
from typing import get_args

import torch
from torch import Tensor

from data import Prompt
from families.darkroom import CELLS, MOVES, SIDE, cell_id, darkroom_teacher
from policies import Memory, choose, concatenate

# TEACHER[s, g]: the optimal action in cell s for goal g, one-hot (100, 100, 5)
TEACHER = torch.nn.functional.one_hot(
    torch.from_numpy(darkroom_teacher(CELLS[:, None], CELLS[None])), len(MOVES)
).float()
UNIFORM = torch.full((SIDE**2,), 1 / SIDE**2)


def goal_posterior(prompt: Prompt | None, rows: int = 1, prior: Tensor = UNIFORM) -> Tensor:
    """p(goal | prompt): (B, 100), rows sum to 1. None is the empty prompt of a first episode.

    `prior` (100,) is p(goal). If every cell that it allows has been entered without a reward (with
    a uniform one that is impossible in this room), nothing has been learnt, and it is the prior.
    """
    if prompt is None:
        return prior.expand(rows, -1).clone()
    moves = torch.from_numpy(MOVES).to(prompt.states.device)
    # A reward is that of the cell after the move: the start counts only if a move ends there.
    entered = cell_id((prompt.states + moves[prompt.actions]).clamp(0, SIDE - 1))  # (B, n)
    empty = torch.zeros(len(entered), SIDE**2, device=entered.device)
    paid = empty.scatter_reduce(1, entered, prompt.rewards, "amax")
    prior = prior.to(entered.device)
    unvisited = prior * (1 - empty.scatter(1, entered, 1.0))
    any_left = unvisited.sum(1, keepdim=True) > 0
    unvisited = torch.where(any_left, unvisited, prior)
    belief = torch.where(paid.amax(1, keepdim=True) > 0, paid, unvisited)
    return belief / belief.sum(1, keepdim=True)


def action_posterior(belief: Tensor, states: Tensor) -> Tensor:
    """p(a* | s, prompt): belief (B, 100), states (B, Q, 2) -> (B, Q, 5)."""
    return torch.einsum("bg,bqga->bqa", belief, TEACHER.to(belief.device)[cell_id(states)])


def divergence(prompt: Prompt, states: Tensor, log_policy: Tensor) -> tuple[Tensor, Tensor]:
    """KL(exact || policy) in nats (B, Q) at states (B, Q, 2), given the policy's log-probabilities
    (B, Q, 5); and whether each prompt holds a reward (B,).
    """
    exact = action_posterior(goal_posterior(prompt), states)
    # An action that the exact policy never takes counts nothing, whatever the policy thinks of it.
    kl = torch.where(exact > 0, exact * (exact.log() - log_policy), 0.0).sum(-1)
    return kl, (prompt.rewards > 0).any(1)


class ExactPosterior:
    """The exact policy as evaluate.py plays one: what no DPT with the same memory can surpass.

    `memory` "last": the prompt is the last episode (Algorithm 4); "all": all of them. `goals`:
    those that it holds possible, all alike; None: every cell. `temperature`: of its draws, as those
    of models (policies.py); the exact marginal as it is searches no better.
    """

    def __init__(
        self,
        memory: Memory = "last",
        seed: int = 0,
        temperature: float = 1.0,
        greedy: bool = False,
        goals: list | None = None,
    ):
        self.memory, self.greedy, self.temperature = memory, greedy, temperature
        possible = cell_id(torch.as_tensor(CELLS if goals is None else goals))
        self.prior = torch.zeros_like(UNIFORM).index_fill(0, possible, 1 / len(possible))
        self.rng = torch.Generator().manual_seed(seed)

    def begin(self, history: list[Prompt], rows: int) -> None:
        prompt = None
        if history:
            prompt = history[-1] if self.memory == "last" else concatenate(history)
        self.belief = goal_posterior(prompt, rows, self.prior)

    def act(self, states: Tensor) -> Tensor:
        probabilities = action_posterior(self.belief, states[:, None])[:, 0]
        # once a reward names the goal, what is right is right alike, at any temperature
        return choose(probabilities.log() / self.temperature, self.greedy, self.rng)

    def observe(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None: ...


if __name__ == "__main__":
    # here alone: evaluate.py comes later in the reading order
    from config import Data
    from envs import split_tasks
    from evaluate import LAST, play

    train, test = split_tasks("darkroom", Data().task_seed)
    print(f"returns of {len(test)} held-out goals, five plays of each")
    for name, goals in (("all cells", None), ("training goals", train)):
        for memory, temperature in product(get_args(Memory), (1, 2, 4, 8)):
            policy = ExactPosterior(memory, 0, temperature, goals=goals)
            returns = play("darkroom", test * 5, policy, 40).mean(0)
            shown = "  ".join(f"{e}: {returns[e - 1]:.1f}" for e in (1, 5, 10, 20))
            last = f"last {LAST} of 40: {returns[-LAST:].mean():.1f}"
            how = f"{name} possible, prompt {memory}, --temperature {temperature}"
            print(f"{how:64s} episode {shown}  {last}")
