"""The same numbers as pictures: SVG files, drawn by matplotlib, which a service need not have installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scheduler.policy.ids import AccountId, Tier
from scheduler.simulator.report import Groups, service_by_slice
from scheduler.simulator.simulation import Simulated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 96
_COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#7b5ea7", "#8d6e63", "#444444")


class PlotsMissing(RuntimeError):
    """matplotlib is not installed. `pip install -c constraints.txt '.[simulator]'` brings it."""

    def __init__(self) -> None:
        super().__init__(
            "plots need matplotlib: pip install -c constraints.txt '.[simulator]', or leave --out away"
        )


def draw(simulations: Sequence[Simulated], groups: Groups, folder: Path) -> list[Path]:
    """Draw waits, service per account over time, and utilisation; return the files, which are the same for
    the same simulations to the last byte.

    Raises `PlotsMissing`.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise PlotsMissing from missing
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "darkroom",
            "svg.fonttype": "none",
            "font.size": 9.0,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.3,
        }
    ):
        drawn = {
            "waits.svg": _waits(Figure(figsize=(10, 4), layout="constrained"), simulations),
            "service.svg": _service(Figure(layout="constrained"), simulations, groups),
            "utilisation.svg": _utilisation(Figure(figsize=(10, 4), layout="constrained"), simulations),
        }
        paths = []
        for name, figure in drawn.items():
            figure.savefig(folder / name, format="svg", metadata={"Date": None, "Creator": None})
            paths.append(folder / name)
    return paths


def _waits(figure: Figure, simulations: Sequence[Simulated]) -> Figure:
    """How many of a tier's jobs waited at most so long."""
    for axes, tier in zip(figure.subplots(1, 2, sharey=True), Tier, strict=True):
        for number, simulated in enumerate(simulations):
            waits = sorted(
                ended.wait_ms / 1000
                for ended in simulated.jobs
                if ended.request.tier is tier and not ended.given_up
            )
            if not waits:
                continue
            # A thousand points are a smooth line; a trace has a hundred thousand jobs.
            shown = [waits[min(len(waits) - 1, point * len(waits) // 1000)] for point in range(1001)]
            axes.plot(
                [max(0.1, wait) for wait in shown],
                [point / 10 for point in range(1001)],
                label=simulated.contestant.name,
                color=_COLOURS[number % len(_COLOURS)],
            )
        axes.set_xscale("log")
        axes.set_title(f"{tier}: waits")
        axes.set_xlabel("seconds (0.1 and less at the left edge)")
    figure.axes[0].set_ylabel("% of jobs that waited at most so long")
    figure.axes[1].legend()
    return figure


def _service(figure: Figure, simulations: Sequence[Simulated], groups: Groups) -> Figure:
    """The GPU time given so far: to each of the accounts that asked for most, and to the light ones."""
    columns = 2
    rows = -(-len(simulations) // columns)
    figure.set_size_inches(10, 3 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, simulated in zip(grid.flat, simulations, strict=False):
        _service_of(axes, simulated, groups)
    for axes in list(grid.flat)[len(simulations) :]:
        axes.set_visible(False)
    grid.flat[0].legend(fontsize=7)
    figure.supxlabel("hours")
    figure.supylabel("GPU-hours given so far")
    return figure


def _service_of(axes: Axes, simulated: Simulated, groups: Groups) -> None:
    asked: dict[AccountId, int] = {}
    for request in simulated.workload.requests:
        asked[request.account_id] = asked.get(request.account_id, 0) + request.cost_ms
    heaviest = sorted(asked, key=lambda one: (-asked[one], one))[:5]
    slices = service_by_slice(simulated, _POINTS)
    hours = [number * simulated.workload.span_ms / _POINTS / 3_600_000 for number in range(_POINTS + 1)]
    lines = [(account_id, frozenset((account_id,))) for account_id in heaviest]
    for number, (name, accounts) in enumerate([*lines, ("all light ones", groups.light)]):
        given = [0.0]
        for one in slices:
            given.append(given[-1] + sum(one.get(account, 0) for account in sorted(accounts)) / 3_600_000)
        axes.plot(hours, given, label=name, color=_COLOURS[number], linewidth=1.2)
    axes.set_title(simulated.contestant.name)


def _utilisation(figure: Figure, simulations: Sequence[Simulated]) -> Figure:
    """The share of the GPUs' time that was spent on jobs."""
    axes = figure.subplots()
    for number, simulated in enumerate(simulations):
        span_ms = simulated.workload.span_ms
        slice_ms = span_ms / _POINTS
        busy = [
            100 * sum(one.values()) / (slice_ms * simulated.cluster.gpus)
            for one in service_by_slice(simulated, _POINTS)
        ]
        hours = [(point + 0.5) * slice_ms / 3_600_000 for point in range(_POINTS)]
        axes.plot(
            hours, busy, label=simulated.contestant.name, color=_COLOURS[number % len(_COLOURS)], linewidth=1
        )
    axes.set_ylim(0, 105)
    axes.set_xlabel("hours")
    axes.set_ylabel("% of the GPUs busy with steps")
    axes.legend()
    return figure
