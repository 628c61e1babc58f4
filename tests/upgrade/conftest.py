"""What tests of an upgrade share with those of the loop and of the service."""

from __future__ import annotations

from tests.loop.conftest import promises, stage
from tests.service.conftest import data_dir

__all__ = ["data_dir", "promises", "stage"]
