"""Names of jobs as people type and paste them."""

from __future__ import annotations

import pytest

from scheduler.client.names import image_name, is_job, job_name, named
from tests.client.scripted_service import JOB, UID

MINE = f"accounts/-/jobs/{UID}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (UID, MINE),
        (f"  {UID}\n", MINE),
        (UID.replace("-", ""), MINE),
        (f"{UID}/3", f"{MINE}/images/3"),
        (f"{UID}/mp4", f"{MINE}/videos/mp4"),
        (JOB, JOB),
        (f"{JOB}/images/4", f"{JOB}/images/4"),
        (f"{JOB}/videos/webp", f"{JOB}/videos/webp"),
        (f"{UID}_a_lighthouse_2.png", f"{MINE}/images/2"),
        (f"darkroom-images/{UID}_image_1.png", f"{MINE}/images/1"),
        (rf"C:\Users\ada\{UID}_image_1.png", f"{MINE}/images/1"),
        (f"./{UID}_a_lighthouse.mp4", f"{MINE}/videos/mp4"),
        (f"{UID}_24_2.webp", f"{MINE}/videos/webp"),
    ],
)
def test_a_job_is_meant_by_its_id_its_name_or_a_file_of_it(text: str, name: str) -> None:
    assert named(text).name == name
    assert job_name(text) in (JOB, MINE)
    assert is_job(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lighthouse",
        "a cat, 2",
        f"{UID}/5",
        f"{UID}/0",
        f"{JOB}/images/5",
        f"{JOB}/videos/gif",
        f"{UID}_a_lighthouse_5.png",
        f"{UID}_a_lighthouse.png",
        f"{UID}.png",
        f"draw {UID}",
        f"x{UID}",
    ],
)
def test_what_means_no_job_is_said_with_what_would(text: str) -> None:
    with pytest.raises(ValueError, match="is not a job: give its id, like"):
        named(text)
    assert not is_job(text)


def test_a_picture_is_one_of_four() -> None:
    assert image_name(f"{UID}_a_lighthouse_2.png", 3) == f"{MINE}/images/3"
    for number in (0, 5):
        with pytest.raises(ValueError, match=f"no picture {number}"):
            image_name(UID, number)
