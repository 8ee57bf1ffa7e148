"""What the documents say of exit statuses, close codes, refusals and memory, against what happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streaming import scoring
from streaming.audio import FRAME
from streaming.device_step import slot_bytes
from streaming.engine.engine import Engine
from streaming.loading import load_models
from streaming.models import voice_activity
from streaming.models.random_weights import DECODERS, random_codec, random_decoder
from streaming.protocol import messages
from streaming.protocol.messages import SessionResume, SessionStart
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.limits import Limits
from streaming.server.door.proxies import parse_proxies
from streaming.server.door.session_key import SessionKey
from streaming.server.door.tokens import Tokens
from streaming.server.handover import Handover
from streaming.server.session_store import SessionStore
from tests.deploy.stub_server import STUBBED
from tests.engine.stub_step import StubStep
from tests.server.live_server import Client, LiveServer, client, get, run, serving

ROOT = Path(__file__).parents[1]
FAST = SessionStart(pace="fast", max_seconds=0.8)
SPEECH = np.zeros(3 * FRAME, np.int16)
TOKEN = "a-token-of-24-characters"  # noqa: S105


def table(page: str, first_cell: str) -> list[list[str]]:
    """The rows of the table whose first heading is this, cell by cell."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def _bearer(token: str) -> dict[str, dict[str, str]]:
    return {"additional_headers": {"Authorization": f"Bearer {token}"}}


def _keeper(tokens: Tokens | None, limits: Limits | None = None) -> Gatekeeper:
    bind = check_bind("127.0.0.1", tokens, tls=False, insecure_plaintext=False)
    return Gatekeeper(bind, tokens, limits=limits or Limits())


# Refusals


async def _refused(socket: ClientConnection, first: messages.Message, saved: bytes = b"") -> messages.SessionRefused:
    session = Client(socket)
    await session.send(first)
    for piece in messages.pieces(saved):
        await socket.send(messages.encode_piece(piece))
    refused = await session.expect(messages.SessionRefused)
    with pytest.raises(ConnectionClosed):
        await socket.recv()
    assert socket.close_code == 1013
    return refused


@asynccontextmanager
async def _speaking(server: LiveServer, step: StubStep) -> AsyncIterator[Client]:
    """A session in the middle of a turn, of a step that is gated."""
    async with client(server.url, FAST) as session:
        await session.hear(SPEECH)
        await session.send(messages.Speak(turn=1))
        step.allow(5)
        await session.expect(messages.TurnSpeaking)
        yield session


async def _stopping(server: LiveServer, step: StubStep) -> messages.SessionRefused:
    async with _speaking(server, step):
        server.stop()
        while "streaming_running 1.0" in (await asyncio.to_thread(get, server.http + "/metrics")).decode():
            await asyncio.sleep(0.02)
        async with connect(server.url) as socket:
            refused = await _refused(socket, FAST)
        step.allow_all()
    return refused


async def _when_taken(server: LiveServer, **connecting: object) -> messages.SessionRefused:
    async with client(server.url, FAST, **connecting), connect(server.url, **connecting) as socket:  # type: ignore[arg-type]
        return await _refused(socket, FAST)


async def _first(server: LiveServer, first: messages.Message, saved: bytes = b"") -> messages.SessionRefused:
    async with connect(server.url) as socket:
        return await _refused(socket, first, saved)


async def _expired(server: LiveServer) -> messages.SessionRefused:
    async with client(server.url, SessionStart(resume=True)) as session:
        started = session.said[0]
        assert isinstance(started, messages.SessionStarted) and started.resume is not None
        await session.send(messages.SessionClose())
        await session.expect(messages.SessionClosed)
    return await _first(server, SessionResume(token=started.resume.token, received=0, position=0))


def _refusal_of(code: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> messages.SessionRefused:
    """Bring a server into the state in which it refuses so, and ask."""
    elsewhere = SessionResume(token="00000000.x", received=0, position=0)  # noqa: S106
    if code == "overloaded":
        with Engine(StubStep(2, delay_s=lambda: 0.1)) as engine, engine.open(seed=1) as session:
            session.listen(np.zeros(FRAME, np.float32))
            list(session.speak(max_frames=3))
            with serving(engine) as server:
                return run(_first(server, FAST))
    if code == "too_many_sessions":
        keeper = _keeper(Tokens.from_text(f"ann:{TOKEN}"), Limits(sessions_per_token=1))
        with Engine(StubStep(2)) as engine, serving(engine, keeper) as server:
            return run(_when_taken(server, **_bearer(TOKEN)))
    if code == "vad_unavailable":

        def unavailable() -> None:
            raise voice_activity.VoiceActivityUnavailableError("no model")

        monkeypatch.setattr(voice_activity, "load_vad_model", unavailable)
    step = StubStep(1, gated=code == "stopping")
    altered = bytes(1_000)
    key = SessionKey("k" * 32) if code == "bad_snapshot" else None
    store = SessionStore(str(folder), None) if code in ("session_moving", "session_store") else None
    with Engine(step) as engine, serving(engine, allow_save=key is not None, session_key=key, store=store) as server:
        if code == "session_moving":
            (folder / "owners" / elsewhere.token.partition(".")[0]).write_bytes(b"lives")
        if code == "session_store":
            (folder / "sessions" / Handover.name_of(elsewhere.token)).write_bytes(b"")
            (folder / "claims").rmdir()
            (folder / "claims").write_bytes(b"")
        if code == "engine_stopped":
            engine.close()
        asked = {
            "full": lambda: _when_taken(server),
            "stopping": lambda: _stopping(server, step),
            "engine_stopped": lambda: _first(server, FAST),
            "unsupported_protocol": lambda: _first(server, SessionStart(protocol=2)),
            "vad_unavailable": lambda: _first(server, SessionStart(turn_taking="vad")),
            "saving_unavailable": lambda: _first(server, SessionStart(saved_bytes=len(altered))),
            "bad_snapshot": lambda: _first(server, SessionStart(saved_bytes=len(altered)), altered),
            "session_expired": lambda: _expired(server),
            "session_elsewhere": lambda: _first(server, elsewhere),
            "session_moving": lambda: _first(server, elsewhere),
            "session_store": lambda: _first(server, elsewhere),
        }
        return run(asked[code]())


REFUSALS = table("protocol.md", "code")


@pytest.mark.parametrize(("code", "retry_after_ms"), [(row[0].strip("`"), int(row[1])) for row in REFUSALS])
def test_a_refusal_is_as_documented(
    code: str, retry_after_ms: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Clients are written from that page: a code that the page alone has is a branch that never runs."""
    refused = _refusal_of(code, monkeypatch, tmp_path)
    assert (refused.code, refused.retry_after_ms) == (code, retry_after_ms)


HTTP_REFUSALS = table("protocol.md", "HTTP status")


def test_refusals_before_the_handshake_are_as_documented() -> None:
    async def status(url: str, **connecting: object) -> tuple[int, str, set[str]]:
        try:
            async with connect(url, **connecting):  # type: ignore[arg-type]
                return 101, "", set()
        except InvalidStatus as error:
            response = error.response
            return response.status_code, response.body.decode().partition(":")[0], set(response.headers)

    async def scenario(url: str, crowded: str) -> dict[str, tuple[int, str, set[str]]]:
        found = [
            await status(url),
            await status(f"{url}?token={TOKEN}"),
            await status(url, origin="https://evil.example", **_bearer(TOKEN)),
            await status(url, additional_headers=[("Authorization", "Bearer a"), ("Authorization", "Bearer b")]),
            await status(crowded, additional_headers={"X-Forwarded-For": "192.0.2.1"}),
        ]
        return {code: (number, code, headers) for number, code, headers in found}

    tokens, limits = Tokens.from_text(f"ann:{TOKEN}"), Limits(connection_burst=0, connections_per_s=0.001)
    bind = check_bind("127.0.0.1", None, tls=False, insecure_plaintext=False)
    strict = Gatekeeper(bind, None, limits=limits, proxies=parse_proxies(["127.0.0.0/8"]))
    with Engine(StubStep(1)) as engine, serving(engine, _keeper(tokens)) as one, serving(engine, strict) as other:
        found = run(scenario(one.url, other.url))
    assert {(str(number), f"`{code}`") for number, code, _ in found.values()} == {(a, b) for a, b, _ in HTTP_REFUSALS}
    for _, code, when in HTTP_REFUSALS:
        for header in re.findall(r"with `([A-Za-z-]+)`", when):
            assert header.lower() in {name.lower() for name in found[code.strip("`")][2]}


# Close codes


async def _close_of(server: LiveServer, code: str, step: StubStep) -> int | None:
    if code == "1001":
        async with client(server.url, FAST) as session:
            server.stop()
            await session.expect(messages.SessionClosed)
            await session.socket.wait_closed()
            return session.socket.close_code
    if code in ("1008", "1013"):
        async with client(server.url, FAST), connect(server.url, compression=None) as socket:
            await socket.send(messages.encode(FAST) if code == "1013" else '{"type": "session.start", "pace": 1}')
            await socket.wait_closed()
            return socket.close_code
    async with client(server.url, FAST) as session:
        match code:
            case "1000":
                await session.send(messages.SessionClose())
            case "1002":
                session.socket.transport.write(b"\xff\x80\0\0\0\0")  # reserved bits, and an opcode that there is not
            case "1007":
                await session.socket.send('{"type": "speak", "turn": "one"}')
            case "1009":
                await session.socket.send(b"\1" + bytes(96_016))
            case "1011":
                step.failure = RuntimeError("lost")
                await session.hear(SPEECH)
        with contextlib.suppress(ConnectionClosed):
            while True:
                await session.expect(messages.Message)
        return session.socket.close_code


CLOSES = [row[0] for row in table("protocol.md", "close code")]


@pytest.mark.parametrize("code", CLOSES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_close_code_is_as_documented(code: str) -> None:
    """A malformed `session.start` closed with another code than the page said."""
    step = StubStep(1)
    with Engine(step) as engine, serving(engine) as server:
        assert run(_close_of(server, code, step)) == int(code)


def test_the_close_codes_are_all_that_there_are() -> None:
    assert CLOSES == ["1000", "1001", "1002", "1007", "1008", "1009", "1011", "1013"]


# Exit statuses


def _python(*arguments: str, environment: dict[str, str] | None) -> subprocess.Popen[str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("STREAMING_")}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ours | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def _running(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    process = _python(*arguments, environment=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _status(*arguments: str) -> tuple[int, str]:
    """Return the exit status of a command that ends by itself, and the last line that it says."""
    with _running(*arguments) as process:
        _, said = process.communicate(timeout=120)
        assert "Traceback" not in said, said
        return process.returncode, said.strip().splitlines()[-1] if said.strip() else ""


def _signalled(
    number: signal.Signals,
    *arguments: str,
    wait_for: Callable[[subprocess.Popen[str]], None],
    environment: dict[str, str] | None = None,
) -> int:
    """Return the exit status of a command that gets this signal. environment: variables besides this process' own."""
    with _running(*arguments, environment=environment) as process:
        wait_for(process)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert "Traceback" not in said, said
        return process.returncode


def _importing(process: subprocess.Popen[str]) -> None:
    """Wait until a command is in the middle of importing torch."""
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text(encoding="utf-8"):
        time.sleep(0.01)


def _first_line(process: subprocess.Popen[str]) -> None:
    """Wait until a command has said something."""
    assert process.stdout is not None
    print(process.stdout.readline())


SERVER = ("server.py", "--port", "0")
SCORE = ("-m", "streaming.score", "examples/prompt.wav")
STEP = ("-m", "streaming.benchmark", "step", "--slots", "1", "--seconds", "0.01")
FLEET = ("-m", "streaming.benchmark", "fleet", "--replicas", "2", "--minutes", "0.05", "--policies", "random")


def _server_status(documented: str) -> int:
    if documented in ("130", "143"):
        return _signalled(signal.SIGINT if documented == "130" else signal.SIGTERM, *SERVER, wait_for=_importing)
    if documented == "0":
        return _signalled(signal.SIGTERM, *SERVER, environment=STUBBED, wait_for=_first_line)
    if documented == "2":
        return _status("server.py", "--port", "many")[0]
    status, line = _status(*SERVER, "--model", "/nowhere")
    assert line.startswith("server.py: /nowhere is not a folder")
    return status


def _benchmark_status(documented: str) -> int:
    if documented in ("130", "143"):
        number = signal.SIGINT if documented == "130" else signal.SIGTERM
        return _signalled(number, *STEP, wait_for=_importing)
    if documented == "2":
        return _status(*FLEET, "--nonsense")[0]
    if documented == "1":
        status, line = _status(*FLEET, "--steps", "/nowhere")
        assert line.startswith("benchmark: /nowhere is neither")
        return status
    return _status(*FLEET)[0]


def _score_status(documented: str) -> int:
    """In this process where nothing depends on its being another one: each would import torch."""
    if documented in ("130", "143"):
        number = signal.SIGINT if documented == "130" else signal.SIGTERM
        return _signalled(number, *SCORE, wait_for=_importing)
    if documented == "2":
        with pytest.raises(SystemExit) as ended:
            scoring.main(["--nonsense"])
        assert isinstance(ended.value.code, int)
        return ended.value.code
    return scoring.main(
        [str(ROOT / "examples" / "prompt.wav"), *(["--model", "/nowhere"] if documented == "1" else [])]
    )


def _client_status(documented: str) -> int:
    talk = ("client.py", "--input", "examples/prompt.wav", "--pace", "fast", "--max-seconds", "0.1")
    if documented in ("130", "143"):
        number = signal.SIGINT if documented == "130" else signal.SIGTERM
        # its own server has been started: the client's first line
        return _signalled(number, *talk, wait_for=_first_line)
    if documented == "2":
        return _status("client.py", "--max-seconds", "0")[0]
    if documented == "1":
        return _status(*talk, "--url", "ws://127.0.0.1:1")[0]
    return _status(*talk)[0]


STATUSES = [row[0] for row in table("operations.md", "exit status")]


@pytest.mark.skipif(sys.platform != "linux", reason="POSIX signals, and /proc")
@pytest.mark.parametrize("documented", STATUSES)
@pytest.mark.parametrize("command", ["server", "client", "benchmark", "score"])
def test_an_exit_status_is_as_documented(documented: str, command: str) -> None:
    """A signal while a command loaded ended it with -15 or -2, or in a traceback of an import."""
    provoke = {
        "server": _server_status,
        "client": _client_status,
        "benchmark": _benchmark_status,
        "score": _score_status,
    }
    assert provoke[command](documented) == int(documented)


def test_the_exit_statuses_are_all_that_there_are() -> None:
    assert STATUSES == ["0", "1", "2", "130", "143"]


# Memory


@pytest.mark.parametrize("row", table("operations.md", "model"), ids=lambda row: str(row[0]))
def test_the_memory_of_a_slot_is_as_documented(row: list[str]) -> None:
    meta = torch.device("meta")
    if row[0] == "demo":
        models = load_models("demo", device="cpu")
        codec, decoder = models.codec, models.decoder
    else:
        name = row[0].removeprefix("Llama-Mimi ").lower()
        codec, decoder = random_codec(4, meta), random_decoder(DECODERS[name], meta, torch.float32)
    whole, without = (slot_bytes(codec, part, 1024, 16) for part in (decoder, None))
    for told, found in zip(row[1:], (whole - without, without, whole), strict=True):
        number = float(told.removesuffix(" MB"))
        assert number == pytest.approx(found / 1e6, abs=0.5 if number > 20 else 0.05)


def test_the_image_presets_what_is_documented() -> None:
    from tests.deploy.test_image import environment

    told: dict[str, str] = {}
    for names, values in (row[:2] for row in table("operations.md", "variable")):
        found = re.findall(r"`([^`]+)`", names)
        told |= dict(zip(found, re.findall(r"`([^`]+)`", values), strict=False))
    assert told == environment() | {"STREAMING_DEVICE": "cpu"}
