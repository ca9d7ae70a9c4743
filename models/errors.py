"""Errors of checkpoints: what cannot be loaded, and why."""

from __future__ import annotations

from kernels.errors import SaccadeError


class ModelError(SaccadeError):
    """A model cannot be loaded or used as asked."""


class CheckpointError(ModelError):
    """A checkpoint folder is incomplete or damaged; the message names the file or tensor."""


class UnsupportedModelError(ModelError):
    """A checkpoint asks for something that this decoder would compute wrongly."""


class TemplateError(ModelError):
    """A chat template is missing, or it does not accept these messages."""
