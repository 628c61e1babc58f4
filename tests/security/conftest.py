"""A front door on a real socket and a real database: all fixtures that the tests of its parts have."""

from __future__ import annotations

from tests.frontdoor.conftest import *  # noqa: F403 - a fixture may ask for another
