"""step_pass.run_step by the compiled step of fbs_rl.model.native, where it can: on a CPU, without gradients."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fbs_rl.model.decision import Decider
from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.layer import FBSLayer
from fbs_rl.model.native.arguments import fill, linear, structures
from fbs_rl.model.native.library import native_library
from fbs_rl.model.native.weights import NativeWeights, Watch, is_supported
from fbs_rl.model.native_memory import NativeMemory
from fbs_rl.model.sequence_pass import PassResult, Tokens
from fbs_rl.types import ChunkTap, GateMode, KVPolicy, PassTaps, PreviewTap

if TYPE_CHECKING:
    from fbs_rl.model.modeling import FBSModel

MOST_ROWS = 32
"""As many as products have been made and measured for; a library's are made for more."""
_MOST_OWED = 16
"""Tokens of a row whose keys and values a skipped layer may owe: their product then still costs what its weights do."""
_SHARED_BYTES = 4 << 20
"""Weights that it takes to share work between threads: for less, waiting for each other costs more."""
_MODES = {GateMode.DENSE: 0, GateMode.THRESHOLD: 1, GateMode.SAMPLE: 2, GateMode.REPLAY: 3}
_SUFFIX = {torch.float32: "float", torch.bfloat16: "bf16"}


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
        # Reading an option of a configuration takes microseconds.
        self.layers, self.looks = len(layers), config.preview_layers
        self.horizon, self.rank = config.paw_horizon, config.paw_rank
        self.key_shape = config.num_key_value_heads or 0, 1, config.head_dim or 0
        self.projects = config.kv_on_skip == KVPolicy.PROJECT
        self.never: tuple[frozenset[int], Tensor] = (
            frozenset(),
            torch.zeros(self.layers, dtype=torch.bool),
        )

    def run(
        self, model: FBSModel, tokens: Tokens, decider: Decider, window_temperature: float, cache: FBSCache
    ) -> PassResult:  # fmt: skip
        """As step_pass.run_step."""
        state, mode = tokens.state_BTd.contiguous(), decider.request.mode
        layers, rows, looks = self.layers, len(state), len(self.looks)
        if model.preview is not None:
            self.weights.tell_derived(model.preview, model.embed_tokens.weight)
        memory = self._memory(model, cache, state)
        # What is owed is paid here in every mode: the same numbers then come of it, whichever mode asks.
        owes = self.projects and (mode is not GateMode.DENSE or any(kv.owed for kv in cache.layers))
        disagrees = rows > 1 and mode is not GateMode.DENSE and not self.projects
        held: dict[str, Any] = {
            "input": state,
            "output": torch.empty_like(state),
            "prob": torch.empty(layers, rows, 1),
            "skip": torch.empty(layers, rows, 1, dtype=torch.bool),
            "windows": torch.empty(looks, rows, 1),
            "queries": torch.empty(looks, rows, 1, self.rank),
            "inclusions": torch.empty(looks, rows, 1, self.horizon),
            "boundary": torch.empty(rows, 1, 5),
            "close_prob": torch.empty(rows, 1),
            "closes": torch.empty(rows, 1, dtype=torch.bool),
            "added": torch.zeros(layers, dtype=torch.uint8),
            "never": self._never(decider.forced),
            "entries": memory.prepare(cache, owes, disagrees),
            **_rotation(tokens, self.key_shape[-1]),
            **_bars(decider),
        }
        before_B1 = None
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
            memory.prepare_chunks(cache, state[:, 0])
        arguments = fill(
            structures()["StepArguments"](),
            rows=rows, threads=threads_for(self.watch.bytes), mode=_MODES[mode], asks=1,
            temperature=float(window_temperature), most_owed=memory.most_owed if owes else 0,
            bar_stride=0 if mode is GateMode.THRESHOLD else rows, **memory.addresses, **held,
        )  # fmt: skip
        self.entry(ctypes.byref(self.weights.arguments), ctypes.byref(arguments))
        memory.keep(cache, held["added"])
        return self._result(tokens, decider, held, before_B1)

    def _memory(self, model: FBSModel, cache: FBSCache, state_B1d: Tensor) -> NativeMemory:
        """The cache as it was told of at the step before, if it is the same rows'."""
        memory = cache.native
        if not isinstance(memory, NativeMemory) or memory.rows != len(state_B1d):
            like = state_B1d.new_empty(len(state_B1d), *self.key_shape)
            most_owed = max(_MOST_OWED // len(state_B1d), 1) if self.projects else 0
            memory = cache.native = NativeMemory(model, like, most_owed)
        return memory

    def _never(self, forced: frozenset[int]) -> Tensor:
        if self.never[0] != forced:
            self.never = forced, torch.tensor([i in forced for i in range(self.layers)])
        return self.never[1]

    def _result(
        self, tokens: Tokens, decider: Decider, held: dict[str, Any], before_B1: Tensor | None
    ) -> PassResult:
        output = held["output"]
        taps = PassTaps(gated_BT=decider.gated_BT, valid_BT=tokens.valid_BT, final_state_BTd=output)
        queries, windows = held["queries"].to(output.dtype).unbind(), held["windows"].unbind()
        seen = zip(self.looks, queries, windows, held["inclusions"].unbind(), strict=True)
        taps.previews = [PreviewTap(*each) for each in seen]
        if before_B1 is not None:
            logits, blank = held["boundary"].split((4, 1), dim=-1)
            taps.chunks = ChunkTap(
                logits, blank.squeeze(-1), held["close_prob"], held["closes"], before_B1
            )
        return PassResult(output, held["prob"], held["skip"], taps)


_ready: WeakKeyDictionary[nn.Module, NativeStep] = WeakKeyDictionary()


def native_step(
    model: FBSModel, tokens: Tokens, cache: FBSCache | None = None
) -> NativeStep | None:
    """The compiled step of this model, if it can run these tokens. cache: what they follow."""
    state = tokens.state_BTd
    if state.device.type != "cpu" or len(state) > MOST_ROWS or tokens.valid_BT is not None:
        return None
    if torch.is_grad_enabled() or _get_current_dispatch_mode() is not None:
        return None
    library = native_library()
    if library is None or not is_supported(model.config):
        return None
    found = _ready.get(model)
    goes_on = cache is not None and cache.native is not None
    if found is None or not found.watch.unchanged(briefly=goes_on):
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


def _rotation(tokens: Tokens, head_dim: int) -> dict[str, Tensor]:
    half = head_dim // 2
    return {
        name: part[:, 0, :half].float().expand(len(tokens.state_BTd), -1).contiguous()
        for name, part in zip(("cosine", "sine"), tokens.rope, strict=True)
    }


def _bars(decider: Decider) -> dict[str, Tensor]:
    mode = decider.request.mode
    if mode is GateMode.THRESHOLD:
        assert decider.bar_BT is not None
        return {"bar": decider.bar_BT.contiguous()}
    if mode is GateMode.SAMPLE and decider.request.noise_LBT is not None:
        return {"bar": decider.noise().contiguous()}
    if mode is GateMode.SAMPLE:
        assert decider.request.seed_B is not None
        return {
            "seed": decider.request.seed_B.contiguous(),
            "position": decider.position_BT.long().contiguous(),
            "gated": decider.gated_BT.contiguous(),
        }
    if mode is GateMode.REPLAY:
        assert decider.request.skip_LBT is not None
        return {"given": decider.request.skip_LBT.contiguous()}
    return {}
