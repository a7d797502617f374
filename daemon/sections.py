"""What every table of mainstem.toml has in common; those that say who is told of events, and those of a head."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from daemon.errors import BadConfig
from registry.records import Event

SECRET_PREFIX = "whsec_"
FEWEST_BYTES, MOST_BYTES = 24, 64  # of a secret, as Standard Webhooks has it
SECRET_HINT = 'make one: echo "whsec_$(head -c 32 /dev/urandom | base64)"'


class Section(BaseModel):
    """One table of mainstem.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Hooks(Section):
    """Commands that are run as things happen."""

    published: tuple[tuple[str, ...], ...] = Field(
        (), description="commands that run once another version is live: [[program, argument, ...], ...]"
    )
    timeout_seconds: float = Field(600.0, gt=0, le=86400, description="how long each may take")
    stalled_seconds: float = Field(
        900.0, gt=0, le=1e6, description="after so long without progress webhooks are told `stalled`"
    )

    @field_validator("published", mode="before")
    @classmethod
    def _one_command(cls, commands: Any) -> Any:
        """A single command need not be in a list of its own."""
        flat = isinstance(commands, list | tuple) and commands and all(isinstance(word, str) for word in commands)
        return [commands] if flat else commands

    @field_validator("published")
    @classmethod
    def _commands(cls, commands: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        if any(not command or not command[0] or "\0" in "".join(command) for command in commands):
            raise ValueError("the first word of a command is its program, and no word has a NUL in it")
        if len(set(commands)) < len(commands):
            raise ValueError("a command stands there twice")
        return commands


class Webhook(Section):
    """A URL that is told of events."""

    url: str = Field(description="where each event is sent: https://..., or http://...")
    secret: SecretStr = Field(SecretStr(""), description="what the messages are signed with: whsec_...")
    secret_file: str = Field("", description="file with that secret instead; relative to the home")
    events: tuple[Event, ...] = Field(tuple(Event), min_length=1, description="what it is told of; all unless said")
    allow_private: bool = Field(False, description="it may be on this machine or in a private network")
    timeout_seconds: float = Field(10.0, gt=0, le=300, description="how long it may take to answer")

    @field_validator("url")
    @classmethod
    def _url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("it is no http:// or https:// URL with a host")
        if parts.username is not None or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("it has no user, password, fragment or blank in it, and is ASCII")
        return url

    def secrets(self, home: Path) -> list[bytes]:
        """What its messages are signed with: several, apart by blanks, while one takes another's place. Raises
        BadConfig."""
        where = f"the secret of webhook {self.url}"
        text = self.secret.get_secret_value()
        if bool(text) == bool(self.secret_file):
            raise BadConfig(f"{where}: set secret or secret_file, and not both", SECRET_HINT)
        if self.secret_file:
            try:
                text = (home / self.secret_file).read_text()
            except (OSError, ValueError) as error:
                raise BadConfig(f"{where}: {error}", f"put it into that file; {SECRET_HINT}") from None
        found = [_decoded(word) for word in text.split()]
        if not found or not all(found):
            raise BadConfig(
                f"{where} is not {SECRET_PREFIX} and {FEWEST_BYTES} to {MOST_BYTES} bytes in base64", SECRET_HINT
            )
        return found


class Adapter(Section):
    """A LoRA adapter beside each version's weights."""

    rank: int = Field(ge=1, le=65536, description="also publish the merged task vector as a LoRA adapter of this rank")
    names: Literal["base", "experts"] = Field(
        "base", description="its modules' names: as in the base's files, or by admission.prefixes as in the experts"
    )


class HeadSettings(Section):
    """What is published of one head."""

    adapter: Adapter | None = None


def _decoded(secret: str) -> bytes:
    """The bytes of a secret; none where it is no good one."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (ValueError, binascii.Error):
        return b""
    return key if secret.startswith(SECRET_PREFIX) and FEWEST_BYTES <= len(key) <= MOST_BYTES else b""


def flat_webhooks(webhooks: tuple[Webhook, ...]) -> Mapping[str, Any]:
    """Each setting of each webhook by its dotted name, its number first, as they may be shown."""
    return {
        f"webhooks.{n}.{key}": value
        for n, webhook in enumerate(webhooks)
        for key, value in webhook.model_dump(mode="json").items()
    }
