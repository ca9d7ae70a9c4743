"""The command as a user runs it: one sentence and a non-zero exit where something is wrong."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys

import httpx
import pytest

from service import cli
from service.api.state import saccade_version
from service.commands import serve
from service.config import ServiceConfig
from tests.service.conftest import ROOT, saccade


def refusal(monkeypatch, *arguments):
    """What the command says when it refuses, run in this process."""
    monkeypatch.setattr(sys, "argv", ["saccade", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code not in (None, 0)
    return caught.value.code


def damaged(checkpoint, folder, change):
    shutil.copytree(checkpoint, folder)
    change(folder)
    return folder


def truncate(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def change_architecture(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("LlamaFor", "MambaFor"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncate, "truncated or damaged"),
        (change_architecture, "MambaForCausalLM"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_one_sentence(
    monkeypatch, checkpoint, tmp_path, port, change, words
):
    folder = damaged(checkpoint, tmp_path / "damaged", change)
    said = refusal(monkeypatch, "serve", folder, "--standalone", "--port", port)
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], "/nowhere"),
        (["--port", "http"], "port"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--sparsity-coverage", "2"], "sparsity.coverage"),
        (["--limits-n", "0"], "limits.n"),
        (["--host", "192.0.2.1"], "192.0.2.1"),
        (["--max-model-len", "100000"], "100000"),
        (["--max-step-tokens", "10"], "max_step_tokens"),
    ],
)
def test_a_wrong_option_is_one_sentence(monkeypatch, checkpoint, port, arguments, words):
    model = [] if arguments[0].startswith("/") else [checkpoint]
    if arguments[0] not in ("--port", "--host"):
        arguments = [*arguments, "--port", port]
    said = refusal(monkeypatch, "serve", *model, *arguments)
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize("copies", [["--replicas", "2"], ["--autoscaling-max-replicas", "2"]])
def test_standalone_does_not_pass_over_more_copies(monkeypatch, checkpoint, port, copies):
    said = refusal(monkeypatch, "serve", checkpoint, "--port", port, "--standalone", *copies)
    assert "--standalone serves one" in said


def test_the_version_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["saccade", "--version"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"saccade {saccade_version()}\n"


def test_an_unknown_option_is_refused(monkeypatch, capsys):
    refusal(monkeypatch, "serve", "--prot", "1")
    assert "--prot" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [["--standalone"], []])
def test_a_busy_port_is_told_before_anything_is_loaded(monkeypatch, checkpoint, capsys, mode):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refusal(monkeypatch, "serve", checkpoint, "--port", port, *mode)
    assert f"port {port}" in said
    assert "in use" in said
    assert "Loading" not in capsys.readouterr().err


@pytest.mark.parametrize("mode", [["--standalone"], []])
def test_a_port_is_taken_as_soon_as_another_start_claims_it(monkeypatch, checkpoint, port, mode):
    # Ray binds late, and its proxy shares ports: until then the claim alone keeps others out.
    with serve._claim(ServiceConfig(port=port)):
        said = refusal(monkeypatch, "serve", checkpoint, "--port", port, *mode)
    assert f"port {port}" in said
    assert "in use" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--standalone", "--kv-cache-gib", "1e8"], "kv_cache_gib"),
        (["serve", "--device", "cuda:1"], "cuda"),
        (["bench", "decode", "--device", "cuda"], "cuda"),
        (["bench", "decode", "--device", "tpu"], "tpu"),
    ],
)
def test_what_this_machine_lacks_is_one_sentence(monkeypatch, checkpoint, port, arguments, words):
    if arguments[0] == "serve":
        arguments = [*arguments, "--port", port, checkpoint]
    said = refusal(monkeypatch, *arguments)
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 2048), ("cuda:1", 16_384)])
def test_the_greeting_says_what_a_short_context_is_on_the_device(device, tokens):
    assert f"fewer than\n                 {tokens} tokens" in serve._greeting(
        ServiceConfig(device=device)
    )
    assert "http://127.0.0.1:8000/explorer" in serve._greeting(ServiceConfig(device=device))
    given = ServiceConfig(device=device, sparsity={"dense_below": 77})
    assert " 77 tokens" in serve._greeting(given)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_standalone_serves_until_a_signal_and_exits_with_0(checkpoint, tiny_file, port, end):
    process = saccade(
        *("serve", checkpoint, "--standalone"), *("--config", tiny_file, "--port", port)
    )
    greeting = ""
    while "short_context" not in greeting:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        greeting += line
    assert f"curl http://127.0.0.1:{port}/v1/completions" in greeting
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/completions",
        json={"model": "tiny", "prompt": "x", "max_tokens": 2},
        timeout=30,
    )
    assert answer.status_code == 200
    process.send_signal(end)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_a_stream_that_outlives_the_service_ends_with_an_error_event(
    checkpoint, tiny_file, port, monkeypatch
):
    process = saccade(
        *("serve", checkpoint, "--standalone", "--config", tiny_file, "--port", port),
        *("--drain-s", 10),
    )
    while "short_context" not in process.stdout.readline():
        assert process.poll() is None
    body = {"model": "tiny", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "n": 4}
    sent = {"json": body | {"stream": True}, "timeout": 60}
    url = f"http://127.0.0.1:{port}/v1/completions"
    with httpx.stream("POST", url, **sent) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        *_, last = [line for line in lines if line]
    _, errors = process.communicate(timeout=60)
    assert last == "data: [DONE]"
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_generate_prints_the_text_and_then_the_report(checkpoint, tiny_file):
    process = saccade(
        *("generate", checkpoint, "--config", tiny_file),
        *("--prompt", "hello there", "--max-tokens", 5),
    )
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert len(text.rstrip("\n")) == 5
    assert '"policy": "dynamic"' in errors


def test_generate_refuses_a_prompt_over_the_models_length(monkeypatch, checkpoint, tiny_file):
    said = refusal(
        monkeypatch, "generate", checkpoint, "--config", tiny_file, "--prompt", "x" * 600
    )
    assert "512" in said


def test_generate_refuses_a_wrong_policy(monkeypatch, checkpoint):
    said = refusal(monkeypatch, "generate", checkpoint, "--prompt", "x", "--policy", "magic")
    assert "policy" in said


def test_a_foreign_kernels_package_is_named(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    process = saccade("--help", python_path=f"{tmp_path}{os.pathsep}{ROOT}", cwd=tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert str(tmp_path / "kernels") in errors
    assert errors.count("\n") == 1
