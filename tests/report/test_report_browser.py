"""The page as a browser shows it; skipped where there is no Chromium."""

import json
import shutil
from contextlib import contextmanager
from itertools import pairwise

import pytest
from report_inputs import HOSTILE, row, write_run, write_vectors

from lata_lightning.report.contents import build
from lata_lightning.report.page import write

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

DRAWN = "document.querySelectorAll('.plot .main-svg').length >= document.querySelectorAll('.plot').length"
# Contrast of every text with what is painted behind it (WCAG 2.2); numbers on the colours of a heat map are judged elsewhere.
CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([red, green, blue]) => [red, green, blue].map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let node = element; node; node = node.parentElement) {
      const [red, green, blue, opacity = 1] = parse(getComputedStyle(node).backgroundColor);
      if (red !== undefined && opacity === 1) return [red, green, blue];
    }
    return [255, 255, 255];
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.getClientRects().length || element.closest("script, style, .textpoint")) continue;
    const style = getComputedStyle(element);
    const ink = parse(element.closest("svg") ? style.fill : style.color);
    const [high, least] = [luminance(ink), luminance(behind(element))].sort((one, other) => other - one);
    const ratio = (high + 0.05) / (least + 0.05);
    if (ratio < 4.5) low.push([walker.currentNode.textContent.trim(), ratio]);
  }
  return low;
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with every kind of section: a run with its vector and scales, a long run of many layers, and names that would be markup."""
    directory = tmp_path_factory.mktemp("browser")
    write_vectors(directory)
    math = write_run(
        directory / "math-run",
        [row(step, {"h.0": 0.9 - step / 1000, "h.1": 0.88}, alignment=0.9 - step / 1000) for step in (75, 150)],
    )
    shutil.copytree(directory / "math", math / "task_vector")
    (math / "tune.json").write_text(json.dumps({"points": [{"scale": scale, "scores": {"math": scale / 3}} for scale in (0.5, 1)]}))
    layers = {f"model.decoder.{HOSTILE}.layers.{number}": 0.9 - number / 100 for number in range(30)}
    long = write_run(directory / f"a long run {HOSTILE.replace('/', '')}", [row(10 * step, layers, epoch=step) for step in range(1, 21)])
    write(build([math, directory / "string", long], directory / "instruction"), directory / "report.html")
    return directory / "report.html"


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def until(page, expression):
    """Wait for an expression of the page to be true; the page's own policy forbids Playwright's way of waiting for one."""
    for _ in range(400):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    pytest.fail(f"never true: {expression}")


@contextmanager
def shown(chromium, report, **settings):
    """The page under some settings; what it said and asked for is in its ``said`` and ``asked``."""
    context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
    page = context.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("dialog", lambda dialog: page.said.append(dialog.message))
    page.on("request", lambda request: None if request.url.startswith(("data:", "blob:")) else page.asked.append(request.url))
    page.goto(report.as_uri())
    if settings.get("java_script_enabled", True):
        until(page, DRAWN)
    yield page
    context.close()


@pytest.fixture(scope="module")
def desktop(chromium, report):
    """The page on a wide screen, for tests that change nothing."""
    with shown(chromium, report) as page:
        yield page


def test_every_figure_is_drawn_without_a_word_on_the_console_or_a_request(desktop, report):
    page = desktop
    figures = page.locator("figure").count()
    assert page.locator("figure .plot:has(.main-svg)").count() == figures >= 15
    assert page.locator("section").count() == 9
    assert (page.said, page.asked) == ([], [report.as_uri()])


def test_hovering_shows_the_value(desktop):
    page = desktop
    area = page.locator("#alignment-1 .nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.75)
    hover = page.locator("#alignment-1 .hoverlayer")
    playwright.expect(hover).to_contain_text("alignment 0.7500")
    playwright.expect(hover).to_contain_text("step 150, epoch 0")


def test_names_that_would_be_markup_are_shown_as_they_are(desktop):
    page = desktop
    area = page.locator("#alignment-3 .nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    playwright.expect(page.locator("#alignment-3 .hoverlayer")).to_contain_text(f"model.decoder.{HOSTILE}.layers.0")
    playwright.expect(page.locator("#growth-norm .legend")).to_contain_text(HOSTILE.replace("/", ""))
    assert page.said == []


def test_a_phone_has_nothing_to_scroll_sideways(chromium, report):
    with shown(chromium, report, viewport={"width": 375, "height": 700}, is_mobile=True, has_touch=True) as page:
        page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        for width in (375, 320):
            page.set_viewport_size({"width": width, "height": 700})
            until(page, f"document.querySelector('.plot .main-svg').getBoundingClientRect().right <= {width}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            right = "(plots) => Math.max(...plots.map((plot) => plot.getBoundingClientRect().right))"
            assert page.locator(".plot .main-svg").evaluate_all(right) <= width


def test_the_theme_follows_the_system_and_the_button_and_every_text_stands_out(chromium, report):
    look = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.xtick text')).fill]"
    with shown(chromium, report, color_scheme="dark") as page:
        button = page.get_by_role("button", name="Dark theme")
        page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        assert button.get_attribute("aria-pressed") == "true"
        assert page.evaluate(CONTRAST) == []
        dark = page.evaluate(look)
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert page.evaluate(CONTRAST) == []
        light = page.evaluate(look)
        assert all(one != other for one, other in zip(dark, light, strict=True))
        page.reload()
        until(page, DRAWN)
        assert page.evaluate(look) == light
    with shown(chromium, report, color_scheme="light") as page:
        assert page.evaluate(look) == light


def test_the_page_is_used_by_keyboard_alone_in_reading_order(chromium, report):
    focused = """() => {
      const box = document.activeElement.getBoundingClientRect(), style = getComputedStyle(document.activeElement);
      return [document.activeElement.textContent.trim(), box.top + scrollY, style.outlineStyle, box.height > 0];
    }"""
    with shown(chromium, report) as page:
        seen = []
        page.keyboard.press("Tab")
        while not page.evaluate("document.activeElement === document.body"):
            seen.append(page.evaluate(focused))
            page.keyboard.press("Tab")
        assert [text for text, *_ in seen[:4]] == ["Skip to the content", "Dark theme", "Overview", "Alignment over training"]
        below = [top for text, top, *_ in seen if text.startswith("Data of")]
        assert len(below) > 10
        assert below == sorted(below)
        assert all(outline != "none" and visible for _, _, outline, visible in seen)
        # From the top: the skip link passes over the sections, Enter opens a table, and the table can be scrolled.
        page.evaluate("document.querySelector('.skip').focus()")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"
        page.keyboard.press("Tab")
        # The first summary folds a section, the next one opens a table.
        assert page.evaluate("document.activeElement.textContent.trim()") == "Alignment over training"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        page.keyboard.press("Enter")
        assert page.locator("#alignment-1 table").is_visible()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Data of Alignment over training: math-run"


def test_a_screen_reader_finds_landmarks_headings_and_the_name_of_every_figure(desktop):
    page = desktop
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("heading", level=1).count() == 1
    assert [page.get_by_role(role).count() for role in ("banner", "main", "navigation", "contentinfo")] == [1, 1, 1, 1]
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((heading) => Number(heading.tagName[1]))")
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    ids = page.evaluate("[...document.querySelectorAll('body [id]')].filter((one) => !one.closest('.plot')).map((one) => one.id)")
    assert len(set(ids)) == len(ids)
    named = """(elements) => elements.every((element) => ["aria-labelledby", "aria-describedby"].every(
      (name) => document.getElementById(element.getAttribute(name)).textContent.trim()))"""
    assert page.locator("figure, [role=img]").evaluate_all(named)
    assert page.locator("figure > [role=img]").count() == page.get_by_role("figure").count() == page.locator("figure").count()
    assert page.locator("table").evaluate_all("(tables) => tables.every((table) => table.querySelector('th[scope=col]'))")


def test_in_print_there_are_light_figures_of_the_width_of_the_paper_and_no_controls(chromium, report):
    width = "(plots) => [...new Set(plots.map((plot) => plot.getBoundingClientRect().width))]"
    with shown(chromium, report, color_scheme="dark") as page:
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("#theme").is_hidden()
        assert page.locator("nav").is_hidden()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator(".plot .main-svg").evaluate_all(width) == [620]
        page.emulate_media(media="screen")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert 620 not in page.locator(".plot .main-svg").evaluate_all(width)


def test_without_scripts_the_tables_say_everything(chromium, report):
    with shown(chromium, report, java_script_enabled=False) as page:
        assert "Every one of them has its data in a table" in page.locator("noscript").inner_text()
        page.locator("#alignment-1 summary").click()
        assert page.locator("#alignment-1 td").first.inner_text() == "0.8250"


@pytest.mark.parametrize("layers", [8, 80])
@pytest.mark.parametrize("width", [390, 1280])
def test_labels_of_layers_do_not_overlap_on_any_screen(chromium, tmp_path, layers, width):
    run = write_run(tmp_path / "run", [row(10, {f"model.layers.{number}": 0.9 - number / 200 for number in range(layers)})])
    write(build([run]), tmp_path / "report.html")
    with shown(chromium, tmp_path / "report.html", viewport={"width": width, "height": 800}) as page:
        ends = "(texts) => texts.map((text) => text.getBoundingClientRect()).map((box) => [box.left, box.right])"
        boxes = page.locator("#alignments .xtick text").evaluate_all(ends)
        assert len(boxes) == layers if layers == 8 else 5 < len(boxes) < layers
        assert all(right < left for (_, right), (left, _) in pairwise(boxes))
        assert page.said == []


def test_a_section_can_be_folded_where_several_runs_are_shown(chromium, report):
    with shown(chromium, report) as page:
        page.locator("details.fold > summary", has_text="Growth").click()
        assert not page.locator("#growth-norm").is_visible()
