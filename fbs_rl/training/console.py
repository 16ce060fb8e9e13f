"""What a run of many steps shows: a progress bar on a terminal, else a line a step."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepConsole:
    """total: steps of the run. every: steps between lines where there is no terminal."""

    def __init__(self, total: int, every: int) -> None:
        self.total, self.every = total, every
        self.console = Console(highlight=False, markup=False)
        self.began, self.first = time.monotonic(), 0
        self.progress: Progress | None = None
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("[bold]{task.fields[phase]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self.task = self.progress.add_task("", total=total, phase="", figures="")
            self.progress.start()

    def say(self, text: str) -> None:
        """A line of text."""
        self.console.print(text, soft_wrap=True)

    def begin(self, step: int) -> None:
        """The run goes on after `step` steps."""
        self.first, self.began = step, time.monotonic()
        if self.progress:
            self.progress.update(self.task, completed=step)

    def step(self, step: int, figures: str, phase: str = "") -> None:
        """Show what there is to say of step `step` (0-based)."""
        if self.progress:
            self.progress.update(self.task, completed=step + 1, phase=phase, figures=figures)
        elif (step + 1) % self.every == 0 or step + 1 == self.total:
            spent = (time.monotonic() - self.began) / (step + 1 - self.first)
            left = spent * (self.total - step - 1)
            width = len(str(self.total))
            self.say(
                f"step {step + 1:>{width}}/{self.total} {phase:<2}  {figures}  ETA {_span(left)}"
            )

    def stop(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
