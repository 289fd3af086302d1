"""methods.py: the one seam for methods: what train.py, evaluate.py and the others ask of them.

in : a `Config`, a task family          out: a `Method`: network, batches, losses, policy
Read after data.py; ad.py and dpt.py are its first two users, and show it better than this page.

A method is a file with one subclass of `Method`. `--backbone` names it: `ad`, `dpt`, a file of
baselines/ by its name, or the path of a Python file of your own. It says

    its settings      three dataclasses that join the command line: Model, Settings, Play
    its network       `network`: an nn.Module, whose forward(batch) is what `losses` calls
    a batch           `sample`: Algorithm 1, lines 2-9, or Algorithm 3, lines 8-16
    its loss          `losses`: named terms; train.py adds them up and logs each by its name
    after a step      `after_step`: Eq. 8, where the network has a key router
    how it plays      `policy`: Algorithms 2 and 4
    what is kept      `model` and `optimizers`: a checkpoint holds all of both

What is not said is as below, which fits a transformer that is trained by one AdamW.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from config import Config, Play, Training
from data import Dataset
from envs import Family
from support.files import need_memory
from support.muon import Muon
from support.user_file import run_file

HERE = Path(__file__).resolve().parent
# by name: a matrix of a transformer's block, or a stack of experts' (not the routers)
MUON_TAKES = re.compile(r"^blocks\..*(\.out\.weight|\.ff\.\d\.weight|\.weight[12])$")


@dataclass(frozen=True)
class NoSettings:
    """none of its own"""


def adamw(model: nn.Module, cfg: Training, but: Collection[Tensor] = ()) -> torch.optim.AdamW:
    """AdamW that decays weight matrices, not biases and norms; `but`: parameters left to others.

    Decay pulls towards zero, where a matrix does less; a bias or the scale of a norm would only be
    pulled off its place. The key router of Eq. 8 takes no gradient and no part.
    """
    matrices, others, left_out = [], [], {id(parameter) for parameter in but}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in left_out:
            # Some biases are stacked, hence matrices: those of the experts and of the modalities.
            decayed = parameter.dim() >= 2 and "bias" not in name
            (matrices if decayed else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)


def muon(model: nn.Module, cfg: Training) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices of attention, feed-forward layers and experts, AdamW for the rest.

    The rest: embeddings and the head, which are read row by row, routers, biases and norms.
    """
    qkv, others = [], []
    for name, parameter in model.named_parameters():
        if name.endswith(".qkv.weight"):
            qkv.append(parameter)
        elif MUON_TAKES.search(name):
            others.append(parameter)
    scale = cfg.muon_scale
    groups = [
        {"params": qkv, "parts": 3, "lr_scale": scale},  # queries', keys' and values' matrices
        {"params": others, "parts": 1, "lr_scale": scale},
    ]
    return {
        "adamw": adamw(model, cfg, but=[*qkv, *others]),
        "muon": Muon(groups, scale * cfg.lr, 0.95, cfg.weight_decay),
    }


class Method:
    """What a method says of itself; see the head of this file. Shapes: B rows of a batch."""

    Model: type = NoSettings  # settings of the network
    Settings: type = NoSettings  # of the method
    Play: type = Play  # of how it plays: config.Play, or a subclass of it
    try_next = "--moe none of train.py trains the same without experts"  # a hint for the user
    presets = "dpt"  # whose presets it takes (presets.py), as far as it has their settings

    def __init__(self, cfg: Config, family: Family):
        self.cfg, self.family = cfg, family
        self._check_size()
        self.model = self.network()
        self.forward: Callable = self.model  # train.py puts DDP or torch.compile around it
        self.optimizers = self.make_optimizers()
        # The states' mean and deviation over the training data: train.py sets them, and a
        # checkpoint keeps them, for at test time states are normalised alike.
        self.state_mean = torch.zeros(family.state_dim)
        self.state_std = torch.ones(family.state_dim)

    def _check_size(self) -> None:
        """Raises ValueError for a network that this machine cannot hold; nothing is allocated."""
        try:
            with torch.device("meta"):  # shapes without numbers
                weights = sum(p.numel() * p.element_size() for p in self.network().parameters())
        except (RuntimeError, NotImplementedError):  # a user's network that needs numbers
            return
        need_memory("the network with its gradient and moments", 4 * weights)

    # ------------------------------------------------------------------ what every method says
    def network(self) -> nn.Module:
        """pi_theta, with its first weights."""
        raise NotImplementedError

    def sample(self, dataset: Dataset, rows: int, draws: int, rng: torch.Generator):
        """A batch of `rows` prompts, `draws` of each task; a dataclass with `.to(device)`."""
        raise NotImplementedError

    def losses(self, batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Named terms, whose sum is the loss, and other numbers to log: () each, float32."""
        raise NotImplementedError

    def policy(self, play: Play):
        """Who chooses actions in evaluate.play (policies.py: `Policy`)."""
        raise NotImplementedError

    # ---------------------------------------------------------------- what a method may change
    @property
    def label(self) -> str:
        """Its name in tables and pictures; Table 1's where it stands there."""
        return Path(self.cfg.backbone).stem.upper()

    @property
    def device(self) -> torch.device:
        """Where the weights are, hence where batches must go."""
        return next(self.model.parameters()).device

    @classmethod
    def check(cls, cfg: Config, family: Family) -> None:
        """Raises ValueError with one line for settings that do not fit one another."""

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """All of them take a step after each batch, on the gradients of the summed loss."""
        # by name: a checkpoint keeps the moments of each under its own
        if self.cfg.training.optimizer == "muon":
            return muon(self.model, self.cfg.training)
        return {"adamw": adamw(self.model, self.cfg.training)}

    def play_name(self, play: Play) -> list[str]:
        """What file names of an evaluation say of settings of its own."""
        return []

    def after_step(self) -> None:
        """Eq. 8, after the optimisers' step: Algorithm 1, line 15; Algorithm 3, line 22."""
        # The key router follows the weights that the step has made; before it, this step's keys
        # would already be others. A network without one has nothing to follow.
        if hasattr(self.model, "update_key_router"):
            self.model.update_key_router()

    def probe(self, dataset: Dataset, rows: int, rng: torch.Generator) -> dict[str, float]:
        """Numbers on fresh draws for train.csv, in eval mode (diagnostics.py)."""
        return {}

    def tokens(self) -> int:
        """Tokens of a row, for the speed in train.csv."""
        return 3 * self.cfg.training.prompt_length  # s, a, r of every step (Eq. 9)


# -------------------------------------------------------------------------------- finding a method
def names() -> list[str]:
    """All that --backbone takes by name."""
    return ["ad", "dpt", *sorted(p.stem for p in (HERE / "baselines").glob("[!_]*.py"))]


@cache  # a file of the user's is run once: a second run would make a second, unequal class
def get_method(backbone: str) -> type[Method]:
    """The method of a name or a Python file. Raises ValueError with one line for anything else."""
    # imported when asked for: ad.py and dpt.py import this file
    if backbone.endswith(".py"):
        module = run_file(backbone, "backbone")
    elif backbone in ("ad", "dpt"):
        module = importlib.import_module(backbone)
    elif backbone in names():
        module = importlib.import_module(f"baselines.{backbone}")
    else:
        known = ", ".join(names())
        raise ValueError(f"unknown backbone '{backbone}': choose one of {known}, or a .py file")
    methods = {
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__  # defined there, not imported
    }
    if len(methods) != 1:
        raise ValueError(f"--backbone {backbone}: it must define one subclass of methods.Method")
    return methods.pop()
