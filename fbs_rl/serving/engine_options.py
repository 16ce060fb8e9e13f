"""How an engine for rollouts is made, and which weights it reads. Imports no vLLM."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbs_rl.serving.serving_settings import ServingSettings

_DAY_S = 86400.0
_GIB = 2**30
_ACTIVATIONS_GIB = 1
_LARGEST_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine for rollouts is made; equal results need equal options.

    max_model_tokens: longest prompt with its continuation, and one more. dtype: as in vLLM ("auto": the folder's).
    max_sequences: at a time. step_tokens: at most in one step, and no fewer than the longest text, since none
    is read in pieces. kv_cache_gib: of keys and values; what does not fit is preempted and replayed.
    decode_path: "compact" or "masked".
    Limit: the logits of a scored text are in memory at once, vocabulary × 8 bytes a token.
    """

    max_model_tokens: int = 2048
    dtype: str = "auto"
    max_sequences: int = 64
    step_tokens: int = 2048
    kv_cache_gib: float = 2.0
    decode_path: str = "compact"

    def __post_init__(self) -> None:
        for name in ("max_model_tokens", "max_sequences", "step_tokens", "kv_cache_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give more than 0")
        least = max(self.max_model_tokens, self.max_sequences)
        if self.step_tokens < least:
            raise ValueError(
                f"step_tokens is {self.step_tokens}, but the longest text has {self.max_model_tokens} tokens and "
                f"{self.max_sequences} sequences need one each; give at least {least}"
            )
        ServingSettings(decode_path=self.decode_path)

    def gpu_share(self, folder: str | Path, total_bytes: int) -> float:
        """As the function of this name, for the weights in `folder`."""
        weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        return gpu_share(weights, int(self.kv_cache_gib * _GIB), total_bytes)

    def to_vllm(self) -> dict[str, Any]:
        """Arguments of vllm.LLM. No prefix cache: what it has seen before would move the last bits."""
        return {
            "max_model_len": self.max_model_tokens,
            "dtype": self.dtype,
            "max_num_seqs": self.max_sequences,
            "max_num_batched_tokens": self.step_tokens,
            # After each piece of a prompt vLLM rewinds the request's generator, which those of CPUs cannot.
            "enable_chunked_prefill": False,
            "kv_cache_memory_bytes": int(self.kv_cache_gib * _GIB),
            "gpu_memory_utilization": 0.5,  # of a CPU's memory too, that must be free at the start
            "enable_prefix_caching": False,
            "logprobs_mode": "raw_logprobs",
            "generation_config": "vllm",  # the model's own end tokens say nothing here
            "skip_tokenizer_init": True,
            # A trace must wait for the slowest request of its batch.
            "additional_config": {"fbs": {"decode_path": self.decode_path, "trace_s": _DAY_S}},
        }


def gpu_share(weight_bytes: int, cache_bytes: int, total_bytes: int) -> float:
    """The part of a GPU with `total_bytes` that an engine needs, and must find free at its start.

    Others may be on that GPU: vLLM's own default, nearly all of it, would refuse to start beside a learner.
    """
    needed = weight_bytes + cache_bytes + _ACTIVATIONS_GIB * _GIB
    return min(_LARGEST_SHARE, round(needed / total_bytes, 3))


def folder_digest(folder: str | Path) -> str:
    """sha256 over the configuration and the weights of a Hugging Face folder; ValueError if it is none."""
    files = [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]
    if len(files) < 2 or not files[0].is_file():
        raise ValueError(
            f"{folder} holds no config.json with safetensors weights; give a folder written by save_pretrained"
        )
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} ".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
