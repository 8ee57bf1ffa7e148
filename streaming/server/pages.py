"""The page's files: read once at the start and answered from memory, so that no request meets a file system.

Nothing in them is secret: they are given without a token. The page runs under a policy that lets it load and call its
own server and nothing else (CSP Level 3).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from importlib.resources import files
from importlib.resources.abc import Traversable

from websockets.datastructures import Headers
from websockets.http11 import Response

INDEX = "index.html"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""The kinds of file that are served. Others in the folder are not."""
HEADERS = {
    "Cache-Control": "no-cache",  # kept, and asked after each time: a new server has its new page at once
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), display-capture=(), geolocation=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True, slots=True)
class Page:
    """One file as it is sent. etag: with its quotes (RFC 9110, section 8.8.3)."""

    body: bytes
    content_type: str
    etag: str


class Pages:
    """A fixed table from paths to files."""

    def __init__(self, folder: Traversable) -> None:
        self._table: dict[str, Page] = {}
        for file in folder.iterdir():
            content_type = CONTENT_TYPES.get("." + file.name.rpartition(".")[2])
            if content_type is not None:
                body = file.read_bytes()
                page = Page(body, content_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
                self._table["/" if file.name == INDEX else f"/{file.name}"] = page

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self._table)

    def answer(self, path: str, headers: Headers) -> Response | None:
        """Return the answer to a GET of this path, compared undecoded, as it came; None where there is no such page."""
        page = self._table.get(path)
        if page is None:
            return None
        answer = Headers(Date=formatdate(usegmt=True), Connection="close", ETag=page.etag, **HEADERS)
        if _known(page.etag, headers.get_all("If-None-Match")):
            return Response(HTTPStatus.NOT_MODIFIED.value, HTTPStatus.NOT_MODIFIED.phrase, answer)
        answer["Content-Length"] = str(len(page.body))
        answer["Content-Type"] = page.content_type
        return Response(HTTPStatus.OK.value, HTTPStatus.OK.phrase, answer, page.body)


def web_pages() -> Pages:
    """Return the pages that come with this package."""
    return Pages(files("streaming") / "web")


def _known(etag: str, values: list[str]) -> bool:
    """Return whether an If-None-Match names this tag (RFC 9110, section 13.1.2: a weak comparison)."""
    tags = [tag.strip(" \t").removeprefix("W/") for value in values for tag in value.split(",")]
    return etag in tags or "*" in tags
