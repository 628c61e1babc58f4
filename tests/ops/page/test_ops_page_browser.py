"""In a real browser the page can be read in light and dark, used by keyboard, and goes nowhere else."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

from scheduler.cluster.local_fleet import LocalFleet
from scheduler.policy.ids import Tier
from scheduler.store import operations
from tests.ops.page.conftest import OpsPort, a_page_of_counters

# Names by which a browser takes this machine for another, to which plain text is not safe.
AWAY, ELSEWHERE = "ops.test", "elsewhere.test"
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")

# Of every element with text of its own: the text, its colour, and the first opaque colour below it.
CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = channels(colour).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const below = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      const parts = channels(colour);
      if (parts.length === 3 || parts[3] === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(below(element))];
    found.push([element.textContent.trim().slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs chromium: apt-get install chromium")
    async with async_playwright() as playwright:
        names = f"--host-resolver-rules=MAP {AWAY} 127.0.0.1, MAP {ELSEWHERE} 127.0.0.1"
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox", names])
        yield browser
        await browser.close()


@pytest.fixture
async def watched(busy: OpsPort, fleet: LocalFleet) -> OpsPort:
    """A service that has been watched for most of an hour, with a worker in trouble and one that drains."""
    now_s, spent = (
        busy.clock.now().timestamp(),
        dict.fromkeys(("fast", "relax", "load", "wasted", "idle"), 0.0),
    )
    for ago in range(3_000, -1, -15):
        fast = 0.8 + 0.7 * (ago // 300 % 3)
        relax = 3.6 - fast if ago % 1_500 > 240 else 1.0
        parts = {"fast": fast, "relax": relax, "load": 0.2, "wasted": 0.15 if 900 < ago < 1_200 else 0.0}
        parts["idle"] = 4 - sum(parts.values())
        spent = {use: done + parts[use] * 15 for use, done in spent.items()}
        if not 1_900 < ago < 2_200:
            busy.history.read(a_page_of_counters(started=(3_000 - ago) // 12, **spent), now_s - ago)
    fleet.fall_ill("here/gpu-3", "The GPU fell off the bus.")
    async with busy.stage.pool.transaction() as connection:
        await operations.pause_tier(connection, Tier.RELAX, "a fire drill")
        await operations.drain_worker(connection, "here/gpu-1", "new fan", within=timedelta(minutes=5))
    return busy


class Seen:
    """A page in a browser, and what went wrong in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("requestfailed", lambda request: self.complaints.append(f"{request.url}: {request.failure}"))
        page.on("request", lambda request: self._asked(request.url))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _asked(self, url: str) -> None:
        if not url.startswith(self.url):
            self.elsewhere.append(url)

    async def log_in(self, key: str) -> None:
        await self.page.goto(self.url)
        await self.page.get_by_label("API key").fill(key)
        await self.page.get_by_role("button", name="Log in").click()
        await expect(self.page.get_by_role("heading", name="Operations", level=1)).to_be_visible()

    async def refreshed(self) -> None:
        """Return once the page has been refreshed, and what came is in it."""
        await self.page.evaluate(
            """() => new Promise((done) =>
                 addEventListener("htmx:afterRequest", () => setTimeout(done, 50), { once: true }))"""
        )


async def opened_page(browser: Browser, port: OpsPort, **context: Any) -> Seen:
    context.setdefault("viewport", {"width": 1_360, "height": 1_000})
    return Seen(await (await browser.new_context(**context)).new_page(), port.url)


@pytest.fixture
async def seen(browser: Browser, watched: OpsPort) -> Seen:
    """The page, of somebody who has logged in."""
    seen = await opened_page(browser, watched)
    await seen.log_in(await watched.key())
    return seen


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [1_360, 390])
async def test_it_can_be_read_in_light_and_dark_on_wide_and_narrow_screens(
    browser: Browser, watched: OpsPort, scheme: Literal["light", "dark"], width: int, tmp_path: Path
) -> None:
    seen = await opened_page(
        browser, watched, color_scheme=scheme, viewport={"width": width, "height": 1_000}
    )
    page = seen.page
    await page.goto(watched.url)
    await page.screenshot(path=tmp_path / f"login-{scheme}-{width}.png")
    contrasts = await page.evaluate(CONTRASTS)
    await seen.log_in(await watched.key())
    await expect(page.locator("#chart canvas")).to_be_visible()
    await page.locator("#minutes-summary").click()
    contrasts += await page.evaluate(CONTRASTS)
    await page.locator("#minutes-summary").click()
    await page.screenshot(path=tmp_path / f"board-{scheme}-{width}.png", full_page=True)
    await page.locator("a.job").first.click()
    await expect(page.get_by_role("heading", name="Why is it where it is?")).to_be_visible()
    await page.screenshot(path=tmp_path / f"why-{scheme}-{width}.png")
    contrasts += await page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [each for each in contrasts if each[1] < 4.5] == []
    wider = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wider <= 0, "the page itself never scrolls sideways"
    assert (seen.complaints, seen.elsewhere) == ([], [])


async def test_the_chart_has_what_the_table_has_and_leaves_gaps(seen: Seen) -> None:
    page = seen.page
    await expect(page.locator("#chart canvas")).to_be_visible()
    pixels = await page.evaluate(
        """() => {
             const canvas = document.querySelector("#chart canvas");
             const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
             const seen = new Set();
             for (let at = 0; at < data.length; at += 4)
               if (data[at + 3] === 255) seen.add(`${data[at]},${data[at + 1]},${data[at + 2]}`);
             return [...seen];
           }"""
    )
    for use in ("fast", "relax", "load", "wasted", "idle"):
        colour = await page.evaluate(
            "use => getComputedStyle(document.documentElement).getPropertyValue(`--${use}`).trim()", use
        )
        assert ",".join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5)) in pixels, use
    await page.locator("#minutes-summary").click()
    rows = await page.locator("#minutes-table tbody tr").all_inner_texts()
    assert len(rows) == 60
    assert sum("–" in row for row in rows) >= 4, "the time before, and a gap in between"


async def test_a_refresh_brings_what_is_new_and_keeps_focus_and_what_was_opened(
    seen: Seen, watched: OpsPort
) -> None:
    page = seen.page
    await page.locator("#minutes-summary").click()
    link = page.locator("#waits a.job").first
    focused = await link.get_attribute("id")
    await link.focus()
    await watched.stage.open_account("new-here")
    await watched.stage.submit("new-here")
    watched.clock.pass_s(3)
    await seen.refreshed()
    await expect(page.locator("#waits")).to_contain_text("new-here")
    assert await page.evaluate("document.activeElement.id") == focused
    assert await page.locator("#minutes").get_attribute("open") is not None
    assert (seen.complaints, seen.elsewhere) == ([], [])


async def test_what_did_not_change_is_not_replaced(seen: Seen, watched: OpsPort) -> None:
    """A screen reader would read the live part out again, and a selection would be lost."""
    page = seen.page
    await seen.refreshed()
    await page.evaluate("document.querySelector('#summary').firstElementChild.marked = true")
    watched.clock.pass_s(3)
    await seen.refreshed()
    assert await page.evaluate("document.querySelector('#summary').firstElementChild.marked") is True


async def test_everything_is_reached_by_tab_and_nothing_holds_the_focus(seen: Seen) -> None:
    page = seen.page
    wanted = await page.evaluate(
        """() => [...document.querySelectorAll("a[href], button, summary, [tabindex='0']")]
                 .filter((each) => each.checkVisibility()).length"""
    )
    await page.evaluate("document.querySelectorAll('*').forEach((each) => { each.reached = false; })")
    order: list[str] = []
    for _ in range(wanted):
        await page.keyboard.press("Tab")
        order.append(
            await page.evaluate(
                """() => {
                     const each = document.activeElement;
                     const style = getComputedStyle(each);
                     const shown = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
                     return `${each.tagName} ${each.id} ${each.className} ${shown ? "" : "without outline"}`;
                   }"""
            )
        )
    assert order[0].startswith("A  skip")
    assert len(set(order)) == wanted, "each once"
    assert not [each for each in order if "without outline" in each]
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.tagName") in ("BODY", "A")


async def test_the_skip_link_leads_to_the_content(seen: Seen) -> None:
    await seen.page.keyboard.press("Tab")
    await seen.page.keyboard.press("Enter")
    assert await seen.page.evaluate("document.activeElement.id") == "main"


async def test_landmarks_headings_and_tables_have_names(seen: Seen) -> None:
    page = seen.page
    assert await page.locator("html").get_attribute("lang") == "en"
    for role in ("banner", "main"):
        await expect(page.get_by_role(role)).to_have_count(1)  # type: ignore[arg-type]
    levels = await page.evaluate("[...document.querySelectorAll('h1, h2')].map((each) => each.tagName)")
    assert levels == ["H1", *["H2"] * 5]
    unnamed = await page.evaluate(
        "[...document.querySelectorAll('table')].filter((each) => !each.caption?.textContent.trim()).length"
    )
    assert unnamed == 0
    heads = await page.evaluate("[...document.querySelectorAll('th')].filter((each) => !each.scope).length")
    assert heads == 0
    await expect(page.get_by_role("status")).to_have_attribute("aria-live", "polite")
    ids = await page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))


async def test_the_wrong_key_is_told_where_one_looks(browser: Browser, watched: OpsPort) -> None:
    page = (await opened_page(browser, watched)).page
    await page.goto(watched.url)
    await expect(page.get_by_label("API key")).to_be_focused()
    await page.keyboard.type("dk_wrong")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_have_text("No such key, or it was revoked.")
    await expect(page.get_by_label("API key")).to_have_attribute("aria-invalid", "true")


async def test_in_plain_text_its_own_forms_are_told_from_those_of_another_site(
    browser: Browser, watched: OpsPort
) -> None:
    seen = await opened_page(browser, watched)
    page, seen.url = seen.page, watched.url.replace("127.0.0.1", AWAY)
    key = await watched.key()
    form = (
        f'<form method="post" action="{seen.url}/login"><input name="key" value="{key}"><button>Go</button>'
    )
    await page.route(f"http://{ELSEWHERE}/", lambda route: route.fulfill(content_type="text/html", body=form))
    await page.goto(f"http://{ELSEWHERE}/")
    await page.get_by_role("button", name="Go").click()
    await expect(page.get_by_text("Another site sent this.")).to_be_visible()
    await seen.log_in(key)
    await page.get_by_role("button", name="Log out").click()
    await expect(page.get_by_label("API key")).to_be_visible()


async def test_without_javascript_it_is_whole_and_stands_still(browser: Browser, watched: OpsPort) -> None:
    seen = await opened_page(browser, watched, java_script_enabled=False)
    await seen.log_in(await watched.key())
    page = seen.page
    await expect(page.locator("#workers")).to_contain_text("here/gpu-0")
    await expect(page.locator("#gpu_hour table")).to_be_visible()
    await expect(page.locator("#chart")).to_be_hidden()
    await expect(page.get_by_text("does not refresh by itself")).to_be_visible()
    await page.locator("#minutes-summary").click()
    await expect(page.locator("#minutes-table")).to_be_visible()
    await page.get_by_role("button", name="Log out").click()
    await expect(page.get_by_label("API key")).to_be_visible()


async def test_a_session_that_ends_leads_to_the_login(seen: Seen, watched: OpsPort) -> None:
    await watched.stage.connection.execute("UPDATE scheduler.api_key SET revoked_at = now()")
    watched.clock.pass_s(3)
    await expect(seen.page.get_by_label("API key")).to_be_visible(timeout=15_000)
    assert seen.page.url == f"{watched.url}/login"


async def test_a_front_door_that_went_away_is_told_with_the_time(seen: Seen) -> None:
    page = seen.page
    await seen.refreshed()
    await expect(page.locator("#lost")).to_be_hidden()
    await page.route("**/refresh", lambda route: route.abort())
    await seen.refreshed()
    await expect(page.locator("#lost")).to_be_visible()
    assert re.search(r"was true at \d\d:\d\d:\d\d UTC", await page.locator("#lost").inner_text())
    await expect(page.locator("#workers")).to_contain_text("here/gpu-0")
    await page.unroute("**/refresh")
    await seen.refreshed()
    await expect(page.locator("#lost")).to_be_hidden()


async def test_hostile_names_run_nothing(browser: Browser, watched: OpsPort) -> None:
    name = "<img src=x onerror=alert(1)>"
    await watched.stage.open_account(name)
    await watched.stage.submit(name)
    watched.clock.pass_s(3)
    seen = await opened_page(browser, watched)
    await seen.log_in(await watched.key())
    await expect(seen.page.locator("#waits")).to_contain_text(name)
    watched.clock.pass_s(3)
    await seen.refreshed()
    await expect(seen.page.locator("#waits")).to_contain_text(name)
    assert await seen.page.locator("img").count() == 0
    assert (seen.complaints, seen.elsewhere) == ([], [])
