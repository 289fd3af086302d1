"""A run's page (pictures/page.py), its rooms and its frames.

Run: pytest tests/test_page.py
"""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from drawing import (
    SMALL,
    finished,
    has_colours,
    made_up,
    sides_of,
    table,
    words_of,
)
from matplotlib.image import imread
from toys import config, stir

import figures
from data import Prompt
from envs import get_family
from evaluate import Evaluation, evaluate_run, play_all
from families.darkroom import walk
from pictures.curves import curve_figure, interval, read_returns
from pictures.frames import draw_frames
from pictures.page import ceiling, write_page
from pictures.rooms import darkroom, draw_rooms
from pictures.routers import play_episodes
from pictures.runs import Figures, Run


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


def test_a_curve_is_the_mean_over_tasks_and_its_interval():
    returns = np.array([[1.0, 2.0, 9.0], [3.0, 8.0, 7.0], [5.0, 2.0, 5.0]])  # three tasks
    lines = {"optimum": 11.0, "teacher": None, "paper": 6.5, "random": 0.5}
    (axis,) = curve_figure("title", returns, lines, np.array([4.0, 5.0, 6.0]), "exact").axes
    low, high = interval(returns[None])
    assert axis.lines[0].get_ydata().tolist() == [3, 4, 7]
    assert sides_of(axis.collections[0]) == pytest.approx([*low, *high])
    assert [line.get_ydata()[0] for line in axis.lines[1:]] == [4, 11, 6.5, 0.5]
    named = ["exact", "optimum 11.0", "paper 6.5", "random 0.5"]
    assert words_of(axis.get_legend()) == ["this run, 95 % over tasks", *named]


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
