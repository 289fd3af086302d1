"""figures.py: every figure is a picture, its CSV what a slow computation gives.

Run: pytest tests/test_figures.py
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toys
from commands import ROOT
from commands import run as run_script
from drawing import check_picture, finished, made_up, sides_of, table, taught, words_of
from toys import PLANE, draw, stir

import figures
from figures import FIGURES, LeftOut
from pictures.colours import colour_of_tasks, points
from pictures.curves import interval
from pictures.gradients import cosines
from pictures.numbers import information, rank_correlation, silhouette
from pictures.routers import TasksSeen, look
from pictures.runs import Figures, Run, lines_of
from support import checkpoint


# -------------------------------------------------------------------------------------- the figures
def test_curves_have_a_line_for_settings_and_an_interval_over_seeds(tmp_path, saved):
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
    (axis,) = saved[0].axes  # what the CSV says is what is drawn
    assert words_of(axis.get_legend())[0] == "T2MIR-AD (w_contrastive 0.01), 2 seeds"
    for number, (line, band) in enumerate(zip(axis.lines, axis.collections, strict=True)):
        mean, low, high = (
            [float(row[name]) for row in rows[4 * number : 4 * number + 4]]
            for name in ("mean", "low", "high")
        )
        assert line.get_ydata() == pytest.approx(mean, rel=1e-4)
        assert sides_of(band) == pytest.approx([*low, *high], rel=1e-4)
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


def test_a_legend_leaves_out_the_size_of_what_a_line_does_not_have(tmp_path):
    wider = ({}, {"moe": "token", "token_hidden": 48}, {"moe": "none"})
    runs = [made_up(tmp_path, **changes) for changes in wider]
    assert [label for label, _ in lines_of(runs)] == [
        "T2MIR-AD (token_hidden 32)",
        "T2MIR-AD w/o Task-MoE (token_hidden 48)",
        "AD",
    ]
    runs = [made_up(tmp_path, moe="none", task_hidden=hidden) for hidden in (40, 45)]
    assert [label for label, _ in lines_of(runs)] == ["AD (task_hidden 40)", "AD (task_hidden 45)"]


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
    held_out, trained = (dots.get_facecolor()[0, :3].max() for dots in axis.collections[-2:])
    assert (held_out, trained) == (0, 1)  # in the legend: black inside, white inside
    used = [row for row in rows if row["expert"] == "5"]
    assert axis.lines[4].get_ydata() == pytest.approx([float(r["gate"]) for r in used], rel=1e-4)
    with pytest.raises(LeftOut, match="no run with"):
        figures.figure13([made_up(tmp_path, moe="none")], tmp_path)
    with pytest.raises(LeftOut, match="task experts"):
        figures.figure13([made_up(tmp_path, moe="token")], tmp_path)


def look_alike(gate):
    tasks = TasksSeen(z=np.log(gate), gate=gate, expert=gate.argmax(1), untrained=[gate[::-1]])
    return type("Seen", (), {"tokens": None, "tasks": tasks})()


def check_dots(axis, rows, named):
    """A legend's entry stands for the points of the CSV's rows of that name, and no others."""
    assert {dots.get_label() for dots in axis.collections} == set(named)
    assert sorted(words_of(axis.get_legend())) == sorted(set(named))
    for dots in axis.collections:
        own = [row for row, name in zip(rows, named, strict=True) if name == dots.get_label()]
        want = [[float(row["x"]), float(row["y"])] for row in own]
        np.testing.assert_allclose(dots.get_offsets(), want, rtol=1e-4, atol=1e-4)


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
    for axis in saved[0].axes[: 3 if moe == "both" else 1]:  # the panels; then a key
        shown = trajectories
        kind = {"test": "held-out", "train": "trained on"}
        named = [kind[row["split"]] for row in shown]
        if axis.get_title().startswith("tokens by"):
            shown = [row for row in rows if row["of"] == "token"]
            named = [row["modality"] for row in shown]
            if axis.get_title() == "tokens by expert":
                named = [f"expert {row['expert']}" for row in shown]
        check_dots(axis, shown, named)
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


def test_figure7_compares_what_differs_in_moe_alone(tmp_path, saved, monkeypatch):
    """Of seeds it is the mean; halves, other weights and other data are no part of it."""

    def of_seed(method, *_):
        value = 0.1 * (1 + method.cfg.seed) * (1 if method.cfg.model.moe == "both" else -1)
        pairs = (("I", "II"), ("II", "II"))
        return [{"parameters": "all", "a": a, "b": b, "cosine": value} for a, b in pairs]

    monkeypatch.setattr(figures, "cosines", of_seed)
    monkeypatch.setattr(Run, "dataset", lambda _run: None)
    more = {"s0": {}, "s1": {"seed": 1}, "none": {"moe": "none", "seed": 2}}
    more |= {"half": {"moe": "token"}, "weight": {"w_contrastive": 0.1}}
    more |= {"medium": {"quality": "medium"}}
    runs = [made_up(tmp_path / name, **changes) for name, changes in more.items()]
    (drawn,) = figures.figure7(runs, tmp_path)
    assert drawn.stem.name == "figure7-toy-plane-ad"
    assert [row["run"] for row in table(f"{drawn.stem}.csv")[::2]] == ["s0", "s1", "none"]
    cells = saved[0].axes[0].images[0].get_array()
    assert [cells[0, 1], cells[1, 0]] == pytest.approx([0.15, -0.3])
    alone = figures.figure7([run for run in runs if run.name != "none"], tmp_path)
    names = [f"figure7-toy-plane-ad-{name}" for name in ("s0", "weight")]
    assert [drawn.stem.name for drawn in alone] == names
    with pytest.raises(LeftOut, match="whole method on Mixed"):
        figures.figure7(runs[-1:], tmp_path)


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


def test_runs_of_one_name_have_pictures_of_their_own(tmp_path):
    for place in ("a/x/run", "b/x/run", "b/x/other"):
        (tmp_path / place).mkdir(parents=True)
    paths = [str(tmp_path / place) for place in ("a/x/run", "b/x/run", "b/x/other")]
    runs = [made_up(Path(path)) for path in paths]
    assert [run.name for run in runs] == ["run", "run", "other"]  # each by itself
    for run in runs:
        run.settings = Figures(tuple(paths))
    assert [run.name for run in runs] == ["a-x-run", "b-x-run", "other"]


def test_runs_of_a_users_method_are_drawn_beside_t2mir(tmp_path, monkeypatch):
    dpt = finished(tmp_path / "dpt")
    monkeypatch.setitem(toys.BACKBONES, "ad", str(ROOT / "tests" / "forks" / "bc.py"))
    own = finished(tmp_path / "own", "ad")
    moved = tmp_path / "bc.py"  # the file of that name: a folder may have moved
    moved.write_text((ROOT / "tests" / "forks" / "bc.py").read_text())
    runs = figures.open_runs(Figures((str(dpt), str(own)), backbone=str(moved)))
    assert [run.method.cfg.backbone for run in runs] == ["dpt", str(moved)]
    assert type(runs[1].method).__name__ == "BehaviourCloning"
    for named, backbone, message in (
        ((dpt, own), None, r"bc\.py: name it yourself"),
        ((dpt, own), "other.py", r"bc\.py, not of other\.py"),
        ((dpt,), str(moved), "none of these runs"),
        ((dpt,), "ad", "of --backbone dpt, not of ad"),
    ):
        with pytest.raises(ValueError, match=message):
            figures.open_runs(Figures(tuple(map(str, named)), backbone=backbone))


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
