"""A decode step of fixed shape, in which the host looks at no decision: what a CUDA graph can capture.

Every row passes through every layer; where it skips, its result is replaced, and its cache entry is that of
a skipped token (`project`) or is not written (`noop`). What only a running row needs is one piece a layer, which
`branches` may leave out where no row runs. It gives what compact_walk gives.

Letters: R rows of one token each, L layers, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fbs_rl.model.skip_gate import Motion
from fbs_rl.serving.chunk_rows import ChunkReading, FixedChunks
from fbs_rl.serving.compact_walk import reaches
from fbs_rl.serving.paged_attention import PagedBatch, attend, write_entries
from fbs_rl.serving.served_layer import ServedLayer
from fbs_rl.serving.step_plan import StepPlan, StepReport

if TYPE_CHECKING:
    from fbs_rl.serving.served_model import ServedModel


class Branches(Protocol):
    """Runs a piece of a step if a flag on the device says so."""

    def when(self, flag: Tensor, piece: Callable[[], None]) -> None: ...


class Always:
    """Runs it in any case; what it gives must not depend on the flag."""

    def when(self, flag: Tensor, piece: Callable[[], None]) -> None:
        piece()


@dataclass(slots=True)
class FixedStep:
    """A StepPlan as tensors of the device. bar_LR: None where nobody can skip and no gate is asked.

    entry_LR: entries that each request has in each layer. still_1R2: of Motion.
    """

    row_R: Tensor
    entry_LR: Tensor
    still_1R2: Tensor
    bar_LR: Tensor | None = None
    consensus: bool = False

    @classmethod
    def of(cls, plan: StepPlan, entry_LR: np.ndarray, device: torch.device) -> FixedStep:
        row_R, entries = (torch.from_numpy(x).to(device) for x in (plan.row_R, entry_LR))
        still_1R2 = Motion.still(1, len(row_R), device).contiguous()
        return cls(row_R, entries, still_1R2, plan.bar_LN if plan.asks else None, plan.consensus)


@dataclass(slots=True)
class FixedFound:
    """What a step decided, on the device. chunks_R: closed before the token; None without a Chunk-Head."""

    skip_LR: Tensor
    prob_LR: Tensor
    closes_R: Tensor | None
    chunks_R: Tensor | None

    def report(self) -> StepReport:
        """The same on the host."""
        closes, chunks = (
            None if x is None else x.cpu().numpy() for x in (self.closes_R, self.chunks_R)
        )
        return StepReport.of(self.skip_LR.cpu().numpy(), self.prob_LR.cpu().numpy(), closes, chunks)


@dataclass(slots=True)
class MaskedWalk:
    """What travels from layer to layer of one step."""

    model: ServedModel
    step: FixedStep
    batch: PagedBatch
    position_R: Tensor
    branches: Branches
    glance: Any = None
    chunks: FixedChunks | None = None
    motion_1R2: Tensor | None = None
    prob_R: Tensor | None = None
    prob: list[Tensor] = field(default_factory=list)
    skip: list[Tensor] = field(default_factory=list)

    def run(self, state_Rd: Tensor) -> tuple[Tensor, FixedFound]:
        """All layers, from embeddings to the state before the final norm."""
        self.motion_1R2 = self.step.still_1R2
        for layer in self.model.served_layers():
            normed_Rd = self.model.unit_norm(state_Rd)
            self.glance = self.model.look(layer, normed_Rd, self.glance)
            if layer.finds_chunks:
                self.chunks = self.model.fix_chunks(normed_Rd, self.step.row_R)
            skip_R = self._decide(layer, normed_Rd)
            reader = None
            if layer.chunk_reader is not None:
                assert self.chunks is not None
                reader = self.chunks.reader(layer.index, layer.chunk_reader, normed_Rd)
            if skip_R is None:
                state_Rd = self._pass_all(layer, state_Rd, normed_Rd, reader)
            else:
                state_Rd = self._pass_some(layer, state_Rd, normed_Rd, skip_R, reader)
            if reader is not None:
                reader.leave()
        chunks = self.chunks
        return state_Rd, FixedFound(
            torch.stack(self.skip),
            torch.stack(self.prob).float(),
            None if chunks is None else chunks.closes_R,
            None if chunks is None else chunks.closed_R,
        )

    def _decide(self, layer: ServedLayer, normed_Rd: Tensor) -> Tensor | None:
        """Who skips the layer; None if nobody can."""
        bar_LR, known_R = self.step.bar_LR, self.prob_R
        if bar_LR is not None and layer.asks:
            assert self.motion_1R2 is not None
            self.prob_R = self.model.gate_probability(
                layer, normed_Rd, self.motion_1R2, self.glance
            )
        decided_R = known_R if layer.decided_before else self.prob_R
        if bar_LR is None or decided_R is None or layer.never_skips:
            none_R = torch.zeros(len(normed_Rd), device=normed_Rd.device)
            self.prob.append(none_R)
            self.skip.append(none_R.bool())
            return None
        self.prob.append(decided_R)
        self.skip.append(reaches(decided_R, bar_LR[layer.index], self.step.consensus))
        return self.skip[-1]

    def _pass_all(
        self, layer: ServedLayer, state_Rd: Tensor, normed_Rd: Tensor, reader: ChunkReading | None
    ) -> Tensor:
        slot_R, metadata = self._entries(layer, None)
        executed_Rd = self._execute(layer, state_Rd, normed_Rd, reader, slot_R, metadata)
        if self.step.bar_LR is not None:
            self.motion_1R2 = Motion.between(state_Rd[None], executed_Rd[None])
        return executed_Rd

    def _pass_some(
        self, layer: ServedLayer, state_Rd: Tensor, normed_Rd: Tensor, skip_R: Tensor,
        reader: ChunkReading | None,
    ) -> Tensor:  # fmt: skip
        """The layer's output, and its motion: the skip path's, which a piece that may be left out writes over."""
        attention, skip_R1 = layer.self_attn, skip_R.unsqueeze(-1)
        if layer.projects:
            idle_Rd = layer.input_norm(state_Rd, state_Rd, normed_Rd)
            key, value = attention.keys_values(idle_Rd, self.position_R)
            write_entries(attention.attn, key, value, self.batch.slot_N)
        slot_R, metadata = self._entries(layer, skip_R)
        assert self.motion_1R2 is not None
        result_Rd, motion_1R2 = (
            layer.skip_path(state_Rd, normed_Rd).clone(),
            self.motion_1R2.clone(),
        )

        def run() -> None:
            executed_Rd = self._execute(layer, state_Rd, normed_Rd, reader, slot_R, metadata)
            moved_1R2 = Motion.between(state_Rd[None], executed_Rd[None])
            result_Rd.copy_(torch.where(skip_R1, result_Rd, executed_Rd))
            motion_1R2.copy_(torch.where(skip_R1[None], motion_1R2, moved_1R2))

        self.branches.when(~skip_R.all(), run)
        self.motion_1R2 = motion_1R2
        return result_Rd

    def _entries(self, layer: ServedLayer, skip_R: Tensor | None) -> tuple[Tensor, Any]:
        """Slots of the rows that run (-1: of one that skips), and metadata of what they read."""
        if layer.projects:
            slot_R, metadata = self.batch.slot_N, self.batch.dense()
            return slot_R if skip_R is None else torch.where(skip_R, -1, slot_R), metadata
        entry_R = self.step.entry_LR[layer.index]
        slot_R = self.batch.device_slots(entry_R)
        if skip_R is None:
            return slot_R, self.batch.with_lengths((entry_R + 1).int())
        lengths = self.batch.with_lengths((entry_R + (~skip_R).long()).int())
        return torch.where(skip_R, -1, slot_R), lengths

    def _execute(
        self, layer: ServedLayer, state_Rd: Tensor, normed_Rd: Tensor, reader: ChunkReading | None,
        slot_R: Tensor, metadata: Any,
    ) -> Tensor:  # fmt: skip
        """The layer's output for every row, as if all ran it."""
        injected_Rd = self.model.inject(layer, state_Rd, self.glance, reader, None)
        attention = layer.self_attn
        input_Rd = layer.input_norm(injected_Rd, state_Rd, normed_Rd)
        query, key, value = attention.queries_keys_values(input_Rd, self.position_R)
        write_entries(attention.attn, key, value, slot_R)
        return layer.finish(injected_Rd, attend(attention.attn, query, metadata))
