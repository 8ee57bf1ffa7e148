"""Clients that break, stall, flood or vanish, each beside a healthy session that must not notice."""

from __future__ import annotations

import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.conversation import conversation
from streaming.protocol import messages
from streaming.protocol.messages import SessionStart
from tests.faults.harness import (
    ENDLESS,
    FAST,
    FRAMES_A_TURN,
    SLOT_BACK_S,
    SPEECH,
    Since,
    Watched,
    beside_a_healthy_session,
    resident_mib,
    wait_for,
    watched,
)
from tests.faults.raw_client import BINARY, CONTINUATION, PING, TEXT, RawClient, audio, frame, handshake, text
from tests.server.live_server import client, run

RESETS = int(os.environ.get("FAULT_RESETS", "500"))
SEED = int(os.environ.get("FAULT_SEED", "5"))
KEEPALIVE_S = 0.4
SILENT_S = 2 * KEEPALIVE_S
FLOOD_BYTES = 24 * 2**20
FLOOD_GROWTH_MIB = 12.0
"""What one client may make the server hold: 16 messages unhandled, 16 more in the socket's own queue, 64 unsent."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared() -> Iterator[Watched]:
    with watched() as it:
        yield it


@pytest.fixture
def server(shared: Watched) -> Iterator[Watched]:
    """One server for all; when a test's clients are gone, nothing may be left of them."""
    yield shared
    shared.assert_clean()


@pytest.fixture
def impatient() -> Iterator[Watched]:
    """A server that gives up a silent connection after `SILENT_S`."""
    with watched(keepalive_s=KEEPALIVE_S) as it:
        yield it
        it.assert_clean()


def _speaking(peer: RawClient, start: SessionStart = ENDLESS) -> RawClient:
    """Yield a session in the middle of a continuation."""
    peer.start(start).send(audio(SPEECH) + text(messages.Speak(turn=1)))
    peer.expect(b'"turn.speaking"')
    return peer


def test_a_client_that_stops_reading_loses_its_slot() -> None:
    """The keepalive's ping waited behind the audio that the client did not take: the slot was held for ever."""
    with watched(step_s=0.0, keepalive_s=KEEPALIVE_S) as server:
        beside = beside_a_healthy_session(server, slot_back_s=SILENT_S + SLOT_BACK_S)
        with RawClient(server.port, receive_buffer=4096) as stalled, beside:
            _speaking(stalled)
        server.assert_clean()


def test_a_server_stops_at_once_although_a_client_does_not_read() -> None:
    """The closing handshake waited behind the audio that the client did not take: the process never ended."""
    with watched(step_s=0.0) as server, RawClient(server.port, receive_buffer=4096) as stalled:
        _speaking(stalled)
        time.sleep(0.7)  # until all buffers on the way are full
        begun = time.monotonic()
        server.stop()
        server.stop()  # a second time: at once
        wait_for("the server to stop", lambda: server.loop.is_closed(), 6.0)
        print(f"stopped after {time.monotonic() - begun:.2f} s")


def test_a_reset_at_any_phase_of_a_turn_frees_the_slot(server: Watched) -> None:
    """`FAULT_RESETS` sets how many; `FAULT_SEED` replays."""
    print(f"FAULT_SEED={SEED} FAULT_RESETS={RESETS}")
    rng = random.Random(SEED)
    turn = [
        handshake(),
        text(FAST),
        *(audio(SPEECH[:FRAME], FRAME * index) for index in range(3)),
        text(messages.Speak(turn=1)),
        text(messages.Played(turn=1, samples=FRAME)),
        text(messages.Interrupt(turn=1, heard_samples=2 * FRAME)),
        audio(SPEECH, 3 * FRAME, turn=2),
        text(messages.Speak(turn=2)),
        text(messages.SessionClose()),
    ]
    with beside_a_healthy_session(server):
        for _ in range(RESETS):
            whole = rng.randrange(len(turn) + 1)
            part = turn[whole][: rng.randrange(len(turn[whole]))] if whole < len(turn) else b""
            peer = RawClient(server.port)
            for piece in (*turn[:whole], part):
                with suppress(ConnectionError):  # the server may have said goodbye already
                    peer.send(piece)
                time.sleep(rng.choice((0.0, 0.0, 0.001, 0.004)))
            peer.reset()


def test_a_client_that_is_killed_frees_its_slot(server: Watched) -> None:
    program = (
        "import sys, time\n"
        "from streaming.protocol import messages\n"
        "from tests.faults.raw_client import *\n"
        "client = RawClient(int(sys.argv[1])).start(messages.SessionStart(max_seconds=3600, pace='fast'))\n"
        "client.send(audio(np.ones(3000, np.int16)) + text(messages.Speak(turn=1)))\n"
        "client.expect(b'turn.speaking')\n"
        "print('speaking', flush=True)\n"
        "time.sleep(60)\n"
    )
    with beside_a_healthy_session(server):
        command = [sys.executable, "-c", program, str(server.port)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == b"speaking\n"
            finally:
                process.send_signal(signal.SIGKILL)


class _Proxy(threading.Thread):
    """A network between one client and the server. `drop`: from now on nothing gets through, and nobody is told."""

    def __init__(self, port: int) -> None:
        super().__init__(name="proxy")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._to = port
        self._dropped, self._ended = threading.Event(), threading.Event()
        self.port = int(self._listener.getsockname()[1])

    def drop(self) -> None:
        self._dropped.set()

    def end(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        with (
            self._listener,
            self._listener.accept()[0] as near,
            socket.create_connection(("127.0.0.1", self._to)) as far,
        ):
            other = {near: far, far: near}
            with selectors.DefaultSelector() as selector:
                for end in other:
                    selector.register(end, selectors.EVENT_READ)
                while not self._dropped.is_set() and not self._ended.is_set():
                    for key, _ in selector.select(0.02):
                        data = key.fileobj.recv(2**16)
                        if not data:
                            return
                        other[key.fileobj].sendall(data)
            self._ended.wait()


@contextmanager
def _network(port: int) -> Iterator[_Proxy]:
    proxy = _Proxy(port)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.end()


@pytest.mark.parametrize("speaking", [False, True], ids=["listening", "speaking"])
def test_a_connection_that_goes_dead_frees_its_slot(impatient: Watched, speaking: bool) -> None:
    """Half open: no reset, no end, only silence."""
    beside = beside_a_healthy_session(impatient, slot_back_s=SILENT_S + SLOT_BACK_S)
    with _network(impatient.port) as network, RawClient(network.port) as peer, beside:
        if speaking:
            _speaking(peer)
        else:
            peer.start(ENDLESS).send(audio(SPEECH))
        network.drop()


@pytest.mark.parametrize("pace", ["realtime", "fast"])
def test_a_client_that_sends_at_a_hundred_times_real_time_does_not_starve_others(server: Watched, pace: str) -> None:
    """20 s of speech in 0.2 s."""
    second = np.ones(SAMPLE_RATE, np.int16)
    with beside_a_healthy_session(server) as healthy, RawClient(server.port) as peer:
        peer.start(SessionStart(pace=pace, max_seconds=0.8))
        for index in range(20):
            peer.send(audio(second, index * SAMPLE_RATE))
            time.sleep(0.01)
        healthy.waits_for_turns(1)
        peer.send(text(messages.Speak(turn=1)))
        peer.expect(b'"turn.done"')


def test_speech_that_waits_to_be_heard_does_not_hold_the_slot_of_a_client_that_has_left() -> None:
    """A minute of speech in a burst, then a reset: the slot came back when all was heard, 15 s later."""
    pieces = (audio(np.ones(2 * SAMPLE_RATE, np.int16), index * 2 * SAMPLE_RATE) for index in range(30))
    minute = b"".join(pieces)
    with watched(step_s=0.02, keepalive_s=KEEPALIVE_S) as server:
        with beside_a_healthy_session(server, slot_back_s=SILENT_S + SLOT_BACK_S):
            peer = RawClient(server.port).start(ENDLESS)
            peer.flood(minute, len(minute))
            time.sleep(0.3)  # until the server has taken what it takes
            peer.reset()
        server.assert_clean()


def test_a_client_whose_speech_waits_to_be_heard_is_not_taken_for_dead() -> None:
    """Its answer to a ping came behind the speech that it had sent before, too late for the keepalive."""
    speech = np.ones(300 * FRAME, np.int16)

    async def scenario(url: str) -> int:
        async with client(url, FAST) as session:
            await session.hear(speech, piece=5 * FRAME)
            return (await session.speak()).samples

    with watched(step_s=0.006, keepalive_s=KEEPALIVE_S) as server:
        assert run(scenario(server.url)) == FRAMES_A_TURN * FRAME
        server.assert_clean()


def test_bytes_and_samples_may_come_one_at_a_time(server: Watched) -> None:
    """Three ways to be slow: a TCP segment a byte, a WebSocket fragment a byte, a message a sample."""
    with beside_a_healthy_session(server), RawClient(server.port) as peer:
        peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in handshake():
            peer.send(bytes([byte]))
        while b"\r\n\r\n" not in peer._received:
            peer._receive()
        peer._received = b""
        for byte in text(FAST):
            peer.send(bytes([byte]))
        peer.expect(b'"session.started"')
        message = messages.encode_audio(messages.AudioMessage(1, 0, SPEECH[:FRAME]))
        for index, byte in enumerate(message):
            last = index == len(message) - 1
            peer.send(frame(CONTINUATION if index else BINARY, bytes([byte]), fin=last))
        for index in range(FRAME):
            peer.send(audio(SPEECH[index : index + 1], FRAME + index))
        peer.send(text(messages.Speak(turn=1)))
        assert b'"prompt_samples":3840' in peer.expect(b'"turn.speaking"')
        peer.expect(b'"turn.done"')


def test_a_client_that_reconnects_in_a_loop_leaves_nothing(server: Watched) -> None:
    with beside_a_healthy_session(server):
        for index in range(300):
            with RawClient(server.port) as peer:
                if index % 3:
                    peer.open()
                if index % 3 == 2:
                    peer.send(text(FAST))  # and leaves without waiting


def test_turns_without_anything_to_say_or_to_hear_are_answered(server: Watched) -> None:
    """An empty commit or a zero-token turn killed a peer's engine for everybody."""
    nothing = np.zeros(0, np.int16)
    with beside_a_healthy_session(server), RawClient(server.port) as peer:
        peer.start(SessionStart(pace="fast", max_seconds=1e-300))
        peer.send(text(messages.Speak(turn=1)))
        peer.expect(b'"empty_prompt"')
        peer.send(audio(nothing) + audio(nothing) + text(messages.Speak(turn=1)))
        peer.expect(b'"empty_prompt"')
        peer.send(audio(SPEECH[:1]) + text(messages.Speak(turn=1)))
        assert b'"samples":1920' in peer.expect(b'"turn.done"'), "rounded up to a whole frame"
        peer.send(text(messages.Speak(turn=2)) + audio(nothing, 1, turn=2))
        peer.expect(b'"turn.done"')
        peer.send(text(messages.Interrupt(turn=2, heard_samples=0)) + text(messages.Interrupt(turn=2, heard_samples=0)))
        peer.expect(b'"kept_samples":0')
        peer.expect(b'"kept_samples":0')
        peer.send(text(messages.Speak(turn=3)) + text(messages.SessionClose()))
        assert peer.expect_close() == 1000


_FLOODS = {
    "ping messages": text(messages.Ping(id=1, client_time_ms=0.0)) * 500,
    "long names": frame(TEXT, b'{"type":"' + b"x" * 96_000 + b'"}'),
    "ping frames": frame(PING, b"x" * 125) * 250,
}


@pytest.mark.parametrize("kind", _FLOODS)
def test_a_client_that_asks_and_never_reads_cannot_fill_the_memory(impatient: Watched, kind: str) -> None:
    """Answers to WebSocket pings are written without regard to the peer's window: 70 MB after 80 MB of pings."""
    with beside_a_healthy_session(impatient, slot_back_s=SILENT_S + SLOT_BACK_S):
        peer = RawClient(impatient.port, receive_buffer=4096).start(ENDLESS)
        before = resident_mib()
        sent = peer.flood(_FLOODS[kind], FLOOD_BYTES)
        grown = resident_mib() - before
        peer.reset()
        print(f"{kind}: {sent / 2**20:.1f} MiB sent, {grown:.1f} MiB grown")
        assert grown < FLOOD_GROWTH_MIB


_QUESTIONS = 600
"""Fewer than a client may send at once without being read more slowly, in four goes."""


def _asking_without_reading(server: Watched) -> RawClient:
    """Has asked `_QUESTIONS` times, below the rate limit, behind audio that fills everything on its way to it."""
    peer = _speaking(RawClient(server.port, receive_buffer=4096))
    stream = server.step.streams[0].entries
    made, since = -1, Since.now()
    while since.seconds < 0.2:  # until no frame more fits between the engine and this client
        if made != len(stream):
            made, since = len(stream), Since.now()
        time.sleep(0.02)
    for begin in range(0, _QUESTIONS, 150):
        numbers = range(begin, begin + 150)
        peer.send(b"".join(text(messages.Ping(id=number, client_time_ms=0.0)) for number in numbers))
        time.sleep(0.1)
    time.sleep(0.5)
    return peer


def _one_alone() -> AbstractContextManager[Watched]:
    """A server with one slot, whose client may be silent for as long as it likes."""
    return watched(slots=1, step_s=0.0, keepalive_s=600)


def test_who_asks_and_never_reads_is_not_listened_to_until_it_reads() -> None:
    """The rate limit hid the bound of what waits for a client: below it, every question was answered into a queue that
    had no end. Each answer says when it was given.
    """
    with _one_alone() as server:
        with _asking_without_reading(server) as peer:
            begun = 1e3 * time.monotonic()
            peer.send(text(messages.Interrupt(turn=1, heard_samples=0)))
            answered = []
            while len(answered) < _QUESTIONS:
                pong = messages.decode_server(peer.expect(b'"pong"'))
                assert isinstance(pong, messages.Pong)
                answered.append(pong.server_time_ms)
            early = sum(at < begun for at in answered)
            print(f"{early} of {_QUESTIONS} were answered before anything was read")
            assert 16 < early <= conversation.MAX_UNSENT
        server.assert_clean()


def test_who_asks_and_never_reads_and_vanishes_gives_its_slot_back() -> None:
    """What waited for such a client was thrown away, and nobody told the session, which waited for room: it held its
    slot for ever.
    """
    with _one_alone() as server:
        _asking_without_reading(server).reset()
        wait_for("the slot", lambda: server.sessions() == 0, SLOT_BACK_S)
        server.assert_clean()


@pytest.mark.parametrize("kind", ["ping frames", "ping messages"])
def test_a_flood_of_tiny_frames_does_not_hold_others_up(server: Watched, kind: str) -> None:
    """One read of 256 KiB held 43,000 empty pings, and the event loop for two seconds."""
    floods = {
        "ping frames": frame(PING) * 40_000,
        "ping messages": text(messages.Ping(id=1, client_time_ms=0.0)) * 2000,
    }
    with beside_a_healthy_session(server) as healthy, RawClient(server.port) as peer:
        peer.start(FAST)
        reader = threading.Thread(target=peer.hung_up, name="reader")
        reader.start()
        with suppress(OSError):
            peer.flood(floods[kind], 2 * len(floods[kind]))
        healthy.waits_for_turns(1)
        with suppress(OSError):
            peer.socket.shutdown(socket.SHUT_RDWR)
        reader.join()
