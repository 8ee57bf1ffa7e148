"""The clients that others wrote, unmodified: the documentation's recipes, interruptions, turns by voice.

They live in an environment of their own, as their pins must not bind this project: a Python that the variable
`OPENAI_CLIENTS_PYTHON` names, or `.venv-clients` in the clone (`python tests/clients/install.py` makes it). Without
either the tests skip.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streaming.audio import FRAME
from streaming.engine.engine import Engine
from tests.clients.install import PYTHON
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, serving
from tests.server.openai.client import kinds, said_by

ROOT = Path(__file__).parents[2]
RECIPES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/openai.md").read_text(encoding="utf-8"), re.DOTALL)
NAMES = ["openai", "takes", "pipecat", "livekit", "live"]
CLIENT = Path(os.environ.get("OPENAI_CLIENTS_PYTHON", PYTHON))

pytestmark = pytest.mark.skipif(
    not CLIENT.exists(), reason=f"no {CLIENT}: `python tests/clients/install.py`, or set OPENAI_CLIENTS_PYTHON"
)


@pytest.fixture
def step() -> StubStep:
    return StubStep(2, rewind_frames=16, context_frames=255)


@pytest.fixture
def server(step: StubStep) -> Iterator[LiveServer]:
    with Engine(step, "stub") as engine, serving(engine) as live:
        yield live


def run_client(server: LiveServer, program: str, folder: Path) -> str:
    """Run it in `folder`, beside the examples, and return what it printed."""
    host = server.url.split("/")[2]
    (folder / "examples").symlink_to(ROOT / "examples")
    script = folder / "recipe.py"
    script.write_text(program.replace("127.0.0.1:8765", host), encoding="utf-8")
    done = subprocess.run(
        [CLIENT, script.name], cwd=folder, capture_output=True, text=True, timeout=100, check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore", "DO_NOT_TRACK": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_the_documentation_has_a_recipe_for_each() -> None:
    assert len(RECIPES) == len(NAMES)
    for recipe, word in zip(
        RECIPES,
        ["client.realtime", "item.delete", "OpenAIRealtimeLLMService", "livekit", "client.live"],
        strict=True,
    ):
        assert word in recipe


ONE_TURN = [(name, recipe) for name, recipe in zip(NAMES, RECIPES, strict=True) if name != "takes"]


@pytest.mark.parametrize(("name", "recipe"), ONE_TURN, ids=[name for name, _ in ONE_TURN])
def test_a_recipe_records_what_the_model_said(
    server: LiveServer, step: StubStep, tmp_path: Path, name: str, recipe: str
) -> None:
    """The recording is right to the sample: a frame that a client lost, doubled or got late would show."""
    step.ends = lambda length, _: name == "openai" and length == 100  # the others say how much they want
    run_client(server, recipe, tmp_path)
    with wave.open(str(tmp_path / "continuation.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
        heard = file.readframes(file.getnframes())
    said = said_by(step.streams[0])
    assert len(heard) >= 2 * 24_000
    assert heard == (said[: len(heard)] if name == "live" else said)
    prompt = kinds(step.streams[0]).partition("s")[0]
    assert 40 <= len(prompt) <= 56, "3.36 s of speech, and perhaps silence after it"


def test_the_recipe_for_takes_has_three_continuations_of_one_prompt(
    server: LiveServer, step: StubStep, tmp_path: Path
) -> None:
    """The `openai` package deletes a response: the next was the same, or followed what was left of it.

    The last is kept. A client that deletes it and leaves may be gone before all of it is cut from the context.
    """
    run_client(server, RECIPES[NAMES.index("takes")], tmp_path)
    takes = []
    for number in (1, 2, 3):
        with wave.open(str(tmp_path / f"take-{number}.wav")) as file:
            takes.append(file.readframes(file.getnframes()))
    assert [len(take) for take in takes] == [2 * 25 * FRAME] * 3, "100 tokens"
    assert len(set(takes)) == 3
    assert kinds(step.streams[0]) == 42 * "h" + 25 * "s", "3.29 s of speech, and one response"
    assert takes[2] == said_by(step.streams[0])


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_recipe_without_a_server_ends_with_a_sentence(tmp_path: Path, recipe: str) -> None:
    """A newcomer who forgot to start one read hundreds of lines of other people's code, or waited for ever."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = recipe.replace("127.0.0.1:8765", "127.0.0.1:9")
    done = subprocess.run(
        [CLIENT, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("start `python server.py` first.")


def told(output: str) -> dict[str, Any]:
    """The JSON object that a script prints last."""
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


@pytest.mark.usefixtures("heard_in_time")
@pytest.mark.parametrize("name", ["sdk_interrupts", "pipecat_interrupted", "livekit_interrupts"])
def test_an_interruption_leaves_what_was_heard(server: LiveServer, step: StubStep, tmp_path: Path, name: str) -> None:
    """Each client truncates in its own way; the context must end where its listener stopped, to the frame."""
    program = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    result = told(run_client(server, program, tmp_path))
    stream = kinds(step.streams[0])
    first = re.match(r"h+(s+)h", stream)
    assert first, stream
    assert len(first[1]) == result["heard_ms"] // 80
    assert result["errors"] == []
    assert stream.endswith("s"), "and the session goes on"
