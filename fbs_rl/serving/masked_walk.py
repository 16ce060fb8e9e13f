"""A decode step of fixed shape, in which the host looks at no decision: what a CUDA graph can capture.

Every row passes through every layer; where it skips, its result is replaced, and its cache entry is that of
a skipped token (`project`) or is not written (`noop`). It gives what compact_walk gives.

Letters: R rows of one token each, L layers, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fbs_rl.model.skip_gate import Motion
from fbs_rl.serving.chunk_rows import FixedChunks
from fbs_rl.serving.compact_walk import reaches
from fbs_rl.serving.paged_attention import PagedBatch, attend, write_entries
from fbs_rl.serving.served_layer import ServedLayer
from fbs_rl.serving.step_plan import StepPlan, StepReport
from fbs_rl.types import KVPolicy

if TYPE_CHECKING:
    from fbs_rl.serving.served_model import ServedModel


@dataclass(slots=True)
class MaskedWalk:
    """What travels from layer to layer of one step."""

    model: ServedModel
    plan: StepPlan
    batch: PagedBatch
    position_N: Tensor
    entry_LR: np.ndarray
    glance: Any = None
    chunks: FixedChunks | None = None
    prob_N: Tensor | None = None
    prob: list[Tensor] = field(default_factory=list)
    skip: list[Tensor] = field(default_factory=list)

    def run(self, state_Nd: Tensor) -> tuple[Tensor, StepReport]:
        """All layers, from embeddings to the state before the final norm."""
        entry_LR = torch.from_numpy(self.entry_LR).to(state_Nd.device)
        motion_1N2 = Motion.still(1, len(state_Nd), state_Nd.device)
        for layer in self.model.served_layers():
            normed_Nd = self.model.unit_norm(state_Nd)
            self.glance = self.model.look(layer, normed_Nd, self.glance)
            if layer.index == self.model.config.boundary_layer:
                self.chunks = self.model.fix_chunks(normed_Nd, self.plan)
            skip_N = self._decide(layer, normed_Nd, motion_1N2)
            executed_Nd, entry_LR[layer.index] = self._execute(
                layer, state_Nd, normed_Nd, skip_N, entry_LR[layer.index]
            )
            skip_N1 = skip_N.unsqueeze(-1)
            moved_1N2 = Motion.between(state_Nd[None], executed_Nd[None])
            motion_1N2 = torch.where(skip_N1[None], motion_1N2, moved_1N2)
            state_Nd = torch.where(skip_N1, layer.skip_path(state_Nd, normed_Nd), executed_Nd)
        self.entry_LR = entry_LR.cpu().numpy()
        return state_Nd, self._report()

    def _decide(self, layer: ServedLayer, normed_Nd: Tensor, motion_1N2: Tensor) -> Tensor:
        plan, config = self.plan, self.model.config
        assert plan.bar_LN is not None
        if layer.index % config.gate_block == 0:
            self.prob_N = self.model.gate_probability(layer, normed_Nd, motion_1N2, self.glance)
        none_N = torch.zeros(len(normed_Nd), device=normed_Nd.device)
        if self.prob_N is None or layer.index in config.protected_layers:
            self.prob.append(none_N)
            self.skip.append(none_N.bool())
        else:
            self.prob.append(self.prob_N)
            self.skip.append(reaches(self.prob_N, plan.bar_LN[layer.index], plan.consensus))
        return self.skip[-1]

    def _execute(
        self, layer: ServedLayer, state_Nd: Tensor, normed_Nd: Tensor, skip_N: Tensor, entry_R: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The layer's output for every row, as if all ran it, and the number of entries that it has then."""
        reader = None
        if layer.chunk_reader is not None:
            assert self.chunks is not None
            reader = self.chunks.reader(layer.index, layer.chunk_reader, normed_Nd)
        injected_Nd = self.model.inject(layer, state_Nd, self.glance, reader, None)
        if reader is not None:
            reader.leave()
        attention = layer.self_attn
        input_Nd = layer.input_norm(injected_Nd, state_Nd, normed_Nd)
        query, key, value = attention.queries_keys_values(input_Nd, self.position_N)
        if self.model.config.kv_on_skip == KVPolicy.PROJECT:
            if injected_Nd is not state_Nd:
                plain_Nd = layer.input_norm(state_Nd, state_Nd, normed_Nd)
                idle_key, idle_value = attention.keys_values(plain_Nd, self.position_N)
                skip_N1 = skip_N.unsqueeze(-1)
                key = torch.where(skip_N1, idle_key, key)
                value = torch.where(skip_N1, idle_value, value)
            slot_N, metadata, entry_R = self.batch.slot_N, self.batch.base, entry_R + 1
        else:
            slot_N = torch.where(skip_N, -1, self.batch.device_slots(entry_R))
            entry_R = entry_R + (~skip_N).long()
            metadata = self.batch.with_lengths(entry_R.int())
        write_entries(attention.attn, key, value, slot_N)
        return layer.finish(injected_Nd, attend(attention.attn, query, metadata)), entry_R

    def _report(self) -> StepReport:
        skip_LN = torch.stack(self.skip).cpu().numpy()
        passed_over = int(skip_LN.all(1).sum())
        chunks = self.chunks
        return StepReport(
            skip_LN=skip_LN,
            prob_LN=torch.stack(self.prob).float().cpu().numpy(),
            closes_N=None if chunks is None else chunks.closes_R.cpu().numpy(),
            chunks_N=None if chunks is None else chunks.closed_R.cpu().numpy(),
            entered=len(skip_LN) - passed_over,
            passed_over=passed_over,
        )
