"""Echo cancellation on an echo that is made here, and on none."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming.audio import SAMPLE_RATE, read_audio, to_float, to_int16
from streaming.errors import DeviceError
from streaming.terminal import echo
from streaming.terminal.echo import BLOCK, EchoCanceller
from tests.test_client_entry import ROOT

pytest.importorskip("livekit.rtc")
PIECE = 480


@pytest.fixture
def speech() -> NDArray[np.float32]:
    """Return nine seconds of speech."""
    return np.tile(read_audio(ROOT / "examples" / "prompt.wav"), 3)[: 9 * SAMPLE_RATE]


def conversation(
    monkeypatch: pytest.MonkeyPatch,
    near: NDArray[np.float32],
    far: NDArray[np.float32],
    sound: NDArray[np.float32],
    *,
    latency_s: float = 0.02,
    speaker_rate: int = SAMPLE_RATE,
) -> NDArray[np.int16]:
    """What is left of a microphone that hears `near` and `sound`, the echo of `far`, by a clock of the test's."""
    now = [100.0]
    monkeypatch.setattr(echo.time, "monotonic", lambda: now[0])
    canceller = EchoCanceller()
    microphone, loudspeaker = to_int16(near + sound), to_int16(far)
    left = []
    for at in range(0, len(near) - PIECE + 1, PIECE):
        for block in range(at, at + PIECE, BLOCK):
            pcm = loudspeaker[block : block + BLOCK].repeat(speaker_rate // SAMPLE_RATE)
            canceller.played(pcm, speaker_rate, now[0] + latency_s)
        left.append(canceller.clean(microphone[at : at + PIECE], now[0] - latency_s))
        now[0] += PIECE / SAMPLE_RATE
    return np.concatenate(left)


def room(far: NDArray[np.float32], delay_s: float) -> NDArray[np.float32]:
    """Return a sound half as loud, with 100 ms of reverberation."""
    rng = np.random.default_rng(0)
    answer = 0.12 * rng.standard_normal(2_400) * np.exp(-np.arange(2_400) / 400)
    answer[0] = 1.0
    echoed = 0.5 * np.convolve(far, answer)
    return np.concatenate([np.zeros(round(delay_s * SAMPLE_RATE)), echoed])[: len(far)].astype(np.float32)


@pytest.mark.parametrize("speaker_rate", [SAMPLE_RATE, 2 * SAMPLE_RATE])
def test_the_loudspeaker_is_taken_out(
    monkeypatch: pytest.MonkeyPatch, speech: NDArray[np.float32], speaker_rate: int
) -> None:
    far = speech[::-1]
    sound = room(far, 0.04)
    left = to_float(conversation(monkeypatch, np.zeros_like(far), far, sound, speaker_rate=speaker_rate))
    late = slice(4 * SAMPLE_RATE, None)
    loss_db = 10 * np.log10(np.sum(sound[late] ** 2) / np.sum(left[late] ** 2))
    assert loss_db > 25


def test_where_there_is_no_echo_the_voice_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch, speech: NDArray[np.float32]
) -> None:
    """The module shifts phases and cuts highs and lows even of a voice alone, and the machine would go on in that."""
    silence = np.zeros_like(speech)
    left = conversation(monkeypatch, speech, silence, silence)
    np.testing.assert_array_equal(left[BLOCK:], to_int16(speech)[: len(left) - BLOCK])


def test_a_voice_after_the_machine_s_is_as_it_was(monkeypatch: pytest.MonkeyPatch, speech: NDArray[np.float32]) -> None:
    far = speech[::-1].copy()
    far[4 * SAMPLE_RATE :] = 0
    near = speech.copy()
    near[: 5 * SAMPLE_RATE] = 0
    left = conversation(monkeypatch, near, far, room(far, 0.04))
    quiet = slice(5 * SAMPLE_RATE, 9 * SAMPLE_RATE - PIECE)
    np.testing.assert_array_equal(
        left[quiet.start + BLOCK : quiet.stop], to_int16(near)[quiet.start : quiet.stop - BLOCK]
    )


def test_no_sample_is_lost_in_pieces_of_any_size() -> None:
    canceller = EchoCanceller()
    left = sum(len(canceller.clean(np.zeros(n, np.int16), 0.0)) for n in (1, 239, 240, 500, 7))
    assert left == (1 + 239 + 240 + 500 + 7) // BLOCK * BLOCK


def test_a_loudspeaker_without_a_microphone_does_not_pile_up() -> None:
    canceller = EchoCanceller()
    for _ in range(1_000):
        canceller.played(np.zeros(BLOCK, np.int16), SAMPLE_RATE, 0.0)
    assert len(canceller._played) == echo.MAX_PLAYED_BLOCKS


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "livekit.rtc", None)
    with pytest.raises(DeviceError, match="pip install livekit"):
        EchoCanceller()
