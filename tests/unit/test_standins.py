"""What stands for slow modules behaves as they do."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable
from typing import Any

import pytest

import nix_build_remote as hook


class Theirs(typing.NamedTuple):
    first: int
    second: str = "two"
    third: tuple[int, ...] = ()


BASE: Any = vars(hook)["NamedTuple"]  # to mypy it is typing's
FIELDS = {"second": "two", "third": (), "__annotations__": Theirs.__annotations__}
Ours = type("Ours", (BASE,), FIELDS)

BOTH = pytest.mark.parametrize("kind", [Theirs, Ours], ids=["typing's", "ours"])


@BOTH
@pytest.mark.parametrize(
    "make, result",
    [
        (lambda kind: kind(1), (1, "two", ())),
        (lambda kind: kind(1, "x"), (1, "x", ())),
        (lambda kind: kind(third=(3,), first=1), (1, "two", (3,))),
        (lambda kind: kind(1)._replace(second="y"), (1, "y", ())),
        (lambda kind: tuple(kind(1)._asdict().items())[1], ("second", "two")),
        (lambda kind: kind._fields, ("first", "second", "third")),
        (lambda kind: kind._field_defaults, {"second": "two", "third": ()}),
        (lambda kind: [kind(2), kind(1)][1].first, 1),
        (lambda kind: sorted([kind(2), kind(1)]), [(1, "two", ()), (2, "two", ())]),
        (lambda kind: {kind(1): "x"}[kind(1)], "x"),
    ],
)
def test_a_named_tuple_is_made_and_used(
    kind: Any, make: Callable[[Any], object], result: object
) -> None:
    assert make(kind) == result


@BOTH
@pytest.mark.parametrize(
    "make",
    [
        lambda kind: kind(),
        lambda kind: kind(1, "x", (), 4),
        lambda kind: kind(1, first=2),
        lambda kind: kind(1, fourth=2),
        lambda kind: kind(second="x"),
        lambda kind: kind(1)._replace(fourth=2),
    ],
    ids=["none", "too many", "twice", "unknown", "one missing", "replaced unknown"],
)
def test_a_named_tuple_refuses_wrong_fields(
    kind: Any, make: Callable[[Any], object]
) -> None:
    with pytest.raises((TypeError, ValueError)):  # _replace: TypeError from 3.13 on
        make(kind)


@BOTH
def test_a_named_tuple_does_not_change(kind: Any) -> None:
    with pytest.raises(AttributeError):
        kind(1).first = 2


@pytest.mark.parametrize("kind", [contextlib.suppress, hook.suppress])
def test_only_these_errors_are_suppressed(kind: Any) -> None:
    with kind(KeyError, OSError):
        raise FileNotFoundError
    with pytest.raises(ValueError, match="other"), kind(KeyError, OSError):
        raise ValueError("other")
