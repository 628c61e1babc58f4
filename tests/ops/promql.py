"""Says what is wrong with a query: metrics and labels that do not exist, and functions of the wrong type.

A query of a metric that nobody makes is valid, and empty for ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import promql_parser as promql

from scheduler.metrics import Family, Kind

_OF_TARGETS = {"job", "cluster", "instance"}
"""Labels that a scrape adds to every series."""
_RATES = {"rate", "increase", "irate"}


@dataclass(frozen=True, kw_only=True)
class Series:
    """What a query may ask of a name."""

    kind: Kind
    labels: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    """Closed values of each; None: any."""


def series_of(families: tuple[Family, ...]) -> dict[str, Series]:
    """Return every series of a catalogue by its name."""
    found = {}
    for family in families:
        for name in family.series:
            labels = dict(family.labels)
            kind = family.kind
            if family.kind is Kind.HISTOGRAM:
                kind = Kind.COUNTER  # each of its three series only grows
                if name.endswith("_bucket"):
                    labels["le"] = (*(str(float(edge)) for edge in family.buckets), "+Inf")
            found[name] = Series(kind=kind, labels=labels)
    return found


def faults(expr: str, known: Mapping[str, Series], *, legend: str = "") -> list[str]:
    """Return what is wrong with a query; nothing, if it is right."""
    parsed = promql.parse(expr)
    found: list[str] = []
    for node, above in _nodes(parsed, ()):
        if isinstance(node, promql.VectorSelector):
            found += _selector_faults(node, above, known)
        elif isinstance(node, promql.AggregateExpr):
            found += _grouping_faults(node, known)
        elif isinstance(node, promql.Call) and node.func.name == "histogram_quantile":
            found += _quantile_faults(node)
    kept = {label for node, _ in _nodes(parsed, ()) for label in _by(node)}
    found += [
        f"legend: no series has {label}" for label in re.findall(r"{{(\w+)}}", legend) if label not in kept
    ]
    return found


def selectors(expr: str) -> Iterator[promql.VectorSelector]:
    """Yield every selector of a query."""
    for node, _ in _nodes(promql.parse(expr), ()):
        if isinstance(node, promql.VectorSelector):
            yield node


def _nodes(
    node: promql.Expr, above: tuple[promql.Expr, ...]
) -> Iterator[tuple[promql.Expr, tuple[promql.Expr, ...]]]:
    yield node, above
    children: list[promql.Expr] = []
    if isinstance(node, promql.AggregateExpr | promql.UnaryExpr | promql.ParenExpr | promql.SubqueryExpr):
        children = [node.expr]
    elif isinstance(node, promql.BinaryExpr):
        children = [node.lhs, node.rhs]
    elif isinstance(node, promql.Call):
        children = list(node.args)
    elif isinstance(node, promql.MatrixSelector):
        children = [node.vector_selector]
    for child in children:
        yield from _nodes(child, (*above, node))


def _selector_faults(
    node: promql.VectorSelector, above: tuple[promql.Expr, ...], known: Mapping[str, Series]
) -> Iterator[str]:
    series = known.get(node.name or "")
    if series is None:
        yield f"{node.name} is not in the catalogue"
        return
    function = next((one.func.name for one in reversed(above) if isinstance(one, promql.Call)), None)
    ranged = bool(above) and isinstance(above[-1], promql.MatrixSelector)
    if series.kind is Kind.COUNTER and not (ranged and function in _RATES):
        yield f"{node.name} only grows: it says something as a rate or an increase"
    if series.kind is Kind.GAUGE and ranged and function in _RATES:
        yield f"{node.name} is a gauge: it has no {function}"
    for matcher in node.matchers.matchers:
        if matcher.name in _OF_TARGETS:
            continue
        if matcher.name not in series.labels:
            yield f"{node.name} has no label {matcher.name}"
            continue
        values = series.labels[matcher.name]
        # Each alternative on its own, but for those in brackets.
        expression = matcher.op in (promql.MatchOp.Re, promql.MatchOp.NotRe)
        wanted = re.split(r"\|(?![^(]*\))", matcher.value) if expression else [matcher.value]
        if values is not None:
            yield from (
                f"{matcher.name} of {node.name} is never {value!r}"
                for value in wanted
                if not any(re.fullmatch(value, one) for one in values)
            )


def _grouping_faults(node: promql.AggregateExpr, known: Mapping[str, Series]) -> Iterator[str]:
    below = [one for one, _ in _nodes(node.expr, ()) if isinstance(one, promql.VectorSelector)]
    labels = {label for one in below for label in known.get(one.name or "", Series(kind=Kind.GAUGE)).labels}
    for label in _by(node):
        if below and label not in labels | _OF_TARGETS:
            yield f"nothing below has the label {label}"


def _quantile_faults(node: promql.Call) -> Iterator[str]:
    summed = node.args[1]
    if not (isinstance(summed, promql.AggregateExpr) and str(summed.op) == "sum" and "le" in _by(summed)):
        yield "a quantile is of sum by (le, ...)"
        return
    rate = summed.expr
    if not (isinstance(rate, promql.Call) and rate.func.name == "rate"):
        yield "a quantile is of rates"
        return
    if not rate.args[0].vector_selector.name.endswith("_bucket"):
        yield "a quantile is of buckets"


def _by(node: promql.Expr) -> list[str]:
    modifier = node.modifier if isinstance(node, promql.AggregateExpr) else None
    if modifier is not None and modifier.type == promql.AggModifierType.By:
        return list(modifier.labels)
    return []
