"""The server's own secret: where it comes from, and what it signs."""

from __future__ import annotations

from pathlib import Path

import pytest

from streaming.errors import SnapshotError
from streaming.server.door.session_key import SessionKey, SessionKeyError, load_session_key

SECRET = "k" * 32


def test_it_comes_from_the_environment_or_a_file(tmp_path: Path) -> None:
    """Pins a line end that makes two servers' keys differ."""
    file = tmp_path / "key"
    file.write_text(SECRET + "\n")
    assert load_session_key({}, None) is None
    key, same = load_session_key({"STREAMING_SESSION_KEY": f" {SECRET}"}, None), load_session_key({}, str(file))
    assert key is not None and same is not None
    assert key.derive("a") == same.derive("a") != key.derive("b")


@pytest.mark.parametrize("text", ["", "short", "k" * 2000, "\x00" * 10])
def test_what_cannot_be_used_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    """Pins a guessable key, and one that stands in a log."""
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(SessionKeyError) as found:
        load_session_key({}, str(file))
    assert not text.strip("\x00") or text not in str(found.value)
    with pytest.raises(SessionKeyError):
        load_session_key({}, str(tmp_path / "none"))
    with pytest.raises(SessionKeyError):
        load_session_key({"STREAMING_SESSION_KEY": SECRET}, str(file))


def test_any_change_of_what_is_signed_is_seen() -> None:
    """Pins a signature that leaves a byte out."""
    key = SessionKey(SECRET)
    data = bytearray(bytes(range(50)) + bytes(32))
    key.sign(data)
    signed = bytes(data)
    key.check(signed)
    for at in range(len(signed)):
        altered = bytearray(signed)
        altered[at] ^= 1
        with pytest.raises(SnapshotError):
            key.check(bytes(altered))
    for wrong in (signed[:-1], signed + b"x", b"", signed[:10]):
        with pytest.raises(SnapshotError):
            key.check(wrong)
    with pytest.raises(SnapshotError):
        SessionKey("j" * 32).check(signed)
