"""The documentation cannot drift: its generated parts and its lists are compared with the code.

tests/test_commands.py runs its commands.
"""

import re
from pathlib import Path

import pytest

from daemon.cli.app import app
from daemon.errors import Reason as DaemonReason
from daemon.metrics import NOT_OF_EXPERTS
from docs.generate import PARTS, generated
from projector.errors import Reason as ProjectorReason

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", PARTS)
def test_the_generated_parts_are_the_codes(name: str) -> None:
    page = (ROOT / f"docs/{name}.md").read_text()
    assert page == generated(name, page), "run `make docs`"


def test_every_reason_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/refusals.md").read_text(), re.MULTILINE))
    assert documented == {*map(str, DaemonReason), *map(str, ProjectorReason)} - NOT_OF_EXPERTS


def test_every_command_is_documented() -> None:
    verbs = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert verbs == set(re.findall(r"^\| `mainstem (\w+)", (ROOT / "docs/cli.md").read_text(), re.MULTILINE))


def test_every_address_is_documented() -> None:
    rooms = (ROOT / "daemon/http" / room for room in ("hub", "oci"))
    sources = [ROOT / "daemon/http/app.py", *(path for room in rooms for path in sorted(room.glob("*.py")))]
    routes = {route for source in sources for route in re.findall(r'Route\("([^"]+)"', source.read_text())}
    documented = re.findall(r"^\| `(/[^`]*)` \|", (ROOT / "docs/http.md").read_text(), re.MULTILINE)
    plain = {re.sub(r":\w+}", "}", route) for route in routes}
    assert plain == set(documented)


def test_the_prometheus_configuration_is_the_one_that_ships() -> None:
    shown = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/metrics.md").read_text(), re.DOTALL)
    assert shown == [(ROOT / "deploy/prometheus/prometheus.yml").read_text()]


def anchors(page: Path) -> set[str]:
    """What the headings of a page can be linked by, as GitHub makes it of them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    listed = re.findall(r"^\| \[([\w-]+\.md)\]", index, re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES if page.parent.name == "docs" and page.name != "README.md"]
