"""conditioned.py: one soft actor-critic for all tasks of a family (not the paper's; --teacher one).

in : a batched environment of n training tasks, and all N tasks that want a policy
out: N policies that read states alone, every `save_every` steps, as if each had been trained alone
Read after sac.py, whose updates, replay, segments and files these are.

Policies that were trained one by one (App. D.2) each find a way of their own: between two
neighbouring velocities the gaits differ more than the tasks, and what is between them nobody can
imitate. One policy that reads the task beside the state does the like things in like tasks; and a
task more costs no training.

    actor     (s, task) -> a                critics     (s, a, task) -> return
    learns from all tasks' steps at once; where the family knows what the same step would have
    earned in another task (`Family.reward`), half of every sample is *relabelled*: its task is
    drawn anew, and its reward with it (Andrychowicz et al. 2017, hindsight experience replay)

In the first layer the task only adds a constant: (s, task) W + b = s W_s + (task W_task + b). With
that sum for a bias, a task's policy is a network of the state, of the same shape as any other. The
units in which the networks read states (`Family.state_units`) go into W_s and b in the same way.
Roll-outs, levels and datasets need not know. No observation ever holds the task.

Where random actions earn nothing (Push: the puck must be grasped first), they are a warm-up in
vain. A family that knows how its tasks are done (`Family.demonstrate`) plays that instead, with
noise: these are steps of the replay as any other, never of a dataset. Where a reward does not ask
for all that imitation needs (Reach: it is the same within 5 cm of the goal), `Family.lesson` is
what the teacher is paid instead; datasets and levels keep the environment's reward.

Tasks that are not played, the held-out ones, get their policies by the same sum: the teacher is
asked for tasks that it has never seen.

Shapes: N tasks, n <= N of them played, B rows of an update, ds/da/dt numbers of a state/an action/a
task.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from envs import Family
from teachers.sac import Replay, SACConfig, StackedSAC, mlp, squashed
from teachers.stored import WEIGHTS

RELABELLED = 0.5  # of a sample's rows, where the family has a `reward`
DEMONSTRATION_NOISE = 0.5  # deviation of the last task's demonstrations; the first task's have none


class ConditionedSAC(StackedSAC):
    """A stack of one agent, whose states are (state, task). The first n of N tasks are played.

    `tasks` (N, dt). What the family says beyond its sizes, if it says it: `lesson` or `reward`,
    `state_units`, `demonstrate` (envs.py).
    """

    def __init__(
        self, tasks: Tensor, n: int, family: Family, cfg: SACConfig, seed: int, device="cpu"
    ):
        self.ds, self.played = family.state_dim, n
        super().__init__(1, self.ds + tasks.shape[1], family.action_dim, cfg, seed, device)
        self.drawn = n  # every task explores by itself
        self.paid, self.demonstrate = family.lesson or family.reward, family.demonstrate
        units = family.state_units or ([0.0] * self.ds, [1.0] * self.ds)
        self.centre, self.unit = torch.tensor(units, device=device)
        self.tasks = tasks.to(device)
        # What the networks read of a task: numbers of about unit size, by the training tasks' own.
        trained = self.tasks[:n]
        spread = trained.std(0, correction=0)
        # One that never varies in training is in its own unit: held-out tasks may have another.
        spread = torch.where(spread > 1e-6, spread, 1.0)
        coded = (self.tasks - trained.mean(0)) / spread
        # Many numbers together as long as four are: or they would drown the state.
        self.coded = coded * min(1.0, (4 / coded.shape[1]) ** 0.5)  # (N, dt)

    @torch.no_grad()
    def act(self, states: Tensor, rng: torch.Generator) -> Tensor:
        """Sampled actions (n, da) for states (n, ds) of the n tasks."""
        noise = torch.randn(1, self.played, self.da, generator=rng, device=states.device)
        x = self.read(states, self.coded[: self.played])[None]  # a batch of n for the one
        return squashed(mlp(self.actor, x), noise)[0][0]

    def look_around(self, states: Tensor, rng: torch.Generator) -> Tensor:
        """Actions of the warm-up (n, da): demonstrations, or uniform in [-1, 1]."""
        if self.demonstrate is None:
            return super().look_around(states, rng)
        shown = self.demonstrate(states.cpu().numpy(), self.tasks[: self.played].cpu().numpy())
        # Exact repetitions would say nothing of what is around them: from task to task more noise.
        deviation = torch.linspace(0, DEMONSTRATION_NOISE, self.played, device=states.device)
        noise = torch.randn(self.played, self.da, generator=rng, device=states.device)
        actions = torch.from_numpy(shown).to(states) + deviation[:, None] * noise
        return actions.clamp(-1, 1)

    def read(self, states: Tensor, coded: Tensor) -> Tensor:
        """What the networks read: (B, ds), (B, dt) -> (B, ds + dt)."""
        return torch.cat([(states - self.centre) / self.unit, coded], -1)

    def learn(self, replay: Replay, rng: torch.Generator) -> None:
        """An update from B steps of all tasks, with the rewards of the tasks that they are for."""
        device, rows = replay.task.device, (self.cfg.batch,)
        played = torch.randint(self.played, rows, generator=rng, device=device)
        place = torch.randint(replay.filled, rows, generator=rng, device=device)
        s, a, r, s2, *outcome = (array[played, place] for array in replay.arrays.values())
        task = played  # whom the step shall teach: the task in which it was made ...
        if self.paid is not None:
            other = torch.randint(self.played, rows, generator=rng, device=device)
            chosen = torch.rand(rows, generator=rng, device=device) < RELABELLED
            task = torch.where(chosen, other, played)  # ... or another
            # The rewards of all rows: for a step's own task it is the one that it had, or that of
            # the family's `lesson`, if it has one.
            r = self.paid(outcome[0], self.tasks[task])
        coded = self.coded[task]
        s, s2 = self.read(s, coded), self.read(s2, coded)
        noise = torch.randn((2, 1, *rows, self.da), generator=rng, device=device)
        self.update(s[None], a[None], r[None], s2[None], noise)

    def policies(self) -> dict[str, Tensor]:
        """N networks of the state: the task's part of the first layer becomes part of its bias.

        And so does the states' centre; their unit becomes part of the weights.
        """
        weights = dict(zip(WEIGHTS, (weight.detach() for weight in self.actor), strict=True))
        first, n = weights["w0"], len(self.coded)
        folded = {name: weight.expand(n, -1, -1) for name, weight in weights.items()}
        states = first[:, : self.ds] / self.unit[:, None]  # (1, ds, hidden)
        constant = self.coded @ first[0, self.ds :] - self.centre @ states[0]  # (N, hidden)
        folded["w0"] = states.expand(n, -1, -1)  # (N, ds, hidden)
        folded["b0"] = weights["b0"] + constant[:, None]  # (N, 1, hidden)
        return {name: weight.contiguous() for name, weight in folded.items()}


def together(
    batch, cfg: SACConfig, seed: int, device: str, tasks: list
) -> tuple[ConditionedSAC, Replay]:
    """One untrained agent for all `tasks`, the first of which `batch` plays, and its replay."""
    family, n = batch.family, len(batch.reset())
    sizes = family.state_dim, family.action_dim
    numbers = torch.tensor(tasks, dtype=torch.float32)
    agent, more = ConditionedSAC(numbers, n, family, cfg, seed, device), {}
    if agent.paid is not None:
        batch.step(np.zeros((n, sizes[1]), np.float32))  # any step: an outcome to know its shape
        more["outcome"] = batch.outcome.shape[1:]
    return agent, Replay(n, min(cfg.replay, cfg.steps), *sizes, device, **more)
