"""Ports for what tests start."""

from __future__ import annotations

import random
import socket
from pathlib import Path

PORTS = range(20_000, 65_536)
"""Above those that Ray's workers take by default, 10,002 to 19,999."""
GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""From which Linux gives ports to connections, and to servers that name none."""


def free_port() -> int:
    """A port that was free a moment ago, and that nobody is given who has not asked for it.

    Of a port that the system gives away itself, a connection may have taken hold by the time that
    the server under test asks for it.
    """
    low, high = map(int, GIVEN.read_text().split())
    ports = [port for port in PORTS if not low <= port <= high] or PORTS
    for port in random.SystemRandom().sample(ports, len(ports)):  # whatever seed a test has set
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")
