"""What the gated model writes by itself: how likely its own tokens are under its gates and with nothing skipped.

For tokens y drawn from the gated distribution p_g at temperature 1, the mean of log p_g(y) − log p_d(y) estimates
KL(p_g ‖ p_d) a token: what a reader of gated text pays, and what PPO with gated continuations is charged for.
Token 0 counts, though the prompt predicts it and never skips.

Shape letters: Q questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fbs_rl.rl.paired_bootstrap import Difference, paired_ratio_difference
from fbs_rl.rl.reward import Sampler
from fbs_rl.rl.rollout import EpisodeRollout

_USUAL_SKIP = 0.2


@dataclass(frozen=True, slots=True)
class OwnText:
    """Sums of every question, float64 [Q]: nats, tokens, skipped layers and how many there were."""

    nll_gated_Q: np.ndarray
    nll_dense_Q: np.ndarray
    tokens_Q: np.ndarray
    skipped_Q: np.ndarray
    places_Q: np.ndarray

    @classmethod
    def of(cls, episodes: Sequence[EpisodeRollout]) -> OwnText:
        """Of what the gated model wrote, one episode a question."""
        written = [
            segment
            for episode in episodes
            for segment in episode.segments
            if segment.sampled_by is Sampler.GATED
        ]
        sums_Q5 = np.array(
            [
                (
                    segment.nll_gated_N.sum(),
                    segment.nll_dense_N.sum(),
                    len(segment.token_ids),
                    segment.trace.skip_TL.sum(),
                    segment.trace.skip_TL.size,
                )
                for segment in written
            ],
            dtype=np.float64,
        )
        return cls(*sums_Q5.T)

    @property
    def divergence_Q(self) -> np.ndarray:
        """Σ log p_g − log p_d of each question's tokens."""
        return self.nll_dense_Q - self.nll_gated_Q

    def record(self) -> dict[str, Any]:
        """Nats a token, the skip ratio of the columns that were fed, tokens a question."""
        tokens = self.tokens_Q.sum()
        return {
            "nll_gated": float(self.nll_gated_Q.sum() / tokens),
            "nll_dense": float(self.nll_dense_Q.sum() / tokens),
            "reverse_kl": float(self.divergence_Q.sum() / tokens),
            "skip": float(self.skipped_Q.sum() / max(self.places_Q.sum(), 1)),
            "tokens": float(tokens / len(self.tokens_Q)),
            "questions": len(self.tokens_Q),
        }

    def minus(self, other: OwnText) -> dict[str, Difference]:
        """Per-token differences to another arm's text for the same questions."""
        return {
            "reverse_kl": paired_ratio_difference(
                (self.divergence_Q, self.tokens_Q), (other.divergence_Q, other.tokens_Q)
            ),
            "nll_dense": paired_ratio_difference(
                (self.nll_dense_Q, self.tokens_Q), (other.nll_dense_Q, other.tokens_Q)
            ),
        }


def own_ratios(ratios: Sequence[float]) -> list[float]:
    """At which of a study's skip ratios own text is measured: the one nearest to 20 %, and the highest."""
    return sorted({min(ratios, key=lambda ratio: abs(ratio - _USUAL_SKIP)), max(ratios)})
