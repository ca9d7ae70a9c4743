"""The decoder against transformers, in float32, however the tokens are cut into steps."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from kernels.attention import Impl
from kernels.cache import PAGE, LayerCache, Rows, Segment
from kernels.policy import Dynamic
from models.attention import Recorder
from models.decoder import Decoder
from models.loader import load
from models.step import DenseGroup, SparseGroup, StepInput

TOLERANCE = 2e-4
LENGTH = 150

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
QWEN2, QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"

CASES = {
    "llama": (LLAMA, {}),
    "llama-mha": (LLAMA, {"num_key_value_heads": 4}),
    "llama-mqa": (LLAMA, {"num_key_value_heads": 1}),
    "llama-odd-group": (LLAMA, {"num_attention_heads": 6, "head_dim": 16, "hidden_size": 60}),
    "llama-linear": (LLAMA, {"rope_parameters": LINEAR}),
    "llama-llama3": (LLAMA, {"rope_parameters": LLAMA3}),
    "llama-yarn": (LLAMA, {"rope_parameters": YARN}),
    "llama-yarn-tuned": (
        LLAMA,
        {"rope_parameters": YARN | {"beta_fast": 16, "mscale": 0.8, "mscale_all_dim": 0.5}},
    ),
    "llama-dynamic": (LLAMA, {"rope_parameters": DYNAMIC}),
    "llama-attention-bias": (LLAMA, {"attention_bias": True}),
    "llama-mlp-bias": (LLAMA, {"mlp_bias": True}),
    "llama-tied": (LLAMA, {"tie_word_embeddings": True}),
    "llama-sharded": (LLAMA, {"shard_size": "100KB"}),
    "mistral-window": (MISTRAL, {"sliding_window": 37}),
    "mistral-full": (MISTRAL, {"sliding_window": None, "head_dim": 32}),
    "mistral-linear": (MISTRAL, {"sliding_window": 70, "rope_parameters": LINEAR}),
    "qwen2": (QWEN2, {}),
    "qwen2-tied": (QWEN2, {"tie_word_embeddings": True}),
    "qwen2-window": (
        QWEN2,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen2-yarn": (QWEN2, {"rope_parameters": YARN}),
    "qwen3": (QWEN3, {"head_dim": 32}),
    "qwen3-bias": (QWEN3, {"head_dim": 32, "attention_bias": True}),
    "qwen3-dynamic": (QWEN3, {"head_dim": 16, "rope_parameters": DYNAMIC}),
    "qwen3-window": (
        QWEN3,
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 33,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


class Runner:
    """Sequences over one scattered paged cache, advanced by any chunks in any company."""

    def __init__(self, decoder, sequences, longest):
        config, weight = decoder.config, decoder.model.norm.weight
        pages = -(-longest // PAGE)
        order = list(range(sequences * pages))
        random.Random(0).shuffle(order)
        self.decoder = decoder
        self.tables = [order[i * pages : (i + 1) * pages] for i in range(sequences)]
        self.lengths = [0] * sequences
        self.caches = [
            LayerCache.allocate(
                len(order), config.kv_heads, config.head_dim, weight.dtype, weight.device
            )
            for _ in range(config.layers)
        ]

    def step(self, chunks, policy=None):
        """Feed (sequence, tokens) chunks in one step; the logits of each chunk's tokens.

        With a policy, chunks of one token go through selected attention.
        """
        device = self.caches[0].kv.device
        ids, positions, slots, filled, dense, sparse = [], [], [], [], [], []
        for sequence, tokens in chunks:
            table, start = self.tables[sequence], self.lengths[sequence]
            places = range(start, start + len(tokens))
            if policy is not None and len(tokens) == 1:
                rows = Rows(
                    torch.tensor([table], device=device),
                    torch.tensor([start + 1], device=device),
                    torch.tensor([0], device=device),
                )
                sparse.append(SparseGroup(rows, torch.tensor([len(ids)], device=device), policy))
            else:
                segment = Segment.of(table, start, len(tokens), device)
                dense.append(DenseGroup(segment, len(ids)))
            ids += tokens
            positions += places
            slots += [table[p // PAGE] * PAGE + p % PAGE for p in places]
            filled += [table[p // PAGE] for p in places if p % PAGE == PAGE - 1]
            self.lengths[sequence] += len(tokens)
        integers = {"dtype": torch.int64, "device": device}
        step = StepInput(
            alone=None,
            token_ids=torch.tensor(ids, **integers),
            positions=torch.tensor(positions, **integers),
            slots=torch.tensor(slots, **integers),
            filled=torch.tensor(filled, **integers),
            dense=tuple(dense),
            sparse=tuple(sparse),
        )
        with torch.inference_mode():
            hidden = self.decoder(step, self.caches, Recorder())
            logits = self.decoder.logits(hidden)
        return logits.split([len(tokens) for _, tokens in chunks])


def prompts(*lengths):
    generator = random.Random(1)
    return [[generator.randrange(128) for _ in range(n)] for n in lengths]


def one_shot(decoder, tokens):
    return Runner(decoder, 1, len(tokens)).step([(0, tokens)])[0]


def difference(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers_however_the_tokens_are_cut(
    case, tiny_checkpoint, tmp_path
):
    architecture, changes = CASES[case]
    oracle = tiny_checkpoint(architecture, tmp_path, **changes)
    decoder, _ = load(tmp_path, dtype="float32")
    (tokens,) = prompts(LENGTH)
    expected = oracle(torch.tensor([tokens])).logits[0]  # [tokens, vocab]

    assert difference(one_shot(decoder, tokens), expected) <= TOLERANCE

    for sizes in ((7, 1, 57, 13, 64), (63, 2, 5)):
        runner = Runner(decoder, 1, LENGTH)
        pieces, start = [], 0
        while start < LENGTH:
            size = sizes[len(pieces) % len(sizes)]
            pieces += runner.step([(0, tokens[start : start + size])])
            start += size
        assert difference(torch.cat(pieces), expected) <= TOLERANCE

    # Sequences of different lengths: one still prefills while the others decode token by token.
    batch = prompts(60, 129, 1, 40)
    new = [prompts(8)[0] for _ in batch]
    runner = Runner(decoder, len(batch), 160)
    got = [[] for _ in batch]
    for sequence, logits in enumerate(runner.step(list(enumerate(batch[:3])))):
        got[sequence].append(logits)
    for i in range(8):
        late = (3, batch[3][i * 5 : (i + 1) * 5])
        chunks = [*((sequence, [new[sequence][i]]) for sequence in range(3)), late]
        for (sequence, _), logits in zip(chunks, runner.step(chunks), strict=True):
            got[sequence].append(logits)
    for sequence, prompt in enumerate(batch):
        fed = prompt + new[sequence] if sequence < 3 else prompt
        expected = oracle(torch.tensor([fed])).logits[0]
        assert difference(torch.cat(got[sequence]), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [{"rope_parameters": LINEAR}, {"rope_parameters": LLAMA3}, {"rope_parameters": YARN}],
    ids=["linear", "llama3", "yarn"],
)
def test_these_checkpoints_would_show_a_wrong_rotary_scaling(changes, tiny_checkpoint, tmp_path):
    tiny_checkpoint(LLAMA, tmp_path / "plain")
    tiny_checkpoint(LLAMA, tmp_path / "scaled", **changes)
    (tokens,) = prompts(LENGTH)
    plain, scaled = (
        one_shot(load(tmp_path / name, dtype="float32")[0], tokens) for name in ("plain", "scaled")
    )
    assert difference(plain, scaled) > 100 * TOLERANCE


def test_these_checkpoints_would_show_a_wrong_window(tiny_checkpoint, tmp_path):
    (tokens,) = prompts(LENGTH)
    logits = []
    for window in (37, 38):
        tiny_checkpoint(MISTRAL, tmp_path / str(window), sliding_window=window)
        decoder, _ = load(tmp_path / str(window), dtype="float32")
        logits.append(one_shot(decoder, tokens))
    assert difference(*logits) > 10 * TOLERANCE


def test_float64_is_computed_in_float64_throughout(tiny_checkpoint, tmp_path):
    tiny_checkpoint(QWEN3, tmp_path, head_dim=32, rope_parameters=YARN)
    (tokens,) = prompts(LENGTH)
    decoder, _ = load(tmp_path, dtype="float64")
    whole = one_shot(decoder, tokens)
    assert whole.dtype == torch.float64
    runner = Runner(decoder, 1, LENGTH)
    pieces = [runner.step([(0, tokens[i : i + 11])])[0] for i in range(0, LENGTH, 11)]
    assert difference(torch.cat(pieces), whole) < 1e-11
    single = one_shot(load(tmp_path, dtype="float32")[0], tokens)
    assert difference(single.double(), whole) <= TOLERANCE


def test_bfloat16_stays_near_float32_and_gives_float32_logits(tiny_checkpoint, tmp_path):
    oracle = tiny_checkpoint(LLAMA, tmp_path, rope_parameters=LLAMA3)
    (tokens,) = prompts(LENGTH)
    batch = torch.tensor([tokens])
    expected = oracle(batch).logits[0]
    theirs = difference(oracle.bfloat16()(batch).logits[0].float(), expected)
    logits = one_shot(load(tmp_path, dtype="bfloat16")[0], tokens)
    assert logits.dtype == torch.float32
    assert difference(logits, expected) <= 2 * theirs


@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen3"])
def test_selected_attention_with_every_key_equals_dense(case, tiny_checkpoint, tmp_path):
    architecture, changes = CASES[case]
    tiny_checkpoint(architecture, tmp_path, **changes)
    decoder, _ = load(tmp_path, dtype="float64")
    prompt, new = prompts(200, 6)
    policy = Dynamic(coverage=1.0, min_keys=4096, max_keys=4096)
    logits = []
    for choice in (None, policy):
        runner = Runner(decoder, 1, 256)
        runner.step([(0, prompt)])
        logits.append(torch.cat([runner.step([(0, [token])], choice)[0] for token in new]))
    assert difference(*logits) < 1e-10


def test_the_reference_backend_runs_the_whole_decoder(tiny_checkpoint, tmp_path):
    tiny_checkpoint(LLAMA, tmp_path)
    decoder, config = load(tmp_path, dtype="float32")
    reference = Decoder(config, torch.float32, "cpu", impl=Impl.REFERENCE)
    reference.load_state_dict(decoder.state_dict())
    (tokens,) = prompts(90)
    assert difference(one_shot(decoder, tokens), one_shot(reference, tokens)) <= TOLERANCE


def test_parameters_carry_the_names_of_transformers_and_need_no_gradient(tiny_checkpoint, tmp_path):
    oracle = tiny_checkpoint(QWEN3, tmp_path, head_dim=32, attention_bias=True)
    decoder, config = load(tmp_path, dtype="float32")
    assert dict(decoder.named_parameters()).keys() == dict(oracle.named_parameters()).keys()
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    meta = Decoder(dataclasses.replace(config, layers=1), torch.bfloat16, "meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
