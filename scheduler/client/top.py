"""What `darkroom top` shows: the fleet and the newest decisions for operators, and for others their own jobs.

A `Board` keeps the newest answer and how old it is. While the service is away it goes on showing what was,
and says since when. On a narrow terminal it has fewer columns, on a low one fewer rows, and it says how many
are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from billing.v1.billing_pb2 import Balance
from scheduler.client.aio import DarkroomClient
from scheduler.client.errors import RoleRequired
from scheduler.client.names import last_part, worker_id
from scheduler.client.printing import Printer, decision_word, job_state, steps_done, to_json, worker_state
from scheduler.client.terminal import about, duration, expected_start, kind_word, plain, tier_word
from scheduler.v1 import fleet_pb2, job_pb2
from scheduler.v1.account_pb2 import Account
from scheduler.v1.fleet_pb2 import Decision, Queues, TierQueue, Worker, WorkerRun
from scheduler.v1.job_pb2 import Job

_OWN_JOBS = 50
# The newest are what somebody looks for; all that a terminal has room for are a few.
_DECISIONS = 25
# Workers are what the board is for: so much of the room below the queues is theirs.
_ROOM_FOR_DECISIONS = 3
_FEWEST_DECISIONS = 2
# An answer older than this many refreshes is worth a word.
_LATE = 2.5

_STYLES = {"fast": "magenta", "relax": "cyan", "idle": "bright_black"}
_WORKER_STYLES = {
    fleet_pb2.WORKER_STATE_IDLE: "bright_black",
    fleet_pb2.WORKER_STATE_RUNNING: "green",
    fleet_pb2.WORKER_STATE_DRAINING: "yellow",
    fleet_pb2.WORKER_STATE_LEAVING: "yellow",
}


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What an operator sees."""

    queues: Queues
    workers: Sequence[Worker]
    decisions: Sequence[Decision]
    """The newest first."""

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "queues": to_json(self.queues),
            "workers": [to_json(worker) for worker in self.workers],
            "decisions": [to_json(decision) for decision in self.decisions],
        }

    def print(self, printer: Printer) -> None:
        """Print it as plain lines."""
        printer.queues(self.queues)
        printer.workers(self.workers)
        printer.decisions(self.decisions)


@dataclass(frozen=True, kw_only=True)
class OwnJobs:
    """What everybody sees: the own account, and its jobs that have not ended."""

    account: Account
    jobs: Sequence[Job]

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"account": to_json(self.account), "jobs": [to_json(job) for job in self.jobs]}

    def print(self, printer: Printer) -> None:
        """Print it as plain lines."""
        printer.jobs(self.jobs)


Seen: TypeAlias = Fleet | OwnJobs


async def look(client: DarkroomClient) -> Seen:
    """Return what this key may see now. Raises DarkroomError."""
    try:
        return Fleet(
            queues=await client.queues(),
            workers=await client.workers(),
            decisions=await client.decisions(most=_DECISIONS),
        )
    except RoleRequired:
        account = await client.account()
        jobs: list[Job] = []
        states = [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING]
        async for job in client.jobs(states=states, page_size=_OWN_JOBS):
            jobs.append(job)
            if len(jobs) == _OWN_JOBS:
                break
        return OwnJobs(account=account, jobs=jobs)


class Board:
    """The screen of one service, as it is drawn at any moment."""

    def __init__(self, address: str, *, every_s: float, clock: Callable[[], datetime]) -> None:
        self._address = address
        self._every_s = every_s
        self._clock = clock
        self._seen: Seen | None = None
        self._seen_at: datetime | None = None
        self._trouble = ""
        self._uses: Counter[str] = Counter()
        self._first_at = clock()

    def show(self, seen: Seen) -> None:
        """Take in an answer."""
        now = self._clock()
        if isinstance(seen, Fleet) and self._seen_at is not None and not self._trouble:
            lasted_ms = int((now - self._seen_at).total_seconds() * 1000)
            for use, gpus in _uses(seen.queues).items():
                self._uses[use] += gpus * lasted_ms
        self._seen, self._seen_at, self._trouble = seen, now, ""

    def lose(self, trouble: str) -> None:
        """Take in that there was no answer, and why."""
        self._trouble = trouble

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or console.height
        yield self._title(width)
        height -= 1
        for line in self._lateness():
            yield line
            height -= 1
        if isinstance(self._seen, Fleet):
            yield from self._fleet(self._seen, width, height)
        elif self._seen is not None:
            yield from self._own_jobs(self._seen, width, height)

    def _title(self, width: int) -> Text:
        left = f"darkroom top  {plain(self._address)}"
        right = f"{self._clock().astimezone():%H:%M:%S}  q ends"
        room = width - len(left) - len(right)
        return _line(left + " " * room + right if room > 0 else left, style="reverse")

    def _lateness(self) -> list[Text]:
        if self._seen_at is None:
            return []
        age_s = (self._clock() - self._seen_at).total_seconds()
        if not self._trouble and age_s < _LATE * self._every_s + 1:
            return []
        since = f"No answer for {about(int(age_s * 1000))}; what is below was true then. "
        return [_line(since + plain(self._trouble), style="bold red")]

    def _fleet(self, fleet: Fleet, width: int, height: int) -> list[RenderableType]:
        queues, workers = fleet.queues, fleet.workers
        uses = _uses(queues)
        now = [f"{name} {uses[name]}" for name in _STYLES]
        wanted = f", {queues.wanted_gpus} wanted" if queues.HasField("wanted_gpus") else ""
        parts: list[RenderableType] = [
            _line(""),
            _bar(uses, width),
            _line(
                f"GPUs: {', '.join(now)} of {queues.gpus}{wanted}; {queues.relax_floor_gpus} kept for relax"
            ),
        ]
        whole = sum(self._uses.values())
        if whole:
            shares = ", ".join(f"{use} {self._uses[use] * 100 / whole:.0f} %" for use in _STYLES)
            parts.append(_line(f"GPU time since {self._first_at.astimezone():%H:%M}: {shares}"))
        if holders := _holders(workers):
            parts.append(_line(f"Held by: {holders}"))
        parts += [_line(""), _tiers(queues.tiers, width), _line("")]
        # The tiers' table has a heading, and so has the workers'.
        room = height - len(parts) - len(queues.tiers) - 1
        # An empty line and a heading come before them.
        shown = fleet.decisions[: max(0, room // _ROOM_FOR_DECISIONS - 2)]
        decided: list[RenderableType] = []
        if len(shown) >= min(_FEWEST_DECISIONS, len(fleet.decisions)) > 0:
            decided = [_line(""), self._decisions(shown, width)]
            room -= len(shown) + 2
        return [
            *parts,
            *_cut(sorted(workers, key=_by_urgency), room, lambda some: self._workers(some, width)),
            *decided,
        ]

    def _workers(self, workers: Sequence[Worker], width: int) -> Table:
        wide, wider = width >= 100, width >= 140
        header = ["worker", "state", "runs", "steps", "for"]
        header += ["parked", "memory"] if wide else []
        header += ["warm", "device"] if wider else []
        table = _table(*header, stretched="runs")
        for worker in workers:
            cells = [
                Text(plain(worker_id(worker.name))),
                Text(worker_state(worker), style=_WORKER_STYLES.get(worker.state, "bold red")),
                self._runs(worker, wide),
                Text(steps_done(worker.active)),
                Text(self._age(_since(worker))),
            ]
            if wide:
                cells += [Text(str(len(worker.parked) or "")), Text(_memory(worker))]
            if wider:
                cells += [Text(plain(", ".join(worker.warm_models))), Text(plain(worker.device))]
            table.add_row(*cells)
        return table

    def _decisions(self, decisions: Sequence[Decision], width: int) -> Table:
        wide = width >= 100
        header = ["decided", "what", "job"] + (["worker"] if wide else [])
        table = _table(*header, "why", stretched="why")
        for decision in decisions:
            account, job = decision.job.split("/")[1], last_part(decision.job)
            word = tier_word(decision.tier)
            cells = [
                Text(f"{self._age(decision.time)} ago"),
                Text(decision_word(decision)),
                Text.assemble((word, _STYLES.get(word, "")), " ", plain(account), " ", job[:8]),
            ]
            if wide:
                cells.append(Text(plain(worker_id(decision.worker) if decision.worker else "")))
            table.add_row(*cells, Text(plain(decision.sentence)))
        return table

    def _runs(self, worker: Worker, wide: bool) -> Text:
        if not worker.HasField("active"):
            return Text(plain(worker.sentence), style="dim")
        run = worker.active
        word = tier_word(run.tier)
        job = last_part(run.job)
        return Text.assemble(
            (word, _STYLES.get(word, "")), " ", plain(_account_of(run)), " ", plain(job if wide else job[:8])
        )

    def _own_jobs(self, own: OwnJobs, width: int, height: int) -> list[RenderableType]:
        account = own.account
        who = f"{last_part(account.name)} ({last_part(account.balance.plan)})"
        jobs = f"{account.jobs_running} running, {account.jobs_waiting} waiting"
        parts: list[RenderableType] = [
            _line(""),
            _line(f"{who}, mode {tier_word(account.mode)}: {jobs}"),
            _line(_fast_time(account.balance)),
            _line(""),
        ]
        if not own.jobs:
            return [*parts, _line("Nothing waits or runs.", style="dim")]
        room = height - len(parts)
        return [*parts, *_cut(own.jobs, room, lambda some: self._jobs(some, width))]

    def _jobs(self, jobs: Sequence[Job], width: int) -> Table:
        wide = width >= 100
        header = ["job", "state", "tier", "kind", "for"] + (["starts"] if wide else [])
        table = _table(*header, "prompt", stretched="prompt")
        for job in jobs:
            tier = tier_word(job.tier)
            running = job.state == job_pb2.JOB_STATE_RUNNING
            cells = [
                Text(job.uid if width >= 120 else job.uid[:8]),
                Text(job_state(job), style="green" if running else "yellow"),
                Text(tier, style=_STYLES.get(tier, "")),
                Text(kind_word(job)),
                Text(self._age(job.start_time if running else job.create_time)),
            ]
            if wide:
                cells.append(Text(expected_start(job.queue_status)))
            table.add_row(*cells, Text(plain(job.prompt)))
        return table

    def _age(self, since: Timestamp) -> str:
        if not since.seconds:
            return ""  # it has not happened
        at = since.ToDatetime().replace(tzinfo=UTC)
        return about(int((self._clock() - at).total_seconds() * 1000))


def _tiers(tiers: Sequence[TierQueue], width: int) -> Table:
    wide = width >= 70
    header = ["tier", "waiting", "running", "oldest"] + (["held", "parked"] if wide else [])
    table = _table(*header, "state", stretched="state")
    for tier in tiers:
        word = tier_word(tier.tier)
        cells = [
            Text(word, style=_STYLES.get(word, "")),
            Text(str(tier.waiting)),
            Text(str(tier.running)),
            Text(about(tier.oldest_wait_ms) if tier.oldest_wait_ms else "–"),
        ]
        if wide:
            cells += [Text(str(tier.held)), Text(str(tier.parked))]
        paused = Text(f"paused: {plain(tier.pause_reason)}", style="red")
        table.add_row(*cells, paused if tier.paused else Text("open"))
    return table


def _uses(queues: Queues) -> dict[str, int]:
    """Return how many GPUs do what now."""
    relax = queues.gpus - queues.idle_gpus - queues.fast_gpus
    return {"fast": queues.fast_gpus, "relax": relax, "idle": queues.idle_gpus}


def _holders(workers: Sequence[Worker]) -> str:
    """Return who has GPUs now, those with the most first: `ada 3, ben 1`."""
    held = Counter(_account_of(worker.active) for worker in workers if worker.HasField("active"))
    # By name where they have as many, so that the line does not jump about.
    ranked = sorted(held.items(), key=lambda one: (-one[1], one[0]))
    return ", ".join(f"{plain(account)} {gpus}" for account, gpus in ranked)


def _since(worker: Worker) -> Timestamp:
    """Return since when it does what it does: leaves, or runs what it runs."""
    leaves = worker.state == fleet_pb2.WORKER_STATE_LEAVING
    return worker.state_time if leaves else worker.active.start_time


def _account_of(run: WorkerRun) -> str:
    return run.job.split("/")[1]


def _by_urgency(worker: Worker) -> tuple[int, str]:
    order = [
        fleet_pb2.WORKER_STATE_DRAINING,
        fleet_pb2.WORKER_STATE_LEAVING,
        fleet_pb2.WORKER_STATE_RUNNING,
        fleet_pb2.WORKER_STATE_IDLE,
    ]
    return (order.index(worker.state) + 1 if worker.state in order else 0, worker.name)


def _memory(worker: Worker) -> str:
    if not worker.memory_bytes:
        return ""
    return f"{worker.memory_bytes_used / 2**30:.1f}/{worker.memory_bytes / 2**30:.1f} GiB"


def _fast_time(balance: Balance) -> str:
    left, held = duration(balance.available_ms), duration(balance.held_ms)
    return f"fast time left {left}, held {held}, used {duration(balance.used_ms)}"


def _bar(uses: dict[str, int], width: int) -> Text:
    """Return a line that is filled as the GPUs are."""
    whole = sum(uses.values())
    bar = Text(no_wrap=True, overflow="crop")
    done = filled = 0
    for use, gpus in uses.items():
        done += gpus
        upto = done * width // whole if whole else 0
        bar.append("█" * (upto - filled), style=_STYLES[use])
        filled = upto
    return bar


def _cut(rows: Sequence[Any], room: int, drawn: Callable[[Sequence[Any]], Table]) -> list[RenderableType]:
    """Return a table of as many rows as there is room for, and how many are left out."""
    fitting = max(room - 1, 1)  # under its heading
    if len(rows) <= fitting:
        return [drawn(rows)]
    shown = rows[: max(fitting - 1, 1)]
    return [drawn(shown), _line(f"… and {len(rows) - len(shown)} more", style="dim")]


def _table(*header: str, stretched: str = "") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=bool(stretched))
    for name in header:
        table.add_column(
            name, no_wrap=True, overflow="ellipsis", ratio=1 if name == stretched else None, min_width=3
        )
    return table


def _line(text: str, *, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
