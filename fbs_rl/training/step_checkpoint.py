"""Checkpoints of a run: folders checkpoints/step_N that appear whole, are verified on loading, and are pruned."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MANIFEST = "checkpoint.json"
_FIELDS = {"step", "ranks", "state", "files"}
_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True)
class StepCheckpoint:
    """One finished checkpoint. step: optimizer steps done. state: what the run keeps outside the engine."""

    path: Path
    step: int
    ranks: int
    state: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints under `root`."""

    root: Path

    def begin(self, step: int) -> Path:
        """A fresh folder to write the checkpoint after `step` steps into; it does not count until finished."""
        partial = self.root / f".step_{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def files(self, folder: Path) -> list[str]:
        """Names of all files under `folder`, sorted."""
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    def finish(self, step: int, ranks: int, state: dict[str, Any], digests: dict[str, str]) -> Path:
        """Give what begin() made its final name. digests: sha256 of every file.

        Raises OSError if a file has no digest.
        """
        partial, final = self.root / f".step_{step}.partial", self.root / f"step_{step}"
        missing = set(self.files(partial)) - digests.keys()
        if missing:
            raise OSError(f"{partial}: no digest of {min(missing)}; the checkpoint is not kept")
        record = {"step": step, "ranks": ranks, "state": state, "files": digests}
        manifest = partial / _MANIFEST
        manifest.write_text(json.dumps(record, indent=1), encoding="utf-8")
        for name in (*digests, _MANIFEST):
            _sync(partial / name)
        if final.exists():  # of an earlier attempt, which may have had another number of ranks
            self._set_aside(step)
        os.replace(partial, final)
        _sync(self.root)
        return final

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        if not self.root.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.root.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def read(self, step: int) -> StepCheckpoint:
        """The checkpoint after `step` steps, every file verified; ValueError, in one sentence, if it is damaged."""
        path, record = self.root / f"step_{step}", self._manifest(step)
        checkpoint = StepCheckpoint(path, step, record["ranks"], record["state"], record["files"])
        for name, wanted in checkpoint.files.items():
            if not (path / name).is_file():
                raise ValueError(f"{path} is damaged: {name} is missing")
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                    raise ValueError(f"{path} is damaged: {name} does not match its digest")
        return checkpoint

    def _manifest(self, step: int) -> dict[str, Any]:
        path = self.root / f"step_{step}"
        try:
            record = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged: its {_MANIFEST} cannot be read ({error})"
            ) from None
        if not isinstance(record, dict) or not record.keys() >= _FIELDS or record["step"] != step:
            raise ValueError(f"{path} is damaged: its {_MANIFEST} is not that of step {step}")
        return record

    def newest(self, on_damage: Callable[[str], None]) -> StepCheckpoint | None:
        """The newest checkpoint that is whole; damaged ones are reported and passed over."""
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except ValueError as error:
                on_damage(str(error))
        return None

    def newest_state(self) -> dict[str, Any] | None:
        """What the newest checkpoint keeps of the run, without reading the engine's files; None if there is none."""
        for step in reversed(self.steps()):
            try:
                return self._manifest(step)["state"]
            except ValueError:
                continue
        return None

    def prune(self, keep: int, keep_every_steps: int | None) -> None:
        """Delete all but the newest `keep` and those of steps divisible by keep_every_steps; and leftovers."""
        for step in self.steps()[:-keep]:
            if not keep_every_steps or step % keep_every_steps:
                self._set_aside(step)
        for leftover in self.root.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _set_aside(self, step: int) -> None:
        """Rename before deleting: a half-deleted folder must not look like a checkpoint."""
        doomed = self.root / f".step_{step}.old"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(self.root / f"step_{step}", doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
