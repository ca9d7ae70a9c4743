"""Presets against the models that they are named after."""

from __future__ import annotations

import pytest
import torch
from transformers import LongformerConfig, MistralConfig
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from kernels.errors import PatternError
from kernels.patterns.pattern import Pattern
from kernels.patterns.presets import TASKS, auto, preset, recognise
from kernels.patterns.published import SPECS


@pytest.mark.parametrize("name", SPECS)
def test_a_preset_is_read_by_name_and_recognised(name):
    pattern = preset(name)
    assert Pattern.parse(name) == Pattern.parse(f" {name} ") == pattern
    assert str(pattern) == SPECS[name]
    assert recognise(pattern) == name
    assert pattern.keeps_previous


@pytest.mark.parametrize(("n", "window"), [(8, 4), (24, 4), (40, 8), (64, 16), (96, 16)])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_longformer_is_that_of_transformers(n, window, tokens):
    """Scores are all 0, and a value is its position: each query's output names what it sees."""
    config = LongformerConfig(
        hidden_size=n,
        num_attention_heads=1,
        attention_window=[window],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, layer_id=0).eval()
    with torch.no_grad():
        for name, part in layer.named_parameters():
            part.zero_()
            if name in ("value.weight", "value_global.weight"):
                part.copy_(torch.eye(n))
    is_global = torch.arange(n)[None] < tokens
    mask = torch.where(is_global, 10000.0, 0.0)
    with torch.no_grad():
        output = layer(
            torch.eye(n)[None],
            attention_mask=mask,
            is_index_masked=torch.zeros_like(is_global),
            is_index_global_attn=is_global,
            is_global_attn=tokens > 0,
        )[0][0]
    spec = f"global:{tokens}+window:{window}" if tokens else f"window:{window}"
    expected = Pattern.parse(f"{spec}@bidirectional").mask(n, n)
    assert torch.equal(output > 1e-6, expected)


@pytest.mark.parametrize("n", [1, 7, 64, 100])
@pytest.mark.parametrize("window", [1, 5, 64, 200])
def test_mistral_is_that_of_transformers(n, window):
    config = MistralConfig(sliding_window=window, attn_implementation="eager")
    config._attn_implementation = "eager"
    mask = create_sliding_window_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, n, 1),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(n)[None],
    )
    assert torch.equal(mask[0, 0] == 0, Pattern.parse(f"window:{window}").mask(n, n))


@pytest.mark.parametrize("n", [1, 64, 100, 200])
@pytest.mark.parametrize("stride", [1, 8, 32])
def test_strided_is_local_and_strided_of_the_published_code(n, stride):
    position = torch.arange(n)
    # "local" is a band of `stride` diagonals, "strided" those that are multiples of it.
    band = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - stride)
    apart = position[:, None] - position
    multiples = (apart >= 0) & (apart % stride == 0)
    assert torch.equal(Pattern.parse(f"window:{stride}").mask(n, n), band)
    assert torch.equal(Pattern.parse(f"strided:{stride}").mask(n, n), multiples)
    both = Pattern.parse(f"window:{stride}+strided:{stride}")
    assert torch.equal(both.mask(n, n), band | multiples)


@pytest.mark.parametrize(("size", "summary"), [(4, 1), (4, 2), (4, 4), (8, 1)])
def test_fixed_is_the_layout_of_the_published_code(size, summary):
    """Theirs is one of blocks of `each` tokens, and causal in the blocks of the diagonal."""
    each, blocks = 8, 24
    layout = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        for last in range(size - summary, size):
            layout[row, last::size] = True
        layout[row, row // size * size : (row // size + 1) * size] = True
        layout[row, row + 1 :] = False
    mask = layout.repeat_interleave(each, 0).repeat_interleave(each, 1).tril()
    pattern = Pattern.parse(f"fixed:{size * each},{summary * each}")
    assert torch.equal(pattern.mask(blocks * each, blocks * each), mask)


def test_bigbird_reads_about_the_eight_blocks_that_are_published():
    pattern, n = preset("bigbird"), 4096
    a_query = pattern.mask(n - 128 - 96, n, 128).sum(1)  # neither global nor at the end
    assert abs(float(a_query.float().mean()) / (8 * 64) - 1) < 0.1
    # Blocks are drawn anew for each seed, and for no other reason.
    other = Pattern.parse(SPECS["bigbird"].replace("random:3,0", "random:3,1"))
    assert not torch.equal(pattern.mask(1000, 1000), other.mask(1000, 1000))
    assert torch.equal(pattern.mask(2000, 2000)[:1000, :1000], pattern.mask(1000, 1000))


def test_random_blocks_are_drawn_evenly():
    """Block t draws each of those before it with probability r / t."""
    late, runs, count = 30, 400, 3
    query, key = torch.tensor(late * 64), torch.arange(late) * 64
    seen = sum(Pattern.parse(f"random:{count},{seed}").allows(query, key) for seed in range(runs))
    expected = runs * count / late
    assert int(seen.sum()) == runs * count
    assert ((seen - expected) ** 2 / expected).sum() < 60  # chi-squared, 27 degrees of freedom
    assert len({tuple(Pattern.parse(f"random:3,{s}").allows(query, key)) for s in range(50)}) == 50


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("window:7+global:3", "longformer"),
        ("global:3+window:7@bidirectional", "longformer"),
        ("global:3+window:7+dilated:9,2@bidirectional", "longformer"),
        ("dilated:9,2+global:1", "longformer"),
        ("random:1,5+window:7+global:3", "bigbird"),
        ("strided:9+window:3", "sparse-transformer-strided"),
        ("fixed:9,2", "sparse-transformer-fixed"),
        ("window:9", "mistral"),
        ("window:9+window:10", "mistral"),
        ("window:9+sinks:1", "streaming"),
        ("window:9@bidirectional", None),
        ("window:9+sinks:1@bidirectional", None),
        ("strided:9", None),
        ("full", None),
        ("window:9&global:3", None),
        ("window:9+(global:3&strided:2)", None),
        ("window:7+global:3+axial:2,2", None),
    ],
)
def test_a_model_is_recognised_by_its_primitives(text, name):
    assert recognise(Pattern.parse(text)) == name


@pytest.mark.parametrize("tokens", [100, 10**6])
@pytest.mark.parametrize("task", TASKS)
def test_auto_keeps_the_previous_key_where_it_is_causal(task, tokens):
    pattern = auto(task, tokens, (16, 24))
    assert pattern.causal and pattern.keeps_previous
    assert not auto(task, tokens, (16, 24), causal=False).causal


def test_auto_chooses_by_task():
    def chosen(task, tokens=4096, grid=None, **other):
        return str(auto(task, tokens, grid, **other))

    assert chosen("generation") == "window:4096"
    assert chosen("classification", causal=False) == SPECS["longformer"]
    assert chosen("document") == "global:1+window:512"
    assert chosen("document", 10**6, causal=False) == SPECS["bigbird"]
    assert chosen("generation", 10**6) == "global:128+window:192+random:3,0"
    assert chosen("structured", 10**6) == "fixed:128,32"
    assert chosen("image", grid=(32, 48)) == "axial:32,48+window:2"
    assert chosen("image", grid=(32, 48), causal=False) == "axial:32,48@bidirectional"
    assert chosen("video", grid=(8, 9)) == "axial:8,9+strided:72+window:2"
    for task, grid, says in (
        ("chess", None, "no task 'chess': write one of classification, generation"),
        ("image", None, "the task image needs a grid"),
        ("image", (0, 4), "must lie in|numbers from"),
        ("video", (2**31, 2), "numbers from"),
    ):
        with pytest.raises(PatternError, match=says):
            auto(task, 4096, grid)
    with pytest.raises(PatternError, match="no preset 'longformr': write one of longformer"):
        preset("longformr")
