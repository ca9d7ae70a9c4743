"""Brownout as configured, and over HTTP."""

from __future__ import annotations

import json

import httpx
import pytest

from service.api.app import create_app
from service.brownout_config import BrownoutConfig
from service.engine.build import build_engine
from tests.service.conftest import serving


def last_level(max_keys=1024, **settings):
    """The level that pressure without end leads to."""
    controller = BrownoutConfig(**settings).controller(max_keys)
    controller.observe(0.0, 0.0)
    for second in range(1, 100):
        controller.observe(float(second), 1e6)
    return controller.level


def test_it_is_off_by_default():
    assert last_level() == 0
    assert not BrownoutConfig().enabled


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({}, 1),  # 1024 to 512
        ({"max_keys": 4096}, 3),
        ({"max_keys": 4097}, 4),
        ({"fixed": True}, 2),  # and the pattern
        ({"fixed": True, "max_keys": 300}, 1),
        ({"halvings": 5}, 5),
        ({"halvings": 0, "fixed": True}, 1),
    ],
)
def test_the_levels_are_as_many_as_there_is_to_cut(settings, level):
    assert last_level(enabled=True, **settings) == level


def test_targets_are_in_the_units_that_their_names_say():
    for settings, gap, wait, level in (
        ({"itl_target_ms": 50}, 0.051, 0.0, 1),
        ({"itl_target_ms": 50}, 0.049, 0.0, 0),
        ({"max_wait_s": 3}, 0.0, 3.1, 1),
        ({"max_wait_s": 3}, 0.0, 2.9, 0),
    ):
        controller = BrownoutConfig(enabled=True, **settings).controller(1024)
        controller.observe(5.0, 0.0)
        controller.token(gap)
        controller.observe(6.0, wait)
        assert controller.level == level


def test_a_stream_says_how_much_of_it_was_cut(service_config):
    # The level is the test's alone to change.
    patient = BrownoutConfig(
        enabled=True, fixed=True, max_wait_s=1e9, itl_target_ms=1e9, calm_s=1e9
    )
    config = service_config.model_copy(update={"brownout": patient})
    engine = build_engine(config)
    engine.start()
    body = {"model": config.model_name, "prompt": "cut " * 40, "max_tokens": 6, "stream": True}
    body |= {"ignore_eos": True, "temperature": 0}
    try:
        with serving(create_app(engine, config)) as url:

            def ask(**sparsity):
                asked = body | {"sparsity": {"prefill": "dense"} | sparsity}
                answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
                lines = answer.text.split("\n\n")
                parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
                told = [part["sparsity"] for part in parts if "sparsity" in part]
                assert len(told) == 1 and "sparsity" in parts[-1]
                return "".join(c["text"] for p in parts for c in p["choices"]), told[0]

            whole, before = ask()
            engine._brownout.level = 1  # the pattern: 160 keys are the fewest of a sample
            cut, during = ask(pattern="window:8")
            refused, told = ask(allow_brownout=False)
            series = httpx.get(f"{url}/metrics").text
    finally:
        engine.stop()
    assert refused == whole != cut
    assert before["fallbacks"] == told["fallbacks"] == {}
    assert during["fallbacks"] == {"overload": 128 + 5}
    assert during["policy"] == "dynamic" and during["keys_attended"] == 8
    name = f'model_name="{config.model_name}",reason="overload"'
    assert f'saccade_attention_fallback_total{{{name},to="fixed"}} 133.0' in series
    assert f'saccade_attention_fallback_total{{{name},to="dynamic"}} 0.0' in series
    assert f'saccade_brownout_level{{model_name="{config.model_name}"}} 1.0' in series
