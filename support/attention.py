"""attention.py: softmax attention, and what decoding remembers for it, fast on any device.

in : queries, keys and values (B, H, S, d)          out: what each query reads (B, H, S, d)
Nothing here is of the paper but its "Flash Attention" (Sec. 4.3): models.py says which tokens see
which, this file how that is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

try:  # optional, CUDA only ("Flash Attention" [63] of Sec. 4.3 and App. F)
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


def attention(
    q: Float[Tensor, "B H S d"],
    k: Float[Tensor, "B H keys d"],
    v: Float[Tensor, "B H keys d"],
    mask: Bool[Tensor, "B 1 S keys"] | None = None,
) -> Float[Tensor, "B H S d"]:
    """softmax(q k^T / sqrt(d)) v: what every query reads from the keys it may see.

    Without a mask it is causal, the last query aligned with the last key. flash-attn serves causal
    calls in half precision on CUDA; torch's scaled_dot_product_attention everything else.
    """
    queries, keys, d = q.shape[2], k.shape[2], q.shape[3]
    half = q.dtype in (torch.float16, torch.bfloat16)
    if mask is None and flash_attn_func is not None and q.is_cuda and half:
        # flash-attn wants (B, S, H, d); its causal mask is aligned at the last key as well
        swapped = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(*swapped, causal=True).transpose(1, 2)
    if mask is None and queries != keys and queries > 1:
        # torch aligns `is_causal` at the first key: new tokens behind cached ones need a mask
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    causal = mask is None and queries > 1
    if d < 16 and not q.is_cuda:
        # The CPU kernel is slow below one vector register of 16 numbers: zeros change nothing.
        q, k, v = (F.pad(x, (0, 16 - d)) for x in (q, k, v))
    # one query without a mask is the last one: it may see everything, and is not "causal" to torch
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=d**-0.5)
    return out[..., :d]


def in_stretches(
    q: Float[Tensor, "B H S d"],
    k: Float[Tensor, "B H S d"],
    v: Float[Tensor, "B H S d"],
    length: int,
) -> Float[Tensor, "B H S d"]:
    """Causal attention within stretches of `length` tokens, none of which sees another: S / length
    times less work than one stretch of S.
    """

    def fold(x: Tensor) -> Tensor:  # (B * stretches, H, length, d)
        return x.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)

    y = attention(fold(q), fold(k), fold(v))
    return y.unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2, 3)


@dataclass
class Cache:
    """What decoding remembers of the tokens seen so far; made by `T2MIR.new_cache`."""

    # In causal attention a token's keys and values never change again: computed once, kept here.
    k: list[Tensor]  # for each block (B, H, capacity, d)
    v: list[Tensor]
    h_sum: Tensor  # (B, D) float32: the sum of h in the block with experts, for its h_bar
    previous: Tensor  # (B, D) embedding of the last token, for the token shift
    length: int = 0  # tokens in it

    def store(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, H, S, d) behind the old ones; returns views of all."""
        end = self.length + k.shape[2]
        for side, new in ((self.k, k), (self.v, v)):
            if end > side[block].shape[2]:  # full: double it, so that copies stay rare
                b, heads, _, d = side[block].shape
                bigger = side[block].new_empty(b, heads, max(end, 2 * self.length), d)
                bigger[:, :, : self.length] = side[block][:, :, : self.length]
                side[block] = bigger
            side[block][:, :, self.length : end] = new
        return self.k[block][:, :, :end], self.v[block][:, :, :end]
