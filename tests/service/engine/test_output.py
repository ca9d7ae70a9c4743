"""Stop strings, stop tokens and lengths, and the text that may be shown before them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.output import Ending, Output
from tests.service.engine.tiny import EOS, greedy, letters

TOKENIZER = letters()


def ids(text):
    return [ord(c) - ord("a") + 1 for c in text]


def plain(text):
    return "".join(chr(ord(c) - 0x100 + ord("a") - 1) for c in text)


def run(text, *, room=True, ends=frozenset({EOS}), **params):
    """Push the letters of `text` ("." is the end token) until the ending; texts and ending."""
    if "stop" in params:
        params["stop"] = tuple(
            "".join(TOKENIZER.token_text(i) for i in ids(stop)) for stop in params["stop"]
        )
    output = Output(TOKENIZER, greedy(**({"max_tokens": 1000} | params)), (1,), ends)
    texts = []
    for count, letter in enumerate(text, 1):
        shown, ending = output.push(EOS if letter == "." else ids(letter)[0], count, room)
        texts.append(plain(shown))
        if ending:
            return texts, ending
    return texts, None


def test_text_that_may_begin_a_stop_string_is_held_back():
    texts, ending = run("xabyabc", stop=("abc",))
    assert texts == ["x", "", "", "aby", "", "", ""]
    assert ending.reason == "stop" and plain(ending.matched) == "abc"


def test_the_stop_string_can_be_kept():
    texts, _ = run("xabc", stop=("abc",), include_stop_str_in_output=True)
    assert "".join(texts) == "xabc"


def test_the_earliest_stop_string_wins():
    texts, ending = run("xxaby", stop=("by", "xa", "zzz"))
    assert "".join(texts) == "x" and plain(ending.matched) == "xa"


def test_held_text_comes_out_at_the_end():
    texts, ending = run("xab", stop=("abc",), max_tokens=3)
    assert "".join(texts) == "xab" and ending == Ending("length")
    texts, ending = run("xab.", stop=("abc",), ignore_eos=False)
    assert "".join(texts) == "xab" and ending == Ending("stop")


def test_the_end_token_is_shown_to_nobody_and_can_be_ignored():
    assert run("a.", ignore_eos=False)[1] == Ending("stop")
    assert run("a.b", ignore_eos=True)[1] is None


def test_a_stop_token_is_named():
    texts, ending = run("ab", stop_token_ids=(2,))
    assert texts == ["a", ""] and ending == Ending("stop", 2)


def test_nothing_ends_an_answer_before_min_tokens_but_its_length():
    texts, ending = run("ab.abab", stop=("ab",), min_tokens=5, ignore_eos=False)
    assert ending.reason == "stop" and len(texts) == 7
    assert run("abc", min_tokens=5, room=False)[1] == Ending("length")


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_shown_text_is_the_text_up_to_the_first_stop_string(text, stops):
    texts, ending = run(text, stop=tuple(stops))
    shown = "".join(texts)
    places = [i for i in range(len(text)) if any(text.startswith(s, i) for s in stops)]
    if ending is None:
        assert not places
        held = len(text) - len(shown)
        assert text.startswith(shown)
        assert held < max((len(s) for s in stops), default=1)
    else:
        # The first to be complete ends the answer; of several complete at once, the leftmost.
        stop = plain(ending.matched)
        assert text.startswith(shown + stop)
        assert not any(s in (shown + stop)[:-1] for s in stops)
