"""tiny.py: small runs of train.py, and what they leave behind.

Every setting is on the command line, so that no test depends on a preset. The datasets are those
of conftest.py. How scripts are run stands in commands.py.
"""

import csv
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from commands import flags
from safetensors.torch import load_file

import train
from config import Collection, Config
from methods import get_method
from support import checkpoint
from support.command_line import one_line, parse_config
from support.settings import flat, groups_of

# fmt: off
SMALL = {
    "preset": "cpu",
    "routing": "prefix", "token_shift": True, "token_experts": 4, "task_experts": 4,
    "w_contrastive": 0.1, "w_importance": 0.1, "w_load": 0.1, "momentum": 0.9,
    "layers": 2, "heads": 2, "width": 16, "ff": 32, "token_hidden": 24, "task_hidden": 16,
    "dropout": 0.1, "steps": 3, "batch": 4, "draws": 2, "prompt_length": 100, "lr": 1e-3,
    "warmup": 2, "schedule": "cosine", "beta2": 0.98, "weight_decay": 1e-2,
    "episodes": 1, "eval_every": 0, "eval_episodes": 1, "checkpoint_every": 2, "log_every": 1,
    "device": "cpu", "dtype": "float32", "threads": 1,
}
OWN = {
    "ad": {"history": 2},
    "dpt": {"query_position": "last", "queries": 4, "short": 0.3, "empty": 0.1, "prompt": "last"},
}
# fmt: on


def settings(data: Collection, backbone: str = "dpt", **changes) -> dict:
    """{name: value} of a tiny run on the dataset of `data`: all that the method declares."""
    groups = {name: group() for name, group in groups_of(get_method(backbone)).items()}
    declared = flat(Config(backbone=backbone, **groups))
    small = {name: value for name, value in SMALL.items() if name in declared}
    return declared | small | OWN.get(backbone, {}) | flat(data) | changes


def command(data: Collection, run=None, backbone: str = "dpt", **changes) -> list[str]:
    """The command line of a tiny run on the dataset of `data`."""
    return flags(settings(data, backbone, run=run) | changes)


@contextmanager
def trainer(data: Collection):
    """fit(folder, **settings) trains in this process, without the evaluation at its end.

    As train.py does, it ends with SystemExit and one line where something is wrong.
    """

    def fit(folder, backbone="dpt", **changes):
        argv = command(data, folder, backbone, **changes)
        one_line(lambda: train.run(parse_config(argv)), "")
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate_run", lambda *_, **__: None)
        yield fit


# --------------------------------------------------------------------------- what a run left behind
def tensors(folder) -> dict:
    return load_file(Path(folder) / checkpoint.FILE)


def differing(a, b) -> list[str]:
    """Names of the tensors of two checkpoints that are not equal bit for bit.

    Weights, momentum router, the optimisers' moments and the random streams.
    """
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 40
    return [name for name in a if not torch.equal(a[name], b[name])]


def rows(folder) -> list[dict]:
    """train.csv"""
    with open(Path(folder) / "train.csv", newline="") as file:
        return list(csv.DictReader(file))


def untimed(folder, *without: str) -> list[dict]:
    """train.csv without the columns that depend on time (and others)."""
    timed = ("seconds", "tokens_per_s", *without)
    return [{k: v for k, v in row.items() if k not in timed} for row in rows(folder)]
