"""Picture files of all kinds become plain PNGs, and those that are made to hurt are refused in time."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import textwrap
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from scheduler.frontdoor.picture_files import Unreadable, as_stored

PIXELS_MAX = 4_000_000
KINDS = ("PNG", "JPEG", "WEBP")


def written(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def stored(content: bytes) -> Image.Image:
    """Return the picture that is stored for a file; it must be a plain PNG."""
    png = as_stored(content, PIXELS_MAX)
    assert chunks_of(png) == {b"IHDR", b"IDAT", b"IEND"}
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return image


def chunks_of(png: bytes) -> set[bytes]:
    names, position = set(), 8
    while position < len(png):
        (length,) = struct.unpack_from(">I", png, position)
        names.add(png[position + 4 : position + 8])
        position += length + 12
    return names


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    """Return a PNG that says it has this size, with these chunks before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


def corners() -> Image.Image:
    """Return a picture of which no turn looks like another."""
    image = Image.new("RGB", (48, 32), "gray")
    image.paste("red", (0, 0, 16, 16))
    image.paste("blue", (32, 0, 48, 16))
    return image


def close(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and all(
        abs(a - b) < 40 for a, b in zip(one.tobytes(), other.convert("RGB").tobytes(), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_stored_as_it_looks(kind: str) -> None:
    assert close(stored(written(corners().resize((480, 320)), kind)), corners().resize((480, 320)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "becomes"),
    [((2000, 1000), (1024, 512)), ((5, 1500), (3, 1024)), ((1, 1), (1, 1)), ((700, 9), (700, 9))],
)
def test_no_side_is_longer_than_1024_and_nothing_is_enlarged(
    kind: str, size: tuple[int, int], becomes: tuple[int, int]
) -> None:
    assert stored(written(Image.new("RGB", size), kind)).size == becomes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(9))
def test_a_picture_is_stored_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    content = written(corners().resize((480, 320), 0), kind, exif=exif, **options)
    with Image.open(io.BytesIO(content)) as file:
        upright = ImageOps.exif_transpose(file)
    assert close(stored(content), upright)


def test_exif_that_is_nonsense_does_not_cost_the_picture() -> None:
    assert close(stored(written(corners(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")), corners())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_can_be_seen_through_is_white(mode: str) -> None:
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 20, 20))
    seen = stored(written(image.convert(mode)))
    assert seen.getpixel((5, 5)) == (0, 0, 0)
    assert seen.getpixel((35, 5)) == (255, 255, 255)


def test_a_colour_that_stands_for_transparent_is_white() -> None:
    content = written(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    assert stored(content).getpixel((0, 0)) == (255, 255, 255)


def test_half_seen_through_is_half_white() -> None:
    assert stored(written(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))).getpixel((0, 0)) == (127, 127, 127)


def test_sixteen_bits_of_grey_keep_their_brightness() -> None:
    assert stored(written(Image.new("I;16", (4, 4), 0x8000))).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_black_and_white_stays_so(mode: str) -> None:
    assert stored(written(Image.new(mode, (4, 4), 255))).getpixel((0, 0)) == (255, 255, 255)


def test_ink_becomes_light() -> None:
    seen = stored(written(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((8, 8))
    assert isinstance(seen, tuple)
    assert seen[0] > 200
    assert max(seen[1:]) < 80


def test_nothing_but_the_pixels_is_stored() -> None:
    notes = PngInfo()
    notes.add_text("Comment", "51.5 N 0.1 W")
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = written(corners(), pnginfo=notes, exif=exif, icc_profile=profile, dpi=(300, 300))
    assert {b"tEXt", b"eXIf", b"iCCP", b"pHYs"} <= chunks_of(content)
    assert close(stored(content), corners())  # and `stored` looks at the chunks


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_stored(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    content = written(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert close(stored(content), frames[0])


def test_the_same_file_makes_the_same_bytes() -> None:
    content = written(corners(), "JPEG")
    assert as_stored(content, PIXELS_MAX) == as_stored(content, PIXELS_MAX)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>a page</html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"GIF89a" + bytes(100),
        b"BM" + bytes(100),
        b"RIFF\0\0\0\0WAVE",
    ],
)
def test_what_is_no_picture_is_refused_with_what_is_wanted(content: bytes) -> None:
    with pytest.raises(
        Unreadable, match=r"is not a PNG, JPEG or WebP file: .*\.png, \.jpg or \.webp picture"
    ):
        as_stored(content, PIXELS_MAX)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.9])
def test_a_file_that_is_cut_off_is_refused(kind: str, share: float) -> None:
    content = written(Image.effect_noise((200, 100), 50).convert("RGB"), kind)
    with pytest.raises(Unreadable, match=r"is damaged or cut off|is not a PNG, JPEG or WebP file"):
        as_stored(content[: int(len(content) * share)], PIXELS_MAX)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_limited(kind: str) -> None:
    content = written(Image.new("L", (1_000, 500)), kind)
    as_stored(content, 500_000)
    with pytest.raises(Unreadable, match=r"has more than 0.499999 megapixels: make it smaller"):
        as_stored(content, 499_999)


SOUND = {kind: written(corners(), kind) for kind in KINDS} | {
    "progressive": written(corners(), "JPEG", progressive=True),
    "animated": written(corners(), "WEBP", save_all=True, append_images=[corners().rotate(90)]),
    "alpha": written(Image.new("RGBA", (9, 9)), "WEBP"),
}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(SOUND)),
    changes=st.lists(
        st.tuples(st.integers(0, 2_000), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
    ),
)
def test_whatever_is_in_a_file_it_is_a_picture_or_refused(
    kind: str, changes: list[tuple[int, bytes]]
) -> None:
    content = bytearray(SOUND[kind])
    for position, new in changes:
        at = position % len(content)
        content[at : at + len(new)] = new
    with suppress(Unreadable):
        png = as_stored(bytes(content), PIXELS_MAX)
        assert max(Image.open(io.BytesIO(png)).size) <= 1024


def a_jpeg_of_scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan stands there again and again."""
    content = written(Image.new("L", (2_000, 2_000)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + content[-2:]


def webp_of(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for name, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


@cache
def zeros(count: int) -> bytes:
    """Return so many megabytes of nothing, compressed a thousandfold."""
    packed = zlib.compressobj(9)
    return b"".join(packed.compress(bytes(1_000_000)) for _ in range(count)) + packed.flush()


def bombs() -> dict[str, bytes]:
    lossless = written(Image.new("RGB", (1_990, 1_990)), "WEBP", lossless=True)
    pixel = b"\0\0\0\0"
    return {
        "png_wide": png_of(200_000, 200_000),
        "png_largest": png_of(2**31 - 1, 2**31 - 1),
        "png_two_headers": png_of(
            1, 1, chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), pixels=pixel
        ),
        "png_text": png_of(1, 1, chunk(b"zTXt", b"a\0\0" + zeros(300)), pixels=pixel),
        "png_texts": png_of(1, 1, *[chunk(b"zTXt", b"a\0\0" + zeros(1))] * 500, pixels=pixel),
        "png_profile": png_of(1, 1, chunk(b"iCCP", b"a\0\0" + zeros(300)), pixels=pixel),
        "png_pixels": png_of(1, 1)[:-12].replace(b"IDAT", b"IDAX") + chunk(b"IDAT", zeros(300)),
        "webp_canvas": webp_of((b"VP8X", b"\x02" + bytes(3) + b"\xff\x3f\0\xff\x3f\0")),
        "webp_widest_canvas": webp_of((b"VP8X", b"\x02" + bytes(3) + b"\xff" * 6)),
        "webp_lossless": webp_of((b"VP8L", b"\x2f" + struct.pack("<I", 2**28 - 1) + bytes(20))),
        "webp_frame_over_canvas": webp_of(
            (b"VP8X", bytes(10)), (b"VP8L", lossless[20 : 20 + struct.unpack_from("<I", lossless, 16)[0]])
        ),
        "jpeg_wide": written(Image.new("L", (8, 8)), "JPEG").replace(
            struct.pack(">HH", 8, 8), struct.pack(">HH", 65_000, 65_000), 1
        ),
        "jpeg_scans": a_jpeg_of_scans(100_000),
        "jpeg_two_frames": written(Image.new("L", (8, 8)), "JPEG").replace(
            b"\xff\xda", b"\xff\xc0\x00\x0b\x08\xfd\xe8\xfd\xe8\x01\x01\x11\x00\xff\xda", 1
        ),
    }


def test_bombs_are_refused_in_little_memory_and_time(tmp_path: Path) -> None:
    made = bombs() | {"sound": written(Image.new("RGB", (1_990, 1_990)))}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    # In processes of their own: tracemalloc does not see what decoders allocate. Forked from a small one,
    # since a program begins with the highest mark of what started it.
    program = """
        import os, resource, sys, time
        from pathlib import Path
        from scheduler.frontdoor.picture_files import Unreadable, as_stored

        def most():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        for path in sorted(Path(sys.argv[1]).iterdir()):
            if os.fork() == 0:
                content = path.read_bytes()
                before, began = most(), time.process_time()
                try:
                    said = f"stored {len(as_stored(content, 4_000_000))} bytes"
                except Unreadable as refused:
                    said = str(refused)
                cpu_ms = int(1000 * (time.process_time() - began))
                print(path.name, most() - before, cpu_ms, said, sep="|", flush=True)
                os._exit(0)
            os.wait()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    unit = 1 if sys.platform == "darwin" else 1024
    outcomes = {
        name: (int(grown) * unit / 1024**2, int(cpu_ms), said)
        for name, grown, cpu_ms, said in (line.split("|") for line in done.stdout.splitlines())
    }
    assert outcomes.keys() == made.keys()
    sound_mib, _, said = outcomes.pop("sound")
    assert said.startswith("stored")
    assert sound_mib > 10, "or memory is not measured"
    for name, (grown_mib, cpu_ms, said) in outcomes.items():
        assert not said.startswith("stored"), name
        assert grown_mib < sound_mib, f"{name} took {grown_mib:.0f} MiB"
        assert cpu_ms < 3_000, f"{name} took {cpu_ms} ms"
