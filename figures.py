"""figures.py: the paper's figures from finished runs alone (Fig. 1, 3-5, 7, 11-13), and a page.

in : folders of runs of one family          out: PNG, PDF and the CSV of what they show
Read beside evaluate.py. Nothing is trained here.

    python figures.py runs/A runs/B ...                     every figure that these runs can make
    python figures.py runs/A runs/B --only figure7          this one, or why not
    python figures.py runs/A                                of one run, a page too: out/A.html

One function a figure, named after it; `router_health` is no figure of the paper. Runs of equal
settings but for the seed are one line. Runs that differ in a setting say so in the legend: figure3
of runs with other experts, weights or places of the MoE is Fig. 6, 8, 9 or 10. The numbers stand in
pictures/numbers.py, what routers see in routers.py and over training in health.py, gradients in
gradients.py, the page in page.py.

Differs from the paper: Fig. 3's interval is over seeds alone; the pictures of Sec. 5.4 come with
the numbers that they can hide. Where it does not say what it draws, the file above does.
"""

from __future__ import annotations

if __name__ == "__main__":  # the imports take seconds, in which Ctrl-C should not be a traceback
    from support.stop import at_once

    at_once()

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from pictures.assignments import draw_assignments
from pictures.curves import interval, pyplot, save
from pictures.gradients import TRIANGLES, cosines, draw_triangles, kind_of
from pictures.health import draw_health
from pictures.page import write_page
from pictures.routers import has_experts
from pictures.runs import Drawn, Figures, LeftOut, Run, lines_of, open_runs, stacked
from support.command_line import one_line, parse_figures
from support.files import check_folder


# ---------------------------------------------------------------------------- return curves: Sec. 5
def curves(name: str, panels: dict[str, list[Run]], out: Path) -> list[Drawn]:
    """Return curves, a panel for each entry, with the interval over seeds and tasks."""
    panels = {title: runs for title, runs in panels.items() if runs}
    family = next(iter(panels.values()))[0].method.family.name
    plt = pyplot()
    size = (4.8 * len(panels), 3.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    table: list[dict] = []
    for axis, (title, runs) in zip(axes[0], panels.items(), strict=True):
        for label, group in lines_of(runs):
            returns = stacked(group)  # (S, N, E)
            seeds, tasks, episodes = returns.shape
            low, high = interval(returns)
            mean, x = returns.mean((0, 1)), np.arange(1, episodes + 1)
            # of one episode alone a line has no length
            style = {"marker": "o"} if episodes == 1 else {}
            axis.plot(x, mean, label=f"{label}, {seeds} seed{'s' * (seeds > 1)}", **style)
            axis.fill_between(x, low, high, alpha=0.2, linewidth=0)
            for row in zip(x.tolist(), mean.tolist(), low.tolist(), high.tolist(), strict=True):
                named = dict(zip(("episode", "mean", "low", "high"), row, strict=True))
                table.append({"panel": title, "line": label, **named, "seeds": seeds})
                table[-1]["tasks"] = tasks
        axis.set(title=f"{family}, {title}", xlabel="episode", ylabel="return on held-out tasks")
        axis.xaxis.get_major_locator().set_params(integer=True)  # no half episodes
        axis.legend(fontsize=7)
    stem = out / f"{name}-{family}"
    save(figure, stem, table)
    return [Drawn(stem, "Mean over seeds and held-out tasks; shaded: 95 % interval.")]


def chosen(runs: list[Run], quality: str, ablations: bool) -> list[Run]:
    """Runs on data of a quality; without `ablations`, of whole methods alone."""
    some = [run for run in runs if run.method.cfg.data.quality == quality]
    half = ("token", "task")
    return [r for r in some if ablations or getattr(r.method.cfg.model, "moe", "") not in half]


def clusters(runs: list[Run]) -> bool:
    return runs[0].method.cfg.data.env == "cheetah-vel-3cluster"


def figure3(runs: list[Run], out: Path) -> list[Drawn]:
    """Test return curves on Mixed data (Fig. 3; of other settings than the default, 6, 8-10)."""
    if clusters(runs):
        raise LeftOut("of this family it is figure11")
    return mixed("figure3", runs, out)


def figure11(runs: list[Run], out: Path) -> list[Drawn]:
    """The same on Cheetah-Vel-3_Cluster (Fig. 11)."""
    if not clusters(runs):
        raise LeftOut("it is of cheetah-vel-3cluster; of this family it is figure3")
    return mixed("figure11", runs, out)


def mixed(name: str, runs: list[Run], out: Path) -> list[Drawn]:
    some = chosen(runs, "mixed", ablations=False)
    if not some:
        raise LeftOut("no run of a whole method on Mixed data")
    return curves(name, {"Mixed": some}, out)


def figure4(runs: list[Run], out: Path) -> list[Drawn]:
    """Both MoEs, one of them, none (Fig. 4, Sec. 5.2): a panel for each backbone."""
    panels: dict[str, list[Run]] = {}
    for run in chosen(runs, "mixed", ablations=True):
        if hasattr(run.method.cfg.model, "moe"):
            panels.setdefault(Path(run.method.cfg.backbone).stem.upper(), []).append(run)
    kinds = {title: {r.method.cfg.model.moe for r in some} for title, some in panels.items()}
    panels = {title: some for title, some in panels.items() if len(kinds[title]) > 1}
    if not panels:
        raise LeftOut("no two runs of a backbone differ in --moe")
    return curves("figure4", panels, out)


def figure5(runs: list[Run], out: Path) -> list[Drawn]:
    """Other qualities of data (Fig. 5, Sec. 5.3): a panel for each."""
    names = {"Medium-Expert": "medium-expert", "Medium": "medium"}
    panels = {title: chosen(runs, quality, False) for title, quality in names.items()}
    if not any(panels.values()):
        raise LeftOut("no run on Medium-Expert or Medium data")
    return curves("figure5", panels, out)


# ------------------------------------------------------------------------ routers: Sec. 5.4, App. I
def figure1(runs: list[Run], out: Path) -> list[Drawn]:
    """t-SNE of expert assignments (Fig. 1: Cheetah-Vel, T2MIR-AD), a picture for each run."""
    if runs[0].method.family.name == "push":
        raise LeftOut("of this family it is figure12")
    return assignments("figure1", runs, out)


def figure12(runs: list[Run], out: Path) -> list[Drawn]:
    """The same on Push (Fig. 12)."""
    if runs[0].method.family.name != "push":
        raise LeftOut("it is of push; of this family it is figure1")
    return assignments("figure12", runs, out)


def assignments(name: str, runs: list[Run], out: Path) -> list[Drawn]:
    """Tokens by modality and by expert, trajectories by task; and the numbers of each."""
    return [draw_assignments(run, out / f"{name}-{run.name}") for run in with_experts(runs)]


def with_experts(runs: list[Run]) -> list[Run]:
    if not any(has_experts(run.method) for run in runs):
        raise LeftOut("no run with experts")
    return [run for run in runs if has_experts(run.method)]


def figure7(runs: list[Run], out: Path) -> list[Drawn]:
    """Cosines of gradients between groups of tasks (Fig. 7), of Mixed data, a picture for each two
    lines that differ in `moe` alone: above the diagonal with experts (MoE), below without (MLP).

    The picture has means over seeds, which the CSV has one by one. Where no two lines are such,
    each is half a picture.
    """
    groups: dict[str, list[Run]] = {}
    for run in chosen(runs, "mixed", ablations=False):
        alike = {name: value for name, value in run.line().items() if name != "moe"}
        groups.setdefault(repr(alike), []).append(run)
    if not groups:
        raise LeftOut("no run of a whole method on Mixed data")
    drawn, compared = [], [g for g in groups.values() if len({kind_of(r.method) for r in g}) > 1]
    some = compared or list(groups.values())
    backbones = [Path(group[0].method.cfg.backbone).stem for group in some]
    for backbone, group in zip(backbones, some, strict=True):
        rows = []
        for run in group:
            about = {"run": run.name, "network": kind_of(run.method)}
            found = cosines(run.method, run.dataset(), run.settings.prompts)
            rows += [about | row for row in found]
        name = f"{runs[0].method.family.name}-{backbone}"
        if backbones.count(backbone) > 1:
            name += f"-{group[0].name}"
        stem = out / f"figure7-{name}"
        save(draw_triangles(rows, name), stem, rows)
        drawn.append(Drawn(stem, TRIANGLES))
    return drawn


def figure13(runs: list[Run], out: Path) -> list[Drawn]:
    """Probability of each task expert against the task, of one number (Fig. 13), for each run.

    The paper does not say which probability: here the mean over trajectories of the gate of Eq. 4;
    the CSV also has how often each expert was the first.
    """
    if runs[0].method.family.task_numbers != 1:
        raise LeftOut("its tasks are not of one number")
    some = [run for run in with_experts(runs) if run.method.cfg.model.has_task_moe]
    if not some:
        raise LeftOut("no run with task experts")
    return [draw_probabilities(run, out / f"figure13-{run.name}") for run in some]


def draw_probabilities(run: Run, stem: Path) -> Drawn:
    seen, task = run.seen
    assert seen.tasks is not None, "the caller has asked"
    number = np.array([numbers[0] for numbers in run.tasks])
    table = []
    for place in number.argsort(kind="stable").tolist():
        here = task == place  # its trajectories
        for k, gate in enumerate(seen.tasks.gate[here].mean(0).tolist()):
            row = {"task": float(number[place]), "expert": k + 1, "gate": gate}
            row |= {"first": float((seen.tasks.expert[here] == k).mean())}
            table.append(row | {"split": "test" if place < len(run.split.test) else "train"})
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for k in range(seen.tasks.gate.shape[1]):
        rows = [row for row in table if row["expert"] == k + 1]
        x, y = ([row[name] for row in rows] for name in ("task", "gate"))
        used = max(y) >= 0.01  # the others are one flat line, and would fill the legend
        axis.plot(x, y, color=f"C{k}", label=f"expert {k + 1}" if used else None)
        inside = [f"C{k}" if row["split"] == "test" else "white" for row in rows]
        axis.scatter(x, y, s=14, facecolors=inside, edgecolors=f"C{k}", zorder=3)
    for name, face in (("held-out", "black"), ("trained on", "white")):
        axis.scatter([], [], s=14, facecolors=face, edgecolors="black", label=name)
    if clusters([run]):
        from families.locomotion import CLUSTERS  # the simulator loads with it

        for left, right in pairwise(CLUSTERS):  # half way between two means
            axis.axvline((left + right) / 2, color="black", linestyle="--", linewidth=1)
    velocity = run.method.cfg.data.env.startswith("cheetah-vel")
    what = "target velocity" if velocity else "the number that is the task"
    axis.set(xlabel=what, ylabel="probability", ylim=(-0.02, 1.02))
    axis.set_title(f"{run.method.family.name}, {run.method.label} ({run.name})", fontsize=10)
    axis.legend(fontsize=7)
    save(figure, stem, table)
    return Drawn(stem, "Mean gate of each task expert (Eq. 4) on fresh trajectories of each task.")


# ------------------------------------------------------------------------------------ over training
def router_health(runs: list[Run], out: Path) -> list[Drawn]:
    """Routers over training, from train.csv: not in the paper, but the first thing to look at when
    experts do not specialise.
    """
    runs = with_experts(runs)
    name = runs[0].name if len(runs) == 1 else runs[0].method.family.name
    return [draw_health(runs, out / f"router_health-{name}")]


# ---------------------------------------------------------------------------------------- all of it
FIGURES: dict[str, Callable[[list[Run], Path], list[Drawn]]] = {
    function.__name__: function
    for function in (
        figure3, figure4, figure5, figure11, router_health, figure1, figure12, figure13, figure7,
    )
}  # fmt: skip


def draw(settings: Figures) -> list[Path]:
    """Every figure that the runs make, or the one that is asked for; of one run its page too.

    Returns what was written: stems of figures, the page. Raises ValueError with one line for wrong
    runs, and for a figure asked for that they do not make.
    """
    names = [*FIGURES, "page"]
    if settings.only not in (None, *names):
        raise ValueError(f"--only {settings.only}: choose one of {', '.join(names)}")
    runs = open_runs(settings)
    if settings.only == "page" and len(runs) > 1:
        raise ValueError("--only page is of one run: name one")
    out = Path(settings.out) if settings.out else runs[0].folder.parent / "figures"
    check_folder("--out", str(out))
    drawn: dict[str, list[Drawn]] = {}
    for name, function in FIGURES.items():
        if settings.only not in (None, name, "page"):
            continue
        try:
            drawn[name] = function(runs, out)
        except LeftOut as reason:
            if settings.only == name:
                raise
            print(f"{name} is left out: {reason}")
        for one in drawn.get(name, []):
            print(f"{name}: {one.stem}.png, .pdf, .csv")
    written = [one.stem for some in drawn.values() for one in some]
    if len(runs) == 1 and settings.only in (None, "page"):
        page = out / f"{runs[0].name}.html"
        write_page(runs[0], {name: some[0] for name, some in drawn.items()}, page)
        print(f"page: {page}")
        written.append(page)
    return written


if __name__ == "__main__":
    one_line(lambda: draw(parse_figures(Figures)), "what was drawn so far is whole")
