"""The report's page: what it shows and what it lacks, that foreign names are text, and that a real browser shows it."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from daemon.evaluation.figures import order_spread
from daemon.reports.report import charts
from daemon.reports.report.document import render
from daemon.reports.report.gathering import Overlap
from daemon.reports.report.parts import picked
from tests.daemon.reports.reported import HOSTILE, made_up

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --no-proxy-server --enable-logging=stderr --dump-dom "
    "--allow-file-access-from-files --virtual-time-budget=5000"
)
MEASURE = """<!doctype html><title>measuring</title>
<iframe id="phone" src="report.html" width="390" height="800"></iframe>
<iframe id="desk" src="report.html" width="1200" height="800"></iframe>
<script>
addEventListener("load", () => {
  const found = {};
  for (const id of ["phone", "desk"]) {
    const page = document.getElementById(id).contentDocument, style = page.defaultView.getComputedStyle;
    const charts = [...page.querySelectorAll("svg.chart")];
    found[id] = {
      wide: page.documentElement.scrollWidth,
      room: page.documentElement.clientWidth,
      ground: style(page.body).backgroundColor,
      charts: charts.length,
      flat: charts.filter((chart) => chart.getBoundingClientRect().height < 40).length,
      inks: [...new Set([...page.querySelectorAll("svg.chart text")].map((text) => style(text).fill))],
      title: page.title,
    };
  }
  document.body.textContent = JSON.stringify(found);
});
</script>"""


@pytest.fixture(scope="module")
def page() -> str:
    report = made_up()
    return render(replace(report, orders={"ACC": order_spread([0.71, 0.75])}))


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def test_it_has_every_section_and_the_figures(page: str) -> None:
    titles = re.findall(r"<h2>([^<]+)</h2>", page)
    assert titles[-7:] == [
        "The field&#39;s figures",
        "Every task in every version",
        "Over time",
        "Norms and lambda",
        "Overlap of the experts",
        "Seconds and bytes of each arrival",
        "Verdicts of the gate",
    ]
    head = made_up().heads[0]
    assert head.found and head.found.acc is not None and f"<bdi>{head.found.acc:.3g}</bdi>" in page
    for words in ("No mean takes news", "Over several orders of arrival", "20 live, 4 held, 1 rejected.", "main/11"):
        assert words in text_of(page)
    assert page.count("<svg class=") == 2 + 2 + 2 + 1 + 2 + 1  # the last is the mark


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_run(page: str) -> None:
    assert not re.search(r"""<\w[^>]*\b(src|href)\s*=\s*(?!"#|"data:)""", page), (
        "only marks in the page itself, and its icon"
    )
    assert set(re.findall(r"url\(([^)]{1,5})", page)) <= {
        "#heat",
        "#bala",
        "#curv",
        "#norm",
        "#lamb",
        "#over",
        "#seco",
        "#byte",
    }
    assert "<script" not in page and "@import" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_foreign_names_are_text(page: str) -> None:
    assert "<img" not in page
    assert page.count("&lt;script&gt;document.title") > 4 and HOSTILE in text_of(page)
    assert "{{7*7}}" in page and "$x^2$" in page


def test_each_chart_says_what_it_shows_and_has_its_table(page: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", page, flags=re.DOTALL)
    assert len(figures) == 9
    for figure in figures:
        labels = re.search(r'aria-labelledby="(\S+) (\S+)"', figure)
        assert labels and re.search(f'<title id="{labels[1]}">[^<]', figure)
        assert re.search(f'<desc id="{labels[2]}">[^<]', figure) and "<tbody>" in figure
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= {*ids}
    assert "font-family:" not in page.partition("</style>")[2], "charts are in the page's font"
    assert not re.search(r"#0000[ef]", page.partition("</style>")[2]), "and in its colours"


def test_the_same_report_is_the_same_file() -> None:
    report = made_up(3)
    assert render(report) == render(report)


def test_what_is_missing_is_said_with_what_to_do() -> None:
    text = text_of(render(made_up(0, scored=False)))
    for words in (
        "say in mainstem.toml how, with [evaluate] command",
        "Nothing was merged yet",
        "It takes two merged experts",
        "No version was judged",
    ):
        assert words in text
    scored = made_up(3)
    held_in = [
        replace(
            head,
            base={"reading": head.base["reading"]},
            arrivals=[replace(a, scores={"reading": a.scores["reading"]}, figures={}) for a in head.arrivals],
        )
        for head in scored.heads
    ]
    text = text_of(render(replace(scored, heads=held_in, overlap=Overlap(failed="e1 is damaged"))))
    for words in ("no task is held out", "could not be compared: e1 is damaged"):
        assert words in text
    assert "Norms of task vectors" in text and "ambda" not in text


def test_ten_thousand_versions_make_no_longer_page() -> None:
    few, many = render(made_up(1000, window=1000)), render(made_up(10_000, window=1000))
    assert len(many) < 1.1 * len(few)
    assert "the newest 1,000 versions are in it" in text_of(many) and "main/9001" in text_of(many)
    assert max(table.count("<tr>") for table in many.split("<table")) == 100 + 1
    paths = re.findall(r'<path d="(M[^"]+)"', many)
    assert max(path.count("\n") for path in paths) <= 200 + 1


def test_points_are_picked_evenly_with_both_ends() -> None:
    assert picked(range(5), 9) == [0, 1, 2, 3, 4]
    assert picked(range(10), 4) == [0, 3, 6, 9]
    assert len(set(picked(range(10_000), 200))) == 200


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(Exception, match="matplotlib, which is not installed") as raised:
        charts.require()
    assert "mainstem[report]" in raised.value.hint  # type: ignore[attr-defined]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_real_browser_shows_it_light_and_dark_wide_and_narrow(page: str, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    (tmp_path / "report.html").write_text(page)
    (tmp_path / "measure.html").write_text(MEASURE)
    found = {}
    for scheme, flag in (("light", "1"), ("dark", "0")):
        command = [CHROMIUM, *FLAGS.split(), f"--blink-settings=preferredColorScheme={flag}"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "measure.html").as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in shown.stderr, shown.stderr
        body = re.search(r"<body>(\{.*\})</body>", shown.stdout, flags=re.DOTALL)
        assert body, shown.stdout[-2000:] + shown.stderr
        found[scheme] = json.loads(html.unescape(body[1]))
        for width in ("phone", "desk"):
            measured = found[scheme][width]
            assert measured["wide"] <= measured["room"], f"{scheme}, {width}: the page is wider than the screen"
            assert (measured["charts"], measured["flat"]) == (9, 0)
            assert measured["title"] == "main/11 · mainstem report", "a name was run"
    assert found["light"]["desk"]["ground"] != found["dark"]["desk"]["ground"]
    assert not set(found["light"]["desk"]["inks"]) & set(found["dark"]["desk"]["inks"])
