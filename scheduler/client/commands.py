"""The commands of `darkroom`. How they end is in `ExitCode`.

The commands that run a service live in the server's packages, which a client need not have installed; here
they are only named, and handed over with their arguments as they came.
"""

from __future__ import annotations

import importlib.metadata
import sys
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from scheduler.client.aio import DarkroomClient, succeeded
from scheduler.client.commands_account import add_to as add_account_to
from scheduler.client.commands_admin import admin
from scheduler.client.commands_doctor import doctor
from scheduler.client.commands_making import (
    DEFAULT_FOLDER,
    Fast,
    Out,
    Private,
    Show,
    Uploads,
    add_to,
    follow,
    printer_for,
    tier_of,
    visibility_of,
)
from scheduler.client.commands_top import top
from scheduler.client.config import NAMES, config_path, masked, store_setting
from scheduler.client.errors import ExitCode, NotEnded, ServerNotInstalled
from scheduler.client.names import Named, is_job, last_part
from scheduler.client.printing import Printer
from scheduler.client.running import (
    JobArgument,
    Json,
    WholeJobArgument,
    config_of,
    expected_trouble,
    go_on_if_agreed,
    named_argument,
    of_server,
    run,
)
from scheduler.client.terminal import kind_word, state_word
from scheduler.v1.job_pb2 import Job, JobState

app = typer.Typer(
    name="darkroom",
    help="Make pictures on a shared cluster of GPUs.",
    epilog="Exit status: " + "; ".join(f"{code:d} {code.meaning}" for code in ExitCode) + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they would print local variables, the key among them
)
add_to(app)
app.add_typer(admin, name="admin")
config_app = typer.Typer(help="Where the service is and which key to use.", no_args_is_help=True)
app.add_typer(config_app, name="config")

Limit = Annotated[int, typer.Option("--limit", min=1, help="At most so many.")]


class State(StrEnum):
    """States as they are typed."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"darkroom {importlib.metadata.version('darkroom')}")
        raise typer.Exit


@app.callback()
def _connection(
    context: typer.Context,
    address: Annotated[str | None, typer.Option(help=NAMES["address"])] = None,
    key: Annotated[str | None, typer.Option(help=f"{NAMES['key']}; DARKROOM_KEY hides it better")] = None,
    ca_file: Annotated[str | None, typer.Option(help=NAMES["ca_file"])] = None,
    certificate_file: Annotated[str | None, typer.Option(help=NAMES["certificate_file"])] = None,
    private_key_file: Annotated[str | None, typer.Option(help=NAMES["private_key_file"])] = None,
    plain_text: Annotated[bool, typer.Option("--plain-text", help=NAMES["plain_text"])] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    context.obj = {
        "address": address,
        "key": key,
        "ca_file": ca_file,
        "certificate_file": certificate_file,
        "private_key_file": private_key_file,
        "plain_text": "true" if plain_text else None,
    }


# Looking at jobs


@app.command()
def show(
    context: typer.Context,
    job: JobArgument,
    receipt: Annotated[
        bool, typer.Option("--receipt", help="What it cost, and all that makes the same bits again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print everything about one job."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        found = await client.get(job)
        if not receipt:
            printer.job(found)
        elif found.HasField("receipt"):
            printer.receipt(found)
        else:
            raise NotEnded(f"Job {found.uid} is {state_word(found.state)}.")

    run(context, printer, work)


@app.command()
def jobs(
    context: typer.Context,
    state: Annotated[list[State] | None, typer.Option(help="Only jobs in this state; repeatable.")] = None,
    account: Annotated[str, typer.Option(help="Of another account, for moderators.")] = "",
    limit: Limit = 20,
    as_json: Json = False,
) -> None:
    """List the account's jobs, newest first."""
    printer = Printer(as_json=as_json)
    states = [JobState.Value(f"JOB_STATE_{each.name}") for each in state or ()]

    async def work(client: DarkroomClient) -> None:
        listed: list[Job] = []
        async for job in client.jobs(states=states, account=account, page_size=min(limit, 100)):
            listed.append(job)
            if len(listed) == limit:
                break
        printer.jobs(listed)

    run(context, printer, work)


@app.command()
def feed(
    context: typer.Context,
    hidden: Annotated[bool, typer.Option("--hidden", help="Also what is hidden, for moderators.")] = False,
    limit: Limit = 20,
    as_json: Json = False,
) -> None:
    """List finished public upscales of all accounts, newest first."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        listed: list[Job] = []
        async for job in client.feed(show_hidden=hidden, page_size=min(limit, 100)):
            listed.append(job)
            if len(listed) == limit:
                break
        printer.jobs(listed)

    run(context, printer, work)


@app.command()
def watch(context: typer.Context, job: JobArgument, pictures: Show = None, as_json: Json = False) -> None:
    """Show what happens to a job until it has ended."""
    printer = printer_for(as_json=as_json, pictures=pictures)

    async def work(client: DarkroomClient) -> None:
        handle = await client.handle(job)
        if not as_json:
            printer.note(f"{kind_word(handle.job)}: {handle.job.prompt}")
        if printer.out.is_terminal and not as_json:
            await follow(printer, handle)
        else:
            async for update in handle.watch():
                printer.update(update)
        if not as_json:
            printer.finished(succeeded(handle.job), [])
        succeeded(handle.job)

    run(context, printer, work)


@app.command()
def cancel(context: typer.Context, job: JobArgument, as_json: Json = False) -> None:
    """Cancel a job; a running one stops at its next step."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        printer.job(await client.cancel(job))

    run(context, printer, work)


@app.command()
def delete(
    context: typer.Context,
    job: WholeJobArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete a finished job for good: its pictures, its prompt and all that leads to them."""
    printer = Printer(as_json=as_json)
    if not yes:
        found: list[Job] = []

        async def look(client: DarkroomClient) -> None:
            found.append(await client.get(job))

        run(context, printer, look)
        go_on_if_agreed(printer, _question(found[0]), otherwise="Nothing was deleted.")

    async def work(client: DarkroomClient) -> None:
        await client.delete(job)
        if as_json:
            printer.document({"deleted": last_part(job)})
        else:
            printer.line(f"{last_part(job)} deleted")

    run(context, printer, work)


def _question(job: Job) -> str:
    pictures = "1 picture" if len(job.images) == 1 else f"{len(job.images)} pictures"
    return f"Delete {kind_word(job)} {job.uid} ({job.prompt}) and its {pictures} for good?"


@app.command()
def explain(context: typer.Context, job: JobArgument, as_json: Json = False) -> None:
    """Say why a job is where it is, what has to end first, and when it will start."""
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        printer.explanation(await client.explain(job))

    run(context, printer, work)


@app.command(context_settings={"ignore_unknown_options": True})
def estimate(
    context: typer.Context,
    what: Annotated[
        list[str], typer.Argument(metavar="PROMPT|JOB", help="A prompt as for imagine, or a waiting job.")
    ],
    image: Uploads = None,
    model: Annotated[str, typer.Option(help="Model; otherwise the service's default.")] = "",
    fast: Fast = None,
    private: Private = None,
    plan: Annotated[str, typer.Option(help="Also say what it would be with this plan.")] = "",
    as_json: Json = False,
) -> None:
    """Say what a job would cost, when it would start and whom it would delay, in each tier."""
    printer = Printer(as_json=as_json)
    text = " ".join(what)

    async def work(client: DarkroomClient) -> None:
        if is_job(text):
            told = await client.estimate_job(text, plan=plan)
        else:
            told = await client.estimate(
                text,
                pictures=image or [],
                model=model,
                tier=tier_of(fast),
                visibility=visibility_of(private),
                plan=plan,
            )
        printer.estimate(told)

    run(context, printer, work)


@app.command()
def download(
    context: typer.Context,
    job: Annotated[
        Named | None,
        typer.Argument(
            metavar="[JOB]",
            parser=named_argument,
            help="Job, picture or video: id, resource name or file name; JOB/2, JOB/mp4.",
        ),
    ] = None,
    image: Annotated[int | None, typer.Argument(min=1, max=4, help="Only this picture.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All pictures of the account, as one ZIP archive.")
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE.zip", dir_okay=False, help="Where to save that archive."),
    ] = None,
    out: Out = DEFAULT_FOLDER,
    as_json: Json = False,
) -> None:
    """Save the pictures and videos of a job, one of them, or all pictures of the account."""
    if everything == (job is not None):
        raise typer.BadParameter("give a job, or --all for the pictures of all jobs")
    if to is not None and not everything:
        raise typer.BadParameter("--to is where the archive of --all goes; --out names a folder")
    printer = Printer(as_json=as_json)

    async def work(client: DarkroomClient) -> None:
        if job is not None:
            files = await client.download(job.name, out, image=image)
        elif to is not None:
            files = [await client.download_all(to.parent, file_name=to.name)]
        else:
            files = [await client.download_all(out)]
        if as_json:
            printer.document({"files": [str(file) for file in files]})
        else:
            for file in files:
                printer.line(str(file))

    run(context, printer, work)


add_account_to(app)
app.command()(top)
app.command()(doctor)


# The client's own settings


@config_app.command("set")
def config_set(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}.")],
    value: Annotated[str, typer.Argument(help="Its value; empty removes it; - reads a line from stdin.")],
    as_json: Json = False,
) -> None:
    """Store a setting in client.toml."""
    if name not in NAMES:
        raise typer.BadParameter(f"there is no setting {name!r}; there are {', '.join(NAMES)}")
    if name == "plain_text" and value not in ("true", "false", ""):
        raise typer.BadParameter("plain_text is true or false")
    if value == "-":
        value = sys.stdin.readline().strip()
    printer = Printer(as_json=as_json)
    path = config_path()
    with expected_trouble(printer):
        store_setting(path, name, value)
    if as_json:
        printer.document({"path": str(path), "name": name, "value": masked(name, value)})
    else:
        printer.line(f"{name} = {masked(name, value)} in {path}")


@config_app.command("show")
def config_show(context: typer.Context, as_json: Json = False) -> None:
    """Print each setting with its source; of secrets, only what names them.

    Where the server is installed, its settings follow, as `darkroom serve` would have them here.
    """
    printer = Printer(as_json=as_json)
    with expected_trouble(printer):
        settings = config_of(context).settings
        shown = [(name, masked(name, each.value), each.source) for name, each in settings.items()]
        with suppress(ServerNotInstalled):
            shown += [
                (f"service.{each.name}", each.value, each.source)
                for each in of_server("scheduler.provenance").settings_shown()
            ]
    if as_json:
        printer.document({name: {"value": value, "source": source} for name, value, source in shown})
    else:
        printer.table(["setting", "value", "source"], shown)


# The server's commands


def _server_command(name: str, summary: str) -> None:
    @app.command(
        name,
        help=summary,
        rich_help_panel="Running a service",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def hand_over(context: typer.Context) -> None:
        with expected_trouble(Printer()):
            server = of_server("scheduler.__main__").server
        server([name, *context.args], prog_name="darkroom")


_server_command("serve", "Run the service on this machine, or on a Ray cluster.")
_server_command("demo", "Start everything, make four jobs of two accounts, show and explain them, stop.")
_server_command("migrate", "Bring a database to this release.")
_server_command("lead", "Let this release's scheduler lead on a Ray cluster: the way back to an older one.")
_server_command("sweep-artifacts", "Look through the artifact store for files that no row names.")
_server_command("simulate", "Compare scheduling policies on a recorded or made-up workload.")
_server_command("replay", "Decide all that a scheduler decided once more, from its recording, and compare.")
_server_command("stop", "End the scheduler and the workers on a Ray cluster.")
