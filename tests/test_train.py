"""Training (Algorithms 1 and 3): optimiser, log, what decides a run, several processes.

Run: pytest tests/test_train.py
"""

import csv
import math
import subprocess
import sys
import threading
from itertools import pairwise, product

import pytest
import torch
from commands import ROOT, contents, start
from tiny import command, differing, rows, settings, tensors

import train
from config import Training
from envs import get_family
from methods import get_method
from support import checkpoint
from support.command_line import parse_config
from support.files import only_writer
from support.journal import Log
from tools.bench import learning

# fmt: off
COLUMNS = [
    "step", "seconds", "tokens_per_s", "lr", "loss", "imitation", "balance", "contrastive",
    "info_nce", "accuracy", "grad_norm", "token_mi", "token_least", "token_entropy",
    *(f"token_load_{i}" for i in range(1, 5)), "task_least", "task_entropy",
    *(f"task_load_{i}" for i in range(1, 5)), "contrastive_fresh", "accuracy_fresh", "chance",
]
KL, RETURNS = ["kl_reward", "kl_no_reward"], ["return_test", "return_train"]
# fmt: on


# ---------------------------------------------------------------------------------- learning rate
def test_learning_rate_by_hand():
    cfg = Training(lr=0.4, warmup=4, steps=12, schedule="cosine")
    assert [train.learning_rate(cfg, i) for i in range(5)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4]
    )
    want = [0.2 * (1 + 0.5**0.5), 0.2, 0.2 * (1 - 0.5**0.5), 0.0]
    assert [train.learning_rate(cfg, i) for i in (6, 8, 10, 12)] == pytest.approx(want, abs=1e-9)
    assert all(a > b for a, b in pairwise(train.learning_rate(cfg, i) for i in range(4, 13)))
    constant = Training(lr=0.4, warmup=2, steps=12, schedule="constant")
    assert [train.learning_rate(constant, i) for i in range(12)] == pytest.approx(
        [0.2] + [0.4] * 11
    )


# ---------------------------------------------------------------------------- a batch of one task
@pytest.mark.parametrize("backbone", ["ad", "dpt"])
def test_a_batch_of_one_task_is_refused_where_eq7_would_tell_it_from_others(
    tiny_config, backbone, monkeypatch
):
    def batch(count, **changes):
        return parse_config(command(tiny_config, None, backbone, batch=count, **changes))

    for count, draws in ((2, 2), (4, 4)):
        with pytest.raises(ValueError, match=f"--batch {count} is {draws} draws of one") as error:
            batch(count, draws=draws)
        assert "\n" not in str(error.value)
    for fine in ({"draws": 1}, {"moe": "token"}, {"moe": "none"}):
        batch(2, **fine)
    monkeypatch.setenv("WORLD_SIZE", "2")  # by torchrun: another task is another process's
    batch(2)


# ----------------------------------------------------------------------------- the numbers of a run
@pytest.mark.parametrize("backbone", ["ad", "dpt"])
def test_train_csv(fit, tmp_path, backbone):
    found = rows(fit(tmp_path / "run", backbone, steps=4, eval_every=2))
    assert list(found[0]) == COLUMNS + KL * (backbone == "dpt") + RETURNS
    assert [row["step"] for row in found] == ["1", "2", "3", "4"]
    assert [float(row["lr"]) for row in found] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    filled = COLUMNS + (["kl_reward"] if backbone == "dpt" else [])
    for row in found:
        assert all(math.isfinite(float(row[name])) for name in filled)
        terms = [float(row[name]) for name in ("imitation", "balance", "contrastive")]
        assert float(row["loss"]) == pytest.approx(sum(terms), rel=1e-4) and terms[1] > 0
        assert terms[2] == pytest.approx(0.1 * float(row["info_nce"]), rel=1e-4)
    shown = [row["return_test"] != "" for row in found]
    assert shown == [False, True, False, False]  # the end has an evaluation of its own
    assert 0 <= float(found[1]["return_train"]) <= 100


def begun(folder, step, seen=None):
    log = Log(folder, step, seen)
    log.begin(tensorboard=False)
    return log


def test_a_column_that_comes_later_is_added_to_all_rows(tmp_path):
    log = begun(tmp_path, 0)
    log.row({"step": 1, "loss": 0.5})
    log.row({"step": 2, "loss": 0.25, "return_test": 3.0})
    log.row({"step": 3, "loss": 0.125})
    want = [("1", "0.5", ""), ("2", "0.25", "3"), ("3", "0.125", "")]
    assert [tuple(row.values()) for row in rows(tmp_path)] == want
    again = begun(tmp_path, 2)  # resumed: row 3 is one that its checkpoint lacks
    again.row({"step": 3, "loss": 1.0, "new": 7})
    assert [tuple(row.values()) for row in rows(tmp_path)] == [
        ("1", "0.5", "", ""),
        ("2", "0.25", "3", ""),
        ("3", "1", "", "7"),
    ]


def test_train_csv_is_never_shorter_than_its_checkpoint(tmp_path, monkeypatch):
    """A kill at any moment of a resumed run's start: the rows are in the file, old or new."""
    begun(tmp_path, 0).row({"step": 1, "loss": 0.5})
    with open(tmp_path / "train.csv", "a") as file:
        file.write("2,0.25\n3,0.1\n4,")  # of the last row only a part came to the disk

    class Killed(BaseException):
        pass

    seen = []

    def dies(*_):
        seen.append((tmp_path / "train.csv").read_text())
        raise Killed

    for moment in (csv.DictWriter.writeheader, csv.DictWriter.writerows):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(csv.DictWriter, moment.__name__, dies)
            begun(tmp_path, 3)
    assert len(set(seen)) == 1 and seen[0].splitlines() == [
        "step,loss",
        "1,0.5",
        "2,0.25",
        "3,0.1",
        "4,",
    ]
    assert (tmp_path / "train.csv").read_text() == seen[0]
    begun(tmp_path, 3)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_rows_that_a_checkpoint_has_seen_are_known_again(tmp_path):
    """A flipped digit of train.csv is named; a late column and a lost file are no damage."""
    log = begun(tmp_path, 0)
    log.row({"step": 1, "loss": 0.5})
    log.row({"step": 2, "loss": 0.25})
    seen = log.checksum
    log.row({"step": 3, "loss": 0.2, "return_test": 3.0})
    assert begun(tmp_path, 2, seen).checksum == seen
    path = tmp_path / "train.csv"
    text = path.read_text()
    for wrong in (text.replace("0.25", "0.35"), text.replace("loss", "lost"), text[:12], "\0,\n"):
        path.write_text(wrong)
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"train.csv is damaged: .*move it away") as error:
            Log(tmp_path, 2, seen)
        assert "\n" not in str(error.value) and path.read_bytes() == before
    path.unlink()
    Log(tmp_path, 2, seen)


def test_rows_of_several_steps_are_their_means(fit, tmp_path):
    each, twos = (
        rows(fit(tmp_path / "each", steps=5)),
        rows(fit(tmp_path / "twos", steps=5, log_every=2)),
    )
    assert [row["step"] for row in twos] == ["2", "4", "5"]  # the last row is of one step
    for name in ("loss", "imitation", "balance", "contrastive", "grad_norm"):
        one = [float(row[name]) for row in each]
        want = [(one[0] + one[1]) / 2, (one[2] + one[3]) / 2, one[4]]
        assert [float(row[name]) for row in twos] == pytest.approx(want, rel=1e-4)


def test_the_seed_decides_and_looking_does_not(fit, tmp_path):
    one = fit(tmp_path / "one")
    assert differing(fit(tmp_path / "again"), one) == []
    watched = fit(tmp_path / "watched", eval_every=1, log_every=2, checkpoint_every=3)
    assert differing(watched, one) == []
    fit(tmp_path / "largest", seed=2**63 - 1)  # also the seeds that are made of it fit
    other = differing(fit(tmp_path / "other", seed=1), one)
    assert {"model.head.weight", "random.torch", "random.batches"} <= set(other)
    assert rows(tmp_path / "other")[0]["loss"] != rows(one)[0]["loss"]


def test_a_loss_that_is_not_finite_ends_the_run(fit, tmp_path, monkeypatch):
    """The checkpoint before it is whole, and continues to what a calm run gives."""
    calm = {"steps": 9, "schedule": "constant", "warmup": 0}
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match=r"step [345]: .* is not finite .* is intact") as end,
    ):
        patch.setattr(train, "learning_rate", lambda cfg, step: 1e30 if step >= 2 else 1e-3)
        fit(tmp_path / "run", **calm, checkpoint_every=2)
    assert str(end.value.code).startswith("error: ") and "\n" not in str(end.value.code)
    assert all(value.isfinite().all() for value in tensors(tmp_path / "run").values())
    cpu = torch.device("cpu")
    assert checkpoint.load_method(tmp_path / "run", cpu)[1].step == 2
    resumed = fit(tmp_path / "run", **calm, resume=True)
    assert differing(resumed, fit(tmp_path / "calm", **calm)) == []


def test_a_step_that_is_not_finite_changes_no_weight(tiny_config, paper_data, monkeypatch):
    """Neither the loss nor its gradient may be: of all terms and of all optimisers."""
    method = get_method("dpt")(parse_config(command(tiny_config)), get_family("darkroom"))
    before = {name: value.clone() for name, value in method.model.state_dict().items()}
    batch = train.draw(method, paper_data, torch.Generator().manual_seed(0))
    losses = method.losses

    def broken(batch):
        terms, metrics = losses(batch)
        return terms | {"mine": terms["imitation"] * math.nan}, metrics

    monkeypatch.setattr(method, "losses", broken)
    with pytest.raises(ValueError, match="not finite"):
        train.training_step(method, batch)
    after = method.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    monkeypatch.undo()
    logged = train.training_step(method, batch)
    assert {"loss", "imitation", "balance", "contrastive", "grad_norm"} <= set(logged)


def test_a_run_has_one_writer(fit, tmp_path):
    """A second process is told so, also when it came before the first had written anything."""
    refused = pytest.raises(SystemExit, match=r"error: another process is writing .*run")
    with only_writer(tmp_path / "run"), refused:
        fit(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    fit(tmp_path / "run")  # an empty folder with a lock that nobody holds is nobody's run
    with only_writer(tmp_path / "run"):
        before = contents(tmp_path / "run")
        with pytest.raises(SystemExit, match=r"error: another process is writing .*run"):
            fit(tmp_path / "run", resume=True, steps=3)
        assert contents(tmp_path / "run") == before


# Traced and split as ever, but no C++ is compiled, which takes a minute a model.
COMPILED = """
import functools, runpy, sys, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
runpy.run_path(sys.argv[0], run_name="__main__")
from torch._dynamo.utils import counters
assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
"""


@pytest.mark.parametrize(("backbone", "moe"), [*product(("ad", "dpt"), ("both", "none"))])
def test_a_compiled_run_is_the_same_run(fit, tiny_config, tmp_path, backbone, moe):
    """As far as rounding goes. In a process of its own: no shapes are checked there at run time."""
    settings = {"moe": moe, "steps": 2, "task_center": True, "layers": 1}
    want = tensors(fit(tmp_path / "plain", backbone, **settings))
    argv = command(tiny_config, tmp_path / "run", backbone, compile=True, **settings)
    code = COMPILED.replace("sys.argv[0]", repr(str(ROOT / "train.py")))
    process = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    got = tensors(tmp_path / "run")
    assert got.keys() == want.keys()  # names of the plain model: the file does not tell
    for name, value in want.items():
        if name.startswith(("model.", "optimizer.")):
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_time_to_a_return(tiny_config, paper_folder):
    """The bench trains as train.py does, and stops at the first evaluation that passes."""
    small = settings(tiny_config, "dpt", steps=9, episodes=6) | {"data": str(paper_folder)}
    for name in ("backbone", "preset", "seed", "env"):
        del small[name]
    easy = learning("darkroom", "dpt", -1.0, seeds=2, every=4, **small)
    assert (easy["steps"], easy["tokens"], easy["passed"]) == (4, 4 * 4 * (3 * 100 + 4), 2)
    assert easy["seconds"] > 0
    never = learning("darkroom", "dpt", 101.0, seeds=1, every=4, **small)
    assert (never["steps"], never["passed"]) == (math.inf, 0)


def test_tensorboard_has_the_rows_of_train_csv(fit, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    import torch.utils.tensorboard as package
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made, writer = [], package.SummaryWriter
    monkeypatch.setattr(
        package, "SummaryWriter", lambda *a, **k: made.append(writer(*a, **k)) or made[-1]
    )

    def logged():
        made[-1].close()
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
        found = events.Scalars("loss")
        assert [event.value for event in found] == pytest.approx(
            [float(row["loss"]) for row in rows(tmp_path / "run")], rel=1e-4
        )
        return [event.step for event in found]

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "learning_rate", lambda cfg, step: 1e30 if step == 2 else 1e-3)
        fit(tmp_path / "run", tensorboard=True, steps=5)
    made[-1].close()
    fit(tmp_path / "run", tensorboard=True, steps=5, resume=True)
    assert logged() == [1, 2, 3, 4, 5]  # what the checkpoint had not seen appears once


# -------------------------------------------------------------------------------- several processes
def torchrun(argv, cwd):
    """Two processes; ended from outside if they wait for each other."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(argv, *launcher, cwd=cwd)
    watch = threading.Timer(400, process.terminate)
    watch.start()
    try:
        return process.communicate()
    finally:
        watch.cancel()


def test_two_processes_equal_one_with_twice_the_batch(fit, tiny_config, tmp_path):
    """Eq. 3 and 7 are over the whole batch: gathered, they and their gradients are as of one."""
    settings = {"dropout": 0.0, "steps": 4, "checkpoint_every": 4, "routing": "sequence"}
    settings |= {"task_center": True, "task_balance": 0.01}  # whose statistics are of all rows too
    # no --run: torchrun would take it for its own --run-path
    out, err = torchrun(command(tiny_config, None, batch=2, **settings), tmp_path)
    runs = [path.parent for path in tmp_path.glob("runs/*/checkpoint.safetensors")]
    assert len(runs) == 1, out + err
    one = fit(tmp_path / "one", batch=4, **settings)
    for a, b in zip(rows(runs[0]), rows(one), strict=True):
        for name in ("loss", "imitation", "balance", "contrastive", "accuracy", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3)
        assert float(b["balance"]) > 1e-3 and float(b["contrastive"]) > 1e-2
    a, b = tensors(runs[0]), tensors(one)
    moved = tensors(fit(tmp_path / "other", batch=6, **settings))  # another batch, another run
    for name in (n for n in a if n.startswith("model.")):
        if not name.endswith("qkv.bias"):  # its part for the keys has no gradient but rounding
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    assert (moved["model.head.weight"] - b["model.head.weight"]).abs().max() > 1e-4
    assert torch.equal(a["random.batches"], b["random.batches"])
