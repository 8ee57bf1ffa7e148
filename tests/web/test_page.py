"""The page as a person meets it: in a browser, with a microphone, against a real server over a step without weights."""

from __future__ import annotations

import asyncio
import base64
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile
import soxr
from numpy.typing import NDArray

from streaming.audio import FRAME, SAMPLE_RATE, to_int16
from streaming.server.door.bind import Bind, check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.origins import parse_origins
from streaming.server.door.tls import load_tls
from streaming.server.door.tokens import Tokens
from tests.server.certificate import self_signed
from tests.server.cut_proxy import CutProxy, cut_proxy
from tests.server.live_server import LiveServer
from tests.web.browser import Page, chromium
from tests.web.live_page import NOTICE, OTHER_HOST, Served, keep, open_page, served, talk

TOKEN = "a-token-of-24-characters"  # noqa: S105
STRANGER = "not-one-of-those-we-know"

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium is installed; on Debian: apt-get install chromium; or name one in CHROMIUM"
)


_LONGER_THAN_A_TAP_S = 0.5
"""A shorter press is a tap, after which the page goes on listening: on an idle machine these were."""


@contextmanager
def _through_a_proxy(live: LiveServer) -> Iterator[tuple[LiveServer, Callable[[Callable[[CutProxy], None]], None]]]:
    """The server by way of a network, and what does something to that."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    relay = cut_proxy(live.url)
    proxy = asyncio.run_coroutine_threadsafe(relay.__aenter__(), loop).result()
    try:
        yield replace(live, url=proxy.url), lambda act: loop.call_soon_threadsafe(act, proxy) and None
    finally:
        asyncio.run_coroutine_threadsafe(relay.__aexit__(None, None, None), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _download(page: Page) -> NDArray[np.int16]:
    """[n, 2]: the person, the machine."""
    before = set(page.downloads.iterdir())
    page.click("#download")
    deadline = time.monotonic() + 20
    while not (new := {file for file in page.downloads.iterdir() if file.suffix == ".wav"} - before):
        assert time.monotonic() < deadline, "nothing was downloaded"
        time.sleep(0.05)
    pcm, rate = soundfile.read(new.pop(), dtype="int16")
    assert rate == SAMPLE_RATE
    assert pcm.shape[1] == 2
    return np.asarray(pcm)


def _gaps(sent: NDArray[np.int16], played: NDArray[np.int16]) -> int:
    """How often the playing of `sent` paused; fails if a sample of it is missing, altered or said twice."""
    gaps, done, at = -1, 0, 0
    while done < len(sent):
        key = sent[done : done + 64]
        starts = np.flatnonzero(played[at:] == key[0]) + at
        found = next((int(p) for p in starts if np.array_equal(played[p : p + len(key)], key)), None)
        assert found is not None, f"sample {done} of {len(sent)} was not played"
        at, gaps = found, gaps + 1
        length = min(len(sent) - done, len(played) - at)
        same = sent[done : done + length] == played[at : at + length]
        run = length if same.all() else int(np.argmin(same))
        done, at = done + run, at + run
    return gaps


TAP = """
// What goes to the device also goes to a track, whose samples are kept.
const connect = AudioNode.prototype.connect;
window.tapped = [];
AudioNode.prototype.connect = function (to, ...more) {
  if (this instanceof GainNode && to instanceof AudioDestinationNode) {
    const tap = this.context.createMediaStreamDestination();
    connect.call(this, tap);
    const [track] = tap.stream.getAudioTracks();
    const reader = new MediaStreamTrackProcessor({ track, maxBufferSize: 10_000 }).readable.getReader();
    (async () => {
      for (let next; !(next = await reader.read()).done; next.value.close()) {
        const samples = new Float32Array(next.value.numberOfFrames);
        next.value.copyTo(samples, { planeIndex: 0, format: "f32-planar" });
        window.tapped.push([samples, next.value.sampleRate]);
      }
    })();
  }
  return connect.call(this, to, ...more);
};
window.tappedBase64 = () => {
  const text = window.tapped.map(([samples]) => String.fromCharCode(...new Uint8Array(samples.buffer))).join("");
  return [btoa(text), window.tapped[0][1]];
};
"""


def _tapped(page: Page) -> tuple[NDArray[np.float32], int]:
    """What the playback worklet gave to the device, and at what rate."""
    text, rate = page.evaluate("window.tappedBase64()")
    return np.frombuffer(base64.b64decode(text), np.float32), int(rate)


def _place(part: NDArray[Any], whole: NDArray[Any]) -> int:
    """Where in `whole` this part fits best."""
    size = 1 << (len(whole) + len(part)).bit_length()
    spectrum = np.fft.rfft(whole, size) * np.conj(np.fft.rfft(part, size))
    return int(np.argmax(np.fft.irfft(spectrum, size)[: len(whole) - len(part) + 1]))


def _likeness(heard: NDArray[np.int16], said: NDArray[np.int16], size: int = SAMPLE_RATE // 10) -> float:
    """The median correlation of tenths of a second with the places in `said` that they fit best.

    The median, because a busy machine makes Chromium's own fake device stumble.
    """
    found = []
    for start in range(0, len(heard) - size, size):
        part = heard[start : start + size].astype(np.float64)
        if part.std() > 300:  # else silence, which fits anywhere
            at = _place(part, said.astype(np.float64))
            found.append(np.corrcoef(part, said[at : at + size])[0, 1])
    assert len(found) >= 5
    return float(np.median(found))


def _signal_to_noise_db(expected: NDArray[np.float32], heard: NDArray[np.float32], rate: int) -> float:
    """Where `heard` fits best, to a fraction of a sample, below 9.5 kHz: above it two resamplers may well differ."""
    at = _place(expected, heard)
    window = np.hanning(len(expected))
    wanted, got = np.fft.rfft(window * expected), np.fft.rfft(window * heard[at : at + len(expected)])
    omega = 2 * np.pi * np.arange(len(wanted)) / len(expected)
    turned, low = got * np.conj(wanted), (omega > 0.01) & (omega < 0.5)
    weights = omega[low] * np.abs(turned[low])
    delay = np.sum(weights * np.angle(turned[low])) / np.sum(weights * omega[low])
    below = omega < 2 * np.pi * 9500 / rate
    error = (got - wanted * np.exp(1j * omega * delay))[below]
    return float(10 * np.log10(np.sum(np.abs(got[below]) ** 2) / np.sum(np.abs(error) ** 2)))


def test_a_whole_turn(page: Page, server: Served, speech: NDArray[np.int16]) -> None:
    """A person holds, talks, lets go and hears. The server hears what the microphone did, and all that it sends is
    played.
    """
    page.before_scripts(TAP)
    open_page(page, server.live, echoCancellation=False)
    begun = time.monotonic()
    talk(page, 1.5)
    held_s = time.monotonic() - begun
    page.wait_for_phase("speaking")
    shown_ms = float(page.text("#first-sound").removesuffix(" ms"))
    page.wait_for_phase("ready")
    (slot,) = server.step.heard
    heard, sent = to_int16(np.concatenate(server.step.heard[slot])), server.step.sent(slot)
    recording = _download(page)
    you, machine = recording[:, 0], recording[:, 1]

    # The person's side: the page's tape, the server and the microphone agree.
    assert 1.3 < len(heard) / SAMPLE_RATE < held_s + 2.5
    spoken = np.trim_zeros(heard)
    assert _gaps(spoken, you) == 0
    likeness = _likeness(spoken, np.concatenate((speech, speech)))
    assert likeness > 0.98

    # The machine's side: bit for bit before the device's rate, and as good as that after it.
    assert len(sent) == 25 * FRAME
    underruns = int(page.text("#underruns"))
    assert _gaps(sent, machine) == underruns
    output, rate = _tapped(page)
    if not underruns:
        expected = soxr.resample(sent.astype(np.float32) / 32768, SAMPLE_RATE, rate, "VHQ")
        quality_db = _signal_to_noise_db(expected, output, rate)
        print(f"microphone {likeness:.4f}, first sound {shown_ms:.0f} ms, at {rate} Hz {quality_db:.1f} dB")
        assert quality_db > 50

    # What the page says is what happened.
    unsaid = len(heard) - int(np.flatnonzero(heard)[-1])  # the microphone's file has silence in it, too
    silence = int(np.flatnonzero(machine)[0] - np.flatnonzero(you)[-1]) - unsaid
    assert abs(shown_ms - 1000 * silence / SAMPLE_RATE) < 200, "the same but for the device's own delay"
    assert float(page.text("#step").removesuffix(" ms")) >= 5
    assert page.text("#slots") in ("3 of 4", "4 of 4")
    keep(page, "turn")


def test_an_interruption(page: Page, server: Served) -> None:
    """A person presses while the machine speaks: it falls silent, the context is cut to what was heard, and the next
    turn follows.
    """
    open_page(page, server.live, maxSeconds=20)
    talk(page, 0.5)
    page.wait_for_phase("speaking")
    time.sleep(1.0)
    talk(page, 0.5)
    page.wait_for_phase("speaking")
    time.sleep(0.3)
    keep(page, "interruption")
    page.key("keyDown", "Escape", "Escape")
    page.wait_for_phase("idle")
    ((slot, stream),) = server.step.streams.items()
    runs = [(kind, len(list(group))) for kind, group in groupby(kind for kind, _ in stream.entries)]
    assert [kind for kind, _ in runs] == ["heard", "spoken", "heard", "spoken"]
    kept = runs[1][1]
    assert kept >= 5, "it spoke for a second"
    machine = _download(page)[:, 1]
    underruns = int(page.text("#underruns"))
    assert _gaps(server.step.sent(slot, kept), machine) <= underruns, "the context keeps what was not played"
    with pytest.raises(AssertionError, match="was not played"):
        _gaps(server.step.sent(slot, kept + 8), machine)


def test_hands_free(page: Page, server: Served) -> None:
    """One press, then only voices: a pause hands over, and the next word interrupts."""
    open_page(page, server.live, handsFree=True, maxSeconds=20)
    page.click("#talk")
    page.wait_for_phase("ready", "talking")
    page.wait_for_phase("speaking")
    assert float(page.text("#first-sound").removesuffix(" ms")) > 300, "the pause that ends a turn is part of it"
    page.wait_for_phase("talking")  # the microphone's file begins again
    keep(page, "hands-free")
    page.wait_for_phase("speaking")
    page.click("#talk")
    page.wait_for_phase("idle")
    stream = next(iter(server.step.streams.values()))
    kinds = [kind for kind, _ in groupby(kind for kind, _ in stream.entries)]
    assert kinds[:4] == ["heard", "spoken", "heard", "spoken"]


def test_a_tap_and_the_enter_key_do_what_holding_does(page: Page, server: Served) -> None:
    """Who cannot hold a key down, or works a screen reader, was left with turns of 100 ms."""
    open_page(page, server.live, maxSeconds=1)
    page.click("#talk")
    page.wait_for_phase("talking")
    time.sleep(0.5)
    assert page.text("#label") == "Press to hand over"
    page.click("#talk")
    page.wait_for_phase("speaking")
    page.wait_for_phase("ready")
    page.evaluate("document.querySelector('#talk').focus()")
    page.key("keyDown", "Enter", "Enter", "\r")
    page.key("keyUp", "Enter", "Enter")
    page.wait_for_phase("talking")
    time.sleep(0.3)
    page.key("keyDown", "Enter", "Enter", "\r")
    page.key("keyUp", "Enter", "Enter")
    page.wait_for_phase("speaking")


def test_a_recording_is_played_and_goes_on(page: Page, server: Served, tmp_path: Path) -> None:
    """No microphone is needed. The server hears the file, resampled and mixed to one channel."""
    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)
    soundfile.write(tmp_path / "tone.wav", np.stack((0.5 * tone, 0.1 * tone), axis=1), 44_100)
    (tmp_path / "text.wav").write_text("not sound")
    open_page(page, server.live, "denied", maxSeconds=1)
    page.choose_file("#file", tmp_path / "text.wav")
    page.wait_for("document.querySelector('#note').innerText.includes('cannot read')")
    page.choose_file("#file", tmp_path / "tone.wav")
    page.wait_for("document.querySelector('#state').innerText === 'Click anywhere'")  # this was no gesture
    page.click("h1")
    page.wait_for_phase("talking")
    assert page.text("#state") == "Your recording"
    page.wait_for_phase("speaking")
    page.wait_for_phase("ready")
    (slot,) = server.step.heard
    heard = np.concatenate(server.step.heard[slot])
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard))))
    assert abs(float(np.argmax(spectrum)) * SAMPLE_RATE / len(heard) - 440) < 2
    assert abs(float(np.abs(heard).max()) - 0.3) < 0.02


def test_the_same_seed_gives_the_same_again(page: Page, server: Served) -> None:
    """Prompt, seed and sampling go to the server unchanged, and the answers are compared."""
    open_page(page, server.live, maxSeconds=1)
    talk(page, 0.6)
    page.wait_for_phase("speaking")
    page.wait_for_phase("ready")
    seed = page.text("#seed-used")
    page.click("#repeat")
    page.wait_for("document.querySelector('#note').innerText.startsWith('The same again, sample for sample, for 1.0')")
    assert page.text("#seed-used") == seed


def test_settings_reach_the_server_and_last(page: Page, server: Served) -> None:
    """A slider moved and changed nothing; a setting was gone with the next visit."""
    open_page(page, server.live)
    for selector, value in (("#temperature", "1.5"), ("#top-k", "7"), ("#max-seconds", "1"), ("#seed", "4242")):
        page.evaluate(
            f"(() => {{ const i = document.querySelector({selector!r}); i.value = {value!r};"
            "i.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
    page.open(f"{server.live.http}/?again")
    assert page.evaluate("document.querySelector('#temperature').value") == "1.5"
    talk(page, 0.4)
    page.wait_for_phase("speaking")
    assert page.text("#seed-used") == "4242"
    (sampling,) = server.step.samplings
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (1.5, 7, 4242)
    page.wait_for_phase("ready")
    assert len(server.step.sent(0)) == SAMPLE_RATE // FRAME * FRAME + FRAME, "one second, in whole frames"


def test_a_full_server(page: Page) -> None:
    """Who finds every place taken is told so at once, and gets in as soon as one is free."""
    with served(slots=1) as it:
        other = it.engine.open()
        page.allow_microphone(it.live.http)
        page.open(f"{it.live.http}/")
        page.wait_for("document.querySelector('#server').dataset.state === 'full'")
        assert page.text("#slots") == "0 of 1"
        assert page.text("#state") == "Every place is taken", "it said that it was ready"
        with page.holding_space():
            page.wait_for_phase("problem")
        assert page.text("#problem-title") == "Every place is taken"
        keep(page, "full")
        other.close()
        page.wait_for("document.querySelector('#note').innerText.startsWith('A place is free now')")
        page.wait_for("document.querySelector('#problem').hidden")
        talk(page, 0.3)
        page.wait_for_phase("speaking")


def test_a_place_in_line(page: Page) -> None:
    """The page tells the place in line; then it is one's turn, by itself."""
    with served(slots=1, queue=2) as it:
        other = it.engine.open()
        page.allow_microphone(it.live.http)
        page.open(f"{it.live.http}/")
        page.wait_for("document.querySelector('#server').dataset.state === 'full'")
        with page.holding_space():
            page.wait_for_phase("queued")
            time.sleep(_LONGER_THAN_A_TAP_S)
        assert page.text("#state") == "In line: place 1"
        page.click("#talk")
        page.wait_for_phase("idle")
        assert page.text("#note") == "You have left the line."
        assert "wait in line" in page.text("#hint")
        with page.holding_space():
            page.wait_for_phase("queued")
        other.close()
        page.wait_for_phase("ready")


def test_a_refused_microphone(page: Page, server: Served) -> None:
    """The person is told what to do, no place is held meanwhile, and allowing the microphone helps without a reload."""
    open_page(page, server.live, "denied")
    with page.holding_space():
        page.wait_for_phase("problem")
        time.sleep(_LONGER_THAN_A_TAP_S)
    assert page.text("#problem-title") == "The browser refused the microphone"
    assert "Allow it" in page.text("#problem-lines")
    keep(page, "refused")
    deadline = time.monotonic() + 5
    while server.engine.stats().sessions:
        assert time.monotonic() < deadline, "the place is still held"
        time.sleep(0.02)
    page.allow_microphone(server.live.http)
    talk(page, 0.3)
    page.wait_for_phase("speaking")


def test_a_server_that_goes_away(page: Page) -> None:
    """The server goes in the middle of a conversation, and is not there before the next."""
    with served() as it:
        open_page(page, it.live, maxSeconds=20)
        talk(page, 0.3)
        page.wait_for_phase("speaking")
    page.wait_for_phase("problem")
    assert page.text("#problem-title") in ("The server is about to stop", "The connection is lost")
    assert not page.evaluate("document.querySelector('#download').disabled"), "what was said is still there"
    with page.holding_space():
        page.wait_for("document.querySelector('#problem-title').innerText === 'The server does not answer'")
    page.wait_for("document.querySelector('#server').dataset.state === 'gone'")
    assert page.text("#server-text") == "stub: no answer"
    assert page.text("#notice") == NOTICE, "it went with the server, and the page below it moved"
    keep(page, "gone")


def _set_open(proxy: CutProxy, value: bool) -> None:
    proxy.open = value


def _set_frozen(proxy: CutProxy, value: bool) -> None:
    proxy.frozen = value


def test_a_connection_that_breaks_is_restored(page: Page, server: Served, speech: NDArray[np.int16]) -> None:
    """The connection breaks while the person talks and while the machine does: no sample is lost or doubled on either
    side, and the page tells of it.
    """
    with _through_a_proxy(server.live) as (live, network):
        open_page(page, live, echoCancellation=False)
        with page.holding_space():
            page.wait_for_phase("talking")
            time.sleep(0.5)
            network(lambda proxy: _set_open(proxy, value=False))
            network(CutProxy.cut)
            page.wait_for("document.querySelector('#state').innerText === 'The connection broke'")
            time.sleep(1.0)
            keep(page, "away")
            network(lambda proxy: _set_open(proxy, value=True))
            page.wait_for("document.querySelector('#note').innerText.includes('restored')")
            time.sleep(0.5)
        page.wait_for_phase("speaking")
        network(CutProxy.cut)
        page.wait_for_phase("ready")
        (slot,) = server.step.heard
        spoken = np.trim_zeros(to_int16(np.concatenate(server.step.heard[slot])))
        recording = _download(page)
        assert len(spoken) > 2.0 * SAMPLE_RATE, "what was said meanwhile belongs to it"
        assert _gaps(spoken, recording[:, 0]) == 0
        assert _gaps(server.step.sent(slot), recording[:, 1]) <= int(page.text("#underruns"))
        assert len(server.step.heard) == 1, "it is one session"


def test_a_network_that_falls_silent_is_noticed(page: Page, server: Served) -> None:
    """Nobody tells a browser: the page asks, and comes back by another connection while the old one still hangs."""
    with _through_a_proxy(server.live) as (live, network):
        open_page(page, live)
        talk(page, 0.5)
        page.wait_for_phase("ready")
        network(lambda proxy: _set_frozen(proxy, value=True))
        page.wait_for("document.querySelector('#state').innerText === 'The connection broke'")
        network(lambda proxy: _set_frozen(proxy, value=False))
        page.wait_for("document.querySelector('#state').innerText === 'Your turn'")
        talk(page, 0.5)
        page.wait_for_phase("speaking")
        assert len(server.step.heard) == 1, "it is one session"


def test_a_session_that_is_gone_is_told(page: Page) -> None:
    """A server that was killed and started again knows nobody: the conversation is over, its sound is kept."""
    with served(resume_s=0.2) as it, _through_a_proxy(it.live) as (live, network):
        open_page(page, live, maxSeconds=20)
        talk(page, 0.3)
        page.wait_for_phase("speaking")
        network(lambda proxy: _set_open(proxy, value=False))
        network(CutProxy.cut)
        page.wait_for_phase("problem")
        assert page.text("#problem-title") == "The connection is lost"
        assert not page.evaluate("document.querySelector('#download').disabled")


def test_a_proxy_that_passes_no_websockets_is_not_taken_for_a_server_that_is_gone(page: Page, server: Served) -> None:
    """A browser tells scripts neither from the other."""
    page.before_scripts("WebSocket = class extends WebSocket { constructor(url, p) { super(`${url}/lost`, p); } }")
    open_page(page, server.live)
    with page.holding_space():
        page.wait_for_phase("problem")
    assert page.text("#problem-title") == "Speech cannot get through"


def test_a_token_is_asked_for_and_kept_in_this_tab_only(page: Page) -> None:
    """A token in a URL ends up in histories and logs; one in localStorage outlives the visit."""
    tokens = Tokens.from_text(f"ann:{TOKEN}")
    keeper = Gatekeeper(check_bind("127.0.0.1", tokens, tls=False, insecure_plaintext=False), tokens)
    with served(keeper=keeper) as it:
        open_page(page, it.live)
        for token in (None, STRANGER):
            if token is not None:
                page.type(token)
                page.evaluate("document.querySelector('#token-form').requestSubmit()")
                page.wait_for_phase("idle")
                page.evaluate("document.activeElement.blur()")
            with page.holding_space():
                page.wait_for_phase("problem")
            assert page.text("#problem-title") == "This server asks for a token"
            assert page.evaluate("document.activeElement.id") == "token"
        keep(page, "token")
        page.type(TOKEN)
        page.evaluate("document.querySelector('#token-form').requestSubmit()")
        page.wait_for_phase("idle")
        page.evaluate("document.activeElement.blur()")
        talk(page, 0.3)
        page.wait_for_phase("speaking")
        kept = page.evaluate(
            "[JSON.stringify(localStorage), document.cookie, location.href, document.documentElement.outerHTML,"
            "...performance.getEntries().map((entry) => entry.name)].filter((text) => text.includes('a-token-of'))"
        )
        assert kept == []
        assert page.evaluate("sessionStorage.token") == TOKEN


def test_without_https_it_is_said_how_to_get_a_microphone(page: Page) -> None:
    """`navigator.mediaDevices` is simply missing there, and a TypeError helps nobody."""
    bind = check_bind("127.0.0.1", None, tls=False, insecure_plaintext=False)
    with served(keeper=Gatekeeper(bind, None, parse_origins([f"http://{OTHER_HOST}"]))) as it:
        port = urlsplit(it.live.http).port
        page.open(f"http://{OTHER_HOST}:{port}/")
        page.wait_for_phase("problem")
        assert page.text("#problem-title") == "No microphone without HTTPS"
        assert "--tls-cert" in page.text("#problem-lines")
        assert f"ssh -L 8765:127.0.0.1:{port} {OTHER_HOST}" in page.text("#problem-lines")
        keep(page, "insecure")
        ours = [complaint for complaint in page.complaints if "Cross-Origin-Opener-Policy header" not in complaint]
        page.complaints = ours  # the browser says that it has no use for that header without HTTPS


def test_over_https(page: Page, tmp_path: Path) -> None:
    """A telephone comes this way: page, socket and worklets come over TLS, from a name that is not this machine's."""
    certificate, key = self_signed(tmp_path)
    tokens = Tokens.from_text(f"ann:{TOKEN}")
    bind = Bind("127.0.0.1", ("127.0.0.1",), loopback=False, tls=True)
    with served(keeper=Gatekeeper(bind, tokens), tls=load_tls(str(certificate), str(key))) as it:
        origin = f"https://{OTHER_HOST}:{urlsplit(it.live.url).port}"
        page.allow_microphone(origin)
        page.before_scripts(f"sessionStorage.token = {TOKEN!r}")
        page.open(f"{origin}/")
        talk(page, 0.5)
        page.wait_for_phase("speaking")


@pytest.mark.parametrize("seed", range(3))
def test_however_it_is_hammered_the_next_turn_works(page: Page, server: Served, seed: int) -> None:
    """Presses overtake the microphone, and modes change in mid-word: no order may leave the page stuck."""
    rng = random.Random(seed)
    open_page(page, server.live, maxSeconds=1)
    held = False
    for _ in range(40):
        action = rng.choice(("space", "space", "space", "click", "KeyH", "KeyR", "KeyN", "KeyD", "Escape", "wait"))
        if action == "space":
            held = not held
            page.key("keyDown" if held else "keyUp", " ", "Space", " ")
        elif action == "click":
            page.click("#talk")
        elif action != "wait":
            page.key("keyDown", action[-1].lower() if action != "Escape" else action, action)
        time.sleep(rng.choice((0.0, 0.0, 0.02, 0.1, 0.4)))
    if held:
        page.key("keyUp", " ", "Space")
    page.evaluate("document.querySelector('#discard').close('keep')")
    page.key("keyDown", "Escape", "Escape")
    page.wait_for_phase("idle")
    page.evaluate("document.querySelector('[name=way][value=hold]').click()")
    page.wait_for_phase("idle")
    time.sleep(0.2)
    talk(page, 0.3)
    page.wait_for_phase("speaking")
    page.wait_for_phase("ready")
    deadline = time.monotonic() + 5
    while server.engine.stats().sessions > 1:
        assert time.monotonic() < deadline, "a session was left behind"
        time.sleep(0.02)


def test_the_policy_holds(new_page: Callable[[], Page], server: Served) -> None:
    """Injected script runs nowhere, and no other host is called."""
    page = new_page()
    page.open(f"{server.live.http}/")
    for attack in (
        "document.body.innerHTML = '<img src=x onerror=\"window.hacked = 1\">'",
        "eval('window.hacked = 1')",
        "await fetch('https://example.org/')",
        "await import('data:text/javascript,window.hacked=1')",
    ):
        told = page.call(
            "Runtime.evaluate",
            expression=f"(async () => {{ {attack} }})().then(() => 'done', () => 'refused')",
            awaitPromise=True,
            returnByValue=True,
            allowUnsafeEvalBlockedByCSP=False,
        )["result"]["value"]
        assert told == "refused", attack
    page.evaluate(
        "(() => { const script = document.createElement('script');"
        "script.append('window.hacked = 1'); document.body.append(script); })()"
    )
    assert page.evaluate("window.hacked") is None
    page.close()
