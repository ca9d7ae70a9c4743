"""From the command line's words to what a load test needs."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from models.tokenizer import Tokenizer
from service.errors import ConfigError
from service.load.prompts import DEFAULT_IDS, FittedWords, Prompts, TokenIds, Words
from service.load.target import PATHS

if TYPE_CHECKING:
    from pathlib import Path


def base_url(url: str) -> str:
    """A server's base, with or without /v1 at the end.

    Raises:
        ConfigError: it is no http(s) URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ConfigError(f"--url must be such as http://127.0.0.1:8000, not {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def check_endpoint(endpoint: str) -> str:
    """One of the endpoints.

    Raises:
        ConfigError: it is none.
    """
    if endpoint not in PATHS:
        raise ConfigError(f"--endpoint must be one of {', '.join(PATHS)}, not {endpoint!r}")
    return endpoint


def prompts_for(endpoint: str, tokenizer: Path | None, token_ids: str | None, seed: int) -> Prompts:
    """How prompts are made.

    Args:
        endpoint: "completions" or "chat".
        tokenizer: folder with a tokenizer.json, to write texts of exact lengths.
        token_ids: ids to draw prompts from, such as "300-1299".
        seed: of shared prefixes.

    Raises:
        ConfigError: the two contradict each other or the endpoint.
        CheckpointError: there is no tokenizer in the folder.
    """
    if token_ids is not None:
        span = re.fullmatch(r"(\d{1,9})-(\d{1,9})", token_ids)
        if span is None or int(span[1]) > int(span[2]):
            raise ConfigError(f"--token-ids must be such as 300-1299, not {token_ids!r}")
        if endpoint == "chat" or tokenizer is not None:
            raise ConfigError(
                "--token-ids makes prompts of ids, for completions and without --tokenizer"
            )
        return TokenIds(range(int(span[1]), int(span[2]) + 1), seed)
    if tokenizer is not None:
        folder = Tokenizer.from_folder(tokenizer)
        return FittedWords(folder, seed, special=endpoint == "completions")
    return Words(seed) if endpoint == "chat" else TokenIds(DEFAULT_IDS, seed)


def json_fields(text: str | None, option: str) -> dict[str, Any] | None:
    """An option that is a JSON object.

    Raises:
        ConfigError: it is none.
    """
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ConfigError(f'{option} must be a JSON object such as {{"policy": "dense"}}')
    return fields


def numbers(text: str, option: str) -> list[float]:
    """An option that is a list of numbers over 0.

    Raises:
        ConfigError: it is none.
    """
    try:
        values = [float(one) for one in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < 1e6 for value in values):
        raise ConfigError(f"{option} must be numbers over 0, such as 1,2,4, not {text!r}")
    return values
