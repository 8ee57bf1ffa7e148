"""A Chromium of one's own, driven over its DevTools protocol: what a person does to a page, and what a page shows."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PATIENCE_S = 30.0
"""Only ever waited for in vain: then the test fails."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # CI may run as root
    "--remote-debugging-port=0",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
)

SELDOM = """
const paint = requestAnimationFrame;
window.requestAnimationFrame = (frame) => paint(() => paint(() => paint(frame)));
"""
"""Pages are painted 20 times a second instead of 60: without a GPU, painting is most of what a browser does."""
PHASES = """
window.phases = [];
new MutationObserver((all) => all.forEach(({ target }) => window.phases.push(target.dataset.phase)))
  .observe(document, { subtree: true, attributeFilter: ["data-phase"] });
"""
"""A page notes all phases that it was in."""


def chromium() -> str | None:
    """The browser to test with: `CHROMIUM`, or the first one on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Wire:
    """The connection to the browser. on_event gets what comes unasked."""

    socket: ClientConnection
    numbers: Iterator[int] = field(default_factory=count)
    on_event: Callable[[dict[str, Any]], None] = lambda event: None

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command. Fails on an error."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({} if session is None else {"sessionId": session})))
        while True:
            answer = json.loads(self.socket.recv(timeout=PATIENCE_S))
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            if "method" in answer:
                self.on_event(answer)


class Page:
    """A tab with storage and permissions of its own. complaints: errors of scripts, and violations of the policy."""

    def __init__(self, wire: Wire, downloads: Path) -> None:
        self._wire, self.downloads = wire, downloads
        self.complaints: list[str] = []
        self._context = wire.call("Target.createBrowserContext")["browserContextId"]
        target = wire.call("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = str(wire.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        wire.on_event = self._note
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.look(1280, 800)
        self._phases = 0  # of all that the page notes, how many are not looked at any more
        for script in (SELDOM, PHASES):
            self.before_scripts(script)
        where = {"downloadPath": str(downloads), "browserContextId": self._context}
        wire.call("Browser.setDownloadBehavior", behavior="allow", **where)

    def close(self) -> None:
        self._wire.call("Target.disposeBrowserContext", browserContextId=self._context)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command of this tab."""
        return self._wire.call(method, self._session, **parameters)

    def allow_microphone(self, origin: str, setting: str = "granted") -> None:
        """setting: granted, denied or prompt."""
        where = {"origin": origin, "browserContextId": self._context}
        self._wire.call("Browser.setPermission", permission={"name": "microphone"}, setting=setting, **where)

    def before_scripts(self, source: str) -> None:
        """Run in every document before the page's own scripts."""
        self.call("Page.addScriptToEvaluateOnNewDocument", source=source)

    def choose_file(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = PATIENCE_S) -> Any:
        """Poll until this is true. Returns its value."""
        begun = time.monotonic()
        while not (value := self.evaluate(expression)):
            if time.monotonic() - begun > seconds:
                state = self.evaluate("document.body?.innerText")
                raise AssertionError(f"waited in vain for {expression}; the page says:\n{state}")
            time.sleep(0.02)
        return value

    def wait_for_phase(self, *phases: str) -> str:
        """Wait until the page is in one of these phases, or was in one since the last key or press, or since the phase
        that was waited for last. A phase of a second is over before a busy machine looks for it.
        """
        place, phase = self.wait_for(
            f"(() => {{ const all = [...window.phases.slice({self._phases}), document.body.dataset.phase];"
            f"const at = all.findIndex((it) => {list(phases)!r}.includes(it)); return at >= 0 && [at, all[at]]; }})()"
        )
        self._phases += place
        return str(phase)

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"document.querySelector({selector!r}).innerText"))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self._phases = 0
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def key(self, kind: str, key: str, code: str, text: str = "") -> None:
        """kind: keyDown or keyUp."""
        self._forget_phases()
        number = {"Escape": 27, "Tab": 9, "Enter": 13}.get(key) or ord(key.upper()[0])
        extra = {"text": text} if text and kind == "keyDown" else {}
        self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, windowsVirtualKeyCode=number, **extra)

    @contextmanager
    def holding_space(self) -> Iterator[None]:
        self.key("keyDown", " ", "Space", " ")
        yield
        self.key("keyUp", " ", "Space")

    def mouse(self, kind: str, selector: str, at: float | None = None) -> None:
        """kind: mousePressed or mouseReleased, in the middle of an element. at: seconds since the epoch; else now."""
        if kind == "mousePressed":
            self._forget_phases()
        x, y = self.evaluate(
            f"(() => {{ const b = document.querySelector({selector!r}); b.scrollIntoView({{block: 'nearest'}});"
            "const r = b.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        when = {} if at is None else {"timestamp": at}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, **when)

    def click(self, selector: str) -> None:
        """A press of 50 ms by the events' times, however long the page takes to handle its beginning."""
        pressed = time.time()
        self.mouse("mousePressed", selector, pressed)
        self.mouse("mouseReleased", selector, pressed + 0.05)

    def look(self, width: int, height: int, *, light: bool = False, scale: float = 1, mobile: bool = False) -> None:
        """The size of the window, and the system's colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "light" if light else "dark"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        image = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(image))

    def _forget_phases(self) -> None:
        self._phases = self.evaluate("window.phases?.length ?? 0")

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            if parameters["entry"]["source"] != "network":  # a refusal is no fault of the page's
                self.complaints.append(str(parameters["entry"]))
        elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
            self.complaints.append(str(parameters["args"]))


@contextmanager
def browser(folder: Path, microphone: Path, *flags: str) -> Iterator[Callable[[], Page]]:
    """A new browser; gives what opens a tab in it. folder: for its profile; microphone: a WAV, spoken over and over."""
    program = chromium()
    assert program is not None
    profile, downloads = folder / "profile", folder / "downloads"
    downloads.mkdir()
    speech = f"--use-file-for-fake-audio-capture={microphone}"
    command = [program, *FLAGS, f"--user-data-dir={profile}", speech, *flags, "about:blank"]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HOME": str(folder)})
    try:
        with connect(_debugger(process, profile), max_size=None, compression=None) as socket:
            wire = Wire(socket)
            yield lambda: Page(wire, downloads)
            wire.call("Browser.close")
        process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()


def _debugger(process: subprocess.Popen[bytes], profile: Path) -> str:
    """The URL that Chromium writes into its profile once it listens."""
    told = profile / "DevToolsActivePort"
    begun = time.monotonic()
    while not (told.exists() and told.read_text().count("\n") >= 1):
        assert process.poll() is None, "the browser ended at once"
        assert time.monotonic() - begun < PATIENCE_S, "the browser does not start"
        time.sleep(0.05)
    port, path = told.read_text().split("\n")[:2]
    return f"ws://127.0.0.1:{port}{path}"
