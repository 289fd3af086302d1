"""diagnostics.py: does routing work, and what has the policy learned? (Sec. 5.4, Fig. 1; App. C)

in : a method, a dataset          out: numbers for a row of train.csv
Read beside train.py.

Nothing here trains. All numbers are on new draws of the training data, whose episodes have been
trained on, in eval mode (no router noise), with a random stream of their own, so that looking does
not change a run. Which numbers there are, a method says (`Method.probe`); here are those that AD
and DPT share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contrastive import Keys
from data import Dataset, Prompt
from envs import Family
from methods import Method
from models import ModelSettings, Output


@torch.no_grad()
def probe(method: Method, dataset: Dataset, seed: int, rows: int = 64) -> dict[str, float]:
    """The method's numbers on up to `rows` prompts, two of each task."""
    # far from the seeds of the batches: other prompts of the same episodes than those of a step
    rng = torch.Generator().manual_seed(1_000_003 * (seed + 1) % 2**63)
    was_training = method.model.training
    method.model.eval()
    numbers = method.probe(dataset, min(rows, 2 * dataset.tasks), rng)
    method.model.train(was_training)
    return numbers


def mutual_information(joint: Tensor) -> float:
    """I(X; Y) in bits from counts (X, Y)."""
    p = joint.double() / joint.sum()  # p(x, y)
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)  # p(x) p(y)
    # xlogy is 0 where p is: pairs that never came add nothing, and divide by no zero
    nats = torch.special.xlogy(p, p / independent.clamp_min(1e-300)).sum().item()
    return nats / math.log(2)  # bits: two modalities told apart are one bit


def modality_counts(token_expert: Tensor, modality: Tensor, experts: int) -> Tensor:
    """How often the best token expert of a state, action and reward token is each: (3, K_1).

    `token_expert` (B, S, k), best first; `modality` (S,). Queries, of modality 3, are left out.
    """
    counts = torch.zeros(3, experts)
    for which in range(3):
        chosen = token_expert[:, modality == which, 0]  # the best of the k kept ones
        counts[which] = torch.bincount(chosen.flatten(), minlength=experts).cpu()
    return counts


def loads(which: str, kept: Tensor, experts: int) -> dict[str, float]:
    """The load of each expert: its share of all choices kept; the loads sum to 1, of however many
    k a token keeps. With the least of them (1 / experts at best, 0 for a dead one) and their
    entropy in bits (log2 experts at best, 0 if one expert has everything).
    """
    used = torch.bincount(kept.flatten(), minlength=experts).double()
    load = used / used.sum()
    entropy = torch.special.entr(load).sum().item() / math.log(2)  # entr: -p ln p, 0 where p is
    each = {f"{which}_load_{i}": share for i, share in enumerate(load.tolist(), 1)}
    return {f"{which}_least": load.min().item(), f"{which}_entropy": entropy, **each}


def chance(keys: Keys, rows: int, alike: float = 2) -> float:
    """Positives over keys of a query of Eq. 7 that knows nothing: of `rows` trajectories, `alike`
    of each task. Its keys are all other rows, or the other half of the batch.
    """
    return alike / rows if keys == "other" else (alike - 1) / max(1, rows - 1)


def routing(output: Output, cfg: ModelSettings, rows: int) -> dict[str, float]:
    """What the token expert tells of the modality (bits; log2 3 = 1.58 at most), the loads of the
    experts of both MoEs, and Eq. 7 and its accuracy on new draws beside chance.
    """
    numbers: dict[str, float] = {}
    moe = output.moe
    if moe is None:
        return numbers
    if moe.token_expert is not None:
        counts = modality_counts(moe.token_expert, output.modality, cfg.token_experts)
        # one number in place of 3 K_1: the share of every modality in every expert's tokens
        numbers["token_mi"] = mutual_information(counts)
        numbers |= loads("token", moe.token_expert, cfg.token_experts)
    if moe.task_expert is not None:
        numbers |= loads("task", moe.task_expert, cfg.task_experts)
        # Without noise and on other pairs than a batch's. They are not held out: where a prompt is
        # one episode (DPT's are mostly), that episode has been a prompt of training too.
        numbers["contrastive_fresh"] = moe.metrics["info_nce"].item()
        numbers["accuracy_fresh"] = moe.metrics["accuracy"].item()
        numbers["chance"] = chance(cfg.keys, rows)
    return numbers


def divergence(
    family: Family, prompt: Prompt, states: Tensor, log_policy: Tensor
) -> dict[str, float]:
    """KL(exact posterior || policy) in nats, with and without a reward in the prompt."""
    kl, rewarded = family.divergence(prompt.to("cpu"), states, log_policy.float().cpu())
    # Apart, because they are two abilities: to go where a reward was, and to look where nobody was.
    numbers = {}
    for name, which in (("kl_reward", rewarded), ("kl_no_reward", ~rewarded)):
        numbers[name] = kl[which].mean().item() if which.any() else math.nan
    return numbers
