"""What is drawn of a pattern, which primitive lit it, and how many keys its queries see."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import PatternError
from kernels.patterns import lists
from kernels.patterns.lit import lit
from kernels.patterns.pattern import Pattern
from kernels.patterns.picture import picture

some = settings(deadline=None, max_examples=50)
MILLION = 1 << 20


def lighters(expression, seen, first=0):
    """Which primitives are why a pair is seen: sets, from each primitive's own mask."""
    name = type(expression).__name__
    if name not in ("Union", "Intersection"):
        return {first} if seen[first] else set(), first + 1
    found = []
    for part in expression.parts:
        mine, first = lighters(part, seen, first)
        found.append(mine)
    if name == "Intersection" and not all(found):
        return set(), first
    return set().union(*found), first


@some
@given(st.data())
def test_a_pair_is_lit_by_the_primitives_that_are_why_it_is_seen(patterns, data):
    pattern = data.draw(patterns)
    query, key = data.draw(st.integers(0, 400)), data.draw(st.integers(0, 400))
    place = torch.tensor(query), torch.tensor(key)
    bits = int(lit(pattern.expression, *place, pattern.causal))
    seen = [bool(one.allows(*place, pattern.causal)) for one in pattern.primitives]
    expected, _ = lighters(pattern.expression, seen)
    assert {p for p in range(len(seen)) if bits >> p & 1} == expected
    assert (bits != 0) == bool(pattern.allows(*place))


@pytest.mark.parametrize("step", [1, 2, 8, 64])
@some
@given(st.data())
def test_a_picture_is_a_part_of_the_mask(patterns, step, data):
    pattern, length = data.draw(patterns), data.draw(st.integers(1, 300))
    last = (length - 1) // step  # cell
    begin = [step * data.draw(st.integers(0, last)) for _ in range(2)]
    end = [step * (1 + data.draw(st.integers(b // step, last))) for b in begin]
    shown = picture(pattern, (begin[0], end[0]), (begin[1], end[1]), length, step)
    query, key = torch.arange(begin[0], end[0])[:, None], torch.arange(begin[1], end[1])
    there = (query < length) & (key < length)
    there = there & (key <= query) if pattern.causal else there
    bits = lit(pattern.expression, query, key, pattern.causal).where(there, 0)

    def cells(values):
        return values.reshape(shown.share.shape[0], step, shown.share.shape[1], step)

    pairs = cells((bits != 0).long()).sum((1, 3))
    assert torch.allclose(shown.share, pairs / cells(there.long()).sum((1, 3)).clamp_min(1))
    assert torch.equal(shown.primitive >= 0, pairs > 0)
    leftmost = [cells(((bits & -bits) == 1 << p).long()).sum((1, 3)) for p in range(16)]
    most = torch.stack(leftmost).max(0).values
    assert torch.equal(torch.stack(leftmost).gather(0, shown.primitive.clamp_min(0)[None])[0], most)
    for number in range(len(pattern.primitives)):
        assert torch.equal(shown.lit >> number & 1, cells(bits >> number & 1).amax((1, 3)))


@some
@given(st.data())
def test_keys_of_tiles_are_those_of_the_mask(patterns, data):
    pattern, n = data.draw(patterns), data.draw(st.integers(0, 300))
    each = pattern.mask(n, n).sum(1)
    expected = [int(part.sum()) for part in torch.split(each, 64)] if n else []
    assert pattern.keys_of_tiles(n).tolist() == expected


@pytest.mark.parametrize(
    "text", ["strided:61+strided:59", "window:100+dilated:9,70", "strided:7&full"]
)
@pytest.mark.parametrize("kind", ["", "@bidirectional"])
def test_a_million_tokens_are_counted_by_distance(text, kind):
    pattern = Pattern.parse(text + kind)
    # Each distance that is allowed has as many pairs as there are queries that far from an end.
    distance = torch.arange(MILLION)
    back = pattern.allows(distance[-1], distance.flip(0))
    ahead = pattern.allows(torch.tensor(0), distance)
    pairs = int((back * (MILLION - distance)).sum())
    if kind:
        pairs += int((ahead * (MILLION - distance)).sum()) - MILLION * int(ahead[0])
    assert pattern.selected_keys(MILLION) == pairs


@pytest.mark.parametrize(
    "text",
    [
        "sinks:1+strided:61+strided:59",
        "random:2000,0",
        "axial:3,5+axial:7,11+axial:13,17",
        "+".join(f"axial:{n},{n + 2}" for n in range(31, 47)),
    ],
)
def test_a_pattern_that_is_too_much_work_is_refused(text, monkeypatch):
    looked = []
    real = lists.Looks.at
    monkeypatch.setattr(lists.Looks, "at", lambda *a: looked.append(len(a[1])) or real(*a))
    with pytest.raises(PatternError, match="take fewer tokens"):
        Pattern.parse(text).selected_keys(MILLION)
    assert sum(looked) <= lists.MOST


def test_a_picture_of_too_many_masks_is_refused():
    hostile = Pattern.parse("axial:61,59+axial:53,47+axial:43,41")
    with pytest.raises(PatternError, match="look at a smaller part"):
        picture(hostile, (0, 16384), (0, 16384), 16384, 64)
