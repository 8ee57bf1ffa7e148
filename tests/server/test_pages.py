"""The table of the page's files: what is in it, and how it answers."""

from __future__ import annotations

import http.client
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from websockets.datastructures import Headers

from streaming.engine.engine import Engine
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.tokens import Tokens
from streaming.server.pages import HEADERS, Pages, web_pages
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, serving

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-24-characters"  # noqa: S105


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """A server that asks for a token."""
    tokens = Tokens.from_text(f"ann:{TOKEN}")
    keeper = Gatekeeper(check_bind("127.0.0.1", tokens, tls=False, insecure_plaintext=False), tokens)
    with Engine(StubStep(2), "stub") as engine, serving(engine, keeper) as live:
        yield live


def _ask(server: LiveServer, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.http).netloc, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_the_page_comes_without_a_token_and_all_that_it_names_comes_with_it(server: LiveServer) -> None:
    """The page stood behind the token that it is there to ask for; a module was renamed and missing."""
    answer, body = _ask(server, "/")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert TOKEN.encode() not in body
    seen, todo = {"/"}, re.findall(r'(?:href|src)="([^"]+)"', body.decode())
    assert todo
    while todo:
        name = todo.pop()
        path = f"/{name.removeprefix('./')}"
        if path in seen:
            continue
        seen.add(path)
        answer, body = _ask(server, path)
        assert answer.status == 200, path
        if path.endswith(".js"):
            assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
            todo += re.findall(r'(?:from |")"?(\.?/?[a-z-]+\.js)"', body.decode())
    assert seen == web_pages().paths, "a file that nothing uses"


def test_every_answer_tells_the_browser_to_be_strict(server: LiveServer) -> None:
    """Without these headers the page can be framed, be sniffed into a script, or call another host."""
    for path in web_pages().paths:
        answer, _ = _ask(server, path)
        for name, value in HEADERS.items():
            assert answer.headers.get_all(name) == [value]
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "*" not in policy
    for path in ("/health", "/nothing-here", "/v1/continue"):
        assert _ask(server, path)[0].headers.get_all("X-Content-Type-Options") == ["nosniff"]


def test_a_file_that_the_browser_has_is_not_sent_again(server: LiveServer) -> None:
    """A new server's page is seen at once, and an old one costs a few hundred bytes."""
    whole, body = _ask(server, "/app.js")
    etag = whole.headers["ETag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer, nothing = _ask(server, "/app.js", **{"If-None-Match": known})
        assert (answer.status, nothing) == (304, b"")
        assert answer.headers["ETag"] == etag
        assert answer.headers["Cache-Control"] == "no-cache"
    for unknown in ('"other"', etag.strip('"'), ""):
        answer, again = _ask(server, "/app.js", **{"If-None-Match": unknown})
        assert (answer.status, again) == (200, body)


def test_head_has_the_headers_of_get_and_no_body(server: LiveServer) -> None:
    """RFC 9110, section 9.3.2, says so."""
    for path in ("/", "/app.js", "/health", "/nothing-here"):
        get, body = _ask(server, path)
        head, nothing = _ask(server, path, "HEAD")
        assert (head.status, nothing) == (get.status, b"")
        assert head.headers["Content-Length"] == str(len(body)) or path == "/health"  # its figures may change
        assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert _ask(server, "/v1/continue", "HEAD")[0].status == 405
    refused, _ = _ask(server, "/app.js", "DELETE")
    assert (refused.status, refused.headers["Allow"]) == (405, "GET, HEAD")


def test_only_known_kinds_of_file_are_served(tmp_path: Path) -> None:
    """An editor's backup or a package.json in the folder is nobody's business."""
    for name in ("index.html", "a.js", "a.js~", "package.json", ".hidden", "no-ending"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.d").mkdir()
    pages = Pages(tmp_path)
    assert pages.paths == {"/", "/a.js"}
    for path in ("/index.html", "/a.js/", "//a.js", "/./a.js", "/A.js", "a.js", "/a%2ejs", "", "/package.json"):
        assert pages.answer(path, Headers()) is None


def test_the_wheel_holds_the_page(tmp_path: Path) -> None:
    """An installed server whose page is 404: only Python files are packaged by themselves."""
    if importlib.util.find_spec("setuptools") is None:  # not imported here: it takes the place of distutils
        pytest.skip("needs setuptools to build a wheel without the network")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "streaming", tmp_path / "streaming")
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {"index.html" if path == "/" else path[1:] for path in web_pages().paths}
    assert {f"streaming/web/{file}" for file in files} <= names
