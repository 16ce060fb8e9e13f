"""vLLM among the engines of `python -m fbs_rl.bench latency`: stock vLLM, and the plugin, each a process of its own.

No token can be forced on vLLM. It draws its own, greedily, behind random prompts that differ from run to run: one
token more than there are steps, the first of which is the prefill's. So a request is the same work as the others'
prefill and forced steps. Times are those of vLLM's own process, by the host's clock.
"""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fbs_rl.bench_engine import EngineFacts, EngineSpec, Request, RequestSpec
from fbs_rl.bench_folders import FBS, PLAIN, savable, write_folders
from fbs_rl.engine_processes import Channel, answer, running
from fbs_rl.gate_trace import GateTrace
from fbs_rl.latency_engines import StepTrace, Variant, Workload, bar_of, logits_of_share
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.serving.engine_options import gpu_share
from fbs_rl.types import GateMode

STOCK, PLUGIN = "vllm", "vllm-fbs"
_FOLDERS = {STOCK: PLAIN, PLUGIN: FBS}
_LEAST_CACHE_BYTES = 2**31
_REQUEST_S = 600.0


@dataclass(frozen=True, slots=True)
class VLLMOptions:
    """How the engines are made. options: of vllm.LLM, for both. serving: settings of the plugin."""

    dtype: torch.dtype
    device: torch.device
    options: Mapping[str, Any] = field(default_factory=dict)
    serving: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VLLMProcesses:
    """Engines that run, by name; what each says of itself."""

    channels: Mapping[str, Channel]
    facts: Mapping[str, EngineFacts]

    def engine(self, variant: Variant, config: FBSConfig, load: Workload) -> VLLMEngine:
        return VLLMEngine(self.channels[variant.engine], variant, config, load)


@contextmanager
def start(
    names: Sequence[str], backbone: PreTrainedModel, model: FBSForCausalLM, most: Workload, options: VLLMOptions
) -> Iterator[VLLMProcesses]:  # fmt: skip
    """Engines on the same weights as the others, alive as long as the context. most: rows of the largest request.

    Raises ValueError without vLLM, OSError for an engine that cannot start.
    """
    if not names:
        yield VLLMProcesses({}, {})
        return
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"the engine {names[0]} needs vLLM; install fbs_rl[cpu] or fbs_rl[cuda], or name other --engines"
        )
    with tempfile.TemporaryDirectory(prefix="fbs_bench_") as folder:
        weight_bytes = write_folders(Path(folder), savable(backbone), model)
        specs = {
            name: _spec(name, Path(folder), model.config, most, weight_bytes, options)
            for name in names
        }
        with running(specs, torch.get_num_threads()) as (channels, facts):
            yield VLLMProcesses(channels, facts)


def _spec(
    name: str, folder: Path, config: FBSConfig, most: Workload, weight_bytes: int, options: VLLMOptions
) -> EngineSpec:  # fmt: skip
    given: dict[str, Any] = {}
    if options.device.type == "cuda":
        # All engines share the device, so each takes what it needs and not its default, nearly all of it.
        cache = max(_LEAST_CACHE_BYTES, 2 * _cache_bytes(config, most, options.dtype))
        total = torch.cuda.get_device_properties(options.device).total_memory
        given["kv_cache_memory_bytes"] = cache
        given["gpu_memory_utilization"] = gpu_share(weight_bytes, cache, total)
    if name == PLUGIN and options.serving:
        given["additional_config"] = {"fbs": dict(options.serving)}
    return EngineSpec(
        folder=str(folder / _FOLDERS[name]),
        dtype=str(options.dtype).removeprefix("torch."),
        rows=most.rows,
        prompt_tokens=most.prompt_tokens,
        new_tokens=most.new_tokens + 1,
        options={**given, **options.options},
        platform=options.device.type,
    )


def _cache_bytes(config: FBSConfig, most: Workload, dtype: torch.dtype) -> int:
    """Of the keys and values of the largest request."""
    groups = config.num_key_value_heads or config.num_attention_heads
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    entry = 2 * config.layer_count * groups * width * dtype.itemsize
    return most.rows * (most.prompt_tokens + most.new_tokens + 1) * entry


class VLLMEngine:
    """One variant in a running engine; variants of the plugin share one, so each request says how its gates act."""

    def __init__(
        self, channel: Channel, variant: Variant, config: FBSConfig, load: Workload
    ) -> None:
        self.channel, self.variant, self.config, self.load = channel, variant, config, load
        self.logit_L = logits_of_share(config, variant)
        self.seeds, self.traces = itertools.count(), list[GateTrace]()

    def request_ms(self) -> list[float]:
        spec = RequestSpec(self.load.rows, next(self.seeds), self._gates(), self.logit_L)
        self.channel.send(spec)
        doing = f"generate for {self.load.rows} rows"
        made: Request = answer(self.channel, self.variant.name, doing, _REQUEST_S)
        found, wanted = len(made.arrival_T), self.load.new_tokens + 1
        if found != wanted:
            raise OSError(f"{self.variant.name} made {found} tokens where {wanted} were asked for")
        self.traces = made.traces
        return (1e3 * np.diff(np.array([0.0, *made.arrival_T]))).tolist()

    def _gates(self) -> dict[str, Any] | None:
        if self.variant.engine == STOCK:
            return None
        mode = self.variant.mode
        if mode is GateMode.SAMPLE:
            return {"gates": mode.value, "gate_seed": 0}
        return {"gates": mode.value} | (
            {"tau": bar_of(self.variant)} if mode is GateMode.THRESHOLD else {}
        )

    def trace(self) -> StepTrace:
        if not self.traces:
            return StepTrace()
        skip_LBT = torch.stack([torch.from_numpy(t.skip_TL.T.copy()) for t in self.traces], 1)
        if not self.config.chunk:
            return StepTrace(skip_LBT)
        chunks_BT, closes_BT = (
            torch.from_numpy(np.stack([getattr(t, name) for t in self.traces]))
            for name in ("chunks_T", "closes_T")
        )
        return StepTrace(skip_LBT, chunks_BT, closes_BT)
