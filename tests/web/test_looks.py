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
from tests.web.voice import VoiceStep

PHASES = ("idle", "connecting", "queued", "ready", "talking", "waiting", "speaking", "problem")
DESKTOP, TELEPHONE = (1280, 800), (360, 760)

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
        Engine(VoiceStep(2), "stub") as engine,
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
    """Makes it look as in this phase: the style sheet goes by this attribute alone."""
    page.evaluate(f"document.body.dataset.phase = {phase!r}")
    page.evaluate(
        "document.querySelector('#problem').hidden = document.querySelector('#token-form').hidden = "
        f"{str(phase != 'problem').lower()}"
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
    """Both voices and the labels against the paper that they are drawn on."""
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
        "&& e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.id || e.className || e.tagName)"
    )
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth") == TELEPHONE[0]
    page.evaluate("document.querySelector('#settings').open = false; scrollTo(0, 0)")
    bottom = page.evaluate("document.querySelector('#state').getBoundingClientRect().bottom")
    assert bottom < TELEPHONE[1], "the button and what goes on are on the first screen"
    if folder := os.environ.get("PAGE_SHOTS"):
        page.screenshot(Path(folder) / f"look-phone-{phase}.png")


def test_one_screen_is_enough_on_a_desktop(page: Page) -> None:
    """Figures below the fold are figures that nobody reads."""
    page.look(*DESKTOP)
    _dress(page, "idle")
    page.evaluate("document.querySelector('#settings').open = true")
    assert page.evaluate("document.documentElement.scrollHeight") <= DESKTOP[1]


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
        if here is None or (reached and here == reached[0]):
            break
        reached.append(here)
    names = [name for name, _ in reached]
    for name in ("way", "choose", "talk", "SUMMARY", "temperature", "max-seconds", "silence", "top-k", "seed", "echo"):
        assert name in names, names
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
    """Live regions, names for every control, one heading."""
    page.look(*DESKTOP)
    page.evaluate("document.body.dataset.phase = 'idle'")
    assert page.evaluate("document.querySelector('#state').getAttribute('role')") == "status"
    assert page.evaluate("document.querySelector('#problem').getAttribute('role')") == "alert"
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
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
