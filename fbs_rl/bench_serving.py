"""python -m fbs_rl.bench vllm: decoding speed of the vLLM plugin, beside stock vLLM with the same backbone.

Every engine is a process of its own with one thread; all are alive at once and take turns, one generation a
round, so that a busy machine slows them alike. A round's figure is the median of its decoding steps, prefill
left out; a row's is the median of its rounds. CPU time is the process's own: another's work does not add to
it, though it shares memory and caches. Gates are computed in full but held, so no quality is implied:
independent rows sample one probability, each with a seed of its own; for consensus a fixed set of layers,
spread evenly, is skipped by all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fbs_rl.bench_engine import EngineSpec, Round, RoundSpec
from fbs_rl.bench_folders import FBS, PLAIN, savable, write_folders
from fbs_rl.engine_processes import Channel, answer, running
from fbs_rl.model.backbone import SMOLLM2, ModelSource, load_backbone
from fbs_rl.model.configuration import PRESETS, FBSConfig
from fbs_rl.model.cost_model import CostModel
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model_geometry import GEOMETRIES, check_geometry, random_backbone

_ROUND_S = 600.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. skip_ratio, flops_ratio (over the plain backbone's): measured, from traces.

    cpu_ms, wall_ms: of a decoding step. cpu_ratio, wall_ratio: the batch's first row over this one, above 1
    where this one is faster. byte_bound: that ratio if a step cost nothing but the weights that it reads.
    """

    preset: str
    batch: int
    variant: str
    skip_ratio: float
    flops_ratio: float
    cpu_ms: float
    wall_ms: float
    tokens_per_s: float
    cpu_ratio: float
    wall_ratio: float
    byte_bound: float


@dataclass(frozen=True, slots=True)
class _Variant:
    """What one engine is asked in its turns; share as in RoundSpec."""

    name: str
    engine: str
    share: float | None = None
    apart: bool = False


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    rows: list[Row] = []
    try:
        batches, skips = _check(arguments)
        # Libraries that are imported on the way print to where the results go.
        with redirect_stdout(sys.stderr):
            for preset in arguments.presets.split(","):
                rows += measure(preset, batches, skips, arguments)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        made = {"settings": vars(arguments), "host": host(), "rows": [asdict(r) for r in rows]}
        print(json.dumps(made))
    else:
        print(table(rows, arguments))
    return 0


def _check(arguments: argparse.Namespace) -> tuple[list[int], list[float]]:
    """Batch sizes and shares to skip; ValueError, in one sentence, for what cannot be measured."""
    for preset in arguments.presets.split(","):
        FBSConfig.preset(preset)
    batches = arguments.batches.split(",")
    if not all(b.isdigit() and int(b) > 0 for b in batches):
        raise ValueError(f"--batches is {arguments.batches}; give batch sizes, as in 1,8,32")
    try:
        skips = [float(share) for share in arguments.skips.split(",")]
    except ValueError:
        skips = [-1.0]
    if not all(0 <= share <= 0.9 for share in skips):
        raise ValueError(
            f"--skips is {arguments.skips}; give shares of layers in [0, 0.9], as in 0,0.36"
        )
    if arguments.tokens < 3 or arguments.rounds < 1 or arguments.prompt_tokens < 1:
        raise ValueError("--tokens must be at least 3, --rounds and --prompt-tokens at least 1")
    if arguments.geometry is not None:
        check_geometry(arguments.geometry)
    return [int(b) for b in batches], skips


def measure(
    preset: str, batches: Sequence[int], skips: Sequence[float], arguments: argparse.Namespace
) -> list[Row]:
    """Rows of one preset; in every batch stock vLLM comes first."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fbs_bench_") as name:
        folder = Path(name)
        _say(f"preset {preset}: writing the models ...")
        config = _export(folder, preset, arguments)
        specs = {
            engine: EngineSpec(
                str(folder / part),
                arguments.dtype,
                max(batches),
                arguments.prompt_tokens,
                arguments.tokens,
                options,
            )
            for engine, (part, options) in _engines(arguments, max(batches)).items()
        }
        _say(f"preset {preset}: starting {', '.join(specs)} ...")
        with running(specs, arguments.threads) as (engines, _):
            for batch in batches:
                _say(f"preset {preset}: batch {batch} ...")
                variants = _variants(engines, batch, skips)
                rounds = _take_turns(engines, variants, batch, arguments.rounds)
                rows += _rows(preset, batch, rounds, config)
    return rows


# --- models -------------------------------------------------------------------------------------------


def _export(folder: Path, preset: str, arguments: argparse.Namespace) -> FBSConfig:
    """Two folders with the same backbone: `plain` for stock vLLM, `fbs`. The configuration of the second."""
    dtype = getattr(torch, arguments.dtype)
    backbone = (
        random_backbone(arguments.geometry, torch.float32, "cpu")
        if arguments.geometry
        else savable(load_backbone(ModelSource.parse(arguments.model), torch.float32))
    )
    backbone = backbone.to(dtype).eval()
    torch.manual_seed(0)
    model = FBSForCausalLM.from_backbone(backbone, FBSConfig.preset(preset)).to(dtype)
    write_folders(folder, backbone, model)
    return model.config


# --- engines ------------------------------------------------------------------------------------------


def _engines(arguments: argparse.Namespace, most: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Folder and options of each engine."""
    found: dict[str, tuple[str, dict[str, Any]]] = {"vLLM": (PLAIN, {})}
    if arguments.eager != "only":
        found["vLLM, eager"] = (PLAIN, {"enforce_eager": True})
    else:
        found = {"vLLM, eager": (PLAIN, {"enforce_eager": True})}
    found["fbs"] = (FBS, {})
    if most > 1:
        found["fbs, consensus"] = (FBS, {"additional_config": {"fbs": {"batch": "consensus"}}})
    return found


def _variants(engines: dict[str, Any], batch: int, skips: Sequence[float]) -> list[_Variant]:
    found = [_Variant(name, name) for name in engines if name.startswith("vLLM")]
    found += [
        _Variant(f"fbs, {share:.0%}" + ", independent" * (batch > 1 and share > 0), "fbs", share, apart=True)
        for share in skips
    ]  # fmt: skip
    if batch > 1:
        found += [_Variant(f"fbs, {s:.0%}, consensus", "fbs, consensus", s) for s in skips if s]
    return found


def _take_turns(
    engines: dict[str, Channel], variants: Sequence[_Variant], batch: int, rounds: int
) -> dict[str, list[Round]]:
    """The rounds of each variant, after one that is thrown away; every round has another order."""
    found: dict[str, list[Round]] = {variant.name: [] for variant in variants}
    for turn in range(-1, rounds):
        at = turn % len(variants)
        for variant in [*variants[at:], *variants[:at]]:
            connection = engines[variant.engine]
            connection.send(RoundSpec(batch, variant.share, variant.apart))
            done = answer(connection, variant.engine, f"generate for {batch} rows", _ROUND_S)
            if turn >= 0:
                found[variant.name].append(done)
    return found


# --- results ------------------------------------------------------------------------------------------


def _rows(preset: str, batch: int, rounds: dict[str, list[Round]], config: FBSConfig) -> list[Row]:
    cost = CostModel.of(config)
    plain = cost.head.weights + config.layer_count * cost.layer.weights
    rows: list[Row] = []
    for variant, done in rounds.items():
        cpu_ms = 1e3 * statistics.median(r.cpu_s for r in done)
        wall_ms = 1e3 * statistics.median(r.wall_s for r in done)
        read = statistics.fmean(r.weights for r in done)
        rows.append(
            Row(
                preset=preset,
                batch=batch,
                variant=variant,
                skip_ratio=statistics.fmean(r.skip_ratio for r in done),
                flops_ratio=statistics.fmean(r.flops_ratio for r in done),
                cpu_ms=cpu_ms,
                wall_ms=wall_ms,
                tokens_per_s=1e3 * batch / wall_ms,
                cpu_ratio=rows[0].cpu_ms / cpu_ms if rows else 1.0,
                wall_ratio=rows[0].wall_ms / wall_ms if rows else 1.0,
                byte_bound=plain / read if read else 1.0,
            )
        )
    return rows


def table(rows: list[Row], arguments: argparse.Namespace) -> str:
    """The rows as Markdown."""
    weights = (
        f"random weights of the shape {arguments.geometry}"
        if arguments.geometry
        else arguments.model
    )
    lines = [
        f"{weights}, {arguments.dtype}, prompt {arguments.prompt_tokens}, {arguments.tokens} new tokens, "
        f"{arguments.rounds} rounds, {arguments.threads} thread(s) an engine, interleaved; {host()}",
        "",
        "| preset | batch | variant | layers skipped | FLOPs | CPU ms/step | wall ms/step | tokens/s "
        "| first / this, CPU | wall | bound by bytes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.preset} | {r.batch} | {r.variant} | {r.skip_ratio:.1%} | {r.flops_ratio:.3f} | {r.cpu_ms:.1f} "
        f"| {r.wall_ms:.1f} | {r.tokens_per_s:.1f} | {r.cpu_ratio:.2f} | {r.wall_ratio:.2f} | {r.byte_bound:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def host() -> str:
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    machine = platform.processor() or platform.machine()
    return f"{machine}, {os.cpu_count()} cores, load {load}, torch {torch.__version__}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fbs_rl.bench vllm", description=__doc__)
    parser.add_argument(
        "--model", default=SMOLLM2, help="hub id, folder, .gguf file or smollm2-135m"
    )
    parser.add_argument(
        "--geometry", help=f"random weights of a shape instead: {', '.join(GEOMETRIES)}"
    )
    parser.add_argument(
        "--presets", default="default,paper", help=f"of {', '.join(sorted(PRESETS))}"
    )
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--skips", default="0,0.36,0.6", help="shares of layers to skip")
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each engine")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--eager",
        choices=["too", "only"],
        default="too",
        help='stock vLLM without compilation: beside its default, or alone ("only": starts in seconds)',
    )
    parser.add_argument("--json", action="store_true")
    return parser
