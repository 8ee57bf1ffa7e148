"""How the page looks, as far as it can be computed: contrast, width, order of the keyboard, motion."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streaming.engine.engine import Engine
from tests.server.live_server import serving
from tests.web.browser import Page, browser, chromium
from tests.web.live_page import NOTICE
from tests.web.voice import VoiceStep

PHASES = ("idle", "asking", "connecting", "queued", "ready", "talking", "waiting", "speaking", "replaying", "problem")
SUGGESTIONS = ("one, two, three, four", "Monday, Tuesday", "January, February, March", "Twinkle, twinkle, little star")
DESKTOP, LOW, TELEPHONE, SIDEWAYS = (1280, 800), (1280, 650), (360, 760), (844, 390)

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium is installed; on Debian: apt-get install chromium; or name one in CHROMIUM"
)

CONTRASTS = """
(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const opaque = (element) => {
    for (let at = element; at; at = at.parentElement) {
      for (const pseudo of ["::before", null]) {
        const [r, g, b, a] = parse(getComputedStyle(at, pseudo).backgroundColor);
        if (r !== undefined && a === undefined) return [r, g, b];
      }
    }
    return parse(getComputedStyle(document.documentElement).backgroundColor);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const said = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || element.placeholder;
    if (!said || !element.checkVisibility({ visibilityProperty: true }) || element.closest("noscript")) continue;
    const pseudo = element.placeholder && !element.value ? "::placeholder" : null;
    const [one, two] = [parse(getComputedStyle(element, pseudo).color), opaque(element)].map(light);
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    const name = element.id || element.className || element.tagName;
    found.push([Math.round(100 * ratio) / 100, `${name}: ${element.textContent.trim()}`]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("browser")
    example = Path(__file__).parents[2] / "examples" / "prompt.wav"
    with (
        Engine(VoiceStep(2), "stub", NOTICE, suggestions=SUGGESTIONS) as engine,
        serving(engine) as live,
        browser(folder, example) as new_page,
    ):
        it = new_page()
        it.open(f"{live.http}/")
        it.wait_for("document.querySelector('#server').dataset.state === 'ready'")
        yield it
        it.close()


@pytest.fixture(params=[False, True], ids=["dark", "light"])
def scheme(request: pytest.FixtureRequest) -> bool:
    """Whether it is light."""
    return bool(request.param)


def _dress(page: Page, phase: str) -> None:
    """Make it look as in this phase: the style sheet goes by this attribute alone."""
    page.evaluate(f"document.body.dataset.phase = {phase!r}")
    problem = str(phase == "problem").lower()
    page.evaluate(
        f"document.querySelector('#said').hidden = {problem};"
        f"document.querySelector('#problem').hidden = document.querySelector('#token-form').hidden = !{problem}"
    )
    once = "document.getAnimations().filter((it) => it.effect.getTiming().iterations === 1)"
    page.evaluate(f"Promise.allSettled({once}.map((it) => it.finished)).then(() => 0)")


@pytest.mark.parametrize("phase", PHASES)
def test_text_can_be_read(page: Page, scheme: bool, phase: str) -> None:
    """At least 4.5:1 (WCAG 2.2, 1.4.3), disabled buttons included: what cannot be done now still has to be read."""
    page.look(*DESKTOP, light=scheme)
    _dress(page, phase)
    found: list[tuple[float, str]] = page.evaluate(CONTRASTS)
    assert len(found) > 30
    assert [it for it in found if it[0] < 4.5] == []
    if folder := os.environ.get("PAGE_SHOTS"):
        page.screenshot(Path(folder) / f"look-{'light' if scheme else 'dark'}-{phase}.png")


def test_the_spectrogram_can_be_told_apart(page: Page, scheme: bool) -> None:
    """Both voices and the labels stand out against the paper that they are drawn on."""
    page.look(*DESKTOP, light=scheme)
    names = ("you", "machine", "muted")
    page.evaluate(
        "(() => { const box = document.createElement('div'); box.id = 'swatches';"
        f"for (const name of {list(names)!r}) {{ const span = document.createElement('span'); span.append(name);"
        "span.style.color = `var(--${name})`; span.style.background = 'var(--paper)'; box.append(span); }"
        "document.body.append(box); })()"
    )
    found = {text.partition(": ")[2]: ratio for ratio, text in page.evaluate(CONTRASTS)}
    page.evaluate("document.querySelector('#swatches').remove()")
    assert all(found[name] >= 4.5 for name in names), found


@pytest.mark.parametrize("phase", PHASES)
def test_a_telephone_shows_all_of_it_without_scrolling_sideways(page: Page, phase: str) -> None:
    """One button that was a few pixels too wide made the whole page swim under the thumb."""
    page.look(*TELEPHONE, mobile=True)
    _dress(page, phase)
    page.evaluate("document.querySelector('#settings').open = true")
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() && !e.closest('svg, .ring')"
        "&& e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)"
        ".map((e) => e.id || e.className || e.tagName)"
    )
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth") == TELEPHONE[0]
    page.evaluate("document.querySelector('#settings').open = false; scrollTo(0, 0)")
    bottom = page.evaluate("document.querySelector('#state').getBoundingClientRect().bottom")
    assert bottom < TELEPHONE[1], "the button and what goes on are on the first screen"
    if folder := os.environ.get("PAGE_SHOTS"):
        page.screenshot(Path(folder) / f"look-phone-{phase}.png")


@pytest.mark.parametrize("size", [DESKTOP, LOW], ids=["800", "650"])
def test_one_screen_is_enough_on_a_desktop(page: Page, size: tuple[int, int]) -> None:
    """Figures below the fold are figures that nobody reads. The settings are for experts, and closed."""
    page.look(*size)
    _dress(page, "idle")
    assert not page.evaluate("document.querySelector('#settings').open")
    assert page.evaluate("document.documentElement.scrollHeight") <= size[1]


@pytest.mark.parametrize("size", [DESKTOP, LOW, TELEPHONE, SIDEWAYS], ids=["800", "650", "telephone", "sideways"])
def test_the_button_is_the_largest_thing_and_in_sight(page: Page, size: tuple[int, int]) -> None:
    """A title took 45 % of the screen, and on a telephone held sideways the button was below it."""
    page.look(*size, mobile=size in (TELEPHONE, SIDEWAYS))
    _dress(page, "idle")
    page.evaluate("scrollTo(0, 0)")
    bottoms = page.evaluate(
        "['#talk', '#state'].map((it) => document.querySelector(it).getBoundingClientRect().bottom)"
    )
    assert max(bottoms) < size[1]
    button = page.evaluate("document.querySelector('#talk').getBoundingClientRect().height")
    others = page.evaluate(
        "[...document.querySelectorAll('button:not(#talk), select, input, h1, h2, p, dl div')]"
        ".filter((e) => e.checkVisibility() && !e.matches('.about')).map((e) => e.getBoundingClientRect().height)"
    )
    assert button > 1.5 * max(others)


@pytest.mark.parametrize("size", [DESKTOP, LOW, TELEPHONE, SIDEWAYS], ids=["800", "650", "telephone", "sideways"])
@pytest.mark.parametrize("text", ["Off", "On, not sent", "You are heard"])
def test_whether_the_microphone_is_open_is_always_in_sight(page: Page, size: tuple[int, int], text: str) -> None:
    """A telephone showed it below the picture while hands-free. It stands beside the choice of the way, in one line:
    nothing moves.
    """
    page.look(*size, mobile=size in (TELEPHONE, SIDEWAYS))
    _dress(page, "speaking")
    page.evaluate(f"document.querySelector('#microphone-state').textContent = {text!r}; scrollTo(0, 0)")
    (open_at, open_right), (ways_at, ways_right) = page.evaluate(
        "['.open', '.switch'].map((it) => document.querySelector(it).getBoundingClientRect())"
        ".map((r) => [(r.top + r.bottom) / 2, r.right])"
    )
    assert abs(open_at - ways_at) < 2 and open_at < size[1]
    assert ways_right < open_right <= size[0]


def test_what_the_buttons_say_stands_on_one_line(page: Page) -> None:
    """Pins that "Play again" stood higher than what was beside it."""
    page.look(*DESKTOP)
    _dress(page, "idle")
    tops = page.evaluate(
        "[...document.querySelectorAll('main > .row > button')].map((button) => {"
        "  const range = document.createRange(); range.selectNodeContents(button);"
        "  return Math.round(range.getBoundingClientRect().top); })"
    )
    assert len(tops) == 6 and max(tops) - min(tops) <= 1, tops


@pytest.mark.parametrize("size", [DESKTOP, LOW, TELEPHONE, SIDEWAYS], ids=["800", "650", "telephone", "sideways"])
def test_no_figure_and_no_suggestion_is_cut(page: Page, size: tuple[int, int]) -> None:
    """On a telephone held sideways the first figure's name ended in dots. What is suggested may be long."""
    page.look(*size, mobile=size in (TELEPHONE, SIDEWAYS))
    _dress(page, "speaking")
    cut = page.evaluate(
        "[...document.querySelectorAll('.figures dt, .figures dd, #suggestion, #hint, #notice')]"
        ".filter((e) => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map((e) => e.innerText)"
    )
    assert cut == []
    assert page.text("#suggestion").endswith("or “Twinkle,\N{NBSP}twinkle,\N{NBSP}little\N{NBSP}star”.")
    boxes = page.evaluate(
        "['#hint', '#suggestion', '#note'].map((it) => document.querySelector(it).getBoundingClientRect())"
        ".map((r) => [r.top, r.bottom])"
    )
    assert boxes[0][1] < boxes[1][0] and boxes[1][1] <= boxes[2][0], "they run into each other"


@pytest.mark.parametrize("size", [DESKTOP, LOW], ids=["800", "650"])
def test_there_is_one_left_edge(page: Page, size: tuple[int, int]) -> None:
    """Three left edges made the page look thrown together."""
    page.look(*size)
    _dress(page, "idle")
    lefts = page.evaluate(
        "['h1', '.about', '#talk', '.row button', '.empty', '.figures dt', 'summary']"
        ".map((it) => Math.round(document.querySelector(it).getBoundingClientRect().left))"
    )
    assert len(set(lefts)) == 1, lefts


@pytest.mark.parametrize("size", [DESKTOP, LOW, TELEPHONE, SIDEWAYS], ids=["800", "650", "telephone", "sideways"])
def test_settings_that_are_opened_come_into_sight(page: Page, size: tuple[int, int]) -> None:
    """They opened below the fold of a low window: nothing was seen to happen."""
    page.look(*size, mobile=size in (TELEPHONE, SIDEWAYS))
    _dress(page, "idle")
    page.evaluate("document.querySelector('summary').scrollIntoView({ block: 'end' })")
    page.click("summary")
    page.wait_for("document.querySelector('#settings').open")
    page.wait_for(
        "(() => { const r = document.querySelector('#temperature').getBoundingClientRect();"
        "return r.top >= 0 && r.bottom <= innerHeight; })()"
    )
    page.evaluate("document.querySelector('#settings').open = false; scrollTo(0, 0)")


def test_a_telephone_held_sideways_has_what_can_be_done_in_one_row(page: Page) -> None:
    """One button alone in a second row took the picture's first line from the screen."""
    page.look(*SIDEWAYS, mobile=True)
    _dress(page, "idle")
    tops = page.evaluate(
        "[...document.querySelectorAll('main > .row > button')].map((it) => it.getBoundingClientRect().top)"
    )
    assert len(tops) == 6 and len(set(tops)) == 1, tops


@pytest.mark.parametrize("size", [LOW, TELEPHONE, SIDEWAYS], ids=["650", "telephone", "sideways"])
def test_everything_can_be_scrolled_to_and_nothing_covers_anything(page: Page, size: tuple[int, int]) -> None:
    """Figures were cut at 1280x650, and a touch on one thing met another."""
    page.look(*size, mobile=size in (TELEPHONE, SIDEWAYS))
    _dress(page, "idle")
    page.evaluate("document.querySelector('#settings').open = true")
    missed = page.evaluate(
        "[...document.querySelectorAll('button, select, summary, input, dd')].filter((e) => {"
        "  if (!e.checkVisibility() || e.closest('dialog') || e.name === 'way') return false;"
        "  e.scrollIntoView({ block: 'center' });"
        "  const r = e.getBoundingClientRect();"
        "  const hit = document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2);"
        "  return !(e.contains(hit) || hit?.contains(e));"
        "}).map((e) => e.id)"
    )
    page.evaluate("document.querySelector('#settings').open = false; scrollTo(0, 0)")
    assert missed == []


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_forced_colours_leave_the_button_and_the_chosen_way(page: Page, scheme: str) -> None:
    """The button and the chosen way were drawn by backgrounds alone, which the system takes away."""
    page.look(*DESKTOP)
    forced = {"name": "forced-colors", "value": "active"}
    page.call("Emulation.setEmulatedMedia", features=[forced, {"name": "prefers-color-scheme", "value": scheme}])
    _dress(page, "idle")
    border = "getComputedStyle(document.querySelector('#talk'), '::before').borderTopWidth"
    assert page.evaluate(border) == "4px"
    ways = "[...document.querySelectorAll('.switch span')].map((it) => getComputedStyle(it).backgroundColor)"
    chosen, other = page.evaluate(ways)
    assert chosen != other
    if folder := os.environ.get("PAGE_SHOTS"):
        page.screenshot(Path(folder) / f"look-forced-{scheme}.png")


def test_everything_can_be_reached_by_keyboard_and_shows_it(page: Page) -> None:
    """A control without a visible focus is lost to whoever has no mouse."""
    page.look(*DESKTOP)
    _dress(page, "idle")
    page.evaluate("document.querySelector('#settings').open = true; document.activeElement.blur()")
    reached: list[Any] = []
    for _ in range(30):
        page.key("keyDown", "Tab", "Tab")
        page.key("keyUp", "Tab", "Tab")
        here = page.evaluate(
            "(() => { const e = document.activeElement; if (e === document.body) return null;"
            "const shown = e.name === 'way' ? e.nextElementSibling : e;"
            "return [e.id || e.name || e.tagName, getComputedStyle(shown).outlineStyle]; })()"
        )
        if reached and here == reached[0]:
            break
        if here is not None:  # the end of the page: the next one is its beginning
            reached.append(here)
    names = [name for name, _ in reached]
    for name in (
        "way",
        "choose",
        "talk",
        "microphone",
        "mute",
        "volume",
        "SUMMARY",
        "temperature",
        "top-k",
        "seed",
        "echo",
    ):
        assert name in names, names
    page.evaluate("document.querySelector('#settings').open = false")
    assert [name for name, outline in reached if outline == "none"] == []


def test_who_wants_no_motion_gets_none(page: Page) -> None:
    """Pulsing and sliding make some people ill."""
    page.look(*DESKTOP)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    page.wait_for("document.getAnimations().length === 0")
    for phase in PHASES:
        page.evaluate(f"document.body.dataset.phase = {phase!r}")
        assert page.evaluate("document.getAnimations().length") == 0


def test_states_are_told_to_who_cannot_see_them(page: Page) -> None:
    """The page has live regions, a name for every control, and one heading."""
    page.look(*DESKTOP)
    _dress(page, "idle")
    assert page.evaluate("document.querySelector('#state').getAttribute('role')") == "status"
    assert page.evaluate("document.querySelector('#problem').getAttribute('role')") == "alert"
    page.evaluate("document.querySelector('#settings').open = true")
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    page.evaluate("document.querySelector('#settings').open = false")
    controls = [
        (node["role"]["value"], node["name"]["value"])
        for node in tree
        if not node["ignored"]
        and node["role"]["value"] in ("button", "slider", "spinbutton", "textbox", "checkbox", "radio", "image")
    ]
    assert len(controls) > 12
    assert [control for control in controls if not control[1]] == []
    assert ("button", "Hold and talk") in controls
    assert sum(node["role"]["value"] == "heading" for node in tree if not node["ignored"]) == 1
