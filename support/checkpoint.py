"""checkpoint.py: what a run keeps on disk: `config.json` and `checkpoint.safetensors`.

in : a training `State`         out: one file, written to a temporary name and renamed
Nothing here is a pickle. The file holds the weights (momentum router included), the optimisers'
moments, the random streams and, as JSON in its header, the step and the seconds spent, so that a
resumed run is the uninterrupted one bit for bit. evaluate.py reads its weights alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from envs import check_tasks, get_family
from methods import Method, get_method
from support.files import (
    load_optimizer,
    load_tensors,
    optimizer_tensors,
    save_tensors,
    write_atomically,
)
from support.settings import from_plain

FILE = "checkpoint.safetensors"
FORMAT = "2"  # of config.json and the checkpoint; raised when their meaning changes


@dataclass
class State:
    """Everything that training changes: with all of it back, a run goes on as if never stopped."""

    method: Method  # its model and its optimisers
    rng: torch.Generator  # of the batches
    step: int = 0
    seconds: float = 0.0  # of training so far, over all its parts
    sums: dict[str, float] = field(default_factory=dict)  # logged since the last row of train.csv


# ------------------------------------------------------------------------------------- config.json
def write_config(folder: Path, cfg: Config, tasks: dict) -> None:
    """All settings, the tasks trained on and held out, and their reference returns if known."""
    content = {"format": FORMAT, "settings": asdict(cfg), "task_split": tasks}
    text = json.dumps(content, indent=1)
    write_atomically(folder / "config.json", lambda path: path.write_text(text))


def read_run(folder: str | Path) -> dict:
    """config.json of a run. Raises ValueError with one line for a folder that is not one."""
    path = Path(folder) / "config.json"
    # the file may come from anywhere: each line below refuses one thing that it might not be
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"{folder} is not a t2mir run: config.json: {reason}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a t2mir run of format {FORMAT}: train it anew")
    if not isinstance(content.get("settings"), dict):
        raise ValueError(f"{path} is damaged: it holds no settings")
    return content


def load_config(folder: str | Path, **files: str | None) -> Config:
    """A run's settings, checked; `files` as in `settings.from_plain`."""
    return from_plain(read_run(folder)["settings"], f"{folder}/config.json", **files)


def read_tasks(folder: str | Path, env: str) -> dict[str, list]:
    """{"train": [...], "test": [...]} of a run. Raises ValueError when they do not fit."""
    split = read_run(folder).get("task_split")
    lists = isinstance(split, dict) and [split.get(k) for k in ("train", "test")]
    if not lists or not all(isinstance(tasks, list) and tasks for tasks in lists):
        raise ValueError(f"{folder}/config.json names no tasks")
    return {k: check_tasks(env, split[k]) for k in ("train", "test")}


def read_reference(folder: str | Path, split: str) -> dict[str, list[float]] | None:
    """{"random": ..., "teacher": ...} of each task of a split, if the run's dataset knew them."""
    reference = read_run(folder)["task_split"].get("reference")
    returns = reference.get(split) if isinstance(reference, dict) else None
    if isinstance(returns, dict) and returns.get("random") and returns.get("teacher"):
        return returns
    return None


# ------------------------------------------------------------------------- checkpoint.safetensors
def save(folder: Path, state: State) -> None:
    """Write the checkpoint: the old one stays whole until the new one is (support/files.py)."""
    method = state.method
    # state_dict also has what no gradient moves: the key router (Eq. 8), `Center`'s statistics
    tensors = {f"model.{name}": value for name, value in method.model.state_dict().items()}
    for name, optimizer in method.optimizers.items():
        tensors |= optimizer_tensors(optimizer, f"optimizer.{name}")
    # noise and dropout come from torch's stream, batches from their own (train.py: `run`)
    tensors |= {"random.torch": torch.get_rng_state(), "random.batches": state.rng.get_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    # without them the weights could not be played: they have learned to read states so normalised
    tensors |= {"states.mean": method.state_mean, "states.std": method.state_std}
    header = {
        "t2mir": FORMAT,
        "step": str(state.step),
        "seconds": repr(state.seconds),  # repr: the same float when it is read again
        "sums": json.dumps(state.sums),
    }
    save_tensors(folder / FILE, tensors, header)


def read(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header. Raises ValueError for a missing, damaged or foreign file."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {FILE}: train it first, or continue its run with --resume"
        )
    tensors, header = load_tensors(path)
    if header.get("t2mir") != FORMAT:
        raise ValueError(f"{path} is not a t2mir checkpoint of format {FORMAT}: train it anew")
    return tensors, header


def _fill(method: Method, tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Weights of a checkpoint into the model. Raises ValueError when they do not fit."""
    weights = {
        name.removeprefix("model."): value
        for name, value in tensors.items()
        if name.startswith("model.")
    }
    # strictly: a weight that is missing would stay at its random first value, unnoticed
    try:
        method.model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{folder}/{FILE} does not fit these settings ({reason})") from None


def load_weights(folder: str | Path, method: Method) -> None:
    """The weights of another run into a model. Raises ValueError when they do not fit."""
    _fill(method, read(folder)[0], folder)


def load(folder: str | Path, state: State) -> None:
    """Continue: put everything of a checkpoint into `state` and the random streams of torch."""
    tensors, header = read(folder)
    _fill(state.method, tensors, folder)
    try:
        for name, optimizer in state.method.optimizers.items():
            load_optimizer(optimizer, f"optimizer.{name}", tensors)
        torch.set_rng_state(tensors["random.torch"])
        state.rng.set_state(tensors["random.batches"])
        # saved on CUDA and continued without, a run goes on, but is no longer the same bit for bit
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        state.step, state.seconds = int(header["step"]), float(header["seconds"])
        state.sums = json.loads(header["sums"])
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder}/{FILE} is damaged ({error}): choose another --run") from None


def load_method(
    folder: str | Path, device: torch.device, **files: str | None
) -> tuple[Method, dict[str, str]]:
    """The method of a run with its trained weights, in eval mode, and the checkpoint's header."""
    cfg = load_config(folder, **files)
    tensors, header = read(folder)
    method = get_method(cfg.backbone)(cfg, get_family(cfg.data.env))
    _fill(method, tensors, folder)
    method.model.to(device).eval()
    method.state_mean, method.state_std = tensors["states.mean"], tensors["states.std"]
    return method, header
