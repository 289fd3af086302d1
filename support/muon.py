"""muon.py: the optimiser Muon (Jordan et al., 2024), for the matrices of a network.

in : matrices, or stacks of them, with their gradients          out: a step of each
Nothing of the paper: `--optimizer muon` is a switch (methods.py builds it), AdamW is the default.

AdamW scales every number of a gradient by its own history. Muon takes a matrix as a whole: the
mean gradient G = U S V^T is replaced by U V^T, so that all of its directions move alike, also those
whose gradient is small next to others'. Five Newton-Schulz steps do that with products alone.

torch.optim.Muon takes one matrix a parameter, in bfloat16. Here a parameter may be a stack (experts
are, and the three matrices of an attention's qkv), and equal shapes share one batched product.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor

# Of the quintic a x + b x^3 + c x^5, which takes singular values from (0, 1] to about 1 quickly.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix: Float[Tensor, "*N m n"], steps: int = 5) -> Float[Tensor, "*N m n"]:
    """U V^T of each U S V^T, roughly: singular values of 0.7 to 1.2 instead of 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix  # X X^T is then the smaller product
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """One momentum a parameter. `parts` of a group: each matrix is so many, one below the other."""

    def __init__(self, groups: list[dict], lr: float, momentum: float, weight_decay: float):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, parts=1)
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyrefly: ignore[bad-override]
        same: dict[tuple, list] = defaultdict(list)  # shape of a matrix -> what has it
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                mean = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(mean, group["momentum"])  # Nesterov's
                stack = ahead.reshape(-1, p.shape[-2] // group["parts"], p.shape[-1])
                same[stack.shape[1:]].append((p, group, stack))
        for (m, n), rows in same.items():
            stacks = [stack for *_, stack in rows]
            # 0.2: numbers about as large as those of AdamW's steps, so that both take one rate.
            steps = orthogonal(torch.cat(stacks)) * (0.2 * max(m, n) ** 0.5)
            of_each = steps.split([len(stack) for stack in stacks])
            for (p, group, _), step in zip(rows, of_each, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * step.reshape(p.shape))
