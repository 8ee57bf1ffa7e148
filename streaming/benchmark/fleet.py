"""Many servers behind a balancer, simulated with the step times of one: refusals, latency, imbalance, and recovery.

Step times are measured (`--steps FILE`, of `step --json`) or computed (`--steps 1.3b-h100`), and called so.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np

from streaming.audio import FRAME_MS
from streaming.benchmark import runs
from streaming.benchmark.figures import percentile, rounded
from streaming.benchmark.report import Report, Value
from streaming.benchmark.simulation import LOOK_S, POLICIES, Event, Length, Result, Scenario, simulate
from streaming.benchmark.steps import ROOFLINES, Floats, StepCurve, StepsError, curve, erlang_b

_TURNS = 20_000
_MOST_REPLICAS, _MOST_LOAD = 100_000, 100
"""The limits of a simulation. With more, its events fill the memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("a server")
    server.add_argument(
        "--steps",
        default="1.3b-h100",
        metavar="X",
        help=f"The step times: FILE of `step --json`, FILE:RUN of `results`, or computed: {', '.join(ROOFLINES)}.",
    )
    server.add_argument(
        "--share-of-floor",
        type=_share,
        default=0.35,
        metavar="P",
        help="The share of the floor that computed steps reach (default: 0.35).",
    )
    server.add_argument("--spread", metavar="FILE", help="Let computed steps vary as those of this file do.")
    server.add_argument(
        "--slots",
        type=runs.count,
        metavar="N",
        help="How many sessions a server takes (default: as many as have their steps in time, by p99).",
    )
    server.add_argument(
        "--queue", type=_natural, default=0, metavar="N", help="How many places in line a server has (default: 0)."
    )
    fleet = parser.add_argument_group("the servers and who stands before them")
    fleet.add_argument(
        "--replicas", type=runs.count, nargs="+", default=[10, 100], metavar="N", help="How many servers there are."
    )
    fleet.add_argument(
        "--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="NAME", help=_policies()
    )
    fleet.add_argument(
        "--proxies",
        type=runs.count,
        default=2,
        metavar="N",
        help="How many proxies there are, of which each counts its own (default: 2).",
    )
    fleet.add_argument(
        "--probe-seconds",
        type=runs.positive,
        default=2.0,
        metavar="S",
        help="How often a server is asked whether it is ready (default: 2).",
    )
    fleet.add_argument(
        "--notice-seconds",
        type=runs.positive,
        default=1.0,
        metavar="S",
        help="After how long balancers know the answer (default: 1).",
    )
    people = parser.add_argument_group("the people")
    people.add_argument(
        "--load",
        type=runs.positive,
        nargs="+",
        default=[0.7, 0.8, 0.9, 0.95],
        metavar="X",
        help="The share of all slots that is wanted.",
    )
    people.add_argument(
        "--session-seconds",
        type=runs.positive,
        default=180.0,
        metavar="S",
        help="How long a session lasts on average (default: 180).",
    )
    people.add_argument(
        "--length", choices=get_args(Length), default="lognormal", help="How the lengths of sessions are distributed."
    )
    people.add_argument(
        "--tries", type=runs.count, default=1, metavar="N", help="How often somebody who is refused tries (default: 1)."
    )
    event = parser.add_argument_group("what happens in the middle")
    event.add_argument(
        "--event",
        choices=get_args(Event),
        default="kill",
        help="What happens: a share of the servers dies, all are replaced, so many at a time, or more people come.",
    )
    event.add_argument(
        "--event-share", type=runs.positive, default=0.05, metavar="P", help="How large that share is (default: 0.05)."
    )
    event.add_argument(
        "--restart-seconds",
        type=runs.positive,
        default=60.0,
        metavar="S",
        help="How long a server takes to start (default: 60).",
    )
    event.add_argument(
        "--drain-seconds",
        type=runs.positive,
        default=30.0,
        metavar="S",
        help="How long a server takes to let its turns end (default: 30).",
    )
    parser.add_argument(
        "--minutes", type=runs.positive, default=10.0, metavar="M", help="How long is simulated (default: 10)."
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="The same seed gives the same people.")
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="Draw the result; this needs matplotlib, the extra `benchmark`."
    )
    parser.set_defaults(check=_check)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error if flags do not fit each other."""
    if options.event != "burst" and options.event_share > 1:
        parser.error(f"--event-share is {options.event_share:g}: of the servers, at most all (1) can be hit")
    if max(options.replicas) > _MOST_REPLICAS or max(options.load) > _MOST_LOAD:
        parser.error(f"at most {_MOST_REPLICAS:,} --replicas and a --load of {_MOST_LOAD} can be simulated")


def _policies() -> str:
    return "How a server is chosen: " + "; ".join(f"{name}: {text}" for name, text in POLICIES.items()) + "."


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def measure(options: argparse.Namespace) -> Report:
    """`fleet`: see the module. Raises `StepsError`."""
    steps = curve(options.steps, options.share_of_floor, options.spread)
    slots = options.slots or steps.carries
    if not slots:
        raise StepsError(f"{steps.name}: not even one session has its steps in time; give --slots all the same")
    if slots > steps.widths[-1]:
        raise StepsError(f"{steps.name} knows steps of {steps.widths[-1]} sessions at most, not of {slots}")
    base = Scenario(
        replicas=1,
        slots=slots,
        load=1.0,
        policy="random",
        queue=options.queue,
        session_s=options.session_seconds,
        length=options.length,
        seconds=60 * options.minutes,
        probe_s=options.probe_seconds,
        notice_s=options.notice_seconds,
        proxies=options.proxies,
        tries=options.tries,
        event=options.event,
        share=options.event_share,
        restart_s=options.restart_seconds,
        drain_s=options.drain_seconds,
        seed=options.seed,
    )
    rows: list[dict[str, Value]] = []
    series: dict[str, list[float]] = {}
    began = time.monotonic()
    for replicas in options.replicas:
        for load in options.load:
            for policy in options.policies:
                scenario = replace(base, replicas=replicas, load=load, policy=policy)
                result = simulate(scenario)
                rows.append(_row(scenario, result, steps))
                print(f"{replicas} servers, load {load:g}, {policy}: {result.events} events", file=sys.stderr)
                if replicas == max(options.replicas):
                    series[f"{policy}, load {load:g}"] = _refused_over_time(scenario, result)
    facts: dict[str, Value] = {
        "steps": steps.name,
        "slots": slots,
        "queue": options.queue,
        "session_s": f"{options.session_seconds:g} {options.length}",
        "proxies": options.proxies,
        "probe_s": f"{options.probe_seconds:g} + {options.notice_seconds:g}",
        "tries": options.tries,
        "event": "none" if options.event == "none" else f"{options.event} {options.event_share:g}",
        "simulated_min": options.minutes,
        "seed": options.seed,
        "taken_s": rounded(time.monotonic() - began),
    }
    sessions = [round(replicas * slots * load) for replicas in options.replicas for load in options.load]
    span = " to ".join(map(str, sorted({min(sessions), max(sessions)})))
    title = f"fleet: {span} sessions over up to {max(options.replicas)} servers, simulated"
    notes = [
        "first_frame_ms and late_pct are of the step times above, every session in every step: real steps are shorter",
        "pooled_pct: refusals if all slots were one server's (Erlang B); alone_pct: if nobody could choose his server",
    ]
    return Report(title, facts, rows, notes, series, "fleet")


def _row(scenario: Scenario, result: Result, steps: StepCurve) -> dict[str, Value]:
    """Return the figures of one scenario. docs/scale.md says what each is."""
    erlangs = scenario.load * scenario.slots
    first = first_frame_ms(steps, result.dwell_s, scenario.seed)
    return {
        "replicas": scenario.replicas,
        "load": scenario.load,
        "sessions": round(erlangs * scenario.replicas),
        "policy": scenario.policy,
        "refused_pct": rounded(100 * result.share_turned_away(0), 3),
        "pooled_pct": rounded(100 * erlang_b(erlangs * scenario.replicas, scenario.slots * scenario.replicas), 3),
        "alone_pct": rounded(100 * erlang_b(erlangs, scenario.slots), 3),
        "wait_s_p99": rounded(percentile(result.waits_s, 99), 2) if scenario.queue else None,
        "imbalance": rounded(percentile(result.imbalance, 50), 3),
        "late_pct": rounded(100 * late_share(steps, result.dwell_s), 3),
        "first_frame_ms_p50": rounded(percentile(first, 50)),
        "first_frame_ms_p99": rounded(percentile(first, 99)),
        "changes_per_s": rounded(2 * result.changes / scenario.seconds, 2),
        "cut": result.cut,
        "back_s_p50": rounded(percentile(result.recovery_s, 50)),
        "back_s_p99": rounded(percentile(result.recovery_s, 99)),
        "not_back": result.lost,
        "refused_after_pct": rounded(100 * result.share_turned_away(1), 3),
    }


def late_share(steps: StepCurve, dwell_s: list[float]) -> float:
    """Return the share of all frames whose step took longer than a frame lasts."""
    frames = np.array(dwell_s) * np.arange(len(dwell_s))
    late = [steps.late(n) if frames[n] else 0.0 for n in range(len(dwell_s))]
    return float(frames @ np.array(late) / max(1e-9, frames.sum()))


def first_frame_ms(steps: StepCurve, dwell_s: list[float], seed: int) -> Floats:
    """Return the times from the last of a prompt's frames to the first of its continuation, of turns drawn at random:
    what is left of the step that runs when it comes, if one does, the step that hears it, and the one that speaks.
    """
    random = np.random.default_rng([seed, 2])
    weights = np.array(dwell_s) * np.arange(len(dwell_s))
    sessions = random.choice(len(weights), _TURNS, p=weights / weights.sum())
    running, hears, speaks = (steps.quantile_ms(sessions, random.random(_TURNS)) for _ in range(3))
    busy = random.random(_TURNS) < np.minimum(1, running / FRAME_MS)
    return np.asarray(busy * random.random(_TURNS) * running + hears + speaks, np.float64)


def _refused_over_time(scenario: Scenario, result: Result) -> list[float]:
    """Return the refusals a second, over each 5 s of the time that counts."""
    every, begin, end = round(LOOK_S), round(scenario.session_s), round(scenario.session_s + scenario.seconds)
    counts = np.zeros(end + every)
    counts[: len(result.refused_at)] = result.refused_at[: len(counts)]
    stretches = counts[begin : begin + (end - begin) // every * every].reshape(-1, every)
    return [round(value, 3) for value in stretches.mean(1).tolist()]
