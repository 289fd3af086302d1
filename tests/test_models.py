"""test_models.py: the transformer that all layouts share (Sec. 4.3, App. F; Eq. 4, 9-11).

Attention and embeddings against slow loops; where the MoE stands and what its router reads; what a
cache changes (nothing). Who sees whom: test_ad.py, test_dpt.py. Training: test_methods.py.
Run: python -m pytest -q tests/test_models.py
"""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import toys
from torch.testing import assert_close
from toys import GATES, GRID, LAYOUTS, PLACES, PLANE, N, T, build, cut, draw, method

from models import ModelSettings
from moe import Experts, View
from support import attention as fast
from support.attention import attention, in_stretches
from support.settings import check_types

FAMILIES = pytest.mark.parametrize("family", [GRID, PLANE], ids=lambda family: family.name)
near = partial(assert_close, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------- attention
def slow_attention(q, k, v, sees=None):
    """softmax(q k^T / sqrt(d)) v, one query at a time; query i stands at key i + keys - queries."""
    outputs = []
    for i in range(q.shape[2]):
        score = (q[:, :, i, None] * k).sum(-1) / q.shape[3] ** 0.5  # (B, H, keys)
        hidden = torch.arange(k.shape[2]) > i + k.shape[2] - q.shape[2]
        if sees is not None:
            hidden = ~sees[:, :, i]
        weight = score.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append((weight[..., None] * v).sum(2))
    return torch.stack(outputs, 2)


def qkv(s, keys, d, **options):
    torch.manual_seed(0)
    return [torch.randn(2, 3, n, d, **options) for n in (s, keys, keys)]


def agree(fast, slow, leaves):
    """Equal values, and equal gradients in a random direction."""
    assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    direction = torch.randn_like(slow)
    gradients = [torch.autograd.grad((y * direction).sum(), leaves) for y in (fast, slow)]
    assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("d", [8, 16, 32])
@pytest.mark.parametrize(
    "s, keys, masked", [(7, 7, False), (3, 7, False), (1, 7, False), (1, 1, False), (4, 7, True)]
)
def test_attention_matches_loop(s, keys, masked, d):
    leaves, mask = [x.requires_grad_() for x in qkv(s, keys, d)], None
    if masked:
        mask = torch.rand(2, 1, s, keys) < 0.5
        mask[..., 2] = True  # every query sees something
    agree(attention(*leaves, mask), slow_attention(*leaves, mask), leaves)


def test_stretches_match_a_mask_of_blocks():
    leaves, place = [x.requires_grad_() for x in qkv(12, 12, 16)], torch.arange(12)
    same = place[:, None] // 4 == place // 4
    block = (same & (place[:, None] >= place)).expand(2, 1, 12, 12)
    agree(in_stretches(*leaves, 4), slow_attention(*leaves, block), leaves)
    assert torch.equal(in_stretches(*leaves, 12), attention(*leaves))  # one: plain causal attention


class OnCuda(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    is_cuda = property(lambda self: True)


@pytest.fixture
def flash(monkeypatch):
    """flash-attn by its documentation; the numbers of queries and keys it was called with."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **options):
        assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
        assert causal and not dropout_p and not options
        q, k, v = (x.as_subclass(torch.Tensor) for x in (q, k, v))  # (B, S, H, d)
        scale = softmax_scale or q.shape[-1] ** -0.5
        score = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * scale
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        hidden = j > i + k.shape[1] - q.shape[1]  # aligned bottom right
        weight = score.masked_fill(hidden, -torch.inf).softmax(-1)
        calls.append((q.shape[1], k.shape[1]))
        return torch.einsum("bhij,bjhd->bihd", weight, v.float()).to(q.dtype)

    monkeypatch.setattr(fast, "flash_attn_func", flash_attn_func)
    return calls


@pytest.mark.parametrize("s, keys", [(7, 7), (3, 7), (1, 7)])
def test_flash_attn_is_called_by_its_contract(flash, s, keys):
    full = qkv(s, keys, 16)
    half, mask = [x.bfloat16() for x in full], torch.ones(2, 1, s, keys, dtype=torch.bool)
    want = attention(*half)
    attention(*(x.as_subclass(OnCuda) for x in full))
    attention(*(x.as_subclass(OnCuda) for x in half), mask)
    assert flash == []  # neither on the CPU, nor in full precision, nor with a mask
    got = attention(*(x.as_subclass(OnCuda) for x in half)).as_subclass(torch.Tensor)
    assert flash == [(s, keys)]
    assert_close(got, want, atol=0.02, rtol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash-attn needs a CUDA device")
@pytest.mark.parametrize("s, keys", [(64, 64), (5, 64), (1, 64)])
def test_flash_attn_itself(monkeypatch, s, keys):
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    half = qkv(s, keys, 32, dtype=torch.bfloat16, device="cuda")
    got = attention(*half)
    monkeypatch.setattr(fast, "flash_attn_func", None)
    assert_close(got, attention(*half), atol=0.02, rtol=0.02)


# -------------------------------------------------------------------------------------- the network
@pytest.mark.parametrize(
    "why, changes",
    [
        ("--width 18 is not a multiple of --heads 4", {"width": 18, "heads": 4}),
        ("--width 15 is odd", {"width": 15, "heads": 3}),
        ("--heads 0: it should be greater than or equal to 1", {"heads": 0}),
        ("--layers", {"layers": 0}),
        ("--dropout 1.0", {"dropout": 1.0}),
        ("--dropout -0.1", {"dropout": -0.1}),
        ("--top-k 0", {"top_k": 0}),
        ("--top-k 5 is above --token-experts 4", {"top_k": 5, "token_experts": 4}),
        ("--top-k 6 is above --task-experts 5", {"top_k": 6, "task_experts": 5}),
        ("--token-top-k 7 is above --token-experts 6", {"token_top_k": 7}),
        ("--top-k 9 is above --task-experts 8", {"top_k": 9, "token_top_k": 2}),
        ("--task-experts 0: it should be greater", {"top_k": 0, "task_experts": 0}),
        ("--token-hidden 33 is not a multiple of --token-experts 6", {"token_hidden": 33}),
        ("--task-hidden 0", {"task_hidden": 0}),
    ],
)
def test_settings_refuse(why, changes):
    with pytest.raises(ValueError) as error:
        check_types(ModelSettings(**changes))
    assert why in str(error.value) and "\n" not in str(error.value)


def test_the_token_router_may_keep_another_number():
    for given, want in ((0, (2, 2)), (1, (1, 2)), (4, (4, 2))):
        moe = method(token_top_k=given).model.blocks[-1].ff
        assert (moe.token_router.k, moe.task_k) == want


def test_moe_replaces_one_feed_forward_layer():
    # App. G.2: the first, the L/2-th (counted from 1) or the last block.
    # Without MoE it is 1.5 times wider.
    places = ("top", 4, 3), ("middle", 4, 1), ("middle", 6, 2), ("bottom", 4, 0)
    for moe, (position, layers, place) in product(("both", "token", "task", "none"), places):
        model = method(moe=moe, moe_position=position, layers=layers).model
        special = 36 if moe == "none" else None
        hidden = [None if b.has_experts else b.ff[0].out_features for b in model.blocks]
        assert hidden == [special if i == place else 24 for i in range(layers)]


def test_plain_model_has_as_many_active_weights():
    # k = 2 experts of 128 hidden units in each half: 2 * 2 * 128 * (64 + 32) = 49152 = 2 * 64 * 384
    size = {"width": 64, "ff": 256, "token_experts": 6, "task_experts": 12}
    size |= {"token_hidden": 768, "task_hidden": 1536}
    plain = method(moe="none", **size).model.blocks[-1].ff
    assert sum(p.numel() for p in plain.parameters() if p.dim() == 2) == 49152
    # one MoE alone gives all 64 numbers itself: 2 * 128 * (64 + 64)
    for moe, want in (("both", 49152), ("token", 32768), ("task", 32768)):
        parts = method(moe=moe, **size).model.blocks[-1].ff.children()
        experts = [part for part in parts if isinstance(part, Experts)]
        assert want == sum(2 * (e.weight1[0].numel() + e.weight2[0].numel()) for e in experts)


@FAMILIES
@pytest.mark.parametrize("layout, first", [("ad", 0), ("first", 1)])
def test_eq9_eq11_prompt_embedding_matches_loop(layout, first, family):
    # times 0..T-1, or 1..T and 0 for the query
    model = build(layout, replace(family, reward_scale=4.0))
    prompt, time = draw(model, steps=N + 1).prompt, model.embed_time.weight
    bias, table = model.modality_bias, model.embed_state.weight

    def state_token(s):
        if family is PLANE:
            return s @ table.T + model.embed_state.bias + bias[0]
        x, y = s.T  # of 4 x 5 cells: rows 0-3 of the table are of x, 4-8 of y
        place = torch.stack([2 * x / 3 - 1, 2 * y / 4 - 1], -1) @ model.embed_place.weight.T
        return table[x] + table[4 + y] + place + bias[0]

    if layout == "first":
        near(model.embed_query(prompt.states), model.state_token(prompt.states) + time[0])
    for start, steps in ((0, N + 1), (2, 2)):
        want = []
        for t in range(steps):
            s, a, r = prompt.states[:, t], prompt.actions[:, t], prompt.rewards[:, t, None]
            action = model.embed_action(a) if family is PLANE else model.embed_action.weight[a]
            reward = r / 4 * model.embed_reward.weight[:, 0] + model.embed_reward.bias
            tokens = [state_token(s), action + bias[1], reward + bias[2]]
            place = time[first + (start + t) % T]  # restarts with every episode
            want += [token + place for token in tokens]
        near(model.embed_prompt(cut(prompt, steps), start), torch.stack(want, 1))


@FAMILIES
def test_the_gain_is_of_continuous_numbers_alone(family):
    plain, four = (method("last", family, embed_gain=gain).model for gain in (1.0, 4.0))
    gains = {
        name: (new / old).mean().item()
        for (name, new), old in zip(four.named_parameters(), plain.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    numbers = ("state", "action", "reward") if family is PLANE else ("reward",)
    assert gains == {f"embed_{name}.weight": pytest.approx(4) for name in numbers}


def test_grid_coordinates_are_embedded_one_by_one_and_added():
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    e = build().state_token(cells).view(4, 5, -1)
    near(e - e[:, :1], (e - e[:, :1])[:1].expand_as(e))  # y says the same in every column
    # and every x and every y something else
    assert torch.linalg.matrix_rank(e.flatten(0, 1)) == 1 + 3 + 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_shift_stays_within_an_episode_and_spares_queries(layout):
    model, seen = build(layout, token_shift=True), []
    model.shift.data = torch.linspace(-1, 1, 16)
    batch = draw(model)
    model.blocks[0].norm1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(batch)
    e = model.embed_prompt(batch.prompt).unflatten(1, (N // T, 3 * T))  # episodes
    want = torch.cat([e[:, :, :1], e[:, :, 1:] + model.shift * e[:, :, :-1]], 2).flatten(1, 2)
    if layout != "ad":
        parts = [model.embed_query(batch.query_states), want]
        want = torch.cat(parts if layout == "first" else parts[::-1], 1)
    near(seen[0], want)


@FAMILIES
@pytest.mark.parametrize(
    "layout, queries, reads, before, after",
    [("ad", 1, N, 0, 0), ("first", 1, N + 1, 1, 0), ("last", 4, 4, 0, 4)],
)
def test_eq10_eq11_read_outs(layout, queries, reads, before, after, family):
    model, seen = build(layout, family), []
    model.head.weight.data *= 20
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    output = model(draw(model, queries=queries))
    assert output.action.shape == (2, reads, family.action_dim) and seen[0].abs().max() > 1
    want = seen[0] if family.discrete_actions else seen[0].tanh()  # logits, or in [-1, 1]
    assert torch.equal(output.action, want)
    assert output.modality.tolist() == [3] * before + [0, 1, 2] * N + [3] * after


# ---------------------------------------------------------------------------------- the MoE in it
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ["sequence", "prefix", "token"])
def test_eq4_what_the_task_router_reads(layout, routing):
    model, seen = build(layout, routing=routing), {}
    batch, block = draw(model, rows=4, queries=3 if layout == "last" else 1), model.blocks[-1]
    block.norm2.register_forward_hook(lambda module, inputs, output: seen.update(h=output))
    block.ff.task_router.register_forward_pre_hook(
        lambda module, inputs: seen.update(h_bar=inputs[0])
    )
    if layout == "last":
        batch.visible[:, 1:] = torch.tensor([0, 4])
    output, h = model(batch), seen["h"]
    tau, read = h, range(0, 3 * N, 3)
    if layout == "first":  # the query is before the prompt's tokens, but not one of them
        tau, read = h[:, 1:], [0, *range(1, 3 * N + 1, 3)]
    past = [h[:, : i + 1] for i in read]
    if layout == "last":  # a query is a sequence of its own: what it sees, and itself
        tau, read = h[:, : 3 * N], range(3 * N, 3 * N + 3)
        past = [
            torch.cat([h[:, : 3 * m], h[:, i, None]], 1)
            for m, i in zip((N, 0, 4), read, strict=True)
        ]
    want = h[:, list(read)] if routing == "token" else torch.stack([p.mean(1) for p in past], 1)
    near(seen["h_bar"], h.mean(1) if routing == "sequence" and layout != "last" else want)
    got = output.metrics["info_nce"], output.metrics["accuracy"]  # Eq. 7
    contrast = block.ff.task_router.contrast
    near(got, contrast(tau if routing == "token" else tau.mean(1), batch.task))
    near(output.losses["contrastive"], 0.01 * got[0])
    if layout != "ad":
        other = contrast(h if routing == "token" else h.mean(1), batch.task)
        assert (got[0] - other[0]).abs() > 1e-4  # the queries would show


@pytest.mark.parametrize("routing", ["sequence", "prefix", "token"])
def test_eq7_does_not_contain_the_query_in_front(routing):
    """Where attention passes nothing on, Eq. 7 cannot know the query; the gate of Eq. 4 does."""
    model = build("first", routing=routing, moe_position="bottom")
    batch = draw(model, rows=4)
    model.blocks[0].attention.out.requires_grad_(False).weight.zero_()
    before = model(batch)
    batch.query_states = (batch.query_states + 1) % torch.tensor(GRID.state_values)
    after = model(batch)
    assert not torch.equal(before.action, after.action)
    assert torch.equal(before.metrics["info_nce"], after.metrics["info_nce"])
    assert before.metrics["info_nce"] > 0.1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layers_losses_are_terms_of_the_methods(layout, place):
    tiny, seen = method(layout, routing="prefix", moe_position=place, w_contrastive=0.5), []
    model = tiny.model.train()
    layer = model.blocks[model.cfg.moe_block].ff
    layer.register_forward_hook(lambda _, inputs, out: seen.append(out))
    terms, metrics = tiny.losses(draw(model, rows=4))
    assert list(terms) == ["imitation", "balance", "contrastive"]
    assert terms["balance"] > 0 and terms["contrastive"] > 0
    assert terms | seen[0].losses == terms and metrics == seen[0].metrics
    sum(terms.values()).backward()
    assert layer.task_router.w.grad.abs().max() > 0
    assert layer.token_router.router.first.weight.grad.abs().max() > 0


@pytest.mark.parametrize("place", PLACES)
def test_eq8_the_key_router_follows_after_a_step(place):
    tiny = method(momentum=0.75, moe_position=place)
    router = tiny.model.blocks[tiny.model.cfg.moe_block].ff.task_router
    router.query.second.weight.data += 1
    tiny.after_step()
    near(router.key.second.weight, router.query.second.weight - 0.75)
    for moe in ("token", "none"):  # nothing to move
        method(moe=moe).after_step()


# ---------------------------------------------------------------------------------------- decoding
def test_what_can_be_decoded():
    """All but a gate of the whole sequence below the top: keys above were of an older gate."""
    for (moe, routing), place in product(GATES, PLACES):
        stale = moe in ("both", "task") and routing == "sequence" and place != "top"
        tiny = method(moe=moe, routing=routing, moe_position=place).model
        assert tiny.cfg.decodable != stale
        if stale:
            with pytest.raises(ValueError, match="cannot be cached"):
                tiny.new_cache(2, 8)
    # the first block is the last
    assert method(layers=1, moe_position="bottom", routing="sequence").model.cfg.decodable


@pytest.mark.parametrize("routing", ["prefix", "token"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
@torch.no_grad()
def test_a_block_with_a_cache_gives_what_it_gives_without(place, routing):
    model = build(routing=routing, moe_position="middle")
    block, x = model.blocks[place], torch.randn(2, 11, 16)
    want, moe = block(x, View(slice(0, 11)))
    cache, start = model.new_cache(2, 1), 0
    for count in (4, 1, 6):
        part = x[:, start : start + count]
        got, new = block(part, View(slice(0, count)), cache)
        near(got, want[:, start : start + count])
        last, _ = block(part, View(slice(0, count)), cache, torch.tensor([count - 1]))
        near(last, got[:, -1:])
        cache.length = start = start + count
        assert (new is None) == (moe is None) == (place != 1)
        if new is not None:
            cache.h_sum = new.total


@pytest.mark.parametrize("gate, place", toys.DECODABLE)
@torch.no_grad()
def test_decoding_one_token_at_a_time_gives_what_a_whole_pass_gives(gate, place):
    """With every rule in moe.py: the cache, and a pass over the tokens up to each state."""
    model = build(**toys.gated(gate, place))
    prompt = draw(model).prompt
    tokens, cache = model.embed_prompt(prompt), model.new_cache(2, 1)
    for i in range(3 * N):
        action = model.decode(tokens[:, i : i + 1], cache)
        if i % 3 == 0:
            near(action, model.last_action(cut(prompt, i // 3 + 1)))
