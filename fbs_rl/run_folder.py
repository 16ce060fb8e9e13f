"""The run folder of every command: config.yaml, metrics.jsonl, summary.json, final/."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

_PACKAGES = ("torch", "transformers", "deepspeed", "ray")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that one run of one command writes to. Files appear whole or not at all."""

    path: Path

    @classmethod
    def plan(cls, command: str, out: str | None) -> RunFolder:
        """The folder `out`, or runs/<command>-<time>; nothing is made yet.

        Raises FileExistsError if it holds files already.
        """
        path = Path(out) if out else Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists already; name an empty or new folder with --out")
        return cls(path)

    @classmethod
    def existing(cls, out: str) -> RunFolder:
        """The folder of a run to go on with; FileNotFoundError if there is none."""
        path = Path(out)
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(f"{path} is no run folder: it has no config.yaml")
        return cls(path)

    def open(self, command: str, settings: dict[str, Any]) -> None:
        """Make the folder and write its config.yaml."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(
            "config.yaml", yaml.safe_dump({"command": command, **settings}, sort_keys=False)
        )

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; keys are namespace/name. A number that is not finite becomes null."""
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain, ensure_ascii=False) + "\n")

    def mend(self) -> None:
        """Cut off a last line of metrics.jsonl that a kill left unfinished."""
        path = self.path / "metrics.jsonl"
        if path.is_file():
            text = path.read_bytes()
            if text and not text.endswith(b"\n"):
                os.truncate(path, text.rfind(b"\n") + 1)

    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds; a last line that was cut off by a kill is left out."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        return [
            json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line
        ]

    def summarise(self, figures: dict[str, Any]) -> None:
        """Write summary.json: the final figures, versions, commit and device."""
        summary = {
            **figures,
            "versions": {p: version(p) for p in _PACKAGES},
            "commit": _commit(),
            "host": platform.platform(),
        }
        self._write("summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path / name)


def _commit() -> str | None:
    """Commit of the source this runs from, with a + if it was changed; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        head.stdout.strip() + ("+" if changes.stdout.strip() else "")
        if head.returncode == 0
        else None
    )
