"""Any picture file that somebody sends, as the one form in which pictures are stored: a plain RGB PNG.

What comes in may be made to hurt. So the size is read from the header before anything is decoded, the decoder
is the one for the format that the first bytes say, and nothing of the file but its pixels comes out.
"""

from __future__ import annotations

import re
import struct
from io import BytesIO

from PIL import Image

SIDE_MAX = 1024
"""Longest side of a stored picture: more than any image encoder looks at."""

# Progressive files have about ten scans. Each costs a pass over the whole picture however short it is, and a
# file of a few megabytes could have a million.
_SCANS_MAX = 64
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = 0xD9
_WITHOUT_LENGTH = (0x01, 0xD8)

_ORIENTATION = 0x0112
# What brings a picture upright, by the value of its EXIF orientation (EXIF 3.0, 4.6.5).
_UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(Exception):
    """A picture cannot be used. The text goes on after `Picture 2 `, and says what to do."""


def as_stored(content: bytes, pixels_max: int) -> bytes:
    """Return the picture as a PNG: RGB, upright, no side over SIDE_MAX, on white, without metadata.

    Of an animation it is the first frame. The same file gives the same bytes under one release of Pillow.
    Raises Unreadable for what is no PNG, JPEG or WebP, has more than `pixels_max` pixels, or is damaged.
    """
    kind = _kind(content)
    if kind is None:
        raise Unreadable(
            "is not a PNG, JPEG or WebP file: save it as one of these, or give a direct link to a "
            ".png, .jpg or .webp picture."
        )
    try:
        width, height = _SIZE[kind](content)
    except (struct.error, ValueError) as error:
        raise _damaged() from error
    _refuse_too_large(width, height, pixels_max)
    try:
        image = Image.open(BytesIO(content), formats=[kind])
        # Pillow reads headers by code of its own, which might find another size than ours did.
        _refuse_too_large(image.width, image.height, pixels_max)
        return _png(_plain(image))
    except Unreadable:
        raise
    except Exception as error:
        # On bytes that somebody made up decoders raise whatever they happen to meet.
        raise _damaged() from error


def _kind(content: bytes) -> str | None:
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    return None


def _damaged() -> Unreadable:
    return Unreadable("is damaged or cut off: open it in a picture editor and save it again.")


def _refuse_too_large(width: int, height: int, pixels_max: int) -> None:
    if width * height > pixels_max:
        raise Unreadable(
            f"has more than {pixels_max / 1e6:g} megapixels: make it smaller; {SIDE_MAX} pixels a side "
            "are all that is used."
        )


def _png_size(content: bytes) -> tuple[int, int]:
    name, width, height = struct.unpack_from(">4sII", content, 12)
    if name != b"IHDR":
        raise ValueError("PNG files begin with IHDR")
    return width, height


def _webp_size(content: bytes) -> tuple[int, int]:
    kind = content[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", content, 24)
        return (high_width << 16 | low_width) + 1, (high_height << 16 | low_height) + 1
    raise ValueError("WebP files begin with VP8, VP8L or VP8X")


def _jpeg_size(content: bytes) -> tuple[int, int]:
    size: tuple[int, int] | None = None
    scans = 0
    position = 2
    while (found := _MARKER.search(content, position)) is not None:
        marker, position = found[1][0], found.end()
        if marker == _END_OF_IMAGE:
            break
        if marker in _WITHOUT_LENGTH:
            continue
        if marker in _START_OF_FRAME and size is None:
            height, width = struct.unpack_from(">HH", content, position + 3)
            size = width, height
        if marker == _START_OF_SCAN:
            scans += 1
            if scans > _SCANS_MAX:
                raise Unreadable("is a JPEG with far too many scans: save it again as an ordinary one.")
        (length,) = struct.unpack_from(">H", content, position)
        position += length
    if size is None:
        raise ValueError("JPEG files have a frame")
    return size


_SIZE = {"PNG": _png_size, "JPEG": _jpeg_size, "WEBP": _webp_size}


def _plain(image: Image.Image) -> Image.Image:
    """Return the picture as RGB, upright and small; holds at most two copies of full size."""
    if image.format != "JPEG":
        # PNG may have its EXIF after the pixels. JPEG has it before, and need not be decoded in full.
        image.load()
    upright_by = _UPRIGHT_BY.get(_orientation(image))
    if image.mode.startswith("I"):
        # Sixteen bits of grey: a plain conversion would make white of all but the darkest.
        image = image.point(lambda level: level / 256).convert("L")
        image.info.pop("transparency", None)
    if image.has_transparency_data:
        mode = "RGBA"
    elif image.mode in ("L", "CMYK"):
        mode = image.mode
    else:
        mode = "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    image.thumbnail((SIDE_MAX, SIDE_MAX), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if upright_by is None else image.transpose(upright_by)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        # Notes beside the picture may be broken in any way; the picture is none the worse.
        return 1
    return orientation if isinstance(orientation, int) else 1


def _png(image: Image.Image) -> bytes:
    image.info.clear()  # or a colour profile would be written too
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
