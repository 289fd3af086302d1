"""command_line.py: flags to checked settings; errors to one line (tyro makes flags of config.py).

in : argv                   out: a `Config`, a `Collection` or an `Evaluation`

Nothing of the paper is here. Twice over the flags: --env, --backbone and --preset (or the run that
is evaluated) decide which flags there are and what their defaults are, so they are read first.
Order of what wins: a flag, the preset, the declaration.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.distributed import DistError

import presets
from config import Collection, Config, Data, Play, Preset, Teachers, Text, Work
from envs import FAMILIES, get_family, try_family
from methods import get_method, names
from policies import check_play
from support import distributed
from support.checkpoint import load_config
from support.files import end_bars
from support.settings import (
    FREE_GROUPS,
    check_types,
    counting,
    flat,
    groups_of,
    with_values,
)
from support.stop import Stop, by_exception

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room: on the disk, of a quota, by ulimit


def cli(default: Any, argv: list[str], description: str) -> Any:
    """Flags over defaults; unknown ones end the program with tyro's message."""
    return tyro.cli(
        type(default),
        default=default,
        args=one_path(argv),
        description=f"{type(default).__doc__}\n{description}",
        # --steps, not --training.steps; and help is the string below a setting, not a comment
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )


def one_path(argv: list[str]) -> list[str]:
    """`fam.py`, `./fam.py` and its absolute path: as seen from here, where it lies below."""
    line = []
    for word in argv:
        flag, equals, value = word.rpartition("=")
        if value.endswith(".py") and Path(value).is_file():
            place = Path(value).absolute()
            inside = place.is_relative_to(Path.cwd())
            value = str(place.relative_to(Path.cwd()) if inside else place)
        line.append(flag + equals + value)
    return line


@dataclass(frozen=True)
class Chosen:
    """What decides the defaults of everything else."""

    env: str = Data.env
    backbone: str = Config.backbone
    preset: Any = Config.preset


@dataclass(frozen=True)
class Files:
    """What an evaluation must be told of a run whose family or method is a file of the user's."""

    env: str | None = None
    backbone: str | None = None


def first_look(argv: list[str]) -> Chosen:
    """These three, with `auto` resolved. Raises ValueError for a preset that is none."""
    chosen, _ = tyro.cli(Chosen, args=one_path(argv), return_unknown_args=True, add_help=False)
    # not by its type: the parser of these three flags would answer with a usage of its own
    return replace(chosen, preset=resolve_preset(chosen.preset))


def resolve_preset(preset: str) -> Any:
    """paper or cpu: what `auto` is on this machine. Raises ValueError for what is no preset."""
    if preset not in ("auto", "paper", "cpu"):
        raise ValueError(f"unknown preset '{preset}': choose auto, paper or cpu")
    if preset == "auto":
        return "paper" if torch.cuda.is_available() else "cpu"
    return preset


# ---------------------------------------------------------------------------------------- train.py
def preset_config(preset: Any, env: str, backbone: str) -> Config:
    """All settings of a preset; what it says of settings that a method does not have is left out.

    Raises ValueError for an unknown family or method.
    """
    family, method = get_family(env), get_method(backbone)
    groups = {name: group() for name, group in groups_of(method).items()}
    empty = Config(backbone=backbone, preset=preset, **groups)
    values = presets.values(preset, env, method.presets, family.horizon)
    return with_values(empty, values | {"env": env})


def parse_config(argv: list[str] | None = None) -> Config:
    """train.py's command line, completed by its preset. Raises ValueError for what cannot be."""
    argv = sys.argv[1:] if argv is None else argv
    chosen = first_look(argv)
    default = preset_config(chosen.preset, chosen.env, chosen.backbone)
    known = f"environments: {', '.join(FAMILIES)}; backbones: {', '.join(names())}"
    cfg = replace(cli(default, argv, known), preset=chosen.preset)  # what `auto` came to is kept
    try:
        check(cfg)
    except ValueError as error:
        raise ValueError(f"{error}{of_preset(str(error), argv, default)}") from error
    return cfg


def of_preset(error: str, argv: list[str], preset: Config) -> str:
    """What to add to an error about flags that nobody typed: the preset's values of them."""
    typed, values = {word.partition("=")[0] for word in argv}, flat(preset)
    flags = {f"--{name.replace('_', '-')}": value for name, value in values.items()}
    named = dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]*", error))
    silent = [f"{flag} {flags[flag]}" for flag in named if flag in flags and flag not in typed]
    return f" (of the preset: {', '.join(silent)})" if typed and silent else ""


def check(cfg: Config) -> None:
    """Raises ValueError with one line for settings that cannot be, alone or together."""
    check_types(cfg)
    training, data, family = cfg.training, cfg.data, get_family(cfg.data.env)
    try_family(data.env)
    if training.batch % training.draws:
        raise ValueError(f"--batch {training.batch} is not a multiple of --draws {training.draws}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's: --batch is of each
    tasks = training.batch // training.draws * processes
    if tasks == 1 < training.draws and getattr(cfg.model, "has_task_moe", False):
        raise ValueError(
            f"--batch {training.batch} is {training.draws} draws of one task, which Eq. 7 could "
            "tell from no other: take a larger one"
        )
    if training.prompt_length % family.horizon:  # prompts are whole episodes (Algorithms 1, 3)
        raise ValueError(
            f"--prompt-length {training.prompt_length} is not a multiple of {family.name}'s "
            f"{family.horizon}-step episode"
        )
    episodes = training.prompt_length // family.horizon
    if episodes > data.data_episodes and not training.data:  # drawn without repeats
        raise ValueError(
            f"--prompt-length {training.prompt_length} needs more than --data-episodes "
            f"{data.data_episodes}"
        )
    # of all methods: none has to name them
    check_play(cfg.model, cfg.play, family)
    get_method(cfg.backbone).check(cfg, family)


def departures(cfg: Config) -> dict[str, tuple[Any, Any]]:
    """{setting: (its value in the preset `paper`, here)} where the two differ."""
    paper = flat(preset_config("paper", cfg.data.env, cfg.backbone))
    return {
        name: (paper[name], value)
        for name, value in counting(cfg, "", "work", "run")  # where and who is free, what is not
        if value != paper[name]
    }


def differences(cfg: Config) -> list[str]:
    """'name: paper -> here' for every setting in which a run departs from the preset `paper`."""
    return [f"{name}: {paper} -> {here}" for name, (paper, here) in departures(cfg).items()]


def flags_of(cfg: Config) -> list[str]:
    """The command line of train.py that gives `cfg`: what its preset does not say already."""
    preset = flat(preset_config(cfg.preset, cfg.data.env, cfg.backbone))
    line = ["--env", cfg.data.env, "--backbone", cfg.backbone, "--preset", cfg.preset]
    return line + as_flags({k: v for k, v in flat(cfg).items() if v != preset[k]})


def as_flags(values: dict[str, Any]) -> list[str]:
    """{name: value} as flags; None, which no flag can say, is left out."""
    line = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            line += [f"--{flag}", str(value)]
    return line


def changed_settings(old: Config, new: Config) -> list[str]:
    """'name old -> new' for what a continued run must not change."""
    before = flat(old)
    return [
        f"{name} {before.get(name)} -> {value}"  # another method has settings of its own
        for name, value in counting(new, *FREE_GROUPS)
        if value != before.get(name)
    ]


def default_folder(cfg: Config) -> str:
    """runs/ and the main settings."""
    settings = flat(cfg)
    names = [
        settings[name] for name in ("backbone", "moe", "quality", "preset") if name in settings
    ]
    names[0] = Path(names[0]).stem  # --backbone may be a file
    return f"runs/{'-'.join([get_family(cfg.data.env).name, *names])}-s{cfg.seed}"


# ------------------------------------------------------------------------------------- evaluate.py
def parse_evaluation(command: type, argv: list[str] | None = None) -> Any:
    """evaluate.py's command line: an `Evaluation` (`command`) of the run that it begins with, whose
    own settings are the defaults. Raises ValueError for what cannot be.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or not argv[0] or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            cli(command("runs/...", play=Play()), argv, "a method adds settings of its own")
        raise ValueError("name the run first: python evaluate.py runs/... [settings]")
    # what is read from a run's folder must not choose which file is run: the user names it
    files, _ = tyro.cli(Files, args=one_path(argv[1:]), return_unknown_args=True, add_help=False)
    run = load_config(argv[0], env=files.env, backbone=files.backbone)
    evaluation = cli(command(argv[0], play=run.play), argv, "")
    check_types(evaluation)
    return evaluation


# --------------------------------------------------------------------------------------- figures.py
def parse_figures(command: type, argv: list[str] | None = None) -> Any:
    """figures.py's command line: its settings (`command`), none of which is a run's own."""
    settings = cli(command(), sys.argv[1:] if argv is None else argv, "")
    check_types(settings)
    return settings


# -------------------------------------------------------------------------------------- collect.py
@dataclass(frozen=True)
class CollectCommand:
    """Collect one dataset; a stopped run continues with the same command."""

    preset: Preset = "auto"
    """paper: the paper's scale (App. D). cpu: minutes on two cores. auto: paper with CUDA."""
    export_minari: Text | None = None
    """Also write the dataset under this folder in Minari's format (tools/minari_io.py)."""
    data: Data = field(default_factory=Data)
    teachers: Teachers = field(default_factory=Teachers)
    work: Work = field(default_factory=Work)


def parse_collection(argv: list[str] | None = None) -> tuple[Collection, str | None]:
    """collect.py's command line: what to collect, and where to export it."""
    argv = sys.argv[1:] if argv is None else argv
    chosen = first_look(argv)
    get_family(chosen.env)
    values = presets.data_values(chosen.preset, chosen.env) | {"env": chosen.env}
    default = with_values(CollectCommand(preset=chosen.preset), values)
    command = cli(default, argv, f"environments: {', '.join(FAMILIES)}")
    check_types(command)
    return Collection(command.data, command.teachers, command.work), command.export_minari


# ------------------------------------------------------------------------------ one line, whatever
def one_line(main: Callable[[], object], when_stopped: str) -> None:
    """Run a script; what a user can mend, Ctrl-C and a polite kill end it with one line.

    Anything else is a bug, and its traceback is wanted; that of all errors where the environment
    has T2MIR_TRACEBACK. Exit codes: 1, 130, 143.
    """
    try:
        # into a file or a pipe, too, each line as it comes
        sys.stdout.reconfigure(line_buffering=True)  # pyrefly: ignore[missing-attribute]
        with by_exception():
            main()
    except KeyboardInterrupt as stop:  # a `Stop`, or what Ray makes of one
        end_bars()
        print(f"stopped; {when_stopped}", file=sys.stderr)
        raise SystemExit(stop.code if isinstance(stop, Stop) else 130) from None
    except Exception as error:
        reason = in_one_line(error, when_stopped)
        end_bars()
        if reason is not None and os.environ.get("T2MIR_TRACEBACK"):
            traceback.print_exc()
        if reason is None:
            raise
        raise SystemExit(f"error: {reason}") from None


def in_one_line(error: BaseException, when_stopped: str) -> str | None:
    """What to say of an error that a user can mend; None for a bug."""
    if isinstance(error, OSError) and error.errno in FULL:
        return f"no room on the disk for {error.filename}: make room; then {when_stopped}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)):
        return " ".join(str(error).split())
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, MemoryError) or "t allocate memory" in text or "out of memory" in text:
        return f"out of memory: take a smaller batch, prompt or network {text}".rstrip()
    if distributed.active() and ("peer" in text or isinstance(error, DistError)):
        return f"another process of this run has ended; {when_stopped}"
    return None
