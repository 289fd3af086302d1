"""teaching.py: what tests of teachers and of their datasets share."""

from pathlib import Path

import numpy as np
import torch
from commands import contents

from config import Teachers
from families.point_robot import point_robot_move
from support import files
from teachers.rollouts import make_part

LONG = 400  # seconds until a test gives up, on a machine that does other things too


def alive():
    """Nobody asks to stop."""


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in parts), text


def teachers(**given) -> Teachers:
    """Settings of teachers by their names without `teacher_`."""
    return Teachers(**{f"teacher_{name}": value for name, value in given.items()})


def made(part):
    make_part(part, alive)
    with np.load(part.path) as file:
        return dict(file)


def rows_of(array):
    return {row.tobytes() for row in array.reshape(-1, array.shape[-1])}


def check_point_robot(goal, states, actions, rewards):
    """Stored steps of Point-Robot (E, 20, ...): each state is the one before, moved.

    A reward is minus the distance of the place it leads to.
    """
    after = point_robot_move(np.asarray(states, float), np.asarray(actions, float))
    assert (np.abs(states[:, 0]) <= 0.1).all() and len(
        np.unique(np.asarray(states[:, 0]), axis=0)
    ) == len(states)
    np.testing.assert_allclose(states[:, 1:], after[:, :-1], atol=1e-6)
    np.testing.assert_allclose(rewards, -np.linalg.norm(after - goal, axis=-1), atol=1e-6)


def written(folder, part=""):
    """Bytes and time of all files with `part` in their names, locks aside."""
    return {
        name: state
        for name, state in contents(folder).items()
        if part in name and not name.endswith(".lock")
    }


def unchanged(folder, before):
    """Files of `before` were neither written anew nor removed."""
    after = written(folder)
    assert before and {name: after.get(name) for name in before} == before


def flip(path, place=0.5):
    """Another byte at a share of the file."""
    data = bytearray(path.read_bytes())
    data[min(len(data) - 1, int(place * len(data)))] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "shorter": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "flipped number": lambda path: flip(path, 0.8),
    "flipped header": lambda path: flip(path, 0.002),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "no policies": lambda path: files.save_tensors(
        path, {"w0": torch.zeros(3, 2, 2)}, {"kind": "sac-state"}
    ),
}
