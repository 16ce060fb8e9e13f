"""Stateless randomness: every draw is a function of what it is for, so a resumed run draws the same."""

from __future__ import annotations

import hashlib


def stable_hash(*parts: int | str) -> int:
    """A 63-bit number from `parts`, the same in every process (Python's own hash() is salted)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
