"""python -m fbs_rl.bench calls: how long each call of a decoding step takes, by the clock of the GPU's first block.

A step is one launch that all blocks walk through (docs/decode.md), so calls cannot be timed from outside. A call's
time runs from the end of the call in front to its own: it holds the wait for other blocks, and weights that came
early count for the call in front. Cycles become microseconds by the step's own time, by CUDA events. Medians over
steps. Shares of skipped layers are forced, as in `bench latency`; with --geometry weights are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch

from fbs_rl.bench_latency import load_models
from fbs_rl.decode.cuda_launcher import Launcher, check_cuda
from fbs_rl.decode.graph_decoder import GraphDecoder, RowsDecide
from fbs_rl.decode.kernel_arguments import Call
from fbs_rl.latency_engines import Variant, bar_of, hold_gates, logits_of_share
from fbs_rl.latency_protocol import Clock, copy_bandwidth, describe_device
from fbs_rl.model.backbone import SMOLLM2
from fbs_rl.model.configuration import PRESETS
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model_geometry import GEOMETRIES
from fbs_rl.types import GateMode


@dataclasses.dataclass(frozen=True, slots=True)
class CallRow:
    """Calls of one name. count: made in a step, those that were void left out; mean over steps, as the next two.

    Microseconds: of one of them (median, least, most), and of all of a step. weights_mb: of all their matrices; 0 for
    what is no product.
    """

    variant: str
    call: str
    count: float
    median_us: float
    min_us: float
    max_us: float
    sum_us: float
    weights_mb: float


def main(argv: list[str]) -> int:
    """Exit code 2, with one sentence, for settings that cannot work."""
    arguments = parse(argv)
    try:
        check_cuda()
        with redirect_stdout(sys.stderr):
            result = run(arguments)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if arguments.json else describe(result))
    return 0


def run(arguments: argparse.Namespace, launcher: Launcher | None = None) -> dict[str, Any]:
    """launcher: where programs run, None for this process's GPU. Raises ValueError for settings that cannot work."""
    if arguments.steps < 1 or arguments.prompt_tokens < 1 or arguments.rows < 1:
        raise ValueError("--steps, --prompt-tokens and --rows must be at least 1")
    device = torch.device("cuda") if launcher is None else launcher.device
    _, models = load_models(arguments, getattr(torch, arguments.dtype), device)
    threshold, asked = GateMode.THRESHOLD, arguments.skip
    variants = [
        Variant("plain", "graph", modules=False),
        Variant("gates on, nothing skipped", "graph", True, threshold, 0.0),
        Variant(f"{asked:.0%} forced", "graph", True, threshold, asked),
    ]
    rows, steps, skipped = [], {}, {}
    for variant in variants:
        step_ms, share, found = measure(models[variant.modules], variant, arguments, launcher)
        steps[variant.name], skipped[variant.name] = step_ms, share
        rows += [dataclasses.asdict(row) for row in found]
    return {
        "settings": vars(arguments),
        "host": describe_device(device) | {"copy_bytes_per_s": copy_bandwidth(device)},
        "step_ms": steps,
        "skipped": skipped,
        "rows": rows,
    }


def measure(
    model: FBSForCausalLM,
    variant: Variant,
    arguments: argparse.Namespace,
    launcher: Launcher | None,
) -> tuple[float, float, list[CallRow]]:
    """Milliseconds of a step (median), the share of layers skipped, and calls by name, those that take most first."""
    together = RowsDecide.TOGETHER if arguments.rows > 1 else RowsDecide.ALONE
    tokens = arguments.prompt_tokens + 2 * arguments.steps + 1
    logit_L = logits_of_share(model.config, variant)
    if logit_L is not None:
        hold_gates(model, logit_L)  # before the decoder copies them
    decoder = GraphDecoder(
        model, arguments.rows, tokens, gates=variant.mode, launcher=launcher,
        rows_decide=RowsDecide.ALONE if variant.mode is GateMode.DENSE else together,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    shape = (arguments.rows, arguments.prompt_tokens)
    decoder.prefill(
        torch.randint(model.config.vocab_size, shape, generator=draw), tau=bar_of(variant)
    )
    decoder.step(arguments.steps)  # warm
    clock, cycles = Clock(decoder.launcher.device), []
    clock.mark()
    for _ in range(arguments.steps):
        decoder.step()
        clock.mark()
        cycles.append(
            decoder.program.cycles.cpu().numpy()
        )  # waits, so that steps do not follow closely
    step_ms = statistics.median(clock.milliseconds())
    skipped = float(decoder.trace().skip_LBT.float().mean())
    return step_ms, skipped, _by_name(decoder, variant.name, np.stack(cycles), step_ms)


def _by_name(
    decoder: GraphDecoder, variant: str, cycles_TC: np.ndarray, step_ms: float
) -> list[CallRow]:
    """cycles_TC: Program.cycles of each step."""
    us_TC = _lasted(cycles_TC)
    us_TC *= 1e3 * step_ms / np.median(np.nansum(us_TC, 1))
    bytes_each = 16 // decoder.shape.lane_numbers
    columns: dict[str, list[int]] = {}
    for place, call in enumerate(decoder.writer.calls[1:]):
        columns.setdefault(call.name, []).append(place)
    rows = []
    for name, places in columns.items():
        made_TC = ~np.isnan(us_TC[:, places])
        if not made_TC.any():
            continue
        numbers = np.array([_numbers(decoder.writer.calls[1 + place]) for place in places])
        # Of each call over the steps that made it.
        each = np.nanmedian(us_TC[:, places][:, made_TC.any(0)], 0)
        figures = (
            made_TC.sum(1).mean(), np.median(each), each.min(), each.max(),
            np.nansum(us_TC[:, places], 1).mean(), (made_TC @ numbers).mean() * bytes_each / 1e6,
        )  # fmt: skip
        rows.append(CallRow(variant, name, *map(float, figures)))
    return sorted(rows, key=lambda row: -row.sum_us)


def _lasted(cycles_TC: np.ndarray) -> np.ndarray:
    """Cycles of each call but the first, from the end of the last one made in front; NaN of void ones."""
    ended_TC = np.maximum.accumulate(cycles_TC, 1)
    return np.where(cycles_TC[:, 1:] == 0, np.nan, np.diff(ended_TC).astype(float))


def _numbers(call: Call) -> int:
    """Of a product's matrices."""
    weights = call.arguments.weights if call.is_product else None
    return 0 if weights is None else sum(weights.rows) * weights.columns


def describe(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    settings, host = result["settings"], result["host"]
    lines = [
        f"{settings['geometry'] or settings['model']}, preset {settings['preset']}, {settings['dtype']}, "
        f"{settings['rows']} row(s) behind {settings['prompt_tokens']} tokens, medians of {settings['steps']} steps; "
        f"{host['device']}, torch {host['torch']}, copy bandwidth {host['copy_bytes_per_s'] / 1e12:.3g} TB/s; "
        + ", ".join(
            f"{name}: {ms:.3f} ms a step, {result['skipped'][name]:.1%} of layers skipped"
            for name, ms in result["step_ms"].items()
        ),
        "",
        "| variant | call | made in a step | median µs | min | max | all, µs | weights, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['variant']} | {r['call']} | {r['count']:g} | {r['median_us']:.2f} | {r['min_us']:.2f} "
        f"| {r['max_us']:.2f} | {r['sum_us']:.1f} | {r['weights_mb']:.1f} |"
        for r in result["rows"]
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fbs_rl.bench calls", description=__doc__)
    parser.add_argument("--model", default=SMOLLM2, help="hub id, folder, .gguf or smollm2-135m")
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), help="random weights, this shape")
    parser.add_argument("--preset", default="default", help=f"of {', '.join(sorted(PRESETS))}")
    parser.add_argument("--set", metavar="OPTION=VALUE", nargs="*", default=[])
    parser.add_argument("--skip", type=float, default=0.36, help="share of all layers, forced")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The settings that these words of a command line give."""
    return _parser().parse_args(list(words))
