"""What an answer tells of the keys that its tokens attended to."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels import dynamic as selecting
from models.attention import LayerAttention
from service.engine import explained
from service.engine.explained import Passages
from service.engine.types import Explain
from service.errors import RequestError
from tests.service.engine.tiny import dynamic, greedy, prompt_of, tiny_config, tokens_of

TOKENS = Explain(tokens=True)
POLICIES = {
    "dense": dynamic(policy="dense"),
    "fixed": dynamic(policy="fixed"),
    "dynamic": dynamic(),
}


def looks(deltas):
    return [delta.look for delta in deltas if delta.token_ids]


@pytest.mark.parametrize("policy", POLICIES)
def test_each_token_tells_every_heads_weights(harness, policy):
    one = harness()
    sparsity = replace(POLICIES[policy], explain=TOKENS)
    [deltas] = one.run(one.generate(prompt_of(700), greedy(4), sparsity))
    found = looks(deltas)
    assert [look.visible for look in found] == [700, 701, 702, 703]
    for look in found:
        assert [(h.layer, h.head) for h in look.heads] == [
            (x, y) for x in range(3) for y in range(4)
        ]
        for head in look.heads:
            assert 0 < sum(head.weights) <= 1 + 1e-6
            assert list(head.weights) == sorted(head.weights, reverse=True)
            assert len(set(head.positions)) == len(head.positions) <= 16
            assert all(0 <= position < look.visible for position in head.positions)
            assert head.keys <= look.visible and 0 <= head.coverage <= 1
    if policy == "dense":
        assert all(h.keys == look.visible and h.coverage == 1 for look in found for h in look.heads)
    else:
        assert all(look.density < 1 for look in found)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_weights_are_those_that_make_the_output(harness, monkeypatch, policy):
    """The values, summed up by the weights, are what attention returned: for every key told."""
    monkeypatch.setattr(explained, "TOP", 1000)
    monkeypatch.setattr(explained, "ENTRIES", 10**6)
    outputs = []
    attend = LayerAttention.__call__

    def noted(self, query, cache, step, recorder):
        output = attend(self, query, cache, step, recorder)
        outputs.append((self.layer, output[-1].clone(), cache.kv.clone(), step, len(query)))
        return output

    monkeypatch.setattr(LayerAttention, "__call__", noted)
    one = harness()
    sparsity = replace(POLICIES[policy], explain=TOKENS)
    [deltas] = one.run(one.generate(prompt_of(600), greedy(2), sparsity))
    look = looks(deltas)[1]
    for layer, output, kv, step, count in outputs[-3:]:
        assert count == 1
        rows = step.alone.rows if step.alone is not None else step.sparse[0].rows
        pages = rows.block_tables[0]
        for head in look.heads:
            if head.layer != layer:
                continue
            position = torch.tensor(head.positions)
            values = kv[head.head // 2][pages[position // 64], position % 64, 1]
            total = (torch.tensor(head.weights, dtype=values.dtype)[:, None] * values).sum(0)
            assert torch.allclose(total, output[head.head], atol=1e-5)


def test_an_answer_does_not_depend_on_being_explained(harness):
    one = harness()
    for sparsity in POLICIES.values():
        [plain] = one.run(one.generate(prompt_of(700), greedy(8), sparsity))
        [told] = one.run(one.generate(prompt_of(700), greedy(8), replace(sparsity, explain=TOKENS)))
        assert tokens_of(plain) == tokens_of(told)
        assert all(look is None for look in looks(plain))
        assert plain[-1].sparsity.attended is None


def test_layers_and_heads_are_chosen(harness):
    one = harness()
    explain = Explain(tokens=True, layers=(1,), heads=(0, 3))
    [deltas] = one.run(one.generate(prompt_of(300), greedy(2), dynamic(explain=explain)))
    for look in looks(deltas):
        assert [(head.layer, head.head) for head in look.heads] == [(1, 0), (1, 3)]
    for explain, param in (
        (Explain(tokens=True, layers=(3,)), "sparsity.explain_layers"),
        (Explain(tokens=False, heads=(-1,)), "sparsity.explain_heads"),
        (Explain(tokens=False, heads=()), "sparsity.explain_heads"),
    ):
        with pytest.raises(RequestError) as caught:
            asyncio.run(one.generate(prompt_of(30), greedy(2), dynamic(explain=explain)))
        assert caught.value.param == param


def test_what_is_told_is_bounded(harness):
    config = tiny_config()
    for heads, top in ((None, 16), ((1,), 16)):
        assert explained.wanted(Explain(True, None, heads), config.layers, config.heads).top == top
    assert explained.wanted(TOKENS, 32, 32).top == 4
    assert explained.wanted(TOKENS, 126, 128).top == 1


def test_choices_and_neighbours_are_explained_alone(harness):
    one = harness()
    told = replace(POLICIES["dynamic"], explain=TOKENS)
    mixed = one.run(
        one.generate(prompt_of(500), greedy(4), told, n=2),
        one.generate(prompt_of(400), greedy(4), POLICIES["dense"]),
        one.generate(prompt_of(450), greedy(4), replace(told, policy="dense")),
    )
    alone = one.run(one.generate(prompt_of(450), greedy(4), replace(told, policy="dense")))
    assert looks(mixed[2]) == looks(alone[0])
    assert all(look is None for look in looks(mixed[1]))
    for index in (0, 1):
        assert len([d for d in mixed[0] if d.index == index and d.look]) == 4


def test_an_answers_passages_are_what_its_tokens_looked_at(harness):
    one = harness()
    sparsity = replace(POLICIES["dense"], explain=Explain(tokens=False))
    prompt = prompt_of(300)
    [deltas] = one.run(one.generate(prompt, greedy(5), sparsity))
    assert all(look is None for look in looks(deltas))
    spans = deltas[-1].sparsity.attended
    assert spans and list(spans) == sorted(spans, key=lambda span: -span.mass)
    assert 0 < sum(span.mass for span in spans) <= 1 + 1e-9
    for span in spans:
        assert 0 <= span.start < span.end <= 300
        assert span.text == one.engine.tokenizer.decode(prompt[span.start : span.end], False)


def test_passages_join_keys_that_stand_together():
    passages = Passages(100)
    spread = np.zeros(120)
    spread[[10, 12, 40, 41, 42, 110]] = [0.1, 0.2, 0.05, 0.2, 0.1, 0.3]
    for _ in range(2):
        passages.add(explained.Explained(None, spread))
    spans = passages.spans(lambda start, end: f"{start}-{end}")
    assert [(one.start, one.end, one.text) for one in spans] == [
        (40, 43, "40-43"),
        (10, 13, "10-13"),
    ]
    assert [one.mass for one in spans] == pytest.approx([0.35, 0.3])
    assert Passages(10).spans(lambda *_: "") == ()


def test_a_failed_selection_is_explained_by_what_took_its_place(harness, monkeypatch):
    one = harness()

    def fails(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(selecting, "select", fails)
    told = replace(POLICIES["dynamic"], explain=TOKENS)
    [deltas] = one.run(one.generate(prompt_of(700), greedy(3), told))
    assert deltas[-1].sparsity.fallbacks == {"kernel_error": 128 + 2}
    for look in looks(deltas):
        assert all(head.keys == 68 and head.coverage == 0 for head in look.heads)


def test_keys_that_a_backend_does_not_tell_are_selected_again(harness, monkeypatch):
    told = replace(POLICIES["dynamic"], explain=TOKENS)
    one = harness()
    [expected] = one.run(one.generate(prompt_of(700), greedy(3), told))
    attend = selecting.attend
    monkeypatch.setattr(
        selecting, "attend", lambda *a, **k: replace(attend(*a, **k), selection=None)
    )
    [found] = one.run(one.generate(prompt_of(700), greedy(3), told))
    assert looks(found) == looks(expected)
