"""test_moe.py: Eq. 2 and 4 (Sec. 4.1, 4.2): experts, the rules for h_bar, the layer of both MoEs.

Each equation three ways: numbers by hand, a slow loop (values and gradients), a property.
Run: python -m pytest -q tests/test_moe.py
"""

import math
import runpy

import pytest
import torch
from test_h_bar import READ, VIEWS, WHOLE, B, D, N, S, draw, layer, slow_h_bar
from torch.testing import assert_close

import moe
from contrastive import eq7_info_nce
from moe import H_BAR, Experts, MoELayer, Past, View, two_layers
from router import Routing, eq1_top_k_gate

K = 5


def experts():
    torch.manual_seed(0)
    e = Experts(K, D, 6, 4)
    for bias in (e.bias1, e.bias2):  # they start at zero
        torch.nn.init.normal_(bias)
    return e


def slow_mixture(e, x, index, weight):
    """Eq. 2 for one token x (D,), one number at a time."""
    y = [0.0] * e.bias2.shape[1]
    for i, w in zip(index.tolist(), weight, strict=True):
        hidden = []
        for f in range(e.bias1.shape[1]):
            a = e.bias1[i, f] + sum(x[d] * e.weight1[i, d, f] for d in range(len(x)))
            hidden.append(a * 0.5 * (1 + torch.erf(a / math.sqrt(2))))  # GELU
        for o in range(len(y)):
            y[o] = y[o] + w * (
                e.bias2[i, o] + sum(hidden[f] * e.weight2[i, f, o] for f in range(len(hidden)))
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


# ------------------------------------------------------------------------------------------ experts
def test_eq2_eq4_by_hand():
    # D = F = D_out = 1. GELU(1) = 0.84134475, GELU(2) = 1.95449974 (x times Phi(x)).
    e = Experts(2, 1, 1, 1)
    with torch.no_grad():
        e.weight1[:, 0, 0], e.bias1[:, 0] = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])
        e.weight2[:, 0, 0], e.bias2[:, 0] = torch.tensor([1.0, 10.0]), torch.tensor([0.0, -1.0])
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
    """Fewer tokens a row than hidden units: copies of tokens in place of weights. Same results."""
    m = layer("task")
    results = []
    for way in (m.task.sequences, None):
        x, logits = draw(B, steps, D).requires_grad_(), draw(B, 4, seed=1).requires_grad_()
        gate = eq1_top_k_gate(logits, 2)
        y = m._task_wise(x, gate) if way is None else way(x, gate)
        results.append(
            [
                y,
                *torch.autograd.grad(
                    (y * draw(*y.shape, seed=2)).sum(), (x, logits, *m.task.parameters())
                ),
            ]
        )
    assert_close(*results)


def test_eq2_all_experts_is_a_softmax_mixture():
    e, x, logits = experts(), draw(7, D), draw(7, K, seed=1)
    every = torch.stack([two_layers(x, *(p[i] for p in e.parameters())) for i in range(K)], 1)
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


def test_eq2_experts_that_no_token_kept_are_not_called(monkeypatch):
    """However many there are: the cost of a token does not grow with K."""
    called = []
    monkeypatch.setattr(moe, "two_layers", lambda *a: called.append(len(a[0])) or two_layers(*a))
    e, x, index = experts(), draw(3, D), torch.tensor([[3, 1], [1, 3], [3, 4]])
    weight = torch.full((3, 2), 0.5)
    y = e.tokens(x, Routing(index, weight))
    assert called == [2, 3, 1]  # tokens of experts 1, 3, 4; 0 and 2 have none
    assert_close(y, torch.stack([slow_mixture(e, x[i], index[i], weight[i]) for i in range(3)]))


def test_eq2_experts_that_are_not_kept_get_no_gradient():
    e, x = experts(), draw(4, D)
    gate = Routing(torch.full((4, 1), 2), torch.ones(4, 1))
    for y in (e.tokens(x, gate), e.sequences(x[:, None], gate)):
        for grad in torch.autograd.grad(y.sum(), list(e.parameters())):
            assert [bool(g.abs().max() > 0) for g in grad] == [i == 2 for i in range(K)]


def test_experts_name_their_biases_as_such():
    """They are stacked, hence matrices: weight decay has to tell them from weights by name."""
    names = [name for name, _ in experts().named_parameters()]
    assert names == ["weight1", "bias1", "weight2", "bias2"]
    assert all(p.dim() >= 2 for p in experts().parameters())


# -------------------------------------------------------------------------------------------- layer
@pytest.mark.parametrize("rule", ["sequence", "prefix"])
@pytest.mark.parametrize("kind", ["both", "token", "task"])
def test_eq2_eq4_layer_matches_loop(kind, rule):
    moe, h = layer(kind, rule), draw(2, 4, D).requires_grad_()
    view = View(slice(0, 4))
    out, want = moe(h, view), []
    h_bar = slow_h_bar(rule, h, view)
    for b in range(2):
        for t in range(4):
            parts = []
            if kind != "task":
                gate = eq1_top_k_gate(moe.token_router.router(h[b, t]), 2)
                parts.append(slow_mixture(moe.token, h[b, t], gate.index, gate.weight))
                assert out.token_expert[b, t].tolist() == gate.index.tolist()
            if kind != "token":
                at = (b,) if rule == "sequence" else (b, t)  # one gate a row, or one a token
                gate = eq1_top_k_gate(moe.task_router.query(h_bar[at]), 2)
                parts.append(slow_mixture(moe.task, h[b, t], gate.index, gate.weight))
                assert out.task_expert[at].tolist() == gate.index.tolist()
            assert [len(p) for p in parts] == ([D // 2, D // 2] if kind == "both" else [D])
            want.append(torch.cat(parts))  # token | task
    want = torch.stack(want).view(2, 4, D)
    grads = [torch.autograd.grad((y * draw(2, 4, D, seed=9)).sum(), h) for y in (out.y, want)]
    assert_close(out.y, want)
    assert_close(*grads, atol=1e-5, rtol=1e-4)
    assert out.losses == ({} if kind == "task" else {"balance": 0})  # not training
    assert out.metrics == {} and out.total is None
    assert (out.token_expert is None, out.task_expert is None) == (kind == "task", kind == "token")


@pytest.mark.parametrize("silent", ["token", "task"])
def test_layer_concatenates_token_then_task(silent):
    moe, h = layer("both"), draw(B, S, D)
    full = moe(h, WHOLE).y.split(D // 2, -1)
    torch.nn.init.zeros_(getattr(moe, silent).weight2)
    half = moe(h, WHOLE).y.split(D // 2, -1)
    still, speaks = (0, 1) if silent == "token" else (1, 0)
    assert half[still].abs().max() == 0 and full[still].abs().max() > 0
    assert torch.equal(half[speaks], full[speaks])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rule", ["sequence", "prefix", "token"])
@pytest.mark.parametrize("kind", ["both", "token", "task"])
def test_layer_reads_the_tokens_of_the_full_output(kind, rule, view):
    moe, h = layer(kind, rule), draw(B, S, D)
    full, part = moe(h, VIEWS[view]), moe(h, VIEWS[view], READ)
    assert part.y.shape == (B, len(READ), D)
    # Not bit for bit: a product over fewer rows may add up in another order.
    assert_close(part.y, full.y[:, READ], atol=1e-6, rtol=0)
    if kind != "task":
        assert torch.equal(part.token_expert, full.token_expert)  # routed: all tokens, read or not
        assert part.token_expert.shape[:2] == (B, S)
    if kind != "token":
        whole_row = full.task_expert.dim() == 2
        assert whole_row == (rule == "sequence" and view != "last")
        want = full.task_expert if whole_row else full.task_expert[:, READ]
        assert torch.equal(part.task_expert, want)


def test_eq3_layer_balance_is_over_all_tokens():
    moe, h = layer("both", w_imp=0.2, w_load=0.3).train(), draw(B, S, D)
    losses = []
    for read in (None, READ):
        torch.manual_seed(1)
        losses.append(moe(h, WHOLE, read).losses["balance"])
    torch.manual_seed(1)
    want = moe.token_router(h.flatten(0, 1))[1]
    assert want > 0 and torch.equal(losses[0], want) and torch.equal(losses[1], want)
    assert (moe.token_router.w_imp, moe.token_router.w_load) == (0.2, 0.3)
    assert layer("task").train()(h, WHOLE).losses == {}


@pytest.mark.parametrize("keys", ["all", "other"])
@pytest.mark.parametrize("rule", ["sequence", "prefix", "token"])
@pytest.mark.parametrize("view", ["ad", "first", "last"])
@pytest.mark.parametrize("training", [False, True])
def test_eq7_layer_contrasts_the_tokens_of_tau_alone(training, view, rule, keys):
    moe = layer("both", rule, w_contrastive=0.25, keys=keys).train(training)
    torch.nn.init.normal_(moe.task_router.key.second.weight)  # unlike the query router's
    h, task = draw(6, S, D), torch.tensor([0, 0, 1, 1, 2, 2])
    whole = VIEWS[view]
    if view == "last":
        whole = View(whole.prompt, whole.visible.repeat(2, 1))
    tau = {"ad": h, "first": h[:, 1:], "last": h[:, :N]}[view]  # no query among them
    z, keys_z = moe.task_router.query(tau.mean(1)), moe.task_router.key(tau.mean(1))
    if rule == "token":  # the mean of the logits
        z, keys_z = moe.task_router.query(tau).mean(1), moe.task_router.key(tau).mean(1)
    want, accuracy = eq7_info_nce(z, keys_z, moe.task_router.w, task, keys)
    out = moe(h, whole, READ, task=task)
    assert_close(out.metrics, {"info_nce": want, "accuracy": accuracy})
    assert_close(out.losses["contrastive"], 0.25 * want)
    assert list(out.losses) == ["balance", "contrastive"]
    elsewhere = h.clone()
    if view == "first":
        elsewhere[:, 0] += 1
    if view == "last":
        elsewhere[:, N:] += 1
    again = moe(elsewhere, whole, task=task)
    assert_close(again.metrics["info_nce"], want)
    assert "contrastive" not in moe(h, whole).losses  # no task numbers, no Eq. 7
    assert moe(h, whole, task=torch.arange(6)).losses["contrastive"] == 0  # each task once
    alone = layer("token")(h, whole, task=task)
    assert list(alone.losses) == ["balance"] and alone.metrics == {}


@pytest.mark.parametrize("rule", H_BAR)
def test_eq7_for_the_router_alone(rule):
    """--no-contrast-trunk: the same loss, the same gradient in the router, none below it."""
    gradients = []
    for trunk in (True, False):
        net = layer("task", rule, contrast_trunk=trunk).train()
        h = draw(4, S, D).requires_grad_()
        loss = net(h, WHOLE, task=torch.tensor([0, 0, 1, 1])).losses["contrastive"]
        weights = list(net.task_router.query.parameters())
        in_h, *in_router = torch.autograd.grad(loss, [h, *weights], allow_unused=True)
        gradients.append((loss.detach(), in_router))
        assert (in_h is None or not in_h.any()) != trunk
    assert_close(*gradients)
    assert all(part.any() for part in gradients[0][1])


def test_layer_permuting_experts_permutes_the_choice_alone():
    moe, h = layer("both"), draw(B, S, D)
    old = moe(h, WHOLE)
    for part, router in (("token", moe.token_router.router), ("task", moe.task_router.query)):
        perm = torch.arange(len(router.second.weight)).roll(1)  # expert i moves to place i + 1
        for p in (router.second.weight, *getattr(moe, part).parameters()):
            p.data = p.data[perm]
    new = moe(h, WHOLE)
    assert_close(new.y, old.y)
    assert torch.equal(new.token_expert, (old.token_expert + 1) % 6)
    assert torch.equal(new.task_expert, (old.task_expert + 1) % 4)


def test_eq4_layer_row_gate_depends_on_h_bar_alone(monkeypatch):
    moe, h = layer("both"), draw(B, S, D)
    a = moe(h, WHOLE)
    monkeypatch.setitem(H_BAR, "sequence", lambda h, view, past: 3 * draw(B, D, seed=5))
    b = moe(h, WHOLE)
    assert torch.equal(a.y[..., : D // 2], b.y[..., : D // 2])  # token half: does not see h_bar
    assert not torch.allclose(a.y[..., D // 2 :], b.y[..., D // 2 :])
    # the same h_bar at every token
    monkeypatch.setitem(
        H_BAR, "sequence", lambda h, view, past: h.mean(1)[:, None].expand(-1, S, -1)
    )
    assert_close(moe(h, WHOLE).y, a.y)


def test_layer_trains_both_routers_through_the_gates():
    moe, h = layer("both").train(), draw(B, S, D)
    moe(h, WHOLE).y.square().sum().backward()
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
    want = moe(h, WHOLE)
    with torch.autocast("cpu", torch.bfloat16):
        z, logits = moe.task_router(h.mean(1)), moe.token_router.router(h)
        low = moe(h, WHOLE)
    assert z.dtype == logits.dtype == low.losses["balance"].dtype == torch.float32
    assert torch.equal(z, moe.task_router(h.mean(1)))
    assert torch.equal(logits, moe.token_router.router(h))
    assert torch.equal(low.token_expert, want.token_expert) and torch.equal(
        low.task_expert, want.task_expert
    )
    assert not torch.equal(low.y.float(), want.y)  # the experts do run in half precision
    assert_close(low.y.float(), want.y, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("rule", H_BAR)
@pytest.mark.parametrize("view", ["ad", "first"])
def test_layer_losses_stay_float32_under_autocast(view, rule):
    """Values and gradients of Eq. 3 and 7 through the whole layer, centring included."""
    results, task = [], torch.tensor([0, 0, 1, 1, 2, 2])
    for half in (False, True):
        moe = layer("both", rule, w_contrastive=1.0, center=True).train()
        torch.nn.init.normal_(moe.token_router.noise_weight)
        h = (draw(6, S, D) + 20 * draw(D, seed=1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = moe(h, VIEWS[view], READ, task=task, past=Past(torch.zeros(6, D), 0))
        losses = torch.stack(list(out.losses.values()))
        leaves = [h, *moe.token_router.parameters(), *moe.task_router.query.parameters()]
        grads = torch.autograd.grad(losses.sum(), [*leaves, moe.task_router.w])
        values = (losses.detach(), *out.metrics.values(), out.total.detach(), *moe.buffers())
        assert all(x.dtype == torch.float32 for x in values) and (losses > 0.01).all()
        results.append((values, grads))
    assert_close(*results, atol=1e-6, rtol=1e-6)


def test_layer_odd_width_cannot_be_shared():
    with pytest.raises(ValueError, match="odd"):
        layer("both", width=7)
    h, view = draw(1, 2, 7), View(slice(0, 2))
    assert layer("token", width=7)(h, view).y.shape == (1, 2, 7)
    assert layer("task", width=7)(h, view).y.shape == (1, 2, 7)


def test_layer_hidden_units_are_shared_equally():
    with pytest.raises(ValueError, match="multiple"):
        MoELayer(8, "both", (6, 2, 47), (4, 2, 32))


def test_layer_keeps_the_order_of_its_parameters():
    """A seed gives the same weights only as long as they are drawn in this order."""
    names = [name.split(".")[0] for name, _ in layer("both").named_parameters()]
    assert list(dict.fromkeys(names)) == ["token_router", "token", "task_router", "task"]


@pytest.mark.parametrize(
    ("file", "last"),
    [
        ("router.py", "(Eq. 3)"),
        ("contrastive.py", "N = 256: bound of Eq. 6 = 2.3462"),
        ("moe.py", "output (1, 3, 8): 4 numbers from each half"),
    ],
)
def test_demos(file, last, capsys):
    """`python router.py` and the like."""
    runpy.run_path(moe.__file__.replace("moe.py", file), run_name="__main__")
    assert capsys.readouterr().out.strip().endswith(last)
