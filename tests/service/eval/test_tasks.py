"""Every task states what it asks for, in a document of the length that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from models.training import words
from service.eval.tasks import TASKS, Question, Source


def encode(text):
    """A token a word, near enough."""
    return text.split()


SOURCES = {
    "generated": Source(encode),
    "own": Source(encode, ("She came in. He went out again, slowly. Nobody said a word! " * 2000,)),
}


def draw(task, seed=0, tokens=1500, most=16, source="generated"):
    return TASKS[task].make(np.random.default_rng(seed), SOURCES[source], tokens, most)


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("seed", range(3))
def test_a_document_holds_every_reference_and_has_its_length(task, seed, source):
    document = draw(task, seed, source=source)
    assert 1300 <= len(encode(document.text)) <= 1500
    assert document.questions
    for question in document.questions:
        assert question.references
        for reference in question.references:
            assert reference in document.text
            assert reference not in question.text or task == "variables"


@pytest.mark.parametrize("task", list(TASKS))
def test_a_seed_repeats_a_document_and_another_gives_another(task):
    assert draw(task, 4) == draw(task, 4)
    assert draw(task, 4) != draw(task, 5)


@pytest.mark.parametrize(("task", "count"), [("needles", 16), ("multi-value", 4), ("variables", 4)])
def test_at_most_so_many_questions_are_asked(task, count):
    assert len(draw(task).questions) == count
    assert len(draw(task, most=3).questions) == 3


def test_multi_key_is_nothing_but_facts():
    document = draw("multi-key")
    assert document.text.count("magic number") > 100
    assert document.text.count("magic number") == document.text.count(".")


def test_a_multi_query_asks_for_all_of_its_keys():
    (question,) = draw("multi-query-16").questions
    assert len(question.references) == 16
    assert question.text.count(",") == 15


def test_chains_are_stated_in_their_order():
    for question in draw("variables").questions:
        *chain, value = question.references
        places = [draw("variables").text.index(f"VAR {name} =") for name in chain]
        assert places == sorted(places)
        assert f"VAR {chain[0]} = {value}." in draw("variables").text
        assert question.text == f"Trace VAR {chain[-1]}."


def test_keys_are_of_words_that_training_never_uses():
    text = draw("multi-key").text
    seen = {word for word in text.replace("-", " ").split() if word.isalpha()}
    assert not seen & ({*words.TRAIN_ADJECTIVES, *words.TRAIN_NOUNS} - {"special", "magic"})


def test_a_score_is_the_share_of_references_mentioned():
    question = Question("?", ("12", "Ab"))
    assert question.score("it is 12, or ab") == 1.0
    assert question.score("it is 12") == 0.5
    assert question.score("") == 0.0
