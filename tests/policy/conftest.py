"""How far properties are searched, and that a failure says how to have it again.

A run stays within minutes and tries the same examples each time, so that a change is judged by what it
changed. With DARKROOM_LONG=1 in the environment it searches many times as far, each time elsewhere; a failing
example is printed with the blob that reproduces it, and may be had again anywhere with the seed that
`--hypothesis-seed` takes. Properties are judged by what they find, never by how long an example takes on a
busy machine.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_COMMON = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.register_profile("policy", _COMMON, max_examples=120, derandomize=True)
settings.register_profile("policy-long", _COMMON, max_examples=5000)
settings.load_profile("policy-long" if os.environ.get("DARKROOM_LONG") else "policy")
