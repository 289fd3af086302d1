"""moe.py: the sparse layers (paper Sec. 3.2, 4.1, 4.2, Fig. 2; Eq. 1, 2, 4).

in : h (B, S, D) hidden states after self-attention     out: y (B, R, D) at the tokens that are read
Read after router.py and contrastive.py, before models.py.   Try: python moe.py

    h ──┬── token-wise MoE: every token finds its experts        (Eq. 2) ──┐ D/2
        │                                                                  ├─ concatenated: D
        └── task-wise MoE: h_bar, the mean token, finds them     (Eq. 4) ──┘ D/2

Shape legend: B rows, S tokens a row, R tokens whose output is wanted, D width, K experts, k kept,
F hidden units of one expert.

Where an output is never read it is never computed: actions are predicted at state tokens, so an MoE in
the last block runs its experts on those alone. Routers still see every token: the balance loss and
h_bar are over all of them. The result is the same (up to the rounding of smaller products).

Differs from the paper: nothing by default.  `routing` chooses h_bar: `sequence` is Eq. 4 (the gate of an
early token has then seen later ones; only the past exists at test time), `prefix` averages the tokens up
to the present one, `token` is the official code's form in four of its configurations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive import TaskRouter
from router import NoisyTopKRouter, Routing, eq1_top_k_gate

MoEKind = Literal["both", "token", "task", "none"]
TaskRouting = Literal["sequence", "prefix", "token"]


def two_layers(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """One expert: (n, D) -> (n, D_out)."""
    return F.gelu(x @ w1 + b1) @ w2 + b2


class Experts(nn.Module):
    """K two-layer networks D -> F -> D_out with GELU, their weights stacked along the first axis."""

    def __init__(self, experts: int, width: int, hidden: int, out: int):
        super().__init__()
        self.w1 = nn.Parameter(
            torch.empty(experts, width, hidden).uniform_(-1, 1) / math.sqrt(width)
        )
        self.b1 = nn.Parameter(torch.zeros(experts, hidden))
        self.w2 = nn.Parameter(
            torch.empty(experts, hidden, out).uniform_(-1, 1) / math.sqrt(hidden)
        )
        self.b2 = nn.Parameter(torch.zeros(experts, out))

    def one(self, expert: int, x: Tensor) -> Tensor:
        """E_i(x) for x (n, D)."""
        return two_layers(x, self.w1[expert], self.b1[expert], self.w2[expert], self.b2[expert])

    def tokens(self, x: Tensor, routing: Routing) -> Tensor:
        """sum_i w(i; x) E_i(x) with a gate for every token: x (N, D), routing (N, k) -> (N, D_out).

        Tokens are sorted by expert, so each expert is one dense product over a contiguous slice.
        """
        k = routing.index.shape[-1]
        chosen = routing.index.flatten()  # (N*k,)
        order = chosen.argsort(stable=True)
        count = torch.bincount(chosen, minlength=len(self.w1)).tolist()
        token = order // k
        slices = x.index_select(0, token).split(
            count
        )  # its backward is cheaper than that of x[token]
        weights = (
            p.unbind() for p in (self.w1, self.b1, self.w2, self.b2)
        )  # one gradient, not one a slice
        y = torch.cat([two_layers(part, *own) for part, *own in zip(slices, *weights, strict=True)])
        y = y * routing.weight.flatten().index_select(0, order)[:, None].to(y.dtype)
        return y.new_zeros(len(x), y.shape[-1]).index_add_(0, token, y)

    def sequences(self, x: Tensor, routing: Routing) -> Tensor:
        """The same with one gate for a whole row: x (B, R, D), routing (B, k) -> (B, R, D_out).

        A weighted sum of k networks is one network with k*F hidden units whose activations are scaled
        by the gate: two batched products in place of a loop.
        """
        i, w = routing.index, routing.weight.to(x.dtype)
        b, _k = i.shape
        w1 = self.w1[i].transpose(1, 2).reshape(b, x.shape[-1], -1)  # (B, D, k*F)
        w2 = self.w2[i].reshape(b, -1, self.w2.shape[-1])  # (B, k*F, D_out)
        hidden = F.gelu(torch.baddbmm(self.b1[i].reshape(b, 1, -1).to(x.dtype), x, w1.to(x.dtype)))
        hidden = hidden * w.repeat_interleave(self.w1.shape[-1], 1)[:, None]
        bias = (w[..., None] * self.b2[i]).sum(1, keepdim=True)  # (B, 1, D_out)
        return torch.baddbmm(bias.to(x.dtype), hidden, w2.to(x.dtype))


@dataclass
class MoEOutput:
    y: Tensor  # (B, R, D_out)
    balance: Tensor  # () Eq. 3; 0 without a token-wise MoE or outside training
    token_expert: Tensor | None  # (B, S, k) int64, kept experts of every token, best first
    task_expert: Tensor | None  # (B, k) or (B, R, k) int64, those of the task router


class MoELayer(nn.Module):
    """Token-wise and task-wise MoE in parallel, halves concatenated (Sec. 4); or one of them at full width.

    `token` and `task` are (experts K, kept k, hidden units of all experts together). Raises ValueError for
    sizes that do not divide.
    """

    def __init__(
        self,
        width: int,
        kind: MoEKind,
        token: tuple,
        task: tuple,
        w_imp: float,
        w_load: float,
        center: bool = False,
    ):
        super().__init__()
        (token_experts, k_token, token_hidden), (task_experts, self.k_task, task_hidden) = (
            token,
            task,
        )
        if kind == "both" and width % 2:
            raise ValueError(f"two parallel MoEs share the width equally: {width} is odd")
        if token_hidden % token_experts or task_hidden % task_experts:
            raise ValueError(
                "hidden units are shared equally: they must be a multiple of the number of experts"
            )
        out = width // 2 if kind == "both" else width
        self.token = self.task = None
        if kind in ("both", "token"):
            self.token_router = NoisyTopKRouter(width, token_experts, k_token, w_imp, w_load)
            self.token = Experts(token_experts, width, token_hidden // token_experts, out)
        if kind in ("both", "task"):
            self.task_router = TaskRouter(width, task_experts, center)
            self.task = Experts(task_experts, width, task_hidden // task_experts, out)

    def forward(self, h: Tensor, h_bar: Tensor | None, read: Tensor | None = None) -> MoEOutput:
        """h (B, S, D); h_bar (B, D), one gate a row, or (B, R, D), one a token that is read; `read` (R,)
        indexes the tokens whose output is wanted (None: all S, so R = S).
        """
        b, s, d = h.shape
        x = h if read is None else h.index_select(1, read)
        halves, balance, token_expert, task_expert = (
            [],
            h.new_zeros((), dtype=torch.float32),
            None,
            None,
        )
        if self.token is not None:  # Eq. 2
            routing, _, balance = self.token_router(h.reshape(b * s, d))
            index, weight = (r.view(b, s, -1) for r in (routing.index, routing.weight))
            token_expert = index
            if read is not None:
                index, weight = index.index_select(1, read), weight.index_select(1, read)
            kept = Routing(index.flatten(0, 1), weight.flatten(0, 1))
            halves.append(self.token.tokens(x.reshape(-1, d), kept).view(*x.shape[:2], -1))
        if self.task is not None:  # Eq. 4
            gate = eq1_top_k_gate(self.task_router(h_bar), self.k_task)
            task_expert = gate.index
            halves.append(self._by_task(x, gate))
        return MoEOutput(torch.cat(halves, -1), balance, token_expert, task_expert)

    def _by_task(self, x: Tensor, gate: Routing) -> Tensor:
        """x (B, R, D) through the experts of gates (B, k) or (B, R, k) -> (B, R, D_out). A copy of the weights for
        each row costs more than a copy of its tokens where those are fewer than an expert's hidden units.
        """
        index, weight = gate.index, gate.weight
        if index.dim() == 2:
            if x.is_cuda or x.shape[1] >= self.task.w1.shape[-1]:
                return self.task.sequences(x, gate)
            index, weight = (g[:, None].expand(-1, x.shape[1], -1) for g in (index, weight))
        flat = Routing(index.flatten(0, 1), weight.flatten(0, 1))
        return self.task.tokens(x.flatten(0, 1), flat).view(*x.shape[:2], -1)


if __name__ == "__main__":
    torch.manual_seed(0)
    layer = MoELayer(8, "both", (6, 2, 48), (4, 2, 32), 0.1, 0.1).eval()
    h = torch.randn(1, 3, 8)  # one row: a state, an action and a reward token
    out = layer(h, h.mean(1))
    for name, expert in zip(
        ("state", "action", "reward"), out.token_expert[0].tolist(), strict=True
    ):
        print(
            f"{name:6s} token -> token experts {expert};  the row -> task experts {out.task_expert[0].tolist()}"
        )
    print(f"output {tuple(out.y.shape)}: {out.y.shape[-1] // 2} numbers from each half")
