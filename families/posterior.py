"""posterior.py: the exact in-context policy of DarkRoom (what Eq. 11 converges to).

in : a prompt (B, n steps)      out: the posterior over goals (B, 100) and over optimal actions (B, Q, 5)
Read after envs.py.             Try: python posterior.py   (plays it: the ceiling of any trained DPT)

DPT learns p(a* | s, prompt). On DarkRoom this is known without learning: a reward in the prompt reveals
the goal, the cell it was received in; without one the goal is uniform over the cells that the prompt did
not enter. Averaging the expert's action over that posterior gives p(a* | s, prompt). It is the ceiling
in every return curve, and its divergence from a network tells what the network has learned long before
the return does.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data import Prompt
from families.rooms import MOVES, SIDE, darkroom_expert

CELLS = np.stack(np.divmod(np.arange(SIDE**2), SIDE), -1)  # (100, 2); id = 10 x + y
# EXPERT[s, g] one-hot: the optimal action in cell s for goal g, (100, 100, 5)
EXPERT = torch.nn.functional.one_hot(
    torch.from_numpy(darkroom_expert(CELLS[:, None], CELLS[None])), len(MOVES)
).float()


def cell_id(cells: Tensor) -> Tensor:
    return cells[..., 0] * SIDE + cells[..., 1]


def goal_posterior(prompt: Prompt | None, rows: int = 1) -> Tensor:
    """p(goal | prompt): (B, 100), rows sum to 1. None is the empty prompt of a first episode.

    If every cell has been entered without a reward (impossible in this room), it falls back to uniform.
    """
    if prompt is None:
        return torch.full((rows, SIDE**2), 1 / SIDE**2)
    moves = torch.from_numpy(MOVES).to(prompt.states.device)
    entered = cell_id((prompt.states + moves[prompt.actions]).clamp(0, SIDE - 1))  # (B, n)
    empty = torch.zeros(len(entered), SIDE**2, device=entered.device)
    paid = empty.scatter_reduce(1, entered, prompt.rewards, "amax")
    unvisited = 1 - empty.scatter(1, entered, 1.0)
    unvisited = torch.where(
        unvisited.sum(1, keepdim=True) > 0, unvisited, torch.ones_like(unvisited)
    )
    belief = torch.where(paid.amax(1, keepdim=True) > 0, paid, unvisited)
    return belief / belief.sum(1, keepdim=True)


def action_posterior(belief: Tensor, states: Tensor) -> Tensor:
    """p(a* | s, prompt): belief (B, 100), states (B, Q, 2) -> (B, Q, 5)."""
    return torch.einsum("bg,bqga->bqa", belief, EXPERT.to(belief.device)[cell_id(states)])


def divergence(prompt: Prompt, states: Tensor, log_policy: Tensor) -> tuple[Tensor, Tensor]:
    """KL(exact || policy) in nats at states (B, Q, 2), policy's log-probabilities (B, Q, 5): (B, Q); and
    whether each prompt holds a reward (B,).
    """
    exact = action_posterior(goal_posterior(prompt), states)
    # an action that the exact policy never takes counts nothing, whatever the policy thinks of it
    kl = torch.where(exact > 0, exact * (exact.log() - log_policy), 0.0).sum(-1)
    return kl, (prompt.rewards > 0).any(1)


if __name__ == "__main__":
    from evaluate import play
    from policies import ExactPosterior

    tasks = CELLS.tolist() * 20
    for memory in ("last", "all"):
        returns = play("darkroom", tasks, ExactPosterior(memory, seed=0), 40).mean(0)
        print(
            f"prompt {memory:4s}: "
            + "  ".join(f"episode {e}: {returns[e - 1]:.1f}" for e in (1, 5, 10, 20, 40))
        )
