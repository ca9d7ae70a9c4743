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

import hashlib
import random
from typing import TYPE_CHECKING

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

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
) -> list[list[int]]:
    """Replicas for a request, as indices: ranks to try in order, each with equal choices.

    Args:
        session: what it shares a beginning with; empty: nothing.
        replicas: their names.
        load: requests in flight at one of them.
        limit: load from which on a replica takes no more of its sessions while another is below.
    """
    everyone = list(range(len(replicas)))
    if not session:
        # The power of two choices (Mitzenmacher, 2001): Serve takes the less loaded of a rank.
        two = random.sample(everyone, min(2, len(everyone)))
        return [two, [one for one in everyone if one not in two]]
    order = ranked(session, replicas)
    below = [one for one in order if load(one) < limit]
    if not below:
        # Nobody has room; `sorted` keeps the session's order among equals.
        return [[one] for one in sorted(order, key=load)]
    return [[below[0]], *([one] for one in order if one != below[0])]


class AffinityRouter(RequestRouter):
    """Serve's request router by session, one in each proxy; see the module."""

    def initialize_state(self, **kwargs: int) -> None:
        """Called by Serve with `limit`, the load from which on sessions go to others."""
        self._limit = kwargs["limit"]

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas to try, called by Serve for each request."""
        session = pending_request.metadata.session_id if pending_request is not None else ""

        def load(index: int) -> int:
            # Of all proxies, as of the replica's last answer, and what this one has sent since.
            return self.replica_queue_len_cache.get(candidate_replicas[index].replica_id) or 0

        names = [replica.replica_id.unique_id for replica in candidate_replicas]
        ranks = place(session, names, load, self._limit)
        return [[candidate_replicas[one] for one in rank] for rank in ranks if rank]
