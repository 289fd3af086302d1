"""test_checkpoint.py: a run can be stopped, killed and continued (Algorithms 1 and 3), and is never overwritten.

Runs are compared by every tensor of their checkpoints: weights, both routers, AdamW's moments, random streams.
Run: python -m pytest -q tests/test_checkpoint.py
"""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import save_file
from tiny import command, contents, differing, rows, run, start, tensors, trainer, untimed

import train
from support import checkpoint

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


# ------------------------------------------------------------------------------------ stop and resume
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
    code, out, err = caught(
        command(tiny_config, tmp_path / "run", **LONG), tmp_path / "run", signal.SIGTERM
    )
    done = len(rows(tmp_path / "run"))
    assert (
        code == 128 + signal.SIGTERM
        and f"stopped at step {done} of 40" in out
        and "--resume" in out
    )
    assert "Traceback" not in err and checkpoint.read(tmp_path / "run")[1]["step"] == str(done)
    fit(tmp_path / "run", resume=True, **LONG)
    assert differing(tmp_path / "run", whole("dpt")) == []
    assert untimed(tmp_path / "run") == untimed(whole("dpt"))


def continues_from_the_last_checkpoint(fit, whole, folder, backbone):
    """Rows that the checkpoint has not seen are written anew; settings that only watch the run may change."""
    assert int(checkpoint.read(folder)[1]["step"]) % 5 == 0
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
    seen, sample = [], train.sample

    def counted(*arguments):
        seen.append(1)
        if len(seen) == number:
            happens()
        return sample(*arguments)

    patch.setattr(train, "sample", counted)


def test_a_crashed_run_continues_from_its_last_checkpoint(fit, whole, tmp_path, monkeypatch):
    def crash():
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        in_step(patch, 9, crash)
        fit(tmp_path / "run", **LONG)
    assert len(rows(tmp_path / "run")) == 8
    continues_from_the_last_checkpoint(fit, whole, tmp_path / "run", "dpt")


def test_ctrl_c_finishes_the_step_in_hand(fit, whole, tmp_path, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        in_step(patch, 8, lambda: os.kill(os.getpid(), signal.SIGINT))
        fit(tmp_path / "run", "ad", **LONG)
    assert (
        end.value.code == 128 + signal.SIGINT
        and "stopped at step 8 of 40" in capsys.readouterr().out
    )
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
    assert (
        differing(fit(tmp_path / "run", resume=True, **settings), want) == []
    )  # it does not start over


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"init": "nowhere"}, "nowhere"), ({"width": 8}, "fit"), ({"layers": 1}, "fit")],
)
def test_init_refuses_weights_that_do_not_fit(fit, few, tmp_path, changes, named):
    with pytest.raises(SystemExit, match=named) as end:
        fit(tmp_path / "run", **{"init": few} | changes)
    assert str(end.value.code).startswith("error: ") and "\n" not in str(end.value.code)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- refusals
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
    ],
)
def test_resume_names_the_setting_that_differs(fit, few, changes, message):
    refused(fit, few, message, resume=True, **changes)


@pytest.mark.parametrize("resume", [False, True])
def test_a_foreign_folder_is_refused(fit, tmp_path, resume):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(fit, tmp_path, "not a t2mir run", resume=resume)


def test_resume_starts_where_there_is_nothing(fit, few, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        assert differing(fit(tmp_path / name, resume=True), few) == []


# ----------------------------------------------------------------------------------- files that are not whole
def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "empty": (lambda f: (f / FILE).write_bytes(b""), FILE),
    "truncated": (lambda f: cut(f / FILE), FILE),
    "garbage": (lambda f: (f / FILE).write_bytes(bytes(range(256)) * 40), FILE),
    "missing": (lambda f: (f / FILE).unlink(), FILE),
    "foreign": (lambda f: save_file({"w": torch.zeros(2)}, f / FILE), FILE),
    "of another model": (
        lambda f: save_file({"model.w": torch.zeros(2)}, f / FILE, {"t2mir": "1"}),
        FILE,
    ),
    "config truncated": (lambda f: cut(f / "config.json"), "config.json"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "config list": (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    "config foreign": (lambda f: (f / "config.json").write_text('{"format": "99"}'), "config.json"),
    "config typed": (lambda f: change(f, width="wide"), "config.json"),
    "config impossible": (lambda f: change(f, heads=3), "heads"),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json"),
}


def change(folder, **settings):
    """Edit config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_named_in_one_line(copy, how, monkeypatch, capsys):
    damage, named = DAMAGE[how]
    damage(copy)
    before = contents(copy.parent)
    with pytest.raises(ValueError, match=named) as error:
        checkpoint.load_model(copy, "cpu")
    assert "\n" not in str(error.value)
    assert named in run("evaluate.py", [str(copy), "--episodes", "1"], monkeypatch, capsys).error
    assert contents(copy.parent) == before


def test_tasks_of_a_run_are_checked(copy):
    for split in (
        None,
        {},
        {"train": [[0, 0]], "test": []},
        {"train": [[0, 0]], "test": [[10, 0]]},
    ):
        change(copy, task_split=split)
        with pytest.raises(ValueError, match=r"names no tasks|goal"):
            checkpoint.read_tasks(copy)


def test_references_of_a_run_are_those_of_its_split(copy):
    """Of datasets that know none, or of a file that was changed by hand: none."""
    known = {"random": [0.5], "teacher": [80.0]}
    split = checkpoint.read_config(copy)["task_split"]
    assert checkpoint.read_reference(copy, "test") is None  # DarkRoom's optimum is known
    for reference in (None, [], [1], {"train": known}, {"test": {"random": [0.5]}}, {"test": 3}):
        change(copy, task_split=split | {"reference": reference})
        assert checkpoint.read_reference(copy, "test") is None
    change(copy, task_split=split | {"reference": {"test": known, "train": {}}})
    assert (
        checkpoint.read_reference(copy, "test") == known
        and checkpoint.read_reference(copy, "train") is None
    )


def test_a_failed_write_leaves_the_checkpoint_before_it(fit, few, tmp_path, monkeypatch):
    """The disk is full at the end of the run: the checkpoint of step 2 is whole and continues."""
    written = []

    def save(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        written.append(path)
        if len(written) == 2:
            cut(path)
            raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises((OSError, SystemExit)):
        patch.setattr(checkpoint, "save_file", save)
        fit(tmp_path / "run")
    assert len(written) == 2 and checkpoint.load_model(tmp_path / "run", "cpu")[2]["step"] == "2"
    assert differing(fit(tmp_path / "run", resume=True), few) == []
