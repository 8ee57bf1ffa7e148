"""What the client brings to a session: a saved conversation, and the key of the servers that it starts itself."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from streaming.errors import ContinuationError
from streaming.terminal.connecting import check_writable, own_key, read_saved


def test_this_users_servers_have_one_key_that_nobody_else_reads(tmp_path: Path) -> None:
    """Pins a conversation that only the server that saved it could load, which ended with the client."""
    home = {"XDG_STATE_HOME": str(tmp_path)}
    key = own_key(home)
    assert len(key) >= 32 and own_key(home) == key
    (file,) = (tmp_path / "streaming-continuation").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert own_key({**home, "STREAMING_SESSION_KEY": "given"}) == "given"


def test_a_key_that_cannot_be_kept_is_told_in_a_sentence(tmp_path: Path) -> None:
    """Pins a traceback where the home folder is no folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ContinuationError, match="cannot keep the key"):
        own_key({"XDG_STATE_HOME": str(tmp_path / "file")})


def test_a_saved_conversation_that_cannot_be_read_is_told_in_a_sentence(tmp_path: Path) -> None:
    """Pins a traceback for a file that is not there, and a new conversation for an empty one."""
    (tmp_path / "empty").write_bytes(b"")
    for name in ("none", "empty"):
        with pytest.raises(ContinuationError, match=name):
            read_saved(str(tmp_path / name))


def test_where_nothing_can_be_saved_it_is_told_before_the_conversation(tmp_path: Path) -> None:
    """A conversation was lost at its end to a folder that was not there."""
    check_writable(str(tmp_path / "talk.session"))
    assert not list(tmp_path.iterdir()), "nothing is left of the trial"
    for path, why in ((tmp_path, "directory"), (tmp_path / "absent" / "talk.session", "No such file")):
        with pytest.raises(ContinuationError, match=f"cannot write {path}: .*{why}"):
            check_writable(str(path))
