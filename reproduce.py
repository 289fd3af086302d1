"""reproduce.py: a named experiment of the paper from nothing (Sec. 5; Tables 1, 6-11).

in : an experiment's name, families, methods, seeds      out: CSVs, table.csv, table.md
Read after evaluate.py.

    python reproduce.py table1 --envs darkroom point-robot --seeds 0 1 2 --preset cpu
    python reproduce.py ablation --envs push --set steps=2000 --minutes 90
    python reproduce.py departures --envs darkroom --backbones dpt --variants cpu "routing sequence"
    python reproduce.py table1 --minutes 0          what it would run, and how long that would take

What varies, and the paper's numbers: experiments/paper.py. How a table is made of the evaluations:
experiments/compare.py. Here: which runs there are, what they will take, and in which order things
are done:

    plan       every run of the experiment, its settings checked; nothing is written yet
    measure    a few steps and episodes of each size, on data without a meaning
    collect    the datasets, one after another; runs that share one find it whole
    run        train.py and evaluate.py, one run a core or GPU (experiments/runs.py)
    table      of all finished runs of this preset and --set in the folder of the results, also
               of families, methods and seeds that the command does not name

A run is named by its settings, so that experiments share it. What is finished is skipped, what was
stopped continues: after a kill, type the same command again.
"""

from __future__ import annotations

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C should not be a traceback
    from support.stop import at_once

    at_once()

import json
import os
import re
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
import tyro

import collect
from config import Config, CountOrZero, NotNegative, Rows, Seed, Text, Threads
from data import read_meta
from envs import get_family
from experiments.compare import Cell, as_markdown, check_table, make_rows, write_table
from experiments.paper import Experiment, Times, get_experiment, variants_of
from experiments.projection import project
from experiments.runs import (
    NOT_STARTED,
    Job,
    check_record,
    collect_all,
    finished,
    other_settings,
    recorded,
    steps_done,
    work,
)
from methods import names
from support.checkpoint import load_weights
from support.command_line import (
    as_flags,
    check,
    cli,
    flags_of,
    one_line,
    preset_config,
    resolve_preset,
)
from support.distributed import resolve_device
from support.files import check_folder, only_writer
from support.jobs import bar_of, check_cluster, run_jobs
from support.settings import all_before, check_types, counting, flat, short_hash, with_values
from train import make_method

WORDS = {"True": "true", "False": "false", "None": "null"}  # Python's, in JSON


@dataclass(frozen=True)
class Reproduction:
    """Run one of the paper's experiments and make its table. The same command continues it."""

    experiment: tyro.conf.Positional[Text]
    """table1, ablation, quality, token-experts, task-experts, ... (experiments/paper.py)."""
    envs: tuple[Text, ...] = ()
    """Task families (default: those of the paper's table)."""
    backbones: tuple[Text, ...] = ("ad", "dpt")
    """Methods, as train.py's --backbone takes them."""
    variants: tuple[Text, ...] = ()
    """Of the experiment's variants these alone (default: all)."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Of weights, batches and noise; tasks and data are the same for all."""
    preset: Text = "auto"
    """paper: Tables 4 and 5. cpu: minutes on two cores. auto: paper with CUDA, else cpu."""
    set: tuple[Text, ...] = ()
    """key=value: settings of train.py, the same for all runs; methods without one leave it out."""
    repeats: Rows = 3
    """Play every held-out task this often."""
    jobs: Threads = 0
    """Runs at a time; 0: one a GPU, or one a core."""
    cluster: Text | None = None
    """Address of a Ray cluster that runs them instead, one a core (auto, local, host:port)."""
    minutes: NotNegative | None = None
    """Start no new run after so many minutes; 0: say what would be run."""
    trial: CountOrZero = 5
    """Training steps that are measured to project the time; 0: no projection."""
    runs: Text = "runs/paper"
    """Folder of the runs: weights and logs. Experiments share it."""
    results: Text | None = None
    """Folder of evaluations and of a table of one preset and --set (default: results/paper/...)."""


@dataclass(frozen=True)
class Run:
    """A cell of the table with one of its seeds."""

    cell: Cell
    seed: int
    cfg: Config
    job: Job


# -------------------------------------------------------------------------------------------- plan
def plan(command: Reproduction) -> tuple[list[Run], list[str]]:
    """Every run of the experiment, and a line for each departure that cannot be taken back alone.

    Raises ValueError with one line for what cannot be. Nothing is written.
    """
    experiment = get_experiment(command.experiment)
    check_types(command)
    given = given_settings(command)
    check_cluster(command.cluster)
    for name in ("envs", "backbones", "seeds", "variants"):
        values = getattr(command, name)
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise ValueError(f"--{name} names {twice[0]} twice")
    for name in ("backbones", "seeds"):
        if not getattr(command, name):
            raise ValueError(f"--{name} names none")
    check_folder("--runs", command.runs)
    check_folder("--results", results_of(command))
    gpus = 0 if command.cluster else count_gpus(given)
    # on the CPU one core a run; a GPU's runs share what there is
    threads = max(1, (os.cpu_count() or 1) // at_a_time(command, gpus)) if gpus else 1
    runs, alone, variants = [], [], {}
    for env in command.envs or experiment.envs:
        for backbone in command.backbones:
            base = preset_config(resolve_preset(command.preset), env, backbone)
            base = with_values(base, {"threads": threads} | given)
            check(base)
            for cell, cfg in cells(command.experiment, experiment, base):
                variants[cell.variant] = None
                if command.variants and cell.variant not in command.variants:
                    continue
                try:
                    check_run(cfg)
                except ValueError as error:
                    if command.experiment != "departures":
                        raise
                    alone.append(f"{env}, {backbone}: {cell.variant} cannot be alone: {error}")
                    continue
                for seed in command.seeds:
                    seeded = replace(cfg, seed=seed)
                    runs.append(Run(cell, seed, seeded, make_job(command, seeded, gpus)))
    if unknown := [name for name in command.variants if name not in variants]:
        raise ValueError(f"--variants {unknown[0]}: choose of {', '.join(variants)}")
    known: dict[str, Job] = {}
    for job in (run.job for run in runs):
        same = known.setdefault(job.name, job)
        if changed := other_settings(job, same.settings):  # two files of one name
            raise ValueError(f"two runs have one name, {job.name}: {', '.join(changed)}")
    return runs, alone


def cells(name: str, experiment: Experiment, base: Config) -> list[tuple[Cell, Config]]:
    """The rows of one family and method, and their settings, but for the seed."""
    env, backbone, found = base.data.env, base.backbone, []
    for group, shared in experiment.groups.items():
        for variant, settings in variants_of(name, base).items():
            paper = experiment.paper.get((group, env, Path(backbone).stem, variant))
            cell = Cell(get_family(env).name, backbone, group, variant, paper)
            found.append((cell, with_values(base, shared | settings)))
    return found


def title_of(cell: Cell) -> str:
    parts = cell.env, Path(cell.backbone).stem, cell.group, cell.variant
    return ", ".join(filter(None, parts))


def given_settings(command: Reproduction) -> dict[str, Any]:
    """What --set says: {setting: value}. Raises ValueError with one line."""
    known: set[str] = set()
    for env in command.envs or get_experiment(command.experiment).envs:
        for backbone in command.backbones:
            known |= flat(preset_config(resolve_preset(command.preset), env, backbone)).keys()
    experiment, given = get_experiment(command.experiment), {}
    varied = {"env", "backbone", "preset", "seed", "run", "resume", "cluster"}
    for settings in (*experiment.groups.values(), *experiment.variants.values()):
        varied |= {name for name, value in settings.items() if not isinstance(value, Times)}
    for text in command.set:
        key, equals, value = text.partition("=")
        name = key.replace("-", "_")
        if not equals or name not in known:
            raise ValueError(f"--set {text}: it must be one of train.py's settings, key=value")
        if name in varied:
            raise ValueError(f"--set {text}: {key} is not the same for all runs of the experiment")
        if name in given:
            raise ValueError(f"--set names {key} twice")
        try:
            given[name] = json.loads(WORDS.get(value, value))  # numbers, true, false, null
        except ValueError:
            given[name] = value  # a word
    return given


def count_gpus(given: dict[str, Any]) -> int:
    device = resolve_device(str(given.get("device", "auto")))
    if device.index is not None:
        raise ValueError(
            f"--set device={device}: a run takes any GPU; CUDA_VISIBLE_DEVICES chooses"
        )
    return torch.cuda.device_count() if device.type == "cuda" else 0


def check_run(cfg: Config) -> None:
    """Raises ValueError with one line for settings, weights or data that cannot be."""
    check(cfg)
    if cfg.training.init:
        load_weights(cfg.training.init, make_method(cfg, torch.device("cpu")))
    if cfg.training.data:
        read_meta(cfg.training.data, cfg.data.env)
    else:
        collect.check(cfg.collection)
        collect.describe_dataset(cfg.collection)  # a task file may be wrong


def run_name(cfg: Config) -> str:
    """Family, method, what differs from the preset, preset, seed: the same run, the same name."""
    preset = flat(preset_config(cfg.preset, cfg.data.env, cfg.backbone))
    changed = [f"{k}={v}" for k, v in measured(cfg).items() if k != "seed" and v != preset[k]]
    # what no file name should hold; a long one ends in a hash of all of it
    text = re.sub(r"[^\w.=+-]", "_", "-".join(changed))
    if len(text) > 80:
        text = f"{text[:60]}-{short_hash('-'.join(changed))}"
    family = get_family(cfg.data.env).name
    parts = [family, Path(cfg.backbone).stem, text, cfg.preset, f"s{cfg.seed}"]
    return "-".join(filter(None, parts))


def measured(cfg: Config) -> dict[str, Any]:
    """All settings that change what is measured: training, data and how it plays."""
    return dict(counting(cfg, "work", "run"))


def make_job(command: Reproduction, cfg: Config, gpus: int) -> Job:
    results = results_of(command)
    files = {"env": cfg.data.env, "backbone": cfg.backbone}
    named = {name: value for name, value in files.items() if value.endswith(".py")}
    device = "cuda" if gpus else "cpu"
    where = {"repeats": command.repeats, "results": results, "device": device}
    settings = measured(cfg)
    return Job(
        name=run_name(cfg),
        runs=command.runs,
        results=results,
        here=os.getcwd(),
        settings=settings,
        train=tuple(flags_of(cfg)),
        evaluate=tuple(as_flags(named | where | flat(cfg.play))),
        steps=cfg.training.steps,
        repeats=command.repeats,
        gpus=gpus,
        slots=at_a_time(command, gpus),
        older={k: v for k, v in all_before(cfg).items() if k in settings},
        free=tuple(flat(cfg.play)),
    )


def at_a_time(command: Reproduction, gpus: int) -> int:
    return command.jobs or gpus or os.cpu_count() or 1


def results_of(command: Reproduction) -> str:
    return command.results or f"results/paper/{command.experiment}"


# --------------------------------------------------------------------------------------------- run
def run_all(jobs: list[Job], command: Reproduction, slots: int) -> dict[str, str]:
    """Train and evaluate; {run: why not} of those that are not finished then."""
    total = sum(job.steps for job in jobs)
    with bar_of(
        lambda: sum(map(steps_done, jobs)), total, command.experiment, "step", quiet=not jobs
    ) as watch:
        ended = run_jobs(work, jobs, slots, command.cluster, watch, lost=str)
        watch()
    return {job.name: why for job, why in zip(jobs, ended, strict=True) if why}


# ----------------------------------------------------------------------------------------- command
def reproduce(command: Reproduction) -> None:
    """Plan, measure, collect, run, table. Ends with status 1 where a run has failed."""
    begun = time.time()
    runs, alone = plan(command)
    deadline = 0.0 if command.minutes is None else begun + 60 * command.minutes
    results, slots = Path(results_of(command)), runs[0].job.slots if runs else 1
    say_alone = command.minutes == 0  # nothing is written
    with nullcontext() if say_alone else only_writer(results):
        check_table(results, table_title(command))
        # two variants may come to the same settings: one run, two rows
        todo = {run.job.name: run for run in runs if not finished(run.job)}
        different = {run.job.name for run in runs}
        for run in todo.values():
            check_record(run.job)
        print(f"{command.experiment} ({get_experiment(command.experiment).source}):")
        for title, own in groupby(runs, lambda run: title_of(run.cell)):
            done = {run.seed: run.job.name not in todo for run in own}
            print(f"  {title}: seeds {' '.join(map(str, done))}, {sum(done.values())} finished")
        print("\n".join([*alone, f"{len(different)} runs, {len(different) - len(todo)} finished"]))
        failed: dict[str, str] = {}
        if todo and command.trial:
            known = [(title_of(run.cell), run.cfg, steps_done(run.job)) for run in todo.values()]
            # how many cores a cluster has is not known here
            project(known, command.trial, command.repeats, None if command.cluster else slots)
        if say_alone:
            failed = dict.fromkeys(todo, NOT_STARTED)
        elif todo:
            wanted = {n: r.cfg.collection for n, r in todo.items() if not r.cfg.training.data}
            failed = collect_all(wanted, command.jobs, command.cluster, deadline)
            jobs = [run.job for name, run in todo.items() if name not in failed]
            failed |= run_all([replace(job, deadline=deadline) for job in jobs], command, slots)
        try:
            if not say_alone:
                report(command, results)
        finally:
            any_failed = name_missing(failed, say_alone)
    if any_failed:
        raise SystemExit(1)


def name_missing(failed: dict[str, str], say_alone: bool) -> bool:
    """Say what is not finished, and why. Returns whether a run has failed."""
    left = [name for name, why in failed.items() if why == NOT_STARTED]
    if left:
        again = "the same command" + (" without --minutes" if say_alone else "")
        print(f"{len(left)} runs were not started; {again} goes on with them")
    wrong = {name: why for name, why in failed.items() if why != NOT_STARTED}
    for name, why in wrong.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return bool(wrong)


def finished_cells(command: Reproduction) -> list[Cell]:
    """The experiment's cells with all their finished runs in the folder of the results, also those
    that this command does not name: a narrower one takes no row from the table of a wider one.
    """
    experiment, given, found = get_experiment(command.experiment), given_settings(command), []
    seeds = recorded(Path(results_of(command)))
    places = [*product(experiment.envs, ("ad", "dpt")), *sorted(seeds)]  # the paper's order first
    for env, backbone in dict.fromkeys(place for place in places if place in seeds):
        # what is read from disk never chooses a file that is run: the command names it
        files = {name for name in (env, backbone) if name.endswith(".py")}
        if files - {*command.envs, *command.backbones}:
            continue
        with suppress(ValueError):  # records of a family or method that is no longer there
            base = preset_config(resolve_preset(command.preset), env, backbone)
            for cell, cfg in cells(command.experiment, experiment, with_values(base, given)):
                for seed in seeds[env, backbone]:
                    job = make_job(command, replace(cfg, seed=seed), gpus=0)
                    if finished(job):
                        cell.records[seed] = job.record
                found.append(cell)
    return found


def report(command: Reproduction, results: Path) -> None:
    """The table of what is finished; of an experiment without a finished run there is none."""
    rows = make_rows(finished_cells(command))
    if rows:
        title = table_title(command)
        write_table(results, rows, title)
        print(as_markdown(rows, title))
        print(f"table: {results}/table.md, {results}/table.csv")


def table_title(command: Reproduction) -> str:
    source, changed = get_experiment(command.experiment).source, " ".join(command.set)
    title = f"{command.experiment}: {source}; preset {resolve_preset(command.preset)}"
    return title + (f", --set {changed}" if changed else "")


def main() -> None:
    about = f"backbones: {', '.join(names())}"
    reproduce(cli(Reproduction(""), sys.argv[1:], about))


if __name__ == "__main__":
    one_line(main, "the same command goes on with what is missing")
