"""The self-check: sound devices pass, and each way to be unsound is said."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.engine import self_check as checking
from gpu_worker.engine.self_check import self_check

_EXPECTED = torch.linspace(-2, 2, 64, dtype=torch.float64)
_GOOD = _EXPECTED.float()


def test_a_sound_device_passes_and_again() -> None:
    assert self_check(torch.device("cpu")) is None
    assert self_check(torch.device("cpu")) is None


def test_the_tolerance_is_far_above_rounding_and_far_below_a_wrong_number() -> None:
    with torch.no_grad():
        expected = checking._denoised(torch.device("cpu"), torch.float64)
        rounded = checking._denoised(torch.device("cpu"), torch.float32)
    error = float((rounded.double() - expected).abs().max() / expected.abs().max())
    assert error * 1000 < checking._TOLERANCE < 0.01


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (_GOOD + 1e-5, _GOOD + 1e-5, None),
        (_GOOD * 1.01, _GOOD * 1.01, "off by 1.0e-02 of the known result"),
        (_GOOD, _GOOD + 1e-6, "other bits when it was done again"),
        (_GOOD / 0, _GOOD / 0, "not finite"),
    ],
)
def test_what_is_wrong_is_said(first: torch.Tensor, second: torch.Tensor, said: str | None) -> None:
    verdict = checking._verdict(_EXPECTED, first, second)
    assert (verdict is None) if said is None else (verdict is not None and said in verdict)


def test_a_device_that_cannot_compute_at_all_is_not_trusted() -> None:
    # A device of numbers that do not exist: nothing can be read back from it.
    verdict = self_check(torch.device("meta"))
    assert verdict is not None
    assert "could not run on meta" in verdict
