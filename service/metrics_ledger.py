"""Where replicas leave their snapshots and whoever answers `/metrics` finds them.

They lie in the key-value store of Ray's control service (GCS), in which Serve's controller keeps
its state, too: on the head node, or in Redis where Ray is configured so. No worker node, replica
or process of ours holds the only copy of a count, all readers see the same at the same moment, and
what survives the loss of which node is what Ray itself survives.
"""

from __future__ import annotations

from typing import Protocol

from service.metrics_snapshot import Snapshot

_SNAPSHOT = "snapshot-1:"  # with the version of its format
_CLAIM = "claim:"


class Store(Protocol):
    """A key-value store that all processes of the cluster share."""

    def get(self, key: str) -> bytes | None:
        """The value, or None where there is none."""

    def put(self, key: str, value: bytes, *, overwrite: bool = True) -> bool:
        """Write it; without `overwrite` only where there is none. Whether there was none."""

    def delete(self, key: str) -> None:
        """Remove it, if it is there."""

    def keys(self, prefix: str) -> list[str]:
        """All keys that start so."""


class RayStore:
    """The GCS's store, in a namespace of its own; in a process of a Ray cluster."""

    # Ray has no public interface to it; Serve uses the same one.
    _NAMESPACE = "saccade"

    def get(self, key: str) -> bytes | None:
        """The value, or None where there is none."""
        from ray.experimental import internal_kv

        return internal_kv._internal_kv_get(key, namespace=self._NAMESPACE)

    def put(self, key: str, value: bytes, *, overwrite: bool = True) -> bool:
        """Write it; without `overwrite` only where there is none. Whether there was none."""
        from ray.experimental import internal_kv

        there = internal_kv._internal_kv_put(key, value, overwrite, namespace=self._NAMESPACE)
        return not there

    def delete(self, key: str) -> None:
        """Remove it, if it is there."""
        from ray.experimental import internal_kv

        internal_kv._internal_kv_del(key, namespace=self._NAMESPACE)

    def keys(self, prefix: str) -> list[str]:
        """All keys that start so."""
        from ray.experimental import internal_kv

        found = internal_kv._internal_kv_list(prefix, namespace=self._NAMESPACE)
        return [key.decode() for key in found]


class Ledger:
    """The snapshots of all replicas, by name."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, name: str, snapshot: Snapshot) -> None:
        """Replace the replica's snapshot."""
        self._store.put(_SNAPSHOT + name, snapshot.encode())

    def read(self) -> dict[str, Snapshot]:
        """All snapshots."""
        while True:
            names = [key.removeprefix(_SNAPSHOT) for key in self._store.keys(_SNAPSHOT)]
            found = {name: self._store.get(_SNAPSHOT + name) for name in sorted(names)}
            whole = {name: data for name, data in found.items() if data is not None}
            # One that has gone meanwhile was absorbed, maybe by one that was not listed yet.
            if len(whole) == len(found):
                return {name: Snapshot.decode(data) for name, data in whole.items()}

    def claim(self, name: str) -> bool:
        """Whether the caller, and nobody else ever, may absorb the snapshot of that name."""
        if not self._store.put(_CLAIM + name, b"", overwrite=False):
            return False
        if self._store.get(_SNAPSHOT + name) is not None:
            return True
        self._store.delete(_CLAIM + name)  # whoever absorbed it has removed the claim before
        return False

    def remove(self, name: str) -> None:
        """Remove a snapshot that another one has absorbed."""
        self._store.delete(_SNAPSHOT + name)
        self._store.delete(_CLAIM + name)
