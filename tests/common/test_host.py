"""Many small tensors travel as one, bit for bit."""

from typing import NamedTuple

import torch

from bio_inspired_nanochat.common import to_host


class Pair(NamedTuple):
    one: torch.Tensor
    other: dict


def _tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    held = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [leaf for branch in held for leaf in _tensors(branch)]


def test_every_tensor_comes_back_as_it_was():
    big = 2**53 + 1  # no float64 holds it
    tree = {
        "flags": torch.tensor([True, False, True]),
        "ids": [torch.tensor([[big, -1]]), torch.tensor(7)],
        "pair": Pair(torch.tensor(0.1), {"half": torch.tensor([0.1, float("nan")], dtype=torch.bfloat16), "name": "x", "none": None}),
        "wide": (torch.tensor([0.1, float("inf")], dtype=torch.float64), torch.empty(0, 3)),
        "turned": torch.arange(6.0).view(2, 3).T,
    }
    found = to_host(tree)
    for made, own in zip(_tensors(found), _tensors(tree), strict=True):
        torch.testing.assert_close(made, own, rtol=0, atol=0, equal_nan=True)
    assert isinstance(found["pair"], Pair) and found["pair"].other["half"].dtype == torch.bfloat16
    assert found["ids"][0].tolist() == [[big, -1]] and found["pair"].other["name"] == "x"


def test_the_copies_are_no_views():
    values = torch.zeros(3, requires_grad=True)
    (found,) = to_host([values])
    with torch.no_grad():
        values += 1
    assert found.tolist() == [0, 0, 0] and not found.requires_grad


def test_a_tree_without_tensors_is_left_alone():
    assert to_host([{}, [], "text"]) == [{}, [], "text"]
