"""Two real Ray nodes on this machine, each with a proxy on a port of its own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from service.cluster import PROXY_MIDDLEWARES
from service.processes import descendants, end
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120
"""Seconds for a node to join, and for the service to start."""

_DEPLOY = """
import json, sys
import ray
from ray import serve
from service.config import ServiceConfig
from service.deployment import ROUTES, build, build_health, build_metrics
address, port, fields = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": int(port)})
config = ServiceConfig(**json.loads(fields))
built = build(config), build_metrics(config), build_health(config)
serve.run_many(
    [serve.RunTarget(one, name=name, route_prefix=route)
     for one, (name, route) in zip(built, ROUTES.items(), strict=True)]
)
"""


class Nodes:
    """A head and a worker node with one core each, and Saccade on both.

    Attributes:
        urls: of the head's proxy and of the worker's.
    """

    def __init__(self, folder):
        self._folder = folder
        self._gcs, ports = free_port(), (free_port(), free_port())
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self._ports = ports
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": PROXY_MIDDLEWARES,
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(ports[1]),
            # Requests through either proxy run on either node, and scrapes are answered by either.
            "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
        }
        self._nodes = []

    def start(self, config):
        """Start the nodes, and the service with the fields of a configuration."""
        self._nodes.append(
            self._node("--head", f"--port={self._gcs}", f"--temp-dir={self._folder}",
                       f"--ray-client-server-port={free_port()}", "--include-dashboard=false")
        )  # fmt: skip
        self._until(lambda: self._listens(self._gcs))
        self._nodes.append(self._node(f"--address=127.0.0.1:{self._gcs}"))
        self._python(_DEPLOY, str(self._ports[0]), json.dumps(config))
        for url in self.urls:
            self._until(lambda url=url: self._replicas(url) == 2)

    def kill_worker(self):
        """End all processes of the worker node at once, as a loss of power would."""
        process = self._nodes.pop()
        family = [*family_of(process.pid), process.pid]
        for number in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait()

    def stop(self):
        """End everything."""
        started = descendants()
        for process in reversed(self._nodes):
            process.terminate()
        for process in self._nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        end(started, 5)

    def _node(self, *arguments):
        program = Path(sys.executable).with_name("ray")
        return subprocess.Popen(
            [program, "start", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1",
             "--object-store-memory=104857600", "--min-worker-port=0", "--max-worker-port=0",
             "--dashboard-agent-listen-port=0", *arguments],
            env=self._environment,
            stdout=(self._folder / f"node{len(self._nodes)}").open("w"),
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _python(self, code, *arguments):
        done = subprocess.run(
            [sys.executable, "-c", code, f"127.0.0.1:{self._gcs}", *arguments],
            env=self._environment, check=False, timeout=PATIENCE, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(done.stderr)

    def _listens(self, port):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def _replicas(self, url):
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{url}/health", timeout=5)
            if answer.status_code == 200:
                return answer.json()["replicas"]
        return 0

    def _until(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                told = [file.read_text()[-2000:] for file in self._folder.glob("node*")]
                raise TimeoutError("\n".join(["the nodes did not start", *told]))
            time.sleep(0.2)


@contextlib.contextmanager
def two_nodes(config):
    """`Nodes` that serve a configuration, given as fields; all is gone behind the block."""
    # Short, because sockets lie in it and their paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="saccade-", dir="/tmp"))
    nodes = Nodes(folder)
    try:
        nodes.start(config)
        yield nodes
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


def family_of(pid):
    """Ids of a process's children, their children, and so on."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *family_of(int(child))]
    return found
