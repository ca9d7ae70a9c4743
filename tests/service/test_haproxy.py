"""HAProxy in front of the replicas: what is made of Ray's configuration, and what it answers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from service import haproxy
from service.config import ServiceConfig
from service.errors import ConfigError
from service.haproxy_start import TemplateError, corrected


def written_by_ray(folder):
    """The configuration that Ray itself writes for one replica."""
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=8000),
        metrics_enabled=False,
        socket_path=str(folder / "a"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        is_head=True,
    )
    replica = ServerConfig("replica", "127.0.0.1", 1)
    backend = BackendConfig(
        name="http-saccade", path_prefix="/", servers=[replica], app_name="saccade"
    )
    file = folder / "node" / "haproxy.cfg"
    HAProxyApi(config, {backend.name: backend}, str(file))._generate_config_file_internal()
    return file.read_text()


@pytest.fixture
def folder(tmp_path):
    """The folder as a cluster prepares it, with Ray's variables for it."""
    config = ServiceConfig(host="localhost", port=8765, proxy="haproxy")
    made = tmp_path / "h"
    program = haproxy.chosen(config)
    (tmp_path / "variables.json").write_text(json.dumps(haproxy.environment(program, config, made)))
    return made


def test_it_listens_on_the_configured_address_alone(folder):
    text = corrected(written_by_ray(folder), "10.1.2.3:8765", folder)
    assert [line.split() for line in text.splitlines() if line.split()[:1] == ["bind"]] == [
        ["bind", "10.1.2.3:8765"]
    ]
    for port in ("9101", "8404", ":8000"):
        assert port not in text
    assert "mode 600 level admin" in text


def test_every_error_of_its_own_has_openais_shape(folder):
    text = corrected(written_by_ray(folder), "127.0.0.1:8765", folder)
    files = [line.split()[1:] for line in text.splitlines() if "errorfile" in line.split()]
    assert sorted(status for status, _ in files) == ["400", "408", "500", "502", "503", "504"]
    for status, file in files:
        head, body = Path(file).read_bytes().split(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert f"Content-Length: {len(body)}".encode() in head
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert (b"Retry-After" in head) == (status == "503")


def test_haproxy_takes_the_corrected_configuration(folder, tmp_path):
    file = tmp_path / "haproxy.cfg"
    file.write_text(written_by_ray(folder))
    launcher = json.loads((tmp_path / "variables.json").read_text())[
        "RAY_SERVE_HAPROXY_BINARY_PATH"
    ]
    checked = subprocess.run(
        [launcher, "-c", "-f", str(file)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "bind 127.0.0.1:8765" in file.read_text() or "bind [::1]:8765" in file.read_text()


@pytest.mark.parametrize(
    "missing", ["listen stats", "frontend prometheus", "    bind ", "defaults"]
)
def test_a_template_that_is_not_as_expected_is_refused(folder, missing):
    text = written_by_ray(folder).replace(missing, "    # ")
    with pytest.raises(TemplateError):
        corrected(text, "127.0.0.1:8765", folder)


def test_a_second_public_address_is_refused(folder):
    text = written_by_ray(folder) + "frontend more\n    bind :1\n"
    with pytest.raises(TemplateError, match="2 lines"):
        corrected(text, "127.0.0.1:8765", folder)


def test_rays_own_proxy_is_the_way_without_haproxy(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(tmp_path / "none"))
    assert haproxy.chosen(ServiceConfig()) is None
    assert "HAProxy does not run here" in caplog.text
    caplog.clear()
    with pytest.raises(ConfigError, match="proxy"):
        haproxy.chosen(ServiceConfig(proxy="haproxy"))
    assert haproxy.chosen(ServiceConfig(proxy="ray")) is None
    assert caplog.text == ""
