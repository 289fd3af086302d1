"""stored.py: teachers on disk: their policies, and the state that their training continues from.

in : stacked weights by name, settings         out: whole files
     a path                                    out: what was written there, or Damaged
Read when a file surprises you; nothing of the paper is here.

    step-0000002000.safetensors   the policies of a group of tasks after so many steps, stacked:
                                  w0, b0, w1, ... (n, in, out), (n, 1, out); of ppo log_std too
    state.safetensors             networks, moments of Adam, SAC's replay; gone when all is done
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import Json
from torch import Tensor

from config import Count
from support.checked import validated_strings
from support.files import Damaged, load_tensors, save_tensors

STATE = "state.safetensors"  # what training continues from; deleted once the policies are measured
FORMAT = "2"  # of the files of policies and states
WEIGHTS = ("w0", "b0", "w1", "b1", "w2", "b2")  # a policy's, by their names in a file
KINDS = ("sac", "ppo", "ppo-discrete")  # how a policy acts


def policy_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:010d}.safetensors"


def save_policies(folder: Path, step: int, kind: str, weights: dict[str, Tensor]) -> None:
    """The policies alone, stacked over tasks; `kind` says how they act (rollouts.Policies)."""
    header = {"t2mir": FORMAT, "kind": kind, "step": str(step)}
    save_tensors(policy_file(folder, step), weights, header)


def read_policies(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The kind and all weights in one file. Raises Damaged with one line for anything else."""
    tensors, header = load_tensors(path)
    kind, shapes = header.get("kind", ""), {name: tuple(t.shape) for name, t in tensors.items()}
    wanted = {*WEIGHTS, "log_std"} if kind == "ppo" else set(WEIGHTS)
    if header.get("t2mir") != FORMAT or kind not in KINDS or shapes.keys() != wanted:
        raise Damaged(f"{path} holds no policies of format {FORMAT}")
    # each layer reads what the one before gives, for the same number of tasks
    sizes = [shapes[f"w{i}"] for i in range(3)]
    for i, size in enumerate(sizes):
        follows = i == 0 or size[:2] == (sizes[0][0], sizes[i - 1][-1])
        if len(size) != 3 or not follows or shapes[f"b{i}"] != (size[0], 1, size[2]):
            raise Damaged(f"{path}: its layers do not fit one another")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise Damaged(f"{path} holds weights that are not finite")
    return kind, tensors


def save_state(
    folder: Path, kind: str, tensors: dict[str, Tensor], step: int, settings: dict
) -> None:
    """Everything that training continues from; of SAC's, the replay is most."""
    header = {"t2mir": FORMAT, "kind": kind, "step": str(step), "settings": json.dumps(settings)}
    save_tensors(folder / STATE, tensors, header)


class Loads(Protocol):
    """A part of a training: agents, a replay."""

    def load(self, tensors: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class StateHeader:
    """What state.safetensors says beside its tensors."""

    t2mir: str  # FORMAT
    kind: str
    step: Count
    settings: Json[dict[str, Any]]


def read_state(folder: Path, kind: str, settings: dict) -> tuple[dict[str, Tensor], int]:
    """Tensors and step of state.safetensors; none and 0 if there is no such file.

    Raises ValueError with one line for a damaged or foreign file and for other settings.
    """
    path, again = folder / STATE, f"delete {folder} to train its tasks anew"
    if not path.exists():
        return {}, 0
    try:
        tensors, about = load_tensors(path)
    except Damaged as error:
        raise Damaged(f"{error}: {again}") from None
    if (about.get("t2mir"), about.get("kind")) != (FORMAT, kind):
        raise ValueError(f"{path} is no {kind} of format {FORMAT}: {again}")
    header = validated_strings(StateHeader, about, f"{path}: ")
    other = ", ".join(name for name in settings if header.settings.get(name) != settings[name])
    if other:
        raise ValueError(f"{path} is of other settings ({other}): {again}")
    if header.step > settings["steps"] + settings.get("n_steps", 0):
        raise ValueError(f"{path}: step {header.step} of {settings['steps']}: {again}")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{path} holds numbers that are not finite: {again}")
    return tensors, header.step


def resume(folder: Path, kind: str, settings: dict, *parts: Loads) -> int:
    """Load what training continues from into its parts; the step it is of, 0 if there is none.

    Raises ValueError with one line for a state that is damaged, of other settings, or of sizes that
    are not the parts'.
    """
    tensors, step = read_state(folder, kind, settings)
    try:
        for part in parts if tensors else ():
            part.load(tensors)
    except (KeyError, RuntimeError, ValueError):  # names, shapes, moments that do not fit
        raise ValueError(
            f"{folder / STATE} is of another environment: delete {folder} to train its tasks anew"
        ) from None
    return step
