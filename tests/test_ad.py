"""test_ad.py: T2MIR-AD (Sec. 4.3; Eq. 9, 10; Algorithms 1 and 2).

The loss by hand, the sampler on data that tell where they are from; predictions by changing one
token at a time; decoding against the full forward pass; Algorithm 2 in the DarkRoom and on
Point-Robot, with and without a cache.
Run: python -m pytest -q tests/test_ad.py
"""

import math
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
    N,
    build,
    cut,
    draw,
    gated,
    method,
)

from ad import AD, ADBatch, ADModel, eq10_imitation_loss, sample_ad, sort_and_drop
from data import Prompt
from envs import get_family
from evaluate import play
from models import T2MIR, ModelSettings
from policies import concatenate

near = partial(assert_close, atol=1e-5, rtol=0)
SHIFTS = (False, True)


# ------------------------------------------------------------------------------------------- Eq. 10
def cross_entropy(logits, label):
    return math.log(sum(math.exp(x) for x in logits.tolist())) - logits[label].item()


def stub(tiny, action):
    """The method, with these predictions in the place of its network's."""
    tiny.forward = lambda batch: SimpleNamespace(action=action, losses={}, metrics={})
    return tiny


def test_eq10_is_the_cross_entropy_of_each_steps_own_action():
    """In every row: both draws of a task are imitated, the query's and the key's."""
    action, taken = torch.randn(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    batch = ADBatch(Prompt(torch.zeros(2, 3, 2), taken, torch.zeros(2, 3)), torch.zeros(2))
    want = sum(cross_entropy(action[b, t], taken[b, t]) for b in range(2) for t in range(3)) / 6
    assert eq10_imitation_loss(action, taken, True).item() == pytest.approx(want, rel=1e-5)
    terms, _ = stub(method(), action).losses(batch)
    assert terms["imitation"].item() == pytest.approx(want, rel=1e-5)


def test_eq10_of_continuous_actions_is_the_squared_error():
    action, taken = torch.tensor([[[0.0, 1], [2, 0]]]), torch.tensor([[[0.5, 0.5], [0, 0]]])
    batch = ADBatch(Prompt(torch.zeros(1, 2, 2), taken, torch.zeros(1, 2)), torch.zeros(1))
    terms, _ = stub(method("ad", PLANE), action).losses(batch)
    assert terms["imitation"].item() == pytest.approx((0.25 + 0.25 + 4 + 0) / 4)


@pytest.mark.parametrize("discrete", [True, False])
def test_eq10_is_float32_under_autocast(discrete):
    torch.manual_seed(0)
    action = torch.randn(2, 3, 5).bfloat16()
    target = torch.randint(5, (2, 3)) if discrete else torch.rand(2, 3, 5)
    want = eq10_imitation_loss(action.float(), target, discrete)
    with torch.autocast("cpu", torch.bfloat16):
        got = eq10_imitation_loss(action, target, discrete)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_keys_of_another_batch_need_two_draws():
    with pytest.raises(ValueError, match="--keys other needs two draws") as error:
        AD.check(toys.config(keys="other", draws=1), GRID)
    assert "\n" not in str(error.value)
    AD.check(toys.config(keys="other", draws=2), GRID)


# ------------------------------------------------------------------------------------- Algorithm 1
def test_ad_prompts_are_whole_episodes_ascending_by_return():
    data, steps = toys.coded_dataset(), 100
    batch = sample_ad(data, 16, 4, 2, torch.Generator().manual_seed(0))
    assert batch.prompt.states.shape == (16, 4 * steps, 2) and batch.prompt.steps == 4 * steps
    assert batch.prompt.actions.shape == batch.prompt.rewards.shape == (16, 4 * steps)
    whole = batch.prompt.states, batch.prompt.actions, batch.task
    assert all(numbers.dtype == torch.int64 for numbers in whole)
    assert batch.prompt.rewards.dtype == torch.float32
    task, episode = toys.episodes_of(batch)
    toys.check_contents(data, batch, task, episode)
    assert all(len(set(row)) == 4 for row in episode.tolist())  # different episodes
    returns = batch.prompt.rewards.unflatten(1, (4, steps)).sum(-1)
    assert (returns.diff(dim=1) >= 0).all() and (returns.diff(dim=1) > 0).any()
    assert torch.equal(returns, data.returns[task[:, None], episode])


def test_best_ends_a_prompt_with_one_of_the_tasks_best_and_imitates_that_alone():
    data, steps = toys.coded_dataset(), 100
    draw = partial(sample_ad, data, 64, 3, 2)
    batch = draw(torch.Generator().manual_seed(0), 0.25)
    task, episode = toys.episodes_of(batch)
    rank = (data.order[task][:, None] == episode[..., None]).int().argmax(-1)  # (B, 3)
    assert (rank.diff(dim=1) > 0).all()  # ascending, and three different ones
    among = max(1, round(0.25 * data.episodes))
    assert (rank[:, -1] >= data.episodes - among).all()
    assert set(rank[:, -1].tolist()) == set(range(data.episodes - among, data.episodes))
    any_of_them = draw(torch.Generator().manual_seed(0))
    assert (toys.episodes_of(any_of_them)[1].max(1).values != episode[:, -1]).any()

    learner = method("ad", data.family, best=0.25)
    action = torch.randn(*batch.prompt.actions.shape, 5, requires_grad=True)
    terms, _ = stub(learner, action).losses(batch)
    terms["imitation"].backward()
    read = action.grad.abs().sum((0, 2)) > 0
    assert read.tolist() == [False] * 2 * steps + [True] * steps


# ------------------------------------------------------------------------------------ who sees whom
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("gate, place", [*product(CAUSAL, PLACES)])
def test_prediction_depends_on_the_past_alone(gate, place, shift):
    """a_t is predicted at s_t, the token 3t: its own a_t and r_t come later."""
    model = build(**gated(gate, place), token_shift=shift)
    seen = torch.arange(3 * N)[:, None] < torch.arange(1, 3 * N, 3)
    assert torch.equal(toys.changes_by_token(model, draw(model)), seen)


@pytest.mark.parametrize("gate", CAUSAL[-2:])
def test_continuous_prediction_depends_on_the_past_alone(gate):
    model = build("ad", PLANE, **gated(gate))
    seen = torch.arange(3 * N)[:, None] < torch.arange(1, 3 * N, 3)
    assert torch.equal(toys.changes_by_token(model, draw(model)), seen)


@pytest.mark.parametrize("gate, place", [*product(EQ4, PLACES)])
def test_eq4_gate_of_the_whole_sequence_sees_the_future(gate, place):
    model = build(**gated(gate, place))
    # the last reward changes the first prediction
    assert toys.changes_by_token(model, draw(model))[-1, 0]


# ---------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("gate, place", DECODABLE)
@torch.no_grad()
def test_cached_ad_equals_the_full_forward_pass(gate, place, shift):
    model = build(**gated(gate, place), token_shift=shift)
    batch = draw(model, steps=N + 2)  # the third episode has begun
    # Eq. 4 of what is past
    past = (gate[0], "prefix") if gate in EQ4 else gate
    twin = build(**gated(past, place), token_shift=shift)
    want, tokens = twin(batch).action, model.embed_prompt(batch.prompt)
    cache = model.new_cache(2, 1)  # one token at a time, from the smallest capacity
    for i in range(3 * N + 4):
        action = model.decode(tokens[:, i : i + 1], cache)
        if i % 3 == 0:
            near(action, want[:, i // 3])
    assert cache.length == 3 * N + 4 <= cache.k[0].shape[2]
    # as ADPolicy does it: whole episodes, then s_0, then a_0 r_0 s_1
    cache = model.new_cache(2, 3 * N)
    model.decode(model.embed_prompt(cut(batch.prompt, N)), cache)
    now = model.embed_prompt(cut(batch.prompt, N + 2, N))
    near(model.decode(now[:, :1], cache), want[:, N])
    near(model.decode(now[:, 1:4], cache), want[:, N + 1])
    for t in (0, 3, N + 1):
        # those of the last step are not read
        batch.prompt.actions[:, t], batch.prompt.rewards[:, t] = 0, 9.0
        near(model.last_action(cut(batch.prompt, t + 1)), want[:, t])
        batch = draw(model, steps=N + 2)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_last_action_reads_all_but_its_own_action_and_reward(gate, place):
    """Also where nothing can be decoded."""
    model = build(**gated(gate, place))
    prompt = draw(model).prompt
    before = model.last_action(prompt)
    prompt.actions[:, -1], prompt.rewards[:, -1] = 0, 9.0
    assert torch.equal(model.last_action(prompt), before)
    prompt.rewards[:, -2] = 9.0
    assert not torch.equal(model.last_action(prompt), before)


# ------------------------------------------------------------------------------------- Algorithm 2
def test_algorithm2_sort_and_drop_by_hand():
    # K = 3. Returns of task 0: 3 1 1 2 1, of task 1: 0 0 5 0 0; below, the episodes kept. Fourth:
    # of the equally low episodes the oldest goes (task 0: 1 before 2; task 1: 0 before 1 and 3).
    kept, played = [], [(3.0, 0.0), (1.0, 0.0), (1.0, 5.0), (2.0, 0.0), (1.0, 0.0)]
    want = [
        [[0], [0]],
        [[1, 0], [0, 1]],
        [[1, 2, 0], [0, 1, 2]],
        [[2, 3, 0], [1, 3, 2]],
        [[4, 3, 0], [3, 4, 2]],
    ]
    for i, (returns, numbers) in enumerate(zip(played, want, strict=True)):
        rewards = torch.tensor([[r - 1, 1.0] for r in returns])
        new = Prompt(torch.full((2, 2, 1), i), torch.full((2, 2), i), rewards)
        kept = sort_and_drop([*kept, new], 3)
        assert torch.stack([p.actions[:, 0] for p in kept], 1).tolist() == numbers
        for p in kept:
            assert torch.equal(p.states[..., 0], p.actions)
            earned = [played[n][task] for task, n in enumerate(p.actions[:, 0])]
            assert p.rewards.sum(1).tolist() == earned


def test_algorithm2_of_all_episodes_at_once_is_that_of_one_after_another():
    """Bit for bit, also where many episodes return the same."""
    g, history, kept = torch.Generator().manual_seed(0), [], []
    for i in range(30):
        rewards = torch.randint(2, (50, 1), generator=g) * torch.randn(50, 7, generator=g)
        history.append(Prompt(torch.full((50, 7, 1), i), torch.full((50, 7), i), rewards))
        kept = sort_and_drop([*kept, history[-1]], 4)
        for one, other in zip(kept, sort_and_drop(history, 4), strict=True):
            assert torch.equal(one.actions, other.actions)
            assert torch.equal(one.rewards, other.rewards)
    ties = torch.stack([p.rewards.sum(1) for p in history]) == 0
    assert (ties.sum(0) > 4).all()


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("gate", [("both", "sequence"), ("both", "prefix")])
@torch.no_grad()
def test_algorithm2_plays_the_same_with_and_without_a_cache(monkeypatch, gate, shift):
    def play_greedily():
        options = {"history": 2, "actions": "greedy", "token_shift": shift}
        return toys.play_room(method("ad", toys.ROOM, **gated(gate), **options))

    policy, cached, history = play_greedily()
    # those of the fourth episode
    for kept, want in zip(policy.kept, sort_and_drop(history[:3], 2), strict=True):
        assert torch.equal(kept.actions, want.actions)
    monkeypatch.setattr(ModelSettings, "decodable", property(lambda self: False))
    monkeypatch.setattr(T2MIR, "decode", None)
    _, plain, same = play_greedily()
    assert all(torch.equal(p.actions, q.actions) for p, q in zip(history, same, strict=True))
    near(cached, plain)


@pytest.mark.parametrize("routing", ["prefix", "sequence"])
def test_algorithm2_keeps_the_best_episodes_of_its_history(monkeypatch, routing):
    """K = 2: nothing, one and two episodes before the running one, and never a third."""
    tiny = method("ad", get_family("darkroom"), layers=2, routing=routing, history=2)
    policy, lengths, decode = tiny.policy(tiny.cfg.play), [], T2MIR.decode

    def watched(self, tokens, cache, keep=True):
        lengths.append(cache.length + tokens.shape[1])
        return decode(self, tokens, cache, keep)

    monkeypatch.setattr(T2MIR, "decode", watched)
    returns = play("darkroom", [[0, 1], [1, 0], [1, 1]], policy, 5)
    assert max(lengths) == 3 * 100 * 3 - 2  # two episodes, and 99 steps with the last state
    ends = [length for length in lengths if length % 300 == 298]
    assert ends == [298, 598, 898, 898, 898]
    policy.begin([], 3)
    states, actions = torch.zeros(3, 100, 2).long(), torch.zeros(3, 100).long()
    past = [Prompt(states, actions, torch.full((3, 100), r)) for r in (0.5, 0.2, 0.1, 0.3)]
    kept = []
    for i in range(4):
        policy.begin(past[: i + 1], 3)
        kept.append([round(p.rewards[0, 0].item(), 1) for p in policy.kept])
    assert kept == [[0.5], [0.2, 0.5], [0.2, 0.5], [0.3, 0.5]] and returns.shape == (3, 5)


@pytest.mark.parametrize("first", ["policy", "random"])
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_algorithm2_with_continuous_numbers(monkeypatch, cached, first):
    """Step by step with a cache, or the whole context each time: one pass over each episode."""
    tiny = toys.point_method("ad", history=2, first=first)
    with monkeypatch.context() as patch:
        if not cached:
            patch.setattr(ModelSettings, "decodable", property(lambda self: False))
            patch.setattr(T2MIR, "decode", None)
        episodes = toys.play_points(tiny)
    kept, want = [], []
    for episode in episodes:
        whole = ADBatch(toys.shown(concatenate([*kept, episode])), torch.arange(3))
        want.append(tiny.model(whole).action[:, -20:])
        kept = sort_and_drop([*kept, episode], 2)
    toys.check_point_actions(episodes, want, first)
    assert isinstance(tiny.model, ADModel)
