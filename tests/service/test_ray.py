"""The Ray Serve deployment: its manifest, and one private cluster from start to end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest
import yaml
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from service.config import ServiceConfig
from service.deployment import NAME, ROUTES, build
from tests.service.conftest import saccade, write_checkpoint
from tests.service.nodes import family_of

MANIFEST = Path(__file__).resolve().parents[2] / "deploy" / "serve.yaml"


def test_the_manifest_is_valid_and_its_arguments_are_the_configurations():
    manifest = ServeDeploySchema.model_validate(yaml.safe_load(MANIFEST.read_text()))
    assert {one.name: one.route_prefix for one in manifest.applications} == ROUTES
    assert [one.import_path.partition(":")[2] for one in manifest.applications] == [
        "build",
        "build_metrics",
        "build_health",
    ]
    for application in manifest.applications:
        built = call_user_app_builder_with_args_if_necessary(
            import_attr(application.import_path), application.args
        )
        ServiceConfig.model_validate(application.args)
        assert all(one.name == built._bound_deployment.name for one in application.deployments)


def test_the_builder_takes_a_manifests_arguments_as_configuration(checkpoint):
    built = call_user_app_builder_with_args_if_necessary(
        build, {"model": str(checkpoint), "replicas": 2, "max_num_seqs": 3, "max_queue": 7}
    )
    deployment = built._bound_deployment
    assert deployment.name == NAME
    assert deployment.num_replicas == 2
    assert deployment.max_ongoing_requests > 3 + 7


def test_the_builder_configures_scaling_routing_and_updates(checkpoint):
    arguments = {
        "model": str(checkpoint),
        "drain_s": 120,
        "affinity_limit": 5,
        "update_surge_percent": 50,
        "autoscaling": {
            "min_replicas": 2,
            "max_replicas": 6,
            "queued_tokens_per_replica": 5000,
            "kv_usage": 0.7,
            "upscale_delay_s": 4,
            "downscale_delay_s": 99,
        },
    }
    built = call_user_app_builder_with_args_if_necessary(build, arguments)
    config = built._bound_deployment._deployment_config
    assert config.graceful_shutdown_timeout_s == 120
    assert config.max_surge_percent == 50
    assert config.request_router_config.request_router_kwargs == {"limit": 5}
    router = config.request_router_config.get_request_router_class()
    assert router.__name__ == "AffinityRouter"
    scaling = config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 6)
    policy = scaling.policy.get_policy()(**scaling.policy.policy_kwargs)
    assert asdict(policy._limits) == {
        "queued_tokens_per_replica": 5000,
        "kv_usage": 0.7,
        "upscale_delay_s": 4,
        "downscale_delay_s": 99,
    }


def test_behind_haproxy_the_builder_asks_for_no_router_which_serve_would_refuse(
    checkpoint, monkeypatch
):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    built = call_user_app_builder_with_args_if_necessary(build, {"model": str(checkpoint)})
    config = built._bound_deployment._deployment_config
    assert config.request_router_config.is_default_request_router()


def test_without_a_most_the_number_of_replicas_is_fixed(checkpoint):
    built = call_user_app_builder_with_args_if_necessary(build, {"model": str(checkpoint)})
    config = built._bound_deployment._deployment_config
    assert config.autoscaling_config is None
    assert config.num_replicas == 1


def test_the_builder_refuses_unknown_arguments():
    with pytest.raises(ValueError, match="prot"):
        call_user_app_builder_with_args_if_necessary(build, {"prot": 1})


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def below(process, text):
    """Ids of the processes that `process` started, or those did, whose command has `text`."""
    return [pid for pid in family_of(process.pid) if text in command_line(pid)]


def cpu_time(pid):
    """Clock ticks that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def folder_of(process):
    """Where the Ray cluster that `process` started has its files."""
    (server,) = below(process, "gcs_server")
    return Path(re.search(r"(/tmp/saccade-[^/]+)/", command_line(server))[1])


def counted(url, name):
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"saccade_{name}"))


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def served(checkpoint, file, port):
    """The process of `saccade serve`, and the service's URL; all must be gone behind the block."""
    process = saccade("serve", checkpoint, "--config", file, "--port", port)
    folder = None
    try:
        greeting = ""
        while "short_context" not in greeting:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            greeting += line
        folder, started = folder_of(process), family_of(process.pid)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert errors == ""
    assert not folder.exists()
    assert not [pid for pid in started if "saccade-" in command_line(pid)]


def test_serve_runs_on_ray_and_leaves_nothing_behind(tmp_path, tiny_file, port):
    checkpoint = write_checkpoint(tmp_path / "tiny", max_model_len=8192)
    with served(checkpoint, tiny_file, port) as (_, url):
        body = {"model": "tiny", "prompt": "x" * 50, "max_tokens": 5, "temperature": 0}

        whole = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert whole["sparsity"]["policy"] == "dynamic"
        streamed = httpx.post(f"{url}/v1/completions", json=body | {"stream": True}, timeout=60)
        *events, done = streamed.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == whole["choices"][0]["text"]

        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        for path in ("health", "v1/models"):
            named = httpx.get(f"{url}/{path}", headers={"x-request-id": "mine"})
            assert named.headers.get_list("x-request-id") == ["mine"]
        refused = httpx.post(f"{url}/v1/completions", json=body | {"n": 0})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        assert httpx.get(f"{url}/nowhere").json()["error"]["type"] == "invalid_request_error"

        # Long enough to be under way still when a busy machine has counted it.
        long = json.dumps(body | {"max_tokens": 8000, "ignore_eos": True}).encode()
        aborted = 'request_success_total{finished_reason="abort"'
        with socket.create_connection(("127.0.0.1", port)) as leaving:
            head = f"Host: saccade\r\nContent-Length: {len(long)}\r\nContent-Type: application/json"
            leaving.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + long)
            until(lambda: counted(url, "num_requests_running") == 1)
        until(lambda: counted(url, aborted) == 1)
        streamed = json.loads(long) | {"stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=streamed) as answer:
            next(answer.iter_lines())
        until(lambda: counted(url, aborted) == 2)
        until(lambda: counted(url, "num_requests_running") == 0)


def test_what_a_replica_logs_is_on_standard_error(checkpoint, tiny_file, port):
    arguments = ("--config", tiny_file, "--dtype", "float64", "--port", port)
    process = saccade("serve", checkpoint, *arguments)
    try:
        while "short_context" not in process.stdout.readline():
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert re.fullmatch(r"[-\d]+ [:,\d]+ WARNING no fast kernel takes .*\n", errors)


def test_two_replicas_are_one_service(tmp_path, tiny_file, port):
    """Their totals, a scrape while none computes, and the death of one with a stream in it."""
    checkpoint = write_checkpoint(tmp_path / "tiny", max_model_len=8192)
    # Behind HAProxy a stream whose replica dies is cut.
    settings = yaml.safe_load(tiny_file.read_text()) | {"replicas": 2, "proxy": "ray"}
    tiny_file.write_text(yaml.safe_dump(settings))
    with served(checkpoint, tiny_file, port) as (process, url):
        body = {"model": "tiny", "prompt": "x" * 50, "max_tokens": 5, "ignore_eos": True}
        for _ in range(18):
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        finished = 'request_success_total{finished_reason="length"'
        until(lambda: counted(url, finished) == 18)  # two seconds, where nothing else computes
        assert [counted(url, finished) for _ in range(6)] == [18] * 6
        assert [counted(url, "generation_tokens_total") for _ in range(6)] == [90] * 6
        assert counted(url, "replicas{") == counted(url, "replicas_wanted") == 2
        assert httpx.get(f"{url}/health").json()["replicas"] == 2
        (own,) = httpx.get(f"{url}/v1/models").headers.get_list("x-request-id")
        assert own

        # No replica answers anything for a while; these do.
        replicas = below(process, "ServeReplica:saccade:saccade")
        assert len(replicas) == 2
        try:
            for pid in replicas:
                os.kill(pid, signal.SIGSTOP)
            assert httpx.get(f"{url}/health", timeout=30).json()["replicas"] == 2
            assert counted(url, finished) == 18
        finally:
            for pid in replicas:
                os.kill(pid, signal.SIGCONT)

        long = body | {"max_tokens": 8000, "stream": True}
        idle = {pid: cpu_time(pid) for pid in replicas}
        with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            until(lambda: counted(url, "num_requests_running") == 1)
            until(lambda: counted(url, "generation_tokens_total") > 90)
            before = counted(url, "generation_tokens_total")
            busy = max(replicas, key=lambda pid: cpu_time(pid) - idle[pid])
            os.kill(busy, signal.SIGKILL)
            *_, error, done = filter(None, lines)
        assert done == "data: [DONE]"
        told = json.loads(error.removeprefix("data: "))["error"]
        assert (told["code"], told["type"]) == ("replica_lost", "service_unavailable")
        for _ in range(10):
            assert counted(url, finished) == 18
            assert counted(url, "generation_tokens_total") >= before
            time.sleep(0.1)
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        until(lambda: counted(url, finished) == 19)
        assert httpx.get(f"{url}/health").status_code == 200
