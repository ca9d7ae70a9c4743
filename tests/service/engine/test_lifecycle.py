"""Requests from arrival to their one terminal event, whatever happens in between."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from service.errors import EngineDeadError, OverloadedError, RequestError
from tests.service.engine.tiny import (
    VOCAB,
    dynamic,
    greedy,
    prompt_of,
    text_of,
    tiny_config,
    tokens_of,
)


def sample(harness, name, **labels):
    return harness.engine.metrics.registry.get_sample_value(
        f"saccade_{name}", {"model_name": "tiny", **labels}
    )


def test_deltas_carry_tokens_text_and_one_ending(harness):
    one = harness()
    [deltas] = one.run(one.generate(prompt_of(100), greedy(12)))
    assert len(tokens_of(deltas)) == 12
    assert text_of(deltas) == "".join(chr(0x100 + t) for t in tokens_of(deltas))
    assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]


def test_metrics_count_what_was_done(harness):
    one = harness()
    one.run(*(one.generate(prompt_of(40 + i), greedy(5), n=2) for i in range(3)))
    assert sample(one, "request_success_total", finished_reason="length") == 3
    assert sample(one, "prompt_tokens_total") == 40 + 41 + 42
    assert sample(one, "generation_tokens_total") == 30
    assert sample(one, "time_to_first_token_seconds_count") == 3
    assert sample(one, "inter_token_latency_seconds_count") == 6 * 4
    for phase in ("e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert sample(one, f"{phase}_seconds_count") == 3
    assert sample(one, "num_requests_running") == 0
    assert sample(one, "kv_cache_usage_perc") == 0
    for layers in ("first", "middle", "last"):
        assert sample(one, "attention_density_count", layers=layers) > 0
        assert sample(one, "attention_coverage_count", layers=layers) > 0


def test_logprobs_come_with_their_tokens(harness):
    one = harness()
    prompt = prompt_of(300)
    [deltas] = one.run(one.generate(prompt, greedy(6, logprobs=3, prompt_logprobs=2)))
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert [e.token_id for e in entries] == tokens_of(deltas)
    assert all(e.top[0][0] == e.token_id and len(e.top) == 3 for e in entries)
    asked = deltas[0].prompt_logprobs
    assert [e.token_id for e in asked] == prompt
    assert asked[0].logprob is None and all(e.logprob < 0 for e in asked[1:])
    # The prompt's log-probabilities are those of generating it.
    longer = [*prompt, *tokens_of(deltas)]
    [again] = one.run(one.generate(longer, greedy(0, prompt_logprobs=0), dynamic(policy="dense")))
    [plain] = one.run(one.generate(prompt, greedy(6, logprobs=0), dynamic(policy="dense")))
    if tokens_of(plain) == tokens_of(deltas):
        tail = [e.logprob for e in again[0].prompt_logprobs][-6:]
        assert tail == pytest.approx([e.logprob for d in plain for e in d.logprobs], abs=1e-9)
    assert again[0].finish_reason == "length" and again[0].token_ids == ()


def test_a_prompts_log_probabilities_are_named_step_by_step(harness, monkeypatch):
    """Those of a long prompt, all in one step, would keep everybody else waiting."""
    one = harness(prefill_chunk=64)
    named, run, text = [0], one.runner.run, one.engine.tokenizer.token_text
    monkeypatch.setattr(one.runner, "run", lambda work: named.append(0) or run(work))

    def counted(token):
        named[-1] += 1
        return text(token)

    monkeypatch.setattr(one.engine.tokenizer, "token_text", counted)
    [deltas] = one.run(one.generate(prompt_of(600), greedy(1, prompt_logprobs=3)))
    assert len(deltas[0].prompt_logprobs) == 600
    assert sum(named) == 1 + 599 * 4
    assert max(named) <= 128 * 4 + 1  # the tail's, which is one step


def test_stop_strings_end_the_answer_early(harness):
    one = harness()
    full = one.run(one.generate(prompt_of(30), greedy(20)))[0]
    stop = text_of(full)[5:7]
    [deltas] = one.run(one.generate(prompt_of(30), greedy(20, stop=(stop,))))
    assert text_of(deltas) == text_of(full)[: text_of(full).index(stop)]
    assert deltas[-1].finish_reason == "stop" and deltas[-1].stop_reason == stop


def test_closing_a_stream_frees_its_pages(harness):
    one = harness()

    async def leave():
        stream = one.engine.submit(prompt_of(300), greedy(3000), dynamic(), n=3, request_id="left")
        await anext(stream)
        stream.close()
        for _ in range(500):
            if one.engine._scheduler.pool.usage == 0:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("pages still held")

    one.run(leave())
    assert sample(one, "request_success_total", finished_reason="abort") == 1


def test_a_full_queue_refuses_at_once(harness):
    one = harness(max_seqs=1, max_queue=2)

    async def crowd():
        streams = []
        with pytest.raises(OverloadedError, match=r"queue is full \([23] waiting\)"):
            for i in range(10):
                stream = one.engine.submit(
                    prompt_of(500), greedy(100), dynamic(), request_id=f"c{i}"
                )
                streams.append(stream)
        assert len(streams) >= 2
        for stream in streams:
            stream.close()
        while one.engine._counts.waiting:
            await asyncio.sleep(0.01)

    one.run(crowd())
    assert len(one.tokens(prompt_of(20), greedy(4))) == 4


def test_an_idle_engine_without_a_queue_takes_what_it_can_run(harness):
    one = harness(max_seqs=2, max_queue=0)
    assert len(one.tokens(prompt_of(20), greedy(4))) == 4
    assert len(one.run(one.generate(prompt_of(20), greedy(4), n=2))[0]) == 8

    async def never():
        with pytest.raises(RequestError, match="3 choices") as caught:
            one.engine.submit(prompt_of(20), greedy(4), dynamic(), n=3, request_id="x")
        assert caught.value.param == "n"

    one.run(never())


def test_a_prompt_as_long_as_the_model_and_the_cache_is_served(harness):
    one = harness(pages=8, max_model_len=512)
    exact = greedy(0, prompt_logprobs=0)
    [deltas] = one.run(one.generate(prompt_of(512), exact))
    assert len(deltas[0].prompt_logprobs) == 512
    assert len(one.tokens(prompt_of(511), greedy(1))) == 1


def test_choices_report_the_question_that_they_share(harness):
    one = harness()
    [single] = one.run(one.generate(prompt_of(1000), greedy(1)))
    [deltas] = one.run(one.generate(prompt_of(1000), greedy(1), n=3))
    reports = [delta.sparsity for delta in deltas if delta.finish_reason]
    assert len(reports) == 3
    for report in reports:
        assert report.density == pytest.approx(single[-1].sparsity.density)
        assert report.coverage == pytest.approx(single[-1].sparsity.coverage)


def test_a_dense_layer_with_a_window_reads_the_window(harness):
    windows = (128, None, 128)
    one = harness(config=replace(tiny_config(), windows=windows))
    [deltas] = one.run(one.generate(prompt_of(1000), greedy(1), dynamic(policy="dense")))
    report = deltas[-1].sparsity
    assert report.density == 1.0
    assert report.keys_attended == pytest.approx((128 + 936.5 + 128) / 3)


@pytest.mark.parametrize(
    ("prompt", "sampling", "sparsity", "param"),
    [
        ([], greedy(1), dynamic(), "prompt"),
        ([VOCAB], greedy(1), dynamic(), "prompt"),
        ([-1], greedy(1), dynamic(), "prompt"),
        ([1] * 5000, greedy(1), dynamic(), "prompt"),
        ([1], greedy(5000), dynamic(), "max_tokens"),
        ([1], greedy(1, stop_token_ids=(999,)), dynamic(), "stop_token_ids"),
        ([1], greedy(1, logit_bias=((999, 1.0),)), dynamic(), "logit_bias"),
        ([1], greedy(1), dynamic(pattern="nonsense"), "sparsity.pattern"),
        ([1], greedy(1), dynamic(max_keys=0), "sparsity.max_keys"),
        ([1], greedy(1), dynamic(coverage=2.0), "sparsity.coverage"),
    ],
)
def test_what_cannot_be_served_names_its_field(harness, prompt, sampling, sparsity, param):
    one = harness()

    async def refused():
        with pytest.raises(RequestError) as caught:
            one.engine.submit(prompt, sampling, sparsity, request_id="x")
        assert caught.value.param == param

    one.run(refused())


def test_stopping_ends_every_stream(harness):
    one = harness()

    async def interrupted():
        stream = one.engine.submit(prompt_of(200), greedy(3000), dynamic(), n=2, request_id="i")
        await anext(stream)
        one.engine.stop()
        return [delta async for delta in stream]

    [deltas] = one.run(interrupted())
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["abort", "abort"]
    assert not one.engine.health().alive

    async def late():
        with pytest.raises(EngineDeadError):
            one.engine.submit([1], greedy(1), dynamic(), request_id="late")

    one.run(late())


def test_a_step_loop_that_dies_says_so_to_everyone(harness, monkeypatch):
    one = harness()

    def broken(self):
        raise RuntimeError("bug")

    async def hit():
        stream = one.engine.submit(prompt_of(200), greedy(3000), dynamic(), request_id="i")
        await anext(stream)
        monkeypatch.setattr("service.engine.scheduler.Scheduler.schedule", broken)
        return [delta async for delta in stream]

    [deltas] = one.run(hit())
    assert deltas[-1].finish_reason == "error" and "step loop failed" in deltas[-1].error
    health = one.engine.health()
    assert not health.alive and "RuntimeError" in health.reason


@pytest.mark.parametrize("where", ["pages.PagePool.release", "answers.Answers._emit"])
def test_a_step_loop_that_cannot_even_end_its_requests_says_so_too(harness, monkeypatch, where):
    """Pages that do not add up, say: what failed fails again at the end of every sequence."""
    one = harness(max_seqs=3)

    def broken(*_):
        raise AssertionError("bug")

    async def ask(number):
        stream = one.engine.submit(
            prompt_of(200), greedy(3000 if number else 40), dynamic(), n=2, request_id=f"{number}"
        )
        if number == 0:
            await anext(stream)
            monkeypatch.setattr(f"service.engine.{where}", broken)
        return [delta async for delta in stream]

    for deltas in one.run(*(ask(number) for number in range(3))):
        assert [delta.index for delta in deltas if delta.finish_reason == "error"] == [0, 1]
        assert all("step loop failed" in delta.error for delta in deltas if delta.error)
    assert not one.engine.health().alive
    assert sample(one, "request_success_total", finished_reason="error") == 3
