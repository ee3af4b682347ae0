"""The page in a real browser, offline, on a desk and a phone, light and dark: it draws, follows, and has no error."""

import io
import json
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from jax_entropy.data.tokenizer import train_tokenizer
from jax_entropy.report import read_history
from jax_entropy.report.page import page
from jax_entropy.report.watch import serve
from jax_entropy.runs.reading import Reading
from jax_entropy.runs.workdir import Workdir
from tests.report.helpers import write_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WINDOWS = [4.0, 4.5, 4.85]  # nats: what a row of each layer of the second run can have
EVIL = "<script>alert(1)</script>\x1b[31m"


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests: the system's Chromium, else Playwright's own."""
    with playwright.sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, NAMES)), None)
        try:
            started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser starts here: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one shape, the first with a text that it read, samples, an incident; the second has windows."""
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first", L=3, N=4, steps=20, incidents=(430,))
    metrics = write_run(folder / "second", L=3, N=4, steps=20, seed=1) / "metrics.jsonl"
    windows = dict(maximum_context=WINDOWS, maximum_causal=[0.9 * most for most in WINDOWS])
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line | windows) + "\n" for line in lines))
    workdir, rng = Workdir(first), np.random.default_rng(0)
    tokenizer = train_tokenizer([EVIL, "def f(x):\n\treturn x\n"], 300)
    tokenizer.save(workdir.tokenizer)
    tokens = np.array([tokenizer.encode(EVIL + "def f(x):\n\treturn x\n")])
    T = tokens.size - 1
    for step in (250, 1000):
        numbers = (rng.random(shape, np.float32) for shape in ((1, T), (3, 4, 1, T), (3, 4, 16)))
        Reading(tokens, *numbers, step).save(workdir.text, 1000)
    workdir.write_samples(1000, EVIL, ["x"])
    return [first, folder / "second"]


@pytest.fixture(scope="module")
def address(runs):
    """Of the page of both runs."""
    file = runs[0].parent / "page.html"
    file.write_text(page([read_history(workdir) for workdir in runs]))
    return file.as_uri()


@pytest.fixture(scope="module")
def visit(browser, address):
    """Opens a page; whatever it complains of or asks a network for is among its `troubles`."""

    def open_page(address=address, fragment="", width=1280, theme="light"):
        size = dict(viewport=dict(width=width, height=900), device_scale_factor=0.5, has_touch=width < 500)
        tab = browser.new_page(**size, color_scheme=theme)
        tab.set_default_timeout(120_000)  # of a machine that is busy
        tab.on("console", lambda said: open_page.troubles.append(said.text))
        tab.on("pageerror", lambda error: open_page.troubles.append(str(error)))
        known = ("data:", address.partition("#")[0])
        tab.on("request", lambda asked: asked.url.startswith(known) or open_page.troubles.append(asked.url))
        tab.goto(address + fragment)
        tab.wait_for_selector(".ready")
        return tab

    open_page.troubles = []
    return open_page


@pytest.fixture(autouse=True)
def untroubled(visit):
    visit.troubles.clear()
    yield
    assert not visit.troubles


@pytest.fixture(scope="module")
def desk(visit):
    """The page of both runs in one tab for all tests, brought to where a fragment leads."""
    tab = visit()

    def at(fragment="#step=1000&run=0"):
        tab.evaluate(
            """fragment => new Promise((done) => {
                addEventListener("hashchange", done, { once: true });  // after the page's own
                location.hash = `${fragment}&visit=${performance.now()}`;
            })""",
            fragment,
        )
        return tab

    return at


def said(tab, panel):
    return tab.inner_text(f"#{panel} .said")


def pictures(tab, panels):
    """Each panel's pixels, of one photograph of the page."""
    whole = Image.open(io.BytesIO(tab.screenshot(full_page=True, type="jpeg")))
    top, found = tab.evaluate("scrollY"), {}
    for panel in panels:
        box = tab.locator(f"#{panel} .picture").bounding_box()
        left, upper = box["x"] / 2, (box["y"] + top) / 2
        found[panel] = whole.crop((left, upper, left + box["width"] / 2, upper + box["height"] / 2)).tobytes()
    return found


@pytest.mark.parametrize("width, theme, other", [(1280, "light", "dark"), (390, "dark", "light")])
def test_the_slider_moves_every_picture_and_nothing_overflows(visit, width, theme, other):
    tab = visit(fragment="#step=200", width=width, theme=theme)
    assert tab.inner_text("#now b") == "200"
    panels = ["heads", "layers", "bands", "thresholds", "temperatures", "logits", "losses", "entropy-surface",
              "positions", "text"]  # fmt: skip
    words, before = {panel: said(tab, panel) for panel in panels}, pictures(tab, panels)
    tab.focus("#step")
    tab.keyboard.press("End")
    after = pictures(tab, panels)
    for panel in panels:
        assert said(tab, panel) != words[panel] and after[panel] != before[panel], panel
    seen = ".panel:not([hidden]) > details:not([hidden]), #abouts details"
    tab.eval_on_selector_all(seen, "all => all.forEach((one) => (one.open = true))")
    for scheme in (theme, other):
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        color = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert color == dict(light="rgb(247, 246, 243)", dark="rgb(18, 19, 22)")[scheme]
    tab.close()


def test_keys_play_and_the_address_lead_to_a_step(desk):
    tab = desk("#step=420&run=1&layer=2&head=1")
    assert tab.inner_text("#now b") == "400" and tab.input_value("#choose-run") == "1"
    assert "layer 2, head 1" in said(tab, "head")
    tab.locator("h1 >> visible=true").click()
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#now b") == "450"
    tab.wait_for_url("**#step=450&run=1&layer=2&head=1")
    tab.keyboard.press("End")
    tab.click("#play")
    playwright.expect(tab.locator("#now b")).not_to_have_text("1,000")
    tab.click("#play")
    tab.evaluate("location.hash = '#step=1000&run=0'")
    playwright.expect(tab.locator("#now b")).to_have_text("1,000")
    assert tab.locator("#head").is_hidden()


def test_a_head_that_is_chosen_is_marked_everywhere_and_its_numbers_are_those_logged(desk, runs):
    tab = desk()
    history = read_history(runs[0])
    tab.click('#heads .cell[data-layer="1"][data-head="3"]')
    entropy = history.train["head_entropy"][-1, 1, 3]
    shown = float(said(tab, "heads").split(": ")[1].split()[0])
    assert shown == pytest.approx(entropy, rel=1e-4)
    assert tab.locator("#layers .chosen").count() and tab.locator("#thresholds .point.head").count() == 1
    assert tab.locator("#entropy-surface .row").is_visible() and "layer 1, head 3" in said(tab, "text")
    assert tab.locator("#head .third").count() == 3
    tab.focus("#heads svg")
    for key, head in (
        ("ArrowUp", "layer 0, head 3"),
        ("ArrowLeft", "layer 0, head 2"),
        ("ArrowRight", "layer 0, head 3"),
    ):
        tab.keyboard.press(key)
        assert head in said(tab, "heads") and tab.inner_text("#now b") == "1,000"
    assert tab.get_attribute("#heads .said", "aria-live") == "polite"
    tab.locator("#heads summary").click()
    cells = tab.locator("#heads tbody tr").nth(0).locator("td")
    playwright.expect(cells).to_have_count(4)  # a table is filled by an event that follows the click
    assert [float(cell) for cell in cells.all_inner_texts()] == pytest.approx(
        history.train["head_entropy"][-1, 0], rel=1e-6
    )
    tab.hover('#heads .cell[data-layer="2"][data-head="0"]')
    playwright.expect(tab.locator("#tip")).to_contain_text(f"{history.train['head_entropy'][-1, 2, 0]:.5g} nats")


def test_keys_scroll_what_is_longer_than_its_place(desk):
    tab = desk("#step=200&run=0")
    tab.locator("#layers summary").click()
    region = tab.locator("#layers .scroll")
    region.evaluate("(one) => Object.assign(one.style, { width: '80px' })")
    region.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press(" ")
    for _ in range(100):  # the page's policy forbids to wait for a text of JavaScript
        if scrolled := region.evaluate("(one) => one.scrollLeft"):
            break
        tab.wait_for_timeout(50)
    assert scrolled > 0
    assert tab.inner_text("#now b") == "200" and tab.get_attribute("#play", "aria-label") == "play"
    labels = tab.eval_on_selector_all(
        "#panels [role=region], #panels [role=radiogroup]", "all => all.map((one) => one.ariaLabel)"
    )
    assert len({*labels}) == len(labels)
    tab.locator("#layers summary").click()


def test_runs_are_compared_and_incidents_marked(desk):
    tab = desk("#against=1")
    assert "more than in second" in said(tab, "heads")
    assert tab.locator("#differences th.chosen").inner_text() == "first"
    assert "bits/byte" in said(tab, "all-losses")  # in tokens of their own
    both = tab.locator("#all-losses .rows li")
    assert both.count() == 1 and both.inner_text().partition(" ±")[0].endswith("mean of 2 runs 0.6")
    for panel in ("layers", "bands", "losses", "entropy-surface", "all-losses"):
        assert tab.locator(f"#{panel} .incident").count() == 1, panel


def test_a_threshold_is_a_share_of_what_its_own_layer_can_have(desk, runs):
    tab, last = desk("#run=1"), {name: of[-1] for name, of in read_history(runs[1]).train.items()}
    apart_LxN = np.abs(last["head_entropy"] / np.array(WINDOWS)[:, None] - last["threshold"])
    words = said(tab, "thresholds").split()
    assert int(words[0]) == apart_LxN.size and float(words[-5]) == pytest.approx(apart_LxN.mean(), rel=1e-2)


def test_texts_are_shown_and_never_obeyed(desk):
    tab = desk()
    words = tab.inner_text("#text .reading")
    assert "<script>alert(1)</script>" in words and "\x1b" not in tab.content() and "�[31m" in words
    assert tab.locator("script").count() == 2  # the block and the page's own


def test_what_is_not_a_number_is_said_and_not_drawn_as_one(visit, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page([read_history(write_run(tmp_path / "run", L=3, N=2, steps=8, nan_from=6))]))
    tab = visit(file.as_uri(), "#step=400&layer=0&head=0")
    assert said(tab, "layers").startswith("layer 0: ")
    tab.locator("h1").click()
    tab.keyboard.press("Escape")
    assert said(tab, "layers").endswith("nats, 2 of 3 layers are not a number")
    assert "grey: not a number" in tab.inner_text("#entropy-surface .legend")
    assert tab.locator("#heads .unknown").count() == 4
    assert said(tab, "heads").endswith("nats, 4 of 6 heads are not a number")
    assert "of 2 heads outside the band" in said(tab, "thresholds")
    tab.close()


def test_print_shows_all_of_the_configuration(desk):
    tab = desk()
    tab.emulate_media(media="print")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator("#abouts details:not([open]) >> visible=true").count() == 0 and tab.locator("#time").is_hidden()
    drawn = tab.eval_on_selector_all("#panels svg[role=img]", "all => all.map((one) => one.viewBox.baseVal.width)")
    assert drawn and max(drawn) <= 688  # CSS pixels of an A4 sheet between margins: no letter is made smaller
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    tab.emulate_media(media="screen")


def test_a_watched_run_is_followed(visit, tmp_path):
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text(lines[0])
    with serve(workdir, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab = visit(f"http://127.0.0.1:{server.server_port}/")
        assert tab.locator("#play").is_hidden() and tab.locator("#layers").is_hidden()  # of one step nothing moves
        (workdir / "metrics.jsonl").write_text("".join(lines))
        playwright.expect(tab.locator("#now b")).to_have_text("150", timeout=60_000)
        tab.close()
        server.shutdown()
