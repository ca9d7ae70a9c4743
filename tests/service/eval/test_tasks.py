"""Every task states what it asks for, in a document of the length that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from models.training import words
from service.eval.source import Source
from service.eval.tasks import BALLOTS, MARGIN, TASKS, VOTES, Question, Task, votes, winning


def encode(text):
    """A token a word, near enough."""
    return text.split()


SOURCES = {
    "generated": Source(encode),
    "own": Source(encode, ("She came in. He went out again, slowly. Nobody said a word! " * 2000,)),
}
ASKED = [name for name, task in TASKS.items() if isinstance(task, Task)]


def draw(task, seed=0, tokens=1500, most=16, source="generated"):
    return TASKS[task].make(np.random.default_rng(seed), SOURCES[source], tokens, most)


@pytest.mark.parametrize("source", list(SOURCES))
@pytest.mark.parametrize("task", ASKED)
@pytest.mark.parametrize("seed", range(3))
def test_a_document_holds_every_reference_and_has_its_length(task, seed, source):
    document = draw(task, seed, source=source)
    assert 1300 <= len(encode(document.text)) <= 1500
    assert document.questions
    for question in document.questions:
        assert question.references
        for reference in question.references:
            assert reference in document.text
            assert reference not in question.text or task in ("variables", "majority")


@pytest.mark.parametrize("task", ASKED)
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


def test_a_value_asked_for_directly_stands_at_the_far_end_of_its_chain():
    for question in draw("variables-asked").questions:
        name, (value,) = question.text.removesuffix("?").split()[-1], question.references
        text = draw("variables-asked").text
        for _ in range(4):
            name = text.split(f"VAR {name} = VAR ")[1][:5]
        assert f"VAR {name} = {value}." in text


def test_keys_are_of_words_that_training_never_uses():
    text = draw("multi-key").text
    seen = {word for word in text.replace("-", " ").split() if word.isalpha()}
    assert not seen & ({*words.TRAIN_ADJECTIVES, *words.TRAIN_NOUNS} - {"special", "magic"})


def test_a_score_is_how_many_references_are_mentioned():
    question = Question("?", ("12", "Ab"))
    assert question.found("it is 12, or ab") == 2
    assert question.found("it is 12") == 1
    assert question.found("") == 0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Most of the votes for supple-mango in the provided text are: yes.", 1),
        ("most: of the votes are: YES", 1),
        ("Yes", 1),
        ("Most of the votes are: no.", 0),
        ("Most of the votes are: yes, no.", 0),
        ("yes: no", 0),
        ("no: yes", 1),  # what stands behind the last colon counts
        ("Most are: yesterday.", 0),
        ("Most of the votes are: yes, nobody doubts it", 1),
        ("", 0),
    ],
)
def test_a_verdict_is_a_word_behind_the_last_colon(answer, right):
    assert Question("?", ("yes",), ("no",)).found(answer) == right


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tokens", [1500, 4001])
def test_a_majority_is_what_most_votes_say(seed, tokens):
    document = draw("majority", seed, tokens)
    count = votes(tokens, len(encode("One of the votes for a-b is: yes.")))
    assert len(document.questions) == BALLOTS
    assert document.text.count("One of the votes for ") == BALLOTS * count
    for question in document.questions:
        key = question.text.split("votes for ")[1].split(" in the")[0]
        said = [
            document.text.count(f"One of the votes for {key} is: {word}.")
            for word in (*question.references, *question.rivals)
        ]
        assert said == [winning(count), count - winning(count)]
        assert {*question.references, *question.rivals} == {"yes", "no"}


def test_either_verdict_wins_some_ballots():
    said = {q.references[0] for seed in range(4) for q in draw("majority", seed).questions}
    assert said == {"yes", "no"}


def test_votes_leave_room_for_prose_and_always_have_a_winner():
    assert votes(10**6) == VOTES
    for tokens in (1024, 4096, 16_384, 65_536):
        # The bundled tokenizer's votes are of 15 to 23 tokens, and their number is always the same.
        assert votes(tokens, 23) == votes(tokens)
        assert BALLOTS * votes(tokens) * 18 <= tokens / 2
        assert BALLOTS * votes(tokens, 90) * 90 <= tokens * 2 / 3
    for count in range(1, 300):
        assert 2 * winning(count) > count >= winning(count)
        assert winning(count) >= count * (0.5 + MARGIN / 2) - 1e-9


@pytest.mark.parametrize("task", ASKED)
def test_documents_are_as_many_as_the_answers_need(task):
    document, one = draw(task, tokens=4096, most=10), TASKS[task]
    assert len(document.questions) == min(10, one.questions)
    assert all(len(asked.references) == one.references for asked in document.questions)
    each = len(document.questions) * one.references
    assert (one.documents(1000, 10) - 1) * each < 1000 <= one.documents(1000, 10) * each
