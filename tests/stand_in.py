"""The model that tests draw with where it does not matter what is drawn: random weights, made in a second."""

from __future__ import annotations

from pathlib import Path

from gpu_worker.models import Models, read_models

STAND_IN_FILE = Path(__file__).with_name("stand_in.toml")


def stand_in_models() -> Models:
    """Return the stand-in as the only model."""
    return read_models(STAND_IN_FILE)
