"""test_growth.py: the bench of how cost grows: its fit, its configurations, its rows.

Nothing here depends on how fast a machine is. Run: pytest tests/test_growth.py
"""

import json
from dataclasses import asdict, replace

import pytest
import torch
from commands import run

from methods import get_method
from moe import Experts
from tools import bench, growth
from tools.measuring import make_method, operations_of, random_dataset


# ------------------------------------------------------------------------------------------ the fit
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponent_of_a_power_is_that_power(power):
    sizes = [3, 6, 12, 24]
    assert growth.exponent(sizes, [7 * s**power for s in sizes]) == pytest.approx(power)


def test_exponent_is_the_slope_of_least_squares():
    """By hand: log2 of the sizes 0, 1, 2 and of the costs 0, 0, 3; slope (-1*0 + 0*0 + 1*3) / 2."""
    assert growth.exponent([1, 2, 4], [1, 1, 8]) == pytest.approx(1.5)


@pytest.mark.parametrize(("sizes", "costs"), [([2, 2], [1, 3]), ([1, 2], [0, 1]), ([1], [1])])
def test_no_exponent_where_there_is_no_line(sizes, costs):
    with pytest.raises(ValueError, match="no exponent"):
        growth.exponent(sizes, costs)


# ------------------------------------------------------------------------------- the configurations
def settings(point) -> dict:
    """All settings that a point's network, training and policy have, by group and name."""
    return asdict(growth.method_of(point).cfg)


def different(a: dict, b: dict) -> set:
    """Names of the settings in which two differ."""
    found = set()
    for name in a:
        if isinstance(a[name], dict):
            found |= different(a[name], b[name])
        elif a[name] != b[name]:
            found.add(name)
    return found


@pytest.mark.parametrize("name", growth.NAMES)
def test_one_thing_alone_is_doubled(name):
    backbone, factor = growth.NAMES[name]
    base, *larger = growth.points(backbone, factor)
    assert base == growth.BASES[backbone] and len(larger) >= 2
    names = growth.FACTORS[factor].names
    # No settings: how many tasks are played, and DPT's memory, which is all that it is shown.
    seen = {"tasks": set(), "memory": {"history"} if backbone == "ad" else set()}
    for i, point in enumerate(larger, 1):
        assert point == replace(base, **{key: 2**i * getattr(base, key) for key in names})
        assert different(settings(base), settings(point)) == seen.get(names[0], set(names))


@pytest.mark.parametrize("backbone", growth.BASES)
def test_the_base_is_the_preset_cpu_of_darkroom(backbone):
    preset = asdict(make_method("darkroom", backbone, "cpu").cfg)
    changed = different(preset, settings(growth.BASES[backbone]))
    assert changed <= {"prompt_length", "batch", "history", "prompt"}


def weights(method) -> tuple[int, int]:
    """(weights of the experts that a token keeps, weights of all experts)."""
    kept = total = 0
    for layer in method.model.modules():
        if isinstance(layer, Experts):
            count = sum(p.numel() for p in layer.parameters())
            kept += method.cfg.model.top_k * count // len(layer.weight1)
            total += count
    return kept, total


@pytest.mark.parametrize("factor", ["experts", "play-experts"])
@pytest.mark.parametrize("backbone", growth.BASES)
def test_active_weights_stay_when_experts_double(backbone, factor):
    made = [weights(growth.method_of(point)) for point in growth.points(backbone, factor)]
    assert len({kept for kept, _ in made}) == 1 and made[0][0] > 10_000
    assert [total / made[0][1] for _, total in made] == [1, 2, 4]


@pytest.mark.parametrize(("factor", "least", "most"), [("batch", 0.99, 1.01), ("experts", 0, 0.05)])
def test_products_grow_no_faster_than_the_method_needs(factor, least, most):
    """Counted, not timed: the exponent of a forward pass's operations; routers alone know K."""
    counts = []
    for point in growth.points("ad", factor):
        method = growth.method_of(replace(point, prompt_length=100))
        dataset = random_dataset(method.family, episodes=1)
        batch = method.sample(dataset, point.batch, 2, torch.Generator().manual_seed(0))
        with torch.no_grad():
            counts.append(operations_of(lambda m=method, b=batch: m.losses(b)))
    assert least <= growth.exponent(growth.TIMES, counts) <= most


# ------------------------------------------------------------------------------------- what it does
TINY = dict(prompt_length=100, batch=2, width=8, token_hidden=12, task_hidden=16, tasks=2, memory=1)


@pytest.mark.parametrize("backbone", growth.BASES)
@pytest.mark.parametrize("work", growth.WORK)
def test_a_point_does_its_work(backbone, work):
    call = growth.WORK[work](replace(growth.BASES[backbone], **TINY))
    assert 0 < call() < 100 and 0 < call() < 100


def test_an_episode_is_played_behind_a_memory_of_that_many(monkeypatch):
    """Also at the second call: what is measured does not grow from one to the next."""
    begun, acted = [], []

    class Policy:
        def begin(self, history, rows):
            begun.append((len(history), rows))

        def act(self, states):
            acted.append(len(begun))
            return states[:, 0]

        def observe(self, states, actions, rewards):
            pass

    monkeypatch.setattr(get_method("dpt"), "policy", lambda self, play: Policy())
    call = growth.playing(replace(growth.BASES["dpt"], **TINY | {"memory": 3, "tasks": 5}))
    call(), call()
    assert begun == 2 * [(0, 5), (1, 5), (2, 5), (3, 5)]
    assert acted == 100 * [4] + 100 * [8]  # DarkRoom's steps, behind a full memory alone


def test_memory_is_what_a_point_adds(monkeypatch):
    """What the process had before, smallest work included, is not counted."""
    peaks, made = iter([0.5, 0.75]), []
    monkeypatch.setattr(growth, "peak_gb", lambda: next(peaks))
    monkeypatch.setitem(growth.WORK, "train", lambda point: made.append(point) or (lambda: 0.25))
    monkeypatch.setattr(growth, "fastest", lambda work: work())
    point, threads = growth.BASES["ad"], torch.get_num_threads()
    assert growth.cost(point, "train", threads) == (0.25, 0.25)
    assert made[-1] == point and made[0].batch < point.batch and made[0].width < point.width


def measured(monkeypatch) -> list:
    """The points that `grow` measures from here on: seconds ~ batch, memory ~ width^2, at once."""
    asked = []

    def instead(work, point, *others):
        asked.append((point, *others))
        return 0.1 * point.batch, 1e-4 * point.width**2

    monkeypatch.setattr(growth, "in_own_process", instead)
    return asked


def test_a_row(monkeypatch):
    asked, known = measured(monkeypatch), {}
    row = growth.grow("growth-ad-batch", 1, known)
    assert row == {
        "name": "growth-ad-batch",
        "of": "training step",
        "doubled": ["batch"],
        "values": [6, 12, 24],
        "seconds": [0.6, 1.2, 2.4],
        "seconds_exponent": 1.0,
        "seconds_needed": 1,
        "gb": [0.4096] * 3,
        "gb_exponent": 0.0,
        "gb_needed": 1,
        "threads": 1,
        "torch": torch.__version__,
    }
    words = growth.line(row).split()
    assert words[:4] == ["growth-ad-batch", "6", "12", "24"]
    assert words[4:11] == ["0.6", "1.2", "2.4", "s", "^1.00", "(needs", "1)"]
    row = growth.grow("growth-ad-width", 1, known)
    assert (row["seconds_exponent"], row["gb_exponent"]) == (0.0, 2.0)
    assert len(asked) == len(set(asked)) == 5  # the base once for both


def test_growth_is_made_by_the_bench_when_named(tmp_path, monkeypatch, capsys):
    measured(monkeypatch)
    file = tmp_path / "growth.json"
    bench.bench(json_file=str(file), only="growth", threads=1)
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == list(growth.NAMES) and len(rows) == 2 * 8
    assert len(capsys.readouterr().out.splitlines()) == len(rows)  # a row a factor
    assert bench.chosen("growth-ad-experts") == ["growth-ad-experts"]
    assert len(bench.chosen("growth-ad")) == 8
    assert not [name for name in bench.chosen(None) if name.startswith("growth")]
    assert bench.chosen("ad-darkroom-train") == ["ad-darkroom-train"]  # others begin with it


def test_the_command_names_what_it_does_not_know(monkeypatch, capsys):
    ended = run("tools/bench.py", ["--only", "growth-ad-speed"], monkeypatch, capsys)
    assert "growth-ad-speed" in ended.error and "growth-ad-experts" in ended.error
