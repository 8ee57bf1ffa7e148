"""What `/metrics` says, after things that are known to have happened."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Callable, Iterator
from urllib.error import HTTPError

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed

from streaming.audio import FRAME
from streaming.engine.engine import Engine
from streaming.protocol import messages
from streaming.protocol.messages import SessionStart
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.tokens import Tokens
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, client, get, run, serving

FAST = SessionStart(pace="fast", max_seconds=0.8)
SPEECH = np.zeros(2 * FRAME, np.int16)
CLIENTS, SCRAPERS = "a-token-of-a-client", "a-token-of-a-scraper"

Figures = dict[tuple[str, frozenset[tuple[str, str]]], float]


def figures(text: str) -> Figures:
    """Every sample, by name and labels; each is there once."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "a series is there twice"
    return found


def scrape(server: LiveServer) -> Figures:
    return figures(get(f"{server.http}/metrics").decode())


def value(found: Figures, name: str, **labels: str) -> float:
    return found["streaming_" + name, frozenset(labels.items())]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(StubStep(2, rewind_frames=16), "stub", device="cpu", dtype="float32") as running:
        yield running


def _until(server: LiveServer, so: Callable[[Figures], bool]) -> Figures:
    async def wait() -> Figures:
        while not so(found := await asyncio.to_thread(scrape, server)):
            await asyncio.sleep(0.02)
        return found

    return run(wait(), 10)


def test_a_session_is_counted_from_its_beginning_to_its_end(engine: Engine) -> None:
    """Every figure that a session moves, to the number."""

    async def scenario(url: str) -> None:
        async with client(url, FAST) as session:
            await session.hear(SPEECH)
            await session.speak()
            await session.send(messages.Speak(turn=7))
            await session.expect(messages.Error)
            await session.hear(SPEECH, turn=2)
            await session.speak(2)
            await session.send(messages.Interrupt(turn=2, heard_samples=9 * FRAME))
            await session.expect(messages.Interrupted)
            await session.send(messages.SessionClose())
            await session.expect(messages.SessionClosed)

    with serving(engine, queue=3) as server:
        before = scrape(server)
        assert value(before, "sessions_opened_total") == 0
        assert value(before, "errors_total", code="internal") == 0, "its first is not to go unnoticed"
        run(scenario(server.url))
        after = _until(server, lambda found: value(found, "sessions_open") == 0)
        assert value(after, "sessions_opened_total") == 1
        assert value(after, "sessions_ended_total", reason="client") == 1
        assert value(after, "turns_total", reason="max_seconds") == 2
        assert value(after, "interruptions_total") == 1
        assert value(after, "errors_total", code="bad_state") == 1
        assert value(after, "frames_heard_total") == 4
        assert value(after, "frames_spoken_total") == 20
        assert value(after, "first_frame_seconds_count") == 2
        assert value(after, "step_seconds_count") == engine.stats().steps == 24
        assert value(after, "step_seconds_bucket", le="+Inf") == 24
        assert value(after, "step_seconds_bucket", le="0.08") <= 24
        assert (value(after, "slots"), value(after, "queue_limit"), value(after, "running")) == (2, 3, 1)
        assert value(after, "http_requests_total", path="/v1/continue", status="101") == 1
        build = next(dict(labels) for name, labels in after if name == "streaming_build_info")
        assert (build["model"], build["device"], build["dtype"]) == ("stub", "cpu", "float32")
        assert after["process_open_fds", frozenset()] > 0


def test_open_sessions_and_refusals_are_seen_while_they_last(engine: Engine) -> None:
    async def scenario(server: LiveServer) -> None:
        async with client(server.url, FAST), client(server.url, FAST) as second:
            found = await asyncio.to_thread(scrape, server)
            assert (value(found, "sessions_open"), value(found, "queue_length")) == (2, 0)
            with pytest.raises(ConnectionClosed):
                async with client(server.url, FAST):
                    pass
            second.socket.transport.abort()

    with serving(engine) as server:
        run(scenario(server))
        found = _until(server, lambda found: value(found, "sessions_open") == 0)
        assert value(found, "refused_total", code="full") == 1
        assert value(found, "sessions_ended_total", reason="left") == 2
        assert value(found, "sessions_opened_total") == 2


def test_sessions_that_wait_for_their_client_are_told_apart(engine: Engine) -> None:
    async def scenario(server: LiveServer) -> None:
        async with client(server.url, messages.SessionStart(resume=True)) as session:
            await session.hear(SPEECH)
            while value(await asyncio.to_thread(scrape, server), "frames_heard_total") < 2:
                await asyncio.sleep(0.02)
            session.socket.transport.abort()

    with serving(engine, resume_s=2.0) as server:
        run(scenario(server))
        away = _until(server, lambda found: value(found, "sessions_away") == 1)
        assert value(away, "sessions_open") == 1
        assert value(away, "sessions_lost_total") == 1
        gone = _until(server, lambda found: value(found, "sessions_open") == 0)
        assert value(gone, "sessions_away") == 0
        assert value(gone, "sessions_ended_total", reason="left") == 1


def test_reported_underruns_are_added_up_and_lies_are_not_believed(engine: Engine) -> None:
    """A report has the count of its turn so far: reports repeat it, and a client can say anything."""

    async def scenario(url: str) -> None:
        async with client(url, FAST) as session:
            await session.hear(SPEECH)
            await session.speak()
            for underruns in (1, 1, 3, 2, 2**63 - 1):
                await session.send(messages.Played(turn=1, samples=FRAME, underruns=underruns))
            await session.hear(SPEECH, turn=2)
            await session.speak(2)
            await session.send(messages.Played(turn=1, samples=FRAME, underruns=9))  # a turn that is over
            await session.send(messages.Played(turn=2, samples=FRAME, underruns=1))
            await session.send(messages.Ping(id=1, client_time_ms=0))
            await session.expect(messages.Pong)

    with serving(engine) as server:
        run(scenario(server.url))
        assert value(scrape(server), "underruns_total") == 10 + 1, "at most one for each frame that was sent"


def test_strangers_cannot_make_series(engine: Engine) -> None:
    """Labels that a peer can choose fill Prometheus' memory."""
    with serving(engine) as server:
        before = scrape(server)
        for number in range(20):
            with pytest.raises(HTTPError):
                get(f"{server.http}/x{number}?metrics")
        after = scrape(server)
        new = set(after) - set(before)
        assert {dict(labels).get("path") for _, labels in new} <= {"other", "/metrics"}
        assert value(after, "http_requests_total", path="other", status="404") == 20
        assert len(after) < 300


def _status(url: str, token: str | None) -> int:
    request = urllib.request.Request(url)  # noqa: S310  (loopback)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
            return int(response.status)
    except HTTPError as error:
        return error.code


def test_only_the_token_named_metrics_reads_them_and_it_opens_nothing(engine: Engine) -> None:
    """A client's token told it how many others there are; a scraper's, kept in a monitoring system, let it talk."""
    tokens = Tokens.from_text(f"ann:{CLIENTS},metrics:{SCRAPERS}")
    keeper = Gatekeeper(check_bind("127.0.0.1", tokens, tls=False, insecure_plaintext=False), tokens)
    with serving(engine, keeper) as server:
        assert _status(f"{server.http}/metrics", None) == 401
        assert _status(f"{server.http}/metrics", CLIENTS) == 401
        assert _status(f"{server.http}/metrics", SCRAPERS) == 200
        assert _status(f"{server.http}/v1/continue", SCRAPERS) == 401
        assert _status(f"{server.http}/v1/continue", CLIENTS) != 401
        assert _status(f"{server.http}/metrics?token={SCRAPERS}", SCRAPERS) == 401


def test_a_page_of_another_site_cannot_read_them(engine: Engine) -> None:
    with serving(engine) as server:
        request = urllib.request.Request(f"{server.http}/metrics", headers={"Origin": "https://evil.example"})  # noqa: S310
        with pytest.raises(HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=10)  # noqa: S310
