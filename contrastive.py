"""contrastive.py: the task router and its loss (paper Sec. 4.2, App. C; Eq. 5-8, Theorem 1).

in : h_bar (B, D), the mean hidden state of each trajectory, and the number of its task (B,)
out: z (B, K), the loss of Eq. 7 and how often it is right
Read after router.py, before moe.py.          Try: python contrastive.py   (Theorem 1 in numbers)

The idea: a router that knows the task sends its trajectories to experts of their own. Eq. 5 asks
for the mutual information I(z; M) of router output and task. Nobody can compute that, but Eq. 6
bounds it from below, and Eq. 7 is that bound over a batch: two trajectories of one task must be
told from all others.

    paper             here           shape    what it is
    z_i = G(.|h_bar)  query          (m, K)   the query router's logits for trajectory i
    k_+, k_-          key            (m, K)   the key router's logits: same task, other task
    W                 w              (K, K)   learned; the score of a pair is z_i W z_j
    M_j               task           (m,)     the task of each trajectory
    G^q, G^k          query, key (modules)    trained by gradient; a slow copy of it (Eq. 8)
    beta              beta                    the share that the copy keeps of itself

    m trajectories (rows) in a batch over all processes, B of them in this one, K experts, D width

Where the paper says two things: the text before Eq. 7 takes *all* other trajectories as keys,
    Algorithms 1 and 3 a key batch B'. `keys` chooses: "all" (the default, in every preset) is the
    text, "other" the algorithms and the official code. Half the negatives: about ln 2 less loss.
Where the paper is silent: W starts at 1/K times the identity (see `TaskRouter`).
Where this departs from the official code: Eq. 7 sums over *all* positives of a query. There one
    counts; further draws of its task (where batch/2 exceeds the tasks) count as negatives.
The preset `cpu` also centres h_bar, which the paper does not: moe.py, `Center`.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn

from router import Router, Routing, biased_top_k_gate, eq1_top_k_gate, full_precision
from support.distributed import all_gather_rows, all_reduce_sum

Keys = Literal["all", "other"]  # which keys a query is compared with; see `eq7_pairs`


# -------------------------------------------------------------------------------------------- Eq. 7
def eq7_pairs(
    task: Int[Tensor, " m"], keys: Keys = "all"
) -> tuple[Bool[Tensor, "m m"], Bool[Tensor, "m m"]]:
    """Who is compared with whom: (is j a key of query i, is it a positive one), both [i, j].

    keys="all": the keys of a query are all other trajectories of the batch (the text before Eq. 7).
    keys="other": the rows at even places form one batch, those at odd places the other, and the
    keys of a query are the rows of the other batch alone (B' of Algorithms 1 and 3). The samplers
    draw each task twice in a row, tau_i and tau'_i, so that a query has 1 positive and m/2 - 1
    negatives; and as each half is the other's key batch, no row is spent on being a key only.
    """
    place = torch.arange(len(task), device=task.device)
    if keys == "other":
        place = place % 2  # 0: the query batch B, 1: the key batch B', and the other way round
    is_key = place[:, None] != place[None, :]  # "all": any place but its own
    same_task = task[:, None] == task[None, :]  # i* in M_j; all other keys are negatives
    return is_key, is_key & same_task


def eq7_info_nce(
    query: Float[Tensor, "m K"],
    key: Float[Tensor, "m K"],
    w: Float[Tensor, "K K"],
    task: Int[Tensor, " m"],
    keys: Keys = "all",
) -> tuple[Float32[Tensor, ""], Float32[Tensor, ""]]:
    """L = -log( sum_+ exp(z_i W z_+) / (sum_+ exp(z_i W z_+) + sum_- exp(z_i W z_-)) )   (Eq. 7)

    `query` and `key` are of the same m trajectories. Returns the mean loss over the queries that
    have a positive, and the accuracy: how often the key with the best score is a positive one (by
    chance: positives / keys). Both are computed in float32, also under autocast, and 0 when no
    query has a positive (every task was drawn once).
    """
    is_key, positive = eq7_pairs(task, keys)
    # A row whose task was drawn once has nothing to find: it serves as a key, but asks nothing.
    asks = positive.any(1)
    if not asks.any():  # nothing to find
        nothing = torch.zeros((), device=query.device)
        return nothing, nothing
    # Scores can be large with small differences between them: bfloat16 would round those away.
    with full_precision(query):
        score = query.float() @ w.float() @ key.float().T  # (m, m): z_i W z_j
    # exp(-inf) = 0: what is masked drops out of a sum of exponentials. Sums stay in log space
    # (logsumexp), where a score of 1000 does not overflow:
    #     -log(sum_+ / sum_all) = log sum_all - log sum_+
    score = score.masked_fill(~is_key, -math.inf)
    above = score.masked_fill(~positive, -math.inf)[asks].logsumexp(1)  # the numerator of Eq. 7
    loss = (score[asks].logsumexp(1) - above).mean()  # the denominator minus it
    best = score[asks].argmax(1, keepdim=True)  # the key that the router takes for a positive one
    return loss, positive[asks].gather(1, best).float().mean()


# -------------------------------------------------------------------------------------------- Eq. 8
@torch.no_grad()
def eq8_momentum_update(key: nn.Module, query: nn.Module, beta: float) -> None:
    """G_k <- beta * G_k + (1 - beta) * G_q   (Eq. 8), in place; called after the optimiser's step.

    Keys that move slowly are a steady target: the query router cannot chase its own tail.
    """
    for slow, fast in zip(key.parameters(), query.parameters(), strict=True):
        slow.lerp_(fast, 1 - beta)  # slow + (1 - beta) * (fast - slow)


# ---------------------------------------------------------------------------------- the task router
class TaskRouter(nn.Module):
    """Query router G_q (trained), key router G_k (Eq. 8, never trained) and the W of Eq. 7.

    The query router has two duties, which is the point of Sec. 4.2: its logits are the gate's (Eq.
    4) and, as z, what Eq. 7 trains to tell tasks apart.
    """

    def __init__(self, width: int, experts: int, keys: Keys = "all", balance: float = 0.0):
        """`balance`: how far an expert's bias moves in a step (--task-balance; 0: the paper)."""
        super().__init__()
        self.balance = balance
        if balance:
            self.register_buffer("bias", torch.zeros(experts))
        self.query = Router(width, experts)
        # A copy, as in MoCo: queries and keys speak the same language from the first step.
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        # The paper gives no initial W. Starting from the mean product of z's numbers, similar is
        # similar from the first step; a random W of unit scale (the official code's) makes the loss
        # tens of nats, and its gradient drowns all others.
        self.w = nn.Parameter(torch.eye(experts) / experts)
        self.keys = keys

    def forward(self, h_bar: Float[Tensor, "*B D"]) -> Float32[Tensor, "*B K"]:
        """h_bar (..., D) -> logits (..., K) for the gate of Eq. 4."""
        return self.query(h_bar)  # the key router has no part in the policy

    def gate(self, h_bar: Float[Tensor, "*B D"], k: int) -> Routing:
        """w_task(i; h_bar) of Eq. 4: the k experts that are kept, and their weights.

        With `balance`, experts that were kept less often than the mean in a training batch become
        a little easier to keep, the others harder.
        """
        logits = self(h_bar)
        if not self.balance:
            return eq1_top_k_gate(logits, k)
        routing = biased_top_k_gate(logits, self.bias, k)
        if self.training:
            kept = torch.bincount(routing.index.flatten(), minlength=len(self.bias)).float()
            kept = all_reduce_sum(kept)
            # A new tensor, not a changed one: the backward pass of this batch may read the old.
            self.bias = self.bias + self.balance * (kept.mean() - kept).sign()
        return routing

    def contrast(
        self, h_bar: Float[Tensor, "B *S D"], task: Int[Tensor, " B"]
    ) -> tuple[Float32[Tensor, ""], Float32[Tensor, ""]]:
        """(loss, accuracy) of Eq. 7 over the batch; zeros when no task was drawn twice.

        h_bar (B, D); or the hidden states of all tokens, (B, S, D), whose logits are then averaged.
        """
        with torch.no_grad():  # "only query parameters are updated through backpropagation"
            key = self.key(h_bar)
        query = self.query(h_bar)
        if h_bar.dim() == 3:  # one z for a trajectory, from the logits of all its tokens
            key, query = key.mean(1), query.mean(1)
        if self.training:
            # Negatives are the whole batch's, over all processes: the bound of Eq. 6 tightens with
            # their number. (In eval mode one process looks alone: it would wait for the others.)
            query, key, task = (all_gather_rows(rows) for rows in (query, key, task))
        return eq7_info_nce(query, key, self.w, task, self.keys)


# -------------------------------------------------- Theorem 1 on a distribution that can be counted
def symmetric_channel_information(n: int, error: float) -> float:
    """I(z; M) of Eq. 5 in nats, in closed form: M uniform over n tasks, z = M but for rare errors.

    With the chance `error`, z is any of the n - 1 other tasks, all equally likely.
    """
    information = math.log(n)  # the entropy of z; below, minus what is left of it when M is known
    if error > 0:  # x log x is 0 at 0, where Python's log fails
        information += error * math.log(error / (n - 1))
    if error < 1:
        information += (1 - error) * math.log(1 - error)
    return information


def eq6_bound(n: int, error: float, size: int) -> float:
    """log N + E[log e(h, z) / sum_{M'} e(h', z)]   (Eq. 6), exactly, for a set of N = `size` tasks.

    The same toy: h_bar names its task M; e(h, z) = p(z|h) / p(z) then takes two values only. The
    N - 1 other tasks of the set are independent of M, so the number of them that equal z is
    binomial, and the expectation is a finite sum.
    """
    hit = n * (1 - error)  # e(h, z) of a task that equals z: p(z|h) = 1 - error, p(z) = 1/n
    miss = n * error / (n - 1)  # of any other
    expectation = 0.0
    for e_true, chance in ((hit, 1 - error), (miss, error)):  # z names the true task, or does not
        for hits in range(size):  # how many of the N - 1 others equal z
            ways = math.comb(size - 1, hits)
            weight = ways * (1 / n) ** hits * (1 - 1 / n) ** (size - 1 - hits)  # binomial
            e_others = hits * hit + (size - 1 - hits) * miss  # their part of the sum over M'
            if chance > 0 and weight > 0:  # what cannot happen has no logarithm
                expectation += chance * weight * math.log(e_true / (e_true + e_others))
    return math.log(size) + expectation  # log N is the most that N tasks can tell apart


if __name__ == "__main__":
    n, error = 20, 0.1  # twenty tasks; z names the wrong one at every tenth trajectory
    print(f"I(z; M) = {symmetric_channel_information(n, error):.4f} nats (closed form)")
    for size in (2, 4, 8, 16, 32, 64, 128, 256):
        print(f"N = {size:3d}: bound of Eq. 6 = {eq6_bound(n, error, size):.4f}")
