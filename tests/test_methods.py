"""test_methods.py: the seam for methods: finding one, its settings, its losses and its training.

What AD and DPT have in common: Algorithms 1 and 3 step by step, Eq. 8 after the optimiser's step.
Run: python -m pytest -q tests/test_methods.py
"""

import copy
import shutil
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import toys
from torch.testing import assert_close
from toys import CAUSAL, EQ4, GRID, LAYOUTS, PLANE, draw, method

import methods
import train
from ad import AD
from dpt import DPT
from envs import FAMILIES, get_family
from methods import Method, adamw, get_method, names
from models import ModelSettings
from support.command_line import parse_config, preset_config
from support.settings import flat, leaves, with_values

near = partial(assert_close, atol=1e-5, rtol=0)
FORK = str(Path(__file__).parent / "forks" / "bc.py")


# --------------------------------------------------------------------------------- finding a method
def test_methods_are_found_by_name_and_by_file():
    assert get_method("ad") is AD and get_method("dpt") is DPT
    assert names()[:2] == ["ad", "dpt"] and len(names()) == len(set(names()))
    for name in names():
        assert issubclass(get_method(name), Method)
    own = get_method(FORK)
    assert own.__name__ == "BehaviourCloning" and get_method(FORK) is own


def test_a_file_of_baselines_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "baselines").mkdir()
    shutil.copy(FORK, tmp_path / "baselines" / "mine.py")
    monkeypatch.setattr(methods, "HERE", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert names() == ["ad", "dpt", "mine"]
    cfg = preset_config("cpu", "darkroom", "mine")
    assert get_method("mine").__name__ == "BehaviourCloning" and flat(cfg)["smoothing"] == 0


ONE = "from methods import Method\nclass Mine(Method):\n    pass\n"


@pytest.mark.parametrize(
    "text, why",
    [
        (None, "there is no such file"),
        ("class Mine(:\n", ".py: SyntaxError: "),
        ("raise RuntimeError('first line\\nsecond')", "RuntimeError: first line second"),
        ("import nothing_like_that", "No module named 'nothing_like_that'"),
        ("", "must define one subclass of methods.Method"),
        ("from ad import AD", "must define one subclass"),  # imported, not defined
        (ONE + "class Yours(Mine):\n    pass\n", "must define one subclass"),
    ],
)
def test_files_that_hold_no_method(tmp_path, text, why):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        get_method(str(path))
    line = str(error.value)
    assert why in line and line.startswith(f"--backbone {path}") and "\n" not in line


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError) as error:
        get_method("atlantis")
    line = str(error.value)
    assert "unknown backbone 'atlantis'" in line and "ad, dpt" in line and "\n" not in line


def test_a_file_may_be_called_as_a_module_of_ours_and_name_its_class_twice(tmp_path):
    path = tmp_path / "ad.py"
    path.write_text("from ad import AD\nclass Mine(AD):\n    pass\nAlias = Mine\n")
    own = get_method(str(path))
    assert own.__name__ == "Mine" and issubclass(own, AD) and get_method("ad") is AD


# ----------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("backbone", [*names(), FORK])
def test_names_of_settings_are_flat_and_unique(backbone):
    """So that a flag, a preset and a run's config.json need nothing but the declaration."""
    cfg = preset_config("cpu", "darkroom", backbone)
    every = [name for _, name, _ in leaves(cfg)]
    assert len(every) == len(set(every)) == len(flat(cfg))
    assert {group for group, _, _ in leaves(cfg)} >= {"model", "play", "training", "data", "run"}


def test_a_setting_of_a_method_needs_only_its_declaration():
    cfg = parse_config(["--backbone", FORK, "--smoothing", "0.5", "--history", "3"])
    assert (cfg.method.smoothing, cfg.play.history) == (0.5, 3)
    assert isinstance(cfg.model, ModelSettings) and flat(cfg)["smoothing"] == 0.5
    with pytest.raises(ValueError, match="--smoothing -1"):  # its type has the bounds
        parse_config(["--backbone", FORK, "--smoothing=-1"])
    assert parse_config(["--backbone", "ad"]).method == AD.Settings()


def test_labels_are_the_columns_of_table_1():
    every = {"T2MIR-AD", "T2MIR-DPT", "AD", "DPT"}
    whole = {method(layout, moe=moe).label for layout, moe in product(LAYOUTS, ("both", "none"))}
    assert whole == every
    for env in FAMILIES:
        assert set(get_family(env).paper_return) in (every, set())
    assert method("ad", moe="token").label == "T2MIR-AD w/o Task-MoE"
    assert method("last", moe="task").label == "T2MIR-DPT w/o Token-MoE"


# ------------------------------------------------------------------------------------ the optimiser
@pytest.mark.parametrize("layout, family", [*product(LAYOUTS, (GRID, PLANE))])
def test_only_weights_decay_and_the_key_router_is_never_trained(layout, family):
    tiny = method(layout, family, token_shift=True, task_center=True, weight_decay=1e-2, lr=2e-3)
    (optimizer,) = tiny.optimizers.values()
    name = {id(p): n for n, p in tiny.model.named_parameters()}
    decayed, plain = ([name[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    keys = {n for n in name.values() if ".task_router.key." in n}
    assert len(keys) == 2
    assert sorted(decayed + plain) == sorted(set(name.values()) - keys)  # each exactly once
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 2e-3]
    shape = {n: p.dim() for n, p in tiny.model.named_parameters()}
    biases = {n for n in shape if shape[n] < 2 or "bias" in n.rsplit(".", 1)[-1]}
    assert set(plain) == biases
    assert {"head.weight", "embed_time.weight", "blocks.3.ff.task_router.w"} <= set(decayed)
    experts = [f"blocks.3.ff.{half}." for half in ("token", "task")]
    assert {e + w for e in experts for w in ("weight1", "weight2")} <= set(decayed)
    stacked = {e + b for e in experts for b in ("bias1", "bias2")} | {"modality_bias"}
    assert stacked <= set(plain) and all(shape[n] == 2 for n in stacked)
    norms = {"norm.weight", "norm.bias", "blocks.0.norm1.weight", "blocks.3.norm2.bias"}
    assert norms | {"head.bias", "shift", "blocks.0.attention.qkv.bias"} <= set(plain)


def test_weight_decay_leaves_biases_where_they_are():
    """By its effect: without gradients, AdamW moves what decays and nothing else."""
    model = toys.build(token_shift=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = adamw(model, toys.config(weight_decay=0.5, lr=0.1).training)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad
        decays = trained and parameter.dim() >= 2 and "bias" not in name
        assert_close(parameter.detach(), before[name] * (0.95 if decays else 1.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eq8_follows_the_optimisers_step(layout):
    """Algorithm 1 line 15, Algorithm 3 line 22: beta 0 copies the router as it is *after* it."""

    def step(beta):
        tiny = method(layout, momentum=beta, dropout=0.1)
        tiny.model.train()
        train.training_step(tiny, draw(tiny.model, rows=4))
        return tiny.model.blocks[-1].ff.task_router

    now, never, half = (step(beta) for beta in (0.0, 1.0, 0.5))
    for layer in ("first", "second"):
        before = getattr(never.key, layer).weight  # beta 1 keeps the router as it was built
        after = getattr(now.query, layer).weight
        assert not torch.equal(before, after)
        assert torch.equal(getattr(now.key, layer).weight, after)
        assert_close(getattr(half.key, layer).weight, 0.5 * before + 0.5 * after)


def test_eq8_is_part_of_every_method_with_a_key_router():
    """Also of one that does not name it."""
    cfg = with_values(preset_config("paper", "darkroom", FORK), toys.SMALL | {"momentum": 0.0})
    tiny = get_method(FORK)(cfg, GRID)
    router = tiny.model.blocks[-1].ff.task_router
    before = router.query.second.weight.clone()
    train.training_step(tiny, draw(tiny.model.train(), rows=4))
    assert not torch.equal(router.query.second.weight, before)
    for key, query in zip(router.key.parameters(), router.query.parameters(), strict=True):
        assert torch.equal(key, query)


# ---------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("routing", ["sequence", "prefix", "token"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_float32_under_autocast(layout, routing):
    """Those of the routers equal what full precision makes of the same h."""
    tiny, seen = method(layout, routing=routing, task_center=True), {}
    model = tiny.model.train()
    layer = model.blocks[-1].ff

    def remember(module, inputs):
        if not seen:
            h, view, read, _, task = inputs
            twin = copy.deepcopy(layer)  # centring moves its statistics
            seen.update(inputs=(h.detach().float(), view, read, None, task), twin=twin)
            seen.update(random=torch.get_rng_state())

    hook = layer.register_forward_pre_hook(remember)
    batch = draw(model, rows=4, queries=3 if layout == "last" else 1)
    with torch.autocast("cpu", torch.bfloat16):
        terms, metrics = tiny.losses(batch)
        assert model.head(torch.zeros(1, 16)).dtype == torch.bfloat16  # autocast is on
    hook.remove()
    assert set(terms) == {"imitation", "balance", "contrastive"}
    for value in [*terms.values(), *metrics.values()]:
        assert value.dtype == torch.float32 and value.shape == ()
    torch.set_rng_state(seen["random"])  # the same noise of Eq. 14
    before = copy.deepcopy(seen["twin"])
    want = seen["twin"](*seen["inputs"])
    for name in ("balance", "contrastive"):
        assert want.losses[name] > 0
        near(terms[name], want.losses[name])
    near(metrics["info_nce"], want.metrics["info_nce"])
    tau = seen["inputs"][0][:, seen["inputs"][1].prompt].double().mean(1).float()  # Eq. 7's h_bar
    if routing != "token":
        loss, _ = before.task_router.contrast(before.center(tau), batch.task)
        near(metrics["info_nce"], loss)


# ---------------------------------------------------------------------------------------- training
def train_step(tiny, batch):
    terms, _ = tiny.losses(batch)
    sum(terms.values()).backward()
    return terms["imitation"].item()


@pytest.mark.parametrize("moe, routing", CAUSAL + EQ4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_but_the_key_router_is_trained(layout, moe, routing):
    tiny = method(layout, token_shift=True, moe=moe, routing=routing, momentum=0.75)
    model = toys.stir(tiny.model).train()
    train_step(tiny, draw(model, rows=4))
    parameters = dict(model.named_parameters())
    idle = {k for k, p in parameters.items() if p.grad is None or p.grad.abs().max() == 0}
    frozen = {k for k, p in parameters.items() if not p.requires_grad}
    assert idle == frozen == {k for k in parameters if ".task_router.key." in k}
    assert len(idle) == (2 if model.cfg.has_task_moe else 0)
    if model.cfg.has_task_moe:
        router = model.blocks[-1].ff.task_router
        router.query.second.weight.data += 1
        model.update_key_router()  # Eq. 8
        near(router.key.second.weight, router.query.second.weight - 0.75)
        batch = draw(model)
        batch.task = torch.tensor([0, 1])
        output = model(batch)  # no positives, no Eq. 7
        assert output.losses["contrastive"] == output.metrics["accuracy"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eval_mode_is_deterministic_and_train_mode_is_noisy(layout):
    for moe, dropout, noisy in (
        ("both", 0.0, True),
        ("token", 0.0, True),
        ("task", 0.0, False),
        ("none", 0.3, True),
    ):
        model = toys.build(layout, moe=moe, dropout=dropout)
        batch = draw(model)
        quiet = model(batch)
        assert torch.equal(quiet.action, model(batch).action)
        assert quiet.losses.get("balance", 0) == 0
        loud = model.train()(batch)  # the noise of Eq. 14, or dropout
        assert torch.equal(loud.action, model(batch).action) != noisy
        assert bool(loud.losses.get("balance", 0) > 0) == (moe in ("both", "token"))


@pytest.mark.parametrize(
    "layout, family", [*product(LAYOUTS, [GRID]), ("ad", PLANE), ("last", PLANE)]
)
def test_one_batch_is_learnt_by_heart(layout, family):
    tiny = method(layout, family, layers=2, width=32, ff=64)
    model = tiny.model.train()
    batch = draw(model, rows=4, queries=3 if layout == "last" else 1)
    if layout == "last":  # all rows ask the same: the prompt must tell them apart
        batch.query_states[:] = batch.query_states[:1].clone()
    elif family is GRID:  # rows begin differently: nothing else is known at the first read-out
        first = batch.prompt.states if layout == "ad" else batch.query_states
        first[:, 0] = torch.arange(4)[:, None]
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(train_step(tiny, batch))
        optimizer.step()
    assert losses[0] > 0.3 and sum(losses[-10:]) / 10 < 0.02
    action = model.eval()(batch).action
    label = batch.prompt.actions if layout == "ad" else batch.query_actions
    right = action.argmax(-1) == label if family is GRID else (action - label).abs() < 0.2
    assert right.all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="half precision is for CUDA devices")
@pytest.mark.parametrize("layout, moe", [*product(LAYOUTS, ("none", "both"))])
def test_cuda_half_precision_is_near_full_precision(layout, moe):
    results = []
    for half in (False, True):
        tiny = method(layout, PLANE, moe=moe)
        tiny.model.cuda()
        batch = draw(tiny.model, rows=4).to("cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            action = tiny.model(batch).action
            terms, _ = tiny.losses(batch)
        sum(terms.values()).backward()
        trained = [p.grad for p in tiny.model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in trained)
        first = tiny.model.embed_state.weight.grad
        results.append((action.float(), terms["imitation"], first))
    if moe == "none":  # with experts, rounding may change who is chosen
        assert_close(*results, atol=0.05, rtol=0.05)
