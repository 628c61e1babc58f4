"""What the texts tell people to write down works, and leads somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from billing import refusals as money
from billing.refusals import Refusal
from gpu_worker.models import read_models
from scheduler import refusals
from scheduler.client.plan_file import read_file
from scheduler.frontdoor.errors import code_of
from scheduler.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TEXTS = sorted(
    {
        *ROOT.glob("*.md"),
        *(
            text
            for folder in ("proto", "deploy", "scheduler/store/migrations")
            for text in (ROOT / folder).glob("*.md")
        ),
        *ROOT.glob("*/README.md"),
    }
)


def blocks(language: str) -> list[str]:
    """Return the README's code blocks of a language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(text: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text.read_text())
    broken = [link for link in links if link and not (text.parent / link).exists()]
    assert broken == []


def test_the_readmes_plans_file_can_be_read(tmp_path: Path) -> None:
    plans, _, _, _ = blocks("toml")
    path = tmp_path / "plans.toml"
    path.write_text(plans)
    (edit,) = read_file(path)
    assert set(edit.values) == {"minutes", "running", "self_service", "keep_days"}


def test_the_readmes_settings_are_settings() -> None:
    _, settings, _, moderation = blocks("toml")
    Settings(**tomllib.loads(settings + moderation))


def test_the_readmes_models_file_can_be_read(tmp_path: Path) -> None:
    _, _, models, _ = blocks("toml")
    path = tmp_path / "models.toml"
    path.write_text(models)
    assert read_models(path).default.name == "sdxl"


@pytest.mark.parametrize("program", blocks("python"))
def test_the_readmes_programs_compile(program: str) -> None:
    compile(program, "README.md", "exec")


def test_the_page_for_clients_lists_every_refusal_with_its_status() -> None:
    page = (ROOT / "proto" / "README.md").read_text()
    rows = set(re.findall(r"^\| ([A-Z_]+) \| ([A-Z_]+) \|", page, re.MULTILINE))
    classes = [
        kind
        for module in (refusals, money)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Refusal) and kind is not Refusal
    ]
    known = {(code_of(kind.__new__(kind)).name, kind.reason) for kind in classes}
    assert rows == known | {("INTERNAL", "INTERNAL")}
