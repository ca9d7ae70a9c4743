"""Servers over the tiny checkpoints of the service's tests."""

from tests.service.conftest import checkpoint, engine, server, service_config  # noqa: F401
from tests.service.encoders.conftest import encoder_folder  # noqa: F401
