"""FBSModel: the decoder without its language-model head, and which pass runs which tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fbs_rl.model.backbone import FAMILIES
from fbs_rl.model.chunk_head import BoundaryHead, ChunkReader
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.decision import Decider, check_replay
from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.layer import FBSLayer
from fbs_rl.model.native_step import native_step
from fbs_rl.model.preview import Paw, PreviewHead
from fbs_rl.model.segment_position import SegmentPosition
from fbs_rl.model.sequence_pass import PassResult, Tokens, run_sequence
from fbs_rl.model.skip_gate import SkipGate
from fbs_rl.model.skip_path import SkipAdapter, SkipIdentity
from fbs_rl.model.step_pass import run_step
from fbs_rl.types import GateMode, GateRequest, PassTaps, SkippingRows

NEW_MODULES = (
    PreviewHead,
    Paw,
    BoundaryHead,
    ChunkReader,
    SkipGate,
    SkipAdapter,
    SkipIdentity,
    SegmentPosition,
)
"""The module classes that FBS adds to a backbone."""


def backbone_config(config: FBSConfig) -> PreTrainedConfig:
    """The backbone's own configuration (LlamaConfig, Qwen3Config) out of an FBS configuration."""
    if config.backbone_type not in FAMILIES:
        raise ValueError(
            f"backbone_type is {config.backbone_type!r}; it must be one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[config.backbone_type]
    names = {f.name for f in dataclasses.fields(family.config)} - {"architectures", "layer_types"}  # pyright: ignore[reportArgumentType]
    made = family.config(**{n: getattr(config, n) for n in names if hasattr(config, n)})
    made._attn_implementation = config._attn_implementation
    return made


class FBSPreTrainedModel(PreTrainedModel):
    """Weights, initial values and capabilities that the library asks about."""

    config: FBSConfig
    config_class = FBSConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FBSLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NEW_MODULES):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class FBSModel(FBSPreTrainedModel):
    """The decoder without its language-model head."""

    def __init__(self, config: FBSConfig) -> None:
        super().__init__(config)
        family, plain = FAMILIES[config.backbone_type], backbone_config(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            FBSLayer(config, family.layer(plain, i), i) for i in range(config.layer_count)
        )
        self.norm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = family.rotary(config=plain)
        self.preview = PreviewHead(config) if config.paw else None
        self.boundary = BoundaryHead(config) if config.chunk else None
        self.segment_position = SegmentPosition(config) if config.segment_position else None
        self.gradient_checkpointing = False
        self.document_attention = "mask"  # "blocks": FlexAttention where it applies, for training
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.embed_tokens = value

    def fbs_layers(self) -> Iterator[FBSLayer]:
        for layer in self.layers:
            assert isinstance(layer, FBSLayer)
            yield layer

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that FBS added to the backbone."""
        for prefix, module in self.named_modules():
            if isinstance(module, NEW_MODULES):
                yield from module.named_parameters(prefix)

    def forget_derived(self) -> None:
        """Drop what is kept of weights between calls; needed after writes through `.data` (DeepSpeed's, a sync's)."""
        if self.preview is not None:
            self.preview.forget_derived()
        for layer in self.fbs_layers():
            if layer.paw is not None:
                layer.paw.forget_derived()

    def derived(self) -> tuple[object, ...]:
        """What is kept of weights between calls; a captured graph reads it where it lies."""
        found = () if self.preview is None else self.preview.derived()
        for layer in self.fbs_layers():
            if layer.paw is not None:
                found += layer.paw.derived()
        return found

    def run(
        self,
        input_ids: Tensor | None,
        request: GateRequest,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        window_temperature: float | None = None,
        cache: FBSCache | None = None,
        keep_states: bool = False,
        skipping: SkippingRows = SkippingRows.DROPPED,
    ) -> PassResult:
        """All tokens of a call: in parallel where nothing of a cache is behind them, else step by step.

        skipping: of those steps.
        """
        temperature = (
            self.config.paw_temperature if window_temperature is None else window_temperature
        )
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = embeds.shape[:2]
        valid_BT = None
        if attention_mask is not None:
            valid_BT = attention_mask[:, -length:].bool()
            if bool(valid_BT.all()):
                valid_BT = None
        position_BT = self._positions(position_ids, valid_BT, batch, length, embeds.device, cache)
        embeds = self._add_segments(embeds, input_ids, valid_BT, document_ids, cache)
        rope = self.rotary_emb(embeds, position_BT)
        tokens = Tokens(embeds, position_BT, rope, valid_BT, document_ids, keep_states)
        decider = Decider.of(self.config, request, position_BT, valid_BT)
        if request.mode is GateMode.REPLAY:
            check_replay(self.config, request, decider.gated_BT)
        if cache is None:
            return run_sequence(self, tokens, decider, temperature)
        if document_ids is not None:
            raise ValueError(
                "document_ids is for whole packed sequences; with a cache feed one document a row"
            )
        result = self._run_cached(tokens, decider, temperature, cache, skipping)
        cache.columns += length
        following_B = (position_BT + 1 if valid_BT is None else (position_BT + 1) * valid_BT).amax(
            1
        )
        # A row whose tokens were all padding stays where it was.
        cache.position_B = (
            following_B if cache.position_B is None else following_B.maximum(cache.position_B)
        )
        return result

    def _run_cached(
        self, tokens: Tokens, decider: Decider, temperature: float, cache: FBSCache, skipping: SkippingRows
    ) -> PassResult:  # fmt: skip
        """The prompt's leading columns, in which no gate acts, at once; what follows a column at a time."""
        length = tokens.position_BT.shape[1]
        prompt = length
        if cache.columns > 0:
            prompt = 0
        elif decider.request.mode is not GateMode.DENSE and bool(decider.gated_BT.any()):
            prompt = int(decider.gated_BT.any(0).long().argmax())
        parts = []
        if prompt:
            parts.append(
                run_sequence(
                    self,
                    _columns(tokens, 0, prompt),
                    _narrow(decider, 0, prompt),
                    temperature,
                    cache,
                )
            )
        for t in range(prompt, length):
            token, decides = _columns(tokens, t, t + 1), _narrow(decider, t, t + 1)
            native = None
            if skipping is SkippingRows.DROPPED:
                native = native_step(self, token, cache)
            if native is not None:
                parts.append(native.run(self, token, decides, temperature, cache))
            else:
                parts.append(run_step(self, token, decides, temperature, cache, skipping))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _positions(
        self, position_ids: Tensor | None, valid_BT: Tensor | None, batch: int, length: int, device: torch.device,
        cache: FBSCache | None,
    ) -> Tensor:  # fmt: skip
        """Positions [B, T], counted over valid tokens (padding gets that of its neighbour)."""
        if position_ids is not None:
            return position_ids.expand(batch, -1)[:, -length:]
        first_B = torch.zeros(batch, dtype=torch.long, device=device)
        if cache is not None and cache.position_B is not None:
            first_B = cache.position_B
        if valid_BT is None:
            return first_B.unsqueeze(1) + torch.arange(length, device=device)
        return first_B.unsqueeze(1) + (valid_BT.long().cumsum(1) - 1).clamp_min(0)

    def _add_segments(
        self, embeds: Tensor, ids: Tensor | None, valid_BT: Tensor | None, document_BT: Tensor | None,
        cache: FBSCache | None,
    ) -> Tensor:  # fmt: skip
        if self.segment_position is None:
            return embeds
        if ids is None:
            raise ValueError(
                "segment_position needs input_ids: sentence ends are seen in token ids, not in embeddings"
            )
        state = None if cache is None else cache.segments
        index_BT3, state = self.segment_position.walk(ids, state, valid_BT, document_BT)
        if cache is not None:
            cache.segments = state
        return embeds + self.segment_position(index_BT3).to(embeds.dtype)


def _columns(tokens: Tokens, start: int, stop: int) -> Tokens:
    part = slice(start, stop)
    return Tokens(
        tokens.state_BTd[:, part],
        tokens.position_BT[:, part],
        (tokens.rope[0][:, part], tokens.rope[1][:, part]),
        None if tokens.valid_BT is None else tokens.valid_BT[:, part],
    )


def _narrow(decider: Decider, start: int, stop: int) -> Decider:
    part, request = slice(start, stop), decider.request
    given = {
        name: told[:, :, part]
        for name, told in (("skip_LBT", request.skip_LBT), ("noise_LBT", request.noise_LBT))
        if told is not None
    }
    return dataclasses.replace(
        decider,
        request=dataclasses.replace(request, **given) if given else request,
        position_BT=decider.position_BT[:, part],
        gated_BT=decider.gated_BT[:, part],
    )


def _joined(parts: list[PassResult]) -> PassResult:
    taps = PassTaps()
    for index, first in enumerate(parts[0].taps.previews):
        windows = torch.cat([p.taps.previews[index].window_BT for p in parts], dim=1)
        taps.previews.append(dataclasses.replace(first, window_BT=windows))
    if parts[0].taps.chunks is not None:
        logits = torch.cat(
            [p.taps.chunks.boundary_logits_BT4 for p in parts if p.taps.chunks], dim=1
        )
        taps.chunks = dataclasses.replace(parts[0].taps.chunks, boundary_logits_BT4=logits)
    return PassResult(
        torch.cat([p.state_BTd for p in parts], dim=1),
        torch.cat([p.prob_LBT for p in parts], dim=2),
        torch.cat([p.skip_LBT for p in parts], dim=2),
        taps,
    )
