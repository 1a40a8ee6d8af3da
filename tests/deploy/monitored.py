"""What the tests of deploy/prometheus and deploy/grafana share: the files, and enough PromQL to see
which series an expression reads and how."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from api import monitoring
from api.store import Snapshot
from shared import metrics
from tests.conftest import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
FOREIGN = {
    # Series that others export: Prometheus itself, prometheus_client's process collector,
    # dcgm-exporter (docs.nvidia.com/datacenter/dcgm/latest/gpu-telemetry/dcgm-exporter.html).
    "up",
    "ALERTS",
    "process_start_time_seconds",
    "process_resident_memory_bytes",
    "process_cpu_seconds_total",
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_FB_FREE",
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_GPU_TEMP",
}


@cache
def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def dashboard_files() -> list[Path]:
    return sorted((GRAFANA / "dashboards").glob("*.json"))


def dashboards() -> dict[str, Any]:
    """By file name; parsed anew, so that a test may break its copy."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in dashboard_files()}


def panels(dashboard: Any) -> list[Any]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, Any, str]]:
    """(dashboard, panel, expression) of every target."""
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield name, panel, target["expr"]


def rules(kind: str) -> dict[str, Any]:
    """`alert` or `record` -> the rules of that kind, by name."""
    return {
        rule[kind]: rule
        for path in sorted((PROMETHEUS / "rules").glob("*.yml"))
        for group in parsed(path)["groups"]
        for rule in group["rules"]
        if kind in rule
    }


def rule_tests() -> list[Any]:
    return [
        test
        for path in sorted((PROMETHEUS / "tests").glob("*.yml"))
        for test in parsed(path)["tests"]
    ]


@cache
def exported() -> frozenset[str]:
    """Every series that our code exports, histograms with their suffixes."""
    names: set[str] = set()
    of_store = CollectorRegistry()
    of_store.register(
        monitoring._FromStore(Snapshot(1, 1.0, 1, {}, (), slots=1, slot_seconds=1.0), ROOT)
    )
    registry = CollectorRegistry()
    metrics.ApiMetrics(registry)
    metrics.build_info(registry)
    worker = CollectorRegistry()
    metrics.WorkerMetrics("model", "cpu", worker)
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    for family in (f for r in (registry, worker, of_store) for f in r.collect()):
        names.update(family.name + suffix for suffix in suffixes.get(family.type, [""]))
    return frozenset(names)


def known() -> set[str]:
    return {*exported(), *FOREIGN, *rules("record")}


@dataclass(frozen=True)
class Selector:
    """One `name{matchers}[range]` of an expression, and the function that is applied to it."""

    name: str
    matchers: tuple[str, ...]
    range: str | None
    function: str | None


_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan", "start", "end"}
_CLAUSE = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_SELECTOR = re.compile(
    r"(?:(?P<function>\w+)\(\s*)?(?<![\w:.$\"])(?P<name>[a-zA-Z_][\w:]*)(?![\w:]|\s*\()"
    r"(?:\{(?P<matchers>[^{}]*)\})?(?:\[(?P<range>[^\]]+)\])?"
)


def selectors(expression: str) -> list[Selector]:
    """In the order of the expression."""
    plain = _CLAUSE.sub(" ", expression)
    quoted: list[str] = []

    def keep(match: re.Match[str]) -> str:
        quoted.append(match[0])
        return f'"{len(quoted) - 1}"'

    def restore(text: str) -> str:
        return re.sub(r'"(\d+)"', lambda m: quoted[int(m[1])], text)

    plain = re.sub(r'"(?:[^"\\]|\\.)*"', keep, plain)
    return [
        Selector(
            match["name"],
            tuple(restore(part.strip()) for part in (match["matchers"] or "").split(",") if part),
            match["range"],
            match["function"],
        )
        for match in _SELECTOR.finditer(plain)
        if match["name"].lower() not in _WORDS
    ]


def limit(alert: str) -> float:
    """The number that an alert begins above: the first in its expression that is not `> 0`, which
    keeps divisors off zero."""
    numbers = map(float, re.findall(r"> (\d+(?:\.\d+)?)", rules("alert")[alert]["expr"]))
    return next(number for number in numbers if number)
