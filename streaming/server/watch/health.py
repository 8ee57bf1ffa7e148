"""A server's state: whether it lives, whether a new session would get in, and what room is left."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from streaming.engine.engine import Engine
from streaming.server.admission import Admission

HEALTH, LIVE, READY = "/health", "/health/live", "/health/ready"


class Away(Protocol):
    """A session, as far as health needs to know it."""

    @property
    def away(self) -> bool: ...


@dataclass(frozen=True)
class Health:
    """A server's state, read anew each time. sessions: all there are, those in line and those whose client is away
    included.

    instance: which process it is that answers, so that whoever asks twice knows whether both answers are of one.
    """

    engine: Engine
    admission: Admission
    sessions: Collection[Away]
    version: str
    instance: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def live(self) -> bool:
        """Return whether the engine works. A server that lets its last turns finish lives."""
        return self.engine.failure is None

    @property
    def running(self) -> bool:
        """Return whether the server lives and was not told to stop."""
        return self.live and not self.admission.stopping

    @property
    def ready(self) -> bool:
        """Return whether a session that came now would get a slot, or a place in line."""
        stats = self.engine.stats()
        free = stats.sessions < stats.slots and not self.engine.overloaded and not self.admission.waiting
        return self.running and (free or self.admission.waiting < self.admission.queue)

    @property
    def away(self) -> int:
        """Return how many sessions wait for their client to come back."""
        return sum(session.away for session in self.sessions)

    def fine(self, path: str) -> bool:
        """Return whether the health that this path asks for is good."""
        return {LIVE: self.live, READY: self.ready, HEALTH: self.running}[path]

    def report(self) -> dict[str, object]:
        """Return what `/health` tells, as JSON takes it."""
        stats, admission = self.engine.stats(), self.admission
        return {
            "status": "ready" if self.running else "stopping" if self.live else "failed",
            "live": self.live,
            "ready": self.ready,
            "model": self.engine.model,
            "notice": self.engine.notice,
            "suggestions": self.engine.suggestions,
            "device": self.engine.device,
            "operations": self.engine.operations,
            "version": self.version,
            "instance": self.instance,
            "overloaded": self.engine.overloaded,
            "slots": stats.slots,
            "sessions": stats.sessions,
            "free": stats.slots - stats.sessions,
            "away": self.away,
            "waiting": admission.waiting,
            "queue": admission.queue,
            "steps": stats.steps,
            "step_ms_p50": stats.step_ms_p50,
            "step_ms_p99": stats.step_ms_p99,
        }
