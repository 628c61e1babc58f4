"""`python -m tests.faults.skewed_clock SECONDS serve …`: a process of the service whose clock is wrong.

Every wall time that Python code of that process reads is off by so many seconds; durations are not, as on a
machine whose clock was set wrongly before it started. libfaketime would do it to the C code too, which
decides nothing here, and it is on few machines.
"""

from __future__ import annotations

import datetime
import sys
from typing import Self

OFF_BY = datetime.timedelta(seconds=float(sys.argv.pop(1)))
_Right = datetime.datetime


class _Alike(type):
    """What the drivers, written in C, make of the database's times are of this class too."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _Right)


class _Wrong(_Right, metaclass=_Alike):
    """Tells the wrong time, as a plain datetime."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Self:
        return _Right.now(tz) + OFF_BY  # type: ignore[return-value]


# Before anything of the service is imported, which takes the class from the module by name.
datetime.datetime = _Wrong  # type: ignore[misc]

if __name__ == "__main__":
    from scheduler.__main__ import server

    server()
