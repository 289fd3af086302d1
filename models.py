"""models.py: T2MIR-AD and T2MIR-DPT (paper Sec. 4.3, App. F; Eq. 9-11; the policies of Algorithms 1-4).

in : `Prompt` / `ADBatch` / `DPTBatch` (data.py)      out: `Output`: action predictions and the MoE's losses
Read after moe.py, before train.py.

Token layouts (t = time within the episode, restarting at each; the three tokens of a step share it):

    AD                  s_0 a_0 r_0  s_1 a_1 r_1 ...       read at every s                 (Eq. 9, 10)
    DPT, query first    q  s_1 a_1 r_1  s_2 a_2 r_2 ...    read at q and every s           (Eq. 11)
    DPT, query last     s_1 a_1 r_1 ... s_n a_n r_n | q q q ...   read at the q's, which see the prompt
                        (or the first `visible` steps of it) and themselves, not one another

Shape legend: B rows, n steps, S tokens, R read tokens, D width, H heads, A actions (numbers or logits).

Differs from the paper (switches): `query_position=last` lets the prompt be computed once an episode;
`token_shift` adds the previous token's embedding to each, so that a reward meets the state it led to
without a layer having to find it; `routing=prefix|token` (moe.py).
Differs from the official code: grid coordinates are embedded one by one and added, so that a held-out
goal cell is not a symbol never seen; no NormFormer norms, head scales or spectral reparametrisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import ADBatch, DPTBatch, Prompt
from moe import MoEKind, MoELayer, TaskRouting

try:  # optional, CUDA only
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shape of the network; saved with its weights."""

    backbone: Literal["ad", "dpt"]
    horizon: int  # T
    state_dim: int
    state_values: tuple[int, ...] | None
    action_dim: int
    discrete_actions: bool
    reward_scale: float = 1.0  # rewards are divided by it before they are embedded
    layers: int = 4
    heads: int = 8
    width: int = 64
    ff: int = 256  # hidden units of the plain feed-forward layers
    dropout: float = 0.0
    moe: MoEKind = "both"
    moe_position: Literal["top", "middle", "bottom"] = "top"
    routing: TaskRouting = "sequence"
    token_experts: int = 6  # K_1
    task_experts: int = 12  # K_2
    task_center: bool = False  # centre h_bar before the task router
    top_k: int = 2  # k of both MoEs
    token_hidden: int = 768  # hidden units of all token experts together
    task_hidden: int = 1536
    w_importance: float = 0.1
    w_load: float = 0.1
    query_position: Literal["first", "last"] = "first"  # DPT
    token_shift: bool = False

    def __post_init__(self):
        def need(fine: bool, why: str) -> None:
            if not fine:
                raise ValueError(why)

        need(
            min(self.layers, self.heads, self.width, self.ff) >= 1,
            "layers, heads, width and ff must be at least 1",
        )
        need(
            self.width % self.heads == 0,
            f"--width {self.width} is not a multiple of --heads {self.heads}",
        )
        need(0 <= self.dropout < 1, f"--dropout {self.dropout} is not in [0, 1)")
        for name, experts, hidden in (
            ("token", self.token_experts, self.token_hidden),
            ("task", self.task_experts, self.task_hidden),
        ):
            need(
                1 <= self.top_k <= experts,
                f"--top-k {self.top_k} is not between 1 and --{name}-experts {experts}",
            )
            need(
                hidden >= experts and hidden % experts == 0,
                f"--{name}-hidden {hidden} is not a multiple of --{name}-experts {experts}",
            )
        need(
            not (
                self.last
                and self.has_task
                and self.routing == "sequence"
                and self.moe_position != "top"
            ),
            "--query-position last with --routing sequence needs --moe-position top: below it, early queries "
            "would see the whole prompt through the gate",
        )

    @property
    def last(self) -> bool:
        return self.backbone == "dpt" and self.query_position == "last"

    @property
    def has_task(self) -> bool:
        return self.moe in ("both", "task")

    @property
    def moe_block(self) -> int:
        """Which block's feed-forward layer the MoE replaces (App. G.2: first, L/2-th or last)."""
        return {"top": self.layers - 1, "middle": (self.layers + 1) // 2 - 1, "bottom": 0}[
            self.moe_position
        ]

    @property
    def cacheable(self) -> bool:
        """Whether tokens can be decoded one at a time with the result of the full forward pass.

        Not with a query in front; nor when Eq. 4's gate, which changes with every new token, feeds
        later blocks, whose cached keys would then be stale.
        """
        stale = self.has_task and self.routing == "sequence" and self.moe_block != self.layers - 1
        return not stale and (self.backbone == "ad" or self.last)


@dataclass
class Output:
    """What one forward pass gives the training loop."""

    action: Tensor  # (B, R, A) logits, or actions in [-1, 1]
    balance: Tensor  # () Eq. 3
    contrastive: Tensor  # () Eq. 7; 0 without a task-wise MoE or without positives in the batch
    accuracy: Tensor  # () share of queries whose best key is a positive
    token_expert: Tensor | None  # (B, S, k) kept experts, best first
    task_expert: Tensor | None  # (B, k) or (B, R, k)
    modality: Tensor  # (S,) 0 state, 1 action, 2 reward, 3 query


# ----------------------------------------------------------------------------------------- attention
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (B, H, S, d), k, v (B, H, S', d) -> (B, H, S, d).

    Without a mask it is causal, the last query aligned with the last key. flash-attn serves causal calls
    in half precision on CUDA; `scaled_dot_product_attention` everything else.
    """
    s, keys, d = q.shape[2], k.shape[2], q.shape[3]
    if (
        mask is None
        and flash_attn_func is not None
        and q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
    ):
        # flash-attn's layout is (B, S, H, d), its causal mask aligned at the last key as well
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)
    if mask is None and s != keys and s > 1:
        mask = torch.ones(s, keys, dtype=torch.bool, device=q.device).tril(keys - s)
    causal = mask is None and s > 1
    if d < 16 and not q.is_cuda:
        # The CPU kernel is slow below 16 numbers a head (one vector register): zeros change nothing.
        q, k, v = (F.pad(x, (0, 16 - d)) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=d**-0.5)
    return out[..., :d]


@dataclass
class Cache:
    """Keys, values and the running sum for h_bar of the tokens seen so far; made by `T2MIR.new_cache`."""

    k: list[Tensor]  # a layer: (B, H, capacity, d)
    v: list[Tensor]
    length: int  # tokens in it
    h_sum: Tensor  # (B, D) float32, sum of h at the MoE's block
    previous: Tensor  # (B, D) embedding of the last token, for the token shift

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the old ones; views of all of them. Doubles when it is full."""
        end = self.length + k.shape[2]
        if end > self.k[layer].shape[2]:
            for side in (self.k, self.v):
                b, heads, _, d = side[layer].shape
                bigger = side[layer].new_empty(b, heads, max(end, 2 * self.length), d)
                bigger[:, :, : self.length] = side[layer][:, :, : self.length]
                side[layer] = bigger
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


@dataclass
class View:
    """Which tokens see which: `prompt` causal tokens, then queries that see what `query_mask` says."""

    prompt: int
    query_mask: Tensor | None = None  # (B, 1, Q, prompt + Q) bool


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.out = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor, view: View, cache: Cache | None, layer: int) -> Tensor:
        b, s, d = x.shape
        q, k, v = (
            self.qkv(x).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        )  # (B, H, S, d)
        if cache is not None:
            k, v = cache.store(layer, k, v)
        if view.query_mask is None:
            y = attention(q, k, v)
        else:
            n = view.prompt
            y = attention(q[:, :, n:], k, v, view.query_mask)
            if n:
                y = torch.cat([attention(q[:, :, :n], k[:, :, :n], v[:, :, :n]), y], 2)
        return self.out(y.transpose(1, 2).reshape(b, s, d))


class Dropout(nn.Dropout):
    """torch's, but on the CPU, where one thread draws the random numbers: 16 bits each instead of 64, which is a
    twentieth of a training step. p is rounded to a multiple of 2^-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not self.training or self.p == 0:
            return super().forward(x)
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        cut = min(round(self.p * 2**16), 2**16 - 1)
        keep = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= cut - 2**15
        return x * (keep.to(x.dtype) * (2**16 / (2**16 - cut)))


class FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer; in one block of the model the latter is the MoE layer."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.norm1, self.norm2 = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.attention = Attention(cfg)
        self.drop = Dropout(cfg.dropout)
        self.is_moe = layer == cfg.moe_block and cfg.moe != "none"
        if self.is_moe:
            token = (cfg.token_experts, cfg.top_k, cfg.token_hidden)
            task = (cfg.task_experts, cfg.top_k, cfg.task_hidden)
            self.ff = MoELayer(
                cfg.width, cfg.moe, token, task, cfg.w_importance, cfg.w_load, cfg.task_center
            )
        else:
            # Without MoE the block in its place is 1.5 times wider: as many active weights as T2MIR's.
            wide = layer == cfg.moe_block and cfg.moe == "none"
            self.ff = FeedForward(cfg.width, cfg.ff * 3 // 2 if wide else cfg.ff)


# --------------------------------------------------------------------------------------------- model
class T2MIR(nn.Module):
    """The policy pi_theta of both backbones. `model(batch)` trains; `new_cache` and `feed` play."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        if cfg.state_values:
            starts = torch.tensor([0, *cfg.state_values[:-1]]).cumsum(0)
            self.register_buffer("coordinate", starts, persistent=False)
            self.embed_state = nn.Embedding(sum(cfg.state_values), cfg.width)
            self.register_buffer(
                "span", (torch.tensor(cfg.state_values) - 1.0).clamp_min(1), persistent=False
            )
            self.embed_place = nn.Linear(cfg.state_dim, cfg.width, bias=False)
        else:
            self.embed_state = nn.Linear(cfg.state_dim, cfg.width)
        action = nn.Embedding if cfg.discrete_actions else nn.Linear
        self.embed_action = action(cfg.action_dim, cfg.width)
        self.embed_reward = nn.Linear(1, cfg.width)
        self.embed_time = nn.Embedding(cfg.horizon + 1, cfg.width)  # 0 is the query's own in DPT
        self.embed_modality = nn.Parameter(torch.empty(3, cfg.width))  # a bias each for s, a and r
        for table in (m.weight for m in self.children() if isinstance(m, nn.Embedding)):
            nn.init.normal_(table, std=0.5)
        nn.init.normal_(self.embed_modality)
        if cfg.state_values:
            nn.init.normal_(self.embed_place.weight)
        if cfg.token_shift:
            self.shift = nn.Parameter(torch.full((cfg.width,), 0.5))
        self.drop = Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)
        self.head = nn.Linear(cfg.width, cfg.action_dim)

    # ------------------------------------------------------------------------------------ embeddings
    def _state(self, states: Tensor) -> Tensor:
        if self.cfg.state_values:
            place = self.embed_place(2 * states / self.span - 1)
            return (
                self.embed_state(states + self.coordinate).sum(-2) + place + self.embed_modality[0]
            )
        return self.embed_state(states) + self.embed_modality[0]

    def embed_prompt(self, prompt: Prompt, start: int = 0) -> Tensor:
        """s, a, r interleaved: (B, 3n, D); `start` is the time within the episode of the first step."""
        state, action = (
            self._state(prompt.states),
            self.embed_action(prompt.actions) + self.embed_modality[1],
        )
        reward = (
            self.embed_reward(prompt.rewards[..., None] / self.cfg.reward_scale)
            + self.embed_modality[2]
        )
        time = (start + torch.arange(prompt.steps, device=reward.device)) % self.cfg.horizon
        time = self.embed_time(time + (self.cfg.backbone == "dpt"))  # DPT: 1..T, AD: 0..T-1
        return (torch.stack([state, action, reward], 2) + time[:, None]).flatten(1, 2)

    def embed_query(self, states: Tensor) -> Tensor:
        """(B, Q, ds) -> (B, Q, D), at position 0."""
        return self._state(states) + self.embed_time.weight[0]

    def _shifted(self, x: Tensor, start: int = 0, previous: Tensor | None = None) -> Tensor:
        """Token shift: e_i + g * e_{i-1}, g learned, one number a channel. Nothing passes from one episode to
        the next. `start` tokens of whole episodes and steps precede x, the last of them `previous` (B, D).
        """
        if not self.cfg.token_shift:
            return x
        before = torch.zeros_like(x[:, :1]) if previous is None else previous[:, None]
        index = start + torch.arange(x.shape[1], device=x.device)
        inside = (index % (3 * self.cfg.horizon) != 0).to(x.dtype)[:, None]
        return x + self.shift * inside * torch.cat([before, x[:, :-1]], 1)

    # -------------------------------------------------------------------------------------- training
    def forward(self, batch: ADBatch | DPTBatch) -> Output:
        """One pass over a batch. AD: R = n predictions (Eq. 10). DPT: R = n + 1 for one label (Eq. 11), or
        R = Q, one for each label, with the query last.
        """
        x = self._shifted(self.embed_prompt(batch.prompt))
        n, device = batch.prompt.steps, x.device
        modality = torch.arange(3 * n, device=device) % 3
        state_tokens = torch.arange(0, 3 * n, 3, device=device)
        view, read, visible = View(x.shape[1]), state_tokens, None
        if self.cfg.last:
            query = self.embed_query(batch.query_states)
            q, visible = query.shape[1], 3 * batch.visible
            sees = torch.arange(3 * n, device=device) < visible[..., None]  # (B, Q, 3n)
            itself = torch.eye(q, dtype=torch.bool, device=device).expand(len(sees), q, q)
            view = View(3 * n, torch.cat([sees, itself], -1)[:, None])
            x = torch.cat([x, query], 1)
            read = torch.arange(3 * n, 3 * n + q, device=device)
            modality = torch.cat([modality, modality.new_full((q,), 3)])
        elif self.cfg.backbone == "dpt":
            x = torch.cat([self.embed_query(batch.query_states), x], 1)
            modality = torch.cat([modality.new_full((1,), 3), modality])
            view, read = View(x.shape[1]), torch.cat([state_tokens.new_zeros(1), state_tokens + 1])
        return self._run(x, view, read, modality, batch.task, visible)

    def _run(
        self,
        x,
        view: View,
        read: Tensor,
        modality: Tensor,
        task: Tensor | None,
        visible: Tensor | None,
    ) -> Output:
        cfg, zero = self.cfg, x.new_zeros((), dtype=torch.float32)
        x, balance, contrast, experts = self.drop(x), zero, (zero, zero), (None, None)
        for block in self.blocks:
            x = x + block.drop(block.attention(block.norm1(x), view, None, block.layer))
            h = block.norm2(x)
            top = block.layer == cfg.layers - 1
            wanted = read if top else None  # nothing above the last block reads the other tokens
            if top:
                x = x.index_select(1, read)
            if block.is_moe:
                h_bar = self._h_bar(h, view, wanted, visible) if cfg.has_task else None
                out = block.ff(h, h_bar, wanted)
                y, balance, experts = out.y, out.balance, (out.token_expert, out.task_expert)
                if cfg.has_task and task is not None:
                    contrast = self._contrast(block.ff, h[:, : view.prompt], task)
            else:
                y = block.ff(h if wanted is None else h.index_select(1, wanted))
            x = x + block.drop(y)
        return Output(self._head(x), balance, *contrast, *experts, modality)

    def _head(self, x: Tensor) -> Tensor:
        action = self.head(self.norm(x))
        return action if self.cfg.discrete_actions else action.tanh()

    def _h_bar(self, h: Tensor, view: View, read: Tensor | None, visible: Tensor | None) -> Tensor:
        """What the task router reads (Eq. 4): (B, D) for a whole row, or (B, R, D)."""
        if self.cfg.routing == "token":
            return h if read is None else h.index_select(1, read)
        if self.cfg.routing == "sequence" and visible is None:
            return h.mean(1)
        n = view.prompt
        total = h[:, :n].float().cumsum(1)  # (B, n, D)
        mean = total / torch.arange(1, n + 1, device=h.device)[:, None]
        if (
            visible is not None
        ):  # a query is a sequence of its own: what it sees of the prompt, and itself
            before = F.pad(total, (0, 0, 1, 0))  # (B, n+1, D): sums of the first 0, 1, ... tokens
            seen = before.gather(1, visible[..., None].expand(-1, -1, h.shape[-1]))
            mean = torch.cat([mean, (seen + h[:, n:]) / (visible[..., None] + 1)], 1)
        mean = mean.to(h.dtype)
        return mean if read is None else mean.index_select(1, read)

    def _contrast(self, layer: MoELayer, h: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 7 on the whole trajectory: the router of its mean; with token routing, its mean logits."""
        return layer.task_router.contrast(h if self.cfg.routing == "token" else h.mean(1), task)

    def update_key_router(self, beta: float) -> None:
        """Eq. 8, after the optimiser's step."""
        for block in self.blocks:
            if block.is_moe and self.cfg.has_task:
                block.ff.task_router.update_key(beta)

    def last_action(self, prompt: Prompt) -> Tensor:
        """AD: (B, A) at the last state of a whole context; its own action and reward are not read."""
        x = self._shifted(self.embed_prompt(prompt))[:, :-2]
        read = torch.tensor([x.shape[1] - 1], device=x.device)
        modality = torch.arange(x.shape[1], device=x.device) % 3
        return self._run(x, View(x.shape[1]), read, modality, None, None).action[:, 0]

    # --------------------------------------------------------------------------- incremental decoding
    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for `rows` sequences; it grows beyond `capacity` tokens by itself.

        Raises ValueError for a model whose tokens cannot be decoded one at a time (`ModelConfig.cacheable`).
        """
        cfg, weight = self.cfg, self.head.weight
        if not cfg.cacheable:
            raise ValueError(
                "this model cannot be cached: its query stands first, or its gate changes with every token"
            )
        shape = (rows, cfg.heads, max(1, capacity), cfg.width // cfg.heads)
        k, v = ([weight.new_empty(shape) for _ in range(cfg.layers)] for _ in range(2))
        zero = weight.new_zeros(rows, cfg.width)
        return Cache(k, v, 0, zero.float(), zero)

    def feed(self, tokens: Tensor, cache: Cache, keep: bool = True) -> Tensor:
        """Run new embedded tokens (B, S, D) behind those of the cache -> action (B, A) read at the last one.

        keep=False leaves the cache as it was (a DPT query, which nothing may see afterwards); then tokens
        are not shifted either, as in training.
        """
        cfg, x = self.cfg, self._shifted(tokens, cache.length, cache.previous) if keep else tokens
        s, h_sum = x.shape[1], None
        for block in self.blocks:
            x = x + block.attention(block.norm1(x), View(s), cache, block.layer)
            h = block.norm2(x)
            top = block.layer == cfg.layers - 1
            read = torch.tensor([s - 1], device=x.device) if top else None
            if top:
                x = x[:, -1:]
            if block.is_moe:
                total = cache.h_sum[:, None] + h.float().cumsum(1)  # (B, S, D)
                h_sum = total[:, -1]
                count = cache.length + torch.arange(1, s + 1, device=x.device)[:, None]
                h_bar = h if cfg.routing == "token" else (total / count).to(h.dtype)
                y = block.ff(h, h_bar if read is None else h_bar.index_select(1, read), read).y
            else:
                y = block.ff(h[:, -1:] if top else h)
            x = x + y
        if keep:
            cache.length += s
            cache.previous = tokens[:, -1]
            if h_sum is not None:
                cache.h_sum = h_sum
        return self._head(x)[:, 0]
