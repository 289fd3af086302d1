"""Teachers (App. D.2, Tables 2 and 3): settings, policies, levels, and the datasets they make.

The tiny Point-Robot dataset of conftest.py, whose teachers learn in seconds; constant policies,
whose actions tell who played; whole commands that are interrupted, killed, run beside each other or
meet damaged files. A discrete family, taught by PPO: test_discrete_teachers.py.
Run: pytest tests/test_teachers.py
"""

import json
import shutil
import signal
import time
from collections import Counter, namedtuple
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import at_home, changed, contents, flags, start
from scipy.stats import kstest

from collect import collect, dataset_folder, maximum, split_of
from config import Collection, Data, Teachers
from data import load_dataset, part_name
from envs import get_family, make_batch, random_returns, split_tasks
from families.point_robot import point_robot_move
from support import files
from support.files import Damaged
from support.user_file import code_of
from teachers import rollouts
from teachers import teachers as module
from teachers.ppo import PPOConfig
from teachers.rollouts import Policies, join, load_policies, make_part, parts_of, rollout
from teachers.sac import SACConfig
from teachers.stored import STATE, WEIGHTS, policy_file, save_policies
from teachers.teachers import (
    PAPER,
    Group,
    TrainedTeachers,
    algorithm,
    checkpoints,
    groups_of,
    load_levels,
    teachers_folder,
    train_group,
)

LONG = 400  # seconds until a test gives up, on a machine that does other things too


def alive():
    """Nobody asks to stop."""


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in parts), text


def teachers(**given) -> Teachers:
    """Settings of teachers by their names without `teacher_`."""
    return Teachers(**{f"teacher_{name}": value for name, value in given.items()})


def trained_by(env, **given):
    return algorithm(env, teachers(**given))


# ---------------------------------------------------------------------- settings (Tables 2 and 3)
TABLE_2 = {  # steps, warm-up, steps between checkpoints
    "point-robot": (2000, 100, 20),
    "cheetah-vel": (250_000, 2000, 10_000),
    "cheetah-vel-3cluster": (400_000, 2000, 10_000),
    "walker-param": (1_000_000, 2000, 10_000),
}


@pytest.mark.parametrize("env", TABLE_2)
def test_table_2_is_the_default_of_sac(env):
    found = trained_by(env)
    assert (
        type(found) is SACConfig and (found.steps, found.warmup, found.save_every) == TABLE_2[env]
    )
    assert (found.lr, found.tau, found.gamma, found.alpha) == (3e-4, 0.005, 0.99, 0.2)
    assert len(checkpoints(found)) == {"point-robot": 100, "cheetah-vel": 25}.get(
        env, found.steps // 10_000
    )


@pytest.mark.parametrize(("env", "steps"), [("reach", 400_000), ("push", 1_000_000)])
def test_table_3_is_the_default_of_ppo(env, steps):
    found = trained_by(env)
    assert type(found) is PPOConfig and found.steps == steps
    assert (found.n_steps, found.batch, found.epochs, found.lr, found.gamma) == (
        2048,
        64,
        10,
        3e-4,
        0.99,
    )


def test_settings_override_the_tables():
    given = {
        "steps": 400,
        "save_every": 200,
        "warmup": 7,
        "hidden": 16,
        "batch": 9,
        "lr": 0.01,
        "alpha": 0.3,
        "gamma": 0.9,
    }
    assert trained_by("cheetah-vel", **given) == replace(PAPER["cheetah-vel"], **given)
    assert trained_by("point-robot", steps=400).replay == 400  # it holds all of the training
    assert trained_by("cheetah-vel", steps=400, save_every=200, warmup=9).replay == 10_000
    given = {"steps": 5000, "save_every": 3000, "batch": 32, "lr": 0.01, "gamma": 0.9}
    assert trained_by("reach", **given) == replace(PAPER["reach"], **given)


def test_checkpoints_are_those_that_training_writes():
    assert checkpoints(trained_by("point-robot", steps=120, save_every=40)) == [40, 80, 120]
    assert checkpoints(trained_by("reach", steps=5000)) == [2048, 4096, 6144]  # whole rollouts
    assert checkpoints(trained_by("reach", steps=5000, save_every=3000)) == [4096, 6144]


@pytest.mark.parametrize(
    ("env", "given", "named"),
    [
        ("reach", {"hidden": 64}, "--teacher-hidden"),
        ("reach", {"warmup": 5}, "--teacher-warmup"),
        ("push", {"alpha": 0.1}, "--teacher-alpha"),
        ("point-robot", {"save_every": 30}, "--teacher-save-every 30"),
        ("point-robot", {"steps": 50}, "--teacher-steps 50"),
        ("cheetah-vel", {"save_every": 20}, "200 steps"),
        ("point-robot", {"steps": -20}, "positive"),
        ("point-robot", {"lr": -1e-3}, "positive"),
        ("point-robot", {"lr": float("nan")}, "positive"),
        ("reach", {"steps": -1}, "positive"),
        ("point-robot", {"group": 0}, "positive"),
        ("nope", {}, "nope"),
    ],
)
def test_settings_that_cannot_be_are_refused(env, given, named):
    with pytest.raises(ValueError) as error:
        trained_by(env, **given)
    one_line(error, named)


def test_a_family_of_the_users_has_settings_too(tmp_path):
    file = tmp_path / "cart.py"
    file.write_text(
        "from envs import Family\n"
        "CART = Family('cart', 30, 2, 1, 20, 5, (0, 0), (1, 1), batch=min, sample_tasks=min)\n"
    )
    found = trained_by(str(file), steps=600, lr=0.01)
    assert found == SACConfig(600, 150, 150, lr=0.01, hidden=64, replay=600)
    assert checkpoints(found) == [150, 300, 450, 600]
    assert len(checkpoints(trained_by(str(file)))) == 40
    folder = teachers_folder(Path("data"), str(file), teachers(steps=600), [[0.0, 0.1]])
    assert folder.parent == Path("data/teachers")  # not beside the file


@pytest.mark.parametrize("rule", [False, True])
def test_code_of_the_users_family_names_its_data(tmp_path, rule):
    """Another reward, another folder; a comment changes nothing."""
    file = tmp_path / "cart.py"
    kind = ", teacher='rule', collect_task=min" if rule else ""
    code = (
        "from envs import Family\n"
        "import numpy as np\n"
        "def tasks(n, rng):\n    return rng.uniform(0, 1, (n, 2))\n"
        "CART = Family('cart', 30, 2, 1, 20, 5, (0, 0), (1, 1), batch=min, sample_tasks=tasks"
        f"{kind})\n"
    )

    def names(text):
        file.write_text(text)
        get_family.cache_clear()
        code_of.cache_clear()
        cfg = Collection(data=Data(env=str(file)))
        named = [dataset_folder(cfg).name]
        if not rule:
            named.append(teachers_folder(Path("data"), str(file), teachers(), [[0, 0]]).name)
        return named

    before = names(code)
    assert names("# what it is\n\n" + code.replace("(1, 1), ", "(1, 1),  # one\n    ")) == before
    for one, other in zip(names(code.replace("30, 2, 1", "40, 2, 1")), before, strict=True):
        assert one != other


# ----------------------------------------------------------------------------------------- policies
def policies(kind, many=3, ds=4, da=2, hidden=5, scale=1.0):
    """Random ones; PPO's are large enough to be clipped."""
    rng = torch.Generator().manual_seed(1)
    sizes = [(ds, hidden), (hidden, hidden), (hidden, 2 * da if kind == "sac" else da)]
    tensors = {}
    for i, (fan_in, fan_out) in enumerate(sizes):
        for name, rows in ((f"w{i}", fan_in), (f"b{i}", 1)):
            tensors[name] = torch.randn(many, rows, fan_out, generator=rng) * scale
    if kind == "ppo":
        tensors["log_std"] = torch.randn(many, 1, da, generator=rng) * 0.3 - 2.5
    return Policies(kind, tensors)


def head(p, m, state):
    """The output of network m for one state, layer by layer."""
    x = state.double().numpy()
    for i in range(3):
        x = x @ p.tensors[f"w{i}"][m].double().numpy() + p.tensors[f"b{i}"][m, 0].double().numpy()
        if i < 2:
            x = np.maximum(x, 0) if p.kind == "sac" else np.tanh(x)
    return x


@pytest.mark.parametrize("kind", ["sac", "ppo"])
def test_mean_actions_match_a_loop(kind):
    """SAC: tanh of the mean. PPO: the mean, clipped."""
    p, states = policies(kind), torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    found = p.act(states)
    assert found.shape == (3, 7, 2)
    for m in range(3):
        for b in range(7):
            out = head(p, m, states[m, b])
            want = np.tanh(out[:2]) if kind == "sac" else np.clip(out, -1, 1)
            np.testing.assert_allclose(found[m, b], want, atol=1e-5)
    if kind == "ppo":
        assert 0.2 < (found.abs() == 1).float().mean() < 0.9


@pytest.mark.parametrize("kind", ["sac", "ppo"])
def test_sampled_actions_are_gaussian_and_repeatable(kind):
    p, states = (
        policies(kind, scale=0.3),
        torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0)),
    )
    states = states.expand(3, 20_000, 4)

    def act(seed):
        return p.act(states, torch.Generator().manual_seed(seed))

    found, seen = act(0), 0
    assert torch.equal(found, act(0)) and not torch.equal(found, act(1))
    assert found.abs().max() <= 1
    for m in range(3):
        out = head(p, m, states[m, 0])
        mean, std = (
            (out[:2], np.exp(out[2:]))
            if kind == "sac"
            else (out, p.tensors["log_std"][m, 0].exp().numpy())
        )
        got = (
            np.arctanh(found[m].double().numpy().clip(-1 + 1e-7, 1 - 1e-7))
            if kind == "sac"
            else found[m].numpy()
        )
        inside = np.abs(mean) + 4 * std < (
            np.inf if kind == "sac" else 1
        )  # elsewhere PPO's are clipped
        error = 5 * std[inside] / 20_000**0.5
        assert (np.abs(got.mean(0) - mean)[inside] < error).all()
        assert (np.abs(got.std(0) - std)[inside] < error).all()
        seen += inside.sum()
    assert seen > 2


@pytest.mark.parametrize("kind", ["sac", "ppo"])
def test_stacked_policies_are_the_single_ones(kind):
    p, states = policies(kind), torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    single = [
        Policies(kind, {name: tensor[m : m + 1] for name, tensor in p.tensors.items()})
        for m in range(3)
    ]
    whole = p.act(states)
    for m, one in enumerate(single):
        torch.testing.assert_close(one.act(states[m : m + 1])[0], whole[m], atol=1e-6, rtol=0)
    again = join([single[2], single[0]])
    torch.testing.assert_close(again.act(states[[2, 0]]), whole[[2, 0]], atol=1e-6, rtol=0)
    sampled = [
        x.act(states[[2, 0]], torch.Generator().manual_seed(0))
        for x in (again, join([single[2], single[0]]))
    ]
    assert torch.equal(*sampled) and not torch.equal(sampled[0], whole[[2, 0]])


@pytest.mark.parametrize("kind", ["sac", "ppo"])
def test_loaded_policies_are_the_saved_ones(kind, tmp_path):
    stacks = {20: policies(kind), 40: policies(kind, scale=0.2)}
    for step, p in stacks.items():
        save_policies(tmp_path, step, kind, p.tensors)
    states = torch.randn(1, 6, 4)
    found = load_policies(tmp_path, [40, 20, 40], 1).act(states.expand(3, -1, -1))
    rows = load_policies(tmp_path, [20, 40]).act(states.expand(6, -1, -1))
    some = load_policies(tmp_path, [40], slice(1, 3)).act(states.expand(2, -1, -1))
    want = {step: p.act(states.expand(3, -1, -1)) for step, p in stacks.items()}
    for got, expected in (
        (found, torch.stack([want[40][1], want[20][1], want[40][1]])),
        (rows, torch.cat([want[20], want[40]])),
        (some, want[40][1:]),
    ):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


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


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_checkpoint_is_named(tmp_path, how):
    for step in (20, 40):
        save_policies(tmp_path, step, "sac", policies("sac").tensors)
    DAMAGE[how](policy_file(tmp_path, 40))
    load_policies(tmp_path, [20])
    with pytest.raises(ValueError) as error:
        load_policies(tmp_path, [20, 40], 0)
    one_line(error, policy_file(tmp_path, 40), "trains it anew")


# ---------------------------------------------------------------------------------------- roll-outs
GOALS = [[0.5, -0.5], [-1.0, 0.2], [0.05, 0.9]]


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


@pytest.mark.parametrize("sampled", [False, True])
def test_rollout_of_point_robot(sampled):
    p = policies("sac", ds=2)
    played = rollout(p, "point-robot", GOALS, 4, (7, 1), sampled)
    assert {k: v.shape for k, v in played.items()} == {
        "states": (3, 4, 20, 2), "actions": (3, 4, 20, 2), "rewards": (3, 4, 20), "success": (3, 4),
    }  # fmt: skip
    assert all(played[name].dtype == np.float32 for name in ("states", "actions", "rewards"))
    assert played["success"].dtype == bool and not played["success"].any()
    for m, goal in enumerate(GOALS):
        check_point_robot(goal, *(played[name][m] for name in ("states", "actions", "rewards")))
    mean = p.act(torch.from_numpy(played["states"]).flatten(1, 2)).numpy().reshape(3, 4, 20, 2)
    assert (
        np.allclose(played["actions"], mean, atol=1e-5) is not sampled
    )  # each task by its own policy
    again, other = (rollout(p, "point-robot", GOALS, 4, seed, sampled) for seed in ((7, 1), (7, 2)))
    assert all((again[name] == played[name]).all() for name in played)
    assert not np.isclose(other["states"], played["states"]).all((2, 3)).any()


ELSEWHERE = {
    "cheetah-vel": (20, 6, [[0.5], [2.0]]),
    "walker-param": (17, 6, [[0.0] * 65, [1.5] * 65]),
    "reach": (18, 4, [[0.0, 0.85, 0.175], [0.1, 0.8, 0.1]]),
}


def test_random_rollout():
    """Without policies: the environment's own steps of uniform actions."""
    first, again, other = (
        rollout(None, "point-robot", GOALS, 6, (1, seed), True) for seed in (0, 0, 1)
    )
    assert (
        all((first[name] == again[name]).all() for name in first)
        and (first["actions"] != other["actions"]).all()
    )
    assert first["actions"].shape == (3, 6, 20, 2) and first["actions"].dtype == np.float32
    assert kstest(first["actions"].ravel(), "uniform", (-1, 2)).pvalue > 1e-4
    for m, goal in enumerate(GOALS):
        check_point_robot(goal, *(first[name][m] for name in ("states", "actions", "rewards")))


@pytest.mark.parametrize("env", ELSEWHERE)
def test_rollouts_are_those_of_the_environment(env, monkeypatch):
    """The stored actions, played again from the same starts."""
    ds, da, tasks = ELSEWHERE[env]
    made, make = [], make_batch
    monkeypatch.setattr(rollouts, "make_batch", lambda *args: made.append(args) or make(*args))
    played = rollout(policies("sac", 2, ds, da, scale=0.2), env, tasks, 2, (1, 2), True)
    assert made[0][:2] == (env, [tasks[0], tasks[0], tasks[1], tasks[1]])
    batch = make(*made[0])
    states, actions = batch.reset(), played["actions"].reshape(4, -1, da)
    for t in range(get_family(env).horizon):
        np.testing.assert_array_equal(played["states"].reshape(4, -1, ds)[:, t], states)
        states, rewards = batch.step(actions[:, t])
        np.testing.assert_array_equal(played["rewards"].reshape(4, -1)[:, t], rewards)
    assert (played["success"].ravel() == (False if batch.success is None else batch.success)).all()
    assert np.abs(actions).max() <= 1 and len(np.unique(actions)) > 100


# ------------------------------------------------------------------------------------------ levels
@pytest.fixture
def known():
    """Four checkpoints of three tasks in groups of two and one, by hand."""
    sac = PAPER["point-robot"]
    groups = [
        Group("point-robot", sac, (0, 0), ["a", "b"], "first"),
        Group("point-robot", sac, (0, 1), ["c"], "second"),
    ]
    sampled = np.array([[-40, -11, -5.5], [-20, -10.5, -6], [-12, -12, -5], [-14, -13, -5.8]])
    mean = np.array([[-35, -12, -6], [-22, -11, -5.5], [-10, -10.2, -5], [-20, -13, -6.5]])
    random = np.array([-30.0, -10.0, -15.0])
    return TrainedTeachers(
        "point-robot",
        groups,
        [20, 40, 60, 80],
        sampled,
        sampled.max(0) + 1,
        mean,
        np.zeros((4, 3)),
        random,
    )


def test_levels_by_hand(known):
    want = [[-10 / 18, 0, 0.95], [10 / 18, 0, 0.9], [1, 0, 1], [16 / 18, 0, 0.92]]
    np.testing.assert_allclose(known.level(known.sampled), want)
    np.testing.assert_allclose(known.level(known.mean)[:, 0], [-0.25, 0.4, 1, 0.5])
    assert (known.level(known.mean)[:, 1] == 0).all()  # never better than random
    assert known.best.tolist() == [-10, -10.2, -5]


@pytest.mark.parametrize(
    ("quality", "task", "behaviour", "label"),
    [
        ("mixed", 0, [0, 1, 2, 3], 2),
        ("medium-expert", 0, [0, 1], 3),  # the labels' levels are those of mean actions
        ("medium", 0, [0], 1),  # 0.5 is not below 0.5
        ("mixed", 1, [0, 1, 2, 3], 2),
        ("medium", 1, [0, 1, 2, 3], 2),  # all are as good as random
        ("mixed", 2, [0, 1, 2, 3], 2),
        ("medium-expert", 2, [1], 3),  # none is below: the lowest
        ("medium", 2, [1], 3),
    ],
)
def test_checkpoints_of_a_quality(known, quality, task, behaviour, label):
    found, labels = known.chosen(quality, task)
    assert (found.tolist(), labels) == (behaviour, label)


def test_place_of_a_task(known):
    assert [(group.folder, row) for group, row in map(known.place, range(3))] == [
        ("first", 0), ("first", 1), ("second", 0),
    ]  # fmt: skip
    with pytest.raises(IndexError):
        known.place(3)


def test_groups_and_their_folders(tmp_path):
    tasks = [[0.1 * i, 0.0] for i in range(7)]
    found = groups_of("point-robot", teachers(group=3), tasks, tmp_path)
    assert [group.tasks for group in found] == [tasks[:3], tasks[3:6], tasks[6:]]
    assert [Path(group.folder).name for group in found] == ["group-000", "group-001", "group-002"]
    likewise = groups_of("reach", teachers(group=3), tasks, tmp_path)  # PPO's are stacked too
    assert [group.tasks for group in likewise] == [group.tasks for group in found]


def test_highest_return_of_a_dataset():
    found = {"random": [-20.0, 0.0], "highest": [-10.0, 50.0]}
    assert maximum(found, np.array([[-15.0, -19.0], [10.0, 60.0]])) == [0.5, 1.2]


# ------------------------------------------------------------------------------ a task of a dataset
def constant(known_tasks, checkpoint):
    """Stacked SAC policies that always act the same: what they do tells task and checkpoint."""
    many = len(known_tasks)
    out = torch.full((many, 1, 4), -20.0)
    for m, task in enumerate(known_tasks):
        out[m, 0, :2] = torch.atanh(torch.tensor(mark(task, checkpoint)))
    shapes = (2, 3), (1, 3), (3, 3), (1, 3), (3, 4)
    weights = [torch.zeros(many, *shape) for shape in shapes] + [out]
    return Policies("sac", dict(zip(WEIGHTS, weights, strict=True)))


def mark(task, checkpoint):
    return [0.1 * (task + 1), 0.15 * (checkpoint + 1) - 0.5]


def read(actions):
    """(task, checkpoint) of constant actions (E, T, 2), one pair an episode."""
    np.testing.assert_allclose(actions, np.broadcast_to(actions[:, :1], actions.shape), atol=1e-5)
    tasks, steps = (actions[:, 0] / [0.1, 0.15] - [1, -0.5 / 0.15 + 1]).T
    pairs = np.stack([tasks, steps], 1)
    np.testing.assert_allclose(pairs, pairs.round(), atol=1e-2)
    return [tuple(pair) for pair in pairs.round().astype(int).tolist()]


@pytest.fixture
def marked(tmp_path):
    """Five tasks in two groups, checkpoints of levels 0, 0.4, 0.7, 1; of the fifth 0.9 to 1."""
    tasks = [[0.3, 0.1 * i] for i in range(5)]
    groups = groups_of("point-robot", teachers(group=3), tasks, tmp_path)
    for group, numbers in zip(groups, ([0, 1, 2], [3, 4]), strict=True):
        for i in range(4):
            save_policies(Path(group.folder), 20 * (i + 1), "sac", constant(numbers, i).tensors)
    levels = np.tile(np.array([[0], [0.4], [0.7], [1]]), 5)
    levels[:, 4] = [0.9, 0.95, 0.97, 1]
    returns, random = 10 * levels - 20, np.full(5, -20.0)
    return TrainedTeachers(
        "point-robot",
        groups,
        [20, 40, 60, 80],
        returns,
        returns.max(0),
        returns,
        np.zeros((4, 5)),
        random,
    )


WITHIN = {"mixed": [0, 1, 2, 3], "medium-expert": [0, 1, 2], "medium": [0, 1]}


def parts(marked, folder, quality="mixed", recipe="paper", episodes=10, queries=30, seed=0):
    data = Data(
        env="point-robot",
        quality=quality,
        recipe=recipe,
        data_episodes=episodes,
        data_queries=queries,
        data_seed=seed,
    )
    tasks = [task for group in marked.groups for task in group.tasks]
    behaviours = [marked.behaviour(quality, i) for i in range(5)]
    return parts_of(data, tasks, behaviours, [folder / part_name(i) for i in range(5)])


def rows_of(array):
    return {row.tobytes() for row in array.reshape(-1, array.shape[-1])}


def made(part):
    make_part(part, alive)
    with np.load(part.path) as file:
        return dict(file)


@pytest.mark.parametrize("quality", WITHIN)
@pytest.mark.parametrize("episodes", [10, 24, 3])
def test_each_checkpoint_plays_as_many_episodes(marked, tmp_path, quality, episodes):
    for i, part in enumerate(parts(marked, tmp_path, quality, episodes=episodes)):
        if i not in (1, 4):
            continue
        arrays = made(part)
        players = read(arrays["actions"])
        within = WITHIN[quality] if i == 1 else WITHIN[quality] if quality == "mixed" else [0]
        assert {task for task, _ in players} == {i} and players == sorted(
            players
        )  # in the order of training
        count = Counter(checkpoint for _, checkpoint in players)
        assert sum(count.values()) == episodes and set(count) <= set(within)
        shares = [count[c] for c in within]
        assert max(shares) - min(shares) <= 1
        goal = marked.place(i)[0].tasks[marked.place(i)[1]]
        check_point_robot(goal, arrays["states"], arrays["actions"], arrays["rewards"])
        label = mark(i, within[-1])
        np.testing.assert_allclose(arrays["query_actions"], np.tile(label, (30, 1)), atol=1e-5)
        queries = rows_of(arrays["query_states"])
        assert (
            queries <= rows_of(arrays["states"]) and len(queries) == 30
        )  # no step twice while there are enough


def test_more_queries_than_steps(marked, tmp_path):
    part = parts(marked, tmp_path, episodes=5, queries=150)[0]
    arrays = made(part)
    assert (
        arrays["query_states"].shape == (150, 2)
        and len(np.unique(arrays["query_states"], axis=0)) <= 100
    )


@pytest.mark.parametrize("quality", WITHIN)
def test_explore_is_played_by_others_for_three_quarters(marked, tmp_path, quality):
    found = parts(marked, tmp_path, quality, "explore", episodes=12)
    for i in (0, 4):
        part, goal = found[i], marked.place(i)[0].tasks[marked.place(i)[1]]
        arrays = made(part)
        players = read(arrays["actions"])
        assert part.own == 3 and {task for task, _ in players[:3]} == {i}
        assert i not in {task for task, _ in players[3:]} and len(players) == 12
        for task, checkpoint in players:
            assert checkpoint in (WITHIN[quality] if task != 4 or quality == "mixed" else [0])
        check_point_robot(
            goal, arrays["states"], arrays["actions"], arrays["rewards"]
        )  # rewards are this task's
        lowest = i == 4 and quality != "mixed"
        label = mark(i, 0 if lowest else WITHIN[quality][-1])
        np.testing.assert_allclose(arrays["query_actions"], np.tile(label, (30, 1)), atol=1e-5)
        assert rows_of(arrays["query_states"]) <= rows_of(
            arrays["states"][:3]
        )  # where its own training has been
        where = {(marked.place(t)[0].folder, marked.place(t)[1]): t for t in range(5)}
        assert [
            (where[folder, row], step // 20 - 1) for folder, step, row in part.others
        ] == players[3:]


def test_wander_is_played_at_random_by_half(marked, tmp_path):
    part = parts(marked, tmp_path, "medium", "wander", episodes=40)[1]
    arrays, goal = made(part), marked.place(1)[0].tasks[1]
    assert read(arrays["actions"][:20]) == [(1, 0)] * 10 + [(1, 1)] * 10
    chance = arrays["actions"][20:].ravel()
    assert (
        len(np.unique(chance)) == len(chance) == 800
        and kstest(chance, "uniform", (-1, 2)).pvalue > 1e-4
    )
    check_point_robot(goal, arrays["states"], arrays["actions"], arrays["rewards"])
    assert rows_of(arrays["query_states"]) <= rows_of(arrays["states"][:20])
    np.testing.assert_allclose(arrays["query_actions"], np.tile(mark(1, 1), (30, 1)), atol=1e-5)


def test_explore_takes_every_policy_of_others_equally_often(marked, tmp_path):
    where = {(marked.place(t)[0].folder, marked.place(t)[1]): t for t in range(5)}
    for i, part in enumerate(parts(marked, tmp_path, recipe="explore", episodes=4000)):
        assert part.own == 1000 and len(part.others) == 3000
        count = Counter((where[folder, row], step) for folder, step, row in part.others)
        assert {task for task, _ in count} == set(range(5)) - {i} and len(count) == 16
        assert all(abs(n - 3000 / 16) < 5 * (3000 / 16) ** 0.5 for n in count.values())


def test_seeds_and_tasks_have_streams_of_their_own(marked, tmp_path):
    starts = []
    for seed in (0, 1):
        for recipe in ("explore", "wander"):
            for part in parts(
                marked, tmp_path / f"{recipe}{seed}", seed=seed, recipe=recipe, episodes=8
            )[:2]:
                starts.append(made(part)["states"][:, 0])
                again = made(replace(part, path=str(tmp_path / "again.npz")))["states"][:, 0]
                assert (again == starts[-1]).all()
    assert len(np.unique(np.concatenate(starts[:2] + starts[4:6]), axis=0)) == 32


# ----------------------------------------------------------------------------------- other families
def test_cheetah_from_nothing_to_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEVEL_EPISODES", 1)
    given = teachers(steps=400, save_every=200, warmup=390, hidden=8, batch=8, group=2)
    (group,) = groups_of("cheetah-vel", given, [[0.5], [2.0]], tmp_path)
    train_group(group, alive)
    with np.load(tmp_path / "group-000" / "levels.npz") as file:
        levels = dict(file)
    assert {k: v.shape for k, v in levels.items()} == {
        "sampled": (2, 2, 1), "mean": (2, 2, 1), "success": (2, 2), "random": (2,),
    }  # fmt: skip
    np.testing.assert_array_equal(levels["random"], random_returns("cheetah-vel", group.tasks))
    assert (levels["sampled"] != levels["mean"]).all()
    before = written(tmp_path)
    train_group(group, alive)  # another worker was faster
    unchanged(tmp_path, before)
    folder = teachers_folder(tmp_path, "cheetah-vel", given, group.tasks)
    assert folder.parent == tmp_path / "teachers" and "cheetah-vel" in folder.name
    assert not (tmp_path / "group-000" / STATE).exists()  # the replay is of no use any more
    monkeypatch.setattr(module, "train_sac", None)
    (tmp_path / "group-000" / "levels.npz").unlink()
    train_group(group, alive)  # measured anew, not trained
    with np.load(tmp_path / "group-000" / "levels.npz") as file:
        assert all((file[name] == levels[name]).all() for name in levels)


def test_reach_labels_are_the_behaviours_own_actions(tmp_path, monkeypatch):
    """PPO from nothing to a part; two checkpoints."""
    monkeypatch.setitem(
        PAPER, "reach", PPOConfig(128, n_steps=64, batch=32, epochs=1, save_every=64)
    )
    monkeypatch.setattr(
        module, "random_returns", lambda env, tasks: np.zeros(len(tasks))
    )  # 2000 steps of physics
    monkeypatch.setattr(module, "LEVEL_EPISODES", 1)
    tasks = [[0.0, 0.85, 0.175]]
    groups = groups_of("reach", Teachers(), tasks, tmp_path)
    train_group(groups[0], alive)
    with np.load(tmp_path / "group-000" / "levels.npz") as file:
        levels = {name: file[name] for name in file.files}
    assert levels["sampled"].shape == (2, 1, 1) and levels["success"].shape == (2, 1)
    returns = levels["sampled"][:, :, 0]
    known = TrainedTeachers(
        "reach",
        groups,
        checkpoints(groups[0].trained_by),
        returns,
        returns[0],
        returns,
        levels["success"],
        levels["random"],
    )
    data = Data(env="reach", data_episodes=5, data_queries=40)
    (job,) = parts_of(data, tasks, [known.behaviour("mixed", 0)], [tmp_path / "task-000.npz"])
    assert job.behaviour.steps == [64, 128] and not job.others and not job.random
    for part, own in ((job, 5), (replace(job, own=3, random=2), 3)):
        arrays = made(part)
        assert arrays["states"].shape == (5, 100, 18) and arrays["query_actions"].shape == (40, 4)
        pairs = rows_of(np.concatenate([arrays["query_states"], arrays["query_actions"]], -1))
        assert (
            pairs <= rows_of(np.concatenate([arrays["states"], arrays["actions"]], -1)[:own])
            and len(pairs) == 40
        )


# ----------------------------------------------------------------------------------- whole datasets
def written(folder, part=""):
    """Bytes and time of all files with `part` in their names, locks aside."""
    return {
        name: state
        for name, state in contents(folder).items()
        if part in name and not name.endswith(".lock")
    }


def everything(folder):
    return {name: digest for name, (digest, _) in written(folder).items()}


def unchanged(folder, before):
    """Files of `before` were neither written anew nor removed."""
    after = written(folder)
    assert before and {name: after.get(name) for name in before} == before


@pytest.fixture
def cfg(point_config, point_folder, tmp_path):
    """The settings of the tiny dataset for a copy of its folder, teachers included."""
    shutil.copytree(point_config.data.datasets, tmp_path / "data")
    return changed(point_config, datasets=str(tmp_path / "data"))


def teachers_of(cfg):
    (folder,) = (Path(cfg.data.datasets) / "teachers").iterdir()
    return folder


def levels_of(cfg):
    """The arrays of all groups' levels, tasks joined."""
    found = {}
    for group in sorted(teachers_of(cfg).glob("group-*")):
        with np.load(group / "levels.npz") as file:
            for name in file.files:
                found.setdefault(name, []).append(file[name])
    axis = {"sampled": 1, "mean": 1, "success": 1, "random": 0}
    return {name: np.concatenate(values, axis[name]) for name, values in found.items()}


def test_dataset_of_point_robot(point_config, point_folder):
    data = load_dataset(point_folder, "point-robot")
    train, test = split_tasks("point-robot", 56, train=5, test=2)
    assert (data.meta["train_tasks"], data.meta["test_tasks"]) == (train, test)
    assert data.states.shape == (5, 23, 20, 2) and data.query_states.shape == (5, 40, 2)
    for i, goal in enumerate(train):
        check_point_robot(
            goal, *(getattr(data, name)[i].numpy() for name in ("states", "actions", "rewards"))
        )
    torch.testing.assert_close(data.state_mean, data.states.mean((0, 1, 2)))
    levels = levels_of(point_config)
    assert (
        levels["sampled"].shape == (10, 7, 5)
        and data.meta["behaviour"] == [[40 * (c + 1) for c in range(10)]] * 5
    )
    best = levels["mean"].mean(2).argmax(0)
    for i in range(5):  # labels: the mean action of the best checkpoint
        folder = teachers_of(point_config) / f"group-{i // 3:03d}"
        label = load_policies(folder, [40 * (best[i] + 1)], i % 3).act(data.query_states[i][None])[
            0
        ]
        torch.testing.assert_close(data.query_actions[i], label, atol=1e-6, rtol=0)


def test_reference_returns(point_config, point_folder):
    meta, levels = json.loads((point_folder / "meta.json").read_text()), levels_of(point_config)
    first = 0
    for name in ("train", "test"):
        tasks, known = meta[f"{name}_tasks"], meta["reference"][name]
        rows = slice(first, first + len(tasks))
        first += len(tasks)
        np.testing.assert_allclose(known["random"], levels["random"][rows], atol=6e-4)
        np.testing.assert_allclose(known["teacher"], levels["mean"].mean(2).max(0)[rows], atol=6e-4)
        np.testing.assert_allclose(known["highest"], levels["sampled"].max((0, 2))[rows], atol=6e-4)
        assert all(
            len(str(value)) < 9 for values in known.values() for value in values
        )  # three decimals
    train, test = split_of(point_config)
    for group in (slice(0, 3), slice(3, 6), slice(6, 7)):
        np.testing.assert_array_equal(
            levels["random"][group], random_returns("point-robot", (train + test)[group])
        )
    assert (
        first == 7
        and (
            np.array(meta["reference"]["train"]["teacher"])
            > np.array(meta["reference"]["train"]["random"])
        ).all()
    )
    assert meta["best_level"] == [1.0] * 5
    returns, known = load_dataset(point_folder).returns.numpy().max(1), meta["reference"]["train"]
    random, highest = (np.array(known[name]) for name in ("random", "highest"))
    np.testing.assert_allclose(meta["maximum"], (returns - random) / (highest - random), atol=1e-3)
    assert meta["algorithm"]["hidden"] == 16 and meta["algorithm"]["replay"] == 400


def test_qualities_share_one_training(cfg):
    before = written(teachers_of(cfg))
    sampled = levels_of(cfg)["sampled"].mean(2)[:, :5]
    random = levels_of(cfg)["random"][:5]
    level = (sampled - random) / (sampled.max(0) - random)
    seen = {}
    for quality, limit in (("medium", 0.5), ("medium-expert", 0.8)):
        with at_home():
            data = load_dataset(collect(changed(cfg, quality=quality), quiet=True))
        want = [[40 * (c + 1) for c in np.flatnonzero(level[:, i] < limit)] for i in range(5)]
        assert data.meta["behaviour"] == want and all(want)
        assert all(value < limit for value in data.meta["best_level"])
        np.testing.assert_allclose(
            data.meta["best_level"], np.where(level < limit, level, -9).max(0), atol=1e-4
        )
        seen[quality] = data.returns.mean()
    assert seen["medium"] < seen["medium-expert"]
    assert len(list((Path(cfg.data.datasets) / "teachers").iterdir())) == 1
    unchanged(teachers_of(cfg), before)


@pytest.mark.parametrize("recipe", ["explore", "wander"])
def test_other_recipes_share_it_too(cfg, recipe):
    before = written(teachers_of(cfg))
    with at_home():
        data = load_dataset(collect(changed(cfg, recipe=recipe), quiet=True))
    for i, goal in enumerate(data.meta["train_tasks"]):
        check_point_robot(
            goal, *(getattr(data, name)[i].numpy() for name in ("states", "actions", "rewards"))
        )
    assert (
        data.returns.mean() < load_dataset(dataset_folder(cfg)).returns.mean() - 1
    )  # others go elsewhere
    unchanged(teachers_of(cfg), before)


def test_teachers_of_other_settings_are_others(point_config):
    train, test = split_of(point_config)
    tasks = train + test

    def folder(tasks=tasks, **changes):
        cfg = changed(point_config, **changes)
        return teachers_folder(Path("data"), cfg.data.env, cfg.teachers, tasks)

    first = folder()
    for change in (
        {"teacher_seed": 1},
        {"teacher_group": 2},
        {"teacher_lr": 1e-4},
        {"teacher_steps": 800},
        {"teacher_layer_norm": True},
    ):
        assert folder(**change) != first
        assert dataset_folder(changed(point_config, **change)) != dataset_folder(point_config)
    assert folder(tasks[:-1]) != first
    for change in ({"quality": "medium"}, {"data_seed": 5}, {"data_episodes": 99}, {"workers": 3}):
        assert folder(**change) == first


def test_a_setting_that_is_added_leaves_names_as_they_were(point_config, monkeypatch):
    """What says `before` is in no name: folders of older versions are found again."""

    def names():
        tasks = [[0.0, 0.1]]
        folder = teachers_folder(Path("data"), "point-robot", point_config.teachers, tasks)
        return folder.name, dataset_folder(point_config).name

    now, entry = names(), Teachers.__dataclass_fields__["teacher_layer_norm"]
    older = {k: v for k, v in Teachers.__dataclass_fields__.items() if v is not entry}
    monkeypatch.setattr(Teachers, "__dataclass_fields__", older)  # a version without the setting
    assert names() == now


# ----------------------------------------------------------------------- elsewhere, and interrupted
def test_two_processes_give_the_same_bytes(point_config, point_folder, tmp_path):
    collect(changed(point_config, workers=2, datasets=str(tmp_path)), quiet=True)
    assert (
        everything(tmp_path) == everything(point_config.data.datasets)
        and len(everything(tmp_path)) == 3 * 11 + 6
    )


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray_gives_the_same_bytes(point_config, point_folder, tmp_path, monkeypatch):
    """One start of Ray serves training and rolling out: it takes most of the time."""
    import ray

    start, end = ray.init, ray.shutdown
    monkeypatch.setattr(
        ray, "init", lambda *args, **options: ray.is_initialized() or start(*args, **options)
    )
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    try:
        collect(changed(point_config, cluster="local", datasets=str(tmp_path)), quiet=True)
        assert ray.is_initialized() and everything(tmp_path) == everything(
            point_config.data.datasets
        )
    finally:
        end()


def until(condition, process=None):
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_command_continues_to_the_same_bytes(
    point_config, point_folder, tmp_path, number
):
    """Stopped as the second group trains; the first is not touched again.

    Meanwhile nobody else may write.
    """
    cfg = changed(point_config, datasets=str(tmp_path / "data"))
    argv = ["--preset", "paper", *flags(cfg)]
    heard = {
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    }  # tests in the background ignore it
    process = start(argv, script="collect.py", cwd=tmp_path, **heard)
    until(lambda: list(tmp_path.glob("data/teachers/*/group-001/step-*")), process)
    with pytest.raises(ValueError) as error, at_home():
        collect(cfg, quiet=True)
    one_line(error, "another process is writing", dataset_folder(cfg))
    process.send_signal(number)
    out, err = process.communicate(timeout=LONG)
    if number == signal.SIGINT:
        assert (
            process.returncode == 128 + signal.SIGINT
            and "stopped; the same command continues" in err
            and "Traceback" not in err
        )
    else:
        assert process.returncode == -signal.SIGKILL
    group = teachers_of(cfg) / "group-001"
    assert not (group / "levels.npz").exists() and not list(dataset_folder(cfg).glob("task-*")), (
        "it was not caught"
    )
    done = written(teachers_of(cfg) / "group-000")
    assert "levels.npz" in done
    process = start(argv, script="collect.py", cwd=tmp_path)
    out, err = process.communicate(timeout=LONG)
    assert process.returncode == 0, err
    assert (
        "teachers of point-robot: return" in out
        and "optimum -" in out
        and "best checkpoint 100 %" in out
    )
    assert everything(cfg.data.datasets) == everything(point_config.data.datasets)
    unchanged(teachers_of(cfg) / "group-000", done)


# -------------------------------------------------------------------------------- damaged, and full
def fails(cfg, *parts):
    with pytest.raises(ValueError) as error, at_home():
        collect(cfg, quiet=True)
    one_line(error, *parts)


def redone(cfg, point_config, path, kept):
    """The damaged file is named and set aside, everything is as it was; files `kept` stand."""
    when = {path: path.stat().st_mtime_ns for path in kept}
    with at_home():
        collect(cfg, quiet=True)
    aside = path.with_name(f"{path.name}.damaged")
    assert aside.exists()
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    assert everything(cfg.data.datasets) == everything(point_config.data.datasets)
    assert {path: path.stat().st_mtime_ns for path in kept} == when


@pytest.mark.parametrize("complete", [True, False])
def test_damaged_part_is_named_and_redone_alone(cfg, point_config, complete, capsys):
    folder = dataset_folder(cfg)
    path = folder / "task-002.npz"
    flip(path, 0.3)
    if complete:
        with pytest.raises(ValueError) as error:
            load_dataset(folder)
        one_line(error, "task-002.npz is damaged", "redoes it alone")
    else:
        (folder / "meta.json").unlink()
    others = [p for p in folder.glob("*.npz") if p != path]
    redone(cfg, point_config, path, [*others, *teachers_of(cfg).glob("*/step-*")])
    assert str(path) in capsys.readouterr().err


def test_any_flipped_byte_of_levels_is_noticed_or_harmless(cfg):
    """The checksums of the archive's members find it; a time stamp says nothing."""
    path, outcomes = teachers_of(cfg) / "group-001" / "levels.npz", Counter()
    train, test = split_of(cfg)
    group = groups_of("point-robot", cfg.teachers, train + test, teachers_of(cfg))[1]
    whole, want = path.read_bytes(), load_levels(group)
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found = load_levels(group)
            assert all((found[name] == want[name]).all() for name in want)
            outcomes["harmless"] += 1
        except Damaged as error:
            assert "\n" not in str(error) and str(path) in str(error)
            outcomes["named"] += 1
    assert outcomes["named"] > outcomes["harmless"]


@pytest.mark.parametrize("how", ["empty", "shorter", "garbage", "not finite", "other shape"])
def test_damaged_levels_are_named_and_measured_alone(cfg, point_config, how, capsys):
    path = teachers_of(cfg) / "group-002" / "levels.npz"
    shutil.rmtree(dataset_folder(cfg))
    with np.load(path) as file:
        levels = dict(file)
    if how == "not finite":
        levels["sampled"][0, 0, 0] = np.nan
        files.save_arrays(path, levels)
    elif how == "other shape":
        files.save_arrays(path, levels | {"mean": levels["mean"][1:]})
    else:
        DAMAGE[how](path)
    redone(cfg, point_config, path, [*teachers_of(cfg).glob("*/step-*")])
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("how", ["flipped number", "empty", "no policies"])
def test_damaged_checkpoint_is_named_and_its_group_redone_alone(cfg, point_config, how, capsys):
    path = policy_file(teachers_of(cfg) / "group-001", 160)
    shutil.rmtree(dataset_folder(cfg))
    DAMAGE[how](path)
    others = [p for p in teachers_of(cfg).glob("*/*") if p.is_file() and "group-001" not in str(p)]
    others = [p for p in others if p.name != ".lock"]
    redone(cfg, point_config, path, [*others, path.parent / "levels.npz"])
    assert str(path) in capsys.readouterr().err


def test_a_removed_checkpoint_is_trained_again(cfg, point_config):
    """Also where the state has gone past it."""
    path = policy_file(teachers_of(cfg) / "group-001", 160)
    shutil.rmtree(dataset_folder(cfg))
    path.unlink()
    with at_home():
        collect(cfg, quiet=True)
    assert everything(cfg.data.datasets) == everything(point_config.data.datasets)


def test_full_disk_is_refused_before_any_work(point_config, tmp_path, monkeypatch):
    """Of 5 x 23 x 20 steps of 20 bytes; then of the teachers, which need more."""
    usage, cfg = namedtuple("usage", "free"), changed(point_config, datasets=str(tmp_path / "data"))
    for free, named in ((40_000, dataset_folder(cfg).name), (60_000, "teachers")):
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path, free=free: usage(free))
        fails(cfg, named, "make room")
        assert not everything(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10**9))
    monkeypatch.setattr(module, "run_jobs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(cfg, quiet=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"env": "darkroom"}, "darkroom's teacher is a rule"),
        ({"env": "reach"}, "--teacher-warmup"),
        ({"teacher_save_every": 30}, "--teacher-save-every 30"),
        ({"teacher_seed": -1}, "--teacher-seed"),
        ({"data_seed": -1}, "--data-seed"),
        ({"workers": -1}, "--workers"),
        ({"train_tasks": -1}, "--train-tasks"),
        ({"teacher_device": "toaster"}, "toaster"),
        ({"tasks": "missing.json"}, "missing.json"),
        ({"env": "nope"}, "nope"),
        ({"data_episodes": 4}, "--data-episodes"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(point_config, tmp_path, change, named):
    fails(changed(point_config, datasets=str(tmp_path / "data"), **change), named)
    assert not list(tmp_path.iterdir())


def test_ray_that_is_missing_is_refused_before_any_work(point_config, tmp_path, monkeypatch):
    monkeypatch.setattr("support.jobs.find_spec", lambda name: None)
    fails(
        changed(point_config, datasets=str(tmp_path / "data"), cluster="local"),
        "--cluster needs Ray",
    )
    assert not list(tmp_path.iterdir())
