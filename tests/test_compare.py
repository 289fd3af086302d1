"""What is made of the evaluations: intervals over seeds and tasks, and the table.

Run: pytest tests/test_compare.py
"""

import csv
import itertools
import math

import numpy as np
import pytest
from commands import at_home, contents, run, table

from experiments.compare import COLUMNS, Cell, as_csv, as_markdown, interval, make_rows, paired
from experiments.runs import FORMAT
from reproduce import Reproduction, plan
from support.files import save_json


# --------------------------------------------------------------------------------------- statistics
def draws(rng, seeds, tasks, of_seed, of_task, of_both):
    """(S, N) scores with mean 3: what is a seed's, what a task's, what is left."""
    effects = of_seed * rng.normal(size=(seeds, 1)) + of_task * rng.normal(size=(1, tasks))
    return 3 + effects + of_both * rng.normal(size=(seeds, tasks))


def test_intervals_are_as_wide_as_the_means_vary():
    rng = np.random.default_rng(1)
    for seeds, tasks, spread in ((1, 30, (0, 2, 1)), (40, 30, (1, 2, 0.5)), (40, 30, (2, 0, 1))):
        half = []
        for _ in range(12):
            scores = draws(rng, seeds, tasks, *spread)
            low, high = interval(scores)
            assert low < scores.mean() < high
            half.append((high - low) / 2 / 1.96)
        of_seed, of_task, of_both = spread
        variance = of_seed**2 / seeds + of_task**2 / tasks + of_both**2 / (seeds * tasks)
        assert np.mean(half) == pytest.approx(math.sqrt(variance), rel=0.12)


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng, inside = np.random.default_rng(2), 0
    for _ in range(300):
        low, high = interval(draws(rng, 3, 20, 1, 1, 1))
        inside += low < 3 < high
    assert 0.9 < inside / 300 < 0.985


def test_interval_of_little():
    assert interval(np.full((3, 4), 2.5)) == (2.5, 2.5)
    assert all(map(math.isnan, interval(np.ones((1, 1)))))


def test_paired_differences_leave_out_what_both_have():
    rng = np.random.default_rng(3)
    ours = draws(rng, 5, 20, 3, 10, 0.5)
    others = ours - 0.7 + 0.2 * rng.normal(size=ours.shape)
    mean, low, high = paired(ours, others)
    assert mean == pytest.approx((ours - others).mean()) and low < 0.7 < high
    wide = interval(ours)
    assert high - low < 0.1 * (wide[1] - wide[0])
    assert paired(others, ours) == pytest.approx((-mean, -high, -low), abs=0.01)


# -------------------------------------------------------------------------------------------- table
def fake(folder, name, seed, returns, tasks=("0 1", "2 2"), repeats=1, **facts):
    """A record and its CSV: `returns` (repeats * tasks, E)."""
    with open(folder / f"{name}{seed}.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["task", "episode", "return"])
        for i, curve in enumerate(returns):
            out.writerows([tasks[i % len(tasks)], e + 1, value] for e, value in enumerate(curve))
    facts = {"random_return": 0.0, "optimum": 8.0, "teacher_return": None} | facts
    content = {"format": FORMAT, "csv": f"{name}{seed}.csv", "repeats": repeats, "steps": 7}
    path = folder / f"{name}{seed}.json"
    save_json(path, content | facts | {"train_seconds": 60.0 * (seed + 1)})
    return path


def test_rows_of_a_table(tmp_path):
    # six episodes, of which the first does not count; the second repeat is two better
    first = {s: fake(tmp_path, "a", s, [[9, *[4 + s] * 5], [9, *[6 + s] * 5]]) for s in (0, 1)}
    again = [[0, 1, 1, 1, 1, 1], [0, 5, 5, 5, 5, 5], [0, 3, 3, 3, 3, 3], [0, 7, 7, 7, 7, 7]]
    other = {1: fake(tmp_path, "b", 1, again, repeats=2, optimum=None, teacher_return=10.0)}
    apart = {1: fake(tmp_path, "c", 1, [[0] * 6, [8] * 6], tasks=("0 1", "3 3"))}
    cells = [
        Cell("darkroom", "ad", "", "none yet", None, {}),  # then the next one is the first
        Cell("darkroom", "ad", "", "T2MIR", (90.9, 0.1), first),
        Cell("darkroom", "ad", "", "other", None, other),
        Cell("darkroom", "ad", "", "apart", None, apart),
        Cell("darkroom", "ad", "", "not run", None, {}),
        Cell("darkroom", "dpt", "", "other", None, other),
    ]
    rows = make_rows(cells)
    assert [row["variant"] for row in rows] == ["T2MIR", "other", "apart", "other"]
    one, two, three, four = rows
    assert tuple(one) == COLUMNS
    assert (one["mean"], one["best"], one["share"], one["seeds"]) == (5.5, 9, 5.5 / 8, "0 1")
    assert one["low"] <= 4.5 and one["high"] >= 6.5 and one["train_seconds"] == 90
    assert (one["difference"], four["difference"]) == (None, None)  # each is the first of its own
    # seed 1 alone is in both: (2, 6) less (5, 7)
    assert (two["mean"], two["share"], two["repeats"]) == (4, 0.4, 2)
    wide = 12.7062  # Student's t of two tasks: their mean is known from one difference
    assert (two["difference"], two["difference_low"]) == pytest.approx((-2, -2 - wide), abs=1e-3)
    assert two["difference_seeds"] == "1" == two["seeds"]
    turned = make_rows([cells[2], cells[1]])  # the row has seeds that the first one has not
    assert (turned[1]["seeds"], turned[1]["difference_seeds"]) == ("0 1", "1")
    assert "[-10.71, +14.71], of 1 | 0 1 |" in as_markdown(turned, "")
    assert (three["mean"], three["difference"]) == (4, None)  # of other tasks
    lines = as_markdown(rows, "title").splitlines()
    assert lines[0] == "# title" and len([line for line in lines if line.startswith("| dark")]) == 4
    bounds = f"[{one['low']:.2f}, {one['high']:.2f}]"
    assert f"| 90.9 ± 0.1 | 5.50 {bounds} | 9.00 | 69 % |" in "\n".join(lines)
    assert "| 4.00 [-21.41, 29.41] | 4.00 | 40 % (t) | -2.00 [-14.71, +10.71] |" in "\n".join(lines)
    means = [row["mean"] for row in csv.DictReader(as_csv(rows).splitlines())]
    assert means == ["5.5", "4", "4", "4"]


def test_a_narrower_command_keeps_the_rows_of_a_wider_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results" / "paper" / "table1"
    results.mkdir(parents=True)
    wide = Reproduction("table1", ("point-robot", "darkroom"), seeds=(0, 1), preset="cpu")
    for planned in plan(wide)[0]:
        facts = {"repeats": 3, "settings": planned.job.settings}
        fake(results, planned.job.name[:-1], planned.seed, [[1, 2]] * 6, **facts)
    (tmp_path / "mine.py").write_text("open('ran', 'w')")  # what a record names must not be run
    facts["settings"] = facts["settings"] | {"backbone": "mine.py"}
    fake(results, "mine", 0, [[1, 2]] * 6, **facts)
    (results / "note.json").write_text("{}")

    line = ["table1", "--preset", "cpu", "--minutes", "1e-9", "--trial", "0", "--envs"]
    narrow = [*line, "darkroom", "--backbones", "dpt", "--seeds", "1", "--variants", "plain"]
    with at_home():
        ended = run("reproduce.py", narrow, monkeypatch, capsys)
    assert ended.code == 0 and "1 runs, 1 finished" in ended.out, ended.err
    rows = table(results)
    assert [(row["env"], row["backbone"], row["variant"]) for row in rows] == list(
        itertools.product(("darkroom", "point-robot"), ("ad", "dpt"), ("T2MIR", "plain"))
    )
    assert all(row["seeds"] == "0 1" for row in rows) and not (tmp_path / "ran").exists()
    before = contents(results)
    with at_home():  # another family adds nothing yet; other settings would take the table's place
        assert run("reproduce.py", [*line, "push"], monkeypatch, capsys).code == 0
        for more in (["--set", "lr=0.1"], ["--preset", "paper"]):
            ended = run("reproduce.py", [*line, "darkroom", *more], monkeypatch, capsys)
            assert ended.code == 1 and "has a table already (table1: Table 1" in ended.error
    assert {name: text for name, (text, _) in contents(results).items()} == {
        name: text for name, (text, _) in before.items()
    }


def test_what_is_no_evaluation_is_one_line(tmp_path):
    record = fake(tmp_path, "a", 0, [[1, 2], [3, 4]])
    cell = Cell("darkroom", "ad", "", "T2MIR", None, {0: record})
    assert make_rows([cell])[0]["mean"] == 2.5
    (tmp_path / "a0.csv").write_text("task,episode\n0 1,1\n")
    with pytest.raises(ValueError, match=r"a0.csv is not an evaluation"):
        make_rows([cell])
    other = fake(tmp_path, "b", 1, [[1, 2], [3, 4]], tasks=("5 5", "6 6"))
    cell.records = {0: fake(tmp_path, "a", 0, [[1, 2], [3, 4]]), 1: other}
    with pytest.raises(ValueError, match="other tasks"):
        make_rows([cell])
