"""What skipping costs on text, and the threshold that gives a wanted skip ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fbs_rl.model.modeling import FBSForCausalLM


@dataclass(frozen=True, slots=True)
class SkipQuality:
    """nll: mean over the scored tokens, in nats. skip_ratio: over all layers and gated tokens."""

    nll: float
    skip_ratio: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


@torch.inference_mode()
def measure_quality(
    model: FBSForCausalLM, sequences_NT: Tensor, decode_start: int, batch: int = 4, **gates: Any
) -> SkipQuality:
    """NLL of the tokens after `decode_start` with gates acting from there on.

    gates: forward()'s gate arguments; a `skip` [L, N, T] is sliced along with the sequences.
    """
    nll, skipped, tokens, places = 0.0, 0, 0, 0
    for first in range(0, len(sequences_NT), batch):
        ids_BT = sequences_NT[first : first + batch].to(model.device)
        call = dict(gates)
        if call.get("skip") is not None:
            call["skip"] = call["skip"][:, first : first + batch].to(model.device)
        out = model(ids_BT, decode_start=decode_start, **call)
        logits = out.logits[:, decode_start:-1].flatten(0, 1).float()
        target = ids_BT[:, decode_start + 1 :].flatten()
        nll += float(F.cross_entropy(logits, target, reduction="sum"))
        tokens += len(target)
        skipped += int(out.skip[:, :, decode_start:].sum())
        places += out.skip[:, :, decode_start:].numel()
    return SkipQuality(nll / max(tokens, 1), skipped / max(places, 1), tokens)


@torch.inference_mode()
def measure_skip(
    model: FBSForCausalLM, sequences_NT: Tensor, decode_start: int, batch: int = 4, **gates: Any
) -> float:
    """The share of all layers and gated tokens that is skipped; measure_quality without the vocabulary."""
    skipped, places = 0, 0
    for first in range(0, len(sequences_NT), batch):
        ids_BT = sequences_NT[first : first + batch].to(model.device)
        out = model(ids_BT, decode_start=decode_start, logits_to_keep=1, **gates)
        skipped += int(out.skip[:, :, decode_start:].sum())
        places += out.skip[:, :, decode_start:].numel()
    return skipped / max(places, 1)


def calibrate_tau(
    model: FBSForCausalLM,
    sequences_NT: Tensor,
    decode_start: int,
    skip_ratio: float,
    steps: int = 8,
    batch: int = 4,
) -> float:
    """The threshold at which the model's own gates skip `skip_ratio` of all layers, to 2^-steps of tau's logit range.

    Bisection with the gates executed, since every skip changes the gates after it; the ratio falls as tau
    rises. Raises ValueError if more is asked for than the layers that may skip.
    """
    free = model.config.layer_count - len(model.config.protected_layers)
    if not 0 < skip_ratio < free / model.config.layer_count:
        raise ValueError(
            f"a skip ratio of {skip_ratio} was asked for; {free} of {model.config.layer_count} layers may skip, "
            f"so it must lie between 0 and {free / model.config.layer_count:.2f}"
        )
    low, high = -model.config.gate_logit_clip, model.config.gate_logit_clip
    for _ in range(steps):
        middle = (low + high) / 2
        tau = 1 / (1 + math.exp(-middle))
        found = measure_skip(model, sequences_NT, decode_start, batch, gates="threshold", tau=tau)
        low, high = (middle, high) if found > skip_ratio else (low, middle)
    return 1 / (1 + math.exp(-(low + high) / 2))
