"""The version that an expert was trained from, as its expert.json says: it must be one of this home."""

from daemon.checkpoints.expert_json import ABOUT, About
from daemon.errors import Reason, Refused
from daemon.notation import called
from registry.reader import Reader
from registry.records import Version


def origin_of(reader: Reader, about: About | None) -> Version | None:
    """The version that it names, also one whose files were collected; None where it names none. The base's sha256 is
    version 0 of the first head. Raises Refused where there is no such version.
    """
    words = about.trained_from if about else None
    if words is None:
        return None
    heads = {head.name: head for head in reader.heads()}
    first = next(iter(heads))
    head, slash, number = words.partition("/")
    if not slash:
        if words != reader.base().sha256:
            raise _unknown(f"no version is called {words}", called(first, heads[first].live))
        head, number = first, "0"
    if head not in heads:
        raise _unknown(f"there is no head {head}", called(first, heads[first].live))
    version = reader.version(head, int(number)) if int(number) <= heads[head].newest else None
    if version is None:
        raise _unknown(f"there is no version {called(head, int(number))}", called(head, heads[head].live))
    return version


def _unknown(what: str, example: str) -> Refused:
    return Refused(
        Reason.TRAINED_FROM,
        f"{ABOUT}: trained_from: {what}",
        f"let it name the version that the training started from, as {example}: its manifest.json has head and number;"
        " or leave trained_from out",
    )
