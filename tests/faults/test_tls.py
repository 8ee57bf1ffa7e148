"""What changes under TLS: reads of another size, buffers in another place, and a handshake before the handshake."""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from streaming.protocol import messages
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.limits import Limits
from streaming.server.door.tls import load_tls
from tests.faults.harness import (
    ENDLESS,
    FAST,
    SLOT_BACK_S,
    SPEECH,
    Watched,
    beside_a_healthy_session,
    count_descriptors,
    resident_mib,
    wait_for,
    watched,
)
from tests.faults.raw_client import PING, RawClient, audio, frame, handshake, text
from tests.server.certificate import self_signed

RESETS = int(os.environ.get("FAULT_RESETS", "500")) // 5
SEED = int(os.environ.get("FAULT_SEED", "5"))
KEEPALIVE_S = 0.8
SILENT_S = 2 * KEEPALIVE_S
HANDSHAKE_S = 2.0
HANDSHAKES = 100


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    certificate, key = self_signed(tmp_path_factory.mktemp("tls"))
    bind = check_bind("127.0.0.1", None, tls=True, insecure_plaintext=False)
    keeper = Gatekeeper(bind, limits=Limits(handshakes=HANDSHAKES))
    tls, trust = load_tls(str(certificate), str(key)), ssl.create_default_context(cafile=str(certificate))
    options = {"keepalive_s": KEEPALIVE_S, "handshake_s": HANDSHAKE_S}
    with watched(keeper=keeper, tls=tls, trust=trust, **options) as it:
        yield it


@pytest.fixture
def server(shared: Watched) -> Iterator[Watched]:
    """One for all; after each test it must be as it was."""
    yield shared
    shared.assert_clean()


def _hello() -> bytes:
    """The first message of a TLS handshake."""
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("kind", ["ping frames", "ping messages"])
def test_a_flood_of_tiny_frames_does_not_hold_others_up(server: Watched, kind: str) -> None:
    """asyncio hands over whatever it has decrypted, up to 256 KiB, in one call: it held the event loop for 1.5 s."""
    floods = {
        "ping frames": frame(PING) * 40_000,
        "ping messages": text(messages.Ping(id=1, client_time_ms=0.0)) * 2000,
    }
    with beside_a_healthy_session(server) as healthy, RawClient(server.port, trust=server.trust) as peer:
        peer.start(FAST)
        peer.flood(floods[kind], 2 * len(floods[kind]))
        healthy.waits_for_turns(1)


def test_a_peer_that_resets_in_mid_flood_fills_no_log(server: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """asyncio warned of each answer that it could not write: 90,000 lines for half a megabyte of pings."""
    for trust in (None, server.trust):
        with RawClient(server.port, trust=trust) as peer, suppress(ConnectionError):
            peer.start(ENDLESS) if trust is not None else peer.send(handshake())
            peer.flood(frame(PING) * 40_000, 2**18)
            peer.reset()
    with watched() as plain:
        peer = RawClient(plain.port).start(ENDLESS)
        peer.flood(frame(PING) * 40_000, 2**18)
        peer.reset()
        plain.assert_clean()
    assert not caplog.records


def test_a_client_that_never_reads_cannot_fill_the_memory(server: Watched) -> None:
    pings = frame(PING, b"x" * 125) * 250
    with beside_a_healthy_session(server, slot_back_s=SILENT_S + SLOT_BACK_S):
        peer = RawClient(server.port, receive_buffer=4096, trust=server.trust).start(ENDLESS)
        before = resident_mib()
        sent = peer.flood(pings, 24 * 2**20)
        grown = resident_mib() - before
        peer.reset()
        print(f"{sent / 2**20:.1f} MiB sent, {grown:.1f} MiB grown")
        assert grown < 12


@pytest.mark.parametrize("reads", [True, False])
def test_a_client_that_goes_silent_in_mid_continuation_loses_its_slot(server: Watched, reads: bool) -> None:
    beside = beside_a_healthy_session(server, slot_back_s=SILENT_S + SLOT_BACK_S)
    with RawClient(server.port, 4096, trust=server.trust) as peer, beside:
        peer.start(ENDLESS).send(audio(SPEECH) + text(messages.Speak(turn=1)))
        peer.expect(b'"turn.speaking"')
        if reads:
            reader = threading.Thread(target=peer.hung_up)  # and never answers a ping
            reader.start()
            reader.join()


def test_a_reset_at_any_phase_frees_the_slot(server: Watched) -> None:
    """Of the TLS handshake too. `FAULT_RESETS` sets how many; `FAULT_SEED` replays."""
    print(f"FAULT_SEED={SEED} resets={RESETS}")
    rng, hello = random.Random(SEED), _hello()
    turn = [
        handshake(),
        text(FAST),
        audio(SPEECH),
        text(messages.Speak(turn=1)),
        text(messages.Interrupt(turn=1, heard_samples=0)),
        text(messages.SessionClose()),
    ]
    with beside_a_healthy_session(server):
        for number in range(RESETS):
            if number % 3 == 0:
                peer = RawClient(server.port)
                peer.send(hello[: rng.randrange(len(hello) + 1)])
            else:
                peer = RawClient(server.port, trust=server.trust)
                for piece in turn[: rng.randrange(len(turn) + 1)]:
                    with suppress(OSError):
                        peer.send(piece)
                    time.sleep(rng.choice((0.0, 0.001, 0.004)))
            peer.reset()


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x00" * 5000,
        b"\xff" * 5000,
        b"\x16\x03\x01\xff\xff" + b"\x01" * 70_000,
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"SSH-2.0-x\r\n",
    ],
    ids=lambda value: repr(value[:12]),
)
def test_what_is_no_tls_is_hung_up_on(server: Watched, rubbish: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with RawClient(server.port) as peer:
        with suppress(OSError):
            peer.send(rubbish)
        assert peer.hung_up()
    assert not caplog.records


def test_tls_handshakes_that_are_never_finished_keep_nobody_out(server: Watched) -> None:
    """Under TLS a connection is nobody's until its handshake is over: nothing counted them."""
    hello = _hello()
    with beside_a_healthy_session(server) as healthy, ExitStack() as stack:
        crowd: list[socket.socket] = []
        for index in range(5 * HANDSHAKES):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5.0))
            connection.sendall(hello[: index % len(hello)])
            crowd.append(connection)
            assert count_descriptors() < server.descriptors + len(crowd) + HANDSHAKES + 50
        assert server.health()["status"] == "ready"
        with RawClient(server.port, trust=server.trust) as newcomer:
            newcomer.start(FAST).send(text(messages.SessionClose()))
            assert newcomer.expect_close() == 1000
        healthy.waits_for_turns(1)
        wait_for("the rest to be over by themselves", lambda: server.count_tasks() < 30, HANDSHAKE_S + 5)


def test_headers_that_come_slowly_are_not_waited_for(server: Watched) -> None:
    with RawClient(server.port, trust=server.trust, patience_s=HANDSHAKE_S + 5) as peer:
        peer.send(b"GET /health HTTP/1.1\r\nX: ")
        assert peer.hung_up()
