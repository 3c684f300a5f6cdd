"""Cells and transactions: all or nothing, whoever dies when."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from memfaas.client.store import Store
from memfaas.errors import StoreFull
from memfaas.fs.cells import Cell, Cells, Change


class Killed(BaseException):
    """Stands for the process that is no more."""


class Mortal:
    """A store, as one process sees it, which is killed before its step number `steps`."""

    def __init__(self, store: Store, steps: int) -> None:
        self._store = store
        self._left = steps

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if self._left == 0:
            raise Killed
        self._left -= 1
        found: Callable[..., Any] = getattr(self._store, name)
        return found


def put(cells: Cells, **values: bytes) -> None:
    for key, value in values.items():
        assert cells.swap(cells.load(key.encode()), value)


def test_a_change_is_refused_when_somebody_was_faster(store: Store) -> None:
    one, two = Cells(store), Cells(store)
    put(one, a=b"1")
    seen = two.load(b"a")
    put(one, a=b"2")
    assert not two.swap(seen, b"3")
    assert one.read(b"a") == b"2"
    assert not two.swap(seen, None)
    assert two.swap(two.load(b"a"), None)
    assert one.read(b"a") is None


def test_a_transaction_changes_all_or_none(store: Store) -> None:
    cells = Cells(store)
    put(cells, a=b"1", b=b"1")
    a, b, c = (cells.load(key) for key in (b"a", b"b", b"c"))
    assert cells.commit([Change(a, b"2"), Change(b, None), Change(c, b"2")])
    assert [cells.read(key) for key in (b"a", b"b", b"c")] == [b"2", None, b"2"]
    assert not cells.commit([Change(cells.load(b"a"), b"3"), Change(b, b"3"), Change(cells.load(b"c"), b"3")])
    assert [cells.read(key) for key in (b"a", b"b", b"c")] == [b"2", None, b"2"]
    assert sorted(store.keys()) == [b"a", b"c"]


def steps_of(store: Store) -> int:
    """How many steps the transaction below takes, if nobody dies."""
    mortal = Mortal(store, 10_000)
    transact(Cells(mortal))
    return 10_000 - mortal._left


def transact(cells: Cells) -> None:
    a, b, c = (cells.load(key) for key in (b"a", b"b", b"c"))
    assert cells.commit([Change(a, b"new"), Change(b, None), Change(c, b"new")])


OLD, NEW = [b"old", b"old", None], [b"new", None, b"new"]


def test_whoever_is_killed_in_a_transaction_leaves_it_done_or_not_done(store: Store) -> None:
    put(Cells(store), a=b"old", b=b"old")
    steps = steps_of(store)
    outcomes = []
    for killed_at in range(3, steps):
        store.clear()
        put(Cells(store), a=b"old", b=b"old")
        with pytest.raises(Killed):
            transact(Cells(Mortal(store, killed_at)))
        other = Cells(store)
        read = [other.read(key) for key in (b"a", b"b", b"c")]
        assert read in (OLD, NEW), f"killed at step {killed_at}"
        loaded = [other.load(key) for key in (b"a", b"b", b"c")]
        assert [cell.value for cell in loaded] == read, "what was read is what is there to be changed"
        assert all(other.swap(cell, b"next") for cell in loaded)
        assert [other.read(key) for key in (b"a", b"b", b"c")] == [b"next"] * 3
        outcomes.append(read == NEW)
    assert outcomes == sorted(outcomes), "once it is done, it is done"
    assert set(outcomes) == {False, True}


def test_who_is_late_finds_that_he_was_aborted(store: Store) -> None:
    """A mount that was stopped in the middle of a transaction for long."""
    cells, other = Cells(store), Cells(store)
    put(cells, a=b"old", b=b"old")

    class Slow:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if name == "_save_if" and args[2] == b"C":
                    assert other.swap(other.load(b"a"), b"other")  # waits a little, and aborts
                return getattr(store, name)(*args)

            return call

    late = Cells(Slow())
    assert not late.commit([Change(late.load(b"a"), b"late"), Change(late.load(b"b"), b"late")])
    assert [cells.read(b"a"), cells.read(b"b")] == [b"other", b"old"]
    assert sorted(store.keys()) == [b"a", b"b"]


def test_a_full_store_refuses_a_transaction_and_keeps_what_was_there(store: Store) -> None:
    cells = Cells(store)
    put(cells, a=b"old", b=b"old")
    changes = [Change(cells.load(b"a"), b"new"), Change(cells.load(b"b"), os.urandom(store.part_size - 100))]
    names: list[str] = []

    refused = 0
    while refused < 30:  # then both shards are full
        name = f"fill{len(names) + refused}"
        try:
            store.put(name, bytes(1 << 20))
            names.append(name)
        except StoreFull:
            refused += 1
    with pytest.raises(StoreFull):
        cells.commit(changes)
    assert [cells.read(b"a"), cells.read(b"b")] == [b"old", b"old"]
    for name in names:
        store.delete(name)
    assert cells.commit([Change(cells.load(b"a"), b"new"), Change(cells.load(b"b"), b"new")])


def test_money_is_neither_made_nor_lost(store: Store) -> None:
    """Several at once move amounts between accounts, and others sum them up in transactions."""
    accounts = [b"acc%d" % number for number in range(4)]
    for account in accounts:
        Cells(store).swap(Cell(account, None, b""), b"100")

    def move(number: int) -> None:
        cells = Cells(store)
        done = 0
        while done < 100:
            one, two = (accounts[(number + done * step) % 4] for step in (1, 2))
            if one == two:
                two = accounts[(number + 1 + done) % 4 - 1]
            if one == two:
                done += 1
                continue
            a, b = cells.load(one), cells.load(two)
            changes = [Change(a, str(int(a.value or 0) - 1).encode()), Change(b, str(int(b.value or 0) + 1).encode())]
            done += cells.commit(changes)

    threads = [threading.Thread(target=move, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cells = Cells(store)
    assert sum(int(cells.read(account) or 0) for account in accounts) == 400
    assert sorted(store.keys()) == accounts
