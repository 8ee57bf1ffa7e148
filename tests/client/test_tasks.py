"""Coroutines that run together end together."""

from __future__ import annotations

import asyncio
import time

import pytest

from streaming.client.tasks import run_until, sleep_until


def test_work_that_is_done_waits_for_the_rest() -> None:
    """A source that had ended must not end the talk: its continuation is still to come."""

    async def main() -> list[str]:
        over, log = asyncio.Event(), list[str]()

        async def short() -> None:
            log.append("short")

        async def long() -> None:
            await asyncio.sleep(0.01)
            log.append("long")
            over.set()

        async def endless() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                log.append("ended")

        await run_until(over, short(), long(), endless())
        return log

    assert asyncio.run(main()) == ["short", "long", "ended"]


def test_an_error_ends_all_and_is_raised() -> None:
    async def main() -> None:
        async def fails() -> None:
            raise KeyError("lost")

        await run_until(asyncio.Event(), asyncio.sleep(60), fails())

    with pytest.raises(KeyError, match="lost"):
        asyncio.run(main())


def test_a_time_that_is_past_is_not_waited_for() -> None:
    asyncio.run(asyncio.wait_for(sleep_until(time.monotonic() - 5), 30))
