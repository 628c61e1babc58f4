"""Every series that a query may ask for: of the catalogue, our recording rules, Prometheus, and Ray."""

from __future__ import annotations

from scheduler.metrics import Kind, catalogue
from tests.ops.promql import Series, series_of
from tests.ops.shipped import rules

OURS = series_of(catalogue())

_RECORDED = {
    rule["record"]: Series(kind=Kind.GAUGE, labels={"slo": None}) for rule in rules() if "record" in rule
}
_OF_PROMETHEUS = {
    "up": Series(kind=Kind.GAUGE),
    "scrape_samples_post_metric_relabeling": Series(kind=Kind.GAUGE),
    "ALERTS": Series(
        kind=Kind.GAUGE,
        labels={
            "alertname": None,
            "alertstate": ("pending", "firing"),
            "severity": None,
            "worker": None,
            "tier": None,
        },
    ),
}
# As the pinned Ray exports them, with labels that have been seen.
OF_RAY = {
    "ray_node_cpu_count": Series(kind=Kind.GAUGE, labels={"ip": None}),
    "ray_scheduler_unscheduleable_tasks": Series(
        kind=Kind.GAUGE,
        labels={
            "Reason": (
                "Infeasible",
                "WaitingForPlasmaMemory",
                "WaitingForRemoteResources",
                "WaitingForResources",
                "WaitingForWorkers",
            )
        },
    ),
}
KNOWN = {**OURS, **_RECORDED, **_OF_PROMETHEUS, **OF_RAY}
