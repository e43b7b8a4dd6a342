import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from jaxtune.config.coerce import Group, Mismatch, coerce, expected, freeze, thaw
from jaxtune.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "kind", "result"),
    [
        (8.0, int, 8), (8, float, 8.0), (True, bool, True), (None, int | None, None), ("a", tuple[str, ...], ("a",)),
        (["a", "b"], str | tuple[str, ...], ("a", "b")), ("a", str | tuple[str, ...], "a"), (32, int | float, 32), (0.5, int | float, 0.5),
        ({"q": 8}, tuple[tuple[str, int], ...], (("q", 8),)), ((("q", 8),), tuple[tuple[str, int], ...], (("q", 8),)),
        (False, Literal["no", "steps"], "no"), ({"a": [1, {"b": 2}]}, Any, (("a", (1, (("b", 2),))),)),
        ({"e": [1, 2]}, tuple[tuple[str, tuple[int, ...]], ...] | tuple[int, ...], (("e", (1, 2)),)),
        ([1, 2], tuple[tuple[str, tuple[int, ...]], ...] | tuple[int, ...], (1, 2)),
        (Path("a/b"), str, "a/b"), ([Path("a")], tuple[str, ...], ("a",)), (np.float64(1e-3), float, 1e-3), (np.int32(8), int, 8),
        (np.bool_(True), bool, True), ({"end": np.float32(0.5)}, Any, (("end", 0.5),)),
    ],
)  # fmt: skip
def test_values_become_their_kind(value, kind, result):
    got = coerce(value, kind)
    assert got == result and type(got) is type(result)
    hash(got)


@pytest.mark.parametrize(
    ("value", "kind"),
    [("8", int), (8.5, int), (True, int), (True, float), (1, bool), (1, str), (None, str), (None, tuple[str, ...]), ("x", Literal["a"]),
     (1, Literal[True]), ({"q": "x"}, tuple[tuple[str, int], ...]), ([1], tuple[tuple[str, int], ...]), ("q", tuple[tuple[str, int], ...])],
)  # fmt: skip
def test_nothing_is_guessed(value, kind):
    with pytest.raises(Mismatch):
        coerce(value, kind)


def test_thaw_is_the_way_back():
    table = tuple[tuple[str, int], ...]
    assert thaw(coerce({"q": 8}, table), table) == {"q": 8}
    assert thaw((), table) == {} and thaw((), tuple[int, ...]) == []
    either = tuple[tuple[str, tuple[int, ...]], ...] | tuple[int, ...] | None
    assert thaw(coerce({"e": [1]}, either), either) == {"e": [1]}
    assert thaw(coerce([1], either), either) == [1]
    assert freeze([1, [2]]) == (1, (2,))


def test_kinds_in_words():
    assert expected(int | None) == "a whole number or null"
    assert expected(bool | Literal["group"]) == "true, false or group"
    assert expected(tuple[str, ...]) == "a list, each a string"


@dataclasses.dataclass(frozen=True)
class Toy(Group):
    group = "toy"
    names: tuple[str, ...] = ()


def test_a_group_checks_itself_in_python_too():
    assert Toy(names=["a"]) == Toy(names=("a",)) and Toy(names=["a"]).to_dict() == {"names": ["a"]}
    with pytest.raises(ConfigError, match="^toy.names is 3, but has to be a list, each a string.$"):
        Toy(names=3)
