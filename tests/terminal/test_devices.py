"""Sound devices, with a stand-in for PortAudio."""

from __future__ import annotations

import asyncio
import builtins
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.errors import DeviceError
from streaming.terminal.devices import (
    MAX_CAPTURED_PIECES,
    Microphone,
    Speaker,
    device_table,
    find_device,
    list_devices,
)
from tests.terminal.fake_sounddevice import FakeSoundDevice, Stream, install


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> FakeSoundDevice:
    return install(monkeypatch)


class TestMissing:
    def test_without_the_package_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sounddevice", None)
        with pytest.raises(DeviceError, match="pip install sounddevice"):
            list_devices()

    def test_without_portaudio_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where PortAudio is missing, `import sounddevice` raises OSError, which reads like a bug of ours."""
        real = builtins.__import__

        def without_portaudio(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "sounddevice":
                raise OSError("PortAudio library not found")
            return real(name, *args, **kwargs)

        monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
        monkeypatch.setattr(builtins, "__import__", without_portaudio)
        with pytest.raises(DeviceError, match=r"apt install libportaudio2.*brew install portaudio"):
            list_devices()


@pytest.mark.usefixtures("sound")
class TestLookup:
    def test_a_device_is_found_by_its_number(self) -> None:
        assert find_device(list_devices(), "2", "input").name == "USB Headset"

    def test_by_part_of_the_name_in_any_case(self) -> None:
        assert find_device(list_devices(), "headset", "output").number == 2

    def test_only_devices_of_that_direction_count(self) -> None:
        """`built-in` names a microphone and loudspeakers; each direction has one."""
        assert find_device(list_devices(), "built-in", "input").number == 0
        assert find_device(list_devices(), "built-in", "output").number == 1

    def test_the_default_is_the_systems(self) -> None:
        assert find_device(list_devices(), None, "input").number == 0
        assert find_device(list_devices(), None, "output").number == 1

    def test_an_ambiguous_name_lists_the_candidates(self) -> None:
        with pytest.raises(DeviceError, match=r"2: USB Headset \(Fake Audio\); 3: USB Webcam"):
            find_device(list_devices(), "usb", "input")

    @pytest.mark.parametrize("wanted", ["bluetooth", "1", "99"])
    def test_no_such_device_lists_those_there_are(self, wanted: str) -> None:
        with pytest.raises(DeviceError, match=r"0: Built-in Microphone; 2: USB Headset; 3: USB Webcam"):
            find_device(list_devices(), wanted, "input")

    def test_a_machine_without_sound_is_told(self) -> None:
        with pytest.raises(DeviceError, match="there is no sound input device"):
            find_device([], None, "input")

    def test_a_machine_without_a_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        install(monkeypatch, default=(-1, -1))
        with pytest.raises(DeviceError, match="--input-device"):
            find_device(list_devices(), None, "input")

    def test_the_table_marks_the_defaults(self) -> None:
        lines = device_table(list_devices()).splitlines()
        assert len(lines) == 5
        assert "Built-in Microphone" in lines[1]
        assert lines[1].endswith("48000 Hz  input")
        assert lines[3].endswith("24000 Hz")


@pytest.mark.usefixtures("sound")
class TestMicrophone:
    def test_24_khz_is_taken_as_it_is(self) -> None:
        async def test() -> None:
            with Microphone(find_device(list_devices(), "2", "input")) as microphone:
                assert Stream.opened[0].settings["samplerate"] == SAMPLE_RATE
                assert Stream.opened[0].settings["channels"] == 1
                Stream.opened[0].capture(np.full(480, 0.5, np.float32))
                piece = await anext(microphone.pieces())
                assert piece.tolist() == [16_384] * 480
            assert Stream.opened[0].closed

        asyncio.run(test())

    @pytest.mark.parametrize(("device", "rate"), [("0", 48_000), ("3", 16_000)])
    def test_any_other_rate_is_resampled(self, device: str, rate: int) -> None:
        async def test() -> None:
            with Microphone(find_device(list_devices(), device, "input")) as microphone:
                for _ in range(50):
                    Stream.opened[0].capture(np.full(rate // 50, 0.25, np.float32))
                samples = 0
                async for piece in microphone.pieces():
                    samples += len(piece)
                    if samples > 0.95 * SAMPLE_RATE:
                        assert abs(int(piece[-1]) - 8_192) < 10
                        return

        asyncio.run(test())

    def test_a_voice_on_either_channel_is_heard(self) -> None:
        """A headset that has the voice on its right channel was silent."""

        async def test() -> None:
            with Microphone(find_device(list_devices(), "3", "input")) as microphone:
                stream = Stream.opened[0]
                times = SimpleNamespace(inputBufferAdcTime=0.98, currentTime=1.0)
                for _ in range(20):
                    stream.callback(np.tile(np.float32([0.0, 0.5]), (320, 1)), 320, times, None)
                pieces = microphone.pieces()
                samples = np.concatenate([await anext(pieces) for _ in range(10)])
                assert abs(int(samples[-1]) - 8_192) < 10, "the mean of both"

        asyncio.run(test())

    def test_what_nobody_fetches_is_dropped_from_the_old_end_and_counted(self) -> None:
        """An unbounded queue turns a stall of the loop into lag for the rest of the call."""

        async def test() -> None:
            with Microphone(find_device(list_devices(), "2", "input")) as microphone:
                for number in range(MAX_CAPTURED_PIECES + 3):
                    Stream.opened[0].capture(np.full(480, number / 1_000, np.float32))
                assert microphone.dropped_ms == 60.0
                piece = await anext(microphone.pieces())
                assert piece[0] == round(3 / 1_000 * 32_768)

        asyncio.run(test())

    def test_a_device_that_does_not_open(self) -> None:
        async def test() -> None:
            FakeSoundDevice.broken.add(2)
            with pytest.raises(DeviceError, match=r"USB Headset\) cannot be opened: Device unavailable"):
                Microphone(find_device(list_devices(), "2", "input"))

        asyncio.run(test())

    def test_an_unplugged_device_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("streaming.terminal.devices.DEAD_S", 0.01)

        async def test() -> None:
            with (
                Microphone(find_device(list_devices(), "2", "input")) as microphone,
                pytest.raises(DeviceError, match="unplugged"),
            ):
                await anext(microphone.pieces())

        asyncio.run(test())


@pytest.mark.usefixtures("sound")
class TestSpeaker:
    def test_what_has_left_is_what_was_pulled_less_the_latency(self) -> None:
        """Played positions that count what the device still holds make the model remember what nobody heard."""
        with Speaker(find_device(list_devices(), "2", "output"), max_buffer_ms=240) as speaker:
            stream = Stream.opened[0]
            speaker.play(np.full(FRAME, 1_000, np.int16))
            assert stream.wanted(240)[:, 0] == pytest.approx(1_000 / 32_768)
            assert speaker.playback().played_samples == 0
            assert speaker.playback().audible_s is not None
            stream.wanted(240)
            stream.wanted(240)
            assert speaker.playback().played_samples == 240  # the device holds 20 ms
            speaker.complete()
            for _ in range(10):
                stream.wanted(240)
            assert speaker.playback().drained
            assert speaker.playback().played_samples == FRAME
            heard = speaker.take_heard()
            assert len(heard) == 13 * 240
            assert np.count_nonzero(heard) == FRAME

    def test_a_device_at_another_rate_reports_24_khz(self) -> None:
        with Speaker(find_device(list_devices(), "1", "output"), max_buffer_ms=240) as speaker:
            stream = Stream.opened[0]
            assert stream.settings["samplerate"] == 44_100
            speaker.play(np.full(FRAME, 1_000, np.int16))
            speaker.complete()
            for _ in range(20):
                stream.wanted(441)
            assert speaker.playback().played_samples == pytest.approx(FRAME, abs=1)
            assert speaker.playback().drained

    def test_stop_is_silence_at_once_and_tells_what_was_heard(self) -> None:
        with Speaker(find_device(list_devices(), "2", "output"), max_buffer_ms=240) as speaker:
            stream = Stream.opened[0]
            speaker.play(np.full(FRAME, 1_000, np.int16))
            for _ in range(4):
                stream.wanted(240)
            assert speaker.stop() == 2 * 240
            assert not stream.wanted(240).any()
            speaker.play(np.full(FRAME, 2_000, np.int16))
            assert stream.wanted(240)[0, 0] == pytest.approx(2_000 / 32_768)
            assert speaker.playback().underruns == 0

    def test_nothing_of_an_interrupted_turn_is_in_the_next(self) -> None:
        """The resampler's memory was heard as a click, and the gaps of one turn were reported again for the next."""
        with Speaker(find_device(list_devices(), "1", "output"), max_buffer_ms=240) as speaker:
            stream = Stream.opened[0]
            for _ in range(2):
                speaker.play(np.full(2 * FRAME, 20_000, np.int16))
                stream.wanted(44_100)  # and runs dry
            assert speaker.playback().underruns == 1
            speaker.stop()
            assert speaker.playback().underruns == 0
            speaker.play(np.zeros(2 * FRAME, np.int16))
            assert not stream.wanted(4_410).any()

    def test_no_more_is_waited_for_than_the_server_sends(self) -> None:
        """What the device holds is not played yet, so the server sends so much less: a buffer that waited for the whole
        lead waited for ever.
        """
        with Speaker(find_device(list_devices(), "2", "output"), max_buffer_ms=100) as speaker:
            stream = Stream.opened[0]
            for _ in range(5):
                speaker.play(np.full(FRAME, 1_000, np.int16))  # 80 ms, and the device holds 20
                assert stream.wanted(2 * FRAME).any()
