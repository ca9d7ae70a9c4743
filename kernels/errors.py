"""Saccade's errors, one tree.

SaccadeError
    KernelError            a kernel could not run, or its scores are not finite
    PatternError           a pattern string that does not parse
    models.errors.*        a checkpoint that cannot be loaded
    service.errors.*       a request or a configuration that cannot be served
"""

from __future__ import annotations


class SaccadeError(Exception):
    """Root of every error that Saccade raises on purpose; its text is one sentence for the user."""


class KernelError(SaccadeError):
    """A kernel could not run on these inputs."""


class PatternError(SaccadeError):
    """A pattern string does not parse; the message names the part and the accepted form.

    Attributes:
        position: of the character that is wrong, from 0 on; None where it is none's alone.
    """

    def __init__(self, message: str, *, position: int | None = None) -> None:
        super().__init__(message)
        self.position = position
