"""What the dense model answers, greedily, many questions at once, each found once.

Limit: one writer. Where PPO moves the dense pass too (trains gates+window or gates+paw), continuations stay those
of the model as it was when they were written.

Shape letters: B rows, T tokens of the prompts, padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.rl.replay import batches_by_length

_Key = tuple[tuple[int, ...], int, tuple[int, ...]]


class DenseContinuations:
    """batch_tokens: prompts and continuations that are decoded together, padding included."""

    def __init__(self, model: FBSForCausalLM, batch_tokens: int) -> None:
        self._model, self._batch_tokens = model, batch_tokens
        self._kept: dict[_Key, tuple[int, ...]] = {}

    def of(
        self, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, end_ids: tuple[int, ...]
    ) -> list[tuple[int, ...]]:
        """The continuation of each prompt: up to max_new_tokens, the token that ends it included."""
        keys = [(prompt, max_new_tokens, end_ids) for prompt in prompts]
        missing = [key for key in dict.fromkeys(keys) if key not in self._kept]
        length = {place: len(key[0]) + max_new_tokens for place, key in enumerate(missing)}
        for places in batches_by_length(length, self._batch_tokens):
            part = [missing[place] for place in places]
            rows = write_greedily(self._model, [key[0] for key in part], max_new_tokens, end_ids)
            self._kept.update(zip(part, rows, strict=True))
        return [self._kept[key] for key in keys]


@torch.no_grad()
def write_greedily(
    model: FBSForCausalLM, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, end_ids: tuple[int, ...]
) -> list[tuple[int, ...]]:  # fmt: skip
    """Greedy continuations with nothing skipped, in one batch."""
    device = model.model.embed_tokens.weight.device
    feed_BT, mask_BT = (part.to(device) for part in left_padded(prompts))
    cache = FBSCache(model.config.layer_count)
    ends = torch.tensor(end_ids, dtype=torch.long, device=device)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    made = []
    for _ in range(max_new_tokens):
        out = model(feed_BT, mask_BT, past_key_values=cache, gates="dense", logits_to_keep=1)
        feed_BT = out.logits[:, -1].argmax(-1, keepdim=True)
        made.append(feed_BT)
        ended_B |= torch.isin(feed_BT[:, 0], ends)
        if bool(ended_B.all()):
            break
        mask_BT = torch.cat((mask_BT, torch.ones_like(feed_BT)), dim=1)
    return [_until_end(row, end_ids) for row in torch.cat(made, dim=1).tolist()]


def left_padded(prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """(ids [B, T], attention mask [B, T]), on the CPU."""
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    length_B1 = torch.tensor([[len(prompt)] for prompt in prompts])
    return ids_BT, (torch.arange(width) >= width - length_B1).long()


def _until_end(ids: Sequence[int], end_ids: tuple[int, ...]) -> tuple[int, ...]:
    stop = next((place + 1 for place, token in enumerate(ids) if token in end_ids), len(ids))
    return tuple(ids[:stop])
