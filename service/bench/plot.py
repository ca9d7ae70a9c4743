"""A plot of what `saccade bench decode` measured: time against context."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from service.bench.record import Record


def draw(records: Sequence[Record], file: Path) -> None:
    """Draw a panel a batch size, a line a way, both axes logarithmic."""
    import matplotlib as mpl  # takes a second

    mpl.use("agg")
    from matplotlib import pyplot as plt

    batches = sorted({record.batch for record in records})
    figure, panels = plt.subplots(
        1, len(batches), figsize=(4.5 * len(batches), 4), sharey=True, squeeze=False
    )
    for panel, batch in zip(panels[0], batches, strict=True):
        lines = defaultdict(list)
        for record in records:
            if record.batch == batch:
                lines[record.policy].append((record.context, record.us))
        for name, points in lines.items():
            wide = 2.5 if name == "dynamic" else 1.2
            panel.plot(*zip(*sorted(points), strict=True), "o-", label=name, linewidth=wide)
        panel.set(xscale="log", yscale="log", xlabel="keys in the cache", title=f"batch {batch}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("microseconds a layer")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
