"""A Ray cluster of one node, HAProxy before `deploy/ray/app.py`, on free ports and with its files in one folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.stub_server import STUBBED

ROOT = Path(__file__).parents[2]
PATIENCE_S = 240.0
DRAIN_S = 4.0


def settings() -> dict[str, str]:
    """Those of `deploy/ray/ray.env`, as a shell would read it."""
    lines = (ROOT / "deploy/ray/ray.env").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value.replace("$PWD", str(ROOT)) for name, _, value in pairs}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


FOLDER = Path(tempfile.gettempdir()) / f"ray-{os.getpid()}"  # pytest's own are too long for the names of sockets
METRICS_PORT, *_PORTS = free_ports(3)
_FILES = {
    "CONFIG_FILE_LOC": "haproxy.cfg",
    "SOCKET_PATH": "admin.sock",
    "SERVER_STATE_BASE": "",
    "SERVER_STATE_FILE": "s",
}
os.environ |= {  # read when Ray is imported
    **settings(),
    **STUBBED,
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S + 8),
    "RAY_SERVE_HAPROXY_METRICS_PORT": str(_PORTS[0]),
    "RAY_SERVE_HAPROXY_STATS_PORT": str(_PORTS[1]),
    **{f"RAY_SERVE_HAPROXY_{name}": str(FOLDER / "proxy" / file) for name, file in _FILES.items()},
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # or Ray writes one into the home
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": "240000",  # after 30 s its agents count as lost, which a busy machine takes
    "RAY_raylet_start_wait_time_s": "240",
}

with warnings.catch_warnings(action="ignore"):  # its own, of other libraries' futures
    import ray
    from ray import serve


def until(true: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """Wait for something to be so, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)
    return value


@dataclass(frozen=True)
class Cluster:
    """port: the proxy's."""

    port: int

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/continue"

    def get(self, path: str) -> tuple[int, str]:
        """A plain request to whichever replica; status 0 where nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def deploy(self, *, more: dict[str, object] | None = None, **deployment: Any) -> None:
        """One more version of the service, of `deployment`'s settings; returns when Serve has taken it. more: options
        of its servers.
        """
        from deploy.ray.app import Replica

        options = {"model": "demo", "max-sessions": 2, "threads": 1, "drain-seconds": DRAIN_S, "host": "127.0.0.1"}
        options |= more or {}
        common = {"ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_timeout_s": DRAIN_S + 20}
        made = Replica.options(**common, **deployment).bind(options)
        serve.run(made, name="streaming", route_prefix="/", blocking=False)

    def replicas(self) -> dict[str, int]:
        """Ids and process ids of those that run."""
        applications = self._details()["applications"]
        if "streaming" not in applications:  # nothing was deployed yet
            return {}
        deployment = applications["streaming"]["deployments"]["Replica"]
        return {made["replica_id"]: made["pid"] for made in deployment["replicas"] if made["state"] == "RUNNING"}

    def _details(self) -> Any:
        return json.loads(json.dumps(serve.context._get_global_client().get_serve_details(), default=str))


@contextmanager
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        (FOLDER / "proxy").mkdir(parents=True)
        stack.callback(shutil.rmtree, FOLDER, ignore_errors=True)
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            _temp_dir=str(FOLDER),
            _metrics_export_port=METRICS_PORT,
            log_to_driver=False,
            logging_level="ERROR",
        )
        stack.callback(ray.shutdown)
        port = free_ports(1)[0]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        stack.callback(serve.shutdown)
        yield Cluster(port)
