"""The checker of histories accepts what is right and finds what is wrong: the kill tests rely on it."""

from __future__ import annotations

import itertools
import random
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfaas.testing.linearizability import ABSENT, Operation, check


def put(value: int, start: int, end: int) -> Operation:
    return Operation("put", start, end, value)


def get(value: int, start: int, end: int) -> Operation:
    return Operation("get", start, end, value)


def delete(existed: bool, start: int, end: int) -> Operation:
    return Operation("delete", start, end, existed=existed)


def lost_put(value: int, start: int, end: int | None) -> Operation:
    return Operation("put", start, end, value, certain=False)


def lost_delete(start: int, end: int | None) -> Operation:
    return Operation("delete", start, end, certain=False)


GOOD = {
    "nothing": [],
    "one after the other": [get(ABSENT, 1, 2), put(5, 3, 4), get(5, 5, 6), delete(True, 7, 8), get(ABSENT, 9, 10)],
    "a read beside a put sees the old or the new": [put(5, 1, 2), put(6, 3, 9), get(5, 4, 5), get(6, 6, 7)],
    "two puts at once end in either order": [put(5, 1, 9), put(6, 2, 8), get(6, 10, 11)],
    "two puts at once, the other way": [put(5, 1, 9), put(6, 2, 8), get(5, 10, 11)],
    "a put may overtake a put that began before": [put(5, 1, 20), put(6, 2, 3), get(6, 4, 5), get(5, 6, 7)],
    "two deletes of one value": [put(5, 1, 2), delete(True, 3, 9), delete(False, 4, 8)],
    "a delete of what is put meanwhile": [put(5, 1, 9), delete(True, 2, 3), get(ABSENT, 4, 5)],
    "a lost put that is seen": [put(5, 1, 2), lost_put(6, 3, 4), get(6, 5, 6)],
    "a lost put that never was": [put(5, 1, 2), lost_put(6, 3, 4), get(5, 5, 6)],
    "a lost put that is seen late, without bound": [put(5, 1, 2), lost_put(6, 3, None), get(5, 5, 6), get(6, 7, 8)],
    "a lost put between others": [lost_put(6, 1, None), put(5, 2, 3), get(6, 4, 5), put(7, 6, 7), get(7, 8, 9)],
    "a lost put that only a delete can tell": [lost_put(6, 1, 3), delete(True, 4, 5)],
    "a lost delete that is seen": [put(5, 1, 2), lost_delete(3, 4), get(ABSENT, 5, 6)],
    "a lost delete that never was": [put(5, 1, 2), lost_delete(3, 4), delete(True, 5, 6)],
    "a lost get": [Operation("get", 1, None, 77, certain=False), put(5, 2, 3), get(5, 4, 5)],
}

BAD = {
    "a stale read": [put(5, 1, 2), put(6, 3, 4), get(5, 5, 6)],
    "a read that goes back": [put(5, 1, 2), put(6, 3, 20), get(6, 4, 5), get(5, 6, 7)],
    "a lost update": [put(5, 1, 2), put(6, 3, 4), get(6, 5, 6), get(5, 7, 8)],
    "an acknowledged value that is gone": [put(5, 1, 2), get(ABSENT, 3, 4)],
    "a value that nobody put": [put(5, 1, 2), get(7, 3, 4)],
    "a value before it is put": [get(5, 1, 2), put(5, 3, 4)],
    "a deleted value that is back": [put(5, 1, 2), delete(True, 3, 4), get(5, 5, 6)],
    "a delete of nothing": [delete(True, 1, 2)],
    "a delete that did not see": [put(5, 1, 2), delete(False, 3, 4)],
    "two deletes of one value": [put(5, 1, 2), delete(True, 3, 9), delete(True, 4, 8)],
    "a put that takes effect twice": [put(5, 1, 20), put(6, 2, 3), get(5, 4, 5), get(6, 6, 7), get(5, 8, 9)],
    "a lost put that comes and goes": [put(5, 1, 2), lost_put(6, 3, None), get(6, 4, 5), get(5, 6, 7)],
    "a lost put after its bound": [put(5, 1, 2), lost_put(6, 3, 4), get(5, 5, 6), get(6, 7, 8)],
    "a lost delete after its bound": [put(5, 1, 2), lost_delete(3, 4), get(5, 5, 6), get(ABSENT, 7, 8)],
    "readers that disagree": [
        put(5, 1, 20), put(6, 2, 21), get(5, 3, 4), get(6, 5, 6), get(6, 22, 23), get(5, 24, 25),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_right_history_is_accepted(name: str) -> None:
    for order in (GOOD[name], GOOD[name][::-1]):
        assert check(order) is None


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_history_is_found(name: str) -> None:
    for order in (BAD[name], BAD[name][::-1]):
        assert check(order) is not None


def test_a_violation_names_the_operation() -> None:
    wrong, beside = get(5, 5, 6), put(8, 5, 9)
    violation = check([put(5, 1, 2), put(6, 3, 4), wrong, beside])
    assert violation is not None
    assert violation.operation == wrong
    assert violation.possible == {6}
    assert violation.meanwhile == (beside,)


def test_the_first_value_may_be_given() -> None:
    assert check([get(5, 1, 2)], initial=5) is None
    assert check([get(5, 1, 2)], initial=6) is not None


def results_in_order(order: tuple[Operation, ...]) -> bool:
    """Whether the operations, one after the other, have these results."""
    value = ABSENT
    for one in order:
        if one.kind == "get" and one.value != value:
            return False
        if one.kind == "delete" and one.certain and one.existed != (value != ABSENT):
            return False
        value = one.value if one.kind == "put" else value if one.kind == "get" else ABSENT
    return True


def in_time(order: tuple[Operation, ...]) -> bool:
    return all(
        later.end is None or later.end >= earlier.start for earlier, later in itertools.combinations(order, 2)
    )  # fmt: skip


def check_all_orders(operations: list[Operation]) -> bool:
    """The definition itself, in exponential time."""
    uncertain = [one for one in operations if not one.certain and one.kind != "get"]
    certain = [one for one in operations if one.certain]
    return any(
        in_time(order) and results_in_order(order)
        for count in range(len(uncertain) + 1)
        for happened in itertools.combinations(uncertain, count)
        for order in itertools.permutations([*certain, *happened])
    )


KINDS: tuple[Literal["put", "get", "delete"], ...] = ("put", "get", "delete")


@st.composite
def small_histories(draw: st.DrawFn) -> list[Operation]:
    operations = []
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, 12))
        certain = draw(st.integers(0, 3)) > 0
        end = start + draw(st.integers(0, 6)) if certain or draw(st.booleans()) else None
        kind = draw(st.sampled_from(KINDS))
        value = draw(st.integers(1, 3)) if kind == "put" else draw(st.integers(0, 3)) if kind == "get" else ABSENT
        operations.append(Operation(kind, start, end, value, draw(st.booleans()), certain))
    return operations


@settings(deadline=None, max_examples=300)
@given(operations=small_histories())
def test_it_says_what_the_definition_says(operations: list[Operation]) -> None:
    assert (check(operations) is None) == check_all_orders(operations)


def run_register(choose: random.Random, count: int) -> list[Operation]:
    """Operations that took effect one after the other, at points within their bounds."""
    value, next_value, operations = ABSENT, 1, []
    for moment in range(0, 10 * count, 10):
        start, end = moment - choose.randrange(40), moment + choose.randrange(40)
        draw = choose.random()
        if draw < 0.1:
            if choose.random() < 0.5:  # it was lost before it took effect
                operations.append(lost_put(-2 - next_value, start, end))
                continue
            value, next_value = next_value, next_value + 1
            operations.append(lost_put(value, start, end))
        elif draw < 0.4:
            value, next_value = next_value, next_value + 1
            operations.append(put(value, start, end))
        elif draw < 0.5:
            operations.append(delete(value != ABSENT, start, end))
            value = ABSENT
        else:
            operations.append(get(value, start, end))
    return operations


@pytest.mark.parametrize("seed", range(10))
def test_long_histories_are_accepted_until_one_result_is_changed(seed: int) -> None:
    choose = random.Random(seed)
    operations = run_register(choose, 2000)
    assert check(operations) is None
    # A value that was replaced long before.
    reads = [number for number, one in enumerate(operations) if one.kind == "get" and number > 1000]
    stale = next(one for one in operations[:500] if one.kind == "put" and one.certain)
    changed = choose.choice(reads)
    operations[changed] = Operation("get", operations[changed].start, operations[changed].end, stale.value)
    violation = check(operations)
    assert violation is not None
    assert violation.operation == operations[changed]
