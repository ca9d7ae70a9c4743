"""What is counted as planted is what training plants, and nothing that stands in prose."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from models.training import tasks as forms
from models.training.filler import prose
from models.training.names import Names
from models.training.tasks import KEY_VALUE, MAJORITY, OTHER_FORMS, RULER, Form
from service.errors import ConfigError
from service.eval import passages
from service.eval.free_text import PLANTED, Continuation, begun
from service.eval.source import Source
from service.eval.tasks import TASKS

ROOT = Path(__file__).resolve().parents[3]
NOVELS = ROOT.parent / "shared/data/books/val.tar.xz"
FORMS = (RULER, *OTHER_FORMS, KEY_VALUE, MAJORITY)


def encode(text):
    """A number a word."""
    return [int.from_bytes(word.encode()[-6:], "big") for word in text.split()]


def planted(form, rng, *, held_out):
    # Of the training's keys a few have one word, and "word: number" may stand in any text.
    names = Names(("house", "river"), held_out=held_out)
    key = next(key for key in names.keys(rng, 100) if "-" in key or form is not KEY_VALUE)
    value = "yes" if form is MAJORITY else names.value(rng)
    return form.needle.format(key=key, value=value)


def test_the_forms_are_all_there_are():
    listed = [one for one in vars(forms).values() if isinstance(one, Form)]
    assert {*listed, *OTHER_FORMS} == {*FORMS}


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.needle)
def test_every_planted_sentence_is_found(form, held_out):
    rng = np.random.default_rng(3)
    for _ in range(200):
        sentence = planted(form, rng, held_out=held_out)
        for one in (sentence, sentence.upper(), sentence.replace(" ", "\n")):
            assert PLANTED.search(one), one
            assert Continuation().found(f"He went out. {one} It rained.") == 0


@pytest.mark.parametrize(
    "sentence",
    [
        "VAR QXLBT = 12345.",
        "VAR QXLBT = VAR ABCDE.",
        "VAR QXLB = 12345.",
        "Trace VAR QXLBT",
        "The special magic number for sly-otter mentioned in the provided text is: 1234567.",
        "One of the special magic numbers for",  # where a continuation ends
        "What are the pass keys for sly-otter?",
        "The secret numbers of sly-otter are: 1, 2.",
        "Most of the votes for sly-otter in the provided text are: no.",
    ],
)
def test_assignments_and_what_is_asked_are_found(sentence):
    assert PLANTED.search(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "He had a number of keys for it, and the code of honour is plain.",
        "The votes for the motion were counted; who votes for him is a fool.",
        "A well-known rule: do nothing. To-day: 3 letters. It was half-past: 12.",
        "The river Var is dry in 1894.",
        "CHAPTER IV\n\nVAR HOBAAND DOWIN had been held by her.",
    ],
)
def test_what_reads_alike_is_not(sentence):
    assert Continuation().found(sentence) == 1


def test_generated_prose_has_nothing_planted():
    for seed in range(20):
        for held_out in (True, False):
            assert not PLANTED.search(prose(seed, 50_000, held_out=held_out))


@pytest.mark.skipif(not NOVELS.exists(), reason="there are no novels")
def test_novels_have_nothing_planted():
    read = 0
    with tarfile.open(NOVELS) as archive:
        for member in archive:
            if member.name.endswith(".txt"):
                text = archive.extractfile(member).read().decode()
                assert not PLANTED.search(text)
                read += len(text)
    assert read > 10**6


@pytest.mark.parametrize(
    "source", [Source(encode), Source(encode, (" ".join(f"One {i}." for i in range(40_000)),))]
)
def test_texts_of_every_length_end_alike_behind_a_sentence(source, monkeypatch):
    monkeypatch.setattr(passages, "LONGEST", 9000)
    short, long = (begun(np.random.default_rng(1), source, n) for n in (700, 9000))
    assert (len(short), len(long)) == (700, 9000)
    assert short == long[-700:]
    assert begun(np.random.default_rng(2), source, 700) != short
    passage = passages.continued(np.random.default_rng(1), source, 700 + passages.CONTINUED)
    assert passage.tokens[:700] == short
    with pytest.raises(ConfigError, match="reaches back 9000 tokens"):
        begun(np.random.default_rng(1), source, 9001)


def test_documents_are_as_many_as_the_continuations_need():
    task = TASKS["free-text"]
    assert list(TASKS)[-1] == task.name
    assert task.documents(1000, 10) == task.documents(1000, 16) == 100
    assert task.documents(1000, 3) == 334
