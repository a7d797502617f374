"""The model card: what it says, that no name in it can become markup, and that the hub's own reader takes its head.

It is read back by markdown-it, which takes HTML as GitHub and the hub do, and by huggingface_hub.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from daemon.manifest import Withdrawal
from daemon.versions.card import MOST_EXPERTS, AboutBase, Card, _is_repository, about_base, escaped, render
from projector.methods import make
from projector.text import shown
from registry.records import BaseModel, Expert, NewExpert, Status

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OURS = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}
ATTACKS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "a\\|<b>x",
    "`code` ``more``",
    "[text](javascript:alert(1))",
    "![x](https://example.org/x.png)",
    "https://example.org www.example.org <https://example.org>",
    "**bold** __bold__ _it_ ~~gone~~ $x$",
    "&lt;b&gt; &#60;i&#62;",
    "---",
    "# title",
    "a\nb\n\n---\n\n# c",
    "\u202egnp.exe",
    "{{ 7 * 7 }} {% raw %}",
    "'; drop table --",
    "\\",
    " ",
    "|",
    "ü" * 300,
)


def expert(name: str, n: int = 1, weight: float | None = None) -> NewExpert:
    about = None if weight is None else {"weight": weight}
    return NewExpert(name, "file", f"{n:064x}", 8, Status.MERGED, NOW, "1:1:1", about=about)


def card(*names: str, base: str = "org/model", **changes: object) -> Card:
    found = Card(
        head="main",
        number=len(names),
        method=make("opcm", {}),
        base=BaseModel(base, "ab" * 32, 1234, 5678, NOW),
        about=AboutBase({}),
        experts=len(names),
        newest=[expert(name, n) for n, name in enumerate(names)],
        figures={"lambda": 1.25},
        dtype="base",
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def parts(made: Card) -> tuple[str, str]:
    """(the YAML at the head, the Markdown below)."""
    opening, head, body = render(made).decode().split("---\n", 2)
    assert not opening
    return head, body


class Seen(HTMLParser):
    """The tags of a rendered card, and the cells of its tables row by row."""

    def __init__(self, body: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self._into: list[str] | None = None
        self.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body))

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert dict(attrs).keys() <= {"class"}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "h1", "h2"):
            self._into = self.headings if tag[0] == "h" else self.rows[-1]
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "h1", "h2"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data


@settings(max_examples=300)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=200), st.booleans())
@example("ordinary.safetensors", True)
def test_a_name_is_shown_and_can_be_nothing_else(name: str, of_base: bool) -> None:
    made = card(name, "another", base=shown(name)) if of_base else card(name, "another", base="org/model")
    made = replace(made, withdrawal=Withdrawal([_gone(name)], "replayed"))
    seen = Seen(parts(made)[1])
    assert seen.tags <= OURS
    assert seen.headings[1:] == ["Load it", "Base", "Method", "Figures", "Experts", "Taken out"]
    assert all(len(row) in (2, 4) for row in seen.rows)
    wanted = shown(name).strip()
    assert ["2", wanted, "1", f"{0:064x}"] in [[cell.strip() for cell in row] for row in seen.rows]
    assert [wanted, "ab" * 32] in [[cell.strip() for cell in row] for row in seen.rows]
    if of_base:
        assert seen.headings[0] == f"{shown(name)}: main/2".lstrip()


@pytest.mark.parametrize("name", ATTACKS)
def test_what_attackers_write_is_text(name: str) -> None:
    test_a_name_is_shown_and_can_be_nothing_else.hypothesis.inner_test(name, True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ATTACKS)
def test_the_head_stays_yaml_of_known_fields(name: str) -> None:
    hostile = f"---\nlicense: {name}\nlicense_name: '{name}'\nlicense_link: {name}\n---\n".encode()
    about = about_base(hostile, f'{{"architectures": ["{name}"], "transformers_version": "5"}}'.encode(), [])
    assert about.architecture is None
    head = yaml.safe_load(parts(card("a", base=name, about=about))[0])
    assert set(head) <= {"base_model", "base_model_relation", "license", "license_name", "library_name", "tags"}
    assert head["tags"] == ["merge", "mainstem"]


def _gone(name: str) -> Expert:
    return Expert(name, "file", "ab" * 32, 8, Status.WITHDRAWN, NOW, "1:1:1")


def test_letters_digits_and_harmless_punctuation_stay_readable() -> None:
    assert escaped("legal-German_v2.safetensors") == "legal-German_v2.safetensors"
    assert escaped("Übersetzung 日本") == "Übersetzung 日本"


def test_the_hub_reads_the_head() -> None:
    about = about_base(
        b"---\nlanguage: en\nlicense: apache-2.0\ntags:\n- x\n---\n# base\n",
        b'{"architectures": ["BertModel"], "transformers_version": "5.0.0"}',
        ["config.json"],
    )
    text = render(card("a", "b", about=about)).decode()
    assert ModelCard(text).data.to_dict() == {
        "base_model": "org/model",
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["merge", "mainstem"],
    }
    assert "from transformers import BertModel\n" in text
    assert 'BertModel.from_pretrained("path/to/this/folder")' in text


@pytest.mark.parametrize(
    ("readme", "wanted"),
    [
        (b"---\nlicense: mit\n---\n", {"license": "mit"}),
        (b"---\r\nlicense: 'mit'\r\n---\r\n", {"license": "mit"}),
        (
            b'---\nlicense: other\nlicense_name: "llama3.1"\nlicense_link: https://x.org/a_b/LICENSE\n---\n',
            {"license": "other", "license_name": "llama3.1", "license_link": "https://x.org/a_b/LICENSE"},
        ),
        (b"---\nlicense: other\nlicense_link: LICENSE\n---\n", {"license": "other", "license_link": "LICENSE"}),
        (b"---\nmodel-index:\n  license: mit\n---\n", {}),  # of something else
        (b"---\nlicense:\n- mit\n---\n", {}),
        (b"# a card\n\n---\nlicense: mit\n---\n", {}),  # a rule in the text
        (b"---\nlicense: mit\n", {}),  # it never ends
        (b"---\n\xff\xfe\n---\n", {}),
        (b"", {}),
    ],
)
def test_the_license_is_the_bases_own(readme: bytes, wanted: dict[str, str]) -> None:
    assert about_base(readme, b"", []).license == wanted


@pytest.mark.parametrize(
    ("config", "names", "library"),
    [
        (b'{"transformers_version": "5.0.0"}', ["config.json"], "transformers"),
        (b'{"architectures": ["LlamaForCausalLM"]}', ["config.json"], "transformers"),
        (b'{"architectures": ["BertModel"]}', ["config.json", "modules.json"], "sentence-transformers"),
        (b'{"_class_name": "UNet2DModel", "_diffusers_version": "0.30"}', ["config.json"], "diffusers"),
        (b'{"architectures": []}', ["config.json"], None),
        (b'["transformers_version"]', ["config.json"], None),
        (b"{", ["config.json"], None),
        (b"[" * 100_000, ["config.json"], None),
        (b"", [], None),
    ],
)
def test_the_library_is_the_one_that_the_configuration_is_of(
    config: bytes, names: Sequence[str], library: str | None
) -> None:
    assert about_base(b"", config, names).library == library


@given(st.text("aZ0_-./ ", max_size=12) | st.sampled_from(["gpt2", "org/model", "a/b/c", "x" * 97, "a.git"]))
def test_a_base_model_is_named_only_where_the_hub_takes_the_name(name: str) -> None:
    if _is_repository(name):
        validate_repo_id(name)


def test_which_names_the_hub_takes() -> None:
    for name in ("gpt2", "org/model-1.0_x", "all-MiniLM-L6-v2"):
        assert _is_repository(name)
    for name in ("a b", "-a", "a--b", "a..b", "org/model/x", "org./model", "org/model-", "a.git", "", "x" * 97):
        assert not _is_repository(name)
        with pytest.raises(HFValidationError):
            validate_repo_id(name)
    assert not _is_repository("base.safetensors")


def test_many_experts_are_counted_and_the_newest_listed() -> None:
    newest = [expert(f"e{n}", n) for n in range(MOST_EXPERTS)]
    made = card(experts=12345, newest=newest, number=12345)
    text = parts(made)[1]
    assert "| 12345 | e0 |" in text and f"| {12345 - MOST_EXPERTS + 1} | e{MOST_EXPERTS - 1} |" in text
    assert f"And {12345 - MOST_EXPERTS} earlier ones" in text and "/v1/lineage" in text
    assert len(render(made)) < 32 << 10


def test_it_says_what_the_method_was_and_what_it_reports() -> None:
    text = parts(card("a", number=7))[1]
    method = make("opcm", {})
    rows = Seen(text).rows
    assert ["alpha", "0.5"] in rows and ["lambda", "1.25"] in rows
    assert f"opcm: `{method.formula}`\n" in text and escaped(method.paper) in text
    assert "counts every expert alike" in text
    assert "counts every expert alike" not in parts(card("a", method=make("mean", {})))[1]
    weighed = card("a", newest=[expert("a", weight=2.5)])
    assert ["1", "a", "2.5", f"{1:064x}"] in Seen(parts(weighed)[1]).rows


def test_what_only_approximates_says_so() -> None:
    assert "approximates" in parts(card("a", approximate=True))[1]
    assert "approximates" not in parts(card("a"))[1]


def test_version_0_is_the_base_and_says_so() -> None:
    head, text = parts(card(figures={}))
    assert yaml.safe_load(head) == {"base_model": "org/model", "tags": ["mainstem"]}
    assert "This is the base itself" in text and "merged out of" not in text
    assert Seen(text).headings == ["org/model: main/0", "Load it", "Base"]


def test_what_was_taken_out_is_named_and_counted() -> None:
    gone = [_gone(f"g{n}") for n in range(MOST_EXPERTS + 5)]
    text = parts(card("a", withdrawal=Withdrawal(gone, "subtracted")))[1]
    assert "| g0 |" in text and "And 5 more." in text


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["model.safetensors"], 'load_file("path/to/this/folder/model.safetensors")'),
        (["2_Dense/model.safetensors", "model.safetensors"], 'load_file("path/to/this/folder/model.safetensors")'),
        (["flux1-dev.safetensors"], 'load_file("path/to/this/folder/flux1-dev.safetensors")'),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], 'glob("*.safetensors")'),
        (['a")\nimport os # .safetensors'], 'glob("*.safetensors")'),
    ],
)
def test_without_a_configuration_it_is_loaded_as_tensors(files: list[str], wanted: str) -> None:
    assert wanted in parts(card("a", files=files))[1]


@pytest.mark.parametrize(
    ("config", "file", "wanted"),
    [
        (b'{"_class_name": "UNet2DModel", "_diffusers_version": "0.30"}', "diffusion_pytorch_model", "UNet2DModel"),
        (
            b'{"_class_name": "AutoencoderKL", "_diffusers_version": "1"}',
            "diffusion_pytorch_model.fp16",
            "AutoencoderKL",
        ),
        (b'{"architectures": ["BertModel"]}', "model", "BertModel"),
        (b'{"transformers_version": "5.0.0"}', "model.bf16", "AutoModel"),
    ],
)
def test_its_own_library_loads_it_by_the_name_of_its_files(config: bytes, file: str, wanted: str) -> None:
    about = about_base(b"", config, [])
    body = parts(card("a", about=about, files=[f"{file}.safetensors"]))[1]
    assert f"from {about.library} import {wanted}\n" in body
    variant = file.partition(".")[2]
    asked = f', variant="{variant}"' if variant else ""
    assert f'model = {wanted}.from_pretrained("path/to/this/folder"{asked})\n' in body


def test_experts_are_called_what_their_expert_json_says() -> None:
    plain, named = expert("run-17", 1), replace(expert("run-18", 2), about={"name": "Legal | German", "task": "<b>law"})
    rows = Seen(parts(card("a", "b", newest=[named, plain]))[1]).rows
    assert rows[-3:] == [
        ["", "expert", "task", "weight", "sha256 of its weights"],
        ["2", "Legal | German", "<b>law", "1", f"{2:064x}"],
        ["1", "run-17", "-", "1", f"{1:064x}"],
    ]
    gone = replace(_gone("run-18"), about={"name": "Legal"})
    rows = Seen(parts(card("a", withdrawal=Withdrawal([gone], "replayed")))[1]).rows
    assert rows[-1] == ["Legal", "ab" * 32]


def test_the_same_version_has_the_same_card() -> None:
    assert render(card("a", "b")) == render(card("a", "b"))
