"""page.py: a run on one page: settings, returns, routers, the policy at play.

in : a finished run, figures that were made of it          out: one HTML file
Read last of all. Nothing of the paper is here.

The page is one file that asks nobody for anything: pictures are part of it, there is no script, and
it tells the browser to load nothing. All text is escaped: a run may be somebody else's.
"""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

import evaluate
from evaluate import LAST, READS, reference_lines
from pictures.curves import curve_figure, pyplot
from pictures.frames import draw_frames
from pictures.rooms import draw_rooms
from pictures.runs import Drawn, LeftOut, Run
from support.command_line import differences
from support.files import write_atomically
from support.settings import leaves

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1, h2 { font-weight: 600; line-height: 1.2; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { border-bottom: 1px solid #ddd; padding: 2px 1em 2px 0; text-align: left; }
figcaption { color: #555; white-space: pre-line; }
figure { margin: 1em 0 2em; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<table>
{% for name, value in facts %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table>
{% for heading, picture, caption in pictures %}
<figure>
<h2>{{ heading }}</h2>
<img src="data:image/png;base64,{{ picture }}" alt="{{ heading }}">
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
<h2>Departures from the paper</h2>
{% if departures %}
<p>In {{ departures|length }} settings, each with the value of the preset <code>paper</code> and this
run's:</p>
<ul>
{% for line in departures %}<li>{{ line }}</li>
{% endfor %}</ul>
{% else %}<p>None: these are the settings of the preset <code>paper</code>.</p>
{% endif %}
<h2>Settings</h2>
<table>
{% for group, name, value in settings %}<tr><td>{{ group }}</td><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
</body>
</html>
"""  # noqa: E501

HEADINGS = {
    "router_health": "Routers over training",
    "figure1": "Who goes to which expert (Figure 1)",
    "figure12": "Who goes to which expert (Figure 12)",
    "figure13": "Task experts against the task (Figure 13)",
    "figure7": "Gradients of different tasks (Figure 7)",
}


def write_page(run: Run, drawn: dict[str, Drawn], path: Path) -> None:
    """The page of one run; `drawn`: the figures that were made of it, by name."""
    facts: list[tuple[str, Any]] = []
    pictures: list[tuple[str, str, str]] = []  # heading, PNG as base64, caption
    episodes = 1
    try:
        _, returns = run.returns()  # (N, E)
        episodes = returns.shape[1]
        lines = reference_lines(run.method, run.split, "test")
        facts = [
            ("return, first episode", f"{returns[:, 0].mean():.2f}"),
            (f"return, last {min(LAST, episodes)} episodes", f"{returns[:, -LAST:].mean():.2f}"),
            *((name, f"{value:.2f}") for name, value in lines.items() if value is not None),
        ]
        title = f"{run.method.family.name}, {run.method.label}"
        curve = in_memory(curve_figure(title, returns, lines, *ceiling(run, episodes)), dpi=130)
        pictures.append(("Returns on held-out tasks", curve, BESIDE))
    except LeftOut as reason:
        facts = [("returns", str(reason))]
    episodes = max(episodes, 3)  # a first, a middle and a last one
    room = draw_rooms(run, episodes)
    if room is not None:
        pictures.append(("At play on held-out tasks", in_memory(room), STARS))
    try:
        strip = draw_frames(run, episodes)
        if strip is not None:
            pictures.append(("The last episode on a held-out task", in_memory(strip), STRIP))
    except LeftOut as reason:
        facts.append(("frames of the simulator", str(reason)))
    for name, heading in HEADINGS.items():
        if name in drawn:
            png = drawn[name].stem.with_name(f"{drawn[name].stem.name}.png").read_bytes()
            pictures.append((heading, encoded(png), drawn[name].caption))
    # autoescape: of every value, whatever a run's files say; strict: a slip is no empty cell
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    cfg = run.method.cfg
    text = engine.from_string(TEMPLATE).render(
        title=f"{run.method.label} on {run.method.family.name}: {run.name}",
        facts=facts,
        pictures=pictures,
        departures=differences(cfg),
        settings=list(leaves(cfg)),
    )
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


BESIDE = "Mean over tasks; shaded: 95 % interval over them. Lines: what it is to be compared with."
STARS = (
    "Stars: goals, which the policy is not told. For DarkRoom the belief beside each path is that "
    "of the exact posterior: what could be known of the goal before that episode."
)
STRIP = "Rendered by the simulator, on the first held-out task."


def ceiling(run: Run, episodes: int) -> tuple[np.ndarray | None, str]:
    """Returns (E,) of the exact policy with the run's memory, as evaluate.py draws them; a name."""
    own = replace(run.method.cfg.play, episodes=episodes)
    policy = run.method.policy(own)
    returns = evaluate.ceiling(run.method, policy, run.split.test, own)
    return returns, "" if returns is None else f"exact posterior of {READS[policy.memory]}"


def in_memory(figure: Any, dpi: int = 110) -> str:
    """A matplotlib figure as PNG in base64. Closes it."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    pyplot().close(figure)
    return encoded(png.getvalue())


def encoded(png: bytes) -> str:
    return base64.b64encode(png).decode()
