"""Jobs and the prompt language, promise by promise: what people type, against a service that draws."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import pty
import socket
import subprocess
import uuid
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.service.people import People
from tests.service.process import ServiceProcess
from tests.service.shell import DARKROOM, Person

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

_SMALL = "--w 64 --h 64"


class Artist(Person):
    """Somebody who draws small pictures."""

    def drew(self, prompt: str, *options: str) -> dict[str, Any]:
        return self.made("imagine", *options, *prompt.split(), *_SMALL.split())


def bits(job: dict[str, Any]) -> list[str]:
    return [image["sha256"] for image in job["images"]]


@pytest.fixture(scope="module")
def ann(drawing: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Artist:
    return a_person(drawing, "ann", tmp_path_factory.mktemp("ann"))


@pytest.fixture(scope="module")
def ben(drawing: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Artist:
    return a_person(drawing, "ben", tmp_path_factory.mktemp("ben"))


def a_person(drawing: ServiceProcess, name: str, folder: Path) -> Artist:
    key = asyncio.run(People(drawing.address, drawing.admin_key).key(name, plan="pro"))
    return Artist(address=drawing.address, key=key, folder=folder)


@pytest.fixture(scope="module")
def grid(ann: Artist) -> dict[str, Any]:
    """A finished public grid of ann's."""
    return ann.drew("a lighthouse in fog --seed 5 --public")


@pytest.fixture(scope="module")
def picture(ann: Artist) -> str:
    """A file to draw after."""
    file = ann.folder / "after.png"
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(file)
    return str(file)


# -- the prompt language -----------------------------------------------------------------------------------


def test_a_seed_fixes_the_grid_and_case_does_not_matter(ann: Artist, grid: dict[str, Any]) -> None:
    assert len(set(bits(grid))) == 4, "each of the four has its own noise"
    assert all(image["fileName"].startswith(str(uuid.UUID(grid["uid"]))) for image in grid["images"])
    assert bits(ann.drew("a lighthouse in fog --SEED 5 --Public")) == bits(grid)
    assert bits(ann.drew("a lighthouse in fog --seed 6")) != bits(grid)


def test_weights_and_no_change_what_is_drawn(ann: Artist) -> None:
    plain = ann.drew("hot dog food --seed 5")
    weighed = ann.drew("hot dog::2 food::-1 --seed 5")
    assert bits(weighed) != bits(plain)
    assert bits(ann.drew("hot dog::4 food::-2 --seed 5")) == bits(weighed), "it is the shares that count"
    missing = ann.drew("hot dog:: food::-1 animal:: --seed 5")
    assert bits(missing) == bits(ann.drew("hot dog::1 food::-1 animal::1 --seed 5")), "missing weights are 1"
    without = ann.drew("a lighthouse --no trees --seed 5")
    assert bits(without) == bits(ann.drew("a lighthouse:: trees::-0.5 --seed 5"))


def test_a_size_or_a_shape(ann: Artist) -> None:
    job = ann.made("imagine", "a", "boat", "--w", "64", "--h", "128", "--seed", "1")
    assert (job["width"], job["height"]) == (64, 128)
    dry = json.loads(ann.types("imagine", "a", "boat", "--ar", "3:2", "--dry-run", "--json").stdout)
    assert dry["width"] / dry["height"] == pytest.approx(1.5, rel=0.2)
    assert dry["width"] % 64 == dry["height"] % 64 == 0


def test_a_picture_to_draw_after_and_its_weight(ann: Artist, picture: str) -> None:
    plain = ann.drew("a boat --seed 5")
    after = ann.drew("a boat --seed 5", "--image", picture)
    more = ann.drew("a boat --seed 5 --iw 1", "--image", picture)
    away = ann.drew("a boat --seed 5 --iw -0.5", "--image", picture)
    assert len({tuple(bits(job)) for job in (plain, after, more, away)}) == 4
    assert bits(ann.drew("a boat --seed 5 --iw 1", "--image", picture)) == bits(more)


def test_an_address_that_is_no_picture_to_be_had_is_refused_with_what_to_do(ann: Artist) -> None:
    refused = ann.refusal("imagine", "https://nowhere.invalid/a.png", "a", "boat")
    assert refused["reason"] == "PICTURE_UNREADABLE"
    assert refused["violations"]


def test_an_address_inside_is_not_connected_to(ann: Artist) -> None:
    try:
        inside = socket.create_server(("127.0.0.78", 443))
    except OSError as closed:
        pytest.skip(f"ports below 1024 are not this user's to open: {closed}")
    with inside:
        inside.setblocking(False)
        refused = ann.refusal("imagine", "https://127.0.0.78/inside.png", "a", "boat")
        assert refused["reason"] == "PICTURE_UNREADABLE"
        with pytest.raises(BlockingIOError):  # nobody came
            inside.accept()


def test_stop_shows_it_as_it_is_then(ann: Artist, grid: dict[str, Any]) -> None:
    stopped = ann.drew("a lighthouse in fog --seed 5 --stop 50")
    assert bits(stopped) != bits(grid)
    assert json.loads(stopped["receipt"]["reproductionJson"])["stop_percent"] == 50


def test_a_video_of_how_it_came_to_be(ann: Artist) -> None:
    job = ann.drew("a lighthouse in fog --seed 5 --video")
    assert {video["contentType"] for video in job["videos"]} == {"video/mp4", "image/webp"}
    (webp,) = (ann.folder / "darkroom-images").glob(f"{job['uid']}*.webp")
    with Image.open(webp) as film:
        assert film.n_frames > 5
    ann.types("download", f"{job['uid']}/mp4", "--out", "films")
    (mp4,) = (ann.folder / "films").glob("*.mp4")
    assert mp4.read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("prompt", "warning"),
    [("hot dog animal::-1", "all of the text before it, “hot dog animal”"), ("fox " * 13, "about 12 words")],
    ids=["one weight at the end", "many words"],
)
def test_what_may_surprise_is_said_before_it_is_drawn(ann: Artist, prompt: str, warning: str) -> None:
    (said,) = ann.gets("imagine", *prompt.split(), "--dry-run")["warnings"]
    assert warning in said


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [("hot dog::0 food::0", "All weights are zero"), ("x" * 6_001, "at most 6,000 are allowed")],
    ids=["no weight at all", "too long"],
)
def test_a_prompt_that_cannot_be_drawn_is_refused(ann: Artist, prompt: str, sentence: str) -> None:
    (violation,) = ann.refusal("imagine", *prompt.split())["violations"]
    assert sentence in violation["sentence"]


def test_tier_and_visibility_are_the_accounts_unless_the_prompt_says_otherwise(ann: Artist) -> None:
    def said(*flags: str) -> tuple[str, str]:
        job = ann.gets("imagine", "a boat " + " ".join(flags), "--dry-run")
        return job["tier"], job["visibility"]

    ann.types("relax")
    ann.types("private")
    assert said() == ("TIER_RELAX", "VISIBILITY_PRIVATE")
    assert said("--fast", "--public") == ("TIER_FAST", "VISIBILITY_PUBLIC")
    ann.types("fast")
    ann.types("public")
    assert said() == ("TIER_FAST", "VISIBILITY_PUBLIC")
    assert said("--relax", "--private") == ("TIER_RELAX", "VISIBILITY_PRIVATE")


def test_everything_wrong_with_a_prompt_is_said_at_once(ann: Artist) -> None:
    refused = ann.refusal("imagine", "a", "boat", "--w", "65", "--sed", "3", "--iw", "x")
    assert refused["reason"] == "INVALID_PARAMETER"
    said = {each["field"]: each["sentence"] for each in refused["violations"]}
    assert set(said) == {"--w", "--sed", "--iw"}
    assert "--seed" in said["--sed"]


# -- jobs --------------------------------------------------------------------------------------------------


def test_a_variation_is_near_its_source_and_a_strong_one_farther(ann: Artist, grid: dict[str, Any]) -> None:
    near = ann.made("vary", grid["uid"], "2")
    far = ann.made("vary", f"{grid['uid']}/2", "--strong")
    assert near["sourceJob"] == far["sourceJob"] == grid["name"]
    source = pixels(ann, grid, 2)
    numbers = (1, 2, 3, 4)
    near_by, farther = (
        min(distance(source, pixels(ann, job, number)) for number in numbers) for job in (near, far)
    )
    others = min(distance(source, pixels(ann, grid, number)) for number in (1, 3, 4))
    assert near_by < farther
    assert near_by < others


def test_light_and_detailed_upscales_and_redo(ann: Artist, grid: dict[str, Any]) -> None:
    detailed = ann.made("upscale", grid["uid"], "3")
    light = ann.made("redo", detailed["uid"])
    assert detailed["upscaleAlgorithm"] == "UPSCALE_ALGORITHM_DETAILED"
    assert light["upscaleAlgorithm"] == "UPSCALE_ALGORITHM_LIGHT"
    for job in (detailed, light):
        (image,) = job["images"]
        assert (image["width"], image["height"]) == (256, 256)
    small = pixels(ann, grid, 3)
    added = [distance(small, pixels(ann, job, 1).resize(small.size)) for job in (light, detailed)]
    assert added[0] < added[1], "light adds less"


def test_uplight_makes_upscales_light_and_a_video_is_not_of_upscales(ann: Artist) -> None:
    job = ann.drew("a boat --uplight --video")
    upscaled = ann.made("upscale", job["uid"], "1")
    assert upscaled["upscaleAlgorithm"] == "UPSCALE_ALGORITHM_LIGHT"
    assert upscaled["videos"] == []
    assert "--video has no effect on an upscale" in upscaled["warnings"][0]


def test_a_max_upscale_is_fast_only_and_of_small_grids_and_within_three_megapixels(
    ann: Artist, grid: dict[str, Any]
) -> None:
    assert ann.refusal("upscale", grid["uid"], "1", "--max", "--relax")["reason"] == "FAST_ONLY"
    made = json.loads(ann.types("upscale", grid["uid"], "1", "--max", "--no-wait", "--json").stdout)["job"]
    assert 2_900_000 < made["width"] * made["height"] <= 3_000_000
    ann.types("cancel", made["uid"])
    large = ann.made("imagine", "a boat --stop 10", "--w", "64", "--h", "512")
    refused = ann.refusal("upscale", large["uid"], "1", "--max")
    assert "under 512 pixels" in refused["violations"][0]["sentence"]


@pytest.mark.long
def test_a_max_upscale(ann: Artist, grid: dict[str, Any]) -> None:
    (image,) = ann.made("upscale", grid["uid"], "1", "--max")["images"]
    assert 2_900_000 < image["width"] * image["height"] <= 3_000_000


def test_a_reroll_has_a_new_seed_unless_the_prompt_fixes_one(ann: Artist, grid: dict[str, Any]) -> None:
    assert bits(ann.made("reroll", grid["uid"])) == bits(grid)
    free = ann.drew("a boat")
    again = ann.made("redo", free["uid"])
    assert again["seed"] != free["seed"]
    assert bits(again) != bits(free)


def test_a_job_that_waits_is_moved_and_one_that_waits_or_runs_is_cancelled(ann: Artist, ben: Artist) -> None:
    # On each of the two GPUs something that takes a while.
    running = [sent(ben, "a boat", "--w", "448", "--h", "448") for _ in range(2)]
    waiting = sent(ann, "a boat", "--relax")
    # Both are worked out beside the queue, and come a moment later.
    shown = ""
    while "Starts in about" not in shown:
        shown = ann.types("show", waiting["uid"]).stdout
    assert "place 1" in shown
    assert ann.gets("fast", waiting["uid"])["tier"] == "TIER_FAST"
    assert "fast queue" in ann.types("explain", waiting["uid"]).stdout
    cancelled = ann.gets("cancel", waiting["uid"])
    assert (cancelled["state"], cancelled["receipt"]["gpuMs"]) == ("JOB_STATE_CANCELLED", "0")

    for job in running:
        ben.types("cancel", job["uid"])
    for job in running:
        watched = [
            json.loads(line)
            for line in ben.types("watch", job["uid"], "--json", expect=4).stdout.splitlines()
        ]
        assert watched[-1]["event"]["job"]["state"] == "JOB_STATE_CANCELLED"
        receipt = ben.gets("show", job["uid"], "--receipt")["receipt"]
        assert receipt["decodeMs"] == "0", "what nobody wants is not decoded"
        assert receipt["billedGpuMs"] == receipt["gpuMs"]
        assert int(receipt["gpuMs"]) < int(job["price"]["predictedGpuMs"])


def test_progress_is_told_in_steps_and_shown_in_pictures(ann: Artist) -> None:
    job = sent(ann, "a boat")
    lines = ann.types("watch", job["uid"], "--json").stdout.splitlines()
    steps = [told["progress"] for told in map(json.loads, lines) if "progress" in told]
    assert len(steps) > 1
    assert all(told["percent"] == 100 * told["step"] // told["steps"] for told in steps)
    # At a terminal; what it prints of a job that it only watches is previews.
    assert "▀" in at_a_terminal(ann, "watch", sent(ann, "a boat")["uid"])


def test_the_same_bits_come_out_again(ann: Artist, grid: dict[str, Any]) -> None:
    said = json.loads(ann.types("verify", grid["uid"], "--json").stdout)
    assert said["equal"]
    assert [pair["equal"] for pair in said["pictures"]] == [True] * 4
    for made in (ann.made("vary", grid["uid"], "1"), ann.made("upscale", grid["uid"], "1", "--light")):
        assert ann.gets("verify", made["uid"])["equal"]
    receipt = json.loads(ann.types("show", grid["uid"], "--receipt", "--json").stdout)
    assert receipt["record"]["weights_sha256"]
    assert receipt["record"]["torch"]


def test_only_its_author_sees_a_job_and_can_go_on_from_it_and_a_moderator_sees_it(
    drawing: ServiceProcess, ann: Artist, ben: Artist, grid: dict[str, Any]
) -> None:
    assert ann.types("show", grid["uid"]).stdout
    for command in (("show", grid["uid"]), ("vary", grid["uid"], "1"), ("upscale", grid["uid"], "1")):
        assert ben.refusal(*command)["reason"] == "NOT_FOUND_OR_NOT_YOURS"
    admin = Person(address=drawing.address, key=drawing.admin_key, folder=ben.folder)
    account = ben.gets("info")["name"].removeprefix("accounts/")
    key = admin.types("admin", "keys", "create", account, "--role", "moderator", "--reason", "a test")
    moderator = Person(address=drawing.address, key=key.stdout.strip(), folder=ben.folder)
    hidden = ann.drew("a boat --private")
    assert moderator.gets("show", hidden["uid"])["uid"] == hidden["uid"]
    assert moderator.refusal("vary", hidden["uid"], "1")["reason"] == "NOT_FOUND_OR_NOT_YOURS"


def test_the_feed_shows_upscales_of_others_and_no_private_ones(
    ann: Artist, ben: Artist, grid: dict[str, Any]
) -> None:
    shown = ann.made("upscale", grid["uid"], "4", "--light", "--public")
    hidden = ann.made("upscale", grid["uid"], "4", "--light", "--private")
    feed = {job["uid"] for job in json.loads(ben.types("feed", "--json").stdout)["jobs"]}
    assert shown["uid"] in feed
    assert hidden["uid"] not in feed
    assert grid["uid"] not in feed, "it shows upscales"
    ben.types("download", shown["uid"])
    assert ben.refusal("download", hidden["uid"])["reason"] == "NOT_FOUND_OR_NOT_YOURS"


def test_downloads_of_one_of_a_job_and_of_all(ann: Artist, grid: dict[str, Any]) -> None:
    ann.types("download", grid["uid"], "2", "--out", "one")
    ann.types("download", grid["uid"], "--out", "four")
    assert [len(list((ann.folder / folder).iterdir())) for folder in ("one", "four")] == [1, 4]
    ann.types("download", "--all", "--to", "all.zip")
    with zipfile.ZipFile(ann.folder / "all.zip") as archive:
        assert archive.testzip() is None
        assert {image["fileName"] for image in grid["images"]} <= set(archive.namelist())
        first = archive.read(grid["images"][0]["fileName"])
    with Image.open(io.BytesIO(first)) as image:
        assert image.size == (64, 64)


def test_a_deleted_job_is_gone_and_what_was_made_of_it_stays(ann: Artist) -> None:
    job = ann.drew("a boat")
    variation = ann.made("vary", job["uid"], "1")
    ann.types("delete", job["uid"], "--yes")
    assert ann.refusal("show", job["uid"])["reason"] == "NOT_FOUND_OR_NOT_YOURS"
    assert job["uid"] not in ann.types("jobs").stdout
    ann.types("download", variation["uid"], "--out", "kept")


def sent(person: Artist, prompt: str, *options: str) -> dict[str, Any]:
    """Return a job that was accepted and goes on by itself."""
    job: dict[str, Any] = person.gets("imagine", prompt, *options, "--no-wait")["job"]
    return job


def at_a_terminal(person: Person, *arguments: str) -> str:
    """Return what a command prints to a terminal of many colours."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "DARKROOM_ADDRESS": person.address, "DARKROOM_KEY": person.key}
    command = subprocess.Popen(
        [DARKROOM, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=person.folder,
        env={**environment, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"},
    )
    os.close(theirs)
    printed = b""
    with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
        # Linux ends what a terminal says, once nobody holds its other side, with an error.
        while read := terminal.read(65_536):
            printed += read
    assert command.wait(60) == 0, printed.decode()
    return printed.decode()


def pixels(person: Artist, job: dict[str, Any], number: int) -> Image.Image:
    name = job["images"][number - 1]["fileName"]
    with Image.open(person.folder / "darkroom-images" / name) as image:
        return image.convert("RGB")


def distance(one: Image.Image, other: Image.Image) -> float:
    """Return the mean absolute difference of two pictures' levels."""
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / len(one.tobytes())
