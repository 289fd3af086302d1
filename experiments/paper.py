"""paper.py: what the paper's experiments vary, and its numbers (Sec. 5; Tables 1, 6-11).

in : an experiment's name, the settings of a preset      out: its variants as settings; a number
Read beside reproduce.py, which runs them.

An experiment is plain data: named variants, each a few settings; groups of variants that are
compared among themselves (the qualities of Table 11). The others are compared with the first,
T2MIR as most columns of Tables 4 and 5 have it. The paper's numbers stand below, by table: mean and
± of "the best performance", the highest point of a curve over episodes, of five seeds; None where
it has none.

Differs from the paper: `routing` and `departures` are not in it, nor are single MoEs with as many
active weights as both, in `ablation`. Table 7 keeps two task experts of 4, 6 or 8; each has here as
many hidden units as in the preset, so that two are the same work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from config import Config
from support.command_line import departures
from support.settings import flat

Settings = dict[str, Any]
Number = tuple[float, float] | None  # mean, ±
Where = tuple[str, str, str, str]  # group, family, backbone, variant

T2MIR = "T2MIR"


class Times(float):
    """A variant's setting as a multiple of the preset's (or --set's)."""


@dataclass(frozen=True)
class Experiment:
    """What varies, and where the paper has it."""

    source: str
    variants: dict[str, Settings]
    groups: dict[str, Settings] = field(default_factory=lambda: {"": {}})
    paper: dict[Where, Number] = field(default_factory=dict)

    @property
    def envs(self) -> list[str]:
        """The families of the paper's table, in its order; where there is none, the fastest."""
        return list(dict.fromkeys(env for _, env, _, _ in self.paper)) or ["darkroom"]


# ------------------------------------------------------------------------------ the paper's numbers
# fmt: off
def _table(columns: list[tuple[str, str]], rows: dict[str, list], group: str = "") -> dict:
    """{(group, family, backbone, variant): number} of a table with families as its rows."""
    return {
        (group, env, backbone, variant): number
        for env, numbers in rows.items()
        for (backbone, variant), number in zip(columns, numbers, strict=True)
    }


# Baselines have one variant, which has no name.
_METHODS = [("ad", T2MIR), ("dpt", T2MIR), ("ad", "plain"), ("dpt", "plain"),
            ("dicp", ""), ("idt", ""), ("unicorn", "")]
TABLE_1 = _table(_METHODS, {
    "darkroom": [(90.9, 0.0), (78.3, 1.4), (57.5, 5.6), (72.5, 13.1),
                 (90.9, 0.0), (49.2, 2.8), None],
    "point-robot": [(-5.2, 0.3), (-5.0, 0.5), (-5.6, 0.4), (-5.8, 0.3),
                    (-5.3, 0.2), (-5.5, 0.5), (-6.6, 0.6)],
    "cheetah-vel": [(-68.9, 2.1), (-43.2, 0.8), (-119.2, 30.4), (-56.1, 1.0),
                    (-74.9, 3.2), (-82.8, 3.0), (-80.6, 22.8)],
    "walker-param": [(435.7, 7.2), (492.8, 29.3), (395.2, 7.1), (425.9, 9.7),
                     (403.7, 15.4), (429.4, 5.8), (372.8, 24.6)],
    "reach": [(823.9, 7.1), (764.6, 9.3), (790.4, 20.2), (754.9, 15.0),
              (775.3, 1.1), (808.5, 3.6), (748.8, 0.1)],
    "push": [(665.8, 13.9), (633.2, 8.6), (604.7, 6.3), (615.4, 6.0),
             (560.0, 64.2), (620.6, 4.6), (547.4, 67.2)],
})


def _both(*variants: str) -> list[tuple[str, str]]:
    """The columns of Tables 6-10: all variants of T2MIR-AD, then of T2MIR-DPT."""
    return [(backbone, variant) for backbone in ("ad", "dpt") for variant in variants]


# Experts kept, of how many.
TABLE_6 = _table(_both("1/3", "2/6", "4/12"), {
    "point-robot": [(-6.6, 0.7), (-5.2, 0.3), (-6.1, 0.5), (-5.6, 0.2), (-5.0, 0.5), (-5.3, 0.3)],
    "cheetah-vel": [(-86.1, 2.2), (-68.9, 2.1), (-80.1, 0.5),
                    (-53.3, 1.3), (-43.2, 0.8), (-50.7, 1.9)],
})
TABLE_7 = _table(_both("2/4", "2/6", "2/8"), {
    "point-robot": [(-5.3, 0.3), (-5.2, 0.3), (-5.2, 0.3), (-5.2, 0.4), (-5.2, 0.2), (-5.0, 0.5)],
    "cheetah-vel": [(-91.7, 27.9), (-76.3, 1.7), (-68.9, 2.1),
                    (-51.5, 7.4), (-45.9, 2.1), (-43.2, 0.8)],
})
TABLE_8 = _table(_both("0.1", "0.01", "0.001"), {
    "point-robot": [(-6.9, 1.6), (-5.2, 0.1), (-5.2, 0.3), (-6.1, 0.4), (-5.4, 0.1), (-5.0, 0.5)],
    "cheetah-vel": [(-148.4, 5.0), (-68.9, 2.1), (-74.1, 1.0),
                    (-49.4, 1.6), (-43.2, 0.8), (-54.9, 1.3)],
})
TABLE_9 = _table(_both("bottom", "middle", "top"), {
    "point-robot": [(-6.0, 0.8), (-5.8, 0.3), (-5.2, 0.3), (-5.5, 0.3), (-5.7, 0.4), (-5.0, 0.5)],
    "cheetah-vel": [(-57.9, 1.6), (-70.2, 5.4), (-68.9, 2.1),
                    (-52.9, 4.0), (-43.8, 2.2), (-43.2, 0.8)],
})
TABLE_10 = _table(_both(T2MIR, "w/o Task-MoE", "w/o Token-MoE", "plain"), {
    "cheetah-vel": [(-68.9, 2.1), (-76.1, 3.7), (-101.1, 29.7), (-119.2, 30.4),
                    (-43.2, 0.8), (-49.5, 3.4), (-47.5, 1.6), (-56.1, 1.0)],
    "walker-param": [(435.7, 7.2), (418.6, 3.9), (410.8, 5.1), (395.2, 7.1),
                     (492.8, 29.3), (446.1, 6.5), (475.3, 32.5), (425.9, 9.7)],
    "push": [(665.8, 13.9), (656.8, 17.8), (634.0, 4.0), (604.7, 6.3),
             (633.2, 8.6), (627.2, 4.0), (628.0, 7.2), (615.4, 6.0)],
})
TABLE_11 = _table(_METHODS, {
    "cheetah-vel": [(-77.8, 1.5), (-56.0, 6.8), (-130.3, 24.2), (-67.3, 0.6),
                    (-73.4, 1.6), (-83.1, 14.4), (-80.6, 22.8)],
    "push": [(654.4, 24.3), (586.3, 9.5), (595.4, 3.5), (573.6, 8.5),
             (485.5, 29.2), (632.9, 7.1), (513.7, 51.1)],
}, "medium-expert") | _table(_METHODS, {
    "cheetah-vel": [(-76.6, 11.4), (-63.3, 4.0), (-135.8, 19.2), (-67.9, 3.2),
                    (-75.6, 2.5), (-105.3, 4.1), (-105.9, 3.7)],
    "push": [(600.5, 6.8), (530.0, 6.7), (577.7, 16.8), (514.2, 12.7),
             (416.9, 20.9), (554.3, 9.8), (402.4, 162.9)],
}, "medium")
# Mixed data, which Fig. 5 sets beside the two others, are Table 1's
_MIXED = {("mixed", *where): number for (_, *where), number in TABLE_1.items()
          if where[0] in ("cheetah-vel", "push")}
# fmt: on

# ----------------------------------------------------------------------------------- what is varied
_MOE = {T2MIR: {"moe": "both"}, "plain": {"moe": "none"}}  # plain AD or DPT
EXPERIMENTS = {
    "table1": Experiment("Table 1, Fig. 3", _MOE, paper=TABLE_1),
    "ablation": Experiment(
        "Table 10, Fig. 4",
        {
            T2MIR: {"moe": "both"},
            "w/o Task-MoE": {"moe": "token"},
            "w/o Token-MoE": {"moe": "task"},
            "plain": {"moe": "none"},
            # one MoE alone has 2/3 of the active weights of both, or of plain; these have as many
            "Token-MoE x 3/2": {"moe": "token", "token_hidden": Times(3 / 2)},
            "Task-MoE x 3/2": {"moe": "task", "task_hidden": Times(3 / 2)},
        },
        paper=TABLE_10,
    ),
    "quality": Experiment(
        "Table 11, Fig. 5",
        _MOE,
        {name: {"quality": name} for name in ("mixed", "medium-expert", "medium")},
        _MIXED | TABLE_11,
    ),
    "token-experts": Experiment(
        "Table 6",
        {
            "2/6": {"token_experts": 6},  # of --top-k 2, as the task router
            "1/3": {"token_experts": 3, "token_top_k": 1},
            "4/12": {"token_experts": 12, "token_top_k": 4},
        },
        paper=TABLE_6,
    ),
    "task-experts": Experiment(
        "Table 7", {f"2/{n}": {"task_experts": n} for n in (8, 6, 4)}, paper=TABLE_7
    ),
    "contrastive-weight": Experiment(
        "Table 8", {str(w): {"w_contrastive": w} for w in (0.01, 0.1, 0.001)}, paper=TABLE_8
    ),
    "moe-position": Experiment(
        "Table 9", {name: {"moe_position": name} for name in ("top", "middle", "bottom")},
        paper=TABLE_9,
    ),
    "routing": Experiment(
        "not in the paper: whose mean is h_bar of Eq. 4",
        {name: {"routing": name} for name in ("sequence", "prefix", "token")},
    ),
    # its variants are those of the preset: `variants_of`
    "departures": Experiment("not in the paper: DEPARTURES.md, one taken back at a time", {}),
}  # fmt: skip


def get_experiment(name: str) -> Experiment:
    """An experiment by its name. Raises ValueError with one line that lists them."""
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment '{name}': choose one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def variants_of(name: str, base: Config) -> dict[str, Settings]:
    """{variant: the settings that it changes in `base`}; `base` are the settings of a preset.

    A method that does not have an experiment's settings (most baselines) has one variant, itself.
    Raises ValueError where a preset has no departures.
    """
    if name == "departures":
        taken_back = {f"{k} {paper}": {k: paper} for k, (paper, _) in departures(base).items()}
        if not taken_back:
            raise ValueError(f"--preset {base.preset} has no departures from the preset paper")
        return {base.preset: {}} | taken_back
    known = flat(base)
    found = {}
    for variant, settings in get_experiment(name).variants.items():
        if settings.keys() <= known.keys():
            found[variant] = dict(settings)
            if "task_experts" in settings:  # each keeps its size: see the head of this file
                units = known["task_hidden"] // known["task_experts"]
                found[variant]["task_hidden"] = units * settings["task_experts"]
            for half in ("token", "task"):
                if times := settings.get(f"{half}_hidden"):  # whole units an expert
                    experts = known[f"{half}_experts"]
                    units = round(times * known[f"{half}_hidden"] / experts)
                    found[variant][f"{half}_hidden"] = units * experts
    return found or {"": {}}
