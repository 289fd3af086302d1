"""checkpoint.py: what a run keeps on disk: `config.json` and `checkpoint.safetensors`.

in : a training `State`         out: one file, written to a temporary name and renamed
Nothing here is a pickle. The file holds the weights (momentum router included), AdamW's moments, the
random streams and, as JSON in its header, the step and the seconds spent, so that a resumed run is the
uninterrupted one bit for bit. evaluate.py reads its weights alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import Config
from envs import check_tasks
from models import T2MIR
from support.files import write_atomically

FILE = "checkpoint.safetensors"
FORMAT = "1"


@dataclass
class State:
    """Everything that training changes."""

    model: T2MIR
    optimizer: torch.optim.Optimizer
    rng: torch.Generator  # of the batches
    state_mean: Tensor
    state_std: Tensor
    step: int = 0
    seconds: float = 0.0  # of training so far, over all its parts
    sums: dict[str, float] = field(
        default_factory=dict
    )  # logged terms since the last row of train.csv


def write_config(folder: Path, cfg: Config, tasks: dict) -> None:
    """config.json: all settings, the tasks trained on and held out, and reference returns where data have them."""
    text = json.dumps({"format": FORMAT, **asdict(cfg), "task_split": tasks}, indent=1)
    write_atomically(folder / "config.json", lambda path: path.write_text(text))


def read_config(folder: str | Path) -> dict:
    """The settings of a run. Raises ValueError with one line for a folder that is not one."""
    path = Path(folder) / "config.json"
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{folder} is not a t2mir run: config.json: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a t2mir run of format {FORMAT}")
    return settings


def load_config(folder: str | Path) -> Config:
    settings = read_config(folder)
    known = {f.name for f in fields(Config)}
    try:
        return Config(**{k: v for k, v in settings.items() if k in known}).check()
    except TypeError as error:
        raise ValueError(f"{folder}/config.json is damaged ({error})") from None


def read_tasks(folder: str | Path) -> dict[str, list]:
    """{"train": [...], "test": [...]} of a run. Raises ValueError when they are missing or do not fit."""
    settings = read_config(folder)
    split = settings.get("task_split")
    if not isinstance(split, dict) or not all(split.get(k) for k in ("train", "test")):
        raise ValueError(f"{folder}/config.json names no tasks")
    return {k: check_tasks(settings["env"], split[k]) for k in ("train", "test")}


def read_reference(folder: str | Path, split: str) -> dict[str, list[float]] | None:
    """{"random": ..., "teacher": ...} of each task of a split, if the run's dataset knew them."""
    known = read_config(folder)["task_split"].get("reference")
    known = known.get(split) if isinstance(known, dict) else None
    return (
        known if isinstance(known, dict) and known.get("random") and known.get("teacher") else None
    )


def save(folder: Path, state: State) -> None:
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": v for name, v in moments.items()}
    tensors |= {"random.torch": torch.get_rng_state(), "random.batches": state.rng.get_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors |= {"states.mean": state.state_mean, "states.std": state.state_std}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    about = {
        "t2mir": FORMAT,
        "step": str(state.step),
        "seconds": repr(state.seconds),
        "sums": json.dumps(state.sums),
    }
    write_atomically(folder / FILE, lambda path: save_file(tensors, path, metadata=about))


def read(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header. Raises ValueError with one line for a missing, damaged or foreign file."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {FILE}: train it first, or continue its run with --resume"
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]})") from None
    if about.get("t2mir") != FORMAT:
        raise ValueError(f"{path} is not a t2mir checkpoint of format {FORMAT}")
    return tensors, about


def _weights(tensors: dict[str, Tensor], model: T2MIR, folder) -> None:
    part = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    try:
        model.load_state_dict(part)
    except RuntimeError as error:
        raise ValueError(
            f"{folder}/{FILE} does not fit these settings ({str(error).splitlines()[-1].strip()})"
        ) from None


def load_weights(folder: str | Path, model: T2MIR) -> None:
    """The weights of another run into `model`. Raises ValueError with one line when they do not fit."""
    tensors, _ = read(folder)
    _weights(tensors, model, folder)


def load(folder: str | Path, state: State) -> None:
    """Continue: put everything of a checkpoint into `state` and the random streams of torch."""
    tensors, about = read(folder)
    _weights(tensors, state.model, folder)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    torch.set_rng_state(tensors["random.torch"])
    state.rng.set_state(tensors["random.batches"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    state.step, state.seconds = int(about["step"]), float(about["seconds"])
    state.sums = json.loads(about["sums"])


def load_model(
    folder: str | Path, device
) -> tuple[T2MIR, Config, dict[str, str], tuple[Tensor, Tensor]]:
    """The policy of a run in eval mode, its settings, the header, and the states' mean and deviation."""
    cfg = load_config(folder)
    tensors, about = read(folder)
    model = T2MIR(cfg.model())
    _weights(tensors, model, folder)
    return model.to(device).eval(), cfg, about, (tensors["states.mean"], tensors["states.std"])
