"""Where a continuation ends."""

from __future__ import annotations

from typing import Any

from fbs_rl.model.configuration import FBSConfig


def end_tokens(config: FBSConfig, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a continuation: those of the model's configuration and of the tokenizer."""
    ends = config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return tuple(sorted({int(e) for e in [*listed, tokenizer.eos_token_id] if e is not None}))
