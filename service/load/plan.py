"""What will be sent: every request's time and lengths, decided by the seed before the start."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from service.load.arrivals import arrivals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.load.lengths import Lengths
    from service.load.trace import TracedRequest


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to send.

    Attributes:
        at: seconds since the start at which it is due; None in a closed loop.
        prompt_tokens, output_tokens: at least 1.
        prefix_tokens: so many first tokens of the prompt are its group's.
        group: which shared prefix.
        blocks: a trace's ids of blocks of the prompt, in place of a prefix.
        seed: of the prompt's own tokens.
    """

    at: float | None
    prompt_tokens: int
    output_tokens: int
    prefix_tokens: int
    group: int
    blocks: tuple[int, ...]
    seed: int

    @property
    def session(self) -> str | None:
        """Name of what its prompt begins with, for services that send its likes to one replica."""
        if self.blocks:
            return f"block-{self.blocks[0]}"
        return f"group-{self.group}" if self.prefix_tokens else None


@dataclass(frozen=True, slots=True)
class Mix:
    """What the requests are like.

    Attributes:
        prompt, output: lengths in tokens.
        shared: share of each prompt that its group has in common, 0 to 1.
        groups: number of shared prefixes.
    """

    prompt: Lengths
    output: Lengths
    shared: float = 0.0
    groups: int = 1


def closed_plan(mix: Mix, requests: int, seed: int) -> list[Planned]:
    """Requests that are sent whenever a user is free."""
    rng = np.random.default_rng([seed, 1])
    return [_drawn(mix, None, rng) for _ in range(requests)]


def open_plan(
    mix: Mix, kind: str, rate: float, seed: int, *, requests: int | None, duration: float | None
) -> list[Planned]:
    """Requests that are due at their times, until there are enough or the time is over.

    At least one of `requests` and `duration`, in seconds, is given.

    Raises:
        ConfigError: there are no such arrivals.
    """
    assert requests is not None or duration is not None
    # Of their own: the same requests come at every rate.
    times = arrivals(kind, rate, np.random.default_rng([seed, 0]))
    if duration is not None:
        times = itertools.takewhile(lambda at: at < duration, times)
    rng = np.random.default_rng([seed, 1])
    return [_drawn(mix, at, rng) for at in itertools.islice(times, requests)]


def traced_plan(
    rows: Sequence[TracedRequest],
    seed: int,
    *,
    speed: float,
    requests: int | None,
    duration: float | None,
) -> list[Planned]:
    """A trace's requests at `speed` times its pace."""
    rng = np.random.default_rng([seed, 1])
    return [
        Planned(
            at=row.at / speed,
            prompt_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            prefix_tokens=0,
            group=0,
            blocks=row.blocks,
            seed=int(rng.integers(2**62)),
        )
        for row in rows[:requests]
        if duration is None or row.at / speed < duration
    ]


def anew(plan: Sequence[Planned], run: int, mix: Mix) -> list[Planned]:
    """The same requests with other prompts, so that a server has kept nothing of an earlier run.

    Args:
        plan: what is to be sent.
        run: its number, from 0 on: the first one's prompts stay.
        mix: what it was drawn from.
    """
    return [replace(one, group=one.group + run * mix.groups, seed=one.seed + run) for one in plan]


def _drawn(mix: Mix, at: float | None, rng: np.random.Generator) -> Planned:
    tokens = mix.prompt.draw(rng)
    return Planned(
        at=at,
        prompt_tokens=tokens,
        output_tokens=mix.output.draw(rng),
        prefix_tokens=int(tokens * mix.shared),
        group=int(rng.integers(mix.groups)),
        blocks=(),
        seed=int(rng.integers(2**62)),
    )
