"""A step in parts gives what it gives whole, and a part that fails leaves none waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.cache import LayerCache, Rows, Segment
from kernels.errors import KernelError
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.policy import Dynamic, Fixed, Pages
from models import wave
from models.attention import Recorder
from models.loader import dummy
from models.step import DenseGroup, DenseRows, SparseGroup, StepInput, TileGroup
from tests.models.tiny import tiny_config

CPU = torch.device("cpu")
CONFIG = tiny_config(head_dim=8, windows=(None, None, 200), dtype="float64")
PAGES = 40


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return dummy(CONFIG, torch.float64, CPU)


@pytest.fixture
def caches(decoder):
    config = decoder.config
    shape = (PAGES, config.kv_heads, config.head_dim, torch.float64, CPU)
    made = [LayerCache.allocate(*shape) for _ in range(config.layers)]
    generator = torch.Generator().manual_seed(1)
    for cache in made:
        cache.kv.normal_(generator=generator)
        cache.code(torch.arange(PAGES))
    return made


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(wave, "LEAST", PAGE)


class Steps:
    """A step that is put together from sequences, each on pages of its own."""

    def __init__(self):
        self.page, self.parts, self.groups = 0, [], {"dense": [], "tiled": [], "sparse": []}
        self.alone = None

    @property
    def first(self):
        return sum(len(positions) for positions, _ in self.parts)

    def table(self, stop):
        pages = -(-stop // PAGE)
        table = list(range(self.page, self.page + pages))
        self.page += pages
        return table

    def tokens(self, table, start, count):
        positions = torch.arange(start, start + count)
        self.parts.append(
            (positions, torch.tensor(table)[positions // PAGE] * PAGE + positions % PAGE)
        )

    def prompt(self, *spans, start=0):
        """Tokens of one sequence, how many are dense (None) or read by a policy."""
        table = self.table(start + sum(count for count, _ in spans))
        for count, policy in spans:
            segment = Segment.of(table, start, count, CPU)
            if policy is None:
                self.groups["dense"].append(DenseGroup(segment, self.first))
            else:
                self.groups["tiled"].append(TileGroup(segment, self.first, policy))
            self.tokens(table, start, count)
            start += count
        return self

    def rows(self, lengths, policy=None):
        """A token of each sequence that decodes, densely (None) or by a policy."""
        tables = [self.table(length) for length in lengths]
        most = max(map(len, tables))
        padded = torch.tensor([table + [0] * (most - len(table)) for table in tables])
        where = Rows(padded, torch.tensor(lengths), torch.zeros(len(lengths), dtype=torch.int64))
        place = torch.arange(self.first, self.first + len(lengths))
        for table, length in zip(tables, lengths, strict=True):
            self.tokens(table, length - 1, 1)
        if policy is None:
            self.alone = DenseRows(where, place)
        else:
            self.groups["sparse"].append(SparseGroup(where, place, policy))
        return self

    def step(self):
        positions, slots = (torch.cat(part) for part in zip(*self.parts, strict=True))
        ids = torch.randint(50, positions.shape, generator=torch.Generator().manual_seed(2))
        groups = {name: tuple(some) for name, some in self.groups.items()}
        filled = slots[slots % PAGE == PAGE - 1] // PAGE
        return StepInput(ids, positions, slots, filled, alone=self.alone, **groups)


FIXED = Fixed(Pattern.parse("sinks:4+window:100"))
STEPS = {
    "dense": lambda: Steps().prompt((700, None)),
    "tiles": lambda: Steps().prompt((700, Pages()), start=200),
    "odd": lambda: Steps().prompt((331, Pages()), start=77),
    "pattern": lambda: Steps().prompt((500, FIXED), start=64),
    "both": lambda: Steps().prompt((192, None), (400, Pages()), start=64),
    "two": lambda: Steps().prompt((300, Pages()), start=130).prompt((411, None)),
    "rows": lambda: (
        Steps().rows([130, 70]).rows([200, 333], Dynamic()).prompt((400, Pages()), start=128)
    ),
    "behind": lambda: Steps().prompt((400, Pages()), start=128).rows([200, 333], Dynamic()),
    "short": lambda: Steps().prompt((60, None)),
}


def tiles_of(step, recorder):
    """Of each group and layer: density and coverage of its tiles."""
    return {
        group.first: torch.stack(
            [
                torch.stack((one.density.double(), one.coverage.double()))
                for one in recorder.tiles
                if one.first == group.first
            ]
        )
        for group in step.tiled
    }


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_in_parts_is_the_step(decoder, caches, name, threads):
    step = STEPS[name]().step()
    copies = [LayerCache(*(part.clone() for part in cache.parts)) for cache in caches]
    whole, parted = Recorder(), Recorder()
    with torch.inference_mode():
        expected = decoder(step, caches, whole)
        found = wave.Wave(decoder, threads)(step, copies, parted)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(copies, caches, strict=True):
        for one, other in zip(ours.parts, theirs.parts, strict=True):
            torch.testing.assert_close(one, other)
    seen, wanted = tiles_of(step, parted), tiles_of(step, whole)
    for first, entries in wanted.items():
        torch.testing.assert_close(seen[first], entries, equal_nan=True)
    for ours, theirs in zip(parted.entries, whole.entries, strict=True):
        assert ours.layer == theirs.layer
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(ours.coverage, theirs.coverage)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("dense", [320, 380]), ("odd", [179, 152]), ("two", [364, 347]), ("short", [])],
)
def test_steps_are_cut_at_the_ends_of_pages(name, parts):
    step = STEPS[name]().step()
    found = wave._cut(step, 2)
    assert [len(part.token_ids) for part in found] == parts
    for part in found[1:]:
        assert part.slots[0] % PAGE == 0
    for part in found:
        for group in part.tiled:
            assert group.first == 0


def test_rows_on_both_sides_of_a_cut_leave_the_step_whole():
    step = STEPS["rows"]().step()
    assert len(wave._cut(step, 2)) == 2
    places = step.alone.tokens.clone()
    places[-1] = len(step.token_ids) - 1
    assert wave._cut(replace(step, alone=replace(step.alone, tokens=places)), 2) == []


@pytest.mark.parametrize("broken", [0, 1])
def test_a_part_that_fails_fails_the_step_and_leaves_none_waiting(
    decoder, caches, monkeypatch, broken
):
    step = STEPS["tiles"]().step()
    first = wave._cut(step, 2)[broken].positions[0]
    whole = type(decoder).forward

    def forward(self, part, *rest):
        if part.positions[0] == first:
            raise KernelError("broken")
        return whole(self, part, *rest)

    monkeypatch.setattr(type(decoder), "forward", forward)
    waves = wave.Wave(decoder, 2)
    with pytest.raises(KernelError, match="broken"):
        waves(step, caches, Recorder())
    monkeypatch.undo()
    monkeypatch.setattr(wave, "LEAST", PAGE)
    assert waves(step, caches, Recorder()).isfinite().all()


def test_a_wave_keeps_torchs_threads_for_others(decoder, caches):
    before = torch.get_num_threads()
    wave.Wave(decoder, 2)(STEPS["dense"]().step(), caches, Recorder())
    assert torch.get_num_threads() == before
