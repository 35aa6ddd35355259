"""What several dashboards share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from grafana.panels import BLUE, GREEN, ORANGE, RED, Panel, Query, Unit, Variable

RATE: Final = "[$__rate_interval]"
SYMBOL: Final = Variable("symbol", "Symbol", "book_synced", "which symbols are shown")
SERVICE: Final = Variable("service", "Service", "orderflow_ready", "which services are shown")
OF_SYMBOL: Final = '{symbol=~"$symbol"}'
OF_SERVICE: Final = '{service=~"$service"}'


def rate_by(label: str, metric: str, selector: str = "", eventful: bool = False) -> Query:
    """Events per second, a line for each value of the label."""
    return Query(f"sum by ({label}) (rate({metric}{selector}{RATE}))", f"{{{{{label}}}}}", eventful)


def trailing_hour(label: str, metric: str) -> str:
    """How many within the hour, by a label, where there are any.

    A label that came up within the hour begins at what had happened until its first scrape, which `increase` takes for
    the beginning and not for growth: such a series counts whole.
    """
    return f"sum by ({label}) ((increase({metric}[1h]) and {metric} offset 1h) or {metric}) > 0"


def newest_by_symbol(metric: str) -> Query:
    """The newest value of each symbol; where two processes give one, for a moment, the larger."""
    return Query(f"max by (symbol) ({metric}{OF_SYMBOL})", "{{symbol}}")


def of_symbol(title: str, metric: str, unit: str, text: str, **more: float) -> Panel:
    """A line for each symbol."""
    return Panel(title, text, unit, (newest_by_symbol(metric),), **more)  # type: ignore[arg-type]


READY: Final = Panel(
    "Ready",
    "Whether every process of the service owns partitions and works, and the broker takes and gives. A row that ends: "
    "the service is not there any more.",
    Unit.Short,
    (Query("min by (service) (orderflow_ready)", "{{service}}"),),
    kind="states",
    width=12,
    steps=((1, GREEN),),
    below=RED,
    names={0: ("not ready", RED), 1: ("ready", GREEN)},
)
REGIMES: Final[Mapping[float, tuple[str, str]]] = {
    1.0: ("active", GREEN),
    2.0: ("quiet", BLUE),
    3.0: ("neutral", "text"),
}
"""Number -> (regime, colour)."""
LATENCY_STEPS: Final = ((50.0, ORANGE), (120.0, RED))
