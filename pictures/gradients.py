"""gradients.py: do the gradients of different tasks pull a network apart? (paper Sec. 5.4, Fig. 7)

in : a run's method, the data it was trained on        out: cosines between groups of tasks
Read beside figures.py.

Fig. 7 shows the "cosine similarity of gradients between Point-Robot tasks in four quadrants (I-IV),
comparing T2MIR-AD (MoE) with AD (MLP)". Where the paper is silent, here it is

    when         at the end of training: what a finished run still has are its last weights
    of what      the imitation loss alone (Eq. 10, 11), which both networks have, in eval mode
                 (neither the noise of Eq. 14 nor dropout), on fresh prompts of the training data
    by what      `layer`: the parameters of the layer that is the MoE in one network and the plain
                 feed-forward layer in the other, as the paper's names of the two suggest; an expert
                 that a group never uses has gradient 0 there. And `all`: of the whole network
    of whom      a quadrant's gradient is the mean over prompts of its training tasks

A mean over few prompts is noisy, and noise alone makes directions look orthogonal. So each group
has two halves of prompts. The cosine of a group with itself is that between its halves, the cosine
of two groups the mean over the four pairs of a half of each: both are of halves, and equally noisy.
What lies far below a group's own is a difference, what lies near it may be noise. And where
training has ended in a minimum, the gradients of all tasks add up to nothing: of four groups the
cosines are then about -1/3 in the mean, nearer to 0 with noise, whatever the network.

Shapes: G groups, N tasks, P parameters.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from data import Dataset
from envs import Family
from methods import Method
from pictures.curves import pyplot
from pictures.routers import has_experts
from pictures.runs import LeftOut

QUADRANTS = ("I", "II", "III", "IV")
ALIKE = ("states", "actions", "rewards", "query_states", "query_actions", "returns", "order")


def groups_of(family: Family, tasks: list) -> list[tuple[str, np.ndarray]]:
    """Names and numbers of the tasks of up to four groups; one without a task is left out.

    Tasks of two numbers: the quadrants around the middle of the family's limits (Point-Robot: the
    origin), I to IV as in a course of geometry. Others: quarters by the one number, or by the
    direction in which the tasks differ most (the first principal component).
    """
    places = np.asarray(tasks, float)  # (N, numbers)
    if places.shape[1] == 2:
        x, y = (places - np.add(family.task_low, family.task_high) / 2).T
        # on an axis: to the side of the positive numbers, so that every task is in one quadrant
        kind = np.where(y >= 0, np.where(x >= 0, 0, 1), np.where(x < 0, 2, 3))
        names = QUADRANTS
    else:
        along = principal(places)
        rank = along.argsort(kind="stable").argsort(kind="stable")
        kind = rank * 4 // len(tasks)
        names = [f"quarter {i + 1}" for i in range(4)]
    found = [(name, np.flatnonzero(kind == i)) for i, name in enumerate(names)]
    return [(name, members) for name, members in found if len(members)]


def principal(places: np.ndarray) -> np.ndarray:
    """(N,): tasks (N, numbers) along the direction in which they differ most; of one number, it."""
    if places.shape[1] == 1:
        return places[:, 0]
    centred = places - places.mean(0)
    direction = np.linalg.svd(centred, full_matrices=False)[2][0]
    # a sign of its own choice would turn colours round from machine to machine
    return centred @ (direction * np.sign(direction[np.abs(direction).argmax()]))


def only(dataset: Dataset, members: np.ndarray) -> Dataset:
    """The dataset with some of its tasks alone."""
    which = torch.from_numpy(members)
    return replace(dataset, **{name: getattr(dataset, name)[which] for name in ALIKE})


def imitation_gradient(
    method: Method, dataset: Dataset, prompts: int, rng: torch.Generator
) -> dict[str, Tensor]:
    """The gradient of the imitation loss on so many prompts of the dataset's tasks.

    Returns {"layer": (P,), "all": (P,)}; "layer" only where the network has one that can be an MoE.
    Raises LeftOut for a method without a loss of that name.
    """
    named = [(n, p) for n, p in method.model.named_parameters() if p.requires_grad]
    method.model.eval()
    total = [torch.zeros_like(p) for _, p in named]
    step = min(prompts, method.cfg.training.batch)  # as large as this machine has trained with
    batches = -(-prompts // step)
    for _ in range(batches):
        # one draw of each task: Eq. 7, which needs two, is not looked at
        batch = method.sample(dataset, step, 1, rng).to(method.device)
        terms, _ = method.losses(batch)
        if "imitation" not in terms:
            raise LeftOut(f"{method.label} has no loss named imitation")
        parameters = [p for _, p in named]
        found = torch.autograd.grad(terms["imitation"], parameters, allow_unused=True)
        for sum_of, gradient in zip(total, found, strict=True):
            if gradient is not None:  # None: a router of Eq. 7, an expert nobody kept
                sum_of += gradient / batches
    parts = {"all": torch.cat([g.flatten() for g in total])}
    if hasattr(method.cfg.model, "moe_block"):
        place = f"blocks.{method.cfg.model.moe_block}.ff."
        inside = [g.flatten() for (n, _), g in zip(named, total, strict=True) if place in n]
        parts = {"layer": torch.cat(inside)} | parts
    return parts


def cosine(a: Tensor, b: Tensor) -> float:
    """a.b / (|a| |b|) in double precision; 0 where one of them is 0."""
    a, b = a.double(), b.double()
    return (a @ b / (a.norm() * b.norm()).clamp_min(1e-300)).item()


def cosines(method: Method, dataset: Dataset, prompts: int = 128, seed: int = 0) -> list[dict]:
    """Rows {parameters, a, b, cosine}: of every two groups of training tasks, each pair once, and
    of each with itself; each group has two halves of `prompts` prompts.
    """
    rng = torch.Generator().manual_seed(seed)
    halves = {
        name: [imitation_gradient(method, only(dataset, members), prompts, rng) for _ in range(2)]
        for name, members in groups_of(method.family, dataset.meta["train_tasks"])
    }
    rows, names = [], list(halves)
    for part in halves[names[0]][0]:
        for i, a in enumerate(names):
            for b in names[i:]:
                pairs = [halves[a]] if a == b else product(halves[a], halves[b])
                values = [cosine(one[part], other[part]) for one, other in pairs]
                rows.append({"parameters": part, "a": a, "b": b, "cosine": float(np.mean(values))})
    return rows


def kind_of(method: Method) -> str:
    """MoE or MLP, the two networks of Fig. 7."""
    return "MoE" if has_experts(method) else "MLP"


# ------------------------------------------------------------------------------------------ drawing
QUARTERS = (
    "quarter 1 to 4: as many tasks each, from the lowest number upwards; where a task is more than "
    "two numbers, along the direction in which tasks differ most"
)
TRIANGLES = (
    "Cosine of the imitation loss's gradients between groups of tasks, two halves of prompts each: "
    "above the diagonal with experts (MoE), below without (MLP), the mean over pairs of halves; on "
    "it between a group's own halves. I to IV: quadrants, where a task is two numbers; "
    f"{QUARTERS}."
)


def draw_triangles(rows: list[dict], title: str):
    """The figure of `cosines` rows that also say `network`, MoE or MLP; several runs: their mean.

    A panel for the layer that is compared, one for the whole network.
    """
    parts = list(dict.fromkeys(row["parameters"] for row in rows))
    names = list(dict.fromkeys(row["a"] for row in rows))
    form = {"figsize": (4.6 * len(parts), 4.6), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot().subplots(1, len(parts), **form)
    for axis, part in zip(axes[0], parts, strict=True):
        of = {}  # (network, a, b) -> its mean over runs
        for row in rows:
            if row["parameters"] == part:
                of.setdefault((row["network"], row["a"], row["b"]), []).append(row["cosine"])
        of = {key: float(np.mean(values)) for key, values in of.items()}
        cells = np.full((len(names), len(names)), np.nan)
        for i, a in enumerate(names):
            for j, b in enumerate(names):
                if i < j:
                    cells[i, j] = of.get(("MoE", a, b), np.nan)
                    cells[j, i] = of.get(("MLP", a, b), np.nan)
        image = axis.imshow(cells, cmap="RdBu_r", vmin=-1, vmax=1)
        for i, j in np.ndindex(cells.shape):
            if i == j:
                own = {n: of[n, a, b] for n, a, b in of if a == b == names[i]}
                said, shade = "\n".join(f"{n} {value:.2f}" for n, value in own.items()), 0.0
            else:
                said, shade = ("" if np.isnan(cells[i, j]) else f"{cells[i, j]:.2f}"), cells[i, j]
            colour = "white" if abs(shade) > 0.6 else "black"
            axis.text(j, i, said, ha="center", va="center", fontsize=8, color=colour)
        what = "the layer with experts, or in its place" if part == "layer" else "all parameters"
        axis.set_title(f"{title}\n{what}", fontsize=9)
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=list(axes[0]), shrink=0.8, label="cosine")
    said = "above the diagonal: with experts (MoE); below: without (MLP)"
    if not set(names) <= set(QUADRANTS):
        said += f"\n{QUARTERS}".replace("; ", ";\n")
    figure.supxlabel(said, fontsize=8)
    return figure
