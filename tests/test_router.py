"""test_router.py: Eq. 1, 3 and 12-18 (paper Sec. 3.2, 4.1, App. B) and the routers of App. F.

Each equation three ways: numbers by hand, a slow loop (values and gradients), a property.
Run: python -m pytest -q tests/test_router.py
"""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.testing import assert_close

import router as r


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(fast, slow, *inputs):
    """Both functions have the same value and, against one random direction, the same gradients."""
    results = []
    for f in (fast, slow):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = f(*leaves)
        grads = torch.autograd.grad((y * draw(*y.shape, seed=9).to(y.dtype)).sum(), leaves)
        results.append((y.detach(), grads))
    assert_close(*results)


def slow_top_k_gate(logits, k):
    rows = []
    for row in logits:
        kept = sorted(range(len(row)), key=lambda i: -row[i].item())[:k]
        total = sum(row[i].exp() for i in kept)
        rows.append(
            torch.stack(
                [row[i].exp() / total if i in kept else 0 * row[i] for i in range(len(row))]
            )
        )
    return torch.stack(rows)


def slow_probability(clean, noisy, std, k):
    rows = []
    for c, h, s in zip(clean, noisy, std, strict=True):
        row = []
        for i in range(len(c)):
            others = sorted((h[j] for j in range(len(h)) if j != i), reverse=True)
            row.append(0.5 * (1 + torch.erf((c[i] - others[k - 1]) / s[i] / math.sqrt(2))))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def slow_cv_squared(x):
    mean = sum(x) / len(x)
    return sum((v - mean) ** 2 for v in x) / len(x) / mean**2


# -------------------------------------------------------------------------------------------- Eq. 1
def test_eq1_by_hand():
    logits = torch.tensor([[2.0, 1.0, 6.0, 3.0]]).log()
    two, four = r.eq1_top_k_gate(logits, 2), r.eq1_top_k_gate(logits, 4)
    assert two.index.tolist() == [[2, 3]] and four.index.tolist() == [[2, 3, 0, 1]]
    assert_close(two.weight, torch.tensor([[6 / 9, 3 / 9]]))
    assert_close(four.weight, torch.tensor([[6 / 12, 3 / 12, 2 / 12, 1 / 12]]))
    assert_close(r.dense_gates(two, 4), torch.tensor([[0.0, 0.0, 6 / 9, 3 / 9]]))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_eq1_matches_loop(k):
    logits = draw(7, 5).float()
    assert_same(
        lambda x: r.dense_gates(r.eq1_top_k_gate(x, k), 5), lambda x: slow_top_k_gate(x, k), logits
    )


def test_eq1_all_experts_is_plain_softmax_and_permutes():
    logits, perm = draw(7, 5).float(), torch.tensor([3, 0, 4, 1, 2])
    assert_close(r.dense_gates(r.eq1_top_k_gate(logits, 5), 5), logits.softmax(-1))
    gates = r.dense_gates(r.eq1_top_k_gate(logits, 2), 5)
    assert torch.equal(r.dense_gates(r.eq1_top_k_gate(logits[:, perm], 2), 5), gates[:, perm])
    assert (gates > 0).sum(-1).tolist() == [2] * 7
    assert_close(gates.sum(-1), torch.ones(7))


# ----------------------------------------------------------------------------------- Eq. 14, 12, CV
def test_eq14_by_hand_and_loop():
    clean, std, noise = (torch.tensor([x]) for x in ([1.0, 2.0], [0.5, 2.0], [3.0, -1.0]))
    assert_close(r.eq14_noisy_logits(clean, std, noise), torch.tensor([[2.5, 0.0]]))
    assert torch.equal(r.eq14_noisy_logits(clean, std, 0 * noise), clean)

    def slow(c, s, e):
        return torch.stack(
            [torch.stack([c[n, i] + e[n, i] * s[n, i] for i in range(3)]) for n in range(4)]
        )

    assert_same(r.eq14_noisy_logits, slow, draw(4, 3), draw(4, 3, seed=1).exp(), draw(4, 3, seed=2))


def test_eq12_by_hand_loop_and_total():
    gates = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]])
    assert_close(r.eq12_importance(gates), torch.tensor([0.75, 0.75, 0.5]))
    logits = draw(9, 4).float()

    def importance(x):
        return r.eq12_importance(r.dense_gates(r.eq1_top_k_gate(x, 2), 4))

    assert_same(importance, lambda x: sum(slow_top_k_gate(x, 2)), logits)
    assert importance(logits).sum().item() == pytest.approx(9)  # every token gives away 1


def test_cv_squared_by_hand_loop_and_extremes():
    assert r.cv_squared(torch.tensor([1.0, 3.0])).item() == pytest.approx(
        0.25
    )  # variance 1, mean 2
    assert r.cv_squared(torch.tensor([1.0, 2.0, 3.0])).item() == pytest.approx(1 / 6)
    x = draw(6).exp()
    assert_same(r.cv_squared, slow_cv_squared, x)
    assert_close(r.cv_squared(100 * x), r.cv_squared(x))  # relative to the mean
    assert r.cv_squared(torch.full((6,), 7.0)).item() == 0  # equal loads
    assert r.cv_squared(torch.eye(6)[2]).item() == pytest.approx(5)  # one expert has all: K - 1


# ---------------------------------------------------------------------------------------- Eq. 15-17
CLEAN, STD, NOISE = (
    torch.tensor([[3.0, 0.0, 0.5]]),
    torch.ones(1, 3),
    torch.tensor([[0.5, 1.0, 0.0]]),
)


def test_eq16_by_hand():
    # H = (3.5, 1, 0.5), k = 1. Expert 0 must beat 1, the best of the others; experts 1 and 2 must
    # beat 3.5.
    p = r.eq16_probability(CLEAN, CLEAN + NOISE, STD, 1)
    phi = {2.0: 0.97724987, -3.5: 2.3262908e-4, -3.0: 1.3498980e-3}  # from a table of Phi
    assert_close(p, torch.tensor([[phi[2.0], phi[-3.5], phi[-3.0]]]), atol=1e-7, rtol=1e-5)
    half = r.eq16_probability(CLEAN, CLEAN + NOISE, 2 * STD, 1)[0, 0]
    assert half.item() == pytest.approx(0.84134475)  # Phi(1): twice the noise


def test_eq15_bar_is_chosen_by_the_noisy_logit_not_by_the_noise():
    # Expert 0 is kept, though its noise 0.5 lies below the next-best logit 1. Comparing the noise
    # would measure it against its own logit: Phi(3 - 3.5) = 0.309 in place of Phi(3 - 1) = 0.977.
    noisy = CLEAN + NOISE
    top = noisy.topk(2).values
    wrong_bar = torch.where(top[:, 1:] < NOISE, top[:, 1:], top[:, :1])
    wrong = torch.special.ndtr((CLEAN - wrong_bar) / STD)[0, 0].item()
    assert wrong == pytest.approx(0.30853754)
    assert r.eq16_probability(CLEAN, noisy, STD, 1)[0, 0].item() == pytest.approx(0.97724987)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_eq17_load_matches_definition(k):
    inputs = draw(16, 6), draw(16, 6, seed=1).abs() + 0.1, draw(16, 6, seed=2)

    def load(clean, std, noise):
        return r.eq17_load(
            r.eq16_probability(clean, r.eq14_noisy_logits(clean, std, noise), std, k)
        )

    assert_same(load, lambda c, s, e: sum(slow_probability(c, c + e * s, s, k)), *inputs)
    perm = torch.tensor([3, 0, 5, 1, 4, 2])  # experts in another order: so is the load
    assert_close(load(*(x[:, perm] for x in inputs)), load(*inputs)[perm])
    assert_close(r.eq17_load(torch.tensor([[0.25, 0.75], [0.5, 1.0]])), torch.tensor([0.75, 1.75]))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_eq16_matches_loop(k):
    clean, std, noisy = draw(8, 6), draw(8, 6, seed=1).abs() + 0.1, draw(8, 6, seed=2)
    assert_same(
        lambda *x: r.eq16_probability(*x, k), lambda *x: slow_probability(*x, k), clean, noisy, std
    )
    tied = torch.full_like(clean, 0.5)  # then the bar is 0.5 for everyone
    assert_close(r.eq16_probability(clean, tied, std, k), torch.special.ndtr((clean - 0.5) / std))


def test_eq15_probability_is_that_of_redrawing_one_noise():
    clean, std, noise, draws = (
        draw(1, 5),
        draw(1, 5, seed=1).abs() + 0.5,
        draw(1, 5, seed=2),
        100_000,
    )
    noisy = clean + noise * std
    p = r.eq16_probability(clean, noisy, std, 2)
    for i in range(5):
        again = noisy.repeat(draws, 1)
        again[:, i] = clean[0, i] + std[0, i] * draw(draws, seed=10 + i)
        kept = (again.topk(2).indices == i).any(1).double().mean().item()
        assert p[0, i].item() == pytest.approx(kept, abs=0.008)  # 5 standard errors


def test_eq17_load_averages_the_number_of_tokens_kept():
    clean, std = draw(6).expand(20_000, 6), (draw(6, seed=1).abs() + 0.5).expand(20_000, 6)
    noisy = r.eq14_noisy_logits(clean, std, draw(20_000, 6, seed=2))
    kept = (r.dense_gates(r.eq1_top_k_gate(noisy, 2), 6) > 0).double().mean(0)
    load = r.eq17_load(r.eq16_probability(clean, noisy, std, 2)) / 20_000
    assert load.sum().item() == pytest.approx(2, abs=0.02)  # sum_i P(i; h) is k on average
    assert_close(load, kept, atol=0.015, rtol=0)


# ------------------------------------------------------------------------------------ Eq. 13, 18, 3
def test_eq3_eq13_eq18_by_hand_and_loop():
    importance, load = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])  # CV^2: 1/4 and 1
    assert r.eq13_importance_loss(importance, 0.1).item() == pytest.approx(0.025)
    assert r.eq18_load_loss(load, 0.01).item() == pytest.approx(0.01)
    assert r.eq3_balance_loss(importance, load, 0.1, 0.01).item() == pytest.approx(0.035)
    a, b = draw(5).exp(), draw(5, seed=1).exp()

    def slow(x, y):
        return 0.3 * slow_cv_squared(x) + 0.7 * slow_cv_squared(y)

    assert_same(lambda x, y: r.eq3_balance_loss(x, y, 0.3, 0.7), slow, a, b)
    assert_same(lambda x: r.eq13_importance_loss(x, 0.3), lambda x: 0.3 * slow_cv_squared(x), a)
    assert_same(lambda x: r.eq18_load_loss(x, 0.7), lambda x: 0.7 * slow_cv_squared(x), b)
    equal = torch.ones(5)
    assert_close(r.eq3_balance_loss(a, equal, 0.3, 0.7), r.eq13_importance_loss(a, 0.3))
    assert_close(r.eq3_balance_loss(equal, b, 0.3, 0.7), r.eq18_load_loss(b, 0.7))


# ------------------------------------------------------------------------------------------- App. F
def test_router_by_hand():
    router = r.Router(2, 2)
    router.load_state_dict(
        {"first.weight": torch.eye(2), "second.weight": torch.tensor([[1.0, 1], [1, -1]])}
    )
    # tanh(0.5) = 0.46211716, tanh(-0.25) = -0.24491866
    assert_close(router(torch.tensor([0.5, -0.25])), torch.tensor([0.21719850, 0.70703582]))


def test_router_matches_loop_and_has_no_bias():
    router, h = r.Router(3, 4), draw(5, 3).float()
    shapes = {name: tuple(p.shape) for name, p in router.named_parameters()}
    assert shapes == {"first.weight": (4, 3), "second.weight": (4, 4)}

    def fast(h, a, b):
        return torch.func.functional_call(router, {"first.weight": a, "second.weight": b}, h)

    def dot(u, v):
        return sum(x * y for x, y in zip(u, v, strict=True))

    def slow(h, a, b):
        middle = [[torch.tanh(dot(x, row)) for row in a] for x in h]
        return torch.stack([torch.stack([dot(m, row) for row in b]) for m in middle])

    assert_same(fast, slow, h, router.first.weight, router.second.weight)
    assert_close(router(-h), -router(h))  # no bias, Tanh: odd
    logits, perm = router(h), [2, 0, 3, 1]
    router.second.weight.data = router.second.weight.data[perm]
    assert_close(router(h), logits[:, perm])  # a row of the second layer is an expert


def test_router_stays_float32_under_autocast():
    router, h = r.Router(8, 6), draw(32, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        low, half = router(h), router(h.bfloat16())
    assert low.dtype == half.dtype == torch.float32
    assert torch.equal(low, router(h)) and torch.equal(half, router(h.bfloat16().float()))


def test_shapes_in_signatures_are_checked_while_tests_run():
    gates = torch.ones(4, 3)
    assert r.eq12_importance(gates).shape == (3,)
    with pytest.raises(TypeCheckError):
        r.eq12_importance(gates[0])  # (K,) for (N, K)
    with pytest.raises(TypeCheckError):
        r.eq14_noisy_logits(gates, gates, gates.T)  # three matrices, but not of one shape
    with pytest.raises(TypeCheckError):
        r.eq12_importance(gates.long())  # whole numbers
    with pytest.raises(TypeCheckError):
        r.Routing(torch.zeros(4, 2).long(), torch.ones(4, 3))  # a field of a dataclass
    with pytest.raises(TypeCheckError):
        r.Router(2, 3)(torch.zeros(5, 2, dtype=torch.int32))


def noisy_router(k, w_imp=0.1, w_load=0.2):
    torch.manual_seed(0)
    router, h = r.NoisyTopKRouter(3, 5, k, w_imp, w_load), torch.randn(24, 3)
    torch.nn.init.normal_(router.noise_weight)
    return router, h


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(("w_imp", "w_load"), [(0.1, 0.0), (0.0, 0.2), (0.1, 0.2)])
def test_eq3_noisy_router_matches_loop(k, w_imp, w_load):
    router, h = noisy_router(k, w_imp, w_load)
    torch.manual_seed(1)
    routing, loss = router(h)
    torch.manual_seed(1)
    clean, noise = router.router(h), torch.randn(24, 5)
    std = torch.log(1 + torch.exp(h @ router.noise_weight)) + 0.01
    gates = slow_top_k_gate(clean + noise * std, k)
    want = w_imp * slow_cv_squared(sum(gates))
    if k < 5:
        want = want + w_load * slow_cv_squared(
            sum(slow_probability(clean, clean + noise * std, std, k))
        )
    assert_close(r.dense_gates(routing, 5), gates)
    assert_close(loss, want)
    if loss.item() > 0:
        weights = list(router.parameters())
        got, wanted = torch.autograd.grad(loss, weights), torch.autograd.grad(want, weights)
        assert_close(got, wanted, atol=1e-5, rtol=1e-4)
        # Both terms train W_noise too; but one kept expert always weighs 1, so its importance is
        # constant.
        assert all(g.abs().max() > 0 for g in got) == (k > 1 or w_load > 0)
    else:  # every expert is always kept: only the importance can be unequal
        assert k == 5 and w_imp == 0


def test_eq14_noise_starts_at_softplus_of_zero():
    torch.manual_seed(0)
    router, h = r.NoisyTopKRouter(3, 5, 2, 0.1, 0.1), torch.randn(24, 3)
    torch.manual_seed(1)
    routing, _ = router(h)
    torch.manual_seed(1)
    want = r.eq1_top_k_gate(router.router(h) + torch.randn(24, 5) * (math.log(2) + 0.01), 2)
    assert torch.equal(routing.index, want.index)
    assert_close(routing.weight, want.weight)


def test_eq2_eval_has_no_noise_and_no_loss():
    router, h = noisy_router(2)
    first, second = router(h)[0], router(h)[0]
    assert not torch.equal(first.weight, second.weight)  # training: two draws of the noise
    router.eval()
    routing, loss = router(h)
    assert loss.item() == 0
    assert_close(r.dense_gates(routing, 5), slow_top_k_gate(router.router(h), 2))


# ----------------------------------------------------------------------------------------- autocast
def assert_unmoved_by_autocast(f, *inputs):
    """Values and gradients under autocast are those without it, to 1e-6, and float32."""
    results = []
    for half in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = f(*leaves)
        direction = draw(*y.shape, seed=9).float()
        results.append((y.detach(), torch.autograd.grad((y * direction).sum(), leaves)))
    assert results[1][0].dtype == torch.float32
    assert_close(*results, atol=1e-6, rtol=1e-6)


def test_autocast_does_round_products_to_half_precision():
    """Otherwise the tests below would show nothing: `.float()` operands are cast back."""
    a, b = draw(8, 8).float(), draw(8, 8, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        low = a.float() @ b.float()
        with r.full_precision(a):
            full = a.float() @ b.float()
    assert low.dtype == torch.bfloat16 and (low - a @ b).abs().max() > 1e-3
    assert torch.equal(full, a @ b)


AUTOCAST = {
    "eq1": lambda x: r.dense_gates(r.eq1_top_k_gate(x, 2), 6),
    "eq3": lambda x: r.eq3_balance_loss(x.exp().sum(0), x.exp().sum(0).sqrt(), 0.3, 0.7),
    "eq12": lambda x: r.eq12_importance(x),
    "eq14_logits": lambda x: r.eq14_noisy_logits(x, x.exp(), x.sin()),
    "eq14_scale": lambda x: r.eq14_noise_scale(x, x[:6, :4]),
    "eq16_eq17": lambda x: r.eq17_load(r.eq16_probability(x, x + x.sin(), x.exp(), 2)),
    "cv": lambda x: r.cv_squared(x.exp().sum(0)),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_equations_stay_float32_under_autocast(name):
    assert_unmoved_by_autocast(AUTOCAST[name], draw(32, 6).float())


def test_router_has_the_same_gradients_under_autocast():
    router = r.Router(8, 6)

    def logits(h, first, second):
        weights = {"first.weight": first, "second.weight": second}
        return torch.func.functional_call(router, weights, h)

    h = draw(32, 8).float()
    assert_unmoved_by_autocast(logits, h, router.first.weight, router.second.weight)


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("part", ["weights", "loss"])
def test_eq2_eq3_noisy_router_stays_float32_under_autocast(part, k):
    router, h = noisy_router(k)
    names = [name for name, _ in router.named_parameters()]

    def run(h, *weights):
        torch.manual_seed(1)  # the same noise
        state = dict(zip(names, weights, strict=True))
        routing, loss = torch.func.functional_call(router, state, h)
        # + 0 * ...: what does not depend on an input has the gradient 0, not none
        zero = 0 * (h.sum() + sum(w.sum() for w in weights))
        parts = {"weights": r.dense_gates(routing, 5), "loss": loss}
        return parts[part] + zero

    assert_unmoved_by_autocast(run, h, *router.parameters())
