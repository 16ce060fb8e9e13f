"""python -m fbs_rl.bench train: tokens per second and MFU of Stage-1 steps, beside plain continual pretraining.

All variants live in one process as DeepSpeed engines and take turns, one step each; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fbs_rl.checkpoint import LoadedModel, load_tokenizer
from fbs_rl.config import load_settings, to_tree
from fbs_rl.model.backbone import ModelSource
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model_geometry import GEOMETRIES, check_geometry, random_backbone
from fbs_rl.training.costs import peak_flops, training_flops_per_token
from fbs_rl.training.settings import ModelSettings, PretrainSettings

VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": ("model.preset=none", "phases.observe_frac=1.0"),
    "fbs 1a": ("model.preset=default", "phases.observe_frac=1.0"),
    "fbs 1b": ("model.preset=default", "phases.observe_frac=0.0"),
    "paper 1a": ("model.preset=paper", "phases.observe_frac=1.0"),
    "paper 1b": ("model.preset=paper", "phases.observe_frac=0.0"),
}
"""Settings of each variant; plain has no FBS modules."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. share: throughput as a share of the first variant's."""

    variant: str
    tokens_per_s: float
    step_ms: float
    mfu: float | None
    share: float
    peak_gb: float | None


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        rows = measure(arguments)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    for row in rows:
        print(json.dumps(asdict(row)) if arguments.json else _line(row))
    return 0


def measure(arguments: argparse.Namespace) -> list[Row]:
    """One row a variant, measured in turns."""
    workers = {name: _start(name, arguments) for name in arguments.variants.split(",")}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    tokens: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for turn in range(arguments.warmups + arguments.steps):
        for name, worker in workers.items():
            if worker.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            began = time.perf_counter()
            record = worker.run_step(turn)
            if worker.device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            if turn >= arguments.warmups:
                seconds[name].append(time.perf_counter() - began)
                tokens[name] = record["train/tokens"]
    rows: list[Row] = []
    for name, worker in workers.items():
        median = statistics.median(seconds[name])
        speed = tokens[name] / median
        flops = training_flops_per_token(worker.model.config, worker.train_rows.sequence_tokens)
        peak = peak_flops(worker.device)
        first = rows[0].tokens_per_s if rows else speed
        rows.append(
            Row(
                name, round(speed), round(1000 * median, 2),
                None if peak is None else round(speed * flops / peak, 4),
                round(speed / first, 4), round(peaks[name], 2) if name in peaks else None,
            )
        )  # fmt: skip
    return rows


def make_random_model(geometry: str, chosen: ModelSettings) -> LoadedModel:
    """A Qwen3 of a published shape with random weights; the tokenizer is that of the model's `backbone`."""
    check_geometry(geometry)
    source = ModelSource.parse(chosen.backbone)
    tokenizer = load_tokenizer(source, source.read_config().vocab_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = random_backbone(geometry, torch.float32, device)
    return LoadedModel(FBSForCausalLM.from_backbone(backbone, chosen.fbs_config()), tokenizer)


def _start(name: str, arguments: argparse.Namespace) -> Any:
    from actors.pretrain_worker import PretrainWorker

    if name not in VARIANTS:
        raise ValueError(f"no variant {name!r}; there are {', '.join(VARIANTS)}")
    shared = (
        f"data={arguments.data}",
        f"model.backbone={arguments.backbone}",
        f"batch.step_sequences={arguments.step_sequences}",
        f"batch.micro_sequences={arguments.micro_sequences}",
        "phases.steps=1000",
        f"cluster.device={arguments.device}",
        f"cluster.precision={arguments.precision}",
        f"cluster.zero_stage={arguments.zero_stage}",
        f"cluster.gradient_checkpointing={str(arguments.checkpointing).lower()}",
        f"cluster.threads_per_rank={arguments.threads or torch.get_num_threads()}",
    )
    given = [o for o in arguments.set if name != "plain" or not o.startswith("model.options")]
    settings = load_settings(PretrainSettings, None, [*shared, *VARIANTS[name], *given])
    print(f"starting {name} ...", file=sys.stderr, flush=True)
    made = make_random_model(arguments.geometry, settings.model) if arguments.geometry else None
    worker = PretrainWorker(0, 1, to_tree(settings))
    worker.start(*worker.address(), 0, None, made)
    return worker


def _line(row: Row) -> str:
    mfu = "" if row.mfu is None else f"MFU {row.mfu:6.1%}  "
    peak = "" if row.peak_gb is None else f"{row.peak_gb:6.1f} GB"
    return (
        f"{row.variant:<10} {row.tokens_per_s:>10,.0f} tokens/s  {row.step_ms:>9.1f} ms a step  "
        f"{mfu}{row.share:6.1%} of the first  {peak}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fbs_rl.bench train", description=__doc__)
    parser.add_argument("--data", required=True, help="folder of prepared shards")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--geometry", help=f"random weights of a shape: {', '.join(GEOMETRIES)}")
    parser.add_argument("--variants", default="plain,fbs 1a,fbs 1b")
    parser.add_argument("--step-sequences", type=int, default=32)
    parser.add_argument("--micro-sequences", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmups", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
