"""Decode steps that are replayed give what the model gives, and what cannot be replayed is run."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.cache import LayerCache
from kernels.page import PAGE
from models import graph
from models.decode_step import Bucket
from models.graph import CapturedStep, CapturedSteps
from service.config import ServiceConfig
from service.engine.buckets import buckets
from service.engine.build import capture
from service.engine.cuts import Levels, cut_of
from service.engine.replay import Replays
from service.engine.runner import Runner
from service.engine.scheduler import Work
from service.engine.sequence import Fallback, Request, Sequence, State
from service.metrics import Metrics
from tests.service.engine.tiny import dynamic, greedy, make_decoder, prompt_of, tiny_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH = 12
"""Pages of a captured step's tables: the steps' sequences have at most as many tokens' worth."""
CACHE = 40
CONFIG = tiny_config(layers=2, windows=(None, None), dtype="float32")
DENSE, FIXED, SAMPLED = dynamic(policy="dense"), dynamic(policy="fixed"), dynamic()
# Reads every key: where a sample is drawn, a sum that rounds otherwise can put a mark elsewhere.
DYNAMIC = dynamic(coverage=1.0, min_keys=4096, max_keys=4096)
CAPTURED = [Bucket(rows, WIDTH, chosen) for rows in (1, 3) for chosen in (False, True)]


pytestmark = pytest.mark.usefixtures("few_programs")


class World:
    """A model with a cache, and sequences whose prompts are computed."""

    def __init__(self, captured=(), config=CONFIG, **settings):
        self.decoder = make_decoder(torch.float32, config=config, device=DEVICE)
        self.metrics = Metrics("tiny")
        self.caches = [
            LayerCache.allocate(CACHE, config.kv_heads, config.head_dim, torch.float32, DEVICE)
            for _ in range(config.layers)
        ]
        self.free = torch.randperm(CACHE, generator=torch.Generator().manual_seed(3)).tolist()
        replays = None
        if captured:
            steps = CapturedSteps(self.decoder, self.caches, captured)
            place = DEVICE, config.heads, config.windows
            replays = Replays(steps, *place, self.metrics)
        shape = config.heads, config.windows
        self.runner = Runner(
            self.decoder, self.caches, *shape, self.metrics, replays=replays, **settings
        )

    def sequence(self, length, sparsity=DYNAMIC, dense_below=0):
        """A sequence with all of its prompt but the last token computed."""
        prompt = tuple(prompt_of(length, length))
        request = Request(str(length), prompt, greedy(9), sparsity, dense_below, None, 0.0)
        one = Sequence(request, 0, list(prompt), State.RUNNING)
        self.grow(one, length - 1)
        if length > 1:
            # Dense whatever the policy, so that where it is judged does not depend on a replay.
            one.hold_until, one.hold_reason = length - 1, Fallback.SHORT_CONTEXT
            self.runner.run([Work(one, 0, length - 1)], audit=False)
            one.hold_until = 0
            one.decided = length - 1
        return one

    def grow(self, sequence, length):
        while len(sequence.pages) * PAGE < length:
            sequence.pages.append(self.free.pop())

    def step(self, *sequences, audit=False):
        """A token of each, taken greedily."""
        work = []
        for one in sequences:
            self.grow(one, len(one.tokens))
            work.append(Work(one, len(one.tokens) - 1, 1))
        outcomes = self.runner.run(work, audit)
        for one, outcome in zip(sequences, outcomes, strict=True):
            assert outcome.work.sequence is one
            if outcome.error is None:
                one.tokens.append(int(self.runner.next_logits(outcome).argmax()))
                one.decided = len(one.tokens) - 1
        return outcomes

    def count(self, name, **labels):
        return self.metrics.registry.get_sample_value(
            f"saccade_cuda_graph_{name}_total", {"model_name": "tiny", **labels}
        )


def same(ours, theirs, world, other):
    for one, expected in zip(ours, theirs, strict=True):
        assert one.error is expected.error is None
        close(*(w.runner.next_logits(o).cpu() for w, o in ((world, one), (other, expected))))
        for name in ("density", "keys", "coverage"):
            mine, its = getattr(one.looked, name), getattr(expected.looked, name)
            assert mine.shape == its.shape and mine.dtype == its.dtype
            np.testing.assert_allclose(mine, its, atol=1e-4, rtol=0)
    for mine, its in zip(world.caches, other.caches, strict=True):
        close(mine.kv, its.kv)
        close(mine.key_mean, its.key_mean)
        close(mine.centre.float(), its.centre.float())
        close(mine.value_mean, its.value_mean)
        close(mine.spread, its.spread)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


def both(captured=CAPTURED, **settings):
    return World(captured, **settings), World(**settings)


KINDS = {
    "dense": ([DENSE, DENSE], 1),
    "dynamic": ([DYNAMIC, DYNAMIC], 1),
    "both kinds": ([DYNAMIC, DENSE, DYNAMIC], 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_a_step(kind):
    policies, replays = KINDS[kind]
    world, other = both()
    # The first completes a page with its first token, and begins one with its second.
    lengths = [4 * PAGE, 300, 5][: len(policies)]
    pairs = [
        (world.sequence(length, policy), other.sequence(length, policy))
        for length, policy in zip(lengths, policies, strict=True)
    ]
    for number in range(2):
        ours = world.step(*(mine for mine, _ in pairs))
        same(ours, other.step(*(its for _, its in pairs)), world, other)
        assert world.count("replays") == (number + 1) * replays
    assert all(mine.tokens == its.tokens for mine, its in pairs)


def test_a_sample_is_reported_as_the_step_reports_it(monkeypatch):
    world, decoded = World(CAPTURED), []
    fetch = CapturedStep.fetch

    def watch(step, found):
        decoded.append(found)
        return fetch(step, found)

    monkeypatch.setattr(CapturedStep, "fetch", watch)
    outcomes = world.step(world.sequence(700, SAMPLED), world.sequence(90, SAMPLED))
    for row, (outcome, length) in enumerate(zip(outcomes, (700, 90), strict=True)):
        keys = decoded[0].keys[:, row].double().mean(-1, keepdim=True).cpu().numpy()
        np.testing.assert_array_equal(outcome.looked.keys, keys)
        np.testing.assert_array_equal(outcome.looked.density, keys / length)
        coverage = decoded[0].coverage[:, row : row + 1].double().cpu().numpy()
        np.testing.assert_array_equal(outcome.looked.coverage, coverage)
        assert torch.equal(outcome.logits, decoded[0].logits[row].cpu())
    sparse, whole = (outcome.looked for outcome in outcomes)
    assert sparse.density.max() < 1 == whole.density.min()
    assert 0 < sparse.coverage.min() < sparse.coverage.max() <= 1


def test_rows_come_and_go_and_pages_pass_from_one_to_another():
    world, other = both()
    a, b, c = ([one.sequence(n, DENSE) for one in (world, other)] for n in (70, 130, 200))
    for pairs in ((a, b, c), (c, a), (b,), (a, b)):
        ours = world.step(*(mine for mine, _ in pairs))
        same(ours, other.step(*(its for _, its in pairs)), world, other)
    for one, gone in ((world, c[0]), (other, c[1])):
        one.free += gone.pages
        gone.pages = []
    d = [one.sequence(190, DENSE) for one in (world, other)]
    for pairs in ((d, b), (a, d)):
        ours = world.step(*(mine for mine, _ in pairs))
        same(ours, other.step(*(its for _, its in pairs)), world, other)
    assert world.count("replays") == 6


def test_layers_of_their_own_kind():
    """Sliding windows, and first layers that attend densely."""
    config = tiny_config(layers=2, windows=(None, 100), dtype="float32")
    sparsity = replace(DYNAMIC, dense_layers=1)
    world, other = both([Bucket(1, WIDTH, True, 1)], config=config)
    ours, theirs = (one.step(one.sequence(300, sparsity)) for one in (world, other))
    same(ours, theirs, world, other)
    assert world.count("replays") == 1
    assert ours[0].looked.keys[0, 0] == 300 and ours[0].looked.keys[1, 0] <= 100
    assert ours[0].looked.density[0, 0] == 1


def test_rows_of_different_budgets_are_one_step():
    """Each within its own limits: what a row finds does not depend on who is beside it."""
    config = tiny_config(layers=1, windows=(None,), dtype="float32")
    world, other = (World([Bucket(2, WIDTH, True)], config) for _ in range(2))
    wide = dynamic(min_keys=1380, max_keys=1380)
    cut, sampled = world.sequence(700, wide), world.sequence(700, SAMPLED)
    cut.cut = cut_of(wide, 0, 1, Levels(1))
    ours = world.step(cut, sampled)
    [alone] = other.step(other.sequence(700, SAMPLED))
    assert (world.count("replays"), other.count("replays")) == (1, 1)
    # Uncut it would read all.
    assert 700 > ours[0].looked.keys.mean() > ours[1].looked.keys.mean()
    close(ours[1].logits, alone.logits)
    np.testing.assert_array_equal(ours[1].looked.keys, alone.looked.keys)


def test_a_row_that_is_cut_to_the_pattern_runs_as_ever():
    world, other = both()
    mine, its = world.sequence(700, SAMPLED), other.sequence(700, SAMPLED)
    mine.cut = cut_of(SAMPLED, 0, 1, Levels(fixed=True))
    its.hold_until, its.hold_reason = 701, Fallback.KERNEL_ERROR
    assert mine.fallback(699) is Fallback.OVERLOAD
    same(world.step(mine), other.step(its), world, other)
    assert world.count("replays") == 0


def test_short_contexts_are_dense_rows():
    world = World(CAPTURED)
    short, long = (world.sequence(n, SAMPLED, dense_below=200) for n in (100, 700))
    outcomes = world.step(short, long)
    assert [one.looked.density.mean() < 1 for one in outcomes] == [False, True]
    assert world.count("replays") == 2


NOT_CAPTURED = {
    "a fixed pattern": ([FIXED], {}),
    "a fixed pattern among others": ([SAMPLED, FIXED], {}),
    "plain top-k": ([dynamic(sampled=False)], {}),
    "dense layers of its own": ([replace(DYNAMIC, dense_layers=1)], {}),
    "too many rows": ([DENSE] * 4, {}),
    "an audit": ([SAMPLED], {"audit": True}),
}


@pytest.mark.parametrize("case", NOT_CAPTURED)
def test_what_is_not_captured_runs_as_ever(case):
    policies, how = NOT_CAPTURED[case]
    world, other = both()
    ours, theirs = (
        one.step(*(one.sequence(100 + n, policy) for n, policy in enumerate(policies)), **how)
        for one in (world, other)
    )
    same(ours, theirs, world, other)
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(ours, theirs, strict=True))
    assert (ours[0].looked.exact is None) == (case != "an audit")
    assert world.count("replays") == 0


def test_a_sequence_that_is_too_long_runs_as_ever():
    world = World(CAPTURED)
    [outcome] = world.step(world.sequence(WIDTH * PAGE, DENSE))
    assert outcome.hidden is None
    [outcome] = world.step(world.sequence(WIDTH * PAGE + 1, DENSE))
    assert outcome.hidden is not None
    assert world.count("replays") == 1


def test_a_prompt_beside_a_decode_token_runs_as_ever():
    results = []
    for one in both():
        decoding, prompt = one.sequence(90), one.sequence(1, DENSE)
        prompt.tokens += prompt_of(150, 4)
        one.grow(prompt, 151)
        work = [Work(decoding, 89, 1), Work(prompt, 0, 150)]
        results.append(one.runner.run(work, audit=False))
        assert one.count("replays") == 0
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(*results, strict=True))


def test_audits_are_due_as_often():
    world = World(CAPTURED, audit_every=3)
    one = world.sequence(200)
    world.runner._sparse_steps = 0
    audited = [world.step(one, audit=None)[0].looked.exact is not None for _ in range(5)]
    assert audited == [True, False, False, True, False]
    assert world.count("replays") == 3


def test_low_coverage_is_rerun_densely_and_writes_over_what_it_wrote():
    world, other = World(CAPTURED), World(CAPTURED)
    demanding = dynamic(min_coverage=1.0)
    # The token completes a page, whose codes are written twice.
    judged, fine = world.sequence(11 * PAGE, demanding), world.sequence(690, SAMPLED)
    ours = world.step(judged, fine)
    assert judged.hold_reason is Fallback.LOW_COVERAGE and judged.hold_until > 11 * PAGE
    theirs = other.step(other.sequence(11 * PAGE, DENSE), other.sequence(690, SAMPLED))
    same(ours, theirs, world, other)
    assert ours[0].looked.density.mean() == 1 > ours[1].looked.density.mean()
    assert (world.count("replays"), other.count("replays")) == (2, 2)
    for mine, its in zip(world.caches, other.caches, strict=True):
        assert all(map(torch.equal, mine.parts, its.parts))


def test_a_step_that_is_replayed_again_writes_the_same():
    world = World(CAPTURED)
    one = world.sequence(2 * PAGE)
    after = []
    for _ in range(2):
        [outcome] = world.runner.run([Work(one, 2 * PAGE - 1, 1)], audit=False)
        after.append(
            [outcome.logits.clone(), *(p.clone() for cache in world.caches for p in cache.parts)]
        )
    assert world.count("replays") == 2
    assert all(map(torch.equal, *after))


def test_scores_that_are_not_finite_take_the_fixed_pattern():
    world, other = both()
    results = []
    for one in (world, other):
        sick, well = one.sequence(600), one.sequence(300)
        for cache in one.caches:  # a page that neither the window nor the sinks are in
            cache.kv[:, sick.pages[2], :, 0] = torch.nan
            cache.centre[:, sick.pages[2]] = torch.nan
        results.append(one.step(sick, well))
        assert sick.hold_reason is Fallback.KERNEL_ERROR
        assert one.runner.degraded
    same(*results, world, other)
    assert results[0][0].looked.keys.max() == 68


def test_a_row_whose_result_is_not_finite_fails_alone():
    world = World(CAPTURED)
    world.decoder.model.embed_tokens.weight[7] = torch.nan
    sick, well = world.sequence(100, DENSE), world.sequence(90, DENSE)
    sick.tokens[-1] = 7
    broken, fine = world.step(sick, well)
    assert "not finite" in broken.error and fine.error is None
    assert world.count("replays") == 1


def test_a_replay_that_fails_is_run_and_not_tried_again(monkeypatch, caplog):
    world, other = both()
    ours, theirs = (one.sequence(200) for one in (world, other))
    replay = CapturedStep.replay

    def fail_behind(step, filled):
        replay(step, filled)
        raise RuntimeError("launch failed")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(CapturedStep, "replay", fail_behind)
        same(world.step(ours), other.step(theirs), world, other)
    assert "a captured decode step failed" in caplog.text and "launch failed" in caplog.text
    assert not world.runner.degraded
    # The next larger step serves one row too.
    same(world.step(ours), other.step(theirs), world, other)
    assert world.count("replays") == 1
    assert world.count("failures", phase="replay") == 1


class Unwilling(CapturedStep):
    """Steps of which some cannot be captured."""

    def __init__(self, decoder, caches, bucket, *rest):
        if bucket.dynamic:
            raise RuntimeError("no kernel image")
        if bucket.batch > 1:
            try:
                raise torch.OutOfMemoryError("out of memory")
            finally:
                raise RuntimeError("operation failed during capture")
        super().__init__(decoder, caches, bucket, *rest)


def test_steps_that_cannot_be_captured_are_counted_and_the_rest_serves(monkeypatch, caplog):
    monkeypatch.setattr(graph, "CapturedStep", Unwilling)
    world = World()
    config = ServiceConfig(max_num_seqs=2, sparsity={"dense_below": 0, "max_keys": 160})
    with caplog.at_level(logging.WARNING):
        replays = capture(config, world.decoder, world.caches, WIDTH * PAGE, world.metrics)
    assert "no kernel image" in caplog.text and "out of memory" in caplog.text
    assert world.count("failures", phase="capture") == 3  # of two sizes, each twice
    one = world.sequence(50, DENSE)
    assert replays.run([Work(one, 49, 1)]) is not None
    assert replays.run([Work(one, 49, 1), Work(world.sequence(60, DENSE), 59, 1)]) is None
    assert replays.run([Work(world.sequence(70), 69, 1)]) is None


def test_the_grid_of_steps_holds_whatever_a_service_may_run():
    limits = {"max_seqs": 16, "max_model_len": 131_072, "cache_pages": 5000, "dense_below": 16384}
    grid = buckets(dynamic=True, dense_layers=2, **limits)
    assert len(grid) == len(set(grid)) == 50
    assert max(grid, key=lambda b: (b.batch, b.pages)) == Bucket(16, 2048)
    assert Bucket(4, 512, True, 2) in grid and Bucket(4, 256, True, 2) not in grid
    assert not any(b.dynamic for b in buckets(dynamic=False, dense_layers=2, **limits))


def test_steps_that_no_cache_can_hold_are_not_captured():
    limits = {"max_seqs": 12, "max_model_len": 1000 * PAGE, "dense_below": 0}
    limits |= {"dynamic": False, "dense_layers": 0}
    small = {(b.batch, b.pages) for b in buckets(cache_pages=1000, **limits)}
    assert (12, 512) in small and (1, 1000) in small and (4, 1000) in small
    # Nine rows, one of 513 pages: the cache would have to have 521.
    tight = {(b.batch, b.pages) for b in buckets(cache_pages=520, **limits)}
    assert (12, 1000) not in tight and (8, 1000) in tight and (12, 512) in tight
    tiny = {"max_seqs": 1, "max_model_len": 70, "cache_pages": 9, "dense_below": 0}
    assert buckets(dynamic=False, dense_layers=0, **tiny) == [Bucket(1, 2)]


def engine_pair(harness, policies, lengths, **settings):
    """Answers of two engines to the same requests, the first with captured steps."""
    answers = []
    for captured in (CAPTURED, ()):
        one = harness(
            dtype=torch.float32, config=CONFIG, captured=captured, device=DEVICE.type, **settings
        )
        answers.append(
            one.run(
                *(
                    one.generate(prompt_of(n, n), greedy(5, logprobs=2), policy, n=choices)
                    for n, policy, choices in zip(lengths, policies, (1, 2, 1), strict=True)
                )
            )
        )
        replays = one.engine.metrics.registry.get_sample_value(
            "saccade_cuda_graph_replays_total", {"model_name": "tiny"}
        )
        assert (replays > 0) == bool(captured)
        assert one.engine._scheduler.pool.usage == 0
    return answers


def test_answers_are_the_same_with_captured_steps(harness):
    ours, theirs = engine_pair(harness, [DYNAMIC, DENSE, FIXED], (200, 127, 60))
    for mine, its in zip(ours, theirs, strict=True):
        for one, expected in zip(mine, its, strict=True):
            assert (one.index, one.text, one.token_ids) == (
                expected.index, expected.text, expected.token_ids,
            )  # fmt: skip
            for a, b in zip(one.logprobs, expected.logprobs, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
        assert mine[-1].sparsity.fallbacks == its[-1].sparsity.fallbacks
        assert mine[-1].sparsity.density == pytest.approx(its[-1].sparsity.density, abs=1e-6)
        assert mine[-1].sparsity.coverage == pytest.approx(its[-1].sparsity.coverage, abs=1e-4)


def test_captured_steps_go_on_from_the_pages_of_the_prefix_cache(harness, monkeypatch):
    monkeypatch.setattr("service.engine.sequence.TAIL", 2)
    settings = {"dtype": torch.float32, "config": CONFIG, "device": DEVICE.type}
    one, off = harness(captured=CAPTURED[:1], **settings), harness(prefix_cache=False, **settings)
    prompts = [prompt_of(200, 1), [*prompt_of(200, 1)[:130], *prompt_of(9, 2)], prompt_of(200, 1)]
    cached = []
    for prompt in prompts:
        asked = prompt, greedy(3, logprobs=2), DENSE
        [mine], [its] = one.run(one.generate(*asked)), off.run(off.generate(*asked))
        assert [d.token_ids for d in mine] == [d.token_ids for d in its]
        ours, theirs = ([e.logprob for d in each for e in d.logprobs] for each in (mine, its))
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert mine[-1].sparsity.density == pytest.approx(its[-1].sparsity.density, abs=1e-6)
        cached.append(mine[0].cached_tokens)
    assert cached == [0, 128, 192]
    replays = "saccade_cuda_graph_replays_total"
    assert one.engine.metrics.registry.get_sample_value(replays, {"model_name": "tiny"}) == 6
