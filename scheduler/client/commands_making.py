"""The commands of `darkroom` that make pictures: from text, and from pictures that were made before.

Each submits one job and, unless told otherwise, waits for it and saves what it made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer

from scheduler.client.aio import DarkroomClient, JobHandle, succeeded
from scheduler.client.errors import ExitCode, NotEnded, PicturesExpired
from scheduler.client.names import Named
from scheduler.client.printing import Printer
from scheduler.client.running import JobArgument, Json, named_argument, run
from scheduler.client.terminal import JobView, can_show_pictures, live, state_word
from scheduler.client.verify import Comparison, compare
from scheduler.v1 import job_pb2
from scheduler.v1.job_pb2 import Tier, UpscaleAlgorithm, Visibility

DEFAULT_FOLDER = Path("darkroom-images")

PROMPT_LANGUAGE = """\
A prompt is addresses of pictures, then text, then parameters, in any case:

https://host/a.png   a picture to draw after, .png, .jpg or .webp
hot dog::2 food::-1  parts with weights; each counts by its share of them
--iw 0.5             weight of the pictures beside the text; else 25 %
--no trees           the same as trees::-0.5
--w 256 --h 320      size in pixels, multiples of 64
--ar 3:2             shape, instead of a size
--seed 123           the same noise again: the same job, the same grid
--stop 80            show it as it is after 80 % of the steps
--video              also a short video of how the grid came to be
--uplight            upscales of this job use the light algorithm
--fast, --relax, --private, --public: instead of the account's mode
"""
"""What `darkroom imagine --help` says of prompts."""

Fast = Annotated[
    bool | None, typer.Option("--fast/--relax", help="Tier of this job; otherwise the account's mode.")
]
Private = Annotated[bool | None, typer.Option("--private/--public", help="Who may see the pictures.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return once the job is accepted.")]
Show = Annotated[
    bool | None,
    typer.Option("--pictures/--no-pictures", help="Show pictures here; otherwise only on a terminal."),
]
Uploads = Annotated[
    list[Path] | None,
    typer.Option("--image", metavar="FILE", help="Picture to draw after, PNG, JPEG or WebP; repeatable."),
]
PictureArgument = Annotated[
    Named,
    typer.Argument(metavar="JOB", parser=named_argument, help="Job id, resource name or file name."),
]
Image = Annotated[
    int | None,
    typer.Argument(min=1, max=4, help="Which of its pictures, 1 to 4; not needed where JOB names one."),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to an app, in the order that its help shows them in."""
    app.command(context_settings={"ignore_unknown_options": True}, epilog=PROMPT_LANGUAGE)(imagine)
    for command in (vary, upscale, reroll, redo, verify):
        app.command()(command)


def imagine(
    context: typer.Context,
    # Several words, and parameters such as --seed that are not the command's own, are the prompt, so that it
    # need not be quoted. A misspelt option is then the service's to refuse, and it names the nearest one.
    prompt: Annotated[list[str], typer.Argument(help="Text, then parameters such as --seed 7 --ar 3:2.")],
    image: Uploads = None,
    model: Annotated[str, typer.Option(help="Model; otherwise the service's default.")] = "",
    fast: Fast = None,
    private: Private = None,
    out: Out = DEFAULT_FOLDER,
    no_wait: NoWait = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would cost and where it would wait.")
    ] = False,
    pictures: Show = None,
    as_json: Json = False,
) -> None:
    """Make a grid of four pictures from text."""
    text = " ".join(prompt)
    uploads, tier, visibility = image or [], tier_of(fast), visibility_of(private)
    if dry_run:
        printer = Printer(as_json=as_json)

        async def validate(client: DarkroomClient) -> None:
            printer.job(
                await client.validate(text, pictures=uploads, model=model, tier=tier, visibility=visibility)
            )

        run(context, printer, validate)
        return

    async def submit(client: DarkroomClient) -> JobHandle:
        return await client.imagine(text, pictures=uploads, model=model, tier=tier, visibility=visibility)

    _make(context, submit, out=out, no_wait=no_wait, pictures=pictures, as_json=as_json)


def vary(
    context: typer.Context,
    job: PictureArgument,
    image: Image = None,
    strong: Annotated[bool, typer.Option("--strong", help="Go further from it than usual.")] = False,
    fast: Fast = None,
    private: Private = None,
    out: Out = DEFAULT_FOLDER,
    no_wait: NoWait = False,
    pictures: Show = None,
    as_json: Json = False,
) -> None:
    """Make a new grid close to one picture of a finished job."""
    number = _picture(job, image)

    async def submit(client: DarkroomClient) -> JobHandle:
        tier, visibility = tier_of(fast), visibility_of(private)
        return await client.vary(job.job, number, strong=strong, tier=tier, visibility=visibility)

    _make(context, submit, out=out, no_wait=no_wait, pictures=pictures, as_json=as_json)


def upscale(
    context: typer.Context,
    job: PictureArgument,
    image: Image = None,
    light: Annotated[bool, typer.Option("--light", help="Up to 4 times the sides, little added.")] = False,
    detailed: Annotated[
        bool, typer.Option("--detailed", help="The same with details drawn over it: the usual one.")
    ] = False,
    largest: Annotated[
        bool, typer.Option("--max", help="3 megapixels: only fast, only of grids under 512 pixels.")
    ] = False,
    fast: Fast = None,
    private: Private = None,
    out: Out = DEFAULT_FOLDER,
    no_wait: NoWait = False,
    pictures: Show = None,
    as_json: Json = False,
) -> None:
    """Enlarge one picture of a finished job."""
    number = _picture(job, image)
    algorithm = _algorithm(light=light, detailed=detailed, largest=largest)

    async def submit(client: DarkroomClient) -> JobHandle:
        tier, visibility = tier_of(fast), visibility_of(private)
        return await client.upscale(job.job, number, algorithm=algorithm, tier=tier, visibility=visibility)

    _make(context, submit, out=out, no_wait=no_wait, pictures=pictures, as_json=as_json)


def reroll(
    context: typer.Context,
    job: JobArgument,
    fast: Fast = None,
    private: Private = None,
    out: Out = DEFAULT_FOLDER,
    no_wait: NoWait = False,
    pictures: Show = None,
    as_json: Json = False,
) -> None:
    """Make the same job again with a new seed, unless its prompt fixes one."""

    async def submit(client: DarkroomClient) -> JobHandle:
        return await client.reroll(job, tier=tier_of(fast), visibility=visibility_of(private))

    _make(context, submit, out=out, no_wait=no_wait, pictures=pictures, as_json=as_json)


def redo(
    context: typer.Context,
    job: JobArgument,
    fast: Fast = None,
    private: Private = None,
    out: Out = DEFAULT_FOLDER,
    no_wait: NoWait = False,
    pictures: Show = None,
    as_json: Json = False,
) -> None:
    """Upscale again with the other algorithm, light or detailed; reroll any other job."""

    async def submit(client: DarkroomClient) -> JobHandle:
        return await client.redo(job, tier=tier_of(fast), visibility=visibility_of(private))

    _make(context, submit, out=out, no_wait=no_wait, pictures=pictures, as_json=as_json)


def verify(context: typer.Context, job: JobArgument, fast: Fast = None, as_json: Json = False) -> None:
    """Make a finished job again with its seed, and compare the pictures bit for bit.

    It is a job like any other, charged as one. Exits with 5 if the pictures are not the same.
    """
    printer = Printer(as_json=as_json)
    found: list[Comparison] = []

    async def work(client: DarkroomClient) -> None:
        first = await client.get(job)
        if first.state != job_pb2.JOB_STATE_SUCCEEDED:
            raise NotEnded(f"Job {first.uid} is {state_word(first.state)}: it has no pictures to compare.")
        if not first.images:
            raise PicturesExpired(f"The pictures of job {first.uid} are gone: there is nothing to compare.")
        # What is private stays so, whatever the account's mode is now.
        handle = await client.reroll(job, exact=True, tier=tier_of(fast), visibility=first.visibility)
        printer.note(f"Made again as job {handle.id}.")
        await follow(printer, handle)
        second = succeeded(handle.job)
        found.append(compare(first, second))
        printer.comparison(first, second, found[0])

    run(context, printer, work)
    if not found[0].equal:
        raise typer.Exit(ExitCode.DIFFERENT)


def _make(
    context: typer.Context,
    submit: Callable[[DarkroomClient], Awaitable[JobHandle]],
    *,
    out: Path,
    no_wait: bool,
    pictures: bool | None,
    as_json: bool,
) -> None:
    """Submit a job and, unless told otherwise, wait for its pictures and save them."""
    printer = printer_for(as_json=as_json, pictures=pictures)

    async def work(client: DarkroomClient) -> None:
        handle = await submit(client)
        for warning in handle.job.warnings:
            printer.note(warning)
        if no_wait:
            printer.submitted(handle.job)
            return
        await follow(printer, handle)
        printer.finished(succeeded(handle.job), await handle.save(out))

    run(context, printer, work)


async def follow(printer: Printer, handle: JobHandle) -> None:
    """Show a job on a live line until it has ended."""
    view = JobView(handle.job)
    previews = printer.pictures and can_show_pictures(printer.err)
    try:
        with live(printer.err, view):
            async for update in handle.watch(previews=previews):
                view.apply(update)
    except asyncio.CancelledError:
        see, end = f"darkroom watch {handle.id}", f"darkroom cancel {handle.id}"
        printer.note(f"The job goes on. See it with `{see}`, end it with `{end}`.")
        raise


def printer_for(*, as_json: bool, pictures: bool | None) -> Printer:
    """Return a printer that shows pictures where it was told to, or else where a terminal can."""
    printer = Printer(as_json=as_json)
    printer.pictures = can_show_pictures(printer.out) if pictures is None else pictures
    return printer


def tier_of(fast: bool | None) -> Tier.ValueType:
    """Return the tier that --fast or --relax means; unspecified without either."""
    if fast is None:
        return job_pb2.TIER_UNSPECIFIED
    return job_pb2.TIER_FAST if fast else job_pb2.TIER_RELAX


def visibility_of(private: bool | None) -> Visibility.ValueType:
    """Return the visibility that --private or --public means; unspecified without either."""
    if private is None:
        return job_pb2.VISIBILITY_UNSPECIFIED
    return job_pb2.VISIBILITY_PRIVATE if private else job_pb2.VISIBILITY_PUBLIC


def _picture(job: Named, image: int | None) -> int:
    """Return which picture is meant. Raises typer.BadParameter if nothing says it."""
    number = image if image is not None else job.image
    if number is None:
        raise typer.BadParameter("say which picture of the job: 1 to 4", param_hint="IMAGE")
    return number


def _algorithm(*, light: bool, detailed: bool, largest: bool) -> UpscaleAlgorithm.ValueType:
    if light + detailed + largest > 1:
        raise typer.BadParameter("choose one of --light, --detailed and --max")
    if light:
        return job_pb2.UPSCALE_ALGORITHM_LIGHT
    if detailed:
        return job_pb2.UPSCALE_ALGORITHM_DETAILED
    return job_pb2.UPSCALE_ALGORITHM_MAX if largest else job_pb2.UPSCALE_ALGORITHM_UNSPECIFIED
