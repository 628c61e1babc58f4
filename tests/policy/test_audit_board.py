"""The auditor over random schedules of the real board: every bound holds, and a wrong record is found."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cell import PLAIN, REMEMBERING, Cell, Decided, a_worker

from scheduler.policy.auditing.audit import audit
from scheduler.policy.auditing.findings import Bound, Verdict
from scheduler.policy.auditing.journal import Dispatch, Journal, Recorder
from scheduler.policy.events import (
    LimitsChanged,
    TierChanged,
    TierPaused,
    TierResumed,
    UsageReset,
    WorkerDraining,
    WorkerLost,
    WorkerResumed,
)
from scheduler.policy.ids import AccountId, JobId, Tier, WorkerId
from scheduler.policy.limits import Limits
from scheduler.policy.parameters import Parameters

PLAN = Limits(running=3, relax_running=2, accepted=10_000)
WIDE = Limits(running=10_000, relax_running=10_000, accepted=10_000)


@dataclass(frozen=True)
class Sent:
    """A job that comes at a time."""

    at_ms: int
    account: str
    cost_ms: int
    off_permille: int
    """What it takes, against its prediction."""
    fast: bool
    model: str
    gib: int


def sent(exact: bool) -> st.SearchStrategy[Sent]:
    return st.builds(
        Sent,
        at_ms=st.integers(0, 300_000),
        account=st.sampled_from("abcd"),
        cost_ms=st.integers(1, 60_000),
        off_permille=st.just(1000) if exact else st.integers(300, 2_000),
        fast=st.booleans() if not exact else st.just(False),
        model=st.just("m") if exact else st.sampled_from("mmmn"),
        gib=st.just(1) if exact else st.sampled_from([1, 1, 1, 12]),
    )


def played(
    parameters: Parameters,
    jobs: list[Sent],
    *,
    workers: int = 2,
    use: tuple[int, ...] = (0, 0, 0, 0),
    limits: Limits = WIDE,
) -> Cell:
    cell = Cell(parameters, workers=0)
    for number in range(workers):
        cell.join(a_worker(f"w{number}", gib=8 if number == 0 else 16))
    for name, used_ms, weight in zip("abcd", use, (1, 1, 0.5, 4), strict=True):
        cell.account(name, usage_ms=used_ms, weight=weight, limits=limits)
    for job in jobs:
        cell.at(
            job.at_ms,
            lambda job=job: cell.submit(
                job.account,
                job.cost_ms,
                actual_ms=max(1, job.cost_ms * job.off_permille // 1000),
                tier=Tier.FAST if job.fast else Tier.RELAX,
                model=job.model,
                gib=job.gib,
                step_ms=job.cost_ms // 20,
            ),
        )
    return cell


def journal_of(cell: Cell) -> Journal:
    recorder = Recorder()
    for entry in cell.journal:
        if isinstance(entry, Decided):
            recorder.decided(entry.decisions)
        else:
            recorder.note(entry)
    closing = {
        AccountId(name): {tier: cell.rows.share(name, tier) for tier in Tier}
        for name in cell.limits
        if (name, Tier.FAST) in cell.rows.finish_tag or (name, Tier.RELAX) in cell.rows.finish_tag
    }
    return recorder.journal(ended_ms=cell.now_ms, closing=closing)


def broken(journal: Journal, parameters: Parameters) -> list[str]:
    return [
        f"{one.bound}: {one.worst_margin} {one.worst}"
        for one in audit(journal, parameters)
        if one.verdict is Verdict.VIOLATED
    ]


uses = st.tuples(*[st.sampled_from([0, 0, 600_000, 100_000_000])] * 4)


@settings(max_examples=150)
@given(
    jobs=st.lists(sent(exact=True), max_size=60),
    use=uses,
    parameters=st.sampled_from([PLAIN, REMEMBERING]),
    workers=st.integers(1, 5),
)
def test_every_bound_holds_unwidened_where_its_assumptions_do(
    jobs: list[Sent], use: tuple[int, ...], parameters: Parameters, workers: int
) -> None:
    cell = played(parameters, jobs, workers=workers, use=use).run()
    journal = journal_of(cell)
    assert not broken(journal, parameters)
    assert not [one.widened for one in audit(journal, parameters) if one.widened]


@settings(max_examples=150)
@given(
    jobs=st.lists(sent(exact=False), max_size=80),
    use=uses,
    parameters=st.builds(
        Parameters,
        memory_span_ms=st.sampled_from([0, 600_000]),
        aging_ms=st.sampled_from([0, 30_000, 1_800_000]),
        affinity_ms=st.sampled_from([0, 60_000]),
    ),
    limits=st.sampled_from([PLAN, WIDE]),
    workers=st.integers(1, 6),
    troubles=st.lists(
        st.tuples(
            st.integers(0, 400_000),
            st.sampled_from(
                ["draw", "lose", "outgrow", "drain", "pause", "limits", "reset", "gone", "move", "cancel"]
            ),
            st.integers(0, 20),
        ),
        max_size=8,
    ),
)
def test_every_bound_holds_as_widened_under_faults_errors_and_preemption(
    jobs: list[Sent],
    use: tuple[int, ...],
    parameters: Parameters,
    limits: Limits,
    workers: int,
    troubles: list[tuple[int, str, int]],
) -> None:
    cell = played(parameters, jobs, workers=workers, use=use, limits=limits)
    for at_ms, what, number in troubles:
        cell.at(at_ms, lambda what=what, number=number: trouble(cell, what, number))
    cell.at(500_000, lambda: mend(cell, workers))
    cell.run()
    assert not broken(journal_of(cell), parameters)


def trouble(cell: Cell, what: str, number: int) -> None:
    """Have something go wrong that goes wrong in a life."""
    running = sorted(cell.running)
    waiting = sorted(cell.waiting)
    worker = WorkerId(f"w{number % 2}")
    match what:
        case "lose" if running:
            cell.lose(running[number % len(running)])
        case "draw":
            active = sorted(key for key, one in cell.running.items() if one.active_since_ms is not None)
            if active:
                cell.draw(active[number % len(active)], stored_in_ms=1 + 700 * number)
        case "outgrow":
            for attempt in [key for key, one in cell.running.items() if one.worker_id == "w0"]:
                cell.outgrow(attempt, 9)
        case "drain":
            cell.apply(WorkerDraining(at_ms=cell.now_ms, worker_id=worker))
        case "gone":
            cell.apply(WorkerLost(at_ms=cell.now_ms, worker_id=worker))
            for attempt in [key for key, one in cell.running.items() if one.worker_id == worker]:
                cell.lose(attempt)
        case "pause":
            cell.apply(TierPaused(at_ms=cell.now_ms, tier=Tier.RELAX if number % 2 else Tier.FAST))
        case "limits":
            name = "abcd"[number % 4]
            cell.limits[name], cell.weights[name] = (PLAN, WIDE)[number % 2], 1000 * (1 + number % 3)
            cell.apply(
                LimitsChanged(
                    at_ms=cell.now_ms,
                    account_id=AccountId(name),
                    limits=cell.limits[name],
                    weight_milli=cell.weights[name],
                )
            )
        case "reset":
            name = "abcd"[number % 4]
            cell.rows.usage[name] = 0.0
            cell.apply(UsageReset(at_ms=cell.now_ms, account_id=AccountId(name)))
        case "move" if waiting:
            job = cell.jobs[waiting[number % len(waiting)]]
            tier = Tier.FAST if job.tier is Tier.RELAX else Tier.RELAX
            cell.jobs[job.job_id] = replace(job, tier=tier)
            cell.apply(TierChanged(at_ms=cell.now_ms, job_id=JobId(job.job_id), tier=tier))
        case "cancel" if waiting:
            cell.cancel(waiting[number % len(waiting)])


def mend(cell: Cell, workers: int) -> None:
    """Open every gate again."""
    for number in range(min(2, workers)):
        busy = {one.worker_id for one in cell.running.values()}
        if f"w{number}" in busy:
            cell.apply(WorkerResumed(at_ms=cell.now_ms, worker_id=WorkerId(f"w{number}")))
        else:
            cell.join(a_worker(f"w{number}", gib=8 if number == 0 else 16))
    for tier in Tier:
        cell.apply(TierResumed(at_ms=cell.now_ms, tier=tier))


def test_a_job_that_outgrew_a_worker_is_not_owed_its_like() -> None:
    cell = Cell(PLAIN, workers=0)
    cell.join(a_worker("w0", gib=8))
    cell.join(a_worker("w1", gib=16))
    large = cell.submit("a", 10_000, gib=12)
    job = cell.submit("b", 10_000)
    cell.decide()
    assert (cell.worker_of(large), cell.worker_of(job)) == ("w1", "w0")
    cell.outgrow(cell.attempt(job), 9)
    cell.run()
    assert cell.started_ms(large) == 0
    assert [(one.at_ms, one.start.worker_id) for one in cell.served if one.job == job] == [
        (0, "w0"),
        (10_000, "w1"),
    ], "w0 was idle meanwhile"
    assert not broken(journal_of(cell), PLAIN)


def test_a_run_that_comes_from_a_gpu_too_small_for_who_waits_is_counted() -> None:
    cell = Cell(PLAIN, workers=0)
    for name, gib in (("w0", 8), ("w1", 16), ("w2", 16)):
        cell.join(a_worker(name, gib=gib))
    cell.submit("a", 50_000, step_ms=1000, name="comes")
    cell.decide()
    cell.submit("b", 60_000, tier=Tier.FAST, gib=12)
    cell.submit("c", 90_000, tier=Tier.FAST, gib=12)
    cell.at(10_000, lambda: cell.submit("d", 200_000, tier=Tier.FAST))
    cell.at(20_000, lambda: cell.submit("e", 50_000, gib=12, name="waits"))
    cell.run()
    ((migrated_ms, _),) = cell.migrations
    assert 20_000 < migrated_ms < cell.started_ms("waits") == 90_000
    journal = journal_of(cell)
    assert not broken(journal, PLAIN)
    (b2,) = [one for one in audit(journal, PLAIN) if one.bound is Bound.B2]
    assert b2.widened == ("preemption: a job for each run that came from GPUs that do not count (1 cases)",)


def test_the_bounds_are_met_with_cases_of_each() -> None:
    """The schedules above can break what they are asked about: in one long one, every bound is at stake."""
    jobs = [
        Sent(
            at_ms=7_919 * (number // 4) % 300_000,
            account="abcd"[number * 7 // 3 % 4],
            cost_ms=10_000,
            off_permille=1000,
            fast=number % 5 == 0,
            model="m",
            gib=1,
        )
        for number in range(400)
    ]
    cell = played(Parameters(aging_ms=120_000), jobs, workers=5, use=(0, 0, 600_000, 10**8)).run()
    journal = journal_of(cell)
    findings = audit(journal, cell.parameters)
    assert not broken(journal, cell.parameters)
    assert not [one.bound for one in findings if not one.cases and one.bound is not Bound.B5]


@given(
    jobs=st.lists(sent(exact=True), min_size=6, max_size=30),
    which=st.integers(0, 29),
    more=st.sampled_from([-1_000, 1_000]),
)
def test_a_wrong_number_in_one_charge_is_found(jobs: list[Sent], which: int, more: int) -> None:
    cell = played(PLAIN, jobs).run()
    journal = journal_of(cell)
    starts = [index for index, one in enumerate(journal.records) if isinstance(one, Dispatch)]
    index = starts[which % len(starts)]
    one = journal.records[index]
    assert isinstance(one, Dispatch)
    charge = replace(one.started.charge, finish_tag=one.started.charge.finish_tag + more)
    wrong = replace(one, started=replace(one.started, charge=charge))
    records = [*journal.records[:index], wrong, *journal.records[index + 1 :]]
    assert broken(replace(journal, records=records), PLAIN)
