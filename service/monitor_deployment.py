"""The Ray Serve deployment of `/metrics` and of `/health`; imports no model and no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from service.metrics_ledger import Ledger, RayStore
from service.monitor import Observer, create_monitor_app, health, metrics
from service.serve_state import wanted_replicas, why_none

if TYPE_CHECKING:
    from pydantic import SecretStr


@dataclass(frozen=True, slots=True)
class _Keys:
    api_key: SecretStr | None
    metrics_need_key: bool


class Monitor:
    """Answers one path for all replicas of an application.

    Args:
        path: "/metrics" or "/health".
        application: the replicas' one.
        api_key: of the service.
        metrics_need_key: whether `/metrics` asks for it.
    """

    def __init__(
        self, path: str, application: str, api_key: SecretStr | None, *, metrics_need_key: bool
    ) -> None:
        self._path = path
        self._keys = _Keys(api_key, metrics_need_key)
        self._observer = Observer(
            Ledger(RayStore()),
            partial(wanted_replicas, application),
            partial(why_none, application),
        )

    def __serve_build_asgi_app__(self) -> object:
        """Called by Serve after the constructor."""
        answer = {"/metrics": metrics, "/health": health}[self._path]
        return create_monitor_app(self._path, answer, self._observer, self._keys)
