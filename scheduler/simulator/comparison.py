"""Policies side by side on one workload, at one load or several, and the report of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scheduler.policy.limits import Limits
from scheduler.simulator import plots, report
from scheduler.simulator.policies import CONTESTANTS
from scheduler.simulator.report import Comparison, Figures, Groups
from scheduler.simulator.simulation import PLAN_CAPS, Simulated, parameters_for, simulate
from scheduler.simulator.workload import Workload
from scheduler.simulator.world import Cluster


class UnknownPolicy(ValueError):
    """A policy that was asked for is none; the message names those there are."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no policy is called {name!r}; there are {', '.join(CONTESTANTS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What is to be compared, and on what."""

    workload: Workload
    cluster: Cluster
    policies: Sequence[str]
    """The first is compared with each of the others."""
    loads: Sequence[float] = ()
    """Shares of the fleet's capacity that the jobs are to ask for; none: as the workload comes."""
    limits: Limits = PLAN_CAPS
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `UnknownPolicy`."""
        for name in self.policies:
            if name not in CONTESTANTS:
                raise UnknownPolicy(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The policies at one load."""

    load: float
    simulations: Sequence[Simulated]
    groups: Groups
    figures: Sequence[Figures]
    comparisons: Sequence[Comparison]

    @property
    def events(self) -> int:
        """Events and decisions of all of them; for measuring speed."""
        return sum(simulated.events for simulated in self.simulations)


def results(experiment: Experiment, told: Callable[[str], None] = lambda line: None) -> Iterator[Result]:
    """Simulate, load by load. `told` is called with what is being done.

    Raises `simulation.Stuck` if a policy leaves jobs waiting for ever.
    """
    cluster = experiment.cluster
    groups = Groups.of(experiment.workload)
    for wanted in experiment.loads or (None,):
        workload = experiment.workload
        if wanted is not None:
            workload = workload.at_load(wanted, cluster.capacity)
        load = workload.load(cluster.capacity)
        simulations = []
        for name in experiment.policies:
            told(f"{len(workload.requests):,} jobs at {load:.0%} under {name} …")
            contestant = CONTESTANTS[name]
            simulations.append(
                simulate(contestant, workload, cluster, limits=experiment.limits, seed=experiment.seed)
            )
        figures = [report.figures(simulated, groups) for simulated in simulations]
        yield Result(
            load=load,
            simulations=simulations,
            groups=groups,
            figures=figures,
            comparisons=[
                report.compare(
                    simulations[0],
                    other,
                    groups,
                    utilisation_permille=(figures[0].utilisation_permille, theirs.utilisation_permille),
                    seed=experiment.seed,
                )
                for other, theirs in zip(simulations[1:], figures[1:], strict=True)
            ],
        )


def preamble(experiment: Experiment) -> str:
    """Return what was compared on what, in Markdown."""
    cluster, workload, limits = experiment.cluster, experiment.workload, experiment.limits
    speeds = " and ".join(f"{speed / 1000:g}" for speed in cluster.speeds_permille)
    caps = (
        f"{limits.running} jobs of an account run at once, {limits.relax_running} of them relax"
        if limits is PLAN_CAPS
        else "off"
    )
    faults = (
        "no GPU dies"
        if cluster.mtbf_hours is None
        else f"each GPU dies every {cluster.mtbf_hours:g} h on average and is back after "
        f"{cluster.repair_ms / 60_000:g} min; checkpoints every {cluster.checkpoint_steps} steps"
    )
    groups = Groups.of(workload)
    lines = [
        f"jobs: {workload.source}",
        "loop: closed (a user waits for the picture, thinks as long as in the trace, and sends the next)"
        if workload.closed
        else "loop: open (jobs come when they come)",
        f"fleet: {cluster.gpus} GPUs of speed {speeds}, {cluster.models_per_gpu} models at once in each, "
        f"{cluster.model_load_ms / 1000:g} s to load one; {faults}",
        f"caps: {caps}; nobody is turned away",
        f"costs: as predicted; the largest is {workload.longest_ms / 1000:,.1f} s; old is a job that waited "
        f"{parameters_for(workload).aging_ms / 60_000:,.0f} min",
        f"seed: {experiment.seed}",
        f"accounts: {sum(map(len, (groups.light, groups.middle, groups.heavy))):,}, of which light "
        f"{len(groups.light):,}, middle {len(groups.middle):,}, heavy {len(groups.heavy):,}; "
        f"{len(groups.lighter_half_of_use):,} make up the lighter half of use",
        "loads: by stretching the times between arrivals (and those to think) by one factor",
        *(f"policy {name}: {CONTESTANTS[name].what}" for name in experiment.policies),
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def written(result: Result) -> str:
    """Return the tables of one load, in Markdown."""
    return f"## Load {result.load:.0%}\n\n" + report.tables(result.figures, result.comparisons)


def save(experiment: Experiment, found: Sequence[Result], folder: Path) -> list[Path]:
    """Write report and plots into a folder; return the files.

    Raises `plots.PlotsMissing`, after the report is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [preamble(experiment), *(written(result) for result in found)]
    text = folder / "report.md"
    text.write_text("\n".join(parts))
    numbers = folder / "report.json"
    numbers.write_text(
        report.as_json(
            {
                "about": preamble(experiment).splitlines(),
                "loads": [
                    {"load": round(one.load, 6), "policies": one.figures, "comparisons": one.comparisons}
                    for one in found
                ],
            }
        )
    )
    files = [text, numbers]
    for result in found:
        files += plots.draw(result.simulations, result.groups, folder / f"load-{result.load * 100:.0f}")
    return files
