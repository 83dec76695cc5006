"""The page at `/`: compare two responses, and see how the service does. Plain files, no build step, no other hosts."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request, Response

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/page/service.js": ("service.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A new release shows at once; the tag spares the bytes.
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """The page and its files."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _FILES.items():
        _add(router, path, files(__name__).joinpath(name).read_bytes(), media_type)
    return router


def _add(router: APIRouter, path: str, content: bytes, media_type: str) -> None:
    tag = f'"{hashlib.blake2b(content, digest_size=8).hexdigest()}"'

    @router.get(path)
    async def page_file(request: Request) -> Response:
        if request.headers.get("If-None-Match") == tag:
            return Response(status_code=304, headers={**_HEADERS, "ETag": tag})
        return Response(content, media_type=media_type, headers={**_HEADERS, "ETag": tag})
