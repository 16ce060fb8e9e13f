"""From the trace of a decoded segment to what the reward is computed from.

Whoever decoded it may use this: the single environment, or a fleet that returns tokens, skips and NLLs.
A segment of N continuation tokens has N - 1 gate columns: column j is the step that feeds token j, whose
skips act on the probability of token j + 1. Token 0 is predicted by the prompt, which never skips.

Shape letters: L layers, N tokens of the segment, T = N - 1 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from envs.settings import PolicyCost
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.flops import TraceCost, count_trace
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.rl.reward import Sampler, SegmentKind, SegmentOutcome
from fbs_rl.types import GateMode


@dataclass(frozen=True, slots=True)
class SegmentTrace:
    """What happened to one continuation of a prompt.

    token_ids: N >= 1. nll_gated_N: float64, nats. skip_LT: bool, what was executed. closed_chunks: chunks
    closed after the prompt and after each fed token (N numbers); None where that is not known, which
    understates the Chunk-Head.
    """

    kind: SegmentKind
    sampled_by: Sampler
    prompt_tokens: int
    token_ids: tuple[int, ...]
    nll_gated_N: Tensor
    skip_LT: Tensor
    closed_chunks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        tokens = len(self.token_ids)
        if tokens == 0 or self.nll_gated_N.shape != (tokens,):
            raise ValueError(
                f"a segment needs a token and one NLL for each, got {tokens} tokens and "
                f"NLLs {tuple(self.nll_gated_N.shape)}"
            )
        if self.skip_LT.ndim != 2 or self.skip_LT.shape[1] != tokens - 1:
            raise ValueError(
                f"a segment of {tokens} tokens needs skips of {tokens - 1} columns, "
                f"got {tuple(self.skip_LT.shape)}"
            )
        if self.closed_chunks is not None and len(self.closed_chunks) != tokens:
            raise ValueError(
                f"a segment of {tokens} tokens needs as many counts of closed chunks, "
                f"got {len(self.closed_chunks)}"
            )

    @property
    def columns(self) -> int:
        return self.skip_LT.shape[1]


def segment_cost(config: FBSConfig, trace: SegmentTrace, cost: PolicyCost) -> TraceCost | None:
    """Exact FLOPs of the segment's columns; None if it has none."""
    if trace.columns == 0:
        return None
    closed, opens = None, None
    if trace.closed_chunks is not None:
        counts = torch.tensor([trace.closed_chunks])
        closed, opens = counts[:, :-1], counts.diff() > 0
    return count_trace(
        config,
        trace.skip_LT.unsqueeze(1),
        torch.tensor([trace.prompt_tokens]),
        cost is PolicyCost.GATES,
        closed,
        opens,
    )


@torch.inference_mode()
def dense_nll(model: FBSForCausalLM, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Tensor:
    """NLL [N] of a continuation with nothing skipped, float64, nats: one parallel pass."""
    ids_1T = torch.tensor([[*prompt_ids, *token_ids[:-1]]], device=model.device)
    out = model(ids_1T, gates=GateMode.DENSE, logits_to_keep=len(token_ids))
    log_prob_NV = out.logits[0].double().log_softmax(-1)
    chosen_N1 = torch.tensor(token_ids, device=model.device).unsqueeze(1)
    return -log_prob_NV.gather(1, chosen_N1).squeeze(1).cpu()


def segment_outcome(
    config: FBSConfig, trace: SegmentTrace, nll_dense_N: Tensor, cost: PolicyCost
) -> SegmentOutcome:
    """The segment as the reward reads it."""
    counted = segment_cost(config, trace, cost)
    return SegmentOutcome.of(trace.kind, trace.sampled_by, counted, trace.nll_gated_N, nll_dense_N)
