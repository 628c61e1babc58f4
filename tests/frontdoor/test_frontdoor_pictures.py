"""Pictures of a prompt are read once and stored, and no URL shows anybody a network but the public one."""

from __future__ import annotations

import asyncio
import hashlib
import io
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import fsspec
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

from scheduler.frontdoor.artifacts import Artifacts
from scheduler.frontdoor.errors import status_of
from scheduler.frontdoor.picture_urls import Address, Reachable, SystemNames, is_public
from scheduler.frontdoor.pictures import Pictures
from scheduler.refusals import Overloaded, PictureUnreadable
from scheduler.settings import Pictures as PictureSettings

LOOPBACK = "127.0.0.1"
CANNOT = "Picture URL 1 cannot be reached: it must be on a public host on the internet; or upload it."
DIRECT = "give a direct link to a .png, .jpg or .webp picture."


def a_picture(colour: str = "red", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 16), colour).save(file, kind)
    return file.getvalue()


class Names(AbstractResolver):
    """Answers as a test says: each name's answers in turn, the last one again and again."""

    def __init__(self, **answers: Sequence[tuple[str, int]]) -> None:
        self.answers = {name.replace("_", "."): list(given) for name, given in answers.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self.asked.append(host)
        answers = self.answers.get(host)
        if answers is None:
            raise OSError("no such name")
        address, port = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)
        ]

    async def close(self) -> None:
        pass


@dataclass
class Site:
    """A web site on this machine, and what it was asked for."""

    port: int
    pages: dict[str, Callable[[web.Request], Any]] = field(default_factory=dict)
    requests: list[web.Request] = field(default_factory=list)

    def picture(self, path: str, content: bytes | None = None, **headers: str) -> None:
        content = a_picture() if content is None else content
        headers = {"Content-Type": "image/png"} | {name.replace("_", "-"): v for name, v in headers.items()}
        self.pages[path] = lambda _: web.Response(body=content, headers=headers)

    def redirect(self, path: str, to: str, status: int = 302) -> None:
        self.pages[path] = lambda _: web.Response(status=status, headers={"Location": to})

    @property
    def asked(self) -> list[str]:
        return [request.path for request in self.requests]


async def serve(tls: ssl.SSLContext | None = None) -> tuple[Site, web.AppRunner]:
    site = Site(port=0)

    async def answer(request: web.Request) -> web.StreamResponse:
        site.requests.append(request)
        page = site.pages.get(request.path)
        if page is None:
            return web.Response(status=404, text="SECRET")
        answer = page(request)
        return await answer if asyncio.iscoroutine(answer) else answer

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, LOOPBACK, 0, ssl_context=tls).start()
    site.port = runner.addresses[0][1]
    return site, runner


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """A web site at http://site.test."""
    site, runner = await serve()
    yield site
    await runner.cleanup()


@pytest.fixture
def names(site: Site) -> Names:
    return Names(site_test=[(LOOPBACK, site.port)])


def only_loopback(address: Address) -> bool:
    return address == ip_address(LOOPBACK)


@pytest.fixture
def pictures(tmp_path: Path, names: Names) -> Callable[..., Pictures]:
    """Make pictures that may be fetched by http, and from loopback unless a test says otherwise."""

    def make(reachable: Reachable | None = only_loopback, **settings: Any) -> Pictures:
        given: dict[str, Any] = {} if reachable is None else {"reachable": reachable}
        return Pictures(
            Artifacts(f"file://{tmp_path}/artifacts"),
            PictureSettings(**{"http_allowed": True, "fetch_ms": 5_000} | settings),
            resolver=names,
            **given,
        )

    return make


@pytest.fixture
def kept(tmp_path: Path) -> Callable[[], set[str]]:
    """Return the files in the artifact store."""
    root = tmp_path / "artifacts"
    return lambda: {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


async def stored(
    pictures: Pictures, uploads: Sequence[bytes], urls: Sequence[str], account_id: str = "ann"
) -> tuple[str, ...]:
    async def note(paths: Sequence[str]) -> None:
        pass

    return await pictures.stored(account_id, uploads, urls, note)


async def cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def refused(pictures: Pictures, *urls: str, uploads: Sequence[bytes] = ()) -> list[str]:
    with pytest.raises(PictureUnreadable) as caught:
        await stored(pictures, uploads, urls)
    return [violation.sentence for violation in caught.value.violations]


# What is stored.


async def test_pictures_are_stored_by_their_hash_uploads_first(
    pictures: Callable[..., Pictures], site: Site, tmp_path: Path
) -> None:
    site.picture("/blue.webp", a_picture("blue", "WEBP"), Content_Type="image/webp")
    site.picture("/lime.jpg", a_picture("lime", "JPEG"), Content_Type="image/jpeg")
    paths = await stored(
        pictures(), [a_picture("red")], ["http://site.test/blue.webp", "http://site.test/lime.jpg?x=Y"]
    )
    colours = []
    for path in paths:
        content = (tmp_path / "artifacts" / path).read_bytes()
        assert path == f"pictures/{hashlib.sha256(content).hexdigest()}.png"
        image = Image.open(io.BytesIO(content))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 16))
        pixel = image.getpixel((5, 5))
        assert isinstance(pixel, tuple)
        colours.append(max(range(3), key=pixel.__getitem__))
    assert colours == [0, 2, 1]


async def test_the_same_picture_is_one_file(
    pictures: Callable[..., Pictures], kept: Callable[[], set[str]]
) -> None:
    made = pictures()
    first = await stored(made, [a_picture(), a_picture()], [])
    assert first == await stored(made, [a_picture(), a_picture()], [])
    assert set(first) == kept()
    assert len(kept()) == 1


async def test_an_object_store_gets_them_too() -> None:
    store = fsspec.filesystem("memory")
    (path,) = await stored(Pictures(Artifacts("memory://prompts"), PictureSettings()), [a_picture()], [])
    assert hashlib.sha256(store.cat_file(f"/prompts/{path}")).hexdigest() in path


async def test_pictures_are_noted_before_any_is_written(
    pictures: Callable[..., Pictures], kept: Callable[[], set[str]]
) -> None:
    noted: list[str] = []

    async def note(paths: Sequence[str]) -> None:
        assert kept() == set()
        noted.extend(paths)

    paths = await pictures().stored("ann", [a_picture("red"), a_picture("blue")], [], note)
    assert tuple(noted) == paths
    assert set(paths) == kept()


async def test_pictures_that_cannot_be_noted_are_not_written(
    pictures: Callable[..., Pictures], kept: Callable[[], set[str]]
) -> None:
    async def note(paths: Sequence[str]) -> None:
        raise Overloaded(sentence="the database is away")

    with pytest.raises(Overloaded):
        await pictures().stored("ann", [a_picture()], [], note)
    assert kept() == set()


async def test_all_unreadable_pictures_are_named_at_once_and_none_is_stored(
    pictures: Callable[..., Pictures], site: Site, kept: Callable[[], set[str]]
) -> None:
    site.picture("/sound.png")
    with pytest.raises(PictureUnreadable) as caught:
        await stored(
            pictures(),
            [a_picture(), b"no picture"],
            ["http://site.test/nothing.png", "http://site.test/sound.png", "ftp://x"],
        )
    assert [violation.field for violation in caught.value.violations] == [
        "imagine.pictures[1]",
        "prompt",
        "prompt",
    ]
    assert [violation.sentence[:18] for violation in caught.value.violations] == [
        "Uploaded picture 2",
        "Picture URL 1 answ",
        "Picture URL 3 begi",
    ]
    assert kept() == set()
    status = status_of(caught.value)
    assert status.ByteSize() < 4_096
    assert len(status.details) == 2


async def test_a_store_that_cannot_be_written_is_no_fault_of_the_picture(
    pictures: Callable[..., Pictures], tmp_path: Path
) -> None:
    (tmp_path / "artifacts").write_text("not a folder")
    with pytest.raises(Overloaded):
        await stored(pictures(), [a_picture()], [])


async def test_requests_that_would_wait_too_long_are_sent_away(
    pictures: Callable[..., Pictures], site: Site
) -> None:
    site.pages["/never.png"] = lambda _: asyncio.Event().wait()
    made = pictures(fetch_ms=300)
    outcomes = await asyncio.gather(
        *(stored(made, [], ["http://site.test/never.png"], f"account-{n}") for n in range(16)),
        return_exceptions=True,
    )
    kinds = [type(outcome) for outcome in outcomes]
    assert set(kinds) <= {PictureUnreadable, Overloaded}
    assert kinds.count(PictureUnreadable) >= 8
    assert await stored(made, [a_picture()], [])


async def test_no_more_than_sixteen_requests_are_read_or_wait(
    pictures: Callable[..., Pictures], site: Site
) -> None:
    site.pages["/never.png"] = lambda _: asyncio.Event().wait()
    made = pictures()
    others = [
        asyncio.create_task(stored(made, [], ["http://site.test/never.png"], f"account-{n // 2}"))
        for n in range(16)
    ]
    await asyncio.sleep(0)
    try:
        with pytest.raises(Overloaded):
            await stored(made, [a_picture()], [], "ann")
    finally:
        await cancelled(others)
    assert await stored(made, [a_picture()], [], "ann"), "their places are free again"


async def test_an_account_that_sends_many_requests_keeps_nobody_else_from_theirs(
    pictures: Callable[..., Pictures], site: Site
) -> None:
    site.pages["/never.png"] = lambda _: asyncio.Event().wait()
    made = pictures()
    anns = [asyncio.create_task(stored(made, [], ["http://site.test/never.png"], "ann")) for _ in range(2)]
    await asyncio.sleep(0)
    try:
        for _ in range(20):
            with pytest.raises(Overloaded):
                await stored(made, [a_picture()], [], "ann")
        assert await stored(made, [a_picture()], [], "ben")
    finally:
        await cancelled(anns)
    assert await stored(made, [a_picture()], [], "ann")


# Which addresses may be reached.


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.8.8.8",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "::ffff:0:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::808:808",
        "64:ff9b:1::7f00:1",
        "100::1",
        "2001::1",
        "2001:0:7f00:1::",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::1",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_what_is_not_a_public_host_may_not_be_reached(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "100.128.0.1", "172.32.0.1", "192.1.0.1", "2606:4700::1111", "2a00:1450::8a"],
)
def test_public_hosts_may_be_reached(address: str) -> None:
    assert is_public(ip_address(address))


async def test_an_account_whose_names_are_never_answered_keeps_no_other_account_from_theirs() -> None:
    answered = threading.Event()
    asked: list[str] = []

    def look_up(host: str, port: int, **_: int) -> list[tuple[int, int, int, str, tuple[Any, ...]]]:
        asked.append(host)
        if host.endswith(".silent"):
            answered.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (LOOPBACK, port))]

    names = SystemNames(look_up)
    ann, ben = names.asked_by("ann"), names.asked_by("ben")
    try:
        silent = [asyncio.create_task(ann.resolve(f"{n}.silent", 80)) for n in range(10)]
        assert (await ben.resolve("site.test", 80))[0]["host"] == LOOPBACK
        # Whoever gives up leaves its threads waiting.
        await cancelled(silent[:2])
        third = asyncio.create_task(names.asked_by("ann").resolve("site.test", 443))
        assert (await ben.resolve("site.test", 80))[0]["host"] == LOOPBACK
        assert sorted(asked) == ["0.silent", "1.silent", "site.test", "site.test"]
        assert not third.done()
    finally:
        answered.set()
    assert (await third)[0]["port"] == 443
    await cancelled(silent)


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Pictures, list[str]]:
    """Pictures from public hosts by the system's own resolver, and the addresses it asked about."""
    asked: list[str] = []

    def reachable(address: Address) -> bool:
        asked.append(str(address))
        assert not is_public(address), "or the test would connect to it"
        return False

    settings = PictureSettings(http_allowed=True, fetch_ms=2_000)
    return Pictures(Artifacts(f"file://{tmp_path}"), settings, reachable=reachable), asked


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("①②⑦.⓪.⓪.①", "127.0.0.1"),
        ("127。0。0。1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[::ffff:127.0.0.1]", "::ffff:7f00:1"),
        ("[::127.0.0.1]", "::7f00:1"),
        ("[64:ff9b::127.0.0.1]", "64:ff9b::7f00:1"),
        ("[2002:7f00:1::]", "2002:7f00:1::"),
        ("169.254.169.254", "169.254.169.254"),
        ("[fd00:ec2::254]", "fd00:ec2::254"),
    ],
)
async def test_addresses_are_judged_as_names_are(
    host: str, address: str, judged: tuple[Pictures, list[str]]
) -> None:
    pictures, asked = judged
    assert await refused(pictures, f"http://{host}/a.png") == [CANNOT]
    assert address in asked


# Some of these Python refuses, some the system's resolver takes for 127.0.0.1.
@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1.",
        "127.1",
        "2130706433",
        "0177.0.0.1",
        "0x7f000001",
        "0x7f.1",
        "0x7F.0.0.0x1",
        "127%2e0%2e0%2e1",
        "[fe80::1%25lo]",
        "LOCALHOST.",
        "nowhere.invalid",
        "a" * 64 + ".test",
    ],
)
async def test_however_it_is_spelled_a_private_host_reads_as_one_that_is_not_there(
    host: str, judged: tuple[Pictures, list[str]]
) -> None:
    pictures, _ = judged
    assert await refused(pictures, f"http://{host}/a.png") == [CANNOT]


async def test_a_name_that_leads_inside_is_not_followed(
    pictures: Callable[..., Pictures], site: Site
) -> None:
    site.picture("/a.png")
    assert await refused(pictures(reachable=None), "http://site.test/a.png") == [CANNOT]
    assert site.asked == []
    assert await stored(pictures(), [], ["http://site.test/a.png"]), "or nothing was shown"


async def test_a_name_that_leads_outside_and_inside_is_only_followed_outside(
    pictures: Callable[..., Pictures], site: Site, names: Names
) -> None:
    async def both(host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host, host=address, port=site.port, family=socket.AF_INET, proto=0, flags=0
            )
            for address in ("10.0.0.1", LOOPBACK)
        ]

    judged: list[str] = []

    def reachable(address: Address) -> bool:
        judged.append(str(address))
        return only_loopback(address)

    names.resolve = both  # type: ignore[method-assign]
    site.picture("/a.png")
    assert await stored(pictures(reachable), [], ["http://site.test/a.png"])
    assert judged[0] == "10.0.0.1"
    assert judged[-1] == LOOPBACK


async def test_a_name_that_changes_its_mind_is_asked_once(
    pictures: Callable[..., Pictures], site: Site, names: Names
) -> None:
    # Of the two, only one that nobody listens at may be reached.
    names.answers["site.test"] = [("127.0.0.2", site.port), (LOOPBACK, site.port)]
    site.picture("/a.png")
    made = pictures(lambda address: str(address) == "127.0.0.2")
    assert await refused(made, "http://site.test/a.png") == [CANNOT]
    assert names.asked == ["site.test"], "what was judged is what was connected to"
    assert site.asked == []


async def test_a_name_that_changes_its_mind_between_redirects_is_judged_again(
    pictures: Callable[..., Pictures], site: Site, names: Names
) -> None:
    names.answers["site.test"] = [(LOOPBACK, site.port), ("10.0.0.1", site.port)]
    site.redirect("/a.png", "/b.png")
    site.picture("/b.png")
    assert await refused(pictures(), "http://site.test/a.png") == [CANNOT]
    assert site.asked == ["/a.png"]
    assert names.asked == ["site.test"] * 2


@pytest.mark.parametrize(
    "inside", ["http://inner.test/b.png", "http://10.0.0.1/b.png", "http://[::1]/b.png", "//inner.test/b.png"]
)
async def test_a_redirect_does_not_lead_inside(
    pictures: Callable[..., Pictures], site: Site, names: Names, inside: str
) -> None:
    judged: list[str] = []

    def first_only(address: Address) -> bool:
        judged.append(str(address))
        return len(judged) == 1

    names.answers["inner.test"] = [(LOOPBACK, site.port)]
    site.redirect("/a.png", inside)
    site.picture("/b.png")
    assert await refused(pictures(first_only), "http://site.test/a.png") == [CANNOT]
    assert site.asked == ["/a.png"]
    assert len(judged) == 2


async def test_three_redirects_are_followed_and_no_more(
    pictures: Callable[..., Pictures], site: Site
) -> None:
    for hop, status in enumerate((301, 302, 307, 308)):
        site.redirect(f"/{hop}", f"/{hop + 1}", status)
    site.picture("/4")
    made = pictures()
    assert await refused(made, "http://site.test/0") == [
        f"Picture URL 1 leads on more than 3 times: {DIRECT}"
    ]
    assert site.asked == ["/0", "/1", "/2", "/3"]
    assert await stored(made, [], ["http://site.test/1"])


# What a URL may be.


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://site.test/a.png", "begins or leads on to another scheme than https or http"),
        ("file:///etc/passwd", "begins or leads on to another scheme than https or http"),
        ("gopher://site.test/a.png", "begins or leads on to another scheme than https or http"),
        ("data:image/png;base64,AAAA", "begins or leads on to another scheme than https or http"),
        ("http://me:secret@site.test/a.png", "has a user name or a password in it"),
        ("http://me@site.test/a.png", "has a user name or a password in it"),
        ("http://site.test:22/a.png", "names a port other than 443 or 80"),
        ("http://site.test:8080/a.png", "names a port other than 443 or 80"),
        ("http://site.test:0/a.png", "names a port other than 443 or 80"),
    ],
)
@pytest.mark.parametrize("led_to", [False, True])
async def test_only_plain_web_addresses_are_asked(
    pictures: Callable[..., Pictures], site: Site, url: str, says: str, led_to: bool
) -> None:
    site.redirect("/on", url)
    (sentence,) = await refused(pictures(), "http://site.test/on" if led_to else url)
    assert sentence.startswith(f"Picture URL 1 {says}")
    assert site.asked == ["/on"] * led_to


@pytest.mark.parametrize(
    "url", ["", "http://", "http:///a.png", "http://[/a.png", "http://site.test:x/", "https:"]
)
async def test_what_is_no_url_is_refused(pictures: Callable[..., Pictures], url: str) -> None:
    assert len(await refused(pictures(), url)) == 1


async def test_plain_http_must_be_allowed(pictures: Callable[..., Pictures], site: Site) -> None:
    site.picture("/a.png")
    assert not PictureSettings().http_allowed
    (sentence,) = await refused(pictures(http_allowed=False), "http://site.test/a.png")
    assert sentence == f"Picture URL 1 begins or leads on to another scheme than https: {DIRECT}"
    assert site.asked == []


def certificate(name: str, folder: Path) -> Path:
    """Return a file with a certificate for a name, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


async def test_a_certificate_must_be_for_the_name_in_the_url(
    pictures: Callable[..., Pictures], names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = certificate("secure.test", tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(path)
    secure, runner = await serve(tls)
    try:
        secure.picture("/a.png")
        names.answers["secure.test"] = names.answers["other.test"] = [(LOOPBACK, secure.port)]
        untrusted = (
            "Picture URL 1 is on a host without a valid certificate for its name: upload it, or link to "
        )
        (sentence,) = await refused(pictures(http_allowed=False), "https://secure.test/a.png")
        assert sentence.startswith(untrusted), "nobody vouches for it"
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        made = pictures(http_allowed=False)
        (sentence,) = await refused(made, "https://other.test/a.png")
        assert sentence.startswith(untrusted), "it is somebody else's"
        assert secure.asked == []
        assert await stored(made, [], ["https://secure.test/a.png"])
    finally:
        await runner.cleanup()


# What is sent and what comes back.


async def test_a_host_learns_nothing_but_the_url(
    pictures: Callable[..., Pictures], site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    site.pages["/a.png"] = lambda _: web.Response(
        status=302, headers={"Location": "/b.png", "Set-Cookie": "who=you; Path=/"}
    )
    site.picture("/b.png")
    made = pictures()
    assert await stored(made, [], ["http://site.test/a.png"])
    assert await stored(made, [], ["http://site.test/b.png"])
    for request in site.requests:
        assert set(request.headers) == {"Host", "Accept", "Accept-Encoding", "User-Agent", "Connection"}
        assert request.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("content_type", "says"),
    [
        ("text/html; charset=utf-8", f"leads to a web page and not to a picture: {DIRECT}"),
        ("application/json", f"leads to something else and not to a picture: {DIRECT}"),
        ("image/svg+xml", f"leads to something else and not to a picture: {DIRECT}"),
    ],
)
async def test_a_page_is_no_picture_and_is_not_shown(
    pictures: Callable[..., Pictures], site: Site, content_type: str, says: str
) -> None:
    site.picture("/page", b"<html>SECRET</html>", Content_Type=content_type)
    assert await refused(pictures(), "http://site.test/page") == [f"Picture URL 1 {says}"]


async def test_a_page_that_calls_itself_a_picture_is_none(
    pictures: Callable[..., Pictures], site: Site
) -> None:
    site.picture("/page.png", b"<html>SECRET</html>")
    (sentence,) = await refused(pictures(), "http://site.test/page.png")
    assert sentence.startswith("Picture URL 1 is not a PNG, JPEG or WebP file")
    assert "SECRET" not in sentence


async def test_a_picture_that_calls_itself_bytes_is_one(
    pictures: Callable[..., Pictures], site: Site
) -> None:
    site.picture("/a", Content_Type="application/octet-stream")
    assert await stored(pictures(), [], ["http://site.test/a"])


@pytest.mark.parametrize("status", [204, 206, 300, 401, 404, 500])
async def test_other_answers_are_named_by_their_status_alone(
    pictures: Callable[..., Pictures], site: Site, status: int
) -> None:
    site.pages["/a.png"] = lambda _: web.Response(
        status=status, text=None if status == 204 else "SECRET", reason="SECRET"
    )
    assert await refused(pictures(), "http://site.test/a.png") == [
        f"Picture URL 1 answers with HTTP status {status} and no picture: {DIRECT}"
    ]


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
async def test_nothing_is_expanded_on_arrival(
    pictures: Callable[..., Pictures], site: Site, coding: str
) -> None:
    site.picture("/a.png", Content_Encoding=coding)
    (sentence,) = await refused(pictures(), "http://site.test/a.png")
    assert sentence.startswith("Picture URL 1 is sent compressed")


class RawHost:
    """A host that sends what it likes, and counts how much of it was taken."""

    def __init__(self, head: bytes, body: AsyncIterator[bytes]) -> None:
        self._head, self._body = head, body
        self.taken = 0

    async def __aenter__(self) -> RawHost:
        self._server = await asyncio.start_server(self._answer, LOOPBACK, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self._head)
            async for chunk in self._body:
                writer.write(chunk)
                await writer.drain()
                self.taken += len(chunk)
        except ConnectionError:
            pass
        finally:
            writer.close()


async def without_end(chunk: bytes = bytes(64 * 1024)) -> AsyncIterator[bytes]:
    while True:
        yield chunk


async def chunked_without_end() -> AsyncIterator[bytes]:
    while True:
        yield b"10000\r\n" + bytes(64 * 1024) + b"\r\n"


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
LIMIT = 256 * 1024
ENDLESS: Mapping[str, tuple[bytes, Callable[[], AsyncIterator[bytes]]]] = {
    "says how much": (OK + b"Content-Length: 99999999999\r\n\r\n", without_end),
    "says nothing": (OK + b"\r\n", without_end),
    "in chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n", chunked_without_end),
}


@pytest.mark.parametrize("how", ENDLESS)
async def test_a_picture_without_end_is_left_at_the_limit(
    pictures: Callable[..., Pictures], names: Names, how: str
) -> None:
    head, body = ENDLESS[how]
    async with RawHost(head, body()) as host:
        names.answers["raw.test"] = [(LOOPBACK, host.port)]
        (sentence,) = await refused(pictures(bytes_max=LIMIT), "http://raw.test/a.png")
    assert sentence == "Picture URL 1 is larger than 0.25 MiB: make it smaller."
    assert host.taken < 16 * 1024 * 1024, "what was sent is in the kernel's buffers at most"


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 20\r\n\r\n" + a_picture(),  # more than it said
        OK + b"Content-Length: 5000\r\n\r\n" + a_picture(),  # less than it said
        OK + b"Content-Length: -5\r\n\r\n" + a_picture(),
        OK + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\n" + a_picture(),
        OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        OK + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
        OK + b"".join(b"X-%d: x\r\n" % number for number in range(5_000)) + b"\r\n",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"",
        b"HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: \xff\xfe\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_a_host_that_lies_is_refused(
    pictures: Callable[..., Pictures], names: Names, answer: bytes
) -> None:
    async with RawHost(b"", once(answer)) as host:
        names.answers["raw.test"] = [(LOOPBACK, host.port)]
        (sentence,) = await refused(pictures(), "http://raw.test/a.png")
    assert len(sentence) < 200
    assert "SSH" not in sentence


async def test_a_host_that_dawdles_is_left_in_time(pictures: Callable[..., Pictures], site: Site) -> None:
    async def a_byte_at_a_time(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        await response.prepare(request)
        await response.write(b"\x89")
        await asyncio.Event().wait()
        return response

    site.pages["/slow.png"] = a_byte_at_a_time
    assert await refused(pictures(fetch_ms=200), "http://site.test/slow.png") == [
        "Picture URL 1 did not arrive within 0.2 seconds: try again, or upload it."
    ]
