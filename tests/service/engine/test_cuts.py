"""What each level of brownout leaves of a budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.budget import SAMPLE
from service.engine.cuts import Levels, cut_of, halvings_of
from tests.service.engine.tiny import dynamic

LEVELS = Levels(halvings=3, fixed=True)


def budget(level, levels=LEVELS, priority=0, **changes):
    cut = cut_of(dynamic(**changes), priority, level, levels)
    return None if cut is None else (cut.policy, cut.min_keys, cut.max_keys)


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        # min_keys and max_keys of the request; of levels 1, 2, 3.
        ((384, 1024), [(384, 512), (384, 512), (384, 512)]),
        ((0, 4096), [(0, 2048), (0, 1024), (0, 512)]),
        ((1600, 4097), [(800, 2048), (512, 1024), (512, 512)]),
        ((4096, 4096), [(2048, 2048), (1024, 1024), (512, 512)]),
        ((600, 600), [(512, 512)] * 3),
    ],
)
def test_budgets_are_halved_down_to_the_fewest_of_a_sample(asked, left):
    least, most = asked
    for level, expected in enumerate(left, 1):
        assert budget(level, min_keys=least, max_keys=most) == ("dynamic", *expected)
    assert budget(4, min_keys=least, max_keys=most) == ("fixed", least, most)
    assert budget(0, min_keys=least, max_keys=most) is None


def test_what_is_as_small_stays():
    assert all(budget(level, max_keys=SAMPLE) is None for level in (1, 2, 3))
    assert budget(4, max_keys=SAMPLE) == ("fixed", 0, SAMPLE)


@pytest.mark.parametrize(
    "changes", [{"allow_brownout": False}, {"policy": "dense"}, {"policy": "fixed"}]
)
def test_what_refuses_is_never_cut(changes):
    assert all(budget(level, max_keys=4096, **changes) is None for level in range(5))


def test_a_floor_of_coverage_keeps_the_pattern_away():
    assert budget(4, max_keys=4096, min_coverage=0.3) == ("dynamic", 0, 512)
    assert budget(4, max_keys=512, min_coverage=0.3) is None


def test_there_may_be_no_pattern_and_no_halving():
    assert budget(9, Levels(halvings=1), max_keys=4096) == ("dynamic", 0, 2048)
    assert budget(1, Levels(fixed=True), max_keys=4096) == ("fixed", 0, 4096)
    assert budget(5, Levels(), max_keys=4096) is None


def test_low_priorities_are_reached_first():
    """The numbers of vLLM: lower is more urgent."""
    by_priority = {
        priority: [budget(level, priority=priority, max_keys=4096) for level in range(5)]
        for priority in (-4, -1, 0, 1, 9)
    }
    plain = by_priority[0]
    assert by_priority[-4] == [None] * 5
    assert by_priority[-1] == [None, None, *plain[1:4]]
    assert by_priority[1] == [None, *plain[2:], plain[4]]
    assert by_priority[9] == [None, *[plain[4]] * 4]


def test_halvings_lead_to_the_fewest():
    assert [halvings_of(n) for n in (1, 512, 513, 1024, 1025, 4096)] == [0, 0, 1, 1, 2, 3]


SIZES = st.integers(0, 2**31 - 1)


@given(SIZES, SIZES, st.integers(0, 16), st.integers(-20, 20), st.booleans())
def test_a_cut_is_a_budget_and_the_higher_the_level_the_smaller(a, b, halvings, priority, fixed):
    levels = Levels(halvings, fixed)
    least, most = min(a, b), max(a, b, 1)
    before = most
    for level in range(levels.last + 2):
        cut = cut_of(dynamic(min_keys=least, max_keys=most), priority, level, levels)
        if cut is not None and cut.policy == "dynamic":
            assert 0 <= cut.min_keys <= cut.max_keys <= before
            assert cut.max_keys >= min(most, SAMPLE)
            before = cut.max_keys
    if halvings >= halvings_of(most) and not fixed and priority >= 0 and levels.last:
        assert before == min(most, SAMPLE)
