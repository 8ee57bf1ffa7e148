"""A view for tests: it shows nothing and remembers every event."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Self

from streaming.terminal.view import Meters


class Witness:
    """Remember events, and let a test wait for them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Mapping[str, Any]]] = []

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        self.events.append((name, fields))

    def progress(self, message: str, share: float | None = None) -> None:
        pass

    def show(self, meters: Meters) -> None:
        pass

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    async def until(self, name: str, times: int = 1) -> None:
        while self.names().count(name) < times:
            await asyncio.sleep(0.005)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass
