"""Sound devices: which there are, and a microphone and a loudspeaker that speak 24 kHz mono whatever the device does.

`sounddevice` and PortAudio are loaded when a device is asked for, never before. A device is opened at 24 kHz where it
takes that, otherwise at its own rate through the streaming resampler.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from streaming.audio import SAMPLE_RATE, Pcm16, Resampler, to_float, to_int16
from streaming.errors import DeviceError
from streaming.terminal.echo import EchoCanceller
from streaming.terminal.jitter_buffer import START_MS, JitterBuffer
from streaming.terminal.loudspeaker import MAX_HEARD_BLOCKS, LoudspeakerState

PIECE_MS = 20
"""The microphone hands over so much at a time."""
MAX_CAPTURED_PIECES = 100
"""Pieces that wait for the event loop, 2 s. Past it the oldest are dropped and counted: late speech helps nobody."""
SPEAKER_BLOCK_MS = 10
DEAD_S = 5.0
"""A microphone that delivers nothing for so long is gone."""

_NUMBERS = (0, 3, 4, 5)
"""Columns of the device table that are aligned to the right."""

Direction = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Device:
    """One entry of PortAudio's list, where `number` is its place."""

    number: int
    name: str
    host_api: str
    input_channels: int
    output_channels: int
    default_rate: float
    default_input: bool
    default_output: bool

    def channels(self, direction: Direction) -> int:
        return self.input_channels if direction == "input" else self.output_channels

    def default(self, direction: Direction) -> bool:
        return self.default_input if direction == "input" else self.default_output


def load_sounddevice() -> ModuleType:
    """Return the `sounddevice` module. Raises `DeviceError` that says how to install what is missing."""
    try:
        import sounddevice
    except ImportError:
        raise DeviceError("a microphone needs the Python package: `pip install sounddevice`") from None
    except OSError:
        raise DeviceError(
            "PortAudio is missing: `sudo apt install libportaudio2` on Debian and Ubuntu, `sudo dnf install portaudio` "
            "on Fedora, `brew install portaudio` on macOS; or stream a file with --input"
        ) from None
    module: ModuleType = sounddevice
    return module


def list_devices() -> list[Device]:
    """Return all devices, in PortAudio's order. Raises `DeviceError` without PortAudio, or if it cannot tell."""
    sd = load_sounddevice()
    try:
        hosts = sd.query_hostapis()
        default_input, default_output = sd.default.device
        return [
            Device(
                number=number,
                name=str(info["name"]),
                host_api=str(hosts[info["hostapi"]]["name"]),
                input_channels=int(info["max_input_channels"]),
                output_channels=int(info["max_output_channels"]),
                default_rate=float(info["default_samplerate"]),
                default_input=number == default_input,
                default_output=number == default_output,
            )
            for number, info in enumerate(sd.query_devices())
        ]
    except sd.PortAudioError as error:
        raise DeviceError(f"the sound devices cannot be listed: {error}") from None


def find_device(devices: list[Device], wanted: str | None, direction: Direction) -> Device:
    """Return the device by its number, by any part of its name in any case, or the default one for None.

    Raises `DeviceError`, listing the candidates, when none or several fit.
    """
    usable = [device for device in devices if device.channels(direction)]
    if not usable:
        raise DeviceError(f"there is no sound {direction} device; stream a file with --input")
    choices = "; ".join(f"{device.number}: {device.name}" for device in usable)
    if wanted is None:
        for device in usable:
            if device.default(direction):
                return device
        raise DeviceError(f"no default {direction} device; choose one with --{direction}-device: {choices}")
    if wanted.strip().isdecimal():
        fitting = [device for device in usable if device.number == int(wanted)]
    else:
        part = wanted.strip().casefold()
        fitting = [device for device in usable if device.name.casefold() == part]
        fitting = fitting or [device for device in usable if part in device.name.casefold()]
    if not fitting:
        raise DeviceError(f"no {direction} device {wanted!r}; there are: {choices}")
    if len(fitting) > 1:
        several = "; ".join(f"{device.number}: {device.name} ({device.host_api})" for device in fitting)
        raise DeviceError(f"several {direction} devices fit {wanted!r}, choose by number: {several}")
    return fitting[0]


def device_table(devices: list[Device]) -> str:
    """Return the list for a person, with the defaults marked. Names come whole: by its name a device is chosen."""
    rows = [("#", "name", "host", "in", "out", "rate", "default")]
    for device in devices:
        defaults = [
            name for name, is_it in (("input", device.default_input), ("output", device.default_output)) if is_it
        ]
        rows.append(
            (
                str(device.number),
                device.name,
                device.host_api,
                str(device.input_channels),
                str(device.output_channels),
                f"{device.default_rate:g} Hz",
                " and ".join(defaults),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _choose_format(sd: ModuleType, device: Device, direction: Direction) -> tuple[int, int]:
    """Return the rate and channel count to open the device with, 24 kHz mono if it takes that. Raises `DeviceError`."""
    check = sd.check_input_settings if direction == "input" else sd.check_output_settings
    reason: Exception | None = None
    for rate in (SAMPLE_RATE, round(device.default_rate)):
        for channels in dict.fromkeys((1, min(2, device.channels(direction)))):
            try:
                check(device=device.number, channels=channels, dtype="float32", samplerate=rate)
            except (sd.PortAudioError, ValueError) as error:
                reason = error
            else:
                return rate, channels
    raise _cannot_open(device, reason)


class Microphone:
    """An open microphone: `async for piece in microphone.pieces()`. Raises `DeviceError` if it does not open.

    echo: what takes the loudspeaker's sound out of it.
    """

    def __init__(self, device: Device, echo: EchoCanceller | None = None) -> None:
        sd = load_sounddevice()
        rate, channels = _choose_format(sd, device, "input")
        self.rate = rate
        self._device = device
        self._dropped_samples = 0
        self._resampler = Resampler(rate, quality="LQ")
        self._echo = echo
        self._captured: deque[tuple[NDArray[np.float32], float]] = deque(maxlen=MAX_CAPTURED_PIECES)
        self._ready = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._stream = _open_stream(sd, sd.InputStream, device, rate, channels, PIECE_MS, self._on_captured)
        self._latency_s = float(self._stream.latency)
        _start_stream(sd, self._stream, device)

    @property
    def dropped_ms(self) -> float:
        """Return how much was captured and not fetched in time, all in all."""
        return 1000 * self._dropped_samples / self.rate

    async def pieces(self) -> AsyncIterator[Pcm16]:
        """int16 [about 480] at 24 kHz, as the device delivers them. Raises `DeviceError` when it delivers no more."""
        while True:
            try:
                # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with a piece, and the
                # client never ended.
                async with asyncio.timeout(DEAD_S):
                    await self._ready.wait()
            except TimeoutError:
                raise DeviceError(f"{self._device.name} has gone silent; was it unplugged?") from None
            self._ready.clear()
            while self._captured:
                block, captured_s = self._captured.popleft()
                pcm = to_int16(self._resampler.push(block.mean(axis=1, dtype=np.float32)))
                if self._echo is not None:
                    pcm = self._echo.clean(pcm, captured_s)
                if len(pcm):
                    yield pcm

    def close(self) -> None:
        self._stream.close()

    def _on_captured(self, block: NDArray[np.float32], samples: int, times: Any, _status: Any) -> None:
        # PortAudio's thread: copy, count, wake; nothing else.
        if len(self._captured) == MAX_CAPTURED_PIECES:
            self._dropped_samples += samples
        age_s = _between(times.inputBufferAdcTime, times.currentTime, self._latency_s)
        self._captured.append((block.copy(), time.monotonic() - age_s))
        self._loop.call_soon_threadsafe(self._ready.set)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Speaker:
    """An open loudspeaker with a jitter buffer, a `Loudspeaker`. Raises `DeviceError` if it does not open.

    The buffer holds samples at the device's rate; what is reported is converted to 24 kHz, rounded down. echo: is told
    what is played, and when it is heard.
    """

    def __init__(self, device: Device, *, max_buffer_ms: int, echo: EchoCanceller | None = None) -> None:
        sd = load_sounddevice()
        rate, channels = _choose_format(sd, device, "output")
        self.rate = rate
        self._lock = threading.Lock()
        self._to_device = Resampler(SAMPLE_RATE, rate, quality="LQ")
        self._from_device = Resampler(rate, SAMPLE_RATE)
        self._handed_out: deque[Pcm16] = deque(maxlen=MAX_HEARD_BLOCKS)
        self._audible_s: float | None = None
        self._underruns_before = 0
        self._stream = _open_stream(sd, sd.OutputStream, device, rate, channels, SPEAKER_BLOCK_MS, self._on_wanted)
        self._echo = echo
        self._latency_s = latency_s = float(self._stream.latency)
        self._buffer = JitterBuffer(
            sample_rate=rate,
            max_ms=max(START_MS, max_buffer_ms - round(1000 * latency_s)),
            latency_samples=round(latency_s * rate),
        )
        _start_stream(sd, self._stream, device)

    def play(self, pcm: Pcm16) -> None:
        device_pcm = to_int16(self._to_device.push(to_float(pcm)))
        with self._lock:
            self._buffer.push(device_pcm)

    def complete(self) -> None:
        rest = to_int16(self._to_device.flush())
        with self._lock:
            self._buffer.push(rest)
            self._buffer.complete()

    def playback(self) -> LoudspeakerState:
        with self._lock:
            buffer = self._buffer
            return LoudspeakerState(
                buffer.played_samples * SAMPLE_RATE // self.rate,
                1000 * buffer.buffered_samples / self.rate,
                buffer.underruns - self._underruns_before,
                self._audible_s,
                buffer.drained,
            )

    def stop(self) -> int:
        self._to_device.flush()
        with self._lock:
            self._audible_s = None
            self._underruns_before = self._buffer.underruns
            return self._buffer.flush() * SAMPLE_RATE // self.rate

    def take_heard(self) -> Pcm16:
        blocks = [self._handed_out.popleft() for _ in range(len(self._handed_out))]
        return to_int16(self._from_device.push(to_float(np.concatenate([np.zeros(0, np.int16), *blocks]))))

    def close(self) -> None:
        self._stream.close()

    def _on_wanted(self, block: NDArray[np.float32], samples: int, times: Any, _status: Any) -> None:
        # PortAudio's thread: copy and note the time; nothing else.
        with self._lock:
            silent = self._buffer.pulled_samples == 0
            pcm = self._buffer.pull(samples)
            audible_s = time.monotonic() + _between(times.currentTime, times.outputBufferDacTime, self._latency_s)
            if silent and self._buffer.pulled_samples:
                self._audible_s = audible_s
        if self._echo is not None:
            self._echo.played(pcm, self.rate, audible_s)
        self._handed_out.append(pcm)
        block[:] = to_float(pcm)[:, None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _between(earlier_s: float, later_s: float, latency_s: float) -> float:
    """Return the seconds between two times of PortAudio's clock; the stream's latency where its driver does not tell
    them.
    """
    told = earlier_s > 0 and later_s > 0
    return max(0.0, float(later_s) - float(earlier_s)) if told else latency_s


def _open_stream(
    sd: ModuleType, kind: Any, device: Device, rate: int, channels: int, block_ms: int, callback: Callable[..., None]
) -> Any:
    """Return a stream of this kind, not yet started: its latency is known before its first callback."""
    try:
        return kind(
            device=device.number,
            samplerate=rate,
            channels=channels,
            dtype="float32",
            latency="low",
            blocksize=rate * block_ms // 1000,
            callback=callback,
        )
    except sd.PortAudioError as error:
        raise _cannot_open(device, error) from None


def _start_stream(sd: ModuleType, stream: Any, device: Device) -> None:
    try:
        stream.start()
    except sd.PortAudioError as error:
        stream.close()
        raise _cannot_open(device, error) from None


def _cannot_open(device: Device, reason: object) -> DeviceError:
    return DeviceError(f"sound device {device.number} ({device.name}) cannot be opened: {reason}")
