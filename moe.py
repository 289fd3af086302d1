"""moe.py: the layer of the paper (Sec. 3.2, 4.1, 4.2, Fig. 2; Eq. 2 and 4): two MoEs side by side.

in : h (B, S, D), hidden states after self-attention    out: y (B, R, D) at the tokens that are read
Read after router.py and contrastive.py, before models.py.          Try: python moe.py

    h ──┬── token-wise MoE: every token finds its experts        (Eq. 2) ──┐ D/2
        │                                                                  ├─ concatenated: D
        └── task-wise MoE: h_bar, the mean token, finds them     (Eq. 4) ──┘ D/2

    paper             here                        shape
    h                 h                           (B, S, D)
    h_bar             h_bar                       (B, D), or (B, S, D): one for each token
    tau               the tokens `View.prompt`    a slice of S
    G_tok, w_tok      token_router, Routing       logits (B*S, K_1), gates (B*S, k1)
    G_task, w_task    task_router, Routing        logits (B, K_2) or (B, R, K_2), gates (..., k2)
    E_tok, E_task     token, task: `Experts`      their weights stacked: (K, D, hidden), ...
    y_tok, y_task     the halves of MoEOutput.y   (B, R, D/2) each

    B rows, S tokens a row, R tokens whose output is wanted, Q queries behind a prompt, D width,
    K experts (K_1, K_2 in the two MoEs), k kept ones (k1, k2), hidden: units of one expert

All of Eq. 4 is here: the three rules for h_bar, centring, the gate, the experts. A further rule is
one more function under `@h_bar_rule`; its name is then a choice of --routing.

Where an output is never read it is never computed: actions are predicted at state tokens, so an MoE
in the last block runs its experts on those alone. Routers still see every token.

What departs from the paper, and where:
  * --routing. `sequence` is Eq. 4 as written, the default here and in the preset `paper`. While it
    trains, the gate of an early token has seen the later ones; at test time only the past exists.
    `prefix` (the preset `cpu`) averages the tokens up to the present one, in both. `token` gates
    each token by itself: the official code's form in half of its configurations.
  * --task-center, off here and in `paper`, on in `cpu`: see `Center`.
  * --no-contrast-trunk: Eq. 7 trains the task router alone. --task-balance: a bias that keeps every
    task expert in use (contrastive.py, `TaskRouter.gate`).
  * Queries behind the prompt (--query-position last, in `cpu`): also under `sequence`, each is
    gated by what it sees, the prompt's visible tokens and itself.
  * A query in front (`first`, the paper's) counts in the gate's h_bar, as in the official code.
    In Eq. 7 it does not: the paper's h_bar is the average over the tokens of tau.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from contrastive import Keys, TaskRouter
from router import NoisyTopKRouter, Routing
from support.distributed import all_gather_rows

MoEKind = Literal["both", "token", "task", "none"]


# --------------------------------------------------------- Eq. 4: what the task router reads: h_bar
@dataclass
class View:
    """Which tokens see which: those of `prompt`, causal, then queries that stand behind it.

    A query behind it (DPT, query last) sees the first `visible` tokens of the prompt and itself. A
    query in front (DPT, query first) stands at place 0: for the prompt's tokens it is a past one.
    """

    prompt: slice  # where the tokens of tau stand in the row
    visible: Int64[Tensor, "B Q"] | None = None  # tokens (not steps); None: no queries behind
    mask: Bool[Tensor, "B 1 Q keys"] | None = None  # attention of queries behind; with `visible`
    stretch: int = 0  # the prompt's tokens see those of their own stretch of so many; 0: all


@dataclass
class Past:
    """What decoding remembers of the tokens before h: enough to go on with a running mean."""

    total: Float32[Tensor, "B D"]  # their sum
    count: int  # their number


Rule = Callable[[Tensor, View, Past | None], Tensor]
H_BAR: dict[str, Rule] = {}  # name -> rule


def h_bar_rule(rule: Rule) -> Rule:
    """Register a rule: (h (B, S, D), view, past) -> h_bar (B, D), one gate a row, or (B, S, D).

    `past` is None in training and where a whole context is run at once; while decoding h holds the
    new tokens alone and `past` sums up those before them.
    """
    H_BAR[rule.__name__] = rule
    return rule


def running_sum(h: Float[Tensor, "B S D"], past: Past | None = None) -> Float32[Tensor, "B S D"]:
    """Sum of the tokens up to each one. Float32: in bfloat16, 256 + 1 is 256."""
    total = h.float().cumsum(1)
    return total if past is None else past.total[:, None] + total


def running_mean(h: Float[Tensor, "B S D"], view: View, past: Past | None) -> Tensor:
    """The mean of the tokens that each token sees, itself included: (B, S, D)."""
    prompt_end = view.prompt.stop  # the causal stretch begins at 0: a query in front is seen too
    total = running_sum(h[:, :prompt_end], past)  # (B, n, D)
    before = 0 if past is None else past.count
    count = before + torch.arange(1, total.shape[1] + 1, device=h.device)[:, None]  # (n, 1)
    mean = total / count  # (B, n, D)
    if view.visible is not None:
        # A query is the end of a sequence of its own: the prompt's first tokens, then itself.
        # With zeros in front, sums[m] is the sum of the first m tokens, also for m = 0.
        sums = F.pad(total, (0, 0, 1, 0))  # (B, n+1, D)
        visible = view.visible[..., None]  # (B, Q, 1)
        seen = sums.gather(1, visible.expand(-1, -1, h.shape[-1]))  # (B, Q, D)
        mean = torch.cat([mean, (seen + h[:, prompt_end:]) / (visible + 1)], 1)  # (B, n+Q, D)
    return mean.to(h.dtype)


@h_bar_rule
def sequence(h: Float[Tensor, "B S D"], view: View, past: Past | None) -> Float[Tensor, "B ... D"]:
    """Eq. 4 as written: one h_bar, the mean of all tokens of the row. In training it looks ahead.

    Two cases have no such "all": a decoded token has no future, and each query behind a prompt is
    the end of a sequence of its own. There it is the mean up to that token.
    """
    if past is None and view.visible is None:
        return h.mean(1)  # (B, D): one gate for the whole row
    return running_mean(h, view, past)


@h_bar_rule
def prefix(h: Float[Tensor, "B S D"], view: View, past: Past | None) -> Float[Tensor, "B S D"]:
    """Departs from Eq. 4: the mean of the tokens up to each one, in training as in testing."""
    return running_mean(h, view, past)


@h_bar_rule
def token(h: Float[Tensor, "B S D"], view: View, past: Past | None) -> Float[Tensor, "B S D"]:
    """Departs from Eq. 4: no mean at all. For Eq. 7 the *logits* of the tokens are averaged."""
    return h  # the task-wise MoE is then a token-wise one whose router Eq. 7 trains


# The choices on the command line; made here, which type checkers cannot follow.
TaskRouting = Literal[tuple(H_BAR)]  # pyrefly: ignore[invalid-literal]


class Center(nn.Module):
    """h_bar minus its running mean, over its running scale (a switch; the paper has none).

    Why: the mean hidden states of different trajectories are nearly the same vector, large next to
    their differences. So are then their logits, and the kept experts, for every task.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))  # of each channel
        self.register_buffer("variance", torch.ones(()))  # one for all: channels keep their ratio
        self.register_buffer("batches", torch.zeros(()))  # seen so far

    def forward(self, h_bar: Float[Tensor, "B *tokens D"]) -> Float32[Tensor, "B *tokens D"]:
        # The gradient passes to h_bar; the statistics are constants, as in batch norm's eval mode.
        return (h_bar.float() - self.mean) * (self.variance + 1e-6).rsqrt()

    @torch.no_grad()
    def observe(self, h_bar: Float[Tensor, "B *tokens D"]) -> None:
        """Follow the trajectories of a training batch, over all processes.

        A plain average of the first ten batches, then one that forgets older ones: early in
        training h_bar drifts much faster than it varies.
        """
        rows = all_gather_rows(h_bar.detach().float().flatten(0, -2))  # (all rows, D)
        # New tensors, not changed ones: the backward pass of this batch still reads the old.
        self.batches = self.batches + 1
        rate = (1 / self.batches).clamp_min(0.1)  # 1, 1/2, 1/3, ... 1/10, 1/10, ...
        spread = (rows - rows.mean(0)).square().mean()
        self.variance = self.variance.lerp(spread, rate)
        self.mean = self.mean.lerp(rows.mean(0), rate)


# ------------------------------------------------ the experts: the weighted sums of Eq. 2 and Eq. 4
def two_layers(
    x: Float[Tensor, "n D"],
    weight1: Float[Tensor, "D hidden"],
    bias1: Float[Tensor, " hidden"],
    weight2: Float[Tensor, "hidden out"],
    bias2: Float[Tensor, " out"],
) -> Float[Tensor, "n out"]:
    """One expert E_i on n tokens."""
    return F.gelu(x @ weight1 + bias1) @ weight2 + bias2  # under autocast: in half precision


class Experts(nn.Module):
    """K two-layer networks D -> hidden -> out with GELU, weights stacked along the first axis.

    Stacked, a bias is a matrix too: tell weights and biases by name, not by the number of axes.
    """

    def __init__(self, experts: int, width: int, hidden: int, out: int):
        super().__init__()
        # Uniform within 1 / sqrt(inputs), as torch's Linear, which stacked weights cannot use.
        first = torch.empty(experts, width, hidden).uniform_(-1, 1) / math.sqrt(width)
        self.weight1 = nn.Parameter(first)  # (K, D, hidden)
        self.bias1 = nn.Parameter(torch.zeros(experts, hidden))  # (K, hidden)
        second = torch.empty(experts, hidden, out).uniform_(-1, 1) / math.sqrt(hidden)
        self.weight2 = nn.Parameter(second)  # (K, hidden, out)
        self.bias2 = nn.Parameter(torch.zeros(experts, out))  # (K, out)

    def tokens(self, x: Float[Tensor, "N D"], routing: Routing) -> Float[Tensor, "N out"]:
        """sum_i w(i; x) E_i(x), a gate for every token: x (N, D), routing (N, k)   (Eq. 2).

        Tokens are sorted by expert, each then one dense product over a contiguous slice: what was
        not kept costs nothing, the point of sparse experts. While decoding, few have any token.
        """
        k = routing.index.shape[-1]
        chosen = routing.index.flatten()  # (N*k,): k choices of token 0, k of token 1, ...
        order = chosen.argsort(stable=True)  # choices sorted by expert
        count = torch.bincount(chosen, minlength=len(self.weight1)).tolist()  # choices of each
        token_of = order // k  # whose choice it is
        # index_select and unbind in place of x[token_of] and weight1[i]: their backward passes are
        # cheaper (one gradient for a whole stack, not one for each slice).
        slices = x.index_select(0, token_of).split(count)  # K slices, (n, D) each
        stacks = (self.weight1, self.bias1, self.weight2, self.bias2)
        experts = zip(slices, *(stack.unbind() for stack in stacks), strict=True)
        y = torch.cat([two_layers(part, *weights) for part, *weights in experts if len(part)])
        gate = routing.weight.flatten().index_select(0, order)  # w(i; x) of each choice
        y = y * gate[:, None].to(y.dtype)
        # Add up the k weighted answers of each token, at the token's own place.
        return y.new_zeros(len(x), y.shape[-1]).index_add_(0, token_of, y)

    def sequences(self, x: Float[Tensor, "B R D"], routing: Routing) -> Float[Tensor, "B R out"]:
        """The same with one gate for a whole row: x (B, R, D), routing (B, k)   (Eq. 4).

        A weighted sum of k networks is one network with k * hidden units whose activations are
        scaled by the gate: two batched products in place of a loop.
        """
        index = routing.index  # (B, k)
        gate = routing.weight.to(x.dtype)  # (B, k)
        b, _, d = x.shape
        weight1 = self.weight1[index].transpose(1, 2).reshape(b, d, -1)  # (B, D, k*hidden)
        bias1 = self.bias1[index].reshape(b, 1, -1)  # (B, 1, k*hidden)
        weight2 = self.weight2[index].reshape(b, -1, self.weight2.shape[-1])  # (B, k*hidden, out)
        active = F.gelu(torch.baddbmm(bias1.to(x.dtype), x, weight1.to(x.dtype)))  # all k at once
        active = active * gate.repeat_interleave(self.weight1.shape[-1], 1)[:, None]
        # The second layer is linear: scaling its input scales its output; its bias is scaled here.
        bias2 = (gate[..., None] * self.bias2[index]).sum(1, keepdim=True)  # (B, 1, out)
        return torch.baddbmm(bias2.to(x.dtype), active, weight2.to(x.dtype))


# ---------------------------------------------------------------------------------------- the layer
@dataclass
class MoEOutput:
    """What one layer computes. `losses` are weighted already: training adds them up as they are."""

    y: Float[Tensor, "B R D"]
    losses: dict[str, Tensor]  # "balance" (Eq. 3), "contrastive" (Eq. 7): those that apply
    metrics: dict[str, Tensor]  # "info_nce" (Eq. 7 without its weight), "accuracy"
    token_expert: Int64[Tensor, "B S k1"] | None  # kept experts of every token, best first
    task_expert: Int64[Tensor, "B *tokens k2"] | None  # (B, k2), or (B, R, k2): one for each token
    total: Float32[Tensor, "B D"] | None  # decoding: the sum of all tokens so far, the next `Past`


class MoELayer(nn.Module):
    """Token-wise and task-wise MoE in parallel, halves concatenated (Sec. 4); or one at full width.

    `token` and `task` are (experts K, kept k, hidden units of all experts together). Raises
    ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        width: int,
        kind: MoEKind,
        token: tuple[int, int, int],
        task: tuple[int, int, int],
        routing: TaskRouting = "sequence",
        w_imp: float = 0.1,
        w_load: float = 0.1,
        w_contrastive: float = 0.01,
        center: bool = False,
        keys: Keys = "all",
        contrast_trunk: bool = True,
        task_balance: float = 0.0,
    ):
        super().__init__()
        token_experts, token_k, token_hidden = token
        task_experts, task_k, task_hidden = task
        if kind == "both" and width % 2:
            raise ValueError(f"two parallel MoEs share the width equally: {width} is odd")
        if token_hidden % token_experts or task_hidden % task_experts:
            raise ValueError(
                "hidden units must be a multiple of the experts, who share them equally"
            )
        out = width // 2 if kind == "both" else width
        self.task_k = task_k  # k of Eq. 4
        self.routing = routing  # the rule for h_bar
        self.w_contrastive = w_contrastive  # w_con of Algorithms 1 and 3
        self.contrast_trunk = contrast_trunk  # whether Eq. 7 moves more than router and W
        self.has_token = kind in ("both", "token")
        self.has_task = kind in ("both", "task")
        if self.has_token:
            self.token_router = NoisyTopKRouter(width, token_experts, token_k, w_imp, w_load)
            self.token = Experts(token_experts, width, token_hidden // token_experts, out)
        if self.has_task:
            self.task_router = TaskRouter(width, task_experts, keys, task_balance)
            self.center = Center(width) if center else nn.Identity()  # Identity: the paper
            self.task = Experts(task_experts, width, task_hidden // task_experts, out)

    def forward(
        self,
        h: Float[Tensor, "B S D"],
        view: View,
        read: Int64[Tensor, " R"] | None = None,
        past: Past | None = None,
        task: Int64[Tensor, " B"] | None = None,
    ) -> MoEOutput:
        """h (B, S, D) -> y (B, R, D), the losses of the routers and what they chose.

        `read`: the places of the tokens whose output is wanted (None: all S of them). `past`: given
        while decoding. `task`: the task of each row, which asks for the loss of Eq. 7.
        """
        losses, metrics = {}, {}  # a further loss is one more entry, where it is computed
        halves = []  # y_tok, y_task
        token_expert = task_expert = h_bar = total = None
        # Before the token-wise half: autograd adds the two halves' gradients of h in this order, on
        # which the last bits of a seed's run depend.
        if self.has_task:  # all tokens count in h_bar, also those that nothing reads from here on
            h_bar = H_BAR[self.routing](h, view, past)
            if h_bar.dim() == 3 and read is not None:
                h_bar = h_bar.index_select(1, read)
            if past is not None:
                total = running_sum(h, past)[:, -1]  # up to the last token
        x = h if read is None else h.index_select(1, read)
        if self.has_token:
            y, losses["balance"], token_expert = self._token_wise(h, x, read)
            halves.append(y)
        if h_bar is not None:
            # No noise, no balance loss: that tasks get experts of their own is Eq. 7's care.
            gate = self.task_router.gate(self.center(h_bar), self.task_k)
            task_expert = gate.index
            halves.append(self._task_wise(x, gate))
            if task is not None:
                metrics["info_nce"], metrics["accuracy"] = self._contrast(h[:, view.prompt], task)
                losses["contrastive"] = self.w_contrastive * metrics["info_nce"]
        y = torch.cat(halves, -1)  # Fig. 2: side by side, not added
        return MoEOutput(y, losses, metrics, token_expert, task_expert, total)

    def _token_wise(
        self, h: Float[Tensor, "B S D"], x: Float[Tensor, "B R D"], read: Tensor | None
    ) -> tuple[Float[Tensor, "B R out"], Float32[Tensor, ""], Int64[Tensor, "B S k1"]]:
        """y_tok = sum_i w_tok(i; h) E_tok(i|h)   (Eq. 2), the loss of Eq. 3, the experts kept."""
        b, s, d = h.shape
        routing, balance = self.token_router(h.reshape(b * s, d))  # every token, read or not
        token_expert = routing.index.view(b, s, -1)
        index, weight = token_expert, routing.weight.view(b, s, -1)  # (B, S, k1)
        if read is not None:  # experts run on the tokens that are read alone: (B, R, k1)
            index, weight = index.index_select(1, read), weight.index_select(1, read)
        kept = Routing(index.flatten(0, 1), weight.flatten(0, 1))
        y = self.token.tokens(x.reshape(-1, d), kept).view(*x.shape[:2], -1)
        return y, balance, token_expert

    def _task_wise(self, x: Float[Tensor, "B R D"], gate: Routing) -> Float[Tensor, "B R out"]:
        """y_task = sum_i w_task(i; h_bar) E_task(i|h)   (Eq. 4), with a gate a row or a token.

        The paper writes E_task(i|h_bar); Sec. 4.2 says that the experts "process these tokens".
        """
        index, weight = gate.index, gate.weight
        if index.dim() == 2:  # one gate a row
            # Two equal ways. A copy of the weights for each row costs more than one of its tokens
            # if these are fewer than an expert's hidden units (a GPU though hates small products).
            if x.is_cuda or x.shape[1] >= self.task.weight1.shape[-1]:
                return self.task.sequences(x, gate)
            index, weight = (part[:, None].expand(-1, x.shape[1], -1) for part in (index, weight))
        flat = Routing(index.flatten(0, 1), weight.flatten(0, 1))  # (B*R, k2)
        return self.task.tokens(x.flatten(0, 1), flat).view(*x.shape[:2], -1)

    def _contrast(
        self, h: Float[Tensor, "B n D"], task: Int64[Tensor, " B"]
    ) -> tuple[Float32[Tensor, ""], Float32[Tensor, ""]]:
        """(loss, accuracy) of Eq. 7 for the tokens h of tau, whatever else stands in the row."""
        # Eq. 7 is about whole trajectories: whatever the gate reads, z is what the router says of
        # the mean token. Only where the gate never sees a mean, z is the mean of the logits.
        tau = h if self.routing == "token" else h.float().mean(1)
        if not self.contrast_trunk:
            tau = tau.detach()
        result = self.task_router.contrast(self.center(tau), task)
        if self.training and isinstance(self.center, Center):  # after use: gate and z see the same
            self.center.observe(tau)
        return result


if __name__ == "__main__":
    torch.manual_seed(0)
    layer = MoELayer(8, "both", token=(6, 2, 48), task=(4, 2, 32)).eval()
    h = torch.randn(1, 3, 8)  # one row: a state, an action and a reward token
    out = layer(h, View(slice(0, 3)))
    row = out.task_expert[0].tolist()
    for name, expert in zip(("state", "action", "reward"), out.token_expert[0], strict=True):
        print(f"{name:6s} token -> token experts {expert.tolist()};  its row -> task experts {row}")
    print(f"output {tuple(out.y.shape)}: {out.y.shape[-1] // 2} numbers from each half")
