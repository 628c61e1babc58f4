"""From our values to the messages of the API."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from billing import prices
from billing.ledger import Balance
from billing.plans import PlanLimits
from billing.prices import ChargeMode, PricingSnapshot
from billing.refusals import Refusal
from billing.v1 import billing_pb2
from gpu_worker.contract import ImageFile, Progress, RenderKind, VideoFile
from gpu_worker.prompt import without_urls
from scheduler.answers import Explained, QueuesView, TierView, WorkerRun, WorkerView
from scheduler.frontdoor.foresight import Option
from scheduler.policy.explain import Before, Bound, Place
from scheduler.policy.ids import Tier
from scheduler.store.accounts import Visibility
from scheduler.store.jobs import JobEvent, JobKind, JobReceipt, JobState, StoredJob
from scheduler.store.operations import Pause, Slot
from scheduler.store.overview import Decision
from scheduler.updates import QueueReason, QueueStatus
from scheduler.v1 import fleet_pb2, job_pb2

_TIER: Mapping[Tier, job_pb2.Tier.ValueType] = {
    Tier.FAST: job_pb2.TIER_FAST,
    Tier.RELAX: job_pb2.TIER_RELAX,
}
_VISIBILITY: Mapping[Visibility, job_pb2.Visibility.ValueType] = {
    Visibility.PUBLIC: job_pb2.VISIBILITY_PUBLIC,
    Visibility.PRIVATE: job_pb2.VISIBILITY_PRIVATE,
}
_CHARGE_MODE: Mapping[ChargeMode, job_pb2.ChargeMode.ValueType] = {
    ChargeMode.FAST: job_pb2.CHARGE_MODE_FAST,
    ChargeMode.METERED_FAST: job_pb2.CHARGE_MODE_METERED_FAST,
    ChargeMode.RELAX: job_pb2.CHARGE_MODE_RELAX,
}
_KIND: Mapping[JobKind, job_pb2.JobKind.ValueType] = {
    JobKind.IMAGINE: job_pb2.JOB_KIND_IMAGINE,
    JobKind.VARIATION: job_pb2.JOB_KIND_VARIATION,
    JobKind.REROLL: job_pb2.JOB_KIND_REROLL,
    JobKind.UPSCALE: job_pb2.JOB_KIND_UPSCALE,
}
_ALGORITHM: Mapping[RenderKind, job_pb2.UpscaleAlgorithm.ValueType] = {
    RenderKind.UPSCALE_LIGHT: job_pb2.UPSCALE_ALGORITHM_LIGHT,
    RenderKind.UPSCALE_DETAILED: job_pb2.UPSCALE_ALGORITHM_DETAILED,
    RenderKind.UPSCALE_MAX: job_pb2.UPSCALE_ALGORITHM_MAX,
}
ALGORITHM_OF: Mapping[int, RenderKind] = {number: kind for kind, number in _ALGORITHM.items()}
_STATE: Mapping[JobState, job_pb2.JobState.ValueType] = {
    JobState.QUEUED: job_pb2.JOB_STATE_QUEUED,
    JobState.RUNNING: job_pb2.JOB_STATE_RUNNING,
    JobState.SUCCEEDED: job_pb2.JOB_STATE_SUCCEEDED,
    JobState.FAILED: job_pb2.JOB_STATE_FAILED,
    JobState.CANCELLED: job_pb2.JOB_STATE_CANCELLED,
}
STATE_OF: Mapping[int, JobState] = {number: state for state, number in _STATE.items()}
_QUEUE_REASON: Mapping[QueueReason, job_pb2.QueueReason.ValueType] = {
    QueueReason.WAITING_FOR_GPU: job_pb2.QUEUE_REASON_WAITING_FOR_GPU,
    QueueReason.CONCURRENCY_LIMIT: job_pb2.QUEUE_REASON_CONCURRENCY_LIMIT,
    QueueReason.FUNDS: job_pb2.QUEUE_REASON_FUNDS,
    QueueReason.TIER_PAUSED: job_pb2.QUEUE_REASON_TIER_PAUSED,
    QueueReason.NO_WORKER: job_pb2.QUEUE_REASON_NO_WORKER,
    QueueReason.SCHEDULER_STARTING: job_pb2.QUEUE_REASON_SCHEDULER_STARTING,
    QueueReason.PARKED: job_pb2.QUEUE_REASON_PARKED,
}


def timestamp(at: datetime | None) -> Timestamp | None:
    """Return an aware datetime as the API has it; None stays an absent field."""
    if at is None:
        return None
    message = Timestamp()
    message.FromDatetime(at)
    return message


def tier(value: Tier) -> job_pb2.Tier.ValueType:
    """Return the API's name of a tier."""
    return _TIER[value]


def visibility(value: Visibility) -> job_pb2.Visibility.ValueType:
    """Return the API's name of a visibility."""
    return _VISIBILITY[value]


def job_name(account_id: str, job_id: str) -> str:
    """Return the resource name of a job."""
    return f"accounts/{account_id}/jobs/{job_id}"


def job(stored: StoredJob, status: QueueStatus | None) -> job_pb2.Job:
    """Return a job as its owner sees it; `status` only while it waits or is parked."""
    message = _job_without_money(stored)
    message.charge_mode = _CHARGE_MODE[stored.pricing.charge_mode]
    message.price.CopyFrom(price(stored.pricing, stored.predicted_ms))
    message.event_sequence = stored.event_seq
    message.cancel_requested = stored.cancel_wanted
    if stored.receipt is not None:
        message.receipt.CopyFrom(receipt(stored.receipt))
    if stored.failure_reason is not None:
        message.failure.reason = stored.failure_reason
        message.failure.sentence = stored.failure_sentence or ""
    if status is not None and not stored.state.ended:
        message.queue_status.CopyFrom(queue_status(status))
    return message


def job_in_feed(stored: StoredJob) -> job_pb2.Job:
    """Return a finished public job as everybody sees it: what was drawn, and nothing about who paid what.

    Nor the URLs of pictures in its prompt: they may let anybody in who has them.
    """
    message = _job_without_money(stored)
    message.prompt = without_urls(stored.prompt)
    message.ClearField("pictures_expire_time")  # by its account's plan
    return message


def job_not_made(stored: StoredJob, status: QueueStatus | None) -> job_pb2.Job:
    """Return a job that was only asked about: it has no name, no seed and no history."""
    message = job(stored, status)
    for field in ("name", "uid", "seed", "create_time", "event_sequence"):
        message.ClearField(field)
    return message


def _job_without_money(stored: StoredJob) -> job_pb2.Job:
    source = "" if stored.source_job_id is None else job_name(stored.account_id, stored.source_job_id)
    return job_pb2.Job(
        name=job_name(stored.account_id, stored.job_id),
        uid=stored.job_id,
        kind=_KIND[stored.kind],
        state=_STATE[stored.state],
        tier=_TIER[stored.tier],
        visibility=_VISIBILITY[stored.visibility],
        prompt=stored.prompt,
        model=stored.spec.model,
        width=stored.spec.width,
        height=stored.spec.height,
        steps=stored.spec.steps,
        seed=stored.spec.seed,
        source_job=source,
        source_image=stored.source_image or 0,
        create_time=timestamp(stored.created_at),
        start_time=timestamp(stored.started_at),
        end_time=timestamp(stored.ended_at),
        images=[image(stored, picture) for picture in stored.images],
        warnings=stored.warnings,
        upscale_algorithm=_ALGORITHM.get(stored.spec.kind, job_pb2.UPSCALE_ALGORITHM_UNSPECIFIED),
        videos=[video(stored, film) for film in stored.videos],
        pictures_expire_time=timestamp(stored.expired_at or stored.kept_until),
        hidden=None
        if stored.hidden is None
        else job_pb2.Hidden(category=stored.hidden.category, hide_time=timestamp(stored.hidden.at)),
    )


def image(stored: StoredJob, picture: ImageFile) -> job_pb2.Image:
    """Return one picture of a job."""
    return job_pb2.Image(
        name=f"{job_name(stored.account_id, stored.job_id)}/images/{picture.index}",
        file_name=picture.file_name,
        content_type=picture.content_type,
        size_bytes=picture.size_bytes,
        sha256=picture.sha256,
        width=picture.width,
        height=picture.height,
        seed=picture.seed,
    )


def video(stored: StoredJob, film: VideoFile) -> job_pb2.Video:
    """Return one video of a job."""
    return job_pb2.Video(
        name=f"{job_name(stored.account_id, stored.job_id)}/videos/{video_id(film)}",
        file_name=film.file_name,
        content_type=film.content_type,
        size_bytes=film.size_bytes,
        sha256=film.sha256,
        width=film.width,
        height=film.height,
        frames=film.frames,
    )


def video_id(film: VideoFile) -> str:
    """Return what a video is called among those of its job."""
    return film.content_type.rpartition("/")[2]


def archive(account_id: str, images: int, *, rest: bool) -> job_pb2.Archive:
    """Return an account's archive of so many images: all, or the `rest` behind one."""
    return job_pb2.Archive(
        file_name=f"darkroom_{account_id}.zip",
        content_type="application/zip",
        images=images,
        rest=rest,
    )


def price(pricing: PricingSnapshot, predicted_ms: int) -> job_pb2.Price:
    """Return what a job is expected to cost, with a sentence for a person."""
    message = job_pb2.Price(
        charge_mode=_CHARGE_MODE[pricing.charge_mode],
        predicted_gpu_ms=predicted_ms,
        currency_code=pricing.currency,
    )
    if pricing.charge_mode is ChargeMode.RELAX:
        message.sentence = "Free: relax jobs cost nothing."
        return message
    least_ms, most_ms = (prices.billed_ms(predicted_ms, bp) for bp in prices.foreseen_bp(pricing))
    message.billed_gpu_ms = most_ms
    seconds = f"About {_range(*(f'{ms / 1000:.0f}' for ms in (least_ms, most_ms)))} s of fast time"
    by_type = "" if least_ms == most_ms else ", depending on the type of GPU"
    if pricing.charge_mode is ChargeMode.FAST:
        message.sentence = f"{seconds} from your plan {pricing.plan}{by_type}; what is charged is measured."
        return message
    price_of = pricing.overage_micros_per_minute
    least_micros, most_micros = (prices.price_micros(ms, price_of) for ms in (least_ms, most_ms))
    message.amount_micros = most_micros
    amount = _range(*(_money(micros, pricing.currency) for micros in (least_micros, most_micros)))
    message.sentence = (
        f"Your plan's fast time is used up, and you allow overage. {seconds} at "
        f"{_money(price_of, pricing.currency)} a GPU-minute: about {amount}{by_type}; what is charged is "
        "measured."
    )
    return message


def _range(least: str, most: str) -> str:
    return most if least == most else f"{least} to {most}"


def receipt(paid: JobReceipt) -> job_pb2.Receipt:
    """Return what a finished job did cost."""
    return job_pb2.Receipt(
        gpu_ms=paid.gpu_ms,
        billed_gpu_ms=paid.billed_gpu_ms,
        amount_micros=paid.amount_micros,
        currency_code=paid.currency_code,
        balance_before_ms=paid.balance_before_ms,
        balance_after_ms=paid.balance_after_ms,
        attempts=paid.attempts,
        worker=paid.worker,
        waited_ms=paid.waited_ms,
        encode_ms=paid.encode_ms,
        denoise_ms=paid.denoise_ms,
        decode_ms=paid.decode_ms,
        upscale_ms=paid.upscale_ms,
        reproduction_json=json.dumps(paid.reproduction, sort_keys=True),
    )


def queue_status(status: QueueStatus) -> job_pb2.QueueStatus:
    """Return why a job waits."""
    return job_pb2.QueueStatus(
        reason=_QUEUE_REASON[status.reason],
        sentence=status.sentence,
        position=status.position,
        start_p50_ms=None if status.start is None else status.start.p50_ms,
        start_p90_ms=None if status.start is None else status.start.p90_ms,
    )


def explanation(
    stored: StoredJob, sentences: Sequence[str], status: QueueStatus | None, told: Explained | None
) -> job_pb2.Explanation:
    """Return why a job is where it is; `told` is the scheduler's word, None if it does not know the job."""
    message = job_pb2.Explanation(
        job=job_name(stored.account_id, stored.job_id),
        state=_STATE[stored.state],
        tier=_TIER[stored.tier],
        sentences=sentences,
        queue_status=None if status is None else queue_status(status),
    )
    if told is None:
        return message
    of = told.explanation
    if of.place is not None:
        message.place.CopyFrom(_place(of.place))
    if of.before is not None:
        message.ahead.CopyFrom(_ahead(of.before, told.at_ms))
    if of.bound is not None:
        message.bound.CopyFrom(_bound(of.bound))
    if of.ends_ms is not None:
        message.end_ms = max(0, of.ends_ms - told.at_ms)
    return message


def _place(of: Place) -> job_pb2.Place:
    return job_pb2.Place(
        position=of.position,
        of=of.of,
        tag_ms=of.tag // 1000,
        served_ms=of.served // 1000,
        memory_ms=of.memory // 1000,
        used_ms=round(of.used_per_weight_ms),
    )


def _ahead(of: Before, at_ms: int) -> job_pb2.Ahead:
    return job_pb2.Ahead(
        own_account=of.own,
        earlier_jobs=of.earlier,
        running=of.running,
        parked=of.parked,
        fast_waiting=of.fast_waiting,
        soonest_end_ms=None if of.soonest_end_ms is None else max(0, of.soonest_end_ms - at_ms),
    )


def _bound(of: Bound) -> job_pb2.WaitBound:
    return job_pb2.WaitBound(
        within_ms=of.within_ms,
        newcomer_ms=of.newcomer_ms,
        whatever_ms=of.whatever_ms,
        gpus=of.gpus,
        calm_ms=of.calm_ms,
    )


def state_event(event: JobEvent, stored: StoredJob, status: QueueStatus | None) -> job_pb2.StateEvent:
    """Return a durable change, with the job as it is now."""
    return job_pb2.StateEvent(
        sequence=event.seq,
        time=timestamp(event.at),
        state=_STATE[event.state],
        sentence=event.sentence,
        job=job(stored, status),
    )


def progress(newest: Progress) -> job_pb2.Progress:
    """Return how far a running job is."""
    return job_pb2.Progress(
        step=newest.step,
        steps=newest.steps,
        percent=100 * newest.step // max(1, newest.steps),
        preview=newest.preview,
        preview_content_type=newest.preview_content_type,
    )


def estimate_option(of: Option) -> job_pb2.EstimateOption:
    """Return what a job would be on certain terms."""
    message = job_pb2.EstimateOption(tier=_TIER[of.tier], plan=f"plans/{of.plan}", present=of.present)
    if isinstance(of.pricing, Refusal):
        message.refusal.reason = of.pricing.reason
        message.refusal.sentence = str(of.pricing)
    else:
        message.price.CopyFrom(price(of.pricing, of.predicted_ms))
    if of.outlook is not None:
        message.delayed_jobs = of.outlook.delayed_jobs
        message.delayed_ms = of.outlook.delayed_ms
        if of.outlook.start is not None:
            message.start_p50_ms = of.outlook.start.p50_ms
            message.start_p90_ms = of.outlook.start.p90_ms
    return message


def worker(worker_id: str, view: WorkerView | None, slot: Slot, at: datetime) -> fleet_pb2.Worker:
    """Return a worker; `view` is None if it is not there."""
    aside_until = slot.aside_at(at)
    message = fleet_pb2.Worker(
        name=f"workers/{worker_id}",
        draining=slot.draining,
        drain_reason=slot.drain_reason,
        set_aside_until_time=timestamp(aside_until),
        hand_over_time=timestamp(slot.hand_over_at),
    )
    if slot.draining:
        message.sentence = f"Drained by an operator: {slot.drain_reason}"
    if view is not None and view.leaves_since_ms is not None:
        message.sentence = view.leaves_because
    if aside_until is not None:
        message.sentence = "It lost several jobs in a row and is set aside for a while."
    if view is None:
        message.state = fleet_pb2.WORKER_STATE_ABSENT
        return message
    if not view.healthy:
        message.sentence = view.sentence
    message.state = _worker_state(view, slot.draining, aside_until)
    since_ms = {
        fleet_pb2.WORKER_STATE_IDLE: view.idle_since_ms,
        fleet_pb2.WORKER_STATE_RUNNING: None if view.active is None else view.active.started_ms,
        fleet_pb2.WORKER_STATE_LEAVING: view.leaves_since_ms,
    }.get(message.state)
    if since_ms is not None:
        message.state_time.FromMilliseconds(since_ms)
    message.device = view.device
    message.speed_permille = view.speed_permille
    message.memory_bytes = view.memory_bytes
    message.memory_bytes_used = view.memory_used_bytes
    message.warm_models.extend(view.warm_models)
    if view.active is not None:
        message.active.CopyFrom(_worker_run(view.active))
    message.parked.extend(_worker_run(run) for run in view.parked)
    return message


def _worker_state(
    view: WorkerView, draining: bool, aside_until: datetime | None
) -> fleet_pb2.WorkerState.ValueType:
    if not view.healthy:
        return fleet_pb2.WORKER_STATE_UNHEALTHY
    if aside_until is not None:
        return fleet_pb2.WORKER_STATE_SET_ASIDE
    if view.leaves_since_ms is not None:
        return fleet_pb2.WORKER_STATE_LEAVING
    if draining:
        return fleet_pb2.WORKER_STATE_DRAINING
    return fleet_pb2.WORKER_STATE_IDLE if view.active is None else fleet_pb2.WORKER_STATE_RUNNING


def _worker_run(run: WorkerRun) -> fleet_pb2.WorkerRun:
    message = fleet_pb2.WorkerRun(
        attempt=run.attempt_id,
        job=job_name(run.account_id, run.job_id),
        tier=_TIER[run.tier],
        step=run.step,
        steps=run.steps,
    )
    message.start_time.FromMilliseconds(run.started_ms)
    if run.parked_since_ms is not None:
        message.park_time.FromMilliseconds(run.parked_since_ms)
    return message


def decision(one: Decision) -> fleet_pb2.Decision:
    """Return one decision."""
    return fleet_pb2.Decision(
        time=timestamp(one.at),
        kind=fleet_pb2.DecisionKind.Value(f"DECISION_KIND_{one.what.name}"),
        tier=_TIER[one.tier],
        job=job_name(one.account_id, one.job_id),
        worker=f"workers/{one.worker_id}" if one.worker_id else "",
        sentence=one.reason,
    )


def queues(view: QueuesView, pauses: Mapping[Tier, Pause]) -> fleet_pb2.Queues:
    """Return what waits and runs, and how the GPUs are shared."""
    return fleet_pb2.Queues(
        tiers=[tier_queue(of, pauses[of.tier]) for of in view.tiers],
        gpus=view.gpus,
        idle_gpus=view.idle_gpus,
        fast_gpus=view.fast_gpus,
        relax_floor_gpus=view.relax_floor_gpus,
        wanted_gpus=view.wanted_gpus,
    )


def tier_queue(of: TierView, pause: Pause) -> fleet_pb2.TierQueue:
    """Return what waits and runs in one tier."""
    return fleet_pb2.TierQueue(
        tier=_TIER[of.tier],
        waiting=of.waiting,
        held=of.held,
        running=of.running,
        parked=of.parked,
        oldest_wait_ms=of.oldest_wait_ms,
        paused=pause.paused,
        pause_reason=pause.reason,
    )


def balance(of: Balance) -> billing_pb2.Balance:
    """Return an account's fast time in the present period."""
    return billing_pb2.Balance(
        account=f"accounts/{of.account_id}",
        plan=f"plans/{of.plan}",
        granted_ms=of.granted_ms,
        used_ms=of.used_ms,
        held_ms=of.held_ms,
        available_ms=of.available_ms,
        period_start=timestamp(of.period_start),
        renew_time=timestamp(of.renews_at),
        overage_allowed=of.overage_allowed,
        overage_posted_micros=of.overage_posted_micros,
        overage_held_micros=of.overage_held_micros,
        spend_cap_micros=of.spend_cap_micros,
        currency_code=of.currency,
        relax_used_ms=of.relax_used_ms,
    )


def limits(of: PlanLimits) -> billing_pb2.PlanLimits:
    """Return how many jobs an account may have."""
    return billing_pb2.PlanLimits(running=of.running, relax_running=of.relax_running, accepted=of.accepted)


def _money(micros: int, currency: str) -> str:
    return f"{micros / 1_000_000:.4f} {currency}"
