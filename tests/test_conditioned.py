"""One teacher for all tasks: folding, relabelling, and that held-out tasks are never played.

Run: pytest tests/test_conditioned.py
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import at_home
from teacher_files import Stop, contents, stopping
from test_sac_on_disk import GOALS, SMALL, Watched

from collect import collect, dataset_folder
from config import Data, Teachers
from data import load_dataset
from envs import Family, make_batch, sample_tasks
from families.locomotion import CHEETAH_VEL
from families.point_robot import POINT_ROBOT
from teachers.conditioned import ConditionedSAC, together
from teachers.ppo import PPOConfig
from teachers.rollouts import Behaviour, Policies, load_policies, make_part, parts_of
from teachers.sac import Replay, SACConfig, mlp, separate, train_sac
from teachers.teachers import groups_of, teachers_folder, train_policies

pytestmark = pytest.mark.usefixtures("one_thread")

DS, DA, DT = 3, 2, 2
TASKS = [[0.5, 1.0], [-1.0, 3.0], [2.0, 0.0], [7.0, -7.0]]  # the last is held out
SEED = (3, 0)


UNITS = ((0.5, -1.0, 3.0), (0.1, 2.0, 1.0))


def agent(reward=None, tasks=TASKS, batch=400, units=None) -> ConditionedSAC:
    cfg = replace(SMALL, batch=batch)
    family = replace(POINT_ROBOT, state_dim=DS, action_dim=DA, reward=reward, state_units=units)
    return ConditionedSAC(torch.tensor(tasks), 3, family, cfg, seed=1)


# ------------------------------------------------------------------------------------------ folding
@pytest.mark.parametrize("units", [None, UNITS])
def test_folded_policies_are_the_conditioned_one(units):
    """For every task, also the one that is not played, at states of its own."""
    one, states = agent(units=units), torch.randn(4, 5, DS)
    trained = torch.tensor(TASKS)[:3]
    coded = (torch.tensor(TASKS) - trained.mean(0)) / trained.std(0, correction=0)
    centre, unit = torch.tensor(units or ((0.0,) * DS, (1.0,) * DS))
    reading = torch.cat([(states - centre) / unit, coded[:, None].expand(-1, 5, -1)], -1)
    want = torch.stack([mlp(one.actor, rows[None])[0] for rows in reading])[..., :DA].tanh()
    policies = one.policies()
    assert policies["w0"].shape == (4, DS, SMALL.hidden)
    got = Policies("sac", policies).act(states)
    torch.testing.assert_close(got, want)
    assert (
        got[0] - Policies("sac", {k: v[1:2] for k, v in policies.items()}).act(states[:1])
    ).any()


def test_networks_read_states_in_the_familys_units(monkeypatch):
    """In play as in updates, of both states."""
    plain, one = agent(), agent(units=UNITS)
    for before, after in zip(
        learned(plain, filled(more=False), monkeypatch),
        learned(one, filled(more=False), monkeypatch),
        strict=True,
    ):
        if before.shape[-1] == DS + DT:
            centre, unit = torch.tensor(UNITS)
            before = torch.cat([(before[..., :DS] - centre) / unit, before[..., DS:]], -1)
        torch.testing.assert_close(after, before)
    states, rngs = torch.randn(3, DS), [torch.Generator().manual_seed(0) for _ in range(2)]
    want = plain.act((states - torch.tensor(UNITS[0])) / torch.tensor(UNITS[1]), rngs[0])
    torch.testing.assert_close(one.act(states, rngs[1]), want)


def test_a_number_that_never_varies_is_no_division_by_zero():
    """Nor a code of a hundred thousand for a held-out task in which it is another."""
    one = agent(tasks=[[0.5, 1.0], [-1.0, 1.0], [2.0, 1.0], [0.0, 2.5]])
    assert one.coded[:, 1].tolist() == [0, 0, 0, 1.5] and abs(one.coded[:, 0]).max() < 2


def test_many_numbers_of_a_task_do_not_drown_the_state():
    """Four numbers or fewer count as they are, 64 together as much as four."""
    rng = torch.Generator().manual_seed(0)
    for numbers, scale in ((1, 1.0), (4, 1.0), (64, 0.25)):
        one = agent(tasks=torch.randn(4, numbers, generator=rng).tolist())
        spread = one.coded[:3].std(0, correction=0)  # over the tasks that are played
        torch.testing.assert_close(spread, torch.full((numbers,), scale))


def test_a_family_that_knows_how_demonstrates_the_warm_up(tmp_path):
    """Noisier from task to task, the first exactly, none held out; then the agent acts."""
    asked, done = [], []

    def demonstrate(states, tasks):
        asked.append(tasks)
        return np.full((len(states), 2), 0.25, np.float32)

    goals = [*GOALS, [0.1, 0.2], [0.3, 0.3]]  # the last is held out
    batch = make_batch("point-robot", goals[:3])
    batch.family = replace(POINT_ROBOT, demonstrate=demonstrate)
    step = batch.step
    batch.step = lambda actions: done.append(actions) or step(actions)
    build = partial(together, tasks=goals)
    train_sac(batch, replace(SMALL, steps=60, save_every=20), SEED, tmp_path, build=build)
    assert len(asked) == SMALL.warmup and len(done) == 61  # and one that asks for its shape
    assert all(np.array_equal(tasks, np.float32(goals[:3])) for tasks in asked)
    warm, own = np.array(done[1 : SMALL.warmup + 1]), np.array(done[SMALL.warmup + 1 :])
    assert (warm[:, 0] == 0.25).all() and (own[:, 0] != 0.25).all()
    for task, deviation in ((1, 0.25), (2, 0.5)):
        assert abs(warm[:, task].std() - deviation) < 0.3 * deviation
    assert abs(warm).max() <= 1


# -------------------------------------------------------------------------------------- relabelling
def filled(more=True, steps=50) -> Replay:
    """Steps that tell where they are from: states (task, step, 0), outcome (task, step)."""
    replay = Replay(3, 100, DS, DA, **({"outcome": (2,)} if more else {}))
    task = torch.arange(3.0)
    for step in range(steps):
        marks = torch.stack([task, torch.full((3,), float(step))], 1)
        state = torch.cat([marks, torch.zeros(3, 1)], 1)
        rest = [marks] if more else []
        replay.add(state, marks, task + 100 * step, state + 0.5, *rest)
    return replay


def learned(one: ConditionedSAC, replay: Replay, monkeypatch, seed=0) -> list:
    """What `update` is given."""
    given = []
    monkeypatch.setattr(one, "update", lambda *sample: given.extend(sample))
    one.learn(replay, torch.Generator().manual_seed(seed))
    return given


def test_half_of_a_sample_is_relabelled(monkeypatch):
    """Each row reads a task and has that task's reward for its own step."""

    def reward(outcome, tasks):
        return 1000 * outcome[..., 0] + outcome[..., 1] + 10 * tasks[..., 0]

    one = agent(reward)
    s, a, r, s2, noise = learned(one, filled(), monkeypatch)
    assert s.shape == s2.shape == (1, 400, DS + DT) and noise.shape == (2, 1, 400, DA)
    own = 0
    for i in range(400):
        played, step = int(s[0, i, 0]), s[0, i, 1]
        (task,) = [k for k in range(3) if torch.equal(one.coded[k], s[0, i, DS:])]
        own += task == played
        assert r[0, i] == 1000 * played + step + 10 * TASKS[task][0]
        assert torch.equal(s2[0, i, DS:], s[0, i, DS:])
        assert torch.equal(s2[0, i, :DS], s[0, i, :DS] + 0.5) and a[0, i, 1] == step
    # half stays, and of the other half a third is drawn its own task: 2/3 of 400
    assert abs(own - 400 * 2 / 3) < 4 * (400 * 2 / 9) ** 0.5


def test_a_lesson_is_paid_in_place_of_the_reward(monkeypatch):
    """To the teacher alone: what the environment pays, which a dataset keeps, is the reward."""
    batch = make_batch("point-robot", GOALS)
    batch.family = replace(POINT_ROBOT, lesson=lambda outcome, tasks: 0 * outcome[..., 0] + 7.0)
    one, replay = together(batch, SMALL, 0, "cpu", GOALS)
    train_step = batch.step(np.zeros((2, 2), np.float32))
    assert (train_step[1] < 0).all()
    states = torch.zeros(2, 2)
    for _ in range(20):
        rewards = torch.from_numpy(train_step[1])
        replay.add(states, states, rewards, states, torch.from_numpy(batch.outcome))
    assert (learned(one, replay, monkeypatch)[2] == 7).all()


def test_without_a_reward_every_step_teaches_its_own_task(monkeypatch):
    one = agent()
    s, _, r, _, _ = learned(one, filled(more=False), monkeypatch)
    played = s[0, :, 0].long()
    assert torch.equal(s[0, :, DS:], one.coded[played])
    assert torch.equal(r[0], played + 100 * s[0, :, 1]) and len(played.unique()) == 3


@pytest.mark.parametrize("family", [POINT_ROBOT, CHEETAH_VEL], ids=lambda family: family.name)
def test_a_step_earns_in_another_task_what_the_family_says(family: Family):
    """The same actions from the same starts, played in each task: `reward` of one's outcomes."""
    tasks, rng = sample_tasks(family.name, 4, np.random.default_rng(0)), np.random.default_rng(1)
    actions = rng.uniform(-1.5, 1.5, (5, family.action_dim))  # beyond the bounds too
    paid, outcomes = [], []
    for task in tasks:
        batch = make_batch(family.name, [task], seed=7)
        batch.reset()
        for action in actions:
            paid.append(batch.step(action[None])[1][0])
            outcomes.append(batch.outcome[0].copy())
    outcomes = np.stack(outcomes[:5])  # of the first task
    for i, task in enumerate(tasks):
        want = np.array(paid[5 * i : 5 * i + 5])
        for kind in (np.asarray, torch.tensor):
            numbers = kind(np.array([task] * 5, np.float32))
            got = np.asarray(family.reward(kind(outcomes), numbers))
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------- training
def train(folder, tasks, **options):
    def build(*given):
        return together(*given, tasks=tasks)

    train_sac(Watched(), SMALL, SEED, folder, build=build, **options)


def test_held_out_tasks_change_nothing_of_what_is_learnt(tmp_path):
    """Two goals are played; with others behind them the two get the same policies."""
    for name, held_out in (("a", [[0.1, 0.2]]), ("b", [[-9.0, 4.0], [1.0, 1.0]])):
        train(tmp_path / name, GOALS + held_out)
    for step in (40, 160):
        a, b = (load_policies(tmp_path / name, [step]) for name in "ab")
        assert len(a.tensors["w0"]) == 3 and len(b.tensors["w0"]) == 4
        for name in a.tensors:
            assert torch.equal(a.tensors[name][:2], b.tensors[name][:2])
        assert not torch.equal(a.tensors["b0"][2], b.tensors["b0"][2])
        assert torch.equal(a.tensors["w0"][2], b.tensors["w0"][2])  # a task is a bias


@pytest.mark.parametrize("at", [60, 120])
def test_continued_run_is_the_uninterrupted_one(tmp_path, at):
    train(tmp_path / "whole", GOALS)
    with pytest.raises(Stop):
        train(tmp_path / "run", GOALS, report=stopping(at, []), keep_seconds=0)
    train(tmp_path / "run", GOALS)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_learns_all_goals_and_one_it_never_played(tmp_path):
    """Eight goals on a circle, and one between two of them: nearer than standing still."""
    angles = torch.arange(8) * torch.pi / 4
    goals = torch.stack([angles.cos(), angles.sin()], 1).mul(0.8).tolist()
    between = [[0.8 * float(np.cos(0.39)), 0.8 * float(np.sin(0.39))]]
    batch = make_batch("point-robot", goals)
    cfg = replace(SMALL, steps=1000, save_every=1000, hidden=32, batch=128, alpha=0.02, lr=3e-3)
    train_sac(
        batch, cfg, SEED, tmp_path, build=lambda *given: together(*given, tasks=goals + between)
    )
    policies = load_policies(tmp_path, [1000])
    played = make_batch("point-robot", goals + between, seed=1)
    states, total = played.reset(), 0.0
    for _ in range(20):
        actions = policies.act(torch.from_numpy(states)[:, None])[:, 0]
        states, rewards = played.step(actions.numpy())
        total = total + rewards
    # standing still costs 20 x 0.8 = 16, walking straight there and staying about 3.3
    assert (total > -6).all(), total


# ---------------------------------------------------------------------------------------- siblings
def test_siblings_of_one_goal_are_twins(tmp_path):
    """Equal tasks from equal starts stay equal, in a stack as in groups of their own."""

    class Still(Watched):  # all start in the same place: a sibling's starts are its own
        def reset(self):
            super().reset()
            self.places = np.zeros_like(self.places)
            self.states = self.places.astype(np.float32)
            return self.states

    for siblings in (True, False):
        batch, folder = Still([GOALS[0]] * 2), tmp_path / str(siblings)
        train_sac(batch, SMALL, SEED, folder, build=partial(separate, siblings=siblings))
        weights = load_policies(folder, [160]).tensors
        same = all(torch.allclose(w[0], w[1], atol=1e-5) for w in weights.values())
        assert same == siblings
    groups = groups_of(
        "point-robot", Teachers(teacher="siblings", teacher_group=1), GOALS, tmp_path
    )
    assert {group.seed for group in groups} == {(0, 0)}


# ------------------------------------------------------------- in the place of any other teachers
@pytest.fixture(scope="module")
def collected(point_config, tmp_path_factory):
    cfg = replace(
        point_config,
        data=replace(
            point_config.data, recipe="explore", datasets=str(tmp_path_factory.mktemp("one"))
        ),
        teachers=replace(point_config.teachers, teacher="one"),
    )
    with at_home():
        collect(cfg, quiet=True)
    return cfg


def test_a_dataset_of_one_teacher_looks_like_any_other(collected, point_config):
    """No observation holds the task; the held-out tasks have references; one group of all tasks."""
    folder = dataset_folder(collected)
    data = load_dataset(folder)
    assert data.states.shape[-1] == POINT_ROBOT.state_dim == data.query_states.shape[-1]
    assert len(data.meta["reference"]["test"]["teacher"]) == 2
    (group,) = (dataset_folder(collected).parent / "teachers").glob("*/group-*")
    assert len(load_policies(group, [400]).tensors["w0"]) == 7
    assert folder.name != dataset_folder(point_config).name
    # a label is the mean action of the task's folded policy at that state
    step = data.meta["behaviour"][2]
    policies = [load_policies(group, [s], 2).act(data.query_states[2][None])[0] for s in step]
    assert min((actions - data.query_actions[2]).abs().max() for actions in policies) < 1e-5


def test_which_tasks_are_held_out_is_part_of_the_folders_name(tmp_path):
    settings, tasks = Teachers(teacher="one"), [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]
    names = {teachers_folder(tmp_path, "point-robot", settings, tasks, n).name for n in (1, 2)}
    assert len(names) == 2 and all("-one-" in name for name in names)


def test_ppos_families_have_one_teacher_too_and_it_is_sac(tmp_path):
    """What only SAC has may then be set."""
    tasks = [[0.0, 0.8, 0.2], [0.1, 0.8, 0.2], [0.1, 0.9, 0.2]]
    settings = Teachers(teacher="one", teacher_alpha=0.1)
    (group,) = groups_of("reach", settings, tasks, tmp_path, train=2)
    assert isinstance(group.trained_by, SACConfig) and group.trained_by.alpha == 0.1
    assert (group.tasks, group.played, group.trained_by.save_every % 100) == (tasks, 2, 0)
    (group,) = groups_of("reach", Teachers(teacher="siblings"), tasks, tmp_path)
    assert isinstance(group.trained_by, PPOConfig) and group.teacher == "siblings"
    with pytest.raises(ValueError, match="trained by PPO, which has no --teacher-alpha"):
        groups_of("reach", Teachers(teacher_alpha=0.1), tasks, tmp_path)


def test_one_teacher_of_reach_labels_with_its_mean_action(tmp_path):
    """PPO's labels are the behaviour's own actions; SAC's are not, also where PPO is the rule."""
    tasks, path = [[0.0, 0.8, 0.2], [0.1, 0.9, 0.1]], tmp_path / "task-000.npz"
    settings = Teachers(
        teacher="one", teacher_steps=200, teacher_save_every=100, teacher_warmup=100,
        teacher_hidden=8, teacher_batch=8,
    )  # fmt: skip
    (group,) = groups_of("reach", settings, tasks, tmp_path)
    train_policies(group, lambda: None)
    behaviour = Behaviour(group.folder, 1, [100, 200], 200)
    data = Data(env="reach", data_episodes=5, data_queries=40)
    (part,) = parts_of(data, tasks[1:], [behaviour], [path])
    make_part(part, lambda: None)
    with np.load(path) as file:
        states, labels = torch.from_numpy(file["query_states"]), file["query_actions"]
    best = load_policies(tmp_path / "group-000", [200], 1)
    np.testing.assert_allclose(best.act(states[None])[0], labels, atol=1e-6)
