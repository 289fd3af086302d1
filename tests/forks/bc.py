"""bc.py: behaviour cloning with a prompt of one episode: a method of your own in one file.

    python train.py --env darkroom --backbone tests/forks/bc.py

A row is two episodes of a task: the first is the prompt, the second is imitated. At test time the
best episode so far is the prompt. Everything that is not here is as methods.py says.
"""

from __future__ import annotations

from dataclasses import dataclass

from ad import ADBatch, ADModel, ADPolicy, eq10_imitation_loss
from config import Count, NotNegative, Play
from data import draw_episodes, draw_tasks, gather_prompt
from methods import Method
from models import ModelSettings


@dataclass(frozen=True)
class Settings:
    """behaviour cloning"""

    smoothing: NotNegative = 0.0
    """Weight of a penalty on large outputs."""


@dataclass(frozen=True)
class OneEpisode(Play):
    """how an evaluation plays"""

    history: Count = 1
    """Best episodes in the prompt."""


class BehaviourCloning(Method):
    Model, Settings, Play = ModelSettings, Settings, OneEpisode

    def network(self):
        return ADModel(self.cfg.model, self.family)

    def sample(self, dataset, rows, draws, rng):
        task = draw_tasks(dataset, rows, draws, rng)
        return ADBatch(gather_prompt(dataset, task, draw_episodes(dataset, rows, 2, rng)), task)

    def losses(self, batch):
        output, steps = self.forward(batch), self.family.horizon
        predicted, done = output.action[:, steps:], batch.prompt.actions[:, steps:]
        terms = {"imitation": eq10_imitation_loss(predicted, done, self.family.discrete_actions)}
        terms["size"] = self.cfg.method.smoothing * predicted.float().square().mean()
        return terms | output.losses, {"largest": predicted.detach().abs().max()}

    def policy(self, play):
        return ADPolicy(self, play)
