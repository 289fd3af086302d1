"""test_models.py: T2MIR-AD and T2MIR-DPT (Sec. 4.3, App. F; Eq. 4, 9-11) and their policies (Algorithms 2 and 4).

Attention and embeddings against slow loops; the token layouts and who sees whom, by changing one token at a
time; decoding with a cache against the full forward pass; the policies on DarkRoom; small batches learnt by heart.
Run: python -m pytest -q tests/test_models.py
"""

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import models
from data import ADBatch, DPTBatch, Prompt
from families.rooms import BatchedDarkRoom
from models import T2MIR, ModelConfig, attention
from policies import ADPolicy, DPTPolicy, concatenate, sort_and_drop
from train import imitation_loss

T, N, A = 3, 6, 3  # horizon, steps of a prompt (two episodes), actions
CONTINUOUS = {"state_dim": 3, "state_values": None, "action_dim": 2, "discrete_actions": False}
LAYOUTS, POSITIONS = (
    ("ad", "first", "last"),
    ("top", "middle", "bottom"),
)  # DPT by the place of its query
PAIRS = [
    ("none", "sequence"),
    ("token", "sequence"),
    *product(("task", "both"), ("prefix", "token")),
]
CAUSAL = [
    {"moe": m, "routing": r} for m, r in PAIRS
]  # with these, the past alone makes a prediction
EQ4 = [{"moe": m, "routing": "sequence"} for m in ("task", "both")]
SHIFTS = [{"token_shift": False}, {"token_shift": True}]
EVERY = [g | {"moe_position": p} | s for g, p, s in product(CAUSAL, POSITIONS, SHIFTS)]
CACHEABLE = [*EVERY, *(g | {"moe_position": "top"} | s for g, s in product(EQ4, SHIFTS))]
near = partial(assert_close, atol=1e-5, rtol=0)


def name(value):
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


def config(layout="ad", **changes):
    small = {
        "horizon": T,
        "state_dim": 2,
        "state_values": (4, 5),
        "action_dim": A,
        "discrete_actions": True,
    }
    small |= {
        "layers": 4,
        "heads": 2,
        "width": 16,
        "ff": 24,
        "token_experts": 4,
        "token_hidden": 32,
    }
    small |= {"task_experts": 5, "task_hidden": 40}
    place = {} if layout == "ad" else {"query_position": layout}
    return ModelConfig("ad" if layout == "ad" else "dpt", **(small | place | changes))


def build(cfg):
    """Random weights, also where they start at zero; strong attention, so that what is seen shows."""
    torch.manual_seed(0)
    model = T2MIR(cfg).eval()
    for key, p in model.named_parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.1)
        if key.endswith("qkv.weight"):
            p.data *= 2
    return model


def draw(cfg, rows=2, steps=N, queries=1):
    """Random numbers; every two rows share a task, all queries see all steps."""
    g = torch.Generator().manual_seed(0)

    def states(n):
        if cfg.state_values is None:
            return torch.randn(rows, n, cfg.state_dim, generator=g)
        return torch.stack(
            [torch.randint(size, (rows, n), generator=g) for size in cfg.state_values], -1
        )

    def actions(n):
        if cfg.discrete_actions:
            return torch.randint(cfg.action_dim, (rows, n), generator=g)
        return torch.rand(rows, n, cfg.action_dim, generator=g) * 1.6 - 0.8

    prompt, task = (
        Prompt(states(steps), actions(steps), torch.randn(rows, steps, generator=g)),
        torch.arange(rows) // 2,
    )
    if cfg.backbone == "ad":
        return ADBatch(prompt, task)
    return DPTBatch(
        prompt, task, states(queries), actions(queries), torch.full((rows, queries), steps)
    )


def cut(prompt, end, start=0):
    return Prompt(*(x[:, start:end] for x in (prompt.states, prompt.actions, prompt.rewards)))


# ------------------------------------------------------------------------------------------ attention
def slow_attention(q, k, v, sees=None):
    """softmax(q k^T / sqrt(d)) v, one query at a time; without `sees`, query i stands at key i + S' - S."""
    outputs = []
    for i in range(q.shape[2]):
        score = (q[:, :, i, None] * k).sum(-1) / q.shape[3] ** 0.5  # (B, H, S')
        hidden = (
            torch.arange(k.shape[2]) > i + k.shape[2] - q.shape[2]
            if sees is None
            else ~sees[:, :, i]
        )
        outputs.append((score.masked_fill(hidden, -torch.inf).softmax(-1)[..., None] * v).sum(2))
    return torch.stack(outputs, 2)


def qkv(s, keys, d, **options):
    torch.manual_seed(0)
    return [torch.randn(2, 3, n, d, **options) for n in (s, keys, keys)]


@pytest.mark.parametrize("d", [8, 16, 32])
@pytest.mark.parametrize(
    "s, keys, masked", [(7, 7, False), (3, 7, False), (1, 7, False), (1, 1, False), (4, 7, True)]
)
def test_attention_matches_loop(s, keys, masked, d):
    leaves, mask = [x.requires_grad_() for x in qkv(s, keys, d)], None
    if masked:
        mask = torch.rand(2, 1, s, keys) < 0.5
        mask[..., 2] = True  # every query sees something
    fast, slow = (f(*leaves, mask) for f in (attention, slow_attention))
    assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    direction = torch.randn(2, 3, s, d)
    assert_close(
        *(torch.autograd.grad((y * direction).sum(), leaves) for y in (fast, slow)),
        atol=1e-5,
        rtol=1e-4,
    )


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
        score = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * (
            softmax_scale or q.shape[-1] ** -0.5
        )
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        score = score.masked_fill(
            j > i + k.shape[1] - q.shape[1], -torch.inf
        )  # aligned bottom right
        calls.append((q.shape[1], k.shape[1]))
        return torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v.float()).to(q.dtype)

    monkeypatch.setattr(models, "flash_attn_func", flash_attn_func)
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
    monkeypatch.setattr(models, "flash_attn_func", None)
    assert_close(got, attention(*half), atol=0.02, rtol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="half precision is for CUDA devices")
@pytest.mark.parametrize("layout, moe", [*product(LAYOUTS, ("none", "both"))])
def test_cuda_half_precision_is_near_full_precision(layout, moe):
    cfg, results = config(layout, moe=moe, **CONTINUOUS), []
    batch = draw(cfg, rows=4).to("cuda")
    for half in (False, True):
        model = build(cfg).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            output = model(batch)
        loss = imitation_loss(output, batch, False)
        (loss + output.contrastive).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        results.append((output.action.float(), loss, model.embed_state.weight.grad))
    if moe == "none":  # with experts, rounding may change who is chosen
        assert_close(*results, atol=0.05, rtol=0.05)


# ------------------------------------------------------------------------------------------ the network
@pytest.mark.parametrize(
    "why, changes",
    [
        ("--width 18 is not a multiple of --heads 4", {"width": 18, "heads": 4}),
        ("layers", {"layers": 0}),
        ("--dropout 1.0", {"dropout": 1.0}),
        ("--dropout -0.1", {"dropout": -0.1}),
        ("--top-k 0", {"top_k": 0}),
        ("--top-k 5 is not between 1 and --token-experts 4", {"top_k": 5}),
        ("--top-k 6 is not between 1 and --task-experts 5", {"top_k": 6, "token_experts": 8}),
        ("--token-hidden 33 is not a multiple of --token-experts 4", {"token_hidden": 33}),
        ("--task-hidden 0 is not a multiple of --task-experts 5", {"task_hidden": 0}),
        ("--query-position last", {"layout": "last", "moe_position": "bottom"}),
        ("--query-position last", {"layout": "last", "moe_position": "middle", "moe": "task"}),
    ],
)
def test_config_refuses(why, changes):
    with pytest.raises(ValueError) as error:
        config(**changes)
    assert why in str(error.value) and "\n" not in str(error.value)


def test_moe_replaces_one_feed_forward_layer():
    # App. G.2: the first, the L/2-th (counted from 1) or the last block; without MoE it is 1.5 times wider.
    places = ("top", 4, 3), ("middle", 4, 1), ("middle", 6, 2), ("bottom", 4, 0)
    for moe, (position, layers, place) in product(("both", "token", "task", "none"), places):
        blocks = T2MIR(config(moe=moe, moe_position=position, layers=layers)).blocks
        special = 36 if moe == "none" else None
        hidden = [None if b.is_moe else b.ff[0].out_features for b in blocks]
        assert hidden == [special if i == place else 24 for i in range(layers)]


def test_plain_model_has_as_many_active_weights():
    # k = 2 experts of 128 hidden units in each half: 2 * 2 * 128 * (64 + 32) = 49152 = 2 * 64 * 384.
    size = {
        "width": 64,
        "ff": 256,
        "token_experts": 6,
        "task_experts": 12,
        "token_hidden": 768,
        "task_hidden": 1536,
    }
    plain, moe = (T2MIR(config(moe=m, **size)).blocks[-1].ff for m in ("none", "both"))
    active = sum(2 * (e.w1[0].numel() + e.w2[0].numel()) for e in (moe.token, moe.task))
    assert active == 49152 == sum(p.numel() for p in plain.parameters() if p.dim() == 2)


@pytest.mark.parametrize("kind", [{}, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    "layout, first", [("ad", 0), ("first", 1)]
)  # times 0..T-1, or 1..T and 0 for the query
def test_eq9_eq11_prompt_embedding_matches_loop(layout, first, kind):
    model = build(cfg := config(layout, **kind))
    prompt, time = draw(cfg, steps=N + 1).prompt, model.embed_time.weight
    if kind:
        state = model.embed_state(prompt.states) + model.embed_modality[0]
        near(model.embed_query(prompt.states), state + time[0])
    for start, steps in ((0, N + 1), (2, 2)):
        want = []
        for t in range(steps):
            s, a, r = prompt.states[:, t : t + 1], prompt.actions[:, t], prompt.rewards[:, t, None]
            tokens = [
                model.embed_query(s)[:, 0] - time[0],
                (model.embed_action(a) if kind else model.embed_action.weight[a])
                + model.embed_modality[1],
                r * model.embed_reward.weight[:, 0]
                + model.embed_reward.bias
                + model.embed_modality[2],
            ]
            want += [
                token + time[first + (start + t) % T] for token in tokens
            ]  # restarts with every episode
        near(model.embed_prompt(cut(prompt, steps), start), torch.stack(want, 1))


def test_grid_coordinates_are_embedded_one_by_one_and_added():
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    e = build(config()).embed_query(cells[None])[0].view(4, 5, -1)
    near(e - e[:, :1], (e - e[:, :1])[:1].expand_as(e))  # y says the same in every column
    assert (
        torch.linalg.matrix_rank(e.flatten(0, 1)) == 1 + 3 + 4
    )  # and every x and every y something else


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_shift_stays_within_an_episode_and_spares_queries(layout):
    model, seen = build(cfg := config(layout, token_shift=True)), []
    model.shift.data = torch.linspace(-1, 1, 16)
    batch = draw(cfg)
    model.blocks[0].norm1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(batch)
    e = model.embed_prompt(batch.prompt).unflatten(1, (N // T, 3 * T))  # episodes
    want = torch.cat([e[:, :, :1], e[:, :, 1:] + model.shift * e[:, :, :-1]], 2).flatten(1, 2)
    if layout != "ad":
        parts = [model.embed_query(batch.query_states), want]
        want = torch.cat(parts if layout == "first" else parts[::-1], 1)
    near(seen[0], want)


@pytest.mark.parametrize("kind", [{}, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    "layout, queries, reads, before, after",
    [("ad", 1, N, 0, 0), ("first", 1, N + 1, 1, 0), ("last", 4, 4, 0, 4)],
)
def test_eq10_eq11_read_outs(layout, queries, reads, before, after, kind):
    model, seen = build(cfg := config(layout, **kind)), []
    model.head.weight.data *= 20
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    output = model(draw(cfg, queries=queries))
    assert output.action.shape == (2, reads, cfg.action_dim) and seen[0].abs().max() > 1
    assert torch.equal(output.action, seen[0].tanh() if kind else seen[0])  # in [-1, 1], or logits
    assert output.modality.tolist() == [3] * before + [0, 1, 2] * N + [3] * after


@pytest.mark.parametrize("gate", CAUSAL + EQ4, ids=name)
def test_eq11_first_episode_has_no_prompt(gate):
    model, full = build(config("first", **gate)), draw(config("first"))
    alone = model(replace(full, prompt=cut(full.prompt, 0), task=None)).action
    assert alone.shape == (2, 1, A) and not torch.allclose(alone[0], alone[1])
    if gate in CAUSAL:
        near(alone, model(full).action[:, :1])  # the read-out at q


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("routing", ["sequence", "prefix", "token"])
def test_eq4_what_the_task_router_reads(layout, routing):
    model, seen = build(cfg := config(layout, routing=routing)), {}
    batch, block = draw(cfg, rows=4, queries=3 if layout == "last" else 1), model.blocks[-1]
    block.norm2.register_forward_hook(lambda module, inputs, output: seen.update(h=output))
    block.ff.task_router.register_forward_pre_hook(
        lambda module, inputs: seen.update(h_bar=inputs[0])
    )
    if layout == "last":
        batch.visible[:, 1:] = torch.tensor([0, 4])
    output, h = model(batch), seen["h"]
    whole, read = h, [0, *range(1, 3 * N + 1, 3)] if layout == "first" else range(0, 3 * N, 3)
    past = [h[:, : i + 1] for i in read]
    if layout == "last":  # a query is a sequence of its own: what it sees, and itself
        whole, read = h[:, : 3 * N], range(3 * N, 3 * N + 3)
        past = [
            torch.cat([h[:, : 3 * m], h[:, i, None]], 1)
            for m, i in zip((N, 0, 4), read, strict=True)
        ]
    want = h[:, list(read)] if routing == "token" else torch.stack([p.mean(1) for p in past], 1)
    near(seen["h_bar"], h.mean(1) if routing == "sequence" and layout != "last" else want)
    want = block.ff.task_router.contrast(
        whole if routing == "token" else whole.mean(1), batch.task
    )  # Eq. 7
    near((output.contrastive, output.accuracy), want)


# ------------------------------------------------------------------------------------------ who sees whom
@torch.no_grad()
def changes_by_token(cfg, batch):
    """Which prediction changes when one token of the prompt does, (3n, R) bool; one row of a batch each."""
    n = 3 * batch.prompt.steps
    wide = {
        k: getattr(batch.prompt, k)[:1].repeat_interleave(n + 1, 0)
        for k in ("states", "actions", "rewards")
    }
    for i in range(n):
        key, token = list(wide.items())[i % 3]
        sizes = {"states": torch.tensor(cfg.state_values or 1), "actions": cfg.action_dim}.get(key)
        new = token[i, i // 3] + 1
        token[i, i // 3] = new if token.is_floating_point() else new % sizes
    parts = {"prompt": Prompt(**wide), "task": None}
    if cfg.backbone == "dpt":
        parts |= {
            k: getattr(batch, k)[:1].repeat_interleave(n + 1, 0)
            for k in ("query_states", "visible")
        }
    action = build(cfg)(replace(batch, **parts)).action
    return (action[:-1] - action[-1]).abs().amax(-1) > 1e-5


# AD reads at s_t (its own a_t and r_t come later), DPT at q and at every s_t, or at queries of a given sight.
SIGHT = {"ad": [*range(1, 3 * N, 3)], "first": [0, *range(1, 3 * N, 3)], "last": [3 * N, 0, 3, 12]}
CASES = [
    *product(("ad", "first"), EVERY),
    *product(["last"], CACHEABLE),
    ("ad", CAUSAL[-1] | CONTINUOUS),
]


@pytest.mark.parametrize("layout, gate", CASES, ids=name)
def test_prediction_depends_on_the_past_alone(layout, gate):
    batch = draw(cfg := config(layout, **gate), queries=4 if layout == "last" else 1)
    if layout == "last":
        batch.visible[:] = torch.tensor(SIGHT["last"]) // 3
    assert torch.equal(
        changes_by_token(cfg, batch), torch.arange(3 * N)[:, None] < torch.tensor(SIGHT[layout])
    )


@pytest.mark.parametrize("gate, position", [*product(EQ4, POSITIONS)])
@pytest.mark.parametrize("layout", ["ad", "first"])
def test_eq4_gate_of_the_whole_sequence_sees_the_future(layout, gate, position):
    changed = changes_by_token(cfg := config(layout, **gate, moe_position=position), draw(cfg))
    assert changed[-1, 0]  # the last reward changes the first prediction


@pytest.mark.parametrize("gate", CACHEABLE, ids=name)
@torch.no_grad()
def test_last_queries_see_the_visible_prompt_and_not_one_another(gate):
    model, batch = build(cfg := config("last", **gate)), draw(config("last"), queries=4)
    batch.visible[:] = torch.tensor([N, 0, 1, 4])
    want, moved, order = model(batch).action, batch.query_states.clone(), torch.tensor([2, 0, 3, 1])
    moved[:, 1] = (moved[:, 1] + 1) % torch.tensor(cfg.state_values)
    changed = (model(replace(batch, query_states=moved)).action - want).abs().amax((0, 2)) > 1e-5
    assert changed.tolist() == [False, True, False, False]
    permuted = replace(
        batch, query_states=batch.query_states[:, order], visible=batch.visible[:, order]
    )
    near(model(permuted).action, want[:, order])
    for i, m in enumerate(batch.visible[0].tolist()):  # as if there were no more of the prompt
        one = {
            "query_states": batch.query_states[:, i : i + 1],
            "visible": batch.visible[:, i : i + 1],
        }
        near(
            model(replace(batch, prompt=cut(batch.prompt, m), task=None, **one)).action,
            want[:, i : i + 1],
        )


# ------------------------------------------------------------------------------------------ decoding with a cache
@pytest.mark.parametrize("gate", CACHEABLE, ids=name)
@torch.no_grad()
def test_cached_ad_equals_the_full_forward_pass(gate):
    model, batch = (
        build(cfg := config(**gate)),
        draw(config(), steps=N + 2),
    )  # the third episode has begun
    twin = build(
        replace(cfg, routing="prefix") if cfg.routing == "sequence" else cfg
    )  # Eq. 4 of what is past
    want, tokens = twin(batch).action, model.embed_prompt(batch.prompt)
    cache = model.new_cache(2, 1)  # one token at a time, from the smallest capacity
    for i in range(3 * N + 4):
        action = model.feed(tokens[:, i : i + 1], cache)
        if i % 3 == 0:
            near(action, want[:, i // 3])
    assert cache.length == 3 * N + 4 <= cache.k[0].shape[2]
    cache = model.new_cache(
        2, 3 * N
    )  # as ADPolicy does it: whole episodes, then s_0, then a_0 r_0 s_1
    model.feed(model.embed_prompt(cut(batch.prompt, N)), cache)
    now = model.embed_prompt(cut(batch.prompt, N + 2, N))
    near(model.feed(now[:, :1], cache), want[:, N])
    near(model.feed(now[:, 1:4], cache), want[:, N + 1])
    for t in (0, 3, N + 1):
        batch.prompt.actions[:, t], batch.prompt.rewards[:, t] = (
            0,
            9.0,
        )  # those of the last step are not read
        near(model.last_action(cut(batch.prompt, t + 1)), want[:, t])
        batch = draw(cfg, steps=N + 2)


@pytest.mark.parametrize("gate", CACHEABLE, ids=name)
@torch.no_grad()
def test_cached_dpt_query_equals_the_full_forward_pass_and_leaves_no_trace(gate):
    model, batch = build(config("last", **gate)), draw(config("last"), queries=3)
    cache = model.new_cache(2, 3 * T)  # full after the first episode

    def content():
        return cache.h_sum, cache.previous, *(x[:, :, : 3 * steps] for x in cache.k + cache.v)

    for steps in (0, T, T + 1, N):
        if new := steps - cache.length // 3:
            model.feed(
                model.embed_prompt(cut(batch.prompt, steps, steps - new), steps - new), cache
            )
        before = [x.clone() for x in content()]
        visible = torch.full_like(batch.visible, steps)
        want = model(
            replace(batch, prompt=cut(batch.prompt, steps), task=None, visible=visible)
        ).action
        for i in range(3):
            near(
                model.feed(model.embed_query(batch.query_states[:, i : i + 1]), cache, keep=False),
                want[:, i],
            )
        assert cache.length == 3 * steps and all(map(torch.equal, before, content()))


def test_cache_is_refused_where_it_would_be_stale():
    stale = [g | {"moe_position": p} for g, p in product(EQ4, POSITIONS[1:])]
    for gate in CACHEABLE + stale:
        cfg = config(**gate)
        assert cfg.cacheable == (gate not in stale) and not config("first", **gate).cacheable
        assert gate in stale or config("last", **gate).cacheable
    for cfg in (config("first"), config(**stale[0])):
        with pytest.raises(ValueError, match="cannot be cached"):
            T2MIR(cfg).new_cache(2, 8)
    assert config(layers=1, moe_position="bottom").cacheable  # the first block is the last


# ------------------------------------------------------------------------------------------ Algorithms 2 and 4
ROOM = {"horizon": 10, "state_values": (10, 10), "action_dim": 5}
STARTS = np.array([[x, y] for x in (1, 4, 8) for y in (2, 5, 7)])
GOALS = STARTS + [[1, 0], [-1, 0], [0, 1]] * 3  # one step away: even a random model meets some


def play(make, **options):
    """Four short episodes of greedy play in the DarkRoom: policy, predictions and the episodes."""
    model = build(cfg := config(**options, **ROOM))
    model.head.bias.data -= model(draw(cfg, rows=8, steps=10)).action.mean(
        (0, 1)
    )  # no favourite action
    room, policy, history, predictions = BatchedDarkRoom(GOALS), make(model), [], []
    choose = policy.action
    policy.action = lambda logits: (predictions.append(logits.clone()), choose(logits))[1]
    for _ in range(4):
        policy.begin(history, len(GOALS))
        room.cells, states, steps = STARTS, torch.from_numpy(STARTS), []
        for _ in range(cfg.horizon):
            actions = policy.act(states)
            following, rewards = map(torch.from_numpy, room.step(actions.numpy()))
            policy.observe(states, actions, rewards)
            steps.append((states, actions, rewards))
            states = following
        history.append(Prompt(*(torch.stack(column, 1) for column in zip(*steps, strict=True))))
    assert len(torch.cat([p.actions for p in history]).unique()) > 2
    assert not torch.equal(history[0].actions, history[-1].actions)
    assert sum(p.rewards.sum() for p in history) > 0
    return policy, predictions, history


@pytest.mark.parametrize(
    "gate", [g | s for g, s in product((EQ4[-1], CAUSAL[-2]), SHIFTS)], ids=name
)
@torch.no_grad()
def test_algorithm2_plays_the_same_with_and_without_a_cache(monkeypatch, gate):
    policy, cached, history = play(lambda model: ADPolicy(model, keep=2, greedy=True), **gate)
    for kept, want in zip(
        policy.kept, sort_and_drop(history[:3], 2), strict=True
    ):  # those of the fourth episode
        assert torch.equal(kept.actions, want.actions)
    monkeypatch.setattr(ModelConfig, "cacheable", property(lambda self: False))
    monkeypatch.setattr(T2MIR, "feed", None)
    _, plain, same = play(lambda model: ADPolicy(model, keep=2, greedy=True), **gate)
    assert all(torch.equal(p.actions, q.actions) for p, q in zip(history, same, strict=True))
    near(cached, plain)


@pytest.mark.parametrize("memory", ["last", "all"])
@pytest.mark.parametrize("layout", ["first", "last"])
@torch.no_grad()
def test_algorithm4_plays_what_the_full_forward_pass_predicts(layout, memory):
    policy, found, history = play(
        lambda m: DPTPolicy(m, memory, greedy=True), layout=layout, token_shift=True
    )
    for i, logits in enumerate(found):
        e, t = divmod(
            i, 10
        )  # the first episode has no prompt; later ones the one before, or all of them
        past = concatenate(history[max(0, e - 1) if memory == "last" else 0 : max(1, e)])
        past, state = past if e else cut(past, 0), history[e].states[:, t, None]
        batch = DPTBatch(past, None, state, None, torch.full((len(GOALS), 1), past.steps))
        near(logits, policy.model(batch).action[:, -1])
        assert torch.equal(history[e].actions[:, t], logits.argmax(-1))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999999])
def test_dropout_drops_that_share_and_keeps_the_mean(p):
    drop = models.Dropout(p)
    torch.manual_seed(0)
    x = torch.ones(1001, 999, requires_grad=True)  # an odd number of them
    y = drop(x)
    share, n = (y == 0).float().mean().item(), x.numel()
    assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5 + 2**-16
    assert len(y.unique()) == 2 and y.max().item() == pytest.approx(
        1 / (1 - p), rel=2e-3 if p < 0.9 else 20
    )
    assert y.mean().item() == pytest.approx(1.0, abs=4 * (p / max(1 - p, 2**-16) / n) ** 0.5)
    assert_close(torch.autograd.grad(y.sum(), x)[0], y.detach())  # the same mask and scale
    neighbours = (
        ((y[:, 1:] == 0) & (y[:, :-1] == 0)).float().mean().item()
    )  # four come from one number
    assert abs(neighbours - share**2) < 0.005
    assert (drop(x) != y).any() and (drop.eval()(x) == x).all()


def test_algorithm2_sort_and_drop_by_hand():
    # K = 3. Returns of task 0: 3 1 1 2 1, of task 1: 0 0 5 0 0; below, the numbers of the episodes kept.
    kept, played = [], [(3.0, 0.0), (1.0, 0.0), (1.0, 5.0), (2.0, 0.0), (1.0, 0.0)]
    # Fourth: of the equally low episodes the oldest goes (task 0: 1 before 2; task 1: 0 before 1 and 3).
    want = [
        [[0], [0]],
        [[1, 0], [0, 1]],
        [[1, 2, 0], [0, 1, 2]],
        [[2, 3, 0], [1, 3, 2]],
        [[4, 3, 0], [3, 4, 2]],
    ]
    for i, (returns, numbers) in enumerate(zip(played, want, strict=True)):
        rewards = torch.tensor([[r - 1, 1.0] for r in returns])
        kept = sort_and_drop(
            [*kept, Prompt(torch.full((2, 2, 1), i), torch.full((2, 2), i), rewards)], 3
        )
        assert torch.stack([p.actions[:, 0] for p in kept], 1).tolist() == numbers
        for p in kept:
            assert torch.equal(p.states[..., 0], p.actions)
            assert p.rewards.sum(1).tolist() == [
                played[n][task] for task, n in enumerate(p.actions[:, 0])
            ]


# ------------------------------------------------------------------------------------------ training
def train_step(model, batch):
    output = model(batch)
    imitation = imitation_loss(output, batch, model.cfg.discrete_actions)
    (imitation + output.balance + output.contrastive).backward()
    return imitation.item()


@pytest.mark.parametrize("gate", CAUSAL + EQ4, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_but_the_key_router_is_trained(layout, gate):
    model = build(cfg := config(layout, token_shift=True, **gate)).train()
    train_step(model, draw(cfg, rows=4))
    parameters = dict(model.named_parameters())
    idle = {k for k, p in parameters.items() if p.grad is None or p.grad.abs().max() == 0}
    frozen = {k for k, p in parameters.items() if not p.requires_grad}
    assert idle == frozen == {k for k in parameters if ".task_router.key." in k}
    assert len(idle) == (2 if cfg.has_task else 0)
    if cfg.has_task:
        router = model.blocks[-1].ff.task_router
        router.query.second.weight.data += 1
        model.update_key_router(0.75)  # Eq. 8
        near(router.key.second.weight, router.query.second.weight - 0.75)
        output = model(replace(draw(cfg), task=torch.tensor([0, 1])))
        assert output.contrastive == output.accuracy == 0  # no positives, no Eq. 7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval_mode_is_deterministic_and_train_mode_is_noisy(layout):
    batch = draw(config(layout))
    for moe, dropout, noisy in (
        ("both", 0.0, True),
        ("token", 0.0, True),
        ("task", 0.0, False),
        ("none", 0.3, True),
    ):
        model = build(config(layout, moe=moe, dropout=dropout))
        quiet = model(batch)
        assert torch.equal(quiet.action, model(batch).action) and quiet.balance == 0
        loud = model.train()(batch)  # the noise of Eq. 14, or dropout
        assert torch.equal(loud.action, model(batch).action) != noisy
        assert bool(loud.balance > 0) == (moe in ("both", "token"))


@pytest.mark.parametrize(
    "layout, kind", [*product(LAYOUTS, [{}]), ("ad", CONTINUOUS), ("last", CONTINUOUS)], ids=name
)
def test_one_batch_is_learnt_by_heart(layout, kind):
    cfg = config(layout, layers=2, width=32, ff=64, **kind)
    batch = draw(cfg, rows=4, queries=3 if layout == "last" else 1)
    if layout == "last":  # all rows ask the same: the prompt must tell them apart
        batch.query_states[:] = batch.query_states[:1].clone()
    elif not kind:  # all rows begin differently: nothing else is known at the first read-out
        first = batch.prompt.states if layout == "ad" else batch.query_states
        first[:, 0] = torch.arange(4)[:, None]
    torch.manual_seed(0)
    model, losses = T2MIR(cfg).train(), []
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(train_step(model, batch))
        optimizer.step()
    assert losses[0] > 0.3 and sum(losses[-10:]) / 10 < 0.02
    action, label = (
        model.eval()(batch).action,
        batch.prompt.actions if layout == "ad" else batch.query_actions,
    )
    assert (action - label).abs().max() < 0.2 if kind else (action.argmax(-1) == label).all()
