"""Settings: defaults < mainstem.toml < environment < flags; whatever is unknown or out of range is refused."""

import shlex
from pathlib import Path

import pytest
from pydantic import ValidationError

from daemon.config import Settings, described, load, strangers
from daemon.errors import BadConfig, Reason
from projector.names.naming import Naming


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "mainstem.toml"


def test_without_anything_the_defaults_hold(toml: Path) -> None:
    settings = load(toml)
    assert settings.flat() == Settings().flat()
    assert (settings.http.host, settings.http.port) == ("127.0.0.1", 8765)
    assert settings.publish.shard_bytes == 0 and settings.retention.versions == 5


def test_later_sources_win_key_by_key(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text('[http]\nport = 1\nhost = "::1"\nenabled = false\n[publish]\nshard_bytes = "2GiB"\n')
    monkeypatch.setenv("MAINSTEM_HTTP__PORT", "2")
    monkeypatch.setenv("MAINSTEM_HTTP__HOST", "0.0.0.0")
    settings = load(toml, {"http": {"port": 3}})
    assert (settings.http.enabled, settings.http.host, settings.http.port) == (False, "0.0.0.0", 3)
    assert settings.publish.shard_bytes == 2 << 30
    assert load(toml).http.port == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[http]\nprot = 1\n", "http.prot"),
        ("[htpp]\nport = 1\n", "htpp"),
        ("port = 1\n", "port"),
        ("[http]\nport = 65536\n", "http.port"),
        ('[http]\nport = "many"\n', "http.port"),
        ("[inbox]\nsettle_seconds = -1\n", "inbox.settle_seconds"),
        ("[inbox]\nscan_seconds = 0\n", "inbox.scan_seconds"),
        ('[compute]\ndevice = "tpu"\n', "compute.device"),
        ('[compute]\ndevice = "cuda:x"\n', "compute.device"),
        ("[compute]\nblock_bytes = 1\n", "compute.block_bytes"),
        ('[publish]\ndtype = "int8"\n', "publish.dtype"),
        ("[publish]\nshard_bytes = -1\n", "publish.shard_bytes"),
        ("[retention]\nversions = 0\n", "retention.versions"),
        ("[admission]\nmax_norm_ratio = 1\n", "admission.max_norm_ratio"),
        ('[admission]\nprefixes = "module."\n', "admission.prefixes"),
        ('[admission]\nprefixes = {"module." = 1}\n', "admission.prefixes"),
        ('[admission]\nprefixes = {"layer*." = "h.*."}\n', 'admission.prefixes: "layer'),
        ('[admission]\nignore = "cls.*"\n', "admission.ignore"),
        ("http = 1\n", "http"),
        ("[http\n", "mainstem.toml"),
        ("[http]\nport = 1\nport = 2\n", "mainstem.toml"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(toml: Path, text: str, named: str) -> None:
    toml.write_text(text)
    with pytest.raises(BadConfig, match=named.replace(".", r"\.")) as refused:
        load(toml)
    assert refused.value.reason is Reason.CONFIG and refused.value.hint


def test_a_table_that_is_misspelt_is_told_its_name(toml: Path) -> None:
    toml.write_text('[admision.prefixes]\n"a" = "b"\n')
    with pytest.raises(BadConfig) as refused:
        load(toml)
    assert refused.value.hint == "there is a table [admission]"


def test_a_file_that_is_no_text_is_refused(toml: Path) -> None:
    toml.write_bytes(b"\xff\xfe")
    with pytest.raises(BadConfig, match=r"mainstem\.toml"):
        load(toml)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAINSTEM_HTTP__PROT", "1"),
        ("MAINSTEM_HTTP__PORT", "many"),
        ("MAINSTEM_HTPP__PORT", "1"),
        ("MAINSTEM_HTTP", "1"),
        ("MAINSTEM_COMPUTE__DEVICE", "abacus"),
        ("MAINSTEM_ADMISSION__PREFIXES", "module."),
        ("MAINSTEM_ADMISSION__PREFIXES", "[]"),
        ("MAINSTEM_ADMISSION__IGNORE", "cls.*"),
    ],
)
def test_what_is_wrong_in_the_environment_is_refused(
    toml: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadConfig):
        load(toml)


def test_a_list_that_is_not_json_is_told_what_it_should_be(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSTEM_ADMISSION__IGNORE", "cls.*")
    with pytest.raises(BadConfig) as refused:
        load(toml)
    assert "is JSON there" in str(refused.value.hint)


def test_the_home_and_a_service_in_the_environment_are_no_settings(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSTEM_HOME", "/somewhere")
    monkeypatch.setenv("MAINSTEM_HTTP_PORT", "tcp://10.0.0.1:80")  # as Kubernetes sets it for a service mainstem-http
    assert load(toml).flat() == Settings().flat()


def test_names_come_as_a_table_and_a_list_or_as_json(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text('[admission]\nignore = ["cls.*", "*.head.*"]\n[admission.prefixes]\n"module." = ""\n"" = "bert."\n')
    assert load(toml).admission.naming == Naming({"module.": "", "": "bert."}, ("cls.*", "*.head.*"), lenient=True)
    assert load(toml).flat()["admission.prefixes"] == {"module.": "", "": "bert."}
    monkeypatch.setenv("MAINSTEM_ADMISSION__PREFIXES", '{"Model.": "a.", "b": ""}')
    monkeypatch.setenv("MAINSTEM_ADMISSION__IGNORE", '["score.*"]')
    assert load(None).admission.naming == Naming({"Model.": "a.", "b": ""}, ("score.*",), lenient=True)
    assert load(toml).admission.ignore == ("score.*",)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        setattr(Settings().http, "port", 1)  # noqa: B010 - mypy knows already that it may not be set


def test_every_setting_is_described_once() -> None:
    listed = [name for name, _, _ in described()]
    one_webhook = Settings.model_validate({"webhooks": [{"url": "https://example.com"}]})
    assert listed == [name.replace("webhooks.0.", "webhooks.*.") for name in one_webhook.flat()]
    assert all(text for _, _, text in described())


def test_what_is_wrong_is_said_with_where_it_came_from(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text('[http]\nport = "many"\n')
    with pytest.raises(BadConfig) as refused:
        load(toml)
    assert str(refused.value) == f"http.port cannot be 'many': it is a whole number (in {toml})"
    monkeypatch.setenv("mainstem_http__port", "abc")
    with pytest.raises(BadConfig) as refused:
        load(toml)
    assert "'abc'" in str(refused.value) and "(mainstem_http__port in the environment)" in str(refused.value)
    with pytest.raises(BadConfig) as refused:
        load(None, {"http": {"port": 70000}})
    assert "environment" not in str(refused.value) and "(in" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        *("MAINSTEM_ADMISSION__IGNORE", "MAINSTEM_ADMISSION__PREFIXES", "MAINSTEM_EVALUATE__COMMAND"),
        *("MAINSTEM_EVALUATE__ENVIRONMENT", "MAINSTEM_EVALUATE__REQUIRE", "MAINSTEM_EVALUATE__HEADS"),
        "MAINSTEM_HOOKS__PUBLISHED",
    ],
)
def test_what_is_no_json_has_an_example_that_works(toml: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "foo")
    with pytest.raises(BadConfig, match=f"{name} in the environment is not JSON") as refused:
        load(toml)
    variable, value = shlex.split(refused.value.hint.split("`")[1])[0].split("=", 1)
    monkeypatch.setenv(variable, value)
    assert load(toml).flat()[variable.removeprefix("MAINSTEM_").lower().replace("__", ".")]


def test_a_variable_that_means_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAINSTEM_FOO", "MAINSTEM_HOME", "MAINSTEM_TOKEN", "MAINSTEM_HTTP", "MAINSTEM_SERVICE_HOST"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MAINSTEM_PORT_8765_TCP_ADDR", "10.0.0.1")  # with the one above: of Kubernetes
    assert [name for name in strangers() if name not in ("MAINSTEM_BIN",)] == ["MAINSTEM_FOO"]
