"""The command line of fbs_rl.pretrain: what is asked, checked against itself and against the run to go on with."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from fbs_rl.config import load_settings, to_tree
from fbs_rl.data.shards import PackedShards
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.option_parser import OptionParser
from fbs_rl.run_folder import RunFolder
from fbs_rl.run_options import Resumption, check_device, run_parser
from fbs_rl.training.settings import PretrainSettings
from fbs_rl.training.start import check_start
from fbs_rl.training.step_checkpoint import CheckpointStore

_RESUMPTION = Resumption(
    free=("cluster", "checkpoint", "evaluation", "tracking", "max_bad_steps"),
    fixed=("cluster.zero_stage", "cluster.precision"),  # the engine's checkpoints depend on them
)


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
    check_device("cluster.device", settings.cluster.device)
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
    _RESUMPTION.check_overrides(options.set)
    return load_settings(PretrainSettings, str(run.path / "config.yaml"), options.set), run


def _check_same_run(
    run: RunFolder, state: dict[str, Any], settings: PretrainSettings, rows: PackedShards
) -> None:
    """ValueError if the run's data or settings are not those its checkpoints were made with."""
    if state["data"] != rows.digest:
        raise ValueError(
            f"{rows.folder} holds other data than {run.path} was trained on so far; restore it or start a new run"
        )
    _RESUMPTION.check_unchanged(run.path, state["settings"], to_tree(settings))


def _parser(description: str) -> OptionParser:
    parser = run_parser("pretrain", description, "batch.step_sequences=64")
    parser.add_argument("--data", help="folder of prepared shards")
    return parser
