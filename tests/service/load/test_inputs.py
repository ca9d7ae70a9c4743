"""What is sent, and when: distributions, arrivals, traces, prompts, objectives."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from models.tokenizer import Tokenizer
from service.config import BUNDLED_CHECKPOINT
from service.errors import ConfigError
from service.load.arrivals import arrivals
from service.load.choice import base_url, json_fields, numbers, prompts_for
from service.load.events import EventReader, carries_tokens, parse
from service.load.lengths import parse_lengths
from service.load.objectives import good, parse_objective
from service.load.outcome import Outcome
from service.load.plan import Mix, anew, closed_plan, open_plan, traced_plan
from service.load.prompts import FittedWords, TokenIds, Words
from service.load.trace import BLOCK, read_trace
from tests.service.load.conftest import planned

MIX = Mix(parse_lengths("uniform:5,40"), parse_lengths("8"), shared=0.5, groups=3)


def draws(text, count=4000):
    lengths, rng = parse_lengths(text), np.random.default_rng(0)
    return np.array([lengths.draw(rng) for _ in range(count)])


def test_lengths_follow_their_distributions(tmp_path):
    assert set(draws("128", 10)) == {128} == set(draws("fixed:128", 10))
    assert set(draws("uniform:3,6")) == {3, 4, 5, 6}
    drawn = draws("lognormal:200,0.5")
    assert np.median(drawn) == pytest.approx(200, rel=0.05)
    assert np.log(drawn).std() == pytest.approx(0.5, rel=0.05)
    assert draws("lognormal:200,2,300").max() <= 300
    assert draws("lognormal:1,2").min() >= 1
    file = tmp_path / "lengths.txt"
    file.write_text("10\n20\n\n20\n")
    drawn = draws(f"file:{file}")
    assert set(drawn) == {10, 20}
    assert (drawn == 20).mean() == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "1.5", "nan", "many", "uniform:5", "uniform:6,5", "uniform:0,5",
     "lognormal:100", "lognormal:0,1", "lognormal:400,1,300", "lognormal:100,-1", "normal:5,1",
     "fixed:", "file:/nowhere"],
)  # fmt: skip
def test_what_is_no_distribution_is_refused(text):
    with pytest.raises(ConfigError):
        parse_lengths(text)


@pytest.mark.parametrize("content", ["", "0\n", "ten\n", "1.5\n", b"\xff\xfe"])
def test_a_file_of_other_things_than_lengths_is_refused(tmp_path, content):
    file = tmp_path / "lengths.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"lengths\.txt"):
        parse_lengths(f"file:{file}")


def test_arrivals_have_their_rate_and_repeat():
    def times(kind, seed=0, count=5000):
        return np.array(
            list(itertools.islice(arrivals(kind, 4.0, np.random.default_rng(seed)), count))
        )

    poisson = times("poisson")
    gaps = np.diff(poisson)
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential
    assert (poisson == times("poisson")).all()
    assert (poisson != times("poisson", seed=1)).all()
    assert times("constant", count=4).tolist() == [0, 0.25, 0.5, 0.75]
    with pytest.raises(ConfigError, match="bursts"):
        arrivals("bursts", 4.0, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="rate"):
        arrivals("poisson", math.nan, np.random.default_rng(0))


def test_a_later_run_asks_as_much_of_other_prompts():
    plan, prompts = closed_plan(MIX, 20, 0), TokenIds(range(1000), 0)
    again = anew(plan, 1, MIX)
    assert anew(plan, 0, MIX) == plan
    assert {one.session for one in plan} == {f"group-{number}" for number in range(3)}
    assert {one.session for one in again} == {f"group-{number}" for number in range(3, 6)}
    for one, other in zip(plan, again, strict=True):
        assert (one.prompt_tokens, one.output_tokens) == (other.prompt_tokens, other.output_tokens)
        if one.prompt_tokens >= 10:
            assert prompts.make(one)[:5] != prompts.make(other)[:5]
            assert prompts.make(one)[-5:] != prompts.make(other)[-5:]


def test_a_plan_is_the_same_for_its_seed_whatever_the_rate():
    def plan(rate, seed=0):
        return open_plan(MIX, "poisson", rate, seed, requests=50, duration=None)

    slow, fast = plan(1.0), plan(10.0)
    assert slow == plan(1.0) != plan(1.0, seed=1)
    assert [one.seed for one in slow] == [one.seed for one in fast]
    assert [one.at for one in slow] == pytest.approx([10 * one.at for one in fast])
    assert [one.prompt_tokens for one in closed_plan(MIX, 50, 0)] == [
        one.prompt_tokens for one in slow
    ]
    assert all(one.prefix_tokens == one.prompt_tokens // 2 for one in slow)
    assert {one.group for one in slow} == {0, 1, 2}
    for_two_seconds = open_plan(MIX, "constant", 10.0, 0, requests=None, duration=2.0)
    assert len(for_two_seconds) == 20
    assert len(open_plan(MIX, "constant", 10.0, 0, requests=7, duration=2.0)) == 7


def test_a_trace_is_read_in_order_and_at_its_pace(tmp_path):
    file = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 5000, "input_length": 1100, "output_length": 9, "hash_ids": [4, 5, 6]},
        {"timestamp": 3000, "input_length": 30, "output_length": 1},
        {"timestamp": 7500, "input_length": 40, "output_length": 2, "hash_ids": []},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    plan = traced_plan(read_trace(file), 0, speed=2.0, requests=None, duration=None)
    assert [one.at for one in plan] == [0, 1.0, 2.25]
    assert [(one.prompt_tokens, one.output_tokens) for one in plan] == [(30, 1), (1100, 9), (40, 2)]
    assert plan[1].blocks == (4, 5, 6)
    assert len(traced_plan(read_trace(file), 0, speed=2.0, requests=2, duration=None)) == 2
    assert len(traced_plan(read_trace(file), 0, speed=2.0, requests=None, duration=1.5)) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{half", "line 2: not a JSON object"),
        ("[1]", "line 2: not a JSON object"),
        ('{"input_length": 1, "output_length": 1}', "line 2: timestamp"),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1}', "line 2: timestamp"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}', "line 2: input_length"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1.5}', "line 2: output_length"),
        (
            '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}',
            "line 2: hash_ids",
        ),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(tmp_path, line, words):
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1}\n' + line)
    with pytest.raises(ConfigError, match=words):
        read_trace(file)


def test_an_empty_or_missing_trace_is_refused(tmp_path):
    file = tmp_path / "trace.jsonl"
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(file)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no request"):
        read_trace(file)


# -- prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(), (7, 8)])
@pytest.mark.parametrize("kind", [TokenIds, Words])
def test_prompts_share_what_they_should_and_no_more(kind, blocks):
    prompts = kind(range(10, 500), 0) if kind is TokenIds else kind(0)

    def tokens(**fields):
        made = prompts.make(planned(**fields))
        return made if kind is TokenIds else made.split()

    shared = BLOCK + 88 if blocks else 100
    rest = {"blocks": blocks, "prefix_tokens": 100}
    one = tokens(tokens=600, seed=1, **rest)
    other = tokens(tokens=600, seed=2, **rest)
    longer = tokens(tokens=700, seed=2, **(rest | {"prefix_tokens": 120}))
    assert len(one) == len(other) == 600
    assert one[:shared] == other[:shared]
    assert one[:100] == longer[:100]
    assert one == tokens(tokens=600, seed=1, **rest)
    if not blocks:
        assert one[shared : shared + 20] != other[shared : shared + 20]
        assert one[:100] != tokens(tokens=600, seed=1, group=1, prefix_tokens=100)[:100]


@pytest.mark.parametrize("special", [False, True])
def test_words_are_counted_by_the_servers_tokenizer(special):
    tokenizer = Tokenizer.from_folder(BUNDLED_CHECKPOINT)
    prompts = FittedWords(tokenizer, 0, special=special)
    for number, length in enumerate((1 + special, 2, 17, 100, 1500)):
        text = prompts.make(planned(tokens=length, seed=number, prefix_tokens=length // 3))
        assert len(tokenizer.encode(text, add_special_tokens=special)) == length
    first, second = (
        prompts.make(planned(tokens=200, seed=seed, prefix_tokens=100)) for seed in (1, 2)
    )
    assert first.split()[:90] == second.split()[:90]


def test_how_prompts_are_made_is_chosen_or_refused():
    assert isinstance(prompts_for("chat", None, None, 0), Words)
    assert isinstance(prompts_for("completions", None, None, 0), TokenIds)
    assert isinstance(prompts_for("chat", BUNDLED_CHECKPOINT, None, 0), FittedWords)
    made = prompts_for("completions", None, "5-6", 0).make(planned(tokens=100))
    assert set(made) == {5, 6}
    for endpoint, folder, ids in [
        ("chat", None, "5-6"),
        ("completions", BUNDLED_CHECKPOINT, "5-6"),
        ("completions", None, "6-5"),
        ("completions", None, "many"),
    ]:
        with pytest.raises(ConfigError, match="token-ids"):
            prompts_for(endpoint, folder, ids, 0)


# -- the rest of the command line, and events -----------------------------------------------------


def test_objectives_decide_what_is_good():
    outcome = Outcome(1.0, 1.0, 5, output_tokens=4, tokens_at=[1.5, 1.6, 1.7, 2.3], ended=2.4)
    assert good(outcome, [])
    limits = {"ttft": 0.5, "tpot": 0.8 / 3, "e2e": 1.3, "itl": np.percentile([0.1, 0.1, 0.6], 95)}
    for measure, limit in limits.items():
        assert good(outcome, [parse_objective(f"{measure}:{limit + 1e-6}")])
        assert not good(outcome, [parse_objective(f"{measure}:{limit - 1e-6}")])
    lone = Outcome(0.0, 0.0, 5, output_tokens=1, tokens_at=[1.0])
    assert good(lone, [parse_objective("itl:0.01"), parse_objective("tpot:0.01")])
    lone.error = "timeout"
    assert not good(lone, [])
    for text in ("ttft", "ttft:", "ttft:0", "ttft:nan", "speed:1", "ttft:-1", "ttft:inf"):
        with pytest.raises(ConfigError, match="--slo"):
            parse_objective(text)


def test_urls_numbers_and_json_are_checked():
    assert base_url("http://h:1/v1/") == base_url("http://h:1") == "http://h:1"
    for url in ("h:1", "ftp://h", "http://", "http://h?x=1"):
        with pytest.raises(ConfigError, match="--url"):
            base_url(url)
    assert numbers("1,2.5", "--rate") == [1, 2.5]
    for text in ("", "1,", "0", "-1", "nan", "x"):
        with pytest.raises(ConfigError, match="--rate"):
            numbers(text, "--rate")
    assert json_fields('{"a": 1}', "--extra") == {"a": 1}
    for text in ("", "[]", "{", "null"):
        with pytest.raises(ConfigError, match="--extra"):
            json_fields(text, "--extra")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_events_are_read_however_they_are_cut(size, end):
    lines = [
        ": comment", "", 'data: {"a":1}', "", "event: x", "id: 1", "data:two", "", "retry: 5", "",
        "data: one", "data:  more", "", "data: [DONE]", "", "data: never ended",
    ]  # fmt: skip
    stream = end.join(lines).encode()
    reader = EventReader()
    events = [
        data for at in range(0, len(stream), size) for data in reader.feed(stream[at : at + size])
    ]
    assert events == [b'{"a":1}', b"two", b"one\n more", b"[DONE]"]


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([], False),
        ([{"text": "a", "finish_reason": None}], True),
        ([{"text": "", "finish_reason": None}], True),
        ([{"text": "", "finish_reason": "stop"}], False),
        ([{"text": "a", "finish_reason": "length"}], True),
        ([{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}], False),
        ([{"delta": {"role": "assistant", "content": "a"}}], True),
        ([{"delta": {"content": ""}, "finish_reason": None}], True),
        ([{"delta": {}, "finish_reason": "stop"}], False),
        ([{"delta": {"content": ""}, "finish_reason": "stop"}], False),
        ([{"delta": {"reasoning_content": "hm"}}], True),
    ],
)
def test_which_chunks_are_tokens(choices, expected):
    assert carries_tokens({"choices": choices}) is expected


def test_an_event_must_be_an_object():
    for data in (b"[]", b"1", b"{", b"\xff"):
        with pytest.raises(ValueError, match=r"."):
            parse(data)
