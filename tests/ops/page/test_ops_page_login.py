"""Only operators see the page: with a key that is good now, for a while, and nobody rides on their cookie."""

from __future__ import annotations

import re

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from scheduler.ops.sessions import LIFETIME_S, LoginTries, Sessions
from scheduler.store import accounts
from scheduler.store.accounts import Role
from tests.loop.conftest import Stage
from tests.ops.page.conftest import OpsPort, Shown, opened

PAGES = ("/", "/refresh", "/why?job=00000000-0000-0000-0000-000000000000")
OPEN = ("/metrics", "/healthz", "/readyz")


async def lets_in(port: OpsPort) -> bool:
    """Return whether the page is shown to whoever has the cookies of now."""
    shown = await port.get("/")
    assert (shown.status, shown.location) in ((200, ""), (303, "login")), shown.status
    return shown.status == 200


@pytest.mark.parametrize("path", PAGES)
async def test_without_a_login_nothing_is_shown(port: OpsPort, path: str) -> None:
    shown = await port.get(path)
    assert (shown.status, shown.location) == (303, "login")
    refreshed = await port.get(path, **{"HX-Request": "true"})
    assert (refreshed.status, refreshed.headers["HX-Redirect"], refreshed.text) == (401, "login", "")


@pytest.mark.parametrize("path", OPEN)
async def test_scrapers_and_probes_need_no_login(port: OpsPort, path: str) -> None:
    assert (await port.get(path)).status == 200


@pytest.mark.parametrize(
    ("role", "enters"),
    [(Role.USER, False), (Role.MODERATOR, False), (Role.OPERATOR, True), (Role.ADMIN, True)],
)
async def test_operators_and_admins_enter(port: OpsPort, role: Role, enters: bool) -> None:
    shown = await port.log_in(await port.key(role=role))
    assert shown.status == (303 if enters else 403)
    assert await lets_in(port) == enters
    if not enters:
        assert "it takes the role operator or admin" in shown.text
        assert not shown.cookies


@pytest.mark.parametrize(
    "key", ["", "dk_", "x" * 5_000, f"dk_{'0' * 16}_{'0' * 64}", "dk_\udcff", "Bearer", "'; DROP TABLE"]
)
async def test_a_wrong_key_gets_one_answer_whatever_is_wrong_with_it(port: OpsPort, key: str) -> None:
    shown = await port.log_in(key.encode(errors="replace").decode())
    assert (shown.status, len(shown.cookies)) == (403, 0)
    assert "No such key, or it was revoked." in shown.text


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"key"),
        ("application/x-www-form-urlencoded; charset=nonsense", b"key=dk_x"),
        ("application/x-www-form-urlencoded", b"\xff\x00=%ff&&==&key"),
        ("application/json", b'{"key": 1}'),
        ("", b"&" * 16_000),
    ],
)
async def test_what_is_no_form_is_a_wrong_key(port: OpsPort, content_type: str, body: bytes) -> None:
    headers = {"Content-Type": content_type}
    async with port.session.post("/login", data=body, headers=headers) as answer:
        assert answer.status == 403


async def test_a_body_that_no_key_fills_is_not_read(port: OpsPort) -> None:
    assert (await port.log_in("x" * 20_000)).status == 413


async def test_a_good_id_with_another_secret_is_wrong_and_the_key_is_not_shown_again(port: OpsPort) -> None:
    key = await port.key()
    shown = await port.log_in(key[:-1] + ("0" if key[-1] != "0" else "1"))
    assert shown.status == 403
    assert key[:30] not in shown.text


async def test_the_cookie_is_for_this_page_alone(port: OpsPort) -> None:
    shown = await port.log_in()
    (cookie,) = shown.cookies.values()
    assert (cookie.key, cookie["path"], cookie["domain"]) == ("darkroom_ops", "/", "")
    assert (cookie["httponly"], cookie["samesite"], cookie["secure"]) == (True, "Strict", "")
    assert int(cookie["max-age"]) == LIFETIME_S
    assert len(cookie.value) >= 40


async def test_over_tls_the_cookie_never_goes_in_plain_text(port: OpsPort) -> None:
    shown = await port.log_in(**{"X-Forwarded-Proto": "https"})
    (cookie,) = shown.cookies.values()
    assert (cookie.key, cookie["secure"], cookie["path"]) == ("__Host-darkroom_ops", True, "/")
    tls = {"X-Forwarded-Proto": "https", "Cookie": f"__Host-darkroom_ops={cookie.value}"}
    assert (await port.get("/", **tls)).status == 200
    assert (await port.get("/", Cookie=f"__Host-darkroom_ops={cookie.value}")).status == 303


async def test_each_login_has_another_cookie(port: OpsPort) -> None:
    key = await port.key()
    first, second = await port.log_in(key), await port.log_in(key)
    assert first.cookies["darkroom_ops"].value != second.cookies["darkroom_ops"].value


async def test_a_session_ends_after_eight_hours(port: OpsPort) -> None:
    await port.log_in()
    port.clock.pass_s(LIFETIME_S - 1)
    assert await lets_in(port)
    port.clock.pass_s(2)
    assert not await lets_in(port)


@pytest.fixture
async def logged_in(port: OpsPort) -> OpsPort:
    """Somebody who is on the page."""
    await port.log_in()
    assert await lets_in(port)
    return port


async def test_a_session_ends_within_a_second_of_its_keys_revocation(logged_in: OpsPort) -> None:
    async with logged_in.stage.pool.transaction() as connection:
        (key,) = await accounts.keys(connection, "olga")
        await accounts.revoke_key(connection, "olga", key.key_id, logged_in.clock.now())
    logged_in.clock.pass_s(1)
    assert not await lets_in(logged_in)


async def test_a_session_ends_when_its_account_is_blocked(logged_in: OpsPort) -> None:
    await logged_in.stage.connection.execute("UPDATE scheduler.account SET blocked = true")
    logged_in.clock.pass_s(1)
    assert not await lets_in(logged_in)
    await logged_in.stage.connection.execute("UPDATE scheduler.account SET blocked = false")
    logged_in.clock.pass_s(1)
    assert not await lets_in(logged_in), "it ended, and does not come back"


async def test_a_session_ends_when_its_key_loses_the_role(logged_in: OpsPort) -> None:
    await logged_in.stage.connection.execute("UPDATE scheduler.api_key SET role = 'moderator'")
    logged_in.clock.pass_s(1)
    assert not await lets_in(logged_in)


async def test_logging_out_ends_the_session_not_only_the_cookie(logged_in: OpsPort) -> None:
    (cookie,) = [one for one in logged_in.session.cookie_jar if one.key == "darkroom_ops"]
    shown = await logged_in.post("/logout")
    assert (shown.status, shown.location) == (303, "login")
    assert shown.cookies["darkroom_ops"]["max-age"] == "0"
    assert not await lets_in(logged_in)
    assert (await logged_in.get("/", Cookie=f"darkroom_ops={cookie.value}")).status == 303


async def test_a_cookie_that_was_made_up_opens_nothing(port: OpsPort) -> None:
    for value in ("", "x", "A" * 43, "\xff"):
        assert (await port.get("/", Cookie=f"darkroom_ops={value}")).status == 303


async def test_ten_tries_may_fail_and_then_one_in_six_seconds(port: OpsPort) -> None:
    good = await port.key()
    for _ in range(10):
        assert (await port.log_in("dk_wrong")).status == 403
    refused = await port.log_in(good)
    assert (refused.status, refused.headers["Retry-After"]) == (429, "6")
    port.clock.pass_s(6)
    for _ in range(3):
        assert (await port.log_in(good)).status == 303, "a right one costs no try"
    assert (await port.log_in("dk_wrong")).status == 403
    assert (await port.log_in("dk_wrong")).status == 429


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("path", ["/login", "/logout"])
async def test_another_site_can_send_neither_form(logged_in: OpsPort, path: str, site: str) -> None:
    shown = await logged_in.post(path, {"key": await logged_in.key()}, **{"Sec-Fetch-Site": site})
    assert (shown.status, len(shown.cookies)) == (403, 0)
    assert await lets_in(logged_in)


@pytest.mark.parametrize("origin", ["http://elsewhere", "http://127.0.0.1:1", "null", ""])
@pytest.mark.parametrize("path", ["/login", "/logout"])
async def test_another_site_can_send_neither_form_in_plain_text(
    logged_in: OpsPort, path: str, origin: str
) -> None:
    shown = await logged_in.post(path, {"key": await logged_in.key()}, Origin=origin)
    assert (shown.status, len(shown.cookies)) == (403, 0)
    assert await lets_in(logged_in)
    assert (await logged_in.post(path, {"key": await logged_in.key()}, Origin=logged_in.url)).status == 303


@pytest.mark.parametrize("path", ["/", "/refresh", "/why", "/metrics"])
async def test_the_page_changes_nothing(logged_in: OpsPort, path: str) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        async with logged_in.session.request(method, path) as answer:
            assert answer.status == 405


async def test_every_answer_of_the_page_is_guarded(logged_in: OpsPort) -> None:
    board = await logged_in.get("/")
    links = [
        link
        for link in board.text.split('"')
        if link.startswith("static/") and not link.startswith("static/ ")
    ]
    assert len(links) >= 5
    answers = [board, await logged_in.get("/refresh"), await logged_in.get("/login")]
    answers += [await logged_in.get(f"/{link}") for link in links]
    answers += [
        await logged_in.get("/why?job=x"),
        await logged_in.log_in("dk_wrong"),
        await logged_in.log_in(),
    ]
    answers += [await logged_in.post("/logout"), await logged_in.get("/")]
    for answer in answers:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert answer.headers["X-Frame-Options"] == "DENY"
    for shown in (board, *answers[:3]):
        assert shown.headers["Cache-Control"] == "no-store"


async def test_no_script_and_no_style_is_in_the_page_itself(logged_in: OpsPort) -> None:
    for path in ("/", "/refresh", "/login"):
        text = (await logged_in.get(path)).text
        assert "<script>" not in text
        assert "<style" not in text
        assert " style=" not in text
        assert re.search(r"<[^>]*\son\w+=", text) is None


@pytest.mark.parametrize("name", ["..%2fpage.py", "%2e%2e/page.py", "README.md", "htmx-LICENSE.txt", "x.js"])
async def test_only_what_the_page_loads_is_served(port: OpsPort, name: str) -> None:
    assert (await port.get(f"/static/{name}")).status == 404


async def answered(port: OpsPort, method: str, *, remote: str, **headers: str) -> Shown:
    """Return what a caller elsewhere gets for `/login`."""
    request = make_mocked_request(method, "/login", headers=headers).clone(remote=remote)
    (route,) = [one for one in port.page.routes() if (one.method, one.path) == (method, "/login")]
    response = await route.handler(request)  # type: ignore[call-arg, arg-type, misc]
    assert isinstance(response, web.Response)
    return Shown(
        status=response.status, text=response.text or "", headers=response.headers, cookies=response.cookies
    )


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_from_elsewhere_no_key_is_taken_in_plain_text(port: OpsPort, method: str) -> None:
    shown = await answered(port, method, remote="192.0.2.7")
    assert shown.status == 403
    assert "in plain text" in shown.text
    assert "<input" not in shown.text


@pytest.mark.parametrize("remote", ["127.0.0.1", "::1", "127.3.2.1"])
async def test_from_this_machine_the_form_is_shown(port: OpsPort, remote: str) -> None:
    assert "<input" in (await answered(port, "GET", remote=remote)).text


async def test_from_elsewhere_the_form_is_shown_over_tls_or_where_the_settings_allow_it(
    port: OpsPort, stage: Stage
) -> None:
    tls = {"X-Forwarded-Proto": "https"}
    assert "<input" in (await answered(port, "GET", remote="192.0.2.7", **tls)).text
    async with opened(stage, plain_text_allowed=True) as lenient:
        assert "<input" in (await answered(lenient, "GET", remote="192.0.2.7")).text


def test_sessions_are_bounded_for_each_key_and_in_all() -> None:
    now_s = 0.0
    sessions = Sessions(lambda: now_s)
    of_one = [sessions.begin("one") for _ in range(11)]
    assert [sessions.key_of(value) for value in of_one] == [None] + ["one"] * 10
    others = [sessions.begin(f"key {number}") for number in range(1_000)]
    assert sessions.key_of(of_one[-1]) is None, "the oldest of all ended"
    assert all(sessions.key_of(value) for value in others)


def test_whoever_has_a_network_of_ipv6_has_no_more_tries_than_others() -> None:
    tries = LoginTries(lambda: 0.0)
    assert [tries.take(f"2001:db8::{number:x}") for number in range(10)] == [0.0] * 10
    assert tries.take("2001:db8::ffff") == 6.0
    assert tries.take("2001:db8:0:1::1") == 0.0
    assert tries.take("::ffff:192.0.2.7") == 0.0
    assert [tries.take("192.0.2.7") for _ in range(9)] == [0.0] * 9
    assert tries.take("192.0.2.7") == 6.0


def test_tries_of_a_flood_of_addresses_take_bounded_memory() -> None:
    tries = LoginTries(lambda: 0.0)
    for number in range(25_000):
        tries.take(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(tries._tries) <= 10_000
