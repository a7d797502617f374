"""expert.json: what an expert says about itself. It lies beside the weights, may be missing, and so may each field.

It is not part of the expert's identity: the same weights with another expert.json are the same expert.
"""

import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from daemon.errors import NotYet, Reason, Refused
from projector.names.naming import Naming, check_prefixes
from projector.text import once_each, shown

ABOUT = "expert.json"
MAX_ABOUT_BYTES = 64 << 10
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3  # further apart, rounding would eat what the lighter one brings
MAX_NOTES = 4000
MAX_NAMES = 64  # of prefixes and of globs
MAX_NAME = 200
MAX_DATA = 256  # entries: what it was trained on
MAX_URI = 1000
MAX_STEPS = 1 << 30  # characters of globs times characters of names: seconds at most
SHORT = f"at most {MAX_NAMES}, of at most {MAX_NAME} printable characters each"
ONE_LINE = "one printable line of at most 200 characters"


def _printable(text: str) -> str:
    """Refuses what could deceive whoever reads it on a terminal."""
    if not text.isprintable():
        raise ValueError("not printable")
    return text


def _stars(prefixes: dict[str, str]) -> dict[str, str]:
    check_prefixes(prefixes)
    return prefixes


def _printable_lines(text: str) -> str:
    _printable(text.replace("\n", "").replace("\t", ""))
    return text


Line = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
Name = Annotated[str, Field(max_length=MAX_NAME), AfterValidator(_printable)]
Names = Annotated[list[Name], Field(max_length=MAX_NAMES)]
Lines = Annotated[str, Field(max_length=MAX_NOTES), AfterValidator(_printable_lines)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Uri = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*:\S+$", max_length=MAX_URI), AfterValidator(_printable)]
Origin = Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]*/[0-9]{1,18}|[0-9a-f]{64})$", max_length=200)]


class Data(BaseModel):
    """What it was trained on: where that is, its digest, or both."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    uri: Uri | None = None
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.uri is None and self.sha256 is None:
            raise ValueError("neither")
        return self


class About(BaseModel):
    """The fields of expert.json; each description says what the field must be."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    name: Line | None = Field(default=None, description=ONE_LINE)
    task: Line | None = Field(default=None, description=ONE_LINE)
    weight: float = Field(
        default=1.0, ge=MIN_WEIGHT, le=MAX_WEIGHT, description=f"a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
    )
    trained_from: Origin | None = Field(
        default=None, description="a version such as main/12, or a sha256 in lower case"
    )
    notes: Lines | None = Field(default=None, description=f"printable text of at most {MAX_NOTES} characters")
    data: Annotated[list[Uri | Data], Field(max_length=MAX_DATA)] = Field(
        default=[],
        description=f"a list of at most {MAX_DATA}, each a URI of at most {MAX_URI} printable characters, none blank,"
        ' or an object with "uri", "sha256" or both',
    )

    prefixes: Annotated[dict[Name, Name], Field(max_length=MAX_NAMES), AfterValidator(_stars)] = Field(
        default={}, description=f"an object: what names begin with -> what the base's do; {SHORT}, a * on both sides"
    )
    ignore: Names = Field(default=[], description=f"a list of globs of its tensors that are left out; {SHORT}")
    unchanged: Names = Field(
        default=[], description=f"a list of globs of the base's tensors that it lacks and leaves as they are; {SHORT}"
    )

    def naming(self, settings: Naming, names: Iterable[str]) -> Naming:
        """How its names are read: as it says, else as the settings say.

        Raises Refused where its globs could take for ever to hold against these names.
        """
        letters = sum(map(len, (*self.ignore, *self.unchanged)))
        if letters and letters * sum(map(len, names)) > MAX_STEPS:
            raise _bad(
                f"it has globs of {letters} characters, which could take for ever with so many and so long names"
            )
        return replace(
            settings,
            prefixes={**settings.prefixes, **self.prefixes},
            ignore=(*settings.ignore, *self.ignore),
            unchanged=(*settings.unchanged, *self.unchanged),
        )

    def given(self) -> dict[str, Any]:
        """The fields that the file has, ready for JSON."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


def read_about(fd: int) -> About:
    """Reads expert.json from its descriptor. Raises Refused, or NotYet where it may only be unfinished."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise _bad("it is no file")
    if status.st_size > MAX_ABOUT_BYTES:
        raise _bad(f"it has {status.st_size} bytes, {MAX_ABOUT_BYTES} are allowed")
    try:
        text, hook = os.pread(fd, MAX_ABOUT_BYTES, 0), once_each(lambda: _bad("a field is there twice"))
        content = json.loads(text, object_pairs_hook=hook)
    except (ValueError, RecursionError):
        raise NotYet(Reason.BAD_ABOUT, f"{ABOUT} is not JSON", "copy it again, or leave it out") from None
    try:
        return About.model_validate(content)
    except ValidationError as error:
        raise _bad(_in_words(error.errors(include_input=False)[0])) from None


def _in_words(error: Mapping[str, Any]) -> str:
    """One complaint of pydantic in our words: which field, and what it must be."""
    if not error["loc"]:
        return "it is not an object with fields"
    field = str(error["loc"][0])
    if field not in About.model_fields:
        return f"{shown(field)} is none of its fields"
    return f"{field} must be {About.model_fields[field].description}"


def _bad(detail: str) -> Refused:
    return Refused(
        Reason.BAD_ABOUT,
        f"{ABOUT}: {detail}",
        f"its fields, all optional, are {', '.join(About.model_fields)}: mend it or leave it out",
    )
