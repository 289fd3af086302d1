"""diagnostics.py: does routing work, and what has the policy learned? (paper Sec. 5.4, Fig. 1; App. C)

in : a model, a dataset          out: a row of numbers for train.csv
Read beside train.py.

Nothing here trains. All numbers are on fresh draws, in eval mode (no router noise), with a random stream
of their own, so that looking does not change a run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data import Dataset, sample_ad, sample_dpt
from families.posterior import divergence
from models import T2MIR, Output


def mutual_information(joint: Tensor) -> float:
    """I(X; Y) in bits from counts (X, Y)."""
    p = joint.double() / joint.sum()
    outer = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    return (
        torch.special.xlogy(p, p / outer.clamp_min(1e-300)).sum().item()
        / torch.log(torch.tensor(2.0)).item()
    )


def modality_counts(out: Output, experts: int) -> Tensor:
    """How often the best token expert of a state, action and reward token is each: (3, K_1).

    Query tokens are left out: their modality is a state's.
    """
    counts = torch.zeros(3, experts)
    for modality in range(3):
        chosen = out.token_expert[:, out.modality == modality, 0]
        counts[modality] = torch.bincount(chosen.flatten(), minlength=experts).cpu()
    return counts


def least_share(kept: Tensor, experts: int) -> float:
    """The least used expert's share of all kept choices; 1 / experts at best, 0 for a dead one."""
    used = torch.bincount(kept.flatten(), minlength=experts)
    return (used / used.sum()).min().item()


def sample(dataset: Dataset, cfg, rows: int, draws: int, rng: torch.Generator):
    """A fresh batch of the run's own kind; queries see the whole prompt."""
    episodes = cfg.prompt_length // dataset.spec.horizon
    if cfg.backbone == "ad":
        return sample_ad(dataset, rows, episodes, draws, rng)
    batch = sample_dpt(
        dataset, rows, episodes, draws, rng, queries=32 if cfg.query_position == "last" else 1
    )
    batch.visible.fill_(cfg.prompt_length)
    return batch


@torch.no_grad()
def probe(
    model: T2MIR, dataset: Dataset, cfg, seed: int, device, rows: int = 64
) -> dict[str, float]:
    """One row of numbers: contrastive loss and accuracy beside its chance, what the token expert tells of
    the modality (bits, log2 3 = 1.58 at most), the least used expert's share of both MoEs, and for DPT on
    DarkRoom the divergence from the exact posterior with and without a reward in the prompt (nats).
    """
    rng = torch.Generator().manual_seed(1_000_003 * (seed + 1))
    batch = sample(dataset, cfg, min(rows, 2 * dataset.tasks), 2, rng).to(device)
    was_training = model.training
    model.eval()
    out = model(batch)
    model.train(was_training)
    found = {}
    if out.token_expert is not None:
        counts = modality_counts(out, cfg.token_experts)
        found["token_mi"] = mutual_information(counts)
        found["token_least"] = least_share(out.token_expert, cfg.token_experts)
    if out.task_expert is not None:
        found["task_least"] = least_share(out.task_expert, cfg.task_experts)
        found["contrastive_fresh"] = out.contrastive.item()
        found["accuracy_fresh"] = out.accuracy.item()
        found["chance"] = 1 / (len(batch.task) - 1)
    if cfg.backbone == "dpt" and cfg.env == "darkroom":
        log_policy = out.action.log_softmax(-1)
        if cfg.query_position == "first":
            log_policy = log_policy[:, -1:]
        kl, rewarded = divergence(
            batch.prompt.to("cpu"), batch.query_states.cpu(), log_policy.float().cpu()
        )
        found["kl_reward"] = kl[rewarded].mean().item() if rewarded.any() else float("nan")
        found["kl_no_reward"] = kl[~rewarded].mean().item() if (~rewarded).any() else float("nan")
    return found
