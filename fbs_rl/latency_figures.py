"""From samples to figures: medians, the interval of a difference, bytes and FLOPs, a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fbs_rl.latency_engines import Engine, OwnClock, Variant, Workload
from fbs_rl.latency_protocol import Sample
from fbs_rl.model.flops import count_trace, step_bytes, visible_keys
from fbs_rl.types import GateMode

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Figures:
    """One variant at one batch size. Milliseconds of a whole request, of its prefill, and of a step.

    engine: as in Variant.
    ratio: the median request over the first variant's; difference_ms, with the 95 % interval of low_ms and
    high_ms: its median less the first's. vllm_ratio: over stock vLLM's, None where that did not run.
    tokens_per_s: rows · new tokens / request. floor_ms: a step's bytes over the copy bandwidth; floor_share: of
    the step that this is. low_entropy_tokens_per_s and high_entropy_tokens_per_s: decoding alone, of the half of
    the tokens that is easier and the half that is not; None for an engine that tells no entropies.
    """

    batch: int
    variant: str
    engine: str
    request_ms: float
    request_p95_ms: float
    prefill_ms: float
    prefill_p95_ms: float
    step_ms: float
    step_p95_ms: float
    tokens_per_s: float
    ratio: float
    vllm_ratio: float | None
    difference_ms: float
    low_ms: float
    high_ms: float
    step_ratio: float
    skip_ratio: float
    flops_a_token: float
    flops_frac: float
    bytes_a_step: float
    floor_ms: float
    floor_share: float
    low_entropy_tokens_per_s: float | None
    high_entropy_tokens_per_s: float | None
    own_mb: float | None
    peak_mb: float | None


def make_figures(
    variant: Variant, engine: Engine | OwnClock, sample: Sample, first: Sample, load: Workload, bandwidth: float,
    bytes_per_number: int, stock: Sample | None = None,
) -> Figures:  # fmt: skip
    """Figures of a sample beside the first variant's, and stock vLLM's, taken in the same rounds."""
    request_R, base_R = _requests(sample), _requests(first)
    request, step = float(np.median(request_R)), float(np.median(sample.step_RT.mean(1)))
    low, high = bootstrap_interval(request_R, base_R)
    cost = _cost(variant, engine, sample, load, bytes_per_number)
    easy, hard = (None, None) if sample.entropy_T is None else entropy_slices(sample, load.rows)
    return Figures(
        batch=load.rows,
        variant=variant.name,
        engine=variant.engine,
        request_ms=request,
        request_p95_ms=float(np.quantile(request_R, 0.95)),
        prefill_ms=float(np.median(sample.prefill_R)),
        prefill_p95_ms=float(np.quantile(sample.prefill_R, 0.95)),
        step_ms=step,
        step_p95_ms=float(np.quantile(sample.step_RT, 0.95)),
        tokens_per_s=1e3 * load.rows * load.new_tokens / request,
        ratio=request / float(np.median(base_R)),
        vllm_ratio=None if stock is None else request / float(np.median(_requests(stock))),
        difference_ms=request - float(np.median(base_R)),
        low_ms=low,
        high_ms=high,
        step_ratio=step / float(np.median(first.step_RT.mean(1))),
        **cost,
        floor_ms=1e3 * cost["bytes_a_step"] / bandwidth,
        floor_share=1e3 * cost["bytes_a_step"] / bandwidth / step,
        low_entropy_tokens_per_s=easy,
        high_entropy_tokens_per_s=hard,
        own_mb=None if sample.own_bytes is None else sample.own_bytes / 1e6,
        peak_mb=None if sample.peak_bytes is None else sample.peak_bytes / 1e6,
    )


def _requests(sample: Sample) -> np.ndarray:
    return sample.prefill_R + sample.step_RT.sum(1)


def bootstrap_interval(one_R: np.ndarray, other_R: np.ndarray) -> tuple[float, float]:
    """95 % interval of median(one) − median(other) over runs taken in turns: both are drawn by the same rounds."""
    draws = np.random.default_rng(0).integers(0, len(one_R), (_RESAMPLES, len(one_R)))
    differences = np.median(one_R[draws], axis=1) - np.median(other_R[draws], axis=1)
    low, high = np.quantile(differences, (0.025, 0.975))
    return float(low), float(high)


def entropy_slices(sample: Sample, rows: int) -> tuple[float, float]:
    """Tokens a second on the half of the steps whose next token is surest, and on the other half."""
    assert sample.entropy_T is not None
    order_T = np.argsort(sample.entropy_T, kind="stable")
    step_T = np.median(sample.step_RT, axis=0)
    half = len(order_T) // 2
    easy, hard = step_T[order_T[:half]], step_T[order_T[half:]]
    return (1e3 * rows / float(easy.mean()) if half else float("nan")), 1e3 * rows / float(hard.mean())  # fmt: skip


def _cost(
    variant: Variant,
    engine: Engine | OwnClock,
    sample: Sample,
    load: Workload,
    bytes_per_number: int,
) -> dict[str, float]:
    """Exact counts: skip ratio, FLOPs a token and as a share of the same model dense, bytes a step (mean)."""
    config, gates_on = engine.config, variant.mode is not GateMode.DENSE
    shape = (config.layer_count, load.rows, load.new_tokens)
    trace = sample.trace
    skip_LBT = torch.zeros(shape, dtype=torch.bool) if trace.skip_LBT is None else trace.skip_LBT
    start_B = torch.full((load.rows,), load.prompt_tokens)
    cost = count_trace(config, skip_LBT, start_B, gates_on, trace.closed_chunks_BT, trace.opens_BT)
    keys_LBT = visible_keys(config, skip_LBT, start_B)
    steps = []
    for t in range(load.new_tokens):
        chunks = [x if x is None else x[:, t] for x in (trace.closed_chunks_BT, trace.opens_BT)]
        moved = step_bytes(
            config, skip_LBT[..., t], keys_LBT[..., t], gates_on, bytes_per_number, bytes_per_number, *chunks
        )  # fmt: skip
        steps.append(moved.total)
    return {
        "skip_ratio": cost.skip_ratio,
        "flops_a_token": float(cost.flops_BT.double().mean()),
        "flops_frac": cost.executed_frac,
        "bytes_a_step": float(np.mean(steps)),
    }


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Figures (as dictionaries, so that saved ones can be read again) as Markdown."""
    # Results that were saved without stock vLLM have no ratio to it.
    against_vllm = any(r.get("vllm_ratio") is not None for r in rows)
    lines = [
        "| batch | variant | layers skipped | request ms (p95) | prefill ms | step ms (p95) | floor ms (share) "
        "| tokens/s | request / first "
        + "| request / vLLM "
        * against_vllm
        + "| difference ms (95 %) "
        "| step / first | GFLOP/token (share) | easy, hard tokens/s | own, peak MB |",
        "|" + "---|" * (14 + against_vllm),
    ]
    for r in rows:
        memory = "-" if r["own_mb"] is None else f"{r['own_mb']:.0f}, {r['peak_mb']:.0f}"
        easy, hard = r["low_entropy_tokens_per_s"], r["high_entropy_tokens_per_s"]
        slices = "-" if hard is None else f"{easy:.1f}, {hard:.1f}"
        beside = f"| {r['vllm_ratio']:.3f} " if against_vllm else ""
        lines.append(
            f"| {r['batch']} | {r['variant']} | {r['skip_ratio']:.1%} "
            f"| {r['request_ms']:.1f} ({r['request_p95_ms']:.1f}) | {r['prefill_ms']:.2f} "
            f"| {r['step_ms']:.3f} ({r['step_p95_ms']:.3f}) | {r['floor_ms']:.3f} ({r['floor_share']:.0%}) "
            f"| {r['tokens_per_s']:.1f} | {r['ratio']:.3f} {beside}"
            f"| {r['difference_ms']:+.2f} ({r['low_ms']:+.2f} to {r['high_ms']:+.2f}) | {r['step_ratio']:.3f} "
            f"| {r['flops_a_token'] / 1e9:.3g} ({r['flops_frac']:.1%}) | {slices} | {memory} |"
        )
    return "\n".join(lines)


def draw_steps(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of the step's time over its floor, by batch and variant, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [f"{r['variant']}, B={r['batch']}" for r in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes.barh(names, [r["step_ms"] for r in rows], color="lightsteelblue", label="step")
    axes.barh(names, [r["floor_ms"] for r in rows], height=0.4, label="bytes at copy bandwidth")
    axes.invert_yaxis()
    axes.set(xlabel="ms a step, median")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
