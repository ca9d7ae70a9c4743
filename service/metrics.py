"""One replica's Prometheus series, prefix `saccade_`.

Names and buckets follow vLLM's where vLLM has the series, so that its users' dashboards carry over
by changing the prefix. Series whose labels are known beforehand exist, at zero, from the start: a
rate over a counter that appears with its first increment misses that increment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Sequence

FINISHED_REASONS = ("stop", "length", "abort", "error")
LAYER_GROUPS = ("first", "middle", "last")
SIGNS = ("over", "under")
PHASES = ("score", "select", "attend")
GRAPH_PHASES = ("capture", "replay")
FALLBACKS = (
    ("short_context", "dense"),
    ("low_coverage", "dense"),
    ("kernel_error", "fixed"),
    ("kernel_error", "dense"),
    ("overload", "dynamic"),
    ("overload", "fixed"),
    ("own_pattern", "dense"),
    ("requested", "dense"),
    ("requested", "fixed"),
)

# Seconds; vLLM's, the inter-token ones with three finer buckets at the front.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_PHASE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_DENSITY = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.75, 1.0)
_COVERAGE = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
_ERROR = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_ATTENTION = tuple(1e-5 * 4**power for power in range(10))
_KEYS = tuple(float(2**power) for power in range(6, 21))


class Metrics:
    """Every series of one replica, in a registry of its own; safe to call from any thread."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._running = self._gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting to be scheduled.")
        self._brownout = self._gauge(
            "brownout_level", "How far budgets are cut under overload; 0 is not."
        )
        self._queued_tokens = self._gauge("queued_tokens", "Prompt tokens yet to be prefilled.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.")
        self._preemptions = self._counter(
            "num_preemptions", "Requests put back in the queue because the KV cache was full."
        ).labels(model_name)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.").labels(
            model_name
        )
        self._generation_tokens = self._counter(
            "generation_tokens", "Tokens generated, over all choices."
        ).labels(model_name)
        self._success = self._counter(
            "request_success", "Finished requests by reason.", "finished_reason"
        )
        self._fallback = self._counter(
            "attention_fallback", "Tokens whose attention fell back.", "reason", "to"
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN
        ).labels(model_name)
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between one token and the next.", _INTER_TOKEN
        ).labels(model_name)
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _PHASE
        ).labels(model_name)
        self._queue = self._histogram(
            "request_queue_time_seconds", "From arrival to the first step.", _PHASE
        ).labels(model_name)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", _PHASE
        ).labels(model_name)
        self._decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", _PHASE
        ).labels(model_name)
        self._density = self._histogram(
            "attention_density", "Keys attended over keys visible.", _DENSITY, "layers"
        )
        self._coverage = self._histogram(
            "attention_coverage", "Attention mass on the attended keys.", _COVERAGE, "layers"
        )
        self._selected_keys = self._histogram(
            "attention_selected_keys", "Keys attended a row and KV head.", _KEYS, "layers"
        )
        self._prefill_density = self._histogram(
            "prefill_attention_density",
            "Keys read over keys visible, a chunk of a prompt.",
            _DENSITY,
        ).labels(model_name)
        self._prefill_coverage = self._histogram(
            "prefill_attention_coverage", "Attention mass on them, a chunk of a prompt.", _COVERAGE
        ).labels(model_name)
        self._audit_error = self._histogram(
            "attention_audit_coverage_error",
            "Distance of the estimated coverage from the exact one, in sampled steps.",
            _ERROR,
            "layers",
            "sign",
        )
        self._attention_seconds = self._histogram(
            "attention_seconds", "A layer's attention by phase, in sampled steps.", _ATTENTION,
            "phase",
        )  # fmt: skip
        self._gauge("replicas", "Replicas that are alive.").set(1)
        self._backend = Gauge(
            "saccade_attention_backend_info",
            "The code that attention runs in; torch is slow.",
            ["model_name", "backend"],
            registry=self.registry,
        )
        self._graphs_replayed = self._counter(
            "cuda_graph_replays", "Decode steps replayed as CUDA graphs."
        ).labels(model_name)
        self._graphs_failed = self._counter(
            "cuda_graph_failures", "Sizes of decode steps that run without a graph.", "phase"
        )
        self._prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        ).labels(model_name)
        self._prefix_hits = self._counter(
            "prefix_cache_hits", "Prompt tokens found there, which are not computed."
        ).labels(model_name)
        for finished_reason in FINISHED_REASONS:
            self._success.labels(model_name, finished_reason)
        for reason, to in FALLBACKS:
            self._fallback.labels(model_name, reason, to)
        for layers in LAYER_GROUPS:
            for histogram in (self._density, self._coverage, self._selected_keys):
                histogram.labels(model_name, layers)
            for sign in SIGNS:
                self._audit_error.labels(model_name, layers, sign)
        for phase in PHASES:
            self._attention_seconds.labels(model_name, phase)
        for phase in GRAPH_PHASES:
            self._graphs_failed.labels(model_name, phase)

    def set_load(self, running: int, waiting: int, kv_usage: float) -> None:
        """State after a step; `kv_usage` is the share of KV pages in use, 0 to 1."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_usage.set(kv_usage)

    def queued(self, tokens: int) -> None:
        """So many prompt tokens of waiting and running requests are not yet prefilled."""
        self._queued_tokens.set(tokens)

    def brownout(self, level: int) -> None:
        """How far budgets are cut from now on."""
        self._brownout.set(level)

    def preempted(self, requests: int) -> None:
        """`requests` running requests went back to the queue."""
        self._preemptions.inc(requests)

    def prompt_tokens(self, n: int) -> None:
        """`n` more prompt tokens processed."""
        self._prompt_tokens.inc(n)

    def prefix_cache(self, queries: int, hits: int) -> None:
        """A prompt of `queries` tokens was looked up, and `hits` of them were found."""
        self._prefix_queries.inc(queries)
        self._prefix_hits.inc(hits)

    def generation_tokens(self, n: int) -> None:
        """`n` more tokens generated."""
        self._generation_tokens.inc(n)

    def first_token(self, seconds: float) -> None:
        """A request's first token came so long after its arrival."""
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        """A token came so long after the one before it."""
        self._inter_token.observe(seconds)

    def finished(
        self, reason: str, *, e2e: float, queue: float, prefill: float, decode: float
    ) -> None:
        """A request ended; phases in seconds."""
        self._success.labels(self._model_name, reason).inc()
        self._e2e.observe(e2e)
        self._queue.observe(queue)
        self._prefill.observe(prefill)
        self._decode.observe(decode)

    def attention(
        self, layers: str, density: float, coverage: float | None, selected_keys: float
    ) -> None:
        """One step's attention in a group of layers ("first", "middle" or "last")."""
        self._density.labels(self._model_name, layers).observe(density)
        self._selected_keys.labels(self._model_name, layers).observe(selected_keys)
        if coverage is not None:
            self._coverage.labels(self._model_name, layers).observe(coverage)

    def prefilled(self, density: float, coverage: float | None) -> None:
        """A chunk of a prompt's attention, mean over layers."""
        self._prefill_density.observe(density)
        if coverage is not None:
            self._prefill_coverage.observe(coverage)

    def audited(self, layers: str, error: float) -> None:
        """Estimated minus exact coverage of a sampled step in a group of layers."""
        sign = "over" if error > 0 else "under"
        self._audit_error.labels(self._model_name, layers, sign).observe(abs(error))

    def attention_seconds(self, phase: str, seconds: float) -> None:
        """One layer's share of a phase ("score", "select", "attend") in a sampled step."""
        self._attention_seconds.labels(self._model_name, phase).observe(seconds)

    def attention_backend(self, backend: str) -> None:
        """Which code attention runs in: "triton", "numba" or "torch"."""
        self._backend.labels(self._model_name, backend).set(1)

    def graphs_replayed(self, n: int) -> None:
        """`n` more decode steps were replayed as CUDA graphs."""
        self._graphs_replayed.inc(n)

    def graphs_failed(self, phase: str, n: int) -> None:
        """`n` more sizes of steps have no graph: "capture" failed, or a "replay" did."""
        self._graphs_failed.labels(self._model_name, phase).inc(n)

    def fallback(self, reason: str, to: str, tokens: int) -> None:
        """`tokens` tokens attended through `to` because of `reason`; see `FALLBACKS`."""
        self._fallback.labels(self._model_name, reason, to).inc(tokens)

    def render(self) -> bytes:
        """Every series in Prometheus's text exposition format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        gauge = Gauge(f"saccade_{name}", text, ["model_name"], registry=self.registry)
        return gauge.labels(self._model_name)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"saccade_{name}", text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(
            f"saccade_{name}",
            text,
            ["model_name", *labels],
            buckets=buckets,
            registry=self.registry,
        )
