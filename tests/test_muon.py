"""Muon: torch's own on single matrices, stacks as their parts, a run that continues."""

import os
import signal

import pytest
import torch
from test_checkpoint import in_step
from tiny import differing, tensors, trainer

from config import Training
from dpt import DPTModel
from envs import get_family
from methods import MUON_TAKES, adamw
from methods import muon as make
from models import ModelSettings
from support import muon


def walk(optimizer, weights, steps=3):
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=rng)
        optimizer.step()


def test_orthogonal_keeps_the_directions_and_makes_all_of_them_alike():
    for shape in ((16, 64), (64, 16), (2, 3, 8, 24)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        y = muon.orthogonal(x)
        # U^T Y V is diagonal: what was one direction still is; 0.6 to 1.2 instead of 0.1 to 12
        core = u.mT @ y @ vt.mT
        diagonal = core.diagonal(dim1=-2, dim2=-1)
        assert ((diagonal > 0.6) & (diagonal < 1.25)).all()
        assert (core - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_a_single_matrix_moves_as_torch_has_it():
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    walk(muon.Muon([{"params": [ours]}], 1e-2, 0.95, 0.1), [ours])
    same = dict(lr=1e-2, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    walk(torch.optim.Muon([theirs], **same), [theirs])
    moved = (theirs - weight).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch's products are in bfloat16


def test_a_stack_and_parts_move_as_their_matrices_do():
    stack = torch.nn.Parameter(torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)))
    long = torch.nn.Parameter(stack.detach().reshape(24, 4).clone())
    each = [torch.nn.Parameter(part.clone()) for part in stack.detach()]
    grad = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1))
    stack.grad, long.grad = grad, grad.reshape(24, 4)
    for p, g in zip(each, grad, strict=True):
        p.grad = g
    groups = [{"params": [stack, *each]}, {"params": [long], "parts": 3}]
    muon.Muon(groups, 1e-2, 0.95, 0.0).step()
    assert torch.allclose(torch.stack(each), stack, atol=1e-6)
    assert torch.allclose(long.reshape(3, 8, 4), stack, atol=1e-6)


@pytest.mark.parametrize("moe", ["both", "none"])
def test_every_parameter_has_one_optimizer_and_the_rate_its_scale(moe):
    cfg = Training(optimizer="muon", muon_scale=4.0)
    model = DPTModel(ModelSettings(width=16, heads=2, moe=moe), get_family("darkroom"), True)
    optimizers = make(model, cfg)
    taken = [id(p) for o in optimizers.values() for g in o.param_groups for p in g["params"]]
    alone = adamw(model, cfg)
    assert sorted(taken) == sorted(id(p) for g in alone.param_groups for p in g["params"])
    assert {g["lr_scale"] for g in optimizers["muon"].param_groups} == {4.0}
    names = {name for name, _ in model.named_parameters() if MUON_TAKES.search(name)}
    assert any("weight1" in name for name in names) == (moe == "both")
    assert not any("router" in name or "norm" in name or "bias" in name for name in names)


def test_a_run_with_muon_continues_bit_for_bit(tiny_config, paper_folder, tmp_path, monkeypatch):
    with trainer(tiny_config) as fit:
        whole = fit(tmp_path / "whole", optimizer="muon", muon_scale=4.0, steps=6)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            in_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
            fit(tmp_path / "run", optimizer="muon", muon_scale=4.0, steps=6)
        fit(tmp_path / "run", optimizer="muon", muon_scale=4.0, steps=6, resume=True)
    assert differing(tmp_path / "run", whole) == []
    assert not tensors(tmp_path / "run")["optimizer.muon.0.momentum"].eq(0).all()
