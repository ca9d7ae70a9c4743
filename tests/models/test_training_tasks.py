"""Retrieval tasks: pieces equal the tokenizer's tokens, facts are where they should be."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.training import words
from models.training.bpe import EOS_ID, PAD_ID, SPECIALS, train_tokenizer
from models.training.corpus import tokenise
from models.training.examples import ExampleBuilder
from models.training.filler import prose
from models.training.pieces import ANSWER, NONE, TEXT
from models.training.tasks import RULER, held_out_key, magic_number, needle_document


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([prose(seed, 40_000) for seed in range(3)], 700)


@pytest.fixture(scope="module")
def builder(tokenizer):
    book = prose(3, 60_000).replace(". The", ".\n\n\nThe").replace(" had ", " don't  -- I had ")
    return ExampleBuilder(
        tokenizer,
        tokenise([book, "Mr. Short"], tokenizer),
        tokenise([prose(4, 30_000)], tokenizer),
        text_words=("river", "lantern", "before"),
    )


def _draw(builder, task, seed, length):
    rng = np.random.default_rng(seed)
    if task == "key_value":
        return builder.key_value(rng, length)
    return getattr(builder, task)(rng, length, text_loss=bool(seed % 2))


@pytest.mark.parametrize(
    "task", ["plain", "needles", "key_value", "several", "majority", "variables"]
)
@given(seed=st.integers(0, 10_000), length=st.sampled_from([257, 513, 2049]))
@settings(max_examples=15, deadline=None)
def test_sequences_are_what_the_tokenizer_makes_of_their_text(
    builder, tokenizer, task, seed, length
):
    example = _draw(builder, task, seed, length)
    ids = example.tokens.tolist()
    assert len(ids) == len(example.kinds) == length
    while ids[-1] == PAD_ID:
        ids.pop()
    text = tokenizer.decode(ids, skip_special_tokens=False)
    again = tokenizer.encode(text, add_special_tokens=False).ids
    # A sequence cut at its length may end inside a word.
    assert again[:-8] == ids[: len(again) - 8]
    assert set(np.unique(example.kinds)) <= {NONE, TEXT, ANSWER}


@pytest.mark.parametrize("task", ["needles", "key_value", "several"])
@pytest.mark.parametrize("seed", range(8))
def test_every_answer_was_stated_before_its_question(builder, tokenizer, task, seed):
    example = _draw(builder, task, 2 * seed, 2049)
    marked = np.flatnonzero(example.kinds == ANSWER)
    runs = np.split(marked, np.flatnonzero(np.diff(marked) > 1) + 1)
    assert runs
    for run in runs:
        answer = tokenizer.decode(example.tokens[run].tolist())
        before = tokenizer.decode(example.tokens[: run[0]].tolist())
        for value in re.findall(r"\d+", answer):
            assert value in before
            # Where it was stated, it carried no loss.
            assert before.count(value) == 1


def test_the_end_of_every_answer_is_trained(builder):
    example = _draw(builder, "needles", 4, 2049)
    ends = example.tokens == EOS_ID
    assert (example.kinds[ends] == ANSWER).all()


def test_chains_are_traced_back_to_their_value(builder, tokenizer):
    example = _draw(builder, "variables", 3, 2049)
    text = tokenizer.decode(example.tokens.tolist())
    assigned = dict(re.findall(r" VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\.", text))
    for chain in re.findall(r"VAR [A-Z]{5}(?: = VAR [A-Z]{5})+ = \d{5}", text):
        names = [part.removeprefix("VAR ") for part in chain.split(" = ")]
        assert all(assigned[a] == b for a, b in itertools.pairwise(names[:-1]))


@pytest.mark.parametrize("seed", range(6))
def test_a_question_about_several_keys_names_each_with_its_value(builder, tokenizer, seed):
    text = tokenizer.decode(_draw(builder, "several", seed, 4097).tokens.tolist())
    stated = dict(re.findall(r" numbers for (\S+) is: (\d+)\.", text))
    asked = re.findall(r"all the special magic numbers for ([^?]*?) mentioned", text)
    assert asked
    for keys in asked:
        listed = keys.replace(", and ", ", ").split(", ")
        answer = ", ".join(f"{key}: {stated[key]}" for key in listed)
        assert f"The special magic numbers are {answer}." in text


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [513, 4097])
def test_the_answer_about_a_ballot_is_what_most_of_its_votes_say(builder, tokenizer, seed, length):
    text = tokenizer.decode(_draw(builder, "majority", seed, length).tokens.tolist())
    votes = re.findall(r" One of the votes for (\S+) is: (yes|no)\.", text)
    answers = re.findall(r"Most of the votes for (\S+) in the provided text are: (yes|no)", text)
    assert answers
    for key, answer in answers:
        mine = [value for name, value in votes if name == key]
        assert 2 * mine.count(answer) > len(mine) >= 3


def test_text_loss_is_left_out_on_request(builder):
    example = builder.plain(np.random.default_rng(0), 2049, text_loss=False)
    assert 0 < (example.kinds == TEXT).sum() < 600


def test_training_words_and_held_out_words_are_disjoint():
    train = {*words.TRAIN_ADJECTIVES, *words.TRAIN_NOUNS}
    held_out = {*words.HELD_OUT_ADJECTIVES, *words.HELD_OUT_NOUNS}
    assert not train & held_out
    assert len(words.HELD_OUT_ADJECTIVES) * len(words.HELD_OUT_NOUNS) > 4000


def test_held_out_filler_shares_no_name_or_place_with_training():
    names = re.compile(r"\b[A-Z][a-z]{3,}\b")
    starts = set(names.findall(" ".join(re.findall(r"(?:^|[.?!\"]\s+\"?)\w+", prose(0, 200_000)))))
    train = set(names.findall(prose(0, 50_000)))
    held_out = set(names.findall(prose(0, 50_000, held_out=True)))
    assert {"Alice", "Walter"} <= train - held_out
    assert {"Agatha", "Rupert"} <= held_out - train
    assert train & held_out <= starts
    assert prose(7, 1000) == prose(7, 1000) != prose(8, 1000)


@given(depth=st.floats(0, 1), seed=st.integers(0, 1000), tokens=st.integers(400, 1500))
@settings(max_examples=20, deadline=None)
def test_a_needle_document_has_its_length_and_its_needle_at_its_depth(
    tokenizer, depth, seed, tokens
):
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    rng = np.random.default_rng(seed)
    key, value = held_out_key(rng), magic_number(rng)
    made = needle_document(
        prose(seed, 20_000, held_out=True), encode, tokens=tokens, depth=depth, key=key, value=value
    )
    needle = RULER.needle.format(key=key, value=value)
    assert made.document.count(needle) == 1
    assert made.tokens == len(encode(made.document))
    assert tokens - 90 <= made.tokens <= tokens + 2
    place = len(encode(made.document[: made.document.index(needle)]))
    assert abs(place - depth * (made.tokens - len(encode(needle)))) <= 90
    assert made.correct(f" The special magic number for {key} is: {value}.")
    assert not made.correct(" It is 1.")
    assert made.completion_prompt.endswith("?\nAnswer:")
    assert key in made.user_message


def test_a_needle_document_needs_a_depth_in_range_and_enough_text(tokenizer):
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    with pytest.raises(ValueError, match="depth"):
        needle_document("A. B.", encode, tokens=100, depth=1.5, key="a-b", value="1")
    with pytest.raises(ValueError, match="more than 400"):
        needle_document("A. B.", encode, tokens=400, depth=0.5, key="a-b", value="1")


def test_digits_stand_alone_and_specials_come_first(tokenizer):
    tokens = tokenizer.encode("is: 4071.", add_special_tokens=False).tokens
    assert tokens[-6:] == ["\u0120", "4", "0", "7", "1", "."]
    assert [tokenizer.id_to_token(i) for i in range(8)] == list(SPECIALS)
    assert tokenizer.encode("a").ids[0] == 0
