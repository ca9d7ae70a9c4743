"""How long prompts and answers are: fixed, uniform, log-normal, or as a file has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from service.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

FORMS = "128, uniform:64,512, lognormal:MEDIAN,SIGMA, lognormal:MEDIAN,SIGMA,MOST or file:PATH"


class Lengths(Protocol):
    """A distribution of lengths in tokens, each at least 1."""

    def draw(self, rng: np.random.Generator) -> int:
        """One length."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same."""

    tokens: int

    def draw(self, rng: np.random.Generator) -> int:  # noqa: ARG002  the others need it
        """The length."""
        return self.tokens


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `least` to `most`, both included, as likely as another."""

    least: int
    most: int

    def draw(self, rng: np.random.Generator) -> int:
        """One length."""
        return int(rng.integers(self.least, self.most + 1))


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(N(log(median), sigma)), rounded, drawn again where it is over `most` or under 1."""

    median: float
    sigma: float
    most: int | None = None

    def draw(self, rng: np.random.Generator) -> int:
        """One length."""
        while True:
            tokens = round(float(rng.lognormal(math.log(self.median), self.sigma)))
            if tokens >= 1 and (self.most is None or tokens <= self.most):
                return tokens


@dataclass(frozen=True, slots=True)
class Listed:
    """One of a list, drawn with replacement."""

    tokens: tuple[int, ...]

    def draw(self, rng: np.random.Generator) -> int:
        """One length."""
        return self.tokens[int(rng.integers(len(self.tokens)))]


def parse_lengths(text: str) -> Lengths:
    """A distribution from its form on the command line, one of `FORMS`.

    Raises:
        ConfigError: it has no such form, or the numbers contradict each other.
    """
    kind, _, rest = text.partition(":") if ":" in text else ("", "", text)
    if kind == "file":
        return Listed(_read(Path(rest)))
    try:
        numbers = [float(one) for one in rest.split(",")]
    except ValueError:
        numbers = []
    lengths = _made(kind, numbers)
    if lengths is None:
        raise ConfigError(f"{text!r} is no distribution of lengths of at least 1: write {FORMS}")
    return lengths


def _made(kind: str, numbers: list[float]) -> Lengths | None:
    match kind, numbers:
        case ("" | "fixed", [tokens]) if _whole(tokens):
            return Fixed(int(tokens))
        case "uniform", [least, most] if _whole(least) and _whole(most) and least <= most:
            return Uniform(int(least), int(most))
        # A median over `most` would be drawn again and again.
        case "lognormal", [median, sigma] if 1 <= median < 1e9 and 0 <= sigma <= 5:
            return LogNormal(median, sigma)
        case "lognormal", [median, sigma, most] if (
            1 <= median <= most and 0 <= sigma <= 5 and _whole(most)
        ):
            return LogNormal(median, sigma, int(most))
    return None


def _whole(number: float) -> bool:
    return 1 <= number < 1e9 and number == int(number)


def _read(file: Path) -> tuple[int, ...]:
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"cannot read the lengths in {file}: {reason}") from None
    if not lines or not all(
        one.isascii() and one.isdigit() and 1 <= int(one) < 10**9 for one in lines
    ):
        raise ConfigError(f"{file} must hold lengths in tokens, whole numbers from 1, a line each")
    return tuple(map(int, lines))
