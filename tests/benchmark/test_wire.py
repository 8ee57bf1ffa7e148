"""`wire`: both servers, as processes of their own, move the same frames. What they cost is no test's business."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import cast

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection, serve

from streaming.audio import FRAME
from streaming.benchmark import wire
from streaming.benchmark.__main__ import main
from streaming.errors import ContinuationError, ProtocolError
from streaming.protocol.messages import Played, Speak, decode_client
from streaming.protocol.opus import opus_available

pytest.importorskip("silero_vad")
pytest.importorskip("onnxruntime")


def test_both_servers_move_the_same_frames(tmp_path: Path) -> None:
    """A server that refused its sessions, or a turn that never came, made a cheap frame of a missing one."""
    path = tmp_path / "wire.json"
    assert main(["wire", "--sessions", "2", "--seconds", "0.5", "--rounds", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    names = ["native, PCM", *["native, Opus"] * opus_available(), "OpenAI", "hands-free"]
    assert [row["traffic"] for row in rows] == names
    for row in rows:
        assert row["frames"] == row["bare_frames"] == 2 * 2 * 3, row
        assert row["server_ms"] >= row["lock_ms"] > 0 and row["bare_ms"] > 0
        assert 0 <= row["system_ms"] < row["server_ms"]
        assert (row["lock_ms"] < row["server_ms"]) == (row["traffic"] in ("native, Opus", "hands-free")), row


def test_one_kind_of_traffic_can_be_measured_alone(tmp_path: Path) -> None:
    path = tmp_path / "wire.json"
    flags = ("--only", "openai", "--sessions", "1", "2", "--seconds", "0.5", "--rounds", "1")
    assert main(["wire", *flags, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["traffic"], row["sessions"]) for row in rows] == [("OpenAI", 1), ("OpenAI", 2)]


def test_nothing_is_reported_as_played_before_it_has_come() -> None:
    """Reports went by the clock alone. A server that was late, as one with 128 sessions was, believes no more than it
    has sent: it waited for a report that the client had made already, and the measurement waited for ever.
    """

    class Socket:
        def __init__(self) -> None:
            self.sent: list[Speak | Played] = []

        async def send(self, data: str | bytes) -> None:
            if isinstance(data, str):
                message = decode_client(data)
                assert isinstance(message, Speak | Played)
                self.sent.append(message)

    async def scenario() -> None:
        socket, come = Socket(), wire._Come()
        talk = wire._Talk(next(iter(wire._traffics(3))), turns=1, turn_frames=3)
        client = cast(ClientConnection, socket)
        talking = asyncio.create_task(wire._talk(client, False, talk, 0.0, come, wire._Count()))
        while not socket.sent:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # longer than the turn
        assert socket.sent == [Speak(turn=1)]
        for _ in range(3):
            come.frames.release()
        come.turns.release()
        await talking
        assert socket.sent[1:] == [Played(turn=1, samples=frames * FRAME) for frames in (1, 2, 3)]

    asyncio.run(scenario())


class _Unmeasured:
    """A server whose sessions begin, and then either say nothing or end."""

    bare = False

    def __init__(self, url: str) -> None:
        self.url = url

    async def spent(self) -> wire._Spent:
        return wire._Spent(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("ends", "error", "says"), [(False, ContinuationError, "stuck"), (True, ProtocolError, "ended")]
)
def test_a_measurement_of_sessions_that_do_not_go_on_ends(
    monkeypatch: pytest.MonkeyPatch, ends: bool, error: type[Exception], says: str
) -> None:
    """A turn that never came was waited for, for ever: nobody could tell a slow measurement from one that hung. A
    session that the server ended was a traceback of several tasks.
    """
    monkeypatch.setattr(wire, "_PATIENCE", 0.0)
    monkeypatch.setattr(wire, "_PATIENCE_S", 1.0)

    async def handle(socket: ServerConnection) -> None:
        await socket.recv()
        await socket.send('{"type":"session.started"}')
        if not ends:
            await socket.wait_closed()

    async def scenario() -> None:
        async with serve(handle, "127.0.0.1", 0) as server:
            url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            talk = wire._Talk(next(iter(wire._traffics(3))), turns=1, turn_frames=3)
            await wire._frame_ms(cast(wire._Server, _Unmeasured(url)), talk, 2, wire._Count())

    with pytest.raises(error, match=says):
        asyncio.run(scenario())
