"""checkpoint.py: what a run keeps on disk: `config.json` and `checkpoint.safetensors`.

in : a training `State`         out: one file, written to a temporary name and renamed
Nothing here is a pickle. The file holds the weights (momentum router included), the optimisers'
moments, the random streams and, in its header, the step, the seconds spent and a checksum of the
rows of train.csv so far, so that a resumed run is the uninterrupted one bit for bit. evaluate.py
reads its weights alone. The header also repeats config.json: a damaged one is read from there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Json
from torch import Tensor

from config import Config, CountOrZero, Finite, NotNegative
from data import Reference, check_reference
from envs import TaskFile, check_split, get_family
from methods import Method, get_method
from support.checked import validated, validated_strings
from support.files import (
    Damaged,
    load_json,
    load_optimizer,
    load_tensors,
    optimizer_tensors,
    save_json,
    save_tensors,
)
from support.settings import from_plain

FILE = "checkpoint.safetensors"
FORMAT = "3"  # of config.json and the checkpoint; raised when their meaning changes


@dataclass
class State:
    """Everything that training changes: with all of it back, a run goes on as if never stopped."""

    method: Method  # its model and its optimisers
    rng: torch.Generator  # of the batches
    step: int = 0
    seconds: float = 0.0  # of training so far, over all its parts
    sums: dict[str, float] = field(default_factory=dict)  # logged since the last row of train.csv
    rows: str = ""  # checksum of the rows of train.csv up to `step`
    run: dict[str, Any] = field(default_factory=dict)  # what config.json says


@dataclass(frozen=True)
class Header:
    """What checkpoint.safetensors says beside its tensors."""

    t2mir: str  # FORMAT
    step: CountOrZero
    seconds: NotNegative
    sums: Json[dict[str, Annotated[float, Finite]]]
    rows: str
    moments: Json[dict[str, CountOrZero]]  # of how many parameters each optimiser has them
    run: Json[dict[str, Any]]


# ------------------------------------------------------------------------------------- config.json
@dataclass(frozen=True)
class TaskSplit(TaskFile):
    """The tasks of a run, and what is known of them."""

    reference: Reference | None = None

    def tasks(self, which: Literal["test", "train"]) -> list:
        """Held-out tasks, or those trained on."""
        return self.test if which == "test" else self.train


def describe_run(cfg: Config, tasks: dict) -> dict[str, Any]:
    """All settings, the tasks trained on and held out, and their reference returns if known."""
    content = {"format": FORMAT, "settings": asdict(cfg), "task_split": tasks}
    return json.loads(json.dumps(content))  # as a file gives it back


def write_config(folder: Path, run: dict[str, Any]) -> None:
    save_json(folder / "config.json", run)


def read_run(folder: str | Path) -> dict[str, Any]:
    """config.json of a run. Raises ValueError with one line for a folder that is not one."""
    path = Path(folder) / "config.json"
    try:
        content = load_json(path, "t2mir run", FORMAT)
    except Damaged as error:
        if not path.exists():
            raise ValueError(f"{folder} is not a t2mir run: it has no config.json") from None
        content = _copy_of_config(folder, error)
    except ValueError as error:
        raise ValueError(f"{error}: train it anew") from None
    if not isinstance(content.get("settings"), dict):
        raise ValueError(f"{path} is damaged: it holds no settings")
    return content


def _copy_of_config(folder: str | Path, damage: Damaged) -> dict[str, Any]:
    """What the checkpoint knows of a damaged config.json; `damage` is raised where it does not."""
    try:
        content = read(folder)[1].run
    except ValueError:
        raise damage from None
    if content.get("format") != FORMAT:
        raise damage
    return content


def load_config(folder: str | Path, **files: str | None) -> Config:
    """A run's settings, checked; `files` as in `settings.from_plain`."""
    return from_plain(read_run(folder)["settings"], f"{folder}/config.json", **files)


def read_tasks(folder: str | Path, env: str) -> TaskSplit:
    """The tasks of a run. Raises ValueError with one line when they do not fit."""
    where = f"{folder}/config.json"
    split = validated(TaskSplit, read_run(folder).get("task_split"), f"{where}: ")
    train, test = check_split(env, split.train, split.test, where)
    check_reference(split.reference, {"train": len(train), "test": len(test)}, f"{where}: ")
    return TaskSplit(train, test, split.reference)


# ------------------------------------------------------------------------- checkpoint.safetensors
def save(folder: Path, state: State) -> None:
    """Write the checkpoint: the old one stays whole until the new one is (support/files.py)."""
    method, moments = state.method, {}
    # state_dict also has what no gradient moves: the key router (Eq. 8), `Center`'s statistics
    tensors = {f"model.{name}": value for name, value in method.model.state_dict().items()}
    for name, optimizer in method.optimizers.items():
        tensors |= optimizer_tensors(optimizer, f"optimizer.{name}")
        moments[name] = len(optimizer.state_dict()["state"])
    # noise and dropout come from torch's stream, batches from their own (`train_and_evaluate`)
    tensors |= {"random.torch": torch.get_rng_state(), "random.batches": state.rng.get_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    # without them the weights could not be played: they have learned to read states so normalised
    tensors |= {"states.mean": method.state_mean, "states.std": method.state_std}
    about = {
        "t2mir": FORMAT,
        "step": str(state.step),
        "seconds": repr(state.seconds),  # repr: the same float when it is read again
        "sums": json.dumps(state.sums),
        "rows": state.rows,
        "moments": json.dumps(moments),
        "run": json.dumps(_anywhere(state.run)),
    }
    save_tensors(folder / FILE, tensors, about)


def _anywhere(run: dict[str, Any]) -> dict[str, Any]:
    """config.json but for its own place: the same run gives the same bytes in any folder."""
    settings = run.get("settings", {})
    return {**run, "settings": {**settings, "run": {**settings.get("run", {}), "run": None}}}


def read(folder: str | Path) -> tuple[dict[str, Tensor], Header]:
    """All tensors and the header. Raises ValueError for a missing, damaged or foreign file."""
    path = Path(folder) / FILE
    if not path.exists():
        raise ValueError(
            f"{folder} has no {FILE}: train it first, or continue its run with --resume"
        )
    tensors, about = load_tensors(path)
    if about.get("t2mir") != FORMAT:
        raise ValueError(f"{path} is not a t2mir checkpoint of format {FORMAT}: train it anew")
    header = validated_strings(Header, about, f"{path}: ")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite: train it anew")
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
        size = (method.family.state_dim,)
        for name in ("states.mean", "states.std"):
            if name not in tensors or tuple(tensors[name].shape) != size:
                raise RuntimeError(f"{name} is not there, or of another shape")
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{folder}/{FILE} does not fit these settings ({reason})") from None


def load_weights(folder: str | Path, method: Method) -> None:
    """The weights of another run (--init) into a model. ValueError when they do not fit."""
    try:
        _fill(method, read(folder)[0], folder)
    except ValueError as error:
        raise ValueError(f"--init: {error}") from None


def load(folder: str | Path, state: State) -> None:
    """Continue: put everything of a checkpoint into `state` and the random streams of torch."""
    tensors, header = read(folder)
    method = state.method
    _fill(method, tensors, folder)
    try:
        if header.step > method.cfg.training.steps:
            raise ValueError(f"step {header.step} of {method.cfg.training.steps}")
        for name, optimizer in method.optimizers.items():
            found = load_optimizer(optimizer, f"optimizer.{name}", tensors)
            if found != header.moments.get(name):
                raise ValueError(f"{name} has moments of {found} parameters")
        torch.set_rng_state(tensors["random.torch"])
        state.rng.set_state(tensors["random.batches"])
        # saved on CUDA and continued without, a run goes on, but is no longer the same bit for bit
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder}/{FILE} is damaged ({error}): choose another --run") from None
    state.step, state.seconds, state.sums = header.step, header.seconds, dict(header.sums)
    state.rows = header.rows


def load_method(
    folder: str | Path, device: torch.device, **files: str | None
) -> tuple[Method, Header]:
    """The method of a run with its trained weights, in eval mode, and the checkpoint's header."""
    cfg = load_config(folder, **files)
    tensors, header = read(folder)
    method = get_method(cfg.backbone)(cfg, get_family(cfg.data.env))
    _fill(method, tensors, folder)
    method.model.to(device).eval()
    method.state_mean, method.state_std = tensors["states.mean"], tensors["states.std"]
    return method, header
