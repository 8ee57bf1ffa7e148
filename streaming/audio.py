"""PCM as values: conversion, framing, resampling, files in any format, WAV files out.

Everything inside this project is 24 kHz mono, float32 in [-1, 1) or int16; one frame is 1,920 samples (80 ms).
Only numpy is needed to import this module; `soundfile` and `soxr` are loaded by the functions that use them.
"""

from __future__ import annotations

import contextlib
import math
import os
import wave
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from streaming.errors import AudioError

if TYPE_CHECKING:
    import soxr

SAMPLE_RATE = 24_000
"""Samples a second, everywhere."""
FRAME = 1_920
"""Samples in one frame."""
FRAME_RATE = 12.5
"""Frames a second."""
SPEECH_WINDOW = 768
"""Samples whose probability of speech is judged at a time: 32 ms."""
FRAME_MS = 1000 * FRAME / SAMPLE_RATE
"""The length of a frame, which is the time for a step."""
SILENCE_DBFS = -96.0
"""The level of silence by `level_dbfs`: the floor of 16 bits."""

Pcm16 = NDArray[np.int16]
Samples = NDArray[np.float32]
Pcm = Pcm16 | Samples
Quality = Literal["QQ", "LQ", "MQ", "HQ", "VHQ"]
S = TypeVar("S", np.int16, np.float32)

_MAX_WAV_BYTES = 2**32 - 64
_LOUDEST = 32_767 / 32_768
_UNIT = np.float32(1 / 32_768)


def to_int16(pcm: Pcm) -> Pcm16:
    """float32 [...] of full scale 1.0 as int16 [...], rounded and clipped; NaN is silence. int16 stays as it is."""
    if pcm.dtype == np.int16:
        return pcm  # type: ignore[return-value]
    # Clipped before scaling: a huge sample would overflow. Scaling by a power of two is exact, so the order is free.
    scaled = np.minimum(np.maximum(pcm, -1.0), _LOUDEST)
    scaled *= 32_768.0
    np.rint(scaled, out=scaled)
    scaled[np.isnan(scaled)] = 0.0
    return scaled.astype(np.int16)


def to_float(pcm: Pcm) -> Samples:
    """int16 [...] as float32 [...] in [-1, 1). float32 is returned as it is."""
    if pcm.dtype == np.float32:
        return pcm  # type: ignore[return-value]
    assert pcm.dtype == np.int16, f"16-bit integer or 32-bit float samples, got {pcm.dtype}"
    return np.multiply(pcm, _UNIT, dtype=np.float32)  # exact: by a power of two


def level_dbfs(pcm: Pcm) -> float:
    """Root mean square of pcm [n] against full scale, in dB; -96 for silence, and for n = 0. A full sine has -3."""
    if pcm.size == 0:
        return SILENCE_DBFS
    samples = to_float(pcm).astype(np.float64)
    power = float(np.mean(np.square(np.nan_to_num(np.clip(samples, -1.0, 1.0)))))
    return max(SILENCE_DBFS, 10.0 * math.log10(power)) if power > 0 else SILENCE_DBFS


class Framer(Generic[S]):
    """Pieces of any size in, whole frames out.

    `Framer(np.float32)` gives float32 frames and `Framer(np.int16)` int16 ones; either takes pieces of both kinds. It
    holds less than one frame.
    """

    def __init__(self, dtype: type[S]) -> None:
        self._dtype: type[S] = dtype
        self._rest: NDArray[S] = np.zeros(0, dtype)

    @property
    def pending_samples(self) -> int:
        """Samples that wait for their frame to fill: 0 to FRAME - 1."""
        return len(self._rest)

    def push(self, pcm: Pcm) -> NDArray[S]:
        """pcm [n] of int16 or float32 -> the frames that it completes [k, FRAME], k >= 0."""
        assert pcm.ndim == 1
        piece: Any = to_int16(pcm) if self._dtype is np.int16 else to_float(pcm)
        if len(piece) == FRAME and not len(self._rest):  # most pieces are whole frames
            frame: Any = piece.copy() if piece is pcm else piece
            whole_frame: NDArray[S] = frame.reshape(1, FRAME)
            return whole_frame
        joined = np.concatenate([self._rest, piece])
        whole = len(joined) // FRAME * FRAME
        self._rest = joined[whole:].copy()
        return joined[:whole].reshape(-1, FRAME)

    def flush(self) -> NDArray[S]:
        """Return the samples of the last frame, which is not whole: [n], 0 <= n < FRAME. The framer is empty then."""
        rest, self._rest = self._rest, self._rest[:0]
        return rest


_LEAST_RATE, _MOST_RATE = 1_000, 768_000
"""The least rate of files. At 1 Hz a file of 8 KB would become an hour of speech, 400 MB."""


class Resampler:
    """Streaming change of rate; nothing at all when the rates are equal.

    Delay at 48 -> 24 kHz, in 20 ms pieces: "LQ" holds back about a millisecond and is flat to 9 kHz, which is what live
    speech wants; "HQ" holds back another piece and is flat to 11 kHz, which is what files want.

    Raises `AudioError` where `soxr` is missing and the rates differ.
    """

    def __init__(self, rate_in: float, rate_out: float = SAMPLE_RATE, quality: Quality = "HQ") -> None:
        assert min(rate_in, rate_out) > 0
        self._stream: soxr.ResampleStream | None = None
        if rate_in != rate_out:
            try:
                from soxr import ResampleStream
            except ImportError:
                raise AudioError(
                    f"{rate_in:g} Hz audio has to be resampled to {rate_out:g} Hz: `pip install soxr`"
                ) from None
            self._stream = ResampleStream(rate_in, rate_out, 1, dtype="float32", quality=quality)

    def push(self, samples: Samples) -> Samples:
        """samples float32 [n] -> float32 [m], m about n * rate_out / rate_in, possibly 0 at first."""
        return self._run(samples, last=False)

    def flush(self) -> Samples:
        """Return what is still held back, float32 [m]. The resampler is then as new."""
        rest = self._run(np.zeros(0, np.float32), last=True)
        if self._stream is not None:
            self._stream.clear()
        return rest

    def _run(self, samples: Samples, *, last: bool) -> Samples:
        assert samples.dtype == np.float32
        if self._stream is None:
            return samples
        resampled: Samples = self._stream.resample_chunk(np.ascontiguousarray(samples), last=last)
        return resampled


class RecordingResampler:
    """Change of a recording's rate, in pieces of any sizes: what `torchaudio.transforms.Resample` makes of the whole.

    The published script resamples its prompts so, and other filters give other codes (2 % of them from 16 kHz with
    soxr's). The taps are torchaudio's defaults, a sinc of 6 zero crossings under a Hann window with a roll-off of 0.99;
    only those that are not zero are kept, so that any two rates will do. Microphones have `Resampler`: its filters are
    better, and a whole file in hand has no need to be quick.
    """

    _CROSSINGS, _ROLLOFF = 6, 0.99

    def __init__(self, rate_in: int, rate_out: int = SAMPLE_RATE) -> None:
        assert min(rate_in, rate_out) > 0
        divisor = math.gcd(rate_in, rate_out)
        self._in, self._out = rate_in // divisor, rate_out // divisor
        base = min(self._in, self._out) * self._ROLLOFF
        self._width = math.ceil(self._CROSSINGS * self._in / base)  # samples to either side that a tap may stand on
        phase = np.arange(self._out)
        self._first = phase * self._in // self._out  # of a phase's taps, counted from `width` samples before its block
        place = self._first[:, None] + np.arange(2 * self._width + 2) - self._width  # [out, taps]
        # torchaudio divides whole numbers in float32 here, and goes on in float64
        time = (-phase / self._out).astype(np.float32).astype(np.float64)[:, None] + place / self._in
        time = np.clip(time * base, -self._CROSSINGS, self._CROSSINGS)
        window = np.cos(time * math.pi / self._CROSSINGS / 2) ** 2
        taps = np.sinc(time) * window * (base / self._in)
        self._taps = taps.astype(np.float32).astype(np.float64)
        self.clear()

    def clear(self) -> None:
        """Make the resampler as new."""
        self._held = np.zeros(self._width)  # the input from the first sample that the next output needs
        self._held_from = 0  # the position of that sample, counted from `width` samples before the recording
        self._given = self._made = 0

    def push(self, samples: Samples) -> Samples:
        """samples float32 [n] -> float32 [m], all that can be said without the samples to come."""
        assert samples.dtype == np.float32 and samples.ndim == 1
        if self._in == self._out:
            return samples
        self._given += len(samples)
        return self._run(samples, np.iinfo(np.int64).max)

    def flush(self) -> Samples:
        """Return the end of the recording, float32 [m]. The resampler is then as new."""
        if self._in == self._out:
            return np.zeros(0, np.float32)
        # torchaudio rounds this quotient to float32 before it rounds it up
        whole = math.ceil(np.float32(self._out * self._given / self._in))
        rest = self._run(np.zeros(self._width + self._in + 1, np.float32), whole)
        self.clear()
        return rest

    def _run(self, samples: Samples, most: int) -> Samples:
        self._held = np.concatenate((self._held, samples))
        end = self._held_from + len(self._held) - self._taps.shape[1]  # the last place where taps may begin
        # Output k * out + p begins at k * in + first[p], which is (k * out + p) * in // out.
        ready = min((end * self._out + self._out - 1) // self._in + 1 if end >= 0 else 0, most)
        outputs = np.arange(self._made, max(ready, self._made))
        made = [np.zeros(0, np.float32)]
        for part in np.array_split(outputs, -(-len(outputs) // 16_384)) if len(outputs) else ():
            starts = part * self._in // self._out - self._held_from
            windows = np.lib.stride_tricks.sliding_window_view(self._held, self._taps.shape[1])[starts]
            made.append(np.einsum("nt,nt->n", windows, self._taps[part % self._out]).astype(np.float32))
        self._made += len(outputs)
        keep_from = self._made * self._in // self._out
        self._held = self._held[keep_from - self._held_from :].copy()
        self._held_from = keep_from
        return np.concatenate(made)


class AudioReader:
    """An audio file of any rate, channel count and format that soundfile reads, as 24 kHz mono blocks.

        with AudioReader("speech.flac") as reader:
            for block in reader.blocks():  # float32 [about 2,400]
                ...

    Channels are mixed down by their mean; samples that are not numbers are silence. Other rates are changed as the
    published script changes them.

    Raises `AudioError`, with the path in its message, if the file is missing, not audio, or empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import soundfile
        except (ImportError, OSError):  # OSError: the package is there and libsndfile is not
            raise AudioError("audio files are read with soundfile: `pip install soundfile`") from None
        self.path = Path(path)
        self._sound_file_error: type[Exception] = soundfile.SoundFileError
        if not self.path.exists():
            raise AudioError(f"{self.path}: no such file")
        if not self.path.is_file():
            raise AudioError(f"{self.path}: not a file")
        if not os.access(self.path, os.R_OK):
            raise AudioError(f"{self.path}: cannot be read (permission denied)")
        try:
            self._file = soundfile.SoundFile(self.path)
        except (soundfile.SoundFileError, TypeError):  # TypeError: a name that means headerless audio, such as x.raw
            raise AudioError(
                f"{self.path}: not an audio file that can be read (WAV, FLAC, OGG, MP3, AIFF and others can)"
            ) from None
        if not _LEAST_RATE <= self._file.samplerate <= _MOST_RATE:
            self.close()
            raise AudioError(f"{self.path}: {self._file.samplerate} Hz is not a sample rate of audio")
        if self._file.frames == 0:
            self.close()
            raise AudioError(f"{self.path}: the file holds no audio")

    @property
    def seconds(self) -> float:
        """Length, as the file's header has it."""
        return float(self._file.frames / self._file.samplerate)

    @property
    def sixteen_bits(self) -> bool:
        """Return whether 16 bits hold all that `blocks` gives: 24 kHz mono in such a format."""
        file = self._file
        return (file.samplerate, file.channels, file.subtype) == (SAMPLE_RATE, 1, "PCM_16")

    def blocks(self) -> Iterator[Samples]:
        """float32 [n] at 24 kHz mono, n about 2,400; all blocks in order are the file.

        Raises `AudioError` when the file turns out to be damaged.
        """
        resampler = RecordingResampler(self._file.samplerate)
        block_frames = max(1, self._file.samplerate // 10)
        while True:
            try:
                block = self._file.read(block_frames, dtype="float32", always_2d=True)
            except self._sound_file_error as error:
                raise AudioError(f"{self.path}: damaged audio ({error})") from None
            if len(block) == 0:
                break
            mono = np.nan_to_num(block, nan=0.0, posinf=1.0, neginf=-1.0).mean(axis=1, dtype=np.float64)
            samples = resampler.push(mono.astype(np.float32))
            if len(samples):
                yield samples
        rest = resampler.flush()
        if len(rest):
            yield rest

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_audio(path: str | os.PathLike[str]) -> Samples:
    """Return a whole file as float32 [n], 24 kHz mono. Raises `AudioError` as `AudioReader` does."""
    with AudioReader(path) as reader:
        return np.concatenate([np.zeros(0, np.float32), *reader.blocks()])


class WavWriter:
    """A 24 kHz 16-bit WAV that appears under its name only when it is whole.

        with WavWriter("out.wav") as wav:
            wav.write(pcm)  # int16 or float32, [n], or [n, channels]

    It is written under a temporary name beside its own and renamed by `close`, which the `with` statement calls; if the
    statement is left by an exception, `discard` leaves nothing behind, and an older file of that name stays as it was.

    Raises `AudioError` if the directory is missing or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int = 1) -> None:
        assert channels >= 1
        self.path = Path(path)
        self.samples = 0
        self._channels = channels
        target = Path(os.path.realpath(self.path))  # a link stays a link to the file
        if target.exists() and not target.is_file():
            raise AudioError(f"{self.path}: not a file that can be replaced")
        if not target.parent.is_dir():
            raise AudioError(f"{self.path}: there is no directory {target.parent}")
        self._target = target
        self._partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            self._handle = open(self._partial, "wb")  # noqa: SIM115  (held by this object, closed in close or discard)
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be written ({error.strerror})") from None
        self._wave = wave.open(self._handle, "wb")  # noqa: SIM115
        self._wave.setnchannels(channels)
        self._wave.setsampwidth(2)
        self._wave.setframerate(SAMPLE_RATE)
        self._open = True

    def write(self, pcm: Pcm) -> None:
        """pcm [n] of a mono file, or [n, channels]. Raises `AudioError` when the disk or the format is full."""
        assert self._open
        shape = (-1,) if self._channels == 1 else (-1, self._channels)
        assert pcm.shape == pcm.reshape(shape).shape
        data = to_int16(pcm).astype("<i2", copy=False).tobytes()
        if 2 * self._channels * self.samples + len(data) > _MAX_WAV_BYTES:
            raise AudioError(f"{self.path}: a WAV file cannot hold more than 4 GiB")
        try:
            self._wave.writeframesraw(data)
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be written ({error.strerror})") from None
        self.samples += len(pcm)

    def close(self) -> None:
        """Complete the file and give it its name. A second call does nothing."""
        if not self._open:
            return
        try:
            self._wave.writeframes(b"")  # brings the header up to date
            self._wave.close()
            self._handle.close()
            os.replace(self._partial, self._target)
        except OSError as error:
            self.discard()
            raise AudioError(f"{self.path}: cannot be written ({error.strerror})") from None
        self._open = False

    def discard(self) -> None:
        """Throw away what was written; nothing appears under the name. After `close` it does nothing."""
        if not self._open:
            return
        self._open = False
        with contextlib.suppress(OSError):  # even on a full disk the temporary file is deleted
            self._wave.close()
        with contextlib.suppress(OSError):
            self._handle.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.discard()
