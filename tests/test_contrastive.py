"""test_contrastive.py: Eq. 7 (InfoNCE), 8 (momentum), Eq. 5, 6 and Theorem 1 (Sec. 4.2, App. C).

Each equation three ways: numbers by hand, a slow loop (values and gradients), a property.
Run: python -m pytest -q tests/test_contrastive.py
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from contrastive import (
    TaskRouter,
    eq6_bound,
    eq7_info_nce,
    eq7_pairs,
    eq8_momentum_update,
    symmetric_channel_information,
)
from router import Router, biased_top_k_gate, eq1_top_k_gate


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def info_nce_of_scores(score, task):
    """Eq. 7 for given scores: query = score, key = W = identity."""
    eye = torch.eye(len(score))
    return eq7_info_nce(score, eye, eye, torch.tensor(task))


def slow_info_nce(query, key, w, task, keys="all"):
    losses, hits = [], []
    for i in range(len(task)):
        above, below, best = 0.0, 0.0, None
        for j in range(len(task)):
            if j == i or (keys == "other" and j % 2 == i % 2):
                continue
            score = sum(
                query[i, a] * w[a, b] * key[j, b] for a in range(len(w)) for b in range(len(w))
            )
            if task[j] == task[i]:
                above = above + score.exp()
            else:
                below = below + score.exp()
            if best is None or score > best[0]:
                best = score, float(task[j] == task[i])
        if isinstance(above, torch.Tensor):
            losses.append(-torch.log(above / (above + below)))
            hits.append(best[1])
    return sum(losses) / len(losses), sum(hits) / len(hits)


# -------------------------------------------------------------------------------------------- Eq. 7
def test_eq7_by_hand():
    exp_score = [
        [99.0, 3, 1, 4],  # positives 3 + 1 of 8: log 2; the best key is a negative
        [5.0, 99, 1, 2],  # positives 5 + 1 of 8: log 4/3; the best key is a positive
        [1.0, 1, 99, 6],  # positives 1 + 1 of 8: log 4; the best key is a negative
        [7.0, 7, 7, 99],  # the only draw of its task: left out as a query, kept as a key
    ]
    loss, accuracy = info_nce_of_scores(torch.tensor(exp_score).log(), [0, 0, 0, 1])
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3)
    assert accuracy.item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("keys", ["all", "other"])
@pytest.mark.parametrize(
    "task", [[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1, 1, 2], [5, 3, 5, 5, 3, 3], [2, 2, 1]]
)
def test_eq7_matches_loop(task, keys):
    inputs = draw(len(task), 3), draw(len(task), 3, seed=1), draw(3, 3, seed=2)
    results = []
    for f in (eq7_info_nce, slow_info_nce):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss, accuracy = f(*leaves, torch.tensor(task), keys)
        results.append((loss.detach(), float(accuracy), torch.autograd.grad(loss, leaves)))
    assert_close(*results)


def test_algorithm1_key_batch_by_hand():
    """keys="other": rows 0, 2, 4 are the query batch B, rows 1, 3, 5 the key batch B', and back."""
    task = torch.tensor([7, 7, 4, 4, 9, 9])
    is_key, positive = eq7_pairs(task, "other")
    assert is_key.int().tolist() == [[0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]] * 3
    assert positive.nonzero().tolist() == [[0, 1], [1, 0], [2, 3], [3, 2], [4, 5], [5, 4]]
    is_key, positive = eq7_pairs(task)  # the text: m - 1 keys, the same positives
    assert is_key.sum(1).tolist() == [5] * 6
    assert torch.equal(positive, eq7_pairs(task, "other")[1])
    # Equal scores: 1 positive among m/2 keys, or among m - 1.
    z, w = torch.ones(6, 2), torch.eye(2)
    assert eq7_info_nce(z, z, w, task, "other")[0].item() == pytest.approx(math.log(3))
    assert eq7_info_nce(z, z, w, task)[0].item() == pytest.approx(math.log(5))


def test_algorithm1_key_batch_ignores_the_own_half():
    score, task = draw(6, 6), torch.tensor([0, 0, 1, 1, 2, 2])
    eye, other = torch.eye(6), score.clone()
    own_half = torch.arange(6)[:, None] % 2 == torch.arange(6) % 2
    other[own_half] += 100.0
    want = eq7_info_nce(score, eye, eye, task, "other")
    assert_close(eq7_info_nce(other, eye, eye, task, "other"), want)
    # It is the cross-entropy of finding tau' among the other half, averaged over both directions.
    cross = [
        F.cross_entropy(score[start::2, 1 - start :: 2], torch.arange(3)).item() for start in (0, 1)
    ]
    assert want[0].item() == pytest.approx(sum(cross) / 2)


@pytest.mark.parametrize(
    ("task", "keys_per_positive"),
    [([0, 0, 0, 1, 1, 1, 2, 2, 2], 8 / 2), ([0, 1, 2, 0, 1, 2], 5 / 1), ([0, 0, 0, 0], 3 / 3)],
)
def test_eq7_equal_scores_give_log_of_keys_per_positive(task, keys_per_positive):
    loss, _ = info_nce_of_scores(torch.full((len(task), len(task)), 0.7), task)
    assert loss.item() == pytest.approx(math.log(keys_per_positive), abs=1e-6)


def test_eq7_query_without_positive_is_left_out():
    score = draw(5, 5)
    loss, _ = info_nce_of_scores(score, [0, 0, 1, 1, 2])
    other = score.clone()
    other[4] = 100.0  # as a query, trajectory 4 does not count ...
    assert torch.equal(info_nce_of_scores(other, [0, 0, 1, 1, 2])[0], loss)
    other[:4, 4] += 1.0  # ... as a negative of the others it does
    assert info_nce_of_scores(other, [0, 0, 1, 1, 2])[0] > loss + 0.01


def test_eq7_without_any_positive_is_zero():
    loss, accuracy = info_nce_of_scores(draw(3, 3).bfloat16(), [0, 1, 2])
    assert loss == accuracy == 0 and loss.dtype == torch.float32


def test_eq7_sums_positives_within_the_logarithm():
    score, task = draw(6, 6), [0, 0, 0, 1, 1, 1]
    single = []  # one cross-entropy for every pair of a query and one of its positives
    for i, j in itertools.permutations(range(6), 2):
        if task[i] == task[j]:
            others = [key for key in range(6) if key != i]
            single.append(F.cross_entropy(score[i, others], torch.tensor(others.index(j))))
    average = (sum(single) / len(single)).item()
    # two positives: log of their sum exceeds the mean of their logs by at least log 2
    assert info_nce_of_scores(score, task)[0].item() < average - math.log(2)


def test_eq7_ignores_a_constant_added_to_scores():
    query, key, w = draw(6, 3), draw(6, 3, seed=1), draw(3, 3, seed=2)
    task, one = torch.tensor([0, 1, 0, 1, 0, 2]), torch.ones(6, 1)
    shifted = torch.block_diag(w, torch.tensor([[5.0]]))  # z_i W z_j + 5
    want = eq7_info_nce(query, key, w, task)
    assert_close(
        eq7_info_nce(torch.cat([query, one], 1), torch.cat([key, one], 1), shifted, task), want
    )


def test_eq7_huge_scores_stay_finite():
    score = torch.tensor([[0.0, 1e4, 0], [-1e4, 0, 1e4], [0, 0, 0]], requires_grad=True)
    loss, accuracy = info_nce_of_scores(score, [0, 0, 1])
    loss.backward()
    assert loss.item() == pytest.approx((0 + 2e4) / 2)  # rows: log(1 + e^-10000), log(1 + e^20000)
    assert accuracy.item() == 0.5
    assert_close(score.grad, torch.tensor([[0.0, 0, 0], [-0.5, 0, 0.5], [0, 0, 0]]))


@pytest.mark.parametrize("keys", ["all", "other"])
@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_eq7_stays_float32_under_autocast(keys, offset):
    """An offset of z moves all scores by 100,000; bfloat16 would round them to one number."""
    inputs = draw(6, 3) + offset, draw(6, 3, seed=1) + offset, torch.eye(3) + draw(3, 3, seed=2)
    results = []
    for half in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss, accuracy = eq7_info_nce(*leaves, torch.tensor([0, 0, 1, 1, 2, 2]), keys)
        results.append((loss.detach(), accuracy, torch.autograd.grad(loss, leaves)))
    assert results[1][0].dtype == torch.float32 and results[0][0] > 0.1
    assert_close(*results, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(6, 8), (6, 5, 8)])  # h_bar; the tokens of each trajectory
def test_eq7_task_router_stays_float32_under_autocast(shape):
    torch.manual_seed(0)
    router, task = TaskRouter(8, 4).train(), torch.tensor([0, 0, 1, 1, 2, 2])
    results = []
    for half in (False, True):
        h = draw(*shape).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = router(h)
            loss, accuracy = router.contrast(h, task)
        leaves = [h, *router.query.parameters(), router.w]
        grads = torch.autograd.grad(loss + logits.square().sum(), leaves)
        results.append((logits.detach(), loss.detach(), accuracy, grads))
    assert results[1][0].dtype == results[1][1].dtype == torch.float32
    assert_close(*results, atol=1e-6, rtol=1e-6)


def test_eq7_is_float32_for_half_precision_inputs():
    query, key, w = (draw(4, 4, seed=i).bfloat16() for i in range(3))
    task = torch.tensor([0, 0, 1, 1])
    loss = eq7_info_nce(query, key, w, task)[0]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, eq7_info_nce(query.float(), key.float(), w.float(), task)[0])


# -------------------------------------------------------------------------------------------- Eq. 8
def two_routers():
    torch.manual_seed(0)
    return Router(3, 4), Router(3, 4)


def test_eq8_by_hand():
    key, query = two_routers()
    for p, q in zip(key.parameters(), query.parameters(), strict=True):
        p.data.fill_(2.0)
        q.data.fill_(6.0)
    eq8_momentum_update(key, query, 0.75)  # 0.75 * 2 + 0.25 * 6
    assert all(torch.equal(p, torch.full_like(p, 3.0)) for p in key.parameters())
    assert all(torch.equal(p, torch.full_like(p, 6.0)) for p in query.parameters())


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 0.995, 1.0])
def test_eq8_matches_loop_and_leaves_no_gradient(beta):
    key, query = two_routers()
    before = [p.tolist() for p in key.parameters()]
    eq8_momentum_update(key, query, beta)
    for slow, old, fast in zip(key.parameters(), before, query.parameters(), strict=True):
        for i, j in itertools.product(*map(range, slow.shape)):
            want = beta * old[i][j] + (1 - beta) * fast[i, j].item()
            assert slow[i, j].item() == pytest.approx(want, abs=1e-6)
        assert slow.is_leaf and slow.grad_fn is None and slow.grad is None and fast.grad is None
        if beta in (0.0, 1.0):  # a copy; no change: to the last bit
            assert slow.tolist() == (old if beta else fast.tolist())


def test_eq8_stays_float32_under_autocast():
    (key, query), (same, _) = two_routers(), two_routers()
    eq8_momentum_update(key, query, 0.995)
    with torch.autocast("cpu", torch.bfloat16):
        eq8_momentum_update(same, query, 0.995)
    for slow, half in zip(key.parameters(), same.parameters(), strict=True):
        assert half.dtype == torch.float32 and torch.equal(slow, half)


def test_eq8_steps_compose_linearly():
    key, query = two_routers()
    (once, _), (twice, _) = two_routers(), two_routers()
    eq8_momentum_update(once, query, 0.9**2)
    for _ in range(2):
        eq8_momentum_update(twice, query, 0.9)
    assert_close(list(once.parameters()), list(twice.parameters()))  # the query stood still
    assert not torch.equal(once.second.weight, key.second.weight)


# -------------------------------------------------------------------------------------- task router
def test_eq7_keys_receive_no_gradient():
    torch.manual_seed(0)
    router, task = TaskRouter(3, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    h = torch.randn(6, 3, requires_grad=True)
    eq8_momentum_update(router.key, Router(3, 4), 0.0)  # a key router unlike the query router
    loss, accuracy = router.contrast(h, task)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in router.key.parameters())
    assert all(p.grad.abs().max() > 0 for p in [*router.query.parameters(), router.w])
    # h_bar is moved by the query alone: as if the keys were constants
    x = h.detach().clone().requires_grad_()
    keys = router.key(h).detach()
    want, want_accuracy = eq7_info_nce(router.query(x), keys, router.w, task)
    assert_close((loss, accuracy), (want, want_accuracy))
    assert_close(h.grad, torch.autograd.grad(want, x)[0])


@pytest.mark.parametrize("keys", ["all", "other"])
def test_eq7_task_router_contrasts_h_bar_or_averages_the_logits_of_tokens(keys):
    torch.manual_seed(0)
    router, h = TaskRouter(3, 4, keys), torch.randn(6, 5, 3)
    task = torch.tensor([0, 0, 1, 1, 2, 2])
    z = router.query(h.mean(1))
    assert_close(router.contrast(h.mean(1), task), eq7_info_nce(z, z, router.w, task, keys))
    z = torch.stack([torch.stack([router.query(t) for t in row]).mean(0) for row in h])
    assert_close(router.contrast(h, task), eq7_info_nce(z, z, router.w, task, keys))


@pytest.mark.parametrize(
    ("keys", "task"), [("all", [3, 1, 2]), ("other", [3, 1, 2]), ("other", [3, 1, 3])]
)
def test_eq7_task_router_gives_zeros_where_nothing_can_be_found(keys, task):
    loss, accuracy = TaskRouter(3, 4, keys).contrast(draw(3, 3), torch.tensor(task))
    assert loss == accuracy == 0


def test_eq8_key_router_starts_as_a_copy_and_follows():
    torch.manual_seed(0)
    router, h = TaskRouter(3, 4), torch.randn(5, 3)
    start = router.key(h)
    assert torch.equal(start, router.query(h))
    with torch.no_grad():
        for p in router.query.parameters():
            p += 1.0
    assert torch.equal(router.key(h), start)  # its own storage
    assert torch.equal(router(h), router.query(h)) and not torch.equal(router(h), start)
    eq8_momentum_update(router.key, router.query, 1.0)
    assert torch.equal(router.key(h), start)
    eq8_momentum_update(router.key, router.query, 0.0)
    assert torch.equal(router.key(h), router.query(h))


# ------------------------------------------------------------------------------ Eq. 5, 6, Theorem 1
def channel(n, error):
    """p(z | M): row M, column z."""
    return [[1 - error if z == m else error / (n - 1) for z in range(n)] for m in range(n)]


def test_eq5_by_hand():
    # n = 2, a quarter of errors: log 2 + 3/4 log 3/4 + 1/4 log 1/4 = 3/4 log 3 - log 2
    assert symmetric_channel_information(2, 0.25) == pytest.approx(0.75 * math.log(3) - math.log(2))
    assert symmetric_channel_information(7, 0.0) == pytest.approx(math.log(7))  # z names the task
    assert symmetric_channel_information(4, 0.75) == pytest.approx(0, abs=1e-12)  # z is pure chance
    assert symmetric_channel_information(3, 1.0) == pytest.approx(
        math.log(3 / 2)
    )  # z excludes one task


@pytest.mark.parametrize(("n", "error"), [(2, 0.1), (3, 0.4), (5, 0.9)])
def test_eq5_matches_sum_over_the_joint_distribution(n, error):
    p, total = channel(n, error), 0.0
    for m, z in itertools.product(range(n), repeat=2):
        p_z = sum(p[other][z] / n for other in range(n))
        total += p[m][z] / n * math.log(p[m][z] / n / (1 / n * p_z))
    assert symmetric_channel_information(n, error) == pytest.approx(total)


def test_eq6_by_hand():
    # n = N = 2, e = 3/2 for z = M, else 1/2. The other task is M itself or not, half of the time
    # each.
    total = (
        0.75 * (math.log(1 / 2) + math.log(3 / 4)) / 2
        + 0.25 * (math.log(1 / 4) + math.log(1 / 2)) / 2
    )
    assert eq6_bound(2, 0.25, 2) == pytest.approx(math.log(2) + total)


@pytest.mark.parametrize(("n", "size"), [(2, 1), (2, 4), (3, 2), (3, 4), (4, 3)])
@pytest.mark.parametrize("error", [0.0, 0.2, 0.7, 1.0])
def test_eq6_matches_enumeration_of_all_task_sets(n, size, error):
    p, total = channel(n, error), 0.0
    for tasks in itertools.product(range(n), repeat=size):  # the first is M
        for z in range(n):
            e = [n * p[m][z] for m in tasks]  # p(z | h) / p(z), p(z) = 1 / n
            if e[0] > 0:
                total += p[tasks[0]][z] / n**size * math.log(e[0] / sum(e))
    assert eq6_bound(n, error, size) == pytest.approx(math.log(size) + total, abs=1e-12)


@pytest.mark.parametrize(("n", "error"), [(3, 0.0), (5, 0.2), (20, 0.1), (4, 1.0)])
def test_theorem1_bound_rises_with_the_number_of_tasks_up_to_the_information(n, error):
    bounds = [eq6_bound(n, error, size) for size in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    information = symmetric_channel_information(n, error)
    assert bounds[0] == pytest.approx(0, abs=1e-12)  # one task: nothing to tell apart
    assert all(low < high for low, high in itertools.pairwise(bounds))
    assert bounds[-1] <= information
    assert bounds[-1] == pytest.approx(information, abs=0.05)  # it tightens as N grows


# ------------------------------------------------------------- the bias that keeps experts in use
def test_biased_gate_by_hand():
    """The bias brings expert 2 in; its weight beside expert 0's is that of the logits alone."""
    logits = torch.tensor([[3.0, 2.0, 1.0, -5.0]])
    routing = biased_top_k_gate(logits, torch.tensor([0.0, 0.0, 1.5, 0.0]), 2)
    assert set(routing.index[0].tolist()) == {0, 2}
    weight = dict(zip(routing.index[0].tolist(), routing.weight[0].tolist(), strict=True))
    assert weight[0] == pytest.approx(1 / (1 + math.exp(-2)))
    assert sum(weight.values()) == pytest.approx(1)


def test_without_a_bias_it_is_eq1():
    logits = draw(20, 6)
    ours, eq1 = biased_top_k_gate(logits, torch.zeros(6), 3), eq1_top_k_gate(logits, 3)
    assert torch.equal(ours.index, eq1.index)
    assert_close(ours.weight, eq1.weight)


def test_task_balance_wakes_dead_experts():
    """Rows that are nearly alike all keep the same two of eight experts; then they do not."""
    torch.manual_seed(0)
    router = TaskRouter(16, 8, balance=0.02)
    h_bar = draw(1, 16) + 0.4 * draw(256, 16, seed=1)

    def shares():
        with torch.no_grad():
            kept = router.gate(h_bar, 2).index
        return torch.bincount(kept.flatten(), minlength=8) / kept.numel()

    router.eval()
    before = shares()
    assert before.min() == 0 and torch.equal(shares(), before)  # evaluation moves nothing
    assert not router.bias.any()
    router.train()
    for _ in range(500):
        with torch.no_grad():
            router.gate(h_bar, 2)
    router.eval()
    assert shares().min() > 1 / 32  # a quarter of an equal share
    twin = TaskRouter(16, 8, balance=0.02).eval()
    twin.load_state_dict(router.state_dict())  # a checkpoint holds the bias
    assert torch.equal(twin.gate(h_bar, 2).index, router.gate(h_bar, 2).index)


def test_task_balance_moves_by_its_rate_towards_the_mean():
    router = TaskRouter(4, 3, balance=0.25).train()
    with torch.no_grad():
        kept = torch.bincount(router.gate(draw(7, 4), 1).index.flatten(), minlength=3)
    assert_close(router.bias, 0.25 * torch.sign(7 / 3 - kept))


def test_the_papers_router_has_no_bias():
    assert "bias" not in TaskRouter(4, 3).state_dict()
