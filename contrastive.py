"""contrastive.py: the task router's contrastive loss (paper Sec. 4.2, App. C; Eq. 5-8, Theorem 1).

in : h_bar (B, D) mean hidden state of each trajectory, task id (B,)   out: z (B, K), InfoNCE loss
Read after router.py.        Try: python contrastive.py   (Theorem 1 in exact numbers)

Differs from the paper: nothing by default (`center` is a switch).
Differs from the official code: Eq. 7 sums over *all* positives of a
query; there only one counts, and other draws of the same task would count as negatives.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from router import Router
from support.distributed import gather


def eq7_info_nce(query: Tensor, key: Tensor, w: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    """L = -log( sum_{+} exp(z_i W z_+) / (sum_{+} exp(z_i W z_+) + sum_{-} exp(z_i W z_-)) )   (Eq. 7)

    `query`, `key` (m, K) of the same m trajectories, W (K, K), `task` (m,) int. The keys of query i are
    all trajectories but i itself; those of its own task are its positives. Returns the mean loss over
    the queries that have a positive, and the accuracy: how often the best-scored key is a positive
    (chance: positives / keys). Both float32, in log space, so that no score overflows.

    Raises ValueError when no query has a positive (every task was drawn once).
    """
    same = task[:, None] == task[None, :]
    itself = torch.eye(len(task), dtype=torch.bool, device=task.device)
    positive = same & ~itself
    has = positive.any(1)
    if not has.any():
        raise ValueError("Eq. 7 needs at least two trajectories of a task in a batch")
    score = (query.float() @ w.float() @ key.float().T).masked_fill(itself, -math.inf)  # (m, m)
    above = score.masked_fill(~positive, -math.inf)[has].logsumexp(1)
    loss = (score[has].logsumexp(1) - above).mean()
    best = score[has].argmax(1, keepdim=True)
    return loss, positive[has].gather(1, best).float().mean()


@torch.no_grad()
def eq8_momentum_update(key: nn.Module, query: nn.Module, beta: float) -> None:
    """G_k <- beta * G_k + (1 - beta) * G_q   (Eq. 8), in place; called after the optimiser's step."""
    for slow, fast in zip(key.parameters(), query.parameters(), strict=True):
        slow.lerp_(fast, 1 - beta)


class TaskRouter(nn.Module):
    """Query router G_q (trained), key router G_k (Eq. 8, never trained) and the W of Eq. 7.

    `z` of Sec. 4.2 is the router's logits. The key router reads the same h_bar without gradient.

    `center`: mean hidden states of different trajectories are nearly the same vector, so that their logits,
    and with them the kept experts, are nearly the same for every task. With it h_bar is centred and scaled by
    running statistics over the trajectories of the training batches; without it (the paper says nothing of
    it) h_bar is read as it is.
    """

    def __init__(self, width: int, experts: int, center: bool = False):
        super().__init__()
        self.query = Router(width, experts)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        # The paper gives no initial W. Starting from the mean product of z's numbers, similar is similar from the
        # first step; a random W of unit scale makes the loss tens of nats and its gradient drown all others.
        self.w = nn.Parameter(torch.eye(experts) / experts)
        self.center = center
        if center:
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("variance", torch.ones(()))
            self.register_buffer("batches", torch.zeros(()))

    def normal(self, h_bar: Tensor) -> Tensor:
        if not self.center:
            return h_bar
        return (h_bar.float() - self.mean) * (self.variance + 1e-6).rsqrt()

    def forward(self, h_bar: Tensor) -> Tensor:
        """h_bar (..., D) -> logits (..., K) for the gate of Eq. 4."""
        return self.query(self.normal(h_bar))

    def contrast(self, h_bar: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, accuracy) of Eq. 7 over the batch: h_bar (B, D), or h (B, S, D) of every token, whose logits
        are then averaged (the official code's form, `routing=token`). Zeros when every task was drawn once.
        """
        seen = self.normal(h_bar)
        with torch.no_grad():
            key = self.key(seen)
        query = self.query(seen)
        if h_bar.dim() == 3:
            query, key = query.mean(1), key.mean(1)
        if self.training:  # in eval mode one process looks alone: no collectives
            if self.center:
                self.observe(h_bar)
            query, key, task = gather(query), gather(key), gather(task)
        if len(task.unique()) == len(task):  # every task once: nothing to contrast
            return query.new_zeros(()), query.new_zeros(())
        return eq7_info_nce(query, key, self.w, task)

    @torch.no_grad()
    def observe(self, h_bar: Tensor) -> None:
        """Running mean of each channel and one variance for all, over the last 10 batches or so: early in
        training h_bar drifts much faster than it varies.
        """
        h = gather(h_bar.detach().float().flatten(0, -2))
        self.batches += 1
        rate = (1 / self.batches).clamp_min(0.1)
        self.variance.lerp_((h - h.mean(0)).square().mean(), rate)
        self.mean.lerp_(h.mean(0), rate)

    def update_key(self, beta: float) -> None:
        eq8_momentum_update(self.key, self.query, beta)


# ------------------------------------------------------------------ Theorem 1 on a distribution one can count
def symmetric_channel_information(n: int, error: float) -> float:
    """I(z; M) in nats, in closed form: M uniform over n tasks, z = M but for an error spread evenly."""
    information = math.log(n)
    if error > 0:
        information += error * math.log(error / (n - 1))
    if error < 1:
        information += (1 - error) * math.log(1 - error)
    return information


def eq6_bound(n: int, error: float, size: int) -> float:
    """log N + E[log e(h, z) / sum_{M'} e(h', z)]   (Eq. 6), exactly, for a set of N = `size` tasks.

    Toy: h_bar names its task M (uniform over n); z = M with probability 1 - error, else any other
    symbol; e(h, z) = p(z|h) / p(z) takes two values. The N - 1 other tasks are independent, so the
    number of them that equal z is binomial: the expectation is a finite sum.
    """
    hit, miss = n * (1 - error), n * error / (n - 1)
    total = 0.0
    for own, chance in ((hit, 1 - error), (miss, error)):
        for j in range(size):
            weight = math.comb(size - 1, j) * (1 / n) ** j * (1 - 1 / n) ** (size - 1 - j)
            if chance > 0 and weight > 0:
                total += chance * weight * math.log(own / (own + j * hit + (size - 1 - j) * miss))
    return math.log(size) + total


if __name__ == "__main__":
    n, error = 20, 0.1
    print(f"I(z; M) = {symmetric_channel_information(n, error):.4f} nats (closed form)")
    for size in (2, 4, 8, 16, 32, 64, 128, 256):
        print(f"N = {size:3d}: bound of Eq. 6 = {eq6_bound(n, error, size):.4f}")
