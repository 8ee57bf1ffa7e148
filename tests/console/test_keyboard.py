"""The Enter key."""

from __future__ import annotations

import asyncio
import os
import threading

from streaming.console.keyboard import MAX_PRESSES, presses, unechoed


def test_every_line_is_a_press_and_the_end_is_the_end() -> None:
    async def test() -> int:
        reading, writing = os.pipe()
        os.write(writing, b"\nand text\n")
        os.close(writing)
        count = 0
        async for _ in presses(reading):
            count += 1
        os.close(reading)
        return count

    assert asyncio.run(asyncio.wait_for(test(), 10)) == 2


def test_a_key_that_is_held_down_does_not_pile_up() -> None:
    async def test() -> int:
        reading, writing = os.pipe()
        os.write(writing, b"\n" * 1_000)
        os.close(writing)
        iterator = presses(reading)
        await anext(iterator)
        while any(thread.name == "keyboard" for thread in threading.enumerate()):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)
        os.close(reading)
        return len([None async for _ in iterator])

    assert asyncio.run(asyncio.wait_for(test(), 10)) <= MAX_PRESSES


def test_without_a_terminal_there_is_no_echo_to_stop() -> None:
    with unechoed():
        pass
