"""health.py: what is drawn of routers over training is what train.csv says, beside chance.

Run: pytest tests/test_health.py
"""

import math

import pytest
import torch
from commands import run as run_script
from drawing import check_picture, finished, made_up, table, words_of
from toys import coded_dataset

import figures
from contrastive import eq7_pairs
from data import draw_tasks
from figures import LeftOut
from pictures.health import chance_in_a_batch
from pictures.runs import Figures


def test_router_health_is_what_train_csv_says(tmp_path, saved):
    runs = figures.open_runs(Figures(runs=(str(finished(tmp_path / "a")),)))
    rows = check_picture(figures.router_health(runs, tmp_path)[0])
    found = {(r["column"], r["step"]): float(r["value"]) for r in rows}
    assert found["token_mi", "3"] == pytest.approx(0.6) and found["info_nce", "1"] == 2
    assert found["accuracy at chance in a batch", ""] == pytest.approx(1 / 3, rel=1e-4)
    assert len(found) == 3 * 12 + 8  # levels
    loads, shares, entropies, _, accuracies, losses = saved[0].axes
    for axis, want in (  # the columns' last rows, and where each would be by chance
        (loads, [0.1, 0.2, 0.3, 0.4, 1 / 4]),  # there is no load of a task expert
        (shares, [0.1, 1 / 4, 0.05, 1 / 5]),
        (entropies, [1.5, 2, 2, math.log2(5)]),
        (accuracies, [0.3, 1 / 3, 0.1, 0.01]),  # a batch of four
        (losses, [0, math.log(3)]),
    ):
        assert [line.get_ydata()[-1] for line in axis.lines] == pytest.approx(want)
    assert loads.lines[-1].get_linestyle() == ":"
    assert words_of(accuracies.get_legend()) == [
        "accuracy", "chance in a batch", "accuracy_fresh", "chance on fresh draws",
    ]  # fmt: skip
    assert words_of(saved[0].legends[0]) == ["a"]
    two = [*runs, *figures.open_runs(Figures(runs=(str(finished(tmp_path / "b", seed=1)),)))]
    path = tmp_path / "a" / "train.csv"  # as an older version has written it
    path.write_text("\n".join(",".join(r.split(",")[:8]) for r in path.read_text().split()) + "\n")
    (drawn,) = figures.router_health(two, tmp_path)
    assert drawn.stem.name == "router_health-darkroom" and words_of(saved[1].legends[0]) == [*"ab"]
    assert len(table(f"{drawn.stem}.csv")) == 3 * (6 + 12) + 5 + 8
    figures.router_health(runs, tmp_path)
    titles = ["least used", "I(token", "accuracy", "loss"]
    assert all(a.get_title().startswith(t) for a, t in zip(saved[2].axes, titles, strict=True))
    (tmp_path / "a" / "train.csv").unlink()
    with pytest.raises(LeftOut, match=r"train\.csv"):
        figures.router_health(runs, tmp_path)


@pytest.mark.parametrize(
    ("keys", "batch", "draws"),  # 32 rows: of eight tasks, two rounds
    [
        ("all", 4, 2),
        ("all", 32, 2),
        ("all", 8, 4),
        ("all", 8, 1),
        ("other", 8, 2),
        ("other", 32, 2),
    ],
)
def test_chance_in_a_batch_is_that_of_its_pairs(tmp_path, keys, batch, draws):
    split = ([[0.1 * n] for n in range(8)], [])
    run = made_up(tmp_path, split=split, batch=batch, draws=draws, keys=keys)
    task = draw_tasks(coded_dataset(tasks=8), batch, draws, torch.Generator().manual_seed(0))
    keys_of, positives = eq7_pairs(task, keys)
    want = (positives.sum() / keys_of.sum()).item()
    assert chance_in_a_batch(run) == pytest.approx(want)


def test_a_damaged_train_csv_is_named(tmp_path, monkeypatch, capsys):
    place = finished(tmp_path / "a")
    path = place / "train.csv"
    text = path.read_text()
    for wrong in (
        text.replace("step", "stop"),
        text.replace("0.05", "o.05"),
        text.replace("\n2,", "\nnan,"),
        text[: text.rindex(",")],
        text.strip() + ",7\n",
        text + 13 * ",1" + "\n",
    ):
        path.write_text(wrong)
        flags = [str(place), "--only", "router_health"]
        said = run_script("figures.py", flags, monkeypatch, capsys).error
        assert f"{path} is damaged" in said, wrong
    figures.draw(Figures(runs=(str(place),), out=str(tmp_path), tasks=1, plays=2))
    assert f"router_health is left out: {path} is damaged" in capsys.readouterr().out
