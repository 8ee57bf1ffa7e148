"""The browser, a tab in it, and a server, for the tests of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from streaming.audio import SAMPLE_RATE
from tests.web.browser import Page, browser
from tests.web.live_page import OTHER_HOST, Served, served

EXAMPLE = Path(__file__).parents[2] / "examples" / "prompt.wav"
SPEECH_S, SILENCE_S = 3.0, 2.0


@pytest.fixture(scope="module")
def speech() -> NDArray[np.int16]:
    """What the microphone hears, over and over."""
    pcm, rate = soundfile.read(EXAMPLE, dtype="int16")
    assert rate == SAMPLE_RATE
    return np.concatenate((pcm[: int(SPEECH_S * rate)], np.zeros(int(SILENCE_S * rate), np.int16)))


@pytest.fixture(scope="module")
def new_page(tmp_path_factory: pytest.TempPathFactory, speech: NDArray[np.int16]) -> Iterator[Callable[[], Page]]:
    """What opens a tab in a browser that all tests of a file share."""
    folder = tmp_path_factory.mktemp("browser")
    microphone = folder / "microphone.wav"
    soundfile.write(microphone, speech, SAMPLE_RATE)
    with browser(
        folder, microphone, f"--host-resolver-rules=MAP {OTHER_HOST} 127.0.0.1", "--ignore-certificate-errors"
    ) as opened:
        yield opened


@pytest.fixture
def page(new_page: Callable[[], Page]) -> Iterator[Page]:
    """A tab; no test may leave an error in its console, nor a violation of its policy."""
    it = new_page()
    yield it
    it.evaluate("0")  # what was told until now is read with the answer
    it.close()
    assert it.complaints == []


@pytest.fixture
def server() -> Iterator[Served]:
    with served() as it:
        yield it
