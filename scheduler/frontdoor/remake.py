"""From a CreateJob request that starts from another job to a `Submission`: variation, upscale, reroll.

The request's own words go before the flags of the source's prompt, which nobody can edit any more. A job made
of another keeps what its prompt says: text, weights, pictures. Of a hidden job nothing is made, nor a picture
enlarged again that is hidden when enlarged: or its owner would put it back into the feed.
"""

from __future__ import annotations

from dataclasses import replace

from gpu_worker import prompt as prompt_language
from gpu_worker.contract import WHOLE_PPM, RenderKind, RenderSpec, SourceImage, TextPart
from gpu_worker.models import ModelEntry, Models, UnknownModel, upscaled_size
from gpu_worker.prompt import ParsedPrompt, PromptRefused
from scheduler.estimator import Estimator, shape_of
from scheduler.frontdoor.fields import JobName, Violations
from scheduler.frontdoor.messages import ALGORITHM_OF
from scheduler.frontdoor.translate import drawn_seed, frame, tier_of, visibility_of
from scheduler.intake import Submission
from scheduler.refusals import Impossible, ModerationRejected, PicturesExpired, SourceNotReady
from scheduler.store import moderation
from scheduler.store.accounts import Visibility
from scheduler.store.jobs import JobKind, JobState, StoredJob
from scheduler.store.pool import Pool
from scheduler.v1 import job_pb2

# Max upscale is for small grids: a larger one is enlarged to nearly as much by the others.
_MAX_UPSCALE_UNDER = 512
_NO_VIDEO = "--video has no effect on an upscale: a video shows how a grid came to be."


def variation_source(request: job_pb2.CreateJobRequest) -> JobName:
    """Return the picture a variation starts from. Raises InvalidRequest."""
    return _picture(request, "variation.source_image", request.variation.source_image, Violations())


def upscale_source(request: job_pb2.CreateJobRequest) -> JobName:
    """Return the picture to enlarge. Raises InvalidRequest."""
    violations = Violations()
    algorithm = request.upscale.algorithm
    if algorithm and algorithm not in ALGORITHM_OF:
        violations.add("upscale.algorithm", "upscale.algorithm has a value that this service does not know.")
    return _picture(request, "upscale.source_image", request.upscale.source_image, violations)


def reroll_source(request: job_pb2.CreateJobRequest) -> JobName:
    """Return the job a reroll repeats. Raises InvalidRequest."""
    violations = Violations()
    frame(request, violations)
    name = violations.job("reroll.source_job", request.reroll.source_job)
    violations.refuse()
    assert name is not None, "whatever made it None is a violation"
    return name


def variation(
    request: job_pb2.CreateJobRequest, source: StoredJob, image: int, models: Models, estimator: Estimator
) -> Submission:
    """Return a new grid close to one picture of `source`, a job of the caller's.

    Raises PicturesExpired, SourceNotReady, InvalidRequest for a picture of an upscale, or Impossible.
    """
    _refuse_unless_of_a_grid("variation.source_image", source, image)
    if source.latents_path is None:
        raise SourceNotReady(job_id=source.job_id, state=source.state.value, what=f"picture {image}")
    entry = _entry_of_source(source, models)
    strong = request.variation.strong
    spec = replace(
        source.spec,
        kind=RenderKind.VARIATION,
        seed=drawn_seed(),
        source=SourceImage(
            job_id=source.job_id,
            index=image,
            latents_path=source.latents_path,
            strength_permille=(
                entry.variation_strong_permille if strong else entry.variation_strength_permille
            ),
        ),
    )
    # With the seed its source fixed, two variations of one picture would be the same.
    return _from_source(request, source, JobKind.VARIATION, spec, estimator, image=image, seed_fixed=False)


def upscale(
    request: job_pb2.CreateJobRequest, source: StoredJob, image: int, models: Models, estimator: Estimator
) -> Submission:
    """Return one picture of `source`, a job of the caller's, enlarged.

    Raises PicturesExpired, SourceNotReady, Impossible, and InvalidRequest for a picture of an upscale and for
    a max upscale of a large grid.
    """
    _refuse_unless_of_a_grid("upscale.source_image", source, image)
    kind = ALGORITHM_OF.get(request.upscale.algorithm) or _usual_algorithm(source)
    if kind is RenderKind.UPSCALE_MAX:
        _refuse_max_of_large(source)
    _entry_of_source(source, models)  # for its refusals
    width, height = upscaled_size(kind, source.spec.width, source.spec.height)
    (picture,) = (picture for picture in source.images if picture.index == image)
    spec = replace(
        source.spec,
        kind=kind,
        width=width,
        height=height,
        images=1,
        seed=source.spec.seed if source.seed_fixed else drawn_seed(),
        source=SourceImage(
            job_id=source.job_id,
            index=image,
            latents_path="",
            strength_permille=0,  # how much is drawn over it, its kind says
            picture_path=picture.path,
        ),
        # The picture is there: what it was drawn after has done its part, and so has the place it stopped at.
        parts=_without_pictures(source.spec),
        pictures=(),
        stop_percent=100,
        video=False,
    )
    submission = _from_source(
        request, source, JobKind.UPSCALE, spec, estimator, image=image, seed_fixed=source.seed_fixed
    )
    return replace(submission, warnings=(_NO_VIDEO,) if source.spec.video else ())


def reroll(
    request: job_pb2.CreateJobRequest, source: StoredJob, models: Models, estimator: Estimator
) -> Submission:
    """Return the same job as `source`, a job of the caller's, with a new seed unless its prompt fixes one.

    An exact one has the same seed in any case. Raises Impossible.
    """
    same = source.seed_fixed or request.reroll.exact
    spec = source.spec if same else replace(source.spec, seed=drawn_seed())
    _entry_of_source(source, models)  # for its refusals
    return _from_source(
        request, source, JobKind.REROLL, spec, estimator, image=None, seed_fixed=source.seed_fixed
    )


async def refuse_hidden(pool: Pool, account_id: str, submission: Submission) -> None:
    """Raise ModerationRejected if this would show again what a moderator hides."""
    if submission.source_job_id is None:
        return
    spec = submission.spec
    enlarged = spec.source if spec.kind.is_upscale else None
    async with pool.reading() as connection:
        hidden = await moderation.hidden_like(connection, account_id, submission.source_job_id, enlarged)
    if hidden is not None:
        job_id, category = hidden
        field = {JobKind.VARIATION: "variation.source_image", JobKind.UPSCALE: "upscale.source_image"}
        raise ModerationRejected(
            category=category, field=field.get(submission.kind, "reroll.source_job"), hidden_job=job_id
        )


def _picture(request: job_pb2.CreateJobRequest, field: str, text: str, violations: Violations) -> JobName:
    frame(request, violations)
    name = violations.image(field, text)
    violations.refuse()
    assert name is not None, "whatever made it None is a violation"
    return name


def _refuse_unless_of_a_grid(field: str, source: StoredJob, image: int) -> None:
    if source.expired_at is not None:
        raise PicturesExpired(job_id=source.job_id, expired_at=source.expired_at)
    pictures = {picture.index for picture in source.images}
    if source.state is not JobState.SUCCEEDED or image not in pictures:
        raise SourceNotReady(job_id=source.job_id, state=source.state.value, what=f"picture {image}")
    if source.spec.kind.is_upscale:
        grid = source.spec.source
        assert grid is not None, "an upscale has a source"
        violations = Violations()
        violations.add(
            field,
            f"Job {source.job_id} is an upscale; name a picture of a grid, for example the one it was made "
            f"of: accounts/{source.account_id}/jobs/{grid.job_id}/images/{grid.index}.",
        )
        violations.refuse()


def _usual_algorithm(source: StoredJob) -> RenderKind:
    light = _parsed(source).light_upscale
    return RenderKind.UPSCALE_LIGHT if light else RenderKind.UPSCALE_DETAILED


def _refuse_max_of_large(source: StoredJob) -> None:
    width, height = source.spec.width, source.spec.height
    violations = Violations()
    if max(width, height) >= _MAX_UPSCALE_UNDER:
        violations.add(
            "upscale.algorithm",
            f"Max upscale is for grids under {_MAX_UPSCALE_UNDER} pixels wide and high, and job "
            f"{source.job_id} is {width} by {height}; ask for a light or detailed upscale.",
        )
    violations.refuse()


def _parsed(source: StoredJob) -> ParsedPrompt:
    """Return what the source's prompt says, as far as it is read at all."""
    try:
        return prompt_language.parse(source.prompt, source.uploads)
    except PromptRefused:
        # It was accepted under the rules of its day. What it draws is in its spec, and whether it is private
        # in its row; its tier and algorithm are the usual ones then.
        return ParsedPrompt(text=source.spec.prompt)


def _without_pictures(spec: RenderSpec) -> tuple[TextPart, ...]:
    """Return the text parts with the shares they have among themselves; none if they are one plain text."""
    whole = sum(abs(part.share_ppm) for part in spec.parts)
    if not spec.pictures or whole == 0:
        return () if whole == 0 else spec.parts
    parts, before = [], 0
    for part in spec.parts:
        # Rounded sums, not sums of what was rounded: they end at the whole.
        until = before + abs(part.share_ppm)
        share_ppm = round(until * WHOLE_PPM / whole) - round(before * WHOLE_PPM / whole)
        parts.append(replace(part, share_ppm=share_ppm if part.share_ppm > 0 else -share_ppm))
        before = until
    return () if [part.share_ppm for part in parts] == [WHOLE_PPM] else tuple(parts)


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
    asked = frame(request, Violations())
    flags = _parsed(source)
    # What is made of a private picture shows it. Its account's default may be public by now, and `--public`
    # may stand in the prompt of a source that its request made private.
    private = source.visibility is Visibility.PRIVATE
    inherited = Visibility.PRIVATE if private else visibility_of(flags.visibility)
    return Submission(
        request_id=asked.request_id,
        digest=asked.digest,
        kind=kind,
        prompt=source.prompt,
        spec=spec,
        seed_fixed=seed_fixed,
        tier=asked.tier or tier_of(flags.tier),
        visibility=asked.visibility or inherited,
        predicted_ms=estimator.predict(shape_of(spec)).cost_ms,
        source_job_id=source.job_id,
        source_image=image,
        uploads=source.uploads,
        warnings=source.warnings,
    )


def _entry_of_source(source: StoredJob, models: Models) -> ModelEntry:
    spec = source.spec
    try:
        entry = models.get(spec.model)
    except UnknownModel as unknown:
        raise Impossible(
            missing="model",
            sentence=f"Job {source.job_id} was drawn by {spec.model}, which is not offered any more.",
        ) from unknown
    # The sizes of upscales are not of grids.
    if not spec.kind.is_upscale and entry.size_violations(spec.width, spec.height):
        raise Impossible(
            missing="size",
            sentence=f"{entry.name} no longer draws {spec.width} by {spec.height} of job {source.job_id}.",
        )
    if spec.pictures and not entry.takes_pictures:
        raise Impossible(
            missing="pictures",
            sentence=f"{entry.name} no longer takes image prompts, which job {source.job_id} has.",
        )
    if spec.parts and not entry.weighted_parts:
        raise Impossible(
            missing="weights",
            sentence=f"{entry.name} no longer weighs parts of a prompt, which job {source.job_id} has.",
        )
    return entry
