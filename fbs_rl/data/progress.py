"""What a preparation shows while it runs: a bar in a terminal, a line a stage elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Reporter(Protocol):
    """Told of every stage and of what is done in it. unit: "MB" (amounts are bytes) or a plain noun."""

    def stage(self, title: str, total: int, done: int, unit: str = "MB") -> None: ...

    def advance(self, amount: int) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Says nothing."""

    def stage(self, title: str, total: int, done: int, unit: str = "MB") -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def close(self) -> None:
        pass


class Bars:
    """One bar a stage, with speed and time left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._progress.start()

    def stage(self, title: str, total: int, done: int, unit: str = "MB") -> None:
        self._unit, self._total, self._done = unit, total, done
        self._skipped, self._started_s = done, time.monotonic()
        self._task = self._progress.add_task(title, total=total, completed=done, amount="")
        self.advance(0)

    def advance(self, amount: int) -> None:
        self._done += amount
        scale = 1e6 if self._unit == "MB" else 1
        elapsed_s = max(1e-3, time.monotonic() - self._started_s)
        speed = (self._done - self._skipped) / scale / elapsed_s
        text = f"{self._done / scale:,.0f}/{self._total / scale:,.0f} {self._unit} {speed:,.1f} {self._unit}/s"
        self._progress.update(self._task, completed=self._done, amount=text)

    def close(self) -> None:
        self._progress.stop()


class Lines:
    """A line to standard error at the start of a stage, and at most one every half minute."""

    _EVERY_S = 30.0

    def stage(self, title: str, total: int, done: int, unit: str = "MB") -> None:
        self._title, self._total, self._done, self._unit = title, total, done, unit
        self._skipped, self._started_s = done, time.monotonic()
        self._said_s = self._started_s
        self._say("")

    def advance(self, amount: int) -> None:
        self._done += amount
        now_s = time.monotonic()
        if now_s - self._said_s >= self._EVERY_S:
            self._said_s = now_s
            rate = max(1e-9, (self._done - self._skipped) / (now_s - self._started_s))
            scale = 1e6 if self._unit == "MB" else 1
            left_s = (self._total - self._done) / rate
            self._say(f", {rate / scale:.2f} {self._unit}/s, {left_s:.0f} s left")

    def _say(self, rest: str) -> None:
        scale = 1e6 if self._unit == "MB" else 1
        done, total = self._done / scale, self._total / scale
        print(
            f"{self._title}: {done:,.0f}/{total:,.0f} {self._unit}{rest}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        pass


def console_reporter() -> Reporter:
    return Bars() if sys.stderr.isatty() else Lines()
