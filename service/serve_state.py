"""What Ray Serve's controller says of the replicas; for processes of its cluster."""

from __future__ import annotations

import re

from ray import serve

_OUR_ERROR = re.compile(r"^(?:kernels|models|service)\.errors\.\w+: (.+)$", re.MULTILINE)
"""The last line of a remote traceback that ends in an error of ours."""


def replica_error(name: str) -> str | None:
    """What one of our errors said in a replica's constructor, if one ended it."""
    application = serve.status().applications.get(name)
    for deployment in application.deployments.values() if application else ():
        if found := _OUR_ERROR.findall(deployment.message):
            return str(found[-1]).strip()
    return None


def wanted_replicas(name: str) -> int | None:
    """Replicas that run or are to run; None where the application does not exist."""
    application = serve.status().applications.get(name)
    if application is None:
        return None
    return sum(
        number
        for deployment in application.deployments.values()
        for state, number in deployment.replica_states.items()
        if state != "STOPPING"
    )


def why_none(name: str) -> str | None:
    """Why no replica runs, in a few words; None where Serve believes that one does."""
    application = serve.status().applications.get(name)
    if application is None:
        return f"the application {name} is not deployed"
    states: dict[str, int] = {}
    more = ""
    for deployment in application.deployments.values():
        for state, number in deployment.replica_states.items():
            states[state] = states.get(state, 0) + number
        # Where nodes have no room for it, its first line says so, and what it needs.
        more += f": {line}" if (line := deployment.message.partition("\n")[0]) else ""
    if said := replica_error(name):
        return said
    if states.get("RUNNING"):
        return None
    listed = ", ".join(f"{number} {state.lower()}" for state, number in states.items() if number)
    return f"Ray Serve says {application.status.lower()} ({listed or 'no replicas'}){more}"
