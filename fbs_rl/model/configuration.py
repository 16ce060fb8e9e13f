"""FBSConfig: the backbone's own configuration plus every option of the Fovea-Block-Skip modules.

A folder saved with it is a valid folder of the backbone too: the backbone's fields keep their names
at the top level, the FBS options have the prefixes `paw_`, `chunk_`, `gate_`, `loss_` and a few plain
names. Two presets: `paper` (the paper's text, literally) and `default` (what we recommend).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from fbs_rl.types import Compression, GateInputs, GateMode, KVPolicy, SkipPathKind

PRESETS: dict[str, dict[str, Any]] = {
    # Not this option's own default: folders that were saved before it was there mean 0.
    "default": {"gate_ahead": 1},
    "paper": {
        "kv_on_skip": KVPolicy.NOOP,
        "skip_path": SkipPathKind.IDENTITY,
        "paw_layers": "every:4",
        "loss_distill": 0.0,
    },
}


class FBSConfig(PreTrainedConfig):
    """Configuration of an FBS model. Layers are counted from 0; lists of layers accept negative indices.

    Made by hand it holds options only (`backbone_type` is empty); `bound_to` adds a backbone, after
    which the layers it names are checked too. Options that only training uses (losses) travel with
    the model, so that a checkpoint says how it was made.
    """

    model_type = "fbs"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "taps", "loss_parts"]

    # --- backbone: same names and meanings as in LlamaConfig and Qwen3Config -------------------
    backbone_type: str = ""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    # --- what a call does when it does not say ---------------------------------------------------
    gates: str = GateMode.DENSE
    """Gate mode of a call that names none."""
    tau: float = 0.8
    """Skip where the gate's probability is at least this (SPEC 4.7)."""
    gates_origin: str = "initial"
    """Where the gates' values come from: "initial" (arbitrary), "fitted" (closed form) or "trained"."""
    kv_on_skip: str = KVPolicy.PROJECT
    """What a skipped token leaves in the layer's cache (SPEC 4.6)."""
    skip_path: str = SkipPathKind.ADAPTER
    """What replaces a skipped layer (SPEC 4.2)."""
    adapter_rank: int = 32
    never_skip: Sequence[int] = ()
    """Layers that always run, besides the boundary layer of the Chunk-Head."""

    # --- PAW, SPEC 2 -----------------------------------------------------------------------------
    paw: bool = True
    paw_layers: str | Sequence[int] = "every:12"
    """"all", "every:N" (0, N, 2N, ...) or a list of layers."""
    paw_horizon: int = 15
    """K, the largest lookahead in tokens."""
    paw_window: str = "dynamic"
    """"dynamic": predicted per token; "fixed": always paw_fixed_window."""
    paw_fixed_window: int = 8
    paw_inclusion: str = "soft"
    """"soft": α = σ((ŵ − h + ½)/T); "hard": α = 1[h <= round(ŵ)], at least one horizon."""
    paw_temperature: float = 0.25
    """T of the soft inclusion at deployment; training anneals it from 1."""
    paw_window_hidden: int = 64
    paw_window_mean_frac: float = 0.54
    """Expected ŵ/K, used by the initial bias and by L_win."""
    paw_rank: int = 128
    paw_vocab_size: int = 32768
    """Size of the preview vocabulary in tokens (at most the backbone's)."""
    paw_shortlist: int = 64
    """M, candidates that the expectation embedding runs over."""
    paw_embed_space: str = "preview"
    """"preview": expectation over the rank-R embedding; "full": over true embedding rows."""
    paw_compression: str = Compression.CONV

    # --- Chunk-Head, SPEC 3 ----------------------------------------------------------------------
    chunk: bool = True
    chunk_boundary_layer: int | None = None
    """Layer whose input the boundary head reads; it never skips. None: min(2, L // 4)."""
    chunk_layers: Sequence[int] | None = None
    """Layers with chunk cross-attention. None: L/4, L/2, 3L/4, above the boundary layer."""
    chunk_width: int = 256
    chunk_heads: int = 4
    chunk_cache: int = 512
    """Closed chunks that a token can see, counted back from the newest."""
    chunk_distance_buckets: int = 32
    chunk_close_rate: float = 0.35
    """Prior of the closing rate for text without labels (SPEC 3.4)."""
    chunk_consistency: str = "cosine"
    """"cosine" or "infonce" (SPEC 3.6)."""

    # --- Skip-Gate, SPEC 4 -----------------------------------------------------------------------
    gate: bool = True
    gate_inputs: str = GateInputs.BOTH
    gate_residual_width: int = 64
    gate_preview_width: int = 32
    gate_hidden: int = 64
    gate_block: int = 1
    """Layers that share one decision, taken before the first of them."""
    gate_ahead: int = 0
    """Layers between what a gate reads and the block that it decides for: 0, or 1, where a decoder knows before a
    block begins who skips it, and the first block always runs."""
    gate_logit_clip: float = 6.0
    gate_bias_init: float = -2.0

    # --- position of a token in its paragraph and sentence (Segatron-like; paper, table D.4) -----
    segment_position: bool = False
    segment_max_sentences: int = 64
    segment_max_paragraphs: int = 64
    segment_max_tokens: int = 128

    # --- objective, SPEC 5 -----------------------------------------------------------------------
    loss_preview: float = 0.3
    loss_chunk: float = 0.1
    loss_consistency: float = 0.05
    loss_window: float = 0.01
    loss_gate: float = 0.01
    loss_gate_entropy: float = 0.01
    """Weight of −H(p) inside L_gate: what keeps gates undecided early on."""
    loss_gate_ceiling: float = 0.1
    """Weight of Σ_l relu(rate_l − 0.9)² inside L_gate: what keeps single layers from always being skipped."""
    loss_imitation: float = 0.0
    """Weight of the relative squared error of skip adapters against the layers they stand for, at every token."""
    loss_distill: float = 1.0
    """Weight of KL(dense || gated), used when gates act and dense logits are at hand or asked for."""
    loss_preview_taps: int = 2
    """PAW layers, drawn anew for each step, whose previews are scored."""
    loss_preview_every: int = 8
    """Every how manieth token's preview is scored, from an offset drawn for each step."""
    loss_window_nats: float = 2.5
    loss_skip_target: float = 0.05
    loss_coverage_min: float = 0.8
    loss_confidence_min: float = 0.6

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        for name in kwargs:
            if name.startswith(_OPTION_PREFIXES):
                raise ValueError(f"unknown option {name!r}{_nearest(name)}")
        super().__post_init__(**kwargs)
        self.validate()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> FBSConfig:
        """The named preset with `overrides`; raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(sorted(PRESETS))}")
        return cls(**{**PRESETS[name], **overrides})

    def bound_to(self, backbone: PreTrainedConfig) -> FBSConfig:
        """These options together with the fields of `backbone` (a LlamaConfig or Qwen3Config)."""
        fields = {
            k: v for k, v in backbone.to_dict().items() if k not in _NOT_INHERITED and k[0] != "_"
        }
        options = {k: v for k, v in self.to_dict().items() if k in OPTION_NAMES}
        return FBSConfig(**fields, **options, backbone_type=backbone.model_type)

    # --- derived ---------------------------------------------------------------------------------

    @property
    def layer_count(self) -> int:
        return self.num_hidden_layers

    @property
    def preview_layers(self) -> tuple[int, ...]:
        """Layers that hold a PAW, ascending; empty when PAW is off."""
        if not self.paw:
            return ()
        if isinstance(self.paw_layers, str):
            step = 1 if self.paw_layers == "all" else int(self.paw_layers.removeprefix("every:"))
            return tuple(range(0, self.layer_count, step))
        return self._resolve("paw_layers", self.paw_layers)

    @property
    def boundary_layer(self) -> int | None:
        if not self.chunk:
            return None
        if self.chunk_boundary_layer is None:
            return min(2, self.layer_count // 4)
        return self._resolve("chunk_boundary_layer", [self.chunk_boundary_layer])[0]

    @property
    def reader_layers(self) -> tuple[int, ...]:
        """Layers with chunk cross-attention, ascending; empty when the Chunk-Head is off."""
        if not self.chunk:
            return ()
        if self.chunk_layers is not None:
            return self._resolve("chunk_layers", self.chunk_layers)
        quarters = {self.layer_count * q // 4 for q in (1, 2, 3)}
        return tuple(sorted(layer for layer in quarters if layer > (self.boundary_layer or 0)))

    @property
    def protected_layers(self) -> frozenset[int]:
        """Layers that no gate may skip: `never_skip`, the boundary layer, a first block that no layer is ahead of."""
        if not self.gate:
            return frozenset(range(self.layer_count))
        forced = set(self._resolve("never_skip", self.never_skip))
        if self.gate_ahead:
            forced |= set(range(min(self.gate_block, self.layer_count)))
        if self.boundary_layer is not None:
            forced.add(self.boundary_layer)
        return frozenset(forced)

    @property
    def gate_leaders(self) -> tuple[int, ...]:
        """Layers that hold a gate: gate_ahead layers before each block with a layer that may be skipped."""
        # Asked often; a configuration's attributes are slow to read.
        count, ahead, block = self.layer_count, self.gate_ahead, self.gate_block
        protected = self.protected_layers
        blocks = (range(start, min(start + block, count)) for start in range(0, count, block))
        return tuple(layers.start - ahead for layers in blocks if not protected.issuperset(layers))

    def _block(self, start: int) -> range:
        """The layers of the block that begins at `start`."""
        return range(start, min(start + self.gate_block, self.layer_count))

    def block_asked_at(self, layer: int) -> range:
        """The block whose decision is taken where `layer` begins; empty where none is."""
        start = layer + self.gate_ahead
        return range(0) if start % self.gate_block else self._block(start)

    @property
    def preview_vocab_size(self) -> int:
        return min(self.paw_vocab_size, self.vocab_size)

    @property
    def preview_width(self) -> int:
        """Width of one expected embedding."""
        return self.hidden_size if self.paw_embed_space == "full" else self.paw_rank

    @property
    def pooled_width(self) -> int:
        """Width of ṽ, the compressed preview."""
        return self.preview_width * (
            self.paw_horizon if self.paw_compression == Compression.NONE else 1
        )

    def forced_layers(self, extra: Iterable[int] = ()) -> frozenset[int]:
        """Protected layers together with `extra` ones named by a call."""
        return self.protected_layers | set(self._resolve("never_skip", list(extra)))

    # --- checks ----------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise ValueError, in one sentence, for the first setting that cannot work."""
        _choose("gates", self.gates, [m.value for m in GateMode if m is not GateMode.REPLAY])
        _choose("gates_origin", self.gates_origin, ["initial", "fitted", "trained"])
        _choose("kv_on_skip", self.kv_on_skip, list(KVPolicy))
        _choose("skip_path", self.skip_path, list(SkipPathKind))
        _choose("paw_compression", self.paw_compression, list(Compression))
        _choose("gate_inputs", self.gate_inputs, list(GateInputs))
        _choose("paw_window", self.paw_window, ["dynamic", "fixed"])
        _choose("paw_inclusion", self.paw_inclusion, ["soft", "hard"])
        _choose("paw_embed_space", self.paw_embed_space, ["preview", "full"])
        _choose("chunk_consistency", self.chunk_consistency, ["cosine", "infonce"])
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("tau", "chunk_close_rate", "loss_skip_target", "paw_window_mean_frac"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if self.gate_ahead not in (0, 1):
            raise ValueError(
                f"gate_ahead is {self.gate_ahead}; a gate reads the state in front of its block (0) or of the layer "
                f"before (1)"
            )
        if self.paw_window_mean_frac in (0.0, 1.0):
            raise ValueError(
                f"paw_window_mean_frac is {self.paw_window_mean_frac}; the window is K times a sigmoid, "
                f"so it must lie inside (0, 1)"
            )
        if self.paw_fixed_window > self.paw_horizon:
            raise ValueError(
                f"paw_fixed_window is {self.paw_fixed_window}, above paw_horizon {self.paw_horizon}"
            )
        if self.chunk_width % self.chunk_heads:
            raise ValueError(
                f"chunk_width {self.chunk_width} is not divisible by chunk_heads {self.chunk_heads}"
            )
        if self.gate and self.gate_inputs != GateInputs.RESIDUAL and not self.paw:
            raise ValueError(
                f'gate_inputs is "{self.gate_inputs}" but paw is off; set gate_inputs to "residual"'
            )
        if not self.gate and self.gates != GateMode.DENSE:
            raise ValueError(
                f'gates is "{self.gates}" but the model has no gate; set gate to true or gates to "dense"'
            )
        if isinstance(self.paw_layers, str) and self.paw_layers != "all":
            step = self.paw_layers.removeprefix("every:")
            if step == self.paw_layers or not step.isdigit() or int(step) < 1:
                raise ValueError(
                    f'paw_layers is {self.paw_layers!r}; give "all", "every:N" or a list of layers'
                )
        if self.backbone_type:
            self._validate_with_backbone()

    def _validate_with_backbone(self) -> None:
        if self.paw and not self.preview_layers:
            raise ValueError("paw is on but paw_layers is empty; name a layer or set paw to false")
        boundary, readers = self.boundary_layer, self.reader_layers
        if boundary is not None and not readers:
            raise ValueError(
                f"no layer lies above the boundary layer {boundary}; lower it or set chunk to false"
            )
        if boundary is not None and readers[0] <= boundary:
            raise ValueError(
                f"chunk_layers starts at {readers[0]}, not above the boundary layer {boundary}; "
                f"raise it or lower chunk_boundary_layer"
            )
        self.forced_layers()
        if (
            self.gate_leaders
            and self.gate_inputs != GateInputs.RESIDUAL
            and self.preview_layers[0] > self.gate_leaders[0]
        ):
            raise ValueError(
                f"the first gate (layer {self.gate_leaders[0]}) comes before the first preview (layer "
                f'{self.preview_layers[0]}); start paw_layers earlier or set gate_inputs to "residual"'
            )
        if self.paw_shortlist > self.preview_vocab_size:
            raise ValueError(
                f"paw_shortlist is {self.paw_shortlist}, above the preview vocabulary of "
                f"{self.preview_vocab_size} tokens"
            )
        if self.paw and self.paw_compression == Compression.CONV and self.preview_width % 16:
            raise ValueError(
                f'paw_compression "conv" works on groups of 16 channels; {self.preview_width} is not divisible by 16'
            )

    def _resolve(self, name: str, layers: Sequence[int]) -> tuple[int, ...]:
        resolved = set()
        for layer in layers:
            if not -self.layer_count <= layer < self.layer_count:
                raise ValueError(
                    f"{name} names layer {layer}, but the model has layers 0 to {self.layer_count - 1}"
                )
            resolved.add(layer % self.layer_count)
        return tuple(sorted(resolved))


_POSITIVE = (
    "adapter_rank", "paw_horizon", "paw_fixed_window", "paw_temperature", "paw_window_hidden", "paw_rank",
    "paw_vocab_size", "paw_shortlist", "chunk_width", "chunk_heads", "chunk_cache", "chunk_distance_buckets",
    "gate_residual_width", "gate_preview_width", "gate_hidden", "gate_block", "gate_logit_clip",
    "segment_max_sentences", "segment_max_paragraphs", "segment_max_tokens", "loss_preview_taps",
    "loss_preview_every",
)  # fmt: skip

_OPTION_PREFIXES = (
    "paw",
    "chunk_",
    "gate",
    "loss_",
    "segment_",
    "adapter_",
    "skip_",
    "kv_on",
    "never_",
)
_NOT_INHERITED = {
    "model_type", "architectures", "transformers_version", "quantization_config", "auto_map", "layer_types",
    "id2label", "label2id", "backbone_type", "per_layer_config",
}  # fmt: skip
# Everything that FBSConfig declares and a backbone configuration does not.
OPTION_NAMES = frozenset(
    name
    for name in FBSConfig.__annotations__
    if name in {"gates", "tau", "paw", "chunk", "gate"} or name.startswith(_OPTION_PREFIXES)
)


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, OPTION_NAMES, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _choose(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in [str(a) for a in allowed]:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
