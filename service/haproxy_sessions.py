"""Sessions keep to a replica where HAProxy stands in front: what its configuration needs for it.

Ray refuses a request router behind HAProxy, which balances by itself. So the configuration that Ray
writes is given a script that chooses as `service.affinity` does, and rules that obey it. The
standard library alone, since it runs with every reload of HAProxy.
"""

from __future__ import annotations

import re
from pathlib import Path

SCRIPT = Path(__file__).with_name("sessions.lua")

_SERVER = re.compile(r"^ +server (\S+) (?!.* backup$).*$", re.MULTILINE)


def with_sessions(text: str, limit: int) -> str:
    """HAProxy's configuration, with the header `x-session-id` choosing the server.

    Args:
        text: the configuration as Ray writes it; backends whose servers are listed are changed.
        limit: requests in flight at a server from which on it takes no more of its sessions.
    """
    changed = []
    for section in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        names = _SERVER.findall(section) if section.startswith("backend ") else []
        if section.startswith("global"):
            section = section.replace("\n", f"\n    lua-load-per-thread {SCRIPT}\n", 1)
        if names:
            rules = [f"http-request lua.session_home {limit}"]
            # A server that is down is passed over, and the backend's balance chooses.
            rules += [
                f"use-server {one} if {{ var(txn.session_home) -m str {one} }}" for one in names
            ]
            lines = "".join(f"\n    {rule}" for rule in rules)
            section = section.replace("\n", f"{lines}\n", 1)
        changed.append(section)
    return "".join(changed)
