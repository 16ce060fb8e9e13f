"""A step in which rows that skip a layer are dropped from its products, and a layer that all skip is not entered.

The host looks at each layer's decisions, so this is the path for CPUs and for steps with prompts; masked_walk
is the one without host decisions. Both give what fbs_rl.model gives.

Letters: N tokens of the step, R requests, L layers, d hidden size; run and idle are indices of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fbs_rl.model.skip_gate import Motion
from fbs_rl.serving.chunk_rows import ChunkStep, ReaderPass
from fbs_rl.serving.paged_attention import PagedBatch, attend, write_entries
from fbs_rl.serving.served_layer import ServedLayer
from fbs_rl.serving.step_plan import StepPlan, StepReport

if TYPE_CHECKING:
    from fbs_rl.serving.served_model import ServedModel


@dataclass(slots=True)
class CompactWalk:
    """What travels from layer to layer of one step."""

    model: ServedModel
    plan: StepPlan
    batch: PagedBatch
    position_N: Tensor
    entry_LR: np.ndarray  # entries that each request has in each layer, under `noop`
    glance: Any = None
    chunks: ChunkStep | None = None
    motion_1N2: Tensor | None = None
    moved: tuple[Tensor, Tensor] | None = None  # states around a layer, not yet in motion_1N2
    prob_N: Tensor | None = None
    prob: list[Tensor] = field(default_factory=list)
    skip: list[np.ndarray] = field(default_factory=list)
    entered: int = 0

    def run(self, state_Nd: Tensor) -> tuple[Tensor, StepReport]:
        """All layers, from embeddings to the state before the final norm."""
        self.motion_1N2 = Motion.still(1, len(state_Nd), state_Nd.device)
        for layer in self.model.served_layers():
            normed_Nd = self.model.unit_norm(state_Nd)
            self.glance = self.model.look(layer, normed_Nd, self.glance)
            if layer.finds_chunks:
                self.chunks = self.model.find_chunks(normed_Nd, self.plan, self.batch.length_R)
            skip_N = self._decide(layer, normed_Nd)
            state_Nd = self._pass(layer, state_Nd, normed_Nd, skip_N)
        return state_Nd, self._report(len(state_Nd))

    def _decide(self, layer: ServedLayer, normed_Nd: Tensor) -> np.ndarray | None:
        """Who skips the layer; None if nobody can."""
        plan = self.plan
        if plan.bar_LN is None:
            return None
        known_N = self.prob_N
        if plan.asks and layer.asks:
            self.prob_N = self.model.gate_probability(layer, normed_Nd, self._motion(), self.glance)
        decided_N = known_N if layer.decided_before else self.prob_N
        prob_N = None if layer.never_skips else decided_N
        self.prob.append(
            normed_Nd.new_zeros(len(normed_Nd), dtype=torch.float32) if prob_N is None else prob_N
        )
        if layer.never_skips:
            return None
        bar_N = plan.bar_LN[layer.index]
        return reaches(decided_N, bar_N, plan.consensus).cpu().numpy()

    def _motion(self) -> Tensor:
        if self.moved is not None:
            self.motion_1N2, self.moved = Motion.between(*self.moved), None
        assert self.motion_1N2 is not None
        return self.motion_1N2

    def _pass(
        self, layer: ServedLayer, state_Nd: Tensor, normed_Nd: Tensor, skip_N: np.ndarray | None
    ) -> Tensor:
        skip_N = np.zeros(len(state_Nd), bool) if skip_N is None else skip_N
        self.skip.append(skip_N)
        reader = self.model.read_chunks(layer, self.chunks, normed_Nd)
        skipping = int(skip_N.sum())
        if skipping == 0:
            state_Nd = self._pass_all(layer, state_Nd, normed_Nd, reader)
        elif skipping == len(skip_N):
            state_Nd = self._pass_none(layer, state_Nd, normed_Nd)
        else:
            state_Nd = self._pass_some(layer, state_Nd, normed_Nd, skip_N, reader)
        self.entered += skipping < len(skip_N)
        if reader is not None:
            reader.leave()
        return state_Nd

    def _pass_all(
        self, layer: ServedLayer, state_Nd: Tensor, normed_Nd: Tensor, reader: ReaderPass | None
    ) -> Tensor:
        injected_Nd = self.model.inject(layer, state_Nd, self.glance, reader, None)
        input_Nd = layer.input_norm(injected_Nd, state_Nd, normed_Nd)
        attention = layer.self_attn
        query, key, value = attention.queries_keys_values(input_Nd, self.position_N)
        slot_N, metadata = self._everyone(layer)
        write_entries(attention.attn, key, value, slot_N)
        executed_Nd = layer.finish(injected_Nd, attend(attention.attn, query, metadata))
        self.moved = (state_Nd[None], executed_Nd[None])
        return executed_Nd

    def _pass_none(self, layer: ServedLayer, state_Nd: Tensor, normed_Nd: Tensor) -> Tensor:
        if layer.projects:
            input_Nd = layer.input_norm(state_Nd, state_Nd, normed_Nd)
            key, value = layer.self_attn.keys_values(input_Nd, self.position_N)
            write_entries(layer.self_attn.attn, key, value, self.batch.slot_N)
        return layer.skip_path(state_Nd, normed_Nd)

    def _pass_some(
        self, layer: ServedLayer, state_Nd: Tensor, normed_Nd: Tensor, skip_N: np.ndarray,
        reader: ReaderPass | None,
    ) -> Tensor:  # fmt: skip
        run_np, idle_np = (~skip_N).nonzero()[0], skip_N.nonzero()[0]
        run, idle = (torch.from_numpy(i).to(state_Nd.device) for i in (run_np, idle_np))
        before_Nd = state_Nd[run]
        injected_Nd = self.model.inject(layer, before_Nd, self.glance, reader, run)
        input_Nd = layer.input_norm(injected_Nd, before_Nd, normed_Nd[run])
        attention = layer.self_attn
        query, key, value = attention.queries_keys_values(input_Nd, self.position_N[run])
        idle_Nd, idle_normed_Nd = state_Nd[idle], normed_Nd[idle]
        if layer.projects:
            write_entries(attention.attn, key, value, self.batch.slot_N[run])
            idle_input = layer.input_norm(idle_Nd, idle_Nd, idle_normed_Nd)
            key, value = attention.keys_values(idle_input, self.position_N[idle])
            write_entries(attention.attn, key, value, self.batch.slot_N[idle])
            attended = self._attend_dense(layer, query, run_np, run, len(state_Nd))
        else:
            slot_M, metadata = self._compacted(layer, run_np)
            write_entries(attention.attn, key, value, slot_M)
            attended = attend(attention.attn, query, metadata)
        executed_Nd = layer.finish(injected_Nd, attended)
        motion_1N2 = self._motion()
        if self.plan.asks:
            moved = Motion.between(before_Nd[None], executed_Nd[None])
            self.motion_1N2 = motion_1N2.index_copy(1, run, moved)
        result_Nd = state_Nd.index_copy(0, run, executed_Nd)
        return result_Nd.index_copy(0, idle, layer.skip_path(idle_Nd, idle_normed_Nd))

    # --- the paged cache --------------------------------------------------------------------------

    def _attend_dense(
        self, layer: ServedLayer, query: Tensor, run_np: np.ndarray, run: Tensor, tokens: int
    ) -> Tensor:
        """What the running tokens read where every token has an entry."""
        if self.batch.decodes:
            return attend(layer.self_attn.attn, query, self.batch.of_rows(run_np))
        # Within a prompt the queries of a request must be its last tokens without a gap.
        whole = query.new_zeros(tokens, query.shape[1]).index_copy(0, run, query)
        return attend(layer.self_attn.attn, whole, self.batch.base)[run]

    def _everyone(self, layer: ServedLayer) -> tuple[Tensor, Any]:
        """Slots and metadata when all tokens run."""
        batch = self.batch
        if layer.projects or (self.entry_LR[layer.index] == batch.before_R).all():
            self.entry_LR[layer.index] += batch.length_R
            return batch.slot_N, batch.base
        return self._compacted(layer, np.arange(len(batch.row_N)))

    def _compacted(self, layer: ServedLayer, run_np: np.ndarray) -> tuple[Tensor, Any]:
        """Slots and metadata of the running tokens where tokens that skipped have no entry (`noop`)."""
        row_M = self.batch.row_N[run_np]
        count_R = np.bincount(row_M, minlength=len(self.batch.length_R))
        first_R = np.cumsum(count_R) - count_R
        before_R = self.entry_LR[layer.index]
        entry_M = before_R[row_M] + np.arange(len(row_M)) - first_R[row_M]
        rows = count_R.nonzero()[0]
        metadata = self.batch.view(rows, count_R[rows], before_R[rows] + count_R[rows])
        slot_M = self.batch.slots(row_M, entry_M)
        self.entry_LR[layer.index] = before_R + count_R
        return slot_M, metadata

    def _report(self, tokens: int) -> StepReport:
        layers = self.model.config.layer_count
        empty = np.zeros((layers, tokens), np.float32)
        return StepReport(
            skip_LN=np.stack(self.skip),
            prob_LN=torch.stack(self.prob).float().cpu().numpy() if self.prob else empty,
            closes_N=None if self.chunks is None else self.chunks.closes_N,
            chunks_N=None if self.chunks is None else self.chunks.visible_N,
            entered=self.entered,
            passed_over=layers - self.entered,
        )


def reaches(prob_N: Tensor | None, bar_N: Tensor, consensus: bool) -> Tensor:
    """Who skips, [N] bool: p >= bar; with consensus all or none, by the means. Without p: what is replayed."""
    if prob_N is None:
        return bar_N == -torch.inf
    if consensus:
        return (prob_N.mean() >= bar_N.mean()).expand(len(prob_N))
    return prob_N >= bar_N
