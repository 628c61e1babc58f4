"""What a GPU worker is asked and what it answers.

The scheduler and the worker share this module and nothing else. It is standard library only, its
values are frozen, and everything in it survives pickling between releases that agree on these names.

Every message to a worker carries the scheduler's epoch and names an attempt by id and token: a worker
refuses an epoch older than the newest it has seen, and a result without the right token matches no row
and is dropped.

Times are integers in milliseconds; ids are UUIDs as text, except for a worker's, which is the stable
name of its slot (`node-a/gpu-0`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class RenderKind(StrEnum):
    """What the engine does. A reroll is resolved to one of these before it reaches a worker."""

    IMAGINE = "imagine"
    VARIATION = "variation"
    UPSCALE_LIGHT = "upscale_light"
    """Super-resolution alone."""
    UPSCALE_DETAILED = "upscale_detailed"
    """Super-resolution, then details drawn over it, tile by tile."""
    UPSCALE_MAX = "upscale_max"
    """As detailed, up to the largest picture there is."""

    @property
    def is_upscale(self) -> bool:
        return self in (RenderKind.UPSCALE_LIGHT, RenderKind.UPSCALE_DETAILED, RenderKind.UPSCALE_MAX)


WHOLE_PPM = 1_000_000
"""The shares of a prompt's parts, without their signs, add up to this."""


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """The picture a variation or an upscale starts from."""

    job_id: str
    index: int
    """1 to 4."""
    latents_path: str
    """The grid latents of the source job, relative to the artifact store's root: what variations start from.
    Empty for upscales."""
    strength_permille: int
    """How far to go from it: 0 keeps the picture, 1000 forgets it."""
    picture_path: str = ""
    """The picture's file, relative to the artifact store's root: what upscales start from; else empty."""


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """A part of a prompt that has a weight of its own."""

    text: str
    share_ppm: int
    """Millionths, with its sign; those of all parts, pictures included, add up to WHOLE_PPM without it."""


@dataclass(frozen=True, kw_only=True)
class PicturePart:
    """A picture that a prompt names beside its text."""

    path: str
    """A PNG of the service's own making, relative to the artifact store's root."""
    share_ppm: int
    """As of a text part."""


@dataclass(frozen=True, kw_only=True)
class RenderSpec:
    """Everything that decides a picture's bits, given device type and software."""

    kind: RenderKind
    model: str
    prompt: str
    """All text for the model, without parameters, weights and pictures."""
    width: int
    height: int
    steps: int
    guidance_milli: int
    seed: int
    """Seed of the job; each image's own seed is derived from it."""
    images: int = 4
    source: SourceImage | None = None
    parts: tuple[TextPart, ...] = ()
    """Where the prompt is more than one text of weight 1, its text parts; empty: `prompt` is the only one."""
    pictures: tuple[PicturePart, ...] = ()
    stop_percent: int = 100
    """Of the steps, after which the picture is shown as it is then; 100: it is finished."""
    video: bool = False
    """Keep what the grid looked like on the way, and deliver it as a video too."""


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Device time of one attempt by stage. Loading a model is the fleet's cost, not the attempt's."""

    encode_ms: int = 0
    denoise_ms: int = 0
    decode_ms: int = 0
    upscale_ms: int = 0

    @property
    def gpu_ms(self) -> int:
        """What is measured for the attempt: the sum of its stages."""
        return self.encode_ms + self.denoise_ms + self.decode_ms + self.upscale_ms

    def __add__(self, other: StageTimes) -> StageTimes:
        return StageTimes(
            encode_ms=self.encode_ms + other.encode_ms,
            denoise_ms=self.denoise_ms + other.denoise_ms,
            decode_ms=self.decode_ms + other.decode_ms,
            upscale_ms=self.upscale_ms + other.upscale_ms,
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run cut at a step boundary and stored, with which any worker of its device type can go on."""

    path: str
    """Relative to the artifact store's root."""
    step: int
    """Denoising steps that are done."""
    steps: int
    kept: StageTimes
    """What the run took up to there, over all attempts; billed with the attempt that ends the job."""
    device: str
    """Device type that drew it: the bits are promised on no other."""
    size_bytes: int = 0
    stored_in_ms: int = 0
    """What it took to make its content and to store it, beside the run."""


@dataclass(frozen=True, kw_only=True)
class RenderRequest:
    """One attempt at one job, given to one worker."""

    job_id: str
    attempt_id: str
    token: str
    """Random; the fence of this attempt."""
    epoch: int
    tier: str
    """`fast` or `relax`: which use of the GPU its time is counted under."""
    spec: RenderSpec
    file_stem: str
    """Image files are named `<job_id>_<file_stem>_<index>.png`."""
    parks: str | None = None
    """Attempt that gives up the GPU at its next boundary and waits, parked, until this one ends: the newest
    that still draws. Where none does any more, this one begins at once; where another does, it is refused."""
    checkpoint: Checkpoint | None = None
    """Where an earlier attempt at the job got to. It costs an encode to go on from there, and no step."""
    after_loss: bool = False
    """The attempt before was lost with its GPU: what it did after its newest checkpoint is done again."""
    traceparent: str | None = None
    """The attempt's span, as the W3C writes it, for what is traced of it here; None: nothing is."""


class Outcome(StrEnum):
    """How an attempt ended, as the worker saw it. A lost attempt has no result, so it is not here."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    HANDED_OVER = "handed_over"
    """It gave its place up in the middle, in good order: another attempt goes on from its checkpoint."""


class Blame(StrEnum):
    """Whose fault a failure was. Only the platform's is tried again."""

    NONE = "none"
    CLIENT = "client"
    PLATFORM = "platform"


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """One finished picture in the artifact store."""

    index: int
    """1 to 4."""
    path: str
    """Relative to the artifact store's root."""
    file_name: str
    content_type: str
    size_bytes: int
    sha256: str
    width: int
    height: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """How a grid came to be, as one file in the artifact store."""

    path: str
    """Relative to the artifact store's root."""
    file_name: str
    content_type: str
    """`video/mp4` or `image/webp`."""
    size_bytes: int
    sha256: str
    width: int
    height: int
    frames: int


@dataclass(frozen=True, kw_only=True)
class AttemptResult:
    """The end of an attempt. The worker keeps it until the scheduler acknowledges its settlement."""

    job_id: str
    attempt_id: str
    token: str
    incarnation: str
    """UUID of the worker's process start."""
    outcome: Outcome
    times: StageTimes
    """Of this attempt alone, without what it did again."""
    kept: StageTimes = field(default_factory=StageTimes)
    """What the checkpoint it went on from had taken; 0 where it began at the beginning."""
    redone_ms: int = 0
    """Device time it took to get to where the checkpoint was; billed to nobody."""
    load_ms: int = 0
    """Time this attempt waited for its model to load; billed to nobody."""
    images: tuple[ImageFile, ...] = ()
    videos: tuple[VideoFile, ...] = ()
    latents_path: str | None = None
    """The grid latents, from which variations start; None of an upscale."""
    receipt: Mapping[str, object] = field(default_factory=dict)
    """What is needed to make the same bits again; JSON values only."""
    steps_redone: int = 0
    """So many denoising steps were done a second time, up to those between two checkpoints. Nobody knows how
    far an attempt was when its GPU died: what it did while a checkpoint was being stored is not counted."""
    park_waits: tuple[int, ...] = ()
    """For each time that it was parked, how many steps it ended after the one that parks it was ready."""
    checkpoint: Checkpoint | None = None
    """Of one that was handed over: the newest that is stored; None: it begins at the beginning."""
    blame: Blame = Blame.NONE
    failure_reason: str | None = None
    """Stable, upper case: MODEL_MISSING, MODEL_UNUSABLE, OUT_OF_MEMORY, ENGINE_ERROR,
    ARTIFACTS_UNAVAILABLE, SOURCE_MISSING."""
    failure_sentence: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunInHand:
    """A run that a worker has begun or is about to begin, and has not ended."""

    job_id: str
    attempt_id: str
    token: str
    checkpoint: Checkpoint | None = None
    """The newest that is stored."""
    step: int = 0
    """Denoising steps that are done; for whoever looks, nothing is decided by it."""
    steps: int = 0
    """Of so many; 0: its first boundary is still to come."""


@dataclass(frozen=True, kw_only=True)
class GpuTime:
    """Wall time of the GPU since the worker's process started, by use: a closed account.

    Time of an attempt is open until the scheduler has acknowledged or forgotten its result, since only
    then is it known whether it was of use. So all but `open_ms` only grow, and together they are the wall
    time.
    """

    fast_ms: int = 0
    relax_ms: int = 0
    load_ms: int = 0
    wasted_ms: int = 0
    """Of failed and of forgotten attempts, and what was done again to get to a checkpoint."""
    idle_ms: int = 0
    open_ms: int = 0


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """What a worker is and has, asked by each new scheduler and sent with each heartbeat."""

    worker_id: str
    incarnation: str
    pid: int
    """Process id on its machine, for whoever looks at that machine."""
    release: str
    epoch: int
    """The newest epoch it has seen."""
    device: str
    """Device type: the GPU model, or the CPU's instruction set and thread count."""
    speed_permille: int
    """Speed against the reference class: 1000 is 1."""
    memory_bytes: int
    memory_used_bytes: int
    warm_models: tuple[str, ...]
    active: RunInHand | None
    """The run that has the GPU, or gets it where another is to be parked."""
    unacknowledged: tuple[AttemptResult, ...]
    gpu_time: GpuTime
    parked: tuple[RunInHand, ...] = ()
    """Runs that wait for the active one to end, the newest last; it goes on by itself."""
    drawn: tuple[RunInHand, ...] = ()
    """Runs that are at the last piece of work that needs the GPU, or write their pictures: the next may be
    given, and begins as soon as that piece is done. Of more than the worker is to deliver at once, the first.
    """
    healthy: bool = True
    sentence: str = ""
    """Why it is not healthy."""
    models: tuple[str, ...] | None = None
    """What it could load: the files are there, or can be fetched; None: any."""
    lacks_for_upscales: str = ""
    """Why it can draw no upscale and what to do about it, as part of a sentence; empty: it can."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The answer of a long poll: at once when an attempt ended or the models changed, else after a while."""

    report: WorkerReport


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an attempt is, for whoever watches. Only the newest matters."""

    attempt_id: str
    step: int
    steps: int
    preview: bytes = b""
    """The grid so far as one picture; empty when there is no new one. It is made beside the run, so that its
    step may have been told without it."""
    preview_content_type: str = ""


class StaleEpoch(Exception):
    """The caller's epoch is older than one this worker has seen: another scheduler leads, stop acting."""


class WorkerBusy(Exception):
    """The worker has another attempt in hand: ask it for a report and look again."""
