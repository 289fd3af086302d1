"""ad.py: T2MIR-AD (paper Sec. 4.3; Eq. 9, 10; Algorithms 1 and 2).

in : a dataset of learning histories      out: batches, their loss, and the policy that plays
Read after models.py; then dpt.py, which differs in what is a prompt, a label and a memory.

AD (algorithm distillation) imitates histories in which a policy gets better. Having seen how
returns rise from episode to episode, the network goes on like that in a task it has never seen.

    tokens (Eq. 9)      s_0 a_0 r_0  s_1 a_1 r_1 ...    n steps of L episodes, ascending by return
    read (Eq. 10)       a_t is predicted at s_t, from all tokens up to it (and, in training with
                        --routing sequence, through the gate of Eq. 4, whose h_bar is of all)
    at test time        the K best episodes so far, ascending, then the running one (Algorithm 2)

Symbols (paper -> here): hist_t -> Prompt; tau_i, tau'_i -> two draws of a task, neighbours in the
batch; R (Alg. 2) -> `kept` and `now`; K -> `history`; L -> `episodes`.
Shapes: B rows, n = L*T steps of a prompt, T steps an episode, N tasks played, A numbers or logits.

Differs from the paper: both draws of a task, tau and tau', are imitated, and each is key for the
other (as in the official code). One forward pass then does all of Algorithm 1, and no row is
computed for being a key alone. A switch: `--best` imitates good episodes alone, behind any others
of their task, where the paper imitates every episode of a history.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

import diagnostics
from config import Config, Count, Play, Share
from data import Dataset, Prompt, draw_episodes, draw_tasks, gather_prompt
from envs import Family
from methods import Method
from mixture import is_mixture, mixture
from models import T2MIR, ModelSettings, Output
from moe import View
from policies import ModelPolicy, concatenate
from router import full_precision


@dataclass
class ADBatch:
    """Algorithm 1, lines 3-9: every prompt is its own target (Eq. 10)."""

    prompt: Prompt  # n = L*T steps
    task: Tensor  # (B,) int64: rows with equal numbers are each other's positives in Eq. 7

    def to(self, device) -> ADBatch:
        return ADBatch(self.prompt.to(device), self.task.to(device))


@dataclass(frozen=True)
class ADSettings:
    """what AD imitates (Algorithm 1)"""

    best: Share = field(default=0.0, metadata={"before": 0.0})
    """Imitate a prompt's last episode alone, one of this share of the task's best; 0: all of it."""


@dataclass(frozen=True)
class ADPlay(Play):
    """how an evaluation plays (Algorithm 2)"""

    history: Count = 4
    """K of Algorithm 2: finished episodes in the history."""


def eq10_imitation_loss(action: Tensor, target: Tensor, discrete: bool) -> Tensor:
    """L(theta) = -sum log pi(a_t | s_t; hist)   (Eq. 10; Eq. 11 with a* for a_t)

    The mean over rows and predictions stands for the sum. action (B, R, A) and target (B, R) ids:
    cross-entropy; target (B, R, A): the mean squared error, which is the negative log-likelihood of
    a Gaussian of fixed width, up to a factor and a constant; target (B, R, da) and the numbers of a
    mixture: its negative log-likelihood (mixture.py). In float32 also under autocast.
    """
    # A loss sums many small numbers: bfloat16, with 8 bits of precision, would lose most of them.
    with full_precision(action):
        if discrete:  # rows and predictions in one: (B*R, A) against (B*R,)
            return F.cross_entropy(action.flatten(0, 1).float(), target.flatten())
        da = target.shape[-1]
        if not is_mixture(action, da):
            return F.mse_loss(action.float(), target)
        # A number of the action, as the squared error is a mean over them: nats of order 1, like
        # the cross-entropy, in every family; the weights of Eq. 3 and 7 beside it keep their sense.
        return -mixture(action, da).log_prob(target).mean() / da


class ADModel(T2MIR):
    """The tokens of Eq. 9."""

    def forward(self, batch: ADBatch) -> Output:
        """One pass over a batch: R = n predictions, at the state tokens."""
        x = self.shifted(self.embed_prompt(batch.prompt))  # (B, 3n, D)
        tokens = torch.arange(x.shape[1], device=x.device)
        view = View(slice(0, x.shape[1]))  # tau is all of it, seen causally
        # Read at every third token, s_t: a_t stands behind it, so nothing that is read knows it but
        # the gate of --routing sequence, whose h_bar is the mean of the whole row (moe.py). One
        # pass trains all n terms of Eq. 10. The token's number modulo 3 is its modality.
        return self.output(x, view, tokens[::3], tokens % 3, batch.task)

    def last_action(self, prompt: Prompt) -> Tensor:
        """(B, A) at the last state of a whole context; its own action and reward are not read."""
        x = self.shifted(self.embed_prompt(prompt))[:, :-2]  # ends with s_t
        read = torch.tensor([x.shape[1] - 1], device=x.device)
        return self.run(x, View(slice(0, x.shape[1])), read)[0][:, 0]


# ------------------------------------------------------------------------------------ Algorithm 1
def sample_ad(
    dataset: Dataset,
    rows: int,
    episodes: int,
    draws: int,
    rng: torch.Generator,
    best: float = 0.0,
) -> ADBatch:
    """Algorithm 1, lines 3-9: L = `episodes` of a task, ascending by return, concatenated.

    `best`: one of them at least is of this share of the task's best, so that the last one is.
    """
    task = draw_tasks(dataset, rows, draws, rng)  # line 4; each for tau_i and for tau'_i
    # Ranks are drawn, not episodes, and ranks are sorted, not returns: `dataset.order` lists a
    # task's episodes by return once and for all, so that ascending ranks are ascending returns.
    # Returns rise along the prompt, which is what AD learns to go on with (App. E: "a
    # trajectory-ranking mechanism").
    top = None
    if best:
        among = max(1, round(best * dataset.episodes))
        top = dataset.episodes - 1 - torch.randint(among, (len(task),), generator=rng)
    rank = draw_episodes(dataset, len(task), episodes, rng, top)  # (B, L); lines 5, 7
    rank = rank.sort(dim=1).values  # line 6
    return ADBatch(gather_prompt(dataset, task, dataset.order[task[:, None], rank]), task)


class AD(Method):
    """T2MIR-AD; with --moe none plain AD."""

    # their settings join the command line (methods.py)
    Model, Settings, Play = ModelSettings, ADSettings, ADPlay
    presets = "ad"  # Table 4
    try_next = "--history of evaluate.py keeps more or fewer episodes in the context"

    def network(self) -> ADModel:
        return ADModel(self.cfg.model, self.family)

    @property
    def label(self) -> str:
        return self.cfg.model.label("AD")

    def sample(self, dataset: Dataset, rows: int, draws: int, rng: torch.Generator) -> ADBatch:
        # L: Table 4 gives the prompt length in steps
        episodes = self.cfg.training.prompt_length // self.family.horizon
        return sample_ad(dataset, rows, episodes, draws, rng, self.cfg.method.best)

    def losses(self, batch: ADBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Algorithm 1, lines 11-13: Eq. 10, Eq. 3 and w_con times Eq. 7."""
        output = self.forward(batch)
        discrete = self.family.discrete_actions
        # --best: the earlier episodes are read, not imitated
        end = slice(-self.family.horizon if self.cfg.method.best else 0, None)
        # The targets are the prompt's own actions: AD needs no labels. Those of tau' count as well.
        action, target = output.action[:, end], batch.prompt.actions[:, end]
        imitation = eq10_imitation_loss(action, target, discrete)
        return {"imitation": imitation, **output.losses}, output.metrics

    def policy(self, play: ADPlay) -> ADPolicy:
        return ADPolicy(self, play)

    def play_name(self, play: ADPlay) -> list[str]:
        return [f"history{play.history}"]

    def probe(self, dataset: Dataset, rows: int, rng: torch.Generator) -> dict[str, float]:
        # two draws of each task: with one, Eq. 7 would have no positive to look for
        batch = self.sample(dataset, rows, 2, rng).to(self.device)
        return diagnostics.routing(self.model(batch), self.cfg.model, len(batch.task))

    @classmethod
    def check(cls, cfg: Config, family: Family) -> None:
        cfg.model.check_batch(cfg.training)


# ------------------------------------------------------------------------------------ Algorithm 2
def sort_and_drop(episodes: list[Prompt], keep: int) -> list[Prompt]:
    """Algorithm 2, lines 10-13, for every task: ascending by return, the lowest beyond `keep` go.

    Ties keep the order of play, so that of equal episodes the oldest goes first.
    """
    # (N, episodes, T, ...): every task has an order of its own, so an episode of the answer is
    # another one of the given in each row.
    stacked = [torch.stack([getattr(p, f.name) for p in episodes], 1) for f in fields(Prompt)]
    returns = stacked[2].sum(-1)  # of the rewards: (N, episodes)
    order = returns.argsort(dim=1, stable=True)[:, -keep:]  # (N, keep): the last ones are the best
    task = torch.arange(len(order))
    return [Prompt(*(array[task, order[:, i]] for array in stacked)) for i in range(order.shape[1])]


class ADPolicy(ModelPolicy):
    """Algorithm 2: K episodes sorted by return, then the running one.

    The K episodes stand still during an episode: their keys and values are computed once, and each
    step decodes three tokens. A model that cannot do that runs the whole context at every step.
    """

    def begin(self, history: list[Prompt], rows: int) -> None:
        super().begin(history, rows)
        # Lines 2, 10-13: the K best, ascending, (N, T) each. Of all episodes at once they are those
        # that dropping one after each episode leaves.
        self.kept = sort_and_drop(history, self.play.history) if history else []
        self.now: list[Prompt] = []  # the running episode, a prompt of one step each
        if self.model.cfg.decodable:
            # A new cache for each episode: with another order or another episode dropped, the keys
            # and values of all later tokens are others.
            self.cache = self.model.new_cache(rows, 3 * self.family.horizon * (len(self.kept) + 1))
            self.unseen = None  # tokens of the last step that the model has not read: a, r
            if self.kept:
                past = concatenate(self.kept)
                past = self.prompt(past.states, past.actions, past.rewards)  # as the model reads it
                self.model.decode(self.model.embed_prompt(past), self.cache)  # its action: unread

    def act(self, states: Tensor) -> Tensor:
        """Line 6: a_t = pi(s_t, R)."""
        rows = len(states)
        # a_t and r_t are yet to come: zeros stand for them and are never read
        step = self._step(states, self.no_actions(rows), torch.zeros(rows))
        if not self.model.cfg.decodable:  # the whole context anew, as in training
            past = [self.prompt(p.states, p.actions, p.rewards) for p in [*self.kept, *self.now]]
            return self.action(self.model.last_action(concatenate([*past, step])))
        token = self.model.embed_prompt(step, len(self.now))[:, :1]  # s_t
        if self.unseen is not None:
            token = torch.cat([self.unseen, token], 1)  # a_{t-1}, r_{t-1}, s_t
        return self.action(self.model.decode(token, self.cache))

    def observe(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None:
        """Line 8."""
        if self.model.cfg.decodable:
            step = self._step(states, actions, rewards)
            # a_t and r_t wait for the next state: one call for three tokens costs less than two
            self.unseen = self.model.embed_prompt(step, len(self.now))[:, 1:]  # (N, 2, D)
        self.now.append(Prompt(states[:, None], actions[:, None], rewards[:, None]))
        self.read_rewards(rewards[:, None])

    def _step(self, states: Tensor, actions: Tensor, rewards: Tensor) -> Prompt:
        """One transition as a prompt of one step."""
        return self.prompt(states[:, None], actions[:, None], rewards[:, None])
