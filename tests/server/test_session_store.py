"""Sessions that outlive their server: a store that servers share, and clients that come back to any of them."""

from __future__ import annotations

import asyncio
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from streaming.audio import FRAME
from streaming.client.client import Audio, ContinuationClient
from streaming.client.dialing import ServerAddress
from streaming.client.resumable_connection import ConnectionLost, ConnectionRestored
from streaming.engine.engine import Engine
from streaming.errors import SnapshotError
from streaming.protocol.messages import (
    SamplingOptions,
    SessionRefused,
    SessionResume,
    SessionStart,
    SessionStarted,
    TurnDone,
    decode_server,
    encode,
)
from streaming.server import session_store
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import Gatekeeper
from streaming.server.door.session_key import SessionKey
from streaming.server.door.tokens import Tokens
from streaming.server.session_store import (
    ClaimedEntry,
    SessionLostError,
    SessionMovingError,
    SessionStore,
    StoreError,
)
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, client, run, serving

KEY, OTHER_KEY = SessionKey("k" * 32), SessionKey("o" * 32)
SPEECH = (np.arange(20 * FRAME) % 251).astype(np.int16)
FRAMES = 30


def entries(folder: Path) -> list[Path]:
    """All but what says which servers live."""
    return [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "owners"]


def gone(folder: Path) -> bool:
    """Whether nothing is left a moment after a session is over."""
    deadline = time.monotonic() + 20
    while entries(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not entries(folder)


@contextmanager
def server(store: SessionStore | None, delay_s: float = 0.004) -> Iterator[LiveServer]:
    with ExitStack() as stack:
        step = StubStep(2, rewind_frames=16, delay_s=lambda: delay_s)
        engine = stack.enter_context(Engine(step, "stub"))
        yield stack.enter_context(serving(engine, store=store, resume_s=20.0, drain_s=20.0))


class Roaming:
    """A client whose address leads to whichever server is said."""

    def __init__(self, session: ContinuationClient) -> None:
        self.session, self.pieces, self.lost, self.restored = session, [np.zeros(0, np.int16)], 0, 0

    def goes_to(self, url: str) -> None:
        self.session._connection._address = ServerAddress.parse(url, None)

    async def until(self, samples: int = 10**9) -> bool:
        """Take what the server says until the turn is done, or so much has come. Return whether it is done."""
        async for event in self.session.events():
            match event:
                case Audio(pcm=pcm):
                    self.pieces.append(pcm)
                case ConnectionLost():
                    self.lost += 1
                case ConnectionRestored():
                    self.restored += 1
                case TurnDone():
                    return True
            if sum(map(len, self.pieces)) >= samples:
                return False
        raise AssertionError

    def heard(self) -> bytes:
        return np.concatenate(self.pieces).tobytes()


def start(pace: str, **more: object) -> SessionStart:
    options = {"pace": pace, "max_seconds": FRAMES / 12.5, "resume": True, "sampling": SamplingOptions(seed=5), **more}
    return SessionStart(**options)  # type: ignore[arg-type]


async def whole(url: str) -> bytes:
    """What a session says that never moves, at whatever pace."""
    async with ContinuationClient.connect(url, start("fast")) as session:
        stayed = Roaming(session)
        await session.send(SPEECH)
        await session.speak()
        await stayed.until()
        await session.send(SPEECH[:FRAME])
        await session.speak()
        await stayed.until()
        return stayed.heard()


@pytest.mark.parametrize(("pace", "key"), [("fast", None), ("fast", KEY), ("realtime", KEY)])
@pytest.mark.parametrize("when", ["listening", "half a frame", "speaking", "between turns"])
def test_a_session_goes_on_at_another_server_without_a_lost_or_doubled_sample(
    tmp_path: Path, pace: str, when: str, key: SessionKey | None
) -> None:
    """Pins a rolling restart that cuts conversations, at any moment of one."""

    async def talk(one: LiveServer, other: LiveServer) -> None:
        stayed = await whole(other.url)
        async with ContinuationClient.connect(one.url, start(pace)) as session:
            went = Roaming(session)
            went.goes_to(other.url)
            cut = {"listening": 10 * FRAME, "half a frame": 10 * FRAME + 700}.get(when, len(SPEECH))
            await session.send(SPEECH[:cut])
            if when in ("listening", "half a frame"):
                one.stop()
                await session.send(SPEECH[cut:])
                await session.speak()
            elif when == "speaking":
                await session.speak()
                assert not await went.until(7 * FRAME)
                one.stop()
            else:
                await session.speak()
                await went.until()
                one.stop()
            if when != "between turns":
                await went.until()
            await session.send(SPEECH[:FRAME])
            await session.speak()
            await went.until()
            assert went.heard() == stayed
            assert went.lost == went.restored == 1
            assert not [path for path in entries(tmp_path) if path.parent.name != "turns"], "it was not deleted"

    with server(SessionStore(str(tmp_path), key)) as one, server(SessionStore(str(tmp_path), key)) as other:
        run(talk(one, other))
        assert gone(tmp_path), "a session that is over is still there"


def test_a_session_whose_connection_breaks_is_found_at_any_server(tmp_path: Path) -> None:
    """Pins `session_elsewhere` where the balancer chooses another server."""

    async def talk(one: LiveServer, other: LiveServer) -> None:
        stayed = await whole(other.url)
        async with ContinuationClient.connect(one.url, start("fast")) as session:
            went = Roaming(session)
            await session.send(SPEECH)
            await session.speak()
            for place in (other, one, one, other):
                went.goes_to(place.url)
                await went.until(sum(map(len, went.pieces)) + 5 * FRAME)
                session._connection._socket.transport.abort()
            await went.until()
            await session.send(SPEECH[:FRAME])
            await session.speak()
            await went.until()
            assert went.heard() == stayed

    with server(SessionStore(str(tmp_path), KEY)) as one, server(SessionStore(str(tmp_path), KEY)) as other:
        run(talk(one, other))


class Broken(SessionStore):
    """A store that is full, or that hangs."""

    def __init__(self, folder: Path, hangs: bool) -> None:
        super().__init__(str(folder), None)
        self.hangs = hangs

    async def put(self, name: str, data: bytes) -> None:
        if self.hangs:
            await asyncio.sleep(10**6)
        raise StoreError("the session store failed: no space left")


@pytest.mark.parametrize("hangs", [False, True])
def test_a_store_that_fails_loses_no_session(tmp_path: Path, hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a full disk that cuts every conversation, when the server was only told to stop."""
    monkeypatch.setattr("streaming.server.native.session._PUT_DOWN_S", 0.5)

    async def talk(one: LiveServer) -> None:
        async with ContinuationClient.connect(one.url, start("realtime", max_seconds=2)) as session:
            went = Roaming(session)
            await session.send(SPEECH)
            await session.speak()
            await went.until(5 * FRAME)
            one.stop()
            assert await went.until()
            assert len(went.heard()) == 2 * 25 * FRAME and not went.lost

    with server(Broken(tmp_path, hangs)) as one:
        run(talk(one))


def test_one_of_two_servers_gets_a_session_and_the_claim_can_be_given_back(tmp_path: Path) -> None:
    """Pins a conversation that goes on twice."""

    async def test() -> None:
        one, other = SessionStore(str(tmp_path), KEY), SessionStore(str(tmp_path), KEY)
        await one.put("n" * 64, b"session")
        taken = await asyncio.gather(one.take("n" * 64), other.take("n" * 64), return_exceptions=True)
        assert sorted(type(each).__name__ for each in taken) == ["ClaimedEntry", "SessionMovingError"]
        await one.give_back("n" * 64)
        assert (await other.take("n" * 64)).data == b"session"  # type: ignore[union-attr]
        with pytest.raises(SessionMovingError):
            await one.take("n" * 64)
        await other.delete("n" * 64)
        await other.forget_turn("n" * 64)
        assert await one.take("n" * 64) is None and not entries(tmp_path)

    run(test())


def test_entries_are_private_encrypted_and_bound_to_their_name(tmp_path: Path) -> None:
    """Pins voices that whoever reads the disk can hear, and an entry that is passed off as another's."""

    async def test() -> None:
        store = SessionStore(str(tmp_path), KEY)
        await store.put("a" * 64, b"voice" * 100)
        assert stat.S_IMODE((tmp_path / "sessions").stat().st_mode) == 0o700
        (file,) = entries(tmp_path)
        assert b"voice" not in file.read_bytes()
        nonce, sealed = file.read_bytes()[:12], file.read_bytes()[12:]
        cipher = AESGCM(KEY.derive("stored session"))
        assert cipher.decrypt(nonce, sealed, b"a" * 64) == b"voice" * 100
        (tmp_path / "sessions" / ("b" * 64)).write_bytes(file.read_bytes())
        (tmp_path / "sessions" / ("c" * 64)).write_bytes(b"x")
        for name in ("b" * 64, "c" * 64):
            with pytest.raises(SnapshotError):
                await store.take(name)
        with pytest.raises(SnapshotError):
            await SessionStore(str(tmp_path), OTHER_KEY).take("a" * 64)
        assert (await store.take("a" * 64)).data == b"voice" * 100  # type: ignore[union-attr]

    run(test())


def test_what_nobody_comes_back_to_expires(tmp_path: Path) -> None:
    """Pins voices that are kept for ever, and an entry that goes although it was renewed."""

    async def test() -> None:
        store = SessionStore(str(tmp_path), None)
        await store.put("a" * 64, b"1")
        await store.put("b" * 64, b"1")
        await store.sweep(60, 0)
        await store.put("b" * 64, b"22")
        await store.sweep(60, 59)
        assert len(entries(tmp_path)) == 2
        await store.sweep(60, 61)
        assert [path.name[0] for path in entries(tmp_path)] == ["b"]

    run(test())


def test_a_store_that_cannot_be_is_told_in_a_sentence(tmp_path: Path) -> None:
    """Pins a traceback at the start, and a server that runs without the store it was given."""
    (tmp_path / "file").write_text("")
    for url in (str(tmp_path / "file"), "nosuch://place"):
        with pytest.raises(StoreError, match="session store"):
            SessionStore(url, None)


def test_a_server_that_was_taken_for_dead_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins a session that two servers have: one was only slow to say that it lives."""
    monkeypatch.setattr(session_store, "DEAD_S", 0.3)

    async def test() -> None:
        slow, other, third = (SessionStore(str(tmp_path), KEY) for _ in range(3))
        name = "n" * 64
        await slow.beat()
        await slow.put_turn(name, b"turn")
        for taker in (other, third):
            with pytest.raises(SessionMovingError):
                await taker.take(name)
        await asyncio.sleep(0.2)
        await slow.beat()
        await asyncio.sleep(0.2)
        with pytest.raises(SessionMovingError):
            await other.take(name)  # it has been seen alive since
        await asyncio.sleep(0.4)
        taken = await asyncio.gather(other.take(name), third.take(name), return_exceptions=True)
        assert sorted(type(each).__name__ for each in taken) == ["ClaimedEntry", "SessionMovingError"]
        (found,) = (each for each in taken if isinstance(each, ClaimedEntry))
        assert (found.data, found.owner) == (b"turn", slow.mark)
        for put in (slow.put_turn, slow.put):
            with pytest.raises(SessionLostError):
                await put(name, b"later")
        assert not list((tmp_path / "sessions").iterdir())

    run(test())


def test_finished_turns_of_living_servers_do_not_expire(tmp_path: Path) -> None:
    """Pins a long turn, in whose middle the turn before is deleted, and voices that outlive a dead server for ever."""

    async def test() -> None:
        living, dead = SessionStore(str(tmp_path), None), SessionStore(str(tmp_path), None)
        for store, name in ((living, "a" * 64), (dead, "b" * 64)):
            await store.beat()
            await store.put_turn(name, b"turn")
        for now in range(0, 300, 10):
            await living.beat()
            await living.sweep(60, now)
        assert [path.name[0] for path in entries(tmp_path)] == ["a"]
        assert [path.name for path in (tmp_path / "owners").iterdir()] == [living.mark]

    run(test())


def test_a_session_in_the_store_is_its_holders_alone_and_of_its_model_alone(tmp_path: Path) -> None:
    """Pins a voice that whoever learned a resume token gets, and one that is lost because the wrong one asked."""
    ann, bob = "a" * 24, "b" * 24
    bind = check_bind("127.0.0.1", None, tls=False, insecure_plaintext=False)

    def token(value: str) -> dict[str, object]:
        return {"additional_headers": {"Authorization": f"Bearer {value}"}}

    async def ask(url: str, resume: SessionResume, who: str) -> str:
        async with connect(url, compression=None, **token(who)) as socket:
            await socket.send(encode(resume))
            answer = decode_server(await socket.recv())
            socket.transport.abort()
            return answer.code if isinstance(answer, SessionRefused) else answer.type

    async def talk(one: LiveServer, other: LiveServer, unlike: LiveServer, revoked: LiveServer) -> None:
        async with client(one.url, start("fast"), **token(ann)) as session:
            (started,) = session.said
            assert isinstance(started, SessionStarted) and started.resume is not None
            await session.hear(SPEECH)
            one.stop()
            await session.socket.wait_closed()
        resume = SessionResume(token=started.resume.token, received=0, position=len(SPEECH))
        while (said := await ask(other.url, resume, bob)) == "session_moving":
            await asyncio.sleep(0.05)
        assert said == "session_expired"
        assert await ask(unlike.url, resume, ann) == "bad_snapshot"
        with pytest.raises(InvalidStatus) as refused:
            await ask(revoked.url, resume, ann)
        assert refused.value.response.status_code == 401
        assert await ask(other.url, resume, ann) == "session.resumed"

    with ExitStack() as stack:
        servers = []
        both = f"ann:{ann}\nbob:{bob}", "stub"
        for text, model in (both, both, (f"ann:{ann}", "another"), (f"bob:{bob}", "stub")):
            engine = stack.enter_context(Engine(StubStep(2, rewind_frames=16, identity=model), "stub"))
            keeper = Gatekeeper(bind, Tokens.from_text(text))
            store = SessionStore(str(tmp_path), KEY)
            servers.append(stack.enter_context(serving(engine, keeper, store=store, resume_s=20.0)))
        run(talk(*servers))


def moves_within(place: str) -> None:
    """Have a session go on at another server that shares this store."""

    async def talk(one: LiveServer, other: LiveServer) -> None:
        stayed = await whole(other.url)
        async with ContinuationClient.connect(one.url, start("fast")) as session:
            went = Roaming(session)
            went.goes_to(other.url)
            await session.send(SPEECH)
            await session.speak()
            await went.until(7 * FRAME)
            one.stop()
            await went.until()
            await session.send(SPEECH[:FRAME])
            await session.speak()
            await went.until()
            assert went.heard() == stayed

    with server(SessionStore(place, KEY)) as one, server(SessionStore(place, KEY)) as other:
        run(talk(one, other))


def test_a_store_in_memory_does_as_a_folder_does() -> None:
    """Pins a store that works in folders only, where fsspec promises any place."""
    moves_within("memory://sessions-of-a-test")
