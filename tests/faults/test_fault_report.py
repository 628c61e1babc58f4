"""What a report says follows from what was seen, and hides none of it."""

from __future__ import annotations

from collections import Counter

import grpc
import pytest

from scheduler.store import invariants
from scheduler.v1 import job_pb2, job_pb2_grpc
from tests.faults.checks import FAIRNESS, Of, Wrong
from tests.faults.counters import REQUIRED
from tests.faults.crowd import Crowd, Habit, Member
from tests.faults.plan import Kind
from tests.faults.run import Report, heard, longest_s
from tests.faults.soak import never, table


def test_a_standstill_is_cut_by_nothing_but_the_mend_of_what_may_have_caused_it() -> None:
    standstills = [(10.0, 14.0), (20.0, 50.0)]
    assert longest_s(standstills) == 30.0
    assert longest_s(standstills, [5.0, 15.0, 60.0]) == 30.0, "nothing was mended in it"
    assert longest_s(standstills, [22.0, 30.0]) == 20.0, "from the last mend on"
    assert longest_s([]) == 0.0


def an_answer(
    violations: int, *, number: int = 14, sentence: str = "It holds."
) -> invariants.InvariantResult:
    return invariants.InvariantResult(
        number=number, sentence=sentence, violations=violations, first=(), took_ms=0
    )


def test_an_invariant_that_was_not_asked_is_not_answered() -> None:
    unanswered = {"It holds.": 14, "So does this.": 15}
    assert heard([an_answer(invariants.NOT_ASKED)], unanswered) == []
    assert unanswered == {"It holds.": 14, "So does this.": 15}
    assert heard([an_answer(0)], unanswered) == []
    assert unanswered == {"So does this.": 15}


def test_what_was_done_twice_is_counted_whoever_found_it() -> None:
    (broken,) = heard([an_answer(2, number=16)], {})
    (other,) = heard([an_answer(2, number=3)], {})
    told_again = Wrong(sentence="job 1: event 2 was told again", of=Of.DOUBLED)
    assert Report(seed=1, findings=(broken, other, told_again)).doubled == 2


def test_what_has_to_be_hit_may_be_hit_in_any_of_the_seeds() -> None:
    half = len(Kind) // 2
    first = Report(seed=1, findings=(), faults=Counter(list(Kind)[:half]), counters=Counter(REQUIRED))
    second = Report(seed=2, findings=(), faults=Counter(list(Kind)[half:]), cases=Counter(FAIRNESS))
    assert never([first, second]) == []
    assert never([second]) == [*list(Kind)[:half], *REQUIRED]
    assert never([first]) == [*list(Kind)[half:], *FAIRNESS]
    assert "never: " in table([second])


class BreaksOff(job_pb2_grpc.JobServiceServicer):
    """Answers with CANCELLED once, and then as it should."""

    def __init__(self) -> None:
        self.asked = 0

    async def CreateJob(  # noqa: N802 - the service's name
        self, request: job_pb2.CreateJobRequest, context: grpc.aio.ServicerContext
    ) -> job_pb2.Job:
        self.asked += 1
        if self.asked == 1:
            await context.abort(grpc.StatusCode.CANCELLED, "no more")
        return job_pb2.Job(uid="1")


@pytest.mark.parametrize("wires_fail", [False, True])
async def test_a_call_may_be_broken_off_only_while_something_breaks_wires(wires_fail: bool) -> None:
    server = grpc.aio.server()
    job_pb2_grpc.add_JobServiceServicer_to_server(BreaksOff(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    crowd = Crowd([address], "", seed=1, wires_fail=lambda: wires_fail)
    member = Member(crowd, Habit(name="ada"), "ada", "", [address], seed=1)
    assert await member.create(0, job_pb2.TIER_FAST) == "1"
    assert bool(crowd.broken) != wires_fail
    await member.close()
    await server.stop(None)
