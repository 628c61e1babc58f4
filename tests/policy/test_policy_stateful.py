"""A cell that lives through anything, in any order: a state machine, whose failures shrink to few events.

Beside the lists of `test_policy_chaos` it looks for the shortest way to trouble, and lets events come between
which nothing is decided, as they do in a scheduler that is behind.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from policy_chaos import (
    LIMITS,
    Chaos,
    Step,
    account_names,
    crowds,
    models,
    numbers,
    parameters,
    passes,
    seeds,
    submits,
    tiers,
    worker_ids,
)

from scheduler.policy.events import RefusedBecause
from scheduler.policy.ids import Tier
from scheduler.policy.parameters import Parameters

pytestmark = pytest.mark.timeout(900)


class AnyHistory(RuleBasedStateMachine):
    """Facts come in any order; decisions are made now and then."""

    cell: Chaos

    @initialize(parameters=parameters)
    def begin(self, parameters: Parameters) -> None:
        self.cell = Chaos(parameters)
        self.decided = False

    def tell(self, *step: object) -> None:
        self.cell.take(*step)
        self.decided = False

    @rule()
    def decide(self) -> None:
        self.cell.cycle()
        self.decided = True

    @rule(step=passes)
    def time_passes(self, step: Step) -> None:
        self.decide()
        self.cell.take(*step)
        self.decide()

    @rule(step=submits)
    def a_job_comes(self, step: Step) -> None:
        self.tell(*step)

    @rule(step=crowds)
    def many_jobs_come(self, step: Step) -> None:
        self.tell(*step)

    @rule(model=models)
    def fast_jobs_come_to_a_fleet_full_of_relax(self, model: str) -> None:
        self.tell("crowd", Tier.RELAX, model)
        self.decide()
        self.tell("crowd", Tier.FAST, model)

    @rule(number=numbers, answers=st.booleans())
    def a_job_is_cancelled(self, number: int, answers: bool) -> None:
        self.decide()
        self.tell("cancel", number, answers)

    @rule(number=numbers)
    def a_job_changes_its_tier(self, number: int) -> None:
        self.tell("change_tier", number)

    @precondition(lambda self: self.cell.running)
    @rule(number=numbers)
    def an_attempt_is_lost(self, number: int) -> None:
        self.tell("lose", number)

    @precondition(lambda self: self.cell.running)
    @rule(number=numbers)
    def a_checkpoint_is_stored(self, number: int) -> None:
        self.tell("checkpoint", number)

    @rule(stores=st.booleans())
    def parks_store_checkpoints(self, stores: bool) -> None:
        self.tell("store_checkpoints", stores)

    @rule(worker=worker_ids)
    def a_worker_is_lost(self, worker: str) -> None:
        self.tell("lose_worker", worker)

    @rule(worker=worker_ids)
    def a_worker_joins(self, worker: str) -> None:
        self.tell("join", worker)

    @rule(worker=worker_ids)
    def a_worker_drains_or_no_more(self, worker: str) -> None:
        self.tell("drain", worker)

    @rule(worker=worker_ids, model=models, what=st.sampled_from(["load", "evict"]))
    def a_model_comes_or_goes(self, worker: str, model: str, what: str) -> None:
        self.tell(what, worker, model)

    @rule(tier=tiers)
    def a_tier_is_paused_or_no_more(self, tier: Tier) -> None:
        self.tell("pause", tier)

    @rule(account=account_names, limits=st.sampled_from(LIMITS), weight=st.sampled_from([0.5, 1, 3]))
    def a_plan_changes(self, account: str, limits: object, weight: float) -> None:
        self.tell("limits", account, limits, weight)

    @rule(account=account_names)
    def a_subscription_renews(self, account: str) -> None:
        self.tell("reset", account)
        self.tell("funds", account)

    @rule(because=st.sampled_from(RefusedBecause))
    def a_start_will_be_refused(self, because: RefusedBecause) -> None:
        self.tell("refuse", because)

    @rule()
    def a_migration_will_be_refused(self) -> None:
        self.tell("refuse_migration", 1)

    @rule(seed=seeds)
    def the_scheduler_is_restarted(self, seed: int) -> None:
        self.cell.restart(Random(seed))
        self.decided = False

    @rule()
    def a_copy_takes_over(self) -> None:
        self.tell("copy", 1)

    @invariant()
    def what_holds_at_any_instant(self) -> None:
        if hasattr(self, "cell"):
            self.cell.check()
            if self.decided:
                self.cell.look()

    def teardown(self) -> None:
        if hasattr(self, "cell"):
            self.cell.settle()
            self.cell.check_rows()


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(
    settings.default, max_examples=max(20, settings.default.max_examples // 2), stateful_step_count=60
)
