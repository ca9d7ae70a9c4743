"""What can go wrong with a request or a configuration; each error knows its HTTP answer.

ServiceError
    RequestError           400  the request is wrong; `param` names the field
        UnknownModelError  404
        NotOfferedError    404  the model has no such route
        AuthError          401
        TooLargeError      413  the body is larger than the limit
    UnavailableError       503  with Retry-After
        OverloadedError         the queue is full
        EngineDeadError         the engine's loop has stopped
    GenerationError        500  the engine failed on this request after accepting it
    ConfigError            --   the configuration is wrong; stops the command
"""

from __future__ import annotations

from typing import ClassVar

from kernels.errors import SaccadeError


class ServiceError(SaccadeError):
    """Root of the service's errors.

    Attributes:
        status: HTTP status of the answer.
        type: `error.type` of OpenAI's error object.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class RequestError(ServiceError):
    """The request is wrong; `param` names the field where there is one.

    Attributes:
        position: of the character that is wrong in that field's text, from 0 on; None: unknown.
    """

    status = 400
    type = "invalid_request_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        position: int | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.position = position


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""

    status = 404


class NotOfferedError(RequestError):
    """The model that is served here cannot do what the route is for."""

    status = 404

    def __init__(self, message: str) -> None:
        super().__init__(message, code="not_offered")


class AuthError(RequestError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"


class TooLargeError(RequestError):
    """The request's body is larger than the configured limit."""

    status = 413


class UnavailableError(ServiceError):
    """The service cannot take the request now; `retry_after` is in seconds."""

    status = 503
    type = "service_unavailable"

    def __init__(self, message: str, retry_after: float = 1.0, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class OverloadedError(UnavailableError):
    """The queue is full."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after, code="overloaded")


class EngineDeadError(UnavailableError):
    """The engine's loop has stopped; only a restart helps."""

    def __init__(self, message: str, retry_after: float = 10.0) -> None:
        super().__init__(message, retry_after, code="engine_dead")


class GenerationError(ServiceError):
    """The engine failed on a request that it had accepted."""


class ConfigError(SaccadeError):
    """The configuration is wrong; the message names the key and what to change."""
