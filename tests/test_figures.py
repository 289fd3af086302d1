"""figures.py and pictures/: every figure is a picture, its CSV what a slow computation gives.

Runs are tiny networks with first weights, written as training writes them: nothing is trained.
Run: pytest tests/test_figures.py
"""

import base64
import csv
import io
import math
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, product

import numpy as np
import pytest
import torch
from commands import run as run_script
from matplotlib.image import imread
from scipy.stats import t, ttest_1samp
from toys import LAYOUTS, PLANE, ask, coded_dataset, config, cut, draw, method, stir

import figures
from ad import ADBatch
from data import Prompt
from envs import get_family
from evaluate import Evaluation, evaluate_run, play_all, variant
from families.darkroom import walk
from figures import FIGURES, LeftOut
from pictures.colours import colour_of_tasks, points
from pictures.curves import curve_figure, interval, read_returns
from pictures.frames import draw_frames
from pictures.gradients import cosine, cosines, groups_of, imitation_gradient, only
from pictures.numbers import compared, entropy, information, rank_correlation, silhouette
from pictures.page import ceiling, write_page
from pictures.rooms import darkroom, draw_rooms
from pictures.routers import TasksSeen, fresh, look, play_episodes
from pictures.runs import Figures, Run, lines_of
from support import checkpoint

TEST = [[2, 2], [8, 6], [4, 0], [0, 9]]
TRAIN = [[0, 0], [9, 9], [0, 5], [3, 4], [7, 2], [5, 5], [1, 8], [9, 0]]
PLACES = {
    "darkroom": (TRAIN, TEST),
    "point-robot": ([[0.5, 0.5], [-0.5, 0.2]], [[0.1, -0.9], [-0.3, -0.3]]),
}
HEALTH = "step,token_least,task_least,token_mi,info_nce,accuracy,chance,accuracy_fresh\n"
SMALL = {"layers": 2, "prompt_length": 100, "episodes": 2}


def finished(folder, layout="last", env="darkroom", steps=3, step=3, **changes):
    """A run's folder as training leaves it, of a network with random weights."""
    changes = SMALL | ({} if env == "darkroom" else {"prompt_length": 20}) | changes
    tiny = method(layout, get_family(env), env=env, steps=steps, **changes)
    stir(tiny.model)
    train, test = PLACES[env]
    run = checkpoint.describe_run(tiny.cfg, {"train": train, "test": test, "reference": None})
    folder.mkdir(parents=True)
    checkpoint.write_config(folder, run)
    checkpoint.save(folder, checkpoint.State(tiny, torch.Generator(), step=step, run=run))
    rows = (f"{n},0.1,0.05,{0.2 * n},{3 - n},{0.1 * n},0.01,0.1\n" for n in (1, 2, 3))
    (folder / "train.csv").write_text(HEALTH + "".join(rows))
    return folder


def made_up(folder, returns=None, layout="ad", family=PLANE, split=((), ()), **changes) -> Run:
    """A run in memory; with `returns` (N, E), those are its evaluation's."""
    tiny = method(layout, family, **changes)
    run = Run(folder, tiny, checkpoint.TaskSplit(*split, None), Figures())
    if returns is not None:
        folder.mkdir(parents=True)
        name = f"test-{variant(tiny, Evaluation('', play=tiny.cfg.play))}.csv"
        lines = [f"0.{n},{e + 1},{v}" for n, row in enumerate(returns) for e, v in enumerate(row)]
        (folder / name).write_text("\n".join(["task,episode,return", *lines, ""]))
    return run


def table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def has_colours(picture) -> bool:
    """More than axes, words and the few pixels of a legend."""
    return (np.ptp(picture[..., :3], axis=-1) > 0.2).mean() > 1e-3


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved, as matplotlib holds them."""
    found, save = [], figures.save
    for place in ("figures", "pictures.assignments"):
        monkeypatch.setattr(f"{place}.save", lambda *what: (found.append(what[0]), save(*what)))
    return found


def words_of(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def check_picture(drawn) -> list[dict]:
    """PNG and PDF are there, and not empty; the rows of the CSV beside them."""
    place = drawn.stem
    assert has_colours(imread(f"{place}.png"))
    with open(f"{place}.pdf", "rb") as file:
        assert file.read(5) == b"%PDF-"
    rows = table(f"{place}.csv")
    assert rows and drawn.caption
    return rows


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
@pytest.mark.parametrize("layout", LAYOUTS)
def test_look_sees_what_a_training_pass_routes_by(layout):
    tiny = method(layout, get_family("darkroom"), layers=2, routing="sequence")
    model = stir(tiny.model)
    prompt = cut(draw(model, rows=10).prompt, 5)
    before = torch.get_rng_state()
    seen = look(tiny, prompt, batch=4)
    assert torch.equal(before, torch.get_rng_state())
    # query first: a token in front, the start's state; query last: a token behind
    batch = (
        ADBatch(prompt, torch.arange(10)) if layout == "ad" else ask(prompt, prompt.states[:, :1])
    )
    with torch.no_grad():
        top = model(batch).moe
    tau = slice(1, None) if layout == "first" else slice(0, 15)
    assert (seen.tokens.expert == top.token_expert[:, tau, 0].numpy()).all()
    assert len(set(seen.tokens.expert.ravel())) > 1
    assert seen.tokens.modality.tolist() == [0, 1, 2] * 5
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


def taught(layout="ad", **changes):
    """A tiny method of DarkRoom, and a dataset of two goals in each of two quadrants."""
    tiny = method(layout, get_family("darkroom"), layers=2, prompt_length=100, batch=3, **changes)
    stir(tiny.model)
    data = coded_dataset(tasks=4)
    data.meta["train_tasks"] = [[8, 8], [1, 1], [9, 9], [0, 2]]  # I, III, I, III
    return tiny, data


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


# -------------------------------------------------------------------------------------- the figures
def test_curves_have_a_line_for_settings_and_an_interval_over_seeds(tmp_path):
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(3, 4)) for name in ("s0", "s1", "none", "wide")}
    more = {"s0": {}, "s1": {"seed": 1}, "none": {"moe": "none"}, "wide": {"w_contrastive": 0.1}}
    runs = [made_up(tmp_path / name, values[name], **more[name]) for name in values]
    assert [(label, len(group)) for label, group in lines_of(runs)] == [
        ("T2MIR-AD (w_contrastive 0.01)", 2),
        ("AD (w_contrastive 0.01)", 1),
        ("T2MIR-AD (w_contrastive 0.1)", 1),
    ]
    rows = check_picture(figures.figure3(runs, tmp_path)[0])
    seeds = np.stack([values["s0"], values["s1"]])
    low, high = interval(seeds)
    first = [row for row in rows if row["line"] == "T2MIR-AD (w_contrastive 0.01)"]
    for e, row in enumerate(first):
        assert (row["episode"], row["seeds"], row["tasks"]) == (str(e + 1), "2", "3")
        got = [float(row[name]) for name in ("mean", "low", "high")]
        assert got == pytest.approx([seeds[:, :, e].mean(), low[e], high[e]], rel=1e-4)
    assert len(rows) == 12
    rows = check_picture(figures.figure4(runs, tmp_path)[0])
    assert {row["panel"] for row in rows} == {"AD"} and len({row["line"] for row in rows}) == 3
    with pytest.raises(LeftOut, match="Medium"):
        figures.figure5(runs, tmp_path)
    with pytest.raises(LeftOut, match="differ in --moe"):
        figures.figure4(runs[:2], tmp_path)


def test_runs_that_play_otherwise_are_other_lines(tmp_path):
    plays = ({}, {"seed": 1, "play_seed": 7, "episodes": 9}, {"history": 2}, {"noise": 0.1})
    runs = [made_up(tmp_path, **changes) for changes in plays]
    assert [(label, len(group)) for label, group in lines_of(runs)] == [
        ("T2MIR-AD (noise 0.0, history 4)", 2),
        ("T2MIR-AD (noise 0.0, history 2)", 1),
        ("T2MIR-AD (noise 0.1, history 4)", 1),
    ]


def test_a_legend_says_what_else_differs_between_methods(tmp_path):
    layouts = (("ad", {}), ("ad", {"moe": "none", "lr": 0.5}), ("ad", {"moe": "token"}))
    runs = [made_up(tmp_path, layout=layout, **changes) for layout, changes in layouts]
    labels = [label for label, _ in lines_of(runs)]
    assert labels == ["T2MIR-AD (lr 0.001)", "AD (lr 0.5)", "T2MIR-AD w/o Task-MoE (lr 0.001)"]
    runs = [made_up(tmp_path, layout=layout) for layout in ("ad", "last")]  # no two are alike
    assert [label for label, _ in lines_of(runs)] == ["T2MIR-AD", "T2MIR-DPT"]


def test_returns_are_those_of_the_runs_own_play(tmp_path):
    run = made_up(tmp_path / "r", np.ones((2, 3)))
    (own,) = (tmp_path / "r").glob("test-*.csv")
    own.rename(own.with_name("test-another.csv"))
    with pytest.raises(LeftOut, match=f"{own.name}: python evaluate.py"):
        run.returns()


def test_qualities_and_clusters_have_figures_of_their_own(tmp_path, saved):
    values = np.arange(6.0).reshape(2, 3)
    qualities = ("medium", "medium-expert")
    runs = [made_up(tmp_path / name, values, quality=name) for name in qualities]
    rows = check_picture(figures.figure5(runs, tmp_path)[0])
    assert [row["panel"] for row in rows] == ["Medium-Expert"] * 3 + ["Medium"] * 3
    assert [float(row["mean"]) for row in rows] == [1.5, 2.5, 3.5] * 2
    titles = [axis.get_title() for axis in saved[0].axes]
    assert titles == ["toy-plane, Medium-Expert", "toy-plane, Medium"]
    run = made_up(tmp_path / "clusters", values, env="cheetah-vel-3cluster")
    check_picture(figures.figure11([run], tmp_path)[0])
    with pytest.raises(LeftOut, match="figure11"):
        figures.figure3([run], tmp_path)
    with pytest.raises(LeftOut, match="figure3"):
        figures.figure11(runs, tmp_path)


def test_seeds_of_a_line_were_evaluated_on_the_same_tasks(tmp_path):
    runs = [made_up(tmp_path / str(n), np.ones((n + 2, 3)), seed=n) for n in range(2)]
    with pytest.raises(ValueError, match="on other tasks"):
        figures.figure3(runs, tmp_path)


def test_figure13_is_the_mean_gate_of_each_task(tmp_path, saved):
    rng = np.random.default_rng(0)
    split = ([[2.0], [0.5]], [[1.1], [0.1]])  # trained, held out
    task, gate = np.repeat([0, 1, 2, 3], 3), rng.dirichlet(np.ones(5), 12)
    gate[:, 3] = 0.009
    run = made_up(tmp_path / "r", split=split, env="cheetah-vel-3cluster")
    run.__dict__["seen"] = (look_alike(gate), task)
    rows = check_picture(figures.figure13([run], tmp_path)[0])
    assert [float(row["task"]) for row in rows[::5]] == [0.1, 0.5, 1.1, 2.0]
    assert [row["split"] for row in rows[::5]] == ["test", "train", "test", "train"]
    for row in rows:
        place = [[1.1], [0.1], [2.0], [0.5]].index([float(row["task"])])
        expert, here = int(row["expert"]) - 1, slice(3 * place, 3 * place + 3)
        assert float(row["gate"]) == pytest.approx(gate[here, expert].mean(), rel=1e-4)
        first = (gate[here].argmax(1) == expert).mean()
        assert float(row["first"]) == pytest.approx(first, rel=1e-4)
    (axis,) = saved[0].axes
    assert axis.get_xlabel() == "target velocity"
    named = [f"expert {k}" for k in (1, 2, 3, 5)]  # 4 is nowhere in use
    assert words_of(axis.get_legend()) == [*named, "held-out", "trained on"]
    inside = axis.collections[0].get_facecolors()[:, :3]  # a marker each of 0.1, 0.5, 1.1, 2.0
    assert (inside == 1).all(1).tolist() == [False, True, False, True]
    with pytest.raises(LeftOut, match="no run with"):
        figures.figure13([made_up(tmp_path, moe="none")], tmp_path)
    with pytest.raises(LeftOut, match="task experts"):
        figures.figure13([made_up(tmp_path, moe="token")], tmp_path)


def look_alike(gate):
    tasks = TasksSeen(z=np.log(gate), gate=gate, expert=gate.argmax(1), untrained=[gate[::-1]])
    return type("Seen", (), {"tokens": None, "tasks": tasks})()


@pytest.mark.parametrize(("name", "moe"), [("figure1", "both"), ("figure12", "task")])
def test_expert_assignments(tmp_path, saved, name, moe):
    family = replace(PLANE, name="push") if name == "figure12" else PLANE
    split = ([[0.2], [0.4]], [[0.9], [0.8]])
    run = made_up(tmp_path / "r", family=family, split=split, moe=moe)
    model, task = stir(run.method.model), np.repeat([0, 1, 2, 3], 3)
    seen = look(run.method, draw(model, rows=12).prompt)
    run.__dict__["seen"] = (seen, task)
    drawn = FIGURES[name]([run], tmp_path)[0]
    rows, numbers = check_picture(drawn), table(f"{drawn.stem}-numbers.csv")
    trajectories = [row for row in rows if row["of"] == "trajectory"]
    assert [int(row["expert"]) - 1 for row in trajectories] == seen.tasks.expert.tolist()
    shown = [sum(len(dots.get_offsets()) for dots in axis.collections) for axis in saved[0].axes]
    assert shown[: 3 if moe == "both" else 1] == [len(rows) - 12] * (2 * (moe == "both")) + [12]
    assert [row["task"] for row in trajectories[::3]] == ["0.9", "0.8", "0.2", "0.4"]
    found = {row["number"]: float(row["trained"]) for row in numbers}
    want = {"I(task expert; task), bits": information(seen.tasks.expert, task)}
    want["silhouette of router logits by task"] = silhouette(seen.tasks.z, task)
    places = np.array([[0.9], [0.8], [0.2], [0.4]]) / 0.7  # scaling keeps the ranks
    want["rank correlation of distances"] = rank_correlation(seen.tasks.z, task, places)
    if moe == "both":
        modality = np.tile([0, 1, 2], seen.tokens.expert.size // 3)
        tokens = information(seen.tokens.expert.ravel(), modality)
        want["I(token expert; modality), bits"] = tokens
        assert len(rows) == 12 + seen.tokens.expert.size  # few enough to draw all
        # the drawn modality of a token and its expert come from the same token
        drawn_tokens = [row for row in rows if row["of"] == "token"]
        pairs = ([int(r["expert"]) for r in drawn_tokens], [r["modality"] for r in drawn_tokens])
        assert information(*map(np.array, pairs)) == pytest.approx(tokens)
    assert found == pytest.approx(want, rel=1e-4)
    assert all(f"{value:.2f}" in drawn.caption for value in want.values())
    other = {"figure1": "figure12", "figure12": "figure1"}[name]
    with pytest.raises(LeftOut, match=name):
        FIGURES[other]([run], tmp_path)


def test_figure7_sets_experts_above_the_diagonal_and_none_below(tmp_path, saved):
    runs = []
    for moe in ("both", "none"):
        tiny, data = taught(moe=moe)
        settings = Figures(prompts=3)
        runs.append(Run(tmp_path / moe, tiny, checkpoint.TaskSplit([], []), settings))
        runs[-1].dataset = lambda data=data: data
    rows = check_picture(figures.figure7(runs, tmp_path)[0])
    assert {(row["run"], row["network"]) for row in rows} == {("both", "MoE"), ("none", "MLP")}
    for run in runs:
        want = [row["cosine"] for row in cosines(run.method, data, 3)]
        got = [float(row["cosine"]) for row in rows if row["run"] == run.name]
        assert got == pytest.approx(want, rel=1e-4)
        # rows: I with I, I with III, III with III; of the layer, then of all parameters
        for axis, value in zip(saved[0].axes[:2], (want[1], want[4]), strict=True):
            cells = axis.images[0].get_array()
            assert cells[(0, 1) if run.name == "both" else (1, 0)] == pytest.approx(value)
            assert f"{value:.2f}" in [text.get_text() for text in axis.texts]
    assert "quarter" not in saved[0].get_supxlabel()


def test_router_health_is_what_train_csv_says(tmp_path, saved):
    runs = figures.open_runs(Figures(runs=(str(finished(tmp_path / "a")),)))
    rows = check_picture(figures.router_health(runs, tmp_path)[0])
    found = {(r["column"], r["step"]): float(r["value"]) for r in rows}
    assert found["token_mi", "3"] == pytest.approx(0.6) and found["info_nce", "1"] == 2
    assert len(found) == 3 * 7
    shares = saved[0].axes[0]
    assert words_of(shares.get_legend()) == ["token_least", "1/K: all alike", "task_least"]
    level = [y[0] for line in shares.lines if len(y := line.get_ydata()) == 2]  # of a whole width
    assert level == pytest.approx([1 / 4, 1 / 5])
    assert words_of(saved[0].legends[0]) == ["a"]
    two = [*runs, *figures.open_runs(Figures(runs=(str(finished(tmp_path / "b", seed=1)),)))]
    (drawn,) = figures.router_health(two, tmp_path)
    assert drawn.stem.name == "router_health-darkroom" and words_of(saved[1].legends[0]) == [*"ab"]
    assert len(table(f"{drawn.stem}.csv")) == 2 * 3 * 7
    (tmp_path / "a" / "train.csv").unlink()
    with pytest.raises(LeftOut, match=r"train\.csv"):
        figures.router_health(runs, tmp_path)


def test_points_are_the_same_again_and_take_what_they_get():
    x = np.random.default_rng(0).normal(size=(12, 4))
    assert (points(x) == points(x)).all() and np.isfinite(points(0 * x)).all()
    assert np.isfinite(points(x[:, :1])).all()
    with pytest.raises(LeftOut, match="at least 4"):
        points(x[:3])


@pytest.mark.parametrize("numbers", [1, 2, 5])
def test_similar_tasks_have_similar_colours(numbers):
    place = np.linspace(0, 1, 9)[:, None] * np.arange(1, numbers + 1)
    colours = colour_of_tasks(place)
    assert colours.shape == (9, 3) and colours.min() >= 0 and colours.max() <= 1
    steps, whole = np.linalg.norm(np.diff(colours, axis=0), axis=1), colours[0] - colours[-1]
    assert steps.max() < 0.5 * np.linalg.norm(whole)
    assert np.isfinite(colour_of_tasks(np.ones((3, numbers)))).all()


# ------------------------------------------------------------------------------------------ a page
class Page(HTMLParser):
    """What a page asks for, and what it shows."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.asks, self.tags, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "data", "action", "poster", "srcset"):
                inside = value.startswith("data:image/png;base64,")
                (self.pictures if inside else self.asks).append(value.partition(",")[2] or value)

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """All that figures.py makes of one run, whose name is no name: its page, and the folder."""
    folder = tmp_path_factory.mktemp("page")
    run = finished(folder / "a<script>alert(1)<b>")
    evaluate_run(Evaluation(str(run), play=config("last", **SMALL).play))
    figures.draw(Figures(runs=(str(run),), out=str(folder / "out"), tasks=4, plays=2))
    (page,) = (folder / "out").glob("*.html")
    return page, folder / "out", run


def test_a_page_is_one_file_with_pictures_that_show_something(drawn):
    page, out, run = drawn
    read = Page(page.read_text())
    assert read.asks == [] and not {"script", "link", "iframe", "b", "object"} & set(read.tags)
    pictures = [imread(io.BytesIO(base64.b64decode(png))) for png in read.pictures]
    assert len(pictures) == 4  # returns, at play, routers over training, figure1
    assert all(map(has_colours, pictures))
    words = " ".join(read.words)
    _, returns = read_returns(run / "test-sample-last.csv")
    for said in (
        run.name,
        f"{returns[:, 0].mean():.2f}",
        "optimum",
        "w_contrastive",
        "departures",
        "return, last 2 episodes",
    ):
        assert said.lower() in words.lower(), said
    (numbers,) = out.glob("figure1-*-numbers.csv")
    assert f"{float(table(numbers)[0]['trained']):.2f}" in words
    assert not list(out.glob(".*"))  # nothing temporary stays


def test_figures_drawn_again_are_the_same(drawn, tmp_path):
    _, out, run = drawn
    for name in ("figure3", "router_health"):
        figures.draw(Figures(runs=(str(run),), out=str(tmp_path), only=name))
        for kind in ("csv", "pdf", "png"):
            (old,), (new,) = (tuple(f.glob(f"{name}*.{kind}")) for f in (out, tmp_path))
            assert old.read_bytes() == new.read_bytes()


def test_a_page_of_point_robot_shows_its_paths(tmp_path):
    place = finished(tmp_path / "r", "ad", "point-robot")
    (run,) = figures.open_runs(Figures(runs=(str(place),)))
    write_page(run, {}, tmp_path / "r.html")
    read = Page((tmp_path / "r.html").read_text())
    (picture,) = (imread(io.BytesIO(base64.b64decode(png))) for png in read.pictures)
    assert has_colours(picture)
    history = play_episodes(run.method, run.split.test, 3)
    for axis, episode in zip(draw_rooms(run, 3).axes, history, strict=True):
        drawn = [line.get_xydata() for line in axis.lines]
        for path, goal, states, task in zip(
            drawn[::2], drawn[1::2], episode.states, run.split.test, strict=True
        ):
            np.testing.assert_array_equal(path, states)
            assert goal.tolist() == [task]
    assert "python evaluate.py" in " ".join(read.words)  # it has no returns yet


def test_a_page_is_written_also_where_a_figure_is_not(tmp_path, capsys):
    run = finished(tmp_path / "r")
    figures.draw(Figures(runs=(str(run),), out=str(tmp_path), tasks=1, plays=2))
    assert "figure1 is left out: t-SNE needs at least 4 points, not 2" in capsys.readouterr().out
    assert Page((tmp_path / "r.html").read_text()).pictures


def test_the_ceiling_of_a_page_is_that_of_an_evaluation(drawn, tmp_path, monkeypatch):
    _, _, place = drawn
    (run,) = figures.open_runs(Figures(runs=(str(place),)))
    own = run.method.cfg.play
    want = play_all(run.method, run.method.policy(own), run.split, Evaluation("", play=own)).ceiling
    returns, name = ceiling(run, 2)
    assert returns.tolist() == want.tolist() and name == "exact posterior of the last episode"
    seen = []
    monkeypatch.setattr(
        "pictures.page.curve_figure", lambda *all_of: seen.append(all_of) or curve_figure(*all_of)
    )
    write_page(run, {}, tmp_path / "r.html")
    assert seen[0][-2].tolist() == want.tolist()
    assert ceiling(made_up(tmp_path), 2) == (None, "")


# --------------------------------------------------------------------------------------- at play
@pytest.mark.parametrize("layout", ["ad", "last"])
def test_after_a_reward_the_belief_is_the_goal(tmp_path, layout):
    goals, stays = np.array([[8, 6], [2, 5]]), np.zeros((2, 2), int)
    history = []
    for towards in (goals, stays, stays):  # a reward is found in the first episode alone
        walks = walk(towards, np.zeros(2), np.random.default_rng(0))
        found = (walks.after == goals[:, None]).all(-1)
        arrays = (walks.states.astype(int), walks.actions.astype(int), found.astype(np.float32))
        history.append(Prompt(*map(torch.from_numpy, arrays)))
    run = made_up(tmp_path, layout=layout, family=get_family("darkroom"), layers=1)
    axes = np.array(darkroom(run, goals.tolist(), history, [0, 1, 2]).axes).reshape(2, 3, 2)
    for row, (x, y) in enumerate(goals):
        before = [axis.images[0].get_array() for axis in axes[row, :, 0]]  # cells by y and x
        assert np.ptp(before[0]) == 0 and before[1][y, x] == 1
        # one episode later AD still knows it; DPT has seen one in which nothing was found
        assert before[2][y, x] == pytest.approx(1 if layout == "ad" else 1 / 99)
        for axis in axes[row].flat:  # every panel has its star
            assert [line.get_xydata().tolist() for line in axis.lines][-1] == [[x, y]]
        path = axes[row, 0, 1].lines[0].get_xydata()
        assert abs(path - history[0].states[row].numpy()).max() < 0.2


def robot(folder, env) -> Run:
    """A run of a simulator's family, of random weights, with one held-out task."""
    family = get_family(env)
    task = {"push": [0.05, 0.87], "cheetah-vel": [1.5]}[env]
    size = {"prompt_length": family.horizon, "layers": 2, "env": env}
    run = made_up(folder, layout="last", family=family, split=([], [task]), **size)
    stir(run.method.model)
    return run


class StandIn:
    """In place of a renderer: notes where the robot is, and draws nothing."""

    def __init__(self, model):
        self.seen = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update_scene(self, data, camera):
        assert data.model.camera(camera)
        bodies = ("hand", "obj") if camera.startswith("corner") else ()  # of Meta-World
        self.seen.append((data.qpos.copy(), *(data.body(name).xpos.copy() for name in bodies)))

    def render(self):
        return np.zeros((2, 2, 3), np.uint8)


@pytest.mark.parametrize("env", ["push", "cheetah-vel"])
def test_frames_are_of_the_states_of_the_last_episode(tmp_path, env):
    run, made = robot(tmp_path, env), []
    figure = draw_frames(run, 2, lambda model: made.append(StandIn(model)) or made[0])
    steps = [0, 19, 39, 59, 79, 99] if env == "push" else [0, 39, 79, 119, 159, 199]
    assert [axis.get_title() for axis in figure.axes] == [f"step {n + 1}" for n in steps]
    states = play_episodes(run.method, run.split.test, 2)[-1].states[0, steps].numpy()
    assert states.std(0).max() > 0.02
    for state, (qpos, *places) in zip(states, made[0].seen, strict=True):
        if env == "push":
            np.testing.assert_allclose(
                [*places[0], *places[1]], [*state[:3], *state[4:7]], atol=1e-5
            )
        else:
            np.testing.assert_allclose(qpos[1:], state[:8])


def test_a_page_says_why_it_has_no_frames(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no such\nlibrary")

    monkeypatch.setattr("pictures.frames.off_screen", broken)
    write_page(robot(tmp_path, "cheetah-vel"), {}, tmp_path / "r.html")
    words = " ".join(Page((tmp_path / "r.html").read_text()).words)
    assert "none: OpenGL cannot draw off screen here (no such library)" in words
    assert draw_frames(made_up(tmp_path), 2, broken) is None  # no simulator to draw


def test_frames_are_rendered(tmp_path, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    try:
        from mujoco.egl import GLContext

        GLContext(8, 8).free()
    except Exception as error:  # whatever its libraries raise
        pytest.skip(f"EGL does not draw here: {error}")
    shown = [axis.images[0].get_array() for axis in draw_frames(robot(tmp_path, "push"), 1).axes]
    assert len(shown) == 6 and all(picture.std() > 20 for picture in shown)
    assert (abs(shown[0].astype(int) - shown[-1]) > 30).mean() > 1e-3  # the arm has moved


# -------------------------------------------------------------------------------------- wrong input
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    room, plane = finished(tmp_path / "room"), finished(tmp_path / "plane", "ad", "point-robot")
    half, other = finished(tmp_path / "half", step=2), finished(tmp_path / "other", seed=1)
    same = finished(tmp_path / "same", play_seed=3)
    for argv, named in (
        ([], "name the runs first"),
        ([tmp_path / "nowhere"], "nowhere is not a t2mir run"),
        ([tmp_path / "empty"], "empty is not a t2mir run"),
        ([room, plane], "draw one family at a time"),
        ([half], "half is not finished (2 of 3 steps)"),
        ([room, "--only", "figure2"], "choose one of figure3"),
        ([room, "--only", "figure3"], "python evaluate.py"),
        ([room, "--only", "figure7"], "name it with --data"),
        ([room, "--only", "figure13"], "not of one number"),
        ([room, "--only", "figure7", "--data", "nowhere"], "there is no dataset in nowhere"),
        ([room, other, "--only", "page"], "of one run"),
        ([room, other, room], "equal settings and the same seed"),
        ([room, same], "same have equal settings and the same seed: name one"),
        ([room, "--tasks", "0"], "--tasks 0"),
        ([room, "--env", "point-robot"], "of --env darkroom, not of point-robot"),
    ):
        out = tmp_path / "out"
        flags = [*map(str, argv), "--out", str(out)]
        assert named in run_script("figures.py", flags, monkeypatch, capsys).error, argv
        assert not out.exists()
    ended = run_script("figures.py", [str(room), "--learning-speed", "3"], monkeypatch, capsys)
    assert ended.code == 2 and "--learning-speed" in ended.err
