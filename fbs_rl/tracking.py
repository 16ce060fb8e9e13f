"""Where the figures of a run go: its own JSON lines first, then Weights & Biases, which may never stop a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

NAMESPACES = (
    "train", "loss", "gate", "preview", "eval", "perf", "run", "reward", "ppo", "value", "mismatch", "rollout", "sync",
)  # fmt: skip


class Tracker(Protocol):
    """What a run tells about itself. id: by which the tracker knows the run, to go on with it."""

    id: str | None

    def log(self, record: dict[str, Any]) -> None: ...
    def table(self, name: str, step: int, rows: list[dict[str, Any]]) -> None: ...
    def pictures(self, step: int, files: Sequence[Path]) -> None: ...
    def finish(self, failed: bool) -> None: ...


class NoTracker:
    """Tracking switched off."""

    id: str | None = None

    def log(self, record: dict[str, Any]) -> None:
        pass

    def table(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        pass

    def pictures(self, step: int, files: Sequence[Path]) -> None:
        pass

    def finish(self, failed: bool) -> None:
        pass


class WandbTracker:
    """A W&B run. Steps are an axis of their own (train/step), so that a resumed run may repeat some."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.id: str | None = run.id
        run.define_metric("train/step")
        for namespace in NAMESPACES:
            run.define_metric(f"{namespace}/*", step_metric="train/step")

    def log(self, record: dict[str, Any]) -> None:
        self._quietly(lambda: self.run.log({k: _shown(k, v) for k, v in record.items()}))

    def table(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        import wandb

        if rows:
            columns: list[Any] = list(rows[0])
            cells = [[_cell(row[c]) for c in columns] for row in rows]
            table = wandb.Table(columns=columns, data=cells)
            self._quietly(lambda: self.run.log({"train/step": step, name: table}))

    def pictures(self, step: int, files: Sequence[Path]) -> None:
        import wandb

        shown = {f"run/{file.stem}": wandb.Image(str(file)) for file in files}
        self._quietly(lambda: self.run.log({"train/step": step, **shown}))

    def finish(self, failed: bool) -> None:
        self._quietly(lambda: self.run.finish(exit_code=int(failed)))

    def _quietly(self, act: Callable[[], Any]) -> None:
        """The figures are in metrics.jsonl: a tracker that fails must not cost a run."""
        try:
            act()
        except Exception as error:
            print(f"W&B: {type(error).__name__}: {error}", file=sys.stderr)


def _shown(name: str, value: Any) -> Any:
    """Counts of equal bins of [0, 1], under a name that says so, as a histogram; the rest as it is."""
    if not name.endswith("_histogram"):
        return value
    import wandb

    edges = np.linspace(0, 1, len(value) + 1)
    return wandb.Histogram(np_histogram=(np.array(value), edges))


def _cell(value: Any) -> Any:
    import wandb

    return wandb.Html(value) if isinstance(value, str) and value.startswith("<div") else value


def start_tracker(
    mode: str, project: str, folder: Path, config: dict[str, Any], run_id: str | None = None
) -> Tracker:
    """The tracker for `mode` (auto, offline or off). WANDB_MODE in the environment wins. Never asks for a key.

    folder: the run's, whose name the W&B run takes. run_id: of the W&B run to go on with.
    """
    mode = {"disabled": "off", "offline": "offline"}.get(os.environ.get("WANDB_MODE", ""), mode)
    if mode == "off":
        return NoTracker()
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    # verify=False: no network; the answer is whether a key is at hand.
    online = mode == "auto" and wandb.login(prompt=False, verify=False)  # pyright: ignore[reportCallIssue]
    options: dict[str, Any] = {
        "project": project,
        "name": folder.name,
        "dir": str(folder),
        "config": config,
        "id": run_id,
        "resume": "allow" if run_id else None,
    }
    try:
        settings = wandb.Settings(init_timeout=20, console="off")
        return WandbTracker(
            wandb.init(mode="online" if online else "offline", settings=settings, **options)
        )
    except Exception as error:
        if not online:
            raise
        print(f"W&B: {error}; going on offline", file=sys.stderr)
        return WandbTracker(
            wandb.init(mode="offline", settings=wandb.Settings(console="off"), **options)
        )
