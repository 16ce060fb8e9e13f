"""The command line of fbs_rl.pretrain: what is asked, checked against itself and against the run to go on with."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fbs_rl.config import load_settings, to_tree
from fbs_rl.data.shards import PackedShards
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.run_folder import RunFolder
from fbs_rl.training.settings import PretrainSettings
from fbs_rl.training.start import check_start
from fbs_rl.training.step_checkpoint import CheckpointStore

_FREE_ON_RESUME = ("cluster", "checkpoint", "evaluation", "tracking", "max_bad_steps")
_FIXED_ON_RESUME = ("cluster.zero_stage", "cluster.precision")
"""Exceptions to the former: the engine's checkpoints depend on them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What is to be run, found to be possible. state: of the newest checkpoint, None for a new run."""

    settings: PretrainSettings
    run: RunFolder
    resumes: bool
    dry: bool
    config: FBSConfig
    rows: PackedShards
    state: dict[str, Any] | None


def read_request(argv: Sequence[str] | None, description: str) -> Request:
    """The request on the command line. Raises ValueError or OSError, in one sentence, for one that cannot be met."""
    options = _parser(description).parse_args(argv)
    if options.resume:
        settings, run = _resumed(options)
    else:
        overrides = [f"data={options.data}"] if options.data else []
        settings = load_settings(PretrainSettings, options.config, overrides + options.set)
        run = RunFolder.plan("pretrain", options.out)
    _check_device(settings)
    config, rows = check_start(settings)
    state = CheckpointStore(run.path / "checkpoints").newest_state() if options.resume else None
    if state is not None:
        _check_same_run(run, state, settings, rows)
    return Request(settings, run, bool(options.resume), options.dry_run, config, rows, state)


def _resumed(options: argparse.Namespace) -> tuple[PretrainSettings, RunFolder]:
    if options.config or options.out or options.data:
        raise ValueError(
            "--resume goes on with the run's own settings; leave --config, --data and --out away"
        )
    run = RunFolder.existing(options.resume)
    for override in options.set:
        key = override.split("=")[0]
        if key.split(".")[0] not in _FREE_ON_RESUME or key in _FIXED_ON_RESUME:
            raise ValueError(
                f"{override} cannot change in the middle of a run; only {', '.join(_FREE_ON_RESUME)} can "
                f"(but not {' and '.join(_FIXED_ON_RESUME)}); start a new run for it"
            )
    return load_settings(PretrainSettings, str(run.path / "config.yaml"), options.set), run


def _check_device(settings: PretrainSettings) -> None:
    """A cluster's GPUs are asked for when it is there; this machine's can be looked for now."""
    here = not os.environ.get("RAY_ADDRESS")
    if here and settings.cluster.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "cluster.device is cuda, but torch finds no CUDA device on this machine; set it to cpu, or submit "
            "the command to a Ray cluster that has GPUs"
        )


def _check_same_run(
    run: RunFolder, state: dict[str, Any], settings: PretrainSettings, rows: PackedShards
) -> None:
    """ValueError if the run's data or settings are not those its checkpoints were made with."""
    if state["data"] != rows.digest:
        raise ValueError(
            f"{rows.folder} holds other data than {run.path} was trained on so far; restore it or start a new run"
        )
    then, now = (dict(_leaves(tree)) for tree in (state["settings"], to_tree(settings)))
    for key in then.keys() | now.keys():
        free = key.split(".")[0] in _FREE_ON_RESUME and key not in _FIXED_ON_RESUME
        if not free and then.get(key) != now.get(key):
            raise ValueError(
                f"{run.path}/config.yaml was changed: {key} was {then.get(key)!r} when its checkpoints were made "
                f"and is {now.get(key)!r} now; restore it or start a new run"
            )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fbs_rl.pretrain",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="folder of prepared shards")
    parser.add_argument("--config", help="YAML file, or the name of a shipped one (configs/)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as in batch.step_sequences=64",
    )
    parser.add_argument("--out", help="run folder (default runs/pretrain-<time>)")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the run would take and stop"
    )
    return parser
