import pytest

from tests.frontdoor.test_frontdoor_watch import (
    test_a_watch_that_its_client_drops_ends_at_the_server_too as t,
)


@pytest.mark.parametrize("i", range(80))
async def test_x(door, i):
    await t(door)
