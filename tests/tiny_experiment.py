"""A tiny experiment of reproduce.py: its command line (the fixture `tiny`), its runs."""

import itertools

from reproduce import Reproduction, plan


def but(line, *settings) -> list[str]:
    """A command line that ends in settings, with other values of these."""
    others = {text.partition("=")[0] for text in settings}
    return [word for word in line if word.partition("=")[0] not in others] + list(settings)


def planned(argv) -> list:
    """The runs of a command line."""
    found = dict(zip(argv, [*argv[1:], ""], strict=True))
    settings = tuple(itertools.takewhile(lambda word: "=" in word, argv[argv.index("--set") + 1 :]))
    seeds = tuple(map(int, argv[argv.index("--seeds") + 1 :]))
    command = Reproduction(
        "table1", ("darkroom",), (found["--backbones"],), ("T2MIR",), seeds, "cpu", settings
    )
    return plan(command)[0]


def names(argv) -> dict[int, str]:
    return {run.seed: run.job.name for run in planned(argv)}
