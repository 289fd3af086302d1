"""test_dpt.py: T2MIR-DPT (Sec. 4.3; Eq. 11; Algorithms 3 and 4).

The loss by hand, the sampler on data that tell where they are from; predictions by changing one
token at a time; queries behind the prompt against shorter prompts; Algorithm 4 in the DarkRoom and
on Point-Robot.
Run: python -m pytest -q tests/test_dpt.py
"""

import math
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import toys
from torch.testing import assert_close
from toys import (
    CAUSAL,
    DECODABLE,
    EQ4,
    GATES,
    GRID,
    PLACES,
    PLANE,
    A,
    N,
    T,
    build,
    cut,
    draw,
    gated,
    method,
)

from data import Prompt, steps_at
from dpt import DPT, DPTBatch, DPTSettings, queries_behind, sample_dpt
from envs import get_family
from evaluate import play
from models import T2MIR
from policies import concatenate
from support.settings import check_types

near = partial(assert_close, atol=1e-5, rtol=0)
SHIFTS = (False, True)


# ------------------------------------------------------------------------------------------- Eq. 11
def cross_entropy(logits, label):
    return math.log(sum(math.exp(x) for x in logits.tolist())) - logits[label].item()


def imitation(tiny, action, batch):
    """The method's loss for these predictions in the place of its network's."""
    tiny.forward = lambda batch: SimpleNamespace(action=action, losses={}, metrics={})
    return tiny.losses(batch)[0]["imitation"].item()


@pytest.mark.parametrize("labels", [[[3], [0]], [[3, 1, 2, 2], [0, 4, 4, 1]]])
def test_eq11_repeats_one_label_or_takes_each_querys_own(labels):
    action = torch.randn(2, 4, 5)  # query first: n + 1 = 4 read-outs; query last: Q = 4
    prompt = Prompt(torch.zeros(2, 3, 2), torch.zeros(2, 3).long(), torch.zeros(2, 3))
    target = torch.tensor(labels)
    batch = DPTBatch(prompt, torch.zeros(2), torch.zeros(2, 1, 2), target, target)
    losses = [cross_entropy(action[b, r], (labels[b] * 4)[r]) for b, r in product((0, 1), range(4))]
    got = imitation(method("first"), action, batch)
    assert got == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_eq11_of_continuous_actions_is_the_squared_error():
    action, label = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    prompt = Prompt(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 0.5), torch.zeros(1, 2))
    batch = DPTBatch(prompt, torch.zeros(1), torch.zeros(1, 1, 2), label, label)
    got = imitation(method("first", PLANE), action, batch)
    assert got == pytest.approx((1 + 0 + 1 + 1) / 4)


@pytest.mark.parametrize(
    "why, changes",
    [
        ("--query-position last", {"moe_position": "bottom"}),
        ("--query-position last", {"moe_position": "middle", "moe": "task"}),
        ("--queries needs", {"query_position": "first", "queries": 2}),
        ("--short needs", {"query_position": "first", "short": 0.1}),
        ("--empty needs", {"query_position": "first", "empty": 0.1}),
        ("at most 1", {"short": 0.6, "empty": 0.5}),
        ("--short 1.5", {"short": 1.5}),
        ("--queries 0", {"queries": 0}),
        ("--keys other needs two draws", {"keys": "other", "draws": 4}),
        ("--independent needs", {"query_position": "first", "independent": True}),
        ("--independent with", {"independent": True, **gated(("both", "prefix"), "middle")}),
        ("--independent with", {"independent": True, **gated(("task", "prefix"), "bottom")}),
        ("--pooled needs", {"pooled": 2, "prompt_length": 2 * T}),
        ("--pooled needs", {"pooled": 2, "prompt_length": T, "query_position": "first"}),
    ],
)
def test_settings_refuse(why, changes):
    cfg = toys.config("last", **changes)
    with pytest.raises(ValueError) as error:
        check_types(cfg.method)
        DPT.check(cfg, GRID)
    assert why in str(error.value) and "\n" not in str(error.value)


def test_settings_that_fit_are_not_refused():
    DPT.check(toys.config("last", queries=8, short=0.5, empty=0.5), GRID)
    DPT.check(toys.config("last", moe_position="bottom", routing="prefix"), GRID)
    DPT.check(toys.config("first", moe_position="bottom"), PLANE)
    DPT.check(toys.config("last", independent=True, routing="prefix"), GRID)
    for moe, routing in (("both", "token"), ("token", "prefix"), ("none", "sequence")):
        gate = gated((moe, routing), "bottom")
        DPT.check(toys.config("last", independent=True, **gate), GRID)
    DPT.check(toys.config("last", pooled=9, prompt_length=T, data_episodes=8), GRID)


# ------------------------------------------------------------------------------------- Algorithm 3
def sample(data, rows, episodes, draws, rng=None, **settings):
    rng = rng or torch.Generator().manual_seed(0)
    return sample_dpt(data, rows, episodes, draws, rng, DPTSettings(**settings))


CODE = torch.tensor([10, 1])  # the number of a query from its state


def test_dpt_batch_holds_stored_steps_and_queries():
    data = toys.coded_dataset()
    batch = sample(data, 16, 2, 2, queries=6)
    task, episode = toys.episodes_of(batch)
    toys.check_contents(data, batch, task, episode)
    assert batch.query_states.shape == (16, 6, 2) and batch.query_states.dtype == torch.int64
    assert batch.query_actions.shape == batch.visible.shape == (16, 6)
    assert batch.query_actions.dtype == batch.visible.dtype == torch.int64
    number = batch.query_states @ CODE
    assert torch.equal(batch.query_actions, data.query_actions[task[:, None], number].long())


def test_dpt_queries_are_independent_of_the_prompt():
    data, rng, pairs = toys.coded_dataset(), torch.Generator().manual_seed(0), []
    episodes, queries = 10, 50
    for _ in range(500):
        batch = sample(data, 8, 1, 1, rng, queries=5)
        episode, number = toys.episodes_of(batch)[1], batch.query_states @ CODE
        pairs.append((episode * queries + number).flatten())
    table = torch.cat(pairs).bincount(minlength=episodes * queries).view(episodes, queries).double()
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    freedom = (episodes - 1) * (queries - 1)
    chi = ((table - expected) ** 2 / expected).sum()
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5  # neither linked nor suspiciously even
    share = table.sum(0) / table.sum()
    assert (share - 1 / queries).abs().max() < 0.005  # every query equally often


@pytest.mark.parametrize(
    ("short", "empty"), [(0.2, 0.3), (0.5, 0.0), (0.0, 0.4), (0.0, 0.0), (0.0, 1.0)]
)
def test_dpt_shares_of_hidden_prompts(short, empty):
    batch = sample(toys.coded_dataset(), 8, 2, 1, queries=2000, short=short, empty=empty)
    visible, steps, whole = batch.visible.flatten(), 200, 1 - empty - short
    assert visible.min() >= 0 and visible.max() <= steps
    within = 4 * 0.5 / len(visible) ** 0.5
    assert (visible == 0).double().mean() == pytest.approx(empty + short / (steps + 1), abs=within)
    for episodes in (1, 2):  # whole episodes, equally often
        share = (visible == episodes * 100).double().mean()
        assert share == pytest.approx(whole / 2 + short / (steps + 1), abs=within)
    part = visible[visible % 100 != 0].double()
    assert len(part) / len(visible) == pytest.approx(short * (steps - 2) / (steps + 1), abs=within)
    if short:  # uniform between the ends
        assert part.mean() == pytest.approx(steps / 2, abs=4 * steps / 12**0.5 / len(part) ** 0.5)
        assert part.unique().numel() == steps - 2
    if not short and empty in (0, 1):  # exactly, not only on average
        assert (visible == 0).all() if empty else ((visible % 100 == 0) & (visible > 0)).all()


def test_pooled_prompts_are_what_a_tasks_quiet_episodes_have_seen():
    """Half of the prompts; the others are as without. Episode 3 and 7 of each task find nothing;
    in the coded data an episode has one state, so that a pool has one step of each beside copies.
    """
    data = toys.coded_dataset()
    data.rewards[..., 0] = 1  # all others find some
    data.rewards[:, [3, 7]] = 0
    data.returns = data.rewards.sum(-1)
    seen, pools, rows = set(), 0, 2000
    batch = sample(data, rows, 1, 2, pooled=4)
    whole = sample(data, rows, 1, 2)
    for row in range(rows):
        task, episode = batch.prompt.states[row].unbind(-1)
        assert (task == batch.task[row]).all()
        of = set(episode.tolist())
        if of <= {3, 7}:
            pools += 1
            assert (batch.prompt.rewards[row] == 0).all()
            seen.add(tuple(sorted(of)))
        else:
            assert torch.equal(batch.prompt.states[row], whole.prompt.states[row])
            assert torch.equal(batch.prompt.actions[row], whole.prompt.actions[row])
    assert seen == {(3,), (7,), (3, 7)}  # of one episode, of both, of no more than there are
    assert pools / rows == pytest.approx(0.5 + 0.5 * 0.2, abs=0.05)  # 2 of 10 by themselves
    # more than there are is all there are
    every, more = (sample(data, rows, 1, 2, pooled=n).prompt for n in (data.episodes, 99))
    assert torch.equal(every.states, more.states) and torch.equal(every.rewards, more.rewards)


# ------------------------------------------------------------------------------------ who sees whom
# Which prediction sees how many tokens: those at q and at every s_t; or queries of a given sight.
FIRST, LAST = [0, *range(1, 3 * N, 3)], [3 * N, 0, 3, 12]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("gate, place", [*product(CAUSAL, PLACES)])
def test_prediction_depends_on_the_past_alone(gate, place, shift):
    model = build("first", **gated(gate, place), token_shift=shift)
    seen = torch.arange(3 * N)[:, None] < torch.tensor(FIRST)
    assert torch.equal(toys.changes_by_token(model, draw(model)), seen)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("gate, place", DECODABLE)
def test_last_queries_depend_on_what_is_visible_alone(gate, place, shift):
    model = build("last", **gated(gate, place), token_shift=shift)
    batch = draw(model, queries=4)
    batch.visible[:] = torch.tensor(LAST) // 3
    seen = torch.arange(3 * N)[:, None] < torch.tensor(LAST)
    assert torch.equal(toys.changes_by_token(model, batch), seen)


@pytest.mark.parametrize("gate, place", [*product(EQ4, PLACES)])
def test_eq4_gate_of_the_whole_sequence_sees_the_future(gate, place):
    model = build("first", **gated(gate, place))
    # the last reward changes the first prediction
    assert toys.changes_by_token(model, draw(model))[-1, 0]


@pytest.mark.parametrize("moe", ["task", "both"])
def test_eq4_as_written_and_prefix_are_one_rule_for_queries_behind_a_prompt(moe):
    """A query ends a sequence of its own, and nothing else is read: values, losses, gradients."""
    found = []
    for routing in ("sequence", "prefix"):
        model = build("last", moe=moe, routing=routing)
        batch = draw(model, rows=4, queries=3)
        batch.visible[:] = torch.tensor([N, 0, 2])
        output = model(batch)
        (output.action.square().sum() + sum(output.losses.values())).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([output.action, *output.losses.values(), *gradients])
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_queries_behind_by_hand():
    view = queries_behind(4, torch.tensor([[4, 0], [1, 3]]))
    assert view.prompt == slice(0, 4) and view.visible.tolist() == [[4, 0], [1, 3]]
    want = [
        [[1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]],  # the prompt's four tokens, the two queries
        [[1, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1]],
    ]
    assert view.mask.shape == (2, 1, 2, 6) and view.mask[:, 0].int().tolist() == want


@pytest.mark.parametrize("gate", GATES)
def test_eq11_first_episode_has_no_prompt(gate):
    model = build("first", **gated(gate))
    full = draw(model)
    alone = model(replace(full, prompt=cut(full.prompt, 0), task=None)).action
    assert alone.shape == (2, 1, A) and not torch.allclose(alone[0], alone[1])
    if gate in CAUSAL:
        near(alone, model(full).action[:, :1])  # the read-out at q


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("gate, place", DECODABLE)
@torch.no_grad()
def test_last_queries_see_the_visible_prompt_and_not_one_another(gate, place, shift):
    model = build("last", **gated(gate, place), token_shift=shift)
    batch, order = draw(model, queries=4), torch.tensor([2, 0, 3, 1])
    states, visible = batch.query_states, batch.visible
    visible[:] = torch.tensor([N, 0, 1, 4])
    want, moved = model(batch).action, states.clone()
    moved[:, 1] = (moved[:, 1] + 1) % torch.tensor(GRID.state_values)
    changed = (model(replace(batch, query_states=moved)).action - want).abs().amax((0, 2)) > 1e-5
    assert changed.tolist() == [False, True, False, False]
    permuted = replace(batch, query_states=states[:, order], visible=visible[:, order])
    near(model(permuted).action, want[:, order])
    for i, m in enumerate(visible[0].tolist()):  # as if there were no more of the prompt
        one = {"query_states": states[:, i : i + 1], "visible": visible[:, i : i + 1]}
        alone = replace(batch, prompt=cut(batch.prompt, m), task=None, **one)
        near(model(alone).action, want[:, i : i + 1])


@pytest.mark.parametrize("gate", [("none", "prefix"), *EQ4, ("both", "prefix"), ("both", "token")])
def test_independent_episodes_may_come_in_any_order(gate):
    model = build("last", **gated(gate), independent=True, token_shift=True)
    assert change_by_order(model) < 1e-5
    model.stretch = 0  # the same weights, each episode reading those before it
    assert change_by_order(model) > 1e-4


@pytest.mark.parametrize(
    "gate, apart", [(("both", "token"), True), (("token", "prefix"), True), (("task", "prefix"), 0)]
)
def test_below_the_top_episodes_are_independent_without_a_mean_alone(gate, apart):
    """h_bar runs on over the episodes; what is above reads it: such settings are refused."""
    model = build("last", **gated(gate, "middle"), independent=True)
    assert (change_by_order(model) < 1e-5) == apart


@torch.no_grad()
def change_by_order(model):
    """How much the order of a prompt's four episodes changes the predictions."""
    batch = draw(model, steps=4 * T, queries=3)
    order = (T * torch.tensor([2, 0, 3, 1])[:, None] + torch.arange(T)).flatten()
    moved = replace(batch, prompt=steps_at(batch.prompt, order.expand(2, -1)))
    return (model(moved).action - model(batch).action).abs().max()


# ---------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("piece", [1, T])
@torch.no_grad()
def test_independent_episodes_are_decoded_one_by_one(piece):
    model = build("last", independent=True, token_shift=True, routing="prefix")
    batch, cache = draw(model, steps=3 * T), model.new_cache(2, 1)
    for start in range(0, 3 * T, piece):  # step by step, or an episode at once
        part = cut(batch.prompt, start + piece, start)
        model.decode(model.embed_prompt(part, start), cache)
    query = model.embed_query(batch.query_states)
    near(model.decode(query, cache, keep=False), model(batch).action[:, 0])


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("gate, place", DECODABLE)
@torch.no_grad()
def test_cached_query_equals_the_full_forward_pass_and_leaves_no_trace(gate, place, shift):
    model = build("last", **gated(gate, place), token_shift=shift)
    batch = draw(model, queries=3)
    cache = model.new_cache(2, 3 * T)  # full after the first episode

    def content():
        sides = (x[:, :, : 3 * steps] for x in cache.k + cache.v)
        return cache.h_sum, cache.previous, *sides

    for steps in (0, T, T + 1, N):
        if new := steps - cache.length // 3:
            part = cut(batch.prompt, steps, steps - new)
            model.decode(model.embed_prompt(part, steps - new), cache)
        before = [x.clone() for x in content()]
        visible = torch.full_like(batch.visible, steps)
        seen = replace(batch, prompt=cut(batch.prompt, steps), task=None, visible=visible)
        want = model(seen).action
        for i in range(3):
            query = model.embed_query(batch.query_states[:, i : i + 1])
            near(model.decode(query, cache, keep=False), want[:, i])
        assert cache.length == 3 * steps and all(map(torch.equal, before, content()))


# ------------------------------------------------------------------------------------- Algorithm 4
@pytest.mark.parametrize("memory", ["last", "all"])
@pytest.mark.parametrize("layout, independent", [("first", False), ("last", False), ("last", True)])
@torch.no_grad()
def test_algorithm4_plays_what_the_full_forward_pass_predicts(layout, memory, independent):
    options = {"prompt": memory, "actions": "greedy", "token_shift": True}
    options["independent"] = independent
    policy, predicted, history = toys.play_room(method(layout, toys.ROOM, **options))
    for i, logits in enumerate(predicted):
        # the first episode has no prompt; later ones the one before, or all of them
        e, t = divmod(i, 10)
        past = concatenate(history[max(0, e - 1) if memory == "last" else 0 : max(1, e)])
        past, state = past if e else cut(past, 0), history[e].states[:, t, None]
        near(logits, policy.model(toys.ask(past, state)).action[:, -1])
        assert torch.equal(history[e].actions[:, t], logits.argmax(-1))


@pytest.mark.parametrize("memory", ["last", "all"])
@pytest.mark.parametrize("layout", ["first", "last"])
@torch.no_grad()
def test_algorithm4_may_begin_behind_any_history(layout, memory):
    """The policy that has played the episodes, and one that is only told of them."""
    tiny = method(layout, toys.ROOM, prompt=memory, actions="greedy")
    played, _, history = toys.play_room(tiny)
    told = tiny.policy(tiny.cfg.play)
    states = history[0].states[:, 3]
    for count in (3, 4, 2):
        if count == 2:  # another game
            told.begin([], len(states))
        told.begin(history[:count], len(states))
        past = concatenate(history[count - 1 : count] if memory == "last" else history[:count])
        near(
            told.predict(states, slice(None)),
            played.model(toys.ask(past, states[:, None])).action[:, -1],
        )


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(
    ("memory", "want"), [("last", [0, 300, 300, 300]), ("all", [0, 300, 600, 900])]
)
def test_algorithm4_is_given_the_last_episode_or_all(monkeypatch, layout, memory, want):
    """The prompt of each episode, which does not grow while it is played."""
    tiny = method(layout, get_family("darkroom"), layers=2, prompt=memory)
    policy, lengths, seen = tiny.policy(tiny.cfg.play), [], []
    decode, forward, begin = T2MIR.decode, type(tiny.model).forward, policy.begin

    def decoded(self, tokens, cache, keep=True):
        if not keep:  # the query
            lengths.append(cache.length)
        return decode(self, tokens, cache, keep)

    def forwarded(self, batch):
        lengths.append(3 * batch.prompt.steps)
        return forward(self, batch)

    def began(history, rows):
        seen.append(set(lengths))
        lengths.clear()
        begin(history, rows)

    monkeypatch.setattr(T2MIR, "decode", decoded)
    monkeypatch.setattr(type(tiny.model), "forward", forwarded)
    monkeypatch.setattr(policy, "begin", began)
    play("darkroom", [[2, 2], [8, 6]], policy, 4)
    assert [*seen[1:], set(lengths)] == [{length} for length in want]


@torch.no_grad()
def test_algorithm4_of_pools_reads_the_best_episode_or_all_that_was_seen():
    """Task by task: one that has found a reward, and one that has not."""
    tiny = method("last", toys.ROOM, prompt="all", pooled=2, prompt_length=10, token_shift=True)
    policy, steps = tiny.policy(tiny.cfg.play), toys.ROOM.horizon
    rng = torch.Generator().manual_seed(0)
    history = []
    for rewarded in (1, 4, 2):
        states = torch.randint(3, (2, steps, 2), generator=rng)
        rewards = torch.zeros(2, steps)
        rewards[0, :rewarded] = 1
        history.append(Prompt(states, torch.randint(5, (2, steps), generator=rng), rewards))
    policy.begin(history, 2)
    query = torch.tensor([[1, 2], [2, 0]])
    got = policy.predict(query, slice(None))
    best, past = history[1], concatenate(history)
    # by hand: from the newest on, the first step of a state that has not come yet; then the rest
    newest = list({tuple(past.states[1, t].tolist()): t for t in range(3 * steps)}.values())
    rest = [t for t in reversed(range(3 * steps)) if t not in newest]
    keep = sorted([*newest, *rest][:steps])
    assert len(newest) <= steps and len(keep) == steps
    want = [
        policy.model(toys.ask(cut(best, steps), query[:, None])).action[0, -1],
        policy.model(
            toys.ask(
                Prompt(past.states[:, keep], past.actions[:, keep], past.rewards[:, keep]),
                query[:, None],
            )
        ).action[1, -1],
    ]
    near(got, torch.stack(want))


@pytest.mark.parametrize("first", ["policy", "random"])
@pytest.mark.parametrize("memory", ["last", "all"])
@pytest.mark.parametrize("layout", ["first", "last"])
@torch.no_grad()
def test_algorithm4_with_continuous_numbers(layout, memory, first):
    tiny = toys.point_method(layout, prompt=memory, first=first)
    episodes, want = toys.play_points(tiny), []
    for e, episode in enumerate(episodes):
        past = toys.no_points()
        if e:
            past = concatenate(episodes[e - 1 : e] if memory == "last" else episodes[:e])
        predicted = [
            tiny.model(toys.ask(toys.shown(past), query)).action[:, -1]
            for query in toys.shown(episode).states.split(1, 1)
        ]
        want.append(torch.stack(predicted, 1))
    toys.check_point_actions(episodes, want, first)
