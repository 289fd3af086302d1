"""routers.py: what the routers of a finished run make of fresh trajectories (Fig. 1, 12, 13).

in : a run's method, tasks          out: `Seen`: hidden states, logits, experts of every trajectory
Read beside figures.py.

Fresh: the policy itself plays, as an evaluation does, so that no dataset is needed and nothing of
it was trained on. A trajectory is one prompt as long as in training, L episodes behind one another,
of which the first episode (no context yet) is not one. It is then read once, as training reads it:
AD's episodes stand ascending by return (Algorithm 1), DPT's in the order of play.

Where the paper is silent (Fig. 1, 12, 13 do not say what is embedded): here it is the router's
logits, G_tok(.|h) of tokens and z = G_task(.|h_bar) of trajectories, h_bar over the whole of tau as
in Eq. 7.

Symbols (paper -> here): tau -> a row of `Prompt`; z -> `z`; w_task(i; h_bar) -> `gate`.
Shapes: N tasks, P plays of each, M = N*P trajectories, S tokens, D width, K_1, K_2 experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ad import AD, sort_and_drop
from data import Prompt
from dpt import DPTModel, queries_behind
from evaluate import play
from methods import Method
from models import T2MIR
from moe import MoELayer, View
from policies import concatenate
from router import Router, dense_gates

UNTRAINED = 5  # routers with new weights that the trained one is compared with


def play_episodes(method: Method, tasks: list, episodes: int, seed: int = 0) -> list[Prompt]:
    """The episodes that a run's policy plays on its own settings: prompts of (N, T) steps each."""
    policy, history = method.policy(replace(method.cfg.play, play_seed=seed)), []
    # an evaluation has small seeds: these starts are others
    starts = 1_000_003 + seed
    play(method.cfg.data.env, tasks, policy, episodes, starts, history=history)
    return history


def fresh(method: Method, tasks: list, plays: int) -> tuple[Prompt, np.ndarray]:
    """M trajectories as the model reads them, and of which task each is, (M,)."""
    episodes = method.cfg.training.prompt_length // method.family.horizon  # L
    rows = [task for task in tasks for _ in range(plays)]
    played = play_episodes(method, rows, episodes + 1)[1:]
    if isinstance(method, AD):  # Algorithm 1, line 6
        played = sort_and_drop(played, episodes)
    tau, policy = concatenate(played), method.policy(method.cfg.play)
    # with the training data's normalisation, as the weights have learned to read states
    return policy.prompt(tau.states, tau.actions, tau.rewards), np.arange(len(rows)) // plays


# ------------------------------------------------------------------------------------- reading them
@dataclass
class TokensSeen:
    """What the token router makes of M trajectories."""

    modality: np.ndarray  # (S,): 0 state, 1 action, 2 reward, of the tokens of tau
    logits: np.ndarray  # (M, S, K_1), without noise
    expert: np.ndarray  # (M, S): the best of the kept
    untrained: list[np.ndarray]  # (M, S) each: the experts of new routers


@dataclass
class TasksSeen:
    """What the task router makes of M trajectories."""

    z: np.ndarray  # (M, K_2)
    gate: np.ndarray  # (M, K_2): w_task(i; h_bar), 0 where not kept; rows sum to 1
    expert: np.ndarray  # (M,): the one with the largest gate
    untrained: list[np.ndarray]  # (M, K_2) each: z of new routers


@dataclass
class Seen:
    """What the MoE layer makes of them; None where it has no such experts."""

    tokens: TokensSeen | None
    tasks: TasksSeen | None


def has_experts(method: Method) -> bool:
    """Whether there is something to see: a user's own network may have no such layer."""
    return isinstance(method.model, T2MIR) and method.cfg.model.moe != "none"


def tokens_of(model: Any, prompt: Prompt) -> tuple[Tensor, View]:
    """tau as the model's first block reads it, and where it stands in the row."""
    x = model.shifted(model.embed_prompt(prompt))  # (M, 3n, D)
    n = x.shape[1]
    if not isinstance(model, DPTModel):  # AD has no query
        return x, View(slice(0, n))
    # DPT: a query, as at test time a state of the task's start
    query = model.embed_query(prompt.states[:, :1])
    if not model.query_last:  # the prompt's tokens see it
        return torch.cat([query, x], 1), View(slice(1, 1 + n))
    # They do not; only a row with a query has a mask, and with it the stretches of --independent.
    visible = torch.full((len(x), 1), n, device=x.device)
    return torch.cat([x, query], 1), queries_behind(n, visible, model.stretch)


@torch.no_grad()
def look(method: Method, prompt: Prompt, batch: int = 8) -> Seen:
    """Read M trajectories, a few at a time. Raises ValueError for a run without experts."""
    if not has_experts(method):
        raise ValueError(f"{method.label} has no experts")
    model: Any = method.model.eval()  # no noise, no dropout
    layer = model.blocks[model.cfg.moe_block].ff
    caught: list[Tensor] = []  # h of the layer that is looked at, of tau's tokens: (B, S, D) each
    hook = layer.register_forward_hook(
        lambda _module, args, _out: caught.append(args[0][:, args[1].prompt])  # h, view
    )
    try:
        for rows in torch.arange(len(prompt.rewards)).split(batch):
            x, view = tokens_of(
                model, Prompt(prompt.states[rows], prompt.actions[rows], prompt.rewards[rows])
            )
            model.run(x, view, torch.tensor([x.shape[1] - 1], device=x.device))
    finally:
        hook.remove()
    h = torch.cat(caught)  # (M, S, D)
    return Seen(
        tokens_seen(layer, h) if layer.has_token else None,
        tasks_seen(layer, h) if layer.has_task else None,
    )


def tokens_seen(layer: MoELayer, h: Tensor) -> TokensSeen:
    logits = layer.token_router.router(h)  # (M, S, K_1)
    new = untrained(h.shape[-1], logits.shape[-1], h)
    return TokensSeen(
        modality=np.arange(h.shape[1]) % 3,
        logits=logits.cpu().numpy(),
        expert=logits.argmax(-1).cpu().numpy(),  # the first of the top k
        untrained=[router(h).argmax(-1).cpu().numpy() for router in new],
    )


def tasks_seen(layer: MoELayer, h: Tensor) -> TasksSeen:
    # as in Eq. 7: the mean token; only where the gate never sees a mean, the mean of the logits
    tau = layer.center(h if layer.routing == "token" else h.float().mean(1))
    experts = len(layer.task.weight1)  # K_2

    def one_each(x: Tensor) -> np.ndarray:
        """A row a trajectory: (M, K) as it is, (M, S, K) averaged over its tokens."""
        return (x.mean(1) if x.dim() == 3 else x).cpu().numpy()

    gate = one_each(dense_gates(layer.task_router.gate(tau, layer.task_k), experts))
    new = untrained(h.shape[-1], experts, h)
    return TasksSeen(
        z=one_each(layer.task_router(tau)),
        gate=gate,
        expert=gate.argmax(-1),
        untrained=[one_each(router(tau)) for router in new],
    )


def untrained(width: int, experts: int, like: Tensor) -> list[Router]:
    """Routers as training begins with them; the same ones at every call."""
    with torch.random.fork_rng(devices=[]):  # looking must not change anybody's random numbers
        torch.manual_seed(0)
        return [Router(width, experts).to(like.device) for _ in range(UNTRAINED)]
