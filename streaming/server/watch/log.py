"""The server's log: one event a line, as text or as JSON with the same keys, and no more lines than a disk bears.

Nothing that a peer sent is logged, nor its address, a token or audio: what may be logged is what callers of `event`
name, and those are ids, codes and figures of this server's own making.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Literal

from streaming.server.token_buckets import TokenBuckets

Format = Literal["text", "json"]
Value = str | int | float | None

_QUIET_LINES, _QUIET_PER_S = 600, 10.0
_LOUD_LINES, _LOUD_PER_S = 10, 0.2
"""Lines of one kind that are written at once, and then each second. A flood makes warnings, so they have fewer."""
_KINDS = 1_000


def event(logger: logging.Logger, level: int, name: str, **fields: Value) -> None:
    """Log that something happened. name: stable, with dots; fields: those that are None are left out."""
    logger.log(level, name, extra={"fields": {key: value for key, value in fields.items() if value is not None}})


def configure(form: Format, level: str) -> None:
    """Log to standard error: this package's records from `level` on, of libraries warnings and errors only.

    Libraries are not opened further, whatever the level: at DEBUG `websockets` would log headers, with tokens in them.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(Throttle())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    logging.getLogger("streaming").setLevel(level.upper())
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # it logs strangers' rubbish as errors, with tracebacks


class Throttle(logging.Filter):
    """A filter that lets so many lines of a kind through: of the same logger, text before formatting, and code.

    The next line that is let through says how many were not. Metrics count all of them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._buckets: TokenBuckets[tuple[str, str, Value]] = TokenBuckets(_KINDS)

    def filter(self, record: logging.LogRecord) -> bool:
        loud = record.levelno >= logging.WARNING
        most, per_s = (_LOUD_LINES, _LOUD_PER_S) if loud else (_QUIET_LINES, _QUIET_PER_S)
        key, now = (record.name, str(record.msg), _fields(record).get("code")), self._clock()
        bucket = self._buckets.of(key, most, per_s, now)
        if bucket.take(now):
            return False
        record.suppressed, bucket.missed = bucket.missed, 0
        return True


class JsonFormatter(logging.Formatter):
    """`time`, `level` and `event` in every line; what is no event of ours is the event `log`, with its `message`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Value] = {"time": _time(record), "level": record.levelname.lower(), **_content(record)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """The same for a person: `key=value`, quoted where it has to be."""

    def format(self, record: logging.LogRecord) -> str:
        content = _content(record)
        name = content.pop("event")
        words = [_time(record), record.levelname, str(content.pop("message")) if name == "log" else str(name)]
        line = " ".join([*words, *(f"{key}={_quoted(value)}" for key, value in content.items())])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, Value]:
    return getattr(record, "fields", {})  # logging makes an attribute of `extra`


def _content(record: logging.LogRecord) -> dict[str, Value]:
    content: dict[str, Value] = {"event": "log", "logger": record.name, "message": record.getMessage()}
    if "fields" in record.__dict__:
        content = {"event": record.getMessage(), **_fields(record)}
    suppressed: int = getattr(record, "suppressed", 0)
    return content | {"suppressed": suppressed} if suppressed else content


def _time(record: logging.LogRecord) -> str:
    """Return when a record was made, in UTC as RFC 3339 writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"


def _quoted(value: Value) -> str:
    text = str(value)
    return text if text.isprintable() and text and not set(text) & set(' "=') else json.dumps(text)
