"""What a set of episodes says in numbers and words: means of the reward's terms, skips by layer, shaded texts.

Letters: L layers, T gate columns.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.rl.credit import ScoredEpisode
from fbs_rl.rl.reward import SegmentKind
from fbs_rl.rl.rollout import SegmentRollout


def heldout_figures(scored: Sequence[ScoredEpisode], config: FBSConfig) -> dict[str, Any]:
    """Means over episodes of the reward and its terms; skips over all columns; perplexity of gold tokens."""
    rewards = [each.reward for each in scored]
    skip_TL = np.concatenate([s.trace.skip_TL for e in scored for s in e.episode.segments])
    gold = [s for e in scored for s in e.episode.segments if s.kind is SegmentKind.GOLD]
    flops, dense = (sum(getattr(e, n) for e in scored) for n in ("flops", "dense_flops"))
    rate_L = skip_TL.mean(0) if len(skip_TL) else np.zeros(config.layer_count)
    return {
        "eval/questions": len(scored),
        "eval/reward": _mean([r.total for r in rewards]),
        "eval/compute_term": _mean([r.compute_term for r in rewards]),
        "eval/quality_term": _mean([r.quality_term for r in rewards]),
        "eval/compute_saved_frac": _mean([r.compute_saved_frac for r in rewards]),
        "eval/nll_increase": _mean([r.nll_increase for r in rewards]),
        "eval/skip_ratio": float(rate_L.mean()),
        "eval/executed_flops_frac": flops / dense if dense else 1.0,
        "eval/gold_ppl": _perplexity([s.nll_gated_N for s in gold]),
        "eval/gold_ppl_dense": _perplexity([s.nll_dense_N for s in gold]),
        **{f"eval/skip_layer_{i}": float(rate) for i, rate in enumerate(rate_L)},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _perplexity(parts: Sequence[np.ndarray]) -> float:
    return float(math.exp(np.concatenate(parts).mean()))


def threshold_like(scored: Sequence[ScoredEpisode], config: FBSConfig) -> float:
    """The τ at which thresholds would skip as often as these episodes' sampled gates did, on the same states.

    Between two neighbouring probabilities, so that rounding moves no decision.
    """
    free = [i for i in range(config.layer_count) if i not in config.protected_layers]
    traces = [s.trace for e in scored for s in e.episode.segments]
    prob = np.sort(np.concatenate([t.prob_TL[:, free].ravel() for t in traces]))[::-1]
    skipped = int(sum(t.skip_TL[:, free].sum() for t in traces))
    if not len(prob):
        return config.tau
    above = prob[min(max(skipped, 1), len(prob)) - 1]
    below = prob[skipped] if skipped < len(prob) else 0.0
    return float((above + below) / 2)


def example_rows(
    scored: Sequence[ScoredEpisode], decode: Callable[[list[int]], str], layers: int
) -> list[dict[str, Any]]:
    """A row for each segment: what was asked, what was said, how much of it was skipped."""
    return [
        {
            "question": each.episode.question_id,
            "segment": str(segment.kind),
            "prompt": decode(list(segment.prompt_ids)),
            "text": shaded_html(segment, decode, layers),
            "skipped": float(segment.trace.skip_TL.mean()) if len(segment.trace.skip_TL) else 0.0,
            "compute_term": each.reward.compute_term,
            "quality_term": each.reward.quality_term,
            "reward": each.reward.total,
        }
        for each in scored
        for segment in each.episode.segments
    ]


def shaded_html(segment: SegmentRollout, decode: Callable[[list[int]], str], layers: int) -> str:
    """The continuation, each token on a blue that is the deeper the more layers it skipped. The last was not fed."""
    skipped_T = segment.trace.skip_TL.sum(1).tolist()
    parts = []
    for index, token in enumerate(segment.token_ids):
        text = html.escape(decode([token])).replace("\n", "⏎<br>")
        if index >= len(skipped_T):
            parts.append(f"<span>{text}</span>")
            continue
        colour = f"background:rgba(30,110,220,{skipped_T[index] / layers:.2f})"
        parts.append(f'<span style="{colour}" title="{skipped_T[index]} of {layers}">{text}</span>')
    return f'<div style="font-family:monospace;white-space:pre-wrap">{"".join(parts)}</div>'
