"""user_file.py: a Python file of the user's own, run as a module (`--env FILE.py`, `--backbone`).

in : its path           out: the module, or ValueError with one line that says where it went wrong
Service code, used by envs.py (a family of your own) and methods.py (a method of your own).
What such a family's data are depends on the file too: `code_of` names what it says.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import tokenize
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def run_file(file: str, flag: str) -> ModuleType:
    """The file as a module; `flag` is the one that names it. ValueError: whatever goes wrong."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--{flag} {file}: there is no such file")
    name = f"{flag}_{path.stem}"  # not its own name, which may be that of another module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a path that ends in .py has both"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # also a script that ends with sys.exit()
        raise users_error(file, flag, error) from error
    return module


@cache
def code_of(name: str) -> str:
    """Changes with the code of a user's file, not with its comments; "" for what is built in.

    A process reads it once, as it does the family: an edit while it runs must not rename its data.
    """
    if not name.endswith(".py"):
        return ""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING)
    with open(name, "rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    said = [token.string for token in tokens if token.type not in silent]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()


def users_error(file: str, flag: str, error: BaseException) -> ValueError:
    """One line that says where in the user's file it went wrong; the traceback is its cause."""
    frames = traceback.extract_tb(error.__traceback__)
    there = str(Path(file).absolute())
    lines = [frame.lineno for frame in frames if str(Path(frame.filename).absolute()) == there]
    place = f" line {lines[-1]}:" if lines else ""  # a syntax error names its line by itself
    reason = " ".join(str(error).split())
    return ValueError(f"--{flag} {file}:{place} {type(error).__name__}: {reason}")


@contextmanager
def users_code(env: str) -> Iterator[None]:
    """Whatever a user's own family raises becomes one line that says where."""
    try:
        yield
    except Exception as error:
        if not env.endswith(".py"):
            raise
        raise users_error(env, "env", error) from error


def check_batch(env: str, family: Any, tasks: list, actions: np.ndarray) -> None:
    """Plays a step of N tasks of a user's family. ValueError: the user's is no `envs.Batch`."""
    rows = len(tasks)
    with users_code(env):
        batch = family.batch(tasks, 0)
        start = batch.reset()
        before = np.array(start)
        following, rewards = batch.step(actions)
    state = (rows, family.state_dim), np.int64 if family.state_values else np.float32
    for name, array, (shape, kind) in (
        ("reset's states", before, state),
        ("step's states", following, state),
        ("step's rewards", rewards, ((rows,), np.float32)),
    ):
        array = np.asarray(array)
        if array.shape != shape or array.dtype != kind or not np.isfinite(array).all():
            raise ValueError(
                f"--env {env}: {name} of {rows} tasks must be {np.dtype(kind)} of shape {shape} "
                f"and finite, not {array.dtype} of shape {array.shape}: {str(array.tolist())[:60]}"
            )
    if (before != start).any():  # all states of an episode would be its last
        raise ValueError(f"--env {env}: step must return a new array, not change reset's")
    if (family.reward or family.lesson) and not hasattr(batch, "outcome"):
        raise ValueError(f"--env {env}: where a family has a reward, step must set `outcome`")
    if family.reward:
        with users_code(env):
            paid = family.reward(batch.outcome, np.asarray(tasks, np.float32))
        if np.shape(paid) != (rows,) or not np.allclose(paid, rewards, rtol=1e-3, atol=1e-4):
            raise ValueError(f"--env {env}: reward of step's outcome must be what step has paid")
