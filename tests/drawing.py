"""drawing.py: tiny runs on disk and in memory, and what a drawn figure must hold.

Nothing is trained: the networks have first weights, written as training writes them.
"""

import csv

import numpy as np
import torch
from matplotlib.image import imread
from toys import PLANE, coded_dataset, method, stir

from envs import get_family
from evaluate import Evaluation, variant
from pictures.runs import Figures, Run
from support import checkpoint

TEST = [[2, 2], [8, 6], [4, 0], [0, 9]]
TRAIN = [[0, 0], [9, 9], [0, 5], [3, 4], [7, 2], [5, 5], [1, 8], [9, 0]]
PLACES = {
    "darkroom": (TRAIN, TEST),
    "point-robot": ([[0.5, 0.5], [-0.5, 0.2]], [[0.1, -0.9], [-0.3, -0.3]]),
}
OLD = "token_least,task_least,token_mi,info_nce,accuracy,chance,accuracy_fresh"
LOADS = "token_entropy,task_entropy,token_load_1,token_load_2,token_load_3,token_load_4"
SMALL = {"layers": 2, "prompt_length": 100, "episodes": 2}


def finished(folder, layout="last", env="darkroom", steps=3, step=3, **changes):
    """A run's folder as training leaves it, of a network with random weights."""
    changes = SMALL | ({} if env == "darkroom" else {"prompt_length": 20}) | changes
    tiny = method(layout, get_family(env), env=env, steps=steps, **changes)
    stir(tiny.model)
    train, test = PLACES[env]
    run = checkpoint.describe_run(tiny.cfg, {"train": train, "test": test, "reference": None})
    folder.mkdir(parents=True)
    checkpoint.write_config(folder, run)
    checkpoint.save(folder, checkpoint.State(tiny, torch.Generator(), step=step, run=run))
    loads = "1.5,2,0.1,0.2,0.3,0.4"
    rows = (f"{n},0.1,0.05,{0.2 * n},{3 - n},{0.1 * n},0.01,0.1,{loads}\n" for n in (1, 2, 3))
    (folder / "train.csv").write_text(f"step,{OLD},{LOADS}\n" + "".join(rows))
    return folder


def made_up(folder, returns=None, layout="ad", family=PLANE, split=((), ()), **changes) -> Run:
    """A run in memory; with `returns` (N, E), those are its evaluation's."""
    tiny = method(layout, family, **changes)
    run = Run(folder, tiny, checkpoint.TaskSplit(*split, None), Figures())
    if returns is not None:
        folder.mkdir(parents=True)
        name = f"test-{variant(tiny, Evaluation('', play=tiny.cfg.play))}.csv"
        lines = [f"0.{n},{e + 1},{v}" for n, row in enumerate(returns) for e, v in enumerate(row)]
        (folder / name).write_text("\n".join(["task,episode,return", *lines, ""]))
    return run


def table(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def has_colours(picture) -> bool:
    """More than axes, words and the few pixels of a legend."""
    return (np.ptp(picture[..., :3], axis=-1) > 0.2).mean() > 1e-3


def words_of(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def sides_of(band) -> list[float]:
    """What fill_between has drawn: its low side, then its high one."""
    vertices = band.get_paths()[0].vertices
    places = sorted({x for x, _ in vertices})
    heights = [[y for x, y in vertices if x == place] for place in places]
    return [*map(min, heights), *map(max, heights)]


def check_picture(drawn) -> list[dict]:
    """PNG and PDF are there, and not empty; the rows of the CSV beside them."""
    place = drawn.stem
    assert has_colours(imread(f"{place}.png"))
    with open(f"{place}.pdf", "rb") as file:
        assert file.read(5) == b"%PDF-"
    rows = table(f"{place}.csv")
    assert rows and drawn.caption
    return rows


def taught(layout="ad", **changes):
    """A tiny method of DarkRoom, and a dataset of two goals in each of two quadrants."""
    tiny = method(layout, get_family("darkroom"), layers=2, prompt_length=100, batch=3, **changes)
    stir(tiny.model)
    data = coded_dataset(tasks=4)
    data.meta["train_tasks"] = [[8, 8], [1, 1], [9, 9], [0, 2]]  # I, III, I, III
    return tiny, data
