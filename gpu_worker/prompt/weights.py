"""Weights of a prompt's parts and the shares they come to, in whole numbers.

A weight is exact in millionths of millionths, a share is in millionths, and the shares of a prompt add up to
exactly one without their signs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gpu_worker.contract import WHOLE_PPM

_DECIMALS = 12
ONE = 10**_DECIMALS
"""The weight 1."""
WEIGHTS_ARE = "weights are numbers such as -0.5, with at most 9 digits before the point and 12 after it"

_WEIGHT = re.compile(r"([-+]?)([0-9]{0,9})(?:\.([0-9]{0,12}))?")
_LIKE_A_NUMBER = re.compile(r"[-+−–—]?[.,]*[0-9][0-9.,]*")


def looks_like_weight(word: str) -> bool:
    """Return whether a word was meant as a number, also where it is written as none."""
    return _LIKE_A_NUMBER.fullmatch(word) is not None


def weight_of(typed: str) -> int | None:
    """Return the weight that was typed, in units of 1 / ONE; None if it is none."""
    match = _WEIGHT.fullmatch(typed)
    if match is None or not (match[2] or match[3]):
        return None
    size = int((match[2] or "0") + (match[3] or "").ljust(_DECIMALS, "0"))
    return -size if match[1] == "-" else size


def in_one_unit(texts: Sequence[int], pictures_together: int | None, pictures: int) -> list[int]:
    """Return the weights of all texts, then of all pictures, in one unit.

    Pictures share one weight evenly: what was asked for, or a third of what the texts have without signs,
    which makes it a quarter of all.
    """
    if not pictures:
        return list(texts)
    if pictures_together is None:
        return [weight * 3 * pictures for weight in texts] + [sum(map(abs, texts))] * pictures
    return [weight * pictures for weight in texts] + [pictures_together] * pictures


def shares_ppm(weights: Sequence[int]) -> tuple[int, ...]:
    """Return each weight over the sum of all without signs, in millionths; without signs they make WHOLE_PPM.

    What rounding down leaves goes to the largest remainders, the first of equal ones. Not all may be 0.
    """
    total = sum(map(abs, weights))
    divided = [divmod(abs(weight) * WHOLE_PPM, total) for weight in weights]
    left = WHOLE_PPM - sum(share for share, _ in divided)
    raised = set(sorted(range(len(weights)), key=lambda i: -divided[i][1])[:left])
    sizes = [share + (i in raised) for i, (share, _) in enumerate(divided)]
    return tuple(-size if weight < 0 else size for size, weight in zip(sizes, weights, strict=True))


def decimal(share_ppm: int) -> str:
    """Return the weight that is written like the share: `-0.25`."""
    whole, rest = divmod(abs(share_ppm), WHOLE_PPM)
    digits = f"{whole}.{rest:06}".rstrip("0").rstrip(".")
    return f"-{digits}" if share_ppm < 0 else digits
