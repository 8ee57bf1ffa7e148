"""Tokens: what is accepted as one, whose it is, and what a change of their file does."""

from __future__ import annotations

import errno
import hmac
import logging
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.server.door import tokens as module
from streaming.server.door.tokens import MAX_FILE_BYTES, MAX_TOKENS, Holder, Tokens, TokensError, load_tokens

ANN, BOB, EVE = "ann-0123456789abcdef", "bob-0123456789abcdef", "eve-0123456789abcdef"


def name_of(tokens: Tokens, token: str, now: float) -> str | None:
    holder = tokens.check(token, now)
    return None if holder is None else holder.name


def holder_of(tokens: Tokens, token: str, now: float) -> Holder:
    holder = tokens.check(token, now)
    assert holder is not None
    return holder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with Ann's and Bob's tokens."""
    path = tmp_path / "tokens"
    write(path, f"ann:{ANN}\nbob:{BOB}\n")
    return path


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)


class TestText:
    def test_each_token_has_its_name(self) -> None:
        for text in (f"ann:{ANN},bob:{BOB}", f" ann : {ANN} \n\n# both\nbob:{BOB}\r\n"):
            tokens = Tokens.from_text(text)
            assert [name_of(tokens, token, 0) for token in (ANN, BOB, EVE, "", ANN[:-1])] == ["ann", "bob", *[None] * 3]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "no token; give name:token"),
            (" , \n# none", "no token; give name:token"),
            (ANN, "entry 1: is not name:token"),
            (f"ann:{ANN},:{BOB}", "entry 2: has no name"),
            (f"a nn:{ANN}", "entry 1: has no name"),
            (f"{'n' * 65}:{ANN}", "entry 1: has no name"),
            ("ann:fifteen-letters", "15 characters, and 16 are the fewest; make one with: python -c"),
            (f"ann:{'x' * 257}", "257 characters, and 256 are the most"),
            ("ann:with/slash+and=padding", "other characters than letters, digits"),
            ("ann:0123456789abcdef\udc80", "other characters than letters, digits"),
            (f"ann:{ANN},bob:{BOB},ann:{EVE}", "entry 3: has the same name as 1"),
            (f"ann:{ANN},bob:{ANN}", "entry 2: has the same token as 1"),
            (",".join(f"n{i}:{i:016}" for i in range(MAX_TOKENS + 1)), "entry 1001: is one token too many"),
        ],
    )
    def test_what_cannot_be_used_is_refused_and_not_repeated(self, text: str, says: str) -> None:
        """An error message ended up in a log, with the token in it."""
        with pytest.raises(TokensError) as info:
            Tokens.from_text(text)
        assert says in str(info.value)
        for secret in (ANN, BOB, EVE, "fifteen", "slash", "0123456789abcdef"):
            assert secret not in str(info.value)

    @given(st.text(max_size=300))
    def test_whatever_is_presented_is_an_answer(self, presented: str) -> None:
        """A token that was no ASCII raised in the middle of a handshake."""
        assert Tokens.from_text(f"ann:{ANN}").check(presented, 0) is None

    def test_every_entry_is_compared_whoever_comes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An early exit tells by its time how far down the list a token is, or that it is on none."""
        compared: list[bytes] = []
        original = hmac.compare_digest

        def compare(a: bytes, b: bytes) -> bool:
            compared.append(a)
            return original(a, b)

        monkeypatch.setattr(hmac, "compare_digest", compare)
        tokens = Tokens.from_text(f"ann:{ANN},bob:{BOB},eve:{EVE}")
        for token in (ANN, EVE, "nobody-0123456789"):
            compared.clear()
            tokens.check(token, 0)
            assert len(set(compared)) == 3

    def test_no_token_shows_in_a_holder(self) -> None:
        holder = holder_of(Tokens.from_text(f"ann:{ANN}"), ANN, 0)
        assert repr(holder) == "Holder(name='ann')"

    def test_where_tokens_come_from(self, file: Path) -> None:
        assert load_tokens({}, None, 0) is None
        both = {"STREAMING_TOKENS": f"eve:{EVE}"}
        environment, from_file = load_tokens(both, None, 0), load_tokens({}, str(file), 0)
        assert environment is not None
        assert from_file is not None
        assert name_of(environment, EVE, 0) == "eve"
        assert name_of(from_file, BOB, 0) == "bob"
        with pytest.raises(TokensError, match="both STREAMING_TOKENS and --tokens"):
            load_tokens(both, str(file), 0)

    def test_a_variable_that_is_set_but_empty_does_not_open_the_door(self) -> None:
        """`STREAMING_TOKENS=$UNSET` started a server that asked nobody."""
        with pytest.raises(TokensError):
            load_tokens({"STREAMING_TOKENS": ""}, None, 0)


class TestFile:
    def test_a_file_that_cannot_be_used_is_refused_at_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(TokensError, match="No such file"):
            Tokens.from_file(tmp_path / "none", 0)
        with pytest.raises(TokensError, match="not a regular file"):
            Tokens.from_file(tmp_path, 0)
        (tmp_path / "large").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
        with pytest.raises(TokensError, match="larger than"):
            Tokens.from_file(tmp_path / "large", 0)
        (tmp_path / "bad").write_text(f"ann:{ANN}\n\n{BOB}\n")
        with pytest.raises(TokensError, match="line 3: is not name:token"):
            Tokens.from_file(tmp_path / "bad", 0)

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
    def test_a_file_that_others_can_read_gets_a_warning(self, file: Path, caplog: pytest.LogCaptureFixture) -> None:
        Tokens.from_file(file, 0)
        assert not caplog.records
        file.chmod(0o644)
        Tokens.from_file(file, 0)
        assert "chmod 600" in caplog.text

    def test_a_byte_order_mark_and_line_ends_of_windows(self, file: Path) -> None:
        file.write_bytes(f"\ufeffann:{ANN}\r\nbob:{BOB}\r\n".encode())
        tokens = Tokens.from_file(file, 0)
        assert (name_of(tokens, ANN, 0), name_of(tokens, BOB, 0)) == ("ann", "bob")

    def test_a_removed_token_opens_nothing_from_the_first_look_and_its_sessions_end_with_the_second(
        self, file: Path
    ) -> None:
        """A revoked token was good until the next restart."""
        tokens = Tokens.from_file(file, 0)
        bob = holder_of(tokens, BOB, 0)
        write(file, f"ann:{ANN}\n")
        assert name_of(tokens, BOB, 0.9) == "bob"  # looked at once a second
        assert name_of(tokens, BOB, 1.0) is None
        assert tokens.still_valid(bob, 1.0)
        assert not tokens.still_valid(bob, 2.0)
        assert name_of(tokens, ANN, 2.0) == "ann"

    def test_a_revocation_in_a_quiet_hour_holds_for_the_first_who_comes(self, file: Path) -> None:
        """With looks only when somebody comes, the first to come was judged by the file of an hour ago."""
        tokens = Tokens.from_file(file, 0)
        write(file, f"ann:{ANN}\n")
        assert name_of(tokens, BOB, 3600) is None

    def test_a_new_token_counts_when_the_file_has_come_to_rest(self, file: Path) -> None:
        tokens = Tokens.from_file(file, 0)
        write(file, f"ann:{ANN}\nbob:{BOB}\neve:{EVE}\n")
        assert [name_of(tokens, EVE, now) for now in (0.5, 1.0, 1.5, 2.0)] == [None, None, None, "eve"]

    def test_another_token_under_the_same_name_ends_the_sessions_of_the_first(self, file: Path) -> None:
        tokens = Tokens.from_file(file, 0)
        bob = holder_of(tokens, BOB, 0)
        write(file, f"ann:{ANN}\nbob:{EVE}\n")
        assert [tokens.still_valid(bob, now) for now in (1, 2)] == [True, False]
        assert (name_of(tokens, EVE, 2), name_of(tokens, BOB, 2)) == ("bob", None)

    def test_a_token_that_is_given_to_another_ends_the_sessions_of_the_first(self, file: Path) -> None:
        """Sessions went on under the name of whoever did not have the token any more, and counted against the limits of
        who had it.
        """
        tokens = Tokens.from_file(file, 0)
        bob = holder_of(tokens, BOB, 0)
        write(file, f"ann:{ANN}\neve:{BOB}\n")
        assert name_of(tokens, BOB, 1) is None, "whose it is now counts when the file has come to rest"
        assert [tokens.still_valid(bob, now) for now in (1, 2)] == [True, False]
        assert name_of(tokens, BOB, 2) == "eve"

    @pytest.mark.parametrize("gone", ["deleted", "a folder", "empty"])
    def test_a_file_that_is_gone_revokes_all_and_never_opens(
        self, file: Path, gone: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A token file that was deleted by mistake turned the server into an open one."""
        tokens = Tokens.from_file(file, 0)
        ann = holder_of(tokens, ANN, 0)
        if gone == "empty":
            write(file, "")
        else:
            file.unlink()
        if gone == "a folder":
            file.mkdir()
        for now in range(1, 6):
            assert [name_of(tokens, token, now) for token in (ANN, BOB, EVE)] == [None] * 3
            assert tokens.still_valid(ann, now) == (now < 2)
        assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
        if gone == "a folder":
            file.rmdir()
        write(file, f"ann:{ANN}\n")
        assert [name_of(tokens, ANN, now) for now in (6, 7)] == [None, "ann"]

    def test_a_malformed_file_only_takes_away(self, file: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Whoever kept the last good set kept what the same edit had revoked; whoever dropped it locked all out."""
        tokens = Tokens.from_file(file, 0)
        ann, bob = holder_of(tokens, ANN, 0), holder_of(tokens, BOB, 0)
        write(file, f"ann:{ANN}\neve:{EVE}\nfred\n")
        for now in (1, 2, 3):
            assert [name_of(tokens, token, now) for token in (ANN, BOB, EVE)] == ["ann", None, None]
            assert tokens.still_valid(ann, now)
        assert not tokens.still_valid(bob, 3)
        assert "line 3 is not name:token" in caplog.text
        assert caplog.text.count("malformed") == 1
        assert EVE not in caplog.text
        write(file, f"ann:{ANN}\neve:{EVE}\n")
        assert [name_of(tokens, EVE, now) for now in (4, 5)] == [None, "eve"]

    def test_a_doubled_name_locks_out_neither_whichever_line_is_first(self, file: Path) -> None:
        tokens = Tokens.from_file(file, 0)
        write(file, f"ann:{EVE}\nann:{ANN}\nbob:{BOB}\n")
        for now in (1, 2, 3):
            assert [name_of(tokens, token, now) for token in (ANN, BOB, EVE)] == ["ann", "bob", None]

    def test_a_file_that_is_being_written_ends_no_session_and_lets_nobody_in(self, file: Path) -> None:
        """A token cut short by a write in progress was taken for a new one, and those below it for revoked."""
        tokens = Tokens.from_file(file, 0)
        bob = holder_of(tokens, BOB, 0)
        whole = f"ann:{ANN}\nbob:{BOB}\neve:{EVE}\n"
        for now, size in enumerate((0, 10, len(whole) - 3, len(whole)), 1):
            write(file, whole[:size])
            assert tokens.still_valid(bob, now)
            assert tokens.check(EVE[:-2], now) is None
            assert tokens.check(EVE, now) is None
        assert [name_of(tokens, token, 5) for token in (ANN, BOB, EVE)] == ["ann", "bob", "eve"]

    def test_a_write_in_the_same_tick_as_a_look_is_found(self, file: Path) -> None:
        """Same size, same time: a file system's clock ticks in milliseconds, and the look came between two writes."""
        status = file.stat()
        tokens = Tokens.from_file(file, 0)
        with file.open("r+b") as opened:
            opened.write(f"ann:{EVE}".encode())
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert [name_of(tokens, ANN, now) for now in (1, 2, 3)] == [None] * 3
        assert name_of(tokens, EVE, 3) == "ann"

    def test_a_file_that_looks_the_same_and_is_not_has_not_come_to_rest(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half of a file, written within a tick of its clock, was taken at its word: new tokens let in, and those below
        them were revoked.
        """
        monkeypatch.setattr(module, "_signature", lambda _: (1, 1, 1, 1))
        tokens = Tokens.from_file(file, 0)
        bob = holder_of(tokens, BOB, 0)
        write(file, f"ann:{ANN}\neve:{EVE}\n")
        assert (name_of(tokens, EVE, 1), tokens.still_valid(bob, 1)) == (None, True)
        assert (name_of(tokens, EVE, 2), tokens.still_valid(bob, 2)) == ("eve", False)

    def test_a_file_at_rest_is_not_read(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens = Tokens.from_file(file, 0)
        tokens.check(ANN, 1)
        monkeypatch.setattr(module, "_read", lambda _: pytest.fail("read again"))
        for now in range(2, 10):
            assert name_of(tokens, ANN, now) == "ann"

    @pytest.mark.parametrize("lacking", [errno.EMFILE, errno.ENFILE, errno.ENOMEM], ids=errno.errorcode.get)
    def test_running_out_of_descriptors_revokes_nobody(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, lacking: int
    ) -> None:
        """Whoever exhausted them, the process's or the machine's, while the operator edited the file ended everybody's
        sessions.
        """
        tokens = Tokens.from_file(file, 0)
        ann = holder_of(tokens, ANN, 0)
        write(file, f"ann:{ANN}\n")

        def exhausted(path: Path) -> list[str]:
            raise OSError(lacking, "out of something")

        with monkeypatch.context() as patched:
            patched.setattr(module, "_read", exhausted)
            for now in range(1, 5):
                assert name_of(tokens, ANN, now) == "ann"
                assert tokens.still_valid(ann, now)
        assert name_of(tokens, BOB, 5) is None, "the revocation holds as soon as the file can be read"

    def test_replacing_the_file_at_once_is_the_gentle_way(self, file: Path) -> None:
        """`mv new tokens`, as editors and secret mounts do: nobody who stays on the list notices."""
        tokens = Tokens.from_file(file, 0)
        ann = holder_of(tokens, ANN, 0)
        for now in range(1, 5):
            write(file.with_name("new"), f"bob:{BOB}\nann:{ANN}\n#{now}\n")
            file.with_name("new").replace(file)
            assert name_of(tokens, ANN, now) == "ann"
            assert tokens.still_valid(ann, now)
