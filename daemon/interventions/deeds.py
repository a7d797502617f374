"""What a person can do to a home: rollback, promote, withdraw, block, pin, and look after refused experts.

`check` says in words what a deed would do, or why it cannot be done, and changes nothing: a dry run does no more.
`carry_out` does it. The caller is the only one that writes to the home.
"""

import getpass
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from daemon.disk.failpoints import hit
from daemon.errors import BadHome
from daemon.home import orders
from daemon.home.standing import learned, unlearned, withdrawn_since
from daemon.interventions import cases
from daemon.interventions.pruning import Prune
from daemon.layout import Home
from daemon.notation import called
from daemon.versions.checking import problems
from daemon.versions.latest import follow_live
from projector.text import listed
from registry.reader import Reader
from registry.records import LEARNED, Deed, Expert, Head, NewEvaluation, NewIntervention, Status, Version
from registry.store import Store

MOST_LETTERS = 500  # of a reason


@dataclass(frozen=True)
class Request:
    """What somebody asks for.

    experts: their ids; to withdraw, where a version is given instead, those that came after it. replay: withdraw by
    merging the others again in any case. evaluation: what was found of a version, or of one expert by itself. verdict,
    held: what its rules say of the version since, and why it is held by that, where the gate held it. deliveries: what
    is to be told once more; of none, all that is dead. prune: what is to go.
    """

    deed: Deed
    who: str
    why: str | None = None
    head: str | None = None
    version: int | None = None
    experts: tuple[int, ...] = ()
    replay: bool = False
    evaluation: NewEvaluation | None = None
    verdict: Mapping[str, Any] | None = None
    held: str | None = None
    deliveries: tuple[int, ...] = ()
    prune: Prune | None = None

    @property
    def named(self) -> tuple[str, int]:
        """The head and the number of the version that is meant; of none, what none is called."""
        return self.head or "-", -1 if self.version is None else self.version

    @property
    def intervention(self) -> NewIntervention:
        """The row that it leaves."""
        return NewIntervention(self.deed, self.who, self.why, self.head, self.version, experts=self.experts)


def whoever() -> str:
    """The user that this process runs as."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no name in a container
        return str(os.getuid())


def check(home: Home, reader: Reader, request: Request) -> list[str]:
    """What it would do, in lines of words; none where all is as it is asked to be. Raises BadHome where it cannot."""
    match request.deed:
        case Deed.ROLLBACK:
            planned = _rollback(*_version(home, reader, request))
            return planned and [*planned, *_taken_out(reader, request)]
        case Deed.PROMOTE:
            head, version = _version(home, reader, request)
            planned = _promote(head, version, _learned_again(home, head, version))
            if planned and unlearned(home, head, version.number):
                planned.append(
                    f"{called(head.name, version.number)} has no coefficients that were learned, as"
                    f" {called(head.name, head.live)} has: it is the plain sum"
                )
            return planned and [*planned, *_taken_out(reader, request)]
        case Deed.PIN | Deed.UNPIN:
            return _pin(home, *_version(home, reader, request), request.deed is Deed.PIN)
        case Deed.BLOCK | Deed.UNBLOCK:
            return _block(_experts(reader, request), request.deed is Deed.BLOCK)
        case Deed.RETRY | Deed.DISCARD:
            return cases.check(home, _experts(reader, request), request.deed)
        case Deed.EVALUATE:
            return ["kept"]
        case Deed.REDELIVER:
            return _redeliver(reader, request)
        case Deed.PAUSE | Deed.RESUME | Deed.DRAIN:
            return orders.planned(home, request.deed)
        case Deed.WITHDRAW | Deed.COLLECT | Deed.PRUNE | Deed.RELOAD:
            raise AssertionError("not to be planned here")


def carry_out(home: Home, store: Store, request: Request) -> list[str]:
    """Does it, and says what was done in lines of words; none where nothing was to be done. Raises BadHome, and then
    nothing has changed; OSError or RegistryError where the disk fails.
    """
    done = check(home, store, request)
    if not done:
        follow_live(home, store)  # one that was cut short may have come so far
        return done
    match request.deed:
        case Deed.ROLLBACK | Deed.PROMOTE:
            name, number = request.named
            head = store.head(name)
            version = store.version(name, number)
            frozen = head.frozen if head and number < head.newest else None
            if frozen is None and head and version and _learned_again(home, head, version):
                frozen = LEARNED
            if request.deed is Deed.ROLLBACK:
                frozen = f"rolled back to {called(name, number)}"
            store.turn(name, number, request.intervention, frozen)
            hit("turn.after")
            follow_live(home, store)
        case Deed.PIN | Deed.UNPIN:
            store.pin(*request.named, request.deed is Deed.PIN, request.intervention)
        case Deed.BLOCK | Deed.UNBLOCK:
            store.block(tuple(dict.fromkeys(request.experts)), request.deed is Deed.BLOCK, request.intervention)
        case Deed.RETRY | Deed.DISCARD:
            for expert in _experts(store, request):
                cases.close(home, store, expert, replace(request.intervention, experts=(expert.id,)))
        case Deed.EVALUATE:
            _keep(store, request)
        case Deed.REDELIVER:
            store.redeliver(request.deliveries or None)
        case Deed.PAUSE | Deed.RESUME | Deed.DRAIN:
            orders.give(home, request.deed, request.who, request.why)
            store.intervened(request.intervention)
        case Deed.WITHDRAW | Deed.COLLECT | Deed.PRUNE | Deed.RELOAD:
            raise AssertionError("not to be done here")
    return done


def _redeliver(reader: Reader, request: Request) -> list[str]:
    for number in request.deliveries:
        if reader.delivery(number) is None:
            raise BadHome(f"there is no delivery {number}", "`mainstem webhooks list` lists them")
    count = len(set(request.deliveries)) or reader.count_undelivered()[1]
    told = "is" if count == 1 else "are"
    return [f"{count} {told} told again, by the daemon that runs or the next one"] if count else []


def _keep(store: Store, request: Request) -> None:
    """Keeps an evaluation, and notes whose it is. One that says what another said is that one. Or keeps a verdict."""
    if request.verdict is not None:
        store.rejudge(*request.named, request.verdict, request.held)
        return
    new = request.evaluation
    assert new
    known = store.evaluated(new.weights_sha256, new.command_sha256)
    kept = known if known and known.scores == new.scores else store.evaluate(new)
    if request.version is not None:
        store.judge_version(*request.named, kept.id)
    for number in request.experts:
        store.judge_expert(number, kept.id)


def _version(home: Home, reader: Reader, request: Request) -> tuple[Head, Version]:
    head, version = reader.head(request.named[0]), reader.version(*request.named)
    if head is None or version is None:
        raise BadHome(f"there is no version {called(*request.named)}", "`mainstem status` names them")
    if version.collected or not home.manifest(version.head, version.number).exists():
        name = called(version.head, version.number)
        later = f"; `mainstem rollback {name} --withdraw` takes out what came after it"
        hint = f"`mainstem log --versions` lists what is kept{later if reader.lineage(version.number, 1) else ''}"
        raise BadHome(f"the files of {name} were removed by retention", hint)
    if wrong := problems(home, version, hashes=False, extras=False, state=False):
        raise BadHome(f"{called(version.head, version.number)} is damaged: {wrong[0]}", "`mainstem verify` names all")
    return head, version


def _rollback(head: Head, version: Version) -> list[str]:
    name, live = called(head.name, version.number), called(head.name, head.live)
    if version.number == head.live:
        return []
    if version.number > head.live:
        raise BadHome(f"{name} is newer than {live}, which is live", f"`mainstem promote {name}` makes it live")
    return [
        f"{name} is live, {live} is not",
        f"the next expert is folded onto {called(head.name, head.newest)}, the newest; what comes of it is held until"
        f" `mainstem promote` makes it live",
        f"`mainstem rollback {name} --withdraw` takes out for good what came after {name}",
    ]


def _learned_again(home: Home, head: Head, version: Version) -> bool:
    """True for a version with learned coefficients that is to be live again: what follows has none, as before."""
    return version.number != head.live and learned(home, head, version.number)


def _promote(head: Head, version: Version, learned: bool) -> list[str]:
    name, live = called(head.name, version.number), called(head.name, head.live)
    newest = version.number == head.newest
    if version.number == head.live and (head.frozen is None or not newest):
        return []
    if version.number < head.live:
        raise BadHome(f"{name} is older than {live}, which is live", f"`mainstem rollback {name}` goes back to it")
    if newest and learned:
        return [f"{name} is live; what follows it is held until its coefficients are learned, too"]
    if newest:
        return [f"{name} is live, as what follows it will be"]
    still = f"; {called(head.name, head.newest)}, the newest, is still held" if head.frozen else ""
    return [f"{name} is live, {live} is not{still}"]


def _taken_out(reader: Reader, request: Request) -> list[str]:
    """What the version has that somebody took out of the merge since."""
    name, number = request.named
    there = withdrawn_since(reader, [number])[number]
    which = listed([f"{one.id} ({one.name})" for one in there])
    return [f"beware: {called(name, number)} has what was taken out since: {which}"] if there else []


def _pin(home: Home, head: Head, version: Version, pin: bool) -> list[str]:
    if version.pinned == pin:
        return []
    name = called(head.name, version.number)
    if not pin:
        return [f"{name} goes when retention says so"]
    gone = version.number and not home.head_state(head.name, version.number).exists()
    without = "; its state is gone already: to take out what came after it merges the others again"
    return [f"{name} is kept, whatever retention says{without if gone else ''}"]


def _experts(reader: Reader, request: Request) -> list[Expert]:
    found = [reader.expert(number) for number in dict.fromkeys(request.experts)]
    if None in found or not found:
        raise BadHome(f"there is no expert {request.experts[found.index(None)]}", "`mainstem log` lists them")
    return [expert for expert in found if expert]


def _block(experts: list[Expert], block: bool) -> list[str]:
    if merged := [expert for expert in experts if expert.status is Status.MERGED and block]:
        raise BadHome(
            f"expert {merged[0].id} ({merged[0].name}) is merged: it cannot come twice in any case",
            f"`mainstem rebuild --without {merged[0].id}` takes it out, and blocks it",
        )
    if nameless := [expert for expert in experts if expert.sha256 is None and block]:
        raise BadHome(
            f"expert {nameless[0].id} ({nameless[0].name}) was never read: its weights are not known",
            "there is nothing to block",
        )
    changed = [f"{expert.id} ({expert.name})" for expert in experts if expert.blocked != block]
    what = "do not come back" if block else "may come back"
    return [f"{listed(changed)} {what} when the same weights arrive again"] if changed else []
