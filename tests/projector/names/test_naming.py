"""How an expert's names become the base's."""

import re

import pytest

from projector.errors import BadSchema, Reason
from projector.names.naming import SAME, Naming, check_prefixes, fitting_prefix, mending

BASE = {"bert.embed.weight", "bert.layer.0.weight", "bert.layer.1.weight", "head.weight"}


def test_without_settings_names_are_what_they_are() -> None:
    names = ["bert.embed.weight", "something.else"]
    assert SAME.resolve(names, BASE) == {name: name for name in names}


@pytest.mark.parametrize(
    ("prefixes", "name", "wanted"),
    [
        ({"module.": ""}, "module.bert.embed.weight", "bert.embed.weight"),
        ({"": "bert."}, "embed.weight", "bert.embed.weight"),
        ({"encoder.": "bert."}, "encoder.layer.0.weight", "bert.layer.0.weight"),
        ({"": "bert.", "model.": "bert."}, "model.embed.weight", "bert.embed.weight"),
        ({"model.": "", "": "bert."}, "embed.weight", "bert.embed.weight"),
        ({"a.": "nowhere.", "a.b.": "no.", "": "bert."}, "layer.0.weight", "bert.layer.0.weight"),
        ({"a.": "bert.", "a.b.": "nowhere."}, "a.layer.1.weight", "bert.layer.1.weight"),
        ({"x": "bert.layer"}, "x.0.weight", "bert.layer.0.weight"),
        ({"bert.layer.0.": "bert.layer.1."}, "bert.layer.0.weight", "bert.layer.0.weight"),  # a name of the base
        ({"module.": ""}, "module.module.head.weight", "module.module.head.weight"),  # once
        ({"module.": "", "": "bert."}, "module.embed.weight", "module.embed.weight"),  # one of them
        ({"": "bert."}, "classifier.weight", "classifier.weight"),  # never to what the base has not
        ({"m.layers.*.": "bert.layer.*."}, "m.layers.1.weight", "bert.layer.1.weight"),
        ({"*.layers.*": "bert.layer.*.*"}, "0.layers.weight", "bert.layer.0.weight"),  # in the order of the expert's
        ({"*": "bert.layer.*"}, "0.weight", "bert.layer.0.weight"),
        ({"m.*.weight": "bert.*.weight"}, "m.layer.0.weight", "m.layer.0.weight"),  # one part, no more
        ({"layers.*.": "bert.layer.*."}, "layers..weight", "layers..weight"),  # and no less
        ({"m.layers.*.": "bert.layer.*."}, "mxlayers.1.weight", "mxlayers.1.weight"),  # a dot is a dot
        ({"m.layer.*.": "no.*.", "*.layer.": "bert.*."}, "layer.layer.0.weight", "bert.layer.0.weight"),
        ({"m.layer.*.": "no.*.", "m.*.": "bert.*."}, "m.layer.0.weight", "bert.layer.0.weight"),
    ],
)
def test_the_first_prefix_that_leads_to_a_name_of_the_base(prefixes: dict[str, str], name: str, wanted: str) -> None:
    assert Naming(prefixes).resolve([name], BASE) == {name: wanted}


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ({"layer*.": "layer."}, '"layer*.": a * stands for one whole part'),
        ({"layer.": "**."}, '"**.": a * stands for one whole part'),
        ({"a.*.": "b."}, '"a.*." and "b." must have as many'),
        ({"a.": "b.", "": "*"}, '"" and "*" must have as many'),
    ],
)
def test_a_star_is_one_part_on_both_sides(prefixes: dict[str, str], message: str) -> None:
    check_prefixes({"a.*.b.*": "*.*", "": "m."})
    with pytest.raises(ValueError, match=re.escape(message)):
        check_prefixes(prefixes)


def test_of_two_prefixes_that_would_do_the_longer_counts() -> None:
    base = {"w", "b.w"}
    assert Naming({"a.": "", "a.b.": ""}).resolve(["a.b.w"], base) == {"a.b.w": "w"}
    assert Naming({"a.b.": "", "a.": ""}).resolve(["a.b.w"], base) == {"a.b.w": "w"}


@pytest.mark.parametrize(
    ("prefixes", "name", "wanted"),
    [
        ({}, "bert.head.weight", "bert.head.weight"),
        ({"": "bert."}, "bert.head.weight", "head.weight"),
        ({"module.": ""}, "head.weight", "module.head.weight"),
        ({"a.": "", "b.": "bert.", "c.*.": "bert.layer.*."}, "bert.layer.1.weight", "c.1.weight"),
        ({"a.*.x.*.": "b.*.*."}, "b.1.2.weight", "a.1.x.2.weight"),
        ({"l.*.q_proj": "l.*.query"}, "l.0.query.weight", "l.0.q_proj.weight"),
        ({"l.*.q_proj": "l.*.query"}, "l.0.query_global.weight", "l.0.query_global.weight"),  # whole parts
    ],
)
def test_what_experts_call_a_tensor_of_the_base(prefixes: dict[str, str], name: str, wanted: str) -> None:
    assert Naming(prefixes).theirs(name) == wanted
    assert Naming(prefixes).resolve([wanted], [name]) == {wanted: name}


def test_of_two_of_one_length_that_with_fewer_stars_counts() -> None:
    base = {"layer.0.w", "first.w"}
    pairs = [("layers.*.q", "layer.*"), ("layers.0.q", "first")]
    for ordered in (pairs, pairs[::-1]):
        assert Naming(dict(ordered)).resolve(["layers.0.q.w"], base) == {"layers.0.q.w": "first.w"}


def test_a_star_in_an_older_lineage_renames_nothing() -> None:
    """A * meant itself there, and no name has one."""
    naming = Naming({"m.*": "", "m.": "", "*.": "a.*.*."})
    assert naming.resolve(["m.head.weight"], BASE) == {"m.head.weight": "head.weight"}
    assert naming.theirs("head.weight") == "m.head.weight"


def test_ignored_names_are_left_out_unless_the_base_has_them() -> None:
    naming = Naming({"m.": "bert."}, ["*weight", "cls.?"])
    assert naming.resolve(["bert.embed.weight", "m.layer.0.weight", "cls.a", "cls.ab"], BASE) == {
        "bert.embed.weight": "bert.embed.weight",
        "cls.ab": "cls.ab",
    }


@pytest.mark.parametrize("names", [["head.weight", "m.head.weight"], ["m.head.weight", "head.weight"]])
def test_two_names_that_become_one_are_refused_by_name(names: list[str]) -> None:
    with pytest.raises(BadSchema, match=r"head\.weight and \S*head\.weight are both head\.weight") as refused:
        Naming({"m.": ""}).resolve(names, BASE)
    assert refused.value.reason is Reason.UNEXPECTED_TENSOR
    assert Naming({"m.": ""}, ["m.head.*"]).resolve(names, BASE) == {"head.weight": "head.weight"}


@pytest.mark.parametrize(
    ("missing", "unexpected", "line"),
    [
        (["a.w", "b.w"], ["m.b.w", "m.a.w"], 'prefixes = {"m." = ""}'),
        (["m.a.w", "m.b.w"], ["b.w", "a.w", "head"], 'prefixes = {"" = "m."} and ignore = ["head"]'),
        (["one.a.w", "one.b.w"], ["two.three.a.w", "two.three.b.w"], 'prefixes = {"two.three." = "one."}'),
        (["a.0.w", "a.1.w"], ["m.a.0.w", "m.a.1.w"], 'prefixes = {"m." = ""}'),
        (["a.0.w", "a.1.w"], ["m.a.0.w", "m.a.1.w", "m.h.w"], 'prefixes = {"m." = ""} and ignore = ["m.h.*"]'),
        (["a.0.w", "a.1.w"], ["x.a.0.w", "m.a.0.w", "m.a.1.w"], 'prefixes = {"m." = ""} and ignore = ["x.*"]'),
        ([], ["m.h.w", "cls.b.w", "cls.b.bias", "cls.c"], 'ignore = ["cls.*", "m.h.*"]'),
        (["a.w", "b.w"], ["m.a.w"], None),  # the rest is not there
        (["a.w", "b.w"], ["m.a.w", "n.b.w"], None),  # two prefixes
        (["a.w"], ["ma.w"], None),  # a part of a name is no prefix
        (["head.weight"], ["score.weight"], None),  # what they share, all modules share
        (["a.w"], ["q" * 300 + ".a.w"], None),
        ([], [], None),
    ],
)
def test_the_setting_that_mends_it(missing: list[str], unexpected: list[str], line: str | None) -> None:
    assert mending(missing, unexpected, ["m.known.w"]) == line


THERE = {
    "m.layers.0.q.weight": (4, 6),
    "m.layers.1.q.weight": (4, 6),
    "sight.layers.0.q.weight": (3, 3),
    "out.proj.weight": (2, 2),
}


@pytest.mark.parametrize(
    ("unknown", "pair"),
    [
        ({"layers.0.q.weight": (4, 6), "layers.1.q.weight": (4, 6)}, ("", "m.")),
        ({"layers.0.q.weight": (6, 4)}, ("", "m.")),  # as Conv1D has it
        ({"layers.0.q.weight": (3, 3)}, ("", "sight.")),
        ({"layers.0.q.weight": ()}, ("", "m.")),
        ({"x.y.layers.0.q.weight": (4, 6), "score.weight": (2, 4)}, ("x.y.", "m.")),
        ({"layers.0.q.weight": (4, 6), "score.weight": (2, 4)}, ("", "m.")),  # a head of its own
        ({"base.m.layers.0.q.weight": (4, 6)}, ("base.", "")),
        ({"layers.0.q.weight": (4, 6), "layers.2.q.weight": (4, 6)}, None),  # of as many layers no longer
        ({"layers.0.q.weight": (5, 5)}, None),
        ({"m.layers.2.q.weight": (4, 6)}, None),  # not another layer
        ({"layers.0.query.weight": (4, 6)}, None),
        ({"head.proj.weight": (2, 2)}, None),  # another module that also has a "proj"
        ({"tail.head.out.proj.weight": (2, 2)}, ("tail.head.", "")),
        ({"weight": ()}, None),
    ],
)
def test_the_prefix_that_fits(unknown: dict[str, tuple[int, ...]], pair: tuple[str, str] | None) -> None:
    assert fitting_prefix(next(iter(unknown)), unknown, THERE) == pair


def test_a_glob_of_many_stars_is_no_trap() -> None:
    """Python's fnmatch never goes back over a part between two stars; were it to, this would not end."""
    assert Naming(ignore=["*a" * 40 + "*b"]).resolve(["a" * 12_000], []) == {"a" * 12_000: "a" * 12_000}
