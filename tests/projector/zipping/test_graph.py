"""A graph as a person writes it: what is read of it, what is refused, where a model can be cut."""

import json
from typing import Any

import pytest
import torch

from projector.errors import BadParameter, BadSchema, ProjectorError
from projector.spec import Schema, TensorSpec
from projector.zipping.applying import shared_names, zip_tensor
from projector.zipping.graph import Graph, parse_graph
from projector.zipping.pairing import Pairing


def residual() -> dict[str, Any]:
    """Two blocks that add to a stream."""
    hidden = [
        {
            "name": f"hidden{n}",
            "features": {"input_of": f"down{n}"},
            "made": {f"up{n}": 0},
            "read": {f"down{n}": 1},
        }
        for n in (1, 2)
    ]
    stream = {
        "name": "stream",
        "features": [{"output_of": "norm"}, {"input_of": "leave", "axis": -1}],
        "made": {"enter": 0, "down1": 0, "down2": 0, "norm": 0},
        "read": {"up1": 1, "up2": 1, "leave": {"axis": 1, "each": 2}},
    }
    return {"nodes": [stream, *hidden]}


def schema(**shapes: tuple[int, ...]) -> Schema:
    found = {"enter": (4, 3), "norm": (4,), "leave": (2, 8)}
    found |= {f"up{n}": (6, 4) for n in (1, 2)} | {f"down{n}": (4, 6) for n in (1, 2)} | shapes
    return {name: TensorSpec(name, shape, torch.float32) for name, shape in found.items()}


def test_it_is_read_as_it_is_written() -> None:
    graph = parse_graph(residual())
    assert graph.sizes(schema()) == {"stream": 4, "hidden1": 6, "hidden2": 6}
    assert parse_graph(json.loads(json.dumps(graph.described()))) == graph


def test_a_model_is_cut_where_nothing_shared_is_made_of_what_is_not() -> None:
    graph = parse_graph(residual())
    assert graph.upto("hidden2") == graph and graph.upto(None) == graph
    with pytest.raises(BadParameter, match="down1 makes stream of hidden1, which comes later") as caught:
        graph.upto("stream")
    assert caught.value.hint == "stop at hidden2, or zip it whole"
    with pytest.raises(BadParameter, match="no node third"):
        graph.upto("third")
    names = shared_names(graph, list(schema()), whole=False)
    assert set(schema()) - set(names) == {"leave"}, "the head"


BROKEN: list[tuple[str, type[ProjectorError], str]] = [
    ("del graph['nodes'][0]['made']", BadParameter, "node 0 has no made"),
    ("graph['node'] = 1", BadParameter, "unknown node"),
    ("graph['nodes'] = []", BadParameter, "has no node"),
    ("graph['nodes'][1]['name'] = 'stream'", BadParameter, "several nodes are called stream"),
    ("graph['nodes'][1]['features'] = {'axis': 1}", BadParameter, "input_of or the output_of"),
    ("graph['nodes'][1]['made'] = {}", BadParameter, "nothing makes or reads"),
    ("graph['nodes'][1]['made'] = {'up1': '0'}", BadParameter, "is no int"),
    ("graph['nodes'][1]['read'] = {'down1': {'axis': 1, 'each': 0}}", BadParameter, "each = 0"),
    ("graph['nodes'][1]['made'] = {'up9': 0}", BadSchema, "no tensor up9"),
    ("graph['nodes'][1]['averaged'] = ['up9']", BadSchema, "no tensor up9"),
    ("graph['nodes'][1]['made'] = {'up1': 2}", BadSchema, "up1 has no axis 2"),
    ("graph['nodes'][2]['made'] = {'up1': 0}", BadSchema, "axis 0 of up1 is of two"),
    ("graph['nodes'][2]['made'] = {'norm': 0}", BadSchema, "axis 0 of norm is of two"),
    ("graph['nodes'][1]['read'] = {'leave': 0}", BadSchema, "hidden1 is not of one size"),
    ("graph['nodes'][0]['read']['leave']['each'] = 3", BadSchema, "8, not a multiple of 3"),
    ("graph['nodes'][1]['made'] = {'up1': 0, 'norm': 0}", BadSchema, "axis 0 of norm is of two"),
    ("graph['nodes'][1]['made'] = {'up1': 0, 'leave': 0}", BadSchema, "not of one size"),
]


@pytest.mark.parametrize(("break_it", "error", "message"), BROKEN, ids=[message for _, _, message in BROKEN])
def test_what_is_wrong_with_a_graph_is_said(break_it: str, error: type[ProjectorError], message: str) -> None:
    graph = residual()
    exec(break_it, {"graph": graph})
    with pytest.raises(error, match=message) as caught:
        parse_graph(graph).sizes(schema())
    assert caught.value.hint


def test_what_makes_two_nodes_is_refused() -> None:
    value = residual()
    value["nodes"][1]["made"]["leave"] = 0
    value["nodes"][2]["made"]["leave"] = 1
    value["nodes"][0]["read"].pop("leave")
    with pytest.raises(BadSchema, match="leave makes two nodes"):
        parse_graph(value).sizes(schema(leave=(6, 6)))


def test_entries_side_by_side_move_together() -> None:
    """As a Flatten behind convolutions has them: of each channel all places."""
    swapped = Pairing(torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.float64))
    weight = torch.arange(6.0)[None]  # (1, 2 channels x 3 places)
    moved = zip_tensor([swapped.unmerge(weight, 1, 0, each=3)], None, {}, [1.0])
    assert moved.tolist() == [[3, 4, 5, 0, 1, 2]]


def test_an_empty_graph_shares_nothing() -> None:
    assert shared_names(Graph([]), ["a"], whole=False) == []
