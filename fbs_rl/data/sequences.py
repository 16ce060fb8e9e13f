"""Fixed-length token sequences out of documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def cut_sequences(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> Tensor:
    """[count, length] token ids: windows of single documents, drawn evenly over all texts, no overlap.

    Raises ValueError if the texts hold fewer than `count` windows.
    """
    windows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        windows += [
            ids[start : start + length] for start in range(0, len(ids) - length + 1, length)
        ]
    if len(windows) < count:
        raise ValueError(
            f"the texts hold {len(windows)} windows of {length} tokens, {count} were asked for"
        )
    chosen = [windows[index * len(windows) // count] for index in range(count)]
    return torch.tensor(chosen, dtype=torch.long)
