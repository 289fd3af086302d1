"""policies.py: who chooses the actions (App. A: Algorithm 2 line 6 and 10-13, Algorithm 4 line 7 and 11).

in : states (N, ds) of N tasks, and their finished episodes        out: actions (N,) or (N, da)
Read after models.py and posterior.py, before evaluate.py.

A policy has three methods: `begin(history, rows)` before an episode, with all finished episodes;
`act(states)`; `observe(states, actions, rewards)` after each step. The two backbones, the exact posterior of
DarkRoom and a random policy play through the same loop (evaluate.py: `play`).

Differs from the paper (switches): `--prompt all` grows DPT's prompt over the episodes; `--first random` plays the
first episode, which has no context, at random: where the optimal actions of all tasks cancel out (Point-Robot), the
mean action stays where it is and learns nothing from there. `--noise` is added to continuous actions, which are
otherwise the mean of what was imitated: Algorithm 2 keeps the best episodes, and once they repeat themselves there is
nothing to choose from. Actions of a discrete policy are sampled by default: on DarkRoom the arg max of even the exact
posterior walks to the middle of the room and stays there.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from data import DPTBatch, Prompt, normalise
from envs import get_family
from families.posterior import action_posterior, goal_posterior
from models import T2MIR

Actions = Literal["sample", "greedy"]
Memory = Literal["last", "all"]
First = Literal["policy", "random"]


def concatenate(history: list[Prompt]) -> Prompt:
    """Episodes behind one another."""
    return Prompt(
        *(
            torch.cat([getattr(p, name) for p in history], 1)
            for name in ("states", "actions", "rewards")
        )
    )


def choose(logits: Tensor, greedy: bool, rng: torch.Generator) -> Tensor:
    """Discrete actions (N,) from logits (N, A)."""
    if greedy:
        return logits.argmax(-1).cpu()
    return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=rng)[:, 0]


def check_noise(noise: float, env: str) -> None:
    """Raises ValueError for noise that cannot be."""
    if not 0 <= noise < math.inf:
        raise ValueError(f"--noise {noise} must be at least 0")
    if noise and get_family(env).discrete_actions:
        raise ValueError(
            f"--noise is for continuous actions; those of {env} are sampled (--actions)"
        )


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
        return choose(
            action_posterior(self.belief, states[:, None])[:, 0].log(), self.greedy, self.rng
        )

    def observe(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None: ...


class ModelPolicy:
    """What both backbones share: device, normalisation, the choice of an action."""

    def __init__(
        self,
        model: T2MIR,
        greedy: bool = False,
        first: First = "policy",
        noise: float = 0.0,
        seed: int = 0,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ):
        self.model, self.cfg, self.greedy, self.first, self.noise = (
            model.eval(),
            model.cfg,
            greedy,
            first,
            noise,
        )
        self.exploring = False  # in a first episode of random actions
        self.rng = torch.Generator().manual_seed(seed)
        self.device = next(model.parameters()).device
        self.mean, self.std = (
            (0.0, 1.0) if mean is None else (mean.to(self.device), std.to(self.device))
        )

    def read(self, states: Tensor) -> Tensor:
        states = states.to(self.device)
        return states if self.cfg.state_values else normalise(states.float(), self.mean, self.std)

    def prompt(self, states: Tensor, actions: Tensor, rewards: Tensor) -> Prompt:
        return Prompt(self.read(states), actions.to(self.device), rewards.to(self.device))

    def action(self, prediction: Tensor) -> Tensor:
        if self.exploring:
            if self.cfg.discrete_actions:
                return torch.randint(self.cfg.action_dim, (len(prediction),), generator=self.rng)
            return 2 * torch.rand(prediction.shape, generator=self.rng) - 1
        if self.cfg.discrete_actions:
            return choose(prediction, self.greedy, self.rng)
        action = prediction.cpu()  # continuous: the mean
        if self.noise:
            action = (action + self.noise * torch.randn(action.shape, generator=self.rng)).clamp(
                -1, 1
            )
        return action


class ADPolicy(ModelPolicy):
    """Algorithm 2: K episodes sorted by return, then the running one; the prefix is computed once an episode.

    With a model that cannot be cached (models.py: `cacheable`) every step runs the whole context.
    """

    def __init__(self, model: T2MIR, keep: int = 4, **options):
        super().__init__(model, **options)
        self.keep = keep

    def begin(self, history: list[Prompt], rows: int) -> None:
        self.exploring = self.first == "random" and not history
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
            whole = concatenate(
                [self.prompt(p.states, p.actions, p.rewards) for p in [*self.kept, *self.now]]
                + [step]
            )
            return self.action(self.model.last_action(whole))
        token = self.model.embed_prompt(step, len(self.now))[
            :, :1
        ]  # s_t; its a and r are yet to come
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
            shape = (
                (len(states),) if self.cfg.discrete_actions else (len(states), self.cfg.action_dim)
            )
            actions = torch.zeros(
                shape, dtype=torch.int64 if self.cfg.discrete_actions else torch.float32
            )
            rewards = torch.zeros(len(states))
        return self.prompt(states[:, None], actions[:, None], rewards[:, None])


def sort_and_drop(episodes: list[Prompt], keep: int) -> list[Prompt]:
    """Algorithm 2, lines 10-13, for every task: ascending by return, the lowest beyond `keep` dropped.

    Ties keep the order of play, so of equal episodes the oldest goes first.
    """
    stacked = [
        torch.stack([getattr(p, name) for p in episodes], 1)
        for name in ("states", "actions", "rewards")
    ]
    order = stacked[2].sum(-1).argsort(dim=1, stable=True)[:, -keep:]  # (N, keep)
    task = torch.arange(len(order))
    return [Prompt(*(array[task, order[:, i]] for array in stacked)) for i in range(order.shape[1])]


class DPTPolicy(ModelPolicy):
    """Algorithm 4: the query state beside a frozen prompt, the last episode (or all of them)."""

    def __init__(self, model: T2MIR, memory: Memory = "last", **options):
        super().__init__(model, **options)
        self.memory, self.cache = memory, None

    def begin(self, history: list[Prompt], rows: int) -> None:
        self.exploring = self.first == "random" and not history
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
                self.model.feed(
                    self.model.embed_prompt(self.prompt(new.states, new.actions, new.rewards)),
                    self.cache,
                )
            return
        if history:
            past = history[-1] if self.memory == "last" else concatenate(history)
            self.past = self.prompt(past.states, past.actions, past.rewards)
        else:
            empty = torch.zeros(rows, 0)
            actions = (
                empty.long()
                if self.cfg.discrete_actions
                else empty[..., None].expand(-1, -1, self.cfg.action_dim)
            )
            grid = torch.zeros(
                rows,
                0,
                self.cfg.state_dim,
                dtype=torch.int64 if self.cfg.state_values else torch.float32,
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


def make_policy(
    model: T2MIR, settings, seed: int = 0, mean: Tensor | None = None, std: Tensor | None = None
):
    """The policy of a model's backbone; `settings` has what evaluate.py's `Settings` has (a Config has it)."""
    options = {
        "greedy": settings.actions == "greedy",
        "first": settings.first,
        "noise": settings.noise,
    }
    options |= {"seed": seed, "mean": mean, "std": std}
    if model.cfg.backbone == "ad":
        return ADPolicy(model, settings.history, **options)
    return DPTPolicy(model, settings.prompt, **options)
