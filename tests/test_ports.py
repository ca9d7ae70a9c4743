"""Ports that nobody is given by chance."""

from __future__ import annotations

import socket

import pytest

from tests import ports
from tests.ports import free_port


def test_the_system_gives_them_to_nobody():
    low, high = map(int, ports.GIVEN.read_text().split())
    for _ in range(20):
        port = free_port()
        assert port in ports.PORTS and not low <= port <= high
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_one_that_is_taken_is_not_given(monkeypatch):
    port = free_port()
    monkeypatch.setattr(ports, "PORTS", range(port, port + 1))
    with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError, match="no port is free"):
        free_port()


def test_where_the_system_gives_all_away_one_of_them_does(monkeypatch, tmp_path):
    monkeypatch.setattr(ports, "GIVEN", tmp_path / "range")
    ports.GIVEN.write_text("1024\t65535\n")
    assert free_port() in ports.PORTS
