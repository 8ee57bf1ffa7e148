"""Voice activity: the real model on real sounds, and what is kept between its windows."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from streaming.audio import SPEECH_WINDOW
from streaming.conversation.turn_taking import (
    SAMPLES_PER_MS,
    Listen,
    Speak,
    SpeechDetector,
    SpeechEdge,
    SpeechStarted,
    SpeechStopped,
    TurnTaker,
)
from streaming.models import voice_activity
from streaming.models.voice_activity import (
    SpeechStream,
    VoiceActivityUnavailableError,
    load_vad_model,
    speech_probabilities,
)
from streaming.protocol.messages import VadOptions

Pcm = npt.NDArray[np.float32]
W = SPEECH_WINDOW
ROOT = Path(__file__).parents[2]
PROMPT = ROOT / "examples" / "prompt.wav"


def judge(stream: SpeechStream, pcm: Pcm) -> list[float]:
    """The probabilities of the windows that these samples complete, one stream alone."""
    [probabilities] = speech_probabilities(load_vad_model(), [stream], [stream.push(pcm)])
    return probabilities


def edges(pcm: npt.NDArray[np.float64]) -> list[SpeechEdge]:
    return SpeechDetector(VadOptions()).push(judge(SpeechStream(load_vad_model()), pcm.astype(np.float32)))


def read(path: Path) -> Pcm:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / np.float32(32_768)


def seconds(s: float) -> npt.NDArray[np.float64]:
    return np.arange(round(24_000 * s)) / 24_000


def test_loading_the_model_imports_neither_silero_vad_nor_torch() -> None:
    """`import silero_vad` calls torch.set_num_threads(1): the speech model ran on one core from then on."""
    program = (
        "import sys; from streaming.models.voice_activity import load_vad_model; load_vad_model(); "
        "sys.exit(bool({'silero_vad', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("missing", ["silero_vad", "onnxruntime"])
def test_a_missing_package_is_a_typed_error_that_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server must refuse the vad session with a reason, not fail with ModuleNotFoundError."""
    if missing == "silero_vad":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(VoiceActivityUnavailableError, match=f"{missing}.*pip install"):
        load_vad_model.__wrapped__()


def test_real_speech_is_one_prompt_with_its_edges_where_the_sound_is() -> None:
    """The recording alone, between silences: one turn, nothing of its speech cut off."""
    speech, silence = read(PROMPT), np.zeros(24_000, np.float32)
    audio = np.concatenate((silence, speech, silence))
    taker, stream = TurnTaker(VadOptions()), SpeechStream(load_vad_model())
    frames = [audio[i : i + 1920] for i in range(0, len(audio), 1920)]
    actions = [action for frame in frames for action in taker.push(frame, judge(stream, frame))]

    [started] = [a for a in actions if isinstance(a, SpeechStarted)]
    [stopped] = [a for a in actions if isinstance(a, SpeechStopped)]
    prompt = np.concatenate([a.pcm for a in actions if isinstance(a, Listen)])
    assert actions[-1] == Speak()

    loud = np.flatnonzero(np.abs(audio) > 0.1 * np.abs(audio).max())  # by level alone: an independent view
    assert abs(started.at_samples - loud[0]) < 0.1 * 24_000
    assert -0.05 * 24_000 < stopped.at_samples - loud[-1] < 0.3 * 24_000
    start, stop = started.at_samples - 320 * SAMPLES_PER_MS, stopped.at_samples + 480 * SAMPLES_PER_MS
    np.testing.assert_array_equal(prompt, audio[start:stop])


def test_speech_is_found_in_noise() -> None:
    """A detector that only hears clean speech would pass the test above."""
    rng = np.random.default_rng(0)
    speech = read(PROMPT)
    noisy = np.pad(speech, 24_000) + 0.1 * speech.std() * rng.standard_normal(len(speech) + 48_000)
    assert [edge.speaking for edge in edges(noisy)] == [True, False]


@pytest.mark.parametrize(
    "sound",
    [
        pytest.param(np.zeros(96_000), id="silence"),
        pytest.param(0.01 * np.random.default_rng(1).standard_normal(96_000), id="quiet-noise"),
        pytest.param(0.3 * np.random.default_rng(2).standard_normal(96_000), id="loud-noise"),
        pytest.param(
            0.2 * np.random.default_rng(3).standard_normal(96_000) * (1 + np.sin(8 * np.pi * seconds(4))),
            id="noise-at-the-rate-of-syllables",
        ),
        pytest.param(0.3 * np.sin(2 * np.pi * 440 * seconds(4)), id="tone"),
        pytest.param(0.3 * np.sin(2 * np.pi * 880 * seconds(4)) * (seconds(4) % 1 < 0.3), id="beeps"),
        pytest.param(0.3 * np.sin(2 * np.pi * (200 + 150 * seconds(4)) * seconds(4)), id="siren"),
        pytest.param(0.8 * (np.arange(96_000) % 6_000 < 24), id="clicks"),
    ],
)
def test_sounds_that_are_not_speech_start_nothing(sound: npt.NDArray[np.float64]) -> None:
    """webrtcvad calls noise speech: the machine would never have its turn beside a fan."""
    assert edges(sound) == []


def test_streams_that_share_the_model_do_not_disturb_each_other() -> None:
    """The package's own wrapper keeps the state in the model: two sessions would hear each other's past."""
    windows = read(PROMPT)[: 60 * W].reshape(-1, W)

    def alone(stream: Pcm) -> list[float]:
        return judge(SpeechStream(load_vad_model()), stream.reshape(-1))

    streams = [windows, windows[::-1], np.zeros_like(windows), windows[20:]]
    expected = list(map(alone, streams))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(alone, streams)) == expected


def test_the_model_gets_each_window_after_the_end_of_the_last_and_its_own_state_back() -> None:
    """Without the 64 samples of context the model still runs, and is quietly worse."""
    seen = []

    class Runtime:
        def run(self, outputs: list[str], inputs: dict[str, Pcm]) -> tuple[Pcm, Pcm]:
            assert outputs == ["output", "stateN"]
            seen.append({name: array.copy() for name, array in inputs.items()})
            return np.full((1, 1), 0.25, np.float32), inputs["state"] + 1

    model = voice_activity.VoiceActivityModel(Runtime())
    state = model.init_state()
    audio = np.arange(1024, dtype=np.float32)
    for window in audio.reshape(2, 1, 512):
        assert model(window, state) == [0.25]
    np.testing.assert_array_equal(seen[0]["input"], [np.concatenate((np.zeros(64), audio[:512]))])
    np.testing.assert_array_equal(seen[1]["input"], [audio[512 - 64 :]])
    assert [(inputs["state"].shape, inputs["state"].max()) for inputs in seen] == [((2, 1, 128), 0), ((2, 1, 128), 1)]
    assert all(inputs["sr"] == 16_000 and inputs["sr"].dtype == np.int64 for inputs in seen)


def test_a_batch_gives_what_its_rows_give_alone() -> None:
    """The model's state has B in the middle, [2, B, 128]: written along another axis it mixed the rows."""
    model, rng = load_vad_model(), np.random.default_rng(0)
    batch = (0.1 * rng.standard_normal((8, 3, 512))).astype(np.float32)  # [steps, B, 512]
    together, alone = model.init_state(3), [model.init_state() for _ in range(3)]
    for step in batch:
        apart = [model(step[i : i + 1], state)[0] for i, state in enumerate(alone)]
        np.testing.assert_allclose(model(step, together), apart, rtol=1e-4, atol=1e-6)


def test_streams_that_are_judged_together_are_judged_as_alone() -> None:
    """Sessions that share a call shared a resampler's history, or the window of one counted as another's."""
    model, speech = load_vad_model(), read(PROMPT)
    streams = [SpeechStream(model) for _ in range(3)]
    inputs = [speech[:20_000], speech[30_000:], np.zeros(30_000, np.float32)]
    together: list[list[float]] = [[], [], []]
    rng = np.random.default_rng(0)
    while any(map(len, inputs)):
        sizes = rng.integers(0, 4_000, 3)
        windows = [stream.push(pcm[:size]) for stream, pcm, size in zip(streams, inputs, sizes, strict=True)]
        inputs = [pcm[size:] for pcm, size in zip(inputs, sizes, strict=True)]
        for found, new in zip(together, speech_probabilities(model, streams, windows), strict=True):
            found += new
    for found, pcm in zip(together, [speech[:20_000], speech[30_000:], np.zeros(30_000, np.float32)], strict=True):
        np.testing.assert_allclose(found, judge(SpeechStream(model), pcm), rtol=1e-3, atol=1e-5)


@functools.cache
def resampled(frequency_hz: float) -> Pcm:
    """What reaches the model, at 16 kHz, of one second of a tone at 24 kHz."""
    heard: list[Pcm] = []

    class Ear(voice_activity.VoiceActivityModel):
        def __call__(self, window: Pcm, state: voice_activity.VadState) -> Pcm:
            heard.append(window[0].copy())
            return np.zeros(1, np.float32)

    ear = Ear(None)
    stream = SpeechStream(ear)
    tone = np.sin(2 * np.pi * frequency_hz * seconds(0.96)).astype(np.float32)
    speech_probabilities(ear, [stream], [stream.push(tone)])
    return np.concatenate(heard)


@pytest.mark.parametrize("frequency_hz", [100, 1_000, 4_000])
def test_resampling_keeps_speech_across_windows(frequency_hz: float) -> None:
    """A phase swapped or a window's history lost: a click every 32 ms, heard by the model alone."""
    delay_s = 31.5 / 48_000
    expected = np.sin(2 * np.pi * frequency_hz * (np.arange(15_360) / 16_000 - delay_s))
    np.testing.assert_allclose(resampled(frequency_hz)[100:], expected[100:], atol=0.01)


@pytest.mark.parametrize("frequency_hz", [9_500, 11_000])
def test_resampling_removes_what_would_alias(frequency_hz: float) -> None:
    """Hiss above 8 kHz folded onto speech changed the verdict on 10 of 221 windows."""
    assert np.abs(resampled(frequency_hz)[100:]).max() < 0.003
