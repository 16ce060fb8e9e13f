"""A cache as the compiled step is told of it. Kept from step to step: telling takes longer than a small layer."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fbs_rl.model.kv_cache import FBSCache, LayerKV, OwedKeys
from fbs_rl.model.native.arguments import fill, structures

if TYPE_CHECKING:
    from fbs_rl.model.decoder import FBSModel

_OWES = 2  # what a step says of a layer whose new entry it owes (arguments.h)


class NativeMemory:
    """Where a cache's keys, values and chunks lie, of every layer. like_BGTD: keys of one token.

    most_owed: tokens of a row whose keys and values a layer may owe.
    """

    def __init__(self, model: FBSModel, like_BGTD: Tensor, most_owed: int) -> None:
        self.layers = list(model.fbs_layers())
        self.readers = model.config.reader_layers
        self.like_BGTD, self.most_owed = like_BGTD, most_owed
        self.kv: Any = (structures()["CacheArguments"] * len(self.layers))()
        self.chunks: Any = (structures()["ChunkArguments"] * len(self.layers))()
        self._told: list[tuple[Tensor | None, Tensor | None, int]] = [(None, None, 0)] * len(
            self.kv
        )
        self._owed: list[OwedKeys | None] = [None] * len(self.kv)
        self._rings: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied cache lies elsewhere, and is told of anew."""
        return None

    @property
    def rows(self) -> int:
        return len(self.like_BGTD)

    def prepare(self, cache: FBSCache, owes: bool, marks: bool) -> Tensor:
        """Make room for one more token; places in use [L, rows].

        owes: skipped layers may owe theirs, or do already. marks: rows may disagree on what exists.
        """
        for index, (kv, told) in enumerate(zip(cache.layers, self.kv, strict=True)):
            keys, entries, room = self._told[index]
            if kv.length >= room:
                kv.reserve(self.like_BGTD, kv.length + 1)
            if marks and kv.entry_BS is None:
                kv.mark_entries()
            if kv.keys_BGSD is not keys or kv.entry_BS is not entries:
                self._tell(index, kv)
            if owes and (kv.owed is None or kv.owed is not self._owed[index]):
                self._tell_owed(index, kv)
            told.owed = 0 if kv.owed is None else kv.owed.count
        lengths = torch.tensor([kv.length for kv in cache.layers])
        return (
            lengths if self.rows == 1 else lengths.unsqueeze(1).expand(-1, self.rows).contiguous()
        )

    def _tell(self, index: int, kv: LayerKV) -> None:
        told, keys, entries = self.kv[index], kv.keys_BGSD, kv.entry_BS
        assert keys is not None and kv.values_BGSD is not None
        fill(
            told, keys=keys, values=kv.values_BGSD, row_stride=keys.stride(0), head_stride=keys.stride(1),
            exists=entries, exists_stride=0 if entries is None else entries.stride(0),
        )  # fmt: skip
        self._told[index] = keys, entries, kv.capacity

    def _tell_owed(self, index: int, kv: LayerKV) -> None:
        layer, sizes = self.layers[index], (self.most_owed, self.rows)
        if kv.owed is None:
            half = layer.head_dim // 2
            rooms = [torch.empty(*sizes, n) for n in (layer.config.hidden_size, half, half)]
            kv.owed = OwedKeys(layer.keys_values, rooms[0], rooms[1], rooms[2])
        self._owed[index] = owed = kv.owed
        fill(
            self.kv[index], owed_input=owed.input_CBd, owed_cosine=owed.cosine_CBH,
            owed_sine=owed.sine_CBH,
        )  # fmt: skip

    def prepare_chunks(self, cache: FBSCache, state_Bd: Tensor) -> None:
        """Tell of the chunk layers' rings."""
        for index in self.readers:
            reader = self.layers[index].chunk_reader
            assert reader is not None
            ring = cache.ring(index, reader, state_Bd)
            parts = ring.key_BCW, ring.value_BCW, ring.open_sum_Bd
            before = self._rings.get(index)
            if before is None or any(a is not b for a, b in zip(parts, before, strict=True)):
                self._rings[index] = parts
                fill(
                    self.chunks[index], keys=parts[0], values=parts[1], open_sum=parts[2],
                    ring_stride=parts[0].stride(0),
                )  # fmt: skip

    def keep(self, cache: FBSCache, added_L: Tensor) -> None:
        """What a step did to each layer: nothing, an entry, or one that is owed."""
        for kv, added in zip(cache.layers, added_L.tolist(), strict=True):
            if added:
                kv.length += 1
                if kv.owed is not None:
                    kv.owed.count = kv.owed.count + 1 if added == _OWES else 0

    @property
    def addresses(self) -> dict[str, int]:
        return {"cache": ctypes.addressof(self.kv), "chunks": ctypes.addressof(self.chunks)}
