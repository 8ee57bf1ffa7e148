"""The log of a server: one event a line, nothing in it that is anybody's own, and never a flood."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from streaming.audio import FRAME
from streaming.engine.engine import Engine
from streaming.protocol import messages
from streaming.protocol.messages import SessionStart
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.tokens import Tokens
from streaming.server.watch.log import JsonFormatter, TextFormatter, Throttle, event
from tests.engine.stub_step import StubStep
from tests.server.live_server import client, run, serving

FAST = SessionStart(pace="fast", max_seconds=0.8)
SPEECH = np.full(2 * FRAME, 12345, np.int16)
TOKEN, WRONG = "a-token-of-24-characters", "another-token-24-letters"
LOGGER = logging.getLogger("streaming.tests")


class Lines(logging.Handler):
    """Formatted as the server would."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    @property
    def events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(JsonFormatter()), logging.getLogger("streaming")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_session_is_told_in_two_lines_and_by_the_same_id(lines: Lines) -> None:
    tokens = Tokens.from_text(f"ann:{TOKEN}")
    keeper = Gatekeeper(check_bind("127.0.0.1", tokens, tls=False, insecure_plaintext=False), tokens)
    bearer = {"additional_headers": {"Authorization": f"Bearer {TOKEN}"}}
    ids: list[str] = []

    async def scenario(url: str) -> None:
        async with client(url, FAST, **bearer, local_addr=("127.0.0.7", 0)) as session:
            started = next(said for said in session.said if isinstance(said, messages.SessionStarted))
            ids.append(started.session)
            await session.hear(SPEECH)
            await session.speak()
            await session.send(messages.SessionClose())
            await session.expect(messages.SessionClosed)
        wrong = {"additional_headers": {"Authorization": f"Bearer {WRONG}"}}
        with pytest.raises(Exception, match="401"):
            async with client(f"{url}?who=me", FAST, **wrong, local_addr=("127.0.0.7", 0)):
                pass

    with Engine(StubStep(1, rewind_frames=16), "stub") as engine, serving(engine, keeper) as server:
        run(scenario(server.url))
    assert [line["event"] for line in lines.events] == [
        "server.started",
        "session.opened",
        "turn.done",
        "session.ended",
        "refused",
        "server.stopping",
        "server.stopped",
    ]
    _, opened, turn, ended, refused, *_ = lines.events
    assert {opened["session"], turn["session"], ended["session"]} == {ids[0]}
    assert (opened["holder"], ended["holder"], ended["reason"]) == ("ann", "ann", "client")
    assert (ended["turns"], ended["heard_s"], ended["spoken_s"]) == (1, 0.16, 0.8)
    assert ended["first_frame_ms_p50"] == turn["first_frame_ms"], "of the only turn, from its prompt to its first frame"
    assert refused["code"] == "unauthorized"
    told = "\n".join(lines.lines)
    for private in (TOKEN, WRONG, "127.0.0.7", "who=me", "12345"):
        assert private not in told, "nobody's address, token, words or audio"


def test_an_error_is_told_with_its_session(lines: Lines) -> None:
    async def scenario(url: str) -> None:
        async with client(url, FAST) as session:
            await session.send(messages.Speak(turn=1))
            await session.expect(messages.Error)
            await session.socket.send('{"type": "speak", "turn": "\\u001b[31m from a stranger"}')
            await session.expect(messages.Error)

    with Engine(StubStep(1), "stub") as engine, serving(engine) as server:
        run(scenario(server.url))
    errors = [line for line in lines.events if line["event"] == "error"]
    assert [error["code"] for error in errors] == ["empty_prompt", "bad_message"]
    assert all(error["session"] for error in errors)
    assert "stranger" not in "".join(lines.lines)


def _record(level: int = logging.INFO, name: str = "x", **fields: str | int | float | None) -> logging.LogRecord:
    caught: list[logging.LogRecord] = []
    logger = logging.Logger("streaming.tests", logging.DEBUG)
    handler = logging.Handler()
    handler.emit = caught.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    event(logger, level, name, **fields)
    return caught[0]


def test_text_and_json_have_the_same_keys() -> None:
    record = _record(name="session.ended", reason="left", seconds=1.5, holder=None, text='a "b"\n')
    told = json.loads(JsonFormatter().format(record))
    assert told == {
        "time": told["time"],
        "level": "info",
        "event": "session.ended",
        "reason": "left",
        "seconds": 1.5,
        "text": 'a "b"\n',
    }
    text = TextFormatter().format(record)
    assert text.endswith(r'Z INFO session.ended reason=left seconds=1.5 text="a \"b\"\n"')
    assert "\n" not in text


def test_what_is_no_event_is_told_all_the_same() -> None:
    """A library's warning, and a traceback, which is one line of JSON."""
    try:
        raise ValueError("boom")
    except ValueError:
        record = logging.LogRecord("lib", logging.ERROR, "", 1, "it %s", ("broke",), sys.exc_info())
    told = json.loads(JsonFormatter().format(record))
    assert (told["event"], told["logger"], told["message"], told["level"]) == ("log", "lib", "it broke", "error")
    assert "ValueError: boom" in told["exception"]
    assert "it broke" in TextFormatter().format(record)


def test_a_flood_of_one_kind_is_a_few_lines_and_a_count() -> None:
    """A stranger who knocks filled the disk."""
    now = [0.0]
    throttle = Throttle(clock=lambda: now[0])

    def passed(count: int, code: str) -> list[logging.LogRecord]:
        records = [_record(logging.WARNING, "refused", code=code) for _ in range(count)]
        return [record for record in records if throttle.filter(record)]

    assert len(passed(10_000, "full")) == 10
    assert len(passed(3, "unauthorized")) == 3, "another kind has its own"
    now[0] = 5.0
    (again,) = passed(2, "full")
    assert json.loads(JsonFormatter().format(again))["suppressed"] == 9_990
    now[0] = 3600.0
    later = passed(100, "full")
    assert len(later) == 10, "what was not used is not saved up"
    assert json.loads(JsonFormatter().format(later[0]))["suppressed"] == 1, "each is counted once"


def test_kinds_are_bounded() -> None:
    throttle = Throttle(clock=lambda: 0.0)
    for number in range(5_000):
        throttle.filter(_record(name=f"kind {number}"))
    assert len(throttle._buckets) <= 1_000
