"""Shared types. Read this first: every name that crosses a module boundary is defined here.

Shape letters used everywhere: B batch rows, T tokens, L layers, d hidden size, H heads, V vocabulary,
K preview horizons, M shortlist size, R preview rank, N chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput


class GateMode(StrEnum):
    """What decides whether a token skips a layer."""

    DENSE = "dense"  # nothing is skipped
    THRESHOLD = "threshold"  # z = 1[p >= tau]; with gradients: straight-through on the sharpened p
    SAMPLE = "sample"  # z ~ Bernoulli(p) from stateless noise; with gradients: straight-through
    REPLAY = "replay"  # z is given by the caller


class KVPolicy(StrEnum):
    """What a skipped token leaves in the layer's key/value cache (SPEC 4.6). There is no `stale`."""

    PROJECT = "project"  # keys and values are still computed from the identity state
    NOOP = "noop"  # no entry: later tokens cannot attend to it in this layer


class SkippingRows(StrEnum):
    """What a decoding step does with the rows that skip a layer. Both give the same, up to rounding."""

    DROPPED = (
        "dropped"  # left out of its products, and the layer not entered if all skip: asks the host
    )
    MASKED = "masked"  # computed and not taken: saves nothing, and a GPU never waits for the host


class SkipPathKind(StrEnum):
    IDENTITY = "identity"
    ADAPTER = "adapter"


class Compression(StrEnum):
    """How the K expected embeddings of a preview become one vector (SPEC 2.5)."""

    CONV = "conv"  # grouped convolution over horizons, SiLU, weighted mean
    MEAN = "mean"  # weighted mean
    LINEAR = "linear"  # one learned matrix over all horizons
    NONE = "none"  # all horizons side by side, uncompressed


class GateInputs(StrEnum):
    RESIDUAL = "residual"
    PREVIEW = "preview"
    BOTH = "both"


BIOS = ("B", "I", "O", "S")
"""Boundary classes in the order of the boundary head's outputs."""
B_LABEL, I_LABEL, O_LABEL, S_LABEL = range(4)
IGNORED_LABEL = -100
"""Label of a position that takes part in no loss (the convention of torch's cross entropy)."""


@dataclass(slots=True)
class ChunkLabels:
    """Pseudo-labels for the Chunk-Head.

    labels_BT: int64 BIOS class, or IGNORED_LABEL where there is none (English, padding).
    coverage_B: share of the Chinese-aligned spans of a sequence that a retained chunk touches, in
        [0, 1]; NaN for a sequence without Chinese.
    force_cross_entropy: no CTC yet. A fresh four-class head is unsure everywhere and would never leave CTC.
    class_weights_C: weight of each BIOS class in the cross entropy; None: inverse frequency in this batch,
        which makes the loss depend on how a step is cut into batches.
    """

    labels_BT: Tensor
    coverage_B: Tensor
    force_cross_entropy: bool = False
    class_weights_C: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels_BT.ndim != 2 or self.coverage_B.shape != self.labels_BT.shape[:1]:
            raise ValueError(
                f"chunk labels need labels [B, T] and coverage [B], "
                f"got {tuple(self.labels_BT.shape)} and {tuple(self.coverage_B.shape)}"
            )


@dataclass(slots=True)
class PreviewTap:
    """What one Preview-Attention Window (PAW) layer predicted, kept for the losses.

    query_BTR: the token's query before the per-horizon maps A_h. window_BT: expected lookahead ŵ.
    inclusion_BTK: α. layer: index of the layer.
    """

    layer: int
    query_BTR: Tensor
    window_BT: Tensor
    inclusion_BTK: Tensor


@dataclass(slots=True)
class ChunkTap:
    """What the Chunk-Head saw in a parallel pass, kept for the losses.

    blank_logits_BT: logit of CTC's blank class. close_prob_BT: p_close = π(B)+π(S)+π(O). opens_BT: the
    token opens a chunk. chunk_id_BT: which chunk a token belongs to (-1: padding). summaries: per chunk
    layer, u [B, N, width].
    """

    boundary_logits_BT4: Tensor
    blank_logits_BT: Tensor
    close_prob_BT: Tensor
    opens_BT: Tensor
    chunk_id_BT: Tensor
    summaries: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class DenseReference:
    """The distribution that distillation pulls towards, as what it is computed from (logits would be [B, T, V]).

    state_BTd: the reference model's final normed states. head_Vd: its output embedding.
    """

    state_BTd: Tensor
    head_Vd: Tensor


@dataclass(slots=True, frozen=True)
class LossCounts:
    """Over how many items each loss is a mean. All of them follow from the data, none from the model.

    lm: labelled next tokens. preview: tokens whose preview is scored. window: those of them with all
    horizons known. gated: tokens at which gates may act. rows: sequences.
    """

    lm: float
    preview: float
    window: float
    gated: float
    rows: float


@dataclass(slots=True, frozen=True)
class LossScope:
    """The optimizer step that a call is a part of, so that losses do not depend on how the step is cut.

    counts: of the whole step, over all its calls and ranks. Each loss part of a call is then its share:
    the parts of all calls add up to the step's. rate_L and window_P: mean skip rate per layer and mean
    window per PAW layer of the step before, at which the two penalties that are squares of a mean over
    the whole step are linearised (None: they act from the next step on). preview_scale: factor on the
    weight of L_preview, which training warms up.
    """

    counts: LossCounts
    rate_L: Tensor | None = None
    window_P: Tensor | None = None
    preview_scale: float = 1.0


@dataclass(slots=True)
class LossReport:
    """What the objective found in one call.

    total: weighted sum. parts: by name, unweighted. rate_sum_L: Σ over gated tokens of what stands for
    the skip rate. entropy_sum: Σ over layers and gated tokens, nats. window_sum_P: Σ of ŵ over the
    scored tokens with all horizons known. The sums are detached.
    """

    total: Tensor
    parts: dict[str, Tensor]
    counts: LossCounts
    rate_sum_L: Tensor | None = None
    entropy_sum: Tensor | None = None
    window_sum_P: Tensor | None = None


@dataclass(slots=True)
class PassTaps:
    """Intermediate quantities of a parallel pass that the objective reads."""

    previews: list[PreviewTap] = field(default_factory=list)
    chunks: ChunkTap | None = None
    final_state_BTd: Tensor | None = None
    gated_BT: Tensor | None = None  # True where a gate may act (a decoded, valid token)
    valid_BT: Tensor | None = None
    soft_skip_LBT: Tensor | None = None  # z̃ = z + p − sg(p), for rate penalties
    miss_ABT: Tensor | None = (
        None  # relative squared error of each of the A skip adapters, if asked for
    )
    states: list[Tensor] = field(default_factory=list)  # h entering each layer, of a parallel pass


@dataclass
class FBSOutput(ModelOutput):
    """What FBSForCausalLM.forward returns.

    loss: weighted sum of `loss_parts` (only with labels). logits [B, T, V]. gate_prob [L, B, T]:
    probability that the layer is skipped, 0 where no gate acts. skip [L, B, T] bool: what was
    executed. lookahead [P, B, T]: ŵ at each of the P PAW layers. boundary_logits [B, T, 4].
    loss_report: the parts with the sums behind them, for a step made of several calls.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    gate_prob: Tensor | None = None
    skip: Tensor | None = None
    lookahead: Tensor | None = None
    boundary_logits: Tensor | None = None
    loss_parts: dict[str, Tensor] | None = None
    loss_report: LossReport | None = None
    taps: PassTaps | None = None


@dataclass(slots=True, frozen=True)
class GateRequest:
    """Who decides, and with which settings, for one call of the model.

    tau_B: threshold per row. seed_B: noise seed per row (SAMPLE). skip_LBT: actions (REPLAY).
    temperature sharpens p around tau in THRESHOLD mode with gradients; it does not move decisions.
    noise_LBT: what p is compared with in SAMPLE mode, in place of the seed's own uniform numbers.
    never_skip: layers that always run, in addition to the configuration's.
    """

    mode: GateMode
    tau_B: Tensor
    decode_start_B: Tensor
    temperature: float = 1.0
    seed_B: Tensor | None = None
    skip_LBT: Tensor | None = None
    never_skip: frozenset[int] = frozenset()
    noise_LBT: Tensor | None = None


def as_row_vector(
    value: float | int | Tensor, rows: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`value` as a [rows] tensor; a scalar is repeated.

    Raises ValueError if a vector has another length.
    """
    if isinstance(value, (int, float)):  # filled on the device: a copy to it would wait for it
        return torch.full((rows,), value, dtype=dtype, device=device)
    vector = torch.as_tensor(value, dtype=dtype, device=device)
    if vector.ndim == 0:
        return vector.expand(rows)
    if vector.shape != (rows,):
        raise ValueError(
            f"expected one value or {rows} (one a row), got shape {tuple(vector.shape)}"
        )
    return vector
