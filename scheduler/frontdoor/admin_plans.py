"""What admins do with plans: versions are made, never changed, and what one would do can be seen before."""

from __future__ import annotations

from dataclasses import dataclass

from billing import plans
from billing.plans import EffectiveFrom, PlanFields
from billing.v1 import admin_pb2
from scheduler.frontdoor import ledger_messages as messages
from scheduler.frontdoor.deeds import Deed, Deeds
from scheduler.frontdoor.fields import Violations
from scheduler.link import SchedulerLink
from scheduler.metrics import AdminAction
from scheduler.store import accounts as store
from scheduler.store.pool import Pool

# Far beyond any use, and far within the bigints in which the ledger adds such numbers up.
_LARGEST = 2**53
_LARGEST_INT = 2**31 - 1
# Ten times, and 10,000 units of the currency for a minute. The ledger multiplies milliseconds, after the
# multipliers, by the price: for the longest job there may be, of ten minutes, that is 6e17, and a bigint ends
# at 9e18. Beyond it the scheduler could start no job at all: one hold it cannot write fails its whole batch.
_LARGEST_MULTIPLIER_BP = 100_000
_LARGEST_PRICE = 10_000_000_000
# A period's: multiplied by the microseconds of one, 3e12, it is divided in Python, which has no end.
_LARGEST_PERIOD_PRICE = 2**53
_MOST_GPU_CLASSES = 100
# A hundred years: what is kept longer is kept for ever, which is 0.
_LONGEST_RETENTION_DAYS = 36_500
_LONGEST_DEVICE = 120

_EFFECTIVE_FROM = {
    admin_pb2.EFFECTIVE_FROM_NEXT_PERIOD: EffectiveFrom.NEXT_PERIOD,
    admin_pb2.EFFECTIVE_FROM_NOW: EffectiveFrom.NOW,
}


@dataclass(frozen=True, kw_only=True)
class PlanDeeds:
    """The methods of AdminService about plans."""

    pool: Pool
    link: SchedulerLink
    deeds: Deeds

    async def create(self, request: admin_pb2.CreatePlanRequest) -> admin_pb2.Plan:
        """Make a plan, or with `validate_only` ask whether it could be made. Raises PlanExists."""
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        fields = _plan_fields(request.plan, violations)
        if request.plan.version or request.plan.etag:
            violations.add(
                "plan.version", "plan.version and plan.etag are not yours to choose: leave them out."
            )
        reason = violations.reason(request.reason)
        violations.refuse()

        async def created(deed: Deed) -> admin_pb2.Plan:
            made = await plans.create(
                deed.connection, fields, actor=deed.actor, reason=reason, request_id=request_id, at=deed.at
            )
            return messages.plan(made)

        return await self.deeds.do(
            AdminAction.CREATE_PLAN,
            request,
            request_id,
            admin_pb2.Plan,
            created,
            rehearse=request.validate_only,
        )

    async def get(self, request: admin_pb2.GetPlanRequest) -> admin_pb2.Plan:
        """Return the newest version of a plan, or the one that is named. Raises UnknownPlan."""
        violations = Violations()
        plan, version = violations.plan_version("name", request.name)
        violations.refuse()
        async with self.pool.reading() as connection:
            return messages.plan(await plans.get(connection, plan, version))

    async def list(self, request: admin_pb2.ListPlansRequest) -> admin_pb2.ListPlansResponse:
        """Return the newest version of every plan."""
        async with self.pool.reading() as connection:
            newest = await plans.all_newest(connection)
        return admin_pb2.ListPlansResponse(plans=[messages.plan(version) for version in newest])

    async def update(self, request: admin_pb2.UpdatePlanRequest) -> admin_pb2.Plan:
        """Make a new version of a plan, or with `validate_only` say whom that would touch.

        What would not be done is not rehearsed either. Raises UnknownPlan or EtagMismatch.
        """
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        fields = _plan_fields(request.plan, violations)
        if not request.plan.etag:
            violations.add("plan.etag", "plan.etag must be that of the version you read and mean to replace.")
        effective_from = _EFFECTIVE_FROM.get(request.effective_from)
        if effective_from is None:
            violations.add("effective_from", "effective_from must be next period or now.")
        reason = violations.reason(request.reason)
        violations.refuse()
        assert effective_from is not None, "whatever made it None is a violation"

        async def updated(deed: Deed) -> admin_pb2.Plan:
            # Before: what is granted and taken is told against how it is now.
            impact = messages.plan_impact(
                await plans.impact(deed.connection, fields, effective_from, deed.at),
                await store.over_limits(deed.connection, fields.plan, fields.limits),
            )
            version = await plans.update(
                deed.connection,
                fields,
                etag=request.plan.etag,
                effective_from=effective_from,
                actor=deed.actor,
                reason=reason,
                request_id=request_id,
                at=deed.at,
            )
            return messages.plan(version, impact)

        answer = await self.deeds.do(
            AdminAction.UPDATE_PLAN,
            request,
            request_id,
            admin_pb2.Plan,
            updated,
            rehearse=request.validate_only,
        )
        if not request.validate_only:
            async with self.pool.reading() as connection:
                known = await store.accounts_known_to_scheduler(connection)
            # Told also of a repeated request: the front door that did it may have died before it told.
            self.link.accounts_changed(known)
        return answer


def _plan_fields(plan: admin_pb2.Plan, violations: Violations) -> PlanFields:
    def within(field: str, value: int, least: int, most: int) -> int:
        if not least <= value <= most:
            violations.add(f"plan.{field}", f"plan.{field} must be {least} to {most}.")
        return value

    currency = plan.currency_code
    if not (len(currency) == 3 and currency.isascii() and currency.isalpha() and currency.isupper()):
        violations.add("plan.currency_code", "plan.currency_code must be three capital letters, as USD.")
    classes = dict(plan.gpu_class_bp)
    names_fit = all(0 < len(device) <= _LONGEST_DEVICE and "\0" not in device for device in classes)
    figures_fit = all(1 <= bp <= _LARGEST_MULTIPLIER_BP for bp in classes.values())
    if len(classes) > _MOST_GPU_CLASSES or not names_fit or not figures_fit:
        violations.add(
            "plan.gpu_class_bp",
            f"plan.gpu_class_bp must have at most {_MOST_GPU_CLASSES} device types, of 1 to "
            f"{_LONGEST_DEVICE} characters, with 1 to {_LARGEST_MULTIPLIER_BP} basis points each.",
        )
    return PlanFields(
        plan=violations.plan("plan.name", plan.name),
        quota_ms=within("quota_ms", plan.quota_ms, 0, _LARGEST),
        limits=plans.PlanLimits(
            running=within("limits.running", plan.limits.running, 1, _LARGEST_INT),
            relax_running=within("limits.relax_running", plan.limits.relax_running, 0, _LARGEST_INT),
            accepted=within("limits.accepted", plan.limits.accepted, 1, _LARGEST_INT),
        ),
        relax_weight_milli=within("relax_weight_milli", plan.relax_weight_milli, 1, 1_000_000),
        private_allowed=plan.private_allowed,
        private_multiplier_bp=within(
            "private_multiplier_bp", plan.private_multiplier_bp, 1, _LARGEST_MULTIPLIER_BP
        ),
        overage_micros_per_minute=within(
            "overage_micros_per_minute", plan.overage_micros_per_minute, 0, _LARGEST_PRICE
        ),
        currency=currency,
        price_micros=within("price_micros", plan.price_micros, 0, _LARGEST_PERIOD_PRICE),
        rollover_ms=within("rollover_ms", plan.rollover_ms, 0, _LARGEST),
        gpu_class_bp=classes,
        self_service=plan.self_service,
        picture_retention_days=within(
            "picture_retention_days", plan.picture_retention_days, 0, _LONGEST_RETENTION_DAYS
        ),
    )
