"""Wait in a client's coroutines: for a time, and for each other's end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any


async def sleep_until(due_s: float) -> None:
    """Wait until this time of `time.monotonic`, not at all if it is past."""
    await asyncio.sleep(max(0.0, due_s - time.monotonic()))


async def run_until(over: asyncio.Event, *work: Coroutine[Any, Any, object]) -> None:
    """Run all of `work` until `over` is set, or until one of them fails: then raise that. End them all."""
    tasks = {asyncio.ensure_future(coroutine) for coroutine in (over.wait(), *work)}
    pending = tasks
    try:
        while not over.is_set():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
