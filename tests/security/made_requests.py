"""Requests that nobody would write: made from the descriptors, from earlier answers, and from noise.

One seed makes one sequence. What is asked for is mostly well formed in all fields but some, since a request
that is wrong all over is refused at its first line and tries nothing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import uuid
from collections.abc import Callable

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from PIL import Image

MARK = "zqxjkvbp"
"""Is in every prompt, so that an echo of one can be told."""

_UGLY = (
    "",
    " ",
    "\0",
    "a\0b",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "accounts/../jobs",
    "accounts/-",
    "accounts//jobs/",
    "%00",
    "%n%s%x",
    "'; DROP TABLE scheduler.job; --",
    "$1",
    "\\",
    '"',
    "{}",
    "null",
    "-1",
    "1e400",
    "９",
    "\u202e\u200b\ufeff",
    "\U0010ffff",
    "e\u0301" * 50,
    "🦊" * 40,
    "\r\nSet-Cookie: a=b",
    "a" * 64,
    "a" * 5_000,
    "é" * 3_000,
    "[" * 3_000,
    "IGUgeyI=",
)
_INTS = (0, 1, -1, 2, 5, 100, 101, 1_000, 1_001, 2**31 - 1, -(2**31), 2**31, 2**53, 2**53 + 1, 2**62)
_GOOD_PIECES = (
    "a fox",
    "hot dog::2 food::-1",
    "🦊",
    "--w 256",
    "--seed 1",
    "--stop 80",
    "--no trees",
    "--video",
)
_PROMPT_PIECES = (
    "a fox",
    "hot dog::2 food::-1",
    "::",
    "::1",
    "a::0 b::0",
    "a::99999999999999999999",
    "a::-0.0000000001",
    "a::1e9",
    "--w 256",
    "--h 320",
    "--w 0",
    "--w -64",
    "--w 99999999999999999999",
    "--ar 3:2",
    "--ar 0:0",
    "--ar 99999999:1",
    "--seed 1",
    "--seed -1",
    "--seed 18446744073709551616",
    "--stop 80",
    "--stop 0",
    "--iw 1",
    "--iw -1e308",
    "--iw nan",
    "--no trees",
    "--no",
    "--fast",
    "--relax",
    "--private",
    "--public",
    "--uplight",
    "--video",
    "--bogus",
    "--",
    "—w 256",
    "https://127.0.0.1/a.png",
    "https://[::1]/a.png",
    "https://user:pw@127.0.0.1/a.png",
    "https://127.0.0.1:1/a.png",
    "https://0x7f.1/a.png",
    "http://127.0.0.1/a.png",
    "https://",
    "https://[",
    "\0",
    "\u202e",
    "🦊",
    "x" * 300,
)
_SECONDS = (0, 1, -1, 1_762_776_000, 1_800_000_000, 253_402_300_799, 253_402_300_800, -62_135_596_801)
_MOMENTS = (1_793_000_000, 1_794_268_800, 1_794_312_000, 1_794_400_000, 1_800_000_000)
_MASK = ("mode", "visibility", "overage_allowed", "spend_cap_micros")
_RARELY_GIVEN = (
    *("validate_only", "undoes", "version", "page_token", "expire_time", "replay"),
    *("states", "impact"),
)
# What the page tokens of some lists are bound to, which is no secret.
_BINDINGS = (("feed", False), ("accounts", None), ("transfers", ""), ("audit", "", "", None, None), ("ann",))


class Requests:
    """A source of requests, valid, nearly valid and not at all."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._seen: dict[str, list[str]] = {}
        self._strange = 0.0

    def learn(self, message: Message) -> None:
        """Remember the names, tokens and etags of an answer, to ask about them."""
        for field, value in message.ListFields():
            values = value if field.is_repeated else [value]
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                if field.message_type.GetOptions().map_entry:
                    continue
                for each in values:
                    self.learn(each)
            elif field.type == FieldDescriptor.TYPE_STRING:
                for each in values:
                    self.know(field.name, each)

    def know(self, field: str, text: str) -> None:
        """Remember one text of a field."""
        kind = _kind(field, text)
        if kind is None:
            return
        texts = self._seen.setdefault(kind, [])
        if text not in texts:
            texts.append(text)
        if len(texts) > 60:
            # Early ones too: they are of jobs and accounts in every state.
            del texts[self.random.randrange(20, 60)]

    def one_for(self, descriptor: Descriptor) -> bytes:
        """Return what to send where this message is expected."""
        # Of how many fields the text, number or absence is strange: of most requests none or one is.
        self._strange = self.random.choice((0.0, 0.0, 0.05, 0.05, 0.15, 0.5))
        wire = self._message(descriptor, depth=0).SerializeToString()
        return self._noise(wire) if self.random.random() < 0.1 else wire

    def _message(self, descriptor: Descriptor, depth: int) -> Message:
        message = GetMessageClass(descriptor)()
        if descriptor.full_name in ("google.protobuf.Timestamp", "google.protobuf.Duration"):
            message.seconds = self.random.choice(_MOMENTS)
            if self._is_strange():
                message.seconds = self.random.choice((*_SECONDS, 2**63 - 1, -(2**63)))
                message.nanos = self.random.choice((0, 1, 999_999_999, 1_000_000_000, -1, 2**31 - 1))
            return message
        if descriptor.full_name == "google.protobuf.FieldMask":
            message.paths[:] = self.random.choices(_MASK, k=self.random.choice((1, 1, 2, 3)))
            if self._is_strange():
                message.paths.append(self._ugly())
            return message
        skipped = {
            field.name
            for oneof in descriptor.oneofs
            for field in self.random.sample(list(oneof.fields), len(oneof.fields) - 1)
        }
        for field in descriptor.fields:
            rare = field.name in _RARELY_GIVEN or descriptor.full_name.endswith("v1.Job")
            given = self.random.random() < (0.1 if rare and field.name not in ("name", "tier") else 0.95)
            if field.name in skipped or not given or (self._is_strange() and self.random.random() < 0.5):
                continue
            self._set(message, field, depth)
        return message

    def _set(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            entry = field.message_type
            if entry.GetOptions().map_entry:
                for _ in range(self.random.choice((0, 0, 1, 3))):
                    device = (
                        self._ugly() if self._is_strange() else self.random.choice(("cpu", "NVIDIA H200"))
                    )
                    getattr(message, field.name)[device] = self._number(field.name, 32)
            elif field.is_repeated:
                for _ in range(self.random.choice((0, 1, 2))):
                    getattr(message, field.name).append(self._message(entry, depth + 1))
            elif field.full_name == "scheduler.v1.UpdateJobRequest.update_mask" and not self._is_strange():
                getattr(message, field.name).paths.append("tier")
            elif depth < 4:
                getattr(message, field.name).CopyFrom(self._message(entry, depth + 1))
            return
        if field.is_repeated:
            for _ in range(self.random.choice((0, 0, 1, 2, 7))):
                getattr(message, field.name).append(self._scalar(field))
            return
        setattr(message, field.name, self._scalar(field))

    def _scalar(self, field: FieldDescriptor) -> object:
        scalar: Callable[[], object] = {
            FieldDescriptor.TYPE_BOOL: lambda: self.random.random() < 0.4,
            FieldDescriptor.TYPE_STRING: lambda: self._text(field),
            FieldDescriptor.TYPE_BYTES: self._bytes,
            FieldDescriptor.TYPE_ENUM: lambda: self._enum(field.enum_type),
            FieldDescriptor.TYPE_INT32: lambda: self._number(field.name, 32),
            FieldDescriptor.TYPE_INT64: lambda: self._number(field.name, 64),
            FieldDescriptor.TYPE_DOUBLE: lambda: self.random.choice((0.0, -1.5, float("inf"), float("nan"))),
        }[field.type]
        return scalar()

    def _text(self, field: FieldDescriptor) -> str:
        if field.name == "prompt":
            return self._prompt()
        text = self._sensible(field)
        if not self._is_strange():
            return text
        return self._mutated(text) if self.random.random() < 0.6 else self._ugly()

    def _sensible(self, field: FieldDescriptor) -> str:
        request = field.containing_type.name
        match field.name:
            case "request_id":
                return str(self._uuid()) if self.random.random() < 0.9 else self._known("request_id")
            case "reason":
                return "because"
            case "model":
                return self.random.choice(("", "", "small", "seeing", "unweighed"))
            case "currency_code":
                return self.random.choice(("USD", "USD", "EUR"))
            case "etag":
                return self.random.choice(("", self._known("etag")))
            case "page_token":
                return self.random.choice(("", "", self._known("page_token"), self._forged()))
            case "account_id":
                return self.random.choice(("", f"new-{self.random.randrange(10**6)}"))
            case "source_image":
                return self._known("image")
            case "job":
                return self._known(self.random.choice(("job", "charged")))
            case "source_job":
                return self._known("job")
            case "account" | "parent" | "actor":
                return self._known("account")
            case "plan":
                return self._known("plan")
            case "target":
                return self._known(self.random.choice(("account", "job", "key", "plan", "worker")))
            case "name":
                return self._name_in(request)
        return self._ugly()

    def _name_in(self, request: str) -> str:
        """Return a name of what the request's own name speaks of."""
        for word, kind in (("Key", "key"), ("Worker", "worker"), ("Account", "account"), ("Job", "job")):
            if word in request:
                return self._known(kind)
        if request == "Plan":
            # Half of plans are new ones.
            new = f"plans/new-{self.random.randrange(10**6)}"
            return self.random.choice((new, self._known("plan").partition("/versions")[0]))
        if "Plan" in request:
            return self._known("plan")
        return self._known(self.random.choice(("image", "image", "job", "account")))

    def _forged(self) -> str:
        """Return a page token of somebody who knows how they are made, but not always what is in them."""
        value = self.random.choice(
            (0, 1, -1, 2**63, -(2**63), 10**30, 1.5, True, None, "", "a\0b", "\ud800", "ann", [], {}, [[]])
        )
        of = hashlib.sha256(repr(self.random.choice(_BINDINGS)).encode()).hexdigest()[:16]
        after = dict.fromkeys(("account", "number", "at_us", "ended_us", "arrival", "job", "digest"), value)
        return base64.urlsafe_b64encode(json.dumps({"of": of, "after": after}).encode()).decode()

    def _known(self, kind: str) -> str:
        texts = self._seen.get(kind)
        return self.random.choice(texts) if texts else self._ugly()

    def _prompt(self) -> str:
        pieces = self.random.sample(_GOOD_PIECES, k=self.random.choice((0, 1, 2, 3)))
        if self._is_strange():
            pieces += self.random.choices(_PROMPT_PIECES, k=self.random.choice((0, 1, 2, 4)))
        if self._is_strange():
            pieces.append(self.random.choice((self._ugly(), "word " * 2_000, "🦊" * 6_001)))
        # URLs come first, or they are text. Behind a parameter the mark would be its value, which is shown.
        pieces.sort(key=lambda piece: 0 if "://" in piece else 2 if piece.startswith("--") else 1)
        first_text = next((at for at, piece in enumerate(pieces) if "://" not in piece), len(pieces))
        return " ".join([*pieces[:first_text], MARK, *pieces[first_text:]])

    def _bytes(self) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (self.random.randrange(256), 0, 0)).save(file, "PNG")
        picture = file.getvalue()
        return self.random.choice(
            (
                b"",
                picture,
                picture,
                picture[: self.random.randrange(len(picture))],
                self.random.randbytes(200),
                b"GIF89a" + bytes(100),
                b"<svg xmlns='http://www.w3.org/2000/svg'/>",
                bytes(100_000),
            )
        )

    def _enum(self, kind: EnumDescriptor) -> int:
        if self._is_strange():
            return self.random.choice((-1, 99, 2**31 - 1))
        return self.random.choice([value.number for value in kind.values][1:])

    def _number(self, name: str, bits: int) -> int:
        if not self._is_strange():
            if name in ("undoes", "version"):
                return 0
            if name.endswith("_bp"):
                return self.random.choice((1, 10_000, 100_000))
            if name == "relax_weight_milli":
                return self.random.choice((1, 1_000, 1_000_000))
            # Some as large as they may be: what is added up of such must not overflow.
            large = (2**53, 10**10) if bits == 64 else (100_000, 2**31 - 1)
            return self.random.choice((1, 3, 10, 1_000, 10_000, 60_000, *large))
        most = 2 ** (bits - 1) - 1
        chosen = self.random.choice((*_INTS, most, -most - 1, self.random.randrange(-most, most)))
        return max(-most - 1, min(most, chosen))

    def _mutated(self, text: str) -> str:
        if not text:
            return self._ugly()
        at = self.random.randrange(len(text))
        change = self.random.choice(("", "\0", "/", "..", "é", text[at].upper(), "0", "\ufeff"))
        return text[:at] + change + text[at + self.random.randrange(2) :]

    def _noise(self, wire: bytes) -> bytes:
        """Return bytes that are no message of the kind, or hardly."""
        noisy = bytearray(wire)
        match self.random.randrange(6):
            case 0:
                return self.random.randbytes(self.random.choice((1, 3, 20, 400)))
            case 1 if noisy:
                for _ in range(self.random.choice((1, 2, 8))):
                    noisy[self.random.randrange(len(noisy))] ^= 1 << self.random.randrange(8)
            case 2 if noisy:
                del noisy[self.random.randrange(len(noisy)) :]
            case 3:
                noisy += b"\xfa\x01\x02\xff\xfe"  # a field that nobody knows, of bytes that are no text
            case 4:
                return b"\x0b" * 5_000  # groups in groups
            case _:
                return wire + b"\x0a\x03\xed\xa0\x80"  # a lone surrogate as the first field
        return bytes(noisy)

    def _ugly(self) -> str:
        return self.random.choice(_UGLY)

    def _uuid(self) -> uuid.UUID:
        return uuid.UUID(int=self.random.getrandbits(128), version=4)

    def _is_strange(self) -> bool:
        return self.random.random() < self._strange


def _kind(field: str, text: str) -> str | None:
    """Return what a text of this field may stand in for; None: nothing."""
    if field in ("charged", "request_id", "etag", "next_page_token"):
        return field.removeprefix("next_")
    parts = text.split("/")
    match parts:
        case ["accounts", _]:
            return "account"
        case ["accounts", _, "jobs", _]:
            return "job"
        case ["accounts", _, "jobs", _, "images" | "videos", _]:
            return "image"
        case ["accounts", _, "keys", _]:
            return "key"
        case ["plans", *_]:
            return "plan"
        case ["workers", *_]:
            return "worker"
    return None
