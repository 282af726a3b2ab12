"""Does a table read from YAML hold what it may? Kinds of values as data; what does not fit is refused in one sentence.

    KINDS = {"tokens": whole(1), "order": TEXT}
    check(table, KINDS, "stage 'one'", needed=["tokens"])
"""

import math
import reprlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a value may be: `words` tells a person, `fits` decides."""

    words: str
    fits: Callable[[Any], bool]


TEXT = Kind("a text", lambda value: isinstance(value, str) and bool(value.strip()))
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
NOTHING = Kind("null", lambda value: value is None)
TABLE = Kind("a table", lambda value: isinstance(value, Mapping))


def whole(least: int) -> Kind:
    return Kind(
        f"a whole number from {least}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
    )


def number(least: float = -math.inf, most: float = math.inf) -> Kind:
    """Within the two, both included, and never infinite or NaN."""
    words = "a number" + f" from {least:g}" * (least > -math.inf) + f" to {most:g}" * (most < math.inf)
    return Kind(words, lambda value: is_number(value) and least <= value <= most)


def is_number(value: object) -> bool:
    # YAML's `yes` and `true` are numbers to Python; a comparison, unlike isfinite, takes an integer of any size.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def list_of(kind: Kind, example: str) -> Kind:
    """At least one of them."""
    return Kind(
        f"a list such as {example}", lambda value: isinstance(value, list) and value and all(map(kind.fits, value))
    )


def table_of(kind: Kind, example: str) -> Kind:
    """Names with a value of one kind each; the table may be empty."""
    return Kind(
        f"a table such as {example}",
        lambda value: isinstance(value, dict) and all(TEXT.fits(k) and kind.fits(v) for k, v in value.items()),
    )


def either(*kinds: Kind) -> Kind:
    words = " or ".join(kind.words for kind in kinds)
    return Kind(words, lambda value: any(kind.fits(value) for kind in kinds))


def check(table: object, kinds: Mapping[str, Kind], where: str, needed: Collection[str] = ()) -> None:
    """ValueError for what is no table, lacks a name of `needed`, has one that `kinds` lacks, or a value of another kind."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{_begun(where)} is {reprlib.repr(table)}, no table; give {', '.join(kinds)} as needed.")
    if unknown := [name for name in table if name not in kinds]:
        raise ValueError(f"{unknown[0]!r} in {where} is no setting; use {', '.join(kinds)}.")
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"{_begun(where)} has no {missing[0]}; give {kinds[missing[0]].words}.")
    for name, value in table.items():
        if not kinds[name].fits(value):
            raise ValueError(f"{name} of {where} is {reprlib.repr(value)}; give {kinds[name].words}.")


def _begun(words: str) -> str:
    return words[0].upper() + words[1:]
