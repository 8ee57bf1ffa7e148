"""Keys: from pipes, from terminals that tell of presses, and from those that tell of releases."""

from __future__ import annotations

import asyncio
import os
import pty
import termios
import threading
from collections.abc import Iterator

import pytest

from streaming.terminal.keyboard import MAX_KEYS, REPEAT_S, Key, Keyboard, KeyParser, key_by_key

PRESS, RELEASE = b" ", b"\x1b[32;1:3u"


def test_every_line_is_a_key_and_the_end_is_the_end() -> None:
    async def test() -> list[Key]:
        reading, writing = os.pipe()
        os.write(writing, b"\nand\n")
        os.close(writing)
        keys = [key async for key in Keyboard(reading)]
        os.close(reading)
        return keys

    assert asyncio.run(asyncio.wait_for(test(), 10)) == [Key.ENTER, Key.ENTER]


def test_a_key_that_is_held_down_does_not_pile_up() -> None:
    async def test() -> int:
        reading, writing = os.pipe()
        os.write(writing, b"\n" * 1_000)
        os.close(writing)
        keyboard = Keyboard(reading)
        await anext(keyboard)
        while any(thread.name == "keyboard" for thread in threading.enumerate()):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)
        os.close(reading)
        return len([None async for _ in keyboard])

    assert asyncio.run(asyncio.wait_for(test(), 10)) <= MAX_KEYS


def test_keys_are_not_lost_with_whoever_waited_for_them() -> None:
    """After a session was lost and begun anew, the keyboard was dead."""

    async def test() -> Key:
        reading, writing = os.pipe()
        keyboard = Keyboard(reading)
        waiting = asyncio.ensure_future(anext(keyboard))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        os.write(writing, b" ")
        key = await anext(keyboard)
        os.close(writing)
        return key

    assert asyncio.run(asyncio.wait_for(test(), 10)) is Key.SPACE


class TestDecoder:
    def test_a_terminal_that_tells_of_releases_gives_press_and_release(self) -> None:
        parser = KeyParser(steady=True)
        assert parser.feed(PRESS + b"\x1b[32;1:2u" * 3, 0.0) == [Key.SPACE]
        assert parser.feed(b"\x1b[32;1:2u", 5.0) == []
        assert parser.feed(RELEASE, 5.1) == [Key.RELEASED]
        assert parser.feed(b"\x1b[32u", 5.2) == [Key.SPACE], "the other form of a press, and soon after"
        assert parser.feed(b"\x1b[13;1:3u", 5.3) == [Key.RELEASED]

    def test_a_key_that_is_held_where_releases_are_not_told_is_pressed_once(self) -> None:
        """A terminal that does not tell of releases repeats a held key: talking started and stopped thirty times a
        second.
        """
        parser = KeyParser(steady=True)
        keys = parser.feed(PRESS, 0.0)
        for number in range(60):
            keys += parser.feed(PRESS, 0.6 + number / 30)
        assert keys == [Key.SPACE]
        assert parser.feed(PRESS, 2.6 + REPEAT_S) == [Key.SPACE]

    def test_other_keys_are_no_keys(self) -> None:
        parser = KeyParser(steady=False)
        assert parser.feed(b"abc\x1b[A\x1bOP\x1b[15~\x1b[97;1:3u\x1b[?1u\x1bx\x1b[<0;1;2M", 0.0) == []
        assert parser.feed(b"\r\n ", 0.0) == [Key.ENTER, Key.ENTER, Key.SPACE]

    @pytest.mark.parametrize("data", [b"\x04", b"\x1b[100;5u"])
    def test_ctrl_d_ends_the_input(self, data: bytes) -> None:
        parser = KeyParser(steady=True)
        assert parser.feed(data, 0.0) == []
        assert parser.ended

    def test_ctrl_c_as_a_key_interrupts(self) -> None:
        """Where a terminal tells of releases, Ctrl-C comes as a key, and nothing could end the client."""
        parser = KeyParser(steady=True)
        parser.feed(b"\x1b[99;5u\x1b[99;5:3u", 0.0)
        assert parser.interrupted


class TestTerminal:
    @pytest.fixture
    def terminal(self) -> Iterator[tuple[int, int]]:
        """Its far end and the client's end."""
        far, near = pty.openpty()
        yield far, near
        os.close(far)
        os.close(near)

    @pytest.mark.parametrize("knows", [True, False])
    def test_it_is_left_as_it_was(self, terminal: tuple[int, int], knows: bool) -> None:
        far, near = terminal
        before = termios.tcgetattr(near)
        said: list[bytes] = []

        def tell(data: bytes) -> None:
            said.append(data)
            if b"\x1b[c" in data:
                os.write(far, (b"\x1b[?0u" if knows else b"") + b"\x1b[?62;22c")

        def interrupted() -> None:
            with key_by_key(releases=True, descriptor=near, tell=tell) as told:
                assert told is knows
                during = termios.tcgetattr(near)
                assert not during[3] & (termios.ECHO | termios.ICANON)
                assert during[3] & termios.ISIG, "Ctrl-C must stay what it is"
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert termios.tcgetattr(near) == before
        assert (b"\x1b[>3u" in said) is (b"\x1b[<u" in said) is knows

    def test_a_terminal_that_answers_nothing(self, terminal: tuple[int, int]) -> None:
        with key_by_key(releases=True, descriptor=terminal[1], tell=lambda _: None) as told:
            assert not told

    def test_without_a_terminal_there_is_nothing_to_do(self) -> None:
        reading, writing = os.pipe()
        with key_by_key(releases=True, descriptor=reading) as told:
            assert not told
        os.close(reading)
        os.close(writing)


def test_the_letter_t_is_another_take_however_long_it_is_held() -> None:
    """A key that was held for a second would have been ten takes."""
    for steady in (False, True):
        keys = KeyParser(steady=steady)
        assert keys.feed(b"t", 0.0) == [Key.TAKE]
        assert keys.feed(b"tt", 0.5) == []
        assert keys.feed(b"T", 2.0) == [Key.TAKE]
        assert keys.feed(b"\x1b[116u\x1b[116;1:2u\x1b[116;1:3u", 4.0) == [Key.TAKE], "and its release is nobody's"
        assert keys.feed(b"\x1b[116;5u", 6.0) == [], "Ctrl-T is another key"
