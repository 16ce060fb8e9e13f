"""What each piece of a decoding step costs: multiply-accumulates and weights, from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.types import BIOS, Compression, GateInputs, SkipPathKind


@dataclass(frozen=True, slots=True)
class Work:
    """MACs for one token, and the weights (norms and biases included) that must be read for them."""

    macs: int = 0
    weights: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.macs + other.macs, self.weights + other.weights)


def _linear(inputs: int, outputs: int, bias: bool = False) -> Work:
    return Work(inputs * outputs, inputs * outputs + outputs * bias)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Cost of each piece of one decoding step, for one token; a piece that the model lacks costs nothing.

    query_out, key_value, mlp: the parts of one layer; query_out includes W_o and the norm before the MLP,
    key_value the norm before attention. key_macs: attention, per key. adapter: one skipped layer.
    shortlist: once a step. look: one PAW layer up to ṽ. inject: W_up, when the layer runs. boundary: once a
    step. read: one chunk layer's W_q and W_o, when it runs. chunk_macs: its attention, per chunk or null
    slot. close: one chunk layer, when a chunk closes. gate: one gate. head: final norm and LM head.
    """

    query_out: Work
    key_value: Work
    mlp: Work
    key_macs: int
    adapter: Work
    shortlist: Work
    look: Work
    inject: Work
    boundary: Work
    read: Work
    chunk_macs: int
    close: Work
    gate: Work
    head: Work

    @classmethod
    def of(cls, config: FBSConfig) -> CostModel:
        """Costs of a model with this configuration, which must be bound to a backbone."""
        if not config.backbone_type:
            raise ValueError("the configuration has no backbone; call bound_to(backbone) first")
        assert config.head_dim is not None and config.num_key_value_heads is not None
        d, bias, head_norm = config.hidden_size, config.attention_bias, config.head_dim
        if config.backbone_type != "qwen3":  # only Qwen3 norms queries and keys per head
            head_norm = 0
        mlp_bias = config.mlp_bias and config.backbone_type == "llama"
        ff, query = config.intermediate_size, config.num_attention_heads * config.head_dim
        grouped = config.num_key_value_heads * config.head_dim
        rank, width = config.adapter_rank, config.chunk_width
        none, norm = Work(), Work(0, d)
        adapts = config.skip_path == SkipPathKind.ADAPTER
        injects = _linear(config.pooled_width, d) + Work(0, config.pooled_width + 1)
        reads = _linear(d, width) + _linear(width, d)
        reads += Work(0, config.chunk_heads * config.chunk_distance_buckets + 2 * width + 1)
        closes = _linear(d, width) + _linear(width, 2 * width)
        return cls(
            query_out=_linear(d, query, bias) + _linear(query, d, bias) + norm + Work(0, head_norm),
            key_value=_linear(d, 2 * grouped, bias) + norm + Work(0, head_norm),
            mlp=_linear(d, 2 * ff, mlp_bias) + _linear(ff, d, mlp_bias),
            key_macs=2 * query,
            adapter=_linear(d, rank) + _linear(rank, d) if adapts else none,
            shortlist=_shortlist(config) if config.paw else none,
            look=_look(config) if config.paw else none,
            inject=injects if config.paw else none,
            boundary=_linear(d, len(BIOS) + 1, bias=True) if config.chunk else none,
            read=reads if config.chunk else none,
            chunk_macs=2 * width * config.chunk,
            close=closes if config.chunk else none,
            gate=_gate(config) if config.gate else none,
            head=_linear(d, config.vocab_size) + norm,
        )

    @property
    def layer(self) -> Work:
        """One executed layer of the backbone, without the attention product."""
        return self.query_out + self.key_value + self.mlp

    def layer_macs(self, keys: int) -> int:
        """c_layer(n): MACs of one executed layer of the backbone that sees `keys` keys, its own among them."""
        return self.layer.macs + self.key_macs * keys


def _shortlist(config: FBSConfig) -> Work:
    """Mean-horizon map, scores of the preview vocabulary, log prior."""
    rank, size = config.paw_rank, config.preview_vocab_size
    return _linear(rank, rank) + _linear(rank, size) + Work(0, size)


def _look(config: FBSConfig) -> Work:
    """State projection, window predictor, horizon maps, scores and expectation over the shortlist, compression."""
    d, rank, width = config.hidden_size, config.paw_rank, config.preview_width
    horizons = config.paw_horizon
    work = _linear(d, rank) + Work(0, 2 * rank) + _linear(rank, horizons * rank)
    if config.paw_window == "dynamic":
        hidden = config.paw_window_hidden
        work += _linear(d, hidden) + _linear(hidden, 1, bias=True)
    work += Work(horizons * config.paw_shortlist * (rank + width))
    if config.paw_compression == Compression.LINEAR:
        work += _linear(width * horizons, width)
    if config.paw_compression == Compression.CONV:
        kernel = width * 16 * 3  # groups of 16 channels, three taps; padding is multiplied too
        work += Work(horizons * kernel, kernel + width)
    return work


def _gate(config: FBSConfig) -> Work:
    work, width = Work(), 0
    if config.gate_inputs != GateInputs.PREVIEW:
        residual = config.gate_residual_width
        work += _linear(config.hidden_size, residual) + Work(0, residual)
        width += residual + 2  # motion
    if config.gate_inputs != GateInputs.RESIDUAL:
        work += _linear(config.pooled_width, config.gate_preview_width)
        width += config.gate_preview_width + 1  # entropy
    return work + _linear(width, config.gate_hidden, True) + _linear(config.gate_hidden, 1, True)
