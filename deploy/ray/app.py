"""The engine under Ray Serve: one `server.py` a replica, scaled by its free slots, drained by its own rules.

`serve deploy deploy/ray/serve.yaml`; docs/ray.md has what must be set before Ray is started.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve import Application, metrics
from ray.serve.config import AutoscalingContext

from deploy.ray.relay import HEALTHZ, Relay
from streaming.errors import StreamingError
from streaming.server.door.bind import check_bind
from streaming.server.door.gatekeeper import METRICS_READER
from streaming.server.door.tokens import ENVIRONMENT, load_tokens

_LOG = logging.getLogger("ray.serve")

DRAIN_SECONDS = 30.0
"""`server.py`'s own default of `drain-seconds`."""
NOTICE_S = 4.0
"""The time between Serve's draining of a replica and its server being told: for noticing, and for proxies."""
GOODBYE_S = 4.0
"""The time between the end of a server's last turns and the end of its last socket."""
_LOOK_S = 0.5
_METRICS_S = 5.0
_REQUIRED = {
    "RAY_SERVE_ENABLE_HA_PROXY": ("1", "or each message takes milliseconds, and none is told that its replica drains"),
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": ("0", "or what a client does not read is kept without bound"),
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": (
        "deploy.ray.relay:middlewares",
        "or what a client sends too fast is kept without bound, and full replicas get every newcomer",
    ),
}
_DRAINING_S = "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
_HARD_STOP_S = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
_LEAST_HARD_STOP_S = 3600.0


class SettingsError(StreamingError):
    """Serve was started with settings that would break what the server promises. The message says which."""

    code = "bad_settings"


def check_settings(options: Mapping[str, object], environment: Mapping[str, str]) -> None:
    """Raises `SettingsError`, or what `server.py` raises where others can reach a server without tokens.

    options: those of `server.py`; `host` is where Serve listens, all addresses unless it says otherwise.
    """
    wrong = [f"{key}={value}, {why}" for key, (value, why) in _REQUIRED.items() if environment.get(key) != value]
    drain_s = float(str(options.get("drain-seconds", DRAIN_SECONDS)))
    least_s = drain_s + NOTICE_S + GOODBYE_S
    if float(environment.get(_DRAINING_S, 30)) < least_s:
        wrong.append(f"{_DRAINING_S}={least_s:g} or more, or Serve cuts the turns that drain-seconds lets finish")
    if float(environment.get(_HARD_STOP_S, 120)) < _LEAST_HARD_STOP_S:
        wrong.append(f"{_HARD_STOP_S}={_LEAST_HARD_STOP_S:g} or more, or every change of replicas cuts longer sessions")
    if wrong:
        raise SettingsError("before Ray is started, set " + "; ".join(wrong))
    tokens = load_tokens(environment, _tokens_file(options, environment), time.monotonic())
    plaintext = options.get("insecure-plaintext") is True
    check_bind(str(options.get("host", "0.0.0.0")), tokens, tls=False, insecure_plaintext=plaintext)  # noqa: S104


@serve.deployment(
    max_ongoing_requests=100_000,  # the engine decides who gets in: a handshake past this number hangs
    health_check_period_s=5,
    health_check_timeout_s=10,
)
@serve.ingress()
class Replica:
    """A server, and what Serve asks of it."""

    def __init__(self, options: dict[str, Any]) -> None:
        check_settings(options, os.environ)
        passed = {key: value for key, value in options.items() if key not in ("host", "port", "insecure-plaintext")}
        self._relay = Relay(passed)
        self._token = _metrics_token(options, os.environ)
        self._tasks: list[asyncio.Task[None]] = []

    def __serve_build_asgi_app__(self) -> Relay:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(task) for task in (self._drain(), self._die(), self._report())]
        return self._relay

    async def check_health(self) -> None:
        status, _ = await self._relay.get("/health/live")
        if status != 200:
            raise RuntimeError("the engine has failed")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        report = await self._relay.health()
        return {"slots": report["slots"], "taken": report["sessions"] + report["waiting"]}

    async def _drain(self) -> None:
        """Serve tells a replica that it is to go only once its sockets are cut, but its proxies at once: so this asks
        as they do.
        """
        while not await asyncio.to_thread(_draining, self._relay.address):
            await asyncio.sleep(_LOOK_S)
        _LOG.info("Serve drains this replica; its server is told in %g s.", NOTICE_S / 2)
        await asyncio.sleep(NOTICE_S / 2)
        self._relay.drain()

    async def _die(self) -> None:
        """A replica whose server has ended would have the fewest sockets, and so get every newcomer."""
        await self._relay.started.wait()
        status = await self._relay.wait()
        if not self._relay.stopping:
            _LOG.error("server.py ended with status %d, and this replica with it.", status)
            os._exit(1)

    async def _report(self) -> None:
        """The server's metrics as Ray's, whose agents Prometheus finds by itself: behind one address every scrape would
        meet another replica.
        """
        await self._relay.started.wait()
        gauges: dict[str, metrics.Gauge] = {}
        while not self._relay.stopping:
            try:
                status, text = await self._relay.get("/metrics", self._token)
            except (OSError, http.client.HTTPException):
                status, text = 0, ""
            if status == 401:
                _LOG.warning("no metrics: put a token named metrics beside the others, for this replica to read them.")
                return
            for family in text_string_to_metric_families(text if status == 200 else ""):
                for name, labels, value, *_ in family.samples:
                    if name.startswith("streaming_"):
                        if name not in gauges:
                            gauges[name] = metrics.Gauge(name, family.documentation, tuple(labels))  # type: ignore[arg-type]  # it means any number
                        gauges[name].set(value, labels)
            await asyncio.sleep(_METRICS_S)


class FreeSlots:
    """An autoscaling policy: as many replicas as leave so many slots free for newcomers.

    spare: at least 1, or a full service would never grow.
    """

    def __init__(self, spare: int = 1) -> None:
        if spare < 1:
            raise ValueError(f"spare is {spare}, must be at least 1")
        self._spare = spare

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        told = ctx.aggregated_metrics or {}
        slots, taken = (
            [told.get(name, {}).get(replica) for replica in ctx.running_replicas] for name in ("slots", "taken")
        )
        known = [value for value in slots if value]
        if not known or len(known) < len(slots):  # one of the replicas has not said yet
            return ctx.target_num_replicas, {}
        return math.ceil((sum(value or 0 for value in taken) + self._spare) / max(known)), {}


def build(options: dict[str, Any]) -> Application:
    """options: `server.py`'s, with the keys of its file (docs/operations.md)."""
    check_settings(options, os.environ)
    application: Application = Replica.bind(options)  # type: ignore[attr-defined]  # what the decorator adds
    return application


def _draining(address: tuple[str, int] | None) -> bool:
    """Return whether Serve wants the replica that listens here gone."""
    if address is None:  # no proxy knows the replica yet
        return False
    connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request("GET", HEALTHZ)
        response = connection.getresponse()
        return response.status == 503 and b"DRAINING" in response.read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tokens_file(options: Mapping[str, object], environment: Mapping[str, str]) -> str | None:
    path = options.get("tokens") or environment.get("STREAMING_TOKENS_FILE")
    return None if path is None else str(path)


def _metrics_token(options: Mapping[str, object], environment: Mapping[str, str]) -> str | None:
    path = _tokens_file(options, environment)
    text = environment.get(ENVIRONMENT, "") if path is None else Path(path).read_text(encoding="utf-8-sig")
    found = re.search(rf"(?:^|[,\n])\s*{METRICS_READER}\s*:\s*([^\s,]+)", text)
    return None if found is None else found[1]
