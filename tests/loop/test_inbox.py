"""The inbox stays small however long nobody empties it, and forgets nothing that is not found otherwise."""

from __future__ import annotations

from scheduler.inbox import AccountsChanged, FleetChanged, Inbox, JobsChanged


def test_what_is_noticed_again_and_again_is_there_once() -> None:
    inbox = Inbox()
    for _ in range(1_000):
        inbox.put(JobsChanged(job_ids=("one", "two")))
        inbox.put(AccountsChanged(account_ids=("ada",)))
        inbox.put(FleetChanged())
    assert inbox.drain() == [
        JobsChanged(job_ids=("one", "two")),
        AccountsChanged(account_ids=("ada",)),
        FleetChanged(),
    ]
    assert inbox.drain() == []


def test_notices_of_jobs_are_bounded_and_those_of_accounts_all_kept() -> None:
    inbox = Inbox()
    for batch in range(100):
        inbox.put(JobsChanged(job_ids=tuple(f"{batch}-{number}" for number in range(1_000))))
        inbox.put(AccountsChanged(account_ids=(f"account-{batch}",)))
    jobs, accounts = inbox.drain()
    assert isinstance(jobs, JobsChanged)
    assert isinstance(accounts, AccountsChanged)
    assert len(jobs.job_ids) == 10_000
    assert len(accounts.account_ids) == 100
