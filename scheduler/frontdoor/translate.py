"""From a CreateJob request to a `Submission`: the prompt language, sizes, modes, sources.

Everything wrong with a request is found before any of it is refused. Only what is right is then moderated.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from gpu_worker import prompt as prompt_language
from gpu_worker.contract import RenderKind, RenderSpec, SourceImage
from gpu_worker.models import ModelEntry, Models, UnknownModel
from gpu_worker.prompt import MAX_SEED, ParsedPrompt, PromptRefused
from scheduler.estimator import Estimator, shape_of
from scheduler.frontdoor.fields import JobName, Violations, digest
from scheduler.intake import Submission
from scheduler.policy.ids import Tier
from scheduler.refusals import Impossible, SourceNotReady
from scheduler.store.accounts import Visibility
from scheduler.store.jobs import JobKind, JobState, StoredJob
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


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What every kind of job has in common."""

    request_id: str
    digest: bytes
    tier: Tier | None
    visibility: Visibility | None


def imagine(request: job_pb2.CreateJobRequest, models: Models, estimator: Estimator) -> Submission:
    """Return what an imagine request asks for. Raises InvalidRequest with everything that is wrong."""
    violations = Violations()
    frame = _frame(request, violations)
    entry = _entry(request.imagine.model, models, violations)
    parsed = _parsed(request.imagine.prompt, violations)
    if parsed is not None:
        _refuse_contradictions(frame, parsed, violations)
    if parsed is not None and entry is not None:
        width, height = parsed.width or entry.default_width, parsed.height or entry.default_height
        for parameter, sentence in entry.size_violations(width, height):
            violations.add(parameter, sentence)
    violations.refuse()
    assert parsed is not None, "whatever made it None is a violation"
    assert entry is not None, "whatever made it None is a violation"
    spec = RenderSpec(
        kind=RenderKind.IMAGINE,
        model=entry.name,
        prompt=parsed.text,
        width=width,
        height=height,
        steps=entry.steps,
        guidance_milli=entry.guidance_milli,
        seed=_seed() if parsed.seed is None else parsed.seed,
    )
    return Submission(
        request_id=frame.request_id,
        digest=frame.digest,
        kind=JobKind.IMAGINE,
        prompt=request.imagine.prompt,
        spec=spec,
        seed_fixed=parsed.seed is not None,
        tier=frame.tier or _tier(parsed.tier),
        visibility=frame.visibility or _visibility(parsed.visibility),
        predicted_ms=estimator.predict(shape_of(spec)).cost_ms,
        source_job_id=None,
        source_image=None,
        warnings=parsed.warnings,
    )


def variation_source(request: job_pb2.CreateJobRequest) -> JobName:
    """Return the picture a variation starts from. Raises InvalidRequest."""
    violations = Violations()
    _frame(request, violations)
    name = violations.image("variation.source_image", request.variation.source_image)
    violations.refuse()
    assert name is not None, "whatever made it None is a violation"
    return name


def reroll_source(request: job_pb2.CreateJobRequest) -> JobName:
    """Return the job a reroll repeats. Raises InvalidRequest."""
    violations = Violations()
    _frame(request, violations)
    name = violations.job("reroll.source_job", request.reroll.source_job)
    violations.refuse()
    assert name is not None, "whatever made it None is a violation"
    return name


def variation(
    request: job_pb2.CreateJobRequest, source: StoredJob, image: int, models: Models, estimator: Estimator
) -> Submission:
    """Return a new grid close to one picture of `source`, a job of the caller's.

    Raises SourceNotReady or Impossible.
    """
    pictures = {picture.index for picture in source.images}
    if source.state is not JobState.SUCCEEDED or image not in pictures or source.latents_path is None:
        raise SourceNotReady(job_id=source.job_id, state=source.state.value, image=image)
    entry = _entry_of_source(source, models)
    spec = replace(
        source.spec,
        kind=RenderKind.VARIATION,
        seed=_seed(),
        source=SourceImage(
            job_id=source.job_id,
            index=image,
            latents_path=source.latents_path,
            strength_permille=entry.variation_strength_permille,
        ),
    )
    # With the seed its source fixed, two variations of one picture would be the same.
    return _from_source(request, source, JobKind.VARIATION, spec, estimator, image=image, seed_fixed=False)


def reroll(
    request: job_pb2.CreateJobRequest, source: StoredJob, models: Models, estimator: Estimator
) -> Submission:
    """Return the same job as `source`, a job of the caller's, with a new seed unless its prompt fixes one.

    Raises Impossible.
    """
    spec = source.spec if source.seed_fixed else replace(source.spec, seed=_seed())
    _entry_of_source(source, models)  # for its refusals
    return _from_source(
        request, source, JobKind.REROLL, spec, estimator, image=None, seed_fixed=source.seed_fixed
    )


def nothing(request: job_pb2.CreateJobRequest) -> NoReturn:
    """Refuse a request that does not say what to make. Raises InvalidRequest."""
    violations = Violations()
    _frame(request, violations)
    violations.add("spec", "Say what to make: one of imagine, variation and reroll.")
    violations.refuse()
    raise AssertionError("there is a violation")


def _from_source(
    request: job_pb2.CreateJobRequest,
    source: StoredJob,
    kind: JobKind,
    spec: RenderSpec,
    estimator: Estimator,
    *,
    image: int | None,
    seed_fixed: bool,
) -> Submission:
    frame = _frame(request, Violations())
    # It was accepted once, so it parses. Its flags give way to the request's: nobody can edit them any more.
    flags = prompt_language.parse(source.prompt)
    # What is made of a private picture shows it. Its account's default may be public by now, and `--public`
    # may stand in the prompt of a source that its request made private.
    private = source.visibility is Visibility.PRIVATE
    inherited = Visibility.PRIVATE if private else _visibility(flags.visibility)
    return Submission(
        request_id=frame.request_id,
        digest=frame.digest,
        kind=kind,
        prompt=source.prompt,
        spec=spec,
        seed_fixed=seed_fixed,
        tier=frame.tier or _tier(flags.tier),
        visibility=frame.visibility or inherited,
        predicted_ms=estimator.predict(shape_of(spec)).cost_ms,
        source_job_id=source.job_id,
        source_image=image,
        warnings=source.warnings,
    )


def _frame(request: job_pb2.CreateJobRequest, violations: Violations) -> _Frame:
    for field, value, known in (
        ("tier", request.tier, TIERS),
        ("visibility", request.visibility, VISIBILITIES),
    ):
        if value not in known:
            violations.add(field, f"{field} has a value that this service does not know.")
    return _Frame(
        request_id=violations.request_id(request.request_id),
        digest=digest(request),
        tier=TIERS.get(request.tier),
        visibility=VISIBILITIES.get(request.visibility),
    )


def _entry(name: str, models: Models, violations: Violations) -> ModelEntry | None:
    try:
        return models.get(name)
    except UnknownModel as unknown:
        violations.add("imagine.model", str(unknown))
        return None


def _entry_of_source(source: StoredJob, models: Models) -> ModelEntry:
    spec = source.spec
    try:
        entry = models.get(spec.model)
    except UnknownModel as unknown:
        raise Impossible(
            missing="model",
            sentence=f"Job {source.job_id} was drawn by {spec.model}, which is not offered any more.",
        ) from unknown
    if entry.size_violations(spec.width, spec.height):
        raise Impossible(
            missing="size",
            sentence=f"{entry.name} no longer draws {spec.width} by {spec.height} of job {source.job_id}.",
        )
    return entry


def _parsed(prompt: str, violations: Violations) -> ParsedPrompt | None:
    try:
        return prompt_language.parse(prompt)
    except PromptRefused as refused:
        for violation in refused.violations:
            violations.add(violation.field, violation.sentence)
        return None


def _refuse_contradictions(frame: _Frame, parsed: ParsedPrompt, violations: Violations) -> None:
    for field, asked, flag in (
        ("tier", frame.tier, parsed.tier),
        ("visibility", frame.visibility, parsed.visibility),
    ):
        if asked is not None and flag is not None and asked != flag:
            violations.add(field, f"The request says {asked} and its prompt --{flag}; leave one of them out.")


def _tier(flag: str | None) -> Tier | None:
    return None if flag is None else Tier(flag)


def _visibility(flag: str | None) -> Visibility | None:
    return None if flag is None else Visibility(flag)


def _seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)
