"""What a command prints, and where: the answer on stdout, everything else on stderr.

With `--json` the answer is one JSON document (streams: one a line), messages in protobuf's JSON names with
all fields present, and an error is one JSON line on stderr. Without, a terminal gets tables and colours, and
a pipe gets plain lines with tabs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scheduler.client.aio import ENDED
from scheduler.client.errors import DarkroomError
from scheduler.client.names import last_part, worker_id
from scheduler.client.terminal import (
    about,
    charged,
    contact_sheet,
    duration,
    expected_start,
    kind_word,
    plain,
    print_picture,
    receipt_sentence,
    state_word,
    tier_word,
    waits,
)
from scheduler.client.verify import Comparison, facts_of, record_of
from scheduler.v1 import fleet_pb2, job_pb2
from scheduler.v1.fleet_pb2 import (
    AuditFairnessResponse,
    Decision,
    DecisionKind,
    FindingCase,
    Queues,
    TierQueue,
    Verdict,
    Worker,
    WorkerRun,
    WorkerState,
)
from scheduler.v1.job_pb2 import Estimate, EstimateOption, Explanation, Job, Visibility, WatchJobResponse


class Printer:
    """Prints for one command."""

    def __init__(self, *, as_json: bool = False, pictures: bool = False, to_stderr: bool = False) -> None:
        self.as_json = as_json
        self.pictures = pictures
        # What a question is about is not the answer of the command: it goes where the question goes.
        self.out = Console(highlight=False, markup=False, emoji=False, stderr=to_stderr)
        self.err = Console(highlight=False, markup=False, emoji=False, stderr=True)

    def line(self, *cells: str) -> None:
        """Print a line of the answer, with tabs between its cells, never wrapped."""
        print("\t".join(plain(cell) for cell in cells), file=self.out.file, flush=True)

    def note(self, text: str) -> None:
        """Say something that is not the answer."""
        for line in text.splitlines():
            self.err.print(Text(plain(line)), soft_wrap=True)

    def agreed(self, question: str) -> bool:
        """Ask on stderr, and return whether the answer on stdin is yes; its end is no."""
        self.err.print(Text(f"{plain(question)} [y/N]"), end=" ", soft_wrap=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

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
        """Print a job that has its pictures: the pictures themselves, all files, the receipt."""
        if self.as_json:
            self.document({"job": to_json(job), "files": [str(file) for file in files]})
            return
        videos = {video.file_name for video in job.videos}
        pictures = [file for file in files if file.name not in videos]
        if self.pictures and pictures:
            print_picture(self.out, contact_sheet(pictures))
        for file in files:
            self.line(str(file))
        self.line(receipt_sentence(job))

    def job(self, job: Job) -> None:
        """Print everything about one job that a person asks for."""
        if self.as_json:
            self.document(job)
            return
        queued = job.queue_status if job.HasField("queue_status") else None
        self.facts(
            [
                ("job", job.uid),
                ("state", job_state(job) + (", to be cancelled" if job.cancel_requested else "")),
                ("waits because", waits(queued) if queued is not None else ""),
                ("kind", kind_word(job)),
                ("from", _source(job)),
                ("prompt", job.prompt),
                ("model", job.model),
                ("size", f"{job.width}×{job.height}, {job.steps} steps"),
                ("seed", str(job.seed) if job.uid else ""),  # a job that was only asked about has none
                ("tier", tier_word(job.tier)),
                ("visibility", visibility_word(job.visibility)),
                ("hidden", _hidden(job)),
                ("price", job.price.sentence),
                ("submitted", when(job, "create_time")),
                ("started", when(job, "start_time")),
                ("ended", when(job, "end_time")),
                ("failure", f"{job.failure.reason}: {job.failure.sentence}" if job.failure.reason else ""),
                ("receipt", receipt_sentence(job) if job.state in ENDED and job.HasField("receipt") else ""),
                (
                    "pictures kept until" if job.images else "pictures were kept until",
                    when(job, "pictures_expire_time"),
                ),
                *((f"picture {last_part(image.name)}", image.file_name) for image in job.images),
                *((f"video {last_part(video.name)}", video.file_name) for video in job.videos),
            ]
        )

    def receipt(self, job: Job) -> None:
        """Print what an ended job did cost, and all that is needed to make the same bits again."""
        receipt = job.receipt
        if self.as_json:
            of_job = {name: to_json(job)[name] for name in ("name", "images", "videos", "receipt")}
            self.document(of_job | {"record": record_of(receipt)})
            return
        stages = [
            f"{name} {duration(ms)}"
            for name, ms in (
                ("encode", receipt.encode_ms),
                ("denoise", receipt.denoise_ms),
                ("decode", receipt.decode_ms),
                ("upscale", receipt.upscale_ms),
            )
            if ms
        ]
        self.facts(
            [
                ("job", job.uid),
                ("kind", kind_word(job)),
                ("worker", worker_id(receipt.worker)),
                ("attempts", str(receipt.attempts)),
                ("waited", duration(receipt.waited_ms)),
                ("GPU time", ": ".join(filter(None, (duration(receipt.gpu_ms), ", ".join(stages))))),
                ("charge", charged(job)),
                ("fast time before", duration(receipt.balance_before_ms)),
                ("fast time after", duration(receipt.balance_after_ms)),
                *(
                    (
                        f"picture {last_part(image.name)}",
                        f"{image.width}×{image.height}, seed {image.seed}, SHA-256 {image.sha256}",
                    )
                    for image in job.images
                ),
                *(
                    (
                        f"video {last_part(video.name)}",
                        f"{video.width}×{video.height}, {video.frames} frames, SHA-256 {video.sha256}",
                    )
                    for video in job.videos
                ),
                *((f"record {what}", value) for what, value in facts_of(receipt).items()),
            ]
        )

    def comparison(self, first: Job, second: Job, found: Comparison) -> None:
        """Print whether a job that was made again has the same pictures, and what is different in how."""
        if self.as_json:
            self.document(
                {
                    "job": first.uid,
                    "again": second.uid,
                    "equal": found.equal,
                    "pictures": [
                        {
                            "number": pair.number,
                            "equal": pair.equal,
                            "sha256": pair.first_sha256,
                            "sha256Again": pair.second_sha256,
                        }
                        for pair in found.pictures
                    ],
                    "differences": [
                        {"what": each.what, "first": each.first, "again": each.second}
                        for each in found.differences
                    ],
                }
            )
            return
        rows = [
            [f"picture {pair.number}", "equal", pair.first_sha256, ""]
            if pair.equal
            else [
                f"picture {pair.number}",
                "different",
                pair.first_sha256 or "missing",
                pair.second_sha256 or "missing",
            ]
            for pair in found.pictures
        ]
        rows += [
            [each.what, "different", each.first or "missing", each.second or "missing"]
            for each in found.differences
        ]
        self.table(["what", "", "first", "again"], rows)
        if found.equal:
            self.note(f"Job {second.uid} has the same pictures, bit for bit.")
        elif found.differences:
            self.note(
                "The pictures are not the same bits. What was different in how they were made is above."
            )
        else:
            self.note(
                "The pictures are not the same bits, although their records agree on everything. "
                f"Report it, with jobs {first.uid} and {second.uid}."
            )

    def jobs(self, jobs: Sequence[Job]) -> None:
        """Print jobs, one a line."""
        if self.as_json:
            self.document({"jobs": [to_json(job) for job in jobs]})
            return
        rows = [
            [
                job.uid,
                job_state(job) + (", hidden" if job.HasField("hidden") else ""),
                kind_word(job),
                tier_word(job.tier),
                when(job, "create_time"),
                expected_start(job.queue_status),
                job.prompt,
            ]
            for job in jobs
        ]
        self.table(["job", "state", "kind", "tier", "submitted", "starts", "prompt"], rows)

    def update(self, update: WatchJobResponse) -> None:
        """Print one thing that happened to a job, as a line of its own."""
        if self.as_json:
            self.document(update)
        elif update.WhichOneof("update") == "event":
            event = update.event
            self.line(when(event, "time"), state_word(event.state), event.sentence)

    def explanation(self, told: Explanation) -> None:
        """Print why a job is where it is: sentences first, then the numbers behind them."""
        if self.as_json:
            self.document(told)
            return
        for sentence in told.sentences:
            self.line(sentence)
        place, bound = told.place, told.bound
        waits = told.HasField("place")
        self.facts(
            [
                ("state", f"{state_word(told.state)} in {tier_word(told.tier)}"),
                ("place", f"{place.position} of {place.of}" if place.position else ""),
                ("starts", expected_start(told.queue_status)),
                ("at the latest", f"in {about(bound.within_ms)}" if told.HasField("bound") else ""),
                ("its tag", _tag(place.tag_ms) if waits else ""),
                ("served so far", _tag(place.served_ms) if waits else ""),
                ("ends", f"in about {about(told.end_ms)}" if told.HasField("end_ms") else ""),
            ]
        )

    def estimate(self, estimate: Estimate) -> None:
        """Print what a job would be on different terms, one line each."""
        if self.as_json:
            self.document(estimate)
            return
        rows = []
        for option in estimate.options:
            refused = option.HasField("refusal")
            rows.append(
                [
                    tier_word(option.tier) + (" (as it is)" if option.present else ""),
                    last_part(option.plan),
                    option.refusal.sentence if refused else option.price.sentence,
                    expected_start(option) or ("never" if refused else "not known"),
                    _delays(option),
                ]
            )
        self.table(["tier", "plan", "price", "starts", "delays others"], rows)

    def workers(self, workers: Sequence[Worker]) -> None:
        """Print workers, one a line."""
        if self.as_json:
            self.document({"workers": [to_json(worker) for worker in workers]})
            return
        rows = [
            [
                worker_id(worker.name),
                worker_state(worker),
                when(worker, "state_time"),
                _run(worker.active) if worker.HasField("active") else "",
                ", ".join(_run(run) for run in worker.parked),
                worker.device,
                f"{worker.speed_permille / 1000:g}" if worker.speed_permille else "",
                f"{worker.memory_bytes_used / 2**30:.1f}/{worker.memory_bytes / 2**30:.1f} GiB"
                if worker.memory_bytes
                else "",
                ", ".join(worker.warm_models),
                worker.sentence,
            ]
            for worker in workers
        ]
        header = ["worker", "state", "since", "runs", "parked", "device", "speed", "memory", "warm", "why"]
        self.table(header, rows)

    def audit(self, audit: AuditFairnessResponse) -> None:
        """Print what an audit found, a bound a line, and what it could not tell."""
        if self.as_json:
            self.document(audit)
            return
        rows = [
            [
                finding.bound,
                Verdict.Name(finding.verdict).removeprefix("VERDICT_").lower().replace("_", " "),
                f"{finding.cases:,}",
                f"{finding.worst_margin:,.0f} {finding.unit}" if finding.HasField("worst_margin") else "",
                _where(finding.worst) if finding.HasField("worst") else "",
                finding.promise,
            ]
            for finding in audit.findings
        ]
        self.table(["bound", "verdict", "cases", "worst margin", "where", "promise"], rows)
        self.note(f"{audit.starts:,} starts.")
        for finding in audit.findings:
            if finding.set_aside:
                self.note(f"{finding.bound}: {finding.set_aside:,} cases could not be judged.")
            for why in finding.widened:
                self.note(f"{finding.bound} was widened for {why}.")
        for sentence in audit.unknown:
            self.note(sentence)

    def queues(self, queues: Queues) -> None:
        """Print what waits and runs, and how the GPUs are shared."""
        if self.as_json:
            self.document(queues)
            return
        self.tiers(queues.tiers)
        wanted = f", {queues.wanted_gpus} wanted" if queues.HasField("wanted_gpus") else ""
        self.facts(
            [
                ("GPUs", f"{queues.gpus}, {queues.idle_gpus} idle, {queues.fast_gpus} with fast{wanted}"),
                ("kept for relax", str(queues.relax_floor_gpus)),
            ]
        )

    def tiers(self, tiers: Iterable[TierQueue]) -> None:
        """Print what waits and runs in each tier."""
        rows = [
            [
                tier_word(tier.tier),
                str(tier.waiting),
                str(tier.held),
                str(tier.running),
                str(tier.parked),
                about(tier.oldest_wait_ms) if tier.oldest_wait_ms else "",
                f"paused: {tier.pause_reason}" if tier.paused else "open",
            ]
            for tier in tiers
        ]
        self.table(["tier", "waiting", "held", "running", "parked", "oldest waits", "state"], rows)

    def decisions(self, decisions: Iterable[Decision]) -> None:
        """Print decisions, one a line."""
        rows = [
            [
                when(one, "time"),
                decision_word(one),
                tier_word(one.tier),
                one.job.split("/")[1],
                last_part(one.job),
                worker_id(one.worker) if one.worker else "",
                one.sentence,
            ]
            for one in decisions
        ]
        self.table(["at", "decided", "tier", "account", "job", "worker", "why"], rows)


def to_json(value: Message | dict[str, Any]) -> dict[str, Any]:
    """Return a message with protobuf's JSON names, fields without a value included."""
    if isinstance(value, dict):
        return value
    return MessageToDict(value, always_print_fields_with_no_presence=True)


def visibility_word(visibility: Visibility.ValueType) -> str:
    """Return `public` or `private`."""
    return Visibility.Name(visibility).removeprefix("VISIBILITY_").lower()


def when(message: Message, field: str) -> str:
    """Return a time field in local time with its zone, empty if it is not set."""
    if not message.HasField(field):
        return ""
    at = getattr(message, field).ToDatetime().replace(tzinfo=UTC).astimezone()
    # What is typed, and what the service writes in sentences, is UTC.
    return str(at.strftime("%Y-%m-%d %H:%M:%S %Z"))


def _tag(tag_ms: int) -> str:
    return f"{tag_ms / 1000:,.1f} s"


def job_state(job: Job) -> str:
    """Return `queued`, `running`, …, or `parked` for one that runs and has no GPU at the moment."""
    parked = job.state == job_pb2.JOB_STATE_RUNNING and job.HasField("queue_status")
    return "parked" if parked else state_word(job.state)


def _hidden(job: Job) -> str:
    return f"from the feed, by a moderator ({job.hidden.category})" if job.HasField("hidden") else ""


def _delays(option: EstimateOption) -> str:
    if not option.HasField("delayed_jobs"):
        return "not known"
    if not option.delayed_jobs:
        return "nobody"
    jobs = "1 job" if option.delayed_jobs == 1 else f"{option.delayed_jobs} jobs"
    return f"{jobs}, by {about(option.delayed_ms)} together"


def worker_state(worker: Worker) -> str:
    """Return `idle`, `running`, …, or `drained` for one that drains and has nothing left."""
    state = WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower().replace("_", " ")
    # Nobody needs to wait for one that has finished what it had.
    emptied = worker.state == fleet_pb2.WORKER_STATE_DRAINING and not worker.HasField("active")
    return "drained" if emptied and not worker.parked else state


def decision_word(one: Decision) -> str:
    """Return `started`, `parked`, `given up`, …"""
    return DecisionKind.Name(one.kind).removeprefix("DECISION_KIND_").lower().replace("_", " ")


def steps_done(run: WorkerRun) -> str:
    """Return `12/20`; empty where that is not known."""
    return f"{run.step}/{run.steps}" if run.steps else ""


def _run(run: WorkerRun) -> str:
    return " ".join(word for word in (tier_word(run.tier), last_part(run.job), steps_done(run)) if word)


def _where(case: FindingCase) -> str:
    names = [*(last_part(account) for account in case.accounts), case.job]
    if case.worker:
        names.append(worker_id(case.worker))
    return " ".join([when(case, "time"), *(name for name in names if name)])


def _source(job: Job) -> str:
    if not job.source_job:
        return ""
    picture = f", picture {job.source_image}" if job.source_image else ""
    return last_part(job.source_job) + picture
