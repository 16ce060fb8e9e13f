"""The formulas of the reference (tests/reference.py): activations, rotary turns, buckets, noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def weights_of(model: Any) -> dict[str, Array]:
    """The model's weights and buffers by name, as float64 arrays."""
    return {name: t.detach().double().numpy() for name, t in model.state_dict().items()}


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def softmax(x: Array) -> Array:
    raised = np.exp(x - x.max())
    return raised / raised.sum()


def rms(x: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def uniform(seed: int, position: int, layer: int) -> float:
    """The gate's noise, in plain integers: a chain of MurmurHash3's 32-bit finaliser."""
    word = _finalise(seed % 2**32) ^ _finalise((seed // 2**32) % 2**32 ^ 0x9E3779B9)
    word = _finalise(word ^ _finalise(position ^ 0x85EBCA6B))
    word = _finalise((word + layer * 0xC2B2AE35) % 2**32)
    return (word // 256) / 2**24


def _finalise(word: int) -> int:
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)


def rotate(head: Array, position: int, theta: float) -> Array:
    """One head's vector turned by its position, pair (i, i + half) by position / theta^(i/half)."""
    half = len(head) // 2
    turned = head.copy()
    for pair in range(half):
        angle = position * theta ** (-pair / half)
        cos, sin = math.cos(angle), math.sin(angle)
        turned[pair] = head[pair] * cos - head[pair + half] * sin
        turned[pair + half] = head[pair + half] * cos + head[pair] * sin
    return turned


def convolve(rows: list[Array], kernel: Array, bias: Array) -> list[Array]:
    """Kernel 3 over horizons, zeros outside, channels in groups of 16 that do not mix."""
    channels = len(bias)
    padded = [np.zeros(channels), *rows, np.zeros(channels)]
    mixed = []
    for h in range(len(rows)):
        row = bias.copy()
        for channel in range(channels):
            group = slice(channel // 16 * 16, channel // 16 * 16 + 16)
            for tap in range(3):
                row[channel] += kernel[channel, :, tap] @ padded[h + tap][group]
        mixed.append(row)
    return mixed


def bucket(distance: int, buckets: int, reach: int) -> int:
    """T5's buckets, one-sided: exact below half of them, then logarithmic up to the reach."""
    exact = buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(reach / exact)
    return min(buckets - 1, exact + math.floor(share * (buckets - exact)))
