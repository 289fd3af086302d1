"""dpt.py: T2MIR-DPT (paper Sec. 4.3; Eq. 11; Algorithms 3 and 4).

in : a dataset with labelled queries      out: batches, their loss, and the policy that plays
Read after ad.py.

DPT (decision-pretrained transformer) predicts the optimal action in a query state from a prompt:
any transitions of the task, in any order. What it converges to is the posterior over optimal
actions given the prompt, so that it acts as posterior sampling does.

    tokens, query first (paper)   q  s_1 a_1 r_1  s_2 a_2 r_2 ...     a* is predicted at q and at
                                  every s, from all before it (and, in training with --routing
                                  sequence, through the gate of Eq. 4, whose h_bar is of all)
    tokens, query last (switch)   s_1 a_1 r_1 ... s_n a_n r_n | q q q    a* is predicted at each q,
                                  which sees the first `visible` steps of the prompt and itself
    at test time                  the prompt is the previous episode (Algorithm 4), or all so far

Symbols (paper -> here): tau_pro -> Prompt; (s, a*) -> query_states, query_actions; D^q -> the
dataset's queries; R, tau (Alg. 4) -> `history`, `past`.
Shapes: B rows, n = L*T steps of a prompt, Q labels a prompt (the paper: one), R predictions a row,
ds, da numbers of a state and of an action, A numbers or logits.

Why the query stands in front: its token is then the past of all others, so that every state token
of the prompt predicts a* for it too, each from a longer part of the prompt. Attention is causal, so
with a query in front the prompt's tokens depend on it: a new query is a new pass over the prompt.

Differs from the paper (switches): with `--query-position last` many labels share one pass over a
prompt (`--queries`), and at test time the prompt's keys and values are computed once an episode;
`--prompt all` grows the prompt over the episodes; with `--independent` these do not attend to one
another (`DPTModel` says why they need not). Both draws of a task are imitated, as in ad.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

import diagnostics
from ad import eq10_imitation_loss
from config import Config, FewOrNone, Play, Rows, Share
from data import (
    Dataset,
    Prompt,
    cell_ids,
    draw_episodes,
    draw_tasks,
    gather_prompt,
    model_dtype,
    one_step_a_state,
    steps_at,
)
from envs import Family
from methods import Method
from models import T2MIR, ModelSettings, Output
from moe import View
from policies import Memory, ModelPolicy, concatenate


@dataclass
class DPTBatch:
    """Algorithm 3, lines 8-16: query-label pairs drawn independently of the prompt (Eq. 11)."""

    prompt: Prompt  # n = L*T steps
    task: Tensor | None  # (B,) int64: equal numbers are positives in Eq. 7; None: no Eq. 7
    query_states: Tensor  # (B, Q, ds)
    query_actions: Tensor  # (B, Q[, da]): the labels a*
    visible: Tensor  # (B, Q) int64: each query sees this many steps of the prompt (n: all of it)

    def to(self, device) -> DPTBatch:
        return DPTBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class DPTSettings:
    """queries of DPT (Algorithm 3)"""

    query_position: Literal["first", "last"] = "first"
    """Where the query stands; first is the paper's, last lets the prompt be cached."""
    queries: Rows = 1
    """With the query last: labelled states a prompt."""
    short: Share = 0.0
    """With the query last: share of queries that see a random part of the prompt."""
    empty: Share = 0.0
    """With the query last: share of queries that see no prompt."""
    independent: bool = field(default=False, metadata={"before": False})
    """With the query last: a prompt's episodes do not attend to one another, queries to all."""
    pooled: FewOrNone = field(default=0, metadata={"before": 0})
    """Grids: every other prompt is what up to so many episodes without a reward have seen."""


@dataclass(frozen=True)
class DPTPlay(Play):
    """how an evaluation plays (Algorithm 4)"""

    prompt: Memory = "last"
    """The previous episode (Algorithm 4), or all so far."""


# ---------------------------------------------------------------------------------------- tokens
def queries_behind(tokens: int, visible: Int64[Tensor, "B Q"], stretch: int = 0) -> View:
    """Query last: each of Q queries sees the first `visible` tokens of the prompt and itself."""
    b, q = visible.shape
    places = torch.arange(tokens, device=visible.device)
    of_prompt = places < visible[..., None]  # (B, Q, tokens)
    # Itself alone: queries must not see one another, at test time there is one.
    itself = torch.eye(q, dtype=torch.bool, device=visible.device).expand(b, q, q)
    # (B, 1, Q, tokens + Q): what attention takes, the same for all heads
    mask = torch.cat([of_prompt, itself], -1)[:, None]
    return View(slice(0, tokens), visible, mask, stretch)


class DPTModel(T2MIR):
    """The tokens of Eq. 11; position 0 is the query's, the prompt's steps count from 1."""

    first_time = 1  # 0 is the position of queries, which belong to no step of the prompt

    def __init__(
        self, cfg: ModelSettings, family: Family, query_last: bool, independent: bool = False
    ):
        super().__init__(cfg, family)
        self.query_last = query_last
        # The posterior is a product of one factor an episode, so none has to read another. Cost
        # then grows with their number, and not with its square.
        self.stretch = 3 * family.horizon if independent else 0

    def embed_query(self, states: Shaped[Tensor, "B Q ds"]) -> Float[Tensor, "B Q D"]:
        return self.state_token(states) + self.embed_time.weight[0]

    def forward(self, batch: DPTBatch) -> Output:
        """One pass over a batch: R = n + 1 predictions of one label, or R = Q, one of each."""
        prompt = self.shifted(self.embed_prompt(batch.prompt))  # (B, 3 * steps, D)
        query = self.embed_query(batch.query_states)  # (B, Q, D), never shifted: it follows nothing
        n, q, device = prompt.shape[1], query.shape[1], prompt.device  # n tokens here
        modality = torch.arange(n, device=device) % 3  # s, a, r, s, a, r, ...
        of_query = modality.new_full((q,), 3)  # a number of its own: no modality of tau
        if self.query_last:
            x = torch.cat([prompt, query], 1)  # (B, n + Q, D)
            view = queries_behind(n, 3 * batch.visible, self.stretch)  # steps to tokens
            read = torch.arange(n, n + q, device=device)  # R = Q: the queries
            modality = torch.cat([modality, of_query])
        else:
            x = torch.cat([query, prompt], 1)  # (B, 1 + n, D)
            view = View(slice(1, 1 + n))  # tau begins behind the query: Eq. 7 leaves that out
            # R = 1 + steps: the query, which knows no prompt yet, and every state token
            read = torch.cat([torch.zeros_like(of_query), torch.arange(1, 1 + n, 3, device=device)])
            modality = torch.cat([of_query, modality])
        return self.output(x, view, read, modality, batch.task)


# ------------------------------------------------------------------------------------ Algorithm 3
def sample_dpt(
    dataset: Dataset,
    rows: int,
    episodes: int,
    draws: int,
    rng: torch.Generator,
    settings: DPTSettings,
) -> DPTBatch:
    """Algorithm 3, lines 8-16: prompts of `episodes` trajectories, and labelled states that are
    drawn independently of them. Both draws of a task are imitated: tau' has a query-label pair too,
    (s', a*') of line 12.

    Queries that stand behind the prompt need not see all of it: a share `empty` sees nothing (the
    first episode at test time), a share `short` a random number of steps, and the others 1, 2, ...
    or all of its episodes, equally often.
    """
    task = draw_tasks(dataset, rows, draws, rng)  # (B,); line 10; each for tau_i and for tau'_i
    # Episodes in a random order, not sorted as in Algorithm 1: here nothing has to rise.
    chosen = draw_episodes(dataset, len(task), episodes, rng)  # (B, L); lines 13, 14
    prompt = gather_prompt(dataset, task, chosen)
    if settings.pooled:
        prompt = with_pools(prompt, dataset, task, settings.pooled, rng)
    # Independent of the prompt: the prompt then tells which task it is, and not the query's answer.
    size = (len(task), settings.queries)  # (B, Q)
    pick = torch.randint(dataset.query_states.shape[1], size, generator=rng)  # line 12
    labels = dataset.query_actions[task[:, None], pick]  # (B, Q[, da])
    # What each query would see, were it of either kind; then which kind it is. All are drawn,
    # whatever the shares are: another share then changes nothing else in a seed's batches.
    part = torch.randint(prompt.steps + 1, size, generator=rng)  # 0 ... n steps
    whole = dataset.family.horizon * torch.randint(1, episodes + 1, size, generator=rng)
    kind = torch.rand(size, generator=rng)
    visible = torch.where(kind < settings.empty + settings.short, part, whole)
    visible = torch.where(kind < settings.empty, torch.zeros_like(part), visible)
    return DPTBatch(
        prompt=prompt,
        task=task,
        query_states=model_dtype(dataset, dataset.query_states[task[:, None], pick]),
        query_actions=labels.long() if dataset.family.discrete_actions else labels.float(),
        visible=visible,
    )


def with_pools(
    prompt: Prompt, dataset: Dataset, task: Tensor, most: int, rng: torch.Generator
) -> Prompt:
    """Half of the prompts (B, T), drawn at random, become what 1, 2, ... or `most` episodes of
    their task have seen that found no reward: one step of each state, T in all.

    A long search in few tokens. All its rewards are alike, so that it does not matter which step
    of a state is kept, nor what stands behind it.
    """
    most = min(most, dataset.episodes)  # a folder of --data may have any number
    rewards = dataset.rewards[task]  # (B, E, T)
    quiet = rewards.amax(2) == rewards.amin((1, 2))[:, None]  # (B, E): none above the task's lowest
    # places of the largest of E random numbers; all others come behind the quiet ones
    order = (torch.rand(quiet.shape, generator=rng) + quiet).topk(most, dim=1).indices
    count = 1 + (torch.rand(len(task), generator=rng) * most).long()
    count = torch.minimum(count, quiet.sum(1))  # 0: this task has none, and keeps its prompt
    # fewer than `most`: the first ones again, whose steps tell nothing new
    place = torch.arange(most) % count.clamp_min(1)[:, None]  # (B, most)
    pool = gather_prompt(dataset, task, order.gather(1, place))  # (B, most * T)
    pool = one_step_a_state(pool, dataset.family.state_values or (), prompt.steps)
    return where((torch.rand(len(task), generator=rng) < 0.5) & (count > 0), pool, prompt)


def where(chosen: Tensor, one: Prompt, other: Prompt) -> Prompt:
    """Row by row (B,): this prompt or the other, of as many steps."""
    columns = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Prompt)]
    return Prompt(*(torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in columns))


class DPT(Method):
    """T2MIR-DPT; with --moe none plain DPT."""

    # Its settings join the command line (methods.py); its presets are Table 5's, "dpt" there.
    Model, Settings, Play = ModelSettings, DPTSettings, DPTPlay
    try_next = "--prompt all or last of evaluate.py: every episode its memory, or one"

    def network(self) -> DPTModel:
        settings = self.cfg.method
        last = settings.query_position == "last"
        return DPTModel(self.cfg.model, self.family, last, settings.independent)

    @property
    def label(self) -> str:
        return self.cfg.model.label("DPT")

    def sample(self, dataset: Dataset, rows: int, draws: int, rng: torch.Generator) -> DPTBatch:
        # L; Table 5's prompts are one episode long
        episodes = self.cfg.training.prompt_length // self.family.horizon
        return sample_dpt(dataset, rows, episodes, draws, rng, self.cfg.method)

    def losses(self, batch: DPTBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Algorithm 3, lines 18-20: Eq. 11, Eq. 3 and w_con times Eq. 7."""
        output = self.forward(batch)
        target = batch.query_actions  # (B, Q[, da])
        if target.shape[1] == 1:  # query first: one label for all n + 1 predictions
            target = target.expand(-1, output.action.shape[1], *target.shape[2:])
        discrete = self.family.discrete_actions
        imitation = eq10_imitation_loss(output.action, target, discrete)  # Eq. 11: a* for a_t
        return {"imitation": imitation, **output.losses}, output.metrics

    def policy(self, play: DPTPlay) -> DPTPolicy:
        return DPTPolicy(self, play)

    def play_name(self, play: DPTPlay) -> list[str]:
        return [play.prompt]

    def tokens(self) -> int:
        return super().tokens() + self.cfg.method.queries

    def probe(self, dataset: Dataset, rows: int, rng: torch.Generator) -> dict[str, float]:
        """Routing; where the exact posterior is known, also how far the network is from it."""
        last = self.model.query_last
        episodes = self.cfg.training.prompt_length // self.family.horizon
        # 32 queries, so that the mean divergence is over enough states; a query in front has no
        # company. Two draws of each task, without which Eq. 7 finds no positive.
        one_or_many = DPTSettings(queries=32 if last else 1)
        fresh = sample_dpt(dataset, rows, episodes, 2, rng, one_or_many)
        fresh.visible.fill_(fresh.prompt.steps)  # all of the prompt: as the posterior sees it
        batch = fresh.to(self.device)
        output = self.model(batch)
        numbers = diagnostics.routing(output, self.cfg.model, len(batch.query_states))
        if self.family.divergence is not None:  # DarkRoom
            # query first: only the last prediction has seen all of the prompt; (B, Q, A)
            policy = (output.action if last else output.action[:, -1:]).log_softmax(-1)
            states = fresh.query_states.cpu()
            numbers |= diagnostics.divergence(self.family, fresh.prompt, states, policy)
        return numbers

    @classmethod
    def check(cls, cfg: Config, family: Family) -> None:
        cfg.model.check_batch(cfg.training, cfg.method.queries)
        settings, model = cfg.method, cfg.model
        last = settings.query_position == "last"
        for name in ("queries", "short", "empty", "independent"):
            if getattr(settings, name) != getattr(DPTSettings, name) and not last:
                raise ValueError(f"--{name} needs --query-position last")
        if settings.short + settings.empty > 1:
            raise ValueError("--short and --empty are shares: together at most 1")
        if settings.pooled:
            if family.state_values is None:
                raise ValueError(f"--pooled is for grids; {family.name} has continuous states")
            if cfg.training.prompt_length != family.horizon or not last:
                raise ValueError(
                    f"--pooled needs --query-position last and --prompt-length {family.horizon}"
                )
        if last and not model.decodable:
            raise ValueError(
                "--query-position last with --routing sequence needs --moe-position top: below it, "
                "early queries would see the whole prompt through the gate"
            )
        if settings.independent and model.below_the_top and model.routing != "token":
            raise ValueError(
                f"--independent with --routing {model.routing} needs --moe-position top: below it, "
                "episodes would see one another through h_bar"
            )


# ------------------------------------------------------------------------------------ Algorithm 4
class DPTPolicy(ModelPolicy):
    """Algorithm 4: the query state beside a frozen prompt, the last episode (or all of them).

    All of them, with `--pooled`: the best episode once a reward is found, and until then one step
    of each state that has been seen: as long as an episode, however many there were.
    """

    def __init__(self, method: DPT, play: DPTPlay):
        super().__init__(method, play)
        self.memory = play.prompt
        self.pools = method.cfg.method.pooled and self.memory == "all"
        self.sides = self.family.state_values or ()
        self.cache = None

    def begin(self, history: list[Prompt], rows: int) -> None:
        super().begin(history, rows)
        # The prompt is frozen during an episode (line 11 changes it after the last step), so the
        # same state has the same answer. In a grid states come again: each is computed once.
        self.answers = None
        if self.sides:
            cells = math.prod(self.sides)
            # logits of each task and cell, not actions: those are sampled anew. NaN: not known yet
            self.answers = torch.full((rows, cells, self.model.head.out_features), torch.nan)
        if self.pools and history:
            history = [self._pool(concatenate(history))]
        if self.model.query_last:
            self._fill_cache(history, rows)
        elif history:  # Algorithm 4, line 11: tau <- R
            past = history[-1] if self.memory == "last" else concatenate(history)
            self.past = self.prompt(past.states, past.actions, past.rewards)
        else:  # line 2: tau = {}, a prompt of no steps
            grid = self.family.state_values is not None
            kind = torch.int64 if grid else torch.float32
            states = torch.zeros(rows, 0, self.family.state_dim, dtype=kind)
            self.past = self.prompt(states, self.no_actions(rows, 0), torch.zeros(rows, 0))

    def _fill_cache(self, history: list[Prompt], rows: int) -> None:
        """Keys and values of the prompt; of all episodes, those that are not there yet."""
        episode = 3 * self.family.horizon  # tokens
        grows = self.memory == "all" and not self.pools
        if self.cache is None or not (grows and history):
            self.cache = self.model.new_cache(rows, episode + 1)  # 1: the query
        there = self.cache.length // episode
        for new in history[there:] if grows else history[-1:]:  # line 11: tau <- R
            prompt = self.prompt(new.states, new.actions, new.rewards)
            self.model.decode(self.model.embed_prompt(prompt), self.cache)

    def _pool(self, past: Prompt) -> Prompt:
        """One episode's worth of all of them (N, L*T): what it is made of is said above."""
        steps = self.family.horizon
        episodes = past.rewards.unflatten(1, (-1, steps)).sum(-1)  # (N, L)
        best = steps * episodes.argmax(1, keepdim=True) + torch.arange(steps)  # (N, T)
        pool = one_step_a_state(past, self.sides, steps)
        return where(self.searching(), pool, steps_at(past, best))

    def predict(self, states: Tensor, row: Tensor | slice) -> Tensor:
        """The model's output (M, A) for states (M, ds) of the tasks `row`."""
        query = self.read(states)[:, None]  # (M, 1, ds)
        if self.model.query_last:
            # not kept in the cache: the next query must not see this one, as in training
            return self.model.decode(self.model.embed_query(query), self.cache, keep=False)
        past = Prompt(self.past.states[row], self.past.actions[row], self.past.rewards[row])
        # labels and `visible`: a batch has them, a pass with the query first reads neither
        unread = torch.zeros(len(query), 1, dtype=torch.int64, device=self.device)
        # read at the last state of the prompt, or at the query where there is no prompt
        return self.model(DPTBatch(past, None, query, unread, unread)).action[:, -1]

    def act(self, states: Tensor) -> Tensor:
        """Line 7: a_t = pi(s_t, tau)."""
        if self.answers is None:
            return self.action(self.predict(states, slice(None)))
        cell = cell_ids(states, self.sides)  # (N,)
        row = torch.arange(len(states))
        new = self.answers[row, cell, 0].isnan()
        if new.any():
            if self.model.query_last:  # one token a task: all rows cost what a few do
                self.answers[row, cell] = self.predict(states, slice(None)).float().cpu()
            else:  # a pass over the prompt a task: only where it must be
                answers = self.predict(states[new], row[new])
                self.answers[row[new], cell[new]] = answers.float().cpu()
        return self.action(self.answers[row, cell])
