"""The command line: README.md's commands on a tiny budget, help, wrong input.

Run: pytest tests/test_cli.py
"""

import csv
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from commands import ROOT, at_home, changed, contents, flags, readme_files, run
from tiny import SMALL, command, trainer

from dpt import DPTPlay
from envs import FAMILIES, get_family
from evaluate import Evaluation
from reproduce import Reproduction
from support.command_line import (
    CollectCommand,
    parse_collection,
    parse_config,
    preset_config,
)
from support.settings import flat

# fmt: off
BUDGET = (
    "layers", "heads", "width", "ff", "token_hidden", "task_hidden", "token_experts",
    "task_experts", "steps", "batch", "episodes", "eval_every", "checkpoint_every", "device",
    "threads",
)
# fmt: on


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


# ------------------------------------------------------------------------------------------- README
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


def budget(script, argv, tiny_config) -> list[str]:
    """Flags that make a command of README.md small: they stand behind its own and win."""
    env = argv[argv.index("--env") + 1] if "--env" in argv else "darkroom"
    if script == "evaluate.py":
        return ["--episodes", "1"]
    if script == "tools/bench.py":
        return ["--only", "env-point-robot-batched", "--threads", "1"]
    if script == "figures.py":
        return ["--tasks", "4", "--plays", "1", "--prompts", "4"]
    if script not in ("train.py", "collect.py", "reproduce.py"):
        return []
    cfg, family = changed(tiny_config, datasets="datasets"), get_family(env)
    if env != "darkroom":
        small = {"teacher_steps": 2 * family.horizon, "teacher_save_every": family.horizon}
        small |= {"teacher_batch": 8}
        if family.teacher == "sac":
            small |= {"teacher_warmup": family.horizon, "teacher_hidden": 8}
        cfg = changed(cfg, env=env, tasks=None, train_tasks=2, test_tasks=1, **small)
    data = {k: v for k, v in flat(cfg).items() if k not in ("env", "quality", "recipe")}
    if script == "collect.py":
        return flags(data | {"data_episodes": 5, "data_queries": 5})
    small = data | {name: SMALL[name] for name in BUDGET} | {"prompt_length": family.horizon}
    if script == "reproduce.py":  # one run, whose settings stand behind --set
        given = [f"{name}={value}" for name, value in small.items() if value is not None]
        one = ["--seeds", "0", "--backbones", "dpt", "--variants", "T2MIR", "--trial", "1"]
        return [*one, "--repeats", "1", "--set", *given]
    return flags(small)


def test_the_commands_of_the_readme_run(tiny_config, here, monkeypatch, capsys):
    """In their order, in one folder: what is evaluated is what was trained. Budgets are smaller."""
    commands = readme_commands()
    scripts = [words[0] for words in commands]
    assert {"train.py", "evaluate.py", "collect.py", "tools/bench.py"} <= set(scripts)
    for name, text in readme_files().items():
        (here / name).write_text(text)
    monkeypatch.syspath_prepend(str(here))
    for script, *argv in commands:
        if "minari" in script + " ".join(argv) and find_spec("minari") is None:
            continue
        with at_home():
            ended = run(script, argv + budget(script, argv, tiny_config), monkeypatch, capsys)
        assert ended.code == 0, f"python {shlex.join([script, *argv])}\n{ended.err}"
    with open(here / "runs" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == scripts.count("train.py") + scripts.count("evaluate.py")
    for row in rows:
        assert row["command"].startswith("python ") and row["steps"] == str(SMALL["steps"])
    assert len(list(here.glob("runs/*/checkpoint.safetensors"))) == scripts.count("train.py")
    assert list(here.glob("datasets/*/meta.json")) and list(here.glob("results/bench.json"))
    assert len(list(here.glob("runs/figures/*.html"))) == scripts.count("figures.py") == 1
    assert len(list(here.glob("results/paper/*/table.md"))) == scripts.count("reproduce.py") == 1


def test_pictures_and_pages_of_the_readme_are_there():
    """Every file that a link or a table of README.md names."""
    text = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    tabled = re.findall(r"`((?:\w+/)*\w+\.py)[:`]", text)
    elsewhere = {"cart.py"}  # the user's own
    places = [ROOT, ROOT / "tests", ROOT / "teachers", ROOT / "families"]
    assert len(linked) > 5 and len(tabled) > 20
    for name in {*linked, *tabled} - elsewhere:
        assert any((place / name).exists() for place in places), name


def declared(group) -> list[str]:
    """Names of all settings under a dataclass; what a method brings along is given as an object."""
    return list(flat(group))


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("train.py", declared(preset_config("paper", "darkroom", "dpt"))),
        ("collect.py", declared(CollectCommand())),
        ("reproduce.py", [n for n in declared(Reproduction("")) if n != "experiment"]),
        ("evaluate.py", [n for n in declared(Evaluation("", play=DPTPlay())) if n != "folder"]),
    ],
)
def test_help_lists_every_flag(script, names, trained, monkeypatch, capsys):
    folder = [str(trained)] if script == "evaluate.py" else []
    ended = run(script, [*folder, "--help"], monkeypatch, capsys)
    assert ended.code == 0 and len(names) > 8
    listed = set(re.findall(r"--[a-z0-9-]+", ended.out))
    assert {f"--{name.replace('_', '-')}" for name in names} <= listed


def test_help_of_an_evaluation_needs_no_run(here, monkeypatch, capsys):
    ended = run("evaluate.py", ["--help"], monkeypatch, capsys)
    assert ended.code == 0 and {"--repeats", "--episodes"} <= set(ended.out.split())


def test_a_file_has_one_path_however_it_is_typed(here):
    """Datasets, runs and teachers are named by it."""
    (name, text), *_ = readme_files().items()
    (here / name).write_text(text)
    for word in (name, f"./{name}", str(here / name)):
        assert parse_config(["--env", word]).data.env == name
        assert parse_collection([f"--env={word}"])[0].data.env == name


# -------------------------------------------------------------------------------------- wrong input
WRONG = {
    "--env nope": "nope",
    "--backbone gpt": "gpt",
    "--backbone nowhere.py": "there is no such file",
    "--preset tpu": "tpu",
    "--device cuda": "cuda",
    "--device toaster": "toaster",
    "--device meta": "--device meta",
    "--tasks missing.json": "missing.json",
    "--top-k 9 --token-experts 6 --token-hidden 24": "--top-k 9",
    "--top-k 0": "--top-k 0",
    "--prompt-length 150": "--prompt-length 150",
    "--prompt-length 0": "--prompt-length 0",
    "--prompt-length 400 --data-episodes 3": "--data-episodes 3",
    "--width 18 --heads 4": "--width 18",
    "--width 1000000000": "--width 1000000000",
    "--layers 1000000": "--layers 1000000",
    "--heads 0": "--heads",
    "--token-hidden 25": "--token-hidden 25",
    "--dropout 1.5": "--dropout 1.5",
    "--batch 3": "--batch 3",
    "--batch 0": "--batch",
    "--steps 0": "--steps",
    "--lr 0": "--lr",
    "--lr inf": "--lr inf",
    "--lr nan": "--lr nan",
    "--clip nan": "--clip nan",
    "--weight-decay=-1": "--weight-decay -1",
    "--beta2 1": "--beta2 1",
    "--seed=-1": "--seed -1",
    "--data-seed=-1": "--data-seed -1",
    "--play-seed=-1": "--play-seed -1",
    "--seed 9223372036854775808": "--seed 9223372036854775808",
    "--eval-every=-5": "--eval-every -5",
    "--eval-episodes 0": "--eval-episodes 0",
    "--checkpoint-every 0": "--checkpoint-every 0",
    "--log-every 0": "--log-every 0",
    "--momentum 2": "--momentum",
    "--warmup=-1": "--warmup",
    "--w-contrastive=-0.1": "--w-contrastive",
    "--w-load=-1": "--w-load",
    "--noise nan": "--noise nan",
    "--noise 0.1": "--noise is for continuous",
    "--components 3": "--components is for continuous",
    "--components 1001": "--components 1001",
    "--spread 0.5": "--spread are for a head",
    "--component-every episode": "--component-every and",
    "--spread nan": "--spread nan",
    "--query-position first --queries 8 --short 0 --empty 0": "--queries",
    "--short 0.8 --empty 0.3": "--short",
    "--episodes 0": "--episodes",
    "--data-queries 0": "--data-queries",
    "--teacher-steps 100": "darkroom's teacher is a rule",
    "--data nowhere": "no dataset in nowhere",
    "--env point-robot --teacher-save-every 30": "--teacher-save-every 30",
    "--env cheetah-vel": "--prompt-length 100",
    "--workers=-1": "--workers",
    "--threads=-1": "--threads -1",
    "--run=": "--run",
    "--data=": "--data",
    "--init=": "--init",
    "--cluster=": "--cluster",
    "--cluster local": "darkroom's teacher is a rule, which needs no --cluster",
    "--threads 100000": "--threads 100000",
    "--queries 99999999999999": "--queries 99999999999999",
    "--batch 10000000": "of memory",
    "--layers 1000 --width 100000 --heads 4": "of memory",
    "--steps 123456789012345678901234": "--steps 123456789012345678901234",
    "--env point-robot --prompt-length 20 --teacher-warmup 1000 --teacher-steps 40": "--teacher-",
    "--datasets=": "--datasets",
    "--tasks=": "--tasks",
    "--device=": "--device",
    "--env=": "unknown environment ''",
    "--backbone=": "unknown backbone ''",
}


def refused(script, argv, named, here, monkeypatch, capsys):
    """One line names the problem, and nothing is written."""
    assert named in run(script, argv, monkeypatch, capsys).error
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("wrong", WRONG)
def test_train_refuses_what_cannot_be(tiny_config, here, wrong, monkeypatch, capsys):
    argv = command(tiny_config, "run", datasets="datasets", data_episodes=10) + wrong.split()
    refused("train.py", argv, WRONG[wrong], here, monkeypatch, capsys)


@pytest.mark.parametrize("words", ["--lr fast", "--steps 1.5", "--seed one", "--routing mine"])
def test_words_that_are_no_number_or_no_choice(tiny_config, here, words, monkeypatch, capsys):
    """tyro names the flag, shows what it takes, and ends with 2."""
    argv = command(tiny_config, "run", datasets="datasets") + words.split()
    ended = run("train.py", argv, monkeypatch, capsys)
    assert ended.code == 2 and words.split()[0] in ended.err and "Traceback" not in ended.err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "name the run first"),
        (["--episodes", "3"], "name the run first"),
        ([""], "name the run first"),
        (["nowhere"], "nowhere"),
        (["DATASET"], "not a t2mir run"),
        (["RUN", "--episodes", "0"], "--episodes"),
        (["RUN", "--repeats", "0"], "--repeats"),
        (["RUN", "--play-seed=-1"], "--play-seed -1"),
        (["RUN", "--results="], "--results"),
        (["RUN", "--env", "point-robot"], "of --env darkroom, not of point-robot"),
        (["RUN", "--backbone", "ad"], "of --backbone dpt, not of ad"),
        (["RUN", "--noise", "0.1"], "--noise is for continuous"),
        (["RUN", "--spread", "0.1"], "--spread are for a head"),
        (["RUN", "--device", "cuda", "--results", "results"], "cuda"),
        (["RUN", "--device", "toaster", "--results", "results"], "toaster"),
        (["RUN", "--device", "meta", "--results", "results"], "--device meta"),
    ],
)
def test_evaluate_refuses_what_cannot_be(
    trained, paper_folder, here, argv, named, monkeypatch, capsys
):
    places = {"RUN": str(trained), "DATASET": str(paper_folder)}
    before = contents(trained)
    argv = [places.get(word, word) for word in argv]
    refused("evaluate.py", argv, named, here, monkeypatch, capsys)
    assert contents(trained) == before


@pytest.mark.parametrize(
    ("script", "line", "named"),
    [
        ("collect.py", "--env nope", "nope"),
        ("collect.py", "--data-episodes 0", "--data-episodes"),
        ("collect.py", "--tasks missing.json", "missing.json"),
        ("collect.py", "--preset tpu", "tpu"),
        ("collect.py", "--teacher-steps 100", "darkroom's teacher is a rule"),
        ("collect.py", "--env point-robot --teacher-save-every 30", "--teacher-save-every 30"),
        ("collect.py", "--env point-robot --teacher-lr inf", "--teacher-lr inf"),
        ("collect.py", "--env push --preset paper --teacher-hidden 64", "--teacher-hidden"),
        ("collect.py", "--env push --teacher-device cuda", "--teacher-device cuda"),
        ("collect.py", "--env missing.py", "missing.py"),
        ("collect.py", "--task-seed=-1", "--task-seed -1"),
        ("collect.py", "--datasets=", "--datasets"),
        ("collect.py", "--cluster=", "--cluster"),
        ("collect.py", "--export-minari=", "--export-minari"),
        ("tools/bench.py", "--only nope", "nope"),
        ("tools/bench.py", "--only env-point-robot --threads=-1", "--threads -1: it should be"),
        ("figures.py", "nowhere", "nowhere is not a t2mir run"),
    ],
)
def test_the_other_scripts_refuse_what_cannot_be(here, script, line, named, monkeypatch, capsys):
    refused(script, line.split(), named, here, monkeypatch, capsys)


@pytest.mark.parametrize(
    "script", ["train.py", "evaluate.py", "collect.py", "reproduce.py", "tools/bench.py"]
)
def test_unknown_flags_are_named(script, trained, here, monkeypatch, capsys):
    folder = [str(trained)] if script == "evaluate.py" else []
    ended = run(script, [*folder, "--learning-speed", "3"], monkeypatch, capsys)
    assert ended.code == 2 and "--learning-speed" in ended.err and "Traceback" not in ended.err
    assert list(here.iterdir()) == []


def test_an_error_as_a_shell_sees_it(tmp_path):
    line = [sys.executable, str(ROOT / "train.py"), "--env", "nope"]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and ended.stdout == "" and list(tmp_path.iterdir()) == []
    known = ", ".join(sorted(FAMILIES))
    message = f"unknown environment 'nope': choose one of {known}, or a .py file"
    assert ended.stderr == f"error: {message}\n"
    asked = os.environ | {"T2MIR_TRACEBACK": "1"}  # for whoever writes a family or method
    ended = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=asked
    )
    assert ended.stderr.startswith("Traceback") and ended.stderr.endswith(f"error: {message}\n")
