"""Takes the README's picture of the page in mid-conversation: `python -m tests.web.picture docs/page.webp`.

The server is `server.py` with whatever flags follow, the microphone hears `examples/count.wav`.
"""

from __future__ import annotations

import base64
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from streaming.protocol.messages import PATH
from tests.web.browser import Page, browser

ROOT = Path(__file__).parents[2]
SIZE = (1280, 800)


def main(picture: Path, *flags: str) -> None:
    command = [sys.executable, "server.py", "--port", "0", "--until-eof", *flags]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1].replace("ws://", "http://").removesuffix(PATH)
        with browser(Path(folder), ROOT / "examples" / "count.wav") as new_page:
            _take(new_page(), url, picture)
        assert server.stdin is not None
        server.stdin.close()


def _take(page: Page, url: str, picture: Path) -> None:
    page.allow_microphone(url)
    page.look(*SIZE)
    page.open(f"{url}/")
    page.wait_for("document.querySelector('#server').dataset.state === 'ready'")
    for talk_s, listen_s in ((4.0, 2.5), (3.0, 2.0)):
        with page.holding_space():
            page.wait_for_phase("talking")
            time.sleep(talk_s)
        page.wait_for_phase("speaking")
        time.sleep(listen_s)
    image = page.call("Page.captureScreenshot", format="webp", quality=82)["data"]  # sound makes large PNGs
    picture.write_bytes(base64.b64decode(image))
    figures = page.text(".figures").replace("\n", " ")
    print(f"{picture}: {picture.stat().st_size / 1e3:.0f} kB; {figures}")
    page.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
