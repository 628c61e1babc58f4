"""From a CreateJob request to a `Submission`: the prompt language, sizes, modes.

Everything wrong with a request is found before any of it is refused. Only what is right is then moderated,
and only of what may be drawn are the pictures fetched. Jobs that start from another one are in `remake`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from gpu_worker import prompt as prompt_language
from gpu_worker.contract import PicturePart, RenderKind, RenderSpec
from gpu_worker.models import ModelEntry, Models, UnknownModel
from gpu_worker.prompt import MAX_SEED, ParsedPrompt, PromptRefused
from scheduler.estimator import Estimator, shape_of
from scheduler.frontdoor.fields import Violations, digest
from scheduler.frontdoor.pictures import PICTURES_MAX, Pictures
from scheduler.intake import Submission
from scheduler.policy.ids import Tier
from scheduler.store import stray_pictures
from scheduler.store.accounts import Visibility
from scheduler.store.jobs import JobKind
from scheduler.store.pool import Pool
from scheduler.v1 import job_pb2

TIERS: Mapping[int, Tier | None] = {
    job_pb2.TIER_UNSPECIFIED: None,
    job_pb2.TIER_FAST: Tier.FAST,
    job_pb2.TIER_RELAX: Tier.RELAX,
}
VISIBILITIES: Mapping[int, Visibility | None] = {
    job_pb2.VISIBILITY_UNSPECIFIED: None,
    job_pb2.VISIBILITY_PUBLIC: Visibility.PUBLIC,
    job_pb2.VISIBILITY_PRIVATE: Visibility.PRIVATE,
}

_NOT_STORED_YET = ""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What every kind of job has in common."""

    request_id: str
    digest: bytes
    tier: Tier | None
    visibility: Visibility | None


def imagine(request: job_pb2.CreateJobRequest, models: Models, estimator: Estimator) -> Submission:
    """Return what an imagine request asks for; its pictures have no paths until `with_pictures`.

    Raises InvalidRequest with everything that is wrong.
    """
    violations = Violations()
    asked = frame(request, violations)
    entry = _entry(request.imagine.model, models, violations)
    parsed = _parsed(request.imagine, violations)
    if parsed is not None:
        _refuse_contradictions(asked, parsed, violations)
    if parsed is not None and entry is not None:
        for parameter, sentence in _size_violations(parsed, entry):
            violations.add(parameter, sentence)
    if parsed is not None and entry is not None and parsed.picture_shares_ppm:
        field = "imagine.pictures" if request.imagine.pictures else "prompt"
        if not entry.takes_pictures:
            violations.add(field, _no_pictures(entry, models))
        elif len(parsed.picture_shares_ppm) > PICTURES_MAX:
            violations.add(field, f"At most {PICTURES_MAX} image prompts, uploaded ones and URLs together.")
    if parsed is not None and entry is not None and parsed.parts and not entry.weighted_parts:
        violations.add("prompt", _no_weights(entry, models))
    violations.refuse()
    assert parsed is not None, "whatever made it None is a violation"
    assert entry is not None, "whatever made it None is a violation"
    width, height = _size(parsed, entry)
    spec = RenderSpec(
        kind=RenderKind.IMAGINE,
        model=entry.name,
        prompt=parsed.text,
        width=width,
        height=height,
        steps=entry.steps,
        guidance_milli=entry.guidance_milli,
        seed=drawn_seed() if parsed.seed is None else parsed.seed,
        parts=parsed.parts,
        pictures=tuple(
            PicturePart(path=_NOT_STORED_YET, share_ppm=share_ppm) for share_ppm in parsed.picture_shares_ppm
        ),
        stop_percent=parsed.stop_percent,
        video=parsed.video,
    )
    return Submission(
        request_id=asked.request_id,
        digest=asked.digest,
        kind=JobKind.IMAGINE,
        prompt=request.imagine.prompt,
        spec=spec,
        seed_fixed=parsed.seed is not None,
        tier=asked.tier or tier_of(parsed.tier),
        visibility=asked.visibility or visibility_of(parsed.visibility),
        predicted_ms=estimator.predict(shape_of(spec)).cost_ms,
        source_job_id=None,
        source_image=None,
        uploads=len(request.imagine.pictures),
        warnings=(*parsed.warnings, *prompt_language.unread(parsed, entry.words_read)),
    )


async def with_pictures(
    submission: Submission, asked: job_pb2.Imagine, account_id: str, pictures: Pictures, pool: Pool
) -> Submission:
    """Return what `imagine` made of `asked` with its pictures stored: the uploaded, then those behind URLs.

    They are strays until a job has them. Raises PictureUnreadable or Overloaded.
    """
    parsed = prompt_language.parse(asked.prompt, len(asked.pictures))

    async def note(paths: Sequence[str]) -> None:
        async with pool.reading() as connection:
            await stray_pictures.note(connection, paths)

    paths = await pictures.stored(account_id, asked.pictures, parsed.urls, note)
    stored = tuple(
        replace(part, path=path) for part, path in zip(submission.spec.pictures, paths, strict=True)
    )
    return replace(submission, spec=replace(submission.spec, pictures=stored))


def nothing(request: job_pb2.CreateJobRequest) -> NoReturn:
    """Refuse a request that does not say what to make. Raises InvalidRequest."""
    violations = Violations()
    frame(request, violations)
    violations.add("spec", "Say what to make: one of imagine, variation, upscale and reroll.")
    violations.refuse()
    raise AssertionError("there is a violation")


def frame(request: job_pb2.CreateJobRequest, violations: Violations) -> Frame:
    """Return what the request says beside what to make; what is wrong with it goes into `violations`."""
    for field, value, known in (
        ("tier", request.tier, TIERS),
        ("visibility", request.visibility, VISIBILITIES),
    ):
        if value not in known:
            violations.add(field, f"{field} has a value that this service does not know.")
    return Frame(
        request_id=violations.request_id(request.request_id),
        digest=digest(request),
        tier=TIERS.get(request.tier),
        visibility=VISIBILITIES.get(request.visibility),
    )


def tier_of(flag: str | None) -> Tier | None:
    """Return the tier that a prompt's flag names."""
    return None if flag is None else Tier(flag)


def visibility_of(flag: str | None) -> Visibility | None:
    """Return the visibility that a prompt's flag names."""
    return None if flag is None else Visibility(flag)


def drawn_seed() -> int:
    """Return a seed that nobody chose."""
    return secrets.randbelow(MAX_SEED + 1)


def _entry(name: str, models: Models, violations: Violations) -> ModelEntry | None:
    try:
        return models.get(name)
    except UnknownModel as unknown:
        violations.add("imagine.model", str(unknown))
        return None


def _parsed(asked: job_pb2.Imagine, violations: Violations) -> ParsedPrompt | None:
    try:
        return prompt_language.parse(asked.prompt, len(asked.pictures))
    except PromptRefused as refused:
        for violation in refused.violations:
            violations.add(violation.field, violation.sentence)
        return None


def _size(parsed: ParsedPrompt, entry: ModelEntry) -> tuple[int, int]:
    if parsed.aspect is not None:
        return entry.size_of_aspect(*parsed.aspect)
    return parsed.width or entry.default_width, parsed.height or entry.default_height


def _size_violations(parsed: ParsedPrompt, entry: ModelEntry) -> tuple[tuple[str, str], ...]:
    if parsed.aspect is not None:
        return entry.aspect_violations(*parsed.aspect)
    return entry.size_violations(*_size(parsed, entry))


def _no_pictures(entry: ModelEntry, models: Models) -> str:
    able = models.taking_pictures()
    instead = f"these models do: {', '.join(able)}" if able else "no model here does"
    return f"{entry.name} takes no image prompts; {instead}."


def _no_weights(entry: ModelEntry, models: Models) -> str:
    able = models.weighing_parts()
    instead = f"these models do: {', '.join(able)}" if able else "no model here does"
    return f"{entry.name} does not weigh parts of a prompt, as :: and --no ask for; {instead}."


def _refuse_contradictions(asked: Frame, parsed: ParsedPrompt, violations: Violations) -> None:
    for field, of_request, flag in (
        ("tier", asked.tier, parsed.tier),
        ("visibility", asked.visibility, parsed.visibility),
    ):
        if of_request is not None and flag is not None and of_request != flag:
            violations.add(
                field, f"The request says {of_request} and its prompt --{flag}; leave one of them out."
            )
