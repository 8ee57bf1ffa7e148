"""Reports as pictures, for those that have levels of load or stretches of time. Needs matplotlib, the extra
`benchmark`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from streaming.audio import FRAME_MS
from streaming.benchmark.report import Report
from streaming.benchmark.simulation import LOOK_S
from streaming.errors import StreamingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120


class PlotError(StreamingError):
    """There can be no picture. The message says what is missing."""

    code = "no_plot"


def check(path: Path) -> None:
    """Raise `PlotError` now instead of after a long measurement."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise PlotError('--plot needs matplotlib: `pip install -e ".[benchmark]"`') from None
    if path.suffix.lower() != ".png":
        raise PlotError(f"--plot {path}: a name that ends in .png")
    if not path.parent.is_dir():
        raise PlotError(f"--plot {path}: there is no directory {path.parent}")


def draw(report: Report, path: Path) -> None:
    """Write the picture. Raises `OSError` if the file cannot be written."""
    from matplotlib.figure import Figure

    if report.kind == "fleet":
        figure = Figure(figsize=(12, 8.4), layout="constrained")
        _fleet(report, *figure.subplots(2, 2).flat)
        _save(figure, report, path)
        return
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    if report.kind == "levels":
        _distributions(report, left)
        _against_load(report, right)
    else:
        _ratios(report, left)
        _over_time(report, right)
    _save(figure, report, path)


def _save(figure: Figure, report: Report, path: Path) -> None:
    figure.suptitle(report.title)
    figure.savefig(path, dpi=_DPI)


def _fleet(report: Report, refused: Axes, imbalance: Axes, after: Axes, latency: Axes) -> None:
    """Draw the largest fleet: by load, and over time at the highest load but one, where an event shows best."""
    replicas = max(_number(row["replicas"]) for row in report.rows)
    rows = [row for row in report.rows if row["replicas"] == replicas]
    middle = _number(report.facts["simulated_min"]) / 2
    policies = list(dict.fromkeys(str(row["policy"]) for row in rows))
    loads = sorted({_number(row["load"]) for row in rows})
    for key, label in (("alone_pct", "alone: Erlang B of one server"), ("pooled_pct", "pooled: Erlang B of all slots")):
        theory = {_number(row["load"]): _number(row[key]) for row in rows}
        refused.plot(loads, [theory[load] for load in loads], ":", color="grey", marker=".", label=label)
    for policy in policies:
        of = sorted((row for row in rows if row["policy"] == policy), key=lambda row: _number(row["load"]))
        at = [_number(row["load"]) for row in of]
        refused.plot(at, [_number(row["refused_pct"]) for row in of], marker="o", label=policy)
        imbalance.plot(at, [_number(row["imbalance"]) for row in of], marker="o", label=policy)
        latency.plot(at, [_number(row["first_frame_ms_p99"]) for row in of], marker="o", label=policy)
        shown = loads[-2] if len(loads) > 1 else loads[-1]
        values = report.series.get(f"{policy}, load {shown:g}", [])
        after.step(np.arange(len(values)) * LOOK_S / 60 - middle, values, where="post", label=policy)
    refused.set(xlabel="sessions that come, of all slots", ylabel="turned away before the event, %")
    refused.set_ylim(bottom=0)
    imbalance.set(xlabel="sessions that come, of all slots", ylabel="sessions of a server, p99 over mean")
    latency.set(xlabel="sessions that come, of all slots", ylabel="first frame, p99, ms")
    after.set(xlabel="minutes from the event", ylabel=f"refusals a second, load {shown:g}", yscale="symlog")
    after.set_xlim(max(-1, -middle), min(3, middle))
    after.set_title(f"{replicas:.0f} servers, event: {report.facts.get('event', 'none')}", fontsize="medium")
    after.set_ylim(bottom=0)
    for axes in (refused, imbalance, after, latency):
        _finish(axes)


def _distributions(report: Report, axes: Axes) -> None:
    for name, values in report.series.items():
        if values:
            share = np.arange(len(values) + 1) / len(values)
            at = np.sort([min(values), *values])
            axes.step(at, 100 * share, where="post", label=f"{name} ({len(values)} turns)")
    axes.set(xlabel="end of speech to first audible sample, ms", ylabel="turns, %", ylim=(0, 101))
    axes.set_xlim(left=0)
    _finish(axes)


def _against_load(report: Report, axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    load = next(iter(report.rows[0]))
    rows = sorted(report.rows, key=lambda row: _number(row[load]))
    at = [_number(row[load]) for row in rows]
    lines = (
        ("step_ms_p50", "step, p50", "C0", ":"),
        ("step_ms_p99", "step, p99", "C0", "-"),
        ("audible_ms_p50", "first audible, p50", "C1", ":"),
        ("audible_ms_p99", "first audible, p99", "C1", "-"),
    )
    for key, label, color, style in lines:
        axes.plot(at, [_number(row[key]) for row in rows], style, color=color, marker="o", label=label)
    failed = [(x, _number(row["audible_ms_p99"])) for x, row in zip(at, rows, strict=True) if row["verdict"] != "ok"]
    if failed:
        axes.plot(*zip(*failed, strict=True), "x", color="C3", markersize=11, markeredgewidth=2, label="not passed")
    axes.axhline(FRAME_MS, color="grey", linewidth=1, label="a frame, 80 ms")
    axes.set(xlabel=load, ylabel="ms", yscale="log")
    axes.set_xticks(sorted(set(at)), [f"{x:g}" for x in sorted(set(at))])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _finish(axes)


def _ratios(report: Report, axes: Axes) -> None:
    hours = [_number(row["hours"]) for row in report.rows]
    for key in ("memory_ratio", "latency_ratio", "step_ratio", "cpu_ratio"):
        axes.plot(hours, [_number(row[key]) for row in report.rows], marker="o", label=key.removesuffix("_ratio"))
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xlabel="hours of talk", ylabel="against the first tenth")
    axes.set_ylim(bottom=0)
    _finish(axes)


def _over_time(report: Report, axes: Axes) -> None:
    hours = [_number(row["hours"]) for row in report.rows]
    for key, label in (
        ("latency_ms_p50", "latency, p50"),
        ("latency_ms_p95", "latency, p95"),
        ("step_ms_p99", "step, p99"),
    ):
        axes.plot(hours, [_number(row[key]) for row in report.rows], marker="o", label=label)
    axes.set(xlabel="hours of talk", ylabel="ms")
    axes.set_ylim(bottom=0)
    _finish(axes)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.legend()
