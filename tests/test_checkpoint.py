"""A run can be stopped, killed and continued (Algorithms 1 and 3), and is never overwritten.

Runs are compared by every tensor of their checkpoints: weights, both routers, AdamW's moments,
random streams. Run: pytest tests/test_checkpoint.py
"""

import json
import os
import shutil
import signal
import time
from dataclasses import fields

import pytest
import torch
from commands import contents, run, start
from tiny import command, differing, rows, tensors, trainer, untimed

import train
from config import Play, Run, Work
from support import checkpoint

LONG = {"steps": 40, "checkpoint_every": 5}  # long enough to be caught at work
FILE = checkpoint.FILE


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
