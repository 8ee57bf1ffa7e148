"""`deploy/ray/` under a real Ray Serve behind its HAProxy: two replicas on this machine, whose servers have no weights.

Skips itself where Ray is not installed: `pip install -e ".[dev,ray]"`. Two minutes, most of them Serve's own waits.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streaming.audio import FRAME
from streaming.client.client import Audio, ContinuationClient
from streaming.client.dialing import SessionLostError
from streaming.client.resumable_connection import ConnectionLost
from streaming.protocol import messages
from streaming.protocol.messages import SessionStart
from streaming.server.door.bind import BindError
from tests.deploy.talk import Talk
from tests.server.live_server import Client, client, get, run

if find_spec("ray") is None:
    pytest.skip("Ray comes with the extra [ray]", allow_module_level=True)

from tests.deploy.ray_cluster import METRICS_PORT, Cluster, cluster, settings, until

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
SPEECH = np.zeros(5 * FRAME, np.int16)
LONG = SessionStart(max_seconds=120)
RESUMABLE = SessionStart(max_seconds=120, resume=True)
_SETTLE_S = 3.0
"""For the proxy to learn of new replicas, and of full ones."""


@pytest.fixture(scope="module")
def service() -> Iterator[Cluster]:
    with cluster() as one:
        yield one


async def _talk(session: Client) -> None:
    """From here on it is spoken to."""
    await session.hear(SPEECH)
    await session.send(messages.Speak(turn=1))
    await session.expect(messages.TurnSpeaking)
    await session.expect_audio(1, 5)


async def _listen(session: Client) -> None:
    """Take all of a first turn: who is spoken to and does not listen is given up after 40 s."""
    while True:
        await session.expect_audio(1, len(session.audio[1]) + 1)


async def _late_ms(session: Client, seconds: float) -> float:
    """Return the longest wait for a frame, in so long a time, of a session that is listened to."""
    heard, start = len(session.audio[1]), time.monotonic()
    latest, longest = start, 0.0
    while time.monotonic() < start + seconds:
        await asyncio.sleep(0.005)
        longest = max(longest, time.monotonic() - latest)
        if len(session.audio[1]) > heard:
            heard, latest = len(session.audio[1]), time.monotonic()
    return 1000 * longest


def test_sessions_spread_and_a_replica_that_is_killed_takes_its_own_with_it(service: Cluster) -> None:
    """The other replica's do not notice; its own are told by a resume that they are gone, and begin anew elsewhere."""
    service.deploy(num_replicas=2)
    assert len(until(lambda: len(service.replicas()) == 2 and service.replicas())) == 2
    until(lambda: service.get("/health/ready")[0] == 200)

    async def full() -> None:
        """All four slots of two replicas are found, and the fifth is refused at once, in words."""
        async with AsyncExitStack() as stack:
            for _ in range(4):
                await stack.enter_async_context(_enter(service.url))
            await asyncio.sleep(_SETTLE_S)
            assert await _refused(service.url) == ("full", 1013)
        await asyncio.to_thread(until, lambda: service.get("/health/ready")[0] == 200)
        async with connect(service.url.replace("/v1/continue", "/v1/realtime?model=m")) as socket:
            assert json.loads(await socket.recv())["type"] == "session.created"
        assert "<!doctype html>" in (await asyncio.to_thread(service.get, "/"))[1]

    async def listen(session: ContinuationClient, seconds: float) -> float:
        """Return the longest wait for a frame, in seconds; endless where the session was lost."""
        until_s = latest = time.monotonic()
        longest, broken = 0.0, False
        try:
            async for event in session.events():
                broken = broken or isinstance(event, ConnectionLost)
                if isinstance(event, Audio):
                    longest, latest = max(longest, time.monotonic() - latest), time.monotonic()
                if latest > until_s + seconds:
                    return longest
        except SessionLostError as error:
            told = "session_elsewhere" in str(error)
        assert broken and told
        return math.inf

    async def kill() -> None:
        await asyncio.sleep(_SETTLE_S)
        async with (
            ContinuationClient.connect(service.url, RESUMABLE) as mine,
            ContinuationClient.connect(service.url, RESUMABLE) as hers,
        ):
            for session in (mine, hers):
                await session.send(SPEECH)
                await session.speak()
            listening = [asyncio.create_task(listen(session, 4.0)) for session in (mine, hers)]
            await asyncio.sleep(1.0)
            os.kill(min(service.replicas().values()), signal.SIGKILL)
            kept, lost = sorted(await asyncio.gather(*listening))
            assert lost == math.inf, "both sessions were on one replica"
            assert kept < 1.0, "the other replica's session noticed"
            async with ContinuationClient.connect(service.url, LONG) as anew:
                await anew.send(SPEECH)
        await asyncio.to_thread(until, lambda: len(service.replicas()) == 2)  # Serve starts another one

    run(full())
    run(kill(), 120)


def test_ray_has_the_metrics_of_every_replica(service: Cluster) -> None:
    """Behind one address each scrape would meet another replica."""

    def told() -> bool:
        lines = get(f"http://127.0.0.1:{METRICS_PORT}/metrics").decode().splitlines()
        slots = [line for line in lines if line.startswith("ray_streaming_slots{")]
        buckets = [line for line in lines if line.startswith("ray_streaming_step_seconds_bucket{") and 'le="' in line]
        return all(any(f'replica="{name}"' in line for line in slots) for name in service.replicas()) and bool(buckets)

    until(told, 60)


def test_a_client_that_sends_without_end_is_held_back(service: Cluster) -> None:
    """Serve reads sockets ahead into a queue without bound; what is not listened to has to stay with the client."""

    async def flood() -> int:
        start = SessionStart(pace="fast", lag="wait")
        async with client(service.url, start) as session:
            taken = 0
            piece = np.zeros(25 * FRAME, np.int16)
            try:
                async with asyncio.timeout(8):
                    while taken < 200 * 2**20:
                        await session.hear(piece, piece=len(piece))
                        taken += piece.nbytes
            except TimeoutError:
                pass
            session.socket.transport.abort()
            return taken

    taken = run(flood())
    print(f"{taken / 2**20:.0f} MiB were taken")
    assert taken < 60 * 2**20


def test_a_rolling_redeploy_cuts_no_turn(service: Cluster) -> None:
    """Serve closes the sockets of an old replica when its time is over, in mid-word, and tells it only afterwards."""
    before = set(service.replicas())
    turns, ends = [0], [0]
    done = asyncio.Event()

    async def converse() -> None:
        """One turn after the other; when told that the server stops, in another session."""
        while not done.is_set():
            async with _enter(service.url, SessionStart(max_seconds=2)) as session:
                with suppress(ConnectionClosed):
                    for turn in itertools.count(1):
                        await session.hear(SPEECH, turn)
                        await session.speak(turn)
                        if done.is_set():
                            return
                assert all(len(frames) == 25 for frames in session.audio.values()), "in mid-turn"
                closed = session.socket.protocol.close_rcvd
                assert closed is not None and closed.code == 1001
                turns[0] += len(session.audio)
                ends[0] += 1

    def redeploy() -> None:
        service.deploy(num_replicas=2)
        until(lambda: len(service.replicas()) == 2 and not before & set(service.replicas()))

    async def scenario() -> None:
        conversations = asyncio.gather(converse(), converse())
        await asyncio.sleep(_SETTLE_S)
        try:
            await asyncio.to_thread(redeploy)
        finally:
            done.set()
        await conversations

    run(scenario(), 240)
    assert ends[0] >= 2, "both replicas were replaced, and nobody was told"
    assert turns[0] >= 4


def test_a_rolling_redeploy_with_a_session_store_cuts_no_conversation(service: Cluster, tmp_path: Path) -> None:
    """Whoever is on a replica that goes comes back at the other one. Pins a relay that tells a client that its session
    is over, and any sample that is lost or said twice on the way.
    """
    key = tmp_path / "key"
    key.write_text("k" * 32)
    more: dict[str, object] = {"session-store": str(tmp_path / "store"), "session-key": str(key)}

    def redeploy() -> None:
        before = set(service.replicas())
        service.deploy(num_replicas=2, more=more)
        until(lambda: len(service.replicas()) == 2 and not before & set(service.replicas()), 180)

    redeploy()
    until(lambda: service.get("/health/ready")[0] == 200)

    async def scenario() -> None:
        await asyncio.sleep(_SETTLE_S)
        done, talks = asyncio.Event(), [Talk(), Talk()]
        talking = asyncio.gather(*(talk.run(service.url, done, 10**6, "realtime") for talk in talks))
        await asyncio.sleep(1.0)
        try:
            await asyncio.to_thread(redeploy)
        finally:
            done.set()
        await talking
        stayed = Talk()
        await stayed.run(service.url, asyncio.Event(), max(len(talk.turns) for talk in talks), "fast")
        for talk in talks:
            assert talk.turns == stayed.turns[: len(talk.turns)], "to the sample"
            assert talk.lost == len(talk.away_ms) >= 1, "both replicas were replaced"

    run(scenario(), 400)


def test_one_replica_becomes_two_under_load_and_one_again_by_the_sessions_own_rules(service: Cluster) -> None:
    """By requests, a session that only listens would count as one that is spoken to by five; by free slots, the
    replicas come before the last slot is gone.
    """
    policy = {"policy_function": "deploy.ray.app:FreeSlots", "policy_kwargs": {"spare": 1}}
    scaling = {"min_replicas": 1, "max_replicas": 2, "look_back_period_s": 2, "metrics_interval_s": 1}
    service.deploy(autoscaling_config={**scaling, "upscale_delay_s": 0, "downscale_delay_s": 1, "policy": policy})
    until(lambda: len(service.replicas()) == 1 and service.get("/health/ready")[0] == 200, 120)

    async def scenario() -> None:
        async with client(service.url, LONG) as first, client(service.url, LONG) as second:
            await asyncio.gather(_talk(first), _talk(second))
            listening = asyncio.gather(_listen(first), _listen(second))
            await asyncio.to_thread(until, lambda: len(service.replicas()) == 2)
            # The proxy was replaced and counts no sockets of the full one: it would send all newcomers there.
            await asyncio.sleep(_SETTLE_S)
            async with client(service.url, LONG), client(service.url, LONG):
                assert await _late_ms(first, 2.0) < 1000
            assert not listening.done(), "a session was cut"
            listening.cancel()
        await asyncio.sleep(_SETTLE_S)
        async with client(service.url, SessionStart(max_seconds=2)) as last:
            await asyncio.to_thread(until, lambda: len(service.replicas()) == 1)
            try:
                await _talk(last)
                await last.expect(messages.TurnDone)
            except (ConnectionClosed, AssertionError):  # it had its session on the replica that went
                closed = last.socket.protocol.close_rcvd
                assert closed is not None and closed.code == 1001

    run(scenario(), 240)


def test_settings_that_would_break_promises_are_refused() -> None:
    """Each of them is silent, and does harm weeks later."""
    from deploy.ray.app import SettingsError, check_settings

    local: dict[str, object] = {"host": "127.0.0.1"}
    check_settings(local, settings())
    for name in settings():
        if name not in ("PYTHONPATH", "RAY_AUTH_MODE", "RAY_SERVE_PORT_QUARANTINE_S") and "HEALTH_CHECK" not in name:
            with pytest.raises(SettingsError, match=name):
                check_settings(local, settings() | {name: "7"})
    with pytest.raises(SettingsError, match="drain-seconds"):
        check_settings(local | {"drain-seconds": 60}, settings())
    with pytest.raises(BindError, match="anyone there could open a session"):
        check_settings({"insecure-plaintext": True}, settings())
    tokens = settings() | {"STREAMING_TOKENS": "alice:alices-own-token-1234"}
    with pytest.raises(BindError, match="in the clear"):
        check_settings({}, tokens)
    check_settings({"insecure-plaintext": True}, tokens)


def test_as_many_replicas_as_leave_slots_free() -> None:
    """Its sum of what each replica says: too few by one, and a full service never grows."""
    from deploy.ray.app import FreeSlots

    def wanted(taken: list[float], spare: int = 2, slots: float = 4) -> int:
        metrics = {"slots": dict.fromkeys(range(len(taken)), slots), "taken": dict(enumerate(taken))}
        context = SimpleNamespace(aggregated_metrics=metrics, running_replicas=range(len(taken)), target_num_replicas=7)
        return FreeSlots(spare)(context)[0]  # type: ignore[arg-type]

    assert [wanted([taken]) for taken in (0, 2, 2.5, 3, 4)] == [1, 1, 2, 2, 2]
    assert wanted([4, 4]) == 3 and wanted([4, 0, 0]) == 2 and wanted([4, 4], spare=5) == 4
    assert wanted([4, 0], slots=0) == 7, "nobody has said how many there are"
    with pytest.raises(ValueError, match="at least 1"):
        FreeSlots(0)


def test_the_metrics_are_read_with_the_token_that_is_for_them(tmp_path: Path) -> None:
    """From the variable or from the file, whichever holds the tokens."""
    from deploy.ray.app import _metrics_token

    assert _metrics_token({}, {}) is None
    assert _metrics_token({}, {"STREAMING_TOKENS": "alice:for-alice, metrics:for-them"}) == "for-them"
    assert _metrics_token({}, {"STREAMING_TOKENS": "not-metrics:for-alice"}) is None
    path = tmp_path / "tokens"
    path.write_text("# metrics:old\nalice:for-alice\nmetrics: for-them\n")
    assert _metrics_token({"tokens": str(path)}, {}) == "for-them"


def test_the_config_is_serves_own() -> None:
    """A key that Serve does not know, or a policy that cannot be found, would be noticed in production."""
    from ray.serve.schema import ServeDeploySchema

    given: dict[str, Any] = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text(encoding="utf-8"))
    schema = ServeDeploySchema(**given)
    deployment = given["applications"][0]["deployments"][0]
    assert schema.applications[0].deployments[0].name == deployment["name"]
    draining_s = float(settings()["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"])
    assert deployment["graceful_shutdown_timeout_s"] > draining_s + 5


@asynccontextmanager
async def _enter(url: str, start: SessionStart = LONG) -> AsyncIterator[Client]:
    """A session, as soon as there is one to be had."""
    async with AsyncExitStack() as stack:
        for patience in range(20, -1, -1):
            try:
                session = await stack.enter_async_context(client(url, start))
                break
            except (ConnectionClosed, InvalidStatus):
                if not patience:
                    raise
                await asyncio.sleep(0.5)
        yield session


async def _refused(url: str) -> tuple[str, int]:
    """Why a newcomer is refused, and the code that the socket is closed with."""
    async with connect(url, compression=None) as socket:
        await socket.send(messages.encode(LONG))
        said = [json.loads(data) async for data in _until_closed(socket)]
        assert [message["type"] for message in said] == ["session.refused"]
        assert socket.protocol.close_rcvd is not None
        return said[0]["code"], socket.protocol.close_rcvd.code


async def _until_closed(socket: ClientConnection) -> AsyncIterator[str | bytes]:
    with suppress(ConnectionClosed):
        async for data in socket:
            yield data
