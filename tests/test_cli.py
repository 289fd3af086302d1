"""test_cli.py: the command line: README.md's commands on a tiny budget, presets (Tables 4 and 5), wrong input.

Run: python -m pytest -q tests/test_cli.py
"""

import csv
import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from importlib.util import find_spec

import pytest
import torch
from tiny import ROOT, SETTINGS, at_home, command, dataset, flags, run, trainer

import config
import evaluate
from collect import CollectConfig
from config import Config, differences, parse, parse_collect
from envs import FAMILIES, get_family
from teachers.teachers import PAPER

BUDGET = ("layers", "heads", "width", "ff", "token_hidden", "task_hidden", "token_experts", "task_experts", "steps",
          "batch", "prompt_length", "episodes", "eval_every", "checkpoint_every", "device", "threads")  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder on a machine without CUDA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tiny_config, paper_folder, tmp_path_factory):
    with trainer(tiny_config) as fit:
        return fit(tmp_path_factory.mktemp("trained") / "run", steps=1)


# --------------------------------------------------------------------------------------------- README
def readme_commands() -> list[list[str]]:
    """The `python SCRIPT ...` lines of README.md's bash blocks, each once."""
    found, inside = [], False
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("```"):
            inside = line.strip() == "```bash"
        elif inside and line.startswith("python ") and not line.startswith("python -"):
            words = shlex.split(line, comments=True)[1:]
            found += [words] if words not in found else []
    return found


def readme_files() -> dict[str, str]:
    """The python blocks of README.md that begin with a file's name."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    named = {re.match(r'"""(\w+\.py):', block): block for block in blocks}
    return {found[1]: block for found, block in named.items() if found}


def budget(script, argv, tiny_config) -> list[str]:
    """Flags that make a command of README.md small: they stand behind its own and win."""
    env = argv[argv.index("--env") + 1] if "--env" in argv else "darkroom"
    if script == "evaluate.py":
        return ["--episodes", "1"]
    if script == "tools/bench.py":
        return ["--only", "dispatch-sorted", "--threads", "1"]
    if script not in ("train.py", "collect.py"):
        return []
    data, spec = replace(tiny_config, folder="datasets"), get_family(env)
    if env != "darkroom":
        expert = {
            "teacher_steps": 2 * spec.horizon,
            "teacher_save_every": spec.horizon,
            "teacher_batch": 8,
        }
        if spec.teacher == "sac":
            expert |= {"teacher_warmup": spec.horizon, "teacher_hidden": 8}
        data = replace(data, env=env, tasks=None, train_tasks=2, test_tasks=1, **expert)
    if script == "collect.py":
        names = {
            k: v for k, v in vars(data).items() if k not in ("env", "quality", "recipe", "cluster")
        }
        return flags(names | {"episodes": 5, "queries": 5})
    return flags({k: SETTINGS[k] for k in BUDGET} | dataset(data) | {"prompt_length": spec.horizon})


def test_the_commands_of_the_readme_run(tiny_config, here, monkeypatch, capsys):
    """In their order and in one folder, so that what is evaluated is what was trained; only budgets are smaller."""
    commands = readme_commands()
    assert {"train.py", "evaluate.py", "collect.py", "tools/bench.py"} <= {
        words[0] for words in commands
    }
    for name, text in readme_files().items():
        (here / name).write_text(text)
    monkeypatch.syspath_prepend(str(here))
    for script, *argv in commands:
        if "minari" in script + " ".join(argv) and find_spec("minari") is None:
            continue
        with at_home():
            ended = run(script, argv + budget(script, argv, tiny_config), monkeypatch, capsys)
        assert ended.code == 0, f"python {shlex.join([script, *argv])}\n{ended.err}"
    ran = [words[0] for words in commands]
    with open(here / "runs" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == ran.count("train.py") + ran.count("evaluate.py")
    assert all(
        row["command"].startswith("python ") and row["steps"] == str(SETTINGS["steps"])
        for row in rows
    )
    assert len(list(here.glob("runs/*/checkpoint.safetensors"))) == ran.count("train.py")
    assert list(here.glob("datasets/*/meta.json")) and list(here.glob("results/bench.json"))


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("train.py", [f.name for f in fields(Config)]),
        ("collect.py", [f.name for f in fields(CollectConfig)]),
        (
            "evaluate.py",
            [name for name in inspect.signature(evaluate.main).parameters if name != "folder"],
        ),
    ],
)
def test_help_lists_every_flag(script, names, monkeypatch, capsys):
    ended = run(script, ["--help"], monkeypatch, capsys)
    assert ended.code == 0 and len(names) > 8
    listed = set(re.findall(r"--[a-z0-9-]+", ended.out))
    assert {f"--{name.replace('_', '-')}" for name in names} <= listed


# -------------------------------------------------------------------------------------------- presets
def test_auto_is_paper_with_cuda_and_cpu_without(monkeypatch):
    for cuda, want in ((True, "paper"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        for argv in ([], ["--preset", "auto"], ["--preset=auto", "--backbone", "ad"]):
            cfg = parse(argv)
            assert cfg.preset == want and cfg == parse([*argv, "--preset", want])
    assert parse(["--preset", "paper"]) != parse(["--preset", "cpu"])


@pytest.mark.parametrize(
    ("backbone", "prompt_length", "task_experts", "w_contrastive"),
    [("ad", 400, 12, 0.01), ("dpt", 100, 8, 0.001)],
)
def test_the_paper_preset_is_tables_4_and_5(backbone, prompt_length, task_experts, w_contrastive):
    cfg = parse(["--preset", "paper", "--backbone", backbone])
    assert (cfg.prompt_length, cfg.task_experts, cfg.w_contrastive) == (
        prompt_length,
        task_experts,
        w_contrastive,
    )
    assert (cfg.steps, cfg.lr, cfg.token_experts, cfg.moe_position, cfg.momentum) == (
        300_000,
        3e-4,
        6,
        "top",
        0.995,
    )
    assert (cfg.moe, cfg.routing, cfg.query_position, cfg.quality) == (
        "both",
        "sequence",
        "first",
        "mixed",
    )


@pytest.mark.parametrize("backbone", ["ad", "dpt"])
def test_flags_override_presets_and_are_listed_as_departures(backbone):
    base = ["--backbone", backbone, "--preset", "paper"]
    assert differences(parse(base)) == []
    assert differences(parse([*base, "--threads", "3", "--run", "x", "--seed", "4"])) == []
    assert differences(parse([*base, "--lr", "0.01", "--task-experts", "4"])) == [
        f"task_experts: {8 if backbone == 'dpt' else 12} -> 4",
        "lr: 0.0003 -> 0.01",
    ]
    cpu = parse(["--backbone", backbone, "--preset", "cpu", "--lr", "0.01"])
    assert cpu.lr == 0.01 and "lr: 0.0003 -> 0.01" in differences(cpu)
    assert any(line.startswith("steps: 300000 -> ") for line in differences(cpu))


@pytest.mark.parametrize("env", FAMILIES)
@pytest.mark.parametrize("preset", ["paper", "cpu"])
def test_presets_of_every_family(env, preset):
    """Both backbones' are possible, and collect.py has the same data but for what is a backbone's own."""
    data = parse_collect(["--env", env, "--preset", preset])
    assert data.env == env and (data.quality, data.recipe, data.folder) == (
        "mixed",
        "paper",
        "datasets",
    )
    if preset == "paper":
        train, test = data.split()
        assert (len(train), len(test)) == (get_family(env).train_tasks, get_family(env).test_tasks)
        experts = data.experts()
        assert (experts is None) == (env == "darkroom") and (
            experts is None or experts.algorithm() == PAPER[env]
        )
    own = {"recipe"} if preset == "cpu" else set()
    for backbone in ("ad", "dpt"):
        cfg = parse(["--env", env, "--preset", preset, "--backbone", backbone])
        trained = vars(cfg.collect())
        differ = {name for name, value in vars(data).items() if trained[name] != value}
        assert differ <= (own | {"episodes"} if env == "darkroom" else own)
        assert cfg.data_episodes >= cfg.prompt_length // get_family(env).horizon
        assert preset == "cpu" or differences(cfg) == []


def test_data_of_the_presets():
    """App. D.2's numbers, or what two cores can do; flags win, and `auto` depends on CUDA."""
    paper, cpu = (
        parse_collect(["--env", "point-robot", "--preset", preset]) for preset in ("paper", "cpu")
    )
    assert (paper.episodes, paper.teacher_steps, paper.train_tasks) == (100, 0, 0)
    assert {
        k: v for k, v in vars(cpu).items() if vars(CollectConfig(env="point-robot"))[k] != v
    } == {
        {"data_episodes": "episodes", "data_queries": "queries"}.get(k, k): v
        for k, v in config.CPU_DATA["point-robot"].items()
    }
    assert cpu.teacher_steps > 0 and cpu.experts().algorithm().steps == cpu.teacher_steps
    given = parse_collect(
        ["--env", "point-robot", "--preset", "cpu", "--teacher-steps", "400", "--quality", "medium"]
    )
    assert given == replace(cpu, teacher_steps=400, quality="medium")
    assert parse_collect(["--preset", "paper"]) == CollectConfig()


def test_auto_collects_by_the_machine(monkeypatch):
    for cuda, want in ((True, "paper"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        for argv in (["--env", "reach"], ["--env=reach", "--preset", "auto"]):
            assert parse_collect(argv) == parse_collect(["--env", "reach", "--preset", want])
    assert parse_collect(["--env", "reach"]) != parse_collect(
        ["--env", "reach", "--preset", "paper"]
    )


# ---------------------------------------------------------------------------------------- wrong input
WRONG = {
    "--env nope": "nope",
    "--backbone gpt": "gpt",
    "--preset tpu": "tpu",
    "--device cuda": "cuda",
    "--device toaster": "toaster",
    "--tasks missing.json": "missing.json",
    "--top-k 9 --token-experts 6 --token-hidden 24": "--top-k 9",
    "--top-k 0": "--top-k 0",
    "--prompt-length 150": "--prompt-length 150",
    "--prompt-length 0": "--prompt-length 0",
    "--prompt-length 400 --data-episodes 3": "--data-episodes 3",
    "--width 18 --heads 4": "--width 18",
    "--token-hidden 25": "--token-hidden 25",
    "--dropout 1.5": "--dropout 1.5",
    "--batch 3": "--batch 3",
    "--batch 0": "--batch",
    "--steps 0": "--steps",
    "--lr 0": "--lr",
    "--momentum 2": "--momentum",
    "--warmup=-1": "--warmup",
    "--w-contrastive=-0.1": "negative",
    "--w-load=-1": "negative",
    "--query-position first --queries 8 --short 0 --empty 0": "--queries",
    "--short 0.8 --empty 0.3": "--short",
    "--episodes 0": "--episodes",
    "--data-queries 0": "--queries",
    "--teacher-steps 100": "darkroom's expert is a rule",
    "--data nowhere": "no dataset in nowhere",
    "--env point-robot --teacher-save-every 30": "--teacher-save-every 30",
    "--env cheetah-vel": "--prompt-length 100",
    "--workers=-1": "--workers",
}


def refused(script, argv, named, here, monkeypatch, capsys):
    """One line names the problem, and nothing is written."""
    assert named in run(script, argv, monkeypatch, capsys).error
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("wrong", WRONG)
def test_train_refuses_what_cannot_be(tiny_config, here, wrong, monkeypatch, capsys):
    argv = command(tiny_config, "run", datasets="datasets", **{"data_episodes": 10}) + wrong.split()
    refused("train.py", argv, WRONG[wrong], here, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["nowhere"], "nowhere"),
        (["DATASET"], "not a t2mir run"),
        (["RUN", "--episodes", "0"], "--episodes"),
        (["RUN", "--repeats", "0"], "--repeats"),
        (["RUN", "--device", "cuda", "--results", "results"], "cuda"),
        (["RUN", "--device", "toaster", "--results", "results"], "toaster"),
    ],
)
def test_evaluate_refuses_what_cannot_be(
    trained, paper_folder, here, argv, named, monkeypatch, capsys
):
    places = {"RUN": str(trained), "DATASET": str(paper_folder)}
    before = sorted(trained.iterdir())
    refused(
        "evaluate.py", [places.get(word, word) for word in argv], named, here, monkeypatch, capsys
    )
    assert sorted(trained.iterdir()) == before


@pytest.mark.parametrize(
    ("script", "argv", "named"),
    [
        ("collect.py", ["--env", "nope"], "nope"),
        ("collect.py", ["--episodes", "0"], "--episodes"),
        ("collect.py", ["--tasks", "missing.json"], "missing.json"),
        ("collect.py", ["--preset", "tpu"], "tpu"),
        ("collect.py", ["--teacher-steps", "100"], "darkroom's expert is a rule"),
        (
            "collect.py",
            ["--env", "point-robot", "--teacher-save-every", "30"],
            "--teacher-save-every 30",
        ),
        ("collect.py", ["--env", "reach", "--teacher-hidden", "64"], "--teacher-hidden"),
        ("collect.py", ["--env", "push", "--teacher-device", "cuda"], "cuda"),
        ("collect.py", ["--env", "missing.py"], "missing.py"),
        ("tools/bench.py", ["--only", "nope"], "nope"),
    ],
)
def test_collect_and_bench_refuse_what_cannot_be(here, script, argv, named, monkeypatch, capsys):
    refused(script, argv, named, here, monkeypatch, capsys)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "collect.py", "tools/bench.py"])
def test_unknown_flags_are_named(script, here, monkeypatch, capsys):
    folder = ["runs/one"] if script == "evaluate.py" else []
    ended = run(script, [*folder, "--learning-speed", "3"], monkeypatch, capsys)
    assert ended.code == 2 and "--learning-speed" in ended.err and "Traceback" not in ended.err
    assert list(here.iterdir()) == []


def test_an_error_as_a_shell_sees_it(tmp_path):
    line = [sys.executable, str(ROOT / "train.py"), "--env", "nope"]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and ended.stdout == "" and list(tmp_path.iterdir()) == []
    known = ", ".join(sorted(FAMILIES))
    assert (
        ended.stderr == f"error: unknown environment 'nope': choose one of {known}, or a .py file\n"
    )
