"""Many servers behind a balancer, event by event: who comes, where to, who is refused, and what a failure does.

A server is its slots and its line; its steps come in afterwards, from the times that it spent with so many sessions.
What the balancer knows is what a real one knows: its own connections, and which servers said they were ready when they
were last asked.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Policy = Literal["random", "readiness", "round-robin", "two-choices", "least-request"]
POLICIES: dict[Policy, str] = {
    "random": "any server that runs, full or not: DNS, or a hash of the client's address",
    "readiness": "any server that is ready: a plain Service of Kubernetes",
    "round-robin": "the ready ones in turn",
    "two-choices": "of two ready ones the one with fewer connections of this proxy's: Envoy's LeastRequest",
    "least-request": "of all ready ones that with the fewest connections of this proxy's: HAProxy's leastconn",
}
Length = Literal["lognormal", "exponential", "fixed"]
Event = Literal["none", "kill", "redeploy", "burst"]
_SIGMA = 1.0
"""The spread of lognormal lengths: the median is 0.6 of the mean, and one length in a hundred is six times that."""
_CONNECT_TRIES = 3
"""A server that is gone refuses the connection, and the proxy asks another one."""
LOOK_S = 5.0


@dataclass(frozen=True)
class Scenario:
    """Times in seconds. load: sessions that come, times how long they stay, for each slot there is.

    probe_s: how often a server is asked whether it is ready; notice_s: until the balancers know. proxies: balancers,
    each with its own connections in mind. tries: how often one who is refused comes again, retry_s later on average.
    event, share: what happens in the middle: so many of the servers die at once; all are replaced, so many at a time;
    or so many more people come, for a minute. look_s: how often imbalance is looked at.
    """

    replicas: int
    slots: int
    load: float
    policy: Policy
    queue: int = 0
    session_s: float = 180.0
    length: Length = "lognormal"
    seconds: float = 600.0
    probe_s: float = 2.0
    notice_s: float = 1.0
    proxies: int = 2
    tries: int = 1
    retry_s: float = 2.0
    event: Event = "none"
    share: float = 0.05
    pre_stop_s: float = 10.0
    drain_s: float = 30.0
    restart_s: float = 60.0
    look_s: float = LOOK_S
    seed: int = 0

    @property
    def rate(self) -> float:
        """Sessions that come in a second."""
        return self.load * self.slots * self.replicas / self.session_s


@dataclass
class Result:
    """The figures before the event (steady) and from it on (after), of the sessions that came in each.

    dwell_s: server time with so many sessions, by their number, steady. imbalance: the p99 of the servers' sessions
    over their mean, at each look. open: sessions at each look; refused_at: refusals by the second; from the start on.
    waits_s: for a slot, once let in, steady. changes: of servers' readiness, which balancers are told, steady.
    cut: sessions that the event ended; recovery_s: until their people talked again; lost: how many did not until the
    end.
    """

    arrived: list[int] = field(default_factory=lambda: [0, 0])
    turned_away: list[int] = field(default_factory=lambda: [0, 0])
    refusals: dict[str, int] = field(default_factory=dict)
    waits_s: list[float] = field(default_factory=list)
    dwell_s: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    open: list[int] = field(default_factory=list)
    refused_at: list[int] = field(default_factory=list)
    changes: int = 0
    cut: int = 0
    recovery_s: list[float] = field(default_factory=list)
    lost: int = 0
    events: int = 0

    def share_turned_away(self, when: Literal[0, 1]) -> float:
        return self.turned_away[when] / max(1, self.arrived[when])


class _Ready:
    """A set of servers that one can be drawn from at random, or in turn."""

    def __init__(self, members: int) -> None:
        self.members = list(range(members))
        self._place = {member: member for member in self.members}

    def put(self, member: int, belongs: bool) -> None:
        if belongs and member not in self._place:
            self._place[member] = len(self.members)
            self.members.append(member)
        elif not belongs and member in self._place:
            place, last = self._place.pop(member), self.members.pop()
            if last != member:
                self.members[place] = last
                self._place[last] = place


class _Fleet:
    """One run. Servers, proxies and sessions are numbers; what is known of them is in lists by these."""

    def __init__(self, scenario: Scenario) -> None:
        self.of, count = scenario, scenario.replicas
        self.random = random.Random(scenario.seed)  # noqa: S311
        self.numbers = np.random.default_rng([scenario.seed, 1])
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[[int], None], int]] = []
        self.pushed = 0
        # Servers. leaving: off the list, and still open; closed: lets its last turns finish.
        self.open = [0] * count
        self.line: list[deque[int]] = [deque() for _ in range(count)]
        self.seated: list[set[int]] = [set() for _ in range(count)]
        self.up = [True] * count
        self.leaving, self.closed = [False] * count, [False] * count
        self.since = [0.0] * count
        # What the balancers know: whether it is ready, and whether it runs.
        self.said = [(True, True)] * count
        self.running, self.ready = _Ready(count), _Ready(count)
        self.turn = [self.random.randrange(count) for _ in range(scenario.proxies)]
        # Counts, and a fraction for when a server was last chosen: of equals, the one that has waited longest is next.
        self.connections = self.numbers.random((scenario.proxies, count)) * 1e-9
        self.chosen = 0
        self.penalty = np.zeros(count)
        # Sessions. length: what is left of one that was cut; asked: at its last attempt; place: its proxy and server.
        self.length: list[float] = []
        self.begun: list[float] = []
        self.asked: list[float] = []
        self.tried: list[int] = []
        self.place: list[tuple[int, int]] = []
        self.cut_at: dict[int, float] = {}
        self.ends: list[float] = []
        # The run: sessions stay for their length, so it takes as long until the beginning is forgotten.
        self.begins_s = scenario.session_s
        self.event_s = self.begins_s + scenario.seconds / 2
        self.ends_s = self.begins_s + scenario.seconds
        self.result = Result(dwell_s=[0.0] * (scenario.slots + 1))
        self.to_replace: deque[int] = deque()

    # Time

    def at(self, when: float, what: Callable[[int], None], whom: int) -> None:
        self.pushed += 1
        heapq.heappush(self.heap, (when, self.pushed, what, whom))

    def run(self) -> Result:
        of = self.of
        for _ in range(min(round(of.load * of.slots * of.replicas), of.slots * of.replicas)):
            self.attempt(self.session(self.draw_length(remaining=True)))
        for replica in range(of.replicas):
            self.at(self.random.random() * of.probe_s, self.probe, replica)
        self.at(0.0, self.snap, 0)
        if of.event == "kill":
            self.at(self.event_s, self.kill, 0)
        elif of.event == "redeploy":
            self.at(self.event_s, self.redeploy, 0)
        arrivals = self.arrivals()
        arrives_s = next(arrivals)
        while True:
            if self.heap and self.heap[0][0] <= arrives_s:
                when, _, what, whom = heapq.heappop(self.heap)
                if when > self.ends_s:
                    break
                self.now = when
                what(whom)
            elif arrives_s > self.ends_s:
                break
            else:
                self.now = arrives_s
                self.attempt(self.session(self.draw_length()))
                arrives_s = next(arrivals)
        self.now = self.ends_s
        for replica in range(of.replicas):
            self.account(replica)
        self.result.events = self.pushed + len(self.length)
        self.result.lost = len(self.cut_at)
        return self.result

    def arrivals(self) -> Iterator[float]:
        """Yield the arrivals of a Poisson process, which is as much faster in a burst."""
        when = 0.0
        while True:
            for gap in self.numbers.exponential(1 / self.of.rate, 4096).tolist():
                burst = self.of.event == "burst" and self.event_s <= when < self.event_s + 60
                when += gap / (1 + self.of.share if burst else 1)
                yield when

    def draw_length(self, remaining: bool = False) -> float:
        """Return how long a session lasts; remaining: of one that is met at some time, how much longer."""
        mean = self.of.session_s
        if self.of.length == "fixed":
            return mean * (self.random.random() if remaining else 1)
        if self.of.length == "exponential":
            return self.random.expovariate(1 / mean)
        # Long ones are met more often, in proportion to their length.
        mu = math.log(mean) - _SIGMA**2 / 2 + (_SIGMA**2 if remaining else 0)
        return math.exp(self.random.gauss(mu, _SIGMA)) * (self.random.random() if remaining else 1)

    @property
    def phase(self) -> Literal[0, 1] | None:
        """Return the phase, steady or after; None before the time that counts."""
        return None if self.now < self.begins_s else 0 if self.now < self.event_s else 1

    # Sessions

    def session(self, length_s: float) -> int:
        for values, value in (
            (self.length, length_s),
            (self.begun, self.now),
            (self.asked, self.now),
            (self.ends, 0.0),
        ):
            values.append(value)
        self.tried.append(0)
        self.place.append((-1, -1))
        if self.phase is not None:
            self.result.arrived[self.phase] += 1
        return len(self.length) - 1

    def attempt(self, session: int) -> None:
        proxy = int(self.random.random() * self.of.proxies)
        self.asked[session] = self.now
        gone: tuple[int, ...] = ()
        for _ in range(_CONNECT_TRIES):
            replica = self.pick(proxy, gone)
            if replica is None or self.up[replica]:
                break
            gone = (*gone, replica)
        if replica is None:
            self.refuse(session, "none ready")
        elif not self.up[replica]:
            self.refuse(session, "gone")
        elif self.closed[replica]:
            self.refuse(session, "stopping")
        elif self.open[replica] < self.of.slots and not self.line[replica]:
            self.connect(session, proxy, replica)
            self.seat(session)
        elif len(self.line[replica]) < self.of.queue:
            self.connect(session, proxy, replica)
            self.line[replica].append(session)
        else:
            self.refuse(session, "full")

    def pick(self, proxy: int, gone: tuple[int, ...]) -> int | None:
        """Return a server for a session. gone: servers that have just refused the connection, and look idle by their
        counts.
        """
        policy, ready = self.of.policy, self.ready.members
        if policy == "random":
            ready = self.running.members
        if not ready:
            return None
        if policy in ("random", "readiness"):
            return ready[int(self.random.random() * len(ready))]
        if policy == "round-robin":
            self.turn[proxy] = (self.turn[proxy] + 1) % len(ready)
            return ready[self.turn[proxy]]
        mine = self.connections[proxy]
        if policy == "two-choices":
            one, other = (ready[int(self.random.random() * len(ready))] for _ in range(2))
            return one if mine[one] <= mine[other] else other
        busy = mine + self.penalty
        busy[list(gone)] = math.inf
        least = int(busy.argmin())
        self.chosen += 1
        mine[least] = round(mine[least]) + self.chosen * 1e-9
        return least

    def refuse(self, session: int, why: str) -> None:
        if self.phase is not None:
            self.result.refusals[why] = self.result.refusals.get(why, 0) + 1
        second = int(self.now)
        self.result.refused_at.extend([0] * (second + 1 - len(self.result.refused_at)))
        self.result.refused_at[second] += 1
        self.tried[session] += 1
        if self.tried[session] < self.of.tries or session in self.cut_at:
            # Whoever was in a conversation tries until it goes on.
            self.at(self.now + self.of.retry_s * (0.5 + self.random.random()), self.attempt, session)
        elif self.phase is not None and self.begun[session] >= self.begins_s:
            self.result.turned_away[0 if self.begun[session] < self.event_s else 1] += 1

    def connect(self, session: int, proxy: int, replica: int) -> None:
        self.place[session] = (proxy, replica)
        self.connections[proxy, replica] += 1

    def seat(self, session: int) -> None:
        replica = self.place[session][1]
        self.account(replica)
        self.open[replica] += 1
        self.seated[replica].add(session)
        self.ends[session] = ends_s = self.now + self.length[session]
        if ends_s <= self.ends_s:
            self.at(ends_s, self.end, session)
        if (cut_at := self.cut_at.pop(session, None)) is not None:
            self.result.recovery_s.append(self.now - cut_at)
        elif self.phase == 0:
            self.result.waits_s.append(self.now - self.asked[session])

    def end(self, session: int) -> None:
        if self.ends[session] == self.now:  # otherwise it was cut, and goes on elsewhere
            self.leave(session)

    def leave(self, session: int) -> None:
        """Free a slot, and give it to the next in line."""
        proxy, replica = self.place[session]
        self.account(replica)
        self.open[replica] -= 1
        self.seated[replica].discard(session)
        self.connections[proxy, replica] -= 1
        if self.line[replica] and not self.closed[replica]:
            self.seat(self.line[replica].popleft())

    def account(self, replica: int) -> None:
        """Note how long a server has had so many sessions, before their number changes."""
        begin, end = max(self.since[replica], self.begins_s), min(self.now, self.event_s)
        if end > begin and self.up[replica]:
            self.result.dwell_s[self.open[replica]] += end - begin
        self.since[replica] = self.now

    # Servers

    def probe(self, replica: int) -> None:
        runs = self.up[replica] and not self.leaving[replica]
        free = self.open[replica] < self.of.slots and not self.line[replica]
        said = (runs and (free or len(self.line[replica]) < self.of.queue), runs)
        if said != self.said[replica]:
            self.said[replica] = said
            self.result.changes += self.phase == 0
            self.at(self.now + self.of.notice_s, self.hear, replica)
        self.at(self.now + self.of.probe_s, self.probe, replica)

    def hear(self, replica: int) -> None:
        """Tell the balancers what was last said of a server."""
        ready, runs = self.said[replica]
        self.ready.put(replica, ready)
        self.running.put(replica, runs)
        self.penalty[replica] = 0.0 if ready else math.inf

    def snap(self, _: int) -> None:
        total = sum(self.open)
        self.result.open.append(total)
        if self.phase == 0 and total:
            self.result.imbalance.append(float(np.percentile(self.open, 99)) * self.of.replicas / total)
        self.at(self.now + self.of.look_s, self.snap, 0)

    def kill(self, _: int) -> None:
        for replica in self.random.sample(range(self.of.replicas), self._affected):
            self.go(replica, 0.5 * self.of.retry_s)

    @property
    def _affected(self) -> int:
        return max(1, round(self.of.share * self.of.replicas))

    def go(self, replica: int, back_s: float) -> None:
        """End a server and its sessions; their people come back within so long, twice that at most."""
        self.account(replica)
        self.up[replica] = False
        for session in (*self.seated[replica], *self.line[replica]):
            self.move(session, back_s * (0.5 + self.random.random()))
        self.seated[replica].clear()
        self.line[replica].clear()
        self.open[replica] = 0
        self.at(self.now + self.of.restart_s, self.come, replica)

    def move(self, session: int, after_s: float) -> None:
        proxy, replica = self.place[session]
        self.connections[proxy, replica] -= 1
        if session in self.seated[replica]:
            self.length[session] = max(1.0, self.ends[session] - self.now)
            self.ends[session] = 0.0
            self.result.cut += 1
            self.cut_at[session] = self.now
        self.at(self.now + after_s, self.attempt, session)

    def come(self, replica: int) -> None:
        self.up[replica], self.leaving[replica], self.closed[replica] = True, False, False
        self.since[replica] = self.now
        if self.to_replace:
            self.stop(self.to_replace.popleft())

    def redeploy(self, _: int) -> None:
        """Replace all servers, so many at a time: each leaves the list, lets its turns finish, and comes again."""
        self.to_replace = deque(self.random.sample(range(self.of.replicas), self.of.replicas))
        for _ in range(self._affected):
            self.stop(self.to_replace.popleft())

    def stop(self, replica: int) -> None:
        self.leaving[replica], self.said[replica] = True, (False, False)
        self.at(self.now + self.of.notice_s, self.hear, replica)
        self.at(self.now + self.of.pre_stop_s, self.drain, replica)

    def drain(self, replica: int) -> None:
        self.closed[replica] = True
        for session in self.line[replica]:
            self.move(session, 0.5 + self.random.random())
        self.line[replica].clear()
        for session in self.seated[replica]:
            self.at(self.now + self.of.drain_s * self.random.random(), self.turn_over, session)
        self.at(self.now + self.of.drain_s, self.stopped, replica)

    def turn_over(self, session: int) -> None:
        """End a session's last turn here; the conversation goes on elsewhere."""
        replica = self.place[session][1]
        if session in self.seated[replica] and self.closed[replica]:
            self.move(session, 0.2 + self.random.random())
            self.account(replica)
            self.open[replica] -= 1
            self.seated[replica].discard(session)

    def stopped(self, replica: int) -> None:
        self.go(replica, 1.0)


def simulate(scenario: Scenario) -> Result:
    """Run it all: the servers as full as they will be, a session's length to settle, then the seconds that count."""
    return _Fleet(scenario).run()
