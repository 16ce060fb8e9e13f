"""Decode steps as replays of CUDA graphs: one graph for each number of rows, captured when that number comes again.

A graph reads memory of its own, which is filled before each replay, and what it decided is fetched after it in one
copy. vLLM's own graphs are not used: they pad a batch, and are captured with requests that do not exist.

Letters: R rows of one token each, L layers, d hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fbs_rl.serving.masked_walk import Branches, FixedFound, FixedStep, MaskedWalk
from fbs_rl.serving.paged_attention import PagedBatch
from fbs_rl.serving.step_plan import StepPlan, StepReport

if TYPE_CHECKING:
    from fbs_rl.serving.served_model import ServedModel


class Recorder(Protocol):
    """Makes something that can be run again and again of a piece of work on the device."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What runs `work` once more each time it is called, on the memory that `work` reads. Does not run it."""
        ...


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.MemPool()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        pool: Any = self._pool.id
        # Other threads (of a server, of a compiler) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        # The pool first: what a call holds is let go from behind, and a pool must outlive its graphs.
        return functools.partial(_replay, self._pool, graph)


def _replay(pool: Any, graph: torch.cuda.CUDAGraph) -> None:
    graph.replay()


@dataclass(slots=True)
class _Inputs:
    """What one graph reads."""

    id_R: Tensor
    position_R: Tensor
    step: FixedStep
    batch: PagedBatch

    @classmethod
    def like(cls, id_R: Tensor, position_R: Tensor, step: FixedStep, batch: PagedBatch) -> _Inputs:
        """Memory of the same shapes, with what stands there now."""
        bar_LR = None if step.bar_LR is None else step.bar_LR.clone()
        return cls(
            id_R.clone(), position_R.clone(), dataclasses.replace(step, bar_LR=bar_LR), batch
        )

    def fill(
        self, id_R: Tensor, position_R: Tensor, plan: StepPlan, entry_LR: np.ndarray, batch: PagedBatch
    ) -> None:  # fmt: skip
        self.id_R.copy_(id_R)
        self.position_R.copy_(position_R)
        self.step.row_R.copy_(torch.from_numpy(plan.row_R))
        self.step.entry_LR.copy_(torch.from_numpy(entry_LR))
        if self.step.bar_LR is not None:
            assert plan.bar_LN is not None
            self.step.bar_LR.copy_(plan.bar_LN)
        self.batch.fill(batch)


@dataclass(slots=True)
class _Graph:
    """One graph. replay: None until it is recorded; state_Rd, packed: what it left."""

    inputs: _Inputs
    replay: Callable[[], None] | None = None
    state_Rd: Tensor | None = None
    packed: Tensor | None = None


class DecodeGraphs:
    """longest: text that the engine takes, in tokens."""

    def __init__(
        self, model: ServedModel, longest: int, recorder: Recorder, branches: Branches
    ) -> None:
        self.model, self.longest = model, longest
        self.recorder, self.branches = recorder, branches
        self._graphs: dict[tuple[int, bool, bool], _Graph] = {}
        self.recorded = 0

    def forget(self) -> None:
        """Drop all graphs, after memory that they read was exchanged for other memory."""
        self._graphs.clear()

    def run(
        self, id_R: Tensor, position_R: Tensor, plan: StepPlan, batch: PagedBatch, entry_LR: np.ndarray
    ) -> tuple[Tensor, StepReport]:  # fmt: skip
        """Final normed states [R, d] of a decode step, valid until the next one; and what it decided."""
        name = (len(id_R), plan.asks, plan.consensus)
        graph = self._graphs.get(name)
        if graph is None:
            # The first such step runs as it is: libraries compile, load and keep things the first time.
            step = FixedStep.of(plan, entry_LR, id_R.device)
            inputs = _Inputs.like(id_R, position_R, step, batch.fixed(self.longest))
            graph = self._graphs[name] = _Graph(inputs)
            self._work(graph)
        else:
            graph.inputs.fill(id_R, position_R, plan, entry_LR, batch)
            if graph.replay is None:
                graph.replay = self.recorder.record(lambda: self._work(graph))
                self.recorded += 1
            graph.replay()
        assert graph.state_Rd is not None and graph.packed is not None
        return graph.state_Rd, self._unpack(graph.packed, len(id_R))

    def _work(self, graph: _Graph) -> None:
        model, inputs = self.model, graph.inputs
        walk = MaskedWalk(model, inputs.step, inputs.batch, inputs.position_R, self.branches)
        state_Rd, found = walk.run(model.embed_tokens(inputs.id_R))
        graph.state_Rd, graph.packed = model.norm(state_Rd), _pack(found)

    def _unpack(self, packed: Tensor, rows: int) -> StepReport:
        layers = self.model.config.layer_count
        data = packed.cpu().numpy()
        prob_LR = data[: 4 * layers * rows].view(np.float32).reshape(layers, rows)
        skip_LR = data[prob_LR.nbytes :][: layers * rows].view(np.bool_).reshape(layers, rows)
        rest = data[prob_LR.nbytes + skip_LR.nbytes :]
        if not len(rest):
            return StepReport.of(skip_LR, prob_LR, None, None)
        closes_R, chunks_R = rest[:rows].view(np.bool_), rest[rows:].copy().view(np.int32)
        return StepReport.of(skip_LR, prob_LR, closes_R, chunks_R.astype(np.int64))


def _pack(found: FixedFound) -> Tensor:
    """All of it as bytes in one tensor."""
    parts = [found.prob_LR, found.skip_LR]
    if found.closes_R is not None and found.chunks_R is not None:
        parts += [found.closes_R, found.chunks_R.int()]
    return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])
