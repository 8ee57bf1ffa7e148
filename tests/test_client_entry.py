"""`client.py` as a person runs it: flags, exit statuses, its own server, and no torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile

from streaming.audio import FRAME
from streaming.engine.engine import Engine
from streaming.protocol.opus import opus_available
from streaming.terminal import command as client
from streaming.terminal import connecting, start
from streaming.terminal.keyboard import Key
from streaming.terminal.view import TurnReport
from tests.client.fake_server import STARTED, Script, fake_server, never, whole_turn
from tests.engine.stub_step import StubStep
from tests.server.cut_proxy import cut_proxy
from tests.server.live_server import serving
from tests.terminal.fake_sounddevice import install
from tests.terminal.witness import Witness

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = """
import importlib.abc, runpy, sys
class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub"):
            raise ImportError(f"{name} is forbidden here")
sys.meta_path.insert(0, Forbid())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CLIENT = """
import sys
from pathlib import Path
from streaming.terminal import command, connecting
server = [sys.executable, str(Path(__file__).with_name("server.py")), "--port", "0", "--until-eof"]
connecting.server_command = lambda model, codec: [*server, "--model", model]
sys.exit(command.main())
"""
"""`client.py`, but for the server that it starts."""
OWN_SERVER = """
import argparse, asyncio, os, sys
assert {name for name in os.environ if name.startswith("STREAMING_")} == {"STREAMING_NATIVE", "STREAMING_TOKENS"}
assert os.environ["STREAMING_NATIVE"] == "0"
parser = argparse.ArgumentParser()
parser.add_argument("--port"), parser.add_argument("--model"), parser.add_argument("--max-sessions")
parser.add_argument("--until-eof", action="store_true")
args = parser.parse_args()
if args.model == "broken":
    sys.exit("server.py: no such model")
from tests.client.fake_server import fake_server, half_a_turn, whole_turn
name, _, token = os.environ["STREAMING_TOKENS"].partition(":")
def gate(connection, request):
    known = request.headers["Authorization"] == f"Bearer {token}" and name == "client" and len(token) > 40
    return None if known else connection.respond(401, "unauthorized: no\\n")
async def main():
    async with fake_server(half_a_turn if args.model == "endless" else whole_turn, frames=3, gate=gate) as server:
        with open(sys.path[0] + "/pid", "w") as file:
            file.write(str(os.getpid()))
        print(f"listening on {server.url}/v1/continue", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    soundfile.write(path, 0.1 * np.sin(np.arange(4_800)), 48_000)
    return path


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A directory with a client and, beside it, the fake server that it starts."""
    place = tmp_path / "installed"
    place.mkdir()
    (place / "client.py").write_text(CLIENT)
    (place / "server.py").write_text(textwrap.dedent(OWN_SERVER))
    return place


def environment() -> dict[str, str]:
    """What is for other servers must not reach the client's own; how it computes must."""
    ours = {"STREAMING_NATIVE": "0", "STREAMING_PORT": "1", "STREAMING_TLS_CERT": "/nowhere"}
    return {**os.environ, **ours, "PYTHONPATH": str(ROOT)}


def run_client(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(installed / "client.py"), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "reason"),
        [
            (["--max-seconds", "0"], "above 0 and at most 3600"),
            (["--max-seconds", "-1"], "above 0"),
            (["--max-seconds", "nan"], "above 0"),
            (["--max-seconds", "soon"], "not a number"),
            (["--temperature", "-0.1"], "at least 0"),
            (["--temperature", "inf"], "at most 10"),
            (["--top-k", "1.5"], "not a number"),
            (["--top-p", "0"], "above 0 and at most 1"),
            (["--seed", "-1"], "at least 0"),
            (["--turn", "later"], "invalid choice"),
            (["--pace", "fast"], "needs a file (--input)"),
            (["a.wav", "--input", "a.wav"], "give one"),
            ([" "], "WAV is empty"),
            (["a.wav", "--output", "./a.wav"], "same file"),
            (["a.wav", "--push-to-talk"], "microphone mode"),
            (["--input", "a.wav", "--pace", "fast", "--turn", "vad"], "needs --pace realtime"),
            (["--input", "a.wav", "--input-device", "1"], "microphone mode"),
            (["--url", "ws://h", "--model", "demo"], "has its model already"),
            (["--output", "a.wav", "--record", "./a.wav"], "same file"),
            (["--input", "a.wav", "--output", "./a.wav"], "same file"),
            (["--input", ""], "--input is empty"),
            (["--url", " "], "--url is empty"),
            (["--input-device", ""], "--input-device is empty"),
            (["--url", "ws://h", "--codec", "x"], "has its model already"),
            (["--input", "a.wav", "--push-to-talk"], "microphone mode"),
            (["--input", "a.wav", "--echo-cancellation"], "microphone mode"),
            (["--push-to-talk", "--turn", "vad"], "choose one"),
            (["--transport", "mp3"], "invalid choice"),
        ],
    )
    def test_what_makes_no_sense_is_said_at_once(
        self, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as info:
            client.main(flags)
        assert info.value.code == 2
        assert reason in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "reason"),
        [
            (["--input", "nowhere.wav"], "nowhere.wav: no such file"),
            (["--input", __file__], "not an audio file"),
            (["--input", "{speech}", "--output", "{speech}/x/a.wav"], "there is no directory"),
            (["--input", "{speech}", "--record", "/dev/null"], "not a file that can be replaced"),
            (["--input", "{speech}", "--url", "ftp://somewhere"], "not a server's address"),
            (["{speech}", "--url", "http://127.0.0.1:9/"], "nothing answers"),
            (["{speech}", "--url", "127.0.0.1:9"], "nothing answers"),
            (["--input", "{speech}", "--url", "ws://127.0.0.1:9"], "nothing answers"),
        ],
    )
    def test_errors_of_the_user_are_one_line(
        self, flags: list[str], reason: str, speech: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert client.main([flag.format(speech=speech) for flag in flags]) == 1
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1


class TestDevices:
    def test_devices_are_listed(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        install(monkeypatch)
        assert client.main(["--list-devices"]) == 0
        assert "USB Headset" in capsys.readouterr().out

    def test_devices_are_listed_as_json(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        install(monkeypatch)
        assert client.main(["--list-devices", "--json"]) == 0
        devices = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [device["number"] for device in devices] == [0, 1, 2, 3]

    @pytest.mark.parametrize("flags", [["--list-devices"], []])
    def test_without_sounddevice_it_says_what_to_install(
        self, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The microphone mode started a server before it found out that there is no microphone."""
        monkeypatch.setitem(sys.modules, "sounddevice", None)
        assert client.main(flags) == 1
        assert "pip install sounddevice" in capsys.readouterr().err

    def test_an_unknown_device_is_told(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        install(monkeypatch)
        assert client.main(["--input-device", "bluetooth"]) == 1
        assert "no input device 'bluetooth'" in capsys.readouterr().err

    def test_a_conversation_that_ends_before_it_began(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        install(monkeypatch)
        monkeypatch.setattr("streaming.terminal.start.Keyboard", lambda **_: _nothing())
        monkeypatch.setattr("streaming.terminal.connecting.own_server", lambda *_, **__: _url_of_a_server(never))
        monkeypatch.setattr("streaming.terminal.connecting.server_command", lambda *_: [])
        assert client.main(["--json", "--output", str(tmp_path / "a.wav")]) == 1
        captured = capsys.readouterr()
        events = [json.loads(line) for line in captured.out.splitlines()]
        assert "Wear headphones" in events[0]["message"]
        assert "no continuation came whole" in captured.err
        assert not list(tmp_path.iterdir())

    def test_a_conversation_with_a_microphone(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Both devices have rates of their own, 48,000 and 44,100 Hz, and the conversation is kept to the sample."""
        install(monkeypatch, live=True)
        view = Witness()

        async def keys() -> AsyncIterator[Key]:
            for turn in (1, 2):
                await view.until("listening", turn)
                await asyncio.sleep(0.1)
                yield Key.ENTER
            await view.until("turn", 2)

        monkeypatch.setattr("streaming.terminal.start.Keyboard", lambda **_: keys())
        monkeypatch.setattr("streaming.terminal.start.choose_view", lambda **_: view)
        monkeypatch.setattr("streaming.terminal.connecting.own_server", lambda *_, **__: _url_of_a_server(whole_turn))
        monkeypatch.setattr("streaming.terminal.connecting.server_command", lambda *_: [])
        assert client.main(["--output", str(tmp_path / "a.wav"), "--record", str(tmp_path / "b.wav")]) == 0
        assert view.names()[-1] == "summary"
        assert view.events[-1][1]["turns"] == 2
        assert view.events[-1][1]["first_audible_ms"] > 0
        assert soundfile.info(tmp_path / "a.wav").frames == 2 * 5 * FRAME
        record, _ = soundfile.read(tmp_path / "b.wav", dtype="int16")
        sent, heard = (track[track > 10] for track in record.T)  # where it fades in and out, most of that, too
        assert np.median(sent) == pytest.approx(3_277, abs=10)
        underruns = view.events[-1][1]["underruns"]  # of a busy machine: the sound fades out and in once more
        assert len(heard) == pytest.approx(2 * 5 * FRAME, abs=200 * (1 + underruns))


class TestLostSessions:
    def test_a_conversation_goes_on_where_the_server_has_lost_it(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """An outage longer than the server keeps sessions ended the client, in mid-conversation."""
        install(monkeypatch, live=True)
        view = Witness()

        async def test() -> None:
            async def talk() -> AsyncIterator[Key]:
                await view.until("listening")
                await asyncio.sleep(0.3)
                yield Key.ENTER
                await view.until("turn")
                proxy.open = False
                proxy.cut()
                await view.until("session_lost")
                await asyncio.sleep(0.2)
                proxy.open = True
                await view.until("session", 2)
                await asyncio.sleep(0.5)
                yield Key.ENTER
                await view.until("turn", 2)

            class Keys:
                """As the keyboard, it outlives whoever waits for it."""

                def __init__(self) -> None:
                    self._keys = talk()
                    self._next: asyncio.Future[Key] | None = None

                def __aiter__(self) -> Keys:
                    return self

                async def __anext__(self) -> Key:
                    self._next = self._next or asyncio.ensure_future(self._keys.__anext__())
                    key = await asyncio.shield(self._next)
                    self._next = None
                    return key

            monkeypatch.setattr("streaming.terminal.start.Keyboard", lambda **_: Keys())
            monkeypatch.setattr("streaming.terminal.start.choose_view", lambda **_: view)
            with Engine(StubStep(2), "stub") as engine, serving(engine, resume_s=0.4) as server:
                async with cut_proxy(server.url) as proxy:
                    flags = ["--url", proxy.url, "--output", str(tmp_path / "a.wav"), "--max-seconds", "0.4"]
                    await asyncio.wait_for(start.converse(client.parse(flags), "client.py"), 30)

        asyncio.run(test())
        assert view.events[-1][0] == "summary"
        assert view.events[-1][1]["turns"] == 2
        assert soundfile.info(tmp_path / "a.wav").frames == 2 * 5 * FRAME


class TestTransport:
    @pytest.mark.parametrize(
        ("flags", "wanted"),
        [
            ([], ("float32", "pcm16")),
            (["--transport", "pcm"], ("float32", "pcm16")),
            (["--transport", "opus"], ("opus", "float32", "pcm16")),
        ],
    )
    def test_on_this_machine_opus_is_only_by_request(
        self, flags: list[str], wanted: tuple[str, ...], speech: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if not opus_available():
            pytest.skip("no libopus")

        async def test() -> None:
            async with fake_server() as server:
                arguments = ["--url", server.url, "--input", str(speech), "--pace", "fast", "--json", *flags]
                await start.stream_file(client.parse(arguments), "client.py")
                assert server.peers[0].start.codecs == wanted

        asyncio.run(test())
        assert ("the server has no Opus" in capsys.readouterr().out) is ("opus" in wanted)

    def test_a_file_that_sixteen_bits_hold_goes_as_it_is(self, tmp_path: Path) -> None:
        """Pins twice the bytes for what is the same; another file loses nothing on its way, either (above)."""
        path = tmp_path / "plain.wav"
        soundfile.write(path, 0.1 * np.sin(np.arange(4_800)), 24_000, subtype="PCM_16")

        async def test() -> None:
            async with fake_server() as server:
                arguments = ["--url", server.url, "--input", str(path), "--pace", "fast", "--json"]
                await start.stream_file(client.parse(arguments), "client.py")
                assert server.peers[0].start.codecs == ("pcm16",)

        asyncio.run(test())

    @pytest.mark.parametrize(("url", "wanted"), [("ws://127.0.0.1:1", False), ("wss://example.org", True)])
    def test_to_other_machines_it_is_opus_where_there_is(
        self, url: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        args, server = client.parse(["--url", url]), connecting.Server(url, None)
        for there in (True, False):
            monkeypatch.setattr("streaming.terminal.connecting.opus_available", lambda there=there: there)
            assert connecting.wants_opus(args, server) is (wanted and there)

    def test_opus_without_the_package_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("streaming.protocol.opus.opus_available", lambda: False)
        with pytest.raises(SystemExit):
            client.main(["--transport", "opus"])
        assert "pip install opuslib-next-bundled" in capsys.readouterr().err


async def _nothing() -> AsyncIterator[Key]:
    for nothing in list[Key]():
        yield nothing


@contextlib.asynccontextmanager
async def _url_of_a_server(script: Script) -> AsyncIterator[str]:
    async with fake_server(script) as server:
        yield server.url


class TestOwnServer:
    def test_a_file_is_continued_by_a_server_of_its_own(self, installed: Path, speech: Path) -> None:
        output = speech.with_name("out.wav")
        done = run_client(installed, "--input", str(speech), "--output", str(output), "--max-seconds", "1")
        assert done.returncode == 0, done.stderr
        events = {event["event"]: event for event in map(json.loads, done.stdout.splitlines())}
        assert events["server"]["url"].startswith("ws://127.0.0.1:")
        assert events["summary"]["whole"] is True
        assert events["summary"]["first_audible_ms"] > 0
        assert re.fullmatch(rf"client.py: 0.2 s in your voice -> {output}, first sound after \d+ ms\n", done.stderr)
        assert events["summary"]["sentence"] in done.stderr
        info = soundfile.info(output)
        assert (info.samplerate, info.channels, info.subtype, info.frames) == (24_000, 1, "PCM_16", 3 * FRAME)
        assert not alive(int((installed / "pid").read_text()))

    def test_what_is_kept_nowhere_is_said_so(self, installed: Path, speech: Path) -> None:
        """A file was streamed, and what came was thrown away without a word."""
        done = run_client(installed, str(speech), "--verbose")
        messages = [event.get("message", "") for event in map(json.loads, done.stdout.splitlines())]
        assert start.ONLY_TIMED in messages, "standard output is no terminal: it is not even played"
        sentence, figures = done.stderr.splitlines()
        assert re.fullmatch(r"client.py: 0.2 s in your voice, only timed, first sound after \d+ ms", sentence)
        assert "p95 between frames" in figures

    def test_json_alone_leaves_standard_error_empty(self, installed: Path, speech: Path) -> None:
        done = run_client(installed, "--input", str(speech), "--pace", "fast", "--json")
        assert (done.returncode, done.stderr) == (0, "")

    def test_a_server_that_does_not_start(self, installed: Path, speech: Path) -> None:
        done = run_client(installed, "--input", str(speech), "--model", "broken", "--output", str(speech) + ".out")
        assert done.returncode == 1
        assert "ended with status 1 before it listened" in done.stderr
        assert "no such model" in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(path.name for path in speech.parent.iterdir()) == ["installed", "speech.wav"]

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
    @pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143)])
    def test_ctrl_c_ends_the_server_too(self, installed: Path, speech: Path, name: str, status: int) -> None:
        """A server that outlives its client holds the model's memory until somebody looks."""
        output = speech.with_name("out.wav")
        process = subprocess.Popen(
            [
                *(sys.executable, str(installed / "client.py")),
                *("--input", str(speech), "--model", "endless", "--output", str(output)),
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if json.loads(line)["event"] == "speaking":
                    break
            process.send_signal(getattr(signal, name))
            _, error = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == status, error
        assert "Traceback" not in error
        assert not alive(int((installed / "pid").read_text()))
        assert not output.exists()


class TestWithoutTorch:
    @staticmethod
    async def run_without_torch(*arguments: str) -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "client.py"), *arguments),
            env=environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, error = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode, out.decode(), error.decode()

    def test_help_is_shown(self) -> None:
        status, out, error = asyncio.run(self.run_without_torch("--help"))
        assert status == 0, error
        assert "--list-devices" in out

    def test_a_file_is_continued(self, speech: Path) -> None:
        """A laptop that only speaks and listens should not have to install a gigabyte."""

        async def test() -> tuple[int | None, str, str]:
            async with fake_server() as server:
                return await self.run_without_torch("--url", server.url, "--input", str(speech), "--pace", "fast")

        status, out, error = asyncio.run(test())
        assert status == 0, error
        progress, _, session, *_ = map(json.loads, out.splitlines())
        assert progress["message"].startswith("connecting to ws://127.0.0.1:")
        assert session["session"] == STARTED.session

    def test_a_reader_that_goes_away_is_no_traceback(self, speech: Path) -> None:
        async def test() -> tuple[int | None, str]:
            async with fake_server() as server:
                reading, writing = os.pipe()
                os.close(reading)
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, str(ROOT / "client.py"), "--url", server.url, "--input", str(speech)),
                    env=environment(),
                    stdout=writing,
                    stderr=asyncio.subprocess.PIPE,
                )
                os.close(writing)
                _, error = await asyncio.wait_for(process.communicate(), 60)
                return process.returncode, error.decode()

        assert asyncio.run(test()) == (1, "")


@pytest.mark.parametrize(
    ("model", "notice", "voice", "turns", "files", "heard", "said"),
    [
        ("x/y", None, None, 1, ["a.wav"], False, "5.0 s in your voice -> a.wav, first sound after 40 ms"),
        (
            "x/y",
            None,
            None,
            1,
            ["a.wav", "b.wav"],
            True,
            "5.0 s in your voice -> a.wav and b.wav, first sound after 40 ms",
        ),
        ("demo", "it recites", None, 1, [], True, "5.0 s by the demo model, only played, first sound after 40 ms"),
        (
            "demo",
            "it recites",
            "a deep voice",
            1,
            ["a.wav"],
            False,
            "5.0 s in a deep voice -> a.wav, first sound after 40 ms",
        ),
        (
            "demo",
            "it recites",
            "a deep voice",
            3,
            [],
            True,
            "3 turns by the demo model, only played, first sound after 40 ms",
        ),
        ("random:8b", "noise", None, 3, [], False, "3 turns by random:8b, only timed, first sound after 40 ms"),
    ],
)
def test_a_result_is_one_sentence(
    model: str, notice: str | None, voice: str | None, turns: int, files: list[str], heard: bool, said: str
) -> None:
    """The result was nine figures in three lines, and promised your own voice, which the demo does not keep."""
    started = msgspec.structs.replace(STARTED, model=model, notice=notice)
    report = TurnReport(1, "end", True, 5.02, 38.0, 40.2, 80.0, 0, 1.2, 0.4, 30.0, 20.0, voice)
    assert start.result(started, turns, report, files, heard=heard) == said
