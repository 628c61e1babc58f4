"""ModerationService: the rules, hidden jobs and blocked accounts. Every change leaves an audit event.

A repeated UpdateRules, BlockAccount or UnblockAccount returns its first answer; a repeated HideJob or
UnhideJob the job as it is now, since an answer that is kept would hold its prompt.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any, TypeAlias

import grpc

from billing.refusals import AccountErased, EtagMismatch, UnknownAccount
from gpu_worker.prompt import without_urls
from scheduler import intake
from scheduler.frontdoor import messages
from scheduler.frontdoor.auth import Doorman
from scheduler.frontdoor.deeds import Deed, Deeds
from scheduler.frontdoor.fields import JobName, Violations, page_token
from scheduler.frontdoor.gate import caller
from scheduler.frontdoor.ledger_messages import account_name
from scheduler.frontdoor.messages import timestamp
from scheduler.frontdoor.moderation import Moderation
from scheduler.frontdoor.moderation_matcher import Matcher, says_too_little, words_of
from scheduler.frontdoor.standings import Standings
from scheduler.link import SchedulerLink
from scheduler.metrics import AdminAction
from scheduler.refusals import AccountProtected, NotFoundOrNotYours
from scheduler.store import jobs
from scheduler.store import moderation as store
from scheduler.store.accounts import Role
from scheduler.store.jobs import StoredJob
from scheduler.store.moderation import Hidden, PromptOfJob, Rule, RuleSet, Standing
from scheduler.store.pool import Connection, Pool
from scheduler.v1 import job_pb2, moderation_pb2, moderation_pb2_grpc

ACTION_OF = {
    "/scheduler.v1.ModerationService/UpdateRules": AdminAction.UPDATE_RULES,
    "/scheduler.v1.ModerationService/HideJob": AdminAction.HIDE_JOB,
    "/scheduler.v1.ModerationService/UnhideJob": AdminAction.UNHIDE_JOB,
    "/scheduler.v1.ModerationService/BlockAccount": AdminAction.BLOCK_ACCOUNT,
    "/scheduler.v1.ModerationService/UnblockAccount": AdminAction.UNBLOCK_ACCOUNT,
}

_Context = grpc.aio.ServicerContext[Any, Any]
_OfJob: TypeAlias = moderation_pb2.HideJobRequest | moderation_pb2.UnhideJobRequest

_RULES = "moderation/rules"
"""What the audit events of UpdateRules are about."""
_MOST_RULES = 10_000
_MOST_CHANGES = 1_000
_LONGEST_PATTERN = 200
_TRIED_ON = 1_000
_EXAMPLES = 20
_CANCELLED_BY_BLOCK = "Cancelled before it started: its account was blocked."


@dataclass(frozen=True, kw_only=True)
class ModerationService(moderation_pb2_grpc.ModerationServiceServicer):
    """The methods of scheduler.v1.ModerationService."""

    pool: Pool
    link: SchedulerLink
    deeds: Deeds
    doorman: Doorman
    moderation: Moderation
    standings: Standings

    async def ListRules(  # noqa: N802
        self, request: moderation_pb2.ListRulesRequest, context: _Context
    ) -> moderation_pb2.ListRulesResponse:
        """Return a page of rules in the order of their patterns."""
        violations = Violations()
        limit = violations.ledger_page_size(request.page_size)
        if request.category:
            _refuse_bad_category("category", request.category, violations)
        binding = ("rules", request.category)
        after = violations.page_token(request.page_token, binding, lambda token: str(token["pattern"]))
        violations.refuse()
        async with self.pool.reading() as connection:
            rule_set = await store.rule_set(connection)
        listed = [
            rule
            for rule in rule_set.rules
            if request.category in ("", rule.category) and (after is None or rule.pattern > after)
        ]
        page = listed[:limit]
        return moderation_pb2.ListRulesResponse(
            rules=[_rule(rule) for rule in page],
            next_page_token=page_token({"pattern": page[-1].pattern}, binding) if len(listed) > limit else "",
            etag=rule_set.etag,
        )

    async def UpdateRules(  # noqa: N802
        self, request: moderation_pb2.UpdateRulesRequest, context: _Context
    ) -> moderation_pb2.RulesUpdate:
        """Remove rules and add others, or say what that would do."""
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        reason = violations.reason(request.reason)
        etag = violations.etag_of_preview(request.etag)
        added = _rules_asked_for(request, violations)
        if not request_id:
            violations.refuse()

        async def changed(deed: Deed) -> moderation_pb2.RulesUpdate:
            before = await store.lock_rules(deed.connection)
            if etag not in ("", before.etag):
                raise EtagMismatch(given=etag, current=before.etag)
            removed = _held_against(before, request.remove, added, violations)
            # Only now, so that what is wrong with the request and with the rules there are is told at once.
            violations.refuse()
            rules = list(added.values())
            after = await store.change_rules(
                deed.connection, remove=[rule.pattern for rule in removed], add=rules, at=deed.at
            )
            await deed.record(
                target=_RULES,
                reason=reason,
                before={"etag": before.etag, "removed": _document(removed)},
                after={"etag": after, "added": _document(rules)},
            )
            return moderation_pb2.RulesUpdate(
                etag=before.etag if request.validate_only else after,
                added=[_rule(replace(rule, created_at=deed.at)) for rule in rules],
                removed=[rule.pattern for rule in removed],
            )

        answer = await self.deeds.do(
            AdminAction.UPDATE_RULES,
            request,
            request_id,
            moderation_pb2.RulesUpdate,
            changed,
            rehearse=request.validate_only,
        )
        if not request.validate_only:
            self.moderation.forget()
            return answer
        async with self.pool.reading() as connection:
            newest = await store.newest_prompts(connection, _TRIED_ON)
        # A thousand prompts take a moment, which others' calls need not wait for.
        answer.trial.CopyFrom(await asyncio.to_thread(_trial, list(added.values()), newest))
        return answer

    async def HideJob(  # noqa: N802
        self, request: moderation_pb2.HideJobRequest, context: _Context
    ) -> job_pb2.Job:
        """Keep a job out of the feed."""
        violations = Violations()
        _refuse_bad_category("category", request.category, violations)

        async def hide(connection: Connection, job_id: str, at: datetime) -> None:
            await store.hide(connection, job_id, request.category, at)

        return await self._change_job(AdminAction.HIDE_JOB, request, hide, violations)

    async def UnhideJob(  # noqa: N802
        self, request: moderation_pb2.UnhideJobRequest, context: _Context
    ) -> job_pb2.Job:
        """Let the feed show a job again."""

        async def unhide(connection: Connection, job_id: str, _: datetime) -> None:
            await store.unhide(connection, job_id)

        return await self._change_job(AdminAction.UNHIDE_JOB, request, unhide, Violations())

    async def BlockAccount(  # noqa: N802
        self, request: moderation_pb2.BlockAccountRequest, context: _Context
    ) -> moderation_pb2.AccountBlock:
        """Let nobody in with any key of an account, and cancel its jobs; or say which jobs that would be."""
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        account_id = violations.named_account("name", request.name)
        if account_id == caller().account_id:
            violations.add(
                "name", "name is the account of the key you call with; somebody else has to block it."
            )
        reason = violations.reason(request.reason)
        violations.refuse()
        cancelled: list[str] = []

        async def blocked(deed: Deed) -> moderation_pb2.AccountBlock:
            # Before the account's row, as everybody locks what it has first. Whoever submits meanwhile waits,
            # and is refused.
            cancelled.extend(
                await intake.withdraw_all(deed.connection, account_id, deed.at, _CANCELLED_BY_BLOCK)
            )
            before = await _locked_standing(deed.connection, account_id)
            _refuse_protected(account_id, before)
            live = await jobs.live_jobs(deed.connection, account_id)
            ended = {
                "cancelled_jobs": [job_id for job_id in cancelled if job_id not in live],
                "stopped_jobs": live,
            }
            await self._set_blocked(deed, account_id, reason, before, blocked=True, ended=ended)
            return moderation_pb2.AccountBlock(
                account=account_name(account_id),
                blocked=True,
                waiting_jobs=len(cancelled) - len(live),
                running_jobs=len(live),
            )

        answer = await self.deeds.do(
            AdminAction.BLOCK_ACCOUNT,
            request,
            request_id,
            moderation_pb2.AccountBlock,
            blocked,
            rehearse=request.validate_only,
        )
        if not request.validate_only:
            self.doorman.forget(account_id)
            self.link.jobs_changed(cancelled)
        return answer

    async def UnblockAccount(  # noqa: N802
        self, request: moderation_pb2.UnblockAccountRequest, context: _Context
    ) -> moderation_pb2.AccountBlock:
        """Let an account in again."""
        violations = Violations()
        request_id = violations.request_id(request.request_id)
        account_id = violations.named_account("name", request.name)
        reason = violations.reason(request.reason)
        violations.refuse()

        async def unblocked(deed: Deed) -> moderation_pb2.AccountBlock:
            before = await _locked_standing(deed.connection, account_id)
            if before.erased:
                raise AccountErased(account_id=account_id)
            # Whom only an admin may lock out, only an admin lets in again. What an admin blocked an admin may
            # also let in with a key of an admin, which it can have got since.
            if not caller().is_admin:
                _refuse_protected(account_id, before)
            await self._set_blocked(deed, account_id, reason, before, blocked=False)
            return moderation_pb2.AccountBlock(account=account_name(account_id), blocked=False)

        answer = await self.deeds.do(
            AdminAction.UNBLOCK_ACCOUNT, request, request_id, moderation_pb2.AccountBlock, unblocked
        )
        self.doorman.forget(account_id)
        return answer

    async def _change_job(
        self,
        action: AdminAction,
        request: _OfJob,
        change: Callable[[Connection, str, datetime], Awaitable[None]],
        violations: Violations,
    ) -> job_pb2.Job:
        request_id = violations.request_id(request.request_id)
        name = violations.job("name", request.name)
        reason = violations.reason(request.reason)
        violations.refuse()
        assert name is not None, "whatever made it None is a violation"
        async with self.deeds.open(action, request, request_id) as deed:
            job = await _locked_job(deed.connection, name)
            if deed.first_answer is None:
                before = job
                await change(deed.connection, job.job_id, deed.at)
                job = await _locked_job(deed.connection, name)
                await deed.record(
                    target=messages.job_name(job.account_id, job.job_id),
                    reason=reason,
                    before=_hidden_document(before.hidden),
                    after=_hidden_document(job.hidden),
                )
                deed.answer = {}
        return messages.job(job, (await self.standings.of([job])).get(job.job_id))

    async def _set_blocked(
        self,
        deed: Deed,
        account_id: str,
        reason: str,
        before: Standing,
        *,
        blocked: bool,
        ended: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        await store.set_blocked(deed.connection, account_id, blocked=blocked)
        await deed.record(
            target=account_name(account_id),
            reason=reason,
            before={"blocked": before.blocked},
            after={"blocked": blocked, **ended},
        )


def _rules_asked_for(request: moderation_pb2.UpdateRulesRequest, violations: Violations) -> dict[int, Rule]:
    """Return the rules to be added that can be rules, by their places in the request."""
    if not request.add and not request.remove:
        violations.add("add", "Say what to add or to remove.")
    if len(request.add) + len(request.remove) > _MOST_CHANGES:
        violations.add("add", f"A request may add and remove {_MOST_CHANGES:,} rules together; send several.")
    rules = {}
    for i, asked in enumerate(request.add):
        pattern = _kept(asked.pattern)
        field = f"add[{i}].pattern"
        if len(pattern) > _LONGEST_PATTERN or not pattern.isprintable():
            violations.add(field, f"{field} must be text of at most {_LONGEST_PATTERN} characters.")
        elif says_too_little(words_of(pattern)):
            violations.add(
                field,
                f"{field} would be found in nearly everything: it needs a word of two letters or digits.",
            )
        else:
            rules[i] = Rule(pattern=pattern, category=asked.category)
        _refuse_bad_category(f"add[{i}].category", asked.category, violations)
    return rules


def _held_against(
    there: RuleSet, remove: Sequence[str], added: Mapping[int, Rule], violations: Violations
) -> list[Rule]:
    """Return the rules to be removed; what cannot be removed or added goes into `violations`."""
    # As they would be kept today: some are older than this way of keeping them.
    known = {_kept(rule.pattern): rule for rule in there.rules}
    removed = []
    for i, pattern in enumerate(remove):
        rule = known.pop(_kept(pattern), None)
        if rule is None:
            violations.add(f"remove[{i}]", f"There is no rule {_shown(pattern)}, or it is named twice.")
        else:
            removed.append(rule)
    for i, rule in added.items():
        same = known.setdefault(rule.pattern, rule)
        if same is not rule:
            violations.add(
                f"add[{i}].pattern",
                f"{_shown(rule.pattern)} is a rule already ({same.category}); to change its category, remove "
                "it in the same request.",
            )
    if len(known) > _MOST_RULES:
        violations.add("add", f"There may be {_MOST_RULES:,} rules; remove some that find nothing.")
    return removed


def _trial(rules: Sequence[Rule], newest: Sequence[PromptOfJob]) -> moderation_pb2.RulesTrial:
    matcher = Matcher(rules)
    found = [
        moderation_pb2.RuleMatch(job=messages.job_name(asked.account_id, asked.job_id), pattern=rule.pattern)
        for asked in newest
        if (rule := matcher.first(without_urls(asked.prompt)) or matcher.first(asked.text)) is not None
    ]
    return moderation_pb2.RulesTrial(jobs=len(newest), matches=len(found), examples=found[:_EXAMPLES])


def _refuse_bad_category(field: str, text: str, violations: Violations) -> None:
    if not store.is_category(text):
        violations.add(
            field,
            f"{field} must be gore, adult, harassment or another name of up to 40 lower-case letters, digits "
            "and dashes that begins with a letter: whoever is refused is told it.",
        )


def _refuse_protected(account_id: str, standing: Standing) -> None:
    """Raise AccountProtected for accounts of people whom the caller may not lock out."""
    out_of_reach = Role.ADMIN if caller().is_admin else Role.MODERATOR
    for role in sorted(standing.roles, key=list(Role).index, reverse=True):
        if role.reaches(out_of_reach):
            raise AccountProtected(account_id=account_id, role=role.value)


async def _locked_job(connection: Connection, name: JobName) -> StoredJob:
    job = await jobs.lock_job(connection, name.job_id)
    if job is None or not name.is_of(job.account_id):
        raise NotFoundOrNotYours
    return job


async def _locked_standing(connection: Connection, account_id: str) -> Standing:
    standing = await store.lock_standing(connection, account_id)
    if standing is None:
        raise UnknownAccount(account_id=account_id)
    return standing


def _kept(pattern: str) -> str:
    """Return a pattern in the spelling in which rules are kept."""
    seen = (
        character
        for character in unicodedata.normalize("NFKC", pattern)
        if unicodedata.category(character) != "Cf"
    )
    return " ".join("".join(seen).casefold().split())


def _shown(pattern: str) -> str:
    return f"`{pattern[:_LONGEST_PATTERN]}`"


def _rule(rule: Rule) -> moderation_pb2.Rule:
    return moderation_pb2.Rule(
        pattern=rule.pattern, category=rule.category, create_time=timestamp(rule.created_at)
    )


def _document(rules: Sequence[Rule]) -> list[dict[str, str]]:
    return [{"pattern": rule.pattern, "category": rule.category} for rule in rules]


def _hidden_document(hidden: Hidden | None) -> dict[str, Any]:
    return {"hidden": None if hidden is None else hidden.category}
