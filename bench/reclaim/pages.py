"""Pages of 4 KiB and of 2 MiB: a run takes turns between them, and leaves the node as it found it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from memfaas import node

Pages = Literal["4 KiB", "2 MiB"]
ALL: tuple[Pages, ...] = get_args(Pages)
_WORD: dict[Pages, str] = {"4 KiB": "never", "2 MiB": "advise"}

_GUARD = 'cat > /dev/null; printf %s "$1" > "$2"'
"""Waits until nobody holds the other end of its standard input, and then puts the word back."""


class Turns:
    """What kind of pages the kernel gives to shared memory that asks for 2 MiB ones; made by `turns`."""

    def __init__(self, folder: Path, *, may_choose: bool) -> None:
        self._folder = folder
        self._may_choose = may_choose

    def take(self, pages: Pages) -> None:
        """From now on, new memory is of these pages. Raises OSError with the reason when it cannot be."""
        if node.gives_huge_pages(self._folder) == (pages == "2 MiB"):
            return
        file = self._folder / "shmem_enabled"
        if not self._may_choose:
            raise OSError(
                f"{file} says {node.huge_page_choice(self._folder) or 'nothing'}, and only root may change it"
            )
        file.write_text(_WORD[pages])
        if node.gives_huge_pages(self._folder) != (pages == "2 MiB"):
            raise OSError(f"{file} says {_WORD[pages]}, but hugepages-2048kB/shmem_enabled overrules it")


@contextmanager
def turns(folder: Path = node.HUGE_PAGES) -> Iterator[Turns]:
    """While it lasts the choice may be changed. Afterwards it is what it was, also when we are killed."""
    file = folder / "shmem_enabled"
    before = _word_of(file)
    if before is None or not os.access(file, os.W_OK):
        yield Turns(folder, may_choose=False)
        return
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "sh", before, str(file)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # neither Ctrl-C nor the end of our terminal ends it
    )
    try:
        yield Turns(folder, may_choose=True)
    finally:
        guard.communicate()  # closes its standard input
    if _word_of(file) != before:
        raise OSError(f"cannot restore {file}: it was {before}")


def _word_of(file: Path) -> str | None:
    try:
        match = re.search(r"\[(\w+)\]", file.read_text())
    except OSError:
        return None
    return match[1] if match else None
