"""Which replica serves a request: one that may have its beginning in its cache.

Requests of one session (the turns of a conversation, questions about one document) name it in the
header `x-session-id`, which Ray Serve's proxy hands to the deployment's request router; it cannot
see bodies, which stream past it. A session's home is the replica that ranks first in rendezvous
hashing (Thaler and Ravishankar, 1998): every proxy finds the same one without a table, and when a
replica goes only its own sessions move. Where the home is too busy the next in the session's order
takes the request, as in consistent hashing with bounded loads (Mirrokni et al., 2016), so that a
session too hot for one replica finds its beginning on the same second one.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from typing import TYPE_CHECKING

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


ROUTER = "service.affinity:AffinityRouter"
"""Import path for Serve's configuration."""


def ranked(session: str, replicas: Sequence[str]) -> list[int]:
    """Indices of `replicas`, by their names, in the order in which a session prefers them."""

    def weight(index: int) -> bytes:
        text = f"{len(session)}:{session}{replicas[index]}".encode()
        return hashlib.blake2b(text, digest_size=8).digest()

    return sorted(range(len(replicas)), key=weight, reverse=True)


def place(
    session: str, replicas: Sequence[str], load: Callable[[int], int], limit: int
) -> list[int]:
    """Replicas for a request, as indices, in the order in which to try them.

    Args:
        session: what it shares a beginning with; empty: nothing.
        replicas: their names.
        load: requests in flight at one of them.
        limit: load from which on a replica takes no more of its sessions while another is below.
    """
    if not session:
        # The power of two choices (Mitzenmacher, 2001).
        shuffled = random.sample(range(len(replicas)), len(replicas))
        return sorted(shuffled[:2], key=load) + shuffled[2:]
    order = ranked(session, replicas)
    home = next((one for one in order if load(one) < limit), None)
    if home is None:
        # Nobody has room; `sorted` keeps the session's order among equals.
        return sorted(order, key=load)
    return [home, *(one for one in order if one != home)]


class AffinityRouter(RequestRouter):
    """Serve's request router by session, one in each proxy; see the module."""

    def initialize_state(self, **kwargs: int) -> None:
        """Called by Serve with `limit`, the load from which on sessions go to others."""
        self._limit = kwargs["limit"]
        self._sent: dict[ReplicaID, int] = {}  # requests in flight of this proxy, where there are

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas to try, called by Serve for each request."""
        # Lets a request that was placed just before be sent, and so be counted.
        await asyncio.sleep(0)
        session = pending_request.metadata.session_id if pending_request is not None else ""

        def load(index: int) -> int:
            replica = candidate_replicas[index].replica_id
            # A replica's own count has all proxies' requests, but is as old as its last answer: of
            # a burst it has the first alone.
            told = self.replica_queue_len_cache.get(replica) or 0
            return max(told, self._sent.get(replica, 0))

        names = [replica.replica_id.unique_id for replica in candidate_replicas]
        return [[candidate_replicas[one]] for one in place(session, names, load, self._limit)]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a request goes to a replica."""
        super().on_send_request(replica_id)
        self._sent[replica_id] = self._sent.get(replica_id, 0) + 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve once for each of them, however it ended."""
        super().on_request_completed(replica_id, internal_request_id)
        left = self._sent.pop(replica_id, 0) - 1
        if left > 0:
            self._sent[replica_id] = left
