"""axe-core finds nothing: in every phase, both schemes, on a desktop and on a telephone, with the settings open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.web.browser import Page, chromium
from tests.web.install import AXE, installed
from tests.web.live_page import Served, keep, open_page, talk

pytestmark = [
    pytest.mark.skipif(
        chromium() is None,
        reason="no Chromium is installed; on Debian: apt-get install chromium; or name one in CHROMIUM",
    ),
    pytest.mark.skipif(not installed(), reason="axe-core is not installed; run: python tests/web/install.py"),
]

PHASES = ("idle", "asking", "connecting", "queued", "ready", "talking", "waiting", "speaking", "replaying", "problem")
FINDINGS = """
axe.run(document, { resultTypes: ["violations"] }).then(({ violations }) =>
  violations.flatMap(({ id, nodes }) => nodes.map(({ target, failureSummary: why }) => [id, String(target), why])))
"""


def _findings(page: Page) -> list[Any]:
    return list(page.evaluate(FINDINGS))


@pytest.mark.parametrize("light", [False, True], ids=["dark", "light"])
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)], ids=["desktop", "telephone"])
def test_axe_finds_nothing_in_any_phase(page: Page, server: Served, size: tuple[int, int], light: bool) -> None:
    open_page(page, server.live)
    page.evaluate(AXE.read_text(encoding="utf-8") + ";0")
    page.look(*size, light=light, mobile=size[0] < 600)
    page.evaluate("document.querySelector('#settings').open = true")
    for phase in PHASES:
        page.evaluate(
            f"(() => {{ document.body.dataset.phase = {phase!r};"
            "for (const id of ['problem', 'token-form']) document.querySelector(`#${id}`).hidden = "
            f"{str(phase != 'problem').lower()};"
            "document.querySelector('#problem-title').textContent = 'A problem'; })()"
        )
        assert _findings(page) == [], phase


@pytest.mark.parametrize("size", [(1280, 800), (390, 844), (844, 390)], ids=["desktop", "telephone", "sideways"])
def test_axe_finds_nothing_in_a_conversation_its_takes_and_its_question(
    page: Page, server: Served, size: tuple[int, int]
) -> None:
    open_page(page, server.live, maxSeconds=1)
    page.look(*size, mobile=min(size) < 600)
    page.evaluate(AXE.read_text(encoding="utf-8") + ";0")
    talk(page, 0.5)
    page.wait_for_phase("speaking")
    page.wait_for_phase("ready")
    page.click("#take")
    page.wait_for("document.querySelectorAll('#takes button').length === 2")
    page.wait_for_phase("ready")
    assert _findings(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    keep(page, f"axe-takes-{size[0]}")
    page.click("#over")
    page.wait_for("document.querySelector('#discard').open")
    assert _findings(page) == []
    keep(page, "axe")


def test_axe_finds_what_is_wrong(new_page: Callable[[], Page], server: Served) -> None:
    """Pins a check that is green because it looks at nothing."""
    page = new_page()
    open_page(page, server.live)
    page.evaluate(AXE.read_text(encoding="utf-8") + ";0")
    page.evaluate("document.querySelector('label[for=volume]').remove()")
    assert "label" in [rule for rule, *_ in _findings(page)]
    page.close()
