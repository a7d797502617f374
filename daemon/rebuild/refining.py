"""What a rebuild makes of a head beyond one pass over the archive: a second pass, coefficients that are learned, or the
version that a home inside of this one has come to.
"""

from collections.abc import Sequence

from daemon.config import Settings
from daemon.disk import durable
from daemon.errors import BadHome
from daemon.layout import Home
from daemon.manifest import Manifest
from daemon.rebuild.learning import Learning, is_learned, learned, planned
from daemon.rebuild.replay import Console, archived, methods_of, started
from daemon.rebuild.restating import Arrival, Restating
from daemon.versions.heads import HeadTip, head_tips
from daemon.versions.writing import Written
from projector.method import Contribution, Method, Totals
from registry.reader import Reader
from registry.records import Expert, RelativeTo, Status
from registry.store import Store


def from_inside(
    restating: Restating, inner: Home, name: str, home: Home, reader: Reader, experts: Sequence[Expert]
) -> Written:
    """The version of a head that the inner home has come to; made exact where that takes a second pass."""
    tip = tip_inside(inner, name)
    return _exact(restating, inner, tip, home, reader, experts) or restating.linked(
        name, inner, tip.version.number, tip.totals
    )


def tip_inside(inner: Home, name: str) -> HeadTip:
    with Reader.open(inner.registry) as inside:
        (tip,) = [tip for tip in head_tips(inside, methods_of(inside)) if tip.head.name == name]
    return tip


def _exact(
    restating: Restating, there: Home, tip: HeadTip, archive: Home, reader: Reader, experts: Sequence[Expert]
) -> Written | None:
    """What a second pass over the experts makes of a head; None where one pass is all there is."""
    second = tip.method.second_pass(tip.totals.experts) if tip.totals.experts else None
    if second is None:
        return None
    return restating.folded(there, tip, second, Totals(), arrivals(archive, reader, tip, experts))


def refine(
    target: Home,
    store: Store,
    archive: Home,
    reader: Reader,
    experts: Sequence[Expert],
    settings: Settings,
    to: Console,
    learns: tuple[str, Learning] | None = None,
) -> int | None:
    """One more version of every head, where a second pass makes one of them exact, or coefficients of the one that
    `learns` names are learned: the others' stay what they are. Its number; None where it was made before."""
    heads = head_tips(store, methods_of(store))
    exact = [
        tip.head.name
        for tip in heads
        if experts and target != archive and tip.version.expert_id and tip.method.second_pass(len(experts))
    ]  # of a newest version that folds no expert it was made before
    learnt = _unlearned(target, heads, experts, learns) if learns else None
    if learns and not learnt:
        durable.remove(target.learning(learns[0]))  # of a run that was killed once it had committed
    if not exact and not learnt:
        return None
    if store.counts()[Status.MERGED] != len(experts):
        raise BadHome(f"{target.root} has merged more meanwhile", "stop its daemon, and run this again")
    with Restating(target, store, settings, to.progress()) as restating:
        written, waiting = {}, []
        for tip in heads:
            name = tip.head.name
            made = None
            if learns and name == learnt:
                made_of = arrivals(archive, reader, tip, experts)
                made = learned(restating, target, target, tip, made_of, learns[1], settings, to)
            elif name in exact:
                to.say(f"{name}: a second pass")
                made = _exact(restating, target, tip, archive, reader, experts)
            else:
                to.say(f"{name}: stays")
                if tip.head.live < tip.head.newest:
                    waiting.append(name)
            written[name] = made or restating.linked(name, target, tip.version.number, tip.totals)
        weighed = [learnt] if learnt and target == archive else []  # of a new home nothing is held
        number = restating.commit(store, heads, written, waiting=waiting, weighed=weighed)
    if learnt:
        durable.remove(target.learning(learnt))
    return number


def _unlearned(
    target: Home, heads: Sequence[HeadTip], experts: Sequence[Expert], learns: tuple[str, Learning]
) -> str | None:
    """The head whose coefficients are to be learned; None where they were, in that way."""
    name, how = learns
    (tip,) = [tip for tip in heads if tip.head.name == name]
    manifest = Manifest.read(target.manifest(name, tip.version.number).read_bytes())
    return None if is_learned(manifest, experts, tip.method, how) else name


def to_learn(target: Home, reader: Reader, name: str, method: Method, how: Learning, experts: Sequence[Expert]) -> str:
    """What is left to learn of that head, in `target` or, where it is not there yet, once it is, in words."""
    if target.exists():
        with Reader.open(target.registry) as there:
            tips = [tip for tip in head_tips(there, methods_of(there)) if tip.head.name == name]
            if tips and _unlearned(target, tips, experts, (name, how)) is None:
                return f"the coefficients of {name} are learned in this way already"
    return planned(target, name, method, how, experts, reader.base())


def arrivals(archive: Home, reader: Reader, tip: HeadTip, experts: Sequence[Expert]) -> list[Arrival]:
    return [arrival(archive, reader, tip, expert, place) for place, expert in enumerate(experts, start=1)]


def arrival(archive: Home, reader: Reader, tip: HeadTip, expert: Expert, index: int, sign: float = 1.0) -> Arrival:
    relative = [tip.head.name] if tip.head.relative_to is RelativeTo.TRAINED_FROM else []
    start = started(archive, reader, expert, relative)
    return Arrival(archived(archive, expert), Contribution(index, weight=sign * expert.weight), expert, start)
