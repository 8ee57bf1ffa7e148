"""A TCP relay that breaks connections without a word, as a network does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit, urlunsplit


class CutProxy:
    """url: the server's, by way of this. budget: after how many bytes, in both directions together, the next
    connection breaks; None for not by itself.
    """

    def __init__(self, target: str, budget: Callable[[], int | None]) -> None:
        parts = urlsplit(target)
        self._parts, self._host, self._port = parts, parts.hostname, parts.port
        self._budget = budget
        self._relays: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.open = True
        """Whether connections are taken at all."""
        self.frozen = False
        """Whether bytes are held back: to both sides the other one has gone silent."""
        self.bytes_per_s: float | None = None
        """How many pass in each direction, None for all."""

    @property
    def url(self) -> str:
        port = self._server.sockets[0].getsockname()[1]
        return urlunsplit(self._parts._replace(netloc=f"127.0.0.1:{port}"))

    def cut(self) -> None:
        """Break what is connected."""
        for relay in self._relays:
            relay.cancel()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if not self.open:
            writer.transport.abort()
            return
        self.connections += 1
        left = self._budget()

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            nonlocal left
            while data := await source.read(1024):
                while self.frozen:
                    await asyncio.sleep(0.01)
                if self.bytes_per_s is not None:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                if left is not None:
                    data, left = data[:left], left - len(data)
                sink.write(data)
                await sink.drain()
                if left is not None and left <= 0:
                    return

        self._relays.add(task)  # also while it connects: who cuts it then leaves no end open either
        ends, pumps = [writer], list[asyncio.Task[None]]()
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
            ends.append(far_writer)
            pumps = [asyncio.create_task(pump(reader, far_writer)), asyncio.create_task(pump(far_reader, writer))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._relays.discard(task)
            for pumping in pumps:
                pumping.cancel()
            for end in ends:
                end.transport.abort()
            await asyncio.gather(*pumps, *(end.wait_closed() for end in ends), return_exceptions=True)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[CutProxy]:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        try:
            yield self
        finally:
            self._server.close()
            relays = list(self._relays)
            self.cut()
            await asyncio.gather(*relays, return_exceptions=True)


def cut_proxy(
    target: str, budget: Callable[[], int | None] = lambda: None
) -> contextlib.AbstractAsyncContextManager[CutProxy]:
    """`CutProxy` while the block lasts."""
    return CutProxy(target, budget).running()
