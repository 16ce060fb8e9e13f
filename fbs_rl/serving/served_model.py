"""FBSForCausalLM as a vLLM model: the whole of it, from embeddings to logits.

The FBS modules are the classes of fbs_rl.model with their checkpoint names; only the backbone's products,
its cache and the per-request memory are vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix

from fbs_rl.gate_bundle import GateBundle, apply_bundle
from fbs_rl.model.chunk_head import BoundaryHead
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.native_step import product_of_few_rows
from fbs_rl.model.preview import Glance, PreviewHead
from fbs_rl.serving.chunk_rows import ChunkReading, ChunkRows, ChunkStep, FixedChunks, ReaderPass
from fbs_rl.serving.compact_walk import CompactWalk
from fbs_rl.serving.decode_graphs import CudaRecorder, DecodeGraphs
from fbs_rl.serving.graph_branches import ConditionalNodes
from fbs_rl.serving.kernel_steps import KernelSteps, pages_of
from fbs_rl.serving.masked_walk import Always, Branches, FixedStep, MaskedWalk
from fbs_rl.serving.native_walk import NativeWalk
from fbs_rl.serving.paged_attention import PagedBatch
from fbs_rl.serving.served_layer import Norm, ServedLayer, rms_norm
from fbs_rl.serving.served_view import view_of
from fbs_rl.serving.serving_settings import ServingSettings
from fbs_rl.serving.step_plan import StepPlan, StepReport, StepTurn
from fbs_rl.types import KVPolicy

# Whose metadata say nothing but lengths and pages, and whose pages hold [key heads, entries, key and value].
_GRAPH_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
_STACKED: dict[str, tuple[str, str | int]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class ServedModel(nn.Module):
    """The decoder without its language-model head, with the memory of the requests it is serving."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        assert isinstance(config, FBSConfig)
        self.config, self.page = config, vllm_config.cache_config.block_size
        self.settings = ServingSettings.of(vllm_config)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            ServedLayer(config, vllm_config, i, f"{prefix}.layers.{i}")
            for i in range(config.layer_count)
        )
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.preview = PreviewHead(config) if config.paw else None
        self.boundary = BoundaryHead(config) if config.chunk else None
        self.register_buffer("_ones", torch.ones(config.hidden_size), persistent=False)
        self._ones: Tensor
        dtype, device = self._ones.dtype, self._ones.device
        self.chunk_rows = ChunkRows(config, dtype, device) if config.chunk else None
        self.entries = np.zeros((config.layer_count, 0), np.int64)  # per layer and request row
        self.turn = StepTurn()  # apart: a module's own attributes are slow to set
        self.native: NativeWalk | None = None  # set once weights are there
        self.branches: Branches = Always()
        self.graphs: DecodeGraphs | None = None
        self.kernels: KernelSteps | None = None  # set once weights and pages are there
        self.longest = vllm_config.model_config.max_model_len
        self.rows_at_once = 0  # for which there is memory from the start
        self._check_backend()
        if self.settings.graphs != "none":
            self._prepare_graphs(vllm_config, dtype)

    def _check_backend(self) -> None:
        """Raise ValueError, in one sentence, for graphs or kernels beside a backend that they do not know."""
        backend: str = next(self.served_layers()).self_attn.attn.attn_backend.get_name()
        for name in self.settings.of_cuda:
            if backend not in _GRAPH_BACKENDS:
                raise ValueError(
                    f"fbs.{name} is {getattr(self.settings, name)!r}, which the attention backend {backend} "
                    f"cannot be used with; set attention_backend to one of {', '.join(_GRAPH_BACKENDS)}, "
                    f"or leave it out"
                )

    def _prepare_graphs(self, vllm_config: VllmConfig, dtype: torch.dtype) -> None:
        if self.settings.graphs == "branches":
            self.branches = ConditionalNodes(dtype)
        self.graphs = DecodeGraphs(self, self.longest, CudaRecorder(), self.branches)
        self.rows_at_once = vllm_config.scheduler_config.max_num_seqs

    def served_layers(self) -> Iterator[ServedLayer]:
        for layer in self.layers:
            assert isinstance(layer, ServedLayer)
            yield layer

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None) -> Tensor:  # fmt: skip
        """Final normed states [N, d] of the step's tokens, padding included."""
        attention: Any = self.layers[0].self_attn
        batch = PagedBatch.current(attention.attn, self.page, self.turn.plan)
        if batch is None:
            state = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return self.norm(self._without_cache(state, positions))
        plan, tokens = self.turn.plan, len(batch.slot_N)
        assert plan is not None
        assert input_ids is not None, "prompts as embeddings are refused"
        kernels = self.kernels
        if kernels is not None and not kernels.takes(plan, batch):
            kernels.leave()
            kernels = None
        self._restart(plan, batch)
        found = self._walk(input_ids[:tokens], positions[:tokens], plan, batch, kernels)
        if tokens < len(positions):
            padding = found.new_zeros(len(positions) - tokens, found.shape[1])
            found = torch.cat((found, padding))
        return found

    def _walk(
        self, id_N: Tensor, position_N: Tensor, plan: StepPlan, batch: PagedBatch, kernels: KernelSteps | None
    ) -> Tensor:  # fmt: skip
        """Final normed states of a step's tokens, by the way that suits it; leaves its report. kernels: which take it;
        they leave logits too, and the states as they were before the norm."""
        if kernels is not None:
            turn = self.turn
            found_Nd, turn.logits_RV, turn.report = kernels.run(id_N, position_N, plan, batch)
            return found_Nd
        entry_LR = self.entries[:, plan.row_R]
        if self._has_graph(plan, batch):
            assert self.graphs is not None
            found_Nd, report = self.graphs.run(id_N, position_N, plan, batch, entry_LR)
            self._keep(plan, report)
            return found_Nd
        state_Nd = self.embed_tokens(id_N)
        if self.native is not None and self.native.takes(plan, batch):
            found_Nd, report = self.native.run(state_Nd, position_N, plan, batch, entry_LR)
            self._keep(plan, report)
            return self.norm(found_Nd)
        if self.settings.masked and batch.decodes and plan.asks:
            step = FixedStep.of(plan, entry_LR, id_N.device)
            walk = MaskedWalk(self, step, batch, position_N, self.branches)
            state_Nd, found = walk.run(state_Nd)
            self._keep(plan, found.report())
        else:
            walk = CompactWalk(self, plan, batch, position_N, entry_LR)
            state_Nd, self.turn.report = walk.run(state_Nd)
            self.entries[:, plan.row_R] = walk.entry_LR
        return self.norm(state_Nd)

    def _has_graph(self, plan: StepPlan, batch: PagedBatch) -> bool:
        """Graphs are for steps that decode and whose gates are asked, or that nobody can skip a layer of."""
        if self.graphs is None or not batch.decodes or len(plan.row_R) > self.settings.graph_rows:
            return False
        return plan.asks or plan.bars_LN is None

    def _keep(self, plan: StepPlan, report: StepReport) -> None:
        """The report of a step of one token each; under `project` every token leaves an entry in every layer."""
        self.turn.report = report
        projects = self.config.kv_on_skip == KVPolicy.PROJECT
        self.entries[:, plan.row_R] += 1 if projects else ~report.skip_LN

    def _restart(self, plan: StepPlan, batch: PagedBatch) -> None:
        """Memory for the step's requests; those that begin have what lies in the cache before their tokens."""
        restart = plan.restart_R
        if not restart.any():
            return
        if self.kernels is not None:
            self.kernels.leave()
        rows = int(plan.row_R.max()) + 1
        if rows > self.entries.shape[1]:
            added = np.zeros((len(self.entries), max(rows, 8)), np.int64)
            self.entries = np.concatenate([self.entries, added], axis=1)
        self.entries[:, plan.row_R[restart]] = batch.before_R[restart]
        if self.chunk_rows is not None:
            if self.chunk_rows.reserve(max(rows, self.rows_at_once)) and self.graphs is not None:
                self.graphs.forget()
            for row in plan.row_R[restart].tolist():
                self.chunk_rows.reset(row)

    def _without_cache(self, state: Tensor, positions: Tensor) -> Tensor:
        """The shape of a step for vLLM's memory profile: every layer and module, no attention, no memory."""
        glance = None
        for layer in self.served_layers():
            normed = self.unit_norm(state)
            glance = self.look(layer, normed, glance)
            injected = self.inject(layer, state, glance, None, None)
            attention = layer.self_attn
            query, _, _ = attention.queries_keys_values(
                layer.input_norm(injected, state, normed), positions
            )
            state = layer.finish(injected, query)
        return state

    # --- what both walks are made of --------------------------------------------------------------

    def unit_norm(self, state_Nd: Tensor) -> Tensor:
        """x̂: the state normed without a weight."""
        return rms_norm(state_Nd, self._ones, self.config.rms_norm_eps)

    def look(self, layer: ServedLayer, normed_Nd: Tensor, earlier: Glance | None) -> Glance | None:
        """What the layer's PAW sees, or what the PAW before it saw."""
        if layer.paw is None:
            return earlier
        assert self.preview is not None
        normed = normed_Nd.unsqueeze(0)
        query = layer.paw.query(normed, self.preview)
        shortlist = None if earlier is None else earlier.shortlist
        if shortlist is None:
            embedding: Any = self.embed_tokens.weight
            shortlist = self.preview.shortlist(query, embedding)
        return layer.paw(normed, query, self.preview, shortlist, self.config.paw_temperature)

    def find_chunks(self, normed_Nd: Tensor, plan: StepPlan, length_R: np.ndarray) -> ChunkStep:
        """Boundaries of the step's tokens, and what they do to the requests' chunks."""
        assert self.boundary is not None and self.chunk_rows is not None
        logits, _ = self.boundary(normed_Nd.unsqueeze(0))
        return self.chunk_rows.advance(plan.row_R, length_R, logits[0].argmax(-1).cpu().numpy())

    def fix_chunks(self, normed_Rd: Tensor, row_R: Tensor) -> FixedChunks:
        """The same for a decode step of these rows of memory, without leaving the device."""
        assert self.boundary is not None and self.chunk_rows is not None
        logits, _ = self.boundary(normed_Rd.unsqueeze(0))
        return FixedChunks(self.chunk_rows, row_R, logits[0].argmax(-1))

    def read_chunks(
        self, layer: ServedLayer, step: ChunkStep | None, normed_Nd: Tensor
    ) -> ReaderPass | None:
        if layer.chunk_reader is None:
            return None
        assert step is not None and self.chunk_rows is not None
        return ReaderPass(self.chunk_rows, layer.index, layer.chunk_reader, step, normed_Nd)

    def gate_probability(
        self, layer: ServedLayer, normed_Nd: Tensor, motion_1N2: Tensor, glance: Glance | None
    ) -> Tensor | None:
        """p [N] of the layer's block, float32; None if it has no gate."""
        if layer.skip_gate is None:
            return None
        return torch.sigmoid(layer.skip_gate(normed_Nd.unsqueeze(0), motion_1N2, glance))[0]

    def inject(
        self, layer: ServedLayer, state_Nd: Tensor, glance: Glance | None, reader: ChunkReading | None,
        index: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """h̃ of these tokens (index None: all), the same object as h where the layer adds nothing."""
        injected = state_Nd
        if layer.paw is not None:
            assert glance is not None
            pooled = glance.pooled_BTE[0]
            injected = layer.paw.inject(injected, pooled if index is None else pooled[index])
        if reader is not None:
            injected = injected + reader.read(index)
        return injected

    @torch.inference_mode(False)  # so that new weights can be copied outside of it, too
    @torch.no_grad()
    def prepare(self, head_Vd: Tensor) -> None:
        """What needs weights and pages: the kernels of decode steps, if they are asked for."""
        if self.settings.decode_path == "kernel":
            self.kernels = KernelSteps(self, view_of(self, head_Vd), self.longest)
            self.kernels.prepare(pages_of(self))

    def forget_derived(self) -> None:
        """Drop what is kept of weights between calls, after they changed."""
        if self.graphs is not None:
            self.graphs.forget()
        if self.preview is not None:
            self.preview.forget_derived()
        for layer in self.served_layers():
            if layer.paw is not None:
                layer.paw.forget_derived()


class FBSForCausalLM(nn.Module):
    """What vLLM loads for the architecture FBSForCausalLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.config: FBSConfig = config
        self.model = ServedModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        turn = self.model.turn
        made, turn.logits_RV = turn.logits_RV, None
        if made is not None:
            return made
        if self.model.native is not None:
            head: Any = self.lm_head.weight
            made = product_of_few_rows(head[: self.config.vocab_size], None, hidden_states)
            if made is not None:
                return made
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names that were filled. Raises ValueError for a checkpoint with other FBS modules than its configuration."""
        targets: dict[str, Any] = dict(self.named_parameters())
        targets |= {n: b for n, b in self.named_buffers() if n.startswith("model.preview.")}
        filled: set[str] = set()
        for name, tensor in weights:
            if self.config.tie_word_embeddings and name.startswith("lm_head."):
                continue
            *path, part, last = name.split(".")
            shard = _STACKED.get(part)
            if shard is not None:
                name = ".".join((*path, shard[0], last))
            if name not in targets:
                raise ValueError(
                    f"the checkpoint has {name}, of which its configuration knows nothing"
                )
            target = targets[name]
            if shard is not None:
                target.weight_loader(target, tensor, shard[1])
            else:
                getattr(target, "weight_loader", default_weight_loader)(target, tensor)
            filled.add(name)
        tied = self.config.tie_word_embeddings
        missing = sorted(
            name
            for name in targets.keys() - filled
            if not (tied and name.startswith("lm_head."))
            and ".attn." not in name
            and ".kv_proj." not in name
        )
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors, {missing[0]} first")
        self.model.forget_derived()
        self.model.native = NativeWalk.of(self.model)
        return filled

    @torch.no_grad()
    def apply_gates(self, bundle: GateBundle) -> None:
        """Copy a bundle's tensors in place; ValueError, with nothing changed, if one does not fit."""
        named = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        apply_bundle(named, bundle)
        # Nothing is derived from gates, and graphs read them where they are.
        previews = any(".skip_gate." not in name for name in bundle.tensors)
        if previews:
            self.model.forget_derived()
        if self.model.kernels is not None:
            self.model.kernels.copy_weights(previews)
