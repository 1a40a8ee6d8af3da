"""The dashboards: the rules of grafana/dashboard-linter, and ours. Reading the files is enough; the
queries are evaluated in test_prometheus.py."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.monitored import (
    GRAFANA,
    PROMETHEUS,
    Selector,
    dashboards,
    known,
    limit,
    panels,
    parsed,
    queries,
    rules,
    selectors,
)

SOURCE = {"type": "prometheus", "uid": "${prometheus_datasource}"}
UNITS = {
    # Those of Grafana's list (packages/grafana-data/src/valueFormats/categories.ts) that we use.
    "none",
    "s",
    "bytes",
    "percent",
    "percentunit",
    "ops",
    "reqps",
    "celsius",
}
LIMITS = {
    # (dashboard, panel) that shows what an alert watches -> that alert
    ("overview", "Oldest wait"): "WhisperQueueBacklog",
    ("overview", "Age of the oldest"): "WhisperQueueBacklog",
    ("overview", "Failed"): "WhisperHighFailureRatio",
    ("overview", "Server errors"): "WhisperHighErrorRate",
    ("overview", "Slots in use"): "WhisperWorkersSaturated",
    ("overview", "Redis memory"): "WhisperRedisMemoryHigh",
    ("overview", "Disk"): "WhisperDiskFilling",
    ("overview", "Real-time factor"): "WhisperRtfAboveOne",
    ("workers", "Slots in use"): "WhisperWorkersSaturated",
    ("workers", "Real-time factor by worker"): "WhisperRtfAboveOne",
    ("workers", "Oldest heartbeat"): "WhisperHeartbeatStale",
    ("workers", "Heartbeat"): "WhisperHeartbeatStale",
    ("workers", "GPU memory"): "WhisperGpuMemoryHigh",
    ("api", "Server errors"): "WhisperHighErrorRate",
    ("api", "Server errors over time"): "WhisperHighErrorRate",
    ("api", "Slow requests"): "WhisperSlowApi",
    ("api", "Answers"): "WhisperSlowApi",
}

Problems = Iterator[str]


# --- The linter's rules, by its names -------------------------------------------------------------


def template_datasource_rule(dashboard: Any) -> Problems:
    found = [v for v in dashboard["templating"]["list"] if v["type"] == "datasource"]
    if [(v["name"], v["label"], v["query"]) for v in found] != [
        ("prometheus_datasource", "Prometheus data source", "prometheus")
    ]:
        yield "the data source is no variable as the linter wants it"


def template_job_rule(dashboard: Any) -> Problems:
    yield from template_rule(dashboard, "job")


def template_instance_rule(dashboard: Any) -> Problems:
    yield from template_rule(dashboard, "instance")


def template_rule(dashboard: Any, name: str) -> Problems:
    found = [v for v in dashboard["templating"]["list"] if v["name"] == name]
    wanted = {
        "type": "query",
        "datasource": SOURCE,
        "label": name.title(),
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
    }
    if len(found) != 1 or not wanted.items() <= found[0].items():
        yield f"variable {name}"


def template_label_promql_rule(dashboard: Any) -> Problems:
    for variable in dashboard["templating"]["list"]:
        query = variable["query"]
        if variable["type"] == "query" and not re.fullmatch(r"label_values\(.+, \w+\)", query):
            yield f"{variable['name']}: {query}"


def template_on_time_change_reload_rule(dashboard: Any) -> Problems:
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query" and variable["refresh"] != 2:
            yield f"variable {variable['name']} is not read again when the time changes"


def uneditable_dashboard_rule(dashboard: Any) -> Problems:
    if dashboard["editable"] is not False:
        yield "editable"


def panel_datasource_rule(dashboard: Any) -> Problems:
    for panel in panels(dashboard):
        for holder in (panel, *panel["targets"]):
            if holder.get("datasource") != SOURCE:
                yield panel["title"]


def panel_title_description_rule(dashboard: Any) -> Problems:
    for panel in panels(dashboard):
        if not (panel.get("title") and panel.get("description", "").endswith(".")):
            yield f"panel {panel['id']} has no title, or no description in sentences"


def panel_units_rule(dashboard: Any) -> Problems:
    for panel in panels(dashboard):
        if panel["fieldConfig"]["defaults"].get("unit") not in UNITS:
            yield panel["title"]


def panel_no_targets_rule(dashboard: Any) -> Problems:
    for panel in panels(dashboard):
        if not panel.get("targets") or not all(target.get("expr") for target in panel["targets"]):
            yield panel["title"]


def target_rate_interval_rule(dashboard: Any) -> Problems:
    for title, found in read_by(dashboard):
        if found.function in {"rate", "irate"} and found.range != "$__rate_interval":
            yield f"{title}: rate over {found.range}"


def target_job_rule(dashboard: Any) -> Problems:
    yield from target_matcher_rule(dashboard, "job")


def target_instance_rule(dashboard: Any) -> Problems:
    yield from target_matcher_rule(dashboard, "instance")


def target_matcher_rule(dashboard: Any, label: str) -> Problems:
    excluded = exclusions(f"target-{label}-rule")
    for title, found in read_by(dashboard):
        matchers = [m for m in found.matchers if re.match(rf"{label}\b", m)]
        is_excluded = (dashboard["title"], title) in excluded
        if is_excluded == (matchers == [f'{label}=~"${label}"']):
            yield f"{title}: {found.name}"


def target_counter_agg_rule(dashboard: Any) -> Problems:
    for title, found in read_by(dashboard):
        is_counter = found.name.endswith(("_total", "_bucket", "_sum", "_count"))
        if is_counter != (found.function in {"rate", "irate", "increase"}):
            yield f"{title}: {found.name}"


def target_histogram_rule(dashboard: Any) -> Problems:
    for panel in panels(dashboard):
        for target in panel["targets"]:
            expression = target["expr"]
            if ("_bucket" in expression) != ("histogram_quantile" in expression):
                yield panel["title"]


def read_by(dashboard: Any) -> Iterator[tuple[str, Selector]]:
    for panel in panels(dashboard):
        for target in panel["targets"]:
            for found in selectors(target["expr"]):
                yield panel["title"], found


def exclusions(rule: str) -> set[tuple[str, str]]:
    """(dashboard, panel) that the linter's own configuration lets off. It must be in use."""
    listed = yaml.safe_load((GRAFANA / "dashboards" / ".lint").read_text())["exclusions"]
    return {(e["dashboard"], e["panel"]) for e in listed.get(rule, {"entries": []})["entries"]}


# --- Ours -----------------------------------------------------------------------------------------


def places(dashboard: Any) -> Problems:
    """Within 24 columns, and no two on the same spot."""

    def cells(panel: Any) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        return {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }

    for panel in dashboard["panels"]:
        if panel["gridPos"]["x"] + panel["gridPos"]["w"] > 24 or not cells(panel):
            yield f"panel {panel['id']} is not within 24 columns"
    for one, other in combinations(dashboard["panels"], 2):
        if cells(one) & cells(other):
            yield f"panels {one['id']} and {other['id']} overlap"


def identity(dashboard: Any) -> Problems:
    """Ids count from 1 in the order of the file, so that an edit stays easy to read."""
    ids = [panel["id"] for panel in dashboard["panels"]]
    if ids != list(range(1, len(ids) + 1)):
        yield f"ids: {ids}"
    for title, count in Counter(panel["title"] for panel in dashboard["panels"]).items():
        if count > 1:
            yield f"{count} panels are called {title}"
    for panel in panels(dashboard):
        letters = [target["refId"] for target in panel["targets"]]
        if letters != list("ABCDEFG"[: len(letters)]):
            yield f"{panel['title']}: {letters}"


def tiles_of_a_fresh_install(dashboard: Any) -> Problems:
    """A tile shows 0, not 'No data', before the first job."""
    for panel in panels(dashboard):
        if panel["type"] in {"stat", "gauge"} and "vector(0)" not in panel["targets"][0]["expr"]:
            yield panel["title"]


def classic_format(dashboard: Any) -> Problems:
    """Grafana 11, 12 and 13 load these versions of the format from files."""
    if not 39 <= dashboard["schemaVersion"] <= 41:
        yield f"schemaVersion {dashboard['schemaVersion']}"
    if not re.fullmatch(r"whisper-[a-z]+", dashboard.get("uid", "")):
        yield "uid"
    if "whisper" not in dashboard["tags"] or dashboard["links"][0]["tags"] != ["whisper"]:
        yield "no links to the other dashboards"
    if [a["name"] for a in dashboard["annotations"]["list"]] != ["Firing alerts"]:
        yield "firing alerts are not marked in the graphs"


def names_of_series(dashboard: Any) -> Problems:
    for title, found in read_by(dashboard):
        if found.name not in known():
            yield f"{title}: nothing exports {found.name}"
    for variable in dashboard["templating"]["list"]:
        for name in re.findall(r"\b(?:whisper|http|DCGM)_\w+", variable["query"]):
            if name not in known():
                yield f"variable {variable['name']}: nothing exports {name}"


RULES: list[Callable[[Any], Problems]] = [
    template_datasource_rule,
    template_job_rule,
    template_instance_rule,
    template_label_promql_rule,
    template_on_time_change_reload_rule,
    uneditable_dashboard_rule,
    panel_datasource_rule,
    panel_title_description_rule,
    panel_units_rule,
    panel_no_targets_rule,
    target_rate_interval_rule,
    target_job_rule,
    target_instance_rule,
    target_counter_agg_rule,
    target_histogram_rule,
    places,
    identity,
    tiles_of_a_fresh_install,
    classic_format,
    names_of_series,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", dashboards())
def test_every_dashboard_follows(rule, name):
    assert list(rule(dashboards()[name])) == []


def variable(name: str, **changes: Any) -> Callable[[Any], None]:
    def change(dashboard: Any) -> None:
        found = next(v for v in dashboard["templating"]["list"] if v["name"] == name)
        found.update(changes)

    return change


def panel(**changes: Any) -> Callable[[Any], None]:
    """Changes a graph of the overview that has an ordinary query."""

    def change(dashboard: Any) -> None:
        found = next(p for p in panels(dashboard) if p["title"] == "Audio per second")
        found.update(changes)

    return change


def query(old: str, new: str, title: str = "Audio per second") -> Callable[[Any], None]:
    def change(dashboard: Any) -> None:
        target = next(p for p in panels(dashboard) if p["title"] == title)["targets"][0]
        assert old in target["expr"]
        target["expr"] = target["expr"].replace(old, new)

    return change


def moved(dashboard: Any) -> None:
    dashboard["panels"][2]["gridPos"]["x"] -= 1


@pytest.mark.parametrize(
    ("rule", "break_it"),
    [
        (template_datasource_rule, variable("prometheus_datasource", label="Source")),
        (template_job_rule, variable("job", multi=False)),
        (template_instance_rule, variable("instance", allValue=".*")),
        (template_label_promql_rule, variable("job", query="up")),
        (template_on_time_change_reload_rule, variable("job", refresh=1)),
        (uneditable_dashboard_rule, lambda dashboard: dashboard.update(editable=True)),
        (panel_datasource_rule, panel(datasource={"type": "prometheus", "uid": "prometheus"})),
        (panel_title_description_rule, panel(description="")),
        (panel_units_rule, panel(fieldConfig={"defaults": {"unit": "seconds"}})),
        (panel_no_targets_rule, panel(targets=[])),
        (target_rate_interval_rule, query("$__rate_interval", "5m")),
        (target_job_rule, query('job=~"$job"', 'job="$job"')),
        (target_job_rule, query("ALERTS{", 'ALERTS{job=~"$job", ', "Firing alerts")),
        (target_instance_rule, query(', instance=~"$instance"', "")),
        (target_counter_agg_rule, query("rate", "max_over_time")),
        (target_counter_agg_rule, query("seconds_total", "seconds")),
        (target_histogram_rule, query("histogram_quantile(0.5, ", "abs(", "Typical wait")),
        (places, moved),
        (places, panel(gridPos={"x": 20, "y": 900, "w": 8, "h": 1})),
        (identity, panel(id=1)),
        (identity, panel(title="Queue")),
        (tiles_of_a_fresh_install, query(" or vector(0)", "", "Waiting now")),
        (classic_format, lambda dashboard: dashboard.update(schemaVersion=42)),
        (classic_format, lambda dashboard: dashboard.update(uid="")),
        (names_of_series, query("whisper_audio_seconds_total", "whisper_audio_total")),
        (names_of_series, variable("job", query="label_values(whisper_info, job)")),
    ],
)
def test_each_rule_sees_what_it_is_for(rule, break_it):
    """A rule that can't fail holds nothing."""
    dashboard = dashboards()["overview"]
    break_it(dashboard)
    assert list(rule(dashboard))


def test_thresholds_are_those_of_the_alerts():
    """A tile turns red, and a line is drawn, where the alert begins."""
    found = dashboards()
    for (name, title), alert in LIMITS.items():
        shown = next(p for p in panels(found[name]) if p["title"] == title)
        steps = shown["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert (steps[-1]["color"], steps[-1]["value"]) == ("red", limit(alert)), title
    coloured = {
        (name, panel["title"])
        for name, dashboard in found.items()
        for panel in panels(dashboard)
        for step in panel["fieldConfig"]["defaults"].get("thresholds", {"steps": []})["steps"]
        if step["color"] == "red" and step["value"] is not None
    }
    assert coloured - set(LIMITS) == {("overview", "Firing alerts")}


def test_each_dashboard_has_an_address_of_its_own():
    found = dashboards()
    assert sorted(found) == ["api", "overview", "workers"]
    assert {d["uid"] for d in found.values()} == {f"whisper-{name}" for name in found}


def test_every_metric_is_shown_somewhere():
    """What nobody looks at need not be counted."""
    shown = {found.name for _, _, expression in queries() for found in selectors(expression)}
    ours = {name for name in known() - set(rules("record")) if "_FI_" not in name}
    unshown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours} - {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in shown
    }
    assert unshown == {
        "up",  # whisper_store_up and whisper_worker_slots count what answers
        "process_start_time_seconds",  # for an alert
        "whisper_worker_busy_seconds_total",  # exact over hours; graphs read whisper_jobs_active
    }


def test_grafana_finds_prometheus_and_the_files():
    """The paths are those that the Compose file mounts."""
    (source,) = parsed(GRAFANA / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert (source["uid"], source["url"]) == ("prometheus", "http://prometheus:9090")
    scraped = parsed(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped, "else $__rate_interval is too short"
    assert source["isDefault"]
    (provider,) = parsed(GRAFANA / "provisioning" / "dashboards" / "whisper.yml")["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    assert provider["allowUiUpdates"] is False


def test_every_query_parses(tmp_path):
    """By promtool, as rules with names of their own."""
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("promtool is not installed (Debian package: prometheus)")
    expressions = [replaced(expression) for _, _, expression in queries()]
    as_rules = [{"record": f"query:{n}", "expr": e} for n, e in enumerate(expressions)]
    path: Path = tmp_path / "queries.yml"
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": as_rules}]}))
    command = [promtool, "check", "rules", path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(expressions)} rules found" in done.stdout


def replaced(expression: str, interval: str = "1m", period: str = "1h") -> str:
    """An expression as Grafana would send it, with every job and instance chosen."""
    text = expression.replace("$__rate_interval", interval).replace("$__range", period)
    text = re.sub(r"\$(job|instance)\b", ".+", text)
    assert "$" not in text, text
    return text
