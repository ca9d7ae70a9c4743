"""Accuracy against density: a panel a task, a line for each kind of policy at each context."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kernels.policy import Dynamic
from service.errors import ConfigError
from service.eval.chance import majority_chance
from service.eval.tasks import votes, winning

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from service.eval.record import Record

FORMATS = (".svg", ".png")
_MARKERS = {
    "dense": "*",
    "dynamic": "o",
    "escalating": "D",
    "dynamic:k": "s",
    "top-k": "v",
    "fixed": "^",
}
# The policies' names are long, the lines many: the marker names the kind, the colour the context.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_ACROSS = 3
_AROUND = 80
"""Tokens of a `majority` prompt that are not the document's, near enough."""
_WINDOW = 95.5
"""Keys in the recent window that dynamic selection always keeps, on average: 64 to 127."""


def check_plot(file: Path) -> None:
    """Refuse a name before the work is done.

    Raises:
        ConfigError: the file's ending is not one of `FORMATS`.
    """
    if file.suffix not in FORMATS:
        raise ConfigError(f"--plot writes {' or '.join(FORMATS)} files, not {file.name}")


def family(policy: str) -> str:
    """The kind of a policy by its name: policies of a kind differ in their budget alone."""
    kind, _, rest = policy.partition(":")
    if kind == "dynamic" and "min_coverage=" in rest:
        return "escalating"  # to dense attention
    if kind == "dynamic" and "sampled=false" in rest:
        return "top-k"
    return "dynamic:k" if kind == "dynamic" and rest.startswith("k=") else kind


def plain_keys(policy: str) -> int | None:
    """Keys of plain top-k behind dense first layers; None for other policies.

    Without those it answers gibberish where a first layer looks everywhere: what it shows then is
    not how many keys a vote needs.
    """
    found = re.fullmatch(r"dynamic:k=(\d+),sampled=false,dense_layers=[1-9]\d*", policy)
    return int(found[1]) if found else None


def expectation(context: int) -> tuple[list[float], list[float]]:
    """What plain top-k should answer right of `majority`: numbers of keys, and probabilities.

    A head that looks for votes cannot tell which of them matter: of its keys the sinks and the
    recent window take some, and the rest sees as many votes, at random.
    """
    count = votes(context - _AROUND)
    keys = [Dynamic().sinks + _WINDOW + seen for seen in range(count + 1)]
    return keys, [majority_chance(count, winning(count), seen) for seen in range(count + 1)]


def draw(records: Sequence[Record], file: Path) -> None:
    """Write the plot.

    Args:
        records: what to show.
        file: its ending chooses the format.
    """
    # Late: serving needs none of it.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    top_k = [r for r in records if r.task == "majority" and plain_keys(r.policy)]
    records = [r for r in records if plain_keys(r.policy) is None]
    tasks = list(dict.fromkeys(r.task for r in records))
    contexts = sorted({r.context for r in (*records, *top_k)})
    colours = {one: _COLOURS[i % len(_COLOURS)] for i, one in enumerate(contexts)}
    panels = len(tasks) + bool(top_k)
    across = max(1, min(_ACROSS, panels))
    down = max(1, -(-panels // across))
    figure = Figure(figsize=(3.6 * across + 0.4, 2.9 * down + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    for number, task in enumerate(tasks):
        axes = figure.add_subplot(down, across, number + 1)
        _panel(axes, [r for r in records if r.task == task], colours)
    if top_k:
        _top_k_panel(figure.add_subplot(down, across, panels), top_k, colours)
    kinds = [kind for kind in _MARKERS if any(family(r.policy) == kind for r in records)]
    handles = [
        *(Line2D([], [], color=colours[one], label=f"{one:,} tokens") for one in contexts),
        *(
            Line2D([], [], color="#555555", marker=_MARKERS[kind], linestyle="", label=kind)
            for kind in kinds
        ),
    ]
    if top_k:
        label = "top-k, expected"
        handles.append(Line2D([], [], color="#555555", linestyle="--", linewidth=1, label=label))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    # The same records give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "saccade"}):
        metadata = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, dpi=150, metadata=metadata)


def _panel(axes: Axes, records: Sequence[Record], colours: dict[int, str]) -> None:
    for context, colour in colours.items():
        here = [r for r in records if r.context == context]
        for kind, marker in _MARKERS.items():
            line = sorted(
                (r for r in here if family(r.policy) == kind), key=lambda r: (r.density, r.policy)
            )
            if line:
                _bars(axes, [r.density for r in line], line, colour, marker)
    passages = records[0].accuracy is None
    _dress(axes, records[0].task, "density", "bits per byte" if passages else "accuracy")


def _top_k_panel(axes: Axes, records: Sequence[Record], colours: dict[int, str]) -> None:
    """Accuracy of plain top-k against its keys, and what an ideal reader of them would have."""
    for context, colour in colours.items():
        line = {plain_keys(r.policy) or 0: r for r in records if r.context == context}
        if not line:
            continue
        keys = sorted(line)
        axes.plot(*expectation(context), color=colour, linestyle="--", linewidth=1)
        _bars(axes, keys, [line[k] for k in keys], colour, _MARKERS["top-k"])
    _dress(axes, "majority, top-k behind dense first layers", "keys", "accuracy")


def _bars(
    axes: Axes, places: Sequence[float], records: Sequence[Record], colour: str, marker: str
) -> None:
    """A line through the records, with their intervals."""
    values = [r.bits_per_byte if r.accuracy is None else r.accuracy for r in records]
    spans = [(v or 0.0, r.low, r.high) for v, r in zip(values, records, strict=True)]
    axes.errorbar(
        places,
        [value for value, _, _ in spans],
        # Percentile intervals need not hold the mean.
        yerr=(
            [max(0.0, value - low) for value, low, _ in spans],
            [max(0.0, high - value) for value, _, high in spans],
        ),
        color=colour,
        marker=marker,
        markersize=8 if marker == _MARKERS["dense"] else 5,
        linewidth=1.2,
        elinewidth=0.8,
    )


def _dress(axes: Axes, title: str, across: str, up: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    if up == "accuracy":
        axes.set_ylim(-0.03, 1.03)
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
