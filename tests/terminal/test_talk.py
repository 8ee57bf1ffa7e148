"""Conversations against the fake server: files and microphones, both paces, both kinds of turn taking."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import soundfile
from msgspec import structs
from numpy.typing import NDArray

from streaming.audio import FRAME, SAMPLE_RATE, AudioReader, WavWriter
from streaming.client.client import ContinuationClient
from streaming.engine.engine import Engine
from streaming.errors import ContinuationError
from streaming.protocol.messages import (
    ClientMessage,
    Error,
    Interrupt,
    Interrupted,
    Played,
    Resumption,
    SessionClosed,
    SessionResumed,
    SessionStart,
    Speak,
    SpeechStarted,
    SpeechStopped,
    Take,
    TurnVoice,
)
from streaming.protocol.replay import WINDOW
from streaming.terminal.jitter_buffer import JitterBuffer
from streaming.terminal.keyboard import Key
from streaming.terminal.loudspeaker import SimulatedLoudspeaker
from streaming.terminal.recording import Recording
from streaming.terminal.sources import file_pieces, silence_pieces
from streaming.terminal.talk import Talk
from streaming.terminal.view import Meters, TurnReport
from tests.client.fake_server import (
    STARTED,
    FakeServer,
    Peer,
    Script,
    fake_server,
    frame_of,
    half_a_turn,
    never,
    whole_turn,
)
from tests.engine.stub_step import StubStep
from tests.server.cut_proxy import cut_proxy
from tests.server.live_server import serving
from tests.terminal.witness import Witness


class FakeMicrophone:
    """A microphone in a quiet room. peak: of the noise that it gives."""

    dropped_ms = 40.0

    def __init__(self, peak: int = 8) -> None:
        self._peak = peak

    async def pieces(self) -> AsyncIterator[NDArray[np.int16]]:
        async for piece in silence_pieces():
            piece[::2] = self._peak
            yield piece


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(bounded())


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A third of a second, recognisable by its value."""
    path = tmp_path / "speech.wav"
    soundfile.write(path, np.full(8_000, 5_000, np.int16), SAMPLE_RATE)
    return path


def loudspeaker() -> SimulatedLoudspeaker:
    return SimulatedLoudspeaker(JitterBuffer())


async def stream_file(
    server: FakeServer,
    speech: Path,
    *,
    pace: Literal["realtime", "fast"] = "realtime",
    turn_taking: Literal["manual", "vad"] = "manual",
    view: Witness | None = None,
) -> TurnReport:
    """File mode, with its results beside `speech`: out.wav and record.wav."""
    start = SessionStart(turn_taking=turn_taking, pace=pace)
    realtime = pace == "realtime"
    with (
        AudioReader(speech) as reader,
        WavWriter(speech.with_name("out.wav")) as output,
        Recording(speech.with_name("record.wav")) as record,
    ):
        async with ContinuationClient.connect(server.url, start) as client:
            talk = Talk(
                client,
                view or Witness(),
                turn_taking=turn_taking,
                loudspeaker=loudspeaker() if realtime else None,
                output=output,
                record=record,
            )
            return await talk.run_file(file_pieces(reader, realtime=realtime))


def whole_continuation(frames: int, turn: int = 1) -> NDArray[np.int16]:
    return np.concatenate([frame_of(turn, number) for number in range(frames)])


async def one_turn(view: Witness) -> AsyncIterator[Key]:
    """The keys of a person who talks for a moment, hands over and hears all of the continuation."""
    await view.until("listening")
    await asyncio.sleep(0.1)
    yield Key.ENTER
    await view.until("turn")


class TestFiles:
    @pytest.mark.parametrize("pace", ["realtime", "fast"])
    def test_a_file_is_continued(self, speech: Path, pace: Literal["realtime", "fast"]) -> None:
        async def test() -> None:
            async with fake_server() as server:
                report = await stream_file(server, speech, pace=pace)
                peer = server.peers[0]
                assert peer.start.pace == pace
                np.testing.assert_array_equal(np.concatenate([m.pcm for m in peer.heard]), np.full(8_000, 5_000))
                played = [message.samples for message in peer.said if isinstance(message, Played)]
                assert played == sorted(played)
                assert bool(played) == (pace == "realtime")
            assert (report.whole, report.reason, report.seconds) == (True, "max_seconds", 0.4)
            assert report.first_audio_ms is not None
            assert (report.first_audible_ms is not None) == (pace == "realtime")
            assert (report.server_first_frame_ms, report.server_step_ms) == (1.5, 2.5)

        run(test())
        continuation, rate = soundfile.read(speech.with_name("out.wav"), dtype="int16")
        assert rate == SAMPLE_RATE
        np.testing.assert_array_equal(continuation, whole_continuation(5))
        record, _ = soundfile.read(speech.with_name("record.wav"), dtype="int16")
        np.testing.assert_array_equal(record[:8_000, 0], np.full(8_000, 5_000))
        assert not record[8_000:, 0].any()
        assert not record[:8_000, 1].any()
        heard = record[8_000:, 1]
        np.testing.assert_array_equal(heard[heard > 0], whole_continuation(5))

    def test_what_came_whole_is_played_and_kept_although_the_server_stops(self, speech: Path) -> None:
        """A server that stops finishes its turns, and says goodbye while their last half second is still to be played:
        the whole continuation was thrown away.
        """

        async def stopping(peer: Peer, message: ClientMessage) -> None:
            await whole_turn(peer, message)
            if isinstance(message, Speak):
                await peer.send(SessionClosed(reason="stopping"))
                await peer.socket.close(1001, "stopping")

        async def test() -> None:
            async with fake_server(stopping) as server:
                report = await stream_file(server, speech)
                assert (report.whole, report.seconds) == (True, 0.4)

        run(test())
        continuation, _ = soundfile.read(speech.with_name("out.wav"), dtype="int16")
        np.testing.assert_array_equal(continuation, whole_continuation(5))
        record, _ = soundfile.read(speech.with_name("record.wav"), dtype="int16")
        heard = record[8_000:, 1]
        np.testing.assert_array_equal(heard[heard > 0], whole_continuation(5))

    def test_a_server_that_stops_in_the_middle_leaves_nothing_that_looks_whole(self, speech: Path) -> None:
        async def stopping(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.begin()
                await peer.send_frame(peer.turn, 0)
                await peer.send(SessionClosed(reason="stopping"))
                await peer.socket.close(1001, "stopping")

        async def test() -> None:
            async with fake_server(stopping) as server:
                with pytest.raises(ContinuationError, match="stopping"):
                    await stream_file(server, speech)

        run(test())
        assert not speech.with_name("out.wav").exists()

    def test_the_voice_that_the_model_goes_on_in_is_told(self, speech: Path) -> None:
        """A person was promised their own voice, and heard another."""

        async def in_a_voice(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.begin()
                await peer.send(TurnVoice(turn=1, voice="a deep voice"))
                await peer.send_frame(1, 0)
                await peer.done(FRAME)

        async def test() -> None:
            async with fake_server(in_a_voice) as server:
                report = await stream_file(server, speech, view=view)
            assert report.voice == "a deep voice"

        view = Witness()
        run(test())
        assert ("voice", {"turn": 1, "voice": "a deep voice"}) in view.events

    def test_a_gap_in_the_continuation_is_reported_to_the_server(self, speech: Path) -> None:
        """The server's operator learned of gaps from the people who heard them."""

        async def stalls(peer: Peer, message: ClientMessage) -> None:
            if not isinstance(message, Speak):
                return
            await peer.begin()
            for number in range(5):
                await asyncio.sleep(0.8 if number == 3 else 0)
                await peer.send_frame(peer.turn, number)
            await peer.done(5 * FRAME)

        async def test() -> None:
            async with fake_server(stalls) as server:
                report = await stream_file(server, speech)
                underruns = [message.underruns for message in server.peers[0].said if isinstance(message, Played)]
                assert underruns == sorted(underruns)
                assert (underruns[0], underruns[-1]) == (0, report.underruns) == (0, 1)

        run(test())

    def test_what_was_played_is_reported_to_the_last_sample(self, speech: Path) -> None:
        async def test() -> None:
            async with fake_server() as server:
                await stream_file(server, speech)
                played = [message.samples for message in server.peers[0].said if isinstance(message, Played)]
                assert played[-1] == 5 * FRAME

        run(test())

    def test_an_empty_continuation_is_whole(self, speech: Path) -> None:
        """A model that ends its speech at once left the client waiting for audio."""

        async def test() -> None:
            async with fake_server(frames=0) as server:
                report = await stream_file(server, speech)
            assert report.whole
            assert report.first_audible_ms is None
            assert "0.00 s" in report.figures()

        run(test())
        assert soundfile.info(speech.with_name("out.wav")).frames == 0

    def test_a_continuation_that_the_server_cuts_off_is_not_whole(self, speech: Path) -> None:
        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.begin()
                await peer.send_frame(1, 0)
                await peer.done(FRAME, "interrupted")

        async def test() -> None:
            async with fake_server(script) as server:
                with pytest.raises(ContinuationError, match="no continuation came whole"):
                    await stream_file(server, speech)

        run(test())
        assert not speech.with_name("out.wav").exists()

    def test_a_server_that_goes_away_leaves_no_output(self, speech: Path) -> None:
        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.begin()
                await peer.send_frame(1, 0)
                peer.socket.transport.abort()

        async def test() -> None:
            async with fake_server(script) as server:
                with pytest.raises(ContinuationError, match="the connection to the server broke"):
                    await stream_file(server, speech)

        run(test())
        assert not speech.with_name("out.wav").exists()
        assert not speech.with_name("record.wav").exists()

    def test_an_error_in_answer_to_speak_ends_the_wait(self, speech: Path) -> None:
        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.send(Error(code="prompt_too_long", message="too long", fatal=False, in_reply_to="speak"))

        async def test() -> None:
            async with fake_server(script) as server:
                with pytest.raises(ContinuationError, match="too long"):
                    await stream_file(server, speech)

        run(test())

    def test_a_server_that_says_nothing_is_given_up(self, speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A silent stall near saturation hung the client for ever."""
        monkeypatch.setattr("streaming.terminal.talk.STALL_S", 0.1)

        async def test() -> None:
            async with fake_server(never) as server:
                with pytest.raises(ContinuationError, match="has said nothing"):
                    await stream_file(server, speech)

        run(test())


class TestVoiceActivity:
    @staticmethod
    def hears(*, after_samples: int, barge_in: bool = False) -> Script:
        """A server in vad mode: it starts to continue when this much has come."""

        spoken: list[int] = []

        async def script(peer: Peer, message: ClientMessage) -> None:
            heard = sum(len(audio.pcm) for audio in peer.heard)
            if isinstance(message, Interrupt):
                await peer.done(FRAME, "interrupted")
                await peer.send(Interrupted(turn=message.turn, kept_samples=0))
                await TestVoiceActivity.answer(peer, heard)
            elif peer.turn == 1 and heard >= after_samples and not spoken:
                spoken.append(1)
                if barge_in:
                    await peer.send(SpeechStopped(turn=1, at_samples=2_000))
                    await peer.begin()
                    await peer.send_frame(1, 0)
                    await peer.send(SpeechStarted(turn=1, at_samples=heard))
                else:
                    await TestVoiceActivity.answer(peer, 8_000)

        return script

    @staticmethod
    async def answer(peer: Peer, at_samples: int) -> None:
        await peer.send(SpeechStopped(turn=peer.turn, at_samples=at_samples))
        await peer.begin()
        for number in range(3):
            await peer.send_frame(peer.turn, number)
        await peer.done(3 * FRAME, "end")

    @pytest.fixture(autouse=True)
    def often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The fake server acts on control messages, of which pings are one a second; here it gets more.
        async def nudge(client: ContinuationClient) -> None:
            with contextlib.suppress(ContinuationError):
                while True:
                    await client.update(max_seconds=1.0)
                    await asyncio.sleep(0.02)

        monkeypatch.setattr(ContinuationClient, "_ping", nudge)

    def test_silence_follows_the_file_until_the_server_hears_it(self, speech: Path) -> None:
        """A file that just ends gives a server in vad mode nothing to hear the end of speech by."""

        async def test() -> None:
            view = Witness()
            async with fake_server(self.hears(after_samples=12_000)) as server:
                report = await stream_file(server, speech, turn_taking="vad", view=view)
                assert not any(isinstance(message, Speak) for message in server.peers[0].said)
            assert (report.whole, report.reason) == (True, "end")
            assert report.first_audio_ms is not None
            assert "speech_stopped" in view.names()

        run(test())
        continuation, _ = soundfile.read(speech.with_name("out.wav"), dtype="int16")
        np.testing.assert_array_equal(continuation, whole_continuation(3))

    def test_barge_in_is_answered_with_what_was_heard(self, speech: Path) -> None:
        async def test() -> None:
            view = Witness()
            async with fake_server(self.hears(after_samples=3_000, barge_in=True)) as server:
                report = await stream_file(server, speech, turn_taking="vad", view=view)
                interrupts = [message for message in server.peers[0].said if isinstance(message, Interrupt)]
                assert [message.turn for message in interrupts] == [1]
                assert interrupts[0].heard_samples <= FRAME
            assert (report.turn, report.whole) == (2, True)
            assert view.names().count("interrupted") == 1

        run(test())

    def test_a_file_without_speech_is_not_waited_for(self, speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("streaming.terminal.talk.VAD_PATIENCE_S", 0.1)

        async def test() -> None:
            async with fake_server(never) as server:
                with pytest.raises(ContinuationError, match="heard no end of speech"):
                    await stream_file(server, speech, turn_taking="vad")

        run(test())


class TestMicrophone:
    @staticmethod
    async def converse(
        server: FakeServer, view: Witness, keys: AsyncIterator[Key], output: Path, *, push_to_talk: bool = False
    ) -> Talk:
        with WavWriter(output) as wav:
            async with ContinuationClient.connect(server.url) as client:
                talk = Talk(
                    client,
                    view,
                    turn_taking="manual",
                    loudspeaker=loudspeaker(),
                    output=wav,
                    record=None,
                    push_to_talk=push_to_talk,
                )
                await talk.run_microphone(FakeMicrophone(), keys)
        return talk

    def test_enter_ends_the_prompt_and_the_machine_hands_back(self, tmp_path: Path) -> None:
        async def test() -> None:
            view = Witness()

            async def keys() -> AsyncIterator[Key]:
                for turn in (1, 2):
                    await view.until("listening", turn)
                    await asyncio.sleep(0.05)
                    yield Key.ENTER
                await view.until("turn", 2)

            async with fake_server(frames=2) as server:
                talk = await self.converse(server, view, keys(), tmp_path / "out.wav")
                # While the machine speaks, the microphone is not sent.
                heard = {message.turn for message in server.peers[0].heard}
                assert heard - {3} == {1, 2}  # the third begins as soon as the second is over
            assert talk.whole_turns == 2
            assert talk.meters.dropped_input_ms == 40.0

        run(test())
        continuation, _ = soundfile.read(tmp_path / "out.wav", dtype="int16")
        expected = np.concatenate([whole_continuation(2, turn) for turn in (1, 2)])
        np.testing.assert_array_equal(continuation, expected)

    def test_enter_interrupts_and_only_what_was_heard_is_kept(self, tmp_path: Path) -> None:
        async def test() -> None:
            view = Witness()

            async def keys() -> AsyncIterator[Key]:
                await view.until("listening")
                yield Key.ENTER
                await view.until("speaking")
                while not any(isinstance(message, Played) for message in server.peers[0].said):
                    await asyncio.sleep(0.005)
                server.peers[0].frames = 2
                yield Key.ENTER
                await view.until("listening", 2)
                yield Key.ENTER
                await view.until("turn", 2)

            async with fake_server(frames=100) as server:
                talk = await self.converse(server, view, keys(), tmp_path / "out.wav")
                interrupts = [message for message in server.peers[0].said if isinstance(message, Interrupt)]
                assert len(interrupts) == 1
                assert interrupts[0].heard_samples > 0
            assert talk.whole_turns == 1
            heard = interrupts[0].heard_samples
            continuation, _ = soundfile.read(tmp_path / "out.wav", dtype="int16")
            np.testing.assert_array_equal(
                continuation, np.concatenate([whole_continuation(100)[:heard], whole_continuation(2, 2)])
            )

        run(test())

    def test_an_error_hands_back_to_the_person(self, tmp_path: Path) -> None:
        """Enter before the first word left the client in a turn that never came."""

        async def script(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak) and not any(isinstance(said, Speak) for said in peer.said[:-1]):
                await peer.send(Error(code="empty_prompt", message="nothing", fatal=False, in_reply_to="speak"))
            else:
                await whole_turn(peer, message)

        async def test() -> None:
            view = Witness()

            async def keys() -> AsyncIterator[Key]:
                yield Key.ENTER
                await view.until("notice")
                await view.until("listening", 2)
                yield Key.ENTER
                await view.until("turn")

            async with fake_server(script, frames=1) as server:
                talk = await self.converse(server, view, keys(), tmp_path / "out.wav")
            assert talk.whole_turns == 1

        run(test())

    def test_push_to_talk_sends_only_what_is_said_while_the_key_is_down(self, tmp_path: Path) -> None:
        async def test() -> None:
            view = Witness()
            sent: list[int] = []

            async def keys() -> AsyncIterator[Key]:
                await view.until("listening")
                await asyncio.sleep(0.2)
                sent.append(len(server.peers[0].heard))
                for key in (Key.SPACE, Key.RELEASED):
                    yield key
                    await asyncio.sleep(0.2)
                yield Key.RELEASED  # of a key that ended nothing
                await view.until("turn")
                server.peers[0].frames = 100
                for key in (Key.SPACE, Key.SPACE):  # a terminal that does not tell of releases
                    yield key
                    await asyncio.sleep(0.1)
                await view.until("speaking", 2)
                yield Key.SPACE  # interrupts, and talks
                await view.until("interrupted")
                await asyncio.sleep(0.1)

            async with fake_server(frames=2) as server:
                talk = await self.converse(server, view, keys(), tmp_path / "out.wav", push_to_talk=True)
                assert {message.turn for message in server.peers[0].heard} == {1, 2, 3}
            assert sent == [0]
            assert talk.whole_turns == 1
            assert talk.meters.state == "talking"

        run(test())

    def test_a_key_and_a_voice_that_interrupt_at_once_interrupt_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While the first interruption was still being sent, the second said that nothing was heard: the model forgot
        all that it had said, and the recording and the screen had the turn twice.
        """

        async def test() -> None:
            view, gate = Witness(), asyncio.Event()
            interrupt = ContinuationClient.interrupt

            async def slow(client: ContinuationClient, turn: int, heard_samples: int) -> None:
                await gate.wait()
                await interrupt(client, turn, heard_samples)

            async def keys() -> AsyncIterator[Key]:
                await view.until("listening")
                yield Key.ENTER
                while not any(isinstance(message, Played) for message in server.peers[0].said):
                    await asyncio.sleep(0.005)
                monkeypatch.setattr(ContinuationClient, "interrupt", slow)
                opener = asyncio.create_task(voice())
                yield Key.ENTER
                await opener
                await view.until("listening", 2)

            async def voice() -> None:
                await view.until("interrupted")
                await server.peers[0].send(SpeechStarted(turn=1, at_samples=0))
                await view.until("speech_started")
                await asyncio.sleep(0.1)
                gate.set()

            async with fake_server(half_a_turn, frames=50) as server:
                talk = await self.converse(server, view, keys(), tmp_path / "out.wav")
                while not (told := [said for said in server.peers[0].said if isinstance(said, Interrupt)]):
                    await asyncio.sleep(0.005)
            assert len(told) == view.names().count("interrupted") == view.names().count("turn") == 1
            assert talk.last_report is not None
            heard = told[0].heard_samples
            assert heard > 0
            continuation, _ = soundfile.read(tmp_path / "out.wav", dtype="int16")
            np.testing.assert_array_equal(continuation, whole_continuation(50)[:heard])

        run(test())

    def test_a_turn_that_is_interrupted_at_its_end_is_not_finished_as_well(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A turn that was interrupted while the last report of its playback was being sent was told and kept twice."""

        async def test() -> None:
            view, gate, last = Witness(), asyncio.Event(), asyncio.Event()
            played = ContinuationClient.played

            async def slow(client: ContinuationClient, turn: int, samples: int, underruns: int = 0) -> None:
                if samples == 2 * FRAME and not gate.is_set():
                    last.set()
                    await gate.wait()
                await played(client, turn, samples, underruns)

            monkeypatch.setattr(ContinuationClient, "played", slow)

            async def keys() -> AsyncIterator[Key]:
                await view.until("listening")
                yield Key.ENTER
                await last.wait()
                yield Key.ENTER
                await view.until("listening", 2)
                gate.set()
                await asyncio.sleep(0.2)

            async with fake_server(frames=2) as server:
                talk = await self.converse(server, view, keys(), tmp_path / "out.wav")
            assert view.names().count("turn") == 1
            assert talk.whole_turns == 0

        run(test())

    def test_a_recording_has_of_the_microphone_what_was_sent(self, tmp_path: Path) -> None:
        """While the machine spoke, the room was recorded as if it had been said to it."""

        class Humming:
            dropped_ms = 0.0

            async def pieces(self) -> AsyncIterator[NDArray[np.int16]]:
                async for piece in silence_pieces():
                    yield piece + np.int16(1_000)

        async def test() -> None:
            view = Witness()
            async with fake_server(frames=4) as server:
                with Recording(tmp_path / "record.wav") as record:
                    async with ContinuationClient.connect(server.url) as client:
                        talk = Talk(
                            client, view, turn_taking="manual", loudspeaker=loudspeaker(), output=None, record=record
                        )
                        await talk.run_microphone(Humming(), one_turn(view))
                        sent.append(client.sent_samples)

        sent: list[int] = []
        run(test())
        record, _ = soundfile.read(tmp_path / "record.wav", dtype="int16")
        assert np.count_nonzero(record[:, 0]) == sent[0] < len(record)

    def test_another_take_is_of_the_same_words_and_takes_the_place_of_the_first(self, tmp_path: Path) -> None:
        """Whoever did not like an answer had to say everything again."""

        async def test() -> Talk:
            view = Witness()

            async def keys() -> AsyncIterator[Key]:
                await view.until("listening")
                yield Key.TAKE
                await asyncio.sleep(0.1)
                yield Key.ENTER
                await view.until("turn")
                yield Key.TAKE
                await view.until("turn", 2)
                await asyncio.sleep(0.1)
                yield Key.ENTER
                await view.until("speaking", 3)
                await asyncio.sleep(0.1)
                yield Key.TAKE
                await view.until("turn", 4)

            with Engine(StubStep(1, rewind_frames=16), "stub") as engine, serving(engine) as server:
                start = SessionStart(takes=True, max_seconds=0.4)
                with WavWriter(tmp_path / "out.wav") as wav:
                    async with ContinuationClient.connect(server.url, start) as client:
                        talk = Talk(
                            client, view, turn_taking="manual", loudspeaker=loudspeaker(), output=wav, record=None
                        )
                        await talk.run_microphone(FakeMicrophone(), keys())
            takes = [(fields["turn"], fields["of"]) for name, fields in view.events if name == "take"]
            assert takes == [(2, 1), (4, 3)]
            seeds = {fields["seed"] for name, fields in view.events if name == "take"}
            assert len(seeds) == 2
            assert "nothing yet" in next(fields["message"] for name, fields in view.events if name == "notice")
            reasons = [fields["reason"] for name, fields in view.events if name == "turn"]
            assert reasons == ["max_seconds", "max_seconds", "interrupted", "max_seconds"]
            return talk

        run(test())
        assert soundfile.info(tmp_path / "out.wav").frames == 2 * 5 * FRAME, "of two prompts, a take each"

    @pytest.mark.parametrize("suggestions", [(), ("one, two", "Monday", "A B C")])
    def test_what_one_might_say_is_said_before_one_speaks(self, tmp_path: Path, suggestions: tuple[str, ...]) -> None:
        """Who was not told what a demo recites from talked of something else, and heard it babble."""

        async def test() -> None:
            view = Witness()

            async def keys() -> AsyncIterator[Key]:
                await view.until("listening")
                yield Key.RELEASED  # means nothing here

            step = StubStep(1, rewind_frames=16)
            with Engine(step, "stub", suggestions=suggestions) as engine, serving(engine) as server:
                async with ContinuationClient.connect(server.url, SessionStart(max_seconds=0.2)) as client:
                    talk = Talk(client, view, turn_taking="manual", loudspeaker=loudspeaker(), output=None, record=None)
                    await talk.run_microphone(FakeMicrophone(), keys())
            names = [name for name, _ in view.events]
            told = [fields["message"] for name, fields in view.events if name == "notice"]
            assert told == (['Try saying "one, two", "Monday" or "A B C".'] if suggestions else [])
            assert not told or names.index("notice") < names.index("listening")

        run(test())

    @pytest.mark.parametrize(("peak", "dead"), [(0, True), (3, True), (4, False)])
    def test_a_microphone_that_gives_nothing_is_told_of_once(self, peak: int, dead: bool) -> None:
        """Whoever talked into a muted microphone heard an answer to silence, and was told nothing."""

        async def test() -> None:
            view = Witness()

            async def keys() -> AsyncIterator[Key]:
                await view.until("listening")
                await asyncio.sleep(2.0 if dead else 1.7)
                yield Key.RELEASED  # means nothing here

            async with fake_server(frames=2) as server, ContinuationClient.connect(server.url) as client:
                talk = Talk(client, view, turn_taking="manual", loudspeaker=loudspeaker(), output=None, record=None)
                await talk.run_microphone(FakeMicrophone(peak), keys())
            told = [fields["message"] for name, fields in view.events if name == "notice"]
            assert [message.partition(".")[0] for message in told] == ["The microphone gives nothing"] * dead

        run(test())

    def test_a_server_without_takes_is_said_to_be(self, tmp_path: Path) -> None:
        async def test() -> None:
            view = Witness()

            async def keys() -> AsyncIterator[Key]:
                await view.until("listening")
                yield Key.ENTER
                await view.until("turn")
                yield Key.TAKE

            async with fake_server(frames=2) as server:
                await self.converse(server, view, keys(), tmp_path / "out.wav")
                assert not any(isinstance(message, Take) for message in server.peers[0].said)
            assert "makes no takes" in next(fields["message"] for name, fields in view.events if name == "notice")

        run(test())

    def test_what_was_heard_is_kept_when_the_conversation_is_broken_off(self, tmp_path: Path) -> None:
        """Ctrl-C in the middle of a continuation lost all of it."""
        heard: list[int] = []

        async def test() -> None:
            view = Witness()

            async with fake_server(frames=100) as server:
                with WavWriter(tmp_path / "out.wav") as wav:
                    async with ContinuationClient.connect(server.url) as client:
                        talk = Talk(
                            client, view, turn_taking="manual", loudspeaker=loudspeaker(), output=wav, record=None
                        )
                        with contextlib.suppress(asyncio.CancelledError):
                            talking = asyncio.ensure_future(talk.run_microphone(FakeMicrophone(), _patient()))
                            await view.until("listening")
                            await talk._speak()
                            await view.until("speaking")
                            await asyncio.sleep(0.4)
                            talking.cancel()
                            await talking
                    heard.append(wav.samples)

        run(test())
        assert 0 < heard[0] < 100 * FRAME
        continuation, _ = soundfile.read(tmp_path / "out.wav", dtype="int16")
        np.testing.assert_array_equal(continuation, whole_continuation(100)[: heard[0]])

    def test_another_take_that_is_left_in_the_middle_leaves_the_one_before(self, tmp_path: Path) -> None:
        """The file held the first half second of it, and the sentence told of the take that was whole."""

        reports: list[TurnReport | None] = []

        async def test() -> None:
            view = Witness()

            async def keys() -> AsyncIterator[Key]:
                async for key in one_turn(view):
                    yield key
                yield Key.TAKE
                await view.until("speaking", 2)
                await asyncio.sleep(0.3)

            with Engine(StubStep(1, rewind_frames=16), "stub") as engine, serving(engine) as server:
                start = SessionStart(takes=True, max_seconds=0.8)
                with WavWriter(tmp_path / "out.wav") as wav:
                    async with ContinuationClient.connect(server.url, start) as client:
                        talk = Talk(
                            client, view, turn_taking="manual", loudspeaker=loudspeaker(), output=wav, record=None
                        )
                        await talk.run_microphone(FakeMicrophone(), keys())
            assert view.names().count("take") == 1 and view.names().count("turn") == 1
            reports.append(talk.last_report)

        run(test())
        (report,) = reports
        assert report is not None and report.whole
        assert soundfile.info(tmp_path / "out.wav").frames == round(report.seconds * SAMPLE_RATE) == 10 * FRAME


class TestOutage:
    def test_the_microphone_goes_on_while_the_connection_is_away(self, tmp_path: Path) -> None:
        """After 256 small pieces, five seconds, the rest of what was said was lost."""
        shown: list[tuple[float | None, float]] = []
        cut_at_s: list[float] = []
        said: list[int] = []

        class Watching(Witness):
            def show(self, meters: Meters) -> None:
                shown.append((meters.away_seconds, meters.kept_input_ms))
                if meters.away_seconds is not None:
                    away_ms = 1e3 * (time.monotonic() - cut_at_s[0])
                    assert meters.kept_input_ms <= away_ms + 50, "what was said before was heard"

        async def test() -> None:
            view = Watching()

            async def keys() -> AsyncIterator[Key]:
                await view.until("listening")
                await asyncio.sleep(0.3)
                cut_at_s.append(time.monotonic())
                proxy.open = False
                proxy.cut()
                await view.until("connection_lost")
                await asyncio.sleep(1.5)
                yield Key.ENTER  # the prompt is over before the connection is back
                proxy.open = True
                await view.until("connection_restored")
                await view.until("speaking")
                said.append(client.sent_samples)
                await view.until("turn")

            with Engine(StubStep(2), "stub") as engine, serving(engine, resume_s=20.0) as server:
                start = SessionStart(resume=True, max_seconds=0.4)
                async with cut_proxy(server.url) as proxy, ContinuationClient.connect(proxy.url, start) as client:
                    talk = Talk(client, view, turn_taking="manual", loudspeaker=loudspeaker(), output=None, record=None)
                    await talk.run_microphone(FakeMicrophone(), keys())
                    assert client.sent_samples > 1.5 * SAMPLE_RATE
            assert talk.whole_turns == 1
            speaking = next(fields for name, fields in view.events if name == "speaking")
            assert speaking["prompt_seconds"] >= said[0] / SAMPLE_RATE, "all of it was heard"

        run(test())
        away = [(seconds, kept) for seconds, kept in shown if seconds is not None]
        assert away[0][0] > away[-1][0] > 0
        assert away[-1][1] > 1_000
        assert shown[-1][0] is None

    def test_a_connection_that_is_being_restored_is_no_server_that_says_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In mid-turn the client gave up what the server still kept for it."""
        monkeypatch.setattr("streaming.terminal.talk.STALL_S", 0.3)

        async def test() -> None:
            view = Witness()

            async def keys() -> AsyncIterator[Key]:
                await view.until("listening")
                await asyncio.sleep(0.1)
                yield Key.ENTER
                await view.until("speaking")
                proxy.open = False
                proxy.cut()
                await view.until("connection_lost")
                await asyncio.sleep(1.0)
                proxy.open = True
                await view.until("turn")

            with Engine(StubStep(2), "stub") as engine, serving(engine, resume_s=20.0) as server:
                start = SessionStart(resume=True, max_seconds=2.0)
                async with cut_proxy(server.url) as proxy, ContinuationClient.connect(proxy.url, start) as client:
                    talk = Talk(client, view, turn_taking="manual", loudspeaker=loudspeaker(), output=None, record=None)
                    await talk.run_microphone(FakeMicrophone(), keys())
            assert talk.whole_turns == 1

        run(test())

    @pytest.mark.parametrize("source", ["file", "microphone"])
    @pytest.mark.parametrize("finished", [True, False], ids=["finished", "lost"])
    def test_the_rest_of_a_turn_that_a_dead_server_had_finished_is_still_played(
        self, speech: Path, source: str, finished: bool
    ) -> None:
        """A file was told to start again, though all of its continuation was on its way from the next server."""
        frames, before = 5, 2

        async def dies(peer: Peer, message: ClientMessage) -> None:
            if isinstance(message, Speak):
                await peer.begin()
                for number in range(before):
                    await peer.send_frame(peer.turn, number)
                await asyncio.sleep(0.2)
                peer.socket.transport.abort()

        async def goes_on(peer: Peer) -> None:
            await peer.send(SessionResumed(received=0, turn=2 if finished else 1))
            if finished:
                for number in range(before, frames):
                    await peer.send_frame(1, number)
                await peer.done(frames * FRAME)

        async def keys() -> AsyncIterator[Key]:
            await view.until("listening")
            yield Key.ENTER
            await view.until("went_back")
            await view.until("listening", 2)

        async def test() -> None:
            resume = Resumption(token="a-token", seconds=10.0, window=WINDOW)  # noqa: S106
            opening = structs.replace(STARTED, resume=resume)
            start = SessionStart(resume=True)
            async with (
                fake_server(dies, opening=opening, comes_back=goes_on) as server,
                ContinuationClient.connect(server.url, start) as client,
            ):
                with WavWriter(speech.with_name("out.wav")) as output:
                    talk = Talk(
                        client, view, turn_taking="manual", loudspeaker=loudspeaker(), output=output, record=None
                    )
                    if source == "microphone":
                        await talk.run_microphone(FakeMicrophone(), keys())
                    elif finished:
                        with AudioReader(speech) as reader:
                            assert (await talk.run_file(file_pieces(reader, realtime=False))).whole
                    else:
                        with AudioReader(speech) as reader, pytest.raises(ContinuationError, match="start again"):
                            await talk.run_file(file_pieces(reader, realtime=False))
                assert talk.whole_turns == int(finished)

        view = Witness()
        run(test())
        if finished:
            continuation, _ = soundfile.read(speech.with_name("out.wav"), dtype="int16")
            np.testing.assert_array_equal(continuation, whole_continuation(frames))


async def _patient() -> AsyncIterator[Key]:
    await asyncio.sleep(60)
    yield Key.ENTER
