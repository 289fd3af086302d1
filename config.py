"""config.py: every setting of a run; the dataclass is the command line (paper Tables 4 and 5, App. F).

in : argv                      out: a checked `Config`
Read beside train.py.          Try: python train.py --help

`--preset paper` is Tables 4 and 5 with the sizes of the official configuration where the paper is silent.
`--preset cpu` is what learns most in the minutes that two CPU cores give; `differences` lists every value
in which it departs, and train.py prints them. `auto` takes `paper` where CUDA is available, else `cpu`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
import tyro

from collect import CollectConfig, Quality, Recipe
from envs import SPECS, get_spec
from models import ModelConfig
from moe import MoEKind, TaskRouting


@dataclass(frozen=True)
class Config:
    """Train T2MIR and evaluate it on held-out tasks. Defaults below are those of the chosen preset."""

    env: str = "darkroom"
    """Task family."""
    backbone: Literal["ad", "dpt"] = "dpt"
    """ad: imitates learning histories (Eq. 10). dpt: predicts the optimal action (Eq. 11)."""
    preset: Literal["auto", "paper", "cpu"] = "auto"
    """paper: Tables 4 and 5. cpu: minutes on two cores. auto: paper with CUDA, else cpu."""
    seed: int = 0
    """Seed of the weights, the batches and the noise."""

    # the method (Sec. 4)
    moe: MoEKind = "both"
    """Which MoE layers; token, task and none are the ablations of Sec. 5.2 (none: plain AD or DPT)."""
    moe_position: Literal["top", "middle", "bottom"] = "top"
    """Block whose feed-forward layer becomes the MoE (App. G.2)."""
    routing: TaskRouting = "sequence"
    """h_bar of Eq. 4: sequence (paper), prefix (no look-ahead), token (official code)."""
    query_position: Literal["first", "last"] = "first"
    """DPT: where the query stands; first is the paper's, last lets the prompt be cached."""
    token_shift: bool = False
    """Add the previous token's embedding to each (not in the paper)."""
    task_center: bool = False
    """Centre and scale h_bar by running statistics before the task router (not in the paper)."""
    token_experts: int = 6
    """K_1 (Tables 4, 5)."""
    task_experts: int = 8
    """K_2 (Tables 4, 5)."""
    top_k: int = 2
    """Experts kept by both routers."""
    w_contrastive: float = 0.01
    """Weight of Eq. 7 (Tables 4, 5)."""
    w_importance: float = 0.01
    """Weight of CV(Imp)^2 in Eq. 3 (official: one weight for both)."""
    w_load: float = 0.01
    """Weight of CV(Load)^2 in Eq. 3."""
    momentum: float = 0.995
    """beta of Eq. 8."""

    # sizes (App. F; the facts the paper leaves out are the official configuration's)
    layers: int = 3
    heads: int = 8
    width: int = 128
    ff: int = 512
    """Hidden units of a plain feed-forward layer."""
    token_hidden: int = 1536
    """Hidden units of all token experts together."""
    task_hidden: int = 2048
    """Hidden units of all task experts together."""
    dropout: float = 0.05

    # data (App. D.2)
    quality: Quality = "mixed"
    """Which stages of the expert's training make the data."""
    recipe: Recipe = "noise"
    """noise: the paper's data. explore, wander: behaviour that does not know the goal (collect.py)."""
    data_episodes: int = 200
    """Episodes of each training task."""
    data_queries: int = 1000
    """Labelled query states of each task (DPT)."""
    task_seed: int = 56
    """Seed of the train/test split."""
    data_seed: int = 0
    """Seed of the dataset."""
    tasks: str | None = None
    """JSON file {"train": [...], "test": [...]} instead of the seeded split."""
    datasets: str = "datasets"
    """Folder of the datasets; what is missing is collected."""

    # optimisation
    init: str | None = None
    """Start from the weights of this run instead of random ones (short prompts first, then long ones)."""
    steps: int = 300_000
    batch: int = 32
    """Prompts a step on each process."""
    draws: int = 2
    """Independent prompts of each task in a batch (Algorithms 1 and 3: query and key)."""
    prompt_length: int = 100
    """Steps of a prompt, a multiple of the episode (Tables 4, 5)."""
    queries: int = 1
    """DPT with the query last: labelled states a prompt."""
    short: float = 0.0
    """DPT with the query last: share of queries that see a random part of the prompt."""
    empty: float = 0.0
    """DPT with the query last: share of queries that see no prompt."""
    lr: float = 3e-4
    warmup: int = 5000
    schedule: Literal["cosine", "constant"] = "cosine"
    beta2: float = 0.999
    """Second-moment decay of AdamW."""
    weight_decay: float = 1e-4
    clip: float = 1.0
    """Largest gradient norm."""

    # evaluation (Algorithms 2 and 4)
    episodes: int = 40
    """Episodes on each held-out task after training."""
    actions: Literal["sample", "greedy"] = "sample"
    """How a discrete action is taken from the policy."""
    prompt: Literal["last", "all"] = "last"
    """DPT: the previous episode (Algorithm 4), or all so far."""
    history: int = 4
    """AD: K, finished episodes in the history (Algorithm 2)."""
    eval_every: int = 10_000
    """Steps between short evaluations while training; 0: none."""
    eval_episodes: int = 10
    """Episodes of a short evaluation."""

    # the run
    run: str | None = None
    """Folder of the run (default: runs/ and the main settings)."""
    resume: bool = False
    """Continue the run in that folder if it holds one; the result is that of an uninterrupted run."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between rows of train.csv."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 elsewhere."""
    compile: bool = False
    """torch.compile the model."""
    threads: int = 0
    """CPU threads; 0: all cores."""
    tensorboard: bool = False
    """Also write TensorBoard events."""

    def check(self) -> Config:
        """Raises ValueError with one line for values that cannot be; returns itself."""
        spec, model = get_spec(self.env), self.model()  # both refuse what cannot be
        want = {
            "--steps must be at least 1": self.steps >= 1,
            "--batch must hold at least one task's draws": self.batch >= self.draws >= 1,
            f"--batch {self.batch} is not a multiple of --draws {self.draws}": self.batch % max(1, self.draws) == 0,
            f"--prompt-length {self.prompt_length} is not a multiple of {self.env}'s {spec.horizon}-step episode": (
                self.prompt_length > 0 and self.prompt_length % spec.horizon == 0
            ),
            f"--prompt-length {self.prompt_length} needs more than --data-episodes {self.data_episodes}": (
                self.prompt_length // spec.horizon <= self.data_episodes
            ),
            "--queries must be at least 1": self.queries >= 1,
            "--queries above 1 needs --query-position last": self.queries == 1 or model.last,
            "--short and --empty need --query-position last": self.short == self.empty == 0 or model.last,
            "--short and --empty are shares: together in [0, 1]": (
                min(self.short, self.empty) >= 0 and self.short + self.empty <= 1
            ),
            "--lr and --clip must be positive": self.lr > 0 and self.clip > 0,
            "--warmup must not be negative": self.warmup >= 0,
            "--momentum must be in [0, 1], --beta2 in [0, 1)": 0 <= self.momentum <= 1 and 0 <= self.beta2 < 1,
            "loss weights must not be negative": min(self.w_contrastive, self.w_importance, self.w_load) >= 0,
            "--episodes, --history, --log-every and --checkpoint-every must be at least 1": (
                min(self.episodes, self.history, self.log_every, self.checkpoint_every) >= 1
            ),
        }
        for complaint, fine in want.items():
            if not fine:
                raise ValueError(complaint)
        return self

    def model(self) -> ModelConfig:
        spec = get_spec(self.env)
        names = {f.name for f in fields(ModelConfig)} & {f.name for f in fields(Config)}
        return ModelConfig(
            horizon=spec.horizon,
            state_dim=spec.state_dim,
            state_values=spec.state_values,
            action_dim=spec.action_dim,
            discrete_actions=spec.discrete_actions,
            **{name: getattr(self, name) for name in names},
        )

    def collect(self) -> CollectConfig:
        return CollectConfig(
            env=self.env,
            quality=self.quality,
            recipe=self.recipe,
            episodes=self.data_episodes,
            queries=self.data_queries,
            task_seed=self.task_seed,
            seed=self.data_seed,
            tasks=self.tasks,
            folder=self.datasets,
        )

    @property
    def folder(self) -> str:
        return self.run or f"runs/{self.env}-{self.backbone}-{self.moe}-{self.quality}-{self.preset}-s{self.seed}"


# What may differ between a run and its continuation: nothing of this changes the weights
# (threads and device: but for rounding).
FREE = ("resume", "run", "datasets", "episodes", "actions", "prompt", "history", "checkpoint_every", "log_every",
        "eval_every", "eval_episodes", "device", "compile", "threads", "tensorboard")  # fmt: skip

PAPER = {
    ("darkroom", "ad"): dict(
        layers=4, heads=8, width=64, ff=256, token_hidden=768, task_hidden=1536, task_experts=12, dropout=0.0,
        batch=128, prompt_length=400, warmup=10_000, w_contrastive=0.01, w_importance=0.1, w_load=0.1, episodes=100,
    ),
    ("darkroom", "dpt"): dict(
        layers=3, heads=8, width=128, ff=512, token_hidden=1536, task_hidden=2048, task_experts=8, dropout=0.05,
        batch=32, prompt_length=100, warmup=5000, w_contrastive=0.001, w_importance=0.01, w_load=0.01, episodes=100,
    ),
}  # fmt: skip

CPU = {
    ("darkroom", "ad"): dict(
        layers=3, heads=4, task_experts=8, task_hidden=1024, token_shift=True, routing="prefix",
        task_center=True, w_contrastive=0.1,
        steps=2000, batch=8, warmup=100, lr=2e-3, beta2=0.98, episodes=40, history=3,
        checkpoint_every=100, log_every=25, eval_every=400,
    ),
    ("darkroom", "dpt"): dict(
        heads=4, width=64, ff=256, token_hidden=768, task_hidden=1024, dropout=0.0, token_shift=True, routing="prefix",
        query_position="last", recipe="explore", data_episodes=400, prompt_length=300, batch=12, queries=48, short=0.2,
        empty=0.1, task_center=True, w_contrastive=0.1, w_importance=0.1, w_load=0.1,
        steps=2400, warmup=100, lr=2e-3, beta2=0.98,
        episodes=40, checkpoint_every=100, log_every=25, eval_every=400,
    ),
}  # fmt: skip


def preset_values(preset: str, env: str, backbone: str) -> dict:
    """The settings of a preset; raises ValueError for a family or backbone without one."""
    get_spec(env)
    if (env, backbone) not in PAPER:
        raise ValueError(f"unknown backbone '{backbone}': choose ad or dpt")
    values = dict(PAPER[env, backbone])
    if preset == "cpu":
        values.update(CPU[env, backbone])
    elif preset != "paper":
        raise ValueError(f"unknown preset '{preset}': choose auto, paper or cpu")
    return values


def differences(cfg: Config) -> list[str]:
    """One 'name: paper -> here' for every setting of the method, data and optimisation that departs from
    the `paper` preset.
    """
    paper = asdict(Config(env=cfg.env, backbone=cfg.backbone, **preset_values("paper", cfg.env, cfg.backbone)))
    here = asdict(cfg)
    skip = {"env", "backbone", "preset", "seed", *FREE} - {"history", "actions", "prompt", "episodes"}
    return [f"{k}: {paper[k]} -> {here[k]}" for k in here if k not in skip and here[k] != paper[k]]


def parse(argv: list[str] | None = None) -> Config:
    """The command line, completed by its preset. Raises ValueError for impossible values; unknown flags
    end the program with tyro's message.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("env", "backbone", "preset"):
        first.add_argument(f"--{name}", default=getattr(Config, name))
    chosen, _ = first.parse_known_args(argv)
    preset = chosen.preset
    if preset == "auto":
        preset = "paper" if torch.cuda.is_available() else "cpu"
    values = preset_values(preset, chosen.env, chosen.backbone)
    default = Config(env=chosen.env, backbone=chosen.backbone, preset=preset, **values)
    # `--preset auto` has been resolved: tyro must not put it back
    rest = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    rest.add_argument("--preset")
    _, argv = rest.parse_known_args(argv)
    description = f"environments: {', '.join(SPECS)}"
    return tyro.cli(Config, default=default, args=argv, description=description).check()
