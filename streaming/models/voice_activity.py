"""Voice activity: the probability that a window of 32 ms holds speech, from Silero's model.

`VoiceActivityModel` is shared and takes windows of many streams at once; a `SpeechStream` is what it remembers of one.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streaming.audio import SPEECH_WINDOW
from streaming.errors import SnapshotError, StreamingError

Pcm = npt.NDArray[np.float32]

MODEL_WINDOW_SAMPLES = 512  # at 16 kHz, like the two below: `SPEECH_WINDOW`, resampled 3:2
MODEL_CONTEXT_SAMPLES = 64
MODEL_RATE = 16_000


class VoiceActivityUnavailableError(StreamingError):
    """Turn taking by voice was asked for and the voice activity model cannot be loaded."""

    code = "vad_unavailable"


@dataclass(frozen=True, slots=True)
class VadState:
    """The model's memory of B streams, written in place."""

    lstm: Pcm  # [2, B, 128], the layout of the model's file
    context: Pcm  # [B, 64], the end of the window before


class VoiceActivityModel:
    """Silero VAD at 16 kHz. It keeps nothing between calls, so one instance serves all sessions and threads."""

    def __init__(self, session: Any) -> None:  # an onnxruntime.InferenceSession; onnxruntime has no types
        self._session = session
        self._rate = np.array(MODEL_RATE, np.int64)

    def init_state(self, batch_size: int = 1) -> VadState:
        return VadState(
            lstm=np.zeros((2, batch_size, 128), np.float32),
            context=np.zeros((batch_size, MODEL_CONTEXT_SAMPLES), np.float32),
        )

    def __call__(self, window: Pcm, state: VadState) -> Pcm:
        """window: [B, 512] at 16 kHz, the next of each stream -> [B], the probability that it holds speech."""
        assert window.shape == (len(state.context), MODEL_WINDOW_SAMPLES), window.shape
        inputs = {"input": np.concatenate((state.context, window), axis=1), "state": state.lstm, "sr": self._rate}
        probability, lstm = self._session.run(["output", "stateN"], inputs)
        state.lstm[:] = lstm
        state.context[:] = window[:, -MODEL_CONTEXT_SAMPLES:]
        result: Pcm = probability[:, 0]
        return result


@functools.cache
def load_vad_model() -> VoiceActivityModel:
    """Return the model inside the installed `silero-vad` package, loaded by the first call (about 0.1 s).

    Raises VoiceActivityUnavailableError where `silero-vad` or `onnxruntime` is not installed.
    """
    # The package is found but never imported: its import brings in torch and calls torch.set_num_threads(1), which
    # would leave the speech model on one core.
    package = importlib.util.find_spec("silero_vad")
    try:
        if package is None or package.origin is None:
            raise ModuleNotFoundError("silero_vad is not installed")
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise VoiceActivityUnavailableError(
            f"turn taking by voice cannot start ({error}): run `pip install silero-vad onnxruntime`, "
            "or use manual turn taking"
        ) from error
    path = Path(package.origin).parent / "data" / "silero_vad.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # a window is too little work to share
    return VoiceActivityModel(
        onnxruntime.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])
    )


def _resampling_taps(taps_per_phase: int = 32, cutoff_hz: float = 7_000.0) -> Pcm:
    """[taps_per_phase + 1, 2]: maps inputs ending at 3j + 1 (24 kHz) to the outputs 2j and 2j + 1 (16 kHz).

    A windowed sinc at 48 kHz in its two phases: a delay of 0.66 ms, always the same, and 60 dB down from 9 kHz on.
    soxr serves this badly: its LQ works in blocks that hold back 2.5 to 20 ms, and its QQ does not filter, so that
    hiss above 8 kHz changed the verdict on 10 of 221 windows of speech where this changed none.
    """
    time = np.arange(2 * taps_per_phase) - (2 * taps_per_phase - 1) / 2
    low_pass = np.sinc(2 * cutoff_hz / 48_000 * time) * np.kaiser(2 * taps_per_phase, 6.0)
    low_pass *= 2 / low_pass.sum()
    taps = np.zeros((taps_per_phase + 1, 2), np.float32)
    taps[:-1, 0] = low_pass[0::2][::-1]
    taps[1:, 1] = low_pass[1::2][::-1]
    return taps


_TAPS = _resampling_taps()
_TAIL_SAMPLES = len(_TAPS) - 2
"""Inputs that the next outputs still need."""
_STATE_SIZES = (2 * 128, MODEL_CONTEXT_SAMPLES, _TAIL_SAMPLES)
MAX_STREAM_BYTES = 4 * (sum(_STATE_SIZES) + SPEECH_WINDOW - 1)
# [256, 33]: which inputs each pair of outputs is made of (a gather is 4 times as fast as a strided view here)
_ROWS = np.arange(0, SPEECH_WINDOW, 3)[:, None] + np.arange(len(_TAPS))


class SpeechStream:
    """One session's input, as far as the shared model has to remember it."""

    def __init__(self, model: VoiceActivityModel) -> None:
        self.state = model.init_state()
        self.tail: Pcm = np.zeros(_TAIL_SAMPLES, np.float32)  # of the resampler
        self._pending: Pcm = np.zeros(0, np.float32)  # less than a window

    def to_bytes(self) -> bytes:
        """Return all of this, float32."""
        parts = (self.state.lstm.ravel(), self.state.context.ravel(), self.tail, self._pending)
        return np.concatenate(parts).astype("<f4").tobytes()

    def restore(self, data: bytes) -> None:
        """Take over what `to_bytes` returned. Raises `SnapshotError` for anything else."""
        sizes = np.cumsum(_STATE_SIZES)
        if len(data) % 4 or not 4 * sizes[-1] <= len(data) <= MAX_STREAM_BYTES:
            raise SnapshotError("what voice activity remembers is damaged: it has another length")
        values = np.frombuffer(data, "<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise SnapshotError("what voice activity remembers is damaged: its numbers are not finite")
        lstm, context, self.tail, self._pending = np.split(values, sizes)
        self.state.lstm[:], self.state.context[:] = lstm.reshape(2, 1, 128), context

    def push(self, pcm: Pcm) -> Pcm:
        """Return the windows that these samples complete, [n, 768]. pcm: [any length] float32 at 24 kHz."""
        assert pcm.dtype == np.float32, pcm.dtype
        pending = np.concatenate((self._pending, pcm))
        whole = len(pending) - len(pending) % SPEECH_WINDOW
        self._pending = pending[whole:]
        return pending[:whole].reshape(-1, SPEECH_WINDOW)


def speech_probabilities(
    model: VoiceActivityModel, streams: Sequence[SpeechStream], windows: Sequence[Pcm]
) -> list[list[float]]:
    """Return the probability that each window holds speech, stream by stream; no stream may be named twice.

    windows: of each stream the next ones, [n, 768]. The model runs as often as the longest of them has windows.
    """
    probabilities: list[list[float]] = [[] for _ in streams]
    for number in range(max(map(len, windows), default=0)):
        rows = [row for row, its in enumerate(windows) if len(its) > number]
        joined = np.stack([np.concatenate((streams[row].tail, windows[row][number])) for row in rows])
        state = VadState(
            np.concatenate([streams[row].state.lstm for row in rows], axis=1),
            np.concatenate([streams[row].state.context for row in rows]),
        )
        resampled = joined.take(_ROWS, axis=1) @ _TAPS  # [B, 256, 2]
        found = model(resampled.reshape(len(rows), MODEL_WINDOW_SAMPLES), state)
        for place, row in enumerate(rows):
            stream = streams[row]
            stream.tail = joined[place, -_TAIL_SAMPLES:]
            stream.state.lstm[:] = state.lstm[:, place : place + 1]
            stream.state.context[:] = state.context[place : place + 1]
            probabilities[row].append(float(found[place]))
    return probabilities
