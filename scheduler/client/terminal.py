"""What a person sees: sentences, one live line for a job, pictures where the terminal can show them.

Nothing here writes control characters to anything but a terminal, and text from the service (prompts of
other people among it) is printed without any of its own. The terminal is asked what it can do only when
both its ends are ours: a question whose answer nobody can read would hang.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from math import ceil
from pathlib import Path

from PIL import Image as Pictures
from PIL.Image import Image as Picture
from rich.color import Color
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.style import Style
from rich.table import Table
from rich.text import Text

from scheduler.v1 import job_pb2
from scheduler.v1.job_pb2 import (
    EstimateOption,
    Job,
    JobKind,
    JobState,
    Progress,
    QueueStatus,
    Tier,
    UpscaleAlgorithm,
    WatchJobResponse,
)

_PREVIEW_COLUMNS = 32
_PICTURE_COLUMNS = 64


def plain(text: str) -> str:
    """Return text without control characters: printed, it can neither colour nor move nor rename anything."""
    return "".join(" " if unicodedata.category(each) in ("Cc", "Cf", "Zl", "Zp") else each for each in text)


def duration(ms: int) -> str:
    """Return milliseconds for people, to a tenth of a second: `3.4 s`, `14 h 59 min 56.6 s`, `15 h`."""
    sign, ms = ("-", -ms) if ms < 0 else ("", ms)
    minutes, tenths = divmod((ms + 50) // 100, 600)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] if hours else []
    if minutes:
        parts.append(f"{minutes} min")
    if tenths or not parts:
        parts.append(f"{tenths // 10}.{tenths % 10} s")
    return sign + " ".join(parts)


def exact_duration(ms: int) -> str:
    """Return milliseconds for people who add them up: `3.421 s`, `14 h 59 min 56.579 s`, `15 h`."""
    sign, ms = ("-", -ms) if ms < 0 else ("", ms)
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] if hours else []
    if minutes:
        parts.append(f"{minutes} min")
    if ms or not parts:
        parts.append(f"{ms // 1000}.{ms % 1000:03} s")
    return sign + " ".join(parts)


def about(ms: int) -> str:
    """Return an expected time for people, no finer than it can be known: `20 s`, `3 min`, `2 h 10 min`."""
    seconds = (max(ms, 0) + 500) // 1000
    if seconds < 100:
        return f"{seconds} s"
    minutes = (seconds + 30) // 60
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod((minutes + 5) // 10 * 10, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def expected_start(of: QueueStatus | EstimateOption) -> str:
    """Return when a job will probably start: `in about 20 s (9 of 10 within 1 min)`; empty if not known."""
    if not of.HasField("start_p50_ms"):
        return ""
    return f"in about {about(of.start_p50_ms)} (9 of 10 within {about(of.start_p90_ms)})"


def waits(status: QueueStatus) -> str:
    """Return why a job waits, where it stands and when it will start, in words."""
    start = expected_start(status)
    return (
        plain(status.sentence)
        + (f" (place {status.position})" if status.position else "")
        + (f" Starts {start}." if start else "")
    )


def money(micros: int, currency_code: str) -> str:
    """Return millionths of a currency for people; parts of a cent are shown where there are any."""
    digits = 2 if micros % 10_000 == 0 else 4 if abs(micros) >= 100 else 6
    return f"{Decimal(micros) / 1_000_000:.{digits}f} {currency_code}".rstrip()


def state_word(state: JobState.ValueType) -> str:
    """Return `queued`, `running`, …"""
    return JobState.Name(state).removeprefix("JOB_STATE_").lower()


def tier_word(tier: Tier.ValueType) -> str:
    """Return `fast` or `relax`."""
    return Tier.Name(tier).removeprefix("TIER_").lower()


def kind_word(job: Job) -> str:
    """Return `imagine`, `variation`, `reroll`, or `upscale` with its algorithm: `upscale (light)`."""
    word = JobKind.Name(job.kind).removeprefix("JOB_KIND_").lower()
    if not job.upscale_algorithm:
        return word
    algorithm = UpscaleAlgorithm.Name(job.upscale_algorithm).removeprefix("UPSCALE_ALGORITHM_").lower()
    return f"{word} ({algorithm})"


def charged(job: Job) -> str:
    """Return what an ended job was charged."""
    receipt = job.receipt
    if receipt.amount_micros:
        return f"charged {money(receipt.amount_micros, receipt.currency_code)} as metered fast"
    if receipt.billed_gpu_ms:
        return f"charged {duration(receipt.billed_gpu_ms)} of fast time"
    return "relax costs nothing" if job.tier == job_pb2.TIER_RELAX else "not charged"


def receipt_sentence(job: Job) -> str:
    """Return what an ended job cost, with the balance before and after."""
    receipt = job.receipt
    before, after = duration(receipt.balance_before_ms), duration(receipt.balance_after_ms)
    return f"GPU time {duration(receipt.gpu_ms)}, {charged(job)}; fast time before {before}, after {after}"


class JobView:
    """One job as a live line: its place in the queue, then a bar of steps, with the newest preview below."""

    def __init__(self, job: Job, *, preview_columns: int = _PREVIEW_COLUMNS) -> None:
        self.job = job
        self.queue_status: QueueStatus | None = job.queue_status if job.HasField("queue_status") else None
        self.progress: Progress | None = None
        self.preview: HalfBlocks | None = None
        self._preview_columns = preview_columns
        self._spinner = Spinner("dots")

    def apply(self, update: WatchJobResponse) -> None:
        """Take in one thing that happened."""
        match update.WhichOneof("update"):
            case "event":
                self.job = update.event.job
                self.queue_status = self.job.queue_status if self.job.HasField("queue_status") else None
                if self.job.state == job_pb2.JOB_STATE_QUEUED:
                    self.progress = None  # back in the queue: another worker begins anew
            case "queue_status":
                self.queue_status = update.queue_status
            case "progress":
                self.progress = update.progress
                self.queue_status = None  # what moves does not wait, or not any more
                if update.progress.preview:
                    picture = Pictures.open(io.BytesIO(update.progress.preview))
                    self.preview = HalfBlocks(picture, self._preview_columns)

    def status(self) -> Text:
        """Return where it is, in words."""
        state = self.job.state
        if self.queue_status is not None and state in (
            job_pb2.JOB_STATE_QUEUED,
            job_pb2.JOB_STATE_RUNNING,
        ):
            place = f"place {self.queue_status.position}: " if self.queue_status.position else ""
            start = expected_start(self.queue_status)
            starts = f" Starts {start}." if start else ""
            return Text(place + plain(self.queue_status.sentence) + starts, style="yellow")
        if state == job_pb2.JOB_STATE_RUNNING and self.progress is not None and self.progress.steps:
            return Text(f"step {self.progress.step} of {self.progress.steps}", style="cyan")
        styles = {
            job_pb2.JOB_STATE_QUEUED: "yellow",
            job_pb2.JOB_STATE_RUNNING: "cyan",
            job_pb2.JOB_STATE_SUCCEEDED: "green",
        }
        return Text(state_word(state), style=styles.get(state, "red"))

    def bar(self, width: int = 24) -> ProgressBar:
        """Return its step bar, `width` columns wide."""
        if self.job.state == job_pb2.JOB_STATE_SUCCEEDED:
            return ProgressBar(total=1, completed=1, width=width)
        if self.progress is None or not self.progress.steps:
            return ProgressBar(total=1, completed=0, width=width)
        return ProgressBar(total=self.progress.steps, completed=self.progress.step, width=width)

    def __rich__(self) -> RenderableType:
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, overflow="ellipsis")
        waiting = self.job.state == job_pb2.JOB_STATE_QUEUED
        line.add_row(self._spinner, Text("") if waiting else self.bar(), self.status())
        return line if self.preview is None else Group(line, self.preview)


class HalfBlocks:
    """A picture in coloured half blocks: two pixels a character, in any terminal that has colours."""

    def __init__(self, picture: Picture, columns: int) -> None:
        rows = max(1, round(picture.height * columns / picture.width / 2))
        rgb = picture.convert("RGB").resize((columns, rows * 2)).tobytes()
        pixels = [Color.from_rgb(*rgb[at : at + 3]) for at in range(0, len(rgb), 3)]
        self._columns = columns
        self._lines = [
            [
                Segment("▀", Style(color=upper, bgcolor=lower))
                for upper, lower in zip(pixels[at : at + columns], pixels[at + columns :], strict=False)
            ]
            for at in range(0, len(pixels), 2 * columns)
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._lines:
            yield from line[: options.max_width]
            yield Segment.line()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        columns = min(self._columns, options.max_width)
        return Measurement(columns, columns)


def can_show_pictures(console: Console) -> bool:
    """Return whether pictures make sense there: a terminal with enough colours."""
    return console.is_terminal and console.color_system in ("256", "truecolor")


def print_picture(console: Console, picture: Picture, *, columns: int = _PICTURE_COLUMNS) -> None:
    """Print a picture the best way the terminal knows: kitty's or sixel graphics, or else half blocks.

    Printed to anything but a terminal, it is half blocks with their colours.
    """
    columns = min(columns, console.width)
    if not can_show_pictures(console):
        console = Console(file=console.file, force_terminal=True, color_system="truecolor", width=columns)
    if console.file is sys.stdout is sys.__stdout__ and _terminal_can_be_asked():
        # It warns, with a traceback, of a terminal that does not say how large its characters are.
        logging.getLogger("textual_image").setLevel(logging.ERROR)
        # Importing this asks the terminal what it can do, and reads the answer from stdin.
        from textual_image.renderable import Image as TerminalImage

        console.print(TerminalImage(picture, width=columns))
    else:
        console.print(HalfBlocks(picture, columns), end="")


def contact_sheet(paths: Sequence[Path]) -> Picture:
    """Return the pictures as one, two a row. They must be of one size, as those of a job are."""
    assert paths, "a contact sheet needs pictures"
    pictures = [Pictures.open(path) for path in paths]
    width, height = pictures[0].size
    columns = min(2, len(pictures))
    sheet = Pictures.new("RGB", (columns * width, ceil(len(pictures) / columns) * height))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width, number // columns * height))
        picture.close()
    return sheet


@contextmanager
def live(console: Console, view: RenderableType) -> Iterator[None]:
    """Keep `view` on the screen while the block runs, and leave no trace; not on a terminal: nothing."""
    if not console.is_terminal:
        yield
        return
    with Live(view, console=console, transient=True, refresh_per_second=8):
        yield


def _terminal_can_be_asked() -> bool:
    if (
        sys.__stdin__ is None
        or sys.__stdout__ is None
        or not (sys.__stdin__.isatty() and sys.__stdout__.isatty())
    ):
        return False
    # A pseudo-terminal that nobody gave a size has none, and textual-image divides by it.
    return os.get_terminal_size(sys.__stdout__.fileno()).columns > 0
