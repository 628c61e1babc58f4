"""A board that knows its order only up to some edge starts what the whole board would start, and no more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy.auditing.audit import audit
from scheduler.policy.auditing.findings import Bound, Verdict
from scheduler.policy.auditing.journal import Recorder
from scheduler.policy.board import Board
from scheduler.policy.decisions import Decision, Migrate, Resume, Start
from scheduler.policy.events import (
    AccountRestored,
    AttemptRestored,
    AttemptStarted,
    CellRestored,
    Edge,
    FairShare,
    JobSubmitted,
    LimitsChanged,
    OrderKnown,
    RecoveryEnded,
    Waited,
    WaitingRestored,
    WorkerJoined,
)
from scheduler.policy.ids import AccountId, AttemptId, JobId, Tier, WorkerId
from scheduler.policy.job import Job
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters
from scheduler.policy.worker import Worker

NOW_MS = 1_000_000
LIMITS = Limits(running=3, relax_running=2, accepted=10)
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a scheduler that takes over finds."""

    shares: Mapping[AccountId, Mapping[Tier, FairShare]]
    jobs: tuple[Job, ...]
    workers: tuple[Worker, ...]
    running: Mapping[WorkerId, Job]
    """What each busy worker had."""

    @property
    def order(self) -> list[AccountId]:
        """The accounts by the first place that one of their tiers gives them."""
        places = {tier: sorted(self.edges(tier).items(), key=_place) for tier in Tier}
        firsts: dict[AccountId, int] = {}
        for waits in places.values():
            for index, (account_id, _) in enumerate(waits):
                firsts[account_id] = min(index, firsts.get(account_id, index))
        return sorted(firsts, key=firsts.__getitem__)

    def edges(self, tier: Tier) -> dict[AccountId, Edge]:
        """Who waits in a tier, and from where on."""
        edges: dict[AccountId, Edge] = {}
        for job in sorted(self.jobs, key=lambda job: job.arrival):
            if job.tier is tier and job.account_id not in edges:
                share = self.shares[job.account_id][tier]
                tag = max(share.finish_tag, 0) if share.tag is None else share.tag
                edges[job.account_id] = Edge(tag=tag, arrival=job.arrival)
        return edges

    def board(self, known: Collection[AccountId] | None = None) -> Board:
        """Return a board that knows these accounts; None: all."""
        board = Board(Parameters())
        for tier in Tier:
            board.apply(CellRestored(at_ms=NOW_MS, tier=tier, virtual_time=0, decay_origin_ms=0))
        first = {job.account_id for job in self.running.values()}
        for worker in self.workers:
            board.apply(WorkerJoined(at_ms=NOW_MS, worker=worker))
        for account_id in self.shares:
            if known is None or account_id in known or account_id in first:
                self.tell_of(board, account_id)
        for tier in Tier:
            left = [
                edge for account_id, edge in self.edges(tier).items() if not board.knows_account(account_id)
            ]
            edge = min(left, key=lambda edge: (edge.tag, edge.arrival), default=None)
            board.apply(OrderKnown(at_ms=NOW_MS, tier=tier, edge=edge))
        return board

    def tell_of(self, board: Board, account_id: AccountId) -> None:
        """Tell of an account, with all its jobs."""
        board.apply(
            AccountRestored(
                at_ms=NOW_MS,
                account_id=account_id,
                limits=LIMITS,
                weight_milli=1000,
                shares=self.shares[account_id],
            )
        )
        for worker_id, job in self.running.items():
            if job.account_id == account_id:
                board.apply(
                    AttemptRestored(
                        at_ms=NOW_MS,
                        job=job,
                        losses=0,
                        accepted_ms=NOW_MS,
                        attempt_id=AttemptId(f"attempt of {job.job_id}"),
                        worker_id=worker_id,
                        predicted_ms=job.predicted_ms,
                        weight_milli=1000,
                        charged_at_ms=NOW_MS - 1_000,
                        started_ms=NOW_MS - 1_000,
                    )
                )
        waiting = self.waiting(account_id)
        if any(job.account_id == account_id for job in self.running.values()):
            for submitted in waiting.submitted():
                board.apply(submitted)
        else:
            board.apply(waiting)

    def waiting(self, account_id: AccountId, losses: int = 0) -> WaitingRestored:
        """Return all that waits of an account, of which one job in two has lost so many workers."""
        waited = (
            Waited(job, losses * (job.arrival % 2), NOW_MS - job.arrival, None)
            for job in self.jobs
            if job.account_id == account_id
        )
        return WaitingRestored(at_ms=NOW_MS, account_id=account_id, jobs=tuple(waited))


def _place(one: tuple[AccountId, Edge]) -> tuple[int, int]:
    return one[1].tag, one[1].arrival


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Some accounts with close tags, so that everything that breaks ties is met."""
    accounts = [AccountId(f"account-{number}") for number in range(draw(st.integers(1, 7)))]
    tags = st.none() | st.integers(0, 4).map(lambda number: number * 30_000_000)
    shares = {
        account_id: {
            tier: FairShare(
                finish_tag=draw(st.integers(0, 2)) * 30_000_000,
                tag=draw(tags),
                usage=draw(st.sampled_from((0.0, 5e5, 9e6))) if tier is Tier.RELAX else 0.0,
            )
            for tier in Tier
        }
        for account_id in accounts
    }
    a_job = st.tuples(
        st.sampled_from(accounts),
        st.sampled_from(tuple(Tier)),
        st.sampled_from(("small", "large", "nowhere")),
        st.sampled_from((1_000, 60_000)),
    )
    drawn = draw(st.lists(a_job, max_size=24))
    jobs = [
        Job(
            job_id=JobId(f"job-{number:02d}"),
            account_id=account_id,
            tier=tier,
            arrival=number,
            predicted_ms=predicted_ms,
            step_ms=100,
            model=model,
            memory_bytes=GIB,
        )
        for number, (account_id, tier, model, predicted_ms) in enumerate(drawn)
    ]
    workers = [
        Worker(
            worker_id=WorkerId(f"gpu-{number}"),
            memory_bytes=8 * GIB,
            speed_permille=1000,
            warm_models=frozenset(draw(st.sets(st.sampled_from(("small", "large")), max_size=1))),
            models=frozenset({"small", "large"}),
        )
        for number in range(draw(st.integers(1, 8)))
    ]
    running: dict[WorkerId, Job] = {}
    counts: dict[tuple[AccountId, bool], int] = {}
    for worker in workers:
        job = jobs[0] if jobs else None
        if job is None or not draw(st.booleans()):
            continue
        relax = job.tier is Tier.RELAX
        if counts.get((job.account_id, relax), 0) < (2 if relax else 1) and job.model != "nowhere":
            counts[job.account_id, relax] = counts.get((job.account_id, relax), 0) + 1
            running[worker.worker_id] = job
            jobs.pop(0)
    return Rows(shares=shares, jobs=tuple(jobs), workers=tuple(workers), running=running)


def moves(board: Board) -> list[Decision]:
    """What a board starts or has go on, by what decides it: who comes behind may be yet to be read."""
    return [
        replace(one, keys=replace(one.keys, runner_up=None)) if isinstance(one, Start) else one
        for one in board.decide(NOW_MS)
        if isinstance(one, Start | Resume | Migrate)
    ]


@given(rows(), st.integers(0, 7), st.integers(0, 7))
def test_what_a_partly_read_board_starts_is_what_the_whole_one_starts_first(
    found: Rows, read: int, stranger: int
) -> None:
    whole = moves(found.board())
    order = found.order
    partly = moves(found.board({*order[:read], *order[stranger : stranger + 1]}))
    assert partly == whole[: len(partly)]


@given(rows(), st.data())
def test_a_job_that_comes_leaves_nothing_to_be_brought_in_line(found: Rows, data: st.DataObject) -> None:
    board = replace(found, jobs=()).board()
    for job in data.draw(st.permutations(found.jobs)):
        board.apply(JobSubmitted(at_ms=NOW_MS, job=job))
        in_order = order_of(board)
        board.apply(LimitsChanged(at_ms=NOW_MS, account_id=job.account_id, limits=LIMITS, weight_milli=1000))
        assert order_of(board) == in_order


@given(rows())
def test_all_that_waits_of_an_account_is_told_at_once_as_if_one_by_one(found: Rows) -> None:
    at_once, one_by_one = (replace(found, jobs=()).board() for _ in range(2))
    for account_id in found.shares:
        waiting = found.waiting(account_id, losses=Parameters().max_losses)
        at_once.apply(waiting)
        for submitted in waiting.submitted():
            one_by_one.apply(submitted)
    assert order_of(at_once) == order_of(one_by_one)
    assert at_once.facts(NOW_MS) == one_by_one.facts(NOW_MS)
    assert at_once.decide(NOW_MS) == one_by_one.decide(NOW_MS)


def order_of(board: Board) -> list[object]:
    """Everything by which a board's waiting jobs are in order."""
    cell = board.cell
    return [
        *((dict(queue._crowd), queue.could_start) for queue in cell.queues.values()),
        *(
            (tier, fit, dict(line.by_tag._live), dict(line.by_age._live))
            for tier, queue in cell.queues.items()
            for fit, line in queue.lines.items()
        ),
        *(
            (
                turn.tag,
                turn.ranked_by,
                turn.counted,
                {fit: lane.head_job_id for fit, lane in turn.lanes.items()},
            )
            for account in cell.accounts.values()
            for turn in (account.fast, account.relax)
        ),
        set(board.unstored_tags()),
        [(tier, len(moments), moments.first_ms()) for tier, moments in cell.not_running.items()],
    ]


@given(rows())
def test_once_all_is_read_nothing_is_held_back(found: Rows) -> None:
    order = found.order
    board = found.board(order[:1])
    for account_id in found.shares:
        if not board.knows_account(account_id):
            found.tell_of(board, account_id)
    board.apply(RecoveryEnded(at_ms=NOW_MS))
    whole = found.board()
    whole.apply(RecoveryEnded(at_ms=NOW_MS))
    assert board.is_whole
    assert moves(board) == moves(whole)


def a_cell(accounts: int) -> Rows:
    """One idle worker, and accounts with a job each, in the order of their numbers."""
    names = [AccountId(f"account-{number}") for number in range(accounts)]
    return Rows(
        shares={
            name: {Tier.RELAX: FairShare(finish_tag=0, tag=number * 1_000, usage=0.0)}
            for number, name in enumerate(names)
        },
        jobs=tuple(
            Job(
                job_id=JobId(f"job-{number}"),
                account_id=name,
                tier=Tier.RELAX,
                arrival=number,
                predicted_ms=1_000,
                step_ms=100,
                model="small",
                memory_bytes=GIB,
            )
            for number, name in enumerate(names)
        ),
        workers=(
            Worker(
                worker_id=WorkerId("gpu-0"),
                memory_bytes=8 * GIB,
                speed_permille=1000,
                warm_models=frozenset({"small"}),
            ),
        ),
        running={},
    )


def test_the_first_starts_before_the_last_is_read() -> None:
    found = a_cell(3)
    (start,) = moves(found.board(found.order[:1]))
    assert isinstance(start, Start)
    assert start.job_id == "job-0"


def test_who_is_read_out_of_turn_waits_for_those_before() -> None:
    found = a_cell(3)
    assert moves(found.board({AccountId("account-2")})) == []


def test_relax_waits_until_it_is_known_who_waits_in_fast() -> None:
    found = a_cell(1)
    board = found.board()
    board.apply(OrderKnown(at_ms=NOW_MS, tier=Tier.FAST, edge=Edge(tag=0, arrival=0)))
    assert moves(board) == []
    board.apply(OrderKnown(at_ms=NOW_MS, tier=Tier.FAST, edge=None))
    assert len(moves(board)) == 1


def test_a_model_is_not_loaded_while_one_who_has_it_warm_may_yet_be_read() -> None:
    found = a_cell(2)
    cold, warm = found.jobs
    found = replace(
        found,
        jobs=(cold, replace(warm, model="large")),
        workers=(replace(found.workers[0], warm_models=frozenset({"large"})),),
    )
    (start,) = moves(found.board())
    assert isinstance(start, Start)
    assert start.job_id == warm.job_id
    assert moves(found.board(found.order[:1])) == []


def test_a_worker_that_idles_while_the_order_is_read_breaks_no_promise() -> None:
    found = a_cell(2)
    for told_ms, verdict in ((60_000, Verdict.HOLDS), (None, Verdict.VIOLATED)):
        recorder, board = Recorder(), Board(Parameters())
        for tier in Tier:
            recorder.note(CellRestored(at_ms=0, tier=tier, virtual_time=0, decay_origin_ms=0))
        if told_ms is not None:
            recorder.note(OrderKnown(at_ms=0, tier=Tier.RELAX, edge=Edge(tag=0, arrival=0)))
        recorder.note(WorkerJoined(at_ms=0, worker=found.workers[0]))
        board = found.board()
        (start,) = board.decide(NOW_MS)
        assert isinstance(start, Start)
        for job in found.jobs:
            recorder.note(
                AccountRestored(
                    at_ms=0,
                    account_id=job.account_id,
                    limits=LIMITS,
                    weight_milli=1000,
                    shares=found.shares[job.account_id],
                )
            )
            recorder.note(JobSubmitted(at_ms=0, job=job))
        if told_ms is not None:
            recorder.note(RecoveryEnded(at_ms=told_ms))
        recorder.decided([start])
        recorder.note(
            AttemptStarted(
                at_ms=60_000,
                job_id=start.job_id,
                attempt_id=AttemptId("attempt"),
                worker_id=start.worker_id,
                charge=start.charge,
            )
        )
        findings = {
            finding.bound: finding for finding in audit(recorder.journal(grace_ms=2_000), Parameters())
        }
        assert findings[Bound.B8].verdict is verdict
