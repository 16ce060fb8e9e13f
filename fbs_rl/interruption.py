"""Interruption: a signal to stop, as something that a loop asks about between two steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class Interruption:
    """asked: a signal came while interruptions were awaited."""

    asked: bool = False

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM do no more than set `asked`. In the main thread only.

        Enter it when Ray has been connected to: that installs a SIGTERM handler which exits at once.
        """
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._take_note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take_note(self, *_: object) -> None:
        self.asked = True
