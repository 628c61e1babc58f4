"""The demonstration: two accounts, four jobs, and why they ran in the order they did.

Written against the client alone, as anybody's program would be. Ben, on plan Basic, sends three relax jobs;
then Ada, on Standard, sends a fast one. Each run opens accounts of its own, because what a service was told
before is still there.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from billing.v1 import admin_pb2
from billing.v1.admin_pb2 import Plan
from scheduler.client.aio import DarkroomClient, JobHandle, succeeded
from scheduler.client.names import last_part
from scheduler.client.terminal import (
    JobView,
    can_show_pictures,
    charged,
    contact_sheet,
    duration,
    live,
    money,
    plain,
    print_picture,
    state_word,
    tier_word,
)
from scheduler.v1 import job_pb2
from scheduler.v1.job_pb2 import JobState, QueueReason, Tier, WatchJobResponse

_REASON = "demonstration"
_PREVIEW_COLUMNS = 18  # four of them side by side fit 80 columns
_PICTURE_COLUMNS = 40
_PROGRESS_LINE_EVERY_PERCENT = 25

# Things that the default model knows.
_BEN_ASKS_FOR = ("a red apple", "a fox on a light blue background", "a sailboat, flat")
_ADA_ASKS_FOR = "a rocket on a black background"


@dataclass(frozen=True, kw_only=True)
class _Person:
    account_id: str
    key: str


class _DemoJob:
    """One of the jobs, and what was said about it while it ran."""

    def __init__(self, name: str, handle: JobHandle) -> None:
        self.name = name
        self.handle = handle
        self.view = JobView(handle.job, preview_columns=_PREVIEW_COLUMNS)
        self.why_started = ""
        self.why_went_on: list[str] = []
        """What became of it since: that it was parked, and why it went on."""
        self._said: tuple[JobState.ValueType, QueueReason.ValueType, int] | None = None
        self._percent_said = 0

    def apply(self, update: WatchJobResponse) -> None:
        self.view.apply(update)
        if update.event.state == job_pb2.JOB_STATE_RUNNING:
            if not self.why_started:
                self.why_started = update.event.sentence
            else:
                self.why_went_on.append(update.event.sentence)

    def news(self, update: WatchJobResponse) -> str | None:
        """Return a line about an update, or None if it says nothing new, for where nothing can be live."""
        match update.WhichOneof("update"):
            case "event":
                return f"{self.name}: {state_word(update.event.state)}. {update.event.sentence}"
            case "queue_status":
                status = update.queue_status
                now = (self.view.job.state, status.reason, status.position)
                if now == self._said:
                    return None
                self._said = now
                return f"{self.name}: {self.view.status().plain}"
            case "progress":
                percent = update.progress.percent
                if percent < self._percent_said + _PROGRESS_LINE_EVERY_PERCENT:
                    return None
                self._percent_said = percent
                return f"{self.name}: {self.view.status().plain}"
        return None


class _Board:
    """All jobs at once, for a live display."""

    def __init__(self, jobs: Sequence[_DemoJob], *, previews: bool) -> None:
        self._jobs = jobs
        self._previews = previews

    def __rich__(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("job", no_wrap=True)
        table.add_column("tier", no_wrap=True)
        table.add_column("steps", no_wrap=True)
        table.add_column("now")
        for job in self._jobs:
            table.add_row(job.name, tier_word(job.view.job.tier), job.view.bar(16), job.view.status())
        if not self._previews:
            return table
        started = [job for job in self._jobs if job.view.preview is not None]
        pictures = [Group(job.view.preview or "", Text(job.name, style="dim")) for job in started]
        return Group(table, Text(), Columns(pictures, padding=(0, 1)))


async def run_demo(
    *,
    address: str,
    admin_key: str,
    images_dir: Path,
    console: Console,
    keep: bool,
    prompt: str | None = None,
) -> None:
    """Show the service at `address` at work, and save the pictures in `images_dir`.

    `prompt`: what the first picture should show.
    `keep`: the service stays up afterwards, so address and keys are printed, this once.
    Raises DarkroomError, for example JobFailed, if something did not go as it should.
    """
    async with DarkroomClient(address, admin_key) as admin:
        _say(console, f"Darkroom is up at {address}. Its plans:", heading=True)
        console.print(_plans(await admin.plans()))
        ada = await _open_account(admin, "ada", "standard")
        ben = await _open_account(admin, "ben", "basic")
    _say(console, "Two accounts, four jobs", heading=True)
    _say(
        console,
        f"{ben.account_id} (basic) sends three relax jobs, then {ada.account_id} (standard) a fast one.",
    )

    prompts = [prompt or _BEN_ASKS_FOR[0], *_BEN_ASKS_FOR[1:]]
    async with AsyncExitStack() as clients:
        ben_client = await clients.enter_async_context(DarkroomClient(address, ben.key))
        ada_client = await clients.enter_async_context(DarkroomClient(address, ada.key))
        jobs = [
            await _submit(ben_client, f"ben {number}", text, job_pb2.TIER_RELAX)
            for number, text in enumerate(prompts, start=1)
        ]
        jobs.append(await _submit(ada_client, "ada", _ADA_ASKS_FOR, job_pb2.TIER_FAST))
        await _watch(jobs, console)
        _say(console, "The pictures", heading=True)
        for job in jobs:
            await _show_pictures(job, images_dir, console)

    _say(console, "Receipts", heading=True)
    console.print(_receipts(jobs))
    _explain_order(jobs, console)
    _close(jobs, images_dir, console, keep=keep)
    if keep:
        _say(console, "The service stays up; these keys are shown only now", heading=True)
        for name, key in (
            ("address", address),
            ("admin", admin_key),
            (ada.account_id, ada.key),
            (ben.account_id, ben.key),
        ):
            _say(console, f"{name}: {key}")
        _say(
            console,
            f"Try: DARKROOM_ADDRESS={address} DARKROOM_KEY={ada.key} {_typed()} imagine a blue whale",
        )


async def _open_account(admin: DarkroomClient, name: str, plan: str) -> _Person:
    account_id = f"{name}-{secrets.token_hex(2)}"
    account = await admin.create_account(plan=plan, account_id=account_id, reason=_REASON)
    key = await admin.create_api_key(account.name, role=admin_pb2.ROLE_USER, reason=_REASON)
    return _Person(account_id=last_part(account.name), key=key.secret)


async def _submit(client: DarkroomClient, name: str, prompt: str, tier: Tier.ValueType) -> _DemoJob:
    return _DemoJob(name, await client.imagine(prompt, tier=tier))


async def _watch(jobs: Sequence[_DemoJob], console: Console) -> None:
    """Show all jobs until each has its pictures."""
    previews = can_show_pictures(console)

    async def follow(job: _DemoJob) -> None:
        async for update in job.handle.watch(previews=previews):
            job.apply(update)
            news = None if console.is_terminal else job.news(update)
            if news is not None:
                _say(console, news)
        succeeded(job.handle.job)

    with live(console, _Board(jobs, previews=previews)):
        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(follow(job))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # one failed job is enough to say


async def _show_pictures(job: _DemoJob, images_dir: Path, console: Console) -> None:
    paths = await job.handle.save(images_dir)
    _say(console, f"{job.name}: {job.handle.job.prompt}")
    if can_show_pictures(console):
        print_picture(console, contact_sheet(paths), columns=_PICTURE_COLUMNS)
    for path in paths:
        _say(console, f"  {path}")


def _explain_order(jobs: Sequence[_DemoJob], console: Console) -> None:
    """Say when each job started and the reason the scheduler gave, and what became of the fast one."""
    _say(console, "Why they started in this order", heading=True)
    first_ms = min(job.handle.job.create_time.ToMilliseconds() for job in jobs)
    order = sorted(jobs, key=lambda job: job.handle.job.start_time.ToNanoseconds())
    for place, job in enumerate(order, start=1):
        done = job.handle.job
        created = duration(done.create_time.ToMilliseconds() - first_ms)
        started = duration(done.start_time.ToMilliseconds() - first_ms)
        _say(
            console,
            f"{place}. {job.name} ({tier_word(done.tier)}), submitted at {created}, started at {started}: "
            f"{job.why_started}",
        )
        for sentence in job.why_went_on:
            _say(console, f"   since then: {sentence}")
    fast = jobs[-1]
    passed = [job.name for job in order[order.index(fast) + 1 :]]
    if passed:
        _say(
            console,
            f"Ada's fast job passed {', '.join(passed)}: fast goes before all waiting relax jobs.",
        )
    else:
        _say(console, "There was a free GPU for each of them, so nobody had to be passed.")


def _close(jobs: Sequence[_DemoJob], images_dir: Path, console: Console, *, keep: bool) -> None:
    _say(console, "That was it", heading=True)
    example = jobs[-1].handle.id
    _say(console, f"The pictures are in {images_dir}/; each file name begins with its job's id.")
    darkroom = _typed()
    if keep:
        _say(console, f"Next, with an address and a key from below (`{darkroom} serve` is for real use):")
    else:
        _say(
            console,
            f"Next: `{darkroom} demo --keep` leaves the service up, `{darkroom} serve` is for real use; then",
        )
    _say(console, f'  {darkroom} imagine "a blue whale --w 192 --h 128 --seed 7" --relax')
    _say(console, f"  {darkroom} vary {example} 2")
    _say(console, f"  {darkroom} info")


def _typed() -> str:
    """Return the command as whoever reads this can type it: it may lie in an environment beside them."""
    if shutil.which("darkroom"):
        return "darkroom"
    started = Path(sys.argv[0])
    return str(started.relative_to(Path.cwd())) if started.is_relative_to(Path.cwd()) else str(started)


def _receipts(jobs: Sequence[_DemoJob]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("job", "tier", "GPU time", "charge", "fast time before", "after"):
        table.add_column(column)
    for job in jobs:
        done = job.handle.job
        receipt = done.receipt
        table.add_row(
            job.name,
            tier_word(done.tier),
            duration(receipt.gpu_ms),
            charged(done),
            duration(receipt.balance_before_ms),
            duration(receipt.balance_after_ms),
        )
    return table


def _plans(plans: Sequence[Plan]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "plan",
        "fast a month",
        "running",
        "of them relax",
        "accepted",
        "beyond the plan, a minute",
    ):
        table.add_column(column)
    for plan in plans:
        limits = plan.limits
        table.add_row(
            last_part(plan.name),
            duration(plan.quota_ms),
            str(limits.running),
            str(limits.relax_running),
            str(limits.accepted),
            money(plan.overage_micros_per_minute, plan.currency_code)
            if plan.overage_micros_per_minute
            else "-",
        )
    return table


def _say(console: Console, text: str, *, heading: bool = False) -> None:
    if heading:
        console.print()
    console.print(Text(plain(text), style="bold" if heading else ""), soft_wrap=not console.is_terminal)
