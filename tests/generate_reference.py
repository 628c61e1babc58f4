"""The API as one page: every service, method, message, field and enum of the protos, with its comments.

    python -m tests.generate_reference proto/reference.md

`tests/generate_protos.sh` makes it beside the generated code, and a test compares it with what is committed.
Whoever writes a client reads it; what holds between the calls is on the page beside it, README.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

PROTOS = Path(__file__).resolve().parents[1] / "proto"

HEAD = """\
# Reference

Every service, method, message and enum. What holds between them (keys, request ids, errors, retries) is in
[README.md](README.md). `tests/generate_protos.sh` makes this page of the `.proto` files.
"""

# Numbers of fields within the descriptors, of which the path to a comment is made.
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
_FIELD = _VALUE = _METHOD = 2
_PACKAGE = 2


class Comments:
    """What stands above the things of one file."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._above = {tuple(one.path): one for one in file.source_code_info.location}

    def paragraphs(self, *path: int) -> str:
        """Return a comment with its line breaks."""
        place = self._above.get(path)
        text = place.leading_comments if place else ""
        # Would begin a tag, but for code, which are the odd parts.
        parts = [part if code % 2 else part.replace("<", "\\<") for code, part in enumerate(text.split("`"))]
        return "\n".join(line.strip() for line in "`".join(parts).splitlines())

    def line(self, *path: int) -> str:
        """Return a comment as it stands in a cell of a table."""
        return " ".join(self.paragraphs(*path).split()).replace("|", "\\|")


def files() -> Sequence[FileDescriptorProto]:
    """Return the files of the API, with their comments."""
    with tempfile.TemporaryDirectory(prefix="dr-") as folder:
        out = Path(folder) / "protos"
        sources = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.rglob("*.proto"))
        subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}"),
                *("--include_source_info", f"--descriptor_set_out={out}", *sources),
            ],
            check=True,
        )
        made = FileDescriptorSet.FromString(out.read_bytes())
    # Jobs before money.
    return sorted(made.file, key=lambda file: (file.package.startswith("billing"), file.name))


def reference() -> str:
    """Return the whole page."""
    everything = files()
    services = [f".{file.package}.{service.name}" for file in everything for service in file.service]
    lines = [HEAD, f"Services: {', '.join(_link(name) for name in services)}.\n"]
    for file in everything:
        lines.extend(_file(file))
    return "\n".join(lines)


def _file(file: FileDescriptorProto) -> Iterator[str]:
    comments = Comments(file)
    yield f"## {file.name}\n"
    yield f"{comments.paragraphs(_PACKAGE)}\n"
    for number, service in enumerate(file.service):
        yield from _service(file.package, service, comments, (_SERVICE, number))
    for number, message in enumerate(file.message_type):
        yield from _message(file.package, message, comments, (_MESSAGE, number))
    for number, enum in enumerate(file.enum_type):
        yield from _enum(file.package, enum, comments, (_ENUM, number))


def _service(
    package: str, service: ServiceDescriptorProto, comments: Comments, path: tuple[int, int]
) -> Iterator[str]:
    yield f"### {package}.{service.name}\n"
    yield f"{comments.paragraphs(*path)}\n"
    yield "| method | takes | answers | |"
    yield "|---|---|---|---|"
    for number, method in enumerate(service.method):
        assert not method.client_streaming, "no client sends streams"
        stream = "stream of " if method.server_streaming else ""
        takes, answers = _link(method.input_type), stream + _link(method.output_type)
        yield f"| {method.name} | {takes} | {answers} | {comments.line(*path, _METHOD, number)} |"
    yield ""


def _message(
    package: str, message: DescriptorProto, comments: Comments, path: tuple[int, int]
) -> Iterator[str]:
    maps = {f".{package}.{message.name}.{entry.name}": entry for entry in message.nested_type}
    assert all(entry.options.map_entry for entry in maps.values()), "messages within messages have no heading"
    assert not message.enum_type, "enums within messages have no heading"
    yield f"### {package}.{message.name}\n"
    yield f"{comments.paragraphs(*path)}\n"
    if message.field:
        yield "| number | field | type | |"
        yield "|---|---|---|---|"
    for number, field in enumerate(message.field):
        said = comments.line(*path, _FIELD, number)
        if field.HasField("oneof_index") and not field.proto3_optional:
            said = f"One of `{message.oneof_decl[field.oneof_index].name}`. {said}".strip()
        yield f"| {field.number} | {field.name} | {_type(field, maps)} | {said} |"
    if message.field:
        yield ""


def _type(field: FieldDescriptorProto, maps: Mapping[str, DescriptorProto]) -> str:
    if field.type_name in maps:
        key, value = maps[field.type_name].field
        return f"map from {_type(key, {})} to {_type(value, {})}"
    scalar = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = _link(field.type_name) if field.type_name else scalar
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(full_name: str) -> str:
    name = full_name.removeprefix(".")
    if name.startswith("google."):
        return name
    return f"[{name.rpartition('.')[2]}](#{name.replace('.', '').lower()})"


def _enum(
    package: str, enum: EnumDescriptorProto, comments: Comments, path: tuple[int, int]
) -> Iterator[str]:
    yield f"### {package}.{enum.name}\n"
    yield f"{comments.paragraphs(*path)}\n"
    yield "| number | value | |"
    yield "|---|---|---|"
    for number, value in enumerate(enum.value):
        yield f"| {value.number} | {value.name} | {comments.line(*path, _VALUE, number)} |"
    yield ""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
