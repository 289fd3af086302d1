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
from itertools import combinations

import numpy as np
import pytest
import torch
from commands import run as run_script
from matplotlib.image import imread
from toys import LAYOUTS, PLANE, ask, coded_dataset, config, cut, draw, method, stir

import figures
from ad import ADBatch
from envs import get_family
from evaluate import Evaluation, evaluate_run, variant
from figures import FIGURES, LeftOut
from pictures.colours import colour_of_tasks, points
from pictures.curves import interval, interval_over_seeds, read_returns
from pictures.gradients import cosine, cosines, groups_of, imitation_gradient, only
from pictures.numbers import compared, entropy, information, rank_correlation, silhouette
from pictures.page import write_page
from pictures.routers import TasksSeen, fresh, look
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


def check_picture(drawn) -> list[dict]:
    """PNG and PDF are there, and not empty; the rows of the CSV beside them."""
    place = drawn.stem
    assert imread(f"{place}.png")[..., :3].std() > 0.02
    with open(f"{place}.pdf", "rb") as file:
        assert file.read(5) == b"%PDF-"
    rows = table(f"{place}.csv")
    assert rows and drawn.caption
    return rows


# ---------------------------------------------------------------------------------------- intervals
def additive(rng, seeds, tasks):
    """(S, N, 1): what a seed adds, what a task adds."""
    return rng.normal(size=(seeds, 1, 1)) + 2 * rng.normal(size=(1, tasks, 1))


def test_interval_over_seeds_has_the_width_of_a_known_distribution():
    values = additive(np.random.default_rng(0), 30, 40)
    low, high = interval_over_seeds(values, 8000)
    spread = math.sqrt(values.mean(1).var() / 30 + values.mean(0).var() / 40)
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * spread, rel=0.05)
    assert low[0] < values.mean() < high[0]
    # as if all 1200 returns were independent draws: far too narrow
    pooled = interval(values.reshape(-1, 1))
    assert (pooled[1] - pooled[0])[0] < 0.4 * (high - low)[0]


def test_interval_over_seeds_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    bounds = [interval_over_seeds(additive(rng, 12, 15), 400) for _ in range(150)]
    covers = np.mean([low[0] <= 0 <= high[0] for low, high in bounds])
    assert 0.86 <= covers <= 0.99


def test_interval_of_one_seed_is_that_over_tasks():
    values = np.random.default_rng(2).normal(size=(1, 25, 3))
    for one, other in zip(interval_over_seeds(values), interval(values[0]), strict=True):
        np.testing.assert_allclose(one, other, atol=0.06)
    same = np.full((1, 1, 2), 3.0)
    assert all(side.tolist() == [3, 3] for side in interval_over_seeds(same))


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
        top = model(batch).moe[-1]
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
        whole = [[a + b for a, b in zip(*half, strict=True)] for half in (one, three)]
        for key, (a, b) in {("I", "I"): one, ("III", "III"): three, ("I", "III"): whole}.items():
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            want[part, *key] = dot / (math.hypot(*a) * math.hypot(*b))
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


# -------------------------------------------------------------------------------------- the figures
def test_curves_have_a_line_for_settings_and_an_interval_over_seeds(tmp_path):
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(3, 4)) for name in ("s0", "s1", "none", "wide")}
    more = {"s0": {}, "s1": {"seed": 1}, "none": {"moe": "none"}, "wide": {"w_contrastive": 0.1}}
    runs = [made_up(tmp_path / name, values[name], **more[name]) for name in values]
    assert [(label, len(group)) for label, group in lines_of(runs)] == [
        ("T2MIR-AD (w_contrastive 0.01)", 2),
        ("AD", 1),
        ("T2MIR-AD (w_contrastive 0.1)", 1),
    ]
    rows = check_picture(figures.figure3(runs, tmp_path)[0])
    seeds = np.stack([values["s0"], values["s1"]])
    low, high = interval_over_seeds(seeds)
    first = [row for row in rows if row["line"].endswith("0.01)")]
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


def test_qualities_and_clusters_have_figures_of_their_own(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    qualities = ("medium", "medium-expert")
    runs = [made_up(tmp_path / name, values, quality=name) for name in qualities]
    rows = check_picture(figures.figure5(runs, tmp_path)[0])
    assert [row["panel"] for row in rows] == ["Medium-Expert"] * 3 + ["Medium"] * 3
    assert [float(row["mean"]) for row in rows] == [1.5, 2.5, 3.5] * 2
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


def test_figure13_is_the_mean_gate_of_each_task(tmp_path):
    rng = np.random.default_rng(0)
    split = ([[2.0], [0.5]], [[1.1], [0.1]])  # trained, held out
    task, gate = np.repeat([0, 1, 2, 3], 3), rng.dirichlet(np.ones(5), 12)
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
    with pytest.raises(LeftOut, match="no run with"):
        figures.figure13([made_up(tmp_path, moe="none")], tmp_path)
    with pytest.raises(LeftOut, match="task experts"):
        figures.figure13([made_up(tmp_path, moe="token")], tmp_path)


def look_alike(gate):
    tasks = TasksSeen(z=np.log(gate), gate=gate, expert=gate.argmax(1), untrained=[gate[::-1]])
    return type("Seen", (), {"tokens": None, "tasks": tasks})()


@pytest.mark.parametrize(("name", "moe"), [("figure1", "both"), ("figure12", "task")])
def test_expert_assignments(tmp_path, name, moe):
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


def test_figure7_sets_experts_above_the_diagonal_and_none_below(tmp_path):
    runs = []
    for moe in ("both", "none"):
        tiny, data = taught(moe=moe)
        settings = Figures(prompts=3)
        runs.append(Run(tmp_path / moe, tiny, checkpoint.TaskSplit([], []), settings))
        runs[-1].dataset = lambda data=data: data
    rows = check_picture(figures.figure7(runs, tmp_path)[0])
    assert {(row["run"], row["network"]) for row in rows} == {("both", "MoE"), ("none", "MLP")}
    for run in runs:
        want = cosines(run.method, data, 3)
        got = [float(row["cosine"]) for row in rows if row["run"] == run.name]
        assert got == pytest.approx([row["cosine"] for row in want], rel=1e-4)


def test_router_health_is_what_train_csv_says(tmp_path):
    runs = figures.open_runs(Figures(runs=(str(finished(tmp_path / "a")),)))
    rows = check_picture(figures.router_health(runs, tmp_path)[0])
    found = {(r["column"], r["step"]): float(r["value"]) for r in rows}
    assert found["token_mi", "3"] == pytest.approx(0.6) and found["info_nce", "1"] == 2
    assert len(found) == 3 * 7
    (tmp_path / "a" / "train.csv").unlink()
    with pytest.raises(LeftOut, match=r"train\.csv"):
        figures.router_health(runs, tmp_path)


def test_points_are_the_same_again_and_take_what_they_get():
    x = np.random.default_rng(0).normal(size=(12, 4))
    assert (points(x) == points(x)).all() and np.isfinite(points(0 * x)).all()
    assert np.isfinite(points(x[:, :1])).all()
    with pytest.raises(ValueError, match="at least 4"):
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
    assert all(picture[..., :3].std() > 0.02 for picture in pictures)
    words = " ".join(read.words)
    _, returns = read_returns(run / "test-sample-last.csv")
    for said in (run.name, f"{returns[:, 0].mean():.2f}", "optimum", "w_contrastive", "departures"):
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
    # both goals and paths are there, in the first two colours of matplotlib
    for colour in ([31, 119, 180], [255, 127, 14]):
        assert (abs(picture[..., :3] * 255 - colour).max(-1) < 2).sum() > 300
    assert "python evaluate.py" in " ".join(read.words)  # it has no returns yet


# -------------------------------------------------------------------------------------- wrong input
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    room, plane = finished(tmp_path / "room"), finished(tmp_path / "plane", "ad", "point-robot")
    half = finished(tmp_path / "half", step=2)
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
        ([room, room, "--only", "page"], "of one run"),
        ([room, "--tasks", "0"], "--tasks 0"),
        ([room, "--env", "point-robot"], "of --env darkroom, not of point-robot"),
    ):
        out = tmp_path / "out"
        flags = [*map(str, argv), "--out", str(out)]
        assert named in run_script("figures.py", flags, monkeypatch, capsys).error, argv
        assert not out.exists()
    ended = run_script("figures.py", [str(room), "--learning-speed", "3"], monkeypatch, capsys)
    assert ended.code == 2 and "--learning-speed" in ended.err
