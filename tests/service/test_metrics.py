from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import FALLBACKS, FINISHED_REASONS, LAYER_GROUPS, Metrics

NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "queued_tokens",
    "kv_cache_usage_perc",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "request_prefill_time_seconds_count",
    "request_decode_time_seconds_count",
    "attention_density_count",
    "attention_coverage_count",
    "attention_selected_keys_count",
    "attention_fallback_total",
    "attention_audit_coverage_error_count",
    "attention_seconds_count",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "brownout_level",
    "cuda_graph_replays_total",
    "cuda_graph_failures_total",
]


def samples(metrics):
    """Value by name and labels, without the model's name, which every sample must have."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny"
            key = (sample.name.removeprefix("saccade_"), *sorted(labels.items()))
            found[key] = sample.value
    return found


@pytest.mark.parametrize("name", NAMES)
def test_series_exist_at_zero_from_the_start(name):
    values = [value for key, value in samples(Metrics("tiny")).items() if key[0] == name]
    assert values
    assert not any(values)


def test_labels_that_are_known_have_their_series():
    found = samples(Metrics("tiny"))
    for reason in FINISHED_REASONS:
        assert ("request_success_total", ("finished_reason", reason)) in found
    for reason, to in FALLBACKS:
        assert ("attention_fallback_total", ("reason", reason), ("to", to)) in found
    for layers in LAYER_GROUPS:
        assert ("attention_coverage_count", ("layers", layers)) in found


def test_what_the_engine_reports_is_what_a_scrape_shows():
    metrics = Metrics("tiny")
    metrics.set_load(3, 2, 0.25)
    metrics.queued(1234)
    metrics.preempted(2)
    metrics.prompt_tokens(100)
    metrics.generation_tokens(7)
    metrics.first_token(0.03)
    metrics.inter_token(0.002)
    metrics.finished("stop", e2e=1.0, queue=0.1, prefill=0.2, decode=0.7)
    metrics.attention("first", 0.1, 0.98, 500.0)
    metrics.attention("last", 0.2, None, 600.0)
    metrics.fallback("low_coverage", "dense", 4)
    metrics.audited("middle", -0.015)
    metrics.attention_seconds("score", 3e-4)
    metrics.attention_backend("torch")
    found = samples(metrics)
    assert found[("num_requests_running",)] == 3
    assert found[("num_requests_waiting",)] == 2
    assert found[("queued_tokens",)] == 1234
    assert found[("attention_backend_info", ("backend", "torch"))] == 1
    assert found[("kv_cache_usage_perc",)] == 0.25
    assert found[("num_preemptions_total",)] == 2
    assert found[("prompt_tokens_total",)] == 100
    assert found[("generation_tokens_total",)] == 7
    assert found[("request_success_total", ("finished_reason", "stop"))] == 1
    assert found[("request_decode_time_seconds_sum",)] == 0.7
    assert found[("time_to_first_token_seconds_bucket", ("le", "0.04"))] == 1
    assert found[("time_to_first_token_seconds_bucket", ("le", "0.02"))] == 0
    assert found[("inter_token_latency_seconds_bucket", ("le", "0.0025"))] == 1
    assert found[("attention_density_sum", ("layers", "first"))] == 0.1
    assert found[("attention_coverage_count", ("layers", "last"))] == 0
    error = "attention_audit_coverage_error"
    assert found[(f"{error}_sum", ("layers", "middle"), ("sign", "under"))] == 0.015
    assert found[(f"{error}_count", ("layers", "middle"), ("sign", "over"))] == 0
    assert found[("attention_seconds_sum", ("phase", "score"))] == 3e-4
    assert found[("attention_selected_keys_sum", ("layers", "last"))] == 600
    assert found[("attention_fallback_total", ("reason", "low_coverage"), ("to", "dense"))] == 4


def test_two_replicas_in_one_process_do_not_share_series():
    one, other = Metrics("tiny"), Metrics("tiny")
    one.prompt_tokens(5)
    assert samples(other)[("prompt_tokens_total",)] == 0
