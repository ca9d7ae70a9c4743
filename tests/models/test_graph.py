"""The step that a CUDA graph holds computes what the decoder does, padded or not."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from kernels.cache import LayerCache, Rows
from kernels.page import PAGE
from kernels.policy import Dynamic
from models.attention import Recorder
from models.decode_step import Bucket, DecodeStep
from models.decoder import Decoder
from models.errors import ModelError
from models.graph import CapturedSteps
from models.rope_parameters import RopeParameters
from models.step import DenseRows, StepInput
from tests.models.tiny import tiny_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Triton's interpreter does not round to bfloat16 as a GPU does.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
PAGES = 4
LENGTHS = [3 * PAGE - 1, 1, PAGE, 2 * PAGE + 17]
"""Keys in the cache: the first step completes a page, the second one does too, one begins one."""

BASE = tiny_config(
    hidden_size=48,
    intermediate_size=40,
    layers=2,
    norm_eps=1e-5,
    rope=RopeParameters(original_max_position=512),
    max_position=512,
    tied=False,
)
CASES = {
    "plain": {},
    "tied, one head a group": {"tied": True, "heads": 2},
    "odd sizes": {"heads": 7, "kv_heads": 1, "head_dim": 24, "hidden_size": 50},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "norms of heads": {"qk_norm": True, "qkv_bias": True},
    "windows": {"windows": (70, None), "heads": 6},
    "yarn": {"rope": RopeParameters(original_max_position=32, kind="yarn", attention_factor=1.2)},
}


def make_decoder(dtype, **changes):
    decoder = Decoder(dataclasses.replace(BASE, **changes), dtype, DEVICE)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(1 + noise / 4 if name.endswith("norm.weight") else noise / 4)
    return decoder


class Sequences:
    """Sequences of random keys in scattered pages, and the inputs of their next steps."""

    def __init__(self, decoder):
        config, weight = decoder.config, decoder.model.norm.weight
        self.order = list(range(1, 1 + len(LENGTHS) * PAGES))  # page 0 is nobody's
        random.Random(0).shuffle(self.order)
        tables = torch.tensor(self.order, device=DEVICE).view(len(LENGTHS), PAGES)
        self.lengths = torch.tensor(LENGTHS, device=DEVICE)
        self.tables = tables
        generator = torch.Generator().manual_seed(1)
        self.caches = []
        for _ in range(config.layers):
            cache = LayerCache.allocate(
                1 + len(self.order), config.kv_heads, config.head_dim, weight.dtype, DEVICE
            )
            cache.kv.copy_(torch.randn(cache.kv.shape, generator=generator))
            cache.code(tables.flatten())
            self.caches.append(cache)
        self.decoder = decoder

    def next(self, step):
        """Tokens, positions, slots and rows of the step behind `step` others."""
        position = self.lengths + step
        token = (position * 7 + 3) % self.decoder.config.vocab_size
        page = self.tables.gather(1, position[:, None] // PAGE)[:, 0]
        rows = Rows(self.tables, position + 1, torch.zeros_like(position))
        return token, position, page * PAGE + position % PAGE, rows

    def eager(self, step):
        token, position, slots, rows = self.next(step)
        place = torch.arange(len(LENGTHS), device=DEVICE)
        with torch.inference_mode():
            return self.decoder(
                StepInput(
                    token_ids=token,
                    positions=position,
                    slots=slots,
                    filled=slots[slots % PAGE == PAGE - 1] // PAGE,
                    dense=(),
                    alone=DenseRows(rows, place),
                    sparse=(),
                ),
                self.caches,
                Recorder(),
            )


def close(actual, expected, dtype):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_is_a_step_of_the_decoder(case):
    check(make_decoder(torch.float32, **CASES[case]), Bucket(len(LENGTHS) + 1, PAGES + 1), steps=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_after_step_in_every_dtype(dtype):
    check(make_decoder(dtype), Bucket(len(LENGTHS), PAGES), steps=2)


def check(decoder, bucket, steps):
    dtype = decoder.model.norm.weight.dtype
    theirs, ours = Sequences(decoder), Sequences(decoder)
    captured = CapturedSteps(decoder, ours.caches, [bucket]).find(
        len(LENGTHS), PAGES, dynamic=False
    )
    step = DecodeStep.padding(bucket)
    for number in range(steps):
        expected = theirs.eager(number)
        step.fill(*ours.next(number))
        decoded = captured.replay(step)
        assert decoded.keys is None
        hidden = decoded.hidden[: len(LENGTHS)]
        close(hidden, expected, dtype)
        close(decoded.logits[: len(LENGTHS)], decoder.logits(expected), dtype)
        assert decoded.logits.dtype == torch.float32
        for one, other in zip(ours.caches, theirs.caches, strict=True):
            close(one.kv, other.kv, dtype)
            close(one.key_mean, other.key_mean, dtype)
            assert (one.centre.float() != other.centre.float()).float().mean() < 0.01
            close(one.value_mean, other.value_mean, dtype)
            close(one.spread, other.spread, dtype)
            assert (one.codes != other.codes).float().mean() < 0.01


def test_padding_writes_nothing_wherever_its_table_points():
    decoder = make_decoder(torch.float32)
    sequences, bucket = Sequences(decoder), Bucket(2, PAGES)
    steps = CapturedSteps(decoder, sequences.caches, [bucket])
    before = [part.clone() for cache in sequences.caches for part in cache.parts]
    decoded = steps.find(1, 1, dynamic=False).replay(DecodeStep.padding(bucket))
    assert decoded.hidden.isfinite().all()
    after = [part for cache in sequences.caches for part in cache.parts]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_a_dynamic_step_that_reads_every_key_is_a_dense_one(few_programs, dense_layers):
    policy = Dynamic(coverage=1.0, min_keys=4096, max_keys=4096)
    decoder = make_decoder(torch.float32)
    expected = Sequences(decoder).eager(0)
    sequences, bucket = Sequences(decoder), Bucket(len(LENGTHS) + 1, PAGES, True, dense_layers)
    steps = CapturedSteps(decoder, sequences.caches, [bucket])
    step = DecodeStep.padding(bucket)
    step.fill(*sequences.next(0), torch.tensor([policy.limits]))
    found = steps.find(len(LENGTHS), PAGES, dynamic=True, dense_layers=dense_layers)
    decoded = found.replay(step)
    rows = slice(len(LENGTHS))
    close(decoded.hidden[rows], expected, torch.float32)
    visible = (sequences.lengths + 1).float()
    assert torch.equal(
        decoded.keys[:, rows], visible[None, :, None].expand(BASE.layers, -1, BASE.kv_heads)
    )
    torch.testing.assert_close(
        decoded.coverage[:, rows],
        torch.ones(BASE.layers, len(LENGTHS), BASE.heads, device=DEVICE),
        atol=1e-3,
        rtol=0,
    )


def test_the_smallest_step_that_fits_is_found():
    decoder = make_decoder(torch.float32)
    buckets = [Bucket(4, 8), Bucket(1, 64), Bucket(1, 8), Bucket(8, 8), Bucket(1, 8, True)]
    steps = CapturedSteps(decoder, Sequences(decoder).caches, buckets)

    def found(rows, pages, dense_layers=0, *, dynamic=False):
        step = steps.find(rows, pages, dynamic=dynamic, dense_layers=dense_layers)
        return None if step is None else step.bucket

    assert found(1, 3) == Bucket(1, 8)
    assert found(1, 9) == Bucket(1, 64)
    assert found(2, 8) == Bucket(4, 8)
    assert found(2, 9) is None
    assert found(1, 8, dynamic=True) == Bucket(1, 8, True)
    assert found(1, 8, 1, dynamic=True) is None
    assert found(2, 8, dynamic=True) is None


def test_a_step_is_filled_anew():
    bucket = Bucket(3, 2)
    step = DecodeStep.padding(bucket)
    blank = step.packed.clone()
    full = torch.full((3,), 9)
    nines = torch.full((3, 2), 9).view(torch.float32)  # of the same bits
    step.fill(full, full, full, Rows(torch.full((3, 2), 9), full, full), nines)
    assert step.packed.eq(9).all()
    step.fill(full[:1], full[:1], full[:1], Rows(full[:1, None], full[:1], full[:1]))
    assert step.packed.view(-1).eq(9).sum() == 6
    assert torch.equal(step.slots, torch.tensor([9, -1, -1]))
    step.fill(full[:0], full[:0], full[:0], Rows(torch.empty(0, 2).long(), full[:0], full[:0]))
    assert torch.equal(step.packed, blank)


def test_a_model_in_float64_is_refused():
    decoder = make_decoder(torch.float64)
    with pytest.raises(ModelError, match="not in float64"):
        CapturedSteps(decoder, Sequences(decoder).caches, [Bucket(1, 1)])


def test_a_step_has_room_for_limits_that_are_its_rows_own():
    step = DecodeStep.padding(Bucket(3, 2))
    limits = torch.tensor([Dynamic().limits, Dynamic(max_keys=2**31 - 1).limits])
    place = torch.arange(2)
    step.fill(place, place, place, Rows(torch.zeros(2, 2).long(), place, place), limits)
    assert torch.equal(step.limits[:2], limits) and step.limits[2].eq(0).all()
    assert step.limits[1].tolist() == pytest.approx([0.98, 2.0, 384.0, 2.0**24])
    other = DecodeStep.padding(Bucket(3, 2))
    other.packed.copy_(step.packed)
    assert torch.equal(other.limits, step.limits) and torch.equal(other.columns, step.columns)
