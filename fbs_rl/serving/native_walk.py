"""A decode step of a few rows on a CPU by the compiled step of fbs_rl.model.native, in vLLM's own paged cache.

It gives what compact_walk gives. Of pages it knows one order: keys column by column, then values row by row.

Letters: R rows of one token each, L layers.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fbs_rl.model.native.arguments import fill, linear, structures
from fbs_rl.model.native.library import native_library
from fbs_rl.model.native.weights import NativeWeights, is_supported
from fbs_rl.model.native_step import MOST_ROWS, entry_point, threads_for
from fbs_rl.serving.paged_attention import PagedBatch, cache_of, keeps_columns
from fbs_rl.serving.served_layer import ServedLayer, raw_weights
from fbs_rl.serving.step_plan import StepPlan, StepReport
from fbs_rl.types import KVPolicy

if TYPE_CHECKING:
    from fbs_rl.serving.served_model import ServedModel


class NativeWalk:
    """The model's weights as the compiled step reads them.

    They are those that were loaded: vLLM packs copies for its own products, so they are in memory twice.
    """

    def __init__(self, model: ServedModel, library: ctypes.CDLL) -> None:
        self.model, config = model, model.config
        self.layers = list(model.served_layers())
        embedding: Any = model.embed_tokens.weight
        self.dtype = embedding.dtype
        self.entry = entry_point(library, self.dtype)
        self.held = [raw_weights(layer) for layer in self.layers]
        self.weights = NativeWeights(
            config,
            ((layer, _parts(layer, raw)) for layer, raw in zip(self.layers, self.held, strict=True)),
            (config.head_dim or 1) ** -0.5, model.preview, model.boundary,
        )  # fmt: skip
        self.bytes = sum(w.numel() * w.element_size() for raw in self.held for w in raw.values())
        self.cache_type: Any = structures()["CacheArguments"] * len(self.layers)
        self.chunk_type: Any = structures()["ChunkArguments"] * len(self.layers)

    @classmethod
    def of(cls, model: ServedModel) -> NativeWalk | None:
        """For a model whose weights were just loaded; None where the compiled step cannot run it."""
        weight: Any = model.embed_tokens.weight
        if weight.device.type != "cpu" or model.settings.masked:
            return None
        if not is_supported(model.config) or weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        names = ("skip_gate", "paw", "chunk_reader", "skip_path", "preview", "boundary")
        own = (p for n, p in model.named_parameters() if any(f".{x}." in f".{n}" for x in names))
        if any(p.dtype != weight.dtype for p in own):
            return None
        layers = sum(p.numel() * p.element_size() for p in model.layers.parameters())
        if layers > model.settings.native_gib * 2**30:
            return None
        library = native_library()
        return None if library is None else cls(model, library)

    def takes(self, plan: StepPlan, batch: PagedBatch) -> bool:
        """Whether this step is for it: few rows, in pages of the order that it knows."""
        if not batch.decodes or len(plan.row_R) > MOST_ROWS:
            return False
        attention = self.layers[0].self_attn.attn
        return keeps_columns(attention) and cache_of(attention).dtype == self.dtype

    def run(
        self, state_Rd: Tensor, position_R: Tensor, plan: StepPlan, batch: PagedBatch, entry_LR: np.ndarray
    ) -> tuple[Tensor, StepReport]:  # fmt: skip
        """As CompactWalk.run."""
        model, config, rows = self.model, self.model.config, len(plan.row_R)
        layers, looks = len(self.layers), len(config.preview_layers)
        if model.preview is not None:
            embedding: Any = model.embed_tokens.weight
            self.weights.tell_derived(model.preview, embedding)
        rotary: Any = self.layers[0].self_attn.rotary_emb
        cosine, sine = rotary.cos_sin_cache[position_R].float().chunk(2, dim=-1)
        projects = config.kv_on_skip == KVPolicy.PROJECT
        entries = np.broadcast_to(batch.before_R, (layers, rows)) if projects else entry_LR
        held: dict[str, Any] = {
            "input": state_Rd.contiguous(), "output": torch.empty_like(state_Rd),
            "prob": torch.empty(layers, rows), "skip": torch.empty(layers, rows, dtype=torch.bool),
            "windows": torch.empty(looks, rows), "queries": torch.empty(looks, rows, config.paw_rank),
            "inclusions": torch.empty(looks, rows, config.paw_horizon), "boundary": torch.empty(rows, 5),
            "closes": torch.empty(rows, dtype=torch.bool), "added": torch.zeros(layers, dtype=torch.uint8),
            "never": torch.zeros(layers, dtype=torch.bool),
            "cosine": cosine.contiguous(), "sine": sine.contiguous(),
            "entries": torch.from_numpy(np.ascontiguousarray(entries, np.int64)),
            "pages": batch.block_RP[:rows].int().contiguous(),
            "chunk_row": torch.from_numpy(np.ascontiguousarray(plan.row_R, np.int64)),
        }  # fmt: skip
        if plan.bar_LN is not None:
            held["bar"] = plan.bar_LN.float().contiguous()
        caches, chunks = self._memory()
        counts = self._chunk_counts(held["chunk_row"])
        arguments = fill(
            structures()["StepArguments"](),
            rows=rows, threads=threads_for(self.bytes), mode=int(plan.bar_LN is not None), asks=int(plan.asks),
            consensus=int(plan.consensus), page=batch.page, page_columns=1, bar_stride=rows,
            pages_stride=held["pages"].shape[1], temperature=float(config.paw_temperature),
            cache=ctypes.addressof(caches), chunks=ctypes.addressof(chunks), **held, **counts,
        )  # fmt: skip
        before = {name: counts[name].clone() for name in counts}
        self.entry(ctypes.byref(self.weights.arguments), ctypes.byref(arguments))
        self._keep_counts(held["chunk_row"], counts)
        return held["output"], _report(held, before)

    def _memory(self) -> tuple[Any, Any]:
        """Where every layer's pages and chunks are."""
        caches, chunks = self.cache_type(), self.chunk_type()
        for layer, told in zip(self.layers, caches, strict=True):
            pages = cache_of(layer.self_attn.attn)
            size = pages.element_size()
            told.keys = pages.data_ptr()
            told.values = pages.data_ptr() + pages.shape[2] * layer.self_attn.head_dim * size
            told.block_stride, told.head_stride = pages.stride(0), pages.stride(1)
        rows = self.model.chunk_rows
        for index in self.model.config.reader_layers:
            assert rows is not None
            fill(
                chunks[index], keys=rows.key[index], values=rows.value[index], open_sum=rows.open_sum[index],
                ring_stride=rows.key[index].stride(0),
            )  # fmt: skip
        return caches, chunks

    def _chunk_counts(self, row_R: Tensor) -> dict[str, Tensor]:
        rows = self.model.chunk_rows
        if rows is None:
            return {}
        names = ("closed", "open_size", "continuable")
        return {name: getattr(rows, name)[row_R] for name in names}

    def _keep_counts(self, row_R: Tensor, counts: dict[str, Tensor]) -> None:
        for name, count in counts.items():
            getattr(self.model.chunk_rows, name)[row_R] = count


def _report(held: dict[str, Any], before: dict[str, Tensor]) -> StepReport:
    skip_LN, closes, closed = held["skip"].numpy(), None, None
    if before:
        closes = (held["closes"] & (before["open_size"] > 0)).numpy()
        closed = before["closed"].numpy()
    entered = int((~skip_LN).any(1).sum())
    return StepReport(
        skip_LN, held["prob"].numpy(), closes, closed, entered, len(skip_LN) - entered
    )


def _parts(layer: ServedLayer, raw: dict[str, Tensor]) -> dict[str, Any]:
    attention = layer.self_attn
    weights = raw["qkv"].split(attention.widths)
    bias = raw["qkv_bias"].split(attention.widths) if "qkv_bias" in raw else (None, None, None)
    names = ("query", "key", "value")
    parts = {n: linear(w, b) for n, w, b in zip(names, weights, bias, strict=True)}
    gate, up = raw["gate_up"].chunk(2)
    parts |= {"gate": linear(gate), "up": linear(up), "down": linear(raw["down"])}
    parts["out"] = linear(raw["out"], raw.get("out_bias"))
    parts["input_norm"] = layer.input_layernorm.weight
    parts["post_norm"] = layer.post_attention_layernorm.weight
    if attention.norms_heads:
        parts["query_norm"], parts["key_norm"] = attention.q_norm.weight, attention.k_norm.weight
    return parts
