"""The dashboard and the alerts, against what the server says of itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from streaming.engine.engine import Engine
from tests.engine.stub_step import StubStep
from tests.server.live_server import get, serving

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "streaming.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
PROMTOOL = shutil.which("promtool")
# Grafana's own, as Prometheus needs them to parse a query.
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*"}


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Every series that the server has, and the labels of each."""
    with Engine(StubStep(1), "stub") as engine, serving(engine) as server:
        get(f"{server.http}/metrics")  # the second time it has been counted
        text = get(f"{server.http}/metrics").decode()
    found: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def panels() -> Iterator[dict[str, Any]]:
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        if panel["type"] != "row":
            yield panel


def queries() -> list[tuple[str, str]]:
    """Where each is, and what it asks."""
    asked = [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
    rules = [rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]
    return asked + [(rule["alert"], rule["expr"]) for rule in rules]


@pytest.mark.parametrize(("place", "query"), queries())
def test_a_query_asks_for_what_there_is(place: str, query: str, known: dict[str, set[str]]) -> None:
    """A panel that stays empty for ever, or an alert that never fires, after a metric was renamed."""
    names = set(re.findall(r"\b(?:streaming|process)_[a-z_]+|\bup\b", query))
    assert names
    assert names <= set(known), names - set(known)
    for labels in re.findall(r"\bby \(([^)]*)\)", query):
        wanted = {label.strip() for label in labels.split(",")} - {"instance"}
        assert all(wanted <= known[name] for name in names), f"{place} groups by {wanted}"
    for matcher in re.findall(r"\{([^}]*)\}", query):
        wanted = set(re.findall(r"([a-z_]+)\s*=", matcher)) - {"instance", "job"}
        assert any(wanted <= known[name] for name in names), f"{place} selects by {wanted}"


def test_the_alerts_names_of_codes_are_the_servers(known: dict[str, set[str]]) -> None:
    """`rate` of a series that is not there is nothing, and so is an alert on it: these are there from the start."""
    with Engine(StubStep(1), "stub") as engine, serving(engine) as server:
        text = get(f"{server.http}/metrics").decode()
    for code in ("internal", "step_failed", "engine_stopped"):
        assert f'streaming_errors_total{{code="{code}"}} 0.0' in text
    assert 'streaming_refused_total{code="full"} 0.0' in text
    assert 'streaming_step_seconds_bucket{le="0.08"}' in text, "the alert's threshold is a bucket's bound"
    assert 'streaming_first_frame_seconds_bucket{le="0.3"}' in text


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    """The things that an import trips over: ids, sources, places, and panels over panels."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert dashboard["schemaVersion"] >= 39
    assert "id" not in dashboard, "an id would be another Grafana's"
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "instance"}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["targets"]


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool; Debian has it in the package prometheus")
def test_prometheus_takes_all_of_it(tmp_path: Path) -> None:
    """The rules as they are, and the dashboard's queries as rules of their own."""
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, "check", "rules", ALERTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    recorded = []
    for number, (_, query) in enumerate(queries()):
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        assert "$" not in query
        recorded.append({"record": f"query:{number}", "expr": query})
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    done = subprocess.run([PROMTOOL, "check", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool; Debian has it in the package prometheus")
def test_the_alerts_fire_when_they_should_and_not_otherwise() -> None:
    """A rule that parses and says nothing."""
    assert PROMTOOL is not None
    cases = ALERTS.with_name("alerts_test.yml")
    done = subprocess.run(
        [PROMTOOL, "test", "rules", cases.name], cwd=cases.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_tells_of_every_metric_and_its_labels(known: dict[str, set[str]]) -> None:
    """A figure that no page explains is read wrongly."""
    table = (DEPLOY.parent / "docs" / "operations.md").read_text(encoding="utf-8").partition("| metric |")[2]
    told: dict[str, set[str]] = {}
    for row in table.partition("\n\n")[0].splitlines()[2:]:
        names, labels = row.split("|")[1:3]
        for name in re.findall(r"`(streaming_[a-z_]+)`", names):
            told[name] = set(re.findall(r"`([a-z_]+)`", labels))
    found: dict[str, set[str]] = {}
    for name, labels in known.items():
        if name.startswith("streaming_"):
            found.setdefault(re.sub(r"_(bucket|sum|count)$", "", name), set()).update(labels)
    assert told == found
