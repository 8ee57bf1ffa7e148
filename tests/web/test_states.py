"""The page's states, as a person meets them: the browser's question, a dead microphone, the keyboard, nothing lost."""

from __future__ import annotations

import json
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from streaming.audio import SAMPLE_RATE
from streaming.config import ModelVoices
from tests.web.browser import Page, browser, chromium
from tests.web.live_page import NOTICE, Served, keep, open_page, served, talk

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium is installed; on Debian: apt-get install chromium; or name one in CHROMIUM"
)

ASKS = """
// The browser asks, and a test answers: window.allow(), window.refuse().
Permissions.prototype.query = async () => Object.assign(new EventTarget(), { state: "prompt" });
const open = MediaDevices.prototype.getUserMedia;
window.asked = 0;
MediaDevices.prototype.getUserMedia = async function (wanted) {
  window.asked += 1;
  await new Promise((allow, refuse) => {
    window.allow = allow;
    window.refuse = () => refuse(new DOMException("no", "NotAllowedError"));
  });
  return open.call(this, wanted);
};
"""
SILENT = """
// Every microphone is open, and gives nothing.
MediaDevices.prototype.getUserMedia = async () => new AudioContext().createMediaStreamDestination().stream;
"""
WANTED = """
// What was asked of the browser, and the track that it gave.
const open = MediaDevices.prototype.getUserMedia;
window.wanted = [];
MediaDevices.prototype.getUserMedia = async function (wanted) {
  window.wanted.push(wanted.audio.deviceId?.exact ?? "");
  const stream = await open.call(this, wanted);
  [window.track] = stream.getAudioTracks();
  return stream;
};
"""
LONGER_THAN_A_TAP_S = 0.5


def _state(page: Page, text: str) -> None:
    page.wait_for(f"document.querySelector('#state').innerText === {text!r}")


def _note(page: Page, part: str) -> None:
    page.wait_for(f"document.querySelector('#note').innerText.includes({part!r})")


def _press(page: Page, key: str, code: str = "") -> None:
    """One key, down and up."""
    code = code or f"Key{key.upper()}" if len(key) == 1 else key
    text = {"Enter": "\r", " ": " "}.get(key, "")
    page.key("keyDown", key, "Space" if key == " " else code, text)
    page.key("keyUp", key, "Space" if key == " " else code)


def _drag(page: Page, selector: str) -> None:
    """What a mouse does to a slider; the focus stays there."""
    page.click(selector)
    assert page.evaluate("document.activeElement.id") == selector[1:]


def _gives_up(page: Page) -> None:
    """Escape does not wait for the answer to the second question, and a late one opens nothing."""
    page.wait_for("window.asked === 2")
    page.wait_for_phase("asking")
    _press(page, "Escape")
    page.wait_for_phase("idle")
    page.evaluate("window.allow()")
    time.sleep(LONGER_THAN_A_TAP_S)
    assert page.text("#microphone-state") == "Off"


# The browser's question


def test_the_question_is_a_state_of_its_own_and_who_keeps_holding_then_talks(page: Page, server: Served) -> None:
    """The page said that what was said was kept, while the microphone was closed."""
    page.before_scripts(ASKS)
    open_page(page, server.live)
    with page.holding_space():
        page.wait_for_phase("asking")
        _state(page, "May it hear you?")
        assert page.text("#microphone-state") == "Asking"
        assert server.engine.stats().sessions == 0, "a place is taken by somebody who reads a question"
        keep(page, "asking")
        page.wait_for("window.asked === 1")
        page.evaluate("window.allow()")
        page.wait_for_phase("talking")
        assert page.text("#microphone-state") == "You are heard"
        time.sleep(LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")


@pytest.mark.parametrize("held_s", [0.0, LONGER_THAN_A_TAP_S], ids=["tapped", "held"])
def test_who_lets_go_to_allow_the_microphone_is_told_to_begin_now(page: Page, server: Served, held_s: float) -> None:
    """The first press failed: it was too short, said the page, to whoever had clicked Allow."""
    page.before_scripts(ASKS)
    open_page(page, server.live)
    with page.holding_space():
        page.wait_for("window.asked === 1")
        time.sleep(held_s)
    page.wait_for_phase("asking")
    page.evaluate("window.allow()")
    _note(page, "The microphone is on. Now hold the button and talk.")
    page.wait_for_phase("idle")
    assert page.text("#microphone-state") == "On, not sent"
    page.wait_for("Number(document.querySelector('#meter').style.getPropertyValue('--level')) > 0")
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    assert page.evaluate("window.asked") == 1


def test_the_question_can_be_refused_late_and_escape_does_not_wait_for_it(page: Page, server: Served) -> None:
    page.before_scripts(ASKS)
    open_page(page, server.live)
    with page.holding_space():
        page.wait_for("window.asked === 1")
        time.sleep(LONGER_THAN_A_TAP_S)
    page.evaluate("window.refuse()")
    page.wait_for_phase("problem")
    assert page.text("#problem-title") == "The browser refused the microphone"
    with page.holding_space():
        _gives_up(page)


def test_trying_the_microphone_asks_and_what_is_heard_then_is_seen_and_not_sent(page: Page, server: Served) -> None:
    """Whoever looks at the level first meets the browser's question there, and may answer it late."""
    page.before_scripts(ASKS)
    open_page(page, server.live)
    page.click("#mute")
    page.wait_for_phase("asking")
    _state(page, "May it hear you?")
    assert page.text("#microphone-state") == "Asking"
    keep(page, "trying")
    time.sleep(2 * LONGER_THAN_A_TAP_S)
    page.evaluate("window.allow()")
    page.wait_for_phase("idle")
    assert page.text("#microphone-state") == "On, not sent"
    assert page.text("#mute") == "Turn off"
    page.wait_for("Number(document.querySelector('#meter').style.getPropertyValue('--level')) > 0")
    assert server.engine.stats().sessions == 0
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    assert page.evaluate("window.asked") == 1, "the browser has been answered"


def test_trying_the_microphone_can_be_refused_and_given_up(page: Page, server: Served) -> None:
    """After a refusal the same button asks again; Escape does not wait for an answer, and a late one opens nothing."""
    page.before_scripts(ASKS)
    open_page(page, server.live)
    page.click("#mute")
    page.wait_for("window.asked === 1")
    page.evaluate("window.refuse()")
    page.wait_for_phase("problem")
    assert page.text("#problem-title") == "The browser refused the microphone"
    assert page.text("#microphone-state") == "Off"
    keep(page, "trying-refused")
    page.click("#mute")
    _gives_up(page)
    assert page.text("#mute") == "Try it"


def test_hands_free_begins_when_the_browser_has_been_answered(page: Page, server: Served) -> None:
    page.before_scripts(ASKS)
    open_page(page, server.live, handsFree=True)
    page.click("#talk")
    page.wait_for("window.asked === 1")
    page.evaluate("window.allow()")
    page.wait_for_phase("ready", "talking")


# The microphone


def test_a_silent_microphone_is_noticed_and_another_one_can_be_chosen(page: Page, server: Served) -> None:
    """Whoever talked into a dead microphone heard an answer to silence, and was told nothing."""
    page.before_scripts(SILENT)
    open_page(page, server.live)
    with page.holding_space():
        page.wait_for_phase("talking")
        _note(page, "The microphone hears nothing")
        assert page.evaluate("document.querySelector('#note').dataset.rank") == "error"
        keep(page, "silent")
    page.wait_for_phase("ready")
    assert server.engine.stats().sessions == 1, "the conversation goes on"
    assert page.evaluate("document.querySelector('#microphone').disabled") is False


@pytest.mark.parametrize(("peak_db", "silent"), [(-62, True), (-55, False)])
def test_speech_that_is_too_quiet_to_be_heard_is_told_whatever_the_browser_makes_of_it(
    tmp_path: Path, server: Served, speech: NDArray[np.int16], peak_db: float, silent: bool
) -> None:
    """Echo cancellation made the peaks of the same speech 3 dB higher, and at -62 dB nobody was told."""
    microphone = tmp_path / "quiet.wav"
    scale = 32768 * 10 ** (peak_db / 20) / np.abs(speech.astype(np.int32)).max()
    soundfile.write(microphone, np.round(speech * scale).astype(np.int16), SAMPLE_RATE)
    with browser(tmp_path, microphone) as new_page:
        for echo in (True, False):
            page = new_page()
            open_page(page, server.live, echoCancellation=echo)
            with page.holding_space():
                page.wait_for_phase("talking")
                if silent:
                    _note(page, "The microphone hears nothing")
                time.sleep(2)
                assert ("The microphone hears nothing" in page.text("#note")) == silent
            page.close()


def test_the_microphone_that_is_chosen_is_opened_and_kept(page: Page, server: Served) -> None:
    page.before_scripts(WANTED)
    open_page(page, server.live)
    page.wait_for("document.querySelector('#microphone').options.length > 2")
    chosen = page.evaluate(
        "(() => { const list = document.querySelector('#microphone'); list.selectedIndex = 2;"
        "list.dispatchEvent(new Event('change', {bubbles: true})); return list.value; })()"
    )
    page.click("#mute")  # "Try it": no conversation is needed to see the level
    page.wait_for("document.querySelector('#microphone-state').innerText === 'On, not sent'")
    assert page.evaluate("window.wanted") == [chosen]
    assert page.evaluate("window.track.getSettings().deviceId") == chosen
    with page.holding_space():
        page.wait_for_phase("talking")
        page.evaluate(
            "(() => { const list = document.querySelector('#microphone'); list.selectedIndex = 1;"
            "list.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )
        page.wait_for("window.wanted.length === 2")
        page.wait_for("document.querySelector('#microphone-state').innerText === 'You are heard'")
        time.sleep(LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    assert server.engine.stats().sessions == 1


def test_a_microphone_that_vanishes_ends_the_word_and_not_the_conversation(page: Page, server: Served) -> None:
    page.before_scripts(WANTED)
    open_page(page, server.live)
    with page.holding_space():
        page.wait_for_phase("talking")
        time.sleep(LONGER_THAN_A_TAP_S)
        page.evaluate("window.track.dispatchEvent(new Event('ended'))")  # what unplugging does
        page.wait_for_phase("ready")
        _note(page, "The microphone is gone")
        assert page.text("#microphone-state") == "Off"
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    assert len(server.step.heard) == 1, "it is one session"


def test_a_muted_microphone_gives_silence_and_says_so(page: Page, server: Served) -> None:
    page.before_scripts(WANTED)
    open_page(page, server.live, handsFree=True)
    page.click("#talk")
    page.wait_for_phase("ready", "talking")
    page.click("#mute")
    page.wait_for("document.querySelector('#microphone-state').innerText === 'Muted'")
    assert page.evaluate("window.track.enabled") is False
    assert page.text("#mute") == "Unmute"
    page.click("#mute")
    page.wait_for("document.querySelector('#microphone-state').innerText === 'You are heard'")
    assert page.evaluate("window.track.enabled") is True


def test_the_volume_is_that_of_all_that_is_played(page: Page, server: Served) -> None:
    page.before_scripts(
        "const gains = []; window.gains = gains; const Node = GainNode;"
        "window.GainNode = class extends Node { constructor(...all) { super(...all); gains.push(this); } };"
    )
    open_page(page, server.live, volume=0.5)
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    assert page.evaluate("window.gains.map((it) => it.gain.value)") == [0.5]
    page.evaluate(
        "(() => { const v = document.querySelector('#volume'); v.value = 0;"
        "v.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    assert page.evaluate("window.gains[0].gain.value") == 0
    assert json.loads(page.evaluate("localStorage.settings"))["volume"] == 0


# What is said, and where


def test_what_the_model_does_is_said_before_the_press_and_nothing_moves(page: Page, server: Served) -> None:
    """The promise stood above its contradiction, which came after the press and moved the button."""
    open_page(page, server.live)
    assert page.text("#notice") == NOTICE
    where = (
        "(() => { const r = document.querySelector('#talk').getBoundingClientRect(); return [r.x, r.y, r.width]; })()"
    )
    row = "document.querySelector('#choose').getBoundingClientRect().y"
    before = page.evaluate(f"[{where}, {row}]")
    talk(page, 0.05)
    page.wait_for_phase("speaking")
    assert page.evaluate(f"[{where}, {row}]") == before
    _press(page, "Escape")
    page.wait_for_phase("idle")
    page.evaluate("document.querySelector('#top-k').value = '99999'")
    assert page.evaluate(f"[{where}, {row}]") == before
    assert page.text("#notice") == NOTICE


def test_a_model_that_goes_on_from_certain_words_says_which_before_the_press(page: Page) -> None:
    """A demo that recites was met with a name, and babbled. What is to be said stays in sight while it is said."""
    with served(suggestions=("one, two, three", "Monday, Tuesday")) as it:
        open_page(page, it.live)
        says = "Try saying “one,\N{NBSP}two,\N{NBSP}three” or “Monday,\N{NBSP}Tuesday”."
        assert page.text("#suggestion") == says
        keep(page, "suggestion")
        with page.holding_space():
            page.wait_for_phase("talking")
            assert page.text("#suggestion") == says
            assert page.evaluate("document.querySelector('#suggestion').checkVisibility()")


def test_a_model_with_voices_of_its_own_says_in_which_one_it_goes_on(page: Page) -> None:
    """Who had spoken heard somebody else go on, and was not told why."""
    every = ModelVoices(1, dict.fromkeys(range(2048), "a deep voice"))
    with served(voices=every) as it:
        open_page(page, it.live, maxSeconds=20)
        talk(page, LONGER_THAN_A_TAP_S)
        page.wait_for_phase("speaking")
        page.wait_for("document.querySelector('#hint').innerText === 'In a deep voice. Hold and talk to interrupt it.'")


def test_a_model_that_takes_any_speech_suggests_nothing(page: Page, server: Served) -> None:
    """An empty line would push the notes down."""
    open_page(page, server.live)
    assert not page.evaluate("document.querySelector('#suggestion').checkVisibility()")


def test_what_is_wrong_with_a_field_is_said_beside_it(page: Page, server: Served) -> None:
    open_page(page, server.live)
    page.evaluate("document.querySelector('#settings').open = true")
    for name, wrong, right in (("top-k", "99999", "7"), ("seed", "12x", "9223372036854775807"), ("top-p", "2", "0.5")):
        for value, says in ((wrong, True), (right, False)):
            page.evaluate(
                f"(() => {{ const i = document.querySelector('#{name}'); i.value = '{value}';"
                "i.dispatchEvent(new Event('input', {bubbles: true})); })()"
            )
            assert bool(page.text(f"#{name}-says")) == says
            assert page.evaluate(f"document.querySelector('#{name}').getAttribute('aria-invalid')") == str(says).lower()
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    assert server.step.samplings[0].seed == 2**63 - 1, "a seed of 19 digits came to the server whole"
    seed = "document.querySelector('#seed-used')"
    assert page.text("#seed-used") == "9223372036854775807"
    assert page.evaluate(f"{seed}.scrollWidth <= {seed}.clientWidth"), "its end cannot be read"


# Keys


def test_space_talks_after_a_slider_and_after_a_summary(page: Page, server: Served) -> None:
    """The space bar was dead after a slider was used, and closed the settings after their summary was clicked."""
    open_page(page, server.live)
    page.click("summary")
    page.wait_for("document.querySelector('#settings').open")
    talk(page, LONGER_THAN_A_TAP_S)
    assert page.evaluate("document.querySelector('#settings').open")
    page.wait_for_phase("speaking")
    for selector in ("#temperature", "#top-k", "#repeat"):
        page.evaluate(f"document.querySelector('{selector}').scrollIntoView()")
        if selector != "#repeat":
            _drag(page, selector)
        else:
            page.evaluate("document.activeElement.blur()")
        talk(page, LONGER_THAN_A_TAP_S)
        page.wait_for_phase("speaking")


def test_single_letters_work_buttons_and_can_be_turned_off(page: Page, server: Served) -> None:
    """WCAG 2.2, 2.1.4: who talks to a computer, or whose hand slips, must be able to be rid of them."""
    open_page(page, server.live)
    _press(page, "h")
    _state(page, "Ready")
    page.wait_for("document.querySelector('#label').innerText === 'Listen'")
    page.evaluate("document.querySelector('#single-keys').click(); document.activeElement.blur()")
    _press(page, "h")
    time.sleep(0.2)
    assert page.text("#label") == "Listen"
    assert json.loads(page.evaluate("localStorage.settings"))["singleKeys"] is False


def test_letters_that_are_typed_press_nothing(page: Page, server: Served) -> None:
    open_page(page, server.live)
    page.evaluate("document.querySelector('#settings').open = true; document.querySelector('#seed').focus()")
    _press(page, "h")
    time.sleep(0.2)
    assert page.text("#label") == "Hold and talk"


def test_a_conversation_by_keyboard_alone(page: Page, server: Served) -> None:
    """Tab leads to everything, Space and Enter work what has the focus, and Esc leads out."""
    open_page(page, server.live, maxSeconds=1)

    def tab_to(name: str) -> None:
        for _ in range(40):
            if page.evaluate("document.activeElement.id || document.activeElement.tagName") == name:
                return
            _press(page, "Tab")
        pytest.fail(f"the keyboard does not reach {name}")

    tab_to("talk")
    _press(page, "Enter")
    page.wait_for_phase("talking")
    time.sleep(LONGER_THAN_A_TAP_S)
    _press(page, "Enter")
    page.wait_for_phase("speaking")
    page.wait_for_phase("ready")
    tab_to("replay")
    _press(page, " ")
    page.wait_for_phase("replaying")
    _press(page, "Escape")
    page.wait_for_phase("ready")
    tab_to("SUMMARY")
    _press(page, " ")
    page.wait_for("document.querySelector('#settings').open")
    tab_to("over")
    _press(page, "Enter")
    page.wait_for("document.querySelector('#discard').open")
    assert page.evaluate("document.activeElement.value") == "keep", "the careful answer is the nearest"
    _press(page, "Escape")
    page.wait_for("!document.querySelector('#discard').open")
    assert not page.evaluate("document.querySelector('#download').disabled")


# Nothing is lost


def test_a_conversation_that_was_not_downloaded_is_not_thrown_away_unasked(page: Page, server: Served) -> None:
    """One letter deleted the conversation."""
    open_page(page, server.live, maxSeconds=1)
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    page.wait_for_phase("ready")
    _press(page, "n")
    page.wait_for("document.querySelector('#discard').open")
    keep(page, "discard")
    page.click("#discard [value=keep]")
    assert not page.evaluate("document.querySelector('#download').disabled")
    asks = "!dispatchEvent(new Event('beforeunload', { cancelable: true }))"
    assert page.evaluate(asks), "closing the tab would lose it, too"
    page.click("#download")
    assert not page.evaluate(asks)
    page.click("#over")
    page.wait_for("document.querySelector('#download').disabled")
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for("!document.querySelector('#download').disabled")
    page.click("#over")
    page.wait_for("document.querySelector('#discard').open")
    page.click("#discard [value=discard]")
    page.wait_for("document.querySelector('#download').disabled")
    assert page.text("#state") == "Ready"


def test_a_finished_conversation_is_played_again(page: Page, server: Served) -> None:
    open_page(page, server.live, maxSeconds=1)
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    assert page.evaluate("document.querySelector('#replay').disabled"), "not while it goes on"
    page.wait_for_phase("ready")
    beside = "document.querySelector('#download').getBoundingClientRect().x"
    before = page.evaluate(beside)
    page.click("#replay")
    _state(page, "Playing it again")
    assert page.text("#replay") == "Stop"
    assert page.evaluate(beside) == before, "the buttons beside it moved under the finger"
    page.wait_for_phase("ready")  # at its end
    page.click("#replay")
    page.wait_for_phase("replaying")
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    _press(page, "Escape")
    page.wait_for_phase("idle")
    assert not page.evaluate("document.querySelector('#repeat').disabled")


def test_a_stop_in_the_first_answer_can_be_repeated(page: Page, server: Served) -> None:
    open_page(page, server.live, maxSeconds=20)
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    _press(page, "Escape")
    page.wait_for_phase("idle")
    page.click("#repeat")
    page.wait_for_phase("speaking")


def test_listen_and_stop_do_not_look_the_same(page: Page, server: Served) -> None:
    open_page(page, server.live, handsFree=True)
    look: Any = "['.microphone', '.stop'].map((it) => getComputedStyle(document.querySelector(`#talk ${it}`)).display)"
    assert page.text("#label") == "Listen"
    assert page.evaluate(look) == ["inline", "none"]
    page.click("#talk")
    page.wait_for_phase("ready", "talking")
    assert page.text("#label") == "Stop"
    assert page.evaluate(look) == ["none", "inline"]
    disc = "getComputedStyle(document.querySelector('#talk'), '::before').backgroundColor"
    listening = page.evaluate(disc)
    page.click("#talk")
    page.wait_for_phase("idle")
    page.wait_for(f"{disc} !== {listening!r}")


def test_a_full_server_that_has_no_line_says_so_before_the_press(page: Page) -> None:
    with served(slots=1) as it:
        other = it.engine.open()
        page.open(f"{it.live.http}/")
        _state(page, "Every place is taken")
        other.close()


def test_who_has_the_only_place_is_not_told_that_the_server_is_full(page: Page) -> None:
    """Five seconds into a talk with a server of one place, its own page called it full."""
    with served(slots=1) as it:
        open_page(page, it.live, maxSeconds=1)
        talk(page, 0.3)
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # it asks for the figures at once
        page.wait_for("document.querySelector('#slots').innerText === '0 of 1'")
        assert page.text("#server-text") == "stub: connected"
        assert page.evaluate("document.querySelector('#server').dataset.state") == "ready"


def test_the_picture_is_drawn_anew_when_the_settings_take_room_from_it(page: Page, server: Served) -> None:
    """The picture was squashed, and its labels too, until something else was to be drawn."""
    open_page(page, server.live, maxSeconds=1)
    talk(page, 0.3)
    page.wait_for_phase("ready")
    page.click("#settings summary")
    page.wait_for(
        "(({ width, height, clientWidth, clientHeight }) => width === clientWidth && height === clientHeight)"
        "(document.querySelector('#spectrogram'))"
    )


def test_another_take_and_the_way_back_to_the_first(page: Page, server: Served) -> None:
    """One press goes on from the same words with another seed. The takes stay, and the chosen one is gone on from."""
    open_page(page, server.live, maxSeconds=1)
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    page.wait_for_phase("ready")
    first = page.text("#seed-used")
    page.click("#take")
    page.wait_for_phase("speaking")
    page.wait_for_phase("ready")
    page.wait_for("document.querySelectorAll('#takes button').length === 2")
    assert page.text("#seed-used") != first
    pressed = "[...document.querySelectorAll('#takes button')].map((it) => it.getAttribute('aria-pressed'))"
    assert page.evaluate(pressed) == ["false", "true"]
    keep(page, "takes")
    page.click("#takes button")
    _state(page, "Playing it again")
    page.wait_for(f"{pressed}[0] === 'true'")
    page.wait_for_phase("ready")
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for_phase("speaking")
    assert page.evaluate("document.querySelector('#takes').hidden"), "other words have takes of their own"


@pytest.mark.parametrize("kept", [1, 2])
def test_the_conversation_goes_on_from_the_take_that_is_kept(page: Page, server: Served, kept: int) -> None:
    """The server holds the prompt, the kept take's frames, what was said next, and the answer to that."""
    open_page(page, server.live, maxSeconds=1)
    ready = "document.body.dataset.phase === 'ready' && !document.querySelector('#take').disabled"
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for(ready)
    ((slot, stream),) = server.step.streams.items()
    takes = {1: list(stream.entries)}
    page.click("#take")
    page.wait_for(f"document.querySelectorAll('#takes button').length === 2 && {ready}")
    takes[2] = list(server.step.streams[slot].entries)
    prompt = [entry for entry in takes[1] if entry[0] == "heard"]
    answers = [entries[len(prompt) :] for entries in takes.values()]
    assert all(entries[: len(prompt)] == prompt for entries in takes.values())
    assert not set(answers[0]) & set(answers[1]), "another seed"
    page.click(f"#takes button:nth-child({kept})")
    _state(page, "Playing it again")
    page.wait_for(ready)
    pressed = f"document.querySelector('#takes button:nth-child({kept})').getAttribute('aria-pressed')"
    assert page.evaluate(pressed) == "true"
    talk(page, LONGER_THAN_A_TAP_S)
    page.wait_for(f"document.querySelector('#takes').hidden && {ready}")
    assert list(server.step.streams) == [slot], "it is one session"
    entries = server.step.streams[slot].entries
    assert entries[: len(takes[kept])] == takes[kept]
    after = [kind for kind, _ in groupby(kind for kind, _ in entries[len(takes[kept]) :])]
    assert after == ["heard", "spoken"]
