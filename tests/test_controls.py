"""The family of experiments/controls.py: what a step does, what its teacher and its data are."""

from dataclasses import replace

import numpy as np
import pytest

from collect import collect
from config import Collection, Data
from envs import check_tasks, get_family, make_batch, optimal_returns, split_tasks
from experiments import controls

ENV = "experiments/controls.py"


def test_the_eight_controls_differ_and_turn_the_square_of_actions_into_itself():
    assert len({tuple(c.flatten()) for c in controls.CONTROLS}) == 8
    for control in controls.CONTROLS:
        assert (np.abs(control).sum(0) == 1).all() and (np.abs(control).sum(1) == 1).all()
        assert np.array_equal(control @ control.T, np.eye(2))


def test_a_step_moves_as_its_control_says_and_pays_the_distance():
    tasks = [[0.5, -0.25, which] for which in range(8)]
    batch = make_batch(ENV, tasks, seed=3)
    places = batch.reset().astype(float)
    actions = np.array([[0.6, -3.0]] * 8, np.float32)  # the second is clipped to -1
    states, rewards = batch.step(actions)
    for i, control in enumerate(controls.CONTROLS):
        move = 0.1 * np.array([0.6, -1.0]) @ control
        assert states[i] == pytest.approx(places[i] + move, abs=1e-6)
        distance = np.hypot(*(places[i] + move - [0.5, -0.25]))
        assert rewards[i] == pytest.approx(-distance, abs=1e-6)


def test_the_teacher_earns_the_optimum_and_one_of_other_controls_does_not():
    tasks = split_tasks(ENV)[1] * 20
    wrong = [[x, y, (which + 3) % 8] for x, y, which in tasks]
    totals = []
    for knows in (tasks, wrong):
        batch = make_batch(ENV, tasks, seed=0)
        states, total = batch.reset(), 0.0
        for _ in range(batch.family.horizon):
            states, rewards = batch.step(controls.teacher(states, np.asarray(knows)))
            total += rewards.mean()
        totals.append(total)
    optimum = optimal_returns(ENV, tasks).mean()
    assert totals[0] == pytest.approx(optimum, abs=0.05)
    assert totals[1] < optimum - 5


def test_tasks_have_each_control_equally_often_and_data_are_labelled_by_the_own_teacher():
    train, _ = split_tasks(ENV)
    which = np.bincount(np.asarray(train)[:, 2].astype(int), minlength=8)
    assert (which == 50).all()
    data = Data(ENV, data_episodes=40, data_queries=30)
    arrays = get_family(ENV).collect_task(data, train[:20], 7)
    again = get_family(ENV).collect_task(data, train[:20], 7)
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)
    goal, control = np.array(train[7][:2]), controls.CONTROLS[int(train[7][2])]
    for state, label in zip(arrays["query_states"], arrays["query_actions"], strict=True):
        # the action whose move is the way to the goal
        assert label @ control == pytest.approx(np.clip((goal - state) / 0.1, -1, 1), abs=1e-5)
    states, actions, rewards = (arrays[name] for name in ("states", "actions", "rewards"))
    moved = states[:, :-1] + 0.1 * np.clip(actions[:, :-1], -1, 1) @ control
    assert moved == pytest.approx(states[:, 1:], abs=1e-5)  # whoever played: this task's controls
    distance = np.linalg.norm(states[:, 1:] - goal, axis=-1)
    assert rewards[:, :-1] == pytest.approx(-distance, abs=1e-5)


def test_a_quarter_of_the_episodes_is_played_by_the_own_teacher():
    """One goal to the upper right, all others to the lower left: full actions tell who plays."""
    tasks = [[1.0, 1.0, 0], *[[-1.0, -1.0, 0]] * 39]
    data = Data(ENV, data_episodes=3000, data_queries=1)
    first = get_family(ENV).collect_task(data, tasks, 0)["actions"][:, :6]
    own, others = ((first == full).all(-1).any(1) for full in (1, -1))
    assert not (own & others).any() and (own | others).mean() > 0.8  # the rest is noise alone
    # who else plays is drawn from all tasks, of which one in 40 is this one
    assert own.sum() / (own | others).sum() == pytest.approx(1 / 4 + 3 / 4 / 40, abs=0.035)


def test_a_task_has_a_whole_number_of_a_control():
    assert check_tasks(ENV, [[0.5, 1, 7], [0, 0, 2.0]]) == [[0.5, 1.0, 7.0], [0.0, 0.0, 2.0]]
    for bad, message in (
        ([0.5, 1, 2.5], "the third number of a task of controls must be whole, not 2.5"),
        ([0.5, 1, 8], "a task of controls is 3 numbers"),
        ([0.5, 1], "a task of controls is 3 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            check_tasks(ENV, [bad])


@pytest.mark.parametrize("other", [{"quality": "medium"}, {"recipe": "explore"}])
def test_qualities_and_recipes_that_there_are_not_are_refused(tmp_path, other):
    data = Data(ENV, train_tasks=2, test_tasks=1, data_episodes=5, datasets=str(tmp_path))
    with pytest.raises(ValueError, match="leave out --quality and --recipe") as error:
        collect(Collection(replace(data, **other)), quiet=True)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.npz"))


def test_fewer_controls_are_another_split_of_the_same_size():
    tasks = controls.fewer(2)
    assert [len(tasks[name]) for name in ("train", "test")] == [400, 40]
    for split in tasks.values():
        assert (np.bincount(np.asarray(split)[:, 2].astype(int)) == len(split) // 2).all()
    assert not {tuple(task) for task in tasks["train"]} & {tuple(task) for task in tasks["test"]}
