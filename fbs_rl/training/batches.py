"""The rows of a step and what each rank makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fbs_rl.data.shards import PackedRows, PackedShards
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.objective import count_losses
from fbs_rl.seeds import stable_hash
from fbs_rl.training.order import DataOrder
from fbs_rl.types import IGNORED_LABEL, ChunkLabels, LossCounts


@dataclass(slots=True)
class MicroBatch:
    """What a rank runs at once. document_BT, valid_BT: None where trivial (they cost attention speed)."""

    ids_BT: Tensor
    labels_BT: Tensor
    document_BT: Tensor | None
    valid_BT: Tensor | None
    chunk_labels: ChunkLabels
    decode_start_B: Tensor
    gate_seed_B: Tensor

    @property
    def tokens(self) -> int:
        return self.ids_BT.numel() if self.valid_BT is None else int(self.valid_BT.sum())

    @property
    def gated_BT(self) -> Tensor:
        """Tokens at which gates may act."""
        position_BT = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device).expand_as(self.ids_BT)  # fmt: skip
        if self.valid_BT is not None:
            position_BT = (self.valid_BT.long().cumsum(1) - 1).clamp_min(0)
        gated_BT = position_BT >= self.decode_start_B.unsqueeze(1)
        return gated_BT if self.valid_BT is None else gated_BT & self.valid_BT

    def counts(self, config: FBSConfig, draw: int) -> LossCounts:
        return count_losses(
            config,
            self.ids_BT,
            self.labels_BT,
            self.gated_BT,
            self.valid_BT,
            self.document_BT,
            draw,
        )


@dataclass(frozen=True, slots=True)
class StepReader:
    """Cuts the rows of a step into micro-batches; which row gets which draw depends on the step alone."""

    shards: PackedShards
    order: DataOrder
    seed: int
    step_sequences: int
    decode_start_frac: float
    class_weights_C: Tensor
    device: torch.device
    dense_rows_frac: float = 0.0

    def micro_batches(
        self, step: int, rank: int, ranks: int, micro_sequences: int
    ) -> list[MicroBatch]:
        """Those of `rank`: the step's rows are dealt out in contiguous parts."""
        indices = self.order.indices(step * self.step_sequences, self.step_sequences)
        share = self.step_sequences // ranks
        first = rank * share
        return [
            self._read(step, indices, slice(start, start + micro_sequences))
            for start in range(first, first + share, micro_sequences)
        ]

    def _read(self, step: int, indices: np.ndarray, part: slice) -> MicroBatch:
        rows = range(part.start, part.stop)
        packed = self.shards.rows(indices[part])
        starts = [self._decode_start(step, row, packed.ids_BT.shape[1]) for row in rows]
        noise = [stable_hash("gate", self.seed, step, row) for row in rows]
        return to_micro_batch(packed, starts, noise, self.class_weights_C, self.device)

    def _decode_start(self, step: int, row: int, length: int) -> int:
        """Where gates begin to act in a row of the step: its end, and so nowhere, in a share of the rows."""
        if stable_hash("dense_row", self.seed, step, row) % 1000 < 1000 * self.dense_rows_frac:
            return length
        limit = max(1, int(length * self.decode_start_frac))
        return stable_hash("decode_start", self.seed, step, row) % limit


def to_micro_batch(
    packed: PackedRows,
    decode_starts: list[int],
    gate_seeds: list[int],
    class_weights_C: Tensor | None,
    device: torch.device,
) -> MicroBatch:
    """Tensors on `device`; padding has no label and is not valid."""
    document_BT = torch.from_numpy(packed.document_BT)
    ids_BT = torch.from_numpy(packed.ids_BT)
    valid_BT = document_BT >= 0
    labels_BT = ids_BT.masked_fill(~valid_BT, IGNORED_LABEL)
    several = bool((document_BT.amax(1) > 0).any())
    chunk_labels = ChunkLabels(
        torch.from_numpy(packed.chunk_label_BT).to(device),
        torch.from_numpy(packed.coverage_B).to(device),
        class_weights_C=class_weights_C,
    )
    return MicroBatch(
        ids_BT.to(device),
        labels_BT.to(device),
        document_BT.to(device) if several else None,
        None if bool(valid_BT.all()) else valid_BT.to(device),
        chunk_labels,
        torch.tensor(decode_starts, device=device),
        torch.tensor(gate_seeds, device=device),
    )
