"""Files of a run that are damaged, foreign or not whole: one line each, and nothing is lost.

Run: pytest tests/test_damaged_runs.py
"""

import errno
import re
import resource
import shutil

import pytest
import torch
from commands import contents, rewrite, run, start
from safetensors.torch import save_file
from test_checkpoint import refused
from tiny import command, differing

from support import checkpoint, files

FILE = checkpoint.FILE


@pytest.fixture
def copy(few, tmp_path):
    return shutil.copytree(few, tmp_path / "copy")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(folder, **settings):
    """Edit settings in config.json, each in its group; those of no group at the top."""

    def edited(content):
        for name, value in settings.items():
            groups = [g for g in content["settings"].values() if isinstance(g, dict) and name in g]
            (groups[0] if groups else content)[name] = value

    rewrite(folder / "config.json", edited)


def edit(folder, edited):
    """config.json after `edited(its settings)`."""
    rewrite(folder / "config.json", lambda content: edited(content["settings"]))


DAMAGE = {
    "empty": (lambda f: (f / FILE).write_bytes(b""), FILE),
    "truncated": (lambda f: cut(f / FILE), FILE),
    "garbage": (lambda f: (f / FILE).write_bytes(bytes(range(256)) * 40), FILE),
    "missing": (lambda f: (f / FILE).unlink(), FILE),
    "a folder": (lambda f: ((f / FILE).unlink(), (f / FILE).mkdir()), FILE),
    "foreign": (lambda f: save_file({"w": torch.zeros(2)}, f / FILE), FILE),
    "of another version": (
        lambda f: files.save_tensors(f / FILE, {"model.w": torch.zeros(2)}, {"t2mir": "1"}),
        FILE,
    ),
    "of another model": (
        lambda f: files.save_tensors(
            f / FILE, {"model.w": torch.zeros(2)}, {"t2mir": checkpoint.FORMAT}
        ),
        FILE,
    ),
    "config list": (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    "config foreign": (lambda f: (f / "config.json").write_text('{"format": "99"}'), "config.json"),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config typed": (lambda f: change(f, width="wide"), "config.json: --width"),
    "config number as text": (lambda f: change(f, width="16"), "config.json: --width"),
    "config number as bool": (lambda f: change(f, layers=True), "config.json: --layers"),
    "config bool as number": (lambda f: change(f, token_shift=1), "config.json: --token-shift"),
    "config part of a number": (lambda f: change(f, heads=2.5), "config.json: --heads"),
    "config null": (lambda f: change(f, dropout=None), "config.json: --dropout"),
    "config not finite": (lambda f: change(f, lr=float("nan")), "config.json: --lr"),
    "config infinite": (lambda f: change(f, weight_decay=float("inf")), "--weight-decay"),
    "config negative": (lambda f: change(f, episodes=-1), "config.json: --episodes"),
    "config huge": (lambda f: change(f, width=10**9), "config.json: --width"),
    "config many": (lambda f: change(f, layers=10**6), "config.json: --layers"),
    "config no choice": (lambda f: change(f, routing="mine"), "config.json: --routing"),
    "config impossible": (lambda f: change(f, heads=3), "heads"),
    "config seed": (lambda f: edit(f, lambda s: s.update(seed=-1)), "json: --seed"),
    "config preset": (lambda f: edit(f, lambda s: s.update(preset="tpu")), "json: --preset"),
    "config unknown": (lambda f: edit(f, lambda s: s["model"].update(wide=1)), "model settings"),
    "config lacks one": (lambda f: edit(f, lambda s: s["model"].pop("width")), "model settings"),
    "config lacks a group": (lambda f: edit(f, lambda s: s.pop("training")), "(training)"),
    "config unknown group": (lambda f: edit(f, lambda s: s.update(more={})), "(more)"),
    "config group typed": (lambda f: edit(f, lambda s: s.update(play=[1])), "play settings"),
    "config data typed": (lambda f: edit(f, lambda s: s.update(data=[1])), "data settings"),
    "config env": (lambda f: change(f, env="nope"), "config.json: unknown env"),
    "config env typed": (lambda f: change(f, env=["darkroom"]), "names no env"),
    "config backbone": (lambda f: edit(f, lambda s: s.update(backbone="gpt")), "json: unknown"),
    "config backbone typed": (lambda f: edit(f, lambda s: s.update(backbone=3)), "backbone"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_named_in_one_line(copy, how, monkeypatch, capsys):
    damage, named = DAMAGE[how]
    damage(copy)
    before = contents(copy.parent)
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        checkpoint.load_method(copy, torch.device("cpu"))
    assert "\n" not in str(error.value)
    assert named in run("evaluate.py", [str(copy), "--episodes", "1"], monkeypatch, capsys).error
    assert contents(copy.parent) == before


@pytest.mark.parametrize("setting", ["env", "backbone"])
def test_config_json_never_chooses_code_to_run(fit, copy, tmp_path, setting, monkeypatch, capsys):
    """A Python file that it names is run when the user names one, and else not."""
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    if setting == "env":
        change(copy, env=str(trap))
    else:
        edit(copy, lambda settings: settings.update(backbone=str(trap)))
    named = f"name it yourself (--{setting} {trap})"
    assert named in run("evaluate.py", [str(copy)], monkeypatch, capsys).error
    with pytest.raises(ValueError, match="name it yourself"):
        checkpoint.load_method(copy, torch.device("cpu"))
    with pytest.raises(SystemExit, match=rf"is of --{setting} \S*trap.py, not of d"):
        fit(copy, resume=True)  # with another family or method than the file names
    fit(tmp_path / "run", init=copy)  # takes the weights, and nothing of config.json
    assert not (tmp_path / "sprung").exists()


def test_tasks_of_a_run_are_checked(copy):
    outside = {"train": [[0, 0]], "test": [[10, 0]]}
    for split in (None, {}, {"train": [[0, 0]], "test": []}, {"train": 3, "test": 4}, outside):
        change(copy, task_split=split)
        with pytest.raises(ValueError, match=r"config\.json: .*(train|test|content|goal)") as error:
            checkpoint.read_tasks(copy, "darkroom")
        assert "\n" not in str(error.value)


def test_references_of_a_run_are_those_of_its_split(copy):
    """Of datasets that know none: none. Others have a finite return a task."""
    split = checkpoint.read_run(copy)["task_split"]
    known = {"random": [0.5] * len(split["test"]), "teacher": [80.0] * len(split["test"])}
    assert checkpoint.read_tasks(copy, "darkroom").reference is None  # DarkRoom's optimum is known
    few, none = {"test": {"random": [0.5]}}, {"test": {"random": [float("nan")] * 4}}
    for reference in (
        [],
        [1],
        {"train": known | {"random": [0]}},
        few,
        none,
        {"test": 3},
        {"a": {}},
    ):
        change(copy, task_split=split | {"reference": reference})
        with pytest.raises(ValueError, match=r"config\.json: .*reference") as error:
            checkpoint.read_tasks(copy, "darkroom")
        assert "\n" not in str(error.value)
    change(copy, task_split=split | {"reference": {"test": known, "train": {}}})
    assert checkpoint.read_tasks(copy, "darkroom").reference == {"test": known, "train": {}}


def test_a_failed_write_leaves_the_checkpoint_before_it(fit, few, tmp_path, monkeypatch):
    """The disk is full at the end of the run: the checkpoint of step 2 is whole and continues."""
    written, whole = [], files.write_atomically

    def until_full(path, write):
        def part(temporary):
            write(temporary)
            written.extend([path] * (path.name == FILE))
            if len(written) == 2:
                cut(temporary)
                raise OSError(errno.ENOSPC, "No space left on device")

        whole(path, part)

    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match=r"no room on the disk for \S*/checkpoint"),
    ):
        patch.setattr(files, "write_atomically", until_full)  # as save_tensors finds it
        fit(tmp_path / "run")
    assert written == [tmp_path / "run" / FILE] * 2
    assert checkpoint.read(tmp_path / "run")[1].step == 2
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock",
        FILE,
        "config.json",
        "train.csv",
    ]
    assert differing(fit(tmp_path / "run", resume=True), few) == []


def test_a_full_disk_is_one_line_and_the_run_continues(fit, few, tiny_config, tmp_path):
    """The system refuses the checkpoint in the middle of its write."""
    room = (few / FILE).stat().st_size // 2

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    process = start(command(tiny_config, tmp_path / "run"), preexec_fn=limited)
    _, err = process.communicate(timeout=300)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and "Traceback" not in err
    assert len(errors) == 1 and "no room on the disk for" in errors[0] and "--resume" in errors[0]
    assert not (tmp_path / "run" / FILE).exists() and not list(tmp_path.rglob("*.tmp"))
    assert differing(fit(tmp_path / "run", resume=True), few) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "binary", "deep"])
def test_a_damaged_config_json_is_read_from_the_checkpoint(fit, few, copy, damage):
    path = copy / "config.json"
    text = path.read_bytes()
    path.write_bytes(
        {
            "cut": text[:300],
            "flip": text.replace(b'"lr": 0.001', b'"lr": 0.003'),
            "binary": b"\xff\xfe\x00",
            "deep": b"[" * 10**5,
        }[damage]
    )
    assert path.read_bytes() != text
    cfg = checkpoint.load_config(copy)
    assert (cfg.training.lr, cfg.model.width) == (0.001, 16)
    assert checkpoint.read_tasks(copy, "darkroom") == checkpoint.read_tasks(few, "darkroom")
    fit(copy, resume=True)  # which writes it anew
    assert checkpoint.read_run(copy)["settings"]["training"]["lr"] == 0.001
    assert differing(copy, few) == []
    path.write_bytes(text[:300])
    (copy / FILE).unlink()
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        checkpoint.load_config(copy)


HEADERS = {
    "step": (lambda about: about.update(step="-5"), "step '-5'"),
    "more steps": (lambda about: about.update(step="1000000000"), "step 1000000000 of 3"),
    "seconds": (lambda about: about.update(seconds="nan"), "seconds 'nan'"),
    "sums": (lambda about: about.update(sums="[1]"), "sums"),
    "moments": (lambda about: about.update(moments='{"adamw": 3}'), "has moments of"),
    "no step": (lambda about: about.pop("step"), "step is missing"),
}
TENSORS = {
    "a moment": (lambda t: t.pop("optimizer.adamw.3.exp_avg"), "exp_avg is missing"),
    "all of one": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("optimizer.adamw.3.")],
        "has moments of",
    ),
    "a stream": (lambda t: t.pop("random.batches"), "random.batches"),
    "a mean": (lambda t: t.update({"states.mean": torch.zeros(3)}), "states.mean"),
    "NaN": (lambda t: t["model.head.bias"].fill_(float("nan")), "head.bias holds numbers that are"),
}


@pytest.mark.parametrize("how", [*HEADERS, *TENSORS])
def test_a_checkpoint_that_somebody_has_changed_is_refused(fit, copy, how):
    """Its checksum fits: what it says cannot be."""
    loaded, about = files.load_tensors(copy / FILE)
    change_it, named = (HEADERS | TENSORS)[how]
    change_it(about if how in HEADERS else loaded)
    files.save_tensors(copy / FILE, loaded, about)
    refused(fit, copy, re.escape(named), resume=True)
