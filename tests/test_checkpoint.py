"""A run can be stopped, killed and continued (Algorithms 1 and 3), and is never overwritten.

Runs are compared by every tensor of their checkpoints: weights, both routers, AdamW's moments,
random streams. Run: pytest tests/test_checkpoint.py
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import time
from dataclasses import fields

import pytest
import torch
from commands import contents, rewrite, run, start
from safetensors.torch import save_file
from tiny import command, differing, rows, tensors, trainer, untimed

import train
from config import Play, Run, Work
from support import checkpoint, files

LONG = {"steps": 40, "checkpoint_every": 5}  # long enough to be caught at work
FILE = checkpoint.FILE


@pytest.fixture
def fit(tiny_config, paper_folder):
    with trainer(tiny_config) as call:
        yield call


@pytest.fixture(scope="module")
def few(tiny_config, paper_folder, tmp_path_factory):
    """A finished run of three steps; tests that change it copy it first."""
    with trainer(tiny_config) as call:
        return call(tmp_path_factory.mktemp("few") / "run")


@pytest.fixture(scope="module")
def whole(tiny_config, paper_folder, tmp_path_factory):
    """whole(backbone): a run of LONG that nothing interrupted."""
    made = {}

    def make(backbone):
        if backbone not in made:
            with trainer(tiny_config) as call:
                made[backbone] = call(tmp_path_factory.mktemp("whole") / "run", backbone, **LONG)
        return made[backbone]

    return make


@pytest.fixture
def copy(few, tmp_path):
    return shutil.copytree(few, tmp_path / "copy")


# --------------------------------------------------------------------------------- stop and resume
def caught(argv, folder, number):
    """A run as a process of its own that is sent a signal once train.csv has seven rows."""
    process = start(argv)
    path, deadline = folder / "train.csv", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") > 7:
            break
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert 7 <= len(rows(folder)) < LONG["steps"], f"it was not caught at work\n{err}"
    return process.returncode, out, err


def test_sigterm_ends_a_run_that_continues_bit_for_bit(fit, whole, tiny_config, tmp_path):
    argv = command(tiny_config, tmp_path / "run", **LONG)
    code, out, err = caught(argv, tmp_path / "run", signal.SIGTERM)
    done = len(rows(tmp_path / "run"))
    assert code == 128 + signal.SIGTERM
    assert f"stopped at step {done} of 40" in out and "--resume" in out
    assert "Traceback" not in err and checkpoint.read(tmp_path / "run")[1].step == done
    fit(tmp_path / "run", resume=True, **LONG)
    assert differing(tmp_path / "run", whole("dpt")) == []
    assert untimed(tmp_path / "run") == untimed(whole("dpt"))


def continues_from_the_last_checkpoint(fit, whole, folder, backbone):
    """Rows that the checkpoint has not seen are written anew; what only watches may change."""
    assert checkpoint.read(folder)[1].step % 5 == 0
    fit(folder, backbone, resume=True, **LONG | {"checkpoint_every": 7, "eval_every": 20})
    assert differing(folder, whole(backbone)) == []
    returns = ("return_test", "return_train")
    assert untimed(folder, *returns) == untimed(whole(backbone), *returns)


def test_a_killed_run_continues_from_its_last_checkpoint(fit, whole, tiny_config, tmp_path):
    argv = command(tiny_config, tmp_path / "run", "ad", **LONG)
    assert caught(argv, tmp_path / "run", signal.SIGKILL)[0] == -signal.SIGKILL
    continues_from_the_last_checkpoint(fit, whole, tmp_path / "run", "ad")


def in_step(patch, number, happens):
    """`happens` while the batch of that step is drawn."""
    seen, draw = [], train.draw

    def counted(*arguments):
        seen.append(1)
        if len(seen) == number:
            happens()
        return draw(*arguments)

    patch.setattr(train, "draw", counted)


def test_a_crashed_run_continues_from_its_last_checkpoint(fit, whole, tmp_path, monkeypatch):
    def crash():
        raise AssertionError

    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        in_step(patch, 9, crash)
        fit(tmp_path / "run", **LONG)
    assert len(rows(tmp_path / "run")) == 8
    continues_from_the_last_checkpoint(fit, whole, tmp_path / "run", "dpt")


def test_ctrl_c_finishes_the_step_in_hand(fit, whole, tmp_path, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        in_step(patch, 8, lambda: os.kill(os.getpid(), signal.SIGINT))
        fit(tmp_path / "run", "ad", **LONG)
    assert end.value.code == 128 + signal.SIGINT
    assert "stopped at step 8 of 40" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    fit(tmp_path / "run", "ad", resume=True, **LONG)
    assert differing(tmp_path / "run", whole("ad")) == []
    assert untimed(tmp_path / "run") == untimed(whole("ad"))


def test_a_stop_between_two_rows_of_train_csv(fit, tmp_path, monkeypatch):
    """The next row is a mean over all its steps, those before the stop included."""
    want = fit(tmp_path / "whole", steps=8, log_every=4)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        in_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        fit(tmp_path / "run", steps=8, log_every=4)
    assert end.value.code == 128 + signal.SIGTERM and len(rows(tmp_path / "run")) == 1
    found = fit(tmp_path / "run", steps=8, log_every=4, resume=True)
    assert untimed(found) == untimed(want) and differing(found, want) == []


def test_a_finished_run_has_nothing_to_continue(fit, few, copy):
    fit(copy, resume=True)
    assert differing(copy, few) == [] and untimed(copy) == untimed(few)


# ---------------------------------------------------------------------------- another run's weights
def test_init_starts_from_the_weights_of_another_run(fit, few, tmp_path, monkeypatch):
    settings = {"init": few, "seed": 5, "steps": 4, "momentum": 1.0, "checkpoint_every": 3}
    before, still = contents(few), fit(tmp_path / "still", lr=1e-9, **settings)
    old, new = tensors(few), tensors(still)
    for name in (name for name in old if name.startswith("model.")):
        torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-6)
    assert not torch.equal(new["random.batches"], old["random.batches"]) and contents(few) == before
    want = fit(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        in_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        fit(tmp_path / "run", **settings)
    resumed = fit(tmp_path / "run", resume=True, **settings)
    assert differing(resumed, want) == []  # it does not start over


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"init": "nowhere"}, "nowhere"), ({"width": 8}, "fit"), ({"layers": 1}, "fit")],
)
def test_init_refuses_weights_that_do_not_fit(fit, few, tmp_path, changes, named):
    with pytest.raises(SystemExit, match=named) as end:
        fit(tmp_path / "run", **{"init": few} | changes)
    assert str(end.value.code).startswith("error: ") and "\n" not in str(end.value.code)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------- refusals
def refused(fit, folder, message, **changes):
    """One line, and not a byte of the folder is touched."""
    before = contents(folder)
    with pytest.raises(SystemExit, match=message) as end:
        fit(folder, **changes)
    assert str(end.value.code).startswith("error: ") and "\n" not in str(end.value.code)
    assert contents(folder) == before


@pytest.mark.parametrize("changes", [{}, {"seed": 1}, {"backbone": "ad"}])
def test_a_second_run_never_writes_into_the_first(fit, few, changes):
    refused(fit, few, "--resume", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.002}, "lr 0.001 -> 0.002"),
        ({"seed": 3}, "seed 0 -> 3"),
        ({"momentum": 0.5}, "momentum 0.9 -> 0.5"),
        ({"layers": 1, "routing": "token"}, "routing prefix -> token, layers 2 -> 1"),
        ({"queries": 5}, "queries 4 -> 5"),
        ({"data_seed": 1}, "data_seed 0 -> 1"),
        ({"steps": 9}, "steps 3 -> 9"),
        ({"backbone": "ad"}, "is of --backbone dpt, not of ad"),
        ({"env": "point-robot", "prompt_length": 20, "tasks": None}, "is of --env darkroom, not"),
    ],
)
def test_resume_names_the_setting_that_differs(fit, few, changes, message):
    refused(fit, few, message, resume=True, **changes)


def test_resume_takes_new_settings_of_play_run_and_work(fit, few, copy, tiny_config):
    """They do not change the weights; an evaluation of the run then begins with the new ones."""
    changes = {
        "episodes": 2, "actions": "greedy", "first": "random", "play_seed": 4, "prompt": "all",
        "checkpoint_every": 7, "log_every": 3, "eval_every": 5, "eval_episodes": 2, "workers": 2,
    }  # fmt: skip
    free = {f.name for group in (Play, Run, Work) for f in fields(group)} | {"prompt"}
    assert set(changes) <= free
    fit(copy, resume=True, **changes)
    assert differing(copy, few) == []
    kept = checkpoint.load_config(copy)
    assert (kept.play.episodes, kept.play.prompt, kept.work.workers) == (2, "all", 2)
    assert kept.model == checkpoint.load_config(few).model


@pytest.mark.parametrize("resume", [False, True])
def test_a_foreign_folder_is_refused(fit, tmp_path, resume):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(fit, tmp_path, "not a t2mir run", resume=resume)


def test_resume_starts_where_there_is_nothing(fit, few, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        assert differing(fit(tmp_path / name, resume=True), few) == []


# ---------------------------------------------------------------------------------- the file itself
def test_the_same_run_gives_the_same_bytes_but_for_its_time(fit, few, tmp_path):
    again = fit(tmp_path / "again")
    parts = []
    for folder in (few, again):
        blob = (folder / FILE).read_bytes()
        end = 8 + int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8:end])
        assert float(header["__metadata__"].pop("seconds")) > 0
        for name in ("crc", "rows"):  # checksums: of all this, and of train.csv with its speeds
            assert header["__metadata__"].pop(name)
        parts.append((list(header.items()), blob[end:]))
    assert parts[0] == parts[1]


def test_files_have_the_mode_that_the_umask_says(fit, tmp_path):
    before = os.umask(0o022)
    try:
        fit(tmp_path / "run", steps=1)
    finally:
        os.umask(before)
    for name in (FILE, "config.json", "train.csv"):
        assert (tmp_path / "run" / name).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_a_flipped_byte_is_noticed(fit, few, copy, tmp_path, place, monkeypatch, capsys):
    """By all that read a checkpoint: in its weights, moments and random streams."""
    blob = bytearray((copy / FILE).read_bytes())
    blob[int(place * len(blob))] ^= 4
    (copy / FILE).write_bytes(blob)
    damaged = f"{FILE} is damaged .*checksum differs"
    refused(fit, copy, damaged, resume=True)
    with pytest.raises(SystemExit, match=damaged):
        fit(tmp_path / "run", init=copy)
    ended = run("evaluate.py", [str(copy), "--episodes", "1"], monkeypatch, capsys)
    assert "checksum differs" in ended.error


TWO = """
import torch
from dpt import DPT


class Two(DPT):
    def make_optimizers(self):
        head = list(self.model.head.parameters())
        others = [p for n, p in self.model.named_parameters() if not n.startswith("head.")]
        others = [p for p in others if p.requires_grad]
        return {
            "slow": torch.optim.Adam([{"params": head, "lr_scale": 0.1}], lr=1.0),
            "sgd": torch.optim.SGD(others, lr=1.0, momentum=0.5),
        }
"""


def test_a_method_with_two_optimisers_continues_bit_for_bit(fit, tmp_path, monkeypatch):
    two = tmp_path / "two.py"
    two.write_text(TWO)
    want = fit(tmp_path / "whole", str(two), steps=6)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        in_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        fit(tmp_path / "run", str(two), steps=6)
    assert checkpoint.read(tmp_path / "run")[1].step == 3
    fit(tmp_path / "run", str(two), steps=6, resume=True)
    assert differing(tmp_path / "run", want) == [] and untimed(tmp_path / "run") == untimed(want)
    names = {name.rpartition(".")[2] for name in tensors(want) if name.startswith("optimizer.sgd.")}
    assert names == {"momentum_buffer"} and "optimizer.slow.0.exp_avg" in tensors(want)
    # without its moments it would be another run: they are what was continued
    there = tensors(tmp_path / "run")
    assert not there["optimizer.slow.0.exp_avg"].eq(0).all()


# ------------------------------------------------------------------------- files that are not whole
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


def test_a_kill_after_resume_loses_no_rows(fit, few, copy, monkeypatch):
    """train.csv of a resumed run holds the rows of its checkpoint at any time."""
    before = untimed(copy)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "train", killed)  # the run is open, its log too; no step is taken
        fit(copy, resume=True, tensorboard=False)
    assert untimed(copy) == before and differing(copy, few) == []
