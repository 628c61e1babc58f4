"""The newest state of each job: bounded, and honest about what it no longer has."""

from __future__ import annotations

import pytest

from scheduler import updates
from scheduler.updates import JobUpdate, Updates


def a_change(job_id: str, seq: int = 1) -> JobUpdate:
    return JobUpdate(job_id=job_id, event_seq=seq, state="running")


async def test_who_asks_late_gets_the_newest_of_each_job_and_nothing_twice() -> None:
    made = Updates(epoch=1)
    for seq in (1, 2, 3):
        made.publish(a_change("fox", seq))
        made.publish(a_change("owl", seq))
    late = await made.after(0, 0)
    assert [(one.job_id, one.event_seq) for one in late.updates] == [("fox", 3), ("owl", 3)]
    assert not late.gap, "what was overtaken is not missed"
    assert (await made.after(late.newest, 0)).updates == ()


async def test_it_keeps_so_many_jobs_and_tells_whom_it_cannot_tell_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(updates, "_KEPT", 100)
    made = Updates(epoch=1)
    for number in range(1, 1_001):
        made.publish(a_change(str(number)))
    assert made.of("900") is None
    assert made.of("901") is not None
    for seen, gap, missed in ((0, True, 100), (899, True, 100), (900, False, 100), (950, False, 50)):
        batch = await made.after(seen, 0)
        assert (batch.gap, len(batch.updates)) == (gap, missed), f"who has seen {seen}"
