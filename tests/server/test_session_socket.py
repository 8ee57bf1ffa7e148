"""One socket's share of a session: what is written at once, and what waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import pytest
from websockets.protocol import State

from streaming.conversation.outbox import End, Outbox, Reply, Saved
from streaming.protocol.messages import Ack, AudioMessage, Message, Pong
from streaming.server.connection import Connection
from streaming.server.opus_threads import WorkThreads
from streaming.server.session_socket import SessionSocket
from tests.server.live_server import run

LAST = End(None, 1000, "bye")


class Socket(Connection):
    """A connection without a network."""

    def __init__(self) -> None:
        self.written: list[str | bytes] = []
        self.reads = True
        self.come: asyncio.Queue[str] = asyncio.Queue()
        self.take: Callable[[str | bytes], bool] | None = None
        self.closed = asyncio.Event()
        self.may_send = asyncio.Event()

    @property
    def state(self) -> State:
        return State.OPEN

    @property
    def takes(self) -> bool:
        return self.reads

    def give_messages_to(self, take: Callable[[str | bytes], bool] | None) -> None:
        self.take = take

    def send_now(self, message: str | bytes) -> None:
        self.written.append(message)

    async def send(self, message: Any, text: bool | None = None) -> None:
        if not self.reads:
            await self.may_send.wait()
        self.written.append(message)

    async def recv(self, decode: bool | None = None) -> Any:
        return await self.come.get()

    async def wait_closed(self) -> None:
        await self.closed.wait()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        self.closed.set()


class Driver:
    """Replies as the test puts them; what is given comes back as a reply."""

    def __init__(self) -> None:
        self.outbox, self.muted, self.room_left = Outbox(), False, 100
        self.told: Callable[[], None] | None = None

    @property
    def has_room(self) -> bool:
        return self.room_left > 0

    async def room(self) -> None:
        while not self.has_room:
            await asyncio.sleep(0)

    def give(self, received: Reply) -> None:
        self.room_left -= 1
        self.put(received)

    def put(self, reply: Reply) -> None:
        self.outbox.put(reply)
        if self.told is not None:
            self.told()

    def mute(self) -> None:
        self.muted = True
        if self.told is not None:
            self.told()

    def tell_of_replies(self, told: Callable[[], None] | None) -> None:
        self.told = told

    @property
    def waiting_reply(self) -> Reply | None:
        return self.outbox.next

    def take_reply(self) -> Reply | None:
        return None if self.muted else self.outbox.take()


class Words:
    """A dialect whose word for an `Ack` is its number. threads: which find out the words of a `Pong`."""

    def __init__(self) -> None:
        self.ready, self.go = True, asyncio.Event()
        self.threads: WorkThreads[int, str] = WorkThreads(self._in_a_thread, 2, 1)
        self.thread_goes = threading.Event()
        self.thread_goes.set()

    def decode(self, data: str | bytes) -> Sequence[Any]:
        return [Ack(received=int(number)) for number in str(data).split()]

    def encode(self, reply: Message | AudioMessage | Any) -> Sequence[str | bytes] | Awaitable[Sequence[str | bytes]]:
        if isinstance(reply, Pong):
            return self.threads.start([reply.id], self._said)
        if isinstance(reply, Saved):
            return self._later(reply.turn)
        return [str(cast(Ack, reply).received)]

    def _in_a_thread(self, numbers: Sequence[int]) -> Sequence[str]:
        self.thread_goes.wait(20)
        return [f"{number} from a thread" for number in numbers]

    def _said(self, found: Sequence[str]) -> Sequence[str | bytes]:
        if found == ["0 from a thread"]:
            raise ZeroDivisionError
        return found

    async def _later(self, turn: int) -> Sequence[str | bytes]:
        await self.go.wait()
        return [f"turn {turn}"]


class Talk:
    """A session socket that runs, and what is around it."""

    def __init__(self) -> None:
        self.socket, self.driver, self.words = Socket(), Driver(), Words()
        self.running = asyncio.create_task(
            SessionSocket(self.socket, cast(Any, self.driver), cast(Any, self.words), 1e6).run(["first"])
        )

    async def written(self, count: int) -> list[str | bytes]:
        async with asyncio.timeout(20):
            while len(self.socket.written) < count:
                await asyncio.sleep(0.001)
        return self.socket.written

    def say(self, *numbers: int) -> None:
        for number in numbers:
            self.driver.put(Ack(received=number))

    async def end(self) -> None:
        self.driver.put(LAST)
        async with asyncio.timeout(20):
            assert await self.running


def pong(number: int) -> Pong:
    return Pong(id=number, client_time_ms=0.0, server_time_ms=0.0)


def talked(scenario: Callable[[Talk], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario(Talk())

    run(main())


def test_a_reply_to_a_peer_that_reads_is_written_in_the_call_that_brings_it() -> None:
    """Each reply woke a task, and each message another: two turns of the event loop for every frame."""

    async def scenario(talk: Talk) -> None:
        await talk.written(1)
        talk.say(1, 2)
        assert talk.socket.written == ["first", "1", "2"]
        assert talk.socket.take is not None and talk.socket.take("3 4")
        assert talk.socket.written == ["first", "1", "2", "3", "4"]
        await talk.end()

    talked(scenario)


def test_replies_stay_in_order_whoever_has_to_wait_for_what() -> None:
    """A thread that encodes, a file that is packed, a peer that does not read: nothing overtakes what waits for it."""

    async def scenario(talk: Talk) -> None:
        await talk.written(1)
        talk.driver.put(pong(1))
        talk.driver.put(pong(2))
        talk.say(3)
        assert talk.socket.written == ["first"]
        assert await talk.written(4) == ["first", "1 from a thread", "2 from a thread", "3"]
        talk.driver.put(Saved(4, None))
        talk.driver.put(pong(5))
        talk.say(6)
        await asyncio.sleep(0.01)
        assert len(talk.socket.written) == 4
        talk.words.go.set()
        assert (await talk.written(7))[4:] == ["turn 4", "5 from a thread", "6"]
        talk.socket.reads = False
        talk.say(7, 8)
        await asyncio.sleep(0.01)
        assert len(talk.socket.written) == 7
        talk.socket.reads = True
        talk.socket.may_send.set()
        assert (await talk.written(9))[7:] == ["7", "8"]
        await talk.end()

    talked(scenario)


def test_a_message_that_finds_no_room_waits_and_is_not_overtaken() -> None:
    async def scenario(talk: Talk) -> None:
        await talk.written(1)
        talk.driver.room_left = 1
        assert talk.socket.take is not None
        assert talk.socket.take("1") and not talk.socket.take("2")
        talk.socket.come.put_nowait("2")  # as the connection does
        await talk.written(3)  # `recv` was waited for already: it has room for one more
        talk.socket.come.put_nowait("3")
        await asyncio.sleep(0.01)
        assert not talk.socket.take("4") and talk.socket.written == ["first", "1", "2"]
        talk.driver.room_left = 10
        assert (await talk.written(4))[3:] == ["3"]
        await talk.end()

    talked(scenario)


def test_a_fault_in_encoding_ends_the_session_and_not_its_caller() -> None:
    """The caller is the engine's event or a client's message: of another session's events none may be lost by it."""

    async def scenario(talk: Talk) -> None:
        await talk.written(1)
        talk.driver.put(cast(Any, "no reply at all"))
        with pytest.raises(AttributeError):
            await talk.running

    talked(scenario)


def test_a_fault_in_a_thread_ends_the_session() -> None:
    async def scenario(talk: Talk) -> None:
        await talk.written(1)
        talk.driver.put(pong(0))
        talk.say(1)
        with pytest.raises(ZeroDivisionError):
            await talk.running
        assert talk.socket.written == ["first"]

    talked(scenario)


def test_what_a_thread_encodes_is_waited_for_when_the_session_is_put_down() -> None:
    """It is kept for a client that comes back, which asks for all that is kept right after."""

    async def scenario(talk: Talk) -> None:
        await talk.written(1)
        talk.words.thread_goes.clear()
        talk.driver.put(pong(1))
        (work,) = talk.words.threads._waiting
        talk.socket.closed.set()
        while talk.socket.take is not None:
            await asyncio.sleep(0.001)
        assert not talk.running.done() and not work.finished
        talk.words.thread_goes.set()
        assert not await talk.running
        assert work.finished and talk.socket.written == ["first"]

    talked(scenario)


def test_a_muted_driver_gives_the_socket_back_without_a_goodbye() -> None:
    async def scenario(talk: Talk) -> None:
        await talk.written(1)
        talk.driver.mute()
        talk.say(1)
        assert not await talk.running
        assert talk.socket.written == ["first"] and not talk.socket.closed.is_set()

    talked(scenario)
