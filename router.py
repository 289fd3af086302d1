"""router.py: which experts a token goes to (paper Sec. 3.2, 4.1, App. B, F; Eq. 1, 3, 12-18).

in : h (..., D), hidden states after self-attention
out: `Routing`: for each of them the k experts that are kept, and their weights; the loss of Eq. 3
Read first; then contrastive.py and moe.py.               Try: python router.py

    paper                  here            shape    what it is
    h                      h               (N, D)   N tokens (task-wise MoE: N mean tokens)
    G(i|h)                 clean           (N, K)   the router's logits, one for each expert
    W_noise                noise_weight    (D, K)   learned: how much noise this token deserves
    Softplus(h W_noise)_i  std             (N, K)   the scale (standard deviation) of that noise
    H(i|h), before top-k   noisy           (N, K)   G + StandardNormal() * std
    w(i; h)                Routing.weight  (N, k)   the softmax over the kept logits
    Imp, Load              importance, load  (K,)   how much, and how many tokens, an expert gets
    P(i; h)                probability     (N, K)   the chance that expert i is kept

    N tokens, D width, K experts (the paper's K_1 for tokens, K_2 for tasks), k kept experts

Where the paper is silent, and what is done here: the router's first weights (see `Router`); W_noise
starts at zero; CV takes the variance over K, not K - 1.
Where this departs from the paper: a floor (0.01) under std, so that Eq. 16 never divides by zero.
Where it departs from the official code: Eq. 15 compares the *noisy logit* with the bar that leaves
the expert itself out; there the noise alone is compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from support.distributed import all_reduce_sum, normal_like

NOISE_FLOOR = 0.01  # the smallest scale of the noise of Eq. 14; the paper has none


def full_precision(x: Tensor) -> torch.autocast:
    """A block in which matrix products stay float32, also inside a training step under autocast.

    `.float()` alone does not do it: autocast casts the operands of every product back to bfloat16.
    """
    # The experts and the attention, where the time goes, stay in bfloat16: they stand outside.
    return torch.autocast(x.device.type, enabled=False)


# ---------------------------------------------------------------------------- Eq. 1: the top-k gate
@dataclass
class Routing:
    """What a gate decided for N tokens (or sequences)."""

    index: Int64[Tensor, "*N k"]  # the kept experts, best first
    weight: Float32[Tensor, "*N k"]  # their weights w(i; h); a row sums to 1


def eq1_top_k_gate(logits: Float[Tensor, "*N K"], k: int) -> Routing:
    """w(i; x) = softmax(topk(G(x)))[i]   (Eq. 1; the gates of Eq. 2 and 4)

    `logits` (..., K) -> index, weight (..., k). The paper's topk sets the other logits to minus
    infinity, so that those experts weigh exactly 0: a softmax over the k kept logits is the same.
    """
    # In float32: bfloat16 has 8 bits of precision, so near-ties would change places.
    top = logits.float().topk(k, dim=-1)
    # Which experts are kept has no gradient. How much each weighs has one: it trains the router.
    return Routing(top.indices, top.values.softmax(-1))


def biased_top_k_gate(logits: Float[Tensor, "*N K"], bias: Float[Tensor, " K"], k: int) -> Routing:
    """As Eq. 1, but who is kept is decided by logits + bias; how much each weighs, by the logits.

    Not the paper's: the bias evens out how often experts are kept, without a loss whose gradient
    would speak against the others (Wang et al. 2024, "auxiliary-loss-free").
    """
    logits = logits.float()
    index = (logits + bias).topk(k, dim=-1).indices
    return Routing(index, logits.gather(-1, index).softmax(-1))


def dense_gates(routing: Routing, experts: int) -> Float32[Tensor, "*N K"]:
    """Kept weights (N, k) scattered into (N, K); the gates of all other experts are 0."""
    empty = routing.weight.new_zeros(*routing.weight.shape[:-1], experts)  # (N, K)
    return empty.scatter(-1, routing.index, routing.weight)  # keeps the gradient of the weights


# --------------------------------------------------------------------- Eq. 14: noise while training
def eq14_noise_scale(
    h: Float[Tensor, "N D"], noise_weight: Float[Tensor, "D K"]
) -> Float[Tensor, "N K"]:
    """Softplus(h W_noise)_i, the scale of the noise of Eq. 14 and the divisor of Eq. 16."""
    with full_precision(h):
        # Softplus keeps the scale positive, the floor keeps it from vanishing: Eq. 16 divides.
        return F.softplus(h.float() @ noise_weight) + NOISE_FLOOR


def eq14_noisy_logits(
    clean: Float[Tensor, "N K"], std: Float[Tensor, "N K"], noise: Float[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """H(i|h) before top-k = G(i|h) + StandardNormal() * Softplus(h W_noise)_i   (Eq. 14).

    Why noise: experts just below the bar are tried now and then, and the *number* of tokens of an
    expert, a step function of the logits, turns into a chance that has a gradient (Eq. 16).
    """
    # The noise is drawn outside: given it, H is smooth in std, so a gradient reaches W_noise.
    return clean + noise * std


# ----------------------------------------------- Eq. 12-18, 3: no expert may starve, none may hoard
def eq12_importance(gates: Float[Tensor, "N K"]) -> Float[Tensor, " K"]:
    """Imp(i) = sum over tokens of the gate of expert i   (Eq. 12).

    The paper writes G_tok(x|h) there, "the gate value for expert h given input x": w_tok of Eq. 14.
    """
    return gates.sum(0)  # the K sums are N together: the weights of each token sum to 1


def eq16_probability(
    clean: Float[Tensor, "N K"], noisy: Float[Tensor, "N K"], std: Float[Tensor, "N K"], k: int
) -> Float[Tensor, "N K"]:
    """P(i; h) = Phi((G(i|h) - kth_excluding(H(.|h), k, i)) / std_i(h))   (Eq. 15, 16); k < K.

    The chance that expert i is among the k best if its own noise alone were drawn anew. It is so if
    its new noisy logit exceeds a bar: the k-th best among the noisy logits of the *other* experts.
    """
    # Eq. 15 asks about one expert at a time; all other noises stay as they were drawn.
    top = noisy.topk(k + 1, dim=-1).values  # (N, k+1), best first
    kth, next_best = top[:, k - 1 : k], top[:, k:]  # (N, 1) each
    # An expert that was kept stands above the k-th place itself: without it, the (k+1)-th logit
    # moves up to the k-th place. For the others nothing moves. So one topk serves all experts.
    bar = torch.where(noisy > next_best, next_best, kth)  # (N, K)
    # G + std * StandardNormal() > bar has the chance Phi((G - bar) / std); ndtr is Phi.
    return torch.special.ndtr((clean - bar) / std)


def eq17_load(probability: Float[Tensor, "N K"]) -> Float[Tensor, " K"]:
    """Load(i) = sum over tokens of P(i; h)   (Eq. 17). Its entries sum to about k * N."""
    # Counting the tokens that kept expert i would be exact, and would have no gradient.
    return probability.sum(0)


def cv_squared(x: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """CV(x)^2, the squared coefficient of variation: variance over squared mean of K numbers.

    0 when all are equal, K - 1 when one has everything, whatever the size of the batch.
    """
    # The tiny term: all zero (no token at all) is perfectly equal, not 0 / 0.
    return x.var(unbiased=False) / (x.mean() ** 2 + 1e-10)


def eq13_importance_loss(importance: Float[Tensor, " K"], w_imp: float) -> Float[Tensor, ""]:
    """w_imp * CV(Imp)^2   (Eq. 13): experts weigh the same, summed over the batch."""
    return w_imp * cv_squared(importance)  # its gradient lowers the weights of the favourites


def eq18_load_loss(load: Float[Tensor, " K"], w_load: float) -> Float[Tensor, ""]:
    """w_load * CV(Load)^2   (Eq. 18): experts get as many tokens, however they are weighed."""
    return w_load * cv_squared(load)  # its gradient reaches all logits, also of those not kept


def eq3_balance_loss(
    importance: Float[Tensor, " K"], load: Float[Tensor, " K"], w_imp: float, w_load: float
) -> Float[Tensor, ""]:
    """L_balance = w_imp * CV(Imp)^2 + w_load * CV(Load)^2   (Eq. 3).

    Both: one expert may have many tokens with small weights, another few with large ones (App. B).
    """
    return eq13_importance_loss(importance, w_imp) + eq18_load_loss(load, w_load)


# ----------------------------------------------------------------------------- the routers (App. F)
class Router(nn.Module):
    """G of Eq. 2 and 4, App. F: two linear layers without bias, Tanh between; logits in float32."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.first = nn.Linear(width, experts, bias=False)  # D -> K
        self.second = nn.Linear(experts, experts, bias=False)  # K -> K: a row for each expert
        # The paper gives no initial scale. With the usual small one the logits drown in the noise
        # of Eq. 14, whose scale starts at 0.7: routing is then uniformly random, every expert is
        # used alike, Eq. 3 is content, and nothing specialises. So: logits of a scale of 2 or so.
        nn.init.normal_(self.first.weight, std=width**-0.5)
        nn.init.normal_(self.second.weight, std=4 * experts**-0.5)

    def forward(self, h: Float[Tensor, "*N D"]) -> Float32[Tensor, "*N K"]:
        # Routing is a discrete choice: in bfloat16 near-ties would flip. And z of Eq. 7 is this
        # output too: differences between tasks are small next to what all tasks share.
        with full_precision(h):
            return F.linear(torch.tanh(F.linear(h.float(), self.first.weight)), self.second.weight)


class NoisyTopKRouter(nn.Module):
    """The gate of the token-wise MoE (Eq. 2), with the noise of Eq. 14 and the loss of Eq. 3.

    W_noise starts at zero: the scale of the noise starts at softplus(0) = 0.69 for every token.
    """

    def __init__(self, width: int, experts: int, k: int, w_imp: float, w_load: float):
        super().__init__()
        self.router = Router(width, experts)
        self.noise_weight = nn.Parameter(torch.zeros(width, experts))  # W_noise
        self.experts = experts  # K
        self.k = k  # how many of them are kept
        self.w_imp = w_imp  # of Eq. 13
        self.w_load = w_load  # of Eq. 18

    def forward(self, h: Float[Tensor, "N D"]) -> tuple[Routing, Float32[Tensor, ""]]:
        """h (N, D) -> (Routing, balance loss). In eval mode no noise, and loss 0."""
        clean = self.router(h)
        if not self.training:  # Eq. 2 as Sec. 4.1 writes it, without noise
            return eq1_top_k_gate(clean, self.k), clean.new_zeros(())
        std = eq14_noise_scale(h, self.noise_weight)
        noisy = eq14_noisy_logits(clean, std, normal_like(clean))  # drawn anew at every step
        # The noise decides who is kept *and* how much each weighs (Eq. 14), not only the former.
        routing = eq1_top_k_gate(noisy, self.k)
        # Sums over the whole batch, also where several processes share it: CV^2 is not linear, so
        # the mean of each process's own loss would be another loss.
        importance = all_reduce_sum(eq12_importance(dense_gates(routing, self.experts)))
        if self.k == self.experts:  # everyone is always kept: the load is equal by construction
            load = torch.ones_like(importance)
        else:
            load = all_reduce_sum(eq17_load(eq16_probability(clean, noisy, std, self.k)))
        return routing, eq3_balance_loss(importance, load, self.w_imp, self.w_load)


if __name__ == "__main__":
    torch.manual_seed(0)
    gate = NoisyTopKRouter(width=16, experts=4, k=2, w_imp=0.1, w_load=0.1)
    h = torch.randn(1000, 16)  # a toy batch of tokens; below, the steps of `forward` one by one
    clean, std = gate.router(h), eq14_noise_scale(h, gate.noise_weight)
    noisy = eq14_noisy_logits(clean, std, torch.randn_like(clean))
    gates = dense_gates(eq1_top_k_gate(noisy, gate.k), gate.experts)
    importance = eq12_importance(gates)
    load = eq17_load(eq16_probability(clean, noisy, std, gate.k))
    rows = {
        "one token: G(i|h), its logits": clean[0],
        "           the scale of the noise": std[0],
        "           H(i|h), noisy logits": noisy[0],
        "           w(i; h), the gate": gates[0],
        "1000 tokens: kept them": (gates > 0).sum(0),
        "           Load, Eq. 17": load,
        "           Imp, Eq. 12": importance,
    }
    print(f"{'':36s}" + "".join(f"expert {i}   " for i in range(gate.experts)))
    for name, row in rows.items():
        print(f"{name:34s}" + "".join(f"{number:10.2f} " for number in row.tolist()))
    loss = eq3_balance_loss(importance, load, gate.w_imp, gate.w_load)
    print(f"CV(Imp)^2 {cv_squared(importance):.3f}, CV(Load)^2 {cv_squared(load):.3f}: ", end="")
    print(f"L_balance = {loss:.4f}   (Eq. 3)")
