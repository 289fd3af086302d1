"""test_dpt.py: T2MIR-DPT (Sec. 4.3; Eq. 11; Algorithm 3).

The loss by hand, the sampler on data that tell where they are from; predictions by changing one
token at a time; queries behind the prompt against shorter prompts.
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
    # a task that has none keeps its prompts
    data.rewards[0, [3, 7], 0] = 1
    data.rewards[0, :, 1] = 2
    none, plain = sample(data, rows, 1, 2, pooled=4), sample(data, rows, 1, 2)
    of_first = none.task == 0
    assert torch.equal(none.prompt.states[of_first], plain.prompt.states[of_first])
    assert not torch.equal(none.prompt.states[~of_first], plain.prompt.states[~of_first])
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
