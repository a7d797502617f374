"""The settings. Later ones win: defaults, mainstem.toml, the environment (MAINSTEM_HTTP__PORT), flags.

Unknown keys are refused.

Heads and their methods are not settings: they are fixed when a home is made and live in the registry. What is published
of them may be set, under a head's name: [heads.main.adapter].
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from daemon.errors import RESUMABLE, BadConfig, Reason
from daemon.requirements import Rule, parse
from daemon.sections import Adapter, HeadSettings, Hooks, Section, Webhook, flat_webhooks
from projector.errors import Reason as ProjectorReason
from projector.names.naming import Naming, check_prefixes
from projector.text import shown

LIVE = (
    "http.write_token",
    "http.write_token_file",
    "http.upload_bytes",
    "http.push_quiet_seconds",
    "inbox.settle_seconds",
    "inbox.patience_seconds",
    "inbox.resume_seconds",
    "inbox.scan_seconds",
    "retention.*",
    "admission.*",
    "evaluate.*",
    "hooks.*",
    "webhooks.*",
    "log.level",
)
"""What a running daemon takes up; everything else is fixed when it starts."""


OURS = ("MAINSTEM_HOME", "MAINSTEM_TOKEN", "MAINSTEM_FAILPOINT")
"""What else the environment may say to us."""

OF_KUBERNETES = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_\w+)?$|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$")
"""How the variables end that it sets for services, which may be called mainstem too."""

WANTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    "tuple_type": 'a list, as ["a", "b"]',
}
"""What a setting is, where the value is none of that."""

EXAMPLES = {
    "ignore": '["head.*"]',
    "prefixes": '{"module.": ""}',
    "command": '["python", "score.py", "{folder}"]',
    "environment": '{"HF_HOME": "/data"}',
    "require": '["each >= live - 0.02"]',
    "heads": '["main"]',
    "published": '[["reload", "{folder}"]]',
}
"""Settings that are lists or tables, as JSON."""


class Http(Section):
    """The HTTP service."""

    enabled: bool = Field(True, description="serve HTTP while merging")
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; anybody who reaches it may read")
    port: int = Field(8765, ge=0, le=65535, description="port; 0 takes a free one")
    write_token: SecretStr = Field(SecretStr(""), description="token for uploads; none: no uploads")
    write_token_file: str = Field("", description="file with that token instead; relative to the home")
    upload_bytes: ByteSize = Field(ByteSize(100_000_000_000), gt=0, description="largest expert that may be uploaded")
    push_quiet_seconds: float = Field(
        30.0, ge=0, le=86400, description="what is pushed is an expert once no other commit followed for so long"
    )
    stall_seconds: float = Field(
        60.0, gt=0, le=86400, description="a client that moves less than 1 KiB a second for so long is cut off"
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="names by which it may be asked, beside loopback's; none is any where host is not loopback",
    )

    trusted_proxies: tuple[str, ...] = Field(
        (),
        description="addresses or networks of proxies whose X-Forwarded-Proto, -For and -Prefix are believed; * is any",
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            if proxy != "*":
                ip_network(proxy)
        return proxies


class Inbox(Section):
    """When a dropped file counts as complete."""

    settle_seconds: float = Field(2.0, ge=0, le=86400, description="size, time and inode unchanged for so long")
    patience_seconds: float = Field(60.0, ge=0, le=86400, description="how long an incomplete expert may stand still")
    resume_seconds: float = Field(
        3600.0,
        ge=0,
        le=604800,
        description="the same where a copy may go on, or it may not be read",
    )
    scan_seconds: float = Field(5.0, gt=0, le=86400, description="how often an idle daemon lists the inbox")
    watch: Literal["auto", "poll"] = Field(
        "auto", description="auto also listens to file system events; poll only lists"
    )

    def patience_with(self, reason: Reason | ProjectorReason) -> float:
        """How many seconds what is incomplete for that reason may stand still."""
        return max(self.patience_seconds, self.resume_seconds if reason in RESUMABLE else 0.0)


class Compute(Section):
    """Where and how to compute."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(0, ge=0, description="worker threads; 0 takes a thread per core, 4 at the most")
    block_bytes: ByteSize = Field(
        ByteSize(3 << 20), ge=1 << 16, description="how much of a large tensor is in memory at a time, as float32"
    )
    memory_budget: ByteSize = Field(
        ByteSize(0), ge=0, description="what all tensors in hand may take together; 0 takes half of the usable memory"
    )
    device_budget: ByteSize = Field(
        ByteSize(0), ge=0, description="what they may take on a CUDA device; 0 takes 0.8 of what is free there at start"
    )
    prepare: bool = Field(True, description="prepare for the next expert while nothing arrives; takes disk space")


class Publish(Section):
    """What a version looks like."""

    dtype: Literal["base", "float32", "float16", "bfloat16"] = Field(
        "base", description="dtype of the published weights"
    )
    shard_bytes: ByteSize = Field(
        ByteSize(0), ge=0, description="largest weights file before it is split; 0 takes the files that the base has"
    )


class Retention(Section):
    """What is kept on disk."""

    versions: int = Field(5, ge=1, description="newest versions kept per head; the base and the live one always are")
    grace_seconds: float = Field(
        3600.0, ge=0, le=1e9, description="no version is removed that was the newest less than this ago"
    )
    grace_bytes: ByteSize = Field(
        ByteSize(0),
        ge=0,
        description="most that may be kept for that alone; 0 takes a tenth of what is free",
    )


class Admission(Section):
    """Limits an expert must keep."""

    max_base_ratio: float = Field(1.0, gt=0, description="refuse a task vector this many times as long as the base")
    max_norm_ratio: float = Field(
        100.0, gt=1, description="refuse one over this many times longer, or shorter, than the median so far"
    )
    warn_norm_ratio: float = Field(
        3.0, gt=1, description="merge, but flag, one over this many times longer, or shorter"
    )
    prefixes: dict[str, str] = Field({}, description="what an expert's names begin with, and the base's: a TOML table")
    ignore: tuple[str, ...] = Field((), description="globs of an expert's tensors that are left out")
    lenient_names: bool = Field(
        True,
        description="make names fit where that is unambiguous, and set heads aside",
    )

    @field_validator("prefixes")
    @classmethod
    def _prefixes(cls, prefixes: dict[str, str]) -> dict[str, str]:
        check_prefixes(prefixes)
        return prefixes

    @property
    def naming(self) -> Naming:
        """How an expert's names become the base's."""
        return Naming(self.prefixes, self.ignore, lenient=self.lenient_names)


class Evaluate(Section):
    """How good a version is, and whether it goes live."""

    command: tuple[str, ...] = Field((), description="scores the model in {folder}; none: nothing is scored")
    timeout_seconds: float = Field(3600.0, gt=0, le=1e9, description="how long it may take")
    environment: dict[str, SecretStr] = Field({}, description="what it finds in its environment: a TOML table")
    concurrency: int = Field(1, ge=1, le=64, description="how many run at a time")
    require: tuple[str, ...] = Field((), description="rules that a version keeps, or does not go live")
    on_error: Literal["hold", "accept"] = Field("hold", description="what becomes of a version without scores")
    heads: tuple[str, ...] = Field(("main",), description="heads that are scored")

    @field_validator("command")
    @classmethod
    def _command(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        if command and not any("{folder}" in argument for argument in command):
            raise ValueError("no argument has {folder} in it, which stands for the model that is to be scored")
        if command and (not command[0] or "\0" in "".join(command)):
            raise ValueError("its first word is the program, and no word has a NUL in it")
        return command

    @field_validator("environment")
    @classmethod
    def _environment(cls, environment: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, value in environment.items():
            if not name or "=" in name or "\0" in name + value.get_secret_value():
                raise ValueError(f"a name is not empty and has no `=` in it, and nothing has a NUL in it: {name!r}")
        return environment

    @field_validator("require")
    @classmethod
    def _require(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        for rule in rules:
            parse(rule)
        return rules

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What `require` says."""
        return tuple(map(parse, self.require))


class Log(Section):
    """The log on standard error."""

    format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, json lines otherwise"
    )
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least that is logged")


class Settings(BaseSettings):
    """All settings, by table."""

    model_config = SettingsConfigDict(
        env_prefix="MAINSTEM_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    http: Http = Http()
    inbox: Inbox = Inbox()
    compute: Compute = Compute()
    publish: Publish = Publish()
    retention: Retention = Retention()
    admission: Admission = Admission()
    evaluate: Evaluate = Evaluate()
    hooks: Hooks = Hooks()
    log: Log = Log()
    webhooks: tuple[Webhook, ...] = ()
    heads: dict[str, HeadSettings] = {}

    @field_validator("webhooks")
    @classmethod
    def _webhooks(cls, webhooks: tuple[Webhook, ...]) -> tuple[Webhook, ...]:
        if len({webhook.url for webhook in webhooks}) < len(webhooks):
            raise ValueError("a URL stands there twice")
        return webhooks

    def sections(self) -> dict[str, Section]:
        """The tables that every home has, by their names."""
        return {name: table for name, table in self if isinstance(table, Section)}

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted name, in order; those of webhooks and heads, where they are set, last."""
        tables = self.model_dump(mode="json", exclude={"webhooks"})
        heads = tables.pop("heads")
        values = {f"{table}.{key}": value for table, section in tables.items() for key, value in section.items()}
        adapters = {
            f"heads.{name}.adapter.{key}": value
            for name, head in heads.items()
            for key, value in (head["adapter"] or {}).items()
        }
        return {**values, **flat_webhooks(self.webhooks), **adapters}


def load(path: Path | None, flags: Mapping[str, Mapping[str, Any]] | None = None, *, needed: bool = False) -> Settings:
    """The settings in force for the file at `path` and these flags; it may be missing, unless it is `needed`. Raises
    BadConfig.
    """

    class Bound(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, content)

    _check_environment()
    try:
        content = _read(path, needed)
        return Bound(**(flags or {}))  # type: ignore[arg-type]
    except ValidationError as error:
        found = [f"{_problem(one)}{_origin(one['loc'], path, content, flags or {})}" for one in error.errors()]
        raise BadConfig("; ".join(found), _advice(error.errors())) from None
    except OSError as error:
        gone = isinstance(error, FileNotFoundError)
        hint = "put it back; an empty one stands for the defaults" if gone else "mend its permissions, or its disk"
        raise BadConfig(f"{path} cannot be read: {error.strerror}", hint) from None
    except ValueError as error:
        raise BadConfig(
            f"{path} or the environment: {error}",
            "the file is TOML, where a key stands once, be it prefixes = {...} or a table [admission.prefixes]; lists"
            " and tables in the environment are JSON: MAINSTEM_ADMISSION__IGNORE='[\"head.*\"]'",
        ) from None


def _read(path: Path | None, needed: bool) -> dict[str, Any]:
    """What the file says. Raises OSError, and ValueError where it is no TOML."""
    try:
        return tomllib.loads(path.read_bytes().decode()) if path else {}
    except FileNotFoundError:
        if needed:
            raise
        return {}


class _LogAlone(BaseSettings):
    model_config = Settings.model_config | SettingsConfigDict(extra="ignore")

    log: Log = Log()


def log_of(path: Path | None) -> Log:
    """What the file at `path` and the environment say of the log alone, however wrong the rest of them is."""

    class Bound(_LogAlone):
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: PydanticBaseSettingsSource, **sources: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return sources["env_settings"], InitSettingsSource(settings_cls, _read(path, needed=False))

    for settings in (Bound, _LogAlone):
        with suppress(ValueError, OSError):
            return settings().log
    return Log()


def is_live(name: str) -> bool:
    """True for a setting that a running daemon takes up."""
    return name in LIVE or f"{name.partition('.')[0]}.*" in LIVE


def taking_effect(hint: str, then: str = "", where: str = "") -> str:
    """The hint; where it names a setting, also how a running daemon, of the home that `where` names as an option, comes
    to know of it, and what to do `then`."""
    named = [name for name, _, _ in described() if name in hint]
    if not named and "[admission" not in hint:
        return hint
    how = f"`mainstem reload{where}` (or restart the daemon)" if all(map(is_live, named)) else "restart the daemon"
    return f"{hint}; once mainstem.toml says so, {how}{then and f', then {then}'}"


def _problem(error: Mapping[str, Any]) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"there is no setting {name}"
    if error["type"] == "byte_size":
        return f"{name} cannot be {error['input']!r}: it is a number of bytes, or one with a unit, as 2GiB"
    if error["type"] == "string_pattern_mismatch":
        return f"{name} cannot be {error['input']!r}"
    if wanted := WANTED.get(error["type"]):
        return f"{name} cannot be {error['input']!r}: it is {wanted}"
    return f"{name}: {error['msg'].removeprefix('Value error, ').replace('Input should be', 'it should be')}"


def _origin(
    loc: Sequence[Any], path: Path | None, content: Mapping[str, Any], flags: Mapping[str, Mapping[str, Any]]
) -> str:
    """Where a value came from, in words to be put behind what is wrong with it: nothing where a flag gave it."""
    words = [str(word) for word in loc]
    if words[1:] and words[1] in flags.get(words[0], {}):
        return ""
    given = {name.upper(): name for name in os.environ}
    for depth in range(len(words), 0, -1):
        if name := given.get(f"MAINSTEM_{'__'.join(words[:depth])}".upper()):
            return f" ({name} in the environment)"
    return f" (in {path})" if words and words[0] in content else ""


def _advice(errors: Sequence[Mapping[str, Any]]) -> str:
    known = {name: text for name, _, text in described()}
    names = [".".join(map(str, error["loc"])) for error in errors]
    tables = [name for name in names if "." not in name and name not in Settings.model_fields]
    if alike := [match for name in tables for match in get_close_matches(name, Settings.model_fields, n=1)]:
        return f"there is a table [{alike[0]}]"
    close = [match for name in names for match in get_close_matches(name, known, n=1)]
    if close:
        return f"{close[0]}: {known[close[0]]}"
    return "look in mainstem.toml, the environment and the flags; docs/settings.md lists every setting"


def strangers() -> list[str]:
    """The variables of the environment that are called as ours are and mean nothing here: a misspelling, or somebody
    else's. Sorted."""
    known = {*OURS, *(f"MAINSTEM_{table}".upper() for table in Settings.model_fields)}
    names = (name for name in os.environ if name.upper().startswith("MAINSTEM_") and "__" not in name)
    return sorted(name for name in names if name.upper() not in known and not OF_KUBERNETES.search(name))


def _check_json(given: str, table: str, key: str) -> None:
    """Refuses a list or a table in the environment that is no JSON."""
    default = getattr(Settings.model_construct().sections().get(table), key, None)
    if isinstance(default, tuple | Mapping):
        try:
            json.loads(os.environ[given])
        except ValueError:
            example = EXAMPLES.get(key, '["a", "b"]')
            kind = "list" if isinstance(default, tuple) else "table"
            raise BadConfig(
                f"{given} in the environment is not JSON", f"a {kind} is JSON there, as `{given}='{example}'`"
            ) from None


def _check_environment() -> None:
    """Refuses a table that does not exist, a setting with one underscore for two, and a list that is not JSON."""
    single = {f"MAINSTEM_{name.replace('.', '_')}".upper(): name for name, _, _ in described()}
    for given in os.environ:
        name = given.upper()  # they are read without regard to case
        table, nested, rest = name.removeprefix("MAINSTEM_").partition("__")
        if name.startswith("MAINSTEM_") and nested and table.lower() not in Settings.model_fields:
            alike = get_close_matches(table.lower(), Settings.model_fields, n=1)
            hint = f"MAINSTEM_{alike[0].upper()}__{rest}?" if alike else f"there are {', '.join(Settings.model_fields)}"
            raise BadConfig(f"{shown(given)} in the environment names no table of settings", hint)
        if name.startswith("MAINSTEM_") and nested:
            _check_json(given, table.lower(), rest.lower())
        if name in single and not os.environ[given].startswith("tcp://"):  # Kubernetes names services of its own so
            raise BadConfig(
                f"{given} in the environment is no setting",
                f"two underscores: MAINSTEM_{single[name].replace('.', '__').upper()}",
            )


def described() -> list[tuple[str, str, str]]:
    """(name, default, description) of every setting, for listings and docs/settings.md."""
    return [  # but for heads', which have as many rows as a home has heads: `meaning` knows them
        (f"{table}.{key}", _shown(getattr(section, key)), field.description or "")
        for table, section in Settings.model_construct().sections().items()
        for key, field in type(section).model_fields.items()
    ] + [
        (f"webhooks.*.{key}", "" if field.is_required() else _shown(field.default), field.description or "")
        for key, field in Webhook.model_fields.items()
    ]


def meaning(name: str) -> tuple[str, str]:
    """(default, description) of the setting with that dotted name."""
    fixed = {setting: (default, text) for setting, default, text in described()}
    name = re.sub(r"^webhooks\.\d+\.", "webhooks.*.", name)
    if name in fixed:
        return fixed[name]
    return "-", Adapter.model_fields[name.rpartition(".")[2]].description or ""


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return str([str(one) if isinstance(one, str) else one for one in value])  # as TOML has it
    return str(value).lower() if isinstance(value, bool) else str(value)
