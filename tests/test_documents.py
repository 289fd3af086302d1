"""What README.md and FINDINGS.md say of Table 1 is what its runs returned."""

from __future__ import annotations

import re

import commands
import pytest
from commands import ROOT

FAMILIES = {
    "Cheetah-Vel": "cheetah-vel",
    "Cheetah-Vel in three clusters": "cheetah-vel-3cluster",
    "Point-Robot": "point-robot",
    "DarkRoom": "darkroom",
    "Reach": "reach",
}
SEEDS = {"one": 1, "two": 2, "three": 3, "five": 5, "ten": 10}
NUMBER = r"-?\d+(?:\.\d+)?"


@pytest.fixture(scope="module")
def table():
    """{(family, backbone, variant): row of table.csv}"""
    rows = commands.table(ROOT / "results" / "paper" / "table1")
    return {(r["env"], r["backbone"], r["variant"]): r for r in rows}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def as_printed(value: str | float, text: str) -> str:
    """The value with as many decimals as the text has; rounded once."""
    return f"{float(value):.{len(text.partition('.')[2])}f}"


def seeds_of(row: dict[str, str]) -> int:
    return len(row["seeds"].split())


def test_readme_has_the_returns_of_table_1(table):
    lines = (ROOT / "README.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| `--env` | random |"))
    assert cells(lines[head])[2:6] == ["T2MIR-DPT", "plain DPT", "T2MIR-AD", "plain AD"]
    columns = [("dpt", "T2MIR"), ("dpt", "plain"), ("ad", "T2MIR"), ("ad", "plain")]
    left = dict(table)
    for line in lines[head + 2 : head + 9]:
        env, _, *printed = cells(line)
        for (backbone, variant), cell in zip(columns, printed[:4], strict=True):
            row = left.pop((env.strip("`"), backbone, variant), None)
            if row is None:  # a single run, or none
                continue
            value, seeds = re.fullmatch(rf"\**({NUMBER})\** \((\d+)\)", cell).groups()
            assert value == as_printed(row["mean"], value), line
            assert int(seeds) == seeds_of(row), line
            if variant == "T2MIR":  # bold: ahead of plain
                plain = table[env.strip("`"), backbone, "plain"]
                assert ("**" in cell) == (float(plain["difference_high"]) < 0), line
    assert left == {}, "rows of table 1 that README.md leaves out"


def test_findings_have_the_differences_of_table_1(table):
    backbone, found = "", 0
    for line in (ROOT / "FINDINGS.md").read_text().splitlines():
        if line.startswith("| Table 1: "):
            backbone = re.match(r"\| Table 1: T2MIR ahead of (\w+)", line).group(1).lower()
        elif not line.startswith("| | "):
            continue
        if len(cells(line)) != 6:  # another table
            continue
        _, family, both, difference, paper, verdict = cells(line)
        name, _, seeds = family.rpartition(", ")
        if name not in FAMILIES:
            continue
        found += 1
        ours, plain = (table[FAMILIES[name], backbone, v] for v in ("T2MIR", "plain"))
        assert SEEDS[seeds.removesuffix(" seeds")] == seeds_of(ours) == seeds_of(plain), line
        assert both == ", ".join(
            as_printed(row["mean"], text)
            for row, text in zip((ours, plain), both.split(", "), strict=True)
        )
        mean, low, high = re.findall(NUMBER, difference)  # T2MIR less plain: the other way round
        bounds = [-float(plain[f"difference{end}"]) for end in ("", "_high", "_low")]
        assert [as_printed(b, mean) for b in bounds] == [mean, low, high], line
        # the definitions that stand above the table; of the paper's number where it has one
        if verdict.startswith("**holds"):
            assert bounds[1] > 0, line
        else:
            assert bounds[1] <= 0, line
            inside = not paper or bounds[1] <= float(paper) <= bounds[2]
            assert verdict.startswith("undecided" if inside else "not here"), line
    assert found == len(table) / 2
