"""Knobs: one record per field gives bounds, validation and the way to and from plain JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bio_inspired_nanochat.config import GPTConfig, Knob, SynapticConfig, from_dict, knob, knobs_of, to_dict, validate
from bio_inspired_nanochat.config.knobs import check_path, check_value, kinds_of
from bio_inspired_nanochat.errors import UserError


@dataclass(frozen=True)
class Shape:
    width: int = knob(8, "width", lo=1, hi=1 << 20)
    share: float | None = knob(None, "share", lo=0.0, hi=1.0)
    on: bool = knob(False, "switch")
    mode: str = knob("a", "mode", choices=("a", "bee"))
    sizes: tuple[int, ...] = knob((1, 2), "sizes", lo=1, hi=9)
    folder: Path | None = knob(None, "folder")

    def __post_init__(self) -> None:
        validate(self, "shape.")


@dataclass(frozen=True)
class Box:
    shape: Shape = knob(Shape, "the shape")

    def __post_init__(self) -> None:
        validate(self)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 0}, "shape.width=0 is out of bounds [1, 1048576]"),
        ({"width": 2**20 + 1}, "out of bounds"),
        ({"width": 1.5}, "not a whole number"),
        ({"width": True}, "not a number"),
        ({"width": None}, "not a number"),
        ({"width": "8"}, "not a number: [1, 1048576]"),
        ({"width": 10**5000}, "beyond 64 bits"),
        ({"share": 1.01}, "out of bounds [0, 1]"),
        ({"share": float("nan")}, "not finite"),
        ({"share": "half"}, "not a number"),
        ({"on": 2}, "switch: 0 or 1"),
        ({"mode": "be"}, "did you mean 'bee'?"),
        ({"mode": None}, "one of a, bee"),
        ({"sizes": (1, 10)}, "out of bounds [1, 9]"),
        ({"sizes": 3}, "not a tuple"),
        ({"folder": 3}, "not text"),
    ],
)
def test_wrong_values_name_the_field_and_its_bounds(values: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        Shape(**values)
    message = str(caught.value)
    assert words in message and message.startswith("shape." + next(iter(values))) and "\n" not in message


def test_right_values_pass_at_both_bounds() -> None:
    for values in (
        {"width": 1},
        {"width": 1 << 20},
        {"share": 0},
        {"share": np.float64(1.0)},
        {"on": True},
        {"sizes": ()},
        {"share": None},
    ):
        Shape(**values)


def test_a_nested_config_must_be_of_its_class() -> None:
    with pytest.raises(UserError, match="is not a Shape"):
        Box(shape={"width": 3})


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(n_layer=3, syn_cfg=SynapticConfig(tau_rrp=100.0)),
        Box(Shape(width=3, share=0.5, sizes=(7,), folder=Path("runs"))),
        Box(Shape(share=None)),
    ],
)
def test_to_dict_survives_json_and_comes_back_equal(config: object) -> None:
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_from_dict_takes_defaults_and_refuses_unknown_names() -> None:
    assert from_dict(Box, {"shape": {"width": 3}}) == Box(Shape(width=3))
    with pytest.raises(UserError, match=r"unknown field shape\.wdth in Shape \(did you mean 'width'\?\)"):
        from_dict(Box, {"shape": {"wdth": 3}})
    with pytest.raises(UserError, match="not a set of named values"):
        from_dict(Box, [1])
    with pytest.raises(UserError, match="is not a Shape"):
        from_dict(Box, {"shape": 3})


def test_bounds_are_written_for_people() -> None:
    assert Knob("", lo=1, hi=1 << 20).bounds() == "[1, 1048576]"
    assert Knob("", lo=1e-6).bounds() == "[1e-06, inf]"
    assert Knob("", choices=("a", "b")).bounds() == "one of a, b"
    assert Knob("", path="dir").bounds() == "an existing folder"
    assert Knob("").bounds() == "any"


def test_every_field_of_the_model_configs_has_a_knob_and_a_meaning() -> None:
    for cls in (GPTConfig, SynapticConfig):
        assert sorted(knobs_of(cls)) == sorted(f.name for f in dataclasses.fields(cls))
        assert all(len(record.doc) > 10 for record in knobs_of(cls).values())
        assert kinds_of(cls)  # asserts that every annotation is a type which a knob can have


def test_paths_are_checked_for_their_kind(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    for path, value in (("exists", tmp_path), ("dir", tmp_path), ("file", tmp_path / "corpus.txt"), (None, tmp_path / "new")):
        check_path("data", value, Knob("", path=path))
    with pytest.raises(UserError, match="is not a file"):
        check_path("data", tmp_path, Knob("", path="file"))
    with pytest.raises(UserError, match=r"does not exist: give an existing file \(did you mean 'corpus.txt'\?\)"):
        check_path("data", tmp_path / "corps.txt", Knob("", path="file"))
    with pytest.raises(UserError, match="does not exist"):
        check_path("data", "a\0b/c", Knob("", path="dir"))


def test_check_value_keeps_messages_short() -> None:
    with pytest.raises(UserError) as caught:
        check_value("mode", "x" * 10000, Knob("", choices=("a",)))
    assert len(str(caught.value)) < 120
