"""What a dashboard is made of here, turned into Grafana's own types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.models import common, units
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Kind: TypeAlias = Literal["lines", "bars", "stat", "heatmap", "states", "table"]
DATASOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="prometheus")
"""The one of grafana/provisioning."""
GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"
WIDTH: Final = 24
"""Of Grafana's grid."""
ALL: Final = ".*"
"""What a variable stands for where everything is chosen: takes series without that label too."""
NO_VALUE: Final = "none"

Unit: Final = units


@dataclass(frozen=True, slots=True)
class Query:
    """One question to Prometheus."""

    expr: str
    legend: str = ""
    eventful: bool = False
    """Has series only when something has happened (a gap, a reject): none is an answer too."""


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    text: str
    """What it shows, and what to make of it."""
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    width: int = 8
    height: int = 8
    lowest: float | None = None
    highest: float | None = None
    steps: tuple[tuple[float, str], ...] = ()
    """(from this value on, colour); below the first it is green, or of the colour `below`."""
    below: str = GREEN
    names: Mapping[float, tuple[str, str]] | None = None
    """Value -> (text, colour) in place of a number."""
    decimals: int | None = None

    @property
    def instant(self) -> bool:
        """Whether it shows what is now, and nothing of before."""
        return self.kind in ("stat", "table")


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    label: str
    metric: str
    """Whose values of the label `name` are offered."""
    text: str


@dataclass(frozen=True, slots=True)
class Board:
    uid: str
    """Also the name of the file, and what links lead to."""
    title: str
    text: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = ()
    since: str = "now-1h"
    refresh: str = "10s"

    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]


Builder: TypeAlias = Any
"""One of the SDK's panel builders: they share methods, and no type."""


def build(board: Board) -> models.Dashboard:
    """The dashboard as Grafana's own type; panels from left to right, numbered in the order in which they stand."""
    made = (
        dashboards.Dashboard(board.title)
        .uid(board.uid)
        .description(board.text)
        .tags(["orderflow"])
        .readonly()
        .timezone("utc")
        .time(board.since, "now")
        .refresh(board.refresh)
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(_links())
    )
    for variable in board.variables:
        made = made.with_variable(_variable(variable))
    number = 0
    for row in board.rows:
        number += 1
        made = made.with_row(dashboards.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            made = made.with_panel(_panel(panel).id(number))
    return made.build()


def _links() -> dashboards.DashboardLink:
    return (
        dashboards.DashboardLink("orderflow")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags(["orderflow"])
        .as_dropdown(False)
        .include_vars(True)
        .keep_time(True)
    )


def _variable(variable: Variable) -> dashboards.QueryVariable:
    return (
        dashboards.QueryVariable(variable.name)
        .label(variable.label)
        .description(variable.text)
        .datasource(DATASOURCE)
        .query(f"label_values({variable.metric}, {variable.name})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(ALL)
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _panel(panel: Panel) -> Builder:
    made = (
        KINDS[panel.kind](panel)
        .title(panel.title)
        .description(panel.text)
        .datasource(DATASOURCE)
        .unit(panel.unit)
        .no_value(NO_VALUE)
        .span(panel.width)
        .height(panel.height)
    )
    for letter, query in zip("ABCDEFGH", panel.queries):
        made = made.with_target(_target(panel, query).ref_id(letter))
    if panel.lowest is not None:
        made = made.min(panel.lowest)
    if panel.highest is not None:
        made = made.max(panel.highest)
    if panel.decimals is not None:
        made = made.decimals(panel.decimals)
    if panel.names:
        made = made.mappings([_mapping(panel.names)])
    return made.thresholds(_thresholds(panel))


def _target(panel: Panel, query: Query) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend or "__auto").datasource(DATASOURCE)
    if panel.kind == "table":
        return target.instant().format(PromQueryFormat.TABLE)
    if panel.instant:
        # Over a range, the last value would stand for an hour after its source is gone.
        return target.instant()
    return target.range()


def _mapping(names: Mapping[float, tuple[str, str]]) -> models.ValueMap:
    return models.ValueMap(
        options={
            f"{value:g}": models.ValueMappingResult(text=text, color=colour, index=index)
            for index, (value, (text, colour)) in enumerate(names.items())
        }
    )


def _thresholds(panel: Panel) -> dashboards.ThresholdsConfig:
    below = panel.below if panel.steps or panel.kind != "stat" else BLUE
    return (
        dashboards.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps(
            [
                models.Threshold(value=None, color=below),
                *(models.Threshold(value=value, color=colour) for value, colour in panel.steps),
            ]
        )
    )


# -- kinds ------------------------------------------------------------------------------------------------------------


def _lines(panel: Panel) -> Builder:
    made = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(8)
        .show_points(common.VisibilityMode.AUTO)
        # A pause in the data is shown as one.
        .span_nulls(False)
        .tooltip(
            common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
        .color_scheme(dashboards.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC))
    )
    if panel.steps:
        made = made.thresholds_style(
            common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        )
    return made


def _bars(panel: Panel) -> Builder:
    return (
        _lines(panel)
        .draw_style(common.GraphDrawStyle.BARS)
        .fill_opacity(60)
        .stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    )


def _stat(panel: Panel) -> Builder:
    return (
        stat.Panel()
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .graph_mode(common.BigValueGraphMode.NONE)
        .color_mode(common.BigValueColorMode.VALUE)
        .color_scheme(dashboards.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
    )


def _heatmap(panel: Panel) -> Builder:
    """A row for each series; the colour is its value, a share."""
    return (
        heatmap.Panel()
        .calculate(False)
        .rows_frame(heatmap.RowsHeatmapOptions().layout(common.HeatmapCellLayout.AUTO).value(panel.title))
        .color(
            heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64).min(0.0).max(1.0)
        )
        # As it comes, a cell of nothing would not be drawn, as if it were not known.
        .filter_values(heatmap.FilterValueRange().le(-1.0))
        .cell_values(heatmap.CellValues().unit(panel.unit))
    )


def _states(panel: Panel) -> Builder:
    return (
        statetimeline.Panel()
        .merge_values(True)
        .show_value(common.VisibilityMode.NEVER)
        .color_scheme(dashboards.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .row_height(0.8)
    )


def _table(panel: Panel) -> Builder:
    return table.Panel().show_header(True).filterable(True)


KINDS: Final[Mapping[Kind, Callable[[Panel], Builder]]] = {
    "lines": _lines,
    "bars": _bars,
    "stat": _stat,
    "heatmap": _heatmap,
    "states": _states,
    "table": _table,
}
