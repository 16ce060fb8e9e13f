"""Held-out figures while training: perplexity dense and gated, skip rates, lookahead, boundary F1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.model.vocabulary_loss import next_token_labels
from fbs_rl.training.batches import MicroBatch
from fbs_rl.types import BIOS, IGNORED_LABEL

Reduce = Callable[[Tensor], Tensor]
"""Sums a float64 tensor over all ranks, in place of each rank's own."""
_BISECTIONS = 7


@dataclass(slots=True)
class Tally:
    """Sums over tokens; all of one pass, over all ranks once reduced."""

    nll: float = 0.0
    scored: float = 0.0
    places: float = 0.0
    skip_L: Tensor | None = None
    lookahead: float = 0.0
    tokens: float = 0.0
    confusion_44: Tensor | None = None

    @property
    def loss(self) -> float:
        return self.nll / max(self.scored, 1)

    @property
    def skip_rate_L(self) -> Tensor:
        assert self.skip_L is not None
        return self.skip_L / max(self.places, 1)


@torch.no_grad()
def evaluate(
    model: FBSForCausalLM,
    calibration: Sequence[MicroBatch],
    heldout: Sequence[MicroBatch],
    ratios: Sequence[float],
    reduce: Reduce,
) -> dict[str, float]:
    """Figures by name: the dense pass, and at each skip ratio the model's own gates at the threshold that gives it.

    Thresholds are found on `calibration`, figures are of `heldout`; every rank passes batches of its own, as
    many as the others. Losses are of tokens at which gates may act, so that dense and gated are comparable.
    """
    model.eval()
    dense = measure(model, heldout, reduce, gates="dense")
    figures = {"eval/loss_dense": dense.loss, "eval/ppl_dense": math.exp(min(dense.loss, 50))}
    if model.config.paw:
        figures["eval/lookahead"] = dense.lookahead / max(dense.tokens, 1)
    if model.config.chunk and dense.confusion_44 is not None and dense.confusion_44.any():
        figures["eval/boundary_f1"] = macro_f1(dense.confusion_44)
    if not model.config.gate:
        return figures
    free = 1 - len(model.config.protected_layers) / model.config.layer_count
    for ratio in ratios:
        if ratio >= free:
            continue
        tau = find_threshold(model, calibration, ratio, reduce)
        gated = measure(model, heldout, reduce, gates="threshold", tau=tau)
        rate_L = gated.skip_rate_L
        prefix = f"eval/skip_{round(100 * ratio)}"
        figures |= {
            f"{prefix}/loss": gated.loss,
            f"{prefix}/ppl": math.exp(min(gated.loss, 50)),
            f"{prefix}/skip_ratio": float(rate_L.mean()),
            f"{prefix}/tau": tau,
        }
        figures |= {f"{prefix}/layer_{i:02d}": float(rate) for i, rate in enumerate(rate_L)}
    return figures


@torch.no_grad()
def find_threshold(
    model: FBSForCausalLM, batches: Sequence[MicroBatch], ratio: float, reduce: Reduce
) -> float:
    """The tau at which the gates, executed, skip `ratio` of all layers: bisection over its logit."""
    low, high = -model.config.gate_logit_clip, model.config.gate_logit_clip
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        tau = 1 / (1 + math.exp(-middle))
        found = measure(model, batches, reduce, scored=False, gates="threshold", tau=tau)
        low, high = (middle, high) if float(found.skip_rate_L.mean()) > ratio else (low, middle)
    return 1 / (1 + math.exp(-(low + high) / 2))


def measure(
    model: FBSForCausalLM,
    batches: Sequence[MicroBatch],
    reduce: Reduce,
    scored: bool = True,
    skip_of: Callable[[MicroBatch], Tensor] | None = None,
    **gates: Any,
) -> Tally:
    """Sums of one pass over `batches`, with forward()'s gate arguments; skip_of: actions to replay."""
    layers = model.config.layer_count
    sums = torch.zeros(5 + layers + 16, dtype=torch.float64)
    for batch in batches:
        out = model(
            batch.ids_BT,
            batch.valid_BT,
            document_ids=batch.document_BT,
            decode_start=batch.decode_start_B,
            logits_to_keep=0 if scored else 1,
            skip=None if skip_of is None else skip_of(batch),
            **gates,
        )
        gated_BT = batch.gated_BT
        nll, count = _nll(batch, out.logits) if scored else (0.0, 0)
        lookahead = (out.lookahead * gated_BT).mean(0).sum() if out.lookahead is not None else 0.0
        head = [nll, count, float(gated_BT.sum()), float(lookahead), float(gated_BT.sum())]
        skip_L = (out.skip & gated_BT).sum((1, 2)).double().cpu()
        sums += torch.cat(
            (torch.tensor(head, dtype=torch.float64), skip_L, _confusion(batch, out).flatten())
        )
    sums = reduce(sums)
    nll, count, places, lookahead, tokens = sums[:5].tolist()
    return Tally(
        nll, count, places, sums[5 : 5 + layers], lookahead, tokens, sums[5 + layers :].view(4, 4)
    )


def _nll(batch: MicroBatch, logits_BTV: Tensor) -> tuple[float, int]:
    """(Σ −log p of the tokens after gated ones in nats, how many)."""
    target_BT = next_token_labels(batch.labels_BT, batch.document_BT)
    target_BT = target_BT.masked_fill(~batch.gated_BT, IGNORED_LABEL)
    total = 0.0
    for logits_TV, target_T in zip(logits_BTV, target_BT, strict=True):
        loss = F.cross_entropy(
            logits_TV.float(), target_T, ignore_index=IGNORED_LABEL, reduction="sum"
        )
        total += float(loss)
    return total, int((target_BT != IGNORED_LABEL).sum())


def _confusion(batch: MicroBatch, out: Any) -> Tensor:
    """[4, 4] counts by label and prediction of the labelled tokens."""
    if out.boundary_logits is None:
        return torch.zeros(4, 4, dtype=torch.float64)
    labels_BT = batch.chunk_labels.labels_BT
    where = labels_BT != IGNORED_LABEL
    pairs = labels_BT[where] * len(BIOS) + out.boundary_logits.argmax(-1)[where]
    return torch.bincount(pairs, minlength=len(BIOS) ** 2).view(4, 4).double().cpu()


def macro_f1(confusion_44: Tensor) -> float:
    """¼Σ_c 2TP_c / (2TP_c + FP_c + FN_c) over B, I, O, S; a class that never occurs counts 0 (SPEC 7)."""
    hits = confusion_44.diagonal()
    total = confusion_44.sum(0) + confusion_44.sum(1)
    return float((2 * hits / total.clamp_min(1)).mean())
