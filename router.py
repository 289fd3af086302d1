"""router.py: who goes to which expert (paper Sec. 3.2, 4.1, App. B, App. F; Eq. 1, 3, 12-18).

in : h (..., D) hidden states after self-attention      out: `Routing`: kept experts and their weights
Read first; then moe.py.

Shape legend: N tokens (or sequences), D width, K experts, k kept.
    G(i|h)  `clean`   logits of the router                                 (N, K)
    sigma   `std`     Softplus(h W_noise) + floor, scale of the noise      (N, K)
    H(i|h)  `noisy`   G + StandardNormal() * sigma, before top-k           (N, K)

Differs from the paper: a floor (0.01) under sigma, so that Eq. 16 never divides by zero.
Differs from the official code: Eq. 15 compares the *noisy logit* with the bar that leaves the expert
itself out; there the noise alone is compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.distributed import normal_like, total

NOISE_FLOOR = 0.01


@dataclass
class Routing:
    """What a gate decided for N tokens (or sequences)."""

    index: Tensor  # (N, k) int64, kept experts, best first
    weight: Tensor  # (N, k) float32, rows sum to 1                              (Eq. 1)


def eq1_top_k_gate(logits: Tensor, k: int) -> Routing:
    """w(i; x) = softmax(topk(G(x)))[i]   (Eq. 1; the gates of Eq. 2 and 4)

    `logits` (..., K) -> index, weight (..., k). The softmax runs over the k kept logits alone, which is
    the same as setting the others to minus infinity: experts that are not kept weigh exactly 0.
    """
    top = logits.float().topk(k, dim=-1)
    return Routing(top.indices, top.values.softmax(-1))


def eq14_noisy_logits(clean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """H(i|h) before top-k = G(i|h) + StandardNormal() * Softplus(h W_noise)_i   (Eq. 14), all (N, K)."""
    return clean + noise * std


def dense_gates(routing: Routing, experts: int) -> Tensor:
    """Kept weights (N, k) scattered into (N, K); every other gate is 0."""
    empty = routing.weight.new_zeros(*routing.weight.shape[:-1], experts)
    return empty.scatter(-1, routing.index, routing.weight)


def eq12_importance(gates: Tensor) -> Tensor:
    """Imp(i) = sum over tokens of the gate of expert i   (Eq. 12): (N, K) -> (K,)."""
    return gates.sum(0)


def eq16_probability(clean: Tensor, noisy: Tensor, std: Tensor, k: int) -> Tensor:
    """P(i; h) = Phi((G(i|h) - kth_excluding(H(.|h), k, i)) / sigma_i(h))   (Eq. 15, 16): (N, K), k < K.

    The chance that expert i stays among the k best if its own noise alone were drawn anew.
    """
    top = noisy.topk(k + 1, dim=-1).values  # (N, k+1), best first
    kth, next_best = top[:, k - 1 : k], top[:, k:]
    # Leave expert i out of the ranking: where it was kept, the bar drops to the next-best logit.
    bar = torch.where(noisy > next_best, next_best, kth)  # (N, K)
    return torch.special.ndtr((clean - bar) / std)


def eq17_load(probability: Tensor) -> Tensor:
    """Load(i) = sum over tokens of P(i; h)   (Eq. 17): (N, K) -> (K,). Its entries sum to about k * N."""
    return probability.sum(0)


def cv_squared(x: Tensor) -> Tensor:
    """CV(x)^2: variance over squared mean of the K entries of x; 0 when they are equal."""
    return x.var(unbiased=False) / (x.mean() ** 2 + 1e-10)


def eq13_importance_loss(importance: Tensor, w_imp: float) -> Tensor:
    """w_imp * CV(Imp)^2   (Eq. 13)."""
    return w_imp * cv_squared(importance)


def eq18_load_loss(load: Tensor, w_load: float) -> Tensor:
    """w_load * CV(Load)^2   (Eq. 18)."""
    return w_load * cv_squared(load)


def eq3_balance_loss(importance: Tensor, load: Tensor, w_imp: float, w_load: float) -> Tensor:
    """L_balance = w_imp * CV(Imp)^2 + w_load * CV(Load)^2   (Eq. 3)."""
    return eq13_importance_loss(importance, w_imp) + eq18_load_loss(load, w_load)


class Router(nn.Module):
    """App. F: two linear layers without bias, Tanh between; (..., D) -> logits (..., K), float32."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.first = nn.Linear(width, experts, bias=False)
        self.second = nn.Linear(experts, experts, bias=False)
        # The paper gives no initial scale. With the usual small one the logits drown in the noise of Eq. 14,
        # whose scale starts at 0.7: routing is then uniformly random, which Eq. 3 finds perfectly balanced.
        nn.init.normal_(self.first.weight, std=width**-0.5)
        nn.init.normal_(self.second.weight, std=4 * experts**-0.5)

    def forward(self, h: Tensor) -> Tensor:
        # Routing is a discrete choice: autocast to bf16 would flip near-ties, so it runs in fp32.
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(torch.tanh(F.linear(h.float(), self.first.weight)), self.second.weight)


class NoisyTopKRouter(nn.Module):
    """The gate of the token-wise MoE: Eq. 2 with the noise of Eq. 14 while training, and Eq. 3's loss.

    forward: h (N, D) -> (Routing, logits (N, K), balance loss ()). In eval mode there is no noise and
    the loss is 0. W_noise starts at zero: sigma starts at softplus(0) = 0.69 for every token.
    """

    def __init__(self, width: int, experts: int, k: int, w_imp: float, w_load: float):
        super().__init__()
        self.router = Router(width, experts)
        self.noise_weight = nn.Parameter(torch.zeros(width, experts))
        self.k, self.experts, self.w_imp, self.w_load = k, experts, w_imp, w_load

    def forward(self, h: Tensor) -> tuple[Routing, Tensor, Tensor]:
        clean = self.router(h)
        if not self.training:
            return eq1_top_k_gate(clean, self.k), clean, clean.new_zeros(())
        with torch.autocast(h.device.type, enabled=False):
            std = F.softplus(h.float() @ self.noise_weight) + NOISE_FLOOR
            noisy = eq14_noisy_logits(clean, std, normal_like(clean))
            routing = eq1_top_k_gate(noisy, self.k)
            importance = total(eq12_importance(dense_gates(routing, self.experts)))
            if self.k == self.experts:  # everyone is always kept: the load is equal by construction
                load = torch.ones_like(importance)
            else:
                load = total(eq17_load(eq16_probability(clean, noisy, std, self.k)))
            return routing, clean, eq3_balance_loss(importance, load, self.w_imp, self.w_load)
