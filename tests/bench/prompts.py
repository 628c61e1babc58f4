"""What becomes of prompts that people typed for other programs: how many are accepted, and why not all.

    python tests/bench/prompts.py [--folder FOLDER] [--show 5]

The folder has `prompts_sdbeta.txt`, a prompt a line, and `prompts_midjourney.tsv` with columns `source` and
`prompt`. Reasons are the sentences without what was typed; a prompt with several counts under each of them.
`--show` prints that many prompts of each reason. Speed is the best of five passes over a file.
"""

from __future__ import annotations

import argparse
import csv
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from gpu_worker.prompt import PromptRefused, parse

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data"
_PASSES = 5
# Longer first: what a reason leaves out must not hide what another is known by.
_REASONS = (
    "only other programs have it",
    "with a space",
    "Unknown parameter",
    "no text before it;",
    "is not a weight",
    "has a weight",
    "names no host",
    "no text before its parameters",
    "stands behind text",
    "cannot be read",
    "read as text; write a space before",
    "read as text; leave",
    "stands alone",
    "more than once",
    "contradict",
    "in place of a size",
    "takes no value",
    "takes one value",
    "needs a value",
    "takes words without",
    "needs words",
    "must be a multiple of 64",
    "must be",
    "text parts and pictures",
    "All weights are zero",
    "control characters",
    "characters; at most",
    "applies to all of the text",
    "weight has no effect",
    "is read as text; a weight",
    "--iw has no effect",
)


def one_a_line(path: Path) -> list[str]:
    """Return the prompts of a text file."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


def with_sources(path: Path) -> list[str]:
    """Return the prompts of a table with a column `prompt`."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row["prompt"] for row in rows]


FILES: tuple[tuple[str, Callable[[Path], list[str]]], ...] = (
    ("prompts_sdbeta.txt", one_a_line),
    ("prompts_midjourney.tsv", with_sources),
)


class Tally:
    """What became of the prompts of a file."""

    def __init__(self, prompts: Iterable[str]) -> None:
        self.accepted = 0
        self.warned: dict[str, list[str]] = defaultdict(list)
        self.refused: dict[str, list[str]] = defaultdict(list)
        self.prompts_warned = 0
        self.prompts_refused = 0
        for prompt in prompts:
            try:
                parsed = parse(prompt)
            except PromptRefused as refused:
                self.prompts_refused += 1
                sentences, under = (violation.sentence for violation in refused.violations), self.refused
            else:
                self.accepted += 1
                self.prompts_warned += bool(parsed.warnings)
                sentences, under = iter(parsed.warnings), self.warned
            for reason in dict.fromkeys(reason_of(sentence) for sentence in sentences):
                under[reason].append(prompt)


def reason_of(sentence: str) -> str:
    """Return what a sentence says whatever was typed."""
    without_typed = re.sub(r"The weight \S+ has", "The weight has", sentence)
    return next((reason for reason in _REASONS if reason in without_typed), sentence)


def characters_per_s(prompts: list[str]) -> float:
    """Return the speed of the parser on prompts, refused ones too."""
    took = []
    for _ in range(_PASSES):
        begin = time.process_time()
        for prompt in prompts:
            try:
                parse(prompt)
            except PromptRefused:
                continue
        took.append(time.process_time() - begin)
    return sum(map(len, prompts)) / min(took)


def _print(name: str, prompts: list[str], show: int) -> None:
    tally = Tally(prompts)
    total = len(prompts)
    print(f"\n{name}: {total:,} prompts, {characters_per_s(prompts):,.0f} characters/s")
    print(f"  {'accepted':<44} {tally.accepted:>6,} {tally.accepted / total:>7.1%}")
    print(f"  {'  with warnings':<44} {tally.prompts_warned:>6,} {tally.prompts_warned / total:>7.1%}")
    print(f"  {'refused':<44} {tally.prompts_refused:>6,} {tally.prompts_refused / total:>7.1%}")
    for kind, reasons in (("warned", tally.warned), ("refused", tally.refused)):
        for reason, found in sorted(reasons.items(), key=lambda item: -len(item[1])):
            print(f"  {kind + ': ' + reason:<44} {len(found):>6,} {len(found) / total:>7.1%}")
            for prompt in found[:show]:
                print(f"      {prompt if len(prompt) <= 100 else '…' + prompt[-99:]}")


def main() -> None:
    """Print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--folder", type=Path, default=FOLDER)
    arguments.add_argument("--show", type=int, default=0, help="prompts to print for each reason")
    chosen = arguments.parse_args()
    for name, read in FILES:
        path = chosen.folder / name
        if path.exists():
            _print(name, read(path), chosen.show)
        else:
            print(f"{path} is not at hand: prompts of other people are not part of the repository")


if __name__ == "__main__":
    main()
