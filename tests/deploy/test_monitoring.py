"""Alerts and dashboard: every expression in them means something to a real Prometheus over real pages, every alert
fires when it should and at no other time. What only a Grafana can show is not covered.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.deploy.chart import CHART, NAMESPACE, ROOT, find, manifests
from tests.support.deploy.prometheus import metrics_of, promtool
from tests.support.deploy.watched_gateway import INSTANCE, SERVICE, VLLM, Watched, watch
from tests.support.gateway_process import wait_until

RULES = sorted((CHART / "rules").glob("*.yaml"))
DASHBOARD = json.loads((CHART / "dashboards/shannon.json").read_text())
RULE_TESTS = Path(__file__).with_name("alerts_test.yaml")
VARIABLES = {
    "$namespace": NAMESPACE,
    "$instance": INSTANCE,
    "$model": "shannon-.+",
    "$__rate_interval": "1m",
    "$__range": "1h",
}
SCRAPED = {"ALERTS", "up"}
"""What Prometheus makes itself."""


def rules() -> list[dict[str, Any]]:
    """Return every rule of the chart."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}


def panels() -> list[dict[str, Any]]:
    """Return the dashboard's panels that show something."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def filled(text: str) -> str:
    """Put values in place of the dashboard's variables."""
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    return text


def dashboard_targets() -> list[tuple[str, dict[str, Any]]]:
    """Return the title of the panel and the query, for all queries of the dashboard."""
    targets = [(panel["title"], target) for panel in panels() for target in panel["targets"]]
    return targets + [(note["name"], note) for note in DASHBOARD["annotations"]["list"]]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watch(tmp_path_factory.mktemp("watched"), [str(path) for path in RULES]) as watched:
        yield watched


def test_rules_are_well_formed() -> None:
    said = promtool("check", "rules", *RULES)

    assert said.count("SUCCESS") == len(RULES)


def test_recorded_names_are_those_of_the_vllm_that_is_asked_for() -> None:
    asked_for = re.findall(r'"vllm(?:-cpu)?==([\d.]+)"', (ROOT / "pyproject.toml").read_text())

    assert set(asked_for) == {VLLM["version"]}


def test_alerts_fire_when_they_should_and_at_no_other_time() -> None:
    assert "SUCCESS" in promtool("test", "rules", RULE_TESTS)


def test_every_alert_is_made_to_fire() -> None:
    text = RULE_TESTS.read_text()

    assert set(re.findall(r'alertname="(\w+)"', text)) == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_alert_says_how_bad_it_is_and_what_to_do(name: str) -> None:
    alert = ALERTS[name]

    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert all(text.strip().endswith((".", "}}")) for text in alert["annotations"].values())


def test_runbooks_name_settings_that_exist() -> None:
    documented = set(re.findall(r"^\| `([\w.*]+)`", (ROOT / "docs/settings.md").read_text(), re.MULTILINE))
    known = {name.replace("engines.*.", "") for name in documented}
    for alert in ALERTS.values():
        texts = " ".join(alert["annotations"].values())
        named = re.findall(r"\b(?:admission|store|limits|server)\.\w+", texts)
        named += re.findall(r"\b(?:engine_stall_s|max_engine_restarts|api_key_env)\b", texts)
        assert set(named) <= known, alert["alert"]


def test_runbooks_quote_what_the_log_says() -> None:
    source = "".join(path.read_text() for folder in ("gateway", "engine") for path in (ROOT / folder).rglob("*.py"))
    quoted = {quote for alert in ALERTS.values() for quote in re.findall(r'"([^"]+)"', alert["annotations"]["runbook"])}

    assert {quote for quote in quoted if quote not in source} == set()


def test_readme_explains_every_alert_once() -> None:
    chapter = (ROOT / "docs/monitoring.md").read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]

    named = [name for line in chapter.splitlines() for name in re.findall(r"`(Shannon\w+)`", line.split(" | ")[0])]
    assert sorted(named) == sorted(ALERTS)


def test_rules_are_evaluated_without_an_error(watched: Watched) -> None:
    def evaluated() -> list[dict[str, Any]]:
        groups = watched.prometheus.get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in evaluated()), "all rules are evaluated", 60)

    assert len(evaluated()) == len(rules())
    assert [rule["lastError"] for rule in evaluated() if rule["health"] != "ok"] == []


def test_alert_names_what_is_wrong(watched: Watched) -> None:
    def raised() -> list[dict[str, Any]]:
        alerts = watched.prometheus.get("alerts")["alerts"]
        return [alert for alert in alerts if alert["labels"]["alertname"] == "ShannonUpstreamDown"]

    wait_until(lambda: bool(raised()), "the alert is raised", 60)

    (alert,) = raised()
    assert alert["annotations"]["summary"] == "Server 1 in engines.far.urls is not used."


def test_rules_and_dashboard_use_metrics_that_are_there(watched: Watched) -> None:
    known = watched.names | SCRAPED | {rule["record"] for rule in rules() if "record" in rule}
    expressions = {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules()}
    expressions |= {title: filled(target["expr"]) for title, target in dashboard_targets()}

    unknown = {where: metrics_of(expression) - known for where, expression in expressions.items()}

    assert {where: names for where, names in unknown.items() if names} == {}


@pytest.mark.parametrize(
    ("title", "target"), dashboard_targets(), ids=lambda of: of if isinstance(of, str) else of.get("refId", "")
)
def test_query_of_the_dashboard_has_an_answer(watched: Watched, title: str, target: dict[str, Any]) -> None:
    expression = filled(target["expr"])
    # What is shown only where it is more than nothing may be absent here.
    if not expression.endswith("> 0"):
        wait_until(partial(watched.answers, expression), f"{expression} has an answer", 60)
    samples = watched.prometheus.query(expression)

    for label in re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")):
        assert all(label in sample["metric"] for sample in samples), label


@pytest.mark.parametrize(
    "variable", [v for v in DASHBOARD["templating"]["list"] if v["type"] == "query"], ids=lambda of: of["name"]
)
def test_variable_of_the_dashboard_has_values(watched: Watched, variable: dict[str, Any]) -> None:
    found = re.fullmatch(r"label_values\((.+), (\w+)\)", filled(variable["query"]["query"]))
    assert found is not None
    selector, label = found.groups()

    wait_until(partial(watched.answers, selector), f"{selector} has samples", 60)
    assert watched.prometheus.get(f"label/{label}/values", **{"match[]": selector})


@pytest.mark.parametrize("scenario", ["default", "remote"])
def test_autoscaling_asks_for_metrics_that_are_there(watched: Watched, scenario: str) -> None:
    hpa = find(scenario, "HorizontalPodAutoscaler", SERVICE, "autoscaling.type=hpa")
    keda = find(scenario, "ScaledObject", SERVICE, "autoscaling.type=keda")

    assert {metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]} <= watched.names
    for trigger in keda["spec"]["triggers"]:
        query = trigger["metadata"]["query"]
        wait_until(partial(watched.answers, query), f"{query} has an answer", 60)


def test_page_of_the_gateway_is_free_of_lint(watched: Watched) -> None:
    page = httpx.get(f"{watched.gateway.url}/metrics", headers=watched.gateway.authorization, timeout=10).text

    promtool("check", "metrics", content=page)
    documented = [family for family in text_string_to_metric_families(page) if family.documentation]
    assert len(documented) > 30


def test_chart_carries_rules_and_dashboard_as_they_are() -> None:
    on = [f"monitoring.{what}.enabled=true" for what in ("rules", "dashboard")]
    groups = find("default", "PrometheusRule", SERVICE, *on)["spec"]["groups"]
    dashboard = find("default", "ConfigMap", f"{SERVICE}-dashboard", *on)

    assert [rule for group in groups for rule in group["rules"]] == rules()
    assert json.loads(dashboard["data"]["shannon.json"]) == DASHBOARD
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_chart_monitors_nothing_unless_it_is_asked_to() -> None:
    assert not {"ServiceMonitor", "PrometheusRule"} & {manifest["kind"] for manifest in manifests("default")}


def test_dashboard_has_one_id_and_one_place_for_each_panel() -> None:
    everything = DASHBOARD["panels"]
    ids = [panel["id"] for panel in everything]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in everything)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len(set(ids)) == len(ids)
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_dashboard_explains_and_measures_every_panel() -> None:
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)


def test_dashboard_takes_its_data_from_the_source_that_is_chosen() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    sources = [panel["datasource"] for panel in panels()]
    sources += [target["datasource"] for panel in panels() for target in panel["targets"]]
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    sources += [variable["datasource"] for variable in variables.values() if variable["type"] == "query"]
    sources += [note["datasource"] for note in DASHBOARD["annotations"]["list"]]

    assert all(source == chosen for source in sources)
    assert variables["datasource"]["query"] == "prometheus"
    used = set(re.findall(r"\$(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__range", "__all"}
    assert used == set(variables) - {"datasource"}


def test_screen_of_the_dashboard_fits_a_screen() -> None:
    rows = [panel["gridPos"]["y"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    end = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in DASHBOARD["panels"])

    assert max(after - row for row, after in itertools.pairwise([*rows, end])) <= 24
