"""Papers hold exactly what a model is to read, whoever draws them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.tokenizer import Tokenizer
from service.config import BUNDLED_CHECKPOINT
from service.errors import ConfigError
from service.eval import prompts as prompts_module
from service.eval.cell import Cell, Item, documents_for
from service.eval.drawer import Drawer, Drawing
from service.eval.free_text import PLANTED
from service.eval.prompts import prompt_text, prompt_tokens, split
from service.eval.source import Source
from service.eval.tasks import TASKS

ROOT = Path(__file__).resolve().parents[3]


def item(task, context=2048, document=0, **changes):
    return Item(Cell(task, context, 4, (), **changes), document)


def same(one, other):
    parts = [one.tokens] if hasattr(one, "tokens") else [one.shared, *one.tails]
    others = [other.tokens] if hasattr(other, "tokens") else [other.shared, *other.tails]
    return len(parts) == len(others) and all(map(np.array_equal, parts, others))


@pytest.fixture(params=["chat", "plain", "bytes"])
def tokenizer(request, checkpoint):
    if request.param == "bytes":
        return Tokenizer.from_folder(checkpoint)
    tokenizer = Tokenizer.from_folder(BUNDLED_CHECKPOINT)
    if request.param == "plain":
        tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("agreed", [prompts_module.AGREED, 10**6])
def test_prompts_are_what_encoding_each_whole_gives(tokenizer, agreed, monkeypatch):
    monkeypatch.setattr(prompts_module, "AGREED", agreed)
    source = Source(lambda text: tokenizer.encode(text, add_special_tokens=False))
    for task in ("needles", "majority", "multi-query-16"):
        document = TASKS[task].make(np.random.default_rng(0), source, 1900, 4)
        prompts = prompt_tokens(tokenizer, document)
        for number, prompt in enumerate(prompts):
            text, special = prompt_text(tokenizer, document, number)
            assert prompt.tolist() == tokenizer.encode(text, add_special_tokens=special)
        shared, tails = split(prompts)
        assert len(shared) >= len(source.encode(document.text)) - 1
        assert all(
            np.array_equal(np.concatenate((shared, tail)), prompt)
            for tail, prompt in zip(tails, prompts, strict=True)
        )


@pytest.mark.parametrize("task", list(TASKS))
def test_a_paper_depends_on_its_item_and_the_seed_alone(task):
    drawer, other = (Drawing(BUNDLED_CHECKPOINT, 4, seed).drawer() for seed in (0, 1))
    first = drawer(item(task))
    assert not same(first, drawer(item(task, document=1)))
    assert not same(first, other(item(task)))
    assert same(first, drawer(item(task)))
    assert same(first, Drawing(BUNDLED_CHECKPOINT, 4, 0).drawer()(item(task)))


@pytest.mark.parametrize("task", [name for name in TASKS if name not in ("text", "repeats")])
def test_prompts_fill_their_context_and_no_more(task):
    paper = Drawing(BUNDLED_CHECKPOINT, 16, 0).drawer()(item(task, 4096))
    lengths = [len(paper.shared) + len(tail) for tail in paper.tails]
    room = 4096 - TASKS[task].answer_tokens  # the answer too fits in
    assert room - 250 < min(lengths) and max(lengths) <= room
    assert len(paper.questions) == len(lengths)


def test_a_cell_may_do_without_the_users_texts():
    own = " ".join(f"Sentence {number} stands here." for number in range(40_000))
    drawer = Drawing(BUNDLED_CHECKPOINT, 4, 0, (own,)).drawer()
    generated = Drawing(BUNDLED_CHECKPOINT, 4, 0).drawer()
    for task in ("needles", "text", "free-text"):
        assert same(drawer(item(task, own_text=False)), generated(item(task)))
        assert not same(drawer(item(task)), generated(item(task)))


def test_a_passage_ends_alike_in_every_context():
    drawer = Drawing(BUNDLED_CHECKPOINT, 4, 0).drawer()
    short, long = drawer(item("text")), drawer(item("text", 8192))
    assert (len(short.tokens), len(long.tokens)) == (2048, 8192)
    assert (short.tokens[1:] == long.tokens[-2047:]).all()
    assert short.size == long.size > 512
    with pytest.raises(ConfigError, match="2048 tokens or more"):
        drawer(item("repeats", 1024))


@pytest.mark.parametrize("context", [1024, 4096])
def test_a_free_text_is_given_as_it_is_and_continued_from_seeds(tokenizer, context):
    paper = Drawer(tokenizer, 4, 0)(item("free-text", context))
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompts = {(*paper.shared.tolist(), *tail.tolist()) for tail in paper.tails}
    assert len(prompts) == 1 and len(paper.tails) == len(paper.questions) == 4
    [prompt] = prompts
    assert len(prompt) == context - 256
    assert list(prompt[: len(first)]) == first
    text = tokenizer.decode(prompt)
    assert not PLANTED.search(text) and "Question" not in text
    assert text[-1] in '.!?"”'
    assert len(set(paper.seeds)) == 4


def test_a_free_text_ends_alike_and_has_the_same_seeds_in_every_context():
    drawer, fewer = (Drawing(BUNDLED_CHECKPOINT, n, 0).drawer() for n in (16, 3))
    short, long = drawer(item("free-text")), drawer(item("free-text", 8192))
    assert len(short.seeds) == 10
    assert (short.shared[1:] == long.shared[-len(short.shared) + 1 :]).all()
    assert short.seeds == long.seeds != drawer(item("free-text", document=1)).seeds
    assert fewer(item("free-text")).seeds == short.seeds[:3]
    assert drawer(item("needles")).seeds == ()


def test_documents_are_as_many_as_wanted_and_as_the_answers_need():
    assert documents_for("needle", 100, 10, 1000) == 1000
    assert documents_for("needles", 100, 10, 1000) == 100
    assert documents_for("needles", 120, 10, 1000) == 120
    assert documents_for("text", 7, 10, 1000) == 7
    assert documents_for("free-text", 7, 10, 1000) == 100
    assert [name for name in TASKS if Cell(name, 2048, 1, ()).passages] == ["text", "repeats"]


def test_drawing_loads_no_torch():
    code = "import service.eval.crew, service.eval.drawer, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
