"""tiny.py: small runs for test_train, test_checkpoint, test_evaluate and test_cli, and what they leave behind.

Every setting is on the command line, so that no test depends on a preset. The datasets are those of conftest.py.
"""

import csv
import hashlib
import os
import runpy
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import collect
import train
from config import Config
from support import checkpoint, jobs
from teachers import teachers

ROOT = Path(train.__file__).resolve().parent
# fmt: off
SETTINGS = {f.name: f.default for f in fields(Config)} | {
    "preset": "cpu", "recipe": "paper", "routing": "prefix", "token_shift": True, "token_experts": 4,
    "task_experts": 4, "w_contrastive": 0.1, "w_importance": 0.1, "w_load": 0.1, "momentum": 0.9, "layers": 2,
    "heads": 2, "width": 16, "ff": 32, "token_hidden": 24, "task_hidden": 16, "dropout": 0.1, "steps": 3, "batch": 4,
    "draws": 2, "prompt_length": 100, "lr": 1e-3, "warmup": 2, "schedule": "cosine", "beta2": 0.98,
    "weight_decay": 1e-2, "episodes": 1, "actions": "sample", "prompt": "last", "history": 2, "eval_every": 0,
    "eval_episodes": 1, "checkpoint_every": 2, "log_every": 1, "device": "cpu", "dtype": "float32", "threads": 1,
}
# fmt: on
BACKBONES = {
    "ad": {"query_position": "first", "queries": 1, "short": 0.0, "empty": 0.0},
    "dpt": {"query_position": "last", "queries": 4, "short": 0.3, "empty": 0.1},
}


def flags(settings: dict) -> list[str]:
    """Settings as a command line; None leaves a flag out."""
    out = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            out += [f"--{name}", str(value)]
    return out


def dataset(data) -> dict:
    """train.py's flags that name the dataset of a `CollectConfig`, family, quality and recipe aside."""
    names = {
        "episodes": "data_episodes",
        "queries": "data_queries",
        "seed": "data_seed",
        "folder": "datasets",
    }
    return {
        names.get(k, k): v for k, v in vars(data).items() if k not in ("env", "quality", "recipe")
    }


def command(data, run=None, backbone="dpt", **changes) -> list[str]:
    """The command line of a tiny run of a `CollectConfig`'s dataset."""
    own = {"env": data.env, "backbone": backbone, "run": run}
    return flags(SETTINGS | BACKBONES[backbone] | dataset(data) | own | changes)


def start(argv: list[str], *launcher: str, script: str = "train.py", **options) -> subprocess.Popen:
    """A script as a process of its own."""
    line = [sys.executable, *launcher, str(ROOT / script), *argv]
    one = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        line,
        env=os.environ | one,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a wrong command prints: nothing but it and progress on stderr, no traceback."""
        assert self.code not in (0, None), self.out
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0]


def run(script: str, argv: list[str], monkeypatch, capsys) -> Ended:
    """`python SCRIPT ARGV...` as the interpreter runs it, in this process."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *argv])
    code, why = 0, ""
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code, why = (1, f"{end.code}\n") if isinstance(end.code, str) else (end.code or 0, "")
    out, err = capsys.readouterr()
    return Ended(code, out, err + why)


@contextmanager
def at_home():
    """Jobs run in this process, one behind the other: no worker has to import everything first."""

    def run_jobs(work, jobs, workers, cluster=None, watch=lambda: None):
        return [work(job, lambda: None) for job in jobs]

    with pytest.MonkeyPatch.context() as patch:
        for module in (collect, teachers, jobs):  # jobs: for scripts that `run` begins anew
            patch.setattr(module, "run_jobs", run_jobs)
        yield


# ------------------------------------------------------------------------------- what a run left behind
def tensors(folder) -> dict:
    return load_file(Path(folder) / checkpoint.FILE)


def differing(a, b) -> list[str]:
    """Names of the tensors of two checkpoints that are not equal bit for bit: weights, moments, random streams."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 40
    return [name for name in a if not torch.equal(a[name], b[name])]


def rows(folder) -> list[dict]:
    """train.csv"""
    with open(Path(folder) / "train.csv", newline="") as file:
        return list(csv.DictReader(file))


def untimed(folder, *without: str) -> list[dict]:
    """train.csv without the columns that depend on time (and others)."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", *without)}
        for row in rows(folder)
    ]


def contents(folder) -> dict:
    """Every file's bytes and time of change."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


@contextmanager
def trainer(data):
    """fit(folder, **settings) trains a tiny run in this process, without the evaluation at its end."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def fit(folder, backbone="dpt", **changes):
        train.main(command(data, folder, backbone, **changes))
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate_run", lambda *_, **__: None)
        yield fit
    for number, handler in handlers.items():
        signal.signal(number, handler)
