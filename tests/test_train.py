"""test_train.py: training (Algorithms 1 and 3; Eq. 7, 8, 10, 11): losses, optimiser, log, several processes.

Run: python -m pytest -q tests/test_train.py
"""

import math
import threading
from itertools import pairwise

import pytest
import torch
from tiny import command, differing, rows, start, tensors, trainer

import train
from config import Config, parse
from data import ADBatch, DPTBatch, Prompt
from models import T2MIR, Output
from support import checkpoint

# fmt: off
COLUMNS = ["step", "seconds", "tokens_per_s", "lr", "loss", "imitation", "balance", "contrastive", "accuracy",
           "grad_norm", "token_mi", "token_least", "task_least", "contrastive_fresh", "accuracy_fresh", "chance",
           "kl_reward", "kl_no_reward", "return_test", "return_train"]
# fmt: on
KEY, QUERY = "model.blocks.1.ff.task_router.key.", "model.blocks.1.ff.task_router.query."


@pytest.fixture
def fit(tiny_config, paper_folder):
    with trainer(tiny_config) as call:
        yield call


# ------------------------------------------------------------------------------------------ the loss
def output(action):
    return Output(action, *torch.zeros(3), None, None, torch.zeros(0))


def cross_entropy(logits, label):
    return math.log(sum(math.exp(x) for x in logits.tolist())) - logits[label].item()


def test_eq10_is_the_cross_entropy_of_each_steps_own_action():
    """In every row: both draws of a task are imitated, the query's and the key's."""
    action, taken = torch.randn(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    batch = ADBatch(Prompt(torch.zeros(2, 3, 2), taken, torch.zeros(2, 3)), torch.zeros(2))
    want = sum(cross_entropy(action[b, t], taken[b, t]) for b in range(2) for t in range(3)) / 6
    assert train.imitation_loss(output(action), batch, True).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("labels", [[[3], [0]], [[3, 1, 2, 2], [0, 4, 4, 1]]])
def test_eq11_repeats_one_label_or_takes_each_querys_own(labels):
    action = torch.randn(2, 4, 5)  # query first: n + 1 = 4 read-outs; query last: Q = 4
    prompt = Prompt(torch.zeros(2, 3, 2), torch.zeros(2, 3).long(), torch.zeros(2, 3))
    batch = DPTBatch(
        prompt, torch.zeros(2), torch.zeros(2, 1, 2), torch.tensor(labels), torch.tensor(labels)
    )
    want = (
        sum(cross_entropy(action[b, r], (labels[b] * 4)[r]) for b in range(2) for r in range(4)) / 8
    )
    assert train.imitation_loss(output(action), batch, True).item() == pytest.approx(want, rel=1e-5)


def test_continuous_actions_are_imitated_by_squared_error():
    action, label = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    prompt = Prompt(
        torch.zeros(1, 2, 2), torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]), torch.zeros(1, 2)
    )
    query = DPTBatch(prompt, torch.zeros(1), torch.zeros(1, 1, 2), label, label)
    assert train.imitation_loss(output(action), query, False).item() == pytest.approx(
        (1 + 0 + 1 + 1) / 4
    )
    history = ADBatch(prompt, torch.zeros(1))
    assert train.imitation_loss(output(action), history, False).item() == pytest.approx(
        (0.25 + 0.25 + 4 + 0) / 4
    )


# ------------------------------------------------------------------------------------- the optimiser
def test_learning_rate_by_hand():
    cfg = Config(lr=0.4, warmup=4, steps=12, schedule="cosine")
    assert [train.learning_rate(cfg, i) for i in range(5)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4]
    )
    want = [0.2 * (1 + 0.5**0.5), 0.2, 0.2 * (1 - 0.5**0.5), 0.0]
    assert [train.learning_rate(cfg, i) for i in (6, 8, 10, 12)] == pytest.approx(want, abs=1e-9)
    assert all(a > b for a, b in pairwise(train.learning_rate(cfg, i) for i in range(4, 13)))
    constant = Config(lr=0.4, warmup=2, steps=12, schedule="constant")
    assert [train.learning_rate(constant, i) for i in range(12)] == pytest.approx(
        [0.2] + [0.4] * 11
    )


def test_only_matrices_decay_and_the_key_router_is_never_trained(tiny_config):
    cfg = parse(command(tiny_config))
    model = T2MIR(cfg.model())
    groups = train.make_optimizer(model, cfg).param_groups
    name = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ([name[id(p)] for p in group["params"]] for group in groups)
    keys = {n for n in name.values() if ".task_router.key." in n}
    assert len(keys) == 2
    assert sorted(decayed + plain) == sorted(set(name.values()) - keys)
    assert [group["weight_decay"] for group in groups] == [1e-2, 0.0]
    assert {"head.weight", "blocks.1.ff.task_router.w"} <= set(decayed)
    assert {
        "head.bias",
        "shift",
        "norm.weight",
        "blocks.0.norm1.weight",
        "blocks.0.attention.qkv.bias",
    } <= set(plain)
    assert not [n for n in decayed if n.endswith(".bias")]


@pytest.mark.parametrize("backbone", ["ad", "dpt"])
def test_eq8_follows_the_optimisers_step(fit, tmp_path, backbone):
    """Algorithm 1 line 15, Algorithm 3 line 22: beta 0 copies the router as it is *after* the step."""
    now, never, half = (
        tensors(fit(tmp_path / str(beta), backbone, momentum=beta, steps=1))
        for beta in (0.0, 1.0, 0.5)
    )
    for layer in ("first.weight", "second.weight"):
        before, after = (
            never[KEY + layer],
            now[QUERY + layer],
        )  # beta 1 keeps the router as it was built
        assert not torch.equal(before, after)
        assert torch.equal(now[KEY + layer], after)
        torch.testing.assert_close(half[KEY + layer], 0.5 * before + 0.5 * after)


# -------------------------------------------------------------------------------- the numbers of a run
@pytest.mark.parametrize("backbone", ["ad", "dpt"])
def test_train_csv(fit, tmp_path, backbone):
    found = rows(fit(tmp_path / "run", backbone, steps=4, eval_every=2))
    assert list(found[0]) == COLUMNS and [row["step"] for row in found] == ["1", "2", "3", "4"]
    assert [float(row["lr"]) for row in found] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    filled = COLUMNS[:16] + (["kl_reward"] if backbone == "dpt" else [])
    for row in found:
        assert all(math.isfinite(float(row[name])) for name in filled)
        total = float(row["imitation"]) + float(row["balance"]) + 0.1 * float(row["contrastive"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-4) and float(row["balance"]) > 0
    assert [row["return_test"] != "" for row in found] == [
        False,
        True,
        False,
        False,
    ]  # the end has its own
    assert 0 <= float(found[1]["return_train"]) <= 100


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
    assert (
        differing(fit(tmp_path / "watched", eval_every=1, log_every=2, checkpoint_every=3), one)
        == []
    )
    other = differing(fit(tmp_path / "other", seed=1), one)
    assert {"model.head.weight", "random.torch", "random.batches"} <= set(other)
    assert rows(tmp_path / "other")[0]["loss"] != rows(one)[0]["loss"]


def test_a_loss_that_is_not_finite_ends_the_run(fit, tmp_path, monkeypatch):
    """The checkpoint before it is whole, and continues to what a calm run gives."""
    settings = {"steps": 9, "schedule": "constant", "warmup": 0}
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match=r"not finite at step [345]\b") as end,
    ):
        patch.setattr(train, "learning_rate", lambda cfg, step: 1e30 if step >= 2 else 1e-3)
        fit(tmp_path / "run", **settings, checkpoint_every=2)
    assert str(end.value.code).startswith("error: ") and "\n" not in str(end.value.code)
    assert all(value.isfinite().all() for value in tensors(tmp_path / "run").values())
    assert checkpoint.load_model(tmp_path / "run", "cpu")[2]["step"] == "2"
    assert (
        differing(
            fit(tmp_path / "run", **settings, resume=True), fit(tmp_path / "calm", **settings)
        )
        == []
    )


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


# ------------------------------------------------------------------------------------ several processes
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
    """Eq. 3 and Eq. 7 are over the whole batch: gathered, they and their gradients are those of one process."""
    settings = {"dropout": 0.0, "steps": 4, "checkpoint_every": 4, "routing": "sequence"}
    out, err = torchrun(command(tiny_config, None, batch=2, **settings), tmp_path)
    runs = [
        path.parent for path in tmp_path.glob("runs/*/checkpoint.safetensors")
    ]  # torchrun has a --run-path
    assert len(runs) == 1, out + err
    one = fit(tmp_path / "one", batch=4, **settings)
    for a, b in zip(rows(runs[0]), rows(one), strict=True):
        for name in ("loss", "imitation", "balance", "contrastive", "accuracy", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3)
        assert float(b["balance"]) > 1e-3 and float(b["contrastive"]) > 1e-2
    a, b = tensors(runs[0]), tensors(one)
    moved = tensors(fit(tmp_path / "other", batch=2, **settings))  # half the batch is another run
    for name in (n for n in a if n.startswith("model.")):
        if not name.endswith("qkv.bias"):  # its part for the keys has no gradient but rounding
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    assert (moved["model.head.weight"] - b["model.head.weight"]).abs().max() > 1e-4
    assert torch.equal(a["random.batches"], b["random.batches"])
