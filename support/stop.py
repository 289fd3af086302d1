"""stop.py: Ctrl-C and a polite kill (SIGTERM), from the first moment of a script to its last.

in : a signal           out: one line, and the exit code that shells know: 130 or 143

    while a script's imports run      `at_once`: it ends, nothing has been begun
    while it works                    `by_exception`: what is open is closed, then it ends
    while it trains                   `Signals`: noted, the step in hand is finished first

Nothing of the paper is here, and nothing heavy is imported: this comes before everything else.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

ASKED = (signal.SIGINT, signal.SIGTERM)


class Stop(KeyboardInterrupt):
    """Raised where a script is when it is asked to end. No `except Exception` swallows it."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number  # as a shell counts


def at_once() -> None:
    """For the seconds in which a script imports: no exception, which libraries might swallow."""

    def end(number: int, _frame) -> NoReturn:
        os.write(2, b"stopped before it began: nothing was written\n")
        os._exit(128 + number)

    for number in ASKED:
        signal.signal(number, end)


@contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Another handler for both signals, for a while."""
    before = {number: signal.signal(number, handler) for number in ASKED}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def by_exception() -> Iterator[None]:
    """Either signal raises `Stop`, so that locks, temporary files and workers are seen to."""

    def stop(number: int, _frame) -> NoReturn:
        raise Stop(number)

    with handled(stop):
        yield


class Signals:
    """Either signal is noted, so that the step in hand is finished first."""

    def __enter__(self) -> Signals:
        self.number = 0
        self._handled = handled(self._note)
        self._handled.__enter__()
        return self

    def _note(self, number: int, _frame) -> None:
        self.number = number  # and no more: the handler may run in the middle of any operation

    def __exit__(self, *why) -> None:
        self._handled.__exit__(*why)
