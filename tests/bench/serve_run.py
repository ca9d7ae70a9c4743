"""deploy/serve.yaml and the cluster's application, started for real on a Ray head of their own.

    python tests/bench/serve_run.py

Starts a Ray head as KubeRay does (a token, its options of `ray start`), on free ports and with a
folder of its own, so that several run on one machine. On it: `serve run deploy/serve.yaml` with
another port, and then the CPU cluster's `serveConfigV2`, sent to Ray's dashboard as the operator
sends it. Each is asked for a completion and for everything that a probe or Prometheus asks for, and
Ray's own ports must refuse whoever has no token. Exits with 1 when something differs. What it
started it stops.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.processes import descendants, end  # noqa: E402
from tests.deploy.kubernetes import (  # noqa: E402
    KUBERAY,
    VARIANTS,
    ray_containers,
    ray_service,
    rendered,
)
from tests.ports import free_port  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 240
"""Seconds that an application has to start: kernels may have to be compiled."""
KEY = "a key of the test's"
BODY = {"model": "saccade-12m", "prompt": "The old man went to", "max_tokens": 8}


class Head:
    """A Ray head with its ports and its token."""

    def __init__(self, folder: Path, cluster: dict[str, Any]) -> None:
        self.folder = folder
        self.port, self.dashboard, self.agent = free_port(), free_port(), free_port()
        self.token = secrets.token_hex(32)
        # Of the containers; values from secrets are drawn here.
        container = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
        drawn = {"RAY_AUTH_TOKEN": self.token, "SACCADE_API_KEY": KEY}
        self.environment = os.environ | {
            entry["name"]: entry.get("value", drawn.get(entry["name"], ""))
            for entry in container["env"]
        }
        self.environment |= {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": f"127.0.0.1:{self.port}"}
        store = cluster["headGroupSpec"]["rayStartParams"]["object-store-memory"]
        self.command = [
            *(program("ray"), "start", "--head", "--block", f"--temp-dir={folder}"),
            *(f"--port={self.port}", f"--object-store-memory={store}", "--num-cpus=2"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-port={self.dashboard}", f"--dashboard-agent-listen-port={self.agent}"),
            *(f"--ray-client-server-port={free_port()}", f"--metrics-export-port={free_port()}"),
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Ray's processes; all have ended with the block."""
        log = (self.folder / "ray.log").open("w")
        process = subprocess.Popen(
            self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            self.until(f"http://127.0.0.1:{self.agent}/api/healthz", process, "ray.log")
            yield process
        finally:
            started = descendants()
            process.terminate()
            end(started, 20)
            log.close()

    def until(self, url: str, process: subprocess.Popen[bytes], log: str) -> None:
        """Wait until `url` answers 200.

        Raises:
            SystemExit: it does not, or `process` has ended; with the end of what it said.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url).status_code == 200:
                    return
            if time.monotonic() > deadline or process.poll() is not None:
                said = (self.folder / log).read_text()[-3000:]
                raise SystemExit(f"{url} does not answer; {log} ends with\n{said}")
            time.sleep(0.2)

    def ended(self, process: subprocess.Popen[bytes], log: str) -> None:
        """Wait until `process` has ended.

        Raises:
            SystemExit: it has not in a minute; with the end of what it and Ray Serve said.
        """
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            logs = [self.folder / log, *self.folder.glob("session_latest/logs/serve/*.log")]
            said = "\n".join(f"{file.name}:\n{file.read_text()[-3000:]}" for file in logs)
            raise SystemExit(f"{process.args} does not end\n{said}") from None


def program(name: str) -> str:
    """A command of the environment whose Python runs this."""
    return str(Path(sys.executable).with_name(name))


def expect(what: str, found: object, wanted: object) -> None:
    """Say what was found.

    Raises:
        SystemExit: it differs from what was wanted.
    """
    print(f"{what}: {found}", flush=True)
    if found != wanted:
        raise SystemExit(f"{what} should be {wanted!r}")


def ask(url: str) -> None:
    """A completion, and that nobody gets one without the key."""
    expect("completion without the key", httpx.post(url, json=BODY, timeout=60).status_code, 401)
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(url, json=BODY, headers=headers, timeout=120)
    expect("completion", answer.status_code, 200)
    expect("its tokens", answer.json()["usage"]["completion_tokens"], BODY["max_tokens"])


def probes(cluster: dict[str, Any]) -> set[tuple[str, int]]:
    """Path and port of each probe of a pod."""
    kinds = ("readinessProbe", "livenessProbe")
    gets = [one[kind]["httpGet"] for one in ray_containers(cluster) for kind in kinds]
    return {(get["path"], get["port"]) for get in gets}


def refused_without_a_token(head: Head) -> None:
    """secrets.example.yaml as it is."""
    # A token may lie in the user's home.
    environment = head.environment | {"RAY_AUTH_TOKEN": "", "HOME": str(head.folder)}
    done = subprocess.run(
        head.command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    expect("a head with an empty token", "AuthenticationError" in done.stderr, True)


def served_by_serve_run(head: Head) -> None:
    """`serve run` with deploy/serve.yaml, on another port and this machine alone."""
    config = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    file = head.folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    log = (head.folder / "serve.log").open("w")
    process = subprocess.Popen(
        [program("serve"), "run", str(file)],
        env=head.environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        head.until(f"{url}/health", process, "serve.log")
        ask(f"{url}/v1/completions")
    finally:
        process.send_signal(signal.SIGINT)
        head.ended(process, "serve.log")
        log.close()


def served_as_by_the_operator(
    head: Head, process: subprocess.Popen[bytes], spec: dict[str, Any]
) -> None:
    """The cluster's application, sent to the dashboard with the token."""
    cluster = spec["rayClusterConfig"]
    config = yaml.safe_load(spec["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    serve = f"http://127.0.0.1:{head.dashboard}/api/serve/applications/"
    expect("dashboard without the token", httpx.get(serve, timeout=60).status_code, 401)
    expect("deploying without it", httpx.put(serve, json=config, timeout=60).status_code, 401)
    headers = {"Authorization": f"Bearer {head.token}"}
    # What KubeRay lets workers wait for.
    waited = subprocess.run(
        [program("ray"), "health-check", "--address", head.environment["RAY_ADDRESS"]],
        env=head.environment,
        timeout=60,
        check=False,
    )
    expect("exit status of ray health-check", waited.returncode, 0)
    sent = httpx.put(serve, json=config, headers=headers, timeout=60)
    expect("deploying with it", sent.status_code, 200)
    head.until(f"{url}/health", process, "ray.log")
    ask(f"{url}/v1/completions")
    for path, port in sorted(probes(cluster)):
        base = url if port == 8000 else f"http://127.0.0.1:{head.agent}"
        # On a busy machine Ray may be late once; a probe has to fail several times, too.
        head.until(base + path, process, "ray.log")
        print(f"probe {path}: 200", flush=True)
    (monitor,) = [one["spec"] for one in rendered(KUBERAY) if one["kind"] == "ServiceMonitor"]
    path = monitor["endpoints"][0]["path"]
    scraped = httpx.get(url + path, timeout=60).text
    expect(f"series of {path}", "saccade_generation_tokens_total" in scraped, True)
    applications = httpx.get(serve, headers=headers, timeout=60).json()["applications"]
    statuses = {name: one["status"] for name, one in applications.items()}
    expect("applications", statuses, dict.fromkeys(statuses, "RUNNING"))


def main() -> None:
    """Both, one after the other."""
    # What a shell runs in the background ignores it, and so would what is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    spec = ray_service(VARIANTS["cpu"])
    # Short, because sockets lie in it and their paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="saccade-", dir="/tmp"))
    head = Head(folder, spec["rayClusterConfig"])
    try:
        refused_without_a_token(head)
        with head.running() as process:
            served_by_serve_run(head)
            served_as_by_the_operator(head, process, spec)
    finally:
        end(descendants(), 0)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
