"""Reading patterns: every mistake is pointed at, and hostile text costs nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import PatternError
from kernels.patterns.expression import Intersection, Union
from kernels.patterns.fixed import Fixed
from kernels.patterns.parse import DEPTH, LENGTH, MOST, PRIMITIVES
from kernels.patterns.pattern import Pattern
from kernels.patterns.random_blocks import Random
from kernels.patterns.sinks import Sinks
from kernels.patterns.strided import Strided
from kernels.patterns.window import Window

MISTAKES = [  # text, the character, what the message says
    ("", 1, "write one of full, window:w"),
    ("   ", 4, "write one of"),
    ("windw:3", 1, "at 'windw'.*write one of full, window:w.*or nothing but the name of a preset"),
    ("spiral:3", 1, "such as sinks:16"),
    ("window", 7, "at the end, character 7: write window:w with numbers for its letters"),
    ("window:", 8, "write window:w with numbers from 1 to 2147483648"),
    ("window:0", 8, "numbers from 1"),
    ("window:-3", 8, "at '-'"),
    ("window:1.5", 9, "at '.'"),
    ("window:1e3", 9, "at 'e'"),
    ("window:٣", 8, "write window:w"),
    ("window:²", 8, "write window:w"),
    ("sinks:99999999999", 7, "at '99999999999'"),
    ("sinks:2147483649", 7, "to 2147483648"),
    ("window:3,4", 9, r"write \+ or &"),
    ("dilated:3", 10, "write dilated:w,d"),
    ("axial:3,", 9, "write axial:rows,cols"),
    ("fixed:4,5", 1, "c of fixed:l,c must not be more than l, 4, but is 5"),
    ("random:1,-1", 10, "numbers from 0"),
    ("full:3", 5, "or nothing"),
    ("+", 1, r"at '\+'"),
    ("window:8+", 10, "at the end"),
    ("window:8++full", 10, r"at '\+'"),
    ("window:8 full", 10, "at 'full'"),
    ("(window:8", 10, r"or \)"),
    ("window:8)", 9, r"at '\)'"),
    ("()", 2, r"at '\)'"),
    ("window:8@", 10, "write bidirectional or causal"),
    ("window:8@both", 10, "write bidirectional or causal"),
    ("window:8@bidirectional@causal", 23, "write nothing behind @bidirectional"),
    ("(window:8@bidirectional)", 10, r"or \)"),
    ("mistral+full", 1, "at 'mistral'"),
    ("window:8\n+full", 9, "or nothing"),
    ("Window:8", 1, "at 'W'"),
]


@pytest.mark.parametrize(("text", "character", "says"), MISTAKES)
def test_a_mistake_is_pointed_at(text, character, says):
    with pytest.raises(PatternError, match=says) as caught:
        Pattern.parse(text)
    message, shown, mark = str(caught.value).split("\n")
    assert f"character {character}:" in message
    assert mark == "  " + " " * (character - 1) + "^"
    assert len(shown) == len(text) + 2


@settings(deadline=None)
@given(
    st.text(st.sampled_from("full window:strided,0123456789+&()@ \n\tlongformer²é"), max_size=300)
)
def test_anything_is_read_or_pointed_at(text):
    try:
        pattern = Pattern.parse(text)
    except PatternError as error:
        assert len(str(error)) < 1500
    else:
        assert Pattern.parse(str(pattern)) == pattern


def test_blanks_parentheses_and_zeros_do_not_matter():
    text = " ( sinks : 004 + window:10 & ((strided:2)) ) @ causal "
    pattern = Pattern.parse(text)
    assert pattern.expression == Union((Sinks(4), Intersection((Window(10), Strided(2)))))
    assert str(pattern) == "sinks:4+window:10&strided:2"
    assert str(Pattern.parse("(sinks:4+window:10)&strided:2@bidirectional")) == (
        "(sinks:4+window:10)&strided:2@bidirectional"
    )


def test_limits_of_length_depth_and_size():
    longest = "full" + " " * 250 + "+f"
    assert len(longest) == LENGTH
    with pytest.raises(PatternError, match="character 256"):
        Pattern.parse(longest)
    with pytest.raises(PatternError, match="the pattern has 257 characters: write at most 256"):
        Pattern.parse(longest + "f")
    with pytest.raises(PatternError, match="the pattern has 10000000 characters"):
        Pattern.parse("(" * 10**7)
    most = "full+" * (MOST - 1) + "full"
    assert len(Pattern.parse(most).primitives) == MOST
    with pytest.raises(PatternError, match=f"character {5 * MOST + 1}: leave some primitives out"):
        Pattern.parse(f"{most}+full")
    assert Pattern.parse("(" * DEPTH + "full" + ")" * DEPTH) == Pattern.parse("full")
    with pytest.raises(PatternError, match=rf"character {DEPTH + 1}: close some parentheses"):
        Pattern.parse("(" * (DEPTH + 1) + "full" + ")" * (DEPTH + 1))
    with pytest.raises(PatternError, match="numbers from 1 to"):
        Pattern.parse("window:" + "9" * 240)


@pytest.mark.parametrize("kind", PRIMITIVES)
def test_every_primitive_takes_the_largest_numbers_and_no_larger(kind):
    letters = kind.form.partition(":")[2].split(",") if ":" in kind.form else []
    largest = kind(*[2**31] * len(letters))
    for ending in ("", "@bidirectional"):
        pattern = Pattern.parse(str(largest) + ending)
        assert pattern.expression == largest
        assert pattern.selected_keys(300) == int(pattern.mask(300, 300).sum())
    for number in range(len(letters)):
        numbers = [2**31] * len(letters)
        numbers[number] += 1
        with pytest.raises(PatternError, match="must lie in"):
            kind(*numbers)


def test_a_seed_may_be_zero_and_nothing_else():
    assert Random(1, 0).seed == 0
    with pytest.raises(PatternError, match="count of random:r,seed must lie in 1"):
        Random(0, 1)
    with pytest.raises(PatternError, match="must not be more than l"):
        Fixed(4, 5)


def test_a_causal_model_refuses_a_bidirectional_pattern():
    assert Pattern.parse_causal("mistral") == Pattern.parse("window:4096")
    for text in ("longformer", "global:1+window:512@bidirectional"):
        with pytest.raises(PatternError, match=r"is bidirectional.*write global:1\+window:512$"):
            Pattern.parse_causal(text)
    with pytest.raises(PatternError, match="cannot read"):
        Pattern.parse_causal("windw:3")
