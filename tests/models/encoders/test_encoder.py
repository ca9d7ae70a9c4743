"""Every head against transformers: padding, global tokens, odd lengths, both random regimes."""

from __future__ import annotations

import pytest
import torch

from models.encoders.config import ARCHITECTURES
from models.encoders.defaults import default_global_tokens, default_types, text_of
from models.encoders.encoder import Encoder
from models.encoders.loader import load
from models.encoders.texts import Text
from models.errors import CheckpointError, ModelError, UnsupportedModelError

CLOSE = 2e-5
LONGFORMERS = [name for name in ARCHITECTURES if name.startswith("Longformer")]
BIGBIRDS = [name for name in ARCHITECTURES if name.startswith("BigBird")]


def tokens(count, seed=0, question=9):
    """Token ids, a question and a context with three separators, as RoBERTa joins them."""
    ids = torch.randint(3, 120, (count,), generator=torch.Generator().manual_seed(seed))
    ids[0], ids[-1] = 0, 2
    if count > question + 2:
        ids[question] = ids[question + 1] = 2
    return ids


def batch(lengths, width):
    """Texts filled up on the right: ids and mask."""
    ids, mask = torch.ones(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width)
    for row, length in enumerate(lengths):
        ids[row, :length], mask[row, :length] = tokens(length, row), 1
    return ids, mask.long()


@torch.no_grad()
def expected(oracle, ids, **arguments):
    """What the oracle's head says, [texts, tokens, ...] or [texts, labels]."""
    found = oracle(ids, **arguments)
    if "start_logits" in found:
        return torch.stack((found.start_logits, found.end_logits), dim=-1)
    return found.logits if "logits" in found else found.last_hidden_state


def with_defaults(config, ids, mask, **own):
    """A padded batch as the head takes it where the caller says nothing."""
    rows = ids.tolist()
    types = [default_types(config, row) for row in rows]
    if types[0] is not None:
        own.setdefault("types", torch.tensor(types))
    if config.family == "longformer":
        chosen = torch.zeros_like(ids)
        for row, text in enumerate(rows):
            chosen[row, list(default_global_tokens(config, text))] = 1
        own.setdefault("global_mask", chosen)
    return Text.of_padded(ids, mask, **own)


def compare(found, oracle, mask):
    for row, one in enumerate(found):
        if oracle.dim() == 2:
            torch.testing.assert_close(one, oracle[row], rtol=0, atol=CLOSE)
        else:
            there = mask[row].bool()
            one, other = one[there[: len(one)]], oracle[row][there]
            # BigBird takes 1e6 off the scores of a question's tokens: they compare as they are.
            torch.testing.assert_close(one, other, rtol=1e-7, atol=CLOSE)


@pytest.mark.parametrize("architecture", LONGFORMERS)
def test_longformer(architecture, make):
    oracle, folder = make(architecture)
    encoder = load(folder)
    for lengths, width in (((1,), 1), ((70,), 70), ((333, 200, 13), 333), ((64, 130), 192)):
        if "Question" in architecture and min(lengths) < 13:
            continue
        ids, mask = batch(lengths, width)
        found = encoder(with_defaults(encoder.config, ids, mask))
        compare(found, expected(oracle, ids, attention_mask=mask), mask)


@pytest.mark.parametrize("chosen", [(0,), (5, 64, 65, 150, 249), tuple(range(3, 40))])
def test_longformer_with_any_global_tokens(chosen, make):
    oracle, folder = make("LongformerForMaskedLM")
    encoder = load(folder)
    ids, mask = batch((250, 170), 256)
    wanted = torch.zeros_like(ids)
    wanted[:, list(chosen)] = 1
    found = encoder(Text.of_padded(ids, mask, global_mask=wanted))
    oracle = expected(oracle, ids, attention_mask=mask, global_attention_mask=wanted)
    compare(found, oracle, mask)


@pytest.mark.parametrize("architecture", ["LongformerModel", "BigBirdModel"])
def test_padding_anywhere(architecture, make):
    oracle, folder = make(architecture)
    encoder = load(folder, random_attention="transformers_eval")
    ids, _ = batch((320, 320), 320)
    mask = torch.ones_like(ids)
    mask[0, :70] = mask[0, 100:103] = mask[1, 200:290] = mask[1, 315:] = 0
    ids[mask == 0] = 1
    arguments, own = {}, {}
    if architecture == "LongformerModel":
        wanted = torch.zeros_like(ids)
        wanted[:, [71, 120]] = 1
        arguments, own = {"global_attention_mask": wanted}, {"global_mask": wanted}
    found = encoder(Text.of_padded(ids, mask, **own))
    compare(found, expected(oracle, ids, attention_mask=mask, **arguments), mask)


@pytest.mark.parametrize("architecture", BIGBIRDS)
@pytest.mark.parametrize("regime", ["published", "transformers_eval"])
def test_bigbird(architecture, regime, make):
    oracle, folder = make(architecture)
    oracle.train(regime == "published")
    encoder = load(folder, random_attention=regime)
    # Up to 144 tokens all see all; a batch decides by its width, and forgets it in the oracle.
    for lengths, width in (((145,), 145), ((400, 150, 30), 400), ((1024,), 1024), ((333,), 352)):
        ids, mask = batch(lengths, width)
        found = encoder(with_defaults(encoder.config, ids, mask))
        compare(found, expected(oracle, ids, attention_mask=mask), mask)
    for lengths, width in (((1,), 1), ((144, 60), 144)):
        if "Question" in architecture and min(lengths) < 13:
            continue
        ids, mask = batch(lengths, width)
        found = encoder(with_defaults(encoder.config, ids, mask))
        compare(found, expected(oracle, ids, attention_mask=mask), mask)


@pytest.mark.parametrize("size", [64, 24, 96])
@pytest.mark.parametrize("regime", ["published", "transformers_eval"])
def test_bigbird_blocks_of_any_size(size, regime, make):
    oracle, folder = make("BigBirdModel", block_size=size, num_random_blocks=1)
    oracle.train(regime == "published")
    encoder = load(folder, random_attention=regime)
    ids, mask = batch((7 * size + 30, 7 * size + 1), 7 * size + 33)
    found = encoder(Text.of_padded(ids, mask))
    compare(found, expected(oracle, ids, attention_mask=mask), mask)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_type": "original_full"},
        {"use_bias": False, "rescale_embeddings": True, "hidden_act": "relu"},
    ],
)
def test_what_config_json_changes(changes, make):
    oracle, folder = make("BigBirdModel", **changes)
    encoder = load(folder, random_attention="transformers_eval")
    ids, mask = batch((300, 200), 300)
    found = encoder(Text.of_padded(ids, mask))
    compare(found, expected(oracle, ids, attention_mask=mask), mask)


def test_no_random_blocks(make):
    # Transformers cannot run it; the regimes differ in nothing else.
    _, folder = make("BigBirdModel", num_random_blocks=0)
    text = Text.of(tokens(300).tolist())
    (one,), (other,) = (
        load(folder, random_attention=regime)([text])
        for regime in ("published", "transformers_eval")
    )
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["LongformerForMaskedLM", "BigBirdForMaskedLM"])
def test_an_output_layer_of_its_own(architecture, make):
    oracle, folder = make(architecture, tie_word_embeddings=False)
    encoder = load(folder, random_attention="transformers_eval")
    ids, mask = batch((200,), 200)
    compare(encoder(Text.of_padded(ids)), expected(oracle, ids), mask)


def test_the_two_regimes_differ(make):
    _, folder = make("BigBirdModel")
    text = Text.of(tokens(400).tolist())
    (one,), (other,) = (
        load(folder, random_attention=regime)([text])
        for regime in ("published", "transformers_eval")
    )
    assert (one - other).abs().max() > 100 * CLOSE


@pytest.mark.parametrize("architecture", ["LongformerForSequenceClassification", "BigBirdModel"])
def test_texts_do_not_see_each_other(architecture, make):
    _, folder = make(architecture)
    encoder = load(folder, dtype="float64")
    texts = [text_of(encoder.config, tokens(length).tolist()) for length in (5, 300, 64, 145)]
    for one, alone in zip(encoder(texts), (encoder([text])[0] for text in texts), strict=True):
        torch.testing.assert_close(one, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ["LongformerModel", "BigBirdModel"])
def test_low_precision_stays_close(architecture, make):
    _, folder = make(architecture, initializer_range=0.05)
    exact, low = load(folder, dtype="float64"), load(folder, dtype="bfloat16")
    ids = tokens(300).tolist()
    own = {"global_tokens": (0,)} if architecture == "LongformerModel" else {}
    text = text_of(exact.config, ids, **own)
    (one,), (other,) = exact([text]), low([text])
    assert other.dtype == torch.float32
    assert (one - other).abs().max() < 0.15


def test_bad_texts(make):
    _, folder = make("LongformerForQuestionAnswering")
    config = load(folder).config
    with pytest.raises(ModelError, match="at least one token"):
        text_of(config, [], global_tokens=())
    with pytest.raises(ModelError, match="has 1499 tokens"):
        text_of(config, [5] * 1499)
    with pytest.raises(ModelError, match="0 to 119"):
        text_of(config, [120])
    with pytest.raises(ModelError, match="before the first separator"):
        text_of(config, [5] * 10)
    with pytest.raises(ModelError, match="0 to 9"):
        text_of(config, [5] * 10, global_tokens=(10,))
    with pytest.raises(ModelError, match="0 to 1"):
        text_of(config, [5], types=[2], global_tokens=())
    with pytest.raises(ModelError, match="nothing but padding"):
        Text.of_padded(torch.ones(1, 4).long(), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"architectures": ["BertModel"]}, UnsupportedModelError, "BertModel is no encoder"),
        ({"attention_window": 33}, CheckpointError, "an even number"),
        ({"attention_window": [32]}, CheckpointError, "or 2 of them"),
        ({"hidden_act": "tanh"}, UnsupportedModelError, "gelu_new"),
        ({"attention_dilation": [1, 2]}, UnsupportedModelError, "attention_dilation"),
        ({"is_decoder": True}, UnsupportedModelError, "is_decoder"),
        ({"hidden_size": 66}, CheckpointError, "a multiple of num_attention_heads"),
        ({"intermediate_size": 100}, CheckpointError, "has the shape"),
        ({"num_hidden_layers": 1, "attention_window": 32}, CheckpointError, "has no use"),
        ({"num_hidden_layers": 3, "attention_window": 32}, CheckpointError, "lacks the tensor"),
    ],
)
def test_checkpoints_that_do_not_fit(changes, error, match, make):
    import json

    _, folder = make("LongformerForMaskedLM")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(error, match=match):
        load(folder)


def test_too_few_blocks_to_draw_among(make):
    _, folder = make(
        "BigBirdModel", block_size=256, num_random_blocks=2, max_position_embeddings=4096
    )
    encoder = load(folder)
    with pytest.raises(UnsupportedModelError, match="no 2 random blocks of 256"):
        encoder([Text.of(tokens(4096).tolist())])


def test_random_weights_of_a_large_shape(make):
    _, folder = make("BigBirdForSequenceClassification")
    (folder / "model.safetensors").unlink()
    encoder = load(folder, load_format="dummy")
    assert isinstance(encoder, Encoder)
    assert encoder([Text.of(tokens(200).tolist())])[0].isfinite().all()
