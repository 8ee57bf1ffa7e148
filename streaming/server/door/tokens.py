"""Named access tokens from the environment or a file, and what a change of that file revokes.

A token never comes from a flag: every user of a machine sees the flags of its processes. What is kept of one is its
SHA-256 digest, and no message or log line here holds a token, or text that might be one.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import re
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Self

from streaming.errors import StreamingError

_LOG = logging.getLogger(__name__)

ENVIRONMENT = "STREAMING_TOKENS"
MIN_TOKEN_CHARACTERS = 16
MAX_TOKEN_CHARACTERS = 256
MAX_TOKENS = 1_000
"""Most tokens there may be. Each token presented is compared with all of them; a thousand take 0.1 ms."""
MAX_FILE_BYTES = 1 << 19
LOOK_INTERVAL_S = 1.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
# What both a Bearer token (RFC 6750, section 2.1) and a WebSocket subprotocol (RFC 6455, section 4.1) may hold.
_TOKEN = re.compile(r"[A-Za-z0-9._~+-]+", re.ASCII)
_MAKE_ONE = 'make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'


class TokensError(StreamingError):
    """The tokens that the operator gave cannot be used. The message says which line, never what is in it."""

    code = "bad_tokens"


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a token. name: for limits, metrics and logs; digest: SHA-256 of the token."""

    name: str
    digest: bytes = field(repr=False)


class _ExhaustedError(StreamingError):
    """This process cannot open any file just now, which says nothing about the file: look again later."""


_Signature = tuple[int, int, int, int]


class Tokens:
    """The set of valid tokens, kept in step with its file.

    The file is looked at no more than once a second, when somebody presents a token or a session is asked after. What
    a change does:

    - Two looks in a row must find the file the same before it counts in full, so a file that is being written is not
      taken at its word. Meanwhile a token lets in only if the file had it before and has it now: what was taken out
      opens nothing from the first look on, and running sessions are left alone until the second.
    - A file that is gone, unreadable or empty revokes every token. It never means that no token is needed.
    - Where this process cannot open any file (out of descriptors, out of memory), nothing is known and nothing changes:
      whoever can bring that about must not be able to end everybody's sessions while the operator edits the file.
    - A malformed file can only take away: tokens that it had and still has, word for word, go on; nothing new counts
      until it is repaired. So a slip of the pen locks nobody out who is still listed, lets nobody in, and does not hold
      up a revocation in the next line.
    """

    def __init__(self, holders: Iterable[Holder], path: Path | None = None, now: float = 0.0) -> None:
        self._held = self._seen = tuple(holders)  # the holders that count, and those that the latest look has found
        self._path = path
        self._signature: _Signature | None = None
        self._settled = path is None
        self._next_look = now + LOOK_INTERVAL_S

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read `name:token`, separated by commas or newlines. Raises `TokensError`."""
        return cls(_usable(re.split(r"[,\n]", text), f"{ENVIRONMENT}, entry"))

    @classmethod
    def from_file(cls, path: Path, now: float) -> Self:
        """Read one `name:token` a line; blank lines and those that begin with `#` are skipped. Raises `TokensError`.

        now: of the clock that `check` will be given, in seconds. A file that others may read gets a warning.
        """
        try:
            signature, lines = _signature(path), _read(path)
        except OSError as error:
            raise TokensError(f"cannot read the tokens in {path}: {error.strerror}") from None
        tokens = cls(_usable(lines, f"{path}, line"), path, now)
        _warn_of_readers(path)
        tokens._signature = signature
        return tokens

    def check(self, token: str, now: float) -> Holder | None:
        """Return whose token this is, or None. now: seconds, monotonic."""
        self._look(now)
        if len(token) > MAX_TOKEN_CHARACTERS or not _TOKEN.fullmatch(token):
            return None
        digest = sha256(token.encode("ascii")).digest()
        found = _find(self._seen, digest)
        return found if self._settled or _find(self._held, digest) == found else None

    def still_valid(self, holder: Holder, now: float) -> bool:
        """Return whether a session that this token opened may go on."""
        self._look(now)
        return _find(self._held, holder.digest) == holder

    def _look(self, now: float) -> None:
        if self._path is None or now < self._next_look:
            return
        self._next_look = now + LOOK_INTERVAL_S
        signature = _signature(self._path)
        if signature == self._signature and self._settled:
            return
        # An unsettled file is read again even when it looks the same: a write in the same tick of the file system's
        # clock as the first look would otherwise never be noticed.
        try:
            seen, complaint = _look_into(self._path, self._held)
        except _ExhaustedError:
            return
        if complaint is not None and signature != self._signature:
            _LOG.warning("%s", complaint)
        self._settled = signature == self._signature and seen == self._seen
        self._signature, self._seen = signature, seen
        if self._settled and seen != self._held:
            _LOG.info("the token file has changed: %d tokens are valid now, %d were", len(seen), len(self._held))
            self._held = seen
            if seen:
                _warn_of_readers(self._path)


def load_tokens(environment: Mapping[str, str], path: str | None, now: float) -> Tokens | None:
    """Return the tokens of `STREAMING_TOKENS` or of the file; None where neither is given. Raises `TokensError`."""
    text = environment.get(ENVIRONMENT)
    if text is None:
        return None if path is None else Tokens.from_file(Path(path), now)
    if path is not None:
        raise TokensError(f"both {ENVIRONMENT} and --tokens are given; unset the one or leave out the other")
    return Tokens.from_text(text)


def _find(holders: Iterable[Holder], digest: bytes) -> Holder | None:
    """Return whose digest this is. All are compared, so that the time taken tells nothing."""
    found = None
    for holder in holders:
        if hmac.compare_digest(holder.digest, digest):
            found = holder
    return found


def _signature(path: Path) -> _Signature | None:
    """Return what changes when the file does, or None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _read(path: Path) -> list[str]:
    """Return the file's lines. Raises `OSError`, also for what is no file, or far too large to be one of tokens."""
    if not path.is_file():
        path.stat()  # raises `OSError` where there is no file
        raise OSError(errno.EINVAL, "not a regular file")  # a pipe can be read once only
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_FILE_BYTES} bytes")
    return data.decode("utf-8-sig", errors="replace").split("\n")


def _look_into(path: Path, held: tuple[Holder, ...]) -> tuple[tuple[Holder, ...], str | None]:
    """Return which entries of a changed file count, given those that counted before, and what to say of the file.

    Raises `_ExhaustedError`.
    """
    try:
        lines = _read(path)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise _ExhaustedError from None
        return (), f"the token file cannot be read ({error.strerror}); no token is valid until it can"
    holders, problem = _parse(lines)
    if problem is None:
        return holders, None
    (where, what), before = problem, frozenset(held)
    complaint = f"the token file is malformed, so nothing new in it counts: line {where} {what}"
    return tuple(dict.fromkeys(holder for holder in holders if holder in before)), complaint


def _warn_of_readers(path: Path) -> None:
    with suppress(OSError):
        if os.name == "posix" and path.stat().st_mode & stat.S_IROTH:
            _LOG.warning("every user of this machine can read the token file; chmod 600 it")


def _usable(lines: Iterable[str], where: str) -> tuple[Holder, ...]:
    holders, problem = _parse(lines)
    if problem is not None:
        raise TokensError(f"{where} {problem[0]}: {problem[1]}")
    return holders


def _parse(lines: Iterable[str]) -> tuple[tuple[Holder, ...], tuple[int, str] | None]:
    """Return all lines that are entries by themselves, and the first problem: its line's number, and what is wrong."""
    holders: list[Holder] = []
    names: dict[str, int] = {}
    digests: dict[bytes, int] = {}
    problem: tuple[int, str] | None = None
    number = 0
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, colon, token = (part.strip() for part in text.partition(":"))
        wrong = _wrong(name, colon, token)
        if wrong is None:
            holder = Holder(name, sha256(token.encode("ascii")).digest())
            if name in names:
                wrong = f"has the same name as {names[name]}"
            elif holder.digest in digests:
                wrong = f"has the same token as {digests[holder.digest]}"
            elif len(holders) >= MAX_TOKENS:
                wrong = f"is one token too many; {MAX_TOKENS} may be given"
            names.setdefault(name, number)
            digests.setdefault(holder.digest, number)
            holders.append(holder)
        if wrong is not None and problem is None:
            problem = number, wrong
    if not holders and problem is None:
        problem = number, f"is the last, and there was no token; give name:token; {_MAKE_ONE}"
    return tuple(holders), problem


def _wrong(name: str, colon: str, token: str) -> str | None:
    if not colon:
        return "is not name:token"
    if not _NAME.fullmatch(name):
        return "has no name that can be used before its colon: up to 64 letters, digits, dots, dashes and underscores"
    if len(token) < MIN_TOKEN_CHARACTERS:
        return f"has a token of {len(token)} characters, and {MIN_TOKEN_CHARACTERS} are the fewest; {_MAKE_ONE}"
    if len(token) > MAX_TOKEN_CHARACTERS:
        return f"has a token of {len(token)} characters, and {MAX_TOKEN_CHARACTERS} are the most"
    if not _TOKEN.fullmatch(token):
        return f"has a token with other characters than letters, digits and ._~+- in it; {_MAKE_ONE}"
    return None
