"""Answers of the engine at a level of brownout: what is cut, what is not, and how it is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.engine.brownout import Brownout, Targets
from service.engine.cuts import Levels
from tests.service.engine.tiny import dynamic, greedy, prompt_of, tokens_of

LEVELS = Levels(halvings=2, fixed=True)
# Without a target of coverage to reach early, so that a budget is what is read.
WIDE = dynamic(coverage=1.0, min_keys=2048, max_keys=2048)
PROMPT = prompt_of(1400)
TOKENS = 12
CUT = 128 + TOKENS - 1
"""Tokens under the policy: the tail and all generated ones but the last, which is not computed."""


class Forced(Brownout):
    """At a level that does not change."""

    def __init__(self, level, levels=LEVELS):
        super().__init__(Targets(1.0, 1.0), levels)
        self.level = level

    def observe(self, now, waited):
        pass


def counter(harness, to):
    labels = {"model_name": "tiny", "reason": "overload", "to": to}
    return harness.engine.metrics.registry.get_sample_value(
        "saccade_attention_fallback_total", labels
    )


def answer(one, sparsity=WIDE, prompt=PROMPT, **kwargs):
    [deltas] = one.run(one.generate(prompt, greedy(TOKENS), sparsity, **kwargs))
    return tokens_of(deltas), deltas[-1].sparsity


@pytest.fixture
def plain(harness):
    """An engine without brownout."""
    return harness()


@pytest.mark.parametrize("level", [1, 2])
def test_a_cut_answer_is_that_of_the_smaller_budget(harness, plain, level):
    one = harness(brownout=Forced(level))
    keys = 2048 >> level
    tokens, report = answer(one)
    expected, smaller = answer(plain, replace(WIDE, min_keys=keys, max_keys=keys))
    assert tokens == expected and smaller.fallbacks == {}
    assert report == replace(smaller, fallbacks={"overload": CUT})
    assert report.keys_attended < answer(plain)[1].keys_attended
    assert (counter(one, "dynamic"), counter(one, "fixed")) == (CUT, 0)


def test_the_last_level_is_the_fixed_pattern(harness, plain):
    one = harness(brownout=Forced(3))
    tokens, report = answer(one)
    expected, fixed = answer(plain, replace(WIDE, policy="fixed"))
    assert tokens == expected != answer(plain)[0]
    assert report.fallbacks == {"overload": CUT} and report.policy == "dynamic"
    assert report.keys_attended == fixed.keys_attended == 68
    assert report.coverage == 0  # unknown
    assert (counter(one, "dynamic"), counter(one, "fixed")) == (0, CUT)


@pytest.mark.parametrize(
    "changes",
    [{"allow_brownout": False}, {"policy": "dense"}, {"policy": "fixed"}, {"prefill": "dynamic"}],
    ids=str,
)
def test_what_refuses_is_answered_as_ever(harness, plain, changes):
    one, sparsity = harness(brownout=Forced(3)), replace(WIDE, **changes)
    if changes == {"prefill": "dynamic"}:  # nor is a prompt before its tail
        [deltas] = one.run(one.generate(PROMPT, greedy(1), sparsity))
        [expected] = plain.run(plain.generate(PROMPT, greedy(1), sparsity))
        assert deltas[-1].sparsity.prefill == expected[-1].sparsity.prefill is not None
        return
    assert answer(one, sparsity) == answer(plain, sparsity)
    assert counter(one, "dynamic") == counter(one, "fixed") == 0


def test_a_level_without_effect_is_not_counted(harness, plain):
    small = dynamic(max_keys=512)
    one = harness(brownout=Forced(2))
    assert answer(one, small) == answer(plain, small)
    assert counter(one, "dynamic") == 0


def test_others_beside_it_are_not_touched(harness, plain):
    one, refusing = harness(brownout=Forced(2)), replace(WIDE, allow_brownout=False)
    calls = [(PROMPT, WIDE), (prompt_of(900, 1), refusing), (prompt_of(700, 2), dynamic())]
    together = one.run(*(one.generate(p, greedy(TOKENS), s) for p, s in calls))
    alone = [one.run(one.generate(p, greedy(TOKENS), s))[0] for p, s in calls]
    for many, lone in zip(together, alone, strict=True):
        assert tokens_of(many) == tokens_of(lone)
        assert many[-1].sparsity.fallbacks == lone[-1].sparsity.fallbacks
    assert tokens_of(together[1]) == plain.tokens(calls[1][0], greedy(TOKENS), refusing)
    assert [deltas[-1].sparsity.fallbacks for deltas in together] == [{"overload": CUT}, {}, {}]


def test_short_contexts_stay_dense(harness):
    one = harness(brownout=Forced(3), dense_below=1405)
    assert answer(one)[1].fallbacks == {"short_context": 133, "overload": CUT - 133}


def test_a_floor_of_coverage_goes_before_a_cut(harness, plain):
    """The cut is taken back before anything is emitted, for good."""
    _, whole = answer(plain)
    _, cut = answer(harness(brownout=Forced(2)))
    assert cut.coverage < whole.coverage
    floor = replace(WIDE, min_coverage=(cut.coverage + whole.coverage) / 2)
    tokens, report = answer(harness(brownout=Forced(2)), floor)
    assert (tokens, report) == answer(plain, floor)
    assert report.fallbacks == {}


def test_a_floor_that_the_whole_budget_misses_too_is_kept_densely(harness, plain):
    floor = dynamic(min_coverage=1.0, coverage=0.5, max_keys=1024)
    tokens, report = answer(harness(brownout=Forced(2)), floor)
    assert report.fallbacks == {"low_coverage": CUT} and report.density == 1
    assert tokens == answer(plain, floor)[0] == answer(plain, dynamic(policy="dense"))[0]


def test_a_floor_that_a_cut_keeps_is_cut_but_never_to_the_pattern(harness):
    one = harness(brownout=Forced(3))
    _, report = answer(one, replace(WIDE, min_coverage=1e-6))
    assert report.fallbacks == {"overload": CUT}
    assert counter(one, "dynamic") == CUT


def test_choices_are_cut_alike_and_the_prompt_counts_once(harness):
    one = harness(brownout=Forced(1))
    alone = one.tokens(PROMPT, greedy(TOKENS), WIDE)
    [deltas] = one.run(one.generate(PROMPT, greedy(TOKENS), WIDE, n=3))
    reports = {d.index: d.sparsity.fallbacks for d in deltas if d.sparsity}
    assert [tokens_of(deltas, index) for index in range(3)] == [alone] * 3
    assert reports == {
        0: {"overload": CUT}, 1: {"overload": TOKENS - 1}, 2: {"overload": TOKENS - 1},
    }  # fmt: skip


class ByPosition(Brownout):
    """A level that changes while answers are made, and depends on a token's position alone."""

    def __init__(self):
        super().__init__(Targets(1.0, 1.0), LEVELS)

    def cut(self, sequence):
        self.level = len(sequence.tokens) // 5 % 4
        return super().cut(sequence)

    def observe(self, now, waited):
        pass


def test_every_token_keeps_its_level_when_it_is_computed_again(harness):
    """Put back for want of pages, sequences go on as they would have."""
    prompts = [prompt_of(605 + 50 * n, n) for n in range(3)]
    roomy, tight = harness(brownout=ByPosition()), harness(brownout=ByPosition(), pages=34)
    alone = [roomy.run(roomy.generate(p, greedy(80), WIDE))[0] for p in prompts]
    together = tight.run(*(tight.generate(p, greedy(80), WIDE) for p in prompts))
    assert tight.engine._scheduler.preemptions > 0
    for lone, many in zip(alone, together, strict=True):
        assert tokens_of(lone) == tokens_of(many)
        assert lone[-1].sparsity.fallbacks == many[-1].sparsity.fallbacks
        assert lone[-1].sparsity.keys_attended == pytest.approx(many[-1].sparsity.keys_attended)
    prompt, lone = prompts[0], alone[0]
    levels = [len(prompt) // 5 % 4] * 128 + [(len(prompt) + n) // 5 % 4 for n in range(1, 80)]
    assert lone[-1].sparsity.fallbacks == {"overload": sum(level > 0 for level in levels)}


def test_the_gauge_shows_the_level_that_waiting_leads_to(harness, monkeypatch):
    """One sequence at a time, and no patience."""
    monkeypatch.setattr("service.engine.brownout.WINDOW", 0.0)
    one = harness(max_seqs=1, brownout=Brownout(Targets(wait=1e-9, gap=1e9), Levels(halvings=1)))
    one.run(*(one.generate(prompt_of(300, n), greedy(20)) for n in range(2)))
    level = one.engine.metrics.registry.get_sample_value(
        "saccade_brownout_level", {"model_name": "tiny"}
    )
    assert level == one.engine._brownout.level == 1
