"""What a step's tokens looked at, by what the model noted of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.page import PAGE
from service.engine.sequence import pages_of
from service.engine.tally import Looked, Prefilled

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from models.attention import Recorder
    from models.decode_step import Decoded
    from models.step import StepInput


def of_step(step: StepInput, recorder: Recorder, windows: Seq[int | None], heads: int) -> Looked:
    """What every token looked at; a token that attends densely sees all that its layer lets it."""
    positions = step.positions.cpu()
    visible = torch.stack(
        [(positions + 1).clamp(max=window or 2**62) for window in windows]
    )  # [layers, tokens]
    layers, tokens = visible.shape
    keys = visible.double()
    density = torch.ones(layers, tokens, dtype=torch.float64)
    coverage = torch.ones(layers, tokens, heads, dtype=torch.float64)
    exact = torch.ones_like(coverage) if recorder.audit else None
    if recorder.entries:
        # All layers in one piece: a GPU's answer to each transfer takes as long as many rows.
        entries = recorder.entries
        rows = torch.tensor([entry.tokens.shape[0] for entry in entries])
        layer = torch.tensor([entry.layer for entry in entries]).repeat_interleave(rows)
        place = torch.cat([entry.tokens for entry in entries]).cpu()  # [rows of all layers]
        attended = torch.cat([entry.keys for entry in entries]).cpu().double().mean(-1)
        keys[layer, place] = attended
        seen = torch.cat([entry.visible for entry in entries]).cpu().double()
        density[layer, place] = attended / seen
        estimates = torch.cat([entry.coverage for entry in entries]).cpu()
        coverage[layer, place] = estimates.double()
        known = [e.true_coverage for e in entries if e.true_coverage is not None]
        if exact is not None and known:
            exact[layer, place] = torch.cat(known).cpu().double()  # audits are of whole steps
    audited = None if exact is None else exact.numpy()
    return Looked(density.numpy(), keys.numpy(), coverage.numpy(), audited)


def of_prefill(step: StepInput, recorder: Recorder, place: int, tokens: range) -> Prefilled:
    """What a prompt's tokens looked at, those before its tail.

    Args:
        step: the step.
        recorder: its notes.
        place: in the step, of the first of them.
        tokens: their positions.
    """
    pages = [len(page) for page in pages_of(tokens)]
    density, coverage = np.ones((2, len(pages)))
    for group in step.tiled:
        if not place <= group.first < place + len(tokens):
            continue
        entries = [entry for entry in recorder.tiles if entry.first == group.first]
        found = torch.stack([torch.stack((one.density, one.coverage)) for one in entries])
        begin = group.segment.start // PAGE - tokens.start // PAGE
        part = slice(begin, begin + found.shape[2])
        density[part], coverage[part] = found.double().mean(0).cpu().numpy()
    return Prefilled(np.array(pages), density, coverage)


def of_replay(
    decoded: Decoded, positions: Seq[int], windows: Seq[int | None], heads: int
) -> Looked:
    """What the rows of a captured step looked at.

    Args:
        decoded: what the step computed, on the host.
        positions: of the rows; behind them stands padding.
        windows: of each layer.
        heads: query heads of a layer.
    """
    rows = len(positions)
    widest = np.array([window or np.inf for window in windows])[:, None]
    visible = np.minimum(np.array(positions) + 1.0, widest)  # [layers, rows]
    if decoded.keys is None or decoded.coverage is None:
        return Looked(np.ones_like(visible), visible, np.ones((*visible.shape, heads)))
    keys = decoded.keys[:, :rows].double().mean(-1).numpy()  # [layers, rows]
    return Looked(keys / visible, keys, decoded.coverage[:, :rows].double().numpy())
