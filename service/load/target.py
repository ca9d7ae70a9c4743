"""The server under load: where it is, what it is called, and how a request to it is written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from service.errors import ConfigError

if TYPE_CHECKING:
    from service.load.plan import Planned
    from service.load.prompts import Prompts

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class Target:
    """Any server of OpenAI's API.

    Attributes:
        url: its base, without /v1.
        endpoint: "completions" or "chat".
        model: in requests.
        api_key: sent as a bearer token.
        ignore_eos: every answer is as long as planned (an extension most engines share).
        sparsity: Saccade's field, passed on as it is.
        extra: more fields of the body.
    """

    url: str
    endpoint: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    ignore_eos: bool = True
    sparsity: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Where requests go."""
        return self.url + PATHS[self.endpoint]

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        key = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return {"Content-Type": "application/json"} | key

    def body(self, planned: Planned, prompts: Prompts) -> bytes:
        """A streaming request that also asks for its usage."""
        prompt = prompts.make(planned)
        fields: dict[str, Any] = {
            "model": self.model,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": prompt}]
            fields["max_completion_tokens"] = planned.output_tokens
        else:
            fields["prompt"] = prompt
            fields["max_tokens"] = planned.output_tokens
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.sparsity is not None:
            fields["sparsity"] = self.sparsity
        return json.dumps(fields | self.extra).encode()


async def first_model(url: str, api_key: str | None) -> str:
    """The first model that a server lists.

    Raises:
        ConfigError: nothing answers there, or not as /v1/models should.
    """
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
            session.get(f"{url}/v1/models", headers=headers) as answer,
        ):
            if answer.status != 200:
                raise ConfigError(
                    f"{url}/v1/models answered {answer.status}; check --url and --api-key, or name "
                    "the model with --model"
                )
            name = (await answer.json(content_type=None))["data"][0]["id"]
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = getattr(error, "strerror", None) or error or "timed out"
        raise ConfigError(
            f"no server answers at {url} ({reason}); start it, or name another with --url"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise ConfigError(f"{url}/v1/models lists no model; name one with --model") from None
    return str(name)
