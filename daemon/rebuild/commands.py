"""What `mainstem rebuild` does: replays the archive into a new home or a new head, and takes experts out again.

The work is done beside what is live: in a new home, or in a home inside of this one that recovery leaves alone until
one transaction takes over its result. Whatever cuts it short, the same command goes on where it was.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median

from daemon.checkpoints.checkpoint import open_path
from daemon.compute.resources import reuse_freed_memory
from daemon.config import Settings
from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.errors import BadHome
from daemon.home.founding import base_files, floating_dtypes, publish_base
from daemon.home.recovery import mark_clean, recover
from daemon.layout import Home
from daemon.rebuild.replay import Console, Heads, archived, check_archive, lock, merged_experts, misfit, replay
from daemon.rebuild.restating import Arrival, Made, Restating, next_number
from daemon.versions.heads import LiveHead, live_heads
from daemon.versions.latest import point_latest
from daemon.versions.manifest import Withdrawal
from daemon.versions.retention import remove_whole
from daemon.versions.sealing import origin
from projector.method import Contribution, Method, Totals
from projector.methods import make
from registry.errors import Busy, RegistryError, StorageFailed
from registry.records import Expert, Head, Status, Version
from registry.store import Reader, Store

SUBTRACTED, REPLAYED = "subtracted", "replayed"
MOST_SUBTRACTED = 100.0  # times the weight of what is left: beyond that its rounding shows in the fifth digit


@dataclass(frozen=True)
class Plan:
    """What a rebuild would do: per head how it comes about, the experts it reads, how often it reads one in all, and
    the usual seconds for one. number: of the version that it has made, once it has.
    """

    how: Mapping[str, str]
    reads: Sequence[Expert]
    readings: int
    usual_seconds: float | None
    number: int | None = None


def methods_of(reader: Reader) -> Heads:
    """The heads of a home by name."""
    return {head.name: make(head.method, head.params) for head in reader.heads()}


def into(
    home: Home,
    target: Home,
    settings: Settings,
    heads: Heads | None,
    without: Sequence[str],
    to: Console,
    *,
    dry: bool = False,
) -> Plan:
    """Replays the archive of `home`, which may be in use, into the home `target`, less the experts `without`.

    heads: of the new home; None takes the same ones. Raises BadHome where an expert is missing, or where `target` is
    there and is no earlier part of the same.
    """
    with Reader.open(home.registry) as reader:
        chosen = methods_of(reader) if heads is None else heads
        gone = {expert.id for expert in merged_experts(reader, without)}
        experts = [expert for expert in reader.lineage() if expert.id not in gone]
        if target.root == home.root:
            raise BadHome(f"{target.root} is the home to be replayed", "give --into another folder")
        check_archive(home, experts, chosen)
        if target.exists() and (why := misfit(target, reader, chosen, experts)):
            raise BadHome(f"{target.root} cannot take this replay: {why}", "choose another folder, or remove it")
        plan = Plan(dict.fromkeys(chosen, REPLAYED), experts, _readings(chosen, experts), _usual_seconds(reader))
        if not dry:
            replay(home, reader, experts, target, chosen, settings, to)
            _refine(target, home, experts, settings, to)
        return plan


def add_head(home: Home, settings: Settings, name: str, method: Method, to: Console, *, dry: bool = False) -> Plan:
    """Adds a head that has folded every merged expert. Raises BadHome where the daemon runs, an expert is missing, or
    there is such a head.
    """
    with _reading(home) if dry else _opened(home) as store:
        if store.head(name):
            raise BadHome(f"there is a head {name!r} already", "choose another name")
        inner = Home(home.rebuilding(name))
        if home.versions(name).exists() and not inner.root.exists():
            raise BadHome(
                f"{home.versions(name)} is there and belongs to no head", "move it away, or choose a new name"
            )
        heads, experts = {name: method}, store.lineage()
        check_archive(home, experts, heads)
        plan = Plan({name: REPLAYED}, experts, _readings(heads, experts), _usual_seconds(store))
        if isinstance(store, Store):
            _replay_inside(home, store, experts, inner, heads, settings, to)
            with Restating(home, store, settings, to.progress()) as restating:
                made = _from_inside(restating, inner, name, home, experts)
                _link_records(home, inner, name, experts)
                plan = replace(plan, number=_adopt(home, store, name, method, made, restating))
            remove_whole(home, inner.root)
        return plan


def withdraw(
    home: Home,
    settings: Settings,
    words: Sequence[str],
    to: Console,
    *,
    always_replay: bool = False,
    dry: bool = False,
) -> Plan:
    """Takes merged experts out of every head: each gets a new version without them. Raises BadHome as `add_head`.

    always_replay: subtract in no head, even where the method allows it.
    """
    with _reading(home) if dry else _opened(home) as store:
        heads = live_heads(store, methods_of(store))
        lineage, gone = store.lineage(), merged_experts(store, words)
        out = {expert.id for expert in gone}
        rest = [expert for expert in lineage if expert.id not in out]
        subtracts = not always_replay and _light(gone, rest) and _archived(home, gone, heads, to)
        how = {live.head.name: SUBTRACTED if live.method.subtractable and subtracts else REPLAYED for live in heads}
        subtracted = [live for live in heads if how[live.head.name] == SUBTRACTED]
        replayed = {live.head.name: live.method for live in heads if how[live.head.name] == REPLAYED}
        if replayed:
            check_archive(home, rest, replayed)
        reads = [*(gone if subtracted else []), *(rest if replayed else [])]
        often = len(subtracted) * len(gone) + (_readings(replayed, rest) if replayed else 0)
        plan = Plan(how, reads, often, _usual_seconds(store))
        if not isinstance(store, Store):
            return plan
        inner = Home(home.withdrawing(next_number(heads)))
        if replayed:
            _replay_inside(home, store, rest, inner, replayed, settings, to)
        with Restating(home, store, settings, to.progress()) as restating:
            made = {}
            for live in heads:
                name = live.head.name
                if how[name] == SUBTRACTED:
                    to.say(f"{name}: subtracting {len(gone)}")
                    new = _subtract(restating, home, live, lineage, gone)
                else:
                    new = _from_inside(restating, inner, name, home, rest)
                made[name] = replace(new, withdrawal=Withdrawal(gone, how[name]))
            number = restating.commit(store, heads, made, gone)
        remove_whole(home, inner.root)
        return replace(plan, number=number)


def _archived(home: Home, gone: Sequence[Expert], heads: Sequence[LiveHead], to: Console) -> bool:
    """True where all that subtracting needs is in the archive; else it says what is not."""
    subtractable = {live.head.name: live.method for live in heads if live.method.subtractable}
    try:
        check_archive(home, gone, subtractable)
    except BadHome as error:
        if subtractable:
            to.say(f"cannot subtract: {error}")
        return False
    return True


def _light(gone: Sequence[Expert], rest: Sequence[Expert]) -> bool:
    """True where float32 keeps enough of what is left once these are subtracted: rounding is a share of the largest."""
    return sum(expert.weight for expert in gone) <= MOST_SUBTRACTED * sum(expert.weight for expert in rest)


def _reading(home: Home) -> Reader:
    """The registry of a home that may be in use."""
    return Reader.open(home.registry)


@contextmanager
def _opened(home: Home) -> Iterator[Store]:
    """The home's registry, to be written; locked and recovered first, as the daemon does it."""
    reuse_freed_memory()
    with ExitStack() as closing:
        closing.callback(os.close, lock(home))
        store = closing.enter_context(Store.open(home.registry))
        recover(home, store, lambda *_, **__: None)
        try:
            yield store
        except BadHome:  # refused: everything is in its place
            mark_clean(home)
            raise
        mark_clean(home)


def _replay_inside(
    home: Home, store: Store, experts: Sequence[Expert], inner: Home, heads: Heads, settings: Settings, to: Console
) -> None:
    if inner.root.exists() and _unfit(inner, store, heads, experts):
        if not inner.inner_mark.exists():
            raise BadHome(f"{inner.root} is in the way, and no rebuild made it", "move it out of the home")
        remove_whole(home, inner.root)
    durable.make_folder(inner.root)
    if not inner.inner_mark.exists():
        durable.replace_file(inner.inner_mark, b"")
    plain = settings.model_copy(update={"heads": {}})  # what is published of it is published anew
    replay(home, store, experts, inner, heads, plain, to)


def _unfit(inner: Home, store: Store, heads: Heads, experts: Sequence[Expert]) -> bool:
    """True where the home was begun for something else, or cannot be read."""
    if not inner.exists():
        return not inner.founding.exists()
    try:
        return misfit(inner, store, heads, experts) is not None
    except (StorageFailed, Busy):
        raise
    except RegistryError:
        return True


def _from_inside(restating: Restating, inner: Home, name: str, home: Home, experts: Sequence[Expert]) -> Made:
    """The version of a head that the inner home has come to; made exact where that takes a second pass."""
    with Reader.open(inner.registry) as reader:
        (live,) = [live for live in live_heads(reader, methods_of(reader)) if live.head.name == name]
    return _exact(restating, inner, live, home, experts) or restating.linked(
        name, inner, live.version.number, live.totals
    )


def _exact(restating: Restating, there: Home, live: LiveHead, archive: Home, experts: Sequence[Expert]) -> Made | None:
    """What a second pass over the experts makes of a head; None where one pass is all there is."""
    second = live.method.second_pass(live.totals.experts) if live.totals.experts else None
    if second is None:
        return None
    arrivals = [_arrival(archive, expert, place) for place, expert in enumerate(experts, start=1)]
    return restating.folded(there, live, second, Totals(), arrivals)


def _refine(target: Home, archive: Home, experts: Sequence[Expert], settings: Settings, to: Console) -> None:
    """One more version of every head, where a second pass makes one of them exact: the others' stay what they are."""
    with _opened(target) as store:
        heads = live_heads(store, methods_of(store))
        if not experts or all(live.method.second_pass(len(experts)) is None for live in heads):
            return
        if heads[0].version.expert_id is None:
            return  # it was made before: the newest version folds no expert
        if store.counts()[Status.MERGED] != len(experts):
            raise BadHome(f"{target.root} has merged more meanwhile", "stop its daemon, and run this again")
        with Restating(target, store, settings, to.progress()) as restating:
            made = {}
            for live in heads:
                name = live.head.name
                to.say(f"{name}: a second pass" if live.method.second_pass(len(experts)) else f"{name}: stays")
                made[name] = _exact(restating, target, live, archive, experts) or restating.linked(
                    name, target, live.version.number, live.totals
                )
            restating.commit(store, heads, made)


def _subtract(
    restating: Restating, home: Home, live: LiveHead, lineage: Sequence[Expert], gone: Sequence[Expert]
) -> Made:
    places = {expert.id: place for place, expert in enumerate(lineage, start=1)}
    arrivals = [_arrival(home, expert, places[expert.id], sign=-1.0) for expert in gone]
    return restating.folded(home, live, live.method, live.totals, arrivals)


def _arrival(archive: Home, expert: Expert, index: int, sign: float = 1.0) -> Arrival:
    return archived(archive, expert), Contribution(index, weight=sign * expert.weight), expert


def _adopt(home: Home, store: Store, name: str, method: Method, made: Made, restating: Restating) -> int:
    """Gives the home a further head: version 0, and the version that the other heads stand at, whose number it says."""
    newest = max(head.newest for head in store.heads())
    head = Head(name, method.name, method.params(), live=0, newest=0)
    with open_path(home.base) as base:
        dtypes = floating_dtypes(base)
    versions = [publish_base(home, head, store.base(), base_files(home), dtypes)]
    hit("publish.before")
    if newest:
        live = LiveHead(head, Version(**asdict(versions[0])), method, Totals())
        versions.append(restating.place(live, newest, made, origin(store)))
    adopted = replace(head, live=newest, newest=newest)
    hit("publish.after")
    hit("commit.before")
    store.adopt(adopted, versions)
    hit("commit.after")
    point_latest(home, adopted)
    return newest


def _link_records(home: Home, inner: Home, name: str, experts: Sequence[Expert]) -> None:
    """What the head keeps of each expert, if anything: by the version that folded it, here and there."""
    if not inner.views(name).exists():
        return
    durable.make_folder(home.views(name))
    for place, expert in enumerate(experts, start=1):
        assert expert.version
        durable.link_or_copy(inner.view_record(name, place), home.view_record(name, expert.version))
    durable.sync_folder(home.views(name))
    durable.sync_folder(home.states(name))


def _readings(replayed: Heads, experts: Sequence[Expert]) -> int:
    """How often a replay reads an expert: all heads read each once together, a second pass reads them for its head."""
    second = [method for method in replayed.values() if experts and method.second_pass(len(experts))]
    return len(experts) * (1 + len(second))


def _usual_seconds(reader: Reader) -> float | None:
    """What a merge took lately; None where there was none."""
    seconds = [v.seconds for v in reader.versions(reader.heads()[0].name, limit=5) if v.seconds is not None]
    return median(seconds) if seconds else None
