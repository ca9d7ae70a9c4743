"""The image and the composition: what they name exists, and nothing runs as root."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from service.config import ServiceConfig
from tests.deploy.monitoring import ROOT

DOCKER = ROOT / "deploy" / "docker"
TEXT = (DOCKER / "Dockerfile").read_text()


def stages():
    """Instructions by stage, with continued lines joined."""
    found, current = {}, None
    for line in TEXT.replace("\\\n", " ").splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            current = found.setdefault(match[2], [("FROM", match[1])])
        elif current is not None and line.strip() and not line.startswith("#"):
            instruction, _, rest = line.strip().partition(" ")
            current.append((instruction, rest))
    return found


def test_both_targets_end_as_another_user_than_root():
    for target in ("cpu", "cuda"):
        users = [rest for instruction, rest in stages()[target] if instruction == "USER"]
        assert users[-1] == "10001:10001"


def test_what_is_copied_is_there_and_in_the_context():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = [
        source
        for instructions in stages().values()
        for instruction, rest in instructions
        if instruction == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert set(copied) == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_settings_are_fields_of_the_service():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    names = set(re.findall(r"\bSACCADE_(?!TARGET)[A-Z_]+", TEXT))
    names |= set(compose["services"]["saccade"]["environment"])
    assert names
    assert {name.removeprefix("SACCADE_").lower() for name in names} <= set(
        ServiceConfig.model_fields
    )


def test_the_composition_mounts_and_scrapes_what_is_there():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    build = services["saccade"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).exists()
    for service in services.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            exists = (DOCKER / source).exists() if source.startswith(".") else None
            assert exists or source in compose["volumes"]
        # Reached from this machine alone.
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (target,) = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in services


def context_sources():
    """What the stage `source` copies: the wheel is built from that."""
    return [
        source
        for instruction, rest in stages()["source"]
        if instruction == "COPY"
        for source in rest.split()[:-1]
    ]


def test_the_image_installs_every_file_of_the_sources(tmp_path):
    """A wheel made as the image makes it: of no more than what is copied, and without an index."""
    for name in context_sources():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    installs = [
        rest
        for stage in ("build-cpu", "build-cuda")
        for instruction, rest in stages()[stage]
        if instruction == "RUN" and rest.endswith(" .")
    ]
    assert installs == ["pip install --no-deps --no-build-isolation ."] * 2
    options = installs[0].split()[2:]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", *options, "--wheel-dir", "made"],
        cwd=tmp_path,
        env=os.environ | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        check=True,
    )
    (wheel,) = (tmp_path / "made").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        (entries,) = [name for name in packed if name.endswith("/entry_points.txt")]
        commands = archive.read(entries).decode()
    for name in ("kernels", "models", "service"):
        files = {file for file in (tmp_path / name).rglob("*") if file.is_file()}
        assert {str(file.relative_to(tmp_path)) for file in files} <= packed
    (entry,) = [rest for instruction, rest in stages()["run"] if instruction == "ENTRYPOINT"]
    assert f"{json.loads(entry)[0]} = " in commands


@pytest.mark.parametrize(
    ("stage", "index", "cuda", "passes"),
    [
        ("build-cuda", None, "13.0", True),
        ("build-cuda", None, None, False),
        ("build-cpu", "https://an.index", None, True),
        ("build-cpu", "https://an.index", "13.0", False),
        # Three times as large, but it runs.
        ("build-cpu", None, "13.0", True),
    ],
)
def test_a_target_has_the_torch_it_needs(tmp_path, stage, index, cuda, passes):
    """The instruction itself, with stand-ins for pip and torch."""
    run = next(rest for instruction, rest in stages()[stage] if "requirements.lock" in rest)
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    pip.chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "torch.py").write_text(f"class version:\n    cuda = {cuda!r}\n")
    (tmp_path / "triton.py").touch()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    environment |= {} if index is None else {"TORCH_INDEX": index}
    done = subprocess.run(
        ["sh", "-c", run], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == passes, done.stderr
    options = ["--extra-index-url", index] if index else []
    assert done.stdout.split() == ["install", *options, "--requirement", "requirements.lock"]
    if not passes:
        assert "torch" in done.stderr.splitlines()[-1]


def test_targets_take_the_packages_of_their_own_stage():
    for target in ("cpu", "cuda"):
        copies = [rest for instruction, rest in stages()[target] if instruction == "COPY"]
        assert copies == [f"--from=build-{target} /venv /venv"]
        assert ("FROM", "run") in stages()[target]


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_asks_the_configured_port(status):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    (check,) = [rest for instruction, rest in stages()["run"] if instruction == "HEALTHCHECK"]
    program, *arguments = json.loads(check.partition("CMD ")[2])
    assert program == "python"
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        done = subprocess.run(
            [sys.executable, *arguments],
            env={"SACCADE_PORT": str(server.server_port)},
            capture_output=True,
            check=False,
        )
        server.shutdown()
        thread.join()
    assert (done.returncode == 0) == (status == 200)


def test_gpus_are_shown_by_who_starts_the_container():
    """Set in the image, it shows a node's GPUs to pods that asked for none."""
    instructions = [rest for stage in stages().values() for _, rest in stage]
    assert not any("NVIDIA_VISIBLE_DEVICES" in rest for rest in instructions)


def test_the_service_writes_to_volumes_alone():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    service = compose["services"]["saccade"]
    assert service["read_only"]
    mounts = [mount.split(":")[1] for mount in service["volumes"]] + service["tmpfs"]
    for cache in re.findall(r"\w+_CACHE_DIR=(/\S+)", TEXT):
        assert any(cache.startswith(mount + "/") for mount in mounts)
    assert "/tmp" in mounts
