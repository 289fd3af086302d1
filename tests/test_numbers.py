"""Intervals, and the numbers beside the figures, against slow computations.

Here: pictures/curves.py's intervals, numbers.py, routers.py, gradients.py.
Run: pytest tests/test_numbers.py
"""

import math
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
import torch
from drawing import TEST, taught
from scipy.stats import t, ttest_1samp
from toys import LAYOUTS, PLANE, ask, draw, method, stir

from ad import ADBatch
from envs import get_family
from figures import LeftOut
from pictures.curves import interval, read_returns
from pictures.gradients import cosine, cosines, groups_of, imitation_gradient, only
from pictures.numbers import compared, entropy, information, rank_correlation, silhouette
from pictures.routers import fresh, look, play_episodes


# ---------------------------------------------------------------------------------------- intervals
def test_interval_is_that_of_a_worked_example():
    """Two seeds, three tasks, by hand: mean squares of seeds 6, of tasks 8, of the rest 2."""
    values = np.array([[1.0, 2.0, 6.0], [3.0, 6.0, 6.0]])[..., None]
    mean, of_seed, of_task = 4.0, [3.0, 5.0], [2.0, 4.0, 6.0]
    a = 3 * sum((x - mean) ** 2 for x in of_seed) / 1
    b = 2 * sum((x - mean) ** 2 for x in of_task) / 2
    c = sum(
        (values[s, n, 0] - of_seed[s] - of_task[n] + mean) ** 2 for s in range(2) for n in range(3)
    ) / (1 * 2)
    assert (a, b, c) == (6, 8, 2)
    freedom = (a + b - c) ** 2 / (a**2 / 1 + b**2 / 2 + c**2 / 2)
    half = t.ppf(0.975, freedom) * math.sqrt((a + b - c) / 6)
    low, high = interval(values)
    assert (low[0], high[0]) == pytest.approx((mean - half, mean + half))


@pytest.mark.parametrize("seeds, tasks", [(2, 20), (3, 20), (5, 20), (12, 15)])
@pytest.mark.parametrize("of_seed, of_task", [(1, 0), (1, 1), (0.3, 1), (0, 1), (0, 0)])
def test_interval_holds_the_mean_as_often_as_it_says(seeds, tasks, of_seed, of_task):
    """Also with two seeds, of which a bootstrap would hold it in half of the cases."""
    rng, draws = np.random.default_rng(1), 2000  # each an episode
    values = 3 + rng.normal(size=(seeds, tasks, draws))
    values += of_seed * rng.normal(size=(seeds, 1, draws))
    values += of_task * rng.normal(size=(1, tasks, draws))
    low, high = interval(values)
    holds = ((low <= 3) & (high >= 3)).mean()
    # never much too narrow; too wide where neither seeds nor tasks differ, which nobody knows
    assert 0.88 <= holds <= (0.975 if of_seed or of_task else 1)


def test_interval_over_tasks_that_differ_is_not_that_of_independent_returns():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=(1, 40, 1)), 30, 0) + 0.1 * rng.normal(size=(30, 40, 1))
    low, high = interval(values)
    assert high - low == pytest.approx(2 * 2.02 * values.mean(0).std(ddof=1) / 40**0.5, rel=0.02)
    pooled_low, pooled_high = interval(values.reshape(1, -1, 1))
    assert (pooled_high - pooled_low)[0] < 0.25 * (high - low)[0]


def test_interval_of_one_seed_is_that_over_tasks_and_of_one_task_that_over_seeds():
    values = np.random.default_rng(2).normal(size=(1, 25, 3))
    test = ttest_1samp(values[0], 0).confidence_interval(0.95)
    for returns in (values, values.transpose(1, 0, 2)):
        low, high = interval(returns)
        np.testing.assert_allclose([low, high], [test.low, test.high])
    same = np.full((1, 1, 2), 3.0)
    assert all(side.tolist() == [3, 3] for side in interval(same))
    assert all(side.tolist() == [3, 3] for side in interval(np.full((4, 5, 2), 3.0)))


def test_read_returns(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("task,episode,return\na,1,1\na,2,2\nb,1,5\nb,2,6\na,1,3\na,2,4\nb,1,7\nb,2,8\n")
    names, returns = read_returns(path)
    assert names == ["a", "b"] and returns.tolist() == [[2, 3], [6, 7]]  # repeats are averaged
    for wrong in ("", "x,y\n1,2\n", "task,episode,return\na,1,1\na,2,2\nb,1,5\n", "\0"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="holds no returns"):
            read_returns(path)


# -------------------------------------------------------------------------------------- the numbers
def test_information_from_a_contingency_table():
    a, b = np.array([0, 0, 0, 7, 7, 7, 7, 9]), np.array([1, 1, 2, 2, 2, 2, 1, 1])
    want = 0.0
    for x in set(a):
        for y in set(b):
            both = np.mean((a == x) & (b == y))
            if both:
                want += both * math.log2(both / (np.mean(a == x) * np.mean(b == y)))
    assert information(a, b) == pytest.approx(want) and want > 0.1
    assert entropy(np.array([3, 3, 5, 8])) == pytest.approx(1.5)


def test_silhouette_by_loops():
    rng = np.random.default_rng(0)
    task = np.repeat([0, 1, 2], 4)
    z = rng.normal(size=(12, 3)) + task[:, None]
    far = [[math.dist(a, b) for b in z] for a in z]
    want = []
    for i in range(12):
        to = {t: [far[i][j] for j in range(12) if task[j] == t and j != i] for t in set(task)}
        own = np.mean(to.pop(task[i]))
        nearest = min(np.mean(others) for others in to.values())
        want.append((nearest - own) / max(nearest, own))
    assert silhouette(z, task) == pytest.approx(np.mean(want))
    assert math.isnan(silhouette(z, np.arange(12))) and math.isnan(silhouette(z, 0 * task))


def test_rank_correlation_by_loops():
    rng = np.random.default_rng(0)
    task, tasks = np.repeat(np.arange(5), 3), rng.normal(size=(5, 2))
    z = np.concatenate([tasks, tasks[:, :1]], 1)[task] + 0.5 * rng.normal(size=(15, 3))
    mean = [z[task == t].mean(0) for t in range(5)]
    pairs = list(combinations(range(5), 2))
    apart = np.array([math.dist(mean[i], mean[j]) for i, j in pairs])
    want = np.array([math.dist(tasks[i], tasks[j]) for i, j in pairs])
    ranks = [[(x > values).sum() for x in values] for values in (apart, want)]  # no ties here
    assert rank_correlation(z, task, tasks) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlation(tasks[task], task, tasks) == pytest.approx(1)
    assert math.isnan(rank_correlation(z[:6], task[:6], tasks))  # two tasks: one distance


def test_compared_deals_the_answers_out_anew():
    task = np.repeat(np.arange(4), 10)
    row = compared("n", lambda e: information(e, task), task, [0 * task, task // 2], 2.0)
    assert row["trained"] == pytest.approx(2) and row["untrained"] == pytest.approx(0.5)
    assert row["untrained_deviation"] == pytest.approx(0.5)
    assert 0.02 < row["shuffled"] < 0.5  # not 0: of forty trajectories some fit by chance


# ------------------------------------------------------------------------------------- what is seen
@pytest.mark.parametrize(
    ("layout", "apart"), [*((layout, {}) for layout in LAYOUTS), ("last", {"independent": True})]
)
def test_look_sees_what_a_training_pass_routes_by(layout, apart):
    tiny = method(layout, layers=2, routing="sequence", **apart)
    model, z = stir(tiny.model), []
    prompt = draw(model, rows=10).prompt  # two episodes
    before = torch.get_rng_state()
    seen = look(tiny, prompt, batch=4)
    assert torch.equal(before, torch.get_rng_state())
    # query first: a token in front, the start's state; query last: a token behind
    task = torch.arange(10) // 2
    if layout == "ad":
        batch = ADBatch(prompt, task)
    else:
        batch = replace(ask(prompt, prompt.states[:, :1]), task=task)
    router = model.blocks[1].ff.task_router.query
    router.register_forward_hook(lambda _router, _h_bar, logits: z.append(logits))
    with torch.no_grad():
        top = model(batch).moe
    tau = slice(1, None) if layout == "first" else slice(0, 18)
    assert (seen.tokens.expert == top.token_expert[:, tau, 0].numpy()).all()
    assert len(set(seen.tokens.expert.ravel())) > 1
    assert seen.tokens.modality.tolist() == [0, 1, 2] * 6
    np.testing.assert_allclose(seen.tasks.z, z[-1], atol=1e-5)  # Eq. 7 comes last: tau alone
    np.testing.assert_allclose(seen.tasks.gate.sum(1), 1, atol=1e-6)
    assert ((seen.tasks.gate > 0).sum(1) == 2).all()
    if layout == "ad":  # the gate of the whole row is that of tau alone
        assert (seen.tasks.expert == top.task_expert[:, 0].numpy()).all()
    assert (seen.tasks.z.argmax(1) == seen.tasks.expert).all()  # no bias here
    assert len(seen.tokens.untrained) == len(seen.tasks.untrained) == 5
    assert not (seen.tokens.untrained[0] == seen.tokens.untrained[1]).all()


def test_look_needs_experts():
    tiny = method("ad", moe="none")
    with pytest.raises(ValueError, match="no experts"):
        look(tiny, draw(tiny.model).prompt)


def test_fresh_trajectories_are_whole_prompts_of_their_tasks():
    tiny = method("ad", get_family("darkroom"), prompt_length=200, layers=1)
    stir(tiny.model)
    tau, task = fresh(tiny, TEST[:2], 3)
    assert task.tolist() == [0, 0, 0, 1, 1, 1] and tau.rewards.shape == (6, 200)
    goal = torch.tensor(TEST)[task]  # paid where the next state is the task's goal, nowhere else
    inside = torch.arange(199) % 100 != 99
    at_goal = (tau.states[:, 1:] == goal[:, None]).all(-1)
    assert torch.equal(at_goal[:, inside], tau.rewards[:, :-1][:, inside] > 0)


@pytest.mark.parametrize("layout", ["ad", "last"])
def test_fresh_trajectories_have_their_episodes_in_the_order_of_training(layout):
    """AD: ascending by return, as Algorithm 1 has them; DPT: in any, here that of play."""
    tiny = method(layout, get_family("point-robot"), env="point-robot", prompt_length=60, layers=1)
    stir(tiny.model)
    places = [[0.5, -0.5], [-0.9, 0.2], [0.1, 0.9]]
    tau, _ = fresh(tiny, places, 2)
    rewards = tau.rewards.unflatten(1, (3, 20))  # (6, L, T)
    # the first episode, which no context preceded, is none of them
    played = play_episodes(tiny, [place for place in places for _ in range(2)], 4)[1:]
    played = torch.stack([episode.rewards for episode in played], 1)
    order = played.sum(2).argsort(dim=1)
    assert not torch.equal(order, torch.arange(3).expand(6, 3))
    want = played.take_along_dim(order[..., None], 1) if layout == "ad" else played
    assert torch.equal(rewards, want)


# ---------------------------------------------------------------------------------------- gradients
def test_groups_of_tasks():
    family = get_family("point-robot")
    tasks = [[0.5, 0.5], [-0.5, 0.5], [-0.1, -0.9], [0.3, -0.3], [1, 0], [0, -1]]
    found = {name: members.tolist() for name, members in groups_of(family, tasks)}
    assert found == {"I": [0, 4], "II": [1], "III": [2], "IV": [3, 5]}
    some = groups_of(get_family("darkroom"), [[9, 9], [0, 0], [5, 4]])  # the middle is 4.5, 4.5
    assert [(name, m.tolist()) for name, m in some] == [("I", [0]), ("III", [1]), ("IV", [2])]
    numbers = [[v] for v in (3.0, 0.1, 2.0, 1.0, 0.2, 2.5, 1.1, 2.6)]
    assert [m.tolist() for _, m in groups_of(PLANE, numbers)] == [[1, 4], [3, 6], [2, 5], [0, 7]]
    line = np.arange(8)[:, None] * [1.0, 2.0, -1.0] + [0, 0, 5]
    quarters = [set(m.tolist()) for _, m in groups_of(PLANE, line.tolist())]
    assert quarters in ([{0, 1}, {2, 3}, {4, 5}, {6, 7}], [{6, 7}, {4, 5}, {2, 3}, {0, 1}])


@pytest.mark.parametrize("layout", ["ad", "last"])
@pytest.mark.parametrize("moe", ["both", "none"])
def test_cosines_of_gradients_by_hand(layout, moe):
    tiny, data = taught(layout, moe=moe)
    rows = cosines(tiny, data, prompts=5, seed=3)
    assert all(p.grad is None for p in tiny.model.parameters())
    rng, halves = torch.Generator().manual_seed(3), {}
    for name, members in (("I", [0, 2]), ("III", [1, 3])):
        for half in range(2):
            tiny.model.zero_grad()
            for _ in range(2):  # five prompts are two batches of three
                batch = tiny.sample(only(data, np.array(members)), 3, 1, rng)
                (tiny.losses(batch)[0]["imitation"] / 2).backward()
            for part, place in (("layer", "blocks.1.ff."), ("all", "")):
                named = tiny.model.named_parameters()
                flat = [
                    (p.grad if p.grad is not None else torch.zeros_like(p)).flatten().tolist()
                    for n, p in named
                    if p.requires_grad and place in n
                ]
                halves[part, name, half] = [v for values in flat for v in values]
    want = {}
    for part in ("layer", "all"):
        one, three = ([halves[part, name, h] for h in (0, 1)] for name in ("I", "III"))
        pairs = {("I", "I"): [one], ("III", "III"): [three], ("I", "III"): product(one, three)}
        for key, some in pairs.items():
            found = [
                sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
                for a, b in some
            ]
            want[part, *key] = sum(found) / len(found)
    found = {(row["parameters"], row["a"], row["b"]): row["cosine"] for row in rows}
    assert found == pytest.approx(want, abs=1e-5)
    assert found["layer", "I", "III"] != pytest.approx(found["all", "I", "III"], abs=1e-3)


def test_the_gradient_is_of_the_tasks_that_are_asked_for():
    tiny, data = taught()
    one = only(data, np.array([2]))
    assert (one.states[..., 0] == 2).all() and one.tasks == 1  # the coded states name the task
    gradient = imitation_gradient(tiny, one, 3, torch.Generator().manual_seed(0))
    inside = sum(p.numel() for p in tiny.model.blocks[1].ff.parameters() if p.requires_grad)
    assert len(gradient["layer"]) == inside < len(gradient["all"])
    assert cosine(torch.tensor([1.0, 0]), torch.tensor([0.0, 0])) == 0
    tiny.losses = lambda _batch: ({"another": torch.zeros(())}, {})
    with pytest.raises(LeftOut, match="no loss named imitation"):
        imitation_gradient(tiny, one, 3, torch.Generator())


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_groups_that_are_alike_are_as_alike_as_their_own_halves(monkeypatch, noise):
    """The same gradient and fresh noise: what noise takes from a cosine it takes from all alike."""
    tiny, data = taught()
    rng = torch.Generator().manual_seed(0)

    def gradient(*_):
        return {"all": torch.ones(1000) + noise * torch.randn(1000, generator=rng)}

    monkeypatch.setattr("pictures.gradients.imitation_gradient", gradient)
    rows = cosines(tiny, data)
    want = 1 / (1 + noise**2)
    assert [row["cosine"] for row in rows] == pytest.approx([want] * 3, abs=0.1)
