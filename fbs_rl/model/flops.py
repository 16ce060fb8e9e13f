"""What decoding costs: an exact count of matrix-product work for any trace of skips, and of bytes a step moves.

Convention: FLOPs = 2 × multiply-accumulates (MACs) of matrix products only, as torch.utils.flop_counter has
it: linear layers, attention scores and mixing, PAW's shortlist, scores, expectation and convolution, chunk
attention, gates, adapter, LM head. Not counted: elementwise work, norms, the gate's motion, rotary
positions, softmax, top-k, embedding lookups (they are bytes) and what is derived once per model (E_r, the
mean horizon map).

The count is what a token's own decisions ask for. Limit: in a batch whose rows disagree, run_step also runs
the attention product for rows that skip, and its cache holds masked columns; neither is counted.

Shape letters: L layers, B batch rows, T decoded tokens.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.cost_model import CostModel
from fbs_rl.types import KVPolicy

if TYPE_CHECKING:
    from fbs_rl.model.modeling import FBSForCausalLM

_OPEN_SUM_BYTES = 4  # the running sum of an open chunk is float32 whatever the model's type
_BACKBONE_PARTS = ("projections", "attention", "mlp", "lm_head")


@dataclass(frozen=True, slots=True)
class TraceCost:
    """FLOPs of a trace; int64 tensors, zero where a token is not counted.

    flops_BT: executed. dense_flops_BT: C_full, the same model and trace with nothing skipped and no gates
    (PAW and the Chunk-Head run). backbone_flops_BT: the backbone alone, without FBS modules.
    components: executed FLOPs by part, summed over tokens. skip_ratio: over all layers.
    """

    flops_BT: Tensor
    dense_flops_BT: Tensor
    backbone_flops_BT: Tensor
    components: dict[str, int]
    skip_ratio: float

    @property
    def executed_frac(self) -> float:
        """C / C_full; above 1 where gates cost more than skips save."""
        return int(self.flops_BT.sum()) / int(self.dense_flops_BT.sum())

    @property
    def paper_ratio(self) -> float:
        """The paper's eq (4), Σ(1 − z)/(L·T): every layer costs the same and nothing else costs."""
        return 1.0 - self.skip_ratio

    def describe(self) -> str:
        """A few lines for people: both ratios, the modules' overhead, shares of the parts."""
        total, backbone = int(self.flops_BT.sum()), int(self.backbone_flops_BT.sum())
        tokens = int((self.flops_BT > 0).sum())
        shares = ", ".join(f"{k} {n / total:.2%}" for k, n in self.components.items() if n)
        return (
            f"executed FLOPs / dense FLOPs  {self.executed_frac:.4f}   "
            f"(eq 4: {self.paper_ratio:.4f} at skip ratio {self.skip_ratio:.4f})\n"
            f"dense FLOPs / plain backbone  {int(self.dense_flops_BT.sum()) / backbone:.4f}   "
            f"executed / plain backbone {total / backbone:.4f}\n"
            f"executed per token            {total / tokens / 1e9:.4g} GFLOP over {tokens} tokens\n"
            f"shares                        {shares}"
        )


@dataclass(frozen=True, slots=True)
class _Trace:
    """ran, skipped: disjoint, neither on padding. keys: visible to the token, itself included."""

    ran_LBT: Tensor
    skipped_LBT: Tensor
    keys_LBT: Tensor
    valid_BT: Tensor
    chunks_BT: Tensor
    closes_BT: Tensor
    gates_on: bool


def count_trace(
    config: FBSConfig,
    skip_LBT: Tensor,
    context_start_B: Tensor,
    gates_on: bool,
    closed_chunks_BT: Tensor | None = None,
    opens_BT: Tensor | None = None,
    valid_BT: Tensor | None = None,
    counted_BT: Tensor | None = None,
) -> TraceCost:
    """Cost of decoding T tokens a row behind prompts of context_start_B tokens (0: the trace is everything).

    skip_LBT: z, what was executed. gates_on: gates were computed; True for replayed decisions that a gate
    took. closed_chunks_BT: chunks closed before the token, opens_BT: the token opens a chunk (and closes
    the one before); None: no chunk ever closes, which understates the Chunk-Head. valid_BT: False on
    padding. counted_BT: whose cost is asked for (None: all valid tokens); the others still leave keys.
    Raises ValueError for shapes that do not fit, protected layers that skip, or nothing to count.
    """
    _check_trace(config, skip_LBT, context_start_B, gates_on, (closed_chunks_BT, opens_BT))
    valid_BT = torch.ones_like(skip_LBT[0]) if valid_BT is None else valid_BT.bool()
    counted_BT = valid_BT if counted_BT is None else counted_BT.bool() & valid_BT
    if not bool(counted_BT.any()):
        raise ValueError("no token to count: valid_BT and counted_BT leave none")
    skipped_LBT = skip_LBT & valid_BT
    earlier_BT = context_start_B.unsqueeze(1) + valid_BT.long().cumsum(1) - valid_BT.long()
    nothing_BT = torch.zeros_like(earlier_BT)
    chunks_BT = nothing_BT if closed_chunks_BT is None else closed_chunks_BT.long()
    closes_BT = nothing_BT.bool()
    if opens_BT is not None:  # the first token of all opens a chunk and closes none
        closes_BT = opens_BT.bool() & valid_BT & (earlier_BT > 0)
    keys_LBT = visible_keys(config, skip_LBT, context_start_B, valid_BT)
    taken = _Trace(
        ~skip_LBT & valid_BT, skipped_LBT, keys_LBT, valid_BT, chunks_BT, closes_BT, gates_on
    )
    none_LBT = torch.zeros_like(skip_LBT)
    dense = _Trace(
        ~none_LBT & valid_BT, none_LBT, (earlier_BT + 1).expand_as(keys_LBT), valid_BT, chunks_BT, closes_BT, False
    )  # fmt: skip
    taken_flops = {k: 2 * macs * counted_BT for k, macs in _macs(config, taken).items()}
    dense_flops = {k: 2 * macs * counted_BT for k, macs in _macs(config, dense).items()}
    return TraceCost(
        flops_BT=torch.stack(list(taken_flops.values())).sum(0),
        dense_flops_BT=torch.stack(list(dense_flops.values())).sum(0),
        backbone_flops_BT=torch.stack([dense_flops[k] for k in _BACKBONE_PARTS]).sum(0),
        components={k: int(flops.sum()) for k, flops in taken_flops.items()},
        skip_ratio=int((skipped_LBT & counted_BT).sum()) / (len(skip_LBT) * int(counted_BT.sum())),
    )


def _check_trace(
    config: FBSConfig, skip_LBT: Tensor, start_B: Tensor, gates_on: bool, chunks: tuple[Tensor | None, ...]
) -> None:  # fmt: skip
    if skip_LBT.ndim != 3 or len(skip_LBT) != config.layer_count or skip_LBT.dtype != torch.bool:
        raise ValueError(
            f"skip needs bool [{config.layer_count} layers, B, T], "
            f"got {skip_LBT.dtype} {tuple(skip_LBT.shape)}"
        )
    if start_B.shape != skip_LBT.shape[1:2]:
        raise ValueError(
            f"context_start needs one length a row, got {tuple(start_B.shape)} for {skip_LBT.shape[1]} rows"
        )
    if (chunks[0] is None) != (chunks[1] is None):
        raise ValueError("give closed_chunks_BT and opens_BT together, or neither")
    if gates_on and not config.gate:
        raise ValueError("gates_on is true but the model has no gates")
    forced = sorted(config.protected_layers)
    if forced and bool(skip_LBT[forced].any()):
        raise ValueError(f"skip names layers that never skip ({forced})")


def visible_keys(
    config: FBSConfig, skip_LBT: Tensor, context_start_B: Tensor, valid_BT: Tensor | None = None
) -> Tensor:
    """Keys that a token sees at each layer if it runs it, its own included: int64 [L, B, T].

    `noop`: the prompt and the earlier tokens that ran the layer; `project`: all earlier tokens.
    """
    left_entry_LBT = torch.ones_like(skip_LBT) if valid_BT is None else valid_BT.expand_as(skip_LBT)
    if config.kv_on_skip == KVPolicy.NOOP:
        left_entry_LBT = left_entry_LBT & ~skip_LBT
    entries_LBT = left_entry_LBT.long()
    return context_start_B.view(1, -1, 1) + entries_LBT.cumsum(2) - entries_LBT + 1


def closed_chunks(opens_BT: Tensor) -> Tensor:
    """Chunks closed before each token of whole sequences (no prompt behind them): int64 [B, T].

    opens_BT: as in ChunkTap; False on padding.
    """
    opens_BT = opens_BT.long()
    return (opens_BT.cumsum(1) - opens_BT - 1).clamp_min(0)


def _macs(config: FBSConfig, trace: _Trace) -> dict[str, Tensor]:
    """MACs [B, T] of every part."""
    cost, ran_LBT = CostModel.of(config), trace.ran_LBT.long()
    ran_BT, skipped_BT, valid_BT = ran_LBT.sum(0), trace.skipped_LBT.sum(0), trace.valid_BT.long()
    projects = config.kv_on_skip == KVPolicy.PROJECT
    previews, readers = list(config.preview_layers), list(config.reader_layers)
    slots_BT = trace.chunks_BT.clamp_max(config.chunk_cache) + 1  # and the null slot
    read_BT = cost.read.macs + cost.chunk_macs * slots_BT
    look = cost.shortlist.macs + len(previews) * cost.look.macs
    gates_BT = len(config.gate_leaders) * cost.gate.macs * valid_BT
    return {
        "projections": (cost.query_out.macs + cost.key_value.macs) * ran_BT,
        "attention": cost.key_macs * (trace.keys_LBT * ran_LBT).sum(0),
        "mlp": cost.mlp.macs * ran_BT,
        "lm_head": cost.head.macs * valid_BT,
        "skipped_kv": projects * cost.key_value.macs * skipped_BT,
        "adapter": cost.adapter.macs * skipped_BT,
        "preview": look * valid_BT + cost.inject.macs * ran_LBT[previews].sum(0),
        "chunks": cost.boundary.macs * valid_BT
        + read_BT * ran_LBT[readers].sum(0)
        + len(readers) * cost.close.macs * trace.closes_BT,
        "gates": gates_BT * trace.gates_on,
    }


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that one decoding step of a batch moves; activations are not among them.

    weights: every weight once for each layer that uses it (PAW's shared projections once a PAW layer: by then
    hundreds of megabytes have passed through the chip's cache). rows: gathered rows of embedding tables.
    kv: keys and values. chunks: closed chunks and the running sums of open ones.
    """

    weights: float
    rows: float
    kv_read: float
    kv_written: float
    chunks_read: float
    chunks_written: float

    @property
    def total(self) -> float:
        return sum(astuple(self))


def step_bytes(
    config: FBSConfig,
    skip_LB: Tensor,
    keys_LB: Tensor,
    gates_on: bool,
    bytes_per_weight: float,
    bytes_per_entry: float,
    closed_chunks_B: Tensor | None = None,
    closes_B: Tensor | None = None,
) -> StepBytes:
    """Bytes of one step. keys_LB: as visible_keys; the token's own entry is written, then read with the rest.

    A layer's weights are read if any row runs it, its adapter if any row skips it; if nobody runs it,
    `project` still reads those of keys and values. bytes_per_entry: of one number in the caches.
    """
    cost, rows = CostModel.of(config), skip_LB.shape[1]
    none_B = torch.zeros(rows, dtype=torch.long, device=skip_LB.device)
    chunks_B = none_B if closed_chunks_B is None else closed_chunks_B
    closing_B = none_B if closes_B is None else closes_B
    projects = config.kv_on_skip == KVPolicy.PROJECT
    previews, readers = list(config.preview_layers), list(config.reader_layers)
    run_L = (~skip_LB).any(1)
    weights = (
        cost.head.weights
        + int(run_L.sum()) * cost.layer.weights
        + int((~run_L).sum()) * projects * cost.key_value.weights
        + int(skip_LB.any(1).sum()) * cost.adapter.weights
        + cost.shortlist.weights
        + len(previews) * cost.look.weights
        + int(run_L[previews].sum()) * cost.inject.weights
        + cost.boundary.weights
        + int(run_L[readers].sum()) * cost.read.weights
        + len(readers) * bool(closing_B.any()) * cost.close.weights
        + gates_on * len(config.gate_leaders) * cost.gate.weights
    )
    gathered = 1 + 3 * config.segment_position
    if config.paw and config.paw_embed_space == "full":
        gathered += config.paw_shortlist
    assert config.head_dim is not None and config.num_key_value_heads is not None
    entry = 2 * config.num_key_value_heads * config.head_dim * bytes_per_entry
    chunk, open_sums = (
        2 * config.chunk_width * bytes_per_entry,
        rows * len(readers) * config.hidden_size,
    )
    read_B = (~skip_LB)[readers].sum(0) * chunks_B.clamp_max(config.chunk_cache)
    written = skip_LB.numel() if projects else int((~skip_LB).sum())
    return StepBytes(
        weights=weights * bytes_per_weight,
        rows=rows * gathered * config.hidden_size * bytes_per_weight,
        kv_read=int((keys_LB * ~skip_LB).sum()) * entry,
        kv_written=written * entry,
        chunks_read=int(read_B.sum()) * chunk + open_sums * _OPEN_SUM_BYTES,
        chunks_written=int(closing_B.sum()) * len(readers) * chunk + open_sums * _OPEN_SUM_BYTES,
    )


def parameter_counts(model: FBSForCausalLM) -> dict[str, int]:
    """Parameters of the backbone, those that FBS added, and both; a tied table counts once."""
    total = sum(p.numel() for p in model.parameters())
    new = sum(p.numel() for _, p in model.model.new_parameters())
    return {"backbone": total - new, "new": new, "total": total}
