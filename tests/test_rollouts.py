"""Policies of teachers, what they play, and one task's part of a dataset (App. D.2, Alg. 3).

Constant policies, whose actions tell who played.
Run: pytest tests/test_rollouts.py
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from teaching import DAMAGE, check_point_robot, made, one_line, rows_of, teachers

from config import Data
from data import part_name
from envs import get_family, make_batch
from teachers import rollouts
from teachers.rollouts import Policies, join, load_policies, parts_of, rollout
from teachers.stored import WEIGHTS, policy_file, save_policies
from teachers.teachers import TrainedTeachers, groups_of


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


def test_a_single_task_has_no_others_but_may_have_random_actions(marked, tmp_path):
    """Of explore nothing is left but its own; wander needs nobody else."""
    for recipe, own, random in (("paper", 40, 0), ("explore", 40, 0), ("wander", 20, 20)):
        data = Data(env="point-robot", recipe=recipe, data_episodes=40)
        behaviours = [marked.behaviour("mixed", 0)]
        (part,) = parts_of(data, [[0.3, 0.0]], behaviours, [tmp_path / "task-000.npz"])
        assert (part.own, part.random, part.others) == (own, random, [])


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
