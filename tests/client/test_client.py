"""The protocol client against a small fake server."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.audio import FRAME
from streaming.client.client import Audio, Clock, ContinuationClient, Event
from streaming.errors import ContinuationError, ProtocolError
from streaming.protocol.messages import (
    AudioMessage,
    ClientMessage,
    Error,
    Interrupt,
    Interrupted,
    Played,
    Pong,
    SamplingOptions,
    SessionClose,
    SessionClosed,
    SessionStart,
    SessionUpdate,
    Speak,
    SpeechStopped,
    TurnDone,
    TurnSpeaking,
    TurnVoice,
    encode_audio,
)
from tests.client.fake_server import STARTED, Peer, Script, fake_server, frame_of, never, one_turn, run, whole_turn


async def failure_of(script: Script, *, frames: int = 3) -> Exception:
    """What a client that wants one turn gets from a server with this script."""
    async with fake_server(script, frames=frames) as server, ContinuationClient.connect(server.url) as client:
        try:
            await client.send(np.zeros(FRAME, np.int16))
            await client.speak()
            await one_turn(client)
        except (ContinuationError, ProtocolError) as error:
            return error
    raise AssertionError("the turn came whole")


def speaking(*messages: str | bytes, close: tuple[int, str] | None = None) -> Script:
    """A script that answers `speak` with these raw messages, and perhaps closes."""

    async def script(peer: Peer, message: ClientMessage) -> None:
        if isinstance(message, Speak):
            await peer.begin()
            await peer.send_frame(peer.turn, 0)
            for raw in messages:
                await peer.socket.send(raw)
            if close is not None:
                await peer.socket.close(*close)

    return script


class TestTurns:
    def test_a_turn_comes_whole(self) -> None:
        async def test() -> None:
            async with fake_server() as server, ContinuationClient.connect(server.url) as client:
                speech = np.arange(100_000).astype(np.int16)
                await client.send(speech)
                assert await client.speak() == 1
                audio, done = await one_turn(client)
                assert done == TurnDone(
                    turn=1, reason="max_seconds", samples=5 * FRAME, first_frame_ms=1.5, mean_step_ms=2.5
                )
                assert [a.position_samples for a in audio] == [n * FRAME for n in range(5)]
                for number, piece in enumerate(audio):
                    np.testing.assert_array_equal(piece.pcm, frame_of(1, number))
                heard = server.peers[0].heard
                np.testing.assert_array_equal(np.concatenate([m.pcm for m in heard]), speech)
                assert [m.position_samples for m in heard] == [0, 48_000, 96_000]
                assert client.sent_samples == len(speech)

        run(test())

    def test_turns_follow_each_other_and_input_positions_go_on(self) -> None:
        async def test() -> None:
            async with fake_server() as server, ContinuationClient.connect(server.url) as client:
                for turn in (1, 2, 3):
                    assert client.turn == turn
                    await client.send(np.zeros(1_000, np.float32))
                    await client.speak()
                    audio, done = await one_turn(client)
                    assert done.turn == turn
                    assert {a.turn for a in audio} == {turn}
                heard = server.peers[0].heard
                assert [(m.turn, m.position_samples) for m in heard] == [(1, 0), (2, 1_000), (3, 2_000)]

        run(test())

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(0, 100_000), max_size=6))
    def test_positions_have_no_gap_whatever_is_sent(self, sizes: list[int]) -> None:
        async def test() -> None:
            async with fake_server() as server, ContinuationClient.connect(server.url) as client:
                for size in sizes:
                    await client.send(np.zeros(size, np.int16))
                await client.speak()
                await one_turn(client)
                position = 0
                for message in server.peers[0].heard:
                    assert message.position_samples == position
                    position += len(message.pcm)
                assert position == sum(sizes)

        run(test())

    def test_a_long_prompt_before_any_event_is_read(self) -> None:
        """Unread pongs filled the socket's queue, reading stopped, and the server took the client for dead."""

        async def chatty(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, SessionUpdate):
                for number in range(200):
                    await peer.send(Pong(id=number, client_time_ms=0.0, server_time_ms=0.0))
            await whole_turn(peer, message)

        async def test() -> None:
            async with fake_server(chatty) as server, ContinuationClient.connect(server.url) as client:
                await client.update(max_seconds=3.0, sampling=SamplingOptions(temperature=0.0))
                await client.send(np.zeros(200_000, np.int16))
                await client.speak()
                await one_turn(client)
                assert server.peers[0].said[-1] != SessionUpdate()

        run(test())

    def test_session_start_says_what_was_asked(self) -> None:
        async def test() -> None:
            start = SessionStart(turn_taking="vad", max_seconds=3.5, sampling=SamplingOptions(temperature=0.0, seed=5))
            async with fake_server(never) as server, ContinuationClient.connect(server.url, start) as client:
                assert server.peers[0].start == start
                assert client.started == STARTED

        run(test())

    def test_the_session_is_closed_on_the_way_out(self) -> None:
        async def test() -> None:
            async with fake_server(never) as server:
                async with ContinuationClient.connect(server.url):
                    pass
                assert isinstance(server.peers[0].said[-1], SessionClose)

        run(test())

    def test_an_error_of_the_application_closes_the_session_too(self) -> None:
        async def test() -> None:
            async with fake_server(never) as server:
                with pytest.raises(ZeroDivisionError):
                    async with ContinuationClient.connect(server.url):
                        raise ZeroDivisionError
                assert isinstance(server.peers[0].said[-1], SessionClose)

        run(test())

    def test_an_error_that_is_not_fatal_is_an_event(self) -> None:
        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.send(Error(code="empty_prompt", message="nothing heard", fatal=False, in_reply_to="speak"))

        async def test() -> None:
            async with fake_server(script) as server, ContinuationClient.connect(server.url) as client:
                await client.speak()
                event = await anext(client.events())
                assert isinstance(event, Error)
                assert event.code == "empty_prompt"

        run(test())


class TestPlayed:
    def test_what_was_played_is_said_once_a_frame(self) -> None:
        """Fifty reports a second were two thirds of what a server read; it looks at whole frames only."""

        async def test() -> None:
            async with fake_server(never) as server, ContinuationClient.connect(server.url) as client:
                for turn, samples, underruns in (
                    *((1, 480, 0), (1, 960, 0), (1, FRAME - 1, 0), (1, FRAME, 0), (1, FRAME + 480, 0)),
                    *((1, FRAME + 960, 1), (1, FRAME + 960, 1), (2, 480, 0)),
                ):
                    await client.played(turn, samples, underruns)
                await client.speak()  # after them
                while not any(isinstance(said, Speak) for said in server.peers[0].said):
                    await asyncio.sleep(0.01)
                reports = [said for said in server.peers[0].said if isinstance(said, Played)]
                assert [(said.turn, said.samples, said.underruns) for said in reports] == [
                    *((1, 480, 0), (1, FRAME, 0), (1, FRAME + 960, 1), (2, 480, 0))
                ]

        run(test())


class TestInterruption:
    def test_no_stale_audio_after_an_interruption(self) -> None:
        """Audio that was on its way when the listener interrupted was played into the next turn."""

        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak) and message.turn == 1:
                await peer.begin()
                for number in range(3):
                    await peer.send_frame(1, number)
            elif isinstance(message, Interrupt):
                for number in range(3, 6):
                    await peer.send_frame(1, number)
                await peer.done(6 * FRAME, "interrupted")
                await peer.send(Interrupted(turn=1, kept_samples=FRAME))
            else:
                await whole_turn(peer, message)

        async def test() -> None:
            async with fake_server(script) as server, ContinuationClient.connect(server.url) as client:
                await client.send(np.zeros(FRAME, np.int16))
                await client.speak()
                async for event in client.events():
                    if isinstance(event, Audio):
                        break
                await client.interrupt(1, heard_samples=2_000)
                assert client.turn == 2
                await client.send(np.ones(10, np.int16))
                await client.speak()
                seen: list[Event] = []
                async for event in client.events():
                    seen.append(event)
                    if isinstance(event, TurnDone) and event.turn == 2:
                        break
                assert {event.turn for event in seen if isinstance(event, Audio)} == {2}
                assert Interrupted(turn=1, kept_samples=FRAME) in seen
                assert client.stale_samples == 5 * FRAME
                assert Interrupt(turn=1, heard_samples=2_000) in server.peers[0].said
                assert server.peers[0].heard[-1].turn == 2

        run(test())

    def test_an_interruption_that_crosses_the_end_of_the_turn(self) -> None:
        """The turn advanced twice: once for the interruption, once for the `turn.done` that was under way."""

        async def test() -> None:
            async with fake_server() as server, ContinuationClient.connect(server.url) as client:
                await client.send(np.zeros(FRAME, np.int16))
                await client.speak()
                await one_turn(client)
                await client.interrupt(1, heard_samples=FRAME)
                assert client.turn == 2
                async for event in client.events():
                    if isinstance(event, Interrupted):
                        break
                assert client.turn == 2
                await client.speak()
                _, done = await one_turn(client)
                assert done.turn == 2

        run(test())


class TestBrokenServers:
    def test_a_gap_in_the_audio_breaks_the_protocol(self) -> None:
        """A lost frame was heard as a click, and the continuation called whole."""
        gap = encode_audio(AudioMessage(1, 2 * FRAME, frame_of(1, 2)))
        error = asyncio.run(failure_of(speaking(gap)))
        assert isinstance(error, ProtocolError)
        assert "goes on at sample 3840 instead of 1920" in str(error)

    def test_audio_of_a_turn_that_nobody_asked_for(self) -> None:
        error = asyncio.run(failure_of(speaking(encode_audio(AudioMessage(3, 0, frame_of(3, 0))))))
        assert isinstance(error, ProtocolError)

    def test_a_turn_that_says_it_sent_more_than_came(self) -> None:
        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.begin()
                await peer.send_frame(1, 0)
                await peer.done(2 * FRAME)

        error = asyncio.run(failure_of(script))
        assert "not whole" in str(error)

    @pytest.mark.parametrize(
        "raw",
        [
            "not json",
            "[]",
            '{"type": "turn.done"}',
            '{"type": 3}',
            '{"type": "turn.done", "turn": 4294967296, "reason": "end", "samples": 0, "first_frame_ms": null, '
            '"mean_step_ms": null}',
            b"",
            b"\x02" + bytes(15),
            encode_audio(AudioMessage(1, FRAME, frame_of(1, 1)))[:-1],
        ],
    )
    def test_a_malformed_message_breaks_the_protocol(self, raw: str | bytes) -> None:
        error = asyncio.run(failure_of(speaking(raw)))
        assert isinstance(error, ProtocolError)
        assert "the server broke the protocol" in str(error)

    def test_a_message_of_a_newer_server_is_ignored(self) -> None:
        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.socket.send('{"type": "weather", "sunny": true}')
            await whole_turn(peer, message)

        async def test() -> None:
            async with fake_server(script) as server, ContinuationClient.connect(server.url) as client:
                await client.send(np.zeros(1, np.int16))
                await client.speak()
                await one_turn(client)

        run(test())

    def test_a_message_larger_than_the_protocol_allows(self) -> None:
        error = asyncio.run(failure_of(speaking(bytes(96_017))))
        assert isinstance(error, ContinuationError)

    def test_a_fatal_error_is_told(self) -> None:
        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.send(Error(code="engine_stopped", message="out of memory", fatal=True))
                await peer.socket.close(1011, "engine_stopped")

        error = asyncio.run(failure_of(script))
        assert isinstance(error, ContinuationError)
        assert str(error) == "the server ended the session (engine_stopped): out of memory"

    def test_a_server_that_stops_is_told(self) -> None:
        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.send(SessionClosed(reason="stopping"))
                await peer.socket.close(1001, "stopping")

        error = asyncio.run(failure_of(script))
        assert "stopping" in str(error)

    def test_a_close_in_the_middle_of_a_turn(self) -> None:
        error = asyncio.run(failure_of(speaking(close=(1011, "internal"))))
        assert str(error) == "the server closed the connection (1011): internal"

    def test_a_connection_that_breaks_in_the_middle_of_a_turn(self) -> None:
        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.begin()
                peer.socket.transport.abort()

        error = asyncio.run(failure_of(script))
        assert str(error) == "the connection to the server broke"

    def test_sending_tells_why_the_session_ended(self) -> None:
        """`send` said only that the connection was closed; the reason lay unread among the events."""

        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, SessionUpdate):
                await peer.send(Error(code="bad_message", message="that was too much", fatal=True))
                await peer.socket.close(1008, "bad_message")

        async def test() -> None:
            async with fake_server(script) as server, ContinuationClient.connect(server.url) as client:

                async def send_on() -> None:
                    while True:
                        await client.send(np.zeros(FRAME, np.int16))
                        await asyncio.sleep(0.01)

                await client.update(max_seconds=1.0)
                with pytest.raises(ContinuationError, match="that was too much"):
                    await send_on()
                with pytest.raises(ContinuationError, match="that was too much"):
                    await client.speak()
                for _ in range(2):
                    with pytest.raises(ContinuationError, match="that was too much"):
                        await anext(client.events())

        run(test())


class TestMeasurements:
    def test_latencies_of_a_turn_are_counted_from_the_end_of_speech(self) -> None:
        async def test() -> None:
            async with fake_server() as server, ContinuationClient.connect(server.url) as client:
                await client.send(np.zeros(FRAME, np.int16))
                await client.speak()
                audio, _ = await one_turn(client)
                latency = client.latency(1)
                assert latency.speech_ended_s is not None
                assert latency.first_audio_ms == pytest.approx(1000 * (audio[0].arrived_s - latency.speech_ended_s))
                assert latency.seconds == pytest.approx(0.4)
                assert latency.interval_p95_ms is not None
                assert latency.realtime_factor is not None
                assert latency.realtime_factor > 0
                assert client.latency(9).first_audio_ms is None

        run(test())

    def test_times_of_old_turns_are_forgotten(self) -> None:
        """The memory of a long call grew with its turns."""

        async def test() -> None:
            async with fake_server() as server, ContinuationClient.connect(server.url) as client:
                for turn in range(1, 8):
                    await client.speak()
                    await one_turn(client)
                    assert client.latency(turn).seconds == pytest.approx(0.4)
                assert client.latency(6).seconds == pytest.approx(0.4)
                assert client.latency(1).seconds == 0.0

        run(test())

    def test_a_turn_without_audio_has_no_times(self) -> None:
        async def test() -> None:
            async with fake_server(frames=0) as server, ContinuationClient.connect(server.url) as client:
                await client.speak()
                await one_turn(client)
                latency = client.latency(1)
                assert (latency.first_audio_ms, latency.realtime_factor, latency.seconds) == (None, None, 0.0)

        run(test())

    def test_in_vad_mode_speech_ended_where_the_server_says(self) -> None:
        """Counted from `speech.stopped`, the wait for silence would not be in the latency that a person feels."""

        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, SessionUpdate):
                await peer.send(SpeechStopped(turn=1, at_samples=1_000))
                await peer.begin()
                await peer.send_frame(1, 0)
                await peer.done(FRAME)

        async def test() -> None:
            start = SessionStart(turn_taking="vad")
            async with fake_server(script) as server, ContinuationClient.connect(server.url, start) as client:
                await client.send(np.zeros(1_000, np.int16))
                await client.send(np.zeros(1_000, np.int16))
                await client.update(max_seconds=1.0)
                await one_turn(client)
                assert client.latency(1).speech_ended_s == client.sent_at_s(1_000)
                ended = client.sent_at_s(1_000)
                assert ended is not None
                assert client.sent_at_s(1_001) != ended
                assert client.sent_at_s(2_001) is None

        run(test())

    def test_pings_measure_the_round_trip(self) -> None:
        async def test() -> None:
            async with fake_server() as server, ContinuationClient.connect(server.url) as client:
                while client.clock.rtt_ms is None:
                    await asyncio.sleep(0.01)
                assert client.clock.rtt_ms >= 0

        run(test())

    def test_the_clock_offset_is_that_of_the_shortest_round_trip(self) -> None:
        def pong(sent_ms: float, server_ms: float) -> Pong:
            return Pong(id=0, client_time_ms=sent_ms, server_time_ms=server_ms)

        clock = Clock().after(pong(100.0, 5_105.0), 110.0)
        assert clock == Clock(rtt_ms=10.0, best_rtt_ms=10.0, offset_ms=5_000.0)
        clock = clock.after(pong(200.0, 5_290.0), 300.0)
        assert clock == Clock(rtt_ms=100.0, best_rtt_ms=10.0, offset_ms=5_000.0)
        clock = clock.after(pong(400.0, 5_402.0), 402.0)
        assert clock == Clock(rtt_ms=2.0, best_rtt_ms=2.0, offset_ms=5_001.0)


def test_a_turn_speaking_of_a_dropped_turn_is_dropped() -> None:
    """The application took the late `turn.speaking` of the interrupted turn for the next turn's."""

    async def script(peer: Peer, message: ClientMessage) -> None:
        if isinstance(message, Interrupt):
            await peer.begin()
            await peer.send(TurnVoice(turn=1, voice="a deep voice"))
            await peer.done(0, "interrupted")
            await peer.send(Interrupted(turn=1, kept_samples=0))

    async def test() -> None:
        async with fake_server(script) as server, ContinuationClient.connect(server.url) as client:
            await client.speak()
            await client.interrupt(1, 0)
            seen: list[Event] = []
            async for event in client.events():
                seen.append(event)
                if isinstance(event, Interrupted):
                    break
            assert not any(isinstance(event, TurnSpeaking | TurnVoice) for event in seen)

    run(test())
