"""Releases that run side by side understand each other: what they say was recorded, and may only grow.

Values travel as pickles, which carry an object's fields and not its constructor's defaults. So a field that
the older side does not send is found on the class, if its default is there; and one that it does not know is
carried along unread. A class, an enum's member or a call that it does not know, it cannot take at all.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from gpu_worker.contract import RunInHand
from scheduler.updates import JobUpdate
from tests.upgrade import wire

RECORDED = (Path(__file__).parent / "wire.txt").read_text().splitlines()

NOT_SENT_YET: frozenset[str] = frozenset()
"""What this release can read, or answers, for the next to send: `RunInHand`, `Outcome.EXPIRED`."""


def test_what_was_said_is_still_understood() -> None:
    gone = set(RECORDED) - set(wire.lines())
    assert not gone, (
        "The release before says these, or expects them. Keep them for one release more, unused; or, if no "
        "release has said them yet, record anew: python -m tests.upgrade.wire > tests/upgrade/wire.txt"
    )


def test_fields_that_came_later_have_defaults_that_their_class_holds() -> None:
    known = {line.partition(":")[0] for line in RECORDED}
    for name, kind in wire.types().items():
        if issubclass(kind, Enum) or f"field {name}" not in {line.rpartition(".")[0] for line in known}:
            continue
        for field in dataclasses.fields(kind):
            came_later = f"field {name}.{field.name}" not in known
            assert not came_later or _has_default(kind, field), (
                f"{name}.{field.name}: a value of the release before has no such field. Give it a default "
                "that is no factory, in a class without slots"
            )


def _has_default(kind: type, field: dataclasses.Field[object]) -> bool:
    """Return whether a value whose pickle lacks the field has it all the same."""
    return field.default is not dataclasses.MISSING and "__slots__" not in vars(kind)


def test_parameters_that_came_later_have_defaults() -> None:
    known = {line.partition(":")[0] for line in RECORDED}
    for name, kinds in wire.calls().items():
        actor, _, method = name.partition(".")
        if f"call {name} return" in known:
            later = [kind for kind in kinds if f"call {name} {kind}" not in known]
            assert set(later) <= set(wire.with_defaults(actor, method)), f"{name} is called without {later}"


def test_classes_members_and_calls_that_came_later_are_understood_a_release_before_they_are_sent() -> None:
    later = _names(wire.lines()) - _names(RECORDED)
    assert later <= NOT_SENT_YET, "the release before does not understand these; see NOT_SENT_YET"


def _names(lines: Iterable[str]) -> set[str]:
    """Return those of classes, members and calls: `RunInHand`, `Outcome.EXPIRED`, `GpuWorker.render`."""
    names = set()
    for line in lines:
        kind, name = line.split()[:2]
        *_, of, one = name.split(".")
        names |= {of} if kind == "field" else {of, f"{of}.{one}"}
    return names


def test_value_of_the_release_before_is_read_with_the_defaults_of_this_one() -> None:
    for value, later in (
        (RunInHand(job_id="j", attempt_id="a", token="t"), "checkpoint"),
        (JobUpdate(job_id="j", event_seq=1, state="running"), "parked"),
    ):
        older = pickle.loads(pickle.dumps(value))
        del older.__dict__[later]
        assert pickle.loads(pickle.dumps(older)) == value


def test_value_of_the_release_after_is_read_without_what_it_added() -> None:
    value = RunInHand(job_id="j", attempt_id="a", token="t")
    newer = pickle.loads(pickle.dumps(value))
    newer.__dict__["warmth"] = 7
    assert pickle.loads(pickle.dumps(newer)) == value
