"""What people see: sentences without foreign control characters, pictures only where they make sense."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image as Pictures
from rich.console import Console

from scheduler.client.terminal import (
    HalfBlocks,
    JobView,
    can_show_pictures,
    contact_sheet,
    duration,
    live,
    money,
    plain,
    print_picture,
    receipt_sentence,
)
from scheduler.v1 import job_pb2
from scheduler.v1.job_pb2 import Progress, QueueStatus, Receipt, WatchJobResponse
from tests.client.scripted_service import a_job, a_png, an_event


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0.0 s"),
        (3_449, "3.4 s"),
        (59_960, "1 min"),
        (54_000_000, "15 h"),
        (3_600_500, "1 h 0.5 s"),
        (723_400, "12 min 3.4 s"),
        (53_996_600, "14 h 59 min 56.6 s"),
        (-90_000, "-1 min 30.0 s"),
    ],
)
def test_durations_are_said_to_a_tenth_of_a_second(ms: int, text: str) -> None:
    assert duration(ms) == text


def test_money_is_said_to_the_cent_or_finer_where_it_matters() -> None:
    assert money(20_000_000, "EUR") == "20.00 EUR"
    assert money(2_800, "EUR") == "0.0028 EUR"
    assert money(1, "EUR") == "0.000001 EUR"


def test_foreign_text_cannot_control_the_terminal() -> None:
    assert plain("red\x1b]0;title\x07 \u202ecat\n") == "red ]0;title   cat "


@pytest.mark.parametrize(
    ("receipt", "tier", "said"),
    [
        (Receipt(gpu_ms=3_400, billed_gpu_ms=3_400), job_pb2.TIER_FAST, "charged 3.4 s of fast time"),
        (Receipt(gpu_ms=3_400), job_pb2.TIER_RELAX, "relax costs nothing"),
        (Receipt(gpu_ms=3_400), job_pb2.TIER_FAST, "not charged"),
        (
            Receipt(gpu_ms=3_400, billed_gpu_ms=3_400, amount_micros=30_000, currency_code="EUR"),
            job_pb2.TIER_FAST,
            "charged 0.03 EUR as metered fast",
        ),
    ],
)
def test_a_receipt_says_what_was_charged(receipt: Receipt, tier: job_pb2.Tier, said: str) -> None:
    receipt.balance_before_ms, receipt.balance_after_ms = 60_000, 56_600
    sentence = receipt_sentence(a_job(receipt=receipt, tier=tier))
    assert said in sentence
    assert sentence.endswith("fast time before 1 min, after 56.6 s")


def test_a_live_line_shows_the_place_then_the_steps_then_the_end() -> None:
    view = JobView(a_job())
    view.apply(WatchJobResponse(queue_status=QueueStatus(position=3, sentence="2 jobs are ahead of it.")))
    assert view.status().plain == "place 3: 2 jobs are ahead of it."
    view.apply(an_event(2, job_pb2.JOB_STATE_RUNNING))
    view.apply(WatchJobResponse(progress=Progress(step=12, steps=20)))
    assert view.status().plain == "step 12 of 20"
    assert view.bar().percentage_completed == 60
    view.apply(an_event(3, job_pb2.JOB_STATE_QUEUED))
    view.apply(an_event(4, job_pb2.JOB_STATE_RUNNING))
    assert view.bar().percentage_completed == 0
    view.apply(an_event(5, job_pb2.JOB_STATE_SUCCEEDED))
    assert view.status().plain == "succeeded"
    assert view.bar().percentage_completed == 100


def test_a_preview_is_drawn_below_the_line() -> None:
    view = JobView(a_job(state=job_pb2.JOB_STATE_RUNNING), preview_columns=10)
    view.apply(WatchJobResponse(progress=Progress(step=1, steps=20, preview=a_png((200, 10, 20)))))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
    with console.capture() as captured:
        console.print(view)
    lines = captured.get().splitlines()
    assert len(lines) == 6
    assert lines[1].count("▀") == 10
    assert "38;2;200;10;20" in lines[1]


def test_half_blocks_keep_the_shape_of_the_picture_and_fit_the_terminal() -> None:
    picture = Pictures.new("RGB", (200, 100))
    console = Console(file=io.StringIO(), width=12, color_system=None)
    with console.capture() as captured:
        console.print(HalfBlocks(picture, 16), end="")
    assert captured.get().splitlines() == ["▀" * 12] * 4


def test_pictures_are_for_terminals_unless_forced() -> None:
    pipe = Console(file=io.StringIO())
    assert not can_show_pictures(pipe)
    assert can_show_pictures(Console(file=io.StringIO(), force_terminal=True, color_system="256"))
    assert not can_show_pictures(Console(file=io.StringIO(), force_terminal=True, color_system=None))
    print_picture(pipe, Pictures.new("RGB", (8, 8), (1, 2, 3)), columns=8)
    assert "38;2;1;2;3" in pipe.file.getvalue()  # type: ignore[attr-defined]


def test_nothing_is_live_in_a_pipe() -> None:
    console = Console(file=io.StringIO())
    with live(console, JobView(a_job())):
        pass
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_contact_sheet_has_two_pictures_a_row(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    paths = []
    for number, colour in enumerate(colours):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(a_png(colour, (32, 16)))
    sheet = contact_sheet(paths)
    assert sheet.size == (64, 32)
    corners = [(0, 0), (40, 0), (0, 20), (40, 20)]
    assert [sheet.getpixel(corner) for corner in corners] == colours
