"""Experiments from nothing: what is run, and what a kill and a failure leave.

Run: pytest tests/test_reproduce.py
"""

import csv
import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from commands import ROOT, at_home, contents, run, start, table
from tiny_experiment import but, names

from envs import FAMILIES, get_family
from experiments.paper import EXPERIMENTS, TABLE_1, variants_of
from experiments.projection import Trial, in_words, project, sizes
from experiments.runs import other_settings, read_record
from reproduce import Reproduction, given_settings, plan, run_name
from support import checkpoint
from support.command_line import check, differences, flags_of, parse_config, preset_config
from support.files import only_writer, save_json
from support.settings import flat, with_values


# ----------------------------------------------------------------------------------- whole commands
def test_a_killed_command_goes_on_without_repeating_a_finished_run(
    tiny, tmp_path, monkeypatch, capsys
):
    tiny = but(tiny, "steps=150", "log_every=50")
    with at_home():
        first = run("reproduce.py", [*tiny, "--seeds", "0"], monkeypatch, capsys)
    assert first.code == 0 and "1 runs, 0 finished" in first.out, first.err
    both = [*tiny, "--seeds", "0", "1"]
    done, stopped = names(both).values()
    runs, results = tmp_path / "runs" / "paper", tmp_path / "results" / "paper" / "table1"
    kept = contents(runs / done), contents(results)[f"{done}.json"]

    process, end = start(both, script="reproduce.py", cwd=tmp_path), time.monotonic() + 300
    try:
        while not (runs / stopped / checkpoint.FILE).exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    with only_writer(runs / stopped, seconds=60):  # its training was told to end
        assert 0 < checkpoint.read(runs / stopped)[1].step < 150
    assert not (results / f"{stopped}.json").exists()

    with at_home():
        again = run("reproduce.py", both, monkeypatch, capsys)
    assert again.code == 0 and "2 runs, 1 finished" in again.out, again.err
    assert (contents(runs / done), contents(results)[f"{done}.json"]) == kept
    assert checkpoint.read(runs / stopped)[1].step == 150
    (row,) = table(results)
    assert (row["seeds"], row["tasks"], row["repeats"], row["steps"]) == ("0 1", "4", "2", "150")
    assert (row["paper"], row["paper_pm"], row["difference"]) == ("78.3", "1.4", "")
    with open(results / f"{stopped}-test-sample-last.csv", newline="") as file:
        returns = [float(line["return"]) for line in csv.DictReader(file)]
    with open(results / f"{done}-test-sample-last.csv", newline="") as file:
        returns += [float(line["return"]) for line in csv.DictReader(file)]
    assert len(returns) == 2 * 4 * 2 * 2  # seeds, tasks, repeats, episodes
    assert float(row["mean"]) == pytest.approx(np.mean(returns), rel=1e-4)

    before = contents(tmp_path / "runs")
    with at_home():
        over = run("reproduce.py", both, monkeypatch, capsys)
    assert over.code == 0 and "2 runs, 2 finished" in over.out
    assert contents(tmp_path / "runs") == before

    # A record that is older than a setting is of what was done before; one without another is not.
    record = results / f"{done}.json"
    for missing, said in (("contrast_trunk", "2 runs, 2 finished"), ("lr", "(lr None -> 0.001)")):
        content = read_record(record)
        del content["settings"][missing]
        save_json(record, content)
        with at_home():
            old = run("reproduce.py", both, monkeypatch, capsys)
        assert said in old.out + old.err, missing


def test_the_results_that_come_along_are_of_todays_presets():
    """All of them, so that their commands find them finished (results/README.md)."""
    for folder in sorted((ROOT / "results" / "paper").iterdir()):
        records = {path.stem: read_record(path)["settings"] for path in folder.glob("*.json")}
        places = {(found["env"], found["backbone"]) for found in records.values()}
        seeds = tuple(sorted({found["seed"] for found in records.values()}))
        for env, backbone in places:
            runs = plan(
                Reproduction(
                    folder.name,
                    (env,),
                    (backbone,),
                    seeds=seeds,
                    preset="cpu",
                    results=str(folder),
                )
            )[0]
            for job in (each.job for each in runs):
                found = records.pop(job.name, None)
                assert found is None or other_settings(job, found) == [], job.name
        assert records == {}, f"{folder.name}: no run of today has these names"


def test_the_projection_and_no_run_after_the_minutes(tiny, tmp_path, monkeypatch, capsys):
    argv = [*tiny, "--seeds", "0", "1", "--trial", "1", "--minutes", "0"]
    with at_home():
        ended = run("reproduce.py", argv, monkeypatch, capsys)
    assert ended.code == 0 and "s a step" in ended.out and "projected: " in ended.out, ended.err
    assert "  darkroom, dpt, T2MIR: seeds 0 1, 0 finished\n2 runs, 0 finished\n" in ended.out
    last = ended.out.splitlines()[-1]
    assert last == "2 runs were not started; the same command without --minutes goes on with them"
    assert not (tmp_path / "runs").exists()
    assert [in_words(s) for s in (3, 119, 150, 9000, 260_000)] == [
        "3 s", "119 s", "2.5 min", "2.5 h", "3.0 days"
    ]  # fmt: skip


def test_each_size_has_a_trial_and_a_cluster_counts_core_time(monkeypatch, capsys):
    tried = []

    def measure(cfg, *_):
        tried.append((cfg.model.width, cfg.training.batch))
        return Trial(0.1, 0)

    monkeypatch.setattr("experiments.projection.measure", measure)
    given = "steps=600", "width=64", "batch=36", "lr=0.002", "optimizer=muon"
    variants = "cpu", "lr 0.0003", "optimizer adamw", "width 128", "batch 32"
    command = Reproduction("departures", ("darkroom",), ("dpt",), variants, (0, 1), "cpu", given)
    runs = [(run.cell.variant, run.cfg, 0) for run in plan(command)[0]]
    for slots, total in ((2, "5.0 min with 2"), (20, "60 s with 20"), (None, "10.0 min of core")):
        tried.clear()
        project(runs, 1, 1, slots)
        assert tried == [(64, 36), (128, 36), (64, 32)]
        out = capsys.readouterr().out
        assert f"projected: {total}" in out and "cpu and 2 like it: 0.100 s a step" in out
    for name, different in (("table1", 1), ("ablation", 3), ("quality", 1)):
        runs, _ = plan(Reproduction(name, ("push",), ("ad",), seeds=(0,), preset="cpu"))
        assert len({sizes(run.cfg) for run in runs}) == different < len(runs)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("tabel1", "unknown experiment 'tabel1'"),
        ("", "unknown experiment ''"),
        ("table1 --envs nope", "unknown environment 'nope'"),
        ("table1 --envs reach reach", "--envs names reach twice"),
        ("table1 --backbones gpt", "unknown backbone 'gpt'"),
        ("table1 --seeds -1", "--seeds -1"),
        ("table1 --seeds 3 0 3", "--seeds names 3 twice"),
        ("table1 --seeds", "--seeds names none"),
        ("table1 --preset tpu", "unknown preset 'tpu'"),
        ("table1 --variants both", "--variants both"),
        ("table1 --repeats 0", "--repeats 0"),
        ("table1 --jobs -1", "--jobs -1"),
        ("table1 --minutes -1", "--minutes -1"),
        ("table1 --set lr", "--set lr"),
        ("table1 --set speed=3", "--set speed=3"),
        ("table1 --set lr=fast", "--lr 'fast'"),
        ("table1 --set w-load=1 w_load=2", "--set names w_load twice"),
        ("table1 --set moe=both", "moe is not the same for all runs"),
        ("quality --set quality=mixed", "quality is not the same for all runs"),
        ("table1 --set seed=3", "seed is not the same for all runs"),
        ("table1 --envs darkroom --set data=nowhere", "no dataset in nowhere"),
        ("table1 --envs darkroom --set init=nowhere", "nowhere has no checkpoint"),
        ("table1 --runs /dev/null", "--runs /dev/null: /dev/null is no folder"),
        ("table1 --results /dev/null/x", "--results /dev/null/x: /dev/null is no folder"),
        ("departures --preset paper", "no departures"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, line, named, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ended = run("reproduce.py", [*line.split()], monkeypatch, capsys)
    assert named in ended.error and list(tmp_path.iterdir()) == []


def test_what_set_says_is_json_or_pythons_words():
    texts = "token_shift=False", "task-center=true", "tasks=None", "lr=3e-4", "recipe=wander"
    command = Reproduction("table1", ("darkroom",), ("dpt",), preset="cpu", set=texts)
    assert given_settings(command) == {
        "token_shift": False, "task_center": True, "tasks": None, "lr": 3e-4, "recipe": "wander",
    }  # fmt: skip


# -------------------------------------------------------------------------------------- experiments
@pytest.mark.parametrize("backbone", ["ad", "dpt"])
@pytest.mark.parametrize("env", FAMILIES)
def test_departures_are_all_of_them_one_at_a_time(env, backbone):
    base, paper = (preset_config(name, env, backbone) for name in ("cpu", "paper"))
    first, *others = variants_of("departures", base).values()
    assert first == {} and len(others) == len(differences(base)) > 10
    assert all(len(settings) == 1 for settings in others)
    back = with_values(base, {k: v for settings in others for k, v in settings.items()})
    free = flat(base.run).keys() | flat(base.work).keys() | {"preset"}
    assert {k: v for k, v in flat(back).items() if k not in free} == {
        k: v for k, v in flat(paper).items() if k not in free
    }


@pytest.mark.parametrize("preset", ["paper", "cpu"])
def test_every_variant_can_be_and_is_a_run_of_its_own(preset):
    for name, experiment in EXPERIMENTS.items():
        if name == "departures":
            continue
        for env, backbone in itertools.product(experiment.envs, ("ad", "dpt")):
            base = preset_config(preset, env, backbone)
            found = []
            for shared in experiment.groups.values():
                for settings in variants_of(name, base).values():
                    cfg = with_values(base, shared | settings)
                    check(cfg)
                    found.append(cfg)
            assert all(a != b for a, b in itertools.combinations(found, 2))
        assert parse_config(flags_of(cfg)) == cfg  # what train.py is told


def test_the_papers_tables_agree_where_they_say_the_same():
    """T2MIR's number of Table 1 comes again in Tables 6, 7, 9 and 10; each variant has a number."""
    again = {"token-experts": "2/6", "task-experts": "2/8", "moe-position": "top"}
    for name, variant in (again | {"ablation": "T2MIR", "quality": "T2MIR"}).items():
        group = "mixed" if name == "quality" else ""
        for env, backbone in itertools.product(EXPERIMENTS[name].envs, ("ad", "dpt")):
            number = EXPERIMENTS[name].paper[group, env, backbone, variant]
            assert number == TABLE_1["", env, backbone, "T2MIR"]
    for name, experiment in EXPERIMENTS.items():
        for env, backbone in itertools.product(experiment.envs, ("ad", "dpt")):
            for group, variant in itertools.product(experiment.groups, experiment.variants):
                known = (group, env, backbone, variant) in experiment.paper
                assert known == (name not in ("routing", "departures") and " x " not in variant)
    for env in EXPERIMENTS["table1"].envs:  # evaluate.py prints these
        for backbone in ("ad", "dpt"):
            known = get_family(env).paper_return
            assert TABLE_1["", env, backbone, "T2MIR"][0] == known[f"T2MIR-{backbone.upper()}"]
            assert TABLE_1["", env, backbone, "plain"][0] == known[backbone.upper()]


def test_a_method_without_the_settings_is_one_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "from methods import Method\n\n\nclass Mine(Method):\n    pass\n"
    (tmp_path / "idt.py").write_text(text)
    command = Reproduction("table1", ("darkroom",), ("dpt", "idt.py"), seeds=(0, 1), preset="cpu")
    runs, _ = plan(command)
    assert [run.cell.variant for run in runs if run.seed == 0] == ["T2MIR", "plain", ""]
    assert runs[-1].cell.paper == (49.2, 2.8)  # Table 1's column IDT
    assert runs[-1].job.name == "darkroom-idt-cpu-s1"
    assert "idt.py" in runs[-1].job.train and "idt.py" in runs[-1].job.evaluate
    assert len(list(tmp_path.iterdir())) == 1


def test_task_experts_keep_their_size_and_token_experts_their_sum():
    """Table 7: 2048 hidden units of 8 experts. Table 6: 1536 of all, a third of them at work."""
    base = preset_config("paper", "point-robot", "dpt")
    hidden = {"2/8": 2048, "2/6": 1536, "2/4": 1024}
    for variant, settings in variants_of("task-experts", base).items():
        assert settings == {"task_experts": int(variant[2:]), "task_hidden": hidden[variant]}
    for settings in variants_of("token-experts", base).values():
        model = with_values(base, settings).model
        kept = (model.token_top_k or model.top_k) * model.token_hidden / model.token_experts
        assert (kept, model.top_k) == (512, 2)


@pytest.mark.parametrize("preset", ["cpu", "paper"])
@pytest.mark.parametrize("backbone", ["ad", "dpt"])
def test_a_wider_single_moe_has_the_active_weights_of_both(preset, backbone):
    """Of those that a token meets in the layer: Table 10 without its difference in size."""
    base = preset_config(preset, "cheetah-vel", backbone)

    def active(settings: dict) -> float:
        cfg = with_values(base, settings).model
        out = cfg.width / 2 if cfg.moe == "both" else cfg.width
        kept = {
            "token": (cfg.token_top_k or cfg.top_k) * cfg.token_hidden / cfg.token_experts,
            "task": cfg.top_k * cfg.task_hidden / cfg.task_experts,
        }
        return sum(n * (cfg.width + out) for half, n in kept.items() if cfg.moe in (half, "both"))

    variants = {name: active(found) for name, found in variants_of("ablation", base).items()}
    both = variants["T2MIR"]
    assert variants["w/o Task-MoE"] == variants["w/o Token-MoE"] == both * 2 / 3
    assert variants["Token-MoE x 3/2"] == variants["Task-MoE x 3/2"] == both
    assert both == base.model.ff * 3 / 2 * 2 * base.model.width  # plain
    command = Reproduction("ablation", ("cheetah-vel",), (backbone,), preset=preset)
    given = given_settings(replace(command, set=("token_hidden=600", "task_hidden=1600")))
    found = variants_of("ablation", with_values(base, given))
    assert found["Token-MoE x 3/2"] == {"moe": "token", "token_hidden": 900}
    assert found["Task-MoE x 3/2"] == {"moe": "task", "task_hidden": 2400}


def test_experiments_share_runs_and_settings_tell_them_apart():
    def planned(name, *given, **more):
        command = Reproduction(name, ("point-robot",), ("ad",), set=given, preset="cpu", **more)
        return {(run.cell.variant, run.seed): run.job.name for run in plan(command)[0]}

    one, two = planned("table1"), planned("task-experts")
    assert one["T2MIR", 1] == two["2/8", 1] == "point-robot-ad-cpu-s1"
    assert len({*one.values(), *two.values()}) == 3 * (2 + 3 - 1)
    given = planned("table1", "lr=0.5", "noise=0.1", "threads=2")
    assert given["plain", 0] == "point-robot-ad-moe=none-lr=0.5-noise=0.1-cpu-s0"
    base = preset_config("cpu", "point-robot", "ad")
    for name in (run_name(with_values(base, {"init": "../c d" * n})) for n in (1, 50)):
        assert len(name) < 120 and "/" not in name and " " not in name
