"""Plots of a load test as SVG, to stand in a page whose colours they take."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from service.load.summary import label

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from service.load.outcome import Outcome
    from service.load.summary import Summary

    Runs = Sequence[tuple[Summary, Sequence[Outcome]]]

_INK = "#010203"
"""Stands for the page's text colour, which a figure cannot know."""
_COLOURS = ("#3d8bfd", "#f08c3a", "#2fa866", "#d6577d", "#9673e0", "#b58a1e")
"""Legible on white and on near-black."""


def latencies(runs: Runs) -> str:
    """What share of the requests, or of the gaps between tokens, took at most so long."""
    from matplotlib.ticker import LogLocator, NullFormatter

    measures: dict[str, Callable[[Outcome], list[float]]] = {
        "time to first token": lambda one: [] if one.ttft is None else [one.ttft],
        "between tokens": lambda one: one.gaps,
        "end to end": lambda one: [] if one.e2e is None else [one.e2e],
    }

    def draw(panels: Sequence[Axes]) -> None:
        for panel, (title, values_of) in zip(panels, measures.items(), strict=True):
            for record, outcomes in runs:
                done = [one for one in outcomes if one.error is None]
                values = np.sort([value for one in done for value in values_of(one)])
                if len(values):
                    shares = np.arange(1, len(values) + 1) / len(values)
                    panel.step(np.maximum(values, 1e-6), shares, where="post", label=label(record))
            panel.set(title=title, xlabel="seconds", ylim=(0, 1.02), xscale="log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
        panels[0].set_ylabel("share")
        _legend(panels[0])

    return _svg("latencies", 3, draw)


def timeline(runs: Runs) -> str:
    """Over the time: requests under way, tokens a second, and the time to first token."""

    def draw(panels: Sequence[Axes]) -> None:
        for number, (record, outcomes) in enumerate(runs):
            colour = _COLOURS[number % len(_COLOURS)]
            changes = sorted([(o.sent, 1) for o in outcomes] + [(o.ended, -1) for o in outcomes])
            times, steps = np.array(changes).T
            panels[0].step(times, np.cumsum(steps), where="post", color=colour, label=label(record))
            tokens = np.array([time for one in outcomes for time in one.tokens_at])
            if len(tokens):
                width = max(tokens.max() / 60, 1e-3)
                counts, edges = np.histogram(tokens, bins=np.arange(0, tokens.max() + width, width))
                panels[1].step(edges[:-1], counts / width, where="post", color=colour)
            started = [(one.due, one.ttft) for one in outcomes if one.ttft is not None]
            if started:
                panels[2].plot(*zip(*started, strict=True), ".", markersize=4, color=colour)
            failed = [one.due for one in outcomes if one.error is not None]
            panels[2].plot(failed, np.zeros(len(failed)), "x", color=colour)
        panels[0].set(title="requests under way", xlabel="seconds")
        panels[1].set(title="tokens a second", xlabel="seconds")
        panels[2].set(title="time to first token (x: failed)", xlabel="due at, seconds")
        for panel in panels:
            panel.set_ylim(bottom=0)
        _legend(panels[0])

    return _svg("timeline", 3, draw)


def loads(records: Sequence[Summary]) -> str:
    """Latency, throughput and goodput against the load."""

    def draw(panels: Sequence[Axes]) -> None:
        names = [label(record) for record in records]
        for panel, measure in zip(panels, ("ttft", "itl"), strict=False):
            for percentile in ("p50", "p99"):
                cells = [getattr(record, measure) for record in records]
                values = [np.nan if cell is None else getattr(cell, percentile) for cell in cells]
                panel.plot(names, values, "o-", label=percentile)
            panel.set(title={"ttft": "time to first token", "itl": "between tokens"}[measure])
            panel.set_ylabel("seconds")
            panel.set_ylim(bottom=0)
        panels[2].plot(names, [record.requests_per_s for record in records], "o-", label="answered")
        panels[2].plot(names, [record.goodput_per_s for record in records], "o-", label="good")
        panels[2].set(title="requests a second")
        panels[2].set_ylim(bottom=0)
        for panel in panels:
            panel.tick_params("x", labelrotation=30 if len(names) > 3 else 0)
        _legend(panels[0])
        _legend(panels[2])

    return _svg("loads", 3, draw)


def _legend(panel: Axes) -> None:
    handles, _ = panel.get_legend_handles_labels()
    if len(handles) > 1:
        panel.legend(framealpha=0, fontsize=9)


def _svg(name: str, panels: int, draw: Callable[[Sequence[Axes]], None]) -> str:
    """A row of panels as an `<svg>` element; ids begin with `name`, which a page has once."""
    import matplotlib as mpl  # takes a second

    mpl.use("agg")
    from cycler import cycler
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "axes.prop_cycle": cycler(color=_COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    } | dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    )
    style["grid.color"] = _INK
    with mpl.rc_context(style):
        figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3.4))
        draw(axes)
        figure.tight_layout()
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    return text.replace('xlink:href="#', f'xlink:href="#{name}-')
