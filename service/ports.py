"""Ports that nobody uses."""

from __future__ import annotations

import secrets
import socket

FIRST, LAST = 20_000, 32_000
"""Below what Linux gives to connections that leave (net.ipv4.ip_local_port_range)."""


def free_range(host: str, count: int) -> range:
    """So many ports in a row, at a random place, of which the first is free at this moment.

    Raises:
        OSError: there are none.
    """
    places = list(range(FIRST, LAST - count, count))
    secrets.SystemRandom().shuffle(places)
    for start in places:
        with socket.socket() as probe:
            try:
                probe.bind((host, start))
            except OSError:
                continue
            return range(start, start + count)
    raise OSError("no port is free")
