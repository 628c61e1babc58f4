"""The page that operators look at. It shows and changes nothing, and without a key it shows nothing.

What is on it is refreshed every few seconds by htmx, which puts in the same fragments that the page was made
of; without JavaScript the page is whole, and stands still. Everything that a browser needs comes from here,
and the page's policy lets it load nothing else: no inline script, no other host, no frame.

Keys come over TLS, from this machine, or where the settings allow plain text to keys of gRPC too. What stands
before this port and ends TLS says so by X-Forwarded-Proto; whoever makes that up deceives only himself.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from ipaddress import ip_address
from typing import Any, NoReturn, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined

from scheduler.metrics import GpuUse
from scheduler.ops.lookout import Lookout
from scheduler.ops.sessions import LIFETIME_S, KeyHolder, Keys, LoginTries, Sessions
from scheduler.policy.explain import about
from scheduler.refusals import AccountBlocked, Overloaded, RateLimited, RoleRequired, Unauthenticated
from scheduler.store.accounts import Role

_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Show: TypeAlias = Callable[[web.Request, KeyHolder], Awaitable[web.StreamResponse]]

_COOKIE = "darkroom_ops"
# A browser takes this one only over TLS, and only from the very host that it goes back to.
_COOKIE_OVER_TLS = "__Host-darkroom_ops"

_CONTENT_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

_SECTIONS = ("summary", "queues", "gpu_hour", "gpu_minutes", "workers", "waits", "decisions")
"""Templates of what is refreshed; each fills the element that has its name."""

_SECURITY: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Not `no-referrer`: by that a browser sends `Origin: null` with our own forms too.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class OpsPage:
    """The page of one front door.

    `plain_text_allowed`: keys may come in plain text from other machines. `clock` returns the present time,
    aware; `monotonic_s` is what sessions end by.
    """

    def __init__(
        self,
        *,
        keys: Keys,
        lookout: Lookout,
        plain_text_allowed: bool,
        clock: Callable[[], datetime],
        monotonic_s: Callable[[], float],
    ) -> None:
        self._keys = keys
        self._lookout = lookout
        self._plain_text_allowed = plain_text_allowed
        self._clock = clock
        self._sessions = Sessions(monotonic_s)
        self._tries = LoginTries(monotonic_s)
        self._static = _static()
        self._templates = _templates({name: link for name, (link, _) in self._static.items()})

    def routes(self) -> Sequence[web.RouteDef]:
        """Return what the ops port serves of it."""
        return [
            web.get("/", self._for_operators(self._board)),
            web.get("/refresh", self._for_operators(self._refresh)),
            web.get("/why", self._for_operators(self._why)),
            web.get("/login", self._login_form),
            web.post("/login", self._login),
            web.post("/logout", self._logout),
            web.get("/static/{name}", self._file),
        ]

    # -- what is shown ------------------------------------------------------------------------------

    async def _board(self, request: web.Request, operator: KeyHolder) -> web.Response:
        return self._shown("board.html", operator=operator, seen=await self._lookout.seen())

    async def _refresh(self, request: web.Request, operator: KeyHolder) -> web.Response:
        return self._shown("refresh.html", seen=await self._lookout.seen())

    async def _why(self, request: web.Request, operator: KeyHolder) -> web.Response:
        job_id = _job_id(request)
        why = None if job_id is None else await self._lookout.why(job_id)
        if why is None:
            return self._shown("notice.html", status=404, sentence="There is no such job.")
        return self._shown("why.html", operator=operator, why=why)

    async def _file(self, request: web.Request) -> web.Response:
        known = self._static.get(request.match_info["name"])
        if known is None:
            raise web.HTTPNotFound
        return web.Response(
            body=known[1],
            content_type=_CONTENT_TYPES["." + request.match_info["name"].rpartition(".")[2]],
            charset="utf-8",
            # Their links name their content.
            headers={**_SECURITY, "Cache-Control": "public, max-age=31536000, immutable"},
        )

    # -- who may see it -----------------------------------------------------------------------------

    def _for_operators(self, show: _Show) -> _Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            try:
                operator = await self._operator(request)
                if operator is not None:
                    return await show(request, operator)
            except Overloaded:
                return self._shown(
                    "notice.html",
                    status=503,
                    sentence="The database does not answer, so nobody can tell who you are. Metrics and "
                    "health are shown as ever.",
                )
            if "HX-Request" in request.headers:
                return web.Response(status=401, headers={**_SECURITY, "HX-Redirect": "login"})
            _see_other("login")

        return handler

    async def _operator(self, request: web.Request) -> KeyHolder | None:
        session = _cookie(request)
        key_id = self._sessions.key_of(session)
        if key_id is None:
            return None
        operator = await self._keys.still_admitted(key_id, Role.OPERATOR)
        if operator is None:
            self._sessions.end(session)
        return operator

    async def _login_form(self, request: web.Request) -> web.Response:
        if not self._may_send_a_key(request):
            return self._refused(request)
        return self._shown("login.html", wrong="")

    async def _login(self, request: web.Request) -> web.Response:
        if not self._may_send_a_key(request) or _sent_by_another_site(request):
            return self._refused(request)
        address = request.remote or ""
        wait_s = self._tries.take(address)
        if wait_s > 0:
            return self._wrong(429, "Too many keys were wrong. Try again in a few seconds.", wait_s=wait_s)
        # Not by the library's reader, which fails of what a stranger may call the body.
        form = dict(parse_qsl((await request.read()).decode(errors="replace")))
        try:
            operator = await self._keys.admit_key(form.get("key", "").strip(), Role.OPERATOR)
        except Unauthenticated:
            return self._wrong(403, "No such key, or it was revoked.")
        except RoleRequired:
            return self._wrong(403, "This key may not see the page: it takes the role operator or admin.")
        except AccountBlocked:
            return self._wrong(403, "The account of this key is blocked.")
        except RateLimited as limited:
            return self._wrong(429, str(limited))
        except Overloaded as away:
            return self._wrong(503, str(away))
        self._tries.give_back(address)
        response = web.Response(
            status=303, headers={**_SECURITY, "Location": "./", "Cache-Control": "no-store"}
        )
        tls = _over_tls(request)
        response.set_cookie(
            _COOKIE_OVER_TLS if tls else _COOKIE,
            self._sessions.begin(operator.key_id),
            max_age=LIFETIME_S,
            httponly=True,
            samesite="Strict",
            secure=tls,
            path="/",
        )
        return response

    async def _logout(self, request: web.Request) -> web.Response:
        if _sent_by_another_site(request):
            return self._refused(request)
        self._sessions.end(_cookie(request))
        response = web.Response(
            status=303, headers={**_SECURITY, "Location": "login", "Cache-Control": "no-store"}
        )
        tls = _over_tls(request)
        response.del_cookie(
            _COOKIE_OVER_TLS if tls else _COOKIE, path="/", httponly=True, samesite="Strict", secure=tls
        )
        return response

    def _may_send_a_key(self, request: web.Request) -> bool:
        return self._plain_text_allowed or _over_tls(request) or _from_this_machine(request)

    def _refused(self, request: web.Request) -> web.Response:
        if self._may_send_a_key(request):
            sentence = "Another site sent this. Log in from the page itself."
        else:
            sentence = (
                "A key would be sent in plain text to be read by anybody on the way. Come over TLS, or from "
                "the machine itself: ssh -L 7444:127.0.0.1:7444, or kubectl port-forward."
            )
        return self._shown("notice.html", status=403, sentence=sentence)

    def _wrong(self, status: int, sentence: str, *, wait_s: float = 0.0) -> web.Response:
        response = self._shown("login.html", status=status, wrong=sentence)
        if wait_s:
            response.headers["Retry-After"] = str(math.ceil(wait_s))
        return response

    def _shown(self, template: str, *, status: int = 200, **what: Any) -> web.Response:
        text = self._templates.get_template(template).render(now=self._clock(), **what)
        return web.Response(
            text=text,
            status=status,
            content_type="text/html",
            headers={**_SECURITY, "Cache-Control": "no-store"},
        )


def _see_other(location: str) -> NoReturn:
    raise web.HTTPSeeOther(location, headers=_SECURITY)


def _job_id(request: web.Request) -> uuid.UUID | None:
    try:
        return uuid.UUID(request.query.get("job", ""))
    except ValueError:
        return None


def _cookie(request: web.Request) -> str:
    return request.cookies.get(_COOKIE_OVER_TLS if _over_tls(request) else _COOKIE, "")


def _over_tls(request: web.Request) -> bool:
    return request.secure or request.headers.get("X-Forwarded-Proto", "").lower() == "https"


def _from_this_machine(request: web.Request) -> bool:
    try:
        return ip_address(request.remote or "").is_loopback
    except ValueError:
        return False


def _sent_by_another_site(request: web.Request) -> bool:
    """Return whether a browser says so. Cookies of ours do not come along then, but a key might.

    Over plain text from another machine it says only from which origin a form comes. What is no browser says
    nothing.
    """
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc != request.host


# -- templates ----------------------------------------------------------------------------------------


def _static() -> Mapping[str, tuple[str, bytes]]:
    """Return link and content of what a browser may load, by its name."""
    found = {}
    for file in files("scheduler.ops").joinpath("static").iterdir():
        if "." + file.name.rpartition(".")[2] in _CONTENT_TYPES:
            content = file.read_bytes()
            found[file.name] = (f"static/{file.name}?{hashlib.sha256(content).hexdigest()[:12]}", content)
    return found


def _templates(links: Mapping[str, str]) -> Environment:
    environment = Environment(
        loader=PackageLoader("scheduler.ops"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(about=lambda ms: about(int(ms)), clock=_clock_time, iso=_iso, gib=_gib)
    environment.globals.update(link=links.__getitem__, sections=_SECTIONS, uses=list(GpuUse))
    return environment


def _clock_time(at: datetime | float) -> str:
    return _utc(at).strftime("%H:%M:%S" if isinstance(at, datetime) else "%H:%M")


def _iso(at: datetime | float) -> str:
    return _utc(at).strftime("%Y-%m-%dT%H:%M:%SZ")


def _utc(at: datetime | float) -> datetime:
    return at.astimezone(UTC) if isinstance(at, datetime) else datetime.fromtimestamp(at, UTC)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f}"
