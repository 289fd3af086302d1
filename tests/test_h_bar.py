"""test_h_bar.py: the rules for h_bar of Eq. 4 (Sec. 4.2), and centring, which is not in the paper.

By hand, against a slow loop over tokens (values and gradients), and while decoding.
Run: python -m pytest -q tests/test_h_bar.py
"""

import math

import pytest
import torch
from torch.testing import assert_close

from contrastive import eq7_info_nce
from moe import H_BAR, Center, MoELayer, Past, View, h_bar_rule, running_sum
from router import eq1_top_k_gate

B, S, D = 3, 9, 8
READ = torch.tensor([0, 3, 6, 8])
WHOLE = View(slice(0, S))  # AD: the row is the prompt
FIRST = View(slice(1, S))  # DPT, query first: all of the row but its first token
N = 6  # DPT, query last: 6 tokens of the prompt, then 3 queries that see 0 to 6 of them
LAST = View(slice(0, N), torch.tensor([[0, 3, 6], [6, 6, 6], [3, 0, 1]]))
VIEWS = {"ad": WHOLE, "first": FIRST, "last": LAST}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(kind, routing="sequence", width=D, **settings):
    torch.manual_seed(0)
    return MoELayer(width, kind, (6, 2, 48), (4, 2, 32), routing, **settings).eval()


# ------------------------------------------------------------------------------------- Eq. 4: h_bar
def slow_h_bar(rule, h, view):
    """What each token (or the row) averages, from the definition; h (B, S, D)."""
    b, s, _ = h.shape
    if rule == "sequence" and view.visible is None:
        return sum(h[:, i] for i in range(s)) / s
    rows = []
    for row in range(b):
        means = []
        for i in range(s):
            seen = range(i + 1)
            if rule == "token":
                seen = [i]
            elif view.visible is not None and i >= N:  # a query: what it sees, and itself
                seen = [*range(view.visible[row, i - N]), i]
            means.append(sum(h[row, j] for j in seen) / len(seen))
        rows.append(torch.stack(means))
    return torch.stack(rows)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rule", ["sequence", "prefix", "token"])
def test_eq4_h_bar_matches_loop(rule, view):
    results = []
    for way in (H_BAR[rule], lambda *x: slow_h_bar(rule, *x[:2])):
        h = draw(B, S, D).requires_grad_()
        h_bar = way(h, VIEWS[view], None)
        (grad,) = torch.autograd.grad((h_bar * draw(*h_bar.shape, seed=1)).sum(), h)
        results.append((h_bar.detach(), grad))
    assert results[0][0].dim() == (2 if rule == "sequence" and view != "last" else 3)
    assert_close(*results)


def test_eq4_h_bar_by_hand():
    h = torch.tensor([[[2.0], [4.0], [9.0], [1.0]]])
    row, last = View(slice(0, 4)), View(slice(0, 2), torch.tensor([[2, 0]]))
    assert H_BAR["sequence"](h, row, None).tolist() == [[4.0]]
    assert H_BAR["prefix"](h, row, None).flatten().tolist() == [2, 3, 5, 4]
    assert torch.equal(H_BAR["token"](h, row, None), h)
    # Two queries: one after 2 and 4, one after nothing. They do not see one another.
    want = [2, 3, (2 + 4 + 9) / 3, 1]
    for rule in ("sequence", "prefix"):
        assert H_BAR[rule](h, last, None).flatten().tolist() == want
    past = Past(torch.tensor([[10.0]]), 3)  # decoding: three tokens of sum 10 came before
    for rule in ("sequence", "prefix"):
        assert H_BAR[rule](h, row, past).flatten().tolist() == pytest.approx(
            [12 / 4, 16 / 5, 25 / 6, 26 / 7]
        )
    assert torch.equal(H_BAR["token"](h, row, past), h)


@pytest.mark.parametrize("rule", ["sequence", "prefix", "token"])
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 3, 1]])
def test_eq4_decoding_in_pieces_is_the_running_mean(rule, pieces):
    moe, h = layer("both", rule), draw(B, S, D)
    past, parts, start = Past(torch.zeros(B, D), 0), [], 0
    for size in pieces:
        part = h[:, start : start + size]
        out = moe(part, View(slice(0, size)), past=past)
        past, start = Past(out.total, past.count + size), start + size
        parts.append(out.y)
    want = layer("both", "token" if rule == "token" else "prefix")(h, WHOLE)
    assert_close(torch.cat(parts, 1), want.y, atol=1e-5, rtol=1e-5)
    assert_close(past.total, h.sum(1))
    assert want.total is None  # not while training
    assert layer("token")(h, WHOLE, past=past).total is None  # nothing would read it


@pytest.mark.parametrize("rule", ["prefix", "token"])
def test_causal_rules_do_not_look_ahead(rule):
    h, other = draw(B, S, D), draw(B, S, D, seed=1)
    other[:, :4] = h[:, :4]
    a, b = (H_BAR[rule](x, WHOLE, None) for x in (h, other))
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.allclose(a[:, 4:], b[:, 4:])


def test_eq4_a_new_rule_is_one_function(monkeypatch):
    monkeypatch.setattr("moe.H_BAR", dict(H_BAR))

    @h_bar_rule
    def newest(h, view, past):
        return h[:, -1]

    h = draw(B, S, D)
    moe, same = layer("task"), layer("task", "token")(h, WHOLE)
    moe.routing = "newest"
    out = moe(h, WHOLE)
    assert torch.equal(out.task_expert, same.task_expert[:, -1])
    assert "newest" not in H_BAR


def test_running_sum_is_float32_for_half_precision_tokens():
    ones = torch.ones(1, 300, 1, dtype=torch.bfloat16)
    assert running_sum(ones)[0, -1].item() == 300  # bfloat16 stops at 256
    assert H_BAR["prefix"](ones, View(slice(0, 300)), None).dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------- centring
def test_center_by_hand():
    center = Center(2)
    assert torch.equal(center(torch.eye(2)), torch.eye(2) * (1 + 1e-6) ** -0.5)  # nothing seen
    center.observe(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))  # mean 2, 5; variances 1 and 0
    assert center.mean.tolist() == [2, 5] and center.variance.item() == 0.5
    center.observe(torch.tensor([[4.0, 5.0], [4.0, 9.0]]))  # mean 4, 7; variances 0 and 4
    assert center.mean.tolist() == [3, 6]
    assert center.variance.item() == pytest.approx((0.5 + 2) / 2)
    want = torch.tensor([[1.0, -1.0]]) / math.sqrt(1.25)
    assert_close(center(torch.tensor([[4.0, 5.0]])), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3)])
def test_center_follows_the_last_ten_batches_or_so(shape):
    center, mean, variance = Center(3), torch.zeros(3), 1.0
    for i in range(15):
        h = draw(*shape, seed=i) + i
        center.observe(h)
        rows = h.reshape(-1, 3)
        rate = max(1 / (i + 1), 0.1)
        spread = sum((row - rows.mean(0)).square().mean() for row in rows) / len(rows)
        variance = (1 - rate) * variance + rate * spread
        mean = (1 - rate) * mean + rate * rows.mean(0)
    assert_close((center.mean, center.variance), (mean, variance))
    assert_close(center(h), (h - mean) / (variance + 1e-6).sqrt())


def test_center_stays_float32_under_autocast():
    results = []
    for half in (False, True):
        center, h = Center(3), (draw(4, 3) + 200).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            center.observe(h)
            y = center(h)
        (grad,) = torch.autograd.grad(y.square().sum(), h)
        results.append((y.detach(), grad, center.mean, center.variance))
    assert all(x.dtype == torch.float32 for x in results[1])
    assert_close(*results, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("center", [False, True])
def test_center_serves_the_gate_and_eq7_and_learns_after_use(center):
    moe, h = layer("task", center=center), draw(4, S, D) + 3
    task = torch.tensor([0, 0, 1, 1])
    if center:
        moe.center.mean += 2.0
        moe.center.variance *= 4.0
    seen = (h.mean(1) - 2) / math.sqrt(4 + 1e-6) if center else h.mean(1)
    z = moe.task_router.query(seen)
    before = {name: x.clone() for name, x in moe.named_buffers()}
    for training in (False, True):
        out = moe.train(training)(h, WHOLE, task=task)
        assert torch.equal(out.task_expert, eq1_top_k_gate(z, 2).index)
        want = eq7_info_nce(z, z, moe.task_router.w, task)
        assert_close((out.metrics["info_nce"], out.metrics["accuracy"]), want)
        learnt = any(not torch.equal(x, before[name]) for name, x in moe.named_buffers())
        assert learnt == (center and training)
    assert len(before) == (3 if center else 0)
    if center:  # rate 1: it has seen one batch
        assert_close(moe.center.mean, h.mean(1).mean(0))
        moe(h, WHOLE)  # without task numbers there is no trajectory to learn from
        assert moe.center.batches == 1
