"""What a training run shows: a progress bar on a terminal, else a line a step."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingConsole:
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

    def step(self, step: int, record: dict[str, Any]) -> None:
        """Show step `step` (0-based)."""
        figures = _figures(record)
        if self.progress:
            self.progress.update(
                self.task, completed=step + 1, phase=record["train/phase"], figures=figures
            )
        elif (step + 1) % self.every == 0 or step + 1 == self.total:
            spent = (time.monotonic() - self.began) / (step + 1 - self.first)
            left = spent * (self.total - step - 1)
            width = len(str(self.total))
            self.say(
                f"step {step + 1:>{width}}/{self.total} {record['train/phase']}  {figures}  ETA {_span(left)}"
            )

    def stop(self) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None


def _figures(record: dict[str, Any]) -> str:
    parts = [f"loss {record['train/loss']:.4f}"]
    if "gate/skip_ratio" in record and record["train/phase"] == "1b":
        parts.append(f"skip {record['gate/skip_ratio']:5.1%} (aim {record['gate/target']:.0%})")
    parts.append(f"{record['perf/tokens_per_s']:,.0f} tokens/s")
    if "perf/mfu" in record:
        parts.append(f"MFU {record['perf/mfu']:.1%}")
    memory = record.get("perf/gpu_gb", record["perf/rss_gb"])
    parts.append(f"{memory:.1f} GB")
    return "  ".join(parts)


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
