"""The Sparse Transformer against its paper's equations, written down with whole masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kernels.attention import Impl
from kernels.page import PAGE
from kernels.patterns.pattern import Pattern
from kernels.policy import Dynamic, Fixed, Pages
from models.attention import Recorder
from models.config import ModelConfig
from models.decoder import Decoder
from models.errors import CheckpointError, UnsupportedModelError
from models.families import sparse_transformer
from models.fields import Fields
from models.loader import load
from models.step import StepInput, TileGroup
from tests.models.test_decoder import Runner, difference, one_shot, prompts

LENGTH = 300
BASE = {
    "model_type": "saccade_sparse_transformer",
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 320,
    "patterns": [["window:16", "strided:16"]],
    "dtype": "float64",
}
CASES = {
    "heads": {},
    "interleaved": {"patterns": [["window:16"], ["strided:16"]]},
    "merged": {"patterns": [["window:16+strided:16"]]},
    "fixed": {"patterns": [["fixed:16,3"]], "position_shape": [20, 16]},
    "mixed": {"patterns": [["full"], ["window:70", "fixed:100,1", "strided:7"]]},
    "image": {"patterns": [["axial:10,32"]], "position_shape": [10, 16, 2]},
    "tied": {"tie_word_embeddings": True, "intermediate_size": 96},
}


def write(folder, **changes):
    """A checkpoint of random weights."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(BASE | changes))
    decoder = Decoder(ModelConfig.from_folder(folder), torch.float64, "cpu")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        tensors[name] = 1 + noise / 5 if name.endswith("norm.weight") else noise / 4
    save_file(tensors, folder / "model.safetensors")
    return folder


def openai_mask(n, mode, size, summary=0):
    """openai/sparse_attention's definitions, query by query and key by key."""
    mask = np.zeros((n, n), dtype=bool)
    for i in range(n):
        for j in range(i + 1):
            if mode == "all":
                mask[i, j] = True
            elif mode == "local":
                mask[i, j] = j > i - size
            elif mode == "strided":
                mask[i, j] = (i - j) % size == 0
            else:
                mask[i, j] = j // size == i // size or j % size >= size - summary
    return torch.from_numpy(mask)


def mask_of(text, n):
    """The same of what a configuration writes."""
    total = torch.zeros(n, n, dtype=torch.bool)
    for part in text.split("+"):
        name, _, numbers = part.partition(":")
        sizes = [int(x) for x in numbers.split(",")] if numbers else [0]
        if name == "axial":  # the same row, or the same column, of a grid
            place = torch.arange(n)
            rows, columns = place // sizes[1], place % sizes[1]
            same = (rows[:, None] == rows) | (columns[:, None] == columns)
            total |= same & (place <= place[:, None])
        else:
            mode = {"window": "local", "full": "all"}.get(name, name)
            total |= openai_mask(n, mode, *sizes)
    return total


def oracle(decoder, config, tokens, within=None):
    """Logits by the paper's equations (section 5): whole masks, one token list, float64."""
    w = {name: x.double() for name, x in decoder.named_parameters()}
    n, dim, heads = len(tokens), config["hidden_size"], config["num_attention_heads"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def project(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["model.embed_tokens.weight"][tokens].clone()
    shape = config.get("position_shape", [config["max_position_embeddings"]])
    for axis, coordinate in enumerate(np.unravel_index(np.arange(n), shape)):
        x += w[f"model.positions.axes.{axis}.weight"][coordinate]
    for layer in range(config["num_hidden_layers"]):
        row = config["patterns"][layer % len(config["patterns"])]
        name = f"model.layers.{layer}"
        a = norm(x, f"{name}.input_layernorm")
        q, k, v = (
            project(a, f"{name}.self_attn.{part}_proj").view(n, heads, -1).transpose(0, 1)
            for part in "qkv"
        )
        masks = torch.stack([mask_of(row[head % len(row)], n) for head in range(heads)])
        masks = masks if within is None else masks & within
        scores = (q @ k.mT) / (dim // heads) ** 0.5
        weights = scores.masked_fill(~masks, -torch.inf).softmax(-1).nan_to_num(0.0)
        x = x + project((weights @ v).transpose(0, 1).reshape(n, dim), f"{name}.self_attn.o_proj")
        b = project(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp.up_proj")
        x = x + project(b * torch.sigmoid(1.702 * b), f"{name}.mlp.down_proj")
    head = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return norm(x, "model.norm") @ w[f"{head}.weight"].T


@pytest.mark.parametrize("size", [1, 7, 16, 64, 100])
def test_patterns_are_openais(size):
    for n in (1, 63, 130):
        for text, mode in (("window", "local"), ("strided", "strided")):
            pattern = Pattern.parse(f"{text}:{size}")
            assert torch.equal(pattern.mask(n, n), openai_mask(n, mode, size))
        for summary in {1, (size + 1) // 2, size}:
            pattern = Pattern.parse(f"fixed:{size},{summary}")
            assert torch.equal(pattern.mask(n, n), openai_mask(n, "fixed", size, summary))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_papers_however_the_tokens_are_cut(case, tmp_path):
    write(tmp_path, **CASES[case])
    decoder, _ = load(tmp_path, dtype="float64")
    (tokens,) = prompts(LENGTH)
    expected = oracle(decoder, BASE | CASES[case], tokens)
    whole = one_shot(decoder, tokens)
    assert difference(whole, expected) < 1e-9

    runner, pieces, start = Runner(decoder, 1, LENGTH), [], 0
    for size in (7, 1, 57, 13, 64, 100, 20):
        pieces += runner.step([(0, tokens[start : start + size])])
        start += size
    for token in tokens[start:]:  # decode, through the paged cache
        pieces += runner.step([(0, [token])])
    assert difference(torch.cat(pieces), whole) < 1e-9

    # As decode rows from the first token on; the policy finds all that the pattern shows.
    policy = Dynamic(coverage=0.5, min_keys=0, max_keys=1)
    runner = Runner(decoder, 1, LENGTH)
    pieces = [runner.step([(0, [token])], policy)[0] for token in tokens[:80]]
    assert difference(torch.cat(pieces), whole[:80]) < 1e-9


@pytest.mark.parametrize("impl", [Impl.REFERENCE, Impl.NUMBA, Impl.TRITON])
def test_every_backend(impl, tmp_path):
    write(tmp_path)
    exact, config = load(tmp_path, dtype="float64")
    decoder = Decoder(config, torch.float32, "cpu", impl)
    decoder.load_state_dict(exact.state_dict())
    (tokens,) = prompts(100)
    expected = one_shot(exact, tokens)
    runner = Runner(decoder, 1, 100)
    pieces = [*runner.step([(0, tokens[:97])])]
    pieces += [runner.step([(0, [token])], Dynamic())[0] for token in tokens[97:]]
    assert difference(torch.cat(pieces).double(), expected) < 5e-4


@pytest.mark.parametrize("case", ["heads", "fixed"])
def test_a_requests_pattern_is_intersected(case, tmp_path):
    write(tmp_path, **CASES[case])
    decoder, _ = load(tmp_path, dtype="float64")
    (tokens,) = prompts(130)
    policy = Fixed(Pattern.parse("sinks:2+window:20"))
    place = torch.arange(130)
    within = (place < 2) | (place > place[:, None] - 20)
    expected = oracle(decoder, BASE | CASES[case], tokens, within)
    runner = Runner(decoder, 1, 130)
    rows = [runner.step([(0, [token])], policy)[0] for token in tokens]
    assert difference(torch.cat(rows), expected) < 1e-9
    recorder, output = tiled(decoder, tokens, policy)
    assert difference(output, expected) < 1e-9
    masks = [mask_of(text, 130) for text in (BASE | CASES[case])["patterns"][0]]
    read, seen = sum((m & within).long() for m in masks).sum(1), sum(m.long() for m in masks).sum(1)
    density = [
        float(r.sum() / s.sum()) for r, s in zip(read.split(64), seen.split(64), strict=True)
    ]
    assert all(entry.density.tolist() == pytest.approx(density) for entry in recorder.tiles)
    assert all(entry.coverage.isnan().all() for entry in recorder.tiles)
    # By content nothing is left out.
    recorder, output = tiled(decoder, tokens, Pages())
    assert difference(output, one_shot(decoder, tokens)) < 1e-9
    assert all((entry.density == 1).all() for entry in recorder.tiles)


def tiled(decoder, tokens, policy):
    """A prompt as tiles under a policy: what was noted, and the logits."""
    runner, found = Runner(decoder, 1, len(tokens)), {}

    class Tiled:
        config, model, logits = decoder.config, decoder.model, decoder.logits

        def __call__(self, step, caches, recorder):
            [group] = step.dense
            tiles = (TileGroup(group.segment, 0, policy),)
            found["recorder"] = Recorder()
            parts = (step.token_ids, step.positions, step.slots, step.filled)
            return decoder(
                StepInput(*parts, dense=(), alone=None, sparse=(), tiled=tiles),
                caches,
                found["recorder"],
            )

    runner.decoder = Tiled()
    [logits] = runner.step([(0, tokens)])
    return found["recorder"], logits


def test_what_is_read_is_noted(tmp_path):
    write(tmp_path)
    decoder, _ = load(tmp_path, dtype="float64")
    (tokens,) = prompts(140)
    masks = torch.stack([mask_of(text, 140) for text in BASE["patterns"][0]] * 2)
    counts = masks.sum(-1).T  # [tokens, heads]
    runner, seen = Runner(decoder, 1, 140), []

    class Noted:
        config, model, logits = decoder.config, decoder.model, decoder.logits

        def __call__(self, step, caches, recorder):
            seen.append(recorder)
            return decoder(step, caches, recorder)

    runner.decoder = Noted()
    runner.step([(0, tokens[:100])])
    runner.step([(0, tokens[100:139])])
    runner.step([(0, tokens[139:])], Dynamic())
    for recorder, part in zip(seen, (slice(0, 100), slice(100, 139), slice(139, 140)), strict=True):
        assert len(recorder.entries) == 3
        for entry in recorder.entries:
            assert torch.equal(entry.keys, counts[part])
            assert torch.equal(entry.visible, counts[part].double().mean(-1))
            assert (entry.coverage == 1).all()
    # A row by itself is noted as one.
    fixed = Fixed(Pattern.parse("window:5"))
    runner = Runner(decoder, 1, 140)
    runner.step([(0, tokens[:139])])
    runner.decoder = Noted()
    runner.step([(0, tokens[139:])], fixed)
    for entry in seen[-1].entries:
        assert entry.keys.tolist() == [[5, 1, 5, 1]]
        assert torch.equal(entry.visible, counts[139:].double().mean(-1))
        assert ((entry.coverage > 0) & (entry.coverage < 1)).all()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"patterns": None}, "patterns"),
        ({"patterns": [[]]}, "patterns"),
        ({"patterns": ["window:3"]}, "patterns"),
        ({"patterns": [["windw:3"]]}, "windw"),
        ({"patterns": [["window:3@bidirectional"]]}, "bidirectional"),
        ({"patterns": [["fixed:3,9"]]}, "more than l"),
        ({"position_shape": [10, 31]}, "at least 320"),
        ({"position_shape": [True, 320]}, "position_shape"),
        ({"position_shape": "320"}, "position_shape"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_is_wrong_is_named(changes, word, tmp_path):
    with pytest.raises(CheckpointError, match=word):
        write(tmp_path, **changes)


def test_another_activation_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="hidden_act"):
        write(tmp_path, hidden_act="relu")


def test_the_papers_shape():
    config = ModelConfig.parse(Fields(sparse_transformer.PAPER, "PAPER"), Fields({}, ""))
    assert (config.hidden_size, config.heads, config.layers) == (1024, 16, 48)
    assert config.max_model_len == 8192
    meta = Decoder(config, torch.bfloat16, "meta")
    assert {layer.self_attn.attend.patterns[:2] for layer in meta.model.layers} == {
        (Pattern.parse("window:128"), Pattern.parse("strided:128"))
    }
    n = 8192 // PAGE
    lists = Pattern.parse("strided:128").tiles(0, 8192, 8192, "cpu")
    assert int(lists.attended(0, 8192).sum()) == sum(i // 128 + 1 for i in range(8192))
    assert lists.counts.shape[0] == n
