"""GET /explorer: the page that shows patterns and answers from within."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from fastapi.responses import Response
from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import Request

FOLDER = Path(__file__).resolve().parents[1] / "explorer"
TYPES = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)
HEADERS = MappingProxyType(
    {
        # Nothing but the service's own files and answers; no script or style within the page.
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
)


async def explorer(request: Request) -> Response:
    """The page, or one of its files."""
    name = request.path_params.get("name", "index.html")
    found = _files().get(name)
    if found is None:
        raise HTTPException(404)
    return Response(found, media_type=TYPES[Path(name).suffix], headers=dict(HEADERS))


@cache
def _files() -> Mapping[str, bytes]:
    """All files of the page: there is no way to ask for another."""
    return MappingProxyType(
        {file.name: file.read_bytes() for file in FOLDER.iterdir() if file.suffix in TYPES}
    )
