"""What a job is expected to cost: the models file's word at first, then that of its like."""

from __future__ import annotations

import math
import uuid
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.contract import PicturePart, RenderKind, StageTimes, TextPart
from gpu_worker.models import UnknownModel
from scheduler.estimator import Estimator, Shape, observation, shape_of
from scheduler.frontdoor import translate
from scheduler.v1 import job_pb2
from tests.estimator.estimator_building import ENTRY, GPU, MODELS, a_shape, a_spec, rows_of, seen

_TIMES_MS = st.integers(0, 600_000)
_SIDES = st.integers(1, 16).map(lambda number: number * 64)


def test_before_anything_was_measured_the_models_file_has_the_word() -> None:
    predicted = Estimator(MODELS).predict(a_shape())
    assert (predicted.cost_ms, predicted.step_ms, predicted.seen) == (60_000, 3_000, 0)


def test_variation_begins_at_its_own_figure_for_the_steps_it_does() -> None:
    shape = shape_of(a_spec(strength_permille=ENTRY.variation_strength_permille))
    predicted = Estimator(MODELS).predict(shape)
    assert shape.steps == 8
    assert (predicted.cost_ms, predicted.step_ms) == (18_000, 2_250)


def test_more_steps_and_more_pixels_than_the_entrys_default_cost_more_from_the_beginning() -> None:
    estimator = Estimator(MODELS)
    assert estimator.predict(a_shape(steps=40)).cost_ms == 120_000
    assert estimator.predict(a_shape(1024, 512)).cost_ms == round(60_000 * 2**1.6)


def test_half_of_what_was_believed_is_left_by_each_measured_job() -> None:
    shape = a_shape()
    costs = [
        Estimator(MODELS, rows_of([seen(shape, step_ms=100, rest_ms=0)] * times)).predict(shape).cost_ms
        for times in (1, 2, 3)
    ]
    # Nothing but the file stands before the two stages that a first job informs: its size, and its shape.
    assert costs == [2_000 + 58_000 // 4, 2_000 + 58_000 // 16, round(2_000 + 58_000 / 64)]


def test_exact_shape_has_the_last_word() -> None:
    mine, longer = a_shape(steps=20), a_shape(steps=40)
    estimator = Estimator(
        MODELS, rows_of([seen(mine, step_ms=90, rest_ms=10)] * 40 + [seen(longer, step_ms=110)] * 40)
    )
    predicted = estimator.predict(mine)
    assert (predicted.cost_ms, predicted.step_ms, predicted.seen) == (1_810, 90, 40)


def test_unseen_number_of_steps_takes_the_step_and_the_rest_of_its_size() -> None:
    estimator = Estimator(MODELS, rows_of([seen(a_shape(steps=20), step_ms=100, rest_ms=500)] * 40))
    predicted = estimator.predict(a_shape(steps=50))
    assert (predicted.cost_ms, predicted.step_ms, predicted.seen) == (5_500, 100, 0)


def test_unseen_size_is_scaled_from_the_others_and_the_nearer_ones_count_for_more() -> None:
    observations = [
        seen(a_shape(256, 256), step_ms=1_000, rest_ms=0),
        seen(a_shape(512, 512), step_ms=20_000, rest_ms=0),
    ]
    estimator = Estimator(MODELS, rows_of(observations * 40))
    sides = (64, 320, 448, 1024)
    scaled = [estimator.predict(a_shape(side, side)).step_ms / (side * side) ** 1.6 for side in sides]
    assert 1_000 / 256**3.2 < scaled[1] < scaled[2] < 20_000 / 512**3.2
    assert scaled[1] < scaled[0] < scaled[2]
    assert scaled[1] < scaled[3] < scaled[2]


def test_a_size_drawn_once_hardly_counts_beside_one_that_was_drawn_often() -> None:
    often, once = a_shape(512, 512), a_shape(512, 576)
    rows = rows_of([*[seen(often, step_ms=100, rest_ms=0)] * 40, seen(once, step_ms=9_000, rest_ms=0)])
    only_often = rows_of([seen(often, step_ms=100, rest_ms=0)] * 40)
    asked = a_shape(448, 512)
    with_once = Estimator(MODELS, rows).predict(asked).cost_ms
    assert with_once < 3 * Estimator(MODELS, only_often).predict(asked).cost_ms


def test_kinds_and_models_do_not_teach_each_other() -> None:
    estimator = Estimator(MODELS, rows_of([seen(a_shape())] * 40))
    variation = a_shape(steps=8, kind=RenderKind.VARIATION)
    assert estimator.predict(variation).cost_ms == 18_000


def test_prediction_over_all_devices_is_the_mean_by_how_much_each_drew() -> None:
    shape = a_shape()
    rows = rows_of(
        [seen(shape, step_ms=100, rest_ms=0, device="fast one")] * 60
        + [seen(shape, step_ms=400, rest_ms=0, device="slow one")] * 30
    )
    estimator = Estimator(MODELS, rows)
    assert estimator.predict(shape, "fast one").cost_ms == 2_000
    assert estimator.predict(shape, "slow one").cost_ms == 8_000
    over_all = estimator.predict(shape)
    assert (over_all.cost_ms, over_all.seen) == (4_000, 90)
    assert estimator.predict(shape, "never seen") == over_all


def test_times_are_learned_as_those_of_a_worker_of_speed_1000() -> None:
    measured = StageTimes(encode_ms=40, denoise_ms=1_000, decode_ms=60)
    taught = observation(a_spec(), measured, device=GPU, speed_permille=2_000)
    assert (taught.step_us, taught.rest_us) == (100_000, 200_000)


def test_a_variations_step_is_one_of_those_that_it_did() -> None:
    taught = observation(
        a_spec(steps=20, strength_permille=400),
        StageTimes(denoise_ms=800),
        device=GPU,
        speed_permille=1_000,
    )
    assert (taught.shape.steps, taught.step_us) == (8, 100_000)


def test_a_job_that_stops_early_is_expected_to_take_its_share_of_the_steps() -> None:
    stopped, strayed = (
        replace(a_spec(), stop_percent=40),
        replace(a_spec(strength_permille=400), stop_percent=50),
    )
    assert [shape_of(spec).steps for spec in (stopped, strayed)] == [8, 4]
    assert shape_of(replace(a_spec(steps=1), stop_percent=10)).steps == 1
    assert Estimator(MODELS).predict(shape_of(stopped)).cost_ms == 24_000


def test_each_part_of_a_prompt_asks_the_denoiser_once_more_in_each_step() -> None:
    text, picture = TextPart(text="a", share_ppm=1), PicturePart(path="p", share_ppm=1)
    steps = [
        shape_of(replace(a_spec(), parts=parts, pictures=pictures)).steps
        for parts, pictures in (((), ()), ((text,), ()), ((text,), (picture,)), ((text, text), (picture,)))
    ]
    assert steps == [20, 20, 30, 40]


def test_upscale_begins_at_its_own_figure_and_costs_as_much_more_as_it_is_larger() -> None:
    estimator = Estimator(MODELS)
    at_default = a_shape(1728, 1728, kind=RenderKind.UPSCALE_DETAILED)
    half = a_shape(1728, 864, kind=RenderKind.UPSCALE_DETAILED)
    assert estimator.predict(at_default).cost_ms == 60_000
    assert estimator.predict(half).cost_ms == 30_000
    learned = Estimator(MODELS, rows_of([seen(at_default, step_ms=0, rest_ms=8_000)] * 60))
    assert learned.predict(half).cost_ms == 4_000


def test_what_an_upscale_draws_is_not_mistaken_for_the_steps_of_a_grid() -> None:
    spec = replace(a_spec(strength_permille=0), kind=RenderKind.UPSCALE_LIGHT)
    assert shape_of(spec).steps == 20
    taught = observation(spec, StageTimes(encode_ms=10, upscale_ms=900), device=GPU, speed_permille=1_000)
    assert (taught.step_us, taught.rest_us) == (0, 910_000)


def test_one_job_that_took_a_hundred_times_as_long_moves_a_settled_estimate_by_a_sixteenth() -> None:
    shape = a_shape()
    rows = rows_of([seen(shape, step_ms=100)] * 40 + [seen(shape, step_ms=10_000)])
    assert Estimator(MODELS, rows).predict(shape).step_ms == round(100 * (1 + 1 / 16))


def test_a_cold_first_job_is_forgotten_after_a_few_dozen() -> None:
    shape = a_shape()
    rows = rows_of([seen(shape, step_ms=1_000), *[seen(shape, step_ms=100)] * 50])
    assert Estimator(MODELS, rows).predict(shape).step_ms == pytest.approx(100, rel=0.1)


def test_a_machine_that_became_ten_times_slower_is_believed_within_fifty_jobs() -> None:
    shape = a_shape()
    rows = rows_of([seen(shape, step_ms=100)] * 1_000 + [seen(shape, step_ms=1_000)] * 50)
    assert Estimator(MODELS, rows).predict(shape).step_ms == pytest.approx(1_000, rel=0.35)


def test_what_was_once_measured_as_nothing_can_still_become_something() -> None:
    shape = a_shape()
    rows = rows_of([seen(shape, step_ms=0, rest_ms=0)] * 3 + [seen(shape, step_ms=4, rest_ms=4)] * 200)
    assert rows[0].step_us == pytest.approx(4_000, rel=0.01)


def test_a_job_is_accepted_at_what_its_like_have_taken() -> None:
    estimator = Estimator(MODELS, rows_of([seen(a_shape(), step_ms=100, rest_ms=500)] * 40))
    request = job_pb2.CreateJobRequest(request_id=str(uuid.UUID(int=1)))
    request.imagine.prompt = "a hare"
    assert translate.imagine(request, MODELS, estimator).predicted_ms == 2_500
    request.imagine.prompt = "a hare --w 1024 --h 512"
    assert translate.imagine(request, MODELS, estimator).predicted_ms == round(2_500 * 2**1.6)


def test_a_model_that_is_not_offered_has_no_prediction() -> None:
    with pytest.raises(UnknownModel):
        Estimator(MODELS).predict(Shape(kind=RenderKind.IMAGINE, model="gone", width=64, height=64, steps=1))


@given(width=_SIDES, height=_SIDES, steps=st.integers(1, 10_000), step_ms=_TIMES_MS, rest_ms=_TIMES_MS)
def test_every_prediction_fits_its_column(
    width: int, height: int, steps: int, step_ms: int, rest_ms: int
) -> None:
    estimator = Estimator(MODELS, rows_of([seen(a_shape(64, 64, 1), step_ms=step_ms, rest_ms=rest_ms)] * 9))
    predicted = estimator.predict(a_shape(width, height, steps))
    assert 1 <= predicted.step_ms <= predicted.cost_ms < 2**31


@given(
    taught=st.lists(st.tuples(_SIDES, _SIDES, _TIMES_MS, _TIMES_MS), max_size=8),
    width=_SIDES,
    height=_SIDES,
    fewer=st.integers(1, 150),
    more=st.integers(1, 150),
)
def test_more_steps_never_cost_less(
    taught: list[tuple[int, int, int, int]], width: int, height: int, fewer: int, more: int
) -> None:
    """Of shapes that were not themselves measured: one that was has its own mean, with its own luck."""
    fewer, more = sorted((fewer, more))
    estimator = Estimator(
        MODELS,
        rows_of(
            seen(a_shape(w, h, 200), step_ms=step_ms, rest_ms=rest_ms) for w, h, step_ms, rest_ms in taught
        ),
    )
    cost_of_fewer = estimator.predict(a_shape(width, height, fewer)).cost_ms
    assert cost_of_fewer <= estimator.predict(a_shape(width, height, more)).cost_ms


@given(width=_SIDES, height=_SIDES, steps=st.integers(1, 150), step_ms=_TIMES_MS, rest_ms=_TIMES_MS)
def test_a_constant_cost_is_learned_within_forty_jobs(
    width: int, height: int, steps: int, step_ms: int, rest_ms: int
) -> None:
    shape = a_shape(width, height, steps)
    rows = rows_of([seen(shape, step_ms=step_ms, rest_ms=rest_ms)] * 40)
    true_ms = max(1, min(2**31 - 1, step_ms * steps + rest_ms))
    assert abs(Estimator(MODELS, rows).predict(shape).cost_ms - true_ms) <= 1


@given(
    step_us=st.lists(st.integers(0, 10**9), min_size=1, max_size=60),
    others=st.lists(st.tuples(_SIDES, _SIDES, _TIMES_MS), max_size=5),
)
def test_what_was_learned_lies_within_what_was_observed_and_a_prediction_between_it_and_the_rest(
    step_us: list[int], others: list[tuple[int, int, int]]
) -> None:
    shape = a_shape()
    (row,) = rows_of(seen(shape, step_ms=us / 1000, rest_ms=0) for us in step_us)
    assert min(step_us) <= row.step_us * (1 + 1e-12)
    assert row.step_us <= max(step_us) * (1 + 1e-12)

    elsewhere = rows_of(seen(a_shape(w, h, 9), step_ms=ms, rest_ms=0) for w, h, ms in others)
    without, whole = Estimator(MODELS, elsewhere), Estimator(MODELS, [row, *elsewhere])
    predicted, believed = whole.predict(shape), without.predict(shape)
    bounds = [believed.step_ms, row.step_us / 1000, 3_000]
    bounds += [ms * (shape.pixels / (w * h)) ** 1.6 for w, h, ms in others]
    assert math.floor(min(bounds)) <= max(1, predicted.step_ms)
    assert predicted.step_ms <= math.ceil(max(1, *bounds))
