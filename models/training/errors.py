"""Errors of the training recipe."""

from __future__ import annotations

from kernels.errors import SaccadeError


class TrainingError(SaccadeError):
    """Training cannot start or go on; the message says what to change."""
