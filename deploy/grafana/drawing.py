"""How a board becomes the JSON that Grafana 11.6 reads: panels in rows of two, numbered from 1."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as drawn
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

GREEN, YELLOW, RED = "green", "yellow", "red"

_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")


class Shape(Enum):
    """How a panel draws what its queries return."""

    LINES = "lines"
    STACK = "stack"
    SHARES = "shares"
    """A stack of parts of one."""
    TILE = "tile"
    TABLE = "table"
    HEATMAP = "heatmap"


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked of Prometheus; `legend` names each series that it returns."""

    expr: str
    legend: str
    exemplars: bool = False
    unit: str | None = None
    """Of this query alone, on an axis to the right; None: the panel's."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One question and its answer."""

    question: str
    means: str
    unit: str
    """As Grafana names it: `s`, `percentunit` (1 is 100 %), `short` (a number)."""
    queries: tuple[Query, ...]
    shape: Shape = Shape.LINES
    limits: tuple[tuple[float | None, str], ...] = ()
    """From which value on which colour is right; None: from the lowest."""
    signed: bool = False
    """Whether values below 0 say something: otherwise the axis begins there."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """Up to nine panels that answer one question."""

    uid: str
    question: str
    means: str
    panels: tuple[Panel, ...]
    events: tuple[Query, ...] = ()
    """What is marked across all panels when it happens, under the name of its legend."""


def as_json(board: Board, others: Iterable[Board]) -> str:
    """Return the board as Grafana keeps it, with links to the others."""
    built = (
        dashboard.Dashboard(f"Darkroom: {board.question}")
        .uid(board.uid)
        .description(board.means)
        .tags(["darkroom"])
        .time("now-6h", "now")
        .timezone("browser")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .readonly()
    )
    for variable in _variables():
        built.with_variable(variable)
    for other in others:
        built.link(
            dashboard.DashboardLink(other.question)
            .type(models.DashboardLinkType.LINK)
            .url(f"/d/{other.uid}")
            .keep_time(True)
            .include_vars(True)
        )
    for event in board.events:
        built.annotation(
            dashboard.AnnotationQuery()
            .name(event.legend)
            .datasource(_SOURCE)
            .enable(True)
            .icon_color("blue")
            .expr(event.expr)
        )
    for number, panel in enumerate(board.panels, start=1):
        built.with_panel(_DRAWN[panel.shape](panel, number))
    return json.dumps(built.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _variables() -> Iterable[Any]:
    yield dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    for name, within in (("job", ""), ("cluster", '{job=~"$job"}')):
        yield (
            dashboard.QueryVariable(name)
            .label(name.capitalize())
            .datasource(_SOURCE)
            .query(f"label_values(darkroom_build_info{within}, {name})")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            # Not the values that are found: where no series has the label, there are none.
            .all_value(".*")
            .current(models.VariableOption(text="All", value="$__all"))
        )


def _lines(panel: Panel, number: int) -> Any:
    built = _filled(timeseries.Panel(), panel, number, wide=12, high=8)
    built.legend(
        common.VizLegendOptions()
        .display_mode(drawn.LegendDisplayMode.LIST)
        .placement(drawn.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    tooltip = common.VizTooltipOptions().mode(drawn.TooltipDisplayMode.MULTI)
    built.tooltip(tooltip.sort(drawn.SortOrder.DESCENDING))
    if not panel.signed:
        built.min(0)
    if panel.shape in (Shape.STACK, Shape.SHARES):
        built.fill_opacity(40).stacking(common.StackingConfig().mode(drawn.StackingMode.NORMAL))
    if panel.shape is Shape.SHARES:
        built.max(1)
    if panel.limits:
        dashed = common.GraphThresholdsStyleConfig().mode(drawn.GraphThresholdsStyleMode.DASHED)
        built.thresholds_style(dashed)
    return built


def _tile(panel: Panel, number: int) -> Any:
    built = _filled(stat.Panel(), panel, number, wide=6, high=5)
    return built.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).decimals(1)


def _table(panel: Panel, number: int) -> Any:
    built = _filled(table.Panel(), panel, number, wide=12, high=8)
    labels_only = {"excludeByName": {"Time": True, "Value": True}}
    return built.with_transformation(models.DataTransformerConfig(id_val="organize", options=labels_only))


def _heatmap(panel: Panel, number: int) -> Any:
    built = _filled(heatmap.Panel(), panel, number, wide=12, high=8)
    return built.calculate(False).y_axis(heatmap.YAxisConfig().unit(panel.unit))


def _filled(built: Any, panel: Panel, number: int, *, wide: int, high: int) -> Any:
    """Return the builder with what is the same for all shapes."""
    built.id(number).title(panel.question).description(panel.means).unit(panel.unit)
    built.datasource(_SOURCE).span(wide).height(high)
    if panel.limits:
        steps = [models.Threshold(value=value, color=color) for value, color in panel.limits]
        built.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    for letter, query in zip(string.ascii_uppercase, panel.queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).ref_id(letter).datasource(_SOURCE)
        if query.legend:
            target.legend_format(query.legend)
        if query.exemplars:
            target.exemplar(True)
        if panel.shape in (Shape.TABLE, Shape.TILE):
            target.instant()
        else:
            target.range()
        if panel.shape is Shape.TABLE:
            target.format(PromQueryFormat.TABLE)
        elif panel.shape is Shape.HEATMAP:
            target.format(PromQueryFormat.HEATMAP)
        built.with_target(target)
        if query.unit is not None:
            built.override_by_query(
                letter,
                [
                    models.DynamicConfigValue(id_val="unit", value=query.unit),
                    models.DynamicConfigValue(id_val="custom.axisPlacement", value="right"),
                ],
            )
    return built


_DRAWN: dict[Shape, Callable[[Panel, int], Any]] = {
    Shape.LINES: _lines,
    Shape.STACK: _lines,
    Shape.SHARES: _lines,
    Shape.TILE: _tile,
    Shape.TABLE: _table,
    Shape.HEATMAP: _heatmap,
}
