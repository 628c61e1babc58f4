"""What a metric is before it counts anything: its name, type, labels, and the process that it is of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Metric = TypeVar("Metric", Counter, Gauge, Histogram)


class Kind(StrEnum):
    """The type that the exposition names."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Process(StrEnum):
    """Whose page a family is on."""

    FRONT_DOOR = "front_door"
    SCHEDULER = "scheduler"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One metric with all its label sets."""

    name: str
    """As a query names it: a counter's ends in `_total`; a histogram's is without `_bucket` and the like."""
    kind: Kind
    help: str
    labels: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    """The values of each label; None: they are configured (plans, models) or found (workers)."""
    sets: tuple[tuple[str, ...], ...] | None = None
    """Those that begin at 0, in the order of `labels`; None: all combinations, where all values are known."""
    buckets: tuple[float, ...] = ()
    """Upper edges, without the last, which is infinite."""
    exemplars: bool = False
    """Whether its buckets may name a trace that fell into them."""
    processes: frozenset[Process] = frozenset()
    ours: bool = True
    """False: the client library makes it, by itself."""

    @property
    def series(self) -> tuple[str, ...]:
        """The names that a query may use."""
        if self.kind is Kind.HISTOGRAM:
            return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")
        return (self.name,)

    def known_sets(self, configured: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, ...]]:
        """Yield the label sets that are known beforehand, with the configured values of open labels."""
        if self.sets is not None:
            yield from self.sets
            return
        values = [
            configured.get(label, ()) if known is None else known for label, known in self.labels.items()
        ]
        yield from product(*values)


class Registry(CollectorRegistry):
    """The families of one process."""

    def __init__(self, **configured: Iterable[str]) -> None:
        """Make an empty one. `configured` are the values of open labels that are known beforehand."""
        super().__init__(auto_describe=True)
        self._configured = {label: tuple(values) for label, values in configured.items()}

    def counter(self, family: Family) -> Counter:
        """Return a family that only grows, every known label set at 0."""
        return self._at_zero(family, Counter(family.name, family.help, family.labels, registry=self))

    def gauge(self, family: Family) -> Gauge:
        """Return a family that rises and falls, every known label set at 0."""
        return self._at_zero(family, Gauge(family.name, family.help, family.labels, registry=self))

    def histogram(self, family: Family) -> Histogram:
        """Return a family of buckets, every known label set at 0."""
        metric = Histogram(family.name, family.help, family.labels, buckets=family.buckets, registry=self)
        return self._at_zero(family, metric)

    def _at_zero(self, family: Family, metric: Metric) -> Metric:
        # A series that appears with its first event is invisible to `rate` until the second.
        if family.labels:
            for labels in family.known_sets(self._configured):
                metric.labels(*labels)
        return metric
