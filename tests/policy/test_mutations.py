"""Small wrong changes of the core, each of which a promise must notice.

Several are bugs that other systems shipped. Each mutant names its file, the text it replaces and the test
that must fail; the test runs against a fresh import of the core with that change, and a mutant whose text is
gone fails, so that the table follows the code. That the promises hold for the core as it is, their own runs
say.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

_CORE = "scheduler.policy"
_FOLDER = Path(importlib.import_module(_CORE).__path__[0])
_TESTS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One wrong change, and the promise that it breaks."""

    what: str
    file: str
    old: str
    new: str
    broken: str
    """The test that must fail, as module.function."""
    case: tuple[object, ...] = ()
    """Its arguments, if it has several cases."""


MUTANTS = [
    # -- the order of relax ----------------------------------------------------------------------------
    Mutant(
        what="a returning account is not lifted to V",
        file="fair_queue.py",
        old="return max(turn.finish_tag, self.virtual_time) + self.memory(account, now_ms)",
        new="return turn.finish_tag + self.memory(account, now_ms)",
        broken="test_board.test_who_was_idle_is_level_with_a_newcomer",
    ),
    Mutant(
        what="the minimum over active accounts is taken for V",
        file="fair_queue.py",
        old="self.virtual_time = max(self.virtual_time, charge.virtual_time)",
        new=(
            "self.virtual_time = min((one.relax.tag for one in self._accounts.values()"
            " if one.relax.tag is not None), default=charge.virtual_time)"
        ),
        broken="test_board.test_a_newcomer_is_level_with_who_is_served_not_with_who_is_stuck",
    ),
    Mutant(
        what="V goes back to what was served last",
        file="fair_queue.py",
        old="self.virtual_time = max(self.virtual_time, charge.virtual_time)",
        new="self.virtual_time = charge.start_tag",
        broken="test_board.test_an_old_account_starts_though_new_ones_never_end",
    ),
    Mutant(
        what="a tag is not renewed after a dispatch",
        file="fair_queue.py",
        old="        turn.tag = charge.next_tag\n",
        new="        turn.tag = None if charge.next_tag is None else charge.start_tag\n",
        broken="test_board.test_each_job_of_a_heavy_account_waits_behind_what_another_is_served",
    ),
    Mutant(
        what="use is not remembered",
        file="usage.py",
        old="return int(parameters.memory_span_ms * 1000 * min(",
        new="return 0 * int(min(",
        broken="test_board.test_each_job_of_a_heavy_account_waits_behind_what_another_is_served",
    ),
    Mutant(
        what="memory is charged as if it were service",
        file="usage.py",
        old="return min(tag, max(finish_tag, virtual_time))",
        new="return tag",
        broken="test_board.test_memory_delays_and_is_not_charged",
    ),
    Mutant(
        what="the next tag forgets the job just started",
        file="fair_queue.py",
        old="self.memory(account, now_ms, account.usage + added)",
        new="self.memory(account, now_ms)",
        broken="test_board.test_a_next_tag_remembers_the_job_just_started",
    ),
    Mutant(
        what="use is not weighed by the plan when it is remembered",
        file="fair_queue.py",
        old="usage.memory(used * 1000 / account.weight_milli, self._parameters)",
        new="usage.memory(used, self._parameters)",
        broken="test_board.test_a_heavier_plan_is_remembered_for_less",
    ),
    Mutant(
        what="use never decays",
        file="usage.py",
        old="return float(2.0 ** ((at_ms - decay_origin_ms) / half_life_ms))",
        new="return 1.0",
        broken="test_published_cases.test_use_halves_each_half_life_while_nothing_runs",
        case=(1, 5.0),
    ),
    Mutant(
        what="the weight of a plan is ignored",
        file="usage.py",
        old="return cost_ms * 1_000_000 // weight_milli",
        new="return cost_ms * 1000",
        broken="test_published_cases.test_five_times_the_weight_gets_five_times_the_starts",
    ),
    Mutant(
        what="jobs start in order of arrival",
        file="fair_queue.py",
        old="return tag, self.usage_per_weight(account), job.arrival, account.account_id",
        new="return 0, 0.0, job.arrival, account.account_id",
        broken="test_published_cases.test_the_second_place_goes_to_the_second_account",
    ),
    Mutant(
        what="level accounts start in order of their names",
        file="fair_queue.py",
        old="return tag, self.usage_per_weight(account), job.arrival, account.account_id",
        new="return tag, 0.0, 0, account.account_id",
        broken="test_board.test_level_fast_jobs_start_in_order_of_arrival",
    ),
    Mutant(
        what="fast is remembered for use",
        file="fair_queue.py",
        old="        if self.tier is Tier.FAST:\n            return 0\n",
        new="",
        broken="test_board.test_fast_is_fair_between_accounts_whatever_their_plans_weigh",
    ),
    Mutant(
        what="fast use does not count in relax",
        file="usage.py",
        old="factor = parameters.fast_usage_factor if tier is Tier.FAST else 1.0",
        new="factor = 0.0 if tier is Tier.FAST else 1.0",
        broken="test_board.test_fast_use_counts_in_relax",
    ),
    Mutant(
        what="a renewal does not forget use",
        file="board.py",
        old="            account.usage = 0.0\n",
        new="            pass\n",
        broken="test_board.test_a_renewal_forgets_use",
    ),
    # -- age -------------------------------------------------------------------------------------------
    Mutant(
        what="an aged start moves V",
        file="fair_queue.py",
        old="virtual_time = self.virtual_time if aged else max(self.virtual_time, start)",
        new="virtual_time = max(self.virtual_time, start)",
        broken="test_board.test_an_old_account_starts_though_new_ones_never_end",
    ),
    Mutant(
        what="every start goes by age where something is old",
        file="fair_queue.py",
        old="self.aged_wait_ms = (self._parameters.aged_one_in - 1) * charge.predicted_ms",
        new="self.aged_wait_ms = 0",
        broken="test_board.test_at_most_a_part_of_the_time_goes_by_age",
    ),
    Mutant(
        what="a plan that is not committed costs a turn of age",
        file="trial.py",
        old="queue.virtual_time, queue.aged_wait_ms = self._before[tier]",
        new="queue.virtual_time = self._before[tier][0]",
        broken="test_board.test_a_start_by_age_that_fails_to_commit_is_decided_again",
    ),
    Mutant(
        what="time at the cap counts as waiting at the head",
        file="fair_queue.py",
        old="        lane.head_job_id = None\n        if not lane.jobs:",
        new="        if not lane.jobs:",
        broken="test_board.test_time_at_the_head_begins_anew_after_a_cap",
    ),
    # -- charges and their ends ------------------------------------------------------------------------
    Mutant(
        what="a lost attempt stays charged, and is charged again",
        file="board.py",
        old="live = self._attempt_ended(event.attempt_id, 0)",
        new=(
            "live = self._attempt_ended(event.attempt_id, self._cell.attempts[event.attempt_id].predicted_ms)"
        ),
        broken="test_board.test_a_lost_job_waits_at_its_old_place_and_costs_nothing",
    ),
    Mutant(
        what="a correction is made at the decay of another time",
        file="usage.py",
        old="            charged_at_ms,\n            decay_origin_ms=decay_origin_ms,",
        new="            decay_origin_ms,\n            decay_origin_ms=decay_origin_ms,",
        broken="test_board.test_an_end_undoes_its_charge_whenever_it_comes",
    ),
    Mutant(
        what="a correction leaves the tag already set as it is",
        file="account.py",
        old="            turn.tag += change.tag_delta\n",
        new="            pass\n",
        broken="test_board.test_a_job_that_was_shorter_than_predicted_gives_the_rest_back",
    ),
    Mutant(
        what="a migration is charged like a start",
        file="board.py",
        old="        self._run(live, moved)\n",
        new=(
            "        self._run(live, moved)\n"
            "        self._cell.accounts[attempt.job.account_id].relax.finish_tag += 500_000_000\n"
        ),
        broken="test_preemption.test_a_migration_takes_over_the_charge",
    ),
    # -- gates -----------------------------------------------------------------------------------------
    Mutant(
        what="caps are off by one",
        file="limits.py",
        old="free = self.running - running",
        new="free = self.running - running + 1",
        broken="test_board.test_fast_jobs_fill_the_cap_of_relax_too",
    ),
    Mutant(
        what="parked runs are not counted to the caps",
        file="board.py",
        old="        self._lose_gpu(attempt)\n        attempt.is_parked(",
        new=(
            "        self._cell.accounts[attempt.job.account_id].count(Tier.RELAX, -1)\n"
            "        self._lose_gpu(attempt)\n        attempt.is_parked("
        ),
        broken="test_preemption.test_a_parked_run_counts_toward_the_caps_of_its_account",
    ),
    Mutant(
        what="a start refused for want of funds is decided again",
        file="board.py",
        old="                self._leave(live)\n                live.state = State.HELD\n",
        new="                return\n",
        broken="test_preemption.test_a_refused_fast_start_parks_nobody_and_is_not_repeated",
    ),
    Mutant(
        what="a job whose row has moved stays in its tier",
        file="board.py",
        old="self._move(live, Tier.RELAX if live.job.tier is Tier.FAST else Tier.FAST)",
        new="pass",
        broken="test_preemption.test_a_start_refused_because_its_job_has_moved_moves_it",
    ),
    Mutant(
        what="a job is tried for ever",
        file="retry.py",
        old="if losses < parameters.max_losses:",
        new="if losses < 99:",
        broken="test_board.test_the_third_loss_is_the_last",
    ),
    Mutant(
        what="a job is tried again where its memory was too little",
        file="board.py",
        old="        live.job = live.job.needing(event.memory_bytes)\n",
        new="",
        broken="test_board.test_a_job_that_ran_out_of_memory_is_tried_on_a_larger_worker_only",
    ),
    # -- placement -------------------------------------------------------------------------------------
    Mutant(
        what="affinity knows no theta",
        file="order.py",
        old="if first is None or first[0][0] > self._last_warm_tag(instead_of):",
        new="if first is None:",
        broken="test_board.test_a_model_at_hand_lets_no_job_pass_beyond_theta",
    ),
    Mutant(
        what="a faster worker goes before a warm one",
        file="placement.py",
        old="rank = (not warm, False, slowness, entry[-1])",
        new="rank = (slowness, False, not warm, entry[-1])",
        broken="test_board.test_a_warm_worker_is_better_than_a_fast_one_and_a_fast_one_than_a_low_id",
    ),
    # -- preemption ------------------------------------------------------------------------------------
    Mutant(
        what="fast parks beyond the floor",
        file="planning.py",
        old="if placement is None and not at_floor:",
        new="if placement is None:",
        broken="test_preemption.test_fast_parks_nobody_for_more_than_its_part",
    ),
    Mutant(
        what="there is no floor",
        file="preemption.py",
        old="return max(1, -(-gpus * parameters.relax_floor_permille // 1000))",
        new="return 0",
        broken="test_preemption.test_fast_leaves_relax_its_floor_while_relax_is_parked",
    ),
    Mutant(
        what="the floor binds though relax has nothing to do",
        file="planning.py",
        old="if at_floor and (parked or relax_waits or not self._fleet.idle):",
        new="if at_floor:",
        broken="test_preemption.test_fast_uses_what_relax_has_no_work_for",
    ),
    Mutant(
        what="a run that had its turn before fast is parked",
        file="board.py",
        old="if not fast and not attempt.sheltered:",
        new="if not fast:",
        broken="test_preemption.test_a_run_that_had_its_turn_is_not_parked",
    ),
    Mutant(
        what="relax has no turn before fast on small fleets",
        file="planning.py",
        old="due = self._since_relax_turn >= self._parameters.relax_first_one_in - 1",
        new="due = False",
        broken="test_preemption.test_below_four_gpus_relax_that_waited_long_takes_one_start_in_ten",
    ),
    Mutant(
        what="relax has no turn where the floor cannot run what waits",
        file="planning.py",
        old="if not (floor and self._fleet.relax_has(fit)) and",
        new="if not floor and",
        broken="test_preemption.test_relax_that_the_floor_cannot_run_takes_its_turn",
    ),
    Mutant(
        what="a parked run has no turn where there is a floor",
        file="planning.py",
        old="if floor and kept is not None and self._fleet.relax_has(attempt.job.fit, kept.device):",
        new="if floor:",
        broken="test_preemption.test_a_parked_run_that_nothing_else_can_go_on_with_takes_its_turn",
    ),
    Mutant(
        what="a parked run goes on only after new relax jobs",
        file="planning.py",
        old=(
            "                decisions.extend(self._resumes())\n"
            "                decisions.extend(self._migrations())\n"
            "                decisions.extend(self._relax_starts())\n"
        ),
        new=(
            "                decisions.extend(self._relax_starts())\n"
            "                decisions.extend(self._migrations())\n"
            "                decisions.extend(self._resumes())\n"
        ),
        broken="test_preemption.test_a_migrated_run_is_first_to_get_a_gpu_open_to_relax",
    ),
    Mutant(
        what="a new relax job takes the GPU on which a run is parked",
        file="placement.py",
        old="            if held_too:\n",
        new="            if True:\n",
        broken="test_preemption.test_relax_that_takes_its_turn_leaves_a_parked_run_its_gpu",
    ),
    Mutant(
        what="a run is parked though a GPU is idle",
        file="planning.py",
        old="placement = self._fleet.place(head.job.fit, held_too=True) if self._fleet.idle else None",
        new="placement = None",
        broken="test_preemption.test_a_fast_job_takes_an_idle_gpu_before_it_parks_a_run_on_a_warm_one",
    ),
    Mutant(
        what="the job of a parked run parks another, as fast ones do",
        file="planning.py",
        old=(
            "            placement = self._fleet.place(head.job.fit)\n"
            "            if placement is None:\n                del lines["
        ),
        new=(
            "            placement = self._fleet.place(head.job.fit)\n"
            "            if placement is None and self._cell.parked:\n"
            "                placement = self._fleet.place_by_parking(head.job.fit, self._now_ms)\n"
            "            if placement is None:\n                del lines["
        ),
        broken="test_preemption.test_relax_that_waits_beside_a_parked_run_parks_nobody",
    ),
    Mutant(
        what="the account with the smallest tag is parked",
        file="preemption.py",
        old="            -account_tag,\n",
        new="            account_tag,\n",
        broken="test_preemption.test_the_run_of_the_account_with_the_largest_tag_is_parked",
    ),
    Mutant(
        what="the oldest run is parked",
        file="preemption.py",
        old="            -attempt.started_ms,\n",
        new="            attempt.started_ms,\n",
        broken="test_preemption.test_of_one_accounts_runs_the_one_that_began_last_is_parked",
    ),
    Mutant(
        what="parks are not counted",
        file="attempt.py",
        old="        self.parks += 1\n",
        new="",
        broken="test_preemption.test_a_run_parked_three_times_is_spared_while_another_can_be_parked",
    ),
    Mutant(
        what="a run about to end is parked like any other",
        file="preemption.py",
        old="worth_until_ms=attempt.ends_ms - steps_ms",
        new="worth_until_ms=attempt.ends_ms + 10**12",
        broken="test_preemption.test_a_run_with_fewer_than_two_steps_left_beyond_the_park_is_spared",
    ),
    Mutant(
        what="steps are taken for as long on slow workers",
        file="preemption.py",
        old="attempt.job.step_ms * 1000 // speed_permille",
        new="attempt.job.step_ms",
        broken="test_preemption.test_steps_are_as_long_as_the_worker_is_slow",
    ),
    # -- migration and checkpoints ---------------------------------------------------------------------
    Mutant(
        what="runs migrate at once",
        file="planning.py",
        old="if not self._fleet.open or parked_ms < self._parameters.park_patience_ms:",
        new="if not self._fleet.open:",
        broken="test_preemption.test_before_patience_is_over_a_new_relax_job_gets_the_open_gpu",
    ),
    Mutant(
        what="a run migrates to another type of device",
        file="placement.py",
        old="if kind.device == device and kind.can_run(fit):",
        new="if kind.can_run(fit):",
        broken="test_preemption.test_a_run_migrates_only_to_its_own_device_type",
    ),
    Mutant(
        what="a refused migration is decided again",
        file="board.py",
        old="self._cell.attempts[event.attempt_id].checkpoint = None",
        new="pass",
        broken="test_preemption.test_a_migration_is_asked_for_once",
    ),
    Mutant(
        what="a checkpoint is used on another type of device",
        file="planning.py",
        old="if checkpoint is not None and checkpoint.device != self._fleet.device(worker_id):",
        new="if checkpoint is None:",
        broken="test_preemption.test_a_lost_job_goes_on_from_its_checkpoint_only_on_its_own_device_type",
    ),
    Mutant(
        what="the checkpoint is lost with the attempt",
        file="board.py",
        old="            self._cell.jobs[attempt.job.job_id].checkpoint = event.checkpoint\n",
        new="",
        broken="test_preemption.test_a_lost_job_goes_on_from_its_checkpoint",
    ),
    # -- drawn runs ------------------------------------------------------------------------------------
    Mutant(
        what="a drawn run keeps its worker from the next",
        file="board.py",
        old="        self._lose_gpu(attempt)\n        attempt.drawn, attempt.ends_ms = True, event.at_ms\n",
        new="        attempt.drawn, attempt.ends_ms = True, event.at_ms\n",
        broken="test_policy_drawn_runs.test_the_next_job_starts_once_the_run_before_it_is_drawn",
    ),
    Mutant(
        what="a drawn run that ends takes the next off its worker",
        file="board.py",
        old="        attempt.drawn, attempt.ends_ms = True, event.at_ms\n",
        new="        attempt.ends_ms = event.at_ms\n",
        broken="test_policy_drawn_runs.test_the_end_of_a_drawn_run_leaves_the_next_its_gpu",
    ),
    Mutant(
        what="a drawn run counts for its account no more",
        file="board.py",
        old="        attempt.drawn, attempt.ends_ms = True, event.at_ms\n",
        new=(
            "        attempt.drawn, attempt.ends_ms = True, event.at_ms\n"
            "        self._cell.accounts[attempt.job.account_id].count(attempt.job.tier, -1)\n"
            "        self._reconcile(self._cell.accounts[attempt.job.account_id])\n"
        ),
        broken="test_policy_drawn_runs.test_a_drawn_run_counts_for_its_account_until_it_ends",
    ),
    Mutant(
        what="who takes over believes that a drawn run has the gpu",
        file="facts.py",
        old="        drawn=attempt.drawn,\n",
        new="",
        broken="test_policy_drawn_runs.test_a_copy_of_the_board_knows_what_is_drawn",
    ),
    # -- orders that are not read to their ends -------------------------------------------------------
    Mutant(
        what="whoever was read starts before those who are yet to be",
        file="order.py",
        old="if first is None or not self._queue.is_known(first[0]):",
        new="if first is None:",
        broken="test_recovery_order.test_who_is_read_out_of_turn_waits_for_those_before",
    ),
    Mutant(
        what="a model is loaded though one who has it warm is yet to be read",
        file="planning.py",
        old="if not order.is_warm_choice_known(warm, first):",
        new="if False:",
        broken="test_recovery_order.test_a_model_is_not_loaded_while_one_who_has_it_warm_may_yet_be_read",
    ),
    Mutant(
        what="relax takes what fast that is yet to be read would have",
        file="planning.py",
        old="        self._ends = self._cell.queues[Tier.FAST].edge is not None\n",
        new="",
        broken="test_recovery_order.test_relax_waits_until_it_is_known_who_waits_in_fast",
    ),
    # -- workers ---------------------------------------------------------------------------------------
    Mutant(
        what="a draining worker takes jobs",
        file="board.py",
        old="self._cell.fleet.drain(event.worker_id, True)",
        new="pass",
        broken="test_preemption.test_a_draining_worker_has_nothing_parked_on_it",
    ),
    # -- how many GPUs there are -----------------------------------------------------------------------
    Mutant(
        what="a fleet shrinks at once",
        file="fleet_size.py",
        old="while self._peaks[0][0] < now_ms - self._shrinks_after_ms:",
        new="while len(self._peaks) > 1:",
        broken="test_fleet_size.test_a_fleet_grows_at_once_and_shrinks_when_fewer_have_been_enough_for_a_while",
    ),
    Mutant(
        what="a new scheduler forgets the fleet that it finds",
        file="fleet_size.py",
        old="deque([(now_ms, gpus)])",
        new="deque([(now_ms, 0)])",
        broken="test_fleet_size.test_a_new_scheduler_keeps_the_fleet_that_it_finds_for_a_while",
    ),
    Mutant(
        what="a machine is given up of which a GPU is needed",
        file="fleet_size.py",
        old="if left - machine.gpus >= gpus:",
        new="if left > gpus:",
        broken="test_fleet_size.test_a_machine_of_which_one_gpu_is_needed_stays_as_a_whole",
    ),
    Mutant(
        what="what is at work goes before what is idle",
        file="fleet_size.py",
        old="return machine.runs, machine.workers,",
        new="return -machine.runs, machine.workers,",
        broken=(
            "test_fleet_size.test_one_without_workers_goes_before_one_that_is_idle_and_that_before_one_at_work"
        ),
    ),
    Mutant(
        what="what would have to be started stays in place of what is there",
        file="fleet_size.py",
        old="return machine.runs, machine.workers,",
        new="return machine.runs, -machine.workers,",
        broken=(
            "test_fleet_size.test_one_without_workers_goes_before_one_that_is_idle_and_that_before_one_at_work"
        ),
    ),
]


class _MutatingFinder(importlib.abc.MetaPathFinder):
    """Loads one module of the core with another source."""

    def __init__(self, name: str, source: str) -> None:
        self._name = name
        self._source = source

    def find_spec(
        self, fullname: str, path: object, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_loader(fullname, _SourceLoader(self._source))


class _SourceLoader(importlib.abc.Loader):
    def __init__(self, source: str) -> None:
        self._source = source

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, f"<mutant of {module.__name__}>", "exec"), module.__dict__)


@contextmanager
def _mutated(mutant: Mutant) -> Iterator[None]:
    """Have imports within find the mutated core, and put back what was imported before."""
    source = (_FOLDER / mutant.file).read_text()
    assert source.count(mutant.old) == 1, f"the text that the mutant replaces is gone from {mutant.file}"
    finder = _MutatingFinder(f"{_CORE}.{mutant.file[:-3]}", source.replace(mutant.old, mutant.new))
    ours = {path.stem for path in _TESTS.glob("*.py")}
    former = {
        name: module
        for name, module in sys.modules.items()
        if name == _CORE or name.startswith(f"{_CORE}.") or name in ours
    }
    package = sys.modules["scheduler"]
    for name in former:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.startswith(f"{_CORE}.") or name in ours]:
            del sys.modules[name]
        sys.modules.update(former)
        package.policy = former[_CORE]  # type: ignore[attr-defined]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what.replace(" ", "_"))
def test_a_wrong_change_of_the_core_breaks_a_promise(mutant: Mutant) -> None:
    with _mutated(mutant):
        module, function = mutant.broken.split(".")
        promise = getattr(importlib.import_module(module), function)
        try:
            promise(*mutant.case)
        except (AssertionError, LookupError, StopIteration, ValueError):
            return
    pytest.fail(f"{mutant.broken} holds though {mutant.what}")
