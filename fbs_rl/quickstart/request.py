"""What the quickstart is asked for, checked before anything expensive starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fbs_rl.config import load_settings
from fbs_rl.model.backbone import SMOLLM2, ModelSource, check_family
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.rl.ppo_settings import PPOSettings
from fbs_rl.run_folder import RunFolder
from fbs_rl.training.settings import PretrainSettings

STAGE1, STAGE2 = "quickstart", "ppo_quickstart"
"""Shipped settings of the two stages (configs/)."""


@dataclass(frozen=True, slots=True)
class Request:
    """ratios: shares of layers to skip that are measured, rising."""

    options: argparse.Namespace
    ratios: list[float]
    run: RunFolder
    stage1: PretrainSettings
    stage2: PPOSettings

    @property
    def main_ratio(self) -> float:
        """The ratio that the model is given a threshold for after Stage 1."""
        return self.ratios[(len(self.ratios) - 1) // 2]

    @property
    def trained_tokens(self) -> int:
        """Of Stage 1."""
        steps = self.stage1.phases.steps
        return steps * self.stage1.batch.step_sequences * self.options.length

    @property
    def stage1_words(self) -> list[str]:
        """Arguments of fbs_rl.pretrain."""
        out = str(self.run.path / "stage1")
        return _words(STAGE1, out, _stage1(self.options, self.run.path))

    @property
    def stage2_words(self) -> list[str]:
        """Arguments of fbs_rl.ppo."""
        return _words(STAGE2, str(self.run.path / "stage2"), _stage2(self.options, self.run.path))


def read_request(argv: Sequence[str] | None, description: str) -> Request:
    """Raises ValueError or OSError, in one sentence, for a request that cannot be met; no weights are read."""
    options = _parser(description).parse_args(argv)
    ratios = _ratios(options.ratios)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device here; use --device cpu")
    if options.sequences < 2 or options.sequences % 2 or options.length < 48:
        raise ValueError(
            f"{options.sequences} sequences of {options.length} tokens were asked for; "
            f"take an even number, of at least 48 tokens each"
        )
    FBSConfig.preset(options.preset)
    run = RunFolder.plan("quickstart", options.out)
    stage1 = load_settings(PretrainSettings, STAGE1, _stage1(options, run.path))
    other = [name for name in stage1.model.options if not name.startswith("loss_")]
    if other:
        raise ValueError(
            f"the quickstart's model.options can only set losses, not {other[0]}; use python -m fbs_rl.pretrain"
        )
    stage2 = load_settings(PPOSettings, STAGE2, _stage2(options, run.path))
    start = stage1.phases.skip_target_start
    _check_model(options.model, options.preset, ratios, start, options.length)
    return Request(options, ratios, run, stage1, stage2)


def _ratios(text: str) -> list[float]:
    try:
        ratios = sorted({float(r) for r in text.split(",")})
    except ValueError:
        ratios = []
    if not ratios or not all(0 < r < 1 for r in ratios):
        raise ValueError(
            f"--ratios is {text}; give shares of layers between 0 and 1, as in 0.1,0.2,0.36"
        )
    return ratios


def _stage1(options: argparse.Namespace, run: Path) -> list[str]:
    fixed = [
        f"data={run / 'data'}",
        f"model.backbone={run / 'start'}",
        f"model.preset={options.preset}",
        "phases.gate_start=initial",  # of run/start, which is fitted
        "evaluation.skip_ratios=[]",  # measured here, by language
        f"cluster.device={options.device}",
        f"cluster.threads_per_rank={_cores()}",
    ]
    steps = [] if options.steps is None else [f"phases.steps={options.steps}"]
    return [*fixed, *steps, *options.stage1]


def _stage2(options: argparse.Namespace, run: Path) -> list[str]:
    # Rollouts and learning take turns, so each may have all cores.
    fixed = [
        f"model={run / 'stage1' / 'final'}",
        f"fleet.device={options.device}",
        f"fleet.threads_per_engine={_cores()}",
        f"learner.runtime.threads={_cores()}",
    ]
    updates = [] if options.updates is None else [f"learner.updates={options.updates}"]
    return [*fixed, *updates, *options.stage2]


def _cores() -> int:
    return os.cpu_count() or 1


def _words(config: str, out: str, overrides: list[str]) -> list[str]:
    words = ["--config", config, "--out", out]
    for override in overrides:
        words += ["--set", override]
    return words


def _check_model(name: str, preset: str, ratios: list[float], start: float, length: int) -> None:
    """Raise ValueError, in one sentence, for a model that cannot do what is asked."""
    backbone = ModelSource.parse(name).read_config()
    if isinstance(backbone, FBSConfig):
        raise ValueError(
            f"{name} is an FBS model already; give the quickstart a plain backbone, or train on with "
            f"python -m fbs_rl.pretrain --set model.backbone={name}"
        )
    check_family(backbone, name)
    config = FBSConfig.preset(preset).bound_to(backbone)
    if length > config.max_position_embeddings:
        raise ValueError(
            f"--length is {length}, but the context of {name} is {config.max_position_embeddings} tokens"
        )
    free = 1 - len(config.protected_layers) / config.layer_count
    if ratios[-1] >= free:
        raise ValueError(
            f"--ratios names {ratios[-1]}, but only {free:.2f} of the layers of {name} may skip"
        )
    if not 0 < start < free:
        raise ValueError(
            f"phases.skip_target_start is {start}; the quickstart's gates begin there, so it must lie between 0 and "
            f"{free:.2f}"
        )


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fbs_rl.quickstart", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--model", default=SMOLLM2, help="hub id, folder, .gguf file or smollm2-135m"
    )
    parser.add_argument("--preset", default="default", help="default or paper")
    parser.add_argument(
        "--ratios", default="0.2", help="shares of layers to skip that are measured (0.2)"
    )
    parser.add_argument(
        "--sequences", type=int, default=4, help="windows to fit on, half of each language"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens a window")
    parser.add_argument("--steps", type=int, help=f"of Stage 1 (default: configs/{STAGE1}.yaml)")
    parser.add_argument("--updates", type=int, help=f"of Stage 2 (default: configs/{STAGE2}.yaml)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", help="run folder (default runs/quickstart-<time>)")
    for stage, example in ((1, "batch.step_sequences=4"), (2, "episodes.samples=8")):
        parser.add_argument(
            f"--stage{stage}", action="append", default=[], metavar="KEY=VALUE",
            help=f"of Stage {stage}, as in {example}",
        )  # fmt: skip
    return parser
