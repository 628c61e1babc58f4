"""What front doors, schedulers and workers say to each other over Ray, as a list of lines.

`python -m tests.upgrade.wire > tests/upgrade/wire.txt` records it when a release is made.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from gpu_worker.actor import GpuWorker
from scheduler.cluster.scheduler_actor import SchedulerActor

ACTORS: dict[str, type] = {
    actor.__ray_metadata__.modified_class.__name__: actor.__ray_metadata__.modified_class
    for actor in (GpuWorker, SchedulerActor)  # type: ignore[attr-defined]
}


def calls() -> dict[str, dict[str, Any]]:
    """Return the types of parameters and answers (`return`) of the actors' methods.

    Without those that only a test and an actor itself use.
    """
    return {
        # Ray puts wrappers around each, for tracing, and a parameter into them.
        f"{actor}.{name}": {
            parameter: kind
            for parameter, kind in typing.get_type_hints(
                inspect.unwrap(method), vars(sys.modules[of.__module__])
            ).items()
            if parameter != "_ray_trace_ctx"
        }
        for actor, of in ACTORS.items()
        for name, method in inspect.getmembers(of, inspect.isfunction)
        if not name.startswith("_") and name != "pid"
    }


def with_defaults(actor: str, method: str) -> list[str]:
    """Return the parameters of an actor's method that may be left out."""
    function = inspect.unwrap(getattr(ACTORS[actor], method))
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return list(names[len(names) - len(function.__defaults__ or ()) :])


def types() -> dict[str, type]:
    """Return every class of ours that comes with a call or an answer, by its full name."""
    found: dict[str, type] = {}
    for kinds in calls().values():
        for kind in kinds.values():
            _find(kind, found)
    return dict(sorted(found.items()))


def lines() -> Iterator[str]:
    """Yield the list: one line for each parameter and answer, each field and each member."""
    for name, kinds in sorted(calls().items()):
        for parameter, kind in kinds.items():
            yield f"call {name} {parameter}: {_written(kind)}"
    for name, kind in types().items():
        if issubclass(kind, Enum):
            for member in kind:
                yield f"member {name}.{member.name} = {member.value!r}"
        else:
            hints = typing.get_type_hints(kind)
            for field in dataclasses.fields(kind):
                yield f"field {name}.{field.name}: {_written(hints[field.name])}"


def _find(annotation: Any, found: dict[str, type]) -> None:
    if isinstance(annotation, typing.NewType):
        _find(annotation.__supertype__, found)
    elif typing.get_args(annotation):
        for argument in typing.get_args(annotation):
            _find(argument, found)
    elif isinstance(annotation, type) and annotation.__module__.partition(".")[0] in (
        "scheduler",
        "gpu_worker",
    ):
        name = f"{annotation.__module__}.{annotation.__qualname__}"
        if name not in found:
            found[name] = annotation
            if not issubclass(annotation, Enum):
                assert dataclasses.is_dataclass(annotation), f"{name} is no plain value"
                for hint in typing.get_type_hints(annotation).values():
                    _find(hint, found)


def _written(annotation: Any) -> str:
    return inspect.formatannotation(annotation).replace("collections.abc.", "")


if __name__ == "__main__":
    print(*lines(), sep="\n")
