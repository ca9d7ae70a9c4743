from __future__ import annotations

import json
import pickle

import pytest

from service.config import BUNDLED_CHECKPOINT, ServiceConfig, load_config
from service.errors import ConfigError
from service.sparsity import (
    CPU_DENSE_BELOW,
    CPU_PREFILL_DENSE_BELOW,
    GPU_DENSE_BELOW,
    GPU_PREFILL_DENSE_BELOW,
    TILES_PREFILL_DENSE_BELOW,
)


def write(path, text):
    path.write_text(text)
    return path


def test_defaults_serve_the_bundled_checkpoint_on_this_machine_alone():
    config = load_config()
    assert config.model == BUNDLED_CHECKPOINT
    assert config.model_name == "saccade-12m"
    assert config.host == "127.0.0.1"
    assert config.sparsity.resolve().policy == "dynamic"


def test_flags_win_over_variables_over_the_file_over_defaults(tmp_path, monkeypatch):
    file = write(
        tmp_path / "c.yaml",
        "port: 1\nmax_queue: 1\nmax_num_seqs: 1\nsparsity: {coverage: 0.5, max_keys: 500}\n",
    )
    monkeypatch.setenv("SACCADE_PORT", "2")
    monkeypatch.setenv("SACCADE_MAX_QUEUE", "2")
    monkeypatch.setenv("SACCADE_SPARSITY__COVERAGE", "0.6")
    config = load_config({"port": "3", "sparsity": {"min_keys": "7"}}, file)
    assert (config.port, config.max_queue, config.max_num_seqs) == (3, 2, 1)
    assert config.prefill_chunk == ServiceConfig.model_fields["prefill_chunk"].default
    assert config.sparsity.coverage == 0.6
    assert config.sparsity.max_keys == 500
    assert config.sparsity.min_keys == 7


def test_a_json_file_reads_like_yaml(tmp_path):
    file = write(tmp_path / "c.json", json.dumps({"port": 9, "sparsity": {"policy": "dense"}}))
    config = load_config(file=file)
    assert (config.port, config.sparsity.policy) == (9, "dense")


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_config(file=write(tmp_path / "c.yaml", "# nothing\n")) == load_config()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"prot": 1}, ["prot", "unknown"]),
        ({"sparsity": {"max_key": 1}}, ["sparsity.max_key", "unknown"]),
        ({"limits": {"m": 1}}, ["limits.m", "unknown"]),
        ({"port": "x"}, ["port", "integer", "'x'"]),
        ({"port": 70000}, ["port", "65535"]),
        ({"dtype": "int8"}, ["dtype", "bfloat16"]),
        ({"device": "tpu"}, ["device", "tpu"]),
        ({"kv_cache_gib": "nan"}, ["kv_cache_gib", "finite"]),
        ({"replicas": 0}, ["replicas"]),
        ({"replicas": 2, "autoscaling": {"max_replicas": 4}}, ["replicas", "2", "max_replicas"]),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, ["autoscaling", "3", "2"]),
        ({"autoscaling": {"kv_usage": 0}}, ["autoscaling.kv_usage"]),
        ({"autoscaling": {"replicas": 2}}, ["autoscaling.replicas", "unknown"]),
        ({"brownout": {"max_wait_s": 0}}, ["brownout.max_wait_s", "greater than 0"]),
        ({"brownout": {"itl_target_ms": float("inf")}}, ["brownout.itl_target_ms"]),
        ({"brownout": {"calm_s": 0.5}}, ["brownout.calm_s", "1"]),
        ({"brownout": {"halvings": 17}}, ["brownout.halvings", "16"]),
        ({"brownout": {"level": 1}}, ["brownout.level", "unknown"]),
        (
            {"brownout": {"enabled": True, "halvings": 0, "fixed": False}},
            ["brownout", "halvings is 0", "enabled to false"],
        ),
        (
            {"brownout": {"enabled": True}, "sparsity": {"max_keys": 512}},
            ["brownout.enabled", "sparsity.max_keys 512", "halvings"],
        ),
        ({"limits": {"priority": -1}}, ["limits.priority"]),
        ({"drain_s": 5}, ["drain_s", "10"]),
        ({"update_surge_percent": 101}, ["update_surge_percent", "100"]),
        ({"api_key": ""}, ["api_key"]),
        ({"sparsity": {"coverage": 1.5}}, ["sparsity.coverage"]),
        ({"sparsity": {"max_keys": 0}}, ["sparsity", "max_keys"]),
        ({"sparsity": {"min_keys": 3000, "max_keys": 2000}}, ["sparsity", "min_keys"]),
        ({"sparsity": {"pattern": "windw:3"}}, ["sparsity.pattern", "windw", "window"]),
        ({"sparsity": {"pattern": "sinks:16+strided:8"}}, ["sparsity", "strided:8", "window:64"]),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence_that_names_the_key(flags, words):
    with pytest.raises(ConfigError) as caught:
        load_config(flags)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "name",
    ["SACCADE_PROT", "SACCADE_PORT__X", "SACCADE_SPARSITY__X", "SACCADE_SPARSITY__POLICY__X"],
)
def test_an_unknown_variable_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=name):
        load_config()
    with pytest.raises(ValueError, match=name):
        ServiceConfig.model_validate({})  # as Ray Serve reads a manifest's arguments


def test_a_group_variable_that_is_not_json_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv("SACCADE_SPARSITY", "dense")
    with pytest.raises(ConfigError, match=r"sparsity.*JSON"):
        load_config()


@pytest.mark.parametrize(
    ("text", "words"),
    [("port: [1", "line"), ("- 1\n- 2\n", "key: value"), ("1: 2\n", "key: value")],
)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(file=write(tmp_path / "c.yaml", text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(file=tmp_path / "none.yaml")


def test_the_api_key_shows_up_in_no_message_or_representation():
    config = load_config({"api_key": "sk-123"})
    assert "sk-123" not in repr(config)
    with pytest.raises(ConfigError) as caught:
        load_config({"api_key": ["sk-123"]})
    assert "sk-123" not in str(caught.value)


def test_a_replica_gets_the_configuration_as_it_was(monkeypatch):
    sent = pickle.dumps(load_config({"port": 5, "sparsity": {"coverage": 0.7}}))
    monkeypatch.setenv("SACCADE_PORT", "6")
    config = pickle.loads(sent)
    assert (config.port, config.sparsity.coverage) == (5, 0.7)


def test_auto_is_resolved():
    assert load_config({"sparsity": {"policy": "auto"}}).sparsity.resolve().policy == "dynamic"


@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [
        ({}, "cpu", CPU_DENSE_BELOW),
        ({}, "cuda", GPU_DENSE_BELOW),
        ({}, "cuda:1", GPU_DENSE_BELOW),
        ({"dense_below": 0}, "cuda", 0),
        ({"dense_below": 500}, "cpu", 500),
    ],
)
def test_short_contexts_are_dense_by_the_device_unless_a_number_is_given(given, device, expected):
    assert load_config({"sparsity": given}).sparsity.dense_below_on(device) == expected


@pytest.mark.parametrize(
    ("given", "device", "tiles", "expected"),
    [
        ({}, "cpu", False, CPU_PREFILL_DENSE_BELOW),
        ({}, "cpu", True, TILES_PREFILL_DENSE_BELOW),
        ({}, "cuda:1", False, GPU_PREFILL_DENSE_BELOW),
        ({"prefill_dense_below": 500}, "cpu", True, 500),
    ],
)
def test_a_prompts_start_is_dense_by_the_device(given, device, tiles, expected):
    sparsity = load_config({"sparsity": given}).sparsity
    assert sparsity.prefill_dense_below_on(device, tiles=tiles) == expected


@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ({}, 1),
        ({"replicas": 3}, 3),
        ({"autoscaling": {"max_replicas": 4}}, 4),
        ({"replicas": 3, "update_surge_percent": 25}, 4),
        ({"autoscaling": {"max_replicas": "4"}, "update_surge_percent": "100"}, 8),
    ],
)
def test_copies_that_there_may_be_share_the_machine(flags, most):
    assert load_config(flags).most_replicas == most
