"""What the command lines of both training commands share: options of a run folder, and what --resume may change."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fbs_rl.option_parser import OptionParser


def run_parser(command: str, description: str, example: str) -> OptionParser:
    """The parser of `python -m fbs_rl.<command>` with the options of every run. example: of a --set."""
    parser = OptionParser(
        prog=f"python -m fbs_rl.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file, or the name of a shipped one (configs/)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"as in {example}"
    )
    parser.add_argument("--out", help=f"run folder (default runs/{command}-<time>)")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--dry-run", action="store_true", help="print what the run would take and stop")  # fmt: skip
    return parser


def check_device(key: str, device: str) -> None:
    """Raise ValueError for "cuda" where this machine is the cluster and has no GPU; another cluster is asked later."""
    here = not os.environ.get("RAY_ADDRESS")
    if here and device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{key} is cuda, but torch finds no CUDA device on this machine; set it to cpu, or submit "
            f"the command to a Ray cluster that has GPUs"
        )


@dataclass(frozen=True, slots=True)
class Resumption:
    """free: settings and sections that may change in the middle of a run. fixed: keys in these that may not."""

    free: tuple[str, ...]
    fixed: tuple[str, ...] = ()

    def check_overrides(self, overrides: Sequence[str]) -> None:
        """Raise ValueError for a key=value that a run cannot go on with."""
        but = f" (but not {' and '.join(self.fixed)})" if self.fixed else ""
        for override in overrides:
            if not self._may_change(override.split("=")[0]):
                raise ValueError(
                    f"{override} cannot change in the middle of a run; only {', '.join(self.free)} can{but}; "
                    f"start a new run for it"
                )

    def check_unchanged(self, run: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
        """Raise ValueError if a setting differs from the one that the run's checkpoints were made with."""
        before, after = dict(_leaves(then)), dict(_leaves(now))
        for key in before.keys() | after.keys():
            if not self._may_change(key) and before.get(key) != after.get(key):
                raise ValueError(
                    f"{run}/config.yaml was changed: {key} was {before.get(key)!r} when its checkpoints were made "
                    f"and is {after.get(key)!r} now; restore it or start a new run"
                )

    def _may_change(self, key: str) -> bool:
        return key.split(".")[0] in self.free and key not in self.fixed


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
