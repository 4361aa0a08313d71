"""Both pages in a real browser: with a mouse, with the keyboard, on a phone, in both colour schemes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, Request, ViewportSize, sync_playwright

from tests.report.conftest import HOSTILE, LABELS, Measured

CHROMIUM = shutil.which("chromium")
DESKTOP: ViewportSize = {"width": 1280, "height": 900}
PHONE: ViewportSize = {"width": 360, "height": 740}
Scheme = Literal["light", "dark"]
Open = Callable[..., Page]

# The lowest contrast of any text with what is behind it; its own words say of which.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let worst = [99, ""];
  for (const element of document.body.querySelectorAll("*:not(script)")) {
    const words = [...element.childNodes].filter((n) => n.nodeType === 3 && n.data.trim());
    if (!words.length || element.closest("svg") || !element.getClientRects().length) continue;
    let behind = element, ground;
    do {
      ground = rgba(getComputedStyle(behind).backgroundColor);
      behind = behind.parentElement;
    } while (ground[3] < 255);
    const [low, high] = [luminance(rgba(getComputedStyle(element).color)), luminance(ground)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < worst[0]) worst = [contrast, `${element.tagName}.${element.className}: ${words[0].data.trim()}`];
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; where it has been promised it may not be missing."""
    if CHROMIUM is None and not os.environ.get("CLIP_M2DF_BROWSER"):
        pytest.skip("there is no chromium here")
    with sync_playwright() as playwright:
        # Root may not use its sandbox; the pages are the tests' own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM or "chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a page; at the end there was no error, and nothing but the page itself was asked for."""
    faults: list[str] = []
    requests: list[str] = []
    opened: list[Page] = []

    def note(request: Request) -> None:
        if not request.url.startswith("data:"):
            requests.append(request.url)

    def open_one(
        path: Path, viewport: ViewportSize = DESKTOP, scheme: Scheme = "light", *, script: bool = True
    ) -> Page:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, java_script_enabled=script)
        context.set_default_timeout(120_000)  # a machine may be busy
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.on("request", note)
        page.goto(path.as_uri())
        opened.append(page)
        return page

    yield open_one
    urls = [page.url.partition("#")[0] for page in opened]
    for page in opened:
        page.context.close()
    assert faults == []
    assert requests == urls


def names(page: Page) -> list[str]:
    """Videos of the table that can be seen, in their order."""
    return [row.locator("th").inner_text() for row in page.locator("#videos tbody tr").all() if row.is_visible()]


def open_all(page: Page) -> None:
    closed = page.locator("details:not([open]) > summary")
    while closed.count():
        closed.first.click()


def test_sorting(predictions: Path, open_page: Open) -> None:
    page = open_page(predictions)
    button = page.get_by_role("button", name="Probability")

    def values() -> list[float]:
        cells = page.locator("#videos tbody td.number").all()
        return [float(cell.get_attribute("data-value") or "nan") for cell in cells]

    before = values()
    button.click()
    assert values() == sorted(before) != before
    button.click()
    assert values() == sorted(before, reverse=True)
    heading = page.get_by_role("columnheader", name="Probability")
    assert heading.get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="Video", exact=True).focus()
    page.keyboard.press("Enter")
    assert names(page) == [HOSTILE, *(f"{k}.mp4" for k in range(5)), "broken.mp4"]
    assert heading.get_attribute("aria-sort") is None


def test_the_classes_can_be_sorted(tested: Measured, open_page: Open) -> None:
    page = open_page(tested.page)
    page.get_by_role("button", name="Accuracy").click()
    shares = [float(c.inner_text().split()[0]) for c in page.locator("#classes tbody td:nth-child(2)").all()]
    assert shares == sorted(shares)
    page.get_by_role("button", name="Class", exact=True).click()
    assert page.locator("#classes tbody th").all_inner_texts()[1:] == ["test class 0", "test class 2"]


@pytest.mark.parametrize("kind", ["predictions", "segments"])
def test_filtering(kind: str, request: pytest.FixtureRequest, open_page: Open) -> None:
    page = open_page(request.getfixturevalue(kind))
    everything = names(page)
    assert len(everything) == 7
    for label in LABELS:
        options = page.get_by_label("Label", exact=True)
        if label not in options.locator("option").all_inner_texts():
            continue
        options.select_option(label=label)
        shown = names(page)
        assert 0 < len(shown) < 7
        assert [card.locator("h3").inner_text() for card in page.locator("article").all() if card.is_visible()] == shown
        labels = page.locator("#videos tbody tr:visible td:nth-child(2)").all_inner_texts()
        assert all(label in said for said in labels)
        assert page.get_by_role("status").inner_text() == f"{len(shown)} of 7 videos are shown"
    page.get_by_label("Label", exact=True).select_option(label="can’t be read")
    assert names(page) == ["broken.mp4"]
    page.get_by_label("Label", exact=True).select_option(label="all")
    page.get_by_label("Name", exact=True).fill("ONERROR")
    assert names(page) == [HOSTILE]
    page.get_by_label("Name", exact=True).fill("no such video")
    assert names(page) == []
    page.get_by_label("Name", exact=True).fill("")
    assert names(page) == everything


def test_links_lead_to_the_videos(predictions: Path, open_page: Open) -> None:
    page = open_page(predictions)
    page.get_by_role("link", name="3.mp4").click()
    card = page.locator("article:target")
    assert card.locator("h3").inner_text() == "3.mp4"
    box = card.bounding_box()
    header = page.locator("header").bounding_box()
    assert box is not None
    assert header is not None
    assert header["y"] + header["height"] <= box["y"] < DESKTOP["height"]


def test_the_reasons_can_be_opened_by_keyboard(predictions: Path, open_page: Open) -> None:
    page = open_page(predictions)
    summary = page.locator("article summary").first
    reason = page.locator("article details").first.locator("svg.map").first
    assert not reason.is_visible()
    summary.focus()
    page.keyboard.press("Enter")
    assert reason.is_visible()
    # The second map has its frames from the first.
    for use in page.locator("article details").first.locator("use").all():
        box = use.bounding_box()
        assert box is not None
        assert box["width"] > 5


def test_tabbing_reaches_everything_and_shows_where_it_is(path: Path, open_page: Open) -> None:
    page = open_page(path)
    reached = set()
    can_be = page.locator("a, button, summary, select, input, [tabindex='0']")
    wanted = {i for i, element in enumerate(can_be.all()) if element.is_visible()}
    page.evaluate(
        "document.querySelectorAll(\"a, button, summary, select, input, [tabindex='0']\")"
        ".forEach((element, i) => (element.dataset.place = i))"
    )
    for _ in range(len(wanted) + 5):
        page.keyboard.press("Tab")
        place, outline = page.evaluate(
            "[document.activeElement.dataset.place, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if place is not None:
            reached.add(int(place))
            assert outline == "solid"
    assert reached == wanted


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(scheme: Scheme, path: Path, open_page: Open) -> None:
    page = open_page(path, scheme=scheme)
    open_all(page)
    ground = "getComputedStyle(document.body).backgroundColor"
    toggle = page.get_by_role("button", name="Dark mode")
    seen = [page.evaluate(ground)]
    for dark in (scheme == "dark", scheme != "dark", scheme == "dark"):
        assert toggle.get_attribute("aria-pressed") == str(dark).lower()
        contrast, where = page.evaluate(CONTRAST)
        assert 4.5 <= contrast < 20, where
        toggle.click()
        seen.append(page.evaluate(ground))
    assert seen[0] == seen[2] != seen[1] == seen[3]
    dark_first = sum(map(int, seen[0].removeprefix("rgb(").rstrip(")").split(","))) < 200
    assert dark_first == (scheme == "dark")


def test_a_phone_scrolls_down_only(path: Path, open_page: Open) -> None:
    page = open_page(path, PHONE)
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    page.evaluate("scrollTo(500, 0)")
    assert page.evaluate("scrollX") == 0
    beyond = (
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll') && e.getClientRects().length"
        " && e.getBoundingClientRect().right > innerWidth).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert page.evaluate(beyond) == []


def test_all_pictures_can_be_decoded(path: Path, open_page: Open) -> None:
    page = open_page(path)
    page.evaluate("for (const image of document.images) image.loading = 'eager'")
    page.evaluate("Promise.all([...document.images].map((image) => image.decode()))")
    sizes = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert len(sizes) >= 8
    assert min(sizes) > 0


def test_without_scripts_the_page_is_whole(predictions: Path, open_page: Open) -> None:
    page = open_page(predictions, script=False)
    assert page.locator("article").count() == 7
    assert page.locator("#theme").is_hidden()
    assert page.locator("#tools").is_hidden()
    page.locator("article summary").first.click()
    assert page.locator("article details").first.locator("svg.map").first.is_visible()
