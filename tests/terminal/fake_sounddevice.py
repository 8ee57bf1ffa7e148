"""A stand-in for the `sounddevice` module: a few devices, and streams whose callbacks the test calls itself."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

DEVICES = [
    ("Built-in Microphone", 1, 0, 48_000.0),
    ("Built-in Speakers", 0, 2, 44_100.0),
    ("USB Headset", 2, 2, 24_000.0),
    ("USB Webcam", 2, 0, 16_000.0),
]


class PortAudioError(Exception):
    pass


class Stream:
    """Keep what it was opened with. The test plays PortAudio's thread, or has one of its own if the fake is live."""

    is_input = False
    opened: ClassVar[list[Stream]] = []

    def __init__(self, *, callback: Callable[..., None], **settings: Any) -> None:
        if settings["device"] in FakeSoundDevice.broken:
            raise PortAudioError("Device unavailable")
        self.callback = callback
        self.settings = settings
        self.latency = 0.02
        self.closed = False
        Stream.opened.append(self)

    def start(self) -> None:
        if FakeSoundDevice.live:
            threading.Thread(target=self._play_portaudio, daemon=True).start()

    def _play_portaudio(self) -> None:
        n = self.settings["blocksize"]
        while not self.closed:
            time.sleep(n / self.settings["samplerate"])
            with contextlib.suppress(RuntimeError):  # the loop ended between the look and the call
                if self.is_input:
                    self.capture(np.full(n, 0.1, np.float32))
                else:
                    self.wanted(n)

    def close(self) -> None:
        self.closed = True

    def capture(self, samples: NDArray[np.float32]) -> None:
        block = np.repeat(samples[:, None], self.settings["channels"], axis=1)
        self.callback(block, len(block), SimpleNamespace(inputBufferAdcTime=0.98, currentTime=1.0), None)
        block[:] = 9.0  # PortAudio uses the memory again

    def wanted(self, samples: int) -> NDArray[np.float32]:
        block = np.full((samples, self.settings["channels"]), np.nan, np.float32)
        self.callback(block, samples, SimpleNamespace(outputBufferDacTime=1.02, currentTime=1.0), None)
        return block


class InputStream(Stream):
    is_input = True


class FakeSoundDevice(ModuleType):
    """Only what `devices.py` may use."""

    broken: ClassVar[set[int]] = set()
    live: ClassVar[bool] = False
    PortAudioError = PortAudioError
    InputStream = InputStream
    OutputStream = Stream

    def __init__(self, default: tuple[int, int] = (0, 1)) -> None:
        super().__init__("sounddevice")
        self.default = SimpleNamespace(device=default)

    def query_hostapis(self) -> list[dict[str, Any]]:
        return [{"name": "Fake Audio"}]

    def query_devices(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "hostapi": 0,
                "max_input_channels": inputs,
                "max_output_channels": outputs,
                "default_samplerate": rate,
            }
            for name, inputs, outputs, rate in DEVICES
        ]

    def check_input_settings(self, *, device: int, channels: int, dtype: str, samplerate: float) -> None:
        self._check(device, channels, samplerate, DEVICES[device][1])

    def check_output_settings(self, *, device: int, channels: int, dtype: str, samplerate: float) -> None:
        self._check(device, channels, samplerate, DEVICES[device][2])

    def _check(self, device: int, channels: int, samplerate: float, most: int) -> None:
        rate = DEVICES[device][3]
        if samplerate != rate:
            raise PortAudioError("Invalid sample rate")
        # The webcam refuses mono, as some drivers do.
        if channels > most or (device == 3 and channels == 1):
            raise PortAudioError("Invalid number of channels")


def install(
    monkeypatch: pytest.MonkeyPatch, default: tuple[int, int] = (0, 1), *, live: bool = False
) -> FakeSoundDevice:
    """Make `import sounddevice` find a fresh fake, whose streams run by themselves if it is live."""
    FakeSoundDevice.live = live
    fake = FakeSoundDevice(default)
    Stream.opened.clear()
    FakeSoundDevice.broken.clear()
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return fake
