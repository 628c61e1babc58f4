"""darkroom's server side: serve, demo, migrate, sweep-artifacts, doctor, lead, stop, simulate, replay."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from scheduler.logs import configure_logs
from scheduler.provenance import SettingsWrong, read_settings
from scheduler.settings import RELEASE, Settings

_THIS_MACHINE = {"host": "127.0.0.1"}
_PLAIN_TEXT = {"tls_certificate": None, "tls_key": None, "tls_client_ca": None}

server = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Run Darkroom.", pretty_exceptions_enable=False
)
_errors = Console(stderr=True, highlight=False)

EXIT_USAGE = 2
EXIT_TROUBLE = 3
EXIT_CHECK_FAILED = 6
EXIT_AT_ONCE = 130
"""It was told to stop before it had started, or twice: it has waited for nothing."""

DataDir = Annotated[Path | None, typer.Option(help="Folder of embedded PostgreSQL, pictures and models.")]
Dsn = Annotated[
    str | None,
    typer.Option(help="PostgreSQL to use, not the embedded one; DARKROOM_DATABASE__DSN hides it better."),
]


@server.command()
def serve(
    data_dir: DataDir = None,
    dsn: Dsn = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join (`auto`, host:port).")] = None,
    artifacts_url: Annotated[
        str | None, typer.Option(help="Where pictures go: a folder or any fsspec address.")
    ] = None,
    models_file: Annotated[Path | None, typer.Option(help="models.toml; default: the packaged one.")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Workers of a local Ray; 0: one for each GPU here, or two on the CPU.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address the front door listens on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the front door; 0 for any.")] = None,
    ops_port: Annotated[int | None, typer.Option(help="Port of /metrics; 0 for any.")] = None,
    engine: Annotated[str | None, typer.Option(help="`diffusers`, or `timed` for a stub.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Run the service until it is told to stop; what is not given is embedded."""
    settings = _settings(
        _given(data_dir=data_dir, artifacts_url=artifacts_url, models_file=models_file, log_level=log_level),
        database=_given(dsn=dsn),
        ray=_given(address=ray_address, local_gpus=gpus),
        frontdoor=_given(host=host, port=port),
        ops=_given(port=ops_port),
        worker=_given(engine=engine),
    )
    configure_logs(settings.log_level)
    with _expected_trouble():
        asyncio.run(_serve(settings))


@server.command()
def demo(
    prompt: Annotated[str | None, typer.Argument(help="What the first picture should show.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave it up, and print address and keys.")] = False,
    images: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("darkroom-images"),
    data_dir: DataDir = None,
) -> None:
    """Start everything on this machine, make four jobs of two accounts, show and explain them, stop."""
    configure_logs("error")
    base = Settings().data_dir if data_dir is None else data_dir
    settings = _settings(
        {"data_dir": base / "demo" if data_dir is None else base, "artifacts_url": None},
        # Never what a service is told here: its accounts and its admin key are not to try things with.
        database={"dsn": None},
        ray={"address": None},
        scaling={"max_workers": None},
        frontdoor={**_THIS_MACHINE, **_PLAIN_TEXT, **_given(port=None if keep else 0)},
        ops={**_THIS_MACHINE, **_given(port=None if keep else 0)},
    )
    with _expected_trouble():
        asyncio.run(_demo(settings, prompt=prompt, images_dir=images, keep=keep))


@server.command()
def migrate(
    data_dir: DataDir = None,
    dsn: Dsn = None,
    after: Annotated[
        bool, typer.Option("--after", help="Also what the release before could not live with: it has ended.")
    ] = False,
) -> None:
    """Bring the database to this release's schema, and say what was done and what is left.

    The release before may serve meanwhile. With --after nothing of another release may: it looks.
    """
    from scheduler.store.embedded import embedded_postgresql
    from scheduler.store.migrate import migrate_database, migrate_database_before

    settings = _settings(_given(data_dir=data_dir), database=_given(dsn=dsn))

    async def act(address: str, everything: bool) -> None:
        if everything:
            done = await migrate_database(address, release=settings.release)
        else:
            done = await migrate_database_before(address)
        for migration in done.applied:
            print(f"applied {migration.package}/{migration.name}")
        for migration in done.waiting:
            print(f"waits for --after, once nothing older runs: {migration.package}/{migration.name}")
        if not done.applied and not done.waiting:
            print("nothing to do: the schema is this release's")

    with _expected_trouble(), ExitStack() as stack:
        if settings.database.dsn is not None:
            asyncio.run(act(settings.database.dsn, after))
        else:
            own = stack.enter_context(embedded_postgresql(settings.data_dir / "database"))
            asyncio.run(act(own, True))


@server.command()
def sweep_artifacts(
    data_dir: DataDir = None,
    dsn: Dsn = None,
    artifacts_url: Annotated[
        str | None, typer.Option(help="Where pictures are: a folder or any fsspec address.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what no job has.")] = False,
) -> None:
    """Look through the whole artifact store for files that no row names, as the service does in three days.

    What is found is noted, and removed once it has been noted for a week (`lifetimes.orphans_days`).
    """
    from scheduler.store.embedded import embedded_postgresql

    configure_logs("error")
    settings = _settings(_given(data_dir=data_dir, artifacts_url=artifacts_url), database=_given(dsn=dsn))
    with _expected_trouble(), ExitStack() as stack:
        address = settings.database.dsn or stack.enter_context(
            embedded_postgresql(settings.data_dir / "database")
        )
        asyncio.run(_sweep_artifacts(settings, address, dry_run))


async def _sweep_artifacts(settings: Settings, dsn: str, dry_run: bool) -> None:
    from scheduler.frontdoor.artifacts import Artifacts
    from scheduler.frontdoor.orphans import Orphans
    from scheduler.metrics import FrontDoorMetrics
    from scheduler.store.pool import open_pool

    pool = await open_pool(dsn, 2, application="darkroom sweep")
    kept = timedelta(days=settings.lifetimes.orphans_days)
    # Nobody scrapes this process: what it does is printed.
    metrics = FrontDoorMetrics(())
    orphans = Orphans(pool, Artifacts(settings.artifacts), metrics, lambda: datetime.now(UTC), kept)
    noted = 0
    try:
        for part in range(256):
            if dry_run:
                async for orphan in orphans.found(f"{part:02x}"):
                    print(f"{'would go now' if orphan.is_due else 'would be noted'}: {orphan.path}")
            else:
                swept = await orphans.sweep(f"{part:02x}")
                noted += swept.noted
                for path in swept.removed:
                    print(f"removed: {path}")
        if not dry_run:
            print(f"noted, to be removed in {kept.days} days unless a row names them: {noted}")
    finally:
        await pool.close()


@server.command()
def doctor(
    data_dir: DataDir = None,
    dsn: Dsn = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check this machine and what the service's settings lead to: `darkroom doctor` without the client.

    Exits with 6 if something does not work, and with 7 if something ought to be looked at.
    """
    from scheduler.client.commands_doctor import report
    from scheduler.client.printing import Printer
    from scheduler.doctor import service_diagnoses

    report(Printer(as_json=as_json), service_diagnoses(data_dir=data_dir, dsn=dsn))


@server.command()
def stop(
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join (`auto`, host:port).")] = None,
) -> None:
    """End the scheduler and the workers on a Ray cluster, of whichever release they are.

    What runs is handed over first, and jobs that wait stay in the database.
    """
    from scheduler.cluster.ray_session import ray_session, stop_actors

    settings = Settings()
    address = ray_address or settings.ray.address
    if address is None:
        _errors.print("a local service ends with its `darkroom serve`; give --ray-address for a cluster")
        raise typer.Exit(EXIT_USAGE)
    cluster = settings.ray.model_copy(update={"address": address})
    with _expected_trouble(), ray_session(cluster):
        for name in stop_actors(cluster.namespace, settings.scheduling.close_down_within_ms / 1000):
            print(f"stopped {name}")


@server.command()
def lead(
    dsn: Dsn = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join (`auto`, host:port).")] = None,
    artifacts_url: Annotated[
        str | None, typer.Option(help="Where pictures go: a folder or any fsspec address.")
    ] = None,
) -> None:
    """Let this release's scheduler lead on a Ray cluster, whichever leads now: the way back to an older one.

    A newer release takes the lead by itself, with its first `darkroom serve`. Run it beside a front door,
    with its settings: the scheduler gets them.
    """
    from scheduler.app import take_lead

    settings = _settings(
        _given(artifacts_url=artifacts_url), database=_given(dsn=dsn), ray=_given(address=ray_address)
    )
    if settings.ray.address is None:
        _errors.print("a local service has one scheduler; give --ray-address for a cluster")
        raise typer.Exit(EXIT_USAGE)
    with _expected_trouble():
        print(f"{asyncio.run(take_lead(settings))} leads")


@server.command(name="simulate")
def simulate_policies(
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the simulated fleet.")],
    trace: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="CSV, plain or gzip, with arrival_s, user, kind, gpu_seconds. Without it, jobs are made up.",
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Policies with commas between; the first is compared with each of the others.")
    ] = "ours,none,kill,sfq,fifo,least-used,round-robin",
    load: Annotated[
        str, typer.Option(help="Shares of the fleet to ask for, such as 0.8,1.0,1.3; none: as the jobs come.")
    ] = "",
    closed: Annotated[
        bool, typer.Option("--closed/--open", help="A user waits for a picture before sending the next job.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    faults: Annotated[
        float | None, typer.Option(min=0.001, help="Mean hours between the deaths of one GPU.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report and plots.")] = None,
    from_hours: Annotated[float, typer.Option(min=0, help="Where in the trace to begin.")] = 0.0,
    hours: Annotated[float | None, typer.Option(min=0.001, help="How much of it to use.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="At most so many jobs of it.")] = None,
    users_share: Annotated[
        float, typer.Option(min=0.0001, max=1, help="Share of its users, drawn with all their jobs.")
    ] = 1.0,
    divide_cost: Annotated[float, typer.Option(min=0.001, help="Divide its gpu_seconds by this.")] = 1.0,
    fast_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of jobs that ask for fast, where no tiers are given.")
    ] = 0.2,
    fast_minutes: Annotated[
        float, typer.Option(min=0, help="Fast GPU-minutes of an account a month; then its jobs are relax.")
    ] = 200.0,
    caps: Annotated[bool, typer.Option(help="Limit each account to 3 jobs at once, 2 of them relax.")] = True,
    speeds: Annotated[str, typer.Option(help="Speed classes, dealt to the GPUs in turn: 1,1.5.")] = "1",
    jobs: Annotated[int, typer.Option(min=1, help="Jobs to make up, without a trace.")] = 20_000,
    accounts: Annotated[int, typer.Option(min=1, help="Accounts that send them.")] = 500,
) -> None:
    """Compare scheduling policies on a recorded or made-up workload: a table, and plots with --out."""
    from scheduler.simulator import comparison, simulation, workload
    from scheduler.simulator.plots import PlotsMissing
    from scheduler.simulator.world import Cluster

    fast = workload.FastRule(share=fast_share, allowance_ms=round(fast_minutes * 60_000))
    part = workload.Cut(
        from_hours=from_hours, hours=hours, rows=rows, users_share=users_share, divide_cost=divide_cost
    )
    try:
        if trace is None:
            made_up = workload.Generator(jobs=jobs, accounts=accounts, hours=hours or 24.0)
            wanted = workload.generate(made_up, fast=fast, seed=seed)
        else:
            wanted = workload.read_trace(trace, cut=part, fast=fast, seed=seed)
        experiment = comparison.Experiment(
            workload=dataclasses.replace(wanted, closed=closed),
            cluster=Cluster(
                gpus=gpus,
                speeds_permille=tuple(round(1000 * speed) for speed in _numbers(speeds)),
                mtbf_hours=faults,
            ),
            policies=policy.split(","),
            loads=_numbers(load),
            limits=simulation.PLAN_CAPS if caps else simulation.NO_CAPS,
            seed=seed,
        )
    except (workload.TraceWrong, comparison.UnknownPolicy) as wrong:
        _errors.print(f"darkroom: {wrong}", style="red")
        raise typer.Exit(EXIT_USAGE) from wrong
    print(comparison.preamble(experiment))
    found = []
    began_s = time.perf_counter()
    for result in comparison.results(experiment, told=_errors.print):
        took_s = time.perf_counter() - began_s
        _errors.print(f"{result.events:,} events and decisions in {took_s:.1f} s, tables included")
        found.append(result)
        print(comparison.written(result))
        began_s = time.perf_counter()
    if out is not None:
        try:
            files = comparison.save(experiment, found, out)
        except PlotsMissing as missing:
            _errors.print(f"darkroom: {missing}", style="red")
            raise typer.Exit(EXIT_USAGE) from missing
        for file in files:
            _errors.print(f"wrote {file}")


@server.command(name="replay")
def replay_recordings(
    files: Annotated[
        list[Path],
        typer.Argument(exists=True, dir_okay=False, help="Recordings, from `scheduling.record_to`."),
    ],
) -> None:
    """Decide all that a scheduler decided once more, from its recording, and compare.

    Each cycle is decided twice: deciding must change nothing. Exits with 6 at the first difference, and shows
    what led to it.
    """
    from scheduler.policy.board import Board
    from scheduler.recording import Recording, RecordingWrong
    from scheduler.replay import replay

    differ = False
    for file in files:
        try:
            recording = Recording(file)
            header = recording.header
            print(f"{file}: of release {header.release}, epoch {header.epoch}")
            if header.release != RELEASE:
                print(f"This is release {RELEASE}, which may decide otherwise on purpose.")
            done = replay(recording, Board(header.parameters))
        except RecordingWrong as wrong:
            _errors.print(f"darkroom: {wrong}", style="red")
            raise typer.Exit(EXIT_USAGE) from wrong
        same = "the same" if done.difference is None else "not the same"
        print(f"{done.events:,} events, {done.cycles:,} cycles, {done.decisions:,} decisions: {same}")
        if done.difference is None:
            print(recording.end.sentence)
        else:
            differ = True
            for sentence in done.difference.sentences():
                print(sentence)
    if differ:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _numbers(text: str) -> list[float]:
    """Return the numbers above 0 in a list with commas."""
    try:
        numbers = [float(one) for one in text.split(",") if one]
    except ValueError:
        numbers = [0.0]
    if not all(0 < number < float("inf") for number in numbers):
        _errors.print(f"darkroom: {text!r} has to be numbers above 0 with commas between", style="red")
        raise typer.Exit(EXIT_USAGE)
    return numbers


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _settings(top: dict[str, Any], **sections: dict[str, Any]) -> Settings:
    """Return the settings with these flags over the environment and the file.

    Exits with all that is wrong.
    """
    try:
        return read_settings(**top, **{name: given for name, given in sections.items() if given})
    except SettingsWrong as wrong:
        for problem in wrong.problems:
            _errors.print(problem, style="red")
        raise typer.Exit(EXIT_USAGE) from None


@contextmanager
def _expected_trouble() -> Iterator[None]:
    """Make one sentence and exit code 3 of expected trouble; a bug keeps its traceback."""
    from gpu_worker.models import ModelsFileWrong
    from scheduler.app import NotReady
    from scheduler.client.errors import DarkroomError
    from scheduler.refusals import Overloaded
    from scheduler.store.embedded import AlreadyServing
    from scheduler.store.migrate import (
        AfterMigrationsWaiting,
        DatabaseNotOwned,
        DatabaseUnreachable,
        OlderReleaseRuns,
        SchemaBusy,
        SchemaChanged,
        SchemaTooNew,
    )

    try:
        yield
    except DarkroomError as refused:
        _errors.print(f"darkroom: {refused}", style="red")
        raise typer.Exit(refused.exit_code) from refused
    except (
        AfterMigrationsWaiting,
        AlreadyServing,
        DatabaseNotOwned,
        DatabaseUnreachable,
        ModelsFileWrong,
        NotReady,
        OlderReleaseRuns,
        Overloaded,
        SchemaBusy,
        SchemaChanged,
        SchemaTooNew,
        OSError,
        RuntimeError,
    ) as trouble:
        _errors.print(f"darkroom: {trouble}", style="red")
        raise typer.Exit(EXIT_TROUBLE) from trouble
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise typer.Exit(EXIT_AT_ONCE) from None


async def _serve(settings: Settings) -> None:
    from scheduler.app import running

    async with running(settings, show_worker_logs=True) as service:
        stopped = _stop_signal()
        print(f"Darkroom takes jobs at {service.address}; metrics at http://{service.ops_address}/metrics")
        if service.admin_key is not None:
            print(f"The admin's key, shown once: {service.admin_key}")
        sys.stdout.flush()
        await service.unless_it_fails(stopped.wait())


async def _demo(settings: Settings, *, prompt: str | None, images_dir: Path, keep: bool) -> None:
    from scheduler.app import running
    from scheduler.demo import run_demo

    console = Console(highlight=False)
    console.print(
        "Starting PostgreSQL, Ray and its GPU workers, the scheduler and the front door …", soft_wrap=True
    )
    async with running(settings, new_admin_key=True) as service:
        assert service.admin_key is not None
        await service.unless_it_fails(
            run_demo(
                address=service.address,
                admin_key=service.admin_key,
                prompt=prompt,
                images_dir=images_dir,
                console=console,
                keep=keep,
            )
        )
        if keep:
            stopped = _stop_signal()
            console.print("It stays up until you press Ctrl-C.")
            await service.unless_it_fails(stopped.wait())


def _stop_signal() -> asyncio.Event:
    """Return what SIGINT and SIGTERM set; the second of them cancels the caller's task, which waits no more.

    Called once Ray has been started: Ray takes SIGTERM for itself.
    """
    stopped = asyncio.Event()
    serving = asyncio.current_task()
    assert serving is not None

    def told() -> None:
        if stopped.is_set():
            serving.cancel()
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told)
    return stopped


if __name__ == "__main__":
    server()
