"""config.py: every setting of a run, said once (paper Tables 2-5, App. F).

in : nothing                   out: dataclasses; each field is a flag of the command line
Read beside train.py.          Try: python train.py --help

A setting is one declaration: its name, which is its flag in train.py, collect.py and evaluate.py,
its type with the values it may take, its default, and its help. support/command_line.py makes flags
of them; what is read from a run's config.json is checked against the same declarations. Settings
of the network stand in models.py, those of one method in its file (ad.py, dpt.py): they join the
groups below as `model`, `method` and `play`.

The defaults are those of a family without a preset; presets.py has Tables 4 and 5 and the laptop's.
Where a help line names a table or a section, the setting is the paper's; where it says "official",
the paper is silent and the value of the preset `paper` is the official configuration's.
"""
# A setting's help is the string below it: it is what --help prints, so it is said here alone.
# `before`: what runs did that are older than the setting; without it they can no longer be read.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, AllowInfNan

# What a setting may be. The bounds are part of the type, so that flags and files are checked alike.
Count = Annotated[int, Ge(1), Le(10**12)]  # far below what an int64 of numpy or torch holds
CountOrZero = Annotated[int, Ge(0), Le(10**12)]
# Of a network: far above any use, so that a mistyped size is refused before memory runs out.
Few = Annotated[int, Ge(1), Le(1000)]
FewOrNone = Annotated[int, Ge(0), Le(1000)]
Units = Annotated[int, Ge(1), Le(10**5)]
Number = Annotated[int, Ge(0), Le(10**5)]  # of tasks, of units
Rows = Annotated[int, Ge(1), Le(10**7)]  # of anything that is in memory at once
Threads = Annotated[int, Ge(0), Le(1024)]  # thousands end in a crash of the thread library
Seed = Annotated[int, Ge(0), Lt(2**63)]
Finite = AllowInfNan(False)  # a bound does not keep infinity out, nor may NaN train
Positive = Annotated[float, Finite, Gt(0)]
Temperature = Annotated[float, Finite, Ge(1e-3)]  # below, logits over it would overflow
NotNegative = Annotated[float, Finite, Ge(0)]
Share = Annotated[float, Finite, Ge(0), Le(1)]
BelowOne = Annotated[float, Finite, Ge(0), Lt(1)]  # dropout 1 divides by 0, beta 1 never moves


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be of printable characters")
    return text


# An empty folder name would be the present folder; control characters would break a line in two.
Text = Annotated[str, MinLen(1), AfterValidator(_printable)]

Quality = Literal["mixed", "medium-expert", "medium"]
Recipe = Literal["paper", "explore", "wander"]
Preset = Literal["auto", "paper", "cpu"]
Actions = Literal["sample", "greedy", "search"]
Every = Literal["step", "episode"]
First = Literal["policy", "random"]
Whose = Literal["each", "siblings", "one"]


@dataclass(frozen=True)
class Data:
    """data: which tasks, and what is collected in them (App. D)"""

    env: Text = "darkroom"
    """Task family, or a Python file that describes one (README: To fork)."""
    quality: Quality = "mixed"
    """Which stages of the teachers' training make the data (App. D.2)."""
    recipe: Recipe = "paper"
    """paper: App. D.2. explore, wander: also behaviour that does not know the task (Sec. 3.1)."""
    data_episodes: Annotated[int, Ge(5), Le(10**7)] = 200
    """Episodes of each training task, D_i."""
    data_queries: Rows = 1000
    """Labelled query states of each training task, D_i^q (Algorithm 3; DPT alone reads them)."""
    train_tasks: Number = 0
    """Training tasks; 0: the paper's number (App. D.1). Not read with --tasks."""
    test_tasks: Number = 0
    """Held-out tasks; 0: the paper's number (App. D.1). Not read with --tasks."""
    task_seed: Seed = 56  # the first whose held-out DarkRoom goals have the paper's optimum, 90.9
    """Seed of the split into training and held-out tasks. Not read with --tasks."""
    data_seed: Seed = 0
    """Seed of everything random in the data."""
    tasks: Text | None = None
    """JSON file {"train": [...], "test": [...]} instead of the seeded split."""
    datasets: Text = "datasets"
    """Folder of the datasets; what is missing is collected."""


@dataclass(frozen=True)
class Teachers:
    """teachers: the RL policies that make the data (Tables 2, 3); 0: the paper's value"""

    teacher: Whose = field(default="each", metadata={"before": "each"})
    """each: one policy a task (paper). siblings: from the same weights and draws. one: for all."""
    teacher_steps: CountOrZero = 0
    """Environment steps of each task's SAC or PPO (training steps, total_timesteps)."""
    teacher_save_every: CountOrZero = 0
    """Steps between its checkpoints (save frequency; PPO's are rounded up to whole rollouts)."""
    teacher_warmup: CountOrZero = 0
    """SAC: first steps, random and without updates (warmup steps)."""
    teacher_hidden: Number = 0
    """SAC: hidden units of a layer (official)."""
    teacher_batch: Number = 0
    """Rows of an update (SAC: official; PPO: batch_size)."""
    teacher_lr: NotNegative = 0.0
    """Their learning rate."""
    teacher_alpha: NotNegative = 0.0
    """SAC: entropy ratio, the weight of a policy's entropy beside its reward."""
    teacher_gamma: BelowOne = field(default=0.0, metadata={"before": 0.0})
    """Discount factor."""
    teacher_layer_norm: bool = field(default=False, metadata={"before": False})
    """SAC: the critics normalise their hidden layers (not the paper's)."""
    teacher_seed: Seed = 0
    """Seed of the teachers' training."""
    teacher_group: Rows = 10
    """Tasks trained in one stack."""


@dataclass(frozen=True)
class Work:
    """where data are collected; nothing of this changes them, but for rounding on another device"""

    workers: Threads = 0
    """Local processes that collect; 0: one a core."""
    cluster: Text | None = None
    """Address of a Ray cluster that collects instead (auto, local, host:port)."""
    teacher_device: Text = "cpu"
    """SAC's networks on cpu or cuda."""


@dataclass(frozen=True)
class Collection:
    """All that collect.py needs to know. The same settings give the same bytes."""

    data: Data = field(default_factory=Data)
    teachers: Teachers = field(default_factory=Teachers)
    work: Work = field(default_factory=Work)


@dataclass(frozen=True)
class Training:
    """optimisation (Algorithms 1 and 3; Tables 4, 5)"""

    data: Text | None = None
    """Train on this dataset folder, whatever made it, instead of collecting one."""
    init: Text | None = None
    """Start from the weights of this run (short prompts first, then long ones)."""
    steps: Count = 300_000
    """Training steps (Tables 4, 5)."""
    batch: Rows = 32
    """Prompts a step on each process, queries and keys alike (2B of Algorithms 1, 3)."""
    draws: Rows = 2
    """Independent prompts of each task in a batch (Algorithms 1, 3: query and key)."""
    prompt_length: Rows = 100
    """Steps of a prompt, a multiple of the episode (Tables 4, 5)."""
    lr: Positive = 3e-4
    """Learning rate at its highest (Tables 4, 5)."""
    warmup: CountOrZero = 5000
    """Steps in which the learning rate rises to it (official)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: falls to 0 along a cosine, or stays (official)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or Muon for the matrices of the blocks beside AdamW for all else (not the paper's)."""
    muon_scale: Positive = 1.0
    """With muon: its learning rate is so many times the other's."""
    beta2: BelowOne = 0.999
    """Second-moment decay of AdamW."""
    weight_decay: NotNegative = 1e-4
    """Of AdamW, on weight matrices alone."""
    clip: Positive = 1.0
    """Largest norm of a step's gradient; a longer one is scaled down to it."""


@dataclass(frozen=True)
class Play:
    """how an evaluation plays (Algorithms 2 and 4)"""

    episodes: Count = 40
    """Episodes on each task (N of Algorithms 2, 4)."""
    actions: Actions = "sample"
    """How a discrete action, or one of --components, is taken: drawn, or the likeliest one; search:
    drawn until a reward in memory is above the lowest one met, then the likeliest one."""
    first: First = "policy"
    """Who plays the first episode, which has no context: the policy (paper) or random actions."""
    noise: NotNegative = 0.0
    """Deviation of the Gaussian noise on continuous actions; 0: the mean (paper)."""
    temperature: Temperature = field(default=1.0, metadata={"before": 1.0})
    """Of what is drawn, a discrete action or one of --components: its logits over it."""
    component_every: Every = field(default="step", metadata={"before": "step"})
    """With --components: when a component is drawn anew; episode: by one number for all of it."""
    spread: NotNegative = field(default=1.0, metadata={"before": 1.0})
    """With --components: drawn so many of the component's deviations wide; 0: its mean."""
    play_seed: Seed = 0
    """Seed of starts and sampled actions."""


@dataclass(frozen=True)
class Run:
    """the run: nothing of this changes the weights, but for rounding (device, dtype, compile)"""

    run: Text | None = None
    """Folder of the run (default: runs/ and the main settings)."""
    resume: bool = False
    """Continue the run in that folder; the result is that of an uninterrupted run."""
    checkpoint_every: Count = 1000
    """Steps between checkpoints."""
    log_every: Count = 50
    """Steps between rows of train.csv."""
    eval_every: CountOrZero = 10_000
    """Steps between short evaluations while training (to train.csv); 0: none."""
    eval_episodes: Count = 10
    """Episodes of a short evaluation, whose last one is noted."""
    device: Text = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on CUDA, float32 elsewhere."""
    compile: bool = False
    """torch.compile the model."""
    threads: Threads = 0
    """CPU threads of each process; 0: all cores, shared by the processes."""
    tensorboard: bool = False
    """Also write TensorBoard events, into the run's folder."""


@dataclass(frozen=True)
class Config:
    """Train a method offline, evaluate it on held-out tasks. Defaults are those of the preset."""

    backbone: Text = "dpt"
    """Method: ad (Eq. 10), dpt (Eq. 11), a file of baselines/ by its name, or a Python file."""
    preset: Preset = "auto"
    """paper: Tables 4 and 5. cpu: minutes on two cores. auto: paper with CUDA, else cpu."""
    seed: Seed = 0
    """Seed of the weights, the batches and the noise."""
    # Any, because --backbone chooses their types: support/settings.py checks them by those
    method: Any = None  # the method's own settings (methods.Method.Settings)
    model: Any = None  # those of its network (methods.Method.Model)
    data: Data = field(default_factory=Data)
    teachers: Teachers = field(default_factory=Teachers)
    work: Work = field(default_factory=Work)
    training: Training = field(default_factory=Training)
    play: Any = None  # how it plays: `Play`, or the method's subclass of it
    run: Run = field(default_factory=Run)

    @property
    def collection(self) -> Collection:
        return Collection(self.data, self.teachers, self.work)
