"""Does each kind take what it says and nothing else, and is what it does not take told in one sentence?"""

import datetime

import pytest

from trainers.tables import NOTHING, SWITCH, TEXT, check, either, list_of, number, table_of, whole

NAN, INFINITE = float("nan"), float("inf")
KINDS = {
    "text": (TEXT, ["a"], ["", " ", 1, None, ["a"]]),
    "switch": (SWITCH, [True, False], [0, 1, "true", None]),
    "whole": (whole(1), [1, 10**30], [0, -1, 1.0, True, "1", NAN]),
    "number": (number(0, 1), [0, 1, 0.5], [-0.1, 1.1, True, "0.5", NAN, INFINITE, datetime.date(2020, 1, 1)]),
    "any number": (number(), [-3, 2.5], [NAN, INFINITE, -INFINITE, False, 10**400]),
    "list": (list_of(TEXT, "[a]"), [["a"], ["a", "b"]], [[], "a", ["a", 1], {"a": 1}]),
    "table": (table_of(whole(0), "{a: 1}"), [{}, {"a": 1}], [{1: 1}, {"a": "1"}, ["a"], None]),
    "either": (either(TEXT, NOTHING), ["a", None], [1, []]),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_takes_what_it_says(name):
    kind, good, bad = KINDS[name]
    for value in good:
        check({"x": value}, {"x": kind}, "the table")
    for value in bad:
        with pytest.raises(ValueError, match="^x of the table is .*; give ") as caught:
            check({"x": value}, {"x": kind}, "the table")
        assert str(caught.value).endswith(f"; give {kind.words}.") and "\n" not in str(caught.value)


def test_names_and_tables_are_checked_too():
    kinds = {"a": TEXT, "b": whole(0)}
    for given, said in [
        (["a"], r"The table is \['a'\], no table; give a, b as needed\."),
        ({"c": 1}, "'c' in the table is no setting; use a, b."),
        ({1: "a"}, "1 in the table is no setting; use a, b."),
        ({"b": 1}, "The table has no a; give a text."),
    ]:
        with pytest.raises(ValueError, match=f"^{said}$"):
            check(given, kinds, "the table", needed=["a"])
