"""mixture.py: a head that can choose: a mixture of Gaussians over the action (not in the paper).

in : the head's numbers (..., A), A = K (1 + 2 da)      out: a `Mixture`: its loss, its actions
Read after models.py, before ad.py, whose Eq. 10 asks it for log pi(a_t | s_t; hist).

Eq. 10 with a squared error is the likelihood of one Gaussian of fixed width. AD imitates many
behaviours at once: of two that run in opposite directions its best mean is to stand still, which
nobody did. With `--components K` the head says

    pi(a) = sum_k w_k N(a; mu_k, diag(sigma_k^2))       k = 1 ... K components

over the whole action, so that one component is one way to move all joints. It is played by drawing
a component, then an action around that component's mean (policies.py). `--temperature` T draws
the components with w_k to the power of 1 / T: below 1 the likely ones more often.

Symbols: K -> components (the experts of the MoE, also K in the paper, are something else); w_k ->
exp(log_weight); mu_k -> mean; sigma_k -> std. Shapes: da numbers of an action, N tasks played.

The density is that of the plain Gaussians, also where an action is at a bound, -1 or 1. That is not
exact, for play clips to the bounds, but finite and smooth there: through a tanh's inverse, as in
SAC, such an action would be infinitely far away. A sigma of at least 0.05 keeps the density finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from config import Play
from envs import Family

# Of sigma, for actions in [-1, 1]. Without a least sigma the likelihood of equal actions grows
# without bound; uniform ones have 0.58, those at either bound 1.
STD = (0.05, 1.0)
# A head of zeros then says sigma 0.58: so wide that every component begins by explaining some of
# all actions. Narrow ones each take what is nearest, and may leave one with nothing.
START = 1.5


@dataclass
class Mixture:
    """A distribution over actions, for any leading shape (...)."""

    log_weight: Float[Tensor, "*N K"]  # normalised: the weights sum to 1
    mean: Float[Tensor, "*N K da"]  # in [-1, 1]
    std: Float[Tensor, "*N K da"]  # within STD

    def log_prob(self, action: Float[Tensor, "*N da"]) -> Float[Tensor, "*N"]:
        """log pi(a), in nats; of all numbers of an action together."""
        z = (action[..., None, :] - self.mean) / self.std  # (..., K, da)
        # independent numbers within a component: their log-densities add up
        log_normal = -(z.square() / 2 + self.std.log() + math.log(2 * math.pi) / 2).sum(-1)
        # Summed over the components as densities: an action that one of them explains is explained,
        # wherever the others are. This is what lets them go different ways.
        return (self.log_weight + log_normal).logsumexp(-1)

    def sample(
        self, u: Float[Tensor, "*N"], noise: Float[Tensor, "*N da"]
    ) -> Float[Tensor, "*N da"]:
        """An action in [-1, 1]: the component at u, and `noise` of its deviations from its mean.

        u, uniform in [0, 1), is looked up in the inverse of the weights' cumulative sum: the same u
        finds the same component as long as the weights stay about the same. noise: standard normal.
        """
        below = self.log_weight.exp().cumsum(-1) <= u[..., None]  # components that end before u
        which = below.sum(-1).clamp_max(below.shape[-1] - 1)  # a rounded sum may end below u
        mean, std = self._of(which)
        return (mean + std * noise).clamp(-1, 1)

    def at(self, temperature: float) -> Mixture:
        """The same components, each weight to the power of 1 / temperature, normalised."""
        return replace(self, log_weight=(self.log_weight / temperature).log_softmax(-1))

    def likeliest(self) -> Float[Tensor, "*N da"]:
        """The mean of the component with the largest weight."""
        return self._of(self.log_weight.argmax(-1))[0]

    def _of(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """mean and std of one component each: `which` (...) to (..., da)."""
        index = which[..., None, None].expand(*which.shape, 1, self.mean.shape[-1])
        return self.mean.gather(-2, index)[..., 0, :], self.std.gather(-2, index)[..., 0, :]


# ---------------------------------------------------------------------------------------- the head
def head_size(family: Family, components: int) -> int:
    """A, the numbers that the head gives: logits, one action, or all of a mixture.

    Raises ValueError with one line for a mixture of discrete actions.
    """
    if components and family.discrete_actions:
        raise ValueError(
            f"--components is for continuous actions; those of {family.name} have logits, which "
            "choose already"
        )
    return components * (1 + 2 * family.action_dim) if components else family.action_dim


def is_mixture(head: Tensor, action_dim: int) -> bool:
    """Whether the last axis is a mixture's; K (1 + 2 da) is never da. So no caller has to be told
    how a network was built.
    """
    return head.shape[-1] != action_dim


def mixture(head: Float[Tensor, "*N A"], action_dim: int) -> Mixture:
    """The distribution that the head's numbers mean; for loss and play alike, in float32.

    Raises ValueError where A is no multiple of 1 + 2 da.
    """
    if head.shape[-1] % (1 + 2 * action_dim):
        raise ValueError(f"{head.shape[-1]} numbers are no mixture over {action_dim} of an action")
    head = head.float().unflatten(-1, (-1, 1 + 2 * action_dim))  # (..., K, 1 + 2 da)
    logit, mean, width = head.split((1, action_dim, action_dim), -1)
    # Between its bounds along a sigmoid: clipped at them it would have no gradient to come back.
    low, high = map(math.log, STD)
    log_std = low + (high - low) * (width + START).sigmoid()
    return Mixture(logit[..., 0].log_softmax(-1), mean.tanh(), log_std.exp())


# -------------------------------------------------------------------------------------- settings
def components_of(model: Any) -> int:
    """K of a network's settings; 0 where they know nothing of mixtures (a method's own network)."""
    return getattr(model, "components", 0)


def check_mixture(model: Any, play: Play, family: Family) -> None:
    """Raises ValueError for --components with discrete actions, and for --component-every or
    --spread without --components. `model`: the settings of a network.
    """
    head_size(family, components_of(model))
    if not components_of(model) and (play.component_every, play.spread) != ("step", 1.0):
        raise ValueError(
            "--component-every and --spread are for a head that was trained with --components"
        )


def play_name(play: Play) -> list[str]:
    """How a mixture was drawn from, for file names."""
    return [f"each-{play.component_every}", f"spread{play.spread:g}"]
