"""Judges of speech that work offline, each as one function of a waveform. They are loaded when first asked.

Waveforms are float32 [N], 24 kHz mono.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from recipes.demo import features, sequences
from streaming.audio import SAMPLE_RATE

Wave = NDArray[np.float32]
_JUDGES_RATE = 16_000


def _at_16k(pcm: Wave) -> Wave:
    return np.asarray(soxr.resample(pcm, SAMPLE_RATE, _JUDGES_RATE), np.float32).clip(-1, 1)


def intelligibility(reference: Wave, made: Wave) -> float:
    """STOI, 0 to 1: how far the made envelope follows the reference's (Taal et al. 2011)."""
    from pystoi import stoi

    return float(stoi(reference, made, SAMPLE_RATE))


def quality(pcm: Wave) -> float:
    """DNSMOS P.835, overall: what listeners would say of it, 1 to 5 (Reddy et al. 2022)."""
    from speechmos import dnsmos

    return float(dnsmos.run(_at_16k(pcm), _JUDGES_RATE)["ovrl_mos"])


@cache
def _recogniser() -> Any:
    from pocketsphinx import Decoder

    return Decoder(samprate=_JUDGES_RATE, loglevel="FATAL")


def _recognised(pcm: Wave) -> Any:
    decoder = _recogniser()
    decoder.start_utt()
    decoder.process_raw((_at_16k(pcm) * 32767).astype("<i2").tobytes(), full_utt=True)
    decoder.end_utt()
    return decoder


def words(pcm: Wave) -> list[str]:
    """What PocketSphinx understands."""
    decoder = _recognised(pcm)
    return decoder.hyp().hypstr.split() if decoder.hyp() else []


@cache
def _closed(kinds: tuple[str, ...]) -> Any:
    """A recogniser of nothing but the items of these kinds, one after the other.

    With the defaults it hears words in pauses; these settings leave 0.1 to 0.14 word errors in synthetic counting.
    """
    from pocketsphinx import Decoder

    items = [sequences.words_of([item]) for item in sequences.ITEMS if item.kind in kinds]
    choices = " | ".join(sorted({" ".join(words) for words in items}))
    decoder = Decoder(
        samprate=_JUDGES_RATE, loglevel="FATAL", lm=None, silprob=0.8, wip=1e-3, beam=1e-40, wbeam=1e-24, bestpath=False
    )
    decoder.add_word("baa(2)", "B AE", True)  # its dictionary spells it, B A A
    decoder.add_jsgf_string("items", f"#JSGF V1.0; grammar items; public <items> = ( {choices} )+ ;")
    decoder.activate_search("items")
    return decoder


def recited(pcm: Wave, *kinds: str) -> list[str]:
    """What PocketSphinx understands of items of these kinds, word by word."""
    decoder = _closed(kinds)
    decoder.start_utt()
    decoder.process_raw((_at_16k(pcm) * 32767).astype("<i2").tobytes(), full_utt=True)
    decoder.end_utt()
    return decoder.hyp().hypstr.split() if decoder.hyp() else []


def word_starts(pcm: Wave) -> list[int]:
    """Where PocketSphinx hears words and silences begin, in samples; the first is left out."""
    return [segment.start_frame * SAMPLE_RATE // 100 for segment in _recognised(pcm).seg()][1:]


def word_errors(reference: list[str], found: list[str]) -> int:
    """Least number of insertions, deletions and substitutions that make one of the other."""
    row = list(range(len(found) + 1))
    for number, word in enumerate(reference, 1):
        diagonal, row[0] = row[0], number
        for column, other in enumerate(found, 1):
            diagonal, row[column] = row[column], min(diagonal + (word != other), row[column] + 1, row[column - 1] + 1)
    return row[-1]


@cache
def _listener() -> Any:
    from silero_vad import load_silero_vad

    return load_silero_vad(onnx=True)


def share_of_speech(pcm: Wave) -> float:
    """How much of it silero-vad takes for speech."""
    from silero_vad import get_speech_timestamps

    wave = _at_16k(pcm)
    spans = get_speech_timestamps(torch.from_numpy(wave), _listener(), sampling_rate=_JUDGES_RATE)
    return float(sum(span["end"] - span["start"] for span in spans)) / len(wave)


@cache
def _portraitist() -> Any:
    from resemblyzer import VoiceEncoder

    return VoiceEncoder("cpu", verbose=False)


def portrait(pcm: Wave) -> NDArray[np.float32]:
    """Resemblyzer's picture of the voice, a vector of length 1."""
    wave = _at_16k(pcm)
    return np.asarray(_portraitist().embed_utterance(wave / max(1e-3, np.abs(wave).max()) * 0.7), np.float32)


def pitch(pcm: Wave) -> float:
    """Median of the voiced windows, in Hz; NaN where there are none."""
    found = features.prosody(pcm)
    voiced = found[:, : features.WINDOWS] > 0
    if not voiced.any():
        return float("nan")
    height = float(np.median(found[:, features.WINDOWS :][voiced]))
    return float(np.exp(height * features.PITCH_SPREAD + features.PITCH_CENTRE))


def flux(pcm: Wave) -> NDArray[np.float32]:
    """At the beginning of every frame but the first: change of level in dB and of the log mel spectrum, [F - 1, 2].

    Between the 20 ms before and the 20 ms after, which do not overlap.
    """
    window, hop = 480, 1920
    count = len(pcm) // hop - 1
    starts = hop * np.arange(1, count + 1)
    filters = features.mel_filters(window, 40).numpy()
    both = []
    for offset in (-window, 0):
        parts = np.stack([pcm[start + offset : start + offset + window] for start in starts]) * np.hanning(window)
        both.append(np.log(np.abs(np.fft.rfft(parts)) @ filters / window + 1e-5))
    level = (both[1].max(1) - both[0].max(1)) * 20 / np.log(10)
    return np.stack([level, np.abs(both[1] - both[0]).mean(1)], 1).astype(np.float32)
