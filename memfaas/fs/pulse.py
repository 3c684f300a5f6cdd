"""The thread that says that a member lives, also while an operation takes long."""

from __future__ import annotations

import logging
import threading

from memfaas.errors import MemfaasError
from memfaas.fs.cells import Cells, KeyValue
from memfaas.fs.members import BEAT_S, Gone, Members

log = logging.getLogger(__name__)


class Pulse:
    """A context manager. Its thread ends when it is closed, or with the process."""

    def __init__(self, store: KeyValue, members: Members) -> None:
        self._cells = Cells(store)
        self._members = members
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memfaas-pulse", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                self._members.pulse(self._cells)
            except Gone:
                pass  # the member notices by itself, and joins again
            except MemfaasError as error:
                log.info("a sign of life was not given: %s", error)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def __enter__(self) -> Pulse:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
