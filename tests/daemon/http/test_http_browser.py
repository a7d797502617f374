"""The pages in a real browser: every state, phone and desktop, light and dark, the keyboard, and without a reload."""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry

from daemon.disk import durable
from daemon.home.presence import Presence
from daemon.http import HttpServer, create_app, events
from registry.reader import Reader
from registry.records import NewEvaluation, Score, Status
from tests.daemon.http.browser import CHROMIUM, Browser, browsing
from tests.daemon.http.test_http_page import HOSTILE

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PHONE, DESK = 360, 1200
PILL = "document.getElementById('pill').textContent"
WIDER = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
PAGES = ("/", "/experts", "/experts/2", "/lineage", "/heads/main/versions/2")
CONTRAST = """
(() => {
  const parse = (text) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((one) => one / 255);
  };
  const light = (c) => c.slice(0, 3).map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$|transparent/.test(colour)) return parse(colour);
    }
    return [1, 1, 1, 1];
  };
  const poor = new Set();
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !one.checkVisibility() || one.matches(".hidden, .skip, title, desc, script, meter")) continue;
    const style = getComputedStyle(one), svg = one instanceof SVGElement;
    const [a, b] = [light(parse(svg ? style.fill : style.color)), light(ground(one))];
    if ((Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5) poor.add(one.outerHTML.slice(0, 99));
  }
  return [...poor];
})()"""
UNNAMED = """
[...document.querySelectorAll("a, button, input, meter, progress, [role=img], [role=region], section, nav, table")]
  .filter((one) => one.checkVisibility() && !one.textContent.trim() && !one.ariaLabel && !one.labels?.length)
  .filter((one) => !one.getAttribute("aria-labelledby")).map((one) => one.outerHTML.slice(0, 99))"""
REACHED = """
[...document.querySelectorAll('a[href], pre, summary, input, button')].filter((one) => one.checkVisibility()).length"""
DRAWN = "[...document.querySelectorAll('svg')].every((one) => one.getBoundingClientRect().width)"
FOCUSED = "document.activeElement === document.body ? '' : document.activeElement.outerHTML.slice(0, 60)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LOOK_SECONDS", 0.1)


@pytest.fixture
def presence(line: "Line") -> Iterator[Callable[[], Presence]]:
    """A daemon that does nothing but be there, once it is called."""
    held: list[tuple[int, Presence]] = []

    def there() -> Presence:
        found = Presence(line.home)
        held.append((durable.lock(line.home.lock), found))
        found.starts()
        found.watches()
        return found

    yield there
    for lock, found in held:
        found.ends()
        os.close(lock)


def furnish(line: "Line") -> None:
    """Enough of everything that there is to show."""
    for n in range(6):
        start = {"trained_head": "init", "trained_version": n - 2} if n > 2 else {}
        line.publish(b"%d" % n, name=HOSTILE if n == 1 else f"an-expert-with-a-long-name-{n}" * 2, **start)
        scores = {f"task-{k}-of-the-evaluator": Score(n / 10 + k / 20) for k in range(3)}
        made = line.store.evaluate(NewEvaluation(f"{n:064x}", "bb" * 32, scores, 1.0))
        line.store.judge_version("main", n + 1, made.id)
    refused = line.expert("w" * 150, Status.QUARANTINED, None, reason="pickle", detail="x" * 200, hint=HOSTILE)
    line.store.placed(line.store.record(refused).id, "quarantine/000007")
    (line.home.inbox / ("waits" * 20)).touch()


def test_every_page_on_a_phone_and_a_desk_light_and_dark(line: "Line", origin: str, browser: Browser) -> None:
    furnish(line)
    grounds = set()
    for path in PAGES:
        for width, dark in ((PHONE, True), (DESK, False)):
            browser.open(origin + path, width, dark=dark)
            assert browser.complaints() == [], path
            assert not browser.run(WIDER), f"{path} is wider than {width}"
            assert browser.run("document.title").endswith("· mainstem"), "a name was run"
            assert browser.run(CONTRAST) == [], f"{path}, {'dark' if dark else 'light'}: too little contrast"
            assert browser.run(UNNAMED) == [], path
            assert browser.run("document.querySelectorAll('h1, main, header nav, footer nav').length") >= 4
            assert browser.run(DRAWN)
            grounds.add((dark, browser.run("getComputedStyle(document.body).backgroundColor")))
    assert len(grounds) == 2 and len({ground for _, ground in grounds}) == 2


def test_it_follows_what_goes_on_without_a_reload(
    line: "Line", origin: str, browser: Browser, presence: Callable[[], Presence]
) -> None:
    browser.open(origin + "/")
    assert browser.run(PILL) == "no daemon"
    browser.run("window.sameDocument = true; document.querySelector('header nav a[href*=lineage]').focus()")
    daemon = presence()
    browser.until(f"{PILL} === 'idle'")
    browser.until("!document.body?.textContent.includes('nothing is merged')")
    (line.home.inbox / "next").touch()
    (line.home.inbox / "other").touch()
    with daemon.merging("next"):
        daemon.progresses(0.43)
        browser.until(f"{PILL} === 'merging next 43%'")
        assert browser.run("document.getElementById('share').value") == 0.43
        browser.until("document.querySelector('.queue')?.textContent.includes('other')")
        browser.until("document.getElementById('heard').textContent === 'merging next'")
    daemon.waits("other", "it has <no> weights yet")
    browser.until("document.querySelector('.queue .flag')?.textContent === 'incomplete'")
    line.publish(b"one", name="french")
    browser.until("document.title === 'main/1 · home · mainstem'")
    browser.until("document.querySelector('[data-part=lineage]').textContent.includes('french')")
    assert browser.run("document.getElementById('share').hidden")
    line.home.manifest("main", 1).unlink()
    browser.until(f"{PILL} === 'damaged'")
    browser.until("document.querySelector('.matters.bad')?.textContent.includes('mainstem verify')")
    assert browser.run("window.sameDocument"), "it was not loaded again"
    assert browser.run("document.activeElement.textContent") == "Lineage", "the focus stays"
    assert browser.complaints() == []


def test_it_can_be_gone_through_by_the_keyboard(line: "Line", origin: str, browser: Browser) -> None:
    line.publish(b"one", name="french")
    browser.open(origin + "/")
    browser.press("Tab", 9)
    assert "To the content" in browser.run(FOCUSED)
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0, "it is seen"
    found = []
    while (now := browser.run(FOCUSED)) and len(found) < 200:
        found.append(now)
        outline = browser.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or "skip" in now, now
        browser.press("Tab", 9)
    everything = browser.run(REACHED)
    assert len(found) >= everything > 20
    browser.run("document.querySelector('a[href*=\"experts/1\"]').focus()")
    browser.press("Enter", 13)
    browser.until("document.title === 'french · home · mainstem'")


def test_without_script_it_is_whole_and_loads_itself_again(line: "Line", origin: str, browser: Browser) -> None:
    line.publish(b"one", name="french")
    browser.open(origin + "/", script=False)
    assert browser.run("document.querySelector('noscript meta').content") == "5"
    assert browser.run(PILL) == "no daemon"
    assert "french" in browser.run("document.body.innerText")
    browser.open(origin + "/experts", script=False)
    assert not browser.run("document.querySelector('noscript')"), "it would take what is typed away"
    browser.run("document.querySelector('#q').value = 'fre'; document.querySelector('form').submit()")
    browser.until("location.search === '?q=fre' && document.body?.innerText.includes('french')")
    assert browser.complaints() == []


def test_a_page_too_many_is_told_so_and_looks_by_itself(
    origin: str, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_LISTENERS", 0)
    browser.open(origin + "/")
    browser.until("performance.getEntriesByType('resource').some((one) => one.initiatorType === 'fetch')")
    assert browser.run(PILL) == "no daemon", "it does not say that it is not connected"


def test_a_server_that_went_is_said(line: "Line", browser: Browser) -> None:
    with Reader.open(line.home.registry) as reader:
        app = create_app(line.home, reader, CollectorRegistry(), lambda: "the disk is full")
        with HttpServer(app, "127.0.0.1", 0) as (host, port):
            browser.open(f"http://{host}:{port}/")
            assert "the disk is full" in browser.run("document.querySelector('.matters').innerText")
            browser.until("document.getElementById('pill').className === 'pill state bad'")
        browser.until(f"{PILL} === 'not connected'")
