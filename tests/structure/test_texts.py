"""What the texts tell people to write down works, and leads somewhere."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import textwrap
import tomllib
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass
from pydantic import BaseModel

from billing import refusals as money
from billing.refusals import Refusal
from gpu_worker.models import read_models
from scheduler import refusals
from scheduler.client import aio
from scheduler.client.plan_file import read_file
from scheduler.frontdoor.auth import SERVICES
from scheduler.frontdoor.errors import code_of
from scheduler.metrics import catalogue
from scheduler.settings import Settings
from tests.ops.shipped import rules
from tests.structure.pages import (
    FOLDERS,
    PAGES,
    ROOT,
    ask,
    blocks,
    check_options,
    commands,
    mentioned,
    names_in_the_environment,
)

README = (ROOT / "README.md").read_text()
FOR_CLIENTS = (ROOT / "proto" / "README.md").read_text()

# Databases of examples, and a metric that is gone.
_NO_METRICS = {"darkroom_restored", "darkroom_broken", "darkroom_scheduler_metrics_up"}
# Of files that are called as sections are.
_ENDINGS = ("css", "env", "js", "py")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """Return what a link may name on a page: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


@every_page
def test_paths_that_are_named_are_there(page: Path) -> None:
    text = page.read_text()
    quoted = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    typed = [
        word
        for block in blocks(text, "sh")
        for word in re.findall(rf"(?<![\w./])(?:\./)?((?:{'|'.join(FOLDERS)})/[\w./-]+)", block)
    ]
    # A module may be named without its ending, an example is not there, and `deploy/.env` is yours to make.
    missing = {
        path
        for path in (*quoted, *typed)
        if not any((ROOT / name).exists() for name in (path, f"{path}.py")) and path != "deploy/.env"
    }
    assert missing == set()


@every_page
def test_modules_that_are_to_be_run_are_there(page: Path) -> None:
    modules = set(re.findall(r"python -m ([\w.]+)", page.read_text()))
    assert {name for name in modules if importlib.util.find_spec(name) is None} == set()


@every_page
def test_blocks_say_what_they_are(page: Path) -> None:
    fences = re.findall(r"^ *```(\w*)$", page.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= {"sh", "text", "python", "toml", "sql", "yaml", "promql"}
    assert set(fences[1::2]) <= {""}


@every_page
def test_commands_are_ones_that_the_programs_take(page: Path, tmp_path: Path) -> None:
    for program, *words in commands(page.read_text()):
        for number, word in enumerate(words):
            if re.fullmatch(r"[\w./-]+\.[a-z.]+", word):
                file = tmp_path / Path(word).name  # instead of one that the reader has
                file.touch()
                words[number] = str(file)
        ask(Path(program).name, *words)


@every_page
def test_commands_in_sentences_have_names_and_options_that_there_are(page: Path) -> None:
    for words in mentioned(page.read_text()):
        check_options(Path(words[0]).name, *words[1:])


@every_page
def test_names_in_the_environment_are_read(page: Path) -> None:
    used = set(re.findall(r"\bDARKROOM_[A-Z_]*[A-Z]", page.read_text()))
    assert used <= names_in_the_environment()


@every_page
def test_settings_that_are_named_are_settings(page: Path) -> None:
    sections = {
        name: field.annotation.model_fields
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    named = re.findall(rf"`({'|'.join(sections)})\.(\w+)\b[^`(/]*`", page.read_text())
    wrong = {(section, name) for section, name in named if name not in sections[section]}
    assert {f"{section}.{name}" for section, name in wrong if name not in _ENDINGS} == set()


def words_in_quotes(text: str) -> set[str]:
    """Return the names with an underscore that a text has in quotes, without what is assigned to them."""
    return set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?: = [^`]*)?`", text))


def test_names_in_the_readme_are_settings() -> None:
    known = {name.rpartition("__")[2].lower() for name in names_in_the_environment()}
    assert words_in_quotes(README) - known == set()


def test_names_on_the_page_for_clients_are_fields() -> None:
    messages = [
        message
        for file in {service.file for service in SERVICES}
        for message in file.message_types_by_name.values()
    ]
    known = {name for message in messages for name in (*message.fields_by_name, *message.oneofs_by_name)}
    numbers = {name for kind in every_refusal() for name in metadata_of(kind)}
    missing = {"gpu_memory", "gpu_time"}  # of IMPOSSIBLE
    assert words_in_quotes(FOR_CLIENTS) - known - numbers - missing <= {"error_id"}


@every_page
def test_metrics_that_are_named_are_shown(page: Path) -> None:
    shown = {series for family in catalogue() for series in (family.name, *family.series)}
    recorded = {name for rule in rules() if "record" in rule for name in rule["record"].split(":")}
    used = set(re.findall(r"\bdarkroom_[a-z0-9_]+\b", page.read_text()))
    assert used - shown - recorded - _NO_METRICS == set()


def test_the_readmes_plans_file_can_be_read(tmp_path: Path) -> None:
    plans, _, _, _ = blocks(README, "toml")
    path = tmp_path / "plans.toml"
    path.write_text(plans)
    (edit,) = read_file(path)
    assert set(edit.values) == {"minutes", "running", "self_service", "keep_days"}


def test_the_readmes_settings_are_settings() -> None:
    _, settings, _, moderation = blocks(README, "toml")
    Settings(**tomllib.loads(settings + moderation))


def test_the_readmes_models_file_can_be_read(tmp_path: Path) -> None:
    _, _, models, _ = blocks(README, "toml")
    path = tmp_path / "models.toml"
    path.write_text(models)
    assert read_models(path).default.name == "sdxl"


def test_the_readmes_calls_without_a_client_are_calls() -> None:
    (block,) = [block for block in blocks(README, "sh") if "grpcurl" in block]
    (body,) = re.findall(r"-d '(.+)'", block)
    (path,) = re.findall(r"([\w.]+/\w+)$", block, re.MULTILINE)
    methods = {
        f"{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods
    }
    request = json_format.ParseDict(json.loads(body), GetMessageClass(methods[path].input_type)())
    assert request.request_id


def every_refusal() -> list[type[Refusal]]:
    """Return the class of each."""
    return [
        kind
        for module in (refusals, money)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Refusal) and kind is not Refusal
    ]


def metadata_of(kind: type[Refusal]) -> set[str]:
    """Return the names of a refusal's numbers, as its source has them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.metadata)))
    return {
        key.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }


def test_the_page_for_clients_lists_every_refusal_with_its_status_and_numbers() -> None:
    rows = {
        (status, reason): set(re.findall(r"[a-z]+_[a-z_]+|\b(?!(?:of|a|also|cap|spend)\b)[a-z]+", numbers))
        for status, reason, numbers in re.findall(
            r"^\| ([A-Z_]+) \| ([A-Z_]+) \| ([^|]*)\|", FOR_CLIENTS, re.MULTILINE
        )
    }
    known: dict[tuple[str, str], set[str]] = {("INTERNAL", "INTERNAL"): {"error_id"}}
    for kind in every_refusal():
        row = (code_of(kind.__new__(kind)).name, kind.reason)
        known[row] = known.get(row, set()) | metadata_of(kind)
    assert rows == known


def test_the_page_for_clients_has_the_deadlines_of_our_own() -> None:
    source = inspect.getsource(aio)
    ours = {
        method: vars(aio)[constant]
        for method, constant in re.findall(r"\.(\w+), request, (_\w+_DEADLINE_S)\)", source)
    }
    table = FOR_CLIENTS.partition("| call | seconds |")[2].partition("\n\n")[0]
    told = {
        method: float(seconds)
        for calls, seconds in re.findall(r"^\| (.+) \| (\d+) \|$", table, re.MULTILINE)
        for method in re.findall(r"[A-Z]\w+", calls)
    }
    assert told == ours
    assert f"every other | {vars(aio)['_DEADLINE_S']:g} |" in table
