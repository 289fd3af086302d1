"""test_dpt_plays.py: how T2MIR-DPT plays (Algorithm 4), from caches and from full passes.

A prompt decoded piece by piece against one pass over all of it; Algorithm 4 in the DarkRoom and on
Point-Robot.
Run: python -m pytest -q tests/test_dpt_plays.py
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import toys
from torch.testing import assert_close
from toys import DECODABLE, N, T, build, cut, draw, gated, method

from data import Prompt
from envs import get_family
from evaluate import play
from models import T2MIR
from policies import concatenate

near = partial(assert_close, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("shift", [False, True])
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
