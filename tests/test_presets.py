"""The presets: Tables 4 and 5, what flags make of them, and what README.md counts.

Run: pytest tests/test_presets.py
"""

import re

import pytest
import torch
from commands import ROOT, changed

import presets
from config import Collection, Config, Data
from envs import FAMILIES, get_family, split_tasks
from methods import get_method
from support.command_line import differences, parse_collection, parse_config, preset_config
from support.settings import flat, groups_of
from teachers.teachers import PAPER, algorithm


def collection(*argv) -> Collection:
    """What collect.py makes of a command line."""
    return parse_collection([*argv])[0]


def test_auto_is_paper_with_cuda_and_cpu_without(monkeypatch):
    for cuda, want in ((True, "paper"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        for argv in ([], ["--preset", "auto"], ["--preset=auto", "--backbone", "ad"]):
            cfg = parse_config(argv)
            assert cfg.preset == want and cfg == parse_config([*argv, "--preset", want])
    assert parse_config(["--preset", "paper"]) != parse_config(["--preset", "cpu"])


TABLES_4_AND_5 = {  # training steps, learning rate, prompt length, task experts, InfoNCE weight
    ("ad", "darkroom"): (300_000, 3e-4, 400, 12, 0.01),
    ("ad", "point-robot"): (100_000, 3e-4, 80, 8, 0.01),
    ("ad", "cheetah-vel"): (100_000, 3e-4, 800, 8, 0.01),
    ("ad", "walker-param"): (100_000, 3e-4, 800, 8, 0.01),
    ("ad", "reach"): (100_000, 5e-5, 400, 8, 0.01),
    ("ad", "push"): (100_000, 3e-4, 400, 8, 0.01),
    ("dpt", "darkroom"): (300_000, 3e-4, 100, 8, 0.001),
    ("dpt", "point-robot"): (100_000, 3e-4, 20, 8, 0.001),
    ("dpt", "cheetah-vel"): (100_000, 3e-4, 200, 8, 0.01),
    ("dpt", "walker-param"): (100_000, 3e-4, 200, 8, 0.01),
    ("dpt", "reach"): (100_000, 5e-5, 100, 8, 0.01),
    ("dpt", "push"): (100_000, 3e-4, 100, 8, 0.001),
}
OFFICIAL_EPISODES = {"darkroom": 100, "walker-param": 40}  # of an evaluation; 30 elsewhere


@pytest.mark.parametrize(("backbone", "env"), TABLES_4_AND_5)
def test_the_paper_preset_is_tables_4_and_5(backbone, env):
    cfg = parse_config(["--preset", "paper", "--env", env, "--backbone", backbone])
    training, model = cfg.training, cfg.model
    found = (training.steps, training.lr, training.prompt_length)
    assert (*found, model.task_experts, model.w_contrastive) == TABLES_4_AND_5[backbone, env]
    assert (model.token_experts, model.moe_position, model.momentum) == (6, "top", 0.995)
    assert (model.moe, model.routing, cfg.data.quality) == ("both", "sequence", "mixed")
    assert cfg.play.episodes == OFFICIAL_EPISODES.get(env, 30)
    if backbone == "dpt":
        assert cfg.method.query_position == "first"


@pytest.mark.parametrize("backbone", ["ad", "dpt"])
def test_flags_override_presets_and_are_listed_as_departures(backbone):
    base = ["--backbone", backbone, "--preset", "paper"]
    assert differences(parse_config(base)) == []
    free = ["--threads", "3", "--run", "x", "--seed", "4", "--workers", "2", "--datasets", "y"]
    assert differences(parse_config([*base, *free])) == []
    assert differences(parse_config([*base, "--lr", "0.01", "--task-experts", "4"])) == [
        f"task_experts: {8 if backbone == 'dpt' else 12} -> 4",
        "lr: 0.0003 -> 0.01",
    ]
    cpu = parse_config(["--backbone", backbone, "--preset", "cpu", "--lr", "0.01"])
    assert cpu.training.lr == 0.01 and "lr: 0.0003 -> 0.01" in differences(cpu)
    assert any(line.startswith("steps: 300000 -> ") for line in differences(cpu))


def test_readme_counts_the_departures_of_the_cpu_preset():
    """Of DarkRoom with both methods, and the most of any family."""
    cpu = {
        (env, backbone): len(differences(preset_config("cpu", env, backbone)))
        for env in FAMILIES
        for backbone in ("ad", "dpt")
    }
    said = re.search(
        r"in (\d+) settings with AD and (\d+) with DPT on DarkRoom, up to (\d+) elsewhere",
        " ".join((ROOT / "README.md").read_text().split()),  # wherever its lines end
    )
    want = cpu["darkroom", "ad"], cpu["darkroom", "dpt"], max(cpu.values())
    assert tuple(map(int, said.groups())) == want


@pytest.mark.parametrize("env", FAMILIES)
@pytest.mark.parametrize("preset", ["paper", "cpu"])
def test_presets_of_every_family(env, preset):
    """Both methods' are possible; collect.py has the same data but for what is a method's own."""
    alone = collection("--env", env, "--preset", preset)
    data, family = alone.data, get_family(env)
    assert data.env == env
    assert (data.quality, data.recipe, data.datasets) == ("mixed", "paper", "datasets")
    if preset == "paper":
        split = split_tasks(env, data.task_seed, data.tasks, data.train_tasks, data.test_tasks)
        assert tuple(map(len, split)) == (family.train_tasks, family.test_tasks)
        assert (family.teacher == "rule") == (env == "darkroom")
        if env != "darkroom":
            assert algorithm(env, alone.teachers) == PAPER[env]
    own = {"recipe"} if preset == "cpu" else set()
    for backbone in ("ad", "dpt"):
        cfg = parse_config(["--env", env, "--preset", preset, "--backbone", backbone])
        trained = flat(cfg.collection)
        differ = {name for name, value in flat(alone).items() if trained[name] != value}
        assert differ <= (own | {"data_episodes"} if env == "darkroom" else own)
        assert cfg.data.data_episodes >= cfg.training.prompt_length // family.horizon
        assert preset == "cpu" or differences(cfg) == []


@pytest.mark.parametrize("backbone", ["ad", "dpt"])
def test_presets_name_settings_that_there_are(backbone):
    """A mistyped name would be left out in silence."""
    method = get_method(backbone)
    groups = {name: group() for name, group in groups_of(method).items()}
    names = set(flat(Config(backbone=backbone, **groups)))
    for env in FAMILIES:
        for preset in ("paper", "cpu"):
            assert set(presets.values(preset, env, backbone, 100)) <= names
    assert set(presets.PAPER_DATA) | set(presets.CPU_DATA) <= set(FAMILIES)
    assert {env for env, _ in (*presets.PAPER, *presets.CPU)} == set(FAMILIES)


def test_data_of_the_presets():
    """App. D.2's numbers, or what two cores can do; flags win, and `auto` depends on CUDA."""
    paper, cpu = (collection("--env", "point-robot", "--preset", name) for name in ("paper", "cpu"))
    numbers = (paper.data.data_episodes, paper.teachers.teacher_steps, paper.data.train_tasks)
    assert numbers == (100, 0, 0)
    default = flat(Collection(Data(env="point-robot")))
    departs = {k: v for k, v in flat(cpu).items() if default[k] != v}
    assert departs == presets.CPU_DATA["point-robot"]
    steps = cpu.teachers.teacher_steps
    assert steps > 0 and algorithm("point-robot", cpu.teachers).steps == steps
    more = ("--teacher-steps", "400", "--quality", "medium")
    given = collection("--env", "point-robot", "--preset", "cpu", *more)
    assert given == changed(cpu, teacher_steps=400, quality="medium")
    assert collection("--preset", "paper") == Collection()


def test_auto_collects_by_the_machine(monkeypatch):
    for cuda, want in ((True, "paper"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        for argv in (["--env", "reach"], ["--env=reach", "--preset", "auto"]):
            assert collection(*argv) == collection("--env", "reach", "--preset", want)
    assert collection("--env", "reach") != collection("--env", "reach", "--preset", "paper")
