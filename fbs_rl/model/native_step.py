"""step_pass.run_step by the compiled step of fbs_rl.model.native, where it can: on a CPU, without gradients."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fbs_rl.model.chunk_head import close_probability
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.decision import Decider
from fbs_rl.model.kv_cache import FBSCache, LayerKV, OwedKeys
from fbs_rl.model.layer import FBSLayer
from fbs_rl.model.native.arguments import fill, linear, structures
from fbs_rl.model.native.library import native_library
from fbs_rl.model.native.weights import NativeWeights, Watch, is_supported
from fbs_rl.model.sequence_pass import PassResult, Tokens
from fbs_rl.types import ChunkTap, GateMode, KVPolicy, PassTaps, PreviewTap

if TYPE_CHECKING:
    from fbs_rl.model.modeling import FBSModel

MOST_ROWS = 32
"""Beyond it a library's products, which are made for many rows, are faster."""
_MOST_OWED = 16
"""Tokens of a row whose keys and values a skipped layer may owe: their product then still costs what its weights do."""
_SHARED_BYTES = 4 << 20
"""Weights that it takes to share work between threads: for less, waiting for each other costs more."""
_MODES = {GateMode.DENSE: 0, GateMode.THRESHOLD: 1, GateMode.SAMPLE: 2, GateMode.REPLAY: 3}
_SUFFIX = {torch.float32: "float", torch.bfloat16: "bf16"}
_OWES = 2  # what a step says of a layer whose new entry it owes (arguments.h)


class NativeStep:
    """One model's weights, ready for the compiled step. The buffers of a step are made anew each time."""

    def __init__(self, model: FBSModel, library: ctypes.CDLL, watch: Watch) -> None:
        config = model.config
        (self.dtype, _), *_ = watch.kinds
        self.watch, self.entry = watch, entry_point(library, self.dtype)
        layers = list(model.fbs_layers())
        self.weights = NativeWeights(
            config, ((layer, _backbone_parts(layer)) for layer in layers), layers[0].self_attn.scaling,
            model.preview, model.boundary,
        )  # fmt: skip
        self.cache_type: Any = structures()["CacheArguments"] * len(layers)
        self.chunk_type: Any = structures()["ChunkArguments"] * len(layers)

    def run(
        self, model: FBSModel, tokens: Tokens, decider: Decider, window_temperature: float, cache: FBSCache
    ) -> PassResult:  # fmt: skip
        """As step_pass.run_step."""
        config, state = model.config, tokens.state_BTd.contiguous()
        layers, rows = config.layer_count, len(state)
        looks = config.preview_layers
        if model.preview is not None:
            self.weights.tell_derived(model.preview, model.embed_tokens.weight)
        held: dict[str, Any] = {
            "input": state,
            "output": torch.empty_like(state),
            "prob": torch.empty(layers, rows, 1),
            "skip": torch.empty(layers, rows, 1, dtype=torch.bool),
            "windows": torch.empty(len(looks), rows, 1),
            "queries": torch.empty(len(looks), rows, 1, config.paw_rank),
            "inclusions": torch.empty(len(looks), rows, 1, config.paw_horizon),
            "boundary": torch.empty(rows, 1, 5),
            "closes": torch.empty(rows, 1, dtype=torch.bool),
            "added": torch.zeros(layers, dtype=torch.uint8),
            "never": torch.tensor([i in decider.forced for i in range(layers)]),
            **_rotation(tokens, config),
            **_bars(decider),
        }
        entries, caches, most_owed = self._entries(model, cache, state, decider)
        held["entries"] = entries
        before_B1 = None
        chunk_memory = self.chunk_type()
        if model.boundary is not None:
            chunks = cache.chunk_state(rows, state.device)
            before_B1 = chunks.closed_B.unsqueeze(1)
            # Others may hold what was so far; the step writes in place.
            chunks.closed_B, chunks.open_size_B = chunks.closed_B.clone(), chunks.open_size_B.clone()  # fmt: skip
            chunks.continuable_B = chunks.continuable_B.clone()
            held |= {
                "closed": chunks.closed_B,
                "open_size": chunks.open_size_B,
                "continuable": chunks.continuable_B,
                "chunk_row": torch.arange(rows),
            }
            for index in config.reader_layers:
                layer: Any = model.layers[index]
                ring = cache.ring(index, layer.chunk_reader, state[:, 0])
                fill(
                    chunk_memory[index], keys=ring.key_BCW, values=ring.value_BCW, open_sum=ring.open_sum_Bd,
                    ring_stride=ring.key_BCW.stride(0),
                )  # fmt: skip
        arguments = fill(
            structures()["StepArguments"](),
            rows=rows, threads=threads_for(self.watch.bytes), mode=_MODES[decider.request.mode], asks=1,
            temperature=float(window_temperature), most_owed=most_owed, cache=ctypes.addressof(caches),
            chunks=ctypes.addressof(chunk_memory), **held,
        )  # fmt: skip
        arguments.bar_stride = 0 if decider.request.mode is GateMode.THRESHOLD else rows
        self.entry(ctypes.byref(self.weights.arguments), ctypes.byref(arguments))
        for kv, added in zip(cache.layers, held["added"].tolist(), strict=True):
            kv.length += added > 0
            if kv.owed is not None and added:
                kv.owed.count = kv.owed.count + 1 if added == _OWES else 0
        return _result(model, tokens, decider, held, before_B1)

    def _entries(
        self, model: FBSModel, cache: FBSCache, state: Tensor, decider: Decider
    ) -> tuple[Tensor, Any, int]:
        """Places in use [L, rows], every layer's memory with room for one more, and how much of it may be owed."""
        config = model.config
        like = state.new_empty(len(state), config.num_key_value_heads or 0, 1, config.head_dim or 0)
        disagree = len(state) > 1 and decider.request.mode is not GateMode.DENSE
        caches = self.cache_type()
        owes = config.kv_on_skip == KVPolicy.PROJECT and decider.request.mode is not GateMode.DENSE
        most_owed = max(_MOST_OWED // len(state), 1) if owes else 0
        for layer, kv, told in zip(model.fbs_layers(), cache.layers, caches, strict=True):
            kv.reserve(like, kv.length + 1)
            if owes:
                _tell_owed(told, layer, kv, state, most_owed)
            else:
                kv.settle()
            if disagree and config.kv_on_skip == KVPolicy.NOOP:
                kv.mark_entries()
            keys, exists = kv.keys_BGSD, kv.entry_BS
            assert keys is not None and kv.values_BGSD is not None
            told.keys, told.values = keys.data_ptr(), kv.values_BGSD.data_ptr()
            told.row_stride, told.head_stride = keys.stride(0), keys.stride(1)
            if exists is not None:
                told.exists, told.exists_stride = exists.data_ptr(), exists.stride(0)
        lengths = torch.tensor([kv.length for kv in cache.layers])
        return lengths.unsqueeze(1).expand(-1, len(state)).contiguous(), caches, most_owed


def _tell_owed(told: Any, layer: FBSLayer, kv: LayerKV, state_B1d: Tensor, most: int) -> None:
    """Where the layer's owed columns are kept; made on first use."""
    if kv.owed is None:
        rows, _, width = state_B1d.shape
        half = layer.head_dim // 2
        inputs, cosine, sine = (torch.empty(most, rows, n) for n in (width, half, half))
        kv.owed = OwedKeys(layer.keys_values, inputs, cosine, sine)
    fill(
        told, owed_input=kv.owed.input_CBd, owed_cosine=kv.owed.cosine_CBH, owed_sine=kv.owed.sine_CBH,
        owed=kv.owed.count,
    )  # fmt: skip


_ready: WeakKeyDictionary[nn.Module, NativeStep] = WeakKeyDictionary()


def native_step(model: FBSModel, tokens: Tokens) -> NativeStep | None:
    """The compiled step of this model, if it can run these tokens."""
    state = tokens.state_BTd
    if state.device.type != "cpu" or len(state) > MOST_ROWS or tokens.valid_BT is not None:
        return None
    if torch.is_grad_enabled() or _get_current_dispatch_mode() is not None:
        return None
    library = native_library()
    if library is None or not is_supported(model.config):
        return None
    found = _ready.get(model)
    if found is None or not found.watch.unchanged():
        watch = Watch(model)
        kinds = watch.kinds
        if len(kinds) != 1 or next(iter(kinds)) not in {(d, "cpu") for d in _SUFFIX}:
            return None
        found = _ready[model] = NativeStep(model, library, watch)
    return found if found.dtype == state.dtype and found.watch.unheard() else None


def few_rows(layer: nn.Linear, input_BTd: Tensor) -> Tensor:
    """layer(input_BTd), by the compiled product where there are only a few tokens."""
    made = None
    if not (layer._forward_hooks or layer._forward_pre_hooks):
        made = product_of_few_rows(layer.weight, layer.bias, input_BTd)
    return layer(input_BTd) if made is None else made


def product_of_few_rows(weight: Tensor, bias: Tensor | None, input_BTd: Tensor) -> Tensor | None:
    """F.linear by the compiled product; None where that is not for it."""
    rows = input_BTd.numel() // max(input_BTd.shape[-1], 1)
    if input_BTd.device.type != "cpu" or not 0 < rows <= MOST_ROWS or torch.is_grad_enabled():
        return None
    dtype, library = input_BTd.dtype, native_library()
    if library is None or weight.dtype != dtype or dtype not in _SUFFIX:
        return None
    if _get_current_dispatch_mode() is not None:
        return None
    input_BTd, (outputs, inputs) = input_BTd.contiguous(), weight.shape
    out = input_BTd.new_empty(*input_BTd.shape[:-1], outputs)
    told = linear(weight, bias)
    getattr(library, f"fbs_product_{_SUFFIX[dtype]}")(
        ctypes.byref(told), ctypes.c_void_p(input_BTd.data_ptr()), ctypes.c_void_p(out.data_ptr()), rows,
        outputs, inputs, threads_for(weight.numel() * weight.element_size()),
    )  # fmt: skip
    return out


def entry_point(library: ctypes.CDLL, dtype: torch.dtype) -> Any:
    """The compiled step for a model of this type."""
    return getattr(library, f"fbs_step_{_SUFFIX[dtype]}")


def threads_for(weight_bytes: int) -> int:
    """How many threads share the work of reading weights of this size."""
    return torch.get_num_threads() if weight_bytes >= _SHARED_BYTES else 1


def _backbone_parts(layer: FBSLayer) -> dict[str, Any]:
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    parts: dict[str, Any] = {
        name: linear(part.weight, part.bias)
        for name, part in (
            ("query", attention.q_proj), ("key", attention.k_proj), ("value", attention.v_proj),
            ("out", attention.o_proj), ("gate", mlp.gate_proj), ("up", mlp.up_proj), ("down", mlp.down_proj),
        )
    }  # fmt: skip
    parts["input_norm"] = layer.input_layernorm.weight
    parts["post_norm"] = layer.post_attention_layernorm.weight
    if hasattr(attention, "q_norm"):
        parts["query_norm"], parts["key_norm"] = attention.q_norm.weight, attention.k_norm.weight
    return parts


def _rotation(tokens: Tokens, config: FBSConfig) -> dict[str, Tensor]:
    half = (config.head_dim or 0) // 2
    return {
        name: part[:, 0, :half].float().expand(len(tokens.state_BTd), -1).contiguous()
        for name, part in zip(("cosine", "sine"), tokens.rope, strict=True)
    }


def _bars(decider: Decider) -> dict[str, Tensor]:
    mode = decider.request.mode
    if mode is GateMode.THRESHOLD:
        assert decider.bar_BT is not None
        return {"bar": decider.bar_BT.contiguous()}
    if mode is GateMode.SAMPLE:
        assert decider.noise_LBT is not None
        return {"bar": decider.noise_LBT.contiguous()}
    if mode is GateMode.REPLAY:
        assert decider.request.skip_LBT is not None
        return {"given": decider.request.skip_LBT.contiguous()}
    return {}


def _result(
    model: FBSModel,
    tokens: Tokens,
    decider: Decider,
    held: dict[str, Any],
    before_B1: Tensor | None,
) -> PassResult:
    taps = PassTaps(
        gated_BT=decider.gated_BT, valid_BT=tokens.valid_BT, final_state_BTd=held["output"]
    )
    parts = (held["queries"].to(held["output"].dtype), held["windows"], held["inclusions"])
    taps.previews = [
        PreviewTap(layer, query, window, inclusion)
        for layer, query, window, inclusion in zip(model.config.preview_layers, *parts, strict=True)
    ]
    if before_B1 is not None:
        logits = held["boundary"]
        taps.chunks = ChunkTap(
            logits[..., :4],
            logits[..., 4],
            close_probability(logits[..., :4]),
            held["closes"],
            before_B1,
        )
    return PassResult(held["output"], held["prob"], held["skip"], taps)
