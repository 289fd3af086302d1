"""How alike neighbouring tasks' teachers act, against slow loops and policies with known answers.

Run: pytest tests/test_agreement.py
"""

import numpy as np
import pytest
import torch
from commands import ROOT, run

from config import Collection, Data, Teachers, Work
from teachers.agreement import agreement, differences, measure, neighbours
from teachers.rollouts import Policies
from teachers.sac import init_mlp
from teachers.stored import WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = [[0.0, 0.0], [1.0, 0.0], [0.1, 0.0], [0.9, 5.0]]


def stack(n: int, same=False) -> Policies:
    """n policies of Point-Robot with random weights."""
    weights = init_mlp(1 if same else n, (2, 8, 8, 4), torch.Generator().manual_seed(0))
    tensors = [4 * (weight.expand(n, -1, -1) if same else weight) for weight in weights]
    return Policies("sac", dict(zip(WEIGHTS, tensors, strict=True)))


def test_neighbours_are_the_nearest_in_units_of_the_spread():
    """The second number spreads five times as far, and counts no more for it."""
    found = neighbours(np.array(TASKS))
    spread = np.std(TASKS, 0)
    for i, order in enumerate(found):
        gaps = [np.linalg.norm((np.array(TASKS[i]) - TASKS[j]) / spread) for j in order]
        assert gaps == sorted(gaps) and sorted([i, *order]) == [0, 1, 2, 3]
    assert found[0, 0] == 2 and found[2, 0] == 0
    assert sorted(neighbours(np.ones((3, 2)))[1]) == [0, 2]  # all alike: no division by zero


def test_differences_are_those_of_a_slow_loop():
    policies, inputs = stack(3), torch.randn(3, 5, 2)
    found = differences(policies, inputs)
    for i in range(3):
        for j in range(3):
            squares = []
            for states in (inputs[i], inputs[j]):
                pair = [policies.of(k).act(states[None])[0].numpy() for k in (i, j)]
                squares.append(((pair[0] - pair[1]) ** 2).mean())
            assert found[i, j] == pytest.approx(np.mean(squares) ** 0.5, abs=1e-6)


def test_equal_teachers_do_not_differ_and_others_do():
    alike = agreement("point-robot", TASKS, stack(4, same=True), -9.0, seed=0)
    assert alike.near == alike.far == 0 and alike.random == -9.0
    assert alike.between == pytest.approx(alike.own, abs=1e-5)
    other = agreement("point-robot", TASKS, stack(4), -9.0, seed=0)
    assert min(other.near, other.far) > 0.05 and abs(other.between - other.own) > 0.05


def test_the_command_trains_what_it_compares(tmp_path):
    teachers = Teachers(
        teacher="one", teacher_steps=60, teacher_save_every=20, teacher_warmup=20, teacher_hidden=8
    )
    data = Data(env="point-robot", train_tasks=3, test_tasks=1, datasets=str(tmp_path))
    cfg = Collection(data, teachers, Work(workers=1, teacher_device="auto"))
    found = measure(cfg)
    assert found == measure(cfg) and found.near > 0  # the second time they are read
    assert len(list(tmp_path.glob("teachers/*/group-*/step-*"))) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--env point-robot --train-tasks 2", "2 tasks: neighbours need three or more"),
        ("--env darkroom", "darkroom's teacher is a rule"),
        (f"--env {ROOT}/tests/forks/chain.py", "chain.py's actions are discrete"),
        ("--env point-robot --export-minari x", "--export-minari is for collect.py"),
    ],
)
def test_what_cannot_be_compared_is_one_line_before_any_training(
    tmp_path, line, message, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    ended = run("teachers/agreement.py", [*line.split(), "--preset", "cpu"], monkeypatch, capsys)
    assert message in ended.error and not list(tmp_path.iterdir())
