"""policies.py: what the policies of all methods share (App. A: Algorithms 2 and 4).

in : states (N, ds) of N tasks, and their finished episodes     out: actions (N,) or (N, da)
Read after methods.py, beside the policies of ad.py (Algorithm 2) and dpt.py (Algorithm 4).

N tasks; ds, da numbers of a state and of an action; A numbers or logits.

A policy has three methods, which evaluate.py's `play` calls for all N tasks at once:
`begin(history, rows)` before an episode, with all finished ones; `act(states)`; and
`observe(states, actions, rewards)` after each step.

Differs from the paper (switches): `--first random` plays the first episode, which has no context,
at random: where the optimal actions of all tasks cancel out (Point-Robot), the mean action stays
where it is and learns nothing from there. `--noise` is added to continuous actions, which are
otherwise the mean of what was imitated: Algorithm 2 keeps the best episodes, and once they repeat
themselves there is nothing to choose from. With `--components` (mixture.py) a component is drawn at
every step, as the network says, or by one number for all of an episode (`--component-every`), so
that one way of acting is kept up; then an action around its mean, as wide as `--spread` says.
Discrete actions are sampled by default: on DarkRoom the arg max of even the exact posterior walks
to the middle of the room and stays there. `--actions search` draws as long as the memory (AD's: of
all episodes, also those that Algorithm 2 has dropped) holds no reward above the lowest that was
ever met, in other words knows nothing of the task, and then takes the arg max, which is what an
optimal action is once the task is known. `--temperature` makes draws flatter
(above 1) or sharper. Flatter where nothing is known: there the optimal actions of many tasks are
averaged, draws of that mean go to and fro about the middle, and what is far from it is hardly ever
entered. Sharper with `--components`: what few have done is then tried less often.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from config import Play
from data import Prompt, normalise
from envs import Family
from methods import Method
from mixture import check_mixture, components_of, is_mixture, mixture

Memory = Literal["last", "all"]  # of finished episodes: what a policy may remember


class Policy(Protocol):
    """Whoever plays."""

    memory: Memory  # what the ceiling beside its curve reads; AD keeps K episodes of "all"

    # all finished episodes, (N, T) each, unsorted and as played; what of them is kept, it decides.
    # The first history may be any; a longer one goes on from that of the call before.
    def begin(self, history: list[Prompt], rows: int) -> None: ...

    # (N, ds) -> (N,) or (N, da), on the CPU, where the tasks are
    def act(self, states: Tensor) -> Tensor: ...

    # the state acted in, the action taken there, the reward (N,)
    def observe(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None: ...


def concatenate(history: list[Prompt]) -> Prompt:
    """Episodes behind one another: (N, T) each to (N, L*T)."""
    return Prompt(*(torch.cat([getattr(p, f.name) for p in history], 1) for f in fields(Prompt)))


def choose(logits: Tensor, greedy: bool | Tensor, rng: torch.Generator) -> Tensor:
    """Discrete actions (N,) from logits (N, A): the likeliest where `greedy`, (N,) or for all."""
    # drawn on the CPU, so that a GPU plays the same actions for the same seed
    logits = logits.float().cpu()
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=rng)[:, 0]
    return torch.where(torch.as_tensor(greedy), logits.argmax(-1), drawn)


def check_play(model: Any, play: Play, family: Family) -> None:
    """Raises ValueError for settings that this family cannot be played with. `model`: the settings
    of a network.
    """
    check_mixture(model, play, family)
    if play.noise and family.discrete_actions:
        raise ValueError(
            f"--noise is for continuous actions; those of {family.name} are sampled (--actions)"
        )
    if play.temperature != 1 and not (family.discrete_actions or components_of(model)):
        raise ValueError(
            f"--temperature is for what is drawn: discrete actions, or --components of continuous "
            f"ones; for those of {family.name} see --noise"
        )


class ModelPolicy:
    """What the policies of models share: device, normalisation, the choice of an action."""

    memory: Memory = "all"

    def __init__(self, method: Method, play: Any):
        check_play(method.cfg.model, play, method.family)
        self.play: Any = play  # `Play`, with the settings that a method adds
        self.family = method.family
        # eval mode: no router noise (Eq. 14 is for training), no dropout
        self.model: Any = method.model.eval()  # its decoding is the method's own
        self.device = method.device
        # of the training tasks: what the weights have learned to read
        self.mean = method.state_mean.to(self.device)
        self.std = method.state_std.to(self.device)
        # a stream of its own: a short evaluation while training does not change the run
        self.rng = torch.Generator().manual_seed(play.play_seed)
        self.exploring = False  # in a first episode of random actions

    def begin(self, history: list[Prompt], rows: int) -> None:
        self.exploring = self.play.first == "random" and not history
        # Lowest reward (N,) of all episodes, highest of those in memory: at first of none. Of all,
        # since an episode that stays at the goal is paid alike at every step.
        self.low = torch.full((rows,), torch.inf)
        self.high = -self.low
        for episode in history:
            self.low = torch.minimum(self.low, episode.rewards.amin(1))
        for episode in history[-1:] if self.memory == "last" else history:
            self.read_rewards(episode.rewards)
        # A component may stay the same for an episode: one number a task looks it up at every step.
        stays = self.play.component_every == "episode"
        self.u = torch.rand(rows, generator=self.rng) if stays else None

    def observe(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None:
        pass  # a policy that reads finished episodes alone learns nothing from a step

    def read_rewards(self, rewards: Tensor) -> None:
        """Rewards (N, n) are in the context from now on."""
        self.low = torch.minimum(self.low, rewards.amin(1))
        self.high = torch.maximum(self.high, rewards.amax(1))

    def searching(self) -> Tensor:
        """(N,) bool: where no reward is known that is above another, which tells of no task."""
        return ~(self.high > self.low)

    def greedy(self) -> Tensor:
        """(N,) bool: where the likeliest action is taken."""
        searching = self.searching()
        if self.play.actions == "search":
            return ~searching
        return torch.full_like(searching, self.play.actions == "greedy")

    def read(self, states: Tensor) -> Tensor:
        """States as the model reads them."""
        states = states.to(self.device)
        if self.family.state_values:  # cells are ids
            return states
        return normalise(states.float(), self.mean, self.std)

    def prompt(self, states: Tensor, actions: Tensor, rewards: Tensor) -> Prompt:
        return Prompt(self.read(states), actions.to(self.device), rewards.to(self.device))

    def no_actions(self, *shape: int) -> Tensor:
        """Zeros in the place of actions that are not known yet, or are none."""
        if self.family.discrete_actions:
            return torch.zeros(shape, dtype=torch.int64)
        return torch.zeros(*shape, self.family.action_dim)

    def action(self, prediction: Tensor) -> Tensor:
        """An action (N,) or (N, da) from the model's logits, means or mixtures (N, A)."""
        discrete = self.family.discrete_actions
        if self.exploring:  # the model's answer is not used, but the context grows as ever
            if discrete:
                shape = (len(prediction),)
                return torch.randint(self.family.action_dim, shape, generator=self.rng)
            shape = (len(prediction), self.family.action_dim)
            return 2 * torch.rand(shape, generator=self.rng) - 1  # uniform in [-1, 1]
        if discrete:
            return choose(prediction.float() / self.play.temperature, self.greedy(), self.rng)
        # Eq. 10 with a squared error learns the mean of what was done: that mean is played
        action = prediction.float().cpu()
        if is_mixture(action, self.family.action_dim):
            action = self.of_mixture(action)
        if self.play.noise:  # beside a component's own deviation
            noise = torch.randn(action.shape, generator=self.rng)
            action = (action + self.play.noise * noise).clamp(-1, 1)
        return action

    def of_mixture(self, head: Tensor) -> Tensor:
        """An action (N, da) from the numbers of a mixture (N, A)."""
        shape = (len(head), self.family.action_dim)
        policy = mixture(head, self.family.action_dim).at(self.play.temperature)
        u = torch.rand(len(head), generator=self.rng) if self.u is None else self.u
        # drawn whatever the spread: another one then changes nothing else in a seed's play
        drawn = policy.sample(u, self.play.spread * torch.randn(shape, generator=self.rng))
        return torch.where(self.greedy()[:, None], policy.likeliest(), drawn)
