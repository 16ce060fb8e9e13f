"""Differences of two arms over the same questions, with their bootstrap intervals.

Shape letters: Q questions, S resamples.
"""

from __future__ import annotations

import numpy as np

from fbs_rl.seeds import stable_hash

_RESAMPLES = 2000
Difference = tuple[float, float, float]
"""One − other, 2.5 % and 97.5 % of its bootstrap over questions."""


def paired_difference(one_Q: np.ndarray, other_Q: np.ndarray) -> Difference:
    """Of the means over questions."""
    every_Q = np.ones(len(one_Q))
    return paired_ratio_difference((one_Q, every_Q), (other_Q, every_Q))


def paired_ratio_difference(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> Difference:
    """Of ratios of sums, such as nats a token. one, other: (numerator, denominator) of every question, [Q] each."""
    count = len(one[0])
    draw_SQ = np.random.default_rng(stable_hash("bootstrap", count)).integers(
        0, count, (_RESAMPLES, count)
    )

    def ratio(parts: tuple[np.ndarray, np.ndarray], index: np.ndarray | slice) -> np.ndarray:
        above, below = parts
        return above[index].sum(-1) / below[index].sum(-1)

    difference_S = ratio(one, draw_SQ) - ratio(other, draw_SQ)
    low, high = np.quantile(difference_S, (0.025, 0.975))
    everything = slice(None)
    return float(ratio(one, everything) - ratio(other, everything)), float(low), float(high)
