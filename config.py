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
from envs import FAMILIES, get_family
from models import ModelConfig
from moe import MoEKind, TaskRouting
from policies import check_noise


@dataclass(frozen=True)
class Config:
    """Train T2MIR and evaluate it on held-out tasks. Defaults below are those of the chosen preset."""

    env: str = "darkroom"
    """Task family, or a Python file that describes one (README: Bring your own)."""
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
    recipe: Recipe = "paper"
    """paper: the paper's data. explore, wander: also behaviour that does not know the task."""
    data_episodes: int = 200
    """Episodes of each training task."""
    data_queries: int = 1000
    """Labelled query states of each task (DPT)."""
    train_tasks: int = 0
    """Training tasks; 0: the paper's number (App. D.1)."""
    test_tasks: int = 0
    """Held-out tasks; 0: the paper's number."""
    task_seed: int = 56
    """Seed of the train/test split."""
    data_seed: int = 0
    """Seed of the dataset."""
    teacher_steps: int = 0
    """Environment steps of each task's expert; 0: the paper's (Tables 2, 3), as for the other expert settings."""
    teacher_save_every: int = 0
    """Steps between its checkpoints."""
    teacher_warmup: int = 0
    """SAC: first steps, random and without updates."""
    teacher_hidden: int = 0
    """SAC: hidden units of a layer."""
    teacher_batch: int = 0
    """Rows of an update."""
    teacher_lr: float = 0.0
    """Learning rate of the experts."""
    teacher_alpha: float = 0.0
    """SAC: entropy ratio."""
    teacher_seed: int = 0
    """Seed of the experts' training."""
    teacher_group: int = 10
    """SAC: tasks trained in one stack."""
    teacher_device: str = "cpu"
    """SAC's networks on cpu or cuda."""
    workers: int = 0
    """Local processes that collect; 0: one a core."""
    cluster: str | None = None
    """Address of a Ray cluster that collects instead (auto, local, host:port)."""
    tasks: str | None = None
    """JSON file {"train": [...], "test": [...]} instead of the seeded split."""
    datasets: str = "datasets"
    """Folder of the datasets; what is missing is collected."""
    data: str | None = None
    """Train on this dataset folder, whatever made it, instead of collecting one."""

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
    first: Literal["policy", "random"] = "policy"
    """Who plays the first episode, which has no context: the policy (paper) or random actions."""
    noise: float = 0.0
    """Continuous actions: deviation of the Gaussian noise they are played with; 0: the mean (paper)."""
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
        spec, model = get_family(self.env), self.model()  # both refuse what cannot be
        want = {
            "--steps must be at least 1": self.steps >= 1,
            "--batch must hold at least one task's draws": self.batch >= self.draws >= 1,
            f"--batch {self.batch} is not a multiple of --draws {self.draws}": self.batch
            % max(1, self.draws)
            == 0,
            f"--prompt-length {self.prompt_length} is not a multiple of {self.env}'s {spec.horizon}-step episode": (
                self.prompt_length > 0 and self.prompt_length % spec.horizon == 0
            ),
            f"--prompt-length {self.prompt_length} needs more than --data-episodes {self.data_episodes}": (
                self.prompt_length // spec.horizon <= self.data_episodes
            ),
            "--queries must be at least 1": self.queries >= 1,
            "--queries above 1 needs --query-position last": self.queries == 1 or model.last,
            "--short and --empty need --query-position last": self.short == self.empty == 0
            or model.last,
            "--short and --empty are shares: together in [0, 1]": (
                min(self.short, self.empty) >= 0 and self.short + self.empty <= 1
            ),
            "--lr and --clip must be positive": self.lr > 0 and self.clip > 0,
            "--warmup must not be negative": self.warmup >= 0,
            "--momentum must be in [0, 1], --beta2 in [0, 1)": 0 <= self.momentum <= 1
            and 0 <= self.beta2 < 1,
            "loss weights must not be negative": min(
                self.w_contrastive, self.w_importance, self.w_load
            )
            >= 0,
            "--episodes, --history, --log-every and --checkpoint-every must be at least 1": (
                min(self.episodes, self.history, self.log_every, self.checkpoint_every) >= 1
            ),
        }
        check_noise(self.noise, self.env)
        for complaint, fine in want.items():
            if not fine:
                raise ValueError(complaint)
        return self

    def model(self) -> ModelConfig:
        spec = get_family(self.env)
        names = {f.name for f in fields(ModelConfig)} & {f.name for f in fields(Config)}
        return ModelConfig(
            horizon=spec.horizon,
            state_dim=spec.state_dim,
            state_values=spec.state_values,
            action_dim=spec.action_dim,
            discrete_actions=spec.discrete_actions,
            reward_scale=spec.reward_scale,
            **{name: getattr(self, name) for name in names},
        )

    def collect(self) -> CollectConfig:
        """The dataset's settings: fields of the same name, but for those that a run has of its own."""
        renamed = {k: getattr(self, v) for k, v in _RENAMED.items()}
        names = {f.name for f in fields(CollectConfig)} & {f.name for f in fields(Config)} - set(
            _RENAMED
        )
        return CollectConfig(**renamed, **{name: getattr(self, name) for name in names})

    @property
    def folder(self) -> str:
        return (
            self.run
            or f"runs/{get_family(self.env).name}-{self.backbone}-{self.moe}-{self.quality}-{self.preset}-s{self.seed}"
        )


# fields of a `CollectConfig` whose names mean something else here
_RENAMED = {
    "episodes": "data_episodes",
    "queries": "data_queries",
    "seed": "data_seed",
    "folder": "datasets",
}

# How an evaluation plays
PLAYED = ("episodes", "actions", "prompt", "history", "first", "noise")
# What may differ between a run and its continuation: nothing of this changes the weights
# (threads and device: but for rounding).
FREE = ("resume", "run", "datasets", *PLAYED, "checkpoint_every", "log_every",
        "eval_every", "eval_episodes", "device", "compile", "threads", "tensorboard", "workers", "cluster",
        "teacher_device")  # fmt: skip

# fmt: off
_CHEETAH = {
    "ad": dict(layers=3, heads=8, width=256, ff=1024, token_hidden=3072, task_hidden=4096, batch=24, prompt_length=800),
    "dpt": dict(layers=4, heads=4, prompt_length=200, w_contrastive=0.01),
}
# Tables 4 and 5; sizes, batch, balance weights and schedules are the official configuration's
PAPER = {
    ("darkroom", "ad"): dict(
        layers=4, heads=8, width=64, ff=256, token_hidden=768, task_hidden=1536, task_experts=12, dropout=0.0,
        batch=128, prompt_length=400, steps=300_000,
    ),
    ("darkroom", "dpt"): dict(prompt_length=100, w_contrastive=0.001, steps=300_000, warmup=5000),
    ("point-robot", "ad"): dict(prompt_length=80),
    ("point-robot", "dpt"): dict(prompt_length=20, w_contrastive=0.001),
    ("cheetah-vel", "ad"): _CHEETAH["ad"],
    ("cheetah-vel", "dpt"): _CHEETAH["dpt"],
    ("cheetah-vel-3cluster", "ad"): _CHEETAH["ad"],
    ("cheetah-vel-3cluster", "dpt"): _CHEETAH["dpt"],
    ("walker-param", "ad"): _CHEETAH["ad"] | dict(batch=32),
    ("walker-param", "dpt"): _CHEETAH["dpt"] | dict(warmup=5000),
    ("reach", "ad"): dict(prompt_length=400, lr=5e-5, schedule="constant"),
    ("reach", "dpt"): dict(width=256, prompt_length=100, lr=5e-5),
    ("push", "ad"): dict(width=256, ff=1024, token_hidden=3072, task_hidden=4096, prompt_length=400),
    ("push", "dpt"): dict(
        width=256, ff=1024, token_hidden=3072, task_hidden=4096, prompt_length=100, w_contrastive=0.001,
        schedule="constant",
    ),
}
# what all of these share, by backbone
_PAPER_BOTH = {
    "ad": dict(w_contrastive=0.01, w_importance=0.1, w_load=0.1, warmup=10_000, episodes=100, steps=100_000),
    "dpt": dict(w_contrastive=0.01, w_importance=0.01, w_load=0.01, warmup=10_000, episodes=100, steps=100_000),
}
# Mixed: one episode or a few of every checkpoint (App. D.2)
_PAPER_DATA = {
    "darkroom": {}, "point-robot": dict(data_episodes=100), "cheetah-vel": dict(data_episodes=100, data_queries=4000),
    "cheetah-vel-3cluster": dict(data_episodes=120, data_queries=4000),
    "walker-param": dict(data_episodes=100, data_queries=4000), "reach": dict(data_episodes=196, data_queries=4000),
    "push": dict(data_episodes=489, data_queries=4000),
}

# What two cores can do in about an hour a family, collection included: fewer tasks and steps, smaller networks.
_CPU_SAC = dict(
    teacher_steps=40_000, teacher_save_every=1000, teacher_warmup=1000, teacher_hidden=64, teacher_batch=128, teacher_lr=1e-3,
    teacher_alpha=0.02,
)
CPU_DATA = {
    "darkroom": {},
    "point-robot": dict(
        train_tasks=200, test_tasks=20, data_episodes=75, data_queries=1500,
        teacher_steps=1500, teacher_save_every=20, teacher_hidden=64, teacher_lr=1e-3, teacher_alpha=0.05, teacher_group=20,
    ),
    "cheetah-vel": dict(train_tasks=20, test_tasks=5, data_episodes=120, data_queries=4000, **_CPU_SAC),
    "cheetah-vel-3cluster": dict(train_tasks=18, test_tasks=6, data_episodes=120, data_queries=4000, **_CPU_SAC),
    "walker-param": dict(train_tasks=20, test_tasks=5, data_episodes=120, data_queries=4000, **_CPU_SAC),
    "reach": dict(
        train_tasks=16, test_tasks=4, data_episodes=120, data_queries=4000,
        teacher_steps=40_960, teacher_save_every=2048,
    ),
    "push": dict(
        train_tasks=12, test_tasks=4, data_episodes=120, data_queries=4000,
        teacher_steps=163_840, teacher_save_every=4096,
    ),
}
_CPU_BOTH = dict(
    heads=4, task_experts=8, task_hidden=1024, token_shift=True, routing="prefix", task_center=True,
    w_contrastive=0.1, w_importance=0.1, w_load=0.1, warmup=100, lr=2e-3, beta2=0.98,
    checkpoint_every=100, log_every=25, eval_every=400,
)
_CPU_AD = _CPU_BOTH | dict(width=64, ff=256, layers=3, token_hidden=768, dropout=0.0, history=3)
_CPU_DPT = _CPU_BOTH | dict(
    width=64, ff=256, layers=3, token_hidden=768, dropout=0.0, query_position="last", short=0.2, empty=0.1
)
CPU = {
    ("darkroom", "ad"): _CPU_AD | dict(steps=2000, batch=8, episodes=40),
    ("darkroom", "dpt"): _CPU_DPT | dict(
        recipe="explore", data_episodes=400, prompt_length=300, batch=12, queries=48, steps=2400, episodes=40,
    ),
    ("point-robot", "ad"): _CPU_AD | dict(
        recipe="wander", steps=2000, batch=32, episodes=40, w_contrastive=0.01, first="random", noise=0.2,
    ),
    ("point-robot", "dpt"): _CPU_DPT | dict(
        recipe="explore", steps=2000, batch=32, queries=32, prompt_length=60, episodes=20, prompt="all", first="random",
    ),
}
for _env in ("cheetah-vel", "cheetah-vel-3cluster", "walker-param", "reach", "push"):
    _long = 3 * get_family(_env).horizon
    CPU[_env, "ad"] = _CPU_AD | dict(steps=1000, batch=8, episodes=15, prompt_length=_long, history=2, eval_every=250)
    CPU[_env, "dpt"] = _CPU_DPT | dict(steps=1500, batch=16, queries=32, episodes=10, eval_every=500)
    if get_family(_env).teacher == "sac":
        CPU[_env, "dpt"] |= dict(recipe="explore")
        CPU[_env, "ad"] |= dict(recipe="wander", lr=1e-3, first="random")
# fmt: on


def preset_values(preset: str, env: str, backbone: str) -> dict:
    """The settings of a preset; raises ValueError for a family or backbone without one."""
    horizon = get_family(env).horizon
    if backbone not in _PAPER_BOTH:
        raise ValueError(f"unknown backbone '{backbone}': choose ad or dpt")
    own = dict(prompt_length=4 * horizon if backbone == "ad" else horizon)  # a family of the user's
    values = _PAPER_BOTH[backbone] | _PAPER_DATA.get(env, {}) | PAPER.get((env, backbone), own)
    if preset == "cpu":
        values |= CPU_DATA.get(env, {}) | CPU.get(
            (env, backbone), _CPU_AD if backbone == "ad" else _CPU_DPT
        )
    elif preset != "paper":
        raise ValueError(f"unknown preset '{preset}': choose auto, paper or cpu")
    return values


def differences(cfg: Config) -> list[str]:
    """One 'name: paper -> here' for every setting of the method, data and optimisation that departs from
    the `paper` preset.
    """
    paper = asdict(
        Config(env=cfg.env, backbone=cfg.backbone, **preset_values("paper", cfg.env, cfg.backbone))
    )
    here = asdict(cfg)
    skip = {"env", "backbone", "preset", "seed", *FREE} - set(PLAYED)
    return [f"{k}: {paper[k]} -> {here[k]}" for k in here if k not in skip and here[k] != paper[k]]


def _first_look(argv: list[str], *names: str) -> tuple[argparse.Namespace, list[str]]:
    """Env, backbone and preset, which decide the defaults of everything else (`auto` resolved); and the command line
    without --preset, which tyro must not put back.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        first.add_argument(f"--{name}", default=getattr(Config, name))
    chosen, _ = first.parse_known_args(argv)
    if chosen.preset == "auto":
        chosen.preset = "paper" if torch.cuda.is_available() else "cpu"
    rest = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    rest.add_argument("--preset")
    return chosen, rest.parse_known_args(argv)[1]


def parse_collect(argv: list[str] | None = None) -> CollectConfig:
    """The command line of collect.py, completed by the data settings that both backbones' presets share."""
    chosen, argv = _first_look(sys.argv[1:] if argv is None else argv, "env", "preset")
    get_family(chosen.env)
    if chosen.preset not in ("paper", "cpu"):
        raise ValueError(f"unknown preset '{chosen.preset}': choose auto, paper or cpu")
    values = _PAPER_DATA.get(chosen.env, {}) | (
        CPU_DATA.get(chosen.env, {}) if chosen.preset == "cpu" else {}
    )
    back = {v: k for k, v in _RENAMED.items()}
    default = CollectConfig(env=chosen.env, **{back.get(k, k): v for k, v in values.items()})
    description = f"environments: {', '.join(FAMILIES)}; --preset auto|paper|cpu as in train.py"
    return tyro.cli(CollectConfig, default=default, args=argv, description=description)


def parse(argv: list[str] | None = None) -> Config:
    """The command line, completed by its preset. Raises ValueError for impossible values; unknown flags
    end the program with tyro's message.
    """
    chosen, argv = _first_look(sys.argv[1:] if argv is None else argv, "env", "backbone", "preset")
    values = preset_values(chosen.preset, chosen.env, chosen.backbone)
    default = Config(env=chosen.env, backbone=chosen.backbone, preset=chosen.preset, **values)
    description = f"environments: {', '.join(FAMILIES)}"
    return tyro.cli(Config, default=default, args=argv, description=description).check()
