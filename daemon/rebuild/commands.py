"""What `mainstem rebuild` does: replays the archive into a new home or a new head, and takes experts out again.

The work is done beside what is live: in a new home, or in a home inside of this one that recovery leaves alone until
one transaction takes over its result. Whatever cuts it short, the same command goes on where it was.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from shlex import quote
from statistics import median
from uuid import uuid4

from daemon.arrivals.recording import left_behind
from daemon.checkpoints.checkpoint import open_path
from daemon.compute.resources import reuse_freed_memory
from daemon.config import Settings
from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.errors import BadHome, DaemonError
from daemon.evaluation.rules import unjudged
from daemon.home.founding import base_files, check_place, floating_dtypes, new_head, publish_base
from daemon.home.presence import lock
from daemon.home.recovery import mark_clean, recover
from daemon.home.standing import held
from daemon.layout import Home
from daemon.manifest import Withdrawal
from daemon.merge.gate import judges, not_judging
from daemon.notation import called
from daemon.rebuild.learning import Learning, check_learnable, learned
from daemon.rebuild.refining import arrival, arrivals, from_inside, refine, tip_inside, to_learn
from daemon.rebuild.replay import (
    Console,
    Heads,
    check_archive,
    merged_experts,
    methods_of,
    misfit,
    replay,
)
from daemon.rebuild.restating import Restating, judging, next_number
from daemon.versions.checking import problems
from daemon.versions.heads import HeadTip, head_tips, relative_heads, totals_of
from daemon.versions.latest import point_latest
from daemon.versions.retention import numbered, remove_whole
from daemon.versions.sealing import origin
from daemon.versions.writing import Written
from projector.method import Method, Totals
from registry import records
from registry.errors import Busy, RegistryError, StorageFailed
from registry.reader import Reader
from registry.records import Deed, Expert, Head, NewIntervention, RelativeTo, Version
from registry.store import Store

RESTORED, SUBTRACTED, REPLAYED, LEARNED = "restored", "subtracted", "replayed", "learned"
KEEPING_OUT = NewIntervention(Deed.BLOCK, "mainstem rebuild")
MOST_SUBTRACTED = 100.0  # times the weight of what is left: beyond that its rounding shows in the fifth digit


@dataclass(frozen=True)
class Plan:
    """What a rebuild would do: per head how it comes about, the experts it reads, how often it reads one in all, and
    the usual seconds for one. number: of the version that it has made, once it has. unjudged: the heads whose versions
    the gate judges, and not this one. notes: what else there is to know, in lines of words.
    """

    how: Mapping[str, str]
    reads: Sequence[Expert]
    readings: int
    usual_seconds: float | None
    number: int | None = None
    unjudged: Sequence[str] = ()
    notes: Sequence[str] = ()


def into(
    home: Home,
    target: Home,
    settings: Settings,
    heads: Heads | None,
    without: Sequence[str],
    to: Console,
    *,
    relative: Collection[str] = (),
    dry: bool = False,
    deed: NewIntervention = KEEPING_OUT,
    how: Learning | None = None,
) -> Plan:
    """Replays the archive of `home`, which may be in use, into the home `target`, less the experts `without`, which do
    not come back there, nor does what is blocked in `home`.

    heads: of the new home, and which of them are `relative` to what an expert was trained from; None takes the same
    ones. deed: by whom and why. how: coefficients are learned for the first of them. Raises BadHome where an expert is
    missing, or where `target` is there and is no earlier part of the same.
    """
    with Reader.open(home.registry) as reader:
        chosen = methods_of(reader) if heads is None else heads
        relative = relative_heads(reader) if heads is None else relative
        gone = {expert.id for expert in merged_experts(reader, without)}
        experts, first = [expert for expert in reader.lineage() if expert.id not in gone], next(iter(chosen))
        if how:
            check_learnable(first, chosen[first], how, len(experts), relative=first in relative)
        if target.root == home.root:
            raise BadHome(f"{target.root} is the home to be replayed", "give --into another folder")
        check_place(target)
        check_archive(home, reader, experts, chosen, relative)
        if target.exists() and (why := misfit(target, reader, chosen, relative, experts)):
            raise BadHome(f"{target.root} cannot take this replay: {why}", "choose another folder, or remove it")
        plan = Plan(
            dict.fromkeys(chosen, REPLAYED),
            experts,
            _readings(chosen, experts),
            _usual_seconds(reader),
            notes=[
                f"{line} here; in {target.root} nothing is rolled back or held: the newest version is live"
                for line in _not_live(home, reader)
            ],
        )
        if dry and how:
            left = to_learn(target, reader, first, chosen[first], how, experts)
            plan = replace(plan, notes=[*plan.notes, left])
        if not dry:
            replay(home, reader, experts, target, chosen, settings, to, relative=relative)
            with _opened(target) as store:
                refine(target, store, home, reader, experts, settings, to, (first, how) if how else None)
                _keep_out(store, [*reader.kept_out(), *(one for one in reader.lineage() if one.id in gone)], deed)
                plan = replace(plan, notes=[*plan.notes, *_never_judged(store, settings, target)])
        return plan


def add_head(
    home: Home,
    settings: Settings,
    name: str,
    method: Method,
    to: Console,
    *,
    relative: bool = False,
    dry: bool = False,
    how: Learning | None = None,
) -> Plan:
    """Adds a head that has folded every merged expert; where it is `relative`, what was trained since the version that
    each names. how: its coefficients are learned. Raises BadHome where the daemon runs, an expert is missing, or there
    is such a head, and Refused where the gate rejects it.
    """
    inner, new = Home(home.rebuilding(name)), new_head(name, method, relative=relative)
    begun = inner.root.exists()  # by one that was cut short; recovery takes it away where that had committed
    with _reading(home) if dry else _opened(home) as store:
        there = store.head(name)
        same = there and (there.method, there.params, there.relative_to) == (new.method, new.params, new.relative_to)
        if there and (how or not begun or not same):
            raise BadHome(f"there is a head {name!r} already", "choose another name")
        if not there and home.versions(name).exists() and not inner.root.exists():
            raise BadHome(
                f"{home.versions(name)} is there and belongs to no head", "move it away, or choose a new name"
            )
        heads, experts, relatives = {name: method}, store.lineage(), {name} if relative else set()
        if how:
            check_learnable(name, method, how, len(experts), relative=relative)
        check_archive(home, store, experts, heads, relatives)
        apart = not_judging(settings.evaluate, name)
        plan = Plan({name: REPLAYED}, experts, _readings(heads, experts), _usual_seconds(store), notes=apart)
        if dry and how:
            plan = replace(plan, notes=[*apart, to_learn(home, store, name, method, how, experts)])
        if there:
            return replace(plan, number=there.newest, notes=[*apart, *_to_promote(home, store, name)])
        if isinstance(store, Store):
            _replay_inside(home, store, experts, inner, heads, settings, to, relatives)
            with Restating(home, store, settings, to.progress()) as restating:
                if how:
                    tip = tip_inside(inner, name)
                    of = arrivals(home, store, tip, experts)
                    written = learned(restating, home, inner, tip, of, how, settings, to)
                else:
                    written = from_inside(restating, inner, name, home, store, experts)
                _link_records(home, inner, name, experts)
                number = _adopt(home, store, new, method, written, restating)
            remove_whole(home, inner.root)
            durable.remove(home.learning(name))
            plan = replace(plan, number=number, notes=[*apart, *_to_promote(home, store, name)])
        return plan


def learn_again(home: Home, settings: Settings, name: str, to: Console, how: Learning, *, dry: bool = False) -> Plan:
    """Learns the coefficients of a head that is there, of every merged expert: one version more of every head, with the
    others' weights as they are. Raises BadHome and Refused as `add_head`, and BadConfig where it has no coefficients.
    """
    with _reading(home) if dry else _opened(home) as store:
        (tip,) = [tip for tip in head_tips(store, methods_of(store)) if tip.head.name == name]
        experts, relative = store.lineage(), tip.head.relative_to is RelativeTo.TRAINED_FROM
        check_learnable(name, tip.method, how, len(experts), relative=relative)
        check_archive(home, store, experts, {name: tip.method})
        number, apart = None, not_judging(settings.evaluate, name)
        if isinstance(store, Store):
            number = refine(home, store, home, store, experts, settings, to, (name, how))
            apart += _to_promote(home, store, name)
        else:
            apart += [*_not_live(home, store, name), to_learn(home, store, name, tip.method, how, experts)]
        return Plan({name: LEARNED}, experts, len(experts), _usual_seconds(store), number, notes=apart)


def withdraw(
    home: Home, settings: Settings, gone: Sequence[Expert], to: Console, deed: NewIntervention, *, replay: bool = False
) -> Plan:
    """Takes merged experts out of every head: each gets a new version without them, which is live. Raises BadHome as
    `add_head`. The rest as in `withdraw_from`.
    """
    with _opened(home) as store:
        return withdraw_from(home, store, settings, gone, to, deed, replay=replay)


def plan_withdrawal(home: Home, reader: Reader, gone: Sequence[Expert], to: Console, *, replay: bool = False) -> Plan:
    """What taking these merged experts out would do. Raises BadHome where it cannot be done."""
    return _Withdrawal(home, reader, gone, to, replay).plan


def withdraw_from(
    home: Home,
    store: Store,
    settings: Settings,
    gone: Sequence[Expert],
    to: Console,
    deed: NewIntervention,
    *,
    replay: bool = False,
) -> Plan:
    """Takes these merged experts out of every head of a home that the caller holds and that is sound.

    replay: merge the others again in every head, also where what is wanted is kept, or can be subtracted.
    """
    planned = _Withdrawal(home, store, gone, to, replay)
    heads, rest = planned.heads, planned.rest
    inner = Home(home.withdrawing(next_number(heads)))
    if planned.replayed:
        relative = relative_heads(store) & planned.replayed.keys()
        _replay_inside(home, store, rest, inner, planned.replayed, settings, to, relative)
    with Restating(home, store, settings, to.progress()) as restating:
        written = {}
        for tip in heads:
            name, how = tip.head.name, planned.plan.how[tip.head.name]
            if kept := planned.kept.get(name):
                to.say(f"{name}: as {called(name, kept.number)} was")
                new = restating.linked(name, home, kept.number, totals_of(kept))
            elif how == SUBTRACTED:
                to.say(f"{name}: subtracting {len(gone)}")
                new = _subtract(restating, home, store, tip, planned.lineage, gone)
            else:
                new = from_inside(restating, inner, name, home, store, rest)
            written[name] = replace(new, withdrawal=Withdrawal(gone, how))
        number = restating.commit(store, heads, written, gone, deed)
    remove_whole(home, inner.root)
    unjudged = [head for head in planned.plan.how if judges(settings.evaluate, head)]
    return replace(planned.plan, number=number, unjudged=unjudged, notes=_still_live(home, store, planned.plan.how))


def described(plan: Plan) -> list[str]:
    """What was done to each head, in words."""
    number = plan.number or 0
    done = [f"{called(head, number)}: {how}" for head, how in plan.how.items()]
    done += [f"{called(head, number)} was not judged: `{judging(head, number)}`" for head in plan.unjudged]
    return [*done, *plan.notes]


class _Withdrawal:
    """How experts are taken out of each head: by a version that is kept and has all the others and no more, by
    subtracting them, or by merging the others again. The first is exact, and reads no expert.
    """

    def __init__(self, home: Home, reader: Reader, gone: Sequence[Expert], to: Console, replay: bool) -> None:
        self.heads = head_tips(reader, methods_of(reader))
        self.lineage = reader.lineage()
        out = {expert.id for expert in gone}
        self.rest = [expert for expert in self.lineage if expert.id not in out]
        self.kept = {} if replay else self._find_kept(home, reader, gone)
        others = [tip for tip in self.heads if tip.head.name not in self.kept]
        light = bool(others) and not replay and _light(gone, self.rest)
        subtracts = light and _archived(home, reader, gone, others, to)
        subtracted = [tip.head.name for tip in others if tip.method.subtractable and subtracts]
        self.replayed = {tip.head.name: tip.method for tip in others if tip.head.name not in subtracted}
        if self.replayed:
            check_archive(home, reader, self.rest, self.replayed, relative_heads(reader))
        reads = [*(gone if subtracted else []), *(self.rest if self.replayed else [])]
        often = len(subtracted) * len(gone) + (_readings(self.replayed, self.rest) if self.replayed else 0)
        how = {**dict.fromkeys(self.kept, RESTORED), **dict.fromkeys(subtracted, SUBTRACTED)}
        ways = {tip.head.name: how.get(tip.head.name, REPLAYED) for tip in self.heads}
        self.plan = Plan(ways, reads, often, _usual_seconds(reader))

    def _find_kept(self, home: Home, reader: Reader, gone: Sequence[Expert]) -> dict[str, Version]:
        """By head, the newest version that has just the others, where its files and its state are kept and sound."""
        first = min((expert.version or 0 for expert in gone), default=0)
        least = max((expert.version or 0 for expert in self.rest), default=0)
        rest, has = [expert.id for expert in self.rest], cache(lambda n: [one.id for one in reader.experts_in(n)])
        found = {}
        for tip in self.heads:
            name = tip.head.name
            there = sorted((n for n in {0, *numbered(home.states(name))} if least <= n < first), reverse=True)
            these = (reader.version(name, n) for n in there if has(n) == rest)
            # what is held without an expert of its own is held for its weights, not for whom it has
            version = next((one for one in these if one and not (one.held and one.expert_id is None)), None)
            if version and not version.collected and not problems(home, version, hashes=True, extras=False):
                found[name] = version
        return found


def _archived(home: Home, reader: Reader, gone: Sequence[Expert], heads: Sequence[HeadTip], to: Console) -> bool:
    """True where all that subtracting needs is in the archive; else it says what is not."""
    subtractable = {tip.head.name: tip.method for tip in heads if tip.method.subtractable}
    try:
        check_archive(home, reader, gone, subtractable, relative_heads(reader))
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
        except DaemonError:  # refused: everything is in its place
            mark_clean(home)
            raise
        mark_clean(home)


def _replay_inside(
    home: Home,
    store: Store,
    experts: Sequence[Expert],
    inner: Home,
    heads: Heads,
    settings: Settings,
    to: Console,
    relative: Collection[str],
) -> None:
    if inner.root.exists() and _unfit(inner, store, heads, relative, experts):
        if not inner.inner_mark.exists():
            raise BadHome(f"{inner.root} is in the way, and no rebuild made it", "move it out of the home")
        remove_whole(home, inner.root)
    if not inner.root.exists():
        new = Home(home.tmp / uuid4().hex)
        durable.make_folder(new.root)
        durable.write_file(new.inner_mark, b"")
        durable.sync_folder(new.root)
        durable.rename(new.root, inner.root)  # never there without its mark
    plain = settings.model_copy(update={"heads": {}})  # what is published of it is published anew
    replay(home, store, experts, inner, heads, plain, to, relative=relative)


def _unfit(inner: Home, store: Store, heads: Heads, relative: Collection[str], experts: Sequence[Expert]) -> bool:
    """True where the home was begun for something else, or cannot be read."""
    if not inner.exists():
        return not inner.founding.exists()
    try:
        return misfit(inner, store, heads, relative, experts) is not None
    except (StorageFailed, Busy):
        raise
    except RegistryError:
        return True


def _keep_out(store: Store, experts: Sequence[Expert], deed: NewIntervention) -> None:
    """What a pipeline sends again is refused in a new home as it was in the old one."""
    store.keep_out([left_behind(expert) for expert in experts if expert.sha256], deed)


def _never_judged(store: Store, settings: Settings, home: Home) -> list[str]:
    """Notes of the newest versions of a new home that the gate, which judges these heads, was not asked; says it."""
    said = []
    for head in store.heads():
        version = store.version(head.name, head.newest)
        if judges(settings.evaluate, head.name) and version and head.newest and version.verdict is None:
            asked = judging(head.name, head.newest)
            why = f"it was merged again in a new home; `{asked}` scores and judges it"
            store.rejudge(head.name, head.newest, unjudged(why), None)
            said.append(f"{called(head.name, head.newest)} was not judged: `{asked} --home {quote(str(home.root))}`")
    return said


def _still_live(home: Home, reader: Reader, names: Collection[str]) -> list[str]:
    """What of these heads is live that was made before the newest version, in lines of words."""
    return [
        f"{note}: {called(head.name, head.live)} still is" for head, note in _held(home, reader) if head.name in names
    ]


def _not_live(home: Home, reader: Reader, *names: str) -> list[str]:
    """The newest versions of these heads, or of all, that are not live, and why, in lines of words."""
    return [note for head, note in _held(home, reader) if not names or head.name in names]


def _to_promote(home: Home, reader: Reader, name: str) -> list[str]:
    """As `_not_live`, of one head, and what makes it live."""
    there = [(called(head.name, head.newest), note) for head, note in _held(home, reader) if head.name == name]
    return [f"{note}; `mainstem promote {newest}` makes it live" for newest, note in there]


def _held(home: Home, reader: Reader) -> list[tuple[Head, str]]:
    """The heads whose newest version is not live, and why, in words."""
    heads = [(head, held(home, reader, head)) for head in reader.heads()]
    return [(head, f"{called(head.name, one.version)} is not live ({one.why})") for head, one in heads if one]


def _subtract(
    restating: Restating,
    home: Home,
    reader: Reader,
    tip: HeadTip,
    lineage: Sequence[Expert],
    gone: Sequence[Expert],
) -> Written:
    places = {expert.id: place for place, expert in enumerate(lineage, start=1)}
    minus = [arrival(home, reader, tip, expert, places[expert.id], sign=-1.0) for expert in gone]
    return restating.folded(home, tip, tip.method, tip.totals, minus)


def _adopt(home: Home, store: Store, head: Head, method: Method, written: Written, restating: Restating) -> int:
    """Gives the home a further head: version 0, and the version that the other heads stand at, whose number it says.

    That has every merged expert. The gate judges it. Where one of the others is not live there, because of an expert,
    it is held, too: the head begins with the base.
    """
    others = store.heads()
    newest = max(one.newest for one in others)
    held_back = [one for one in others if one.frozen != records.LEARNED and _holds_an_expert(store, one)]
    waiting = next((called(one.name, one.newest) for one in held_back), None)
    why = f"it was made while {waiting} was not live" if waiting else None
    frozen = why if any(one.frozen for one in held_back) else None
    with open_path(home.base) as base:
        dtypes = floating_dtypes(base)
    versions = [publish_base(home, head, store.base(), base_files(home), dtypes)]
    if newest:
        tip = HeadTip(head, Version(**asdict(versions[0])), method, Totals())
        try:
            (made,) = restating.place(store, [tip], newest, {head.name: written}, origin(store), [head.name])
        except DaemonError:
            for begun in (home.versions(head.name), home.states(head.name)):
                remove_whole(home, begun)
            raise
        why = why or made.held
        versions.append(replace(made, held=why))
    frozen = records.LEARNED if written.adamerging and not why else frozen
    adopted = replace(head, live=0 if why else newest, newest=newest, frozen=frozen)
    hit("commit.before")
    store.adopt(adopted, versions)
    hit("commit.after")
    point_latest(home, adopted)
    return newest


def _holds_an_expert(reader: Reader, head: Head) -> bool:
    """True where a merged expert came with a version of the head that is not live. One that a rebuild made and that is
    held for its weights is no reason to hold another head.
    """
    later = reader.versions(head.name, head.newest - head.live)
    came = {version.expert_id for version in later if version.number > head.live}
    return any(expert.id in came for expert in reader.lineage(head.live))


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
