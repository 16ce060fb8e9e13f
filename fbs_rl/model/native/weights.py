"""A model's weights as the compiled step reads them: by address, so nothing is copied and updates in place are seen."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fbs_rl.model.chunk_head import BoundaryHead, distance_bucket
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.kernel_limits import kernel_limits
from fbs_rl.model.native.arguments import fill, linear, structures
from fbs_rl.model.preview import PreviewHead
from fbs_rl.model.skip_path import SkipAdapter
from fbs_rl.types import Compression, KVPolicy

_WIDEST_HEAD = 512  # execute.h keeps one head on the stack


class NativeWeights:
    """Arguments of every layer and of the model, and the tensors that they point to."""

    def __init__(self, config: FBSConfig, layers: Iterable[tuple[Any, Mapping[str, Any]]], scale: float,
                 preview: PreviewHead | None, boundary: BoundaryHead | None) -> None:  # fmt: skip
        """layers: each with its backbone's parts, as LayerArguments names them (a Linear, or a norm's weight)."""
        known = structures()
        made = [_layer(config, layer, parts) for layer, parts in layers]
        self.layers: Any = (known["LayerArguments"] * len(made))(*made)
        self.buckets = distance_bucket(
            torch.arange(config.chunk_cache), config.chunk_distance_buckets, config.chunk_cache
        ).int()
        self.arguments: Any = known["ModelArguments"]()
        heads = config.num_attention_heads
        fill(
            self.arguments,
            layers=len(made), width=config.hidden_size, inner=config.intermediate_size, heads=heads,
            groups=config.num_key_value_heads or heads, head_dim=config.head_dim,
            eps=config.rms_norm_eps, scale=scale, block=config.gate_block, ahead=config.gate_ahead,
            clip=config.gate_logit_clip,
            projects=int(config.kv_on_skip == KVPolicy.PROJECT), adapter_rank=config.adapter_rank,
            gate_residual=config.gate_residual_width, gate_preview=config.gate_preview_width,
            gate_hidden=config.gate_hidden, reads_residual=int(config.gate_inputs != "preview"),
            reads_preview=int(config.gate_inputs != "residual"), layer=ctypes.addressof(self.layers),
            boundary_layer=-1, rank=1, candidates=1, horizons=1, shortlist=1, window_hidden=1,
        )  # fmt: skip
        if config.gate_inputs == "preview":
            self.arguments.gate_residual = 0
        if config.gate_inputs == "residual":
            self.arguments.gate_preview = 0
        if preview is not None:
            self._tell_preview(config, preview)
        if boundary is not None:
            fill(
                self.arguments,
                boundary_layer=config.boundary_layer, boundary=_of(boundary.classify),
                buckets=config.chunk_distance_buckets, chunk_width=config.chunk_width,
                chunk_heads=config.chunk_heads, chunk_places=config.chunk_cache,
                bucket_of=self.buckets,
            )  # fmt: skip

    def _tell_preview(self, config: FBSConfig, preview: PreviewHead) -> None:
        fixed = config.paw_fixed_window if config.paw_window == "fixed" else 0
        fill(
            self.arguments,
            horizons=config.paw_horizon, rank=config.paw_rank, candidates=config.preview_vocab_size,
            shortlist=config.paw_shortlist, window_hidden=config.paw_window_hidden, fixed_window=fixed,
            hard=int(config.paw_inclusion == "hard"), mixes=int(config.paw_compression == Compression.CONV),
            state_map=_of(preview.state_proj), horizon_maps=preview.horizon_maps,
        )  # fmt: skip

    def tell_derived(self, preview: PreviewHead, embedding_Vd: Tensor) -> None:
        """What follows from the preview's weights, remade where they changed."""
        derived = preview.derive(embedding_Vd)
        self.prior = preview.log_prior_N.float()
        fill(
            self.arguments,
            reduced=derived.reduced_NR, mean_map=derived.mean_map_RR, prior=self.prior,
        )  # fmt: skip


def _of(module: nn.Module) -> Any:
    made: Any = module
    return linear(made.weight, made.bias)


def _layer(config: FBSConfig, layer: Any, parts: Mapping[str, Any]) -> Any:
    made: Any = structures()["LayerArguments"]()
    fill(made, **parts)
    fill(made, is_protected=int(layer.index in config.protected_layers))
    paw, reader, gate, path = layer.paw, layer.chunk_reader, layer.skip_gate, layer.skip_path
    if paw is not None:
        fill(made, looks=1, query_scale=paw.query_scale_R, query_bias=paw.query_bias_R)
        fill(made, up_norm=paw.up_norm.weight, strength=paw.strength, preview_up=_of(paw.up))
        if paw.fixed_window is None:
            fill(made, window_in=_of(paw.window_in), window_out=_of(paw.window_out))
        if config.paw_compression == Compression.CONV:
            fill(made, mix=paw.mix.weight, mix_bias=paw.mix.bias)
    if reader is not None:
        fill(
            made,
            reads=1, summarise=_of(reader.summarise), chunk_query=_of(reader.query), chunk_key=_of(reader.key),
            chunk_value=_of(reader.value), chunk_out=_of(reader.out), null_key=reader.null_key,
            null_value=reader.null_value, distance_bias=reader.distance_bias, chunk_strength=reader.strength,
        )  # fmt: skip
    if gate is not None:
        fill(made, asks=1, hidden=_of(gate.hidden), decide=_of(gate.out))
        if gate.reads_residual:
            fill(made, reduce=_of(gate.reduce), reduce_norm=gate.reduce_norm.weight)
        if gate.reads_preview:
            fill(made, preview=_of(gate.preview))
    if isinstance(path, SkipAdapter):
        fill(made, adapts=1, adapter_down=_of(path.down), adapter_up=_of(path.up))
    return made


def is_supported(config: FBSConfig) -> bool:
    """Whether the compiled step computes every option of the configuration."""
    return (config.head_dim or 0) <= _WIDEST_HEAD and not any(kernel_limits(config))


class Watch:
    """Whether a model's parameters still lie where they lay, and nobody listens to its modules' calls.

    Asked at every step, where memory is cold, so that each object looked at costs half a microsecond.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        tables: list[Any] = [t for m in modules for t in (m._parameters, m._buffers)]
        self._places = [(t, name) for t in tables for name in t if t[name] is not None]
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._held = self._there()
        self._addresses = self._now()
        self._owners = self._count()
        self._unheard_at = -1
        named = (*model.named_parameters(), *model.named_buffers())
        # Angles come with the tokens, and stay in float32 whatever the model's type.
        tensors = [t for name, t in named if not name.startswith("rotary_emb.")]
        self.bytes = sum(t.numel() * t.element_size() for t in tensors)
        self.kinds = {(t.dtype, t.device.type) for t in tensors if t.is_floating_point()}

    def _there(self) -> list[Tensor]:
        return [table[name] for table, name in self._places]

    def _now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._held))

    def _count(self) -> list[int]:
        return list(map(sys.getrefcount, self._held))

    def unchanged(self, briefly: bool = False) -> bool:
        """briefly: do not look whether modules hold other tensors, unless the old ones were let go by somebody."""
        if self._addresses != self._now():
            return False
        if briefly and self._owners == self._count():
            return True
        same = all(a is b for a, b in zip(self._held, self._there(), strict=True))
        self._owners = self._count()
        return same

    def unheard(self) -> bool:
        registered = RemovableHandle.next_id  # every hook takes a number
        if registered != self._unheard_at:
            if any(self._hooks):
                return False
            self._unheard_at = registered
        return True
