"""README's "To fork": a method, a rule for h_bar, a term of the loss, a setting, a task family.

Each is done as a user does it, with one file or one line, and used through the scripts.
Run: pytest tests/test_forks.py
"""

import ast
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, at_home, flags, readme_files, run
from tiny import command, differing, rows, untimed

from ad import ADPlay
from config import Collection, Data, Play, Teachers, Work
from data import load_dataset
from dpt import DPTPlay, DPTSettings
from envs import get_family, make_batch, optimal_returns, random_returns, split_tasks
from methods import get_method
from models import ModelSettings
from support import checkpoint
from support.settings import flat

FORKS = ROOT / "tests" / "forks"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ----------------------------------------------------------------------------------------- a method
BC = str(FORKS / "bc.py")
MINE = {"smoothing": 0.5, "history": 2, "prompt_length": 200, "steps": 6}


def test_a_method_is_one_short_file():
    lines = (FORKS / "bc.py").read_text().splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    others = [p for p in ROOT.rglob("*.py") if not {"tests", ".venv"} & set(p.parts)]
    assert not [p for p in others if re.search(r"forks|smoothing", p.read_text())]


def test_a_method_of_ones_own(tiny_config, paper_folder, here, monkeypatch, capsys):
    """It trains, stops, resumes, evaluates and draws; its terms and settings have their names."""

    def ended(script, *argv):
        return run(script, [*argv], monkeypatch, capsys)

    # its settings are flags like any other
    shown = ended("train.py", "--env", "darkroom", "--backbone", BC, "--help").out
    assert {"--smoothing", "--history", "--width", "--lr"} <= set(re.findall(r"--[a-z-]+", shown))
    assert "Weight of a penalty on large outputs." in " ".join(shown.replace("│", "").split())

    # an uninterrupted run: trained, evaluated, drawn
    whole = ended("train.py", *command(tiny_config, "whole", BC, **MINE))
    assert whole.code == 0, whole.err
    assert "smoothing: 0.0 -> 0.5" in whole.out and "history: 1 -> 2" in whole.out
    table = rows("whole")
    own = ["imitation", "size", "balance", "contrastive", "largest"]
    assert set(own) <= set(table[0])
    for row in table:
        terms = [float(row[name]) for name in own[:-1]]
        assert float(row["loss"]) == pytest.approx(sum(terms), rel=1e-4)
        assert float(row["size"]) > 0 and float(row["largest"]) > 0
    assert list(here.glob("whole/*sample.png")) and list(here.glob("whole/*sample.csv"))
    with open(here / "summary.csv", newline="") as file:
        assert next(csv.DictReader(file))["backbone"] == BC

    # stopped half way and continued
    kind = get_method(BC)
    sample, drawn = kind.sample, []

    def stop_in_the_third(*arguments):
        drawn.append(1)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*arguments)

    argv = command(tiny_config, "run", BC, **MINE)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "sample", stop_in_the_third)
        stopped = ended("train.py", *argv)
    assert stopped.code == 128 + signal.SIGTERM and "stopped at step 3 of 6" in stopped.out
    assert ended("train.py", *argv, "--resume").code == 0
    assert differing("run", "whole") == [] and untimed("run") == untimed("whole")
    other = ended("train.py", *argv, "--resume", "--smoothing", "0.1")
    assert "smoothing 0.5 -> 0.1" in other.error
    wrong = ended("train.py", *command(tiny_config, "wrong", BC, **MINE), "--noise", "0.1")
    assert "--noise is for continuous actions" in wrong.error and not (here / "wrong").exists()

    # what a run's folder says never chooses the code that runs
    assert f"name it yourself (--backbone {BC})" in ended("evaluate.py", "run").error
    darkroom = command(tiny_config, "run", "dpt", resume=True)
    assert "bc.py, not of dpt" in ended("train.py", *darkroom).error
    played = ended("evaluate.py", "run", "--backbone", BC, "--history", "1", "--results", "r")
    assert played.code == 0 and list(here.glob("r/*.png")), played.err
    # a file that has moved is still that file
    shutil.copy(BC, here / "bc.py")
    assert ended("evaluate.py", "run", "--backbone", "bc.py", "--results", "r").code == 0


# ------------------------------------------------ a rule for h_bar, a term of the loss, a setting
@dataclass
class Edit:
    """Lines that a fork puts behind (or before) a place in a file."""

    file: str
    place: str
    lines: str
    before: bool = False

    def apply(self, root: Path) -> None:
        text = (root / self.file).read_text()
        assert text.count(self.place) == 1, f"{self.file} has not one '{self.place}'"
        both = self.lines + self.place if self.before else self.place + self.lines
        (root / self.file).write_text(text.replace(self.place, both))


RULE = '''
@h_bar_rule
def halfway(h, view, past):
    """Half of the token itself, half of the mean up to it."""
    return (h + running_mean(h, view, past)) / 2


'''
SETTING = '''
    tameness: NotNegative = 0.0
    """How much large outputs are disliked."""
'''
FLAT = """
                losses["flat"] = 0.01 * h_bar.float().square().mean()"""
TAME = '"tame": self.cfg.method.tameness * output.action.float().square().mean(), '
EDITS = (
    # a rule: one function
    Edit("moe.py", "TaskRouting = Literal[", RULE, before=True),
    # a term of the loss: one line where it is computed, be it in the layer or in the method
    Edit("moe.py", 'self.w_contrastive * metrics["info_nce"]', FLAT),
    Edit("dpt.py", 'return {"imitation": imitation, ', TAME),
    # a setting: its declaration (and its type's import); its use is the line above
    Edit("dpt.py", '"""With the query last: share of queries that see no prompt."""', SETTING),
    Edit("dpt.py", "from config import Config, ", "NotNegative, "),
)


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the project with the lines above."""
    root = tmp_path_factory.mktemp("fork")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    for folder in ("families", "teachers", "support", "baselines"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in EDITS:
        edit.apply(root)
    return root


def python(root, *argv):
    """A script of the fork as a process of its own."""
    line = [sys.executable, *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        line, cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_rule_a_term_and_a_setting(fork, tiny_config, paper_folder):
    mine = {"routing": "halfway", "tameness": 0.25}
    argv = [*command(tiny_config, "runs/mine", steps=2), *flags(mine)]
    done = python(fork, "train.py", *argv)
    assert done.returncode == 0, done.stderr
    assert "tameness: 0.0 -> 0.25" in done.stdout and "-> halfway" in done.stdout
    terms = ["imitation", "tame", "balance", "contrastive", "flat"]
    for row in rows(fork / "runs" / "mine"):
        values = [float(row[name]) for name in terms]
        assert min(values) > 0 and float(row["loss"]) == pytest.approx(sum(values), rel=1e-4)
    # trained with a whole pass, played token by token, and drawn
    assert list(fork.glob("runs/mine/*.png"))

    kept = json.loads((fork / "runs" / "mine" / "config.json").read_text())["settings"]
    assert kept["method"]["tameness"] == 0.25 and kept["model"]["routing"] == "halfway"
    again = python(fork, "train.py", *argv, "--resume", "--tameness", "0.5")
    assert again.returncode == 1 and "tameness 0.25 -> 0.5" in again.stderr
    wrong = python(fork, "train.py", *argv, "--tameness=-1", "--run", "runs/other")
    assert "error: --tameness -1" in wrong.stderr and wrong.stderr.count("\n") == 1
    shown = python(fork, "train.py", "--help").stdout
    assert "--tameness" in shown and "How much large outputs are disliked." in shown
    assert "sequence,prefix,token,halfway" in re.sub(r"[\s│]", "", shown).replace("|", ",")


def declarations() -> dict[str, set[str]]:
    """{setting: how its type is written}, over all dataclasses that make flags."""
    files = ("config.py", "models.py", "ad.py", "dpt.py", "evaluate.py", "support/command_line.py")
    parsers = ("Chosen", "Files")  # a first look at flags that are declared elsewhere
    found: dict[str, set[str]] = {}
    for file in files:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if not isinstance(node, ast.ClassDef) or node.name in parsers:
                continue
            if not any("frozen=True" in ast.unparse(d) for d in node.decorator_list):
                continue
            for field in node.body:
                if not isinstance(field, ast.AnnAssign):
                    continue
                if "default_factory" not in ast.unparse(field.value or ast.Constant(0)):
                    kind = ast.unparse(field.annotation).removesuffix(" | None")
                    found.setdefault(field.target.id, set()).add(kind)
    return found


def test_a_setting_means_the_same_in_every_script():
    """One type for a name, whichever of train.py, collect.py and evaluate.py has the flag."""
    found = declarations()
    assert len(found) > 70 and {"lr", "width", "queries", "history", "repeats"} <= set(found)
    assert {name: kinds for name, kinds in found.items() if len(kinds) > 1} == {}


def test_a_setting_stands_in_its_declaration_and_its_uses_alone():
    """The machinery handles all settings alike: it names none of a method or a network."""
    names = set(vars(ModelSettings())) | set(vars(DPTSettings()))
    names |= (set(vars(ADPlay())) | set(vars(DPTPlay()))) - set(vars(Play()))
    allowed = {
        "train.py": set(),
        "evaluate.py": {"moe", "routing"},  # columns of summary.csv
        "support/command_line.py": {"moe"},  # in the name of a run's folder
    }
    for file in ("settings", "checkpoint", "journal", "files", "distributed", "jobs"):
        allowed[f"support/{file}.py"] = set()
    for file, may in allowed.items():
        named = set()
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named.add(node.value)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(
                ("cfg.model", "cfg.method", "cfg.play")
            ):
                named.add(node.attr)
        assert named & names <= may, file


# ------------------------------------------------------------------------------------ a task family
def family(name: str, folder: Path) -> str:
    """A family's file in `folder`: README's, or one of tests/forks."""
    if name in readme_files():
        (folder / name).write_text(readme_files()[name])
    else:
        shutil.copy(FORKS / name, folder)
    return name


TEACHERS = {
    "cart.py": Teachers(
        teacher_steps=60,
        teacher_save_every=30,
        teacher_warmup=30,
        teacher_hidden=8,
        teacher_batch=8,
    ),
    "chain.py": Teachers(
        teacher_steps=300, teacher_save_every=150, teacher_batch=50, teacher_lr=1e-2
    ),
}


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("backbone", ["ad", "dpt"])
def test_a_family_of_ones_own(here, name, backbone, monkeypatch, capsys):
    """Collected, trained on, played and drawn; named only by its file."""

    def ended(script, *argv):
        with at_home():
            done = run(script, [*argv], monkeypatch, capsys)
        assert done.code == 0, done.err
        return done

    env, work = family(name, here), Work(workers=1)
    data = Data(env, data_episodes=8, data_queries=20, train_tasks=3, test_tasks=2)
    cfg = Collection(data, TEACHERS[name], work)
    collected = ended("collect.py", *flags(flat(cfg))).out
    (folder,) = here.glob(f"datasets/{Path(name).stem}-*")
    assert f"{folder.name}: 3 tasks x 8 episodes" in collected
    stored = load_dataset(folder, env)
    horizon = stored.family.horizon
    assert stored.states.shape[:3] == (3, 8, horizon)

    made = (folder / "meta.json").stat().st_mtime_ns
    argv = command(cfg, "run", backbone, prompt_length=2 * horizon, episodes=2, eval_every=2)
    ended("train.py", *argv)
    assert (folder / "meta.json").stat().st_mtime_ns == made  # found, not collected anew
    last = rows("run")[-1]
    assert np.isfinite([float(last[k]) for k in ("loss", "imitation", "grad_norm")]).all()
    assert rows("run")[1]["return_test"] != ""

    refused = run("evaluate.py", ["run"], monkeypatch, capsys)
    assert f"name it yourself (--env {env})" in refused.error
    ended("evaluate.py", "run", "--env", env, "--split", "train", "--results", "results")
    with open(here / "results" / "summary.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    tasks = checkpoint.read_tasks("run", env).train
    assert (row["env"], row["paper_return"], row["success"]) == (env, "", "")
    assert np.isfinite([float(row["teacher_return"]), float(row["random_return"])]).all()
    if name == "chain.py":
        best = 15 - np.mean([abs(cell - 4) for (cell,) in tasks])
        assert row["optimum"] == f"{best:.2f}" and stored.family.discrete_actions
        assert 0 <= random_returns(env, tasks).mean() < best / 2
        assert set(stored.actions.unique().tolist()) == {0, 1, 2}
    assert list(here.glob("results/*-train-*.png"))


def test_the_example_of_a_discrete_family_plays_by_its_rules(here):
    """tests/forks/chain.py, by hand."""
    env = str(FORKS / "chain.py")
    train, test = split_tasks(env)
    assert (len(train), len(test)) == (6, 3)
    assert sorted(train + test) == [[cell] for cell in range(9)]
    with pytest.raises(ValueError, match="9 corridors"):
        split_tasks(env, train=8, test=2)
    batch = make_batch(env, [[4], [6], [0]])
    assert batch.reset().tolist() == [[4]] * 3 and get_family(env).teacher == "ppo"
    total = np.zeros(3)
    for t in range(15):
        toward = [2, 1 if t < 2 else 2, 0 if t < 4 else 2]
        states, rewards = batch.step(np.array(toward))
        total += rewards
    assert states.tolist() == [[4], [6], [0]]
    assert total.tolist() == optimal_returns(env, [[4], [6], [0]]).tolist() == [15, 13, 11]
