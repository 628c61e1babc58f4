"""What a command prints, and where: the answer on stdout, everything else on stderr.

With `--json` the answer is one JSON document (streams: one a line), messages in protobuf's JSON names with
all fields present, and an error is one JSON line on stderr. Without, a terminal gets tables and colours, and
a pipe gets plain lines with tabs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

from billing.v1.admin_pb2 import Plan
from billing.v1.billing_pb2 import Balance
from scheduler.client.aio import ENDED
from scheduler.client.errors import DarkroomError
from scheduler.client.names import last_part
from scheduler.client.terminal import (
    contact_sheet,
    duration,
    kind_word,
    money,
    plain,
    print_picture,
    receipt_sentence,
    state_word,
    tier_word,
)
from scheduler.v1.account_pb2 import Account
from scheduler.v1.job_pb2 import Job, Visibility, WatchJobResponse


class Printer:
    """Prints for one command."""

    def __init__(self, *, as_json: bool = False, pictures: bool = False) -> None:
        self.as_json = as_json
        self.pictures = pictures
        self.out = Console(highlight=False, markup=False, emoji=False)
        self.err = Console(highlight=False, markup=False, emoji=False, stderr=True)

    def line(self, *cells: str) -> None:
        """Print a line of the answer, with tabs between its cells, never wrapped."""
        print("\t".join(plain(cell) for cell in cells), file=self.out.file, flush=True)

    def note(self, text: str) -> None:
        """Say something that is not the answer."""
        for line in text.splitlines():
            self.err.print(Text(plain(line)), soft_wrap=True)

    def document(self, value: Message | dict[str, Any]) -> None:
        """Print one JSON document on a line."""
        print(json.dumps(to_json(value)), file=self.out.file, flush=True)

    def error(self, error: DarkroomError) -> None:
        """Say what happened, what it means and what to do."""
        if not self.as_json:
            self.note(str(error))
            return
        details = error.details
        description = {
            "reason": error.stable_reason,
            "happened": error.happened,
            "meaning": error.meaning,
            "advice": error.advice,
            "metadata": dict(details.metadata),
            "violations": [{"field": each.field, "sentence": each.sentence} for each in details.violations],
            "retryAfterMs": details.retry_after_ms,
        }
        print(json.dumps({"error": description}), file=self.err.file, flush=True)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print rows: a table on a terminal, tabs in a pipe."""
        if not self.out.is_terminal:
            for row in rows:
                self.line(*row)
            return
        table = Table(*header, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*(Text(plain(cell)) for cell in row))
        self.out.print(table)

    def facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Print names and values, one pair a line."""
        kept = [(name, value) for name, value in facts if value]
        if not self.out.is_terminal:
            for name, value in kept:
                self.line(name, value)
            return
        table = Table.grid(padding=(0, 2))
        for name, value in kept:
            table.add_row(Text(name, style="dim"), Text(plain(value)))
        self.out.print(table)

    def submitted(self, job: Job) -> None:
        """Say that a job was accepted, where nobody waits for it."""
        if self.as_json:
            self.document({"job": to_json(job), "files": []})
            return
        self.line(job.uid)
        for sentence in (job.queue_status.sentence, job.price.sentence):
            if sentence:
                self.note(sentence)

    def finished(self, job: Job, files: Sequence[Path]) -> None:
        """Print a job that has its pictures: the pictures themselves, their files, the receipt."""
        if self.as_json:
            self.document({"job": to_json(job), "files": [str(file) for file in files]})
            return
        if self.pictures and files:
            print_picture(self.out, contact_sheet(files))
        for file in files:
            self.line(str(file))
        self.line(receipt_sentence(job))

    def job(self, job: Job) -> None:
        """Print everything about one job that a person asks for."""
        if self.as_json:
            self.document(job)
            return
        queued = job.queue_status if job.HasField("queue_status") else None
        place = f" (place {queued.position})" if queued is not None and queued.position else ""
        self.facts(
            [
                ("job", job.uid),
                ("state", state_word(job.state) + (", to be cancelled" if job.cancel_requested else "")),
                ("waits because", queued.sentence + place if queued is not None else ""),
                ("kind", kind_word(job.kind)),
                ("from", _source(job)),
                ("prompt", job.prompt),
                ("model", job.model),
                ("size", f"{job.width}×{job.height}, {job.steps} steps"),
                ("seed", str(job.seed) if job.uid else ""),  # a job that was only asked about has none
                ("tier", tier_word(job.tier)),
                ("visibility", visibility_word(job.visibility)),
                ("price", job.price.sentence),
                ("submitted", when(job, "create_time")),
                ("started", when(job, "start_time")),
                ("ended", when(job, "end_time")),
                ("failure", f"{job.failure.reason}: {job.failure.sentence}" if job.failure.reason else ""),
                ("receipt", receipt_sentence(job) if job.state in ENDED and job.HasField("receipt") else ""),
                *((f"picture {last_part(image.name)}", image.file_name) for image in job.images),
            ]
        )

    def jobs(self, jobs: Sequence[Job]) -> None:
        """Print jobs, one a line."""
        if self.as_json:
            self.document({"jobs": [to_json(job) for job in jobs]})
            return
        rows = [
            [job.uid, state_word(job.state), tier_word(job.tier), when(job, "create_time"), job.prompt]
            for job in jobs
        ]
        self.table(["job", "state", "tier", "submitted", "prompt"], rows)

    def update(self, update: WatchJobResponse) -> None:
        """Print one thing that happened to a job, as a line of its own."""
        if self.as_json:
            self.document(update)
        elif update.WhichOneof("update") == "event":
            event = update.event
            self.line(when(event, "time"), state_word(event.state), event.sentence)

    def account(self, account: Account) -> None:
        """Print what `darkroom info` is asked for."""
        if self.as_json:
            self.document(account)
            return
        balance, limits = account.balance, account.limits
        overage = "not allowed; fast jobs are refused when the plan's time is used up"
        if account.overage_allowed:
            cap = (
                money(account.spend_cap_micros, balance.currency_code) if account.spend_cap_micros else "none"
            )
            overage = f"allowed, cap {cap}"
        self.facts(
            [
                ("account", last_part(account.name) + (" (blocked)" if account.blocked else "")),
                ("mode", tier_word(account.mode)),
                ("visibility", visibility_word(account.visibility)),
                *_balance_facts(balance),
                ("overage", overage),
                ("jobs", f"{account.jobs_running} running, {account.jobs_waiting} waiting"),
                (
                    "limits",
                    f"{limits.running} running at once, {limits.relax_running} of them relax, "
                    f"{limits.accepted} accepted",
                ),
            ]
        )

    def balance(self, balance: Balance) -> None:
        """Print an account's fast time."""
        if self.as_json:
            self.document(balance)
            return
        self.facts([("account", last_part(balance.account)), *_balance_facts(balance)])

    def plans(self, plans: Sequence[Plan]) -> None:
        """Print plans, one a line."""
        if self.as_json:
            self.document({"plans": [to_json(plan) for plan in plans]})
            return
        rows = [
            [
                last_part(plan.name),
                str(plan.version),
                duration(plan.quota_ms),
                f"{plan.limits.running}/{plan.limits.relax_running}/{plan.limits.accepted}",
                f"{plan.relax_weight_milli / 1000:g}",
                f"×{plan.private_multiplier_bp / 10_000:g}" if plan.private_allowed else "no",
                money(plan.overage_micros_per_minute, plan.currency_code)
                if plan.overage_micros_per_minute
                else "no",
            ]
            for plan in plans
        ]
        header = [
            "plan",
            "version",
            "fast a month",
            "running/relax/accepted",
            "relax weight",
            "private",
            "overage a minute",
        ]
        self.table(header, rows)


def to_json(value: Message | dict[str, Any]) -> dict[str, Any]:
    """Return a message with protobuf's JSON names, fields without a value included."""
    if isinstance(value, dict):
        return value
    return MessageToDict(value, always_print_fields_with_no_presence=True)


def visibility_word(visibility: Visibility.ValueType) -> str:
    """Return `public` or `private`."""
    return Visibility.Name(visibility).removeprefix("VISIBILITY_").lower()


def when(message: Message, field: str) -> str:
    """Return a time field in local time, empty if it is not set."""
    if not message.HasField(field):
        return ""
    at = getattr(message, field).ToDatetime().replace(tzinfo=UTC).astimezone()
    return str(at.strftime("%Y-%m-%d %H:%M:%S"))


def _source(job: Job) -> str:
    if not job.source_job:
        return ""
    picture = f", picture {job.source_image}" if job.source_image else ""
    return last_part(job.source_job) + picture


def _balance_facts(balance: Balance) -> list[tuple[str, str]]:
    posted = balance.overage_posted_micros
    return [
        ("plan", last_part(balance.plan)),
        ("fast time left", f"{duration(balance.available_ms)} of {duration(balance.granted_ms)}"),
        ("used", duration(balance.used_ms)),
        ("held by running jobs", duration(balance.held_ms)),
        ("renews", when(balance, "renew_time")),
        ("overage so far", money(posted, balance.currency_code) if posted else ""),
        ("relax used", duration(balance.relax_used_ms)),
    ]
