"""models.py: the transformer that both backbones share (paper Sec. 4.3, App. F, Fig. 2).

in : tokens (B, S, D), made from a `Prompt` (data.py) by the `embed_...` methods
out: (B, R, A) action predictions at the R tokens that are read; losses and choices of the MoE
Read after moe.py, before ad.py and dpt.py, which say which tokens there are and which are read.

    s, a, r --embed--> tokens --[ attention, feed-forward ] x layers--> norm --head--> action
                                  in one block (`moe_position`) the feed-forward layer is moe.py's

Symbols (paper -> here): pi_theta -> T2MIR; h -> h, what a block's feed-forward layer reads; tau ->
View.prompt; K_1, K_2 -> token_experts, task_experts; w_con -> w_contrastive; beta -> momentum.
Shapes: B rows, n steps, S tokens, R tokens that are read, D width, H heads, A numbers or logits of
an action.

Differs from the paper (switches): `token_shift` adds the previous token's embedding to each, so
that a reward meets the state it led to without a layer having to find it; `routing`, `task_center`
and `keys` (moe.py, contrastive.py); `components` (mixture.py); `embed_gain`, first weights.
Where it differs from the official code: DEPARTURES.md, "Network and optimisation".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from config import BelowOne, Few, FewOrNone, NotNegative, Positive, Share, Training, Units
from contrastive import Keys, TaskRouter, eq8_momentum_update
from data import Prompt
from envs import Family
from mixture import head_size
from moe import MoEKind, MoELayer, MoEOutput, Past, TaskRouting, View
from support.attention import Cache, attention, in_stretches
from support.files import need_memory


@dataclass(frozen=True)
class ModelSettings:
    """the network and its MoE (Sec. 4, App. F; Tables 4, 5)"""

    moe: MoEKind = "both"
    """Which MoE layers (Sec. 5.2); token or task alone has 2/3 of the active weights of both."""
    moe_position: Literal["top", "middle", "bottom"] = "top"
    """Block whose feed-forward layer becomes the MoE (App. G.2)."""
    routing: TaskRouting = "sequence"
    """h_bar of Eq. 4: sequence (paper), prefix (no look-ahead), token (official code)."""
    contrast_trunk: bool = field(default=True, metadata={"before": True})
    """The gradient of Eq. 7 flows on into the trunk (Algorithm 1), not into the router alone."""
    task_balance: NotNegative = field(default=0.0, metadata={"before": 0.0})
    """How far a step moves the bias that keeps task experts in use; 0: none (paper)."""
    task_center: bool = False
    """Centre and scale h_bar by running statistics before the task router (not in the paper)."""
    keys: Keys = "all"
    """Keys of Eq. 7: all other trajectories (its text), or the other batch (Algorithm 1)."""
    token_experts: Few = 6
    """K_1, experts of the token-wise MoE (Tables 4, 5)."""
    task_experts: Few = 8
    """K_2, experts of the task-wise MoE (Tables 4, 5)."""
    top_k: Few = 2
    """k, experts that each router keeps (Tables 6, 7: 2 of 6 and 2 of 8)."""
    token_top_k: FewOrNone = field(default=0, metadata={"before": 0})
    """k of the token router alone (Table 6 varies it, and not the other's); 0: --top-k."""
    token_hidden: Units = 1536
    """Hidden units of all token experts together."""
    task_hidden: Units = 2048
    """Hidden units of all task experts together."""
    w_contrastive: NotNegative = 0.01
    """w_con, weight of Eq. 7 (Tables 4, 5)."""
    w_importance: NotNegative = 0.01
    """w_imp, weight of CV(Imp)^2 in Eq. 3 (official: one weight for both)."""
    w_load: NotNegative = 0.01
    """w_load, weight of CV(Load)^2 in Eq. 3."""
    momentum: Share = 0.995
    """beta of Eq. 8 (Tables 4, 5)."""
    layers: Few = 3
    """Transformer blocks."""
    heads: Few = 8
    """Attention heads."""
    width: Units = 128
    """D, numbers of a token; two parallel MoEs give half of them each."""
    ff: Units = 512
    """Hidden units of a plain feed-forward layer."""
    dropout: BelowOne = 0.05
    """After the embeddings and on both residual branches of a block."""
    token_shift: bool = False
    """Add the previous token's embedding to each (not in the paper)."""
    embed_gain: Positive = field(default=1.0, metadata={"before": 1.0})
    """First weights of the embeddings of continuous numbers, times torch's own."""
    components: FewOrNone = field(default=0, metadata={"before": 0})
    """Of a mixture of Gaussians over continuous actions (not in the paper); 0: squared error."""

    def check(self) -> None:
        """Raises ValueError with one line for sizes that do not fit one another."""
        if self.width % self.heads:
            raise ValueError(f"--width {self.width} is not a multiple of --heads {self.heads}")
        if self.moe == "both" and self.width % 2:  # y_tok and y_task are D/2 wide each (Fig. 2)
            raise ValueError(f"--width {self.width} is odd: two MoEs share it equally")
        for name, own in (("token", self.token_top_k), ("task", 0)):
            experts, hidden = getattr(self, f"{name}_experts"), getattr(self, f"{name}_hidden")
            flag, k = ("--token-top-k", own) if own else ("--top-k", self.top_k)
            if k > experts:  # there are no k largest of fewer than k logits
                raise ValueError(f"{flag} {k} is above --{name}-experts {experts}")
            if hidden % experts:  # every expert has the same share of the hidden units
                raise ValueError(
                    f"--{name}-hidden {hidden} is not a multiple of --{name}-experts {experts}"
                )

    def check_batch(self, training: Training, queries: int = 0) -> None:
        """Raises ValueError where --keys other has no key batch, and for a batch beyond memory."""
        if self.keys == "other" and training.draws != 2:  # even rows B, odd ones B': contrastive.py
            raise ValueError(f"--keys other needs two draws a task, not --draws {training.draws}")
        tokens = training.batch * (3 * training.prompt_length + queries)
        if not torch.cuda.is_available():  # a GPU's memory is its own
            # A token leaves at least ten numbers of each channel and block for the backward pass.
            numbers = 10 * tokens * self.width * self.layers
            need_memory(f"a step of --batch {training.batch}", 4 * numbers)

    @property
    def has_task_moe(self) -> bool:
        return self.moe in ("both", "task")

    def label(self, backbone: str) -> str:
        """The paper's name of this variant (Tables 1 and 10)."""
        without = {"both": "", "token": " w/o Task-MoE", "task": " w/o Token-MoE"}
        return backbone if self.moe == "none" else f"T2MIR-{backbone}{without[self.moe]}"

    @property
    def moe_block(self) -> int:
        """The block with experts, counted from 0 (App. G.2: first, L/2-th or last)."""
        middle = (self.layers + 1) // 2 - 1  # the L/2-th, counted from 0; rounded up where L is odd
        return {"top": self.layers - 1, "middle": middle, "bottom": 0}[self.moe_position]

    @property
    def below_the_top(self) -> bool:
        """Whether later blocks read what the gate of Eq. 4 has chosen."""
        return self.has_task_moe and self.moe_block != self.layers - 1

    @property
    def decodable(self) -> bool:
        """Whether tokens can be decoded one at a time with the result of the full forward pass.

        Not where Eq. 4's gate of the whole sequence, which changes with every new token, feeds
        later blocks: keys that these have cached would be of an older gate.
        """
        return not (self.below_the_top and self.routing == "sequence")


@dataclass
class Output:
    """What one forward pass gives a method's loss and the diagnostics."""

    action: Float[Tensor, "B R A"]  # logits, actions in [-1, 1], or what mixture.py reads
    losses: dict[str, Tensor]  # weighted: Eq. 3, and w_con times Eq. 7
    metrics: dict[str, Tensor]  # only looked at: Eq. 7 without its weight, its accuracy
    moe: MoEOutput | None  # of the block with experts
    modality: Int[Tensor, " S"]  # of each token: 0 state, 1 action, 2 reward, 3 query


# ---------------------------------------------------------------------------------------- blocks
class Attention(nn.Module):
    """Multi-head self-attention; while decoding, over all tokens of the cache."""

    def __init__(self, cfg: ModelSettings, place: int):
        super().__init__()
        self.place, self.heads = place, cfg.heads  # place: of its block, in the cache
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)  # queries, keys, values: one product for all
        self.out = nn.Linear(cfg.width, cfg.width)

    def forward(
        self, x: Float[Tensor, "B S D"], view: View, cache: Cache | None
    ) -> Float[Tensor, "B S D"]:
        b, s, d = x.shape
        qkv = self.qkv(x).view(b, s, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, S, d) each, d = D/H numbers a head
        if cache is not None:  # decoding: S new tokens read all that came before them too
            first = cache.length - cache.length % view.stretch if view.stretch else 0
            k, v = cache.store(self.place, k, v)  # (B, H, old + S, d)
            k, v = k[:, :, first:], v[:, :, first:]  # or of their own stretch alone
        if view.mask is None:
            y = attention(q, k, v)  # causal: a_t is predicted from the past alone (Eq. 9)
        else:
            # DPT, query last: the prompt is causal, queries see what their mask says. Two calls, so
            # that the long part keeps the fast causal kernel and no query is a key of the prompt.
            n = view.prompt.stop  # tokens of the prompt; 0 in a first episode
            y = attention(q[:, :, n:], k, v, view.mask)  # (B, H, Q, d)
            if n:
                stretch = view.stretch or n
                own = in_stretches(q[:, :, :n], k[:, :, :n], v[:, :, :n], stretch)
                y = torch.cat([own, y], 2)
        return self.out(y.transpose(1, 2).reshape(b, s, d))  # heads side by side: (B, S, D)


class Block(nn.Module):
    """Pre-norm attention, then a feed-forward layer or, in one block, the MoE layer."""

    def __init__(self, cfg: ModelSettings, place: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.attention = Attention(cfg, place)
        self.drop = nn.Dropout(cfg.dropout)
        special = place == cfg.moe_block
        self.has_experts = special and cfg.moe != "none"
        if self.has_experts:  # Fig. 2a: the MoEs stand in place of the feed-forward layer
            self.ff = MoELayer(
                cfg.width,
                cfg.moe,
                token=(cfg.token_experts, cfg.token_top_k or cfg.top_k, cfg.token_hidden),
                task=(cfg.task_experts, cfg.top_k, cfg.task_hidden),
                routing=cfg.routing,
                w_imp=cfg.w_importance,
                w_load=cfg.w_load,
                w_contrastive=cfg.w_contrastive,
                center=cfg.task_center,
                keys=cfg.keys,
                contrast_trunk=cfg.contrast_trunk,
                task_balance=cfg.task_balance,
            )
        else:
            # Plain AD and DPT are 1.5 times wider where T2MIR has experts: as many active weights
            # as the two MoEs. One MoE alone, of as many hidden units and twice the outputs,
            # has 2/3 of them.
            hidden = cfg.ff * 3 // 2 if special else cfg.ff
            layers = nn.Linear(cfg.width, hidden), nn.GELU(), nn.Linear(hidden, cfg.width)
            self.ff = nn.Sequential(*layers)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        view: View,
        cache: Cache | None = None,
        read: Int[Tensor, " R"] | None = None,
        task: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B R D"], MoEOutput | None]:
        """The residual stream through one block, in training and in decoding (with a cache).

        `read`: only these tokens are wanted (the last block; None: all S, R = S). `task`: task
        numbers of the rows, for Eq. 7.
        """
        x = x + self.drop(self.attention(self.norm1(x), view, cache))
        h = self.norm2(x)  # "the hidden state after self-attention" of Sec. 4.1 and 4.2
        if read is not None:  # only now: as keys and values of attention all tokens were needed
            x = x.index_select(1, read)  # (B, R, D)
        if self.has_experts:  # its routers need all of h, whatever is read
            # The tokens that h lacks while decoding: h_bar (Eq. 4) is a mean over those too.
            past = None if cache is None else Past(cache.h_sum, cache.length)
            moe = self.ff(h, view, read, past, task)
            return x + self.drop(moe.y), moe
        if read is not None:
            h = h.index_select(1, read)
        return x + self.drop(self.ff(h)), None  # token by token: what is not read has no effect


# --------------------------------------------------------------------------------------- model
class T2MIR(nn.Module):
    """The policy pi_theta. Subclasses (ad.py, dpt.py) say in `forward(batch)` which tokens a batch
    is; `new_cache` and `decode` play, a few tokens at a time.
    """

    first_time = 0  # position of an episode's first step: AD 0..T-1, DPT 1..T (0 is the query's)
    stretch = 0  # tokens of a prompt that see one another (moe.py, `View`)

    def __init__(self, cfg: ModelSettings, family: Family):
        super().__init__()
        cfg.check()
        self.cfg, self.family = cfg, family
        # App. F: an embedding of its own for each modality
        cells = family.state_values  # a grid: how many values each coordinate takes
        if cells:
            # Rows for each coordinate, not for each cell: a held-out goal is then no new symbol.
            offsets = torch.tensor([0, *cells[:-1]]).cumsum(0)  # 10 x 10: x has rows 0-9, y 10-19
            self.register_buffer("coordinate", offsets, persistent=False)  # follows the family
            self.embed_state = nn.Embedding(sum(cells), cfg.width)
            span = (torch.tensor(cells) - 1.0).clamp_min(1)  # it divides: never 0
            self.register_buffer("span", span, persistent=False)
            # Tells that neighbouring cells are near: rows of the table know nothing of one another.
            self.embed_place = nn.Linear(family.state_dim, cfg.width, bias=False)
        else:
            self.embed_state = nn.Linear(family.state_dim, cfg.width)
        action = nn.Embedding if family.discrete_actions else nn.Linear  # ids, or numbers
        self.embed_action = action(family.action_dim, cfg.width)
        self.embed_reward = nn.Linear(1, cfg.width)
        for layer in (self.embed_state, self.embed_action, self.embed_reward):
            if isinstance(layer, nn.Linear):
                # Of numbers: torch's first weights make these small beside modality and time.
                layer.weight.data *= cfg.embed_gain
        # Sec. 4.3: s_t, a_t and r_t share the position embedding of their time step.
        self.embed_time = nn.Embedding(family.horizon + 1, cfg.width)  # T steps, and DPT's query
        # With a bias for each modality the token router tells them apart from the first step on.
        self.modality_bias = nn.Parameter(torch.empty(3, cfg.width))
        for table in (m.weight for m in self.children() if isinstance(m, nn.Embedding)):
            nn.init.normal_(table, std=0.5)  # not torch's 1: a token is a sum of several rows
        nn.init.normal_(self.modality_bias)  # twice a table row's: hard to miss
        if cells:
            nn.init.normal_(self.embed_place.weight)
        if cfg.token_shift:
            self.shift = nn.Parameter(torch.full((cfg.width,), 0.5))  # g: at first half of e_{i-1}
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width)  # pre-norm blocks only add: scale their sum
        self.head = nn.Linear(cfg.width, head_size(family, cfg.components))  # App. F: "a linear"

    # ---------------------------------------------------------------------------- embeddings
    def state_token(self, states: Tensor) -> Tensor:
        """(..., ds) -> (..., D), without a position."""
        if not self.family.state_values:
            return self.embed_state(states) + self.modality_bias[0]
        place = self.embed_place(2 * states / self.span - 1)  # coordinates in [-1, 1]
        return self.embed_state(states + self.coordinate).sum(-2) + place + self.modality_bias[0]

    def embed_prompt(self, prompt: Prompt, start: int = 0) -> Float[Tensor, "B three_n D"]:
        """s, a, r interleaved: n steps to 3 n tokens (Eq. 9). `start`: the first step's time."""
        state = self.state_token(prompt.states)
        action = self.embed_action(prompt.actions) + self.modality_bias[1]
        reward = prompt.rewards[..., None] / self.family.reward_scale  # (B, n, 1)
        reward = self.embed_reward(reward) + self.modality_bias[2]  # (B, n, D), as the others
        steps = torch.arange(prompt.steps, device=reward.device)
        # Positions are times and start again with every episode (Sec. 4.3): a longer prompt at test
        # time brings none that training has not seen.
        time = self.embed_time((start + steps) % self.family.horizon + self.first_time)  # (n, D)
        return (torch.stack([state, action, reward], 2) + time[:, None]).flatten(1, 2)

    def shifted(
        self, x: Float[Tensor, "B S D"], start: int = 0, previous: Tensor | None = None
    ) -> Float[Tensor, "B S D"]:
        """Token shift: e_i + g * e_{i-1}, g learned, one number a channel. Nothing passes from one
        episode to the next. `start` tokens come before x, the last of them `previous` (B, D).
        """
        if not self.cfg.token_shift:
            return x
        before = torch.zeros_like(x[:, :1]) if previous is None else previous[:, None]
        index = start + torch.arange(x.shape[1], device=x.device)
        inside = (index % (3 * self.family.horizon) != 0).to(x.dtype)[:, None]  # 0 at s_0
        return x + self.shift * inside * torch.cat([before, x[:, :-1]], 1)

    # ------------------------------------------------------------------------- the residual stream
    def run(
        self,
        x: Float[Tensor, "B S D"],
        view: View,
        read: Int[Tensor, " R"],
        cache: Cache | None = None,
        task: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B R A"], MoEOutput | None]:
        """Tokens through all blocks to the actions at `read`, in training and in decoding."""
        x, moe = self.drop(x), None
        for block in self.blocks:
            top = block is self.blocks[-1]  # above it, nothing looks at tokens that are not read
            x, here = block(x, view, cache, read if top else None, task)
            moe = here or moe
        action = self.head(self.norm(x))  # (B, R, A)
        # App. F: a tanh keeps continuous actions in [-1, 1]; logits stay, mixture.py has its own.
        plain = self.family.discrete_actions or self.cfg.components
        return action if plain else action.tanh(), moe

    def output(
        self, x: Tensor, view: View, read: Tensor, modality: Tensor, task: Tensor | None
    ) -> Output:
        """A training pass."""
        action, moe = self.run(x, view, read, task=task)
        losses, metrics = (moe.losses, moe.metrics) if moe else ({}, {})
        return Output(action, losses, metrics, moe, modality)

    def update_key_router(self) -> None:
        """Eq. 8, after the optimiser's step (Alg. 1 l. 15, Alg. 3 l. 22), of the new weights."""
        for part in self.modules():
            if isinstance(part, TaskRouter):
                eq8_momentum_update(part.key, part.query, self.cfg.momentum)

    # --------------------------------------------------------------------- incremental decoding
    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for `rows` sequences; it grows beyond `capacity` tokens by itself.

        Raises ValueError for a model whose tokens cannot be decoded one at a time.
        """
        cfg, like = self.cfg, self.head.weight
        if not cfg.decodable:
            raise ValueError("this model cannot be cached: its gate changes with every token")
        shape = (rows, cfg.heads, max(1, capacity), cfg.width // cfg.heads)
        k, v = ([like.new_empty(shape) for _ in range(cfg.layers)] for _ in range(2))
        zero = like.new_zeros(rows, cfg.width)  # the token before the first: shifts by nothing
        return Cache(k, v, zero.float(), zero)  # the sum: float32

    def decode(
        self, tokens: Float[Tensor, "B S D"], cache: Cache, keep: bool = True
    ) -> Float[Tensor, "B A"]:
        """Run new embedded tokens behind those of the cache; the action read at the last one.

        keep=False leaves the cache as it was (a DPT query, which nothing may see afterwards); then
        tokens are not shifted either, as in training.
        """
        x = self.shifted(tokens, cache.length, cache.previous) if keep else tokens
        count = x.shape[1]
        last = torch.tensor([count - 1], device=x.device)  # R = 1
        view = View(slice(0, count), stretch=self.stretch if keep else 0)  # a query sees all
        action, moe = self.run(x, view, last, cache)
        if keep:  # else the next call overwrites what stands behind `length`
            cache.length += count
            cache.previous = tokens[:, -1]  # not shifted itself, as in training
            if moe and moe.total is not None:  # without a task router nothing reads the sum
                cache.h_sum = moe.total
        return action[:, 0]  # (B, A)
