"""FBSForCausalLM: a Fovea-Block-Skip Transformer around a pretrained backbone, as a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)

from fbs_rl.model.backbone import ModelSource, check_family, load_backbone
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.decoder import NEW_MODULES, FBSModel, FBSPreTrainedModel
from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.native_step import few_rows
from fbs_rl.model.objective import Supervision, compute_losses
from fbs_rl.model.sequence_pass import PassResult
from fbs_rl.types import (
    ChunkLabels,
    DenseReference,
    FBSOutput,
    GateMode,
    GateRequest,
    LossReport,
    LossScope,
    as_row_vector,
)


class FBSForCausalLM(FBSPreTrainedModel, GenerationMixin):
    """A causal language model that skims. Make one with `from_backbone`, or read a saved one with `from_pretrained`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FBSConfig) -> None:
        super().__init__(config)
        self.model = FBSModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        name: str | PreTrainedModel,
        fbs: FBSConfig | str | None = None,
        gguf_file: str | None = None,
        dtype: torch.dtype | str = "auto",
        seed: int = 0,
    ) -> FBSForCausalLM:
        """A backbone with new modules at their initial values, in evaluation mode.

        name: hub id, folder, .gguf file, or a loaded Qwen3 or Llama model (whose modules are taken over, not
        copied). fbs: options, or the name of a preset; None is "default". seed: of the new modules.
        With gates="dense" the result's logits equal the backbone's to the last bit.
        """
        backbone = (
            name
            if isinstance(name, PreTrainedModel)
            else load_backbone(ModelSource.parse(name, gguf_file), dtype)
        )
        check_family(backbone.config, type(backbone).__name__)
        options = fbs if isinstance(fbs, FBSConfig) else FBSConfig.preset(fbs or "default")
        config = options.bound_to(backbone.config)
        config._attn_implementation = backbone.config._attn_implementation
        with torch.device("meta"):
            model = cls(config)
        model._take_backbone(backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in model.modules():
                if isinstance(module, NEW_MODULES):
                    module.to_empty(device="cpu")
                    module.reset_parameters()
        for module in model.modules():
            if isinstance(module, NEW_MODULES):
                module.to(backbone.device, backbone.dtype)
        made: Any = model
        made.generation_config = (
            GenerationConfig(**backbone.generation_config.to_dict())
            if backbone.generation_config
            else None
        )
        return model.eval()

    def _take_backbone(self, backbone: PreTrainedModel) -> None:
        source: Any = backbone
        self.model.embed_tokens, self.model.norm = source.model.embed_tokens, source.model.norm
        self.model.rotary_emb, self.lm_head = source.model.rotary_emb, source.lm_head
        for mine, theirs in zip(self.model.fbs_layers(), source.model.layers, strict=True):
            for part in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
                setattr(mine, part, getattr(theirs, part))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FBSCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        gates: GateMode | str | None = None,
        tau: float | Tensor | None = None,
        decode_start: int | Tensor | None = None,
        skip: Tensor | None = None,
        gate_seed: int | Tensor | None = None,
        gate_temperature: float = 1.0,
        window_temperature: float | None = None,
        never_skip: Sequence[int] = (),
        document_ids: Tensor | None = None,
        chunk_labels: ChunkLabels | None = None,
        dense: DenseReference | None = None,
        loss_seed: int = 0,
        skip_target: float | None = None,
        loss_scope: LossScope | None = None,
        with_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> FBSOutput:
        """Logits, gate probabilities, actions and, with labels, the weighted losses.

        gates: GateMode; None takes the configuration's. tau: threshold, one or one a row. decode_start:
        position of the first token that may skip, one or one a row (None: 0 without a cache, the prompt's
        length with one). skip [L, B, T]: actions for gates="replay". gate_seed: noise of gates="sample", one a
        row. never_skip: more layers that always run. document_ids [B, T]: documents of packed sequences.
        dense: the distribution that L_distill pulls towards (None: this model's own dense pass, when
        loss_distill is above 0 and gates act). loss_seed: draws the previews that are scored. loss_scope: the
        optimizer step that this call is a part of. with_logits: False saves [B, T, V] when only losses matter.

        output_hidden_states: also return the state entering each layer and the final normed one (without a cache).

        Raises ValueError, in one sentence, for arguments that do not fit.
        """
        source, cache = self._inputs(input_ids, inputs_embeds, past_key_values, use_cache)
        request = self._request(
            source, attention_mask, cache, gates, tau, decode_start, skip, gate_seed, gate_temperature, never_skip
        )  # fmt: skip
        result = self.model.run(
            input_ids, request, attention_mask, position_ids, document_ids, inputs_embeds, window_temperature, cache,
            bool(output_hidden_states),
        )  # fmt: skip
        hidden = self.model.norm(result.state_BTd)
        logits = self._logits(hidden, logits_to_keep, cache is not None) if with_logits else None
        report = None
        if labels is not None:
            if cache is not None or input_ids is None:
                raise ValueError("labels need a whole sequence of input_ids without a cache")
            if (
                dense is None
                and self.config.loss_distill > 0
                and request.mode is not GateMode.DENSE
            ):
                dense = self.dense_reference(
                    input_ids, attention_mask, position_ids, document_ids, window_temperature
                )
            target = self.config.loss_skip_target if skip_target is None else skip_target
            supervision = Supervision(
                input_ids, labels, request.mode, target, document_ids, chunk_labels, dense, loss_seed, loss_scope
            )  # fmt: skip
            report = compute_losses(self.model, self.lm_head.weight, result, hidden, supervision)
        return _output(result, logits, hidden, cache, report, bool(output_hidden_states))

    def _logits(self, hidden_BTd: Tensor, keep: int | Tensor, cached: bool) -> Tensor:
        """Of the last `keep` tokens (0: all), or of those at the positions given. cached: tokens behind others."""
        asked_BTd = hidden_BTd[:, slice(-keep, None) if isinstance(keep, int) else keep, :]
        if cached and hidden_BTd.shape[1] == 1:
            return few_rows(self.lm_head, asked_BTd)
        return self.lm_head(asked_BTd)

    def _inputs(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: FBSCache | None,
        use_cache: bool | None,
    ) -> tuple[Tensor, FBSCache | None]:
        """(tokens or their embeddings, cache) of a call, if they fit the model; ValueError, in one sentence."""
        source = inputs_embeds if input_ids is None else input_ids
        if source is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give input_ids or inputs_embeds, exactly one of them")
        if cache is None and use_cache:
            cache = FBSCache(self.config.layer_count)
        if cache is not None and not isinstance(cache, FBSCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; an FBS model needs an FBSCache (or None)"
            )
        tokens = source.shape[1] + (0 if cache is None else cache.columns)
        if tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"{tokens} tokens are more than the model's context of "
                f"{self.config.max_position_embeddings}; shorten the prompt or ask for fewer new tokens"
            )
        return source, cache

    def _request(
        self, source: Tensor, attention_mask: Tensor | None, cache: FBSCache | None, gates: GateMode | str | None,
        tau: float | Tensor | None, decode_start: int | Tensor | None, skip: Tensor | None,
        gate_seed: int | Tensor | None, gate_temperature: float, never_skip: Sequence[int],
    ) -> GateRequest:  # fmt: skip
        batch, device = source.shape[0], source.device
        if gates is not None and gates not in list(GateMode):
            raise ValueError(f"gates is {gates!r}; it must be one of {', '.join(GateMode)}")
        mode = GateMode(self.config.gates if gates is None else gates)
        if mode in (GateMode.THRESHOLD, GateMode.SAMPLE) and not self.config.gate:
            raise ValueError(f'gates is "{mode}" but this model was made without gates')
        tau = self.config.tau if tau is None else tau
        tau_B = as_row_vector(tau, batch, torch.float32, device)
        inside = bool(((tau >= 0) & (tau <= 1)).all()) if isinstance(tau, Tensor) else 0 <= tau <= 1
        if not inside:
            raise ValueError(f"tau is {tau}; a threshold on a probability lies in [0, 1]")
        if mode is GateMode.SAMPLE and gate_seed is None:
            raise ValueError(
                'gates="sample" needs gate_seed (one or one a row): draws are a function of it'
            )
        seed_B = None if gate_seed is None else as_row_vector(gate_seed, batch, torch.int64, device)
        if decode_start is None and cache is not None:
            if cache.decode_start_B is None:
                length = source.shape[1] if attention_mask is None else attention_mask.long().sum(1)
                cache.decode_start_B = as_row_vector(length, batch, torch.int64, device)
            start_B = cache.decode_start_B
        else:
            start_B = as_row_vector(
                0 if decode_start is None else decode_start, batch, torch.int64, device
            )
        return GateRequest(
            mode, tau_B, start_B, gate_temperature, seed_B, skip, frozenset(never_skip)
        )

    @torch.no_grad()
    def dense_reference(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        window_temperature: float | None = None,
    ) -> DenseReference:
        """This model's own distribution with nothing skipped, as a target for distillation."""
        request = self._request(
            input_ids, attention_mask, None, GateMode.DENSE, None, None, None, None, 1.0, ()
        )
        result = self.model.run(
            input_ids, request, attention_mask, position_ids, document_ids, None, window_temperature
        )
        return DenseReference(self.model.norm(result.state_BTd), self.lm_head.weight.detach())

    # --- generate() -------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, plus forward()'s gate arguments. The prompt never skips, cache or not."""
        prompt = kwargs.get("input_ids", inputs)
        if prompt is not None and kwargs.get("decode_start") is None:
            mask = kwargs.get("attention_mask")
            kwargs["decode_start"] = (
                (self._prompt_mask(prompt) if mask is None else mask).long().sum(1)
            )
        parent: Any = super()
        return parent.generate(inputs, *args, **kwargs)

    def _prompt_mask(self, prompt: Tensor) -> Tensor:
        """The mask that generate() infers when none is given: padding counts where it cannot be an end of text."""
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        ends = eos if isinstance(eos, list) else [eos]
        padding = pad is not None and pad not in ends
        return prompt != pad if padding else torch.ones_like(prompt)

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not know skipped "
                f"layers; leave it out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = FBSCache(self.config.layer_count)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _output(
    result: PassResult, logits: Tensor | None, hidden: Tensor, cache: FBSCache | None, report: LossReport | None,
    with_states: bool,
) -> FBSOutput:  # fmt: skip
    taps = result.taps
    return FBSOutput(
        loss=None if report is None else report.total,
        logits=logits,
        past_key_values=cache,
        hidden_states=(*taps.states, hidden) if with_states and taps.states else None,
        gate_prob=result.prob_LBT,
        skip=result.skip_LBT,
        lookahead=torch.stack([p.window_BT for p in taps.previews]) if taps.previews else None,
        boundary_logits=taps.chunks.boundary_logits_BT4 if taps.chunks else None,
        loss_parts=None if report is None else report.parts,
        loss_report=report,
        taps=taps if cache is None else None,
    )


AutoConfig.register(FBSConfig.model_type, FBSConfig, exist_ok=True)
AutoModelForCausalLM.register(FBSConfig, FBSForCausalLM, exist_ok=True)
