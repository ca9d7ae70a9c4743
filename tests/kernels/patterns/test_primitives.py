"""Each primitive against its definition in plain Python: masks, tiles, decode rows and counts."""

from __future__ import annotations

import pytest
import torch

from kernels.patterns.parse import PRIMITIVES
from kernels.patterns.pattern import Pattern

SPECS = [
    *("full", "sinks:1", "sinks:16", "sinks:64"),
    *("window:1", "window:2", "window:7", "window:64", "window:65", "window:900"),
    *("dilated:1,3", "dilated:5,1", "dilated:4,7", "dilated:3,64", "dilated:50,2"),
    *("global:1", "global:3", "global:64", "global:100"),
    *("strided:1", "strided:3", "strided:64", "strided:100", "strided:128"),
    *("fixed:1,1", "fixed:5,2", "fixed:16,16", "fixed:64,8", "fixed:100,30", "fixed:128,8"),
    *("block_local:1", "block_local:6", "block_local:64", "block_local:70", "block_local:128"),
    *("axial:1,9", "axial:9,1", "axial:4,5", "axial:8,8", "axial:3,64", "axial:2,70"),
    *("random:1,0", "random:2,7", "random:40,3"),
]
SIZES = [*range(1, 65), 65, 97, 128, 131, 150]
LISTED = (1, 33, 63, 64, 65, 97, 131, 150)
"""Of these the lists of pages are taken apart."""
MOST = max(SIZES)


@pytest.mark.parametrize("kind", ["", "@bidirectional"])
@pytest.mark.parametrize("text", SPECS)
def test_a_primitive_is_its_definition(text, kind, by_definition, listed):
    pattern = Pattern.parse(text + kind)
    expected = by_definition(text + kind, MOST)
    assert torch.equal(pattern.mask(MOST, MOST), expected)
    for n in SIZES if pattern.causal else LISTED:
        # The definitions do not ask how many tokens there are.
        part = expected[:n, :n]
        assert pattern.selected_keys(n) == int(part.sum())
        if n in LISTED:
            assert torch.equal(listed(pattern, 0, n, n), part)


@pytest.mark.parametrize("text", SPECS)
def test_a_decode_row_gets_the_keys_of_the_definition(text, by_definition):
    position = torch.arange(MOST)
    expected = by_definition(text, MOST)
    selection = Pattern.parse(text).select(position + 1, torch.zeros_like(position), 1)
    selection.validate(position + 1)
    shown = torch.zeros(MOST, MOST + 1, dtype=torch.bool)
    keys = selection.indices[:, 0]
    shown.scatter_(1, keys.where(keys >= 0, MOST), True)
    assert torch.equal(shown[:, :MOST], expected)


def test_every_primitive_has_a_case():
    assert {spec.split(":")[0] for spec in SPECS} == {kind.name for kind in PRIMITIVES}
