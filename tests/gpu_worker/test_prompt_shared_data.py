"""The prompt language on other people's prompts, where a folder `shared/data` lies beside the checkout."""

from __future__ import annotations

import pytest

from gpu_worker.prompt import ParsedPrompt, PromptRefused, parse, print_prompt
from tests.bench.prompts import FILES, FOLDER, Tally


def prompts_of(name: str) -> list[str]:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{path} is not at hand: prompts of other people are not part of the repository")
    return dict(FILES)[name](path)


def accepted(prompts: list[str]) -> list[ParsedPrompt]:
    """Return those that are accepted; whatever is raised but a refusal fails the test."""
    found = []
    for prompt in prompts:
        try:
            found.append(parse(prompt))
        except PromptRefused:
            continue
    return found


def test_nearly_all_prompts_of_the_stable_diffusion_beta_are_accepted() -> None:
    """The others have parameters of its bot, or a parameter glued to a word."""
    tally = Tally(prompts_of("prompts_sdbeta.txt"))
    assert tally.accepted >= 0.99 * (tally.accepted + tally.prompts_refused)
    assert tally.prompts_warned <= 0.02 * tally.accepted


def test_prompts_of_midjourney_are_refused_only_for_what_is_not_offered() -> None:
    """They show off its parameters (`--v`, `--stylize`), alternatives in braces, pictures without text."""
    tally = Tally(prompts_of("prompts_midjourney.tsv"))
    assert tally.accepted >= 6
    not_offered = {
        *tally.refused["only other programs have it"],
        *tally.refused["Unknown parameter"],
        *tally.refused["no text before its parameters"],
    }
    of_another_size = set(tally.refused["must be a multiple of 64"])
    assert len(not_offered | of_another_size) >= tally.prompts_refused - 1


@pytest.mark.parametrize("name", [name for name, _ in FILES])
def test_what_people_type_is_printed_and_parsed_again(name: str) -> None:
    for parsed in accepted(prompts_of(name)):
        assert parse(print_prompt(parsed)) == parsed
