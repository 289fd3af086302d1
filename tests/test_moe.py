"""test_moe.py: Eq. 2 and 4 (Sec. 4.1, 4.2): the experts, and the layer that joins both MoEs (Fig. 2).

Each equation three ways: numbers worked out by hand, a slow loop (values and gradients), a property.
Run: python -m pytest -q tests/test_moe.py
"""

import math

import pytest
import torch
from torch.testing import assert_close

from moe import Experts, MoELayer
from router import Routing, eq1_top_k_gate

B, S, D, K = 3, 9, 8, 5
READ = torch.tensor([0, 3, 6, 8])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def experts(out=4):
    torch.manual_seed(0)
    e = Experts(K, D, 6, out)
    for bias in (e.b1, e.b2):  # they start at zero
        torch.nn.init.normal_(bias)
    return e


def layer(kind, width=D):
    torch.manual_seed(0)
    return MoELayer(width, kind, (6, 2, 48), (4, 2, 32), 0.1, 0.1).eval()


def h_bars(h):
    """One gate a row; one gate a token, from the mean of the tokens so far."""
    return {2: h.mean(1), 3: h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None]}


def slow_mixture(e, x, index, weight):
    """Eq. 2 for one token x (D,), one number at a time."""
    y = [0.0] * e.b2.shape[1]
    for i, w in zip(index.tolist(), weight, strict=True):
        hidden = []
        for f in range(e.b1.shape[1]):
            a = e.b1[i, f] + sum(x[d] * e.w1[i, d, f] for d in range(len(x)))
            hidden.append(a * 0.5 * (1 + torch.erf(a / math.sqrt(2))))  # GELU
        for o in range(len(y)):
            y[o] = y[o] + w * (
                e.b2[i, o] + sum(hidden[f] * e.w2[i, f, o] for f in range(len(hidden)))
            )
    return torch.stack(y)


def assert_same(e, fast, slow, *inputs):
    """Equal values, and equal gradients of inputs and all weights against one random direction."""
    results = []
    for f in (fast, slow):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = f(*leaves)
        grads = torch.autograd.grad((y * draw(*y.shape, seed=9)).sum(), [*leaves, *e.parameters()])
        results.append((y.detach(), grads))
    assert_close(*results, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------- experts
def test_eq2_eq4_by_hand():
    # D = F = D_out = 1. GELU(1) = 0.84134475, GELU(2) = 1.95449974 (x times Phi(x)).
    e = Experts(2, 1, 1, 1)
    with torch.no_grad():
        e.w1[:, 0, 0], e.b1[:, 0] = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])
        e.w2[:, 0, 0], e.b2[:, 0] = torch.tensor([1.0, 10.0]), torch.tensor([0.0, -1.0])
    # at x = 1: E_0 = GELU(1), E_1 = 10 GELU(1 + 1) - 1
    gate = Routing(torch.tensor([[1, 0]]), torch.tensor([[0.25, 0.75]]))
    want = 0.25 * (19.5449974 - 1) + 0.75 * 0.84134475
    assert e.tokens(torch.ones(1, 1), gate).item() == pytest.approx(want)
    assert e.sequences(torch.ones(1, 2, 1), gate).flatten().tolist() == pytest.approx([want, want])


@pytest.mark.parametrize("k", [1, 2, K])
def test_eq2_tokens_matches_loop(k):
    e = experts()

    def fast(x, logits):
        return e.tokens(x, eq1_top_k_gate(logits, k))

    def slow(x, logits):
        gate = eq1_top_k_gate(logits, k)
        tokens = zip(x, gate.index, gate.weight, strict=True)
        return torch.stack([slow_mixture(e, t, i, w) for t, i, w in tokens])

    assert_same(e, fast, slow, draw(7, D), 2 * draw(7, K, seed=1))


@pytest.mark.parametrize("k", [1, 2, K])
def test_eq4_sequences_matches_loop(k):
    e = experts()

    def fast(x, logits):
        return e.sequences(x, eq1_top_k_gate(logits, k))

    def slow(x, logits):
        gate = eq1_top_k_gate(logits, k)
        rows = zip(x, gate.index, gate.weight, strict=True)
        return torch.stack(
            [torch.stack([slow_mixture(e, t, i, w) for t in row]) for row, i, w in rows]
        )

    assert_same(e, fast, slow, draw(2, 3, D), 2 * draw(2, K, seed=1))


@pytest.mark.parametrize("k", [1, 2, K])
def test_eq4_sequences_is_eq2_with_the_gate_repeated(k):
    e, x, gate = experts(), draw(B, S, D), eq1_top_k_gate(draw(B, K, seed=1), k)
    repeated = Routing(gate.index.repeat_interleave(S, 0), gate.weight.repeat_interleave(S, 0))
    assert_close(e.sequences(x, gate), e.tokens(x.flatten(0, 1), repeated).view(B, S, -1))


@pytest.mark.parametrize("steps", [1, 7, 8, 9])  # an expert has 8 hidden units
def test_eq4_short_rows_and_long_ones_agree(steps):
    """Fewer tokens a row than hidden units: copies of tokens instead of weights. Same values, same gradients."""
    m = layer("task")
    found = []
    for way in (m.task.sequences, None):
        x, logits = draw(B, steps, D).requires_grad_(), draw(B, 4, seed=1).requires_grad_()
        gate = eq1_top_k_gate(logits, 2)
        y = m._by_task(x, gate) if way is None else way(x, gate)
        found.append(
            [
                y,
                *torch.autograd.grad(
                    (y * draw(*y.shape, seed=2)).sum(), (x, logits, *m.task.parameters())
                ),
            ]
        )
    for own, other in zip(*found, strict=True):
        assert_close(own, other)


def test_eq2_all_experts_is_a_softmax_mixture():
    e, x, logits = experts(), draw(7, D), draw(7, K, seed=1)
    every = torch.stack([e.one(i, x) for i in range(K)], 1)  # (N, K, D_out)
    assert_close(
        e.tokens(x, eq1_top_k_gate(logits, K)), (logits.softmax(-1)[..., None] * every).sum(1)
    )


def test_eq2_permuting_experts_changes_nothing():
    e, other, x, perm = experts(), experts(), draw(7, D), torch.tensor([3, 0, 4, 1, 2])
    for new, old in zip(other.parameters(), e.parameters(), strict=True):
        new.data = old.data[perm]
    logits = draw(7, K, seed=1)
    gate, moved = eq1_top_k_gate(logits, 2), eq1_top_k_gate(logits[:, perm], 2)
    assert_close(other.tokens(x, moved), e.tokens(x, gate))
    assert_close(other.sequences(x[:, None], moved), e.sequences(x[:, None], gate))


def test_eq2_experts_that_are_not_kept_get_no_gradient():
    e, x = experts(), draw(4, D)
    gate = Routing(torch.full((4, 1), 2), torch.ones(4, 1))
    for y in (e.tokens(x, gate), e.sequences(x[:, None], gate)):
        for grad in torch.autograd.grad(y.sum(), list(e.parameters())):
            assert [bool(g.abs().max() > 0) for g in grad] == [i == 2 for i in range(K)]


# ---------------------------------------------------------------------------------------------- layer
@pytest.mark.parametrize("gates", [2, 3])
@pytest.mark.parametrize("kind", ["both", "token", "task"])
def test_eq2_eq4_layer_matches_loop(kind, gates):
    moe, h = layer(kind), draw(2, 4, D).requires_grad_()
    h_bar = h_bars(h.detach())[gates].requires_grad_()
    out, want = moe(h, h_bar), []
    for b in range(2):
        for t in range(4):
            parts = []
            if kind != "task":
                gate = eq1_top_k_gate(moe.token_router.router(h[b, t]), 2)
                parts.append(slow_mixture(moe.token, h[b, t], gate.index, gate.weight))
                assert out.token_expert[b, t].tolist() == gate.index.tolist()
            if kind != "token":
                z = moe.task_router.query(h_bar[b] if gates == 2 else h_bar[b, t])
                gate = eq1_top_k_gate(z, 2)
                parts.append(slow_mixture(moe.task, h[b, t], gate.index, gate.weight))
                assert (
                    out.task_expert[b] if gates == 2 else out.task_expert[b, t]
                ).tolist() == gate.index.tolist()
            assert [len(p) for p in parts] == ([D // 2, D // 2] if kind == "both" else [D])
            want.append(torch.cat(parts))  # token | task
    want = torch.stack(want).view(2, 4, D)
    leaves = [h, *([] if kind == "token" else [h_bar])]
    grads = [torch.autograd.grad((y * draw(2, 4, D, seed=9)).sum(), leaves) for y in (out.y, want)]
    assert_close(out.y, want)
    assert_close(*grads, atol=1e-5, rtol=1e-4)
    assert out.balance.item() == 0  # not training
    assert (out.token_expert is None, out.task_expert is None) == (kind == "task", kind == "token")


@pytest.mark.parametrize("silent", ["token", "task"])
def test_layer_concatenates_token_then_task(silent):
    moe, h = layer("both"), draw(B, S, D)
    full = moe(h, h.mean(1)).y.split(D // 2, -1)
    torch.nn.init.zeros_(getattr(moe, silent).w2)
    half = moe(h, h.mean(1)).y.split(D // 2, -1)
    still, speaks = (0, 1) if silent == "token" else (1, 0)
    assert half[still].abs().max() == 0 and full[still].abs().max() > 0
    assert torch.equal(half[speaks], full[speaks])


@pytest.mark.parametrize("gates", [2, 3])
@pytest.mark.parametrize("kind", ["both", "token", "task"])
def test_layer_reads_the_tokens_of_the_full_output(kind, gates):
    moe, h = layer(kind), draw(B, S, D)
    h_bar = h_bars(h)[gates]
    full, part = moe(h, h_bar), moe(h, h_bar if gates == 2 else h_bar[:, READ], READ)
    assert part.y.shape == (B, len(READ), D)
    # Not bit for bit: a product over fewer rows may add up in another order.
    assert_close(part.y, full.y[:, READ], atol=1e-6, rtol=0)
    if kind != "task":
        assert torch.equal(part.token_expert, full.token_expert)  # routed: all tokens, read or not
        assert part.token_expert.shape[:2] == (B, S)
    if kind != "token":
        assert torch.equal(
            part.task_expert, full.task_expert if gates == 2 else full.task_expert[:, READ]
        )


def test_eq3_layer_balance_is_over_all_tokens():
    moe, h = layer("both").train(), draw(B, S, D)
    losses = []
    for read in (None, READ):
        torch.manual_seed(1)
        losses.append(moe(h, h.mean(1), read).balance)
    torch.manual_seed(1)
    want = moe.token_router(h.flatten(0, 1))[2]
    assert want > 0 and torch.equal(losses[0], want) and torch.equal(losses[1], want)
    assert layer("task").train()(h, h.mean(1)).balance.item() == 0


def test_layer_permuting_experts_permutes_the_choice_alone():
    moe, h = layer("both"), draw(B, S, D)
    old = moe(h, h.mean(1))
    for part, router in (("token", moe.token_router.router), ("task", moe.task_router.query)):
        perm = torch.arange(len(router.second.weight)).roll(1)  # expert i moves to place i + 1
        for p in (router.second.weight, *getattr(moe, part).parameters()):
            p.data = p.data[perm]
    new = moe(h, h.mean(1))
    assert_close(new.y, old.y)
    assert torch.equal(new.token_expert, (old.token_expert + 1) % 6)
    assert torch.equal(new.task_expert, (old.task_expert + 1) % 4)


def test_eq4_layer_row_gate_depends_on_h_bar_alone():
    moe, h = layer("both"), draw(B, S, D)
    a, b = moe(h, h.mean(1)), moe(h, 3 * draw(B, D, seed=5))
    assert torch.equal(a.y[..., : D // 2], b.y[..., : D // 2])  # token half: does not see h_bar
    assert not torch.allclose(a.y[..., D // 2 :], b.y[..., D // 2 :])
    per_token = moe(h, h.mean(1)[:, None].expand(-1, S, -1))  # the same h_bar at every token
    assert_close(per_token.y, a.y)


def test_layer_trains_both_routers_through_the_gates():
    moe, h = layer("both").train(), draw(B, S, D)
    moe(h, h.mean(1)).y.square().sum().backward()
    trained = {
        n for n, p in moe.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    idle = {
        n
        for n, _ in moe.named_parameters()
        if n.startswith("task_router.key") or n == "task_router.w"
    }
    assert (
        trained == {n for n, _ in moe.named_parameters()} - idle
    )  # Eq. 7 trains W, Eq. 8 moves the key


def test_layer_routes_in_float32_under_autocast():
    moe, h = layer("both"), draw(B, S, D)
    want = moe(h, h.mean(1))
    with torch.autocast("cpu", torch.bfloat16):
        z, logits = moe.task_router(h.mean(1)), moe.token_router(h.flatten(0, 1))[1]
        low = moe(h, h.mean(1))
    assert z.dtype == logits.dtype == low.balance.dtype == torch.float32
    assert torch.equal(z, moe.task_router(h.mean(1)))
    assert torch.equal(logits, moe.token_router(h.flatten(0, 1))[1])
    assert torch.equal(low.token_expert, want.token_expert) and torch.equal(
        low.task_expert, want.task_expert
    )
    assert not torch.equal(low.y.float(), want.y)  # the experts do run in half precision
    assert_close(low.y.float(), want.y, atol=0.03, rtol=0.03)


def test_layer_odd_width_cannot_be_shared():
    with pytest.raises(ValueError, match="odd"):
        layer("both", width=7)
    h = draw(1, 2, 7)
    assert layer("token", width=7)(h, None).y.shape == (1, 2, 7)
    assert layer("task", width=7)(h, h.mean(1)).y.shape == (1, 2, 7)
