"""The Ray Serve deployment: its manifest, and one private cluster from start to end."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from service.config import ServiceConfig
from service.deployment import NAME, build
from service.processes import descendants
from tests.service.conftest import saccade

MANIFEST = Path(__file__).resolve().parents[2] / "deploy" / "serve.yaml"


def test_the_manifest_is_valid_and_its_arguments_are_the_configurations():
    manifest = ServeDeploySchema.model_validate(yaml.safe_load(MANIFEST.read_text()))
    (application,) = manifest.applications
    assert application.import_path == "service.deployment:build"
    ServiceConfig.model_validate(application.args)


def test_the_builder_takes_a_manifests_arguments_as_configuration(checkpoint):
    built = call_user_app_builder_with_args_if_necessary(
        build, {"model": str(checkpoint), "replicas": 2, "max_num_seqs": 3, "max_queue": 7}
    )
    deployment = built._bound_deployment
    assert deployment.name == NAME
    assert deployment.num_replicas == 2
    assert deployment.max_ongoing_requests > 3 + 7


def test_the_builder_refuses_unknown_arguments():
    with pytest.raises(ValueError, match="prot"):
        call_user_app_builder_with_args_if_necessary(build, {"prot": 1})


def processes_with(text):
    """Command lines, and ids, of the processes that mention `text`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if text in command:
                found.append((command, int(entry.name)))
    return found


def counted(url, name):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"saccade_{name}"))


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_serve_runs_on_ray_and_leaves_nothing_behind(checkpoint, tiny_file, port):
    process = saccade("serve", checkpoint, "--config", tiny_file, "--port", port)
    try:
        greeting = ""
        while "short_context" not in greeting:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            greeting += line
        url = f"http://127.0.0.1:{port}"
        below = {one.pid for one in descendants(process.pid)}
        (configuration,) = {
            word
            for command, pid in processes_with("/haproxy.cfg")
            if pid in below
            for word in command.split()
            if word.endswith("/haproxy.cfg")
        }
        folder = Path(*Path(configuration).parts[:3])  # /tmp/saccade-...
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
        refused = httpx.post(f"{url}/v1/completions", json=body | {"n": 0})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        assert httpx.get(f"{url}/nowhere").json()["error"]["type"] == "invalid_request_error"

        long = json.dumps(body | {"max_tokens": 400, "ignore_eos": True}).encode()
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
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert errors == ""
    assert not folder.exists()
    assert not processes_with(str(folder))
